"""What one host says or hides must not reach further than it: strange values, claims about clusters, settings."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from simulation import START, Simulation
from test_server_rules import (
    DAY,
    HOUR,
    MINUTE,
    NODES,
    at_hour,
    backups,
    cluster_of,
    daily,
    disk,
    for_minutes,
    good,
    guest,
    node,
    pool,
    replication,
    sim,  # noqa: F401
    trio,  # noqa: F401
)

import server


def fires(sim, rule):  # noqa: F811
    return {(row["host"], row["object"]) for row in sim.alerts(rule)}


# --- a report that a rule stumbles over ---


@pytest.mark.parametrize("strange", [[], {}, "yes", 5])
def test_a_strange_word_about_quorum_costs_nobody_else_his_alert(trio, strange):  # noqa: F811
    trio.host("rogue")
    views = {name: (cluster_of(*NODES, quorate=False, online=("pve1",)), {}) for name in NODES}
    for_minutes(trio, 2, rogue=({"name": "x", "quorate": strange, "members": strange}, {}), **views)
    assert fires(trio, "cluster-quorum") == {(None, "clusters/prod")}


def test_a_rule_that_stumbles_costs_that_object_alone(sim, capsys):  # noqa: F811
    bad, worse = {"name": "tank", "data_errors": 2}, {"name": "odd", "data_errors": 2, "damaged_files": 5}
    sim.send("pve1", pools=[worse, bad])
    assert fires(sim, "pool-data-errors") == {("pve1", "pools/tank")}
    sim.now += 30
    sim.send("pve1", pools=[worse, {"name": "tank", "data_errors": 0}])
    assert not fires(sim, "pool-data-errors")
    assert capsys.readouterr().out.count("pool-data-errors cannot judge pools/odd") == 1  # said once, not each time


def test_what_cannot_be_judged_any_more_does_not_end(sim):  # noqa: F811
    sim.send("pve1", pools=[{"name": "tank", "data_errors": 2}])
    sim.now += 30
    sim.send("pve1", pools=[{"name": "tank", "data_errors": 2, "damaged_files": 5}])
    assert fires(sim, "pool-data-errors") == {("pve1", "pools/tank")}


def test_a_section_that_is_known_in_part_still_fires_and_ends(sim):  # noqa: F811
    sim.send("pve1", disks=[*disk(passed=False), *disk(name="sdb", serial="S2", passed=False)])
    assert len(fires(sim, "smart-failed")) == 2
    sim.now += 1800
    sim.send("pve1", disks=disk(passed=True), errors={"disks": {"code": "failed", "detail": "sdb: no answer"}})
    assert fires(sim, "smart-failed") == {("pve1", "disks/sdb")}  # sda is well, of sdb nothing is known
    for _ in range(4):
        sim.now += 1800
        sim.send("pve1", disks=disk(passed=True), errors={"disks": {"code": "failed", "detail": "sdb: no answer"}})
    assert not fires(sim, "section-failing")  # something could be had


def test_a_guest_that_stops_while_its_section_comes_in_part_is_told(sim):  # noqa: F811
    sim.send("pve1", guests=guest())
    sim.now += 30
    sim.send("pve1", guests=[], errors={"guests": {"code": "failed", "detail": "104.conf: no answer"}})
    for minute in range(1, 5):
        sim.now = START + minute * MINUTE
        sim.send("pve1", guests=guest(status="stopped"))
    assert fires(sim, "guest-down") == {("pve1", "guests/104")}


# --- claims about clusters ---


def late_backup(sim, *, cluster):  # noqa: F811
    """pve1's guest was last backed up ten days ago."""
    sim.now = at_hour(21, 1) + 10 * HOUR
    sim.send("pve1", cluster=cluster, guests=guest(), backups=backups([daily(sim.now)], good(104, at_hour(21, -9))))


def test_a_backup_in_another_cluster_of_the_same_name_is_no_backup(sim):  # noqa: F811
    sim.host("other")
    sim.now = at_hour(21, 1) + 10 * HOUR
    sim.send("other", cluster=cluster_of("other", "x"), guests=[], backups=backups([], good(104, sim.now - 60)))
    late_backup(sim, cluster=cluster_of("pve1", "pve2"))
    assert fires(sim, "backup-overdue") == {("pve1", "guests/104")}


