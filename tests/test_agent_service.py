"""The loop: ticks, the look between them, lanes that hang, signals, systemd. Time is an argument."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from agent_support import FakeProbe, Sink, accept, closed_port_url, config_for, registered, wait_for, write_config

import agent

ROOT = Path(__file__).resolve().parent.parent
POOL = "/proc/spl/kstat/zfs/tank/state"
GUESTS = "/sys/fs/cgroup/qemu.slice"


def named(value):
    return lambda probe, memory: value


def read_states(probe, memory):
    return [{"name": "tank", "state": probe.read(POOL).strip()}]


class Service:
    """An agent without its sender's thread: what it would send is taken from it."""

    def __init__(self, tmp_path, files=None, more=""):
        self.probe = FakeProbe(files)
        config = config_for(tmp_path, closed_port_url(), more)
        self.agent = agent.Agent(config, self.probe, str(tmp_path / "state"))

    def turn(self, now):
        """The reports of one turn, and the seconds until the next."""
        self.probe.monotonic = lambda: now
        wait = self.agent.turn(now)
        return self.taken(), wait

    def taken(self):
        pending, self.agent.sender.pending = self.agent.sender.pending, []
        return [json.loads(message.body) for message in pending]

    def until(self, now, enough):
        """Turn at this moment until the reports are enough (lanes need a little real time)."""
        reports = []

        def looked():
            reports.extend(self.turn(now)[0])
            return enough(reports)

        wait_for(looked)
        return reports

    def settle(self, now):
        """Take all that the start sends."""
        return self.until(now, lambda _: not any(lane.busy for lane in self.agent.lanes.values()))


def sections(report):
    return sorted(set(report) - agent.HEADER_KEYS)


# --- ticks ---


def test_start_sends_fast_at_once_and_the_rest_as_soon_as_it_is_there(tmp_path):
    with registered(node=("fast", named({})), pools=("medium", named([])), disks=("slow", named([]))):
        service = Service(tmp_path)
        first, _ = service.turn(1000.0)
        assert sections(first[0]) == ["node"] and first[0]["tick"] == "fast" and first[0]["seq"] == 1
        reports = first + service.until(1000.0, lambda reports: len(first + reports) == 3)
    assert sorted(report["tick"] for report in reports) == ["fast", "medium", "slow"]
    assert [report["seq"] for report in reports] == [1, 2, 3]


def test_each_tick_keeps_its_pace_on_the_monotonic_clock(tmp_path):
    with registered(node=("fast", named({})), pools=("medium", named([]))):
        service = Service(tmp_path, more="[intervals]\nfast_seconds = 10\nmedium_seconds = 60\n")
        service.settle(0.0)
        times = {"fast": [], "medium": []}
        now = 0.0
        while now < 600:
            now += 0.5
            for report in service.turn(now)[0]:
                times[report["tick"]].append(now)
            if service.agent.lanes["medium"].busy:
                for report in service.until(now, lambda _: not service.agent.lanes["medium"].busy):
                    times[report["tick"]].append(now)
    assert len(times["fast"]) in (59, 60, 61) and len(times["medium"]) in (9, 10, 11)
    assert {round(b - a, 1) for a, b in zip(times["fast"], times["fast"][1:], strict=False)} == {10.0}
    assert {round(b - a, 1) for a, b in zip(times["medium"], times["medium"][1:], strict=False)} == {60.0}


def test_hosts_started_together_do_not_report_together(tmp_path):
    with registered(node=("fast", named({}))):
        moments = set()
        for number in range(20):
            (tmp_path / str(number)).mkdir()
            service = Service(tmp_path / str(number))
            service.agent.config.host_id = f"pve-{number}"
            service.turn(0.0)
            moments.add(round(service.agent.next_at["fast"], 1))
    assert len(moments) > 15
    assert all(0 < moment <= 30 for moment in moments)


def test_ticks_missed_while_the_machine_slept_are_not_made_up_for(tmp_path):
    with registered(node=("fast", named({}))):
        service = Service(tmp_path)
        service.settle(0.0)
        assert len(service.turn(100_000.0)[0]) == 1
        assert service.turn(100_000.1)[0] == []
        assert service.agent.next_at["fast"] > 100_000.1


