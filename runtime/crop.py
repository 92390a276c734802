"""What of a picture is judged: the same pixels in training, calibration, evaluation, enrolment and on the line.

A crop is a region of interest and the size of the pictures that it belongs to (manifest.Crop). A picture of that size
is cut out as the line cuts its frames (regions.py); one that has the size of what is cut out is taken as cut out
already; any other is of another camera or resolution, and refused, since nobody has said what of it to take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .bundle import Bundle
from .byproduct import by_product
from .dataset import Dataset, Sample
from .errors import SourceError
from .images import read_mask, read_rgb
from .manifest import Crop, Roi
from .regions import Box, clip_roi, cut_out

Array = NDArray[Any]
Size = tuple[int, int]
#: Opens a progress bar, of so many pictures and what is done with them; it has `update`.
Bar = Callable[[int, str], AbstractContextManager[Any]]
#: What --roi gives: a product and its region of interest, or no product and that of all which have none of their own.
Given = Sequence[tuple[str, Roi]]


def part_size(crop: Crop) -> Size:
    """Width and height of what is cut out."""
    box = clip_roi(crop.roi, *crop.picture)
    return crop.roi[2:] if box is None else box[2:]


def box_in(crop: Crop | None, width: int, height: int) -> Box | None:
    """What to take of a picture of this size, all of it without a crop; None: the crop does not say."""
    if crop is not None and (width, height) == crop.picture:
        return clip_roi(crop.roi, width, height)
    return (0, 0, width, height) if crop is None or (width, height) == part_size(crop) else None


def same_pixels(one: Crop | None, other: Crop | None) -> bool:
    """Whether two crops take the same of a picture; none takes all of it."""
    if one is not None and other is not None:
        return one.picture == other.picture and clip_roi(one.roi, *one.picture) == clip_roi(other.roi, *other.picture)
    return all(crop is None or part_size(crop) == crop.picture for crop in (one, other))


def cut(image: Array, crop: Crop | None, path: Path) -> Array:
    """What is judged of a picture [h, w] or [h, w, 3], a view of it. path: whose it is, for the message.

    Raises:
        SourceError: it is of a size of which the crop does not say what to take.
    """
    if crop is None:
        return image
    box = box_in(crop, image.shape[1], image.shape[0])
    if box is None:
        raise _other_size(path, (image.shape[1], image.shape[0]), crop)
    return cut_out(image, box)


def read_image(sample: Sample) -> Array:
    """What is judged of a sample's picture: uint8 [h, w, 3] RGB.

    Raises:
        SourceError: see :func:`andon.runtime.images.read_rgb` and :func:`cut`.
    """
    return cut(read_rgb(sample.path), sample.crop, sample.path)


def read_pair(sample: Sample) -> tuple[Array, Array | None]:
    """The same, with what its mask has there: bool [h, w], None without a mask. The mask's file is of the size of the
    picture's.

    Raises:
        SourceError: see :func:`andon.runtime.images.read_mask`, too.
    """
    return read_placed(sample)[:2]


def read_placed(sample: Sample, mask: bool = True) -> tuple[Array, Array | None, Box]:
    """The same (without the mask if it is not wanted), and where in the picture it lies, in pixels of the picture.

    Raises:
        SourceError: see :func:`read_pair`.
    """
    image = read_rgb(sample.path)
    shown = cut(image, sample.crop, sample.path)
    box = box_in(sample.crop, image.shape[1], image.shape[0]) or (0, 0, image.shape[1], image.shape[0])
    if sample.mask_path is None or not mask:
        return shown, None, box
    return shown, cut(read_mask(sample.mask_path, image.shape[:2]), sample.crop, sample.path), box


def cropped(samples: Iterable[Sample], crops: Mapping[str, Crop]) -> tuple[Sample, ...]:
    """The samples, each with the crop of its product."""
    return tuple(replace(s, crop=crops.get(s.product)) for s in samples)


def rois_by_product(given: Given, products: Sequence[str]) -> dict[str, Roi]:
    """What --roi says of each of these products; of some perhaps nothing.

    Raises:
        ProductError, ConfigError: see :func:`.byproduct.by_product`.
    """
    return by_product("--roi", "PRODUCT=X,Y,WIDTH,HEIGHT", given, products)


def measured(samples: Iterable[Sample], rois: Mapping[str, Roi], bar: Bar) -> dict[str, Crop]:
    """The crop of each product that has a region of interest, by the sizes of its pictures. All of them are read: one
    of another size is refused now, and not after the training.

    What cannot be decoded is passed over: whoever uses it says so.

    Raises:
        SourceError: the region lies in none of a product's pictures, they are of several sizes, or one is of a size of
            which nobody said what to take.
    """
    sizes: dict[str, dict[Size, Path]] = {product: {} for product in rois}
    mine = [sample for sample in samples if sample.product in sizes]
    if mine:
        with bar(len(mine), "sizes of pictures") as shown:
            for sample in mine:
                with suppress(SourceError):
                    height, width = read_rgb(sample.path).shape[:2]
                    sizes[sample.product].setdefault((width, height), sample.path)
                shown.update()
    return {product: crop_for(rois[product], found, product) for product, found in sizes.items() if found}


def crop_for(roi: Roi, sizes: Mapping[Size, Path], product: str) -> Crop:
    """The crop that a region of interest is in pictures of these sizes (width, height), of each of which one is named.

    Raises:
        SourceError: see :func:`measured`.
    """
    whole = [size for size in sizes if clip_roi(roi, *size) is not None]
    whole = [size for size in whole if size != roi[2:]] or whole  # the others are cut out already
    shown = ", ".join(f"{_pixels(size)} ({path})" for size, path in sizes.items())
    if not whole:
        raise SourceError(
            f"the region of interest {list(roi)} does not lie in the pictures of {product}",
            found=shown,
            expected=f"pictures of at least {_pixels((roi[0] + roi[2], roi[1] + roi[3]))}",
            next_step="give pictures as the camera takes them, or mend --roi; without it, if they are cut out already",
        )
    if len(whole) > 1:
        raise SourceError(
            f"the pictures of {product} are of several sizes: to which does the region of interest {list(roi)} belong?",
            found=shown,
            expected="pictures of one size, and what was cut out of such",
            next_step="take those of another camera or resolution out of the set, or put in what is cut out of them",
        )
    crop = Crop(roi=roi, picture=whole[0])
    for size, path in sizes.items():
        if box_in(crop, *size) is None:
            raise _other_size(path, size, crop)
    return crop


def crop_of(bundle: Bundle, product: str, program: str = "default", camera: str | None = None) -> Crop | None:
    """What is judged of a product's pictures, at a camera: of those that its threshold there was set on, or that were
    trained on."""
    threshold = bundle.threshold(product, program, camera)
    return bundle.manifest.crops.get(product) if threshold is None or threshold.crop is None else threshold.crop


def as_bundle(
    dataset: Dataset,
    bundle: Bundle,
    given: Given | None,
    bar: Bar,
    only: Sequence[str] | None = None,
    program: str = "default",
    camera: str | None = None,
) -> Dataset:
    """The set with what of its pictures the bundle judges, or what --roi says; it is printed.

    only: the products that are used; None: all of the set. camera: whose pictures they are, if it has thresholds of
    its own.

    Raises:
        ProductError, ConfigError, SourceError: --roi cannot be used, see :func:`rois_by_product` and :func:`measured`.
    """
    used = [p for p in dataset.products if only is None or p in only]
    rois = rois_by_product(given or (), used)
    crops = measured(dataset.samples, rois, bar)
    for text in described(crops, "as --roi says"):
        print(text)
    own = {p: crop_of(bundle, p, program, camera) for p in used if p in bundle.manifest.classes and p not in crops}
    known = {product: crop for product, crop in own.items() if crop is not None}
    for text in described(known, "as the bundle says"):
        print(text)
    return replace(dataset, samples=cropped(dataset.samples, {**known, **crops}))


def as_judged(samples: Sequence[Sample], bundle: Bundle, program: str, camera: str | None = None) -> tuple[Sample, ...]:
    """The samples with what of their pictures another program of the bundle judges: its thresholds may say another."""
    known = {s.product for s in samples}.intersection(bundle.manifest.classes)
    crops = {product: crop for product in known if (crop := crop_of(bundle, product, program, camera)) is not None}
    return cropped(samples, crops)


def described(crops: Mapping[str, Crop], why: str) -> list[str]:
    """A line for each crop: what is cut out of the pictures of which products."""
    lines = []
    for crop in dict.fromkeys(crops.values()):
        named = ", ".join(product for product, each in crops.items() if each == crop)
        already = (
            "" if part_size(crop) == crop.picture else f"; those of {_pixels(part_size(crop))} are cut out already"
        )
        lines.append(f"{named}: {list(crop.roi)} is cut out of pictures of {_pixels(crop.picture)}, {why}{already}")
    return lines


def told(crop: Crop) -> str:
    """A crop in a message."""
    return f"{list(crop.roi)} of pictures of {_pixels(crop.picture)}"


def _pixels(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def _other_size(path: Path, size: Size, crop: Crop) -> SourceError:
    return SourceError(
        f"{path} is neither a whole picture nor what is cut out of one",
        found=f"{_pixels(size)} pixels",
        expected=f"{_pixels(crop.picture)}, of which {list(crop.roi)} is cut out, or {_pixels(part_size(crop))}, cut "
        "out already",
        next_step="leave it out, or give pictures of one camera alone; of another camera than before say with --roi "
        "X,Y,WIDTH,HEIGHT (0,0,WIDTH,HEIGHT: all) what train, calibrate, eval or enroll are to cut out of them",
    )