def test_naming_others_as_members_makes_no_member(sim):  # noqa: F811
    sim.host("rogue")
    sim.now = at_hour(21, 1) + 10 * HOUR
    sim.send("rogue", node=node(name="pve2"), cluster=cluster_of("pve1", "pve2", "rogue"), guests=[],
             backups=backups([], good(104, sim.now - 60)))
    sim.host("another")  # the names are gathered anew
    late_backup(sim, cluster=cluster_of("pve1", "pve2"))  # pve2 is not watched here, and rogue says it was pve2
    assert fires(sim, "backup-overdue") == {("pve1", "guests/104")}
    assert [host.name for host in sim.fleet.mates(sim.fleet.find("pve1"))] == ["pve1"]


def test_a_namesake_in_another_cluster_of_the_same_name_is_no_member(sim):  # noqa: F811
    sim.host("pve2")  # the one of the other cluster; ours is not watched here
    sim.now = at_hour(21, 1) + 10 * HOUR
    sim.send("pve2", cluster=cluster_of("pve2", "pve3"), guests=[], backups=backups([], good(104, sim.now - 60)))
    late_backup(sim, cluster=cluster_of("pve1", "pve2"))
    assert fires(sim, "backup-overdue") == {("pve1", "guests/104")}


def test_a_host_registered_under_another_name_is_told_by_its_tag(sim):  # noqa: F811
    sim.host("paris-2", tags=["node:pve2"])
    for name in ("pve1", "paris-2"):
        sim.send(name, cluster=cluster_of("pve1", "pve2"))
    assert [host.name for host in sim.fleet.mates(sim.fleet.find("pve1"))] == ["pve1", "paris-2"]


def test_a_view_that_sees_no_error_hides_none(trio):  # noqa: F811
    bad = {"ha": {"services": [{"id": "vm:104", "node": "pve2", "state": "error"}]}}
    well = {"ha": {"services": [{"id": "vm:104", "node": "pve2", "state": "started"}]}}
    for_minutes(trio, 1, pve1=(cluster_of(*NODES), bad), pve2=(cluster_of(*NODES), well))  # pve2's is the newest
    assert fires(trio, "ha-service") == {(None, "clusters/prod/ha/vm:104")}


def test_a_cluster_of_which_nothing_is_heard_has_not_got_its_quorum_back(trio):  # noqa: F811
    for_minutes(trio, 2, **{name: (cluster_of(*NODES, quorate=False, online=("pve1",)), {}) for name in NODES})
    trio.wait(10 * MINUTE, step=30)
    assert fires(trio, "cluster-quorum") == {(None, "clusters/prod")}


# --- rhythm, settings, names, memory ---


@pytest.mark.parametrize("hours, expected", [
    (27, None),  # 3:00: nothing is due at night
    (34.2, None),  # 8:00 and 9:00 were missed, 10:00 is not yet half an hour ago
    (34.6, "critical"),
])
def test_replication_is_late_when_runs_that_were_due_were_missed(sim, hours, expected):  # noqa: F811
    """Each full hour from 8 to 18; the last good sync was at 18:00."""
    sim.now = at_hour(hours)
    due = [at_hour(hour, day) for day in (0, 1) for hour in range(8, 19) if at_hour(hour, day) <= sim.now][-8:]
    sim.send("pve1", replication=replication(last_sync_at=at_hour(18) + 60, schedule="8..18:00", due_times=due)(0))
    assert [row["severity"] for row in sim.alerts("replication")] == ([expected] if expected else [])


def settings(tmp_path, text):
    made = Simulation(tmp_path, text)
    made.host("pve1")
    return made


def test_a_rule_switched_off_for_one_object_ends_its_alert_with_an_event(tmp_path):
    sim = settings(tmp_path, "")  # noqa: F811
    sim.send("pve1", pool_states=pool(state="DEGRADED"))
    sim.settings_path.write_text('[objects."pools/tank".rules.pool-state]\nenabled = false\n')
    assert sim.monitor.reload_settings()
    sim.now += 30
    sim.send("pve1", pool_states=pool(state="DEGRADED"))
    assert not sim.alerts("pool-state")
    over, = sim.events("alert-resolved")
    assert over["message"].startswith("Over: Pool tank")
    assert [row["state"] for row in sim.alerts("pool-state", "all")] == ["resolved"]
    sim.close()


