"""The few-shot evaluation: numpy scores equal the engines', streams are what they say, records are complete."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
from andon.calib.policies import GuardPolicy, MemoryPolicy
from andon.cli import main
from andon.runtime import images
from andon.runtime.bundle import Bundle
from andon.runtime.crop import cropped
from andon.runtime.dataset import open_dataset
from andon.runtime.engine.select import open_backend
from andon.runtime.enrolment import fewshot, stream
from andon.runtime.enrolment.foreground import everything
from andon.runtime.manifest import Crop
from andon.runtime.program import Program
from andon.runtime.results import load_results


@pytest.fixture(scope="module")
def small(tmp_path_factory, synthetic_data):
    """A small foct bundle on an untrained network, enrolled from the synthetic set, and its folder."""
    from andon.train.config import default_config

    root = tmp_path_factory.mktemp("fewshot")
    text = default_config("foct").read_text().replace("size: 224", "size: 64").replace("grid: 28", "grid: 8")
    text = text.replace("id: tf_efficientnet_lite0", "id: tf_efficientnet_lite0\n  weights: random:0")
    text = text.replace("alternatives: [0, 5, 100]", "alternatives: [0]").replace("episodic: 800", "episodic: 60")
    (root / "foct.yaml").write_text(text)
    support = synthetic_data / "grid" / "train" / "good"
    arguments = ["--support", str(support), "--shots", "2", "--config", str(root / "foct.yaml"), "--foreground", "all"]
    assert main(["enroll", "--method", "foct", *arguments, "--out", str(root / "foct")]) == 0
    return root / "foct"


@pytest.fixture(scope="module")
def cache(small, synthetic_data):
    with Bundle.load(small) as bundle, open_backend("onnxruntime", threads=1) as backend:
        yield fewshot.FeatureCache(bundle, backend, open_dataset(synthetic_data))


def test_features_are_cached_by_what_is_cut_out_of_each_product(small, synthetic_data):
    """Two products of as many pictures: the region of one is not that of the other."""
    crop = Crop(roi=(8, 8, 64, 64), picture=(96, 96))
    whole = open_dataset(synthetic_data)
    sets = [whole, *(replace(whole, samples=cropped(whole.samples, {p: crop})) for p in whole.products)]
    with Bundle.load(small) as bundle:
        paths = {fewshot._cache_path(bundle, dataset) for dataset in sets}
    assert len(paths) == len(sets) == 4


def test_cached_features_are_kept_to_the_limit(small, synthetic_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ANDON_CACHE", str(tmp_path))
    dataset = open_dataset(synthetic_data)
    with Bundle.load(small) as bundle, open_backend("onnxruntime", threads=1) as backend:

        def of(samples):
            return fewshot.FeatureCache(bundle, backend, replace(dataset, samples=dataset.samples[samples]))

        held = of(slice(0, 1))
        (first,) = (tmp_path / "fewshot").iterdir()
        of(slice(1, 2))
        (second,) = {*(tmp_path / "fewshot").iterdir()} - {first}
        os.utime(first, (1, 1))
        monkeypatch.setenv("ANDON_CACHE_LIMIT", "0")
        of(slice(2, 3))
    assert first.exists() and not second.exists() and np.array(held.features).any(), "what is in use stays"
    assert "few-shot cache" in (said := capsys.readouterr().err) and "ANDON_CACHE_LIMIT" in said


def test_numpy_scores_equal_the_programs(small, cache, synthetic_data, tmp_path):
    """Enroll a draw as a bundle and judge test images with its engines: 0 and 10 warm CT steps."""
    from andon.runtime.enrolment.enroll import enroll
    from andon.runtime.enrolment.support import Support
    from andon.runtime.images import read_rgb
    from andon.runtime.preprocess import resize

    drawn = fewshot.draw_support(cache, "grid", 2, 3)
    memory = fewshot.enroll_draw(cache, drawn, everything, 0)
    samples = [cache.dataset.samples[i] for i in drawn]
    frames = np.stack([resize(read_rgb(s.path), cache.manifest.preprocess) for s in samples])
    support = Support(tuple(s.path for s in samples), frames, np.ones((2, 64), bool))
    test = cache.select("grid", split="test")[:4]
    with Bundle.load(small) as source, open_backend("onnxruntime", threads=1) as backend:
        bundle = enroll(source, backend, "grid", support, tmp_path / "grid")
        for name, count in (("ct0", 0), ("default", 10)):
            navigator, moments = memory.navigator, fewshot.Moments.zeros(memory.navigator)
            with Program(bundle, backend, program=name) as program:
                for index in test:
                    program.frame[...] = resize(read_rgb(cache.dataset.samples[index].path), cache.manifest.preprocess)
                    found = program.run(0).score
                    patches = cache[int(index)] - memory.center
                    some = fewshot.subsample(patches, 4)
                    cost = fewshot.costs(some, memory.rows)
                    for _ in range(count):
                        navigator, moments, _ = fewshot.step(navigator, moments, some, memory.rows, cost, 1e-4)
                    expected = fewshot.score(navigator, patches, memory.rows)
                    # float16 features in the cache
                    assert found == pytest.approx(float(expected.score.max()), rel=5e-3), (name, index)
                    assert program.read("ct_score.nearest").max() == pytest.approx(expected.nearest.max(), rel=5e-3)


def test_features_are_kept_by_the_images_bytes_and_the_engine(small, synthetic_data, tmp_path, monkeypatch):
    """Figures go into the record: other images under the old names, or another network, must be seen."""
    monkeypatch.setenv("ANDON_CACHE", str(tmp_path / "cache"))
    grid = shutil.copytree(synthetic_data / "grid", tmp_path / "data" / "grid")
    with Bundle.load(small) as bundle, open_backend("onnxruntime", threads=1) as backend:

        def features(computed):
            steps = []
            cache = fewshot.FeatureCache(bundle, backend, open_dataset(grid.parent), steps.append)
            assert bool(steps) is computed
            return np.array(cache.features)

        first = features(computed=True)
        np.testing.assert_array_equal(features(computed=False), first)
        stage = bundle.manifest.files["stages/foct_features.fp32.onnx"]
        changed = {
            **bundle.manifest.files,
            "stages/foct_features.fp32.onnx": stage.model_copy(update={"sha256": "0" * 64}),
        }
        with monkeypatch.context() as patch:
            patch.setattr(bundle, "manifest", bundle.manifest.model_copy(update={"files": changed}))
            features(computed=True)
        real = inspect.getsource
        with monkeypatch.context() as patch:
            patch.setattr(inspect, "getsource", lambda asked: real(asked) + ("#" if asked is images else ""))
            features(computed=True)
        rng = np.random.default_rng(0)
        for image in sorted((grid / "test").rglob("*.png")):
            cv2.imwrite(str(image), rng.integers(0, 256, (96, 96, 3), np.uint8))
        other = features(computed=True)
        train = [s.split == "train" for s in open_dataset(grid.parent).samples]
        np.testing.assert_array_equal(other[train], first[train])
        assert (other != first)[np.invert(train)].any(axis=(1, 2)).all()
        for kept in (tmp_path / "cache" / "fewshot").iterdir():
            np.save(kept, np.zeros((1, 2), np.float16))
        np.testing.assert_array_equal(features(computed=True), other)


def test_draws_are_nested_and_differ_by_seed(cache):
    one, two = (fewshot.draw_support(cache, "grid", k, 0) for k in (1, 2))
    assert one[0] == two[0]
    assert len({tuple(fewshot.draw_support(cache, "grid", 2, s)) for s in range(6)}) > 3
    samples = [cache.dataset.samples[i] for i in two]
    assert all(s.good and s.split == "train" and s.product == "grid" for s in samples)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5])
def test_a_stream_has_the_share_of_anomalies_it_says_and_nothing_is_used_twice(cache, rate):
    support = fewshot.draw_support(cache, "grid", 1, 0)
    plan = stream.plan_stream(cache, "grid", support, rate, 0, 0)
    bad = np.array([not cache.dataset.samples[i].good for i in plan.stream])
    assert (bad == plan.anomalous).all()
    assert plan.anomalous.mean() == pytest.approx(rate, abs=0.5 / len(plan.stream) + 1e-9)
    used = [*support, *plan.stream, *plan.held_out]
    assert len(used) == len(set(map(int, used)))
    other = stream.plan_stream(cache, "grid", support, rate, 0, 1)
    assert sorted(other.stream) == sorted(plan.stream) and (other.held_out == plan.held_out).all()


def test_stream_teaches_and_counts_what_came_from_anomalies(cache):
    support = fewshot.draw_support(cache, "grid", 1, 0)
    memory = fewshot.enroll_draw(cache, support, everything, 0)
    plan = stream.plan_stream(cache, "grid", support, 0.2, 0, 0)
    open_guard = stream.Setting("open", MemoryPolicy(capacity=60, per_frame=5), GuardPolicy(gate=False))
    before = stream.baseline(cache, memory, plan, False, lambda n: None)
    gain = stream.run_stream(cache, memory, plan, open_guard, before, lambda n: None)
    assert gain.admitted == 1.0 and gain.bad == pytest.approx(plan.anomalous.mean())
    closed = replace(open_guard, guard=GuardPolicy(warmup=50))
    gain = stream.run_stream(cache, memory, plan, closed, before, lambda n: None)
    assert gain.admitted == 0 and gain.online == gain.frozen and gain.stream_online == gain.stream_frozen


def test_the_papers_order_scores_a_frame_with_its_own_patches(cache):
    """Scored after the update, a frame whose patches were all taken is at (nearly) no distance."""
    support = fewshot.draw_support(cache, "grid", 1, 0)
    memory = fewshot.enroll_draw(cache, support, everything, 0)
    plan = stream.plan_stream(cache, "grid", support, 0.2, 0, 0)
    plan = replace(plan, stream=plan.stream[:5], anomalous=plan.anomalous[:5])
    take_all = MemoryPolicy(capacity=1000, per_frame=64)
    traces = {}
    for literal in (False, True):
        setting = stream.Setting("x", take_all, GuardPolicy(gate=False), literal=literal)
        traces[literal] = stream.Trace()
        before = stream.baseline(cache, memory, plan, False, lambda n: None)
        stream.run_stream(cache, memory, plan, setting, before, lambda n: None, traces[literal])
    assert max(traces[True].scores) < 0.2 * min(traces[False].scores)


def test_command_prints_writes_records_and_a_page(small, synthetic_data, tmp_path, capsys):
    results, page = tmp_path / "docs" / "results.json", tmp_path / "memory.html"
    results.parent.mkdir()
    code = main(
        [
            "eval",
            *("--bundle", str(small), "--data", str(synthetic_data), "--products", "grid", "--foreground", "all"),
            *("--few-shot", "1,2", "--seeds", "2", "--orders", "1", "--ct-steps", "0,2", "--online", "0.2"),
            *("--threads", "1", "--results", str(results), "--report", str(page), "--json"),
        ]
    )
    out = capsys.readouterr().out
    assert code == 0
    printed = json.loads(out.splitlines()[-1])
    kept = load_results(results)
    assert len(kept) == len(printed["records"])
    settings = {(r["method"], r["setting"]) for r in kept}
    assert {("knn", "frozen"), ("foct", "frozen, ct.steps 0"), ("foct", "frozen, ct.steps 2")} <= settings
    assert any(s.startswith("online") for _, s in settings)
    assert {r["seed"] for r in kept} == {0, 1} and all(r["n"] == 2 for r in printed["means"])
    assert {r["shots"] for r in kept} == {1, 2}
    assert all(str(tmp_path) not in r["command"] and r["command"].startswith("andon eval") for r in kept)
    text = page.read_text()
    assert "<svg" in text and "<script" not in text and "grid: one stream with 20% anomalies" in text
    for said in ("of the whole test split", "is not the figure of the table above", "were held out of it"):
        assert said in text, "no figure without the images that it is of"
    assert "support draw (seed) 0 of 2, order 0 of 1" in text and str(tmp_path) not in kept[0]["command"]
    provenance = text.partition("Provenance")[2]
    with Bundle.load(small) as bundle:
        assert f"{bundle.manifest.name} ({bundle.id})" in provenance
    for said in (
        str(synthetic_data),
        "1 and 2 good training images; seeds 0 to 1",
        "order 0",
        f"--bundle {small}",
        " CPUs, ",
    ):
        assert said in provenance, said
    values = {
        r["setting"]: f"<td>{r['value']:.3f} ± {r['sd']:.3f}</td>"
        for r in printed["means"]
        if "frozen, " in r["setting"]
    }
    assert len(values) == 2 and all(value in text for value in values.values())
    assert not any("--on-corrupt" in r["command"] for r in kept) and printed["skipped"] == []
    again = main(["eval", "--data", str(synthetic_data), "--few-shot", "1"])
    assert again == 1 and "needs engines" in capsys.readouterr().err


def test_an_undecodable_image_is_left_out_on_request(small, synthetic_data, tmp_path, capsys):
    data = tmp_path / "data"
    for split in ("train", "test"):
        shutil.copytree(synthetic_data / "grid" / split, data / "grid" / split)
    broken = sorted((data / "grid" / "test" / "good").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:40])
    arguments = ["eval", "--bundle", str(small), "--data", str(data), "--few-shot", "1", "--seeds", "1"]
    arguments += ["--orders", "1", "--ct-steps", "0", "--foreground", "all", "--threads", "1", "--json"]
    assert main(arguments) == 1
    assert "--on-corrupt skip" in capsys.readouterr().err
    assert main([*arguments, "--on-corrupt", "skip"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["skipped"] == [f"grid/test/good/{broken.name}"]
    assert all(r["command"].endswith("--on-corrupt skip") for r in result["records"])


def test_a_page_has_no_stream_that_nobody_asked_for(small, synthetic_data, tmp_path, capsys):
    """It was of 10% anomalies, and none of its figures was among the others; one defective image is enough without."""
    data, page = copied(synthetic_data, tmp_path / "data", 1), tmp_path / "page.html"
    arguments = ["--few-shot", "1", "--seeds", "1", "--ct-steps", "0", "--foreground", "all", "--threads", "1"]
    assert main(["eval", "--bundle", str(small), "--data", str(data), *arguments, "--report", str(page)]) == 0
    text = page.read_text()
    assert "Memory as enrolled" in text and "seed 0" in text and "stream with" not in text and "Calibrated" not in text


def copied(synthetic_data, data, defects):
    """The synthetic set's product with so many defective test images."""
    for split in ("train", "test"):
        shutil.copytree(synthetic_data / "grid" / split, data / "grid" / split)
    bad = sorted(p for p in (data / "grid/test").rglob("*.png") if p.parent.name != "good")
    for path in bad[defects:]:
        path.unlink()
    return data


