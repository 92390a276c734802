"""Whether a bundle's thresholds hold with the engines that run: those they were calibrated with, or agreeing ones.

A threshold's promise is about scores as the calibration's engines gave them. Export's gate shows which precisions keep
FP32's decisions, so a threshold set in one of those may be run in another; `andon verify` shows that this machine's
engines do what export's did. Of what no gate has seen nobody knows: then it has to be calibrated as it runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from .bundle import Bundle
from .errors import CalibrationError, quoted
from .manifest import Manifest, Threshold, Variant


def other_engines(
    bundle: Bundle,
    programs: Sequence[str],
    variant: Variant,
    backend: str,
    in_force: Mapping[str, Collection[float | None]] | None = None,
    cameras: Collection[str] | None = None,
) -> list[CalibrationError]:
    """What to say (not to raise) of thresholds that were calibrated in a precision whose decisions nothing has shown to
    agree with those in this one; each such precision once.

    programs: those that run. in_force: the thresholds that do, by product, at any camera; one that is not the bundle's
    was set by somebody who saw what runs, and promises nothing. None: the bundle's. cameras: those that run, for
    thresholds of their own; None: all that the bundle has any of.

    Nothing is said of thresholds that do not record their precision: they are of before that was written down.
    """
    found: dict[tuple[str | None, Variant, str], dict[str, list[str]]] = {}
    for camera, product, program, entry in bundle.manifest.calibrated():
        runs = program in programs and (camera is None or cameras is None or camera in cameras)
        if not runs or not _is_own(entry, product, in_force):
            continue
        engines = _engines(entry)
        if engines is not None and not _agree(bundle.manifest, program, engines, (variant, backend)):
            found.setdefault((camera, *engines), {}).setdefault(program, []).append(product)
    return [_said(bundle, of, each[0], (each[1], each[2]), (variant, backend)) for each, of in found.items()]


def unknown_cameras(bundle: Bundle, cameras: Collection[str]) -> list[CalibrationError]:
    """What to say of thresholds that were calibrated for cameras which a line does not have: a name may be wrong."""
    if not (unknown := [camera for camera in bundle.manifest.camera_thresholds if camera not in cameras]):
        return []
    return [
        CalibrationError(
            "the bundle has thresholds for cameras that this line does not have, and they are not used",
            found=", ".join(unknown),
            expected=", ".join(cameras),
            next_step="calibrate with --camera and one of these names, or take them out: andon calibrate --bundle "
            f"{quoted(bundle.path)} --forget-camera {quoted(unknown[0])}; nothing, if it is another line's camera",
        )
    ]


def _engines(entry: Threshold) -> tuple[Variant, str] | None:
    """What a threshold was set with, if that is known: enrolling, which records nothing that stations of before would
    refuse, does it in FP32 on onnxruntime."""
    if entry.variant is not None:
        return entry.variant, entry.backend
    return ("fp32", "onnxruntime") if entry.source.startswith("provisional") else None


def _is_own(entry: Threshold, product: str, in_force: Mapping[str, Collection[float | None]] | None) -> bool:
    return in_force is None or entry.value in in_force.get(product, ())


def _agree(manifest: Manifest, program: str, one: tuple[Variant, str], other: tuple[Variant, str]) -> bool:
    """Whether engines of two (precision, backend) are known to decide alike.

    FP32 is FP32 everywhere: `andon verify` holds it to a thousandth. Reduced ones round as each backend does, so the
    same precision elsewhere needs the gate, too. That of a bundle made by enrolling has seen another product's memory.
    """
    if one == other or one[0] == other[0] == "fp32":
        return True
    enrolled = "enrolled_from" in manifest.verification
    return all(variant == "fp32" or (manifest.gated(variant, program) and not enrolled) for variant, _ in (one, other))


def _said(
    bundle: Bundle,
    of: Mapping[str, Sequence[str]],
    camera: str | None,
    calibrated: tuple[Variant, str],
    running: tuple[Variant, str],
) -> CalibrationError:
    products = list(dict.fromkeys(product for each in of.values() for product in each))
    noun = "program" if len(of) == 1 else "programs"
    again = f"andon calibrate --bundle {quoted(bundle.path)} --data GOOD-IMAGES --variant {running[0]} --backend "
    again += f"{running[1]} --programs {' '.join(of)}{'' if camera is None else f' --camera {quoted(camera)}'}"
    whose = f"{', '.join(products)}{'' if camera is None else f' at {camera}'}"
    return CalibrationError(
        f"thresholds of {whose} ({noun} {', '.join(of)}) were calibrated with other engines, and no gate "
        "has shown that decisions agree: more false alarms than promised are possible, or more misses",
        found=f"to run in {running[0]} on {running[1]}",
        expected=f"{calibrated[0]} on {calibrated[1]}, as calibrated",
        next_step=f"{again}, on the machine that runs; or run in {calibrated[0]} (variant: {calibrated[0]})",
    )