@pytest.mark.parametrize("now", [7.3 + 30 * number for number in (0, 1, 1000, 10_000_000)])
def test_a_tick_is_never_due_twice_in_one_moment(tmp_path, now):
    with registered(node=("fast", named({}))):
        service = Service(tmp_path)
        service.settle(0.0)
        service.turn(now)
        moment = service.agent.next_at["fast"]
        assert len(service.turn(moment)[0]) == 1
        assert service.turn(moment)[0] == []


def test_wall_clock_may_jump(tmp_path):
    with registered(node=("fast", named({}))):
        service = Service(tmp_path)
        service.settle(0.0)
        due = service.agent.next_at["fast"]
        service.probe.clock -= 86400
        assert service.turn(due - 0.1)[0] == []
        assert len(service.turn(due)[0]) == 1


# --- lanes: what hangs delays nothing else ---


def test_hanging_pool_delays_neither_fast_ticks_nor_the_sections_already_there(tmp_path):
    gate = threading.Event()
    collectors = {
        "node": ("fast", named({})),
        "services": ("medium", named([])),
        "pools": ("medium", lambda probe, memory: gate.wait(20) and []),
        "backups": ("medium", named({})),
        "disks": ("slow", named([])),
    }
    with registered(**collectors):
        service = Service(tmp_path, more="[intervals]\nfast_seconds = 10\nmedium_seconds = 20\nslow_seconds = 20\n")
        service.until(0.0, lambda reports: any(report["tick"] == "slow" for report in reports))
        times, told = [], []
        for now in range(1, 61):
            for report in service.turn(float(now))[0]:
                if report["tick"] == "fast":
                    times.append(now)
                told += sections(report)
        assert len(times) == 6 and told.count("services") == 1 and told.count("disks") >= 2
        assert "pools" not in told
        gate.set()
        later = service.until(61.0, lambda reports: any("backups" in report for report in reports))
    assert "pools" in {name for report in later for name in sections(report)}


def test_rounds_do_not_pile_up(tmp_path):
    gate, runs = threading.Event(), []
    with registered(pools=("medium", lambda probe, memory: runs.append(1) or gate.wait(20) and [])):
        service = Service(tmp_path, more="[intervals]\nfast_seconds = 1\nmedium_seconds = 1\n")
        for now in range(20):
            service.turn(float(now))
        assert runs == [1]
        gate.set()


# --- the look between ticks ---


def test_pool_that_changes_state_is_reported_at_once_with_the_pools_in_full(tmp_path):
    collectors = {"pool_states": ("fast", read_states), "pools": ("medium", read_states)}
    with registered(**collectors):
        service = Service(
            tmp_path, {POOL: "ONLINE\n"}, "[intervals]\nfast_seconds = 3600\nmedium_seconds = 3600\nslow_seconds = 3600"
        )
        service.settle(0.0)
        service.probe.files[POOL] = "DEGRADED\n"
        assert service.turn(agent.LOOK_SECONDS - 0.1)[0] == []
        report = service.until(agent.LOOK_SECONDS, bool)[0]
    assert report["tick"] == "fast"
    assert report["pool_states"] == report["pools"] == [{"name": "tank", "state": "DEGRADED"}]


def test_pool_state_is_told_soon_even_when_the_pools_command_hangs(tmp_path):
    gate = threading.Event()
    hang = [False]
    collectors = {
        "pool_states": ("fast", read_states),
        "pools": ("medium", lambda probe, memory: not hang[0] or gate.wait(20) and ["full"]),
    }
    with registered(**collectors):
        service = Service(
            tmp_path, {POOL: "ONLINE"}, "[intervals]\nfast_seconds = 3600\nmedium_seconds = 3600\nslow_seconds = 3600"
        )
        service.settle(0.0)
        hang[0] = True
        service.probe.files[POOL] = "SUSPENDED"
        reports, wait = service.turn(agent.LOOK_SECONDS)
        assert reports == [] and wait <= agent.URGENT_SECONDS
        reports, _ = service.turn(agent.LOOK_SECONDS + agent.URGENT_SECONDS)
        assert [sections(report) for report in reports] == [["pool_states"]]
        gate.set()
        assert sections(service.until(agent.LOOK_SECONDS + 2, bool)[0]) == ["pools"]


