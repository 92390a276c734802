"""Which patches of a support image show the part (METHODS.md 5.2). Used at enrolment only, never per frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..images import read_mask

Array = NDArray[Any]
#: A mask outside of these shares of the image is not believed.
AREA = (0.02, 0.90)


class Foreground(Protocol):
    """uint8 [h, w, 3] RGB -> bool [h, w], or None where it finds no part."""

    def __call__(self, image: Array, path: Path) -> Array | None: ...


def everything(image: Array, path: Path) -> Array | None:
    """Textures: all of the image is the part."""
    return None


class UserMask:
    """Masks drawn by a person: one file for all images, or a folder with ``<image>.png`` or ``<image>_mask.png``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, image: Array, path: Path) -> Array:
        """Raises ConfigError where an image has no mask, SourceError where its size is another."""
        if self._path.is_file():
            return read_mask(self._path, (image.shape[0], image.shape[1]))
        for name in (f"{path.stem}.png", f"{path.stem}_mask.png"):
            if (self._path / name).is_file():
                return read_mask(self._path / name, (image.shape[0], image.shape[1]))
        raise ConfigError(
            f"no foreground mask for {path.name}",
            found=f"neither {path.stem}.png nor {path.stem}_mask.png in {self._path}",
            expected="one mask per support image, or one mask file for all",
            next_step="draw the missing mask, or use --foreground auto",
        )


