"""Text to values: numbers, dates, Linux, Proxmox, ZFS in both forms, SMART; then garbage of every kind.

    numbers and dates -> linux -> proxmox -> zpool status -> layout and margin -> tasks, backups, schedules -> fuzz
"""

from __future__ import annotations

import ast
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agent


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


# numbers and dates


@pytest.mark.parametrize(
    "value, number",
    [
        ("5.63781757807018e-05", 5.63781757807018e-05),  # .rrd writes exponents
        ("0.00", 0.0),  # and CT pressures are text
        ("42", 42),
        (-1, -1),
        ("U", None),
        ("", None),
        ("-", None),
        ("nan", None),
        ("1e999", None),
        (True, None),  # a flag is no number
        (None, None),
        ([1], None),
    ],
)
def test_to_number_takes_numbers_and_nothing_else(value: Any, number: Any) -> None:
    assert agent.to_number(value) == number


@pytest.mark.parametrize(
    "value, count",
    [
        (0, 0),
        ("9223372036854775807", 9223372036854775807),
        ("9223372036854775808", None),  # a negative counter printed as unsigned
        (18446744073709551567, None),
        (-1, None),
        ("1.9", 1),
    ],
)
def test_to_count_takes_what_can_be_a_counter(value: Any, count: Any) -> None:
    assert agent.to_count(value) == count


@pytest.mark.parametrize(
    "text, size",
    [("26.5K", 27136), ("0B", 0), ("1234", 1234), ("2.31T", int(2.31 * 1024**4)), ("32G", 32 << 30), ("4.21GB", None)],
)
def test_to_size_reads_units_of_1024(text: str, size: int | None) -> None:
    assert agent.to_size(text) == (size if size is not None else int(4.21 * 1024**3))


@pytest.mark.parametrize("text", ["", "K", "-", "-5K", "x", "1.2.3K", "inf"])
def test_to_size_of_something_else_is_unknown(text: str) -> None:
    assert agent.to_size(text) is None


@pytest.mark.parametrize(
    "text, seconds",
    [("00:01:02", 62), ("1 days 02:55:32", 96932), ("0 days 00:00:09", 9), ("27:00:00", 97200), ("soon", None)],
)
def test_to_seconds_reads_durations_of_all_versions(text: str, seconds: int | None) -> None:
    assert agent.to_seconds(text) == seconds


@given(st.integers(0, 4_000_000_000))
def test_dates_are_unix_seconds(at: int) -> None:
    day = time.gmtime(at)
    assert agent.to_unix(time.strftime("%Y-%m-%d", day), time.strftime("%H:%M:%S", day)) == at
    assert agent.parse_ctime(time.strftime("%a %b %e %H:%M:%S %Y", day)) == at
    assert agent.parse_ctime(time.strftime("%a %b %e %H:%M:%S UTC %Y", day)) == at


# linux


def test_cpu_ratios_do_not_fall_below_zero_when_iowait_goes_backwards() -> None:
    ratios = agent.parse_cpu_ratios([0, 0, 0, 100, 50, 0, 0, 0], [10, 0, 0, 190, 40, 0, 0, 0])
    assert ratios == {"cpu_ratio": 0.1, "iowait_ratio": 0.0, "steal_ratio": 0.0}


def test_cpu_ratios_over_a_reboot_are_unknown() -> None:
    assert agent.parse_cpu_ratios([0, 0, 0, 900, 0, 0, 0, 0], [1, 0, 0, 20, 0, 0, 0, 0]) == {}


def test_interface_names_may_hold_colons_and_dots() -> None:
    text = "x\nx\nlan:1: 5 1 2 0 0 0 0 0 7 1 3 0 0 0 0 0\neth0.20:9 1 0 0 0 0 0 0 8 1 0 0 0 0 0 0\n"
    assert agent.parse_net_dev(text) == {"lan:1": [5, 2, 7, 3], "eth0.20": [9, 0, 8, 0]}


def test_diskstats_of_old_and_new_kernels_are_read_alike() -> None:
    old = "   8       0 sda 1 2 30 4 5 6 70 8 0 90 99"
    new = "   8      16 sdb 1 2 30 4 5 6 70 8 0 90 99 1 2 3 4 5 6"
    assert agent.parse_diskstats(f"{old}\n{new}\ntorn 1") == {"sda": [30, 70, 90], "sdb": [30, 70, 90]}


def test_kernels_are_sorted_by_numbers() -> None:
    releases = ["6.8.12-9-pve", "6.8.12-11-pve", "6.14.8-2-bpo12-pve", "6.8.4-2-pve"]
    assert sorted(releases, key=agent.version_key)[-1] == "6.14.8-2-bpo12-pve"
    assert sorted(releases, key=agent.version_key)[-2] == "6.8.12-11-pve"


# proxmox


RRD = """\
pve2-node/b:10::100:0.5:4:0.1:0.0:1:1:0:0:1:1:0:0
pve-node-9.0/a:10:c:200:1.5:4:0.1:0.0:1:1:0:0:1:1:0:0:9:9:0:0:0:0:0
pve2.3-vm/100:5:old:running:0:90:1:U:1:1:1:0:0:0:0:0
pve-vm-9.0/100:6:new:paused:0:95:1:5.6e-05:1:1:1:0:0:0:0:0:77:0:0:0:0:0:0
pve-vm-12.0/200:60:future:running:0:99:1:0.1
pve-storage-9.0/a/nas.backup-1:300:10:4
pve2-storage/b/x:300:10:4
garbage line without key
pve-vm-9.0/105:torn
pve-unknown-9.0/x:1:2:3:4:5
"""


def test_rrd_of_a_mixed_cluster_takes_the_newest_line_and_leaves_torn_ones_out() -> None:
    rrd = agent.parse_rrd(RRD)
    assert sorted(rrd["node"]) == ["a", "b"]
    assert rrd["vm"]["100"]["name"] == "new" and rrd["vm"]["100"]["memhost"] == "77"
    assert rrd["vm"]["200"]["cpu"] == "0.1"
    assert sorted(rrd["vm"]) == ["100", "200"]
    assert rrd["storage"]["a/nas.backup-1"] == {"ctime": "300", "total": "10", "used": "4"}


