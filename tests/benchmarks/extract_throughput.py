"""Throughput, CPU use and memory of --mode=extract with the built-in encoders.

    python -m tests.benchmarks.extract_throughput --kind=video --folder=DIR [--clips=48] [--source=FILE]
    python -m tests.benchmarks.extract_throughput --kind=sound --folder=DIR [--clips=400]
    python -m tests.benchmarks.extract_throughput --kind=long --folder=DIR    # one sound of three hours, cut in five windows

video: 8.3 s of 1280x720 at 25 frames a second (H.264, AAC): the frames of --source, scaled and played back and forth, or a
moving texture. sound: 8.2 s of flac at 44.1 kHz, stereo. Prints one JSON line: times real time, share of all cores, peak memory
of the whole process tree. Media that are there are used again; records are made anew. The start of Python and the fit of the
codec count.
"""
import argparse
from fractions import Fraction
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import av
import numpy as np
import soundfile

ROOT = pathlib.Path(__file__).parents[2]
FPS, LENGTH_S, SIZE = 25, 8.3, (1280, 720)
RATE_HZ = 44_100
LONG_S = 3 * 3600


def picture(source: str) -> list[np.ndarray]:
    """Frames of yuv420p, `[H · 3/2, W]` uint8."""
    if source:
        with av.open(source) as container:
            frames = [frame.reformat(*SIZE, format='yuv420p') for frame in container.decode(video=0)][:200]
        return [frame.to_ndarray() for frame in frames]
    rng = np.random.default_rng(0)
    canvas = np.kron(rng.integers(60, 200, (120, 200)), np.ones((16, 16))) + rng.normal(0, 4, (1920, 3200))
    frames = []
    for i in range(100):
        luma = np.roll(canvas, (3 * i, 5 * i), (0, 1))[:SIZE[1], :SIZE[0]].clip(0, 255).astype(np.uint8)
        frames.append(np.concatenate([luma, np.full((SIZE[1] // 2, SIZE[0]), 128, np.uint8)]))
    return frames


def write_video(path: pathlib.Path, frames: list[np.ndarray], first: int) -> None:
    """One clip with sound."""
    there_and_back = frames + frames[::-1]
    rng = np.random.default_rng(first)
    with av.open(os.fspath(path), 'w') as out:
        video = out.add_stream('libx264', rate=FPS, width=SIZE[0], height=SIZE[1], pix_fmt='yuv420p',
                               options={'preset': 'veryfast', 'crf': '23'})
        audio = out.add_stream('aac', rate=RATE_HZ, layout='stereo')
        for i in range(int(LENGTH_S * FPS)):
            frame = av.VideoFrame.from_ndarray(there_and_back[(first + i) % len(there_and_back)], format='yuv420p')
            frame.pts = i
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        sound = (0.1 * rng.standard_normal((2, int(LENGTH_S * RATE_HZ)))).astype(np.float32)
        for at in range(0, sound.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound[:, at:at + 1024]), format='fltp', layout='stereo')
            frame.sample_rate, frame.pts, frame.time_base = RATE_HZ, at, Fraction(1, RATE_HZ)
            out.mux(audio.encode(frame))
        out.mux(audio.encode(None))


def write_media(kind: str, folder: pathlib.Path, clips: int, source: str) -> None:
    """Media and table; a file serves several clips, as its features do not depend on it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(1), []
    if kind == 'long' and not (folder / 'long.wav').is_file():
        with soundfile.SoundFile(folder / 'long.wav', 'w', RATE_HZ, 1) as file:
            for _ in range(LONG_S // 60):
                file.write(0.1 * rng.standard_normal(60 * RATE_HZ))
    frames = picture(source) if kind == 'video' and not (folder / '0.mp4').is_file() else []
    for i in range(min(clips, 6)):
        if kind == 'video' and not (folder / f'{i}.mp4').is_file():
            write_video(folder / f'{i}.mp4', frames, 13 * i)
        elif kind == 'sound' and not (folder / f'{i}.flac').is_file():
            soundfile.write(folder / f'{i}.flac', 0.1 * rng.standard_normal((int(8.2 * RATE_HZ), 2)), RATE_HZ)
    for i in range(clips if kind != 'long' else 5):
        name = {'video': f'{i % 6}.mp4', 'sound': f'{i % 6}.flac', 'long': 'long.wav'}[kind]
        copy = folder / f'copy-{i}{pathlib.Path(name).suffix}'  # a name of its own, so that no peak is known beforehand
        if kind != 'long' and not copy.exists():
            copy.symlink_to(name)
        rows.append({'id': str(i), 'video': copy.name if kind == 'video' else None, 'caption': f'thing number {i}',
                     'audio': {'video': None, 'sound': copy.name, 'long': 'long.wav'}[kind], 'split': 'train',
                     'start_s': i * (LONG_S - 8.1) / 4 if kind == 'long' else 0.0})
    (folder / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def tree(pid: int) -> list[int]:
    """The process and all that it started."""
    found = [pid]
    for parent in found:
        try:
            for thread in os.listdir(f'/proc/{parent}/task'):
                found += map(int, pathlib.Path(f'/proc/{parent}/task/{thread}/children').read_text().split())
        except OSError:
            pass  # it ended meanwhile
    return found


def resident_kb(pids: list[int]) -> int:
    """Memory of the processes; pages that they share count for each."""
    total = 0
    for pid in pids:
        try:
            lines = pathlib.Path(f'/proc/{pid}/status').read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith('VmRSS:'))
    return total


def main() -> None:
    """Makes the media, extracts them, prints the line."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--kind', choices=('video', 'sound', 'long'), required=True)
    parser.add_argument('--folder', type=pathlib.Path, required=True)
    parser.add_argument('--clips', type=int, default=0)
    parser.add_argument('--source', default='')
    parser.add_argument('--workers', type=int, default=2)
    arguments = parser.parse_args()
    clips = arguments.clips or {'video': 48, 'sound': 400, 'long': 5}[arguments.kind]
    work = arguments.folder / arguments.kind
    write_media(arguments.kind, work / 'media' / arguments.kind, clips, arguments.source)
    shutil.rmtree(work / 'records', ignore_errors=True)
    kind = arguments.kind
    command = [sys.executable, 'run.py', '--config=configs/base.py', f'--workdir={work}', '--mode=extract',
               f'--config.extract.datasets=(("{kind}", "media/{kind}"),)', '--config.extract.encoder=pixels',
               '--config.extract.codec=pca', f'--config.extract.codec_fit_dataset={kind}',
               f'--config.extract.workers={arguments.workers}']
    started, peak = time.time(), 0
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None:
        peak = max(peak, resident_kb(tree(process.pid)))
        time.sleep(0.1)
    took, times = time.time() - started, os.times()
    assert process.returncode == 0
    seconds = LONG_S if arguments.kind == 'long' else clips * 8.0
    cores = len(os.sched_getaffinity(0))
    busy = times.children_user + times.children_system
    print(json.dumps({'kind': arguments.kind, 'clips': clips, 'took_s': round(took, 1),
                      'times_real_time': round(seconds / took, 1), 'cpu_share': round(busy / took / cores, 3), 'cores': cores,
                      'peak_mb': round(peak / 1024)}))


if __name__ == '__main__':
    main()
