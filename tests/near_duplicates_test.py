"""Signatures: alike for the same sound in another version, and for nothing else."""
import numpy as np
import pytest

from data_pipelines import near_duplicates


def latents(seed: int) -> np.ndarray:
    """Latents that wander, as those of sounds do."""
    return np.cumsum(np.random.default_rng(seed).standard_normal((250, 20)), axis=0) / 10


def distance(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def test_versions_of_a_sound_are_near_and_other_sounds_far():
    base = latents(0)
    noisy = base + 0.02 * np.random.default_rng(1).standard_normal(base.shape)
    signature = near_duplicates.signature(base)
    assert len(signature) == 32 and near_duplicates.signature(base + 3.0)[:16] == signature[:16]  # the course is the same
    assert distance(near_duplicates.signature(base + 3.0), signature) > 7  # but it sounds otherwise
    assert distance(signature, near_duplicates.signature(noisy)) <= 7
    others = [distance(signature, near_duplicates.signature(latents(seed))) for seed in range(2, 100)]
    assert min(others) > 30 and np.mean(others) == pytest.approx(64, abs=4)


def test_groups_join_what_is_near_across_files_only():
    base = near_duplicates.signature(latents(0))
    flipped = f'{int(base, 16) ^ 0b1010101:032x}'
    far = [near_duplicates.signature(latents(seed)) for seed in range(1, 5)]
    found = near_duplicates.groups([base, far[0], flipped, far[1], far[1], base], ['a', 'b', 'c', 'd', 'd', 'e'])
    assert found == [[0, 2, 5]]  # the two of file d are pieces of one sound
    assert near_duplicates.groups([], []) == []
