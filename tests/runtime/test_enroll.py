"""andon enroll: a bundle for a new product, with and without torch, and what is refused."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import textwrap
from datetime import datetime
from pathlib import Path

import cv2
import numpy as np
import pytest
from andon.runtime.bundle import MANIFEST, Bundle
from andon.runtime.commands.enroll import default_out, product_name
from andon.runtime.engine.select import open_backend
from andon.runtime.enrolment.shipped import views
from andon.runtime.errors import quoted
from andon.runtime.newest import newest
from andon.runtime.replay import GATE

from .parts import part


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """A foct and a knn bundle on an untrained network, exported once from synthetic parts."""
    from andon.cli import main

    root = tmp_path_factory.mktemp("engines")
    folder = root / "disc" / "good"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(5):
        image = np.roll(part()[0], (7 * k, -5 * k), (0, 1))  # laid down anew: the same picture again is no support
        noisy = np.clip(image.astype(int) + rng.integers(-8, 8, image.shape), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{k}.png"), noisy)
    made = {}
    for method in ("foct", "knn"):
        from andon.train.config import default_config

        text = default_config(method).read_text().replace("size: 224", "size: 64").replace("grid: 28", "grid: 8")
        text = text.replace("id: tf_efficientnet_lite0", "id: tf_efficientnet_lite0\n  weights: random:0")
        text = text.replace("alternatives: [0, 5, 100]", "alternatives: [0]").replace("coreset: 4000", "coreset: 320")
        config = root / f"{method}.yaml"
        config.write_text(text)
        made[method] = root / method
        arguments = ["--method", method, "--support", str(folder), "--shots", "3", "--config", str(config), "--fp16"]
        assert main(["enroll", *arguments, "--out", str(made[method])]) == 0
    return made, folder


@pytest.mark.parametrize("method", ["foct", "knn"])
def test_workstation_bundle_knows_its_product(engines, method):
    made, _ = engines
    with Bundle.load(made[method]) as bundle:
        assert bundle.manifest.classes == ("disc",)
        threshold = bundle.threshold("disc")
        assert threshold.false_alarm_rate == 0.25 and threshold.samples == 3 and "provisional" in threshold.source
        assert not [p for p in made[method].parent.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("method", ["foct", "knn"])
def test_another_precision_repeats_what_was_recorded_at_enrolment(engines, method, capsys):
    """So a golden set of the support itself, whose distances are rounding errors, would not do."""
    from andon.cli import main

    made, _ = engines
    assert main(["verify", "--bundle", str(made[method]), "--variant", "fp16"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("method", ["foct", "knn"])
def test_verify_looks_at_the_decisions_of_an_enrolled_bundle(engines, method, capsys):
    """On views of the given pictures; of no defect, as none is known. To an untrained foct all are alike."""
    from andon.cli import main

    made, _ = engines
    assert main(["verify", "--bundle", str(made[method]), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for variant in ("fp32", "fp16"):
        found = {check["subject"]: check for check in result["checks"][variant]}
        assert found["decisions"]["ok"] and "disc" not in found, "an AUROC would need defects"
    assert not any("decisions beyond the golden set" in text for text in result["not_checked"])
    assert any("whether defects still stand out" in text for text in result["not_checked"])
    programs = [text for text in result["not_checked"] if "programs" in text]
    assert [text.split()[3] for text in programs] == (["ct0"] if method == "foct" else [])
    with Bundle.load(made[method]) as bundle, np.load(bundle.root / GATE) as gate:
        threshold, report = bundle.threshold("disc").value, json.loads((bundle.root / "report.json").read_text())
        over = int((gate["score"] > threshold).sum())
        assert gate["threshold"].tolist() == [threshold] and set(gate["labels"]) == {0, -1}
        assert report["gate"] == {"frames": 32, "over": over} and (over > 0) == (method == "knn")
    assert any("verdicts of both kinds" in text for text in result["not_checked"]) == (method == "foct")


def test_verify_refuses_engines_that_decide_otherwise_on_an_enrolled_bundle(engines, capsys, monkeypatch):
    """Right on the golden frames, and of the views half called otherwise: what nothing looked at before."""
    from andon.cli import main
    from andon.runtime import replay

    made, _ = engines
    judge, calls = replay._judge, []

    def other(program, frame, class_id):
        score, found = judge(program, frame, class_id)
        calls.append(score)
        return (score if len(calls) <= 6 else score * (2 if len(calls) % 2 else 0.01)), found

    monkeypatch.setattr(replay, "_judge", other)
    assert main(["verify", "--bundle", str(made["knn"]), "--variant", "fp32", "--json"]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [c["subject"] for c in result["checks"]["fp32"] if not c["ok"]] == ["decisions"]


def test_views_are_as_many_as_may_travel_and_the_same_every_time():
    frames = np.random.default_rng(0).integers(0, 255, (3, 64, 48, 3), np.uint8)
    seen, labels = views(frames)
    assert seen.shape == (32, 64, 48, 3) and seen.dtype == np.uint8 and sorted(set(labels)) == [-1, 0]
    assert (seen == views(frames)[0]).all() and not any((view == frame).all() for view in seen for frame in frames)
    one, labels = views(frames[:1])
    assert len(one) == 32 and (labels == 0).sum() == 16, "one image alone has views of both kinds"
    assert len(views(np.zeros((50, 8, 8, 3), np.uint8))[0]) == 32
    assert len(views(np.zeros((1, 1024, 1024, 3), np.uint8))[0]) == 8, "large frames are many bytes"


@pytest.mark.parametrize("method", ["foct", "knn"])
def test_device_enrols_without_torch_and_onnx(engines, method, tmp_path):
    """In a process where both are blocked; the result verifies and tells the part from a damaged one."""
    made, folder = engines
    target = tmp_path / "new"
    code = textwrap.dedent(
        f"""
        import sys
        for name in ("torch", "torchvision", "timm", "onnx"):
            sys.modules[name] = None
        from andon.cli import main
        arguments = ["--method", "{method}", "--support", {str(folder)!r}, "--shots", "4", "--name", "other"]
        assert main(["enroll", *arguments, "--backbone-bundle", {str(made[method])!r}, "--out", {str(target)!r}]) == 0
        assert main(["verify", "--bundle", {str(target)!r}]) == 0
        assert main(["enroll", *arguments, "--out", {str(tmp_path / "no")!r}]) == 1
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch is not installed" in done.stderr
    from andon.runtime.detector import Detector

    with Detector.open(target, backend="onnxruntime", threads=1) as detector:
        good, _ = part()
        damaged = good.copy()
        cv2.rectangle(damaged, (80, 80), (130, 120), (0, 0, 255), -1)
        assert detector.judge_image(good, "other").score < detector.judge_image(damaged, "other").score


