"""A model hub on loopback for the tests, which can also fail.

It answers what huggingface_hub asks of a model or a data set: its revision, its tree, HEAD and ranged GET of a file, with the
commit, ETag, size and SHA-256 (of large files) that the real one sends. `fail` makes the next answers for a file go wrong.
Every request is recorded in `requests`. Use the `hub` fixture of conftest.py, or `FakeHub` as a context manager.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

Failure = Literal["429", "500", "cut", "short", "long", "corrupt"]
LFS = (".safetensors", ".gguf", ".model")


@dataclass
class Repo:
    """One repository. `revisions`: name (branch, tag) to commit; every commit has the same files."""

    folder: Path
    revisions: dict[str, str]
    gated: bool = False

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


@dataclass
class Request:
    """What was asked."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class FakeHub:
    """The server. `url` goes into `HF_ENDPOINT`."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    failures: dict[str, list[Failure]] = field(default_factory=dict)
    retry_after: int = 0
    delay: float = 0.0
    """Seconds between the first and the second half of a weight file."""

    def add(self, repo_id: str, folder: Path, *revisions: str, gated: bool = False) -> Repo:
        """Publishes a folder, as a model and as a data set."""
        names = revisions or ("main",)
        commit = {name: hashlib.sha1(f"{repo_id}@{name}".encode()).hexdigest() for name in names}  # noqa: S324
        self.repos[repo_id] = Repo(folder, commit, gated)
        return self.repos[repo_id]

    def fail(self, file: str, *failures: Failure) -> None:
        """The next answers to a GET of `file` fail: status 429 or 500, connection cut in the middle, a body that is too
        `short` or too `long` for its announced size, or `corrupt` (right size, a flipped bit)."""
        self.failures.setdefault(file, []).extend(failures)

    def asked_for(self, method: str = "GET") -> list[str]:
        """Names of the files that were requested."""
        return [r.path.split("/resolve/")[1].split("/", 1)[1] for r in self.requests_of(method)]

    def requests_of(self, method: str = "GET") -> list[Request]:
        return [r for r in self.requests if r.method == method and "/resolve/" in r.path]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
        for pattern, answer in (
            (r"/api/(?:models|datasets)/([^/]+/[^/]+)/(?:revision|tree)/(.+)", self._about),
            (r"/api/(?:models|datasets)/([^/]+/[^/]+)()", self._about),
            (r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", self._file),
        ):
            if match := re.fullmatch(pattern, path):
                repo = self.hub.repos.get(match[1])
                if repo is None:
                    return self._error(404, "RepoNotFound")
                if repo.gated and not token:
                    return self._error(401, "GatedRepo")
                revision = match[2] or "main"
                commit = repo.revisions.get(revision, revision)
                if commit not in repo.revisions.values():
                    return self._error(404, "RevisionNotFound")
                return answer(match[1], repo, commit, *match.groups()[2:])
        return self._error(404, "")

    def _about(self, repo_id: str, repo: Repo, commit: str) -> None:
        tree = []
        for file in repo.files():
            entry = {"type": "file", "path": file.relative_to(repo.folder).as_posix(), "size": file.stat().st_size}
            entry["oid"] = hashlib.sha1(file.read_bytes()).hexdigest()  # noqa: S324
            if file.name.endswith(LFS):
                entry["lfs"] = {"oid": _sha256(file), "size": file.stat().st_size, "pointerSize": 134}
            tree.append(entry)
        if "/tree/" in self.path:
            return self._json(tree)
        siblings = [{"rfilename": entry["path"], "size": entry["size"]} for entry in tree]
        about = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": commit, "private": False}
        return self._json({**about, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def _file(self, _repo_id: str, repo: Repo, commit: str, name: str) -> None:
        path = repo.folder / name
        if not path.is_file():
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        content = path.read_bytes()
        sha256 = _sha256(path) if name.endswith(LFS) else None
        headers = {"X-Repo-Commit": commit, "ETag": f'"{sha256 or hashlib.sha1(content).hexdigest()}"'}  # noqa: S324
        if sha256:
            headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        headers["Accept-Ranges"] = "bytes"
        failures = self.hub.failures.get(name) if self.command == "GET" else None
        return self._send(content, headers, failures.pop(0) if failures else None)

    def _send(self, content: bytes, headers: dict[str, str], failure: Failure | None) -> None:
        if failure in ("429", "500"):
            extra = {"Retry-After": str(self.hub.retry_after)} if failure == "429" else {}
            return self._error(int(failure), "", extra)
        start, status = 0, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match[1]), int(match[2] or len(content) - 1) + 1
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content = content[start:stop]
        body = content
        if failure in ("cut", "short"):
            body = content[: len(content) // 2]
        elif failure == "long":
            body = content + b"\0" * 64
        elif failure == "corrupt":
            body = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        # `cut` announces the whole and breaks off; the others announce what they send
        self.send_header("Content-Length", str(len(content) if failure == "cut" else len(body)))
        self.end_headers()
        if self.command == "GET":
            self._write(body)
        if failure == "cut":
            self.wfile.flush()
            self.close_connection = True
        return None

    def _write(self, body: bytes) -> None:
        half = len(body) // 2 if self.hub.delay and self.path.endswith(LFS) and "Range" not in self.headers else 0
        with contextlib.suppress(OSError):  # who asked may go away
            self.wfile.write(body[:half])
            if half:
                for _ in range(int(self.hub.delay * 10)):
                    time.sleep(0.1)
                    self.wfile.write(body[half : half + 1])
                    half += 1
            self.wfile.write(body[half:])

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
