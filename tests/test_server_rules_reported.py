"""Every rule fires from a report as an agent makes it: a recorded host's, bent in one place and still valid (some
recorded hosts are so sick that they need no bending).

Where a rule reads a field that no agent sends, or in a shape that none has, it cannot fire here.
"""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from recorded import HOSTS, RecordedProbe
from simulation import Simulation
from test_report_schema import VALIDATOR

import agent
import server

MINUTE, HOUR, DAY = 60, 3600, 86400
PVE8, PVE9, CLUSTER, SUSPENDED = "pve8-mirror", "pve9-raidz2-draid", "cluster-ha", "suspended-pool"
Bend = dict[str, Any]  # the way to a value -> the value, or how it follows from (the old one, the report's time)


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, Any]]:
    """One report of each host, as its agent encodes it."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "UTC"
    time.tzset()
    made = {}
    for name in (PVE8, PVE9, CLUSTER, SUSPENDED):
        agent.SHARED.probe = None
        probe = RecordedProbe(HOSTS / name)
        collected = agent.collect(probe, {}, list(agent.COLLECTORS))
        reporter = agent.Reporter("host-1", probe.now())
        made[name] = json.loads(agent.encode_report(reporter.build_report("slow", probe.now(), collected)))
    os.environ.pop("TZ") if before is None else os.environ.update(TZ=before)
    time.tzset()
    return made


def bend(report: dict[str, Any], changes: Bend, now: float) -> dict[str, Any]:
    """A copy of a report with some values changed; `-` in front of a way takes the value out."""
    report = copy.deepcopy(report)
    for way, value in changes.items():
        *steps, last = way.lstrip("-").split(".")
        at: Any = report
        for step in steps:
            at = at[int(step)] if isinstance(at, list) else at[step]
        key: Any = int(last) if isinstance(at, list) else last
        if way.startswith("-"):
            del at[key]
        else:
            at[key] = value(at[key] if isinstance(at, list) or key in at else None, now) if callable(value) else value
    return report


def held(changes: Bend, minutes: float, every: float = 2) -> list[tuple[float, Bend]]:
    """The same again and again, until a hold is over."""
    return [(at * every, changes) for at in range(int(minutes / every) + 2)]


def ago(seconds: float) -> Any:
    return lambda old, now: now - seconds


def first(**fields: Any) -> Any:
    """The first object of a list with other fields, and the others as they are."""
    return lambda old, now: [{**old[0], **{key: value(None, now) if callable(value) else value
                                           for key, value in fields.items()}}, *old[1:]]


LEAF = "pools.0.vdevs.0.children.0"
SNAPSHOTS = [{"dataset": "rpool/data", "class": "autosnap_hourly", "count": 24, "interval_seconds": 3600}]
SICK_JOB = {"last_state": "could not activate storage 'nas': storage 'nas' is not online", "last_run_at": 1795429000}

# rule -> host, and what its reports say: (minutes from the first one, what is bent)
FIRES: dict[str, tuple[str, list[tuple[float, Bend]]]] = {
    "pool-state": (PVE8, [(0, {f"{LEAF}.state": "UNAVAIL"})]),
    "pool-margin": (PVE8, [(0, {}), (5, {"pools.0.redundancy_margin": 0}), (70, {"pools.0.redundancy_margin": 0})]),
    "pool-spare": (PVE8, held({f"{LEAF}.class": "cache", f"{LEAF}.state": "FAULTED"}, 16, 5)),
    "pool-readonly": (PVE8, held({"pools.0.readonly": True}, 16, 5)),
    "pool-unanswered": (PVE8, held({"pools.0": {"name": "rpool", "unknown_reason": "timeout: zpool status"}}, 16, 5)),
    "pool-vanished": (PVE8, [(0, {}), (1, {"pool_states": []})]),
    "vdev-errors": (PVE8, [(0, {f"{LEAF}.checksum_errors": 3})]),
    "slow-ios": (PVE8, [(0, {f"{LEAF}.slow_ios": 1}), (5, {f"{LEAF}.slow_ios": 20})]),
    "pool-data-errors": (PVE8, [(0, {"pools.0.data_errors": 2})]),
    "pool-capacity": (PVE8, held({"pools.0.capacity_ratio": .85}, 16, 5)),
    "dataset-quota": (PVE8, held({"datasets.0.quota_bytes": lambda old, now: 1000, "datasets.0.used_bytes": 960}, 16, 5)),
    "dataset-unmounted": (PVE8, [(0, {}), *[(at, {"datasets": lambda old, now: [
        {**row, "mounted": False} if row.get("mounted") else row for row in old]}) for at in (5, 10, 25)]]),
    "pool-fragmentation": (PVE8, [(hours * 60, {"pools.0.fragmentation_ratio": .8, "pools.0.capacity_ratio": .85})
                                  for hours in range(0, 26)]),
    "scrub-age": (PVE8, [(0, {"pools.0.last_scrub.ended_at": ago(50 * DAY), "pools.0.scan.function": "none"})]),
    "scrub-result": (PVE8, [(0, {"pools.0.last_scrub.repaired_bytes": 4096})]),
    "scrub-stuck": (PVE8, [(hours * 60, {"pools.0.scan.function": "scrub", "pools.0.scan.state": "scanning",
                                         "pools.0.scan.progress_ratio": .4}) for hours in range(0, 26, 5)]),
    "snapshot-age": (PVE8, [(0, {"snapshots": lambda old, now: [{**SNAPSHOTS[0], "newest_at": now - 6000,
                                                                 "oldest_at": now - DAY}]})]),
    "snapshot-gone": (PVE8, [(0, {"snapshots": lambda old, now: [{**SNAPSHOTS[0], "newest_at": now}]}), (30, {"snapshots": []})]),
    "guest-snapshot-age": (PVE8, [(0, {"snapshots": lambda old, now: [
        {"dataset": "rpool/data/vm-100-disk-0", "class": "pve", "count": 1, "newest_at": now - 40 * DAY,
         "oldest_at": now - 40 * DAY}]})]),
    "smart-failed": (PVE8, [(0, {"disks.0.passed": False})]),
    "smart-warning": (CLUSTER, [(0, {"disks.0.critical_warning": 4})]),
    "selftest-failed": (PVE8, [(0, {"disks.0.selftest": {"passed": False}})]),
    "smart-growth": (PVE8, [(0, {"disks.0.pending_sectors": 0}), (30, {"disks.0.pending_sectors": 8})]),
    "smart-crc": (PVE8, [(0, {"disks.0.crc_errors": 0}), (30, {"disks.0.crc_errors": 8})]),
    "smart-unknown": (PVE8, [(0, {"-disks.0.passed": None, "disks.0.unknown_reason": "timeout: smartctl"})]),
    "disk-gone": (PVE8, [(0, {}), (30, {"-disks.0": None, f"{LEAF}.state": "REMOVED"})]),
    "disk-temperature": (PVE8, held({"disks.0.temperature_celsius": 90}, 16, 5)),
    "disk-wear": (PVE8, [(0, {"disks.0.wear_ratio": .97})]),
    "disk-wear-forecast": (PVE8, [(week * 7 * 1440, {"disks.0.wear_ratio": .4 + week * .03}) for week in range(10)]),
    "cpu": (PVE8, held({"node.cpu_ratio": .97}, 31, 5)),
    "memory": (PVE8, held({"node.memory_free_ratio": .04}, 6)),
    "oom": (PVE8, [(0, {"node.oom_kills_total": 0}), (1, {"node.oom_kills_total": 1})]),
    "io-pressure": (PVE8, held({"node.pressure_io_full_avg300_ratio": .5}, 16, 5)),
    "memory-pressure": (PVE8, held({"node.pressure_memory_full_avg300_ratio": .5}, 6)),
    "root-full": (PVE8, held({"node.root_used_bytes": 95, "node.root_available_bytes": 5}, 11, 5)),
    "reboot-needed": (PVE8, [(0, {"node.reboot_needed": True}), (31 * 1440, {"node.reboot_needed": True})]),
    "storage-full": (PVE8, held({"storages": lambda old, now: [
        {**row, "used_bytes": 99, "total_bytes": 100} if row["type"] == "dir" else row for row in old]}, 11, 5)),
    "storage-metadata": (PVE8, held({"storages": first(type="lvmthin", metadata_used_ratio=.9)}, 11, 5)),
    "storage-inactive": (PVE8, held({"storages": first(active=False, enabled=True)}, 11, 5)),
    "guest-down": (PVE8, [(0, {"guests.0.status": "running"}), (5, {"guests.0.status": "stopped"}), (8, {"guests.0.status": "stopped"})]),
    "guest-locked": (PVE8, held({"guests.0.status": "running", "guests.0.lock": "snapshot", "guests.0.lock_held": False}, 62)),
    "guest-hangs": (PVE8, held({"guests.0.status": "running", "guests.0.responds": False}, 6)),
    "guest-disk-full": (PVE8, held({"guests": lambda old, now: [
        {**row, "status": "running", "disk_used_bytes": 97, "disk_max_bytes": 100} if row["type"] == "lxc" else row
        for row in old]}, 16, 5)),
    "backup-overdue": (PVE8, [(0, {"backups.jobs": [{"id": "all", "enabled": True, "guests": "all", "schedule": "21:00",
                                                     "due_times": [1795000000, 1795100000]}],
                                   "backups.guests": [{"vmid": 100, "newest_ok": {"ended_at": 1794000000}}]})]),
    "backup-failed": (PVE8, [(0, {"backups.guests": [{"vmid": 100, "newest_failed": {"ended_at": 1795400000, "error": "x"}}]})]),
    "backup-job": (PVE8, [(0, {"backups.jobs": first(**SICK_JOB)})]),
    "backup-excludes": (PVE8, [(0, {"backups.guests": lambda old, now: [{"vmid": 100, "newest_ok": {
        "ended_at": now - 60, "size_bytes": 2048, "excluded_disks": [f"scsi{number}" for number in range(9)]}}]})]),
    "backup-missing": (PVE8, held({"backups.jobs": []}, 61, 30)),
    "updates-security": (PVE8, [(0, {"updates.security": 3}), (15 * 1440, {"updates.security": 3})]),
    "updates-stale": (PVE8, [(0, {"updates.as_of": ago(9 * DAY)})]),
    "certificate": (PVE8, [(0, {"certificates.0.expires_at": ago(-3 * DAY)})]),
    "clock-skew": (PVE8, held({"agent.clock_offset": 90}, 3, 1)),
    "clock-unsynced": (PVE8, held({"time_sync.synchronised": False}, 31, 10)),
    "replication": (CLUSTER, [(0, {"replication.0.fail_count": 1})]),
    "ha-stale": (CLUSTER, [(0, {"ha.lrm.as_of": ago(600)})]),
    "service-failed": (PVE8, held({"services.0.active": "failed"}, 11, 5)),
    "unit-failed": (PVE8, held({"failed_units": ["zfs-mount.service"]}, 11, 5)),
    "mail-queue": (PVE8, held({"mail_queue.deferred": 40}, 11, 5)),
    "section-failing": (PVE8, [(at * 5, {"errors": {"datasets": {"code": "timeout", "detail": "zfs list: no answer"}},
                                         "-datasets": None}) for at in range(3)]),
    "spool-dropped": (PVE8, [(0, {"agent.dropped": 0}), (1, {"agent.dropped": 7})]),
    "agent-old": (PVE8, [(0, {"agent.version": "0.0.1"})]),
    "host-twice": (PVE8, [(at / 6, {"run_id": "one" if at % 2 else "two"}) for at in range(6)]),
    "ceph": (CLUSTER, [(0, {"-cluster": None, "ceph.health": "HEALTH_ERR", "ceph.checks.0.severity": "HEALTH_ERR"})]),
    "cluster-ceph": (CLUSTER, [(0, {"ceph.health": "HEALTH_ERR", "ceph.checks.0.severity": "HEALTH_ERR"})]),
    "cluster-quorum": (CLUSTER, held({"cluster.quorate": False}, 2, 1)),
    "cluster-member": (CLUSTER, held({"cluster.votes_present": 2, "cluster.members.2.online": False}, 6)),
    "cluster-margin": (CLUSTER, held({"cluster.votes_present": 2}, 6)),
    "cluster-storage-full": (CLUSTER, held({"storages": lambda old, now: [
        {**row, "used_bytes": 99, "total_bytes": 100} if row["shared"] and row["enabled"] else row for row in old]}, 12)),
    "ha-service": (CLUSTER, [(0, {"ha.services.0.state": "fence"})]),
    "ha-disarmed": (CLUSTER, held({"ha.disarm": {"mode": "ignore", "state": "disarmed"}}, 2, 1)),
    "ha-node": (CLUSTER, [(0, {"ha.nodes.1.state": "fence"})]),
    "suspects-hold-pool": (PVE8, [(0, {"disks": lambda old, now: [{**row, "passed": False} for row in old]})]),
    "blind-spot": (PVE8, held({"safeguards.root_mail": False}, 61, 30)),
}
ELSEWHERE = {
    "host-offline": "no report at all", "site-offline": "no report at all", "server-certificate": "of the server",
    "log-ins-fail": "of the server", "cluster-disagree": "two hosts, below", "cluster-clock": "two hosts, below",
    "copy-missing": "the whole fleet: test_server_answers.py",
    "pool-forecast": "days of history: test_server_rules.py", "space-forecast": "days of history: test_server_rules.py",
    "snapshot-missing": "test_server_answers.py", "scrub-slow": "test_server_answers.py",
    "snapshot-unpruned": "test_server_answers.py", "snapshot-growth": "days of history: test_server_answers.py",
    "pool-special": "test_rules_fire.py",
}


def send(sim: Simulation, host: str, report: dict[str, Any]) -> None:
    assert [f"{list(error.path)}: {error.message}" for error in VALIDATOR.iter_errors(report)] == []
    sent = {key: value for key, value in report.items() if key not in ("host_id", "seq", "time", "run_id")}
    sim.post(host, {**sim.envelope(host, run=report["run_id"]), **sent})
    sim.turn()


def play(sim: Simulation, base: dict[str, Any], steps: list[tuple[float, Bend]]) -> None:
    for minutes, changes in steps:
        sim.now = base["time"] + minutes * MINUTE
        send(sim, "alpha", bend({**base, "agent": {**base["agent"], "version": server.VERSION}}, changes, sim.now))


@pytest.mark.parametrize("rule", FIRES)
def test_a_rule_fires_from_a_report_as_an_agent_makes_it(rule: str, recorded: dict[str, dict[str, Any]],
                                                         tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, steps = FIRES[rule]
    if rule == "agent-old":
        monkeypatch.setattr(server, "VERSION", "0.9.0")
    sim = Simulation(tmp_path)
    sim.host("alpha")
    play(sim, recorded[host], steps)
    assert sim.alerts(rule), sorted({row["rule"] for row in sim.alerts()})
    sim.close()


def test_every_rule_is_played() -> None:
    assert FIRES.keys() | ELSEWHERE.keys() == set(server.RULE)


@pytest.mark.parametrize(("rule", "changes", "minutes"), [
    ("cluster-disagree", {"cluster.members.2.online": False}, 2),
    ("cluster-clock", {"time_sync.offset_seconds": 3.0}, 6),
])
def test_two_nodes_of_a_cluster_contradict_each_other(rule: str, changes: Bend, minutes: int, tmp_path: Path,
                                                      recorded: dict[str, dict[str, Any]]) -> None:
    sim = Simulation(tmp_path)
    for name in ("alpha", "beta"):
        sim.host(name)
    base = bend(recorded[CLUSTER], {"time_sync.offset_seconds": 0.0}, 0)
    for minute in range(minutes + 2):
        sim.now = base["time"] + minute * MINUTE
        send(sim, "alpha", base)
        send(sim, "beta", bend(base, changes, sim.now))
    assert sim.alerts(rule)
    sim.close()
