"""What a plan is for: the machine it runs on, and the options it is built with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import EngineError
from .cuda import Device
from .probe import l4t_release
from .trt import Trt


@dataclass(frozen=True)
class BuildOptions:
    """How plans are built. Those that change the plan are part of its key.

    workspace_mb: limit of scratch memory that TensorRT may plan with.
    optimization_level: builder_optimization_level, None is TensorRT's default.
    dla: stages to put on the deep learning accelerator; dla_core: which one.
    """

    workspace_mb: int = 1024
    optimization_level: int | None = None
    dla: frozenset[str] = frozenset()
    dla_core: int = 0

    def of(self, stage: str) -> dict[str, Any]:
        """What of them concerns a stage, as it goes into the plan's key."""
        core = self.dla_core if stage in self.dla else None
        return {"workspace_mb": self.workspace_mb, "optimization_level": self.optimization_level, "dla_core": core}

    @classmethod
    def from_stage(cls, stage: str, kept: dict[str, Any]) -> BuildOptions:
        """The options for one stage from what :meth:`of` gave."""
        core = kept["dla_core"]
        dla = frozenset() if core is None else frozenset({stage})
        return cls(int(kept["workspace_mb"]), kept["optimization_level"], dla, core or 0)


@dataclass(frozen=True)
class Target:
    """What a plan runs on. l4t: release of Jetson Linux, empty elsewhere.

    Modules of one family have one name and sm ("Orin", "8.7"); how many multiprocessors and GiB they have differs.
    """

    tensorrt: str
    gpu: str
    sm: str
    l4t: str
    multiprocessors: int
    memory_gib: int

    @classmethod
    def of(cls, trt: Trt, device: Device) -> Target:
        """This machine."""
        memory = round(device.memory_bytes / 2**30)
        return cls(str(trt.__version__), device.name, device.sm, l4t_release(), device.multiprocessors, memory)


def with_dla(options: BuildOptions, stages: frozenset[str], known: Callable[[str], bool]) -> BuildOptions:
    """The options with these stages on the DLA.

    Raises:
        EngineError: a stage does not exist.
    """
    unknown = sorted(stage for stage in stages if not known(stage))
    if unknown:
        raise EngineError("there is no such stage for the DLA", found=", ".join(unknown), next_step="name a stage")
    return replace(options, dla=stages)
