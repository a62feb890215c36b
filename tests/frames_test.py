"""Resizing against the golden; videos in memory: which frames are taken, and what is refused."""
import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from mmaudio_jax import frames
from mmaudio_jax.frames import FrameRequest
from tests.conftest import GOLDEN


@pytest.mark.parametrize('name,request_,step', [('clip', FrameRequest(8.0, 384, 384, 'squash'), 6),
                                                ('sync', FrameRequest(25.0, 224, 224, 'crop'), 4)])
def test_resizing_is_the_official_one(name, request_, step):
    golden = np.load(GOLDEN / 'frames.npz')
    ours = np.stack([frames.fit_frame(frame, request_) for frame in golden['frames']]).astype(np.float64)
    if name == 'clip':
        mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    else:
        mean, std = np.array([0.5] * 3), np.array([0.5] * 3)
    levels = (golden[name].transpose(0, 2, 3, 1) * std + mean) * 255
    error = np.abs(ours[:, ::step, ::step] - levels)
    assert error.max() < 1.01  # measured 1.00003 grey levels, at 0.15 % (clip) and 0.44 % (sync) of the pixels
    assert (error > 0.5).mean() < 0.005 and error.mean() < 0.2
    assert np.abs((ours.mean(axis=(1, 2)) / 255 - mean) / std - golden[name + '_mean']).max() < 2e-5  # measured 8.1e-6


def _numbered(count: int, fps: float) -> frames.Frames:
    """Frames whose brightness is 8 x their number."""
    return frames.Frames(np.broadcast_to(8 * np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 6, 9, 3)), fps)


def test_a_video_in_memory_is_sampled_as_a_file():
    requests = [FrameRequest(25.0, 4, 4, 'squash'), FrameRequest(8.0, 4, 4, 'crop')]
    fine, coarse = frames.sample_frames(_numbered(25, 25.0), requests, 1.0)
    assert fine.shape == (25, 4, 4, 3) and coarse.shape == (8, 4, 4, 3)
    assert (fine[:, 0, 0, 0] // 8).tolist() == list(range(25))
    assert (coarse[:, 0, 0, 0] // 8).tolist() == [0, 4, 7, 10, 13, 16, 19, 22]  # the first frame at or after k / 8 s
    nearest = [dataclasses.replace(request, rule='nearest') for request in requests]
    fine, coarse = frames.sample_frames(_numbered(25, 25.0), nearest, 1.0)
    assert (fine[:, 0, 0, 0] // 8).tolist() == list(range(25))
    assert (coarse[:, 0, 0, 0] // 8).tolist() == [1, 4, 7, 10, 14, 17, 20, 23]  # the last frame before (k + 1/2) / 8 s
    held, = frames.sample_frames(_numbered(3, 29.97), requests[:1], 0.2)
    assert (held[:, 0, 0, 0] // 8).tolist() == [0, 2, 2, 2, 2]  # past the end the last frame stands still


@pytest.mark.parametrize('fps', [8.0, 25.0, 29.97])
def test_sums_are_compared_as_the_released_code_does(fps):
    """Its loop: a frame serves samples as long as its time, a float, is not less than the sum of so many 1 / fps."""
    frame_times = [Fraction(k, 600) for k in range(2_400)]
    summed, expected, due = 0.0, [], 0
    for number, time in enumerate(frame_times):
        while due < 30 and float(time) >= summed:
            expected.append(number)
            summed, due = summed + 1 / fps, due + 1
    earliest = FrameRequest(fps, 4, 4, 'crop', rule='summed').times(30)
    assert [next(number for number, time in enumerate(frame_times) if time >= first) for first in earliest] == expected
    exact = [next(number for number, time in enumerate(frame_times) if time >= first)
             for first in FrameRequest(fps, 4, 4, 'crop').times(30)]
    assert (exact == expected) == (fps != 25.0)


@pytest.mark.parametrize('pixels,fps,message', [
    (np.zeros((2, 4, 4, 3), np.float32), 25.0, r'frames in memory are float32 \[2, 4, 4, 3\]; uint8 \[T, H, W, 3\] is needed'),
    (np.zeros((2, 3, 4, 4), np.uint8), 25.0, r'uint8 \[2, 3, 4, 4\]'),
    (np.zeros((4, 4, 3), np.uint8), 25.0, r'uint8 \[4, 4, 3\]'),
    ([[0]], 25.0, 'frames in memory are of type list'),
    (np.zeros((0, 4, 4, 3), np.uint8), 25.0, 'there is no frame'),
    (np.zeros((2, 4, 4, 3), np.uint8), 0.0, 'fps 0.0 of frames in memory is not a positive number'),
])
def test_other_arrays_are_refused(pixels, fps, message):
    with pytest.raises(ValueError, match=message):
        frames.Frames(pixels, fps)
