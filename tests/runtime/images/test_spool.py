"""Spools: what is written is read, the disk's room is asked for first, and no file is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moesr.runtime.errors import OutputError
from moesr.runtime.images import spool
from moesr.runtime.images.spool import Spool


def test_what_is_written_is_read_and_mapped(tmp_path: Path):
    values = np.random.default_rng(0).integers(0, 65536, (9, 5, 3), np.uint16)
    with Spool(tmp_path, 9, 5, 3, np.uint16) as made:
        for start in range(0, 9, 4):
            made.write(start, values[start : start + 4])
        np.testing.assert_array_equal(made.read(2, 7), values[2:7])
        pixels = made.pixels
        made.release()
        np.testing.assert_array_equal(pixels, values)
        pixels[3] = 7
        assert (made.read(3, 4) == 7).all()
    np.testing.assert_array_equal(pixels[4:], values[4:])  # the mapping outlives the spool
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free = spool.shutil.disk_usage(tmp_path).free
    with pytest.raises(OutputError, match=r"needs .* GB of disk for temporary files, free are .*TMPDIR"):
        spool.place_for([tmp_path / "new" / "folder", tmp_path], free)
    assert spool.place_for([tmp_path / "new" / "folder"], 1000) == tmp_path

    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool, "_reserve", full)
    with pytest.raises(OutputError, match=r"no room for a temporary file of .*free some"):
        Spool(tmp_path, 9, 5, 3, np.uint8)
    assert not list(tmp_path.iterdir())


LIMITED = """
import resource, sys
import numpy as np
from pathlib import Path
from moesr.runtime.errors import OutputError
from moesr.runtime.images.spool import Spool
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    Spool(Path(sys.argv[1]), 1000, 1000, 3, np.uint8)
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of file sizes")
def test_a_file_that_may_not_grow_is_an_error_before_any_work(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=True
    )
    assert "has no room for a temporary file of 3 MB" in done.stdout


WAITING = """
import sys, time
import numpy as np
from pathlib import Path
from moesr.runtime.images.spool import Spool
spool = Spool(Path(sys.argv[1]), 100, 100, 3, np.uint8)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next process removes the file")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_killed_process(tmp_path: Path, number: int):
    process = subprocess.Popen([sys.executable, "-c", WAITING, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    assert not list(tmp_path.iterdir())
    os.kill(process.pid, number)
    process.communicate()
    assert not list(tmp_path.iterdir())
