"""How well a bundle's classifier told products apart when it was exported, and what a line that goes by it should know.

METHODS.md 1.3 asks for 99.5 % of good frames that it has not been trained on. Less is no reason to refuse a bundle:
most lines name their product. Export measures it and writes it into the manifest's `verification`, where every station
that does not know of it leaves it alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from .bundle import Bundle
from .detector import AUTO
from .errors import ConfigError
from .lineconfig import LineConfig
from .manifest import Manifest

log = logging.getLogger("andon.line")

#: Share of held-out good frames of each product that the classifier should tell right
RIGHT_PRODUCT = 0.995
#: Key of the manifest's `verification`: product -> [frames told right, frames]
RECORD = "right_product"


def told_right(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Product -> held-out good frames that the classifier told right at export, and of how many.

    Empty for a bundle without a classifier, and for those of before this was measured.
    """
    record = manifest.verification.get(RECORD)
    if not isinstance(record, dict):
        return {}
    return {product: (int(right), int(of)) for product, (right, of) in record.items() if product in manifest.classes}


def shown(counts: Mapping[str, tuple[int, int]]) -> str:
    """The counts for people: "mono 20 of 20, poly 38 of 40"."""
    return ", ".join(f"{product} {right} of {of}" for product, (right, of) in counts.items())


def classifier_remarks(config: LineConfig, bundle: Bundle, commanded: Mapping[str, str]) -> Iterator[ConfigError]:
    """What to say (not to raise) where a line rests on a classifier that told too few frames right.

    commanded: camera -> product, by command.
    """
    counts = told_right(bundle.manifest)
    weak = {product: (right, of) for product, (right, of) in counts.items() if right < RIGHT_PRODUCT * of}
    if not weak:
        return
    named = {name: commanded.get(name, camera.product) for name, camera in config.cameras.items()}
    played = {name for name, camera in config.cameras.items() if camera.source.kind == "dataset"}  # images say theirs
    found = f"{shown(weak)} held-out good frames told right at export"
    expected = f"at least {RIGHT_PRODUCT:.1%} of each product's"
    if autos := [name for name, product in named.items() if product == AUTO and name not in played]:
        yield ConfigError(
            f"product: auto of {', '.join(autos)}: the bundle's classifier is unsure, and a part that it takes for "
            "another product is judged as that: it may be OK with a defect, or NG without",
            found=found,
            expected=expected,
            next_step="name the camera's product, or have it sent (command product, docs/mqtt.md); or train longer, "
            "on more images of these",
        )
    theirs = {product for name, product in named.items() if name not in played} | ({*weak} if played else set())
    if config.judge.check_product and (unsure := [product for product in weak if product in theirs]):
        yield ConfigError(
            f"judge.check_product: the bundle's classifier is unsure of {', '.join(unsure)}: good parts will be "
            "UNKNOWN, wrong_product",
            found=found,
            expected=expected,
            next_step="remove judge.check_product, or train longer, on more images of these",
        )


def log_classifier(config: LineConfig, bundle: Bundle, commanded: Mapping[str, str]) -> None:
    """Say the same in the log."""
    for remark in classifier_remarks(config, bundle, commanded):
        log.warning("%s", "; ".join(line.strip() for line in str(remark).splitlines()))
