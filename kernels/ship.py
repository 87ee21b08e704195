"""Build the kernels that the package ships, for all architectures, and check them without a compiler.

`python -m moesr.kernels.ship` compiles the kernels of the sampling loop and of images on a GPU into
runtime/kernels, with the release of Triton that is named here, so that the same sources give the same bytes.
The files of each architecture are one archive there, since they take a quarter of the space so.
`python -m moesr.kernels.ship --check` compares what is there with the sources, by hash, in a second.
"""

from __future__ import annotations

import argparse
import gzip
import io
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from moesr.kernels.build import build, deployments, source_hash
from moesr.kernels.plan import ARCHITECTURES, Op, check_compiler
from moesr.kernels.registry import SHIPPED
from moesr.runtime.devices import compiled_kernels, kernel_archive, kernel_search
from moesr.runtime.devices.operator_plan import KernelIndex
from moesr.runtime.errors import EngineError, UsageError
from moesr.runtime.system.files import reason

TRITON = "3.6.0"
"""The compiler of the shipped kernels. Its assembler is of CUDA 12, so that drivers from 525 on load them."""

TOOLKIT = "12.9"
"""The CUDA release of that compiler's newest assembler, which is recorded in kernels.json."""

COMMAND = "python -m moesr.kernels.ship"


def shipped_ops() -> list[Op]:
    """The operators with the cases that are shipped: the runtime's buffers are float32."""
    return [replace(op, deployed=tuple(c for c in op.deployed if c.dtype == "fp32")) for op in SHIPPED]


def faults(directory: Path = kernel_search.SHIPPED) -> list[str]:
    """Return the differences between shipped kernels and the sources; an empty list if there are none.

    Sources are compared by the hashes in kernels.json, tilings by the kernels' names (which are hashes of
    constants and options), and files by their own hashes.
    """
    try:
        index = compiled_kernels.read(directory)
    except EngineError as error:
        return [str(error)]
    found, ops = [], shipped_ops()
    if (index.triton, index.toolkit) != (TRITON, TOOLKIT):
        found.append(
            f"built with Triton {index.triton} and CUDA {index.toolkit}, not with {TRITON} and {TOOLKIT}"
        )
    sources = {op.name: source_hash(op.name) for op in ops}
    found += [
        f"{op}: kernel.py has changed" for op, sha in sources.items() if (index.sources or {}).get(op) != sha
    ]
    want = {job.name for made in deployments(ops, ARCHITECTURES) for job in made.jobs}
    found += [f"{name}: is missing" for name in sorted(want - index.kernels.keys())]
    found += [f"{name}: is not in the registry" for name in sorted(index.kernels.keys() - want)]
    for kernel, compiled in index.kernels.items():
        lacking = {"ptx", *(f"sm_{arch}" for arch in ARCHITECTURES)} - compiled.targets.keys()
        found += [f"{kernel}: has no {target}" for target in sorted(lacking)]
    return [*found, *_file_faults(index, directory)]


def _file_faults(index: KernelIndex, directory: Path) -> list[str]:
    """Return the differences between the files of an index and those in a directory and its archives."""
    targets = [target for kernel in index.kernels.values() for target in kernel.targets.values()]
    files = {target.file: target.sha256 for target in targets}
    found, there = list[str](), dict[str, bytes]()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        try:
            if name.endswith(kernel_archive.SUFFIX):
                there |= kernel_archive.read(path, compiled_kernels.MAX_FILE_BYTES)
            elif name != compiled_kernels.KERNELS_NAME:
                there[name] = path.read_bytes()
        except (OSError, ValueError) as error:
            found.append(f"{name}: {reason(error)}")
    found += [f"{file}: is missing" for file in sorted(files.keys() - there)]
    found += [f"{file}: is not in kernels.json" for file in sorted(there.keys() - files)]
    changed = (f for f in sorted(files.keys() & there) if sha256(there[f]).hexdigest() != files[f])
    return [*found, *(f"{file}: is not what was built" for file in changed)]


def pack(directory: Path) -> None:
    """Replace the folder of every target by an archive, which is the same for the same files."""
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for path in sorted(folder.iterdir()):
                member = tarfile.TarInfo(path.name)  # without owner and time
                member.size = path.stat().st_size
                with path.open("rb") as file:
                    archive.addfile(member, file)
        packed = gzip.compress(content.getvalue(), 9, mtime=0)
        folder.with_name(folder.name + kernel_archive.SUFFIX).write_bytes(packed)
        shutil.rmtree(folder)


def ship(directory: Path = kernel_search.SHIPPED, processes: int | None = None) -> None:
    """Compile the shipped kernels and put them in the place of those that are there; UsageError as `main`."""
    check_compiler()
    import triton

    if triton.__version__ != TRITON:
        raise UsageError(
            f"the shipped kernels are built with Triton {TRITON}, and this is {triton.__version__}; "
            f"run {COMMAND} in an environment that has: pip install triton=={TRITON}"
        )
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".kernels-") as folder:
        made = Path(folder) / "kernels"
        build(made, ops=shipped_ops(), cache=Path(folder) / "cache", processes=processes)
        pack(made)
        if directory.exists():
            shutil.rmtree(directory)
        made.rename(directory)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if the shipped kernels are not those of the sources."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare what is there with the sources")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    args = parser.parse_args(arguments)
    if not args.check:
        try:
            ship(processes=args.jobs)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    found = faults()
    print("\n".join([*found, f"run {COMMAND}"]) if found else f"{kernel_search.SHIPPED}: as in the sources")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