def test_sections_take_flags_without_a_value_and_ids_with_colons() -> None:
    text = "# note\nvzdump: vzdump.cron:1:/x\n\tall\n\tschedule mon 1:00\n\nnfs: nas\n        path /a b\n\torphan\n"
    assert agent.parse_sections(text) == [
        ("vzdump", "vzdump.cron:1:/x", {"all": "", "schedule": "mon 1:00"}),
        ("nfs", "nas", {"path": "/a b", "orphan": ""}),
    ]


@pytest.mark.parametrize(
    "text, sections",
    [
        ("dir: aa\n\tpath\t/x y\n", [("dir", "aa", {"path": "/x y"})]),  # a tab between key and value
        ("DIR:aa\n path /x\n", [("dir", "aa", {"path": "/x"})]),  # no blank behind the colon, capitals
        ("dir: aa\n path /x\n path /y\n", [("dir", "aa", {"path": "/x"})]),  # of two equal keys the first
        ("dir: aa\n shared\n", [("dir", "aa", {"shared": ""})]),
        ("dir: aa\n path /x\nnfs: bb\n path /y\n server z\n", [("dir", "aa", {"path": "/x", "server": "z"})]),
        ("dir: aa\n # path /z\n  # \n path /x\n", [("dir", "aa", {"path": "/x"})]),
        ("dir: aa\r\n path /x\r\n\r\nnfs: bb\r\n", [("dir", "aa", {"path": "/x"})]),  # no line is empty
        ("rubbish\ndir: aa\n path /x\n", [("dir", "aa", {"path": "/x"})]),
        ("dir: 1aa\n path /x\n\ndir: bb\n", [("dir", "bb", {})]),  # an id that no storage may have
        ("dir: aa bb\n path /x\n", []),
    ],
)
def test_section_files_are_read_as_proxmox_reads_them(text: str, sections: Any) -> None:
    assert agent.parse_sections(text, agent.STORAGE_NAMES) == sections


@pytest.mark.parametrize("word, flag", [("", True), ("1", True), ("0", False), ("yes", None), ("off", None), ("false", None)])
def test_flags_of_section_files(word: str, flag: bool | None) -> None:
    assert agent.flag_of({"disable": word}, "disable") is (flag or False)
    assert agent.flag_of({"enabled": word}, "enabled", default=True) is (True if flag is None else flag)


def test_local_is_a_storage_of_every_node() -> None:
    (local,) = agent.parse_storages("")
    assert local[:2] == ("dir", "local") and local[2]["path"] == "/var/lib/vz"
    ((_, _, values),) = agent.parse_storages("dir: local\n path /var/lib/vz\n content backup\n nodes b\n")
    assert values == {"path": "/var/lib/vz", "content": "backup"}


def test_members_of_resource_pools_are_those_of_pools_within_them_too() -> None:
    text = "user:a@pam:1:0:::::\npool:prod:comment:100,300:local:\npool:prod/sub:inner:302::\npool:product:x:7::\n"
    assert agent.parse_resource_pools(text) == {"prod": {100, 300, 302}, "prod/sub": {302}, "product": {7}}
    assert agent.parse_vmids("100 101;102,103") == [100, 101, 102, 103]


@pytest.mark.parametrize(
    "line, job",
    [
        ("0 2 * * * root vzdump --all 1 --storage nas --exclude 105",
         {"schedule": "2:00", "all": "1", "storage": "nas", "exclude": "105", "vmid": "", "enabled": "1"}),
        ("30 21 * * 1-5 root vzdump 100 101 --quiet 1",
         {"schedule": "mon..fri 21:30", "quiet": "1", "vmid": "100,101", "enabled": "1"}),
        ("5 1 * * 0,7,sat root #vzdump 100", {"schedule": "sun,sun,sat 1:05", "vmid": "100", "enabled": "0"}),
        ("0 2 1 * * root vzdump 100", None),  # not one that Proxmox wrote
    ],
)  # fmt: skip
def test_jobs_of_vzdump_cron(line: str, job: dict[str, str] | None) -> None:
    told = agent.parse_vzdump_cron(f"PATH=/bin\n{line}\n")
    assert told == ([("cron:1", job)] if job else [])
    assert not job or agent.next_event(job["schedule"], NOON)


def test_guest_config_ends_at_the_first_section_and_skips_notes() -> None:
    config = agent.parse_guest_config(
        "#name%3A evil\nname: web\nonboot: 1\ntags: a;b,c d\nmeta: creation-qemu=9.0,ctime=1718000000\n"
        "scsi0: tank:vm-1-disk-0,size=2T\nmp0: pool:subvol-1-disk-1,mp=/x,size=8G\nide2: local:iso/x.iso,media=cdrom\n"
        "virtio1: /dev/sdx,size=5G\nunused0: tank:vm-1-disk-9\nscsihw: virtio-scsi-pci\nmemory: 512\n"
        "[PENDING]\nname: other\n[snap]\nonboot: 0\n"
    )
    assert config == {
        "name": "web",
        "template": False,
        "tags": ["a", "b", "c", "d"],
        "onboot": True,
        "created_at": 1718000000,
        "volumes": [
            {"name": "scsi0", "storage": "tank", "volume": "vm-1-disk-0", "size_bytes": 2 << 40, "backup": True},
            {"name": "mp0", "storage": "pool", "volume": "subvol-1-disk-1", "size_bytes": 8 << 30, "backup": False},
        ],
        "unused": [{"name": "unused0", "storage": "tank", "volume": "vm-1-disk-9", "backup": False}],
        "settings": config["settings"],
    }
    assert config["settings"].keys() == {"name", "onboot", "tags", "meta", "scsi0", "mp0", "ide2", "virtio1", "unused0",
                                         "scsihw", "memory"}


def corosync_conf(quorum: str, *votes: int) -> str:
    nodes = "".join(f" node {{\n  name: {name}\n  quorum_votes: {vote}\n }}\n" for name, vote in zip("abcd", votes))
    return f"nodelist {{\n{nodes}}}\nquorum {{\n{quorum}\n provider: y\n}}\n"


@pytest.mark.parametrize(
    "quorum, votes, expected, needed",
    [
        ("", (1, 1, 1), 3, 2),
        ("", (1, 2), 3, 2),
        (" two_node: 1", (1, 1), 2, 1),  # one node alone goes on
        (" expected_votes: 5", (1, 1, 1), 5, 3),  # by hand, it goes before the sum
        (" two_node: 1\n expected_votes: 3", (1, 1), 3, 2),
        (" device {\n  model: net\n  net {\n   host: x\n  }\n  votes: 1\n }", (1, 1), 2, None),
        (" last_man_standing: 1", (1, 1, 1), 3, None),  # it counts anew as nodes leave
    ],
)
def test_votes_of_corosync_conf(quorum: str, votes: tuple[int, ...], expected: int, needed: int | None) -> None:
    told = agent.parse_corosync_votes(corosync_conf(quorum, *votes))
    assert told == (dict(zip("abcd", votes)), expected, needed)


