"""The file that an interrupted training goes on from: written now and then, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from . import distributed
from .backbones import backbones_in
from .errors import TrainingError
from .features import FeatureSet
from .method import AnomalyModel, MethodConfig


class ResumeFile:
    """State of a run: model, optimisers, average, step, clock, and the random generators of every process.

    Args:
        path: the file.
        run: hash of everything that must not change between sessions (configuration, classes, images).
        every: seconds between saves.
        former: hashes that earlier versions gave the same run; a file with one of them is gone on from, too.
    """

    def __init__(self, path: Path, run: str, every: float = 60.0, *, former: Collection[str] = ()):
        self._path = path
        self._run = run
        self._former = former
        self._every = every
        self._last = time.monotonic()

    def exists(self) -> bool:
        """True if there is something to go on from (the same answer on every process)."""
        return bool(distributed.same_everywhere(self._path.is_file()))

    def due(self, agree: Callable[[float, torch.device], float], device: torch.device) -> bool:
        """True if it is time to save; `agree` makes all processes answer alike."""
        return agree(float(time.monotonic() - self._last >= self._every), device) > 0

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file atomically; it survives the process being killed at any moment."""
        generators = distributed.gather_objects(_generators())
        if distributed.is_main():
            part = self._path.with_suffix(".part")
            with part.open("wb") as handle:
                torch.save({**state, "run": self._run, "andon": __version__, "generators": generators}, handle)
                handle.flush()
                os.fsync(handle.fileno())
            part.replace(self._path)
        self._last = time.monotonic()

    def load(self) -> dict[str, Any]:
        """The saved state; also sets this process's random generators.

        Raises:
            TrainingError: unreadable, of another run, or of another number of processes.
        """
        try:
            state: dict[str, Any] = torch.load(self._path, "cpu", weights_only=True)
        except Exception as error:
            raise TrainingError(
                f"cannot read {self._path}: {error}", next_step="start again without --resume"
            ) from error
        generators = state["generators"]
        if state["run"] not in (self._run, *self._former) or len(generators) != distributed.world():
            version = state.get("andon", "before it was recorded")
            raise TrainingError(
                f"{self._path} is of another run",
                found=f"run {state['run'][:12]}, {len(generators)} processes, by Andon {version}",
                expected=f"run {self._run[:12]}, {distributed.world()} processes, by Andon {__version__}",
                next_step="resume with the same images, settings, number of processes and version of Andon, or start "
                "again",
            )
        _set_generators(generators[distributed.rank()])
        return state

    def remove(self) -> None:
        """The run is complete."""
        if distributed.is_main():
            self._path.unlink(missing_ok=True)


def _generators() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": [version, list(words), gauss],
    }


def _set_generators(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))


def run_hashes(model: AnomalyModel, data: FeatureSet) -> tuple[str, str]:
    """What must be the same when a run goes on: settings, products, backbone weights, images and their contents.

    The first without settings that have their default, so that a setting which a later version adds does not make
    another run of it; the second as files have it that record no version.
    """
    images = [(s.key, hashed) for s, hashed in zip(data.samples, data.hashes, strict=True)]
    weights = [b.record.sha256 for b in backbones_in(model)]
    config, rest = model.config, [list(model.classes), weights, images]

    def hashed(settings: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps([settings, *rest]).encode()).hexdigest()

    return hashed(config.model_dump(mode="json", exclude_defaults=True)), hashed(_before(config))


def _before(config: MethodConfig) -> dict[str, Any]:
    """All settings, without those with their default that came after the first runs to be resumed."""
    settings = config.model_dump(mode="json")
    for section, name in (("backbone", "turned"), ("score", "align_corners")):
        held = settings.get(section)
        if isinstance(held, dict) and held.get(name) is False:
            del held[name]
    if not settings["group_by"]:
        del settings["group_by"]
    return settings
