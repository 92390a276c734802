"""VPDM's algebra as corrected (and the printed one refuted), and its samplers (METHODS.md 2.1)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from andon.runtime.errors import ConfigError
from andon.train.methods.vpdm.model import Update, prediction_target, roll
from andon.train.methods.vpdm.samplers import NoiseSchedule, Sampler, coefficients, find_sampler, samplers
from torch import Tensor

from .smallvpdm import small_config

SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 0.02)
TIMES = np.arange(1, 1001)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_composed_forward_steps_have_variance_one_minus_a() -> None:
    mean_x, mean_y, variance = 1.0, 0.0, 0.0
    for t in TIMES:
        root = np.sqrt(SCHEDULE.a[t])
        mean_x, mean_y, variance = root * mean_x, root * mean_y + 1 - root, SCHEDULE.a[t] * variance + SCHEDULE.beta[t]
        assert abs(variance - (1 - SCHEDULE.cumulative[t])) < 1e-12
        assert abs(mean_x - np.sqrt(SCHEDULE.cumulative[t])) < 1e-12
        assert abs(mean_y - (1 - np.sqrt(SCHEDULE.cumulative[t]))) < 1e-12
    printed = 1 - np.sqrt(SCHEDULE.cumulative[1:])  # eq. 14
    assert np.abs(printed - (1 - SCHEDULE.cumulative[1:])).max() > 0.2


def posterior(t: int) -> tuple[float, float, float, float]:
    """Mean weights of x0, x_t, yhat and variance of q(x_{t-1} | x_t, x0, yhat) by conditioning a joint Gaussian."""
    a, before, now = SCHEDULE.a[t], SCHEDULE.cumulative[t - 1], SCHEDULE.cumulative[t]
    covariance, marginal, prior = np.sqrt(a) * (1 - before), 1 - now, 1 - before
    gain = covariance / marginal
    on_x0 = np.sqrt(before) - gain * np.sqrt(now)
    on_y = (1 - np.sqrt(before)) - gain * (1 - np.sqrt(now))
    return on_x0, gain, on_y, prior - gain * covariance


def gamma(t: int, printed: bool = False) -> tuple[float, float, float]:
    """gamma_0, gamma_1, gamma_2 of the appendix; printed: main text eq. 15."""
    a, before, now, beta = SCHEDULE.a[t], SCHEDULE.cumulative[t - 1], SCHEDULE.cumulative[t], SCHEDULE.beta[t]
    first = np.sqrt(a if printed else now) - 1
    g2 = 1 + first * (np.sqrt(a) + np.sqrt(before)) / (1 - now)
    return beta * np.sqrt(before) / (1 - now), (1 - before) * np.sqrt(a) / (1 - now), g2


def test_posterior_is_the_conditioned_gaussian_and_its_weights_sum_to_one() -> None:
    for t in range(1, 1001):
        g, brute = gamma(t), posterior(t)
        np.testing.assert_allclose(g, brute[:3], atol=1e-10)
        assert abs(sum(g) - 1) < 1e-10
        assert abs(SCHEDULE.posterior_variance(np.array(t)) - brute[3]) < 1e-12


def test_printed_gamma2_is_wrong() -> None:
    wrong = [gamma(t, printed=True) for t in range(2, 1001)]
    assert max(abs(sum(g) - 1) for g in wrong) > 0.5
    assert max(abs(g[2] - posterior(t)[2]) for t, g in enumerate(wrong, 2)) > 0.5


def step(u: Tensor, net: Tensor, row: np.ndarray, noise: Tensor) -> tuple[Tensor, Tensor]:
    return Update()(u, net, torch.from_numpy(row)[None], noise)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_step_engine_is_card_in_x(prediction: str) -> None:
    """The step in u, shifted by yhat, is Algorithm 2 in x with the appendix's posterior and sqrt(btilde) noise."""
    config = small_config(diffusion={"prediction": prediction, "clip": 1e9})
    rows = coefficients(find_sampler(config, "ddpm1000"), config)
    shape = (1, 3, 2, 2)
    u, yhat, net, noise = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    for k in (0, 300, 700, 990, 999):
        t = 1000 - k
        root, rest = np.sqrt(SCHEDULE.cumulative[t]), np.sqrt(1 - SCHEDULE.cumulative[t])
        eps = net if prediction == "eps" else rest * u + root * net
        x = u + yhat
        x0 = (x - (1 - root) * yhat - rest * eps) / root
        g0, g1, g2 = gamma(t)
        expected = g0 * x0 + g1 * x + g2 * yhat + np.sqrt(SCHEDULE.posterior_variance(np.array(t))) * noise
        u_next, u0 = step(u, net, rows[k], noise)
        torch.testing.assert_close(u_next + yhat, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(u0 + yhat, x0, rtol=1e-9, atol=1e-9)
        printed = (x - (1 - root) * yhat - rest * eps) / root**2  # 1/alpha without the root
        if t > 500:
            assert (u0 + yhat - printed).abs().max() > 1


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_perfect_prediction_gives_back_u0_and_eps(prediction: str) -> None:
    """What training aims at is what the step engine reads, for every call of a sampler."""
    config = small_config(diffusion={"prediction": prediction, "clip": 1e9})
    sampler = find_sampler(config, "ddim10")
    u0, eps = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64)
    after = (*sampler.times[1:], 0)
    for t, s, row in zip(sampler.times, after, coefficients(sampler, config), strict=True):
        signal, spread = (torch.tensor(f(SCHEDULE.cumulative[t])) for f in (np.sqrt, lambda a: np.sqrt(1 - a)))
        u = signal * u0 + spread * eps
        u_next, found = step(u, prediction_target(prediction, signal, spread, u0, eps), row, torch.zeros_like(u))
        torch.testing.assert_close(found, u0, rtol=1e-8, atol=1e-8)
        expected = np.sqrt(SCHEDULE.cumulative[s]) * u0 + np.sqrt(1 - SCHEDULE.cumulative[s]) * eps
        torch.testing.assert_close(u_next, expected, rtol=1e-7, atol=1e-7)


