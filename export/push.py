"""Uploading an engine directory to a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesr.export.model_card import CARD_NAME, model_card
from moesr.runtime.engine import hub
from moesr.runtime.engine.hub_names import SCHEME, HubName, parse
from moesr.runtime.engine.manifest_file import MANIFEST_NAME, read_manifest
from moesr.runtime.errors import OutputError, UsageError


def check_target(repository: str) -> HubName:
    """Return the name of a repository to which an engine can be pushed.

    UsageError is raised if the name is wrong, or if the library or a token is missing.
    """
    name = parse(SCHEME + repository.removeprefix(SCHEME))
    if name.revision:
        raise UsageError(
            f"--push {repository}: engines are pushed to the branch main; leave out @{name.revision}"
        )
    library = hub.library()
    if library.constants.HF_HUB_OFFLINE:
        raise UsageError("--push needs the network, but HF_HUB_OFFLINE is set; unset it")
    if not library.get_token():
        raise UsageError("--push needs a token; log in with: hf auth login (or set HF_TOKEN)")
    return name


def push(directory: Path, repository: str, *, private: bool = False, message: str = "") -> str:
    """Upload an engine to `owner/name` and return its name with the commit, hf://owner/name@commit.

    The manifest, the files that it names and a model card are uploaded as one commit, after their hashes were
    compared. A missing repository is created, `private` or public; an existing one keeps its visibility.
    Raises EngineError if the directory holds no sound engine, UsageError as `check_target`, and OutputError
    if the upload fails.
    """
    name, library = check_target(repository), hub.library()
    manifest = read_manifest(directory)
    try:
        api = library.HfApi()
        api.create_repo(name.repository, private=private or None, exist_ok=True)
        card = model_card(manifest, directory, name.repository, _earlier_card(library, name))
        names = [file.file for file in manifest.files] + [MANIFEST_NAME]
        contents: dict[str, Any] = {file: directory / file for file in names} | {CARD_NAME: card.encode()}
        made = api.create_commit(
            name.repository,
            [library.CommitOperationAdd(file, content) for file, content in contents.items()],
            commit_message=message or f"Upload the engine {manifest.name} in {manifest.precision}",
        )
    except MemoryError:
        raise
    except Exception as error:  # those of the HTTP library depend on the library's version
        raise OutputError(
            f"{_explained(library, name, error)}; the engine in {directory} is complete, push it with: "
            f"moesr-export {directory} --push {name.repository}"
        ) from error
    return str(HubName(name.repository, made.oid))


def _earlier_card(library: Any, name: HubName) -> str | None:
    """Return the card that the repository has, or None."""
    try:
        path = library.hf_hub_download(name.repository, CARD_NAME)
    except (library.errors.EntryNotFoundError, library.errors.RevisionNotFoundError) as error:
        if isinstance(error, library.errors.LocalEntryNotFoundError):  # the network failed
            raise
        return None
    return Path(path).read_text(encoding="utf-8")


def _explained(library: Any, name: HubName, error: Exception) -> str:
    """Return the reason why an upload failed, with a cure."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        tokens = f"{library.constants.ENDPOINT}/settings/tokens"
        return f"{name}: the token may not write there; make one with write access at {tokens}"
    return str(hub.explained(library, name, error))
