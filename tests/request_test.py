"""What a user may ask for: lists, lengths, frames in memory, images, noise; and each mistake in one line."""
import warnings

import numpy as np
from PIL import Image
import pytest

from mmaudio_jax import media
from mmaudio_jax import request
from mmaudio_jax.frames import Frames
from tests.media_test import write_video

DEFAULTS = {'video': None, 'image': None, 'fps': None, 'prompt': '', 'negative_prompt': '', 'duration_s': None, 'seed': 42,
            'takes': 1, 'mask_clip': False, 'noise': None}
FRAMES = np.zeros((50, 4, 6, 3), np.uint8)


def make(training_s=8.0, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return request.make('16k', training_s, 0, **{**DEFAULTS, **fields})


def test_rows():
    made, is_batch = request.rows({'a': ['x', 'y'], 'b': 1, 'c': np.zeros(3)})
    assert is_batch and [row['a'] for row in made] == ['x', 'y'] and made[1]['b'] == 1 and made[1]['c'].shape == (3,)
    assert request.rows({'a': 'x', 'b': None}) == ([{'a': 'x', 'b': None}], False)
    assert request.rows({'a': [], 'b': 1}) == ([], True)
    with pytest.raises(ValueError, match='the lists are of different lengths: a 2, b 3'):
        request.rows({'a': [1, 2], 'b': (1, 2, 3), 'c': 0})


@pytest.mark.parametrize('frames,fps,samples,bucket_s', [
    (200, 25.0, 128_000, 8.0), (201, 25.0, 128_640, 8.5), (1, 25.0, 640, 1.0), (240, 30_000 / 1001, 128_128, 8.5),
    (133, 25.0, 85_120, 5.5)])
def test_a_video_is_rounded_up_and_the_result_is_exact(frames, fps, samples, bucket_s):
    made = make(video=Frames(np.broadcast_to(FRAMES[:1], (frames, 4, 6, 3)), fps))
    assert made.samples == samples and made.sequence.duration_s == bucket_s
    assert made.sequence.waveform_length >= samples


def test_a_given_duration_is_exact():
    made = make(video=Frames(FRAMES, 25.0), duration_s=1.9)
    assert made.sequence.duration_s == made.duration_s == 1.9 and made.samples == 30_400
    assert make().sequence.duration_s == 8.0
    assert make(prompt='rain', duration_s=5.3).sequence.latent_length == 166


def test_arrays_that_are_not_numpy_are_taken():
    import jax.numpy as jnp
    assert make(video=jnp.zeros((30, 4, 4, 3), jnp.uint8), fps=30).video.duration_s == 1.0


def test_a_length_far_from_the_training_length_is_worth_a_warning():
    for duration_s, warned in ((3.9, True), (4.0, False), (16.0, False), (16.1, True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            request.make('16k', 8.0, 0, **{**DEFAULTS, 'duration_s': duration_s})
        assert len(caught) == warned
    assert str(caught[0].message) == '16.1 s is far from the 8 s that the network was trained at: the sound may be worse'


def test_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    np.testing.assert_array_equal(request.read_image(tmp_path / 'a.png'), pixels)
    np.testing.assert_array_equal(make(image=pixels).image, pixels)
    Image.fromarray(pixels[..., 0]).save(tmp_path / 'grey.png')
    np.testing.assert_array_equal(request.read_image(tmp_path / 'grey.png'), np.repeat(pixels[..., :1], 3, axis=2))
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6  # shown a quarter turn to the right
    turned.save(tmp_path / 'turned.png', exif=exif)
    np.testing.assert_array_equal(request.read_image(tmp_path / 'turned.png'), np.rot90(pixels, -1))


def test_an_image_of_16_bits_keeps_its_greys(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (7, 5), np.uint8)
    for name in ('a.png', 'a.tif'):
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / name)
        np.testing.assert_array_equal(request.read_image(tmp_path / name), np.repeat(grey[..., None], 3, axis=2))
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / 'float.tif')
    with pytest.raises(media.MediaError, match='float.tif: holds floating-point numbers; an image of 8 or 16 bits'):
        request.read_image(tmp_path / 'float.tif')


def test_transparency_is_on_black(tmp_path):
    Image.fromarray(np.uint8([[[200, 0, 0, 0], [200, 0, 0, 255], [200, 100, 0, 51]]])).save(tmp_path / 'rgba.png')
    assert request.read_image(tmp_path / 'rgba.png').tolist() == [[[0, 0, 0], [200, 0, 0], [40, 20, 0]]]
    palette = Image.fromarray(np.uint8([[0, 1]]), 'P')
    palette.putpalette([200, 0, 0, 0, 50, 0])
    palette.save(tmp_path / 'palette.png', transparency=0)
    assert request.read_image(tmp_path / 'palette.png').tolist() == [[[0, 0, 0], [0, 50, 0]]]


def test_noise():
    noise = np.random.default_rng(0).normal(size=(63, 20))
    assert make(noise=noise, duration_s=2.0).noise.shape == (1, 63, 20)
    assert make(noise=noise[None], duration_s=2.0).noise.dtype == np.float32
    assert make(noise=np.stack([noise, noise]), duration_s=2.0, takes=2).noise.shape == (2, 63, 20)
    for array, takes in ((noise, 2), (noise[:62], 1), (np.zeros((63, 20), int), 1)):
        with pytest.raises(ValueError, match=rf'noise is .*; float \[{takes}, 63, 20\] is needed for {takes} take'):
            make(noise=array, duration_s=2.0, takes=takes)


@pytest.mark.parametrize('fields,message', [
    ({'prompt': 3}, 'prompt is of type int; a text is needed'),
    ({'negative_prompt': None}, 'negative_prompt is of type NoneType; a text is needed'),
    ({'seed': -1}, 'seed -1 is not a whole number from 0 to 4294967295'),
    ({'seed': 1.5}, 'seed 1.5 is not a whole number'),
    ({'takes': 0}, 'takes is 0; it must be at least 1'),
    ({'video': FRAMES}, 'video is an array of frames: set fps'),
    ({'video': 'a.mp4', 'fps': 25}, 'fps is 25, but video is of type str: fps belongs to frames in memory'),
    ({'video': Frames(FRAMES, 25.0), 'fps': 30}, 'fps is 30, but video is of type Frames'),
    ({'fps': 25}, 'fps is 25, but video is of type NoneType'),
    ({'video': FRAMES.astype(np.float32), 'fps': 25}, r'frames in memory are float32 \[50, 4, 6, 3\]; uint8 \[T, H, W, 3\] is'),
    ({'video': FRAMES[0], 'fps': 25}, r'frames in memory are uint8 \[4, 6, 3\]'),
    ({'video': 7}, r'video is of type int; a file, uint8 \[T, H, W, 3\] or None is needed'),
    ({'video': Frames(FRAMES, 25.0), 'duration_s': 3.0}, 'the frames in memory last 2.000 s, 3.000 s are needed'),
    ({'video': Frames(np.zeros((12_100, 1, 1, 3), np.uint8), 100.0)}, 'the frames in memory last 121 s, more than 120 s'),
    ({'video': FRAMES, 'fps': 25, 'image': FRAMES[0]}, 'both a video and an image are given'),
    ({'image': FRAMES}, r'image is uint8 \[50, 4, 6, 3\]; a file or uint8 \[H, W, 3\] is needed'),
    ({'mask_clip': 'False', 'video': FRAMES, 'fps': 25}, "mask_clip is 'False'; True or False is needed"),
    ({'mask_clip': True}, 'mask_clip leaves out the CLIP frames of a video, and there is none'),
    ({'duration_s': 0.5}, 'duration_s 0.5 is too short'),
    ({'duration_s': float('nan')}, 'duration_s is nan; a finite number of seconds is needed'),
    ({'noise': np.full((63, 20), np.nan), 'duration_s': 2.0}, 'noise holds NaN or infinity'),
    ({'video': FRAMES, 'fps': '25'}, "fps '25' of frames in memory is not a positive number"),
    ({'video': FRAMES, 'fps': 1e9}, 'the frames in memory last 5e-08 s, too short for a sound: .* fps is 1e[+]09$'),
    ({'duration_s': 1e5}, 'duration_s is 100000; at most 1800 s can be computed as one clip'),
])
def test_mistakes(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**fields)
    assert '\n' not in str(error.value)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'no image')
    for path, reason in ((tmp_path / 'a.png', 'not an image that can be read'), (tmp_path / 'b.png', 'no such file'),
                         (tmp_path, 'is a directory')):
        with pytest.raises(media.MediaError, match=reason):
            make(image=path)


def test_an_address_is_no_file():
    for name in ('video', 'image'):
        with pytest.raises(media.MediaError, match='^https://example.com/a.mp4: is an address; download it first'):
            make(**{name: 'https://example.com/a.mp4'})


def test_a_video_file_gives_its_length(tmp_path):
    path = write_video(tmp_path / 'a.mp4', frames=30)
    assert make(video=str(path)).samples == round(1.2 * 16_000)
    with pytest.raises(media.MediaError, match='no such file'):
        make(video=tmp_path / 'b.mp4')
