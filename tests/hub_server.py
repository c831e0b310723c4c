"""A hub on the loopback interface: enough of the Hugging Face API for huggingface_hub itself."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
#: Another one, for a branch that moves.
LATER = "89abcdef0123456789abcdef0123456789abcdef"


class Hub(ThreadingHTTPServer):
    """Serves ``folder`` as the model ``owner/name``, whose branch main stands at `COMMIT`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        #: Commit -> the files at it.
        self.commits = {COMMIT: folder}
        #: What main stands for, and where it moves to when it has been listed once.
        self.main = COMMIT
        self.moves_to: str | None = None
        #: Changes to the next listings, one each: fields as JSON has them, or another answer.
        self.listings: list[Any] = []
        #: File -> the size that listings tell.
        self.told: dict[str, Any] = {}
        #: File -> the bytes that are sent for it, whatever was told.
        self.inflated: dict[str, int] = {}
        #: Files that the hub does not send.
        self.broken: set[str] = set()
        #: Method, path and Range header of every request.
        self.seen: list[tuple[str, str, str | None]] = []
        #: Bytes of each file that were sent.
        self.sent: Counter[str] = Counter()
        #: Files whose first download is cut off in the middle.
        self.cut_once: set[str] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloaded(self) -> set[str]:
        files = (path.partition("/resolve/")[2] for method, path, _ in self.seen if method == "GET")
        return {path.partition("/")[2] for path in files}


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    with Hub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append((self.command, path, self.headers.get("Range")))
        hub = self.server
        asked = path.removeprefix("/api/models/owner/name").removeprefix("/revision/")
        commit, _, name = path.removeprefix("/owner/name/resolve/").partition("/")
        if asked in ("", "main"):
            self._send_info(hub.main)
            hub.main, hub.moves_to = hub.main if hub.moves_to is None else hub.moves_to, None
        elif asked in hub.commits:
            self._send_info(asked)
        elif name in hub.broken:
            self._send(403, b"", {})
        elif commit in hub.commits:
            self._send_file(commit, name, body=body)
        else:
            code = "RevisionNotFound" if "/revision/" in path else "RepoNotFound"
            self._send(404, b"", {"X-Error-Code": code})

    def _send_info(self, commit: str) -> None:
        folder = self.server.commits[commit]
        files = {
            file.relative_to(folder).as_posix(): file.stat().st_size
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        siblings = [
            {"rfilename": name, "size": self.server.told.get(name, size)}
            for name, size in files.items()
        ]
        info: Any = {"id": "owner/name", "sha": commit, "private": False, "siblings": siblings}
        if self.server.listings:
            change = self.server.listings.pop(0)
            info = {**info, **change} if isinstance(change, dict) else change
        answer = info if isinstance(info, bytes) else json.dumps(info).encode()
        self._send(200, answer, {"Content-Type": "application/json"})

    def _send_file(self, commit: str, name: str, *, body: bool) -> None:
        content = (self.server.commits[commit] / name).read_bytes()
        if body and name in self.server.inflated:
            self._send_more(name, self.server.inflated[name])
            return
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        status, start, end = 200, 0, len(content)
        wanted = self.headers.get("Range")
        if wanted is not None:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first)
            end = min(end, int(last) + 1) if last else end
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            status = 206
        part = content[start:end]
        self.server.sent[name] += len(part) if body else 0
        cut = body and name in self.server.cut_once
        self._send(status, part, headers, send=len(part) // 2 if cut else None, body=body)
        if cut:
            self.server.cut_once.discard(name)
            self.close_connection = True

    def _send_more(self, name: str, size: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.close_connection = True
        with suppress(ConnectionError):  # whoever is told too much hangs up
            for start in range(0, size, 10**6):
                self.wfile.write(b"\0" * min(10**6, size - start))
                self.server.sent[name] += 10**6

    def _send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str],
        *,
        send: int | None = None,
        body: bool = True,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(content if send is None else content[:send])
