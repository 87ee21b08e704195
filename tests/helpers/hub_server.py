"""A server with the part of the Hugging Face hub's protocol that huggingface_hub uses for models."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

SMALL = (".json", ".md")
"""Other files than these are in the storage of large files, which has another host name, as on the hub."""

TOKEN = "hf_test"


@dataclass
class Repository:
    """The commits of a repository by hash, and its branches and tags by name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch and return the hash of the commit."""
        whole = self.commits.get(self.refs.get(branch, ""), {}) | files
        digest = hashlib.sha1(str(len(self.commits)).encode())
        for name, data in sorted(whole.items()):
            digest.update(name.encode() + data)
        self.refs[branch] = commit = digest.hexdigest()
        self.commits[commit] = whole
        return commit


class HubServer(ThreadingHTTPServer):
    """The server; `requests` lists "METHOD path" of all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url, self.storage = (f"http://{host}:{self.server_port}" for host in ("127.0.0.1", "localhost"))
        self.reset()

    def reset(self) -> None:
        """Forget all repositories and requests."""
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # the storage of large files, by SHA-256
        self.requests: list[str] = []
        self.tokens: list[str] = []
        self.told_sizes: dict[str, int] = {}  # sizes that listings report, by file name
        self.broken_off: set[str] = set()  # paths whose content ends early
        self.read_only = False  # tokens may not write
        self.status = 0  # the answer to every request; 0 is the right one
        self.messages: list[str] = []  # of commits

    def repository(self, name: str, directory: Path | None = None, **how: Any) -> Repository:
        """Create a repository, with the files of a directory as its first commit."""
        self.repositories[name] = made = Repository(**how)
        if directory:
            made.commit({path.name: path.read_bytes() for path in directory.iterdir()})
        return made

    def count(self, method: str, part: str = "") -> int:
        """Return the number of requests of a method whose paths contain a text."""
        return sum(each.startswith(f"{method} ") and part in each for each in self.requests)


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a server in a thread during a `with` block."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {path}")
        self.server.tokens.append(self.headers.get("Authorization", ""))
        if self.server.status:
            return self._fail(self.server.status)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.startswith("/large/"):
            return self._large(path.rpartition("/")[2], body)
        owner, name = path.removeprefix("/api/models").split("/")[1:3]
        name = name.removesuffix(".git")
        rest = path.partition(f"/{owner}/{name}")[2].removeprefix(".git").strip("/")
        return self._repository(f"{owner}/{name}", rest, body)

    def _repository(self, name: str, rest: str, body: bytes) -> None:
        found = self.server.repositories.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None or (found.private and not known):
            return self._fail(404 if known else 401, "RepoNotFound")
        what, _, which = rest.partition("/")
        if what == "info":
            return self._batch(json.loads(body))
        if what in ("preupload", "commit") and self.server.read_only:
            return self._fail(403)
        if what == "preupload":
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "regular" if each["path"].endswith(SMALL) else "lfs",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if what == "commit":
            return self._commit(name, found, which, body)
        if what == "revision":
            return self._listing(name, found, which)
        return self._file(found, *self._revision(found, which))

    def _revision(self, found: Repository, text: str) -> tuple[str, str]:
        """Return the revision at the beginning of a path, which may contain slashes, and the file."""
        for known in sorted((*found.refs, *found.commits), key=len, reverse=True):
            if text.startswith(f"{known}/"):
                return found.refs.get(known, known), text.removeprefix(f"{known}/")
        return "", text.rpartition("/")[2]

    def _create(self, wanted: dict[str, Any]) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._fail(401)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.server.repositories:
            return self._json({"url": f"{self.server.url}/{name}"}, 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        made = self.server.repository(name, private=bool(private))
        made.commit({".gitattributes": b""})
        return self._json({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.storage}/large/{each['oid']}"}}}
            for each in wanted["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _large(self, digest: str, body: bytes) -> None:
        if self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == digest
            self.server.large[digest] = body
            return self._send(b"")
        return self._send(self.server.large[digest])

    def _commit(self, name: str, found: Repository, branch: str, body: bytes) -> None:
        files: dict[str, bytes] = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.server.messages.append(value["summary"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        commit = found.commit(files, branch)
        url = f"{self.server.url}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _listing(self, name: str, found: Repository, revision: str) -> None:
        commit = found.refs.get(revision, revision)
        if commit not in found.commits:
            return self._fail(404, "RevisionNotFound")
        siblings = []
        for file, data in found.commits[commit].items():
            size = self.server.told_sizes.get(file, len(data))
            entry: dict[str, Any] = {"rfilename": file, "size": size, "blobId": "0" * 40}
            if not file.endswith(SMALL):
                entry["lfs"] = {"size": size, "sha256": _sha256(data), "pointerSize": 130}
            siblings.append(entry)
        return self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []})

    def _file(self, found: Repository, commit: str, file: str) -> None:
        if found.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._fail(403, "GatedRepo")
        if commit not in found.commits:
            return self._fail(404, "RevisionNotFound")
        data = found.commits[commit].get(file)
        if data is None:
            return self._fail(404, "EntryNotFound", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if file.endswith(SMALL):
            return self._send(data, 200, headers)
        digest = _sha256(data)
        self.server.large[digest] = data
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        return self._send(b"", 302, headers | {"Location": f"{self.server.storage}/large/{digest}"})

    def _fail(self, status: int, code: str = "", headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        self._send(b"", status, named | (headers or {}))

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        wanted = self.headers.get("Range", "")
        if wanted and status == 200:
            body, status = body[int(wanted.removeprefix("bytes=").partition("-")[0]) :], 206
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            if any(part in self.path for part in self.server.broken_off):
                body = body[: len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def connect(server: HubServer, patch: pytest.MonkeyPatch, home: Path) -> None:
    """Let huggingface_hub use this server and an empty cache.

    The library reads its environment variables when it is imported, so its constants are set.
    """
    constants = huggingface_hub.constants
    patch.delenv("HF_TOKEN", raising=False)
    patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    values = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in values.items():
        patch.setattr(constants, name, value)
