"""Image and mask files as arrays. One reader for training and device, so both see the same pixels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .errors import SourceError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")

#: Neither a byte 0xff of the coded picture, after which 0 is stuffed, nor one of the restart markers within it.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_END = 0xD9
#: Markers without a length behind them: start of a picture, TEM.
_JPEG_BARE = (0xD8, 0x01)


def on_disk(path: Path) -> bool:
    """True for a visible file with the suffix of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def read_rgb(path: str | Path, data: bytes | None = None) -> NDArray[Any]:
    """Read an image as uint8 [H, W, 3] RGB, C-contiguous; grey is replicated, alpha dropped, 16-bit divided by 257.

    data: what the file holds, of whoever has read it already.

    Raises:
        SourceError: the file is missing, truncated, not an image, or of another depth than 8 or 16 bit.
    """
    skip = "replace or remove the file (train, calibrate and eval can leave it out: --on-corrupt skip)"
    image = _decode(Path(path), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH, skip, data)
    if image.dtype == np.uint16:
        image = ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif image.dtype != np.uint8:
        raise SourceError(
            f"unsupported depth in {path}",
            found=str(image.dtype),
            expected="8 or 16 bit unsigned",
            next_step="convert the image",
        )
    rgb: NDArray[Any] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return rgb


def sixteen_bit_peak(path: Path) -> int | None:
    """The largest value of a 16-bit image; None for one of another depth or that cannot be read."""
    try:
        image = _decode(path, cv2.IMREAD_UNCHANGED, "")
    except SourceError:
        return None
    return int(image.max()) if image.dtype == np.uint16 else None


def read_mask(path: str | Path, size: tuple[int, int]) -> NDArray[Any]:
    """Read a mask as bool [H, W], True where the defect is (above zero). size: (H, W) of the image it belongs to.

    Raises:
        SourceError: unreadable, or of another size than the image.
    """
    repair = "replace the mask, or remove it together with its image"
    mask = _decode(Path(path), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH, repair)
    if mask.shape != size:
        raise SourceError(
            f"mask {path} is not of its image's size",
            found=f"{mask.shape[1]}x{mask.shape[0]}",
            expected=f"{size[1]}x{size[0]}",
            next_step="export the mask at the image's resolution",
        )
    return mask > 0


def _decode(path: Path, flags: int, next_step: str, content: bytes | None = None) -> NDArray[Any]:
    try:
        data = np.fromfile(path, np.uint8) if content is None else np.frombuffer(content, np.uint8)
    except OSError as error:
        raise SourceError(
            f"cannot read {path}: {error.strerror}", next_step="check the path and permissions"
        ) from error
    try:
        image = None if data.size == 0 or _truncated_jpeg(data) else cv2.imdecode(data, flags)
    except cv2.error:  # raised for a damaged head that claims more pixels than OpenCV takes, or than there is memory
        image = None
    if image is None:
        raise SourceError(
            f"cannot decode {path}",
            found=f"{data.size} bytes that are not a whole image",
            expected="an intact image file",
            next_step=next_step,
        )
    return image


def _truncated_jpeg(data: NDArray[Any]) -> bool:
    """OpenCV fills the missing part of a cut JPEG with grey and reports success; the end marker of the picture tells.

    It is looked for from segment to segment, as a preview in one of them has an end marker, too, and behind the end
    there may be anything (the film of a phone's motion photo, further pictures).
    """
    if data[:2].tobytes() != b"\xff\xd8":
        return False
    view, at = data.data, 2
    while (marker := _JPEG_MARKER.search(view, at)) is not None:
        at = marker.end()
        if view[at - 1] == _JPEG_END:
            return False
        if view[at - 1] not in _JPEG_BARE:
            at += int.from_bytes(view[at : at + 2], "big")
    return True
