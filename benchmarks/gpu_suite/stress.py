"""The stress section of benchmarks/gpu.py: captures while a second thread uses the GPU.

The loop captures a CUDA graph for every number of slots while another thread asks for free memory, allocates,
loads a kernel and synchronizes, as the loader of an engine's next graph does: first under the lock that
keeps them apart, then without it, to see how often a capture fails on this driver. Either way the results
must be right.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from gpu_suite.device import steps_of_copies
from gpu_suite.setup import Report, Setup, absent_unless_there
from moesr.runtime.devices import cuda_driver, kernel_search
from moesr.runtime.devices.capture_lock import capture_lock
from moesr.runtime.devices.compiled_kernels import KernelFiles
from moesr.runtime.devices.cuda import CudaDevice
from moesr.runtime.devices.driver import Driver
from moesr.runtime.devices.host import HostDevice
from moesr.runtime.devices.loop_kernels import LoopKernels
from moesr.runtime.errors import MoesrError
from moesr.runtime.system.relative_error import relative_l2

SECONDS = 6.0
"""The length of each part."""


def measure_captures(setup: Setup, report: Report) -> None:
    """Capture under disturbance, with and without the lock; report failures of captures and wrong results."""
    absent_unless_there("cuda.core")
    side = setup.tile // 4
    want = steps_of_copies(HostDevice(), side)
    for locked in (True, False):
        name = "with the lock" if locked else "without the lock"
        rounds, errors, worst = 0, 0, 0.0
        with disturbed(locked) as count:
            end = time.monotonic() + min(SECONDS, report.left / 3)
            while rounds == 0 or time.monotonic() < end:
                got, failed = run_once(side)
                errors, rounds = errors + failed, rounds + 1
                worst = max(worst, *(relative_l2(got[what], want[what]) for what in want))
        report.check(f"captures {name}: results", worst, 1e-5)
        report.row(f"captures {name}", "rounds", float(rounds), "")
        report.row(f"captures {name}", "failed captures", float(errors), "")
        report.row(f"captures {name}", "disturbances", float(count()), "")
        if locked:
            report.check("captures with the lock: failures", float(errors), 0.0)


def run_once(side: int) -> tuple[dict[str, np.ndarray], int]:
    """Run a few steps on a new device, which captures anew; returns results and the failed captures."""
    driver = cuda_driver.CudaDriver(0)
    device = CudaDevice(driver, KernelFiles.of(kernel_search.SHIPPED, driver))
    failures = FailedCaptures()
    log, level = logging.getLogger("moesr"), logging.getLogger("moesr").level
    log.addHandler(failures)
    log.setLevel(logging.INFO)
    try:
        return steps_of_copies(device, side), failures.count
    finally:
        log.setLevel(level)
        log.removeHandler(failures)
        device.close()


class FailedCaptures(logging.Handler):
    """Counts the captures that a device reports as failed."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        self.count += record.msg.startswith("a CUDA graph was not captured")


@contextlib.contextmanager
def disturbed(locked: bool) -> Iterator[Callable[[], int]]:
    """Have a second thread use the GPU for the time of a `with` block; yields a count of its rounds."""
    stop, rounds = threading.Event(), [0]

    def disturb() -> None:
        other = cuda_driver.CudaDriver(0)
        try:
            while not stop.is_set():
                begun = time.monotonic()
                with contextlib.suppress(MoesrError):
                    other.free_bytes()  # any thread may ask at any time
                    with capture_lock if locked else contextlib.nullcontext():
                        load(other)
                rounds[0] += 1
                # A device captures only while the lock is free, so it is free for half of the time.
                stop.wait(time.monotonic() - begun)
        finally:
            other.close()

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    try:
        yield lambda: rounds[0]
    finally:
        stop.set()
        thread.join(30)


def load(driver: Driver) -> None:
    """Do what opening a graph does: allocate memory, load kernels, synchronize, free memory."""
    block = driver.alloc(8 << 20)
    files = KernelFiles(kernel_search.SHIPPED, driver)
    LoopKernels(files).step(block.address)
    driver.synchronize()
    driver.free(block)
