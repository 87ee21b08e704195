"""A pickle module for `torch.load` that builds tensors and nothing else.

Checkpoints of training frameworks hold objects besides tensors, such as the callbacks of PyTorch Lightning.
Loading those would import their modules and run their code. Here every class or function that a tensor does
not need is replaced by `Placeholder`, which accepts what a pickle does to it and does nothing. So the tensors
of such a file can be read without its framework, and without trust in where it came from.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any, BinaryIO

import torch
from torch._utils import (
    _rebuild_parameter,
    _rebuild_parameter_with_state,
    _rebuild_tensor,
    _rebuild_tensor_v2,
    _rebuild_tensor_v3,
)


def _plain_tensor(build: Any, _kind: Any, arguments: tuple[Any, ...], _state: Any) -> torch.Tensor:
    """Build a plain tensor from a pickled Tensor subclass; the subclass and its attributes are dropped."""
    return build(*arguments)


_FUNCTIONS = (
    _rebuild_parameter,
    _rebuild_parameter_with_state,
    _rebuild_tensor,
    _rebuild_tensor_v2,
    _rebuild_tensor_v3,
)
_BUILT = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.nn.parameter", "Parameter"): torch.nn.Parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _plain_tensor,
    **{("torch._utils", function.__name__): function for function in _FUNCTIONS},
    **{("torch", str(kind).split(".")[1]): kind for kind in (torch.float32, torch.float16, torch.bfloat16)},
}
"""Classes and functions that are not replaced: parts of tensors and state dicts. Storages need no entry."""


class Placeholder:
    """A replacement for an object of any other class, without state or behaviour."""

    def __new__(cls, *_: Any, **__: Any) -> Placeholder:  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Placeholder:  # noqa: D102
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Ignore an item of a list."""

    def extend(self, items: Any) -> None:
        """Ignore items of a list."""

    def add(self, item: Any) -> None:
        """Ignore an item of a set."""


class Unpickler(pickle.Unpickler):
    """An unpickler that resolves only names that tensors need; all others become `Placeholder`."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the object that a pickle names if it is allowed, else `Placeholder`."""
        return _BUILT.get((module, name), Placeholder)


def load(file: BinaryIO, **options: Any) -> Any:
    """Unpickle one object, as `pickle.load` does."""
    return Unpickler(file, **options).load()
