"""What happens in a clip of the built-in dataset: which things strike when and how fast, and the caption that says so.

A scene follows from its seed alone. Lengths are in units of the picture's edge / 128, so that they are pixels at 128.
"""
import dataclasses
import hashlib

import numpy as np

MATERIALS = ('metal', 'glass', 'wood', 'stone', 'rubber')
SHAPES = ('rod', 'ball', 'cup', 'block')
DISTRACTORS = ('dots', 'reed', 'light')
ADJECTIVES = {'wood': 'wooden'}
COUNTS = ('', 'once', 'twice', 'three times', 'four times', 'five times')
OFF_SCREEN_SHARE = 0.06  # of the scenes
TWO_THINGS_SHARE = 0.4
FIRST_STRIKE_S = 0.25  # the approach is in the picture
LAST_STRIKE_S = 0.25  # before the end: the sound rings out
MIN_GAP_S = 0.32  # between any two strikes, of any things
MAX_STRIKES = 5  # of one thing
STROKE = (18.0, 40.0)  # how far a thing swings out; its speed, hence its loudness, is proportional


@dataclasses.dataclass(frozen=True)
class Strike:
    """One contact: time in seconds from the start, how far the thing swung out before."""
    time_s: float
    stroke: float

    @property
    def speed(self) -> float:
        """Speed at contact relative to the fastest possible."""
        return self.stroke / STROKE[1]


@dataclasses.dataclass(frozen=True)
class Thing:
    """Something that strikes. centre is the middle of its part of the picture; side is -1 or 1, mirrored or not."""
    material: str
    shape: str
    size: float
    pitch: float
    centre: tuple[float, float]
    side: int
    visible: bool
    strikes: tuple[Strike, ...]

    @property
    def name(self) -> str:
        """What a caption calls it, with its article."""
        return f'a {ADJECTIVES.get(self.material, self.material)} {self.shape}'


@dataclasses.dataclass(frozen=True)
class Scene:
    """One clip. seed also fixes what is drawn and heard in detail."""
    seed: int
    duration_s: float
    things: tuple[Thing, ...]
    distractors: tuple[str, ...]

    def onset_times_s(self, visible: bool) -> list[float]:
        """Times of the strikes of the things that are in the picture, or of those that are not, in order, seconds."""
        return sorted(strike.time_s for thing in self.things if thing.visible == visible for strike in thing.strikes)


def clip_seed(dataset_seed: int, split: str, index: int) -> int:
    """The seed of one clip: a hash, so that clips do not depend on each other and no two splits share one."""
    digest = hashlib.sha256(f'{dataset_seed}/{split}/{index}'.encode()).digest()
    return int.from_bytes(digest[:6], 'big')


def _strike_times(rng: np.random.Generator, count: int, duration_s: float) -> list[float]:
    """Irregular times, rising, at least MIN_GAP_S apart, in microseconds' precision."""
    room = duration_s - FIRST_STRIKE_S - LAST_STRIKE_S - MIN_GAP_S * (count - 1)
    return [round(FIRST_STRIKE_S + MIN_GAP_S * i + room * u, 6) for i, u in enumerate(sorted(rng.random(count).tolist()))]


def sample_scene(seed: int, duration_s: float, with_video: bool) -> Scene:
    """The scene of a seed.

    Args:
      seed: from clip_seed.
      duration_s: at least 1 s.
      with_video: whether there is a picture; without one, nothing is off screen.
    """
    rng = np.random.default_rng(seed)
    most = int((duration_s - FIRST_STRIKE_S - LAST_STRIKE_S) / MIN_GAP_S)  # strikes that fit with some freedom
    off_screen = with_video and most >= 2 and rng.random() < OFF_SCREEN_SHARE
    two = off_screen or (most >= 2 and rng.random() < TWO_THINGS_SHARE)
    if two:
        counts = [int(n) for n in rng.integers(1, min(3, most // 2) + 1, 2)]
    else:
        counts = [int(rng.integers(1, min(MAX_STRIKES, most) + 1))]
    owners = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    times = _strike_times(rng, sum(counts), duration_s)
    materials = rng.permutation(len(MATERIALS))[:len(counts)]
    things = []
    for i in range(len(counts)):
        x = 64 + rng.uniform(-26, 26) if not two or off_screen else (32, 96)[i] + rng.uniform(-2, 2)
        strikes = tuple(Strike(time, round(float(rng.uniform(*STROKE)), 3)) for time, owner in zip(times, owners) if owner == i)
        size = float(rng.uniform(0.85, 1.2))
        things.append(Thing(material=MATERIALS[materials[i]], shape=SHAPES[int(rng.integers(len(SHAPES)))], size=size,
                            pitch=float(rng.uniform(0.95, 1.05)) / size, centre=(float(x), float(rng.uniform(66, 80))),
                            side=1 if rng.random() < 0.5 else -1, visible=not (off_screen and i == 1), strikes=strikes))
    distractors = tuple(name for name in DISTRACTORS if rng.random() < 0.4)
    return Scene(seed=seed, duration_s=duration_s, things=tuple(things), distractors=distractors if with_video else ())


def caption(scene: Scene) -> str:
    """What is heard, in words: materials, shapes, counts and order, and what is out of sight."""
    seen = [thing for thing in scene.things if thing.visible]
    hidden = ''.join(f', while {thing.name} strikes {COUNTS[len(thing.strikes)]} out of sight'
                     for thing in scene.things if not thing.visible)
    order = sorted((strike.time_s, i) for i, thing in enumerate(seen) for strike in thing.strikes)
    runs: list[list[int]] = []  # [thing, strikes in a row]
    for _, i in order:
        if runs and runs[-1][0] == i:
            runs[-1][1] += 1
        else:
            runs.append([i, 1])
    first = f'{seen[runs[0][0]].name} strikes {COUNTS[runs[0][1]]}'
    if len(runs) <= 2:
        return first + ''.join(f', then {seen[i].name} {COUNTS[count]}' for i, count in runs[1:]) + hidden
    i = runs[0][0]
    return (f'{seen[i].name} strikes {COUNTS[len(seen[i].strikes)]} and {seen[1 - i].name} '
            f'{COUNTS[len(seen[1 - i].strikes)]}, by turns{hidden}')
