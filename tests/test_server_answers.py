"""What an operator would otherwise work out by hand: each answer right, rightly silent, and unknown where data are
missing.

    copies -> margins -> blast radius -> silent failures -> drift -> space traps -> chronicle -> forecasts
        -> snapshots and scrubs -> what changed before -> rules -> lists of the API
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Client
from simulation import START, Simulation

import server

HOUR, DAY, GIB = 3600, 86400, 1 << 30


@pytest.fixture
def sim(tmp_path: Path) -> Iterator[Simulation]:
    simulation = Simulation(tmp_path)
    yield simulation
    simulation.close()


def state(sim: Simulation, name: str = "pve1", **sections: Any) -> server.HostState:
    """A host that has reported these sections; everything not named is told absent."""
    if name not in [host.name for host in sim.fleet.hosts.values()]:
        sim.host(name)
    usual = {"guests": [guest()], "backups": {"jobs": [], "guests": []}, "snapshots": [], "storages": STORAGES}
    body = {key: value for key, value in {**usual, **sections}.items() if value is not None}
    sim.send(name, tick="slow", **body)
    return sim.fleet.find(name)


def guest(vmid: int = 104, **fields: Any) -> dict[str, Any]:
    return {"vmid": vmid, "type": "qemu", "name": f"vm{vmid}", "status": "running", "created_at": START - 90 * DAY,
            "volumes": [{"storage": "local-zfs", "dataset": f"rpool/data/vm-{vmid}-disk-0"}], **fields}


STORAGES = [
    {"storage": "local", "type": "dir", "shared": False, "content": "backup"},
    {"storage": "local-zfs", "type": "zfspool", "dataset": "rpool/data", "shared": False},
    {"storage": "pbs", "type": "pbs", "content": "backup", "shared": True, "server": "192.0.2.9"},
    {"storage": "own-nfs", "type": "nfs", "content": "backup", "shared": True, "server": "192.0.2.1"},
    {"storage": "san", "type": "dir", "content": "backup", "shared": True},
]


def backup(storage: str, age: float, vmid: int = 104) -> dict[str, Any]:
    good = {"ended_at": START - age, "duration_seconds": 600, "storage": storage}
    return {"jobs": [], "guests": [{"vmid": vmid, "newest_ok": good}]}


def snapshot(guid: str, age: float, dataset: str = "rpool/data/vm-104-disk-0", **fields: Any) -> dict[str, Any]:
    return {"dataset": dataset, "class": "autosnap_hourly", "count": 24, "newest_guid": guid, "newest_at": START - age,
            "oldest_at": START - 10 * DAY, **fields}


def risk(sim: Simulation, host: server.HostState) -> dict[str, Any]:
    index = server.SnapshotIndex(sim.fleet.hosts.values())
    return next(iter(server.copy_rows(host, index, START)))


# copies: if this host burned now


@pytest.mark.parametrize(("storage", "verdict", "word"), [
    ("pbs", "ok", "26 h of work"),
    ("san", "ok", "backup on san"),          # a dir that PVE calls shared is mounted from somewhere
    ("local", "warning", "same host"),
    ("own-nfs", "warning", "same host"),     # this host is its own NFS server
    ("local-zfs", "warning", "same pool"),
])
def test_a_backup_counts_where_it_survives_the_host(sim: Simulation, storage: str, verdict: str, word: str) -> None:
    members = [{"name": "pve1", "address": "192.0.2.1", "online": True}]
    host = state(sim, backups=backup(storage, 26 * HOUR - 600), cluster={"name": "c", "members": members})
    row = risk(sim, host)
    assert (row["verdict"], word in row["reason"]) == (verdict, True), row


def test_a_backup_began_before_it_ended(sim: Simulation) -> None:
    row = risk(sim, state(sim, backups=backup("pbs", HOUR)))
    assert row["lost_seconds"] == pytest.approx(HOUR + 600)


def test_a_backup_of_the_guest_that_had_the_number_before_is_no_copy(sim: Simulation) -> None:
    row = risk(sim, state(sim, guests=[guest(created_at=START - HOUR)], backups=backup("pbs", DAY)))
    assert row["verdict"] == "warning"


def test_a_snapshot_of_the_same_guid_on_another_host_is_a_copy(sim: Simulation) -> None:
    state(sim, "pve2", guests=[], snapshots=[snapshot("777", HOUR, "tank/copies/vm-104-disk-0")])
    row = risk(sim, state(sim, snapshots=[snapshot("777", HOUR)]))
    assert (row["copy_kind"], row["copy_where"], row["sure"], row["lost_seconds"]) == ("snapshot", "pve2", True, HOUR)


def test_an_older_snapshot_elsewhere_is_a_likely_copy(sim: Simulation) -> None:
    state(sim, "pve2", guests=[], snapshots=[snapshot("111", 20 * HOUR, "tank/copies/vm-104-disk-0")])
    row = risk(sim, state(sim, snapshots=[snapshot("777", HOUR)]))
    assert (row["verdict"], row["sure"]) == ("ok", False) and "by its name" in row["reason"]


def test_a_snapshot_of_another_guest_with_the_same_number_is_none(sim: Simulation) -> None:
    state(sim, "pve2", guests=[], snapshots=[snapshot("111", 400 * DAY, "rpool/data/vm-104-disk-0")])
    assert risk(sim, state(sim, snapshots=[snapshot("777", HOUR)]))["verdict"] == "warning"


def test_snapshots_of_a_host_that_runs_a_guest_of_that_number_are_its_own(sim: Simulation) -> None:
    """Hosts that know nothing of each other number their guests alike, and snapshot them at the same hours."""
    state(sim, "pve2", snapshots=[snapshot("111", 20 * HOUR)])
    assert risk(sim, state(sim, snapshots=[snapshot("777", HOUR)]))["verdict"] == "warning"


def test_the_fleet_is_summed_up_and_says_what_it_went_by(sim: Simulation) -> None:
    state(sim, guests=[guest(101), guest(102)], backups=backup("pbs", HOUR, 101))
    status, told = asked(sim, "/api/v1/copies")
    assert status == 200 and told["summary"] == "1 of 2 guests have no copy outside their own host."
    assert [row["vmid"] for row in told["items"]] == [102, 101] and "guid" in told["basis"]
    assert "basis" not in asked(sim, "/api/v1/guests?limit=1")[1]
    assert all(resource.basis for resource in server.RESOURCES.values() if resource.title)


def test_all_volumes_must_have_a_copy_and_the_oldest_counts(sim: Simulation) -> None:
    two = [{"storage": "local-zfs", "dataset": f"rpool/data/vm-104-disk-{number}"} for number in (0, 1)]
    own = [snapshot("1", HOUR), snapshot("2", HOUR, "rpool/data/vm-104-disk-1")]
    state(sim, "pve2", guests=[], snapshots=[snapshot("1", HOUR, "tank/vm-104-disk-0")])
    host = state(sim, guests=[guest(volumes=two)], snapshots=own)
    assert risk(sim, host)["verdict"] == "warning"
    sim.now += 60
    state(sim, "pve2", guests=[], snapshots=[snapshot("1", HOUR, "tank/vm-104-disk-0"),
                                             snapshot("2", 3 * HOUR, "tank/vm-104-disk-1")])
    assert risk(sim, host)["lost_seconds"] == 3 * HOUR


def test_pve_replication_is_a_copy(sim: Simulation) -> None:
    job = {"id": "104-0", "vmid": 104, "target": "pve3", "enabled": True, "last_sync_at": START - 900}
    row = risk(sim, state(sim, replication=[job]))
    assert (row["copy_kind"], row["copy_where"], row["lost_seconds"]) == ("replication", "pve3", 900)


def test_a_template_loses_nothing(sim: Simulation) -> None:
    host = state(sim, guests=[guest(template=True)])
    assert list(server.copy_rows(host, server.SnapshotIndex([host]), START)) == []


@pytest.mark.parametrize("missing", ["backups", "snapshots"])
def test_what_could_not_be_looked_at_makes_no_certain_loss(sim: Simulation, missing: str) -> None:
    host = state(sim, **{missing: None}, errors={missing: {"code": "timeout", "detail": "no answer"}})
    row = risk(sim, host)
    assert row["verdict"] == "unknown" and missing in row["reason"]


def test_a_backup_on_a_storage_that_is_not_listed_is_unknown(sim: Simulation) -> None:
    assert risk(sim, state(sim, backups=backup("gone", DAY)))["verdict"] == "unknown"


# margins: how many more disks each vdev survives, with suspects


def pool(*vdevs: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"name": "tank", "guid": "1", "state": "ONLINE", "layout": "raidz2", "vdevs": list(vdevs), **fields}


def vdev(kind: str, *leaves: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"name": f"{kind}-0", "type": kind, "class": "normal", "state": "ONLINE", "children": list(leaves), **fields}


def leaf(disk: str, state: str = "ONLINE", **fields: Any) -> dict[str, Any]:
    return {"name": disk, "type": "disk", "class": "normal", "state": state, "disk": disk, **fields}


def disk(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "serial": f"S-{name}", "model": "M", "power_on_hours": 1000, "passed": True, **fields}


def margins(sim: Simulation, one: dict[str, Any], disks: list[dict[str, Any]] | None = None) -> list[tuple[int, int]]:
    host = state(sim, pools=[one], disks=disks or [])
    return [(found.margin, found.with_suspects) for found in server.pool_margins(host, one)]


@pytest.mark.parametrize(("one", "expected"), [
    (pool(vdev("mirror", leaf("a"), leaf("b"))), [(1, 1)]),
    (pool(vdev("mirror", leaf("a"), leaf("b"), leaf("c"))), [(2, 2)]),
    (pool(vdev("raidz2", leaf("a"), leaf("b"), leaf("c", "FAULTED"), leaf("d"))), [(1, 1)]),
    (pool(vdev("raidz", leaf("a"), leaf("b"), leaf("c"))), [(1, 1)]),
    (pool({**leaf("a"), "children": []}), [(0, 0)]),                                    # a stripe of one
    (pool(vdev("mirror", leaf("a"), leaf("b", "UNAVAIL"))), [(0, 0)]),
    (pool(vdev("mirror", leaf("a"), vdev("spare", leaf("b", "FAULTED"), leaf("s")))), [(1, 1)]),
    (pool(vdev("mirror", leaf("a"), leaf("b"), **{"class": "log"})), []),               # losing a log loses no pool
])
def test_margin_of_a_vdev(sim: Simulation, one: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    assert margins(sim, one) == expected


def test_a_suspect_is_counted_as_if_it_had_failed(sim: Simulation) -> None:
    one = pool(vdev("mirror", leaf("a"), leaf("b")))
    assert margins(sim, one, [disk("a", passed=False), disk("b")]) == [(1, 0)]


def test_a_suspect_that_has_failed_already_is_counted_once(sim: Simulation) -> None:
    one = pool(vdev("raidz2", leaf("a", "FAULTED"), leaf("b"), leaf("c"), leaf("d")))
    assert margins(sim, one, [disk("a", passed=False)]) == [(1, 1)]


def test_the_agent_knows_of_a_member_that_is_still_resilvering(sim: Simulation) -> None:
    one = pool(vdev("mirror", leaf("a"), leaf("b")), redundancy_margin=0)
    assert margins(sim, one) == [(0, 0)]


@pytest.mark.parametrize(("fields", "word"), [
    ({"passed": False}, "failing"), ({"critical_warning": 1}, "0x01"), ({"wear_ratio": 1.04}, "104% worn"),
    ({"spare_ratio": 0.05, "spare_threshold_ratio": 0.1}, "spare"), ({"pending_sectors": 8}, "8 pending"),
    ({"selftest": {"passed": False}}, "self-test"),
])
def test_what_makes_a_disk_suspect(fields: dict[str, Any], word: str) -> None:
    assert word in "; ".join(server.suspicions(disk("a", **fields), {}))


def test_a_disk_of_which_nothing_is_known_is_no_suspect() -> None:
    assert server.suspicions(None, {}) == [] and server.suspicions({"passed": None, "wear_ratio": None}, {}) == []


def test_disks_are_replaced_in_the_order_of_what_is_left(sim: Simulation) -> None:
    first = pool(vdev("raidz2", leaf("a"), leaf("b"), leaf("c"), leaf("d")))
    second = pool(vdev("mirror", leaf("x"), leaf("y")))
    safe = state(sim, "safe", pools=[first], disks=[disk("a", passed=False)])
    close = state(sim, "close", pools=[second], disks=[disk("x", pending_sectors=3)])
    rows = server.replacement_rows([safe, close])
    assert [(row["host"], row["disk"], row["margin_with_suspects"], row["serial"]) for row in rows] == [
        ("close", "x", 0, "S-x"), ("safe", "a", 1, "S-a")]


def test_disks_that_could_not_be_looked_at_are_not_called_well(sim: Simulation) -> None:
    host = state(sim, pools=[pool(vdev("mirror", leaf("a"), leaf("b")))], errors={"disks": {"code": "timeout"}})
    (row,) = server.replacement_rows([host])
    assert (row["verdict"], row["disk"]) == ("unknown", None) and "could not be looked at: disks (timeout)" in row["reason"]


def test_margins_follow_the_newest_disks_and_outlive_a_restart(sim: Simulation) -> None:
    one = pool(vdev("mirror", leaf("a"), leaf("b")))
    for pending, suspects in ((3, ["a"]), (0, []), (5, ["a"])):
        sim.now += 60
        host = state(sim, pools=[one], disks=[disk("a", pending_sectors=pending)])
        assert [row["suspects"] for row in server.pool_rows(host, sim.now)] == [suspects]
    sim.restart()
    assert [row["suspects"] for row in server.pool_rows(sim.fleet.find("pve1"), sim.now)] == [["a"]]


# blast radius, both ways


def tank_host(sim: Simulation, **fields: Any) -> server.HostState:
    on_tank = [{"storage": "tank-vm", "dataset": "tank/vm/vm-1-disk-0"}]
    guests = [guest(1, volumes=on_tank, tags=["critical"]), guest(2, volumes=on_tank), guest(3)]
    return state(sim, guests=guests, pools=[pool(vdev("mirror", leaf("sdf"), leaf("sdg", "FAULTED")))], **fields)


@pytest.mark.parametrize("object", ["pools/tank", "pools/tank/mirror-0", "disks/sdf"])
def test_a_disk_a_vdev_and_a_pool_tell_who_depends_on_them(sim: Simulation, object: str) -> None:
    told = server.blast_radius(tank_host(sim), object)
    assert told is not None and (told["guests"], told["critical"], told["margin"]) == ([1, 2], 1, 0)
    assert told["sentence"] == "no more disk may fail; 2 guests on tank, 1 of them critical"


def test_a_guest_under_ha_is_critical_without_a_tag(sim: Simulation) -> None:
    host = tank_host(sim, ha={"services": [{"id": "vm:2", "state": "started"}]})
    assert (server.blast_radius(host, "pools/tank") or {})["critical"] == 2


@pytest.mark.parametrize("object", ["disks/nope", "pools/nope", "guests/1", ""])
def test_nothing_is_said_of_what_is_not_there(sim: Simulation, object: str) -> None:
    assert server.blast_radius(tank_host(sim), object) is None


def test_a_guest_tells_where_it_lives(sim: Simulation) -> None:
    host = tank_host(sim, disks=[disk("sdf", pending_sectors=1)])
    assert [row["lives_on"] for row in server.guest_rows(host, START)] == [
        *["lives on tank (raidz2, no more disk may fail), sdf is suspect"] * 2, "lives on rpool, of which nothing is known"]


def asked(sim: Simulation, path: str) -> Any:
    """What the API answers to a reader."""
    token = sim.write(lambda db: server.create_api_token(db, f"t{len(path)}", sim.now, admin=False, days=None))
    answer = Client(sim.monitor).get(path, Authorization=f"Bearer {token}")
    return answer.status, answer.json()


def test_an_alert_says_what_is_at_stake_in_lists_and_messages(sim: Simulation) -> None:
    host = tank_host(sim)
    said = "no more disk may fail; 2 guests on tank, 1 of them critical"
    rows = {(row["rule"], row["object"]): row["at_stake"] for row in server.with_stakes(sim.fleet, server.open_alerts([host]))}
    assert rows["pool-state", "pools/tank"] == said
    alert = host.alerts["pool-state", "pools/tank"]
    body = server.notification_body(sim.fleet, host, alert, "firing", sim.now)
    assert body["at_stake"] == said and f"At stake: {said}" in server.item_text(body, str)
    assert server.notification_body(sim.fleet, host, alert, "resolved", sim.now)["at_stake"] is None
    assert server.safe_message({"items": [body], "left_out": {}})["items"][0]["at_stake"] is None


def test_nothing_is_at_stake_where_nothing_is_known_to_depend(sim: Simulation) -> None:
    host = tank_host(sim)
    assert server.at_stake(host, "disks/nope") is None is server.at_stake(sim.fleet.shared, "clusters/a")


# silent failures


def silent(sim: Simulation, **sections: Any) -> list[str]:
    usual = {"pools": [pool(vdev("mirror", leaf("a"), leaf("b")))]}
    return [what for what, _, _ in server.silent_failures(state(sim, **{**usual, **sections}))]


LOUD = {"zed_mail": True, "root_mail": True, "scrub_scheduled": True, "matchers_without_target": [],
        "security_source": True, "enterprise_source": False}


def test_a_host_that_would_be_heard_is_not_listed(sim: Simulation) -> None:
    assert silent(sim, safeguards=LOUD) == []


@pytest.mark.parametrize(("fields", "what"), [
    ({"zed_mail": False}, "zed-mail"), ({"root_mail": False}, "root-mail"), ({"scrub_scheduled": False}, "scrub-timer"),
    ({"matchers_without_target": ["night"]}, "notification-target"), ({"security_source": False}, "security-source"),
])
def test_what_would_stay_silent_is_named(sim: Simulation, fields: dict[str, Any], what: str) -> None:
    assert silent(sim, safeguards={**LOUD, **fields}) == [what]


def test_of_what_is_not_known_nothing_is_said(sim: Simulation) -> None:
    assert silent(sim, safeguards={}) == [] and silent(sim) == []


def test_the_enterprise_source_is_right_with_a_subscription(sim: Simulation) -> None:
    on = {**LOUD, "enterprise_source": True}
    assert silent(sim, safeguards=on, subscription={"status": "active"}) == []
    sim.now += 60
    assert silent(sim, safeguards=on, subscription={"status": "notfound"}) == ["enterprise-source"]


def test_trim_matters_where_a_pool_has_an_ssd_that_does_not_trim_itself(sim: Simulation) -> None:
    never = {**LOUD, "trim_scheduled": False}
    for kind, autotrim, spots in (("ssd", False, ["trim-timer"]), ("hdd", False, []), ("ssd", True, []), ("ssd", None, [])):
        sim.now += 60
        assert silent(sim, safeguards=never, disks=[disk("a", kind=kind, pool="tank")],
                      pool_settings=[{"name": "tank", "autotrim": autotrim}]) == spots, (kind, autotrim)


def test_mails_that_are_stuck_and_a_clock_that_nobody_sets(sim: Simulation) -> None:
    off = [{"unit": "chrony.service", "load": "loaded", "active": "inactive"}]
    assert silent(sim, mail_queue={"deferred": 3}, services=off) == ["mail-queue", "clock-source"]
    sim.now += 60
    on = {"unit": "systemd-timesyncd.service", "load": "loaded", "active": "active"}
    assert silent(sim, mail_queue={"deferred": 0}, services=[*off, on]) == []
    assert fired(sim, "blind-spot", safeguards=LOUD, services=off, mail_queue={"deferred": 3}) == []  # rules of their own


def test_a_guest_with_ha_needs_a_watchdog(sim: Simulation) -> None:
    unit = {"unit": "watchdog-mux.service", "load": "loaded", "active": "failed"}
    for services, spots in (([{"id": "vm:104", "state": "started"}], ["fencing"]), ([], [])):
        sim.now += 60
        assert silent(sim, services=[unit], ha={"services": services}) == spots


def test_what_could_not_be_looked_at_is_a_line_of_its_own(sim: Simulation) -> None:
    state(sim, services=[], errors={"safeguards": {"code": "denied", "detail": ""}})
    (row,) = asked(sim, "/api/v1/blindspots")[1]["items"]
    assert (row["verdict"], row["reason"]) == ("unknown", "could not be looked at: safeguards (denied)")


def test_zed_that_does_not_run_matters_where_there_is_zfs(sim: Simulation) -> None:
    unit = {"unit": "zfs-zed.service", "load": "loaded", "active": "inactive"}
    assert silent(sim, services=[unit]) == ["zed"]
    sim.now += 60
    assert silent(sim, services=[unit], pools=[]) == []


def test_a_job_that_covers_nobody(sim: Simulation) -> None:
    job = {"id": "old", "enabled": True, "guests": [999], "schedule": "02:00"}
    assert silent(sim, backups={"jobs": [job], "guests": []}) == ["backup-job-old"]
    sim.now += 60
    assert silent(sim, backups={"jobs": [{**job, "guests": "all"}], "guests": []}) == []


def test_a_job_of_a_cluster_covers_nobody_when_no_node_has_the_guest(sim: Simulation) -> None:
    members = [{"name": name, "online": True} for name in ("pve1", "pve2")]
    job = {"id": "j", "enabled": True, "guests": [200], "schedule": "02:00"}
    told = {"cluster": {"name": "c", "members": members}, "backups": {"jobs": [job], "guests": []},
            "safeguards": LOUD, "services": []}
    first = state(sim, "pve1", **told)
    assert list(server.blindspot_rows(sim.fleet, first)) == []  # the other node may have it
    for guests, spots in (([guest(200)], []), ([guest(201)], ["backup-job-j"])):
        sim.now += 60
        state(sim, "pve2", **told, guests=guests)
        assert [row["what"] for row in server.blindspot_rows(sim.fleet, first)] == spots


# drift and cohorts


def test_the_odd_one_out_is_told_and_a_fleet_without_a_usual_value_is_not(sim: Simulation) -> None:
    hosts = [state(sim, f"pve{number}", node={"pve_version": "9.1.2" if number < 4 else "8.4.1", "kernel": str(number)})
             for number in range(5)]
    told = [(row["fact"], row["host"], row["value"]) for row in server.drift_rows(hosts)]
    assert told == [("PVE", "pve4", "8.4.1")]


@pytest.mark.parametrize(("fields", "fact"), [
    ({"versions": {"microcode": "0xa1"}}, "microcode"), ({"versions": {"storage_cfg_digest": "ff"}}, "storage.cfg"),
    ({"node": {"arc_max_bytes": 4, "memory_total_bytes": 64}}, "ARC limit"),
    ({"pools": [{"name": "tank", "features_disabled": True}]}, "features off"),
    ({"versions": {}, "node": {}, "pools": []}, None),  # it does not tell: that is not odd
])
def test_what_may_differ_between_hosts(sim: Simulation, fields: dict[str, Any], fact: str | None) -> None:
    usual = {"versions": {"microcode": "0xb2", "storage_cfg_digest": "00"},
             "node": {"arc_max_bytes": 16, "memory_total_bytes": 64}, "pools": [{"name": "tank", "features_disabled": False}]}
    hosts = [state(sim, f"pve{number}", **(usual if number else {**usual, **fields})) for number in range(4)]
    assert [(row["host"], row["fact"]) for row in server.drift_rows(hosts)] == ([("pve0", fact)] if fact else [])


@pytest.mark.parametrize(("module", "tools", "told"), [
    ("2.2.8-pve1", "2.3.4-pve1", ["ZFS module and tools"]), ("2.2.8-pve1", "2.2.8-0+deb12u1", []), ("2.2.8-pve1", None, [])])
def test_a_module_of_another_release_than_its_tools(sim: Simulation, module: str, tools: Any, told: list[str]) -> None:
    host = state(sim, versions={"zfs_module": module, "zfs_userland": tools})
    assert [row["fact"] for row in server.drift_rows([host])] == told


def test_disks_of_one_model_are_compared(sim: Simulation) -> None:
    worn = [disk(name, model="QLC", firmware="1", wear_ratio=0.5, power_on_hours=4383) for name in ("a", "b")]
    host = state(sim, disks=[*worn, disk("c", model="MLC", wear_ratio=0.02, power_on_hours=8766, pending_sectors=1)])
    rows = server.cohort_rows([host])
    assert [(row["model"], row["disks"], row["suspect"]) for row in rows] == [("MLC", 1, 1), ("QLC", 2, 0)]
    assert rows[1]["wear_per_year_ratio"] == pytest.approx(1.0)


# space traps


@pytest.mark.parametrize(("block", "ashift", "width", "parity", "least", "most"), [
    (8192, 12, 6, 2, 0.3, 0.6),        # the well known trap: 8K on raidz2 with 4K sectors
    (65536, 12, 6, 2, 0.0, 0.12),
    (8192, 12, 2, 1, 0.0, 0.05),       # a raidz1 of two is a mirror
])
def test_padding_of_a_zvol(block: int, ashift: int, width: int, parity: int, least: float, most: float) -> None:
    assert least <= server.padding_ratio(block, ashift, width, parity) <= most


def traps(sim: Simulation, **sections: Any) -> list[str]:
    return [row["trap"] for row in server.space_traps(state(sim, **sections))]


def test_padding_is_told_only_where_block_and_sectors_are_known(sim: Simulation) -> None:
    six = pool(vdev("raidz2", *(leaf(name) for name in "abcdef")))
    volume = {"name": "tank/vm-104-disk-0", "type": "volume", "vmid": 104, "used_by_dataset_bytes": 100 * GIB}
    chosen = {"name": "tank", "ashift": 12, "volumes": [{"name": volume["name"], "block_bytes": 8192}]}
    assert traps(sim, pools=[six], datasets=[volume], pool_settings=[chosen]) == ["padding"]
    for unknown in ({**chosen, "ashift": None}, {**chosen, "volumes": []}):
        sim.now += 60
        assert traps(sim, pools=[six], datasets=[volume], pool_settings=[unknown]) == []


def test_a_thick_volume_a_clone_and_an_orphan(sim: Simulation) -> None:
    thick = {"name": "rpool/a", "type": "volume", "refreservation_bytes": 50 * GIB, "used_by_dataset_bytes": GIB}
    clone = {"name": "rpool/b", "type": "volume", "origin": "rpool/base@x"}
    orphan = {"name": "rpool/vm-999-disk-0", "type": "volume", "vmid": 999, "used_bytes": GIB}
    assert traps(sim, datasets=[thick, clone, orphan]) == ["refreservation", "clone", "orphan"]
    sim.now += 60
    assert traps(sim, datasets=[orphan], guests=None, errors={"guests": {"code": "stale"}}) == ["orphan"]
    sim.now += 60
    assert traps(sim, datasets=[orphan], cluster={"name": "c", "members": []}) == []      # may be a replica


def test_a_linked_clone_of_a_template_is_meant_so_and_another_holds_at_most_what_snapshots_hold(sim: Simulation) -> None:
    base = {"name": "rpool/base", "type": "volume", "used_by_snapshots_bytes": 7 * GIB}
    clone = {"name": "rpool/b", "type": "volume", "origin": "rpool/base@x"}
    linked = {**clone, "name": "rpool/l", "origin": "rpool/base@__base__"}
    for datasets, bytes in (([base, clone, linked], 7 * GIB), ([clone, linked], None)):
        sim.now += 60
        (row,) = server.space_traps(state(sim, datasets=datasets))
        assert (row["object"], row["bytes"], "at most" in row["reason"]) == ("datasets/rpool/b", bytes, bytes is not None)


def test_volumes_taken_from_a_guest_are_told_with_their_bytes_where_they_are_known(sim: Simulation) -> None:
    left = [{"name": "unused0", "storage": "local-zfs", "dataset": "rpool/data/vm-104-disk-1"},
            {"name": "unused1", "storage": "lvm"}]
    data = [{"name": "rpool/data/vm-104-disk-1", "type": "volume", "used_bytes": 5 * GIB}]
    rows = list(server.space_traps(state(sim, guests=[guest(unused=left)], datasets=data)))
    assert [(row["trap"], row["object"], row["bytes"]) for row in rows] == [
        ("unused", "datasets/rpool/data/vm-104-disk-1", 5 * GIB), ("unused", "datasets/lvm:unused1", None)]
    assert server.sum_up_traps(rows) == "They take 5.0 GiB; of 1 it is not known."
    assert [win["what"] for win in server.winnings(sim.fleet.find("pve1"), "rpool", sim.now)] == ["unused"]


def special(used: float | None) -> dict[str, Any]:
    room = {} if used is None else {"allocated_bytes": int(used * 100 * GIB), "size_bytes": 100 * GIB}
    return pool(vdev("raidz2", *(leaf(name) for name in "abcd")), vdev("mirror", leaf("s"), leaf("t"), **{"class": "special"}, **room))


@pytest.mark.parametrize(("used", "severity"), [(0.5, None), (0.8, "warning"), (0.95, "critical"), (None, None)])
def test_a_special_vdev_that_is_nearly_full(sim: Simulation, used: float | None, severity: str | None) -> None:
    told = fired(sim, "pool-special", pools=[special(used)])
    assert [word for word, _ in told] == ([severity] if severity else [])
    assert traps(sim, pools=[special(used)]) == (["special"] if severity else [])
    assert (server.pool_special(special(used)) is server.UNKNOWN) == (used is None)


@pytest.mark.parametrize("tags", ["web;critical", "web, Critical", ["critical"]])
def test_a_guest_is_critical_by_its_tags_however_they_come(sim: Simulation, tags: Any) -> None:
    host = state(sim, guests=[guest(tags=tags), guest(vmid=105, tags="uncritical")])
    assert [server.is_critical(host, row) for row in host.items("guests")] == [True, False]


# chronicle: what a report tells beyond the one before


def chronicle(sim: Simulation, before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str]]:
    host = state(sim, "other", **before)
    return [(kind, message) for _, kind, _, message in server.chronicle(host, {"time": sim.now, **after}, sim.now)]


@pytest.mark.parametrize(("before", "after", "kind", "word"), [
    ({"node": {"boot_id": "a"}}, {"node": {"boot_id": "b", "kernel": "6.14"}}, "reboot", "6.14"),
    ({"versions": {"pve": "8.4"}}, {"versions": {"pve": "9.1"}}, "update", "8.4 → 9.1"),
    ({"guests": [guest()]}, {"guests": [guest(status="stopped")]}, "guest", "running → stopped"),
    ({"guests": [guest()]}, {"guests": []}, "guest", "is gone"),
    ({}, {"tasks": [{"type": "vzdump", "vmid": "104", "user": "root@pam", "ended_at": START, "status": "OK"}]}, "task",
     "vzdump of 104 by root@pam: OK"),
    ({"pools": [pool()]}, {"pools": [pool(last_scrub={"ended_at": START, "duration_seconds": 7200})]}, "scrub", "2 h"),
])
def test_a_change_is_told(sim: Simulation, before: Any, after: Any, kind: str, word: str) -> None:
    told = chronicle(sim, before, after)
    assert [entry[0] for entry in told] == [kind] and word in told[0][1]


def scrub_of(ended: float | None, **fields: Any) -> dict[str, Any]:
    return {"name": "tank", "guid": "1", "last_scrub": {"ended_at": ended, **fields}}


TOLD = {  # what stood there, what comes 60 s before it is taken, and each change: seconds from then, kind, object, words
    "a host that started says when": (
        {"node": {"boot_id": "a"}}, {"node": {"boot_id": "b", "uptime_seconds": 100, "kernel": "6.14"}},
        [(-160, "reboot", "", "Host started, kernel 6.14")]),
    "one that does not say for how long it runs": (
        {"node": {"boot_id": "a"}}, {"node": {"boot_id": "b"}}, [(-60, "reboot", "", "Host started, kernel ?")]),
    "the same boot": ({"node": {"boot_id": "a"}}, {"node": {"boot_id": "a", "uptime_seconds": 100}}, []),
    "a boot that is told for the first time": ({"node": {"name": "x"}}, {"node": {"boot_id": "b"}}, []),
    "a boot that is told no more": ({"node": {"boot_id": "a"}}, {"node": {"name": "x"}}, []),
    "versions, of which one is new and one gone": (
        {"versions": {"pve": "8.4", "qemu": "9", "zfs_module": "2.2", "storage_cfg_digest": "a"}},
        {"versions": {"pve": "9.1", "qemu": "9", "zfs_userland": "2.3", "storage_cfg_digest": "b"}},
        [(-60, "update", "", "pve 8.4 → 9.1"), (-60, "config", "", "storage.cfg changed")]),
    "a module, by its name in words": ({"versions": {"zfs_module": "2.2"}}, {"versions": {"zfs_module": "2.3"}},
                                       [(-60, "update", "", "zfs module 2.2 → 2.3")]),
    "a digest that is told for the first time": ({"versions": {"pve": "9"}}, {"versions": {"storage_cfg_digest": "b"}}, []),
    "tasks: one that runs is no news and hides none behind it": (
        {}, {"tasks": [{"type": "vzdump", "vmid": "104"}, {"type": "qmstart", "vmid": "104", "user": "a@pam", "ended_at": START - 500, "result": "OK"},
                       {"ended_at": START + 5000}, {"type": "aptupdate", "ended_at": START - 1, "status": "exit code 1", "user": "b@pam"}]},
        [(-560, "task", "guests/104", "Task qmstart of 104 by a@pam: OK"), (0, "task", "", "Task ? by ?: unknown"),
         (-61, "task", "", "Task aptupdate by b@pam: exit code 1")]),
    "a scrub with what it took and mended": (
        {"pools": [scrub_of(START - 9000)]}, {"pools": [scrub_of(START - 100, duration_seconds=7200, repaired_bytes=512)]},
        [(-160, "scrub", "pools/tank", "Scrub of tank ended after 2 h, 512 bytes repaired")]),
    "a scrub of which nothing more is known, in the future": (
        {"pools": [scrub_of(None)]}, {"pools": [scrub_of(START + 9999, repaired_bytes=0)]}, [(0, "scrub", "pools/tank", "Scrub of tank ended")]),
    "the same scrub, one without an end, one of a pool that was not there": (
        {"pools": [scrub_of(START - 9000), {**scrub_of(1.0), "guid": "2"}]},
        {"pools": [scrub_of(START - 9000), {**scrub_of(None), "guid": "2"}, {**scrub_of(START), "guid": "3"}]}, []),
    "guests that come, change and go": (
        {"guests": [guest(), guest(105), guest(106), guest(107, status="unknown")]},
        {"guests": [guest(status="stopped"), guest(105, status=None), guest(107), guest(108)]},
        [(-60, "guest", "guests/104", "Guest 104 vm104: running → stopped"), (-60, "guest", "guests/108", "Guest 108 vm108 appeared"),
         (-60, "guest", "guests/106", "Guest 106 is gone from this host")]),
    "guests that are all as they were": ({"guests": [guest()]}, {"guests": [guest(cpu_ratio=0.5)]}, []),
    "settings that are no list of names": (
        {"guests": [guest()]}, {"guests": [guest(config_changed=7, config_changed_at=START)]},
        [(-60, "config", "guests/104", "Configuration of guest 104 vm104 changed: ")]),
    "settings, in the future, and those of a guest that was not there": (
        {"guests": [guest()]}, {"guests": [guest(config_changed=["cores"], config_changed_at=START + 9999), guest(105, config_changed_at=START)]},
        [(-60, "guest", "guests/105", "Guest 105 vm105 appeared"), (0, "config", "guests/104", "Configuration of guest 104 vm104 changed: cores")]),
}  # fmt: skip


@pytest.mark.parametrize(("before", "after", "told"), TOLD.values(), ids=TOLD)
def test_changes_are_told_with_their_time_and_object(sim: Simulation, before: Any, after: Any, told: Any) -> None:
    host, taken = state(sim, **{"guests": None, **before}), START + 60
    changes = list(server.chronicle(host, {"time": START, **after}, taken))
    assert [(round(at - taken), *rest) for at, *rest in changes] == told


def test_a_report_from_a_clock_that_is_ahead_changed_things_when_it_came(sim: Simulation) -> None:
    host = state(sim, node={"boot_id": "a"})
    assert [at for at, *_ in server.chronicle(host, {"time": START + 500, "node": {"boot_id": "b"}}, START + 60)] == [START + 60]


def test_a_long_result_of_a_task_is_cut(sim: Simulation) -> None:
    (change,) = server.ended_tasks([{"type": "vzdump", "ended_at": START, "status": "x" * 9999}], START)
    assert len(change[3]) == 500 and change[3].startswith("Task vzdump by ?: xxx")


@pytest.mark.parametrize(("status", "severity"), [("OK", None), ("unknown", None), ("job errors", "warning"), ("not OK either", "warning")])
def test_a_task_that_failed_is_a_warning_on_the_time_line(sim: Simulation, status: str, severity: str | None) -> None:
    state(sim, tasks=[{"upid": "U", "type": "vzdump", "ended_at": START - 5, "status": status}])
    assert [(row["severity"], row["object"]) for row in sim.events("task")] == [(severity, None)]


def test_changed_settings_of_a_guest_are_told_once_with_their_names(sim: Simulation) -> None:
    before = {"guests": [guest()]}
    changed = guest(config_changed=["cores", "memory"], config_changed_at=START)
    assert chronicle(sim, before, {"guests": [changed]}) == [
        ("config", "Configuration of guest 104 vm104 changed: cores, memory")]
    sim.now += 60
    assert chronicle(sim, {"guests": [changed]}, {"guests": [changed]}) == []  # it goes on being told for an hour
    sim.now += 60
    assert chronicle(sim, before, {"guests": [changed]}) == []  # and may be told again after a gap
    assert chronicle(sim, before, {"guests": [guest()]}) == []  # an older agent knows nothing of it


def test_the_first_report_is_no_change(sim: Simulation) -> None:
    assert chronicle(sim, {"guests": None}, {"node": {"boot_id": "b"}, "versions": {"pve": "9"}, "guests": [guest()],
                                             "pools": [pool(last_scrub={"ended_at": START})]}) == []


def test_the_chronicle_becomes_events_and_a_backlog_tells_its_tasks_only(sim: Simulation) -> None:
    state(sim, node={"boot_id": "a"})
    sim.now += 60
    sim.send("pve1", node={"boot_id": "b", "uptime_seconds": 20}, guests=[guest(status="stopped")])
    sim.send("pve1", at=sim.now - DAY, run="old", node={"boot_id": "z"}, guests=[guest(status="paused")],
             tasks=[{"upid": "U", "type": "qmstop", "vmid": "104", "user": "root@pam", "ended_at": sim.now - DAY, "status": "OK"}])
    told = [(row["kind"], row["object"]) for row in server.list_events(sim.monitor.store.reader(), since=0, limit=99)]
    assert [row for row in told if row[0] in ("reboot", "guest", "task")] == [
        ("guest", "guests/104"), ("reboot", None), ("task", "guests/104")]


def test_tasks_are_kept_for_two_weeks(sim: Simulation) -> None:
    state(sim, tasks=[{"upid": "U", "type": "qmstop", "vmid": "104", "ended_at": START, "status": "OK"}])
    for days, kept in ((13, 1), (15, 0)):
        sim.monitor.looked_at = START + days * DAY  # time has passed, and not by a jump of the clock
        sim.write(partial(server.prune, sim.monitor, START + days * DAY))
        assert len(server.list_events(sim.monitor.store.reader(), since=0, limit=99, kind="task")) == kept


# forecasts: when it is full, what grew, what could be won


def fills(sim: Simulation, days: int, **fields: Any) -> list[dict[str, Any]]:
    """A pool that grows by 96 GiB a day, most of it snapshots of guest 104; the rows as the API has them."""
    for hour in range(0, days * 24, 6):
        sim.now, grown = START + hour * HOUR, hour * 4 * GIB
        space = {"usable_used_bytes": 1000 * GIB + grown, "usable_available_bytes": 1000 * GIB - grown}
        state(sim, pools=[{**pool(vdev("mirror", leaf("a"), leaf("b"))), **space}], datasets=[
            {"name": "tank", "type": "filesystem", "used_bytes": 1000 * GIB + grown, "used_by_snapshots_bytes": 0},
            {"name": "tank/vm-104-disk-0", "type": "volume", "vmid": 104, "used_bytes": 400 * GIB + grown * 3 // 4,
             "used_by_snapshots_bytes": 100 * GIB + grown * 3 // 4, "used_by_dataset_bytes": 300 * GIB},
            {"name": "tank/vm-999-disk-0", "type": "volume", "vmid": 999, "used_bytes": 30 * GIB,
             "used_by_dataset_bytes": 10 * GIB, "refreservation_bytes": 30 * GIB}],
            snapshots=[snapshot("1", 20 * DAY, "tank/vm-104-disk-0", **{"class": "pve"})], **fields)
    server.forecast_fleet(sim.monitor, sim.now, sim.monitor.store.reader(), 9)
    return list(server.fleet_forecasts(sim.fleet, list(sim.fleet.hosts.values()), sim.now))


def test_a_forecast_says_what_grew_and_what_could_be_won(sim: Simulation) -> None:
    (row,) = fills(sim, 5)
    assert 4.9 < row["days_until_full"] < 6 and row["days_at_most"] < 8 and row["object"] == "pools/tank"
    assert row["grew"][0] == {"dataset": "tank/vm-104-disk-0", "kind": "snapshots", "vmid": 104,
                              "bytes": pytest.approx(4.75 * 72 * GIB, rel=.1)}
    assert "tank/vm-104-disk-0 grew by" in row["reason"] and "(snapshots)" in row["reason"]
    won = {win["what"]: (win["object"], win["bytes"]) for win in row["wins"]}
    assert won["snapshots"][0] == "datasets/tank/vm-104-disk-0" and won["snapshots"][1] > 400 * GIB
    assert won["orphan"] == ("datasets/tank/vm-999-disk-0", 30 * GIB)
    assert won["refreservation"] == ("datasets/tank/vm-999-disk-0", 20 * GIB)


def test_snapshots_of_yesterday_are_nothing_to_be_won(sim: Simulation) -> None:
    (row,) = fills(sim, 5)
    host = sim.fleet.find("pve1")
    assert "snapshots" in {win["what"] for win in server.winnings(host, "tank", sim.now)}
    young = {**snapshot("1", 0, "tank/vm-104-disk-0"), "class": "pve", "oldest_at": sim.now - DAY}
    state(sim, snapshots=[young])
    assert "snapshots" not in {win["what"] for win in server.winnings(host, "tank", sim.now)}
    assert server.winnings(host, "other", sim.now) == []


def test_two_days_are_too_few_to_say_when_it_is_full(sim: Simulation) -> None:
    (row,) = fills(sim, 2)
    assert (row["verdict"], row["reason"], row["days_until_full"], row["grew"]) == ("unknown", "unknown", None, None)


def test_a_suspect_disk_is_not_well_though_nothing_fires(sim: Simulation) -> None:
    suspect = {"name": "sda", "passed": True, "pending_sectors": 24, "serial": "S1"}
    host = state(sim, disks=[suspect, {"name": "sdb", "passed": True, "pending_sectors": 0}])
    host.alerts.clear()
    rows = {row["name"]: (row["verdict"], row["reason"]) for row in server.disk_rows(host, sim.now)}
    assert rows == {"sda": ("info", "It may fail next: 24 pending sectors."), "sdb": ("ok", None)}


def test_a_host_is_looked_at_again_soon_after_the_first_time(sim: Simulation) -> None:
    """A backlog that came with its first report is not in the history yet when it is looked at."""
    state(sim, pools=[{**pool(vdev("mirror", leaf("a"), leaf("b"))), "usable_used_bytes": GIB,
                       "usable_available_bytes": GIB}])
    looks = []
    for _ in range(3):
        server.forecast_fleet(sim.monitor, sim.now, sim.monitor.store.reader(), 9)
        looks.append(sim.fleet.find("pve1").forecast_at + server.FORECAST_SECONDS - sim.now)
        sim.now += looks[-1]
    assert looks == [60, HOUR, HOUR]


def test_a_host_that_fell_silent_is_as_full_as_it_was(sim: Simulation) -> None:
    (row,) = fills(sim, 5)
    sim.now += 20 * DAY
    server.forecast_fleet(sim.monitor, sim.now, sim.monitor.store.reader(), 9)
    (later,) = server.fleet_forecasts(sim.fleet, list(sim.fleet.hosts.values()), sim.now)
    assert later["days_until_full"] == row["days_until_full"] and later["as_of"] == row["as_of"]


# snapshots and scrubs


def family(sim: Simulation, having: int, without: int, **more: Any) -> server.HostState:
    """Guests' disks of one parent: so many with hourly snapshots, so many without."""
    names = [f"tank/vm/vm-{number}-disk-0" for number in range(100, 100 + having + without)]
    sets = [snapshot(str(at), HOUR / 2, name, interval_seconds=HOUR) for at, name in enumerate(names[:having])]
    return state(sim, **{"snapshots": sets, "datasets": [{"name": name, "type": "volume"} for name in names], **more})


