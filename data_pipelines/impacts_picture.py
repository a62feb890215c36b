"""The picture of a scene: things that approach fast, touch and rebound at the instant of each strike, and motion without sound.

Shapes are painted by their signed distance (negative inside) into small patches, so that edges are smooth and frames are cheap.
Lengths are in 1 / 128 of the picture's edge; x to the right, y down.
"""
import math
from typing import Callable, Iterator

import numpy as np

from data_pipelines.impacts_scene import Scene
from data_pipelines.impacts_scene import Thing

APPROACH_S = 0.16  # from the turning point to contact
REBOUND_S = 0.18
JOLT_S = 0.06  # what is struck comes back to 1 / e within
JOLT = 3.0  # how far it gives way
ROD_LENGTH = 40.0
RADIUS = 10.0  # of a thing of size 1
UNITS = 128.0  # along an edge

Colour = tuple[float, float, float]
Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]  # local x, y → signed distance
Look = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple]  # local x, y, distance → colour, brightness, opacity


def distance_to_contact(thing: Thing, time_s: np.ndarray) -> np.ndarray:
    """How far the thing is from what it strikes: float [times]; 0 at each strike.

    It falls from the turning point in a parabola, fastest at contact, and is thrown back at once to where it next falls from.
    """
    times = np.array([strike.time_s for strike in thing.strikes])
    strokes = np.array([strike.stroke for strike in thing.strikes])
    thrown = np.append(strokes[1:], 0.6 * strokes[-1])

    def parabola(x):
        return 1 - (1 - np.clip(x, 0, 1)) ** 2

    following = np.searchsorted(times, time_s)
    preceding = following - 1
    to_come, gone = np.minimum(following, len(times) - 1), np.maximum(preceding, 0)
    fall = np.where(following < len(times), strokes[to_come] * parabola((times[to_come] - time_s) / APPROACH_S), np.inf)
    rise = np.where(preceding >= 0, thrown[gone] * parabola((time_s - times[gone]) / REBOUND_S), np.inf)
    return np.minimum(fall, rise)


def _jolt(thing: Thing, time_s: np.ndarray) -> np.ndarray:
    """How far what is struck has given way: float [times]."""
    since = time_s[:, None] - np.array([strike.time_s for strike in thing.strikes])
    speed = np.array([strike.speed for strike in thing.strikes])
    return (JOLT * speed * np.where((since >= 0) & (since < 8 * JOLT_S), np.exp(-np.maximum(since, 0) / JOLT_S), 0)).sum(axis=1)


# Shapes.
def _disc(radius: float) -> Distance:
    return lambda x, y: np.sqrt(x * x + y * y) - radius


def _box(half_width: float, half_height: float, rounding: float) -> Distance:
    def distance(x, y):
        dx, dy = np.abs(x) - half_width + rounding, np.abs(y) - half_height + rounding
        right, down = np.maximum(dx, 0), np.maximum(dy, 0)
        return np.sqrt(right * right + down * down) + np.minimum(np.maximum(dx, dy), 0) - rounding
    return distance


def _cup(radius: float) -> Distance:
    def distance(x, y):
        wide = radius * (0.8 - 0.2 * y / radius)
        outside = np.maximum(np.abs(x) - wide, np.abs(y) - radius)
        hollow = np.maximum(np.abs(x) - wide + 4, y - radius + 4)
        return np.maximum(outside, -hollow)
    return distance


SHAPE_DISTANCES = {'ball': _disc, 'block': lambda radius: _box(radius, radius, 2.0), 'cup': _cup,
                   'rod': lambda radius: _box(ROD_LENGTH / 2, 0.32 * radius, 1.5)}


