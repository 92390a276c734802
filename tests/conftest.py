"""Fixtures of all rooms: a synthetic image set, the real ones where they are, one thread, caches of their own."""

from __future__ import annotations

import os

# Before torch or numpy are imported: test machines have few cores, and OpenMP teams that spin starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

# torch before GStreamer, or its ONNX exporter crashes when only tests/line are run (torch 2.14).
with suppress(ImportError):  # a device has none
    import torch  # noqa: F401

import cv2
import hypothesis
import numpy as np
import pytest
from numpy.typing import NDArray

# A property holds or it does not; how long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("andon", deadline=None)
hypothesis.settings.load_profile("andon")

SIDE = 96
PRODUCTS = ("grain", "grid", "stripes")
TRAIN, TEST_GOOD, TEST_DEFECTIVE = 14, 8, 8
Image = NDArray[np.uint8]


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Feature caches and runs of the tests go to a temporary folder, also in the processes that tests start."""
    root = tmp_path_factory.mktemp("andon")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDON_CACHE", str(root / "cache"))
        patch.setenv("ANDON_RUNS", str(root / "runs"))
        yield


@pytest.fixture(scope="session")
def synthetic_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three products in MVTec's layout: textures, 96x96, a patch of another texture as the defect, with masks."""
    root = tmp_path_factory.mktemp("synthetic")
    rng = np.random.default_rng(7)
    for product in PRODUCTS:
        for kind, count in (("train/good", TRAIN), ("test/good", TEST_GOOD), ("test/patch", TEST_DEFECTIVE)):
            folder = root / product / kind
            folder.mkdir(parents=True)
            for i in range(count):
                image = _texture(product, rng)
                if kind == "test/patch":
                    image, mask = _damage(image, product, rng)
                    masks = root / product / "ground_truth" / "patch"
                    masks.mkdir(parents=True, exist_ok=True)
                    cv2.imwrite(str(masks / f"{i:03d}_mask.png"), mask)
                cv2.imwrite(str(folder / f"{i:03d}.png"), image)
    return root


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], str]:
    """Where a real set is (`elpv`, or below $ANDON_DATA or ../shared/data); skips the test if it is absent."""
    here = Path(__file__).resolve().parents[1]

    def find(name: str) -> str:
        if name == "elpv":
            if find_spec("elpv_dataset") is None:
                pytest.skip("the data set elpv is not installed (package elpv-dataset)")
            return name
        root = Path(os.environ.get("ANDON_DATA") or here.parent / "shared" / "data")
        if not (root / name).exists():
            pytest.skip(f"the data set {name} is not here (set ANDON_DATA to the folder that holds it)")
        return str(root / name)

    return find


def _texture(product: str, rng: np.random.Generator) -> Image:
    """A good part, BGR."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, 2)
    if product == "grid":
        plane = np.sin(x / 3 + phase[0]) + np.sin(y / 3 + phase[1])
        color = (0.9, 0.8, 0.6)
    elif product == "stripes":
        plane = 1.5 * np.sin((x + 0.5 * y) / 4 + phase[0])
        color = (0.5, 0.8, 1.0)
    else:
        plane = 5 * cv2.GaussianBlur(rng.normal(size=(SIDE, SIDE)).astype(np.float32), (0, 0), 2.5)
        color = (0.8, 0.8, 0.8)
    plane = 120 + 35 * plane + rng.normal(0, 4, plane.shape) + rng.normal(0, 3)
    return np.clip(plane[..., None] * np.array(color), 0, 255).astype(np.uint8)


def _damage(image: Image, product: str, rng: np.random.Generator) -> tuple[Image, Image]:
    """A blob of another product's texture, darker or brighter, and its mask (0 or 255).

    Locally the defect looks like a good part of some other product, so a score that has learned nothing about its own
    product does not find it by contrast alone.
    """
    mask = np.zeros((SIDE, SIDE), np.uint8)
    center = tuple(int(v) for v in rng.integers(20, SIDE - 20, 2))
    axes = tuple(int(v) for v in rng.integers(8, 15, 2))
    cv2.ellipse(mask, center, axes, float(rng.uniform(0, 180)), 0, 360, 255, -1)
    other = _texture(str(rng.choice([p for p in PRODUCTS if p != product])), rng)
    blob = np.clip(other.astype(np.float32) + rng.choice([-70, 70]), 0, 255).astype(np.uint8)
    return np.where(mask[..., None] > 0, blob, image), mask
