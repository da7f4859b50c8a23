"""A week that an agent has kept (20,160 reports) is drained beside 20 hosts that report each second, through Caddy.

The agent is real, its spool is filled as it fills it itself. Told: how long that takes, what it costs the others, and
whether every report is there once.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from conftest import LiveAgent, build_guest, build_report
from faults import complaints, database_of, stored, until
from load import Doorway, Watcher, behind_caddy, in_ms, start_apart, timed_each_second

import agent

REPORTS, EVERY = 7 * 2880, 30


def run(seconds: float) -> bool:
    with tempfile.TemporaryDirectory(prefix="proxmon-backlog-") as folder:
        told = backlog(Path(folder), int(os.environ.get("REPORTS", REPORTS)), max(seconds, 60))
    print("   " + str(told), flush=True)
    return told["found"] == told["acknowledged"] and not told["doubled"] and not told["left in the spool"]


def fill_spool(state: Path, host: str, count: int) -> None:
    """`count` reports of the past, 30 s apart, as agent.Spool names and packs them."""
    spool = state / "spool"
    spool.mkdir(mode=0o700)
    begin = time.time() - count * EVERY + 600  # none is older than the agent keeps before its turn has come
    guests = [build_guest(vmid) for vmid in range(100, 130)]
    for seq in range(1, count + 1):
        at = begin + seq * EVERY
        report = build_report(host, seq, at, "week", guests=[{**guest, "cpu_ratio": (seq * n) % 97 / 97} for n, guest in enumerate(guests)])
        (spool / f"{seq:012d}-{int(at)}{agent.SPOOL_ENDING}").write_bytes(agent.pack(agent.to_json(report)))


def backlog(folder: Path, count: int, most: float) -> dict[str, Any]:
    with behind_caddy(folder, 20) as (server, caddy, door, hosts):
        token = server.register("week")
        probe = LiveAgent(folder, server, token, host="week", fast=5)
        probe.config.write_text(f'ca_file = "{caddy.root}"\n{probe.config.read_text().replace(server.url, caddy.url)}')
        fill_spool(probe.state, "week", count)
        watcher = Watcher(server, caddy, {"page": "/", "healthz": "/healthz"})
        alone = start_apart(lambda: fleet(hosts, door, 20))
        calm, _ = alone()
        for host in hosts:
            host.seq += 100  # those of the process apart
        began = time.monotonic()
        probe.start()
        beside = start_apart(lambda: fleet(hosts, door, 40))
        watcher.start()
        busy, _ = beside()
        until(lambda: not any((probe.state / "spool").iterdir()), most * 3, "the spool is empty")
        took = time.monotonic() - began
        told = watcher.told()
        probe.stop()
        left = len(list((probe.state / "spool").iterdir()))
        found = [key for key in stored(database_of(server)) if key[:2] == ("week", "week")]
        live = [key for key in stored(database_of(server)) if key[0] == "week" and key[1] != "week"]
        assert not complaints(probe.log) and not complaints(server.log)
        return {"acknowledged": count, "found": len(set(found)), "doubled": len(found) - len(set(found)),
                "left in the spool": left, "drained in s": round(took, 1), "reports/s": round(count / took),
                "live reports of the same agent meanwhile": len(set(live)),
                "others' ingest ms p50/p99 before": in_ms([wait for _, wait in calm]),
                "beside it": in_ms([wait for _, wait in busy]), "of these refused": sum(status != 200 for status, _ in busy),
                "page": told["page"], "healthz": told["healthz"], "server MiB": round(watcher.rss),
                "load": round(os.getloadavg()[0], 1)}  # fmt: skip


async def fleet(hosts: list[Any], door: Doorway, seconds: float) -> list[tuple[int, float]]:
    end = time.monotonic() + seconds
    return sum(await asyncio.gather(*(timed_each_second(host, door, end) for host in hosts)), [])