def test_who_lacks_the_snapshots_of_its_neighbours_is_named(sim: Simulation) -> None:
    host = family(sim, 5, 1)
    assert server.missing_snapshots(host) == {"tank/vm/vm-105-disk-0": ["autosnap_hourly"]}
    rows = list(server.series_rows(host, START))
    assert [row["dataset"] for row in rows if row["verdict"] == "warning"] == ["tank/vm/vm-105-disk-0"]
    for _ in range(3):
        sim.now += 13 * HOUR
        family(sim, 5, 1)
    (alert,) = sim.alerts("snapshot-missing")
    assert alert["object"] == "datasets/tank/vm/vm-105-disk-0"
    server.accept_missing(host, alert["object"])
    family(sim, 5, 1)
    assert not sim.alerts("snapshot-missing")


@pytest.mark.parametrize(("having", "without", "more"), [
    (3, 0, {}), (2, 1, {}), (3, 3, {}), (5, 1, {"datasets": None}),
    (5, 1, {"snapshots": [{"dataset": "tank", "unknown_reason": "timeout"}]})])
def test_where_it_is_no_habit_or_not_known_nothing_is_missing(sim: Simulation, having: int, without: int, more: Any) -> None:
    assert server.missing_snapshots(family(sim, having, without, **more)) == {}


