"""A fleet at true pace for hours behind a real Caddy with TLS: does memory, do descriptors and threads level off?

HOSTS=30 hosts of 30 guests and a real agent report each 30 s; a page and lists are polled, a channel is told, history
goes to a real VictoriaMetrics (HISTORY=sqlite: stays embedded). TRACE=1 tells each 10 minutes where Python's memory
grew (the server is slower and larger then). Each minute a line: MiB resident and proportional, descriptors, threads.
"""

from __future__ import annotations

import http.server
import os
import random
import re
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from beside import Caddy, Victoria
from conftest import PASSWORD, ROOT, LiveAgent, LiveServer, build_guest, build_pool, build_report
from faults import complaints, database_of, stored

import agent

GUESTS, EVERY = 30, 30.0
MOST_GROWTH = 1.03  # of the median of the last quarter over that of the one before: less is what a fleet's hours do

TRACED = """
import gc, sys, threading, time, tracemalloc
sys.path.insert(0, {root!r})
import server
def tell():
    time.sleep(60)  # not the start, which would take minutes
    tracemalloc.start(8)
    before = None
    while True:
        time.sleep(600)
        gc.collect()
        now = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, tracemalloc.__file__)])
        with open({out!r}, "a") as out:
            size = sum(stat.size for stat in now.statistics("filename"))
            print(time.strftime("%H:%M"), f"traced {{size / 2**20:.1f}} MiB", file=out)
            for stat in now.compare_to(before, "traceback")[:12] if before else ():
                print("  ", f"{{stat.size_diff / 1024:+.0f}} KiB, now {{stat.size / 1024:.0f}} in {{stat.count}}", file=out)
                print("     ", *[f"{{frame.filename.rpartition('/')[2]}}:{{frame.lineno}}" for frame in list(stat.traceback)[-6:]], file=out)
        before = now
threading.Thread(target=tell, daemon=True).start()
sys.exit(server.main(sys.argv[1:]))
"""


class Use(NamedTuple):
    rss: float  # MiB
    pss: float
    files: int
    threads: int


