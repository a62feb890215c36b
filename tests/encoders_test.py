"""The pixel encoder: shapes, the order of time, and that impacts can be found in what it gives."""
import numpy as np
import pytest

from mmaudio_jax import encoders
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import store

SEQUENCE = Sequence('16k', 2.0)


def draw(time_s: np.ndarray, size: int, path, background: np.ndarray) -> np.ndarray:
    """A disc at (x, y) = path(time) in units of the picture, uint8 [F, size, size, 3]."""
    grid = (np.arange(size) + 0.5) / size
    frames = np.empty((len(time_s), size, size, 3), np.uint8)
    for frame, time in zip(frames, time_s):
        x, y, radius = path(time)
        cover = np.clip((radius - np.hypot(grid[None] - x, grid[:, None] - y)) * size + 0.5, 0, 1)[..., None]
        frame[:] = background * (1 - cover) + np.array([230, 60, 50]) * cover
    return frames


def encode(path, seed: int = 0):
    """(clip [V, 1024], sync [S, 768]) of a moving disc before a still background."""
    encoder = encoders.make('pixels', SEQUENCE, store.load)
    rng = np.random.default_rng(seed)
    streams = []
    for request in encoder.frame_requests:
        background = np.full((request.height, request.width, 3), rng.uniform(60, 160), np.float32)
        times_s = np.arange(int(request.fps * SEQUENCE.duration_s)) / request.fps
        streams.append(draw(times_s, request.height, path, background)[None])
    clip, sync = encoder.encode_video(*streams)
    return clip[0], sync[0]


@pytest.mark.parametrize('duration_s', [2.0, 4.0, 5.3, 8.0])
def test_shapes_are_those_of_the_sequence(duration_s):
    sequence = Sequence('44k', duration_s)
    encoder = encoders.make('pixels', sequence, store.load)
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (2, int(r.fps * duration_s), r.height, r.width, 3), np.uint8)
              for r in encoder.frame_requests]
    clip, sync = encoder.encode_video(*frames)
    assert clip.shape == (2, sequence.clip_length, 1024) and sync.shape == (2, sequence.sync_length, 768)
    assert clip.dtype == sync.dtype == np.float32 and np.isfinite(clip).all() and np.isfinite(sync).all()


def test_a_still_picture_does_not_move():
    clip, sync = encode(lambda time: (0.5, 0.5, 0.1))
    assert np.abs(sync).max() == 0
    np.testing.assert_array_equal(clip, np.broadcast_to(clip[:1], clip.shape))


@pytest.mark.parametrize('jump_s', [0.1, 0.7, 1.33, 1.9])
def test_token_i_stands_for_its_own_time(jump_s):
    """A jump shows in the token of its time, and rises and falls in true order."""
    _, sync = encode(lambda time: (0.3 if time < jump_s else 0.7, 0.5, 0.1))
    energy = np.abs(sync).sum(axis=1)
    token_s = SEQUENCE.duration_s / SEQUENCE.sync_length
    centre_s = ((np.arange(len(energy)) + 0.5) * token_s * energy).sum() / energy.sum()
    between_frames_s = np.ceil(jump_s * 25) / 25 - 0.02  # seen between the last frame before and the first after
    assert abs(centre_s - between_frames_s) < 0.01  # measured: at most 0.0015 s


@pytest.mark.parametrize('velocity, measure', [((0.2, 0.0), 2), ((0.0, 0.2), 3)])
def test_direction_of_motion_has_its_sign(velocity, measure):
    for sign in (1, -1):
        _, sync = encode(lambda time: (0.5 + sign * velocity[0] * (time - 1), 0.5 + sign * velocity[1] * (time - 1), 0.12))
        motion = sync.reshape(len(sync), 3, 64, 4).sum(axis=(1, 2))
        assert (np.sign(motion[:, measure]) == sign).all()
        assert np.abs(motion[:, 5 - measure]).max() < 1e-3 * np.abs(motion[:, measure]).min()  # measured: 3e-8


