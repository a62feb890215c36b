"""Which clips of a set sound nearly the same: signatures of 128 bits, and the groups of those that differ in few of them.

A signature holds the signs of fixed random projections (Charikar 2002): the first half of how the latents change from one
sixteenth of the clip to the next, the second half of their mean. So clips are near that sound alike and have the same course.
"""
import collections
import functools
from typing import Hashable, Sequence

import numpy as np
from scipy.cluster import hierarchy

BITS = 128
SEGMENTS = 16
BANDS = 8  # two signatures that differ in at most 7 bits agree in one of eight bands
FEW_BITS = 7
LARGEST_BUCKET = 1000  # clips that share a band: more are no evidence (silence, a codec's constant), and cost their square
SEED = 2002


@functools.lru_cache(maxsize=8)
def _projections(size: int) -> np.ndarray:
    """Fixed directions, float32 [size, BITS / 2]."""
    return np.random.Generator(np.random.PCG64(SEED)).standard_normal((size, BITS // 2), dtype=np.float32)


def signature(latents: np.ndarray) -> str:
    """The signature of a clip's latents `[N, C]`, hexadecimal."""
    ends = np.arange(SEGMENTS + 1) * len(latents) // SEGMENTS
    means = np.stack([latents[start:end].astype(np.float64).mean(axis=0) for start, end in zip(ends[:-1], ends[1:])])
    halves = [(vector[:, None] * _projections(len(vector))).sum(axis=0) for vector in (np.diff(means, axis=0).ravel(),
                                                                                       means.mean(axis=0))]
    return np.packbits(np.concatenate(halves) > 0).tobytes().hex()


def groups(signatures: Sequence[str], sources: Sequence[Hashable]) -> list[list[int]]:
    """Places of clips whose signatures are nearly equal, two or more to a group, the largest group first.

    Args:
      signatures: of the clips.
      sources: clips of the same source (pieces of one file, several captions for it) are not counted against each other.
    """
    bits = np.array([np.frombuffer(bytes.fromhex(text), np.uint8) for text in signatures]).reshape(len(signatures), BITS // 8)
    joined = hierarchy.DisjointSet(range(len(signatures)))
    width = BITS // 8 // BANDS
    for band in range(BANDS):
        buckets: dict[bytes, list[int]] = collections.defaultdict(list)
        for place, row in enumerate(bits[:, band * width:(band + 1) * width]):
            buckets[row.tobytes()].append(place)
        for bucket in buckets.values():
            if 1 < len(bucket) <= LARGEST_BUCKET:
                _join(bucket, bits, sources, joined)
    found = sorted(sorted(group) for group in joined.subsets() if len(group) > 1)
    return sorted(found, key=len, reverse=True)


def _join(bucket: list[int], bits: np.ndarray, sources: Sequence[Hashable], joined: hierarchy.DisjointSet) -> None:
    """Joins the pairs of a bucket that are near and not of the same source."""
    for position, place in enumerate(bucket[:-1]):
        others = bucket[position + 1:]
        distances = np.bitwise_count(bits[others] ^ bits[place]).sum(axis=1)
        for other in np.array(others)[distances <= FEW_BITS]:
            if sources[other] != sources[place]:
                joined.merge(place, int(other))
