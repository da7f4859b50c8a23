"""What operators of other monitors reported from sick hosts: a recorded host, bent until it is one of them.

Each test names where it was seen. What is right: one thing that cannot be asked darkens only itself; a disk, a pool, a
guest is the same one over reboots; a number means what its maker means.

disks -> pools -> guests and storages -> backups and schedules -> upkeep
"""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import pytest
from test_agent_collectors import FakeProbe, by, in_utc

import agent

__all__ = ["in_utc"]  # the recorded hosts live in UTC

ATA = ["-n", "standby,3", "-l", "error", "-l", "selftest"]


class BentProbe(FakeProbe):
    """A recorded host with disks of a test's own: what smartctl says of each, by what it was asked for."""

    def __init__(self, host: str = "debian-plain") -> None:
        super().__init__(host)
        self.asked: list[str] = []
        self.disks: dict[str, dict[str, Any]] = {}  # by name: sysfs, links, and answers by `-d` type ("" is none)

    def add(self, name: str, answers: dict[str, Any], *, model: str = "", link: str = "", path: str = "") -> None:
        where = path or f"/sys/devices/pci0000:00/0000:00:17.0/block/{name}"
        self.meta["links"][f"/sys/block/{name}"] = where
        self.disks[name] = answers
        self.texts[f"/sys/block/{name}/size"] = "1000215216\n"
        self.texts[f"/sys/block/{name}/queue/rotational"] = "0\n"
        self.texts[f"/sys/block/{name}/device/model"] = f"{model}\n"
        if link:
            self.meta["links"][f"/dev/disk/by-id/{link}"] = f"/dev/{name}"

    def exists(self, path: str) -> bool:
        found = re.fullmatch(r"/sys/block/([^/]+)(/device)?", path)
        return found[1] in self.disks if found else super().exists(path)

    def run(self, *argv: str, limit: float = 10.0, ok: tuple[int, ...] | None = (0,)) -> str:
        if argv[:2] != ("smartctl", "-j"):
            return super().run(*argv, limit=limit, ok=ok)
        self.asked.append(shlex.join(argv))
        kind = argv[argv.index("-d") + 1] if "-d" in argv else ""
        answer = self.disks[argv[-1].removeprefix("/dev/")].get(kind, wrong_type(kind))
        if isinstance(answer, Exception):
            raise answer
        return json.dumps(answer)

    def reboot(self) -> None:
        self.texts["/proc/sys/kernel/random/boot_id"] = "another\n"


def wrong_type(kind: str) -> dict[str, Any]:
    words = "Read Device Identity failed: scsi error unsupported field in scsi command"
    return {"smartctl": {"exit_status": 2, "messages": [{"string": words}]}, "device": {"type": kind}}


def ata(serial: str, *attributes: tuple[str, int, str], passed: bool = True, **more: Any) -> dict[str, Any]:
    table = [{"id": 1, "name": name, "value": value, "raw": {"string": raw}} for name, value, raw in attributes]
    return {"smartctl": {"exit_status": 0}, "device": {"type": "sat", "protocol": "ATA"}, "model_name": "SSD X",
            "serial_number": serial, "rotation_rate": 0, "smart_status": {"passed": passed},
            "ata_smart_attributes": {"table": table}, **more}  # fmt: skip


def sas(serial: str, *, passed: bool = True, kind: str = "scsi", **more: Any) -> dict[str, Any]:
    return {"smartctl": {"exit_status": 0}, "device": {"type": kind, "protocol": "SCSI"}, "scsi_model_name": "SAS X",
            "serial_number": serial, "rotation_rate": 7200, "smart_status": {"passed": passed}, **more}  # fmt: skip


def nvme(serial: str, **log: Any) -> dict[str, Any]:
    log = {"critical_warning": 0, "temperature": 35, "available_spare": 100, "available_spare_threshold": 10,
           "percentage_used": 3, "media_errors": 0} | log  # fmt: skip
    return {"smartctl": {"exit_status": 0}, "device": {"type": "nvme", "protocol": "NVMe"}, "model_name": "NVMe X",
            "serial_number": serial, "smart_status": {"passed": True},
            "nvme_smart_health_information_log": log}  # fmt: skip


ASLEEP = {"smartctl": {"exit_status": 3, "messages": [{"string": "Device is in STANDBY mode, exit(3)"}]},
          "device": {"type": "sat"}}  # fmt: skip
NO_BRIDGE = {"smartctl": {"exit_status": 1, "messages": [{"string": "/dev/sdb: Unknown USB bridge [0x152d:0xa562]"}]}}


# disks


def test_a_usb_bridge_that_smartctl_does_not_know_is_asked_once_as_sat_and_darkens_nothing_else() -> None:
    # https://github.com/openmediavault/openmediavault/issues/2227, https://github.com/smartmontools/smartmontools/issues/270
    probe = BentProbe()
    probe.add("sda", {"": ata("A")})
    probe.add("sdb", {"": NO_BRIDGE}, model="PH8057 DISK01")
    probe.add("sdc", {"": NO_BRIDGE, "sat": ata("C")})
    memory: dict[str, Any] = {}
    disks = agent.collect_disks(probe, memory)
    assert "Unknown USB bridge" in by(disks, "name", "sdb")["unknown_reason"]
    assert by(disks, "name", "sdb")["model"] == "PH8057 DISK01" and "passed" not in by(disks, "name", "sdb")
    assert [by(disks, "name", name)["passed"] for name in ("sda", "sdc")] == [True, True]
    assert probe.problems == {}  # the section was had
    assert [words.split()[-1] for words in probe.asked] == [f"/dev/{name}" for name in ("sda", "sdb", "sdb", "sdc", "sdc")]
    probe.asked.clear()
    agent.collect_disks(probe, memory)
    assert [words for words in probe.asked if words.endswith("/dev/sdc")] == [shlex.join(
        ["smartctl", "-j", "-i", "-H", "-A", *ATA, "-d", "sat", "/dev/sdc"])]  # fmt: skip


