"""VPDM's queue of recent features over two gloo processes: one for all, as a resumed run has rank 0's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from andon.train.methods.vpdm.model import Vpdm

from .smallvpdm import feature_data, small_config


def queue(part: slice) -> torch.Tensor:
    """The queue after one step on these of four images."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Vpdm(small_config(), ("a",))
    data = feature_data(model, 4)
    model.training_step(data.batch(torch.arange(4)[part]), 0)
    model.after_step(0)
    return model.queue[: int(model.queued)]


def worker(folder: str, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.save(queue(slice(2 * rank, 2 * rank + 2)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_one_queue_as_a_single_one_has(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.train.test_vpdm_distributed", str(tmp_path)]
    started = [subprocess.Popen([*command, str(rank)], cwd=Path(__file__).parents[2]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, queue(slice(4)))


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]))
