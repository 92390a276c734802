"""train/loop.py, sampler, weight average, resume file and features, on a toy method."""

from __future__ import annotations

import errno
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from andon.runtime import diskcache, images, preprocess
from andon.runtime.dataset import open_dataset
from andon.runtime.errors import ConfigError
from andon.train.errors import TrainingError
from andon.train.features import FeatureSet, extract, load_frame
from andon.train.loop import amp_dtype, fit, lr_factor, share_done
from andon.train.method import AnomalyModel, Schedule
from andon.train.resume import ResumeFile
from andon.train.sampler import BalancedSampler
from andon.train.weightaverage import WeightAverage

CPU = torch.device("cpu")


@pytest.fixture
def trainset(toy: ModuleType, synthetic_data: Path, tmp_path: Path) -> FeatureSet:
    samples = [s for s in open_dataset(synthetic_data).samples if s.split == "train"]
    return extract(toy.build(), samples, root=tmp_path, progress=False)


def run(model: AnomalyModel, data: FeatureSet, resume: ResumeFile | None = None) -> list[dict[str, float]]:
    records: list[dict[str, float]] = []
    fit(model, data, CPU, log=lambda r: records.append(dict(r)), resume=resume, progress=False)
    return records


# ---- features


def test_features_are_what_the_front_end_gives_and_are_cached(
    toy: ModuleType, synthetic_data: Path, tmp_path: Path
) -> None:
    model = toy.build()
    samples = [s for s in open_dataset(synthetic_data).samples if s.split == "train"]
    first = extract(model, samples, root=tmp_path, batch=5, progress=False)
    calls = toy.Patches.calls
    again = extract(model, samples, root=tmp_path, progress=False)
    assert toy.Patches.calls == calls, "the second time must come from the cache"
    frames = torch.from_numpy(np.stack([load_frame(s, model.preprocess) for s in samples]))
    expected = model.patches(frames)["patches"]
    for data in (first, again):
        assert torch.equal(torch.from_numpy(np.array(data.features["patches"])), expected)
        assert [model.classes[i] for i in data.class_ids] == [s.product for s in samples]
    batch = first.batch(np.array([7, 3]))
    assert torch.equal(batch.features["patches"], expected[[7, 3]]) and batch.images is None
    assert [len(b.indices) for b in first.batches(40)] == [40, 2]


def changed_source(module: ModuleType) -> Callable[[ModuleType], str]:
    """inspect.getsource as it would be were that module's code another."""
    real = inspect.getsource
    return lambda asked: real(asked) + ("#" if asked is module else "")


