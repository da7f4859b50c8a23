"""The history's VictoriaMetrics is killed, slow and full while 20 hosts report each second: nothing is lost, ingest goes on.

Real: server behind Caddy, VictoriaMetrics on a tmpfs of its own (root), a proxy before it that delays. 20 reports a
second are those of 600 hosts. Told for each fault: ingest beside it, reports that waited, seconds until it has caught up.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from beside import Victoria
from conftest import LiveServer
from faults import complaints, database_of, until
from load import Doorway, behind_caddy, in_ms, start_apart, timed_each_second

import server as monitor


def run(seconds: float) -> bool:
    if os.geteuid():
        print("   cannot be played here: needs root for a tmpfs")
        return True
    with tempfile.TemporaryDirectory(prefix="proxmon-victoria-") as folder:
        return play(Path(folder), min(60.0, max(10.0, seconds / 5)))


class SlowWire:
    """Passes bytes on to the store; `delay` seconds before each piece that goes there."""

    def __init__(self, port: int):
        self.port, self.delay = port, 0.0
        self.door = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.url = f"http://127.0.0.1:{self.door.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.door.accept()
                threading.Thread(target=self.carry, args=(client,), daemon=True).start()

    def carry(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=60) as store:
            threading.Thread(target=self.pump, args=(store, client, False), daemon=True).start()
            self.pump(client, store, True)

    def pump(self, source: socket.socket, target: socket.socket, there: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(65536):
                time.sleep(self.delay if there else 0)
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)])


def waiting(server: LiveServer) -> int:
    """Reports that the store has not given back yet."""
    db = monitor.connect(database_of(server), readonly=True)
    try:
        return db.execute("SELECT count(*) FROM report").fetchone()[0]
    finally:
        db.close()


def play(folder: Path, seconds: float) -> bool:
    with small_disk(folder / "disk", 96) as disk:
        store = Victoria(disk / "store")
        store.start()
        wire = SlowWire(store.port)
        try:
            with behind_caddy(folder, 20, HISTORY_URL=wire.url) as (server, _, door, hosts):
                return faults(server, door, hosts, store, wire, disk, seconds)
        finally:
            wire.door.close()
            store.stop(signal.SIGKILL)


def faults(server: LiveServer, door: Doorway, hosts: list[Any], store: Victoria, wire: SlowWire, disk: Path, seconds: float) -> bool:
    filler = disk / "filler"

    def restart() -> None:
        store.stop(signal.SIGKILL)
        store.start()

    def empty() -> None:
        filler.unlink()
        if not (store.process and store.process.poll() is None and store.answers()):
            restart()  # it ends itself when it cannot write; its unit starts it again

    played: tuple[tuple[str, Callable[[], Any], Callable[[], Any]], ...] = (
        ("none", lambda: None, lambda: None),
        ("killed, and away", lambda: store.stop(signal.SIGKILL), store.start),
        ("killed twice while it takes", restart, restart),
        ("slow: 2 s before each piece", lambda: setattr(wire, "delay", 2.0), lambda: setattr(wire, "delay", 0.0)),
        ("its disk is full", lambda: fill(filler), empty),
    )
    print("| the store | reports acknowledged | refused | ingest p50/p99 ms | waited at the end | caught up in | \n" + "|---" * 6 + "|")
    acknowledged: dict[str, set[int]] = {host.name: set() for host in hosts}
    for name, fault, mend in played:
        fault()
        players = start_apart(lambda: fleet(hosts, door, seconds))
        told, _ = players()
        for host in hosts:  # those of the process apart
            host.seq = told[host.name][-1][0]
            acknowledged[host.name].update(seq for seq, status, _ in told[host.name] if status == 200)
        behind = waiting(server)
        began = time.monotonic()
        mend()
        until(lambda: not waiting(server), 400, f"{name}: the store has all")
        took = time.monotonic() - began
        answers = [(status, wait) for each in told.values() for _, status, wait in each]
        good = [wait for status, wait in answers if status == 200]
        print(f"| {name} | {len(good)} | {len(answers) - len(good)} | {in_ms(good)} | {behind} | {took:.0f} s |", flush=True)
    return there_once(acknowledged, store, server)


def there_once(acknowledged: dict[str, set[int]], store: Victoria, server: LiveServer) -> bool:
    missing = doubled = 0
    for name, seqs in acknowledged.items():
        found = [int(value) for row in store.values(f'proxmon_report_seq{{host="{name}"}}', time.time()) for _, value in row["values"]]
        missing += len(seqs - set(found))
        doubled += len(found) - len(set(found))
    print(f"   of {sum(map(len, acknowledged.values()))} acknowledged {missing} are not in the store, {doubled} twice; "
          f"complaints in the log: {complaints(server.log)}")  # fmt: skip
    print("   the server's log: " + " | ".join(line for line in server.log.read_text().splitlines() if "history" in line)[:900])
    return not missing and not doubled


def fill(path: Path) -> None:
    with suppress(OSError), open(path, "wb", buffering=0) as handle:
        while True:
            handle.write(bytes(1 << 16))


async def fleet(hosts: list[Any], door: Doorway, seconds: float) -> dict[str, list[tuple[int, int, float]]]:
    """By host: number, status, seconds."""
    end, before = time.monotonic() + seconds, {host.name: host.seq for host in hosts}
    told = await asyncio.gather(*(timed_each_second(host, door, end) for host in hosts))
    return {host.name: [(before[host.name] + n, *each) for n, each in enumerate(took, 1)] for host, took in zip(hosts, told)}
