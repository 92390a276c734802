"""The conditional flow of one level: coupling blocks with a global affine and a fixed rotation (METHODS.md 4.2)."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BETA = 0.5  # sharpness of the softplus that keeps the global scale positive
_UNIT = 2.0 * math.log(math.expm1(5.0))  # the parameter at which the global scale 0.1 softplus(g) is 1


def axis_code(length: int, channels: int) -> Tensor:
    """Sinusoidal code of positions along one axis, [length, channels], sine and cosine interleaved, temperature 1e4."""
    rate = torch.exp(torch.arange(0, channels, 2) * (-math.log(1e4) / channels))
    angle = torch.arange(length)[:, None] * rate
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def position_code(height: int, width: int, channels: int) -> Tensor:
    """[height * width, channels] float32: the first half encodes x, the second y."""
    x = axis_code(width, channels // 2).repeat(height, 1)
    y = axis_code(height, channels // 2).repeat_interleave(width, 0)
    return torch.cat((x, y), dim=1)


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """A rotation drawn uniformly from SO(size), [size, size] float64."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()
    if torch.linalg.det(q) < 0:
        q[:, 0] = -q[:, 0]
    return q


class CouplingBlock(nn.Module):
    """Affine coupling of the second half by the first half and the position, then scale, offset and rotation.

    x: [..., N, d], position: [N, p] -> (x [..., N, d], log-determinant [..., N]).
    """

    rotation: Tensor

    def __init__(self, channels: int, position: int, hidden: float, clamp: float, generator: torch.Generator) -> None:
        super().__init__()
        self.clamp = clamp
        self.kept = channels - channels // 2
        self.changed = channels // 2
        width = round(hidden * (self.kept + position))
        self.inner = nn.Linear(self.kept + position, width)
        self.outer = nn.Linear(width, 2 * self.changed)
        self.scale_raw = nn.Parameter(torch.full((channels,), _UNIT))
        self.offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("rotation", random_rotation(channels, generator).float())

    def scale(self) -> Tensor:
        """The global scale, [d], positive."""
        return 0.1 * F.softplus(self.scale_raw, beta=_BETA)

    def _coefficients(self, kept: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        # The position's part of the first layer is the same for every image, so it is computed once, not per image.
        weight = self.inner.weight
        hidden = F.linear(kept, weight[:, : self.kept]) + F.linear(position, weight[:, self.kept :], self.inner.bias)
        s = 0.1 * self.outer(F.relu(hidden)).to(kept.dtype)
        return self.clamp * torch.tanh(s[..., : self.changed]), s[..., self.changed :]

    def forward(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = x[..., : self.kept], x[..., self.kept :]
        log_scale, shift = self._coefficients(kept, position)
        changed = changed * log_scale.exp() + shift
        scale = self.scale()
        x = torch.cat((kept, changed), dim=-1) * scale + self.offset
        with torch.autocast(x.device.type, enabled=False):  # the stream stays in full precision
            x = x @ self.rotation.T
        return x, log_scale.sum(-1) + scale.log().sum()

    def inverse(self, x: Tensor, position: Tensor) -> Tensor:
        """The x that `forward` maps to this x."""
        x = (x @ self.rotation - self.offset) / self.scale()
        kept, changed = x[..., : self.kept], x[..., self.kept :]
        log_scale, shift = self._coefficients(kept, position)
        return torch.cat((kept, (changed - shift) * (-log_scale).exp()), dim=-1)


class Flow(nn.Module):
    """A chain of blocks over a grid of positions.

    x: [..., N, d] -> (z [..., N, d], log-determinant [..., N]); `index` picks the positions that x holds (default all).
    """

    position: Tensor

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        *,
        blocks: int,
        position: int,
        hidden: float,
        clamp: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.blocks = nn.ModuleList(CouplingBlock(channels, position, hidden, clamp, generator) for _ in range(blocks))
        self.register_buffer("position", position_code(*grid, position), persistent=False)

    @property
    def each_block(self) -> list[CouplingBlock]:
        """The blocks in order."""
        return cast("list[CouplingBlock]", list(self.blocks))

    def forward(self, x: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        position = self.position if index is None else self.position[index]
        log_det = x.new_zeros(x.shape[:-1])
        for block in self.each_block:
            x, contribution = block(x, position)
            log_det = log_det + contribution
        return x, log_det
