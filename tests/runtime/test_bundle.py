"""A bundle is loaded whole and unchanged, or not at all; every refusal says what to do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from andon.runtime import bundle as module
from andon.runtime.bundle import DIGEST, MANIFEST, Bundle, read_npz, schema
from andon.runtime.engine.onnxruntime import OnnxRuntimeBackend
from andon.runtime.errors import BundleError, ConfigError, EngineError, ProductError
from andon.runtime.manifest import Manifest
from andon.runtime.program import Program

from .bundles import ROOT, MakeBundle, refused, rewrite


def test_it_loads_and_names_itself(make_bundle: MakeBundle) -> None:
    root = make_bundle()
    with Bundle.load(root) as bundle:
        assert bundle.id == hashlib.sha256((root / MANIFEST).read_bytes()).hexdigest()[:12]
        assert bundle.class_index("b") == 1
        with pytest.raises(ProductError, match="unknown product 'c'"):
            bundle.class_index("c")
        with pytest.raises(ConfigError, match="no fp16 variant"):
            bundle.stage_path("encode", "fp16")


def test_a_damaged_digest_is_found(make_bundle: MakeBundle) -> None:
    root = make_bundle()
    (root / DIGEST).write_bytes(b"\xff\xfe" + (root / DIGEST).read_bytes()[2:])
    assert "copy the bundle again" in str(refused(root, "was changed after it was written").next_step)


@pytest.mark.parametrize("name", ["stages/encode.fp32.onnx", "state/w.npz"])
def test_one_changed_byte_is_found(make_bundle: MakeBundle, name: str) -> None:
    root = make_bundle(state={"w": np.ones((2, 2), np.float32)})
    content = bytearray((root / name).read_bytes())
    content[len(content) // 2] ^= 1
    (root / name).write_bytes(content)
    error = refused(root, f"{name} was changed after the bundle was written")
    assert error.found and error.expected and "copy the bundle again" in str(error.next_step)


def test_a_changed_manifest_is_found(make_bundle: MakeBundle) -> None:
    root = make_bundle()
    rewrite(root, lambda m: m.update(name="other"), sign=False)
    refused(root, "manifest.json was changed")


def test_missing_things_are_named(make_bundle: MakeBundle, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "there is no bundle")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is not a bundle")
    root = make_bundle()
    (root / "stages/score.fp32.onnx").unlink()
    refused(root, "the bundle lacks stages/score.fp32.onnx")
    unlisted = make_bundle()
    rewrite(unlisted, lambda m: m["files"].pop("stages/score.fp32.onnx"))
    refused(unlisted, "uses a file it does not list")


def test_another_schema_is_refused(make_bundle: MakeBundle) -> None:
    root = make_bundle()
    rewrite(root, lambda m: m.update(schema="andon.bundle/2", surprise=1))
    error = refused(root, "not a valid manifest")
    assert "schema" in str(error.found) and "surprise" in str(error.found)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.onnx", "a/../../x", "a\\b", "C:x", "./a", "a//b", "", "a\0b"])
def test_a_path_that_leaves_the_directory_is_refused(make_bundle: MakeBundle, path: str) -> None:
    root = make_bundle()

    def change(manifest: dict[str, Any]) -> None:
        manifest["stages"]["encode"]["files"]["fp32"] = path
        manifest["files"][path] = manifest["files"]["stages/encode.fp32.onnx"]

    rewrite(root, change)
    refused(root, "leaves its directory")


def test_a_symbolic_link_is_refused(make_bundle: MakeBundle, tmp_path: Path) -> None:
    root = make_bundle()
    stage = root / "stages/encode.fp32.onnx"
    stage.rename(tmp_path / "elsewhere.onnx")
    stage.symlink_to(tmp_path / "elsewhere.onnx")
    refused(root, "symbolic link")


def test_a_stage_of_other_shapes_is_refused_when_it_is_opened(make_bundle: MakeBundle) -> None:
    root = make_bundle()

    def change(manifest: dict[str, Any]) -> None:
        manifest["stages"]["encode"]["outputs"]["u"]["shape"] = [1, 4]
        manifest["stages"]["score"]["inputs"]["u"]["shape"] = [1, 4]

    rewrite(root, change)
    with Bundle.load(root) as bundle, OnnxRuntimeBackend(threads=1) as backend:
        with pytest.raises(EngineError, match="stage encode: the engine's outputs are not those") as error:
            Program(bundle, backend)
        assert (error.value.found, error.value.expected) == ("u float32[1, 3]", "u float32[1, 4]")


def test_a_stage_that_is_no_model_is_refused_with_onnxruntimes_words(make_bundle: MakeBundle) -> None:
    root = make_bundle()
    stage = root / "stages/encode.fp32.onnx"
    stage.write_bytes(b"not a model")

    def change(manifest: dict[str, Any]) -> None:
        digest, size = module.hash_file(stage)
        manifest["files"]["stages/encode.fp32.onnx"] = {"sha256": digest, "bytes": size}

    rewrite(root, change)
    with (
        Bundle.load(root) as bundle,
        OnnxRuntimeBackend(threads=1) as backend,
        pytest.raises(EngineError, match="cannot open stage encode"),
    ):
        Program(bundle, backend)


def test_pickled_arrays_and_wrong_shapes_are_refused(make_bundle: MakeBundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", values=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BundleError, match=r"bad\.npz cannot be read"):
        read_npz(tmp_path / "bad.npz")
    np.savez_compressed(tmp_path / "bomb.npz", values=np.zeros(1_000_000, np.float32))
    with pytest.raises(BundleError, match="no usable array 'values'"):
        read_npz(tmp_path / "bomb.npz", ("values",), limit=1000)
    root = make_bundle(state={"w": np.ones((2, 2), np.float32)})
    rewrite(root, lambda m: m["state"]["w"].update(shape=[4]))
    with Bundle.load(root) as bundle, pytest.raises(BundleError, match="not what the manifest says"):
        bundle.array(bundle.manifest.state["w"])


# -- schema ------------------------------------------------------------------------------------------------------------


def test_the_published_schema_is_current_and_judges_real_manifests(make_bundle: MakeBundle) -> None:
    published = json.loads((ROOT / "configs/schema/bundle.json").read_text())
    assert published == schema(), "run: python -m andon.runtime.bundle > configs/schema/bundle.json"
    manifest = json.loads((make_bundle() / MANIFEST).read_text())
    validator = jsonschema.Draft202012Validator(published)
    validator.validate(manifest)
    changes: list[dict[str, Any]] = [
        {"schema": "andon.bundle/9"},
        {"unknown": 1},
        {"classes": []},
        {"variants": ["fp8"]},
    ]
    for change in changes:
        assert not validator.is_valid({**manifest, **change}), change


def test_every_manifest_field_is_described() -> None:
    definitions = schema()
    for name, model in {**definitions["$defs"], "Manifest": definitions}.items():
        for key, field in model.get("properties", {}).items():
            assert field.get("description"), f"{name}.{key}"


# -- wiring ------------------------------------------------------------------------------------------------------------

LOOP: dict[str, Any] = {"loop": "encode", "count": 1, "carry": {}, "init": {}, "tables": {"u": "none"}}
WIRING: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("unknown stage decode", lambda m: m["program"].append({"run": "decode"})),
    ("stage encode occurs twice", lambda m: m["program"].append({"run": "encode"})),
    ("no earlier step produces", lambda m: m["program"].reverse()),
    ("reads an unknown state", lambda m: m["stages"]["score"]["inputs"]["u"].update(source="state:u")),
    ("a source in the manifest cannot be read", lambda m: m["stages"]["score"]["inputs"]["u"].update(source="?")),
    ("is a carry but score is run once", lambda m: m["stages"]["score"]["inputs"]["u"].update(source="carry")),
    ("shapes or types differ", lambda m: m["stages"]["score"]["inputs"]["u"].update(dtype="float16")),
    ("from the frame: shapes", lambda m: m["preprocess"].update(height=5)),
    ("does not bind its tables", lambda m: m["program"].__setitem__(1, {**LOOP, "loop": "score"})),
    ("score has no input x to bind", lambda m: m["program"].__setitem__(1, {"run": "score", "inputs": {"x": "frame"}})),
    ("score.u from state:w", lambda m: m["program"].__setitem__(1, {"run": "score", "inputs": {"u": "state:w"}})),
    ("output score must be a stage's", lambda m: m["outputs"].update(score="frame")),
    ("output map", lambda m: m["outputs"].update(map="score.score")),
    ("output logits has the wrong shape", lambda m: m["outputs"].update(logits="encode.u")),
    ("no fp16 file", lambda m: m.update(variants=["fp32", "fp16"])),
    ("wrong leading axis", lambda m: m["state"]["w"].update(class_bound=True)),
    ("program fast:", lambda m: m.update(alternatives={"fast": [{"run": "encode"}]})),
]


@pytest.mark.parametrize(("match", "change"), WIRING, ids=[match for match, _ in WIRING])
def test_a_program_that_does_not_hold_together_is_refused(
    make_bundle: MakeBundle, match: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    root = make_bundle(state={"w": np.ones((3, 2), np.float32)})
    rewrite(root, change)
    error = refused(root, match)
    assert error.found is not None and error.expected is not None and "andon export" in str(error.next_step)


def test_manifest_round_trips(make_bundle: MakeBundle) -> None:
    raw = (make_bundle() / MANIFEST).read_bytes()
    manifest = Manifest.model_validate_json(raw)
    assert Manifest.model_validate_json(manifest.model_dump_json(by_alias=True)) == manifest
