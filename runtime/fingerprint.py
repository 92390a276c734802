"""Images known again by the bytes of their files, wherever they lie and whatever they are called.

Training and enrolment record which images they saw, and for what; the record travels in the bundle's report.json.
`andon calibrate` records its images with the thresholds it sets, because report.json belongs to the model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .bundle import Bundle
from .dataset import Sample
from .errors import SourceError

REPORT = "report.json"
#: What became of an image, in the words of a count: "3 trained on".
USES = {
    "fitted": "trained on",
    "constants": "that set constants",
    "thresholds": "held out for thresholds",
    "calibrated": "that thresholds were set on",
    "support": "enrolled from",
    "skipped": "that training could not decode",
}
#: Hexadecimal digits of a fingerprint. It is to tell images apart, not to stand up to forgers: two of a million share
#: 64 bits with probability 3e-8, and 10,000 images take 160 KB of report.json. `sha256sum IMAGE | cut -c1-16` gives it.
DIGITS = 16


def image_hash(path: Path) -> str:
    """SHA-256 of an image file's bytes, hexadecimal.

    Raises:
        SourceError: the file cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SourceError(
            f"cannot read {path}: {error.strerror}", next_step="check the path and permissions"
        ) from error


def pack(hashes: Iterable[str]) -> str:
    """Fingerprints of these hashes, sorted and each once, one after the other without a space between."""
    return "".join(sorted({h[:DIGITS] for h in hashes}))


def unpack(text: str) -> frozenset[str]:
    """The fingerprints that :func:`pack` wrote."""
    return frozenset(text[i : i + DIGITS] for i in range(0, len(text), DIGITS))


class Known(NamedTuple):
    """A sample, its fingerprint, and what it was used for before (a key of USES; None: it is new)."""

    sample: Sample
    fingerprint: str
    use: str | None


class Seen:
    """The images that the making of a bundle or its thresholds saw. recorded: use -> packed fingerprints."""

    def __init__(self, recorded: Mapping[str, str]):
        self._uses = {use: unpack(recorded.get(use, "")) for use in USES}

    @classmethod
    def of(cls, bundle: Bundle) -> Seen | None:
        """What the bundle's report and its present thresholds record; None for one made before fingerprints were."""
        recorded = read_report(bundle).get("fingerprints")
        if recorded is None:
            return None
        return cls({**recorded, "calibrated": "".join(t.images for *_, t in bundle.manifest.calibrated())})

    def sort(self, samples: Sequence[Sample]) -> list[Known]:
        """Each sample with what became of its image before; every file is read once.

        An image that was seen for several uses counts for the first of USES.

        Raises:
            SourceError: an image cannot be read.
        """
        prints = [image_hash(s.path)[:DIGITS] for s in samples]
        return [Known(s, p, self._use(p)) for s, p in zip(samples, prints, strict=True)]

    def _use(self, fingerprint: str) -> str | None:
        return next((use for use, known in self._uses.items() if fingerprint in known), None)


def counted(uses: Mapping[str, int]) -> str:
    """Counts by use as text: "60 trained on, 2 that set constants"."""
    return ", ".join(f"{uses[use]} {words}" for use, words in USES.items() if uses.get(use))


def tally(uses: Iterable[str | None]) -> dict[str, int]:
    """How many images of each use, in the order of USES; new ones do not count."""
    numbers = Counter(use for use in uses if use is not None)
    return {use: numbers[use] for use in USES if numbers[use]}


def read_report(bundle: Bundle) -> dict[str, Any]:
    """The bundle's report.json; empty if it has none."""
    if REPORT not in bundle.manifest.files:
        return {}
    report: dict[str, Any] = json.loads((bundle.root / REPORT).read_text(encoding="utf-8"))
    return report
