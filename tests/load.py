"""A played fleet through a real Caddy: what the soaks of load, of a backlog and of a lost history store share.

    hosts -> server behind Caddy -> requests -> players apart -> what is measured beside them

Hosts are played on the same machine as the server, in a process of their own whose processor time is told apart.
"""

from __future__ import annotations

import asyncio
import base64
import json
import multiprocessing
import os
import random
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

from beside import Caddy
from conftest import PASSWORD, LiveServer, build_guest, build_pool, build_report

import agent
import server as monitor

GUESTS = 30

# --- hosts ---


class Host:
    """A played host: a report of 30 guests whose load, time and number change."""

    def __init__(self, name: str, token: str):
        self.name, self.key, self.seq = name, base64.b64decode(token.removeprefix("whsec_")), 0
        guests = [build_guest(vmid) for vmid in range(100, 100 + GUESTS)]
        report = build_report(name, 0, 0.0, "run", guests=guests, pools=[build_pool()])
        text = agent.to_json({key: value for key, value in report.items() if key not in ("seq", "time")})[1:]
        self.parts = re.split(rb'(?<="cpu_ratio":)[0-9.]+', text.replace(b'"cpu_ratio": ', b'"cpu_ratio":'))

    def report(self, at: float) -> bytes:
        self.seq += 1
        loads = [b"%.4f" % random.random() for _ in self.parts]
        loads[-1] = b""
        moved = b"".join(piece for pair in zip(self.parts, loads) for piece in pair)
        return f'{{"seq":{self.seq},"time":{at},'.encode() + moved

    def request(self, body: bytes) -> bytes:
        packed = agent.pack(body)
        head = {"Host": "localhost", "Content-Type": "application/json", "Content-Encoding": "gzip", "Connection": "close",
                "Content-Length": str(len(packed)), **agent.webhook_headers(self.key, packed, int(time.time()))}  # fmt: skip
        lines = [f"POST /api/v1/hosts/{self.name}/reports HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + packed


def register(server: LiveServer, count: int) -> list[Host]:
    """So many hosts at once, before the server starts."""
    config = monitor.Config(server.env)
    db = monitor.open_database(config, create=True)
    with monitor.transaction(db):
        rows = [monitor.insert_host(db, f"host{n:05d}", time.time(), site=f"site{n % 20}") for n in range(count)]
    db.close()
    return [Host(row["name"], monitor.host_token(config.secret(), row["nonce"])) for row in rows]


# --- the server behind Caddy ---


@contextmanager
def behind_caddy(folder: Path, count: int, **env: str) -> Iterator[tuple[LiveServer, Caddy, Doorway, list[Host]]]:
    """Server, Caddy with TLS as agents meet it, the way to it, hosts."""
    server = LiveServer(folder, TRUSTED_PROXY="127.0.0.1", **env)
    hosts = register(server, count)
    caddy = Caddy(folder, server.port)
    server.env["PUBLIC_URL"] = caddy.url
    server.start()
    try:
        caddy.wait()
        yield server, caddy, Doorway(caddy), hosts
    finally:
        caddy.process.terminate()
        caddy.process.wait(10)
        server.stop()


class Doorway:
    """How played hosts and browsers reach Caddy: a whole TLS handshake for each request, as agents do it."""

    def __init__(self, caddy: Caddy):
        self.port = caddy.port
        self.context = ssl.create_default_context(cafile=str(caddy.root))

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context, server_hostname="localhost")


def refusals(caddy: Caddy) -> dict[str, int]:
    """What Caddy said of requests that it could not bring to the server, addresses left out."""
    said = Counter[str]()
    with open(caddy.folder / "caddy.log") as log:
        for line in log:
            if '"logger":"http.log.error"' in line:
                entry = json.loads(line)
                said[f"{entry.get('status', '')} {re.sub(r'[0-9.]+:[0-9]+', '…', entry['msg'])}"] += 1
    return dict(said)


# --- requests ---


async def post(door: Doorway, request: bytes) -> tuple[int, float, bytes]:
    """Status, Retry-After and body of an answer; status 0 when there was none."""
    try:
        async with asyncio.timeout(agent.ANSWER_TIMEOUT):
            reader, writer = await door.open()
            try:
                writer.write(request)
                answer = await reader.read()
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError):
        return 0, 0.0, b""
    head, _, body = answer.partition(b"\r\n\r\n")
    asked = re.search(rb"(?i)\r\nretry-after: (\d+)", head)
    return int(head[9:12] or 0), float(asked[1]) if asked else 0.0, body


async def timed(asked: Awaitable[tuple[int, float, bytes]]) -> tuple[int, float]:
    began = time.monotonic()
    status, _, _ = await asked
    return status, time.monotonic() - began


async def timed_each_second(host: Host, door: Doorway, end: float) -> list[tuple[int, float]]:
    took = []
    while time.monotonic() < end:
        took.append(await timed(post(door, host.request(host.report(time.time())))))
        await asyncio.sleep(1)
    return took


# --- players apart ---


def start_apart(work: Callable[[], Coroutine[Any, Any, Any]]) -> Callable[[], tuple[Any, float]]:
    """Run `work` in a process of its own; what comes back waits for its result and tells its processor time."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()

    def run() -> None:
        result = asyncio.run(work())
        theirs.send((result, time.process_time()))

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    theirs.close()

    def result() -> tuple[Any, float]:
        told = ours.recv()
        process.join()
        return told

    return result


# --- what is measured beside the load ---


class Watcher(threading.Thread):
    """Asks pages every so many seconds (`seldom`: each third time), keeps how long each took, and the server's most memory."""

    def __init__(self, server: LiveServer, caddy: Caddy, pages: dict[str, str], every: float = 0.5, seldom: Set[str] = frozenset()):
        super().__init__(daemon=True)
        self.server, self.caddy, self.pages, self.every, self.seldom = server, caddy, pages, every, seldom
        self.took: dict[str, list[float]] = {name: [] for name in pages}
        self.failed: list[str] = []
        self.rss = 0.0
        self.ending = threading.Event()
        form = f"password={PASSWORD.replace(' ', '+')}".encode()
        log_in = server.request("POST", "/login", form, Content_Type="application/x-www-form-urlencoded")
        self.cookie = log_in.headers["set-cookie"].partition(";")[0]

    def run(self) -> None:
        turn = 0
        while not self.ending.wait(self.every):
            turn += 1
            for name, path in self.pages.items():
                if turn % 3 and name in self.seldom:
                    continue
                began = time.monotonic()
                try:
                    _, body = self.caddy.get(path, Cookie=self.cookie)
                    if b'type="password"' in body:
                        self.failed.append(f"{name}: led to the log-in")
                except OSError as error:
                    if getattr(error, "code", 0) != 503:
                        self.failed.append(f"{name}: {error}")
                self.took[name].append(time.monotonic() - began)
            assert self.server.process
            self.rss = max(self.rss, rss(self.server.process.pid))

    def told(self) -> dict[str, str]:
        self.ending.set()
        self.join(40)
        return {name: in_ms(took) for name, took in self.took.items()}


def rss(pid: int) -> float:
    """MiB resident."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) / 1024


def cpu(pid: int) -> float:
    """Seconds of processor time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_ms(seconds: list[float]) -> str:
    """p50/p99 in milliseconds."""
    if len(seconds) < 2:
        return "-"
    parts = quantiles(seconds, n=100, method="inclusive")
    return f"{parts[49] * 1000:.0f}/{parts[98] * 1000:.0f}"
