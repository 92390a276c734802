"""FOCT: enrolment in `prepare`, conditional transport at inference; the torch reference starts every image at phi_0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ....runtime.enrolment.bank import Bank, BankSettings, build_bank, fill, principal
from ....runtime.enrolment.foreground import GrabCut, everything, to_grid
from ....runtime.enrolment.navigator import NavigatorSettings, enroll_navigator
from ....runtime.errors import CalibrationError
from ....runtime.manifest import Preprocess
from ...method import AnomalyModel, Batch, Scores, TrainingData
from ..knn.features import PatchFeatures
from .config import FoctConfig
from .transport import BETA1, BETA2, CARRIED, CtCost, PairScore, PairStep, SiameseScore, SiameseStep

Array = NDArray[np.float32]
#: Rows of the warm table of bias corrections; the counter stops there, where 1 / (1 - 0.999^t) is 1.017.
WARM_ROWS = 4096
_THUMB = 4


def adam_table(rows: int, lr: float) -> Array:
    """Bias corrections and rate for step t = row + 1: [rows, 3] float32."""
    t = np.arange(1, rows + 1, dtype=np.float64)
    return np.stack([1 / (1 - BETA1**t), 1 / (1 - BETA2**t), np.full(rows, lr)], axis=1).astype(np.float32)


class _Frontend(nn.Module):
    """What is cached: patches [B, m, c], and a small image [B, 3, S/4, S/4] for finding the foreground."""

    def __init__(self, features: PatchFeatures) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images: [B, S, S, 3] uint8."""
        small = F.avg_pool2d(images.permute(0, 3, 1, 2).float(), _THUMB)
        return {"patches": self.features(images), "thumb": small}


