"""A bundle for a new product from any bundle of the same method: same engines, new state, provisional thresholds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import DIGEST, MANIFEST, Bundle, hash_file, write_manifest
from ..bundlefiles import new_bundle
from ..engine.base import Backend
from ..errors import ConfigError
from ..fingerprint import image_hash, pack
from ..manifest import Crop, FileEntry, Manifest, State, Threshold
from ..newest import export_time
from ..program import Program
from ..wiring import check, programs
from .bank import Bank, BankSettings, build_bank, fill, principal
from .distinct import alike, distinct
from .features import FeatureExtractor, memory_of
from .navigator import NavigatorSettings, enroll_navigator
from .shipped import write_gate, write_golden
from .support import Support

Array = NDArray[Any]
STATE_FILE = "state/enrolled.npz"


@dataclass(frozen=True)
class Product:
    """A product's rows of the method's state, and the bank they came from."""

    state: Mapping[str, Array]
    bank: Bank


def enroll_product(manifest: Manifest, patches: Sequence[Array], masks: Sequence[Array], seed: int = 0) -> Product:
    """New state of one product; what the support does not determine stays as the bundle has it.

    patches: per support image raw features [m, c]; masks: per image [m] bool foreground.

    Raises:
        CalibrationError: the support does not make a memory.
    """
    memory, constants = manifest.memory, manifest.constants
    if memory is None:
        raise ConfigError("this method keeps no memory", found=manifest.method, expected="knn or foct")
    settings = BankSettings(memory.semantic_rows, constants.get("alpha", 1.0), constants.get("beta", 1.0), seed=seed)
    bank = build_bank(patches, masks, settings)
    new: dict[str, Array] = {"center": bank.center}
    if "basis" in manifest.state:
        basis = principal(np.concatenate(patches) - bank.center, manifest.state["basis"].shape[-1])
        patches = [(each - bank.center) @ basis for each in patches]
        zero = np.zeros(basis.shape[1], np.float32)
        bank = Bank(zero, bank.rows @ basis, bank.foreground, bank.image, bank.place)
        new["basis"] = basis
    new |= fill(bank, memory.semantic_rows, memory.episodic_rows)
    if "inv_tau" in manifest.state:
        new |= _navigator(manifest, bank, patches, seed)
    return Product({name: value for name, value in new.items() if name in manifest.state}, bank)


def _navigator(manifest: Manifest, bank: Bank, patches: Sequence[Array], seed: int) -> dict[str, Array]:
    """Projection, temperature and phi_0; the literal navigator's phi_0 is random and stays as it is."""
    c, dims = manifest.constants, manifest.state["projection"].shape[-2]
    if c.get("pair"):
        return {"projection": np.ascontiguousarray(principal(bank.rows, dims).T), "inv_tau": np.ones(1, np.float32)}
    settings = NavigatorSettings(
        dims,
        manifest.state["b1"].shape[-1],
        c["perplexity"],
        int(c["enroll_steps"]),
        c["enroll_lr"],
        c["rho"],
        int(c["stride"]),
        seed,
    )
    found = enroll_navigator(bank, patches, settings)
    return {
        "projection": found.projection,
        "inv_tau": np.array([found.inv_tau], np.float32),
        "w1": found.w1,
        "b1": found.b1,
        "w2": found.w2,
    }


