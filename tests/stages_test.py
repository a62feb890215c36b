"""The line after each stage."""
from mmaudio_jax.stages import Stages


def test_time_and_memory_are_printed(capsys):
    stages = Stages('pipeline', verbose=True)
    for _ in range(2):
        with stages('flow', '2 sounds'):
            pass
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith('pipeline: flow (2 sounds): 0.0') and ' s, peak memory ' in line and line.endswith(' GB')
    assert list(stages.seconds) == ['flow'] and 0 <= stages.seconds['flow'] < 1


def test_nothing_is_printed_unless_asked_for(capsys):
    stages = Stages('pipeline', verbose=False)
    with stages('flow'):
        pass
    assert capsys.readouterr().out == '' and 'flow' in stages.seconds
