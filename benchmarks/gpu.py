"""Check every kernel and every backend on this machine's GPU, then time them beside PyTorch, in minutes.

Full-width networks with seeded weights: a step, a decode and images of 128 -> 512 px at several numbers of
steps and images at once, against plain PyTorch in float16 (CUDA graphs) and torch.compile, as shares of the
copy and matrix rates that are measured first. Every section is a process of its own with its own time; where
a part of the stack is absent it says which, and the others go on. Runs from a checkout, without a network.
Writes gpu-NAME.json and gpu-NAME.md. Exit codes: 0 done, or no GPU here; 1 a check did not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MARK = "@@ "  # before what a section's process says
RESULTS = HERE / "results"


def find_package() -> None:
    """Have `moesr` importable here and in processes that this one starts, installed or not."""
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec("moesr.runtime"):
            return
    folder = Path(tempfile.mkdtemp(prefix="moesr-checkout-"))
    (folder / "moesr").symlink_to(HERE.parent, target_is_directory=True)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    sys.modules.pop("moesr", None)
    importlib.invalidate_caches()


find_package()

import benchlib.missing_extra  # noqa: E402, F401
from gpu_suite.report import markdown  # noqa: E402
from gpu_suite.setup import Absent, Report, Setup, add_sizes  # noqa: E402


@dataclass(frozen=True)
class Section:
    """A function of a module below this folder, and the seconds that it may take."""

    module: str
    function: str
    seconds: float
    arguments: tuple[Any, ...] = ()


SECTIONS = {
    "machine": Section("gpu_suite.setup", "describe", 30),
    "limits": Section("gpu_suite.networks", "measure_limits", 30),
    "preparation": Section("gpu_suite.runtime", "prepare", 120),
    "device": Section("gpu_suite.device", "measure_device", 30),
    "kernels": Section("gpu_suite.kernels", "measure_kernels", 80),
    "tensorrt": Section(
        "gpu_suite.runtime", "measure_library", 180, ("tensorrt", ("tensorrt", "tensorrt_rtx_bindings"))
    ),
    "onnxruntime": Section("gpu_suite.runtime", "measure_library", 90, ("onnxruntime", ("onnxruntime",))),
    "runtime over pytorch": Section("gpu_suite.runtime", "measure_pytorch", 70),
    "pytorch": Section("gpu_suite.networks", "measure_eager", 55),
    "pytorch with kernels": Section("gpu_suite.networks", "measure_kernels_inside", 50),
    "torch.compile": Section("gpu_suite.networks", "measure_compiled", 150),
}
"""In order: what others need comes first, what may take any time last."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections, write what they found."""
    args = parser().parse_args(argv)
    if args.section:
        run_section(args.section, Setup.of(args), say)
        return 0
    deadline, found = time.monotonic() + args.budget, {}
    base = Setup.of(args)
    machine = found["machine"] = in_process("machine", base, deadline)
    if machine["absent"] or machine["failed"] or not machine["facts"]:
        reason = machine["absent"] or machine["failed"] or "it does not say what it is"
        print(f"no GPU that can be used here ({reason}): nothing was measured")
        return 0
    name = slug(machine["facts"]["gpu"])
    setup = replace(base, cache=base.cache / name)
    args.output.mkdir(parents=True, exist_ok=True)
    for section in args.only or list(SECTIONS)[1:]:
        found[section] = in_process(section, setup, deadline)
        (args.output / f"gpu-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.output / f"gpu-{name}.md").write_text(markdown(found))
    print(markdown(found))
    return int(any(not check["held"] for part in found.values() for check in part["checks"]))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(p)
    p.add_argument("--only", nargs="+", choices=list(SECTIONS)[1:], metavar="SECTION", help="default: all")
    p.add_argument("--budget", type=float, default=465.0, help="seconds in all (default: 465)")
    p.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    p.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    return p


def in_process(name: str, setup: Setup, deadline: float) -> dict[str, Any]:
    """Run a section in a process of its own, ended when its time or the whole's is over."""
    allowed = min(SECTIONS[name].seconds, deadline - time.monotonic())
    found = empty()
    if allowed < 1:
        return found | {"failed": "no time was left"}
    command = [sys.executable, str(HERE / "gpu.py"), "--section", name]
    command += replace(setup, seconds=allowed).arguments
    print(f"{name}, at most {allowed:.0f} s", file=sys.stderr, flush=True)
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        reader = threading.Thread(target=collect, args=(process.stdout, found), daemon=True)
        reader.start()
        try:
            code = process.wait(allowed)
        except subprocess.TimeoutExpired:
            process.kill()
            code, found["failed"] = 0, f"ended after {allowed:.0f} s; what it had found is here"
        reader.join(10)
    if code and not found["failed"]:
        found["failed"] = f"its process ended with code {code}"
    return found | {"seconds": time.monotonic() - start}


def empty() -> dict[str, Any]:
    """What a section has found before it begins."""
    return {"rows": [], "checks": [], "notes": [], "facts": {}, "absent": "", "failed": "", "seconds": 0.0}


def collect(stream: Any, found: dict[str, Any]) -> None:
    """Read what a section says, until its end."""
    for line in stream:
        if line.startswith(MARK):
            take(found, *json.loads(line.removeprefix(MARK)))


def take(found: dict[str, Any], kind: str, value: Any) -> None:
    """Put one thing said where it belongs."""
    if kind in ("absent", "failed"):
        found[kind] = value
    elif kind == "facts":
        found["facts"] |= value
    else:
        found[f"{kind}s"].append(value)


def say(kind: str, value: Any) -> None:
    """Tell the process that started this one."""
    print(MARK + json.dumps([kind, value]), flush=True)


def run_section(name: str, setup: Setup, say: Callable[[str, Any], None]) -> None:
    """Run a section here; what it lacks and what it fails of is said."""
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
    """A GPU's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