class GrabCut:
    """The classical fall-back (Rother et al., GrabCut, 2004): border is background, then colour and contrast decide.

    A result is believed only if the part is of sensible size, does not leave the image, and looks different from what
    surrounds it; else there is no part to cut out, as on a texture.
    """

    def __init__(self, side: int = 128, inset: float = 0.05, iterations: int = 5) -> None:
        self._side, self._inset, self._iterations = side, inset, iterations

    def __call__(self, image: Array, path: Path) -> Array | None:
        small = cv2.resize(image, (self._side, self._side), interpolation=cv2.INTER_AREA)
        margin = max(1, round(self._inset * self._side))
        box = (margin, margin, self._side - 2 * margin, self._side - 2 * margin)
        labels = np.zeros(small.shape[:2], np.uint8)
        cv2.setRNGSeed(0)
        try:
            cv2.grabCut(
                small, labels, box, np.zeros((1, 65)), np.zeros((1, 65)), self._iterations, cv2.GC_INIT_WITH_RECT
            )
        except cv2.error:
            return None  # an image of one colour gives it nothing to fit
        mask = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
        if not _separate(mask, small, margin):
            return None
        return cv2.resize(mask.astype(np.uint8), image.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0


def _separate(mask: Array, image: Array, margin: int) -> bool:
    """Whether a mask looks like one part before a background."""
    if not AREA[0] <= mask.mean() <= AREA[1]:
        return False
    inner = mask[margin:-margin, margin:-margin]
    rim = np.concatenate([inner[0], inner[-1], inner[:, 0], inner[:, -1]])
    if rim.mean() > 0.5:
        return False
    grey = image.mean(axis=2)
    front, back = (np.histogram(grey[m], 32, (0, 256))[0] / m.sum() for m in (mask, ~mask))
    return bool(np.sqrt(front * back).sum() < 0.6)  # Bhattacharyya coefficient


class Saliency:
    """A segmentation model in one ONNX file: image [1, 3, h, w] float to a probability [1, 1, h, w] (U2-Net, ISNet)."""

    def __init__(self, path: Path) -> None:
        self._session = _session(path)
        entry = self._session.get_inputs()[0]
        if len(entry.shape) != 4 or entry.shape[1] != 3:
            raise ConfigError(
                f"{path.name} is not a segmentation model",
                found=f"input {entry.name} {entry.shape}",
                expected="one image input [1, 3, h, w]",
                next_step="give encoder and decoder of a SAM model as --foreground sam:ENCODER,DECODER",
            )
        self._name = entry.name
        self._size = tuple(side if isinstance(side, int) else 320 for side in entry.shape[2:])

    def __call__(self, image: Array, path: Path) -> Array | None:
        small = cv2.resize(image, self._size[::-1], interpolation=cv2.INTER_AREA).astype(np.float32)
        small /= max(float(small.max()), 1e-6)
        small = (small - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        tensor = np.ascontiguousarray(small.transpose(2, 0, 1)[None], np.float32)
        output = np.squeeze(self._session.run(None, {self._name: tensor})[0]).astype(np.float32)
        spread = float(output.max() - output.min())
        if spread < 1e-6:
            return None
        mask = cv2.resize((output - output.min()) / spread, image.shape[1::-1]) > 0.5
        return mask if AREA[0] <= mask.mean() <= AREA[1] else None


class Sam:
    """A SAM-family model as two ONNX files (SAM, MobileSAM, NanoSAM export): image encoder and mask decoder.

    Prompt: a box inset 5 % from the border and the centre point; of the decoder's masks the one with the best
    predicted IoU whose area is believable.
    """

    def __init__(self, encoder: Path, decoder: Path, inset: float = 0.05) -> None:
        self._encoder, self._decoder, self._inset = _session(encoder), _session(decoder), inset
        needed = {"image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input"}
        names = {entry.name for entry in self._decoder.get_inputs()}
        if not needed <= names:
            raise ConfigError(
                f"{decoder.name} is not a SAM mask decoder",
                found=", ".join(sorted(names)),
                expected=", ".join(sorted(needed)),
                next_step="export the decoder with the model's own export script",
            )
        self._wants_size = "orig_im_size" in names

    def __call__(self, image: Array, path: Path) -> Array | None:
        entry = self._encoder.get_inputs()[0]
        side = entry.shape[-1] if isinstance(entry.shape[-1], int) else 1024
        height, width = image.shape[:2]
        scale = side / max(height, width)
        scaled = cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
        pixels = (scaled.astype(np.float32) - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)
        tensor = np.zeros((1, 3, side, side), np.float32)
        tensor[0, :, : scaled.shape[0], : scaled.shape[1]] = pixels.transpose(2, 0, 1)
        embedding = self._encoder.run(None, {entry.name: tensor})[0]
        x, y = self._inset * scaled.shape[1], self._inset * scaled.shape[0]
        far_x, far_y = scaled.shape[1] - x, scaled.shape[0] - y
        points = [[scaled.shape[1] / 2, scaled.shape[0] / 2], [x, y], [far_x, far_y]]
        feed: dict[str, Array] = {
            "image_embeddings": embedding,
            "point_coords": np.array([points], np.float32),
            "point_labels": np.array([[1, 2, 3]], np.float32),  # point, upper left and lower right corner of the box
            "mask_input": np.zeros((1, 1, 256, 256), np.float32),
            "has_mask_input": np.zeros(1, np.float32),
        }
        if self._wants_size:
            feed["orig_im_size"] = np.array([height, width], np.float32)
        outputs = self._decoder.run(None, feed)
        named = dict(zip((o.name for o in self._decoder.get_outputs()), outputs, strict=True))
        return self._best(named, image.shape[1::-1], scaled.shape[:2], side)

    def _best(self, named: dict[str, Array], size: tuple[int, int], scaled: tuple[int, int], side: int) -> Array | None:
        masks, quality = named.get("masks"), named["iou_predictions"][0]
        if masks is None:
            low = named["low_res_masks"][0]
            masks = np.stack([cv2.resize(m, (side, side))[: scaled[0], : scaled[1]] for m in low])[None]
        for index in np.argsort(-quality):
            mask = cv2.resize(masks[0, index].astype(np.float32), size) > 0.0
            if AREA[0] <= mask.mean() <= AREA[1]:
                return mask
        return None


def _session(path: Path) -> Any:
    import onnxruntime

    if not path.is_file():
        raise ConfigError(
            f"no segmentation model at {path}",
            found="no such file",
            expected="an ONNX file",
            next_step="correct --foreground, or use auto",
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def choose(spec: str) -> Foreground:
    """auto (GrabCut) | all | mask:FILE-OR-FOLDER | onnx:FILE | sam:ENCODER,DECODER.

    Raises:
        ConfigError: anything else, or a model that cannot be used.
    """
    kind, _, rest = spec.partition(":")
    if kind == "auto" and not rest:
        return GrabCut()
    if kind == "all" and not rest:
        return everything
    if kind == "mask" and rest:
        return UserMask(Path(rest))
    if kind == "onnx" and rest:
        return Saliency(Path(rest))
    if kind == "sam" and rest.count(",") == 1:
        encoder, decoder = rest.split(",")
        return Sam(Path(encoder), Path(decoder))
    raise ConfigError(
        "unknown --foreground",
        found=spec,
        expected="auto | all | mask:FILE-OR-FOLDER | onnx:FILE | sam:ENCODER,DECODER",
        next_step="choose one of these",
    )


def to_grid(mask: Array | None, grid: int) -> Array:
    """A mask as patches see it: area average over each cell, at least half; [grid * grid] bool.

    None, and masks that leave no cell on either side, are all foreground.
    """
    if mask is None:
        return np.ones(grid * grid, bool)
    cells = cv2.resize(mask.astype(np.float32), (grid, grid), interpolation=cv2.INTER_AREA).reshape(-1) >= 0.5
    return cells if cells.any() else np.ones(grid * grid, bool)
