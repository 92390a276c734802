"""DistributedDataParallel as torchrun starts it; every function also works, and does nothing, in a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .state import adopt_shapes


@contextmanager
def process_group() -> Iterator[None]:
    """Join the group that torchrun describes in the environment (NCCL on GPUs, gloo on CPUs); leave it at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def active() -> bool:
    """True inside a group of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, 0 for the one that writes files."""
    return dist.get_rank() if active() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    """True in the process that prints and writes."""
    return rank() == 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over the processes, in place; returns the tensor. For statistics such as codebook counts."""
    if active():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(value: float, device: torch.device) -> float:
    """The largest value of any process: clocks and stop signals must agree."""
    if not active():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def broadcast_module(module: nn.Module) -> None:
    """Give every process rank 0's parameters and buffers, whatever their shapes were before.

    `prepare` runs on rank 0 alone, and may have replaced buffers by ones of another size.
    """
    if not active():
        return
    shapes: list[Any] = [{k: tuple(v.shape) for k, v in module.state_dict().items()}]
    dist.broadcast_object_list(shapes)
    adopt_shapes(module, shapes[0])
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, 0)


def gathered(tensor: Tensor) -> list[Tensor]:
    """Every process's tensor, in rank order (on all processes); of one shape everywhere, without gradients."""
    if not active():
        return [tensor]
    tensors = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(tensors, tensor.contiguous())
    return tensors


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, in rank order (on all processes)."""
    if not active():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def same_everywhere(value: Any) -> Any:
    """Rank 0's value on all processes."""
    values = [value]
    if active():
        dist.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Wait until every process is here."""
    if active():
        dist.barrier()
