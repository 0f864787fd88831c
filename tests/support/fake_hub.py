"""A hub on this machine: what the real `huggingface_hub` client needs to push folders and to fetch files, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Repositories by kind (models, datasets) and name, each with files by path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.unknown: list[str] = []
        """Requests that this hub does not know."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub while the block runs."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def run_beside(hub: FakeHub, folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, with this hub, and with its caches in `folder`."""
    here = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_nobody", "HF_HOME": str(folder / "hf")}
    here |= {"MM_MOSLORA_CACHE": str(folder / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=os.environ | here, capture_output=True, text=True, timeout=300
    )


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self._parts()
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = "/".join(filter(None, ("me", asked["name"].rpartition("/")[2])))
            self.server.files.setdefault((asked.get("type", "model") + "s", name), {})
            self._json({"url": f"{self.server.url}/{name}", "id": name, "name": name})
        elif parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif parts[4:5] == ["preupload"]:
            files = [item["path"] for item in json.loads(body)["files"]]
            self._json({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]})
        elif parts[4:5] == ["commit"]:
            for item in map(json.loads, body.splitlines()):
                if item["key"] == "file":
                    self._repository(parts[1], parts)[item["value"]["path"]] = base64.b64decode(
                        item["value"]["content"]
                    )
            self._json({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.url}/me/x/commit/{COMMIT}"})
        elif parts[4:5] == ["paths-info"]:
            asked = json.loads(body)["paths"]
            self._json([item for item in self._tree(parts, "", recursive=True) if item["path"] in asked])
        else:
            self._refuse()

    def do_GET(self) -> None:
        parts = self._parts()
        if parts[:2] == ["api", "whoami-v2"]:
            self._json({"name": "me", "type": "user", "orgs": []})
        elif parts[:1] == ["api"] and parts[4:5] == ["tree"]:
            self._json(self._tree(parts, "/".join(parts[6:]), recursive="recursive=true" in self.path.lower()))
        elif parts[:1] == ["api"] and parts[1] in ("models", "datasets") and (*parts[1:2], "/".join(parts[2:4])) in (
            self.server.files
        ):  # fmt: skip
            names = sorted(self._repository(parts[1], parts))
            about = {"id": "/".join(parts[2:4]), "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
            self._json(about | {"siblings": [{"rfilename": name} for name in names], "likes": 0})
        elif "resolve" in parts[2:4]:
            self._file(parts)
        else:
            self._refuse()

    do_HEAD = do_GET

    def _parts(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _repository(self, kind: str, parts: list[str]) -> dict[str, bytes]:
        return self.server.files[kind, "/".join(parts[2:4])]

    def _tree(self, parts: list[str], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for path, data in self._repository(parts[1], parts).items():
            above = path.split("/")[:-1]
            for depth in range(1, len(above) + 1):
                name = "/".join(above[:depth])
                found[name] = {"type": "directory", "path": name, "oid": COMMIT, "size": 0}
            found[path] = {"type": "file", "path": path, "oid": _oid(data), "size": len(data)}
        below = f"{folder}/" if folder else ""
        return [
            item for name, item in sorted(found.items())
            if name.startswith(below) and (recursive or "/" not in name[len(below) :])
        ]  # fmt: skip

    def _file(self, parts: list[str]) -> None:
        kind, rest = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts)
        data = self.server.files.get((kind, "/".join(rest[:2])), {}).get("/".join(rest[4:]))
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        first, last = 0, len(data)
        if asked := self.headers.get("Range"):
            low, _, high = asked.removeprefix("bytes=").partition("-")
            first, last = int(low), min(last, int(high) + 1 if high else last)
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {first}-{last - 1}/{len(data)}"
        self._send(206 if asked else 200, data[first:last], headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self) -> None:
        self.server.unknown.append(f"{self.command} {self.path}")
        self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