def test_series_that_are_never_pruned_are_told(sim: Simulation) -> None:
    kept = snapshot("1", 0, count=2000, oldest_at=START - 1999 * HOUR, interval_seconds=HOUR)
    pruned = snapshot("2", 0, "rpool/b", count=500, oldest_at=START - 5000 * HOUR, interval_seconds=HOUR)
    unknown = snapshot("3", 0, "rpool/c", newest_at=None)
    rows = {row["dataset"]: row["verdict"] for row in server.series_rows(state(sim, snapshots=[kept, pruned, unknown]), START)}
    assert list(rows.values()) == ["info", "ok", "unknown"]
    assert [message for _, message in fired(sim, "snapshot-unpruned", snapshots=[kept, pruned, unknown])] == []  # for a day
    for _ in range(3):
        sim.now += 12 * HOUR
        state(sim, snapshots=[kept, pruned, unknown])
    (alert,) = sim.alerts("snapshot-unpruned")
    assert alert["severity"] == "info" and "None of the 2000 autosnap_hourly snapshots" in alert["message"]


def test_a_plan_that_keeps_720_hours_is_no_series_that_nobody_prunes(sim: Simulation) -> None:
    assert server.unpruned_span(snapshot("1", 0, count=720, oldest_at=START - 719 * HOUR, interval_seconds=HOUR)) is None