def bounce(rng: np.random.Generator):
    """A disc that falls, strikes and rebounds at random times; (path, strike times in seconds)."""
    strikes_s = np.cumsum([rng.uniform(0.3, 0.7), *rng.uniform(0.4, 0.7, 2)])
    strikes_s = strikes_s[strikes_s < 1.8]
    x, floor, height = rng.uniform(0.2, 0.8), rng.uniform(0.6, 0.85), rng.uniform(0.14, 0.3)

    def path(time):
        apart = np.abs(time - strikes_s).min()
        return x, floor - height * (1 - (1 - min(apart / 0.17, 1))**2), 0.09

    return path, strikes_s


def test_impacts_are_found_by_a_linear_probe():
    """Least squares on five neighbouring tokens tells when a strike is, in clips that it was not fitted to."""
    rng = np.random.default_rng(1)
    token_s = SEQUENCE.duration_s / SEQUENCE.sync_length
    centres_s = (np.arange(SEQUENCE.sync_length) + 0.5) * token_s
    inputs, targets, truth = [], [], []
    for seed in range(60):
        path, strikes_s = bounce(rng)
        _, sync = encode(path, seed)
        # The probe sees sums over the picture: where it happens does not matter to it, and so few clips are enough.
        motion = sync.reshape(len(sync), 3, 64, 4).sum(axis=2).reshape(len(sync), -1)
        padded = np.pad(motion, ((2, 2), (0, 0)))
        window = np.concatenate([padded[i:i + len(sync)] for i in range(5)], axis=1)
        inputs.append(np.concatenate([window, np.abs(window), np.ones((len(sync), 1))], axis=1))
        targets.append(np.exp(-0.5 * np.square((centres_s[:, None] - strikes_s) / token_s)).sum(axis=1))
        truth.append(strikes_s)
    fit = np.concatenate(inputs[:40])
    weights = np.linalg.solve(fit.T @ fit + 300 * np.eye(fit.shape[1]), fit.T @ np.concatenate(targets[:40]))
    found = total = extra = 0
    for features, strikes_s in zip(inputs[40:], truth[40:]):
        score = features @ weights
        peaks = [i for i in range(1, len(score) - 1) if score[i] >= max(score[i - 1], score[i + 1], 0.2)]
        apart = np.abs(centres_s[peaks][:, None] - strikes_s)
        found += (apart.min(axis=0, initial=9) < 0.05).sum()
        extra += (apart.min(axis=1, initial=9) >= 0.05).sum()
        total += len(strikes_s)
    assert found / total > 0.8 and extra / total < 0.1  # measured: 0.90 and 0


def test_text_features_depend_on_the_text_alone():
    encoder = encoders.make('pixels', SEQUENCE, store.load)
    empty, rod, bell = encoder.encode_text(['', 'A metal  rod', 'a metal bell'])
    assert empty.shape == (77, 1024) and empty.dtype == np.float32
    assert (np.abs(empty).sum(axis=1) > 0).tolist() == [True] * 2 + [False] * 75  # start and end mark
    np.testing.assert_array_equal(rod[:3], bell[:3])
    assert np.abs(rod[3] - bell[3]).mean() > 0.5
    assert 0.9 < rod[:5].std() < 1.1
    other = encoders.make('pixels', Sequence('44k', 8.0), store.load)
    np.testing.assert_array_equal(other.encode_text(['a metal rod'])[0], rod)
    np.testing.assert_allclose(empty[0, :3], EMPTY_START, atol=1e-6)  # the same in every session and version


EMPTY_START = (-0.995992, 1.373766, -0.315718)


def test_errors_name_the_field():
    with pytest.raises(ValueError, match="config.extract.encoder is 'clip'; it must be one of official, pixels"):
        encoders.make('clip', SEQUENCE, store.load)
    with pytest.raises(ValueError, match=r'frames are uint8 \[2, 49, 32, 32, 3\], not uint8 \[B, 50, 32, 32, 3\]'):
        encoder = encoders.make('pixels', SEQUENCE, store.load)
        encoder.encode_video(np.zeros((2, 16, 32, 32, 3), np.uint8), np.zeros((2, 49, 32, 32, 3), np.uint8))
