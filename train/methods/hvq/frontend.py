"""The frozen front end, alone in its file: the feature cache is keyed by the file's text."""

from __future__ import annotations

from torch import Tensor

from ...align import AlignedFeatures


class Frontend(AlignedFeatures):
    """uint8 [B, S, S, 3] to ``aligned`` [B, C, grid, grid] float32."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """images: [B, S, S, 3] uint8 RGB."""
        return {"aligned": super().forward(images)}
