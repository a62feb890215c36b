"""Rates, lengths and durations of every stream: the only place where they are computed.

Letters used everywhere: B batch, N audio latents, V CLIP frames, S sync tokens, T text tokens, D width, H heads,
C latent channels. Source: MMAudio (arXiv 2412.15322), section 3 and the released code's sequence configurations.
"""
import dataclasses
import math

CLIP_FPS = 8.0  # frames a second that the CLIP encoder sees
SYNC_FPS = 25.0  # frames a second that Synchformer sees
SYNC_SEGMENT_FRAMES = 16
SYNC_SEGMENT_STRIDE = 8
SYNC_TOKENS_PER_SEGMENT = 8
TEXT_LENGTH = 77
CLIP_WIDTH = 1024  # features of a frame and of a text token
SYNC_WIDTH = 768
LATENT_DOWNSAMPLING = 2  # mel frames in one latent


@dataclasses.dataclass(frozen=True)
class AudioRate:
    """What one audio rate fixes: sampling rate in Hz, mel hop in samples, mel bins, latent channels C."""
    sample_rate_hz: int
    hop_length: int
    mel_bins: int
    latent_channels: int


AUDIO_RATES = {
    '16k': AudioRate(sample_rate_hz=16_000, hop_length=256, mel_bins=80, latent_channels=20),
    '44k': AudioRate(sample_rate_hz=44_100, hop_length=512, mel_bins=128, latent_channels=40),
}


@dataclasses.dataclass(frozen=True)
class Sequence:
    """The lengths of every stream of one clip.

    Attributes:
      rate: '16k' or '44k', a key of AUDIO_RATES.
      duration_s: length of the clip in seconds; 8 in training, free at inference.

    Raises:
      ValueError: an unknown rate, or a duration that is not finite, or too short for one segment of 16 sync frames.
    """
    rate: str
    duration_s: float

    def __post_init__(self):
        if self.rate not in AUDIO_RATES:
            raise ValueError(f'rate {self.rate!r} is not one of {", ".join(AUDIO_RATES)}')
        if not math.isfinite(self.duration_s):
            raise ValueError(f'duration_s is {self.duration_s}; a finite number of seconds is needed')
        if self.num_segments < 1:
            raise ValueError(f'duration_s {self.duration_s} is too short: one segment of {SYNC_SEGMENT_FRAMES} frames at '
                             f'{SYNC_FPS:g} fps needs at least {SYNC_SEGMENT_FRAMES / SYNC_FPS} s')

    @property
    def audio(self) -> AudioRate:
        """Sampling rate, hop, mel bins and latent channels."""
        return AUDIO_RATES[self.rate]

    @property
    def sample_rate_hz(self) -> int:
        """Samples a second."""
        return self.audio.sample_rate_hz

    @property
    def latent_channels(self) -> int:
        """C."""
        return self.audio.latent_channels

    @property
    def latent_length(self) -> int:
        """N: latents of the clip, the last one possibly partly past its end."""
        return math.ceil(self.duration_s * self.audio.sample_rate_hz / self.audio.hop_length / LATENT_DOWNSAMPLING)

    @property
    def mel_length(self) -> int:
        """Mel frames that the latents stand for."""
        return self.latent_length * LATENT_DOWNSAMPLING

    @property
    def waveform_length(self) -> int:
        """Samples that the latents decode to (353 280 at 44k and 8 s, a little over 8 s)."""
        return self.mel_length * self.audio.hop_length

    @property
    def samples(self) -> int:
        """Samples of the clip itself."""
        return round(self.duration_s * self.sample_rate_hz)

    @property
    def clip_length(self) -> int:
        """V: CLIP frames."""
        return int(CLIP_FPS * self.duration_s)

    @property
    def num_segments(self) -> int:
        """Overlapping segments of 16 frames that Synchformer sees."""
        return int((SYNC_FPS * self.duration_s - SYNC_SEGMENT_FRAMES) // SYNC_SEGMENT_STRIDE + 1)

    @property
    def sync_frames(self) -> int:
        """Frames of the 25 fps stream."""
        return int(SYNC_FPS * self.duration_s)

    @property
    def sync_length(self) -> int:
        """S: sync tokens, 8 a segment."""
        return SYNC_TOKENS_PER_SEGMENT * self.num_segments
