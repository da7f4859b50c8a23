"""JSON and text of the same pools give the same values; and each parser reads the public recordings beside the project.

    pairs -> zfs samples -> proxmox samples
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agent

HERE = Path(__file__).resolve().parent
PAIRS = sorted(path.parent for path in (HERE / "zpool").glob("*/status.json"))
SAMPLES = HERE.parent.parent / "shared" / "samples"  # not part of the project: read where it is present
NOW = 1795430400.0


def for_each(*patterns: str) -> Callable[[Callable[..., None]], Callable[..., None] | None]:
    """Run the test for each sample. Without samples there is no test: nothing that could be skipped."""
    files = sorted(path for pattern in patterns for path in SAMPLES.glob(pattern) if path.stat().st_size)
    ids = [f"{path.parent.name}-{path.name}" for path in files]
    return pytest.mark.parametrize("file", files, ids=ids) if files else lambda test: None


# pairs

# `zpool status` rounds sizes in words even with -p, and -v gives a list of errors in place of their number
ROUNDED = 0.02
MOVING = {"pool-stuck-online"}  # its disk threw errors between the two commands


def leaves(vdevs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for vdev in vdevs:
        yield vdev
        yield from leaves(vdev.get("children", []))


@pytest.mark.parametrize("state", PAIRS, ids=lambda path: path.name)
def test_json_and_text_of_a_pool_give_the_same(state: Path) -> None:
    from_json = agent.parse_zpool_status_json((state / "status.json").read_text(), NOW)
    from_text = agent.parse_zpool_status((state / "status.txt").read_text())
    assert list(from_json) == list(from_text) and from_json
    for name, one in from_json.items():
        other = from_text[name]
        assert one.pop("guid").isdigit()  # the text has none: the kernel's file has it, and `zpool status -g`
        for vdev in leaves(one["vdevs"]):
            assert vdev.pop("guid", "0").isdigit()
        if "data_errors" not in other:
            assert one.pop("data_errors") > 0
        exact, rounded = (pool["scan"].pop("repaired_bytes", 0) for pool in (one, other))
        assert exact == pytest.approx(rounded, rel=ROUNDED)
        if state.name in MOVING:
            for vdev in [*leaves(one["vdevs"]), *leaves(other["vdevs"])]:
                vdev.pop("write_errors", None)
        assert one == other
        assert agent.pool_layout(one["vdevs"]) == agent.pool_layout(other["vdevs"])
        assert agent.redundancy_margin(one["vdevs"]) == agent.redundancy_margin(other["vdevs"])


@pytest.mark.parametrize(
    "state, pool, layout, margin",
    [
        ("all-classes", "tank", "mirror ×2", 1),
        ("disk-offline", "tank", "mirror ×2", 0),
        ("disk-removed", "tank", "raidz1", 0),
        ("disk-unavail-import", "tank", "raidz2", 1),
        ("disk-faulted-forced", "tank", "mirror", 0),
        ("replacing", "tank", "raidz1", 0),
        ("resilver-in-progress", "tank", "mirror", 1),
        ("resilver-finished", "tank", "mirror", 1),
        ("draid1-healthy", "dr", "draid1", 1),
        ("raidz-expansion", "tank", "raidz1", 1),
        ("device-removal", "tank", "mirror ×2", 1),
        ("cache-removed", "tank", "mirror", 1),
        ("stripe-files", "filepool", "stripe", 0),
        ("nvme-sata", "tank", "mirror", 1),
        ("names-spaces-colons", "my pool", "mirror", 1),
        ("two-pools-one-degraded", "tank", "raidz1", 0),
    ],
)
def test_layout_and_margin_of_real_pools(state: str, pool: str, layout: str, margin: int) -> None:
    for parse, file in ((agent.parse_zpool_status, "txt"), (parse_json, "json")):
        vdevs = parse((HERE / "zpool" / state / f"status.{file}").read_text())[pool]["vdevs"]
        assert (agent.pool_layout(vdevs), agent.redundancy_margin(vdevs)) == (layout, margin)


def parse_json(text: str) -> dict[str, dict[str, Any]]:
    return agent.parse_zpool_status_json(text, NOW)


def test_a_vdev_that_is_gone_keeps_its_path_and_says_why() -> None:
    (pool,) = parse_json((HERE / "zpool" / "disk-unavail-import" / "status.json").read_text()).values()
    gone = pool["vdevs"][0]["children"][1]
    assert (gone["name"], gone["state"], gone["reason"]) == ("706265569504064139", "UNAVAIL", "missing device")
    assert gone["path"] == "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_LABd01-part1"


def test_damaged_files_of_a_real_pool() -> None:
    for parse, file in ((agent.parse_zpool_status, "txt"), (parse_json, "json")):
        (pool,) = parse((HERE / "zpool" / "permanent-errors" / f"status.{file}").read_text()).values()
        assert len(pool["damaged_files"]) == 11
        assert "/mnt/tank/a file with spaces.bin" in pool["damaged_files"]


# zfs samples


@for_each("zfs/*/zpool-status*.json")
def test_every_json_status_of_the_lab_is_read(file: Path) -> None:
    exact = "-int" in file.name and "guid" not in file.name and "flat" not in file.name
    for name, pool in parse_json(file.read_text()).items():
        assert pool["state"] in ("ONLINE", "DEGRADED", "SUSPENDED")
        if exact:  # the others have other shapes (rounded texts, no nesting): no more than read without a fault
            assert name and agent.pool_layout(pool["vdevs"]) and pool["guid"].isdigit()
            assert agent.redundancy_margin(pool["vdevs"]) in (0, 1, 2)


@for_each("zfs/*/zpool-status*.txt")
def test_every_text_status_of_the_lab_is_read(file: Path) -> None:
    text = file.read_text()
    if text.startswith(("no pools", "all pools", "{")):
        return
    pools = agent.parse_zpool_status(text)
    assert len(pools) == text.count("  pool: ")
    for pool in pools.values():
        assert agent.pool_layout(pool["vdevs"]) and agent.redundancy_margin(pool["vdevs"]) in (0, 1, 2)


@for_each("zfs/*/arcstats.txt")
def test_arcstats_of_the_lab(file: Path) -> None:
    arc = agent.parse_kstat(file.read_text())
    assert arc["c_min"] <= arc["c"] <= arc["c_max"] and arc["size"] > 0 and arc["hits"] >= 0


@for_each("zfs/*/zpool-list-Hp-o.txt")
def test_pool_lists_of_the_lab_are_split_at_tabs(file: Path) -> None:
    columns = "name guid size alloc free freeing frag cap dedup health".split()
    for row in agent.parse_columns(file.read_text(), columns):
        assert (row["guid"] or "").isdigit()
        assert (agent.to_count(row["alloc"]) or 0) + (agent.to_count(row["free"]) or 0) == agent.to_count(row["size"])


@for_each("zfs/*/zfs-list-Hp.txt")
def test_dataset_lists_of_the_lab(file: Path) -> None:
    have = (
        "name type used avail refer quota refquota reservation refreservation usedbysnapshots usedbydataset "
        "usedbychildren usedbyrefreservation mounted mountpoint canmount encryption keystatus compressratio"
    ).split()
    origin = len(have) + 8
    lines = []
    for line in file.read_text().splitlines():
        cells = dict(zip(have, line.split("\t")))
        cells.update(volsize=line.split("\t")[21], origin=line.split("\t")[origin - 1])
        lines.append("\t".join(cells[name] for name in agent.DATASET_COLUMNS))
    datasets = agent.parse_datasets("\n".join(lines))
    assert len(datasets) == len(lines)
    for dataset in datasets:
        assert dataset["type"] in ("filesystem", "volume") and dataset["used_bytes"] >= 0
        assert ("volume_bytes" in dataset) == (dataset["type"] == "volume")
        assert ("mounted" in dataset) == (dataset["type"] == "filesystem")


# proxmox samples


@for_each("pve/smartctl-json-*.json")
def test_smart_samples(file: Path) -> None:
    if "scan" in file.name:
        return
    try:
        smart = agent.parse_smart(file.read_text(), NOW)
    except agent.SourceError as error:
        assert "open-failed" in file.name and error.code == "failed"
        return
    if "standby" in file.name:
        assert smart["asleep"]
        return
    assert smart["model"] and smart["serial"] and smart["size_bytes"] > 10**11
    if "raid-volume" in file.name:
        assert "passed" not in smart and "temperature_celsius" not in smart  # unknown, not failed, and not 0°
        return
    assert smart["passed"] is ("smart-failed" not in file.name and "exit216" not in file.name)
    assert 15 < smart["temperature_celsius"] < 90
    assert ("media_errors" in smart) == ("nvme" in file.name)
    assert ("wear_ratio" in smart) == ("ssd" in file.name or "nvme" in file.name)


@for_each("pve/*rrd*.txt")
def test_rrd_samples(file: Path) -> None:
    rrd = agent.parse_rrd(file.read_text())
    assert rrd["node"] and rrd["vm"] and rrd["storage"]
    for node in rrd["node"].values():
        assert agent.to_number(node["ctime"]) and agent.to_number(node["load1"]) is not None
    for guest in rrd["vm"].values():
        assert guest["status"] and guest["name"]


@for_each("pve/pve9-run-pve-metrics*.jsonl")
def test_metrics_sample(file: Path) -> None:
    parts = agent.parse_metrics(file.read_text().splitlines()[0])
    assert sorted(parts) == ["lxc", "node", "qemu", "storage"]
    guest = agent.build_guest("100", {"type": "qemu"}, parts["qemu"]["data"]["100"])
    assert (guest["name"], guest["lock"], guest["tags"], guest["memory_host_bytes"]) == (
        "jumper", "backup", ["alice"], 5179975680,
    )  # fmt: skip


@for_each("pve/pve-members*.txt", "pve/*vmlist*.txt", "pve/*version-dotfile.txt")
def test_dot_files_of_pmxcfs(file: Path) -> None:
    assert agent.parse_object(file.read_text(), file.name)
    if "vmlist" in file.name:
        assert bool(agent.parse_vmlist(file.read_text())) != ("empty" in file.name)


@for_each("pve/*.cfg")
def test_section_files(file: Path) -> None:
    sections = agent.parse_sections(file.read_text())
    assert sections and all(kind and name and values for kind, name, values in sections)


@for_each("pve/zpool-status-text-*.txt")
def test_text_status_of_other_peoples_pools(file: Path) -> None:
    for pool in agent.parse_zpool_status(file.read_text()).values():
        assert pool["vdevs"] and agent.pool_layout(pool["vdevs"])
        margin = agent.redundancy_margin(pool["vdevs"])
        assert margin is not None and -1 <= margin <= 3


@for_each("pve/zfs24-man-zpool-status-j.json")
def test_json_status_of_the_manual(file: Path) -> None:
    (pool,) = parse_json(file.read_text()).values()
    assert pool["vdevs"]


@for_each("pve/pve-tasks-index.txt", "pve/pve9-tasks-active.txt")
def test_task_samples(file: Path) -> None:
    lines = [line.replace(": 1 ", ": ") for line in file.read_text().splitlines()]  # `active` has a 1 for "done"
    tasks = [agent.parse_task_line(line) for line in lines]
    assert all(task and task["ended_at"] >= task["started_at"] and task["user"] for task in tasks)
    if "index" in file.name:
        assert [task["result"] for task in tasks if task] == [
            "ok", "ok", "error", "warning", "error", "unknown", "ok", "error",
        ]  # fmt: skip


@for_each("pve/pve-vzdump-task-log-failed-lxc.txt")
def test_vzdump_log_sample(file: Path) -> None:
    storage, runs = agent.parse_vzdump_log(file.read_text())
    assert storage == "truenas-nfs-hdd"
    assert (runs[0]["vmid"], runs[0]["ok"], runs[0]["finished"]) == (107, False, "2022-08-20 15:12:17")
    assert runs[0]["error"].startswith("command 'set -o pipefail")


@for_each("pve/pve-corosync-quorumtool-*.txt")
def test_quorumtool_samples(file: Path) -> None:
    votes = agent.parse_quorumtool(file.read_text())
    assert votes["votes_present"] == votes["votes_expected"] and votes["votes_needed"] in (2, 3)


@for_each("pve/proc-*.txt")
def test_proc_samples(file: Path) -> None:
    text = file.read_text()
    kind = file.stem.removeprefix("proc-").split("-")[0]
    if kind == "stat":
        jiffies, cpus = agent.parse_cpu_times(text)
        assert jiffies[3] == 8979004 and cpus >= 4
    elif kind == "meminfo":
        sizes = agent.parse_meminfo(text)
        assert sizes["MemTotal"] > 10**9 and sizes["MemTotal"] % 1024 == 0
    elif kind == "pressure":
        assert "some_avg10" in agent.parse_pressure(text)
    elif kind == "diskstats":
        disks = agent.parse_diskstats(text)
        assert disks["sda"] == [1003346126, 505697032, 9653880] and "sdc" in disks
    elif file.name.startswith("proc-spl-arcstats"):
        assert agent.parse_kstat(text)["c_max"] > 0


@for_each("pve/pve-proc-net-dev.txt")
def test_net_dev_sample(file: Path) -> None:
    counters = agent.parse_net_dev(file.read_text())
    assert counters["enp8s0"] == [61243566218, 0, 9834411267, 0]
    assert counters["tap100i0"][3] == 0 and len(counters) == 12


@for_each("pve/pve8-ceph-status-trimmed.json")
def test_ceph_sample(file: Path) -> None:
    ceph = agent.parse_ceph_status(file.read_text())
    assert ceph["health"] == "HEALTH_WARN"
    assert [check["name"] for check in ceph["checks"]] == ["OSD_NEARFULL", "POOL_NEARFULL"]


@for_each("pve/pve-replication-state*.json", "pve/pve-job-state*.json")
def test_state_files(file: Path) -> None:
    assert agent.parse_object(file.read_text(), file.name)


@for_each("pve/pve-replication-state-corrupt-nul.bin")
def test_a_state_file_of_nul_is_garbage(file: Path) -> None:
    with pytest.raises(agent.SourceError, match="garbage"):
        agent.parse_object(agent.to_text(file.read_bytes()), file.name)


@for_each("pve/pve9-ha-manager_status-test.json")
def test_ha_sample(file: Path) -> None:
    assert agent.parse_ha_states(file.read_text())["vm:105"] == "started"


@for_each("pve/pve9-apt-update.json")
def test_update_list_sample(file: Path) -> None:
    assert [update["Package"] for update in json.loads(file.read_text())] == ["bind9-host", "pve-manager", "corosync"]
