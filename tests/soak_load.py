"""Load through a real Caddy: a whole fleet that comes back at once, a page polled without end, and fleets at true pace.

STORM=5000 and SCALE=20,200,1000,5000 choose the numbers of hosts. Hosts are played on the same machine, so that its
cores serve both sides: the limits found here are lower than a server's of its own.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import quantiles
from typing import Any

from conftest import PASSWORD, LiveServer, build_guest, build_pool, build_report, find_program, free_port
from faults import database_of, stored, until

import agent
import server as monitor

GUESTS = 30
WAITED = 20  # reports of each host after an outage of 10 minutes


def run(seconds: float) -> bool:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    count = int(os.environ.get("STORM", "5000"))
    with tempfile.TemporaryDirectory(prefix="proxmon-load-") as folder:
        print("   " + str(storm(Path(folder), count, seconds)), flush=True)
    with tempfile.TemporaryDirectory(prefix="proxmon-load-") as folder:
        print("   " + str(polled(Path(folder), min(30, seconds / 4))), flush=True)
    good = True
    print("| hosts | reports/s | CPU of server | CPU of Caddy | server MiB | disk/day as received | ingest p50/p99 ms | page p50/p99 ms"
          " | search p50/p99 ms | /metrics p50/p99 ms | refused | load |\n" + "|---" * 12 + "|", flush=True)  # fmt: skip
    for count in map(int, os.environ.get("SCALE", "20,200,1000,5000").split(",")):
        with tempfile.TemporaryDirectory(prefix="proxmon-load-") as folder:
            told = pace(Path(folder), count, max(60.0, seconds / 4))
        print("| " + " | ".join(map(str, told.values())) + " |", flush=True)
        good = good and not told["lost"]
    return good


# --- the server, Caddy before it, and its hosts ---


class Host:
    """A played host: a report of 30 guests whose time and number change."""

    def __init__(self, name: str, token: str):
        self.name, self.key = name, base64.b64decode(token.removeprefix("whsec_"))
        self.seq = 0
        guests = [build_guest(vmid) for vmid in range(100, 100 + GUESTS)]
        report = build_report(name, 0, 0.0, "run", guests=guests, pools=[build_pool()])
        self.template = {key: value for key, value in report.items() if key not in ("seq", "time")}
        self.text = agent.to_json(self.template)[1:]

    def report(self, at: float) -> bytes:
        self.seq += 1
        cpu = f'"cpu_ratio":{(self.seq % 97) / 100}'
        return f'{{"seq":{self.seq},"time":{at},'.encode() + re.sub(rb'"cpu_ratio": ?[0-9.]+', cpu.encode(), self.text)

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


@contextmanager
def behind_caddy(folder: Path, count: int) -> Iterator[tuple[LiveServer, subprocess.Popen[bytes], int, list[Host]]]:
    """Server, Caddy, Caddy's port (plain HTTP: the handshakes of played agents would cost the players' core), hosts."""
    server, port = LiveServer(folder, TRUSTED_PROXY="127.0.0.1"), free_port()
    hosts = register(server, count)
    server.start()
    text = (Path(__file__).resolve().parent.parent / "Caddyfile.example").read_text()
    text = text.replace("monitor.example.com {", f"http://127.0.0.1:{port} {{").replace("127.0.0.1:4000", f"127.0.0.1:{server.port}")
    text = text.replace("/var/log/caddy/monitor.log", str(folder / "caddy-access.log")).replace("{\n", "{\n\tadmin off\n", 1)
    (folder / "Caddyfile").write_text(text)
    env = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    with open(folder / "caddy.log", "wb") as log:
        argv = [find_program("caddy"), "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]
        caddy = subprocess.Popen(argv, env=env, stdout=log, stderr=log)
    try:
        direct, server.url = server.url, f"http://127.0.0.1:{port}"
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


# --- what is measured beside the load ---


class Watcher(threading.Thread):
    """Asks pages all the time and keeps how long each took; and the most memory of the server."""

    def __init__(self, server: LiveServer, pages: dict[str, str], every: float = 0.5):
        super().__init__(daemon=True)
        self.server, self.pages, self.every = server, pages, every
        self.took: dict[str, list[float]] = {name: [] for name in pages}
        self.failed: list[str] = []
        self.rss = 0.0
        self.ending = threading.Event()
        form = f"password={PASSWORD.replace(' ', '+')}".encode()
        log_in = server.request("POST", "/login", form, Content_Type="application/x-www-form-urlencoded")
        self.cookie = log_in.headers["set-cookie"].partition(";")[0]

    def run(self) -> None:
        while not self.ending.wait(self.every):
            for name, path in self.pages.items():
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


# --- back-pressure ---


def storm(folder: Path, count: int, seconds: float) -> dict[str, Any]:
    """`count` hosts, each with a backlog, come back in the same second."""
    with behind_caddy(folder, count) as (server, _, port, hosts):
        watcher = Watcher(server, {"healthz": "/healthz", "page": "/"})
        watcher.start()
        began = time.monotonic()
        tries: list[int] = []
        ended: list[float] = []

        async def come_back(host: Host) -> None:
            reports = b"[" + b",".join(host.report(time.time() - 30 * (WAITED - n)) for n in range(WAITED)) + b"]"
            backoff, attempts = agent.BACKOFF_FIRST, 0
            while time.monotonic() - began < max(seconds, 60):
                attempts += 1
                status, asked, body = await post(port, host.request(reports))
                if status == 200 and json.loads(body)["accepted"] + json.loads(body)["duplicates"] == WAITED:
                    ended.append(time.monotonic() - began)
                    tries.append(attempts)
                    return
                wait = max(backoff * (0.5 + os.urandom(1)[0] / 512), agent.BACKOFF_FIRST)  # as the agent does
                await asyncio.sleep(max(wait, min(asked, wait + agent.RETRY_AFTER_LIMIT)))
                backoff = min(2 * backoff, agent.BACKOFF_LAST)

        async def everybody() -> None:
            await asyncio.gather(*(come_back(host) for host in hosts))

        asyncio.run(everybody())
        told = watcher.told()
        found = stored(database_of(server))
        return {"hosts": count, "reports waiting": count * WAITED, "hosts drained": len(ended), "found": len(set(found)),
                "doubled": len(found) - len(set(found)), "drained in s": round(max(ended, default=0), 1),
                "half of the hosts by s": round(sorted(ended)[len(ended) // 2], 1) if ended else None,
                "most tries of one host": max(tries, default=0), "healthz ms p50/p99": told["healthz"],
                "page ms p50/p99": told["page"], "pages that failed": len(watcher.failed), "server MiB": round(watcher.rss),
                "load": round(os.getloadavg()[0], 1)}  # fmt: skip


def polled(folder: Path, seconds: float, pollers: int = 50) -> dict[str, Any]:
    """A page that is polled as fast as it answers (aim: 1,000 a second), and reports of 20 hosts beside it."""
    with behind_caddy(folder, 20) as (server, _, port, hosts):
        cookie = Watcher(server, {}).cookie
        took: list[float] = []
        polls: list[float] = []
        refused: list[int] = []

        async def poll(end: float) -> None:
            request = f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {cookie}\r\nConnection: close\r\n\r\n".encode()
            while time.monotonic() < end:
                began = time.monotonic()
                status, _, _ = await post(port, request)
                polls.append(time.monotonic() - began)
                if status != 200:
                    refused.append(status)
                    await asyncio.sleep(0.05)

        async def report(host: Host, end: float) -> None:
            while time.monotonic() < end:
                began = time.monotonic()
                status, _, _ = await post(port, host.request(host.report(time.time())))
                took.append(time.monotonic() - began if status == 200 else float("inf"))
                await asyncio.sleep(1)

        async def both() -> None:
            end = time.monotonic() + seconds
            await asyncio.gather(*(poll(end) for _ in range(pollers)), *(report(host, end) for host in hosts))

        asyncio.run(both())
        good = [wait for wait in took if wait != float("inf")]
        return {"polls/s": round(len(polls) / seconds), "poll ms p50/p99": in_ms(polls), "polls not 200": len(refused),
                "reports": len(took), "reports not acknowledged at once": len(took) - len(good),
                "ingest ms p50/p99": in_ms(good), "load": round(os.getloadavg()[0], 1)}  # fmt: skip


# --- scale ---


def pace(folder: Path, count: int, seconds: float, every: float = 30.0) -> dict[str, Any]:
    """`count` hosts at true pace for some time, behind Caddy."""
    with behind_caddy(folder, count) as (server, caddy, port, hosts):
        took: list[float] = []
        lost: list[int] = []

        async def report(host: Host, first: float, end: float) -> None:
            await asyncio.sleep(first)
            while time.monotonic() < end:
                due = time.monotonic() + every
                body = host.report(time.time())
                while True:
                    began = time.monotonic()
                    status, asked, _ = await post(port, host.request(body))
                    if status == 200:
                        took.append(time.monotonic() - began)
                        break
                    lost.append(status)
                    if time.monotonic() > end + 60:
                        return
                    await asyncio.sleep(max(1.0, asked))
                await asyncio.sleep(max(0.0, due - time.monotonic()))

        async def fleet() -> None:
            end = time.monotonic() + seconds + every
            await asyncio.gather(*(report(host, every * n / len(hosts), end) for n, host in enumerate(hosts)))

        pages = {"page": "/", "search": "/api/v1/hosts?q=host0001", "metrics": "/metrics"}
        watcher = Watcher(server, pages, every=2.0)
        assert server.process
        watcher.start()
        began, spent, caddy_spent = time.monotonic(), cpu(server.process.pid), cpu(caddy.pid)
        asyncio.run(fleet())
        wall = time.monotonic() - began
        busy, caddy_busy = cpu(server.process.pid) - spent, cpu(caddy.pid) - caddy_spent
        told = watcher.told()
        size = sum(os.path.getsize(database_of(server) + end) for end in ("", "-wal"))
        found = len(set(stored(database_of(server))))
        return {"hosts": count, "reports/s": round(len(took) / wall, 1), "cpu": f"{busy / wall:.0%}",
                "caddy": f"{caddy_busy / wall:.0%}", "rss": round(watcher.rss),
                "disk": f"{size / max(1, len(took)) * count * 86400 / every / 2**30:.1f} GiB", "ingest": in_ms(took), **told,
                "lost": len(took) - found, "tries": f"{len(lost)} tried again", "load": round(os.getloadavg()[0], 1)}  # fmt: skip


