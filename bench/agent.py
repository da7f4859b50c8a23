#!/usr/bin/env python3
"""What the agent costs: CPU per fast, medium and slow tick, memory, beside prometheus-node-exporter at the same pace.

    sink -> processes -> recorded host -> measurements -> main

    bench/agent.py [--ticks 100] [--pace 2] [--python /usr/bin/python3] [--program agent.py]
    bench/agent.py --field --ticks 10      30 s pace on the recorded host alone, as in the field

Reports go over TLS, as they must anywhere but on loopback.

CPU is the kernel's account of the process (and, apart, of the commands it ran), memory is PSS from smaps_rollup.
`recorded` is this machine with the files of a recorded PVE host of 28 guests in place of its own /proc, /sys, /etc/pve
and /run/pve: as many reads, parsed by the same code, over real system calls; commands are not run there.
"""

from __future__ import annotations

import argparse
import http.client
import importlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "agent.py"
HOST = ROOT / "tests" / "hosts" / "pve9-raidz2-draid"
DAY = 86400
TOKEN = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
HERTZ = os.sysconf("SC_CLK_TCK")


# --- sink: a server that accepts everything, at little cost ---


class Sink(threading.Thread):
    """Counts the reports of each tick, and what they weigh. TLS, with a certificate of its own."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.folder = tempfile.TemporaryDirectory()
        self.certificate, key = f"{self.folder.name}/cert.pem", f"{self.folder.name}/key.pem"
        argv = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
        names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", self.certificate]
        subprocess.run([*argv.split(), *names], check=True, capture_output=True)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(self.certificate, key)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.ticks = {"fast": 0, "medium": 0, "slow": 0}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.start()

    def run(self) -> None:
        while True:
            threading.Thread(target=self.serve, args=(self.listening.accept()[0],), daemon=True).start()

    def serve(self, raw: socket.socket) -> None:
        peer = self.context.wrap_socket(raw, server_side=True)
        stream = peer.makefile("rb")
        while line := stream.readline():
            size = 0
            while line not in (b"\r\n", b""):
                name, _, value = line.partition(b":")
                size = int(value) if name.lower() == b"content-length" else size
                line = stream.readline()
            body = stream.read(size)
            content = zlib.decompress(body, 31)
            value_read = json.loads(content)
            reports = value_read if isinstance(value_read, list) else [value_read]
            for report in reports:
                self.ticks[report["tick"]] += 1
                self.sizes[report["tick"]] = (len(content), len(body))
            told = (len(reports), time.time())
            answer = b'{"status":"ok","accepted":%d,"duplicates":0,"server_time":%.3f}' % told
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)


# --- processes: start one, ask the kernel what it has used ---


def cpu_ms(pid: int) -> tuple[float, float]:
    """The process's own CPU time, and that of the children it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own, children = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
    return own * 1000 / HERTZ, children * 1000 / HERTZ


