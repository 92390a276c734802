"""docs/results.json: merge by key, refuse incomplete records, keep the file on refusal."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
from andon.runtime.errors import ConfigError
from andon.runtime.results import load_results, merge_results


def record(**changes):
    base = {
        "method": "knn",
        "set": "elpv",
        "product": "mono",
        "shots": 1,
        "seed": 0,
        "metric": "image_auroc",
        "value": 0.8,
        "command": "andon eval",
    }
    return {**base, **changes}


def test_newer_value_of_the_same_key_replaces_the_older(tmp_path):
    path = tmp_path / "docs" / "results.json"
    merge_results(path, [record(), record(shots=2)])
    merge_results(path, [record(value=0.9, command="again")])
    records = load_results(path)
    assert len(records) == 2
    assert {(r["shots"], r["value"]) for r in records} == {(1, 0.9), (2, 0.8)}


def test_setting_is_part_of_the_key(tmp_path):
    path = tmp_path / "results.json"
    merge_results(path, [record(), record(setting="online"), record(setting="frozen")])
    assert len(load_results(path)) == 3


@pytest.mark.parametrize("bad", [{"value": float("nan")}, {"value": None}, {"value": True}, {"value": "0.9"}])
def test_a_value_that_is_no_number_is_refused_and_the_file_stays(tmp_path, bad):
    path = tmp_path / "results.json"
    merge_results(path, [record()])
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="finite"):
        merge_results(path, [record(seed=1), record(**bad)])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_missing_field_is_named(tmp_path):
    incomplete = record()
    del incomplete["command"]
    with pytest.raises(ConfigError, match="add command"):
        merge_results(tmp_path / "results.json", [incomplete])


def test_a_broken_file_is_refused_not_overwritten(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("[{")
    with pytest.raises(ConfigError, match="not JSON"):
        merge_results(path, [record()])
    assert path.read_text() == "[{"


def test_processes_that_merge_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "results.json"
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(merge_results, path, [record(seed=seed)]) for seed in range(24)]:
            future.result()
    assert {r["seed"] for r in load_results(path)} == set(range(24))


def test_the_lock_is_not_held_while_the_records_are_made(tmp_path):
    path = tmp_path / "results.json"

    def slow():
        merge_results(path, [record(seed=1)])  # as another process would, while this one trains
        yield record(seed=2)

    assert len(merge_results(path, slow())) == 2
