"""Token ids equal open_clip's on varied texts."""
import json

import numpy as np
import pytest

from mmaudio_jax.tokenizer import tokenize
from tests.conftest import GOLDEN


def test_golden_texts():
    with np.load(GOLDEN / 'clip_vit_h_14_378.npz') as golden:
        texts, tokens = golden['texts'].tolist(), golden['tokens']
    np.testing.assert_array_equal(tokenize(texts), tokens)


def test_varied_texts():
    """125 texts: contractions, accents, ligatures, 20 scripts, emoji, control characters, broken encodings, over-long ones."""
    with np.load(GOLDEN / 'tokens.npz') as golden:  # made by open_clip 3.3.0's SimpleTokenizer with ftfy 6.3.1
        texts, ids = json.loads(str(golden['texts'])), golden['ids']
    assert len(texts) == 125
    for text, ours, expected in zip(texts, tokenize(texts), ids, strict=True):
        np.testing.assert_array_equal(ours, expected, err_msg=repr(text))


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
