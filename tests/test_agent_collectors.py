"""Every collector against every recorded host; then the values that matter, checked against the recordings by hand.

expectations -> node -> cluster, guests, storages -> pools
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
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


def fail_below(probe: RecordedProbe, folder: str, error: agent.SourceError) -> None:
    """Each read below this folder fails so."""
    real = probe.read

    def read(path: str, limit: int = agent.READ_LIMIT) -> str:
        if path.startswith(folder):
            raise error
        return real(path, limit)

    probe.read = read  # type: ignore[method-assign]


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
    """But for what files do not tell, and then at most every ten minutes: the second moment runs nothing."""
    for name, registered in agent.COLLECTORS.items():
        if registered.tick == agent.FAST:
            _, probe = collect(host, name, ticks=2)
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
        {"name": "scsi0", "storage": "local-zfs", "dataset": "rpool/data/vm-100-disk-0", "size_bytes": 32 << 30,
         "backup": True}
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
    assert usb.pop("unknown_reason").startswith("unavailable: suspended")
    assert usb == {"name": "usb", "guid": "4985857817713734144", "state": "SUSPENDED"}
    assert "problem" not in outcome  # the other pool is told in full: the section is well
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


# tasks

NOW = 1795430400


class FakeProbe(RecordedProbe):
    """A recorded host with some files and commands of a test's own on top."""

    def __init__(self, host: str, tick: int = 0) -> None:
        super().__init__(HOSTS / host, tick)
        self.texts: dict[str, str] = {}
        self.inodes: dict[str, int] = {}
        self.answers: dict[str, Any] = {}

    def read(self, path: str, limit: int = 4 << 20) -> str:
        if path in self.texts:
            self.calls.append(("read", path))
            return self.texts[path]
        return super().read(path, limit)

    def stat(self, path: str) -> Any:
        if path in self.texts:
            size = len(self.texts[path])
            return SimpleNamespace(st_ino=self.inodes.get(path, 7), st_size=size, st_mtime=self.now())
        return super().stat(path)

    def run(self, *argv: str, limit: float = 10.0, ok: tuple[int, ...] | None = (0,)) -> str:
        words = " ".join(argv)
        for start, answer in self.answers.items():
            if words.startswith(start):
                self.calls.append(("run", words))
                if isinstance(answer, Exception):
                    raise answer
                return answer
        return super().run(*argv, limit=limit, ok=ok)


def task_line(start: int, end: int, kind: str = "qmstart", status: str = "OK") -> str:
    return f"UPID:pve8:00001234:0000ABCD:{start:08X}:{kind}:100:root@pam: {end:08X} {status}\n"


INDEX = "/var/log/pve/tasks/index"


def test_only_tasks_that_end_after_the_first_start_are_news() -> None:
    assert section_of("pve8-mirror", "tasks") is None
    tasks = section_of("pve8-mirror", "tasks", ticks=2)
    assert [(task["type"], task["result"]) for task in tasks] == [
        ("qmstart", "error"), ("vzdump", "warning"), ("zfscreate", "ok"),
    ]  # fmt: skip
    failed = tasks[0]
    assert (failed["vmid"], failed["user"], failed["started_at"], failed["ended_at"]) == (
        109, "alice@pve", NOW - 5, NOW + 3,
    )  # fmt: skip
    assert failed["status"] == "start failed: QEMU exited with code 1"
    assert "vmid" not in tasks[2]  # zfscreate's id is a pool


def test_garbage_in_the_index_costs_only_its_own_lines() -> None:
    tasks = section_of("odd-names", "tasks", ticks=2)
    assert [(task["type"], task["result"], task.get("user")) for task in tasks] == [
        ("vzdump", "error", "alice@pve!a:b"), ("download", "ok", "root@pam"),
    ]  # fmt: skip


