"""Validation sets, on which settings are chosen (METHODS.md F.5): good training images held out of training, and the
same images with synthetic defects and their masks. Nothing of a test split is read.

    python -m measure.validation --data elpv --out runs/validation/elpv
    python -m measure.validation --data elpv --train 24 --out runs/validation/elpv24     # a set of a few dozen images
    python -m measure.validation --data elpv --large --out runs/validation/elpv_large    # defects of 4 % to 30 %
    python -m measure.validation --data elpv --graded 0.67 --out runs/validation/elpv67  # real ones of uncertain label

Four kinds of defects, of 0.3 % to 3 % of the image: a patch of the image pasted elsewhere in it (CutPaste, Li et
al. 2021), a thin scar, a smudge (blurred, with a faint shade) and a patch of noise blended in (after DRAEM, Zavrtanik
et al. 2021). Their contrast is drawn from 8 to 35 % of the range, so that not all of them are easy.

With --large there are three kinds of 4 % to 30 % of the image instead, with soft borders: an uneven shade, texture that
is worn off, another part of the image. Small ones reward resolution and do not show what it costs on large ones.

With --graded the held-out images stand beside elpv's cells that experts called defective with that probability instead;
they are in neither split.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
from andon.runtime.dataset import Sample, open_dataset
from andon.runtime.images import read_rgb

Image = np.ndarray
HELD = 0.2
AT_MOST = 60
PLAIN = 12.0  # grey levels: deviation of a background that counts as plain
EACH_KIND_BELOW = 20  # so few held-out images get every kind of defect, others one kind in turn


def on_part(image: Image) -> Image:
    """Where a part lies on a plain background, bool [H, W]; everywhere if what borders the image is not plain."""
    grey = image.mean(-1)
    rim = max(1, round(0.02 * min(grey.shape)))
    border = np.concatenate([grey[:rim].ravel(), grey[-rim:].ravel(), grey[:, :rim].ravel(), grey[:, -rim:].ravel()])
    if border.std() > PLAIN:
        return np.ones(grey.shape, bool)
    part = np.abs(cv2.GaussianBlur(grey, (0, 0), 2) - np.median(border)) > 2 * PLAIN
    return part if part.any() else np.ones(grey.shape, bool)


def shape(image: Image, rng: np.random.Generator, thin: bool = False, large: bool = False) -> Image:
    """A soft mask float32 [H, W] in 0..1 of a blob, large or not, or a scar on the part, in the middle nine tenths."""
    size = height, width = image.shape[:2]
    mask = np.zeros(size, np.float32)
    part = on_part(image)
    for _ in range(200):
        centre = (int(width * rng.uniform(0.15, 0.85)), int(height * rng.uniform(0.15, 0.85)))
        if part[centre[1], centre[0]]:
            break
    side = np.sqrt(height * width)
    if thin:
        length, thick = side * rng.uniform(0.12, 0.35), max(2, round(side * rng.uniform(0.008, 0.02)))
        turn = rng.uniform(0, np.pi)
        arm = (length / 2 * np.cos(turn), length / 2 * np.sin(turn))
        ends = [(int(centre[0] + s * arm[0]), int(centre[1] + s * arm[1])) for s in (-1, 1)]
        cv2.line(mask, ends[0], ends[1], 1.0, thick)
    else:
        low, high = (0.12, 0.32) if large else (0.03, 0.1)
        axes = (max(2, int(side * rng.uniform(low, high))), max(2, int(side * rng.uniform(low, high))))
        cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1)
    return cv2.GaussianBlur(mask, (0, 0), side * 0.03 if large else max(0.5, side * 0.002))


def paste(image: Image, rng: np.random.Generator) -> tuple[Image, Image]:
    mask = shape(image, rng, thin=False)
    height, width = mask.shape
    shift = (int(rng.uniform(0.2, 0.8) * height), int(rng.uniform(0.2, 0.8) * width))
    other = np.roll(image, shift, axis=(0, 1)) + 255 * rng.uniform(0.05, 0.2) * rng.choice((-1, 1))
    return other, mask


def scar(image: Image, rng: np.random.Generator) -> tuple[Image, Image]:
    return image + 255 * rng.uniform(0.08, 0.35) * rng.choice((-1, 1)), shape(image, rng, thin=True)


def smudge(image: Image, rng: np.random.Generator) -> tuple[Image, Image]:
    blurred = cv2.GaussianBlur(image, (0, 0), 0.02 * np.sqrt(image.shape[0] * image.shape[1]))
    return blurred + 255 * rng.uniform(0.04, 0.15) * rng.choice((-1, 1)), shape(image, rng, thin=False)


def noise(image: Image, rng: np.random.Generator) -> tuple[Image, Image]:
    small = rng.standard_normal((image.shape[0] // 4 + 1, image.shape[1] // 4 + 1)).astype(np.float32)
    grain = cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_CUBIC)[..., None]
    return image + 255 * rng.uniform(0.08, 0.3) * grain, shape(image, rng, thin=False)


def uneven(image: Image, rng: np.random.Generator) -> tuple[Image, Image]:
    return image + 255 * rng.uniform(0.06, 0.2) * rng.choice((-1, 1)), shape(image, rng, large=True)


def worn(image: Image, rng: np.random.Generator) -> tuple[Image, Image]:
    side = np.sqrt(image.shape[0] * image.shape[1])
    return cv2.GaussianBlur(image, (0, 0), side * rng.uniform(0.006, 0.03)), shape(image, rng, large=True)


def swapped(image: Image, rng: np.random.Generator) -> tuple[Image, Image]:
    mask = shape(image, rng, large=True)
    height, width = mask.shape
    return np.roll(image, (int(rng.uniform(0.2, 0.8) * height), int(rng.uniform(0.2, 0.8) * width)), axis=(0, 1)), mask


KINDS: dict[str, Callable[[Image, np.random.Generator], tuple[Image, Image]]] = {
    "paste": paste,
    "scar": scar,
    "smudge": smudge,
    "noise": noise,
}
LARGE = {"uneven": uneven, "worn": worn, "swapped": swapped}


def spoil(image: Image, kind: str, seed: int) -> tuple[Image, Image]:
    """The image uint8 [H, W, 3] with a defect, and its mask uint8 [H, W], 0 or 255."""
    rng = np.random.default_rng(seed)
    changed, soft = (KINDS | LARGE)[kind](image.astype(np.float32), rng)
    mixed = image + soft[..., None] * (changed - image)
    return np.clip(mixed, 0, 255).astype(np.uint8), np.where(soft > 0.3, 255, 0).astype(np.uint8)


def write(path: Path, image: Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image)


def product_set(
    samples: list[Sample], out: Path, train: int | None, graded: list[Path] | None = None, large: bool = False
) -> None:
    """One product in MVTec's layout: train/good, test/good, and test/<kind>, ground_truth/<kind> or test/graded."""
    samples = random.Random(1).sample(sorted(samples, key=lambda s: s.key), len(samples))
    count = min(AT_MOST, max(8, round(HELD * len(samples))))
    for index, sample in enumerate(samples[:count]):
        image = read_rgb(sample.path)
        write(out / "test/good" / f"{index:03}.png", image)
        if graded is not None:
            continue
        known = list(LARGE if large else KINDS)
        kinds = known if count < EACH_KIND_BELOW else [known[index % len(known)]]
        for kind in kinds:
            spoilt, mask = spoil(image, kind, 1000 * index + known.index(kind))
            write(out / "test" / kind / f"{index:03}.png", spoilt)
            write(out / "ground_truth" / kind / f"{index:03}_mask.png", mask)
    for index, path in enumerate(graded or []):
        write(out / "test/graded" / f"{index:03}.png", read_rgb(path))
    for index, sample in enumerate(samples[count:][:train]):
        write(out / "train/good" / f"{index:03}.png", read_rgb(sample.path))


