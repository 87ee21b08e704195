"""The S3 server of benchmarks and tests ends with its user, and rests when nobody asks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchlib.local_store import rclone, s3_server, store_variables
from cluster_fixtures import need_store

HOLD = """
import pathlib, sys, time
from benchlib.local_store import s3_server
with s3_server(pathlib.Path(sys.argv[1])) as address:
    print(address, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a folder with one bucket."""
    need_store()
    (tmp_path / "store/bucket").mkdir(parents=True)
    return tmp_path / "store"


def servers_of(folder: Path) -> list[int]:
    """Return the processes of rclone that serve a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_text().split("\0")
            if words[0] == rclone() and str(folder) in words:
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_server_ends_with_its_user(store, number):
    path = os.pathsep.join(sys.path)
    user = subprocess.Popen(
        [sys.executable, "-c", HOLD, store], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
    )
    assert user.stdout and user.stdout.readline().startswith(b"http://127.0.0.1:")
    servers = servers_of(store)
    user.send_signal(number)
    user.communicate()
    assert len(servers) == 1
    deadline = time.monotonic() + 20
    while servers_of(store):
        assert time.monotonic() < deadline, "the server is still there"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_server_rests_after_a_file_was_written(store, monkeypatch):
    import obstore

    with s3_server(store) as address:
        for name, value in store_variables(address).items():
            monkeypatch.setenv(name, value)
        obstore.put(obstore.store.from_url("s3://bucket/new/folder"), "a", b"1")
        (server,) = servers_of(store)

        def used_s() -> float:
            times = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
            return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")

        before = used_s()
        time.sleep(0.5)
        assert used_s() - before < 0.1
