"""The far ends the agent's tests talk to: a probe made of a dictionary, collectors of their own, a scripted server."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import agent

TOKEN = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
KEY = b"0123456789abcdef0123456789abcdef"


def wait_for(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """The condition's first true value; a failure when there is none in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


class FakeProbe(agent.Probe):
    """Files from a dictionary, commands from functions; the clock is set by the test."""

    def __init__(self, files: dict[str, str] | None = None) -> None:
        super().__init__()
        self.files = files or {}
        self.clock = 1_763_880_000.0

    def read(self, path: str, limit: int = agent.READ_LIMIT) -> str:
        if path not in self.files:
            raise agent.SourceError("missing", path)
        return self.files[path]

    def list_dir(self, path: str) -> list[str]:
        below = [name[len(path) + 1 :].split("/")[0] for name in self.files if name.startswith(path + "/")]
        if not below:
            raise agent.SourceError("missing", path)
        return sorted(set(below))

    def stat(self, path: str) -> Any:
        if path not in self.files:
            raise agent.SourceError("missing", path)
        return SimpleNamespace(st_ino=hash(self.files[path]), st_size=len(self.files[path]))

    def now(self) -> float:
        return self.clock


@contextlib.contextmanager
def registered(**functions: tuple[str, Callable[..., Any]]) -> Iterator[None]:
    """Only these collectors: name=(tick, function)."""
    before = dict(agent.COLLECTORS)
    agent.COLLECTORS.clear()
    for name, (tick, function) in functions.items():
        agent.collector(name, tick=tick)(function)
    try:
        yield
    finally:
        agent.COLLECTORS.clear()
        agent.COLLECTORS.update(before)


class Request:
    """A post as the server saw it."""

    def __init__(self, path: str, headers: dict[str, str], body: bytes, connection: int) -> None:
        self.path = path
        self.headers = headers
        self.body = body
        self.connection = connection
        unpacked = zlib.decompress(body, 31) if headers.get("content-encoding") == "gzip" else body
        value = json.loads(unpacked)
        self.is_batch = isinstance(value, list)
        self.reports: list[dict[str, Any]] = value if isinstance(value, list) else [value]


class Sink:
    """A small HTTP server. `answer` gives status, JSON or text, headers for a Request; None hangs up instead."""

    def __init__(self, answer: Callable[[Request], Any] | None = None) -> None:
        self.answer = answer or accept
        self.requests: list[Request] = []
        sink = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 5

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                names = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.path, names, body, self.client_address[1])
                sink.requests.append(request)
                told = sink.answer(request)
                if told is None:
                    self.close_connection = True
                    return
                status, content, headers = told
                raw = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def reports(self) -> list[dict[str, Any]]:
        return [report for request in self.requests for report in request.reports]

    def seqs(self) -> list[int]:
        return [report["seq"] for report in self.reports]


def accept(request: Request) -> tuple[int, Any, dict[str, str]]:
    answer = {"status": "ok", "accepted": len(request.reports), "duplicates": 0, "server_time": time.time()}
    return 200, answer, {"Content-Type": "application/json"}


def problem(status: int, code: str, **more: Any) -> Callable[[Request], tuple[int, Any, dict[str, str]]]:
    """An answer that always says no."""
    headers = {"Content-Type": "application/problem+json", **more.pop("headers", {})}
    return lambda _: (status, {"status": status, "code": code, "title": code, "detail": "no", **more}, headers)


def write_config(folder: Path, url: str, more: str = "", *, host_id: str = "pve-host-01") -> Path:
    """A good config; `more` is appended."""
    path = folder / "agent.toml"
    path.write_text(f'server_url = "{url}"\ntoken = "{TOKEN}"\nhost_id = "{host_id}"\n{more}')
    path.chmod(0o600)
    return path


def config_for(folder: Path, url: str, more: str = "") -> agent.Config:
    return agent.load_config(str(write_config(folder, url, more)))


def closed_port_url() -> str:
    """An address of this machine where nobody listens."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"
