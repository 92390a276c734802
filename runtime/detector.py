"""A bundle that judges images: preprocessing, program and thresholds in one object. The runtime's core for `run`,
`eval`, `verify` and `bench` alike."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import TracebackType

import numpy as np

from .bundle import Bundle
from .engine.base import Array, Backend
from .engine.select import open_backend
from .errors import ConfigError, SourceError
from .manifest import Threshold, Variant
from .preprocess import resize
from .program import Program, Result
from .types import Label

log = logging.getLogger(__name__)

#: Product name that lets the bundle's classifier choose.
AUTO = "auto"


@dataclass(frozen=True)
class Judgement:
    """What a frame was judged to be.

    label, reason: OK, NG or UNKNOWN with one of types.UNKNOWN_REASONS.
    score: image score, None if it or a value of the map was not a finite number.
    threshold: the score above which a part is NG; None before `andon calibrate`.
    pixel_threshold: the map value above which a pixel belongs to a region, if one was calibrated.
    map: [h, w] float32 anomaly map in network geometry, a view that is valid until the next frame.
    logits: [classes] float32 of the product classifier, and predicted: its most likely product, if there is one.
    latency_ms: preprocess, one entry per stage, and total.
    """

    label: Label
    reason: str
    product: str | None
    class_index: int | None
    score: float | None = None
    threshold: float | None = None
    pixel_threshold: float | None = None
    map: Array | None = None
    logits: Array | None = None
    predicted: str | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)


#: Called after every scored frame, before the next: reads stage outputs and may write states (online calibration).
Observer = Callable[[Program, Judgement], None]


class Detector:
    """Judges one image at a time. A context manager; not thread-safe: one thread runs the engines.

    Args:
        bundle: the loaded bundle; closed by whoever loaded it.
        backend: an open backend; closed by whoever opened it.
        variant: precision variant.
        program: "default" or an alternative.
        observer: the seam of online calibration; see :data:`Observer`.

    Raises:
        BundleError, EngineError, ConfigError: the program cannot be opened.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        variant: Variant = "fp32",
        program: str = "default",
        observer: Observer | None = None,
        per_stage: bool | None = None,
    ):
        self.bundle = bundle
        self.backend = backend
        self.observer = observer
        self.program = Program(bundle, backend, variant, program, per_stage)
        if not bundle.manifest.gated(variant, program):
            log.warning(
                "%s: export has not shown that program %s keeps its decisions in %s (docs/precision.md); "
                "variant fp32 and the default program do",
                bundle.manifest.name,
                program,
                variant,
            )
        self._preprocess = bundle.manifest.preprocess
        self._classes = bundle.manifest.classes
        self._thresholds: tuple[Threshold | None, ...] = ()
        self.use_thresholds(bundle)
        self._owned = ExitStack()

    @property
    def program_name(self) -> str:
        """The program that runs; thresholds belong to it."""
        return self.program.name

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        backend: str = "auto",
        variant: Variant = "fp32",
        program: str = "default",
        threads: int | None = None,
    ) -> Detector:
        """Load a bundle, open a backend and the program; all are closed with the detector."""
        with ExitStack() as stack:
            bundle = stack.enter_context(Bundle.load(path))
            device = stack.enter_context(open_backend(backend, threads=threads))
            detector = cls(bundle, device, variant, program)
            detector._owned = stack.pop_all()
        return detector

    def use_thresholds(self, bundle: Bundle, camera: str | None = None) -> None:
        """Take the thresholds of a newly calibrated manifest of the same model, from the next frame on: of all cameras,
        or those that hold at one."""
        name = self.program.name
        self._thresholds = tuple(bundle.threshold(product, name, camera) for product in self._classes)

    def threshold(self, product: str) -> Threshold | None:
        """The threshold in use for a product.

        Raises:
            ProductError: unknown product.
        """
        return self._thresholds[self.bundle.class_index(product)]

    def set_threshold(self, product: str, threshold: Threshold | None) -> None:
        """Change one product's threshold from the next frame on.

        Raises:
            ProductError: unknown product.
        """
        index = self.bundle.class_index(product)
        self._thresholds = (*self._thresholds[:index], threshold, *self._thresholds[index + 1 :])

    def judge_image(
        self, image: Array, product: str | None = AUTO, thresholds: Sequence[Threshold | None] | None = None
    ) -> Judgement:
        """Resize an image, run the program, compare the score with the product's threshold.

        Args:
            image: uint8 [h, w, 3] RGB or [h, w] grey, any size.
            product: a product's name, or "auto" (None is the same).
            thresholds: of every product, in the order of the bundle's classes; None: those of the detector.

        Returns:
            The judgement. An image that cannot be used is UNKNOWN bad_frame; a score or map that is not finite is
            UNKNOWN not_a_number; no threshold is UNKNOWN no_threshold.

        Raises:
            ProductError: unknown product.
            EngineError: a stage failed.
            ConfigError: "auto" where the program has no classifier.
        """
        index = None if product in (None, AUTO) else self.bundle.class_index(str(product))
        start = perf_counter()
        try:
            resize(image, self._preprocess, out=self.program.frame)
        except SourceError:
            name = None if index is None else self._classes[index]
            return Judgement("UNKNOWN", "bad_frame", name, index)
        resized = perf_counter()
        result = self.program.run(index)
        latency = {"preprocess": (resized - start) * 1e3, **self.program.stage_ms}
        latency["total"] = (perf_counter() - start) * 1e3
        judgement = self._judge(result, latency, self._thresholds if thresholds is None else thresholds)
        if self.observer is not None and judgement.score is not None:
            self.observer(self.program, judgement)
        return judgement

    def _judge(self, result: Result, latency: dict[str, float], thresholds: Sequence[Threshold | None]) -> Judgement:
        threshold = thresholds[result.class_index]
        label: Label = "UNKNOWN"
        reason, score = "", None
        if not (math.isfinite(result.score) and np.isfinite(result.map).all()):
            reason = "not_a_number"
            # What a loop keeps for the next frame came from this one: start it afresh, or every frame is lost.
            self.program.reset()
        else:
            score = result.score
            if threshold is None:
                reason = "no_threshold"
            else:
                label = "NG" if score > threshold.value else "OK"
        return Judgement(
            label,
            reason,
            self._classes[result.class_index],
            result.class_index,
            score,
            threshold.value if threshold else None,
            threshold.pixel if threshold else None,
            result.map,
            result.logits,
            None if result.logits is None else self._classes[int(result.logits.argmax())],
            latency,
        )

    def warm_up(self, products: Iterable[str]) -> None:
        """Let no real frame of these products, or of AUTO, be the one that an asynchronous backend prepares itself on.

        Runs black frames; state that persists is back at the bundle's values afterwards. What cannot be judged is
        passed over here: its frames say why. Elsewhere, where nothing is put off to the first frame, it does nothing.

        Raises:
            EngineError: a stage failed.
        """
        if not self.backend.asynchronous:
            return
        self.program.frame.fill(0)
        for product in dict.fromkeys(products):
            if product in self._classes:
                self.program.warm_up(self._classes.index(product))
            elif product == AUTO:
                with suppress(ConfigError):  # several products and no classifier
                    self.program.warm_up(None)
        self.program.reset()

    def close(self) -> None:
        """Close the program, and bundle and backend if `open` opened them."""
        self.program.close()
        self._owned.close()

    def __enter__(self) -> Detector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
