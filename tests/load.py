"""A played fleet through a real Caddy: what the soaks of load, of a backlog and of a lost history store share.

    hosts -> server behind Caddy -> requests -> players apart -> what is measured beside them

Hosts are played on the same machine as the server, in a process of their own whose processor time is told apart.
"""

from __future__ import annotations

import asyncio
import base64
import multiprocessing
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import quantiles
from typing import Any

from conftest import PASSWORD, LiveServer, build_guest, build_pool, build_report, find_program, free_port
from faults import until

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
        head = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Encoding": "gzip", "Connection": "close",
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
def behind_caddy(folder: Path, count: int, **env: str) -> Iterator[tuple[LiveServer, subprocess.Popen[bytes], int, list[Host]]]:
    """Server, Caddy, Caddy's port (plain HTTP: the handshakes of played agents would cost the players' core), hosts."""
    server, port = LiveServer(folder, TRUSTED_PROXY="127.0.0.1", **env), free_port()
    hosts = register(server, count)
    server.start()
    text = (Path(__file__).resolve().parent.parent / "Caddyfile.example").read_text()
    text = text.replace("monitor.example.com {", f"http://127.0.0.1:{port} {{").replace("127.0.0.1:4000", f"127.0.0.1:{server.port}")
    text = text.replace("/var/log/caddy/monitor.log", str(folder / "caddy-access.log")).replace("{\n", "{\n\tadmin off\n", 1)
    (folder / "Caddyfile").write_text(text)
    home = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    with open(folder / "caddy.log", "wb") as log:
        argv = [find_program("caddy"), "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]
        caddy = subprocess.Popen(argv, env=home, stdout=log, stderr=log)
    direct = server.url
    try:
        server.url = f"http://127.0.0.1:{port}"
        until(lambda: answers(server), 20, (folder / "caddy.log").read_text()[-500:])
        yield server, caddy, port, hosts
    finally:
        caddy.terminate()
        caddy.wait(10)
        server.url = direct
        server.stop()


def answers(server: LiveServer) -> bool:
    with suppress(OSError):
        return server.request("GET", "/healthz").status == 200
    return False


# --- requests ---


async def post(port: int, request: bytes) -> tuple[int, float, bytes]:
    """Status, Retry-After and body of an answer; status 0 when there was none."""
    try:
        async with asyncio.timeout(agent.ANSWER_TIMEOUT):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request)
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0, 0.0, b""
    head, _, body = answer.partition(b"\r\n\r\n")
    asked = re.search(rb"(?i)\r\nretry-after: (\d+)", head)
    return int(head[9:12] or 0), float(asked[1]) if asked else 0.0, body


async def timed(asked: Awaitable[tuple[int, float, bytes]]) -> tuple[int, float]:
    began = time.monotonic()
    status, _, _ = await asked
    return status, time.monotonic() - began


async def timed_each_second(host: Host, port: int, end: float) -> list[tuple[int, float]]:
    took = []
    while time.monotonic() < end:
        took.append(await timed(post(port, host.request(host.report(time.time())))))
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

    def __init__(self, server: LiveServer, pages: dict[str, str], every: float = 0.5, seldom: Set[str] = frozenset()):
        super().__init__(daemon=True)
        self.server, self.pages, self.every, self.seldom = server, pages, every, seldom
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
                    answer = self.server.request("GET", path, Cookie=self.cookie)
                    if answer.status not in (200, 503):
                        self.failed.append(f"{name}: {answer.status}")
                except OSError as error:
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