def test_metrics_keep_only_usable_parts() -> None:
    line = '{"qemu":{"data":{"1":{}},"timestamp":5},"lxc":{"data":[],"timestamp":5},"storage":{"data":{}},"node":7}'
    assert agent.parse_metrics(line) == {"qemu": {"timestamp": 5, "data": {"1": {}}}}


# zpool status

HEAD = "  pool: tank\n state: {state}\n{scan}config:\n\n"


def status_of(*rows: str, scan: str = "", state: str = "ONLINE", slow: bool = False) -> dict[str, Any]:
    """The parsed status of a pool with these rows in its table, `name|state|errors and notes`."""
    cells = [row.split("|") for row in rows]
    width = max(len(cell[0]) for cell in cells)
    table = "\t" + "NAME".ljust(width) + "  STATE     READ WRITE CKSUM" + ("  SLOW" if slow else "") + "\n"
    for name, *rest in cells:
        table += "\t" + name.ljust(width) + (f"  {rest[0].ljust(8)} {rest[1]}" if rest else "") + "\n"
    text = HEAD.format(state=state, scan=scan) + table + "\nerrors: No known data errors\n"
    return agent.parse_zpool_status(text)["tank"]


def test_text_rows_of_all_classes_are_nested_by_their_depth() -> None:
    status = status_of(
        "tank|ONLINE|0 0 0",
        "  mirror-0|ONLINE|0 0 0",
        "    /dev/sda1|ONLINE|0 0 0",
        "    /dev/nvme0n1p1|ONLINE|0 1 2",
        "special",
        "  /dev/disk/by-id/x-part3|ONLINE|0 0 0",
        "logs",
        "  mirror-1|DEGRADED|0 0 0",
        "    123456789|UNAVAIL|0 0 0  was /dev/sdb1",
        "    /dev/sdc|FAULTED|3 4 5  too many errors",
        "cache",
        "  /dev/sdd|ONLINE|0 0 0  block size: 512B configured, 4096B native",
        "spares",
        "  /dev/sde|AVAIL|",
        "  /dev/sdf|INUSE|  currently in use",
    )
    vdevs = status["vdevs"]
    assert [(vdev["class"], vdev["name"], vdev["type"]) for vdev in vdevs] == [
        ("normal", "mirror-0", "mirror"),
        ("special", "x-part3", "disk"),
        ("log", "mirror-1", "mirror"),
        ("cache", "sdd", "disk"),
        ("spare", "sde", "disk"),
        ("spare", "sdf", "disk"),
    ]
    assert [(leaf["name"], leaf["write_errors"]) for leaf in vdevs[0]["children"]] == [("sda", 0), ("nvme0n1", 1)]
    missing, faulted = vdevs[2]["children"]
    assert (missing["path"], missing["reason"], missing["state"]) == ("/dev/sdb1", "missing device", "UNAVAIL")
    assert (faulted["reason"], faulted["read_errors"]) == ("too many errors", 3)
    assert "reason" not in vdevs[3] and "read_errors" not in vdevs[4]
    assert vdevs[5]["reason"] == "currently in use"


def test_slow_column_of_2_2_has_a_dash_for_groups() -> None:
    status = status_of("tank|ONLINE|0 0 0 -", "  mirror-0|ONLINE|0 0 0 -", "    /dev/sda|ONLINE|0 0 0 7", slow=True)
    assert "reason" not in status["vdevs"][0]
    assert status["vdevs"][0]["children"][0]["slow_ios"] == 7


@pytest.mark.parametrize(
    "text, scan",
    [
        ("none requested", {"function": "none", "state": "none"}),
        (
            "scrub repaired 0B in 1 days 00:01:02 with 3 errors on Sun Nov 22 00:00:00 2026",
            {"function": "scrub", "state": "finished", "errors": 3, "repaired_bytes": 0,
             "started_at": 1795305600 - 86462, "ended_at": 1795305600},
        ),
        (
            "resilvered (draid1:8d:12c:2s-0) 273M in 00:00:10 with 0 errors on Sun Nov 22 00:00:00 2026",
            {"function": "resilver", "state": "finished", "errors": 0, "repaired_bytes": 273 << 20,
             "started_at": 1795305590, "ended_at": 1795305600},
        ),
        (
            "scrub paused since Sun Nov 22 00:00:00 2026\n\tscrub started on Sat Nov 21 00:00:00 2026\n"
            "\t1.23T / 2.00T scanned, 500G / 2.00T issued\n\t0B repaired, 24.41% done",
            {"function": "scrub", "state": "paused", "started_at": 1795219200, "repaired_bytes": 0,
             "progress_ratio": 0.2441},
        ),
        (
            "resilver in progress since Sun Nov 22 00:00:00 2026\n\t1T / 2T scanned at 1G/s, 1T / 2T issued at 1G/s\n"
            "\t512G resilvered, 46.64% done, 3 days 06:02:12 to go",
            {"function": "resilver", "state": "scanning", "started_at": 1795305600, "repaired_bytes": 512 << 30,
             "progress_ratio": 0.4664, "remaining_seconds": 3 * 86400 + 6 * 3600 + 132},
        ),
        (
            "scrub in progress since Sun Nov 22 00:00:00 2026\n\t0B repaired, 0.00% done, no estimated completion time",
            {"function": "scrub", "state": "scanning", "started_at": 1795305600, "repaired_bytes": 0,
             "progress_ratio": 0.0},
        ),
        (
            "scrub canceled on Sun Nov 22 00:00:00 2026",
            {"function": "scrub", "state": "canceled", "ended_at": 1795305600},
        ),
        (  # a scrub, and beside it the rebuild of a draid vdev that is under way: that one counts
            "scrub repaired 0B in 00:00:01 with 0 errors on Sun Nov 22 00:00:00 2026\n"
            "  scan: resilver (draid1:3d:6c:1s-0) in progress since Sun Nov 22 01:00:00 2026\n"
            "\t1G / 2G scanned at 1M/s, 1G / 2G issued 1M/s, 2G total\n\t1G resilvered, 50.00% done, 00:10:00 to go",
            {"function": "resilver", "state": "scanning", "started_at": 1795309200, "repaired_bytes": 1 << 30,
             "progress_ratio": 0.5, "remaining_seconds": 600},
        ),
    ],
)  # fmt: skip
def test_scan_texts_of_all_kinds(text: str, scan: dict[str, Any]) -> None:
    assert status_of("tank|ONLINE|0 0 0", scan=f"  scan: {text}\n")["scan"] == scan


