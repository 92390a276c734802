"""A model's name: the same for every version of Andon and after every calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from andon.runtime.bundle import Bundle
from andon.runtime.manifest import Manifest
from pydantic import Field

#: A manifest as a station may have it for years, and the names that state of it was written under.
KEPT: dict[str, Any] = {
    "schema": "andon.bundle/1",
    "method": "synthetic",
    "name": "kept",
    "created": "2026-01-01T00:00:00Z",
    "andon": "0",
    "checkpoint_sha256": "",
    "backbone": {"id": "none", "weights": "none", "sha256": ""},
    "preprocess": {"height": 4, "width": 4},
    "classes": ["a"],
    "stages": {
        "score": {
            "files": {"fp32": "score.onnx"},
            "inputs": {"image": {"shape": [1, 4, 4, 3], "dtype": "uint8", "source": "frame"}},
            "outputs": {"score": {"shape": [1], "dtype": "float32"}},
            "opset": 17,
        }
    },
    "variants": ["fp32"],
    "program": [{"run": "score"}],
    "alternatives": {"twice": [{"run": "score"}, {"loop": "score", "count": 1, "carry": {}, "init": {}}]},
    "outputs": {"score": "score.score", "map": "score.map"},
    "memory": {
        "bank": "bank",
        "valid": "valid",
        "semantic_rows": 1,
        "episodic_rows": 2,
        "candidates": "score.features",
        "patch_score": "score.patches",
    },
    "constants": {"lr": 1e-05, "tau": 2},
    "files": {"score.onnx": {"sha256": "0" * 64, "bytes": 7}},
}
FORMER_IDS = ("749aeda46573", "611ce120517a")


def kept(manifest: Manifest) -> Bundle:
    return Bundle(Path(), Path(), manifest, "")


def test_a_models_name_stays_for_every_version_of_andon() -> None:
    """What a line has learnt is bound to it.

    Where this fails, a field came into the manifest: see _LATER_FIELDS of modelid.py, and leave the numbers alone.
    """
    bundle = kept(Manifest.model_validate(KEPT))
    assert (bundle.model_id, *bundle.former_ids) == ("071f0f5e268d", *FORMER_IDS)


def test_a_field_that_says_nothing_is_not_written() -> None:
    """Stations of before it refuse what has it."""
    written = Manifest.model_validate(KEPT).model_dump(by_alias=True)
    assert "crops" not in written and "anchor" not in written["memory"]
    anchored = Manifest.model_validate(KEPT | {"memory": KEPT["memory"] | {"anchor": "score.anchor"}})
    assert anchored.model_dump(by_alias=True)["memory"]["anchor"] == "score.anchor"
    assert kept(anchored).model_id != kept(Manifest.model_validate(KEPT)).model_id


def test_a_new_field_that_is_as_it_is_by_default_makes_no_other_model() -> None:
    class Later(Manifest):
        note: str = Field(default="", description="of a later Andon")

    old, new = Manifest.model_validate(KEPT), Later.model_validate(KEPT)
    written = Later.model_validate_json(new.model_dump_json(by_alias=True))  # as `andon calibrate` writes it
    assert kept(old).model_id == kept(new).model_id == kept(written).model_id
    assert kept(Later.model_validate(KEPT | {"note": "bent"})).model_id != kept(old).model_id
    for change in ({"classes": ["b"]}, {"constants": {"lr": 1e-05, "tau": 3}}, {"files": {}}, {"memory": None}):
        other = kept(Manifest.model_validate(KEPT | change))
        assert not {other.model_id, *other.former_ids} & {kept(old).model_id, *FORMER_IDS}
