"""What training reads: outputs of a frozen front end (or resized images), computed once and memory-mapped.

The cache entry's name is a hash of everything its content depends on: the images' bytes, the code that reads and
resizes them, the preprocessing, the front end's structure, code and weights, and the versions of the libraries
involved. It is written beside its final place and renamed, under a lock, so that a second process waits for the first
and then reads what it made.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from ..runtime.crop import read_image
from ..runtime.dataset import Sample, read_rgb
from ..runtime.diskcache import Lease, code_of, limit, used
from ..runtime.fingerprint import image_hash
from ..runtime.manifest import Preprocess
from ..runtime.preprocess import resize
from ..runtime.regions import cut_out
from .augment import View
from .backbones import state_hash
from .featurecache import INDEX, lease, prune, reserve
from .method import AnomalyModel, Batch

Array = NDArray[Any]
_IMAGES = "images"
_FORMAT = 1


@dataclass(frozen=True)
class FeatureSet:
    """The :class:`TrainingData` of a list of samples; arrays are copy-on-write memory maps.

    features: name -> float32 [N, ...]. images: uint8 [N, H, W, 3], only for methods without a front end.
    class_ids: int64 [N]. lease: keeps the cache entry from being removed. hashes: SHA-256 of each sample's file.
    """

    samples: tuple[Sample, ...]
    features: Mapping[str, Array]
    images: Array | None
    class_ids: Array
    lease: Lease | None = None
    hashes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Array) -> Batch:
        """The samples at `indices` (int64 [B]) as tensors of their own memory."""
        return Batch(
            {k: torch.from_numpy(v[indices]) for k, v in self.features.items()},
            None if self.images is None else torch.from_numpy(self.images[indices]),
            torch.from_numpy(self.class_ids[indices]),
            torch.from_numpy(np.asarray(indices, np.int64)),
        )

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in order, `size` at a time, the last batch smaller."""
        for start in range(0, len(self), size):
            yield self.batch(np.arange(start, min(start + size, len(self))))


def cache_root() -> Path:
    """Where caches are kept: $ANDON_CACHE, or .cache/andon in the working directory."""
    return Path(os.environ.get("ANDON_CACHE") or ".cache/andon")


def load_frame(sample: Sample, preprocess: Preprocess) -> Array:
    """A sample's image, or its view, as the network takes it: uint8 [height, width, 3] RGB."""
    image = read_image(sample)
    return resize(sample.of(image) if isinstance(sample, View) else image, preprocess)


def extract(
    model: AnomalyModel,
    samples: Sequence[Sample],
    *,
    root: Path | None = None,
    device: torch.device | str = "cpu",
    batch: int = 16,
    progress: bool = True,
) -> FeatureSet:
    """What `model` trains on for these samples, from the cache or computed now.

    Before and after it computes, the cache is pruned to its limit, see featurecache.py.

    Raises:
        SourceError: an image cannot be read.
        ConfigError: $ANDON_CACHE_LIMIT is not a size.
        TrainingError: the cache's disk is full.
    """
    most = limit()
    if not samples:
        return FeatureSet((), {}, None, np.empty(0, np.int64))
    root = (root or cache_root()) / "features"
    root.mkdir(parents=True, exist_ok=True)
    hashes = _hashes(samples)
    entry = root / _key(model, samples, hashes)
    hold = lease(entry)
    while not (entry / INDEX).is_file():
        hold.own()
        if not (entry / INDEX).is_file():
            prune(root, most)  # a limit that was lowered for want of room makes room first
            _compute(model, samples, entry, torch.device(device), batch, progress)
        hold.share()
    used(entry / INDEX)
    index = json.loads((entry / INDEX).read_text())
    arrays: dict[str, Array] = {name: np.load(entry / f"{name}.npy", mmap_mode="c") for name in index["arrays"]}
    ids = {name: i for i, name in enumerate(model.classes)}
    prune(root, most)
    return FeatureSet(
        tuple(samples),
        {k: v for k, v in arrays.items() if model.frontend is not None},
        arrays[_IMAGES] if model.frontend is None else None,
        np.array([ids[s.product] for s in samples], np.int64),
        hold,
        hashes,
    )


