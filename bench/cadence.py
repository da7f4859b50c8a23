#!/usr/bin/env python3
"""Measure what a report costs at the pace of a fleet: each host every 30 seconds, over TLS through Caddy, as agents come.

    options -> proxy -> targets -> feeding -> main

    bench/cadence.py                            40 and 200 hosts, 4 minutes each, next to the peers that are installed
    bench/cadence.py --hosts 40 --seconds 60 --no-peers     a first look

Everything is fed side by side, so that a busy machine is busy for all: compare the figures of one run. Counted is the
CPU time of the server alone, by the kernel's accounting, with all that it does beside taking reports: rules, alerts,
packing. A report has 250 values, as in history.py.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import history

STEP = history.STEP


# --- options ---


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what a report costs at a true pace, next to peers.")
    parser.add_argument("--hosts", type=int, nargs="+", default=[40, 200], help="sizes of the fleet, one after the other")
    parser.add_argument("--seconds", type=int, default=240, help="how long each is measured")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--server", type=Path, nargs="+", default=[history.ROOT / "server.py"],
                        help="other servers than this checkout's, e.g. of an older commit, side by side")
    return parser.parse_args()


# --- proxy: Caddy with a certificate of its own in front of each server ---


class Proxy:
    """Caddy with one TLS port for each server behind it."""

    def __init__(self, folder: Path, behind: list[int]):
        folder.mkdir()
        self.ports = [history.free_port() for _ in behind]
        sites = "".join(f"https://127.0.0.1:{port} {{\n\ttls internal\n\treverse_proxy 127.0.0.1:{target} {{\n"
                        "\t\ttransport http {\n\t\t\tkeepalive 90s\n\t\t}\n\t}\n}\n"
                        for port, target in zip(self.ports, behind))
        options = "admin off\n\tauto_https disable_redirects\n\tskip_install_trust\n\tlog {\n\t\tlevel ERROR\n\t}"
        (folder / "Caddyfile").write_text(f"{{\n\t{options}\n}}\n{sites}")
        self.process = subprocess.Popen(
            ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")],
            env={**os.environ, "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "HOME": str(folder)},
            stdout=subprocess.DEVNULL, stderr=(folder / "log").open("wb"))
        self.root = folder / "caddy/pki/authorities/local/root.crt"
        for _ in range(200):
            if self.root.exists() and all(self.answers(port) for port in self.ports):
                return
            time.sleep(0.1)
        raise SystemExit(f"Caddy did not start: {(folder / 'log').read_text()[-1000:]}")

    def answers(self, port: int) -> bool:
        try:
            post(port, self.context(), "/healthz", b"", {})
        except (OSError, http.client.HTTPException):
            return False
        return True

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.root))


def post(port: int, context: ssl.SSLContext, path: str, body: bytes, headers: dict[str, str]) -> int:
    """One request on a connection of its own, as an agent makes it; gives back the status."""
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=context)
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


# --- targets: a server, and how a report is put to it ---


class Target:
    """One server under measurement. `encode(host, report)` -> path, body, headers."""

    def __init__(self, name: str, process: history.Measured,
                 encode: Callable[[str, dict[str, Any]], tuple[str, bytes, dict[str, str]]]):
        self.name, self.process, self.encode = name, process, encode
        self.sent, self.failed, self.begun = 0, 0, (0.0, 0.0)

    def cpu(self) -> tuple[float, float]:
        """Seconds in the program and in the kernel."""
        fields = Path(f"/proc/{self.process.process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = os.sysconf("SC_CLK_TCK")
        return int(fields[11]) / ticks, int(fields[12]) / ticks

    def begin(self) -> None:
        """Count from here on."""
        self.sent, self.begun = 0, self.cpu()

    def result(self) -> str:
        user, kernel = (end - begun for begun, end in zip(self.begun, self.cpu()))
        failed = f"; {self.failed} FAILED" if self.failed else ""
        return (f"  {self.name}: {(user + kernel) / self.sent * 1000:.2f} CPU s per 1,000 reports, {kernel:.2f} s of "
                f"{user + kernel:.2f} s in the kernel, {self.sent} reports; PSS {self.process.memory():.0f} MB{failed}")


REGISTER = """
import sys, time, server
config = server.Config()
with server.transaction(server.open_database(config, create=True)) as db:
    for name in sys.argv[1:]:
        print(name, server.host_key(config.secret(), server.insert_host(db, name, time.time())["nonce"]).hex())
