#!/usr/bin/env python3
"""Collect what a Proxmox host knows about itself, and post it to the server, signed.

    constants -> config -> probe -> parsers -> collectors -> report -> signature -> spool -> delivery -> service -> commands

The agent listens on no port, runs a fixed list of read-only commands, and nothing a server answers can change
what it runs. Standard library only. Everything it reads or runs goes through the probe, so that
`agent.py once --explain` can list it.
"""

from __future__ import annotations

import json
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

COUNTER_LIMIT = 1 << 63  # ZFS and QEMU print some negative counters as unsigned: from here on a value is unknown
MONTHS = {name: number for number, name in enumerate("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), 1)}
SIZE_UNITS = {unit: 1024**power for power, unit in enumerate("BKMGTPEZ")}


def known(**fields: Any) -> dict[str, Any]:
    """The fields that have a value. What is not known is left out, never 0."""
    return {name: value for name, value in fields.items() if value is not None}


def to_number(value: Any) -> int | float | None:
    """A number from JSON or text; None for `U`, `-`, empty, infinite and anything else that is not one."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            return None
    if not isinstance(value, (int, float)) or value != value or value in (float("inf"), float("-inf")):
        return None
    return value


def to_count(value: Any) -> int | None:
    """A counter, size or time as a whole number, 0 … 2^63 − 1; None when it is not one."""
    number = to_number(value)
    return int(number) if number is not None and 0 <= number < COUNTER_LIMIT else None


def to_ratio(percent: Any) -> float | None:
    """`46.64%`, `46.64` or 46.64 as 0.4664."""
    number = to_number(percent.rstrip("%") if isinstance(percent, str) else percent)
    return None if number is None else round(number / 100, 6)


def to_flag(value: Any) -> bool:
    """Proxmox writes 0/1 as numbers or text, and leaves flags out."""
    return str(value).strip().lower() in ("1", "yes", "on", "true")


def to_size(text: str) -> int | None:
    """`26.5K`, `0B`, `2.31T`, `1234` in bytes (units of 1024, as ZFS and Proxmox print them)."""
    text = text.strip().rstrip("iB") if len(text.strip()) > 1 else text.strip()
    unit = SIZE_UNITS.get(text[-1:].upper())
    number = to_number(text[:-1] if unit else text)
    return None if number is None or number < 0 else int(number * (unit or 1))


def to_seconds(text: str) -> int | None:
    """`00:01:02`, `1 days 02:55:32`, `0 days 00:01:02` in seconds."""
    words = text.split()
    days = to_count(words[0]) if len(words) == 3 and words[1].startswith("day") else 0
    parts = [to_count(part) for part in words[-1].split(":")] if words else []
    if len(parts) != 3 or days is None or None in parts:
        return None
    hours, minutes, seconds = (part or 0 for part in parts)
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def to_unix(year: int, month: int, day: int, clock: str = "00:00:00") -> int | None:
    """A UTC date as unix seconds, without the time module's tables (days since 1970 by the civil calendar)."""
    seconds = to_seconds(clock)
    if seconds is None or not 1 <= month <= 12 or not 1 <= day <= 31:
        return None
    shifted = year - (month <= 2)
    era, of_era = divmod(shifted, 400)
    of_year = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    days = era * 146097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719468
    return days * 86400 + seconds


def parse_ctime(text: str) -> int | None:
    """`Mon Nov 23 09:00:19 2026` (the children's time zone is UTC), also with the zone before the year."""
    words = text.split()
    if len(words) < 5 or words[1] not in MONTHS:
        return None
    day, year = to_count(words[2]), to_count(words[-1])
    return None if day is None or year is None else to_unix(year, MONTHS[words[1]], day, words[3])


def parse_json(text: str, what: str) -> Any:
    """JSON or SourceError('garbage'); a file full of NUL after a power loss is garbage too."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        head = text[:40].encode("unicode_escape").decode()
        raise SourceError("garbage", f"{what}: not JSON ({error}); begins with {head!r}") from None


def parse_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object, or SourceError('garbage')."""
    value = parse_json(text, what)
    if not isinstance(value, dict):
        raise SourceError("garbage", f"{what}: a JSON object was expected, not {type(value).__name__}")
    return value


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# Linux


def parse_cpu_times(text: str) -> tuple[list[int], int]:
    """/proc/stat: jiffies user nice system idle iowait irq softirq steal (guest is inside user), and the number of CPUs."""
    first = text[: text.find("\n")].split()
    try:
        jiffies = [int(word) for word in first[1:9]]
    except ValueError:
        jiffies = []
    if not first or first[0] != "cpu" or len(jiffies) < 5:
        raise SourceError("garbage", f"/proc/stat begins with {text[:40]!r}")
    return jiffies + [0] * (8 - len(jiffies)), text.count("\ncpu")


def parse_cpu_ratios(before: list[int], after: list[int]) -> dict[str, float]:
    """The shares of the time between two samples of one boot; {} when no time has passed or the counters ran back."""
    spent = [max(0, new - old) for new, old in zip(after, before)]  # iowait may go backwards
    total = sum(spent)
    if total <= 0 or len(spent) < 8 or after[3] < before[3]:
        return {}
    idle, iowait, steal = spent[3], spent[4], spent[7]
    shares = {"cpu_ratio": total - idle - iowait, "iowait_ratio": iowait, "steal_ratio": steal}
    return {name: round(share / total, 5) for name, share in shares.items()}


def parse_meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo: bytes by name."""
    sizes = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            sizes[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return sizes


def parse_kstat(text: str) -> dict[str, int]:
    """A named kstat of SPL (arcstats …): two head lines, then `name type value`."""
    values = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[2].isdigit():
            values[words[0]] = int(words[2])
    return values


def parse_pressure(text: str) -> dict[str, float]:
    """/proc/pressure/*: ratios by `some_avg10` … `full_avg300`."""
    ratios = {}
    for line in text.splitlines():
        kind, *pairs = line.split()
        for pair in pairs:
            name, _, value = pair.partition("=")
            number = to_number(value)
            if name.startswith("avg") and number is not None:
                ratios[f"{kind}_{name}"] = round(number / 100, 4)
    return ratios


def parse_net_dev(text: str) -> dict[str, list[int]]:
    """/proc/net/dev: received bytes, errors, sent bytes, errors by interface. Names may hold dots and colons."""
    counters = {}
    for line in text.splitlines()[2:]:
        name, _, rest = line.rpartition(":")
        words = rest.split()
        if name and len(words) >= 11 and all(words[column].isdigit() for column in (0, 2, 8, 10)):
            counters[name.strip()] = [int(words[column]) for column in (0, 2, 8, 10)]
    return counters


def parse_diskstats(text: str) -> dict[str, list[int]]:
    """/proc/diskstats (14 to 20 columns): read sectors, written sectors (of 512 bytes, always) and busy milliseconds."""
    counters = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 14 and words[5].isdigit() and words[9].isdigit() and words[12].isdigit():
            counters[words[2]] = [int(words[5]), int(words[9]), int(words[12])]
    return counters


def version_key(release: str) -> list[int]:
    """The numbers in a version, for sorting: 6.8.12-4-pve comes before 6.8.12-11-pve."""
    digits = "".join(char if char.isdigit() else " " for char in release)
    return [int(part) for part in digits.split()]


# Proxmox: status files

RRD_NODE = "uptime level ctime load1 cpus cpu iowait memtotal memused swaptotal swapused roottotal rootused".split()
RRD_GUEST = (
    "uptime name status template ctime cpus cpu maxmem mem maxdisk disk netin netout diskread diskwrite memhost".split()
)
RRD_STORAGE = "ctime total used".split()
RRD_FIELDS = {"node": RRD_NODE, "vm": RRD_GUEST, "storage": RRD_STORAGE}


def parse_rrd(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """/etc/pve/.rrd: raw fields of every node, vm and storage ("node/id") by name; the newest ctime wins.

    PVE 8 writes `pve2-node`, `pve2.3-vm`, `pve2-storage`, PVE 9 `pve-node-9.0` …, a mixed cluster both; later ones may
    raise the number or append fields. Lines that do not parse (torn, unknown) are left out.
    """
    found: dict[str, dict[str, dict[str, str]]] = {"node": {}, "vm": {}, "storage": {}}
    for line in text.splitlines():
        key, *values = line.split(":")
        family, _, name = key.partition("/")
        kind = next((part for part in family.split("-")[1:] if part in RRD_FIELDS), None)
        if kind is None or not family.startswith("pve") or not name:
            continue
        fields = dict(zip(RRD_FIELDS[kind], values))
        age = to_number(fields.get("ctime"))
        if age is None or len(fields) < 3:
            continue
        older = found[kind].get(name)
        if older is None or (to_number(older["ctime"]) or 0) <= age:
            found[kind][name] = fields
    return found


def parse_metrics(line: str) -> dict[str, dict[str, Any]]:
    """The newest snapshot of /run/pve/metrics: {part: {"timestamp": t, "data": {…}}} of those parts that are usable."""
    snapshot = parse_object(line, "/run/pve/metrics")
    parts = {}
    for name, part in snapshot.items():
        stamp = to_number(as_dict(part).get("timestamp"))
        if stamp is not None and isinstance(part.get("data"), dict):
            parts[name] = {"timestamp": stamp, "data": part["data"]}
    return parts


def parse_sections(text: str) -> list[tuple[str, str, dict[str, str]]]:
    """Proxmox's section files (storage.cfg, jobs.cfg …): (type, id, {key: value}); a flag without a value is ""."""
    sections: list[tuple[str, str, dict[str, str]]] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line[0] in " \t":
            key, _, value = line.strip().partition(" ")
            if sections:
                sections[-1][2][key] = value.strip()
        elif ": " in line:  # ids made from vzdump.cron hold colons: split at the first ": " only
            kind, _, name = line.partition(": ")
            sections.append((kind.strip(), name.strip(), {}))
    return sections


def parse_vmlist(text: str) -> dict[str, list[Any]]:
    """.vmlist: [node, type, version] by vmid; `ids` is absent when there are no guests."""
    guests = {}
    for vmid, entry in as_dict(parse_object(text, "/etc/pve/.vmlist").get("ids")).items():
        entry = as_dict(entry)
        if vmid.isdigit() and entry.get("type") in ("qemu", "lxc"):
            guests[vmid] = [entry.get("node"), entry["type"], entry.get("version")]
    return guests


def parse_ha_states(text: str) -> dict[str, str]:
    """ha/manager_status: the state of each service."""
    services = as_dict(parse_object(text, "ha/manager_status").get("service_status"))
    return {sid: str(as_dict(service).get("state")) for sid, service in services.items() if as_dict(service).get("state")}


DISK_KEYS = ("scsi", "virtio", "sata", "ide", "efidisk", "tpmstate", "rootfs", "mp")


def parse_guest_config(text: str) -> dict[str, Any]:
    """A guest's configuration: what the report needs of it. Snapshots and pending changes come after the first `[`."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("["):
            break
        key, separator, value = line.partition(":")
        if separator and not line.startswith("#"):
            values[key.strip()] = value.strip()
    meta = dict(pair.partition("=")[::2] for pair in values.get("meta", "").split(","))
    volumes = [volume for key, value in values.items() if (volume := parse_volume(key, value))]
    return known(
        name=values.get("name") or values.get("hostname"),
        lock=values.get("lock"),
        template=to_flag(values.get("template", "0")),
        tags=split_tags(values.get("tags")),
        onboot=to_flag(values.get("onboot", "0")),
        created_at=to_count(meta.get("ctime")),
        volumes=volumes,
    )


def parse_volume(key: str, value: str) -> dict[str, Any] | None:
    """`scsi0: local-zfs:vm-100-disk-0,size=32G` as storage, volume and size; None for CD drives and host paths."""
    name = key.rstrip("0123456789")
    first, *options = value.split(",")
    if name not in DISK_KEYS or (name == key and key != "rootfs") or "media=cdrom" in options:
        return None
    if first.startswith(("file=", "volume=")):
        first = first.partition("=")[2]
    storage, separator, volume = first.partition(":")
    if not separator or first.startswith("/"):
        return None
    size = next((to_size(option[5:]) for option in options if option.startswith("size=")), None)
    return known(storage=storage, volume=volume, size_bytes=size)


def split_tags(text: Any) -> list[str]:
    """Tags are separated by `;`, `,` or blanks."""
    return text.replace(";", " ").replace(",", " ").split() if isinstance(text, str) else []


def parse_corosync_votes(text: str) -> tuple[dict[str, int], int]:
    """corosync.conf: votes by node name, and those of a quorum device (0 without one)."""
    votes: dict[str, int] = {}
    device = 0
    path: list[str] = []
    values: dict[str, str] = {}
    for line in text.splitlines():
        line = line.strip()
        if line.endswith("{"):
            path.append(line[:-1].strip())
            values = {}
        elif line == "}":
            if path[-2:] == ["nodelist", "node"] and values.get("name"):
                votes[values["name"]] = to_count(values.get("quorum_votes", "1")) or 0
            if path[-2:] == ["quorum", "device"]:
                device = to_count(values.get("votes", "1")) or 0
            path = path[:-1]
            values = {}
        elif ":" in line and not line.startswith("#"):
            key, _, value = line.partition(":")
            values[key.strip()] = value.strip()
    return votes, device


def parse_quorumtool(text: str) -> dict[str, int]:
    """`corosync-quorumtool -s`: expected, present and needed votes. Its exit code says nothing."""
    names = {"Expected votes": "votes_expected", "Total votes": "votes_present", "Quorum": "votes_needed"}
    votes = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        words = value.split()
        if key.strip() in names and words and words[0].isdigit():
            votes[names[key.strip()]] = int(words[0])
    return votes


def parse_pve_version(text: str) -> str | None:
    """pvecfg.pm: the version as string constant (what `pveversion` prints, without Perl)."""
    _, found, rest = text.partition("sub version ")
    for quote in "'\"":
        if found and quote in rest[:80]:
            return rest.split(quote)[1] or None
    return None


# ZFS

VDEV_STATES = "ONLINE DEGRADED FAULTED OFFLINE REMOVED UNAVAIL CLOSED UNKNOWN SPLIT AVAIL INUSE".split()
VDEV_CLASSES = {"dedup": "dedup", "special": "special", "logs": "log", "cache": "cache", "spares": "spare"}
JSON_CLASSES = {"dedup": "dedup", "special": "special", "logs": "log", "l2cache": "cache", "spares": "spare"}
# What `zpool status` says for vdev_aux [openzfs cmd/zpool/zpool_main.c, print_status_config].
VDEV_REASONS = {
    "OPEN_FAILED": "cannot open",
    "BAD_GUID_SUM": "missing device",
    "NO_REPLICAS": "insufficient replicas",
    "VERSION_NEWER": "newer version",
    "UNSUP_FEAT": "unsupported feature(s)",
    "ASHIFT_TOO_BIG": "unsupported minimum blocksize",
    "SPARED": "currently in use",
    "ERR_EXCEEDED": "too many errors",
    "IO_FAILURE": "experienced I/O failures",
    "BAD_LOG": "bad intent log",
    "EXTERNAL": "external device fault",
    "SPLIT_POOL": "split into new pool",
    "ACTIVE": "currently in use",
    "CHILDREN_OFFLINE": "all children offline",
    "BAD_LABEL": "invalid label",
}
VDEV_NOTES = ("resilvering", "awaiting resilver", "removing")  # what `zpool status` adds in brackets, and matters here
GROUP_TYPES = ("mirror", "raidz", "draid", "replacing", "spare", "root", "missing", "hole", "indirect")
WORST_LAST = "ONLINE AVAIL INUSE DEGRADED OFFLINE CLOSED UNKNOWN REMOVED UNAVAIL FAULTED".split()
FAST_ENOUGH = 10 * 1024 * 1024  # bytes/s; zpool estimates no end below it


def parse_zpool_status_json(text: str, now: float) -> dict[str, dict[str, Any]]:
    """`zpool status -j --json-int -P`: the same as parse_zpool_status gives, by pool name."""
    pools = parse_object(text, "zpool status -j").get("pools")
    if not isinstance(pools, dict):
        raise SourceError("garbage", "zpool status -j: no `pools` in the answer")
    return {name: read_json_pool(name, pool, now) for name, pool in pools.items() if isinstance(pool, dict)}


def read_json_pool(name: str, pool: dict[str, Any], now: float) -> dict[str, Any]:
    stats = as_dict(pool.get("scan_stats"))
    resilvering = stats.get("function") == "RESILVER" and stats.get("state") == "SCANNING"
    rebuilds = as_dict(stats.get("rebuild_stats") or pool.get("rebuild_stats"))
    rebuilding = {vdev for vdev, rebuild in rebuilds.items() if as_dict(rebuild).get("state") == "ACTIVE"}
    roots = as_dict(pool.get("vdevs"))
    root = as_dict(roots.get(name) or next(iter(roots.values()), None))
    vdevs = []
    for key, label in {"vdevs": "normal", **JSON_CLASSES}.items():
        tops = root.get("vdevs") if key == "vdevs" else pool.get(key)
        for vdev_name, vdev in as_dict(tops).items():
            busy = resilvering or vdev_name in rebuilding
            vdevs.append(read_json_vdev(vdev_name, as_dict(vdev), label, resilvering=busy))
    return known(
        name=name,
        guid=to_guid(pool.get("pool_guid")),
        state=pool.get("state"),
        status_text=squeeze(pool.get("status")),
        action_text=squeeze(pool.get("action")),
        data_errors=to_count(pool.get("error_count")),
        damaged_files=[file for file in as_list(pool.get("errlist")) if isinstance(file, str)] or None,
        scan=read_json_scan(stats, rebuilds, now),
        expansion=read_json_expansion(as_dict(pool.get("raidz_expand_stats"))),
        vdevs=vdevs,
    )


def to_guid(value: Any) -> str | None:
    """Guids go beyond 2^53: they are text everywhere."""
    text = str(value).strip() if isinstance(value, (int, str)) else ""
    return text if text.isdigit() else None


def squeeze(text: Any) -> str | None:
    """A message on one line."""
    return " ".join(text.split()) or None if isinstance(text, str) else None


def read_json_vdev(name: str, vdev: dict[str, Any], label: str, *, resilvering: bool) -> dict[str, Any]:
    children = [
        read_json_vdev(child_name, as_dict(child), label, resilvering=resilvering)
        for child_name, child in as_dict(vdev.get("vdevs")).items()
    ]
    name = str(vdev.get("name") or name)
    path = vdev.get("was") or vdev.get("path")
    state = vdev.get("state") or worst_state(children)
    if state == "CANT_OPEN":  # the text form, and everybody, says UNAVAIL
        state = "UNAVAIL"
    flags = [note for note in VDEV_NOTES if vdev.get(note)]
    if vdev.get("resilver_deferred"):
        flags.append("awaiting resilver")
    if resilvering and not children and (vdev.get("scan_processed") or vdev.get("rebuild_processed")):
        flags.insert(0, "resilvering")
    reason = "missing device" if vdev.get("not_present") else read_aux(vdev.get("aux"))
    return build_vdev(
        name=name,
        kind=str(vdev.get("vdev_type") or ""),
        label=label,
        state=state if isinstance(state, str) else "UNKNOWN",
        path=path if isinstance(path, str) and not children else None,
        counters=vdev,
        reason=reason or (flags[0] if flags else None),
        children=children,
    )


def read_aux(aux: Any) -> str | None:
    return VDEV_REASONS.get(aux, "corrupted data") if isinstance(aux, str) and aux not in ("", "NONE") else None


def worst_state(children: list[dict[str, Any]]) -> str:
    """For draid vdevs, whose JSON may lack a state (openzfs issue 18431): DEGRADED as soon as a child is not well."""
    states = [child["state"] for child in children]
    if not states:
        return "UNKNOWN"
    worst = max(states, key=lambda state: WORST_LAST.index(state) if state in WORST_LAST else 6)
    return worst if len(set(states)) == 1 or worst == "ONLINE" else "DEGRADED"


def build_vdev(
    *,
    name: str,
    kind: str,
    label: str,
    state: str,
    path: str | None,
    counters: dict[str, Any],
    reason: str | None,
    children: list[dict[str, Any]],
) -> dict[str, Any]:
    """One vdev as the report has it. Raid levels are part of the name only (`raidz2-0`): the type gets them."""
    group = name.split("-")[0].split(":")[0]
    if kind in ("", "raidz", "draid") and group.startswith(("raidz", "draid")) and (children or kind != ""):
        kind = group
    elif not kind:
        kind = guess_vdev_type(name, path, children)
    return known(
        **{"class": label},
        name=short_vdev_name(name, path),
        type=kind,
        state=state,
        path=path if kind in ("disk", "file") else None,
        read_errors=to_count(counters.get("read_errors")),
        write_errors=to_count(counters.get("write_errors")),
        checksum_errors=to_count(counters.get("checksum_errors")),
        slow_ios=None if children else to_count(counters.get("slow_ios")),
        reason=reason,
        children=children or None,
    )


def guess_vdev_type(name: str, path: str | None, children: list[dict[str, Any]]) -> str:
    """The text form has no types: groups by the beginning of their name, disks by their path."""
    prefix = name.rpartition("-")[0] or name
    if children:
        return next((group for group in GROUP_TYPES if prefix.startswith(group)), "unknown")
    if name.startswith("draid") and not (path or "").startswith("/"):
        return "dspare"  # a distributed spare: draid1-0-0
    where = path or name
    if where.startswith("/"):
        return "disk" if where.startswith("/dev/") else "file"
    return prefix if prefix in ("hole", "indirect", "missing") else "disk"


def short_vdev_name(name: str, path: str | None) -> str:
    """As `zpool status` without -P prints it: no directory, and no partition that ZFS made for a whole disk."""
    if not name.startswith("/dev/"):
        return name
    short = name.rpartition("/")[2]
    if short.endswith("-part1"):
        return short[:-6]
    if short.endswith("p1") and short[-3:-2].isdigit():
        return short[:-2]
    if short.startswith(("sd", "vd", "xvd")) and short.endswith("1") and short[-2:-1].isalpha():
        return short[:-1]
    return short


SCAN_STATES = {"SCANNING": "scanning", "FINISHED": "finished", "CANCELED": "canceled", "NONE": "none"}
NO_SCAN = {"function": "none", "state": "none"}


def read_json_scan(stats: dict[str, Any], rebuilds: dict[str, Any], now: float) -> dict[str, Any]:
    """The scan under way or the last one. Sequential rebuilds are kept beside it: an active or later one counts."""
    scan = dict(NO_SCAN)
    if stats.get("function") in ("SCRUB", "RESILVER") and stats.get("state") in SCAN_STATES:
        scan = read_scan_stats(stats, now)
    for rebuild in rebuilds.values():
        scan = later_scan(scan, read_rebuild(as_dict(rebuild)))
    return scan


def later_scan(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Which of two scans to show: what still runs, else what ended last."""
    if "scanning" in (one["state"], other["state"]):
        return other if other["state"] == "scanning" else one
    return other if other.get("ended_at", 0) > one.get("ended_at", 0) else one


def read_scan_stats(stats: dict[str, Any], now: float) -> dict[str, Any]:
    state = SCAN_STATES[stats["state"]]
    running = state == "scanning"
    paused = running and bool(to_count(stats.get("scrub_pause")))
    issued, examine = to_count(stats.get("issued")), to_count(stats.get("to_examine"))
    total = None if examine is None else examine - (to_count(stats.get("skipped")) or 0)
    progress = None if issued is None or not total else round(min(1.0, issued / total), 4)
    return known(
        function=stats["function"].lower(),
        state="paused" if paused else state,
        started_at=to_count(stats.get("start_time")) or None if state != "canceled" else None,  # as the text form
        ended_at=None if running else to_count(stats.get("end_time")) or None,
        progress_ratio=progress if running else None,
        remaining_seconds=None if paused or not running else remaining_seconds(stats, issued, total, now),
        repaired_bytes=to_count(stats.get("processed")) if state != "canceled" else None,
        errors=to_count(stats.get("errors")) if state == "finished" else None,
    )


def remaining_seconds(stats: dict[str, Any], issued: int | None, total: int | None, now: float) -> int | None:
    """As zpool estimates it: bytes left over the speed of this pass; unknown while that is below 10 MiB/s."""
    done, began = to_count(stats.get("issued_bytes_per_scan")), to_count(stats.get("pass_start"))
    if not done or not began or issued is None or total is None:
        return None
    elapsed = max(1, now - began - (to_count(stats.get("scrub_spent_paused")) or 0))
    speed = done / elapsed
    return int(max(0, total - issued) / speed) if speed >= FAST_ENOUGH else None


def read_rebuild(rebuild: dict[str, Any]) -> dict[str, Any]:
    """A sequential rebuild (`zpool attach -s`, and always draid) told like a resilver."""
    state = {"ACTIVE": "scanning", "COMPLETE": "finished", "CANCELED": "canceled"}.get(str(rebuild.get("state")))
    if state is None:
        return dict(NO_SCAN)
    issued = to_count(rebuild.get("bytes_issued", rebuild.get("issued")))
    total = to_count(rebuild.get("bytes_est", rebuild.get("to_scan")))
    progress = round(min(1.0, issued / total), 4) if issued is not None and total else None
    return known(
        function="resilver",
        state=state,
        started_at=to_count(rebuild.get("start_time")) or None,
        ended_at=None if state == "scanning" else to_count(rebuild.get("end_time")) or None,
        progress_ratio=progress if state == "scanning" else None,
        repaired_bytes=to_count(rebuild.get("bytes_rebuilt", rebuild.get("rebuilt"))),
        errors=to_count(rebuild.get("errors")) if state == "finished" else None,
    )


def read_json_expansion(stats: dict[str, Any]) -> dict[str, Any] | None:
    state = SCAN_STATES.get(str(stats.get("state")))
    if state is None or state == "none":
        return None
    done, total = to_count(stats.get("reflowed")), to_count(stats.get("to_reflow"))
    running = state == "scanning"
    return known(
        state=state,
        started_at=to_count(stats.get("start_time")) or None,
        ended_at=None if running else to_count(stats.get("end_time")) or None,
        progress_ratio=round(min(1.0, done / total), 4) if running and done is not None and total else None,
    )


def parse_zpool_status(text: str) -> dict[str, dict[str, Any]]:
    """`zpool status -p -P -s` as text (OpenZFS 2.2 and older have no JSON: every PVE 8 host), by pool name."""
    pools: dict[str, dict[str, Any]] = {}
    for block in split_status_blocks(text):
        name = block["pool"][0]
        if name:
            pools[name] = read_text_pool(name, block)
    if not pools and text.strip():
        raise SourceError("garbage", f"zpool status: no pool in the answer, which begins with {text[:60]!r}")
    return pools


STATUS_KEYS = "pool state status action see scan scrub remove checkpoint expand config errors dedup".split()


def split_status_blocks(text: str) -> list[dict[str, list[str]]]:
    """Blocks of `key: value` with continuation lines (by tab, or by blanks below errors); `scan` may come repeatedly."""
    blocks: list[dict[str, list[str]]] = []
    lines: list[str] = []
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator and key.strip() in STATUS_KEYS and not line.startswith("\t") and len(key) <= 10:
            key = key.strip()
            if key == "pool":
                blocks.append({})
            if blocks:
                lines = blocks[-1].setdefault(key, [])
                lines.append(value[1:] if key == "pool" else value.strip())
        elif line.strip():
            lines.append(line)
    return blocks


def read_text_pool(name: str, block: dict[str, list[str]]) -> dict[str, Any]:
    errors = " ".join(block.get("errors", [""])[:1])
    files = [line.strip() for line in block.get("errors", [])[1:]]
    status = squeeze(" ".join(block.get("status", [])))
    return known(
        name=name,
        state=" ".join(block.get("state", [])) or None,
        status_text=status,
        action_text=squeeze(" ".join(block.get("action", []))),
        data_errors=read_error_count(errors),
        damaged_files=[file for file in files if file] or None,
        scan=read_text_scan(block.get("scan", [])),
        expansion=read_text_expansion(block.get("expand", [])),
        vdevs=read_text_vdevs(block.get("config", [])),
    )


def read_error_count(text: str) -> int | None:
    if text.startswith("No known data errors"):
        return 0
    words = text.split()
    return to_count(words[0]) if len(words) > 2 and words[1:3] == ["data", "errors,"] else None


def read_text_vdevs(lines: list[str]) -> list[dict[str, Any]]:
    """The `config:` table: depth is two blanks a level, sections of other classes start at depth 0 without a state."""
    header = next((line for line in lines if line.split()[:2] == ["NAME", "STATE"]), None)
    if header is None:
        return []
    column = header.index("STATE")
    names = {"READ": "read_errors", "WRITE": "write_errors", "CKSUM": "checksum_errors", "SLOW": "slow_ios"}
    counters = [names.get(word, word) for word in header.split()[2:]]
    rows = []
    label = "normal"
    for line in lines[lines.index(header) + 1 :]:
        body = line.removeprefix("\t")
        if body.strip() in VDEV_CLASSES and not body.startswith(" "):
            label = VDEV_CLASSES[body.strip()]
            continue
        row = read_vdev_row(line, column, counters)
        if row is not None:
            row["label"] = label
            rows.append(row)
    # the first row is the pool itself
    return nest_vdev_rows(rows[1:])


def read_vdev_row(line: str, column: int, counters: list[str]) -> dict[str, Any] | None:
    name, rest = line[:column], line[column:]
    if not rest.split()[:1] or rest.split()[0] not in VDEV_STATES:  # a name with other than one-byte signs shifts it
        state = next((word for word in line.split() if word in VDEV_STATES), None)
        if state is None:
            return None
        name, rest = line[: line.index(f" {state}")], line[line.index(f" {state}") :]
    state, *words = rest.split()
    values: dict[str, int | None] = {}
    while words and len(values) < len(counters) and (words[0] == "-" or to_size(words[0]) is not None):
        values[counters[len(values)]] = to_size(words.pop(0))  # 2.2 prints - for slow I/Os of groups
    body = name.strip("\t\n")
    depth = (len(body) - len(body.lstrip(" "))) // 2
    return {"name": body.strip(), "depth": depth, "state": state, "counters": values, "notes": " ".join(words)}


def nest_vdev_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the table as a tree of vdevs."""
    vdevs = []
    while rows:
        row = rows[0]
        size = next((at for at, other in enumerate(rows[1:], 1) if other["depth"] <= row["depth"]), len(rows))
        children = nest_vdev_rows(rows[1:size])
        vdevs.append(build_text_vdev(row, children))
        rows = rows[size:]
    return vdevs


def build_text_vdev(row: dict[str, Any], children: list[dict[str, Any]]) -> dict[str, Any]:
    name, notes = row["name"], row["notes"]
    path = name if name.startswith("/") else None
    words, _, brackets = notes.partition("(")
    reason = words.strip() or None
    if reason and reason.startswith("was "):
        path, reason = reason[4:].strip(), "missing device"
    elif reason and reason.startswith("block size:"):
        reason = None
    elif reason and reason.startswith("in use by pool"):
        reason = "currently in use"
    if reason is None:
        reason = next((note for note in VDEV_NOTES if f"{note})" in brackets), None)
    if name.startswith("draid") and not children:
        path = name  # as JSON has it for distributed spares
    return build_vdev(
        name=name,
        kind="",
        label=row["label"],
        state=row["state"],
        path=path,
        counters=row["counters"],
        reason=reason,
        children=children,
    )


def read_text_scan(lines: list[str]) -> dict[str, Any]:
    """One or several scan texts (a scrub, and one for each rebuilt draid vdev), each with its continuation lines."""
    scan = dict(NO_SCAN)
    group: list[str] = []
    for line in [*lines, ""]:
        if group and not line.startswith("\t"):
            scan = later_scan(scan, read_scan_text(group))
            group = []
        group.append(line.strip())
    return scan


def read_scan_text(lines: list[str]) -> dict[str, Any]:
    head = lines[0]
    words = head.split()
    if not words or words[0] not in ("scrub", "resilver", "resilvered"):
        return dict(NO_SCAN)
    function = "scrub" if words[0] == "scrub" else "resilver"
    if " in progress since " in head or " paused since " in head:
        return read_running_scan(function, lines)
    if " canceled on " in head:
        return known(function=function, state="canceled", ended_at=parse_ctime(head.partition(" canceled on ")[2]))
    before, _, when = head.rpartition(" on ")
    work, _, errors = before.partition(" with ")
    amount, _, duration = work.partition(" in ")
    ended, seconds = parse_ctime(when), to_seconds(duration)
    if ended is None:
        return dict(NO_SCAN)
    return known(
        function=function,
        state="finished",
        started_at=None if seconds is None else ended - seconds,
        ended_at=ended,
        repaired_bytes=to_size(amount.split()[-1]),
        errors=to_count((errors.split() or [""])[0]),
    )


def read_running_scan(function: str, lines: list[str]) -> dict[str, Any]:
    head = lines[0]
    paused = " paused since " in head
    since = head.partition(" since ")[2]
    repaired = progress = remaining = None
    for line in lines[1:]:
        if line.startswith(("scrub started on ", "resilver started on ")):
            since = line.partition(" on ")[2]
        for part in line.split(","):
            part = part.strip()
            if part.endswith((" repaired", " resilvered")):
                repaired = to_size(part.split()[0])
            elif part.endswith("% done"):
                progress = to_ratio(part.split()[0])
            elif part.endswith(" to go"):
                remaining = to_seconds(part[:-6])
    return known(
        function=function,
        state="paused" if paused else "scanning",
        started_at=parse_ctime(since),
        progress_ratio=progress,
        remaining_seconds=remaining,
        repaired_bytes=repaired,
    )


def read_text_expansion(lines: list[str]) -> dict[str, Any] | None:
    """`expansion of raidz1-0 in progress since …` with a line of figures, or `expanded raidz1-0 … on …`."""
    head = lines[0] if lines else ""
    if " in progress since " in head:
        shares = [part.strip() for line in lines[1:] for part in line.split(",") if part.strip().endswith("% done")]
        progress = to_ratio(shares[0].split()[0]) if shares else None
        return known(state="scanning", started_at=parse_ctime(head.partition(" since ")[2]), progress_ratio=progress)
    if head.startswith("expanded "):
        ended = parse_ctime(head.rpartition(" on ")[2])
        seconds = to_seconds(head.partition(" in ")[2].partition(",")[0])
        started = None if ended is None or seconds is None else ended - seconds
        return known(state="finished", started_at=started, ended_at=ended)
    return None


def parse_columns(text: str, columns: list[str]) -> list[dict[str, str | None]]:
    """`-Hp` output: tab-separated (names may hold blanks), `-` and an empty cell stand for none."""
    rows = []
    for line in text.splitlines():
        cells = line.split("\t")
        if len(cells) >= len(columns):
            rows.append({name: None if cell in ("-", "") else cell for name, cell in zip(columns, cells)})
    if not rows and text.strip():
        raise SourceError("garbage", f"{len(columns)} columns were expected, the answer begins with {text[:60]!r}")
    return rows


def pool_layout(vdevs: list[dict[str, Any]]) -> str:
    """`mirror ×2`, `raidz2`, `draid2`, `stripe`; mixed ones joined by ` + `."""
    counts: dict[str, int] = {}
    for vdev in vdevs:
        kind = vdev["type"]
        if vdev["class"] == "normal" and kind not in ("hole", "indirect"):
            kind = kind if kind.startswith(("mirror", "raidz", "draid")) else "stripe"
            counts[kind] = counts.get(kind, 0) + 1
    return " + ".join(f"{kind} ×{n}" if n > 1 and kind != "stripe" else kind for kind, n in counts.items())


def redundancy_margin(vdevs: list[dict[str, Any]]) -> int | None:
    """How many more disks may fail, in the worst case, before data is lost; −1: a top-level vdev has lost data already.

    Log, cache and spare vdevs hold no data of the pool's own that would be missed.
    """
    margins = []
    for vdev in vdevs:
        if vdev["class"] in ("normal", "special", "dedup") and vdev["type"] not in ("hole", "indirect"):
            if failures_to_lose(vdev, trust_resilvering=True) == 0:
                return -1
            margins.append(max(0, failures_to_lose(vdev, trust_resilvering=False) - 1))
    return min(margins, default=None)


def failures_to_lose(vdev: dict[str, Any], *, trust_resilvering: bool) -> int:
    """How many disks have to fail until this vdev has lost data; 0: it has."""
    children = vdev.get("children", [])
    if not children:
        if vdev["state"] not in ("ONLINE", "DEGRADED"):
            return 0
        return 1 if trust_resilvering or vdev.get("reason") not in ("resilvering", "awaiting resilver") else 0
    each = sorted(failures_to_lose(child, trust_resilvering=trust_resilvering) for child in children)
    kind = vdev["type"]
    if kind.startswith(("raidz", "draid")):
        parity = to_count(kind[5:6]) or 1
        return sum(each[: parity + 1])  # the cheapest parity + 1 children
    return sum(each)  # mirror, replacing, spare: all sides hold the same


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


PVECFG = "/usr/share/perl5/PVE/pvecfg.pm"
METRICS = "/run/pve/metrics"
ZFS_KSTAT = "/proc/spl/kstat/zfs"
LATE_SECONDS = 40  # pvestatd writes every 10 s; older than this is late
DEAD_SECONDS = 120  # and older than this says nothing about now
RECHECK_SECONDS = 600  # how long what seldom changes (version, next kernel, sensors) is believed
ZFS_LIMIT = 20.0  # seconds for a zpool or zfs command

SHARED: dict[str, Any] = {}  # what several fast collectors of one tick read: the probe, since when, and the values


def shared(probe: Any, name: str, read: Callable[[Any], Any]) -> Any:
    """`read(probe)`, or what it gave (or raised) to another fast collector of the same tick."""
    now = probe.monotonic()
    if SHARED.get("probe") is not probe or not 0 <= now - SHARED["since"] < 1:
        SHARED.clear()
        SHARED.update(probe=probe, since=now)
    if name not in SHARED:
        try:
            SHARED[name] = read(probe)
        except SourceError as error:
            SHARED[name] = error
    if isinstance(SHARED[name], SourceError):
        raise SourceError(SHARED[name].code, SHARED[name].detail)
    return SHARED[name]


def remember(probe: Any, memory: dict[str, Any], name: str, read: Callable[[], Any], *, key: Any = None) -> Any:
    """`read()`, repeated only after ten minutes or when `key` (of JSON values) is another one."""
    now = probe.now()
    kept = as_dict(memory.get(name))
    if kept.get("key") == key and 0 <= now - (to_number(kept.get("at")) or 0) < RECHECK_SECONDS and "value" in kept:
        return kept["value"]
    value = read()
    memory[name] = {"key": key, "at": now, "value": value}
    return value


def attempt(read: Callable[..., Any], *args: Any, default: Any = None) -> Any:
    """For what may be missing without being an error: the default then."""
    try:
        return read(*args)
    except SourceError:
        return default


def node_name(probe: Any) -> str:
    """The node's name is the short host name."""
    return probe.read("/proc/sys/kernel/hostname").strip().split(".")[0]


# node


@collector("node", tick=FAST)
def collect_node(probe: Any, memory: dict[str, Any]) -> dict[str, Any]:
    """CPU, memory, load, pressure, network, disks and temperatures of the host, from /proc and /sys."""
    boot_id = probe.read("/proc/sys/kernel/random/boot_id").strip()
    kernel = probe.read("/proc/sys/kernel/osrelease").strip()
    node = known(name=node_name(probe), kernel=kernel, boot_id=boot_id)
    if memory.get("boot_id") != boot_id:
        memory.clear()
        memory["boot_id"] = boot_id
    parts: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: read_load(probe),
        lambda: read_cpu(probe, memory),
        lambda: read_memory(probe),
        lambda: read_pressure(probe),
        lambda: read_root(probe),
        lambda: read_versions(probe, memory, kernel),
        lambda: read_interfaces(probe, memory),
        lambda: read_block_devices(probe, memory),
        lambda: {"temperatures": read_temperatures(probe, memory)},
    )
    for part in parts:
        try:
            node.update(part())
        except SourceError as error:
            probe.problem("node", error.code, error.detail)
    return node


def read_load(probe: Any) -> dict[str, Any]:
    load = probe.read("/proc/loadavg").split()
    uptime = probe.read("/proc/uptime").split()
    if len(load) < 3 or not uptime:
        raise SourceError("garbage", "/proc/loadavg or /proc/uptime")
    load1, load5, load15 = (to_number(word) for word in load[:3])
    return known(load1=load1, load5=load5, load15=load15, uptime_seconds=to_count(uptime[0]))


def read_cpu(probe: Any, memory: dict[str, Any]) -> dict[str, Any]:
    """Shares since the last sample of this boot; before there is one, what pvestatd measured."""
    jiffies, count = parse_cpu_times(probe.read("/proc/stat"))
    before = memory.get("jiffies")
    memory["jiffies"] = jiffies
    ratios = parse_cpu_ratios(before, jiffies) if isinstance(before, list) else {}
    if not ratios:
        ratios = attempt(read_pvestatd_cpu, probe, default={})
    return {"cpu_count": count or None, **ratios}


def read_pvestatd_cpu(probe: Any) -> dict[str, Any]:
    part = shared(probe, "metrics", read_metrics).get("node", {})
    if not part or abs(probe.now() - part["timestamp"]) > LATE_SECONDS:
        return {}
    stat = as_dict(part["data"].get("cpustat"))
    return known(cpu_ratio=to_number(stat.get("cpu")), iowait_ratio=to_number(stat.get("wait")))


def read_memory(probe: Any) -> dict[str, Any]:
    """MemAvailable does not contain the ARC, though ZFS gives up all above its minimum: memory_free_ratio adds that."""
    sizes = parse_meminfo(probe.read("/proc/meminfo"))
    arc = parse_kstat(attempt(probe.read, f"{ZFS_KSTAT}/arcstats", default=""))
    total, available = sizes.get("MemTotal"), sizes.get("MemAvailable")
    free = None
    if total and available is not None:
        free = round((available + max(0, arc.get("size", 0) - arc.get("c_min", 0))) / total, 4)
    swap_total, swap_free = sizes.get("SwapTotal"), sizes.get("SwapFree")
    vmstat = attempt(probe.read, "/proc/vmstat", default="")
    kills = vmstat.partition("\noom_kill ")[2].partition("\n")[0]
    return known(
        memory_total_bytes=total,
        memory_available_bytes=available,
        memory_free_ratio=free,
        arc_size_bytes=arc.get("size"),
        arc_min_bytes=arc.get("c_min"),
        arc_max_bytes=arc.get("c_max"),
        arc_hits_total=arc.get("hits"),
        arc_misses_total=arc.get("misses"),
        swap_total_bytes=swap_total,
        swap_used_bytes=None if swap_total is None or swap_free is None else swap_total - swap_free,
        oom_kills_total=to_count(kills),
    )


PRESSURES = {"cpu": ("some_avg10",), "io": ("full_avg10", "full_avg300"), "memory": ("full_avg10", "full_avg300")}


def read_pressure(probe: Any) -> dict[str, Any]:
    """PSI; without it (psi=0) the files are absent or unreadable."""
    ratios = {}
    for kind, names in PRESSURES.items():
        values = parse_pressure(attempt(probe.read, f"/proc/pressure/{kind}", default=""))
        ratios.update({f"pressure_{kind}_{name}_ratio": values[name] for name in names if name in values})
    return ratios


def read_root(probe: Any) -> dict[str, Any]:
    """The root file system; used + available < total, as root keeps a reserve."""
    root = probe.statvfs("/")
    return {
        "root_total_bytes": root.f_blocks * root.f_frsize,
        "root_used_bytes": (root.f_blocks - root.f_bfree) * root.f_frsize,
        "root_available_bytes": root.f_bavail * root.f_frsize,
    }


def read_versions(probe: Any, memory: dict[str, Any], kernel: str) -> dict[str, Any]:
    version = remember(probe, memory, "pve_version", lambda: parse_pve_version(attempt(probe.read, PVECFG, default="")))
    following = remember(probe, memory, "kernel_next", lambda: read_next_kernel(probe, kernel), key=kernel)
    reboot = None if following is None else following != kernel
    if attempt(probe.exists, "/run/reboot-required", default=False):  # Debian writes it, Proxmox does not
        reboot = True
    return known(pve_version=version, kernel_next=following, reboot_needed=reboot)


def read_next_kernel(probe: Any, kernel: str) -> str | None:
    """The release that boots next: a pinned one, else the newest of the running one's flavour that is complete."""
    for pin in ("/etc/kernel/next-boot-pin", "/etc/kernel/proxmox-boot-pin"):
        pinned = attempt(probe.read, pin, default="").strip().split("\n")[0].strip()
        if pinned:
            return pinned
    flavour = kernel.rpartition("-")[2]
    images = set(attempt(probe.list_dir, "/boot", default=[]))
    releases = [
        release
        for release in attempt(probe.list_dir, "/lib/modules", default=[])
        if release.rpartition("-")[2] == flavour and f"vmlinuz-{release}" in images
    ]
    return max(releases, key=version_key, default=None)


def read_interfaces(probe: Any, memory: dict[str, Any]) -> dict[str, Any]:
    """Physical ones have a device; bridges, bonds, VLANs, taps and veths would count the same bytes again."""
    counters = parse_net_dev(probe.read("/proc/net/dev"))
    names = remember(
        probe,
        memory,
        "interfaces",
        lambda: [name for name in counters if "/" not in name and probe.exists(f"/sys/class/net/{name}/device")],
        key=sorted(counters),
    )
    interfaces = []
    for name in names:
        received, receive_errors, sent, send_errors = counters[name]
        state = attempt(probe.read, f"/sys/class/net/{name}/operstate", default="").strip()
        interfaces.append(
            known(
                name=name,
                receive_bytes_total=received,
                transmit_bytes_total=sent,
                receive_errors_total=receive_errors,
                transmit_errors_total=send_errors,
                up=None if state in ("", "unknown") else state == "up",
            )
        )
    return {
        "interfaces": interfaces,
        "net_receive_bytes_total": sum(interface["receive_bytes_total"] for interface in interfaces),
        "net_transmit_bytes_total": sum(interface["transmit_bytes_total"] for interface in interfaces),
    }


NO_DISKS = ("zd", "loop", "dm-", "md", "sr", "fd", "ram", "zram", "nbd", "rbd", "drbd")


def read_block_devices(probe: Any, memory: dict[str, Any]) -> dict[str, Any]:
    """Whole disks: no partitions, and nothing that lies on other disks."""
    counters = parse_diskstats(probe.read("/proc/diskstats"))
    names = remember(
        probe,
        memory,
        "block_devices",
        lambda: [name for name in counters if not name.startswith(NO_DISKS) and probe.exists(f"/sys/block/{name}")],
        key=sorted(name for name in counters if not name.startswith(NO_DISKS)),
    )
    return {
        "block_devices": [
            {
                "name": name,
                "read_bytes_total": counters[name][0] * 512,
                "write_bytes_total": counters[name][1] * 512,
                "busy_seconds_total": counters[name][2] / 1000,
            }
            for name in names
        ]
    }


def read_temperatures(probe: Any, memory: dict[str, Any]) -> list[dict[str, Any]]:
    """hwmon sensors. Read errors are normal for some. Their numbers change at boot: told by name and device."""
    sensors = remember(probe, memory, "sensors", lambda: find_sensors(probe))
    temperatures = []
    for sensor, label, path, critical in sensors:
        raw = attempt(probe.read, path, default="").strip()
        millidegrees = to_number(raw)
        if millidegrees is not None:
            celsius = round(millidegrees / 1000, 1)
            temperatures.append(known(sensor=sensor, label=label, celsius=celsius, critical_celsius=critical))
    return temperatures


def find_sensors(probe: Any) -> list[list[Any]]:
    """[sensor, label, path, critical] of every temperature, but not drivetemp: that one talks to the disk each time."""
    found: list[list[Any]] = []
    for folder in attempt(probe.list_dir, "/sys/class/hwmon", default=[]):
        base = f"/sys/class/hwmon/{folder}"
        name = attempt(probe.read, f"{base}/name", default="").strip()
        if not name or name == "drivetemp":
            continue
        device = attempt(probe.readlink, f"{base}/device", default="").rpartition("/")[2]
        files = set(attempt(probe.list_dir, base, default=[]))
        for file in sorted(files, key=version_key):
            if file.startswith("temp") and file.endswith("_input"):
                stem = file[:-6]
                label = attempt(probe.read, f"{base}/{stem}_label", default="").strip() or stem
                critical = None
                if f"{stem}_crit" in files:
                    critical = to_number(attempt(probe.read, f"{base}/{stem}_crit", default="").strip())
                limit = round(critical / 1000, 1) if critical else None
                found.append([f"{name}-{device}" if device else name, label, f"{base}/{file}", limit])
    return found


# cluster


def require_pve(probe: Any) -> None:
    """Absent on a machine without Proxmox VE. An empty /etc/pve is Proxmox with its file system down."""
    if probe.exists(PVECFG) or probe.exists(METRICS):
        return
    try:
        probe.list_pve("/etc/pve")
    except SourceError as error:
        if error.code == "missing":
            raise Absent("no Proxmox VE here") from None
        raise


def read_version_file(probe: Any) -> dict[str, Any]:
    """/etc/pve/.version: a counter per file. Without it pmxcfs is not mounted, and /etc/pve is an empty directory."""
    try:
        text = probe.read_pve("/etc/pve/.version")
    except SourceError as error:
        if error.code == "missing":
            raise SourceError("unavailable", "/etc/pve is not mounted (pve-cluster down?): no .version") from None
        raise
    return parse_object(text, "/etc/pve/.version")


def read_pve_config(
    probe: Any, memory: dict[str, Any], name: str, parse: Callable[[str], Any], *, path: str = "", default: Any = None
) -> Any:
    """A file below /etc/pve, read again only when its counter (or the start of pmxcfs) in .version has changed."""
    version = shared(probe, "version", read_version_file)
    key = [version.get("starttime"), version.get(name)]
    files = memory.setdefault("files", {})
    if name not in files or files[name]["key"] != key or key[1] is None:
        try:
            value = parse(probe.read_pve(f"/etc/pve/{path or name}"))
        except SourceError as error:
            if error.code != "missing":
                raise
            value = default
        files[name] = {"key": key, "value": value}
    return files[name]["value"]


@collector("cluster", tick=FAST)
def collect_cluster(probe: Any, memory: dict[str, Any]) -> dict[str, Any]:
    """Name, quorum and members. Membership is what .members says, not the directories under /etc/pve/nodes."""
    require_pve(probe)
    shared(probe, "version", read_version_file)
    members = parse_object(probe.read_pve("/etc/pve/.members"), "/etc/pve/.members")
    cluster = as_dict(members.get("cluster"))
    if not cluster:
        raise Absent("a stand-alone node")
    nodes = {name: as_dict(node) for name, node in as_dict(members.get("nodelist")).items()}
    quorate = to_flag(cluster["quorate"]) if "quorate" in cluster else None
    return {
        **known(name=cluster.get("name"), quorate=quorate),
        **read_votes(probe, memory, {name for name, node in nodes.items() if to_flag(node.get("online"))}, quorate),
        "members": [
            known(name=name, online=to_flag(node["online"]) if "online" in node else None, address=node.get("ip"))
            for name, node in sorted(nodes.items())
        ],
    }


def read_votes(probe: Any, memory: dict[str, Any], online: set[str], quorate: bool | None) -> dict[str, int]:
    """From corosync.conf and who is online; where that cannot tell (quorum device, changed expectation): corosync."""
    text = attempt(probe.read, "/etc/corosync/corosync.conf") or attempt(probe.read_pve, "/etc/pve/corosync.conf")
    votes, device = parse_corosync_votes(text or "")
    expected, present = sum(votes.values()), sum(votes.get(name, 0) for name in online)
    needed = expected // 2 + 1
    if votes and not device and online <= votes.keys() and (present >= needed) == quorate:
        return {"votes_expected": expected, "votes_present": present, "votes_needed": needed}
    if not text:
        return {}
    key = [sorted(online), quorate]
    return remember(probe, memory, "votes", lambda: run_quorumtool(probe), key=key)


def run_quorumtool(probe: Any) -> dict[str, int]:
    """At most every ten minutes or on a change, as this runs on a fast tick; its exit code says nothing."""
    try:
        return parse_quorumtool(probe.run("corosync-quorumtool", "-siH", limit=3.0, ok=None))
    except SourceError as error:
        probe.problem("cluster", error.code, error.detail)
        return {}


# guests


def read_metrics(probe: Any) -> dict[str, dict[str, Any]]:
    """The first line of /run/pve/metrics: pvestatd's newest snapshot, by part."""
    return parse_metrics(probe.read_line(METRICS))


def read_rrd(probe: Any) -> dict[str, dict[str, dict[str, str]]]:
    return parse_rrd(probe.read_pve("/etc/pve/.rrd"))


def fresh_part(probe: Any, name: str) -> tuple[dict[str, Any] | None, float | None]:
    """A part of the newest snapshot and its time, (None, None) when it is missing there."""
    part = attempt(shared, probe, "metrics", read_metrics, default={}).get(name)
    return (part["data"], part["timestamp"]) if part else (None, None)


def is_late(probe: Any, stamp: float | None) -> bool:
    return stamp is None or abs(probe.now() - stamp) > LATE_SECONDS


@collector("guests", tick=FAST)
def collect_guests(probe: Any, memory: dict[str, Any]) -> list[dict[str, Any]]:
    """Every VM and container of this node: pvestatd's snapshot, else .rrd; configuration only when it changed."""
    require_pve(probe)
    sources = {kind: fresh_part(probe, kind) for kind in ("qemu", "lxc")}
    try:
        configs = read_guest_configs(probe, memory)
    except SourceError as error:
        if all(is_late(probe, stamp) for _, stamp in sources.values()):
            raise
        probe.problem("guests", error.code, error.detail)
        configs = guess_guest_configs(memory, sources)
    rrd = {}
    if any(is_late(probe, sources[config["type"]][1]) for config in configs.values()):
        rrd = attempt(read_rrd, probe, default={}).get("vm", {})
    states = attempt(read_ha_states, probe, memory, default={})
    datasets = attempt(read_zfs_storages, probe, memory, default={})
    guests = []
    for vmid, config in sorted(configs.items(), key=lambda pair: int(pair[0])):
        raw, stamp = choose_guest(probe, vmid, sources[config["type"]], rrd.get(vmid))
        guest = build_guest(vmid, config, raw)
        guest.update(known(ha_state=states.get(vmid), volumes=build_volumes(config, datasets)))
        if stamp is not None and (is_late(probe, stamp) or is_late(probe, sources[config["type"]][1])):
            guest["as_of"] = stamp
        guests.append(guest)
    check_guests_age(probe, guests)
    return guests


def read_guest_configs(probe: Any, memory: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Configuration by vmid of the guests that .vmlist places on this node; each file is read when its version moved."""
    node = node_name(probe)
    start = shared(probe, "version", read_version_file).get("starttime")
    listing = read_pve_config(probe, memory, "vmlist", parse_vmlist, path=".vmlist", default={})
    before = as_dict(memory.get("configs"))
    configs: dict[str, dict[str, Any]] = {}
    for vmid, (home, kind, version) in listing.items():
        if home == node:
            config = as_dict(before.get(vmid))
            key = [kind, version, start]
            if config.get("key") != key:
                config = {**read_guest_config(probe, node, kind, vmid), "key": key, "type": kind}
            configs[vmid] = config
    memory["configs"] = configs
    return configs


def read_guest_config(probe: Any, node: str, kind: str, vmid: str) -> dict[str, Any]:
    """A guest whose file cannot be read (just removed or moved) is reported without what is in it."""
    folder = "qemu-server" if kind == "qemu" else "lxc"
    try:
        return parse_guest_config(probe.read_pve(f"/etc/pve/nodes/{node}/{folder}/{vmid}.conf"))
    except SourceError as error:
        if error.code not in ("missing", "denied"):
            raise
        return {}


def guess_guest_configs(memory: dict[str, Any], sources: dict[str, tuple[Any, Any]]) -> dict[str, dict[str, Any]]:
    """While /etc/pve cannot be read: the guests of pvestatd's snapshot, with the configuration known from before."""
    before = as_dict(memory.get("configs"))
    found = {}
    for kind, (guests, _) in sources.items():
        for vmid in guests or {}:
            if vmid.isdigit():
                found[vmid] = as_dict(before.get(vmid)) or {"type": kind}
    return found


def choose_guest(
    probe: Any, vmid: str, source: tuple[dict[str, Any] | None, float | None], line: dict[str, str] | None
) -> tuple[dict[str, Any], float | None]:
    """The guest's raw values and their time: the snapshot while it is fresh, else the newer of snapshot and .rrd."""
    guests, stamp = source
    raw = as_dict((guests or {}).get(vmid))
    written = to_number((line or {}).get("ctime"))
    if line is not None and written is not None and is_late(probe, stamp) and (stamp is None or written >= stamp):
        return line, written
    return raw, stamp if raw else None


def build_guest(vmid: str, config: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """One guest from pvestatd's values (of either source; they share their names) and its configuration."""
    kind = config["type"]
    status = str(raw.get("qmpstatus") or raw.get("status") or "unknown")
    template = to_flag(raw["template"]) if "template" in raw else config.get("template")
    name = raw.get("name") or config.get("name") or (f"VM {vmid}" if kind == "qemu" else f"CT{vmid}")
    guest = known(
        vmid=int(vmid),
        type=kind,
        name=str(name),
        status=status,
        template=template if template is not None else False if raw else None,
        lock=raw.get("lock") or config.get("lock"),
        tags=split_tags(raw["tags"]) if "tags" in raw else config.get("tags", []),
        onboot=config.get("onboot"),
        created_at=config.get("created_at"),
        uptime_seconds=to_count(raw.get("uptime")),
        cpu_count=to_number(raw.get("cpus")),
        memory_max_bytes=to_count(raw.get("maxmem")),
        disk_max_bytes=to_count(raw.get("maxdisk")),
        disk_used_bytes=to_count(raw.get("disk")) if kind == "lxc" else None,
    )
    if status not in ("stopped", "unknown"):  # of a stopped guest the zeroes are no measurements
        guest.update(read_guest_use(kind, raw))
    return guest


def read_guest_use(kind: str, raw: dict[str, Any]) -> dict[str, Any]:
    cpu = to_number(raw.get("cpu"))
    return known(
        cpu_ratio=None if cpu is None or cpu < 0 else round(cpu, 5),
        memory_used_bytes=to_count(raw.get("mem")),
        memory_host_bytes=to_count(raw.get("memhost")) or None if kind == "qemu" else None,
        net_receive_bytes_total=to_count(raw.get("netin")),
        net_transmit_bytes_total=to_count(raw.get("netout")),
        disk_read_bytes_total=to_count(raw.get("diskread")),
        disk_write_bytes_total=to_count(raw.get("diskwrite")),
    )


def build_volumes(config: dict[str, Any], datasets: dict[str, str]) -> list[dict[str, Any]] | None:
    """Where the guest's disks lie: storage, and the dataset for those on a zfspool storage."""
    if "volumes" not in config:
        return None
    volumes = []
    for volume in config["volumes"]:
        pool = datasets.get(volume["storage"])
        # a linked clone is written base-9000-disk-0/vm-103-disk-0: its own dataset is the last part
        dataset = f"{pool}/{volume['volume'].rpartition('/')[2]}" if pool else None
        volumes.append(known(storage=volume["storage"], dataset=dataset, size_bytes=volume.get("size_bytes")))
    return volumes


def read_zfs_storages(probe: Any, memory: dict[str, Any]) -> dict[str, str]:
    """The dataset of each zfspool storage."""
    sections = read_pve_config(probe, memory, "storage.cfg", parse_sections, default=[])
    return {name: values["pool"] for kind, name, values in sections if kind == "zfspool" and values.get("pool")}


def read_ha_states(probe: Any, memory: dict[str, Any]) -> dict[str, str]:
    """The state of each guest under HA, by vmid."""
    states = read_pve_config(probe, memory, "ha/manager_status", parse_ha_states, default={})
    return {sid.partition(":")[2]: state for sid, state in states.items() if sid.startswith(("vm:", "ct:"))}


def check_guests_age(probe: Any, guests: list[dict[str, Any]]) -> None:
    """Old values are told as such; above two minutes the status is what the control groups say."""
    now = probe.now()
    ages = {guest["vmid"]: now - guest["as_of"] for guest in guests if "as_of" in guest}
    if any(abs(age) > LATE_SECONDS for age in ages.values()):
        oldest = max(ages.values(), key=abs)
        probe.problem("guests", "stale", f"pvestatd's newest data are {oldest:.0f} s old")
    if any(abs(age) > DEAD_SECONDS for age in ages.values()):
        running = attempt(find_running, probe)
        for guest in guests:
            if abs(ages.get(guest["vmid"], 0)) > DEAD_SECONDS:
                guest["status"] = "unknown" if running is None else told_status(guest, running)


def told_status(guest: dict[str, Any], running: set[int]) -> str:
    """A process that is there may still be paused: what was known stays then."""
    if guest["vmid"] not in running:
        return "stopped"
    return guest["status"] if guest["status"] not in ("stopped", "unknown") else "running"


GUEST_GROUPS = ("/sys/fs/cgroup/qemu.slice", "/sys/fs/cgroup/lxc")


def find_running(probe: Any) -> set[int]:
    """vmids with a control group (cgroup v2): what runs right now, whatever pvestatd says."""
    running = set()
    for folder in GUEST_GROUPS:
        for entry in attempt(probe.list_dir, folder, default=[]):
            vmid = entry.removesuffix(".scope")
            if vmid.isdigit():
                running.add(int(vmid))
    return running


# storages


@collector("storages", tick=FAST)
def collect_storages(probe: Any, memory: dict[str, Any]) -> list[dict[str, Any]]:
    """Every PVE storage of this node, inactive and disabled ones too."""
    require_pve(probe)
    storages, stamp = fresh_part(probe, "storage")
    datasets = {}
    try:
        datasets = read_zfs_storages(probe, memory)
    except SourceError as error:
        probe.problem("storages", error.code, error.detail)
    if is_late(probe, stamp):
        try:
            return read_rrd_storages(probe, memory)
        except SourceError:
            if storages is None:
                raise
            probe.problem("storages", "stale", f"pvestatd's newest data are {probe.now() - (stamp or 0):.0f} s old")
    as_of = stamp if is_late(probe, stamp) else None
    return [
        build_storage(name, as_dict(storage), datasets.get(name), as_of)
        for name, storage in sorted((storages or {}).items())
    ]


def build_storage(name: str, storage: dict[str, Any], dataset: str | None, as_of: float | None) -> dict[str, Any]:
    active = to_flag(storage["active"]) if storage.get("active") is not None else None
    measured = active is not False  # an inactive storage is told with zeroes, which nobody has measured
    return known(
        storage=name,
        type=storage.get("type"),
        content=storage.get("content"),
        shared=to_flag(storage.get("shared", 0)),
        enabled=to_flag(storage.get("enabled", 1)),
        active=active,
        total_bytes=to_count(storage.get("total")) if measured else None,
        used_bytes=to_count(storage.get("used")) if measured else None,
        available_bytes=to_count(storage.get("avail")) if measured else None,
        dataset=dataset,
        as_of=as_of,
    )


SHARED_TYPES = ("nfs", "cifs", "pbs", "rbd", "cephfs", "iscsi", "iscsidirect", "glusterfs", "zfs", "esxi")


def read_rrd_storages(probe: Any, memory: dict[str, Any]) -> list[dict[str, Any]]:
    """From storage.cfg and .rrd, where a storage has a line only while it is active."""
    node = node_name(probe)
    sections = read_pve_config(probe, memory, "storage.cfg", parse_sections, default=[])
    rrd = read_rrd(probe)
    ctime = to_number(rrd["node"].get(node, {}).get("ctime"))
    late = is_late(probe, ctime)
    if late:
        age = "missing" if ctime is None else f"{probe.now() - ctime:.0f} s old"
        probe.problem("storages", "stale", f"this node's data in .rrd are {age}")
    storages = []
    for kind, name, values in sections:
        nodes = values.get("nodes")
        if nodes and node not in nodes.replace(",", " ").split():
            continue
        line = rrd["storage"].get(f"{node}/{name}", {})
        storages.append(build_rrd_storage(probe, kind, name, values, line, node_is_late=late))
    return storages


def build_rrd_storage(
    probe: Any, kind: str, name: str, values: dict[str, str], line: dict[str, str], *, node_is_late: bool
) -> dict[str, Any]:
    enabled = "disable" not in values or values["disable"] in ("0", "no")
    written = to_number(line.get("ctime"))
    active: bool | None = written is not None and abs(probe.now() - written) <= DEAD_SECONDS
    if not enabled:
        active = False
    elif not active and node_is_late:
        active = None  # the whole node's data are old: nothing is known about this storage
    total, used = to_count(line.get("total")), to_count(line.get("used"))
    available = None if total is None or used is None else max(0, total - used)
    storage = {
        "type": kind,
        "content": values.get("content"),
        "shared": to_flag(values.get("shared", "0")) or kind in SHARED_TYPES,
        "enabled": enabled,
        "active": active,
        "total": total,
        "used": used,
        "avail": available,
    }
    return build_storage(name, storage, values.get("pool") if kind == "zfspool" else None, written)


# pools


def require_zfs(probe: Any) -> None:
    """Absent while the module is not loaded: each zpool or zfs command would load it."""
    if not probe.exists("/sys/module/zfs"):
        raise Absent("the zfs module is not loaded")


def read_pool_states(probe: Any, memory: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, guid and state of each imported pool from the kernel's files: no process, and it answers when zpool hangs."""
    names = probe.list_dir(ZFS_KSTAT)
    others = memory.get("others", [])
    pools, plain = [], []
    for name in names:
        if name in others:
            plain.append(name)
            continue
        state = attempt(probe.read, f"{ZFS_KSTAT}/{name}/state", default="").strip()
        guid = attempt(probe.read, f"{ZFS_KSTAT}/{name}/guid", default="").strip()
        if state or guid:
            pools.append(known(name=name, guid=to_guid(guid), state=state or None))
        elif not probe.exists(f"{ZFS_KSTAT}/{name}/."):
            plain.append(name)  # arcstats and other files beside the pools: not tried again
    if memory.get("others") != plain:
        memory["others"] = plain
    return pools


@collector("pool_states", tick=FAST)
def collect_pool_states(probe: Any, memory: dict[str, Any]) -> list[dict[str, Any]]:
    """State of each pool; never runs a command."""
    require_zfs(probe)
    return read_pool_states(probe, memory)


@collector("pools", tick=MEDIUM)
def collect_pools(probe: Any, memory: dict[str, Any]) -> list[dict[str, Any]]:
    """Each pool in full, one pool per command. A suspended one is told from the kernel's files alone."""
    require_zfs(probe)
    pools = []
    for pool in read_pool_states(probe, memory):
        if pool.get("state") == "SUSPENDED":
            pools.append({**pool, **kept_scrub(memory, pool.get("guid"))})
            continue
        try:
            pools.append(read_pool(probe, memory, pool))
        except SourceError as error:
            if probe.exists(f"{ZFS_KSTAT}/{pool['name']}/state"):  # else it was exported meanwhile
                probe.problem("pools", error.code, f"{pool['name']}: {error.detail}")
                pools.append({**pool, **kept_scrub(memory, pool.get("guid"))})
    guids = [pool.get("guid") for pool in pools]
    for name in ("scrubs", "damaged"):
        memory[name] = {guid: kept for guid, kept in as_dict(memory.get(name)).items() if guid in guids}
    return pools


POOL_COLUMNS = "name guid size alloc free ckpoint frag cap dedup health readonly".split()


def read_pool(probe: Any, memory: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    name = found["name"]
    status = read_pool_status(probe, name)
    guid = found.get("guid") or status.get("guid") or ""
    vdevs = status.pop("vdevs", [])
    for vdev in vdevs:
        place_disks(probe, vdev)
    pool = {
        **found,
        **status,
        "layout": pool_layout(vdevs),
        **read_pool_space(probe, name),
        **known(redundancy_margin=redundancy_margin(vdevs)),
        "features_disabled": "features are not enabled" in status.get("status_text", ""),
        **read_damaged_files(probe, memory, name, guid, status),
        **keep_scrub(memory, guid, status["scan"]),
        "vdevs": vdevs,
    }
    return pool


def read_pool_status(probe: Any, name: str) -> dict[str, Any]:
    """JSON where the tools have it (2.3 on), else text; by what comes back, as module and tools may differ."""
    if version_key(attempt(probe.read, "/sys/module/zfs/version", default="9"))[:2] >= [2, 3]:
        try:
            text = probe.run("zpool", "status", "-j", "--json-int", "-P", name, limit=ZFS_LIMIT)
            return parse_zpool_status_json(text, probe.now())[name]
        except SourceError as error:
            if error.code not in ("failed", "garbage"):
                raise
        except KeyError:
            pass
    text = probe.run("zpool", "status", "-p", "-P", "-s", name, limit=ZFS_LIMIT)
    pools = parse_zpool_status(text)
    if name not in pools:
        raise SourceError("garbage", f"zpool status: nothing about pool {name!r} in the answer")
    return pools[name]


def read_pool_space(probe: Any, name: str) -> dict[str, Any]:
    """Raw space of the pool (raidz counts parity), and what its root dataset leaves users."""
    space: dict[str, Any] = {}
    try:
        text = probe.run("zpool", "list", "-Hp", "-o", ",".join(POOL_COLUMNS), name, limit=ZFS_LIMIT)
        row = next((row for row in parse_columns(text, POOL_COLUMNS) if row["name"] == name), {})
        space = known(
            size_bytes=to_count(row.get("size")),
            allocated_bytes=to_count(row.get("alloc")),
            free_bytes=to_count(row.get("free")),
            capacity_ratio=to_ratio(row.get("cap")),
            fragmentation_ratio=to_ratio(row.get("frag")),
            dedup_ratio=to_number((row.get("dedup") or "").rstrip("x")),
            checkpoint_bytes=to_count(row.get("ckpoint")),
            readonly=None if row.get("readonly") is None else row["readonly"] == "on",
        )
        columns = ["name", "used", "avail", "refer"]
        text = probe.run("zfs", "list", "-Hp", "-d", "0", "-o", ",".join(columns), "-t", "filesystem", name, limit=ZFS_LIMIT)
        row = next((row for row in parse_columns(text, columns) if row["name"] == name), {})
        usable = known(usable_used_bytes=to_count(row.get("used")), usable_available_bytes=to_count(row.get("avail")))
        return {**space, **usable}
    except SourceError as error:
        probe.problem("pools", error.code, f"{name}: {error.detail}")
        return space


FEW_ERRORS = 200  # `zpool status -v` costs the kernel more than 20 s for some 900 of them, unkillably


def read_damaged_files(
    probe: Any, memory: dict[str, Any], name: str, guid: str, status: dict[str, Any]
) -> dict[str, list[str]]:
    """The first 20 damaged files, asked for only when the number of errors is another one, and small."""
    count = status.get("data_errors")
    damaged = memory.setdefault("damaged", {})
    if not count:
        damaged.pop(guid, None)
        return {}
    kept = damaged.get(guid)
    if kept is None or kept["count"] != count and probe.now() - kept["at"] > RECHECK_SECONDS:
        if count > FEW_ERRORS:
            return {}
        damaged[guid] = kept = {"count": count, "at": probe.now(), "files": []}
        try:
            text = probe.run("zpool", "status", "-v", "-p", "-P", name, limit=ZFS_LIMIT)
            kept["files"] = parse_zpool_status(text).get(name, {}).get("damaged_files", [])[:20]
        except SourceError as error:
            probe.problem("pools", error.code, f"{name}: {error.detail}")
    return {"damaged_files": kept["files"]} if kept["files"] else {}


def keep_scrub(memory: dict[str, Any], guid: str, scan: dict[str, Any]) -> dict[str, Any]:
    """The last finished scrub: a resilver, or a scrub that is canceled, overwrites it in ZFS."""
    scrubs = memory.setdefault("scrubs", {})
    if scan["function"] == "scrub" and scan["state"] == "finished" and "ended_at" in scan:
        duration = scan["ended_at"] - scan["started_at"] if "started_at" in scan else None
        scrubs[guid] = known(
            ended_at=scan["ended_at"],
            duration_seconds=duration,
            repaired_bytes=scan.get("repaired_bytes"),
            errors=scan.get("errors"),
        )
    return kept_scrub(memory, guid)


def kept_scrub(memory: dict[str, Any], guid: str | None) -> dict[str, Any]:
    scrub = as_dict(memory.get("scrubs")).get(guid or "")
    return {"last_scrub": scrub} if scrub else {}


def place_disks(probe: Any, vdev: dict[str, Any]) -> None:
    """Name the disk of each leaf, as `disks` names it."""
    for child in vdev.get("children", []):
        place_disks(probe, child)
    if vdev["type"] == "disk" and "path" in vdev:
        disk = attempt(find_disk, probe, vdev["path"])
        if disk:
            vdev["disk"] = disk


def find_disk(probe: Any, path: str) -> str | None:
    """The whole disk below a device path: sda for /dev/disk/by-id/…-part3, through device mapper too."""
    name = probe.readlink(path).rpartition("/")[2]
    for _ in range(8):
        slaves = attempt(probe.list_dir, f"/sys/class/block/{name}/slaves", default=[])
        if name.startswith("dm-") and slaves:
            name = slaves[0]
            continue
        if not attempt(probe.exists, f"/sys/class/block/{name}/partition", default=False):
            return name
        name = probe.readlink(f"/sys/class/block/{name}").split("/")[-2]
    return None


# --- report: run what is due, keep sections and errors apart, wrap with host, tick, time and sequence ---

# --- signature: the bytes as sent -> webhook headers ---

# --- spool: reports that wait on disk until the server has them ---

# --- delivery: one kept connection; an answer means accepted, later or refused ---

# --- service: monotonic ticks, the cheap look between them, signals, sd_notify ---

# --- commands: start, once, check, stop, version ---
