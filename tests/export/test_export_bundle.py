"""A whole export of a small looped method: bundle, gates, fall-back, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import types
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from andon.cli import main
from andon.export import alternatives, exporter, reduce, verify
from andon.export import bundle as writing
from andon.export.command import narrow_lines
from andon.export.exporter import GateError, Request, _indices, export_bundle
from andon.export.frames import Evidence, Frames, with_synthetic_defects
from andon.runtime.agreement import LIMITS, Limits
from andon.runtime.bundle import Bundle, read_npz
from andon.runtime.engine.onnxruntime import OnnxRuntimeBackend
from andon.runtime.errors import BundleError, ConfigError
from andon.runtime.program import Program
from andon.runtime.replay import GATE, GOLDEN, gate_programs, replay_gate
from andon.train.method import AnomalyModel
from torch import nn

from .conftest import Toy


def export(toy: Toy, out: Path, *variants: str, fp32_stages: frozenset[str] = frozenset()):
    request = Request(out, variants, fp32_stages)  # type: ignore[arg-type]
    return export_bundle(toy.model, toy.staged, toy.evidence, toy.provenance, request)


def test_a_looped_method_exports_loads_and_replays(toy: Toy, tmp_path: Path) -> None:
    result = export(toy, tmp_path / "b", "fp16", "int8")
    assert verify.passed(result.checks)
    bundle = Bundle.load(tmp_path / "b")
    assert bundle.manifest.variants == ("fp32", "fp16", "int8")
    golden = read_npz(bundle.root / GOLDEN)
    with OnnxRuntimeBackend(threads=1) as backend, Program(bundle, backend) as program:
        for i, (frame, class_id) in enumerate(zip(golden["frames"], golden["class_ids"], strict=True)):
            program.reset()
            program.frame[...] = frame
            score = program.run(int(class_id)).score
            assert score == pytest.approx(golden["score"][i], rel=1e-4)
            for stage in toy.staged.stages:
                for output in stage.outputs:
                    found = program.read(f"{stage.name}.{output}")
                    np.testing.assert_allclose(found, golden[f"{stage.name}.{output}"][i], rtol=1e-3, atol=1e-4)
    gate = read_npz(bundle.root / GATE)
    assert set(gate["labels"]) == {0, 1} and gate["threshold"].shape == (2,)


@pytest.mark.parametrize("products", [1, 3, 15, 64])
@pytest.mark.parametrize("count", [8, 64])
def test_frames_are_of_as_many_products_as_there_is_room_for(products: int, count: int) -> None:
    each = 5  # good and as many defective frames a product, in the order of a data set
    class_ids = np.repeat(np.arange(products, dtype=np.int32), 2 * each)
    labels = np.tile(np.repeat(np.array([0, 1], np.int32), each), products)
    frames = Frames(np.zeros((len(labels), 1, 1, 3), np.uint8), class_ids, labels, "made for the test")
    chosen = frames.select(_indices(frames, count))
    assert len(chosen) == min(len(frames), count) and {*chosen.labels} == {0, 1}
    assert len({*chosen.class_ids}) == min(products, count)
    assert np.ptp(np.unique(chosen.class_ids, return_counts=True)[1]) <= 2


def test_every_product_is_in_what_is_replayed_on_the_device(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "GOLDEN_FRAMES", 1)
    monkeypatch.setattr(exporter, "GATE_FRAMES", 1)
    monkeypatch.setattr(exporter, "MODEL_FRAMES", 1)
    compared = []
    parity = verify.model_parity

    def noted(engine: verify.Scored, model: verify.Scored, frames: Frames, threshold: np.ndarray) -> list[verify.Check]:
        compared.extend(frames.class_ids.tolist())
        return parity(engine, model, frames, threshold)

    monkeypatch.setattr(verify, "model_parity", noted)
    export(toy, tmp_path / "b")
    for name in (GOLDEN, GATE):
        assert {*read_npz(tmp_path / "b" / name)["class_ids"]} == {0, 1}
    assert {*compared} == {0, 1}


def test_one_held_out_good_frame_a_product_is_enough(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies on the threshold that it alone has set, so its verdict is the last bit's, in torch and in FP16."""
    good = toy.evidence.good
    few = good.select([int(np.argmax(good.class_ids == c)) for c in range(2)])
    alone = replace(toy, evidence=Evidence(few, with_synthetic_defects(few)))
    true = verify.reference
    for name, factor in (("below", 1 - 1e-5), ("above", 1 + 1e-5)):

        def beside(model: AnomalyModel, frames: Frames, factor: float = factor) -> verify.Scored:
            found = true(model, frames)
            return verify.Scored(found.score * factor, found.map)

        monkeypatch.setattr(verify, "reference", beside)
        checks = export(alone, tmp_path / name, "fp16").checks
        flips = [check for check in checks if "flips" in check.what]
        assert len(flips) == 3 and all(check.value == 0 for check in flips)


