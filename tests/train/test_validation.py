"""The validation sets that settings are chosen on: defects where a part is, masks where the defect is."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from andon.runtime.dataset import Sample, open_dataset
from measure.validation import KINDS, on_part, product_set, shape, spoil


def part(background: float, noise: float = 2.0) -> np.ndarray:
    """A dark bar on a background; uint8 [100, 100, 3]."""
    image = np.full((100, 100, 3), background, np.float32)
    image[45:55, 10:90] = 60
    return np.clip(image + noise * np.random.default_rng(0).standard_normal(image.shape), 0, 255).astype(np.uint8)


def test_a_part_on_a_plain_background_is_found() -> None:
    found = on_part(part(200).astype(np.float32))
    assert found[46:54, 15:85].all() and not found[:40].any() and not found[60:].any()
    assert on_part(part(200, noise=40).astype(np.float32)).all(), "no plain background, so the part is everywhere"
    assert on_part(np.full((50, 50, 3), 9, np.float32)).all()


@pytest.mark.parametrize("thin", [False, True])
def test_defects_lie_on_the_part(thin: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = shape(part(200).astype(np.float32), rng, thin)
        assert mask.shape == (100, 100) and mask.min() >= 0 and mask.max() > 0.5
        assert (mask[44:56] > 0.3).any()


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_mask_is_where_the_image_changed(kind: str) -> None:
    image = part(120, noise=10)
    changed, mask = spoil(image, kind, 3)
    difference = np.abs(changed.astype(int) - image.astype(int)).max(-1)
    assert set(np.unique(mask)) <= {0, 255} and (mask == 255).any()
    outside = cv2.dilate(mask, np.ones((9, 9), np.uint8)) == 0
    assert difference[mask == 255].mean() > 3 and difference[outside].max() == 0
    assert np.array_equal(spoil(image, kind, 3)[0], changed)


def test_a_set_holds_good_images_out_and_trains_on_the_rest(tmp_path: Path) -> None:
    samples = []
    for i in range(30):
        path = tmp_path / f"{i:02}.png"
        cv2.imwrite(str(path), np.full((40, 40, 3), 5 * i + 20, np.uint8))
        samples.append(Sample(path, path.name, "bar", "good", "train"))
    product_set(samples, tmp_path / "set/bar", 12)
    product_set(samples, tmp_path / "graded/bar", None, [samples[0].path])
    found, graded = open_dataset(str(tmp_path / "set")), open_dataset(str(tmp_path / "graded"))
    train = [s for s in found.samples if s.split == "train"]
    test = [s for s in found.samples if s.split == "test"]
    assert len(train) == 12 and sum(s.good for s in test) == 8 and len(test) == 8 + 8 * len(KINDS)
    assert all(s.mask_path is not None for s in test if not s.good)
    pixels = [{cv2.imread(str(s.path))[0, 0, 0] for s in part} for part in (train, [s for s in test if s.good])]
    assert not pixels[0] & pixels[1], "no image is on both sides"
    assert [s.label for s in graded.samples if s.split == "test" and not s.good] == ["graded"]
