"""A real agent process under faults: full and read-only disks, kill -9, clocks that jump, damaged files, a double.

    the agent as a process -> disks -> kills -> clocks -> damage -> two with one name
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_support import Request, Sink, accept, problem, wait_for, write_config

import agent

ROOT = Path(__file__).resolve().parent.parent
ONLY_FAST = "[intervals]\nfast_seconds = 1\nmedium_seconds = 86400\nslow_seconds = 86400\n"
# The agent as it is, with a wall clock that is off by what a file says, and two cheap collectors.
LAUNCHER = """
import sys, time
sys.path.insert(0, {root!r})
import agent
real = time.time
time.time = lambda: real() + float(open({offset!r}).read())
agent.COLLECTORS.clear()
agent.collector("node", tick="fast")(lambda probe, memory: {{"name": "x"}})
agent.collector("tasks", tick="fast")(lambda probe, memory: memory.update(n=memory.get("n", 0) + 1) or [{{"n": memory["n"]}}])
sys.exit(agent.main(["start", "--config", {config!r}]))
"""

# --- the agent as a process ---


class Running:
    """An agent that reports each second; its state, its log and its clock's error are files of the test's."""

    def __init__(self, folder: Path, url: str, state: Path | None = None) -> None:
        self.state, self.log = state or folder / "state", folder / "log"
        self.offset = folder / "offset"
        if not self.offset.exists():
            self.set_clock(0.0)
        config = write_config(folder, url, ONLY_FAST)
        script = LAUNCHER.format(root=str(ROOT), offset=str(self.offset), config=str(config))
        environ = {"PATH": os.environ["PATH"], "STATE_DIRECTORY": str(self.state)}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([sys.executable, "-c", script], env=environ, stdout=log, stderr=log)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def set_clock(self, seconds: float) -> None:
        fresh = self.offset.with_suffix(".new")
        fresh.write_text(str(seconds))
        fresh.replace(self.offset)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(10) == 0

    def told(self, words: str) -> bool:
        return words in self.log.read_text()

    def waiting(self) -> int:
        return len(list((self.state / "spool").glob("*.json.gz")))


class Server:
    """Takes reports or not, as the test says, and knows what it has taken."""

    def __init__(self) -> None:
        self.away = False
        self.taken: dict[str, set[int]] = defaultdict(set)
        self.tasks: dict[str, list[int]] = defaultdict(list)
        self.last: dict[str, Any] = {}
        self.sink = Sink(self.answer)

    def answer(self, request: Request) -> Any:
        if self.away:
            return problem(503, "busy")(request)
        return self.take(request)

    def take(self, request: Request) -> Any:
        for report in request.reports:
            self.last = report
            if report["seq"] not in self.taken[report["run_id"]]:
                self.tasks[report["run_id"]] += [task["n"] for task in report.get("tasks", ())]
            self.taken[report["run_id"]].add(report["seq"])
        return accept(request)

    def count(self) -> int:
        return sum(map(len, self.taken.values()))

    def assert_no_gap(self) -> None:
        for seqs in self.taken.values():
            assert sorted(seqs) == list(range(1, len(seqs) + 1))


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    with server.sink:
        yield server


# --- disks ---


class Disk:
    """The state directory on a disk that can be filled and emptied: a small tmpfs, or (where nothing may be mounted)
    a limit on what the process may write."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.path, self.filler = folder / "disk", folder / "disk" / "filler"
        self.path.mkdir()
        argv = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(self.path)]
        self.mounted = kind == "tmpfs" and subprocess.run(argv, capture_output=True).returncode == 0

    def fill(self, running: Running) -> None:
        if not self.mounted:
            hard = resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (0, hard))
            return
        with open(self.filler, "ab", buffering=0) as handle:
            try:
                while True:
                    handle.write(bytes(1024))
            except OSError:
                pass

    def empty(self, running: Running) -> None:
        if not self.mounted:
            hard = resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        else:
            self.filler.unlink()

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=True)


@pytest.fixture(params=["tmpfs", "limit"])
def disk(tmp_path: Path, request: Any) -> Iterator[Disk]:
    disk = Disk(tmp_path, request.param)
    yield disk
    disk.close()