def enroll(source: Bundle, backend: Backend, name: str, support: Support, target: Path) -> Bundle:
    """Write the bundle of product `name` to `target`, with golden, warm and gate set and provisional thresholds.

    Exact copies of another image are left out; report.json names them under `repeated`, and says under `alike` whether
    the pictures differ so little that the thresholds are too strict (distinct.py).

    Raises:
        ConfigError: the target exists, or the source bundle keeps no memory.
        CalibrationError: the support does not make a memory.
    """
    memory_of(source)
    with FeatureExtractor(source, backend) as extract:
        given, support = support.paths, support.only(distinct(support.frames))
        patches = [extract(frame) for frame in support.frames]
        much_alike = alike(support.frames, patches, extract)
    product = enroll_product(source.manifest, patches, list(support.masks))
    with new_bundle(target) as root:
        draft = _write(source, root, target, name, product.state, support.crop)
        thresholds = provisional_thresholds(draft, backend, support, product.bank)
        write_golden(draft, backend, support.frames)
        gate = write_gate(draft, backend, support.frames, thresholds["default"].value)
        report = {
            "enrolled": {
                "product": name,
                "support": [p.name for p in support.paths],
                "repeated": [p.name for p in given if p not in support.paths],
                "alike": much_alike,
                "from": source.id,
            },
            "foreground": support.foreground,
            "rows": len(product.bank.rows),
            "gate": gate,
            "holdout": [],
            "fingerprints": {"support": pack(image_hash(p) for p in given)},
        }
        if support.crop is None and support.picture is not None:
            report["pictures"] = {name: support.picture}  # as training records them
        (root / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        manifest = draft.manifest.model_copy(update={"thresholds": {name: thresholds}, "files": _hashes(root)})
        check(manifest)
        write_manifest(root, manifest)
    return Bundle.load(target)


def _write(
    source: Bundle, root: Path, target: Path, product: str, new: Mapping[str, Array], crop: Crop | None
) -> Bundle:
    """Stages and tables copied, state replaced; the manifest is loadable but its thresholds are still missing."""
    manifest = source.manifest
    siblings = (path.parent for path in target.parent.glob(f"*/{MANIFEST}"))  # a line's * may mean them as well
    copied = {file for stage in manifest.stages.values() for file in stage.files.values()}
    copied |= {table.file for table in manifest.tables.values()}
    for file in copied:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.root / file, root / file)
    arrays, entries = {}, {}
    for key, entry in manifest.state.items():
        value = np.array(source.array(entry))
        fresh = new.get(key)
        if entry.class_bound:
            value = (value[0] if fresh is None else fresh)[None]
        elif fresh is not None:
            value = fresh
        arrays[key] = np.ascontiguousarray(value.astype(entry.dtype, copy=False))
        entries[key] = State.model_validate(
            {**entry.model_dump(), "shape": arrays[key].shape, "file": STATE_FILE, "key": key}
        )
    (root / STATE_FILE).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(root / STATE_FILE, allow_pickle=False, **arrays)
    draft = manifest.model_copy(
        update={
            "name": target.name,
            "created": export_time([source.path, *siblings]).isoformat().replace("+00:00", "Z"),
            "checkpoint_sha256": "",
            "classes": (product,),
            "crops": {} if crop is None else {product: crop},
            "state": entries,
            "thresholds": {},
            "camera_thresholds": {},
            "verification": {"enrolled_from": source.id, **{k: v for k, v in manifest.verification.items()}},
            "licenses": {k: v for k, v in manifest.licenses.items() if not k.startswith("images")},
            "files": _hashes(root),
        }
    )
    check(draft)
    write_manifest(root, draft)
    return Bundle.load(root)


def _hashes(root: Path) -> dict[str, FileEntry]:
    files = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name not in (MANIFEST, DIGEST)):
        digest, size = hash_file(path)
        files[path.relative_to(root).as_posix()] = FileEntry(sha256=digest, bytes=size)
    return files


def provisional_thresholds(
    bundle: Bundle, backend: Backend, support: Support, bank: Bank, margin: float = 1.0
) -> dict[str, Threshold]:
    """Per program the largest score of the support against what it does not know of itself.

    Several images: each against the memory without its own rows. A single one: its mirror images and its half turn
    against the whole memory. Few scores promise little (the largest of k is exceeded by a good part with chance
    1 / (k + 1)), and the record says so; `andon calibrate` with more good images replaces them.
    """
    memory, found = memory_of(bundle), {}
    shots = len(support.frames)
    promise = 1 / (shots + 1)
    for name in programs(bundle.manifest):
        with Program(bundle, backend, "fp32", name) as program:
            valid = program.read_state(memory.valid)
            scores, peaks = [], []
            for frame, keep in _left_out(support, bank, valid):
                program.reset()
                program.write_state(memory.valid, keep)
                program.frame[...] = frame
                result = program.run(0)
                scores.append(result.score)
                peaks.append(float(result.map.max()))
            program.write_state(memory.valid, valid)
        found[name] = Threshold(
            value=margin * max(scores),
            false_alarm_rate=promise,
            samples=shots,
            pixel=margin * max(peaks),
            program=name,
            source=f"provisional, from {shots} support image{'s' * (shots > 1)}, {datetime.now(timezone.utc):%Y-%m-%d}",
        )
    return found


def _left_out(support: Support, bank: Bank, valid: Array) -> Iterator[tuple[Array, Array]]:
    """(frame, valid rows) pairs, see :func:`provisional_thresholds`."""
    if len(support.frames) == 1:
        frame = support.frames[0]
        for turned in (frame[:, ::-1], frame[::-1], frame[::-1, ::-1]):
            yield turned, valid
        return
    for index, frame in enumerate(support.frames):
        keep = valid.copy()
        keep[: len(bank.image)][bank.image == index] = 0.0
        if keep.any():
            yield frame, keep