def test_what_a_class_of_snapshots_holds(sim: Simulation) -> None:
    """Exactly where it is the only one; else at least and at most; and not known without either."""
    sets = [{"name": name, "type": "volume", "used_by_snapshots_bytes": 9 * GIB} for name in ("rpool/a", "rpool/b")]
    series = [snapshot("1", 0, "rpool/a", used_bytes=GIB), snapshot("2", 0, "rpool/b", used_bytes=GIB),
              snapshot("3", 0, "rpool/b", used_bytes=2 * GIB, **{"class": "pve"}), snapshot("4", 0, "rpool/c")]
    rows = server.series_rows(state(sim, snapshots=series, datasets=sets), START)
    assert [(row["held_bytes"], row["held_most_bytes"]) for row in rows] == [
        (9 * GIB, 9 * GIB), (GIB, 9 * GIB), (2 * GIB, 9 * GIB), (None, None)]


@pytest.mark.parametrize(("grown", "kind", "days", "told"), [
    (60, "snapshots", 40.0, True), (60, "data", 40.0, False), (5, "snapshots", 40.0, False), (60, "snapshots", 5.0, False)])
def test_snapshots_that_take_much_of_what_is_free(sim: Simulation, grown: int, kind: str, days: float, told: bool) -> None:
    """Not where the forecast of the pool says it already; and nothing where no forecast was made."""
    host = state(sim, pools=[pool()])
    assert list(server.snapshot_growth([], host)) == [server.UNKNOWN]
    growth = server.GrownSpace("tank/a", kind, None, grown * GIB)
    host.forecasts = {"pools/tank": server.Filling(server.Space("pools/tank", "Pool tank", "", 1, 100 * GIB),
                                                   server.Forecast(days, None, 1.0, 9.0), sim.now, [growth], 7.0)}
    found = list(server.snapshot_growth([], host))
    assert [reading.object for reading in found if reading and (reading.value or 0) > 0.2] == (["datasets/tank/a"] if told else [])


