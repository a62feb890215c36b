"""Downloaded datasets → clip tables, as config.clips asks; a stage before extraction, skipped when its result is there.

    DATA_DIR/media/<name>/<split>.jsonl      the tables; the media stay where they are
    DATA_DIR/media/<name>/clips_report.json  what was listed, found, missing, left out, and the ids of each
"""
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

from data_pipelines import audiocaps
from data_pipelines import clips as clips_lib
from data_pipelines import clotho
from data_pipelines import folder_csv
from data_pipelines import greatest_hits
from data_pipelines import layouts
from data_pipelines import moviegen
from data_pipelines import processes
from data_pipelines import vggsound
from data_pipelines import wavcaps
from mmaudio_jax import config_checks
from mmaudio_jax import media
from mmaudio_jax import tables

LAYOUTS: dict[str, Callable[[pathlib.Path, layouts.Media, layouts.Report], Iterable[layouts.Entry]]] = {
    'vggsound': vggsound.read,
    'audiocaps': audiocaps.read,
    'clotho': clotho.read,
    'audioset_sl': wavcaps.read_audioset_sl,
    'bbc': wavcaps.read_bbc,
    'freesound': wavcaps.read_freesound,
    'moviegen': moviegen.read,
    'greatest_hits': greatest_hits.read,
    'folder_csv': folder_csv.read,
}
BLACKLIST_KEYS = {'audioset_sl': 'AudioSet', 'freesound': 'FreeSound'}  # of WavCaps's id lists
SHORT = ('reject', 'silence', 'repeat')


def make_tables(config, root: pathlib.Path) -> None:
    """Writes the tables of every dataset of config.clips.datasets that are not there.

    Args:
      config: its fields clips, sequence.duration_s and extract.workers are used.
      root: holds media/.

    Raises:
      FileNotFoundError: no such folder, listing or id list.
      ValueError: an unknown layout, a listing of another form, a dataset without any clip, or tables that were made with other
        settings.
      OSError: disk full.
    """
    settings = config.clips
    config_checks.check(config)
    if settings.short not in SHORT:
        raise ValueError(f'config.clips.short is {settings.short!r}; it must be one of {", ".join(SHORT)}')
    names = [name for name, _, _ in settings.datasets]
    unknown = sorted({name for name, _ in settings.exclude} - set(names))
    if unknown:
        raise ValueError(f'config.clips.exclude names {", ".join(unknown)}, which config.clips.datasets does not have')
    with processes.Workers(config.extract.workers) as workers:
        for name, layout, source in settings.datasets:
            if layout not in LAYOUTS:
                raise ValueError(f'config.clips.datasets: {layout!r} is no layout; they are {", ".join(LAYOUTS)}')
            excluded = [pathlib.Path(path) for other, path in settings.exclude if other == name]
            made_with = {'layout': layout, 'source': str(source), 'duration_s': config.sequence.duration_s,
                         'short': settings.short, 'validation_clips': settings.validation_clips,
                         'exclude': {str(path): media.digest(path) if path.is_file() else '' for path in excluded}}
            folder = root / 'media' / name
            if _is_done(folder, made_with):
                continue
            with processes.locked(folder):
                if not _is_done(folder, made_with):  # else another process has listed it meanwhile
                    _Listing(name, made_with, workers).write(folder)


def _is_done(folder: pathlib.Path, made_with: dict[str, Any]) -> bool:
    """Whether the tables are there; ValueError when they are, but were made with other settings or listings."""
    report = folder / layouts.REPORT
    if not report.is_file():
        return False
    found = json.loads(report.read_text(encoding='utf-8'))
    stored = found['made_with']
    lists = {path: digest or stored.get('exclude', {}).get(path, '') for path, digest in made_with['exclude'].items()}
    for field, value in {**made_with, 'exclude': lists}.items():  # id lists may be put away, as listings
        if stored.get(field) != value:
            raise ValueError(f'{folder}: its tables were made with {field} = {stored.get(field)!r}, the configuration says '
                             f'{value!r}; delete {report} to list the clips again')
    for listing, digest in stored.get('listings', {}).items():
        if os.path.isfile(listing) and media.digest(pathlib.Path(listing)) != digest:  # else the dataset was put away
            raise ValueError(f'{listing}: was changed since {folder} was made of it; delete {report} to list the clips again')
    for path, count in found.get('excluded', {}).items():
        if not count and not found['counts'].get('named_but_tested'):
            print(f'clips {folder.name}: WARNING: {path} excluded nothing when the tables were made; if it should, delete '
                  f'{report} to list the clips again', flush=True)
    return True


