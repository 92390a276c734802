"""From a frame to a verdict: OK, NG, or UNKNOWN with a reason. Whatever goes wrong with one frame ends here.

The thread that owns the engines owns the judge.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from .bundle import Bundle
from .crop import box_in, told
from .detector import AUTO, Detector
from .detector import Judgement as Scored
from .errors import AndonError, BundleError, ConfigError, ProductError, SourceError
from .judgement import Judgement, OnlineMemory
from .lineconfig import CameraConfig, JudgeConfig
from .linecrop import common_crop
from .linethresholds import in_model, require_model
from .manifest import Threshold
from .overrides import Overrides
from .products import require_change, require_product
from .regions import Box, clip_roi, cut_out, find_regions
from .slot import Missed
from .thresholds import calibration_step, threshold_in_force
from .types import Frame, Label, Region, Verdict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Decision:
    """Label and reason with what led to them."""

    label: Label
    reason: str
    detail: str = ""
    product: str | None = None
    score: float | None = None
    threshold: float | None = None
    regions: tuple[Region, ...] = ()


@dataclass
class _Smooth:
    """Exponential mean of one camera's scores; starts again when the product changes."""

    product: str = ""
    value: float = math.nan

    def add(self, weight: float, product: str, score: float) -> float:
        fresh = product != self.product or math.isnan(self.value)
        self.product, self.value = product, score if fresh else weight * score + (1 - weight) * self.value
        return self.value


class _Refusal(Exception):
    """A frame that cannot be judged; carries the decision."""

    def __init__(self, reason: str, detail: str, **found: Any):
        super().__init__(detail)
        self.decision = _Decision("UNKNOWN", reason, detail, **found)