def scrubbed(sim: Simulation, *hours: float, **fields: Any) -> list[str]:
    for nth, took in enumerate(hours):
        sim.now += 30 * DAY
        last = {"ended_at": sim.now - HOUR, "duration_seconds": took * HOUR, "repaired_bytes": 0, "errors": 0}
        state(sim, pools=[{**pool(vdev("mirror", leaf("a", slow_ios=3), leaf("b"))), "allocated_bytes": 10 * GIB,
                           "last_scrub": last, **fields}])
    return [row["message"] for row in sim.alerts("scrub-slow")]


def test_a_scrub_slower_by_half_than_its_median_is_told(sim: Simulation) -> None:
    (told,) = scrubbed(sim, 4, 4, 5, 4, 9)
    assert "took 9 h" in told and "used to take 4 h" in told and "a had slow I/Os" in told


@pytest.mark.parametrize("hours", [(4, 4, 5, 4, 5), (4, 4, 9), (0.01, 0.01, 0.01, 0.09)])
def test_usual_scrubs_and_the_first_ones_say_nothing(sim: Simulation, hours: tuple[float, ...]) -> None:
    assert scrubbed(sim, *hours) == []


def waiting(*waits: float | None, **fields: Any) -> dict[str, Any]:
    leaves = [leaf(f"sd{letter}", **({} if wait is None else {"read_wait_seconds": wait}))
              for letter, wait in zip("abcd", waits)]
    return pool(vdev("raidz2", *leaves), **fields)


