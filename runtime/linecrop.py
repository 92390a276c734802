"""A line's regions of interest against what its bundle was trained with: what is refused, what is said.

A camera without a `roi` is judged as the bundle says (crop.py). One that has a `roi` is judged by it, whatever the
bundle says: under a camera that is mounted otherwise, or has another resolution, the same part lies elsewhere in the
picture, and no one but the integrator knows that. So a difference is no refusal but a warning, at the start and in
`andon check`; with thresholds that were set on what this camera sees (`andon calibrate --roi`) there is none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress

from .bundle import Bundle
from .crop import crop_of, described, told
from .detector import AUTO
from .errors import AndonError, ConfigError, quoted
from .fingerprint import read_report
from .lineconfig import CameraConfig, LineConfig
from .manifest import Crop
from .regions import ROUNDING, clip_roi

log = logging.getLogger("andon.line")


def common_crop(bundle: Bundle, program: str, product: str | None) -> Crop | None:
    """What the bundle judges of pictures of a product, None: of whichever product its classifier will see there.

    Raises:
        ConfigError: the bundle judges another part of the picture for each product, and nobody says which it is.
    """
    found = [crop_of(bundle, each, program) for each in ((product,) if product else bundle.manifest.classes)]
    if any(crop != found[0] for crop in found):
        shown = zip(bundle.manifest.classes, found, strict=True)
        raise ConfigError(
            "product: auto without a roi: what to cut out of the picture depends on the product",
            found="; ".join(f"{name}: {'the whole picture' if crop is None else told(crop)}" for name, crop in shown),
            expected="the camera's roi, or its product",
            next_step="set 'roi' or 'product' of the camera",
        )
    return found[0]


def require_crop(name: str, camera: CameraConfig, product: str, bundle: Bundle, program: str) -> None:
    """Refuse a camera of which nobody could say what to judge of its pictures.

    Raises:
        ConfigError: `auto` without a `roi`, where the bundle judges another part of the picture for each product.
    """
    if product == AUTO and camera.roi is None and camera.source.kind != "dataset":  # which says the product
        try:
            common_crop(bundle, program, None)
        except ConfigError as error:
            step = f"set cameras.{name}.roi, or its product"
            raise ConfigError(
                f"camera {name}: {error.what}", found=error.found, expected=error.expected, next_step=step
            ) from error


def crop_remarks(config: LineConfig, bundle: Bundle, commanded: Mapping[str, str]) -> dict[str, list[str]]:
    """For each camera what is to be said of its region of interest: a line for what the bundle brings, and a warning
    (of several lines) where the camera's is not what the model or its thresholds come from.

    commanded: camera -> product, by command.
    """
    return {name: [*_remarks(name, camera, config, bundle, commanded)] for name, camera in config.cameras.items()}


def log_crops(config: LineConfig, bundle: Bundle, commanded: Mapping[str, str]) -> None:
    """Say the same in the log."""
    for name, remarks in crop_remarks(config, bundle, commanded).items():
        for text in remarks:
            said = text.removeprefix("warning: ")
            level = logging.INFO if said == text else logging.WARNING
            log.log(level, "camera %s: %s", name, "; ".join(line.strip() for line in said.splitlines()))


def _remarks(
    name: str, camera: CameraConfig, config: LineConfig, bundle: Bundle, commanded: Mapping[str, str]
) -> Iterator[str]:
    product = commanded.get(name, camera.product)
    products = [p for p in bundle.manifest.classes if product in (AUTO, p)]
    crops = {p: crop for p in products if (crop := crop_of(bundle, p, config.program)) is not None}
    if camera.roi is None:
        yield from described(crops, "as the bundle says")
        return
    sizes: dict[str, tuple[int, int]] = {}
    with suppress(OSError, ValueError):  # of a bundle that was removed while its line runs: nothing is to be said then
        sizes = read_report(bundle).get("pictures", {})
    for each in products:
        crop, size = crops.get(each), sizes.get(each)
        if crop is not None and clip_roi(camera.roi, *crop.picture) != clip_roi(crop.roi, *crop.picture):
            yield f"warning: {_differs(name, camera, bundle, each, crop)}"
        elif crop is None and size and any(size[i] > camera.roi[2 + i] + ROUNDING for i in (0, 1)):
            yield f"warning: {_whole(name, camera, bundle, each, size)}"


def _differs(name: str, camera: CameraConfig, bundle: Bundle, product: str, crop: Crop) -> AndonError:
    return ConfigError(
        f"cameras.{name}.roi is not what the bundle judges of {product}: its scores and thresholds may not hold",
        found=str(list(camera.roi or ())),
        expected=told(crop),
        next_step=f"remove cameras.{name}.roi, which takes the bundle's; or, where this camera sees {product} "
        f"elsewhere, set thresholds on its pictures: {_calibrate(camera, bundle, product)}",
    )


def _whole(name: str, camera: CameraConfig, bundle: Bundle, product: str, size: tuple[int, int]) -> AndonError:
    return ConfigError(
        f"cameras.{name}.roi cuts something out, and the bundle was trained on larger pictures of {product}, whole: "
        "its scores and thresholds may not hold",
        found=str(list(camera.roi or ())),
        expected=f"pictures of {size[0]} x {size[1]}",
        next_step=f"andon train --roi {_shown(camera)} with those pictures, then export and calibrate; where parts "
        f"look alike in both, set the thresholds: {_calibrate(camera, bundle, product)}",
    )


def _calibrate(camera: CameraConfig, bundle: Bundle, product: str) -> str:
    given = f"--products {quoted(product)} --roi {_shown(camera)}"
    return f"andon calibrate --bundle {quoted(bundle.path)} --data FOLDER {given}"


def _shown(camera: CameraConfig) -> str:
    return ",".join(map(str, camera.roi or ()))