def test_what_is_known_of_a_disk_goes_by_its_identity_over_letters_that_move() -> None:
    # https://github.com/c0m4r/kula/issues/46, https://github.com/AnalogJ/scrutiny/issues/266 (smartctl's words)
    memory: dict[str, Any] = {}
    probe = BentProbe()
    probe.add("sda", {"": ata("SATA1"), "sat": ata("SATA1")}, model="Samsung")
    probe.add("sdb", {"": sas("SAS1"), "scsi": sas("SAS1")}, model="ST4000NM0023")
    agent.collect_disks(probe, memory)
    for with_links in (False, True):
        probe = BentProbe()
        probe.reboot()
        links = ("scsi-SAS1", "ata-SATA1") if with_links else ("", "")
        failing = sas("SAS1", passed=False)
        probe.add("sda", {"": failing, "scsi": failing}, model="ST4000NM0023", link=links[0])
        probe.add("sdb", {"": ata("SATA1"), "sat": ata("SATA1")}, model="Samsung", link=links[1])
        disks = agent.collect_disks(probe, json.loads(json.dumps(memory)))
        told = [(disk["name"], disk["serial"], disk["passed"]) for disk in disks]
        assert told == [("sda", "SAS1", False), ("sdb", "SATA1", True)]


def test_values_of_a_sleeping_disk_are_its_own_ones() -> None:
    memory: dict[str, Any] = {}
    probe = BentProbe()
    probe.add("sda", {"": ata("A", power_on_time={"hours": 1})}, link="ata-A")
    probe.add("sdb", {"": ata("B", power_on_time={"hours": 2})}, link="ata-B")
    agent.collect_disks(probe, memory)
    probe = BentProbe()
    probe.reboot()
    probe.add("sda", {"sat": ASLEEP}, link="ata-B")
    probe.add("sdb", {"sat": ASLEEP}, link="ata-A")
    disks = agent.collect_disks(probe, json.loads(json.dumps(memory)))
    assert [(disk["serial"], disk["power_on_hours"], disk["standby"]) for disk in disks] == [("B", 2, True), ("A", 1, True)]


def test_a_type_that_does_not_fit_any_more_is_given_up() -> None:
    memory: dict[str, Any] = {}
    probe = BentProbe()
    probe.add("sda", {"": sas("S")})
    agent.collect_disks(probe, memory)
    probe.disks["sda"] = {"": ata("A"), "sat": ata("A")}  # hot-plugged: the same letter within one boot
    assert by(agent.collect_disks(probe, memory), "name", "sda")["serial"] == "A"


@pytest.mark.parametrize("kind", [7, ["sat"], {}, True])
def test_a_type_that_is_no_word_is_not_asked_with(kind: Any) -> None:
    memory: dict[str, Any] = {}
    probe = BentProbe()
    probe.add("sda", {"": {**ata("A"), "device": {"type": kind}}})
    for _ in range(2):
        assert by(agent.collect_disks(probe, memory), "name", "sda")["serial"] == "A"
    assert probe.asked and not [words for words in probe.asked if "-d" in words]


def test_a_slow_smartctl_leaves_a_disk_its_identity() -> None:
    # https://github.com/prometheus-community/smartctl_exporter/issues/309
    memory: dict[str, Any] = {}
    probe = BentProbe()
    probe.add("sda", {"": ata("A", passed=False)})
    agent.collect_disks(probe, memory)
    probe.disks["sda"] = {"": agent.SourceError("timeout", "no answer"), "sat": agent.SourceError("timeout", "no answer")}
    (disk,) = agent.collect_disks(probe, memory)
    assert (disk["serial"], disk["model"], disk["listed"]) == ("A", "SSD X", True)
    assert disk["unknown_reason"] == "timeout: no answer" and "passed" not in disk
    assert len([words for words in probe.asked if "-d" in words]) == 1  # a slow disk is not asked twice
    probe.disks["sda"] = {"sat": ata("A")}
    assert "unknown_reason" not in agent.collect_disks(probe, memory)[0]


def test_paths_of_native_nvme_multipath_are_no_disks_and_the_namespace_is_asked() -> None:
    # https://github.com/netdata/netdata/issues/5744, https://github.com/md-raid-utilities/ledmon/issues/204
    probe = BentProbe()
    subsystem = "/sys/devices/virtual/nvme-subsystem/nvme-subsys3/nvme3n1"
    probe.add("nvme3n1", {"": nvme("BEHIND33")}, path=subsystem)
    probe.add("nvme3c33n1", {"": nvme("no")}, path="/sys/devices/pci0000:ae/nvme/nvme33/nvme3c33n1")
    probe.add("nvme0n1", {}, path="/sys/devices/pci0000:ae/nvme/nvme3/nvme0n1")
    probe.disks["nvme3"] = {"": nvme("BEHIND3")}
    disks = agent.collect_disks(probe, {})
    assert [(disk["name"], disk["serial"]) for disk in disks] == [("nvme0n1", "BEHIND3"), ("nvme3n1", "BEHIND33")]
    stats = "".join(f" 259 {number} {name} 1 0 8 0 1 0 8 0 0 5 5\n"
                    for number, name in enumerate(("nvme3n1", "nvme3c33n1", "nvme0n1")))  # fmt: skip
    probe.texts["/proc/diskstats"] = stats
    node = agent.collect_node(probe, {})
    assert [device["name"] for device in node["block_devices"]] == ["nvme3n1", "nvme0n1"]


