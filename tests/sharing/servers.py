"""Servers on loopback: a static web server that fails on purpose, and an S3-compatible one."""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

FAULTS = ("500", "503", "reset", "truncated", "altered", "short", "slow")


class StaticServer:
    """Serves a folder by GET and HEAD, nothing else: no listing.

    Args:
        folder: what is served.
        ranges: whether Range is honoured, with entity tags.
        latency: seconds before each answer.
        faults: kinds of faults, of which one is drawn for a GET with probability `rate`.
        rate: see `faults`.
        budget: no more faults than this.
        password: what HTTP basic authentication must bring, as "user:password".
    """

    def __init__(
        self,
        folder: Path,
        ranges: bool = True,
        latency: float = 0.0,
        faults: tuple[str, ...] = (),
        rate: float = 0.3,
        budget: int = 10**9,
        password: str | None = None,
        seed: int = 0,
    ) -> None:
        self.folder, self.ranges, self.latency = folder, ranges, latency
        self.faults, self.rate, self.budget, self.password = faults, rate, budget, password
        self.requests: list[tuple[str, str, str | None]] = []
        self.injected: Counter[str] = Counter()
        self._rng, self._lock = random.Random(seed), threading.Lock()
        self.most_at_once = self._now = 0
        server = self

        class Handler(_Handler):
            owner = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def draw(self) -> str | None:
        with self._lock:
            if (
                self.faults
                and self.injected.total() < self.budget
                and self._rng.random() < self.rate
            ):
                kind = self._rng.choice(self.faults)
                self.injected[kind] += 1
                return kind
        return None

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1

    def __enter__(self) -> StaticServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    owner: StaticServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_HEAD(self) -> None:
        self._answer(None)

    def do_GET(self) -> None:
        self._answer(self.owner.draw())

    def _answer(self, fault: str | None) -> None:
        owner = self.owner
        owner.requests.append((self.command, self.path, self.headers.get("Range")))
        with owner.counted():
            self._answer_counted(fault)

    def _answer_counted(self, fault: str | None) -> None:
        owner = self.owner
        if owner.latency:
            time.sleep(owner.latency)
        if owner.password is not None:
            import base64

            wanted = "Basic " + base64.b64encode(owner.password.encode()).decode()
            if self.headers.get("Authorization") != wanted:
                self._send(401, b"who are you, token=SERVERSECRET?")
                return
        if fault in ("500", "503"):
            self._send(int(fault), b"<html>secret internals</html>")
            return
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
            return
        path = owner.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if not path.is_file():
            self._send(404, b"")
            return
        data = path.read_bytes()
        tag = '"' + hashlib.sha256(data).hexdigest()[:16] + '"'
        if self.headers.get("If-Match") not in (None, tag):
            self._send(412, b"")
            return
        status, headers = 200, {"ETag": tag} if owner.ranges else {}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match and owner.ranges:
            start = int(match[1])
            stop = min(int(match[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
            status, data = 206, data[start : stop + 1]
        self._send(status, data, fault, headers)

    def _send(
        self,
        status: int,
        data: bytes,
        fault: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        if fault == "altered" and data:
            place = len(data) // 2
            data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        if fault == "short":
            data = data[: len(data) // 2]
        if fault == "slow":
            time.sleep(0.3)
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncated":
            self.wfile.write(data[: len(data) // 3])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(data)


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """moto's S3 on loopback; yields its address."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()