@pytest.mark.parametrize(("waits", "slow"), [
    ((0.009, 0.048, 0.008, 0.009), "sdb"), ((0.009, 0.011, 0.008, 0.009), None), ((0.0001, 0.0004, 0.0001, 0.0001), None),
    ((None, None, None, None), None), ((0.5, None, None, None), None)])
def test_the_slow_disk_is_named_by_what_the_others_beside_it_need(waits: Any, slow: str | None) -> None:
    found = server.slow_member(waiting(*waits))
    assert (found and found.disk) == slow
    assert server.describe_slow_member(waiting(*waits)) == (
        "; sdb answers after 48 ms, the others of its vdev after 9 ms" if slow else "")


def test_scrubs_are_told_with_what_they_repaired_and_how_long_they_usually_take(sim: Simulation) -> None:
    for nth, repaired in enumerate((0, 4096, 8192, 16384)):
        sim.now += 30 * DAY
        last = {"ended_at": sim.now - HOUR, "duration_seconds": 4 * HOUR, "repaired_bytes": repaired, "errors": 0}
        host = state(sim, pools=[waiting(0.009, 0.048, 0.008, 0.009, allocated_bytes=10 * GIB, last_scrub=last)])
        (row,) = server.scrub_rows(host)
        assert (row["usual_seconds"], row["slow_disk"]) == (4 * HOUR if nth == 3 else None, "sdb")
    assert row["repaired_before"] == [0, 4096, 8192]
    (alert,) = sim.alerts("scrub-result")
    assert alert["message"].endswith("repaired 16384 bytes; before it, oldest first: nothing, 4.0 KiB, 8.0 KiB.")
    assert row["verdict"] == "warning" and row["reason"] == alert["message"]