@pytest.mark.parametrize(("pools", "age"), [(pool(capacity_ratio=0.95), 0), ([], 0), (pool(capacity_ratio=0.95), 700)])
def test_a_rule_switched_off_ends_its_alerts_whatever_is_known(tmp_path, pools, age):  # 700 s: too old to be judged
    sim = settings(tmp_path, "[rules.pool-capacity]\nhold_seconds = 0\n")  # noqa: F811
    sim.send("pve1", pools=pool(capacity_ratio=0.95))
    assert fires(sim, "pool-capacity")
    sim.settings_path.write_text("[rules.pool-capacity]\nenabled = false\n")
    assert sim.monitor.reload_settings()
    sim.now += 900
    sim.send("pve1", pools=pools, at=sim.now - age)
    assert not fires(sim, "pool-capacity")
    sim.close()


@pytest.mark.parametrize("table", ['objects."pools/tank"', 'hosts.PVE1.objects."pools/tank"'])
def test_an_object_may_have_a_lower_threshold_than_its_host(tmp_path, table):
    sim = settings(tmp_path, f"[rules.pool-capacity]\nhold_seconds = 0\n[{table}.rules.pool-capacity]\nwarn = 0.5\n")  # noqa: F811
    sim.send("pve1", pools=[*pool(capacity_ratio=0.6), *pool(name="data", capacity_ratio=0.6)])
    assert fires(sim, "pool-capacity") == {("pve1", "pools/tank")}
    sim.close()


def test_each_host_has_its_own_thresholds_and_the_others_the_fleets():
    layers = server.Layers({"rules": {"pool-capacity": {"warn": 0.7}}, "tags": {"Big": {"rules": {"pool-capacity": {"warn": 0.75}}}},
                            "hosts": {"A": {"rules": {"pool-capacity": {"warn": 0.5}}}, "b": {"rules": {"pool-capacity": {"warn": 0.6}}}}})
    hosts = [SimpleNamespace(name=name, tags=tags, limits=None) for name, tags in (
        ("a", []), ("B", ["big"]), ("c", []), ("d", ["big", "x"]), (None, []))]
    for _ in range(2):
        assert [layers.named("pool-capacity", host).warn for host in hosts] == [0.5, 0.6, 0.7, 0.75, 0.7]
    other = server.Layers()
    assert [other.named("pool-capacity", host).warn for host in hosts] == [0.8] * 5


def test_another_limit_for_silence_moves_the_verdict_the_overview_and_the_site(tmp_path):
    sim = settings(tmp_path, "[rules.host-offline]\ncrit = 1800\n")  # noqa: F811
    for number in range(6):
        sim.host(f"h{number}", site="par")
        sim.send(f"h{number}", node=node())
    sim.wait(1700, step=30)
    assert sim.fleet.verdict(sim.fleet.find("h1"), sim.now)[0] == "stale"
    assert server.build_overview(sim.fleet, sim.now)["hosts"]["offline"] == 0
    assert not sim.alerts("host-offline") and not sim.alerts("site-offline")
    sim.wait(200, step=30)
    assert sim.fleet.verdict(sim.fleet.find("h1"), sim.now)[0] == "offline"
    assert server.build_overview(sim.fleet, sim.now)["hosts"]["offline"] == 6
    assert len(sim.alerts("host-offline")) == 6 and len(sim.alerts("site-offline")) == 1
    sim.close()


@pytest.mark.parametrize("vdev, name, expected", [
    ("sda", "sda", True), ("sda1", "sda", True), ("sdaa", "sda", False), ("sdaa1", "sda", False),
    ("nvme0n1p1", "nvme0n1", True), ("nvme0n10", "nvme0n1", False), ("ata-X-part1", "sdb", True),
    ("ata-X", "sdb", True), ("ata-Xy", "sdb", False),
])
def test_a_disk_is_named_by_a_vdev_only_as_a_whole(vdev, name, expected):
    assert server.names_disk(f"pools/tank/{vdev}", {"name": name, "by_id": "ata-X"}) is expected


def test_what_rules_remember_of_a_guest_goes_with_it(sim):  # noqa: F811
    jobs = [{"id": "daily", "enabled": True, "schedule": "21:00", "guests": "all"}]
    failed = {"vmid": 104, "newest_failed": {"ended_at": sim.now - 60, "error": "x"}}
    sim.send("pve1", guests=guest(), backups=backups(jobs, failed))
    memory = sim.fleet.find("pve1").memory
    assert all(memory.keys(rule) == ["guests/104"] for rule in ("guest-down", "backup-overdue", "backup-failed"))
    sim.now += 300
    sim.send("pve1", guests=[], backups=backups(jobs))
    assert not any(memory.keys(rule) for rule in ("guest-down", "backup-overdue", "backup-failed"))


