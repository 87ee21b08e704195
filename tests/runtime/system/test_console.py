"""The guard of all programs: exit codes, one line on stderr, closed or full streams, and signals."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from moesr.runtime.errors import EngineError, UsageError
from moesr.runtime.system import console

PROGRAM = """
import argparse, os, signal, sys, time
from moesr.runtime.system import console

def parser():
    p = argparse.ArgumentParser("try")
    p.add_argument("--debug", action="store_true")
    return p

def work(args):
    for number in range(3):
        console.say(f"line {number}")
        console.log.info("note %d", number)
    with console.bar(total=2) as shown:
        shown.update()
    open(sys.argv[1], "w").write("done")
    return 0

sys.exit(console.run_program("try", parser, work, []))
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("try")
    p.add_argument("--debug", action="store_true")
    p.add_argument("--quiet", action="store_true")
    return p


def run(raised: BaseException | None = None, *argv: str) -> int:
    def work(args: argparse.Namespace) -> int:
        console.log.info("a note")
        if raised:
            raise raised
        return 0

    return console.run_program("try", parser, work, argv)


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "try: error: interrupted; finished results are kept"),
        (console.Stopped(signal.SIGTERM), 143, "try: error: ended by SIGTERM"),
        (MemoryError(), 4, "try: error: out of memory; close"),
        (RuntimeError("failed to allocate 3 GB"), 4, "try: error: out of memory"),
        (UsageError("steps is 0"), 2, "try: error: steps is 0"),
        (EngineError("two\nlines"), 3, r"try: error: two\nlines"),
        (PermissionError(13, "Permission denied", "a.png"), 1, "try: error: a.png: Permission denied"),
        (RuntimeError("surprise"), 1, "internal error, please report it: RuntimeError: surprise (--debug"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_exception_becomes_one_line(raised, code, message, capsys):
    assert run(raised) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == 2


NAMES = {
    "clears the screen": ("a\x1b[2Jb", r"a\x1b[2Jb"),
    "splits the line": ("new\nline\r\vx", r"new\nline\r\x0bx"),
    "eight-bit control": ("a\x9b2Jb", r"a\x9b2Jb"),
    "reversed direction": ("gnp\u202eexe.png", r"gnp\u202eexe.png"),
    "line separators": ("a\u2028b\x85c", r"a\u2028b\x85c"),
    "plain": ("Bäume 3\u202fPM 👩‍🌾.png", "Bäume 3\u202fPM 👩‍🌾.png"),
}


@pytest.mark.parametrize(("name", "shown"), NAMES.values(), ids=NAMES)
def test_control_characters_in_names_are_escaped(name: str, shown: str, capsys):
    def work(args: argparse.Namespace) -> int:
        console.say(f"{name} -> b.png")
        console.log.warning("%s: odd", name)
        raise UsageError(f"{name}: no such file")

    console.run_program("try", parser, work, [])
    out, err = capsys.readouterr()
    assert out == f"{shown} -> b.png\n"
    assert err == f"try: warning: {shown}: odd\ntry: error: {shown}: no such file\n"
    with pytest.raises(SystemExit):
        console.run_program("try", parser, work, [f"--{name}"])
    assert f"unrecognized arguments: --{shown}" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["half imported", "no memory for a line"])
def test_out_of_memory_while_tqdm_is_imported(moment: str, capfd, monkeypatch):
    def work(args: argparse.Namespace) -> int:
        if moment == "half imported":
            monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))
        else:
            monkeypatch.setattr(console, "_write", no_memory)
        raise MemoryError

    def no_memory(text: str, stream: object) -> None:
        raise MemoryError

    assert console.run_program("try", parser, work, []) == 4
    assert (
        capfd.readouterr().err == "try: error: out of memory; close other programs, or use a smaller image\n"
    )


