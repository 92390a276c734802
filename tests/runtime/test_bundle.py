"""A bundle is loaded whole and unchanged, or not at all; every refusal says what to do."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from andon.runtime import bundle as module
from andon.runtime import unpack
from andon.runtime.bundle import DIGEST, MANIFEST, Bundle, read_npz, schema
from andon.runtime.engine.onnxruntime import OnnxRuntimeBackend
from andon.runtime.errors import BundleError, ConfigError, EngineError, ProductError
from andon.runtime.manifest import Manifest, Threshold
from andon.runtime.program import Program
from pydantic import Field

MakeBundle = Callable[..., Path]
ROOT = Path(__file__).parents[2]
OPEN = Path.open
THRESHOLD = Threshold(value=1.0, false_alarm_rate=0.05, samples=19)


def rewrite(root: Path, change: Callable[[dict[str, Any]], None], sign: bool = True) -> None:
    """Change the manifest; `sign` makes its hash fit again, so that only the content is wrong."""
    manifest = json.loads((root / MANIFEST).read_text())
    change(manifest)
    raw = json.dumps(manifest).encode()
    (root / MANIFEST).write_bytes(raw)
    if sign:
        (root / DIGEST).write_text(f"{hashlib.sha256(raw).hexdigest()}  {MANIFEST}\n")


def refused(root: Path, match: str) -> BundleError:
    with pytest.raises(BundleError, match=match) as error:
        Bundle.load(root)
    return error.value


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


# -- .tar --------------------------------------------------------------------------------------------------------------


def pack(root: Path, target: Path, prefix: str = "bundle/") -> Path:
    with tarfile.open(target, "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.add(path, prefix + path.relative_to(root).as_posix(), recursive=False)
    return target


@pytest.mark.parametrize("prefix", ["bundle/", "", "./", "knn:v2/", "./a\\b/"])
def test_a_tar_is_unpacked_while_it_is_open(make_bundle: MakeBundle, tmp_path: Path, prefix: str) -> None:
    path = pack(make_bundle(), tmp_path / "b.tar", prefix)
    with Bundle.load(path) as bundle:
        root = bundle.root
        assert bundle.stage_path("encode", "fp32").is_file()
        with pytest.raises(BundleError, match="packed and cannot be changed"):
            bundle.save_thresholds({"a": {"default": THRESHOLD}})
    assert not root.exists()


@pytest.mark.parametrize("packed", ["a head", "zeros for a head", "a stream"])
def test_a_damaged_tar_is_to_be_copied_again(make_bundle: MakeBundle, tmp_path: Path, packed: str) -> None:
    """tarfile takes what it cannot read for the end, and what is missing then looks like no bundle at all."""
    path = pack(make_bundle(), tmp_path / "b.tar")
    raw = path.read_bytes()
    if packed == "a stream":
        raw = gzip.compress(raw)
        raw = raw[: len(raw) // 2] + bytes(200) + raw[len(raw) // 2 + 200 :]
    else:
        with tarfile.open(path) as archive:
            offset = [m.offset for m in archive if m.isfile()][1]
        raw = raw[:offset] + (bytes(512) if packed == "zeros for a head" else b"?" * 512) + raw[offset + 512 :]
    path.write_bytes(raw)
    assert "copy the bundle again" in str(refused(path, r"b\.tar cannot be unpacked").next_step)


def test_a_file_that_is_no_tar_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_text("hello")
    assert str(refused(tmp_path / "b.tar", "cannot be unpacked").found) == "no tar archive"


def member(name: str, **fields: Any) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, io.BytesIO(b"x" * info.size)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (member("../evil", size=1), "leaves its directory"),
        (member("/evil", size=1), "leaves its directory"),
        (member("top:/../../evil", size=1), "leaves its directory"),
        (member("top//evil", size=1), "leaves its directory"),
        (member("top/a:b", size=1), "leaves its directory"),
        (member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "not a plain file"),
        (member("hard", type=tarfile.LNKTYPE, linkname="manifest.json"), "not a plain file"),
        (member("pipe", type=tarfile.FIFOTYPE), "not a plain file"),
        (member("stages/encode.fp32.onnx", size=1), "cannot be unpacked"),  # a second file of the same name
    ],
)
def test_a_hostile_tar_is_refused_and_leaves_nothing(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: Any, match: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    path = pack(make_bundle(), tmp_path / "b.tar", "")
    with tarfile.open(path, "a") as archive:
        archive.addfile(*entry)
    refused(path, match)
    assert list((tmp_path / "temp").iterdir()) == []
    assert not (tmp_path / "evil").exists()


def test_size_limits(make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_bundle()
    path = pack(root, tmp_path / "b.tar")
    for reader, bundle in ((unpack, path), (module, root)):
        monkeypatch.setattr(reader, "MAX_TOTAL_BYTES", 100)
        refused(bundle, "too large")


def test_something_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_bytes(b"hello")
    refused(tmp_path / "b.tar", "cannot be unpacked")


# -- the model's identity ----------------------------------------------------------------------------------------------

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

    Where this fails, a field came into the manifest: see _LATER_FIELDS of bundle.py, and leave the numbers alone.
    """
    bundle = kept(Manifest.model_validate(KEPT))
    assert (bundle.model_id, *bundle.former_ids) == ("071f0f5e268d", *FORMER_IDS)


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


