"""Nearest neighbour to a coreset of good patches (PatchCore without its reweighting); the work is in `prepare`."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ....calib.coreset import greedy_k_center
from ....runtime.errors import CalibrationError
from ....runtime.manifest import Preprocess
from ...method import AnomalyModel, Batch, Scores, TrainingData
from ...scoremap import ScoreMap
from .config import KnnConfig
from .features import EMPTY, PatchFeatures, PatchFrontend

#: Rows that a block must have to be worth it, by what it costs (onnxruntime on one thread).
_LEAST_BLOCK = 8


class BankDistance(nn.Module):
    """Patches and a bank to map, image score, patch scores and anchors; FP32 throughout.

    semantic, episodic: rows of the bank that never change, and those after them that online calibration may fill.
    """

    def __init__(self, grid: int, size: int, sigma: float, semantic: int, episodic: int) -> None:
        super().__init__()
        self.grid = grid
        # The anchor is the minimum over some of the rows that the score is the minimum over: blocks of rows that lie
        # on one side each serve both in one pass. (A second pass, or cutting the matrix, costs a tenth of this stage;
        # blocks of a row, or of a few, are as many minima as the matrix has numbers, and cost half of it.)
        self.semantic, self.block = semantic, gcd(semantic, episodic)
        self.blocks = (semantic + episodic) // self.block
        self.score_map = ScoreMap(grid, size, align_corners=False, sigma=sigma)

    def forward(self, patches: Tensor, bank: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """patches [m, d], bank [n, d], valid [n] -> map [1, 1, size, size], score [1], patch_score [m], anchor [m].

        patch_score: distance to the nearest row; anchor: to the nearest semantic row, which the admission guard wants.
        The minimum is taken before the patch's own norm is added: one pass less over the [m, n] matrix. The -2 goes to
        the patches, which are fewer than the bank's rows: the bits are the same, and engines fuse the transpose.
        """
        far = torch.sum(bank * bank, dim=1) + (1.0 - valid) * EMPTY
        partial, known = self._minima(far[None, :] + torch.matmul(patches * -2.0, bank.T))
        own = torch.sum(patches * patches, dim=1)
        patch_score = torch.sqrt(torch.clamp(partial + own, min=0.0))
        anchor = torch.sqrt(torch.clamp(known + own, min=0.0))
        pixel_map, score = self.score_map(patch_score.reshape(1, 1, self.grid, self.grid))
        return pixel_map, score, patch_score, anchor

    def _minima(self, partial: Tensor) -> tuple[Tensor, Tensor]:
        """[m, n] -> [m] minimum over all rows, [m] over the semantic ones."""
        if self.block < _LEAST_BLOCK:
            known = partial[:, : self.semantic].amin(dim=1)
            return torch.minimum(known, partial[:, self.semantic :].amin(dim=1)), known
        blocks = partial.unflatten(1, (self.blocks, self.block)).amin(dim=2)
        return blocks.amin(dim=1), blocks[:, : self.semantic // self.block].amin(dim=1)


class Knn(AnomalyModel):
    """One bank per product, or one for all. Rows beyond the coreset are empty, for online calibration."""

    config: KnnConfig
    center: Tensor
    bank: Tensor
    valid: Tensor

    def __init__(self, config: KnnConfig, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.config = config
        self.classes = classes
        self.features = PatchFeatures(config.backbone, config.patches)
        self.distance = BankDistance(config.patches.grid, config.size, config.sigma, config.coreset, config.episodic)
        banks = len(classes) if config.banks == "product" else 1
        rows = config.coreset + config.episodic
        self.register_buffer("center", torch.zeros(self.features.dim))
        self.register_buffer("bank", torch.zeros(banks, rows, self.features.dim))
        self.register_buffer("valid", torch.zeros(banks, rows))

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(height=self.config.size, width=self.config.size)

    @property
    def frontend(self) -> nn.Module:
        return PatchFrontend(self.features)

    def forward(self, images: Tensor, class_ids: Tensor) -> Scores:
        patches = self.features(images) - self.center
        maps, scores = [], []
        for row, class_id in zip(patches, class_ids.tolist(), strict=True):
            index = class_id if self.config.banks == "product" else 0
            pixel_map, score, *_ = self.distance(row, self.bank[index], self.valid[index])
            maps.append(pixel_map[0])
            scores.append(score)
        return Scores(torch.cat(maps), torch.cat(scores))

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """There is nothing to optimise.

        Raises:
            CalibrationError: always; schedule.steps is 0 for this method.
        """
        raise CalibrationError(
            "knn has no gradient training",
            found=f"schedule.steps {self.config.schedule.steps}",
            expected="schedule.steps: 0",
            next_step="correct the configuration",
        )

    @torch.no_grad()
    def prepare(self, data: TrainingData) -> None:
        """Fill the banks: draw a pool of patches, centre it, keep its greedy k-centre coreset.

        Raises:
            CalibrationError: a product has no training image.
        """
        pools = [self._pool(data, index) for index in range(len(self.bank))]
        self.center.copy_(torch.from_numpy(np.concatenate(pools).mean(axis=0, dtype=np.float64)).float())
        for index, pool in enumerate(pools):
            centred = pool - self.center.cpu().numpy()
            chosen = greedy_k_center(centred, self.config.coreset, dims=self.config.project, seed=self.config.seed)
            self.bank[index].zero_()
            self.bank[index, : len(chosen)] = torch.from_numpy(centred[chosen])
            self.valid[index].zero_()
            self.valid[index, : len(chosen)] = 1.0

    def _pool(self, data: TrainingData, index: int) -> NDArray[np.float32]:
        """Random patches of one bank's images, [<= pool, d]."""
        own = np.asarray(data.class_ids) == index if self.config.banks == "product" else np.ones(len(data), bool)
        if not own.any():
            raise CalibrationError(
                f"no good image of product {self.classes[index]!r} to fill the bank from",
                found=0,
                expected="at least one",
                next_step="add good images of this product",
            )
        share = -(-self.config.pool // int(own.sum()))
        drawn = np.concatenate(list(self._draw(data, own, share)))
        return drawn[np.random.default_rng(self.config.seed).permutation(len(drawn))[: self.config.pool]]

    def _draw(self, data: TrainingData, own: NDArray[np.bool_], share: int) -> Iterator[NDArray[np.float32]]:
        """`share` patches of each image of the bank; the draw depends on the image's position, not on batches."""
        for batch in data.batches(16):
            for position, patches in zip(batch.indices.tolist(), batch.features["patches"].cpu().numpy(), strict=True):
                if own[position]:
                    rng = np.random.default_rng((self.config.seed, position))
                    yield patches[rng.permutation(len(patches))[:share]].astype(np.float32)