# Looks.
LOOKS: dict[str, Look] = {
    'metal': lambda x, y, d: ((165, 178, 200), 0.95 + 0.35 * np.cos(0.45 * (x + y)), 1.0),
    'glass': lambda x, y, d: ((185, 250, 245), 1.0, np.where(d > -2.5, 0.95, 0.4)),
    'wood': lambda x, y, d: ((176, 112, 52), 0.95 + 0.25 * np.sin(1.5 * y + 0.6 * np.sin(0.3 * x)), 1.0),
    'stone': lambda x, y, d: ((72, 70, 68), 1 + 0.4 * np.sin(2.1 * x + 0.9 * y) * np.sin(2.3 * y - 0.8 * x), 1.0),
    'rubber': lambda x, y, d: ((225, 62, 58), np.where(x * x + y * y < 16, 0.35, 1.0), 1.0),
}


def _plain(colour: Colour) -> Look:
    return lambda x, y, d: (colour, 1.0, 1.0)


def _column(colour: Colour) -> np.ndarray:
    return np.array(colour, np.float32)[:, None, None]


class _Canvas:
    """A picture that shapes are painted on, float32 [3, size, size] in grey levels."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels
        self.size = pixels.shape[1]
        self.scale = self.size / UNITS
        self.places = (np.arange(self.size, dtype=np.float32) + 0.5) / self.scale

    def _span(self, middle: float, reach: float) -> slice:
        """The pixels within reach of middle along one axis."""
        return slice(min(max(int((middle - reach) * self.scale), 0), self.size),
                     min(max(int((middle + reach) * self.scale) + 1, 0), self.size))

    def paint(self, distance: Distance, look: Look, x: float, y: float, reach: float, angle: float = 0.0) -> None:
        """Paints one shape with its middle at (x, y), turned by angle (radians, clockwise), within reach of its middle."""
        rows, columns = self._span(y, reach), self._span(x, reach)
        right, down = self.places[None, columns] - np.float32(x), self.places[rows, None] - np.float32(y)
        if angle:
            cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
            right, down = cos * right + sin * down, cos * down - sin * right
        d = distance(right, down)
        colour, brightness, opacity = look(right, down, d)
        cover = np.minimum(np.maximum(np.float32(0.5) - d * np.float32(self.scale), 0), 1) * opacity
        part = self.pixels[:, rows, columns]
        part += cover * (_column(colour) * brightness - part)

    def spread(self, x: np.ndarray, y: np.ndarray, radius: float, colour: Colour) -> None:
        """Paints soft dots around all (x, y)."""
        across = np.exp(-((self.places[None, :] - x[:, None]) / radius) ** 2)
        down = np.exp(-((self.places[:, None] - y[None, :]) / radius) ** 2)
        cover = np.minimum(down @ across, 1).astype(np.float32)
        self.pixels += cover * (_column(colour) - self.pixels)

    def glow(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """Adds a soft light around (x, y)."""
        rows, columns = self._span(y, 2.3 * radius), self._span(x, 2.3 * radius)  # e**-5.3 of it is left there
        across = np.exp(-((self.places[columns] - np.float32(x)) / radius) ** 2)
        down = np.exp(-((self.places[rows] - np.float32(y)) / radius) ** 2)
        self.pixels[:, rows, columns] += down[:, None] * across * _column(colour)


def _paint_thing(canvas: _Canvas, thing: Thing, away: float, jolt: float) -> None:
    """One thing, `away` from contact, and what it strikes, which has given way by `jolt`."""
    x, y = thing.centre
    radius, side = RADIUS * thing.size, thing.side
    distance, look = SHAPE_DISTANCES[thing.shape](radius), LOOKS[thing.material]
    anvil = _plain((38, 34, 46))
    if thing.shape == 'block':  # slides sideways against a post
        contact = x + side * 24
        canvas.paint(_box(3.0, 16.0, 1.0), anvil, contact + side * (3 + jolt), y + 8, 18)
        canvas.paint(distance, look, contact - side * (radius + away), y + 12, 1.5 * radius)
    elif thing.shape == 'rod':  # swings about one end onto an anvil
        thick, angle = 0.32 * radius, away / ROD_LENGTH
        pivot = x - side * ROD_LENGTH / 2
        canvas.paint(_box(7.0, 5.0, 1.0), anvil, pivot + side * (ROD_LENGTH - 5), y + 30 + thick + 5 + jolt, 10)
        middle = (pivot + side * ROD_LENGTH / 2 * np.cos(angle), y + 30 - ROD_LENGTH / 2 * np.sin(angle))
        canvas.paint(distance, look, *middle, ROD_LENGTH / 2 + 4, -side * angle)
        canvas.paint(_disc(3.5), anvil, pivot, y + 30, 5)
    else:  # falls onto a plate
        canvas.paint(_box(18.0, 3.0, 1.0), anvil, x, y + 35 + jolt, 20)
        canvas.paint(distance, look, x, y + 32 - radius - away, 1.5 * radius)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A still background: a soft gradient with some grain, float32 [3, size, size]."""
    first, second = rng.uniform(70, 200, (3, 1, 1)), rng.uniform(70, 200, (3, 1, 1))
    angle = rng.uniform(0, 2 * np.pi)
    places = np.linspace(-0.5, 0.5, size)
    mix = (0.5 + 0.7 * (np.cos(angle) * places[None, :] + np.sin(angle) * places[:, None]))
    return (first * mix + second * (1 - mix) + rng.normal(0, 2.5, (size, size))).astype(np.float32)


