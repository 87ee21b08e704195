"""Finding an engine by its directory, the name of a bundled engine, or its name on the Hugging Face hub."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from moesr.runtime.engine import hub, hub_names
from moesr.runtime.engine.manifest_file import MANIFEST_NAME
from moesr.runtime.errors import EngineError
from moesr.runtime.system.files import examine

DEMO_ENGINES = ("demo-x4", "demo-x8")
"""Names of the engines that are bundled with the package; the first is the default."""


def demo_name(given: Path | str | None) -> str | None:
    """Return the name in DEMO_ENGINES that `given` stands for, the first for None; None if it is a path."""
    if given is None:
        return DEMO_ENGINES[0]
    return str(given) if str(given) in DEMO_ENGINES and not Path(given).exists() else None


def engine_directory(engine: Path | str | None = None) -> Path:
    """Return the directory of an engine: a path, a name in DEMO_ENGINES, or hf://owner/name@revision.

    None stands for the first name in DEMO_ENGINES. A directory of that name in the current folder takes
    precedence over the bundled engine. An engine of the hub is downloaded, see `hub.directory_of`. Raises
    EngineError if there is no such directory or the bundled engine is not installed.
    """
    if isinstance(engine, str) and hub_names.is_hub_name(engine):
        return hub.directory_of(engine)
    name = demo_name(engine)
    if name is None:
        path = Path(str(engine))
        if len(path.parts) == 1 and examine(path, EngineError) is None:
            raise EngineError(
                f"{path}: no such engine directory, and no bundled engine of this name "
                f"({', '.join(DEMO_ENGINES)}); choose one of these, or make it with moesr-export -o {path}"
            )
        return path
    path = Path(str(importlib.resources.files("moesr.runtime") / "demo_engines" / name))
    if not (path / MANIFEST_NAME).is_file():
        raise EngineError(
            f"this installation has no bundled demo engine ({path}); name an engine directory, "
            "made with moesr-export -o DIR"
        )
    return path