def graded_cells(grade: float, product: str) -> list[Path]:
    """elpv's cells of a product that were graded so: 0.33 or 0.67."""
    package = find_spec("elpv_dataset")
    assert package is not None and package.submodule_search_locations, "pip install elpv-dataset"
    root = Path(package.submodule_search_locations[0]) / "data"
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines() if line.strip()]
    return [root / name for name, given, kind in rows if kind == product and abs(float(given) - grade) < 0.02]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a validation set of a data set's good training images.")
    parser.add_argument("--data", required=True)
    parser.add_argument("--train", type=int, metavar="N", help="at most N images of a product to train on")
    parser.add_argument("--large", action="store_true", help="large defects instead of small ones")
    parser.add_argument("--graded", type=float, metavar="P", help="elpv: cells graded P instead of synthetic defects")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.graded is not None and args.data != "elpv":
        parser.error(f"--graded: only elpv has graded cells, not {args.data}")
    data = open_dataset(args.data)
    good = [s for s in data.samples if s.split == "train" and s.good]
    for product in data.products:
        graded = None if args.graded is None else graded_cells(args.graded, product)
        if graded == []:
            parser.error(f"--graded {args.graded}: no cell of {product} was graded so; elpv has 0.33 and 0.67")
        product_set([s for s in good if s.product == product], args.out / product, args.train, graded, args.large)
    print(open_dataset(args.out).describe())


if __name__ == "__main__":
    main()
