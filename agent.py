#!/usr/bin/env python3
"""Collect what a Proxmox host knows about itself, and post it to the server, signed.

    constants -> config -> probe -> parsers -> collectors -> report -> signature -> spool -> delivery -> service -> commands

The agent listens on no port, runs a fixed list of read-only commands, and nothing a server answers can change
what it runs. Standard library only. Everything it reads or runs goes through the probe, so that
`agent.py once --explain` can list it.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from _queue import Empty, SimpleQueue  # the C half of `queue`: no further imports
from collections.abc import Callable, Iterable
from typing import Any

# --- constants: version, paths, limits, exit codes ---

VERSION = "0.1.0"
NAME = "proxmox-monitor-agent"
CONFIG_PATH = "/etc/proxmox-monitor/agent.toml"
STATE_PATH = "/var/lib/proxmox-monitor-agent"
PVE_ROOT = "/etc/pve"

COMMAND_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# What children see, and nothing else: no library path of a frozen binary, no NOTIFY_SOCKET, no credentials.
COMMAND_ENVIRON = {"PATH": COMMAND_PATH, "LC_ALL": "C", "LANGUAGE": "", "HOME": "/", "TZ": "UTC"}

KIB = 1024
MIB = 1024 * KIB
READ_LIMIT = 4 * MIB
OUTPUT_LIMIT = 16 * MIB
STDERR_LIMIT = 4 * KIB
PVE_DEADLINE = 5.0  # seconds for one read below /etc/pve, which is a FUSE file system and may block
KILL_GRACE = 1.0  # seconds a killed child gets to be gone before it counts as stuck (state D)
STUCK_LIMIT = 16  # so many stuck children at once, and no more commands are started

OK, FAILED, USAGE = 0, 1, 2

# --- config: settings from TOML; a mistake is told with file, key and reason ---

# --- probe: the one door outside: files and commands, with limits ---


class SourceError(Exception):
    """A source gave no usable answer. `code` is one of: timeout, missing, denied, failed, garbage, stuck, too_large,
    stale, unavailable."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code = code
        self.detail = detail


class Absent(Exception):
    """The section does not apply on this host: it is named in the report's `absent`."""


def source_error(error: OSError, what: str) -> SourceError:
    """The operating system's error, in the report's words."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return SourceError("missing", f"{what}: not there")
    if isinstance(error, PermissionError):
        return SourceError("denied", f"{what}: permission denied; does the agent run as root?")
    return SourceError("failed", f"{what}: {error.strerror or error}")


def to_text(raw: bytes) -> str:
    """UTF-8; what is not becomes `\\xff`, so that it survives JSON and can be seen."""
    return raw.decode("utf-8", "backslashreplace")


def read_bytes(path: str, limit: int, *, chunk: int = 64 * KIB, until: bytes = b"") -> bytes:
    """The file in as few reads as possible, up to `limit`, or up to and with the first `until`."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        raw = part = os.read(handle, chunk)
        while part and len(raw) <= limit and not (until and until in part):
            part = os.read(handle, chunk)
            raw += part
    finally:
        os.close(handle)
    if until and until in raw:
        return raw[: raw.index(until)]
    if len(raw) > limit:
        raise SourceError("too_large", f"{path}: more than {limit} bytes")
    return raw


def start_ticks(pid: int) -> str | None:
    """When the process began, in clock ticks since boot (field 22 of its stat): tells it from a later one with its pid."""
    try:
        stat = read_bytes(f"/proc/{pid}/stat", 64 * KIB)
    except OSError:
        return None
    return stat.rpartition(b")")[2].split()[19].decode()


class Worker:
    """One thread for reads that may block. While it is blocked, calls fail at once and no second one is started."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.jobs: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]]] = SimpleQueue()
        self.thread: threading.Thread | None = None
        self.late: str | None = None  # what it hangs on
        self.waiting: set[SimpleQueue[Any]] = set()

    def call(self, what: str, job: Callable[[], Any]) -> Any:
        """The job's result; SourceError('timeout') when it takes too long, 'stuck' while an earlier one still does."""
        if self.late is not None:
            raise SourceError("stuck", f"{what}: not read, {self.late} still does not answer")
        if self.thread is None:
            self.thread = threading.Thread(target=self._serve, name="pve", daemon=True)
            self.thread.start()
        answer: SimpleQueue[Any] = SimpleQueue()
        self.waiting.add(answer)
        self.jobs.put((job, answer))
        try:
            result = answer.get(timeout=self.deadline)
        except Empty:
            self.late = what
            raise SourceError("timeout", f"{what}: no answer in {self.deadline:g} s") from None
        finally:
            self.waiting.discard(answer)
        if isinstance(result, BaseException):
            raise result
        return result

    def cancel(self) -> None:
        """Free whoever waits (the agent stops). Callable from a signal handler: SimpleQueue.put is reentrant."""
        for answer in tuple(self.waiting):
            answer.put(SourceError("unavailable", "the agent stops"))

    def _serve(self) -> None:
        while True:
            job, answer = self.jobs.get()
            try:
                result: Any = job()
            except Exception as error:
                result = error
            answer.put(result)
            if self.jobs.empty():  # jobs given up on in the meantime have been worked off
                self.late = None


