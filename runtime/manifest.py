"""The bundle's manifest, schema ``andon.bundle/1``: what one exported method is, as data.

Everything that differs between methods on the device is here; the executor knows no method by name.
The published JSON Schema (configs/schema/bundle.json) is generated from these models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

SCHEMA = "andon.bundle/1"
Dtype = Literal["uint8", "float32", "float16", "int32", "int8", "bool"]
Variant = Literal["fp32", "fp16", "int8"]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
#: A camera's name, as a line's configuration has it.
CAMERA = r"^[A-Za-z0-9_.-]{1,64}$"
CameraName = Annotated[str, Field(pattern=CAMERA)]


def _positive(roi: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    if min(roi[:2]) < 0 or min(roi[2:]) < 1:
        raise ValueError("x and y are 0 or more, width and height 1 or more")
    return roi


#: A region of interest, [x, y, width, height] in pixels of the picture: of a line's camera and of a training alike.
Roi = Annotated[tuple[int, int, int, int], AfterValidator(_positive)]


def _without(written: dict[str, Any], **later: object) -> dict[str, Any]:
    """What is written, without later fields that say nothing: stations of before a field refuse what has it."""
    return {key: value for key, value in written.items() if later.get(key, True)}


class Model(BaseModel):
    """Base of all manifest parts: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensor(Model):
    """A fixed shape and type."""

    shape: tuple[int, ...] = Field(description="Fixed shape; batch is 1 where there is one")
    dtype: Dtype = Field(description="Element type; never int64")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class StageInput(Tensor):
    """One input of a stage and where its data come from."""

    source: str = Field(
        description="frame | state:<name> | class:<name> | <stage>.<output> | carry | table; the last two are bound "
        "by the loop step (init/carry, tables)"
    )


class Stage(Model):
    """One ONNX file per precision variant, with fixed inputs and outputs."""

    files: dict[Variant, str] = Field(description="Bundle-relative ONNX path per variant; fp32 is always there")
    inputs: dict[str, StageInput] = Field(description="Inputs in graph order")
    outputs: dict[str, Tensor] = Field(description="Outputs in graph order")
    opset: int = Field(description="ONNX opset of the files")
    fp32_nodes: dict[Variant, int] = Field(default={}, description="Nodes kept in FP32 per variant")
    fallback: dict[Variant, str] = Field(
        default={}, description="Variant: why this stage's file of that variant is the FP32 (or FP16) one"
    )


class State(Tensor):
    """A constant or persistent tensor, stored in an npz of the bundle."""

    file: str = Field(description="Bundle-relative npz path")
    key: str = Field(description="Array name in the npz")
    class_bound: bool = Field(
        default=False, description="True: leading axis is the class; a stage sees one row, bound by pointer"
    )


class Table(Tensor):
    """A constant table [rows, *row_shape]; a loop binds row k at step k (plus the loop's persistent offset)."""

    file: str = Field(description="Bundle-relative npz path")
    key: str = Field(description="Array name in the npz; shape[0] is the number of rows")


class Run(Model):
    """Run a stage once."""

    run: Name = Field(description="Stage name")
    inputs: dict[str, str] = Field(
        default={}, description="Stage input -> source in this program instead of the stage's own (its constants)"
    )


class Loop(Model):
    """Run a stage `count` times, ping-ponging the carried tensors."""

    loop: Name = Field(description="Stage name")
    count: int = Field(ge=0, description="Steps per frame; 0 means the carried outputs equal their init")
    carry: dict[str, str] = Field(description="Output -> input it feeds at the next step")
    init: dict[str, str] = Field(description="Carried input -> source at step 0 (state:, class:, <stage>.<output>)")
    tables: dict[str, str] = Field(default={}, description="Input -> table whose row k is bound at step k")
    persist: dict[str, str] = Field(
        default={}, description="Carried input -> state that keeps its final value for the next frame (warm start)"
    )
    counter: Name | None = Field(
        default=None,
        description="Persistent step counter: table row is min(counter, rows - count) + k, and grows by count a frame",
    )