def test_tasks_are_followed_over_a_rotation_each_once() -> None:
    probe = FakeProbe("pve8-mirror")
    memory: dict[str, Any] = {"since": NOW - 1000}
    first, second, third, fourth = (task_line(NOW + n, NOW + n) for n in (1, 2, 3, 4))
    probe.texts[INDEX], probe.inodes[INDEX] = first, 1
    assert agent.collect_tasks(probe, memory) is None  # what is there at the start is not news
    probe.texts[INDEX] = first + second + third[:30]
    assert [task["ended_at"] for task in agent.collect_tasks(probe, memory) or []] == [NOW + 2]  # not the torn line
    assert agent.collect_tasks(probe, memory) is None
    probe.texts.update({INDEX: fourth, f"{INDEX}.1": first + second + third})
    probe.inodes.update({INDEX: 2, f"{INDEX}.1": 1})
    assert [task["ended_at"] for task in agent.collect_tasks(probe, memory) or []] == [NOW + 3, NOW + 4]
    assert agent.collect_tasks(probe, memory) is None


def test_an_inode_that_is_used_again_is_no_continuation() -> None:
    probe = FakeProbe("pve8-mirror")
    memory: dict[str, Any] = {"since": NOW - 1000}
    probe.texts[INDEX] = task_line(NOW, NOW + 1)
    agent.collect_tasks(probe, memory)
    # rotated twice while the agent was away: the same inode, longer, with other lines
    probe.texts[INDEX] = task_line(NOW + 8, NOW + 8) + task_line(NOW + 9, NOW + 9)
    probe.texts[f"{INDEX}.1"] = task_line(NOW, NOW) + task_line(NOW + 5, NOW + 5)
    ended = [task["ended_at"] for task in agent.collect_tasks(probe, memory) or []]
    assert ended == [NOW + 5, NOW + 8, NOW + 9]  # what is older than the last one seen was sent already


def test_a_quiet_index_costs_one_stat() -> None:
    probe = FakeProbe("pve8-mirror")
    memory: dict[str, Any] = {}
    agent.collect_tasks(probe, memory)
    probe.calls.clear()
    agent.collect_tasks(probe, memory)
    assert ("read", INDEX) not in probe.calls


# datasets and snapshots


def test_datasets_have_types_of_zfs_and_quotas_only_where_there_are_some() -> None:
    datasets = section_of("odd-names", "datasets")
    odd = by(datasets, "name", "my pool/data set/vm-100-disk-0")
    assert (odd["type"], odd["vmid"], odd["mounted"]) == ("filesystem", 100, False)  # named like a volume
    assert by(datasets, "name", "my pool/-rf")["volume_bytes"] == 1 << 30
    tank = section_of("pve9-raidz2-draid", "datasets")
    assert by(tank, "name", "tank/vm")["quota_bytes"] == 30000000000000
    assert "quota_bytes" not in by(tank, "name", "tank")
    secret = by(tank, "name", "tank/secret")
    assert (secret["encryption"], secret["key_available"], secret["mounted"]) == ("aes-256-gcm", False, False)
    container = by(tank, "name", "tank/vm/subvol-301-disk-0")
    assert (container["refquota_bytes"], container["vmid"]) == (20 << 30, 301)
    assert by(section_of("pve8-mirror", "datasets"), "name", "rpool/data/vm-100-disk-0")["origin"].endswith("@__base__")


def test_datasets_of_a_suspended_pool_are_unknown_not_gone() -> None:
    outcome, probe = collect("suspended-pool", "datasets")
    dark = by(outcome["section"], "name", "usb")
    assert dark.keys() == {"name", "type", "unknown_reason"} and "suspended" in dark["unknown_reason"]
    assert "problem" not in outcome and "rpool" in {dataset["name"] for dataset in outcome["section"]}
    assert not [words for kind, words in probe.calls if kind == "run" and "usb" in words]


def test_without_any_answer_there_is_no_section_that_says_none() -> None:
    outcome, _ = collect("cluster-ha", "datasets")  # its only pool does not answer
    assert "section" not in outcome and outcome["error"]["code"] == "timeout"


