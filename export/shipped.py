"""What travels along to be replayed on the device (golden, warm and gate set), and its replay before the bundle ships.

layout: runtime/replay.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..runtime.bundle import Bundle, hash_file
from ..runtime.engine.onnxruntime import OnnxRuntimeBackend
from ..runtime.errors import ConfigError
from ..runtime.manifest import FileEntry, Loop, Manifest
from ..runtime.program import Program
from ..runtime.replay import (
    GATE,
    GOLDEN,
    WARM,
    carried_states,
    carries,
    replay_gate,
    replay_golden,
    replay_warm,
    warm_order,
)
from . import bundle
from .frames import Frames
from .stage import StagedModel
from .verify import Check, Scored
from .walk import Array, Walk, programs, torch_call


def require_warm_starts(staged: StagedModel) -> None:
    """Refuse a program that does not go on where the last frame left it: each frame for itself is as it should be.

    Raises:
        ConfigError: a loop keeps an input's last value elsewhere than where that input starts from, or counts
            steps over frames and keeps nothing of them.
    """
    for name, steps in programs(staged).items():
        for loop in (step for step in steps if isinstance(step, Loop)):
            own = {
                i: source.partition(":")[2] for i, source in loop.init.items() if source.startswith(("state", "class"))
            }
            wrong = {i: state for i, state in loop.persist.items() if own.get(i) != state}
            if wrong or (loop.counter and not loop.persist):
                raise ConfigError(
                    f"{staged.method}: program {name} does not go on where the last frame left {loop.loop}",
                    found=f"persist {wrong or dict(loop.persist)}, counter {loop.counter}",
                    expected=f"each input kept in the state that it starts from: {own}",
                    next_step=f"mend the cut of {staged.method} (export/methods/{staged.method}.py)",
                )


def write_golden(root: Path, staged: StagedModel, frames: Frames) -> None:
    """golden.npz, and warm.npz where the program carries anything: torch's values."""
    walk = Walk(staged, torch_call(staged))
    values: dict[str, list[Array]] = {}
    for image, class_id in zip(frames.images, frames.class_ids, strict=True):
        walk.reset()
        for name, array in walk.frame(image[None], int(class_id)).items():
            values.setdefault(name, []).append(np.array(array))
    stacked = {name: np.stack(arrays) for name, arrays in values.items()}
    outputs = staged.outputs
    named = {"score": stacked[outputs.score][:, 0], "map": stacked[outputs.map][:, 0]}
    inputs = {"frames": frames.images, "class_ids": frames.class_ids}
    bundle.save_npz(root, GOLDEN, {**inputs, **named, **stacked})
    if carries(staged.program):
        walk.reset()
        scores = [walk.frame(frames.images[i][None], int(frames.class_ids[i])) for i in warm_order(len(frames))]
        kept = {f"state.{name}": np.array(walk.state[name]) for name in carried_states(staged.program)}
        warm = np.array([values[outputs.score][0] for values in scores], np.float32)
        bundle.save_npz(root, WARM, {"score": warm, **kept})


def write_gate(
    root: Path, frames: Frames, chosen: list[int], full: Scored, threshold: Array, others: Mapping[str, Array]
) -> None:
    """gate.npz: of the `chosen` ones of frames what the FP32 engines gave, and `others` of the alternative programs."""
    gate = frames.select(chosen)
    arrays = {"frames": gate.images, "class_ids": gate.class_ids, "labels": gate.labels, "score": full.score[chosen]}
    told = {} if full.logits is None else {"logits": full.logits[chosen]}
    bundle.save_npz(root, GATE, {**arrays, **told, "threshold": threshold, **others})


def replay(root: Path, manifest: Manifest) -> list[Check]:
    """What `andon verify` will say of every variant's default program on this machine: a line each, and one for every
    check that fails. (Alternatives that fail refuse no export: alternatives.py.)"""
    there = {name: hash_file(root / name) for name in (GOLDEN, WARM, GATE) if (root / name).exists()}
    files = {name: FileEntry(sha256=digest, bytes=size) for name, (digest, size) in there.items()}
    made = Bundle(root, root, manifest.model_copy(update={"files": files}), digest="")
    checks = []
    with OnnxRuntimeBackend() as backend:
        for variant in manifest.variants:
            with Program(made, backend, variant) as program:
                found = [
                    *replay_golden(program),
                    *(replay_warm(program) if WARM in there else []),
                    *replay_gate(program),
                ]
            failed = [check for check in found if not check.ok]
            subject, note = f"replay {variant}", f"of {len(found)} as `andon verify` makes them here"
            checks.append(Check(subject, "checks that fail", len(failed), "0", not failed, note))
            checks += [Check(subject, f"{c.subject}: {c.what}", c.value, f"<= {c.limit}", False) for c in failed]
    return checks