@pytest.mark.parametrize(("sections", "word", "verdict"), [
    ({"pools": [pool()]}, "no scrub of it is known", "unknown"),
    ({"pools": [pool(last_scrub={"ended_at": START, "duration_seconds": HOUR}, allocated_bytes=GIB)]}, "1 of 4 were seen", "ok"),
    ({"pools": None, "errors": {"pools": {"code": "timeout"}}}, "could not be looked at: pools (timeout)", "unknown")])
def test_of_scrubs_that_were_not_seen_nothing_is_claimed(sim: Simulation, sections: Any, word: str, verdict: str) -> None:
    (row,) = server.scrub_rows(state(sim, **sections))
    assert row["verdict"] == verdict and word in row["reason"] and row["usual_seconds"] is None


def test_twice_the_data_take_twice_the_time(sim: Simulation) -> None:
    scrubbed(sim, 4, 4, 4, 4)
    assert scrubbed(sim, 8, allocated_bytes=20 * GIB) == []


# what changed before it broke


def test_an_alert_tells_the_hour_before_it_on_its_host_and_cluster(sim: Simulation) -> None:
    members = [{"name": name, "online": True} for name in ("pve1", "pve2")]
    both = {"cluster": {"name": "c", "quorate": True, "members": members}}
    for name in ("pve1", "pve2", "pve9"):
        state(sim, name, node={"boot_id": "a", "name": name, "pve_version": "9"}, **(both if name != "pve9" else {}))
    sim.now += 300
    for name, age in (("pve1", 20), ("pve2", 30), ("pve9", 30), ("pve1", 2 * HOUR)):
        sim.send(name, tasks=[{"upid": f"U{name}{age}", "type": "qmrollback", "vmid": "104", "user": "root@pam",
                               "ended_at": sim.now - age, "status": "OK"}])
    state(sim, "pve1", pools=[pool(vdev("mirror", leaf("a"), leaf("b", "FAULTED")), state="DEGRADED")], **both)
    (alert,) = sim.alerts("pool-state")
    sim.now += 60
    sim.send("pve1", tasks=[{"upid": "late", "type": "aptupdate", "ended_at": sim.now, "status": "OK"}])
    status, told = asked(sim, f"/api/v1/alerts/{alert['id']}")
    before = [(row["host"], row["message"].split()[1]) for row in told["before"] if row["kind"] == "task"]
    assert status == 200 and before == [("pve1", "qmrollback"), ("pve2", "qmrollback")]
    assert told["blast_radius"]["pool"] == "tank" and told["rule"] == "pool-state"


