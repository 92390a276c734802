"""Parts told apart by colour and judged by brightness: their pictures, data set, golden set and gate; and a disc."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
from andon.runtime.fingerprint import image_hash, pack

#: A front end whose one feature is the frame's largest value.
FEATURES = """features (uint8[1,4,4,3] image) => (float[1] level) {
    x = Cast<to=1>(image)
    shape = Constant<value = int64[1] {48}>()
    flat = Reshape(x, shape)
    level = ReduceMax<axes=[0], keepdims=1>(flat)
}"""


def level(brightness: int, product: str) -> np.ndarray:
    """Red for product a, green for b: the synthetic classifier reads that, the score is the brightness / 100."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :, "ab".index(product)] = brightness
    return image


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[:, :, ::-1] if image.ndim == 3 else image)


def held(products: str = "ab", count: int = 19) -> list[str]:
    return [f"{p}/train/good/{i:03}.png" for p in products for i in range(count)]


def contents(root: Path, first: int, last: int, products: str = "ab") -> str:
    """Fingerprints of the training images of brightness `first` to `last` of both products."""
    paths = [root / p / "train" / "good" / f"{i - 1:03}.png" for p in products for i in range(first, last + 1)]
    return pack(image_hash(p) for p in paths)


def renamed(data: Path, root: Path) -> Path:
    """The good training images under other names, as a set of good/bad folders: other keys, another split."""
    for product in "ab":
        (root / product / "good").mkdir(parents=True)
        for i, image in enumerate(sorted((data / product / "train" / "good").iterdir())):
            shutil.copy(image, root / product / "good" / f"cam0_{i:03}.png")
    return root


def golden(brightness: list[int]) -> dict[str, np.ndarray]:
    frames = np.stack([cv2.resize(level(x, "a"), (4, 4)) for x in brightness])
    u = np.stack([np.array([[x, 0, 0]], np.float32) / 100 for x in brightness])
    return {
        "frames": frames,
        "class_ids": np.zeros(len(brightness), np.int32),
        "score": u.max(axis=(1, 2)),
        "map": u[:, None, None, 0],
        "encode.u": u,
    }


def gate(brightness: list[int], threshold: float) -> dict[str, np.ndarray]:
    data = golden(brightness)
    labels = np.array([0, 0, 1, 1], np.int32)
    limits = np.full(2, threshold, np.float32)
    return {k: data[k] for k in ("frames", "class_ids", "score")} | {"labels": labels, "threshold": limits}


def part(size: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """A bright disc on a dark ground, and where it is."""
    rng = np.random.default_rng(0)
    image = rng.integers(20, 40, (size, size, 3), np.uint8)
    cv2.circle(image, (size // 2, size // 2), size // 4, (200, 180, 160), -1)
    truth = np.zeros((size, size), np.uint8)
    cv2.circle(truth, (size // 2, size // 2), size // 4, 1, -1)
    return image, truth > 0