def test_snapshots_are_grouped_by_tool_with_their_rhythm() -> None:
    sets = section_of("pve8-mirror", "snapshots")
    daily = next(one for one in sets if one["class"] == "autosnap_daily")
    assert (daily["dataset"], daily["count"], daily["interval_seconds"]) == ("rpool/data/vm-102-disk-0", 30, 86400)
    assert daily["newest_name"] == "autosnap_2026-11-22_00:00:01_daily"
    assert daily["newest_at"] == 1795305601  # 2026-11-22 00:00:01 UTC
    assert daily["oldest_at"] == 1795305601 - 29 * 86400
    assert isinstance(daily["newest_guid"], str)
    assert {(one["dataset"], one["class"]) for one in sets if one["class"] in ("pve", "other")} == {
        ("rpool/data/base-9000-disk-0", "pve"), ("rpool/data/vm-100-disk-0", "pve"),
        ("rpool/data/subvol-200-disk-0", "pve"), ("rpool/ROOT/pve-1", "other"),
    }  # fmt: skip
    classes = {one["class"] for one in section_of("cluster-ha", "snapshots")}
    assert classes == {"__replicate_100-0", "__replicate_104-0", "syncoid", "zrepl"}


def test_only_new_snapshots_are_asked_for_their_time() -> None:
    _, probe = collect("pve8-mirror", "snapshots", ticks=2)
    asked = [words for kind, words in probe.calls if kind == "run" and "creation" in words]
    assert asked == ["zfs get -Hp -o name,value creation rpool/data/vm-100-disk-0@after_upgrade"]
    sets = section_of("pve8-mirror", "snapshots", ticks=2)
    guest = next(one for one in sets if one["dataset"] == "rpool/data/vm-100-disk-0")
    assert (guest["count"], guest["newest_name"], guest["newest_at"]) == (2, "after_upgrade", NOW + 10)


def test_space_and_waits_of_vdevs_are_read_beyond_blank_lines_and_asked_for_each_half_hour() -> None:
    pools = section_of("pve9-raidz2-draid", "pools")
    raid, special, log, cache, spare = by(pools, "name", "tank")["vdevs"]
    assert [vdev.get("size_bytes") for vdev in (raid, special, log, cache, spare)] == [
        83603117858816, 479500000000, 10737418240, 200000000000, None]
    assert special["allocated_bytes"] == 288000000000 and raid["children"][0]["read_wait_seconds"] == 0.007192
    assert not {"allocated_bytes", "read_wait_seconds"} & by(pools, "name", "vault")["vdevs"][0].keys()  # no answer
    missing = next(leaf for leaf in agent.list_vdevs([raid]) if leaf["state"] == "UNAVAIL")
    assert "read_wait_seconds" not in missing
    _, probe = collect("pve9-raidz2-draid", "pools", ticks=2)
    assert not [what for kind, what in probe.calls if what.startswith("zpool iostat")]


def test_what_snapshots_hold_is_added_up_by_class_and_asked_for_every_six_hours() -> None:
    sets = section_of("pve9-raidz2-draid", "snapshots")
    daily, hourly = (by([row for row in sets if row["dataset"] == "rpool/data/vm-102-disk-0"], "class", f"autosnap_{word}")
                     for word in ("daily", "hourly"))
    assert daily["used_bytes"] == 27 * 18874368 + 4096 * sum(range(0, 216, 8)) > hourly["used_bytes"] > 27 * 90112
    assert "used_bytes" not in by(sets, "dataset", "tank/vm/vm-101-disk-0")  # not recorded: not known, and not 0
    _, probe = collect("pve9-raidz2-draid", "snapshots", ticks=2)
    assert not [what for kind, what in probe.calls if what.endswith("name,used rpool")]


def test_a_change_of_a_guests_settings_is_told_with_their_names_for_an_hour() -> None:
    assert not any("config_changed" in guest for guest in section_of("pve8-mirror", "guests"))
    changed = [guest for guest in section_of("pve8-mirror", "guests", ticks=2) if "config_changed" in guest]
    assert [(guest["vmid"], guest["config_changed"]) for guest in changed] == [(103, ["cores", "memory"])]
    now = RecordedProbe(HOSTS / "pve8-mirror", 1).now()
    assert changed[0]["config_changed_at"] == now


@pytest.mark.parametrize("before", [{}, {"settings": {}}, {"settings": {"memory": 1, "parent": 5}}])
def test_a_lock_or_a_first_look_is_no_change_of_settings(before: dict[str, Any]) -> None:
    assert agent.note_change(before, {"settings": {"memory": 1, "lock": 2}}, 9.0) == {}
    kept = {"config_changed": ["cores"], "config_changed_at": 5}
    assert agent.note_change({**before, **kept}, {}, 9.0) == kept


