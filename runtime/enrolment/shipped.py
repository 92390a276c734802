"""What an enrolled bundle carries to be replayed on the device (golden, warm and gate set), as these engines give it.

The FP32 stages were compared with torch where they were exported; here it is their FP32 program on this machine that
records the values. layout: runtime/replay.py
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..engine.base import Backend
from ..program import Program
from ..replay import GATE, GOLDEN, WARM, carries, play_warm

Array = NDArray[Any]
#: Frames of the gate set: some 5 s of a program of 150 ms. Fewer where they are large, more bytes than an exported one
#: has do not travel.
GATE_FRAMES, LEAST_GATE_FRAMES = 32, 8
GATE_BYTES = 12 << 20
#: What one good part may differ by from the next in a camera's picture: share of its size, of its light, grey levels.
_SHIFT, _LIGHT, _NOISE = 0.03, 0.1, 3.0


def write_golden(bundle: Bundle, backend: Backend, frames: Array) -> None:
    """golden/golden.npz: every stage output of the FP32 program; golden/warm.npz where it carries anything on.

    frames: uint8 [k, h, w, 3], the support. It is judged mirrored and upside down: at the support itself every distance
    is a rounding error of zero, which no other engine or precision repeats.

    Raises:
        EngineError: a stage failed.
    """
    frames = np.concatenate([frames[:, :, ::-1], frames[:, ::-1]])
    values: dict[str, list[Array]] = {}
    ids, warm = np.zeros(len(frames), np.int32), {}
    with Program(bundle, backend) as program:
        for frame in frames:
            program.reset()
            program.frame[...] = frame
            result = program.run(0)
            values.setdefault("score", []).append(np.array(result.score, np.float32))
            values.setdefault("map", []).append(np.array(result.map)[None])
            for key in program.outputs:
                values.setdefault(key, []).append(np.array(program.read(key)))
        if carries(bundle.manifest.program):
            warm = play_warm(program, frames, ids)
    stacked = {key: np.stack(arrays) for key, arrays in values.items()}
    _save(bundle, GOLDEN, stacked | {"frames": frames, "class_ids": ids})
    if warm:
        _save(bundle, WARM, warm)


def write_gate(bundle: Bundle, backend: Backend, frames: Array, threshold: float) -> dict[str, int]:
    """golden/gate.npz: scores of views of the support at a threshold of the default program; for report.json.

    frames: uint8 [k, h, w, 3], the support. No defect is known, so none is labelled as one, and no AUROC is made of it;
    the views that are spoilt are there so that some scores lie above the threshold, as a flip is a change of sides.

    Returns:
        frames: how many; over: those that FP32 judges NG.

    Raises:
        EngineError: a stage failed.
    """
    seen, labels = views(frames)
    scores = np.empty(len(seen), np.float64)
    with Program(bundle, backend) as program:
        for index, frame in enumerate(seen):
            program.reset()
            program.frame[...] = frame
            scores[index] = program.run(0).score
    arrays = {
        "frames": seen,
        "class_ids": np.zeros(len(seen), np.int32),
        "labels": labels,
        "score": scores,
        "threshold": np.array([threshold]),
    }
    _save(bundle, GATE, arrays)
    return {"frames": len(seen), "over": int((scores > threshold).sum())}


def views(frames: Array) -> tuple[Array, Array]:
    """Pictures such as the line might see, the same ones every time, and their labels int32 [n].

    frames: uint8 [k, h, w, 3]. One half is moved, in other light and with noise: label 0, a good part. The other half
    also has a piece of the picture pasted elsewhere, lighter or darker (CutPaste, Li et al. 2021): label -1, as nobody
    has called that a defect. All of it from barely to fully, so that scores spread to both sides of a threshold that
    rests on few pictures.
    """
    count = max(LEAST_GATE_FRAMES, min(GATE_FRAMES, GATE_BYTES // frames[0].nbytes))
    rng = np.random.default_rng(0)
    made, labels = [], []
    for index in range(count):
        turn, image = divmod(index, len(frames))
        spoilt, strength = (turn + image) % 2, (index + 1) / count
        view = _again(frames[image], rng, strength)
        made.append(_spoilt(view, rng, strength) if spoilt else view)
        labels.append(-1 if spoilt else 0)
    return np.stack(made), np.array(labels, np.int32)


def _again(frame: Array, rng: np.random.Generator, strength: float) -> Array:
    """The part as if it were laid down and lit once more; strength: 0 (no other) to 1."""
    height, width = frame.shape[:2]
    x, y, light = rng.uniform(-strength, strength, 3) * (_SHIFT * width, _SHIFT * height, _LIGHT)
    moved = np.array([[1, 0, x], [0, 1, y]], np.float64)
    view = cv2.warpAffine(frame, moved, (width, height), borderMode=cv2.BORDER_REPLICATE)
    lit = view * (1 + light) + rng.normal(0, strength * _NOISE, view.shape)
    return np.clip(np.rint(lit), 0, 255).astype(np.uint8)


def _spoilt(frame: Array, rng: np.random.Generator, strength: float) -> Array:
    """A piece of it, from 3 % to 20 % of each side, somewhere else, shifted in brightness; strength: 0 (not) to 1."""
    height, width = frame.shape[:2]
    h, w = (int(rng.uniform(0.03, 0.2) * size) + 1 for size in (height, width))
    y0, x0, y1, x1 = (int(rng.integers(0, size)) for size in (height - h, width - w, height - h, width - w))
    piece = frame[y0 : y0 + h, x0 : x0 + w] + rng.uniform(30, 90) * rng.choice((-1, 1))
    view = frame.astype(np.float64)
    view[y1 : y1 + h, x1 : x1 + w] += strength * (piece - view[y1 : y1 + h, x1 : x1 + w])
    return np.clip(np.rint(view), 0, 255).astype(np.uint8)


def _save(bundle: Bundle, name: str, arrays: dict[str, Array]) -> None:
    path = bundle.root / name
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, allow_pickle=False, **arrays)
