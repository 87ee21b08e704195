"""Saved latents of unfinished images, so that a large image goes on where a killed process left it.

With the option `checkpoint_every` N the latent of an image is saved after every N sampling steps. The file is
named after a hash of the input's pixels, the settings and the engine, and the same hash is inside it. It is
written atomically and removed when the result has been written. A file that is damaged, or that holds another
image's latent, is ignored with a warning; saved latents that were not used for UNUSED_AGE_S are removed.

A saved latent is what the sampler would have had at this step, to the bit, and noise is a function of the
step. So the result equals that of an uninterrupted run, if it goes on with the same backend and version.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesr.runtime.loop.settings import Settings
from moesr.runtime.system import files

FOLDER, ENDING = "unfinished", ".npz"

UNUSED_AGE_S = 30 * 86_400
"""Saved latents that were not written for so long are removed."""

log = logging.getLogger("moesr")


@dataclass(frozen=True)
class State:
    """The sampler after so many steps: latent and x0 of the step before, float32 [C, H, W]."""

    steps: int
    z: np.ndarray
    history: np.ndarray | None


@dataclass(frozen=True)
class SavedLatents:
    """The directory with the saved latents of one engine. `engine` identifies its files and the backend."""

    cache: Path
    engine: str

    def of(self, settings: Settings, *pixels: np.ndarray | None) -> SavedSteps:
        """The saved steps of an image, which its pixels and the settings identify."""
        digest = hashlib.sha256(json.dumps([self.engine, settings.recorded()], sort_keys=True).encode())
        for array in pixels:
            if array is not None:
                digest.update(f"{array.shape} {array.dtype}".encode())
                digest.update(np.ascontiguousarray(array).data)
        key = digest.hexdigest()
        folder = self.cache / FOLDER
        _remove_unused(folder)
        return SavedSteps(folder / f"{key[:32]}{ENDING}", key, settings.checkpoint_every)


class SavedSteps:
    """The saved steps of one image."""

    def __init__(self, path: Path, key: str, every: int) -> None:
        self.path, self.every = path, every
        self._key = key
        self._failed = False

    def load(self, shape: tuple[int, ...], total: int, *, history: bool) -> State | None:
        """The state that was saved last; None if there is none that fits a run of `total` steps."""
        if not self.path.exists():
            return None
        try:
            files.check_file(self.path)
            with np.load(self.path, allow_pickle=False) as data:
                values: dict[str, Any] = {name: data[name] for name in data.files}
            state = State(int(values["steps"]), values["z"], values.get("history"))
            arrays = [state.z, *([state.history] if state.history is not None else [])]
            fits = all(a.shape == shape and a.dtype == np.float32 and np.isfinite(a).all() for a in arrays)
            if str(values["key"]) != self._key or history != (state.history is not None):
                raise ValueError("it belongs to another image")
            if not (fits and 0 < state.steps < total):
                raise ValueError("its latent does not fit")
        except Exception as error:  # a damaged archive may raise anything
            log.warning("%s: saved steps are ignored and made again: %s", self.path, files.reason(error))
            return None
        log.info("%s: going on after step %d of %d", self.path.name, state.steps, total)
        return state

    def save(self, state: State) -> None:
        """Write a state in place of the one before; the first failure is a warning, and no more is saved."""
        if self._failed:
            return
        values: dict[str, Any] = {"key": self._key, "steps": state.steps, "z": state.z}
        if state.history is not None:
            values["history"] = state.history
        try:
            with files.write_atomically(self.path) as stream:
                np.savez(stream, **values)
        except OSError as error:
            self._failed = True
            log.warning("%s: steps cannot be saved: %s", self.path, files.reason(error))

    def remove(self) -> None:
        """Remove the file, if there is one."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def _remove_unused(folder: Path) -> None:
    """Remove old saved latents, and temporary files of killed processes."""
    with contextlib.suppress(OSError):
        if not folder.is_dir():
            return
        files.sweep(folder)
        for path in folder.glob(f"*{ENDING}"):
            if time.time() - path.stat().st_mtime > UNUSED_AGE_S:
                path.unlink(missing_ok=True)