def test_ten_thousand_snapshots_cost_two_listings_once_and_one_from_then_on() -> None:
    names = [f"rpool/d{n % 40}@autosnap_{n:05d}_hourly" for n in range(10_000)]
    probe = FakeProbe("pve8-mirror")
    probe.answers["zfs list -Hp -r -t snapshot -o name,guid,createtxg"] = "".join(
        f"{name}\t{number + 1}\t{number}\n" for number, name in enumerate(names)
    )
    probe.answers["zfs list -Hp -r -t snapshot -o name,creation"] = "".join(
        f"{name}\t{1795000000 + number}\n" for number, name in enumerate(names)
    )
    memory: dict[str, Any] = {}
    sets = agent.collect_snapshots(probe, memory)
    assert (len(sets), sum(one["count"] for one in sets), sets[0]["interval_seconds"]) == (40, 10_000, 40)
    assert len(memory["created"]) == 40 * 22  # the oldest and the last 21 of each
    probe.calls.clear()
    agent.collect_snapshots(probe, memory)
    assert len([words for kind, words in probe.calls if kind == "run"]) == 1


# backups


def test_backups_tell_the_newest_good_and_failed_run_of_each_guest() -> None:
    backups = section_of("pve8-mirror", "backups")
    guests = {guest["vmid"]: guest for guest in backups["guests"]}
    start = NOW - 30800
    assert guests[100]["newest_ok"] == {
        "ended_at": start + 300, "started_at": start, "duration_seconds": 300, "storage": "pbs-main",
        "excluded_disks": [],
    }  # fmt: skip
    assert guests[102]["newest_ok"]["excluded_disks"] == ["scsi1"]  # a success that does not hold that disk
    assert guests[104]["newest_failed"] == {
        "ended_at": start + 300 + 1800 + 12, "error": "VM 104 qmp command 'backup' failed - got timeout",
    }  # fmt: skip
    assert guests[104]["newest_ok"]["ended_at"] == NOW - 86400 - 30800 + 240  # the night before, from index.1
    assert guests[101]["newest_ok"]["size_bytes"] == 4520345600  # exact, from the dump folder
    assert guests[202]["newest_ok"] == {
        "ended_at": NOW - 20 * 86400, "started_at": NOW - 20 * 86400, "size_bytes": 812345678, "storage": "local",
    }  # fmt: skip
    assert guests[203]["newest_ok"]["ended_at"] == NOW - 3 * 86400 + 31  # only /var/log/vzdump knows it
    assert 105 not in guests  # a .dat is not a backup yet


def test_backup_jobs_come_with_coverage_and_their_next_run() -> None:
    jobs = {job["id"]: job for job in section_of("pve8-mirror", "backups")["jobs"]}
    nightly = jobs["backup-7c1f1d2e-3b55"]
    assert (nightly["guests"], nightly["exclude"], nightly["last_state"]) == ("all", [107, 9000], "job errors")
    assert nightly["next_run_at"] == 1795485600  # 2026-11-24 02:00 UTC
    weekly = jobs["backup-weekly-nas"]
    assert (weekly["enabled"], weekly["guests"], weekly.get("next_run_at")) == (False, [101, 110], None)
    migrated = jobs["vzdump.cron:1:/etc/pve"]
    assert (migrated["pool"], migrated["next_run_at"]) == ("production", 1795437000)  # monday 12:30
    assert migrated["guests"] == [101, 105, 106]  # of user.cfg, 106 in a pool within the pool
    assert (nightly["last_run_at"], weekly.get("last_run_at")) == (NOW - 30800, None)
    cron = jobs["cron:5"]  # of an older release, which cron still runs
    assert (cron["guests"], cron["schedule"], cron["storage"]) == ([102, 103], "sat 22:45", "local")
    assert cron["due_times"][-1] == 1795301100  # saturday 2026-11-21 22:45
    (odd,) = section_of("odd-names", "backups")["jobs"]
    assert "next_run_at" not in odd and odd["guests"] == [100, 101]


def test_a_container_backup_without_its_mount_point_says_so() -> None:
    guests = section_of("pve9-raidz2-draid", "backups")["guests"]
    assert by(guests, "vmid", 300)["newest_ok"]["excluded_disks"] == ["mp0"]
    assert not [guest for guest in guests if guest["vmid"] == 108]  # stopped for migration, not in the log


