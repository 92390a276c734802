"""Types of numeric options: what a command cannot mean is refused as wrong usage, before any work."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable

from ..diskcache import size_of


def count(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number from 0 on."""
    return _whole(text, 0)


def seconds(text: str) -> float:
    """A finite number from 0 on."""
    return _number(text, lambda value: 0 <= value < math.inf, "0 or more")


def size_bytes(text: str) -> int:
    """A size from 1 byte on, as 500MB or 20GB."""
    value = size_of(text)
    if not value:
        raise ArgumentTypeError(f"{text!r} is no size, as 500MB or 20GB")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, lambda value: 0 <= value <= 1, "from 0 to 1")


def size(text: str) -> tuple[int, int]:
    """Width and height, as 1920x1080."""
    parts = text.split("x")
    if len(parts) != 2:
        raise ArgumentTypeError(f"{text!r} is no size, as 1920x1080")
    return count(parts[0]), count(parts[1])


def counts(text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers from 1 on."""
    return tuple(count(part) for part in text.split(","))


def naturals(text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers from 0 on."""
    return tuple(natural(part) for part in text.split(","))


def shares(text: str) -> tuple[float, ...]:
    """Comma-separated numbers from 0 to 1."""
    return tuple(share(part) for part in text.split(","))


def roi(text: str) -> tuple[int, int, int, int]:
    """A region of interest: x,y,width,height in pixels; in brackets, too, as a line's configuration has it."""
    parts = text.strip().removeprefix("[").removesuffix("]").split(",")
    try:
        x, y, width, height = (int(part) for part in parts)
    except ValueError:
        x = y = width = height = -1
    if min(x, y) < 0 or min(width, height) < 1:
        raise ArgumentTypeError(
            f"{text!r} is no region of interest X,Y,WIDTH,HEIGHT in whole pixels, width and height from 1 on"
        )
    return x, y, width, height


def product_roi(text: str) -> tuple[str, tuple[int, int, int, int]]:
    """A product and its region of interest, PRODUCT=x,y,width,height; without a product that of all."""
    product, _, region = text.rpartition("=")
    return product, roi(region)


def product_value(text: str) -> tuple[str, float]:
    """A product and a finite number, PRODUCT=value; without a product that of all."""
    product, _, value = text.rpartition("=")
    return product, _number(value, math.isfinite, "as 36.9 or PRODUCT=36.9")


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return value


def _number(text: str, fits: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise ArgumentTypeError(f"{text!r} is not a number {expected}")
    return value
