"""As much of the hub's HTTP interface as reading a repository takes, out of folders on this machine.

The hub's own libraries ask it; no test needs the network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40
KINDS = ("models", "datasets")


class _Answers(BaseHTTPRequestHandler):
    """Repositories lie in ``root``/KIND/OWNER/NAME; one revision each."""

    root: Path
    protocol_version = "HTTP/1.1"  # for "keep-alive", on which the libraries rely

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"X_Repo_Commit": COMMIT, "Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            self._tell(parts[1], self.root.joinpath(*parts[1:4]), parts[4:])
        else:
            kind, *parts = parts if parts[0] in KINDS else ("models", *parts)
            self._give(self.root.joinpath(kind, *parts[:2]), "/".join(parts[4:]))  # after "resolve" and a revision

    do_HEAD = do_POST = do_GET

    def _tell(self, kind: str, folder: Path, asked: list[str]) -> None:
        """What a repository holds: in short, or with ``asked`` being tree/REVISION[/FOLDER] in full."""
        if kind not in KINDS or not folder.is_dir():
            return self._send(b"", 404, X_Error_Code="RepoNotFound")
        held = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        if asked[:1] == ["tree"]:
            below = "/".join(asked[2:])
            files = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in held.items()
                if path.startswith(below)
            ]
            return self._send(json.dumps(files).encode())
        name, files = f"{folder.parent.name}/{folder.name}", [{"rfilename": path} for path in held]
        self._send(json.dumps({"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": files}).encode())

    def _give(self, folder: Path, path: str) -> None:
        if not (folder / path).is_file():
            return self._send(b"", 404, X_Error_Code="EntryNotFound" if folder.is_dir() else "RepoNotFound")
        content, part, status = (folder / path).read_bytes(), slice(None), 200
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept_Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            part, status = slice(int(first), int(last) + 1 if last else len(content)), 206
            etag["Content_Range"] = f"bytes {part.start}-{min(part.stop, len(content)) - 1}/{len(content)}"
        self._send(content[part], status, **etag)


@contextmanager
def hub(root: Path) -> Iterator[str]:
    """The address of one that has the repositories of a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"root": root}))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
