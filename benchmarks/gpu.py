"""Check every kernel and every backend on this machine's GPU, then time them beside PyTorch, in minutes.

With full-width networks and seeded weights it times a step, a decode and images of 128 -> 512 px, for several
numbers of steps and batch sizes. The results are compared with plain PyTorch in float16 (CUDA graphs) and
torch.compile, and given as fractions of the copy and matrix rates, which are measured first. Every section
runs in a process of its own with a time limit. If a section needs something that is not installed, the page
says so and the other sections run. A machine that is lent for a quarter of an hour takes `--call 1` (200 s)
and then `--call 2` (400 s), which adds to the page of the first. The program runs from a checkout and needs
no internet access. Writes gpu-NAME.json and gpu-NAME.md whenever there is a new result. Exit codes: 0 done,
or no GPU here; 1 a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchlib.checkout import find_package

PROGRAM = Path(__file__).resolve()
HERE = PROGRAM.parent
MARK = "@@ "  # prefix of the report lines of a section's process
RESULTS = HERE / "results"

GRACE_S = 5.0
"""Seconds to wait for a process that was killed, and for the rest of its output."""


find_package()

import benchlib.missing_extra  # noqa: E402, F401
from gpu_suite.report import markdown  # noqa: E402
from gpu_suite.setup import Absent, Report, Setup, add_sizes  # noqa: E402


@dataclass(frozen=True)
class Section:
    """A function of a module in this folder, and its time limit in seconds."""

    module: str
    function: str
    seconds: float
    arguments: tuple[Any, ...] = ()


SECTIONS = {
    "machine": Section("gpu_suite.setup", "describe", 15),
    "limits": Section("gpu_suite.networks", "measure_limits", 25),
    "compile": Section("gpu_suite.cubins", "compile_kernels", 80),
    "preparation": Section("gpu_suite.runtime", "prepare", 60),
    "device": Section("gpu_suite.device", "measure_device", 20),
    "cubins": Section("gpu_suite.cubins", "measure_cubins", 80),
    "captures": Section("gpu_suite.stress", "measure_captures", 25),
    "alternatives": Section("gpu_suite.alternatives", "measure_alternatives", 110),
    "runtime over pytorch": Section("gpu_suite.runtime", "measure_pytorch", 70),
    "pytorch with kernels": Section("gpu_suite.networks", "measure_kernels_inside", 50),
    "tensorrt": Section(
        "gpu_suite.runtime", "measure_library", 180, ("tensorrt", ("tensorrt", "tensorrt_rtx_bindings"))
    ),
    "onnxruntime": Section("gpu_suite.runtime", "measure_library", 90, ("onnxruntime", ("onnxruntime",))),
    "pytorch": Section("gpu_suite.networks", "measure_eager", 55),
    "kernels": Section("gpu_suite.kernels", "measure_kernels", 60),
    "torch.compile": Section("gpu_suite.networks", "measure_compiled", 150),
}
"""The sections in order: those that others depend on come first, those of unknown duration last."""

CALLS = {
    1: (200.0, ("limits", "compile", "device", "cubins", "captures")),
    2: (
        400.0,
        (
            "limits", "preparation", "alternatives", "runtime over pytorch", "pytorch with kernels",
            "tensorrt", "onnxruntime", "pytorch", "kernels",
        ),
    ),
}  # fmt: skip
"""Seconds and sections, ordered by worth, of two calls for a machine that is lent for a short time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections and write their results; returns the exit code."""
    args = parser().parse_args(argv)
    if args.call:
        seconds, sections = CALLS[args.call]
        args.budget, args.only = args.budget or seconds, args.only or sections
    if args.section:
        end_with_parent()
        run_section(args.section, Setup.of(args), say)
        return 0
    deadline, found = time.monotonic() + (args.budget or 465.0), {}
    base = Setup.of(args)
    machine = found["machine"] = in_process("machine", base, deadline)
    if machine["absent"] or machine["failed"] or not machine["facts"]:
        reason = machine["absent"] or machine["failed"] or "it does not say what it is"
        print(f"no GPU that can be used here ({reason}): nothing was measured")
        return 0
    name = slug(machine["facts"]["gpu"])
    setup = replace(base, cache=base.cache / name)
    args.output.mkdir(parents=True, exist_ok=True)
    found = earlier(args.output / f"gpu-{name}.json", args.only or ()) | found
    for section in args.only or list(SECTIONS)[1:]:
        found[section] = empty()
        found[section] = in_process(
            section, setup, deadline, partial(save, args.output, name, found, section)
        )
        save(args.output, name, found)
    print(markdown(found))
    return int(any(not check["held"] for part in found.values() for check in part["checks"]))


def save(folder: Path, name: str, found: dict[str, Any], section: str = "", part: Any = None) -> None:
    """Write the results so far, with the `part` of a section that still runs."""
    if part:
        running = {"failed": part["failed"] or "it was running when this was written"}
        found = found | {section: part | running}
    for suffix, text in ((".json", json.dumps(found, indent=1) + "\n"), (".md", markdown(found))):
        path = folder / f"gpu-{name}{suffix}"
        path.with_suffix(".tmp").write_text(text)
        path.with_suffix(".tmp").replace(path)


def earlier(path: Path, again: Sequence[str]) -> dict[str, Any]:
    """Return what an earlier call found in other sections, so that two calls make one page."""
    try:
        known = json.loads(path.read_text()) if again else {}
    except (OSError, ValueError):
        return {}
    return {name: part for name, part in known.items() if name in SECTIONS and name not in again}


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(p)
    p.add_argument("--only", nargs="+", choices=list(SECTIONS)[1:], metavar="SECTION", help="default: all")
    p.add_argument(
        "--call", type=int, choices=sorted(CALLS), help="the sections of one of two calls, see CALLS"
    )
    p.add_argument("--budget", type=float, help="seconds in all (default: 465, or those of the call)")
    p.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    p.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    return p


def in_process(
    name: str, setup: Setup, deadline: float, heard: Callable[[dict[str, Any]], None] = lambda found: None
) -> dict[str, Any]:
    """Run a section in a process of its own, which is ended at its time limit or the total limit.

    `heard` is called with the results so far whenever there is a new one.
    """
    allowed = min(SECTIONS[name].seconds, deadline - time.monotonic())
    found = empty()
    if allowed < 1:
        return found | {"failed": "no time was left"}
    command = [sys.executable, str(PROGRAM), "--section", name]
    command += replace(setup, seconds=allowed).arguments
    print(f"{name}, at most {allowed:.0f} s", file=sys.stderr, flush=True)
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    reader = threading.Thread(target=collect, args=(process.stdout, found, heard), daemon=True)
    reader.start()
    try:
        code = process.wait(allowed)
    except subprocess.TimeoutExpired:
        code, found["failed"] = 0, f"ended after {allowed:.0f} s; what it had found is here"
    except BaseException:
        end(process)
        raise
    end(process)
    reader.join(GRACE_S)
    if code and not found["failed"]:
        found["failed"] = f"its process ended with code {code}" + (" (a signal)" if code < 0 else "")
    return found | {"seconds": time.monotonic() - start}


def end_with_parent() -> None:
    """Have the system kill this process once its parent is gone, so that a section never outlives it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end(process: subprocess.Popen[str]) -> None:
    """Kill a section's process and those that it started, which would go on using the GPU and the CPUs.

    A process that hangs inside the driver cannot be killed; it is not waited for any longer than GRACE_S.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)


def empty() -> dict[str, Any]:
    """Return the empty results of a section."""
    return {"rows": [], "checks": [], "notes": [], "facts": {}, "absent": "", "failed": "", "seconds": 0.0}


def collect(
    stream: Any, found: dict[str, Any], heard: Callable[[dict[str, Any]], None] = lambda found: None
) -> None:
    """Read the report lines of a section's process until it ends."""
    for line in stream:
        if line.startswith(MARK):
            with contextlib.suppress(ValueError, OSError):  # a line that was cut off, or a disk that is full
                take(found, *json.loads(line.removeprefix(MARK)))
                heard(found)


def take(found: dict[str, Any], kind: str, value: Any) -> None:
    """Add one report line to the results."""
    if kind in ("absent", "failed"):
        found[kind] = value
    elif kind == "facts":
        found["facts"] |= value
    else:
        found[f"{kind}s"].append(value)


def say(kind: str, value: Any) -> None:
    """Send a report line to the parent process."""
    print(MARK + json.dumps([kind, value]), flush=True)


def run_section(name: str, setup: Setup, say: Callable[[str, Any], None]) -> None:
    """Run a section in this process; reports missing parts and failures."""
    section = SECTIONS[name]
    try:
        function = getattr(importlib.import_module(section.module), section.function)
        function(setup, Report(say, setup), *section.arguments)
    except Absent as reason:
        say("absent", str(reason))
    except ImportError as error:
        say("absent", f"{error.name or error} does not load ({error})")
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        say("failed", f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})")
        traceback.print_exc()


def slug(name: str) -> str:
    """Return a GPU's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the section that runs is ended, too
    sys.exit(main())
