"""Files of latents are read without PyTorch and without running their code; damaged ones are refused."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moesr.runtime.errors import InputError
from moesr.runtime.images.latents import read_latents

Z = np.random.default_rng(0).standard_normal((3, 4, 6, 5)).astype(np.float32)


def read(path: Path, channels: int = 4) -> np.ndarray:
    with path.open("rb") as stream:
        return read_latents(stream, path, channels)


def saved(value, path: Path) -> Path:
    torch.save(value, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_types_of_tensors(tmp_path, dtype, suffix):
    tensor = torch.from_numpy(Z).to(dtype)
    if suffix == ".pt":
        saved(tensor, tmp_path / "z.pt")
    else:
        save_file({"latents": tensor, "step": torch.zeros(1)}, tmp_path / "z.safetensors", {"made": "by"})
    np.testing.assert_array_equal(read(tmp_path / f"z{suffix}"), tensor.float().numpy())


@pytest.mark.parametrize(
    "value",
    [
        torch.from_numpy(Z)[1],  # a view that carries the whole batch
        torch.from_numpy(Z)[1].permute(0, 2, 1).contiguous().permute(0, 2, 1),
        torch.nn.Parameter(torch.from_numpy(Z)[1].clone()),
        {"latents": torch.from_numpy(Z)[1], "other": torch.zeros(3)},
        OrderedDict(only=[torch.from_numpy(Z)[1]]),
    ],
    ids=["view", "strided", "parameter", "named", "nested"],
)
def test_single_latents_in_files_of_torch(tmp_path, value):
    np.testing.assert_array_equal(read(saved(value, tmp_path / "z.pt")), Z[1:2])


def test_arrays_of_numpy(tmp_path):
    np.save(tmp_path / "z.npy", Z[0].astype(">f8"))
    np.testing.assert_array_equal(read(tmp_path / "z.npy"), Z[:1])
    np.save(tmp_path / "z.npy", np.asfortranarray(Z))
    np.testing.assert_array_equal(read(tmp_path / "z.npy"), Z)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


WRONG = {
    "code": (Evil(), "posix.mkdir"),
    "none": ({}, "no tensor"),
    "several": ({"a": torch.zeros(4, 2, 2), "b": torch.zeros(4, 2, 2)}, "2 tensors"),
    "integers": (torch.zeros(4, 2, 2, dtype=torch.int64), "int64"),
    "channels": (torch.zeros(16, 2, 2), "16 channels"),
    "flat": (torch.zeros(4, 2), "shape"),
    "empty": (torch.zeros(0, 4, 2, 2), "shape"),
    "nan": (torch.full((4, 2, 2), torch.nan), "NaN"),
    "infinite": (torch.full((4, 2, 2), 1e300, dtype=torch.float64), "infinite"),
    "expanded": (torch.zeros(1).expand(4, 2, 2), "impossible shape"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_contents_are_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    value, words = WRONG[case]
    with pytest.raises(InputError, match=words):
        read(saved(value, tmp_path / "z.pt"))
    assert not Path("evil").exists()


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


def test_damaged_files_are_refused(tmp_path):
    whole = {name: saved(torch.from_numpy(Z), tmp_path / "z.pt").read_bytes() for name in (".pt", ".pth")}
    save_file({"z": torch.from_numpy(Z)}, tmp_path / "z.safetensors")
    np.save(tmp_path / "z.npy", Z)
    whole |= {s: (tmp_path / f"z{s}").read_bytes() for s in (".safetensors", ".npy")}
    objects = io.BytesIO()
    np.save(objects, np.array([Evil()]), allow_pickle=True)
    cases = [(suffix, data[: len(data) * part // 4]) for suffix, data in whole.items() for part in range(4)]
    cases += [
        (".npy", objects.getvalue()),
        (".npy", whole[".npy"].replace(b"(3, 4, 6, 5)", b"(3, 4, 60,5)")),
        (".safetensors", b"\xff" * 16),
        (".safetensors", b"\x02" + bytes(7) + b"[]"),
        (".safetensors", whole[".safetensors"].replace(b'"data_offsets":[0,', b'"data_offsets":[9,')),
        (".safetensors", whole[".safetensors"].replace(b'"dtype":"F32"', b'"dtype":["F"]')),
        (".safetensors", whole[".safetensors"].replace(b'"shape":[3,', b'"shape":[-,')),
        (".pt", zipped({"a/data.pkl": pickle.dumps([1])})),
        (".pt", zipped({"a/data.pkl": b"\x80\x02" + b"(" * 10_000_000})),
        (".pt", zipped({"a/data.pkl": pickle.dumps("x"), "b/data.pkl": b""})),
        (".pt", pickle.dumps(Evil())),
        (".bin", b"latents"),
    ]
    for suffix, data in cases:
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(data)
        with pytest.raises(InputError, match="damaged"):
            read(path)