def test_second_change_while_the_first_is_collected_is_not_lost(tmp_path):
    gates = [threading.Event(), threading.Event()]
    states = []

    def slow_pools(probe, memory):
        states.append(probe.read(POOL))
        if len(states) > 1:
            gates[min(len(states) - 2, 1)].wait(20)
        return [states[-1]]

    with registered(pool_states=("fast", read_states), pools=("medium", slow_pools)):
        service = Service(
            tmp_path, {POOL: "ONLINE"}, "[intervals]\nfast_seconds = 3600\nmedium_seconds = 3600\nslow_seconds = 3600"
        )
        service.settle(0.0)
        for now, state in ((agent.LOOK_SECONDS, "DEGRADED"), (2 * agent.LOOK_SECONDS, "FAULTED")):
            service.probe.files[POOL] = state
            service.turn(now)
        for gate in gates:
            gate.set()
        service.until(3 * agent.LOOK_SECONDS, lambda reports: any(report.get("pools") == ["FAULTED"] for report in reports))


@pytest.mark.parametrize("before, after", [({}, {POOL: "ONLINE"}), ({POOL: "ONLINE"}, {})])
def test_pool_that_appears_or_goes_is_a_change(tmp_path, before, after):
    with registered(pool_states=("fast", named([])), pools=("medium", named([]))):
        service = Service(
            tmp_path, before, "[intervals]\nfast_seconds = 3600\nmedium_seconds = 3600\nslow_seconds = 3600"
        )
        service.settle(0.0)
        service.probe.files = after
        assert sections(service.until(5.0, bool)[0]) == ["pool_states", "pools"]


def test_import_under_way_is_no_change(tmp_path):
    with registered(pool_states=("fast", named([])), pools=("medium", named([]))):
        service = Service(
            tmp_path, {POOL: "ONLINE"}, "[intervals]\nfast_seconds = 3600\nmedium_seconds = 3600\nslow_seconds = 3600"
        )
        service.settle(0.0)
        service.probe.files[POOL] = "TRANSITIONING"
        assert service.turn(5.0)[0] == []
        service.probe.files[POOL] = "ONLINE"
        assert service.turn(10.0)[0] == []


def test_guest_that_starts_or_stops_is_reported_at_once_before_pvestatd_knows(tmp_path):
    told = [{"vmid": 104, "status": "stopped"}, {"vmid": 105, "status": "running", "cpu_ratio": 0.5}]
    fresh = lambda probe, memory: [dict(guest) for guest in told]  # noqa: E731
    with registered(guests=("fast", fresh)):
        service = Service(tmp_path, {f"{GUESTS}/105.scope/x": ""}, "[intervals]\nfast_seconds = 20\n")
        service.settle(0.0)
        service.probe.files = {f"{GUESTS}/104.scope/x": "", f"{GUESTS}/cgroup.procs": ""}
        now = service.agent.next_look
        report = service.turn(now)[0][0]
        assert report["guests"] == [{"vmid": 104, "status": "running"}, {"vmid": 105, "status": "stopped"}]
        told[0]["status"], told[1]["status"] = "paused", "running"
        later = next(reports[-1] for at in range(60) if (reports := service.turn(now + 30 + at)[0]))
    assert later["guests"] == told  # after a while pvestatd is believed again


def test_new_entry_in_the_task_list_sends_tasks_only_when_there_are_some(tmp_path):
    ended = []
    with registered(tasks=("fast", lambda probe, memory: ended or None), node=("fast", named({}))):
        service = Service(tmp_path, {agent.TASKS_PATH: "a"}, "[intervals]\nfast_seconds = 300\n")
        service.settle(0.0)
        now = service.agent.next_look
        service.probe.files[agent.TASKS_PATH] = "a running one"
        assert service.turn(now)[0] == []
        ended.append({"upid": "x"})
        service.probe.files[agent.TASKS_PATH] = "an ended one"
        assert [sections(report) for report in service.turn(now + 5)[0]] == [["tasks"]]


