"""What the proofs of faults share: hosts that are played, a faulty wire, a disk that fails; and the faults themselves.

    outcome -> players -> wire -> disk -> faults of processes -> of disks -> of clocks -> of the wire -> of files

Each fault is a function (folder, seconds, dice) -> Outcome, with a real server process and hosts that send as agent.py
does, by its own Client: test_prove_faults.py plays each for a moment, soak_faults.py for long.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from conftest import ROOT, LiveAgent, LiveServer, build_report, free_port

import agent
import server as monitor

# --- outcome: what is kept of what was promised ---

Key = tuple[str, str, int]  # host, run, sequence number


class Outcome(NamedTuple):
    """What came of a fault. `recovered`: seconds from its end until all hosts are answered and nothing waits;
    None where an operator has to act (what, says the note)."""

    acknowledged: int
    found: int  # of these, in the database
    doubled: int
    recovered: float | None
    note: str = ""

    @property
    def good(self) -> bool:
        return self.acknowledged == self.found > 0 and not self.doubled


def stored(path: Path | str) -> list[Key]:
    """Every report in a database: as it came, or as numbers in an hour's chunk."""
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    db.row_factory = sqlite3.Row
    try:
        runs = {row["id"]: (row["host_id"], row["name"], row["run_id"]) for row in db.execute(
            "SELECT run.id, host_id, name, run_id FROM run JOIN host ON host.id = host_id")}  # fmt: skip
        found = [(*runs[row["run"]][1:], row["seq"]) for row in db.execute("SELECT run, seq FROM report")]
        packed = {(host_id, zlib.crc32(run_id.encode())): (name, run_id) for host_id, name, run_id in runs.values()}
        for row in db.execute("SELECT id, body FROM chunk WHERE id >> 34 & 3 = 0"):
            keys = monitor.unpack_reports(monitor.History(), db, row["body"], {}, {}).keys
            found += [(*packed[row["id"] >> 36, run], seq) for _, run, seq in keys]
        return found
    finally:
        db.close()


def tally(acknowledged: set[Key], path: Path | str, recovered: float | None, note: str = "") -> Outcome:
    found = stored(path)
    return Outcome(len(acknowledged), len(acknowledged & set(found)), len(found) - len(set(found)), recovered, note)


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The condition's first true value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not in {seconds} s: {what}")


# --- players: hosts that send as the agent does, each report until it is acknowledged ---


class Player(threading.Thread):
    """One host: a report each `every` seconds, all that wait in one batch; only the server's own yes ends the wait."""

    def __init__(self, folder: Path, url: str, host: str, token: str, every: float):
        super().__init__(daemon=True)
        path = folder / f"{host}.toml"
        path.write_text(f'server_url = "{url}"\ntoken = "{token}"\nhost_id = "{host}"\n')
        path.chmod(0o600)
        self.client = agent.Client(agent.load_config(str(path)))
        self.host, self.every = host, every
        self.run_id = f"run-{host}"
        self.seq = 0
        self.waiting: list[dict[str, Any]] = []
        self.acknowledged: set[Key] = set()
        self.answered_at = 0.0
        self.waits: list[float] = []  # seconds for an acknowledgement
        self.refused: list[str] = []
        self.making, self.ending = True, threading.Event()

    def run(self) -> None:
        while not self.ending.wait(self.every):
            if self.making and len(self.waiting) < 400:
                self.seq += 1
                self.waiting.append(build_report(self.host, self.seq, time.time(), self.run_id, pools=None))
            if self.waiting:
                self.send(self.waiting[:400])

    def send(self, batch: list[dict[str, Any]]) -> None:
        began = time.monotonic()
        try:
            answer = self.client.send(agent.to_json(batch))
        except agent.Unreachable:
            return
        verdict = agent.judge(answer, len(batch))
        if verdict is agent.ACCEPTED:
            self.answered_at = time.monotonic()
            self.waits.append(self.answered_at - began)
            self.acknowledged |= {(self.host, self.run_id, report["seq"]) for report in batch}
            del self.waiting[: len(batch)]
        elif verdict is agent.REFUSED:
            self.refused.append(agent.describe_answer(answer, self.host))


