"""A hub on the loopback interface: enough of the Hugging Face API for huggingface_hub itself."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves ``folder`` as the model ``owner/name`` at `COMMIT`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
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
        return {path.partition(COMMIT + "/")[2] for method, path, _ in self.seen if method == "GET"}


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
        if path in ("/api/models/owner/name", "/api/models/owner/name/revision/main"):
            self._send_info()
        elif path.startswith(f"/owner/name/resolve/{COMMIT}/"):
            self._send_file(path.partition(COMMIT + "/")[2], body=body)
        else:
            code = "RevisionNotFound" if "/revision/" in path else "RepoNotFound"
            self._send(404, b"", {"X-Error-Code": code})

    def _send_info(self) -> None:
        files = sorted(f for f in self.server.folder.rglob("*") if f.is_file())
        siblings = [
            {
                "rfilename": file.relative_to(self.server.folder).as_posix(),
                "size": file.stat().st_size,
            }
            for file in files
        ]
        info = {"id": "owner/name", "sha": COMMIT, "private": False, "siblings": siblings}
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _send_file(self, name: str, *, body: bool) -> None:
        content = (self.server.folder / name).read_bytes()
        headers = {
            "X-Repo-Commit": COMMIT,
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