def test_look_runs_no_command_and_tries_other_zfs_files_only_once(tmp_path):
    probe = FakeProbe({POOL: "ONLINE", "/proc/spl/kstat/zfs/arcstats": "", "/proc/spl/kstat/zfs/zil": ""})
    tried = []
    real = probe.read
    probe.read = lambda path: tried.append(path) or real(path)
    probe.run = lambda *argv, **more: pytest.fail("a command was run")
    seen = agent.look(probe, {})
    assert {path.split("/")[5] for path in tried if "/zfs/" in path} == {"tank", "arcstats", "zil"}
    tried.clear()
    again = agent.look(probe, seen)
    assert {path.split("/")[5] for path in tried if "/zfs/" in path} == {"tank"}
    assert again["pools"] == {"tank": "ONLINE"}


def test_a_fault_of_ours_does_not_end_the_loop(tmp_path, capsys):
    with registered(node=("fast", named({}))):
        service = Service(tmp_path)
        turns = []

        def turn(now):
            turns.append(now)
            if len(turns) == 1:
                service.agent.wake()
                raise RuntimeError("can't start new thread")
            service.agent.stop()
            return 0.0

        service.agent.turn = turn
        service.agent.serve()
    assert len(turns) == 2
    assert "can't start new thread" in capsys.readouterr().out


# --- systemd ---


