"""A Hugging Face hub on 127.0.0.1: as much of its API as the client needs to download and upload models. Standard library only.

Model info, the tree of a revision, and files with ETag, X-Repo-Commit and byte ranges; for what is wrong the hub's own
X-Error-Code. Every request is logged.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """revisions: the files of each branch by path; the branch's commit follows from them."""

    revisions: dict[str, dict[str, bytes]]
    token: str | None = None  # private: only this token sees that the repository is there
    gated: bool = False  # seen by all, its files for nobody

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a branch or a commit."""
        for name, files in self.revisions.items():
            commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
            if revision in (name, commit):
                return commit, files
        return None


@dataclass
class HubServer:
    """Serves while it is entered. down: answer every request with status 500. writer: whose token may write."""

    repositories: dict[str, Repository]
    down: bool = False
    writer: str | None = None
    requests: list[tuple[str, str]] = field(default_factory=list)  # method, path

    def __enter__(self) -> Self:
        hub: HubServer = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def downloads(self) -> list[str]:
        """The files that were fetched, by name, in alphabetical order."""
        return sorted(path.rsplit("/", 1)[1] for method, path in self.requests if method == "GET" and "/resolve/" in path)


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server_hub.requests.append((self.command, path))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if self.server_hub.down:
            return self.answer(500)
        if api is not None:
            name, what, revision = api[1], api[2] or "revision", api[3] or "main"
        elif file is not None:
            name, what, revision = file[1], "file", file[2]
        else:
            return self.answer(404)
        repository = self.server_hub.repositories.get(name)
        allowed = repository and repository.token in (None, self.headers.get("Authorization", "").removeprefix("Bearer "))
        if repository is None or not allowed:  # the hub does not tell a stranger that a private repository exists
            return self.answer(401, error="RepoNotFound")
        found = repository.find(revision)
        if found is None:
            return self.answer(404, error="RevisionNotFound")
        commit, files = found
        if what == "revision":
            return self.answer(200, json.dumps({"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files]}))
        if what == "tree":
            tree = [{"type": "file", "path": f, "size": len(data), "oid": etag(data)} for f, data in files.items()]
            return self.answer(200, json.dumps(tree))
        assert file is not None
        if repository.gated:
            return self.answer(403, error="GatedRepo")
        if file[3] not in files:
            return self.answer(404, error="EntryNotFound", commit=commit)
        self.send_file(files[file[3]], commit)

    def do_POST(self) -> None:
        """Make a repository, or commit files into its main; every file comes in the commit itself."""
        path, content = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub = self.server_hub
        hub.requests.append((self.command, path))
        if hub.down:
            return self.answer(500)
        if path == "/api/validate-yaml":  # of a card
            return self.answer(200, json.dumps({"errors": [], "warnings": []}))
        if hub.writer is None or self.headers.get("Authorization") != f"Bearer {hub.writer}":
            return self.answer(401)
        if path == "/api/repos/create":
            values = json.loads(content)
            name = "/".join(filter(None, (values.get("organization"), values["name"])))
            there = name in hub.repositories
            hub.repositories.setdefault(name, Repository({"main": {}}, hub.writer if values.get("private") else None))
            return self.answer(409 if there else 200, json.dumps({"url": f"{hub.endpoint}/{name}", "id": name}))
        upload = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if upload is None or upload[1] not in hub.repositories:
            return self.answer(404, error="RepoNotFound")
        if upload[2] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(content)["files"]
            ]
            return self.answer(200, json.dumps({"files": files}))
        branch = hub.repositories[upload[1]].revisions["main"]
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                branch[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = hashlib.sha1(content).hexdigest()
        return self.answer(200, json.dumps({"commitUrl": f"{hub.endpoint}/{upload[1]}/commit/{commit}", "commitOid": commit}))

    def send_file(self, data: bytes, commit: str) -> None:
        part = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(part[1]) if part else 0
        self.send_response(206 if part else 200)
        if part:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{etag(data)}"')
        self.send_header("X-Repo-Commit", commit)
        self.body(data[start:])

    def answer(self, status: int, text: str = "", error: str | None = None, commit: str | None = None) -> None:
        self.send_response(status)
        for header, value in (("X-Error-Code", error), ("X-Repo-Commit", commit)):
            if value:
                self.send_header(header, value)
        self.send_header("Content-Type", "application/json")
        self.body(text.encode())

    def body(self, data: bytes) -> None:
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def etag(data: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
