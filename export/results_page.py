"""docs/results.md from the records of docs/results.json: nothing on the page is typed by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from ..runtime.results import Record

QUALITY = {"image_AUROC": "image AUROC", "pixel_AUROC": "pixel AUROC", "pixel_AUPRO": "AUPRO (0.3)", "F1_max": "F1-max"}
COST = {"parameters": "parameters", "state_elements": "state", "GMAC": "GMAC a frame", "cpu_ms": "CPU ms a frame"}
HEAD = """# Results

Written from [results.json](results.json) by `andon eval --all`; every record there carries the command that trained or
evaluated it. Edge presets (`configs/edge`) on 2 cores of a Xeon with AVX-512, no GPU, one model for all products of a
set; mean ± standard deviation over seeds (one seed where none is given), always the last checkpoint. How the settings
were chosen is said in short below and in full in [selection.md](selection.md). The sets (elpv from PyPI, magnetic_tile,
cookie, mvtec_screw) keep their own licences. Nothing here was measured on a GPU or a Jetson.
"""


VALIDATION = """# Settings, chosen on validation

Written from the records beside this page by `andon eval --all SETS --validation`. The sets are made by
`python -m measure.validation` (tests/measure) of good *training* images alone: a part held out of training, and the
same images with synthetic defects (pasted patch, scar, smudge, noise), on the part where its background is plain (rows
of earlier code: anywhere in the image). In sets called _large the defects take 4 to 30 % of the image, else at most
3 %; their models are those of the set of that name without it. elpv67 has real cells of uncertain label, in neither
split. Rows called upright have features of the image alone, not the mean over both ways round (backbone.turned), and
of vpdm a map without align_corners; the presets of hgad and vpdm have both since. Rows called turned have the mean
where the preset does not. Rows of hgad called whole density, upright or earlier code are scored with the flow's
log-determinant (score.log_det 1), which its preset has no longer.
No test image was read for this page. A number behind a set's name is the number of training images of a product.
What was chosen, and what else was looked at, is in [selection.md](selection.md).
"""


SELECTION = """# How the settings were chosen