@pytest.fixture
def notify_socket(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind(str(tmp_path / "notify"))
        one.settimeout(5)
        yield one, {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "3000000"}


def test_readiness_watchdog_and_stop_are_told(tmp_path, notify_socket):
    one, environ = notify_socket
    with registered(node=("fast", named({}))):
        service = Service(tmp_path)
        service.agent.notifier = agent.Notifier(environ)
        service.turn(0.0)
        assert [one.recv(999) for _ in range(3)] == [
            b"READY=1",
            b"WATCHDOG=1",
            b"STATUS=reporting; 0 reports wait on disk",
        ]
        _, wait = service.turn(0.5)
        assert wait <= 0.5  # three beats per watchdog interval
        service.turn(1.0)
        assert one.recv(999) == b"WATCHDOG=1"
        service.agent.close()
        assert one.recv(999).startswith(b"STOPPING=1")


def test_status_says_why_nothing_gets_through(tmp_path, notify_socket):
    one, environ = notify_socket
    with registered(node=("fast", named({}))):
        service = Service(tmp_path)
        service.agent.notifier = agent.Notifier(environ)
        service.agent.sender.trouble = "404 unknown_host"
        service.turn(0.0)
        assert one.recv(999) and one.recv(999)
        assert b"404 unknown_host" in one.recv(999)


def test_abstract_socket_is_understood(tmp_path):
    name = f"proxmon-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind("\0" + name)
        one.settimeout(5)
        agent.Notifier({"NOTIFY_SOCKET": "@" + name}).tell("READY=1")
        assert one.recv(99) == b"READY=1"


# --- the whole, as a process ---


class Running:
    """A real agent process against an address."""

    def __init__(self, tmp_path, url, more="[intervals]\nfast_seconds = 1\n"):
        config = write_config(tmp_path, url, more)
        self.environ = {"PATH": os.environ["PATH"], "STATE_DIRECTORY": str(tmp_path / "state")}
        self.state = tmp_path / "state"
        self.log = tmp_path / "log"
        argv = [sys.executable, "agent.py", "start", "--config", str(config)]
        self.process = subprocess.Popen(
            argv, cwd=ROOT, env=self.environ, stdout=open(self.log, "ab"), stderr=subprocess.STDOUT
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def lines(self):
        return self.log.read_text().splitlines()

    def waiting(self):
        folder = self.state / "spool"
        return sorted(folder.glob("*.json.gz")) if folder.exists() else []

    def stop(self, number=signal.SIGTERM):
        """How long it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(20)
        return time.monotonic() - began


def test_first_lines_of_a_good_start(tmp_path):
    with Sink() as sink, Running(tmp_path, sink.url) as running:
        wait_for(lambda: len(running.lines()) >= 3)
        assert running.lines()[:3] == [
            "agent: starting with host_id=pve-host-01",
            f"reporter: connected to {sink.url}",
            "reporter: accepted host:pve-host-01",
        ]
        assert running.stop() < 2
        assert running.process.returncode == 0
        assert not (running.state / "agent.pid").exists()


def test_process_is_still_known_by_its_file_after_it_started_over(tmp_path):
    with Sink() as sink, Running(tmp_path, sink.url) as running:
        wait_for(lambda: sink.requests)
        words = Path(f"/proc/{running.process.pid}/cmdline").read_bytes().split(b"\0")
        assert words[words.index(str(ROOT / "agent.py").encode()) :][:2] == [str(ROOT / "agent.py").encode(), b"start"]
        assert (running.state / "agent.pid").read_text() == f"{running.process.pid}\n"


def test_sigterm_stops_in_time_while_the_server_does_not_answer(tmp_path):
    gate = threading.Event()
    with Sink(lambda request: gate.wait(30) and accept(request)) as sink, Running(tmp_path, sink.url) as running:
        wait_for(lambda: sink.requests)
        assert running.stop() < 2
        gate.set()
        assert len(running.waiting()) >= 1


def test_nothing_is_lost_over_an_outage_a_sigkill_and_a_restart(tmp_path):
    """Server away, agent killed in between: what was made before arrives, each report once, without a gap."""
    away = [True]

    def answer(request):
        return (503, {}, {}) if away[0] else accept(request)

    with Sink(answer) as sink:
        with Running(tmp_path, sink.url) as first:
            wait_for(lambda: len(first.waiting()) >= 4, 20)
            first.stop(signal.SIGKILL)
            kept = len(first.waiting())
        away[0] = False
        sink.requests.clear()
        with Running(tmp_path, sink.url) as second:
            wait_for(lambda: not second.waiting() and len({report["run_id"] for report in sink.reports}) == 2, 20)
            second.stop()
    by_run = {}
    for report in sink.reports:
        by_run.setdefault(report["run_id"], []).append(report["seq"])
    ((old, old_seqs),) = [
        (run, seqs) for run, seqs in by_run.items() if len(seqs) >= kept and run != sink.reports[0]["run_id"]
    ]
    assert sorted(old_seqs) == list(range(1, kept + 1))
    new_seqs = by_run[sink.reports[0]["run_id"]]
    assert sorted(new_seqs) == list(range(1, len(new_seqs) + 1))
    assert sink.reports[0]["run_id"] != old  # newest first


def test_pid_file_that_its_holder_removes_while_we_open_it_is_not_taken_for_ours(tmp_path, monkeypatch):
    first, second, third = (agent.PidFile(str(tmp_path)) for _ in range(3))
    assert first.claim() and not second.claim()
    real = agent.fcntl.flock

    def flock(handle, how):
        monkeypatch.setattr(agent.fcntl, "flock", real)
        first.release()  # between our open and our lock
        real(handle, how)

    monkeypatch.setattr(agent.fcntl, "flock", flock)
    assert second.claim()
    assert second.holder() == os.getpid() and not third.claim()
    second.release()
    assert second.holder() is None and not (tmp_path / "agent.pid").exists()


def test_pid_file_is_removed_before_it_is_unlocked(tmp_path, monkeypatch):
    """After that it may be the next agent's."""
    first = agent.PidFile(str(tmp_path))
    assert first.claim()
    handle, real = first.handle, os.unlink
    monkeypatch.setattr(os, "unlink", lambda path: os.fstat(handle) and real(path))
    first.release()
    assert not (tmp_path / "agent.pid").exists()


def test_second_agent_with_the_same_state_is_refused(tmp_path):
    with Sink() as sink, Running(tmp_path, sink.url) as running:
        wait_for(lambda: sink.requests)
        again = subprocess.run(
            [sys.executable, "agent.py", "start", "--config", str(tmp_path / "agent.toml")],
            cwd=ROOT,
            env=running.environ,
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert again.returncode == 1
    assert f"pid {running.process.pid}" in again.stderr
