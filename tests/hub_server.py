"""A hub on this machine: a server that speaks the few endpoints which downloads use, for the real client."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the hub has: a folder for each id, those that are gated, and what it was asked for.

    Attributes:
      repositories: `models/org/name` or `datasets/org/name` -> a local folder.
      gated: such names, whose files it does not give.
      cut: files that it breaks off in the middle.
      asked: the paths of files that it was asked for, in order.
    """

    def __init__(self):
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.cut: set[str] = set()
        self.asked: list[str] = []
        self.url = ""

    def answer(self, path: str) -> tuple[int, dict, bytes]:
        """Returns status, headers and body for a path."""
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        api = parts[0] == "api"
        kind = parts[1] if api else "datasets" if parts[0] == "datasets" else "models"
        rest = parts[2:] if api else parts[kind == "datasets" :]
        name, rest = "/".join([kind, *rest[:2]]), rest[2:]
        folder = self.repositories.get(name)
        if folder is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        if api and rest[:1] == ["tree"]:
            entries = [{"path": file, "size": (folder / file).stat().st_size, "oid": _oid(folder / file)} for file in files]
            return 200, {}, json.dumps([{"type": "file", **entry} for entry in entries]).encode()
        if api:
            listed = [{"rfilename": file} for file in files]
            return 200, {}, json.dumps({"id": name.partition("/")[2], "sha": COMMIT, "siblings": listed}).encode()
        file = "/".join(rest[2:])
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        self.asked.append(file)
        return 200, {"ETag": f'"{_oid(folder / file)}"', "X-Repo-Commit": COMMIT}, (folder / file).read_bytes()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serving():
    """Yields a `Hub` that answers at its `url`."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self._answer(head=True)

        def do_GET(self):
            self._answer(head=False)

        def _answer(self, head):
            status, headers, body = hub.answer(self.path)
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]) if status == 200 else 0
            if start:
                status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            if not head:
                whole = Path(self.path).name not in hub.cut
                self.wfile.write(body[start:] if whole else body[start : (start + len(body)) // 2])
                self.close_connection = not whole

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
