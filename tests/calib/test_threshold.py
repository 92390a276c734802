"""Thresholds keep what they promise: against scipy, against simulation, and at the edges of the sample size."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from andon.calib.errors import CalibrationError
from andon.calib.threshold import (
    PixelQuantile,
    achievable_rate,
    chance_of_as_many,
    conformal_threshold,
    promised_rate,
    rank,
    samples_needed,
    stricter,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, norm

RATES = st.sampled_from((0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.001))


def test_the_rank_is_the_textbooks() -> None:
    assert rank(99, 0.01) == 99
    assert rank(100, 0.01) == 100
    assert rank(199, 0.01) == 198
    assert rank(98, 0.01) is None
    assert rank(47, 0.05) == 46


@given(rate=RATES, extra=st.integers(0, 500))
def test_the_number_of_images_it_asks_for_is_enough_and_the_fewest(rate: float, extra: int) -> None:
    for confidence in (None, 0.9, 0.99):
        needed = samples_needed(rate, confidence)
        assert rank(needed + extra, rate, confidence) is not None
        assert rank(needed - 1, rate, confidence) is None
        offered = achievable_rate(needed, confidence)
        assert offered is not None and offered <= rate + 1e-12


@given(rate=RATES, samples=st.integers(1, 3000))
def test_the_confident_rank_is_the_smallest_that_the_beta_distribution_allows(rate: float, samples: int) -> None:
    k = rank(samples, rate, 0.95)
    # The k-th smallest of n uniforms is Beta(k, n + 1 - k); the false-alarm rate of that threshold is 1 - it.
    promise = [
        beta.sf(1 - rate, i, samples + 1 - i) >= 0.95 - 1e-12 for i in (k or samples, (k or samples + 1) - 1) if i
    ]
    if k is None:
        assert not promise[0]
    else:
        marginal = rank(samples, rate)
        assert promise[0] and (k == marginal or not promise[1])


def test_good_parts_are_refused_no_more_often_than_promised() -> None:
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(3000):
        scores = rng.standard_t(3, size=60)
        rates.append(float(np.mean(rng.standard_t(3, size=200) > conformal_threshold(scores[:59], 0.05))))
    assert np.mean(rates) == pytest.approx(0.05, abs=0.003)  # (n + 1) a is whole: the promise is tight
    confident = []
    for _ in range(1000):
        threshold = conformal_threshold(rng.uniform(size=150), 0.05, 0.9)
        confident.append(1 - threshold <= 0.05)
    assert 0.88 <= np.mean(confident) <= 0.99


def test_too_few_images_says_how_many_and_what_these_can_promise() -> None:
    with pytest.raises(CalibrationError) as error:
        conformal_threshold(np.arange(47.0), 0.01, subject="mono")
    assert error.value.what.startswith("product mono")
    assert (error.value.found, error.value.expected) == ("47 images", "at least 99")
    assert "--false-alarm-rate 0.021" in str(error.value.next_step)
    assert conformal_threshold(np.arange(47.0), 0.021) == 46.0


def test_the_rate_that_is_named_is_one_that_so_many_images_promise() -> None:
    assert (promised_rate(0), promised_rate(1), promised_rate(3)) == (None, 0.5, 0.25)
    for samples in range(1, 3000):
        rate = promised_rate(samples)
        assert rate is not None and rank(samples, rate) is not None and rate < 1 / (samples + 1) + 0.001, samples


@given(samples=st.integers(1, 300), confidence=st.floats(0.05, 0.99))
def test_the_rate_that_is_named_is_one_that_they_promise_with_any_confidence(samples: int, confidence: float) -> None:
    """Below .63 or so the average is what asks for more images, not the confidence."""
    rate = promised_rate(samples, confidence)
    assert rate is None or rank(samples, rate, confidence) is not None
    assert promised_rate(10, 0.3) == 0.091


def test_what_is_promised_below_what_was_asked_is_known_and_what_is_next() -> None:
    assert [stricter(n, 0.05) for n in (18, 19, 39, 40)] == [None] * 4, "cannot, exactly, exactly, 2 of 41"
    assert stricter(25, 0.05) == (1 / 26, 0.077)
    assert stricter(38, 0.05) == (1 / 39, 0.0513)
    assert stricter(2, 0.5) is None, "two of three is no threshold to work with"


@given(samples=st.integers(1, 3000), rate=RATES)
def test_the_next_rate_takes_the_next_score(samples: int, rate: float) -> None:
    found, k = stricter(samples, rate), rank(samples, rate)
    if found is not None:
        assert k is not None and found[0] == (samples + 1 - k) / (samples + 1) <= 0.8 * rate < rate < found[1]
        assert rank(samples, found[1]) == k - 1


def test_nonsense_is_refused() -> None:
    with pytest.raises(CalibrationError, match="not a number"):
        conformal_threshold([0.0, np.nan], 0.5)
    for rate in (0.0, 1.0, -1.0):
        with pytest.raises(CalibrationError, match="between 0 and 1"):
            conformal_threshold([0.0], rate)


@given(
    seed=st.integers(0, 99),
    count=st.integers(1, 30),
    shape=st.sampled_from(((1, 1), (3, 5), (28, 28))),
    quantile=st.sampled_from((0.5, 0.9, 0.999, 1.0)),
    more=st.sampled_from((0, 1000)),
)
def test_the_pixel_threshold_is_a_quantile_over_all_pixels(
    seed: int, count: int, shape: tuple[int, int], quantile: float, more: int
) -> None:
    maps = np.random.default_rng(seed).gamma(2, size=(count, *shape)).astype(np.float32).round(1)
    running = PixelQuantile(maps.size + more, quantile)
    for one in maps:
        running.add(one)
    assert running.value() == float(np.quantile(maps, quantile))


def test_few_values_are_kept_of_many_maps() -> None:
    """Thousands of maps of a large network are gigabytes."""
    running = PixelQuantile(1000 * 64 * 64)
    tracemalloc.start()
    for seed in range(1000):
        running.add(np.random.default_rng(seed).random((64, 64), np.float32))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6 < 1000 * 64 * 64 * 4 and 0.9985 < running.value() < 0.9995
    with pytest.raises(CalibrationError, match="no maps"):
        PixelQuantile(10).value()


@given(samples=st.integers(19, 200), parts=st.integers(1, 200))
def test_the_chance_of_false_alarms_is_a_distribution_with_the_promised_mean(samples: int, parts: int) -> None:
    """Sum over m >= 1 of P(M >= m) is the mean of M: of n + 1 places for a new part, n + 1 - k are above."""
    chances = [chance_of_as_many(m, parts, samples, 0.05) for m in range(parts + 1)]
    assert chances[0] == pytest.approx(1) and chances == sorted(chances, reverse=True)
    k = rank(samples, 0.05)
    assert k is not None
    assert sum(chances[1:]) == pytest.approx(parts * (samples + 1 - k) / (samples + 1))


def test_the_chance_of_false_alarms_is_what_draws_give() -> None:
    draws = np.random.default_rng(0).random((20_000, 19 + 40))
    thresholds = np.sort(draws[:, :19], axis=1)[:, rank(19, 0.05) - 1]
    counted = (draws[:, 19:] > thresholds[:, None]).sum(1)
    for number in (1, 3, 8):
        assert chance_of_as_many(number, 40, 19, 0.05) == pytest.approx((counted >= number).mean(), abs=0.01)
    with pytest.raises(CalibrationError, match="cannot promise"):
        chance_of_as_many(1, 40, 10, 0.05)


def test_pictures_of_one_part_share_its_weight() -> None:
    """Five parts of one picture, and one of 20 with the highest scores: ten of those are half a part."""
    scores = [1.0, 2, 3, 4, 5, *np.arange(10.0, 30)]
    parts = [*"abcde", *"f" * 20]
    assert conformal_threshold(scores, 1 / 7, parts=parts) == 29
    assert conformal_threshold(scores, 2 / 7, parts=parts) == 5
    rng = np.random.default_rng(0)
    alone = rng.normal(size=60)
    for rate, confidence in ((0.05, None), (0.2, 0.9)):
        single = conformal_threshold(alone, rate, confidence)
        assert conformal_threshold(alone, rate, confidence, parts=[str(i) for i in range(60)]) == single
        thrice = conformal_threshold(np.repeat(alone, 3), rate, confidence, parts=[str(i // 3) for i in range(180)])
        assert thrice == single, "to have each picture three times promises nothing more"
    with pytest.raises(CalibrationError) as error:
        conformal_threshold(scores, 0.1, parts=parts)
    assert (error.value.found, error.value.expected) == ("25 images of 6 parts", "at least 9 parts")


def test_the_promise_about_pictures_of_new_parts_is_kept() -> None:
    """Scores that differ by part more than within one: counted as independent, they promise too much."""
    rng = np.random.default_rng(0)
    sizes, rates, sure = rng.integers(1, 9, 40), [], []
    names = [str(part) for part in np.repeat(np.arange(40), sizes)]
    spread = np.hypot(1, 0.3)
    for _ in range(800):
        own = rng.normal(size=40).repeat(sizes) + 0.3 * rng.normal(size=sizes.sum())
        rates.append(norm.sf(conformal_threshold(own, 0.1, parts=names) / spread))
        sure.append(norm.sf(conformal_threshold(own, 0.1, 0.9, parts=names) / spread) <= 0.1)
    assert np.mean(rates) <= 0.103
    assert np.mean(sure) >= 0.87
