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


#: Normalisation of the pixels in 0..1 that U2-Net and most models with an ImageNet backbone were trained with.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Saliency:
    """A segmentation model in one ONNX file: image [1, 3, h, w] float to a probability [1, 1, h, w] (U2-Net, ISNet).

    normalize: (mean, deviation) of the pixels in 0..1; ImageNet's if None. ISNet's own is (0.5, 1).
    """

    def __init__(self, path: Path, normalize: tuple[float, float] | None = None) -> None:
        self._mean, self._deviation = (np.array(v, np.float32) for v in normalize or _IMAGENET)
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
        small = (small - self._mean) / self._deviation
        tensor = np.ascontiguousarray(small.transpose(2, 0, 1)[None], np.float32)
        output = np.squeeze(self._session.run(None, {self._name: tensor})[0]).astype(np.float32)
        spread = float(output.max() - output.min())
        if spread < 1e-6:
            return None
        mask = cv2.resize((output - output.min()) / spread, image.shape[1::-1]) > 0.5
        return mask if AREA[0] <= mask.mean() <= AREA[1] else None


class Sam:
    """A SAM-family model as two ONNX files: image encoder, and prompt encoder with mask decoder in one.

    The decoder is what segment-anything's scripts/export_onnx_model.py writes (MobileSAM's and samexporter's are the
    same), or NanoSAM's, which lacks `orig_im_size` and `masks`. The encoder takes the normalised and padded image
    [1, 3, side, side] (NanoSAM; samexporter), or the resized one [h, w, 3] in 0..255 (samexporter --use-preprocess).

    Prompt: a box inset 5 % from the border and the centre point; of the decoder's masks the one with the best
    predicted IoU whose area is believable.

    Raises:
        ConfigError: files of another signature.
    """

    NEEDED = ("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input")
    STRIDE = 16  # pixels of the prompt's coordinates per cell of the embedding, for every SAM

    def __init__(self, encoder: Path, decoder: Path, inset: float = 0.05) -> None:
        self._encoder, self._decoder, self._inset = _session(encoder), _session(decoder), inset
        self._inputs = {entry.name: entry for entry in self._decoder.get_inputs()}
        given = {entry.name for entry in self._decoder.get_outputs()}
        if not set(self.NEEDED) <= set(self._inputs) <= {*self.NEEDED, "orig_im_size"}:
            raise _not_sam(f"{decoder.name} is not a SAM mask decoder", list(self._inputs), ", ".join(self.NEEDED))
        if "iou_predictions" not in given or not given & {"masks", "low_res_masks"}:
            raise _not_sam(f"{decoder.name} is not a SAM mask decoder", list(given), "iou_predictions, low_res_masks")
        points = self._inputs["point_coords"].shape[1]
        self._padding = max(0, points - 3) if isinstance(points, int) else 0
        if isinstance(points, int) and points < 3:
            raise _not_sam(f"{decoder.name} takes too few points", points, "a point and a box: 3, or any number")
        entries = self._encoder.get_inputs()
        shape = entries[0].shape
        self._planes = len(shape) == 4 and shape[1] == 3
        if len(entries) != 1 or not (self._planes or (len(shape) == 3 and shape[2] == 3)):
            found = [f"{entry.name} {entry.shape}" for entry in entries]
            raise _not_sam(f"{encoder.name} is not a SAM image encoder", found, "one image, [1, 3, s, s] or [h, w, 3]")
        sides = [side for side in (shape[2:] if self._planes else shape[:2]) if isinstance(side, int)]
        self._side = max(sides, default=1024)
        if len(set(sides)) > 1:
            raise _not_sam(f"{encoder.name} takes no square image", shape, "one side, as 1024")
        outputs = self._encoder.get_outputs()
        self._embedding = next((o for o in outputs if o.name == "image_embeddings"), outputs[0])
        pair = self._embedding.shape, self._inputs["image_embeddings"].shape
        known = [(a, b) for a, b in zip(*pair, strict=False) if isinstance(a, int) and isinstance(b, int)]
        if len(pair[0]) != 4 or any(a != b for a, b in known):
            raise _not_sam(f"{encoder.name} does not belong to {decoder.name}", *pair)

    def __call__(self, image: Array, path: Path) -> Array | None:
        height, width = image.shape[:2]
        scale = self._side / max(height, width)
        scaled = _resized(image, (int(height * scale + 0.5), int(width * scale + 0.5)))
        entry = self._encoder.get_inputs()[0]
        feed = {entry.name: _as_declared(self._planar(scaled) if self._planes else scaled, entry)}
        embedding = self._encoder.run([self._embedding.name], feed)[0]
        # The prompt is given where the decoder was trained, which is not the encoder's size if that is a smaller one.
        side = self.STRIDE * embedding.shape[-1]
        extent = (scaled.shape[0] * side / self._side, scaled.shape[1] * side / self._side)
        found = self._decoder.run(None, self._prompt(embedding, extent, (height, width)))
        named = dict(zip((o.name for o in self._decoder.get_outputs()), found, strict=True))
        return self._best(named, (height, width), extent, side)

    def _planar(self, scaled: Array) -> Array:
        """Normalised, and padded with zeros at the right or the bottom: [1, 3, side, side]."""
        pixels = (scaled.astype(np.float32) - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)
        tensor = np.zeros((1, 3, self._side, self._side), np.float32)
        tensor[0, :, : scaled.shape[0], : scaled.shape[1]] = pixels.transpose(2, 0, 1)
        return tensor

    def _prompt(self, embedding: Array, extent: tuple[float, float], size: tuple[int, int]) -> dict[str, Array]:
        """The decoder's inputs; labels: 1 the centre, 2 and 3 the box's corners, -1 padding."""
        x, y = self._inset * extent[1], self._inset * extent[0]
        points = [[extent[1] / 2, extent[0] / 2], [x, y], [extent[1] - x, extent[0] - y]] + [[0, 0]] * self._padding
        rows, columns = embedding.shape[-2:]
        feed: dict[str, Array] = {
            "image_embeddings": embedding,
            "point_coords": np.array([points], np.float32),
            "point_labels": np.array([[1, 2, 3] + [-1] * self._padding], np.float32),
            "mask_input": np.zeros((1, 1, 4 * rows, 4 * columns), np.float32),
            "has_mask_input": np.zeros(1, np.float32),
        }
        if "orig_im_size" in self._inputs:
            feed["orig_im_size"] = np.array(size, np.float32)
        return {name: _as_declared(array, self._inputs[name]) for name, array in feed.items()}

    def _best(
        self, named: dict[str, Array], size: tuple[int, int], extent: tuple[float, float], side: int
    ) -> Array | None:
        """The low-resolution masks are preferred: tracing can freeze the crop of `masks` to the exporter's example."""
        masks: Any = named.get("masks", [None])[0]
        if (low := named.get("low_res_masks")) is not None and low.ndim == 4:
            bottom, right = (max(1, int(edge + 0.5)) for edge in extent)
            masks = [cv2.resize(m.astype(np.float32), (side, side))[:bottom, :right] for m in low[0]]
        for index in np.argsort(-named["iou_predictions"][0]):
            mask = cv2.resize(masks[index].astype(np.float32), size[::-1]) > 0.0
            if AREA[0] <= mask.mean() <= AREA[1]:
                return mask
        return None


