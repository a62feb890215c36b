"""RoBERTa's tokens with a small vocabulary in the published files' form."""
import json

import pytest

from mmaudio_jax import tokenizer_roberta


def _write(folder, marks=('<s>', '<pad>', '</s>', '<unk>')):
    letters = 'abcdeghinorstuw'
    tokens = [*marks, *letters, 'Ġ', 'in', 'the', 'Ġthe', 'th', 'Ġth', "'", ',', 'Ġr', 'Ġra', 'Ġrain']
    (folder / 'vocab.json').write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / 'merges.txt').write_text('#version: 0.2\nt h\nth e\ni n\nĠ th\nĠth e\nĠ r\nĠr a\nĠra in\n')
    return {token: index for index, token in enumerate(tokens)}


def test_marks_merges_and_padding(tmp_path):
    ids = _write(tmp_path)
    tokens = tokenizer_roberta.RobertaTokenizer(tmp_path)(['the rain', ''])
    expected = [0, ids['the'], ids['Ġrain'], 2]  # a space belongs to the word after it, and the first word has none
    assert tokens.shape == (2, 77) and tokens[0].tolist() == expected + [1] * 73
    assert tokens[1].tolist() == [0, 2] + [1] * 75


def test_long_texts_are_cut_before_the_end_mark(tmp_path):
    _write(tmp_path)
    [tokens] = tokenizer_roberta.RobertaTokenizer(tmp_path)(['the rain ' * 60])
    assert tokens[0] == 0 and tokens[-1] == 2 and 1 not in tokens


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match='vocab.json: missing; CLAP needs vocab.json and merges.txt'):
        tokenizer_roberta.RobertaTokenizer(tmp_path)
    _write(tmp_path, ('<|endoftext|>', '<pad>', '</s>', '<unk>'))
    with pytest.raises(ValueError, match='not the vocabulary of RoBERTa'):
        tokenizer_roberta.RobertaTokenizer(tmp_path)
