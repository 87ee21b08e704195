"""Read files from Debian packages without installing them; packages are downloaded with apt if it exists.

A package is an `ar` archive whose member `data.tar.*` holds the files. If dpkg-deb is not installed, this
module reads the archive itself, provided that tarfile supports its compression.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from moesr.runtime.errors import InputError, UsageError

MAGIC = b"!<arch>\n"
HEADER_BYTES = 60  # header of an ar member: name, time, owner, group, mode and size, as text
SIZE = slice(48, 58)
END = b"`\n"
PAGES = "https://packages.debian.org"


def download(packages: Iterable[str], folder: Path) -> None:
    """Download packages to `folder` with apt-get; its package lists are updated once if the first try fails.

    Raises UsageError, with instructions, if apt-get is not installed or fails.
    """
    names = sorted(packages)
    if shutil.which("apt-get") is None:
        raise UsageError(
            f"there is no apt-get here to fetch {', '.join(names)}; download these packages' files from "
            f"{PAGES} and give their folder with --packages"
        )
    command = ["apt-get", "download", "--quiet", *names]
    if _run(command, folder).returncode:
        _run(["apt-get", "update", "--quiet"], folder)
        result = _run(command, folder)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UsageError(
                f"apt-get download failed ({reason}); run apt-get update as root and try again, or download "
                f"{', '.join(names)} from {PAGES} and give their folder with --packages"
            )


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def find(package: str, folder: Path) -> Path:
    """Return the newest file of `package` in `folder`; UsageError if there is none."""
    found = sorted(folder.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UsageError(f"{folder}: no {package}_*.deb there; download it from {PAGES}/{package}")
    return found[-1]


def read_files(deb: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield path and bytes of the files of a package whose paths (without a leading slash) are in `wanted`.

    Files that the package does not hold are left out. Raises InputError if the package cannot be read.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(_data(deb))) as archive:
            for member in archive:
                path = member.name.removeprefix("./")
                if path in wanted and (file := archive.extractfile(member)) is not None:
                    yield path, file.read()
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise InputError(f"{deb}: cannot be read as a Debian package ({error}); download it again") from error


def _data(deb: Path) -> bytes:
    """Return the tar archive of a package's files, possibly compressed."""
    if shutil.which("dpkg-deb") is None:
        return ar_member(deb.read_bytes(), b"data.tar")
    result = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], capture_output=True, check=False)
    if result.returncode:
        raise ValueError(result.stderr.decode(errors="replace").strip())
    return result.stdout


def ar_member(archive: bytes, prefix: bytes) -> bytes:
    """Return the first member of an ar archive whose name starts with `prefix`; ValueError if none does."""
    if not archive.startswith(MAGIC):
        raise ValueError("not an ar archive")
    at = len(MAGIC)
    while at + HEADER_BYTES <= len(archive):
        header = archive[at : at + HEADER_BYTES]
        if not header.endswith(END):
            raise ValueError("a damaged ar archive")
        at, size = at + HEADER_BYTES, int(header[SIZE])
        if at + size > len(archive):
            raise ValueError("an ar archive that is cut off")
        if header.startswith(prefix):
            return archive[at : at + size]
        at += size + size % 2  # members start at even offsets
    raise ValueError(f"no {prefix.decode()} in it")
