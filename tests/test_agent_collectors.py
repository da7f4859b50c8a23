"""Every collector against every recorded host; then the values that matter, checked against the recordings by hand.

expectations -> node -> cluster, guests, storages -> pools
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from recorded import HOSTS, RecordedProbe, recordings

import agent

HOST_NAMES = [path.name for path in recordings()]


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recorded hosts live in UTC: backup schedules and logs are in local time."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def collect(host: str, section: str, *, ticks: int = 1, probe: Any = None) -> tuple[dict[str, Any], Any]:
    """What the collector gives at the last of `ticks` moments: {"section"|"absent"|"error": …, "problem": …}."""
    memory: dict[str, Any] = {}
    outcome: dict[str, Any] = {}
    for tick in range(ticks):
        probe = RecordedProbe(HOSTS / host, tick)
        try:
            outcome = {"section": agent.COLLECTORS[section].function(probe, memory)}
        except agent.Absent:
            outcome = {"absent": True}
        except agent.SourceError as error:
            outcome = {"error": {"code": error.code, "detail": error.detail}}
        memory = json.loads(json.dumps(memory))  # it is kept as JSON over restarts
    if section in probe.problems:
        outcome["problem"] = probe.problems[section]
    if section == "versions" and "section" in outcome:  # this one is the machine's, not the recording's
        assert outcome["section"].pop("agent_python") == sys.version.split()[0]
    return outcome, probe


def section_of(host: str, section: str, *, ticks: int = 1) -> Any:
    return collect(host, section, ticks=ticks)[0]["section"]


def by(items: list[dict[str, Any]], key: str, value: Any) -> dict[str, Any]:
    return next(item for item in items if item[key] == value)


# expectations


@pytest.mark.parametrize("section", agent.COLLECTORS)
@pytest.mark.parametrize("host", HOST_NAMES)
def test_collector_makes_of_a_recorded_host_what_is_expected(host: str, section: str) -> None:
    outcome, _ = collect(host, section)
    got = json.loads(json.dumps(outcome))
    file = HOSTS / host / "expect" / f"{section}.json"
    assert file.is_file(), f"no {file.relative_to(HOSTS)}; got\n{json.dumps(got, indent=1, ensure_ascii=False)}"
    assert got == json.loads(file.read_text())


@pytest.mark.parametrize("section", agent.COLLECTORS)
def test_a_second_moment_is_collected_from_every_host(section: str) -> None:
    for host in HOST_NAMES:
        first, _ = collect(host, section)
        second, _ = collect(host, section, ticks=2)
        assert first.keys() - {"problem"} == second.keys() - {"problem"}, host


@pytest.mark.parametrize("host", HOST_NAMES)
def test_fast_collectors_read_files_only(host: str) -> None:
    for name, registered in agent.COLLECTORS.items():
        if registered.tick == agent.FAST:
            _, probe = collect(host, name)
            assert not [what for kind, what in probe.calls if kind == "run"], name


# node


def test_cpu_ratio_is_the_share_between_two_moments() -> None:
    # step of the recording: user 4200 system 1200 idle 17800 iowait 600 softirq 200 = 24000 jiffies
    node = section_of("pve8-mirror", "node", ticks=2)
    assert node["cpu_ratio"] == pytest.approx(5600 / 24000, abs=1e-5)
    assert node["iowait_ratio"] == pytest.approx(600 / 24000, abs=1e-5)
    assert node["steal_ratio"] == 0


def test_cpu_ratio_of_a_first_moment_is_what_pvestatd_measured_or_unknown() -> None:
    assert section_of("pve8-mirror", "node")["cpu_ratio"] == 0.0731
    assert "cpu_ratio" not in section_of("debian-plain", "node")


def test_memory_free_ratio_counts_the_arc_above_its_minimum_as_free() -> None:
    node = section_of("pve8-mirror", "node")
    free = 20971520 * 1024 + 17179869184 - 2147483648
    assert node["memory_free_ratio"] == pytest.approx(free / (65851680 * 1024), abs=1e-4)
    assert section_of("debian-plain", "node")["memory_free_ratio"] == pytest.approx(1518044 / 2018044, abs=1e-4)


def test_only_physical_interfaces_are_summed() -> None:
    node = section_of("pve9-raidz2-draid", "node")
    assert [port["name"] for port in node["interfaces"]] == ["enp65s0f0np0", "enp65s0f1np1"]
    assert node["net_receive_bytes_total"] == 961243566218 + 861243566218
    assert by(node["interfaces"], "name", "enp65s0f0np0")["receive_errors_total"] == 3


def test_a_newer_kernel_asks_for_a_reboot_unless_another_one_is_pinned() -> None:
    node = section_of("pve8-mirror", "node")
    assert (node["kernel_next"], node["reboot_needed"]) == ("6.8.12-11-pve", True)  # not -4 or -9: numbers, not text
    pinned = section_of("cluster-ha", "node")
    assert (pinned["kernel_next"], pinned["reboot_needed"]) == ("6.14.11-4-pve", False)


def test_temperatures_leave_out_drivetemp_and_tell_sensors_apart() -> None:
    assert section_of("pve8-mirror", "node")["temperatures"][0] == {
        "sensor": "coretemp-coretemp.0", "label": "Package id 0", "celsius": 52.0, "critical_celsius": 100.0,
    }  # fmt: skip
    sensors = [reading["sensor"] for reading in section_of("pve9-raidz2-draid", "node")["temperatures"]]
    assert sensors == ["k10temp-0000:00:18.3"] * 2 + ["nvme-nvme0", "nvme-nvme1"]


def test_block_devices_are_whole_disks() -> None:
    node = section_of("pve8-mirror", "node")
    assert [disk["name"] for disk in node["block_devices"]] == ["sda", "sdb", "sdc"]
    assert node["block_devices"][0]["read_bytes_total"] == 12345678 * 512
    assert node["block_devices"][0]["busy_seconds_total"] == 345.678


# cluster, guests, storages


def test_cluster_tells_votes_without_a_process() -> None:
    cluster = section_of("cluster-ha", "cluster")
    assert (cluster["name"], cluster["quorate"]) == ("prod-cluster", True)
    assert (cluster["votes_expected"], cluster["votes_present"], cluster["votes_needed"]) == (3, 3, 2)
    assert by(cluster["members"], "name", "beta") == {"name": "beta", "online": True, "address": "192.0.2.12"}


def test_guests_have_the_states_of_qemu_and_the_values_of_their_configuration() -> None:
    guests = section_of("pve8-mirror", "guests")
    assert len(guests) == 15
    assert by(guests, "vmid", 107)["status"] == "paused"
    stopped = by(guests, "vmid", 108)
    assert stopped["status"] == "stopped"
    assert not {"cpu_ratio", "memory_used_bytes", "net_receive_bytes_total"} & stopped.keys()
    assert by(guests, "vmid", 9000)["template"] is True
    web = by(guests, "vmid", 100)
    assert (web["tags"], web["onboot"], web["created_at"]) == (["prod", "web"], True, 1718000000 + 100 * 1000)
    assert web["volumes"] == [
        {"storage": "local-zfs", "dataset": "rpool/data/vm-100-disk-0", "size_bytes": 32 << 30}
    ]  # a linked clone; the snapshot's section is not the guest
    database = by(guests, "vmid", 102)
    assert database["lock"] == "backup"
    assert [volume["dataset"] for volume in database["volumes"]] == [
        "rpool/data/vm-102-disk-2",
        "rpool/data/vm-102-disk-0",
        "rpool/data/vm-102-disk-1",
    ]
    assert "disk_used_bytes" not in web and by(guests, "vmid", 200)["disk_used_bytes"] == 944103424


def test_stale_data_of_pvestatd_are_told_with_their_time() -> None:
    outcome, _ = collect("suspended-pool", "guests")
    assert outcome["problem"]["code"] == "stale"
    assert {guest["as_of"] for guest in outcome["section"]} == {1795430400 - 170 - 4}
    assert by(outcome["section"], "vmid", 101)["status"] == "io-error"  # its control group is still there


def test_ha_states_come_with_the_guests() -> None:
    guests = section_of("cluster-ha", "guests")
    assert {guest["vmid"]: guest["ha_state"] for guest in guests if "ha_state" in guest} == {
        100: "started", 101: "started", 102: "error", 120: "started",
    }  # fmt: skip
    assert not [guest for guest in guests if guest["vmid"] >= 500]  # those are on other nodes


def test_storages_tell_inactive_from_disabled_and_measure_neither() -> None:
    storages = section_of("pve8-mirror", "storages")
    assert [storage["storage"] for storage in storages] == ["local", "local-zfs", "nas-backup", "old-iscsi", "pbs-main"]
    nas, old = by(storages, "storage", "nas-backup"), by(storages, "storage", "old-iscsi")
    assert (nas["enabled"], nas["active"], "total_bytes" in nas) == (True, False, False)
    assert (old["enabled"], old["active"], "total_bytes" in old) == (False, False, False)
    zfs = by(storages, "storage", "local-zfs")
    assert (zfs["dataset"], zfs["used_bytes"]) == ("rpool/data", 418501613322)


# pools


def test_a_pool_of_openzfs_2_2_is_read_from_text() -> None:
    (pool,) = section_of("pve8-mirror", "pools")
    assert (pool["guid"], pool["state"], pool["layout"]) == ("15229773272131684388", "ONLINE", "mirror")
    assert (pool["redundancy_margin"], pool["features_disabled"], pool["data_errors"]) == (1, True, 0)
    assert pool["last_scrub"] == {
        "ended_at": 1795430400 - 8 * 86400, "duration_seconds": 24 * 60 + 43, "repaired_bytes": 0, "errors": 0,
    }  # fmt: skip
    leaves = pool["vdevs"][0]["children"]
    assert [leaf["disk"] for leaf in leaves] == ["sda", "sdb"]
    assert [leaf["slow_ios"] for leaf in leaves] == [0, 2]
    assert (pool["usable_used_bytes"], pool["usable_available_bytes"]) == (418501613322, 546983972864)
    assert pool["size_bytes"] - pool["allocated_bytes"] == pool["free_bytes"]


def test_margin_is_that_of_the_weakest_vdev_and_resilvering_is_no_redundancy() -> None:
    tank = by(section_of("pve9-raidz2-draid", "pools"), "name", "tank")
    assert tank["layout"] == "raidz2"
    assert tank["redundancy_margin"] == 0  # raidz2 with one resilvering has 1 left, the special mirror's good half 0
    assert tank["scan"] == {
        "function": "resilver", "state": "scanning", "started_at": 1795430400 - 7200,
        "progress_ratio": 0.25, "remaining_seconds": 3 * 7200, "repaired_bytes": 812345678901,
    }  # fmt: skip
    assert [vdev["class"] for vdev in tank["vdevs"]] == ["normal", "special", "log", "cache", "spare"]
    replacing = tank["vdevs"][0]["children"][2]
    assert [(leaf["state"], leaf["reason"]) for leaf in replacing["children"]] == [
        ("UNAVAIL", "missing device"),
        ("ONLINE", "resilvering"),
    ]
    assert replacing["children"][0]["path"].endswith("ddead-part1")
    assert tank["vdevs"][1]["children"][1]["reason"] == "too many errors"


def test_draid_without_type_and_state_in_json_is_still_understood() -> None:
    vault = by(section_of("pve9-raidz2-draid", "pools"), "name", "vault")
    assert (vault["layout"], vault["redundancy_margin"]) == ("draid2", 2)
    assert (vault["vdevs"][0]["type"], vault["vdevs"][0]["state"]) == ("draid2", "ONLINE")
    assert vault["scan"]["state"] == "paused" and "remaining_seconds" not in vault["scan"]
    assert vault["checkpoint_bytes"] == 123456789


def test_no_command_is_run_on_a_suspended_pool() -> None:
    outcome, probe = collect("suspended-pool", "pools")
    usb = by(outcome["section"], "name", "usb")
    assert usb == {"name": "usb", "guid": "4985857817713734144", "state": "SUSPENDED"}
    assert not [words for kind, words in probe.calls if kind == "run" and "usb" in words]
    assert by(outcome["section"], "name", "rpool")["state"] == "ONLINE"


def test_a_machine_without_zfs_runs_no_command() -> None:
    outcome, probe = collect("debian-plain", "pools")
    assert outcome == {"absent": True}
    assert not [words for kind, words in probe.calls if kind == "run"]


def test_the_last_scrub_is_remembered_when_a_resilver_overwrites_it() -> None:
    memory: dict[str, Any] = {"scrubs": {"15992233441122334455": {"ended_at": 1795000000, "errors": 0}, "1": {}}}
    pools = agent.collect_pools(RecordedProbe(HOSTS / "pve9-raidz2-draid"), memory)
    assert by(pools, "name", "tank")["last_scrub"] == {"ended_at": 1795000000, "errors": 0}
    assert "1" not in memory["scrubs"]  # of a pool that is no more