def json_pool(scan_stats: dict[str, Any], **more: Any) -> dict[str, Any]:
    pool = {"state": "ONLINE", "vdevs": {"tank": {"vdevs": {}}}, "scan_stats": scan_stats, **more}
    return agent.parse_zpool_status_json(json.dumps({"pools": {"tank": pool}}), 1795305600)["tank"]


def test_json_progress_never_exceeds_one_and_end_is_estimated_like_zpool_does() -> None:
    stats = {"function": "SCRUB", "state": "SCANNING", "start_time": 1795305000, "pass_start": 1795305500,
             "to_examine": 200 << 30, "issued": 300 << 30, "issued_bytes_per_scan": 300 << 30}  # fmt: skip
    scan = json_pool(stats)["scan"]
    assert (scan["progress_ratio"], scan["remaining_seconds"]) == (1.0, 0)
    slow = json_pool({**stats, "issued": 1 << 20, "issued_bytes_per_scan": 1 << 20})["scan"]
    assert "remaining_seconds" not in slow


def test_an_active_rebuild_in_json_is_a_resilver_and_a_finished_one_only_when_it_is_later() -> None:
    scrub = {"function": "SCRUB", "state": "FINISHED", "start_time": 10, "end_time": 20, "errors": 0, "processed": 0}
    active = {"state": "ACTIVE", "start_time": 30, "end_time": 0, "issued": 25, "to_scan": 100, "rebuilt": 20}
    scan = json_pool({**scrub, "rebuild_stats": {"mirror-0": active}})["scan"]
    assert (scan["function"], scan["state"], scan["progress_ratio"]) == ("resilver", "scanning", 0.25)
    done = {**active, "state": "COMPLETE", "end_time": 15}
    assert json_pool({**scrub, "rebuild_stats": {"mirror-0": done}})["scan"]["function"] == "scrub"
    assert json_pool({**scrub, "rebuild_stats": {"mirror-0": {**done, "end_time": 25}}})["scan"]["ended_at"] == 25


def test_dates_before_the_first_scrub_are_not_1970() -> None:
    assert json_pool({})["scan"] == {"function": "none", "state": "none"}
    assert "started_at" not in json_pool({"function": "SCRUB", "state": "SCANNING", "start_time": 0})["scan"]


# layout and margin


def leaf(state: str = "ONLINE", **more: Any) -> dict[str, Any]:
    return {"class": "normal", "name": "x", "type": "disk", "state": state, **more}


def group(kind: str, *children: dict[str, Any], state: str = "ONLINE", label: str = "normal") -> dict[str, Any]:
    return {"class": label, "name": f"{kind}-0", "type": kind, "state": state, "children": list(children)}


OK, BAD, BUSY = leaf(), leaf("FAULTED"), leaf(reason="resilvering")


@pytest.mark.parametrize(
    "vdevs, layout, margin",
    [
        ([group("mirror", OK, OK)], "mirror", 1),
        ([group("mirror", OK, OK), group("mirror", OK, OK, OK)], "mirror ×2", 1),
        ([group("mirror", OK, BAD)], "mirror", 0),
        ([group("mirror", OK, BUSY)], "mirror", 0),  # what resilvers is no redundancy yet
        ([group("mirror", OK, OK, BUSY)], "mirror", 1),
        ([group("mirror", BAD, BAD)], "mirror", -1),
        ([OK], "stripe", 0),
        ([OK, OK], "stripe", 0),
        ([BAD], "stripe", -1),
        ([group("raidz1", OK, OK, OK)], "raidz1", 1),
        ([group("raidz2", OK, OK, OK, OK)], "raidz2", 2),
        ([group("raidz2", OK, BAD, OK, OK)], "raidz2", 1),
        ([group("raidz2", OK, BAD, BAD, OK, OK)], "raidz2", 0),
        ([group("raidz2", OK, BAD, BAD, BAD, OK)], "raidz2", -1),
        ([group("raidz3", *[OK] * 7), group("raidz3", *[OK] * 7)], "raidz3 ×2", 3),
        ([group("draid2", *[OK] * 8)], "draid2", 2),
        ([group("raidz1", OK, OK, group("replacing", leaf("REMOVED"), BUSY))], "raidz1", 0),
        ([group("raidz1", OK, OK, group("replacing", OK, BUSY))], "raidz1", 1),  # the old side still holds it
        ([group("raidz1", OK, OK, group("replacing", leaf("REMOVED"), OK))], "raidz1", 0),  # not told yet
        ([group("raidz1", OK, OK, group("spare", leaf("REMOVED"), OK))], "raidz1", 1),  # a spare has stepped in
        ([group("raidz1", OK, OK, OK), group("mirror", OK, OK)], "raidz1 + mirror", 1),
        ([group("raidz2", *[OK] * 6), group("mirror", OK, BAD, label="special")], "raidz2", 0),
        ([group("mirror", OK, OK), group("mirror", BAD, BAD, label="log")], "mirror", 1),  # a log holds no pool
        ([group("mirror", OK, OK), {**BAD, "class": "cache"}], "mirror", 1),
        ([group("mirror", OK, OK), leaf("ONLINE", type="indirect")], "mirror", 1),  # an evacuated vdev
        ([OK, group("mirror", OK, OK)], "stripe + mirror", 0),
        ([group("raidz1", BUSY, BUSY, OK)], "raidz1", 0),  # a short outage of two: thin, but nothing is lost
        ([leaf("DEGRADED")], "stripe", 0),
    ],
)
def test_layout_and_margin(vdevs: list[dict[str, Any]], layout: str, margin: int) -> None:
    assert agent.pool_layout(vdevs) == layout
    assert agent.redundancy_margin(vdevs) == margin


def disk_json(name: str, state: str = "ONLINE") -> dict[str, Any]:
    return {"name": name, "vdev_type": "disk", "path": f"/dev/{name}1", "state": state, "guid": 1}


