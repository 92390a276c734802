"""The good images on which thresholds may be set: those that neither the model nor its constants have seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from .bundle import Bundle
from .dataset import Dataset, Sample, named_by_folder
from .errors import CalibrationError, quoted
from .fingerprint import Seen, counted, read_report, tally, unpack
from .groups import known_parts, parts_of

HELD_OUT = "held out by training"
NEW = "new good images, none of them held out by training"


@dataclass(frozen=True)
class Unseen:
    """samples: images to set thresholds on. origin: what they are, for the record.

    left_out: how many good images of the set were seen, by use (fingerprint.USES). remark: what the user should know.
    kept: how many new good images are left to the tests of a folder whose split nobody made.
    parts: the part that an image shows, by its key, of those that are known to be of a part with others.
    seen: images of the set that shaped the model.
    """

    samples: list[Sample]
    origin: str
    left_out: dict[str, int] = field(default_factory=dict)
    remark: str = ""
    kept: int = 0
    parts: Mapping[str, str] = field(default_factory=dict)
    seen: Sequence[Sample] = ()

    def count(self, product: str) -> int:
        """How many different parts of a product there are, as far as is known: what a promise depends on."""
        return len({self.parts.get(s.key, s.key) for s in self.samples if s.product == product})


def unseen_good(
    bundle: Bundle, dataset: Dataset, only: Sequence[str] | None = None, group_by: str | None = None
) -> Unseen:
    """Good images that the model has not been fitted to, new ones never from a test split.

    only: of these products of the bundle; None: of all. group_by: which images show one part (groups.parts_of); None:
    what training recorded of those that it held out, and every other image a part of its own.

    Images are known by content: those that training held out are used wherever they lie, those that it fitted, that
    set constants or that were enrolled from are left out, all others are new. So are those that the present thresholds
    were set on, which are used again even where the set has come to call them test images. A folder of good images
    alone that nobody has split and of which training saw none is nobody's test: all of it is used. A bundle that has
    no record of contents goes by the images' keys instead: then the held-out ones are used if the set has them, else
    all are taken for new.

    Raises:
        CalibrationError: a product has no image in the set, or none (of a part) that the model has not seen; by keys
            also: the set has some of the held-out images but not all.
        SourceError: an image cannot be read.
        ConfigError: `group_by` cannot be used.
    """
    found = _find(bundle, dataset, only)
    return found if group_by is None else _of_new_parts(found, group_by, dataset.spec)


def _of_new_parts(found: Unseen, group_by: str, spec: str) -> Unseen:
    """The images that show no part of which the model has seen another picture, and the part of each.

    Raises:
        CalibrationError: a product has none.
    """
    parts = parts_of(found.samples, group_by)
    theirs = known_parts(found.seen, group_by)
    known = {(s.product, theirs[s.key]) for s in found.seen if s.key in theirs}
    new = [s for s in found.samples if (s.product, parts[s.key]) not in known]
    for product in dict.fromkeys(s.product for s in found.samples):
        if not any(s.product == product for s in new):
            raise CalibrationError(
                f"the model has seen every part of {product} in {spec}",
                found=f"{sum(s.product == product for s in found.samples)} images that it has not seen, all of parts "
                "of which it was trained on other pictures",
                expected="pictures of parts that it has not seen",
                next_step=f"train again with --group-by {quoted(group_by)}, or give pictures of new parts with --data",
            )
    remark = found.remark
    if gone := len(found.samples) - len(new):
        text = f"left out: {gone} images of parts of which the model has seen other pictures"
        remark = f"{remark}\n{text}" if remark else text
    return replace(found, samples=new, parts=parts, remark=remark)


def _find(bundle: Bundle, dataset: Dataset, only: Sequence[str] | None) -> Unseen:
    wanted = bundle.manifest.classes if only is None else only
    if missing := [p for p in wanted if p not in dataset.products]:
        some = "give a data set with every product of the bundle, or name with --products those that it has; "
        raise CalibrationError(
            f"{dataset.spec} has no images of {', '.join(missing)}",
            found=", ".join(dataset.products),
            expected=", ".join(wanted),
            next_step=(some if len(missing) < len(wanted) else "") + named_by_folder(missing),
        )
    if (seen := Seen.of(bundle)) is not None:
        tested = {s.product for s in dataset.samples if not s.good}
        return _by_content(bundle, dataset.select(products=wanted, good=True), seen, dataset.drawn - tested)
    # A key does not say of which product an image is: whether all are there can be told of the whole set only.
    present = [p for p in bundle.manifest.classes if p in dataset.products]
    found = _by_key(bundle, dataset.select(products=present, good=True))
    return replace(found, samples=[s for s in found.samples if s.product in wanted])


def _by_content(bundle: Bundle, good: Dataset, seen: Seen, untested: frozenset[str]) -> Unseen:
    """untested: products that nobody split and that have no defects to test on."""
    # Of a product's copies the first alone: another promises nothing more. Two products may share an image.
    known = {(k.sample.product, k.fingerprint): k for k in reversed(seen.sort(good.samples))}.values()
    whole = untested - {k.sample.product for k in known if k.use not in (None, "calibrated")}
    kept = {k.sample.key for k in known if k.use is None and k.sample.split == "test" and k.sample.product not in whole}
    held = [k.sample for k in known if k.use == "thresholds"]
    new = [k.sample for k in known if k.use in (None, "calibrated") and k.sample.key not in kept]
    for product in good.products:
        if not any(s.product == product for s in [*held, *new]):
            mine = tally(k.use for k in known if k.sample.product == product)
            raise CalibrationError(
                f"the model has seen every good image of {product} in {good.spec}",
                found=counted(mine) or "no good image outside the test split",
                expected="good images that it has not seen",
                next_step="collect some and give their folder with --data",
            )
    usable = ("thresholds", "calibrated")
    left_out = tally(k.use for k in known if k.use not in usable and k.sample.split == "train")
    names = _recorded(bundle, "holdout")
    remark = ""
    if not held and names and names <= {s.key for s in good.samples}:
        remark = (
            f"the images are named like those of training, but none has the content of one of the {len(names)} that it "
            "held out: if they are training's, saved anew, give the set that training read"
        )
    origin = HELD_OUT if held else NEW
    if held and new:
        origin = f"{len(held)} {HELD_OUT} and {len(new)} new"
    chosen = {s.key for s in [*held, *new]}
    drawn = sum(s.key in kept for s in good.samples if s.product in good.drawn)
    recorded = {p: f"\0{i}" for i, text in enumerate(read_report(bundle).get("parts", ())) for p in unpack(text)}
    parts = {k.sample.key: recorded[k.fingerprint] for k in known if k.fingerprint in recorded}
    shaped = [k.sample for k in known if k.use in ("fitted", "constants", "support")]
    return Unseen([s for s in good.samples if s.key in chosen], origin, left_out, remark, drawn, parts, shaped)


def _by_key(bundle: Bundle, good: Dataset) -> Unseen:
    keys, constants = _recorded(bundle, "holdout"), _recorded(bundle, "constants")
    usable: Sequence[Sample] = good.select(split="train").samples
    present = [s for s in usable if s.key in keys]
    if present and len(present) < len(keys):
        raise CalibrationError(
            f"{good.spec} has only some of the images that training held out",
            found=f"{len(present)} of {len(keys)}",
            expected="all of them, or none (new images of good parts)",
            next_step="give the same --data as in training",
        )
    if present:
        return Unseen(present, HELD_OUT)
    if known := [s for s in usable if s.key in constants]:
        raise CalibrationError(
            f"training kept no image of {good.spec} for thresholds, the set was too small",
            found=f"{len(known)} images that set the model's constants, and those it was trained on",
            expected="good images that training has not seen",
            next_step="collect some and give their folder with --data",
        )
    return Unseen(list(usable), NEW)


def _recorded(bundle: Bundle, use: str) -> frozenset[str]:
    """Keys of the good images that training kept for that use (`holdout` or `constants`), from the bundle's report."""
    return frozenset(read_report(bundle).get(use, ()))
