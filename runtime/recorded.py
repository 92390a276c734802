"""Verdicts that a line published, held against a labelled data set: the figures of the engines as they ran."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .bundle import Bundle
from .dataset import Sample
from .errors import ConfigError, quoted
from .evaluation import Evaluated, Judged
from .quality import Metrics, mean_metrics, summarize
from .types import Region

#: What is read of a verdict.
_FIELDS = ("id", "part_id", "product", "label", "score", "threshold", "method", "bundle", "ts_judged", "latency_ms")
#: What is read where it is there; the first is 0, or null, of a memory as it was shipped.
_MEMORY, _WHY, _WHERE = "memory_version", "reason", "regions"
#: More seconds than this between two verdicts, and ten times the usual: the line stood still, or the clock was set.
_STOOD = 60.0


@dataclass(frozen=True)
class Origin:
    """Whose verdicts are evaluated. bundles: ids, in order of their first verdict; several after a new calibration."""

    file: Path
    method: str
    bundles: tuple[str, ...]

    def __str__(self) -> str:
        noun = "bundle" if len(self.bundles) == 1 else "bundles"
        return f"verdicts recorded in {self.file} by {noun} {', '.join(self.bundles)} ({self.method})"

    def unlike(self, bundle: Bundle) -> str:
        """What to say where they are not of the bundle that is given beside them; empty where they are."""
        others = [other for other in self.bundles if other != bundle.id]
        if not others:
            return ""
        return (
            f"the verdicts are of bundle {', '.join(others)}, not of the given {bundle.id}: it was calibrated anew "
            "since, or is another model"
        )


def read_verdicts(path: Path, camera: str | None = None) -> list[dict[str, Any]]:
    """Verdicts of a file that `andon watch --out` wrote, first of each id only; of one camera, if it is named.

    Raises:
        ConfigError: the file is missing, a line is not JSON or not a verdict, or there is none.
    """
    if not path.is_file():
        raise ConfigError(f"no verdicts at {path}", next_step=_watch(path))
    verdicts: dict[str, dict[str, Any]] = {}
    others: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            verdict = json.loads(line)
            kept = {field: verdict[field] for field in _FIELDS}
            kept |= {_MEMORY: verdict.get(_MEMORY), _WHY: verdict.get(_WHY), _WHERE: _regions(verdict)}
            if camera is None or camera == verdict["camera"]:
                verdicts.setdefault(verdict["id"], kept)
            else:
                others.add(str(verdict["camera"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} line {number} is not a verdict", found=line[:80], expected="one andon.verdict/1 object a line"
            ) from error
    if not verdicts and others:
        raise ConfigError(
            f"{path} holds no verdict of camera {camera}",
            found=f"verdicts of {', '.join(sorted(others))}",
            expected=f"some of {camera}",
            next_step="name one of these with --camera, or leave it out: all of them",
        )
    if not verdicts:
        raise ConfigError(f"{path} holds no verdict", next_step=_watch(path))
    return list(verdicts.values())


def _watch(path: Path) -> str:
    return f"andon watch --config LINE.yaml --out {quoted(path)}"


def from_verdicts(verdicts: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> Evaluated:
    """Join verdicts with samples by part id (the sample's key without its suffix) and compute what `andon eval` does.

    A sample without a verdict is an error: a part that nobody judged must not look like a good result. Map figures are
    not there, since verdicts carry regions, not maps.

    Raises:
        ConfigError: see :func:`join`.
    """
    chosen = join(verdicts, samples)
    judged = [_judged(sample, verdict) for sample, verdict in zip(samples, chosen, strict=True)]
    thresholds = thresholds_of(chosen, samples)
    products = {
        product: _metrics([j for j in judged if j.sample.product == product], threshold)
        for product, threshold in thresholds.items()
    }
    timed = [v["latency_ms"] for v in chosen if v["latency_ms"]]
    names = dict.fromkeys(name for t in timed for name in t)
    latency = {name: np.array([t[name] for t in timed if name in t]) for name in names}
    without = frozenset(product for product, threshold in thresholds.items() if threshold is None)
    return Evaluated(tuple(judged), products, mean_metrics(products), {}, latency, _seconds(chosen), without)


def decided_by(verdicts: Sequence[dict[str, Any]], thresholds: Mapping[str, float]) -> list[dict[str, Any]]:
    """The verdicts as other thresholds would have decided them; UNKNOWN ones, and products without one, as they are."""
    return [
        {**v, "threshold": limit, "label": "NG" if v["score"] > limit else "OK"}
        if (limit := thresholds.get(v["product"])) is not None and v["label"] != "UNKNOWN" and v["score"] is not None
        else v
        for v in verdicts
    ]


def origin(verdicts: Sequence[dict[str, Any]], samples: Sequence[Sample], file: Path, bundle: Bundle) -> Origin:
    """Whose verdicts those of the samples are.

    Raises:
        ConfigError: they are of another method than the bundle, or see :func:`join`.
    """
    chosen = join(verdicts, samples)
    methods = sorted({str(v["method"]) for v in chosen})
    if methods != [bundle.manifest.method]:
        raise ConfigError(
            f"the verdicts in {file} are not of the bundle's method",
            found=", ".join(methods),
            expected=f"{bundle.manifest.method} (bundle {bundle.id})",
            next_step="give the bundle that the line ran with --bundle",
        )
    return Origin(file, bundle.manifest.method, tuple(dict.fromkeys(str(v["bundle"]) for v in chosen)))


def join(verdicts: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The verdict of each sample, in their order.

    Raises:
        ConfigError: samples and verdicts do not belong together, or not one to one.
    """
    _distinct(samples)
    wanted = {_part_id(s) for s in samples}
    by_part: dict[str, dict[str, Any]] = {}
    for verdict in verdicts:
        part = verdict["part_id"]
        if part in wanted and by_part.setdefault(part, verdict) is not verdict:
            raise ConfigError(
                f"part {part} has several verdicts",
                found=f"{by_part[part]['label']} and {verdict['label']}",
                expected="one verdict a part",
                next_step="if several cameras have seen it, name one with --camera; else record one pass of one camera "
                "over the data set (loop: false), with a new --out",
            )
    missing = [s.key for s in samples if _part_id(s) not in by_part]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(samples)} images have no verdict",
            found=f"none for {', '.join(missing[:3])}",
            expected="a verdict for every image, with its key without suffix as part id",
            next_step="run the line to its end with the same data set and watch it from the start",
        )
    return [by_part[_part_id(s)] for s in samples]