def test_full_disk_and_no_server_lose_nothing_that_fits_into_ram(tmp_path, server, disk):
    with Running(tmp_path, server.sink.url, disk.path) as running:
        wait_for(server.count)
        server.away = True
        wait_for(lambda: running.waiting() >= 1)
        disk.fill(running)
        wait_for(lambda: running.told("cannot write") or not disk.mounted and len(server.sink.requests) > 4, 15)
        time.sleep(3)
        assert list(disk.path.glob("spool/*.tmp")) == []  # nothing half written takes the room
        disk.empty(running)
        server.away = False
        made = server.last["seq"] + 5
        wait_for(lambda: not running.waiting() and len(server.taken[server.last["run_id"]]) >= made, 70)
        running.stop()
    server.assert_no_gap()
    assert server.last["agent"]["dropped"] == 0


def test_what_is_lost_with_a_full_disk_is_counted_over_the_restart(tmp_path, server):
    disk = Disk(tmp_path, "tmpfs")
    try:
        with Running(tmp_path, server.sink.url, disk.path) as running:
            wait_for(server.count)
            run = server.last["run_id"]
            server.away = True
            wait_for(lambda: running.waiting() >= 1)
            disk.fill(running)
            if not disk.mounted:  # the limit would go with the process: the count is written by the one that stops
                disk.empty(running)
            time.sleep(3)
            kept = running.waiting()
            running.stop()
        (stopped,) = [line for line in running.log.read_text().splitlines() if "agent: stopped" in line]
        lost = int(stopped.split("; ")[2].split()[0]) if "lost" in stopped else 0
        assert lost >= 1 or not disk.mounted
        (disk.path / "filler").unlink(missing_ok=True)
        server.away = False
        with Running(tmp_path, server.sink.url, disk.path) as running:
            wait_for(lambda: not running.waiting() and server.count() >= kept + 5, 20)
            running.stop()
        told = [report["agent"]["dropped"] for report in server.sink.reports if report["run_id"] != run]
        assert told[0] == lost and told[-1] == 0 and kept >= 1
    finally:
        disk.close()


def test_read_only_state_directory_costs_the_memory_and_no_report(tmp_path, server):
    disk = Disk(tmp_path, "tmpfs")
    try:
        if disk.mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(disk.path)], check=True)
        with Running(tmp_path, server.sink.url, disk.path) as running:
            wait_for(lambda: server.count() >= 3, 20)
            server.away = True
            time.sleep(2.5)
            server.away = False
            wait_for(lambda: server.last["seq"] >= 6, 20)
            running.stop()
            assert not running.told("fault in the agent")
        server.assert_no_gap()
    finally:
        disk.close()


# --- kills ---


@pytest.mark.parametrize("seed", [1, 2])
def test_kill_at_random_moments_and_a_server_that_flaps_lose_no_report_that_was_on_disk(tmp_path, server, seed):
    chance = random.Random(seed)

    def flap(request: Request) -> Any:
        fate = chance.choice(["take", "take", "busy", "hang up", "take and hang up", "proxy", "late"])
        if fate == "late":
            time.sleep(0.7)
        if fate in ("busy", "proxy"):
            return problem(503, "busy")(request) if fate == "busy" else (200, "", {})
        answer = server.take(request) if fate != "hang up" else None
        return answer if fate in ("take", "late") else None

    server.sink.answer = flap
    on_disk: set[tuple[str, int]] = set()
    for _ in range(5):
        with Running(tmp_path, server.sink.url) as running:
            time.sleep(0.8 + 1.5 * chance.random())
            running.process.kill()
            running.process.wait()
        for path in (tmp_path / "state" / "spool").glob("*.json.gz"):
            report = json.loads(agent.unpack(path.read_bytes()))
            on_disk.add((report["run_id"], report["seq"]))
    server.sink.answer = server.answer
    with Running(tmp_path, server.sink.url) as running:
        wait_for(lambda: not running.waiting() and server.taken and not server.away, 30)
        wait_for(lambda: server.count() > 5)
        running.stop()
        assert not running.told("fault in the agent")
    assert {(run, seq) for run, seqs in server.taken.items() for seq in seqs} >= on_disk
    server.assert_no_gap()
    repeated = [n for numbers in server.tasks.values() for n in numbers]
    assert len(repeated) - len(set(repeated)) <= 5  # at most the tick under way at each kill tells its tasks again


