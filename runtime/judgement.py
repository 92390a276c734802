"""What the judge gives of a frame, and what it asks of the memory that learns from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .detector import Judgement as Scored
from .program import Program
from .regions import Box
from .types import Frame, Verdict


@dataclass(frozen=True)
class Judgement:
    """A verdict and what it rests on.

    scored: what the detector gave; its arrays are valid until the next frame. None where nothing was scored.
    box: the region of interest that was judged, in camera pixels.
    """

    verdict: Verdict
    scored: Scored | None = None
    box: Box = (0, 0, 0, 0)
    detail: str = ""


class OnlineMemory(Protocol):
    """What the line asks of online calibration (DESIGN.md 5). Everything is called on the judging thread."""

    def unusable(self, product: str) -> str | None:
        """Why frames of this product cannot be judged with the memory as it is; None: they can."""
        ...

    def version(self, product: str) -> int | None:
        """Number of the memory's present version."""
        ...

    def drift(self, camera: str) -> Mapping[str, str]:
        """Products that have drifted at this camera, and how."""
        ...

    @property
    def teaches_first(self) -> bool:
        """Whether a frame teaches before its verdict: the judge then calls :meth:`teach` and scores it again."""
        ...

    def teach(self, program: Program, scored: Scored, label: str, frame: Frame, verdict: str) -> bool:
        """Let the frame just scored teach, if it may; True: the memory has changed."""
        ...

    def after_frame(self, program: Program, judgement: Judgement, frame: Frame) -> None:
        """A frame was judged; now the memory may learn from it, unless it has done so before the verdict."""
        ...

    def command(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """freeze, unfreeze, snapshot, rollback, reference, reset. AndonError when refused."""
        ...

    def describe(self) -> dict[str, Any]:
        """How the memory stands, as plain JSON values."""
        ...

    def close(self) -> None:
        """Write what has to survive."""
        ...


def with_evidence(judgement: Judgement, evidence: str | None) -> Judgement:
    """The judgement with the reference of its picture in the verdict."""
    return replace(judgement, verdict=replace(judgement.verdict, evidence=evidence))
