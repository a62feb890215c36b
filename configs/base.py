"""Every field, with its default, unit and meaning, in the order of the data. The defaults are the paper's S-16k recipe.

One file per run overrides what differs; no other file holds a default. Tuples, not lists, so that runs compare equal.
"""
import ml_collections
from ml_collections.config_dict import placeholder


def get_config() -> ml_collections.ConfigDict:
    """The complete, locked configuration (an unknown field is an error)."""
    c = ml_collections.ConfigDict()
    c.name = 's_16k'
    c.seed = 14159265  # of training: all randomness of a step is fold_in(seed, step, name)
    c.stages = ('train',)  # what run.py does without --mode: modes of run.py, in the order given
    c.data_dir = ''  # holds media/ and records/; '' means the workdir, so that several runs can share one folder

    # The built-in dataset (data_pipelines/impacts.py); used by the stage 'impacts' only.
    c.impacts = ml_collections.ConfigDict()
    c.impacts.seed = 0
    c.impacts.duration_s = 4.0  # length of a rendered clip, seconds
    c.impacts.train_clips = 800  # video clips with sound and caption
    c.impacts.train_sounds = 160  # sounds with a caption and no video
    c.impacts.validation_clips = 32
    c.impacts.test_clips = 64
    c.impacts.frame_size = 128  # pixels, square
    c.impacts.fps = 25
    c.impacts.workers = 2  # processes

    # Streams.
    c.sequence = ml_collections.ConfigDict()
    c.sequence.rate = '16k'  # '16k' or '44k'
    c.sequence.duration_s = 8.0  # training length

    # Clip tables of downloaded datasets (data_pipelines/listing.py), made before extraction where they are missing.
    c.clips = ml_collections.ConfigDict()
    # (record set, layout, folder it was unpacked to); the tables go to data_dir/media/<record set>. Layouts: vggsound,
    # audiocaps, clotho, audioset_sl, bbc, freesound (these three of WavCaps), moviegen, greatest_hits, folder_csv.
    c.clips.datasets = ()
    c.clips.exclude = ()  # (record set, file of ids) pairs: what must not be trained on, because it is tested on
    c.clips.short = 'reject'  # sounds shorter than a clip: 'reject', or filled with 'silence', or 'repeat'
    c.clips.validation_clips = 2048  # held out of training where a dataset has no validation split; at most half of it

    # Feature extraction (data_pipelines/extract.py).
    c.extract = ml_collections.ConfigDict()
    c.extract.datasets = ()  # (record set, folder of its <split>.jsonl below data_dir), e.g. ('vggsound', 'media/vggsound')
    # (record set, split, folder of TensorDict memory maps with its .tsv beside it): features of the official code, imported.
    c.extract.memmaps = ()
    c.extract.encoder = 'official'  # 'official' (CLIP + Synchformer) or 'pixels' (no weights)
    c.extract.codec = 'official'  # 'official' (VAE + BigVGAN) or 'pca' (no weights)
    c.extract.codec_fit_dataset = ''  # record set whose 'train' split fits the pca codec; '' for the official codec
    c.extract.feature_dtype = 'float16'  # stored features: 'float16' or 'bfloat16'
    c.extract.rates = ()  # rates that are made in one pass over the media, e.g. ('16k', '44k'); () means sequence.rate alone
    c.extract.batch_size = 16
    c.extract.clips_per_shard = 256
    c.extract.workers = 2  # processes that decode
    c.extract.max_rejected = 0.25  # share of the clips that cannot be used, above which the job stops
    c.extract.process_index = 0  # this process makes the shards process_index, process_index + process_count, …
    c.extract.process_count = 0  # 0: as jax.distributed says
    c.extract.executor = 'local'  # 'local', or 'ray': shards are tasks of a Ray cluster
    c.extract.ray_address = ''  # of an existing cluster, e.g. 'auto'; '' starts one on this machine
    c.extract.ray_actors = 1  # processes that hold the encoders
    c.extract.ray_cpus = 2.0  # of each
    c.extract.ray_resources = ()  # (resource, amount) pairs of each besides, e.g. (('TPU', 4.0),) or (('GPU', 1.0),)

    # Loader (input_pipeline.py).
    c.input = ml_collections.ConfigDict()
    # (record set, integer repeats an epoch); the split 'train' of each is used.
    c.input.mixture = (('vggsound', 5), ('audiocaps', 1), ('audioset_sl', 1), ('bbc', 1), ('freesound', 1), ('clotho', 1))
    c.input.shares = ()  # (record set, share) pairs: training uses only that share of the set's examples, evenly spread
    # (record set, exponent) pairs: an example comes up in proportion to (examples with its label) ** -exponent; 1 gives every
    # label the same share, 0 changes nothing. An epoch stays as long as it is.
    c.input.balance = ()
    c.input.without_text = ()  # record sets whose captions are left out, in training and in evaluation
    c.input.validation = 'vggsound'  # its split 'validation'
    c.input.statistics = 'vggsound'  # latent mean and std are measured on its split 'train'
    c.input.batch_size = 512  # over all devices
    c.input.validation_batch_size = 64  # rounded up so that all devices have as many; no loss depends on it
    c.input.validation_examples = 2048
    c.input.workers = 4  # processes that read records for each process of the run (Slurm: each GPU); 0: threads
    # Batches on the device ahead of the step; threads that read for validation, and without worker processes for training.
    c.input.prefetch = 2

    # Official weights (weights/store.py), wherever they are used. --mode=import brings them, --mode=export writes their form.
    c.weights = ml_collections.ConfigDict()
    c.weights.variants = ()  # import: networks, e.g. ('large_44k_v2',), each with its codec and encoders; () is model.variant
    c.weights.folder = ''  # where official files are looked for first, under their names (also in its weights/, ext_weights/)
    c.weights.cache = ''  # downloads and conversions; '' for $MMAUDIO_JAX_CACHE, or ~/.cache/mmaudio_jax
    c.weights.offline = False  # never download
    c.weights.verify = True  # a file must have the published MD5; False for weights of your own in the official form
    # Training begins with these weights and the statistics of latents that they go with, in a new workdir: an official network
    # ('large_44k_v2'), a folder with official files, or the workdir of another run (its averages). '': as initialised.
    c.weights.start_from = ''
    c.weights.dtype = 'float32'  # of encoders and official networks; 'bfloat16' halves their memory and is quicker on TPUs
    c.weights.export = ('network',)  # 'network' is what the workdir trained; else official networks and VAEs, e.g. 'vae_44k'
    c.weights.export_format = 'pth'  # 'pth' or 'safetensors'

    # The network (models/mmaudio.py). Plain fields of the module.
    c.model = ml_collections.ConfigDict()
    c.model.variant = 'small_16k'  # a key of VARIANTS; the fields below that are not None override it
    c.model.hidden_size = placeholder(int)  # D
    c.model.num_heads = placeholder(int)  # H
    c.model.joint_blocks = placeholder(int)  # N1
    c.model.fused_blocks = placeholder(int)  # N2
    c.model.version = placeholder(int)  # 1 or 2
    c.model.sync_fusion = 'modulate'  # 'modulate', 'sum_with_visual' or 'none'
    c.model.rope = 'aligned'  # 'aligned', 'unaligned' or 'none'
    c.model.mlp = 'conv'  # 'conv' or 'linear' (kernel 1)
    c.model.dtype = 'bfloat16'  # compute dtype, 'bfloat16' or 'float32'; parameters are float32
    # 'xla' (the fastest on TPUs), 'xla_taps' (there with few clips a device, docs/scaling.md), 'matmul' (on CPUs),
    # 'winograd' (on CPUs in float32), or 'auto': by device and dtype
    c.model.convolution = 'auto'
    c.model.remat = 'none'  # 'none', 'blocks' or 'dots'; with mesh.fsdp above 1, 'none' also keeps every gathered parameter
    c.model.scan_layers = True  # False compiles every block: slower to compile, faster to run

    # Flow matching (flow_matching.py) and condition dropout for guidance.
    c.flow = ml_collections.ConfigDict()
    c.flow.min_sigma = 0.0  # of the path in training; sampling ends at t = 1 whatever it is
    c.flow.video_dropout = 0.1
    c.flow.text_dropout = 0.1
    c.flow.independent_video_dropout = False  # v2: CLIP and sync dropped independently

    # Optimizer (optimizer.py).
    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup_steps = 1000
    c.optimizer.schedule = 'step'  # after the warm-up: 'step', 'constant' or 'polynomial' (power 0.9)
    c.optimizer.schedule_steps = (240_000, 270_000)  # 'step': counted from the end of the warm-up
    c.optimizer.schedule_factor = 0.1
    c.optimizer.polynomial_steps = 300_000  # 'polynomial': zero that many steps after the warm-up; usually train.total_steps
    c.optimizer.betas = (0.9, 0.95)
    c.optimizer.eps = 1e-6  # 1e-6 for bfloat16, 1e-8 for float32
    c.optimizer.weight_decay = 1e-6  # on every trained tensor
    c.optimizer.clip_norm = 1.0
    c.optimizer.first_moment_dtype = 'float32'  # 'bfloat16' halves its memory

    # Post-hoc EMA (ema.py).
    c.ema = ml_collections.ConfigDict()
    c.ema.sigma_rels = (0.05, 0.1)
    c.ema.snapshot_every = 5_000  # steps, and at the end; 0: only then
    c.ema.synthesis_sigma_rel = 0.05  # the weights that are sampled from

    # The mesh (partitioning.py): axis sizes, -1 takes the remaining devices. A batch is split over data and fsdp.
    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1
    c.mesh.fsdp = 1  # also splits parameters, moments and averages; divides config.model's width
    c.mesh.tensor = 1  # splits heads and the width of the MLPs; divides both: 2 for M and L, nothing else of the official sizes

    # What the axes split.
    c.sharding = ml_collections.ConfigDict()
    c.sharding.slice_axis = 'data'  # the axis over the slow links, when the devices are several slices: 'data' or 'fsdp'
    c.sharding.whole_params = False  # fsdp splits moments and averages, and leaves parameters whole (ZeRO-1)
    # Matrices, and their gradients' sums, travel between devices in 'compute' (config.model.dtype), or 'float32'.
    c.sharding.exchange_dtype = 'compute'
    c.sharding.rules = ()  # (regular expression, axes) pairs that are tried before those of partitioning.RULES
    # The same for activations, searched in the paths of modules, whose results they place. Without rules results stay where
    # batch and parameters put them. (('/fused$', (('data', 'fsdp'), 'tensor', None)),) splits the tokens between fused blocks.
    c.sharding.activations = ()

    # Several processes (distributed.py). TPU pods, Slurm and Open MPI 4 need nothing here; otherwise set the first three,
    # or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    c.hosts = ml_collections.ConfigDict()
    c.hosts.coordinator = ''  # 'host:port' of process 0, any free port
    c.hosts.count = ''  # number of processes, as text: '4'
    c.hosts.index = ''  # which of them this one is, from '0'
    c.hosts.start_timeout_s = 300  # how long the processes wait for each other at the start
    c.hosts.lost_after_s = 60  # a process that was not heard of for so long is lost, and the others end

    # The loop (train.py).
    c.train = ml_collections.ConfigDict()
    c.train.total_steps = 300_000
    c.train.microbatches = 1  # parts of a batch whose gradients are computed one after the other and averaged; saves memory
    # (name, value) pairs of the TPU compiler's own options for the step, unread elsewhere. This one: no gradient is computed in
    # windows beside the sending of what is done, which on eight chips costs more than it hides (docs/scaling.md).
    c.train.compiler_options = (('xla_jf_spmd_threshold_for_windowed_einsum_mib', '1000000'),)
    # v5e, v5p and v6e sum gradients over the devices beside the backward pass, not between its parts: a shorter step where a
    # device has few clips, more than twice the compile time (docs/scaling.md).
    c.train.async_gradients = False
    c.train.max_skipped = 10  # steps in a row that are not finite and left out before the run stops; 0: the first one stops it
    c.train.log_every = 50  # steps; 0: only before checkpoints
    c.train.profile_steps = ()  # (first, last): a JAX profile of these steps is in workdir/profile; --profile=N-M
    c.train.validate_every = 5_000  # and at the end; 0: only then
    c.train.sample_every = 20_000  # and at the end; 0: never
    c.train.sample_clips = 4  # spectrogram and sound of that many validation clips
    c.train.checkpoint_every = 10_000  # and at the end, and when told to stop; 0: only then
    c.train.keep_last = 2
    c.train.keep_every = 50_000  # checkpoints at these steps are never deleted; 0: none

    # Sampling (sampler.py).
    c.sampling = ml_collections.ConfigDict()
    c.sampling.solver = 'euler'  # 'euler', 'midpoint', 'heun' or 'dopri5'
    c.sampling.num_steps = 25  # for 'dopri5', which chooses its steps: 1 / the first one that it tries
    # Of the steps: 'uniform', 'cosine' (short at both ends) or 'quadratic' (at the start); 'dopri5' takes 'uniform' alone.
    c.sampling.schedule = 'uniform'
    c.sampling.guidance = 4.5  # w; at 1 or less the conditioned velocity alone
    c.sampling.negative_prompt = ''
    c.sampling.seed = 42  # with the number of an example or the name of an input, of which each has noise of its own
    c.sampling.batch_size = 16  # rounded up so that all devices have as many; no sound depends on it

    # Generation (generate.py): --mode=generate.
    c.generate = ml_collections.ConfigDict()
    c.generate.pretrained = ''  # an official network ('large_44k_v2'), or a folder with official files; '' is the workdir's own
    c.generate.input = ''  # a video, an image, a folder of videos, or a CSV (columns: generate_jobs.COLUMNS)
    c.generate.output = ''  # folder; '' means workdir/generated
    c.generate.prompt = ''
    c.generate.duration_s = 0.0  # 0: as long as the video (at most 120 s), without one as long as the training clips
    c.generate.mask_clip = False  # videos give the timing (sync features) alone
    c.generate.audio_format = 'flac'  # 'flac' or 'wav'
    c.generate.video_format = 'mp4'  # 'mp4', 'm4v', 'mov', 'mkv' or 'webm'; pictures that it cannot take are encoded anew
    c.generate.original_sound = 'replace'  # the video's own sound: 'replace' leaves it out, 'mix', or 'keep' as a second track
    c.generate.original_db = 0.0  # its level in a mixture, dB
    c.generate.compilation_cache = True  # keep compiled programs in the cache folder of config.weights
    c.generate.verbose = False  # time and memory of each stage

    # Evaluation (evaluate.py): --mode=evaluate.
    c.evaluate = ml_collections.ConfigDict()
    c.evaluate.dataset = 'vggsound'
    c.evaluate.split = 'test'
    c.evaluate.max_clips = 0  # 0: all
    c.evaluate.onset_windows_s = (0.1, 0.05, 0.3)  # the first is the one that tables quote
    c.evaluate.onset_delta = 0.3  # the detector's threshold, not the window
    c.evaluate.onset_lag_s = 512 / 22_050  # the detector's lag (one hop), subtracted from its times; 0: the published protocol
    c.evaluate.save_clips = 8  # how many mp4 and spectrograms are written

    # Ahead-of-time compilation for TPUs that need not be there (compile_report.py): --mode=compile, with --topology.
    c.compile = ml_collections.ConfigDict()
    c.compile.topology = 'v5e:16x16'  # chip (v4, v5e, v5p, v6e) and arrangement
    c.compile.slices = 1  # of that kind
    c.compile.network_gbits = 50.0  # of each chip, between slices, Gbit/s; an assumption on which only their estimates depend
    c.compile.programs = ('train', 'sampler', 'frames', 'segments')  # any of compile_report.PROGRAMS
    c.compile.clips_per_device = 8  # of the sampler's batch

    # Scores of folders of sound, any system's (score.py): --mode=evaluate when `sample`, `generated` or `compare` is set.
    c.score = ml_collections.ConfigDict()
    # Make the sounds of evaluate.dataset's split first, with the workdir's network or generate.pretrained (split_sounds.py).
    c.score.sample = False
    c.score.generated = ''  # folder of sounds (docs/data.md has the suffixes), named as their references are
    c.score.compare = ''  # several such folders, 'a=DIR b=DIR': one table; the flag --compare a=DIR b=DIR
    c.score.protocol = 'vggsound'  # a key of score.PROTOCOLS: duration, metrics and the published table
    c.score.metrics = ()  # (): the protocol's; else keys of score_metrics.METRICS
    c.score.duration_s = 0.0  # how much of each clip counts; 0: the protocol's
    # Folder of true sounds and videos, a .jsonl table of them, or 'records': the media of evaluate.dataset's split. '' is the
    # last with `sample`, none without.
    c.score.references = ''
    c.score.reference_cache = ''  # folder of av-benchmark's published caches, in the place of references
    # DeSync's picture features are those of evaluate.dataset's records (official encoder), not computed from the videos again.
    c.score.record_features = False
    c.score.captions = ''  # .csv, .tsv or .jsonl of names and captions
    c.score.compat = False  # onset metrics with the published code's slips, evaluate.onset_delta its only number; --compat
    c.score.allow_unpaired = False  # score what pairs, and count what does not, where it would be an error
    c.score.weights = 'weights/evaluation'  # folder of the networks' published files (embedders.py); nothing is downloaded
    c.score.cache = ''  # folder of embeddings, which hosts share; '' means workdir/embeddings
    c.score.batch_size = 8  # clips at a time in each process
    c.score.workers = 2  # threads of each process that read clips
    c.score.sheets = 8  # spectrograms of that many clips, the reference above every system

    # Several runs side by side (ablations.py): --mode=ablations.
    c.ablations = ml_collections.ConfigDict()
    c.ablations.rows = ()  # (name, what follows --config=) pairs, the default first
    c.ablations.seeds = ()  # config.seed of the runs of every row
    c.ablations.at_once = 1  # runs at a time, each on its share of the cores
    c.ablations.flags = ()  # of every run besides those of this command, e.g. ('--config.score.sample=True',)
    c.ablations.published = ''  # table of published_results.json whose rows stand below the measured ones

    c.lock()
    return c