def test_a_disk_has_one_row_however_many_ways_lead_to_it() -> None:
    # https://github.com/nikimaxim/zbx-smartmonitor/issues/8
    probe = BentProbe()
    probe.add("sda", {"": sas("J0")})
    probe.add("sdb", {"": sas("J0")})  # the disk's second port
    probe.add("sdc", {"": {"smartctl": {"exit_status": 4}, "device": {"type": "scsi", "protocol": "SCSI"},
                           "model_name": "MR9261-8i"}})  # fmt: skip
    probe.add("sdd", {"": ata("0123456789", model_name="USB one")})
    probe.add("sde", {"": ata("0123456789", model_name="USB two")})  # bridges all have the same serial
    probe.disks["bus/0"] = {"megaraid,0": sas("J0", kind="megaraid,0"), "megaraid,1": sas("J1", kind="megaraid,1")}
    devices = [{"name": "/dev/sda", "type": "scsi"}, *({"name": "/dev/bus/0", "type": f"megaraid,{n}"} for n in (0, 1))]
    probe.answers["smartctl --scan -j"] = json.dumps({"devices": devices})
    disks = agent.collect_disks(probe, {})
    assert [disk["name"] for disk in disks] == ["sda", "sdc", "sdd", "sde", "bus/0 megaraid,1"]
    assert by(disks, "name", "sda")["paths"] == ["sdb", "bus/0 megaraid,0"]
    assert "no verdict" in by(disks, "name", "sdc")["unknown_reason"]


def test_sdaa_is_a_disk_of_its_own() -> None:
    probe = BentProbe()
    probe.add("sda", {"": ata("A")}, link="ata-A")
    probe.add("sdaa", {"": ata("AA")}, link="ata-AA")
    probe.meta["links"]["/dev/disk/by-id/ata-AA-part1"] = "/dev/sdaa1"
    assert [(disk["name"], disk["by_id"]) for disk in agent.collect_disks(probe, {})] == [
        ("sda", "ata-A"), ("sdaa", "ata-AA")]  # fmt: skip
    assert agent.short_vdev_name("/dev/sdaa1") == "sdaa"


@pytest.mark.parametrize(
    "attributes, wear",
    [
        # smartctl_exporter's testdata of a Dell Intel S3520: 233 is Total_LBAs_Written there, 245 what is left
        ([("Total_LBAs_Written", 100, "1"), ("Percent_Life_Remaining", 4, "4")], 0.96),
        # https://github.com/hiyohiyo/CrystalDiskInfo/issues/178, 162, 201: firmware that counts the other way round
        ([("SSD_Life_Left", 14, "86")], None),
        ([("SSD_Life_Left", 14, "14")], 0.86),
        ([("SSD_Life_Left", 97, "0")], 0.03),  # the raw number is not kept
        ([("Percent_Lifetime_Remain", 84, "16")], 0.16),  # Crucial: the raw number is what is used
        ([("Percent_Lifetime_Remain", 84, "84")], None),
        ([("Percent_Lifetime_Used", 84, "16")], 0.16),
        ([("Media_Wearout_Indicator", 93, "0")], 0.07),
        ([("Media_Wearout_Indicator", 253, "0")], None),  # no percentage
        ([("Wear_Leveling_Count", 98, "31")], 0.02),  # the raw number counts erasures
        ([("Wear_Leveling_Count", 200, "0")], None),
        ([("Flash_Writes_GiB", 1, "9758"), ("Max_Erase_Count", 1, "150")], None),
        ([], None),
    ],
)
def test_wear_by_the_name_of_the_attribute(attributes: list[tuple[str, int, str]], wear: float | None) -> None:
    assert agent.parse_smart(json.dumps(ata("A", *attributes)), 0).get("wear_ratio") == wear


@pytest.mark.parametrize(
    "log, field, told",
    [
        ({"percentage_used": 255}, "wear_ratio", None),  # all bits set
        ({"percentage_used": 140}, "wear_ratio", 1.4),
        ({"available_spare": 255}, "spare_ratio", None),
        ({"available_spare": 101}, "spare_ratio", None),
        ({"available_spare_threshold": 255}, "spare_threshold_ratio", None),
        ({"critical_warning": 255}, "critical_warning", None),  # bits 6 and 7 are reserved
        ({"critical_warning": 9}, "critical_warning", 9),
        ({"temperature": -273}, "temperature_celsius", None),
        ({"temperature": 65262}, "temperature_celsius", None),
        ({"media_errors": (1 << 64) - 1}, "media_errors", None),
    ],
)
def test_reserved_values_of_nvme_are_unknown(log: dict[str, Any], field: str, told: float | None) -> None:
    assert agent.parse_smart(json.dumps(nvme("N", **log)), 0).get(field) == told


@pytest.mark.parametrize(
    "attribute, field, told",
    [
        (("Reallocated_Sector_Ct", 100, "16 (0 3)"), "reallocated_sectors", 16),
        (("Reallocated_Sector_Ct", 100, "4294967295"), "reallocated_sectors", None),
        (("Reallocated_Sector_Ct", 100, "0x00000010"), "reallocated_sectors", None),
        (("Retired_Block_Count", 100, "3"), "reallocated_sectors", 3),
        (("Later_Bad_Block", 100, "7"), "reallocated_sectors", None),
        (("Current_Pending_ECC_Cnt", 100, "1"), "pending_sectors", None),  # comes and goes on sound Crucial disks
        (("Uncorrectable_Error_Cnt", 100, "2"), "reported_uncorrectable", 2),
        (("Temperature_Celsius", 70, "30 (Min/Max 20/45)"), "temperature_celsius", 30),
        (("Temperature_Celsius", 70, "231928233999"), "temperature_celsius", None),  # packed, not unpacked
        (("Airflow_Temperature_Cel", 70, "31/45"), "temperature_celsius", 31),
    ],
)
def test_damage_and_heat_by_the_name_of_the_attribute(attribute: Any, field: str, told: int | None) -> None:
    assert agent.parse_smart(json.dumps(ata("A", attribute)), 0).get(field) == told


