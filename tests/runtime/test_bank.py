"""What is enrolled: the images of the support, the bank of their patches, the navigator on it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from andon.runtime.enrolment import foreground as fg
from andon.runtime.enrolment.bank import BankSettings, build_bank, fill
from andon.runtime.enrolment.navigator import NavigatorSettings, enroll_navigator, subsample
from andon.runtime.enrolment.support import read_support
from andon.runtime.errors import CalibrationError, ConfigError
from andon.runtime.manifest import Preprocess


def support(images=2, side=10, d=6, seed=0):
    rng = np.random.default_rng(seed)
    patches = [rng.standard_normal((side * side, d)).astype(np.float32) + 5 for _ in range(images)]
    masks = [np.arange(side * side) < 40 for _ in range(images)]
    return patches, masks


def test_bank_selects_both_kinds_in_their_shares():
    patches, masks = support()
    bank = build_bank(patches, masks, BankSettings(100, 0.10, 0.075))
    assert int(bank.foreground.sum()) == 8 and len(bank.rows) == 8 + 9
    everything = np.concatenate(patches)
    np.testing.assert_allclose(bank.center, everything.mean(0), rtol=1e-5)
    for row, image, place, front in zip(bank.rows, bank.image, bank.place, bank.foreground, strict=True):
        np.testing.assert_allclose(row + bank.center, patches[image][place], rtol=1e-4)
        assert bool(front) == (place < 40)
    assert (np.abs(bank.rows).sum(axis=1) > 0).all(), "selection, not multiplication by the mask"


def test_more_support_than_capacity_is_thinned_in_proportion():
    patches, masks = support()
    bank = build_bank(patches, masks, BankSettings(50, 1.0, 1.0))
    assert len(bank.rows) == 50 and int(bank.foreground.sum()) == 20
    with pytest.raises(CalibrationError, match="does not fit"):
        fill(bank, 40, 10)


def test_all_foreground_has_no_background_rows():
    patches, _ = support()
    bank = build_bank(patches, [np.ones(100, bool)] * 2, BankSettings(100, 0.1, 0.075))
    assert bank.foreground.all() and len(bank.rows) == 20
    arrays = fill(bank, 30, 10)
    assert arrays["bank"].shape == (40, 6) and arrays["valid"].sum() == 20 and not arrays["bank"][20:].any()


def test_enrolled_navigator_lowers_the_objective_on_the_support():
    from andon.runtime.enrolment.transport import costs, gradients

    patches, masks = support(images=3, side=12, d=8)
    masks = [np.ones(144, bool)] * 3
    bank = build_bank(patches, masks, BankSettings(200, 0.3, 0.3))
    settings = NavigatorSettings(dims=8, hidden=8, steps=200, lr=3e-3, stride=2)
    before = enroll_navigator(bank, patches, NavigatorSettings(dims=8, hidden=8, steps=0, stride=2))
    after = enroll_navigator(bank, patches, settings)
    losses = []
    for navigator in (before, after):
        total = 0.0
        for index, each in enumerate(patches):
            query, rows = subsample(each, 2) - bank.center, bank.rows[bank.image != index]
            total += gradients(navigator, query, rows, costs(query, rows), 0.5)[0]
        losses.append(total)
    assert losses[1] < 0.99 * losses[0]


def test_support_is_the_first_images_or_a_seeded_draw(tmp_path):
    for k in range(6):
        cv2.imwrite(str(tmp_path / f"{k}.png"), np.full((10, 10, 3), k * 10, np.uint8))
    size = Preprocess(height=8, width=8)
    first = read_support(tmp_path, 2, size, 2, fg.everything)
    assert [p.name for p in first.paths] == ["0.png", "1.png"] and first.frames.shape == (2, 8, 8, 3)
    draws = {tuple(p.name for p in read_support(tmp_path, 2, size, 2, fg.everything, s).paths) for s in range(8)}
    assert len(draws) > 3
    with pytest.raises(ConfigError, match="not enough images"):
        read_support(tmp_path, 7, size, 2, fg.everything)
