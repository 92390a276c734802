"""The folder a training run leaves: runs/<method>-<name>-<UTC time>/.

``model.safetensors`` (front end included), ``config.yaml``, ``metrics.json``, ``log.jsonl`` and, written last, so that
its presence means the checkpoint is whole, ``provenance.json``. While training goes on there are also ``run.json``
(how to resume) and ``resume.pt``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..runtime import manifest
from ..runtime.errors import quoted
from .backbones import FROM_CHECKPOINT, backbones_in
from .config import load_config
from .errors import CheckpointError
from .method import AnomalyModel, MethodConfig
from .registry import get_method
from .state import load_state

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
METRICS = "metrics.json"
LOG = "log.jsonl"
PROVENANCE = "provenance.json"


class Provenance(BaseModel):
    """Where a checkpoint comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(description="Method id")
    created: str = Field(description="UTC time of completion, RFC 3339")
    andon: str = Field(description="Version of Andon that wrote it")
    classes: tuple[str, ...] = Field(description="Products, in the order of every class axis")
    backbone: manifest.Backbone | None = Field(default=None, description="Feature extractor, if the method has one")
    data: str = Field(description="Data set as it was given to --data")
    data_path: str = Field(default="", description="Where it was; empty for a set that is no folder (elpv)")
    data_license: str = Field(default="", description="Licence of the images, if known")
    holdout: tuple[str, ...] = Field(description="Keys of the good images kept for thresholds alone")
    constants: tuple[str, ...] = Field(default=(), description="Keys of the good images that set the constants only")
    fingerprints: dict[str, str] = Field(
        default={},
        description="Contents of the images by use: fitted, constants, thresholds, skipped (runtime/fingerprint.py)",
    )
    parts: tuple[str, ...] = Field(
        default=(), description="Contents of the images kept for thresholds, of each part that several of them show"
    )
    crops: dict[str, manifest.Crop] = Field(
        default={}, description="Product -> what was cut out of its pictures (andon train --roi)"
    )
    pictures: dict[str, tuple[int, int]] = Field(
        default={}, description="Product -> width and height of its pictures, of those that nothing was cut out of"
    )
    trained_on: int = Field(description="Good images trained on")
    views: int = Field(default=0, description="Views of them that were added (train/augment.py)")
    skipped: tuple[str, ...] = Field(default=(), description="Sample keys left out because they could not be decoded")
    steps: int = Field(description="Optimisation steps taken")
    seconds: float = Field(description="Training time of the steps")
    processes: int = Field(default=1, description="Number of processes of DistributedDataParallel")
    versions: dict[str, str] = Field(default={}, description="Versions of the libraries used")
    weights_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of model.safetensors")


def runs_root() -> Path:
    """Where runs are kept: $ANDON_RUNS, or runs in the working directory."""
    return Path(os.environ.get("ANDON_RUNS") or "runs")


def new_run(method: str, name: str, root: Path | None = None) -> Path:
    """Make the folder of a new run, named by method, preset or data set, and time."""
    stem = f"{method}-{name}-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        folder = (root or runs_root()) / f"{stem}{suffix}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise CheckpointError(f"cannot make a folder for the run {stem}", next_step="try again in a second")


def save_weights(model: AnomalyModel, folder: Path) -> str:
    """Write model.safetensors atomically; returns its SHA-256."""
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    part = folder / f"{WEIGHTS}.part"
    save_file(state, part)
    digest = file_hash(part)
    part.replace(folder / WEIGHTS)
    return digest


def save_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_provenance(folder: Path) -> Provenance:
    """The provenance of a complete checkpoint.

    Raises:
        CheckpointError: the folder is no complete checkpoint.
    """
    path = folder / PROVENANCE
    try:
        return Provenance.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        resumable = (folder / "run.json").is_file()
        found = "no such folder" if not folder.is_dir() else f"no {PROVENANCE}"
        if (folder / "manifest.json").is_file():
            found = f"a bundle, which is exported already: {found}"
        raise CheckpointError(
            f"{folder} is not a complete checkpoint",
            found="an unfinished run" if resumable else found,
            expected=f"{WEIGHTS}, {CONFIG} and {PROVENANCE}",
            next_step=f"andon train --resume {quoted(folder)}" if resumable else "andon train --method METHOD",
        ) from error
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged", found=str(error), next_step="train again") from error


def newest_checkpoint(method: str, root: Path | None = None) -> Path:
    """The folder of the checkpoint of `method` that was completed last.

    A damaged one is passed over with a warning: whose it was cannot be read, and it must not be in the way of others.

    Raises:
        CheckpointError: there is none.
    """
    root = root or runs_root()
    found = []
    for path in root.glob(f"*/{PROVENANCE}"):
        try:
            provenance = read_provenance(path.parent)
        except CheckpointError as error:
            log.warning("passed over: %s", error.what)
            continue
        if provenance.method == method:
            found.append((provenance.created, path.parent.name, path.parent))
    if not found:
        raise CheckpointError(
            f"no checkpoint of {method} under {root}",
            found=(", ".join(sorted(p.name for p in root.iterdir())) or "nothing")
            if root.is_dir()
            else "no such folder",
            expected=f"a folder that `andon train --method {method}` completed",
            next_step=f"andon train --method {method} --data elpv, or name a checkpoint folder",
        )
    return max(found)[2]


def load_checkpoint(folder: str | Path) -> AnomalyModel:
    """The trained model of a checkpoint, in eval mode on the CPU; nothing is downloaded.

    Raises:
        CheckpointError: incomplete, altered since it was written, or its weights do not fit the model.
    """
    folder = Path(folder)
    provenance = read_provenance(folder)
    weights = folder / WEIGHTS
    if not weights.is_file() or file_hash(weights) != provenance.weights_sha256:
        raise CheckpointError(
            f"{weights} is not the file that training wrote",
            found="no such file" if not weights.is_file() else f"SHA-256 {file_hash(weights)[:12]}...",
            expected=f"SHA-256 {provenance.weights_sha256[:12]}...",
            next_step="copy the checkpoint again, or train again",
        )
    config = load_config(provenance.method, folder / CONFIG)
    model = _blank(config, provenance.classes)
    try:
        load_state(model, load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{weights} does not fit the method {provenance.method} of this version",
            found=str(error)[:600],
            expected=f"a checkpoint of Andon {provenance.andon}",
            next_step="train again",
        ) from error
    if provenance.backbone is not None:
        for backbone in backbones_in(model):
            backbone.record = provenance.backbone
    return model.eval()


def _blank(config: MethodConfig, classes: tuple[str, ...]) -> AnomalyModel:
    """The architecture alone; its backbone's weights and normalisation are in the checkpoint too."""
    backbone = config.backbone.model_copy(update={"weights": FROM_CHECKPOINT})
    model = get_method(config.method).build(config.model_copy(update={"backbone": backbone}), classes)
    model.config = config
    return model


def write_log(folder: Path, record: Mapping[str, float]) -> None:
    """Append a record to log.jsonl; a number that is not finite is written as null."""
    clean = {k: v if v == v and abs(v) != float("inf") else None for k, v in record.items()}
    with (folder / LOG).open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(clean) + "\n")
