"""The `andon` command. Each subcommand's module is imported only when it is the one asked for."""

from __future__ import annotations

import argparse
import io
import json
import os
import select
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

#: name -> (module with `configure(parser)` and `main(args) -> dict`, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "record": ("andon.runtime.commands.record", "record pictures of parts from a line's cameras, to train on"),
    "train": ("andon.train.command", "train a method on images of good parts and write a checkpoint"),
    "enroll": ("andon.export.enroll", "make a bundle for a new product from 1 to 4 good images, no training"),
    "export": ("andon.export.command", "cut the newest checkpoint into verified ONNX stages and write a bundle"),
    "build": ("andon.runtime.commands.build", "build TensorRT engines from a bundle on this device"),
    "verify": ("andon.runtime.commands.verify", "replay a bundle's golden set and decisions on this machine's engines"),
    "calibrate": ("andon.runtime.commands.calibrate", "set the thresholds of a bundle from held-out good images"),
    "run": ("andon.runtime.commands.run", "run a line: cameras, verdicts, alarms, delivery over MQTT"),
    "check": ("andon.runtime.commands.check", "validate a line configuration and its bundle without running it"),
    "eval": ("andon.runtime.commands.eval", "run a data set through the engines and print the metrics"),
    "bench": ("andon.runtime.commands.bench", "measure latency per stage, executor overhead and ratio to torch"),
    "doctor": ("andon.runtime.commands.doctor", "say what this machine can do, what is missing and how to get it"),
    "watch": ("andon.runtime.commands.watch", "print verdicts, alarms and status as they arrive over MQTT"),
}
#: Packages that a device does without (the extra `workstation`)
WORKSTATION = ("torch", "torchvision", "timm", "onnx", "onnxslim", "safetensors", "PIL", "matplotlib")


#: As a shell reports a program that SIGPIPE ended.
_NOBODY_READS = 141


class _UsageError(Exception):
    """Wrong usage, already explained on stderr."""


class _Parser(argparse.ArgumentParser):
    """Leaves the exit to :func:`main`, which says wrong usage in JSON, too, where that was asked for."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise _UsageError(message)


def _parser(selected: str | None) -> argparse.ArgumentParser:
    from . import __version__

    parser = _Parser(prog="andon", description="Visual anomaly detection for the factory line.")
    parser.add_argument("--version", action="version", version=f"andon {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, help_line) in COMMANDS.items():
        sub = commands.add_parser(name, help=help_line, description=help_line)
        if name == selected:
            import_module(module).configure(sub)
            sub.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code 0 only on success, 1 on a refusal, failed gate or fault of ours, 2 on wrong usage, 130
    when it was interrupted, 141 when whoever read its output has gone (`andon watch | head`).
    """
    code = _main(argv)
    return code if _flushed() else _NOBODY_READS


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    selected = next((a for a in arguments if not a.startswith("-")), None)
    as_json = "--json" in arguments
    if isinstance(sys.stdout, io.TextIOWrapper):  # like stderr: a file name that is no UTF-8 must not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    from .runtime.errors import AndonError

    try:
        args = _parser(selected).parse_args(arguments)
        result: dict[str, Any] = import_module(COMMANDS[args.command][0]).main(args)
        said = json.dumps(result, default=str, allow_nan=False) if as_json else None
    except _UsageError as error:
        help_of = f"andon {selected} --help" if selected in COMMANDS else "andon --help"
        print(f"  next:     {help_of}", file=sys.stderr)
        return _failed(2, as_json, str(error), next_step=help_of)
    except AndonError as error:
        print(f"andon {selected}: {error}", file=sys.stderr)
        return _failed(1, as_json, error.what, error.found, error.expected, error.next_step)
    except OSError as error:  # a full disk, a folder without permission: the operator's to mend, not a traceback's
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return _NOBODY_READS
        refusal = AndonError("the operating system refuses", found=error, next_step="check path, permissions and space")
        print(f"andon {selected}: {refusal}", file=sys.stderr)
        return _failed(1, as_json, refusal.what, error, None, refusal.next_step)
    except ModuleNotFoundError as error:
        if (missing := (error.name or "").partition(".")[0]) not in WORKSTATION:
            return _unexpected(error, as_json)
        print(f"andon {selected}: {missing} is not installed; this command is the workstation's", file=sys.stderr)
        mend = (
            'pip install -e ".[workstation]" in Andon\'s sources, or run it on the workstation and copy the bundle here'
        )
        print(f"  next:     {mend}", file=sys.stderr)
        return _failed(1, as_json, f"{missing} is not installed", None, "the workstation's packages", mend)
    except KeyboardInterrupt:
        print(f"andon {selected}: interrupted", file=sys.stderr)
        return _failed(130, as_json, "interrupted")
    except Exception as error:  # noqa: BLE001 - a fault of ours: who waits for the JSON object learns of it there, too
        return _unexpected(error, as_json)
    if said is not None:
        print(said)
    return 0 if result.get("ok", True) else 1


def _flushed() -> bool:
    """Whether stdout took all that was printed. Where its reader has gone, what is left goes nowhere: the interpreter
    flushes again at its end, and would complain.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return False
    return True


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has gone; another broken pipe, to a broker, is worth a word."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # no file behind it
        return False
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _unexpected(error: Exception, as_json: bool) -> int:
    """Say a fault of Andon itself: the traceback on stderr, its last line in JSON; the exit code."""
    traceback.print_exception(error)
    what = f"unexpected {type(error).__name__}"
    return _failed(1, as_json, what, error, None, "report it with the traceback: it is a fault of Andon")


def _failed(
    code: int, as_json: bool, what: str, found: object = None, expected: object = None, next_step: str | None = None
) -> int:
    """Print a failure as the JSON object that was asked for; the exit code."""
    if as_json:
        said = {"found": found, "expected": expected, "next": next_step}
        print(json.dumps({"ok": False, "error": what, **{k: None if v is None else str(v) for k, v in said.items()}}))
    return code


if __name__ == "__main__":
    sys.exit(main())