Step = Run | Loop


class Preprocess(Model):
    """How a camera image becomes the first stage's uint8 frame [1, height, width, 3]."""

    height: int = Field(gt=0, description="Network height in pixels")
    width: int = Field(gt=0, description="Network width in pixels")
    color: Literal["rgb"] = Field(default="rgb", description="Channel order the first stage takes; grey is replicated")
    filter: Literal["area"] = Field(default="area", description="Antialiasing resize filter, see runtime/preprocess.py")
    fit: Literal["stretch"] = Field(default="stretch", description="Whole image resized, aspect not kept")


class Crop(Model):
    """The part of a picture that is judged, and of which pictures (runtime/crop.py)."""

    roi: Roi = Field(description="Region of interest [x, y, width, height], in pixels of the picture")
    picture: tuple[int, int] = Field(description="Width and height of the pictures that it is cut out of")


class Outputs(Model):
    """Which stage outputs the runtime reads."""

    score: str = Field(description="<stage>.<output> of the image score, shape [1] float32")
    map: str = Field(description="<stage>.<output> of the anomaly map, shape [1,1,h,w] float32")
    logits: str | None = Field(default=None, description="<stage>.<output> of the product classifier, [1, classes]")
    telemetry: dict[str, str] = Field(default={}, description="Name -> <stage>.<output> worth logging, read on request")


