"""What `andon export` says to do next, as a command that works as it stands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..calib.threshold import rank
from ..runtime.dataset import open_dataset

DEFAULT_RATE = 0.01  # of `andon calibrate`
_RATES = (DEFAULT_RATE, 0.02, 0.05, 0.1, 0.2, 0.5)


def calibrate_step(bundle: Path, data: str, holdout: Sequence[str], classes: Sequence[str]) -> str:
    """The line that leads to `andon calibrate`, with a false-alarm rate that the images held out can promise.

    Args:
        bundle: what was exported.
        data: the set it was verified on.
        holdout: keys of the good images that training kept for thresholds.
        classes: products, each of which needs enough of them.
    """
    command = f"andon calibrate --bundle {shlex.quote(str(bundle))}"
    keys = set(holdout)
    held = [s.product for s in open_dataset(data).samples if s.key in keys] if keys else []
    fewest = min(held.count(product) for product in classes)
    rate = next((rate for rate in _RATES if rank(fewest, rate) is not None), None)
    if rate is None:
        return f"next, with new good images of every product in FOLDER (training kept too few): {command} --data FOLDER"
    option = "" if rate == DEFAULT_RATE else f" --false-alarm-rate {rate:g}"
    return f"next: {command} --data {shlex.quote(data)}{option}"
