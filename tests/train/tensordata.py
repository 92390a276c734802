"""Training data from tensors, without images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from andon.train.method import Batch
from torch import Tensor


@dataclass
class Data:
    """Training data from tensors, as the loop offers it."""

    features: Mapping[str, Any]
    class_ids: Any

    def __len__(self) -> int:
        return len(self.class_ids)

    def batches(self, size: int) -> Iterator[Batch]:
        for index in torch.arange(len(self)).split(size):
            yield self.batch(index)

    def batch(self, index: Tensor) -> Batch:
        return Batch({k: v[index] for k, v in self.features.items()}, None, self.class_ids[index], index)
