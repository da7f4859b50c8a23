"""Every rule fires from a report as an agent makes it: a recorded host, bent until the rule has something to say.

Rules are tested elsewhere with reports made by hand, which may hold what no agent has ever sent.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded import HOSTS, RecordedProbe, recordings
from simulation import Simulation
from test_agent_collectors import FakeProbe, in_utc

import agent
import server

__all__ = ["in_utc"]
HOUR, DAY = 3600, 86400
TANK = "pve8-mirror"


class BentHost(FakeProbe):
    """A recorded host at any time: pvestatd's snapshot is as fresh as it always is."""

    def __init__(self, host: str, now: float) -> None:
        super().__init__(host)
        self.meta["now"] = now
        self.hidden: tuple[str, ...] = ()
        self.agent: dict[str, Any] = {"version": server.VERSION}
        with contextlib.suppress(agent.SourceError):
            parts = agent.parse_metrics(self.read_line(agent.METRICS))
            fresh = {name: {**part, "timestamp": now - 4} for name, part in parts.items()}
            self.texts[agent.METRICS] = json.dumps(fresh)

    def _find(self, path: str) -> Path:
        if path.startswith(self.hidden) and self.hidden:
            raise agent.SourceError("missing", f"{path}: not there")
        return super()._find(path)

    def list_dir(self, path: str) -> list[str]:
        return [name for name in super().list_dir(path) if f"{path}/{name}" not in self.hidden]

    def alter(self, words: str, pattern: str, new: str) -> None:
        """Another answer to a command that was recorded (the first whose words begin so)."""
        known = next(known for known in self.commands if known.startswith(words))
        folder, answer = self.commands[known]
        text, count = re.subn(pattern, new, (folder / answer["stdout"]).read_text())
        assert count, f"{pattern} is not in the answer to {known}"
        self.answers[known.replace("'", "")] = text

    def smart(self, device: str, change: Callable[[dict[str, Any]], None]) -> None:
        known = next(known for known in self.commands if known.startswith("smartctl") and known.endswith(device))
        folder, answer = self.commands[known]
        smart = json.loads((folder / answer["stdout"]).read_text())
        change(smart)
        for kind in ("", "-d sat ", "-d scsi ", "-d nvme "):
            self.answers[known.replace(device, kind + device)] = json.dumps(smart)


Bend = Callable[[BentHost, int], None]


def play(folder: Path, hosts: dict[str, Bend], *, times: int, every: float, of: str = TANK) -> Simulation:
    """Reports of some hosts (each the recorded one `of` a name, bent), `times` times, with the server's job between."""
    folder.mkdir(exist_ok=True)
    sim = Simulation(folder)
    sim.now = RecordedProbe(HOSTS / of).now()
    memories: dict[str, dict[str, Any]] = {}
    for name in hosts:
        sim.host(name, site="here")
    for number in range(times):
        for name, bend in hosts.items():
            probe = BentHost(of, sim.now)
            bend(probe, number)
            memory = memories.setdefault(name, {})
            sections, absent, errors = agent.collect(probe, memory, list(agent.COLLECTORS))
            body = json.loads(json.dumps({**sections, "absent": absent, "errors": errors}))
            sim.post(name, {**sim.envelope(name), "tick": "slow", "agent": probe.agent, **body})
        sim.wait(every, step=min(every, max(60, every / 12)))
    return sim


def once(change: Callable[[BentHost], None]) -> Bend:
    """The same at each time."""
    return lambda probe, number: change(probe)


def text(path: str, content: str) -> Bend:
    return once(lambda probe: probe.texts.update({path: content}))


def attribute(name: str, raw: Callable[[int], int]) -> Bend:
    def bend(probe: BentHost, number: int) -> None:
        def change(smart: dict[str, Any]) -> None:
            row = {"id": 1, "name": name, "value": 100, "raw": {"string": str(raw(number))}}
            smart["ata_smart_attributes"]["table"] = [
                old for old in smart["ata_smart_attributes"]["table"] if old["name"] != name] + [row]  # fmt: skip

        probe.smart("/dev/sdc", change)

    return bend


def cpu_time(probe: BentHost, number: int) -> None:
    probe.texts["/proc/stat"] = f"cpu  {100000 * number} 0 0 {100 * number} 0 0 0 0 0 0\ncpu0 1\n"


def kills(probe: BentHost, number: int) -> None:
    probe.texts["/proc/vmstat"] = f"nr_free_pages 1\noom_kill {number}\n"


def short_of_memory(probe: BentHost) -> None:
    probe.texts["/proc/meminfo"] = "MemTotal: 1000000 kB\nMemAvailable: 9000 kB\n"
    probe.texts[f"{agent.ZFS_KSTAT}/arcstats"] = ""


