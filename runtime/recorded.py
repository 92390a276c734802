"""Verdicts that a line published, held against a labelled data set: the figures of the engines as they ran."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from .dataset import Sample
from .errors import ConfigError
from .evaluation import Evaluated, Judged
from .quality import Metrics, mean_metrics, summarize


def read_verdicts(path: Path) -> list[dict[str, Any]]:
    """Verdicts of a file that `andon watch --out` wrote, first of each id only.

    Raises:
        ConfigError: the file is missing, a line is not JSON or not a verdict, or there is none.
    """
    if not path.is_file():
        raise ConfigError(f"no verdicts at {path}", next_step=f"andon watch --config <line.yaml> --out {path}")
    verdicts: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            verdict = json.loads(line)
            verdicts.setdefault(verdict["id"], verdict)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} line {number} is not a verdict", found=line[:80], expected="one andon.verdict/1 object a line"
            ) from error
    if not verdicts:
        raise ConfigError(f"{path} holds no verdict", next_step=f"andon watch --config <line.yaml> --out {path}")
    return list(verdicts.values())


def from_verdicts(verdicts: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> Evaluated:
    """Join verdicts with samples by part id (the sample's key) and compute what `andon eval` computes.

    A sample without a verdict is an error: a part that nobody judged must not look like a good result. Map figures are
    not there, since verdicts carry regions, not maps.

    Raises:
        ConfigError: samples and verdicts do not belong together.
    """
    by_part = {_stem(v["part_id"]): v for v in verdicts if v["part_id"]}
    missing = [s.key for s in samples if _stem(s.key) not in by_part]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(samples)} images have no verdict",
            found=f"none for {', '.join(missing[:3])}",
            expected="a verdict for every image, with its key as part id",
            next_step="run the line to its end with the same data set and watch it from the start",
        )
    judged = [_judged(s, by_part[_stem(s.key)]) for s in samples]
    chosen = [by_part[_stem(s.key)] for s in samples]
    products = {
        product: _metrics([j for j in judged if j.sample.product == product], chosen)
        for product in sorted({s.product for s in samples})
    }
    timed = [v["latency_ms"] for v in chosen if v["latency_ms"]]
    names = timed[0] if timed else {}
    latency = {name: np.array([t[name] for t in timed if name in t]) for name in names}
    return Evaluated(tuple(judged), products, mean_metrics(products), {}, latency, _seconds(chosen))


def _stem(part: str) -> str:
    """Key without the file's suffix, which part ids leave out."""
    folder, slash, name = part.rpartition("/")
    return f"{folder}{slash}{name.rsplit('.', 1)[0]}"


def _judged(sample: Sample, verdict: dict[str, Any]) -> Judged:
    score = float("inf") if verdict["score"] is None else float(verdict["score"])
    return Judged(sample, verdict["label"], score, verdict["product"], None)


def _metrics(judged: Sequence[Judged], verdicts: Sequence[dict[str, Any]]) -> Metrics:
    """Scores give the AUROC; the error rates are those of the labels as they were published."""
    product = judged[0].sample.product
    thresholds = Counter(v["threshold"] for v in verdicts if v["product"] == product and v["threshold"] is not None)
    scores = np.minimum([j.score for j in judged], np.finfo(np.float32).max)
    threshold = thresholds.most_common(1)[0][0] if thresholds else None
    metrics = summarize(scores, np.array([not j.sample.good for j in judged]), threshold=threshold)
    good = [j.label == "NG" for j in judged if j.sample.good]
    bad = [j.label == "OK" for j in judged if not j.sample.good]
    metrics["false_alarm_rate"] = float(np.mean(good)) if good else None
    metrics["miss_rate"] = float(np.mean(bad)) if bad else None
    return metrics


def _seconds(verdicts: Sequence[dict[str, Any]]) -> float:
    """From the first verdict to the last, plus one mean interval: as many intervals as verdicts."""
    moments = [datetime.fromisoformat(v["ts_judged"].replace("Z", "+00:00")) for v in verdicts]
    span = (max(moments) - min(moments)).total_seconds()
    return span * len(moments) / max(len(moments) - 1, 1) or 1e-9