class _Listing:
    """The tables of one dataset."""

    def __init__(self, name: str, made_with: dict[str, Any], workers: processes.Workers):
        self._name, self._made_with, self._workers = name, made_with, workers
        self._report = layouts.Report()
        self._ids: set[tuple[str, str]] = set()  # (split, id) of the rows so far

    def write(self, folder: pathlib.Path) -> None:
        """Lists, checks, cuts, and writes tables and report; prints what was found."""
        source = pathlib.Path(self._made_with['source'])
        if not source.is_dir():
            raise FileNotFoundError(f'{source}: no such folder; config.clips.datasets names where {self._name} was unpacked')
        found = layouts.Media(source)
        entries = list(LAYOUTS[self._made_with['layout']](source, found, self._report))
        kept = self._without_overlap(self._usable(entries))
        rows = list(self._rows(kept))
        if not rows:
            raise ValueError(f'{source}: gives no clip of {self._name}; {len(entries)} are listed: '
                             f'{self._report.summary(with_first=True)}')
        splits = {split: [row for row in rows if row['split'] == split] for split in clips_lib.SPLITS}
        if not splits['validation']:
            sources = {entry.file: entry.source or entry.file for entry in kept}
            _hold_out(splits, sources, self._made_with['validation_clips'])
        for split, table in splits.items():
            if table:
                clips_lib.write_table(folder / f'{split}.jsonl', table)
            else:
                (folder / f'{split}.jsonl').unlink(missing_ok=True)
        counts = {split: len(table) for split, table in splits.items() if table}
        used = {row['video'] or row['audio'] for row in rows}
        self._write_report(folder, len(entries), counts, found.count - len(used))
        clips = ', '.join(f'{count} {split}' for split, count in counts.items())
        print(f'clips {self._name}: {len(entries)} listed → {clips}; {self._report.summary()}; see {folder / layouts.REPORT}',
              flush=True)

    def _usable(self, entries: Iterable[layouts.Entry]) -> Iterator[layouts.Entry]:
        """Entries with a file, an id of their own and, for sounds alone, a caption."""
        ids: set[tuple[str, str]] = set()
        for entry in entries:
            if entry.file is None:
                self._report.add('missing_files', entry.id)
                continue
            if (entry.split, entry.id) in ids:
                self._report.add('duplicate_ids', entry.id)
                continue
            ids.add((entry.split, entry.id))
            captions = tuple(caption for caption in entry.captions if caption.strip())
            if len(captions) < len(entry.captions) or not captions:
                self._report.add('empty_captions', entry.id)
            if captions or entry.video:
                yield dataclasses.replace(entry, captions=captions or ('',))

    def _without_overlap(self, entries: Iterable[layouts.Entry]) -> list[layouts.Entry]:
        """Leaves out what an id list names, but for test clips, and from training what is in this dataset's own test or
        validation split."""
        kept, key = list(entries), BLACKLIST_KEYS.get(self._made_with['layout'], '')
        for path in self._made_with['exclude']:
            names = layouts.read_ids(pathlib.Path(path), key)
            named = [not names.isdisjoint({layouts.source_of(entry.source), layouts.source_of(entry.id)}) for entry in kept]
            trained = [gone and entry.split != 'test' for entry, gone in zip(kept, named)]
            self._report.excluded[path] = [entry.id for entry, gone in zip(kept, trained) if gone]
            if kept and not any(named):
                print(f'clips {self._name}: WARNING: {path} EXCLUDES NOTHING: none of its {len(names)} ids, such as '
                      f'{min(names)!r}, is the source or the id of a clip, such as {layouts.source_of(kept[0].source)!r} and '
                      f'{kept[0].id!r}', flush=True)
            for entry in itertools.compress(kept, named):
                if entry.split == 'test':
                    self._report.add('named_but_tested', entry.id)
            kept = [entry for entry, gone in zip(kept, trained) if not gone]
        tested = {entry.source for entry in kept if entry.split != 'train' and entry.source}
        for entry in kept:
            if entry.split == 'train' and entry.source in tested:
                self._report.add('also_in_test', entry.id)
        return [entry for entry in kept if entry.split != 'train' or entry.source not in tested]

    def _rows(self, entries: Sequence[layouts.Entry]) -> Iterator[dict[str, Any]]:
        """The tables' rows."""
        crashed, lengths = lambda path: f'{path}: the decoder crashed', {}
        for cut in ('spread', 'all'):  # sounds; videos
            files = list(dict.fromkeys(entry.file for entry in entries if entry.cut == cut and entry.file is not None))
            length_of = functools.partial(layouts.length_s, of_sound=cut == 'spread')
            found = self._workers.in_order(length_of, files, layouts.AHEAD, crashed)
            lengths.update({(cut, path): length for path, length in found})
        for entry in entries:
            if entry.cut == 'start':
                yield from self._clips(entry, [entry.start_s], '')
                continue
            assert entry.file is not None  # _usable leaves such entries out
            length = lengths[entry.cut, entry.file]
            if isinstance(length, str):
                self._report.add('unreadable_files', length)
            else:
                samples, rate = length
                starts, fill = layouts.window_starts(samples, rate, self._made_with['duration_s'], entry.cut), ''
                if not starts and self._made_with['short'] != 'reject' and entry.cut == 'spread':
                    starts, fill = [0.0], self._made_with['short']
                if not starts:
                    self._report.add('too_short', f'{entry.id}: {samples * 100 // rate / 100:.2f} s, '
                                     f'{_needed(self._made_with["duration_s"], entry.cut)}')
                yield from self._clips(entry, starts, fill)

    def _clips(self, entry: layouts.Entry, starts_s: Sequence[float], fill: str) -> Iterator[dict[str, Any]]:
        """One clip for every window and every caption: there are as many as of whatever is more, so that each is used."""
        count = max(len(starts_s), len(entry.captions)) if starts_s else 0
        for i in range(count):
            start_s = starts_s[i % len(starts_s)]
            own_id = tables.composed(_text(entry.id))
            row = {'id': self._own_id(entry.split, own_id if count == 1 else f'{own_id}_{i}'),
                   'video': entry.file if entry.video else None, 'audio': None if entry.video else entry.file,
                   'caption': _text(entry.captions[i % len(entry.captions)]), 'split': entry.split, 'start_s': start_s,
                   'label': _text(entry.label), 'fill': fill}
            if entry.describe is not None:
                row.update(entry.describe(start_s, self._made_with['duration_s']))
            yield row

    def _own_id(self, split: str, wanted: str) -> str:
        """An id that no row of the split has: 'rain_1.wav' beside windows of 'rain.wav' is renamed to rain_1_0, and listed."""
        numbered = (f'{wanted}_{i}' for i in itertools.count())
        found = next(name for name in itertools.chain([wanted], numbered) if (split, name) not in self._ids)
        if found != wanted:
            self._report.add('renamed_ids', f'{wanted}: is {found}')
        self._ids.add((split, found))
        return found

    def _write_report(self, folder: pathlib.Path, listed: int, counts: dict[str, int], unused: int) -> None:
        """clips_report.json, last: with it the tables are complete."""
        made_with = {**self._made_with, 'listings': self._report.listings}
        text = json.dumps({'made_with': made_with, 'listed': listed, 'clips': counts, 'unused_files': unused,
                           'counts': {kind: len(found) for kind, found in self._report.lists.items()},
                           'excluded': {name: len(found) for name, found in self._report.excluded.items()},
                           'lists': self._report.lists, 'excluded_ids': self._report.excluded}, indent=1)
        with media.atomic_file(folder / layouts.REPORT) as beside:
            beside.write_text(text + '\n', encoding='utf-8')