# -- thresholds --------------------------------------------------------------------------------------------------------


def test_thresholds_are_written_back_and_merged(make_bundle: MakeBundle) -> None:
    root = make_bundle()
    before = Bundle.load(root)
    updated = before.save_thresholds({"a": {"default": THRESHOLD}})
    again = Bundle.load(root).save_thresholds({"b": {"default": THRESHOLD}})
    assert again.threshold("a") == again.threshold("b") == THRESHOLD
    assert len({before.id, updated.id, again.id}) == 3
    assert before.model_id == updated.model_id == again.model_id
    assert Bundle.load(root).id == again.id
    with pytest.raises(BundleError, match="unknown product"):
        before.save_thresholds({"c": {"default": THRESHOLD}})
    with pytest.raises(BundleError, match="unknown program"):
        before.save_thresholds({"a": {"fast": THRESHOLD}})


def test_a_crash_while_thresholds_are_written_leaves_a_bundle_that_loads(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace
    for crash_at in range(3):
        root = make_bundle()
        bundle = Bundle.load(root)
        count = 0

        def crash(self: Path, target: Any, crash_at: int = crash_at) -> Path:
            nonlocal count
            count += 1
            if count > crash_at:
                raise KeyboardInterrupt
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            bundle.save_thresholds({"a": {"default": THRESHOLD}})
        monkeypatch.undo()
        assert Bundle.load(root).threshold("a") in (None, THRESHOLD)


def test_two_calibrations_at_once_both_keep_their_thresholds(make_bundle: MakeBundle) -> None:
    root = make_bundle()
    one, other = Bundle.load(root), Bundle.load(root)  # both before the other has written
    one.save_thresholds({"a": {"default": THRESHOLD}})
    kept = other.save_thresholds({"b": {"default": THRESHOLD}})
    assert kept.threshold("a") == kept.threshold("b") == THRESHOLD
    assert Bundle.load(root).id == kept.id


@pytest.mark.parametrize("images", ["", "0123456789abcdef"])
def test_thresholds_of_unrecorded_images_are_written_as_stations_of_before_read_them(
    make_bundle: MakeBundle, images: str
) -> None:
    """They refuse keys that they do not know, and every enrolled bundle had one, empty."""
    root = make_bundle()
    threshold = THRESHOLD.model_copy(update={"images": images})
    Bundle.load(root).save_thresholds({"a": {"default": threshold}})
    written = json.loads((root / MANIFEST).read_text())["thresholds"]["a"]["default"]
    known = {"value", "false_alarm_rate", "confidence", "samples", "pixel", "program", "source"}
    assert set(written) == (known | {"images"} if images else known)
    assert Bundle.load(root).threshold("a") == threshold


SAVE_OFTEN = """
import sys
from andon.runtime.bundle import Bundle
from andon.runtime.manifest import Threshold
root, product = sys.argv[1:]
print("ready", flush=True)
input()
for i in range(40):
    Bundle.load(root).save_thresholds({product: {"default": Threshold(value=i, false_alarm_rate=0.05, samples=19)}})
    assert Bundle.load(root).threshold(product).value == i, "the other process has undone it"
"""


def test_processes_that_save_thresholds_wait_for_each_other(make_bundle: MakeBundle) -> None:
    root = make_bundle()
    before = {path.name for path in root.iterdir()}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE_OFTEN, str(root), product],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for product in ("a", "b")
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    errors = [writer.communicate()[1] for writer in writers]
    assert errors == ["", ""]
    end = Bundle.load(root)
    assert [end.manifest.thresholds[product]["default"].value for product in ("a", "b")] == [39.0, 39.0]
    assert {path.name for path in root.iterdir()} == before


def test_thresholds_of_one_model_are_not_written_into_another(make_bundle: MakeBundle) -> None:
    root = make_bundle()
    loaded = Bundle.load(root)
    rewrite(root, lambda m: m.update(name="exported again"))
    other = (root / MANIFEST).read_bytes()
    with pytest.raises(BundleError, match="replaced by another model"):
        loaded.save_thresholds({"a": {"default": THRESHOLD}})
    assert (root / MANIFEST).read_bytes() == other


def test_a_bundle_that_may_only_be_read_loads_and_is_not_written(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_bundle()

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(f"[Errno 30] Read-only file system: {self}")

    monkeypatch.setattr(Path, "open", lambda self, mode="r", *a, **k: (refuse if "w" in mode else OPEN)(self, mode))
    before = Bundle.load(root)
    with pytest.raises(PermissionError):
        before.save_thresholds({"a": {"default": THRESHOLD}})
    monkeypatch.undo()
    assert Bundle.load(root).id == before.id


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
