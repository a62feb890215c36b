"""The sound of a scene: every strike excites the decaying modes of its material, louder the faster it was."""
import dataclasses

import numpy as np

from data_pipelines.impacts_scene import Scene

SAMPLE_RATE_HZ = 44_100
ATTACK_S = 0.0005
CLICK_DECAY_S = 0.003
PEAK = 0.6  # of the fastest strike alone: tails of earlier ones fit on top
SILENCE = 1e-4  # a mode quieter than this is cut


@dataclasses.dataclass(frozen=True)
class Modes:
    """How a material rings: lowest mode in Hz, ratios and gains of the modes, time to 1 / e of the lowest (higher ones are
    shorter by damping), gain of the broadband click and the share of the neighbouring sample in it (negative is brighter)."""
    frequency_hz: float
    ratios: tuple[float, ...]
    gains: tuple[float, ...]
    decay_s: float
    damping: float
    click: float
    tilt: float


MODES = {
    'metal': Modes(620.0, (1.0, 2.76, 5.40, 8.93), (1.0, 0.8, 0.6, 0.35), 0.16, 0.3, 0.5, -0.3),
    'glass': Modes(1900.0, (1.0, 1.51, 2.32, 3.24), (1.0, 0.6, 0.5, 0.3), 0.09, 0.4, 0.4, -0.7),
    'wood': Modes(380.0, (1.0, 2.57, 4.95), (1.0, 0.6, 0.25), 0.04, 0.6, 0.4, 0.2),
    'stone': Modes(1150.0, (1.0, 1.83, 2.71, 4.1), (1.0, 0.9, 0.7, 0.5), 0.022, 0.3, 0.9, -0.1),
    'rubber': Modes(130.0, (1.0, 2.1, 3.4), (1.0, 0.5, 0.2), 0.05, 0.5, 0.3, 0.6),
}


def _strike(modes: Modes, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """One strike at full speed: float64 [samples], peak 1."""
    length = int(modes.decay_s * -np.log(SILENCE) * SAMPLE_RATE_HZ)
    time = np.arange(length) / SAMPLE_RATE_HZ
    result = np.zeros(length)
    for ratio, gain in zip(modes.ratios, modes.gains):
        decay = modes.decay_s * ratio ** -modes.damping
        strength = gain * rng.uniform(0.7, 1.0)  # where it was hit
        result += strength * np.exp(-time / decay) * np.sin(2 * np.pi * modes.frequency_hz * pitch * ratio * time)
    result /= sum(modes.gains)
    noise = rng.standard_normal(min(length, int(8 * CLICK_DECAY_S * SAMPLE_RATE_HZ)) + 1)
    click = (noise[1:] + modes.tilt * noise[:-1]) / (1 + abs(modes.tilt))
    result[:len(click)] += 0.5 * modes.click * click * np.exp(-time[:len(click)] / CLICK_DECAY_S)
    result *= np.minimum(time / ATTACK_S, 1)
    return result / np.abs(result).max()


def synthesize(scene: Scene) -> np.ndarray:
    """The sound of all its things, seen or not: float32 [duration_s * SAMPLE_RATE_HZ] in [-1, 1]."""
    rng = np.random.default_rng([scene.seed, 1])
    result = np.zeros(round(scene.duration_s * SAMPLE_RATE_HZ))
    for thing in scene.things:
        for strike in thing.strikes:
            sound = PEAK * strike.speed * _strike(MODES[thing.material], thing.pitch, rng)
            start = round(strike.time_s * SAMPLE_RATE_HZ)
            end = min(start + len(sound), len(result))
            result[start:end] += sound[:end - start]
    return np.clip(result, -1, 1).astype(np.float32)
