"""Upscalers in processes that fork: a child gets an error with advice, or works, and it always ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import build_engine

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

SETUP = """
import gc, os, sys, threading, time, warnings
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
import numpy as np
from moesr.runtime import Upscaler, UsageError
warnings.simplefilter("ignore")
engine, threads = sys.argv[1], int(sys.argv[2])
image = np.zeros((8, 8, 3), np.uint8)

def use():
    try:
        up(image, steps=1)
    except UsageError as error:
        assert "open an Upscaler in each process" in str(error), error
    else:
        raise AssertionError("the child worked with its parent's threads")

def child(work, code):
    pid = os.fork()
    if pid == 0:
        work()
        sys.exit(code)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == code, (work, status)
            return
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError(f"the child hangs in {work}")
"""

CASES = {
    "nothing": "up(image, steps=1); child(lambda: None, 3)",
    "use": "up(image, steps=1); child(use, 4)",
    "submit and map": """
up(image, steps=1)
def work():
    for call in (lambda: up.submit(image), lambda: next(up.map([image]))):
        try:
            call()
        except UsageError:
            continue
        raise AssertionError
child(work, 0)
""",
    "close": "up(image, steps=1); child(lambda: (up.close(), up.close()), 5)",
    "collect": """
up(image, steps=1)
def work():
    global up
    del up
    gc.collect()
child(work, 6)
""",
    "another": """
up(image, steps=1)
def work():
    with Upscaler(engine, backend="onnxruntime", threads=threads) as other:
        assert other(image, steps=1).shape == (32, 32, 3)
child(work, 7)
""",
    "before use": "child(lambda: up(image, steps=1), 8); up(image, steps=1)",
    "closed before": "up(image, steps=1); up.close(); child(lambda: None, 9)",
    "a handle in flight": """
handle = up.submit(np.zeros((64, 64, 3), np.uint8), steps=1000)
while not handle.progress.fraction:
    time.sleep(0.01)
def work():
    assert isinstance(handle.exception(5), UsageError)
    handle.cancel(), handle.progress
    use()
child(work, 0)
assert not handle.done()
handle.cancel()
""",
    "process pool": """
up(image, steps=1)
with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
    pool.submit(use).result(30)
""",
    "grandchild": """
up(image, steps=1)
child(lambda: child(use, 2), 3)
""",
    "many threads": """
stop = threading.Event()
def work():
    while not stop.is_set():
        up(image, steps=2)
threads_at_work = [threading.Thread(target=work) for _ in range(3)]
for thread in threads_at_work:
    thread.start()
time.sleep(0.5)
for _ in range(5):
    child(use, 1)
stop.set()
""",
}


CASE = """
print({name!r}, file=sys.stderr)
up = Upscaler(engine, backend="onnxruntime", threads=threads)
{text}
up.close()
del up
gc.collect()
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_fork(tmp_path: Path, threads: int):
    """All cases run in one process, as starting one takes longer than a case.

    The last name printed has failed.
    """
    text = "".join(CASE.format(name=name, text=text) for name, text in CASES.items())
    script = tmp_path / "script.py"
    script.write_text(SETUP + text)
    command = [sys.executable, str(script), str(build_engine(tmp_path / "engine")), str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


def test_openvino_is_refused_after_a_fork(tmp_path: Path):
    """In a child it would wait for its threads for ever if the parent had closed a graph."""
    pytest.importorskip("openvino")
    engine = build_engine(tmp_path / "engine")
    text = """
from moesr.runtime import EngineError
up = Upscaler(engine, backend="openvino", threads=threads)
up(image, steps=1)
up.close()
def work():
    try:
        Upscaler(engine, backend="openvino", threads=threads)(image, steps=1)
    except EngineError as error:
        assert "forked" in str(error) and "spawn" in str(error), error
        os._exit(0)
    raise AssertionError
child(work, 0)
"""
    script = tmp_path / "script.py"
    script.write_text(SETUP + text)
    command = [sys.executable, str(script), str(engine), "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