@pytest.mark.parametrize(
    "top, members, rows, margin",
    [
        (
            "mirror-0",
            {"sda": disk_json("sda"), "sdb": disk_json("sdb")},  # attached with -s: nobody says which is the new one
            ("    mirror-0  ONLINE 0 0 0", "      /dev/sda1  ONLINE 0 0 0", "      /dev/sdb1  ONLINE 0 0 0  (resilvering)"),
            0,
        ),
        (
            "draid2:2d:5c:1s-0",
            {"spare-0": {"name": "spare-0", "vdev_type": "spare", "state": "DEGRADED",
                         "vdevs": {"sda": disk_json("sda", "CANT_OPEN"),
                                   "draid2-0-0": {"name": "draid2-0-0", "vdev_type": "dspare", "state": "ONLINE"}}},
             **{name: disk_json(name) for name in ("sdb", "sdc", "sdd", "sde")}},
            ("    draid2:2d:5c:1s-0  DEGRADED 0 0 0", "      spare-0  DEGRADED 0 0 0", "        /dev/sda1  UNAVAIL 0 0 0",
             "        draid2-0-0  ONLINE 0 0 0  (resilvering)", "      /dev/sdb1  ONLINE 0 0 0", "      /dev/sdc1  ONLINE 0 0 0",
             "      /dev/sdd1  ONLINE 0 0 0", "      /dev/sde1  ONLINE 0 0 0"),
            1,
        ),
        (
            "mirror-0",
            {"sda": disk_json("sda"),
             "replacing-1": {"name": "replacing-1", "vdev_type": "replacing", "state": "DEGRADED",
                             "vdevs": {"sdb": disk_json("sdb", "OFFLINE"), "sdc": disk_json("sdc")}}},
            ("    mirror-0  DEGRADED 0 0 0", "      /dev/sda1  ONLINE 0 0 0", "      replacing-1  DEGRADED 0 0 0",
             "        /dev/sdb1  OFFLINE 0 0 0", "        /dev/sdc1  ONLINE 0 0 0  (resilvering)"),
            0,
        ),
    ],
)  # fmt: skip
def test_a_sequential_rebuild_leaves_one_disk_less_in_both_forms(
    top: str, members: dict[str, Any], rows: tuple[str, ...], margin: int
) -> None:
    """JSON says in which top-level vdev a rebuild is active, and of no disk that it is the one being filled."""
    vdev = {"name": top, "vdev_type": top.split("-")[0].split(":")[0].rstrip("2"), "state": "ONLINE", "vdevs": members}
    stats = {"rebuild_stats": {top: {"state": "ACTIVE", "start_time": 1}}}
    pool = {"name": "p", "state": "ONLINE", "scan_stats": stats, "vdevs": {"p": {"vdevs": {top: vdev}}}}
    from_json = agent.parse_zpool_status_json(json.dumps({"pools": {"p": pool}}), 10)["p"]
    assert (from_json["scan"]["function"], from_json["scan"]["state"]) == ("resilver", "scanning")
    assert agent.redundancy_margin(from_json["vdevs"]) == margin
    assert agent.redundancy_margin(status_of("  p  ONLINE 0 0 0", *rows)["vdevs"]) == margin
    pool["scan_stats"] = {"rebuild_stats": {top: {"state": "COMPLETE"}}}
    over = agent.parse_zpool_status_json(json.dumps({"pools": {"p": pool}}), 10)["p"]
    assert not [row for row in agent.list_vdevs(over["vdevs"]) if row.get("reason") == "resilvering"]


def test_margin_without_any_vdev_is_unknown() -> None:
    assert agent.redundancy_margin([]) is None


# tasks, backups, schedules


@pytest.mark.parametrize(
    "status, kind, result",
    [
        ("OK", "vzdump", "ok"),
        ("WARNINGS: 2", "vzdump", "warning"),
        ("unexpected status", "qmstart", "unknown"),
        ("interrupted by signal", "vzdump", "error"),
        ("received interrupt", "qmigrate", "error"),
        ("interrupted by signal", "vncproxy", "unknown"),
        ("", "vzdump", "unknown"),
        ("job errors", "vzdump", "error"),
        ("OKAY", "vzdump", "error"),
    ],
)
def test_task_results(status: str, kind: str, result: str) -> None:
    assert agent.task_result(status, kind) == result


BEGAN = 1795399201  # 2026-11-23 02:00:01


@pytest.mark.parametrize(
    "name, archive",
    [
        ("vzdump-qemu-100-2026_11_23-02_00_01.vma.zst", (100, BEGAN)),
        ("vzdump-lxc-101-2026_11_23-02_00_01.tar", (101, BEGAN)),
        ("vzdump-openvz-102-2026_11_23-02_00_01.tgz", (102, BEGAN)),
        ("vzdump-qemu-100-2026_11_23-02_00_01.vma.zst.notes", None),
        ("vzdump-qemu-100-2026_11_23-02_00_01.log", None),
        ("vzdump-qemu-100-2026_11_23-02_00_01.vma.dat", None),
        ("vzdump-qemu-x-2026_11_23-02_00_01.vma", None),
        ("vzdump", None),
    ],
)
def test_archive_names(name: str, archive: tuple[int, int] | None) -> None:
    assert agent.parse_archive_name(name) == archive


def test_a_vzdump_log_cut_short_has_no_outcome() -> None:
    storage, runs = agent.parse_vzdump_log(
        "INFO: starting new backup job: vzdump 1 --storage\nINFO: Starting Backup of VM 100 (lxc)\n"
    )
    assert storage is None
    assert runs == [{"vmid": 100, "ok": None}]


NOON = 1795435200  # Monday 2026-11-23 12:00 UTC


