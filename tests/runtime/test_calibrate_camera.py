"""andon calibrate --camera: thresholds of one camera of a line, beside those of all, and andon eval with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from andon.runtime.bundle import MANIFEST, Bundle
from andon.runtime.manifest import Crop

from .conftest import ENGINE, run  # type: ignore[import-not-found]
from .parts import held, level, write

MakeBundle = Callable[..., Path]
RATE = ("--false-alarm-rate", 0.05)


@pytest.fixture
def lane2(tmp_path: Path) -> Path:
    """Good parts under the lamp of another lane: brightness 65 to 84."""
    for i in range(20):
        write(tmp_path / f"lane2/a/good/{i:02}.png", level(i + 65, "a"))
    return tmp_path / "lane2"


@pytest.fixture
def both(make_bundle: MakeBundle, data: Path, lane2: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A bundle with thresholds of all cameras, of both products, and of lane2, of one."""
    root = make_bundle(report={"fingerprints": {"fitted": "0" * 16}, "holdout": held()})
    assert run(capsys, "calibrate", "--bundle", root, "--data", data, *RATE, *ENGINE)[0] == 0
    own = ("--products", "a", "--camera", "lane2")
    code, result, text = run(capsys, "calibrate", "--bundle", root, "--data", lane2, *own, *RATE, *ENGINE)
    assert code == 0 and result["camera"] == "lane2" and "at camera lane2 alone" in text
    return root


def test_one_camera_gets_thresholds_and_the_others_keep_theirs(
    both: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.load(both)
    shared, own = bundle.threshold("a"), bundle.threshold("a", camera="lane2")
    assert shared is not None and own is not None
    assert (shared.value, own.value) == (pytest.approx(0.39), pytest.approx(0.84)) and own.images and own.set_at
    assert bundle.threshold("b", camera="lane2") == bundle.threshold("b") is not None
    code, _, text = run(capsys, "calibrate", "--bundle", both, "--data", data, "--false-alarm-rate", 0.1, *ENGINE)
    assert code == 0 and "thresholds of their own, which stay as they are: lane2 (--camera)" in text
    again = Bundle.load(both)
    assert again.threshold("a") != shared and again.threshold("a", camera="lane2") == own
    code, result, text = run(capsys, "calibrate", "--bundle", both, "--forget-camera", "lane2")
    assert code == 0 and result["forgotten"] == "lane2" and "hold at lane2 again" in text
    assert "camera_thresholds" not in json.loads((both / MANIFEST).read_text())


def test_eval_judges_by_the_cameras_own(
    both: Path, data: Path, lane2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = ("eval", "--bundle", both, "--data", data, *ENGINE)
    thresholds = {}
    for camera in (None, "lane2"):
        code, result, text = run(capsys, *evaluate, *(() if camera is None else ("--camera", camera)))
        assert code == 0 and result["camera"] == camera and ("judged as at camera lane2" in text) is (camera == "lane2")
        thresholds[camera] = {p: m["threshold"] for p, m in result["products"].items()}
        assert result["products"]["a"]["miss_rate"] == (0 if camera is None else 1), "defects of 61 to 64"
    assert thresholds[None]["b"] == thresholds["lane2"]["b"] and thresholds["lane2"]["a"] == pytest.approx(0.84)
    before = result["seen"]["calibrated"]
    write(data / "a/test/good/lane2.png", level(70, "a"))
    assert run(capsys, *evaluate)[1]["seen"] == {"calibrated": before + 1}, (
        "it is no test of thresholds that were set on it"
    )
    code, result, _ = run(capsys, *evaluate, "--camera", "lane3")
    assert code == 1 and "no thresholds of camera lane3" in result["error"] and result["expected"] == "lane2"
    recorded = data.parent / "v.jsonl"
    fields = ("id", "part_id", "product", "label", "score", "threshold", "method", "bundle", "ts_judged", "latency_ms")
    recorded.write_text(json.dumps({**dict.fromkeys(fields), "id": "1", "camera": "lane1"}))
    code, result, _ = run(capsys, *evaluate, "--camera", "lane3", "--verdicts", recorded)
    assert "no verdict of camera lane3" in result["error"], "verdicts carry the threshold that they were given with"


def test_a_part_of_the_picture_is_recorded_with_the_camera(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(report={"fingerprints": {"fitted": "0" * 16}})
    calibrate = ("calibrate", "--bundle", root, "--data", data, *RATE, *ENGINE)
    assert run(capsys, *calibrate)[0] == 0
    before = Bundle.load(root)
    code, _, text = run(capsys, *calibrate, "--camera", "lane2", "--roi", "2,2,4,4")
    assert code == 0 and "this part of the pictures of a, b at lane2, unless it has a roi" in text
    assert "for one camera alone" not in text
    after, crop = Bundle.load(root), Crop(roi=(2, 2, 4, 4), picture=(8, 8))
    assert after.manifest.thresholds == before.manifest.thresholds
    for product in "ab":
        entry = after.threshold(product, camera="lane2")
        assert entry is not None and entry.crop == crop
    for command in (calibrate, ("eval", *calibrate[1:5], *ENGINE)):
        code, _, text = run(capsys, *command, "--camera", "lane2")
        assert code == 0 and "a, b: [2, 2, 4, 4] is cut out of pictures of 8 x 8, as the bundle says" in text
        assert "cut out of pictures" not in run(capsys, *command)[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--camera", "lane 2"), "is no name of a camera"),
        (("--forget-camera", "lane2", "--data", "."), "not allowed with argument"),
        (("--forget-camera", "lane2", "--camera", "lane2"), "--forget-camera calibrates nothing"),
        (("--forget-camera", "lane2", "--products", "a", "--programs", "default"), "takes out all that lane2 has"),
        (("--forget-camera", "lane3"), "the bundle has no thresholds of camera lane3"),
        ((), "one of the arguments --data --set --forget-camera is required"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    both: Path, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = (both / MANIFEST).read_bytes()
    code, result, text = run(capsys, "calibrate", "--bundle", both, *arguments)
    assert code in (1, 2) and said in text and not result["ok"]
    assert (both / MANIFEST).read_bytes() == raw