class Foct(AnomalyModel):
    """One semantic memory and one navigator per product; every buffer has the product as its leading axis."""

    config: FoctConfig
    inv_tau: Tensor

    def __init__(self, config: FoctConfig, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.config = config
        self.classes = classes
        n, grid, y = config.navigator, config.patches.grid, len(classes)
        self.features = PatchFeatures(config.backbone, config.patches)
        raw = self.features.dim
        self.dim = raw if config.pca is None else min(config.pca, raw)
        self.cost = CtCost(grid, n.stride, config.semantic, n.thin)
        siamese = n.kind == "siamese"
        self.step: nn.Module = SiameseStep(n.rho) if siamese else PairStep(n.rho)
        self.score = (SiameseScore if siamese else PairScore)(grid, config.size, config.sigma)
        rows = config.semantic + config.episodic
        dims = min(n.dims, self.dim)
        self.shapes = {
            "w1": (n.hidden, self.dim if siamese else dims),
            "b1": (n.hidden,),
            "w2": (dims if siamese else 1, n.hidden),
        }
        buffers: dict[str, tuple[int, ...]] = {
            "center": (raw,),
            "bank": (rows, self.dim),
            "valid": (rows,),
            "foreground": (rows,),
            "projection": (dims, self.dim),
            "inv_tau": (1,),
            **self.shapes,
        }
        if config.pca is not None:
            buffers["basis"] = (raw, self.dim)
        for name, shape in buffers.items():
            self.register_buffer(name, torch.zeros(y, *shape))

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(height=self.config.size, width=self.config.size)

    @property
    def frontend(self) -> nn.Module:
        return _Frontend(self.features)

    def row(self, name: str, index: int) -> Tensor:
        """A buffer's row of one product."""
        value: Tensor = getattr(self, name)
        return value[index]

    def patches(self, raw: Tensor, index: int) -> Tensor:
        """raw [m, c] to memory space [m, d] of a product."""
        centred = raw - self.row("center", index)
        return centred if self.config.pca is None else torch.matmul(centred, self.row("basis", index))

    def forward(self, images: Tensor, class_ids: Tensor) -> Scores:
        maps, scores = [], []
        for raw, index in zip(self.features(images), class_ids.tolist(), strict=True):
            pixel_map, score = self.judge(raw, index, self.config.navigator.steps)[:2]
            maps.append(pixel_map[0])
            scores.append(score)
        return Scores(torch.cat(maps), torch.cat(scores))

    def judge(self, raw: Tensor, index: int, steps: int) -> tuple[Tensor, ...]:
        """All outputs of the score stage for one image's patches [m, c], `steps` CT steps from phi_0."""
        n = self.config.navigator
        bank, projection = self.row("bank", index), self.row("projection", index)
        patches = self.patches(raw, index)
        cost, mask, bank_r, *fixed = self.cost(patches, bank, self.row("valid", index), projection)
        phi = [self.row(name, index) for name in ("w1", "b1", "w2")]
        carried = [*phi, *(torch.zeros_like(w) for _ in range(2) for w in phi)]
        cold = not n.warm or steps > max(10, n.steps)
        table = torch.from_numpy(adam_table(max(steps, 1), n.cold_lr if cold else n.lr)).to(raw.device)
        inv_tau = self.row("inv_tau", index)
        for k in range(steps):
            if n.kind == "siamese":
                out = self.step(*fixed, inv_tau, table[k], *carried)
            else:
                some_r, rows_r, rows_mask, weight, some_cost = (fixed[i] for i in (1, 3, 4, 5, 6))
                out = self.step(some_r, rows_r, rows_mask, weight, some_cost, table[k], *carried)
            carried = list(out[: len(CARRIED)])
        if n.kind == "siamese":
            return self.score(patches, bank, bank_r, cost, mask, projection, inv_tau, *carried[:3])
        return self.score(patches, bank_r, cost, mask, projection, *carried[:3])

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """There is nothing to optimise before the line runs.

        Raises:
            CalibrationError: always; schedule.steps is 0 for this method.
        """
        raise CalibrationError(
            "foct has no gradient training",
            found=f"schedule.steps {self.config.schedule.steps}",
            expected="schedule.steps: 0",
            next_step="correct the configuration",
        )

    @torch.no_grad()
    def prepare(self, data: TrainingData) -> None:
        """Enroll every product from `shots` of its training images.

        Raises:
            CalibrationError: a product has no training image.
        """
        ids = np.asarray(data.class_ids)
        for index, name in enumerate(self.classes):
            mine = np.flatnonzero(ids == index)
            if not len(mine):
                raise CalibrationError(
                    f"no good image of product {name!r} to enroll",
                    found=0,
                    expected="at least one",
                    next_step="add good images of this product",
                )
            drawn = np.random.default_rng((self.config.seed, index)).permutation(mine)[: self.config.shots]
            support, masks = [], []
            find = GrabCut() if self.config.foreground == "auto" else everything
            for position in np.sort(drawn):
                support.append(np.array(data.features["patches"][position], np.float32))
                thumb = np.array(data.features["thumb"][position], np.float32).transpose(1, 2, 0)
                image = np.ascontiguousarray(thumb.round().clip(0, 255).astype(np.uint8))
                masks.append(to_grid(find(image, Path(f"{name}/{position}")), self.config.patches.grid))
            self.enroll(index, support, masks)

    @torch.no_grad()
    def enroll(self, index: int, support: Sequence[Array], masks: Sequence[NDArray[np.bool_]]) -> None:
        """Fill one product's memory. support: per image raw patches [m, c]; masks: [m] bool foreground."""
        c = self.config
        settings = BankSettings(c.semantic, c.alpha, c.beta, seed=c.seed)
        found = build_bank(support, masks, settings)
        values: dict[str, NDArray[np.float32]] = {"center": found.center}
        if c.pca is not None:
            basis = principal(np.concatenate(support) - found.center, self.dim)
            support = [(each - found.center) @ basis for each in support]
            found = Bank(np.zeros(self.dim, np.float32), found.rows @ basis, found.foreground, found.image, found.place)
            values["basis"] = basis
        values |= fill(found, c.semantic, c.episodic)
        values |= self._navigator(found, support)
        for name, value in values.items():
            self.row(name, index).copy_(torch.as_tensor(np.asarray(value, np.float32)))

    def _navigator(self, bank: Bank, support: Sequence[Array]) -> Mapping[str, NDArray[np.float32]]:
        n, seed = self.config.navigator, self.config.seed
        dims = min(n.dims, self.dim)
        settings = NavigatorSettings(dims, n.hidden, n.perplexity, n.enroll_steps, n.enroll_lr, n.rho, n.stride, seed)
        if n.kind == "siamese":
            navigator = enroll_navigator(bank, support, settings)
            phi = {"w1": navigator.w1, "b1": navigator.b1, "w2": navigator.w2}
            return {"projection": navigator.projection, "inv_tau": np.array([navigator.inv_tau], np.float32), **phi}
        rng = np.random.default_rng(seed)
        bound = {"w1": 1 / np.sqrt(dims), "b1": 1 / np.sqrt(dims), "w2": 1 / np.sqrt(n.hidden)}  # torch's nn.Linear
        phi = {name: rng.uniform(-b, b, self.shapes[name]).astype(np.float32) for name, b in bound.items()}
        return {"projection": principal(bank.rows, dims).T, "inv_tau": np.ones(1, np.float32), **phi}