@pytest.mark.parametrize(
    ("defects", "more", "why"),
    [
        (0, (), "0 defective test images where 1 are needed"),
        (1, ("--online", "0,0.1"), "1 defective test images where 2 are needed"),
    ],
)
def test_a_product_that_cannot_be_measured_is_refused_before_the_work(
    small, synthetic_data, tmp_path, monkeypatch, capsys, defects, more, why
):
    monkeypatch.chdir(tmp_path)
    data = copied(synthetic_data, tmp_path / "data", defects)
    monkeypatch.setattr("andon.runtime.commands.fewshot.FeatureCache", None)  # never reached
    arguments = ["eval", "--bundle", str(small), "--data", str(data), "--few-shot", "1", "--threads", "1", "--json"]
    assert main([*arguments, *more]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["found"] == f"grid: {why}"


def test_a_product_that_cannot_be_measured_is_left_out_and_nothing_is_written_unasked(
    small, synthetic_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    data = copied(synthetic_data, tmp_path / "data", 2)
    shutil.copytree(data / "grid" / "train", data / "plain" / "train")
    shutil.copytree(data / "grid" / "test" / "good", data / "plain" / "test" / "good")
    arguments = ["eval", "--bundle", str(small), "--data", str(data), "--few-shot", "1", "--seeds", "1"]
    arguments += ["--orders", "1", "--ct-steps", "0", "--foreground", "all", "--threads", "1", "--json"]
    assert main([*arguments, "--online", "0,0.2"]) == 0
    out = capsys.readouterr().out
    why = "0 defective test images where 2 are needed"
    assert f"warning: plain is left out: {why}" in out
    result = json.loads(out.splitlines()[-1])
    assert result["left_out"] == {"plain": why} and {r["product"] for r in result["records"]} == {"grid"}
    assert any(r["setting"].startswith("online") for r in result["records"])
    assert list((tmp_path / "docs").iterdir()) == []
