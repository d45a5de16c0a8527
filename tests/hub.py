"""A hub on loopback: the parts of the hub's HTTP API that huggingface_hub 2.4 uses, over real sockets.

Two servers, as in life: the hub itself, and the storage of large files on another origin, which must never see a token.
Large files (LFS) are answered by a redirect to the storage with X-Linked-Size and X-Linked-ETag, small ones by a
relative redirect to the hub's own cache; both serve ranges. HF_ENDPOINT is read when huggingface_hub is imported, so
clients run as processes of their own, with `Hub.env`.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from tasks.runtime.process.launch import CHECKOUT
from tests.hub_upload import Uploads, batch, committed, front_matter_errors, modes, put

LFS = (".safetensors", ".bin", ".parquet")
PAGE = 3  # entries of a tree listing a page (the real hub: 1,000), so that every test turns pages


class Seen(NamedTuple):
    """A request as a server got it."""

    server: str
    method: str
    path: str
    range: str | None
    token: str | None
    status: int


@dataclass(kw_only=True)
class Repository:
    """Commits, branches and tags of one repository, who may read its files, and sizes that its listing claims."""

    gated: bool = False
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], *, branch: str = "main") -> str:
        """Add a commit and let a branch name it; returns its 40 hex digits."""
        text = repr((self.branches.get(branch), sorted((name, _sha256(data)) for name, data in files.items())))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """Commit of a branch, tag or commit."""
        named = self.branches.get(revision) or self.tags.get(revision)
        return named or (revision if revision in self.commits else None)


@dataclass(kw_only=True)
class Fault:
    """Drop the connection of a download after so many bytes of the body, `times` times (None: always)."""

    path: str
    after: int
    times: int | None


class Refused(Exception):
    """An answer that is an error, with the headers that the client reads."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """The hub and its storage; use as a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: dict[str, set[str]] = {}  # token -> gated or private repositories that it may read
        self.faults: list[Fault] = []
        self.uploads = Uploads()
        self.seen: list[Seen] = []
        self.down = False  # answers 503
        self._servers = {name: _server(self, name) for name in ("hub", "storage")}

    def __enter__(self) -> Hub:
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def url(self, name: str = "hub") -> str:
        """Address of the hub or of the storage."""
        return f"http://127.0.0.1:{self._servers[name].server_port}"

    def env(self, home: Path, *, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """Environment of a client: its cache below `home`, no Xet, and this hub."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        ours |= {"HF_ENDPOINT": self.url(), "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        ours |= {"PYTHONPATH": str(CHECKOUT)} | ({"HF_TOKEN": token} if token else {})
        return ours | ({"HF_HUB_OFFLINE": "1"} if offline else {})

    def add(self, name: str, files: Path | Mapping[str, bytes], *, dataset: bool = False, **how: bool) -> Repository:
        """A repository with one commit on main, from a folder or from bytes by name."""
        repository = self.repositories[f"datasets/{name}" if dataset else name] = Repository(**how)
        repository.commit(read_folder(files) if isinstance(files, Path) else files)
        return repository

    @contextmanager
    def dropping(self, path: str, *, after: int, times: int | None = None) -> Iterator[None]:
        """Break downloads of files whose name ends with `path`."""
        fault = Fault(path=path, after=after, times=times)
        self.faults.append(fault)
        try:
            yield
        finally:
            self.faults.remove(fault)


def read_folder(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _server(hub: Hub, name: str) -> ThreadingHTTPServer:
    handler = type(f"{name}Handler", (_Handler,), {"hub": hub, "name": name})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    name: str
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: requests are in Hub.seen."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        try:
            if self.hub.down:
                raise Refused(503, None, "Service Unavailable")
            if self.command == "PUT":
                self._store(parts[-1])
            elif self.command == "POST":
                self._write(parts)
            elif self.name == "storage":
                self._bytes(_stored(self.hub, parts[-1]), {}, name=parse_qs(url.query)["name"][0])
            elif parts[0] == "api" and parts[1] == "resolve-cache":
                self._small(parts)
            elif parts[0] == "api":
                self._api(parts, {key: values[0] for key, values in parse_qs(url.query).items()})
            else:
                self._resolve(parts)
        except Refused as error:
            body = json.dumps({"error": str(error)}).encode()
            code = {"X-Error-Code": error.code} if error.code else {}
            self._send(error.status, {**code, "X-Error-Message": str(error), "Content-Type": "application/json"}, body)

    # ---- who may

    @property
    def _token(self) -> str | None:
        given = self.headers.get("Authorization")
        return given.removeprefix("Bearer ") if given else None

    def _open(self, key: str, *, files: bool) -> Repository:
        """The repository, if this client may see it; `files`: if it may read its files."""
        repository, token = self.hub.repositories.get(key), self._token
        if token is not None and token not in self.hub.tokens:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        may = token is not None and key in self.hub.tokens[token]
        if repository is None or (repository.private and not may):
            raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        if repository.gated and files and not may:
            said = f"Access to {key} is restricted"
            raise Refused(403 if token else 401, "GatedRepo", said)
        return repository

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = repository.find(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # ---- writing

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _store(self, oid: str) -> None:
        """PUT of a large file to the storage."""
        data = self._body()
        if self.hub.uploads.failing or not put(data, oid, self.hub.uploads):
            raise Refused(403, None, "the storage does not take it")
        self._send(200, {}, b"")

    def _write(self, parts: list[str]) -> None:
        """Everything that is posted; only accounts may."""
        body = self._body()
        account = self.hub.uploads.accounts.get(self._token or "")
        if account is None:
            raise Refused(401, None, "Invalid username or password.")
        if parts == ["api", "validate-yaml"]:
            errors = [{"message": one} for one in front_matter_errors(json.loads(body)["content"])]
            return self._json({"errors": errors, "warnings": []}, status=400 if errors else 200)
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body), account.owners, account.role)
        key = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2]).removesuffix(".git")
        repository = self.hub.repositories[key]
        if key.split("/")[0] not in account.owners or account.role == "read":
            raise Refused(403, None, f"Forbidden: you may not write to {key}")
        if parts[-1] == "batch":
            objects = batch(json.loads(body)["objects"], self.hub.uploads, self.hub.url("storage"))
            return self._json({"transfer": "basic", "objects": objects})
        there = repository.commits.get(repository.branches.get("main", ""), {})
        if parts[4] == "preupload":
            return self._json({"files": modes(json.loads(body)["files"], LFS, there)})
        sha = repository.commit(committed(body, there, self.hub.uploads))
        return self._json({"commitUrl": f"{self.hub.url()}/{key}/commit/{sha}", "commitOid": sha, "success": True})

    def _create(self, asked: dict[str, Any], owners: tuple[str, ...], role: str) -> None:
        key = f"{asked['organization']}/{asked['name']}"
        if key in self.hub.repositories:
            raise Refused(409, None, "You already created this model repo")
        if asked["organization"] not in owners or role == "read":
            raise Refused(403, None, f'You don\'t have the rights to create a model under "{asked["organization"]}"')
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add(key, {".gitattributes": b"*.safetensors filter=lfs"}, private=private)
        self.hub.tokens.setdefault(self._token or "", set()).add(key)
        self._json({"url": f"{self.hub.url()}/{key}"})

    # ---- the API

    def _api(self, parts: list[str], query: dict[str, str]) -> None:
        """/api/{models|datasets}/org/name[/revision/REV | /tree/REV | /refs]."""
        if parts[1] == "whoami-v2":
            return self._whoami()
        kind, name, rest = parts[1], "/".join(parts[2:4]), parts[4:]
        key = f"datasets/{name}" if kind == "datasets" else name
        repository = self._open(key, files=False)
        if rest == ["refs"]:
            return self._json(
                {
                    "branches": [_ref(name, sha, "heads") for name, sha in repository.branches.items()],
                    "tags": [_ref(name, sha, "tags") for name, sha in repository.tags.items()],
                    "converts": [],
                }
            )
        commit = self._commit(repository, rest[1] if rest else "main")
        files = repository.commits[commit]
        if rest[:1] == ["tree"]:
            return self._tree(repository, files, int(query.get("cursor", 0)))
        named = [{"rfilename": one} for one in files]
        return self._json({"id": name, "sha": commit, "private": repository.private, "siblings": named, "tags": []})

    def _whoami(self) -> None:
        account = self.hub.uploads.accounts.get(self._token or "")
        if account is None:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        self._json(account.as_whoami())

    def _tree(self, repository: Repository, files: dict[str, bytes], start: int) -> None:
        entries = [_entry(name, data) | _claimed(repository, name) for name, data in files.items()]
        more = {}
        if start + PAGE < len(entries):
            following = f"{self.hub.url()}{urlsplit(self.path).path}?recursive=true&cursor={start + PAGE}"
            more = {"Link": f'<{following}>; rel="next"'}
        self._json(entries[start : start + PAGE], more)

    def _resolve(self, parts: list[str]) -> None:
        """/[datasets/]org/name/resolve/REV/PATH: a redirect, whose headers say all about the file."""
        at = parts.index("resolve")
        key, revision, path = "/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :])
        repository = self._open(key, files=True)
        commit = self._commit(repository, revision)
        data = repository.commits[commit].get(path)
        if data is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        if path.endswith(LFS):
            oid = _sha256(data)
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{oid}"', "X-Repo-Commit": commit}
            self._send(302, {**linked, "Location": f"{self.hub.url('storage')}/lfs/{oid}?name={path}"}, b"")
        else:
            self._send(307, {"Location": f"/api/resolve-cache/{key}/{commit}/{path}", "X-Repo-Commit": commit}, b"")

    def _small(self, parts: list[str]) -> None:
        """/api/resolve-cache/[datasets/]org/name/COMMIT/PATH."""
        width = 3 if parts[2] == "datasets" else 2
        repository = self._open("/".join(parts[2 : 2 + width]), files=True)
        commit, path = parts[2 + width], "/".join(parts[3 + width :])
        data = repository.commits[commit][path]
        self._bytes(data, {"X-Repo-Commit": commit, "ETag": f'"{_blob(data)}"'}, name=path)

    # ---- answers

    def _json(self, value: Any, headers: Mapping[str, str] | None = None, *, status: int = 200) -> None:
        self._send(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())

    def _bytes(self, data: bytes, headers: Mapping[str, str], *, name: str) -> None:
        """A file, whole or from the first byte of a Range on, unless a fault is due."""
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        about = {**headers, "Accept-Ranges": "bytes"}
        if self.headers.get("Range"):
            about["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        fault = next((one for one in self.hub.faults if name.endswith(one.path) and one.times != 0), None)
        whole = data[start:]
        if fault and self.command == "GET":
            fault.times = None if fault.times is None else fault.times - 1
            self.close_connection = True
        cut = fault.after if fault and self.command == "GET" else None
        self._send(206 if self.headers.get("Range") else 200, about, whole, cut=cut)

    def _send(self, status: int, headers: Mapping[str, str], body: bytes, *, cut: int | None = None) -> None:
        self.hub.seen.append(Seen(self.name, self.command, self.path, self.headers.get("Range"), self._token, status))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])


def _stored(hub: Hub, oid: str) -> bytes:
    commits = [files for one in hub.repositories.values() for files in one.commits.values()]
    return next(data for files in commits for data in files.values() if _sha256(data) == oid)


def _blob(data: bytes) -> str:
    """Git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
    return entry | (
        {"lfs": {"oid": _sha256(data), "size": len(data), "pointerSize": 134}} if name.endswith(LFS) else {}
    )


def _claimed(repository: Repository, name: str) -> dict[str, int]:
    return {"size": repository.sizes[name]} if name in repository.sizes else {}


def _ref(name: str, commit: str, kind: str) -> dict[str, str]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}
