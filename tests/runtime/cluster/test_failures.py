"""Workers, nodes, stores, files and disks that fail in the middle of a run: nothing is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cluster_rig import LEDGER, WORKER, has_results, kill_a_worker, picture, pids_of, tree, when
from PIL import Image

from moesr.runtime import Upscaler
from moesr.runtime.cluster.worker import SCRATCH
from moesr.runtime.images import provenance

NAMES = [f"{k}.png" for k in range(8)]
SLOWLY = ("--steps", "250")


def check_whole(made, target: Path, names: list[str] = NAMES) -> None:
    """Check that every input has one line and one complete result."""
    assert made.code == 0
    assert {name: line["status"] for name, line in made.lines.items()} == dict.fromkeys(names, "done")
    assert tree(target) == [f"{Path(name).stem}_x4.png" for name in names]
    assert all(provenance.is_whole(target / name) for name in tree(target))


@pytest.mark.slow
def test_killed_worker(bucket, moesr):
    source, target = bucket(*NAMES), bucket()

    with when(has_results(target), kill_a_worker) as killed:
        made = moesr(f"s3://{source.name}", "-o", f"s3://{target.name}", "--workers", "1", *SLOWLY)
    assert killed
    check_whole(made, target)
    warnings = [warning for line in made.lines.values() for warning in line["warnings"]]
    assert any("a worker died during this work; attempt 2" in warning for warning in warnings)


@pytest.mark.slow
def test_removed_node(bucket, moesr, nodes):
    source, target = bucket(*NAMES), bucket()
    try:
        with when(has_results(target, 2), nodes.remove) as removed:
            made = moesr(f"s3://{source.name}", "-o", f"s3://{target.name}", "--workers", "2", *SLOWLY)
        assert removed == [None]
        check_whole(made, target)
    finally:
        nodes.restore()


@pytest.mark.slow
def test_workers_killed_while_they_start(bucket, moesr):
    """They are replaced, though none of them has opened the engine."""
    source, target = bucket(*NAMES), bucket()
    killed: set[int] = set()

    def kill_the_first_three() -> bool:
        for pid in {*pids_of(WORKER)} - killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        return len(killed) >= 3

    with when(kill_the_first_three, lambda: None):
        made = moesr(f"s3://{source.name}", "-o", f"s3://{target.name}", "--workers", "1")
    assert len(killed) >= 3
    check_whole(made, target)
    assert not any(line["warnings"] for line in made.lines.values())


@pytest.mark.slow
def test_killed_ledger(bucket, moesr):
    """Its successor knows no attempts and no counts, and the report is complete all the same."""
    source, target = bucket(*NAMES), bucket()

    def kill() -> list[int]:
        pids = pids_of(LEDGER)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return pids

    with when(has_results(target, 2), kill) as killed:
        made = moesr(f"s3://{source.name}", "-o", f"s3://{target.name}", "--workers", "1", *SLOWLY)
    assert len(killed[0]) == 1
    check_whole(made, target)


@pytest.mark.slow
def test_workers_killed_at_random_moments(bucket, moesr, cluster_engine):
    """Five kills in thirty images: nothing is lost, and every result is that of an undisturbed run."""
    names, draw = [f"{k:02}.png" for k in range(30)], random.Random()
    source, target, over = bucket(*names), bucket(), threading.Event()
    killed: list[int] = []

    def kill_five() -> None:
        while len(killed) < 5 and not over.wait(draw.uniform(0, 2)):
            pids = pids_of(WORKER)
            if pids and has_results(target, 4 * len(killed))():
                killed.append(draw.choice(pids))
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_five)
    killer.start()
    try:
        made = moesr(f"s3://{source.name}", "-o", f"s3://{target.name}", "--workers", "1", "--steps", "100")
    finally:
        over.set()
        killer.join()
    assert len(killed) == 5
    check_whole(made, target, names)
    with Upscaler(cluster_engine, backend="onnxruntime", threads=1) as local:
        for name in names:
            expected = local(np.asarray(Image.open(source / name)), steps=100)
            result = np.asarray(Image.open(target / f"{name.removesuffix('.png')}_x4.png"))
            np.testing.assert_array_equal(result, expected, err_msg=name)


@pytest.mark.slow
def test_store_that_answers_503_for_a_while(bucket, moesr, s3):
    source, target = bucket(*NAMES), bucket()
    s3.proxy.refuse_after_next_put(8)
    made = moesr(f"s3://{source.name}", "-o", f"s3://{target.name}", "--workers", "1", "--steps", "5")
    assert s3.proxy.refused == 8
    check_whole(made, target)


@pytest.mark.slow
def test_input_that_always_ends_its_worker(bucket, moesr):
    """It fails after three attempts, and no other input is blamed."""
    source, target = bucket("0.png", "1.png", "3.png"), bucket()
    picture(source / "2.png", 60, 60)  # its work takes long enough for the test to act meanwhile
    over = []

    def kill_whoever_works_at_it() -> bool:
        for pid in pids_of(WORKER):
            with contextlib.suppress(OSError):
                if any(SCRATCH.glob(f".moesr-*-{pid}-*.tmp/in/2.png")):
                    os.kill(pid, signal.SIGKILL)
                    time.sleep(0.2)
        return bool(over)

    with when(kill_whoever_works_at_it, lambda: None):
        made = moesr(f"s3://{source.name}", "-o", f"s3://{target.name}", "--workers", "1", "--steps", "1000")
        over.append(True)
    assert made.code == 1
    assert "its worker died 3 times" in made.lines.pop("2.png")["error"]
    assert {line["status"] for line in made.lines.values()} == {"done"} and len(made.lines) == 3


@pytest.mark.slow
def test_a_run_that_is_terminated(bucket, nodes, cluster_engine):
    """It exits as a local run does, and what is done stays."""
    source, target = bucket(*NAMES), bucket()
    places = f"s3://{source.name}", "-o", f"s3://{target.name}", "--ray", nodes.address, "--workers", "1"
    command = [
        sys.executable,
        "-m",
        "moesr.runtime.cli.run",
        "--engine",
        str(cluster_engine),
        *places,
        *SLOWLY,
    ]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with when(has_results(target, 2), run.terminate) as stopped:
        said = run.communicate(timeout=120)[1]
    assert stopped and run.returncode == 143
    assert "ended by SIGTERM; finished results are kept" in said and "Traceback" not in said
    assert all(provenance.is_whole(target / name) for name in tree(target))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_full_disk(bucket, moesr, small_disk):
    """Results that do not fit are reported; when there is room, a second run makes them."""
    source = bucket("0.png", "1.png", "2.png", "3.png", size=(40, 40))
    arguments = f"s3://{source.name}", "-o", small_disk / "out", "--workers", "1"
    (small_disk / "ballast").write_bytes(bytes(20_000))
    made = moesr(*arguments)
    statuses = [line["status"] for line in made.lines.values()]
    assert made.code == 1 and "failed" in statuses
    for line in made.lines.values():
        assert line["status"] == "done" or "No space left on device; free some" in line["error"]
    assert len(tree(small_disk / "out")) == statuses.count("done"), "part of a result is left"
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    again = moesr(*arguments)
    check_left = {line["status"] for line in again.lines.values()}
    assert again.code == 0 and check_left <= {"done", "skipped"}
    assert len(tree(small_disk / "out")) == 4
