"""Rules: each one over simulated time (fires, holds, clears, unknown), what people decide, causes, schedules."""

from __future__ import annotations

import copy
import dataclasses
import time
from pathlib import Path

import pytest
from simulation import START, Simulation

import server

MINUTE, HOUR, DAY = 60, 3600, 86400
GONE = "gone"  # the object is not in the section any more
LOST = "lost"  # the section could not be collected


@pytest.fixture
def sim(tmp_path):
    simulation = Simulation(tmp_path)
    simulation.host("pve1")
    yield simulation
    simulation.close()


# --- the engine's small parts ---


def test_an_alert_that_is_pending_has_not_fired_and_one_that_fires_did_so_then():
    rule = server.RULE["pool-capacity"]
    full = server.measured(0.87, "full")
    pending = server.evaluate(rule, None, "pools/tank", full, 1000.0)
    assert pending is not None and (pending.state, pending.fired_at) == ("pending", None)
    later = 1000.0 + rule.hold
    firing = server.evaluate(rule, pending, "pools/tank", full, later)
    assert firing is not None and (firing.state, firing.fired_at, firing.since) == ("firing", later, 1000.0)
    still = server.evaluate(rule, firing, "pools/tank", full, later + 60)
    assert still is not None and still.fired_at == later


@pytest.mark.parametrize(("among", "object", "covered"), [
    ({"pools/tank"}, "pools/tank/raidz2-0/sda", True), ({"pools/tank"}, "pools/tank", True), ({"pools"}, "pools/tank/sda", True),
    ({"pools/tank"}, "pools/tank2", False), ({"pools/tank/sda"}, "pools/tank", False), (set(), "pools", False), ({""}, "", True)])
def test_what_an_object_is_part_of_covers_it(among: set[str], object: str, covered: bool):
    assert server.covers(among, object) is covered


def test_what_is_known_of_one_section_in_part_stays_so_beside_one_of_which_nothing_is(sim):
    """Whole in one section, in part, nothing at all: what a rule over two sections goes by."""
    send = {"pools": pool(), "disks": disk()}
    sim.send("pve1", **send)
    host, rule = sim.fleet.find("pve1"), dataclasses.replace(server.RULE["pool-state"], on=("disks", "datasets"))
    assert server.knows(host, rule, sim.now) == "whole"
    sim.wait(30)
    sim.send("pve1", disks=disk(), errors={"disks": {"code": "failed", "message": "one of 18"}})
    assert server.knows(host, rule, sim.now) == "partly"
    assert server.knows(host, dataclasses.replace(rule, on=("datasets",)), sim.now) is None
    sim.send("pve1", errors={"pools": {"code": "timeout"}})
    assert server.knows(host, dataclasses.replace(rule, on=("pools",)), sim.now) is None
    assert server.knows(host, dataclasses.replace(rule, on=("disks", "pools")), sim.now) == "partly"
    assert server.knows(host, dataclasses.replace(rule, on=("pools", "disks")), sim.now) == "partly"
    for seconds, always, known in ((600, False, "partly"), (601, False, None), (601, True, "partly")):
        assert server.knows(host, dataclasses.replace(rule, on=("disks",), always=always), sim.now + seconds) == known
    sim.send("pve1", absent=["disks"])
    assert server.knows(host, dataclasses.replace(rule, on=("disks",)), sim.now) == "absent"
    assert server.knows(host, dataclasses.replace(rule, on=("disks", "datasets")), sim.now) is None


def limits(**fields):
    return dataclasses.replace(server.RULE["pool-capacity"], hold=0.0, hold_crit=0.0, **fields)


# Fires from 0.80 and 0.90 on; what is reached holds until it has come 0.03 to the good side of its threshold.
@pytest.mark.parametrize(("value", "reached", "level"), [
    (0.7999, None, None), (0.80, None, "warning"), (0.8999, None, "warning"), (0.90, None, "critical"), (5.0, None, "critical"),
    (0.7701, "warning", "warning"), (0.77, "warning", None), (0.7699, "warning", None), (0.8999, "warning", "warning"),
    (0.90, "warning", "critical"), (0.8701, "critical", "critical"), (0.87, "critical", "warning"), (0.7701, "critical", "warning"),
    (0.77, "critical", None)])
def test_a_level_is_reached_at_its_threshold_and_left_at_its_margin(value: float, reached: str | None, level: str | None):
    assert limits(warn=0.80, crit=0.90, clear_by=0.03).level(value, reached) == level
    assert limits(warn=-0.80, crit=-0.90, clear_by=0.03, low=True).level(-value - 1e-12, reached) == level
    assert limits(warn=80.0, crit=90.0, clear_by=3.0).level(value * 100, reached) == level


@pytest.mark.parametrize(("value", "reached", "level"), [
    (0.8, "warning", "warning"), (0.79, "warning", None), (0.9, "critical", "critical"), (0.89, "critical", "warning")])
def test_a_level_without_a_margin_is_left_where_it_is_reached(value: float, reached: str | None, level: str | None):
    assert limits(warn=0.80, crit=0.90, clear_by=0.0).level(value, reached) == level


def test_a_level_that_has_no_threshold_is_never_reached():
    assert limits(warn=None, crit=0.9).level(0.89, None) is None
    assert limits(warn=0.8, crit=None).level(1e9, None) == "warning"
    assert limits(warn=None, crit=0.9, clear_by=0.03).level(0.88, "critical") == "critical"


def test_where_low_numbers_are_bad_the_threshold_itself_is_well():
    assert [limits(warn=14, crit=3, low=True).level(value, None) for value in (14, 13.9, 3, 2.9)] == [None, "warning", "warning", "critical"]


LOOKS = {  # value and state, severity at each minute; 'unknown' is a look that saw nothing
    "a warning after its hold": [(0.85, "pending warning"), (0.85, "pending warning"), (0.85, "pending warning"), (0.85, "firing warning")],
    "one look in between that is well": [(0.85, "pending warning"), (0.85, "pending warning"), (0.5, None), (0.85, "pending warning"),
                                         (0.85, "pending warning"), (0.85, "pending warning"), (0.85, "firing warning")],
    "before it fires there is no margin": [(0.85, "pending warning"), (0.79, None)],
    "unknown in between": [(0.85, "pending warning"), ("unknown", "pending warning"), ("unknown", "pending warning"), (0.85, "firing warning")],
    "unknown first": [("unknown", None), (0.85, "pending warning")],
    "unknown does not end": [(0.85, "pending warning")] * 3 + [(0.85, "firing warning"), ("unknown", "firing warning"), (0.78, "firing warning"),
                             (0.77, "resolved warning")],
    "critical has a hold of its own": [(0.95, "pending critical")] * 3 + [(0.95, "firing warning"), (0.95, "firing warning"), (0.95, "firing critical")],
    "it has to be critical for as long": [(0.85, "pending warning")] * 3 + [(0.95, "firing warning")] * 5 + [(0.95, "firing critical")],
    "within the margin it goes on": [(0.85, "pending warning")] * 3 + [(0.95, "firing warning"), (0.88, "firing warning"), (0.88, "firing warning"),
                                     (0.88, "firing warning"), (0.88, "firing warning"), (0.88, "firing critical"), (0.86, "firing warning")],
    "beyond the margin it starts anew": [(0.95, "pending critical")] * 3 + [(0.95, "firing warning"), (0.86, "firing warning")]
                                        + [(0.95, "firing warning")] * 5 + [(0.95, "firing critical")],
}  # fmt: skip


@pytest.mark.parametrize("looks", LOOKS.values(), ids=LOOKS)
def test_an_alert_goes_through_its_states(looks: list):
    rule, alert, at = dataclasses.replace(limits(warn=0.8, crit=0.9, clear_by=0.03), hold=180.0, hold_crit=300.0), None, 1000.0
    began = fired = None
    for value, expected in looks:
        before, reading = alert, server.UNKNOWN if value == "unknown" else server.measured(value, lambda: "full")
        alert = server.evaluate(rule, alert, "pools/tank", reading, at)
        assert (None if alert is None else f"{alert.state} {alert.severity}") == expected
        began = None if alert is None else began or at
        fired = fired or (at if alert is not None and alert.state == "firing" else None)
        assert alert is None or (alert.since, alert.fired_at) == (began, fired)
        assert alert is before or alert is None or alert.resolved_at == (at if alert.state == "resolved" else None)
        at += 60


def test_a_word_counts_at_once_where_no_threshold_says_what_a_warning_is():
    rule = dataclasses.replace(server.RULE["pool-state"], hold=60.0, hold_crit=60.0)
    alert = server.evaluate(rule, None, "pools/tank", server.warning("degraded"), 0.0)
    alert = server.evaluate(rule, alert, "pools/tank", server.critical("worse"), 60.0)
    assert alert is not None and (alert.state, alert.severity, alert.message) == ("firing", "critical", "worse")


@pytest.mark.parametrize(("warn", "crit", "severity"), [(None, 0.9, "critical"), (0.8, None, "warning"), (0.8, 0.9, "warning")])
def test_what_is_critical_for_a_moment_is_a_warning_where_there_is_one(warn: float | None, crit: float | None, severity: str):
    rule = dataclasses.replace(limits(warn=warn, crit=crit), hold_crit=300.0)
    alert = server.evaluate(rule, None, "pools/tank", server.measured(0.95, "full"), 0.0)
    assert alert is not None and (alert.state, alert.severity) == ("firing", severity)


def test_of_an_object_that_is_named_twice_the_first_counts(sim):
    sim.send("pve1", pools=[{"name": "tank", "data_errors": 2}, {"name": "tank", "data_errors": 9}])
    alert, = sim.alerts("pool-data-errors")
    assert alert["value"] == 2


@pytest.mark.parametrize(("worse", "severity", "value", "ended"), [
    (0, "warning", 99, False), (0, "critical", 5, True), (0, "info", 5, False), (1, "warning", 5.5, True), (1, "warning", 4.5, False),
    (1, "warning", 5, False), (-1, "warning", 4.5, True), (-1, "warning", 5.5, False), (1, "warning", None, False), (1, "critical", None, True)])
def test_an_acknowledgement_ends_when_it_gets_worse(worse: int, severity: str, value: float | None, ended: bool):
    rule = dataclasses.replace(server.RULE["pool-state"], worse=worse, hold=0.0, hold_crit=0.0)
    known = server.Alert(rule.name, "pools/tank", "warning", "", 5, 0.0, "firing", fired_at=0.0, acknowledged_at=1.0, acknowledged_by="ann",
                         acknowledged_severity="warning", acknowledged_value=5, told={"mail": ("warning", 1.0)})  # fmt: skip
    new = server.evaluate(rule, known, "pools/tank", server.Reading(severity, "", value), 2.0)
    assert new is not None and new.acknowledged_by == (None if ended else "ann")
    assert new.told == ({"mail": ("", 1.0)} if ended else {"mail": ("warning", 1.0)})


def test_two_objects_that_a_rule_stumbles_over_are_one_line(sim, capsys):
    odd = [{"name": name, "data_errors": 2, "damaged_files": 5} for name in ("a", "b", "tank")]
    for minute, lines in ((0, 1), (1, 0), (59, 0), (60, 1), (61, 0)):
        sim.now = START + minute * MINUTE
        sim.send("pve1", pools=odd)
        assert capsys.readouterr().out.count("pool-data-errors cannot judge pools/") == lines, minute


# --- a table of what is seen when, and the state of the alert after it ---


def pool(**fields):
    return [{"name": "tank", "guid": "1", "state": "ONLINE", **fields}]


def leaf(name="sda", **counts):
    return {"name": name, "type": "disk", "state": "ONLINE", "read_errors": 0, "write_errors": 0, "checksum_errors": 0,
            **counts}


def mirror(*leaves):
    return pool(vdevs=[{"name": "mirror-0", "type": "mirror", "state": "ONLINE", "children": list(leaves)}])


def grouped(of_disk, of_group):
    return pool(vdevs=[{"name": "raidz1-0", "type": "raidz1", "state": "ONLINE", "checksum_errors": of_group,
                        "children": [leaf(checksum_errors=of_disk), leaf("sdb")]}])


def node(**fields):
    return {"name": "pve1", "boot_id": "b1", "uptime_seconds": 10 * DAY, **fields}


