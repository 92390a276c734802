"""`andon enroll`: exports the method's engines where torch is installed, then enrolls with them as the device does."""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..runtime.commands import enroll as device
from ..runtime.enrolment.support import support_paths
from ..runtime.errors import ConfigError
from ..runtime.workfolder import work_folder


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `andon enroll`."""
    device.configure(parser)
    parser.add_argument("--config", type=Path, metavar="YAML", help="settings of the method; default: its edge preset")
    parser.add_argument("--fp16", action="store_true", help="export FP16 stages too")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Enroll from --backbone-bundle, or from a bundle exported for this support first.

    Raises:
        ConfigError: no backbone bundle and no torch to make one with, options of both ways, or too few images; see also
            andon.runtime.commands.enroll.
    """
    if args.backbone_bundle is not None:
        if given := [option for option, value in (("--config", args.config), ("--fp16", args.fp16)) if value]:
            raise ConfigError(
                f"--backbone-bundle brings its engines as they are, so {' and '.join(given)} cannot be heeded",
                found=f"--backbone-bundle and {', '.join(given)}",
                expected="--backbone-bundle, or the options by which engines are exported",
                next_step="leave one of them out",
            )
        return device.main(args)
    if find_spec("torch") is None:
        raise ConfigError(
            "engines cannot be exported here",
            found="torch is not installed",
            expected=f"--backbone-bundle with any {args.method} bundle, or a workstation with torch",
            next_step=device.same_again(args, args.method, "BUNDLE"),
        )
    support_paths(args.support, args.shots, args.seed)  # refused before torch is loaded and engines are exported
    started = time.monotonic()
    target = args.out or device.default_out(args.method, device.product_name(args))
    with work_folder(target) as folder:
        engines = export_engines(args, folder / "engines")
        print(f"engines exported and verified in {time.monotonic() - started:.1f} s")
        result = device.main(argparse.Namespace(**{**vars(args), "backbone_bundle": engines, "out": target}))
    return {**result, "seconds": round(time.monotonic() - started, 2)}


def export_engines(args: argparse.Namespace, target: Path) -> Path:
    """A verified bundle of the method for this support; its engines serve any further product.

    Raises:
        ConfigError: settings or support cannot be used.
        GateError: a stage does not match torch.
    """
    import numpy as np
    import torch

    from ..runtime.crop import crop_for
    from ..runtime.dataset import GOOD, Sample
    from ..runtime.enrolment.foreground import everything
    from ..runtime.enrolment.support import picture_sizes, read_support
    from ..train.backbones import backbones_in
    from ..train.config import load_config
    from ..train.features import FeatureSet
    from ..train.registry import get_method
    from .bundle import Provenance
    from .exporter import Request, export_bundle
    from .frames import Evidence, Frames, with_synthetic_defects
    from .methods import get_cut

    torch.set_num_threads(args.threads or torch.get_num_threads())
    config = load_config(args.method, args.config)
    name = device.product_name(args)
    model = get_method(args.method).build(config, (name,)).eval()
    frontend = model.frontend
    if frontend is None:
        raise ConfigError(
            f"{args.method} has no frozen features to enroll with", found=args.method, expected="knn, foct"
        )
    paths = support_paths(args.support, args.shots, args.seed)
    crop = None if args.roi is None else crop_for(args.roi, picture_sizes(paths), name)
    support = read_support(args.support, args.shots, model.preprocess, 1, everything, args.seed, crop)
    samples = tuple(Sample(path, path.name, name, GOOD, "train") for path in support.paths)
    with torch.no_grad():
        features = {k: v.numpy() for k, v in frontend(torch.from_numpy(support.frames)).items()}
        ids = np.zeros(len(support.frames), np.int64)
        model.prepare(FeatureSet(samples, features, None, ids))
    # Turned, because at the support itself every distance is a rounding error of zero.
    turned = np.concatenate([support.frames[:, :, ::-1], support.frames[:, ::-1]])
    zeros = np.zeros(len(turned), np.int32)
    frames = Frames(turned, zeros, zeros, f"support of {name}, mirrored")
    backbone = backbones_in(model)[0].record
    licenses = {f"weights of {backbone.id}": backbone.license} if backbone.license else {}
    export = export_bundle(
        model,
        get_cut(args.method)(model, {}),
        Evidence(frames, with_synthetic_defects(frames)),
        Provenance(backbone, data=name, preset=config.preset, licenses=licenses),
        Request(target, ("fp16",) if args.fp16 else ()),
    )
    return export.path
