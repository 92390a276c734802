"""Thresholds are written back into a bundle crash-safe, merged, and into the right model alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.bundle import MANIFEST, Bundle
from andon.runtime.errors import BundleError, ConfigError

from .bundles import OPEN, THRESHOLD, MakeBundle, rewrite


def test_thresholds_are_written_back_and_merged(make_bundle: MakeBundle) -> None:
    root = make_bundle()
    before = Bundle.load(root)
    updated = before.save_thresholds({"a": {"default": THRESHOLD}})
    again = Bundle.load(root).save_thresholds({"b": {"default": THRESHOLD}})
    assert again.threshold("a") == again.threshold("b") == THRESHOLD
    assert len({before.id, updated.id, again.id}) == 3
    assert before.model_id == updated.model_id == again.model_id
    assert Bundle.load(root).id == again.id
    with pytest.raises(BundleError, match="unknown product"):
        before.save_thresholds({"c": {"default": THRESHOLD}})
    with pytest.raises(BundleError, match="unknown program"):
        before.save_thresholds({"a": {"fast": THRESHOLD}})


def test_thresholds_of_one_camera_stand_beside_those_of_all(make_bundle: MakeBundle) -> None:
    root = make_bundle(alternatives={"fast": [{"run": "encode"}, {"run": "score"}]})
    before = Bundle.load(root).save_thresholds({"a": {"default": THRESHOLD}})
    plain = (root / MANIFEST).read_bytes()
    assert b"camera" not in plain, "stations of before refuse a manifest that has the field"
    own = THRESHOLD.model_copy(update={"value": 2.0})
    before.save_thresholds({"a": {"default": own}}, "lane2")
    after = before.save_thresholds({"b": {"fast": own}}, "lane2")
    found = Bundle.load(root)
    assert found.id == after.id != before.id
    assert (found.model_id, *found.former_ids) == (before.model_id, *before.former_ids), "the same model"
    assert [found.threshold("a", "default", camera) for camera in (None, "lane1", "lane2")] == [
        THRESHOLD,
        THRESHOLD,
        own,
    ]
    assert found.threshold("b", "fast", "lane2") == own and found.threshold("b", "fast") is None
    assert found.threshold("a", "fast", "lane2") is None
    for product, program in (("c", "default"), ("a", "slow")):
        with pytest.raises(BundleError, match="names an unknown p"):
            before.save_thresholds({product: {program: own}}, "lane2")
    with pytest.raises(ConfigError, match="no thresholds of camera lane1") as refused:
        before.forget_camera("lane1")
    assert refused.value.expected == "lane2"
    before.forget_camera("lane2")
    assert (root / MANIFEST).read_bytes() == plain
    for change in ({"no/level": {}}, {"lane2": {"c": {"default": {}}}}):
        rewrite(root, lambda m, c=change: m.update(camera_thresholds=c))
        with pytest.raises(BundleError, match="is not a valid manifest"):
            Bundle.load(root)


def test_a_crash_while_thresholds_are_written_leaves_a_bundle_that_loads(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace
    for crash_at in range(3):
        root = make_bundle()
        bundle = Bundle.load(root)
        count = 0

        def crash(self: Path, target: Any, crash_at: int = crash_at) -> Path:
            nonlocal count
            count += 1
            if count > crash_at:
                raise KeyboardInterrupt
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            bundle.save_thresholds({"a": {"default": THRESHOLD}})
        monkeypatch.undo()
        assert Bundle.load(root).threshold("a") in (None, THRESHOLD)


def test_two_calibrations_at_once_both_keep_their_thresholds(make_bundle: MakeBundle) -> None:
    root = make_bundle()
    one, other = Bundle.load(root), Bundle.load(root)  # both before the other has written
    one.save_thresholds({"a": {"default": THRESHOLD}})
    kept = other.save_thresholds({"b": {"default": THRESHOLD}})
    assert kept.threshold("a") == kept.threshold("b") == THRESHOLD
    assert Bundle.load(root).id == kept.id


@pytest.mark.parametrize(
    "recorded",
    [
        {},
        {"images": "0123456789abcdef", "set_at": "2026-01-01T00:00:00Z"},
        {"images": "0123456789abcdef", "variant": "fp16", "backend": "tensorrt"},
    ],
    ids=["nothing", "images and time", "images and engines"],
)
def test_what_a_threshold_does_not_record_is_written_as_stations_of_before_read_them(
    make_bundle: MakeBundle, recorded: dict[str, str]
) -> None:
    """They refuse keys that they do not know, and every enrolled bundle had one, empty."""
    root = make_bundle()
    threshold = THRESHOLD.model_copy(update=recorded)
    Bundle.load(root).save_thresholds({"a": {"default": threshold}})
    written = json.loads((root / MANIFEST).read_text())["thresholds"]["a"]["default"]
    known = {"value", "false_alarm_rate", "confidence", "samples", "pixel", "program", "source"}
    assert set(written) == known | {*recorded}
    assert Bundle.load(root).threshold("a") == threshold


SAVE_OFTEN = """
import sys
from andon.runtime.bundle import Bundle
from andon.runtime.manifest import Threshold
root, product = sys.argv[1:]
print("ready", flush=True)
input()
for i in range(40):
    Bundle.load(root).save_thresholds({product: {"default": Threshold(value=i, false_alarm_rate=0.05, samples=19)}})
    assert Bundle.load(root).threshold(product).value == i, "the other process has undone it"
"""


def test_processes_that_save_thresholds_wait_for_each_other(make_bundle: MakeBundle) -> None:
    root = make_bundle()
    before = {path.name for path in root.iterdir()}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE_OFTEN, str(root), product],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for product in ("a", "b")
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    errors = [writer.communicate()[1] for writer in writers]
    assert errors == ["", ""]
    end = Bundle.load(root)
    assert [end.manifest.thresholds[product]["default"].value for product in ("a", "b")] == [39.0, 39.0]
    assert {path.name for path in root.iterdir()} == before


def test_thresholds_of_one_model_are_not_written_into_another(make_bundle: MakeBundle) -> None:
    root = make_bundle()
    loaded = Bundle.load(root)
    rewrite(root, lambda m: m.update(name="exported again"))
    other = (root / MANIFEST).read_bytes()
    with pytest.raises(BundleError, match="replaced by another model"):
        loaded.save_thresholds({"a": {"default": THRESHOLD}})
    assert (root / MANIFEST).read_bytes() == other


def test_a_bundle_that_may_only_be_read_loads_and_is_not_written(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_bundle()

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(f"[Errno 30] Read-only file system: {self}")

    monkeypatch.setattr(Path, "open", lambda self, mode="r", *a, **k: (refuse if "w" in mode else OPEN)(self, mode))
    before = Bundle.load(root)
    with pytest.raises(PermissionError):
        before.save_thresholds({"a": {"default": THRESHOLD}})
    monkeypatch.undo()
    assert Bundle.load(root).id == before.id