def disk(**fields):
    return [{"name": "sda", "serial": "S1", "kind": "ssd", "passed": True, **fields}]


def guest(**fields):
    return [{"vmid": 104, "type": "qemu", "name": "db", "status": "running", **fields}]


def storage(**fields):
    return [{"storage": "backup", "type": "nfs", "enabled": True, "active": True, "total_bytes": 100, "used_bytes": 10,
             **fields}]


def scan(**fields):
    return pool(scan={"function": "scrub", "state": "scanning", **fields})


def snapshots(age, **fields):
    return lambda now: [{"dataset": "tank/data", "class": "autosnap_hourly", "count": 24, "newest_at": now - age,
                         "oldest_at": now - DAY, "interval_seconds": 3600, **fields}]


def scrubbed(age, **fields):
    return lambda now: pool(scan={"function": "none", "state": "none"}, last_scrub={"ended_at": now - age, "errors": 0,
                                                                                    "repaired_bytes": 0, **fields})


def certificate(left, **fields):
    return lambda now: [{"file": "pve-ssl.pem", "subject": "CN=pve1", "issuer": "CN=R11", "expires_at": now + left,
                         **fields}]


def replication(**fields):
    return lambda now: [{"id": "104-0", "vmid": 104, "target": "pve2", "schedule": "*/15", "enabled": True,
                         "last_sync_at": now - 600, "fail_count": 0, **fields}]


def service(**fields):
    return [{"unit": "pvestatd.service", "load": "loaded", "active": "active", "sub": "running", "enabled": "enabled",
             **fields}]


def spared(**fields):
    members = [leaf("sda"), leaf("sdz")]
    return pool(vdevs=[{"name": "mirror-0", "type": "mirror", "class": "normal", "state": "ONLINE", "children": [
        leaf("sdb"), {"name": "spare-1", "type": "spare", "state": "ONLINE", "children": members}]}], **fields)


def filesystem(**fields):
    return [{"name": "tank/data", "type": "filesystem", "mounted": True, "canmount": "on", "mountpoint": "/tank/data",
             **fields}]


def job(last_state, began=None, **fields):
    return {"jobs": [{"id": "all", "enabled": True, "guests": "all", "last_state": last_state, "last_run_at": began, **fields}],
            "guests": []}


def run(vmid, good, failed=None):
    return {"vmid": vmid, "newest_ok": {"ended_at": good}, "newest_failed": {"ended_at": failed, "error": "no space left"} if failed else None}


def reserved(left):
    return pool(capacity_ratio=.6, usable_used_bytes=1000, usable_available_bytes=left)


def ceph(severity, **fields):
    return {"health": severity, "checks": [{"name": "OSD_FULL", "severity": severity, "message": "1 full osd(s)", **fields}]}


W, C, INFO, P, N = "warning", "critical", "info", "pending", None

