"""P-WAE (METHODS.md 3): tile encoder, codes held to priors, jigsaw head, decoder, errors relative to normal."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....runtime.manifest import Preprocess
from ...method import AnomalyModel, Batch, Optimizer, Scores, TrainingData
from ...scoremap import gaussian_matrix
from . import loss
from .config import LayerConfig, PwaeConfig
from .frontend import TileMaps
from .tiles import assemble, permutations, reorder, split


class Layer(nn.Module):
    """Convolution, resize, batch norm, ReLU: [B, C, n, n] -> [B, channels, side, side].

    The convolution comes before the resize. For a 1x1 kernel that is the same as after it, at a quarter of the cost;
    batch norm and ReLU stay behind the resize.
    """

    def __init__(self, channels: int, config: LayerConfig, side: int) -> None:
        super().__init__()
        self.up = config.up
        self.side = (side * 2 if config.up else side) - config.kernel + 1
        self.conv = nn.Conv2d(channels, config.channels, config.kernel)
        self.norm: nn.Module = nn.BatchNorm2d(config.channels)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.norm(self.resize(self.conv(x))).relu()

    def resize(self, x: Tensor) -> Tensor:
        """Bilinear with aligned corners to the layer's side, if it has one to go to."""
        return F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=True) if self.up else x


