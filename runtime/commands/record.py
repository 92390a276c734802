"""`andon record`: pictures from a line's cameras into a set that `andon train` takes; no bundle, no engines."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, quoted
from . import numbers

if TYPE_CHECKING:
    from ..lineconfig import CameraConfig, LineConfig
    from ..record import Lane, Recording

#: Seconds between two pictures of a live camera that neither --every, max_fps nor a trigger paces.
PAUSE = 1.0
#: Sources that only one process may have open; of a pipeline nobody knows.
EXCLUSIVE = ("csi", "usb", "gstreamer")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.description = (
        "Record whole pictures (PNG, lossless; a roi cuts nothing) from the cameras of a line configuration, named by "
        "UTC time, camera and part id. Needs no bundle, and no broker unless a camera waits for triggers."
    )
    parser.add_argument("--config", type=Path, required=True, help="line configuration (YAML)")
    parser.add_argument(
        "--camera", action="append", metavar="NAME", help="record this camera; several: once for each (default: all)"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="folder of the pictures, as SET/PRODUCT/good (or SET/PRODUCT/scratch for defective parts); {product} and "
        "{camera} in it stand for those of each picture, as in 'SET/{product}/good'. It may have pictures already",
    )
    parser.add_argument(
        "--every",
        type=numbers.seconds,
        metavar="S",
        help="seconds between two pictures of a camera, 0: every frame; waits for no trigger. Default: a camera with "
        f"`trigger` gives one picture a part, files give all, others one in {PAUSE:g} s unless they have max_fps",
    )
    parser.add_argument("--count", type=numbers.count, metavar="N", help="end after N pictures of each camera")
    parser.add_argument("--seconds", type=numbers.seconds, metavar="S", help="end after so many seconds")
    parser.add_argument(
        "--max-bytes",
        type=numbers.size_bytes,
        default="10GB",
        metavar="SIZE",
        help="end before the pictures take more than this, as 500MB or 20GB (10GB); the disk's last GiB stays free",
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Record; the summary, "ok" False if there is no picture, or fewer than --count although nobody interrupted it.

    Raises:
        AndonError: it cannot start as configured.
    """
    from tqdm.contrib.logging import logging_redirect_tqdm

    from ..lineconfig import load_line
    from ..logs import configure_logging
    from ..pictures import PictureFolder
    from ..process import limit_arenas
    from ..record import Recording
    from ..record_summary import Asked, say, summary
    from .options import progress

    limit_arenas()
    configure_logging("info")
    logging.getLogger("andon.commands").setLevel(logging.WARNING)  # not a line for each trigger under the progress bar
    config = load_line(args.config)
    cameras = _chosen(config, args.camera)
    _require_one_product(cameras, args.out)
    lanes = {name: _lane(name, camera, args) for name, camera in cameras.items()}
    pictures = PictureFolder(args.max_bytes)
    with ExitStack() as stack:
        stack.enter_context(_cameras_free(config, args.config, lanes))
        bar = stack.enter_context(progress(args.count and args.count * len(lanes), "recording"))
        stack.enter_context(logging_redirect_tqdm())
        recording = Recording(
            lanes, pictures, count=args.count, seconds=args.seconds, progress=lambda: _tick(bar, pictures)
        )
        if waiting := [name for name, lane in lanes.items() if lane.config.trigger is not None]:
            stack.enter_context(_triggers(config, waiting, recording))
        recording.run()
    asked = Asked(args.config, args.out, tuple(args.camera or ()), args.every, args.count)
    said = summary(recording, pictures.written, asked)
    say(recording, said)
    return said


def _tick(bar: Any, pictures: Any) -> None:
    bar.set_postfix_str(f"{pictures.written / 1e6:.1f} MB", refresh=False)
    bar.update()


def _chosen(config: LineConfig, names: Sequence[str] | None) -> dict[str, CameraConfig]:
    for name in names or ():
        if name not in config.cameras:
            known = ", ".join(config.cameras)
            raise ConfigError(
                f"no camera '{name}'", found=name, expected=known, next_step="name one of these with --camera"
            )
    return {name: camera for name, camera in config.cameras.items() if not names or name in names}


