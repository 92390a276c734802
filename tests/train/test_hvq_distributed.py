"""Codebook statistics over two gloo processes that hold different classes (METHODS.md 1.2, point 2)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from andon.train.methods.hvq.config import CodebookConfig
from andon.train.methods.hvq.quantizer import ClassCodebooks

IDS = torch.tensor([0, 0, 1, 2])


def book(revive_below: float) -> ClassCodebooks:
    torch.manual_seed(3)
    return ClassCodebooks(4, 5, CodebookConfig(size=6, revive_below=revive_below)).train()


def tokens() -> torch.Tensor:
    return torch.randn(4, 10, 5, generator=torch.Generator().manual_seed(4))


def worker(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    part = slice(2 * rank, 2 * rank + 2)
    for revive_below in (0.0, 1.005):
        shared = book(revive_below)
        torch.manual_seed(100 + rank)  # each rank draws its own random tokens
        shared(tokens()[part], IDS[part])
        shared.update(0)
        torch.save(shared.state_dict(), f"{folder}/{revive_below}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    started = [subprocess.Popen([sys.executable, __file__, str(folder), str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    return folder


def ranks(folder: Path, revive_below: float) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"{revive_below}-{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_update_like_one(folder: Path) -> None:
    first, second = ranks(folder, 0.0)
    alone = book(0.0)
    alone(tokens(), IDS)
    alone.update(0)
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value)
    assert torch.equal(first["codes"][3], book(0.0).codes[3]), "a class on no rank keeps its codes"


def test_revived_codes_agree_and_are_tokens_of_their_class(folder: Path) -> None:
    first, second = ranks(folder, 1.005)
    assert torch.equal(first["codes"], second["codes"])
    revived = (torch.cdist(first["codes"][1], tokens()[2]) == 0).any(dim=1)
    assert revived.any(), "some code of class 1, which only the second process holds, came back as one of its tokens"


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]))