def test_hours_that_no_disk_has_lived_are_unknown() -> None:
    for hours, told in ((21213, 21213), (2_628_000, None), (4294967295, None)):  # five years of minutes; all bits set
        smart = agent.parse_smart(json.dumps(ata("A", power_on_time={"hours": hours})), 0)
        assert smart.get("power_on_hours") == told


def test_only_a_selftest_that_came_to_an_end_says_anything() -> None:
    now = 1_000_000_000
    hours = {"power_on_time": {"hours": 70_000}}

    def told(**log: Any) -> Any:
        return agent.parse_smart(json.dumps(ata("A") | hours | log), now).get("selftest")

    def ata_log(*rows: dict[str, Any]) -> dict[str, Any]:
        return {"ata_smart_self_test_log": {"standard": {"table": list(rows)}}}

    aborted, failed = {"status": {"value": 25}, "lifetime_hours": 4460}, {"status": {"passed": False}, "lifetime_hours": 4459}
    # ATA keeps 16 bits of the hours: 4459 + 65536 = 69995
    assert told(**ata_log(aborted, failed)) == {"passed": False, "ended_at": now - 5 * 3600}
    assert told(**ata_log(aborted)) is None
    row = {"self_test_result": {"value": 2}, "power_on_hours": 69_990}
    assert told(nvme_self_test_log={"table": [row]}) is None  # ended by a reset
    assert told(nvme_self_test_log={"table": [row, row | {"self_test_result": {"value": 7}}]})["passed"] is False
    assert told(scsi_self_test_0={"result": {"value": 2}}) is None
    assert told(scsi_self_test_0={"result": {"value": 4}, "power_on_time": {"hours": 69_999}}) == {
        "passed": False, "ended_at": now - 3600}  # fmt: skip


# pools


def test_an_import_that_looks_at_a_pool_is_no_pool() -> None:
    """`zpool import` (Proxmox runs it every 10 s while a pool is missing) loads the pool under a name with a $
    [openzfs module/zfs/spa.c spa_tryimport]."""
    probe = FakeProbe("pve8-mirror")
    for name in ("$import", "$import-12-rpool"):
        probe.meta["links"][f"/proc/spl/kstat/zfs/{name}"] = "/proc/spl/kstat/zfs/rpool"
    assert [pool["name"] for pool in agent.collect_pool_states(probe, {})] == ["rpool"]
    assert [pool["name"] for pool in agent.collect_pools(probe, {})] == ["rpool"]
    assert list(agent.look(probe, {})["pools"]) == ["rpool"]


def test_disks_know_their_place_from_the_pools_that_were_just_read() -> None:
    probe = FakeProbe("pve9-raidz2-draid")
    agent.collect_pools(probe, {})
    probe.calls.clear()
    disks = agent.collect_disks(probe, {})
    assert by(disks, "name", "sdi")["pool"] == "vault" and by(disks, "name", "sdo")["paths"] == ["sds"]
    assert not [words for kind, words in probe.calls if kind == "run" and words.startswith("zpool")]
    # a pool that hangs keeps the places it had
    probe.answers["zpool status -j --json-int -P vault"] = agent.SourceError("timeout", "no answer")
    agent.collect_pools(probe, {})
    assert by(agent.collect_disks(probe, {}), "name", "sdi")["pool"] == "vault"
    assert probe.places is not None
    probe.places["sdz"] = {"pool": "exported", "vdev": "mirror-0"}
    agent.collect_pools(probe, {})
    assert "sdz" not in probe.places


def test_on_openzfs_2_2_vdevs_have_their_guids_and_are_asked_for_them_once() -> None:
    probe = FakeProbe("pve8-mirror")
    memory: dict[str, Any] = {}
    for _ in range(2):
        (pool,) = agent.collect_pools(probe, memory)
        memory = json.loads(json.dumps(memory))
        assert [row["guid"] for row in agent.list_vdevs(pool["vdevs"])] == [
            "8140222222222222222", "8140333333333333333", "8140444444444444444"]  # fmt: skip
    assert [words for kind, words in probe.calls if words.startswith("zpool status -g")] == ["zpool status -g rpool"]
    status = probe.commands["zpool status -p -P -s rpool"]
    replaced = (status[0] / status[1]["stdout"]).read_text().replace("S6PTNX0T123457B", "S6PTNX0T999999Z")
    probe.answers["zpool status -p -P -s rpool"] = replaced
    agent.collect_pools(probe, memory)
    assert len([words for kind, words in probe.calls if words.startswith("zpool status -g")]) == 2


# guests and storages


def test_a_group_without_a_process_is_no_running_guest_and_a_group_may_have_a_number_behind_it() -> None:
    probe = FakeProbe("pve8-mirror")
    assert agent.find_running(probe) == {*range(100, 108), 200, 201, 202, 203}
    probe.texts["/sys/fs/cgroup/lxc/202/cgroup.events"] = "populated 0\nfrozen 0\n"
    # LXC makes 201-1 where the folder of an earlier run is left [lxc src/lxc/cgroups/cgfsng.c]
    probe.texts["/sys/fs/cgroup/lxc/201/cgroup.events"] = "populated 0\nfrozen 0\n"
    probe.meta["links"]["/sys/fs/cgroup/lxc/201-1"] = "/sys/fs/cgroup/lxc/200"
    assert agent.find_running(probe) == {*range(100, 108), 200, 201, 203}
    assert agent.look(probe, {})["guests"] == agent.find_running(probe)


def test_without_any_word_of_pvestatd_the_control_groups_tell_what_runs() -> None:
    probe = FakeProbe("pve8-mirror")
    probe.meta["errors"] = {agent.METRICS: ["missing", "not there"]}
    probe.texts["/etc/pve/.rrd"] = ""
    guests = agent.collect_guests(probe, {})
    assert probe.problems["guests"]["code"] == "unavailable"
    assert {guest["vmid"] for guest in guests if guest["status"] == "running"} == agent.find_running(probe)
    assert {guest["status"] for guest in guests} == {"running", "stopped"}