def test_a_dump_folder_on_a_suspended_pool_or_far_away_is_not_listed() -> None:
    _, probe = collect("suspended-pool", "backups")
    assert not [words for kind, words in probe.calls if words.startswith("find")]
    probe = FakeProbe("pve8-mirror")
    probe.texts["/proc/mounts"] = "rpool / zfs rw 0 0\nnas:/x /var/lib/vz nfs4 rw 0 0\n"
    agent.collect_backups(probe, {})
    assert not [words for kind, words in probe.calls if words.startswith("find")]


# replication and ha


def test_replication_is_told_by_the_node_that_has_the_guest() -> None:
    jobs = section_of("cluster-ha", "replication")
    assert [job["id"] for job in jobs] == ["100-0", "104-0", "105-0"]  # not 500-0: beta's
    assert (jobs[0]["last_sync_at"], jobs[0]["fail_count"], jobs[0]["enabled"]) == (NOW - 298, 0, True)
    assert (jobs[1]["fail_count"], jobs[1]["schedule"]) == (17, "*/15")
    assert jobs[1]["error"].startswith("command 'zfs send")
    assert jobs[2]["enabled"] is False and "last_sync_at" not in jobs[2]


def test_a_state_file_full_of_nul_is_unknown_not_never_synced() -> None:
    outcome, _ = collect("cluster-no-quorum", "replication")
    assert outcome["section"][0]["unknown_reason"].startswith("garbage: replication state")
    assert "fail_count" not in outcome["section"][0]


def test_ha_tells_an_active_manager_from_a_dead_one() -> None:
    ha = section_of("cluster-ha", "ha")
    assert (ha["manager"], ha["master"]) == ("active", "beta")
    assert by(ha["services"], "id", "vm:102") == {"id": "vm:102", "node": "alpha", "state": "error"}
    assert ha["lrm"] == {"state": "active", "mode": "active", "as_of": NOW - 4}
    lost = section_of("cluster-no-quorum", "ha")
    assert (lost["manager"], lost["lrm"]["state"]) == ("dead", "lost_agent_lock")


def test_a_cluster_without_quorum_is_told_with_its_votes() -> None:
    cluster = section_of("cluster-no-quorum", "cluster")
    assert (cluster["quorate"], cluster["votes_expected"], cluster["votes_present"]) == (False, 3, 1)
    assert by(cluster["members"], "name", "pve3") == {"name": "pve3", "online": False}  # no address known


def test_votes_that_corosync_conf_cannot_explain_are_asked_for() -> None:
    probe = FakeProbe("cluster-no-quorum")
    members = json.loads(probe.read("/etc/pve/.members"))
    members["cluster"]["quorate"] = 1  # somebody ran `pvecm expected 1`
    probe.texts["/etc/pve/.members"] = json.dumps(members)
    probe.answers["corosync-quorumtool -siH"] = "Expected votes:   1\nTotal votes:      1\nQuorum:           1\n"
    cluster = agent.collect_cluster(probe, {})
    assert (cluster["votes_expected"], cluster["votes_present"], cluster["votes_needed"]) == (1, 1, 1)


# services and time


def test_services_leave_out_what_is_not_installed() -> None:
    services = section_of("pve8-mirror", "services")
    smartd = by(services, "unit", "smartmontools.service")
    assert (smartd["active"], smartd["sub"], smartd["enabled"], smartd["restarts"]) == (
        "failed",
        "failed",
        "enabled",
        5,
    )
    assert "corosync.service" not in [service["unit"] for service in services]
    assert section_of("pve8-mirror", "failed_units") == ["smartmontools.service", "zfs-import@old.service"]
    assert by(section_of("suspended-pool", "services"), "unit", "pvestatd.service")["restarts"] == 41


def test_time_sync_takes_chrony_then_the_kernel_and_makes_no_offset_up() -> None:
    assert section_of("pve8-mirror", "time_sync") == {
        "source": "chrony", "synchronised": True, "offset_seconds": 0.000123456, "stratum": 3,
    }  # fmt: skip
    assert section_of("cluster-ha", "time_sync") == {"source": "chrony", "synchronised": False}
    assert section_of("debian-plain", "time_sync") == {"source": "kernel", "synchronised": False}


