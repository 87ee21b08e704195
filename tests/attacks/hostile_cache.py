"""Damage to the user's cache, after which every run must still give the same pixels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def keeping_stamp(damage: Callable[[Path], object]) -> Callable[[Path], None]:
    """Damage a file and restore its time stamps, as a failing disk does."""

    def keep(path: Path) -> None:
        status = path.stat()
        damage(path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    return keep


def replacing(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Replace a file by another kind of entry."""

    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def zero_second_half(path: Path) -> None:
    """Overwrite the second half of a file with zeros and keep its size."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def flip_bits(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"hello"),
    "null": lambda path: path.write_text("null"),
    "nested": lambda path: path.write_text("[" * 200_000),
    "digits_400": lambda path: path.write_text(path.read_text("latin-1").replace(": ", ": 1" + "0" * 400, 1)),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "zeros": keeping_stamp(zero_second_half),
    "flipped_byte": keeping_stamp(flip_bits),
    "fifo": replacing(os.mkfifo),
    "directory": replacing(Path.mkdir),
    "endless_device": replacing(lambda path: path.symlink_to("/dev/zero")),
    "link_to_itself": replacing(lambda path: path.symlink_to(path)),
    "link_to_nothing": replacing(lambda path: path.symlink_to("/nonexistent/file")),
    "removed": Path.unlink,
    "without_its_folder": lambda path: shutil.rmtree(path.parent),
}
