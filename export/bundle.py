"""Writing a bundle: stages, state, golden set, report, manifest; every file hashed, the directory put in place at once.

Layout::

    manifest.json  manifest.sha256  report.json
    stages/<stage>.<variant>.onnx
    state/state.npz  state/tables.npz     arrays by state or table name
    golden/golden.npz   frames uint8 [n, H, W, 3], class_ids int32 [n], score [n], map [n, 1, h, w] and every
                        `<stage>.<output>` [n, *shape] as torch gives them; every frame starts from the shipped state
    golden/warm.npz     where the program carries anything from frame to frame: score [2 n] of the golden frames twice
                        over without a reset, and state.<name> after the last, as torch gives them
    golden/gate.npz     frames, class_ids, labels int32 [n] (1 defective, 0 good, -1 unknown), score [n] of the FP32
                        engines, threshold [classes] float32: what the decision gate of export judged by; logits
                        [n, classes] of a product classifier; score.<program>, threshold.<program> of the alternative
                        programs that were gated

(loading: runtime/bundle.py, replaying: runtime/replay.py)
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .. import __version__
from ..runtime.bundle import DIGEST, MANIFEST, hash_file, write_manifest
from ..runtime.errors import ConfigError
from ..runtime.manifest import (
    SCHEMA,
    Backbone,
    Crop,
    FileEntry,
    Manifest,
    Stage,
    StageInput,
    State,
    Table,
    Tensor,
)
from ..runtime.wiring import check
from .onnx import OPSET, tensor_type
from .stage import StageDef, StagedModel
from .walk import Array

STATE_FILE = "state/state.npz"
TABLE_FILE = "state/tables.npz"
REPORT_FILE = "report.json"
BUNDLES = "ANDON_BUNDLES"


@dataclass(frozen=True)
class Provenance:
    """Where the model came from.

    data: name of the data set, for the bundle's name; empty: the preset's is used.
    holdout: keys of the good training images kept for thresholds; `andon calibrate` reads them.
    constants: keys of those that set the constants, on which no threshold may be set.
    fingerprints: contents of the images by what they were used for (runtime/fingerprint.py).
    parts: the same of the pictures kept for thresholds, of each part that has several.
    group_by: how training told which pictures show one part; `andon eval` counts by it.
    crops: what was cut out of each product's pictures. pictures: the size of those that nothing was cut out of.
    """

    backbone: Backbone
    checkpoint_sha256: str = ""
    data: str = ""
    preset: str = ""
    licenses: Mapping[str, str] = field(default_factory=dict)
    holdout: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    group_by: str = ""
    crops: Mapping[str, Crop] = field(default_factory=dict)
    pictures: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def default_path(method: str, provenance: Provenance) -> Path:
    """``<bundles>/<method>-<data or preset>-<UTC>``; the folder comes from the environment variable ANDON_BUNDLES."""
    about = Path(provenance.data or provenance.preset or "model").name
    clean = "".join(c if c.isalnum() or c in "-_" else "-" for c in about)
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    return Path(os.environ.get(BUNDLES, "bundles")) / f"{method}-{clean}-{stamp}"


def tar_path(bundle: Path) -> Path:
    """Where :func:`pack` packs a bundle directory."""
    return bundle.with_name(bundle.name + ".tar")


def save_stage(root: Path, stage: str, variant: str, model: onnx.ModelProto) -> str:
    """Write a stage's graph without inferred shapes, which readers infer again; returns its bundle-relative path."""
    name = f"stages/{stage}.{variant}.onnx"
    path = root / name
    path.parent.mkdir(exist_ok=True)
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    path.write_bytes(bare.SerializeToString(deterministic=True))
    return name


def save_npz(root: Path, name: str, arrays: Mapping[str, Array]) -> None:
    """Write arrays without pickle, compressed.

    Raises:
        ConfigError: an array is of Python objects.
    """
    for key, array in arrays.items():
        if array.dtype.hasobject:
            raise ConfigError(f"{name}: {key} holds Python objects", found=array.dtype, expected="numbers")
    path = root / name
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **dict(arrays))