class Child:
    """A command under way: its pid (also its process group) and the read ends of its two pipes."""

    def __init__(self, argv: tuple[str, ...], program: str, environ: dict[str, str]) -> None:
        self.argv = argv
        self.out, out_write = os.pipe()
        self.err, err_write = os.pipe()
        try:
            self.pid = spawn(program, argv, environ, out_write, err_write)
        except BaseException:
            os.close(self.out)
            os.close(self.err)
            raise
        finally:
            os.close(out_write)
            os.close(err_write)
        self.exit_code: int | None = None

    def reap(self) -> bool:
        """True once it is gone; never waits."""
        if self.exit_code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has reaped it
                pid, status = self.pid, 0xFF00
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code is not None

    def kill(self) -> None:
        """End the whole process group."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def spawn(program: str, argv: tuple[str, ...], environ: dict[str, str], out: int, err: int) -> int:
    """Start a program in its own session, without stdin. posix_spawn does not copy the agent's memory map."""
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, out, 1),
        (os.POSIX_SPAWN_DUP2, err, 2),
    ]
    # Python ignores SIGPIPE and SIGXFSZ, and a child would inherit that.
    defaults = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    try:
        return os.posix_spawn(
            program, argv, environ, file_actions=actions, setsid=True, setsigmask=[], setsigdef=defaults
        )
    except NotImplementedError:  # no POSIX_SPAWN_SETSID here (older macOS): a group of its own will do
        return os.posix_spawn(
            program, argv, environ, file_actions=actions, setpgroup=0, setsigmask=[], setsigdef=defaults
        )