class Players:
    """Some hosts, registered at a server and sending to it, or to `url` before it."""

    def __init__(self, server: LiveServer, folder: Path, count: int = 4, *, url: str = "", every: float = 0.05):
        names = [f"played{n}" for n in range(count)]
        tokens = [server.register(name) for name in names]
        self.all = [Player(folder, url or server.url, *each, every) for each in zip(names, tokens)]

    def __enter__(self) -> Players:
        for player in self.all:
            player.start()
        until(lambda: all(player.acknowledged for player in self.all), 30, "a first answer for each host")
        return self

    def __exit__(self, *_: object) -> None:
        for player in self.all:
            player.ending.set()
        for player in self.all:
            player.join(30)

    @property
    def acknowledged(self) -> set[Key]:
        return set().union(*(player.acknowledged.copy() for player in self.all))

    @property
    def refused(self) -> list[str]:
        return [text for player in self.all for text in player.refused]

    def heard(self, since: float, seconds: float = 60) -> None:
        """Wait until each host has been answered after `since`."""
        until(lambda: all(player.answered_at > since for player in self.all), seconds, "an answer for each host")

    def recover(self, since: float, seconds: float = 90) -> float:
        """Wait until all are answered again and nothing waits; gives back how long after `since` that was."""
        self.heard(since, seconds)
        for player in self.all:
            player.making = False
        until(lambda: not any(player.waiting for player in self.all), seconds, "nothing waits")
        return max(player.answered_at for player in self.all) - since


@contextmanager
def serving(folder: Path, **env: str) -> Iterator[LiveServer]:
    """A real server with its database in a folder."""
    server = LiveServer(folder, **env)
    server.start()
    try:
        yield server
    finally:
        if server.process and server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def database_of(server: LiveServer) -> str:
    return server.env["DATABASE_PATH"]


def complaints(path: Path) -> list[str]:
    """Lines of a log that no operator should see."""
    return [line for line in path.read_text(errors="replace").splitlines()
            if "Traceback" in line or "fault in the agent" in line]  # fmt: skip


# --- wire: a proxy on the loopback that does to requests what networks do ---