def test_what_rules_remember_stays_while_nobody_can_tell_whether_it_is_gone(sim):  # noqa: F811
    one, other = (pool(name=name, vdevs=[{"name": "sda", "state": "ONLINE", "checksum_errors": 5}]) for name in ("tank", "data"))

    def remembered() -> set[str]:
        return {key.split("/")[1] for key in sim.fleet.find("pve1").memory.keys("vdev-errors")}

    sim.send("pve1", pools=one + other)
    for step in ({"pools": one, "errors": {"pools": {"code": "failed", "detail": "data: no answer"}}}, {"node": node()},
                 {"errors": {"pools": {"code": "timeout"}}}, {"pools": one + other}):
        sim.now += 60
        sim.send("pve1", **step)
        assert remembered() == {"tank", "data"}, step
    sim.now += 60
    sim.send("pve1", pools=one)
    assert remembered() == {"tank"}


def test_a_page_writes_nothing_that_rules_remember(sim):  # noqa: F811
    jobs = [{"id": "daily", "enabled": True, "schedule": "21:00", "guests": "all"}]
    sim.send("pve1", guests=guest(), pools=pool(usable_used_bytes=1, usable_available_bytes=1), disks=disk(),
             backups=backups(jobs))
    state = sim.fleet.find("pve1")
    state.memory, state.coverage = server.Memory(), None  # as if nothing was remembered yet
    before = {key: value for key, value in vars(state).items() if key not in ("limits", "memory")}
    server.host_row(sim.fleet, state, sim.now)
    list(server.backup_rows(state, sim.fleet, sim.now))
    for rows in (server.pool_rows, server.guest_rows, server.storage_rows, server.disk_rows):
        list(rows(state, sim.now))
    assert not state.memory.changed and json.loads(state.memory.to_json()) == {"shape": 2, "began": None, "tasks": []}
    assert before == {key: value for key, value in vars(state).items() if key not in ("limits", "memory")}


OLD_MEMORY = {
    "vdev-errors": {"pools/tank/sda": [2, 5, [[START - DAY, 3]]]}, "scrub-age": {"pools/tank": START - 50 * DAY},
    "smart-growth": {"S1": {"": [START], "pending_sectors": [3, 8]}}, "reboot-needed": {"": START - 40 * DAY},
    "guest-down": {"up": {"104": 1}, "down": {"105": [START, "was running and stopped"]}, "boot": "b1"},
    "oom": {"last": 3, "": [START, 1]}, "spool-dropped": {"": [7, START, 7]}, "tasks": [["qmstop", "104", 1, 2]],
    "backup-overdue": {"104 daily": START},
}


def test_what_the_version_before_remembered_is_understood(sim):  # noqa: F811
    sim.write(lambda db: db.execute("INSERT INTO rule_memory VALUES (1, ?)", (json.dumps(OLD_MEMORY),)))
    sim.restart()
    sim.now += 60
    sim.send("pve1", node=node(reboot_needed=True, oom_kills_total=3), agent={"dropped": 7},
             pools=pool(vdevs=[{"name": "sda", "state": "ONLINE", "checksum_errors": 5}], scan={"function": "none"}),
             disks=disk(pending_sectors=8), guests=[*guest(status="stopped"), *guest(vmid=105, status="stopped")])
    jobs = [daily(sim.now)]
    sim.send("pve1", guests=[*guest(), *guest(vmid=105, status="stopped")],
             backups=backups(jobs, good(104, sim.now - 9 * DAY)))
    assert fires(sim, "backup-overdue") == {("pve1", "guests/104")}  # and was so before the upgrade
    assert {row["rule"] for row in sim.alerts()} >= {"vdev-errors", "scrub-age", "smart-growth", "reboot-needed",
                                                     "spool-dropped"}
    for _ in range(2):
        sim.now += 180
        sim.send("pve1", guests=[*guest(status="stopped"), *guest(vmid=105, status="stopped")])
    assert fires(sim, "guest-down") == {("pve1", "guests/104"), ("pve1", "guests/105")}