@pytest.mark.parametrize(
    "schedule, following",
    [
        ("02:00", "2026-11-24 02:00:00"),
        ("12:00", "2026-11-24 12:00:00"),  # now is not next
        ("*/15", "2026-11-23 12:15:00"),
        ("mon..fri 21:00", "2026-11-23 21:00:00"),
        ("sat,sun 3:30", "2026-11-28 03:30:00"),
        ("fri..mon 00:00", "2026-11-27 00:00:00"),
        ("8..17,22:0/15", "2026-11-23 12:15:00"),
        ("2,4:00", "2026-11-24 02:00:00"),
        ("*-12-24 18:00", "2026-12-24 18:00:00"),
        ("*-1 4:00", "2026-12-01 04:00:00"),
        ("sun", "2026-11-29 00:00:00"),
        ("daily", "2026-11-24 00:00:00"),
        ("monthly", "2026-12-01 00:00:00"),
        ("2026-12-31", "2026-12-31 00:00:00"),
        ("2020-1-1 1:00", None),
        ("whenever", None),
        ("", None),
        ("99:00", None),
        ("*/0", None),
        ("5/0", "2026-11-23 12:05:00"),  # a step of nothing is a lone value
        ("Mon 2:00", "2026-11-30 02:00:00"),
        ("monday..tuesday 2:00", "2026-11-24 02:00:00"),
        ("mont 2:00", None),
        ("2:60", None),
        ("1-12:00", None),
        ("Daily", None),  # the short words are taken in small letters only
        ("*:*:30", "2026-11-23 12:00:30"),
        ("*/9:00", "2026-11-23 18:00:00"),
        ("*-*-31 1:00", "2026-12-31 01:00:00"),
        ("*-02-29", "2028-02-29 00:00:00"),
    ],
)
def test_calendar_events(schedule: str, following: str | None) -> None:
    assert told(agent.next_event(schedule, NOON)) == following


def told(at: float | None) -> str | None:
    return None if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def in_zone(zone: str, text: str, *, fold: int = 0) -> float:
    """Unix seconds of a wall clock; from then on the process lives in that zone."""
    os.environ["TZ"] = zone
    time.tzset()
    return datetime.fromisoformat(text).replace(fold=fold).timestamp()


@pytest.mark.parametrize(
    "zone, schedule, after, following",
    [
        # proxmox-time settles each step in the zone: 2:30 of that night is 3:30, which is no hit
        ("Europe/Berlin", "2:30", "2027-03-27 12:00:00", "2027-03-29 02:30:00"),
        ("Europe/Berlin", "sun 02:00", "2027-03-27 12:00:00", "2027-04-04 02:00:00"),
        ("Europe/Berlin", "2,22:30", "2027-03-27 23:00:00", "2027-03-28 22:30:00"),
        ("Europe/Berlin", "*:0/15", "2027-03-28 01:45:00", "2027-03-28 03:00:00"),
        ("America/New_York", "2:00", "2027-03-13 12:00:00", "2027-03-15 02:00:00"),
        ("America/Santiago", "0:00", "2026-09-05 12:00:00", "2026-09-07 00:00:00"),  # midnight itself is missing
        ("Europe/Berlin", "21:00", "2026-10-24 21:00:00", "2026-10-25 21:00:00"),
        ("America/New_York", "3:00 UTC", "2026-12-01 00:00:00", "2026-12-01 22:00:00"),
        ("America/New_York", "daily UTC", "2026-12-01 00:00:00", "2026-12-01 19:00:00"),
        # repetitions do not begin anew at the next hour or day
        ("UTC", "*:*/28", "2026-11-23 12:57:00", "2026-11-23 13:28:00"),
        ("UTC", "*/9:00", "2026-11-23 18:00:00", "2026-11-24 09:00:00"),
    ],
)
def test_calendar_events_by_the_wall_clock(zone: str, schedule: str, after: str, following: str) -> None:
    assert told(agent.next_event(schedule, in_zone(zone, after))) == following


def test_of_an_hour_that_comes_twice_the_first_counts_once() -> None:
    summer, winter = (in_zone("Europe/Berlin", "2026-10-25 02:00:00", fold=fold) for fold in (0, 1))
    assert winter - summer == 3600
    assert agent.next_event("2:00", summer - 7200) == summer
    assert agent.next_event("2:00", summer) == in_zone("Europe/Berlin", "2026-10-26 02:00:00")
    assert agent.next_event("2:30", winter) == winter + 1800  # asked within the second one
    for number in range(10):
        following = agent.next_event("*/15", summer + 900 * number)
        assert following is not None and following > summer + 900 * number  # never back
    # from 2:45 the next step is 3:00 of the wall clock: Proxmox makes no run in the second hour
    assert agent.list_due_times("*/15", winter + 3600)[-2:] == [summer + 2700, winter + 3600]


def test_due_times_are_the_last_ones_over_pauses_and_clock_changes() -> None:
    monday_noon = in_zone("Europe/Berlin", "2026-10-26 12:00:00")
    assert [told(at) for at in agent.list_due_times("2:30", monday_noon)][-3:] == [
        "2026-10-24 02:30:00", "2026-10-25 02:30:00", "2026-10-26 02:30:00"]  # fmt: skip
    windows = agent.list_due_times("mon..fri 7..18:00/15", in_zone("Europe/Berlin", "2026-11-22 12:00:00"))
    assert told(windows[-1]) == "2026-11-20 18:45:00" and len(windows) == 8
    skipped = agent.list_due_times("2:30", in_zone("Europe/Berlin", "2027-03-28 12:00:00"))
    assert told(skipped[-1]) == "2027-03-27 02:30:00"
    assert [told(at) for at in agent.list_due_times("*-02-29", monday_noon)][-2:] == [
        "2020-02-29 00:00:00", "2024-02-29 00:00:00"]  # fmt: skip
    assert agent.list_due_times("whenever", monday_noon) == []
    assert agent.list_due_times("2030-1-1", monday_noon) == []


@pytest.mark.parametrize(
    "name, label",
    [
        ("autosnap_2026-11-23_06:00:01_hourly", "autosnap_hourly"),  # sanoid
        ("zfs-auto-snap_daily-2026-11-23-0625", "zfs-auto-snap_daily"),
        ("__replicate_100-0_1795430102__", "__replicate_100-0"),
        ("zrepl_20261123_100000_000", "zrepl"),
        ("syncoid_backup_2026-11-23:10:00:00-GMT00:00", "syncoid"),
        ("pyznap_2026-11-23_10:00:00_weekly", "pyznap_weekly"),
        ("autodaily261123104500", "autodaily"),  # cv4pve-autosnap: https://github.com/Corsinvest/cv4pve-autosnap
        ("autoevery-hour261123104500", "autoevery-hour"),
        ("offsite1-20261123111122", "offsite1"),  # zfs_autobackup
        ("2026-11-23-100000", "znapzend"),
        ("2026-11-23_10.00.00--1w", "zfsnap_1w"),
        ("auto-2026-11-23_10-00", "auto"),  # TrueNAS
        ("daily-2026-11-23", "daily"),
        ("2026-11-23", "dated"),
        ("daily_20261123_100000_000", "daily"),  # zrepl with another prefix: https://zrepl.github.io/configuration/snapshotting.html
        ("20261123-100000", "dated"),
        ("auto-20261123.1000-2w", "auto"),  # FreeNAS
        ("GMT-2026.11.23-10.00.00", "GMT"),  # Samba's shadow_copy2
        ("before_20261123", "pve"),
        ("before-upgrade", "pve"),
        ("automatic", "pve"),
        ("with blank", "other"),
    ],
)
def test_snapshot_classes_of_a_guests_disk(name: str, label: str) -> None:
    assert agent.snapshot_class("rpool/data/vm-100-disk-0", name) == label


