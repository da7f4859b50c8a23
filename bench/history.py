#!/usr/bin/env python3
"""Measure the history: bytes per value, CPU per report, time per question; peers in the same run, fed the same.

    options -> reports -> processes -> ours -> peers -> questions -> main

    bench/history.py                      everything, about 10 minutes; the peers that are installed
    bench/history.py --hosts 3 --days 3   a first look

One report has 250 values: the host, 30 guests, 2 pools, 4 storages. Figures compare inside one run only: the machine is
shared, and CPU time by the kernel's accounting moves by a quarter from run to run.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import hmac
import http.client
import json
import mmap
import os
import random
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import server  # noqa: E402

DAY, HOUR, STEP = 86400, 3600, 30
HOUR_TICKS = HOUR // STEP


# --- options ---


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the history, next to its peers.")
    parser.add_argument("--hosts", type=int, default=5, help="hosts in the test of CPU, one day of reports each")
    parser.add_argument("--days", type=int, default=33, help="days of one host in the test of size")
    parser.add_argument("--connections", type=int, default=16, help="senders at once")
    parser.add_argument("--rate", type=float, help="reports in a second at the most, instead of as fast as they are taken")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--only", choices=("size", "cpu"), help="one part alone")
    parser.add_argument("--binary", type=Path, help="the frozen server, to measure its memory instead of the source's")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # a server by the played clock of this folder
    return parser.parse_args()


# --- reports: values as an agent has them, with the digits an agent sends ---


class PlayedHost:
    """One host whose values wander; `report(at)` is what its agent would send."""

    def __init__(self, name: str, seed: int):
        self.name, self.dice, self.seq = name, random.Random(seed), 0
        self.cpu, self.counters = 0.2, {}  # type: float, dict[Any, int]
        self.guests = [[self.dice.uniform(0.01, 0.5), int(self.dice.uniform(1, 8) * 2**30)] for _ in range(30)]

    def grow(self, key: Any, rate: float) -> int:
        self.counters[key] = self.counters.get(key, 0) + int(self.dice.uniform(0, 2 * rate * STEP))
        return self.counters[key]

    def wander(self, value: float, step: float) -> float:
        return min(0.98, max(0.005, value + self.dice.gauss((0.3 - value) * 0.03, step)))

    def report(self, at: float) -> dict[str, Any]:
        self.seq += 1
        self.cpu = cpu = self.wander(self.cpu, 0.02)
        cached = 8 << 30
        node = {
            "name": self.name, "boot_id": "b", "uptime_seconds": round(1e6 + self.seq * STEP + 0.13, 2),
            "cpu_count": 16,
            "cpu_ratio": round(cpu, 5), "iowait_ratio": round(cpu / 20, 5), "steal_ratio": 0.0,
            "load1": round(cpu * 16, 2),
            "load5": round(cpu * 15, 2), "load15": round(cpu * 14, 2), "memory_total_bytes": 128 << 30,
            "memory_available_bytes": int((0.4 - cpu / 10) * 2**37) & ~4095,
            "arc_size_bytes": cached + int(cpu * 2**28),
            "arc_hits_total": self.grow("hits", 9000), "arc_misses_total": self.grow("misses", 40),
            "memory_free_ratio": round(0.5 - cpu / 8, 4), "swap_total_bytes": 8 << 30, "swap_used_bytes": 0,
            "root_total_bytes": 100 << 30, "root_used_bytes": (30 << 30) + self.grow("root", 900) // 4096 * 4096,
            "root_available_bytes": 65 << 30, "pressure_cpu_some_avg10_ratio": round(cpu / 9, 4),
            "pressure_io_full_avg10_ratio": round(max(0, cpu - 0.3) / 5, 4), "pressure_io_full_avg300_ratio": 0.002,
            "pressure_memory_full_avg10_ratio": 0.0, "oom_kills_total": 0,
            "net_receive_bytes_total": self.grow("rx", 4e6),
            "net_transmit_bytes_total": self.grow("tx", 9e6),
        }  # fmt: skip
        return {
            "version": 1, "host_id": self.name, "tick": "fast", "time": round(at, 3), "run_id": "0123456789abcdef",
            "seq": self.seq, "agent": {"version": "0.1.0", "spooled": 0, "dropped": 0, "clock_offset": 0.01},
            "node": node, "guests": [self._guest(number) for number in range(30)],
            "storages": [{"storage": f"store{n}", "type": "dir", "active": True, "enabled": True,
                          "total_bytes": 4 << 40, "used_bytes": (1 << 40) + self.grow(f"s{n}", 5e4) // 4096 * 4096,
                          "available_bytes": 3 << 40} for n in range(4)],
            "pools": [{"name": f"tank{n}", "guid": str(10**18 + n), "state": "ONLINE", "size_bytes": 8 << 40,
                       "allocated_bytes": (4 << 40) + self.grow(f"p{n}", 2e5), "capacity_ratio": 0.51,
                       "fragmentation_ratio": 0.12, "data_errors": 0, "redundancy_margin": 1} for n in range(2)],
        }  # fmt: skip

    def _guest(self, number: int) -> dict[str, Any]:
        guest = self.guests[number]
        guest[0] = self.wander(guest[0], 0.02)
        guest[1] = max(2**28, guest[1] + int(self.dice.gauss(0, 2**21)) // 4096 * 4096)
        return {
            "vmid": 100 + number, "type": "qemu", "name": f"vm{number}", "status": "running", "template": False,
            "cpu_ratio": round(guest[0], 5), "memory_used_bytes": guest[1], "memory_max_bytes": 8 << 30,
            "uptime_seconds": 5000 + self.seq * STEP, "net_receive_bytes_total": self.grow((number, "rx"), 2e5),
            "net_transmit_bytes_total": self.grow((number, "tx"), 1e5),
        }  # fmt: skip


def count_values(report: dict[str, Any]) -> int:
    return sum(value == value for value in server.build_tick(report, report["time"]).values)


# --- processes: started, measured by the kernel's accounting, stopped ---


class Measured:
    """A server process on a free port."""

    def __init__(self, *argv: str, port: int, env: dict[str, str] | None = None):
        self.port = port
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        env={**os.environ, **(env or {})})
        for _ in range(1000):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        raise SystemExit(f"{argv[0]} did not start")

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self, kind: str = "Pss") -> float:
        """MB of the process and its child: a frozen program is both."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in (self.process.pid, *children)]
        return sum(int(text.partition(f"\n{kind}:")[2].split()[0]) for text in texts) / 1024

    def ask(self, path: str, headers: dict[str, str] | None = None) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{path}: {answer.status} {body[:300]!r}")
        return body

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Sender:
    """A kept connection with one request under way. As lean as can be: it shares the machine with what it measures."""

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.told = b""

    def send(self, path: str, body: bytes, headers: dict[str, str]) -> None:
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.socket.sendall(f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode()
                            + body)

    def receive(self) -> bool:
        """Whether the answer is whole."""
        got = self.socket.recv(65536)
        if not got:
            raise SystemExit("the connection was closed")
        self.told += got
        head, found, rest = self.told.partition(b"\r\n\r\n")
        _, _, size = head.lower().partition(b"\r\ncontent-length:")
        if not found or len(rest) < int(size.partition(b"\r\n")[0] or 0):
            return False
        if head[9:10] != b"2":
            raise SystemExit(f"{self.told[:500]!r}")
        self.told = b""
        return True


