"""What a process says about itself: its own memory, not what exec hands on from the parent (ru_maxrss does that)."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from collections.abc import Iterator

import pytest
from andon.runtime.process import resident_memory

REPORT = "import json; from andon.runtime.process import resident_memory; print(json.dumps(resident_memory()))"
LARGE = 300 << 20


def child(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def large_parent() -> Iterator[None]:
    with mmap.mmap(-1, LARGE) as block:
        for page in range(0, LARGE, mmap.PAGESIZE):
            block[page] = 1
        yield


def test_a_child_of_a_large_process_reports_its_own_memory(large_parent: None) -> None:
    assert resident_memory()["resident"] > LARGE / 1e6, "the parent is large"
    mine = json.loads(child(REPORT))
    assert 0 < mine["resident"] <= mine["peak"] < 100


def test_the_peak_outlives_what_caused_it() -> None:
    script = f"block = bytearray(b'1') * {LARGE}; del block; {REPORT}"
    mine = json.loads(child(script))
    assert mine["peak"] > LARGE / 1e6 > mine["resident"]


ARENAS = """
import ctypes, threading
from andon.runtime.process import limit_arenas
print(limit_arenas())
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
together = threading.Barrier(16)
def work():
    together.wait()
    for _ in range(1000):
        libc.malloc(ctypes.c_size_t(5000))
threads = [threading.Thread(target=work) for _ in range(16)]
[t.start() for t in threads]; [t.join() for t in threads]
libc.malloc_info(0, ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w")))
"""


def test_threads_share_two_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    taken, _, info = child(ARENAS + "libc.fflush(None)").partition("\n")
    assert taken == "True" and 1 <= info.count("<heap nr=") <= 2
    monkeypatch.setenv("MALLOC_ARENA_MAX", "6")
    taken, _, info = child(ARENAS + "libc.fflush(None)").partition("\n")
    assert taken == "False" and 2 < info.count("<heap nr=") <= 6, "the environment decides"