# rule, section, and steps: (minutes from the start, what the section holds, what is expected of the alert then)
LIVES = [
    ("pool-state", "pool_states", [(0, pool(), N), (1, pool(state="DEGRADED"), C), (2, pool(state=None), C),
                                   (3, LOST, C), (4, pool(state="TRANSITIONING"), C), (5, pool(), N)]),
    ("pool-state", "pool_states", [(0, pool(state="UNKNOWN"), N), (1, pool(state="SUSPENDED"), C), (2, [], N)]),
    ("pool-state", "pools", [(0, mirror(leaf(), leaf("sdb")), N), (5, mirror(leaf(), leaf("sdb", state="UNAVAIL")), C),
                             (10, mirror(leaf(), leaf("sdb")), N)]),  # the word says ONLINE all the time
    ("pool-state", "pools", [(0, pool(redundancy_margin=-1), C)]),
    ("pool-margin", "pools", [(0, pool(redundancy_margin=1), N), (5, pool(redundancy_margin=0), INFO), (10, pool(), INFO),
                              (70, pool(redundancy_margin=0), W), (75, pool(redundancy_margin=1), N)]),
    ("pool-margin", "pools", [(0, pool(redundancy_margin=0), N), (90, pool(redundancy_margin=0), N)]),  # built so
    ("pool-spare", "pools", [(0, spared(), P), (15, spared(), W), (20, [{"name": "tank", "unknown_reason": "timeout"}], W),
                             (25, mirror(leaf(), leaf("sdb")), N)]),
    ("pool-spare", "pools", [(0, spared(scan={"function": "resilver", "state": "scanning"}), N)]),
    ("pool-spare", "pools", [(0, pool(vdevs=[leaf("sdc", **{"class": "cache"}, state="FAULTED")]), P)]),
    ("pool-spare", "pools", [(0, pool(vdevs=[leaf("sdc", **{"class": "spare"}, state="AVAIL")]), N)]),
    ("pool-unanswered", "pools", [(0, [{"name": "tank", "unknown_reason": "timeout: zpool status"}], P),
                                  (15, [{"name": "tank", "unknown_reason": "timeout: zpool status"}], W), (20, pool(), N)]),
    ("pool-readonly", "pools", [(0, pool(readonly=True), P), (15, pool(readonly=True), W), (20, pool(readonly=None), W),
                                (25, pool(readonly=False), N)]),
    ("scrub-result", "pools", [(0, pool(scan={"function": "resilver", "state": "finished", "errors": 3, "ended_at": 9}), C)]),
    ("slow-ios", "pools", [(0, mirror(leaf(slow_ios=50)), N), (5, mirror(leaf(slow_ios=59)), N),
                           (10, mirror(leaf(slow_ios=60)), W), (15, mirror(leaf(slow_ios=None)), W),
                           (1500, mirror(leaf(slow_ios=60)), N)]),
    ("dataset-unmounted", "datasets", [(0, filesystem(), N), (5, filesystem(mounted=False), P),
                                       (20, filesystem(mounted=False), W), (25, filesystem(mounted=None), W),
                                       (30, filesystem(), N)]),
    ("dataset-unmounted", "datasets", [(0, filesystem(mounted=False, canmount="noauto"), N),
                                       (20, filesystem(mounted=False, mountpoint="none"), N),
                                       (40, filesystem(mounted=False, vmid=999), N)]),  # a copy of another node's guest
    ("selftest-failed", "disks", [(0, disk(selftest={"passed": True}), N), (30, disk(selftest={"passed": False}), W),
                                  (60, disk(), W), (90, disk(selftest={"passed": True}), N)]),
    ("smart-warning", "disks", [(0, disk(critical_warning=2, kind="nvme"), W), (30, disk(critical_warning=3, kind="nvme"), C)]),
    ("pool-vanished", "pool_states", [(0, pool(), N), (1, LOST, N), (2, [], C), (3, pool(), N)]),
    ("vdev-errors", "pools", [(0, mirror(leaf(), leaf("sdb")), N), (5, mirror(leaf(read_errors=1), leaf("sdb")), W),
                              (10, mirror(leaf(read_errors=None, write_errors=None, checksum_errors=None), leaf("sdb")),
                               W),
                              (15, mirror(leaf(read_errors=12), leaf("sdb")), C),
                              (20, mirror(leaf(), leaf("sdb")), N)]),  # zpool clear
    ("vdev-errors", "pools", [(0, mirror(leaf(checksum_errors=2), leaf("sdb")), W),
                              (5, mirror(leaf(checksum_errors=2), leaf("sdb", read_errors=1)), C)]),
    ("pool-data-errors", "pools", [(0, pool(data_errors=0), N), (5, pool(data_errors=3), C), (10, pool(), C),
                                   (15, pool(data_errors=0), N)]),
    ("pool-capacity", "pools", [(0, pool(capacity_ratio=.84), P), (10, pool(capacity_ratio=.84), P),
                                (15, pool(capacity_ratio=.84), W), (20, pool(capacity_ratio=.78), W),
                                (25, pool(), W), (30, pool(capacity_ratio=.77), N)]),  # 77 clears, not 80
    ("pool-capacity", "pools", [(0, pool(capacity_ratio=.84), P), (10, pool(capacity_ratio=.79), N),
                                (15, pool(capacity_ratio=.84), P)]),  # the hold starts anew
    ("pool-capacity", "pools", [(0, pool(capacity_ratio=.91), P), (15, pool(capacity_ratio=.91), C),
                                (20, pool(capacity_ratio=.88), C), (25, pool(capacity_ratio=.86), W)]),
    ("pool-capacity", "pools", [(0, reserved(0), P), (15, reserved(0), C), (20, reserved(100), N)]),
    ("vdev-errors", "pools", [(0, grouped(0, 4), W)]),  # of no disk in it: https://github.com/openzfs/zfs/issues/5018
    ("vdev-errors", "pools", [(0, grouped(1, 12), W), (5, grouped(1, 13), W)]),
    ("suspects-hold-pool", "pools", [(0, pool(vdevs=[leaf(checksum_errors=1)]), N), (5, pool(vdevs=[leaf(checksum_errors=12)]), C)]),
    ("pool-fragmentation", "pools", [(0, pool(capacity_ratio=.5, fragmentation_ratio=.9), N),
                                     (60, pool(capacity_ratio=.85, fragmentation_ratio=.75), P),
                                     (60 + 1440, pool(capacity_ratio=.85, fragmentation_ratio=.75), W),
                                     (1510, pool(capacity_ratio=.85, fragmentation_ratio=.65), W),
                                     (1515, pool(capacity_ratio=.85), W),
                                     (1520, pool(capacity_ratio=.85, fragmentation_ratio=.59), N)]),
    ("scrub-age", "pools", [(0, scrubbed(39 * DAY), N), (5, scrubbed(41 * DAY), W), (10, pool(), W),
                            (15, scrubbed(76 * DAY), C), (20, scrubbed(60), N)]),
    ("scrub-age", "pools", [(0, pool(scan={"function": "none", "state": "none"}), N),
                            (41 * 1440, pool(scan={"function": "none", "state": "none"}), W)]),  # never scrubbed
    ("scrub-result", "pools", [(0, scrubbed(60), N), (5, scrubbed(60, repaired_bytes=4096), W),
                               (10, scrubbed(60, errors=2), C), (15, scrubbed(60), N)]),
    ("scrub-stuck", "pools", [(0, scan(progress_ratio=.4), N), (1430, scan(progress_ratio=.4), N),
                              (1440, scan(progress_ratio=.4), W), (1445, scan(progress_ratio=.41), N)]),
    ("dataset-quota", "datasets", [(0, [{"name": "t/a", "used_bytes": 92, "quota_bytes": 100}], P),
                                   (15, [{"name": "t/a", "used_bytes": 92, "quota_bytes": 100}], W),
                                   (20, [{"name": "t/a", "used_bytes": 96, "quota_bytes": 100}], W),
                                   (35, [{"name": "t/a", "used_bytes": 96, "quota_bytes": 100}], C),
                                   (40, [{"name": "t/a", "used_bytes": 86, "quota_bytes": 100}], N)]),
    ("snapshot-age", "snapshots", [(0, snapshots(HOUR), N), (30, snapshots(101 * MINUTE), W), (60, LOST, W),
                                   (90, snapshots(191 * MINUTE), C), (120, snapshots(60), N)]),
    ("snapshot-age", "snapshots", [(0, snapshots(300 * DAY), N)]),  # given up long ago: nobody's fault
    ("snapshot-age", "snapshots", [(0, snapshots(80 * MINUTE, count=2, interval_seconds=None), N),  # sanoid's 90/360
                                   (30, snapshots(95 * MINUTE, count=2, interval_seconds=None), W)]),
    ("guest-snapshot-age", "snapshots", [(0, snapshots(60, **{"class": "pve"}), N),
                                         (30, lambda now: [{"dataset": "tank/vm-104-disk-0", "class": "pve", "count": 1,
                                                            "newest_at": now - 31 * DAY, "oldest_at": now - 31 * DAY}],
                                                            W),
                                         (60, [], N)]),
    ("smart-failed", "disks", [(0, disk(), N), (30, disk(passed=False), C), (60, disk(passed=None), C), (90, disk(),
                                                                                                         N)]),
    ("smart-warning", "disks", [(0, disk(critical_warning=0, kind="nvme"), N), (30, disk(critical_warning=4,
                                                                                         kind="nvme"), C),
                                (60, disk(kind="nvme"), C), (90, disk(critical_warning=0, kind="nvme"), N)]),
    ("smart-growth", "disks", [(0, disk(reallocated_sectors=8), N), (30, disk(reallocated_sectors=9), W),
                               (60, disk(), W),  # not told now: unknown ends nothing
                               (90, disk(reallocated_sectors=10), C), (10090 + 60, disk(reallocated_sectors=10), W)]),
    ("smart-crc", "disks", [(0, disk(crc_errors=3), N), (30, disk(crc_errors=4), W), (60, disk(crc_errors=9), W)]),
    ("smart-unknown", "disks", [(0, disk(passed=None), INFO), (30, disk(), N)]),
    ("disk-gone", "disks", [(0, disk(pool="tank"), N), (30, LOST, N), (60, [], C), (90, disk(pool="tank"), N)]),
    ("disk-gone", "disks", [(0, disk(), N), (30, [], W)]),
    ("disk-temperature", "disks", [(0, disk(temperature_celsius=66), P), (30, disk(temperature_celsius=66), W),
                                   (60, disk(temperature_celsius=61), W), (90, disk(), W),
                                   (120, disk(temperature_celsius=60), N)]),
    ("disk-temperature", "disks", [(0, disk(temperature_celsius=66, kind="nvme"), N),
                                   (30, disk(temperature_celsius=56, kind="hdd"), P),
                                   (60, disk(temperature_celsius=61, kind="hdd"), W),
                                   (90, disk(temperature_celsius=61, kind="hdd"), C)]),
    ("disk-wear", "disks", [(0, disk(wear_ratio=.79), N), (30, disk(wear_ratio=.80), W), (60, disk(), W),
                            (90, disk(wear_ratio=.95), C), (120, disk(wear_ratio=0, serial="S2"), N)]),
    ("disk-wear", "disks", [(0, disk(wear_ratio=.1, spare_ratio=.1, spare_threshold_ratio=.1), C)]),
    ("disk-wear", "disks", [(0, disk(spare_ratio=0, spare_threshold_ratio=0), N)]),  # it does not tell
    ("smart-failed", "disks", [(0, disk(passed=False, critical_warning=2, kind="nvme"), N),  # only hot: smart-warning
                               (30, disk(passed=False, critical_warning=3, kind="nvme"), C)]),
    ("smart-warning", "disks", [(0, disk(passed=False, critical_warning=2, kind="nvme"), W)]),
    ("smart-failed", "disks", [(0, disk(failing_attributes=["Reallocated_Sector_Ct"]), C), (30, disk(), N)]),
    ("disk-temperature", "disks", [(0, disk(temperature_celsius=61, temperature_limit_celsius=85, kind="hdd"), N),
                                   (30, disk(temperature_celsius=66, temperature_limit_celsius=85, kind="hdd"), P),
                                   (60, disk(temperature_celsius=66, temperature_limit_celsius=85, kind="hdd"), W)]),
    ("disk-temperature", "disks", [(0, disk(temperature_celsius=61, temperature_limit_celsius=60), P),
                                   (30, disk(temperature_celsius=61, temperature_limit_celsius=60), C)]),
    ("cpu", "node", [(0, node(cpu_ratio=.95), P), (29, node(cpu_ratio=.95), P), (30, node(cpu_ratio=.95), W),
                     (31, node(), W), (32, node(cpu_ratio=.81), W), (33, node(cpu_ratio=.8), N)]),
    ("memory", "node", [(0, node(memory_free_ratio=.09), P), (9, node(memory_free_ratio=.09), P),
                        (10, node(memory_free_ratio=.09), W), (11, node(memory_free_ratio=.04), W),
                        (16, node(memory_free_ratio=.04), C), (17, node(), C), (18, node(memory_free_ratio=.12), W),
                        (19, node(memory_free_ratio=.13), N)]),
    ("memory", "node", [(0, node(memory_free_ratio=.04), P), (5, node(memory_free_ratio=.04), C)]),
    ("oom", "node", [(0, node(oom_kills_total=3), N), (1, node(oom_kills_total=4), W), (2, node(), W),
                     (62, node(oom_kills_total=4), N)]),
    ("io-pressure", "node", [(0, node(pressure_io_full_avg300_ratio=.3), P),
                             (15, node(pressure_io_full_avg300_ratio=.3), W),
                             (16, node(pressure_io_full_avg300_ratio=.11), W), (17, node(), W),
                             (18, node(pressure_io_full_avg300_ratio=.1), N)]),
    ("memory-pressure", "node", [(0, node(pressure_memory_full_avg300_ratio=.2), P),
                                 (5, node(pressure_memory_full_avg300_ratio=.2), C),
                                 (6, node(pressure_memory_full_avg300_ratio=.02), N)]),
    ("root-full", "node", [(0, node(root_used_bytes=86, root_available_bytes=14), P),
                           (10, node(root_used_bytes=86, root_available_bytes=14), W), (11, node(), W),
                           (12, node(root_used_bytes=82, root_available_bytes=18), N)]),
    ("reboot-needed", "node", [(0, node(reboot_needed=True), N), (31 * 1440, node(reboot_needed=True), W),
                               (31 * 1440 + 1, node(), W), (31 * 1440 + 2, node(reboot_needed=False), N)]),
    ("storage-full", "storages", [(0, storage(used_bytes=86), P), (10, storage(used_bytes=86), W),
                                  (11, storage(used_bytes=94), W), (21, storage(used_bytes=94), C),
                                  (22, storage(used_bytes=None), C), (23, storage(used_bytes=82), N)]),
    ("storage-full", "storages", [(0, storage(used_bytes=81, type="lvmthin"), P), (10, storage(used_bytes=81,
                                                                                               type="lvmthin"), W)]),
    ("storage-metadata", "storages", [(0, storage(metadata_used_ratio=.8), P), (10, storage(metadata_used_ratio=.8), W),
                                      (11, storage(metadata_used_ratio=.7), N)]),
    ("storage-inactive", "storages", [(0, storage(active=False), P), (10, storage(active=False), W),
                                      (11, storage(active=None), W), (12, storage(), N)]),
    ("storage-inactive", "storages", [(0, storage(active=False, enabled=False), N)]),
    ("guest-down", "guests", [(0, guest(), N), (1, guest(status="stopped"), P), (2, guest(status="unknown"), P),
                              (3, guest(status="stopped"), W), (4, LOST, W), (5, guest(), N)]),
    ("guest-down", "guests", [(0, guest(status="stopped"), N), (9, guest(status="stopped"), N)]),  # was never running
    ("guest-down", "guests", [(0, guest(), N), (1, guest(status="stopped", template=True), N)]),
    ("guest-down", "guests", [(0, guest(ha_state="started"), N), (1, guest(status="stopped", ha_state="started"), P),
                              (3, guest(status="stopped", ha_state="started"), C)]),
    ("guest-down", "guests", [(0, guest(ha_state="started"), N), (1, guest(status="stopped", ha_state="stopped"), N),
                              (5, guest(status="stopped"), N)]),
    ("guest-down", "guests", [(0, guest(tags="prod;critical"), N), (1, guest(status="stopped", tags="prod;critical"),
                                                                    P),
                              (3, guest(status="stopped", tags="prod;critical"), C)]),
    *(("guest-down", "guests", [(0, guest(), N), (1, guest(status=state), P), (3, guest(status=state), W)])
      for state in ("io-error", "watchdog")),
    ("guest-down", "guests", [(0, guest(), N), (1, guest(status="stopped"), P), (2, [], N), (9, guest(status="stopped"),
                                                                                             N)]),
    ("guest-down", "guests", [(0, guest(), N), (1, guest(status="stopped", lock="backup", lock_held=True), N),
                              (300, guest(status="stopped", lock="backup", lock_held=True), N),
                              (301, guest(status="stopped", lock="backup", lock_held=False), P),
                              (304, guest(status="stopped", lock="backup", lock_held=False), W)]),
    ("guest-down", "guests", [(0, guest(), N), (1, guest(status="stopped", lock="migrate"), N),
                              (59, guest(status="stopped", lock="migrate"), N), (62, guest(status="stopped", lock="migrate"), P),
                              (65, guest(status="stopped", lock="migrate"), W)]),
    ("guest-down", "guests", [(0, guest(), N), (1, guest(status="stopped", lock="suspended"), N),
                              (90, guest(status="stopped", lock="suspended"), N)]),
    ("guest-hangs", "guests", [(0, guest(responds=True), N), (1, guest(responds=False), P), (6, guest(responds=False), W),
                               (7, guest(), W), (8, guest(responds=True), N)]),
    ("guest-hangs", "guests", [(0, guest(responds=False, lock="backup", lock_held=True), N)]),
    # https://github.com/prometheus-pve/prometheus-pve-exporter/issues/303
    ("guest-locked", "guests", [(0, guest(lock="snapshot", lock_held=False), P), (61, guest(lock="snapshot", lock_held=False), W),
                                (62, guest(lock="snapshot"), W), (63, guest(lock="snapshot", lock_held=True), N)]),
    ("guest-locked", "guests", [(0, guest(lock="mounted", lock_held=False), N)]),
    ("guest-locked", "guests", [(0, guest(status="stopped", lock="backup", lock_held=False), N)]),
    ("guest-disk-full", "guests", [(0, guest(type="lxc", disk_used_bytes=91, disk_max_bytes=100), P),
                                   (15, guest(type="lxc", disk_used_bytes=91, disk_max_bytes=100), W),
                                   (16, guest(type="lxc"), W),
                                   (17, guest(type="lxc", disk_used_bytes=86, disk_max_bytes=100), N)]),
    ("backup-job", "backups", [(0, job(None), N), (5, job("could not activate storage 'nas'", 1), W), (10, job("started", 2), W),
                               (15, job("could not activate storage 'nas'", 2), C), (20, job("OK", 3), N)]),
    ("backup-job", "backups", [(0, {**job("job errors", 900), "guests": [run(100, 950), run(101, 100, 960)]}, N),  # 101 tells it
                               (5, {**job("job errors", 1900), "guests": [run(100, 950, 1950), run(101, 100, 1960)]}, W)]),
    ("backup-job", "backups", [(0, job("WARNINGS: 1", 1), N), (5, job("job errors", 2, enabled=False), N)]),
    ("ceph", "ceph", [(0, {"health": "HEALTH_OK", "checks": []}, N), (5, ceph("HEALTH_WARN"), P), (10, ceph("HEALTH_WARN"), W),
                      (15, ceph("HEALTH_ERR"), C), (20, {}, C), (25, ceph("HEALTH_ERR", muted=True), N)]),
    ("unit-failed", "failed_units", [(0, ["foo.service"], N), (5, ["zfs-import-cache.service"], P),
                                     (15, ["zfs-import-cache.service"], W), (20, [], N)]),
    ("service-failed", "services", [(0, service(restarts=1), N), (5, service(restarts=3), N), (10, service(restarts=4), P),
                                    (20, service(restarts=6), C), (90, service(restarts=6), N)]),
    ("updates-security", "updates", [(0, {"security": 2}, N), (15 * 1440, {"security": 2}, W), (15 * 1440 + 1, {}, W),
                                     (15 * 1440 + 2, {"security": 0}, N)]),
    ("updates-security", "updates", [(0, {"pending": 9, "security": 2}, N), (15 * 1440, {"pending": 9, "security": 2},
                                                                             W),
                                     (15 * 1440 + 1, {"pending": 7}, N)]),  # none is marked any more
    ("updates-stale", "updates", [(0, lambda now: {"as_of": now - 6 * DAY}, N),
                                  (30, lambda now: {"as_of": now - 8 * DAY}, W),
                                  (60, {}, W), (90, lambda now: {"as_of": now}, N)]),
    ("certificate", "certificates", [(0, certificate(22 * DAY), N), (30, certificate(20 * DAY), W),
                                     (60, certificate(4 * DAY), C), (90, [{"file": "pve-ssl.pem"}], C),
                                     (120, certificate(90 * DAY), N)]),
    ("certificate", "certificates", [(0, certificate(24 * DAY, acme=True), W)]),
    ("certificate", "certificates", [(0, certificate(13 * DAY, issuer="CN=Proxmox Virtual Environment"), N),
                                     (30, certificate(11 * DAY, issuer="CN=Proxmox Virtual Environment"), W)]),
    ("clock-unsynced", "time_sync", [(0, {"synchronised": False}, P), (30, {"synchronised": False}, W), (35, {}, W),
                                     (40, {"synchronised": True}, N)]),
    ("replication", "replication", [(0, replication(), N), (5, replication(fail_count=1), W), (10, LOST, W),
                                    (15, replication(fail_count=3), C), (20, replication(), N)]),
    ("replication", "replication", [(0, replication(last_sync_at=START - 60), N),
                                    (5, lambda now: replication(last_sync_at=now - 4000, due_times=[
                                        now - 3900, now - 3000, now - 2100, now - 1200])(now), C)]),
    ("ha-stale", "ha", [(0, lambda now: {"services": [{"id": "vm:104"}], "lrm": {"as_of": now - 30}}, N),
                        (5, lambda now: {"services": [{"id": "vm:104"}], "lrm": {"as_of": now - 130}}, W),
                        (10, lambda now: {"services": [], "lrm": {"as_of": now - 900}}, N)]),
    ("ha-stale", "ha", [(0, lambda now: {"services": [{"id": "vm:104"}], "manager_as_of": now - 30}, N),
                        (5, lambda now: {"services": [{"id": "vm:104"}], "manager_as_of": now - 1900}, W)]),
    ("service-failed", "services", [(0, service(), N), (5, service(active="failed"), P), (15, service(active="failed"),
                                                                                          C),
                                    (20, service(active=None), C), (25, service(), N)]),
    ("service-failed", "services", [(0, service(unit="chrony.service", active="inactive", enabled="disabled"), P),
                                    (10, service(unit="chrony.service", active="inactive", enabled="disabled"), W)]),
    ("service-failed", "services", [(0, service(unit="chrony.service", active="inactive", enabled="disabled")
                                     + service(unit="ntpsec.service"), N)]),  # another one keeps the time
    ("service-failed", "services", [(0, service(unit="zfs-zed.service", active="failed", load="not-found"), N)]),
    ("service-failed", "services", [(0, service(unit="smartmontools.service", active="inactive"), P),
                                    (10, service(unit="smartmontools.service", active="inactive"), W)]),
    ("mail-queue", "mail_queue", [(0, {"deferred": 20, "active": 1}, P), (10, {"deferred": 20, "active": 1}, W),
                                  (12, {}, W), (15, lambda now: {"deferred": 2, "oldest_at": now - 60}, N)]),
    ("mail-queue", "mail_queue", [(0, lambda now: {"deferred": 1, "oldest_at": now - 7 * HOUR}, P),
                                  (10, lambda now: {"deferred": 1, "oldest_at": now - 7 * HOUR}, W),
                                  (15, lambda now: {"deferred": 0, "active": 0, "oldest_at": None}, N)]),
]