def test_nothing_happened_before_the_first_word_of_a_host(sim: Simulation) -> None:
    state(sim, pools=[pool(vdev("mirror", leaf("a"), leaf("b", "FAULTED")), state="DEGRADED")])
    (alert,) = sim.alerts("pool-state")
    _, told = asked(sim, f"/api/v1/alerts/{alert['id']}")
    assert [row for row in told["before"] if row["kind"] == "task"] == [] and told["at_stake"]
    assert asked(sim, "/api/v1/alerts/999999")[0] == 404


# the rules made of answers


def fired(sim: Simulation, rule: str, **sections: Any) -> list[tuple[str, str]]:
    state(sim, **sections)
    server.index_copies(sim.monitor, sim.now, sim.monitor.store.reader())
    for _ in range(2):  # what holds for an hour is told after it
        sim.now += 2 * HOUR
        state(sim, **sections)
    return [(row["severity"], row["message"]) for row in sim.alerts(rule)]


JOB = {"id": "nightly", "enabled": True, "guests": "all", "exclude": [], "schedule": "02:00", "storage": "local"}


def test_backups_on_the_own_host_only_are_told_in_one_line(sim: Simulation) -> None:
    runs = [{"vmid": number, "newest_ok": {"ended_at": START - HOUR, "storage": "local"}} for number in (101, 102)]
    told = fired(sim, "copy-missing", guests=[guest(101), guest(102)], backups={"jobs": [JOB], "guests": runs})
    assert len(told) == 1 and told[0][0] == "warning" and "2 guests would be lost" in told[0][1], told


@pytest.mark.parametrize("fields", [{"tags": ["no-backup"]}, {"template": True}])
def test_who_is_meant_to_have_no_backup_has_no_copy_in_peace(sim: Simulation, fields: dict[str, Any]) -> None:
    runs = [{"vmid": 104, "newest_ok": {"ended_at": START - HOUR, "storage": "local"}}]
    assert fired(sim, "copy-missing", guests=[guest(**fields)], backups={"jobs": [JOB], "guests": runs}) == []


def test_the_first_day_of_a_guest_is_no_missing_copy(sim: Simulation) -> None:
    runs = [{"vmid": 104, "newest_ok": {"ended_at": START - HOUR, "storage": "local"}}]
    born = guest(created_at=START - 2 * HOUR)
    assert fired(sim, "copy-missing", guests=[born], backups={"jobs": [JOB], "guests": runs}) == []


def test_a_backup_elsewhere_is_no_missing_copy(sim: Simulation) -> None:
    runs = [{"vmid": 104, "newest_ok": {"ended_at": START - HOUR, "storage": "pbs"}}]
    assert fired(sim, "copy-missing", backups={"jobs": [JOB], "guests": runs}) == []


def test_a_vdev_that_hangs_on_a_suspect_is_critical(sim: Simulation) -> None:
    half = pool(vdev("mirror", leaf("a", "FAULTED"), leaf("b")), redundancy_margin=0)
    told = fired(sim, "suspects-hold-pool", pools=[half], disks=[disk("b", pending_sectors=9)])
    assert told == [("critical", "mirror-0 of tank hangs on suspect disks: b (9 pending sectors); no more disk may fail.")]


@pytest.mark.parametrize("disks", [[], [disk("b")], [disk("b", pending_sectors=None)]])
def test_a_vdev_without_a_known_suspect_is_not(sim: Simulation, disks: list[dict[str, Any]]) -> None:
    half = pool(vdev("mirror", leaf("a", "FAULTED"), leaf("b")), redundancy_margin=0)
    assert fired(sim, "suspects-hold-pool", pools=[half], disks=disks) == []


def test_blind_spots_are_one_line_and_as_grave_as_the_gravest(sim: Simulation) -> None:
    told = fired(sim, "blind-spot", safeguards={**LOUD, "root_mail": False, "security_source": False})
    assert [severity for severity, _ in told] == ["warning"] and "root@pam" in told[0][1]


@pytest.mark.parametrize("aimless", [5.5, "x", {"a": 1}, True, None, []])
def test_blind_spots_are_judged_whatever_stands_in_for_a_list(sim: Simulation, aimless: Any) -> None:
    told = fired(sim, "blind-spot", safeguards={**LOUD, "root_mail": False, "matchers_without_target": aimless})
    assert [severity for severity, _ in told] == ["info"] and "matcher" not in told[0][1]


def test_a_missing_address_alone_is_information(sim: Simulation) -> None:
    assert [severity for severity, _ in fired(sim, "blind-spot", safeguards={**LOUD, "root_mail": False})] == ["info"]


# the lists of the API


@pytest.mark.parametrize("name", ["copies", "replacements", "blindspots", "traps", "drift", "cohorts", "snapshots", "scrubs"])
def test_a_host_of_odd_values_costs_its_own_rows(sim: Simulation, name: str) -> None:
    usual = {"snapshots": [snapshot("1", HOUR)], "safeguards": {"zed_mail": False}, "pools": [pool(vdev("mirror", leaf("a"), leaf("b")))],
             "disks": [disk("a", passed=False)],
             "datasets": [{"name": "rpool/a", "type": "volume", "refreservation_bytes": 9 * GIB, "used_by_dataset_bytes": 1}]}
    for number in range(3):
        state(sim, f"pve{number}", node={"pve_version": "9"}, **usual)
    odd = state(sim, "odd", node={"pve_version": "8"}, **usual)
    resource = server.RESOURCES[name]
    assert resource.of_hosts is not None
    whole = list(resource.of_hosts(sim.fleet, list(sim.fleet.hosts.values()), START))
    assert whole and all(row.keys() == set(resource.columns) for row in whole)
    for section in ("guests", "snapshots", "disks", "pools", "datasets", "safeguards", "node", "versions"):
        broken = odd.sections.get(section, server.NOTHING)
        odd.sections = {**odd.sections, section: broken._replace(value=[{"vdevs": 5, "children": "x", "volumes": {1}}, 7],
                                                                 report=None)}
    rows = list(resource.of_hosts(sim.fleet, list(sim.fleet.hosts.values()), START))
    assert {row.get("host") for row in whole} - {row.get("host") for row in rows} <= {"odd"}