def test_the_files_are_what_the_manifest_says(toy: Toy, tmp_path: Path) -> None:
    export(toy, tmp_path / "b", "fp16")
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert all(check["ok"] for check in report["checks"])
    assert report["variants"]["fp16"]["ranges"]["encode"]["tensors"] > 5
    assert not (tmp_path / "b" / "rounded").exists() and [p.name for p in tmp_path.iterdir()] == ["b"]
    listed = set(Bundle.load(tmp_path / "b").manifest.files)
    present = {p.relative_to(tmp_path / "b").as_posix() for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert present - listed == {"manifest.json", "manifest.sha256"}
    # The score stage is an island: it has one file for both variants.
    assert "stages/score.fp16.onnx" not in present and "stages/encode.fp16.onnx" in present


def test_a_tar_of_the_bundle_loads_and_is_reproducible(toy: Toy, tmp_path: Path) -> None:
    export(toy, tmp_path / "b")
    packed = writing.pack(tmp_path / "b")
    with Bundle.load(packed) as bundle:
        assert bundle.manifest.method == "toy"
    first = packed.read_bytes()
    assert writing.pack(tmp_path / "b").read_bytes() == first
    with tarfile.open(packed) as archive:
        assert all(m.mtime == 0 and m.uname == "" for m in archive)


def test_nothing_is_left_behind_when_a_stage_does_not_match_torch(toy: Toy, tmp_path: Path) -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toy.model.encode

        def forward(self, frame: torch.Tensor) -> torch.Tensor:
            # A Python number is frozen into the graph at export.
            return self.inner(frame) + float(frame.float().mean()) / 255

    with pytest.raises(GateError) as caught:
        export(toy.with_stage("encode", module=Frozen()), tmp_path / "b")
    assert "encode.f" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_is_not_the_torch_model_is_refused(toy: Toy, tmp_path: Path) -> None:
    with torch.no_grad():
        toy.staged.state["start"][...] += 0.1  # the array shares memory with the model's buffer ...
    toy.model.start = toy.model.start - 0.1  # ... so give the model its own, unchanged one
    with pytest.raises(GateError, match="relative to torch"):
        export(toy, tmp_path / "b")


class Coarse(nn.Module):
    """Right in FP32, hopeless in FP16: a large offset comes and goes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        return (self.inner(frame) + 2048.0) - 2048.0


def coarse(toy: Toy, **changes: object) -> Toy:
    module = Coarse(toy.model.encode)
    toy.model.encode = module  # type: ignore[assignment]
    return toy.with_stage("encode", module=module, tolerance=1e-3, **changes)


def test_a_stage_that_spoils_decisions_in_fp16_falls_back_alone(toy: Toy, tmp_path: Path) -> None:
    result = export(coarse(toy), tmp_path / "b", "fp16")
    stages = result.manifest.stages
    assert stages["encode"].files["fp16"] == "stages/encode.fp32.onnx"
    assert "decision gate" in stages["encode"].fallback["fp16"]
    assert stages["refine"].files["fp16"] == "stages/refine.fp16.onnx"
    assert not (tmp_path / "b" / "stages" / "encode.fp16.onnx").exists()
    tried = result.report["variants"]["fp16"]["tried"]
    assert [attempt["fallbacks"] for attempt in tried] == [[], [], [], ["encode"]]
    assert [all(c["ok"] for c in attempt["checks"]) for attempt in tried] == [False, False, False, True]


def test_an_island_makes_the_fallback_unnecessary(toy: Toy, tmp_path: Path) -> None:
    result = export(coarse(toy, fp32=("",)), tmp_path / "b", "fp16")
    assert result.report["variants"]["fp16"]["fallbacks"] == {}


def test_the_export_fails_when_no_fallback_helps(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = replace(verify.GATES["fp16"], map_correlation=1.1)
    monkeypatch.setattr(verify, "GATES", {"fp16": gate})
    with pytest.raises(GateError, match="map correlation"):
        export(toy, tmp_path / "b", "fp16")
    assert list(tmp_path.iterdir()) == []


def test_a_stage_stays_fp32_on_request(toy: Toy, tmp_path: Path) -> None:
    result = export(toy, tmp_path / "b", "fp16", "int8", fp32_stages=frozenset({"refine"}))
    files = result.manifest.stages["refine"].files
    assert set(files.values()) == {"stages/refine.fp32.onnx"}
    with pytest.raises(ConfigError, match="--fp32-stage"):
        export(toy, tmp_path / "c", fp32_stages=frozenset({"nonsense"}))


def test_alternative_programs_have_a_gate_of_their_own(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`far` reads numbers that FP16 does not hold and that the default program never sees."""
    encode, loop, score = toy.staged.program
    far = loop.model_copy(update={"tables": {"row": "far"}})
    long = loop.model_copy(update={"count": 5})
    programs = {**toy.staged.alternatives, "far": (encode, far, score), "long": (encode, long, score)}
    tables = {**toy.staged.tables, "far": np.full((3, 2), 1e5, np.float32)}
    monkeypatch.setattr(alternatives, "CALLS", 5)
    result = export(
        replace(toy, staged=replace(toy.staged, alternatives=programs, tables=tables)), tmp_path / "b", "fp16"
    )
    record = result.report["alternatives"]["fp16"]
    assert {name: entry["gated"] for name, entry in record.items()} == {"short": True, "far": False, "long": False}
    assert "7 calls" in record["long"]["why"] and all(check.ok for check in result.checks)
    assert next(c for c in record["far"]["checks"] if not c["ok"])["subject"] == "program far fp16"
    with Bundle.load(tmp_path / "b") as bundle, OnnxRuntimeBackend(threads=1) as backend:
        gated = {name for name in ("default", *programs) if bundle.manifest.gated("fp16", name)}
        assert gated == {"default", "short"} and bundle.manifest.gated("fp32", "far")
        assert gate_programs(bundle, "fp16") == ["default", "short"] and gate_programs(bundle, "fp32") == ["default"]
        with Program(bundle, backend, "fp16", "short") as program:
            checks = replay_gate(program)
    assert checks[0].subject == "short: decisions" and all(check.ok for check in checks)
    assert main(["verify", "--bundle", str(tmp_path / "b"), "--backend", "onnxruntime", "--threads", "1"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "short: decisions" in line] == ["fp16"]


def allow(monkeypatch: pytest.MonkeyPatch, map_correlation: float) -> None:
    """INT8 may differ by anything but that; what is replayed before the bundle ships, too."""
    gate = verify.Gate(1, 1, map_correlation, rank_correlation=-1, score=1e9, map=1e9)
    monkeypatch.setattr(verify, "GATES", {"fp16": verify.GATES["fp16"], "int8": gate})
    limits = replace(LIMITS["int8"], score=1e9, read=1e9, correlation=map_correlation, flips=1, auroc_drop=1)
    monkeypatch.setitem(LIMITS, "int8", limits)  # type: ignore[index]


def test_int8_quantises_the_products(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An untrained toy has no decisions that could survive INT8; what is quantised is looked at, not how well.
    allow(monkeypatch, map_correlation=-1.0)
    result = export(toy, tmp_path / "b", "fp16", "int8")
    model = onnx.load(str(tmp_path / "b" / result.manifest.stages["encode"].files["int8"]))
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == 3 and kinds.count("QuantizeLinear") >= 3
    weights = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4]
    assert len(weights) == 3


class Outlier(nn.Module):
    """Activations that no INT8 tensor can hold (one value is huge and means nothing), weights that it can."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        matrix = torch.eye(64) + 0.05 * torch.rand(64, 64)
        matrix[0] = 0
        self.register_buffer("matrix", matrix)
        self.register_buffer("huge", 2000.0 * (torch.arange(64) == 0))

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        x = self.inner(frame)
        return ((x.reshape(8, 64) + self.huge) @ self.matrix).reshape(x.shape)


def test_a_stage_that_cannot_compute_in_int8_still_stores_its_weights_so(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All products are computed in INT8, which spoils the maps; verdicts do not count: an untrained toy has none.
    allow(monkeypatch, map_correlation=0.98)
    monkeypatch.setitem(reduce.BUDGETS, "int8", (1e9,))
    module = Outlier(toy.model.encode)
    toy.model.encode = module  # type: ignore[assignment]
    result = export(toy.with_stage("encode", module=module, tolerance=1e-3), tmp_path / "b", "fp16", "int8")
    stage, entry = result.manifest.stages["encode"], result.report["variants"]["int8"]
    assert stage.files["int8"] == "stages/encode.int8w.onnx" and "decision gate" in stage.fallback["int8"]
    assert not (tmp_path / "b" / "stages" / "encode.int8.onnx").exists()
    model = onnx.load(str(tmp_path / "b" / stage.files["int8"]))
    assert "QuantizeLinear" not in {node.op_type for node in model.graph.node}
    assert [t.data_type for t in model.graph.initializer if t.dims == [64, 64]] == [onnx.TensorProto.INT8]
    assert entry["stored"]["encode"]["int8"]["nodes"] == 1 and "encode" not in entry["quantised"]
    assert [attempt["fallbacks"] for attempt in entry["tried"]] == [[], ["encode"]]
    lines = [line for line in narrow_lines(result.manifest, result.report["variants"]) if "int8: stage encode" in line]
    assert any("stores the weights of 1 of" in line for line in lines) and any("fell back" in line for line in lines)
    assert not any("computes" in line for line in lines)
    # onnxruntime as the line opens it takes the activations as they are: by itself it makes them INT8, too (0.57).
    few = toy.evidence.labelled.select(range(8))
    maps = [verify.run_engines(tmp_path / "b", result.manifest, v, few).map for v in ("int8", "fp32")]
    assert np.corrcoef(maps[0].ravel(), maps[1].ravel())[0, 1] > 0.99


def test_an_existing_target_is_refused(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        export(toy, tmp_path / "b")


def test_a_cut_that_does_not_hold_together_is_named(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"score\.u reads what no earlier step gives"):
        export(
            toy.with_stage("score", inputs={"f": "encode.f", "u": "refine.nope", "prototype": "class:prototypes"}),
            tmp_path / "b",
        )
    with pytest.raises((ConfigError, BundleError)):
        export(toy.with_stage("encode", fp32=("no_such_module",)), tmp_path / "b")


def test_no_array_needs_pickle(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Python objects"):
        writing.save_npz(tmp_path, "x.npz", {"a": np.array([{}], dtype=object)})
    export(toy, tmp_path / "b")
    for path in (tmp_path / "b").rglob("*.npz"):
        with np.load(path, allow_pickle=False) as data:
            assert [data[key].dtype for key in data]


def test_python_m_andon_export_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "andon.export", "--help"], capture_output=True, text=True, check=True)
    assert "usage: andon export" in done.stdout and "--fp32-stage" in done.stdout


def test_export_and_device_keep_the_same_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One place for both: what `andon verify` allows on the device is what the export was gated by."""
    changed = Limits(score=0.25, output=None, correlation=0.5, flips=0.125, auroc_drop=0.0625, read=0.75)
    for variant in LIMITS:
        monkeypatch.setitem(LIMITS, variant, changed)  # type: ignore[index]
    fresh = SourceFileLoader("andon.export.verify_again", verify.__file__)
    module = types.ModuleType(fresh.name)
    module.__package__ = verify.__package__
    monkeypatch.setitem(sys.modules, fresh.name, module)
    fresh.exec_module(module)
    assert module.SCORE_PARITY == 0.25
    for gate in module.GATES.values():
        assert (gate.flips, gate.auroc_drop, gate.map_correlation) == (0.125, 0.0625, 0.5)
        assert (gate.score, gate.map) == (0.25, 0.75)
