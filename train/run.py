"""One training run from its request (request.py) to its checkpoint."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .. import __version__
from ..runtime.crop import cropped, described, measured, read_image, read_pair
from ..runtime.dataset import Dataset, Sample, open_dataset, split_readable
from ..runtime.errors import ConfigError, SourceError, quoted
from ..runtime.fingerprint import image_hash, pack
from ..runtime.groups import parts_of, several
from ..runtime.quality import Metrics, mean_metrics, table
from ..runtime.remarks import remarks
from ..runtime.verdict import readable
from . import distributed
from .alike import group_warnings
from .augment import augmented
from .augment import described as views_described
from .backbones import backbones_in
from .checkpoint import (
    CONFIG,
    METRICS,
    PROVENANCE,
    Provenance,
    save_json,
    save_weights,
    write_log,
)
from .config import differences, dump_config, load_config
from .errors import TrainingError, no_constants
from .evaluate import evaluate, unseen
from .features import bar_settings, extract
from .holdout import HOLD_OUT, Split, group_remarks, not_held_out, split_good
from .loop import Fitted, fit
from .method import AnomalyModel
from .registry import get_method
from .request import REQUEST, Request
from .resume import ResumeFile, run_hashes

_LIBRARIES = ("torch", "timm", "numpy", "opencv-python-headless", "safetensors")


def train(request: Request) -> dict[str, Any]:
    """Carry out a request; all processes of a group call it. Returns the JSON object of `andon train`."""
    folder = Path(request.folder)
    config = load_config(request.method, folder / CONFIG)
    device = _device(request.device)
    whole = open_dataset(request.data_path or request.data)
    data = whole.select(products=request.products)
    decodable, skipped = split_readable(data.samples, request.on_corrupt)
    crops = measured(decodable, request.rois, _bar)
    kept = cropped(decodable, crops)
    _check_masks(kept)
    good = [s for s in kept if s.split == "train" and s.good]
    contents = {s.key: image_hash(s.path) for s in good}
    parts = parts_of(good, config.group_by) if config.group_by else {}
    split = split_good(good, config.holdout, contents, parts, config.uses_constants)
    _say(f"{request.method}, preset {config.preset or 'unnamed'}, seed {config.seed}, on {_where(device)} -> {folder}")
    _say(data.describe())
    for text in described(crops, "as --roi says"):
        _say(text)
    for text in remarks(whole) if distributed.is_main() else ():
        _say(f"warning: {text}")
    if skipped:
        _say(f"skipped {len(skipped)} undecodable images: {', '.join(s.key for s in skipped[:5])}")
    _say(
        f"good images: {len(split.fitting)} to train on; "
        f"held out: {f'{len(split.constants)} for constants, ' if config.uses_constants else ''}"
        f"{len(split.thresholds)} for thresholds"
    )
    if copies := len(good) - len({(s.product, contents[s.key]) for s in good}):
        _say(f"{copies} of them are copies of others; each stays with its like: none is held out that was trained on")
    for text in group_remarks(data, split, parts, config.group_by):
        _say(text)
    _check_products(data.products, split)
    if config.needs_constants:
        for product in data.products:  # now, not after the training
            if not any(s.product == product for s in split.constants):
                raise no_constants(product, sum(s.product == product for s in split.fitting))
    asked, config = config, config.for_images(len(split.fitting))
    for key, value in differences(asked, config).items():
        _say(f"decided by the number of images: {key}={json.dumps(value)}")
    fitting, constants = augmented(split, config.augment)
    if views := len(fitting) - len(split.fitting):
        _say(f"few images: {views} views of them are added for training ({views_described(config.augment)})")

    torch.manual_seed(config.seed)
    random.seed(config.seed)
    model = get_method(config.method).build(config, data.products).to(device)
    backbones = backbones_in(model)
    for backbone in backbones:
        _say(f"backbone {backbone.record.id}, weights {backbone.record.weights} ({backbone.record.sha256[:12]})")
    show = distributed.is_main()
    trainset = extract(model, fitting, device=device, progress=show)
    calibration = extract(model, constants, device=device, progress=show)
    for text in group_warnings(trainset, data.products) if show and split.thresholds and not parts else ():
        _say(text)
    fingerprints = {  # now: what cannot be read must not cost the training
        "fitted": pack(trainset.hashes),
        "constants": pack(calibration.hashes),
        "thresholds": pack(contents[s.key] for s in split.thresholds),
        "skipped": pack(_hashes(skipped)),
    }
    pictures = _picture_sizes(split.fitting)
    known, former = run_hashes(model, trainset)
    resume = ResumeFile(folder / "resume.pt", known, request.save_every, former=(former,))
    try:
        fitted = fit(model, trainset, device, log=lambda r: write_log(folder, r), resume=resume, progress=show)
    except KeyboardInterrupt:
        _say(f"\ninterrupted; to go on: andon train --resume {quoted(folder)}")
        raise
    if not distributed.is_main():
        return {"ok": True}
    model.eval()
    if split.constants:
        with torch.no_grad():
            model.finalize(calibration)
    elif config.uses_constants:
        _say("no image held out: calibration constants keep their defaults")
    _say(f"{fitted.steps} steps in {fitted.seconds:.0f} s" + (" (time limit)" if fitted.stopped_early else ""))

    # Weights first: a test image that cannot be read must not cost the training.
    held_parts = tuple(pack(contents[s.key] for s in group) for group in several(split.thresholds, parts))
    names = [s.key for s in skipped]
    seen = {"fingerprints": fingerprints, "parts": held_parts, "skipped": names, "crops": crops, "pictures": pictures}
    _write(folder, model, request, data, fitted, split, views, seen)
    resume.remove()
    (folder / REQUEST).unlink()
    print(f"checkpoint {folder}")
    tests, copies = unseen([s for s in kept if s.split == "test"] if request.evaluate else [], contents.values())
    if copies:
        _say(f"test images left out of the figures: {copies} that are copies of good training images")
    metrics = evaluate(model, tests, device) if tests else {}
    summary = _metrics(metrics, fitted, model)
    save_json(folder / METRICS, summary)
    if metrics:
        print(table(metrics))
    bare = not_held_out(split, data.products)
    export = f"andon export --method {config.method} --checkpoint {quoted(folder)}"
    print(f"next, as nothing of {', '.join(bare)} is held out: {HOLD_OUT}" if bare else f"next: {export}")
    return {"ok": True, "checkpoint": str(folder), **summary}


def _check_products(products: Sequence[str], split: Split) -> None:
    """Refuse a product that nothing would be learned of; say of which none is held out.

    Raises:
        TrainingError: naming it.
    """
    learned = {s.product for s in split.fitting}
    if missing := [product for product in products if product not in learned]:
        raise TrainingError(
            f"no good image of product {', '.join(missing)} to train on",
            found=f"good training images of {', '.join(sorted(learned)) or 'none'}",
            expected="at least one of each product that can be decoded",
            next_step=f"add good images, or leave the product out: --products {','.join(sorted(learned)) or '...'}",
        )
    if bare := not_held_out(split, products):
        _say(
            f"no good image of {', '.join(bare)} is held out: `andon export` will not take this checkpoint; {HOLD_OUT}"
        )


def _hashes(samples: Sequence[Sample]) -> Iterator[str]:
    """SHA-256 of the files of skipped samples, of those that can be read at all."""
    for sample in samples:
        with suppress(SourceError):
            yield image_hash(sample.path)


def _picture_sizes(samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
    """Width and height of the pictures of each product that nothing is cut out of, if three of them are of one size.

    Raises:
        SourceError: an image cannot be read.
    """
    found = {}
    for product in {s.product for s in samples if s.crop is None}:
        mine = [s for s in samples if s.product == product]
        sizes = {read_image(mine[i]).shape[1::-1] for i in {0, len(mine) // 2, len(mine) - 1}}
        if len(sizes) == 1:
            width, height = sizes.pop()
            found[product] = (width, height)
    return found


def _check_masks(samples: Sequence[Sample]) -> None:
    """Refuse what the evaluation would refuse minutes later: a mask that cannot be read or is not of its image's size.

    Both are decoded: a file's head does not say that it is whole, and the reader decides which way round a picture is.

    Raises:
        SourceError: naming the mask, or its image.
    """
    for sample in samples:
        if sample.mask_path is not None:
            read_pair(sample)


def _write(
    folder: Path,
    model: AnomalyModel,
    request: Request,
    data: Dataset,
    fitted: Fitted,
    split: Split,
    views: int,
    seen: Mapping[str, Any],
) -> None:
    """Weights, then provenance, whose presence makes the checkpoint complete. seen: its fields on the images."""
    digest = save_weights(model, folder)
    (folder / CONFIG).write_text(dump_config(model.config), encoding="utf-8")  # as the images decided it
    backbones = backbones_in(model)
    provenance = Provenance(
        method=request.method,
        created=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        andon=__version__,
        classes=data.products,
        backbone=backbones[0].record if backbones else None,
        data=readable(request.data),
        data_path=readable(request.data_path),
        data_license=data.license,
        holdout=tuple(s.key for s in split.thresholds),
        constants=tuple(s.key for s in split.constants),
        trained_on=len(split.fitting),
        views=views,
        steps=fitted.steps,
        seconds=round(fitted.seconds, 2),
        processes=distributed.world(),
        versions=_versions(),
        weights_sha256=digest,
        **seen,
    )
    save_json(folder / PROVENANCE, provenance.model_dump(mode="json"))


def _metrics(products: Mapping[str, Metrics], fitted: Fitted, model: nn.Module) -> dict[str, Any]:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "products": dict(products),
        "mean": mean_metrics(products) if products else {},
        "training": {
            "steps": fitted.steps,
            "seconds": round(fitted.seconds, 2),
            "stopped_early": fitted.stopped_early,
            "trainable_parameters": trainable,
            "last": {k: v for k, v in fitted.last.items() if v == v},
        },
    }


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(
            f"cannot train on device {name}",
            found="no CUDA device" if name == "cuda" else name,
            expected="auto | cpu | cuda",
            next_step="use --device cpu, or see `andon doctor`",
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device("cpu")


def _where(device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{where}, {distributed.world()} processes" if distributed.active() else where


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # opencv has several distributions; only what is installed is recorded
    return found


def _bar(total: int, what: str) -> Any:
    return tqdm(total=total, desc=what, unit="img", disable=not distributed.is_main(), **bar_settings())


def _say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)
