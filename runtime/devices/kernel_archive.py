"""Reads archives of compiled kernels: `sm_90.tar.gz` holds the files that would lie in `sm_90/`.

The package ships its kernels so. Kernels of one architecture resemble each other, so they take a fifth of the
space together, and are decompressed in about a millisecond.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from moesr.runtime.system import json_dataclass

SUFFIX = ".tar.gz"

_GZIP = 31  # the window bits with which zlib reads a gzip file


def archive_of(directory: Path, file: str) -> Path:
    """Return where the archive of a file's folder would be; `file` is relative to the directory."""
    return directory / f"{PurePosixPath(file).parts[0]}{SUFFIX}"


def read(path: Path, most: int) -> dict[str, bytes]:
    """Return the files of an archive by their paths beside it, such as "sm_90/x.cubin".

    OSError is raised if the archive cannot be read, and ValueError if it is damaged or its content is larger
    than `most` bytes.
    """
    unpacking, folder = zlib.decompressobj(_GZIP), path.name.removesuffix(SUFFIX)
    try:
        content = unpacking.decompress(json_dataclass.read_bytes(path, most), most)
        if not unpacking.eof:
            raise ValueError(f"it is cut short, or holds more than {most} bytes")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            files = [(member.name, archive.extractfile(member)) for member in archive if member.isfile()]
            return {f"{folder}/{name}": file.read() for name, file in files if file}
    except (zlib.error, tarfile.TarError) as error:
        raise ValueError(f"it is damaged ({error})") from error