def post_all(port: int, requests: list[tuple[str, bytes, Callable[[bytes], dict[str, str]]]], connections: int,
             rate: float | None = None) -> None:
    """Post everything in order, over so many kept connections at once, at most `rate` in a second."""
    began = time.monotonic()
    poll, senders = select.epoll(), [Sender(port) for _ in range(connections)]
    by_number, idle = {one.socket.fileno(): one for one in senders}, list(senders)
    for number in by_number:
        poll.register(number, select.EPOLLIN)
    for number, (path, body, headers) in enumerate(requests):
        if rate:
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
            idle += [by_number[one] for one, _ in poll.poll(0) if by_number[one].receive()]
        while not idle:
            idle += [by_number[number] for number, _ in poll.poll() if by_number[number].receive()]
        idle.pop(0).send(path, body, headers(body))
    while len(idle) < connections:
        idle += [by_number[number] for number, _ in poll.poll() if by_number[number].receive()]
    for one in senders:
        one.socket.close()


def folder_bytes(folder: Path) -> int:
    return sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())


# --- ours ---


class PlayedClock:
    """A clock that two processes share: a day's reports come at their time, in as many seconds as they need."""

    def __init__(self, folder: Path, at: float | None = None):
        path = folder / "clock"
        if at is not None:
            path.write_bytes(struct.pack("<d", at))
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 8)

    def __call__(self) -> float:
        return struct.unpack("<d", self.memory[:8])[0]

    def reach(self, at: float) -> float:
        """Go on to a time, never back."""
        self.memory[:8] = struct.pack("<d", max(at, self()))
        return self()


