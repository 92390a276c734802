"""The diffusion's algebra, and samplers as tables of coefficients over one step (METHODS.md 2.1, 2.6, 2.7).

VPDM is ordinary DDPM on the residual u = x - yhat (METHODS.md 2.1.1), so a sampler is a list of times: row k of its
tables moves u from times[k] to times[k + 1], and the last row to 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ....runtime.errors import ConfigError
from .config import VpdmConfig

Array = NDArray[np.float64]
#: Columns of a coefficient row.
COLUMNS = ("sqrt_a", "sqrt_1ma", "sqrt_a_next", "direction", "sigma", "from_u", "from_out", "clip")


@dataclass(frozen=True)
class NoiseSchedule:
    """a_t = 1 - beta_t and A_t = prod a_i; arrays have steps + 1 entries, entry 0 is t = 0 (a = A = 1)."""

    beta: Array
    a: Array
    cumulative: Array

    @classmethod
    def linear(cls, steps: int, first: float, last: float) -> NoiseSchedule:
        """The paper's schedule: beta linear from `first` to `last`."""
        beta = np.concatenate(([0.0], np.linspace(first, last, steps)))
        return cls(beta, 1 - beta, np.cumprod(1 - beta))

    def posterior_variance(self, t: Array) -> Array:
        """btilde_t = (1 - A_{t-1}) / (1 - A_t) beta_t for t >= 1."""
        return (1 - self.cumulative[t - 1]) / (1 - self.cumulative[t]) * self.beta[t]


@dataclass(frozen=True)
class Sampler:
    """One way from a start to u_0.

    times: t of each call, falling. start: `noise` (N(0, (1 - A) I), nothing of the input leaks) or `input` (the
    residual scaled by sqrt(A), no noise). stochastic: DDPM, noise of variance btilde is added; needs steps of 1.
    like: the sampler whose constants by position serve this one too; none: it has its own.
    """

    name: str
    times: tuple[int, ...]
    start: str = "noise"
    stochastic: bool = False
    like: str | None = None


def _quadratic(start: int, count: int) -> tuple[int, ...]:
    """Times that fall like a square, dense near 0: 1000, 810, 640, ... for 1000 and 10."""
    return tuple(max(1, round(start * (1 - k / count) ** 2)) for k in range(count))


def samplers(config: VpdmConfig) -> dict[str, Sampler]:
    """All samplers of a model by name; the times of a shorter schedule than 1,000 are scaled."""
    t = config.diffusion.steps
    truncated = round(0.4 * t)
    listed = (
        Sampler("restore", (config.restore_t,), start="input"),
        # Its own constants would take longer than the training: every call on every held-out image.
        Sampler(f"ddpm{t}", tuple(range(t, 0, -1)), stochastic=True, like="ddim50"),
        Sampler("ddim50", tuple(round(t * (1 - k / 50)) for k in range(50))),
        Sampler("ddim25", _quadratic(t, 25)),
        Sampler("ddim10", _quadratic(t, 10)),
        Sampler(f"ddim10_t{truncated}", _quadratic(truncated, 10)),
    )
    return {s.name: s for s in listed}


def find_sampler(config: VpdmConfig, name: str) -> Sampler:
    """A sampler by name.

    Raises:
        ConfigError: there is none of that name.
    """
    known = samplers(config)
    if name not in known:
        raise ConfigError(f"unknown sampler {name!r}", found=name, expected=", ".join(known))
    return known[name]


def constants_of(config: VpdmConfig, sampler: Sampler) -> str:
    """Name of the sampler whose constants by position a sampler is scored with; the configured one has its own."""
    return sampler.name if sampler.like is None or sampler.name == config.sampler else sampler.like


def calibrated(config: VpdmConfig) -> tuple[Sampler, ...]:
    """The samplers that have constants by position of their own."""
    return tuple(s for name, s in samplers(config).items() if constants_of(config, s) == name)


def coefficients(sampler: Sampler, config: VpdmConfig) -> Array:
    """Coefficient table [calls, 8], float64, columns as in COLUMNS.

    One step is: u0 = clip(from_u u + from_out net); eps = (u - sqrt_a u0) / sqrt_1ma;
    u_next = sqrt_a_next u0 + direction eps + sigma noise.
    """
    d = config.diffusion
    schedule = NoiseSchedule.linear(d.steps, *d.beta)
    t = np.array(sampler.times)
    after = np.array((*sampler.times[1:], 0))
    a, a_next = schedule.cumulative[t], schedule.cumulative[after]
    variance = schedule.posterior_variance(t) if sampler.stochastic else np.zeros(len(t))
    root, rest = np.sqrt(a), np.sqrt(1 - a)
    from_u, from_out = (root, -rest) if d.prediction == "v" else (1 / root, -rest / root)
    direction = np.sqrt(np.maximum(1 - a_next - variance, 0))
    clip = np.full(len(t), d.clip)
    return np.stack((root, rest, np.sqrt(a_next), direction, np.sqrt(variance), from_u, from_out, clip), axis=1)


def time_codes(times: tuple[int, ...], channels: int) -> Array:
    """Sinusoidal codes of times, [calls, channels]: sines first, then cosines, temperature 1e4."""
    half = channels // 2
    angle = np.array(times)[:, None] * np.exp(-np.log(1e4) * np.arange(half) / half)
    return np.concatenate((np.sin(angle), np.cos(angle)), axis=1)
