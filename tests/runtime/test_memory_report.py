"""The page about the memory: axes that can be read and compared, and nothing broken at the width of a phone."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

import numpy as np
import pytest
from andon.runtime.report.charts import HEIGHT, LEFT, RIGHT, TOP, WIDTH
from andon.runtime.report.memory import Figures, MemoryView, view_section, write_memory_report
from browser import browse


def view() -> MemoryView:
    """A stream whose scores fall from about 50 to about 5, those of anomalies excepted."""
    rng = np.random.default_rng(0)
    frozen = rng.uniform(45, 55, 60)
    anomalous = np.arange(60) % 6 == 0
    online = np.where(anomalous, frozen, frozen * np.linspace(1, 0.1, 60))
    taught = rng.normal(size=(40, 8))
    return MemoryView(
        "a <product>", "of one draw", rng.normal(size=(20, 8)), taught, np.arange(40) < 5, frozen, online, anomalous,
        rng.uniform(0.01, 0.02, 60), np.arange(60) * 10, ["admitted"] * 60, [("0.900", "image AUROC")],
    )  # fmt: skip


def charts() -> dict[str, str]:
    """The SVG by the title of its card."""
    cards = re.findall(r"<h3>([^<]*)</h3>(<svg.*?</svg>)", view_section(view()))
    return {title.replace("&lt;", "<"): svg for title, svg in cards}


def ticks(svg: str, anchor: str) -> dict[str, str]:
    """Value -> its place, of the axis whose numbers are anchored so."""
    found = re.findall(r'class="tick" x="([^"]*)" y="([^"]*)" text-anchor="(\w+)">([^<]*)<', svg)
    return {value: y if anchor == "end" else x for x, y, at, value in found if at == anchor}


def test_every_chart_has_numbers_on_both_axes_and_dots_inside_them() -> None:
    found = charts()
    assert len(found) == 5
    for title, svg in found.items():
        assert len(ticks(svg, "end")) >= 2 and len(ticks(svg, "middle")) >= 2, title
        dots = [tuple(map(float, dot)) for dot in re.findall(r"M([0-9.-]+),([0-9.-]+)h0", svg)]
        assert all(LEFT + 2 < x < WIDTH - RIGHT - 2 and TOP + 2 < y < HEIGHT - 40 for x, y in dots), title


def test_both_charts_of_scores_have_one_range() -> None:
    """Each had its own: that scores fall and those of anomalies stay was not to be seen."""
    frozen, online = (svg for title, svg in charts().items() if title.startswith("Scores"))
    assert ticks(frozen, "end") == ticks(online, "end") and {"20", "40"} <= ticks(frozen, "end").keys()


@pytest.mark.parametrize("width", [390, 700, 1300])
def test_no_item_of_a_legend_is_broken_and_nothing_is_cut_off(width: int, tmp_path: Path) -> None:
    """A colour stood at the end of one line and its text at the beginning of the next."""
    table = Figures("figures", "of all", ["product", "value"], [["a", 0.5]])
    facts = [("command", "andon eval --bundle " + "x" * 300)]
    page = write_memory_report(tmp_path / "page.html", "t", "l", [table], [view()], facts)
    measure = """<script>
        const broken = [...document.querySelectorAll(".legend i")].filter((colour) => {
            const item = document.createRange();
            item.setStartBefore(colour);
            item.setEndAfter(colour.nextSibling);
            const tops = [...item.getClientRects()].map((r) => (r.top + r.bottom) / 2);
            return Math.max(...tops) - Math.min(...tops) > 8;
        }).length;
        const wide = document.documentElement.scrollWidth - window.innerWidth;
        const items = document.querySelectorAll(".legend i").length;
        parent.document.title = `${items} ${broken} ${wide > 0} ${window.innerWidth}`;
    </script></body>"""
    inner = escape(page.read_text().replace("</body>", measure))
    # In a frame, because a window is never as narrow as a phone.
    page.write_text(f'<body><iframe srcdoc="{inner}" style="width:{width}px;height:900px;border:0"></iframe></body>')
    assert f"<title>9 0 false {width}</title>" in browse(page.as_uri(), size="1500,1000")