def _lane(name: str, camera: CameraConfig, args: argparse.Namespace) -> Lane:
    """What is recorded of one camera, its source checked.

    Raises:
        SourceError: it can never be opened as configured. ConfigError: its pictures cannot go where --out says.
    """
    from ..record import Lane, recording_config
    from ..source import make_source
    from ..sourceconfig import DatasetSource

    known = camera.product != "auto" or isinstance(camera.source, DatasetSource) or camera.trigger is not None
    if "{product}" in args.out and not known:
        raise ConfigError(
            f"camera {name} has no product, which --out {args.out} asks for",
            found="product: auto",
            expected="a camera that shows one product",
            next_step=f"write {args.out.replace('{product}', 'NAME')}, or name the product of camera {name} in the "
            "configuration",
        )

    def folder(product: str | None) -> Path | None:
        product = product if product not in (None, "auto") else camera.product
        if "{product}" not in args.out:
            return Path(args.out.replace("{camera}", name))
        if product == "auto":
            return None
        return Path(args.out.replace("{product}", _as_folder(product)).replace("{camera}", name))

    config = recording_config(camera, free=args.every is not None)
    source = make_source(name, config)
    source.check()
    _require_folder(folder(None) or Path(args.out.partition("{")[0] or "."))
    pause = _pause(config, args.every)
    triggered = config.trigger is not None and config.trigger.only
    pace = "one picture a trigger" if triggered else f"a picture in {pause:g} s" if pause else "every frame"
    print(f"{name}: {pace}, to {folder(None) or args.out}")
    return Lane(config, source, pause, folder)


def _pause(camera: CameraConfig, every: float | None) -> float:
    from ..sourceconfig import FileSource, PlaybackSource

    if every is not None:
        return every
    files = isinstance(camera.source, PlaybackSource | FileSource)
    paced = camera.max_fps is not None or (camera.trigger is not None and camera.trigger.only)
    return 0.0 if files or paced or not camera.endless else PAUSE


def _as_folder(product: str) -> str:
    """A product's name as that of one folder, which is visible."""
    name = product.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return f"%2E{name[1:]}" if name.startswith(".") else name


def _require_one_product(cameras: Mapping[str, CameraConfig], out: str) -> None:
    if unknown := set(re.findall(r"\{\w*\}", out)) - {"{product}", "{camera}"}:
        raise ConfigError(
            f"--out {out} cannot be filled in", found=", ".join(sorted(unknown)), expected="{product} or {camera}"
        )
    products = {camera.product for camera in cameras.values()} - {"auto"}
    if len(products) > 1 and "{" not in out:
        folder = Path(out)
        step = f"--out {quoted(folder.parent.parent / '{product}' / folder.name)}, or choose one with --camera"
        raise ConfigError(
            f"pictures of several products would lie in {out}",
            found=", ".join(f"{name}: {camera.product}" for name, camera in cameras.items()),
            expected="a folder for each product",
            next_step=step,
        )


def _require_folder(folder: Path) -> None:
    """Refuse a place that cannot be written before the first part has passed; nothing is made."""
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        what = "cannot be written by this user" if nearest.is_dir() else "is not a folder"
        step = "name a folder that this user may write with --out"
        raise ConfigError(f"--out {folder}: {nearest} {what}", next_step=step)


@contextmanager
def _cameras_free(config: LineConfig, file: Path, lanes: Mapping[str, Lane]) -> Iterator[None]:
    """Keep the line from running meanwhile, where a camera or its triggers can be one process's only.

    Raises:
        ConfigError: it runs.
    """
    from ..startup import line_at_rest
    from ..whereabouts import state_folder

    held = [n for n, lane in lanes.items() if lane.config.source.kind in EXCLUSIVE or lane.config.trigger is not None]
    if not held:
        yield
        return
    step = (
        f"the line has camera {', '.join(held)}: stop it first (a service: systemctl stop andon@{quoted(file.stem)}), "
        "or let it keep its pictures as evidence (docs/images.md)"
    )
    with line_at_rest(state_folder(config, file), step):
        yield


@contextmanager
def _triggers(config: LineConfig, cameras: Sequence[str], recording: Recording) -> Iterator[None]:
    """Take triggers over MQTT meanwhile.

    Raises:
        ConfigError: the configuration has no broker. DeliveryError: it cannot be used.
    """
    from ..mqtt.triggers import TriggerListener

    broker = config.broker
    if broker is None:
        raise ConfigError(
            f"camera {', '.join(cameras)} waits for triggers, which come over MQTT",
            found="broker: null",
            expected="a broker",
            next_step="name it in the configuration, or give --every S, which waits for no trigger",
        )
    with ExitStack() as stack:
        if broker.embedded:
            from ..broker import EmbeddedBroker

            embedded = stack.enter_context(EmbeddedBroker(broker.port))
            print(f"embedded broker on {embedded.host}:{embedded.port}")
            broker = broker.model_copy(update={"host": embedded.host, "port": embedded.port})
        stack.enter_context(TriggerListener(broker, config.topic, cameras, recording.trigger))
        print(f"waiting for triggers on {config.topic}/{'|'.join(cameras)}/cmd/trigger", flush=True)
        yield
