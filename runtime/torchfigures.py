"""The figures that training measured in torch, to put beside the engines': only where both are of the same images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .bundle import Bundle
from .dataset import Dataset
from .errors import ConfigError
from .quality import Metrics
from .verdict import readable


@dataclass(frozen=True)
class TorchFigures:
    """What the training of a bundle recorded: metrics by product, of the test images of `data` that were new to it.

    data: the folder, or the name of a set that is none; empty where it is not known.
    """

    products: Mapping[str, Metrics]
    data: str

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
