"""One training run from its request to its checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .. import __version__
from ..runtime.dataset import ELPV, Dataset, Sample, open_dataset, split_readable
from ..runtime.errors import ConfigError, SourceError, quoted
from ..runtime.fingerprint import image_hash, pack
from ..runtime.groups import absolute, parts_of, several
from ..runtime.images import read_mask, read_rgb
from ..runtime.quality import Metrics, mean_metrics, table
from ..runtime.remarks import remarks
from ..runtime.verdict import readable
from . import distributed
from .alike import group_warnings
from .augment import augmented, described
from .backbones import absolute_weights, backbones_in
from .checkpoint import (
    CONFIG,
    METRICS,
    PROVENANCE,
    Provenance,
    new_run,
    read_provenance,
    save_json,
    save_weights,
    write_log,
)
from .config import differences, dump_config, load_config
from .errors import CheckpointError, TrainingError, no_constants
from .evaluate import evaluate, unseen
from .features import extract
from .holdout import HOLD_OUT, Split, group_remarks, not_held_out, split_good
from .loop import Fitted, fit
from .method import AnomalyModel, MethodConfig
from .registry import get_method
from .resume import ResumeFile, run_hashes
from .runlock import LOCK, run_lock

_REQUEST = "run.json"
_LIBRARIES = ("torch", "timm", "numpy", "opencv-python-headless", "safetensors")


@dataclass(frozen=True)
class Request:
    """What a run needs to start, and to start again where it was interrupted.

    data: as it was given; data_path: the same from any directory, empty for a set that is no folder (elpv).
    """

    method: str
    data: str
    folder: str
    data_path: str = ""
    products: tuple[str, ...] | None = None
    on_corrupt: Literal["error", "skip"] = "error"
    evaluate: bool = True
    save_every: float = 60.0
    device: str = "auto"

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, held: ExitStack) -> Request:
        """A new run's folder with its configuration and request, or the request of an interrupted run.

        held: keeps the folder's lock, in the process that writes there.

        Raises:
            ConfigError: options are missing or contradict each other, or the configuration is refused.
            CheckpointError: nothing to resume there, or the folder is in use.
        """
        if args.resume is not None:
            if given := _given(args, but=("resume", "data")):
                raise ConfigError(
                    f"--resume goes on with the options that the run was started with, not with {', '.join(given)}",
                    found=f"--resume {args.resume} and {', '.join(given)}",
                    expected="--resume DIR alone, or with --data where the set was moved",
                    next_step=f"andon train --resume {quoted(args.resume)}, or start a new run with these options",
                )
            return cls.resumed(args.resume, held, args.data)
        if args.method is None or args.data is None:
            raise ConfigError(
                "--method and --data are needed",
                found=f"--method {args.method}, --data {args.data}",
                next_step="e.g. andon train --method hvq --data elpv, or --resume DIR",
            )
        settings = [*args.set, *([f"seed={args.seed}"] if args.seed is not None else [])]
        config = load_config(args.method, args.config, settings)
        group_by = absolute(args.group_by if args.group_by is not None else config.group_by)
        config = config.model_copy(update={"backbone": absolute_weights(config.backbone), "group_by": group_by})
        products = tuple(args.products.split(",")) if args.products else None
        open_dataset(args.data).select(products=products)  # refused before there is a folder
        made = str(_folder(args.out, config, args.data, held)) if distributed.is_main() else ""
        request = cls(
            args.method,
            args.data,
            distributed.same_everywhere(made),
            _path(args.data),
            products,
            args.on_corrupt or "error",
            not args.no_eval,
            60.0 if args.save_every is None else args.save_every,
            args.device or "auto",
        )
        if distributed.is_main():
            (Path(request.folder) / CONFIG).write_text(dump_config(config), encoding="utf-8")
            request.save()
        distributed.barrier()
        return request

    def save(self) -> None:
        """Write it into its folder, where :meth:`resumed` finds it."""
        save_json(Path(self.folder) / _REQUEST, asdict(self))

    def withdraw(self) -> None:
        """Leave no folder of a run that was refused before it had anything to keep: the command may be given again."""
        folder = Path(self.folder)
        files = (CONFIG, _REQUEST, LOCK)
        if distributed.is_main() and folder.is_dir() and {p.name for p in folder.iterdir()} <= {*files}:
            for name in files:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()

    @classmethod
    def resumed(cls, folder: Path, held: ExitStack, data: str | None = None) -> Request:
        """The request of an interrupted run. held: keeps the folder's lock. data: where the set is now, if not there.

        Raises:
            CheckpointError: the folder is of no interrupted run, or in use.
        """
        cls._saved(folder)  # before there is a lock in a folder that is no run's
        if distributed.is_main():
            held.enter_context(run_lock(folder))
        distributed.barrier()
        saved = cls._saved(folder)  # again: the run may have ended in between
        products = None if saved["products"] is None else tuple(saved["products"])
        request = cls(**{**saved, "products": products, "folder": str(folder)})
        if data is None:
            return request
        open_dataset(data).select(products=products)
        request = replace(request, data=data, data_path=_path(data))
        if distributed.is_main():
            request.save()
        return request

    @staticmethod
    def _saved(folder: Path) -> dict[str, Any]:
        try:
            saved: dict[str, Any] = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
            return saved
        except (OSError, ValueError) as error:
            complete = (folder / PROVENANCE).is_file()
            raise CheckpointError(
                f"nothing to resume in {folder}",
                found="a completed checkpoint" if complete else str(error),
                expected=f"a folder with {_REQUEST}, as an interrupted `andon train` leaves it",
                next_step=_export(folder) if complete else "start with --method and --data",
            ) from error


def _export(folder: Path) -> str:
    return f"andon export --method {read_provenance(folder).method} --checkpoint {quoted(folder)}"


def train(request: Request) -> dict[str, Any]:
    """Carry out a request; all processes of a group call it. Returns the JSON object of `andon train`."""
    folder = Path(request.folder)
    config = load_config(request.method, folder / CONFIG)
    device = _device(request.device)
    whole = open_dataset(request.data_path or request.data)
    data = whole.select(products=request.products)
    kept, skipped = split_readable(data.samples, request.on_corrupt)
    _check_masks(kept)
    good = [s for s in kept if s.split == "train" and s.good]
    contents = {s.key: image_hash(s.path) for s in good}
    parts = parts_of(good, config.group_by) if config.group_by else {}
    split = split_good(good, config.holdout, contents, parts)
    _say(f"{request.method}, preset {config.preset or 'unnamed'}, seed {config.seed}, on {_where(device)} -> {folder}")
    _say(data.describe())
    for text in remarks(whole) if distributed.is_main() else ():
        _say(f"warning: {text}")
    if skipped:
        _say(f"skipped {len(skipped)} undecodable images: {', '.join(s.key for s in skipped[:5])}")
    _say(
        f"good images: {len(split.fitting)} to train on; "
        f"held out: {len(split.constants)} for constants, {len(split.thresholds)} for thresholds"
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
        _say(f"few images: {views} views of them are added for training ({described(config.augment)})")

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
    else:
        _say("no image held out: calibration constants keep their defaults")
    _say(f"{fitted.steps} steps in {fitted.seconds:.0f} s" + (" (time limit)" if fitted.stopped_early else ""))

    # Weights first: a test image that cannot be read must not cost the training.
    held_parts = tuple(pack(contents[s.key] for s in group) for group in several(split.thresholds, parts))
    _write(folder, model, request, data, fitted, split, fingerprints, held_parts, views, [s.key for s in skipped])
    resume.remove()
    (folder / _REQUEST).unlink()
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


def _check_masks(samples: Sequence[Sample]) -> None:
    """Refuse what the evaluation would refuse minutes later: a mask that cannot be read or is not of its image's size.

    Both are decoded: a file's head does not say that it is whole, and the reader decides which way round a picture is.

    Raises:
        SourceError: naming the mask, or its image.
    """
    for sample in samples:
        if sample.mask_path is not None:
            height, width = read_rgb(sample.path).shape[:2]
            read_mask(sample.mask_path, (height, width))


def _write(
    folder: Path,
    model: AnomalyModel,
    request: Request,
    data: Dataset,
    fitted: Fitted,
    split: Split,
    fingerprints: dict[str, str],
    parts: tuple[str, ...],
    views: int,
    skipped: list[str],
) -> None:
    """Weights, then provenance, whose presence makes the checkpoint complete."""
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
        fingerprints=fingerprints,
        parts=parts,
        trained_on=len(split.fitting),
        views=views,
        skipped=tuple(skipped),
        steps=fitted.steps,
        seconds=round(fitted.seconds, 2),
        processes=distributed.world(),
        versions=_versions(),
        weights_sha256=digest,
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


def _given(args: argparse.Namespace, but: Sequence[str]) -> list[str]:
    """Options of `andon train` that were given; none of them has a default of its own (command.py)."""
    values = {k: v for k, v in vars(args).items() if k not in (*but, "json", "command")}
    given = [name for name, value in values.items() if not (value is None or value is False or value == [])]
    return [f"--{name.replace('_', '-')}" for name in given]


def _folder(out: Path | None, config: MethodConfig, data: str, held: ExitStack) -> Path:
    """The new run's folder, empty but for the lock, which `held` keeps."""
    if out is None:
        out = new_run(config.method, config.preset or Path(data).name or "set")
    out.mkdir(parents=True, exist_ok=True)
    held.enter_context(run_lock(out))
    if found := sorted(p.name for p in out.iterdir() if p.name != LOCK):
        raise CheckpointError(
            f"{out} is not empty",
            found=", ".join(found[:5]),
            expected="a new or empty folder",
            next_step=f"andon train --resume {quoted(out)}" if (out / _REQUEST).is_file() else "name another",
        )
    return out


def _path(data: str) -> str:
    """The set's folder from any directory; empty for a set that is no folder."""
    return "" if data == ELPV else str(Path(data).absolute())


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


def _say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)