class Unset(datetime):
    """The clock of a device without a battery, before the network has set it."""

    @classmethod
    def now(cls, tz=None):
        return datetime(1970, 1, 1, tzinfo=tz)


def test_both_ways_give_the_same_state(engines, tmp_path, capsys, monkeypatch):
    """Enrolling the same support again from the exported bundle changes nothing, and it is the newest bundle."""
    from andon.cli import main

    made, folder = engines
    target, before = tmp_path / "once again", tmp_path / "before"
    before.mkdir()
    (before / MANIFEST).write_text('{"created": "2100-01-01T00:00:00Z"}')
    monkeypatch.setattr("andon.runtime.newest.datetime", Unset)
    arguments = ["--method", "foct", "--support", str(folder), "--shots", "3", "--out", str(target)]
    assert main(["enroll", *arguments, "--backbone-bundle", str(made["foct"])]) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    assert main(shlex.split(command.removeprefix("next: "))[1:]) == 0, "what it says to do next works as it stands"
    with Bundle.load(made["foct"]) as a, Bundle.load(target) as b:
        for name, entry in a.manifest.state.items():
            np.testing.assert_array_equal(a.array(entry), b.array(b.manifest.state[name]), err_msg=name)
    assert newest([made["foct"], target, before]) == target


def test_calibrate_leaves_out_the_images_enrolled_from(engines, tmp_path, capsys):
    """The memory is made of them: at no distance from themselves, they would promise what no other part keeps."""
    from andon.cli import main

    made, folder = engines
    bundle = shutil.copytree(made["knn"], tmp_path / "knn")
    few = tmp_path / "disc"
    few.mkdir()
    shutil.copytree(folder, few / "good")
    arguments = [
        "calibrate",
        "--bundle",
        str(bundle),
        "--data",
        str(few),
        "--false-alarm-rate",
        "0.5",
        "--threads",
        "1",
    ]
    for i in range(5):
        image, _ = part()
        cv2.imwrite(str(few / "good" / f"new{i}.png"), np.clip(image.astype(int) + i, 0, 255).astype(np.uint8))
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < result["left_out"]["support"] <= 3 and "new good images" in result["origin"]
    for image in (few / "good").glob("*.png"):
        if image.name not in ("0.png", "1.png", "2.png"):
            image.unlink()
    assert main(arguments) == 1
    assert "enrolled from" in capsys.readouterr().err


