"""A well fleet is silent for 24 hours in which the clock on the wall is changed, in zones with summer time and without.

Each backup and replication runs when Proxmox's own calendar has it due, which the agent works out in the host's zone.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from simulation import Simulation
from test_server_rules import DAY, HOUR, healthy

import agent

BACKUPS = ("21:00", "2:30", "2:00", "sun 01:00", "sat 18:15", "mon..fri 21:00", "*/6:00", "3:00 UTC", "daily")
REPLICATIONS = ("*/15", "mon..fri 7..18:00/15", "2,22:30", "22..23:*/15", "mon..fri */1:00", "sat 22:00")
NIGHTS = [(zone, at) for zone, dates in (
    ("Europe/Berlin", ((2026, 10, 25, 1), (2027, 3, 28, 1))), ("America/New_York", ((2026, 11, 1, 6), (2027, 3, 14, 7))),
    ("UTC", ((2026, 10, 25, 1), (2027, 3, 28, 1)))) for at in dates]


@pytest.fixture
def zone(request: pytest.FixtureRequest) -> Iterator[str]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = request.param
    time.tzset()
    yield request.param
    os.environ.pop("TZ") if before is None else os.environ.update(TZ=before)
    time.tzset()


def job_of(schedule: str, now: float) -> tuple[dict[str, Any], float]:
    """What the agent tells of a schedule, and when its last run was due."""
    due = agent.due_fields(schedule, now)
    return {"schedule": schedule, "enabled": True, **due}, due["due_times"][-1]


def report_at(now: float, rng: random.Random, *, stopped: bool = False) -> dict[str, Any]:
    """A host whose jobs have all run when they were due; `stopped`: none has since yesterday."""
    jobs, runs, syncs = [], [], []
    for number, schedule in enumerate(BACKUPS):
        job, last = job_of(schedule, now)
        jobs.append({**job, "id": f"job{number}", "guests": [100 + number], "last_state": "OK", "last_run_at": last})
        good = job["due_times"][-2] if now - last < 600 else last  # it is at work
        good = last - 3 * DAY if stopped else good
        runs.append({"vmid": 100 + number, "newest_ok": {"started_at": good + 20, "ended_at": good + 500}})
    for number, schedule in enumerate(REPLICATIONS):
        job, last = job_of(schedule, now)
        syncs.append({**job, "id": f"{100 + number}-0", "vmid": 100 + number, "target": "pve9", "fail_count": 0,
                      "last_sync_at": last - 3 * DAY if stopped else last + 5})
    report = healthy(1, rng)
    guests = [{"vmid": 100 + number, "type": "qemu", "name": f"g{number}", "status": "running", "created_at": 1,
               "template": False} for number in range(len(BACKUPS))]
    return {**report, "guests": guests, "backups": {"jobs": jobs, "guests": runs}, "replication": syncs}


@pytest.mark.parametrize(("zone", "night"), NIGHTS, indirect=["zone"])
def test_a_day_with_a_clock_change_is_silent(zone: str, night: tuple[int, ...], tmp_path: Path) -> None:
    channel = '[[channels]]\nname = "hook"\nkind = "slack"\nurl = "http://127.0.0.1:9/"\nseverities = ["info", "warning", "critical"]\n'
    sim, rng = Simulation(tmp_path, channel), random.Random(3)
    sim.host("a")
    change = datetime(*night, tzinfo=UTC).timestamp()  # type: ignore[arg-type]
    sim.now = change - 12 * HOUR
    while sim.now < change + 12 * HOUR:
        sim.send("a", **report_at(sim.now, rng))
        sim.monitor.looked_at = sim.now
        sim.turn()
        assert [row["message"] for row in sim.alerts()] == [], datetime.fromtimestamp(sim.now)
        sim.now += HOUR / 2
    assert sim.told() == []
    sim.send("a", **report_at(sim.now, rng, stopped=True))  # and what did not run is told, here too
    late = {row["object"] for row in sim.alerts("backup-overdue")}
    assert {"guests/100", "guests/101", "guests/102", "guests/106", "guests/107", "guests/108"} <= late
    assert sim.alerts("replication")
    sim.close()
