"""What `andon export` says to do next, as a command that works as it stands."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..calib.threshold import promised_rate, rank
from ..runtime.bundle import Bundle
from ..runtime.dataset import open_dataset
from ..runtime.errors import AndonError, CalibrationError
from ..runtime.unseen import unseen_good

DEFAULT_RATE = 0.01  # of `andon calibrate`


def calibrate_step(bundle: Path, data: str) -> str:
    """The line that leads to `andon calibrate`, with a false-alarm rate that the images it will take can promise.

    It raises nothing: a set that cannot be looked at any more is no reason to fail an export that is finished.

    Args:
        bundle: what was exported.
        data: the set it was verified on.
    """
    try:
        with Bundle.load(bundle) as loaded:
            unseen = unseen_good(loaded, open_dataset(data))
            return rate_step(bundle, data, min(map(unseen.count, loaded.manifest.classes)))
    except CalibrationError:
        return rate_step(bundle, data, 0)
    except (AndonError, OSError) as error:
        return _new_images(bundle, str(error).partition("\n")[0])


def rate_step(bundle: Path, data: str, images: int) -> str:
    """The same for as many `images` to set thresholds on, of the product that has fewest."""
    rate = promised_rate(images) if rank(images, DEFAULT_RATE) is None else DEFAULT_RATE
    if rate is None:
        return _new_images(bundle, "training kept too few")
    option = "" if rate == DEFAULT_RATE else f" --false-alarm-rate {rate:g}"
    return f"next: {_command(bundle)} --data {shlex.quote(data)}{option}"


def _new_images(bundle: Path, why: str) -> str:
    return f"next, with new good images of every product in FOLDER ({why}): {_command(bundle)} --data FOLDER"


def _command(bundle: Path) -> str:
    return f"andon calibrate --bundle {shlex.quote(str(bundle))}"
