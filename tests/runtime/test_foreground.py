"""Which cells of an image show the part: by GrabCut, by the user's masks, by a segmentation model."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnx
import onnx.parser
import pytest
from andon.runtime.enrolment import foreground as fg
from andon.runtime.errors import ConfigError

from .parts import part


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_grabcut_finds_a_part_and_leaves_textures_alone():
    image, truth = part()
    assert overlap(fg.GrabCut()(image, Path("x")), truth) > 0.9
    texture = np.random.default_rng(1).integers(0, 255, (200, 200, 3), np.uint8)
    assert fg.GrabCut()(texture, Path("x")) is None
    assert fg.GrabCut()(np.full((64, 64, 3), 7, np.uint8), Path("x")) is None


def test_user_masks_of_a_folder_and_of_a_file(tmp_path):
    image, truth = part()
    cv2.imwrite(str(tmp_path / "a_mask.png"), truth.astype(np.uint8) * 255)
    assert (fg.choose(f"mask:{tmp_path}")(image, Path("some/a.jpg")) == truth).all()
    assert (fg.choose(f"mask:{tmp_path / 'a_mask.png'}")(image, Path("b.jpg")) == truth).all()
    with pytest.raises(ConfigError, match=r"no foreground mask for b\.jpg"):
        fg.choose(f"mask:{tmp_path}")(image, Path("b.jpg"))


def save(text, path):
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>\n' + text)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return path


def test_a_segmentation_model_in_one_file(tmp_path):
    """Brightness as the saliency."""
    path = save(
        """saliency (float[1,3,64,64] image) => (float[1,1,64,64] out) {
            out = ReduceMean<axes=[1], keepdims=1>(image)
        }""",
        tmp_path / "m.onnx",
    )
    image, truth = part()
    assert overlap(fg.choose(f"onnx:{path}")(image, Path("x")), truth) > 0.95


def test_a_segmentation_model_gets_the_pixels_it_was_trained_with(tmp_path, monkeypatch):
    path = save(
        """saliency (float[1,3,64,64] image) => (float[1,3,64,64] out) { out = Identity(image) }""", tmp_path / "m.onnx"
    )
    seen = []
    for spec in (f"onnx:{path}", f"onnx:{path},0.5,1"):
        model = fg.choose(spec)
        monkeypatch.setattr(model, "_session", Recorder(model._session, seen))
        model(np.full((64, 64, 3), 255, np.uint8), Path("x"))
    imagenet, half = (tensor[0, :, 0, 0] for tensor in seen)
    np.testing.assert_allclose(imagenet, [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rtol=1e-5)
    np.testing.assert_allclose(half, [0.5] * 3, rtol=1e-6)


class Recorder:
    """A session that keeps what it was given and answers with nothing that stands out."""

    def __init__(self, session, seen):
        self._seen = seen

    def run(self, names, inputs):
        self._seen.extend(inputs.values())
        return [np.zeros((1, 1, 64, 64), np.float32)]


@pytest.mark.parametrize(
    "spec", ["", "grab", "mask:", "onnx:", "sam:a", "all:x", "onnx:m,0.5", "onnx:m,a,b", "onnx:m,0.5,0"]
)
def test_unknown_foreground_is_refused(spec):
    with pytest.raises(ConfigError, match="foreground"):
        fg.choose(spec)


def test_missing_and_wrong_models_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no segmentation model"):
        fg.choose(f"onnx:{tmp_path / 'x.onnx'}")
    path = save("m (float[1,3] a) => (float[1,3] b) { b = Identity(a) }", tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="not a segmentation model"):
        fg.choose(f"onnx:{path}")
    with pytest.raises(ConfigError, match="not a SAM mask decoder"):
        fg.choose(f"sam:{path},{path}")


def test_grid_masks_take_cells_that_are_at_least_half_part():
    mask = np.zeros((8, 8), bool)
    mask[:4, :3] = True
    assert fg.to_grid(mask, 2).tolist() == [True, False, False, False]
    assert fg.to_grid(None, 2).all()
    assert fg.to_grid(np.zeros((8, 8), bool), 2).all()
