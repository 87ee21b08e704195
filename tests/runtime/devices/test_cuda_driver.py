"""`cuda_driver` over a fake driver library that logs all calls."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moesr.runtime.devices import cuda_driver
from moesr.runtime.errors import EngineError

SOURCE = Path(__file__).parents[2] / "assets" / "fake_cuda.c"
PROGRAM = """
import importlib, sys, threading
import numpy as np
from moesr.runtime.devices.cuda_driver import CudaDriver
from moesr.runtime.errors import EngineError, MemoryLimitError

def say(*words):
    print(*words, file=sys.stderr, flush=True)

driver = CudaDriver(0)
say(driver.name, driver.capability)
block = driver.alloc(1000)
say(block.address % 256, block.nbytes)
pinned = driver.pinned(1000)
pinned[:] = np.arange(1000) % 251
driver.copy_in(block.address, pinned)
driver.clear(block.address + 300, 20)
driver.copy(block.address, block.address + 500, 4)
got = np.empty(500, np.uint8)
driver.copy_out(got, block.address + 250)
want = np.arange(250, 750) % 251
want[50:70] = 0
say("copied", (got == want).all())
kernel = driver.load(b"ELF", "step", 100 * 1024)
driver.load(b".version", "text", 0, True)
arguments = np.uint64(block.address), np.int32(-7), np.float32(2.5)
four = np.array([42, 0, 0, 0], np.uint8)
driver.copy_in(block.address, four)
driver.launch(kernel, (3, 2, 1), 128, 100 * 1024, arguments)
driver.wait(driver.record())
driver.wait_for(7)
driver.signal(7)
driver.begin_capture()
driver.launch(kernel, (3, 2, 1), 64, 0, arguments)
graph = driver.end_capture()
driver.replay(graph)
driver.replay(graph)
driver.begin_capture()
driver.abandon_capture()
cuda = importlib.import_module("cuda.bindings.driver")
cuda.cuCtxSetCurrent(cuda.CUcontext(7))  # the caller uses another GPU
say(driver.free_bytes(), "free")
driver.clear(block.address, 4)

def fails(call):
    try:
        call()
    except (EngineError, MemoryLimitError) as error:
        text = str(error)
        say(type(error).__name__, text.partition(" (")[0] + "AGAIN" * ("so start it again" in text))

fails(lambda: driver.alloc(1 << 31))
fails(lambda: driver.load(b"bad", "step", 0))
driver.begin_capture()
fails(lambda: driver.launch(kernel, (3, 2, 1), 13, 0, arguments))
fails(driver.end_capture)
driver.begin_capture()
driver.abandon_capture()
cuda.cuStreamBeginCapture(driver.stream, cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
for _ in range(3):  # one after the other, so that they have the same number
    thread = threading.Thread(target=lambda: say(driver.free_bytes(), "free during a capture"))
    thread.start()
    thread.join()
fails(driver.begin_capture)
say(cuda.cuStreamEndCapture(driver.stream)[0].name)
driver.launch(kernel, (4, 2, 1), 64, 0, arguments)
driver.launch(kernel, (1, 1, 1), 66, 0, arguments)
driver.free(block)
fails(lambda: driver.alloc(8))
say(driver.free_bytes(), "free when last asked")
driver.close()
"""
WANT = """
current
Fake GPU 89
alloc 1000
0 1000
pinned 1000
copy 1000
clear 20
copy 4
copy 500
sync
copied True
kernel step
attribute 8 = 102400
kernel text
copy 4
launch 3 2 1, 128 threads, 102400 bytes: 42 -7 2.5
event
wait
event
the stream waits
event
another stream waits
capture 2
launch 3 2 1, 64 threads, 0 bytes: 42 -7 2.5
end
replay
replay
capture 2
end
foreign
current
foreign
1002000 free
current
clear 4
MemoryLimitError no 2.1 GB free on Fake GPU
EngineError step: the driver does not accept this kernel
capture 2
EngineError a kernel could not be launched
end
end
EngineError a CUDA graph could not be captured; run with --no-cuda-graphs
capture 2
end
capture 0
current
none
1002000 free during a capture
current
none
1002000 free during a capture
current
none
1002000 free during a capture
EngineError a CUDA graph could not be captured; run with --no-cuda-graphs
end
CUDA_SUCCESS
launch 4 2 1, 64 threads, 0 bytes: 0 -7 2.5
launch 1 1 1, 66 threads, 0 bytes: 0 -7 2.5
free
EngineError the GPU failedAGAIN
current
current
1002000 free when last asked
current
sync
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the fake driver is a Linux library")
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler for the fake driver")
def test_calls_to_the_driver(tmp_path):
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        pytest.skip("cuda-core is not installed")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-w", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith(WANT.lstrip()), result.stderr


def test_missing_gpu_is_named():
    with pytest.raises(EngineError, match=r"no GPU cuda:99 \(.*nvidia-smi|cuda-core does not load \(.*pip"):
        cuda_driver.open_device(99)


def test_an_old_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(__version__="0.3.2"))
    with pytest.raises(EngineError, match=r"cuda-core 0\.3\.2 is too old; .*--upgrade 'moesr\[cuda\]'"):
        cuda_driver.open_device(0)


def test_missing_library_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(EngineError, match=r"cuda-core does not load .*pip install 'moesr\[cuda\]'"):
        cuda_driver.library()
