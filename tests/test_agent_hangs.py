"""The sick host: commands that hang, flood, lie or die, a blocked /etc/pve. Real processes, real time.

The files are those of a recorded PVE 9 host with the pools rpool, tank and vault; `zpool` and its like are scripts that
play its recorded answers, but for `zpool status tank`, which misbehaves as the case says.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from agent_support import Sink, config_for, wait_for

import agent

HOST = Path(__file__).resolve().parent / "hosts" / "pve9-raidz2-draid"
FAST_SECTIONS = {"node", "guests", "storages", "pool_states"}


class HostProbe(agent.Probe):
    """The real probe, over the files of a recorded host and the commands in a folder."""

    def __init__(self, commands: Path, **more):
        super().__init__(path=f"{commands}:/usr/bin:/bin", **more)
        self.now_offset = json.loads((HOST / "meta.json").read_text())["now"] - time.time()
        self.blocked: threading.Event | None = None

    def _open_door(self, kind, path, job):
        moved = f"{HOST}/files{path}"
        jobs = {
            "read": lambda: agent.to_text(agent.read_bytes(moved, agent.READ_LIMIT)),
            "list": lambda: sorted(os.listdir(moved)),
            "stat": lambda: os.path.exists(moved),
            "statvfs": lambda: os.statvfs("/"),
            "link": lambda: path,
        }
        pve = path.startswith(self.pve_root)

        def moved_job():
            if pve and self.blocked is not None:
                self.blocked.wait(30)
            return jobs[kind]()

        return super()._open_door(kind, path, moved_job)

    def read_line(self, path, limit=agent.READ_LIMIT):
        return self.read(path).split("\n")[0]

    def stat(self, path):
        try:
            return os.stat(f"{HOST}/files{path}")
        except OSError as error:
            raise agent.source_error(error, path) from None

    def now(self):
        return time.time() + self.now_offset


def install_commands(folder: Path, misbehaviour: str) -> None:
    """Scripts in place of the host's commands; each start of the bad one leaves a line in `started`."""
    index = json.loads((HOST / "commands" / "index.json").read_text())
    cases: dict[str, list[str]] = {}
    for words, answer in index.items():
        name, *rest = shlex.split(words)
        play = f"cat {shlex.quote(str(HOST / 'commands' / answer['stdout']))}" if answer.get("stdout") else ":"
        pattern = shlex.quote(" ".join(rest))
        cases.setdefault(name, []).append(f"{pattern}) {play}; exit {answer.get('exit', 0)};;")
    for name, lines in cases.items():
        if name == "zpool":
            lines.insert(0, f'"status "*" tank") echo x >> {folder}/started; {misbehaviour};;')
        script = folder / name
        script.write_text('#!/bin/sh\ncase "$*" in\n' + "\n".join(lines) + "\n*) echo unknown >&2; exit 2;;\nesac\n")
        script.chmod(0o755)


@pytest.fixture
def short_limits(monkeypatch):
    monkeypatch.setattr(agent, "ZFS_LIMIT", 1.0)


CASES = [  # what `zpool status tank` does, the code and words of the error
    ("exec sleep 47", "timeout", "no answer in 1 s"),
    ("trap '' TERM INT HUP; sleep 47 & sleep 47; sleep 47", "timeout", "no answer in 1 s"),
    ("exec yes", "too_large", "16 MiB"),
    ("exec yes >&2", "timeout", "no answer in 1 s"),
    ("exec head -c 5000 /dev/urandom", "garbage", "zpool status"),
    ("exec head -c 500 /dev/zero", "garbage", "zpool status"),
    ("exit 0", "garbage", "zpool status"),
    ('echo \'{"pools":{"tank":\'; exit 0', "garbage", "zpool status"),
    ("echo '[1,2]'; exit 0", "garbage", "zpool status"),
    ("echo 'internal error: out of memory' >&2; exit 1", "failed", "internal error: out of memory"),
    ("kill -9 $$", "failed", "killed by signal 9"),
    ("echo 'cannot open: Permission denied' >&2; exit 1", "denied", "Permission denied"),
]


@pytest.mark.parametrize("misbehaviour, code, words", CASES)
def test_one_bad_pool_is_told_and_the_others_are_whole(misbehaviour, code, words, tmp_path, short_limits):
    install_commands(tmp_path, misbehaviour)
    began = time.monotonic()
    sections, _, errors = agent.collect(HostProbe(tmp_path), {}, ["pools"])
    assert time.monotonic() - began < 5
    assert errors == {}  # the section was had
    pools = {pool["name"]: pool for pool in sections["pools"]}
    assert set(pools) == {"rpool", "tank", "vault"}
    for name in ("rpool", "vault"):
        assert pools[name]["vdevs"] and pools[name]["size_bytes"] > 0 and pools[name]["redundancy_margin"] >= 0
    assert pools["tank"]["unknown_reason"].startswith(f"{code}: ") and words in pools["tank"]["unknown_reason"]
    assert pools["tank"]["state"] == "DEGRADED"  # from the kernel's file, which always answers
    assert "size_bytes" not in pools["tank"] and "redundancy_margin" not in pools["tank"]
    json.loads(agent.to_json(sections))


def test_pool_in_state_d_is_left_alone_until_its_command_has_gone(tmp_path, short_limits, monkeypatch):
    """No process can be put into state D at will; a signal that has no effect looks the same."""
    monkeypatch.setattr(agent, "KILL_GRACE", 0.2)
    monkeypatch.setattr(agent, "kill_group", lambda child: None)
    install_commands(tmp_path, "exec sleep 5")
    probe, memory = HostProbe(tmp_path), {}
    assert [reason_of_tank(probe, memory) for _ in range(3)] == ["stuck"] * 3
    assert (tmp_path / "started").read_text().count("x") == 1
    monkeypatch.undo()
    monkeypatch.setattr(agent, "ZFS_LIMIT", 1.0)
    pid = next(iter(probe.stuck.values()))[0]
    os.kill(pid, 9)  # the pool was resumed: the process goes, and the next round asks again
    wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    assert reason_of_tank(probe, memory) == "timeout"
    assert (tmp_path / "started").read_text().count("x") == 2