def running_task(probe: FakeProbe, kind: str, vmid: str, pid: int = 6699) -> None:
    """A task of the host that is at work, with its process."""
    probe.texts["/var/log/pve/tasks/active"] = f"UPID:pve8:{pid:08X}:0436A3B1:6B041000:{kind}:{vmid}:root@pam: 0\n"
    stat = "6699 (task UPID:pve8:) S " + "0 " * 18 + f"{0x0436A3B1} 0 0"
    probe.texts["/proc/6699/stat"] = stat


@pytest.mark.parametrize(
    "kind, vmid, pid, held",
    [
        ("vzdump", "102", 6699, True),
        ("vzdump", "", 6699, True),  # a backup of several
        ("qmigrate", "102", 6699, True),
        ("vzdump", "103", 6699, False),
        ("aptupdate", "", 6699, False),
        ("vzdump", "102", 6700, False),  # its worker is dead: `active` is rewritten only when somebody looks
    ],
)
def test_a_lock_is_held_only_while_a_task_is_at_work(kind: str, vmid: str, pid: int, held: bool) -> None:
    # https://github.com/prometheus-pve/prometheus-pve-exporter/issues/303, https://cr0x.net/en/proxmox-remove-vm-lock-safely
    probe = FakeProbe("pve8-mirror")
    running_task(probe, kind, vmid, pid)
    guest = by(agent.collect_guests(probe, {}), "vmid", 102)
    assert (guest["lock"], guest["lock_held"]) == ("backup", held)


def test_who_holds_a_lock_is_unknown_where_the_tasks_cannot_be_read() -> None:
    probe = FakeProbe("pve8-mirror")
    probe.meta["errors"] = {"/var/log/pve/tasks/active": ["timeout", "no answer in 2 s"]}
    guest = by(agent.collect_guests(probe, {}), "vmid", 102)
    assert guest["lock"] == "backup" and "lock_held" not in guest


def test_a_qemu_that_does_not_answer_is_told_though_proxmox_says_running() -> None:
    """vmstatus falls back to the process then: what QEMU alone can tell is missing [qemu-server PVE/QemuServer.pm]."""
    probe = FakeProbe("pve8-mirror")
    metrics = json.loads(probe.read_line(agent.METRICS))
    guests = metrics["qemu"]["data"]
    for name in ("diskread", "diskwrite", "blockstat", "running-qemu"):
        guests["101"].pop(name, None)
        guests["103"].pop(name, None)
    guests["103"]["uptime"] = 40
    probe.texts[agent.METRICS] = json.dumps(metrics)
    told = {guest["vmid"]: guest.get("responds") for guest in agent.collect_guests(probe, {})}
    assert (told[101], told[104], told[103], told[108], told[200]) == (False, True, None, None, None)


def test_storages_of_other_nodes_are_none_of_this_host_on_both_ways() -> None:
    probe, without = FakeProbe("pve8-mirror"), FakeProbe("pve8-mirror")
    limited = probe.read("/etc/pve/storage.cfg").replace("\tserver 192.0.2.20", "\tnodes other")
    probe.texts["/etc/pve/storage.cfg"] = without.texts["/etc/pve/storage.cfg"] = limited
    before = [storage["storage"] for storage in agent.collect_storages(FakeProbe("pve8-mirror"), {})]
    from_metrics = agent.collect_storages(probe, {})
    assert [storage["storage"] for storage in from_metrics] == [name for name in before if name != "nas-backup"]
    without.meta["errors"] = {agent.METRICS: ["missing", "not there"]}
    from_rrd = agent.collect_storages(without, {})
    assert [storage["storage"] for storage in from_rrd] == [storage["storage"] for storage in from_metrics]
    assert [storage["content"] for storage in from_rrd] == [storage["content"] for storage in from_metrics]
    # total − used is more than what is free, where root has a reserve
    assert not [storage for storage in from_rrd if "available_bytes" in storage]


def test_metadata_of_a_thin_pool_is_told_and_asked_for_every_ten_minutes_at_most() -> None:
    # https://github.com/thaum-xyz/ankhmorpork/issues/1350: guests with io-error behind a full one
    probe = FakeProbe("suspended-pool")
    memory: dict[str, Any] = {}
    for _ in range(3):
        storage = by(agent.collect_storages(probe, memory), "storage", "local-lvm")
        assert storage["metadata_used_ratio"] == 0.971
        memory = json.loads(json.dumps(memory))
    assert len([words for kind, words in probe.calls if kind == "run"]) == 1
    probe.answers["lvs"] = agent.SourceError("timeout", "no answer")
    probe.calls.clear()
    memory = {}
    for _ in range(2):
        assert "metadata_used_ratio" not in by(agent.collect_storages(probe, memory), "storage", "local-lvm")
    assert len([words for kind, words in probe.calls if kind == "run"]) == 1  # what hangs is not asked at each tick


@pytest.mark.parametrize("said", ['{"report": ["x"]}', '{"report": [{"lv": "x"}]}', '{"report": {}}', "[]", "no JSON"])
def test_what_lvs_says_besides_costs_no_storage(said: str) -> None:
    probe = FakeProbe("suspended-pool")
    probe.answers["lvs"] = said
    assert "metadata_used_ratio" not in by(agent.collect_storages(probe, {}), "storage", "local-lvm")


def test_members_that_a_node_without_corosync_names_are_not_known_to_be_there() -> None:
    """pmxcfs goes on saying what it knew when its corosync died, but for quorate 0 [pve-cluster src/pmxcfs/status.c]."""
    probe = FakeProbe("cluster-ha")
    members = json.loads(probe.read("/etc/pve/.members"))
    members["cluster"]["quorate"] = 0
    probe.texts["/etc/pve/.members"] = json.dumps(members)
    probe.answers["corosync-quorumtool"] = agent.SourceError("failed", "cannot initialise")
    cluster = agent.collect_cluster(probe, {})
    assert {node["name"]: node.get("online") for node in cluster["members"]} == {"alpha": True, "beta": None, "gamma": None}
    assert "votes_present" not in cluster and "cannot initialise" in cluster["unknown_reason"]