def _hashes(samples: Sequence[Sample]) -> tuple[str, ...]:
    """SHA-256 of each sample's file; the views of an image cost no further reading."""
    known: dict[Path, str] = {}
    for sample in samples:
        if sample.path not in known:
            known[sample.path] = image_hash(sample.path)
    return tuple(known[s.path] for s in samples)


def _key(model: AnomalyModel, samples: Sequence[Sample], hashes: Sequence[str]) -> str:
    digest = hashlib.sha256()
    versions = {"torch": torch.__version__, "timm": timm.__version__, "cv2": cv2.__version__, "format": _FORMAT}
    digest.update(json.dumps([versions, model.preprocess.model_dump()], sort_keys=True).encode())
    digest.update(code_of(read_rgb, resize).encode())
    if model.frontend is not None:
        digest.update(_frontend_key(model.frontend).encode())
    if any(sample.crop is not None for sample in samples):
        digest.update(code_of(read_image, cut_out).encode())
    for sample, hashed in zip(samples, hashes, strict=True):
        digest.update(bytes.fromhex(hashed))
        if isinstance(sample, View):
            digest.update(sample.recipe.encode())
        if sample.crop is not None:  # none adds nothing: what was cached before there were crops stays good
            digest.update(str(sample.crop).encode())
    return digest.hexdigest()[:32]


def _frontend_key(frontend: nn.Module) -> str:
    """Structure, plain settings, own code and weights of a front end."""
    modules = list(frontend.named_modules())
    files = sorted({m.__class__.__module__ for _, m in modules if m.__class__.__module__.startswith(__package__ or "")})
    code = [inspect.getsource(sys.modules[f]) for f in files]
    settings = [
        f"{name}.{key}={value}"
        for name, m in modules
        for key, value in sorted(vars(m).items())
        if isinstance(value, bool | int | float | str | tuple) and key != "training"
    ]
    return "\n".join([repr(frontend), *settings, *code, state_hash(frontend)])


def _compute(
    model: AnomalyModel, samples: Sequence[Sample], entry: Path, device: torch.device, batch: int, progress: bool
) -> None:
    """Fill a cache entry: written into a temporary folder and renamed when it is whole."""
    for old in entry.parent.glob(f"{entry.name}.tmp-*"):  # left by a killed process; we hold the lock
        shutil.rmtree(old)
    work = Path(tempfile.mkdtemp(prefix=f"{entry.name}.tmp-", dir=entry.parent))
    arrays: dict[str, Array] = {}
    title = "images" if model.frontend is None else "features"
    try:
        with tqdm(total=len(samples), desc=title, unit="img", disable=not progress, **bar_settings()) as bar:
            for start in range(0, len(samples), batch):
                part = samples[start : start + batch]
                frames = np.stack([load_frame(s, model.preprocess) for s in part])
                for name, value in _outputs(model.frontend, frames, device).items():
                    if name not in arrays:
                        shape = (len(samples), *value.shape[1:])
                        path = work / f"{name}.npy"
                        arrays[name] = np.lib.format.open_memmap(path, "w+", value.dtype, shape)
                        reserve(path)
                    arrays[name][start : start + len(part)] = value
                bar.update(len(part))
        for array in arrays.values():
            array.flush()  # type: ignore[attr-defined]
        (work / INDEX).write_text(json.dumps({"arrays": sorted(arrays), "samples": len(samples)}))
        if entry.exists():
            shutil.rmtree(entry)
        work.rename(entry)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@torch.inference_mode()
def _outputs(frontend: nn.Module | None, frames: Array, device: torch.device) -> dict[str, Array]:
    if frontend is None:
        return {_IMAGES: frames}
    values = frontend(torch.from_numpy(frames).to(device))
    return {k: v.float().cpu().numpy() for k, v in values.items()}


def bar_settings() -> dict[str, Any]:
    """tqdm settings: lively on a terminal, a line every ten seconds in a log file."""
    live = sys.stderr.isatty()
    return {"mininterval": 0.2 if live else 10.0, "dynamic_ncols": live, "file": sys.stderr}
