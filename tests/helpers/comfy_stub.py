"""A stand-in for the modules of ComfyUI that the node uses, with the signatures of its own sources."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


class Input:
    """An input of a node with the names of its arguments checked."""

    KNOWN = frozenset({"display_name", "optional", "tooltip", "lazy", "socketless", "extra_dict", "raw_link"})
    MORE: frozenset[str] = frozenset()

    def __init__(self, id: str, **values: Any) -> None:
        assert values.keys() <= self.KNOWN | self.MORE, values
        self.id, self.values = id, values


def _kind(*more: str) -> Any:
    kind = type("Kind", (), {})
    kind.Input = type("Input", (Input,), {"MORE": frozenset(more)})
    kind.Output = type("Output", (Input,), {"__init__": lambda self, id=None, **values: None})
    return kind


class Schema:
    """The description of a node."""

    def __init__(
        self, node_id: str, display_name: str, category: str, inputs: list, outputs: list, description: str
    ) -> None:
        self.node_id, self.display_name, self.category = node_id, display_name, category
        self.inputs, self.outputs, self.description = inputs, outputs, description


class NodeOutput:
    """The result of a node."""

    def __init__(self, *results: Any) -> None:
        self.result = results


class Extension(ABC):
    """The base of extensions."""

    @abstractmethod
    async def get_node_list(self) -> list[type]: ...


class Interrupted(Exception):
    """The exception with which ComfyUI ends the work."""


class Comfy:
    """What the stand-in recorded, and its switches."""

    def __init__(self, models: Path) -> None:
        self.updates: list[tuple[int, int, Any]] = []
        self.interrupt_after: int | None = None  # updates of the bar
        self.unloaded = 0
        comfy = self

        class ProgressBar:
            def __init__(self, total: int, node_id: str | None = None) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                comfy.updates.append((value, total or self.total, preview))

        def throw_exception_if_processing_interrupted() -> None:
            if comfy.interrupt_after is not None and len(comfy.updates) >= comfy.interrupt_after:
                raise Interrupted

        def unload_all_models() -> None:
            comfy.unloaded += 1

        number, widget = ("default", "min", "max", "step", "force_input", "display_mode"), ("default",)
        io = ModuleType("io")
        io.Image, io.Combo = _kind(), _kind(*widget, "options", "control_after_generate")
        io.Int, io.Float = _kind(*number, "control_after_generate"), _kind(*number, "round")
        io.Boolean, io.ComfyNode = _kind(*widget, "label_on", "label_off"), type("ComfyNode", (), {})
        io.Schema, io.NodeOutput = Schema, NodeOutput
        folders: dict[str, tuple[list[str], set[str]]] = {}
        self.modules = {
            "comfy": {},
            "comfy.utils": {"ProgressBar": ProgressBar},
            "comfy.model_management": {
                "throw_exception_if_processing_interrupted": throw_exception_if_processing_interrupted,
                "unload_all_models": unload_all_models,
            },
            "comfy_api": {},
            "comfy_api.latest": {"io": io, "ComfyExtension": Extension},
            "folder_paths": {
                "models_dir": str(models),
                "folder_names_and_paths": folders,
                "get_folder_paths": lambda name: list(folders[name][0]),
                "add_model_folder_path": lambda name, path: folders.setdefault(name, ([], set()))[0].append(
                    path
                ),
            },
        }

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make the modules importable for one test."""
        for name, content in self.modules.items():
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
