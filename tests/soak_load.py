"""Load through a real Caddy: a whole fleet that comes back at once, a page polled without end, and fleets at true pace.

STORM=5000 and SCALE=20,200,1000,5000 choose the numbers of hosts; 0 leaves a part out. Hosts are played on the same
machine, so that its cores serve both sides: the limits found here are lower than a server's of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from faults import database_of, stored
from load import Doorway, Watcher, behind_caddy, cpu, in_ms, post, refusals, rss, start_apart, timed, timed_each_second

import agent

WAITED = 20  # reports of each host after an outage of 10 minutes


def run(seconds: float) -> bool:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    good = True
    if count := int(os.environ.get("STORM", "5000")):
        with tempfile.TemporaryDirectory(prefix="proxmon-load-") as folder:
            told = storm(Path(folder), count, seconds)
        good = told["found"] == told["reports waiting"] and not told["doubled"]
        print("   " + str(told), flush=True)
    if rate := int(os.environ.get("POLLS", "1000")):
        with tempfile.TemporaryDirectory(prefix="proxmon-load-") as folder:
            print("   " + str(polled(Path(folder), min(30, seconds / 4), rate)), flush=True)
    counts = [int(count) for count in os.environ.get("SCALE", "20,200,1000,5000").split(",") if int(count)]
    if counts:
        print("| hosts | reports/s | server | Caddy | players | server MiB | disk/day as received | ingest | page | search | /metrics |"
              " healthz | lost | tried again | Caddy said | pages that failed | load |\n" + "|---" * 17 + "|", flush=True)  # fmt: skip
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="proxmon-load-") as folder:
            told = pace(Path(folder), count, max(60.0, seconds / 4))
        print("| " + " | ".join(map(str, told.values())) + " |", flush=True)
        good = good and not told["lost"]
    return good


# --- back-pressure ---


def storm(folder: Path, count: int, seconds: float) -> dict[str, Any]:
    """`count` hosts, each with a backlog, come back in the same second."""
    with behind_caddy(folder, count) as (server, caddy, door, hosts):
        watcher = Watcher(server, caddy, {"healthz": "/healthz", "page": "/"})

        async def everybody() -> list[tuple[float, int, int]]:
            began = time.monotonic()
            return await asyncio.gather(*(come_back(host, door, began, max(seconds, 60)) for host in hosts))

        players = start_apart(everybody)
        watcher.start()
        ends, busy = players()
        told = watcher.told()
        ended = sorted(end for end, _, _ in ends if end)
        found = stored(database_of(server))
        return {"hosts": count, "reports waiting": count * WAITED, "hosts drained": len(ended), "found": len(set(found)),
                "doubled": len(found) - len(set(found)), "drained in s": round(max(ended, default=0), 1),
                "half of the hosts by s": round(ended[len(ended) // 2], 1) if ended else None,
                "most tries of one host": max(tries for _, tries, _ in ends), "refused in all": sum(refused for *_, refused in ends),
                "healthz ms p50/p99": told["healthz"], "page ms p50/p99": told["page"], "pages that failed": len(watcher.failed),
                "Caddy said": refusals(caddy), "server MiB": round(watcher.rss), "players' CPU s": round(busy, 1), "load": round(os.getloadavg()[0], 1)}  # fmt: skip


async def come_back(host: Any, door: Doorway, began: float, most: float) -> tuple[float, int, int]:
    """When a host was answered with yes (0: never), how often it tried, how often it was refused."""
    reports = b"[" + b",".join(host.report(time.time() - 30 * (WAITED - n)) for n in range(WAITED)) + b"]"
    backoff, tries, refused = agent.BACKOFF_FIRST, 0, 0
    while time.monotonic() - began < most:
        tries += 1
        status, asked, body = await post(door, host.request(reports))
        if status == 200 and json.loads(body)["accepted"] + json.loads(body)["duplicates"] == WAITED:
            return time.monotonic() - began, tries, refused
        refused += status != 0
        wait = max(backoff * (0.5 + os.urandom(1)[0] / 512), agent.BACKOFF_FIRST)  # as the agent does
        await asyncio.sleep(max(wait, min(asked, wait + agent.RETRY_AFTER_LIMIT)))
        backoff = min(2 * backoff, agent.BACKOFF_LAST)
    return 0.0, tries, refused


def polled(folder: Path, seconds: float, rate: int) -> dict[str, Any]:
    """A page that is asked for `rate` times a second, whether or not it was answered, and 20 hosts that report beside it."""
    with behind_caddy(folder, 20) as (server, caddy, door, hosts):
        cookie = Watcher(server, caddy, {}).cookie
        request = f"GET / HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\nConnection: close\r\n\r\n".encode()

        async def poll() -> list[tuple[int, float]]:
            """At most 2,000 open at once: browsers and Caddy have a limit too."""
            asked: set[asyncio.Task[None]] = set()
            polls: list[tuple[int, float]] = []

            async def ask() -> None:
                polls.append(await timed(post(door, request)))

            due, end = time.monotonic(), time.monotonic() + seconds
            while time.monotonic() < end:
                if len(asked) < 2000:
                    task = asyncio.create_task(ask())
                    asked.add(task)
                    task.add_done_callback(asked.discard)
                due += 1 / rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            for task in asked:
                task.cancel()
            return polls

        async def fleet() -> list[tuple[int, float]]:
            end = time.monotonic() + seconds
            return sum(await asyncio.gather(*(timed_each_second(host, door, end) for host in hosts)), [])

        pollers, players = start_apart(poll), start_apart(fleet)
        took, _ = players()
        polls, _ = pollers()
        good, answered = [wait for status, wait in took if status == 200], [wait for status, wait in polls if status == 200]
        return {"polls asked/s": rate, "answered/s": round(len(answered) / seconds), "refused/s": round((len(polls) - len(answered)) / seconds),
                "poll ms p50/p99": in_ms(answered), "reports": len(took), "not acknowledged at once": len(took) - len(good),
                "ingest ms p50/p99": in_ms(good), "load": round(os.getloadavg()[0], 1)}  # fmt: skip


# --- scale ---


def pace(folder: Path, count: int, seconds: float, every: float = 30.0) -> dict[str, Any]:
    """`count` hosts at true pace for some time, behind Caddy; all are known before the time that is measured."""
    with behind_caddy(folder, count) as (server, caddy, door, hosts):

        async def fleet() -> Any:
            begin = time.monotonic() + every
            told = await asyncio.gather(*(
                report_each(host, door, every * n / len(hosts), every, begin + seconds) for n, host in enumerate(hosts)))
            took = [wait for answers in told for status, at, wait in answers if status == 200 and at > begin]
            statuses = Counter(status for answers in told for status, *_ in answers)
            return took, statuses

        watcher = Watcher(server, caddy, {"page": "/", "search": "/api/v1/hosts?q=host0001", "metrics": "/metrics", "healthz": "/healthz"},
                          every=5.0, seldom={"metrics"})  # fmt: skip
        assert server.process
        players = start_apart(fleet)
        time.sleep(every)
        watcher.start()
        began, spent, caddy_spent = time.monotonic(), cpu(server.process.pid), cpu(caddy.process.pid)
        time.sleep(seconds)
        wall = time.monotonic() - began
        busy, caddy_busy = cpu(server.process.pid) - spent, cpu(caddy.process.pid) - caddy_spent
        told = watcher.told()
        (took, statuses), theirs = players()
        size = sum(os.path.getsize(database_of(server) + end) for end in ("", "-wal"))
        found = stored(database_of(server))
        return {"hosts": count, "reports/s": round(len(took) / wall, 1), "cpu": f"{busy / wall:.0%}", "caddy": f"{caddy_busy / wall:.0%}",
                "players": f"{theirs / (wall + every):.0%}", "rss": round(max(watcher.rss, rss(server.process.pid))),
                "disk": f"{size / max(1, len(found)) * count * 86400 / every / 2**30:.1f} GiB", "ingest": in_ms(took),
                **{name: told[name] for name in ("page", "search", "metrics", "healthz")},
                "lost": max(0, statuses.pop(200, 0) - len(set(found))), "tries": dict(statuses) or 0, "caddy said": refusals(caddy) or "-", "failed": watcher.failed[:2] or "-", "load": round(os.getloadavg()[0], 1)}  # fmt: skip


async def report_each(host: Any, door: Doorway, first: float, every: float, end: float) -> list[tuple[int, float, float]]:
    """A report each `every` seconds, as the agent sends it: status, time and seconds of each try."""
    await asyncio.sleep(first)
    told: list[tuple[int, float, float]] = []
    while time.monotonic() < end:
        due, backoff, body = time.monotonic() + every, agent.BACKOFF_FIRST, host.report(time.time())
        while True:
            status, wait = await timed(post(door, host.request(body)))
            told.append((status, time.monotonic(), wait))
            if status == 200 or time.monotonic() > end + 60:
                break
            await asyncio.sleep(backoff * (0.5 + random.random() / 2))
            backoff = min(2 * backoff, agent.BACKOFF_LAST)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    return told
