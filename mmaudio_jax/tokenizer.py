"""CLIP's byte-pair tokens of a text, without PyTorch.

Source: CLIP (arXiv 2103.00020), section 2.4, as open_clip cleans and cuts text: broken encodings repaired, HTML entities
resolved twice, white space collapsed, lower-cased. clip_merges.txt.xz lists CLIP's byte-pair merges (OpenAI, MIT licence),
one a line, in the order in which they were learnt: together with the 256 bytes they are the vocabulary.
"""
import functools
import html
import lzma
import pathlib
from typing import Sequence

import ftfy
import numpy as np
import tokenizers
from tokenizers import models
from tokenizers import pre_tokenizers

from mmaudio_jax.sequence import TEXT_LENGTH

MERGES_PATH = pathlib.Path(__file__).with_name('clip_merges.txt.xz')
START, END = '<start_of_text>', '<end_of_text>'
WORD_END = '</w>'
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # what merges never cross


def tokenize(texts: Sequence[str]) -> np.ndarray:
    """Token ids of `texts`, [B, 77] int32: start mark, tokens, end mark, zeros.

    A text of more than 75 tokens is cut so that the end mark stays last.

    Raises:
      TypeError: a single string, or an entry that is not a string.
    """
    if isinstance(texts, str):
        raise TypeError('tokenize takes a list of texts, not one text: write [text]')
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f'text {index} is a {type(text).__name__}, not a string')
    tokenizer = _tokenizer()
    start, end = (tokenizer.encode(mark).ids[0] for mark in (START, END))
    tokens = np.zeros((len(texts), TEXT_LENGTH), np.int32)
    for row, encoding in zip(tokens, tokenizer.encode_batch([_clean(text) for text in texts])):
        ids = [start, *encoding.ids[:TEXT_LENGTH - 2], end]
        row[:len(ids)] = ids
    return tokens


@functools.cache
def _tokenizer() -> tokenizers.Tokenizer:
    """Words → bytes, written as printable characters → merges, the earliest learnt first."""
    lines = lzma.decompress(MERGES_PATH.read_bytes()).decode().splitlines()
    merges = [(first, second) for first, second in map(str.split, lines)]
    characters = _byte_characters()
    names = [*characters, *(character + WORD_END for character in characters), *map(''.join, merges), START, END]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=merges,
                                                end_of_word_suffix=WORD_END))
    tokenizer.add_special_tokens([START, END])  # they may stand in a text, as in open_clip
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(WORDS), 'removed', invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    return tokenizer


def _byte_characters() -> list[str]:
    """One visible character for each of the 256 bytes, in the vocabulary's order: those that are visible in Latin-1 first."""
    visible = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    hidden = 256 - len(visible)
    return [chr(code) for code in (*visible, *range(256, 256 + hidden))]


def _clean(text: str) -> str:
    resolved = html.unescape(html.unescape(ftfy.fix_text(text)))
    return ' '.join(resolved.split()).lower()