def threads_ms(pid: int) -> float:
    """CPU time of the threads there are, to the microsecond: for stretches in which none ends."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1_000_000


def pss_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


@contextmanager
def running_agent(python: str, sink: Sink, intervals: dict[str, int], recorded: Path | None = None) -> Iterator[int]:
    """The pid of `start` against the sink."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = "".join(f"{tick}_seconds = {value}\n" for tick, value in intervals.items())
        config = folder / "agent.toml"
        config.write_text(
            f'server_url = "https://localhost:{sink.port}"\nca_file = "{sink.certificate}"\n'
            f'token = "{TOKEN}"\nhost_id = "bench"\n[intervals]\n{seconds}'
        )
        config.chmod(0o600)
        program = [str(PROGRAM)] if recorded is None else [__file__, "--recorded-agent", str(PROGRAM), str(recorded)]
        process = subprocess.Popen(
            [python, *program, "start", "--config", str(config)],
            env={"PATH": os.environ["PATH"], "STATE_DIRECTORY": str(folder / "state"), "MALLOC_ARENA_MAX": "2"},
            stdout=subprocess.DEVNULL,
        )
        try:
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def wait_until(condition: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise SystemExit("bench: the agent sends nothing")
        time.sleep(0.02)


# --- recorded host: the agent with other files below the same paths ---

MOVED = ("/proc/", "/sys/", "/etc/pve", "/run/pve", "/var/log/pve", "/var/lib/pve-manager", "/usr/share/perl5")


@contextmanager
def live_recording() -> Iterator[Path]:
    """A copy of the recorded files whose pvestatd writes every 10 s, as on a living host."""
    with tempfile.TemporaryDirectory() as name:
        files = Path(name) / "files"
        shutil.copytree(HOST / "files", files, symlinks=True)
        metrics = files / "run/pve/metrics"
        snapshot = json.loads(metrics.read_text().split("\n")[0])
        ended = threading.Event()

        def write() -> None:
            while True:
                for part in snapshot.values():
                    part["timestamp"] = int(time.time())
                fresh = metrics.with_suffix(".new")
                fresh.write_text(json.dumps(snapshot) + "\n")
                fresh.replace(metrics)
                if ended.wait(10):
                    return

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        try:
            yield files
        finally:
            ended.set()
            writer.join()


def run_recorded_agent(program: str, files: str, argv: list[str]) -> int:
    """`start` with the paths of a host moved to its recording. Costs one more call for each file."""
    sys.path.insert(0, os.path.dirname(program))
    agent = importlib.import_module("agent")  # the one above, not this file

    def move(path: Any) -> Any:
        if isinstance(path, str) and path.startswith(MOVED) and not path.startswith("/proc/self"):
            return files + path
        return path

    real_open, real_list, real_stat = os.open, os.listdir, os.stat
    real_realpath, real_exists = os.path.realpath, os.path.exists
    os.open = lambda path, *more, **named: real_open(move(path), *more, **named)
    os.listdir = lambda path=".": real_list(move(path))
    os.stat = lambda path, **named: real_stat(move(path), **named)
    os.path.exists = lambda path: real_exists(move(path))
    os.path.realpath = lambda path, **named: real_realpath(move(path), **named)
    return agent.main(argv)


# --- measurements: the figures ---


def measure_fast(python: str, ticks: int, pace: int, recorded: Path | None = None) -> dict[str, float]:
    """CPU per fast tick and memory, over `ticks` ticks once the first reports are out."""
    sink = Sink()
    with running_agent(python, sink, {"fast": pace, "medium": DAY, "slow": DAY}, recorded) as pid:
        wait_until(lambda: sink.ticks["fast"] >= 3, 20 + 4 * pace)
        time.sleep(0.5)
        first, count = (threads_ms(pid), cpu_ms(pid)[1]), sink.ticks["fast"]
        wait_until(lambda: sink.ticks["fast"] >= count + ticks, 20 + 2 * ticks * pace)
        time.sleep(0.5)
        last, done = (threads_ms(pid), cpu_ms(pid)[1]), sink.ticks["fast"] - count
        raw, packed = sink.sizes["fast"]
        return {
            "ms": (last[0] - first[0]) / done,
            "children_ms": (last[1] - first[1]) / done,
            "pss_mb": pss_mb(pid),
            "bytes": raw,
            "packed": packed,
        }


def measure_idle(python: str, seconds: int) -> float:
    """CPU in 30 s without a tick: the look between ticks and the watchdog's turn."""
    sink = Sink()
    with running_agent(python, sink, {"fast": DAY, "medium": DAY, "slow": DAY}) as pid:
        wait_until(lambda: sink.ticks["slow"] >= 1, 60)
        time.sleep(2)
        first = threads_ms(pid)
        time.sleep(seconds)
        return (threads_ms(pid) - first) * 30 / seconds


def measure_round(python: str, tick: str, rounds: int, fast_ms: float) -> tuple[float, float, float]:
    """CPU of one medium or slow round (own, of its commands), what fast ticks cost taken off; memory afterwards."""
    sink = Sink()
    intervals = {"fast": 2, "medium": 2 if tick == "medium" else DAY, "slow": DAY}
    if tick == "slow":  # the medium interval cannot be longer than the slow one: its share is measured and taken off
        intervals = {"fast": 2, "medium": 2, "slow": 2}
    with running_agent(python, sink, intervals) as pid:
        wait_until(lambda: sink.ticks[tick] >= 2, 60)
        first, counts = cpu_ms(pid), dict(sink.ticks)
        wait_until(lambda: sink.ticks[tick] >= counts[tick] + rounds, 60 + 8 * rounds)
        last = cpu_ms(pid)
        done, fast = sink.ticks[tick] - counts[tick], sink.ticks["fast"] - counts["fast"]
        return (last[0] - first[0] - fast * fast_ms) / done, (last[1] - first[1]) / done, pss_mb(pid)


def measure_node_exporter(scrapes: int, pace: int) -> dict[str, float] | None:
    """CPU per scrape and memory of Debian's package with its own settings; None where it is not installed."""
    program = shutil.which("prometheus-node-exporter")
    if program is None:
        return None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [program, f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        time.sleep(1)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        first = (0.0, 0.0)
        size = 0
        for number in range(scrapes + 3):
            if number == 3:
                first = cpu_ms(process.pid)
            connection.request("GET", "/metrics")
            size = len(connection.getresponse().read())
            time.sleep(pace)
        last = cpu_ms(process.pid)
        return {"ms": (last[0] - first[0]) / scrapes, "pss_mb": pss_mb(process.pid), "bytes": size}
    finally:
        process.terminate()
        process.wait()


# --- main: one run, one table ---


def main() -> int:
    global PROGRAM
    if sys.argv[1:2] == ["--recorded-agent"]:
        return run_recorded_agent(sys.argv[2], sys.argv[3], sys.argv[4:])
    parser = argparse.ArgumentParser(description="What the agent costs.")
    parser.add_argument("--ticks", type=int, default=100, help="fast ticks, and scrapes")
    parser.add_argument("--rounds", type=int, default=15, help="medium and slow rounds")
    parser.add_argument("--pace", type=int, default=2, help="seconds between fast ticks")
    parser.add_argument("--idle", type=int, default=60, help="seconds without a tick")
    parser.add_argument("--python", default="/usr/bin/python3", help="the interpreter that runs the agent")
    parser.add_argument("--program", type=Path, default=PROGRAM, help="another agent.py, to compare with")
    parser.add_argument("--field", action="store_true", help="only the recorded host, at the pace of the field: 30 s")
    options = parser.parse_args()
    PROGRAM = options.program.resolve()
    options.pace = 30 if options.field else options.pace

    print(f"{options.ticks} fast ticks at {options.pace} s, {options.rounds} rounds, {os.cpu_count()} cores")
    print(f"{'':36} {'CPU ms':>8} {'commands':>9} {'PSS MB':>8} {'bytes':>8} {'sent':>7}")

    def row(name: str, ms: float, children: float | str = "", pss: float | str = "", *sizes: float) -> None:
        cells = [f"{value:.1f}" if isinstance(value, float) else value for value in (children, pss)]
        told = " ".join(f"{size:>8.0f}" for size in sizes)
        print(f"{name:36} {ms:8.2f} {cells[0]:>9} {cells[1]:>8} {told}", flush=True)

    python = options.python
    if options.field:
        with live_recording() as files:
            field = measure_fast(python, options.ticks, options.pace, files)
        row("30 s in the field, recorded", field["ms"], "", field["pss_mb"], field["bytes"], field["packed"])
        return 0
    fast = measure_fast(python, options.ticks, options.pace)
    row("fast tick, this machine", fast["ms"], fast["children_ms"], fast["pss_mb"], fast["bytes"], fast["packed"])
    with live_recording() as files:
        played = measure_fast(python, options.ticks, options.pace, files)
    row("fast tick, recorded", played["ms"], played["children_ms"], "", played["bytes"], played["packed"])
    row("30 s without a tick", measure_idle(python, options.idle))
    medium, medium_children, pss = measure_round(python, "medium", options.rounds, fast["ms"])
    row("medium tick, this machine", medium, medium_children, pss)
    slow, slow_children, pss = measure_round(python, "slow", options.rounds, fast["ms"])
    row("slow tick, this machine", slow - medium, slow_children - medium_children, pss)
    exporter = measure_node_exporter(options.ticks, options.pace)
    if exporter is None:
        print("prometheus-node-exporter is not installed")
    else:
        row("prometheus-node-exporter, a scrape", exporter["ms"], "", exporter["pss_mb"], exporter["bytes"])
        print(f"node_exporter / fast tick: {exporter['ms'] / fast['ms']:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
