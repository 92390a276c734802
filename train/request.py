"""What a training run was asked for: from the command line, kept in the run's folder, and found there to go on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..runtime.crop import rois_by_product
from ..runtime.dataset import ELPV, open_dataset
from ..runtime.errors import ConfigError, quoted
from ..runtime.groups import absolute
from ..runtime.manifest import Roi
from . import distributed
from .backbones import absolute_weights
from .checkpoint import CONFIG, PROVENANCE, new_run, read_provenance, save_json
from .config import dump_config, load_config
from .errors import CheckpointError
from .method import MethodConfig
from .runlock import LOCK, run_lock

#: The request in its run's folder, there until the checkpoint is written.
REQUEST = "run.json"


@dataclass(frozen=True)
class Request:
    """What a run needs to start, and to start again where it was interrupted.

    data: as it was given; data_path: the same from any directory, empty for a set that is no folder (elpv).
    rois: what to cut out of the pictures of each product.
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
    rois: Mapping[str, Roi] = field(default_factory=dict)

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
        there = open_dataset(args.data).select(products=products)  # refused before there is a folder
        rois = rois_by_product(args.roi or (), there.products)
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
            rois,
        )
        if distributed.is_main():
            (Path(request.folder) / CONFIG).write_text(dump_config(config), encoding="utf-8")
            request.save()
        distributed.barrier()
        return request

    def save(self) -> None:
        """Write it into its folder, where :meth:`resumed` finds it."""
        save_json(Path(self.folder) / REQUEST, asdict(self))

    def withdraw(self) -> None:
        """Leave no folder of a run that was refused before it had anything to keep: the command may be given again."""
        folder = Path(self.folder)
        files = (CONFIG, REQUEST, LOCK)
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
        rois = {product: tuple(roi) for product, roi in saved.get("rois", {}).items()}
        request = cls(**{**saved, "products": products, "folder": str(folder), "rois": rois})
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
            saved: dict[str, Any] = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
            return saved
        except (OSError, ValueError) as error:
            complete = (folder / PROVENANCE).is_file()
            raise CheckpointError(
                f"nothing to resume in {folder}",
                found="a completed checkpoint" if complete else str(error),
                expected=f"a folder with {REQUEST}, as an interrupted `andon train` leaves it",
                next_step=_export(folder) if complete else "start with --method and --data",
            ) from error


def _export(folder: Path) -> str:
    return f"andon export --method {read_provenance(folder).method} --checkpoint {quoted(folder)}"


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
            next_step=f"andon train --resume {quoted(out)}" if (out / REQUEST).is_file() else "name another",
        )
    return out


def _path(data: str) -> str:
    """The set's folder from any directory; empty for a set that is no folder."""
    return "" if data == ELPV else str(Path(data).absolute())
