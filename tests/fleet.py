#!/usr/bin/env python3
"""Play a fleet of recorded Proxmox hosts against a server: values move, faults appear and go.

    options -> recordings -> values -> faults -> host -> sender -> main

Each recording in tests/hosts/ is read once through agent.py's own collectors; the sections they give are then moved
in time and in value, once per played host. One process, a few kept connections, posts spread over the interval.

    FLEET_API_TOKEN=… tests/fleet.py --server http://127.0.0.1:4000 --state .demo/fleet.json --count 20
"""

from __future__ import annotations

import argparse
import base64
import copy
import heapq
import http.client
import json
import os
import random
import signal
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import troubles  # noqa: E402
from recorded import RecordedProbe, recordings  # noqa: E402

import agent  # noqa: E402

MINUTE, HOUR, DAY = 60, 3600, 86400
CYCLE = 40 * MINUTE  # after this the faults come again
BACKFILL_HOURS, BACKFILL_STEP = 2, 120  # what a new host's charts begin with
BACKFILL_DAYS, WITH_DAYS = 4, 60  # and so long back how full each space was, for so many hosts: forecasts need 3 days
CURVES_STEP, WITH_CURVES = 240, 24  # for so many hosts the node's curves of two days, without a gap
BATCH = 250  # reports in one request

FAST_SECTIONS = ("node", "cluster", "guests", "storages", "pool_states")
MEDIUM_EVERY = 10  # fast ticks between two full reports
SICK_AT_FIRST = 6  # of the sick hosts the first so many are full: what takes several to see is seen in minutes

SITES = ("fra1", "ams2", "muc1", "zrh1")
TAGS = (["prod"], ["prod", "critical"], ["test"], ["edge"], ["backup"])


# --- options: what to play, and where to ---


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Play a fleet of recorded Proxmox hosts against a server.")
    parser.add_argument("--server", required=True, help="base URL")
    parser.add_argument("--state", required=True, type=Path, help="file that keeps the hosts' tokens between runs")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--interval", type=float, default=30.0, help="seconds between two reports of a host")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after this time")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(argv)


# --- recordings: what agent.py's collectors make of each recorded host ---


class Recording(NamedTuple):
    name: str
    time: float
    sections: dict[str, Any]
    absent: list[str]
    errors: dict[str, Any]


def load_recordings() -> tuple[list[Recording], list[Recording]]:
    """The recorded Proxmox hosts: those that are played many times, healed, and those whose trouble nothing heals.
    A machine without guests is no member of a fleet."""
    usual: list[Recording] = []
    troubled: list[Recording] = []
    for path in recordings():
        recording = collect_recording(path)
        if recording.sections.get("guests"):
            (troubled if path.name in TROUBLED else usual).append(recording)
    return usual, troubled


def collect_recording(path: Path) -> Recording:
    """Two looks, some seconds apart: rates need both."""
    memories: dict[str, dict[str, Any]] = {}
    for tick in (0, 1):
        probe: Any = RecordedProbe(path, tick)
        collected = agent.collect(probe, memories, agent.COLLECTORS)
    return Recording(path.name, probe.now(), *collected)


TROUBLED = ("suspended-pool", "cluster-no-quorum", "odd-names")
AS_RECORDED = (4, 5, 10)  # of each twenty: a usual host, with the troubles it had when it was recorded


