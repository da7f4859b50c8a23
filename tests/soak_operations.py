"""Drills of an operator with a running fleet: upgrade from the last version and back, a restore on a new machine, no growth."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median

from conftest import ROOT, LiveAgent, LiveServer, build_report
from faults import Outcome, Players, complaints, database_of, serving, stored, tally, until

import agent

LAST_VERSION = "c61810b"  # of the schema 3, before what CHANGELOG.md calls unreleased


def run(seconds: float) -> bool:
    print("| drill | acknowledged | found | doubled | all answered again after | notes |\n|---|---|---|---|---|---|")
    good = True
    for drill in (upgrade, new_machine, growth):
        with tempfile.TemporaryDirectory(prefix="proxmon-drill-") as folder:
            try:
                outcome = drill(Path(folder), seconds if drill is growth else 5, random.Random(1))
            except Exception:
                traceback.print_exc()
                print(f"| {drill.__doc__} | FAILED | | | | |", flush=True)
                good = False
                continue
        good = good and outcome.good
        print(f"| {drill.__doc__} | {outcome.acknowledged} | {outcome.found} | {outcome.doubled} | "
              f"{outcome.recovered or 0:.1f} s | {outcome.note} |", flush=True)  # fmt: skip
    return good


# --- upgrade ---


def has_last_version() -> bool:
    argv = ["git", "-C", str(ROOT), "cat-file", "-e", LAST_VERSION + "^{commit}"]
    return shutil.which("git") is not None and subprocess.run(argv, capture_output=True).returncode == 0


def take_last_version(folder: Path) -> Path:
    """The last version's files, as they were."""
    folder.mkdir()
    argv = ["git", "-C", str(ROOT), "archive", LAST_VERSION]
    archive = subprocess.run(argv, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def upgrade(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """upgrade of the server from the last version, then of an agent; then the server goes back and forth once more"""
    old = take_last_version(folder / "old")
    server = LiveServer(folder)
    new_argv, old_argv = server.argv, [sys.executable, str(old / "server.py")]
    server.argv = old_argv
    server.start()
    try:
        api = server.api_token()
        probe = LiveAgent(folder, server, server.register("pve1"), program=old / "agent.py")
        probe.start()
        with Players(server, folder, every=0.1) as players:
            send_past(players)
            until(lambda: chunks(server) >= len(players.all), 60, "hours of the past are packed by the old version")
            took, slowest = [], 0.0
            for argv, command in ((new_argv, ["migrate"]), (new_argv, ["rollback", "--to", "3"]), (new_argv, ["migrate"])):
                server.stop()
                began = time.monotonic()
                server.argv = argv
                done = server.command(*command)
                assert done.returncode == 0, (command, done.stderr)
                took.append(f"{command[0]} {time.monotonic() - began:.1f} s")
                if command[0] == "rollback":
                    server.argv = old_argv
                server.start()
                players.heard(began)
                slowest = max(slowest, time.monotonic() - began)
                before = len(stored_of(server, "pve1"))
                until(lambda: len(stored_of(server, "pve1")) > before, 60, "the agent goes on")  # noqa: B023
                time.sleep(max(0.5, seconds / 3))
                assert server.get("/api/v1/hosts/played0", api)["last_seen_at"]  # the token of the old version holds
            assert "SECRET_KEY_BASE" not in server.log.read_text()
            probe.stop()
            probe.program = ROOT / "agent.py"
            probe.start()
            until(lambda: len({run_id for _, run_id, _ in stored_of(server, "pve1")}) == 2, 60, "the new agent is heard")
            players.recover(time.monotonic())
            probe.stop()
        assert not complaints(server.log) and not complaints(probe.log) and not players.refused
        return tally(players.acknowledged, database_of(server), slowest, ", ".join(took))
    finally:
        if probe.process and probe.process.poll() is None:
            probe.process.kill()
        server.stop(signal.SIGKILL)


def stored_of(server: LiveServer, host: str) -> list:
    return [key for key in stored(database_of(server)) if key[0] == host]


def send_past(players: Players) -> None:
    """Some hours of the past, as a backlog brings them."""
    now = time.time()
    for player in players.all:
        past = [build_report(player.host, seq, now - 5 * 3600 + seq * 60, "past", pools=None) for seq in range(1, 241)]
        answer = player.client.send(agent.to_json(past))
        assert agent.judge(answer, len(past)) is agent.ACCEPTED, answer
        player.acknowledged |= {(player.host, "past", report["seq"]) for report in past}


def chunks(server: LiveServer) -> int:
    db = sqlite3.connect(f"file:{database_of(server)}?mode=ro", uri=True)
    try:
        return db.execute("SELECT count(*) FROM chunk").fetchone()[0]
    finally:
        db.close()


# --- restore ---


def new_machine(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """restore on a new machine from a backup and the secret alone, while the hosts go on"""
    here, there = folder / "here", folder / "there"
    here.mkdir()
    there.mkdir()
    with serving(here) as server, Players(server, folder) as players:
        time.sleep(seconds)
        before = players.acknowledged
        assert server.command("backup", str(folder / "copy")).returncode == 0
        api = server.api_token("later")
        server.stop(signal.SIGKILL)  # the machine burns
        between = players.acknowledged
        began = time.monotonic()
        other = LiveServer(there, PORT=str(server.port), PUBLIC_URL=server.url)
        other.port, other.url = server.port, server.url
        shutil.copy(database_of(server) + ".secret", database_of(other) + ".secret")
        done = other.command("restore", str(folder / "copy"))
        assert done.returncode == 0, done.stderr
        other.start()
        try:
            recovered = players.recover(began)
            assert other.request("GET", "/api/v1/hosts", Authorization=f"Bearer {api}").status == 401
            assert not complaints(other.log) and not players.refused
            kept = before | (players.acknowledged - between)
            lost = len(between - set(stored(database_of(other))))
            return tally(kept, database_of(other), recovered, f"no token was made anew; made after the backup and gone: {lost}")
        finally:
            other.stop()


# --- growth ---


def usage(pid: int) -> tuple[float, int, int]:
    """MiB resident, open files, threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    rss = int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024
    return rss, len(os.listdir(f"/proc/{pid}/fd")), int(re.findall(r"Threads:\s+(\d+)", status)[0])


def growth(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """server and a real agent under steady load: no growth of memory, open files, threads"""
    with serving(folder) as server, Players(server, folder, 8, every=0.5) as players:
        api = server.api_token()
        probe = LiveAgent(folder, server, server.register("pve1"))
        probe.start()
        assert server.process and probe.process
        programs = {"server": server.process.pid, "agent": probe.process.pid}
        samples: dict[str, list[tuple[float, int, int]]] = {name: [] for name in programs}
        end, pages = time.monotonic() + seconds, ("/healthz", "/metrics", "/api/v1/hosts", "/api/v1/alerts", "/login")
        while time.monotonic() < end:
            for page in pages:
                server.request("GET", page, Authorization=f"Bearer {api}")
            for name, pid in programs.items():
                samples[name].append(usage(pid))
            time.sleep(min(2.0, seconds / 20))
        recovered = players.recover(time.monotonic())
        probe.stop()
        told = tally(players.acknowledged, database_of(server), recovered, describe_growth(samples))
    grown = [name for name, found in samples.items() if has_grown(found)]
    assert not grown, f"{grown}: {told.note}"
    return told


def thirds(samples: list[tuple[float, int, int]], field: int) -> tuple[float, float]:
    """Medians of the second and of the last third: the first is the warm-up."""
    third = len(samples) // 3
    return median(s[field] for s in samples[third : 2 * third]), median(s[field] for s in samples[2 * third :])


def has_grown(samples: list[tuple[float, int, int]]) -> bool:
    memory, files, threads = (thirds(samples, field) for field in range(3))
    return memory[1] > memory[0] * 1.05 + 2 or files[1] > files[0] + 3 or threads[1] > threads[0] + 2


def describe_growth(samples: dict[str, list[tuple[float, int, int]]]) -> str:
    words: list[str] = []
    for name, found in samples.items():
        (rss, rss_end), (files, files_end), (threads, threads_end) = (thirds(found, field) for field in range(3))
        words.append(f"{name}: {rss:.1f} → {rss_end:.1f} MiB, {files:.0f} → {files_end:.0f} files, "
                     f"{threads:.0f} → {threads_end:.0f} threads")  # fmt: skip
    return "; ".join(words)


DRILLS: dict[str, Callable[[Path, float, random.Random], Outcome]] = {"upgrade": upgrade, "new_machine": new_machine}
