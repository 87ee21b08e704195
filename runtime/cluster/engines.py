"""Engines on every node: a directory that all nodes share, a bundled engine, or a URL that is copied once."""

from __future__ import annotations

import tempfile
from pathlib import Path, PurePosixPath

from moesr.runtime.cluster.places import Bucket, is_url, missing, place_of
from moesr.runtime.engine.hub_names import is_hub_name, origin_of
from moesr.runtime.engine.locate import demo_name, engine_directory
from moesr.runtime.engine.manifest_file import MANIFEST_NAME
from moesr.runtime.errors import EngineError, InputError
from moesr.runtime.system import user_cache
from moesr.runtime.system.files import reason, scratch_directory, sha256_of, sweep


def name_for_nodes(engine: Path | str | None) -> str:
    """Return the name by which every node finds the engine: a URL, a bundled engine, or an absolute path.

    An engine of the Hugging Face hub is downloaded here, so that its name can hold the commit: all nodes then
    use the same one.
    """
    if isinstance(engine, str) and is_hub_name(engine):
        return origin_of(engine_directory(engine))
    if is_url(str(engine or "")):
        return str(engine)
    return demo_name(engine) or str(engine_directory(engine).absolute())


def engine_on_this_node(name: str) -> Path:
    """Return the directory of an engine named by `name_for_nodes`.

    The files behind the URL of a bucket are copied into the user's cache, under the hash of the manifest, by
    one process of a node at a time. EngineError if that is not possible.
    """
    if not is_url(name) or is_hub_name(name):
        return engine_directory(name)
    place = place_of(name.rstrip("/"))
    if not isinstance(place, Bucket):
        return engine_directory(place.name("").rstrip("/"))
    try:
        from filelock import FileLock
    except ImportError as error:
        raise missing("filelock") from error
    base = (user_cache.directory() or Path(tempfile.gettempdir(), "moesr")) / "engines"
    try:
        with tempfile.TemporaryDirectory(prefix="moesr-") as folder:
            manifest, _ = place.fetch(MANIFEST_NAME, Path(folder))
            digest = hash_of(manifest)
        base.mkdir(parents=True, exist_ok=True)
        target = base / digest
        with FileLock(base / f"{digest}.lock"):
            sweep(base, again=True)  # a killed process leaves its copy behind
            if not target.exists():
                _copy(place, target)
        return target
    except OSError as error:
        raise EngineError(f"{name}: cannot be copied to {base}: {reason(error)}") from error
    except InputError as error:
        raise EngineError(f"{name}: {error}; name the URL of an engine directory") from error


def _copy(place: Bucket, target: Path) -> None:
    """Copy all files of an engine; the directory `target` exists only when all of them are complete."""
    with scratch_directory(target.parent) as scratch:
        copy = scratch / target.name
        for key, _ in place.entries(recursive=True):
            folder = copy / PurePosixPath(key).parent
            if ".." in PurePosixPath(key).parts:
                raise EngineError(f"{place.name(key)}: lies outside of the engine")
            folder.mkdir(parents=True, exist_ok=True)
            place.fetch(key, folder)
        if hash_of(copy / MANIFEST_NAME) != target.name:
            raise EngineError(f"{place.url}: the engine was replaced while it was copied; run again")
        try:
            copy.rename(target)
        except OSError:
            if not target.is_dir():  # another node has made it if the nodes share a cache without locks
                raise


def hash_of(manifest: Path) -> str:
    """Return the name of an engine in the cache."""
    return sha256_of(manifest)[:16]