def _not_sam(what: str, found: Any, expected: Any) -> ConfigError:
    step = "export encoder and decoder of one SAM, MobileSAM or NanoSAM with the model's own export scripts"
    return ConfigError(what, found=found, expected=expected, next_step=step)


def _resized(image: Array, size: tuple[int, int]) -> Array:
    """Area average when shrinking, bilinear when enlarging (OpenCV's area mode repeats pixels then)."""
    shrinks = size[0] <= image.shape[0]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


def _as_declared(array: Array, entry: Any) -> Array:
    """In the type that the file declares; exports differ in it (orig_im_size, half precision)."""
    return np.ascontiguousarray(array, _TYPES.get(entry.type, np.float32))


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
    """auto (GrabCut) | all | mask:FILE-OR-FOLDER | onnx:FILE[,MEAN,STD] | sam:ENCODER,DECODER.

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
        file, *numbers = rest.split(",")
        try:
            mean, deviation = (float(n) for n in numbers) if numbers else (0.0, 1.0)
        except ValueError:  # not two, or not numbers
            deviation = 0.0
        if file and deviation > 0:
            return Saliency(Path(file), (mean, deviation) if numbers else None)
    if kind == "sam" and rest.count(",") == 1:
        encoder, decoder = rest.split(",")
        return Sam(Path(encoder), Path(decoder))
    raise ConfigError(
        "unknown --foreground",
        found=spec,
        expected="auto | all | mask:FILE-OR-FOLDER | onnx:FILE[,MEAN,STD] | sam:ENCODER,DECODER",
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
