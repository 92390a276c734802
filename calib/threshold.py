"""Decision thresholds from scores of good parts alone, with the false-alarm rate they promise.

Split conformal: of n exchangeable good scores the ceil((n + 1)(1 - a))-th smallest is exceeded by the next good part
with probability at most a, whatever the score's distribution (Vovk et al.; Angelopoulos and Bates 2021, eq. 1). That
promise is marginal: an average over calibration sets. With a confidence c the rank is raised until the false-alarm rate
of *this* threshold is at most a with probability c over calibration sets (binomial tail, as in Clopper-Pearson; Vovk
2012, prop. 2b).

Several pictures of one part are not exchangeable with those of others. Parts are: each picture weighs one over the
number of its part's, and the threshold is the smallest score that has the weight of that rank at or below it
(hierarchical conformal prediction, Lee, Barber and Willett 2023; Dunn et al. 2022). With one picture each it is the
same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CalibrationError

Array = NDArray[Any]

#: Share of good pixels that lie below the pixel threshold (METHODS.md 0.6)
PIXEL_QUANTILE = 0.999


def rank(samples: int, false_alarm_rate: float, confidence: float | None = None) -> int | None:
    """Which order statistic (1-based) of `samples` good scores keeps the promise; None if no such score does.

    Raises:
        CalibrationError: the rate or the confidence is not between 0 and 1.
    """
    for name, value in (("false-alarm rate", false_alarm_rate), ("confidence", confidence)):
        if value is not None and not 0 < value < 1:
            raise CalibrationError(f"the {name} must lie between 0 and 1", found=value, expected="for example 0.01")
    # (n + 1)(1 - a) rounded up; the nudge keeps products such as 100 * 0.01 whole.
    k = samples + 1 - math.floor((samples + 1) * false_alarm_rate + 1e-9)
    if confidence is not None:
        while k <= samples and _binomial_cdf(k - 1, samples, 1 - false_alarm_rate) < confidence:
            k += 1
    return k if 1 <= k <= samples else None


def samples_needed(false_alarm_rate: float, confidence: float | None = None) -> int:
    """Fewest good images that can promise a false-alarm rate (then the largest score is the threshold)."""
    rank(1, false_alarm_rate, confidence)  # refuses senseless rates
    marginal = math.ceil((1 - false_alarm_rate) / false_alarm_rate - 1e-9)
    if confidence is None:
        return marginal
    return max(marginal, math.ceil(math.log(1 - confidence) / math.log(1 - false_alarm_rate) - 1e-9))


def conformal_threshold(
    scores: Array | Sequence[float],
    false_alarm_rate: float,
    confidence: float | None = None,
    subject: str = "",
    parts: Sequence[str] | None = None,
) -> float:
    """The threshold: a part whose score is *above* it is NG.

    Args:
        scores: [n] image scores of good parts that the model has not been fitted to.
        false_alarm_rate: promised upper bound on the share of good parts judged NG.
        confidence: None for the marginal promise, else the probability that the bound holds for this threshold.
        subject: product name, for the message.
        parts: [n] the part that each score is of, where some show the same one; pictures of a part are not independent,
            so the number of parts is what counts, and each part's pictures share its weight. The promise is then about
            a picture of a new part. None: each of its own.

    Raises:
        CalibrationError: too few scores (parts) for the promise (the message says how many are needed and what these
            many can promise), or a score that is not finite.
    """
    values = np.asarray(scores, np.float64).ravel()
    if not np.isfinite(values).all():
        raise CalibrationError(
            f"{_about(subject)}a good image has a score that is not a number",
            found=f"{int((~np.isfinite(values)).sum())} of {len(values)}",
            expected="finite scores",
            next_step="andon verify --bundle BUNDLE",
        )
    names, which = np.unique(np.arange(len(values)) if parts is None else np.asarray(parts), return_inverse=True)
    k = rank(len(names), false_alarm_rate, confidence)
    if k is None:
        needed = samples_needed(false_alarm_rate, confidence)
        sure = "" if confidence is None else f" with confidence {confidence:g}"
        raise CalibrationError(
            f"{_about(subject)}too few good images for a false-alarm rate of {false_alarm_rate:g}{sure}",
            found=f"{len(values)} images" + ("" if parts is None else f" of {len(names)} parts"),
            expected=f"at least {needed}" + ("" if parts is None else " parts"),
            next_step=_less(len(names), confidence) or f"take {needed} images of good parts",
        )
    order = np.argsort(values, kind="stable")
    shares = 1 / np.bincount(which)
    below = np.cumsum(shares[which[order]])  # how many parts lie at or below each score
    return float(values[order][np.searchsorted(below, k - 1e-9)])


def achievable_rate(samples: int, confidence: float | None = None) -> float | None:
    """The lowest false-alarm rate that so many good images can promise; None for no images."""
    if samples < 1:
        return None
    marginal = 1 / (samples + 1)  # asked for with a confidence, too
    return marginal if confidence is None else max(marginal, 1 - (1 - confidence) ** (1 / samples))


def promised_rate(samples: int, confidence: float | None = None) -> float | None:
    """The false-alarm rate to ask for with so many good images: the achievable one, rounded up to be typed.

    None where it would be above a half, which is no threshold to work with.
    """
    rate = achievable_rate(samples, confidence)
    return None if rate is None or rate > 0.5 else math.ceil(rate * 1e3 - 1e-9) / 1e3


def stricter(samples: int, false_alarm_rate: float) -> tuple[float, float] | None:
    """What so many good images promise (marginally) when asked for a rate, if it is less than 4/5 of it.

    The threshold is one of their scores, so their promises are multiples of 1/(samples + 1): 25 images keep 5 % with
    3.8 %, and 39 with 5 %. To leave images out until it fits would give a threshold that scatters more.

    Returns:
        That rate, and the lowest one above what was asked, rounded up to be typed. None: it is near what was asked,
        they cannot promise that at all, or the next is above a half.
    """
    k = rank(samples, false_alarm_rate)
    if k is None or samples + 1 - k > 0.8 * (samples + 1) * false_alarm_rate:
        return None
    following = math.ceil((samples + 2 - k) / (samples + 1) * 1e4 - 1e-9) / 1e4
    return None if following > 0.5 else ((samples + 1 - k) / (samples + 1), following)


def chance_of_as_many(
    false_alarms: int, parts: int, samples: int, false_alarm_rate: float, confidence: float | None = None
) -> float:
    """Probability that `false_alarms` or more of `parts` good parts lie above the threshold set on `samples` others.

    Exact if all of them are alike (exchangeable, no ties), whatever the score's distribution: the number above the k-th
    smallest of n scores is negative hypergeometric. A tiny value says that the parts are not like those of the
    calibration; the promise was about parts that are.

    Raises:
        CalibrationError: so many samples cannot promise this rate.
    """
    k = rank(samples, false_alarm_rate, confidence)
    if k is None:
        raise CalibrationError(
            f"{samples} good scores cannot promise a false-alarm rate of {false_alarm_rate}",
            found=samples,
            expected=f"at least {samples_needed(false_alarm_rate, confidence)}",
        )
    above, every = samples - k, _log_choose(samples + parts, parts)
    logs = [
        _log_choose(m + above, m) + _log_choose(parts - m + k - 1, k - 1) - every
        for m in range(false_alarms, parts + 1)
    ]
    return min(1.0, sum(map(math.exp, logs)))


class PixelQuantile:
    """Map value that a share `quantile` of the pixels of good parts stays below, from one map after the other.

    Only the values that may lie above it are kept: all maps of thousands of images would be gigabytes.

    pixels: at least as many as all maps will have together.
    """

    def __init__(self, pixels: int, quantile: float = PIXEL_QUANTILE):
        self._quantile = quantile
        self._keep = pixels - self._place(pixels)[0]
        self._top = np.empty(0, np.float32)
        self._seen = 0

    def add(self, values: Array) -> None:
        """A map [h, w] of a good part; it is not kept."""
        self._seen += values.size
        joined = np.concatenate([self._top, np.asarray(values, np.float32).ravel()])
        least = len(joined) - self._keep
        self._top = np.partition(joined, least)[least:].copy() if least > 0 else joined

    def value(self) -> float:
        """The quantile of all maps that were added.

        Raises:
            CalibrationError: there is none.
        """
        if not self._seen:
            raise CalibrationError("no maps to set a pixel threshold from", found=0, expected="at least one good image")
        place, part = self._place(self._seen)
        ordered = np.sort(self._top)[place - self._seen + len(self._top) :][:2]
        return float(np.quantile(ordered, part if len(ordered) > 1 else 0.0))

    def _place(self, pixels: int) -> tuple[int, float]:
        """Where the quantile of so many sorted values lies: after which, and how far on to the next."""
        exact = self._quantile * (pixels - 1)
        return int(exact), exact - int(exact)


def _about(subject: str) -> str:
    return f"product {subject}: " if subject else ""


def _less(samples: int, confidence: float | None) -> str:
    if (rate := promised_rate(samples, confidence)) is None:
        return ""
    return f"--false-alarm-rate {rate:g} is what {samples} images can promise, or give more good images"


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) for X ~ Binomial(n, p), summed in the log domain."""
    logs = [_log_choose(n, i) + i * math.log(p) + (n - i) * math.log1p(-p) for i in range(k + 1)]
    top = max(logs)
    return min(1.0, math.exp(top) * sum(math.exp(x - top) for x in logs))
