"""A line's regions of interest against what its bundle was trained with: what is refused, what is said.

A camera without a `roi` is judged as the bundle says (crop.py). One that has a `roi` is judged by it, whatever the
bundle says: under a camera that is mounted otherwise, or has another resolution, the same part lies elsewhere in the
picture, and no one but the integrator knows that. So a difference is no refusal but a warning, at the start and in
`andon check`; with thresholds that were set on what this camera sees (`andon calibrate --camera NAME --roi`) there is
none.

Thresholds of all cameras narrow what one without a `roi` judges, too, as scores and thresholds belong together.
Training did not do that, so it is a warning until the configuration says the same; and where another camera of the
product has a `roi` it may be that one's part of the picture, which `andon check` takes for an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from .bundle import Bundle
from .crop import crop_of, described, same_pixels, told
from .detector import AUTO
from .errors import AndonError, ConfigError, quoted
from .fingerprint import read_report
from .lineconfig import CameraConfig, LineConfig
from .manifest import Crop, Roi
from .regions import ROUNDING, clip_roi

log = logging.getLogger("andon.line")


def common_crop(bundle: Bundle, program: str, product: str | None, camera: str) -> Crop | None:
    """What the bundle judges of a camera's pictures of a product, None: of whichever its classifier will see there.

    Raises:
        ConfigError: the bundle judges another part of the picture for each product, and nobody says which it is.
    """
    found = [crop_of(bundle, each, program, camera) for each in ((product,) if product else bundle.manifest.classes)]
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
            common_crop(bundle, program, None, name)
        except ConfigError as error:
            step = f"set cameras.{name}.roi, or its product"
            raise ConfigError(
                f"camera {name}: {error.what}", found=error.found, expected=error.expected, next_step=step
            ) from error


@dataclass(frozen=True)
class Remark:
    """What is to be said of a camera's region of interest. level: of logging; ERROR where it is to be mended first."""

    level: int
    text: str


def crop_remarks(config: LineConfig, bundle: Bundle, commanded: Mapping[str, str]) -> dict[str, list[Remark]]:
    """For each camera what is to be said of its region of interest: what the bundle brings, and, in several lines,
    where the camera's is not what the model or its thresholds come from.

    commanded: camera -> product, by command.
    """
    return {name: [*_remarks(name, camera, config, bundle, commanded)] for name, camera in config.cameras.items()}


def log_crops(config: LineConfig, bundle: Bundle, commanded: Mapping[str, str]) -> None:
    """Say the same in the log; a line runs with an error, too, and is warned of it."""
    for name, remarks in crop_remarks(config, bundle, commanded).items():
        for remark in remarks:
            level = min(remark.level, logging.WARNING)
            log.log(level, "camera %s: %s", name, "; ".join(line.strip() for line in remark.text.splitlines()))


def _remarks(
    name: str, camera: CameraConfig, config: LineConfig, bundle: Bundle, commanded: Mapping[str, str]
) -> Iterator[Remark]:
    products = _products(name, config, bundle, commanded)
    crops = {p: crop for p in products if (crop := crop_of(bundle, p, config.program, name)) is not None}
    sizes: dict[str, tuple[int, int]] = {}
    with suppress(OSError, ValueError):  # of a bundle that was removed while its line runs: nothing is to be said then
        sizes = read_report(bundle).get("pictures", {})
    if camera.roi is None:
        shared = {p: c for p, c in crops.items() if not _apart(bundle, p, config.program, name)}
        apart = {p: c for p, c in shared.items() if not same_pixels(c, bundle.manifest.crops.get(p))}
        others = {p: _others_with_roi(name, p, config, bundle, commanded) for p in apart}
        odd = [p for p in apart if others[p] or p in bundle.manifest.crops or _larger(sizes.get(p), apart[p].roi)]
        for text in described({p: crop for p, crop in crops.items() if p not in odd}, "as the bundle says"):
            yield Remark(logging.INFO, text)
        for each in odd:
            level = logging.ERROR if others[each] else logging.WARNING
            yield Remark(level, str(_narrowed(name, config, bundle, each, crops[each], others[each])))
        return
    for each in products:
        known, size = crops.get(each), sizes.get(each)
        alone = all(
            other == name or each not in _products(other, config, bundle, commanded) for other in config.cameras
        )
        of = None if alone else name
        if known is not None and clip_roi(camera.roi, *known.picture) != clip_roi(known.roi, *known.picture):
            yield Remark(logging.WARNING, str(_differs(name, camera, bundle, each, known, of)))
        elif known is None and size and _larger(size, camera.roi):
            yield Remark(logging.WARNING, str(_whole(name, camera, bundle, each, size, of)))