# --- clocks ---


@pytest.mark.parametrize("years", [1, -1])
def test_clock_that_jumps_a_year_and_back_neither_cuts_off_nor_loses(tmp_path, server, years):
    def strict(request: Request) -> Any:
        if abs(int(request.headers["webhook-timestamp"]) - time.time()) > 300:
            return problem(401, "clock_skew", server_time=time.time())(request)
        return server.answer(request)

    server.sink.answer = strict
    with Running(tmp_path, server.sink.url) as running:
        wait_for(lambda: server.count() >= 2, 20)
        running.set_clock(years * 365 * 86400)
        before = server.count()
        wait_for(lambda: server.count() >= before + 2, 20)  # with the server's time
        assert abs(server.last["agent"]["clock_offset"] + years * 365 * 86400) < 5 or server.count() < before + 3
        server.away = True
        wait_for(lambda: running.waiting() >= 2, 20)
        running.set_clock(0.0)
        time.sleep(1.5)
        server.away = False
        before = server.last["seq"]
        wait_for(lambda: not running.waiting() and server.last["seq"] > before + 2, 30)
        running.stop()
    server.assert_no_gap()
    assert server.last["agent"]["dropped"] == 0


# --- damage ---

HARMS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(random.Random(1).randbytes(3000)),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "other json": lambda path: path.write_bytes(b'[[1, "x"], null]'),
    "folder": lambda path: path.mkdir(parents=True),
    "dangling": lambda path: path.symlink_to("/nonexistent/x"),
}
FILES = ["losses.json", "stuck.json", "memory/tasks.json", "spool/000000000001-1763880000.json.gz", "mailed-root", "agent.pid"]


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_state_files_keep_no_agent_from_reporting(tmp_path, server, harm):
    for name in FILES:
        path = tmp_path / "state" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (name == "agent.pid" and harm in ("folder", "dangling")):
            HARMS[harm](path)
    good = {"version": 1, "host_id": "pve-host-01", "run_id": "earlier", "seq": 1, "agent": {"dropped": 0}}
    path = tmp_path / "state" / "spool" / "000000000002-1763880000.json.gz"
    path.write_bytes(agent.pack(agent.to_json(good)))
    with Running(tmp_path, server.sink.url) as running:
        wait_for(lambda: server.taken.get("earlier") and len(server.taken) == 2, 20)
        running.stop()
        assert not running.told("fault in the agent") and not running.told("Traceback")


@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"\xff\xfe", b"token = ", b"[" * 50_000, b'server_url = "https://[::1"\ntoken = "x"', b'server_url = "https://\xc3\xa4"'])
def test_damaged_config_is_one_line(tmp_path, content):
    config = tmp_path / "agent.toml"
    config.write_bytes(content)
    environ = {"PATH": os.environ["PATH"], "STATE_DIRECTORY": str(tmp_path / "state")}
    argv = [sys.executable, "agent.py", "start", "--config", str(config)]
    answer = subprocess.run(argv, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=20)
    assert answer.returncode == 1 and answer.stdout == ""
    assert answer.stderr.count("\n") == 1 and answer.stderr.startswith("agent: ")


# --- two with one name ---


def test_two_agents_with_one_identity_lose_nothing(tmp_path, server):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with Running(folders[0], server.sink.url) as one, Running(folders[1], server.sink.url) as other:
        wait_for(lambda: len(server.taken) == 2, 20)
        server.away = True
        wait_for(lambda: one.waiting() and other.waiting(), 20)
        server.away = False
        wait_for(lambda: not one.waiting() and not other.waiting() and all(len(seqs) > 3 for seqs in server.taken.values()), 30)
        one.stop()
        other.stop()
    server.assert_no_gap()
