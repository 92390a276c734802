"""The figures that training measured in torch, to put beside the engines': only where both are of the same images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .bundle import Bundle
from .dataset import Dataset
from .detector import Detector
from .errors import ConfigError
from .evaluation import Evaluated, Judged
from .quality import Metrics
from .unlike import has_past
from .verdict import readable
from .wiring import programs


@dataclass(frozen=True)
class Beside:
    """Image AUROC by torch and by the engines, of each product.

    apart: why a product that was evaluated with other images has none: a difference would say nothing of the export.
    past: why a difference is none of the export's, or empty.
    """

    torch: dict[str, float | None]
    engines: dict[str, float | None]
    apart: dict[str, str]
    past: str = ""

    def texts(self) -> dict[str, str]:
        """What to say of each product."""
        said = {product: f"image AUROC not beside torch's: {why}" for product, why in self.apart.items()}
        for product, value in self.torch.items():
            both = ", ".join(f"{n} {_shown(v)}" for n, v in (("torch", value), ("engines", self.engines[product])))
            said[product] = f"image AUROC {both}" + (f" ({self.past})" if self.past else "")
        return said


@dataclass(frozen=True)
class TorchFigures:
    """What the training of a bundle recorded: metrics by product, of the test images of `data` that were new to it.

    data: the folder, or the name of a set that is none; empty where it is not known.
    """

    products: Mapping[str, Metrics]
    data: str

    def beside(self, evaluated: Evaluated, dataset: Dataset, split: str, past: str) -> Beside:
        """These figures beside the engines', of the products whose images are the same. past: see :class:`Beside`."""
        other = {product: self.other_images(product, m, dataset, split) for product, m in evaluated.products.items()}
        same = [product for product, why in other.items() if not why]
        return Beside(
            {product: self.products.get(product, {}).get("image_AUROC") for product in same},
            {product: evaluated.products[product].get("image_AUROC") for product in same},
            {product: why for product, why in other.items() if why},
            past,
        )

    def other_images(self, product: str, metrics: Metrics, dataset: Dataset, split: str) -> str:
        """Why these metrics are not of the images that training measured; empty: nothing says so.

        A set that was copied keeps its name; and some of a set's images (--limit, undecodable, UNKNOWN) are fewer.
        """
        if split != "test":
            return f"torch's figure is of the test split, this of {split}"
        if self.data and not _names(self.data) & _names(dataset.spec):
            return f"torch's figure is of {self.data}"
        recorded, kinds = self.products.get(product, {}), ("good", "defective")
        if any(recorded.get(kind) not in (None, metrics.get(kind)) for kind in kinds):
            theirs, ours = (
                " and ".join(f"{m[kind] or 0:.0f} {kind}" for kind in kinds if kind in m) for m in (recorded, metrics)
            )
            return f"torch's figure is of {theirs} images, this of {ours}"
        return ""


def past_of(detector: Detector, judged: Sequence[Judged], recorded: bool) -> str:
    """Why the engines' scores are not what torch computes, where the program goes on from frame to frame: torch starts
    every image from the state that the bundle was made with. Empty for other programs.

    recorded: the images were judged by a line, which ran this program or another; its memory may have learnt.
    """
    manifest, name = detector.bundle.manifest, detector.program_name
    if any(j.learnt for j in judged):
        return (
            "not one computation: the line's memory learnt while it ran, torch's did not, so a difference says nothing "
            "of the export"
        )
    if not has_past(manifest, name):
        return ""
    others = [other for other in programs(manifest) if not has_past(manifest, other)]
    compares = (
        f"to compare, take a program without a past: andon eval --program {others[0]}"
        + (f" (or {', '.join(others[1:])})" if others[1:] else "")
        if others
        else "the bundle has no program without a past, which would be one to compare"
    )
    who = f"program {name}, if the line ran that," if recorded else f"program {name}"
    return (
        f"not one computation: {who} goes on from the image before, torch starts each image afresh, so a difference "
        f"says nothing of the export; {compares}"
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _names(data: str) -> set[str]:
    """What a set is called: its folder's name, and that of the folder which it is a link to."""
    return {readable(path.name) for path in (Path(data).absolute(), Path(data).resolve())}


def torch_figures(checkpoint: Path, bundle: Bundle) -> TorchFigures:
    """The figures of the torch model that the bundle was made from, as its training recorded them.

    Raises:
        ConfigError: the folder has no metrics, or is another model's checkpoint.
    """
    try:
        provenance = json.loads((checkpoint / "provenance.json").read_text(encoding="utf-8"))
        weights = provenance["weights_sha256"]
        recorded = json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8"))["products"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"no metrics in {checkpoint}",
            found=error,
            expected="provenance.json and metrics.json",
            next_step="andon train without --no-eval",
        ) from error
    if weights != bundle.manifest.checkpoint_sha256:
        made = bundle.manifest.checkpoint_sha256[:12]
        raise ConfigError(
            f"{checkpoint} is not the checkpoint the bundle was made from",
            found=weights[:12],
            expected=made or "no checkpoint: the bundle was enrolled",
            next_step="give the right --checkpoint, or export this one" if made else "leave --checkpoint out",
        )
    return TorchFigures(recorded, str(provenance.get("data_path") or provenance.get("data", "")))