def test_a_pair_that_needs_one_vote_has_one_to_spare() -> None:
    probe = FakeProbe("cluster-qdevice")
    conf = probe.read("/etc/corosync/corosync.conf")
    two_node = re.sub(r"device \{.*?votes: 1\n  \}", "two_node: 1", conf, flags=re.DOTALL)
    probe.texts["/etc/corosync/corosync.conf"] = two_node
    cluster = agent.collect_cluster(probe, {})
    assert (cluster["votes_expected"], cluster["votes_present"], cluster["votes_needed"]) == (2, 2, 1)


# backups and schedules


def vzdump_task(probe: FakeProbe, log: str, end: str, vmid: str = "", start: int = 1795430000) -> None:
    upid = f"UPID:pve8:00000001:00000007:{start:08X}:vzdump:{vmid}:root@pam:"
    probe.texts[agent.TASK_INDEX] = f"{upid} {start + 100:08X} {end}\n"
    probe.texts[f"{agent.TASK_INDEX}.1"] = ""
    probe.texts[f"/var/log/pve/tasks/{upid.split(':')[4][-1]}/{upid}"] = log


def backups_of(probe: FakeProbe) -> dict[int, dict[str, Any]]:
    probe.meta["errors"] = {"/var/log/vzdump": ["missing", "not there"]}
    probe.answers.setdefault("find", "")
    return {guest["vmid"]: guest for guest in agent.collect_backups(probe, {})["guests"]}


def test_the_mark_of_a_line_of_vzdump_is_its_first_word() -> None:
    probe = FakeProbe("pve8-mirror")
    log = (
        "INFO: starting new backup job: vzdump 100 --storage nas --notes-template '{{guestname}} ERROR: x'\n"
        "INFO: Starting Backup of VM 100 (qemu)\nERROR: Backup of VM 100 failed - hook: INFO: not ready\n"
        "INFO: Starting Backup of VM 101 (qemu)\nINFO: Finished Backup of VM 101 (00:01:00)\n"
        "ERROR: Backup of VM 999 failed - unable to find configuration file for VM 999\n"
    )
    vzdump_task(probe, log, "job errors")
    storage, runs = agent.parse_vzdump_log(log)
    assert storage == "nas" and [run["vmid"] for run in runs] == [100, 101, 999]
    guests = backups_of(probe)
    assert guests[100]["newest_failed"]["error"] == "hook: INFO: not ready"
    assert guests[101]["newest_ok"]["storage"] == "nas"
    dated = "2026-11-23 02:00:01 INFO: Starting Backup of VM 100 (qemu)\n2026-11-23 02:00:02 ERROR: Backup of VM 100 failed - x\n"
    assert agent.parse_vzdump_log(dated)[1] == [{"vmid": 100, "ok": False, "error": "x"}]


def test_a_job_that_dies_before_its_first_guest_is_told_with_its_reason() -> None:
    # pve-manager PVE/VZDump.pm `could not activate storage …`; the same elsewhere: https://github.com/NAUbackup/VmBackup/issues/30
    probe = FakeProbe("pve8-mirror")
    words = "could not activate storage 'nas': storage 'nas' is not online"
    upid = "UPID:pve8:00000002:0000000E:6B024CA0:vzdump::root@pam:"
    state = {"state": "stopped", "msg": words, "upid": upid}
    probe.texts["/var/lib/pve-manager/jobs/vzdump-backup-7c1f1d2e-3b55.json"] = json.dumps(state)
    job = agent.collect_backups(probe, {})["jobs"][0]
    assert (job["last_state"], job["last_run_at"]) == (words, 0x6B024CA0)


def test_a_copied_archive_is_as_old_as_its_name_says() -> None:
    probe = FakeProbe("pve8-mirror")
    vzdump_task(probe, "", "OK", "103")
    now = 1795430400
    listing = [
        (now - 10, "vzdump-qemu-100-2026_01_10-02_00_00.vma.zst"),  # `cp` of an old folder
        (now - 3600, "vzdump-qemu-101-2026_11_23-09_00_00.vma.zst"),
    ]
    probe.answers["find"] = "".join(f"7\t{at}.5\t{name}\0" for at, name in listing)
    guests = backups_of(probe)
    assert guests[100]["newest_ok"] == {
        "started_at": 1768010400, "ended_at": 1768010400, "size_bytes": 7, "storage": "local"}  # fmt: skip
    assert (guests[101]["newest_ok"]["ended_at"], guests[101]["newest_ok"]["started_at"]) == (now - 3600, now - 6000)


def test_dump_folders_lie_where_the_storage_says() -> None:
    probe = FakeProbe("pve8-mirror")
    probe.texts["/etc/pve/storage.cfg"] = (
        "dir: one\n\tpath /srv/one\n\tcontent-dirs backup=old/dump,iso=isos\n\tcontent backup\n\n"
        "btrfs: two\n\tpath /srv/two\n\tcontent backup,images\n\ndir: off\n\tpath /srv/off\n\tcontent backup\n\tdisable\n\n"
        "dir: elsewhere\n\tpath /srv/x\n\tcontent backup\n\tnodes other\n"
    )
    backups_of(probe)
    listed = [words.split()[1] for kind, words in probe.calls if kind == "run" and words.startswith("find")]
    assert listed == ["/srv/one/old/dump", "/srv/two/dump"]


