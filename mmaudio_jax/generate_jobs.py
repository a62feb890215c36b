"""What --mode=generate is to make: one Job for each file of a folder, row of a CSV, or prompt."""
import collections
import dataclasses
import hashlib
import os
import pathlib
import zlib

from mmaudio_jax import media
from mmaudio_jax import tables
from mmaudio_jax.media import VIDEO_SUFFIXES

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff')
COLUMNS = ('video', 'image', 'prompt', 'negative_prompt', 'seed', 'duration_s', 'name')
_ALSO = {'caption': 'prompt'}  # as the published tables call it
_NAME_LETTERS = 60  # of a prompt, in the name of its results


@dataclasses.dataclass(frozen=True)
class Job:
    """One sound to make; the fields are those of Pipeline.request.

    Attributes:
      name: of the result's files, without suffix; each job has its own.
      index: which noise of the seed. 0 for a single input and for a row that has a seed of its own; each other input of a
        folder or CSV has one that follows from its name, so that no two sounds of a set begin with the same noise.
    """
    name: str
    video: pathlib.Path | None
    image: pathlib.Path | None
    prompt: str
    negative_prompt: str
    seed: int
    duration_s: float | None
    index: int = 0

    @property
    def source(self) -> str:
        """What the user gave."""
        return str(self.video or self.image or self.name)


def jobs(options, sampling) -> list[Job]:
    """The jobs of config.generate, in a fixed order.

    Args:
      options: config.generate.
      sampling: config.sampling, for the seed and the negative prompt.

    Raises:
      ValueError: nothing to make, an input that is not there, a CSV that cannot be used (names the line).
    """
    common = {'prompt': options.prompt, 'negative_prompt': sampling.negative_prompt, 'seed': sampling.seed,
              'duration_s': options.duration_s or None}
    if not options.input:
        if not options.prompt:
            raise ValueError('nothing to generate: set config.generate.input (a video, an image, a folder of videos, a CSV), '
                             'config.generate.prompt, or both')
        return [Job(_name_of(options.prompt), None, None, **common)]
    path = pathlib.Path(options.input)
    if path.suffix.lower() == '.csv' and path.is_file():
        return _from_csv(path, common)
    if path.is_file():
        image = path.suffix.lower() in IMAGE_SUFFIXES
        return [Job(path.stem, None if image else path, path if image else None, **common)]
    if not path.is_dir():
        media.refuse_address(options.input)
        raise ValueError(f'config.generate.input is {options.input!r}, and there is no such file or folder')
    seen = sorted(file for file in path.iterdir() if not file.name.startswith('.'))  # '._a.mp4' is a note of macOS
    videos = [file for file in seen if file.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        raise ValueError(f'config.generate.input: no videos ({" ".join(VIDEO_SUFFIXES)}) in {path}')
    others = [file.name for file in seen if file not in videos]
    if others:
        print(f'generate: passes over {len(others)} in {path} without the name of a video, first {others[0]}', flush=True)
    made = _named_apart([Job(video.stem, video, None, **common) for video in videos],
                        [video.name.replace('.', '_') for video in videos])
    return [_with_own_noise(job) for job in made]


def _with_own_noise(job: Job) -> Job:
    return dataclasses.replace(job, index=zlib.crc32(os.fsencode(job.name)))


def _named_apart(made: list[Job], longer: list[str]) -> list[Job]:
    """The jobs, of which those that share a name get the longer one, with '_' behind it while another job has that.

    Names that differ in capital letters alone are the same: on macOS they would be one file.
    """
    file = lambda name: tables.composed(name).casefold()
    counts = collections.Counter(file(job.name) for job in made)
    taken = {name for name, count in counts.items() if count == 1}
    result = []
    for job, name in zip(made, longer, strict=True):
        if counts[file(job.name)] > 1:
            while file(name) in taken:
                name += '_'
            taken.add(file(name))
            job = dataclasses.replace(job, name=name)
        result.append(job)
    return result


def _name_of(prompt: str) -> str:
    """A file name for a prompt: its beginning, and a digest of the whole."""
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    words = ''.join(letter if letter.isalnum() else '_' for letter in prompt)[:_NAME_LETTERS].strip('_')
    return f'{words}_{digest}'


def _from_csv(path: pathlib.Path, common: dict) -> list[Job]:
    """One job a row. An empty cell stands for the config's value; files are looked for beside the CSV.

    A row without a name is called as its file, or by its prompt; rows of one name get the number of their line behind it.
    """
    (_, first), *rest = list(tables.csv_rows(path, tables.read_text(path))) or [(1, [])]
    header = [_ALSO.get(name.strip(), name.strip()) for name in first]
    _check_header(path, header)
    rows = [(line, row) for line, row in rest if any(cell.strip() for cell in row)]
    if not rows:
        raise ValueError(f'{path}: has no rows')
    made, longer, seeded = [], [], []
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f'{path}:{line}: {len(row)} cells, but the header has {len(header)} columns')
        cells = {name: cell.strip() for name, cell in zip(header, row)}
        made.append(_job(path, line, cells, common))
        longer.append(f'{made[-1].name}_{line}')
        seeded.append(bool(cells.get('seed')))
    apart = _named_apart(made, longer)
    return [job if own_seed else _with_own_noise(job) for job, own_seed in zip(apart, seeded, strict=True)]


def _check_header(path: pathlib.Path, header: list[str]) -> None:
    allowed = f'the columns are {", ".join(COLUMNS)}'
    if not header:
        raise ValueError(f'{path}: is empty; {allowed}')
    for name in header:
        if name not in COLUMNS:
            raise ValueError(f'{path}: unknown column {name!r}; {allowed}')
        if header.count(name) > 1:
            raise ValueError(f'{path}: the column {name!r} stands there twice')
    if not {'video', 'image', 'prompt'} & set(header):
        raise ValueError(f'{path}: has none of the columns video, image and prompt; {allowed}')


def _job(path: pathlib.Path, line: int, cells: dict[str, str], common: dict) -> Job:
    fields = {**common, **{name: cell for name, cell in cells.items() if cell}}
    files = {name: tables.beside(path, cells[name]) if cells.get(name) else None for name in ('video', 'image')}
    if files['video'] and files['image']:
        raise ValueError(f'{path}:{line}: both a video and an image')
    for name, kind, what in (('seed', int, 'a whole number'), ('duration_s', float, 'a number of seconds')):
        try:
            fields[name] = None if fields[name] is None else kind(fields[name])
        except ValueError as error:
            raise ValueError(f'{path}:{line}: {name} is {fields[name]!r}, not {what}') from error
    source, name = files['video'] or files['image'], cells.get('name', '')
    if not source and not fields['prompt']:
        raise ValueError(f'{path}:{line}: neither a video, nor an image, nor a prompt')
    if '/' in name or '\\' in name or name.startswith('.'):
        raise ValueError(f'{path}:{line}: name is {name!r}; it names files, without a folder')
    name = name or (source.stem if source else _name_of(fields['prompt']))
    return Job(name, files['video'], files['image'], fields['prompt'], fields['negative_prompt'], fields['seed'],
               fields['duration_s'] or None)  # 0 as in config.generate.duration_s