class Probe:
    """The one door outside. Everything here has a limit, and every failure is a SourceError."""

    def __init__(self, *, path: str = COMMAND_PATH, pve_root: str = PVE_ROOT, deadline: float = PVE_DEADLINE) -> None:
        self.path = path
        self.pve_root = pve_root
        self.environ = {**COMMAND_ENVIRON, "PATH": path}
        self.worker = Worker(deadline)
        self.trace: Callable[[str, str, float, int, str], None] | None = None  # --explain listens here
        self.problems: dict[str, dict[str, str]] = {}
        self.stuck: dict[tuple[str, ...], tuple[int, str | None]] = {}  # argv -> pid and its start ticks
        self.running: set[Child] = set()
        self.stopping = False
        self._programs: dict[str, str] = {}

    # files

    def read(self, path: str, limit: int = READ_LIMIT) -> str:
        """The whole file as text; SourceError('too_large') above `limit`."""
        return self._open_door("read", path, lambda: to_text(read_bytes(path, limit)))

    def read_line(self, path: str, limit: int = READ_LIMIT) -> str:
        """Only the first line, without its end (/run/pve/metrics may be tens of MB long)."""
        return self._open_door("read", path, lambda: to_text(read_bytes(path, limit, until=b"\n")))

    def read_pve(self, path: str) -> str:
        """A file that may block (/etc/pve …), in the worker thread with a deadline.

        One big read: pmxcfs makes a new snapshot for each opening, and a file read in pieces can tear.
        """
        return self._open_door("read", path, lambda: to_text(read_bytes(path, READ_LIMIT, chunk=MIB)), slow=True)

    def list_dir(self, path: str) -> list[str]:
        """The names in a directory, sorted; a missing one is an error, not an empty list."""
        return self._open_door("list", path, lambda: sorted(os.listdir(path)))

    def list_pve(self, path: str) -> list[str]:
        """As list_dir, in the worker thread with a deadline."""
        return self._open_door("list", path, lambda: sorted(os.listdir(path)), slow=True)

    def exists(self, path: str) -> bool:
        return self._open_door("stat", path, lambda: os.path.exists(path))

    def stat(self, path: str) -> os.stat_result:
        return self._open_door("stat", path, lambda: os.stat(path))

    def statvfs(self, path: str) -> os.statvfs_result:
        """Only for local file systems: on a dead NFS mount it blocks."""
        return self._open_door("stat", path, lambda: os.statvfs(path), slow=True)

    def readlink(self, path: str) -> str:
        """Where a link ends, as an absolute path."""
        return self._open_door("link", path, lambda: os.path.realpath(path, strict=True))

    def _open_door(self, kind: str, path: str, job: Callable[[], Any], *, slow: bool = False) -> Any:
        began = time.monotonic()
        try:
            if slow or path.startswith(self.pve_root):
                result = self.worker.call(path, job)
            else:
                result = job()
        except OSError as error:
            told = source_error(error, path)
            self._note(kind, path, began, 0, told.code)
            raise told from None
        except SourceError as error:
            self._note(kind, path, began, 0, error.code)
            raise
        if self.trace is not None:
            self._note(kind, path, began, len(result) if isinstance(result, (str, list)) else 0, "ok")
        return result

    # commands

    def run(self, *argv: str, limit: float = 10.0, ok: tuple[int, ...] | None = (0,)) -> str:
        """A command's stdout. `ok` are the exit codes that count as success (None: any).

        After `limit` seconds its process group is killed; one that cannot be killed (state D) is left behind, and
        the same command is refused as 'stuck' until it has gone.
        """
        began = time.monotonic()
        outcome = "?"
        out = b""
        try:
            exit_code, out, err = self._run(argv, limit)
            outcome = f"exit {exit_code}"
        except SourceError as error:
            outcome = error.code
            raise
        finally:
            self._note("run", " ".join(argv), began, len(out), outcome)
        if ok is not None and exit_code not in ok:
            raise command_error(argv, exit_code, err)
        return to_text(out)

    def _run(self, argv: tuple[str, ...], limit: float) -> tuple[int, bytes, bytes]:
        program = self.find(argv[0])
        self._refuse_stuck(argv)
        try:
            child = Child(argv, program, self.environ)
        except OSError as error:
            raise source_error(error, argv[0]) from None
        self.running.add(child)
        try:
            return read_child(child, time.monotonic() + limit, limit)
        except SourceError:
            child.kill()
            self._bury(child)
            raise
        finally:
            self.running.discard(child)
            os.close(child.out)
            os.close(child.err)

    def find(self, name: str) -> str:
        """Where a command lies on the fixed PATH; SourceError('missing') when it is not installed."""
        if name in self._programs:
            return self._programs[name]
        for folder in [""] if "/" in name else self.path.split(":"):
            program = os.path.join(folder, name)
            if os.access(program, os.X_OK) and os.path.isfile(program):
                self._programs[name] = program
                return program
        raise SourceError("missing", f"{name}: not installed")

    def _refuse_stuck(self, argv: tuple[str, ...]) -> None:
        if self.stopping:
            raise SourceError("unavailable", "the agent stops")
        for key, (pid, ticks) in list(self.stuck.items()):
            if is_gone(pid, ticks):
                del self.stuck[key]
        if argv in self.stuck:
            pid = self.stuck[argv][0]
            raise SourceError("stuck", f"{' '.join(argv)}: process {pid} hangs in the kernel; not started again")
        if len(self.stuck) >= STUCK_LIMIT:
            raise SourceError("stuck", f"{len(self.stuck)} commands hang in the kernel; no more are started")

    def _bury(self, child: Child) -> None:
        """Wait a moment for a killed child; one that stays is remembered, never waited for."""
        until = time.monotonic() + KILL_GRACE
        while not child.reap():
            if time.monotonic() > until:
                self.stuck[child.argv] = (child.pid, start_ticks(child.pid))
                text = f"{' '.join(child.argv)}: process {child.pid} cannot be killed (hangs in the kernel)"
                raise SourceError("stuck", text)
            time.sleep(0.01)

    def cancel(self) -> None:
        """End all that is under way (the agent stops). Callable from a signal handler."""
        self.stopping = True
        self.worker.cancel()
        for child in tuple(self.running):
            child.kill()

    # clocks, notes

    def now(self) -> float:
        """Unix time (wall clock)."""
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def problem(self, section: str, code: str, detail: str = "") -> None:
        """A part of a section failed; the rest of it is still reported. The first code stays, the details add up."""
        known = self.problems.get(section)
        if known is None:
            self.problems[section] = {"code": code, "detail": detail}
        elif detail and len(known["detail"]) < 2000:
            known["detail"] += f"; {detail}"

    def _note(self, kind: str, what: str, began: float, size: int, outcome: str) -> None:
        if self.trace is not None:
            self.trace(kind, what, time.monotonic() - began, size, outcome)