def _larger(trained: tuple[int, int] | None, roi: Roi) -> bool:
    """Whether training took pictures of this size whole that are larger than what is cut out; of none it may have."""
    return trained is None or any(trained[i] > roi[2 + i] + ROUNDING for i in (0, 1))


def _products(name: str, config: LineConfig, bundle: Bundle, commanded: Mapping[str, str]) -> list[str]:
    """What a camera's frames may be judged as."""
    product = commanded.get(name, config.cameras[name].product)
    return [p for p in bundle.manifest.classes if product in (AUTO, p)]


def _apart(bundle: Bundle, product: str, program: str, camera: str) -> bool:
    """Whether a camera's thresholds say which part of the picture it judges: not those that somebody has chosen for it
    (andon calibrate --set), which took over what those of all cameras cut out."""
    own, shared = bundle.own_threshold(product, program, camera), bundle.threshold(product, program)
    return own is not None and (own.promises or shared is None or own.crop != shared.crop)


def _others_with_roi(
    name: str, product: str, config: LineConfig, bundle: Bundle, commanded: Mapping[str, str]
) -> list[str]:
    """Cameras that are judged as the same product by the same thresholds, and see it where their own `roi` is."""
    return [
        other
        for other, camera in config.cameras.items()
        if other != name
        and camera.roi is not None
        and product in _products(other, config, bundle, commanded)
        and not _apart(bundle, product, config.program, other)
    ]


def _narrowed(name: str, config: LineConfig, bundle: Bundle, product: str, crop: Crop, others: list[str]) -> AndonError:
    trained = bundle.manifest.crops.get(product)
    again = trained.roi if trained else (0, 0, *crop.picture)
    steps = [_calibrate(bundle, product, config.cameras[other].roi, other) for other in others]
    steps.append(f"thresholds of all cameras on what the model was trained on: {_calibrate(bundle, product, again)}")
    about = f"cameras.{name}.roi is not set: it judges what the thresholds of {product} were set on (andon calibrate "
    about += "--roi), not what the model was trained on"
    if others:
        verb = "has" if len(others) == 1 else "have"
        about += f"; {', '.join(others)} {verb} a roi and the same thresholds, and it may be meant for there alone"
    return ConfigError(
        about,
        found=told(crop),
        expected=told(trained) if trained else "the whole picture",
        next_step=f"if it is meant, say so: cameras.{name}.roi: {list(crop.roi)}; if not, {'; '.join(steps)}",
    )


def _differs(name: str, camera: CameraConfig, bundle: Bundle, product: str, crop: Crop, of: str | None) -> AndonError:
    return ConfigError(
        f"cameras.{name}.roi is not what the bundle judges of {product}: its scores and thresholds may not hold",
        found=str(list(camera.roi or ())),
        expected=told(crop),
        next_step=f"remove cameras.{name}.roi, which takes the bundle's; or, where this camera sees {product} "
        f"elsewhere, set thresholds on its pictures: {_calibrate(bundle, product, camera.roi, of)}",
    )


def _whole(
    name: str, camera: CameraConfig, bundle: Bundle, product: str, size: tuple[int, int], of: str | None
) -> AndonError:
    return ConfigError(
        f"cameras.{name}.roi cuts something out, and the bundle was trained on larger pictures of {product}, whole: "
        "its scores and thresholds may not hold",
        found=str(list(camera.roi or ())),
        expected=f"pictures of {size[0]} x {size[1]}",
        next_step=f"andon train --roi {_shown(camera.roi)} with those pictures, then export and calibrate; where parts "
        f"look alike in both, set the thresholds: {_calibrate(bundle, product, camera.roi, of)}",
    )


def _calibrate(bundle: Bundle, product: str, roi: Roi | None, camera: str | None = None) -> str:
    """The command that sets thresholds on a part of the picture: of one camera, or of all."""
    given = f"--products {quoted(product)} {'' if camera is None else f'--camera {quoted(camera)} '}--roi {_shown(roi)}"
    return f"andon calibrate --bundle {quoted(bundle.path)} --data FOLDER {given}"


def _shown(roi: Roi | None) -> str:
    return ",".join(map(str, roi or ()))