def test_a_job_by_pool_whose_members_cannot_be_read_selects_nobody_knows_whom() -> None:
    # https://github.com/adminsyspro/proxcenter-ui/issues/746, https://github.com/rcourtman/Pulse/issues/762
    probe = FakeProbe("pve8-mirror")
    probe.meta["errors"] = {"/etc/pve/user.cfg": ["denied", "no"]}
    job = by(agent.collect_backups(probe, {})["jobs"], "id", "vzdump.cron:1:/etc/pve")
    assert job["pool"] == "production" and "guests" not in job
    probe.meta["errors"] = {}
    probe.texts["/etc/pve/jobs.cfg"] = "vzdump: j\n\tpool nobody\n\tvmid 100\n\texclude 5\n\nvzdump: k\n\tall\n\texclude 5 6\n"
    jobs = agent.collect_backups(probe, {})["jobs"]
    assert [(job["guests"], job["exclude"], job["enabled"]) for job in jobs[:2]] == [([], [], True), ("all", [5, 6], True)]


def test_a_replication_job_that_is_being_removed_is_none_to_watch() -> None:
    probe = FakeProbe("cluster-ha")
    text = probe.read("/etc/pve/replication.cfg").replace("\trate 20\n", "\tremove_job full\n")
    probe.texts["/etc/pve/replication.cfg"] = text.replace("local: 104-0", "local: 0104-00")
    assert [job["id"] for job in agent.collect_replication(probe, {})] == ["104-0", "105-0"]


def test_tasks_are_told_again_after_a_clock_that_was_ahead() -> None:
    probe = FakeProbe("pve8-mirror")
    probe.texts[agent.TASK_INDEX] = ""
    now = probe.now()
    memory: dict[str, Any] = {}
    probe.meta["now"] = now + 10 * 365 * 86400
    agent.collect_tasks(probe, memory)
    probe.meta["now"] = now
    agent.collect_tasks(probe, memory)
    line = f"UPID:pve8:00000001:00000007:{int(now):08X}:qmstart:100:root@pam: {int(now) + 5:08X} OK\n"
    probe.texts[agent.TASK_INDEX] = line
    assert len(agent.collect_tasks(probe, memory) or []) == 1


# upkeep


def test_ha_that_was_disarmed_and_nodes_that_are_fenced_are_told() -> None:
    probe = FakeProbe("cluster-ha")
    status = json.loads(probe.read("/etc/pve/ha/manager_status"))
    status["disarm"] = {"mode": "ignore", "state": "disarmed"}
    status["node_status"]["gamma"] = "fence"
    status["service_status"]["vm:101"]["state"] = "recovery"
    probe.texts["/etc/pve/ha/manager_status"] = json.dumps(status)
    ha = agent.collect_ha(probe, {})
    assert ha["disarm"] == {"mode": "ignore", "state": "disarmed"}
    assert by(ha["nodes"], "name", "gamma")["state"] == "fence" and by(ha["services"], "id", "vm:101")["state"] == "recovery"
    assert "disarm" not in section("cluster-ha", "ha")


def section(host: str, name: str) -> Any:
    return agent.COLLECTORS[name].function(FakeProbe(host), {})


@pytest.mark.parametrize("odd", [7, True, [], {"a": 1}, ["x"]])
def test_words_of_the_cluster_that_are_none_are_unknown(odd: Any) -> None:
    """The server refuses a report with an object where it has a word, and all that is in it."""
    probe = FakeProbe("cluster-ha")
    status = json.loads(probe.read("/etc/pve/ha/manager_status"))
    status |= {"master_node": odd, "node_status": dict.fromkeys(status["node_status"], odd), "disarm": {"mode": odd, "state": "x"}}
    status["service_status"] = {name: {**service, "state": odd} for name, service in status["service_status"].items()}
    probe.texts["/etc/pve/ha/manager_status"] = json.dumps(status)
    told = agent.collect_ha(probe, {})
    assert "master" not in told and told["disarm"] == {"state": "x"}
    assert all(node.keys() == {"name"} for node in told["nodes"]) and all(service.keys() == {"id", "node"} for service in told["services"])
    members = json.loads(probe.read("/etc/pve/.members"))
    members["nodelist"] = {name: {**node, "ip": odd} for name, node in members["nodelist"].items()}
    probe = FakeProbe("cluster-ha")
    probe.texts["/etc/pve/.members"] = json.dumps(members)
    assert not [member for member in agent.collect_cluster(probe, {})["members"] if "address" in member]


@pytest.mark.parametrize("odd", [7, [], {"a": 1}, ["x"]])
def test_words_of_ceph_that_are_none_are_unknown(odd: Any) -> None:
    checks = {"OSD_DOWN": {"severity": odd, "summary": {"message": odd}, "muted": odd}, "MON_DOWN": odd}
    told = agent.parse_ceph_status(json.dumps({"health": {"status": "HEALTH_WARN", "checks": checks}}))
    assert told["checks"] == [{"name": "OSD_DOWN"}, {"name": "MON_DOWN"}]


def test_mail_that_waits_is_as_old_as_its_arrival_not_as_its_next_try() -> None:
    assert section("pve8-mirror", "mail_queue") == {
        "active": 1, "deferred": 2, "hold": 0, "incoming": 0, "oldest_at": 1795398000}  # fmt: skip
    probe = FakeProbe("pve8-mirror")
    probe.answers["find"] = ""
    assert agent.collect_mail_queue(probe, {}) == {"active": 0, "deferred": 0, "hold": 0, "incoming": 0}
    probe.answers["find"] = "".join(f"{at}.0\t{agent.POSTFIX}/deferred/A/{at}\n" for at in range(1000, 1400))
    probe.answers["head"] = ""
    agent.collect_mail_queue(probe, {})
    (looked,) = [words for kind, words in probe.calls if words.startswith("head")]
    assert len(looked.split()) == 4 + agent.QUEUE_LOOKS and looked.endswith("/1199")  # the oldest ones, and no more
    probe.answers["find"] = agent.SourceError("denied", "no")
    with pytest.raises(agent.SourceError):  # unknown is not "no mail"
        agent.collect_mail_queue(probe, {})