@pytest.mark.parametrize("rule, section, steps", LIVES, ids=[f"{row[0]}-{number}" for number, row in enumerate(LIVES)])
def test_life_of_an_alert(sim, rule, section, steps):
    for minutes, seen, expected in steps:
        sim.now = START + minutes * MINUTE
        fields = {"errors": {section: {"code": "timeout", "detail": "no answer"}}} if seen == LOST else {
            section: copy.deepcopy(seen(sim.now) if callable(seen) else seen)}
        sim.send("pve1", **fields)
        found = [row for row in sim.alerts(rule, "all") if row["state"] != "resolved"]
        got = None if not found else "pending" if found[0]["state"] == "pending" else found[0]["severity"]
        assert (minutes, got) == (minutes, expected), found
        assert len(found) <= 2
        assert all(row["message"] for row in found)


def test_every_rule_has_a_row_here():
    """A rule without a test is a rule nobody has seen fire."""
    elsewhere = {  # those that need more than one section, one host, or the clock
        "host-offline", "site-offline", "pool-forecast", "snapshot-gone", "disk-wear-forecast", "backup-overdue",
        "backup-failed", "backup-missing", "clock-skew", "cluster-clock", "cluster-quorum", "cluster-disagree",
        "cluster-member", "cluster-margin", "cluster-storage-full", "ha-service", "section-failing", "spool-dropped",
        "agent-old", "host-twice", "server-certificate", "backup-excludes", "cluster-ceph", "ha-disarmed", "ha-node",
        "log-ins-fail", "copy-missing", "suspects-hold-pool", "blind-spot", "space-forecast",
        "scrub-slow", "snapshot-missing", "pool-special", "snapshot-unpruned", "snapshot-growth"}
    assert {row[0] for row in LIVES} | elsewhere == set(server.RULE)


def test_every_rule_says_why_and_what_to_do():
    for rule in server.RULES:
        assert rule.why and rule.todo and rule.of, rule.name


# --- rules that need more than one section, or the clock ---


def test_a_pool_that_resilvers_says_so(sim):
    vdevs = [{"name": "mirror-0", "children": [leaf(), leaf("sdb", state="UNAVAIL")]}]
    full = pool(state="DEGRADED", redundancy_margin=0, vdevs=vdevs,
                scan={"function": "resilver", "state": "scanning", "progress_ratio": .43})
    sim.send("pve1", pool_states=pool(state="DEGRADED"), pools=full)
    message = sim.alerts("pool-state")[0]["message"]
    assert "resilvering 43%" in message and "no more disk may fail" in message and "sdb UNAVAIL" in message


def test_a_disk_taken_offline_by_hand_only_warns_while_there_is_redundancy(sim):
    vdevs = [{"name": "raidz2-0", "children": [leaf(), leaf("sdb", state="OFFLINE")]}]
    sim.send("pve1", pool_states=pool(state="DEGRADED"), pools=pool(state="DEGRADED", redundancy_margin=1, vdevs=vdevs))
    assert sim.alerts("pool-state")[0]["severity"] == "warning"
    sim.now += 30
    sim.send("pve1", pool_states=pool(state="DEGRADED"), pools=pool(state="DEGRADED", redundancy_margin=0, vdevs=vdevs))
    assert sim.alerts("pool-state")[0]["severity"] == "critical"


def test_a_pool_that_nothing_uses_may_be_exported(sim):
    sim.send("pve1", pool_states=[*pool(), {"name": "usb", "state": "ONLINE"}], node=node(), storages=[], guests=[])
    sim.now += 30
    sim.send("pve1", pool_states=pool())
    assert [row["severity"] for row in sim.alerts("pool-vanished")] == ["info"]


def test_pool_forecast_needs_three_days_of_steady_growth(sim):
    free = 1000 * 1e9
    for hour in range(0, 5 * 24, 6):
        sim.now = START + hour * HOUR
        used = 1000e9 + hour * 4e9  # 96 GB a day
        sim.send("pve1", pools=pool(usable_used_bytes=used, usable_available_bytes=free - hour * 4e9))
        server.forecast_fleet(sim.monitor, sim.now, sim.monitor.store.reader(), 9)
        if hour <= 66:
            assert not sim.alerts("pool-forecast", "all"), hour
    alert = sim.alerts("pool-forecast")[0]
    assert alert["severity"] == "warning" and 5 < alert["value"] < 7
    row = server.host_row(sim.fleet, sim.fleet.find("pve1"), sim.now)
    assert row["days_until_full"] == pytest.approx(alert["value"], rel=.1)
    assert next(server.pool_rows(sim.fleet.find("pve1"), sim.now))["full_in"] in alert["message"]
    sim.restart()  # only the database is left
    sim.send("pve1", pools=pool(usable_used_bytes=used, usable_available_bytes=free - hour * 4e9))
    assert sim.alerts("pool-forecast"), "what is not looked at yet ends nothing"
    server.forecast_fleet(sim.monitor, sim.now, sim.monitor.store.reader(), 9)
    assert server.worst_days_until_full(sim.fleet.find("pve1")) == pytest.approx(alert["value"], rel=.1)


def test_a_pool_that_has_stopped_growing_is_over(sim):
    def day(number, used):
        for hour in range(0, 24, 6):
            sim.now = START + number * DAY + hour * HOUR
            sim.send("pve1", pools=pool(usable_used_bytes=used, usable_available_bytes=2000e9 - used))
            server.forecast_fleet(sim.monitor, sim.now, sim.monitor.store.reader(), 9)
            used += 24e9 * (number < 5)
        return used

    used = 1000e9
    for number in range(18):
        used = day(number, used)
        if number == 4:
            assert sim.alerts("pool-forecast")
    assert not sim.alerts("pool-forecast")


@pytest.mark.parametrize("object, sections", [
    ("storages/thin", lambda used: {"storages": [{"storage": "thin", "type": "lvmthin", "enabled": True, "active": True,
                                                  "used_bytes": used, "total_bytes": 2000e9}]}),
    ("datasets/tank/share", lambda used: {"datasets": [{"name": "tank/share", "type": "filesystem", "used_bytes": used,
                                                        "quota_bytes": 2000e9}]}),
    ("root", lambda used: {"node": node(root_used_bytes=used, root_available_bytes=2000e9 - used)})])
def test_whatever_fills_up_is_forecast(sim, object, sections):
    for hour in range(0, 5 * 24, 6):
        sim.now = START + hour * HOUR
        sim.send("pve1", **{"node": node(), **sections(1000e9 + hour * 4e9)})
        server.forecast_fleet(sim.monitor, sim.now, sim.monitor.store.reader(), 9)
    (alert,) = sim.alerts("space-forecast")
    assert alert["object"] == object and alert["severity"] == "warning" and 5 < alert["value"] < 7


def test_pool_forecast_is_silent_about_use_that_goes_up_and_down(sim):
    for hour in range(0, 8 * 24, 6):
        sim.now = START + hour * HOUR
        used = 1000e9 + (hour % 24) * 8e9
        sim.send("pve1", pools=pool(usable_used_bytes=used, usable_available_bytes=2000e9 - used))
        server.forecast_fleet(sim.monitor, sim.now, sim.monitor.store.reader(), 9)
    assert sim.fleet.find("pve1").forecasts and not sim.alerts("pool-forecast", "all")


def test_wear_forecast(sim):
    for week in range(10):
        sim.now = START + week * 7 * DAY
        sim.send("pve1", disks=disk(wear_ratio=.4 + week * .03))
    assert sim.alerts("disk-wear-forecast")[0]["severity"] == "warning"


def test_a_class_of_snapshots_that_is_gone_is_told_and_accepted(sim):
    datasets = [{"name": "tank/data", "type": "filesystem"}]
    sim.send("pve1", snapshots=snapshots(60)(sim.now), datasets=datasets)
    sim.now += HOUR
    sim.send("pve1", snapshots=[], datasets=datasets)
    alert = sim.alerts("snapshot-gone")[0]
    sim.write(lambda db: server.accept_as_normal(db, sim.fleet, alert["id"], sim.now, by="me"))
    assert not sim.alerts("snapshot-gone")


def test_the_snapshot_that_clones_of_a_template_live_on_is_no_forgotten_one(sim):
    sim.send("pve1", snapshots=[{"dataset": "tank/base-9000-disk-0", "class": "pve", "count": 1, "newest_at": 1, "oldest_at": 1}])
    assert not sim.alerts("guest-snapshot-age")


def test_a_dying_nvme_is_one_alert_with_all_that_it_says(sim):
    sim.send("pve1", disks=disk(kind="nvme", passed=False, critical_warning=1, spare_ratio=.03, spare_threshold_ratio=.1,
                                wear_ratio=1.02, selftest={"passed": False}))
    alert, = sim.alerts()
    assert alert["rule"] == "smart-failed"
    for fact in ("spare below its limit", "3% of its spare", "102% of its rated life", "self-test failed"):
        assert fact in alert["message"]


def test_alerts_follow_a_disk_to_its_new_letter(sim):
    """Letters change at a start: https://github.com/c0m4r/kula/issues/46"""
    first, second = {"name": "sda", "serial": "S1", "passed": False}, {"name": "sdb", "serial": "S2", "passed": False}
    sim.send("pve1", disks=[first, second])
    before = {row["object"]: row["id"] for row in sim.alerts("smart-failed")}
    sim.now += 1800
    sim.send("pve1", disks=[{**first, "name": "sdb"}, {**second, "name": "sda"}])  # they have changed places
    after = {row["object"]: row["id"] for row in sim.alerts("smart-failed")}
    assert after == {"disks/sdb": before["disks/sda"], "disks/sda": before["disks/sdb"]}
    sim.restart()
    sim.now += 1800
    sim.send("pve1", disks=[{**first, "name": "sdb", "passed": True}, {**second, "name": "sda"}])
    assert [row["id"] for row in sim.alerts("smart-failed")] == [before["disks/sdb"]]