def test_last_step_adds_no_noise_and_every_sampler_ends_at_u0() -> None:
    config = small_config()
    for sampler in samplers(config).values():
        row = coefficients(sampler, config)[-1]
        u, net, noise = (torch.randn(1, 3, 2, 2, dtype=torch.float64) for _ in range(3))
        u_next, u0 = step(u, net, row, noise)
        torch.testing.assert_close(u_next, u0, rtol=0, atol=1e-7)


def test_ddim_over_all_steps_with_posterior_noise_is_ddpm() -> None:
    """Same coefficients: DDIM with sigma^2 = btilde has direction sqrt(1 - A_s - sigma^2), which is DDPM's mean."""
    config = small_config(diffusion={"clip": 1e9})
    rows = coefficients(find_sampler(config, "ddpm1000"), config)
    u, u0 = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64)
    for k in (0, 500, 990):
        t = 1000 - k
        before, now = SCHEDULE.cumulative[t - 1], SCHEDULE.cumulative[t]
        mean = (
            np.sqrt(before) * SCHEDULE.beta[t] / (1 - now) * u0 + np.sqrt(SCHEDULE.a[t]) * (1 - before) / (1 - now) * u
        )
        eps = (u - np.sqrt(now) * u0) / np.sqrt(1 - now)
        torch.testing.assert_close(rows[k][2] * u0 + rows[k][3] * eps, mean, rtol=1e-9, atol=1e-9)
        assert abs(rows[k][4] ** 2 - SCHEDULE.posterior_variance(np.array(t))) < 1e-12


def test_clip_bounds_the_estimate() -> None:
    config = small_config()
    row = coefficients(find_sampler(config, "ddim10"), config)[0]
    _, u0 = step(torch.full((1, 1, 2, 2), 1e3).double(), torch.zeros(1, 1, 2, 2).double(), row, torch.zeros(1).double())
    assert u0.abs().max() <= config.diffusion.clip


def test_sampler_times() -> None:
    config = small_config()
    assert find_sampler(config, "ddim10").times == (1000, 810, 640, 490, 360, 250, 160, 90, 40, 10)
    assert find_sampler(config, "ddim10_t400").times == (400, 324, 256, 196, 144, 100, 64, 36, 16, 4)
    assert find_sampler(config, "ddpm1000").times == tuple(range(1000, 0, -1))
    assert find_sampler(config, "restore") == Sampler("restore", (300,), start="input")
    for sampler in samplers(config).values():
        assert list(sampler.times) == sorted(set(sampler.times), reverse=True)
    with pytest.raises(ConfigError, match="unknown sampler"):
        find_sampler(config, "euler")


def test_rolled_noise_never_repeats_at_a_position() -> None:
    noise = torch.randn(1, 152, 14, 14)
    seen = [noise[0, 3, 5, 6]]
    for _ in range(999):
        noise = roll(noise)
        seen.append(noise[0, 3, 5, 6])
    assert len(set(torch.stack(seen).tolist())) == 1000
