"""Seconds per tile of an engine's graphs on this machine, kept in the user's cache from run to run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping

from moesr.runtime.backends.autotune import machine
from moesr.runtime.backends.selection import Backend
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.system import user_cache

FOLDER = "seconds"
"""The folder of these files in the cache directory."""


def recall(backend: Backend, manifest: Manifest) -> dict[str, float]:
    """Return the seconds per tile by role that an earlier run measured; empty if there are none."""
    found = user_cache.read(_name(backend, manifest))
    if not isinstance(found, dict):
        return {}
    return {
        role: float(value)
        for role, value in found.items()
        if role in manifest.graphs and isinstance(value, (int, float)) and 0 < value < math.inf
    }


def keep(backend: Backend, manifest: Manifest, seconds: Mapping[str, float]) -> None:
    """Keep measured seconds per tile beside those of graphs that did not run this time."""
    if seconds:
        user_cache.write(_name(backend, manifest), {**recall(backend, manifest), **seconds})


def _name(backend: Backend, manifest: Manifest) -> str:
    graphs = {
        role: [file.sha256 for arrangement in graph.arrangements for file in arrangement.files]
        for role, graph in manifest.graphs.items()
    }
    options = backend.options
    facts = [graphs, backend.label, backend.version, options.device, options.threads, machine()]
    return f"{FOLDER}/{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}.json"