def sign_played(clock: PlayedClock, at: float, key: bytes, message_id: str, body: bytes) -> dict[str, str]:
    return sign(key, message_id, body, clock.reach(at))


def serve_played(folder: Path) -> None:
    """What `serve` does, by the played clock."""
    config = server.Config()
    server.open_database(config, create=True).close()
    server.run_server(server.Monitor(config, PlayedClock(folder)))


def sign(key: bytes, message_id: str, body: bytes, now: float | None = None) -> dict[str, str]:
    at = str(int(time.time() if now is None else now))
    digest = hmac.digest(key, f"{message_id}.{at}.".encode() + body, hashlib.sha256)
    return {"webhook-id": message_id, "webhook-timestamp": at, "Content-Type": "application/json",
            "webhook-signature": "v1," + base64.b64encode(digest).decode(), "Content-Encoding": "gzip"}


def prepare(folder: Path, names: list[str]) -> tuple[dict[str, bytes], str]:
    """A database with hosts; their keys, and a token to read with."""
    config = server.Config({"DATABASE_PATH": str(folder / "monitor.db")})
    db = server.open_database(config, create=True)
    with server.transaction(db):
        rows = {name: server.insert_host(db, name, time.time()) for name in names}
        token = server.create_api_token(db, "bench", time.time(), admin=False, days=None)
    db.close()
    return {name: server.host_key(config.secret(), row["nonce"]) for name, row in rows.items()}, token


def serve(folder: Path, *, played: bool = False, binary: Path | None = None) -> Measured:
    port = free_port()
    env = {"DATABASE_PATH": str(folder / "monitor.db"), "PORT": str(port), "DASHBOARD_PASSWORD_HASH": ""}
    if binary:
        unit = (ROOT / "systemd" / "proxmox-monitor.service").read_text().splitlines()
        words = [word for line in unit if line.startswith("Environment=MALLOC") for word in line[12:].split()]
        return Measured(str(binary), "serve", port=port, env={**env, **dict(word.split("=") for word in words)})
    how = [str(Path(__file__).resolve()), "--serve", str(folder)] if played else [str(ROOT / "server.py"), "serve"]
    return Measured(sys.executable, *how, port=port, env=env)


def measure_size(folder: Path, days: int) -> None:
    """Feed one host the days before now, packing as time goes by, and weigh what is there."""
    end = int(time.time()) // DAY * DAY
    clock = [float(end - days * DAY)]
    config = server.Config({"DATABASE_PATH": str(folder / "monitor.db")})
    prepare(folder, ["host0"])
    monitor = server.Monitor(config, lambda: clock[0])
    host, played = next(iter(monitor.fleet.hosts)), PlayedHost("host0", 1)
    values, began = 0, time.process_time()
    for first in range(end - days * DAY, end, HOUR):
        batch = [played.report(at + 0.25) for at in range(first, first + HOUR, STEP)]
        values = count_values(batch[-1])
        clock[0] = first + HOUR
        monitor.store.write(partial(server.insert_reports, monitor, host, batch, None, clock[0]))
        monitor.keeper.settle(clock[0] + 500)
    monitor.keeper.settle(end + 2 * HOUR)
    print(f"size: {days} days of one host, {values} values per report ({time.process_time() - began:.0f} s CPU)")
    weigh(monitor.store.reader(), values)
    monitor.store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    monitor.close()
    size = os.path.getsize(folder / "monitor.db")
    print(f"  the file: {size / 2**20:.1f} MiB; 20 such hosts: {20 * size / 2**30:.2f} GiB of the LXC's 10 GB")


