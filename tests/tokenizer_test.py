"""Token ids equal open_clip's on varied texts."""
import numpy as np
import pytest

from mmaudio_jax.tokenizer import tokenize
from tests.conftest import GOLDEN


def test_golden_texts():
    with np.load(GOLDEN / 'clip_vit_h_14_378.npz') as golden:
        texts, tokens = golden['texts'].tolist(), golden['tokens']
    np.testing.assert_array_equal(tokenize(texts), tokens)


def test_start_end_and_padding():
    tokens = tokenize(['', 'rain'])
    assert tokens.shape == (2, 77) and tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[0, :3], [49406, 49407, 0])
    assert np.count_nonzero(tokens[1]) == 3
    assert tokenize([]).shape == (0, 77)


def test_over_long_text_keeps_the_end_mark():
    tokens = tokenize(['thunder ' * 200])[0]
    assert tokens[-1] == 49407 and (tokens[1:-1] == tokens[1]).all()


@pytest.mark.parametrize('texts, problem', [('rain', 'not one text'), (['rain', None], 'text 1 is a NoneType')])
def test_wrong_type(texts, problem):
    with pytest.raises(TypeError, match=problem):
        tokenize(texts)