"""


def start_ours(folder: Path, names: list[str], source: Path) -> Target:
    """`serve` of one checkout on a new database, with these hosts."""
    folder.mkdir()
    env = {**os.environ, "DATABASE_PATH": str(folder / "monitor.db"), "DASHBOARD_PASSWORD_HASH": ""}
    told = subprocess.run([sys.executable, "-c", REGISTER, *names], env=env, cwd=source.resolve().parent, check=True,
                          capture_output=True, text=True).stdout
    keys = {name: bytes.fromhex(key) for name, key in (line.split() for line in told.splitlines())}
    port = history.free_port()
    process = history.Measured(sys.executable, str(source), "serve", port=port, env={**env, "PORT": str(port)})

    def encode(host: str, report: dict[str, Any]) -> tuple[str, bytes, dict[str, str]]:
        body = gzip.compress(json.dumps(report, separators=(",", ":")).encode(), 1)
        return f"/api/v1/hosts/{host}/reports", body, history.sign(keys[host], f"{host}.{report['seq']}", body)

    return Target(f"ours, {source.parent.name}", process, encode)


def start_peers(folder: Path) -> list[Target]:
    targets = []
    for number, peer in enumerate(history.PEERS):
        if shutil.which(peer.program):
            def encode(host: str, report: dict[str, Any], peer: history.Peer = peer) -> tuple[str, bytes, dict[str, str]]:
                return peer.path, peer.encode([report], host), peer.headers
            targets.append(Target(f"{peer.name} ({'' if peer.durable else 'not '}durable when acknowledged)",
                                  peer.start(folder / f"peer{number}"), encode))
    return targets


# --- feeding: every host at its own moment of the 30 seconds ---


def feed(target: Target, port: int, context: ssl.SSLContext, hosts: int, began: float, seconds: int) -> None:
    """Post each host's report at its time; the first round warms up and is not counted."""
    players = [history.PlayedHost(f"host{number}", number) for number in range(hosts)]
    for turn in range(1 + seconds // STEP):
        for number, player in enumerate(players):
            due = began + (turn + number / hosts) * STEP
            time.sleep(max(0.0, due - time.monotonic()))
            if turn == 1 and number == 0:
                target.begin()
            path, body, headers = target.encode(player.name, player.report(time.time()))
            try:
                fine = 200 <= post(port, context, path, body, headers) < 300
            except (OSError, http.client.HTTPException):
                fine = False
            target.sent, target.failed = target.sent + 1, target.failed + (not fine)


def measure(folder: Path, hosts: int, options: argparse.Namespace) -> None:
    names = [f"host{number}" for number in range(hosts)]
    targets = [start_ours(folder / f"ours{number}", names, source) for number, source in enumerate(options.server)]
    targets += [] if options.no_peers else start_peers(folder)
    proxy = Proxy(folder / "proxy", [target.process.port for target in targets])
    began, context = time.monotonic() + 1, proxy.context()
    threads = [threading.Thread(target=feed, args=(target, port, context, hosts, began, options.seconds))
               for target, port in zip(targets, proxy.ports)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{hosts} hosts, every {STEP} s, {options.seconds} s; load of the machine {os.getloadavg()[0]:.1f}")
    for target in targets:
        print(target.result(), flush=True)
        target.process.stop()
    proxy.process.terminate()
    proxy.process.wait(20)


# --- main ---


def main() -> None:
    options = parse_options()
    print(history.machine(), flush=True)
    for hosts in options.hosts:
        with tempfile.TemporaryDirectory(prefix="proxmon-bench-") as folder:
            measure(Path(folder), hosts, options)


if __name__ == "__main__":
    main()
