"""Thresholds that were calibrated with other engines than run: said where nothing has shown that decisions agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.bundle import Bundle
from andon.runtime.calibrated import other_engines, unknown_cameras
from andon.runtime.manifest import Variant

from .bundles import rewrite
from .conftest import ENGINE, run  # type: ignore[import-not-found]
from .parts import golden

MakeBundle = Callable[..., Path]
STEPS = [{"run": "encode"}, {"run": "score"}]
GATED = {"gated": {"fp16": ["default", "short"], "int8": ["default"]}}
ORT, TRT = "onnxruntime", "tensorrt"


def calibrated(
    make_bundle: MakeBundle, variant: str | None, backend: str = ORT, verification: dict[str, Any] | None = None
) -> Path:
    """A bundle of three precisions (of the same files), its thresholds calibrated in one of them."""
    root = make_bundle(
        alternatives={"short": STEPS, "long": STEPS},
        verification=GATED if verification is None else verification,
        npz={"golden/golden.npz": golden([10, 40])},
    )
    entry: dict[str, Any] = {"value": 0.5, "false_alarm_rate": 0.05, "samples": 19}
    if variant is None:
        entry["source"] = backend  # of before, or of enrolling, that says how it was set
    else:
        entry |= {"variant": variant, "backend": backend}

    def change(manifest: dict[str, Any]) -> None:
        manifest["variants"] = ["fp32", "fp16", "int8"]
        for stage in manifest["stages"].values():
            stage["files"] = dict.fromkeys(manifest["variants"], stage["files"]["fp32"])
        names = ("default", "short", "long")
        manifest["thresholds"] = {p: {n: {**entry, "program": n} for n in names} for p in "ab"}

    rewrite(root, change)
    return root


ENROLLED = {"enrolled_from": "0123456789ab", **GATED}


@pytest.mark.parametrize(
    ("set_in", "runs_in", "program", "verification", "said"),
    [
        (("fp32", ORT), ("fp32", TRT), "long", {}, False),  # FP32 is held to a thousandth everywhere
        (("fp32", ORT), ("fp16", TRT), "default", {}, False),  # without its gate it would not have been exported
        (("fp32", ORT), ("int8", TRT), "default", GATED, False),
        (("fp32", ORT), ("fp16", TRT), "short", GATED, False),
        (("fp32", ORT), ("int8", ORT), "short", GATED, True),  # its gate failed
        (("fp32", ORT), ("fp16", ORT), "long", GATED, True),  # nobody looked
        (("fp32", ORT), ("fp16", ORT), "short", {}, True),  # of before it was recorded
        (("fp16", TRT), ("fp32", ORT), "long", GATED, True),  # the other way round it is no better
        (("fp16", TRT), ("fp16", TRT), "long", GATED, False),  # as it was calibrated, whatever a gate says
        (("fp16", ORT), ("fp16", TRT), "long", GATED, True),  # which rounds otherwise
        (("fp16", ORT), ("fp16", TRT), "short", GATED, False),
        ((None, "provisional, from 1 image"), ("fp16", TRT), "default", ENROLLED, True),  # its gate saw another product
        (("fp32", ORT), ("fp16", TRT), "default", ENROLLED, True),
        (("fp32", ORT), ("fp32", TRT), "default", ENROLLED, False),
        ((None, ""), ("fp16", TRT), "long", {}, False),  # of before it was recorded: nothing is known
    ],
)
def test_what_no_gate_has_shown_is_said_and_nothing_else(
    make_bundle: MakeBundle,
    set_in: tuple[str | None, str],
    runs_in: tuple[Variant, str],
    program: str,
    verification: dict[str, Any],
    said: bool,
) -> None:
    root = calibrated(make_bundle, *set_in, verification=verification)
    with Bundle.load(root) as bundle:
        found = other_engines(bundle, [program], *runs_in)
        assert bool(found) is said
        if not said:
            return
        (error,) = found
        assert error.what.startswith(f"thresholds of a, b (program {program}) were calibrated with other engines")
        assert error.found == f"to run in {runs_in[0]} on {runs_in[1]}"
        precision, backend = set_in if set_in[0] else ("fp32", ORT)
        assert error.expected == f"{precision} on {backend}, as calibrated"
        step = f"andon calibrate --bundle {root} --data GOOD-IMAGES --variant {runs_in[0]} --backend {runs_in[1]} "
        assert str(error.next_step).startswith(f"{step}--programs {program}")
        (error,) = other_engines(bundle, [program], *runs_in, in_force={"a": {0.7, 0.5}, "b": {0.7}})
        assert error.what.startswith("thresholds of a (program"), "b's was set by hand, which promised nothing"
        assert not other_engines(bundle, [program], *runs_in, in_force={})


def test_thresholds_of_one_camera_are_held_against_its_line_alone(make_bundle: MakeBundle) -> None:
    root = calibrated(make_bundle, "fp32")
    entry = {"value": 0.7, "false_alarm_rate": 0.05, "samples": 19, "variant": "fp32", "backend": ORT}
    rewrite(root, lambda m: m.update(thresholds={}, camera_thresholds={"lane2": {"a": {"long": entry}}}))
    with Bundle.load(root) as bundle:
        for cameras in (None, ["lane1", "lane2"]):
            (error,) = other_engines(bundle, ["long"], "fp16", ORT, cameras=cameras)
            assert error.what.startswith("thresholds of a at lane2 (program long) were calibrated")
            assert "--programs long --camera lane2" in str(error.next_step)
        assert not other_engines(bundle, ["long"], "fp16", ORT, cameras=["lane1"])
        assert not other_engines(bundle, ["long"], "fp16", ORT, {"a": {0.5}}, ["lane2"]), "by command"
        assert not unknown_cameras(bundle, ["lane1", "lane2"])
        (error,) = unknown_cameras(bundle, ["lane1", "lane3"])
        assert (error.found, error.expected) == ("lane2", "lane1, lane3")
        assert f"andon calibrate --bundle {root} --forget-camera lane2" in str(error.next_step)


def test_nothing_is_said_of_a_program_without_thresholds(make_bundle: MakeBundle) -> None:
    root = calibrated(make_bundle, "fp32")

    def change(manifest: dict[str, Any]) -> None:
        del manifest["thresholds"]["a"]["long"], manifest["thresholds"]["b"]["long"]

    rewrite(root, change)
    with Bundle.load(root) as bundle:
        assert other_engines(bundle, ["default", "long"], "fp16", ORT) == []
        assert other_engines(bundle, ["short", "long"], "int8", ORT)[0].what.startswith("thresholds of a, b (program s")


def test_verify_says_which_precisions_the_thresholds_are_not_for(
    make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result, text = run(capsys, "verify", "--bundle", calibrated(make_bundle, "fp32"), *ENGINE)
    assert code == 0 and len(result["warnings"]) == 2, "one for each precision"
    assert "warning: thresholds of a, b (program long) were calibrated with other engines" in text
    assert "programs short, long) were" in result["warnings"][1] and "in int8 on onnxruntime" in result["warnings"][1]
    code, result, text = run(capsys, "verify", "--bundle", calibrated(make_bundle, None, ""), *ENGINE)
    assert code == 0 and result["warnings"] == [] and "warning:" not in text


def test_eval_says_that_what_it_judges_with_is_not_what_was_calibrated(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("eval", "--bundle", calibrated(make_bundle, "fp32"), "--data", data, "--limit", 2, *ENGINE)
    code, _, text = run(capsys, *arguments, "--variant", "fp16", "--program", "long")
    assert code == 0 and "warning: thresholds of a, b (program long) were calibrated" in text
    code, _, text = run(capsys, *arguments, "--variant", "fp16")
    assert code == 0 and "were calibrated with other engines" not in text, "export's gate has passed"