class Decoder(nn.Module):
    """Grid of codes [B, channels, n, n] -> reconstruction [B, 3, target, target] in normalised colours."""

    def __init__(self, channels: int, side: int, layers: tuple[LayerConfig, ...], target: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for config in layers:
            layer = Layer(channels, config, side)
            self.layers.append(layer)
            channels, side = config.channels, layer.side
        self.last = nn.Conv2d(channels, 3, 3)
        self.target, self.exact = target, side - 2 == target

    @property
    def each_layer(self) -> tuple[Layer, ...]:
        """The layers in order."""
        return tuple(cast(Layer, layer) for layer in self.layers)

    def forward(self, grid: Tensor) -> Tensor:
        """See the class."""
        for layer in self.layers:
            grid = layer(grid)
        image = self.last(grid)
        if self.exact:
            return image
        return F.interpolate(image, (self.target, self.target), mode="bilinear", align_corners=True)


class ErrorScore(nn.Module):
    """Errors of a reconstruction: map, RMS of image and tiles, and the score relative to the thresholds nu.

    x, reconstruction: [B, 3, t, t]; nu: [B, 1 + tiles]. Returns errors [B, 1 + tiles], map [B, 1, t, t], score [B].
    Score 1 is the paper's rule: normal if and only if the image's and every tile's error are below their thresholds.
    """

    blur: Tensor

    def __init__(self, side: int, grid: int, sigma: float) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("blur", gaussian_matrix(side, sigma).float(), persistent=False)

    def forward(self, x: Tensor, reconstruction: Tensor, nu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        squared = (x - reconstruction).square().mean(dim=1, keepdim=True)
        tiles = split(squared, self.grid).flatten(2).mean(dim=2)
        errors = torch.cat([tiles.mean(dim=1, keepdim=True), tiles], dim=1).sqrt()
        return errors, self.blur @ squared @ self.blur.T, (errors / nu).amax(dim=1)


class PwaeModel(AnomalyModel):
    """P-WAE. With a frozen backbone the tiles' maps are the cached front end; else it trains from images."""

    nu: Tensor
    orders: Tensor
    shifts: Tensor

    def __init__(self, config: PwaeConfig, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.config: PwaeConfig = config
        self.classes = classes
        tiles = config.tiles.grid**2
        self.maps = TileMaps(config)
        channels, side = self.maps.channels, self.maps.side
        pooled = max(1, side - 2)
        self.pool = nn.AvgPool2d(min(3, side), stride=1)
        self.latent = nn.Linear(channels * pooled**2, config.encoder.latent)
        self.jigsaw = nn.Linear(tiles * config.encoder.latent, config.tiles.permutations + 1)
        narrow = config.mode == "bottleneck"
        self.code = nn.Conv2d(channels, config.encoder.code, 1) if narrow else nn.Identity()
        width = config.encoder.code if narrow else channels
        self.decoder = Decoder(width, config.tiles.grid * side, config.decoder.layers, config.decoder.target)
        self.score = ErrorScore(config.decoder.target, config.tiles.grid, config.sigma)
        self.register_buffer("nu", torch.ones(len(classes), 1 + tiles))
        orders = permutations(tiles, config.tiles.permutations, config.seed)
        self.register_buffer("orders", orders)
        held = width * side**2 if narrow else config.encoder.latent
        vector = torch.full((held,), 1.0 if config.loss.shift == "literal" else held**-0.5)
        self.register_buffer("shifts", torch.arange(1, tiles + 1)[:, None] * vector)

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(height=self.config.size, width=self.config.size)

    @property
    def frontend(self) -> nn.Module | None:
        return self.maps if self.config.encoder.frozen else None

    # ---------------------------------------------------------------- the computation

    def codes(self, maps: Tensor) -> Tensor:
        """Tile codes [B, T, c, h, w] of tile maps [B, T, C, h, w]."""
        return self.code(maps.flatten(0, 1)).unflatten(0, maps.shape[:2])

    def latents(self, maps: Tensor) -> Tensor:
        """z [B, T, latent] of tile maps [B, T, C, h, w]."""
        return self.latent(self.pool(maps.flatten(0, 1)).flatten(1)).unflatten(0, maps.shape[:2])

    def reconstruct(self, maps: Tensor) -> Tensor:
        """Image [B, 3, target, target] from tile maps in image order."""
        return self.decoder(assemble(self.codes(maps), self.config.tiles.grid))

    def forward(self, images: Tensor, class_ids: Tensor) -> Scores:
        return self.score_features(self.maps(images), class_ids)

    def score_features(self, features: dict[str, Tensor], class_ids: Tensor) -> Scores:
        """Scores from what :class:`TileMaps` gave."""
        reconstruction = self.reconstruct(features["maps"]).float()
        _, error_map, score = self.score(features["target"], reconstruction, self.nu[class_ids])
        return Scores(error_map[:, 0], score)

    # ---------------------------------------------------------------- training

    def optimizers(self) -> list[Optimizer]:
        s = self.config.schedule
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.config.optimizer == "adam":
            return [Optimizer(torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay), s.lr, parameters)]
        sgd = torch.optim.SGD(parameters, lr=s.lr, momentum=0.9, weight_decay=s.weight_decay)
        return [Optimizer(sgd, s.lr, parameters)]

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        features = dict(batch.features) if batch.images is None else self.maps(batch.images)
        maps, target = features["maps"], features["target"]
        codes, latents = self.codes(maps), self.latents(maps)
        # The encoder sees one tile at a time, so the codes of shuffled tiles are the shuffled codes; the decoder gets
        # them in image order, i.e. after the inverse permutation.
        reconstruction = self.decoder(assemble(codes, self.config.tiles.grid)).float()
        labels = self._draw_orders(len(maps), maps.device)
        logits = self.jigsaw(reorder(latents, self.orders[labels]).flatten(1)).float()
        held = codes.flatten(2) if self.config.mode == "bottleneck" else latents
        with torch.autocast(maps.device.type, enabled=False):
            distance, dependence = self._regularisers(held.float(), target)
        weights = self.config.loss
        losses = {
            "l1": F.l1_loss(reconstruction, target),
            "mse": F.mse_loss(reconstruction, target),
            "swd": distance,
            "hsic": dependence,
            "jigsaw": F.cross_entropy(logits, labels),
        }
        total = losses["l1"] + losses["mse"] + weights.swd * distance
        return {"loss": total + weights.hsic * dependence + weights.jigsaw * losses["jigsaw"], **losses}

    def _draw_orders(self, number: int, device: torch.device) -> Tensor:
        """Permutation classes [B], 0 (in order) with the configured probability."""
        labels = torch.randint(1, len(self.orders), (number,), device=device)
        return labels.masked_fill(torch.rand(number, device=device) < self.config.tiles.identity, 0)

    def _regularisers(self, held: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sliced Wasserstein distance and nHSIC(Z', Z) - beta nHSIC(X, Z) of codes [B, T, d]."""
        c = self.config.loss
        batch, tiles, dim = held.shape
        prior = loss.student_t(c.oversample * batch, dim, c.nu, held)
        distance = loss.sliced_wasserstein(held, prior, self.shifts, loss.directions(c.projections, dim, held))
        if c.hsic == 0 or batch < 2:
            return distance, held.new_zeros(())
        drawn = loss.student_t(batch * tiles, dim, c.nu, held).reshape(batch, tiles, dim) + self.shifts
        small = F.interpolate(target, (c.kernel_side, c.kernel_side), mode="area")
        z = loss.normalised_gram(held.flatten(1))
        prior_term = loss.normalised_hsic(loss.normalised_gram(drawn.flatten(1)), z)
        image_term = loss.normalised_hsic(loss.normalised_gram(small.flatten(1)), z)
        return distance, (prior_term - c.beta * image_term).float()

    @torch.no_grad()
    def finalize(self, holdout: TrainingData) -> None:
        """nu: quantile of the held-out good images' errors, per product (METHODS.md 3.6)."""
        self.eval()
        errors: dict[int, list[Tensor]] = {}
        for batch in holdout.batches(self.config.schedule.batch):
            batch = batch.to(self.nu.device)
            features = dict(batch.features) if batch.images is None else self.maps(batch.images)
            found, _, _ = self.score(
                features["target"], self.reconstruct(features["maps"]).float(), self.nu[batch.class_ids]
            )
            for class_id, row in zip(batch.class_ids.tolist(), found, strict=True):
                errors.setdefault(class_id, []).append(row)
        for class_id, rows in errors.items():
            self.nu[class_id] = torch.quantile(torch.stack(rows), self.config.quantile, dim=0)
