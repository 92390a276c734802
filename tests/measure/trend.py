"""Whether something that was sampled over time grows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


@dataclass(frozen=True)
class Trend:
    """A least-squares line: slope per unit of time, and its standard error."""

    slope: float
    error: float


def trend(times: ArrayLike, values: ArrayLike) -> Trend:
    """Least-squares slope of ``values`` over ``times``.

    Memory moves in steps, so neighbouring samples repeat each other and the usual standard error is far too small. It
    is widened by the lag-1 autocorrelation r of the residuals: n samples are worth n (1 - r) / (1 + r)
    (Santer et al. 2000, eq. 6).

    Raises:
        ValueError: fewer than three samples.
    """
    x, y = np.asarray(times, np.float64), np.asarray(values, np.float64)
    if len(x) < 3:
        raise ValueError(f"a trend needs three samples, found {len(x)}")
    line = stats.linregress(x, y)
    residuals = y - (line.intercept + line.slope * x)
    power = float(residuals @ residuals)
    r = float(residuals[1:] @ residuals[:-1]) / power if power > 1e-12 * float(y @ y) else 0.0
    r = min(max(r, 0.0), 0.99)
    return Trend(float(line.slope), float(line.stderr) * ((1 + r) / (1 - r)) ** 0.5)
