"""Denoisers: (u [B,C,g,g], yhat [B,C,g,g], time code [B,E]) -> prediction [B,C,g,g] (METHODS.md 2.4, Annex F.4)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DenoiserConfig


class ResidualBlock(nn.Module):
    """norm-SiLU-conv, scale and shift from the time embedding, norm-SiLU-conv, skip. [B,c_in,h,w] -> [B,c_out,h,w]."""

    def __init__(self, inputs: int, outputs: int, config: DenoiserConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(config.embedding, 2 * outputs)
        self.norm2 = nn.GroupNorm(config.groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class AttentionWeights(nn.Module):
    """softmax(q k^T / sqrt(d)) as a module of its own, so that it can stay FP32. q, k: [B, heads, N, d]."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return F.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)


class SelfAttention(nn.Module):
    """Multi-head attention over the grid, explicit products (METHODS.md 6.2). [B,c,h,w] -> the same."""

    def __init__(self, channels: int, config: DenoiserConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.GroupNorm(config.groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.weights = AttentionWeights()
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        mixed = (self.weights(q, k) @ v).transpose(-1, -2).reshape(b, c, h, w)
        return x + self.out(mixed)


class TimeEmbedding(nn.Sequential):
    """Two-layer MLP of the sinusoidal code, [B, E] -> [B, embedding]."""

    def __init__(self, config: DenoiserConfig) -> None:
        e = config.embedding
        super().__init__(nn.Linear(config.time, e), nn.SiLU(), nn.Linear(e, e), nn.SiLU())


class Head(nn.Sequential):
    """Last layer, zero at the start: an untrained denoiser predicts 0."""

    def __init__(self, inputs: int, outputs: int, config: DenoiserConfig) -> None:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(cast(Tensor, conv.bias))
        super().__init__(nn.GroupNorm(config.groups, inputs), nn.SiLU(), conv)


class FlatDenoiser(nn.Module):
    """Residual blocks at one resolution: the edge denoiser."""

    def __init__(self, channels: int, config: DenoiserConfig) -> None:
        super().__init__()
        self.embed = TimeEmbedding(config)
        self.stem = nn.Conv2d(2 * channels, config.width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(config.width, config.width, config) for _ in range(config.blocks))
        self.head = Head(config.width, channels, config)

    def forward(self, u: Tensor, yhat: Tensor, code: Tensor) -> Tensor:
        embedding = self.embed(code)
        h = self.stem(torch.cat((u, yhat), dim=1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.head(h)


class DownLevel(nn.Module):
    """Residual blocks of one resolution, each followed by attention where `attends`; every result is a skip."""

    def __init__(self, inputs: int, outputs: int, attends: bool, config: DenoiserConfig) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * (config.blocks - 1)
        self.blocks = nn.ModuleList(ResidualBlock(width, outputs, config) for width in widths)
        self.attention = nn.ModuleList(SelfAttention(outputs, config) for _ in widths if attends)

    def forward(self, h: Tensor, embedding: Tensor) -> list[Tensor]:
        skips = []
        for i, block in enumerate(self.blocks):
            h = block(h, embedding)
            h = self.attention[i](h) if self.attention else h
            skips.append(h)
        return skips


class UpLevel(nn.Module):
    """As DownLevel, with one more block, each taking a skip from the way down, the last first."""

    def __init__(self, inputs: int, skips: list[int], outputs: int, attends: bool, config: DenoiserConfig) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * (len(skips) - 1)
        pairs = zip(widths, skips, strict=True)
        self.blocks = nn.ModuleList(ResidualBlock(width + skip, outputs, config) for width, skip in pairs)
        self.attention = nn.ModuleList(SelfAttention(outputs, config) for _ in skips if attends)

    def forward(self, h: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        for i, (block, skip) in enumerate(zip(self.blocks, skips, strict=True)):
            h = block(torch.cat((h, skip), dim=1), embedding)
            h = self.attention[i](h) if self.attention else h
        return h


class UNet(nn.Module):
    """U-Net with skips from every block; nearest-neighbour upsampling and convolution on the way up."""

    def __init__(self, channels: int, grid: int, config: DenoiserConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        attends = [grid // 2**i in config.attention for i in range(len(widths))]
        self.embed = TimeEmbedding(config)
        self.stem = nn.Conv2d(2 * channels, config.width, 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        skips, width = [config.width], config.width
        for i, target in enumerate(widths):
            if i:
                self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
            self.down.append(DownLevel(width, target, attends[i], config))
            skips += [target] * config.blocks
            width = target
        self.middle_in = ResidualBlock(width, width, config)
        self.middle_attention = SelfAttention(width, config)
        self.middle_out = ResidualBlock(width, width, config)
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        self.taken = config.blocks + 1
        for i, target in reversed(list(enumerate(widths))):
            taken = [skips.pop() for _ in range(self.taken)]
            self.up.append(UpLevel(width, taken, target, attends[i], config))
            width = target
            if i:
                self.grow.append(nn.Conv2d(width, width, 3, padding=1))
        self.head = Head(width, channels, config)

    def forward(self, u: Tensor, yhat: Tensor, code: Tensor) -> Tensor:
        embedding = self.embed(code)
        skips = [self.stem(torch.cat((u, yhat), dim=1))]
        for i, level in enumerate(self.down):
            if i:
                skips.append(self.shrink[i - 1](skips[-1]))
            skips += level(skips[-1], embedding)
        h = self.middle_out(self.middle_attention(self.middle_in(skips[-1], embedding)), embedding)
        for i, level in enumerate(self.up):
            h = level(h, [skips.pop() for _ in range(self.taken)], embedding)
            if i < len(self.grow):
                h = self.grow[i](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.head(h)


def build_denoiser(channels: int, grid: int, config: DenoiserConfig) -> nn.Module:
    """The configured denoiser for tensors [B, channels, grid, grid]."""
    return FlatDenoiser(channels, config) if config.kind == "flat" else UNet(channels, grid, config)
