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
    assert agent.short_vdev_name("/dev/sdaa1", "/dev/sdaa1") == "sdaa"


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