def test_a_disk_that_does_not_answer_is_not_gone(sim):
    """smartctl on a busy disk: https://github.com/prometheus-community/smartctl_exporter/issues/309"""
    leaves = mirror(leaf("sda", disk="sda"), leaf("sdb", disk="sdb"))
    sim.send("pve1", disks=[*disk(pool="tank"), *disk(name="sdb", serial="S2", pool="tank")], pools=leaves)
    sim.now += 1800
    mute = {"name": "sdb", "listed": True, "unknown_reason": "timeout: smartctl"}
    sim.send("pve1", disks=[*disk(pool="tank"), mute], pools=leaves)
    sim.now += 1800
    sim.send("pve1", disks=disk(pool="tank"), pools=leaves)  # not even listed, and its pool has it ONLINE
    assert not sim.alerts("disk-gone")
    sim.now += 1800
    sim.send("pve1", disks=disk(pool="tank"), pools=mirror(leaf("sda", disk="sda"), leaf("sdb", state="REMOVED")))
    assert [row["object"] for row in sim.alerts("disk-gone")] == ["disks/sdb"]


def test_smartd_is_not_missed_where_there_are_no_disks(sim):  # https://github.com/smartmontools/smartmontools/issues/62
    sim.send("pve1", disks=[], services=service(unit="smartmontools.service", active="inactive"))
    assert sim.alerts("service-failed") == [] and list(sim.monitor.fleet.find("pve1").alerts) == []


