"""Which pictures show one part, by their names or by a table."""

from __future__ import annotations

from pathlib import Path

import pytest
from andon.runtime.dataset import Sample
from andon.runtime.errors import ConfigError
from andon.runtime.groups import absolute, parts_of, several


def sample(key: str, product: str = "nut") -> Sample:
    return Sample(Path("set") / key, key, product, "good", "train")


SAMPLES = [sample(f"nut/train/good/{name}.png") for name in ("s01_a", "s01_b", "s02_a", "t02_a")]


def test_an_expression_finds_the_part_in_the_path() -> None:
    keys = [s.key for s in SAMPLES]
    assert list(parts_of(SAMPLES, r"[st](\d+)_").values()) == ["01", "01", "02", "02"], "what the parentheses hold"
    assert list(parts_of(SAMPLES, r"[st]\d+_").values()) == ["s01_", "s01_", "s02_", "t02_"], "or all of it"
    two = parts_of(SAMPLES, r"/(s)?t?(\d+)_")
    assert two[keys[2]] != two[keys[3]] and two[keys[0]] == two[keys[1]]
    assert several(SAMPLES, parts_of(SAMPLES, r"\d+")) == [SAMPLES[:2], SAMPLES[2:]]
    other = sample("bolt/train/good/s01_a.png", "bolt")
    assert several([SAMPLES[0], other], parts_of([SAMPLES[0], other], r"\d+")) == [], "another product's part"


def test_a_table_names_the_part_of_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "parts.csv"
    lines = ["when,part, image", "1,x,s01_a.png", "2,x,nut/train/good/s01_b.png", "3,y,s02_a.png", "4,z,t02_a.png", "5"]
    table.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    assert list(parts_of(SAMPLES, str(table)).values()) == ["x", "x", "y", "z"]
    monkeypatch.chdir(tmp_path)
    assert absolute("parts.csv") == str(table) and absolute(r"s(\d+)") == r"s(\d+)" and absolute("") == ""


@pytest.mark.parametrize(
    ("how", "content", "what"),
    [
        (r"s(\d+", None, "is not a regular expression"),
        (r"s(\d+)_", None, "does not say which part nut/train/good/t02_a.png shows"),
        ("parts.csv", None, "cannot read parts.csv"),
        ("parts.csv", b"image,serial\ns01_a.png,1\n", "is no table of parts"),
        ("parts.csv", b"", "is no table of parts"),
        ("parts.csv", b"image,part\ns01_a.png,\xff\n", "cannot read parts.csv"),
        (
            "parts.csv",
            b"image,part\ns01_a.png,1\ns01_b.png\ns02_a.png,2\nt02_a.png,2\n",
            "which part nut/train/good/s01_b",
        ),
    ],
)
def test_what_does_not_name_every_part_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, content: bytes | None, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "parts.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=what) as error:
        parts_of(SAMPLES, how)
    assert error.value.expected and error.value.next_step
