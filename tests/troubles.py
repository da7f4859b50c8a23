"""What is lastingly wrong on some hosts of the played fleet: each a function that is laid over the host's sections, with
the rule that has to tell of it.

    pools -> disks -> guests -> copies -> the host and its cluster -> who has which
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

MINUTE, HOUR, DAY, GIB = 60, 3600, 86400, 1 << 30

Sections = dict[str, Any]


class Trouble(NamedTuple):
    rule: str
    lay: Callable[[Sections, float, float], None]  # sections, when the play began, now


def dicts(sections: Sections, name: str) -> list[dict[str, Any]]:
    return [item for item in sections.get(name) or () if isinstance(item, dict)]


def mirrors_and_raids(sections: Sections) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for pool in dicts(sections, "pools"):
        for vdev in pool.get("vdevs") or ():
            if len(vdev.get("children") or ()) > 1 and vdev.get("class", "normal") == "normal":
                yield pool, vdev


def widest(sections: Sections) -> tuple[dict[str, Any], dict[str, Any]]:
    return max(mirrors_and_raids(sections), key=lambda found: len(found[1]["children"]))


# pools


def lay_spare_in_use(sections: Sections, began: float, now: float) -> None:
    """A disk came back, and the spare that stood in for it is still there."""
    _, vdev = widest(sections)
    disk = vdev["children"][0]
    vdev["children"][0] = {"class": "normal", "name": "spare-0", "type": "spare", "state": "ONLINE", "children": [
        disk, {"class": "normal", "name": "scsi-SPARE-part1", "type": "disk", "state": "ONLINE"}]}


def lay_hidden_leaf(sections: Sections, began: float, now: float) -> None:
    """A disk is UNAVAIL, and the pool's word is ONLINE all the same."""
    pool, vdev = widest(sections)
    vdev["children"][1].update(state="UNAVAIL", reason="corrupted data")
    pool["redundancy_margin"] = max(0, pool["redundancy_margin"] - 1)


def lay_endless_resilver(sections: Sections, began: float, now: float) -> None:
    """A resilver begins anew every two hours and never gets beyond 40 %."""
    pool, vdev = widest(sections)
    run = (now - began) % (2 * HOUR)
    pool["scan"] = {"function": "resilver", "state": "scanning", "started_at": now - run, "ended_at": None,
                    "progress_ratio": round(0.4 * run / (2 * HOUR), 4), "remaining_seconds": 3 * HOUR, "errors": 0}


GROWS_SINCE = 4 * DAY  # before the play begins


def lay_growth(sections: Sections, began: float, now: float) -> None:
    """A pool fills up within some days; most of it are snapshots of one guest."""
    pool = dicts(sections, "pools")[0]
    most, grown = pool["size_bytes"], (now - began + GROWS_SINCE) / DAY * 0.05
    used = int(most * min(0.79, 0.5 + grown))
    pool.update(usable_used_bytes=used, usable_available_bytes=most - used, allocated_bytes=used, free_bytes=most - used,
                capacity_ratio=round(used / most, 4))
    volumes = [item for item in dicts(sections, "datasets") if item.get("type") == "volume"]
    for volume in volumes[:1]:
        held = int(most * grown * 0.8)
        volume.update(used_bytes=volume["used_bytes"] + held,
                      used_by_snapshots_bytes=(volume.get("used_by_snapshots_bytes") or 0) + held)


SCRUBS_EACH: float = 5 * MINUTE  # of the play a scrub ends, which takes a week