def describe_stage(stage: StageDef, model: onnx.ModelProto, file: str) -> Stage:
    """The manifest's entry of a stage that has only its FP32 file so far."""
    inputs = {}
    for info in model.graph.input:
        shape, dtype = tensor_type(info)
        inputs[info.name] = StageInput.model_validate(
            {"shape": shape, "dtype": dtype, "source": stage.inputs[info.name]}
        )
    outputs = {
        info.name: Tensor.model_validate(dict(zip(("shape", "dtype"), tensor_type(info), strict=True)))
        for info in model.graph.output
    }
    return Stage(files={"fp32": file}, inputs=inputs, outputs=outputs, opset=OPSET)


def draft(staged: StagedModel, name: str, provenance: Provenance, stages: Mapping[str, Stage]) -> Manifest:
    """The manifest of a bundle under construction (no files hashed yet), wiring checked.

    Raises:
        BundleError: the cut does not hold together; the message names program, step and tensor.
    """
    manifest = Manifest.model_validate(
        {
            "schema": SCHEMA,
            "method": staged.method,
            "name": name,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "andon": __version__,
            "checkpoint_sha256": provenance.checkpoint_sha256,
            "backbone": provenance.backbone,
            "preprocess": staged.preprocess,
            "classes": staged.classes,
            "crops": dict(provenance.crops),
            "stages": dict(stages),
            "variants": ("fp32",),
            "state": {k: _state(k, v, k in staged.class_bound) for k, v in staged.state.items()},
            "tables": {
                k: Table.model_validate({"shape": v.shape, "dtype": v.dtype.name, "file": TABLE_FILE, "key": k})
                for k, v in staged.tables.items()
            },
            "program": staged.program,
            "alternatives": dict(staged.alternatives),
            "outputs": staged.outputs,
            "memory": staged.memory,
            "constants": dict(staged.constants),
            "licenses": dict(provenance.licenses),
            "files": {},
        }
    )
    check(manifest)
    return manifest


def _state(name: str, array: Array, class_bound: bool) -> State:
    entry = {"shape": array.shape, "dtype": array.dtype.name, "file": STATE_FILE, "key": name}
    return State.model_validate({**entry, "class_bound": class_bound})


def finish(root: Path, manifest: Manifest, report: Mapping[str, Any], summary: Mapping[str, object]) -> Manifest:
    """Write report.json, hash every file and write the manifest. Files that no stage uses are removed first."""
    used = {file for stage in manifest.stages.values() for file in stage.files.values()}
    for path in (root / "stages").iterdir():
        if path.relative_to(root).as_posix() not in used:
            path.unlink()
    (root / REPORT_FILE).write_text(json.dumps(report, indent=1, allow_nan=False, default=_plain) + "\n")
    files = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        if name not in (MANIFEST, DIGEST):
            digest, size = hash_file(path)
            files[name] = FileEntry(sha256=digest, bytes=size)
    manifest = manifest.model_copy(update={"files": files, "verification": dict(summary)})
    check(manifest)
    write_manifest(root, manifest)
    return manifest


def _plain(value: object) -> object:
    """Numpy numbers as Python's; anything else is refused."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} does not belong in report.json")


def variant_bytes(root: Path, manifest: Manifest) -> dict[str, dict[str, int]]:
    """Bytes that each variant takes on the device: stages (backbone and heads), and the whole with state and tables.

    State is float32 in every variant: it is what calibration changes.
    """
    state = {e.file for e in manifest.state.values()} | {e.file for e in manifest.tables.values()}
    shared = sum((root / file).stat().st_size for file in state)
    sizes: dict[str, dict[str, int]] = {}
    for variant in manifest.variants:
        files = {stage.files[variant] for stage in manifest.stages.values()}
        stages = sum((root / file).stat().st_size for file in files)
        sizes[variant] = {"stages": stages, "total": stages + shared}
    return sizes


def pack(bundle: Path) -> Path:
    """Write ``<bundle>.tar`` beside a bundle directory, atomically; the same bundle gives the same bytes."""
    target = tar_path(bundle)
    partial = target.with_name(target.name + ".tmp")

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    try:
        with tarfile.open(partial, "w") as archive:
            for path in sorted(bundle.rglob("*")):
                archive.add(path, path.relative_to(bundle.parent).as_posix(), recursive=False, filter=plain)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target
