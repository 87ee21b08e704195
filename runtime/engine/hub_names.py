"""Names of engines on the Hugging Face hub: `hf://owner/name` and `hf://owner/name@revision`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from moesr.runtime.errors import UsageError

SCHEME = "hf://"

_PART = r"(?![-.])[A-Za-z0-9._-]+(?<![-.])"
_REPOSITORY = re.compile(rf"(?=.{{3,96}}$)(?!.*(--|\.\.|\.git$)){_PART}/{_PART}")
_REVISION = re.compile(r"(?=.{1,250}$)(?!.*(\.\.|//|/\.|@\{|\.lock$|[/.]$))(?![-./])[\w.+=/@-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A repository, and a branch, tag or commit of it; None stands for the branch main."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='/')}" if self.revision else ""
        return f"{SCHEME}{self.repository}{revision}"

    @property
    def commit(self) -> str | None:
        """The revision if it is a full commit hash, which always means the same files."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None


def is_hub_name(text: object) -> bool:
    """Return True if a text names an engine of the hub."""
    return isinstance(text, str) and text.startswith(SCHEME)


def parse(text: str) -> HubName:
    """Return the parts of a name; UsageError if it is not `hf://owner/name` with or without `@revision`."""
    repository, at, revision = text.removeprefix(SCHEME).partition("@")
    revision = unquote(revision)
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(
            f"{text}: not a repository of the Hugging Face hub; expected hf://owner/name or "
            "hf://owner/name@revision, with letters, digits, '-', '_' and '.' in owner and name"
        )
    if at and not _REVISION.fullmatch(revision):
        raise UsageError(f"{text}: the revision is {revision!r}, expected a branch, a tag or a commit")
    return HubName(repository, revision if at else None)


def name_of(repository: str, revision: str | None = None) -> str:
    """Return the name of `owner/name`, which may begin with hf:// already; UsageError if it is not valid."""
    text = SCHEME + repository.removeprefix(SCHEME)
    if revision is None:
        return str(parse(text))
    if "@" in text:
        raise UsageError(f"{repository}: has a revision already; leave out revision={revision!r}")
    return str(parse(f"{text}@{quote(revision, safe='/')}"))


def origin_of(directory: Path) -> str:
    """Return the name, with the commit, of an engine in the cache of the hub's library; "" for any other."""
    parts = directory.absolute().parts[-3:]
    if len(parts) < 3 or parts[1] != "snapshots" or not _COMMIT.fullmatch(parts[2]):
        return ""
    kind, _, repository = parts[0].partition("--")
    repository = repository.replace("--", "/", 1)
    name = f"{SCHEME}{repository}@{parts[2]}"
    return name if kind == "models" and _REPOSITORY.fullmatch(repository) else ""