def full_root(probe: BentHost) -> None:
    probe.meta["statvfs"]["/"].update(f_blocks=1000, f_bfree=40, f_bavail=20)


def pool_space(*, cap: Callable[[int], int], frag: int = 5) -> Bend:
    def bend(probe: BentHost, number: int) -> None:
        size, used = 10**12, 10**10 * cap(number)
        row = f"rpool\t1\t{size}\t{used}\t{size - used}\t-\t{frag}\t{cap(number)}\t1.00\tONLINE\toff\n"
        probe.answers["zpool list -Hp"] = row
        probe.answers["zfs list -Hp -d 0"] = f"rpool\t{used}\t{size - used}\t1\n"

    return bend


def scan(words: str) -> Bend:
    return once(lambda probe: probe.alter("zpool status -p -P -s rpool", r"scan: scrub.*\n", f"scan: {words}\n"))


def storage_use(name: str, used: float) -> Bend:
    def change(probe: BentHost) -> None:
        parts = json.loads(probe.texts[agent.METRICS])
        parts["storage"]["data"][name].update(total=10**12, used=int(used * 10**12), avail=int((1 - used) * 10**12))
        probe.texts[agent.METRICS] = json.dumps(parts)

    return once(change)


def gone(*paths: str) -> Bend:
    """There at first."""
    return lambda probe, number: setattr(probe, "hidden", paths if number > 2 else ())


def clock(offset: float) -> Bend:
    return once(lambda probe: probe.agent.update(clock_offset=offset))


def hot(probe: BentHost) -> None:
    probe.smart("/dev/sdc", lambda smart: smart.update(temperature={"current": 72}))