class Judge:
    """Judges frames with one detector.

    Args:
        detector: the opened program.
        cameras, settings: of the line configuration; :meth:`configure` replaces them between frames.
        overrides: products and thresholds that commands have set.
        new_id: gives the verdicts' identifiers.
        memory: online calibration, if there is any.
    """

    def __init__(
        self,
        detector: Detector,
        cameras: Mapping[str, CameraConfig],
        settings: JudgeConfig,
        overrides: Overrides,
        new_id: Callable[[], str],
        memory: OnlineMemory | None = None,
    ):
        self.detector = detector
        self._overrides = overrides
        self._new_id = new_id
        self._memory = memory
        self._smooth: dict[str, _Smooth] = {}
        self._trouble: dict[str, str] = {}
        self._memory_trouble = ""
        overrides.use(detector.bundle, detector.program.name)
        self.configure(cameras, settings)

    def configure(self, cameras: Mapping[str, CameraConfig], settings: JudgeConfig) -> None:
        """Take over settings, from the next frame on.

        Raises:
            ProductError: a camera's product, or one with a threshold, is unknown to the bundle.
        """
        bundle = self.detector.bundle
        for camera in cameras.values():
            if camera.product != AUTO:
                bundle.class_index(camera.product)
        for product in settings.thresholds:
            bundle.class_index(product)
        for name, product in self._overrides.products.items():
            try:
                if name in cameras:
                    require_product(name, cameras[name], product, bundle, self.detector.program.name)
            except AndonError as error:  # judged as the configuration's product, a part could wrongly be OK
                log.error(
                    "product %s of %s by command cannot be judged (%s): send the command product again",
                    product, name, error.what,
                )  # fmt: skip
        self._cameras, self._settings = cameras, settings
        self._use_thresholds()

    def set_threshold(
        self, product: str, value: float | None, by: str | None = None, camera: str | None = None
    ) -> dict[str, float | None]:
        """Override a product's threshold at a camera, or (None) at all of them, or take the override back with a value
        of None; kept over restarts and audited.

        It is for this model and program only; a new calibration does not change it.

        Raises:
            ProductError: unknown product.
            ConfigError: it cannot be written; nothing has changed.
        """
        self.detector.bundle.class_index(product)
        before = self.threshold(product, camera)
        others = [name for name in self._cameras if name != camera]
        self._overrides.set_threshold(product, value, before, by, camera, others)
        self._use_thresholds()
        return {"before": before, "now": self.threshold(product, camera)}

    def set_product(self, camera: str, product: str | None, by: str | None = None) -> dict[str, str]:
        """Change the product a camera expects; None goes back to the configuration's.

        Raises:
            ProductError: unknown product.
            ConfigError: no such camera, one whose images name their product, `auto` of several products without a
                classifier, or it cannot be written; nothing has changed.
        """
        if camera not in self._cameras:
            raise ConfigError(f"no camera '{camera}'", found=camera, expected=", ".join(self._cameras))
        if product is not None:
            self._require_change(camera, product)
        before = self.product_of(camera)
        self._overrides.set_product(camera, product, before, by)
        self._smooth.pop(camera, None)
        return {"before": before, "now": self.product_of(camera)}

    def takes(self, camera: str, product: str) -> bool:
        """Whether :meth:`set_product` takes it; from any thread."""
        try:
            self._require_change(camera, product)
        except (AndonError, KeyError):  # no such camera
            return False
        return True

    def _require_change(self, camera: str, product: str) -> None:
        require_change(camera, self._cameras[camera], product, self.detector.bundle, self.detector.program.name)

    def threshold(self, product: str, camera: str | None = None) -> float | None:
        """The threshold in force at a camera: a command's, else the configuration's, else the bundle's. None: what
        holds where a camera has none of its own."""
        bundle, program = self.detector.bundle, self.detector.program.name
        return threshold_in_force(product, bundle, program, self._settings, self._overrides.stored, camera)

    def expecting(self, product: str) -> list[str]:
        """The cameras that are judged as this product, or may be: `auto` is any."""
        return [camera for camera in self._cameras if self.product_of(camera) in (product, AUTO)]

    def in_force(self) -> dict[str, set[float | None]]:
        """Product -> the thresholds in force at the cameras that expect it."""
        products = {product: self.expecting(product) for product in self.detector.bundle.manifest.classes}
        return {p: {self.threshold(p, camera) for camera in cameras} for p, cameras in products.items() if cameras}

    def require_thresholds(self, bundle: Bundle) -> None:
        """Refuse a bundle in whose place products that can be judged now could not be, for want of a threshold, or
        would be by a number that nobody said is for its model.

        Any thread may ask.

        Raises:
            BundleError: it has none for a product that has one now, names them; or see :func:`require_model`.
        """
        require_model(self._settings, self.detector.bundle, bundle, self.detector.program.name)
        program, commanded = self.detector.program.name, self._overrides.stored
        lost = [
            product
            for product in bundle.manifest.classes
            if any(
                threshold_in_force(product, bundle, program, self._settings, commanded, camera) is None
                and self.threshold(product, camera) is not None
                for camera in self.expecting(product)
            )
        ]
        if lost:
            raise BundleError(
                f"{bundle.path} has no threshold for {', '.join(lost)}, which the line judges now",
                found=f"bundle {bundle.id} without calibration",
                expected="thresholds, as the bundle that runs has them: else every verdict would be UNKNOWN",
                next_step=calibration_step(bundle),
            )

    def product_of(self, camera: str) -> str:
        """The product a camera expects: a command's, else the configuration's; 'auto': by the classifier."""
        return self._overrides.products.get(camera, self._cameras[camera].product)

    def _use_thresholds(self) -> None:
        """Look up once what every camera hands to the detector, the one place where scores are compared."""
        classes = self.detector.bundle.manifest.classes
        self._thresholds = {name: tuple(self._promise(each, name) for each in classes) for name in self._cameras}

    def _promise(self, product: str, camera: str) -> Threshold | None:
        calibrated = self.detector.bundle.threshold(product, self.detector.program.name, camera)
        value = self.threshold(product, camera)
        pixel = in_model(self._settings.pixel_threshold, self.detector.bundle, self.detector.program.name)
        if pixel is None and calibrated is not None:
            pixel = calibrated.pixel
        if value is None:
            return None
        if calibrated is not None:
            return calibrated.model_copy(update={"value": value, "pixel": pixel})
        return Threshold(value=value, false_alarm_rate=1.0, samples=0, pixel=pixel, source="set by hand")

    def judge(self, frame: Frame) -> Judgement:
        """Judge one frame. Never raises for anything that is wrong with this frame, its product or an engine."""
        started = time.monotonic()
        box: Box = (0, 0, 0, 0)
        scored: Scored | None = None
        name = self._new_id()
        try:
            box = self._box(frame)
            scored = self._score(frame, box)
            if self._memory is not None and self._memory.teaches_first:
                scored = self._taught(self._memory, frame, scored, box, name)
            decision = self._decide(frame, scored, box)
        except _Refusal as refusal:
            decision = refusal.decision
        self._report(frame.camera, decision)
        latency = {"wait": (started - frame.monotonic) * 1e3, **(scored.latency_ms if scored else {})}
        latency["total"] = (time.monotonic() - frame.monotonic) * 1e3
        return Judgement(self._verdict(frame, decision, latency, name), scored, box, decision.detail)

    def unknown(self, item: Missed) -> Judgement:
        """The verdict of a part or camera without a picture."""
        decision = _Decision("UNKNOWN", item.reason, item.detail, product=self._product(item))
        self._report(item.camera, decision)
        total = (time.monotonic() - item.monotonic) * 1e3
        return Judgement(self._verdict(item, decision, {"total": total}, self._new_id()), detail=item.detail)

    def _product(self, item: Frame | Missed) -> str | None:
        product = item.product or self.product_of(item.camera)
        return None if product == AUTO else product

    def _box(self, frame: Frame) -> Box:
        """What of the frame is judged: the camera's region of interest, without one what the bundle says."""
        roi, (height, width) = self._cameras[frame.camera].roi, frame.image.shape[:2]
        if roi is not None:
            box, meant = clip_roi(roi, width, height), f"the region of interest {roi} does not lie in the picture"
        else:
            product = self._product(frame)
            try:
                crop = common_crop(self.detector.bundle, self.detector.program.name, product, frame.camera)
            except ConfigError as error:
                raise _Refusal("wrong_product", str(error), product=product) from error
            box, meant = box_in(crop, width, height), f"the bundle judges {crop and told(crop)}, not the picture"
        if box is None:
            raise _Refusal("bad_frame", f"{meant} of {width} x {height} pixels")
        return box

    def _score(self, frame: Frame, box: Box) -> Scored:
        product = self._product(frame)
        try:
            return self.detector.judge_image(cut_out(frame.image, box), product, self._thresholds[frame.camera])
        except (ProductError, ConfigError) as error:  # ConfigError: auto, where the bundle has no classifier
            raise _Refusal("wrong_product", str(error), product=product) from error
        except SourceError as error:
            raise _Refusal("bad_frame", str(error), product=product) from error
        except AndonError as error:
            raise _Refusal("engine_error", str(error), product=product) from error
        except Exception as error:
            if self._trouble.get(frame.camera) != "engine_error":
                log.exception("camera %s: the engine failed unexpectedly", frame.camera)
            raise _Refusal("engine_error", f"{type(error).__name__}: {error}", product=product) from error

    def _taught(self, memory: OnlineMemory, frame: Frame, scored: Scored, box: Box, name: str) -> Scored:
        """FOCT's order: the frame teaches by the verdict it would get, and is scored again where it did."""
        smooth = replace(self._smooth.get(frame.camera, _Smooth()))
        try:
            label = self._decide(frame, scored, box).label
        except _Refusal as refusal:
            label = refusal.decision.label
        self._smooth[frame.camera] = smooth  # a frame counts once
        try:
            changed = memory.teach(self.detector.program, scored, label, frame, name)
        except Exception as error:  # whatever it is, this part must be judged; `unusable` decides how
            if str(error) != self._memory_trouble:
                log.error("memory: %s", error, exc_info=not isinstance(error, AndonError))
            self._memory_trouble = str(error)
            return scored
        if not changed:
            return scored
        again = self._score(frame, box)
        latency = {stage: ms + scored.latency_ms.get(stage, 0.0) for stage, ms in again.latency_ms.items()}
        return replace(again, latency_ms=latency)

    def _decide(self, frame: Frame, scored: Scored, box: Box) -> _Decision:
        product, score, label = scored.product, scored.score, scored.label
        if product is None or score is None or scored.map is None:
            raise _Refusal("not_a_number", "the program gave a score or map that is not finite", product=product)
        if (weight := self._cameras[frame.camera].smoothing) is not None:
            score = self._smooth.setdefault(frame.camera, _Smooth()).add(weight, product, score)
            if scored.threshold is not None:
                label = "NG" if score > scored.threshold else "OK"
        found: dict[str, Any] = {"product": product, "score": score, "threshold": scored.threshold}
        if self._settings.check_product and scored.predicted not in (None, product):
            raise _Refusal("wrong_product", f"expected {product}, the classifier sees {scored.predicted}", **found)
        if self._memory is not None and (why := self._memory.unusable(product)) is not None:
            raise _Refusal("memory_unusable", why, **found)
        if scored.threshold is None:
            raise _Refusal("no_threshold", f"no threshold for {product}: run 'andon calibrate'", **found)
        if frame.deadline is not None and time.monotonic() > frame.deadline:
            raise _Refusal("deadline_missed", "judged after the deadline", **found)
        if label == "OK":
            return _Decision("OK", "score_within_threshold", **found)
        regions: tuple[Region, ...] = ()
        if scored.pixel_threshold is not None:
            area, limit = self._settings.min_area, self._settings.max_regions
            regions = find_regions(scored.map, scored.pixel_threshold, box, min_area=area, limit=limit)
        return _Decision("NG", "score_above_threshold", regions=regions, **found)

    def _verdict(self, item: Frame | Missed, decision: _Decision, latency: dict[str, float], name: str) -> Verdict:
        bundle = self.detector.bundle
        return Verdict(
            id=name,
            camera=item.camera,
            seq=item.seq,
            ts_capture=item.captured,
            ts_judged=datetime.now(timezone.utc),
            label=decision.label,
            reason=decision.reason,
            product=decision.product,
            part_id=item.part_id,
            score=decision.score,
            threshold=decision.threshold,
            regions=decision.regions,
            method=bundle.manifest.method,
            bundle=bundle.id,
            memory_version=self._memory.version(decision.product) if self._memory and decision.product else None,
            latency_ms=latency,
        )

    def _report(self, camera: str, decision: _Decision) -> None:
        """One log line when a camera begins or ceases to be unjudgeable for a reason."""
        before = self._trouble.get(camera, "")
        now = decision.reason if decision.label == "UNKNOWN" else ""
        if now and now != before:
            log.warning("camera %s cannot be judged: %s (%s)", camera, now, decision.detail)
        elif before and not now:
            log.info("camera %s is judged again (was: %s)", camera, before)
        self._trouble[camera] = now
