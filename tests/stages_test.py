"""The line after each stage."""
from mmaudio_jax.stages import Stages


def test_time_and_memory_are_printed(capsys):
    stages = Stages('pipeline', verbose=True)
    with stages('flow', '2 sounds'):
        pass
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith('pipeline: flow (2 sounds): 0.0') and ' s, peak memory ' in line and line.endswith(' GB')


def test_nothing_is_printed_unless_asked_for(capsys):
    stages = Stages('pipeline', verbose=False)
    with stages('flow'):
        pass
    assert capsys.readouterr().out == ''