def _distractors(rng: np.random.Generator, names: tuple[str, ...]) -> list[Callable[[_Canvas, float], None]]:
    """Motion that makes no sound; each is a function that paints it at a time."""
    painters: list[Callable[[_Canvas, float], None]] = []
    for name in names:
        place, speed = rng.uniform(0, UNITS, (8, 2)), rng.uniform(-14, 14, (8, 2))
        colour, rate, phase = tuple(rng.uniform(40, 230, 3)), rng.uniform(0.2, 0.6), rng.uniform(0, 2 * np.pi)
        if name == 'dots':
            def dots(canvas, time, place=place, speed=speed, colour=colour):
                canvas.spread(*((place + speed * time) % UNITS).T.astype(np.float32), 1.8, colour)
            painters.append(dots)
        elif name == 'reed':
            def reed(canvas, time, x=place[0, 0], colour=colour, rate=rate, phase=phase):
                angle = 0.25 * np.sin(2 * np.pi * rate * time + phase)
                canvas.paint(_box(1.5, 20.0, 1.0), _plain(colour), x + 20 * np.sin(angle), 128 - 20 * np.cos(angle), 22, angle)
            painters.append(reed)
        else:
            def light(canvas, time, rate=rate, phase=phase):
                angle = np.pi * rate * time + phase
                canvas.glow(64 + 50 * np.cos(angle), 40 + 30 * np.sin(0.7 * angle), 22.0, (38.0, 36.0, 26.0))
            painters.append(light)
    return painters


def frames(scene: Scene, size: int, fps: float) -> Iterator[np.ndarray]:
    """Paints the scene at times k / fps: int(duration_s * fps) frames, uint8 [size, size, 3]."""
    rng = np.random.default_rng([scene.seed, 2])
    background = _background(rng, size)
    distractors = _distractors(rng, scene.distractors)
    times = np.arange(int(scene.duration_s * fps)) / fps
    seen = [(thing, distance_to_contact(thing, times), _jolt(thing, times)) for thing in scene.things if thing.visible]
    before, frame = None, np.empty(0)
    for k, time in enumerate(times):
        state = [(float(away[k]), float(jolt[k])) for _, away, jolt in seen]
        if distractors or state != before:
            canvas = _Canvas(background.copy())
            for paint in distractors:
                paint(canvas, float(time))
            for (thing, _, _), (away_now, jolt_now) in zip(seen, state):
                _paint_thing(canvas, thing, away_now, jolt_now)
            frame = np.stack(np.clip(canvas.pixels, 0, 255).astype(np.uint8), axis=-1)  # thrice as quick as a transposed copy
        before = state
        yield frame
