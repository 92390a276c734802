"""andon eval: figures, what they leave out or warn of, its report, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from andon.runtime.bundle import Bundle
from andon.runtime.dataset import open_dataset
from andon.runtime.fingerprint import image_hash, pack

from .conftest import ENCODE, ENGINE, SCORE, run  # type: ignore[import-not-found]
from .parts import contents, held, level, write

MakeBundle = Callable[..., Path]
#: What is carried from step to step, and here from frame to frame: a sum.
ADD = """add (float[1,3] u, float[1,3] total) => (float[1,3] sum) {
    sum = Add(u, total)
}"""
#: The same score, twice as large: an alternative program with thresholds of its own.
DOUBLE = """double (float[1,3] u) => (float[1,3] twice) {
    twice = Add(u, u)
}"""


def test_eval_says_when_good_images_are_unlike_those_of_the_calibration(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another lamp over the test's good parts: their alarms are no chance, and the promise was not for them."""
    root = make_bundle(report={"holdout": held()})
    assert run(capsys, "calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.05, *ENGINE)[0] == 0
    arguments = ("eval", "--bundle", root, "--data", data, "--report", tmp_path / "r.html", *ENGINE)
    code, result, text = run(capsys, *arguments)
    assert code == 0 and result["unlike"] == [] and "unlike them" not in text  # 4 of 8 may happen: once in 250
    assert result["over_promise"] == ["a", "b"] and "a: 4 of 8 good images are called NG, 50.0%, where at most" in text
    for image in (data / "a/test/good").iterdir():
        write(image, level(41, "a"))
    code, result, text = run(capsys, *arguments)
    assert code == 0 and result["unlike"] == ["a"] and "andon calibrate --bundle" in text
    assert "a: 8 of 8 good images are called NG where 5.0% were promised" in text and "b: 8 of 8" not in text
    assert "8 of 8 good images are called NG" in (tmp_path / "r.html").read_text()


def test_verdicts_are_held_against_the_promise_of_the_thresholds_that_they_were_judged_with(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, page, file = make_bundle(report={"holdout": held()}), tmp_path / "r.html", tmp_path / "line.jsonl"
    _, made, _ = run(capsys, "calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.05, *ENGINE)
    own = {product: entry["default"]["value"] for product, entry in made["thresholds"].items()}
    tests = [s for s in open_dataset(str(data)).samples if s.split == "test"]

    def eval_line(alarms: int, thresholds: dict[str, float], others: int = 0, **of: object) -> tuple[dict, str]:
        """Verdicts of a line that calls so many good images of a product NG; `others` are not of a but hand-set."""
        lines, count = [], dict.fromkeys("ab", 0)
        for s in tests:
            count[s.product] += s.good
            rest = {"id": s.key, "part_id": s.key.removesuffix(".png"), "product": s.product, "score": 1.0}
            line = {"method": "synthetic", "bundle": made["bundle"], "ts_judged": "2026-01-01T00:00:00.000Z"}
            threshold = 0.25 if s.product == "a" and s.good and count["a"] <= others else thresholds[s.product]
            label = "NG" if not s.good or count[s.product] > 8 - alarms else "OK"
            lines.append(rest | line | {"threshold": threshold, "label": label, "latency_ms": {"total": 1.0}} | of)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        arguments = ("--bundle", root, "--data", data, "--verdicts", file, "--report", page, *ENGINE)
        code, result, text = run(capsys, "eval", *arguments)
        assert code == 0, text
        return result, text

    result, text = eval_line(0, own)
    assert "a: 0 of 8 good images are called NG, 0.0%, where at most 5.0% were promised\n" in text
    counts = {"images": 8, "parts": None, "alarms": 0}
    assert result["promises"]["a"] == {"false_alarm_rate": 0, "promised": 0.05, **counts}
    assert result["over_promise"] == result["not_compared"] == [] and "promised false alarm rate" in page.read_text()
    result, text = eval_line(2, own)
    said = "2 of 8 good images are called NG, 25.0%, where at most 5.0% were promised; good parts like the 19"
    assert result["over_promise"] == ["a", "b"] and f"b: {said}" in text and said in page.read_text()
    result, text = eval_line(8, own)
    assert result["unlike"] == ["a", "b"] and "These are unlike them" in text and "unlike them" in page.read_text()
    result, text = eval_line(8, own, memory_version=3)
    assert result["over_promise"] == ["a", "b"] and "100.0%, where at most 5.0% were promised\n" in text, "who knows"

    result, text = eval_line(8, own | {"a": 0.1})  # set by hand, or before a new calibration: that promised nothing
    assert result["products"]["a"]["false_alarm_rate"] == 1 and result["not_compared"] == ["a"]
    assert list(result["promises"]) == result["unlike"] == ["b"]
    said = f"8 of 8 good images were judged with the threshold 0.1, not with {own['a']!r}, which calibration set"
    assert f"a: {said}" in text and said in page.read_text() and "a: 8 of 8 good images are called NG" not in text
    result, text = eval_line(2, own, others=6)
    assert "a: 2 of 2 good images are called NG, 100.0%, where" in text, "by the bundle's threshold, of which two are"
    assert "a: 6 of 8 good images were judged with the threshold 0.25, not with" in text


def test_eval_of_a_line_that_was_overloaded_by_defects_says_so_everywhere(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(report={"holdout": held()})
    line = {"ts_judged": "2026-01-01T00:00:00Z", "method": "synthetic", "bundle": "0123456789ab"}
    judged = {"label": "OK", "score": 0.1, "threshold": 0.2, "latency_ms": {"total": 1.0}}
    dropped = {"label": "UNKNOWN", "score": None, "threshold": None, "latency_ms": {}}
    lines = [
        {"id": s.key, "part_id": s.key.removesuffix(".png"), "product": s.product}
        | line
        | (judged if s.good else dropped)
        for s in open_dataset(str(data)).select(split="test").samples
    ]
    recorded, report = tmp_path / "line.jsonl", tmp_path / "r.html"
    recorded.write_text("".join(json.dumps(v) + "\n" for v in lines))
    arguments = ("--bundle", root, "--data", data, "--verdicts", recorded, "--report", report, *ENGINE)
    code, result, text = run(capsys, "eval", *arguments)
    assert code == 0 and result["unknown"] == 8
    figures = result["products"]["a"]
    assert (figures["image_AUROC"], figures["miss_rate"], figures["false_alarm_rate"]) == (None, None, 0)
    assert (figures["unknown_rate_good"], figures["unknown_rate_defective"]) == (0, 1)
    said = "4 of 12 images are UNKNOWN (0.0% of the good and 100.0% of the defective)"
    assert f"warning: a: {said}" in text and "UNKNOWN 0.3333" in text
    page = report.read_text()
    assert said in page and "unknown rate defective" in page
    recorded.write_text("".join(json.dumps(v | dropped) + "\n" for v in lines))
    assert run(capsys, "eval", *arguments)[0] == 0, "nothing judged at all: no gallery, no latency, no figure"


def test_eval_says_whose_verdicts_it_takes_and_refuses_those_of_another_method(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, file, page = make_bundle(), tmp_path / "line.jsonl", tmp_path / "r.html"
    with Bundle.load(root) as loaded:
        own = loaded.id
    arguments = ("eval", "--bundle", root, "--data", data, "--verdicts", file, *ENGINE)

    def record(**of: str) -> None:
        rest = {"label": "OK", "score": 0.1, "threshold": 0.2, "latency_ms": {}, "ts_judged": "2026-01-01T00:00:00Z"}
        samples = open_dataset(str(data)).select(split="test").samples
        parts = [{"id": s.key, "part_id": s.key.removesuffix(".png"), "product": s.product, **rest} for s in samples]
        file.write_text("".join(json.dumps(part | of) + "\n" for part in parts))

    record(method="synthetic", bundle=own)
    code, result, text = run(capsys, *arguments, "--report", page)
    said = f"verdicts recorded in {file} by bundle {own} (synthetic)"
    assert code == 0 and f"{said}, 24 images" in text and "warning: the verdicts" not in text
    assert said in page.read_text() and "of this machine" not in page.read_text()
    assert result["verdicts"] == {"file": str(file), "bundles": [own]}
    assert [result[name] for name in ("backend", "variant", "program")] == [None] * 3

    record(method="synthetic", bundle="0123456789ab")
    code, result, text = run(capsys, *arguments, "--report", page)
    warning = f"the verdicts are of bundle 0123456789ab, not of the given {own}"
    assert code == 0 and f"warning: {warning}" in text and warning in page.read_text()
    assert result["verdicts"]["bundles"] == ["0123456789ab"]

    record(method="knn", bundle="0123456789ab")
    code, result, _ = run(capsys, *arguments)
    assert code == 1 and result["found"] == "knn" and result["expected"] == f"synthetic (bundle {own})"
    for more in (["--samplers"], ["--product", "auto"]):
        code, result, _ = run(capsys, *arguments, *more)
        assert code == 1 and result["error"] == f"{' '.join(more)} and --verdicts exclude each other"


def test_eval_leaves_out_test_images_that_the_model_has_seen(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test's good parts are of brightness 3, 8, ..., 38: the same files as some of the training's."""
    seen = {"fitted": contents(data, 20, 40), "constants": contents(data, 10, 19), "thresholds": contents(data, 5, 9)}
    root, page = make_bundle(report={"fingerprints": seen}), tmp_path / "r.html"
    code, result, text = run(capsys, "eval", "--bundle", root, "--data", data, "--report", page, *ENGINE)
    assert code == 0 and result["images"] == 24 - 14 and result["products"]["a"]["good"] == 1
    assert result["seen"] == {"fitted": 8, "constants": 4, "thresholds": 2}
    said = "test images left out of the figures: 8 trained on, 4 that set constants, 2 held out for thresholds"
    assert said in text and said in page.read_text()
    code, result, _ = run(capsys, "eval", "--bundle", root, "--data", data, "--split", "train", *ENGINE)
    assert code == 0 and result["images"] == 80, "who asks for the training images gets them"
    code, result, text = run(capsys, "eval", "--bundle", make_bundle(), "--data", data, *ENGINE)
    assert code == 0 and result["images"] == 24 and result["seen"] is None, "a bundle without a record"
    everything = pack(image_hash(s.path) for s in open_dataset(data).samples)
    root = make_bundle(report={"fingerprints": {"fitted": everything}})
    code, result, _ = run(capsys, "eval", "--bundle", root, "--data", data, *ENGINE)
    assert code == 1 and result["found"] == "24 trained on"


def test_auto_product_and_every_program(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(
        stages={
            "encode": (ENCODE, {"image": "frame"}),
            "double": (DOUBLE, {"u": "encode.u"}),
            "score": (SCORE, {"u": "encode.u"}),
        },
        program=[{"run": "encode"}, {"run": "double"}, {"run": "score"}],
        alternatives={"short": [{"run": "encode"}, {"run": "score"}]},
        report={"holdout": held()},
    )
    code, result, _ = run(capsys, "calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.05, *ENGINE)
    assert code == 0 and set(result["thresholds"]["a"]) == {"default", "short"}
    # A dark part of product b, and a defective one of a, that look like the other: it is right for all others.
    write(data / "b/test/good/000.png", level(3, "a"))
    write(data / "a/test/bent/000.png", level(9, "b"))
    arguments = ("--product", "auto", "--samplers", "--limit", 6)
    code, result, text = run(capsys, "eval", "--bundle", root, "--data", data, *arguments, *ENGINE)
    assert code == 0 and result["images"] == 12 and set(result["samplers"]) == {"default", "short"}
    assert result["right_product"] == {"a": 1.0, "b": pytest.approx(2 / 3)}
    assert result["right_product_defective"] == {"a": pytest.approx(2 / 3), "b": 1.0}
    assert "finds the product of 100.0% of the good images, 66.7% of the defective ones" in text
    assert "double" not in result["samplers"]["short"]["latency_ms"] and "program  image_AUROC" in text


def test_eval_refuses_a_product_it_does_not_know(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "b").rename(data / "c")
    root = make_bundle()
    code, result, text = run(capsys, "eval", "--bundle", root, "--data", data, *ENGINE)
    assert code == 1 and "unknown product 'c'" in text and "Traceback" not in text
    assert "--products a; " in result["next"] and "call their folder so" in result["next"]
    assert run(capsys, "eval", "--bundle", root, "--data", data, "--products", "a", *ENGINE)[0] == 0
    code, result, _ = run(capsys, "eval", "--bundle", root, "--data", data / "c", *ENGINE)
    assert code == 1 and "--products" not in result["next"] and "a link FOLDER/a" in result["next"]


def test_eval_puts_the_figures_of_its_own_checkpoint_beside_and_refuses_another_models(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "provenance.json").write_text(json.dumps({"weights_sha256": "1" * 64}))
    (tmp_path / "metrics.json").write_text(json.dumps({"products": {"a": {"image_AUROC": 0.5}}}))
    arguments = ("eval", "--data", data, "--checkpoint", tmp_path, *ENGINE)
    code, result, text = run(capsys, *arguments, "--bundle", make_bundle(checkpoint_sha256="1" * 64))
    assert code == 0 and result["torch"] == {"a": 0.5, "b": None} and "torch 0.5000, engines 1.0000" in text
    record = {"weights_sha256": "1" * 64, "data_path": f"/elsewhere/{data.name}"}
    (tmp_path / "provenance.json").write_text(json.dumps(record))
    figures = {"a": {"image_AUROC": 0.5, "good": 8.0, "defective": 4.0}, "b": {"image_AUROC": None}}
    (tmp_path / "metrics.json").write_text(json.dumps({"products": figures}))
    root = make_bundle(checkpoint_sha256="1" * 64)
    for more in ((), ("--limit", 12), ("--products", "a")):
        code, result, text = run(capsys, *arguments, *more, "--bundle", root)
        assert code == 0 and result["torch"]["a"] == 0.5 and result["not_beside_torch"] == {}, more
    link = tmp_path / "current"
    link.symlink_to(data)
    for trained, judged in ((link, link), (link, data), (data, link)):
        (tmp_path / "provenance.json").write_text(json.dumps({**record, "data_path": str(trained)}))
        code, result, text = run(capsys, *arguments, "--data", judged, "--bundle", root)
        assert code == 0 and result["not_beside_torch"] == {}, (trained, judged)
    (tmp_path / "provenance.json").write_text(json.dumps(record))
    for more, why in (
        (("--limit", 4), "torch's figure is of 8 good and 4 defective images, this of 2 good and 2 defective"),
        (("--split", "all"), "torch's figure is of the test split, this of all"),
        (("--data", data / "a"), f"torch's figure is of /elsewhere/{data.name}"),
    ):
        code, result, text = run(capsys, *arguments, *more, "--products", "a", "--bundle", root)
        assert code == 0 and result["torch"] == {} and result["not_beside_torch"] == {"a": why}
        assert f"a: image AUROC not beside torch's: {why}" in text and "torch 0.5000" not in text
    for sha256, expected in (("2" * 64, "2" * 12), ("", "no checkpoint: the bundle was enrolled")):
        code, result, text = run(capsys, *arguments, "--bundle", make_bundle(checkpoint_sha256=sha256))
        assert code == 1 and "is not the checkpoint the bundle was made from" in result["error"]
        assert (result["found"], result["expected"]) == ("1" * 12, expected) and "image AUROC" not in text


def test_a_program_with_a_past_is_not_what_torch_computes(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Foct's carries its navigator from image to image; torch starts each afresh: a lower AUROC is no loss."""
    page, file = tmp_path / "r.html", tmp_path / "line.jsonl"
    (tmp_path / "provenance.json").write_text(json.dumps({"weights_sha256": "1" * 64}))
    (tmp_path / "metrics.json").write_text(json.dumps({"products": {"a": {"image_AUROC": 0.5}}}))
    loop = {"loop": "add", "count": 1, "carry": {"sum": "total"}, "init": {"total": "state:total"}}
    stages = {
        "encode": (ENCODE, {"image": "frame"}),
        "add": (ADD, {"u": "encode.u", "total": "carry"}),
        "score": (SCORE, {"u": "add.sum"}),
    }

    def evaluate(*more: object, **parts: object) -> tuple[dict, str]:
        steps = [{"run": "encode"}, {**loop, "persist": {"total": "total"}}, {"run": "score"}]
        state = {"total": np.zeros((1, 3), np.float32)}
        root = make_bundle(stages=stages, program=steps, state=state, checkpoint_sha256="1" * 64, **parts)
        arguments = ("--bundle", root, "--data", data, "--checkpoint", tmp_path, "--report", page, *more, *ENGINE)
        code, result, text = run(capsys, "eval", *arguments)
        assert code == 0, text
        return result, text

    alone = [{"run": "encode"}, loop, {"run": "score"}]
    result, text = evaluate(alternatives={"ct0": alone, "ct5": alone})
    said = "not one computation: program default goes on from the image before, torch starts each image afresh, so a"
    said += (
        " difference says nothing of the export; to compare, take a program without a past: andon eval --program ct0"
    )
    assert result["torch_differs"] == f"{said} (or ct5)" and said in page.read_text()
    value = result["products"]["a"]["image_AUROC"]
    assert f"a: image AUROC torch 0.5000, engines {value:.4f} ({said} (or ct5))\n" in text
    assert "the bundle has no program without a past" in evaluate()[1]
    result, text = evaluate("--program", "ct0", alternatives={"ct0": alone})
    assert (
        result["torch_differs"] is None
        and "torch 0.5000, engines 1.0000\n" in text
        and "not one" not in page.read_text()
    )
    assert "image AUROC torch 0.5000, engines 1.0000." in page.read_text()

    for learnt, said in (
        (0, "program default, if the line ran that, goes on from"),
        (3, "the line's memory learnt while"),
    ):
        line = {"label": "OK", "threshold": 2.0, "latency_ms": {}, "ts_judged": "2026-01-01T00:00:00Z", "score": 1.0}
        line |= {"method": "synthetic", "bundle": "x", "memory_version": learnt}
        samples = open_dataset(str(data)).select(split="test").samples
        parts = [{"id": s.key, "part_id": s.key.removesuffix(".png"), "product": s.product, **line} for s in samples]
        file.write_text("".join(json.dumps(part) + "\n" for part in parts))
        assert said in evaluate("--verdicts", file)[0]["torch_differs"]


def test_eval_writes_a_report(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out" / "report.html"
    code, result, text = run(capsys, "eval", "--bundle", make_bundle(), "--data", data, "--report", page, *ENGINE)
    assert code == 0 and result["report"] == str(page) and "pixel_AUPRO@0.3  pixel_AP" in text
    total = result["latency_ms"]["total"]
    assert 0 < total["p50"] <= total["p95"] <= total["p99"] and "p95        p99\n" in text
    assert 0.8 < result["products"]["a"]["pixel_AP"] < 0.9
    assert " CPUs, " in page.read_text().partition("Provenance")[2], "latencies are of a machine"
    assert (
        "pixel AUPRO (FPR ≤ 0.3)</th><th>pixel AP<" in page.read_text() and "99% of images within" in page.read_text()
    )
    assert "image AUROC" in page.read_text() and "http://" not in page.read_text().replace("http://www.w3.org", "")


@pytest.mark.parametrize("report", ["folder", "file/report.html"])
def test_eval_refuses_a_report_that_cannot_be_written_before_the_work(
    report: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    arguments = ("--bundle", "nosuch", "--data", "nosuch", "--report", tmp_path / report)
    for more in ((), ("--few-shot", "1")):
        code, result, text = run(capsys, "eval", *arguments, *more, "--threads", 1)
        assert code == 1 and f"--report {tmp_path / report} cannot be written" in result["error"], text
    assert {p.name for p in tmp_path.iterdir()} == {"folder", "file"}
    assert run(capsys, "eval", *arguments[:-1], tmp_path / "r.html")[1]["error"] == "there is no bundle at nosuch"
    assert not (tmp_path / "r.html").exists(), "what was refused later leaves no empty report"
