"""The progress line."""
import pytest

from data_pipelines import progress


@pytest.mark.parametrize('seconds, expected', [(45, '45 s'), (99.6, '100 s'), (720, '12 min'), (11_100, '3 h 05 min')])
def test_spans(seconds, expected):
    assert progress.span(seconds) == expected


def test_the_line_counts_clips_hours_and_rejections_by_kind():
    line = progress.Progress('extract birds', 100, 8.0)
    line.count(40, [])
    assert line.line(20.0) == 'extract birds: 40 of 100 clips, 2.0 clips/s, 0.09 h of media, 30 s left'
    line.count(3, ['the sound ends at 1.5 s, 8.000 s are needed', 'the sound ends at 7 s, 8.000 s are needed', 'no such file'])
    expected = '3 rejected (2 the sound ends at # s, # s are needed, 1 no such file)'
    assert line.line(21.5).endswith(expected) and line.rejections() == expected
    line.count(2, ['silent (peak 1.0e-07)', 'has no frames'])
    assert line.rejections().startswith('5 rejected (2 the') and line.rejections().endswith(', …)')
