"""What holds for every command: help without the workstation's libraries, and refusals as exit code and JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from andon import cli


def last_line(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_imports_no_heavy_library(command: str) -> None:
    code = (
        "import sys\nfrom andon import cli\n"
        "try: cli.main([sys.argv[1], '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'torchvision', 'timm', 'onnx', 'onnxruntime', 'sklearn', 'scipy', 'matplotlib'}\n"
        "if sys.argv[1] in ('run', 'check', 'doctor', 'watch'): heavy |= {'numpy', 'cv2'}\n"  # used at the line
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--json" in done.stdout


def test_no_command_that_is_told_has_a_placeholder_that_a_shell_redirects() -> None:
    """`andon export --method <method>`, pasted, is a syntax error."""
    root = Path(cli.__file__).parent
    files = [
        root / "cli.py",
        *(p for side in ("calib", "runtime", "train", "export") for p in (root / side).rglob("*.py")),
    ]
    assert len(files) > 100
    found = [f"{p}: {line}" for p in files for line in re.findall(r"andon [a-z]+ [^`\n]*<[a-z].*", p.read_text())]
    assert found == []


@pytest.mark.parametrize("command", [*cli.COMMANDS, "nosuch"])
def test_wrong_usage_is_said_in_json_too(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--nosuch", "--json"]) == 2
    captured = capsys.readouterr()
    said = last_line(captured.out)
    assert said["ok"] is False and said["next"].startswith("andon ") and said["next"].endswith("--help")
    assert "usage: andon" in captured.err and said["error"] in captured.err
    assert f"next:     {said['next']}" in captured.err


@pytest.mark.parametrize(
    "line",
    [
        "run --config line.yaml --max-frames 0",
        "run --config line.yaml --max-frames -1",
        "run --config line.yaml --threads 0",
        "bench --bundle b --frames 0",
        "bench --bundle b --frames -3",
        "bench --bundle b --warmup -1",
        "bench --bundle b --threads -1",
        "build --bundle b --workspace 0",
        "build --bundle b --dla-core -1",
        "build --bundle b --optimization-level 6",
        "eval --bundle b --data elpv --limit 0",
        "eval --all elpv --study-seeds 0",
        "eval --bundle b --data elpv --few-shot 0,1",
        "eval --bundle b --data elpv --few-shot 1 --seeds 0",
        "eval --bundle b --data elpv --few-shot 1 --orders 0",
        "eval --bundle b --data elpv --few-shot 1 --ct-steps -1",
        "eval --bundle b --data elpv --few-shot 1 --online 1.5",
        "eval --bundle b --data elpv --few-shot 1 --online nan",
        "enroll --support s --shots 0",
        "enroll --support s --seed -1",
        "enroll --support s --threads x",
        "export --method knn --threads -1",
        "train --method knn --data elpv --seed -1",
        "train --method knn --data elpv --save-every -1",
        "train --method knn --data elpv --save-every inf",
        "record --config line.yaml --out s/p/good --count 0",
        "record --config line.yaml --out s/p/good --every -1",
        "record --config line.yaml --out s/p/good --seconds inf",
        "record --config line.yaml --out s/p/good --max-bytes 0",
        "record --config line.yaml --out s/p/good --max-bytes 3q",
        "watch --broker h:1 --count 0",
        "watch --broker h:1 --wait -1",
        "watch --broker h:1 --timeout nan",
    ],
)
def test_a_number_that_means_nothing_is_wrong_usage(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*line.split(), "--json"]) == 2
    said = last_line(capsys.readouterr().out)
    assert said["ok"] is False and f"argument {line.split()[-2]}" in said["error"]


def test_bench_delivery_refuses_options_that_it_would_not_heed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("andon.runtime.commands.bench._delivery", lambda: {"ok": True})
    assert cli.main(["bench", "--delivery", "--json"]) == 0
    capsys.readouterr()
    assert cli.main([*["bench", "--delivery", "--bundle", "b", "--frames", "7", "--no-torch", "--json"]]) == 1
    said = last_line(capsys.readouterr().out)
    assert said["found"] == "--delivery and --bundle, --frames, --no-torch" and "cannot be heeded" in said["error"]


@pytest.mark.parametrize("port", ["99999", "0", "-1", "\u00b2"])
@pytest.mark.parametrize("command", ["watch", "doctor"])
def test_a_port_that_cannot_be_is_refused(command: str, port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--broker", f"127.0.0.1:{port}", "--json"]) == 1
    said = last_line(capsys.readouterr().out)
    assert said["found"] == f"127.0.0.1:{port}" and said["expected"].startswith("HOST:PORT")


@pytest.mark.parametrize("result", [{"ok": True, "value": float("nan")}, None], ids=["no JSON of it", "an exception"])
def test_a_fault_of_ours_is_said_in_json_with_the_traceback_on_stderr(
    result: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(args: object) -> dict[str, Any]:
        if result is None:
            raise IndexError("list index out of range")
        return result

    monkeypatch.setattr("andon.runtime.commands.doctor.main", main)
    assert cli.main(["doctor", "--json"]) == 1
    captured = capsys.readouterr()
    said = last_line(captured.out)
    assert said["ok"] is False and said["error"] == ("unexpected ValueError" if result else "unexpected IndexError")
    assert "Traceback" in captured.err and str(said["found"]) in captured.err


def test_a_refusal_has_what_found_expected_and_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--config", str(tmp_path / "line.yaml"), "--json"]) == 1
    said = last_line(capsys.readouterr().out)
    assert set(said) == {"ok", "error", "found", "expected", "next"} and all(v is not None for v in said.values())


@pytest.mark.parametrize("arguments", [["train", "--method", "knn", "--data", "elpv"], ["export", "--method", "knn"]])
def test_on_a_device_the_workstations_commands_say_what_is_missing(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom andon import cli\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in cli.WORKSTATION:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "sys.exit(cli.main([*sys.argv[1:], '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert 'pip install -e ".[workstation]"' in last_line(done.stdout)["next"] and "is not installed" in done.stderr


def test_a_path_that_is_no_utf8_is_printed_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = tmp_path / "line.yaml"
    line.write_text("{site: s, line: l, station: t, broker: null, cameras: {cam0: {source: {kind: test}}}}")
    assert cli.main(["check", "--config", str(line), "--bundle", str(tmp_path / "Geh\udce4use")]) == 1
    assert "there is no bundle at" in (said := capsys.readouterr().out) and "Geh" in said


def test_the_operating_systems_refusal_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    arguments = ["train", "--method", "knn", "--data", "elpv", "--out", str(tmp_path / "file" / "run"), "--json"]
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert last_line(captured.out)["ok"] is False and "Not a directory" in captured.err


@pytest.mark.parametrize("flush", [True, False], ids=["at a print", "at the end"])
def test_a_reader_that_has_gone_is_no_fault(flush: bool) -> None:
    """`andon watch | head`: nothing is wrong with path, permissions or space."""
    code = (
        "import sys\nfrom andon import cli\nfrom andon.runtime.commands import doctor\n"
        f"doctor.main = lambda args: print('fine', flush={flush}) or {{'ok': True}}\n"
        "sys.exit(cli.main(['doctor', '--json']))"
    )
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as output:
        done = subprocess.run([sys.executable, "-c", code], stdout=output, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_elsewhere_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def main(args: object) -> dict[str, Any]:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("andon.runtime.commands.doctor.main", main)
    assert cli.main(["doctor"]) == 1 and "Broken pipe" in capsys.readouterr().err