def test_snapshots_of_office_hours_are_not_missed_at_night(sim):
    """Each night is a pause; the first ones are told, and once is no rhythm."""
    told, last = [], sim.now
    for hour in range(24 * 5):
        sim.wait(HOUR, step=HOUR)
        last = sim.now if 8 <= hour % 24 <= 18 else last
        newest = [{"dataset": "tank/a", "class": "autosnap_hourly", "count": 40, "newest_at": last, "newest_guid": str(last),
                   "oldest_at": last - DAY, "interval_seconds": HOUR}]
        sim.send("pve1", snapshots=newest)
        told += [hour // 24] if sim.alerts("snapshot-age") else []
    assert set(told) == {0, 1, 2}


@pytest.mark.parametrize("size, told", [(100, "root-full"), (400, "storage-full")])
def test_a_full_directory_on_the_root_disk_is_told_once(sim, size, told):
    root = node(root_used_bytes=96, root_available_bytes=4, root_total_bytes=100)
    full = storage(storage="local", type="dir", total_bytes=size, used_bytes=size * .96, available_bytes=size * .04)
    for _ in range(20):
        sim.send("pve1", node=root, storages=full)
        sim.wait(MINUTE)
    assert {row["rule"] for row in sim.alerts()} - {"root-full"} == {told} - {"root-full"}
    host = sim.fleet.find("pve1")
    assert next(server.storage_rows(host, sim.now))["verdict"] == "critical"
    sim.fleet.layers = server.Layers({"rules": {"storage-full": {"warn": 0.97, "crit": 0.99}}})
    (row,), _ = server.rows_of_hosts(server.RESOURCES["storages"], sim.fleet, [host], sim.now)
    assert (row["verdict"] == "ok") is (told == "root-full")  # the row of what is told by itself is its alert's


def test_an_attribute_at_its_threshold_is_named(sim):
    assert server.suspicions({"failing_attributes": ["Spin_Retry_Count"]}, {}) == ["SMART: Spin_Retry_Count at the threshold"]


def test_snapshots_that_arrive_once_a_day_are_expected_once_a_day(sim):
    """https://github.com/jimsalterjrs/sanoid/issues/432: hourly snapshots, sent daily."""
    for hour in range(0, 80):
        sim.now = START + hour * HOUR
        batch = hour // 24
        if hour < 72:
            sim.send("pve1", snapshots=snapshots(600 + hour % 24 * HOUR, newest_guid=str(batch))(sim.now))
            if hour > 26:
                assert not sim.alerts("snapshot-age"), hour
    for hours, expected in ((20, []), (32, ["warning"]), (62, ["critical"])):  # since the last one came
        sim.now = START + (48 + hours) * HOUR
        sim.send("pve1", snapshots=snapshots(600 + hours * HOUR, newest_guid="2")(sim.now))
        assert [row["severity"] for row in sim.alerts("snapshot-age")] == expected


def test_a_resilver_that_begins_anew_again_and_again_gets_nowhere(sim):
    """https://github.com/openzfs/zfs/issues/11572 and 9551: it moves, and gets nowhere for days."""
    for hour in range(0, 30):
        sim.now = START + hour * HOUR
        done = .09 if hour == 3 else hour % 5 / 100
        sim.send("pve1", pools=scan(function="resilver", progress_ratio=done, started_at=sim.now))
        assert bool(sim.alerts("scrub-stuck")) is (hour >= 27), hour
    sim.now += HOUR
    sim.send("pve1", pools=scan(function="resilver", progress_ratio=.1, started_at=sim.now))
    assert not sim.alerts("scrub-stuck")


def test_certificates_are_judged_by_their_own_life(sim):
    """https://github.com/lxc/incus/issues/3808: an own CA gives certificates of 7 days."""
    for left, starts, expected in ((6.9, None, ["warning"]), (6.9, 0.1, []), (2.4, 4.6, []), (2.3, 4.7, ["warning"]),
                                   (1.1, 5.9, ["critical"]), (20, 70, ["warning"])):
        given = {} if starts is None else {"starts_at": sim.now - starts * DAY}
        sim.send("pve1", certificates=certificate(left * DAY, acme=True, **given)(sim.now))
        assert [row["severity"] for row in sim.alerts("certificate")] == expected, (left, starts)
        sim.now += 1800


def test_a_section_named_like_what_hosts_share_is_not_judged_as_that(sim):
    sim.fleet.failed_logins.extend([sim.now] * 10)
    sim.send("pve1", **{"(shared)": {}})
    assert not sim.alerts("log-ins-fail")


def test_log_ins_that_fail_are_told(sim):
    sim.fleet.failed_logins.extend([sim.now] * 9)
    sim.turn()
    assert not sim.alerts("log-ins-fail")
    sim.fleet.failed_logins.append(sim.now)
    sim.turn()
    assert [row["object"] for row in sim.alerts("log-ins-fail")] == ["server/log-ins"]
    sim.wait(16 * MINUTE, step=30)
    assert not sim.alerts("log-ins-fail")


def test_growth_with_errors_of_its_vdev_is_critical(sim):
    sim.send("pve1", pools=mirror(leaf(), leaf("sdb")), disks=disk(pending_sectors=0, pool="tank"))
    sim.now += 300
    sim.send("pve1", pools=mirror(leaf(read_errors=3), leaf("sdb")), disks=disk(pending_sectors=0, pool="tank"))
    sim.now += 300
    sim.send("pve1", disks=disk(pending_sectors=8, pool="tank"))
    assert sim.alerts("smart-growth")[0]["severity"] == "critical"


def test_oom_is_critical_when_a_guest_went_down_with_it(sim):
    sim.send("pve1", node=node(oom_kills_total=0), guests=guest())
    sim.now += 30
    sim.send("pve1", node=node(oom_kills_total=1), guests=guest(status="stopped"))
    assert sim.alerts("oom")[0]["severity"] == "critical"  # at once: guests are judged before it


def test_a_storage_that_is_worse_than_its_pool_is_told_itself(sim):
    """Reservations fill a pool that `zpool list` calls 81 % full: https://github.com/openzfs/zfs/issues/7321"""
    for minute in range(0, 30, 5):
        sim.now = START + minute * MINUTE
        sim.send("pve1", pools=pool(capacity_ratio=.81), storages=storage(used_bytes=100, dataset="tank", type="zfspool"))
    assert [row["severity"] for row in sim.alerts("storage-full")] == ["critical"]


def test_what_is_about_to_be_told_of_is_not_shown_as_well(sim):
    sim.send("pve1", storages=storage(used_bytes=100))
    row, = server.storage_rows(sim.fleet.find("pve1"), sim.now)
    assert row["verdict"] == "info" and "100%" in row["reason"] and not sim.alerts()


def test_a_full_storage_on_a_full_pool_is_told_by_the_pool_alone(sim):
    for minute in range(0, 30, 5):
        sim.now = START + minute * MINUTE
        sim.send("pve1", pools=pool(capacity_ratio=.9), storages=storage(used_bytes=95, dataset="tank/data",
                                                                         type="zfspool"))
    assert sim.alerts("pool-capacity") and not sim.alerts("storage-full", "all")


def test_a_milder_cause_hides_nothing_worse(sim):
    own = {"volumes": [{"storage": "s", "dataset": "tank/vm-104-disk-0"}], "tags": "critical"}
    offline = mirror(leaf(), leaf("sdb", state="OFFLINE"))[0] | {"state": "DEGRADED", "redundancy_margin": 1}
    sim.send("pve1", guests=guest(**own), pools=[offline])
    for minute in (1, 4):
        sim.now = START + minute * MINUTE
        sim.send("pve1", guests=guest(status="stopped", **own), pools=[offline])
    assert sim.alerts("pool-state")[0]["severity"] == "warning"
    assert [(row["severity"], row["because_of"]) for row in sim.alerts("guest-down")] == [("critical", None)]


def test_an_inactive_storage_is_critical_when_running_guests_use_it(sim):
    running = guest(volumes=[{"storage": "backup", "dataset": None}])
    for minute in (0, 10):
        sim.now = START + minute * MINUTE
        sim.send("pve1", guests=running, storages=storage(active=False))
    assert sim.alerts("storage-inactive")[0]["severity"] == "critical"


@pytest.mark.parametrize("task, expected", [
    ({"type": "qmshutdown", "vmid": 104}, False),
    ({"type": "qmshutdown", "vmid": 105}, True),  # of another guest
    ({"type": "stopall", "vmid": None}, False),
    ({"type": "qmigrate", "vmid": 104}, False),
    ({"type": "vncproxy", "vmid": 104}, True),
    ({"type": "qmshutdown", "vmid": 104, "result": "error"}, True),  # it has not stopped it
    ({"type": "qmclone", "vmid": 104}, True),  # stops nobody
    ({"type": "qmstop", "vmid": None}, True),  # of whom?
])
def test_a_task_explains_a_stopped_guest(sim, task, expected):
    sim.send("pve1", guests=guest())
    sim.now += 30
    sim.send("pve1", guests=guest(status="stopped"))
    sim.now += 30
    full = {"upid": "UPID:…", "started_at": sim.now - 40, "ended_at": sim.now - 31, "status": "OK", "result": "ok",
            **task}
    sim.send("pve1", guests=guest(status="stopped"), tasks=[full])
    sim.now += 5 * MINUTE
    sim.send("pve1", guests=guest(status="stopped"))
    assert bool(sim.alerts("guest-down")) is expected


def test_a_task_that_comes_with_the_backlog_explains_too(sim):
    sim.send("pve1", guests=guest())
    sim.now += 4 * MINUTE  # cut off meanwhile; the newest report comes first
    sim.send("pve1", guests=guest(status="stopped"))
    task = {"upid": "U", "type": "qmstop", "vmid": 104, "started_at": sim.now - 100, "ended_at": sim.now - 99,
            "result": "ok"}
    sim.send("pve1", at=sim.now - 90, run="older", tasks=[task])
    sim.now += 4 * MINUTE
    sim.send("pve1", guests=guest(status="stopped"))
    assert not sim.alerts("guest-down")


def test_a_backup_in_mode_stop_explains_only_while_it_runs(sim):
    sim.send("pve1", guests=guest())
    sim.now += 30
    task = {"upid": "U", "type": "vzdump", "vmid": None, "started_at": sim.now - 20, "ended_at": sim.now + 60,
            "result": "ok"}
    sim.send("pve1", guests=guest(status="stopped"), tasks=[task])
    sim.now += 150
    sim.send("pve1", guests=guest(status="stopped", lock="backup"))
    assert not sim.alerts("guest-down")
    for _ in range(3):
        sim.now += 2 * MINUTE
        sim.send("pve1", guests=guest(status="stopped"))
    assert sim.alerts("guest-down")  # it did not come back


def test_a_guest_that_should_start_with_the_host_and_does_not(sim):
    sim.send("pve1", node=node(uptime_seconds=120, boot_id="b2"), guests=guest(status="stopped", onboot=True))
    assert not sim.alerts("guest-down", "all")
    for minute in (9, 11, 14):
        sim.now = START + minute * MINUTE
        sim.send("pve1", node=node(uptime_seconds=120 + minute * 60, boot_id="b2"), guests=guest(status="stopped",
                                                                                                 onboot=True))
    assert "should start with the host" in sim.alerts("guest-down")[0]["message"]


def test_guests_are_given_ten_minutes_after_a_start(sim):
    sim.send("pve1", node=node(), guests=guest(onboot=True))
    for minute in range(3, 12):
        sim.now = START + minute * MINUTE
        sim.send("pve1", node=node(uptime_seconds=(minute - 2) * 60, boot_id="b2"),
                 guests=guest(status="stopped" if minute < 9 else "running", onboot=True))
    assert not sim.alerts("guest-down")


# --- backups and the schedules they follow ---


def backups(jobs, *runs):
    return {"jobs": jobs, "guests": list(runs)}


def good(vmid, ended):
    return {"vmid": vmid, "newest_ok": {"ended_at": ended, "duration_seconds": 60}}


def at_hour(hour, day=0):
    """A time of day on the wall of a host in UTC."""
    midnight = START - START % DAY
    return midnight + day * DAY + hour * HOUR


DAILY = {"id": "daily", "enabled": True, "schedule": "21:00", "guests": "all"}


def daily(now, **fields):
    """A job at 21:00 UTC with the times that an agent tells of it."""
    last = (now - 21 * HOUR) // DAY * DAY + 21 * HOUR
    return {**DAILY, "due_times": [last - back * DAY for back in range(7, -1, -1)], "next_run_at": last + DAY, **fields}


def judge_backups(sim, hours_late, *, last_day=0, **fields):
    """A daily job at 21:00, the last good run on `last_day`, judged so many hours after the run of the next day."""
    sim.now = at_hour(21, day=last_day + 1) + hours_late * HOUR
    sim.send("pve1", guests=guest(**fields), backups=backups([daily(sim.now)], good(104, at_hour(21, last_day) + 120)))
    return [row["severity"] for row in sim.alerts("backup-overdue")]


@pytest.mark.parametrize("hours, expected", [(-1, []), (1, []), (5.9, []), (6.1, ["warning"]), (29.9, ["warning"]),
                                             (30.1, ["critical"])])
def test_a_backup_is_due_by_its_jobs_schedule(sim, hours, expected):
    assert judge_backups(sim, hours) == expected
    late = server.host_row(sim.fleet, sim.fleet.find("pve1"), sim.now)["backups_worst"]
    assert (late > 0) is bool(expected)


@pytest.mark.parametrize("state, began, hours, late", [
    ("started", 0, 9, False), ("OK", 0, 9, True), ("started", -24, 9, True), ("started", 0, 25, True)])
def test_a_job_that_takes_all_night_is_not_late_while_it_runs(sim, state, began, hours, late):
    """Until its next run is due, and for a day at most: https://github.com/bit-team/backintime/issues/450."""
    sim.now = at_hour(21, day=1) + hours * HOUR
    job = {**daily(sim.now), "last_state": state, "last_run_at": at_hour(21, day=1) + began * HOUR + 2}
    sim.send("pve1", guests=guest(), backups=backups([job], good(104, at_hour(21) + 9 * HOUR)))
    assert bool(sim.alerts("backup-overdue")) is late


def test_templates_need_no_backup(sim):
    assert judge_backups(sim, 40, template=True) == []


def test_a_new_guest_is_due_at_the_first_run_it_has_lived_to_see(sim):
    sim.now = at_hour(10)
    for hour, expected in ((0, []), (11 + 5, []), (11 + 7, ["warning"])):
        sim.now = at_hour(10) + hour * HOUR
        sim.send("pve1", guests=guest(created_at=at_hour(9)), backups=backups([daily(sim.now)]))
        assert [row["severity"] for row in sim.alerts("backup-overdue")] == expected


def test_without_a_known_schedule_a_day_counts_if_it_was_ever_backed_up(sim):
    for age, expected in ((25, []), (27, ["warning"]), (51, ["critical"])):
        sim.send("pve1", guests=guest(), backups=backups([], good(104, sim.now - age * HOUR)))
        assert [row["severity"] for row in sim.alerts("backup-overdue")] == expected
        sim.now += 400


def test_a_backup_made_on_another_node_of_the_cluster_counts(sim):
    sim.host("pve2")
    cluster = {"name": "prod", "quorate": True, "members": [{"name": "pve1", "online": True}, {"name": "pve2",
                                                                                               "online": True}]}
    sim.now = at_hour(21, 1) + 10 * HOUR
    sim.send("pve2", cluster=cluster, guests=[], backups=backups([DAILY], good(104, at_hour(21, 1) + 60)))
    sim.send("pve1", cluster=cluster, guests=guest(), backups=backups([daily(sim.now)], good(104, at_hour(21, -9))))
    assert not sim.alerts("backup-overdue")


def test_a_failed_backup_warns_and_two_in_a_row_are_critical(sim):
    def run(failed, ok):
        sim.now += DAY
        fields = {"vmid": 104, "newest_failed": {"ended_at": sim.now - failed, "error": "job errors"}}
        if ok:
            fields["newest_ok"] = {"ended_at": sim.now - ok}
        sim.send("pve1", guests=guest(), backups=backups([], fields))
        return [row["severity"] for row in sim.alerts("backup-failed")]

    assert run(HOUR, 2 * HOUR) == ["warning"]
    assert run(HOUR, 26 * HOUR) == ["critical"]
    assert run(25 * HOUR, HOUR) == []


@pytest.mark.parametrize("kept, excluded, expected", [
    (["scsi0", "scsi1"], [], []), (["scsi0", "scsi1"], ["scsi1"], ["info"]), (["scsi0"], ["scsi0"], ["warning"]),
    (["scsi0"], [{"a": 1}], ["info"]), (["scsi0"], ["scsi0", []], ["warning"]),
])
def test_a_backup_without_the_disks_is_no_backup(sim, kept, excluded, expected):
    """qemu-server's VZDump: `exclude disk 'scsi0' (backup=no)`, `backup contains no disks`."""
    run = {"vmid": 104, "newest_ok": {"ended_at": sim.now - HOUR, "excluded_disks": excluded, "size_bytes": 2048}}
    sim.send("pve1", guests=guest(volumes=[{"name": name, "storage": "s"} for name in kept]), backups=backups([], run))
    assert [row["severity"] for row in sim.alerts("backup-excludes")] == expected


def test_a_job_that_fails_is_one_alert_and_its_guests_follow(sim):
    """PVE::VZDump: `could not activate storage`; the job's state file has the reason."""
    failed = [{"vmid": vmid, "newest_failed": {"ended_at": sim.now - 60, "error": "x"}} for vmid in (104, 105)]
    jobs = [{"id": "all", "enabled": True, "guests": "all", "last_state": "job errors", "last_run_at": sim.now - 90}]
    sim.send("pve1", guests=[*guest(), *guest(vmid=105)], backups=backups(jobs, *failed))
    cause, = sim.alerts("backup-job")
    assert cause["object"] == "backups/all"
    assert {row["because_of"] for row in sim.alerts("backup-failed")} == {cause["id"]}


def test_another_guest_with_the_same_vmid_starts_anew(sim):
    """PVE proposes the lowest free id: https://github.com/bpg/terraform-provider-proxmox/issues/2925"""
    old = good(104, sim.now - 30 * DAY)
    old["newest_failed"] = {"ended_at": sim.now - 20 * DAY, "error": "x"}
    sim.send("pve1", guests=guest(created_at=1), backups=backups([daily(sim.now)], old))
    assert {row["rule"] for row in sim.alerts()} == {"backup-overdue", "backup-failed"}
    sim.now += 300
    sim.send("pve1", guests=guest(created_at=sim.now - 60, status="stopped"), backups=backups([daily(sim.now)], old))
    sim.now += 300
    sim.send("pve1", guests=guest(created_at=sim.now - 360, status="stopped"))
    assert not sim.alerts()


def test_another_schedule_makes_nothing_late(sim):
    weekly = {**DAILY, "schedule": "sat 21:00", "due_times": [sim.now - 5 * DAY], "next_run_at": sim.now + 2 * DAY}
    ran = good(104, sim.now - 5 * DAY + 60)
    sim.send("pve1", guests=guest(), backups=backups([weekly], ran))
    sim.now += 2 * HOUR
    sim.send("pve1", guests=guest(), backups=backups([daily(sim.now)], ran))
    assert not sim.alerts("backup-overdue")
    for day, expected in ((0, ["warning"]), (1, ["critical"])):
        sim.now = at_hour(21, day=day) + 10 * HOUR
        sim.send("pve1", guests=guest(), backups=backups([daily(sim.now)], ran))
        assert [row["severity"] for row in sim.alerts("backup-overdue")] == expected


def test_guests_in_no_job_are_one_list_per_host(sim):
    guests = [{"vmid": vmid, "name": f"g{vmid}", "status": "stopped"} for vmid in (100, 101, 102, 103)]
    guests[3]["tags"] = "no-backup"
    jobs = [{**DAILY, "guests": [100]}, {**DAILY, "id": "off", "enabled": False, "guests": "all"}]
    for hours in (0, 1):
        sim.now = START + hours * HOUR
        sim.send("pve1", guests=guests, backups=backups(jobs))
    alert, = sim.alerts("backup-missing")
    assert alert["object"] is None and "2 guests are" in alert["message"] and "101 (g101)" in alert["message"]


def test_a_pool_job_whose_members_are_not_told_accuses_nobody(sim):
    jobs = [{"id": "p", "enabled": True, "schedule": "21:00", "pool": "prod", "guests": []}]
    for hours in (0, 2):
        sim.now = START + hours * HOUR
        sim.send("pve1", guests=guest(), backups=backups(jobs))
    assert not sim.alerts("backup-missing", "all")


# --- clusters, sites, silence ---


def cluster_of(*names, quorate=True, online=None, votes=None, **fields):
    online = names if online is None else online
    return {"name": "prod", "quorate": quorate, "votes_expected": len(names), "votes_present": votes or len(online),
            "votes_needed": len(names) // 2 + 1,
            "members": [{"name": name, "online": name in online} for name in names], **fields}


@pytest.fixture
def trio(sim):
    sim.host("pve2")
    sim.host("pve3")
    return sim


def everywhere(sim, **views):
    """Each node tells its view, every 30 s, for a while; then the states of the rules of the cluster."""
    for name, (cluster, fields) in views.items():
        sim.send(name, cluster=cluster, **fields)
    sim.turn()


def for_minutes(sim, minutes, **views):
    for _ in range(int(minutes * 2)):
        everywhere(sim, **views)
        sim.now += 30
    sim.turn()


NODES = ("pve1", "pve2", "pve3")


def test_lost_quorum_is_one_alert_for_the_cluster_after_a_minute(trio):
    views = {name: (cluster_of(*NODES, quorate=False, online=(name,)), {}) for name in NODES}
    views = {name: (cluster_of(*NODES, quorate=False, online=("pve1",)), {}) for name in NODES}
    for_minutes(trio, .5, **views)
    assert not trio.alerts("cluster-quorum")
    for_minutes(trio, 1, **views)
    alert, = trio.alerts("cluster-quorum")
    assert (alert["host"], alert["object"], alert["severity"]) == (None, "clusters/prod", "critical")
    assert trio.fleet.verdict(trio.fleet.find("pve2"), trio.now)[0] == "critical"
    for_minutes(trio, .5, **{name: (cluster_of(*NODES), {}) for name in NODES})
    assert not trio.alerts("cluster-quorum")


def test_nodes_that_disagree_are_an_alert_of_their_own(trio):
    views = {"pve1": (cluster_of(*NODES), {}), "pve2": (cluster_of(*NODES), {}),
             "pve3": (cluster_of(*NODES, quorate=False, online=("pve3",)), {})}
    for_minutes(trio, 2, **views)
    assert len(trio.alerts("cluster-disagree")) == 1
    assert not trio.alerts("cluster-quorum")


def test_a_missing_member_warns_after_five_minutes_unless_it_is_known_to_be_offline(trio):
    two = {name: (cluster_of(*NODES, online=("pve1", "pve2")), {}) for name in ("pve1", "pve2")}
    for_minutes(trio, 6, **two)  # pve3 never reported here: nothing else tells
    assert [row["severity"] for row in trio.alerts("cluster-member")] == ["warning"]
    assert [row["severity"] for row in trio.alerts("cluster-margin")] == ["info"]


def test_a_missing_member_is_the_offline_hosts_alert(trio):
    for_minutes(trio, 1, **{name: (cluster_of(*NODES), {}) for name in NODES})
    for_minutes(trio, 12, **{name: (cluster_of(*NODES, online=("pve1", "pve2")), {}) for name in ("pve1", "pve2")})
    assert [row["host"] for row in trio.alerts("host-offline")] == ["pve3"]
    assert not trio.alerts("cluster-member")


def test_clocks_of_a_cluster_that_drift_apart(trio):
    views = {name: (cluster_of(*NODES), {"time_sync": {"synchronised": True, "offset_seconds": offset}})
             for name, offset in zip(NODES, (0.0, 0.3, -0.4), strict=True)}
    for_minutes(trio, 6, **views)
    assert trio.alerts("cluster-clock")[0]["value"] == pytest.approx(.7)


def test_a_shared_storage_is_full_once(trio):
    views = {name: (cluster_of(*NODES), {"storages": storage(used_bytes=90, shared=True)}) for name in NODES}
    for_minutes(trio, 11, **views)
    assert [row["object"] for row in trio.alerts("cluster-storage-full")] == ["clusters/prod/storages/backup"]
    assert not trio.alerts("storage-full")


def test_an_ha_service_in_error_is_one_alert(trio):
    ha = {"ha": {"services": [{"id": "vm:104", "node": "pve2", "state": "error"}]}}
    for_minutes(trio, 1, **{name: (cluster_of(*NODES), ha) for name in NODES})
    assert [row["severity"] for row in trio.alerts("ha-service")] == ["critical"]


@pytest.mark.parametrize("ha, rule, minutes, expected", [
    ({"services": [{"id": "vm:104", "node": "pve2", "state": "recovery"}]}, "ha-service", 3, ["warning"]),
    ({"services": [], "disarm": {"mode": "ignore", "state": "disarmed"}}, "ha-disarmed", 2, ["warning"]),
    ({"services": [], "nodes": [{"name": "pve2", "state": "fence"}]}, "ha-node", 1, ["critical"]),
    ({"services": [], "nodes": [{"name": "pve2", "state": "unknown"}]}, "ha-node", 6, ["warning"]),
    ({"services": [], "nodes": [{"name": "pve2", "state": "maintenance"}]}, "ha-node", 6, ["info"]),
    ({"services": [], "nodes": [{"name": "pve2", "state": "online"}], "disarm": None}, "ha-node", 6, []),
])
def test_what_ha_tells_is_judged_once_a_cluster(trio, ha, rule, minutes, expected):
    for_minutes(trio, minutes, **{name: (cluster_of(*NODES), {"ha": ha}) for name in NODES})
    assert [row["severity"] for row in trio.alerts(rule)] == expected
    for_minutes(trio, .5, **{name: (cluster_of(*NODES), {"ha": {"services": [], "nodes": []}}) for name in NODES})
    assert not trio.alerts(rule)


def test_ceph_is_told_once_a_cluster(trio):
    """https://docs.ceph.com/en/latest/rados/operations/health-checks/#osd-full"""
    for_minutes(trio, 1, **{name: (cluster_of(*NODES), {"ceph": ceph("HEALTH_ERR")}) for name in NODES})
    alert, = trio.alerts()
    assert (alert["rule"], alert["object"], alert["severity"]) == ("cluster-ceph", "clusters/prod", "critical")
    assert "1 full osd(s)" in alert["message"]


def test_two_clusters_of_one_name_are_two(trio):
    trio.host("other")
    for_minutes(trio, 2, pve1=(cluster_of("pve1", "pve2", quorate=False, online=("pve1",)), {}),
                other=(cluster_of("other", "x", online=("other", "x")), {}))
    assert [row["object"] for row in trio.alerts("cluster-quorum")] == ["clusters/prod (pve1)"]


def test_host_offline_after_five_minutes_and_over_after_two_reports(sim):
    sim.send("pve1", node=node())
    sim.wait(295)
    assert not sim.alerts("host-offline", "all")
    sim.wait(10)
    assert sim.alerts("host-offline")[0]["severity"] == "critical"
    sim.send("pve1", node=node())
    assert sim.alerts("host-offline")
    sim.now += 30
    sim.send("pve1", node=node())
    assert not sim.alerts("host-offline")


def test_a_restart_of_the_server_gives_hosts_their_time_anew(sim):
    sim.send("pve1", node=node())
    sim.now += HOUR
    sim.restart()
    sim.wait(295)
    assert not sim.alerts("host-offline", "all")
    sim.wait(10)
    assert sim.alerts("host-offline")


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_a_suspended_server_or_a_clock_that_jumps_raises_no_storm(sim, jump):
    sim.send("pve1", node=node())
    sim.wait(30)
    sim.now += jump
    sim.turn()
    sim.wait(200)
    assert not sim.alerts("host-offline", "all")


def test_a_host_that_dies_after_the_servers_clock_was_set_back_is_noticed(sim):
    sim.send("pve1", node=node())
    sim.wait(30)
    sim.now -= HOUR
    sim.turn()
    sim.wait(310)
    assert sim.alerts("host-offline")


def fleet_of(sim, count, site="par"):
    for number in range(count):
        sim.host(f"h{number}", site=site)
    for number in range(count):
        sim.send(f"h{number}", node=node())


def test_a_site_that_falls_silent_is_one_alert(sim):
    fleet_of(sim, 10)
    sim.wait(250)
    for number in range(6):
        sim.send(f"h{number}", node=node())
    sim.wait(60)  # h6 … h9: 4 of 10 are not enough
    assert not sim.alerts("site-offline") and len(sim.alerts("host-offline")) == 4
    sim.wait(260)
    site, = sim.alerts("site-offline")
    assert site["object"] == "sites/par" and "6 hosts" in site["message"]
    assert sum(row["because_of"] == site["id"] for row in sim.alerts("host-offline")) == 6


# --- the agent and its reports ---


@pytest.mark.parametrize("rule, object, words", [
    ("pool-state", "pools/tank", "zpool status -v tank;"), ("pool-state", "pools/a b/mirror-0", "zpool status -v 'a b';"),
    ("pool-state", "pools/t\u00e4nk", "zpool status -v POOL;"), ("pool-state", None, "zpool status -v POOL;"),
    ("unit-failed", "services/zfs-mount", "systemctl status zfs-mount; journalctl -u zfs-mount;")])
def test_what_to_do_names_the_object(sim, rule, object, words):
    sim.send("pve1", node=node())
    assert words in server.todo_of(sim.fleet.find("pve1"), rule, object)


@pytest.mark.parametrize("told, words", [
    ("timeout: smartctl -j -i -H -A -n standby,3 /dev/sdc: no answer in 30 s", "no answer in 30 s"),
    ("command 'zfs send -Rpv -I a -- b@c' failed: exit code 1", "exit code 1"),
    ("smartctl: Unknown USB bridge [0x152d:0x0578 (0x508)]", "smartctl: Unknown USB bridge [0x152d:0x0578 (0x508)]"),
    ("ssh: connect to host pve-away: No route to host", "ssh: connect to host pve-away: No route to host"),
    ("zfs list -H", "zfs list -H"), ("", "")])
def test_an_alert_repeats_no_command_line(told, words):
    assert server.without_command(told) == words


def test_a_section_that_fails_in_three_of_its_ticks(sim):
    for _ in range(3):
        assert not sim.alerts("section-failing")
        sim.now += 300
        sim.send("pve1", errors={"pools": {"code": "timeout", "detail": "zpool status: no answer in 20 s"}})
    alert, = sim.alerts("section-failing")
    assert alert["object"] == "sections/pools"
    assert alert["message"] == "The agent cannot collect the pools: no answer in time."
    todo = server.todo_of(sim.fleet.find("pve1"), "section-failing", "sections/pools")
    assert todo.endswith("It was told: zpool status: no answer in 20 s") and "--explain" in todo
    sim.now += 30
    sim.send("pve1", node=node())  # a report without that section says nothing about it
    assert sim.alerts("section-failing")
    sim.send("pve1", pools=pool())
    assert not sim.alerts("section-failing")


def test_dropped_reports_are_told_for_a_day(sim):
    sim.send("pve1", agent={"dropped": 0})
    sim.now += 30
    sim.send("pve1", agent={"dropped": 7})
    assert sim.alerts("spool-dropped")[0]["value"] == 7
    sim.now += DAY
    sim.send("pve1", agent={"dropped": 7})
    assert not sim.alerts("spool-dropped")


def test_an_old_agent_is_worth_a_word(sim, monkeypatch):
    monkeypatch.setattr(server, "VERSION", "0.9.0")
    sim.send("pve1", agent={"version": "0.7.1"})
    assert not sim.alerts("agent-old")
    sim.now += 30
    sim.send("pve1", agent={"version": "0.6.3"})
    assert [row["severity"] for row in sim.alerts("agent-old")] == ["info"]


@pytest.mark.parametrize("offset, expected", [(20, []), (40, ["warning"]), (-130, ["critical"])])
def test_a_clock_that_is_off_in_three_reports(sim, offset, expected):
    for _ in range(3):
        assert not sim.alerts("clock-skew")
        sim.now += 30
        sim.send("pve1", agent={"clock_offset": offset}, node=node())
    assert [row["severity"] for row in sim.alerts("clock-skew")] == expected
    sim.now += 30
    sim.send("pve1", agent={"clock_offset": 0}, node=node())
    assert not sim.alerts("clock-skew")


def test_the_servers_own_certificate(sim):
    for left, expected in ((30 * DAY, []), (20 * DAY, ["warning"]), (4 * DAY, ["critical"]), (None, ["critical"]),
                           (80 * DAY, [])):
        sim.fleet.certificate_ends_at = None if left is None else sim.now + left
        sim.turn()
        assert [row["severity"] for row in sim.alerts("server-certificate")] == expected


def test_two_machines_under_one_name(sim):
    for _ in range(3):
        for run in ("one", "two"):
            sim.now += 10
            sim.send("pve1", run=run, node=node())
    assert sim.alerts("host-twice")[0]["severity"] == "critical"


def test_a_restarted_agent_that_delivers_its_spool_is_one_machine(sim):
    sim.send("pve1", run="one", node=node())
    sim.now += 60
    sim.send("pve1", run="two", node=node())
    sim.send("pve1", run="one", at=sim.now - 30, node=node())
    assert not sim.alerts("host-twice")


# --- backlog, unknown, restart ---


def test_a_backlog_raises_nothing_that_is_over_and_is_put_on_record(sim):
    sim.now += 3 * HOUR
    sim.send("pve1", node=node(), pool_states=pool())
    for minutes, state in ((-120, "ONLINE"), (-110, "DEGRADED"), (-100, "DEGRADED"), (-90, "ONLINE")):
        sim.send("pve1", at=sim.now + minutes * MINUTE, run="older", pool_states=pool(state=state))
    assert not sim.alerts("pool-state", "all") and not sim.told()
    fired, = sim.events("alert-past-fired")
    over, = sim.events("alert-past-over")
    assert "DEGRADED" in fired["message"] and over["at"] - fired["at"] == 20 * MINUTE
    state = sim.fleet.find("pve1")
    sim.wait(50 * MINUTE, step=30)
    assert state.past is not None  # more of the backlog may come
    sim.wait(20 * MINUTE, step=30)
    assert state.past is None  # a second state of every host would be a lot of memory


def test_old_numbers_are_history_not_news(sim):
    sim.send("pve1", node=node(), pool_states=pool())
    sim.now += HOUR
    for minutes in (-55, -30, -15):
        sim.send("pve1", at=sim.now + minutes * MINUTE, node=node(cpu_ratio=.99, memory_free_ratio=.01))
    assert not sim.alerts(state="all")


def test_alerts_survive_a_restart(sim):
    sim.send("pve1", pool_states=pool(state="DEGRADED"))
    before, = sim.alerts()
    sim.restart()
    sim.send("pve1", pool_states=pool(state="DEGRADED"))
    after, = sim.alerts()
    assert (after["id"], after["since"]) == (before["id"], before["since"])


def test_alerts_follow_a_renamed_host(sim):
    sim.send("pve1", pool_states=pool(state="DEGRADED"))
    before, = sim.alerts()
    sim.write(lambda db: server.update_host(db, "pve1", {"name": "paris-1"}, sim.now))
    sim.send("paris-1", pool_states=pool(state="DEGRADED"))
    after, = sim.alerts()
    assert (after["id"], after["host"]) == (before["id"], "paris-1")


# --- what people decide ---


def test_an_acknowledged_alert_colours_nothing_until_it_gets_worse(sim):
    full = mirror(leaf(read_errors=1), leaf("sdb"))
    sim.send("pve1", pools=full)
    alert, = sim.alerts("vdev-errors")
    sim.write(lambda db: server.acknowledge(db, sim.fleet, alert["id"], sim.now, by="ann", until=None, note="ordered"))
    assert sim.fleet.verdict(sim.fleet.find("pve1"), sim.now)[0] == "ok"
    assert server.build_overview(sim.fleet, sim.now)["problems"] == {"critical": 0, "warning": 0}
    shown, = sim.alerts("vdev-errors")
    assert shown["acknowledged"] == {"at": sim.now, "by": "ann", "until": None, "note": "ordered"}
    sim.restart()
    sim.now += 300
    sim.send("pve1", pools=mirror(leaf(read_errors=1), leaf("sdb")))
    assert sim.alerts("vdev-errors")[0]["acknowledged"]
    sim.now += 300
    sim.send("pve1", pools=mirror(leaf(read_errors=40), leaf("sdb")))
    worse, = sim.alerts("vdev-errors")
    assert worse["severity"] == "critical" and worse["acknowledged"] is None
    assert sim.fleet.verdict(sim.fleet.find("pve1"), sim.now)[0] == "critical"


def test_another_lost_disk_ends_the_acknowledgement_of_a_degraded_pool(sim):
    for margin, acknowledged in ((1, True), (1, True), (0, False)):
        sim.send("pve1", pool_states=pool(state="DEGRADED"), pools=pool(state="DEGRADED", redundancy_margin=margin))
        alert, = sim.alerts("pool-state")
        assert bool(alert["acknowledged"]) is (acknowledged and sim.now > START)
        if sim.now == START:
            sim.write(lambda db, id=alert["id"]: server.acknowledge(db, sim.fleet, id, sim.now, by="a", until=None,
                                                                    note=None))
        sim.now += 30


def test_an_acknowledgement_ends_at_its_time(sim):
    sim.send("pve1", pool_states=pool(state="DEGRADED"))
    alert, = sim.alerts()
    sim.write(lambda db: server.acknowledge(db, sim.fleet, alert["id"], sim.now, by="a", until=sim.now + 60, note=None))
    sim.wait(55)
    assert sim.alerts("pool-state")[0]["acknowledged"]
    sim.wait(10)
    assert sim.alerts("pool-state")[0]["acknowledged"] is None


@pytest.mark.parametrize("rule, first, then", [
    ("vdev-errors", {"pools": mirror(leaf(), leaf("sdb"))}, {"pools": mirror(leaf(checksum_errors=4), leaf("sdb"))}),
    ("smart-growth", {"disks": disk(pending_sectors=0)}, {"disks": disk(pending_sectors=8)}),
    ("smart-crc", {"disks": disk(crc_errors=0)}, {"disks": disk(crc_errors=8)}),
    ("pool-vanished", {"pool_states": pool()}, {"pool_states": []}),
    ("disk-gone", {"disks": disk(pool="tank")}, {"disks": []}),
    ("spool-dropped", {"agent": {"dropped": 0}}, {"agent": {"dropped": 3}}),
])
def test_accept_as_normal_makes_it_the_baseline(sim, rule, first, then):
    sim.send("pve1", **copy.deepcopy(first))
    sim.now += 300
    sim.send("pve1", **copy.deepcopy(then))
    alert, = sim.alerts(rule)
    sim.write(lambda db: server.accept_as_normal(db, sim.fleet, alert["id"], sim.now, by="ann"))
    assert not sim.alerts(rule)
    sim.restart()
    sim.now += 300
    sim.send("pve1", **copy.deepcopy(then))
    assert not sim.alerts(rule)


def test_accept_refuses_a_rule_without_a_baseline(sim):
    sim.send("pve1", pool_states=pool(state="DEGRADED"))
    alert, = sim.alerts()
    with pytest.raises(server.Problem) as refused:
        sim.write(lambda db: server.accept_as_normal(db, sim.fleet, alert["id"], sim.now, by="a"))
    assert refused.value.code == "conflict"


# --- causes ---


def test_guests_and_storages_of_a_broken_pool_follow_from_it(sim):
    own = {"volumes": [{"storage": "local-zfs", "dataset": "tank/vm-104-disk-0"}]}
    sim.send("pve1", guests=guest(**own), pool_states=pool(), storages=[])
    for minute in range(1, 15):
        sim.now = START + minute * MINUTE
        sim.send("pve1", guests=guest(status="stopped", **own), pool_states=pool(state="SUSPENDED"),
                 storages=storage(storage="local-zfs", active=False, dataset="tank"))
    cause, = sim.alerts("pool-state")
    assert sim.alerts("guest-down")[0]["because_of"] == cause["id"]
    assert sim.alerts("storage-inactive")[0]["because_of"] == cause["id"]


def test_replication_to_an_offline_host_follows_from_it(sim):
    sim.host("pve2")
    sim.send("pve2", node=node())
    sim.wait(400)
    sim.send("pve1", replication=replication(fail_count=4)(sim.now))
    cause, = sim.alerts("host-offline")
    assert sim.alerts("replication")[0]["because_of"] == cause["id"]


# --- layers ---


LAYERS = """
[rules.pool-capacity]
warn = 0.5
[tags.test.rules.pool-capacity]
warn = 0.6
[hosts.pve1.rules.pool-capacity]
warn = 0.7
[hosts.pve1.objects."pools/scratch".rules.pool-capacity]
enabled = false
[rules.cpu]
enabled = false
"""


@pytest.mark.parametrize("name, tags, object, warn, layer", [
    ("pve9", [], "", .5, "fleet"), ("pve9", ["Test"], "", .6, "tag test"), ("pve1", ["test"], "", .7, "host"),
    ("pve1", [], "pools/scratch", .7, "object"),
])
def test_the_nearest_layer_decides_and_is_named(tmp_path, name, tags, object, warn, layer):
    sim = Simulation(tmp_path, LAYERS)
    sim.host(name, tags=tags)
    sim.send(name, node=node())
    row = server.rule_row(sim.fleet, sim.fleet.find(name), server.RULE["pool-capacity"], object)
    assert (row["warn"], row["layer"], row["enabled"]) == (warn, layer, object == "")
    sim.close()


def test_a_message_names_the_threshold_that_was_set_for_its_object(tmp_path):
    sim = Simulation(tmp_path, '[objects."pools/tank".rules.pool-capacity]\nwarn = 0.3\n')
    sim.host("pve1")
    for _ in range(2):
        sim.send("pve1", pools=[{"name": "tank", "capacity_ratio": .5}])
        sim.wait(16 * MINUTE)
    host = sim.fleet.find("pve1")
    body = server.notification_body(sim.fleet, host, host.alerts["pool-capacity", "pools/tank"], "firing", sim.now)
    assert body["threshold"] == "0.3/0.9, set for object"
    sim.close()


def test_a_rule_that_is_switched_off_says_nothing(tmp_path):
    sim = Simulation(tmp_path, LAYERS)
    sim.host("pve1")
    for minute in (0, 30, 60):
        sim.now = START + minute * MINUTE
        sim.send("pve1", node=node(cpu_ratio=1),
                 pools=[{"name": "scratch", "capacity_ratio": .95}, {"name": "t", "capacity_ratio": .75}])
    assert [row["object"] for row in sim.alerts()] == ["pools/t"]
    sim.close()


# --- noise and cost ---


def healthy(index, rng):
    """A host as it is on a good day: values jitter, counters grow, nothing is wrong."""
    guests = [{"vmid": 100 + n, "type": "qemu", "name": f"g{n}", "status": "running", "template": False,
               "cpu_ratio": rng.random(),
               "memory_used_bytes": rng.randrange(1 << 32), "volumes": [{"storage": "local-zfs",
                                                                         "dataset": f"rpool/vm-{n}"}]}
              for n in range(8)]
    burst = rng.random() < .08 and index % 2 == 0  # a busy moment now and then, never two in a row
    return {"node": node(cpu_ratio=.99 if burst else rng.uniform(.1, .7), memory_free_ratio=.04 if burst
                         else rng.uniform(.15, .6),
                         pressure_io_full_avg300_ratio=.5 if burst else rng.uniform(0, .1), oom_kills_total=2,
                         pressure_memory_full_avg300_ratio=0, root_used_bytes=40, root_available_bytes=60),
            "guests": guests, "pool_states": [{"name": "rpool", "guid": "1", "state": "ONLINE"}],
            "storages": storage(used_bytes=60 + 26 * burst) + storage(storage="local-zfs", type="zfspool",
                                                                      dataset="rpool"),
            "cluster": cluster_of("a", "b", "c"), "agent": {"clock_offset": rng.uniform(-2, 40 if burst else 2),
                                                            "dropped": 0}}


def test_a_day_of_200_healthy_noisy_hosts_notifies_nobody(tmp_path):
    import random
    channel = '[[channels]]\nname = "hook"\nkind = "slack"\nurl = "http://127.0.0.1:9/"\n'
    sim = Simulation(tmp_path, channel)
    rng = random.Random(6)
    sim.packed = b"-"
    for number in range(200):
        sim.host(f"h{number}", site=f"s{number % 4}")
    day = 24 * HOUR
    step = 240

    def play(db):
        for moment in range(0, day, step):
            for number in range(200):
                sim.now = START + moment + number * 0.2
                sim.insert(db, f"h{number}", [sim.envelope(f"h{number}", **healthy(moment // step, rng))])
            server.judge_fleet(sim.monitor, sim.now, db)
            sim.monitor.looked_at = sim.now + step  # the job runs each 5 s; here it is called once a round

    import unittest.mock
    with unittest.mock.patch.object(server, "insert_report", lambda *_: 1), \
            unittest.mock.patch.object(server, "write_state", lambda *_: None):
        sim.write(play)
    assert sim.told() == []
    assert not [row for row in sim.alerts() if row["severity"] != "info"]
    sim.close()


def test_judging_a_report_is_cheap(sim):
    """30 guests, nothing changed: the budget is 100 µs; the bound here is loose, for a busy machine."""
    guests = [{"vmid": n, "type": "qemu", "name": f"g{n}", "status": "running", "volumes": []} for n in range(100, 130)]
    fields = {"node": node(cpu_ratio=.2, memory_free_ratio=.5, root_used_bytes=1, root_available_bytes=9),
              "guests": guests,
              "pool_states": pool(), "storages": storage() * 3, "agent": {"clock_offset": 0.01, "dropped": 0}}
    sim.send("pve1", **fields)
    state = sim.fleet.find("pve1")

    def work(db):
        best = 1.0
        for _ in range(5):
            begun = time.thread_time()
            for _ in range(200):
                server.judge_host(db, sim.fleet, state, sim.now, fields.keys())
            best = min(best, (time.thread_time() - begun) / 200)
        return best

    seconds = sim.write(work)
    print(f"judge_host: {seconds * 1e6:.0f} µs")
    assert seconds < 400e-6


def test_the_documentation_has_every_rule_channel_and_setting():
    page = (Path(server.__file__).parent / "docs" / "alerts.md").read_text()
    for rule in server.RULES:
        assert f"| `{rule.name}`" in page and rule.why in page, rule.name
    for kind, needs in server.KINDS.items():
        assert f"`{kind}`" in page
        assert all(f"`{key}`" in page for key in needs.options), kind
    for key in (*server.LIMITS_FIELDS, *server.CHANNEL_FIELDS):
        assert key.removesuffix("?") in page, key
