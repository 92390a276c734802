"""VPDM's constants: of each product and each sampler its own."""

from __future__ import annotations

import pytest
import torch
from andon.runtime.errors import CalibrationError
from andon.train.methods.vpdm.model import Vpdm
from andon.train.methods.vpdm.samplers import calibrated, constants_of, find_sampler, samplers
from torch import Tensor

from .smallvpdm import Data, feature_data, small_config


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_calibration_is_the_products_own() -> None:
    """Where residuals of a product's good images are large, more is expected of that product and of no other."""
    config = small_config(score={"space": "std", "mode": "max", "by_position": True, "prior": 1, "spread_prior": 1})
    model = Vpdm(config, ("left", "right"))
    data = feature_data(model, 40)
    data.class_ids[:] = torch.arange(40) % 2
    features, grid = data.features["features"], config.features.grid
    model.prepare(data)
    features[0::2, :, :, : grid // 2] *= 4
    features[1::2, :, :, grid // 2 :] *= 4
    model.finalize(data)
    mean = model.get_buffer("mean_restore")[:, 0]
    left, right = mean[:, :, : grid // 2].mean((1, 2)), mean[:, :, grid // 2 :].mean((1, 2))
    assert left[0] > 1.5 * right[0] and right[1] > 1.5 * left[1]
    with torch.no_grad():
        own = model.score_features(features, data.class_ids).score
        other = model.score_features(features, 1 - data.class_ids).score
    assert own.max() < other.min()


def test_finalize_calibrates_when_asked() -> None:
    data = feature_data(Vpdm(small_config(), ("a",)), 12)
    for asked in (False, True):
        model = Vpdm(small_config(score={"space": "std", "mode": "max", "by_position": asked}), ("a",))
        model.prepare(data)
        before = {name: buffer.clone() for name, buffer in constants(model).items()}
        model.finalize(data)
        assert bool(before) == asked
        assert all((buffer != before[name]).all() for name, buffer in constants(model).items())
    with pytest.raises(CalibrationError, match="held-out good image of product 'a'"):
        model.finalize(Data({"features": data.features["features"][:0]}, data.class_ids[:0]))


def constants(model: Vpdm) -> dict[str, Tensor]:
    return {name: b for name, b in model.named_buffers() if name.startswith(("mean_", "deviation_"))}


def test_every_sampler_is_scored_by_its_own_constants() -> None:
    """What one sampler leaves of good images says nothing about another: constants are as if each were alone."""
    score = {"space": "std", "mode": "max", "by_position": True, "prior": 0, "spread_prior": 0}
    model = Vpdm(small_config(score=score), ("a",))
    for parameter in model.denoiser.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    data = feature_data(model, 30)
    model.prepare(data)
    model.finalize(data)
    features, class_ids = data.features["features"], data.class_ids
    for name in ("restore", "ddim25", "ddim10_t400"):
        alone = Vpdm(small_config(score=score, sampler=name), ("a",))
        alone.load_state_dict(model.state_dict(), strict=False)
        for buffer in constants(alone).values():
            buffer.fill_(9)
        alone.finalize(data)
        sampler = find_sampler(model.config, name)
        with torch.no_grad():
            torch.testing.assert_close(
                model.score_features(features, class_ids, sampler).map, alone.score_features(features, class_ids).map
            )
    assert not torch.allclose(model.get_buffer("mean_restore"), model.get_buffer("mean_ddim25"), rtol=0.05)


def test_ddpm_has_constants_of_its_own_only_where_it_is_the_configured_sampler() -> None:
    score = {"space": "std", "by_position": True}
    for name, expected in (("restore", "ddim50"), ("ddpm1000", "ddpm1000")):
        config = small_config(score=score, sampler=name)
        assert constants_of(config, find_sampler(config, "ddpm1000")) == expected
        model = Vpdm(config, ("a",))
        own = {buffer.removeprefix("mean_") for buffer in constants(model) if buffer.startswith("mean_")}
        assert own == {s.name for s in calibrated(config)}
        assert ("ddpm1000" in own) == (name == "ddpm1000")
        assert all(buffer in constants(model) for s in samplers(config).values() for buffer in model.usual(s))
