"""What an option that may name a product (`--roi`, `--set`, `--pixel`, `--threshold`) says of each product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from .errors import ConfigError, ProductError

T = TypeVar("T")


def by_product(option: str, form: str, given: Sequence[tuple[str, T]], products: Sequence[str]) -> dict[str, T]:
    """What it says of each of these products; of some perhaps nothing.

    form: how it is given for one. given: product and value, '' for all products that have none of their own.

    Raises:
        ProductError: it names another product.
        ConfigError: it says two things of one.
    """
    named = [product for product, _ in given if product]
    if unknown := [product for product in named if product not in products]:
        raise ProductError(
            f"{option} of an unknown product {unknown[0]!r}",
            found=", ".join(unknown),
            expected=", ".join(products),
            next_step=f"name one of these, as {option} {form}, or none: for all",
        )
    if len({product for product, _ in given}) < len(given):
        raise ConfigError(
            f"{option} says twice what is meant",
            found=", ".join(f"{product or 'every product'}: {_plain(value)}" for product, value in given),
            expected="one value for each product, or one for all",
            next_step=f"give {option} once, or once for each product as {option} {form}",
        )
    said = dict(given)
    return {p: said[p if p in said else ""] for p in products if p in said or "" in said}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
