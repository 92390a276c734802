"""The torch model behind a bundle, for `andon bench`: found by the checkpoint's hash, run at the same thread count.

The device side knows nothing of torch: it asks for this through the entry point group ``andon.reference``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .checkpoint import PROVENANCE, load_checkpoint, read_provenance, runs_root
from .errors import CheckpointError

Judge = Callable[[NDArray[Any], int], float]


@contextmanager
def open_reference(weights_sha256: str, checkpoint: Path | None, threads: int) -> Iterator[Judge]:
    """The model in eval mode as a function of (frame uint8 [1, H, W, 3], class index) -> image score.

    Args:
        weights_sha256: what the bundle says it was exported from.
        checkpoint: its folder; None looks through the runs folder.
        threads: torch's threads while it is open.

    Raises:
        CheckpointError: there is no such checkpoint, or it is another one.
    """
    import torch

    folder = checkpoint or _find(weights_sha256)
    if read_provenance(folder).weights_sha256 != weights_sha256:
        raise CheckpointError(
            f"{folder} is not the checkpoint the bundle was made from",
            found=read_provenance(folder).weights_sha256[:12],
            expected=weights_sha256[:12],
            next_step="give the right --checkpoint, or export this one",
        )
    model = load_checkpoint(folder)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)

    def judge(frame: NDArray[Any], class_index: int) -> float:
        return float(model(torch.from_numpy(frame), torch.tensor([class_index])).score)

    try:
        with torch.inference_mode():
            yield judge
    finally:
        torch.set_num_threads(before)


def _find(weights_sha256: str) -> Path:
    root = runs_root()
    for path in sorted(root.glob(f"*/{PROVENANCE}")):
        if read_provenance(path.parent).weights_sha256 == weights_sha256:
            return path.parent
    raise CheckpointError(
        f"the checkpoint {weights_sha256[:12]} of this bundle is not under {root}",
        found=f"{len(list(root.glob('*')))} other runs",
        expected="the run that the bundle was exported from",
        next_step="name its folder with --checkpoint, or measure without it: --no-torch",
    )