def test_snapshots_are_known_by_when_they_came() -> None:
    # https://github.com/jimsalterjrs/sanoid/issues/432: hourly ones that come once a day
    probe = FakeProbe("debian-zfs")
    memory: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    names = [f"autosnap_2026-11-{day:02}_0{hour}:00:01_hourly" for day in range(1, 8) for hour in range(4)]
    for hour in range(0, 96):
        present = names[: 4 * (1 + hour // 24)]
        probe.meta["now"] = 1795430400 + hour * 3600
        listing = "".join(f"tank/a@{name}\t{number + 1}\t{number}\n" for number, name in enumerate(present))
        probe.answers = {"zfs list -Hp -r -t snapshot": listing, "zfs get": ""}
        rows = agent.collect_snapshots(probe, memory)
        memory = json.loads(json.dumps(memory))
        if hour < 24:
            assert "newest_seen_at" not in rows[0]  # it may have been here for long
    assert rows[0]["newest_seen_at"] == 1795430400 + 72 * 3600
    assert rows[0]["arrival_interval_seconds"] == 86400


def test_what_closes_holes_is_asked_of_apt_only_when_a_list_has_changed() -> None:
    probe = FakeProbe("pve8-mirror")
    memory: dict[str, Any] = {}
    for _ in range(2):
        assert agent.collect_updates(probe, memory)["security"] == 2
        memory = json.loads(json.dumps(memory))
    assert len([words for kind, words in probe.calls if words.startswith("apt-get -s")]) == 1
    probe.meta.setdefault("stat", {})["/var/lib/dpkg/status"] = {"mtime": probe.now()}
    probe.answers["apt-get"] = agent.SourceError("failed", "E: broken")
    probe.answers["dpkg-query"] = ""
    assert "security" not in agent.collect_updates(probe, memory)  # unknown is not none


def test_a_certificate_that_cannot_be_read_leaves_the_others_told() -> None:
    probe = FakeProbe("pve9-raidz2-draid")
    path = "openssl x509 -in /etc/pve/nodes/pve9/pve-ssl.pem"
    probe.answers[path] = agent.SourceError("failed", "unable to load certificate")
    told = agent.collect_certificates(probe, {})
    assert "unable to load" in by(told, "file", "pve-ssl.pem")["unknown_reason"] and probe.problems == {}
    acme = by(told, "file", "pveproxy-ssl.pem")
    assert acme["expires_at"] - acme["starts_at"] == 90 * 86400


def test_a_part_that_fails_is_told_in_the_section_and_a_section_without_anything_is_an_error() -> None:
    probe = FakeProbe("pve8-mirror")
    probe.meta["errors"] = {"/proc/diskstats": ["failed", "Input/output error"], "/var/log/pve/tasks/index": ["denied", "no"]}
    sections, _, errors = agent.collect(probe, {}, ["node", "backups", "tasks"])
    assert "Input/output error" in sections["node"]["unknown_reason"] and sections["node"]["cpu_count"]
    assert "denied" in sections["backups"]["unknown_reason"] and sections["backups"]["jobs"]
    assert errors.keys() == {"tasks"}


def test_a_sensor_that_measures_nothing_has_no_temperature() -> None:
    probe = FakeProbe("debian-plain")
    files = {"temp1_input": "-128000", "temp2_input": "127500", "temp3_input": "41000", "temp3_crit": "65261850",
             "temp4_input": "", "temp5_input": "-5000", "temp5_crit": "0"}  # fmt: skip
    for name, text in {"name": "nct6775", **files}.items():
        probe.meta["links"][f"/sys/class/hwmon/hwmon0/{name}"] = "/nowhere"
        probe.texts[f"/sys/class/hwmon/hwmon0/{name}"] = f"{text}\n"
    probe.meta["links"]["/sys/class/hwmon/hwmon0"] = "/sys/class/hwmon/hwmon0"
    assert agent.read_temperatures(probe, {}) == [
        {"sensor": "nct6775", "label": "temp3", "celsius": 41.0}, {"sensor": "nct6775", "label": "temp5", "celsius": -5.0},
    ]  # fmt: skip


def test_a_storage_without_a_size_of_its_own_is_not_full() -> None:
    told = agent.build_storage("san", {"type": "iscsi", "active": 1, "total": 0, "used": 0, "avail": 0}, None, None)
    assert told["active"] is True and not told.keys() & {"total_bytes", "used_bytes", "available_bytes"}


def test_what_may_not_be_read_is_not_taken_for_nothing() -> None:
    probe = FakeProbe("pve8-mirror")
    probe.meta["errors"] = {"/var/log/vzdump": ["denied", "permission denied"]}
    assert "denied" in agent.collect(probe, {}, ["backups"])[0]["backups"]["unknown_reason"]
    # after a rotation: what lies in index.1 is not lost because it could not be read once
    probe = FakeProbe("pve8-mirror")
    line = f"UPID:pve8:00000001:00000007:{int(probe.now()):08X}:qmstart:10{{}}:root@pam: {int(probe.now()) + 5:08X} OK\n"
    probe.texts[agent.TASK_INDEX], probe.inodes[agent.TASK_INDEX] = "", 1
    memory: dict[str, Any] = {}
    agent.collect_tasks(probe, memory)
    probe.texts[agent.TASK_INDEX], probe.inodes[agent.TASK_INDEX] = line.format(2), 2
    probe.meta["errors"] = {f"{agent.TASK_INDEX}.1": ["timeout", "no answer in 2 s"]}
    with pytest.raises(agent.SourceError):
        agent.collect_tasks(probe, memory)
    probe.meta["errors"] = {}
    probe.texts[f"{agent.TASK_INDEX}.1"] = line.format(1)
    assert [task["vmid"] for task in agent.collect_tasks(probe, memory) or []] == [101, 102]