def _needed(duration_s: float, cut: str) -> str:
    """How long a sound must be, and what else can be done."""
    if cut == 'all':
        return f'{duration_s:.2f} s are needed'
    return f'{duration_s + layouts.WINDOW_MARGIN_S:.2f} s are needed (config.clips.short, or a start_s)'


def _text(listed: str) -> str:
    """What tables hold of a name or caption: half characters (of damaged listings, and names that are no text) are replaced."""
    return clips_lib.SURROGATES.sub('\N{REPLACEMENT CHARACTER}', listed)


def _hold_out(splits: dict[str, list[dict[str, Any]]], sources: Mapping[Any, Any], count: int) -> None:
    """Moves at most `count` training clips, and at most half, to the validation split, in place: all those of a source
    together, from the sources whose first clips have the smallest digests of their ids. `sources` has each file's."""
    clips: dict[Any, list[str]] = {}
    for row in splits['train']:
        clips.setdefault(sources[row['video'] or row['audio']], []).append(row['id'])
    left, chosen = min(count, len(splits['train']) // 2), set[str]()
    for ids in sorted(clips.values(), key=lambda ids: hashlib.sha256(ids[0].encode()).digest()):
        if len(ids) <= left:
            chosen.update(ids)
            left -= len(ids)
    splits['validation'] = [{**row, 'split': 'validation'} for row in splits['train'] if row['id'] in chosen]
    splits['train'] = [row for row in splits['train'] if row['id'] not in chosen]
