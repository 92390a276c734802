"""Prompting a SAM: models with the names, shapes and types that the families' own export scripts give theirs.

Sources: segment-anything and MobileSAM scripts/export_onnx_model.py (decoder), samexporter export_encoder.py (both
encoders), NanoSAM tools/export_image_encoder_onnx.py and export_sam_mask_decoder_onnx.py. The encoder's embedding is
the image's brightness, one of the decoder's four masks is where that is above the normalised mean.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from andon.runtime.enrolment import foreground as fg
from andon.runtime.errors import ConfigError
from onnx import TensorProto as T
from onnx import helper, numpy_helper

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def part(height=300, width=180):
    """A bright disc, not in the middle of an image that is no square."""
    image = np.random.default_rng(0).integers(20, 60, (height, width, 3), np.uint8)
    truth, radius = np.zeros((height, width), np.uint8), min(height, width) // 4
    for canvas, colour in ((image, (220, 210, 200)), (truth, 1)):
        cv2.circle(canvas, (width // 2 + radius // 2, height // 2 + radius // 2), radius, colour, -1)
    return image, truth > 0


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def save(path, nodes, inputs, outputs, constants):
    values = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    info = [[helper.make_tensor_value_info(n, t, s) for n, t, s in each] for each in (inputs, outputs)]
    graph = helper.make_graph([helper.make_node(*n[:3], **n[3]) for n in nodes], "sam", *info, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return path


def encoder(path, *, side=1024, name="input_image", preprocess=False, kind=T.FLOAT):
    """[1, 3, side, side], or with preprocess [image_height, image_width, 3] in 0..255; to [1, 256, 64, 64]."""
    nodes, constants = [], {"one": np.int64([1]), "many": np.int64([1, 256, 1, 1])}
    planes = name
    if preprocess:
        constants |= {"mean": np.float32(MEAN), "std": np.float32(STD), "zeros": np.int64([0] * 4)}
        constants |= {"full": np.int64([1, 3, side, side]), "first": np.int64([0])}
        nodes = [
            ("Cast", [name], ["pixels"], {"to": T.FLOAT}),
            ("Sub", ["pixels", "mean"], ["centred"], {}),
            ("Div", ["centred", "std"], ["scaled"], {}),
            ("Transpose", ["scaled"], ["chw"], {"perm": [2, 0, 1]}),
            ("Unsqueeze", ["chw", "first"], ["nchw"], {}),
            ("Shape", ["nchw"], ["shape"], {}),
            ("Sub", ["full", "shape"], ["after"], {}),
            ("Concat", ["zeros", "after"], ["pads"], {"axis": 0}),
            ("Pad", ["nchw", "pads"], ["planes"], {}),
        ]
        planes = "planes"
    pool = side // 64
    nodes += [
        ("ReduceMean", [planes], ["grey"], {"axes": [1], "keepdims": 1}),
        ("AveragePool", ["grey"], ["cells"], {"kernel_shape": [pool, pool], "strides": [pool, pool]}),
        ("Tile", ["cells", "many"], ["image_embeddings"], {}),
    ]
    shape = ["image_height", "image_width", 3] if preprocess else [1, 3, side, side]
    return save(path, nodes, [(name, kind, shape)], [("image_embeddings", T.FLOAT, [1, 256, 64, 64])], constants)


def decoder(path, *, nano=False, points="num_points", size=T.FLOAT, low=True, extra=(), quality=(0.1, 0.95, 0.9, 0.3)):
    """Four masks: nothing, everything, the part, everything but the part.

    The full-size `masks` are what a trace with a frozen crop gives: of another shape, and wrong; right without `low`.
    """
    constants = {
        "start": np.int64([0]), "stop": np.int64([1]), "axis": np.int64([1]),
        "scales": np.float32([1, 1, 4, 4]), "none": np.float32(0), "one": np.float32(1),
        "quality": np.float32([quality]),
    }  # fmt: skip
    nodes = [
        ("Slice", ["image_embeddings", "start", "stop", "axis"], ["cells"], {}),
        ("Resize", ["cells", "", "scales"], ["part"], {"mode": "linear"}),
        ("Mul", ["part", "none"], ["zero"], {}),
        ("Add", ["zero", "one"], ["all"], {}),
        ("Neg", ["all"], ["nothing"], {}),
        ("Neg", ["part"], ["rest"], {}),
        ("Concat", ["nothing", "all", "part", "rest"], ["low_res_masks"], {"axis": 1}),
        ("Identity", ["quality"], ["iou_predictions"], {}),
    ]
    inputs = [
        ("image_embeddings", T.FLOAT, [1, 256, 64, 64]),
        ("point_coords", T.FLOAT, [1, points, 2]),
        ("point_labels", T.FLOAT, [1, points]),
        ("mask_input", T.FLOAT, [1, 1, 256, 256]),
        ("has_mask_input", T.FLOAT, [1]),
    ]
    outputs = [("iou_predictions", T.FLOAT, [1, 4]), ("low_res_masks", T.FLOAT, [1, 4, 256, 256])]
    if not nano:
        inputs.append(("orig_im_size", size, [2]))
        if low:
            constants["frozen"] = np.ones((1, 4, 68, 102), np.float32)
            nodes.append(("Identity", ["frozen"], ["masks"], {}))
            outputs.insert(0, ("masks", T.FLOAT, [1, 4, "h", "w"]))
        else:  # the crop of a portrait of 300 x 180, 1024 high: 614 of 1024 columns
            constants |= {"wide": np.int64([154]), "columns": np.int64([3])}
            nodes.append(("Slice", ["low_res_masks", "start", "wide", "columns"], ["masks"], {}))
            outputs = [("masks", T.FLOAT, [1, 4, "h", "w"]), outputs[0]]
    return save(path, nodes, [*inputs, *extra], outputs, constants)


class Spy:
    """A session that keeps what it was given."""

    def __init__(self, session):
        self._session, self.feed = session, {}

    def run(self, names, feed):
        self.feed = feed
        return self._session.run(names, feed)

    def __getattr__(self, name):
        return getattr(self._session, name)


FORMS = {
    "samexporter": ({}, {}),
    "samexporter --use-preprocess": ({"preprocess": True}, {}),
    "nanosam": ({"name": "image"}, {"nano": True}),
    "nanosam, encoder at 512": ({"name": "image", "side": 512}, {"nano": True}),
    "8 bit image, size as int64": ({"preprocess": True, "kind": T.UINT8}, {"size": T.INT64}),
    "five points, never fewer": ({}, {"points": 5}),
    "full masks only": ({}, {"low": False}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_finds_the_part(form, tmp_path):
    """The best mask is everything, which is not believed; the next is the part, wherever it lies."""
    first, second = FORMS[form]
    sam = fg.choose(f"sam:{encoder(tmp_path / 'e.onnx', **first)},{decoder(tmp_path / 'd.onnx', **second)}")
    spy = sam._decoder = Spy(sam._decoder)
    for size in ((300, 180),) if form == "full masks only" else ((300, 180), (180, 300), (200, 200), (1500, 1100)):
        image, truth = part(*size)
        found = sam(image, Path("x"))
        assert found.shape == truth.shape
        assert overlap(found, truth) > 0.9
        height, width = (round(edge * 1024 / max(size)) for edge in size)
        box = [[width / 2, height / 2], [0.05 * width, 0.05 * height], [0.95 * width, 0.95 * height]]
        np.testing.assert_allclose(spy.feed["point_coords"][0, :3], box, atol=2)
        assert spy.feed["point_labels"][0].tolist() == [1, 2, 3] + [-1] * (second.get("points") == 5) * 2
        assert spy.feed["mask_input"].shape == (1, 1, 256, 256) and spy.feed["has_mask_input"].tolist() == [0]
        if "orig_im_size" in spy.feed:
            assert tuple(spy.feed["orig_im_size"]) == size
    assert ("orig_im_size" in spy.feed) == (not second.get("nano"))


def test_without_a_believable_mask_there_is_no_part(tmp_path):
    files = encoder(tmp_path / "e.onnx"), decoder(tmp_path / "d.onnx")
    black = np.zeros((100, 100, 3), np.uint8)
    assert fg.choose("sam:{},{}".format(*files))(black, Path("x")) is None


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({}, {"extra": [("interm_embeddings", T.FLOAT, [4, 1, 64, 64, 768])]}, "not a SAM mask decoder"),  # SAM-HQ
        ({}, {"points": 2}, "too few points"),
        ({"side": 512, "name": "x"}, None, "not a SAM mask decoder"),  # the encoder twice
        (None, {}, "not a SAM image encoder"),  # the decoder twice
    ],
)
def test_files_of_another_signature_are_refused(first, second, said, tmp_path):
    files = [
        make(tmp_path / f"{k}.onnx", **(f or {})) for k, make, f in (("e", encoder, first), ("d", decoder, second))
    ]
    one = files[1] if first is None else files[0]
    two = files[0] if second is None else files[1]
    with pytest.raises(ConfigError, match=said):
        fg.choose(f"sam:{one},{two}")


def test_an_encoder_of_another_size_of_embedding_is_refused(tmp_path):
    def small(path):
        inputs, outputs = [("image", T.FLOAT, [1, 3, 64, 64])], [("image_embeddings", T.FLOAT, [1, 3, 64, 64])]
        return save(path, [("Identity", ["image"], ["image_embeddings"], {})], inputs, outputs, {})

    with pytest.raises(ConfigError, match="does not belong to"):
        fg.choose(f"sam:{small(tmp_path / 'e.onnx')},{decoder(tmp_path / 'd.onnx')}")