class Memory(Model):
    """A calibrated state: the memory of normal that the runtime may update while it runs (DESIGN.md 5)."""

    bank: Name = Field(description="State [capacity, d] float32; rows 0..semantic_rows-1 never change")
    valid: Name = Field(description="State [capacity] float32, 1 for a valid row and 0 for an empty one")
    semantic_rows: int = Field(ge=1, description="Rows reserved for the semantic memory (some may be invalid)")
    episodic_rows: int = Field(ge=1, description="Rows reserved for the episodic memory")
    candidates: str = Field(description="<stage>.<output> [m, d]: patch features of the frame, in bank space")
    patch_score: str = Field(description="<stage>.<output> [m]: score of each patch against the memory as it was")
    transport: str | None = Field(default=None, description="<stage>.<output> [m]: max transport probability per patch")
    nearest: str | None = Field(default=None, description="<stage>.<output> [m] int32: bank row each patch matched")
    foreground: Name | None = Field(default=None, description="State [capacity] float32: 1 where the row is foreground")
    per_class: bool = Field(default=False, description="True: bank and valid are class_bound, one memory per product")
    anchor: str | None = Field(
        default=None,
        description="<stage>.<output> [m]: distance of each patch to its nearest semantic row, which the admission "
        "guard goes by; null: the host computes it from the candidates",
    )

    @model_serializer(mode="wrap")
    def _without_an_output_that_is_not_there(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without(write(self), anchor=self.anchor)


class Threshold(Model):
    """The decision threshold of one product and the promise behind it."""

    value: float = Field(description="Score above which a part is NG")
    false_alarm_rate: float = Field(
        description="Promised upper bound on the share of good parts judged NG; 1: none is promised"
    )
    confidence: float | None = Field(default=None, description="Confidence of the bound; none: marginal (conformal)")
    samples: int = Field(
        description="Held-out good images behind it, or parts where some show the same one; 0: set by hand"
    )
    pixel: float | None = Field(default=None, description="Map value above which a pixel belongs to a region")
    program: str = Field(default="default", description="Program (alternative) whose scores it is for")
    source: str = Field(default="", description="Data set, date and command that set it")
    images: str = Field(
        default="",
        pattern=r"^([0-9a-f]{16})*$",
        description="Contents of the images behind it: the first 16 hexadecimal digits of each file's SHA-256, sorted, "
        "one after the other",
    )
    variant: Variant | None = Field(
        default=None, description="Precision of the engines that gave the scores; none: not recorded"
    )
    backend: str = Field(default="", description="Their backend: onnxruntime or tensorrt; empty: not recorded")
    crop: Crop | None = Field(
        default=None, description="What was cut out of these images (andon calibrate --roi); null: the model's crop"
    )
    set_at: str = Field(default="", description="UTC time of the calibration that set it, RFC 3339; empty: of none")

    @property
    def promises(self) -> bool:
        """Whether it promises a false-alarm rate; one that was set by hand does not."""
        return self.samples > 0 and self.false_alarm_rate < 1

    @model_serializer(mode="wrap")
    def _without_what_is_not_recorded(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        said = {name: getattr(self, name) for name in ("images", "variant", "backend", "crop", "set_at")}
        return _without(write(self), **said)


class Backbone(Model):
    """Provenance of the frozen feature extractor."""

    id: str = Field(description="timm model id")
    weights: str = Field(description="Where the weights came from, or 'random:<seed>'")
    sha256: str = Field(description="SHA-256 over the weights as used")
    license: str = Field(default="", description="Licence of the weights")


class FileEntry(Model):
    """Integrity record of one file of the bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the content")
    bytes: int = Field(ge=0, description="Size in bytes")


class Manifest(Model):
    """Root of manifest.json."""

    schema_: Literal["andon.bundle/1"] = Field(alias="schema", description="Schema id and version")
    method: Name = Field(description="Method id")
    name: str = Field(description="Bundle name")
    created: str = Field(description="UTC time of export, RFC 3339")
    andon: str = Field(description="Version of Andon that wrote it")
    checkpoint_sha256: str = Field(description="Hash of the source checkpoint; empty for enrolment without one")
    backbone: Backbone = Field(description="Feature extractor provenance")
    preprocess: Preprocess = Field(description="Image preprocessing")
    classes: tuple[str, ...] = Field(min_length=1, description="Products, in the order of every class-bound axis")
    crops: dict[str, Crop] = Field(
        default={}, description="Product -> what of a picture the model was trained with; not named: the whole picture"
    )
    stages: dict[Name, Stage] = Field(description="Stages by name, in program order")
    variants: tuple[Variant, ...] = Field(description="Precision variants present")
    state: dict[Name, State] = Field(default={}, description="State tensors")
    tables: dict[Name, Table] = Field(default={}, description="Loop tables")
    program: tuple[Step, ...] = Field(min_length=1, description="The default program")
    alternatives: dict[Name, tuple[Step, ...]] = Field(default={}, description="Other programs by name")
    outputs: Outputs = Field(description="Outputs the runtime reads")
    memory: Memory | None = Field(default=None, description="Calibrated memory, if the method has one")
    constants: dict[str, float] = Field(default={}, description="Other calibration constants, for the record")
    thresholds: dict[str, dict[str, Threshold]] = Field(
        default={}, description="Class -> program name -> threshold; empty until `andon calibrate`"
    )
    camera_thresholds: dict[CameraName, dict[str, dict[str, Threshold]]] = Field(
        default={},
        description="Camera -> class -> program name -> threshold that stands before the class's at that camera of a "
        "line (andon calibrate --camera); left out where there is none",
    )
    verification: dict[str, object] = Field(default={}, description="Summary of report.json")
    licenses: dict[str, str] = Field(default={}, description="Licences of weights and data")
    files: dict[str, FileEntry] = Field(description="Every other file of the bundle, by relative path")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_serializer(mode="wrap")
    def _without_nothing(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without(write(self), crops=self.crops, camera_thresholds=self.camera_thresholds)

    def calibrated(self) -> Iterator[tuple[str | None, str, str, Threshold]]:
        """Camera (None: of all), product, program and threshold of all that there are."""
        for camera, products in [(None, self.thresholds), *self.camera_thresholds.items()]:
            for product, programs in products.items():
                for program, threshold in programs.items():
                    yield camera, product, program, threshold

    def gated(self, variant: Variant, program: str) -> bool:
        """Whether export has shown that a program keeps FP32's decisions in a precision.

        FP32 needs no gate. In a bundle that has no record of it, the default program alone was gated.
        """
        record = self.verification.get("gated")
        programs = record.get(variant) if isinstance(record, dict) else None
        return variant == "fp32" or program == "default" or (isinstance(programs, list) and program in programs)