@pytest.mark.parametrize(
    "dataset, name, label",
    [
        ("tank/a", "autosnap_2026-07-01_00:00:01_daily", "autosnap_daily"),
        ("tank/a", "zfs-auto-snap_frequent-2026-07-01-0015", "zfs-auto-snap_frequent"),
        ("tank/a", "zrepl_20260701_000001_000", "zrepl"),
        ("tank/vm-112-disk-0", "__replicate_112-0_1771200000__", "__replicate_112-0"),
        ("tank/vm-112-disk-0", "before_upgrade", "pve"),
        ("tank/base-9000-disk-0", "__base__", "pve"),
        ("tank/vm-112-disk-0", "with blank", "other"),
        ("tank/home", "before_upgrade", "other"),
    ],
)
def test_snapshot_classes(dataset: str, name: str, label: str) -> None:
    assert agent.snapshot_class(dataset, name) == label


def test_chrony_of_13_and_14_fields_is_counted_from_the_end() -> None:
    tail = "3,1795430312.1,-0.000123456,0.1,0.1,-12.3,0.0,0.0,0.0,0.0,1036.5,Normal"
    for head in ("C000027B", "C000027B,192.0.2.1"):
        assert agent.parse_chrony_tracking(f"{head},{tail}\n")["offset_seconds"] == 0.000123456


def smart(**fields: Any) -> dict[str, Any]:
    return agent.parse_smart(json.dumps({"smartctl": {"exit_status": 0}, "smart_status": {"passed": True}, **fields}), 1795305600.0)


def attribute(number: int, name: str, value: int, raw: int, **fields: Any) -> dict[str, Any]:
    row = {"id": number, "name": name, "value": value, "raw": {"value": raw, "string": hex(raw)}, **fields}
    return {"ata_smart_attributes": {"table": [row]}}


@pytest.mark.parametrize(
    "raw, value, used",
    [
        (0x25060D282506, 100, 0.37),  # the value stands still: listi.jpberlin.de smartmontools-support 2021-March/000652
        (0x010F005A010F, 1, 0.01),  # the value counts up: https://github.com/v-zhuravlev/zbx-smartctl/issues/148
        (0x610314006103, 97, 0.97),
    ],
)
def test_wear_of_western_digital_is_in_the_raw_value(raw: int, value: int, used: float) -> None:
    assert smart(**attribute(230, "Media_Wearout_Indicator", value, raw))["wear_ratio"] == used
    assert smart(**attribute(233, "Media_Wearout_Indicator", 4, raw))["wear_ratio"] == 0.96  # Intel counts down


@pytest.mark.parametrize(
    "prefailure, when_failed, failing",
    [  # https://github.com/AnalogJ/scrutiny/issues/195, https://github.com/henrygd/beszel/issues/2298
        (True, "now", ["Reallocated_Sector_Ct"]), (True, "past", None), (False, "now", None), (True, "", None),
    ],
)
def test_an_attribute_at_its_threshold_counts_where_it_foretells_failure(
    prefailure: bool, when_failed: str, failing: list[str] | None
) -> None:
    row = attribute(5, "Reallocated_Sector_Ct", 1, 3560, when_failed=when_failed, flags={"prefailure": prefailure})
    assert smart(**row).get("failing_attributes") == failing


SHORT, EXTENDED = {"string": "Short offline"}, {"string": "Extended offline"}


@pytest.mark.parametrize(
    "tests, passed, hours",
    [  # "failed self-tests are outdated by newer successful extended offline self-test": smartctl's word for the third
        ([(SHORT, True, 99), (EXTENDED, False, 90)], False, 10),
        ([(SHORT, True, 99), (SHORT, True, 98), (EXTENDED, True, 95), (EXTENDED, False, 90)], True, 1),
        ([(EXTENDED, True, 99), (SHORT, False, 90)], True, 1),
        ([(EXTENDED, None, 99), (SHORT, False, 90), (SHORT, True, 80)], False, 10),  # aborted: no outcome
        ([(SHORT, True, 99)], True, 1),
    ],
)
def test_a_short_self_test_takes_back_no_failure(tests: list[Any], passed: bool, hours: int) -> None:
    table = [{"type": kind, "status": {"passed": outcome}, "lifetime_hours": at} for kind, outcome, at in tests]
    told = smart(power_on_time={"hours": 100}, ata_smart_self_test_log={"standard": {"table": table}})
    assert told["selftest"] == {"passed": passed, "ended_at": 1795305600 - hours * 3600}


@pytest.mark.parametrize("trip, limit", [(85, 85), (25, None), (0, None), (None, None)])  # Napsty/check_smart issue 82
def test_a_limit_of_heat_that_nobody_can_mean_is_none(trip: int | None, limit: int | None) -> None:
    assert smart(temperature={"current": 30, "drive_trip": trip}).get("temperature_limit_celsius") == limit


# fuzz: garbage is SourceError or unknown, and whatever comes out is JSON