def test_missing_package_names_its_extra(capsys):
    def work(args: argparse.Namespace) -> int:
        import no_such_package  # type: ignore[import-not-found]

        return no_such_package.work()

    assert console.run_program("try", parser, work, [], extra="train") == 2
    message = "try: error: no_such_package is not installed; install it with: pip install 'moesr[train]'"
    assert capsys.readouterr().err.strip() == message
    assert console.run_program("try", parser, work, []) == 1  # without an extra it is a defect
    assert "internal error" in capsys.readouterr().err


def test_quiet_and_debug(capsys: pytest.CaptureFixture[str]):
    assert run(None, "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert run(RuntimeError("surprise"), "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("redirection", "code"),
    [
        ("", 0),
        (">&-", 1),
        ("2>&-", 0),
        ("<&- >&- 2>&-", 1),
        (">/dev/full", 1),
        ("2>/dev/full", 0),
        (">/dev/full 2>/dev/full", 1),
    ],
)
def test_closed_or_full_streams(tmp_path, redirection: str, code: int):
    script, done = tmp_path / "program.py", tmp_path / "done"
    script.write_text(PROGRAM)
    command = f"exec '{sys.executable}' '{script}' '{done}' {redirection}"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert done.read_text() == "done"
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


def test_help_to_a_full_device():
    script = PROGRAM.replace("work, []", "work, ['--help']")
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (result.returncode, result.stderr) == (1, b"")


def test_names_that_the_stream_cannot_encode(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.replace("line {number}", "caf\\u00e9 \\udcff"))
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(script), str(tmp_path / "done")]
    result = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert result.returncode == 0
    assert b"caf\\xe9 \\udcff" in result.stdout


@pytest.fixture(autouse=True, scope="module")
def heard_signals():
    """Let programs receive all signals; a program inherits the signals that its parent ignores (nohup, &)."""
    ignored = [n for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_cleans_up_and_second_ends_at_once(number: signal.Signals):
    work = """
def work(args):
    try:
        os.kill(os.getpid(), NUMBER)
        time.sleep(5)
    finally:
        print("cleaned up", flush=True)
        if "twice" in sys.argv:
            os.kill(os.getpid(), NUMBER)
""".replace("NUMBER", str(int(number)))
    head, tail = PROGRAM.split("def work(args):")[0], "sys.exit(console.run_program('try', parser, work, []))"
    for times, code in (("once", 128 + number), ("twice", -number)):
        command = [sys.executable, "-c", head + work + tail, times]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        assert result.returncode == code, result.stderr
        assert result.stdout == "cleaned up\n"
        assert "Traceback" not in result.stderr


def test_progress_in_a_file_is_whole_lines(monkeypatch, capsys):
    """In a file the progress is one complete line every ten seconds, not one line of carriage returns."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    read: list[str] = []
    with console.bar(total=1.0, bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}") as shown:
        for number in range(100):
            now[0] += 1.0
            shown.set_description(f"{number // 50 + 1}/2 a.png", refresh=False)
            shown.update(0.01)
            read.append(capsys.readouterr().err)
    text = "".join(read) + capsys.readouterr().err
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert 10 <= len(lines) <= 13 and all(line.strip() == line and line for line in lines)
    assert "1/2 a.png:  40% 00:40<00:59" in lines
    assert lines[-1].startswith("2/2 a.png: 100%")
    assert all(part.endswith("\n") for part in read if part)


def test_ignored_signal_stays_ignored():
    script = PROGRAM.replace("for number", "os.kill(os.getpid(), signal.SIGHUP)\n    for number")
    script = script.replace("def parser", "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n\ndef parser")
    command = [sys.executable, "-c", script, os.devnull]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_ctrl_c_during_large_imports_shows_no_traceback():
    script = """
import os, signal, sys
sys.argv = ["moesr-run", "a.png"]
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:  # as extension modules do
                raise ImportError("half imported") from None
sys.meta_path.insert(0, Interrupt())
from moesr.runtime.cli.run import main
sys.exit(main())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 130, result.stderr
    assert "interrupted" in result.stderr and "Traceback" not in result.stderr
