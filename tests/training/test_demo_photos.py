"""The demo models' photographs are read from Debian packages, made smaller and written to two folders."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moesr.runtime.errors import InputError, UsageError
from moesr.training.data import debian_packages, demo_photos

PHOTO = np.random.default_rng(0).integers(0, 256, (900, 1000, 3), np.uint8)


def picture(pixels: np.ndarray = PHOTO) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def deb(path: Path, files: dict[str, bytes]) -> Path:
    """Write a Debian package with these files, as `ar` would."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    members = {b"debian-binary": b"2.0\n", b"control.tar.xz": b"odd", b"data.tar.xz": stream.getvalue()}
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, content in members.items():
            header = name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) * 2 + b"100644".ljust(8)
            file.write(header + str(len(content)).encode().ljust(10) + b"`\n" + content)
            file.write(b"\n" * (len(content) % 2))
    return path


@pytest.fixture
def packages(tmp_path) -> Path:
    """All packages of the catalogue, with every photograph except the first one in the catalogue."""
    folder = tmp_path / "packages"
    folder.mkdir()
    listed = demo_photos.catalogue()
    for package in {credit.package for credit in listed}:
        paths = [c.path for c in listed if c.package == package and c is not listed[0]]
        deb(folder / f"{package}_1.0_all.deb", {p: picture(PHOTO[:32, :48]) for p in paths})
    return folder


@pytest.fixture(params=["dpkg-deb", "here"])
def reader(request, monkeypatch):
    """Run a test with dpkg-deb and without it."""
    if request.param == "here":
        monkeypatch.setattr(debian_packages.shutil, "which", lambda name: None)
    elif debian_packages.shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")


def test_every_photograph_has_an_author_and_a_free_licence():
    listed = demo_photos.catalogue()
    assert len(listed) >= 50
    assert len({c.name for c in listed}) == len(listed) == len({(c.package, c.path) for c in listed})
    assert all(c.author and c.licence.startswith(("CC", "GPL", "LGPL", "GFDL", "public")) for c in listed)


def test_splits_share_no_scene():
    kept_out = {c.name for c in demo_photos.catalogue() if c.split == "validation"}
    assert len(kept_out) >= 3
    assert not kept_out & {c.name for c in demo_photos.catalogue() if c.split == "train"}


def test_wanted_files_of_a_package_are_read(reader, tmp_path):
    path = deb(tmp_path / "one_1_all.deb", {"usr/a.jpg": b"a", "usr/b.jpg": b"bb", "etc/c": b"c"})
    got = dict(debian_packages.read_files(path, {"usr/b.jpg", "etc/c", "usr/none"}))
    assert got == {"usr/b.jpg": b"bb", "etc/c": b"c"}


@pytest.mark.parametrize("damage", [lambda b: b"no archive", lambda b: b[:200], lambda b: b[:-40]])
def test_damaged_package_is_reported(reader, tmp_path, damage):
    path = deb(tmp_path / "one_1_all.deb", {"usr/a.jpg": picture()})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="download it again"):
        list(debian_packages.read_files(path, {"usr/a.jpg"}))


def test_newest_version_of_a_package_is_read(tmp_path):
    for day, version in enumerate(("2", "1")):
        path = deb(tmp_path / f"one_{version}_all.deb", {})
        os.utime(path, (day, day))
    assert debian_packages.find("one", tmp_path).name == "one_1_all.deb"
    with pytest.raises(
        UsageError, match=r"no two_\*.deb there; download it from https://packages.debian.org/two"
    ):
        debian_packages.find("two", tmp_path)


def test_missing_apt_is_reported_with_the_cure(monkeypatch, tmp_path):
    monkeypatch.setattr(debian_packages.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"no apt-get here to fetch one, two; download .* --packages"):
        debian_packages.download({"two", "one"}, tmp_path)


def test_package_lists_are_refreshed_once(monkeypatch, tmp_path):
    calls = []

    def fails(command, folder):
        calls.append(command[1])
        return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package one\n")

    monkeypatch.setattr(debian_packages.shutil, "which", lambda name: name)
    monkeypatch.setattr(debian_packages, "_run", fails)
    with pytest.raises(UsageError, match=r"Unable to locate package one.*apt-get update as root"):
        debian_packages.download({"one"}, tmp_path)
    assert calls == ["download", "update", "download"]


@pytest.mark.parametrize(
    ("shape", "split", "names"),
    [
        ((900, 1000), "train", ["a.jpg", "a_0.5.png"]),
        ((1600, 1700), "train", ["a.jpg", "a_0.5.png", "a_0.25.png"]),
        ((799, 1700), "train", ["a.jpg"]),
        ((900, 1000), "validation", ["a_0.5.png"]),
        ((700, 900), "validation", ["a.jpg"]),
    ],
)
def test_sizes_of_reduced_photographs(tmp_path, shape, split, names):
    credit = demo_photos.Credit("a", "one", "usr/A.JPG", "b", "CC0-1.0", split)
    content = picture(np.resize(PHOTO, (*shape, 3)))
    assert [p.name for p in demo_photos.write_sizes(credit, content, tmp_path)] == names
    for name in names:
        factor = float(name[2:-4]) if "_" in name else 1.0
        assert Image.open(tmp_path / name).size == (round(shape[1] * factor), round(shape[0] * factor))


def test_reduced_photograph_shows_the_same_picture(tmp_path):
    credit = demo_photos.Credit("a", "one", "usr/a.jpg", "b", "CC0-1.0", "validation")
    flat = np.zeros((800, 800, 3), np.uint8)
    flat[:, 400:] = 200
    demo_photos.write_sizes(credit, picture(flat), tmp_path)
    got = np.asarray(Image.open(tmp_path / "a_0.5.png"))
    assert abs(int(got[200, 100, 0]) - 0) <= 2 and abs(int(got[200, 300, 0]) - 200) <= 2


def test_training_and_validation_folders_are_written(packages, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(demo_photos, "photographs", lambda split: {"chelsea": PHOTO[:16]})
    assert demo_photos.write(tmp_path / "out", packages) == 0
    listed = demo_photos.catalogue()
    for split in ("train", "validation"):
        stems = {path.stem for path in (tmp_path / "out" / split).iterdir()}
        assert stems == {c.name for c in listed[1:] if c.split == split} | {"chelsea"}
    assert f"{listed[0].path} is not in this version of the package" in caplog.text