def test_cache_depends_on_images_code_and_weights(
    toy: ModuleType, synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [s for s in open_dataset(synthetic_data).samples if s.split == "train"][:4]

    def entries() -> int:
        return len([p for p in (tmp_path / "features").iterdir() if p.is_dir()])

    extract(toy.build(), samples, root=tmp_path, progress=False)
    assert entries() == 1
    extract(toy.build(), samples[::-1], root=tmp_path, progress=False)
    assert entries() == 2, "order"
    other = toy.build()
    other.patches.weight = torch.nn.Parameter(torch.zeros(1))
    extract(other, samples, root=tmp_path, progress=False)
    assert entries() == 3, "weights"
    other.patches.setting = 3
    extract(other, samples, root=tmp_path, progress=False)
    assert entries() == 4, "settings"
    for code in (images, preprocess):  # another version of Andon may read or resize otherwise
        with monkeypatch.context() as patch:
            patch.setattr(inspect, "getsource", changed_source(code))
            extract(other, samples, root=tmp_path, progress=False)
            assert entries() == (5 if code is images else 6)


def test_method_without_front_end_gets_images(toy: ModuleType, synthetic_data: Path, tmp_path: Path) -> None:
    class Plain(toy.Toy):  # type: ignore[misc, name-defined]
        frontend = None

    model = Plain(toy.config(), ("grain", "grid", "stripes"))
    samples = [s for s in open_dataset(synthetic_data).samples if s.split == "train"][:5]
    data = extract(model, samples, root=tmp_path, progress=False)
    batch = data.batch(np.array([2]))
    assert batch.features == {} and batch.images is not None and batch.images.dtype == torch.uint8
    assert np.array_equal(batch.images[0].numpy(), load_frame(samples[2], model.preprocess))


def test_second_process_waits_for_the_first(toy: ModuleType, synthetic_data: Path, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\nfrom pathlib import Path\n"
        "toy = runpy.run_path(sys.argv[1], run_name='toy')\n"
        "from andon.runtime.dataset import open_dataset\nfrom andon.train.features import extract\n"
        "samples = [s for s in open_dataset(sys.argv[2]).samples]\n"
        "extract(toy['build'](), samples, root=Path(sys.argv[3]), batch=4, progress=False)\n"
        "print(toy['Patches'].calls)\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).with_name("toy.py")), str(synthetic_data), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    calls = sorted(int(p.communicate()[0]) for p in both)
    assert calls[0] == 0 < calls[1], "one computes, the other reads"
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_a_full_disk_is_said_and_leaves_nothing_behind(
    toy: ModuleType, synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room is taken before the memory map is written into: there a full disk is a signal that ends the process."""

    def full(handle: int, offset: int, length: int) -> None:
        assert length == os.fstat(handle).st_size > 0
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    samples = [s for s in open_dataset(synthetic_data).samples if s.split == "train"][:4]
    with pytest.raises(TrainingError, match="cannot be written") as caught:
        extract(toy.build(), samples, root=tmp_path, progress=False)
    assert "No space left" in str(caught.value.found) and "ANDON_CACHE" in str(caught.value.next_step)
    assert not [p for p in (tmp_path / "features").iterdir() if p.is_dir()]


def entry_of(root: Path, name: str, days: float, size: int = 1000) -> Path:
    """A cache entry last used so many days ago."""
    entry = root / name
    entry.mkdir(parents=True)
    (entry / "patches.npy").write_bytes(b"x" * size)
    (entry / "index.json").write_text("{}")
    os.utime(entry / "index.json", (time.time() - days * 86400,) * 2)
    return entry


def test_the_cache_is_pruned_to_its_limit(
    toy: ModuleType,
    synthetic_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The longest unused first, never one in use, here or in another process; and it is said."""
    samples = [s for s in open_dataset(synthetic_data).samples if s.split == "train"][:4]
    root = tmp_path / "features"
    held = extract(toy.build(), samples, root=tmp_path, progress=False)
    (own,) = (p for p in root.iterdir() if p.is_dir())
    os.utime(own / "index.json", (0, 0))  # the longest unused of all, but in use
    used_elsewhere = entry_of(root, "elsewhere", 30)
    old, newer, newest = (entry_of(root, name, days) for name, days in (("old", 20), ("newer", 10), ("newest", 1)))
    (leftover := entry_of(root, "killed.tmp-1", 40)).joinpath("index.json").unlink()
    os.utime(leftover, (1, 1))
    code = "import fcntl, sys\nf = open(sys.argv[1], 'w')\nfcntl.flock(f, fcntl.LOCK_SH)\nprint(1, flush=True)\ninput()"
    lock = str(root / "elsewhere.lock")
    with subprocess.Popen(
        [sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "1\n"
        kept = sum(p.stat().st_size for e in (own, used_elsewhere, newest) for p in e.iterdir())
        monkeypatch.setenv("ANDON_CACHE_LIMIT", str(kept + 100))
        extract(toy.build(), samples, root=tmp_path, progress=False)  # nothing new, but the limit is
        other.communicate("\n")
    assert {p for p in root.iterdir() if p.is_dir()} == {own, used_elsewhere, newest}
    said = capsys.readouterr().err
    assert "3 unused entries of" in said and "ANDON_CACHE_LIMIT is" in said and str(root) in said
    assert np.array(held.features["patches"]).any(), "what is in use can still be read"
    del held
    monkeypatch.setenv("ANDON_CACHE_LIMIT", "0")
    extract(toy.build(), samples[::-1], root=tmp_path, progress=False)
    assert len([p for p in root.iterdir() if p.is_dir()]) == 1, "nobody uses the others any more"
    assert old.exists() is newer.exists() is False


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20 GB", 20 * 10**9), ("1.5tb", 15 * 10**11), ("500MB", 5 * 10**8), ("7", 7), ("off", None), ("", 20 * 10**9)],
)
def test_limit_of_the_cache(monkeypatch: pytest.MonkeyPatch, text: str, expected: int | None) -> None:
    monkeypatch.setenv("ANDON_CACHE_LIMIT", text)
    assert diskcache.limit() == expected


@pytest.mark.parametrize("text", ["much", "-1", "20 GiB", "nan"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ANDON_CACHE_LIMIT", text)
    with pytest.raises(ConfigError, match="ANDON_CACHE_LIMIT is not a size"):
        diskcache.limit()


# ---- sampler, schedule, average


def test_sampler_balances_products_and_visits_every_image() -> None:
    ids = np.array([0] * 5 + [1] * 30 + [2] * 13)
    sampler = BalancedSampler(ids, 8, seed=3)
    drawn = np.concatenate([sampler.indices(k) for k in range(60)])
    assert Counter(ids[drawn].tolist()) == {0: 160, 1: 160, 2: 160}
    assert set(drawn.tolist()) == set(range(48))
    mine = drawn[ids[drawn] == 1]
    assert len(set(mine[:30].tolist())) == 30, "a pass is a permutation"
    assert mine[:30].tolist() != mine[30:60].tolist(), "each pass another one"
    fresh = BalancedSampler(ids, 8, seed=3)
    assert np.array_equal(fresh.indices(41), sampler.indices(41)), "a step needs no history"
    assert not np.array_equal(BalancedSampler(ids, 8, seed=4).indices(41), sampler.indices(41))
    whole = BalancedSampler(ids, 16, seed=3)
    assert np.array_equal(whole.indices(5), np.concatenate([sampler.indices(10), sampler.indices(11)]))


def test_learning_rate_follows_steps_and_ends_with_the_clock() -> None:
    cosine = Schedule(steps=100, warmup=10, decay="cosine")
    assert lr_factor(cosine, 0, 0) == pytest.approx(1 / 11)
    assert lr_factor(cosine, 10, 0) == 1.0 and lr_factor(cosine, 55, 0) == pytest.approx(0.5)
    assert lr_factor(cosine, 99, 0) < 0.01
    step = Schedule(steps=100, decay="step:0.8:0.1")
    assert (lr_factor(step, 79, 0), lr_factor(step, 80, 0)) == (1.0, 0.1)
    assert lr_factor(Schedule(steps=10, decay="none"), 9, 0) == 1.0
    timed = Schedule(steps=100, decay="cosine", max_seconds=10)
    assert lr_factor(timed, 20, 1.9) == lr_factor(timed, 20, 0), "ahead of the clock: steps rule"
    assert lr_factor(timed, 20, 9.99) < 0.01, "behind the clock: the clock rules"
    assert (share_done(timed, 20, 1.9), share_done(timed, 20, 9.0), share_done(cosine, 20, 9.0)) == (0.2, 0.9, 0.2)
    inverse = Schedule(steps=100, decay="inverse:10:0.75")
    assert lr_factor(inverse, 0, 0) == 1.0 and lr_factor(inverse, 50, 0) == pytest.approx(6**-0.75)


def test_the_share_that_a_model_sees_never_falls_back(
    toy: ModuleType, trainset: FeatureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was behind the clock and catches up goes by its steps again, which are a smaller share."""
    model, shares, seen = toy.build(), iter([0.5, 0.1, 0.6]), []
    monkeypatch.setattr("andon.train.loop.share_done", lambda *_: next(shares, 0.7))
    step = model.training_step
    monkeypatch.setattr(model, "training_step", lambda *a: (seen.append(model.progress), step(*a))[1])
    monkeypatch.setattr("andon.train.loop.lr_factor", lambda *_: 1.0)
    model.progress = 0.9  # of a run before
    run(model, trainset)
    assert seen[:4] == [0.5, 0.5, 0.6, 0.7]


def test_amp_choice() -> None:
    assert amp_dtype("off", CPU) is None and amp_dtype("bf16", CPU) == torch.bfloat16
    assert amp_dtype("auto", CPU) in (None, torch.bfloat16)
    with pytest.raises(TrainingError, match="fp16"):
        amp_dtype("fp16", CPU)


def test_weight_average_is_the_recursion() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    model.register_parameter("frozen", torch.nn.Parameter(torch.ones(1), requires_grad=False))
    torch.nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(model, 0.5)
    expected = 1.0
    for t, value in enumerate([2.0, 4.0, 3.0], 1):
        torch.nn.init.constant_(model.weight, value)
        average.update(model)
        m = min(0.5, (1 + t) / (10 + t))
        expected = m * expected + (1 - m) * value
    average.copy_to(model)
    assert model.weight.item() == pytest.approx(expected) and model.frozen.item() == 1.0


# ---- the loop


def test_loss_falls_and_is_logged(toy: ModuleType, trainset: FeatureSet) -> None:
    model = toy.build()
    records = run(model, trainset)
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    assert records[-1]["step"] == 40 and {"lr", "seconds", "size", "running"} <= set(records[-1])
    assert model.center.shape == (48,), "prepare ran"


def test_averaged_weights_are_the_result(toy: ModuleType, trainset: FeatureSet) -> None:
    averaged, plain = toy.build(), toy.build(ema=None)
    run(averaged, trainset)
    run(plain, trainset)
    assert not torch.equal(averaged.decode.weight, plain.decode.weight)
    assert torch.equal(averaged.running, plain.running), "the path of training is the same"


def test_no_steps_only_prepares(toy: ModuleType, trainset: FeatureSet) -> None:
    model = toy.build(steps=0)
    before = model.encode.weight.clone()
    run(model, trainset)
    assert model.center.shape == (48,) and torch.equal(before, model.encode.weight)


def test_time_limit_ends_the_run(toy: ModuleType, trainset: FeatureSet) -> None:
    model = toy.build(steps=10**6, max_seconds=1.0)
    fitted = fit(model, trainset, CPU, log=lambda _: None, progress=False)
    assert fitted.stopped_early and 0 < fitted.steps < 10**6 and fitted.seconds >= 1
    assert fitted.last["lr"] < 0.2 * model.config.schedule.lr, "the schedule came to its end"


def test_loss_that_is_not_a_number_stops(toy: ModuleType, trainset: FeatureSet) -> None:
    model = toy.build()
    with torch.no_grad():
        model.decode.bias[0] = float("nan")
    with pytest.raises(TrainingError, match="not finite at step 0") as caught:
        run(model, trainset)
    assert "schedule.lr" in str(caught.value.next_step)


# ---- resume


class Killed(Exception):
    """Stands for the end of the process."""


def interrupted(toy: ModuleType, data: FeatureSet, path: Path, at: int, noise: float = 0.1) -> None:
    """Train with a save after every step and stop in the middle of step `at`."""
    model = toy.build()
    model.noise = noise
    step = model.training_step

    def stop(batch: object, number: int) -> object:
        if number == at:
            raise Killed
        return step(batch, number)

    model.training_step = stop
    with pytest.raises(Killed):
        run(model, data, ResumeFile(path, "r", every=0))


def test_resumed_run_equals_an_uninterrupted_one(toy: ModuleType, trainset: FeatureSet, tmp_path: Path) -> None:
    whole = toy.build()
    whole.noise = 0.1
    run(whole, trainset)
    interrupted(toy, trainset, tmp_path / "resume.pt", at=23)
    rest = toy.build()
    rest.noise = 0.1
    torch.manual_seed(99)  # a new process has other random state
    records = run(rest, trainset, ResumeFile(tmp_path / "resume.pt", "r", every=1e9))
    assert (records[0]["step"], records[0]["resumed"]) == (23, 1.0)
    assert records[1]["step"] == 24
    for (name, a), b in zip(whole.state_dict().items(), rest.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7, msg=name)


def test_resume_file_of_another_run_or_torn_is_refused(toy: ModuleType, trainset: FeatureSet, tmp_path: Path) -> None:
    path = tmp_path / "resume.pt"
    interrupted(toy, trainset, path, at=3)
    with pytest.raises(TrainingError, match="of another run"):
        run(toy.build(), trainset, ResumeFile(path, "other"))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(TrainingError, match="cannot read"):
        run(toy.build(), trainset, ResumeFile(path, "r"))


def andon_train(folder: Path, data: Path, *extra: str) -> list[str]:
    settings = ("backbone.weights=random:0", "schedule.steps=24", "schedule.warmup=2", "schedule.ema=0.9")
    settings += ("augment.images=0",)
    sets = [part for s in settings for part in ("--set", s)]
    common = ["--method", "hvq", "--data", str(data), "--out", str(folder), "--no-eval", "--save-every", "0.05"]
    return [sys.executable, "-m", "andon.train", *common, *sets, *extra]


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_weights(synthetic_data: Path, tmp_path: Path) -> None:
    """SIGKILL a real `andon train` after its first save; --resume ends where an undisturbed run does."""
    from safetensors.torch import load_file

    subprocess.run(andon_train(tmp_path / "whole", synthetic_data), check=True, capture_output=True)
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        andon_train(cut, synthetic_data), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    until = time.monotonic() + 120
    while not (cut / "resume.pt").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (cut / "resume.pt").exists() and not (cut / "model.safetensors").exists()
    done = subprocess.run(
        [sys.executable, "-m", "andon.train", "--resume", str(cut)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (cut / "resume.pt").exists() and not (cut / "run.json").exists()
    steps = [line for line in (cut / "log.jsonl").read_text().splitlines() if '"step": 24,' in line]
    assert len(steps) == 1
    whole, resumed = load_file(tmp_path / "whole/model.safetensors"), load_file(cut / "model.safetensors")
    assert set(whole) == set(resumed)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5, msg=name)


# ---- several processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
def test_two_processes_equal_one_with_the_whole_batch(synthetic_data: Path, tmp_path: Path) -> None:
    toy_script = Path(__file__).with_name("toy.py")
    single, double = tmp_path / "one.pt", tmp_path / "two.pt"
    subprocess.run([sys.executable, toy_script, synthetic_data, single, "8", "40"], check=True, capture_output=True)
    subprocess.run([*TORCHRUN, toy_script, synthetic_data, double, "4", "40"], check=True, capture_output=True)
    (one,) = torch.load(single, weights_only=True)
    first, second = torch.load(double, weights_only=True)
    for name, value in one.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=f"ranks differ: {name}")
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_codebooks_over_two_processes_equal_those_of_one(synthetic_data: Path, tmp_path: Path) -> None:
    """`andon train` of hvq under torchrun: gradients averaged, per-class statistics summed, prepare broadcast."""
    from safetensors.torch import load_file

    sets = ("--set", "schedule.steps=8", "--set", "schedule.amp=off")
    one = andon_train(tmp_path / "one", synthetic_data, *sets, "--set", "schedule.batch=6")
    two = andon_train(tmp_path / "two", synthetic_data, *sets, "--set", "schedule.batch=3")
    subprocess.run(one, check=True, capture_output=True)
    subprocess.run([*TORCHRUN, *two[1:]], check=True, capture_output=True)
    single, double = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert json.loads((tmp_path / "two" / "provenance.json").read_text())["processes"] == 2
    for name, value in single.items():
        torch.testing.assert_close(double[name], value, rtol=1e-2, atol=1e-3, msg=name)