def reason_of_tank(probe, memory):
    pools = agent.collect(probe, memory, ["pools"])[0]["pools"]
    return next(pool["unknown_reason"] for pool in pools if pool["name"] == "tank").partition(":")[0]


class LiveService:
    """The whole service in real time, its fast tick each second."""

    def __init__(self, tmp_path, probe, sink, more="medium_seconds = 2\nslow_seconds = 3600\n"):
        self.sink = sink
        config = config_for(tmp_path, sink.url, f"[intervals]\nfast_seconds = 1\n{more}")
        self.agent = agent.Agent(config, probe, str(tmp_path / "state"))
        self.thread = threading.Thread(target=self.agent.serve, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.agent.stop()
        self.thread.join(5)
        assert not self.thread.is_alive()

    def reports(self, tick):
        return [report for report in self.sink.reports if report["tick"] == tick]


def gaps(reports):
    times = [report["time"] for report in reports]
    return [round(after - before, 1) for before, after in zip(times, times[1:], strict=False)]


def test_fast_ticks_keep_their_pace_beside_a_pool_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "ZFS_LIMIT", 3.0)
    install_commands(tmp_path, "trap '' TERM; sleep 47")
    with Sink() as sink, LiveService(tmp_path, HostProbe(tmp_path), sink) as service:
        wait_for(lambda: len(service.reports("medium")) >= 3 and len(service.reports("fast")) >= 8, 40)
        fast, medium = service.reports("fast"), service.reports("medium")
    assert all(0.7 <= gap <= 1.3 for gap in gaps(fast)[1:])  # the first one ends at the host's own moment
    assert all(set(report) >= FAST_SECTIONS for report in fast)
    reasons = [pool.get("unknown_reason", "") for report in medium for pool in report.get("pools", ())]
    assert any(reason.startswith("timeout: ") for reason in reasons)
    assert Counter(
        name for report in medium for name in ("pools", "datasets", "services") if name in report
    ).keys() >= {
        "pools",
        "datasets",
    }


def pve_threads():
    return {thread for thread in threading.enumerate() if thread.name == "pve"}


def test_blocked_etc_pve_costs_its_sections_and_not_the_pace(tmp_path, monkeypatch):
    install_commands(tmp_path, "exit 1")
    probe = HostProbe(tmp_path, deadline=0.5)
    with Sink() as sink, LiveService(tmp_path, probe, sink, "medium_seconds = 3600\nslow_seconds = 3600\n") as service:
        wait_for(lambda: len(service.reports("fast")) >= 2, 20)
        probe.blocked, threads = threading.Event(), pve_threads()
        before = len(service.reports("fast"))
        wait_for(lambda: len(service.reports("fast")) >= before + 6, 20)
        sick = service.reports("fast")[before + 1 :]
        assert pve_threads() == threads  # no second one is started
        probe.blocked.set()
        probe.blocked = None
        after = len(service.reports("fast"))
        wait_for(lambda: len(service.reports("fast")) >= after + 3, 20)
        well = service.reports("fast")[-1]
    assert all(gap <= 1.7 for gap in gaps(sick))
    assert all("node" in report and "pool_states" in report for report in sick)
    assert {report["errors"]["guests"]["code"] for report in sick[1:]} <= {"stuck", "timeout"}
    assert all("guests" not in report or report["guests"] for report in sick)  # never "no guests"
    assert "guests" not in well["errors"] and len(well["guests"]) == len(service.reports("fast")[0]["guests"])


def tells_vault_degraded(report):
    return {"name": "vault", "state": "DEGRADED"}.items() <= {
        key: value for pool in report.get("pool_states", ()) if pool["name"] == "vault" for key, value in pool.items()
    }.items()


def test_pool_that_changes_is_accepted_within_six_seconds(tmp_path):
    """From the kernel's state file changing to the report, with the pool in full, being accepted: ≤ 6 s."""
    install_commands(tmp_path, f"cat {HOST}/commands/nothing; exit 1")
    probe = HostProbe(tmp_path)
    state = ["ONLINE\n"]
    real = probe.read
    probe.read = lambda path, *more: state[0] if path == "/proc/spl/kstat/zfs/vault/state" else real(path, *more)
    with Sink() as sink, LiveService(tmp_path, probe, sink, "medium_seconds = 3600\nslow_seconds = 3600\n") as service:
        service.agent.config.intervals["fast"] = 3600  # only the look is left
        wait_for(lambda: service.reports("medium") and not service.agent.lanes["medium"].busy, 30)
        service.agent.next_at["fast"] = time.monotonic() + 3600
        time.sleep(0.5)
        state[0] = "DEGRADED\n"
        changed = time.monotonic()
        report = wait_for(lambda: next(filter(tells_vault_degraded, sink.reports), None))
        took = time.monotonic() - changed
    assert took <= 6.0
    assert "pools" in report


def test_no_process_is_left_behind(tmp_path, short_limits):
    mark = f"4{os.getpid()}"
    install_commands(tmp_path, f"trap '' TERM; sleep {mark} & sleep {mark}")
    agent.collect(HostProbe(tmp_path), {}, ["pools"])
    wait_for(lambda: subprocess.run(["pgrep", "-f", f"sleep {mark}"], capture_output=True).returncode == 1)