Written from configs/selection.yaml by `andon eval --all`: for every method what was looked at, with figures, what was
taken and what was not, and where figures of the test sets had been seen before. [results.md](results.md) has the test
figures of what was chosen, [validation.md](validation.md) the sets and the rows of most of what was looked at. Figures
without a name are image AUROC / AUPRO, or image AUROC / pixel AUROC / AUPRO, on those sets; pairs on elpv are
mono / poly.
"""


def write_validation(records: Sequence[Record], path: Path) -> Path:
    """Write the page of a study on validation sets: every setting in a row of its own."""
    path.write_text(VALIDATION + "\n" + _quality(records, lambda r: True) + "\n", encoding="utf-8")
    return path


def write_selection(path: Path) -> Path:
    """Write the page that says how the settings were chosen."""
    parts = [SELECTION]
    for method, entry in _read("selection.yaml").items():
        parts.append(f"## {method}\n\n{_plain_text(entry['short'])}\n")
        parts += [f"- **{topic}.** {_plain_text(text)}" for topic, text in entry["looked_at"].items()]
        parts.append("")
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def write_page(records: Sequence[Record], path: Path) -> Path:
    """Write the page, and beside it selection.md, which it refers to; returns its path."""
    write_selection(path.with_name("selection.md"))
    parts = [HEAD, _selection(), _quality(records, _plain), _cost(records), _others(records), _published()]
    path.write_text("\n".join(p for p in parts if p) + "\n", encoding="utf-8")
    return path


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _cell(values: Sequence[float], form: Callable[[float], str] = lambda v: f"{v:.3f}") -> str:
    if not values:
        return "–"
    return form(mean(values)) + (f" ± {form(stdev(values))}" if len(values) > 1 else "")


def _quality(records: Sequence[Record], wanted: Callable[[Record], bool]) -> str:
    """One table a set: methods and products down, metrics across."""
    full = [r for r in records if r["shots"] is None and r["metric"] in QUALITY and wanted(r)]
    out = []
    for name in sorted({r["set"] for r in full}):
        mine = [r for r in full if r["set"] == name]
        metrics = [m for m in QUALITY if any(r["metric"] == m for r in mine)]
        groups: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for r in mine:
            label = f"{r['method']}, {r['setting']}" if r.get("setting") else r["method"]
            groups[label, str(r["product"])][r["metric"]].append(r["value"])
        rows = [
            [*key, *(_cell(values[m]) for m in metrics), str(max(map(len, values.values())))]
            for key, values in sorted(groups.items())
        ]
        out.append(f"## {name}\n\n" + _table(["method", "product", *(QUALITY[m] for m in metrics), "seeds"], rows))
    return "\n".join(out)


def _plain(record: Record) -> bool:
    """Full training sets and their controls; other settings (samplers, online memory) have tables of their own."""
    return record.get("setting") in (None, "untrained backbone") or str(record.get("setting")).startswith("mode=")


def _cost(records: Sequence[Record]) -> str:
    mine = [r for r in records if r["metric"] in COST]
    if not mine:
        return ""
    forms: dict[str, Callable[[float], str]] = {
        "parameters": lambda v: f"{v / 1e6:.2f} M", "state_elements": lambda v: f"{v / 1e6:.2f} M",
        "GMAC": lambda v: f"{v:.2f}", "cpu_ms": lambda v: f"{v:.1f}",
    }  # fmt: skip
    rows = []
    for method, name in sorted({(r["method"], r["set"]) for r in mine}):
        values = {
            m: [r["value"] for r in mine if (r["method"], r["set"], r["metric"]) == (method, name, m)] for m in COST
        }
        rows.append([method, name, *(_cell(values[m], forms[m]) for m in COST)])
    note = "Weights in the stages, constants and memory in the state; multiply-accumulates of the default program.\n"
    return "## Cost of a frame\n\n" + note + "\n" + _table(["method", "set", *COST.values()], rows)


def _others(records: Sequence[Record]) -> str:
    """Few shots, online memory, samplers: one table a method and setting family, as recorded."""
    rest = [r for r in records if r["metric"] not in COST and (r["shots"] is not None or not _plain(r))]
    out = []
    for method, family in sorted({(r["method"], _family(r)) for r in rest}):
        mine = [r for r in rest if (r["method"], _family(r)) == (method, family)]
        groups: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for r in mine:
            key = (str(r["set"]), str(r["product"] or "all"), str(r["shots"] or "–"), str(r.get("setting") or ""))
            groups[key][r["metric"]].append(r["value"])
        metrics = sorted({r["metric"] for r in mine})
        rows = [
            [*key, *(_cell(values[m]) for m in metrics), str(max(map(len, values.values())))]
            for key, values in sorted(groups.items())
        ]
        title = f"## {method}: {family}\n\n"
        out.append(title + _table(["set", "product", "shots", "setting", *metrics, "draws"], rows))
    return "\n".join(out)


def _family(record: Record) -> str:
    setting = str(record.get("setting") or "")
    word = setting.split(" ")[0].split("=")[0].rstrip(",:")
    return {"": "few shots", "sampler": "samplers"}.get(word, word)


def _read(name: str) -> dict[str, Any]:
    text = files("andon.configs").joinpath(name).read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def _plain_text(text: str) -> str:
    return " ".join(text.split())


def _selection() -> str:
    """What was looked at, in short: before the figures, since it says how far to believe them."""
    rows = [[name, _plain_text(entry["short"])] for name, entry in _read("selection.yaml").items()]
    return "## How the settings were chosen\n\n" + _table(["method", "in short"], rows)


def _published() -> str:
    table = _read("published.yaml")
    rows = [
        [name, entry["paper"], "; ".join(f"{k} {v}" for k, v in entry["figures"].items()), entry["differs"]]
        for name, entry in table.items()
    ]
    note = "Image / pixel AUROC in percent on the papers' own data sets, and what differs from our protocol.\n"
    return "## What the papers report\n\n" + note + "\n" + _table(["method", "paper", "figures", "what differs"], rows)
