"""Parts that nobody will judge any more: the line stops, or fails, while its engines are not open."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timezone

from .detector import AUTO
from .judgement import Judgement
from .slot import Missed, missed
from .types import Frame, Verdict


@dataclass(frozen=True)
class Unjudged:
    """Makes their verdicts, for which no engine is needed.

    method, bundle: of the bundle that was to judge them.
    """

    method: str
    bundle: str

    def verdict(self, item: Frame | Missed, why: str, identifier: str, expected: str) -> Judgement:
        """UNKNOWN, for its own reason where it has no picture, else engine_error.

        why: said of one with a picture. expected: product that its camera expects, of one that brings none.
        """
        product = item.product or expected
        if isinstance(item, Frame):
            item = missed(item, "engine_error", why)
        verdict = Verdict(
            id=identifier,
            camera=item.camera,
            seq=item.seq,
            ts_capture=item.captured,
            ts_judged=datetime.now(timezone.utc),
            label="UNKNOWN",
            reason=item.reason,
            product=None if product == AUTO else product,
            part_id=item.part_id,
            method=self.method,
            bundle=self.bundle,
            latency_ms={"total": (time.monotonic() - item.monotonic) * 1e3},
        )
        return Judgement(verdict, detail=item.detail)
