"""The HTML page around charts, tables and pictures: one file, no script, no network, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files


def page(title: str, lead: str, body: Iterable[str]) -> str:
    """A whole HTML document. `title` and `lead` are escaped, `body` is HTML made by the other functions here."""
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main><h1>{escape(title)}</h1>"
        f'<p class="lead">{escape(lead)}</p>{"".join(body)}</main></body></html>'
    )


def section(title: str, *content: str) -> str:
    """A heading and what belongs under it."""
    return f"<h2>{escape(title)}</h2>{''.join(content)}"


def cards(items: Sequence[tuple[str, str]]) -> str:
    """Titled boxes side by side; the second of each pair is HTML."""
    return (
        '<div class="grid2">' + "".join(f'<div class="card"><h3>{escape(t)}</h3>{h}</div>' for t, h in items) + "</div>"
    )


def tiles(items: Sequence[tuple[str, str]]) -> str:
    """Key figures: (value, caption)."""
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(c)}</span></div>' for v, c in items)
        + "</div>"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; floats are shown with four digits, None as a dash."""

    def cell(value: object) -> str:
        if value is None:
            return "–"
        return escape(f"{value:.4g}" if isinstance(value, float) else str(value))

    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    lines = "".join("<tr>" + "".join(f"<td>{cell(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def facts(items: Iterable[tuple[str, str]]) -> str:
    """A table of what and value, whose values may be long: they wrap."""
    rows = "".join(f"<tr><th>{escape(what)}</th><td>{escape(value)}</td></tr>" for what, value in items)
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def note(text: str) -> str:
    """A paragraph that says what the figures beside it are of."""
    return f'<p class="lead">{escape(text)}</p>'


def legend(items: Sequence[tuple[str, str]]) -> str:
    """What the colours mean: (CSS colour variable, text); a colour and its text stay on one line."""
    shown = "".join(f'<span><i style="background:var({colour})"></i>{escape(text)}</span>' for colour, text in items)
    return f'<p class="legend">{shown}</p>'


def figure(image: str, caption: str) -> str:
    """A picture (data URI or relative path) with an HTML caption."""
    return f'<figure><img src="{image}" loading="lazy" alt=""><figcaption>{caption}</figcaption></figure>'


LEGEND = legend([("--good", "good parts"), ("--bad", "defective parts")])
ERRORS = legend([("--good", "good parts called NG"), ("--bad", "defects missed")])
