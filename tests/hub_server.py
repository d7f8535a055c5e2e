"""A hub on loopback: enough of the Hugging Face HTTP API for `huggingface_hub` to list and download models, and for `datasets` to load
data sets, through HF_ENDPOINT; and to make repositories and commit files to them.

A data set is a repository whose name begins with "datasets/", as in the addresses of its files. Large files are redirected to a second
address, as the real hub does with its CDN, and served with Range. There is no Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

REPO = r"((?:datasets/)?[^/]+/[^/]+)"
LARGE = 1 << 16  # bytes from which a file counts as stored in LFS


@dataclass
class Repo:
    """Commits by hash, each a folder's files; branches by name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    readers: set[str] | None = None  # tokens that may read it; None: anybody


class Request(NamedTuple):
    method: str
    path: str
    range: str | None


class HubServer:
    """`with HubServer() as hub:` serves on a free port; `hub.requests` is what was asked for."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: set[str] = set()  # valid ones
        self.requests: list[Request] = []
        self.cut: dict[str, list[int]] = {}  # by file name: after how many bytes to drop the connection, one entry for each time
        self.broken: set[str] = set()  # file names answered with HTTP 500
        self.wrong: dict[str, bytes] = {}  # by file name: what is sent in the place of the content
        self.elsewhere: HubServer | None = None  # another host, which large files come from
        self.authorizations: list[str] = []  # of all requests that had one
        self.uploads: dict[str, bytes] = {}  # large files on their way into a commit, by SHA-256
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def push(self, repo: str, folder: Path, *, branch: str = "main") -> str:
        """Commit the files of `folder`; returns the commit's hash."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        commit = hashlib.sha1(b"".join(name.encode() + content for name, content in files.items())).hexdigest()
        self.repos.setdefault(repo, Repo()).commits[commit] = files
        self.repos[repo].branches[branch] = commit
        return commit

    def downloads(self, name: str) -> list[Request]:
        """The GET requests for the content of the file `name`."""
        return [request for request in self.requests if request.method == "GET" and request.path.endswith(f"/{name}")]