def lay_slow_scrubs(sections: Sections, began: float, now: float) -> None:
    """Scrubs that took four hours each, and one that took nine: a disk answers late."""
    pool, vdev = widest(sections)
    nth = min(4, int((now - began) // SCRUBS_EACH))
    pool["last_scrub"] = {"ended_at": began - (5 - nth) * 7 * DAY, "duration_seconds": (9 if nth == 4 else 4) * HOUR,
                          "repaired_bytes": (0, 0, 4096, 0, 0)[nth], "errors": 0}
    for number, leaf in enumerate(vdev["children"]):
        leaf["read_wait_seconds"] = 0.048 if number == 1 else 0.009


def lay_full_special(sections: Sections, began: float, now: float) -> None:
    """The special vdev has little room left, and small blocks go to the slow disks."""
    for pool in dicts(sections, "pools"):
        for vdev in pool.get("vdevs") or ():
            if vdev.get("class") == "special":
                vdev.update(size_bytes=479_500_000_000, allocated_bytes=400_000_000_000)


# disks


def lay_dumb_disk(sections: Sections, began: float, now: float) -> None:
    disk = dicts(sections, "disks")[0]
    disk.update(dict.fromkeys(("passed", "temperature_celsius", "wear_ratio", "power_on_hours")),
                unknown_reason="smartctl: Unknown USB bridge [0x152d:0x0578 (0x508)]")


def lay_selftest(sections: Sections, began: float, now: float) -> None:
    dicts(sections, "disks")[-1]["selftest"] = {"passed": False, "status": "Completed: read failure"}


def lay_suspects(sections: Sections, began: float, now: float) -> None:
    """A vdev has lost what it may lose, and a disk that is left has sectors that it cannot read."""
    pool, vdev = min(mirrors_and_raids(sections), key=lambda found: len(found[1]["children"]))
    vdev["children"][0].update(state="FAULTED", reason="too many errors")
    vdev["state"] = pool["state"] = "DEGRADED"
    pool["redundancy_margin"] = 0
    for item in dicts(sections, "pool_states"):
        item["state"] = "DEGRADED" if item["name"] == pool["name"] else item["state"]
    for disk in dicts(sections, "disks"):
        if disk["name"] == vdev["children"][1].get("disk"):
            disk.update(pending_sectors=24)


# guests


def running(sections: Sections, kind: str = "qemu") -> list[dict[str, Any]]:
    return [guest for guest in dicts(sections, "guests") if guest["type"] == kind and guest.get("status") == "running"]


def lay_left_lock(sections: Sections, began: float, now: float) -> None:
    """A backup that was killed left its lock, and the guest is off."""
    running(sections)[1].update(status="stopped", lock="backup", lock_held=False, onboot=True)


def lay_changed_guest(sections: Sections, began: float, now: float) -> None:
    """Somebody gave a guest less memory, and two minutes later it does not answer any more."""
    guest = running(sections)[0]
    if now - began > 2 * MINUTE:
        guest.update(config_changed=["memory"], config_changed_at=began + 2 * MINUTE)
    if now - began > 4 * MINUTE:
        guest["responds"] = False


def lay_unmounted(sections: Sections, began: float, now: float) -> None:
    for dataset in dicts(sections, "datasets"):
        if dataset["type"] == "filesystem" and dataset.get("mountpoint", "").startswith("/") and "/" in dataset["name"]:
            dataset.update(mounted=False, canmount="on", vmid=None)
            return


# copies


def lay_failed_job(sections: Sections, began: float, now: float) -> None:
    job = sections["backups"]["jobs"][0]
    job.update(enabled=True, last_state="could not activate storage 'pbs-main': 500 Can't connect", last_run_at=began - HOUR)


def lay_excluded_disks(sections: Sections, began: float, now: float) -> None:
    """The newest backup of a guest left out a disk that is meant to be in it."""
    runs = {run["vmid"]: run for run in sections["backups"]["guests"]}
    guest = next(guest for guest in running(sections) if guest["vmid"] in runs and guest.get("volumes"))
    guest["volumes"][0]["backup"] = False
    runs[guest["vmid"]]["newest_ok"]["excluded_disks"] = [guest["volumes"][0]["name"]]


def lay_reused_vmid(sections: Sections, began: float, now: float) -> None:
    """A guest was made under the number of one that is gone: the backups are the other one's."""
    for guest in running(sections)[:1]:
        guest.update(created_at=began - 3 * DAY, name="reused")


def lay_own_backups(sections: Sections, began: float, now: float) -> None:
    """All backups lie on a disk of the host itself."""
    sections.setdefault("storages", []).append({
        "storage": "own-disk", "type": "dir", "content": "backup", "shared": False, "enabled": True, "active": True,
        "total_bytes": 4 << 40, "used_bytes": 1 << 40, "available_bytes": 3 << 40})
    for run in sections["backups"]["guests"]:
        run.setdefault("newest_ok", {})["storage"] = "own-disk"
    for entry in dicts(sections, "snapshots"):
        entry["newest_guid"] = None
    sections["snapshots"] = []


def lay_late_replication(sections: Sections, began: float, now: float) -> None:
    vmid = running(sections)[0]["vmid"]
    sections["replication"] = [*dicts(sections, "replication"), {
        "id": f"{vmid}-9", "vmid": vmid, "target": "pve-away", "enabled": True, "schedule": "*/15", "fail_count": 5,
        "last_sync_at": began - DAY, "last_try_at": now - MINUTE, "error": "ssh: connect to host pve-away: No route to host"}]


def lay_late_snapshots(sections: Sections, began: float, now: float) -> None:
    """Whatever made the snapshots stopped the day before yesterday; one dataset never had any."""
    sections["snapshots"] = [{**entry, "class": "autosnap_hourly", "interval_seconds": HOUR, "count": 36,
                              "newest_at": began - 7 * HOUR, "oldest_at": began - 43 * HOUR}
                             for entry in dicts(sections, "snapshots")[:3]]


def lay_missing_snapshots(sections: Sections, began: float, now: float) -> None:
    """One volume of many lacks the daily snapshots; of another nobody ever deleted any."""
    names = [item["name"] for item in dicts(sections, "datasets") if "/vm-" in item["name"]][:8]
    sections["snapshots"] = [{
        "dataset": name, "class": "autosnap_daily", "interval_seconds": DAY, "count": 30 if nth else 900,
        "newest_at": now - now % DAY, "oldest_at": now - now % DAY - (29 if nth else 899) * DAY,
        "newest_guid": str(7000 + nth), "used_bytes": 3 * GIB} for nth, name in enumerate(names[:-1])]


# the host and its cluster


def lay_certificate(sections: Sections, began: float, now: float) -> None:
    sections["certificates"][0].update(expires_at=began + 4 * DAY, starts_at=began - 86 * DAY)


def lay_thin_metadata(sections: Sections, began: float, now: float) -> None:
    sections["storages"].append({
        "storage": "local-lvm", "type": "lvmthin", "content": "images,rootdir", "shared": False, "enabled": True,
        "active": True, "total_bytes": 1 << 40, "used_bytes": 1 << 39, "available_bytes": 1 << 39, "metadata_used_ratio": 0.9})


def lay_ceph_warn(sections: Sections, began: float, now: float) -> None:
    sections.pop("cluster", None)
    sections["ceph"] = {"health": "HEALTH_WARN", "checks": [
        {"name": "OSD_DOWN", "severity": "HEALTH_WARN", "message": "1 osds down", "muted": False}]}


def lay_ha_disarmed(sections: Sections, began: float, now: float) -> None:
    sections["ha"]["disarm"] = {"mode": "freeze", "state": "disarmed"}


def lay_blind_spots(sections: Sections, began: float, now: float) -> None:
    sections["safeguards"].update(zed_mail=False, root_mail=False, security_source=False, scrub_scheduled=False)


def lay_old_kernel(sections: Sections, began: float, now: float) -> None:
    """It was forgotten at the last upgrade: see the list `drift`; and a reboot has been due for weeks."""
    sections["node"].update(kernel="6.2.16-3-pve", pve_version="8.0.4")


# who has which, by a host's place among twenty; each host is played from the recording that is named


SICK: dict[int, tuple[str, tuple[Trouble, ...]]] = {
    8: ("pve9-raidz2-draid", (
        Trouble("pool-spare", lay_spare_in_use), Trouble("smart-unknown", lay_dumb_disk),
        Trouble("selftest-failed", lay_selftest), Trouble("copy-missing", lay_own_backups),
        Trouble("dataset-unmounted", lay_unmounted), Trouble("scrub-slow", lay_slow_scrubs))),
    11: ("cluster-ha", (
        Trouble("ha-disarmed", lay_ha_disarmed), Trouble("replication", lay_late_replication),
        Trouble("guest-hangs", lay_changed_guest), Trouble("storage-metadata", lay_thin_metadata),
        Trouble("certificate", lay_certificate))),
    14: ("pve8-mirror", (
        Trouble("pool-forecast", lay_growth), Trouble("backup-job", lay_failed_job),
        Trouble("backup-excludes", lay_excluded_disks), Trouble("guest-down", lay_left_lock),
        Trouble("ceph", lay_ceph_warn), Trouble("blind-spot", lay_blind_spots), Trouble("", lay_old_kernel))),
    16: ("pve9-raidz2-draid", (
        Trouble("pool-state", lay_hidden_leaf), Trouble("snapshot-age", lay_late_snapshots),
        Trouble("pool-special", lay_full_special), Trouble("", lay_reused_vmid))),
    17: ("pve9-raidz2-draid", (
        Trouble("scrub-stuck", lay_endless_resilver), Trouble("suspects-hold-pool", lay_suspects),
        Trouble("snapshot-missing", lay_missing_snapshots), Trouble("snapshot-unpruned", lay_missing_snapshots))),
}