def _part_id(sample: Sample) -> str:
    """What the data set source gives as part id: the key without the file's suffix, and only that (`unit_1.25.png`)."""
    return PurePosixPath(sample.key).with_suffix("").as_posix()


def _distinct(samples: Sequence[Sample]) -> None:
    """Refuse images that differ in their suffix only: their verdicts cannot be told apart."""
    keys: dict[str, str] = {}
    for sample in samples:
        if (other := keys.setdefault(_part_id(sample), sample.key)) != sample.key:
            raise ConfigError(
                "two images share one part id",
                found=f"{other} and {sample.key}: both are part {_part_id(sample)}",
                expected="file names that differ in more than their suffix",
                next_step="rename one of them and run the line again",
            )


def _judged(sample: Sample, verdict: dict[str, Any]) -> Judged:
    score = float("nan") if verdict["score"] is None else float(verdict["score"])
    label = verdict["label"]
    why = str(verdict.get(_WHY) or "") if label == "UNKNOWN" else ""
    where = verdict.get(_WHERE, ()) if label == "NG" else ()  # not of what another threshold makes OK
    found = (label, score, verdict["product"], None, verdict["threshold"])
    return Judged(sample, *found, bool(verdict.get(_MEMORY)), why, where)


def _regions(verdict: dict[str, Any]) -> tuple[Region, ...]:
    return tuple(Region((*r["bbox"],), r["area"], float(r["peak"])) for r in verdict.get(_WHERE) or ())


def thresholds_of(verdicts: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> dict[str, float | None]:
    """What scores were usually held against, of each product of the samples; None where no verdict says it."""
    return {product: _threshold(product, verdicts) for product in sorted({s.product for s in samples})}


def _threshold(product: str, verdicts: Sequence[dict[str, Any]]) -> float | None:
    """The usual threshold of the product: it may have been changed by command in between."""
    seen = Counter(v["threshold"] for v in verdicts if v["product"] == product and v["threshold"] is not None)
    return seen.most_common(1)[0][0] if seen else None


def _metrics(judged: Sequence[Judged], threshold: float | None) -> Metrics:
    """Scores give the AUROC; the error rates are those of the labels as they were published."""
    return summarize(
        [j.score for j in judged],
        [not j.sample.good for j in judged],
        threshold=threshold,
        labels=[j.label for j in judged],
    )


def _seconds(verdicts: Sequence[dict[str, Any]]) -> float:
    """From the first verdict to the last, plus one mean interval: as many intervals as verdicts.

    In the order of judging, which ids tell whatever the clock does. An interval in which it was set (back, or far on),
    or in which the line stood still, says nothing of how fast it judges and is left out.
    """
    ordered = sorted(verdicts, key=lambda v: str(v["id"]))
    moments = [datetime.fromisoformat(v["ts_judged"].replace("Z", "+00:00")) for v in ordered]
    intervals = [(later - earlier).total_seconds() for earlier, later in pairwise(moments)]
    usual = float(np.median([each for each in intervals if each >= 0] or [0.0]))
    kept = [each for each in intervals if 0 <= each <= max(_STOOD, 10 * usual)]
    return float(np.mean(kept or [0.0])) * len(moments) or 1e-9