# disks


def test_ata_disks_are_read_with_packed_raw_values() -> None:
    disks = section_of("pve8-mirror", "disks")
    samsung, worn, seagate = disks
    assert (samsung["name"], samsung["pool"], samsung["vdev"]) == ("sda", "rpool", "mirror-0")
    assert (samsung["wwn"], samsung["wear_ratio"], samsung["crc_errors"]) == ("0x5002538f1234567a", 0.09, 3)
    assert samsung["selftest"] == {"passed": True, "ended_at": NOW - (16789 - 16700) * 3600}
    assert (worn["temperature_celsius"], worn["wear_ratio"], worn["reallocated_sectors"]) == (35, 0.88, 6)
    assert (seagate["kind"], seagate["pending_sectors"], seagate["uncorrectable_errors"]) == ("hdd", 16, 16)
    assert "wear_ratio" not in seagate and "pool" not in seagate
    assert (seagate["temperature_celsius"], seagate["selftest"]["passed"]) == (29, False)
    assert all(disk["by_id"].startswith("ata-") and "-part" not in disk["by_id"] for disk in disks)


def test_a_sleeping_disk_keeps_its_last_values_with_their_time_and_is_not_woken() -> None:
    outcome, probe = collect("pve8-mirror", "disks", ticks=2)
    seagate = by(outcome["section"], "name", "sdc")
    assert (seagate["standby"], seagate["as_of"], seagate["pending_sectors"]) == (True, NOW, 16)
    (asked,) = [words for kind, words in probe.calls if words.startswith("smartctl") and words.endswith("/dev/sdc")]
    assert "-n standby,3" in asked and "-d sat" in asked  # detecting the type alone may wake it
    fresh = by(section_of("pve9-raidz2-draid", "disks"), "name", "sdp")
    assert fresh["standby"] is True and "passed" not in fresh  # nothing is known of it yet
    assert fresh["model"].startswith("WUH721414AL") or fresh["model"].startswith("WDC")


def test_nvme_and_sas_disks_have_the_same_fields() -> None:
    disks = section_of("pve9-raidz2-draid", "disks")
    worn = by(disks, "name", "nvme1n1")
    assert (worn["kind"], worn["wear_ratio"], worn["spare_ratio"], worn["spare_threshold_ratio"]) == (
        "nvme", 1.04, 0.09, 0.1,
    )  # fmt: skip
    assert (worn["media_errors"], worn["critical_warning"], worn["passed"]) == (3, 1, False)
    grown = by(disks, "name", "sdd")
    assert (grown["reallocated_sectors"], grown["uncorrectable_errors"]) == (24, 8)
    assert (grown["wwn"], grown["model"], grown["firmware"]) == ("0x5000cca29063d003", "WDC WUH721414AL5204", "C240")
    assert (grown["pool"], grown["vdev"]) == ("tank", "raidz2-0")
    intel = by(disks, "name", "sdr")
    assert (intel["wear_ratio"], intel["passed"], intel["vdev"]) == (0.97, False, "mirror-1")
    assert by(disks, "name", "sdi")["vdev"] == "draid2:4d:8c:1s-0"


def test_one_disk_that_does_not_answer_costs_only_its_own_values() -> None:
    outcome, _ = collect("pve9-raidz2-draid", "disks")
    silent = by(outcome["section"], "name", "sdc")
    assert silent["unknown_reason"].startswith("timeout: smartctl") and "problem" not in outcome
    assert "passed" not in silent and silent["size_bytes"] == 14000519643136 and silent["listed"]
    assert len(outcome["section"]) == 20