def board(rng, defect=False):
    """A part like a circuit board in a fixture, 512 x 512: moved by 1.5 pixels, turned by .3 degrees, 3 % light."""
    fixed = np.random.default_rng(1)
    image = np.full((512, 512, 3), (60, 90, 40), np.uint8)
    for _ in range(26):
        (x, y), (w, h) = fixed.integers(60, 400, 2).tolist(), fixed.integers(20, 70, 2).tolist()
        cv2.rectangle(image, (x, y), (x + w, y + h), fixed.integers(0, 255, 3).tolist(), -1)
    cv2.rectangle(image, (70, 380), (240, 450), (235, 235, 235), -1)
    if defect:
        cv2.rectangle(image, (250, 250), (310, 290), (200, 200, 200), -1)
    moved = cv2.getRotationMatrix2D((256, 256), rng.uniform(-0.3, 0.3), 1)
    moved[:, 2] += rng.uniform(-1.5, 1.5, 2)
    image = cv2.warpAffine(image, moved, (512, 512), borderMode=cv2.BORDER_REPLICATE)
    return np.clip(image * rng.uniform(0.97, 1.03) + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def enrolled(engines, method, support, target, capsys):
    """What `andon enroll` of all images of a folder prints, and its JSON object."""
    from andon.cli import main

    shots = str(len(list(support.glob("*.png"))))
    arguments = ["--method", method, "--support", str(support), "--shots", shots, "--threads", "1", "--name", "p"]
    assert (
        main(["enroll", *arguments, "--backbone-bundle", str(engines[0][method]), "--out", str(target), "--json"]) == 0
    )
    said = capsys.readouterr().out
    return said, json.loads(said.splitlines()[-1])


def test_different_parts_in_a_fixture_are_no_copies(engines, tmp_path, capsys):
    """They are as near as frames of a burst; a threshold from one's mirror images would pass the defects."""
    from andon.runtime.detector import Detector

    rng = np.random.default_rng(0)
    (tmp_path / "boards").mkdir()
    for k in range(4):
        cv2.imwrite(str(tmp_path / "boards" / f"{k}.png"), board(rng))
    _, result = enrolled(engines, "knn", tmp_path / "boards", tmp_path / "bundle", capsys)
    assert result["repeated"] == [] and result["shots"] == 4 and result["thresholds"]["default"]["samples"] == 4
    with Detector.open(tmp_path / "bundle", backend="onnxruntime", threads=1) as detector:
        scores = [detector.judge_image(cv2.cvtColor(board(rng, True), cv2.COLOR_BGR2RGB), "p").score for _ in range(5)]
    assert min(scores) > result["thresholds"]["default"]["value"], "a board with a part too many is NG"


def test_copies_are_left_out_and_a_burst_is_not(engines, tmp_path, capsys):
    """A copy says nothing; a burst says too little, and a threshold too strict is safer than one from mirror images."""
    folder = engines[1]
    image, noise = cv2.imread(str(folder / "0.png")).astype(int), np.random.default_rng(3)
    for name in ("copies", "burst", "nothing else"):
        (tmp_path / name).mkdir()
        for k in range(3):
            shot = image + (noise.integers(-2, 3, image.shape) if name == "burst" else 0)
            cv2.imwrite(str(tmp_path / name / f"{k}.png"), np.clip(shot, 0, 255).astype(np.uint8))
    shutil.copy(folder / "1.png", tmp_path / "copies" / "3.png")
    said, result = enrolled(engines, "knn", tmp_path / "copies", tmp_path / "a", capsys)
    assert "warning: 2 of 4 support images are copies of another and are left out: 1.png, 2.png\n" in said
    assert result["repeated"] == ["1.png", "2.png"] and result["shots"] == 2 and not result["alike"]
    assert "much alike" not in said and result["thresholds"]["default"]["samples"] == 2
    with Bundle.load(tmp_path / "a") as bundle:
        packed = json.loads((bundle.root / "report.json").read_text())["fingerprints"]["support"]
        assert len(packed) == 2 * 16, "contents, each once"
    strict = result["thresholds"]["default"]["value"] / 2
    for name in ("burst", "nothing else"):
        said, result = enrolled(engines, "knn", tmp_path / name, tmp_path / f"{name} bundle", capsys)
        assert result["repeated"] == [] and result["shots"] == 3 and result["alike"] and "much alike" in said
        assert f"andon calibrate --bundle {quoted(tmp_path / f'{name} bundle')} --data FOLDER" in said.splitlines()[0]
        assert "FOLDER/p/good" in said.splitlines()[0], "the folder's name is the product's"
        assert result["thresholds"]["default"]["value"] < strict, "not that of one image's mirror images"


def test_refusals(engines, tmp_path, capsys):
    from andon.cli import main

    made, folder = engines
    base = ["enroll", "--support", str(folder), "--out", str(tmp_path / "x"), "--backbone-bundle"]
    assert main([*base, str(made["knn"]), "--method", "foct"]) == 1
    assert "another method" in capsys.readouterr().err
    assert main([*base, str(made["foct"]), "--method", "foct", "--shots", "9"]) == 1
    assert "not enough images" in capsys.readouterr().err
    assert main([*base, str(made["foct"]), "--config", str(tmp_path / "nix.yaml"), "--fp16"]) == 1
    assert "--config and --fp16 cannot be heeded" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_missing_support_is_refused_before_torch_is_loaded(tmp_path):
    code = "import sys\nfrom andon.cli import main\nassert main(sys.argv[1:]) == 1 and 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "enroll", "--support", str(tmp_path / "none"), "--out", str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not enough images of good parts" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../../x y", "a/b", "..", "", "a\nb"])
def test_a_name_that_leaves_the_folder_of_bundles_is_refused(name, tmp_path, capsys, monkeypatch):
    from andon.cli import main

    monkeypatch.chdir(tmp_path)
    for engines in ([], ["--backbone-bundle", "nosuch"]):
        (tmp_path / "support").mkdir(exist_ok=True)
        for k in range(4):
            (tmp_path / "support" / f"{k}.png").touch()
        assert main(["enroll", "--support", "support", "--name", name, *engines, "--json"]) == 1
        assert "--name cannot be" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert [p.name for p in tmp_path.iterdir()] == ["support"]


def test_the_product_is_named_after_its_folder_also_if_that_is_a_link(tmp_path, monkeypatch):
    (tmp_path / "src/images/good").mkdir(parents=True)
    (tmp_path / "bolt M8").symlink_to(tmp_path / "src/images")
    monkeypatch.chdir(tmp_path / "src/images/good")

    def named(support, name=None):
        return product_name(argparse.Namespace(support=Path(support), name=name))

    assert named(tmp_path / "bolt M8") == named(tmp_path / "bolt M8/good") == "bolt-M8"
    assert named(".") == named("..") == "images"
    assert named(".", "Schraube M8") == "Schraube M8"
    assert default_out("knn", "Schraube M8").name.startswith("knn-Schraube-M8-")


@pytest.mark.parametrize("method", ["knn", "hvq"])
def test_a_bundle_of_another_method_is_refused_with_a_command_that_exists(make_bundle, method, tmp_path, capsys):
    """`andon enroll --method hvq` does not exist: hvq keeps no memory to enroll into."""
    from andon.cli import main

    bundle = make_bundle(method=method).rename(tmp_path / "a bundle")
    support = tmp_path / "good parts"
    assert main(["enroll", "--support", str(support), "--backbone-bundle", str(bundle), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "another method" in answer["error"] and answer["expected"] == "a bundle of foct"
    if method == "knn":
        assert answer["found"] == "knn"
        assert answer["next"] == f"andon enroll --method knn --support '{support}' --backbone-bundle '{bundle}'"
    else:
        assert answer["found"].startswith("hvq, which is trained on every product")
        assert answer["next"].startswith(f"andon enroll --method foct --support '{support}' (exports")
        assert "andon train --method hvq" in answer["next"]
    options = ["--support", str(support), "--shots", "2", "--seed", "0", "--name", "M8 x", "--out", str(tmp_path / "b")]
    options += ["--foreground", "mask:my masks", "--threads", "1"]
    assert main(["enroll", *options, "--backbone-bundle", str(bundle), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    pasted = shlex.split(answer["next"].partition(" (")[0])
    engines = ["--backbone-bundle", str(bundle)] if method == "knn" else []
    assert pasted == ["andon", "enroll", "--method", "knn" if method == "knn" else "foct", *options, *engines]


def test_a_checkpoint_is_no_bundle_and_the_message_says_so(tmp_path, capsys):
    from andon.cli import main

    folder = tmp_path / "run 1"
    folder.mkdir()
    (folder / "provenance.json").write_text("{}")
    assert main(["enroll", "--support", str(tmp_path), "--backbone-bundle", str(folder)]) == 1
    said = capsys.readouterr().err
    assert "found:    a checkpoint" in said and f"andon export --method METHOD --checkpoint '{folder}'" in said


def test_warm_start_moves_phi_and_a_reset_takes_it_back(engines):
    from andon.runtime.program import Program

    made, _ = engines
    with (
        Bundle.load(made["foct"]) as bundle,
        open_backend("onnxruntime", threads=1) as backend,
        Program(bundle, backend) as program,
    ):
        before = program.read_state("w2")
        program.frame[...] = cv2.resize(part()[0], (64, 64))
        program.run(0)
        first = program.read_state("w2")
        program.run(0)
        assert (before != first).any() and (first != program.read_state("w2")).any()
        program.reset()
        assert (program.read_state("w2") == before).all()


def test_what_is_cut_out_of_the_support(engines, tmp_path, capsys):
    """With --roi the memory is that of pictures cut out beforehand, masks too; the next product goes by the bundle."""
    from andon.cli import main
    from andon.runtime.manifest import Crop

    made, folder = engines
    framed, masks = tmp_path / "framed", tmp_path / "masks"
    framed.mkdir()
    masks.mkdir()
    for path in sorted(folder.iterdir()):
        part = cv2.imread(str(path))
        side = part.shape[0]
        frame = np.full((side + 20, side + 50, 3), 200, np.uint8)
        frame[10 : 10 + side, 30 : 30 + side] = part
        mask = np.zeros(frame.shape[:2], np.uint8)
        mask[10 + side // 4 : 10 + side // 2, 30 : 30 + side // 2] = 255
        cv2.imwrite(str(framed / path.name), frame)
        cv2.imwrite(str(masks / path.name), mask)
        (tmp_path / "cut").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "cut" / path.name), mask[10 : 10 + side, 30 : 30 + side])
    crop = Crop(roi=(30, 10, side, side), picture=(side + 50, side + 20))
    roi = ["--roi", f"30,10,{side},{side}"]

    def enrolled(out, support, source, *more):
        arguments = ["--method", "knn", "--name", "other", "--shots", "3", "--support", str(support)]
        capsys.readouterr()
        assert main(["enroll", *arguments, "--backbone-bundle", str(source), "--out", str(tmp_path / out), *more]) == 0
        with Bundle.load(tmp_path / out) as bundle:
            state = {name: bundle.array(entry) for name, entry in bundle.manifest.state.items()}
            return bundle.manifest, state, bundle.threshold("other").value, capsys.readouterr().out

    for title, there, here in (("auto", [], []), ("mask", [tmp_path / "cut"], [masks])):
        how = [["--foreground", f"mask:{path}"] for path in (*there, *here)] or [[], []]
        expected, rows, threshold, text = enrolled(f"{title}-cut", folder, made["knn"], *how[0])
        assert expected.crops == {} and "cut out" not in text
        found, same, value, text = enrolled(f"{title}-framed", framed, made["knn"], *roi, *how[1])
        assert found.crops == {"other": crop} and value == threshold and "as --roi says" in text
        for name in rows:
            np.testing.assert_array_equal(same[name], rows[name], err_msg=name)
    source = tmp_path / "auto-framed"
    again, same, value, text = enrolled("again", framed, source)
    assert again.crops == {"other": crop} and "as for the bundle of engines" in text
    both = enrolled("already", folder, source)
    assert both[0].crops == {"other": crop}, "of a camera that cuts it out itself, or cut out by hand"
    small = tmp_path / "small"
    small.mkdir()
    for path in sorted(folder.iterdir()):
        cv2.imwrite(str(small / path.name), cv2.resize(cv2.imread(str(path)), (70, 64)))
    manifest, *_, text = enrolled("elsewhere", small, source)
    assert manifest.crops == {} and "cut out" not in text, "pictures of another camera are its own affair"


def test_a_cameras_thresholds_of_another_product_do_not_travel(engines, tmp_path, capsys):
    from andon.cli import main

    made, folder = engines
    source = tmp_path / "source"
    shutil.copytree(made["knn"], source)
    with Bundle.load(source) as bundle:
        bundle.save_thresholds({"disc": {"default": bundle.threshold("disc")}}, "lane2")
    arguments = ["--method", "knn", "--support", str(folder), "--shots", "2", "--name", "other"]
    arguments += ["--out", str(tmp_path / "made")]
    assert main(["enroll", *arguments, "--backbone-bundle", str(source)]) == 0, capsys.readouterr().err
    with Bundle.load(tmp_path / "made") as bundle:
        assert list(bundle.manifest.thresholds) == ["other"] and bundle.manifest.camera_thresholds == {}