def weigh(db: Any, values: int) -> None:
    names = {0: "raw (30 s)", 1: "5 minutes", 2: "1 hour"}
    points = {0: HOUR // STEP * values, 1: DAY // 300 * values, 2: 240 * values}
    for code, name in names.items():
        row = db.execute("""
            SELECT count(*), sum(length(body)), sum((length(body) + 4200) / 4096 * 4096) FROM chunk
            WHERE (id >> 34) & 3 = ?""", (code,)).fetchone()
        if row[0]:
            count = row[0] * points[code] if code < 2 else None
            if count is None:  # the last chunk of hours is not full yet
                days = db.execute("SELECT count(*) FROM history_day").fetchone()[0]
                count = days * 24 * values
            print(f"  {name}: {row[1] / count:.2f} bytes per {'value' if code == 0 else 'point'}, "
                  f"{row[2] / count:.2f} with the pages' rests; {row[1] / 2**20:.1f} MiB in {row[0]} chunks")


def build_requests(hosts: list[PlayedHost], begin: int, ticks: int) -> Iterator[tuple[PlayedHost, dict[str, Any]]]:
    for tick in range(ticks):
        for host in hosts:
            yield host, host.report(begin + tick * STEP + 0.25)


def measure_cpu(folder: Path, options: argparse.Namespace, begin: int, *, played: bool) -> tuple[Measured, str]:
    """One day of reports of some hosts over HTTP, one per request, acknowledged when durable; then all of it packed.
    Either each comes at its time, by a played clock, or all come late, as after an outage."""
    names = [f"host{number}" for number in range(options.hosts)]
    keys, token = prepare(folder, names)
    clock = PlayedClock(folder, begin)
    process = serve(folder, played=played)
    hosts = [PlayedHost(name, number) for number, name in enumerate(names)]
    requests = []
    for number, (host, report) in enumerate(build_requests(hosts, begin, DAY // STEP)):
        body = gzip.compress(json.dumps(report, separators=(",", ":")).encode(), 1)
        signed = partial(sign_played, clock, report["time"] + 0.1) if played else sign
        requests.append((f"/api/v1/hosts/{host.name}/reports", body, partial(signed, keys[host.name], f"m{number}")))
    before, started = process.cpu(), time.monotonic()
    post_all(process.port, requests, options.connections, options.rate)
    fed, seconds = process.cpu() - before, time.monotonic() - started
    wait_until_packed(folder, clock, begin + DAY + 2 * HOUR)
    count = len(requests) / 1000
    print(f"ours, {'each at its time' if played else 'all a day late'}: {fed / count:.2f} CPU s per 1,000 reports until "
          f"acknowledged and durable, {(process.cpu() - before) / count:.2f} with all packing and roll-up; "
          f"{len(requests) / seconds:.0f} reports/s; PSS {process.memory():.0f} MB", flush=True)
    return process, token


def wait_until_packed(folder: Path, clock: PlayedClock, until: float) -> None:
    db = server.connect(str(folder / "monitor.db"), readonly=True)
    for waited in range(600):
        clock.reach(until + waited * 20)
        left = db.execute("SELECT (SELECT count(*) FROM report), (SELECT count(*) FROM history_day WHERE state = 0)")
        if tuple(left.fetchone()) == (0, 0):
            return
        time.sleep(1)
    raise SystemExit("ours: the history was not packed in 10 minutes")


def measure_flash(folder: Path, options: argparse.Namespace) -> None:
    """What reports cost the disk when each comes alone, as with 20 hosts: 8 hours of 4 hosts, packed as time goes by."""
    begin, names = int(time.time()) // DAY * DAY - DAY, [f"host{number}" for number in range(4)]
    prepare(folder, names)
    clock = [float(begin)]
    monitor = server.Monitor(server.Config({"DATABASE_PATH": str(folder / "monitor.db")}), lambda: clock[0])
    players = [(PlayedHost(name, number), monitor.fleet.find(name).id) for number, name in enumerate(names)]
    before, count = own_writes(), 0
    for at in range(begin, begin + 8 * HOUR, STEP):
        for player, host_id in players:
            clock[0] = at + 0.5
            report = player.report(clock[0])
            body = gzip.compress(json.dumps(report, separators=(",", ":")).encode(), 1)
            monitor.store.write(partial(server.insert_reports, monitor, host_id, [report], body, clock[0]))
            count += 1
        monitor.keeper.settle(clock[0])
    monitor.close()
    each = (own_writes() - before) / count
    print(f"flash: {each / 1024:.1f} KiB written per report that comes alone, with what its hour's packing writes: "
          f"{each * 57600 / 1e6:.0f} MB a day for 20 hosts, at most {each * 576000 / 1e6:.0f} MB for 200")


def own_writes() -> int:
    """Bytes that this process had written to the disk."""
    return int(Path("/proc/self/io").read_text().partition("\nwrite_bytes: ")[2].split()[0])


# --- peers: the same values, each by its own fast way in ---


def start_victoria(folder: Path) -> Measured:
    port = free_port()
    return Measured("victoria-metrics", f"-storageDataPath={folder}", f"-httpListenAddr=127.0.0.1:{port}",
                    "-retentionPeriod=3", "-search.latencyOffset=0s", port=port)


def start_prometheus(folder: Path) -> Measured:
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text("global: {}\n")
    return Measured("prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
                    f"--web.listen-address=127.0.0.1:{port}", "--web.enable-remote-write-receiver",
                    "--storage.tsdb.retention.time=90d", port=port)


def start_influx(folder: Path) -> Measured:
    """Its log is flushed to the disk with each write, which is how it comes: the only peer that is durable."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "influx.conf").write_text(f"""
        reporting-disabled = true
        bind-address = "127.0.0.1:{free_port()}"
        [meta]
        dir = "{folder}/meta"
        [data]
        dir = "{folder}/data"
        wal-dir = "{folder}/wal"
        query-log-enabled = false
        [http]
        bind-address = "127.0.0.1:{port}"
        log-enabled = false
        """)
    process = Measured("influxd", "run", "-config", f"{folder}/influx.conf", port=port)
    process.ask("/query?" + urllib.parse.urlencode({"q": "CREATE DATABASE bench"}))
    return process


Samples = Iterator[tuple[str, str, dict[str, float]]]


def list_samples(report: dict[str, Any]) -> Samples:
    """Section, object and values of everything in a report."""
    for section, objects, found in server.history_sections(report):
        for thing, fields in zip(objects, found):
            names, mask = server.kept_fields(section, tuple(fields))
            values = dict(zip(names, [value for value, kept in zip(fields.values(), mask) if kept]))
            yield section, thing or "-", {name: value for name, value in values.items()
                                          if isinstance(value, (int, float)) and value == value and name != server.BOOT}


def victoria_text(reports: list[dict[str, Any]], host: str) -> bytes:
    return "".join(f'{section}_{name}{{host="{host}",object="{thing}"}} {value} {int(report["time"] * 1000)}\n'
                   for report in reports for section, thing, values in list_samples(report)
                   for name, value in values.items()).encode()


def influx_lines(reports: list[dict[str, Any]], host: str) -> bytes:
    return "".join(f"{section},host={host},object={thing} "
                   f"{','.join(f'{name}={float(value)!r}' for name, value in values.items())} "
                   f"{int(report['time'] * 1000)}\n"
                   for report in reports for section, thing, values in list_samples(report) if values).encode()


def remote_write(reports: list[dict[str, Any]], host: str) -> bytes:
    """Prometheus' WriteRequest, in snappy's framing for what is not compressed."""
    out = bytearray()
    for report in reports:
        at = int(report["time"] * 1000)
        for section, thing, values in list_samples(report):
            for name, value in values.items():
                series = b"".join(field(1, field(1, label) + field(2, text.encode())) for label, text in (
                    (b"__name__", f"{section}_{name}"), (b"host", host), (b"object", thing)))
                out += field(1, series + field(2, b"\x09" + struct.pack("<d", value) + b"\x10" + varint(at)))
    packed = bytearray(varint(len(out)))
    for first in range(0, len(out), 60000):
        part = out[first : first + 60000]
        packed += b"\xf4" + struct.pack("<H", len(part) - 1) + part
    return bytes(packed)


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def ask_promql(kind: str, begin: int, end: int) -> str:
    step = {"month": 3600}.get(kind, 300)
    query = {"day": 'node_cpu_ratio{host="host0"}', "month": 'node_cpu_ratio{host="host0"}', "all": '{host="host0"}',
             "latest": '{__name__=~"node_.*"}'}[kind]
    if kind == "latest":
        return "/api/v1/query?" + urllib.parse.urlencode({"query": query, "time": end})
    return "/api/v1/query_range?" + urllib.parse.urlencode({"query": query, "start": begin, "end": end - 1, "step": step})


def ask_influxql(kind: str, begin: int, end: int) -> str:
    of = f"WHERE host = 'host0' AND time >= {begin}s AND time < {end}s"
    query = {"day": f"SELECT mean(cpu_ratio), min(cpu_ratio), max(cpu_ratio) FROM node {of} GROUP BY time(5m)",
             "month": f"SELECT mean(cpu_ratio), min(cpu_ratio), max(cpu_ratio) FROM node {of} GROUP BY time(1h)",
             "all": f"SELECT mean(*) FROM node, guests, storages, pools {of} GROUP BY time(5m), object",
             "latest": "SELECT last(*) FROM node GROUP BY host"}[kind]
    return "/query?" + urllib.parse.urlencode({"db": "bench", "q": query})


class Peer(NamedTuple):
    name: str
    program: str
    start: Callable[[Path], Measured]
    path: str
    encode: Callable[[list[dict[str, Any]], str], bytes]
    headers: dict[str, str]
    question: Callable[[str, int, int], str]
    connections: int  # Prometheus refuses what comes after something younger
    durable: bool = False


REMOTE_HEADERS = {"Content-Encoding": "snappy", "Content-Type": "application/x-protobuf",
                  "X-Prometheus-Remote-Write-Version": "0.1.0"}
INFLUX_PATH = "/write?db=bench&precision=ms"
PEERS = (
    Peer("VictoriaMetrics, remote write", "victoria-metrics", start_victoria, "/api/v1/write", remote_write,
         REMOTE_HEADERS, ask_promql, 16),
    Peer("VictoriaMetrics, text import", "victoria-metrics", start_victoria, "/api/v1/import/prometheus", victoria_text,
         {}, ask_promql, 16),
    Peer("Prometheus, remote write", "prometheus", start_prometheus, "/api/v1/write", remote_write, REMOTE_HEADERS,
         ask_promql, 1),
    Peer("InfluxDB 1.6", "influxd", start_influx, INFLUX_PATH, influx_lines, {}, ask_influxql, 16, durable=True),
)


def measure_peer(peer: Peer, folder: Path, options: argparse.Namespace, begin: int) -> None:
    """The same day of the same hosts, one report in a request; then the questions."""
    process = peer.start(folder / "day")
    hosts = [PlayedHost(f"host{number}", number) for number in range(options.hosts)]
    count, used, seconds = 0, 0.0, 0.0
    for first in range(0, DAY // STEP, HOUR_TICKS):
        batch = [(peer.path, peer.encode([report], host.name), lambda body: peer.headers)
                 for host, report in build_requests(hosts, begin + first * STEP, HOUR_TICKS)]
        before, started = process.cpu(), time.monotonic()
        post_all(process.port, batch, peer.connections, options.rate)
        used, seconds, count = used + process.cpu() - before, seconds + time.monotonic() - started, count + len(batch)
    values = count_values(hosts[0].report(0)) * count
    before = process.cpu()
    time.sleep(15)  # what it does in the background with it
    used += process.cpu() - before
    size = folder_bytes(folder / "day") / values
    print(f"{peer.name}: {used / count * 1000:.2f} CPU s per 1,000 reports, {'' if peer.durable else 'not '}durable when "
          f"acknowledged; {count / seconds:.0f} reports/s; {size:.2f} bytes per value now; PSS {process.memory():.0f} MB")
    ask_peer(process, peer, begin, begin + DAY, {"day": "24 h of one series", "all": "24 h of all series of a host"})
    process.stop()
    for feed in (feed_month, feed_fleet):
        process = peer.start(folder / feed.__name__)
        end, questions = feed(process, peer, begin)
        ask_peer(process, peer, end - 30 * DAY, end, questions)
        process.stop()


def feed_month(process: Measured, peer: Peer, begin: int) -> tuple[int, dict[str, str]]:
    """30 days of the CPU of one host and nothing else, an hour in a request."""
    host, end, requests = PlayedHost("host0", 1), begin + DAY, []
    for hour in range(end - 30 * DAY, end, HOUR):
        reports = []
        for at in range(hour, hour + HOUR, STEP):
            host.cpu = host.wander(host.cpu, 0.02)
            reports.append({"time": at + 0.25, "node": {"cpu_ratio": round(host.cpu, 5)}})
        requests.append((peer.path, peer.encode(reports, host.name), lambda body: peer.headers))
    post_all(process.port, requests, 1)
    time.sleep(6)  # until what came is seen by questions
    return end, {"month": "30 d of one series"}


def feed_fleet(process: Measured, peer: Peer, begin: int) -> tuple[int, dict[str, str]]:
    """One report of each of 1,000 hosts."""
    now = int(time.time())
    post_all(process.port, [(peer.path, peer.encode([PlayedHost(f"host{number}", number).report(now - 20)],
                                                    f"host{number}"), lambda body: peer.headers)
                            for number in range(1000)], peer.connections)
    time.sleep(6)
    return now, {"latest": "latest of 1,000 hosts (numbers of the section node)"}


# --- questions: time through HTTP, kept connection, median of many ---


def time_question(process: Measured, path: str, headers: dict[str, str] | None = None,
                  times: int = 40) -> tuple[float, int]:
    """Milliseconds of the median answer, and its bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=60)
    took, size = [], 0
    for _ in range(times):
        started = time.perf_counter()
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        size = len(answer.read())
        took.append((time.perf_counter() - started) * 1000)
        if answer.status != 200:
            raise SystemExit(f"{path}: {answer.status}")
    return statistics.median(took), size


def ask_ours(process: Measured, token: str, questions: dict[str, tuple[str, int]]) -> None:
    headers = {"Authorization": f"Bearer {token}"}
    for name, (path, times) in questions.items():
        took, size = time_question(process, path, headers, times)
        print(f"  ours, {name}: {took:.1f} ms ({size} bytes)")


def history_path(host: str, series: list[str], since: float, until: float, step: int | None = None) -> str:
    query = [("series", one) for one in series] + [("from", str(since)), ("to", str(until))]
    return f"/api/v1/hosts/{host}/history?" + urllib.parse.urlencode(query + ([("step", str(step))] if step else []))


def every_series(host: str, begin: float) -> list[str]:
    tick = server.build_tick(PlayedHost(host, 1).report(begin), begin)
    return [server.series_name(section, thing, name) for section, things, names in tick.parts for thing in things
            for name in names if name != server.BOOT]


def ask_peer(process: Measured, peer: Peer, begin: int, end: int, questions: dict[str, str]) -> None:
    for kind, told in questions.items():
        took, size = time_question(process, peer.question(kind, begin, end), None, 5 if kind == "all" else 20)
        if size < 500:
            raise SystemExit(f"{peer.name}, {told}: nothing was found")
        print(f"  {peer.name}, {told}: {took:.1f} ms ({size} bytes)", flush=True)


def measure_latest(folder: Path, options: argparse.Namespace) -> None:
    """The rows of 1,000 hosts, each changed since the last question (an ETag would answer in a fraction)."""
    process, token = serve_fleet(folder, 1000, 1, None)
    ask_ours(process, token, {"latest of 1,000 hosts": ("/api/v1/hosts?limit=1000", 10)})
    process.stop()


def measure_memory(folder: Path, options: argparse.Namespace) -> None:
    """2,000 hosts, until no more of their numbers is kept at hand; then after the largest answers there are."""
    process, token = serve_fleet(folder, 2000, 8, options.binary)
    print(f"ours{', frozen' if options.binary else ''}, 2,000 hosts of 30 guests: RSS {process.memory('Rss'):.0f} MB, "
          f"PSS {process.memory():.0f} MB", flush=True)
    ask_ours(process, token, {
        "latest of 2,000 hosts": ("/api/v1/hosts?limit=2000", 5), "200 of 60,000 guests": ("/api/v1/guests", 3),
        "metrics of 2,000 hosts": ("/metrics", 3)})
    print(f"  RSS {process.memory('Rss'):.0f} MB after these questions")
    process.stop()


def serve_fleet(folder: Path, hosts: int, rounds: int, binary: Path | None) -> tuple[Measured, str]:
    """A server that has had some reports of many hosts, and a token to ask it with."""
    players = [PlayedHost(f"host{number}", number) for number in range(hosts)]
    keys, token = prepare(folder, [one.name for one in players])
    process = serve(folder, binary=binary)
    for turn in range(rounds):
        requests = []
        for one in players:
            body = gzip.compress(json.dumps(one.report(time.time()), separators=(",", ":")).encode(), 1)
            signed = partial(sign, keys[one.name], f"{one.name}.{turn}")
            requests.append((f"/api/v1/hosts/{one.name}/reports", body, signed))
        post_all(process.port, requests, 16)
    return process, token


# --- main ---


def run(options: argparse.Namespace, folder: Path) -> None:
    begin = int(time.time()) // DAY * DAY - DAY
    if options.only in (None, "size"):
        (folder / "size").mkdir()
        measure_size(folder / "size", options.days)
        ask_long(folder / "size", begin + DAY)
    if options.only in (None, "cpu"):
        pin()
        for name in ("late", "cpu"):
            (folder / name).mkdir()
        measure_cpu(folder / "late", options, begin, played=False)[0].stop()
        process, token = measure_cpu(folder / "cpu", options, begin, played=True)
        ask_ours(process, token, {
            "24 h of one series": (history_path("host0", ["node.cpu_ratio"], begin, begin + DAY), 40),
            "24 h of one series, as received": (history_path("host0", ["node.cpu_ratio"], begin, begin + DAY, 30), 40),
            "24 h of all series of a host": (
                history_path("host0", every_series("host0", begin), begin, begin + DAY), 5)})
        process.stop()
        for number, peer in enumerate(() if options.no_peers else PEERS):
            if shutil.which(peer.program):
                measure_peer(peer, folder / f"peer{number}", options, begin)
        for measure in (measure_latest, measure_flash, measure_memory):
            path = folder / measure.__name__
            path.mkdir()
            measure(path, options)


def pin() -> None:
    """Everything from here on runs on one core, what is measured and what feeds it: a busy neighbour on the same core
    of the real machine made each of them up to half as dear again."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def ask_long(folder: Path, end: int) -> None:
    """30 days of one series, of the host that was fed for its size."""
    db = server.connect(str(folder / "monitor.db"))
    with server.transaction(db):
        token = server.create_api_token(db, "long", time.time(), admin=False, days=None)
    db.close()
    process = serve(folder)
    ask_ours(process, token, {
        "24 h of one series": (history_path("host0", ["node.cpu_ratio"], end - DAY, end), 40),
        "30 d of one series": (history_path("host0", ["node.cpu_ratio"], end - 30 * DAY, end), 40),
        "30 d of a rate": (history_path("host0", ["node.net_receive_bytes_total"], end - 30 * DAY, end), 40)})
    process.stop()


def machine() -> str:
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), "unknown CPU")
    return f"{os.cpu_count()} × {model}, Python {sys.version.split()[0]}, SQLite {server.sqlite3.sqlite_version}"


def main() -> None:
    options = parse_options()
    if options.serve:
        return serve_played(options.serve)
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="proxmon-bench-") as folder:
        run(options, Path(folder))


if __name__ == "__main__":
    main()
