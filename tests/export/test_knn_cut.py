"""The cut of knn: what its score stage says of a memory that has learnt, as the guard reads it."""

from __future__ import annotations

import numpy as np
import pytest
from andon.calib.distance import nearest

from .edge import STORED, VARIANTS, edge, stage_model
from .test_methods import run


@pytest.mark.parametrize("variant", (*VARIANTS, STORED))
def test_anchors_are_of_the_semantic_rows_however_full_the_memory_is(variant: str) -> None:
    """Export's own frames meet a memory that has learnt nothing, where anchors and patch scores are the same."""
    made = edge("knn")
    memory = made.staged.memory
    assert memory is not None and memory.anchor == "score.anchor" and memory.patch_score == "score.patch_score"
    inputs, _ = made.calls["score"][0]
    bank, valid, patches = inputs["bank"].copy(), inputs["valid"].copy(), inputs["patches"]
    known = bank[: memory.semantic_rows][valid[: memory.semantic_rows] > 0]
    learnt = slice(memory.semantic_rows, memory.semantic_rows + 300)
    bank[learnt], valid[learnt] = patches[:300], 1
    model = stage_model("knn", "score", variant)
    names = [output.name for output in model.graph.output]
    found = dict(zip(names, run(model, {"patches": patches, "bank": bank, "valid": valid}), strict=True))
    np.testing.assert_allclose(found["anchor"], nearest(patches, known)[0], rtol=1e-3, atol=1e-3)
    assert found["patch_score"][:300].max() < 0.1 < np.median(found["anchor"][:300])
    assert (found["patch_score"] <= found["anchor"]).all()
