"""Metrics of a torch model on the test images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from tqdm import tqdm

from ..runtime.crop import read_image, read_pair
from ..runtime.dataset import Sample
from ..runtime.fingerprint import image_hash
from ..runtime.preprocess import resize
from ..runtime.quality import Array, Metrics, map_at, mask_at, summarize
from .errors import TrainingError
from .features import bar_settings
from .method import AnomalyModel


def unseen(samples: Sequence[Sample], seen: Iterable[str]) -> tuple[list[Sample], int]:
    """Samples that are no copies of images that training saw, and how many are: `andon eval` leaves out the same.

    seen: hashes of the files of the good training images, of those held out too.

    Raises:
        SourceError: an image cannot be read.
    """
    known = {*seen}
    new = [s for s in samples if image_hash(s.path) not in known]
    return new, len(samples) - len(new)


def evaluate(
    model: AnomalyModel,
    samples: Sequence[Sample],
    device: torch.device | str = "cpu",
    *,
    batch: int = 8,
    progress: bool = True,
) -> dict[str, Metrics]:
    """Figures per product, the product given; pixel figures where every defective image of a product has a mask.

    Raises:
        SourceError: an image or mask cannot be read.
        TrainingError: a score is not a number.
    """
    model.to(device).eval()
    results: dict[str, Metrics] = {}
    with tqdm(total=len(samples), desc="test", unit="img", disable=not progress, **bar_settings()) as bar:
        for product in sorted({s.product for s in samples}):
            mine = [s for s in samples if s.product == product]
            pixels = all(s.good or s.mask_path is not None for s in mine) and any(not s.good for s in mine)
            scores, maps, masks = _score(model, mine, device, batch, pixels, bar)
            defective = np.array([not s.good for s in mine])
            results[product] = summarize(
                scores, defective, maps=maps if pixels else None, masks=masks if pixels else None
            )
    return results


@torch.inference_mode()
def _score(
    model: AnomalyModel,
    samples: Sequence[Sample],
    device: torch.device | str,
    batch: int,
    pixels: bool,
    bar: tqdm,  # type: ignore[type-arg]
) -> tuple[Array, Array, Array]:
    """Scores float32 [N]; maps float32 and masks bool [N, height, width], empty unless `pixels`."""
    size = (model.preprocess.height, model.preprocess.width)
    count = len(samples)
    scores = np.empty(count, np.float32)
    maps = np.empty((count if pixels else 0, *size), np.float32)
    masks = np.zeros((count if pixels else 0, *size), bool)
    class_id = model.classes.index(samples[0].product)
    for start in range(0, count, batch):
        part = samples[start : start + batch]
        frames = []
        for i, sample in enumerate(part, start):
            image, mask = read_pair(sample) if pixels else (read_image(sample), None)
            frames.append(resize(image, model.preprocess))
            if mask is not None:
                masks[i] = mask_at(mask, size)
        out = model(torch.from_numpy(np.stack(frames)).to(device), torch.full((len(part),), class_id, device=device))
        scores[start : start + len(part)] = out.score.float().cpu().numpy()
        if pixels:
            for i, score_map in enumerate(out.map.float().cpu().numpy(), start):
                maps[i] = map_at(score_map, size)
        bar.update(len(part))
    if not np.isfinite(scores).all():
        bad = samples[int(np.flatnonzero(~np.isfinite(scores))[0])]
        raise TrainingError(f"the score of {bad.path} is not a number", next_step="lower schedule.lr and train again")
    return scores, maps, masks
