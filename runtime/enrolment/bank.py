"""The semantic memory of a product: which patches of its few good images are kept (METHODS.md 5.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...calib.coreset import greedy_k_center
from ...calib.errors import CalibrationError

Array = NDArray[Any]


@dataclass(frozen=True)
class BankSettings:
    """foreground, background: share of each kind of patch that greedy k-centre keeps (alpha and beta of the paper).

    rows: capacity; more support than fits is thinned in the same proportion. project: dimensions of the JL projection
    that the coreset is chosen in. seed: of that projection.
    """

    rows: int
    foreground: float = 0.10
    background: float = 0.075
    project: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Bank:
    """A filled semantic memory; n rows.

    center: [d] mean of all support patches, subtracted from rows and later from queries.
    rows: [n, d] float32, centred. foreground: [n] float32 of 0 or 1. image: [n] int64 support image of each row;
    place: [n] int64 patch index in that image.
    """

    center: Array
    rows: Array
    foreground: Array
    image: Array
    place: Array


def build_bank(patches: Sequence[Array], masks: Sequence[Array], settings: BankSettings) -> Bank:
    """Choose rows from the support.

    patches: per support image [m, d]; masks: per image [m] bool, True where the part is. Patches are *selected* by
    the mask; multiplying by it (the paper's eq. 3) would fill the memory with zero vectors.

    Raises:
        CalibrationError: no support image, or a mask of another size.
    """
    if not patches or any(mask.shape != (len(p),) for p, mask in zip(patches, masks, strict=True)):
        raise CalibrationError(
            "cannot build a memory from this support",
            found=f"{len(patches)} images",
            expected="at least one image, and a mask value for each of its patches",
            next_step="give --support a folder with good images",
        )
    everything = np.concatenate(patches).astype(np.float32)
    center = everything.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = everything - center
    front = np.concatenate(masks).astype(bool)
    wanted = _counts(int(front.sum()), int((~front).sum()), settings)
    chosen = []
    for group, count in zip((np.flatnonzero(front), np.flatnonzero(~front)), wanted, strict=True):
        if count:
            chosen.append(group[greedy_k_center(centred[group], count, dims=settings.project, seed=settings.seed)])
    index = np.concatenate(chosen)
    image = np.repeat(np.arange(len(patches)), [len(p) for p in patches])
    place = np.concatenate([np.arange(len(p)) for p in patches])
    return Bank(center, centred[index], front[index].astype(np.float32), image[index], place[index])


def _counts(front: int, back: int, settings: BankSettings) -> tuple[int, int]:
    """Rows of each kind: the wanted shares, thinned alike where they exceed the capacity, at least one of a kind."""
    wanted = np.array([front * settings.foreground, back * settings.background])
    wanted *= min(1.0, settings.rows / max(wanted.sum(), 1.0))
    counts = np.floor(wanted).astype(int)
    counts = np.where(np.array([front, back]) > 0, np.maximum(counts, 1), 0)
    return int(counts[0]), int(counts[1])


def fill(bank: Bank, semantic_rows: int, episodic_rows: int) -> dict[str, Array]:
    """The bundle's state arrays: bank [rows, d], valid [rows], foreground [rows] float32; empty rows are zero.

    Raises:
        CalibrationError: more rows than the bundle reserves.
    """
    count = len(bank.rows)
    if count > semantic_rows:
        raise CalibrationError(
            "the semantic memory does not fit the bundle",
            found=f"{count} rows",
            expected=f"at most {semantic_rows}",
            next_step="enroll with fewer shots, or export a bundle with more semantic rows",
        )
    total = semantic_rows + episodic_rows
    rows = np.zeros((total, bank.rows.shape[1]), np.float32)
    valid, front = np.zeros(total, np.float32), np.zeros(total, np.float32)
    rows[:count], valid[:count], front[:count] = bank.rows, 1.0, bank.foreground
    return {"bank": rows, "valid": valid, "foreground": front}


def principal(rows: Array, dims: int) -> Array:
    """The `dims` principal directions of centred rows [n, c] as columns [c, dims], signs fixed."""
    values, vectors = np.linalg.eigh((rows.T @ rows).astype(np.float64))
    basis = vectors[:, np.argsort(-values, kind="stable")[:dims]]
    signs = np.sign(basis[np.abs(basis).argmax(axis=0), np.arange(basis.shape[1])])
    return np.ascontiguousarray(basis * signs, np.float32)