def wearing(probe: BentHost, number: int) -> None:
    probe.smart("/dev/sda", lambda smart: smart.update(endurance_used={"current_percent": 50 + number // 2}))


def fewer_snapshots(probe: BentHost, number: int) -> None:
    names = "".join(f"rpool/data@autosnap_2026-11-23_0{hour}:00:01_hourly\t{hour}\t{hour}\n" for hour in range(1, 8))
    probe.answers["zfs list -Hp -r -t snapshot"] = names if number < 3 else ""
    probe.answers["zfs get -Hp"] = ""


def service_state(state: str) -> Bend:
    def change(probe: BentHost) -> None:
        status = json.loads(probe.read("/etc/pve/ha/manager_status"))
        status["timestamp"], status["service_status"]["vm:100"]["state"] = probe.now() - 5, state
        probe.texts["/etc/pve/ha/manager_status"] = json.dumps(status)

    return once(change)


def a_pair(probe: BentHost) -> None:
    conf = probe.read("/etc/corosync/corosync.conf")
    probe.texts["/etc/corosync/corosync.conf"] = re.sub(r"device \{.*?votes: 1\n  \}", "", conf, flags=re.DOTALL)


def nothing(probe: BentHost) -> None:
    del probe


def status_row(pattern: str, new: str, *, later: int = 0) -> Bend:
    """Another row in the text of `zpool status`."""

    def bend(probe: BentHost, number: int) -> None:
        if number >= later:
            probe.alter("zpool status -p -P -s rpool", pattern, new.replace("NUMBER", str(40 * number)))

    return bend


def metrics(kind: str, vmid: str, change: Callable[[dict[str, Any]], None]) -> Bend:
    def bend(probe: BentHost) -> None:
        parts = json.loads(probe.texts[agent.METRICS])
        change(parts[kind]["data"][vmid])
        probe.texts[agent.METRICS] = json.dumps(parts)

    return once(bend)


def silent_qemu(guest: dict[str, Any]) -> None:
    for name in ("diskread", "diskwrite", "blockstat", "running-qemu"):
        guest.pop(name, None)


def ceph_of_one_node(probe: BentHost) -> None:
    probe.meta["links"]["/etc/pve/ceph.conf"] = "/etc/pve/storage.cfg"
    probe.commands["ceph"] = (probe.path, {})
    check = {"severity": "HEALTH_ERR", "summary": {"message": "1 full osd(s)"}, "muted": False}
    probe.answers["ceph -s"] = json.dumps({"health": {"status": "HEALTH_ERR", "checks": {"OSD_FULL": check}}})


def worn_spare(probe: BentHost) -> None:
    probe.smart("/dev/nvme0", lambda smart: smart["nvme_smart_health_information_log"].update(critical_warning=4))


def full_special(probe: BentHost) -> None:
    probe.alter("zpool iostat -HPlpv tank", "288000000000\t191500000000", "400000000000\t79500000000")


CASES: list[tuple[str, dict[str, Any]]] = [
    ("pool-special", {"bend": once(full_special), "of": "pve9-raidz2-draid"}),
    ("cpu", {"bend": cpu_time, "times": 5, "every": 1200}),
    ("memory", {"bend": once(short_of_memory)}),
    ("memory-pressure", {"bend": text("/proc/pressure/memory", "some avg10=60 avg300=60\nfull avg10=60.00 avg300=60.00\n")}),
    ("oom", {"bend": kills}),
    ("root-full", {"bend": once(full_root)}),
    ("reboot-needed", {"bend": text("/etc/kernel/proxmox-boot-pin", "6.99.0-1-pve\n"), "times": 34, "every": DAY}),
    ("clock-skew", {"bend": clock(200.0), "every": 60, "times": 6}),
    ("agent-old", {"bend": once(lambda probe: probe.agent.update(version="0.0.1"))}),
    ("spool-dropped", {"bend": lambda probe, number: probe.agent.update(dropped=7 if number == 2 else 0)}),
    ("dataset-quota", {"bend": once(lambda probe: probe.alter(
        "zfs list -Hp -r -t filesystem,volume", r"(rpool/data\t)filesystem\t\d+\t\d+(\t\d+\t\d+\t\d+\t\d+)\t\d+", r"\1filesystem\t970\t30\2\t1000"))}),
    ("disk-gone", {"bend": gone("/sys/block/sdc", "/dev/sdc")}),
    ("disk-temperature", {"bend": once(hot)}),
    ("disk-wear-forecast", {"bend": wearing, "times": 40, "every": DAY}),
    ("smart-crc", {"bend": attribute("UDMA_CRC_Error_Count", lambda number: 3 * number)}),
    ("smart-growth", {"bend": attribute("Reallocated_Sector_Ct", lambda number: 8 * number)}),
    ("pool-capacity", {"bend": pool_space(cap=lambda number: 95)}),
    ("pool-fragmentation", {"bend": pool_space(cap=lambda number: 88, frag=85), "times": 30, "every": HOUR}),
    ("pool-vanished", {"bend": gone("/proc/spl/kstat/zfs/rpool")}),
    ("scrub-age", {"bend": scan("scrub repaired 0B in 00:24:43 with 0 errors on Sun Aug  2 10:40:00 2026")}),
    ("scrub-result", {"bend": scan("scrub repaired 0B in 00:24:43 with 3 errors on Sun Nov 22 10:40:00 2026")}),
    ("scrub-stuck", {"bend": scan("scrub in progress since Sun Nov 22 10:40:00 2026\n\t1G / 2G scanned, 1G / 2G issued\n\t0B repaired, 46.00% done, 01:00:00 to go"), "times": 30, "every": HOUR}),
    ("backup-job", {"bend": text("/var/lib/pve-manager/jobs/vzdump-backup-7c1f1d2e-3b55.json",
                                 '{"state": "stopped", "time": 1795401760, "msg": "could not activate storage: it is not online"}')}),
    ("snapshot-gone", {"bend": fewer_snapshots}),
    ("storage-full", {"bend": storage_use("local", 0.96)}),
    ("updates-security", {"bend": once(nothing), "times": 20, "every": DAY}),
    ("updates-stale", {"bend": once(nothing), "times": 10, "every": DAY}),
    ("ha-service", {"bend": service_state("error"), "of": "cluster-ha"}),
    ("cluster-storage-full", {"bend": storage_use("nfs-iso", 0.97), "of": "cluster-ha", "times": 15, "every": 60}),
    ("pool-margin", {"bend": status_row(r"(457B-part3 .*)", r"\1  (resilvering)", later=2)}),
    ("pool-spare", {"bend": status_row(r"\n\nerrors", "\n\tspares\n\t  /dev/sdx1  FAULTED   was /dev/sdx1\n\nerrors")}),
    ("slow-ios", {"bend": status_row(r"(457B-part3 .*)2\n", r"\g<1>NUMBER\n")}),
    ("dataset-unmounted", {"bend": once(lambda probe: probe.alter(
        "zfs list -Hp -r -t filesystem,volume", r"\tyes\t", "\tno\t"))}),
    ("smart-warning", {"bend": once(worn_spare), "of": "pve9-raidz2-draid"}),
    ("guest-locked", {"bend": metrics("qemu", "101", lambda guest: guest.update(lock="snapshot-delete"))}),
    ("guest-hangs", {"bend": metrics("qemu", "101", silent_qemu), "every": 120}),
    ("guest-disk-full", {"bend": metrics("lxc", "201", lambda guest: guest.update(disk=guest["maxdisk"]))}),
    ("ceph", {"bend": once(ceph_of_one_node)}),
    ("cluster-margin", {"bend": once(a_pair), "of": "cluster-qdevice"}),
]  # fmt: skip


@pytest.mark.parametrize("rule, case", CASES, ids=[rule for rule, _ in CASES])
def test_a_rule_fires_from_what_an_agent_sends(
    rule: str, case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "VERSION", "0.9.0")  # for agent-old: there are no two releases yet
    times, every = case.get("times", 4), case.get("every", 1800)
    sim = play(tmp_path, {"bent": case["bend"]}, times=times, every=every, of=case.get("of", TANK))
    fired = {row["rule"] for row in sim.alerts()} | {row["rule"] for row in sim.alerts(state="resolved")}
    sim.close()
    assert rule in fired


def test_rules_fire_from_hosts_as_they_were_recorded(tmp_path: Path) -> None:
    fired = set()
    for path in recordings():
        sim = play(tmp_path / path.name, {path.name: once(nothing)}, times=4, every=1800, of=path.name)
        sim.wait(600, step=30)  # and nothing more comes
        fired |= {row["rule"] for row in sim.alerts()}
        sim.close()
    assert AS_RECORDED - fired == set()


AS_RECORDED = set((
    "backup-excludes backup-failed backup-missing backup-overdue blind-spot certificate clock-unsynced "
    "cluster-ceph cluster-member cluster-quorum disk-wear guest-down guest-snapshot-age ha-disarmed ha-node ha-stale "
    "host-offline io-pressure mail-queue pool-data-errors pool-state pool-unanswered replication section-failing "
    "selftest-failed service-failed smart-failed smart-unknown snapshot-age storage-inactive storage-metadata unit-failed "
    "vdev-errors").split())  # fmt: skip


# several hosts


def test_rules_about_several_hosts_fire(tmp_path: Path) -> None:
    """Two nodes of one cluster that see each other as off line, whose clocks differ; and a site that falls silent."""

    def other_view(probe: BentHost, number: int) -> None:
        del number
        probe.answers["chronyc"] = probe.run("chronyc", "-c", "-n", "tracking").replace("0.000", "0.900", 1)
        members = json.loads(probe.read("/etc/pve/.members"))
        members["nodename"], members["cluster"]["quorate"] = "beta", 0
        probe.texts["/etc/pve/.members"] = json.dumps(members)
        probe.texts["/proc/sys/kernel/hostname"] = "beta\n"

    sim = play(tmp_path / "cluster", {"alpha": once(nothing), "beta": other_view}, times=15, every=60, of="cluster-ha")
    assert "cluster-disagree" in {row["rule"] for row in sim.alerts()}
    sim.close()
    sim = play(tmp_path / "site", {f"host{number}": once(nothing) for number in range(7)}, times=2, every=60)
    sim.wait(HOUR, step=30)
    assert "site-offline" in {row["rule"] for row in sim.alerts()}
    sim.close()


def test_two_machines_under_one_name_are_told(tmp_path: Path) -> None:
    sim = play(tmp_path, {"twice": once(nothing)}, times=1, every=60)
    probe = BentHost(TANK, sim.now)
    sections, absent, errors = agent.collect(probe, {}, ["node"])
    for number in range(6):
        for run in ("one", "other"):
            node = {**sections["node"], "boot_id": run, "uptime_seconds": 1000 + 30 * number}
            body = {"absent": absent, "errors": errors, "node": node, "agent": {"version": server.VERSION}}
            sim.post("twice", {**sim.envelope("twice", run=run), **json.loads(json.dumps(body))})
            sim.wait(15, step=15)
    assert "host-twice" in {row["rule"] for row in sim.alerts()}
    sim.close()


TOGETHER = {"cluster-disagree", "site-offline", "host-twice"}
ELSEWHERE = {
    "server-certificate", "log-ins-fail",  # are about the server
    "cluster-clock",  # needs the clocks of two hosts: tests/test_server_rules.py
    "copy-missing",  # tests/test_server_answers.py: one agent's dump folder beside another's storage
    "suspects-hold-pool", "snapshot-missing", "snapshot-unpruned", "snapshot-growth", "scrub-slow",  # tests/test_server_answers.py
    "pool-forecast", "space-forecast",  # need days of history: tests/test_server_rules.py
    "pool-readonly",  # tests/test_server_rules_reported.py
}


def test_no_rule_is_left_that_was_never_seen_to_fire_from_an_agents_report() -> None:
    told = AS_RECORDED | {rule for rule, _ in CASES} | TOGETHER | ELSEWHERE
    assert {rule.name for rule in server.RULES} - told == set()
    assert told - {rule.name for rule in server.RULES} == set()
