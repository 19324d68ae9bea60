"""A hub on this machine for huggingface_hub: repositories that are directories, each with one commit, a branch `main` and a tag `v1`."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_GATED = "gated"
"""Repositories of this organisation are gated."""


@dataclass
class Hub:
    """A hub that runs."""

    address: str
    requests: list[str] = field(default_factory=list)
    """Method and path of each."""

    @property
    def downloads(self) -> list[str]:
        """Names of the files that were sent, sorted."""
        return sorted(line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line)


@contextmanager
def fake_hub(repositories: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve `org/name` -> directory."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            parts = unquote(urlparse(self.path).path).strip("/").split("/")
            parts = parts[2:] if parts[:2] == ["api", "models"] else parts
            name, rest = "/".join(parts[:2]), parts[2:]
            if name.startswith(_GATED):
                self.send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
            elif name not in repositories:
                self.send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"})
            elif rest[1] not in ("main", "v1", COMMIT):
                self.send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"})
            else:
                self.answer(name, repositories[name], rest)

        do_HEAD = do_GET

        def answer(self, name: str, folder: Path, rest: list[str]) -> None:
            """`revision/NAME` describes a repository, `tree/COMMIT` lists its files, `resolve/COMMIT/FILE` is one of them."""
            files = sorted(path for path in folder.iterdir() if path.is_file())
            if rest[0] == "revision":
                document = {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": path.name} for path in files]}
                self.send(200, json.dumps(document).encode(), {})
            elif rest[0] == "tree":
                entries = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _tag(path)} for path in files]
                self.send(200, json.dumps(entries).encode(), {})
            else:
                path = folder / rest[2]
                self.send(200, path.read_bytes(), {"ETag": f'"{_tag(path)}"', "X-Repo-Commit": COMMIT})

        def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


def _tag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
