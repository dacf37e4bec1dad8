"""A Hub on this machine: the part of its HTTP interface that pushing and loading models need, over real HTTP.

    with HubStandIn() as hub:
        environment = {**os.environ, **hub.environment(cache)}  # for a child process, read when it imports

Repositories live in memory: `hub.files("me/model")` is what `main` holds. Every file is uploaded "regular" (no LFS).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN, USER = "hf_standin_write", "me"


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.commits: list[dict] = [{"sha": "0" * 40, "message": "initial commit", "files": {}}]
        self.branches = {"main": self.commits[0]}

    def find(self, revision: str) -> dict | None:
        known = {**{commit["sha"]: commit for commit in self.commits}, **self.branches}
        return known.get(unquote(revision))

    def commit(self, branch: str, lines: list[dict]) -> str:
        files = dict(self.branches[branch]["files"])
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[path]
            else:
                raise ValueError(f"unexpected operation {line['key']}")
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.branches[branch] = {"sha": sha, "message": lines[0]["value"]["summary"], "files": files}
        self.commits.append(self.branches[branch])
        return sha


class HubStandIn:
    """Attributes: `repositories` by id; `cut_off`, ids of repositories whose next commit loses its connection half-way
    through the upload; `requests`, method and path of all requests."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.cut_off: set[str] = set()
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            standin = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache) -> dict[str, str]:
        proxies = {name: "127.0.0.1" for name in ("no_proxy", "NO_PROXY")}
        settings = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
        return {**settings, **proxies, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repo_id].branches[revision]["files"]

    def messages(self, repo_id: str) -> list[str]:
        return [commit["message"] for commit in self.repositories[repo_id].commits]


class _Handler(BaseHTTPRequestHandler):
    standin: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_) -> None:
        pass

    def _answer(self) -> None:
        path, hub = self.path.partition("?")[0], self.standin
        hub.requests.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            if match[1] in hub.cut_off:
                hub.cut_off.remove(match[1])
                self.rfile.read(100)  # some of it has arrived
                self.close_connection = True
                self.connection.close()
                return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command == "POST" else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        if token and token != TOKEN:
            self._send(
                401, {"error": "Invalid username or password."}, message="Invalid credentials in Authorization header"
            )
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body), bool(token))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?", path):
            self._model(match[1], match[2] or "revision", match[3] or "main", body, bool(token))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], unquote(match[3]), bool(token))
        else:
            self._send(404, {"error": f"the stand-in has no {path}"})

    def _create(self, wanted: dict, may_write: bool) -> None:
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        is_private = wanted.get("private", False) or wanted.get("visibility") == "private"
        if not may_write:
            self._send(401, {"error": "Unauthorized"})
            return
        is_new = name not in self.standin.repositories
        if is_new:
            self.standin.repositories[name] = Repository(is_private)
        self._send(200 if is_new else 409, {"url": f"{self.standin.url}/{name}", "name": name, "id": name})

    def _model(self, name: str, what: str, revision: str, body: bytes, may_write: bool) -> None:
        repository = self.standin.repositories.get(name)
        if repository is None or repository.private and not may_write:
            self._send(404, {"error": "Repository not found"}, code="RepoNotFound")
            return
        if what == "branch":
            is_new = revision not in repository.branches
            repository.branches.setdefault(revision, repository.branches["main"])
            self._send(200 if is_new else 409, {"error": "Reference already exists"})
            return
        commit = repository.find(revision)
        if commit is None:
            self._send(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
        elif self.command == "POST" and not may_write:
            self._send(401, {"error": "Unauthorized"})
        elif what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})
        elif what == "commit":
            sha = repository.commit(revision, [json.loads(line) for line in body.splitlines()])
            self._send(200, {"commitUrl": f"{self.standin.url}/{name}/commit/{sha}", "commitOid": sha})
        elif what == "tree":
            sizes = {path: len(content) for path, content in commit["files"].items()}
            self._send(200, [{"type": "file", "path": p, "size": size, "oid": "0" * 40} for p, size in sizes.items()])
        else:
            siblings = [{"rfilename": path} for path in commit["files"]]
            info = {"id": name, "sha": commit["sha"], "private": repository.private, "siblings": siblings}
            self._send(200, {**info, "tags": [], "downloads": 0})

    def _file(self, name: str, revision: str, path: str, may_read: bool) -> None:
        repository = self.standin.repositories.get(name)
        if repository is None or repository.private and not may_read:
            self._send(401 if repository else 404, {"error": "Repository not found"}, code="RepoNotFound")
        elif (commit := repository.find(revision)) is None:
            self._send(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
        elif path not in commit["files"]:
            self._send(404, {"error": "Entry not found"}, code="EntryNotFound", commit=commit["sha"])
        else:
            self._send(200, commit["files"][path], commit=commit["sha"])

    def _send(self, status: int, content, code: str = "", message: str = "", commit: str = "") -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream" if content is data else "application/json")
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        named = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        for header, value in named.items():
            if value:
                self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)