def test_disks_behind_a_raid_controller_are_found_by_scan_and_told_apart_by_serial() -> None:
    probe = FakeProbe("cluster-no-quorum")
    volume = {
        "smartctl": {"exit_status": 4},
        "device": {"type": "scsi", "protocol": "SCSI"},
        "model_name": "AVAGO MR9361",
    }
    member = {
        "smartctl": {"exit_status": 0},
        "device": {"type": "megaraid,8", "protocol": "SCSI"},
        "rotation_rate": 7200,
        "smart_status": {"passed": True},
        "serial_number": "S1",
        "scsi_model_name": "HGST X",
    }
    devices = [{"name": "/dev/bus/0", "type": f"megaraid,{number}"} for number in (8, 9)]
    probe.answers = {
        "smartctl --scan -j": json.dumps({"devices": [{"name": "/dev/sda", "type": "scsi"}, *devices]}),
        "smartctl -j -i -H -A -n standby,3 -l error -l selftest /dev/sda": json.dumps(volume),
        "smartctl -j -i -H -A -n standby,3 -l error -l selftest -d megaraid": json.dumps(member),
    }
    disks = agent.collect_disks(probe, {})
    assert [disk["name"] for disk in disks] == ["sda", "bus/0 megaraid,8"]  # 9 is the same disk by another way
    assert "passed" not in disks[0]  # a volume has no SMART: unknown, not failed
    assert (disks[1]["serial"], disks[1]["passed"], disks[1]["kind"]) == ("S1", True, "hdd")


# upkeep


def test_updates_that_were_done_since_the_list_was_written_are_not_pending() -> None:
    assert section_of("pve8-mirror", "updates")["pending"] == 4
    assert section_of("pve8-mirror", "updates")["security"] == 2  # by apt: in Proxmox's list all have Origin Debian
    assert section_of("pve9-raidz2-draid", "updates")["security"] == 0
    later = section_of("pve9-raidz2-draid", "updates")  # qemu-server was upgraded meanwhile
    assert (later["pending"], later["packages"], later["as_of"]) == (2, ["pve-manager", "openssl"], NOW - 30 * 3600)
    assert collect("odd-names", "updates")[0]["error"]["code"] == "garbage"


def test_certificates_and_subscription_tell_dates_and_no_secrets() -> None:
    certificates = section_of("pve9-raidz2-draid", "certificates")
    custom = by(certificates, "file", "pveproxy-ssl.pem")
    assert (custom["expires_at"], custom["acme"]) == (NOW + 22 * 86400, True)
    assert by(certificates, "file", "pve-ssl.pem")["acme"] is False
    assert section_of("pve8-mirror", "subscription") == {
        "status": "active", "level": "c", "next_due_at": 1806451200,  # 2027-03-31
    }  # fmt: skip
    assert section_of("cluster-ha", "subscription") == {"status": "notfound"}
    for host in HOST_NAMES:
        for section in ("subscription", "certificates"):
            text = json.dumps(collect(host, section)[0])
            assert "-0123456789" not in text and "CERTIFICATE" not in text and "0123456789ABCDEF" not in text


def test_versions_tell_module_and_tools_of_zfs_apart() -> None:
    versions = section_of("pve9-raidz2-draid", "versions")
    assert (versions["pve"], versions["zfs_module"], versions["zfs_userland"]) == ("9.1.2", "2.3.4-pve1", "2.3.4-pve1")
    assert (versions["qemu"], versions["smartctl"]) == ("10.1.2-3", "7.5-pve2")
    assert section_of("debian-plain", "versions") == {"smartctl": "7.3-1+b1"}


def test_ceph_is_told_only_where_it_is_set_up() -> None:
    assert collect("pve8-mirror", "ceph")[0] == {"absent": True}
    ceph = section_of("cluster-ha", "ceph")
    assert (ceph["health"], ceph["checks"][0]["name"]) == ("HEALTH_WARN", "OSD_NEARFULL")


# what goes wrong


def test_an_empty_etc_pve_is_an_error_not_a_host_without_guests() -> None:
    probe = FakeProbe("pve8-mirror")
    gone = agent.SourceError("missing", "/etc/pve: not there")
    fail_below(probe, "/etc/pve", gone)
    probe.texts["/run/pve/metrics"] = ""
    for section in ("guests", "cluster", "storages", "backups", "replication", "ha", "certificates"):
        with pytest.raises(agent.SourceError) as caught:
            agent.COLLECTORS[section].function(probe, {})
        assert caught.value.code == "unavailable", section