TEXT_PARSERS: list[Callable[[str], Any]] = [
    agent.to_size,
    agent.to_seconds,
    agent.to_number,
    agent.to_count,
    agent.parse_ctime,
    agent.parse_cpu_times,
    agent.parse_meminfo,
    agent.parse_kstat,
    agent.parse_pressure,
    agent.parse_net_dev,
    agent.parse_diskstats,
    agent.parse_rrd,
    agent.parse_metrics,
    agent.parse_sections,
    agent.parse_vmlist,
    agent.parse_ha_states,
    agent.parse_guest_config,
    agent.parse_corosync_votes,
    agent.parse_quorumtool,
    agent.parse_pve_version,
    agent.parse_zpool_status,
    agent.parse_upid,
    agent.parse_task_line,
    agent.parse_vzdump_log,
    agent.parse_archive_name,
    agent.parse_vmids,
    agent.parse_local_time,
    agent.parse_datasets,
    agent.parse_blocks,
    agent.parse_chrony_tracking,
    agent.parse_certificate,
    agent.parse_subscription,
    agent.parse_ceph_status,
    agent.version_key,
    lambda text: agent.parse_smart(text, 1795305600.0),
    lambda text: agent.parse_zpool_status_json(text, 1795305600.0),
    lambda text: agent.parse_columns(text, ["a", "b", "c"]),
    lambda text: agent.next_event(text, 1795305600.0),
    lambda text: agent.snapshot_class(text, text),
    lambda text: agent.guess_vdev_type(text, text, []),
    agent.parse_storages,
    lambda text: {name: sorted(vmids) for name, vmids in agent.parse_resource_pools(text).items()},
    agent.parse_vzdump_cron,
    agent.parse_tab_pairs,
    agent.parse_security,
    agent.parse_queue_times,
    agent.parse_root_mail,
    agent.parse_notifications,
    lambda text: agent.parse_shell_setting(text, "cpu"),
    lambda text: agent.parse_apt_sources(text, deb822=True),
    lambda text: agent.parse_apt_sources(text, deb822=False),
    lambda text: agent.parse_json(text, "x"),
    lambda text: agent.parse_object(text, "x"),
    lambda text: str(agent.parse_calendar_event(text)),
]


def test_every_parser_of_what_a_host_says_is_fed_such_texts() -> None:
    """Those that only other parsers call are reached through these."""
    tree = ast.parse(Path(agent.__file__).read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = {name: {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} for name, node in functions.items()}
    parsers = {name for name, node in functions.items() if name.startswith("parse_") and node.args.args[0].arg == "text"}
    outer = {name for name in parsers for caller in named if name in named[caller] and not caller.startswith("parse_")}
    listed = Path(__file__).read_text().partition("TEXT_PARSERS")[2]
    assert {name for name in outer if f"agent.{name}" not in listed} == set()

WORDS = (
    "pool: state: config: scan: errors: NAME STATE READ WRITE CKSUM ONLINE DEGRADED tank mirror-0 raidz1-0 logs spares "
    "scrub repaired in with on resilvered 0B 1.5K 12% done since Mon Nov 23 09:00:19 2026 - U : / = { } [ ] , . "
    "pve2-node/a pve-vm-9.0/1 cpu cpu0 MemTotal: kB some avg10=0.1 UPID:a:1:2:69DD8B57:x:100:u: 69C27061 OK INFO: "
    "Starting Backup of VM 100 (qemu) Finished Backup ERROR: Failed at vzdump: dir: path 99999999999999999999999 "
    "1e999 nan -1 \t \n \n \n \0 é ² ٣ \\u0000"
).split(" ")
texts = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join))


@pytest.mark.parametrize("number", range(len(TEXT_PARSERS)))
@given(text=texts)
def test_no_text_gives_anything_but_values_or_a_source_error(number: int, text: str) -> None:
    try:
        json.dumps(TEXT_PARSERS[number](text), allow_nan=False)
    except agent.SourceError as error:
        assert error.code in ("garbage", "failed")


KEYS = (
    "pools tank vdevs state scan_stats function start_time end_time issued to_examine skipped rebuild_stats "
    "vdev_type name spares logs raidz_expand_stats pool_guid status error_count aux smartctl messages "
    "exit_status device type protocol ata_smart_attributes table id raw string value temperature current "
    "smart_status passed power_on_time hours wwn naa nvme_smart_health_information_log scsi_error_counter_log "
    "nvme_self_test_log ata_smart_self_test_log standard node qemu lxc storage data timestamp ids 100 "
    "service_status health checks summary cluster nodelist "
).split()
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.floats(), st.text(max_size=8),
    st.sampled_from(["SCANNING", "SCRUB", "FINISHED", "ACTIVE", "ONLINE", "raidz", "U", "-", "draid2:1d-0", "1/2"]),
)  # fmt: skip
documents = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)),
    max_leaves=25,
)
JSON_PARSERS: list[Callable[[str], Any]] = [
    agent.parse_metrics,
    agent.parse_vmlist,
    agent.parse_ha_states,
    agent.parse_ceph_status,
    lambda text: agent.parse_smart(text, 1795305600.0),
    lambda text: agent.parse_zpool_status_json(text, 1795305600.0),
]


@pytest.mark.parametrize("number", range(len(JSON_PARSERS)))
@given(document=st.dictionaries(st.sampled_from(KEYS), documents, max_size=6))
def test_no_json_of_another_shape_gives_anything_but_values_or_a_source_error(number: int, document: Any) -> None:
    try:
        json.dumps(JSON_PARSERS[number](json.dumps(document)))
    except agent.SourceError as error:
        assert error.code in ("garbage", "failed")


@given(st.dictionaries(st.sampled_from(["tank", "x"]), documents, max_size=2))
def test_pools_of_another_shape_still_have_a_layout_and_a_margin(pools: Any) -> None:
    text = json.dumps({"pools": {name: {"vdevs": {name: {"vdevs": vdevs}}} for name, vdevs in pools.items()}})
    for pool in agent.parse_zpool_status_json(text, 1795305600.0).values():
        agent.pool_layout(pool["vdevs"])
        agent.redundancy_margin(pool["vdevs"])


def test_a_table_of_vdevs_with_blanks_for_the_tab_is_read_too() -> None:
    text = "  pool: tank\n state: ONLINE\nconfig:\n\n\tNAME        STATE     READ WRITE CKSUM\n\ttank        ONLINE       0     0     0\n\t  mirror-0  ONLINE       0     0     0\n\t    sda     ONLINE       0     0     0\n\t    sdb     ONLINE       0     0     1\n\nerrors: No known data errors\n"
    assert agent.parse_zpool_status(text.expandtabs(8)) == agent.parse_zpool_status(text)
    assert agent.parse_zpool_status(text)["tank"]["vdevs"][0]["children"][1]["checksum_errors"] == 1


@pytest.mark.parametrize("state", [{}, [], 5, None, "ODD"])
def test_a_scan_in_a_state_that_nobody_knows_is_none(state: Any) -> None:
    pool = {"vdevs": {}, "scan_stats": {"function": "SCRUB", "state": state, "start_time": "5"}}
    parsed = agent.parse_zpool_status_json(json.dumps({"pools": {"tank": pool}}), 1795305600.0)
    assert parsed["tank"]["scan"]["state"] == "none"