def _entries(files: dict[str, bytes]) -> list[dict[str, object]]:
    """The files and folders of a commit as the hub lists them."""
    folders = sorted({path[: i.start()] for path in files for i in re.finditer("/", path)})
    entries: list[dict[str, object]] = [
        {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()} for path in folders
    ]
    for path, content in files.items():
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if len(content) >= LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        entries.append(entry)
    return entries


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            hub.uploads[self.path.rpartition("/")[2]] = self._body()
            self._send(200, {}, b"")

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(Request(self.command, path, None))
            body = self._body()
            if (self.headers.get("Authorization") or "").removeprefix("Bearer ") not in hub.tokens:
                return self._error(401)
            if path == "/api/validate-yaml":
                return self._json({"errors": [], "warnings": []})
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            action = re.fullmatch(rf"/(?:api/models/)?{REPO}(?:/(preupload|commit)/main|\.git/info/lfs/objects/(batch))", path)
            if action is None or action[1] not in hub.repos:
                return self._error(404, "RepoNotFound")
            if action[2] == "preupload":
                files = [
                    {"path": file["path"], "uploadMode": "lfs" if file["size"] >= LARGE else "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return self._json({"files": files})
            if action[3]:
                objects = [
                    {**entry, "actions": {"upload": {"href": f"{hub.url}/upload/{entry['oid']}"}}} for entry in json.loads(body)["objects"]
                ]
                return self._json({"transfer": "basic", "objects": objects})
            return self._commit(action[1], [json.loads(line) for line in body.splitlines()])

        def _body(self) -> bytes:
            if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _create(self, asked: dict[str, str]) -> None:
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            there = name in hub.repos
            hub.repos.setdefault(name, Repo({"0" * 40: {}}, {"main": "0" * 40}))
            document = json.dumps({"url": f"{hub.url}/{name}", "name": name}).encode()
            self._send(409 if there else 200, {"Content-Type": "application/json"}, document)

        def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
            repo = hub.repos[name]
            files = dict(repo.commits[repo.branches["main"]])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.uploads[value["oid"]]
            commit = hashlib.sha1(b"".join(path.encode() + content for path, content in files.items())).hexdigest()
            repo.commits[commit], repo.branches["main"] = files, commit
            self._json({"success": True, "commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit})

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(Request(self.command, path, self.headers.get("Range")))
            if self.headers.get("Authorization"):
                hub.authorizations.append(self.headers["Authorization"])
            listing = re.fullmatch(rf"/api/{REPO}(?:/(revision|tree)/([^/]+)(?:/(.+))?)?", path.replace("/api/models/", "/api/", 1))
            file = re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", path)
            blob = re.fullmatch(rf"/cdn/{REPO}/([^/]+)/(.+)", path)
            match = listing or file or blob
            if match is None:
                return self._error(404)
            repo = hub.repos.get(match[1])
            if blob is None and not self._allowed(repo):
                return None
            assert repo is not None
            if listing:
                return self._list(match[1], repo, listing[2] or "revision", listing[3] or "main", listing[4])
            commit = repo.branches.get(match[2], match[2])
            content = repo.commits.get(commit, {}).get(match[3])
            if content is None:
                return self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return self._file(match[1], commit, match[3], content, redirect=blob is None and len(content) >= LARGE)

        def _allowed(self, repo: Repo | None) -> bool:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token and token not in hub.tokens:
                self._error(401, None, {"X-Error-Message": "Invalid credentials in Authorization header"})
            elif repo is None:
                self._error(404 if token else 401, "RepoNotFound")
            elif repo.readers is not None and token not in repo.readers:
                self._error(403 if token else 401, "GatedRepo")
            else:
                return True
            return False

        def _list(self, name: str, repo: Repo, what: str, revision: str, folder: str | None) -> None:
            commit = repo.branches.get(revision, revision)
            if commit not in repo.commits:
                return self._error(404, "RevisionNotFound")
            files = repo.commits[commit]
            if what == "revision":
                return self._json(
                    {"id": name.removeprefix("datasets/"), "sha": commit, "siblings": [{"rfilename": path} for path in files]}
                )
            prefix = f"{folder}/" if folder else ""
            entries = [entry for entry in _entries(files) if str(entry["path"]).startswith(prefix)]
            if "recursive=true" not in self.path.lower():
                entries = [entry for entry in entries if "/" not in str(entry["path"])[len(prefix) :]]
            if not entries and folder:
                return self._error(404, "EntryNotFound")
            return self._json(entries)

        def _file(self, repo: str, commit: str, name: str, content: bytes, *, redirect: bool) -> None:
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            headers = {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if redirect:
                headers |= {
                    "X-Linked-Etag": etag,
                    "X-Linked-Size": str(len(content)),
                    "Location": f"{(hub.elsewhere or hub).url}/cdn/{repo}/{commit}/{name}",
                }
                return self._send(302, headers, b"")
            if self.command == "GET" and name in hub.broken:
                return self._error(500)
            content = hub.wrong.get(name, content)
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            if wanted is None:
                return self._send(200, headers, content, name)
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self._send(206, headers, content[start:], name)

        def _json(self, data: object) -> None:
            self._send(200, {"Content-Type": "application/json"}, json.dumps(data).encode())

        def _error(self, status: int, code: str | None = None, headers: dict[str, str] | None = None) -> None:
            self._send(status, (headers or {}) | ({"X-Error-Code": code} if code else {}), b"")

        def _send(self, status: int, headers: dict[str, str], body: bytes, name: str | None = None) -> None:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if name is not None and hub.cut.get(name):
                body = body[: hub.cut[name].pop(0)]
                self.close_connection = True
            self.wfile.write(body)

    return Handler
