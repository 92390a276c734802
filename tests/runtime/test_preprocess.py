"""The one resize: close to PIL's antialiased one, into the caller's buffer, grey and colour alike."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from andon.runtime.errors import SourceError
from andon.runtime.manifest import Preprocess
from andon.runtime.preprocess import resize
from PIL import Image

SIZE = Preprocess(height=48, width=64)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A camera-like image: smooth shapes, edges and a little noise."""
    rng = np.random.default_rng(seed)
    image = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), np.uint8), (0, 0), 3)
    cv2.rectangle(image, (width // 5, height // 4), (width // 2, height // 2), (250, 20, 90), -1)
    return np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("source", [(480, 640), (100, 333), (1080, 1920), (53, 70)])
def test_shrinking_equals_pils_box_filter(source: tuple[int, int]) -> None:
    """PIL's BOX is the same area average; METHODS.md 0.2 allows 2 levels of rounding between the two sides."""
    image = picture(*source)
    expected = np.asarray(Image.fromarray(image).resize((64, 48), Image.Resampling.BOX, reducing_gap=None)).astype(int)
    found = resize(image, SIZE).astype(int)
    if source[0] % 48 == 0 and source[1] % 64 == 0:
        assert np.abs(found - expected).max() <= 1
    else:  # BOX counts a source pixel whole, area by the part of it that lies inside
        assert np.abs(found - expected).mean() < 2.5


@pytest.mark.parametrize("source", [(480, 640), (1080, 1920), (331, 517)])
def test_shrinking_is_antialiased(source: tuple[int, int]) -> None:
    """Near torchvision's filter (PIL BILINEAR with antialiasing) on a picture; noise above the new Nyquist frequency is
    averaged away, which plain bilinear does not do."""
    image = picture(*source)
    expected = np.asarray(Image.fromarray(image).resize((64, 48), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(resize(image, SIZE).astype(int) - expected).mean() < 3
    noise = np.random.default_rng(0).integers(0, 256, (*source, 3), np.uint8)
    aliased = cv2.resize(noise, (64, 48), interpolation=cv2.INTER_LINEAR)
    assert resize(noise, SIZE).std() < aliased.std() / 3


def test_it_fills_the_callers_buffer() -> None:
    out = np.zeros((48, 64, 3), np.uint8)
    for image in (picture(480, 640), picture(20, 30), picture(20, 640), picture(480, 30), picture(48, 64)):
        assert resize(image, SIZE, out) is out
        assert (out == resize(image, SIZE)).all() and out.any()
        out[:] = 0


@pytest.mark.parametrize("source", [(480, 640), (20, 30), (20, 640), (48, 64)])
def test_grey_is_replicated(source: tuple[int, int]) -> None:
    grey = picture(*source)[:, :, 0]
    out = resize(np.ascontiguousarray(grey), SIZE)
    assert out.shape == (48, 64, 3) and (out == out[:, :, :1]).all()
    assert (out == resize(np.repeat(grey[:, :, None], 3, axis=2), SIZE)).all()
    assert (out == resize(np.ascontiguousarray(grey)[:, :, None], SIZE)).all()


def test_one_axis_may_grow_while_the_other_shrinks() -> None:
    """INTER_AREA alone would fall back to nearest-like blocks here."""
    ramp = np.repeat(np.linspace(0, 255, 20).astype(np.uint8)[:, None, None], 3, axis=2) * np.ones(
        (1, 640, 1), np.uint8
    )
    steps = np.diff(resize(ramp, SIZE)[:, 0, 0].astype(int))
    assert steps.max() <= 8 and (steps >= 0).all()
    noise = np.random.default_rng(0).integers(0, 256, (20, 6400, 3), np.uint8)
    assert resize(noise, SIZE).std() < cv2.resize(noise, (64, 48), interpolation=cv2.INTER_LINEAR).std() / 3


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros(4, np.uint8),
        None,
    ],
)
def test_what_is_no_image_is_refused(image: np.ndarray | None) -> None:
    with pytest.raises(SourceError, match="the image"):
        resize(image, SIZE)  # type: ignore[arg-type]