def test_guests_are_told_from_pvestatd_while_etc_pve_hangs() -> None:
    probe = FakeProbe("pve8-mirror")
    slow = agent.SourceError("timeout", "/etc/pve/.version: no answer in 5 s")
    fail_below(probe, "/etc/pve", slow)
    guests = agent.collect_guests(probe, {})
    assert len(guests) == 15 and by(guests, "vmid", 107)["status"] == "paused"
    assert probe.problems["guests"]["code"] == "timeout"
    assert "volumes" not in guests[0]  # in the configuration, which is not known now


def test_a_part_that_pvestatd_left_out_comes_from_rrd() -> None:
    probe = FakeProbe("pve9-raidz2-draid")
    snapshot = json.loads(probe.read_line("/run/pve/metrics"))
    del snapshot["qemu"]
    probe.texts["/run/pve/metrics"] = json.dumps(snapshot) + "\n"
    guests = agent.collect_guests(probe, {})
    assert len(guests) == 26
    machine, container = by(guests, "vmid", 101), by(guests, "vmid", 301)
    assert (machine["status"], machine["as_of"]) == ("running", NOW - 4)
    assert by(guests, "vmid", 106)["status"] == "io-error"
    assert container["status"] == "running" and "as_of" not in container


def test_values_beyond_2_63_are_unknown() -> None:
    assert "net_receive_bytes_total" not in by(section_of("odd-names", "guests"), "vmid", 100)
    null = by(section_of("odd-names", "pools"), "name", "null")
    assert "read_errors" not in null["vdevs"][0]["children"][1]
    assert null["guid"] == "18446744073709551557"  # a guid may be that large


def test_damaged_files_are_asked_for_once_and_with_hostile_names() -> None:
    memory: dict[str, Any] = {}
    probe = RecordedProbe(HOSTS / "odd-names")
    pool = by(agent.collect_pools(probe, memory), "name", "my pool")
    assert pool["data_errors"] == 3
    assert pool["damaged_files"] == [
        "/my pool/data set/<script>alert(1)</script>.raw", "my pool/data set:<0x1>", "<metadata>:<0x3f>",
    ]  # fmt: skip
    probe.calls.clear()
    again = by(agent.collect_pools(probe, memory), "name", "my pool")
    assert again["damaged_files"] == pool["damaged_files"]
    assert not [words for kind, words in probe.calls if " -v " in words]


def test_one_pool_that_hangs_leaves_the_others_reported() -> None:
    probe = FakeProbe("pve9-raidz2-draid")
    probe.answers["zpool status -j --json-int -P tank"] = agent.SourceError("stuck", "process 9 hangs in the kernel")
    pools = agent.collect_pools(probe, {})
    assert [pool["name"] for pool in pools] == ["rpool", "tank", "vault"]
    tank = by(pools, "name", "tank")
    assert tank.pop("unknown_reason") == "stuck: process 9 hangs in the kernel"
    assert tank == {"name": "tank", "guid": "15992233441122334455", "state": "DEGRADED"}
    assert probe.problems == {}
    assert not [words for kind, words in probe.calls if words.startswith("zpool list") and words.endswith("tank")]


def test_tools_without_json_on_a_newer_module_are_read_as_text() -> None:
    probe = FakeProbe("pve8-mirror")
    probe.texts["/sys/module/zfs/version"] = "2.3.9-1\n"
    (pool,) = agent.collect_pools(probe, {})  # `zpool status -j` gives exit code 2 there
    assert (pool["layout"], pool["redundancy_margin"]) == ("mirror", 1)


@pytest.mark.parametrize("section", agent.COLLECTORS)
@pytest.mark.parametrize("noise", ["", "\0" * 100, "<html>", "[]", "{}", "null", '{"a":[]}', "1\n2\n3\n", ":" * 50])
def test_noise_from_every_source_is_an_error_or_unknown_never_an_exception(section: str, noise: str) -> None:
    probe = FakeProbe("cluster-ha")
    probe.read = lambda path, limit=0: noise  # type: ignore[method-assign,assignment,misc]
    probe.read_line = lambda path, limit=0: noise  # type: ignore[method-assign,assignment,misc]
    probe.run = lambda *argv, **options: noise  # type: ignore[method-assign,assignment]
    try:
        json.dumps(agent.COLLECTORS[section].function(probe, {}))
    except (agent.SourceError, agent.Absent):
        pass