def is_gone(pid: int, ticks: str | None) -> bool:
    """Has this very process ended? A later process with the same pid has other start ticks."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # not our child: it hung already before the agent was restarted
        now = start_ticks(pid)
        return now is None or now != ticks


def command_error(argv: tuple[str, ...], exit_code: int, err: bytes) -> SourceError:
    """A command that said no: what was run, how it ended, and its last words."""
    words = " ".join(to_text(err).split())[:300]
    ended = f"exit code {exit_code}" if exit_code >= 0 else f"killed by signal {-exit_code}"
    code = "denied" if "ermission denied" in words else "failed"
    return SourceError(code, f"{' '.join(argv)}: {ended}{': ' + words if words else ''}")


def read_child(child: Child, deadline: float, limit: float) -> tuple[int, bytes, bytes]:
    """Exit code, stdout and the beginning of stderr, read side by side so that neither pipe fills up and blocks."""
    name = " ".join(child.argv)
    chunks: dict[int, list[bytes]] = {child.out: [], child.err: []}
    sizes = {child.out: 0, child.err: 0}
    with open_ends(child) as ends:
        while True:
            gone = child.reap()
            for end in ends.ready(0 if gone else deadline - time.monotonic()):
                chunk = os.read(end, 64 * KIB)
                if not chunk:
                    ends.close(end)
                elif end == child.out or sizes[end] < STDERR_LIMIT:
                    chunks[end].append(chunk)
                sizes[end] += len(chunk)
            if sizes[child.out] > OUTPUT_LIMIT:
                raise SourceError("too_large", f"{name}: more than {OUTPUT_LIMIT // MIB} MiB of output")
            if gone and not ends.last_ready:  # what a grandchild may still write is not waited for
                break
            if time.monotonic() > deadline:
                raise SourceError("timeout", f"{name}: no answer in {limit:g} s")
    assert child.exit_code is not None
    return child.exit_code, b"".join(chunks[child.out]), b"".join(chunks[child.err])


class open_ends:
    """The read ends of a child's pipes that are still open, and its end as an event where the system has pidfds."""

    def __init__(self, child: Child) -> None:
        self.poll = select.poll()
        self.open = {child.out, child.err}
        for end in self.open:
            self.poll.register(end, select.POLLIN)
        self.last_ready: list[int] = []
        try:
            self.pidfd = os.pidfd_open(child.pid)
            self.poll.register(self.pidfd, select.POLLIN)
        except (AttributeError, OSError):  # macOS, or a kernel before 5.3
            self.pidfd = -1

    def __enter__(self) -> open_ends:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)

    def ready(self, seconds: float) -> list[int]:
        """Which ends can be read, within so many seconds; without pidfds the child's end is looked for every 20 ms."""
        slice_ms = seconds * 1000 if self.pidfd >= 0 else min(seconds * 1000, 20)
        events = self.poll.poll(max(0, int(slice_ms + 0.999)))
        self.last_ready = [end for end, _ in events if end in self.open]
        return self.last_ready

    def close(self, end: int) -> None:
        self.poll.unregister(end)
        self.open.discard(end)


# --- parsers: text to values, pure ---

# --- collectors: probe and parsers to one section of the report ---

FAST, MEDIUM, SLOW = "fast", "medium", "slow"
TICKS = (FAST, MEDIUM, SLOW)


class Collector:
    """A section of the report and the function that makes it."""

    __slots__ = ("name", "tick", "function")

    def __init__(self, name: str, tick: str, function: Callable[[Any, dict[str, Any]], Any]) -> None:
        self.name = name
        self.tick = tick
        self.function = function


COLLECTORS: dict[str, Collector] = {}  # in the order of the report


def collector(name: str, *, tick: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a collector: `function(probe, memory) -> section`.

    It raises SourceError when the section could not be had, Absent when it does not apply; None means nothing to
    report this time (tasks). `memory` is its own dict, kept over restarts: JSON values only.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        COLLECTORS[name] = Collector(name, tick, function)
        return function

    return register


# --- report: run what is due, keep sections and errors apart, wrap with host, tick, time and sequence ---

# --- signature: the bytes as sent -> webhook headers ---

# --- spool: reports that wait on disk until the server has them ---

# --- delivery: one kept connection; an answer means accepted, later or refused ---

# --- service: monotonic ticks, the cheap look between them, signals, sd_notify ---

# --- commands: start, once, check, stop, version ---