def use_of(pid: int) -> Use:
    """What a process takes now."""
    status, rollup = (Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "smaps_rollup"))
    threads, pss = re.search(r"Threads:\s+(\d+)", status), re.search(r"Pss:\s+(\d+)", rollup)
    rss = re.search(r"VmRSS:\s+(\d+)", status)
    assert rss and pss and threads
    return Use(int(rss[1]) / 1024, int(pss[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), int(threads[1]))


def quarters(samples: list[Use], field: int) -> list[float]:
    """The median of each quarter of the time."""
    size = max(1, len(samples) // 4)
    return [median(use[field] for use in samples[n * size : (n + 1) * size]) for n in range(4)]


def levels_off(samples: list[Use]) -> bool:
    """Whether the last quarter takes no more than the third."""
    rss, pss, files, threads = (quarters(samples, field) for field in range(4))
    return pss[3] <= pss[2] * MOST_GROWTH + 1 and files[3] <= files[2] + 3 and threads[3] <= threads[2] + 1


class PlayedHost:
    """30 guests whose values all move; now and then a guest stops, a pool fills or the host is silent for 7 minutes."""

    def __init__(self, folder: Path, url: str, name: str, token: str, ca_file: Path, dice: random.Random):
        path = folder / f"{name}.toml"
        path.write_text(f'server_url = "{url}"\ntoken = "{token}"\nhost_id = "{name}"\nca_file = "{ca_file}"\n')
        path.chmod(0o600)
        self.client, self.name, self.dice = agent.Client(agent.load_config(str(path))), name, dice
        self.seq, self.silent = 0, 0
        self.waiting: list[dict[str, Any]] = []
        self.acknowledged = 0
        self.totals = [dice.randrange(1 << 40) for _ in range(GUESTS)]
        self.stopped: set[int] = set()

    def turn(self) -> None:
        if self.silent > 0:
            self.silent -= 1
            return
        if self.dice.random() < 0.002:
            self.silent = 14
        self.waiting.append(self.report())
        with suppress(agent.Unreachable):
            answer = self.client.send(agent.to_json(self.waiting))
            if agent.judge(answer, len(self.waiting)) is agent.ACCEPTED:
                self.acknowledged += len(self.waiting)
                self.waiting.clear()

    def report(self) -> dict[str, Any]:
        self.seq += 1
        if self.dice.random() < 0.02:
            self.stopped ^= {self.dice.randrange(GUESTS)}
        full = 0.97 if self.seq % 240 > 220 else 0.4 + self.seq % 100 / 1000
        report = build_report(self.name, self.seq, time.time(), "run", guests=[self.guest(n) for n in range(GUESTS)],
                              pools=[build_pool(capacity_ratio=full)])  # fmt: skip
        report["node"].update(cpu_ratio=self.dice.random(), load1=8 * self.dice.random(),
                              memory_available_bytes=self.dice.randrange(60 << 30))  # fmt: skip
        return report

    def guest(self, n: int) -> dict[str, Any]:
        self.totals[n] += self.dice.randrange(1 << 24)
        return build_guest(100 + n, cpu_ratio=round(self.dice.random(), 4), memory_used_bytes=self.dice.randrange(2 << 30),
                           net_receive_bytes_total=self.totals[n], status="stopped" if n in self.stopped else "running")  # fmt: skip


class Sink(http.server.BaseHTTPRequestHandler):
    """A channel's other end."""

    told = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        Sink.told += 1
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def channel(folder: Path, stack: ExitStack) -> Path:
    """A server.toml with a webhook to this process."""
    sink = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    threading.Thread(target=sink.serve_forever, daemon=True).start()
    stack.callback(sink.shutdown)
    path = folder / "server.toml"
    path.write_text(f'[[channels]]\nname = "hook"\nkind = "webhook"\nurl = "http://127.0.0.1:{sink.server_address[1]}/"\n'
                    'secret = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="\n')  # fmt: skip
    path.chmod(0o600)
    return path


PAGES = ("/", "/healthz", "/metrics", "/api/v1/overview", "/api/v1/hosts", "/api/v1/guests?q=vm1", "/api/v1/alerts?state=all",
         "/api/v1/hosts/steady01/history?series=node.cpu_ratio&series=guests/104.cpu_ratio", "/api/v1/events")  # fmt: skip


class Reader(threading.Thread):
    """Opens every page each few seconds, as a wall display and a scraper do."""

    def __init__(self, caddy: Caddy, cookie: str):
        super().__init__(daemon=True)
        self.caddy, self.cookie = caddy, cookie
        self.read = 0
        self.failed: list[str] = []
        self.ending = threading.Event()

    def run(self) -> None:
        while not self.ending.wait(5):
            for path in PAGES:
                try:
                    self.caddy.get(path, Cookie=self.cookie)
                    self.read += 1
                except OSError as error:
                    self.failed.append(f"{time.strftime('%H:%M:%S')} {path}: {error}")


def run(seconds: float) -> bool:
    with tempfile.TemporaryDirectory(prefix="proxmon-steady-") as name, ExitStack() as stack:
        return steady(Path(name), seconds, stack)


def start(folder: Path, stack: ExitStack) -> tuple[LiveServer, Caddy, dict[str, int]]:
    server = LiveServer(folder, SERVER_CONFIG=str(channel(folder, stack)), TRUSTED_PROXY="127.0.0.1")
    pids = {}
    if os.environ.get("HISTORY") != "sqlite":
        victoria = Victoria(folder / "victoria")
        victoria.start()
        stack.callback(victoria.stop)
        assert victoria.process
        server.env["HISTORY_URL"], pids["VictoriaMetrics"] = victoria.url, victoria.process.pid
    caddy = Caddy(folder, server.port)
    stack.callback(caddy.process.wait, 10)
    stack.callback(caddy.process.terminate)
    server.env["PUBLIC_URL"] = caddy.url
    if os.environ.get("TRACE"):
        server.argv = [sys.executable, "-c", TRACED.format(root=str(ROOT), out=os.environ["TRACE"])]
    server.start()
    stack.callback(server.stop)
    caddy.wait()
    assert server.process
    return server, caddy, {"server": server.process.pid, "Caddy": caddy.process.pid, **pids}


def steady(folder: Path, seconds: float, stack: ExitStack) -> bool:
    server, caddy, pids = start(folder, stack)
    names = [f"steady{n:02d}" for n in range(int(os.environ.get("HOSTS", "30")))]
    hosts = [PlayedHost(folder, caddy.url, name, server.register(name), caddy.root, random.Random(name)) for name in names]
    probe = LiveAgent(folder, server, server.register("pve1"), fast=30)
    config = probe.config.read_text().replace(server.url, caddy.url)
    probe.config.write_text(f'ca_file = "{caddy.root}"\n{config}')
    probe.start()
    assert probe.process
    stack.callback(probe.stop)
    pids["agent"] = probe.process.pid
    form = f"password={PASSWORD.replace(' ', '+')}".encode()
    cookie = server.request("POST", "/login", form, Content_Type="application/x-www-form-urlencoded").headers["set-cookie"]
    reader = Reader(caddy, cookie.partition(";")[0])
    reader.start()
    samples: dict[str, list[Use]] = {name: [] for name in pids}
    sampler = threading.Thread(target=sample, args=(pids, samples, hosts, time.monotonic() + seconds), daemon=True)
    sampler.start()
    play(hosts, time.monotonic() + seconds)
    reader.ending.set()
    reader.join(30)
    for host in hosts:
        host.silent = 0
        host.turn()
    return told(server, probe, hosts, samples, reader)


def play(hosts: list[PlayedHost], end: float) -> None:
    """Each host each 30 s, spread evenly over that time."""
    due, n = time.monotonic(), 0
    while time.monotonic() < end:
        hosts[n % len(hosts)].turn()
        n, due = n + 1, due + EVERY / len(hosts)
        time.sleep(max(0.0, due - time.monotonic()))


def sample(pids: dict[str, int], samples: dict[str, list[Use]], hosts: list[PlayedHost], end: float) -> None:
    while time.monotonic() < end:
        for name, pid in pids.items():
            samples[name].append(use_of(pid))
        last = {name: f"{use[-1].rss:.1f}/{use[-1].pss:.1f} MiB {use[-1].files} fd {use[-1].threads} thr" for name, use in samples.items()}
        print(f"   {time.strftime('%H:%M')} {sum(host.acknowledged for host in hosts)} reports;", last, flush=True)
        time.sleep(max(0.0, min(60.0, end - time.monotonic())))


def told(server: LiveServer, probe: LiveAgent, hosts: list[PlayedHost], samples: dict[str, list[Use]], reader: Reader) -> bool:
    print("| process | MiB resident by quarter | MiB proportional | descriptors | threads | levels off |\n" + "|---" * 6 + "|")
    good = True
    for name, use in samples.items():
        cells = [" → ".join(f"{value:.{1 if field < 2 else 0}f}" for value in quarters(use, field)) for field in range(4)]
        level = levels_off(use)
        good = good and (level or name not in ("server", "agent"))
        print(f"| {name} | {' | '.join(cells)} | {'yes' if level else 'NO'} |")
    acknowledged = sum(host.acknowledged for host in hosts)
    print(f"   {acknowledged} reports acknowledged, {reader.read} pages read, {len(reader.failed)} failed {reader.failed[:5]}, "
          f"{Sink.told} messages told, waiting {sum(len(host.waiting) for host in hosts)}")  # fmt: skip
    if os.environ.get("HISTORY") == "sqlite":
        found = [key for key in stored(database_of(server)) if key[0] != "pve1"]
        print(f"   found {len(set(found))}, doubled {len(found) - len(set(found))}")
        good = good and len(found) == len(set(found)) == acknowledged
    strange = complaints(server.log) + complaints(probe.log)
    print(f"   complaints in logs: {strange[:5]}")
    return good and not strange
