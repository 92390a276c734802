"""Loading a state into a model whose buffers `prepare` or `finalize` may have replaced by ones of another size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def adopt_shapes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give buffers the shapes that are named; parameters keep theirs, so that a wrong architecture is noticed."""
    for name, buffer in list(module.named_buffers()):
        shape = shapes.get(name)
        if shape is not None and shape != tuple(buffer.shape):
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, torch.empty(shape, dtype=buffer.dtype, device=buffer.device))


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``load_state_dict``, strict, after the buffers took the shapes of the state.

    Raises:
        RuntimeError: names differ, or a parameter's shape does.
    """
    adopt_shapes(module, {k: tuple(v.shape) for k, v in state.items()})
    module.load_state_dict(dict(state))
