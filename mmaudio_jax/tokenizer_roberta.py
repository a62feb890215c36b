"""RoBERTa's byte-pair tokens of a text, from the published vocabulary. LAION-CLAP's text network reads them.

Source: RoBERTa (arXiv 1907.11692), which takes GPT-2's bytes and merges. Its two files, vocab.json and merges.txt of
'roberta-base' (MIT), are not part of this package.
"""
from collections.abc import Sequence
import pathlib

import numpy as np
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import Tokenizer

LENGTH = 77
FILES = ('vocab.json', 'merges.txt')
_MARKS = ('<s>', '<pad>', '</s>', '<unk>')  # ids 0 to 3


class RobertaTokenizer:
    """Texts to ids, with the files of `folder`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a vocabulary of another model.
    """

    def __init__(self, folder: pathlib.Path):
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f'{folder / missing[0]}: missing; CLAP needs {" and ".join(FILES)} of roberta-base there')
        paths = [str(folder / name) for name in FILES]
        self._tokenizer = Tokenizer(models.BPE.from_file(*paths, unk_token=_MARKS[3]))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if [self._tokenizer.token_to_id(mark) for mark in _MARKS] != list(range(len(_MARKS))):
            raise ValueError(f'{paths[0]}: does not begin with {", ".join(_MARKS)}; it is not the vocabulary of RoBERTa')

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int32 `[B, 77]`: <s>, tokens, </s>, padding (1). A text of more than 75 tokens is cut."""
        ids = np.full((len(texts), LENGTH), 1, np.int32)
        for row, text in zip(ids, texts):
            tokens = self._tokenizer.encode(text).ids[:LENGTH - 2]
            row[:len(tokens) + 2] = [0, *tokens, 2]
        return ids
