"""AudioCaps (Kim et al. 2019): sounds of ten seconds from AudioSet with written captions; five for each in val and test.

Listing: train.csv, val.csv, test.csv with the header audiocap_id, youtube_id, start_time, caption. Every row is a clip. Files
are named by audiocap_id, by YouTube id and start (<id>_<start>, six digits or as it is), or by YouTube id, with or without the
Y that AudioSet's files have before it; videos are used for their sound.
"""
import pathlib
from typing import Iterator

from data_pipelines import layouts

SPLITS = {'train.csv': 'train', 'val.csv': 'validation', 'test.csv': 'test'}
COLUMNS = ('audiocap_id', 'youtube_id', 'start_time', 'caption')


def read(folder: pathlib.Path, media: layouts.Media, report: layouts.Report) -> Iterator[layouts.Entry]:
    """The entries below `folder`. See layouts.Entry."""
    listings = [(path, split) for name, split in SPLITS.items() for path in sorted(folder.rglob(name))[:1]]
    if not listings:
        raise FileNotFoundError(f'{folder}: holds none of {", ".join(SPLITS)}')
    for path, split in listings:
        for _, row in layouts.read_csv(path, report, COLUMNS):
            youtube_id, start = row['youtube_id'], row['start_time']
            with_start = [f'{y}{youtube_id}_{form}' for y in ('', 'Y') for form in (start.zfill(6), start)]
            file = media.find(row['audiocap_id'], *with_start, youtube_id, f'Y{youtube_id}', within=path.stem)
            yield layouts.Entry(row['audiocap_id'], split, (row['caption'],), file, video=False, cut='spread',
                                source=youtube_id)
