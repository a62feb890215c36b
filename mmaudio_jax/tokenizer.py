"""CLIP's byte-pair tokens of a text, without PyTorch.

Source: CLIP (arXiv 2103.00020), section 2.4, as open_clip cleans and cuts text: broken encodings repaired, HTML entities
resolved twice, white space collapsed, lower-cased.
"""
import functools
import html
from typing import Sequence

import ftfy
import instant_clip_tokenizer
import numpy as np

from mmaudio_jax.sequence import TEXT_LENGTH


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
    if not texts:
        return np.zeros((0, TEXT_LENGTH), np.int32)
    return _tokenizer().tokenize_batch([_clean(text) for text in texts], TEXT_LENGTH).astype(np.int32)


@functools.cache
def _tokenizer() -> instant_clip_tokenizer.Tokenizer:
    return instant_clip_tokenizer.Tokenizer()  # reads its vocabulary of 49 408 entries from the package


def _clean(text: str) -> str:
    resolved = html.unescape(html.unescape(ftfy.fix_text(text)))
    return ' '.join(resolved.split()).lower()
