"""Sections of the GPU benchmark as processes: results, limits, arguments, and the package they import."""

from __future__ import annotations

import time
from pathlib import Path

import gpu
from benchlib import checkout
from gpu_suite.setup import Setup


def test_results_of_a_section_that_hangs_or_dies_are_kept(tmp_path, monkeypatch):
    program = tmp_path / "gpu.py"
    program.write_text(
        "import json, sys, time\n"
        "print('@@ ' + json.dumps(['note', 'begun']), flush=True)\n"
        "print('a word of a library')\n"
        "sys.exit(3) if 'limits' in sys.argv else time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "PROGRAM", program)
    monkeypatch.setitem(gpu.SECTIONS, "device", gpu.Section("", "", 1.5))
    setup, deadline = Setup(cache=tmp_path), time.monotonic() + 100
    hanging, dying = (gpu.in_process(name, setup, deadline) for name in ("device", "limits"))
    assert hanging["notes"] == dying["notes"] == ["begun"]
    assert hanging["failed"].startswith("ended after 2 s") and dying["failed"].endswith("code 3")
    assert gpu.in_process("device", setup, time.monotonic())["failed"] == "no time was left"


def test_processes_of_a_section_that_hangs_are_ended(tmp_path, monkeypatch):
    """The compiler of kernels has a process per core."""
    program = tmp_path / "gpu.py"
    program.write_text(
        "import json, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "print('@@ ' + json.dumps(['note', str(child.pid)]), flush=True)\n"
        "print('@@ [\"note\", \"half a li', end='', flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "PROGRAM", program)
    monkeypatch.setitem(gpu.SECTIONS, "device", gpu.Section("", "", 1.5))
    heard = list[str]()
    found = gpu.in_process(
        "device", Setup(cache=tmp_path), time.monotonic() + 100, lambda found: heard.extend(found["notes"])
    )
    assert found["notes"] == heard and found["failed"].startswith("ended after")
    status, deadline = Path(f"/proc/{heard[0]}/stat"), time.monotonic() + 20
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)  # a killed process ends when it next runs; nobody may reap it
    assert time.monotonic() < deadline


def test_arguments_are_passed_to_the_process_of_a_section(tmp_path):
    setup = Setup(32, 16, 64, (3, 4), (1, 5), tmp_path, tmp_path / "k", 12.5)
    assert Setup.of(gpu.parser().parse_args([*setup.arguments, "--section", "device"])) == setup


def test_package_is_found_in_a_checkout(monkeypatch):
    monkeypatch.setattr(checkout.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(checkout.sys, "path", list(checkout.sys.path))
    monkeypatch.setattr(checkout.sys, "modules", dict(checkout.sys.modules))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    checkout.find_package()
    folder, rest = checkout.os.environ["PYTHONPATH"].split(checkout.os.pathsep)
    assert rest == "elsewhere" and checkout.sys.path[0] == folder
    assert (Path(folder) / "moesr" / "runtime" / "upscaler.py").is_file()
