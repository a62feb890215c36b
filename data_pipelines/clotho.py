"""Clotho 2.1 (Drossos et al. 2020): sounds of 15 to 30 seconds from Freesound, five captions each.

Listing: clotho_captions_{development,validation,evaluation}.csv with the header file_name, caption_1, …, caption_5; sounds in
folders of these names. As in MMAudio, development and validation are trained on; evaluation is the test split. The Freesound
ids (sound_id of clotho_metadata_*.csv) are the sources by which overlap is found.
"""
import pathlib
from typing import Iterator

from data_pipelines import layouts

SPLITS = {'development': 'train', 'validation': 'train', 'evaluation': 'test'}
CAPTIONS = tuple(f'caption_{i}' for i in range(1, 6))
METADATA = ('keywords', 'sound_link', 'start_end_samples', 'manufacturer', 'license')


def read(folder: pathlib.Path, media: layouts.Media, report: layouts.Report) -> Iterator[layouts.Entry]:
    """The entries below `folder`. See layouts.Entry."""
    names = {part: f'clotho_captions_{part}.csv' for part in SPLITS}
    listings = {part: path for part, name in names.items() for path in sorted(folder.rglob(name))[:1]}
    if not listings:
        raise FileNotFoundError(f'{folder}: holds none of {", ".join(names.values())}')
    for part, path in listings.items():
        sources = _freesound_ids(folder, part, report)
        for _, row in layouts.read_csv(path, report, ('file_name', *CAPTIONS)):
            stem = pathlib.PurePath(row['file_name']).stem
            yield layouts.Entry(stem, SPLITS[part], tuple(row[column] for column in CAPTIONS), media.find(stem, within=part),
                                video=False, cut='spread', source=sources.get(row['file_name'], stem))


def _freesound_ids(folder: pathlib.Path, part: str, report: layouts.Report) -> dict[str, str]:
    """File name → Freesound id, of those that are known."""
    for path in sorted(folder.rglob(f'clotho_metadata_{part}.csv')):
        rows = layouts.read_csv(path, report, ('file_name', 'sound_id'), METADATA)
        return {row['file_name']: row['sound_id'] for _, row in rows if row['sound_id'].isdigit()}
    return {}
