"""Downloading engines from repositories of the Hugging Face hub.

The library huggingface_hub downloads them into its own cache, which its environment variables control
(`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`). The manifest comes first. Then come the files that
it names, after they were found in the repository and fit on the disk; no other file is downloaded.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesr.runtime.engine.hub_names import HubName, parse
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import MANIFEST_NAME, parse_manifest
from moesr.runtime.engine.manifest_file import MAX_BYTES as MAX_MANIFEST_BYTES
from moesr.runtime.errors import EngineError, MoesrError, UsageError
from moesr.runtime.system.files import reason
from moesr.runtime.system.memory import readable

log = logging.getLogger("moesr")


def directory_of(text: str) -> Path:
    """Return the directory of an engine of the hub, after downloading the files that the cache lacks.

    The hub is asked for the commit of a branch or tag every time. If it cannot be reached, or may not be
    (`HF_HUB_OFFLINE`), the commit that was used last serves. Raises UsageError for a wrong name or if the
    library is not installed, and EngineError if the engine cannot be downloaded.
    """
    name, hub = parse(text), library()
    if name.commit and (found := _cached(hub, name)):
        return found
    try:
        listing = _Listing.of(hub, name, name.revision)
    except MemoryError:
        raise
    except hub.errors.RevisionNotFoundError as error:
        raise explained(hub, name, error) from error
    except Exception as error:  # those of the HTTP library depend on the library's version
        found = _cached(hub, name)
        if not found:
            raise explained(hub, name, error) from error
        if not isinstance(error, hub.errors.OfflineModeIsEnabled):
            told = str(explained(hub, name, error)).removeprefix(f"{name}: ")
            log.warning("%s: the downloaded commit %.8s is used, because %s", name, found.name, told)
        return found
    try:
        with _bars(hub):
            return _download(hub, name, listing)
    except (MoesrError, MemoryError):
        raise
    except Exception as error:
        raise explained(hub, name, error) from error


@dataclass(frozen=True)
class _Listing:
    """The files of one commit: their sizes, and the hashes of those in the hub's storage of large files."""

    commit: str
    sizes: dict[str, int]
    hashes: dict[str, str]

    @classmethod
    def of(cls, hub: Any, name: HubName, revision: str | None) -> _Listing:
        """Ask the hub for the files of a revision."""
        seconds = float(hub.constants.HF_HUB_ETAG_TIMEOUT)
        info = hub.HfApi().model_info(
            name.repository, revision=revision or "main", files_metadata=True, timeout=seconds
        )
        found = info.siblings or []
        return cls(
            str(info.sha),
            {each.rfilename: each.size or 0 for each in found},
            {each.rfilename: each.lfs.sha256 for each in found if each.lfs},
        )


def _download(hub: Any, name: HubName, listing: _Listing) -> Path:
    """Download the manifest and what it names; return the directory."""
    size = listing.sizes.get(MANIFEST_NAME)
    if size is None:
        raise EngineError(
            f"{name}: the repository has no {MANIFEST_NAME}, so it holds no engine; name another, or push "
            "one with moesr-export --push"
        )
    if size > MAX_MANIFEST_BYTES:
        raise EngineError(
            f"{name}: its {MANIFEST_NAME} has {readable(size)}, expected at most "
            f"{readable(MAX_MANIFEST_BYTES)}; tell the owner of the repository"
        )
    directory = Path(
        hub.hf_hub_download(name.repository, MANIFEST_NAME, revision=name.revision or "main")
    ).parent
    if directory.name != listing.commit:  # a commit arrived in between, or the hub failed to answer
        listing = _Listing.of(hub, name, directory.name)
    manifest = parse_manifest(directory)
    _check_listing(name, manifest, listing)
    missing = [file.file for file in manifest.files if not (directory / file.file).is_file()]
    if not missing:
        return directory
    size = sum(listing.sizes[file] for file in missing)
    _check_room(hub, name, size)
    log.info("%s: downloading %s in %d files", name, readable(size), len(missing))
    for file in missing:
        hub.hf_hub_download(name.repository, file, revision=directory.name)
    return directory


def _check_listing(name: HubName, manifest: Manifest, listing: _Listing) -> None:
    """Raise EngineError if a file that the manifest names is not in the repository or is another one."""
    for file in manifest.files:
        if file.file not in listing.sizes:
            raise EngineError(
                f"{name}: the manifest names {file.file!r}, which the repository does not have; its owner "
                "has to push the engine again"
            )
        if listing.hashes.get(file.file, file.sha256) != file.sha256:
            raise EngineError(
                f"{name}: {file.file!r} in the repository has SHA-256 {listing.hashes[file.file][:12]}.., "
                f"the manifest says {file.sha256[:12]}..; its owner has to push the engine again"
            )


def _check_room(hub: Any, name: HubName, size: int) -> None:
    """Raise EngineError if the disk of the library's cache has no room for a download."""
    cache = Path(hub.constants.HF_HUB_CACHE).absolute()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise EngineError(
            f"{name}: its files need {readable(size)}, {readable(free)} are free in {cache}; free some, or "
            "set HF_HOME to a directory on another disk"
        )


@contextlib.contextmanager
def _bars(hub: Any) -> Iterator[None]:
    """Keep the library from showing bars, during a `with` block, if only warnings are to be shown."""
    if log.level <= logging.INFO or hub.utils.are_progress_bars_disabled():
        yield
        return
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.utils.enable_progress_bars()


def _cached(hub: Any, name: HubName) -> Path | None:
    """Return the directory of an engine all of whose files are in the cache, or None."""
    try:
        path = hub.hf_hub_download(
            name.repository, MANIFEST_NAME, revision=name.revision or "main", local_files_only=True
        )
    except hub.errors.LocalEntryNotFoundError:
        return None
    directory = Path(path).parent
    named = parse_manifest(directory).files
    return directory if all((directory / file.file).is_file() for file in named) else None


def explained(hub: Any, name: HubName, error: Exception) -> EngineError:
    """Return the error that tells in plain words why the library failed, with a cure."""
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    login = "log in with: hf auth login (or set HF_TOKEN)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        text = f"access must be granted; ask for it at {endpoint}/{name.repository}, then {login}"
    elif isinstance(error, errors.RevisionNotFoundError):
        revision, page = name.revision or "main", f"{endpoint}/{name.repository}"
        text = f"the repository has no branch, tag or commit {revision!r}; they are listed at {page}"
    elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        text = f"{endpoint} has no such repository, or it is private; check the name, or {login}"
    elif isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        cache = hub.constants.HF_HUB_CACHE
        text = f"not all of its files are in {cache}, and HF_HUB_OFFLINE forbids downloads; unset it once"
    elif status:
        text = f"{endpoint} answers with status {status}; try again later"
    else:
        text = (
            f"{endpoint} cannot be reached, or broke off ({_first_line(error)}); check the network and run "
            "again, which continues the download"
        )
    return EngineError(f"{name}: {text}")


def _first_line(error: Exception) -> str:
    return next(iter(reason(error).splitlines()), "")[:200]


def library() -> Any:
    """Return the module huggingface_hub; UsageError if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise UsageError(
            "engines of the Hugging Face hub need huggingface_hub; install it with: pip install 'moesr[hub]'"
        ) from error
    return huggingface_hub