class Wire:
    """Between agents and server, one request a connection. `faulty` is the share of requests that suffer."""

    FATES = ("cut before", "cut inside", "cut the answer", "half the answer", "delay", "twice", "late", "half-close")

    def __init__(self, server: LiveServer, dice: random.Random, faulty: float = 0.6):
        self.server, self.dice, self.faulty = server, dice, faulty
        self.acknowledged: set[Key] = set()  # the server said yes, whoever heard that
        self.suffered: dict[str, int] = dict.fromkeys(self.FATES, 0)
        self.lock = threading.Lock()
        self.door = socket.create_server(("127.0.0.1", free_port()), backlog=100)
        self.url = f"http://127.0.0.1:{self.door.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def close(self) -> None:
        self.door.close()

    def serve(self) -> None:
        while True:
            try:
                client, _ = self.door.accept()
            except OSError:
                return
            threading.Thread(target=self.carry, args=(client,), daemon=True).start()

    def carry(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            client.settimeout(30)
            request = read_message(client)
            with self.lock:
                fate = self.dice.choice(self.FATES) if self.dice.random() < self.faulty else ""
                pause = self.dice.uniform(0.1, 1.0)
                if fate:
                    self.suffered[fate] += 1
            self.pass_on(client, request, fate, pause)

    def pass_on(self, client: socket.socket, request: bytes, fate: str, pause: float) -> None:
        if fate == "cut before":
            return
        if fate == "cut inside":
            self.ask(request[: len(request) // 2], whole=False)
            return
        if fate in ("delay", "late"):  # those behind it overtake it
            time.sleep(pause)
        answer = self.ask(request, half_close=fate == "half-close")
        if fate == "twice":
            answer = self.ask(request)
        if fate == "late":
            time.sleep(pause)
        if fate != "cut the answer":
            client.sendall(answer[: len(answer) // 2] if fate == "half the answer" else answer)

    def ask(self, request: bytes, *, whole: bool = True, half_close: bool = False) -> bytes:
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=30) as wire:
            wire.sendall(request)
            if not whole:
                return b""
            if half_close:
                wire.shutdown(socket.SHUT_WR)
            answer = read_message(wire)
        if answer.startswith(b"HTTP/1.1 200") and b'"status": "ok"' in answer:
            head, _, body = request.partition(b"\r\n\r\n")
            host = head.split(b"/hosts/")[1].split(b"/")[0].decode()
            reports = json.loads(gzip.decompress(body))
            with self.lock:
                for report in reports if isinstance(reports, list) else [reports]:
                    self.acknowledged.add((host, report["run_id"], report["seq"]))
        return answer


def read_message(wire: socket.socket) -> bytes:
    """One HTTP message with a Content-Length, whole or as far as it came."""
    taken = b""
    while b"\r\n\r\n" not in taken:
        if not (more := wire.recv(65536)):
            return taken
        taken += more
    head, _, body = taken.partition(b"\r\n\r\n")
    lengths = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while len(body) < sum(lengths):
        if not (more := wire.recv(65536)):
            break
        body += more
    return head + b"\r\n\r\n" + body


# --- disk: a file system of its own, on a loop device ---


class Disk:
    """A small ext4 in an image file, mounted."""

    def __init__(self, folder: Path, mib: int = 48):
        self.image, self.path = folder / "disk.img", folder / "disk"
        with open(self.image, "wb") as image:
            image.truncate(mib << 20)
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", str(self.image))
        self.path.mkdir()
        self.mount()

    def mount(self) -> None:
        run("mount", "-o", "loop,errors=remount-ro", str(self.image), str(self.path))

    def unmount(self) -> None:
        run("umount", str(self.path))

    def check(self) -> None:
        """As at a start of the machine: what can be repaired safely is."""
        done = subprocess.run(["e2fsck", "-fp", str(self.image)], capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stdout + done.stderr

    def fail(self) -> None:
        """An error inside the file system: the kernel makes it read-only."""
        device = os.path.basename(os.path.realpath(run("findmnt", "-no", "SOURCE", str(self.path)).strip()))
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("a fault that a test has asked for\n")

    def fill(self) -> None:
        with suppress(OSError), open(self.path / "filler", "ab", buffering=0) as handle:
            while True:
                handle.write(bytes(4096))

    def copied(self, target: Path) -> bool:
        """What is on the device at this moment, if nothing was written to it while it was read."""
        shutil.copyfile(self.image, target)
        return run("cmp", "-s", str(self.image), str(target), fails=True) == ""


def run(*argv: str, fails: bool = False) -> str:
    """What a command prints; with `fails`, 'failed' if it does."""
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        assert fails, f"{argv}: {done.stderr}"
        return "failed"
    return done.stdout


@contextmanager
def own_disk(folder: Path) -> Iterator[Disk]:
    disk = Disk(folder)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk.path)], capture_output=True)


def can_mount() -> bool:
    """Whether loop devices can be mounted here (root, and no container that forbids it)."""
    return os.geteuid() == 0 and os.path.exists("/dev/loop-control") and shutil.which("mkfs.ext4") is not None


# --- faults of processes ---


def server_killed(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """kill -9 of the server at random moments under load"""
    kills, slowest = 0, 0.0
    with serving(folder) as server, Players(server, folder) as players:
        end = time.monotonic() + seconds
        while time.monotonic() < end or not kills:
            time.sleep(dice.uniform(0.05, 2))
            server.stop(signal.SIGKILL)
            ended = time.monotonic()
            kills += 1
            server.start()
            players.heard(ended)
            slowest = max(slowest, time.monotonic() - ended)
        players.recover(ended)
        assert not complaints(server.log)
        return tally(players.acknowledged, database_of(server), slowest, f"{kills} kills; the slowest recovery")


def both_killed(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """kill -9 of a real agent and of the server, in turns at random"""
    kills = 0
    with serving(folder) as server:
        wire = Wire(server, dice, faulty=0)
        probe = LiveAgent(folder, server, server.register("pve1"))
        probe.config.write_text(probe.config.read_text().replace(server.url, wire.url))
        probe.start()
        try:
            until(lambda: wire.acknowledged, 20, "a first report")
            end = time.monotonic() + seconds
            while time.monotonic() < end or not kills:
                time.sleep(dice.uniform(0.5, 3))
                victim: Any = dice.choice((server, probe))
                victim.stop(signal.SIGKILL)
                time.sleep(dice.uniform(0, 1))
                victim.start()
                kills += 1
            ended, before = time.monotonic(), len(wire.acknowledged)
            until(lambda: len(wire.acknowledged) > before and not any((probe.state / "spool").glob("*.gz")), 100, "drained")
            recovered = time.monotonic() - ended
        finally:
            probe.process.kill() if probe.process else None
            wire.close()
        assert not complaints(probe.log) and not complaints(server.log)
        gaps = missing(wire.acknowledged)
        return tally(wire.acknowledged, database_of(server), recovered, f"{kills} kills, {gaps} numbers missing")


def missing(keys: set[Key]) -> int:
    """Sequence numbers that never came, over all runs."""
    runs: dict[str, set[int]] = {}
    for _, run_id, seq in keys:
        runs.setdefault(run_id, set()).add(seq)
    return sum(max(seqs) - len(seqs) for seqs in runs.values())


def one_identity(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """two real agents with one name and one token"""
    with serving(folder) as server:
        wire = Wire(server, dice, faulty=0)
        token = server.register("pve1")
        twins = []
        for name in ("one", "other"):
            (folder / name).mkdir()
            twin = LiveAgent(folder / name, server, token)
            twin.config.write_text(twin.config.read_text().replace(server.url, wire.url))
            twin.start()
            twins.append(twin)
        try:
            until(lambda: len({run_id for _, run_id, _ in wire.acknowledged}) == 2, 30, "both are heard")
            time.sleep(max(3.0, seconds))
            assert not any(complaints(twin.log) for twin in twins)
        finally:
            for twin in twins:
                twin.process.kill() if twin.process else None
        time.sleep(0.5)
        wire.close()
        assert not missing(wire.acknowledged)
        return tally(wire.acknowledged, database_of(server), 0.0, "both are kept, each with its own numbers")


# --- faults of disks ---


def power_cut(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """power cut of the server: what its disk holds at a random moment, mounted and started again"""
    cuts, acknowledged, found, doubled, slowest = 0, 0, 0, 0, 0.0
    with own_disk(folder) as disk, serving(folder, DATABASE_PATH=str(disk.path / "monitor.db")) as server:
        with Players(server, folder) as players:
            end = time.monotonic() + seconds
            while time.monotonic() < end or not cuts:
                time.sleep(dice.uniform(0.1, 1.5))
                told = cut_power(folder, disk, server, players)
                if told is None:
                    continue
                cuts += 1
                outcome = start_after_cut(folder, told)
                acknowledged, found = acknowledged + outcome.acknowledged, found + outcome.found
                doubled, slowest = doubled + outcome.doubled, max(slowest, outcome.recovered or 0)
    return Outcome(acknowledged, found, doubled, slowest, f"{cuts} cuts; mount, start and first answer, the slowest")


def cut_power(folder: Path, disk: Disk, server: LiveServer, players: Players) -> set[Key] | None:
    """The disk as it is now into after/; gives back what was acknowledged before. None: it moved while it was read."""
    assert server.process
    told = players.acknowledged
    server.process.send_signal(signal.SIGSTOP)  # between two of its calls; what the kernel has not flushed is lost
    try:
        (folder / "after").mkdir(exist_ok=True)
        return told if disk.copied(folder / "after" / "disk.img") else None
    finally:
        server.process.send_signal(signal.SIGCONT)


def start_after_cut(folder: Path, told: set[Key]) -> Outcome:
    began = time.monotonic()
    disk = Disk.__new__(Disk)
    disk.image, disk.path = folder / "after" / "disk.img", folder / "after" / "disk"
    disk.path.mkdir(exist_ok=True)
    disk.mount()
    try:
        with serving(folder / "after", DATABASE_PATH=str(disk.path / "monitor.db")) as server:
            recovered = time.monotonic() - began
            db = sqlite3.connect(f"file:{database_of(server)}?mode=ro", uri=True)
            assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            db.close()
            return tally(told, database_of(server), recovered)
    finally:
        disk.unmount()


def server_disk_full(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """the server's disk is full for a while"""
    with own_disk(folder) as disk, serving(folder, DATABASE_PATH=str(disk.path / "monitor.db")) as server:
        with Players(server, folder) as players:
            disk.fill()
            stopped = until(lambda: "full" in server.log.read_text() and time.monotonic(), 30, "the disk is full")
            time.sleep(max(2.0, seconds))
            assert server.request("GET", "/healthz").status == 503
            assert max(player.answered_at for player in players.all) < stopped + 3
            (disk.path / "filler").unlink()
            recovered = players.recover(time.monotonic())
            until(lambda: server.request("GET", "/healthz").status == 200, 60, "healthy again")
            return tally(players.acknowledged, database_of(server), recovered)


def server_disk_read_only(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """the server's file system fails and becomes read-only; checked, mounted and started again"""
    with own_disk(folder) as disk, serving(folder, DATABASE_PATH=str(disk.path / "monitor.db")) as server:
        with Players(server, folder) as players:
            time.sleep(1)
            before = players.acknowledged
            disk.fail()
            time.sleep(max(2.0, seconds))
            at_its_end = players.acknowledged - before
            assert server.request("GET", "/healthz").status == 503
            server.stop()
            disk.unmount()
            disk.check()
            disk.mount()
            mended = time.monotonic()
            server.start()
            recovered = players.recover(mended)
            note = f"after fsck and mount by an operator; {len(at_its_end)} acknowledged in the moment of the failure"
            return tally(players.acknowledged, database_of(server), recovered, note)


def bare_flush(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """no server: a program that writes and flushes while ext4 fails, and then asks by an attribute (without: see the note)"""
    promised = {True: 0, False: 0}
    gone, rounds, end = {True: 0, False: 0}, 0, time.monotonic() + seconds
    while time.monotonic() < end or not rounds:
        rounds += 1
        for asking in (True, False):
            sub = folder / f"{rounds}{asking}"
            sub.mkdir()
            with own_disk(sub) as disk:
                kept = flush_until_it_fails(disk, dice.uniform(0.1, 0.5), asking)
                disk.unmount()
                disk.check()
                disk.mount()
                data = (disk.path / "log").read_bytes()
            promised[asking] += len(kept)
            gone[asking] += sum(data[n * 4096 : n * 4096 + 8] != n.to_bytes(8, "big") for n in kept)
            disk.image.unlink()
    note = f"{rounds} failures; of {promised[False]} for which fdatasync alone said yes {gone[False]} gone"
    return Outcome(promised[True], promised[True] - gone[True], 0, None, note)


def flush_until_it_fails(disk: Disk, seconds: float, asking: bool) -> list[int]:
    """Write and flush blocks, let the file system fail meanwhile; gives back those for which it said yes."""
    kept: list[int] = []
    with open(disk.path / "log", "w+b", buffering=0) as log:
        os.setxattr(log.fileno(), "user.proxmon", b"1")
        os.fsync(log.fileno())
        folder = os.open(disk.path, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

        def write() -> None:
            with suppress(OSError):
                for n in range(1 << 20):
                    os.pwrite(log.fileno(), n.to_bytes(8, "big") * 512, n * 4096)
                    os.fdatasync(log.fileno())
                    if asking:
                        os.setxattr(log.fileno(), "user.proxmon", b"1")
                    kept.append(n)

        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(seconds)
        disk.fail()
        writer.join(30)
    return kept


# --- faults of clocks ---

CLOCK = """
import sys, time
sys.path.insert(0, {root!r})
real = time.time
time.time = lambda: real() + float(open({offset!r}).read() or 0)
import server
sys.exit(server.main(sys.argv[1:]))
"""


def server_clock(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """the server's clock jumps a year ahead, a year back, and is set right"""
    offset = folder / "offset"
    offset.write_text("0")
    server = LiveServer(folder)
    server.argv = [sys.executable, "-c", CLOCK.format(root=str(ROOT), offset=str(offset))]
    server.start()
    try:
        with Players(server, folder) as players:
            for years in (1, -1, 0):
                offset.with_suffix(".new").write_text(str(years * 365 * 86400))
                offset.with_suffix(".new").replace(offset)
                jumped = time.monotonic()
                players.heard(jumped)
                time.sleep(max(1.0, seconds / 3))
            recovered = players.recover(jumped)
            assert not players.refused and not complaints(server.log)
            return tally(players.acknowledged, database_of(server), recovered)
    finally:
        server.stop()


def agents_clock(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """hosts whose clocks are a year ahead and a year behind, beside those that are right"""
    with serving(folder) as server, Players(server, folder) as players:
        began = time.monotonic()
        for years, player in zip((1, -1), players.all):
            player.client._post = wrong_clock(player.client, years * 365 * 86400)  # type: ignore[assignment,method-assign]
        time.sleep(max(2.0, seconds))
        recovered = players.recover(began)
        assert not players.refused
        return tally(players.acknowledged, database_of(server), recovered)


def wrong_clock(client: agent.Client, error: float) -> Callable[[bytes], agent.Answer]:
    """A client whose signatures are made with a clock that is off."""
    right, asked = client._post, [0.0]

    def post(packed: bytes) -> agent.Answer:
        client.signing_offset = error + asked[0]
        answer = right(packed)
        if agent.code_of(answer) == "clock_skew":
            asked[0] = -error
            client.signing_offset = 0.0
            answer = right(packed)
        return answer

    return post


# --- faults of the wire ---


def bad_wire(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """a wire that cuts, delays, doubles, reorders and half-closes six requests of ten"""
    with serving(folder) as server:
        wire = Wire(server, dice)
        with Players(server, folder, url=wire.url) as players:
            time.sleep(max(2.0, seconds))
            wire.faulty, mended = 0.0, time.monotonic()
            recovered = players.recover(mended)
            assert not players.refused and not complaints(server.log)
        wire.close()
        suffered = ", ".join(f"{count} × {fate}" for fate, count in wire.suffered.items())
        return tally(wire.acknowledged | players.acknowledged, database_of(server), recovered, suffered)


# --- faults of files ---


def restored(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """an old backup is put in the database's place while the hosts go on"""
    copy = folder / "copy"
    with serving(folder) as server, Players(server, folder) as players:
        before = players.acknowledged
        assert server.command("backup", str(copy)).returncode == 0
        time.sleep(max(1.0, seconds))
        server.stop()
        done = server.command("restore", str(copy))
        assert done.returncode == 0, done.stderr
        between = players.acknowledged
        began = time.monotonic()
        server.start()
        recovered = players.recover(began)
        kept = before | (players.acknowledged - between)
        lost = len(between - set(stored(database_of(server))))
        return tally(kept, database_of(server), recovered, f"gone with the newer database, by nature: {lost}")


def damage(path: Path, how: str, dice: random.Random) -> None:
    """Harm a database of a stopped server, all of which is in its one file."""
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    db.close()
    size = path.stat().st_size
    with open(path, "r+b") as handle:
        if how in ("cut", "emptied"):
            handle.truncate(size // 2 if how == "cut" else 0)
        for place in {"head": [0], "noise": range(8192, size, 16384)}.get(how, ()):
            handle.seek(place)
            handle.write(dice.randbytes(2048))


HARMS = ("head", "noise", "cut", "emptied")


def database_damaged(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """the database is damaged (head, noise, cut, emptied): told, and the last backup restored"""
    copy, notes = folder / "copy", []
    with serving(folder) as server, Players(server, folder) as players:
        time.sleep(1)
        before = players.acknowledged
        assert server.command("backup", str(copy)).returncode == 0
        lost_from = players.acknowledged - before
        for how in HARMS if seconds else HARMS[1:3]:
            server.stop()
            assert server.command("check").returncode == 0
            damage(Path(database_of(server)), how, dice)
            told = server.command("check")
            assert told.returncode == 1 and "Traceback" not in told.stderr + told.stdout, (how, told)
            notes.append(how)
            taken = players.acknowledged
            done = server.command("restore", str(copy))
            assert done.returncode == 0, (how, done.stderr)
            lost_from |= taken - before
            began = time.monotonic()
            server.start()
            players.heard(began)
        recovered = players.recover(began)
        kept = players.acknowledged - lost_from
        return tally(kept, database_of(server), recovered, f"{', '.join(notes)}: each found by `check`, then `restore`")


# file, harm, what the start says to it; '' of what it starts with all the same
FILE_HARMS: tuple[tuple[str, str, bytes | None, str], ...] = (
    ("server.toml", "cut", b'[[channels]]\nname = "a"\nkind = "sl', "server.toml: "),
    ("server.toml", "noise", bytes(range(128, 256)), "server.toml: 'utf-8' codec"),
    ("monitor.db.secret", "emptied", b"", "restore it from a backup"),
    ("monitor.db.secret", "noise", bytes(range(128, 256)), "secret: 'utf-8' codec"),
    ("server.toml", "a strange key", b"[nonsense]\nx = 1\n", "line 1: nonsense: unknown"),
    ("server.toml", "a wrong type", b'[rules.pool-capacity]\nwarn = "a"\n', "warn: should be a number"),
    ("server.toml", "emptied", b"", ""),
    ("monitor.db.secret", "another one", b"0" * 64, ""),
    ("monitor.db-wal", "noise", bytes(range(256)) * 99, ""),
    ("monitor.db-shm", "noise", bytes(range(256)) * 99, ""),
)


def files_damaged(folder: Path, seconds: float, dice: random.Random) -> Outcome:
    """damaged server.toml, secret, WAL and its index: the start is refused in one line, or goes well; mended, all is there"""
    (folder / "server.toml").write_text("")
    with serving(folder, SERVER_CONFIG=str(folder / "server.toml")) as server:
        with Players(server, folder, 2) as players:
            players.recover(time.monotonic())
        server.stop()
        told: dict[str, list[str]] = {"refused": [], "started": []}
        for name, how, harm, words in FILE_HARMS if seconds else FILE_HARMS[::3]:
            path = folder / name
            kept = path.read_bytes() if path.exists() else None
            path.write_bytes(harm or b"")
            told["refused" if start_says(server, words) else "started"].append(f"{name} {how}")
            path.write_bytes(kept) if kept is not None else path.unlink(missing_ok=True)
        server.start()
        return tally(players.acknowledged, database_of(server), None, "; ".join(f"{word}: {', '.join(names)}" for word, names in told.items()))


def start_says(server: LiveServer, words: str) -> bool:
    """Try to start; whether that was refused, with these words in one line."""
    server.log.write_bytes(b"")
    if not words:
        server.start()
        server.stop()
        return False
    done = server.command("serve")
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, (words, done)
    return True


FAULTS: dict[str, Callable[[Path, float, random.Random], Outcome]] = {
    each.__name__: each for each in (
        server_killed, both_killed, one_identity, power_cut, server_disk_full, server_disk_read_only, bare_flush, server_clock,
        agents_clock, bad_wire, restored, database_damaged, files_damaged)
}  # fmt: skip
ON_A_DISK = {"power_cut", "server_disk_full", "server_disk_read_only", "bare_flush"}
