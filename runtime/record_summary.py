"""What a recording says at its end: what became of each camera's frames, and the command that goes on from there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .dataset import folder_name
from .errors import AndonError, SourceError, quoted
from .images import on_disk
from .pictures import GROUP_BY

if TYPE_CHECKING:
    from .record import Recording

#: Pictures of one product from which on one is left for thresholds, and calibration can promise 5 % false alarms: of a
#: folder `good` a fifth becomes test, of the rest a quarter is held out, half of that for thresholds, which take 19.
#: For every method: those that set no constants (knn, foct) keep all that is held out, and half as many pictures do.
FEWEST, SENSIBLE = 10, 200
_GOOD = ("good", "ok")
_ENDS = {
    "count": "all of --count",
    "seconds": "--seconds",
    "max_bytes": "--max-bytes",
    "disk": "the disk",
    "sources": "every source ended",
    "asked": "asked to",
}


@dataclass(frozen=True)
class Asked:
    """What the command line asked for. cameras: named by --camera, none: all. every: seconds between two pictures.
    count: pictures of each."""

    config: Path
    out: str
    cameras: tuple[str, ...] = ()
    every: float | None = None
    count: int | None = None


def summary(recording: Recording, written: int, asked: Asked) -> dict[str, Any]:
    """The summary as one JSON object. written: bytes of the pictures."""
    refusal = recording.failure or _refusal(recording, asked)
    counts = recording.slots.counts()
    told = {} if refusal is None else {
        "error": refusal.what, "found": refusal.found, "expected": refusal.expected, "next": refusal.next_step
    }  # fmt: skip
    folders = {
        str(folder): {"product": folder_name(_product_folder(folder)), "images": len(_images(folder))}
        for folder in recording.folders
    }
    return {
        "ok": refusal is None,
        **told,
        "pictures": sum(recorded.pictures for recorded in recording.cameras.values()),
        "bytes": written,
        "ended": recording.ended,
        "cameras": {
            name: {
                "pictures": recorded.pictures,
                "parts": len(recorded.parts),
                "duplicates": recorded.duplicates,
                "dropped": counts[name].dropped,
                "missed": dict(recorded.missed),
                "sizes": [list(size) for size in recorded.sizes],
                "state": recording.sources[name].state.state,
                "restarts": recording.sources[name].state.restarts,
            }
            for name, recorded in recording.cameras.items()
        },
        "folders": folders,
        **({} if refusal is not None else {"next": _next(recording, asked)}),
    }


def _refusal(recording: Recording, asked: Asked) -> AndonError | None:
    """Why this recording cannot count as done."""
    check = f"andon check --config {quoted(asked.config)}"
    for name, camera in recording.sources.items():
        if camera.state.state == "failed":
            return SourceError(f"camera {name}: its source failed", found=camera.state.detail, next_step=check)
    pictures = {name: recorded.pictures for name, recorded in recording.cameras.items()}
    if not any(pictures.values()) and recording.ended == "max_bytes":
        expected = "room for one picture"
        return SourceError("no picture was recorded", found="--max-bytes", expected=expected, next_step="give more")
    if not any(pictures.values()):
        found = "; ".join(_nothing(name, recording) for name in pictures)
        step = f"{check}; if something else has the camera open (a line that runs as a service), stop that"
        if all(_untriggered(name, recording) for name in pictures):
            step = "look at what sends the command trigger (docs/mqtt.md), or give --every S, which waits for none"
        return SourceError("no picture was recorded", found=found, expected="pictures", next_step=step)
    short = {name: count for name, count in pictures.items() if asked.count is not None and count < asked.count}
    if short and recording.ended != "asked":
        why = {"seconds": "--seconds", "max_bytes": "--max-bytes", "sources": "every source ended"}[recording.ended]
        found = ", ".join(f"{name}: {count}" for name, count in short.items())
        step = "record again into the same folder for the rest: nothing is overwritten"
        return SourceError(f"fewer pictures than asked for: {why}", found=found, expected=asked.count, next_step=step)
    return None


def _nothing(name: str, recording: Recording) -> str:
    recorded = recording.cameras[name]
    reasons = "".join(f", {reason} {count}" for reason, count in recorded.missed.items())
    if _untriggered(name, recording):
        return f"{name}: no trigger came"
    return f"{name}: {recorded.trouble or recording.sources[name].state.state}{reasons}"


def _untriggered(name: str, recording: Recording) -> bool:
    """Whether a camera that waits for triggers got none, and nothing else is known to be wrong with it."""
    trigger, recorded = recording.lanes[name].config.trigger, recording.cameras[name]
    return trigger is not None and trigger.only and not (recorded.trouble or recorded.missed or recorded.duplicates)


def say(recording: Recording, summary: Mapping[str, Any]) -> None:
    """The summary for a person."""
    for name, camera in summary["cameras"].items():
        said = [_many(camera["pictures"], "picture")]
        said += [f"of {_many(camera['parts'], 'part')}"] if camera["parts"] else []
        said += [" and ".join(f"{width} x {height}" for width, height in camera["sizes"])] if camera["sizes"] else []
        said += [f"{camera['dropped']} dropped, as the disk was slower"] if camera["dropped"] else []
        said += [f"{count} {reason}" for reason, count in camera["missed"].items()]
        said += [f"source rebuilt {_many(camera['restarts'], 'time')}"] if camera["restarts"] else []
        print(f"{name}: {', '.join(said)}")
        if camera["duplicates"]:
            print(f"{name}: {camera['duplicates']} more were left out: pixel by pixel like one of this recording")
        if len(camera["sizes"]) > 1:
            print(f"warning: {name}: its pictures are of several sizes; training wants one (docs/images.md)")
    for folder, found in summary["folders"].items():
        print(f"{folder}: now {_many(found['images'], 'image')}")
    for folder, shown in recording.folders.items():
        if len(named := {product for _, product in shown} - {"auto"}) > 1:
            print(f"warning: {folder} has pictures of several products: {', '.join(sorted(named))}")
    print(f"{_many(summary['pictures'], 'picture')}, {summary['bytes'] / 1e6:.1f} MB; ended: {_ENDS[summary['ended']]}")
    if not summary["ok"]:
        error = AndonError(
            summary["error"], found=summary["found"], expected=summary["expected"], next_step=summary["next"]
        )
        print(f"andon record: {error}", file=sys.stderr)
        return
    for text in _remarks(summary["folders"]):
        print(text)
    print(f"  next:     {summary['next']}")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _remarks(folders: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for folder, found in folders.items():
        path = Path(folder)
        if path.name.lower() not in _GOOD:
            if not _has_good(path):
                yield (
                    f"warning: training looks for good parts in SET/PRODUCT/good, and {folder} is none: of defective "
                    "parts it is a kind of defect, once there is a folder good beside it"
                )
        elif found["images"] < SENSIBLE:
            yield (
                f"{found['product']}: {_many(found['images'], 'good image')}; of {FEWEST} or more some are left for "
                f"`andon calibrate`, and about {SENSIBLE} of different parts let it promise 5 % false alarms "
                "(docs/images.md)"
            )


def _next(recording: Recording, asked: Asked) -> str:
    """The command that goes on with what was recorded."""
    good = [folder for folder in recording.folders if folder.name.lower() in _GOOD]
    if not good:
        folder = next(iter(recording.folders))
        if not _has_good(folder):  # neither training nor eval takes it yet
            return _again(asked, _good_beside(asked.out))
        return f"andon eval --bundle BUNDLE --data {quoted(_set_of(folder)[0])}"
    few = [folder for folder in good if len(_images(folder)) < FEWEST]
    if few:
        few_shots = f"; or, of 1 to 4 images: andon enroll --support {quoted(few[0])}"
        return _again(asked, asked.out) + (few_shots if len(_images(few[0])) <= 4 else "")
    data, others = _set_of(good[0])
    recorded = sorted({folder_name(_product_folder(folder)) for folder in good})
    where = "" if find_spec("torch") else f"copy {quoted(data)} to the workstation, then there: "
    only = f" --products {quoted(','.join(recorded))}" if others - set(recorded) else ""
    group = f" --group-by {quoted(GROUP_BY)}" if _several_of_a_part(good) else ""
    return f"{where}andon train --method hvq --data {quoted(data)}{only}{group}{_roi(recording)}"


def _again(asked: Asked, out: str) -> str:
    """The command that records as this one did, into `out`."""
    only = "".join(f" --camera {name}" for name in asked.cameras)
    only += "" if asked.every is None else f" --every {asked.every:g}"
    return f"andon record --config {quoted(asked.config)} --out {quoted(out)}{only} --count {SENSIBLE}"


def _has_good(folder: Path) -> bool:
    """Whether its product has good parts."""
    beside = _product_folder(folder).iterdir()
    return any(path.name.lower() in (*_GOOD, "train") and path.is_dir() for path in beside)


def _good_beside(out: str) -> str:
    """Where the good parts belong of a product whose defective ones go there."""
    above = Path(out).parent
    return str(above.parent / "train" / "good" if above.name == "test" else above / "good")


def _several_of_a_part(folders: Sequence[Path]) -> bool:
    """Whether every image names its part, and some name the same."""
    found = [re.search(GROUP_BY, path.name) for folder in folders for path in _images(folder)]
    parts = [match[1] for match in found if match is not None]
    return len(parts) == len(found) and len(set(parts)) < len(parts)


def _roi(recording: Recording) -> str:
    """--roi of what the cameras will cut out, where those of a product agree."""
    regions: dict[str, set[Any]] = {}
    for folder, shown in recording.folders.items():
        mine = regions.setdefault(folder_name(_product_folder(folder)), set())
        mine.update(recording.lanes[camera].config.roi for camera, _ in shown)
    agreed = {product: next(iter(found)) for product, found in regions.items() if len(found) == 1}
    said = {product: ",".join(map(str, roi)) for product, roi in agreed.items() if roi is not None}
    if len(regions) == 1:
        return "".join(f" --roi {roi}" for roi in said.values())
    return "".join(f" --roi {quoted(f'{product}={roi}')}" for product, roi in said.items())


def _product_folder(folder: Path) -> Path:
    """Of SET/PRODUCT/good and SET/PRODUCT/train/good it is SET/PRODUCT."""
    above = folder.absolute().parent
    return above.parent if above.name in ("train", "test") else above


def _set_of(folder: Path) -> tuple[Path, set[str]]:
    """What --data takes, and the products in it: SET, or SET/PRODUCT where SET has other things, too.

    Relative if the folder was.
    """
    product = _product_folder(folder)
    # Not by open_dataset: what is not a set may be a home folder with a million files.
    try:
        beside = [path for path in product.parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
        whole = all(any((path / inside).is_dir() for inside in (*_GOOD, "train")) for path in beside)
    except OSError:  # the lost+found of a disk, or other people's folders: no set
        whole = False
    found, products = (product.parent, {path.name for path in beside}) if whole else (product, {folder_name(product)})
    here = Path.cwd()
    near = not folder.is_absolute() and found.is_relative_to(here)
    return (found.relative_to(here) if near else found), products


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if on_disk(path))