def recording_of(number: int, usual: list[Recording], troubled: list[Recording]) -> Recording:
    """Recordings take turns; the eighth of each twenty hosts is in real trouble."""
    if troubled and number % 20 == 7:
        order = sorted(troubled, key=lambda one: TROUBLED.index(one.name))
        return order[number // 20 % len(order)]
    if number % 20 in troubles.SICK:
        return next(recording for recording in usual if recording.name == troubles.SICK[number % 20][0])
    return usual[(number + number // (WELL_BETWEEN + 1)) % len(usual)]  # so that each fault meets each recording


# --- values: recorded values brought to another time and another host, and moved ---


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a section, the outer ones first."""
    if isinstance(value, dict):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(one)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def shift_times(sections: Any, seconds: float) -> None:
    """Move every unix time; what was an hour ago in the recording is an hour ago now."""
    for one in walk(sections):
        for key, value in one.items():
            if key.endswith(("_at", "as_of")) and is_number(value) and value > 0:
                one[key] = value + seconds


def drift(now_value: float, dice: random.Random, step: float, low: float, high: float) -> float:
    """One step of a walk that stays inside its bounds and tends to their middle."""
    middle = (low + high) / 2
    return min(high, max(low, now_value + dice.gauss((middle - now_value) * 0.03, step)))


def advance_counters(value: Any, seconds: float, dice: random.Random, rates: dict[str, float], path: str = "") -> None:
    """Let everything named `…_total` grow by its own rate; a counter that stands at 0 stays there (errors)."""
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        where = f"{path}/{key}"
        if isinstance(one, (dict, list)):
            advance_counters(one, seconds, dice, rates, where)
        elif (
            isinstance(key, str) and key.endswith("_total") and is_number(one) and one > 0 and key != "oom_kills_total"
        ):
            rate = rates.setdefault(where, one / (20 * DAY))
            value[key] = one + type(one)(rate * seconds * dice.uniform(0.2, 1.8))


def heal(sections: dict[str, Any], now: float) -> None:
    """Make good what was wrong with the host when it was recorded."""
    heal_pools(sections)
    heal_services(sections)
    heal_copies(sections)
    for guest in sections.get("guests") or ():
        for told in ("config_changed", "config_changed_at", "lock", "lock_held"):  # tasks end
            guest.pop(told, None)
        if guest.get("status") not in ("running", "stopped"):
            guest["status"] = "running"
    for storage in sections.get("storages") or ():
        if storage.get("type") == "dir" and "backup" in storage["storage"]:  # elsewhere, as backups should be
            storage.update(type="nfs", server="192.0.2.50", shared=True)
        if storage.get("enabled") and not storage.get("active"):
            storage.update(active=True, total_bytes=4 << 40, used_bytes=1 << 40, available_bytes=3 << 40)
    for disk in sections.get("disks") or ():
        for key in disk.keys() & HEALTHY.keys():
            disk[key] = min(disk[key] or 0, HEALTHY[key])
        disk["passed"] = True
        if (disk.get("selftest") or {}).get("passed") is False:
            disk["selftest"]["passed"] = True
        if "spare_ratio" in disk:
            disk["spare_ratio"] = 1.0
    for certificate in sections.get("certificates") or ():
        certificate["expires_at"] = max(certificate.get("expires_at") or 0, now + 200 * DAY)


# The most a healthy disk has of it.
HEALTHY = {
    "wear_ratio": 0.4, "critical_warning": 0, "reallocated_sectors": 0, "pending_sectors": 0, "media_errors": 0,
    "uncorrectable_errors": 0, "reported_uncorrectable": 0, "crc_errors": 0,
}  # fmt: skip


def heal_pools(sections: dict[str, Any]) -> None:
    for pool in sections.get("pools") or ():
        set_pool_state(sections, pool, "ONLINE")
        pool.update(status_text=None, action_text=None, data_errors=0, damaged_files=[])
        pool["redundancy_margin"] = full_redundancy(pool)
        scan = pool.get("scan") or {}
        if scan.get("state") in ("scanning", "paused"):  # here it would never end
            scan.update(state="finished", ended_at=scan.get("started_at"), repaired_bytes=0, errors=0)
            scan.pop("progress_ratio", None)
        for vdev in walk(pool.get("vdevs") or []):
            vdev.update(read_errors=0, write_errors=0, checksum_errors=0, reason=None)
            if vdev.get("class") != "spare":
                vdev["state"] = "ONLINE"


def heal_services(sections: dict[str, Any]) -> None:
    for service in sections.get("services") or ():
        if service.get("active") in ("failed", "activating"):
            service.update(active="active", sub="running", restarts=0)
    if "failed_units" in sections:
        sections["failed_units"] = []
    if sections.get("time_sync"):
        sections["time_sync"]["synchronised"] = True
    if "safeguards" in sections:
        told = sections["safeguards"]
        told.update({key: True for key in ("zed_mail", "root_mail", "scrub_scheduled", "security_source") if key in told},
                    matchers_without_target=[], enterprise_source=False)
    if sections.get("mail_queue"):
        sections["mail_queue"].update(deferred=0, active=0, oldest_at=None)
    for dataset in sections.get("datasets") or ():
        if dataset.get("mounted") is False and dataset.get("canmount") == "on":
            dataset["mounted"] = True
    for service in (sections.get("ha") or {}).get("services") or ():
        service["state"] = "started"
    if (sections.get("updates") or {}).get("security"):
        sections["updates"]["security"] = 0


def heal_copies(sections: dict[str, Any]) -> None:
    """Backups, replication and snapshots that went as planned."""
    backups = sections.get("backups") or {}
    for job in backups.get("jobs") or ():
        job["last_state"] = "OK"
    if backups.get("jobs"):
        backups["jobs"][0].update(enabled=True, guests="all", exclude=[], pool=None, node=None)
        heal_backups(sections, backups)
    for job in sections.get("replication") or ():
        job.update(fail_count=0, enabled=True, last_sync_at=float("inf"), last_try_at=float("inf"))
        job.pop("error", None)
    kept = [one for one in sections.get("snapshots") or () if one.get("class") != "pve"]
    for one in kept:
        one["newest_at"] = float("inf")
    if "snapshots" in sections:
        sections["snapshots"] = kept


def heal_backups(sections: dict[str, Any], backups: dict[str, Any]) -> None:
    """Every guest has a good backup, and that on another machine."""
    away = {storage["storage"] for storage in sections.get("storages") or () if storage.get("type") in ("nfs", "pbs")}
    if not away:
        away = {"pbs-away"}
        sections.setdefault("storages", []).append({
            "storage": "pbs-away", "type": "pbs", "content": "backup", "shared": True, "enabled": True, "active": True,
            "server": "192.0.2.9", "total_bytes": 8 << 40, "used_bytes": 3 << 40, "available_bytes": 5 << 40})
    known = {guest["vmid"]: guest for guest in backups.get("guests") or ()}
    for guest in sections.get("guests") or ():
        run = known.setdefault(guest["vmid"], {"vmid": guest["vmid"]})
        run.pop("newest_failed", None)
        run["newest_ok"] = run.get("newest_ok") or {}
        run["newest_ok"].update(ended_at=float("inf"), excluded_disks=[])  # see keep_fresh
        run["newest_ok"].pop("started_at", None)
        if run["newest_ok"].get("storage") not in away:
            run["newest_ok"]["storage"] = min(away)
    backups["guests"] = list(known.values())


def keep_fresh(sections: dict[str, Any], started: float, now: float) -> None:
    """What was in order when the host was recorded stays so, whatever the time of day is here and however long the
    play lasts: the last run of everything is never longer ago than it may be. What was a day old stays old."""
    for guest in (sections.get("backups") or {}).get("guests") or ():
        refresh(guest.get("newest_ok") or {}, ("ended_at",), 2 * HOUR, started, now)
    for job in sections.get("replication") or ():
        refresh(job, ("last_sync_at", "last_try_at"), 5 * MINUTE, started, now)
    for one in sections.get("snapshots") or ():
        refresh(one, ("newest_at",), 20 * MINUTE, started, now)
    refresh(sections.get("ha") or {}, ("manager_as_of",), 5, started, now)
    for job in (sections.get("backups") or {}).get("jobs") or ():
        if is_number(job.get("next_run_at")):
            job["next_run_at"] = max(job["next_run_at"], now + HOUR)


def refresh(fields: dict[str, Any], keys: tuple[str, ...], most: float, started: float, now: float) -> None:
    for key in keys:
        if is_number(fields.get(key)) and started - fields[key] < 26 * HOUR:
            fields[key] = round(now - min(most, max(0.0, now - fields[key])), 3)


def full_redundancy(pool: dict[str, Any]) -> int:
    """How many disks each top-level vdev can lose when all are there: the least of them."""
    margins = []
    for vdev in pool.get("vdevs") or ():
        if vdev.get("class", "normal") in ("normal", "special", "dedup"):
            kind = vdev.get("type") or ""
            parity = next((int(sign) for sign in kind if sign.isdigit()), 1)
            members = len(vdev.get("children") or ())
            margins.append(members - 1 if kind.startswith("mirror") else parity if "raid" in kind else 0)
    return min(margins, default=0)


def set_pool_state(sections: dict[str, Any], pool: dict[str, Any], state: str) -> None:
    pool["state"] = state
    for one in sections.get("pool_states") or ():
        if one.get("name") == pool["name"]:
            one["state"] = state


def leaves(vdevs: list[dict[str, Any]] | None) -> Iterator[dict[str, Any]]:
    """The disks of a vdev tree that hold data."""
    for vdev in vdevs or ():
        if vdev.get("children"):
            yield from leaves(vdev["children"])
        elif vdev.get("class", "normal") == "normal":
            yield vdev


def groups_with_redundancy(pool: dict[str, Any]) -> list[dict[str, Any]]:
    return [v for v in pool.get("vdevs") or () if v.get("children") and v.get("type") != "disk"]


# --- faults: what goes wrong, when in the cycle, and for how long ---


class Fault(NamedTuple):
    """One row: it begins and ends at minutes of the cycle, and is laid over a copy of the host's sections."""

    name: str
    begins: float
    ends: float
    lay: Callable[[dict[str, Any], float, float], None]  # sections, progress 0-1 of its span, now

    def progress(self, at: float) -> float | None:
        """How far it is at this second of the cycle; None while all is well."""
        begins, ends = self.begins * MINUTE, self.ends * MINUTE
        return (at - begins) / (ends - begins) if begins <= at < ends else None


def first_redundant(sections: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """A pool that is well and can lose a disk, and the top-level vdev to lose it from."""
    for pool in sections.get("pools") or ():
        if pool.get("state") == "ONLINE" and (pool.get("redundancy_margin") or 0) > 0:
            for group in groups_with_redundancy(pool):
                return pool, group
    return None


def lay_disk_fault(sections: dict[str, Any], progress: float, now: float) -> None:
    """A disk fails; from the middle on its replacement resilvers."""
    found = first_redundant(sections)
    if found is None:
        return
    pool, group = found
    disk = next(leaves([group]))
    set_pool_state(sections, pool, "DEGRADED")
    group["state"] = "DEGRADED"
    pool["redundancy_margin"] -= 1
    if progress < 0.5:
        disk.update(state="FAULTED", read_errors=3 + int(40 * progress), write_errors=12, reason="too many errors")
        pool["status_text"] = "One or more devices are faulted in response to persistent errors."
        return
    resilvered = (progress - 0.5) * 2
    pool["status_text"] = "One or more devices is currently being resilvered."
    pool["scan"] = {
        "function": "resilver", "state": "scanning", "started_at": now - 600 * resilvered, "ended_at": None,
        "progress_ratio": round(resilvered, 4), "remaining_seconds": int(600 * (1 - resilvered)),
        "repaired_bytes": 0, "errors": 0,
    }  # fmt: skip


def lay_checksum_errors(sections: dict[str, Any], progress: float, now: float) -> None:
    """A cable goes bad: one disk's checksum errors grow until somebody clears them."""
    for pool in sections.get("pools") or ():
        for disk in leaves(pool.get("vdevs")):
            disk["checksum_errors"] = (disk.get("checksum_errors") or 0) + 1 + int(progress * 60)
            return


def lay_inactive_storage(sections: dict[str, Any], progress: float, now: float) -> None:
    """The last enabled storage does not answer: its sizes are not known."""
    for storage in reversed(sections.get("storages") or ()):
        if storage.get("enabled") and storage.get("active"):
            storage.update(active=False, total_bytes=None, used_bytes=None, available_bytes=None)
            return


def lay_full_pool(sections: dict[str, Any], progress: float, now: float) -> None:
    """A pool fills up and is emptied again."""
    for pool in sections.get("pools") or ():
        size = pool.get("size_bytes")
        if size:
            used = 0.86 + 0.09 * min(1.0, progress * 2)
            pool.update(
                allocated_bytes=int(size * used), free_bytes=size - int(size * used), capacity_ratio=round(used, 4)
            )
            return


def lay_stopped_guest(sections: dict[str, Any], progress: float, now: float) -> None:
    """A guest that ran is off."""
    for guest in sections.get("guests") or ():
        if guest.get("status") == "running":
            guest.update(status="stopped", uptime_seconds=None, cpu_ratio=None, memory_used_bytes=None)
            return


def lay_busy_disks(sections: dict[str, Any], progress: float, now: float) -> None:
    """Everything waits for the disks."""
    node = sections.get("node")
    if node:
        node.update(iowait_ratio=0.42, pressure_io_full_avg10_ratio=0.61, pressure_io_full_avg300_ratio=0.48)


def lay_nothing(sections: dict[str, Any], progress: float, now: float) -> None:
    """The host is silent: see PlayedHost.is_silent."""


SILENT = Fault("silent", 5, 13, lay_nothing)
FAULTS = (
    Fault("disk-fault", 1, 15, lay_disk_fault),
    Fault("checksum-errors", 2, 20, lay_checksum_errors),
    SILENT,
    Fault("inactive-storage", 1, 22, lay_inactive_storage),
    Fault("full-pool", 0, 34, lay_full_pool),
    Fault("stopped-guest", 8, 14, lay_stopped_guest),
    Fault("busy-disks", 3, 16, lay_busy_disks),
)
WELL_BETWEEN = 2  # hosts without a fault after each that has one


def fault_of(number: int) -> Fault | None:
    """Every third host has one; which one goes round, so that a fleet of 21 shows all seven."""
    return None if number % (WELL_BETWEEN + 1) else FAULTS[number // (WELL_BETWEEN + 1) % len(FAULTS)]


# --- host: one played host: its name, its values, its reports ---


def host_name(number: int) -> str:
    return f"pve-{SITES[number % len(SITES)]}-{number // len(SITES) + 1:02d}"


class PlayedHost:
    """A recording under another name. Times and counters move on; `report` gives what the agent would send now."""

    def __init__(self, number: int, recording: Recording, token: str, now: float, seed: int):
        self.name, self.token, self.recording = host_name(number), token, recording
        self.dice = random.Random(f"{seed}/{number}")
        self.fault = fault_of(number)
        self.started = self.moved = now
        self.run_id = f"{self.dice.getrandbits(64):016x}{int(now):x}"
        self.seq = 0
        self.ticks = 0
        self.growth = (0.0, 0.0008, 0.002, 0.0045)[number % 4]  # of a pool's size a day
        self.with_days, self.with_curves = number < WITH_DAYS, number < WITH_CURVES
        self.rates: dict[str, float] = {}
        self.kept: list[dict[str, Any]] = []  # made while the host was cut off
        self.phase = ""
        self.troubles = troubles.SICK[number % 20][1] if number % 20 in troubles.SICK else ()
        self.paused: dict[int, float] = {}  # vmid -> when the guest comes back
        self.sections: dict[str, Any] = copy.deepcopy(recording.sections)
        shift_times(self.sections, now - recording.time)
        self.errors = recording.errors
        if recording.name not in TROUBLED and number % 20 not in AS_RECORDED:
            heal(self.sections, now)
            self.errors = {}
        for pool in self.sections.get("pools") or ():  # each host has had its scrubs on another day
            shift_times(pool, -self.dice.uniform(0, 5 * DAY))
        keep_fresh(self.sections, now, now)
        self._rename()

    def _rename(self) -> None:
        """Names and guids that are unique in the fleet; the cluster knows the node by its new name too."""
        old = (self.sections.get("node") or {}).get("name")
        if self.sections.get("cluster"):  # of its own: each host is played without its neighbours
            self.sections["cluster"]["name"] = f"cluster-{self.name.removeprefix('pve-')}"
        for one in walk(self.sections):
            if isinstance(one.get("guid"), str):
                one["guid"] = (
                    str(int(one["guid"]) ^ (hash_number(self.name) << 8)) if one["guid"].isdigit() else one["guid"]
                )
            for key in ("name", "node"):
                if old and one.get(key) == old and "vmid" not in one:
                    one[key] = self.name

    def is_silent(self, now: float) -> bool:
        return self.fault is SILENT and SILENT.progress(self._cycle(now)) is not None

    def _cycle(self, now: float) -> float:
        return (now - self.started) % CYCLE

    def move(self, now: float) -> None:
        """Let the time since the last move pass."""
        seconds, self.moved = max(0.0, now - self.moved), now
        if seconds > 0:
            self._move_node(seconds)
            self._move_guests(seconds, now)
            self._move_pools(seconds)
            shift_as_of(self.sections, seconds)
            keep_fresh(self.sections, self.started, now)
            for section, value in self.sections.items():
                advance_counters(value, seconds, self.dice, self.rates, section)

    def _move_node(self, seconds: float) -> None:
        node = self.sections.get("node") or {}
        if is_number(node.get("uptime_seconds")):
            node["uptime_seconds"] += seconds
        if is_number(node.get("cpu_ratio")):
            node["cpu_ratio"] = round(drift(node["cpu_ratio"], self.dice, 0.03, 0.02, 0.7), 4)
            load = node["cpu_ratio"] * (node.get("cpu_count") or 1)
            for key, weight in (("load1", 1.0), ("load5", 0.3), ("load15", 0.1)):
                if is_number(node.get(key)):
                    node[key] = round(node[key] + (load - node[key]) * weight, 2)
        total, available = node.get("memory_total_bytes"), node.get("memory_available_bytes")
        if total and available is not None:
            old = float(available)
            node["memory_available_bytes"] = int(drift(old, self.dice, total * 0.004, total * 0.05, total * 0.8))
            if is_number(node.get("memory_free_ratio")):
                moved = (node["memory_available_bytes"] - old) / total
                node["memory_free_ratio"] = round(min(1.0, max(0.0, node["memory_free_ratio"] + moved)), 4)
        for key in [k for k in node if k.startswith("pressure_") and is_number(node[k])]:
            node[key] = round(max(0.0, drift(node[key], self.dice, 0.002, 0.0, 0.04)), 4)

    def _move_guests(self, seconds: float, now: float) -> None:
        for guest in self.sections.get("guests") or ():
            self._start_or_stop(guest, now)
            if guest.get("status") != "running":
                continue
            if is_number(guest.get("uptime_seconds")):
                guest["uptime_seconds"] += seconds
            if is_number(guest.get("cpu_ratio")):
                guest["cpu_ratio"] = round(drift(guest["cpu_ratio"], self.dice, 0.04, 0.0, 0.6), 4)
            most = guest.get("memory_max_bytes")
            if most and is_number(guest.get("memory_used_bytes")):
                low, high = most * 0.2, most * 0.95
                guest["memory_used_bytes"] = int(drift(guest["memory_used_bytes"], self.dice, most * 0.01, low, high))

    def _start_or_stop(self, guest: dict[str, Any], now: float) -> None:
        """Once in some hours a guest is off for a few minutes."""
        vmid = guest["vmid"]
        if vmid in self.paused:
            if now >= self.paused[vmid]:
                del self.paused[vmid]
                guest.update(status="running", uptime_seconds=1, cpu_ratio=0.5)
                guest["memory_used_bytes"] = int((guest.get("memory_max_bytes") or 0) * 0.3) or None
        elif guest.get("status") == "running" and not guest.get("template") and self.dice.random() < 0.0005:
            self.paused[vmid] = now + self.dice.uniform(1, 4) * MINUTE
            guest.update(status="stopped", uptime_seconds=None, cpu_ratio=None, memory_used_bytes=None)

    def _move_pools(self, seconds: float) -> None:
        """Capacity creeps up by some percent a week, if at all; a scrub or resilver under way gets on."""
        for pool in self.sections.get("pools") or ():
            scan = pool.get("scan") or {}
            left, done = scan.get("remaining_seconds"), scan.get("progress_ratio")
            if scan.get("state") == "scanning" and left and done is not None:
                scan["progress_ratio"] = min(0.999, done + (1 - done) * min(1.0, seconds / left))
                scan["remaining_seconds"] = max(60, left - int(seconds))
        fill_up(self.sections, self.growth * seconds / DAY)

    def report(self, now: float) -> dict[str, Any]:
        """The next report: all sections when the medium tick is due or a fault changed, else the fast ones."""
        self.move(now)
        shown = copy.deepcopy(self.sections)
        progress = self.fault.progress(self._cycle(now)) if self.fault else None
        if self.fault and progress is not None:
            self.fault.lay(shown, progress, now)
        for trouble in self.troubles:
            trouble.lay(shown, self.started, now)
        phase = "" if progress is None else str(int(progress * 20))
        full = self.ticks % MEDIUM_EVERY == 0 or phase != self.phase or bool(self.troubles and self.ticks < SICK_AT_FIRST)
        self.ticks, self.phase = self.ticks + 1, phase
        self.sections.pop("tasks", None)  # events, not a state: told once
        names = shown.keys() if full else [name for name in FAST_SECTIONS if name in shown]
        return self.wrap({name: shown[name] for name in names}, now, tick="medium" if full else "fast", full=full)

    def wrap(self, sections: dict[str, Any], now: float, *, tick: str, full: bool) -> dict[str, Any]:
        self.seq += 1
        return {
            "version": 1, "host_id": self.name, "tick": tick, "time": round(now, 3), "run_id": self.run_id,
            "seq": self.seq,
            "agent": {"version": agent.VERSION, "started": self.started, "spooled": len(self.kept), "dropped": 0,
                      "clock_offset": 0.01, "cpu_seconds": round(1 + self.seq * 0.04, 2), "rss_bytes": 21_000_000},
            **sections,
            "absent": self.recording.absent if full else [],
            "errors": self.errors if full else {},
        }  # fmt: skip

    def backfill(self, now: float) -> list[dict[str, Any]]:
        """Some hours of node and guests, oldest first, so that charts have something to show at once."""
        reports = self.backfill_days(now) if self.with_days else []
        self.moved = now - BACKFILL_HOURS * HOUR
        for at in range(int(self.moved), int(now), BACKFILL_STEP):
            self.move(at)
            known: dict[str, Any] = {n: self.sections[n] for n in ("node", "guests") if n in self.sections}
            reports.append(self.wrap(copy.deepcopy(known), at, tick="fast", full=False))
        return reports

    def backfill_days(self, now: float) -> list[dict[str, Any]]:
        """Days of pools, storages and datasets as they filled up: a forecast needs to see some."""
        reports = []
        until = int(now - BACKFILL_HOURS * HOUR)
        for at in range(until - BACKFILL_DAYS * DAY, until, 3 * HOUR):
            names = [name for name in ("pools", "storages", "datasets", "node") if name in self.sections]
            known: dict[str, Any] = copy.deepcopy({name: self.sections[name] for name in names})
            known["storages"] = [storage for storage in known.get("storages") or () if storage.get("active")]
            heal_pools(known)
            rewind_counters(known, until - at)
            fill_up(known, -self.growth * (until - at) / DAY)
            for trouble in self.troubles:
                if trouble.rule == "pool-forecast":
                    trouble.lay(known, self.started, at)
            reports.append(self.wrap(known, at, tick="slow", full=False))
        return reports

    def curves(self, now: float) -> list[dict[str, Any]]:
        """Two days of the node, from the run of the agent before this one: within a run a later number is newer."""
        reports, node, run = [], copy.deepcopy(self.sections["node"]), (self.run_id, self.seq)
        self.run_id, self.seq = f"{self.run_id}0", 0
        for at in range(int(now - 2 * DAY), int(now - BACKFILL_HOURS * HOUR), CURVES_STEP):
            self._move_node(CURVES_STEP / 60)
            shown = copy.deepcopy(self.sections["node"])
            if is_number(shown.get("uptime_seconds")):
                shown["uptime_seconds"] = max(60, node["uptime_seconds"] - (now - at))
            rewind_counters(shown, now - at)
            reports.append(self.wrap({"node": shown}, at, tick="fast", full=False))
        self.sections["node"], (self.run_id, self.seq) = node, run
        return reports


def rewind_counters(sections: dict[str, Any], seconds: float) -> None:
    """What advance_counters() will have made of them after so long, taken back."""
    for fields in walk(sections):
        for key, value in fields.items():
            if key.endswith("_total") and is_number(value):
                fields[key] = type(value)(value * (1 - seconds / (20 * DAY)))


def fill_up(sections: dict[str, Any], share: float) -> None:
    """Let each pool take up so much more of its size; below 0: less."""
    for pool in sections.get("pools") or ():
        for parts in (("usable_used_bytes", "usable_available_bytes"), ("allocated_bytes", "free_bytes")):
            used, left = (pool.get(part) for part in parts)
            if is_number(used) and is_number(left):
                moved = max(-used // 2, min(left // 2, int((used + left) * share)))
                pool.update({parts[0]: used + moved, parts[1]: left - moved})
        if is_number(pool.get("capacity_ratio")) and pool.get("size_bytes"):
            pool["capacity_ratio"] = round(pool["allocated_bytes"] / pool["size_bytes"], 4)


def shift_as_of(sections: dict[str, Any], seconds: float) -> None:
    for one in walk(sections):
        if is_number(one.get("as_of")):
            one["as_of"] += seconds


def hash_number(text: str) -> int:
    return int.from_bytes(text.encode()[-6:], "big")


# --- sender: one kept connection each, a few of them ---


class Connection:
    """A kept connection that is made anew when it broke."""

    def __init__(self, url: str):
        parts = urllib.parse.urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.http = kind(parts.hostname or "127.0.0.1", parts.port, timeout=30)

    def ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
        for attempt in (1, 2):
            try:
                self.http.request(method, path, body, headers)
                answer = self.http.getresponse()
                return answer.status, answer.read()
            except (OSError, http.client.HTTPException):
                self.http.close()
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")


class Sender(threading.Thread):
    """Plays its share of the hosts, each at its own moment of the interval."""

    def __init__(self, hosts: list[PlayedHost], options: argparse.Namespace, new: set[str], stop: threading.Event):
        super().__init__(daemon=True)
        self.hosts, self.interval, self.new, self.stop = hosts, options.interval, new, stop
        self.connection = Connection(options.server)
        self.sent = self.failed = 0

    def run(self) -> None:
        """First all at once, so that the page is full; then spread."""
        for host in self.hosts:
            if not self.stop.is_set():
                self.attempt(host, self.first_reports(host))
        for host in self.hosts:
            if not self.stop.is_set() and host.name in self.new and host.with_curves:
                self.attempt(host, host.curves(host.started))
        start = time.monotonic()
        due = [(start + self.interval * (n + 1) / len(self.hosts), n) for n in range(len(self.hosts))]
        heapq.heapify(due)
        while due and not self.stop.wait(max(0.0, due[0][0] - time.monotonic())):
            at, number = due[0]
            self.attempt(self.hosts[number], [self.hosts[number].report(time.time())])
            heapq.heapreplace(due, (max(at + self.interval, time.monotonic() - self.interval), number))

    def first_reports(self, host: PlayedHost) -> list[dict[str, Any]]:
        before = host.backfill(time.time()) if host.name in self.new else []
        return [*before, host.report(time.time())]

    def attempt(self, host: PlayedHost, reports: list[dict[str, Any]]) -> None:
        """Send, or keep while the host is cut off or the server does not answer."""
        host.kept.extend(reports)
        if host.is_silent(time.time()):
            return
        try:
            while host.kept:
                self.post(host, host.kept[:BATCH])
                del host.kept[:BATCH]
        except (OSError, http.client.HTTPException) as error:
            self.failed += 1
            del host.kept[:-1000]
            print(f"fleet: {host.name}: {error}", file=sys.stderr, flush=True)

    def post(self, host: PlayedHost, reports: list[dict[str, Any]]) -> None:
        body = agent.pack(agent.to_json(reports))
        key = base64.b64decode(host.token.removeprefix("whsec_"))
        headers = agent.webhook_headers(key, body, int(time.time()))
        headers |= {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        path = f"/api/v1/hosts/{host.name}/reports"
        status, answer = self.connection.ask("POST", path, body, headers)
        if status != 200:
            raise OSError(f"{status} {answer[:300].decode('utf-8', 'replace')}")
        self.sent += len(reports)


# --- main: register, play, stop ---


def admin_call(connection: Connection, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {os.environ['FLEET_API_TOKEN']}", "Content-Type": "application/json"}
    status, answer = connection.ask(
        method, "/api/v1" + path, None if body is None else json.dumps(body).encode(), headers
    )
    return status, json.loads(answer) if answer else None


def register(options: argparse.Namespace) -> tuple[dict[str, str], set[str]]:
    """A token for each host, from the state file or from the server; and the names that are new there."""
    connection = Connection(options.server)
    tokens: dict[str, str] = json.loads(options.state.read_text()) if options.state.exists() else {}
    new = set()
    for number in range(options.count):
        name = host_name(number)
        status, answer = admin_call(connection, "GET", f"/hosts/{name}")
        if status == 200 and name in tokens:
            continue
        if status == 200:
            status, answer = admin_call(connection, "POST", f"/hosts/{name}/rotate-token", {})
        else:
            host = {"name": name, "site": SITES[number % len(SITES)], "tags": TAGS[number % len(TAGS)]}
            status, answer = admin_call(connection, "POST", "/hosts", host)
            new.add(name)
        if status not in (200, 201):
            raise SystemExit(f"fleet: could not register {name}: {status} {answer}")
        tokens[name] = answer["token"]
        options.state.write_text(json.dumps(tokens))
    return tokens, new


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    troubles.SCRUBS_EACH = options.interval
    usual, troubled = load_recordings()
    tokens, new = register(options)
    hosts = [
        PlayedHost(n, recording_of(n, usual, troubled), tokens[host_name(n)], time.time(), options.seed)
        for n in range(options.count)
    ]
    width = min(8, 1 + options.count // 20)
    senders = [Sender(hosts[n::width], options, new, stop) for n in range(width)]
    print(f"fleet: playing {len(hosts)} hosts from {len(usual) + len(troubled)} recordings", flush=True)
    for sender in senders:
        sender.start()
    stop.wait(None if options.seconds == float("inf") else options.seconds)
    stop.set()
    for sender in senders:
        sender.join(2)
    print(
        f"fleet: {sum(s.sent for s in senders)} reports accepted, {sum(s.failed for s in senders)} failures", flush=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
