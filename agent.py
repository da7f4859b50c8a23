#!/usr/bin/env python3
"""Collect what a Proxmox host knows about itself, and post it to the server, signed.

    constants -> config -> probe -> parsers -> collectors -> report
              -> signature -> spool -> delivery -> service -> commands

The agent listens on no port, runs a fixed list of read-only commands (and sendmail, for those who want a mail when
nobody takes the reports), and nothing a server answers can change what it runs. Standard library only. Everything it
reads or runs goes through the probe, so that `agent.py once --explain` can list it.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import http.client
import io
import ipaddress
import itertools
import json
import marshal
import os
import queue
import re
import selectors
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Container, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Fields = dict[str, Any]  # an object of JSON, or a row of the report: values by name

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
STDIN_LIMIT = 16 * KIB  # fits a pipe, so that writing it never waits
READ_DEADLINE = 2.0  # seconds for one read of what may block: all but what the kernel has in memory
LANE_DEADLINE = 10.0  # the same in a lane's thread, which keeps nobody waiting: a busy disk may take its time
AHEAD_DEADLINE = 0.5  # the same for all that is read ahead; what is not had by then is asked for by itself
MEMORY_PATHS = ("/proc/", "/sys/", "/dev/", "/run/")  # file systems that answer from the kernel's memory
HWMON_PATH = "/sys/class/hwmon/"  # but not these: some drivers ask the device, an NVMe by its admin queue
KILL_GRACE = 1.0  # seconds a killed child gets to be gone before it counts as stuck (state D)
STUCK_LIMIT = 16  # so many stuck children at once, and no more commands are started

MEMORY_SECONDS = 300  # how often at most the memory of a fast section is written
EVENT_SECTIONS = frozenset({"tasks"})  # their memory says what was sent already: written with each report

DAY = 86400
FAST, MEDIUM, SLOW = "fast", "medium", "slow"
TICKS = (FAST, MEDIUM, SLOW)

DETAIL_LIMIT = 500  # signs of an error's detail
REPORT_LIMIT = 24 * MIB  # the server takes 32 MiB unpacked
PACKED_LIMIT = 2000 * KIB  # and 2 MiB as sent
GZIP_LEVEL = 1  # of JSON of this kind level 1 leaves a third, level 6 a quarter at three times the work
BATCH_REPORTS = 500  # the server's limit
BATCH_LIMIT = 3 * MIB // 2  # unpacked, so that a batch costs little memory here too
SPOOL_ENDING = ".json.gz"
REJECTED_LIMIT = 100  # files kept in rejected/
PENDING_LIMIT = 200  # reports kept in memory while the disk does not take them
CLOCK_UNSET = 1_600_000_000  # a wall clock before this (2020) was never set
CLOCK_STEP = 3600.0  # seconds between two reports on disk: what is above that is no age, but a clock that was set
CLOCK_FIRST, CLOCK_LAST = 1_750_000_000, 2_250_000_000  # the server's clock, 2025 to 2041: not signed for others
DISK_DEADLINE = 5.0  # seconds for one write to the spool
CLOSE_SECONDS = 1.2  # the same while stopping

ANSWER_TIMEOUT = 20.0  # seconds to connect, to send, and for the answer as a whole
ANSWER_LIMIT = 64 * KIB  # head and body, as they come
RETRY_AFTER_LIMIT = 60.0  # seconds a server may ask for beyond our own back-off
PASSED_OVER_SECONDS = 600.0  # how long a report waits that alone did not get through, while others did
BACKOFF_FIRST, BACKOFF_LAST = 1.0, 60.0
BACKLOG_PAUSE = 1.0  # seconds between two batches of the backlog
IDLE_SECONDS = 3600.0
KEEP_SECONDS = 1.0  # a report without an answer for so long goes to disk
CLOCK_TOLERANCE = 30.0  # seconds; `check` complains above it

LOOK_SECONDS = 4.5  # between two looks; the contract allows 5, and the report needs a moment too
URGENT_SECONDS = 1.5  # how long a change of a pool's state waits for the pool in full
FLUSH_SECONDS = 5.0  # how long finished sections wait for the rest of their round
MAIL_LOOK_SECONDS = 60.0  # between two looks whether root has to be told that nobody takes the reports
MAIL_GRACE_SECONDS = 600.0  # after the start, so that what an earlier run left can be taken first
MAIL_RETRY_SECONDS = 3600.0  # after a mail that could not be sent
BEAT_SECONDS = 60.0  # between two words to systemd, where it keeps no watchdog
STOP_SECONDS = 10

GUEST_SECONDS = 25.0  # how long a start or stop seen by the look is believed against pvestatd's last snapshot
TASKS_FOLDER = "/var/log/pve/tasks"
TASKS_PATH = f"{TASKS_FOLDER}/active"

OK, FAILED = 0, 1  # and 2 for a wrong command line, by argparse

# --- config: settings from TOML; a mistake is told with file, key and reason ---


class ConfigError(Exception):
    """A mistake in the settings: file, key, reason, and what to write instead."""

    def __init__(self, path: str, key: str, reason: str) -> None:
        super().__init__(f"{path}: {key}: {reason}" if key else f"{path}: {reason}")


class Config:
    """The agent's settings. Made by load_config; where there is no file, with a name and defaults that cannot send."""

    def __init__(self, host_id: str) -> None:
        self.path = ""
        self.host_id = host_id
        self.url = ""  # of the server; empty without a config, like the next two
        self.key = b""  # the host's secret
        self.ca_file = ""
        self.intervals = {FAST: 30, MEDIUM: 300, SLOW: 1800}
        self.max_bytes = 256 * MIB
        self.max_seconds = 7 * DAY
        self.mail_root_seconds = 0  # 0: never
        self.warnings: list[str] = []


SETTINGS: dict[str, dict[str, tuple[type, int, int]]] = {  # table -> key -> type, and for numbers the range
    "": {"server_url": (str, 0, 0), "token": (str, 0, 0), "token_file": (str, 0, 0), "host_id": (str, 0, 0)}
    | {"ca_file": (str, 0, 0), "intervals": (dict, 0, 0), "spool": (dict, 0, 0), "alert": (dict, 0, 0)},
    "intervals": {"fast_seconds": (int, 1, DAY), "medium_seconds": (int, 1, DAY), "slow_seconds": (int, 1, DAY)},
    "spool": {"max_mb": (int, 1, 1024 * 1024), "max_days": (int, 1, 3650)},
    "alert": {"mail_root_after_hours": (int, 0, 8760)},
}
TYPE_NAMES = {str: "a text in quotes", int: "a whole number", dict: "a table"}


def config_path(flag: str | None) -> str:
    """--config, else $AGENT_CONFIG, else the usual place."""
    return flag or os.environ.get("AGENT_CONFIG") or CONFIG_PATH


def state_path() -> str:
    """Where the agent keeps what must survive: systemd's $STATE_DIRECTORY, else the usual place."""
    return os.path.abspath(os.environ.get("STATE_DIRECTORY", "").split(":")[0] or STATE_PATH)


def short_host_name() -> str:
    return os.uname().nodename.split(".")[0]


def load_config(path: str) -> Config:
    """The settings in a file, all checked."""
    settings = read_toml(path)
    check_settings(path, "", settings)
    config = Config(settings.get("host_id", short_host_name()))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", config.host_id):
        reason = f"{config.host_id!r}: 1 to 63 of a-z A-Z 0-9 . _ -, beginning with a letter or digit"
        raise ConfigError(path, "host_id", reason)
    config.path = path
    config.url = parse_url(path, settings.get("server_url"))
    config.key = parse_token(path, *find_token(path, settings, config.warnings))
    file = settings.get("ca_file", "")
    if "ca_file" in settings and not os.access(file, os.R_OK):
        raise ConfigError(path, "ca_file", f"{file!r}: cannot be read")
    config.ca_file = os.path.abspath(file) if file else ""
    config.intervals = find_intervals(path, config.intervals, settings.get("intervals", {}))
    spool = settings.get("spool", {})
    config.max_bytes = spool["max_mb"] * MIB if "max_mb" in spool else config.max_bytes
    config.max_seconds = spool["max_days"] * DAY if "max_days" in spool else config.max_seconds
    config.mail_root_seconds = settings.get("alert", {}).get("mail_root_after_hours", 0) * 3600
    warn_if_exposed(path, config.warnings)
    return config


def read_toml(path: str) -> Fields:
    try:
        with open(path, "rb") as handle:
            return tomllib.loads(handle.read(MIB).decode("utf-8"))
    except OSError as error:
        raise ConfigError(path, "", error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise ConfigError(path, "", "not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(path, "", f"not TOML: {error}") from None


def check_settings(path: str, table: str, settings: Fields) -> None:
    """Refuse unknown keys, wrong types and numbers out of range, table by table."""
    known = SETTINGS[table]
    value: Any
    for name, value in settings.items():
        key = f"{table}.{name}" if table else name
        if name not in known:
            raise ConfigError(path, key, f"unknown key; known here: {', '.join(known)}")
        kind, low, high = known[name]
        if type(value) is not kind:  # not isinstance: true is no number
            raise ConfigError(path, key, f"must be {TYPE_NAMES[kind]}, not {value!r}")
        if type(value) is int and not low <= value <= high:
            raise ConfigError(path, key, f"{value} is out of range: {low} to {high}")
        if type(value) is str and "\0" in value:  # open() raises ValueError for it, no OSError
            raise ConfigError(path, key, "has a NUL in it")
        if isinstance(value, dict):
            check_settings(path, name, value)


def parse_url(path: str, url: str | None) -> str:
    """server_url without a slash at its end: https anywhere, http for this machine alone."""
    if not url:
        raise ConfigError(path, "server_url", 'missing; write server_url = "https://monitor.example.com"')
    no_name, no_port = f"{url!r}: no server name that can be used", f"{url!r}: the port must be 1 to 65535"
    reason = no_name
    try:
        parts = urllib.parse.urlsplit(url)
        reason = no_port
        port = parts.port
    except ValueError:
        raise ConfigError(path, "server_url", reason) from None
    host, better = parts.hostname or "", f'write "https://{parts.netloc}" instead of "{url}"'
    faults = {
        f"{parts.scheme}:// was the old agent's; {better}": parts.scheme in ("wss", "ws"),
        f'{url!r}: write "https://" and the server\'s name': parts.scheme not in ("https", "http"),
        # a name, or an address of either kind
        no_name: not re.fullmatch(r"[A-Za-z0-9._:-]+", host) or "@" in parts.netloc,
        no_port: port == 0 or parts.netloc.endswith(":"),
        f"http:// is for loopback addresses only; {better}": parts.scheme == "http" and not is_loopback(host),
        f"{url!r}: only scheme, name, port and path may be given":
            set("?#") & set(url) or not url.isascii() or any(sign <= " " for sign in url),
    }  # fmt: skip
    for reason, is_so in faults.items():
        if is_so:
            raise ConfigError(path, "server_url", reason)
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """localhost, ::1, and 127.0.0.0/8 written out (a name such as 127.0.0.1.example.com is not)."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def find_token(path: str, settings: Fields, warnings: list[str]) -> tuple[str, str]:
    """The key that named it and the token: token, token_file, or systemd's credential of the name `token`."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY", "")
    if "token" in settings and "token_file" in settings:
        raise ConfigError(path, "token_file", "give token or token_file, not both")
    if "token" in settings:
        return "token", settings["token"]
    if "token_file" not in settings and not credentials:
        raise ConfigError(path, "token", 'missing; write token = "whsec_…" or token_file = "…"')
    name = settings.get("token_file", f"{credentials}/token").replace("${CREDENTIALS_DIRECTORY}", credentials)
    name = name.replace("$CREDENTIALS_DIRECTORY", credentials)
    # A bare name is the credential of that name, or lies beside the config.
    folders = [folder for folder in (credentials, os.path.dirname(os.path.abspath(path))) if folder]
    files = [os.path.join(folder, name) for folder in folders]
    file = next((file for file in files if os.path.exists(file)), files[-1])
    try:
        with open(file, encoding="utf-8", errors="replace") as handle:
            text = handle.read(64 * KIB).strip()
    except OSError as error:
        raise ConfigError(path, "token_file", f"{file}: {error.strerror}") from None
    if not file.startswith(credentials or "\0"):
        warn_if_exposed(file, warnings)
    return "token_file", text


def parse_token(path: str, key: str, token: str) -> bytes:
    """The secret bytes in `whsec_…`. The message never repeats the token."""
    if not token.startswith("whsec_"):
        raise ConfigError(path, key, "a token begins with whsec_ (register-host on the server prints it)")
    try:
        secret = binascii.a2b_base64(token[6:], strict_mode=True)
    except ValueError:
        raise ConfigError(path, key, "what follows whsec_ is not base64; was it copied whole?") from None
    if len(secret) < 16:
        raise ConfigError(path, key, "too short; was it copied whole?")
    return secret


def find_intervals(path: str, defaults: dict[str, int], table: dict[str, int]) -> dict[str, int]:
    """Seconds per tick; a slower tick may not come more often than a faster one."""
    intervals = {tick: table.get(f"{tick}_seconds", seconds) for tick, seconds in defaults.items()}
    for fast, slow in ((FAST, MEDIUM), (MEDIUM, SLOW)):
        if intervals[fast] > intervals[slow]:
            default = "" if f"{slow}_seconds" in table else " (the default)"
            reason = f"{intervals[fast]} is above {slow}_seconds = {intervals[slow]}{default}"
            raise ConfigError(path, f"intervals.{fast}_seconds", reason)
    return intervals


def warn_if_exposed(path: str, warnings: list[str]) -> None:
    """A file with a secret that others may read, or write with its folder, is worth a word, no more."""
    stat = os.stat(path)
    for bits, verb in ((0o44, "readable"), (0o22, "writable")):
        if stat.st_mode & bits & 0o007 or (stat.st_mode & bits & 0o070 and stat.st_gid != 0):
            warnings.append(f"{path}: {verb} by others and holds the token; chmod 600 {path}")
    folder = os.path.dirname(os.path.abspath(path))
    for place, owner, mode in ((path, stat.st_uid, 0), (folder, os.stat(folder).st_uid, os.stat(folder).st_mode)):
        if owner not in (0, os.geteuid()):
            warnings.append(f"{place}: owned by another user (uid {owner}), who can change it; chown root {place}")
        if mode & 0o002 and not mode & 0o1000:
            warnings.append(f"{place}: writable by others, who can put another config there; chmod 755 {place}")


# --- probe: the one door outside: files and commands, with limits ---

NO_DIGITS = dict.fromkeys(map(ord, "0123456789"))
LAST_TOLD: dict[str, str] = {}


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


def write_file(path: str, content: bytes) -> None:
    """Beside, flushed, renamed: after a crash there is the whole file or none of it."""
    partial = path + ".tmp"
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except OSError:
        remove_file(partial)  # half a file on a full disk takes the room that is wanted
        raise
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)  # the new name, too, must survive a power cut
    finally:
        os.close(folder)


def remove_file(path: str) -> bool:
    """False when it cannot be removed."""
    with contextlib.suppress(OSError):
        os.unlink(path)
        return True
    return False


def start_ticks(pid: int) -> str | None:
    """When the process began, in ticks since boot (field 22 of its stat): tells it from a later one of the same pid."""
    try:
        stat = read_bytes(f"/proc/{pid}/stat", 64 * KIB)
    except OSError:
        return None
    return stat.rpartition(b")")[2].split()[19].decode()


class Worker:
    """One thread for reads that may block. While it is blocked, calls fail at once and no second one is started."""

    def __init__(self, deadline: float, name: str) -> None:
        self.deadline = deadline
        self.name = name
        self.jobs: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        self.late: tuple[str, queue.SimpleQueue[Any]] | None = None  # what it hangs on, and where the answer will come
        self.waiting: set[queue.SimpleQueue[Any]] = set()
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def call(self, what: str, job: Callable[[], Any], deadline: float = 0.0) -> Any:
        """The job's result; SourceError('timeout') when it takes too long, 'stuck' while an earlier one still does."""
        deadline = deadline or self.deadline
        if self.late is not None:
            if self.late[1].empty():
                raise SourceError("stuck", f"{what}: left out, {self.late[0]} still does not answer")
            self.late = None
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.waiting.add(answer)
        self.jobs.put((job, answer))
        try:
            result = answer.get(timeout=deadline)
        except queue.Empty:
            self.late = (what, answer)
            raise SourceError("timeout", f"{what}: no answer in {deadline:g} s") from None
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
            answer.put(outcome_of(job))


def outcome_of(job: Callable[[], Any]) -> Any:
    """Its result, or what it raised: that is raised again where it was asked for."""
    try:
        return job()
    except Exception as error:
        return error


class Probe:
    """The one door outside. Everything here has a limit, and every failure is a SourceError."""

    def __init__(
        self, *, path: str = COMMAND_PATH, pve_root: str = PVE_ROOT, deadline: float = READ_DEADLINE, state: str = ""
    ) -> None:
        self.path = path
        self.pve_root = pve_root
        self.environ = {**COMMAND_ENVIRON, "PATH": path}
        self.deadline = deadline
        self.workers: dict[str, Worker] = {}
        self.trace: Callable[[str, str, float, int, str], None] | None = None  # --explain listens here
        self.problems: dict[str, dict[str, str]] = {}
        self.places: dict[str, dict[str, str]] | None = None
        self.stuck_file = os.path.join(state, "stuck.json") if state else ""
        self.stuck = load_stuck(self.stuck_file)  # argv -> pid and its start ticks
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False
        self._programs: dict[str, str] = {}
        self.asked: dict[tuple[str, str], Callable[[], Any]] = {}  # by the loop since the last round, and may block
        self.answers: dict[tuple[str, str], Any] = {}  # to that, had ahead

    # files

    def read(self, path: str, limit: int = READ_LIMIT) -> str:
        """The whole file as text; SourceError('too_large') above `limit`."""
        # pmxcfs makes a new snapshot for each opening, and a file read in pieces can tear: one big read there.
        chunk = MIB if path.startswith(self.pve_root) else 64 * KIB
        return self._open_door("read", path, lambda: to_text(read_bytes(path, limit, chunk=chunk)))

    def read_line(self, path: str, limit: int = READ_LIMIT) -> str:
        """Only the first line, without its end (/run/pve/metrics may be tens of MB long)."""
        return self._open_door("line", path, lambda: to_text(read_bytes(path, limit, until=b"\n")))

    def list_dir(self, path: str) -> list[str]:
        """The names in a directory, sorted; a missing one is an error, not an empty list."""
        return self._open_door("list", path, lambda: sorted(os.listdir(path)))

    def exists(self, path: str) -> bool:
        return self._open_door("stat", path, lambda: os.path.exists(path))

    def stat(self, path: str) -> os.stat_result:
        return self._open_door("stat", path, lambda: os.stat(path))

    def statvfs(self, path: str) -> os.statvfs_result:
        """Size and free space of a file system."""
        return self._open_door("statvfs", path, lambda: os.statvfs(path))

    def readlink(self, path: str) -> str:
        """Where a link ends, as an absolute path."""
        return self._open_door("link", path, lambda: os.path.realpath(path, strict=True))

    def worker_of(self, kind: str, path: str) -> Worker | None:
        """Who reads a path: None (the caller itself) for what the kernel has in memory. All else may hang (pmxcfs
        without quorum, a suspended root pool, a dying NVMe behind its hwmon file), and what hangs must cost its own
        values alone: a worker for each kind of source, and for each device of hwmon."""
        if path.startswith(self.pve_root):
            name = "pve"
        elif kind == "statvfs":
            name = f"statvfs {path}"
        elif path.startswith(HWMON_PATH):
            name = path.split("/")[4]
        elif path.startswith(MEMORY_PATHS):
            return None
        else:
            name = "disk"
        return self.worker(name)

    def worker(self, name: str) -> Worker:
        if name not in self.workers:
            self.workers.setdefault(name, Worker(self.deadline, name))
        return self.workers[name]

    def _open_door(self, kind: str, path: str, job: Callable[[], Any]) -> Any:
        began, size, outcome = time.monotonic(), 0, "ok"
        try:
            worker = self.worker_of(kind, path)
            result = self._guarded(worker, kind, path, job) if worker else job()
            size = len(result) if isinstance(result, (str, list)) else 0
            return result
        except (OSError, SourceError) as error:
            told = source_error(error, path) if isinstance(error, OSError) else error
            outcome = told.code
            raise told from None
        finally:
            self._note(kind, path, began, size, outcome)

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """A round of the loop: what the last one asked of paths that may block is read by one thread beforehand, as
        waking one for each costs more than reading. Where that takes long, the rest is asked for one by one."""
        jobs, self.asked = self.asked, {}
        with contextlib.suppress(SourceError):
            worker, ask = self.worker("ahead"), lambda: {key: outcome_of(job) for key, job in jobs.items()}
            self.answers = worker.call("ahead", ask, AHEAD_DEADLINE)
        try:
            yield
        finally:
            self.answers = {}

    def _guarded(self, worker: Worker, kind: str, path: str, job: Callable[[], Any]) -> Any:
        if threading.current_thread().name in TICKS:
            return worker.call(path, job, LANE_DEADLINE)
        self.asked[kind, path] = job
        answer = self.answers.pop((kind, path), None)
        if isinstance(answer, Exception):
            raise answer
        return worker.call(path, job) if answer is None else answer

    # commands

    def run(self, *argv: str, limit: float = 10.0, ok: tuple[int, ...] | None = (0,), stdin: bytes = b"") -> str:
        """A command's stdout. `ok` are the exit codes that count as success (None: any); `stdin` is what it reads.

        After `limit` seconds its process group is killed; one that cannot be killed (state D) is left behind, and
        the same command is refused as 'stuck' until it has gone.
        """
        began, out, outcome = time.monotonic(), b"", "?"
        try:
            exit_code, out, err = self._run(argv, limit, stdin)
            outcome = f"exit {exit_code}"
        except SourceError as error:
            outcome = error.code
            raise
        finally:
            self._note("run", " ".join(argv), began, len(out), outcome)
        if ok is not None and exit_code not in ok:
            words = " ".join(to_text(err).split())[:300]  # its last ones
            ended = f"exit code {exit_code}" if exit_code >= 0 else f"killed by signal {-exit_code}"
            code = "denied" if "ermission denied" in words else "failed"
            raise SourceError(code, f"{' '.join(argv)}: {ended}{': ' + words if words else ''}")
        return to_text(out)

    def _run(self, argv: tuple[str, ...], limit: float, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        self._refuse_stuck(argv)
        child = self._start(argv, stdin)
        self.running.add(child)
        try:
            return read_output(child, argv, limit)
        finally:
            self.running.discard(child)
            kill_group(child)  # also after a good end: what it left in the background is nobody's
            child.stdout.close()  # type: ignore[union-attr]
            child.stderr.close()  # type: ignore[union-attr]
            self._bury(child, argv)

    def _start(self, argv: tuple[str, ...], stdin: bytes) -> subprocess.Popen[bytes]:
        """The command, started by a thread of its own: an exec hangs where the root file system does."""
        given_up = threading.Event()

        def start() -> subprocess.Popen[bytes]:
            child = start_command(self.find(argv[0]), argv, self.environ, stdin)
            if given_up.is_set():
                kill_group(child)
            return child

        try:
            limit = LANE_DEADLINE if threading.current_thread().name in TICKS else self.deadline
            child: subprocess.Popen[bytes] = self.worker("exec").call(argv[0], start, limit)
            return child
        except OSError as error:
            self._programs.pop(argv[0], None)  # it may have moved with an upgrade
            raise source_error(error, argv[0]) from None
        except SourceError:
            given_up.set()
            raise

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
                self._save_stuck()
        if argv in self.stuck:
            pid = self.stuck[argv][0]
            raise SourceError("stuck", f"{' '.join(argv)}: process {pid} hangs in the kernel; not started again")
        if len(self.stuck) >= STUCK_LIMIT:
            raise SourceError("stuck", f"{len(self.stuck)} commands hang in the kernel; no more are started")

    def _bury(self, child: subprocess.Popen[bytes], argv: tuple[str, ...]) -> None:
        """Wait a moment for a killed child; one that stays is remembered, never waited for."""
        until = time.monotonic() + KILL_GRACE
        while child.poll() is None:
            if time.monotonic() > until:
                child.returncode = -signal.SIGKILL  # for subprocess it is over; is_gone() looks after it
                self.stuck[argv] = (child.pid, start_ticks(child.pid))
                self._save_stuck()
                text = f"{' '.join(argv)}: process {child.pid} cannot be killed (hangs in the kernel)"
                raise SourceError("stuck", text)
            time.sleep(0.01)

    def _save_stuck(self) -> None:
        """A restarted agent, too, must not start a second copy."""
        if self.stuck_file:
            stuck = [[list(argv), pid, ticks] for argv, (pid, ticks) in self.stuck.items()]
            try:  # the disk may be what hangs
                content = json.dumps(stuck).encode()
                self.worker("disk").call(self.stuck_file, lambda: write_file(self.stuck_file, content))
            except (OSError, SourceError) as error:
                log_once("stuck", f"probe: cannot write {self.stuck_file}: {error}")

    def cancel(self) -> None:
        """End all that is under way (the agent stops). Callable from a signal handler."""
        self.stopping = True
        for worker in tuple(self.workers.values()):
            worker.cancel()
        for child in tuple(self.running):
            kill_group(child)

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


def load_stuck(path: str) -> dict[tuple[str, ...], tuple[int, str | None]]:
    """The commands that an earlier run of the agent had to leave behind."""
    try:
        with open(path, encoding="utf-8") as handle:
            return {tuple(argv): (int(pid), ticks) for argv, pid, ticks in json.load(handle)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError):
        log(f"probe: {path} cannot be used; commands stuck before the restart are not known")
        return {}


def is_gone(pid: int, ticks: str | None) -> bool:
    """Has this very process ended? A later process with the same pid has other start ticks."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # not our child: it hung already before the agent was restarted
        now = start_ticks(pid)
        return now is None or now != ticks


# Python before 3.12 holds its lock while vfork() waits for the exec: where that hangs, every thread would hang with it
# [python/cpython issue 104372].
vars(subprocess)["_USE_VFORK"] = sys.version_info >= (3, 12)


def start_command(
    program: str, argv: tuple[str, ...], environ: dict[str, str], stdin: bytes = b""
) -> subprocess.Popen[bytes]:
    """A command in a session, and so a process group, of its own."""
    source = subprocess.PIPE if stdin else subprocess.DEVNULL
    child = subprocess.Popen(argv, executable=program, env=environ, start_new_session=True, stdin=source,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    if child.stdin:
        with contextlib.suppress(BrokenPipeError):
            os.write(child.stdin.fileno(), stdin[:STDIN_LIMIT])
        child.stdin.close()
    return child


def kill_group(child: subprocess.Popen[bytes]) -> None:
    """End a command and all that it started. The number of a group stays taken as long as one of it lives."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def read_output(child: subprocess.Popen[bytes], argv: tuple[str, ...], limit: float) -> tuple[int, bytes, bytes]:
    """Exit code, stdout and the beginning of stderr, read side by side so that neither pipe fills up and blocks."""
    name, until, pause = " ".join(argv), time.monotonic() + limit, 0.001
    out, err = bytearray(), bytearray()
    with selectors.DefaultSelector() as ends:
        ends.register(child.stdout, selectors.EVENT_READ, out)  # type: ignore[arg-type]
        ends.register(child.stderr, selectors.EVENT_READ, err)  # type: ignore[arg-type]
        while True:
            has_ended = child.poll() is not None
            ready = ends.select(0 if has_ended else pause)
            for key, _ in ready:
                chunk = os.read(key.fd, 64 * KIB)
                if not chunk:
                    ends.unregister(key.fileobj)
                elif key.data is out or len(err) < STDERR_LIMIT:
                    key.data.extend(chunk)
            if len(out) > OUTPUT_LIMIT:
                raise SourceError("too_large", f"{name}: more than {OUTPUT_LIMIT // MIB} MiB of output")
            if has_ended and not ready:  # what a grandchild may still write is not waited for
                return child.returncode, bytes(out), bytes(err[:STDERR_LIMIT])
            if time.monotonic() > until:
                raise SourceError("timeout", f"{name}: no answer in {limit:g} s")
            # A child may end without an event: with its pipes closed before, or held open by one of its own.
            pause = 0.001 if ready else min(2 * pause, 0.05)


class ProbeLike(Protocol):
    """What a collector may ask: of Probe, or of a recorded host in the tests. Every failure is a SourceError."""

    problems: dict[str, dict[str, str]]
    places: dict[str, dict[str, str]] | None  # of disks in pools: found by `pools`, told by `disks`

    def read(self, path: str, limit: int = READ_LIMIT) -> str: ...
    def read_line(self, path: str, limit: int = READ_LIMIT) -> str: ...
    def list_dir(self, path: str) -> list[str]: ...
    def exists(self, path: str) -> bool: ...
    def stat(self, path: str) -> os.stat_result: ...
    def statvfs(self, path: str) -> os.statvfs_result: ...
    def readlink(self, path: str) -> str: ...
    def run(self, *argv: str, limit: float = 10.0, ok: tuple[int, ...] | None = (0,)) -> str: ...
    def find(self, name: str) -> str: ...
    def now(self) -> float: ...
    def monotonic(self) -> float: ...
    def problem(self, section: str, code: str, detail: str = "") -> None: ...


def optional(read: Callable[..., Any], *args: Any, default: Any = None) -> Any:
    """`read(*args)` of what need not be there: the default when it is missing. Every other error passes."""
    try:
        return read(*args)
    except SourceError as error:
        if error.code != "missing":
            raise
        return default


@contextlib.contextmanager
def part_of(probe: ProbeLike, section: str, subject: str = "") -> Iterator[None]:
    """A part of a section: if it fails, that is noted (with its subject, a pool or a disk), and the rest goes on."""
    try:
        yield
    except SourceError as error:
        probe.problem(section, error.code, f"{subject}: {error.detail}" if subject else error.detail)


def one_line(text: str) -> str:
    """Text from outside, safe for a terminal and for one line of a log."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def log(text: str) -> None:
    """A line for the journal."""
    with contextlib.suppress(OSError):  # nobody listens any more; the work goes on
        print(one_line(text), flush=True)


def log_once(topic: str, text: str) -> None:
    """A line for the journal, unless it says what was last said on the topic (numbers may differ)."""
    told = text.translate(NO_DIGITS)
    if LAST_TOLD.get(topic) != told:
        LAST_TOLD[topic] = told
        log(text)

# --- parsers: text to values, pure ---

NUMBER_LIMIT = 1 << 64  # what the server takes
COUNTER_LIMIT = 1 << 63  # ZFS and QEMU print some negative counters as unsigned: from here on a value is unknown
MONTHS = {name: number for number, name in enumerate("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), 1)}
SIZE_UNITS = {unit: 1024**power for power, unit in enumerate("BKMGTPEZ")}


def known(**fields: Any) -> Fields:
    """The fields that have a value. What is not known is left out, never 0."""
    return {name: value for name, value in fields.items() if value is not None}


def is_whole(text: str) -> bool:
    """Will int() take it? isdigit() alone takes a superscript 2 too, and int() refuses thousands of digits."""
    return text.isdecimal() and len(text) < 40


def to_number(value: Any) -> int | float | None:
    """A number from JSON or text; None for `U`, `-`, empty, beyond 64 bit and anything else that is not one."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = int(value) if is_whole(value) else float(value)
        except ValueError:
            return None
    return value if isinstance(value, (int, float)) and -NUMBER_LIMIT < value < NUMBER_LIMIT else None


def to_word(value: Any) -> str | None:
    """A text from JSON; None for all else, for which the server would refuse the whole report."""
    return value if isinstance(value, str) else None


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


def find_text(pattern: str, text: str) -> str:
    """What the pattern's first group matches, "" where it does not."""
    found = re.search(pattern, text)
    return found[1] if found else ""


def to_seconds(text: str) -> int | None:
    """`00:01:02`, `1 days 02:55:32`, `0 days 00:01:02` in seconds."""
    found = re.fullmatch(r"(?:(\d{1,9}) days? )?(\d{1,9}):(\d{1,9}):(\d{1,9})", text.strip())
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, -1)
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds if found else None


def to_unix(date: str, clock: str = "00:00:00", zone: str = "+00:00") -> int | None:
    """`2026-11-23` UTC as unix seconds (zone "": the host's own); None for a day that does not exist."""
    try:
        return int(datetime.fromisoformat(f"{date}T{clock}{zone}").timestamp())
    except (ValueError, OverflowError):
        return None


def parse_ctime(text: str) -> int | None:
    """`Mon Nov 23 09:00:19 2026` (the children's time zone is UTC), also with the zone before the year."""
    found = re.search(r"([A-Z][a-z]{2}) +(\d{1,2}) (\d\d:\d\d:\d\d)(?: \w+)? (\d{4})$", text.strip())
    if found is None or found[1] not in MONTHS:
        return None
    return to_unix(f"{found[4]}-{MONTHS[found[1]]:02}-{int(found[2]):02}", found[3])


def parse_json(text: str, what: str) -> Any:
    """JSON or SourceError('garbage'); a file full of NUL after a power loss is garbage too."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError("garbage", f"{what}: not JSON ({error}); begins with {text[:20]!a}") from None


def parse_object(text: str, what: str) -> Fields:
    """A JSON object, or SourceError('garbage')."""
    value = parse_json(text, what)
    if not isinstance(value, dict):
        raise SourceError("garbage", f"{what}: a JSON object was expected, not {type(value).__name__}")
    return value


def as_dict(value: Any) -> Fields:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def dig(value: Any, *names: str) -> Any:
    """What lies below these names in JSON; None where there is no such thing."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


# Linux


def parse_cpu_times(text: str) -> tuple[list[int], int]:
    """/proc/stat: jiffies user nice system idle iowait irq softirq steal (user holds guest), and the number of CPUs."""
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
    found = re.findall(r"^(\S+):\s+(\d{1,38})(?: (kB))?$", text, re.MULTILINE)
    return {name: int(size) * (1024 if unit else 1) for name, size, unit in found}


def parse_kstat(text: str) -> dict[str, int]:
    """A named kstat of SPL (arcstats …): two head lines, then `name type value`."""
    return {name: int(value) for name, value in re.findall(r"^(\S+)\s+\S+\s+(\d{1,38})$", text, re.MULTILINE)}


def parse_pressure(text: str) -> dict[str, float]:
    """/proc/pressure/*: ratios by `some_avg10` … `full_avg300`."""
    ratios = {}
    for kind, values in re.findall(r"^(\w+) (.*)$", text, re.MULTILINE):
        for name, percent in re.findall(r"\b(avg\d+)=([\d.]+)(?: |$)", values):
            ratios.update(known(**{f"{kind}_{name}": to_ratio(percent)}))
    return ratios


def parse_net_dev(text: str) -> dict[str, list[int]]:
    """/proc/net/dev: received bytes, errors, sent bytes, errors by interface. Names may hold dots and colons."""
    counters = {}
    for line in text.splitlines()[2:]:
        name, _, rest = line.rpartition(":")
        words = rest.split()
        if name and len(words) >= 11 and all(is_whole(words[column]) for column in (0, 2, 8, 10)):
            counters[name.strip()] = [int(words[column]) for column in (0, 2, 8, 10)]
    return counters


def parse_diskstats(text: str) -> dict[str, list[int]]:
    """/proc/diskstats (14 to 20 columns): sectors read and written (always of 512 bytes), busy milliseconds."""
    counters = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 14 and is_whole(words[5]) and is_whole(words[9]) and is_whole(words[12]):
            counters[words[2]] = [int(words[5]), int(words[9]), int(words[12])]
    return counters


def version_key(release: str) -> list[int]:
    """The numbers in a version, for sorting: 6.8.12-4-pve comes before 6.8.12-11-pve."""
    return [int(number) for number in re.findall(r"[0-9]{1,38}", release)]


# Proxmox: status files

RRD_NODE = "uptime level ctime load1 cpus cpu iowait memtotal memused swaptotal swapused roottotal rootused".split()
RRD_GUEST = (
    "uptime name status template ctime cpus cpu maxmem mem maxdisk disk netin netout diskread diskwrite memhost".split()
)
RRD_STORAGE = "ctime total used".split()
RRD_FIELDS = {"node": RRD_NODE, "vm": RRD_GUEST, "storage": RRD_STORAGE}
SECTION_HEAD = re.compile(r"(\S+):\s*(\S+)\s*$")
SECTION_LINE = re.compile(r"\s+(\S+)(?:\s+(.*\S))?\s*$")
STORAGE_NAMES = r"[a-z][a-z0-9\-_.]*[a-z0-9]"
CRON_LINE = re.compile(r"(\d+)\s+(\d+)\s+\*\s+\*\s+(\S+)\s+root\s+(?:/\S+/)?(#)?vzdump(?:\s+(.*))?$")
DISK_KEYS = ("scsi", "virtio", "sata", "ide", "efidisk", "tpmstate", "rootfs", "mp")


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


def parse_metrics(line: str) -> dict[str, Fields]:
    """The newest snapshot of /run/pve/metrics: {part: {"timestamp": t, "data": {…}}} of those parts that are usable."""
    parts = {}
    for name, part in parse_object(line, "/run/pve/metrics").items():
        stamp, values = to_number(dig(part, "timestamp")), dig(part, "data")
        if stamp is not None and isinstance(values, dict):
            parts[name] = {"timestamp": stamp, "data": values}
    return parts


def parse_sections(text: str, names: str = r"\S+") -> list[tuple[str, str, dict[str, str]]]:
    """Proxmox's section files (storage.cfg, jobs.cfg …) as Proxmox reads them: (type, id, {key: value}).

    An empty line ends a section, and only then another one may begin; of two equal keys the first counts; a flag
    without a value is "". Sections whose id does not match `names` are refused [pve-common PVE/SectionConfig.pm].
    """
    sections: list[tuple[str, str, dict[str, str]]] = []
    values: dict[str, str] | None = None
    for line in text.split("\n"):
        if line.lstrip().startswith("#"):
            continue
        head, pair = SECTION_HEAD.match(line), SECTION_LINE.match(line)
        if not line:
            values = None
        elif values is None and head:
            values = {}
            if re.fullmatch(names, head[2], re.IGNORECASE):
                sections.append((head[1].lower(), head[2], values))
        elif values is not None and pair:
            values.setdefault(pair[1], pair[2] or "")
    return sections


def flag_of(values: dict[str, str], key: str, *, default: bool = False) -> bool:
    """A truth value of a section: 1, 0, or the key alone. Other words are refused, as if the line were not there."""
    return {"": True, "1": True, "0": False}.get(values.get(key, "?"), default)


def split_list(text: str | None) -> list[str]:
    """Proxmox's lists: separated by commas, semicolons or blanks [pve-common PVE/Tools.pm split_list]."""
    return [word for word in re.split(r"[,;\s\0]+", text or "") if word]


def parse_storages(text: str) -> list[tuple[str, str, dict[str, str]]]:
    """storage.cfg. `local` is always there, and on all nodes [pve-storage PVE/Storage/Plugin.pm parse_config]."""
    sections = parse_sections(text, STORAGE_NAMES)
    local = next((values for _, name, values in sections if name == "local"), None)
    if local is None:
        local = {"path": "/var/lib/vz", "content": "images,iso,rootdir,snippets,vztmpl"}
        sections.append(("dir", "local", local))
    local.pop("nodes", None)
    return sections


def parse_resource_pools(text: str) -> dict[str, set[int]]:
    """user.cfg: the guests of each pool (`pool:ID:comment:vmids:storages:`), those of pools within it too."""
    own: dict[str, set[int]] = {}
    for line in text.splitlines():
        kind, name, _, vmids = [*line.split(":"), "", "", ""][:4]
        if kind == "pool" and name:
            own.setdefault(name, set()).update(parse_vmids(vmids))
    return {name: set().union(*(own[other] for other in own if f"{other}/".startswith(f"{name}/"))) for name in own}


def parse_vzdump_cron(text: str) -> list[tuple[str, dict[str, str]]]:
    """vzdump.cron of older releases, which cron still runs: (id, the values of a job of jobs.cfg)
    [pve-manager PVE/VZDump.pm parse_vzdump_cron_config]."""
    jobs = []
    for number, line in enumerate(text.splitlines()):
        found = CRON_LINE.match(line.strip())
        if found:
            minute, hour, days, off, rest = found.groups()
            days = "" if days == "*" else re.sub(r"\d", lambda day: WEEKDAYS[int(day[0]) % 7 - 1][:3], days.lower())
            values = dict(re.findall(r"--?([a-z-]+)[ =]+(\S+)", rest or ""))
            vmids = re.sub(r"--?[a-z-]+[ =]+\S+", " ", rest or "")
            values.setdefault("vmid", ",".join(split_list(vmids)))
            schedule = f"{days.replace('-', '..')} {hour}:{int(minute):02}".strip()
            jobs.append((f"cron:{number}", {**values, "schedule": schedule, "enabled": "0" if off else "1"}))
    return jobs


def parse_vmlist(text: str) -> dict[str, list[Any]]:
    """.vmlist: [node, type, version] by vmid; `ids` is absent when there are no guests."""
    entries = as_dict(parse_object(text, "/etc/pve/.vmlist").get("ids"))
    guests = {vmid: [dig(entry, name) for name in ("node", "type", "version")] for vmid, entry in entries.items()}
    return {vmid: guest for vmid, guest in guests.items() if is_whole(vmid) and guest[1] in ("qemu", "lxc")}


def parse_ha_states(text: str) -> dict[str, str]:
    """ha/manager_status: the state of each service."""
    services = as_dict(parse_object(text, "ha/manager_status").get("service_status"))
    return {sid: state for sid, service in services.items() if isinstance(state := dig(service, "state"), str)}


def parse_guest_config(text: str) -> Fields:
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
    unused = [volume for key, value in values.items() if (volume := parse_volume(key, value, ("unused",)))]
    return known(
        name=values.get("name") or values.get("hostname"), lock=values.get("lock"),
        template=to_flag(values.get("template", "0")), tags=split_list(values.get("tags")),
        onboot=to_flag(values.get("onboot", "0")), created_at=to_count(meta.get("ctime")), volumes=volumes,
        unused=unused or None, settings={key: zlib.crc32(value.encode()) for key, value in values.items()},
    )


def parse_volume(key: str, value: str, kinds: tuple[str, ...] = DISK_KEYS) -> Fields | None:
    """`scsi0: local-zfs:vm-100-disk-0,size=32G` as name, storage, volume, size, and whether a backup takes it along;
    None for CD drives and host paths. Mount points of containers are left out of it unless they say backup=1."""
    kind = key.rstrip("0123456789")
    options = dict(part.partition("=")[::2] for part in value.split(",") if "=" in part)
    place = next((part for part in value.split(",") if "=" not in part), "")
    place = options.get("file", options.get("volume", place))
    if kind not in kinds or (kind == key and key != "rootfs") or options.get("media") == "cdrom":
        return None
    storage, separator, volume = place.partition(":")
    if not separator or place.startswith("/"):
        return None
    size = to_size(options["size"]) if "size" in options else None
    backup = kind != "unused" and (key == "rootfs" or to_flag(options.get("backup", "0" if kind == "mp" else "1")))
    return known(name=key, storage=storage, volume=volume, size_bytes=size, backup=backup)


class CorosyncVotes(NamedTuple):
    """What corosync.conf says of votes."""

    nodes: dict[str, int]
    expected: int
    needed: int | None  # None where corosync alone knows: with a quorum device, or when it counts anew as nodes leave


def parse_corosync_votes(text: str) -> CorosyncVotes:
    """corosync.conf. `expected_votes` by hand goes before the nodes' sum, and with `two_node` one vote is enough
    [corosync man/votequorum.5]."""
    nodes: dict[str, int] = {}
    settings: dict[str, str] = {}
    path: list[str] = []
    values: dict[str, str] = {}
    for line in map(str.strip, text.splitlines()):
        key, separator, value = line.partition(":")
        if line.endswith("{"):
            path.append(line[:-1].strip())
            values = settings if path == ["quorum"] else {}
        elif line == "}":
            if path[-2:] == ["nodelist", "node"] and values.get("name"):
                nodes[values["name"]] = to_count(values.get("quorum_votes", "1")) or 0
            if path[-2:] == ["quorum", "device"]:
                settings["device"] = "1"
            path = path[:-1]
            values = settings if path == ["quorum"] else {}
        elif separator and not line.startswith("#"):
            values[key.strip()] = value.strip()
    expected = to_count(settings.get("expected_votes")) or sum(nodes.values())
    moving = any(to_flag(settings.get(name)) for name in ("device", "last_man_standing", "allow_downscale"))
    one_is_enough = to_flag(settings.get("two_node")) and expected == 2
    return CorosyncVotes(nodes, expected, None if moving else 1 if one_is_enough else expected // 2 + 1)


def parse_quorumtool(text: str) -> dict[str, int]:
    """`corosync-quorumtool -s`: expected, present and needed votes. Its exit code says nothing."""
    names = {"Expected votes": "votes_expected", "Total votes": "votes_present", "Quorum": "votes_needed"}
    found = re.findall(r"^\s*([A-Z][a-z ]+):\s+(\d{1,9})\b", text, re.MULTILINE)
    return {names[name]: int(votes) for name, votes in found if name in names}


def parse_pve_version(text: str) -> str | None:
    """pvecfg.pm: the version as string constant (what `pveversion` prints, without Perl)."""
    return find_text(r"""sub version [^}]{0,80}?['"]([^'"]+)""", text) or None


# ZFS

VDEV_STATE_NAMES = {"CANT_OPEN": "UNAVAIL"}  # the text form, and everybody, says so
VDEV_STATES = "ONLINE DEGRADED FAULTED OFFLINE REMOVED UNAVAIL CLOSED UNKNOWN SPLIT AVAIL INUSE".split()
SCAN_STATES = {"SCANNING": "scanning", "FINISHED": "finished", "CANCELED": "canceled", "NONE": "none"}
NO_SCAN = {"function": "none", "state": "none"}
STATUS_KEYS = "pool state status action see scan scrub remove checkpoint expand config errors dedup".split()
VDEV_ROW = re.compile(rf"(?:\t| {{8}})( *)(\S.*?) +({'|'.join(VDEV_STATES)})(?: (.*)|)$")
VDEV_COUNTERS = {"READ": "read_errors", "WRITE": "write_errors", "CKSUM": "checksum_errors", "SLOW": "slow_ios"}
SCAN_DATE = r"(\w{3} \w{3} \d{1,2} [\d:]{8}(?: \w+)? \d{4})"
VDEV_CLASSES = {"dedup": "dedup", "special": "special", "logs": "log", "cache": "cache", "spares": "spare"}
JSON_CLASSES = {"dedup": "dedup", "special": "special", "logs": "log", "l2cache": "cache", "spares": "spare"}
# What `zpool status` says for vdev_aux [openzfs cmd/zpool/zpool_main.c, print_status_config].
VDEV_REASONS = {
    "OPEN_FAILED": "cannot open", "BAD_GUID_SUM": "missing device", "NO_REPLICAS": "insufficient replicas",
    "VERSION_NEWER": "newer version", "UNSUP_FEAT": "unsupported features",
    "ASHIFT_TOO_BIG": "unsupported minimum blocksize", "SPARED": "currently in use", "ERR_EXCEEDED": "too many errors",
    "IO_FAILURE": "experienced I/O failures", "BAD_LOG": "bad intent log", "EXTERNAL": "external device fault",
    "SPLIT_POOL": "split into new pool", "ACTIVE": "currently in use", "CHILDREN_OFFLINE": "all children offline",
    "BAD_LABEL": "invalid label",
}
VDEV_NOTES = ("resilvering", "awaiting resilver", "removing")  # what `zpool status` adds in brackets, and matters here
GROUP_TYPES = ("mirror", "raidz", "draid", "replacing", "spare", "root", "missing", "hole", "indirect")
WORST_LAST = "ONLINE AVAIL INUSE DEGRADED OFFLINE CLOSED UNKNOWN REMOVED UNAVAIL FAULTED".split()
FAST_ENOUGH = 10 * 1024 * 1024  # bytes/s; zpool estimates no end below it


def parse_zpool_status_json(text: str, now: float) -> dict[str, Fields]:
    """`zpool status -j --json-int -P`: the same as parse_zpool_status gives, by pool name."""
    pools = parse_object(text, "zpool status -j").get("pools")
    if not isinstance(pools, dict):
        raise SourceError("garbage", "zpool status -j: no `pools` in the answer")
    return {name: parse_json_pool(name, pool, now) for name, pool in pools.items() if isinstance(pool, dict)}


def parse_json_pool(name: str, pool: Fields, now: float) -> Fields:
    stats = as_dict(pool.get("scan_stats"))
    resilvering = stats.get("function") == "RESILVER" and stats.get("state") == "SCANNING"
    rebuilds = as_dict(stats.get("rebuild_stats") or pool.get("rebuild_stats"))
    expand = as_dict(pool.get("raidz_expand_stats"))
    state = SCAN_STATES.get(str(expand.get("state")), "none")
    fields = scan_fields(expand, state, to_count(expand.get("reflowed")), to_count(expand.get("to_reflow")))
    rebuilding = {vdev for vdev, rebuild in rebuilds.items() if as_dict(rebuild).get("state") == "ACTIVE"}
    roots = as_dict(pool.get("vdevs"))
    root = as_dict(roots.get(name) or next(iter(roots.values()), None))
    vdevs = []
    for key, label in {"vdevs": "normal", **JSON_CLASSES}.items():
        tops = root.get("vdevs") if key == "vdevs" else pool.get(key)
        for vdev_name, vdev in as_dict(tops).items():
            vdevs.append(parse_json_vdev(vdev_name, as_dict(vdev), label, resilvering=resilvering))
            if vdev_name in rebuilding and not note_rebuild(vdevs[-1]):
                vdevs[-1].setdefault("reason", "resilvering")
    files = [file for file in as_list(pool.get("errlist")) if isinstance(file, str)]
    return known(
        name=name, guid=to_guid(pool.get("pool_guid")), state=to_word(pool.get("state")),
        status_text=squeeze(pool.get("status")), action_text=squeeze(pool.get("action")),
        data_errors=to_count(pool.get("error_count")), damaged_files=files or None,
        scan=parse_json_scan(stats, rebuilds, now), expansion=None if state == "none" else known(**fields), vdevs=vdevs,
    )


def to_guid(value: Any) -> str | None:
    """Guids go beyond 2^53: they are text everywhere."""
    text = str(value).strip() if isinstance(value, (int, str)) else ""
    return text if is_whole(text) else None


def squeeze(text: Any) -> str | None:
    """A message on one line."""
    return " ".join(text.split()) or None if isinstance(text, str) else None


def parse_json_vdev(name: str, vdev: Fields, label: str, *, resilvering: bool) -> Fields:
    children = [
        parse_json_vdev(child_name, as_dict(child), label, resilvering=resilvering)
        for child_name, child in as_dict(vdev.get("vdevs")).items()
    ]
    path, aux = vdev.get("was") or vdev.get("path"), vdev.get("aux")
    state = vdev.get("state") or worst_state(children)
    flags = [note for note in VDEV_NOTES if vdev.get(note)]
    if vdev.get("resilver_deferred"):
        flags.append("awaiting resilver")
    if resilvering and not children and vdev.get("scan_processed"):
        flags.insert(0, "resilvering")
    if vdev.get("not_present"):
        flags.insert(0, "missing device")
    elif isinstance(aux, str) and aux not in ("", "NONE"):
        flags.insert(0, VDEV_REASONS.get(aux, "corrupted data"))
    return build_vdev(
        name=str(vdev.get("name") or name), kind=str(vdev.get("vdev_type") or ""), label=label,
        state=VDEV_STATE_NAMES.get(state, state) if isinstance(state, str) else "UNKNOWN",
        path=path if isinstance(path, str) and not children else None, counters=vdev,
        reason=flags[0] if flags else None, children=children,
    )


def note_rebuild(vdev: Fields) -> bool:
    """Of a sequential rebuild JSON says in which top-level vdev it runs, not which disk it fills: the last one of a
    group that replaces another; False where there is no such group."""
    children = vdev.get("children", [])
    if vdev["type"] in ("replacing", "spare") and children:
        children[-1].setdefault("reason", "resilvering")
        return True
    noted = [note_rebuild(child) for child in children]
    return any(noted)


def worst_state(children: list[Fields]) -> str:
    """For draid vdevs, whose JSON may lack a state (openzfs issue 18431): DEGRADED as soon as a child is not well."""
    states = [child["state"] for child in children]
    if not states:
        return "UNKNOWN"
    worst = max(states, key=lambda state: WORST_LAST.index(state) if state in WORST_LAST else 6)
    return worst if len(set(states)) == 1 or worst == "ONLINE" else "DEGRADED"


def build_vdev(
    *, name: str, kind: str, label: str, state: str, path: str | None, counters: Fields, reason: str | None,
    children: list[Fields],
) -> Fields:
    """One vdev as the report has it. Raid levels are part of the name only (`raidz2-0`): the type gets them."""
    group = name.split("-")[0].split(":")[0]
    if kind in ("", "raidz", "draid") and group.startswith(("raidz", "draid")) and (children or kind != ""):
        kind = group
    elif not kind:
        kind = guess_vdev_type(name, path, children)
    return known(
        **{"class": label}, name=short_vdev_name(name), guid=to_guid(counters.get("guid")), type=kind,
        state=state, path=path if kind in ("disk", "file") else None, read_errors=to_count(counters.get("read_errors")),
        write_errors=to_count(counters.get("write_errors")), checksum_errors=to_count(counters.get("checksum_errors")),
        slow_ios=None if children else to_count(counters.get("slow_ios")), reason=reason, children=children or None,
    )


def guess_vdev_type(name: str, path: str | None, children: list[Fields]) -> str:
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


def short_vdev_name(name: str) -> str:
    """As `zpool status` without -P prints it: no directory, and no partition that ZFS made for a whole disk."""
    short = name.rpartition("/")[2] if name.startswith("/dev/") else name
    whole = re.fullmatch(r"(.+)-part1|(.*\d)p1|((?:s|v|xv)d[a-z]+)1", short) if name.startswith("/dev/") else None
    return next(filter(None, whole.groups())) if whole else short


def parse_json_scan(stats: Fields, rebuilds: Fields, now: float) -> Fields:
    """The scan under way or the last one. Sequential rebuilds are kept beside it: an active or later one counts."""
    scan = dict(NO_SCAN)
    if stats.get("function") in ("SCRUB", "RESILVER") and str(stats.get("state")) in SCAN_STATES:
        scan = parse_scan_stats(stats, now)
    for rebuild in rebuilds.values():
        scan = later_scan(scan, parse_rebuild(as_dict(rebuild)))
    return scan


def later_scan(scan: Fields, other: Fields) -> Fields:
    """Which of two scans to show: what still runs, else what ended last."""
    if scan["state"] == "none" or "scanning" in (scan["state"], other["state"]):
        return other if other["state"] == "scanning" or scan["state"] == "none" else scan
    return other if other.get("ended_at", 0) > scan.get("ended_at", 0) else scan


def scan_fields(stats: Fields, state: str, done: int | None, total: int | None) -> Fields:
    """State, times and progress, which scrub, resilver, rebuild and expansion tell alike."""
    running = state == "scanning"
    ratio = round(min(1.0, done / total), 4) if running and done is not None and total else None
    ended = None if running else to_count(stats.get("end_time")) or None
    started = to_count(stats.get("start_time")) or None
    return {"state": state, "started_at": started, "ended_at": ended, "progress_ratio": ratio}


def parse_scan_stats(stats: Fields, now: float) -> Fields:
    state = SCAN_STATES[stats["state"]]
    issued, examine = to_count(stats.get("issued")), to_count(stats.get("to_examine"))
    total = None if examine is None else examine - (to_count(stats.get("skipped")) or 0)
    fields = scan_fields(stats, state, issued, total)
    if state == "canceled":
        fields["started_at"] = None  # as the text form
    elif state == "scanning" and to_count(stats.get("scrub_pause")):
        fields["state"] = "paused"
    elif state == "scanning":
        fields["remaining_seconds"] = remaining_seconds(stats, issued, total, now)
    return known(
        function=stats["function"].lower(), **fields,
        repaired_bytes=to_count(stats.get("processed")) if state != "canceled" else None,
        errors=to_count(stats.get("errors")) if state == "finished" else None,
    )


def remaining_seconds(stats: Fields, issued: int | None, total: int | None, now: float) -> int | None:
    """As zpool estimates it: bytes left over the speed of this pass; unknown while that is below 10 MiB/s."""
    done, began = to_count(stats.get("issued_bytes_per_scan")), to_count(stats.get("pass_start"))
    if not done or not began or issued is None or total is None:
        return None
    elapsed = max(1, now - began - (to_count(stats.get("scrub_spent_paused")) or 0))
    speed = done / elapsed
    return int(max(0, total - issued) / speed) if speed >= FAST_ENOUGH else None


def parse_rebuild(rebuild: Fields) -> Fields:
    """A sequential rebuild (`zpool attach -s`, and always draid) told like a resilver."""
    state = {"ACTIVE": "scanning", "COMPLETE": "finished", "CANCELED": "canceled"}.get(str(rebuild.get("state")))
    if state is None:
        return dict(NO_SCAN)
    issued = to_count(rebuild.get("bytes_issued", rebuild.get("issued")))
    total = to_count(rebuild.get("bytes_est", rebuild.get("to_scan")))
    return known(
        function="resilver", **scan_fields(rebuild, state, issued, total),
        repaired_bytes=to_count(rebuild.get("bytes_rebuilt", rebuild.get("rebuilt"))),
        errors=to_count(rebuild.get("errors")) if state == "finished" else None,
    )


def parse_zpool_status(text: str) -> dict[str, Fields]:
    """`zpool status -p -P -s` as text (OpenZFS 2.2 and older have no JSON: every PVE 8 host), by pool name."""
    pools: dict[str, Fields] = {}
    for block in split_status_blocks(text):
        name = block["pool"][0]
        if name:
            pools[name] = parse_text_pool(name, block)
    if not pools and text.strip():
        raise SourceError("garbage", f"zpool status: no pool in the answer, which begins with {text[:60]!r}")
    return pools


def split_status_blocks(text: str) -> list[dict[str, list[str]]]:
    """Blocks of `key: value` with continuation lines (by tab, or by blanks below errors); `scan` may come twice."""
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


def parse_text_pool(name: str, block: dict[str, list[str]]) -> Fields:
    texts = {key: squeeze(" ".join(lines)) for key, lines in block.items()}
    errors, *files = block.get("errors", [""])
    count = 0 if errors.startswith("No known data errors") else to_count(find_text(r"^(\d+) data errors,", errors))
    return known(
        name=name, state=" ".join(block.get("state", [])) or None, status_text=texts.get("status"),
        action_text=texts.get("action"), data_errors=count,
        damaged_files=[file.strip() for file in files if file.strip()] or None,
        scan=parse_text_scan(block.get("scan", [])), expansion=parse_text_expansion(texts.get("expand") or ""),
        vdevs=parse_text_vdevs(block.get("config", [])),
    )


def parse_text_vdevs(lines: list[str]) -> list[Fields]:
    """The `config:` table: depth is two blanks a level, sections of other classes start at depth 0 without a state."""
    head = next((number for number, line in enumerate(lines) if line.split()[:2] == ["NAME", "STATE"]), len(lines) - 1)
    counters = [VDEV_COUNTERS.get(word, word) for word in lines[head].split()[2:]] if lines else []
    rows = []
    label = "normal"
    for line in lines[head + 1 :]:
        found = VDEV_ROW.match(line)
        if found is None:
            label = VDEV_CLASSES.get(line.strip(), label)
            continue
        words = (found[4] or "").split()
        values: dict[str, int | None] = {}
        while words and len(values) < len(counters) and (words[0] == "-" or to_size(words[0]) is not None):
            values[counters[len(values)]] = to_size(words.pop(0))  # 2.2 prints - for slow I/Os of groups
        row = {"name": found[2], "depth": len(found[1]) // 2, "state": found[3], "counters": values}
        rows.append({**row, "notes": " ".join(words), "label": label})
    return nest_vdev_rows(rows[1:])  # the first row is the pool itself


def nest_vdev_rows(rows: list[Fields]) -> list[Fields]:
    """The rows of the table as a tree of vdevs."""
    vdevs = []
    while rows:
        row = rows[0]
        size = next((at for at, other in enumerate(rows[1:], 1) if other["depth"] <= row["depth"]), len(rows))
        children = nest_vdev_rows(rows[1:size])
        vdevs.append(build_text_vdev(row, children))
        rows = rows[size:]
    return vdevs


def build_text_vdev(row: Fields, children: list[Fields]) -> Fields:
    name, notes = row["name"], row["notes"]
    path = name if name.startswith("/") else None
    words, _, brackets = notes.partition("(")
    reason = re.sub(r"^(in use by pool|was|block size:).*", r"\1", words.strip())
    if reason == "was":
        path, reason = words.strip()[4:].strip(), "missing device"
    reason = {"block size:": "", "in use by pool": "currently in use"}.get(reason, reason)
    reason = reason or next((note for note in VDEV_NOTES if f"{note})" in brackets), "")
    if name.startswith("draid") and not children:
        path = name  # as JSON has it for distributed spares
    return build_vdev(
        name=name, kind="", label=row["label"], state=row["state"], path=path, counters=row["counters"],
        reason=reason or None, children=children,
    )


def parse_text_scan(lines: list[str]) -> Fields:
    """One or several scan texts (a scrub, and one for each rebuilt draid vdev), each with its continuation lines."""
    scan = dict(NO_SCAN)
    for text in re.split(r"\n(?!\t)", "\n".join(lines)):
        scan = later_scan(scan, parse_scan_text(" ".join(text.split())))
    return scan


def parse_scan_text(text: str) -> Fields:
    function = find_text(r"^(scrub|resilver)", text)
    done = re.fullmatch(r"\w+ (?:repaired )?(?:\(\S+\) )?(\S+) in (.+) with (\d+) errors on (.+)", text)
    if not function:
        return dict(NO_SCAN)
    if done and (ended := parse_ctime(done[4])):
        seconds = to_seconds(done[2])
        return known(
            function=function, state="finished", started_at=None if seconds is None else ended - seconds,
            ended_at=ended, repaired_bytes=to_size(done[1]), errors=to_count(done[3]),
        )
    if canceled := find_text(r" canceled on (.+)", text):
        return known(function=function, state="canceled", ended_at=parse_ctime(canceled))
    state = find_text(r"^\w+ (?:\(\S+\) )?(in progress|paused) since ", text)
    if not state:
        return dict(NO_SCAN)
    since = find_text(f" started on {SCAN_DATE}", text) or find_text(f" since {SCAN_DATE}", text)
    return known(
        function=function, state="paused" if state == "paused" else "scanning", started_at=parse_ctime(since),
        progress_ratio=to_ratio(find_text(r"([\d.]+)% done", text)),
        remaining_seconds=to_seconds(find_text(r", ([^,]+) to go", text)),
        repaired_bytes=to_size(find_text(r"(\S+) (?:repaired|resilvered),", text)),
    )


def parse_text_expansion(text: str) -> Fields | None:
    """`expansion of raidz1-0 in progress since …` with a line of figures, or `expanded raidz1-0 … on …`."""
    if " in progress since " in text:
        started, progress = parse_ctime(find_text(f" since {SCAN_DATE}", text)), find_text(r"([\d.]+)% done", text)
        return known(state="scanning", started_at=started, progress_ratio=to_ratio(progress))
    if text.startswith("expanded "):
        ended, seconds = parse_ctime(find_text(f" on {SCAN_DATE}", text)), to_seconds(find_text(r" in ([^,]+),", text))
        started = None if ended is None or seconds is None else ended - seconds
        return known(state="finished", started_at=started, ended_at=ended)
    return None


def parse_columns(text: str, columns: list[str]) -> list[dict[str, str | None]]:
    """`-Hp` output: tab-separated (names may hold blanks), `-` and an empty cell stand for none."""
    rows = []
    for line in text.split("\n"):  # names hold no line feed, but may hold what splitlines() takes for one
        cells = line.split("\t")
        if len(cells) >= len(columns):
            rows.append({name: None if cell in ("-", "") else cell for name, cell in zip(columns, cells)})
    if not rows and text.strip():
        raise SourceError("garbage", f"{len(columns)} columns were expected, the answer begins with {text[:60]!r}")
    return rows


def pool_layout(vdevs: list[Fields]) -> str:
    """`mirror ×2`, `raidz2`, `draid2`, `stripe`; mixed ones joined by ` + `."""
    counts: dict[str, int] = {}
    for vdev in vdevs:
        kind = vdev["type"]
        if vdev["class"] == "normal" and kind not in ("hole", "indirect"):
            kind = kind if kind.startswith(("mirror", "raidz", "draid")) else "stripe"
            counts[kind] = counts.get(kind, 0) + 1
    return " + ".join(f"{kind} ×{n}" if n > 1 and kind != "stripe" else kind for kind, n in counts.items())


def redundancy_margin(vdevs: list[Fields]) -> int | None:
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


def failures_to_lose(vdev: Fields, *, trust_resilvering: bool) -> int:
    """How many disks have to fail until this vdev has lost data; 0: it has."""
    children = vdev.get("children", [])
    if not children:
        if vdev["state"] not in ("ONLINE", "DEGRADED"):
            return 0
        return 1 if trust_resilvering or vdev.get("reason") not in ("resilvering", "awaiting resilver") else 0
    kind = vdev["type"]
    if kind == "replacing" and not trust_resilvering:
        children = children[:-1]  # the new disk comes last, and is not complete as long as this vdev is there
    each = sorted(failures_to_lose(child, trust_resilvering=trust_resilvering) for child in children)
    if kind.startswith(("raidz", "draid")):
        each = each[: (to_count(kind[5:6]) or 1) + 1]  # the cheapest parity + 1 children
    filling = not trust_resilvering and vdev.get("reason") == "resilvering"  # one of its disks, nobody says which
    return max(0, sum(each) - filling)  # mirror, replacing, spare: all sides hold the same


# tasks and backups

VZDUMP_LINE = re.compile(r"(?:\S+ [\d:]{8} |[A-Z][a-z]{2} +\d+ [\d:]{8} )?(?:INFO|ERROR): (.*)")
ARCHIVE_NAME = (
    r"vzdump-(?:qemu|lxc|openvz)-(\d{1,9})-(\d{4}_\d\d_\d\d)-(\d\d_\d\d_\d\d)"
    r"\.(?:tgz|(?:vma|tar)(?:\.(?:gz|lzo|zst|bz2))?)"
)
UNKNOWN_END = "unexpected status"  # the only one that Proxmox itself does not judge [pve-common PVE/UPID.pm]
CONSOLES = ("vncproxy", "vncshell", "spiceproxy", "spiceshell", "termproxy")  # being cut off is how they end


def parse_upid(upid: str) -> Fields | None:
    """`UPID:node:pid:pstart:start:type:id:user:`, pid, pstart and start in hex."""
    parts = upid.split(":")
    if len(parts) < 9 or parts[0] != "UPID":
        return None
    started = from_hex(parts[4])
    if started is None:
        return None
    vmid = int(parts[6]) if is_whole(parts[6]) and 100 <= int(parts[6]) <= 999_999_999 else None
    return known(upid=upid, type=parts[5], vmid=vmid, user=":".join(parts[7:-1]) or None, started_at=started)


def from_hex(text: str) -> int | None:
    try:
        return int(text, 16) if 1 <= len(text) <= 12 else None
    except ValueError:
        return None


def parse_task_line(line: str) -> Fields | None:
    """A line of tasks/index: `UPID endhex status`; None when it is torn or something else."""
    upid, _, rest = line.partition(" ")
    end, _, status = rest.partition(" ")
    task, ended = parse_upid(upid), from_hex(end)
    if task is None or ended is None:
        return None
    status = status.strip()
    return {**task, "ended_at": ended, "status": status, "result": task_result(status, task["type"])}


def task_result(status: str, kind: str) -> str:
    """As Proxmox classes it: all but OK, warnings and an unexpected status is an error."""
    if status == "OK":
        return "ok"
    if status.startswith("WARNINGS: "):
        return "warning"
    return "unknown" if status in ("", UNKNOWN_END) or kind in CONSOLES else "error"


def parse_vzdump_log(text: str) -> tuple[str | None, list[Fields]]:
    """The storage and the runs of a vzdump log, of a job of one guest or of several.

    Only these lines keep their wording between versions. The mark is the first word, or in /var/log/vzdump the first
    one behind the date. `finished` is the host's local time as text; `ok` stays None for a run without an end.
    """
    storage = None
    runs: list[Fields] = []
    for found in filter(None, map(VZDUMP_LINE.match, text.splitlines())):
        message, words = found[1], found[1].split()
        if message.startswith("starting new backup job:") and "--storage" in words[:-1]:
            storage = words[words.index("--storage") + 1]
        elif message.startswith("Starting Backup of VM ") and words[4:5] and is_whole(words[4]):
            runs.append({"vmid": int(words[4]), "ok": None})
        elif failed := re.match(r"Backup of VM (\d{1,9}) failed - (.*)", message):
            if not runs or runs[-1]["vmid"] != int(failed[1]):
                runs.append({"vmid": int(failed[1])})  # a guest that is no longer there is not begun
            runs[-1].update(ok=False, error=failed[2][:500])
        elif runs:
            parse_vzdump_line(runs[-1], message, words)
    return storage, runs


def parse_vzdump_line(run: Fields, message: str, words: list[str]) -> None:
    if message.startswith(f"Finished Backup of VM {run['vmid']} "):
        run.update(known(ok=True, duration_seconds=to_seconds(message.rpartition("(")[2].rstrip(")"))))
    elif message.startswith(("Backup finished at ", "Failed at ")):
        run["finished"] = message.partition(" at ")[2]
    elif message.startswith("archive file size: "):
        run["size_bytes"] = to_size(words[-1])
    elif message.startswith("exclude disk '"):
        run.setdefault("excluded_disks", []).append(message.split("'")[1])
    elif message.startswith("excluding ") and " mount point " in message:
        run.setdefault("excluded_disks", []).append(message.partition(" mount point ")[2].split()[0])


def parse_archive_name(name: str) -> tuple[int, int] | None:
    """vmid and start of a finished backup: vzdump-qemu-100-2026_11_23-02_00_01.vma.zst, in the host's time zone; None
    for others (.notes, .log, .dat). The file's own time is that of its last copy."""
    found = re.fullmatch(ARCHIVE_NAME, name)
    began = parse_local_time(f"{found[2].replace('_', '-')} {found[3].replace('_', ':')}") if found else None
    return None if found is None or began is None else (int(found[1]), began)


def parse_vmids(text: str | None) -> list[int]:
    """A list of vmids."""
    return sorted(int(word) for word in split_list(text) if is_whole(word))


WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
EVENT_NAMES = {
    "minutely": "*:*", "hourly": "*:0", "daily": "0:0", "weekly": "mon 0:0", "monthly": "*-1 0:0", "yearly": "1-1 0:0",
    "annually": "1-1 0:0", "quarterly": "1,4,7,10-1 0:0", "semiannually": "1,7-1 0:0", "semi-annually": "1,7-1 0:0",
}
EVENT_DAYS = r"([a-z]++(?:\.\.[a-z]++)?+(?:,[a-z]++(?:\.\.[a-z]++)?+)*+)"
EVENT_VALUES = r"(\*(?:/\d++)?+|\d++(?:\.\.\d++)?+(?:/\d++)?+(?:,\d++(?:\.\.\d++)?+(?:/\d++)?+)*+)"
EVENT = re.compile(
    rf"(?:{EVENT_DAYS} *)?(?:(?:{EVENT_VALUES}-)?{EVENT_VALUES}-{EVENT_VALUES} *)?"
    rf"(?:(?:{EVENT_VALUES}:)?{EVENT_VALUES}(?::{EVENT_VALUES})?)?"
)
EVENT_LIMITS = ((0, 2199), (1, 12), (1, 31), (0, 23), (0, 59), (0, 59))  # what `*` begins with, the highest value
EVENT_STEPS = 1000  # proxmox-time gives up after as many
OPEN_END = 10_000
DUE_SPANS = (120, 7200, 2 * DAY, 15 * DAY, 70 * DAY, 800 * DAY, 6000 * DAY)  # how far back due times are looked for
DUE_TIMES = 8  # so many of the last ones are told


class CalendarEvent(NamedTuple):
    """When something is due, as proxmox-time understands it [proxmox-rs proxmox-time/src/calendar_event.rs]."""

    utc: bool
    weekdays: frozenset[int]
    fields: list[list[range]]  # of year, month, day, hour, minute, second; [] is any


@functools.lru_cache(64)
def parse_calendar_event(text: str) -> CalendarEvent | None:
    """`[WEEKDAYS] [[YEARS-]MONTHS-DAYS] [[HOURS:]MINUTES[:SECONDS]] [UTC]`; None where Proxmox refuses it."""
    body = text.strip().removesuffix("UTC").rstrip(" ")
    found = EVENT.fullmatch(EVENT_NAMES.get(body, body.lower()))
    if not body or found is None:
        return None
    weekdays, year, month, day, hour, minute, second = found.groups()
    clock = ("0", "0", "0") if minute is None else (hour or "*", minute, second or "0")
    try:
        values = [year or "*", month or "*", day or "*", *clock]
        fields = [parse_event_values(field, *limits) for field, limits in zip(values, EVENT_LIMITS)]
        return CalendarEvent(text.strip().endswith("UTC"), parse_weekdays(weekdays), fields)
    except ValueError:
        return None


def parse_weekdays(text: str | None) -> frozenset[int]:
    """`mon..wed,sunday` as days from 0 (Monday); all of them where none is named."""
    numbers = {name: number for number, day in enumerate(WEEKDAYS) for name in (day, day[:3])}
    days: set[int] = set()
    for part in (text or "mon..sun").split(","):
        first, _, last = part.partition("..")
        if first not in numbers or (last or first) not in numbers:
            raise ValueError(part)
        length = (numbers[last or first] - numbers[first]) % 7
        days.update((numbers[first] + ahead) % 7 for ahead in range(length + 1))
    return frozenset(days)


def parse_event_values(text: str, lowest: int, highest: int) -> list[range]:
    """`1,5..10,12/2` or `*/15`. A repetition has no end of its own: from :56 of `*/28` the next one is the 84th minute,
    which is :24 of the next hour and no hit; so it is due at :28 then, and never at :00."""
    spans = []
    for part in [] if text == "*" else text.split(","):
        values, slash, repeat = part.partition("/")
        first, dots, last = values.partition("..")
        start, step = lowest if first == "*" else int(first), int(repeat or 1)
        end = int(last) if dots else OPEN_END if slash else start
        if start > min(end, highest) or (dots and end > highest) or step > highest or (first == "*" and not step):
            raise ValueError(text)
        spans.append(range(start, end + 1, step) if step else range(start, start + 1))
    return spans


def next_event(text: str, after: float) -> int | None:
    """When it is due next, in the host's time zone; None when never, or not understood.

    Each step is made on the wall clock and then settled in the zone, as Proxmox does: a time that is skipped lies after
    the gap (2:30 of the night without one becomes 3:30, which is no hit, so there is no run in that night), of one that
    comes twice the first counts, unless that is over [proxmox-time/src/tm_editor.rs].
    """
    event = parse_calendar_event(text)
    at = datetime.fromtimestamp(int(after) + 1, UTC if event and event.utc else None)
    for _ in range(EVENT_STEPS if event else 0):
        wall = next_step(event, at)
        if wall is None:
            return None
        if wall == at:
            return int(at.timestamp())
        told = wall if wall.timestamp() >= at.timestamp() else wall.replace(fold=1)
        at = datetime.fromtimestamp(told.timestamp(), wall.tzinfo)
    return None


def next_step(event: Any, at: datetime) -> datetime | None:
    """One step towards a hit: the first field that does not fit is moved on and all below it start anew; `at` itself
    when everything fits, None when no year does."""
    fields = [at.year, at.month, at.day, at.hour, at.minute, at.second]
    for place, (spans, value) in enumerate(zip(event.fields, fields)):
        if place == 3 and at.weekday() not in event.weekdays:
            return replace_wall(at, fields, 2, at.day + 1)
        if spans and not any(value in span for span in spans):
            later = [span.start + max(0, -((span.start - value) // span.step)) * span.step for span in spans]
            following = [number for number, span in zip(later, spans) if number in span]
            if following:
                return replace_wall(at, fields, place, min(following))
            return replace_wall(at, fields, place - 1, fields[place - 1] + 1) if place else None
    return at


def replace_wall(at: datetime, fields: list[int], place: int, value: int) -> datetime | None:
    """The wall clock with one field set (it may run over: the 32nd, hour 27) and those below it at their beginning."""
    year, month, *rest = fields[:place] + [value] + [0, 1, 1, 0, 0, 0][place + 1 :]
    year, month = year + (month - 1) // 12, (month - 1) % 12 + 1
    if year > 2199:
        return None
    midnight = datetime(year, month, 1, tzinfo=at.tzinfo)
    return midnight + timedelta(days=rest[0] - 1, hours=rest[1], minutes=rest[2], seconds=rest[3])


def due_fields(text: str, now: float) -> Fields:
    """What the report says of a schedule: when it is due next, and when it was due last."""
    return known(next_run_at=next_event(text, now), due_times=list_due_times(text, now) or None)


def list_due_times(text: str, now: float) -> list[int]:
    """The last times up to now at which it was due, oldest first; fewer than DUE_TIMES when it is that seldom."""
    found: list[int] = []
    for span in DUE_SPANS if parse_calendar_event(text) else ():
        found, at = [], next_event(text, now - span - 1)
        while at is not None and at <= now:
            found.append(at)
            at = next_event(text, at)
        if len(found) >= DUE_TIMES or at is None:
            break
    return found[-DUE_TIMES:]


def parse_local_time(text: str) -> int | None:
    """`2026-11-23 02:00:17` in the host's time zone."""
    date, _, clock = text.strip().partition(" ")
    return to_unix(date, clock, zone="") if clock else None


# datasets and snapshots

DATASET_COLUMNS = (
    "name type used avail refer usedbysnapshots usedbydataset refreservation quota refquota volsize compressratio "
    "origin mounted encryption keystatus canmount mountpoint"
).split()
DATASET_SIZES = {
    "used": "used_bytes", "avail": "available_bytes", "refer": "referenced_bytes",
    "usedbysnapshots": "used_by_snapshots_bytes", "usedbydataset": "used_by_dataset_bytes",
    "refreservation": "refreservation_bytes", "quota": "quota_bytes", "refquota": "refquota_bytes",
    "volsize": "volume_bytes",
}
SNAPSHOT_TOOLS = (  # names by tool, and the class that its series get
    (r"autosnap_.*_([^_]+)", r"autosnap_\1"),  # sanoid
    (r"(zfs-auto-snap_[^-]+)-2.*", r"\1"),
    (r"(__replicate_.*)_\d+__", r"\1"),  # Proxmox's replication
    (r"(zrepl|syncoid)_.*", r"\1"),
    (r"pyznap_.*_([^_]+)", r"pyznap_\1"),
    (r"(auto[a-z][a-z0-9_-]*?)\d{12}", r"\1"),  # cv4pve-autosnap: auto, its label, yyMMddHHmmss
    (r"(.+)-2\d{13}", r"\1"),  # zfs_autobackup
    (r"2\d{3}-\d\d-\d\d-\d{6}Z?", "znapzend"),
    (r"2\d{3}-\d\d-\d\d_\d\d\.\d\d\.\d\d--(\w+)", r"zfsnap_\1"),
    (r"(.*?)[-_]?2\d{3}-\d\d-\d\d([-_T ]\d\d[-:.]\d\d([-:.]\d\d)?)?([-_]\d+[a-z])?", r"\1"),  # TrueNAS and others
    # zrepl under another prefix (daily_20261123_100000_000), FreeNAS (auto-20261123.1000-2w), Samba (GMT-2026.11.23-…)
    (r"(.*?)[-_]?2\d{3}[01]\d[0-3]\d[-_.T]?\d{4}(\d\d)?Z?([-_.]\d+[a-z]?)?", r"\1"),
    (r"GMT-2\d{3}\.\d\d\.\d\d-\d\d\.\d\d\.\d\d", "GMT"),
)


def parse_datasets(text: str) -> list[Fields]:
    """`zfs list -Hp -t filesystem,volume -o …`; the type is zfs's word, not guessed from the name."""
    datasets = []
    for row in parse_columns(text, DATASET_COLUMNS):
        sizes = {field: to_count(row[column]) for column, field in DATASET_SIZES.items()}
        words = {field: row[field] for field in ("name", "type", "origin", "encryption", "canmount", "mountpoint")}
        quotas = {field: sizes[field] or None for field in ("quota_bytes", "refquota_bytes")}  # 0 is no quota
        flags = {
            "mounted": None if row["mounted"] is None else row["mounted"] == "yes",
            "key_available": None if row["keystatus"] is None else row["keystatus"] == "available",
        }
        ratio = to_number((row["compressratio"] or "").rstrip("x"))
        vmid = dataset_vmid(row["name"] or "")
        datasets.append(known(**{**words, **sizes, **quotas, **flags}, compress_ratio=ratio, vmid=vmid))
    return datasets


def parse_tab_pairs(text: str) -> dict[str, str]:
    """`zfs get -H -o A,B`: two columns with a tab between; names hold blanks, but no tabs."""
    lines = [line.split("\t") for line in text.splitlines()]
    return {cells[0]: cells[1] for cells in lines if len(cells) == 2}


def dataset_vmid(name: str) -> int | None:
    """The guest a dataset belongs to by PVE's naming: vm-100-disk-0, base-…, subvol-…, vm-100-cloudinit."""
    return to_count(find_text(r"^(?:vm|base|subvol|basevol)-(\d{1,9})(?:-|$)", name.rpartition("/")[2]))


def snapshot_class(dataset: str, name: str) -> str:
    """Which tool and which of its series made a snapshot."""
    for pattern, series in SNAPSHOT_TOOLS:
        found = re.fullmatch(pattern, name)
        if found:
            return found.expand(series) or "dated"
    # PVE's own names begin with a letter and hold no blank; its own are __base__, __migration__ and vzdump
    plain = re.fullmatch(r"[A-Za-z][\w-]*", name) or name in ("__base__", "__migration__")
    return "pve" if plain and dataset_vmid(dataset) is not None else "other"


# services, time, upkeep


def parse_blocks(text: str) -> list[dict[str, str]]:
    """`systemctl show` of several units: blocks of key=value, separated by an empty line."""
    blocks: list[dict[str, str]] = [{}]
    for line in text.splitlines():
        key, separator, value = line.partition("=")
        if separator:
            blocks[-1][key] = value
        elif not line.strip() and blocks[-1]:
            blocks.append({})
    return [block for block in blocks if block]


def parse_chrony_tracking(text: str) -> Fields:
    """`chronyc -c -n tracking`: 13 or 14 fields by version, so counted from the end."""
    fields = text.strip().split(",")
    offset = to_number(fields[-10]) if len(fields) >= 13 else None
    if offset is None:
        raise SourceError("garbage", f"chronyc tracking: {text[:80]!r}")
    stratum = to_count(fields[-12])
    synchronised = fields[-1].strip() != "Not synchronised" and stratum != 0
    if not synchronised:  # the zeroes it prints then are no measurements
        return {"source": "chrony", "synchronised": False}
    return known(source="chrony", synchronised=True, offset_seconds=abs(offset), stratum=stratum)


def parse_certificate(text: str) -> Fields:
    """`openssl x509 -noout -dates -subject -issuer`."""
    values = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in text.splitlines())}
    dates = (values.get(key, "").removesuffix(" GMT") for key in ("notBefore", "notAfter"))
    starts, expires = (parse_ctime(f"? {date}") for date in dates)
    if expires is None:
        raise SourceError("garbage", f"openssl x509: no end date in {text[:80]!r}")
    return known(subject=values.get("subject"), issuer=values.get("issuer"), starts_at=starts, expires_at=expires)


def parse_security(text: str) -> int:
    """`apt-get -s dist-upgrade`: how many packages come from a security archive, whatever its mirror is called:
    `Inst libexpat1 [2.5.0-1] (2.5.0-1+deb12u2 Debian-Security:12/oldstable-security [amd64])`."""
    return len(re.findall(r"^Inst \S+ (?:\[.*?\] )?\(\S+ [^\[)]*[Ss]ecurity", text, re.MULTILINE))


def parse_queue_times(text: str) -> list[int]:
    """`head -v -c 256` of Postfix queue files: when each message arrived, from its time record (`T`, length, seconds).
    The file's own time is that of the next try [postfix src/global/rec_type.h, mail_queue.c]."""
    parts = re.split(r"^==> .* <==\n", text, flags=re.MULTILINE)[1:]
    found = (re.search(r"T[\x0b-\x1f](\d{9,11}) \d", part) for part in parts)
    return [int(time_record[1]) for time_record in found if time_record]


def parse_subscription(text: str) -> Fields:
    """/etc/subscription: the key, a checksum, then base64 of what the shop said. Key and server id stay here."""
    lines = text.split()
    if not lines:
        return {"status": "notfound"}
    level: str | None = lines[0].partition("-")[0][-1:]
    try:
        told = parse_object(binascii.a2b_base64("".join(lines[2:])).decode("utf-8", "replace"), "/etc/subscription")
    except (binascii.Error, ValueError):
        raise SourceError("garbage", "/etc/subscription: its status cannot be decoded") from None
    due = told.get("nextduedate")
    due_at = to_unix(due) if isinstance(due, str) and "-" in due else to_count(due)
    status = told.get("status")
    level = level if level in ("c", "b", "s", "p") else None
    return known(status=status.lower() if isinstance(status, str) else None, level=level, next_due_at=due_at)


def parse_ceph_status(text: str) -> Fields:
    """`ceph -s --format json`: health, and its checks by name."""
    health = as_dict(parse_object(text, "ceph -s").get("health"))
    if not isinstance(health.get("status"), str):
        raise SourceError("garbage", "ceph -s: no health in the answer")
    checks = [
        known(name=name, severity=to_word(dig(check, "severity")), message=to_word(dig(check, "summary", "message")),
              muted=to_bool(dig(check, "muted")))
        for name, check in as_dict(health.get("checks")).items()
    ]  # fmt: skip
    return {"health": health["status"], "checks": checks}


# SMART

# Attributes whose normalized value is what is left of an SSD's life in percent: by the name that smartctl gives them,
# as makers use one number for different things [pve-storage PVE/Diskmanage.pm; smartmontools drivedb.h].
LIFE_ATTRIBUTES = (
    "Percent_Lifetime_Remain Percent_Life_Remaining Perc_Rated_Life_Remain PCT_Life_Remaining Remaining_Lifetime_Perc "
    "Lifetime_Remaining Lifetime_Remaining% Lifetime_Left SSD_Life_Left Drive_Life_Remaining% Media_Wearout_Indicator "
    "Percent_Lifetime_Used Perc_Rated_Life_Used Perc_Write/Erase_Ct_BC Wear_Leveling_Count"
).split()
# Of these the raw number is a percentage too: of what is used up (Crucial, Micron), of what is left (others).
RAW_IS_USED = ("Percent_Lifetime_Remain", "Percent_Lifetime_Used", "Perc_Rated_Life_Used")
RAW_IS_LEFT = ("SSD_Life_Left", "Remaining_Lifetime_Perc", "Lifetime_Left", "PCT_Life_Remaining")
DAMAGE_ATTRIBUTES = {  # not Current_Pending_ECC_Cnt of Crucial: that one comes and goes on sound disks
    "reallocated_sectors": "Reallocated_Sector_Ct Retired_Block_Count Reallocate_NAND_Blk_Cnt Reallocated_Block_Count",
    "reported_uncorrectable": "Reported_Uncorrect Uncorrectable_Error_Cnt Reported_UE_Counts",
    "pending_sectors": "Current_Pending_Sector Total_Pending_Sectors",
    "uncorrectable_errors": "Offline_Uncorrectable Off-line_Uncorrectable",
    "crc_errors": "UDMA_CRC_Error_Count CRC_Error_Count SATA_CRC_Error SATA_CRC_Error_Count",
}
ALL_ONES = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFF)  # what is printed of a counter that is not kept
MOST_HOURS = 300_000  # 34 years: above that minutes or seconds were taken for hours
Attributes = dict[str, tuple[int | None, int | None]]  # of ATA: normalized value and raw number by name
NVME_LOG = "nvme_smart_health_information_log"
NVME_FAILED, SCSI_FAILED = (5, 6, 7), (3, 4, 5, 6, 7)  # results of self-tests; others were not ended, or still run


def parse_smart(text: str, now: float) -> Fields:
    """`smartctl -j` of an ATA, NVMe or SAS disk as fields of the report. `asleep` and `type` are for the collector.

    What a disk cannot have measured is unknown: reserved values, all bits set, two fields that contradict each other.
    """
    smart = parse_object(text, "smartctl")
    run = as_dict(smart.get("smartctl"))
    exit_status = to_count(run.get("exit_status")) or 0
    messages = [str(dig(message, "string")) for message in as_list(run.get("messages"))]
    device = as_dict(smart.get("device"))
    if any(" mode, exit(" in message for message in messages) or (exit_status == 3 and "smart_status" not in smart):
        return known(asleep=True, type=to_word(device.get("type")))
    if exit_status & 3 and "smart_status" not in smart and "model_name" not in smart:
        raise SourceError("failed", f"smartctl: {'; '.join(messages)[:200] or f'exit status {exit_status}'}")
    attributes = parse_attributes(smart)
    return known(
        type=to_word(device.get("type")), protocol=to_word(device.get("protocol")), **parse_identity(smart),
        passed=to_bool(dig(smart, "smart_status", "passed")),
        failing_attributes=list_failing(smart) or None, temperature_celsius=parse_temperature(smart, attributes),
        temperature_limit_celsius=parse_trip(smart), power_on_hours=parse_hours(smart),
        **parse_wear(smart, attributes), **parse_damage(smart, attributes), selftest=parse_selftest(smart, now),
    )


def to_bool(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def to_share(percent: Any, most: int = 100) -> float | None:
    """A percentage of 0 … `most` as a ratio. 255 (all bits set) and the like say that it is not measured."""
    number = to_count(percent)
    return None if number is None or number > most else round(number / 100, 6)


def parse_hours(smart: Fields) -> int | None:
    hours = to_count(dig(smart, "power_on_time", "hours"))
    return hours if hours is not None and hours <= MOST_HOURS else None


def parse_identity(smart: Fields) -> Fields:
    naa, oui, number = (to_count(dig(smart, "wwn", part)) for part in ("naa", "oui", "id"))
    name = None if naa is None or oui is None or number is None else f"0x{naa:x}{oui:06x}{number:09x}"
    return known(
        model=first_text(smart, "model_name", "scsi_model_name"), serial=first_text(smart, "serial_number"),
        wwn=name or first_text(smart, "logical_unit_id"),
        firmware=first_text(smart, "firmware_version", "scsi_revision", "revision"),
        size_bytes=to_count(dig(smart, "user_capacity", "bytes")) or None,
        rotation_rate=to_count(smart.get("rotation_rate")),
    )


def first_text(values: Fields, *names: str) -> str | None:
    texts = (values[name].strip() for name in names if isinstance(values.get(name), str))
    return next((text for text in texts if text), None)


def parse_attributes(smart: Fields) -> Attributes:
    """(normalized, raw) by name. A raw value packs several counters: the first number of its text is meant."""
    table = {}
    for row in map(as_dict, as_list(dig(smart, "ata_smart_attributes", "table"))):
        words = re.match(r"\d{1,18}(?![\dx])", str(dig(row, "raw", "string") or ""))
        raw, value, packed = int(words[0]) if words else None, to_count(row.get("value")), dig(row, "raw", "value")
        if row.get("id") == 230 and row.get("name") == "Media_Wearout_Indicator":
            # Western Digital stands still here or counts up; the second byte of the raw number is the percentage used:
            # 0x25060d282506 is 37 % [list smartmontools-support 2021-March/000652, zbx-smartctl issue 148].
            raw, value = None, None if to_count(packed) is None else 100 - (int(packed) >> 8) % 256
        table[str(row.get("name"))] = value, None if raw in ALL_ONES else raw
    return table


def list_failing(smart: Fields) -> list[str]:
    """Attributes that foretell failure and stand at their threshold now. Disks may call themselves well with that, and
    those of old age or heat, or that stood there once, foretell nothing [smartctl(8), WHEN_FAILED]."""
    rows = map(as_dict, as_list(dig(smart, "ata_smart_attributes", "table")))
    return [str(row.get("name")) for row in rows if row.get("when_failed") == "now" and dig(row, "flags", "prefailure")]


def parse_temperature(smart: Fields, attributes: Attributes) -> int | None:
    """0 is what disks say that do not measure it, and no disk works beyond 150 °C."""
    names = ("Temperature_Celsius", "Airflow_Temperature_Cel", "Temperature_Internal", "Temperature_Case")
    told = [to_number(dig(smart, "temperature", "current")), to_number(dig(smart, NVME_LOG, "temperature"))]
    told += [attributes.get(name, (None, None))[1] for name in names]
    return next((int(celsius) for celsius in told if celsius and -40 <= celsius <= 150), None)


def parse_trip(smart: Fields) -> int | None:
    """Where the disk itself warns of heat (SAS); some say 0 or 25, which nobody can mean."""
    limit = to_count(dig(smart, "temperature", "drive_trip"))
    return limit if limit is not None and 45 <= limit <= 100 else None


def parse_wear(smart: Fields, attributes: Attributes) -> Fields:
    """wear_ratio is what is used up (it may exceed 1), whatever way round the disk says it."""
    log, spare = as_dict(smart.get(NVME_LOG)), as_dict(smart.get("spare_available"))
    # smartctl 7.5 has the first one, for all kinds
    told = (dig(smart, "endurance_used", "current_percent"), log.get("percentage_used"),
            smart.get("scsi_percentage_used_endurance_indicator"))  # fmt: skip
    used = next((share for share in (to_share(percent, 254) for percent in told) if share is not None), None)
    if used is None and not to_count(smart.get("rotation_rate")):
        used = parse_life(attributes)
    return known(
        wear_ratio=used, spare_ratio=to_share(log.get("available_spare", spare.get("current_percent"))),
        spare_threshold_ratio=to_share(log.get("available_spare_threshold", spare.get("threshold_percent"))),
    )


def parse_life(attributes: Attributes) -> float | None:
    """What an SSD's attributes say is used up; unknown where value and raw number contradict each other, as on firmware
    that counts the value the other way round [hiyohiyo/CrystalDiskInfo issue 178]."""
    for name in LIFE_ATTRIBUTES:
        left, raw = attributes.get(name, (None, None))
        if left is not None:
            expected = 100 - left if name in RAW_IS_USED else left
            percentage = name in RAW_IS_USED + RAW_IS_LEFT and raw is not None and 0 < raw <= 100
            return None if left > 100 or percentage and abs(expected - (raw or 0)) > 2 else round(1 - left / 100, 6)
    return None


def parse_damage(smart: Fields, attributes: Attributes) -> Fields:
    log = as_dict(smart.get(NVME_LOG))
    damage: dict[str, int | None] = {}
    for field, names in DAMAGE_ATTRIBUTES.items():
        damage[field] = next((attributes[name][1] for name in names.split() if name in attributes), None)
    counters = as_dict(smart.get("scsi_error_counter_log")).values()
    uncorrected = [to_count(dig(counter, "total_uncorrected_errors")) for counter in counters]
    if "scsi_grown_defect_list" in smart:
        damage["reallocated_sectors"] = to_count(smart["scsi_grown_defect_list"])
    if uncorrected and None not in uncorrected:
        damage["uncorrectable_errors"] = sum(number or 0 for number in uncorrected)
    warning = to_count(log.get("critical_warning"))
    damage["critical_warning"] = None if warning is None or warning > 0x3F else warning  # the rest is reserved
    return known(**damage, media_errors=to_count(log.get("media_errors")))


def parse_selftest(smart: Fields, now: float) -> Fields | None:
    """The newest self-test that came to an end: whether it passed, and when, by the hours the disk had run then. One
    that failed counts on until an extended one has passed, as smartctl has it: a short one does not read the disk."""
    ata, hours = as_dict(smart.get("ata_smart_self_test_log")), parse_hours(smart)
    rows = as_list(dig(ata.get("standard") or ata.get("extended"), "table"))
    rows += as_list(dig(smart, "nvme_self_test_log", "table"))
    rows += [smart[name] for name in (f"scsi_self_test_{number}" for number in range(20)) if name in smart]
    newest: Fields | None = None
    for row in map(as_dict, rows):
        passed = selftest_passed(row)
        if passed is None or (newest and passed and not is_extended(row)):
            continue
        if newest is None or not passed:
            newest = known(passed=passed, ended_at=selftest_end(row, hours, now))
        if not passed or is_extended(row):
            break
    return newest


def selftest_passed(row: Fields) -> bool | None:
    nvme, scsi = to_count(dig(row, "self_test_result", "value")), to_count(dig(row, "result", "value"))
    if nvme == 0 or scsi == 0 or nvme in NVME_FAILED or scsi in SCSI_FAILED:
        return not (nvme or scsi)
    return to_bool(dig(row, "status", "passed"))


def is_extended(row: Fields) -> bool:
    """By the word, as ATA, NVMe and SCSI number the kinds in different ways ("Extended offline", "Background long")."""
    kinds = (dig(row, name, "string") for name in ("type", "self_test_code", "code"))
    return any(word in str(kind) for kind in kinds for word in ("Extended", "long"))


def selftest_end(row: Fields, hours: int | None, now: float) -> int | None:
    at = to_count(row.get("lifetime_hours", row.get("power_on_hours", dig(row, "power_on_time", "hours"))))
    if hours is None or at is None or at > hours:
        return None
    at += (hours - at) // 0x10000 * 0x10000 if "lifetime_hours" in row else 0  # ATA keeps the lowest 16 bits
    return int(now) - (hours - at) * 3600


# Safeguards: what should speak up when something fails.

# proxmox-notify ships these two, and a file that names them replaces them.
NOTIFY_DEFAULTS = "sendmail: mail-to-root\n\nmatcher: default-matcher\n\ttarget mail-to-root\n"


def parse_shell_setting(text: str, name: str) -> str | None:
    """The last uncommented NAME=value of a file that a shell reads; None if there is none."""
    values = re.findall(rf"^[ \t]*{name}=(.*)$", text, re.MULTILINE)
    return values[-1].strip().strip("\"'") if values else None


def parse_root_mail(text: str) -> bool:
    """Whether root@pam has a mail address in user.cfg: `user:ID:enable:expire:first:last:email:comment:keys:`."""
    for line in text.splitlines():
        words = line.strip().split(":")
        if words[:2] == ["user", "root@pam"]:
            return len(words) > 6 and bool(words[6])
    return False


def parse_notifications(text: str) -> Fields:
    """notifications.cfg: how many targets are on, and which matchers that are on lead to none of them."""
    sections: dict[tuple[str, str], dict[str, list[str]]] = {}
    current: dict[str, list[str]] = {}
    for line in (NOTIFY_DEFAULTS + "\n" + text).splitlines():
        head = re.match(r"(\S+?):\s*(\S+)\s*$", line)
        if head:
            current = sections[head[1], head[2]] = {}
        elif line.strip():
            key, _, value = line.strip().partition(" ")
            current.setdefault(key, []).append(value.strip())
    enabled = {key: values for key, values in sections.items() if values.get("disable") not in (["1"], ["true"])}
    targets = {name for kind, name in enabled if kind != "matcher"}
    matchers = {name: values.get("target", ()) for (kind, name), values in enabled.items() if kind == "matcher"}
    silent = [name for name, wanted in matchers.items() if not targets & set(wanted)]
    return {"notification_targets": len(targets), "notification_matchers": len(matchers),
            "matchers_without_target": silent}  # fmt: skip


def parse_apt_sources(text: str, *, deb822: bool) -> list[tuple[str, list[str], list[str]]]:
    """Enabled binary sources as (URI, suites, components), of a .sources or a .list file (sources.list(5))."""
    if not deb822:
        lines = re.findall(r"^[ \t]*deb[ \t]+(?:\[[^]\n]*\][ \t]*)?(\S+)[ \t]+([^#\n]+)", text, re.MULTILINE)
        return [(uri, rest.split()[:1], rest.split()[1:]) for uri, rest in lines if rest.split()]
    sources = []
    for block in re.split(r"\n[ \t]*\n", text):
        stanza = "\n".join(line for line in block.splitlines() if not line.startswith("#"))
        pairs = [line.partition(":") for line in re.sub(r"\n[ \t]", " ", stanza).splitlines()]
        fields = {key.strip().lower(): value.split() for key, _, value in pairs}
        if fields.get("enabled", ["yes"])[:1] not in (["no"], ["false"], ["0"]) and "deb" in fields.get("types", ()):
            for uri in fields.get("uris", ()):
                sources.append((uri, fields.get("suites", []), fields.get("components", [])))
    return sources


def judge_apt_sources(sources: list[tuple[str, list[str], list[str]]]) -> dict[str, bool]:
    """Which kinds of sources are on; Debian's security updates have suites of their own (`trixie-security`)."""
    suites = {suite for _, suites, _ in sources for suite in suites}
    parts = {part for _, _, parts in sources for part in parts}
    kinds = {
        "enterprise": {"pve-enterprise"}, "no_subscription": {"pve-no-subscription"}, "test": {"pvetest", "pve-test"},
    }
    security = any(suite.endswith(("-security", "-security/updates")) for suite in suites)
    return {"security_source": security, **{f"{kind}_source": bool(parts & names) for kind, names in kinds.items()}}


# --- collectors: probe and parsers to one section of the report ---


class Collector(NamedTuple):
    """A section of the report and the function that makes it. The lock is held while it runs: its memory is its own."""

    name: str
    tick: str
    function: Callable[[Any, Fields], Any]
    lock: threading.Lock


COLLECTORS: dict[str, Collector] = {}  # in the order of the report


def collector(
    name: str, *, tick: str, needs: Iterable[Callable[[Any], Any]] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a collector: `function(probe, memory) -> section`.

    It raises SourceError when the section could not be had, Absent when it does not apply (so do the `needs`, which are
    asked first); None means nothing to report this time (tasks). `memory` is its own dict, kept over restarts: JSON
    values only.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def collect(probe: ProbeLike, memory: Fields) -> Any:
            for need in needs:
                need(probe)
            return function(probe, memory)

        COLLECTORS[name] = Collector(name, tick, collect, threading.Lock())
        return collect

    return register


PVECFG = "/usr/share/perl5/PVE/pvecfg.pm"
METRICS = "/run/pve/metrics"
ZFS_KSTAT = "/proc/spl/kstat/zfs"
LATE_SECONDS = 40  # pvestatd writes every 10 s; older than this is late
DEAD_SECONDS = 120  # and older than this says nothing about now
RECHECK_SECONDS = 600  # how long what seldom changes (version, next kernel, sensors) is believed
ZFS_LIMIT = 20.0  # seconds for a zpool or zfs command

SHARED = threading.local()  # what several collectors of one tick read: the probe, since when, and the values


def shared(probe: ProbeLike, name: str, read: Callable[[Any], Any]) -> Any:
    """`read(probe)`, or what it gave (or raised) to another collector of the same tick, which is the same thread."""
    now = probe.monotonic()
    if getattr(SHARED, "probe", None) is not probe or not 0 <= now - SHARED.since < 1:
        SHARED.probe, SHARED.since, SHARED.values = probe, now, {}
    values: Fields = SHARED.values
    if name not in values:
        try:
            values[name] = read(probe)
        except SourceError as error:
            values[name] = error
    if isinstance(values[name], SourceError):
        raise SourceError(values[name].code, values[name].detail)
    return values[name]


def remember(
    probe: ProbeLike, memory: Fields, name: str, read: Callable[[], Any], *, key: Any = None,
    seconds: float = RECHECK_SECONDS,
) -> Any:
    """`read()`, repeated only after so long or when `key` (of JSON values) is another one."""
    now = probe.now()
    kept = as_dict(memory.get(name))
    if kept.get("key") == key and 0 <= now - (to_number(kept.get("at")) or 0) < seconds and "value" in kept:
        return kept["value"]
    value = read()
    memory[name] = {"key": key, "at": now, "value": value}
    return value


def attempt(read: Callable[..., Any], *args: Any, default: Any = None) -> Any:
    """`read(*args)` of an extra that no row depends on: the default whatever fails. See optional() for the others."""
    try:
        return read(*args)
    except SourceError:
        return default


def unknown_because(error: SourceError) -> Fields:
    """For the row of an object that could not be asked: it alone is dark, and says why."""
    return {"unknown_reason": f"{error.code}: {error.detail}"[:DETAIL_LIMIT]}


def read_word(probe: ProbeLike, path: str) -> str:
    """A small file without the blanks around; "" when it cannot be read."""
    return str(attempt(probe.read, path, default="")).strip()


def host_name(probe: ProbeLike) -> str:
    """The short host name, which Proxmox has as the node's name."""
    return probe.read("/proc/sys/kernel/hostname").strip().split(".")[0]


# what sections need


def require(path: str, otherwise: str) -> Callable[[ProbeLike], None]:
    """Absent where the path is not there."""

    def check(probe: ProbeLike) -> None:
        if not probe.exists(path):
            raise Absent(otherwise)

    return check


require_zfs = require("/sys/module/zfs", "the zfs module is not loaded")  # each zpool or zfs command would load it
require_systemd = require("/run/systemd/system", "systemd does not run here")


def require_pve(probe: ProbeLike) -> None:
    """Absent on a machine without Proxmox VE. An empty /etc/pve is Proxmox with its file system down."""
    found = probe.exists(METRICS) or probe.exists(PVECFG)  # the first costs no thread: it lies in RAM
    if not found and optional(probe.list_dir, "/etc/pve") is None:
        raise Absent("no Proxmox VE here")


def read_version_file(probe: ProbeLike) -> Fields:
    """/etc/pve/.version: a counter per file. Without it pmxcfs is not mounted, and /etc/pve is an empty directory."""
    text = optional(probe.read, "/etc/pve/.version")
    if text is None:
        raise SourceError("unavailable", "/etc/pve is not mounted (pve-cluster down?): no .version")
    return parse_object(text, "/etc/pve/.version")


def read_members(probe: ProbeLike) -> Fields:
    """/etc/pve/.members: who is in the cluster, and which of them is this node."""
    return parse_object(probe.read("/etc/pve/.members"), "/etc/pve/.members")


def require_cluster(probe: ProbeLike) -> None:
    """Absent on a stand-alone node. Without pmxcfs nobody can tell."""
    require_pve(probe)
    read_version_file(probe)
    if not shared(probe, "members", read_members).get("cluster"):
        raise Absent("a stand-alone node")


def fresh_part(probe: ProbeLike, name: str) -> tuple[Fields | None, float | None]:
    """A part of pvestatd's newest snapshot and its time, (None, None) when it is missing there."""
    snapshot = attempt(shared, probe, "metrics", lambda probe: parse_metrics(probe.read_line(METRICS)), default={})
    part = snapshot.get(name)
    return (part["data"], part["timestamp"]) if part else (None, None)


def is_late(probe: ProbeLike, stamp: float | None) -> bool:
    return stamp is None or abs(probe.now() - stamp) > LATE_SECONDS


# node

PRESSURES = {"cpu": ("some_avg10",), "io": ("full_avg10", "full_avg300"), "memory": ("full_avg10", "full_avg300")}
# Not disks of their own: what lies on others, and the paths of one NVMe namespace, which the kernel lists beside it,
# hidden: nvme3c33n1 is nvme3n1 by way of controller 33 [linux drivers/nvme/host/multipath.c].
NO_DISK = re.compile(r"(zd|loop|dm-|md|sr|fd|z?ram|nbd|rbd|drbd)\d|nvme\d+c\d+n\d+$")


@collector("node", tick=FAST, needs=[require("/proc/sys/kernel", "no /proc here")])
def collect_node(probe: ProbeLike, memory: Fields) -> Fields:
    """CPU, memory, load, pressure, network, disks and temperatures of the host, from /proc and /sys."""
    boot_id = probe.read("/proc/sys/kernel/random/boot_id").strip()
    kernel = probe.read("/proc/sys/kernel/osrelease").strip()
    node = known(name=host_name(probe), kernel=kernel, boot_id=boot_id)
    if memory.get("boot_id") != boot_id:
        memory.clear()
        memory["boot_id"] = boot_id
    parts: tuple[tuple[Any, ...], ...] = (
        (read_load,), (read_cpu, memory), (read_memory,), (read_pressure,), (read_root,),
        (read_versions, memory, kernel), (read_interfaces, memory), (read_block_devices, memory),
        (lambda *args: {"temperatures": read_temperatures(*args)}, memory),
    )
    for read, *more in parts:
        with part_of(probe, "node"):
            node.update(read(probe, *more))
    return node


def read_load(probe: ProbeLike) -> Fields:
    load = probe.read("/proc/loadavg").split()
    uptime = probe.read("/proc/uptime").split()
    if len(load) < 3 or not uptime:
        raise SourceError("garbage", "/proc/loadavg or /proc/uptime")
    load1, load5, load15 = (to_number(word) for word in load[:3])
    return known(load1=load1, load5=load5, load15=load15, uptime_seconds=to_count(uptime[0]))


def read_cpu(probe: ProbeLike, memory: Fields) -> Fields:
    """Shares since the last sample of this boot; before there is one, what pvestatd measured."""
    jiffies, count = parse_cpu_times(probe.read("/proc/stat"))
    before, memory["jiffies"] = memory.get("jiffies"), jiffies
    ratios = parse_cpu_ratios(before, jiffies) if isinstance(before, list) else {}
    if not ratios:
        part, stamp = fresh_part(probe, "node")
        told = {} if is_late(probe, stamp) else as_dict(dig(part, "cpustat"))
        ratios = known(cpu_ratio=to_number(told.get("cpu")), iowait_ratio=to_number(told.get("wait")))
    return {"cpu_count": count or None, **ratios}


def read_memory(probe: ProbeLike) -> Fields:
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
        memory_total_bytes=total, memory_available_bytes=available, memory_free_ratio=free,
        arc_size_bytes=arc.get("size"), arc_min_bytes=arc.get("c_min"), arc_max_bytes=arc.get("c_max"),
        arc_hits_total=arc.get("hits"), arc_misses_total=arc.get("misses"), swap_total_bytes=swap_total,
        swap_used_bytes=None if swap_total is None or swap_free is None else swap_total - swap_free,
        oom_kills_total=to_count(kills),
    )


def read_pressure(probe: ProbeLike) -> Fields:
    """PSI; without it (psi=0) the files are absent or unreadable."""
    ratios = {}
    for kind, names in PRESSURES.items():
        values = parse_pressure(attempt(probe.read, f"/proc/pressure/{kind}", default=""))
        ratios.update({f"pressure_{kind}_{name}_ratio": values[name] for name in names if name in values})
    return ratios


def read_root(probe: ProbeLike) -> Fields:
    """The root file system; used + available < total, as root keeps a reserve."""
    root = probe.statvfs("/")
    blocks = {"total": root.f_blocks, "used": root.f_blocks - root.f_bfree, "available": root.f_bavail}
    return {f"root_{name}_bytes": count * root.f_frsize for name, count in blocks.items()}


def read_versions(probe: ProbeLike, memory: Fields, kernel: str) -> Fields:
    version = remember(probe, memory, "pve_version", lambda: parse_pve_version(attempt(probe.read, PVECFG, default="")))
    following = remember(probe, memory, "kernel_next", lambda: read_next_kernel(probe, kernel), key=kernel)
    reboot = None if following is None else following != kernel
    if attempt(probe.exists, "/run/reboot-required", default=False):  # Debian writes it, Proxmox does not
        reboot = True
    return known(pve_version=version, kernel_next=following, reboot_needed=reboot)


def read_next_kernel(probe: ProbeLike, kernel: str) -> str | None:
    """The release that boots next: a pinned one, else the newest of the running one's flavour that is complete."""
    for pin in ("/etc/kernel/next-boot-pin", "/etc/kernel/proxmox-boot-pin"):
        pinned = read_word(probe, pin).split("\n")[0].strip()
        if pinned:
            return pinned
    flavour, images = kernel.rpartition("-")[2], set(attempt(probe.list_dir, "/boot", default=[]))
    releases = [name for name in attempt(probe.list_dir, "/lib/modules", default=[]) if f"vmlinuz-{name}" in images]
    return max((name for name in releases if name.rpartition("-")[2] == flavour), key=version_key, default=None)


def read_interfaces(probe: ProbeLike, memory: Fields) -> Fields:
    """Physical ones have a device; bridges, bonds, VLANs, taps and veths would count the same bytes again."""
    counters = parse_net_dev(probe.read("/proc/net/dev"))

    def find() -> list[str]:
        return [name for name in counters if "/" not in name and probe.exists(f"/sys/class/net/{name}/device")]

    interfaces = []
    for name in remember(probe, memory, "interfaces", find, key=sorted(counters)):
        received, receive_errors, sent, send_errors = counters[name]
        state = read_word(probe, f"/sys/class/net/{name}/operstate")
        interfaces.append(known(
            name=name, receive_bytes_total=received, transmit_bytes_total=sent, receive_errors_total=receive_errors,
            transmit_errors_total=send_errors, up=None if state in ("", "unknown") else state == "up",
        ))  # fmt: skip
    totals = {f"net_{way}_bytes_total": sum(interface[f"{way}_bytes_total"] for interface in interfaces)
              for way in ("receive", "transmit")}  # fmt: skip
    return {"interfaces": interfaces, **totals}


def read_block_devices(probe: ProbeLike, memory: Fields) -> Fields:
    """Whole disks: no partitions, and nothing that lies on other disks."""
    rows = parse_diskstats(probe.read("/proc/diskstats"))
    counters = {name: row for name, row in rows.items() if not NO_DISK.match(name)}

    def find() -> list[str]:
        return [name for name in counters if probe.exists(f"/sys/block/{name}")]

    devices = []
    for name in remember(probe, memory, "block_devices", find, key=sorted(counters)):
        read, written, busy = counters[name]
        devices.append({"name": name, "read_bytes_total": read * 512, "write_bytes_total": written * 512,
                        "busy_seconds_total": busy / 1000})  # fmt: skip
    return {"block_devices": devices}


COLDEST, HOTTEST = -60, 125  # °C that a sensor may measure; chips tell others where none is connected


def read_temperatures(probe: ProbeLike, memory: Fields) -> list[Fields]:
    """hwmon sensors. Read errors are normal for some. Their numbers change at boot: told by name and device."""
    sensors = remember(probe, memory, "sensors", lambda: find_sensors(probe))
    temperatures = []
    for sensor, label, path, critical in sensors:
        celsius = to_celsius(read_word(probe, path))
        if celsius is not None:
            temperatures.append(known(sensor=sensor, label=label, celsius=celsius, critical_celsius=critical))
    return temperatures


def to_celsius(millidegrees: str) -> float | None:
    celsius = (to_number(millidegrees) or 0) / 1000
    return round(celsius, 1) if is_whole(millidegrees.lstrip("-")) and COLDEST <= celsius <= HOTTEST else None


def find_sensors(probe: ProbeLike) -> list[list[Any]]:
    """[sensor, label, path, critical] of every temperature, but not drivetemp: that one talks to the disk each time."""
    found: list[list[Any]] = []
    for folder in attempt(probe.list_dir, "/sys/class/hwmon", default=[]):
        base = f"/sys/class/hwmon/{folder}"
        name = read_word(probe, f"{base}/name")
        if not name or name == "drivetemp":
            continue
        device = attempt(probe.readlink, f"{base}/device", default="").rpartition("/")[2]
        files = set(attempt(probe.list_dir, base, default=[]))
        for stem in sorted((file[:-6] for file in files if re.fullmatch(r"temp\d+_input", file)), key=version_key):
            label = read_word(probe, f"{base}/{stem}_label") or stem
            limit = to_celsius(read_word(probe, f"{base}/{stem}_crit")) if f"{stem}_crit" in files else None
            sensor = f"{name}-{device}" if device else name
            found.append([sensor, label, f"{base}/{stem}_input", limit if limit and limit > 0 else None])
    return found


# cluster


def node_name(probe: ProbeLike) -> str:
    """This node's name in the cluster; right after a renaming of the host it is still the old one."""
    name = attempt(shared, probe, "members", read_members, default={}).get("nodename")
    return name if isinstance(name, str) and name and "/" not in name else host_name(probe)


def read_pve_config(
    probe: ProbeLike, memory: Fields, name: str, parse: Callable[[str], Any], *, path: str = "",
    default: Any = None,
) -> Any:
    """A file below /etc/pve, read again only when its counter (or the start of pmxcfs) in .version has changed."""
    version = shared(probe, "version", read_version_file)
    key = [version.get("starttime"), version.get(name)]
    files = memory.setdefault("parsed", {})
    if name not in files or files[name]["key"] != key or key[1] is None:
        text = optional(probe.read, f"/etc/pve/{path or name}")
        files[name] = {"key": key, "value": default if text is None else parse(text)}
    return files[name]["value"]


@collector("cluster", tick=FAST, needs=[require_pve])
def collect_cluster(probe: ProbeLike, memory: Fields) -> Fields:
    """Name, quorum and members. Membership is what .members says, not the directories under /etc/pve/nodes."""
    shared(probe, "version", read_version_file)
    members = shared(probe, "members", read_members)
    cluster = as_dict(members.get("cluster"))
    if not cluster:
        raise Absent("a stand-alone node")
    quorate = to_flag(cluster["quorate"]) if "quorate" in cluster else None
    nodes = []
    for name, node in sorted(as_dict(members.get("nodelist")).items()):
        online = to_flag(dig(node, "online")) if "online" in as_dict(node) else None
        if online and quorate is False and name != members.get("nodename"):
            online = None  # where its own corosync has died, pmxcfs goes on saying what it knew last
        nodes.append(known(name=name, online=online, address=to_word(dig(node, "ip"))))
    votes = read_votes(probe, memory, {node["name"]: node.get("online") for node in nodes}, quorate)
    return {**known(name=cluster.get("name"), quorate=quorate), **votes, "members": nodes}


def read_votes(probe: ProbeLike, memory: Fields, online: dict[str, bool | None], quorate: bool | None) -> Fields:
    """From corosync.conf and who is online; where that cannot tell (quorum device, changed expectation): corosync."""
    text = attempt(probe.read, "/etc/corosync/corosync.conf") or attempt(probe.read, "/etc/pve/corosync.conf")
    if not text:
        return {}
    votes = parse_corosync_votes(text)
    present = sum(votes.nodes.get(name, 0) for name, is_online in online.items() if is_online)
    whole = None not in online.values() and {name for name in online if online[name]} <= votes.nodes.keys()
    if votes.nodes and votes.needed is not None and whole and (present >= votes.needed) == quorate:
        return {"votes_expected": votes.expected, "votes_present": present, "votes_needed": votes.needed}
    return remember(probe, memory, "votes", lambda: run_quorumtool(probe), key=[online, quorate])


def run_quorumtool(probe: ProbeLike) -> Fields:
    """At most every ten minutes or on a change, as this runs on a fast tick; its exit code says nothing."""
    try:
        return parse_quorumtool(probe.run("corosync-quorumtool", "-siH", limit=3.0, ok=None))
    except SourceError as error:
        return unknown_because(error)


# guests

CONFIG_FORM = 2  # another one reads every file anew
ANSWER_SECONDS = 60  # after so long a running QEMU has answered pvestatd several times
GUEST_COUNTERS = {
    "netin": "net_receive_bytes_total", "netout": "net_transmit_bytes_total",
    "diskread": "disk_read_bytes_total", "diskwrite": "disk_write_bytes_total",
}
GUEST_GROUPS = ("/sys/fs/cgroup/qemu.slice", "/sys/fs/cgroup/lxc")
GUEST_GROUP = re.compile(r"(\d{3,9})(?:\.scope|-\d+)?$")  # LXC appends -1 where a folder of an earlier run is left


def read_rrd(probe: ProbeLike) -> dict[str, dict[str, dict[str, str]]]:
    return parse_rrd(probe.read("/etc/pve/.rrd"))


@collector("guests", tick=FAST, needs=[require_pve])
def collect_guests(probe: ProbeLike, memory: Fields) -> list[Fields]:
    """Every VM and container of this node: pvestatd's snapshot, else .rrd; configuration only when it changed."""
    sources = {kind: fresh_part(probe, kind) for kind in ("qemu", "lxc")}
    try:
        configs = read_guest_configs(probe, memory)
    except SourceError as error:
        if all(is_late(probe, stamp) for _, stamp in sources.values()):
            raise
        probe.problem("guests", error.code, error.detail)
        before = as_dict(memory.get("guest_configs"))  # and all that pvestatd names
        listed = [(kind, vmid) for kind, (guests, _) in sources.items() for vmid in guests or {} if is_whole(vmid)]
        configs = {vmid: as_dict(before.get(vmid)) or {"type": kind} for kind, vmid in listed}
    rrd = {}
    if any(is_late(probe, sources[config["type"]][1]) for config in configs.values()):
        rrd = attempt(read_rrd, probe, default={}).get("vm", {})
    services = attempt(read_pve_config, probe, memory, "ha/manager_status", parse_ha_states) or {}
    states = {sid.partition(":")[2]: state for sid, state in services.items() if sid.startswith(("vm:", "ct:"))}
    storages = attempt(read_storages, probe, memory, default=[])
    datasets = {name: values["pool"] for kind, name, values in storages if kind == "zfspool" and values.get("pool")}
    busy = attempt(read_busy_guests, probe)
    guests = []
    for vmid, config in sorted(configs.items(), key=lambda pair: int(pair[0])):
        raw, stamp = choose_guest(probe, vmid, sources[config["type"]], rrd.get(vmid))
        guest = build_guest(vmid, config, raw)
        lists = {name: build_volumes(config.get(name), datasets) for name in ("volumes", "unused")}
        recent = 0 <= probe.now() - (to_number(config.get("config_changed_at")) or 0) < 3600  # a report may be lost
        change = {name: config.get(name) for name in ("config_changed", "config_changed_at")} if recent else {}
        guest.update(known(ha_state=states.get(vmid), **lists, **change))
        if "lock" in guest and busy is not None:
            guest["lock_held"] = int(vmid) in busy or (guest["lock"] == "backup" and None in busy)
        if stamp is not None and (is_late(probe, stamp) or is_late(probe, sources[config["type"]][1])):
            guest["as_of"] = stamp
        guests.append(guest)
    check_guests_age(probe, guests)
    return guests


def read_busy_guests(probe: ProbeLike) -> set[int | None]:
    """The guests on which a task of this node is at work; None stands for a backup of several. A lock without a task
    was left behind: Proxmox takes back those of backups only, when the host starts [pve-manager PVE/API2/Nodes.pm]."""
    busy: set[int | None] = set()
    for line in probe.read(TASKS_PATH).splitlines():
        upid, _, state = line.partition(" ")
        task = parse_upid(upid)
        if task and state[:1] == "0":
            pid, began = map(from_hex, upid.split(":")[2:4])
            stat = attempt(probe.read, f"/proc/{pid}/stat", default="").rpartition(")")[2].split()
            if len(stat) > 19 and to_count(stat[19]) == began:  # else a later process of the same pid (field 22)
                busy |= {task["vmid"]} if "vmid" in task else {None} if task["type"] == "vzdump" else set()
    return busy


def read_guest_configs(probe: ProbeLike, memory: Fields) -> dict[str, Fields]:
    """Configuration by vmid of the guests that .vmlist places here; each file is read when its version moved."""
    node = node_name(probe)
    start = shared(probe, "version", read_version_file).get("starttime")
    listing = read_pve_config(probe, memory, "vmlist", parse_vmlist, path=".vmlist", default={})
    before = as_dict(memory.get("guest_configs"))
    configs: dict[str, Fields] = {}
    for vmid, (home, kind, version) in listing.items():
        if home == node:
            config = as_dict(before.get(vmid))
            key = [kind, version, start, CONFIG_FORM]
            if config.get("key") != key:
                folder, found = "qemu-server" if kind == "qemu" else "lxc", {}
                try:
                    found = parse_guest_config(probe.read(f"/etc/pve/nodes/{node}/{folder}/{vmid}.conf"))
                except SourceError as error:  # just removed or moved: it is told without what is in it
                    if error.code not in ("missing", "denied"):
                        raise
                config = {**found, **note_change(config, found, probe.now()), "key": key, "type": kind}
            configs[vmid] = config
    memory["guest_configs"] = configs
    return configs


def note_change(before: Fields, config: Fields, now: float) -> Fields:
    """Which settings of a guest changed last, and when that was seen; not what tasks write, which tell of it."""
    old, new = as_dict(before.get("settings")), config.get("settings", {})
    changed = sorted(name for name in {*old, *new} - {"lock", "parent"} if old.get(name) != new.get(name))
    if old and new and changed:
        return {"config_changed": changed[:10], "config_changed_at": int(now)}
    return {name: before[name] for name in ("config_changed", "config_changed_at") if name in before}


def choose_guest(
    probe: ProbeLike, vmid: str, source: tuple[Fields | None, float | None], line: dict[str, str] | None
) -> tuple[Fields, float | None]:
    """The guest's raw values and their time: the snapshot while it is fresh, else the newer of snapshot and .rrd."""
    guests, stamp = source
    raw = as_dict((guests or {}).get(vmid))
    written = to_number((line or {}).get("ctime"))
    if line is not None and written is not None and is_late(probe, stamp) and (stamp is None or written >= stamp):
        return line, written
    return raw, stamp if raw else None


def build_guest(vmid: str, config: Fields, raw: Fields) -> Fields:
    """One guest from pvestatd's values (of either source; they share their names) and its configuration."""
    kind = config["type"]
    status = str(raw.get("qmpstatus") or raw.get("status") or "unknown")
    template = to_flag(raw["template"]) if "template" in raw else config.get("template")
    name = raw.get("name") or config.get("name") or (f"VM {vmid}" if kind == "qemu" else f"CT{vmid}")
    tags = split_list(raw["tags"]) if "tags" in raw else config.get("tags", [])
    used = to_count(raw.get("disk")) if kind == "lxc" else None
    guest = known(
        vmid=int(vmid), type=kind, name=str(name), status=status,
        template=template if template is not None else False if raw else None,
        lock=raw.get("lock") or config.get("lock"), tags=tags, onboot=config.get("onboot"),
        created_at=config.get("created_at"), uptime_seconds=to_count(raw.get("uptime")),
        cpu_count=to_number(raw.get("cpus")), memory_max_bytes=to_count(raw.get("maxmem")),
        disk_max_bytes=to_count(raw.get("maxdisk")), disk_used_bytes=used,
    )
    if status not in ("stopped", "unknown"):  # of a stopped guest the zeroes are no measurements
        cpu = to_number(raw.get("cpu"))
        host = to_count(raw.get("memhost")) or None if kind == "qemu" else None
        counters = {field: to_count(raw.get(name)) for name, field in GUEST_COUNTERS.items()}
        ratio = None if cpu is None or cpu < 0 else round(cpu, 5)
        used = to_count(raw.get("mem"))
        guest.update(known(cpu_ratio=ratio, memory_used_bytes=used, memory_host_bytes=host, **counters))
    if kind == "qemu" and status == "running" and (guest.get("uptime_seconds") or 0) > ANSWER_SECONDS:
        # Of a QEMU that does not answer Proxmox goes on saying "running", without what only QEMU can tell.
        guest["responds"] = any(to_count(raw.get(name)) is not None for name in ("diskread", "diskwrite"))
    return guest


def build_volumes(given: list[Fields] | None, datasets: dict[str, str]) -> list[Fields] | None:
    """Where the guest's disks lie: storage, and the dataset for those on a zfspool storage."""
    volumes = []
    for volume in given or ():
        fields = {name: volume.get(name) for name in ("name", "storage", "size_bytes", "backup")}
        if pool := datasets.get(volume["storage"]):
            # a linked clone is written base-9000-disk-0/vm-103-disk-0: its own dataset is the last part
            fields["dataset"] = f"{pool}/{volume['volume'].rpartition('/')[2]}"
        volumes.append(known(**fields))
    return None if given is None else volumes


def check_guests_age(probe: ProbeLike, guests: list[Fields]) -> None:
    """Old values are told as such; of those above two minutes, and of guests that pvestatd says nothing of, the status
    is what the control groups say."""
    now = probe.now()
    ages = {guest["vmid"]: abs(now - guest["as_of"]) for guest in guests if "as_of" in guest}
    silent = [guest for guest in guests if guest["status"] == "unknown" and "as_of" not in guest]
    if any(age > LATE_SECONDS for age in ages.values()):
        probe.problem("guests", "stale", f"pvestatd's newest data are {max(ages.values()):.0f} s old")
    elif silent and len(silent) == len(guests):
        probe.problem("guests", "unavailable", "pvestatd tells nothing: no /run/pve/metrics, nothing in .rrd")
    old = silent + [guest for guest in guests if ages.get(guest["vmid"], 0) > DEAD_SECONDS]
    seen = old and any(attempt(probe.exists, folder, default=False) for folder in GUEST_GROUPS)
    running = find_running(probe) if seen else set()
    for guest in old:
        if not seen or guest["vmid"] not in running:
            guest["status"] = "stopped" if seen else "unknown"
        elif guest["status"] in ("stopped", "unknown"):  # else what was known stays: it may be paused
            guest["status"] = "running"


def find_running(probe: ProbeLike, seen: dict[str, bool] | None = None) -> set[int]:
    """vmids with a process in their control group (cgroup v2): what runs right now, whatever pvestatd says. Groups in
    `seen` are believed, and so are scopes, which systemd removes with their last process."""
    running, seen = set(), {} if seen is None else seen
    for folder in GUEST_GROUPS:
        for entry in attempt(probe.list_dir, folder, default=[]):
            found, path = GUEST_GROUP.match(entry), f"{folder}/{entry}"
            if found and path not in seen:
                events = "" if entry.endswith(".scope") else attempt(probe.read, f"{path}/cgroup.events", default="")
                seen[path] = "populated 0" not in events
            if found and seen[path]:
                running.add(int(found[1]))
    return running


# storages

STORAGE_SERVERS = ("server", "portal", "monhost", "target")  # where a storage of another machine says which
SHARED_TYPES = ("nfs", "cifs", "pbs", "rbd", "cephfs", "iscsi", "iscsidirect", "glusterfs", "zfs", "drbd")


@collector("storages", tick=FAST, needs=[require_pve])
def collect_storages(probe: ProbeLike, memory: Fields) -> list[Fields]:
    """Every PVE storage of this node, inactive and disabled ones too, but not those limited to other nodes."""
    metrics, stamp = fresh_part(probe, "storage")
    try:
        sections = [section for section in read_storages(probe, memory) if is_here(section[2], node_name(probe))]
    except SourceError as error:
        if metrics is None or is_late(probe, stamp):
            raise
        probe.problem("storages", error.code, error.detail)  # and all that pvestatd names
        sections = [(str(as_dict(storage).get("type")), name, {}) for name, storage in sorted(metrics.items())]
    rrd = None
    if is_late(probe, stamp):
        try:
            rrd = read_rrd(probe)
        except SourceError:
            if metrics is None:
                raise
            probe.problem("storages", "stale", f"pvestatd's newest data are {probe.now() - (stamp or 0):.0f} s old")
    thin = read_thin_pools(probe, memory) if any(kind == "lvmthin" for kind, _, _ in sections) else {}
    storages = []
    for kind, name, values in sorted(sections, key=lambda section: section[1]):
        if rrd is not None:
            raw, as_of = read_rrd_storage(probe, rrd, kind, name, values)
        elif name in (metrics or {}):
            raw, as_of = as_dict((metrics or {})[name]), stamp if is_late(probe, stamp) else None
        else:
            continue
        dataset = values.get("pool") if kind == "zfspool" else None
        metadata = thin.get(f"{values.get('vgname')}/{values.get('thinpool')}") if kind == "lvmthin" else None
        server = next((values[key] for key in STORAGE_SERVERS if values.get(key)), None)
        more = known(metadata_used_ratio=metadata, server=server)
        storages.append({**build_storage(name, raw, dataset, as_of), **more})
    return storages


def read_storages(probe: ProbeLike, memory: Fields) -> list[tuple[str, str, dict[str, str]]]:
    """storage.cfg, in memory as JSON has it: lists for tuples."""
    sections = read_pve_config(probe, memory, "storage.cfg", parse_storages, default=parse_storages(""))
    return [(kind, name, values) for kind, name, values in sections]


def is_here(values: dict[str, str], node: str) -> bool:
    """Is a storage or job meant for this node?"""
    return not values.get("nodes") or node in split_list(values["nodes"])


def read_thin_pools(probe: ProbeLike, memory: Fields) -> dict[str, float]:
    """How full the metadata of each LVM thin pool is, by vg/pool; every ten minutes, as this is a fast tick."""

    def ask() -> dict[str, float]:
        columns = "vg_name,lv_name,data_percent,metadata_percent"
        argv = ("lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", columns)
        report = attempt(parse_object, attempt(probe.run, *argv, default="{}"), "lvs", default={})
        volumes = [as_dict(volume) for part in as_list(report.get("report")) for volume in as_list(dig(part, "lv"))]
        names = [f"{volume.get('vg_name')}/{volume.get('lv_name')}" for volume in volumes]
        return known(**{name: to_ratio(volume.get("metadata_percent")) for name, volume in zip(names, volumes)})

    return remember(probe, memory, "thin_pools", ask)


def build_storage(name: str, storage: Fields, dataset: str | None, as_of: float | None) -> Fields:
    """A storage as the report has it. What is not active, or has no size of its own (iSCSI), is told with zeroes that
    nobody has measured."""
    active = to_flag(storage["active"]) if storage.get("active") is not None else None
    total = to_count(storage.get("total")) or None if active is not False else None
    return known(
        storage=name, type=storage.get("type"),
        content=",".join(sorted(split_list(storage.get("content")))) or None,  # pvestatd's order is a Perl hash's
        shared=to_flag(storage.get("shared", 0)), enabled=to_flag(storage.get("enabled", 1)), active=active,
        total_bytes=total, used_bytes=to_count(storage.get("used")) if total else None,
        available_bytes=to_count(storage.get("avail")) if total else None, dataset=dataset, as_of=as_of,
    )


def read_rrd_storage(
    probe: ProbeLike, rrd: dict[str, dict[str, dict[str, str]]], kind: str, name: str, values: dict[str, str]
) -> tuple[Fields, float | None]:
    """The values that pvestatd's snapshot would have, and their time, from .rrd: there a storage has a line only while
    it is active. What is free is not in it: used and free are less than the total where root has a reserve."""
    node = node_name(probe)
    ctime = to_number(rrd["node"].get(node, {}).get("ctime"))
    if is_late(probe, ctime) and "storages" not in probe.problems:
        age = "missing" if ctime is None else f"{probe.now() - ctime:.0f} s old"
        probe.problem("storages", "stale", f"this node's data in .rrd are {age}")
    line = rrd["storage"].get(f"{node}/{name}", {})
    written = to_number(line.get("ctime"))
    enabled = not flag_of(values, "disable")
    active: bool | None = written is not None and abs(probe.now() - written) <= DEAD_SECONDS
    if not enabled:
        active = False
    elif not active and is_late(probe, ctime):
        active = None  # the whole node's data are old: nothing is known about this storage
    fields = {"type": kind, "content": values.get("content"), "enabled": enabled, "active": active}
    shared = flag_of(values, "shared") or kind in SHARED_TYPES
    return {**fields, "shared": shared, "total": line.get("total"), "used": line.get("used")}, written


# tasks

TASK_INDEX = f"{TASKS_FOLDER}/index"
TASKS_PER_REPORT = 2000


def follow_tasks(probe: ProbeLike, place: Fields, *, from_start: bool) -> list[str]:
    """The complete lines of the task index since `place`, by inode and offset; after a rotation index.1 first.

    At first, all there is or nothing. The text before the offset is compared too: an inode may be used again.
    """
    stat = optional(probe.stat, TASK_INDEX)
    mark = None if stat is None else [stat.st_ino, stat.st_size]
    if mark is None or place.get("mark") == mark:
        place.setdefault("mark", None)  # between the renaming and the new file: next time
        place.setdefault("offset", 0)
        return []
    if "mark" not in place:
        lines = optional(probe.read, f"{TASK_INDEX}.1", default="").splitlines() if from_start else []
        lines += keep_place(place, mark, probe.read(TASK_INDEX), 0)
        return lines if from_start else []
    text = probe.read(TASK_INDEX)
    if place["mark"] is not None and place["mark"][0] == mark[0] and is_continued(text, place):
        return keep_place(place, mark, text, place["offset"])
    older = optional(probe.read, f"{TASK_INDEX}.1", default="")
    lines = []
    if place["mark"] is not None and is_continued(older, place):
        lines = older[place["offset"] :].splitlines()
    elif place["mark"] is not None:  # rotated twice, or another file: what ended after the last one that was seen
        tasks = [(line, parse_task_line(line)) for line in older.splitlines()]
        lines = [line for line, task in tasks if task and task["ended_at"] > place.get("last_ended_at", 0)]
    return lines + keep_place(place, [attempt(probe.stat, TASK_INDEX, default=stat).st_ino, mark[1]], text, 0)


def is_continued(text: str, place: Fields) -> bool:
    return len(text) >= place["offset"] and text[: place["offset"]].endswith(place.get("tail", ""))


def keep_place(place: Fields, mark: list[int], text: str, offset: int) -> list[str]:
    """Note how far the text was read (a torn last line is left for the next time); the lines from `offset` on."""
    end = text.rfind("\n") + 1
    lines = text[offset:end].splitlines()
    place.update(mark=mark, offset=end, tail=text[max(0, end - 100) : end])
    for line in lines[-20:]:
        task = parse_task_line(line)
        place["last_ended_at"] = max(place.get("last_ended_at", 0), task["ended_at"] if task else 0)
    return lines


@collector("tasks", tick=FAST, needs=[require_pve])
def collect_tasks(probe: ProbeLike, memory: Fields) -> list[Fields] | None:
    """Tasks that ended since the last report. What ended before the agent's first start is not news."""
    since = memory["since"] = min(int(probe.now()), memory.get("since", int(probe.now())))  # a clock set back since
    lines = follow_tasks(probe, memory.setdefault("place", {}), from_start=False)
    tasks = [task for task in map(parse_task_line, lines) if task and task["ended_at"] >= since]
    if len(tasks) > TASKS_PER_REPORT:
        probe.problem("tasks", "too_large", f"{len(tasks)} tasks ended; the oldest are left out")
    return tasks[-TASKS_PER_REPORT:] or None


# pools

POOL_COLUMNS = "name guid size alloc free ckpoint frag cap dedup health readonly".split()
IO_COLUMNS = "name alloc free reads writes read_bytes write_bytes read_total write_total read_wait write_wait".split()
FEW_ERRORS = 200  # `zpool status -v` costs the kernel more than 20 s for some 900 of them, unkillably


def read_pool_states(probe: ProbeLike, memory: Fields, *, guids: bool = True) -> list[Fields]:
    """Name, guid and state of each imported pool from the kernel's files: they answer when zpool hangs.

    `$import` (from 2.3 on with thread and pool behind it) is no pool: `zpool import` looks at one under that name
    [openzfs module/zfs/spa.c]; so does Proxmox every 10 s while a pool that it wants is missing.
    """
    names = [name for name in probe.list_dir(ZFS_KSTAT) if not name.startswith("$")]
    others = memory.get("others", [])
    pools, plain = [], []
    for name in names:
        if name in others:
            plain.append(name)
            continue
        state = read_word(probe, f"{ZFS_KSTAT}/{name}/state")
        guid = read_word(probe, f"{ZFS_KSTAT}/{name}/guid") if guids or not state else ""
        if state or guid:
            pools.append(known(name=name, guid=to_guid(guid), state=state or None))
        elif not probe.exists(f"{ZFS_KSTAT}/{name}/."):
            plain.append(name)  # arcstats and other files beside the pools: not tried again
    if memory.get("others") != plain:
        memory["others"] = plain
    return pools


@collector("pool_states", tick=FAST, needs=[require_zfs])
def collect_pool_states(probe: ProbeLike, memory: Fields) -> list[Fields]:
    """State of each pool; never runs a command."""
    return read_pool_states(probe, memory)


@collector("pools", tick=MEDIUM, needs=[require_zfs])
def collect_pools(probe: ProbeLike, memory: Fields) -> list[Fields]:
    """Each pool in full, one pool per command. A suspended one is told from the kernel's files alone, one that does
    not answer with the reason."""
    pools = []
    for pool in read_pool_states(probe, memory):
        try:
            if pool.get("state") == "SUSPENDED":
                raise SourceError("unavailable", "suspended: only the kernel's word is known")
            pools.append(read_pool(probe, memory, pool))
        except SourceError as error:
            if probe.exists(f"{ZFS_KSTAT}/{pool['name']}/state"):  # else it was exported meanwhile
                pools.append({**pool, **keep_scrub(memory, pool.get("guid", ""), NO_SCAN), **unknown_because(error)})
    names, guids = [pool["name"] for pool in pools], [pool.get("guid") for pool in pools]
    probe.places = {disk: place for disk, place in (probe.places or {}).items() if place["pool"] in names}
    for name in ("scrubs", "damaged"):
        memory[name] = {guid: kept for guid, kept in as_dict(memory.get(name)).items() if guid in guids}
    return pools


def read_pool(probe: ProbeLike, memory: Fields, found: Fields) -> Fields:
    name = found["name"]
    status = read_pool_status(probe, memory, name)
    guid = found.get("guid") or status.get("guid") or ""
    vdevs = status.pop("vdevs", [])
    place_disks(probe, name, vdevs)
    note_io(probe, memory, name, vdevs)
    return {
        **found, **status, "layout": pool_layout(vdevs), **read_pool_space(probe, name),
        **known(redundancy_margin=redundancy_margin(vdevs)),
        "features_disabled": "features are not enabled" in status.get("status_text", ""),
        **read_damaged_files(probe, memory, name, guid, status), **keep_scrub(memory, guid, status["scan"]),
        "vdevs": vdevs,
    }


def read_pool_status(probe: ProbeLike, memory: Fields, name: str) -> Fields:
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
    pools = parse_zpool_status(probe.run("zpool", "status", "-p", "-P", "-s", name, limit=ZFS_LIMIT))
    if name not in pools:
        raise SourceError("garbage", f"zpool status: nothing about pool {name!r} in the answer")
    note_guids(probe, memory, name, pools[name]["vdevs"])
    return pools[name]


def note_guids(probe: ProbeLike, memory: Fields, name: str, vdevs: list[Fields]) -> None:
    """The text form shows either names or guids: the guids are asked for once, as long as the names stay."""
    rows = list_vdevs(vdevs)
    names = [row.get("path", row["name"]) for row in rows]
    kept = memory.setdefault("guids", {})
    if as_dict(kept.get(name)).get("names") != names:
        text = attempt(probe.run, "zpool", "status", "-g", name, default="")
        told = list_vdevs(attempt(parse_zpool_status, text, default={}).get(name, {}).get("vdevs", []))
        kept[name] = {"names": names, "guids": [row["name"] for row in told]}
    if len(kept[name]["guids"]) == len(rows):
        for row, guid in zip(rows, kept[name]["guids"]):
            row.update(known(guid=to_guid(guid)))


def note_io(probe: ProbeLike, memory: Fields, name: str, vdevs: list[Fields]) -> None:
    """Space of the top-level vdevs, and how long each disk took for an answer, on average since the import: asked for
    every half hour. Nanoseconds and bytes with -p, no space for what is below [openzfs cmd/zpool/zpool_main.c,
    print_vdev_stats]."""
    def ask() -> Fields:
        text = attempt(probe.run, "zpool", "iostat", "-HPlpv", name, default="")
        return {row.pop("name"): row for row in attempt(parse_columns, text, IO_COLUMNS, default=[])}
    rows = remember(probe, memory.setdefault("io", {}), name, ask, seconds=1800)
    for vdev in list_vdevs(vdevs):
        row = rows.get(vdev.get("path", vdev["name"]), {})
        used, free = to_count(row.get("alloc")), to_count(row.get("free"))
        if used is not None and free:
            vdev.update(allocated_bytes=used, size_bytes=used + free)
        for way in ("read", "write") if "children" not in vdev else ():
            wait = to_count(row.get(f"{way}_wait"))
            vdev.update(known(**{f"{way}_wait_seconds": round(wait / 1e9, 6) if wait else None}))


def list_vdevs(vdevs: list[Fields]) -> list[Fields]:
    """A tree of vdevs as a list, each before its children."""
    return [row for vdev in vdevs for row in (vdev, *list_vdevs(vdev.get("children", [])))]


def read_pool_space(probe: ProbeLike, name: str) -> Fields:
    """Raw space of the pool (raidz counts parity), and what its root dataset leaves users."""

    def ask(columns: list[str], *argv: str) -> dict[str, str | None]:
        rows = parse_columns(probe.run(*argv, name, limit=ZFS_LIMIT), columns)
        return next((row for row in rows if row["name"] == name), {})

    space: Fields = {}
    try:
        row = ask(POOL_COLUMNS, "zpool", "list", "-Hp", "-o", ",".join(POOL_COLUMNS))
        space = known(
            size_bytes=to_count(row.get("size")), allocated_bytes=to_count(row.get("alloc")),
            free_bytes=to_count(row.get("free")), capacity_ratio=to_ratio(row.get("cap")),
            fragmentation_ratio=to_ratio(row.get("frag")), dedup_ratio=to_number((row.get("dedup") or "").rstrip("x")),
            checkpoint_bytes=to_count(row.get("ckpoint")),
            readonly=None if row.get("readonly") is None else row["readonly"] == "on",
        )
        columns = ["name", "used", "avail", "refer"]
        row = ask(columns, "zfs", "list", "-Hp", "-d", "0", "-o", ",".join(columns), "-t", "filesystem")
        return space | known(usable_used_bytes=to_count(row.get("used")),
                             usable_available_bytes=to_count(row.get("avail")))  # fmt: skip
    except SourceError as error:
        return {**space, **unknown_because(error)}


def read_damaged_files(
    probe: ProbeLike, memory: Fields, name: str, guid: str, status: Fields
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
        except SourceError:
            pass  # their number is told; the names come when there is another one
    return {"damaged_files": kept["files"]} if kept["files"] else {}


def keep_scrub(memory: Fields, guid: str, scan: Fields) -> Fields:
    """The last finished scrub: a resilver, or a scrub that is canceled, overwrites it in ZFS."""
    scrubs = memory.setdefault("scrubs", {})
    if scan["function"] == "scrub" and scan["state"] == "finished" and "ended_at" in scan:
        told = {name: scan.get(name) for name in ("repaired_bytes", "errors")}
        duration = scan["ended_at"] - scan["started_at"] if "started_at" in scan else None
        scrubs[guid] = known(ended_at=scan["ended_at"], duration_seconds=duration, **told)
    return known(last_scrub=scrubs.get(guid))


def place_disks(probe: ProbeLike, pool: str, vdevs: list[Fields]) -> None:
    """Name the disk of each leaf, as `disks` names it, and keep for `disks` where in which pool it is. A pool that does
    not answer keeps the places that it had."""
    places: dict[str, dict[str, str]] = {}
    for vdev in vdevs:
        for leaf in list_vdevs([vdev]):
            disk = attempt(find_disk, probe, leaf["path"]) if leaf["type"] == "disk" and "path" in leaf else None
            if disk:
                leaf["disk"] = disk
                places.setdefault(disk, {"pool": pool, "vdev": vdev["name"]})  # a spare in use stands there twice
    others = {disk: place for disk, place in (probe.places or {}).items() if place["pool"] != pool}
    probe.places = {**places, **others}


def find_disk(probe: ProbeLike, path: str) -> str | None:
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


# datasets, snapshots

LAST_ARRIVALS = 6
SNAPSHOTS_LIMIT = 60.0  # seconds; 10,000 snapshots take some
LAST_SNAPSHOTS = 20  # so many intervals make the median
MANY_SNAPSHOTS = 200  # more new ones than this, and one listing with times is cheaper than to name them
HELD_MOST = 2000  # snapshots of a pool; `used` makes ZFS open each of them


def ask_pools(
    probe: ProbeLike, memory: Fields, ask: Callable[[str], list[Any]], tell: Callable[[str], Fields]
) -> list[Any]:
    """What `ask` gives for each pool, one pool per command; for one without an answer the row that `tell` makes of its
    name, with the reason. Without any answer there is no section.

    Of a suspended pool `zfs list` leaves out everything without a word: it is not asked.
    """
    found = []
    failed: list[SourceError] = []
    pools = read_pool_states(probe, memory)
    for pool in pools:
        try:
            if pool.get("state") == "SUSPENDED":
                raise SourceError("unavailable", f"{pool['name']} is suspended, its datasets cannot be listed")
            found += ask(pool["name"])
        except SourceError as error:
            failed.append(error)
            found.append({**tell(pool["name"]), **unknown_because(error)})
    if failed and len(failed) == len(pools):
        raise SourceError(failed[0].code, "; ".join(error.detail for error in failed))
    return found


@collector("datasets", tick=MEDIUM, needs=[require_zfs])
def collect_datasets(probe: ProbeLike, memory: Fields) -> list[Fields]:
    """Filesystems and volumes of each pool."""
    argv = ("zfs", "list", "-Hp", "-r", "-t", "filesystem,volume", "-o", ",".join(DATASET_COLUMNS))
    return ask_pools(
        probe, memory, lambda pool: parse_datasets(probe.run(*argv, pool, limit=ZFS_LIMIT)),
        lambda pool: {"name": pool, "type": "filesystem"},
    )


@collector("pool_settings", tick=SLOW, needs=[require_zfs])
def collect_pool_settings(probe: ProbeLike, memory: Fields) -> list[Fields]:
    """What was once chosen for a pool and costs ever after: sector size, compression, sync, volumes' block sizes."""
    return ask_pools(probe, memory, lambda pool: [read_pool_settings(probe, pool)], lambda pool: {"name": pool})


def read_pool_settings(probe: ProbeLike, pool: str) -> Fields:
    def ask(*words: str) -> dict[str, str]:
        return parse_tab_pairs(probe.run(*words, pool, limit=ZFS_LIMIT))

    values = ask("zpool", "get", "-Hp", "-o", "property,value", "ashift,autotrim")
    values |= ask("zfs", "get", "-Hp", "-o", "property,value", "compression,atime,sync")
    blocks = ask("zfs", "get", "-Hp", "-r", "-t", "volume", "-o", "name,value", "volblocksize")
    return known(
        name=pool,
        ashift=to_count(values.get("ashift")) or None,  # 0: each vdev has what its disks said when it was made
        autotrim=None if "autotrim" not in values else values["autotrim"] == "on",
        compression=values.get("compression"), atime=None if "atime" not in values else values["atime"] == "on",
        sync=values.get("sync"),
        volumes=[{"name": name, "block_bytes": to_count(value)} for name, value in blocks.items()],
    )


@collector("snapshots", tick=SLOW, needs=[require_zfs])
def collect_snapshots(probe: ProbeLike, memory: Fields) -> list[Fields]:
    """Snapshots per dataset and class: one cheap listing per pool, times only for guids that are new."""
    before = as_dict(memory.get("created"))
    kept: dict[str, int] = {}

    def ask(pool: str) -> list[Fields]:
        groups = group_snapshots(probe, pool)
        created = read_creations(probe, pool, groups, before)
        kept.update(created)
        held = read_held(probe, memory, pool, sum(map(len, groups.values())))
        return [
            {**build_snapshot_set(dataset, label, found, created), **known(used_bytes=held.get(f"{dataset}@{label}"))}
            for (dataset, label), found in groups.items()
        ]

    sets = ask_pools(probe, memory, ask, lambda pool: {"dataset": pool})
    dark = any("unknown_reason" in found for found in sets)
    memory["created"] = {**before, **kept} if dark else kept
    arrivals = as_dict(memory.get("arrivals"))
    whole = [row for row in sets if "class" in row]
    seen = {f"{row['dataset']}@{row['class']}": note_arrival(row, arrivals, probe.now()) for row in whole}
    memory["arrivals"] = {**arrivals, **seen} if dark else seen
    return sets


def note_arrival(row: Fields, arrivals: Fields, now: float) -> list[Any]:
    """When a snapshot came here, which on a replication target has little to do with when it was made: the newest
    one's guid, and when the last newest ones were first seen. The first one that we see may have been here for long."""
    guid, times = arrivals.get(f"{row['dataset']}@{row['class']}", [row["newest_guid"], []])
    if guid != row["newest_guid"]:
        times = [*times, int(now)][-LAST_ARRIVALS:]
    gaps = [later - earlier for earlier, later in zip(times, times[1:])]
    row.update(known(newest_seen_at=times[-1] if times else None, arrival_interval_seconds=max(gaps, default=None)))
    return [row["newest_guid"], times]


def group_snapshots(probe: ProbeLike, pool: str) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """(name, guid) of the snapshots by dataset and class, oldest first. Only name, guid and createtxg are cheap
    [openzfs cmd/zfs/zfs_iter.c]: anything else looks at every snapshot."""
    columns = ["name", "guid", "createtxg"]
    argv = ("zfs", "list", "-Hp", "-r", "-t", "snapshot", "-o", ",".join(columns), "-s", "createtxg", pool)
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row in parse_columns(probe.run(*argv, limit=SNAPSHOTS_LIMIT), columns):
        dataset, at, name = (row["name"] or "").partition("@")
        if at and row["guid"]:
            groups.setdefault((dataset, snapshot_class(dataset, name)), []).append((name, row["guid"]))
    return groups


def read_creations(
    probe: ProbeLike, pool: str, groups: dict[tuple[str, str], list[tuple[str, str]]], before: dict[str, int]
) -> dict[str, int]:
    """Unix time by guid of those that are needed: the oldest and the last of each group."""
    needed = {}
    for (dataset, _), found in groups.items():
        needed.update({guid: f"{dataset}@{name}" for name, guid in (found[0], *found[-LAST_SNAPSHOTS - 1 :])})
    created = {guid: before[guid] for guid in needed if guid in before}
    missing = {name: guid for guid, name in needed.items() if guid not in created}
    if not missing:
        return created
    if len(missing) > MANY_SNAPSHOTS:
        argv = ["zfs", "list", "-Hp", "-r", "-t", "snapshot", "-o", "name,creation", pool]
        text = probe.run(*argv, limit=SNAPSHOTS_LIMIT)
    else:  # one that was destroyed meanwhile makes it fail: the rest follows next time
        argv = ["zfs", "get", "-Hp", "-o", "name,value", "creation", *sorted(missing)]
        text = probe.run(*argv, limit=SNAPSHOTS_LIMIT, ok=None)
    for row in parse_columns(text, ["name", "creation"]):
        at = to_count(row["creation"])
        if row["name"] in missing and at is not None:
            created[missing[row["name"]]] = at
    return created


def read_held(probe: ProbeLike, memory: Fields, pool: str, count: int) -> dict[str, int]:
    """Bytes by dataset@class, asked for every six hours: the sum of what each snapshot alone holds, so at least what
    would be free without the class. What several hold together belongs to none [openzfs man/man7/zfsprops.7, used]."""
    def add_up() -> dict[str, int]:
        held: dict[str, int] = {}
        argv = ("zfs", "list", "-Hp", "-r", "-t", "snapshot", "-o", "name,used", pool)
        told = attempt(lambda: probe.run(*argv, limit=SNAPSHOTS_LIMIT), default="")
        for name, used in parse_tab_pairs(told).items():
            dataset, _, snapshot = name.partition("@")
            group = f"{dataset}@{snapshot_class(dataset, snapshot)}"
            held[group] = held.get(group, 0) + (to_count(used) or 0)
        return held
    few = 0 < count <= HELD_MOST
    return dict(remember(probe, memory.setdefault("held", {}), pool, add_up, seconds=6 * 3600)) if few else {}


def build_snapshot_set(dataset: str, label: str, found: list[tuple[str, str]], created: dict[str, int]) -> Fields:
    times = [created[guid] for _, guid in found[-LAST_SNAPSHOTS - 1 :] if guid in created]
    intervals = sorted(later - earlier for earlier, later in zip(times, times[1:]))
    name, guid = found[-1]
    return known(
        dataset=dataset, **{"class": label}, count=len(found), newest_at=created.get(guid), newest_name=name,
        newest_guid=guid, oldest_at=created.get(found[0][1]),
        interval_seconds=intervals[len(intervals) // 2] if intervals else None,
    )


# backups, replication, ha

FIRST_BACKUPS = 60  # so many finished backup tasks are read back at the first start
REMOTE_TYPES = ("nfs", "cifs", "smb", "fuse", "ceph", "gluster", "9p")
LONGEST_BACKUP = DAY // 2


@collector("backups", tick=MEDIUM, needs=[require_pve, read_version_file])
def collect_backups(probe: ProbeLike, memory: Fields) -> Fields:
    """Backup jobs, and the newest good and failed run of each guest: task logs, vzdump's logs, local dump folders."""
    guests: dict[str, Fields] = memory.setdefault("guests", {})
    for part in (read_task_backups, read_vzdump_logs, read_dump_folders):
        with part_of(probe, "backups"):
            part(probe, memory, guests)
    listed = attempt(lambda: parse_vmlist(probe.read("/etc/pve/.vmlist")))
    for vmid in [vmid for vmid in guests if listed is not None and vmid not in listed]:
        del guests[vmid]  # no longer in the cluster
    return {
        "jobs": read_backup_jobs(probe),
        "guests": [{"vmid": int(vmid), **runs} for vmid, runs in sorted(guests.items(), key=lambda pair: int(pair[0]))],
    }


def read_backup_jobs(probe: ProbeLike) -> list[Fields]:
    """The jobs of jobs.cfg, and those that older releases left in vzdump.cron, with the guests each selects."""
    sections = parse_sections(optional(probe.read, "/etc/pve/jobs.cfg", default=""))
    jobs = [(name, values) for kind, name, values in sections if kind == "vzdump"]
    with part_of(probe, "backups"):
        jobs += parse_vzdump_cron(optional(probe.read, "/etc/pve/vzdump.cron", default=""))
    pools: dict[str, set[int]] | None = None
    if any(values.get("pool") for _, values in jobs):
        with part_of(probe, "backups"):
            pools = parse_resource_pools(probe.read("/etc/pve/user.cfg"))
    return [build_backup_job(probe, name, values, pools) for name, values in jobs]


def build_backup_job(
    probe: ProbeLike, name: str, values: dict[str, str], pools: dict[str, set[int]] | None
) -> Fields:
    """A pool goes before a list of guests, and that before "all"; only with that does `exclude` count
    [pve-manager PVE/VZDump.pm get_included_guests]."""
    enabled, schedule = flag_of(values, "enabled", default=True), values.get("schedule", "")
    every = not values.get("pool") and not values.get("vmid") and flag_of(values, "all")
    guests: Any = "all" if every else parse_vmids(values.get("vmid"))
    if values.get("pool"):
        guests = None if pools is None else sorted(pools.get(values["pool"], ()))
    return known(
        id=name, enabled=enabled, schedule=schedule or None, storage=values.get("storage"), guests=guests,
        exclude=parse_vmids(values.get("exclude")) if every else [], pool=values.get("pool"), node=values.get("node"),
        mode=values.get("mode"), **read_job_state(probe, name),
        **(due_fields(schedule, probe.now()) if enabled else {}),
    )


def read_job_state(probe: ProbeLike, name: str) -> Fields:
    """What this node last made of the job (OK, an error, or created, starting, started), and when that began."""
    state: Fields = {}
    if "/" not in name:
        with part_of(probe, "backups"):
            text = optional(probe.read, f"/var/lib/pve-manager/jobs/vzdump-{name}.json", default="{}")
            state = parse_object(text, f"state of backup job {name}")
    told = state.get("msg") if state.get("state") == "stopped" else state.get("state")
    began = as_dict(parse_upid(str(state.get("upid")))).get("started_at", to_count(state.get("time")))
    return known(last_state=told[:500] if isinstance(told, str) else None, last_run_at=began)


def read_task_backups(probe: ProbeLike, memory: Fields, guests: dict[str, Fields]) -> None:
    """Backup tasks that ended since the last time. A job of several guests names them in its log only."""
    lines = follow_tasks(probe, memory.setdefault("place", {}), from_start=True)
    tasks = [task for task in map(parse_task_line, lines) if task and task["type"] == "vzdump"]
    for task in tasks[-FIRST_BACKUPS:]:
        start = task["upid"].split(":")[4]
        text = attempt(probe.read, f"{TASKS_FOLDER}/{start[-1]}/{task['upid']}", default="")
        storage, runs = parse_vzdump_log(text)
        if not runs and "vmid" in task and task["result"] in ("ok", "warning", "error"):
            runs = [known(vmid=task["vmid"], ok=task["result"] != "error", error=task["status"])]
        end, last = task["started_at"], task["ended_at"]
        for run in runs:  # the log's local time if that lies within the task, else by the durations so far
            told = parse_local_time(run.get("finished", ""))
            if told is not None and task["started_at"] - 5 <= told <= last + 5:
                end = told
            else:
                end = min(last, end + run["duration_seconds"]) if "duration_seconds" in run else last
            note_backup(guests, run, end, storage)


def note_backup(guests: dict[str, Fields], run: Fields, ended: int, storage: str | None) -> None:
    """Keep the run when it is the newest good, or the newest failed one of its guest."""
    if run["ok"] is None:
        return  # not finished, or killed: that is no outcome
    kept = guests.setdefault(str(run["vmid"]), {})
    name = "newest_ok" if run["ok"] else "newest_failed"
    if kept.get(name, {}).get("ended_at", 0) > ended:
        return
    if run["ok"]:
        duration = run.get("duration_seconds")
        kept[name] = known(
            ended_at=ended, started_at=None if duration is None else ended - duration, duration_seconds=duration,
            size_bytes=run.get("size_bytes"), storage=storage, excluded_disks=run.get("excluded_disks", []),
        )
    else:
        kept[name] = known(ended_at=ended, error=run.get("error"))


def read_vzdump_logs(probe: ProbeLike, memory: Fields, guests: dict[str, Fields]) -> None:
    """/var/log/vzdump: the last run of each guest on this node, for those whose task log is gone."""
    seen = memory.setdefault("logs", {})
    for name in optional(probe.list_dir, "/var/log/vzdump", default=[]):
        kind, _, rest = name.partition("-")
        vmid, dot, ending = rest.partition(".")
        stat = attempt(probe.stat, f"/var/log/vzdump/{name}") if kind in ("qemu", "lxc") and ending == "log" else None
        if stat is None or not is_whole(vmid) or seen.get(name) == [stat.st_mtime, stat.st_size]:
            continue
        storage, runs = parse_vzdump_log(attempt(probe.read, f"/var/log/vzdump/{name}", default=""))
        known_ends = [run.get("ended_at", 0) for run in guests.get(vmid, {}).values()]
        for run in runs:
            ended = parse_local_time(run.get("finished", "")) or int(stat.st_mtime)
            if all(abs(ended - end) > 120 for end in known_ends):  # else the task log has told it, with more
                note_backup(guests, run, ended, storage)
        seen[name] = [stat.st_mtime, stat.st_size]


def read_dump_folders(probe: ProbeLike, memory: Fields, guests: dict[str, Fields]) -> None:
    """Archives in the dump folders of local storages, listed by a process that can be left behind if it hangs."""
    node = node_name(probe)
    for kind, storage, values in parse_storages(optional(probe.read, "/etc/pve/storage.cfg", default="")):
        if kind not in ("dir", "btrfs") or flag_of(values, "disable") or not is_here(values, node):
            continue
        folders = dict(part.partition("=")[::2] for part in split_list(values.get("content-dirs")))
        folder = f"{values.get('path', '').rstrip('/')}/{folders.get('backup', 'dump').strip('/')}"
        if "backup" not in split_list(values.get("content")) or not folder.startswith("/"):
            continue
        with part_of(probe, "backups", storage):
            if is_safe_to_list(probe, folder):
                argv = ("find", folder, "-maxdepth", "1", "-type", "f", "-name", "vzdump-*")
                note_archives(guests, storage, probe.run(*argv, "-printf", "%s\\t%T@\\t%f\\0", ok=(0, 1)))


def is_safe_to_list(probe: ProbeLike, folder: str) -> bool:
    """Not on a network file system, and not on a suspended pool: listing may hang there for good."""
    best = ("", "", "")
    for line in probe.read("/proc/mounts").splitlines():
        device, target, kind = [*line.split(), "", "", ""][:3]
        target = target.replace("\\040", " ")
        if f"{folder}/".startswith(f"{target.rstrip('/')}/") and len(target) >= len(best[1]):
            best = (device.replace("\\040", " "), target, kind)
    if best[2].startswith(REMOTE_TYPES):
        return False
    pool = best[0].partition("/")[0]
    return best[2] != "zfs" or read_word(probe, f"{ZFS_KSTAT}/{pool}/state") != "SUSPENDED"


def note_archives(guests: dict[str, Fields], storage: str, listing: str) -> None:
    """The newest archive of each guest: its size for the run that is known, or a run nobody has told of.

    Its name says when it was begun; the file's time is its end, unless it was copied or touched since.
    """
    newest: dict[int, tuple[int, int, int]] = {}
    for entry in listing.split("\0"):
        size, _, rest = entry.partition("\t")
        stamp, _, name = rest.partition("\t")
        archive, at = parse_archive_name(name), to_count(stamp)
        if archive is not None and at is not None:
            vmid, began = archive
            ended = at if began <= at <= began + LONGEST_BACKUP else began
            newest[vmid] = max(newest.get(vmid, (0, 0, 0)), (began, ended, to_count(size) or 0))
    for vmid, (began, ended, length) in newest.items():
        told = guests.get(str(vmid), {}).get("newest_ok", {})
        same = told.get("started_at", told.get("ended_at", 0)) - 120 <= began <= told.get("ended_at", 0) + 120
        if same and told.get("storage", storage) == storage:
            told.update(size_bytes=length, storage=storage)
        elif ended > told.get("ended_at", 0):
            run = {"ended_at": ended, "started_at": began, "size_bytes": length, "storage": storage}
            guests.setdefault(str(vmid), {})["newest_ok"] = run


@collector("replication", tick=MEDIUM, needs=[require_cluster])
def collect_replication(probe: ProbeLike, memory: Fields) -> list[Fields]:
    """Replication jobs of the guests on this node. A state file that cannot be read makes the state unknown."""
    node, listing = node_name(probe), parse_vmlist(probe.read("/etc/pve/.vmlist"))
    states: Fields = {}
    dark: Fields = {}
    try:
        text = optional(probe.read, "/var/lib/pve-manager/pve-replication-state.json", default="{}")
        states = parse_object(text, "replication state")
    except SourceError as error:
        dark = unknown_because(error)
    jobs = []
    for kind, name, values in parse_sections(optional(probe.read, "/etc/pve/replication.cfg", default=""), r"\d+-\d+"):
        vmid, number = (str(int(part)) for part in name.split("-"))
        if kind == "local" and vmid in listing and listing[vmid][0] == node and "remove_job" not in values:
            state = as_dict(dig(states, vmid, f"local/{values.get('target')}"))
            jobs.append({**build_replication(f"{vmid}-{number}", vmid, values, state, probe.now()), **dark})
    return jobs


def build_replication(name: str, vmid: str, values: dict[str, str], state: Fields, now: float) -> Fields:
    error, schedule, enabled = state.get("error"), values.get("schedule", "*/15"), not flag_of(values, "disable")
    last_sync, last_try = (to_count(state.get(name)) or None for name in ("last_sync", "last_try"))  # 0: never
    return known(
        id=name, vmid=int(vmid), target=values.get("target"), schedule=schedule, enabled=enabled,
        **(due_fields(schedule, now) if enabled else {}), last_sync_at=last_sync, last_try_at=last_try,
        duration_seconds=to_number(state.get("duration")), fail_count=to_count(state.get("fail_count")),
        error=error[:500] if isinstance(error, str) else None,
    )


@collector("ha", tick=MEDIUM, needs=[require_cluster])
def collect_ha(probe: ProbeLike, memory: Fields) -> Fields:
    """HA's manager, services and this node's LRM, from the files they keep.

    A manager with nothing to manage stops writing: idle. Else it writes every 10 s, and silence is its death.
    """
    text = optional(probe.read, "/etc/pve/ha/manager_status")
    if text is None:
        raise Absent("no HA manager has ever run")
    status = parse_object(text, "ha/manager_status")
    stamp, services = to_count(status.get("timestamp")), as_dict(status.get("service_status"))
    writes = stamp is not None and abs(probe.now() - stamp) <= DEAD_SECONDS
    lrm: Fields = {}
    with part_of(probe, "ha"):
        path = f"/etc/pve/nodes/{node_name(probe)}/lrm_status"
        lrm = parse_object(optional(probe.read, path, default="{}"), "lrm_status")
    return known(
        manager="active" if writes else "dead" if services else "idle", master=to_word(status.get("master_node")),
        manager_as_of=stamp,
        disarm=known(**{word: to_word(dig(status, "disarm", word)) for word in ("mode", "state")}) or None,
        nodes=[known(name=name, state=to_word(state))
               for name, state in sorted(as_dict(status.get("node_status")).items())],
        services=[known(id=name, **{word: to_word(dig(service, word)) for word in ("node", "state")})
                  for name, service in sorted(services.items())],
        lrm=known(state=to_word(lrm.get("state")), mode=to_word(lrm.get("mode")),
                  as_of=to_count(lrm.get("timestamp"))) or None,
    )  # fmt: skip


# services, time_sync

UNITS = (
    "pve-cluster pvestatd pvedaemon pveproxy pvescheduler pve-firewall pve-ha-crm pve-ha-lrm corosync qmeventd "
    "watchdog-mux zfs-zed zfs-mount zfs-import-cache zfs-import-scan pve-guests pve-lxc-syscalld lxcfs spiceproxy "
    "smartmontools chrony systemd-timesyncd ntpsec ksmtuned rrdcached ssh postfix"
).split()
UNIT_FIELDS = {
    "Id": "unit", "LoadState": "load", "ActiveState": "active", "SubState": "sub", "UnitFileState": "enabled",
    "NRestarts": "restarts",
}


@collector("services", tick=MEDIUM, needs=[require_systemd])
def collect_services(probe: ProbeLike, memory: Fields) -> list[Fields]:
    """PVE's, ZFS's and time services, in one call; those that are not installed are no fault and left out."""
    text = probe.run("systemctl", "show", "-p", ",".join(UNIT_FIELDS), *[f"{unit}.service" for unit in UNITS], ok=None)
    blocks = parse_blocks(text)
    if not blocks:
        raise SourceError("garbage", f"systemctl show: {text[:80]!r}")
    services = []
    for block in blocks:
        if block.get("LoadState") != "not-found":
            words = {field: block.get(name) for name, field in UNIT_FIELDS.items()}
            more = {"enabled": words["enabled"] or None, "restarts": to_count(words["restarts"])}
            services.append(known(**{**words, **more}))
    return services


@collector("failed_units", tick=MEDIUM, needs=[require_systemd])
def collect_failed_units(probe: ProbeLike, memory: Fields) -> list[str]:
    """All units of the system that have failed."""
    text = probe.run("systemctl", "list-units", "--failed", "--plain", "--no-legend")
    return [line.split()[0] for line in text.splitlines() if line.split()]


@collector("time_sync", tick=MEDIUM)
def collect_time_sync(probe: ProbeLike, memory: Fields) -> Fields:
    """chrony's word; without chrony the kernel's flag, which every daemon sets, but no offset."""
    try:
        return parse_chrony_tracking(probe.run("chronyc", "-c", "-n", "tracking"))
    except SourceError as error:
        told = error
    try:
        text = probe.run("timedatectl", "show", "-p", "NTPSynchronized")
    except SourceError as error:
        if told.code == "missing" and not probe.exists("/run/systemd/system"):
            raise Absent("neither chrony nor systemd") from None
        raise SourceError(error.code, f"{told.detail}; {error.detail}") from None
    value = next(iter(parse_blocks(text)), {}).get("NTPSynchronized")
    if value not in ("yes", "no"):
        raise SourceError("garbage", f"timedatectl: {text[:80]!r}")
    return {"source": "kernel", "synchronised": value == "yes"}


# disks

SMART_PRIVATE = ("type", "protocol", "rotation_rate")  # for the collector, not for the report
SMART_IDENTITY = ("model", "serial", "wwn", "firmware", "size_bytes", "protocol", "rotation_rate")
SMART_LIMIT = 30.0  # seconds for one disk
VIRTUAL_DISKS = ("vd", "xvd", "mmcblk")
VIRTUAL_MODELS = ("QEMU", "VBOX", "VMware", "Virtual disk", "Virtual Disk")
RAID_NAMES = ("megaraid", "cciss", "areca", "aacraid", "3ware")
BRIDGE_WORDS = ("Unknown USB bridge", "specify device type", "unsupported field in scsi command")


@collector("disks", tick=SLOW, needs=[require("/sys/block", "no /sys here")])
def collect_disks(probe: ProbeLike, memory: Fields) -> list[Fields]:
    """Identity, SMART and place in a pool of every disk, one after the other; a sleeping disk is not woken.

    What is kept of a disk (its type for smartctl, its last values) goes by its identity, never by its letter.
    """
    links = attempt(read_disk_links, probe, default={})
    boot_id = read_word(probe, "/proc/sys/kernel/random/boot_id")
    before, kept = as_dict(memory.get("smart")), {}
    disks: list[Fields] = []
    for name in probe.list_dir("/sys/block"):
        if is_disk(probe, name):
            disk = read_sysfs_disk(probe, name, links.get(name, []))
            key = disk_key(disk, boot_id)
            # An NVMe disk is asked by its controller; where there are several (native multipath), by its namespace, as
            # the numbers of the two have nothing in common then: nvme3n1 may hang on nvme33.
            controller = find_text(r"/(nvme\d+)/", attempt(probe.readlink, f"/sys/block/{name}", default=""))
            smart, kept[key] = read_smart(probe, f"/dev/{controller or name}", as_dict(before.get(key)))
            add_disk(disks, {**disk, **smart})
    if any(disk.get("protocol") == "SCSI" and "passed" not in disk for disk in disks):
        for disk in read_raid_disks(probe, before, kept):
            add_disk(disks, disk)
    memory["smart"] = kept
    if probe.places is None and attempt(probe.exists, "/sys/module/zfs", default=False):
        for pool in attempt(read_pool_states, probe, {}, default=[]):  # `pools` has not read them yet
            if pool.get("state") != "SUSPENDED":
                status = attempt(read_pool_status, probe, {}, pool["name"], default={})
                place_disks(probe, pool["name"], status.get("vdevs", []))
    places = probe.places or {}
    for disk in disks:
        place = next((places[name] for name in [disk["name"], *disk.get("paths", [])] if name in places), {})
        disk.update(place)
    return [{field: value for field, value in disk.items() if field not in SMART_PRIVATE} for disk in disks]


def is_disk(probe: ProbeLike, name: str) -> bool:
    """A real disk: what lies on others, and virtual ones, have no SMART."""
    if NO_DISK.match(name) or name.startswith(VIRTUAL_DISKS) or not probe.exists(f"/sys/block/{name}/device"):
        return False
    return not attempt(probe.read, f"/sys/block/{name}/device/model", default="").startswith(VIRTUAL_MODELS)


def read_disk_links(probe: ProbeLike) -> dict[str, list[str]]:
    """The names below /dev/disk/by-id of each whole disk, the telling ones (ata-, nvme-, scsi- with model and serial)
    first."""
    found: dict[str, list[tuple[bool, bool, str]]] = {}
    for link in probe.list_dir("/dev/disk/by-id"):
        target = attempt(probe.readlink, f"/dev/disk/by-id/{link}", default="").rpartition("/")[2]
        if target and not re.search(r"-part\d+$", link):
            bare = link.startswith(("nvme-eui.", "nvme-nvme.", "nvme-uuid.", "scsi-3", "scsi-S", "wwn-"))
            found.setdefault(target, []).append((bare, not link.startswith(("ata-", "nvme-", "scsi-")), link))
    return {target: [link for _, _, link in sorted(ranked)] for target, ranked in found.items()}


def read_sysfs_disk(probe: ProbeLike, name: str, links: list[str]) -> Fields:
    """What the kernel says of a disk, without asking the disk. `listed`: it is there, whatever smartctl says."""
    base = f"/sys/block/{name}"
    sectors, spinning, model, serial, firmware = (
        read_word(probe, f"{base}/{file}") or None
        for file in ("size", "queue/rotational", "device/model", "device/serial", "device/firmware_rev")
    )
    wwn = next((link.removeprefix("wwn-") for link in links if re.fullmatch(r"wwn-0x[0-9a-f]+", link)), None)
    return known(
        name=name, by_id=links[0] if links else None, listed=True, size_bytes=(to_count(sectors) or 0) * 512 or None,
        kind="nvme" if name.startswith("nvme") else {"1": "hdd", "0": "ssd"}.get(spinning or ""), model=model,
        serial=serial, wwn=wwn, firmware=firmware,
    )


def disk_key(disk: Fields, boot_id: str) -> str:
    """By what to remember a disk: what moves with it. Where nothing is known of that, the letter, for this boot."""
    for field in ("by_id", "wwn", "serial"):
        if disk.get(field):
            return f"{field} {disk[field]}"
    return f"{disk['name']} {disk.get('model')} {disk.get('size_bytes')} {boot_id}"


def add_disk(disks: list[Fields], disk: Fields) -> None:
    """One row for a disk, however many ways lead to it: two ports, multipath, or a RAID controller beside. Serials of
    USB bridges are not unique, so a disk counts as the same only with its wwn or its model too."""
    for other in disks:
        fields = [field for field in ("wwn", "model", "size_bytes") if field in disk and field in other]
        if "serial" in disk and all(disk[field] == other.get(field) for field in ("serial", *fields)) and fields:
            other.setdefault("paths", []).append(disk["name"])
            return
    disks.append(disk)


def read_smart(probe: ProbeLike, device: str, before: Fields) -> tuple[Fields, Fields]:
    """SMART values, and what to keep of them. Asleep: the last ones, with their time. Without an answer: who it is, and
    why no more is known."""
    values, now = as_dict(before.get("values")), int(probe.now())
    try:
        smart = ask_smartctl(probe, device, before.get("type"), now)
    except SourceError as error:
        identity = {field: values[field] for field in SMART_IDENTITY if field in values}
        return {**identity, **unknown_because(error)}, before
    if smart.pop("asleep", False):
        return {**values, **known(standby=True, as_of=before.get("at") if values else None)}, before or smart
    values = {field: value for field, value in smart.items() if field != "type"}
    if "passed" not in smart:
        smart["unknown_reason"] = "smartctl gives no verdict: a RAID volume, or a bridge that hides the disk"
    return {**smart, "standby": False}, {"type": smart.get("type"), "at": now, "values": values}


def ask_smartctl(probe: ProbeLike, device: str, kind: str | None, now: int) -> Fields:
    """-n standby,3: do not wake it, and tell sleep (3) from failure (2). A known type spares the detection, which wakes
    some disks too; where it does not fit any more, or a bridge is not known, the next way is tried once."""
    argv = ["smartctl", "-j", "-i", "-H", "-A"]
    argv += [] if device.startswith("/dev/nvme") else ["-n", "standby,3", "-l", "error", "-l", "selftest"]
    try:
        typed = ["-d", kind] if kind else []
        return parse_smart(probe.run(*argv, *typed, device, limit=SMART_LIMIT, ok=None), now)
    except SourceError as error:
        if error.code != "failed" or kind and device.startswith("/dev/bus/"):
            raise
        if kind:
            return ask_smartctl(probe, device, None, now)
        if not any(words in error.detail for words in BRIDGE_WORDS):
            raise
        told = error
    try:
        return parse_smart(probe.run(*argv, "-d", "sat", device, limit=SMART_LIMIT, ok=None), now)
    except SourceError:
        raise told from None


def read_raid_disks(probe: ProbeLike, before: Fields, kept: Fields) -> Iterator[Fields]:
    """Disks behind a RAID controller, whose volume has no SMART: smartctl knows how to reach them."""
    scan = attempt(probe.run, "smartctl", "--scan", "-j", default="{}")
    for device in as_list(attempt(parse_object, scan, "smartctl --scan", default={}).get("devices")):
        name, kind = as_dict(device).get("name"), as_dict(device).get("type")
        if not isinstance(name, str) or not isinstance(kind, str) or not any(raid in kind for raid in RAID_NAMES):
            continue
        label = f"{name.removeprefix('/dev/')} {kind}"
        smart, kept[label] = read_smart(probe, name, {**as_dict(before.get(label)), "type": kind})
        rate = smart.get("rotation_rate")
        yield known(name=label, kind=None if rate is None else "hdd" if rate else "ssd", **smart)


# mail_queue, updates, certificates, subscription, versions, ceph

PACKAGE_LISTS = ("/var/cache/apt/pkgcache.bin", "/var/lib/dpkg/status")
PKGUPDATES = "/var/lib/pve-manager/pkgupdates"
CERTIFICATES = ("nodes/{node}/pveproxy-ssl.pem", "nodes/{node}/pve-ssl.pem", "pve-root-ca.pem")
POSTFIX = "/var/spool/postfix"
QUEUE_LOOKS = 200  # so many of the oldest files are looked into


@collector("mail_queue", tick=SLOW)
def collect_mail_queue(probe: ProbeLike, memory: Fields) -> Fields:
    """How many messages wait in Postfix's folders, and since when the oldest: the host's own warnings go that way."""
    if not probe.exists(POSTFIX):
        raise Absent("no Postfix here")
    folders = ("active", "deferred", "hold", "incoming")
    # deferred/ is spread over folders of one letter; %C@ is when a file was moved or tried last
    argv = ("find", *(f"{POSTFIX}/{folder}" for folder in folders), "-maxdepth", "3", "-type", "f")
    files = [line.partition("\t") for line in probe.run(*argv, "-printf", "%C@\\t%p\\n", ok=(0, 1)).splitlines()]
    counts = {folder: sum(path.startswith(f"{POSTFIX}/{folder}/") for _, _, path in files) for folder in folders}
    oldest = [path for _, path in sorted((to_number(at) or 0, path) for at, _, path in files)[:QUEUE_LOOKS]]
    # a message that was delivered meanwhile is gone: exit code 1
    text = probe.run("head", "-v", "-c", "256", *oldest, ok=(0, 1)) if oldest else ""
    return known(**counts, oldest_at=min(parse_queue_times(text), default=None))


@collector("updates", tick=SLOW, needs=[require_pve])
def collect_updates(probe: ProbeLike, memory: Fields) -> Fields:
    """Pending updates as PVE's daily job listed them; where dpkg's state is newer, without those done since."""
    written = probe.stat(PKGUPDATES).st_mtime
    updates = parse_json(probe.read(PKGUPDATES), PKGUPDATES)
    if not isinstance(updates, list):
        raise SourceError("garbage", f"{PKGUPDATES}: a list was expected")
    updates = [update for update in updates if isinstance(update, dict) and isinstance(update.get("Package"), str)]
    changed = [stat.st_mtime for stat in (attempt(probe.stat, path) for path in PACKAGE_LISTS) if stat is not None]
    if any(at > written for at in changed):
        installed = read_packages(probe)
        updates = [update for update in updates if installed.get(update["Package"], "?") != update.get("Version")]
    # How many of them close holes: by the archive that apt would take them from, as all of Debian's look alike in
    # Proxmox's own list. Asked anew when a list has changed; apt simulates, writes nothing and needs no lock.
    key = [written, *changed]
    if updates and dig(memory, "security", "key") != key:
        argv = ("apt-get", "-s", "-qq", "-o", "Debug::NoLocking=1", "dist-upgrade")
        text = attempt(lambda: probe.run(*argv, limit=60.0))
        memory["security"] = {} if text is None else {"key": key, "count": parse_security(text)}
    security = dig(memory, "security", "count") if updates else 0
    packages = [update["Package"] for update in updates[:50]]
    return known(pending=len(updates), security=security, as_of=int(written), packages=packages)


def read_packages(probe: ProbeLike, *names: str) -> dict[str, str]:
    """Installed versions by package name."""
    text = probe.run("dpkg-query", "-W", "-f", "${Package}\\t${Version}\\n", *names, ok=(0, 1))
    return dict(line.partition("\t")[::2] for line in text.splitlines())


@collector("certificates", tick=SLOW, needs=[require_pve, read_version_file])
def collect_certificates(probe: ProbeLike, memory: Fields) -> list[Fields]:
    """Who they are for, who signed, until when. Never the certificate itself."""
    node = node_name(probe)
    config = attempt(probe.read, f"/etc/pve/nodes/{node}/config", default="")
    acme = any(line.startswith("acme") for line in config.splitlines())
    certificates = []
    for file in CERTIFICATES:
        path = f"/etc/pve/{file.format(node=node)}"
        if not probe.exists(path):
            continue
        name = path.rpartition("/")[2]
        try:
            text = probe.run("openssl", "x509", "-in", path, "-noout", "-dates", "-subject", "-issuer")
            certificates.append({"file": name, **parse_certificate(text), "acme": acme and name == "pveproxy-ssl.pem"})
        except SourceError as error:
            certificates.append({"file": name, **unknown_because(error)})
    return certificates


@collector("subscription", tick=SLOW, needs=[require_pve])
def collect_subscription(probe: ProbeLike, memory: Fields) -> Fields:
    """Status, level and due date; the key and the server's id are not sent."""
    return parse_subscription(optional(probe.read, "/etc/subscription", default=""))


@collector("versions", tick=SLOW)
def collect_versions(probe: ProbeLike, memory: Fields) -> Fields:
    """What runs here. The module and the tools of ZFS differ after an upgrade without a reboot; a digest is enough to
    see that storage.cfg is not the same on all hosts."""
    packages: dict[str, str] = {}
    with part_of(probe, "versions"):
        packages = optional(read_packages, probe, "pve-qemu-kvm", "smartmontools", "zfsutils-linux", default={})
    tools, config = packages.get("zfsutils-linux"), attempt(probe.read, "/etc/pve/storage.cfg")
    if not tools and probe.exists("/sys/module/zfs"):  # not Debian's; `zfs` would load the module where it is not
        tools = attempt(probe.run, "zfs", "version", default="").partition("\n")[0].removeprefix("zfs-").strip()
    return known(
        pve=parse_pve_version(attempt(probe.read, PVECFG, default="")),
        zfs_module=read_word(probe, "/sys/module/zfs/version") or None, zfs_userland=tools or None,
        qemu=packages.get("pve-qemu-kvm") or None, smartctl=packages.get("smartmontools") or None,
        agent_python=sys.version.split()[0],
        microcode=find_text(r"(?m)^microcode\s*:\s*(\S+)", attempt(probe.read, "/proc/cpuinfo", default="")) or None,
        storage_cfg_digest=None if config is None else hashlib.sha256(config.encode()).hexdigest()[:12],
    )


@collector("safeguards", tick=SLOW)
def collect_safeguards(probe: ProbeLike, memory: Fields) -> Fields:
    """What should speak up when something fails: mails, timers, sources of updates. A part that is not there is left
    out: no ZFS, no zed."""
    found: Fields = {}
    for read in (read_zed_mail, read_zfs_timers, read_pve_mail, read_apt_sources):
        with part_of(probe, "safeguards"):
            found.update(read(probe))
    if not found:
        raise Absent("neither Debian nor Proxmox")
    return found


def read_zed_mail(probe: ProbeLike) -> Fields:
    """ZED mails only if ZED_EMAIL_ADDR is set; its own zed.rc says root (openzfs, cmd/zed/zed.d/zed.rc)."""
    text = optional(probe.read, "/etc/zfs/zed.d/zed.rc")
    return {} if text is None else {"zed_mail": bool(parse_shell_setting(text, "ZED_EMAIL_ADDR"))}


def read_zfs_timers(probe: ProbeLike) -> Fields:
    """Scrub and trim come from Debian's /etc/cron.d/zfsutils-linux, or from timers a person has enabled."""
    if not probe.exists("/sys/module/zfs"):
        return {}
    cron = optional(probe.read, "/etc/cron.d/zfsutils-linux", default="")
    lines = [line for line in cron.splitlines() if not line.lstrip().startswith("#")]
    wanted = optional(probe.list_dir, "/etc/systemd/system/timers.target.wants", default=[])
    text = "\n".join([*lines, *(name.replace("zfs-", "zfs-linux/", 1) for name in wanted if name.startswith("zfs-"))])
    return {f"{task}_scheduled": f"zfs-linux/{task}" in text for task in ("scrub", "trim")}


def read_pve_mail(probe: ProbeLike) -> Fields:
    """Where Proxmox's own notifications go."""
    if not probe.exists(PVECFG):
        return {}
    users = optional(probe.read, "/etc/pve/user.cfg")
    notifications = optional(probe.read, "/etc/pve/notifications.cfg", default="")
    mail = {} if users is None else {"root_mail": parse_root_mail(users)}
    return {**mail, **parse_notifications(notifications)}


def read_apt_sources(probe: ProbeLike) -> Fields:
    folder = "/etc/apt/sources.list.d"
    names = optional(probe.list_dir, folder, default=[])
    paths = ["/etc/apt/sources.list", *(f"{folder}/{name}" for name in names if name.endswith((".list", ".sources")))]
    texts = {path: text for path in paths if (text := optional(probe.read, path)) is not None}
    parsed = [parse_apt_sources(text, deb822=path.endswith(".sources")) for path, text in texts.items()]
    return judge_apt_sources([source for sources in parsed for source in sources]) if texts else {}


@collector("ceph", tick=SLOW, needs=[require_pve, read_version_file, require("/etc/pve/ceph.conf", "no ceph.conf")])
def collect_ceph(probe: ProbeLike, memory: Fields) -> Fields:
    """Health and its checks; only where Ceph is set up."""
    if attempt(probe.find, "ceph") is None:
        raise Absent("a node of the cluster without Ceph")
    return parse_ceph_status(probe.run("ceph", "-s", "--format", "json", "--connect-timeout", "10", limit=20.0))


# --- report: run what is due, keep sections and errors apart, wrap with host, tick, time and sequence ---

HEADER_KEYS = {"version", "host_id", "tick", "time", "run_id", "seq", "agent", "absent", "errors"}
Gathered = tuple[Fields, list[str], dict[str, dict[str, str]]]  # sections, absent, errors


def names_of(*ticks: str) -> list[str]:
    """The sections of these ticks, in the report's order."""
    return [name for name, collector in COLLECTORS.items() if collector.tick in ticks]


def collect(probe: ProbeLike, memories: dict[str, Fields], names: Iterable[str]) -> Gathered:
    """Sections, absent, errors of these collectors. One that fails costs only its own section."""
    sections: Fields = {}
    absent: list[str] = []
    errors: dict[str, dict[str, str]] = {}
    for name in names:
        section, problem = None, None
        with COLLECTORS[name].lock:  # never twice at a time: its memory is its own
            probe.problems.pop(name, None)
            try:
                section = COLLECTORS[name].function(probe, memories.setdefault(name, {}))
            except Absent:
                absent.append(name)
                continue
            except SourceError as error:
                problem = {"code": error.code, "detail": error.detail}
            except Exception as error:  # a fault of ours in one section must not darken the others
                problem = {"code": "failed", "detail": f"fault in the agent: {describe_fault(error)}"}
            partial = probe.problems.pop(name, None)
        if partial and isinstance(section, dict):  # what could be had is told, and says what could not
            section.setdefault("unknown_reason", f"{partial['code']}: {partial['detail']}"[:DETAIL_LIMIT])
        else:
            problem = problem or partial
        if section is not None:  # else nothing is to be reported this time
            sections[name] = section
        if problem:
            errors[name] = {**problem, "detail": problem["detail"][:DETAIL_LIMIT]}
    return sections, absent, errors


def describe_fault(error: BaseException) -> str:
    """Kind, text and line of an exception, without a traceback's length."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    line = trace.tb_lineno if trace is not None else 0
    return f"{type(error).__name__}: {error} (line {line})"[:DETAIL_LIMIT]


class Reporter:
    """Numbers and wraps reports: `run_id` is random for each start, `seq` counts from 1 without gaps."""

    def __init__(self, host_id: str, now: float) -> None:
        self.host_id = host_id
        self.run_id = os.urandom(12).hex()
        self.started = now
        self.seq = 0

    def build_report(self, tick: str, now: float, gathered: Gathered, *, spooled: int = 0, dropped: int = 0,
                     clock_offset: float | None = None) -> Fields:  # fmt: skip
        """A report as the contract has it. `spooled` reports wait on disk, `dropped` were lost since it was last told;
        `clock_offset` is server minus host in seconds, null before the first answer."""
        sections, absent, errors = gathered
        self.seq += 1
        spent = round(sum(os.times()[:4]), 3)  # user and system time, the agent's own and that of its commands
        agent = {"version": VERSION, "started": round(self.started, 3), "spooled": spooled, "dropped": dropped,
                 "clock_offset": clock_offset, "cpu_seconds": spent, "rss_bytes": rss_bytes()}  # fmt: skip
        head: Fields = {"version": 1, "host_id": self.host_id, "tick": tick, "time": round(now, 3)}
        head |= {"run_id": self.run_id, "seq": self.seq, "agent": agent}
        return {**head, **sections, "absent": absent, "errors": errors}


def rss_bytes() -> int | None:
    try:
        return int(read_bytes("/proc/self/statm", 4 * KIB).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # macOS
        return None


def encode_report(report: Fields) -> bytes:
    """The report as JSON. A section that cannot be sent becomes an error of its own."""
    try:
        body = to_json(report)
    except (TypeError, ValueError, RecursionError):
        for name in set(report) - HEADER_KEYS:
            try:
                to_json(report[name])
            except (TypeError, ValueError, RecursionError) as error:  # NaN, bytes …
                del report[name]
                report["errors"][name] = {"code": "garbage", "detail": str(error)[:DETAIL_LIMIT]}
        body = to_json(report)
    while len(body) > PACKED_LIMIT and (len(body) > REPORT_LIMIT or len(pack(body)) > PACKED_LIMIT):
        largest = max(set(report) - HEADER_KEYS, key=lambda name: len(to_json(report[name])))
        report["errors"][largest] = {"code": "too_large", "detail": f"{len(to_json(report.pop(largest)))} bytes"}
        body = to_json(report)
    return body


def to_json(value: Any) -> bytes:
    # "replace": half a surrogate pair (from an odd name in somebody's JSON) has no UTF-8.
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def pack(body: bytes) -> bytes:
    """gzip, without a time stamp: the same body gives the same bytes, and the same webhook-id."""
    packer = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, 31)
    return packer.compress(body) + packer.flush()


def unpack(packed: bytes) -> bytes:
    unpacker = zlib.decompressobj(31)
    body = unpacker.decompress(packed, 2 * REPORT_LIMIT)
    if not unpacker.eof:
        raise ValueError("cut short")
    return body


# --- signature: the bytes as sent -> webhook headers ---


def sign(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """The Standard Webhooks signature: v1,base64(HMAC-SHA256(key, "id.timestamp.body"))."""
    signed = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    return "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode()


def webhook_headers(key: bytes, body: bytes, timestamp: int) -> dict[str, str]:
    """The three headers. The id comes from the content, so a repetition has the same one."""
    message_id = "msg_" + hashlib.sha256(body).hexdigest()[:32]
    signature = sign(key, message_id, timestamp, body)
    return {"webhook-id": message_id, "webhook-timestamp": str(timestamp), "webhook-signature": signature}


# --- spool: reports that wait on disk until the server has them ---

IS_SPOOLED = re.compile(r"[0-9]{1,18}-[0-9]{1,18}" + re.escape(SPOOL_ENDING)).fullmatch


class Message:
    """One report on its way: its JSON, and the collectors' memories that become true once it cannot be lost."""

    def __init__(self, body: bytes, *, memories: dict[str, bytes] | None = None, dropped_total: int = 0) -> None:
        self.body = body
        self.memories = memories or {}
        self.dropped_total = dropped_total  # what the report tells of lost reports
        self.offered_at = 0.0
        # Only the disk's thread writes these two, one job after the other: no lock, and no report there twice.
        self.file = ""  # its name in the spool, once it is there
        self.is_settled = False  # the server has it or will never take it: it is not put on disk any more


class Memories:
    """What the collectors remember over restarts, a file per section; written only when it changed."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.values: dict[str, Fields] = {}
        self.saved: dict[str, bytes] = {}
        self.saved_at: dict[str, float] = {}

    def changed(self, names: Iterable[str], now: float) -> dict[str, bytes]:
        """The memories to be saved with a report. Fast sections, whose last samples change each time, now and then;
        those that say which events were sent, always."""
        texts = {}
        for name in names:
            rare = COLLECTORS[name].tick == FAST and name not in EVENT_SECTIONS
            if not self.values.get(name) or (rare and now - self.saved_at.get(name, -DAY) < MEMORY_SECONDS):
                continue
            try:
                text = to_json(self.values[name])
            except (TypeError, ValueError, RecursionError) as error:
                log_once(f"memory {name}", f"memory: {name} cannot be kept ({error})")
                continue
            if text != self.saved.get(name):
                texts[name] = text
        return texts

    def load(self) -> None:
        self.values = load_memories(self.folder)
        self.saved = {name: to_json(memory) for name, memory in self.values.items()}

    def save(self, texts: dict[str, bytes], now: float) -> None:
        """Called once the report made with them cannot be lost any more."""
        for name, text in texts.items():
            write_file(os.path.join(self.folder, f"{name}.json"), text)
            self.saved[name], self.saved_at[name] = text, now


def load_memories(folder: str) -> dict[str, Fields]:
    """What the collectors remember, by section; `once` reads it too, and leaves it as it is."""
    memories = {}
    for file in sorted(os.listdir(folder)) if os.access(folder, os.R_OK) else ():
        if not file.endswith(".json"):
            continue
        try:
            memory = json.loads(read_bytes(os.path.join(folder, file), OUTPUT_LIMIT, chunk=MIB))
            if not isinstance(memory, dict):
                raise ValueError("not an object")
        except (OSError, ValueError, RecursionError, SourceError) as error:
            print(f"memory: {file} cannot be used ({error}); its section begins anew", file=sys.stderr, flush=True)
            continue
        memories[file.removesuffix(".json")] = memory
    return memories


def on_disk(method: Callable[Concatenate[Spool, P], T]) -> Callable[Concatenate[Spool, P], T]:
    """A method of Spool that is done by its disk's thread, with a deadline. Those that begin with `_` run there."""

    @functools.wraps(method)
    def ask(self: Spool, *args: P.args, **named: P.kwargs) -> T:
        what = f"spool {method.__name__}"
        try:
            return self.disk.call(what, lambda: method(self, *args, **named))
        except OSError as error:
            raise source_error(error, what) from None

    return ask


class Spool:
    """A folder with one file per report, `number-time.json.gz`, in the order they were made.

    All disk work is done by one thread with a deadline: a disk that hangs (the root pool suspended) must not stop
    the loop that reports just that. Then SourceError is raised, and the caller keeps what it has.
    """

    def __init__(self, folder: str, *, max_bytes: int, max_seconds: float, deadline: float = DISK_DEADLINE) -> None:
        self.folder = os.path.join(folder, "spool")
        self.rejected = os.path.join(folder, "rejected")
        self.losses = os.path.join(folder, "losses.json")
        self.memories = Memories(os.path.join(folder, "memory"))
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds
        self.disk = Worker(deadline, "spool")
        self.count = 0  # reports waiting
        self.bytes = 0
        self.number = 0  # of the newest
        self.newest_at = 0.0  # the wall clock at the last push
        self.age = 0.0  # seconds the oldest has waited, or more
        self.gone: set[str] = set()  # files that are done with and cannot be removed (a read-only disk)
        self.counting = threading.Lock()
        self.dropped_total = 0  # reports lost for want of space or age or by damage, since the agent was installed
        self.told_total = 0  # how many of them the server has been told of
        self.saved_losses = b""
        try:
            self.open()
        except SourceError as error:  # a full or broken disk is what there is to report: go on without
            log(f"spool: cannot be used ({error}); reports are kept in memory")

    @property
    def dropped(self) -> int:
        """Reports lost that the server does not know of."""
        return self.dropped_total - self.told_total

    @on_disk
    def open(self) -> None:
        """Find what an earlier run left."""
        for folder in (self.folder, self.rejected, self.memories.folder):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            for name in os.listdir(folder):
                if name.endswith(".tmp"):  # cut off by a crash
                    remove_file(os.path.join(folder, name))
        self.memories.load()
        names = self._names()
        self.count = len(names)
        self.bytes = sum(self._size(name) for name in names)
        if names:
            self.number, self.newest_at = int(names[-1].split("-")[0]), spooled_at(names[-1])
            self.age = ages_of(names, self.newest_at)[0]
        self._load_losses()
        self._save_losses()  # so that the file has its block before the disk is full

    @on_disk
    def push(self, message: Message, now: float) -> None:
        """Put a report on disk, and what the collectors remember with it. Then it survives a power cut."""
        if message.file or message.is_settled:
            return
        packed = pack(message.body)
        self._make_room(size_on_disk(len(packed)), now)
        self.number += 1
        name = f"{self.number:012d}-{int(now)}{SPOOL_ENDING}"
        write_file(os.path.join(self.folder, name), packed)
        self.count += 1
        self.bytes += size_on_disk(len(packed))
        message.file = name
        self._keep_memories(message)

    @on_disk
    def newest(self) -> tuple[str, bytes] | None:
        """Name and JSON of the newest report."""
        return next(self._read(reversed(self._names())), None)

    @on_disk
    def oldest(self, limit: int, skip: Container[str] = ()) -> list[tuple[str, bytes]]:
        """Names and JSON of up to `limit` oldest reports, as many as fit one request."""
        names = self._names()
        if not names:  # somebody emptied the folder
            self.count = self.bytes = 0
        batch: list[tuple[str, bytes]] = []
        size = 0
        for name, body in self._read(name for name in names if name not in skip):
            size += len(body)
            if batch and size > BATCH_LIMIT:
                break
            batch.append((name, body))
            if len(batch) >= limit:
                break
        return batch

    @on_disk
    def waiting_since(self, now: float) -> float | None:
        """When the oldest report that waits was put on disk; now, if the clock had not been set yet."""
        times = [spooled_at(name) for name in self._names()[:1]]
        return next((at if at > CLOCK_UNSET else now for at in times), None)

    @on_disk
    def delivered(self, names: list[str], message: Message | None = None) -> int:
        """The server has these: forget them, keep the memories that came with them. How many were on disk."""
        if message is not None:
            names = [message.file] if message.file else []  # it may have come to the disk while it was under way
            self._settle(message)
        for name in names:
            self._leave(name)
        self._save_losses()
        return len(names)

    @on_disk
    def reject(self, name: str, body: bytes, reason: str, message: Message | None = None) -> None:
        """Set a report aside that the server will never take: from the disk (by its name), or one just made."""
        if message is not None:
            name = message.file
            self._settle(message)
        self.number += 0 if name else 1
        aside = os.path.join(self.rejected, name or f"{self.number:012d}-{int(time.time())}{SPOOL_ENDING}")
        try:
            write_file(aside, pack(body))
        except OSError as error:  # it must not stand in the way for that
            aside = f"nowhere ({error.strerror})"
            self.lose(1)
        if name:
            self._leave(name)
        self._bound_rejected()
        log(f"spool: set aside as {aside}: {reason}")

    @on_disk
    def save_losses(self) -> None:
        """What was lost in RAM is counted by the next run too."""
        self._save_losses()

    def lose(self, count: int) -> None:
        """Count reports that are lost; may be called from any thread."""
        with self.counting:
            self.dropped_total += count

    # in the disk's thread

    def _names(self) -> list[str]:
        return sorted(name for name in os.listdir(self.folder) if IS_SPOOLED(name) and name not in self.gone)

    def _size(self, name: str) -> int:
        with contextlib.suppress(OSError):
            return size_on_disk(os.stat(os.path.join(self.folder, name)).st_size)
        return 0

    def _make_room(self, size: int, now: float) -> None:
        """Oldest first: those over age, and as many as the new one needs."""
        self.age = self.age + clock_step(self.newest_at, now) if self.count else 0.0
        self.newest_at = now
        if self.bytes + size <= self.max_bytes and self.age <= self.max_seconds:
            return
        names, lost = self._names(), 0
        for name, self.age in zip(names, ages_of(names, now), strict=True):
            if self.age <= self.max_seconds and self.bytes + size <= self.max_bytes:
                break
            self._leave(name)
            lost += 1
        if lost:
            self.lose(lost)
            self._save_losses()
            log_once("full", f"spool: full or over age, dropped the oldest {lost} ({self.dropped} not yet reported)")

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Name and JSON of each; what cannot be read any more is set aside on the way, and counted as lost."""
        for name in names:
            try:
                body = unpack(read_bytes(os.path.join(self.folder, name), OUTPUT_LIMIT, chunk=MIB))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, zlib.error, SourceError) as error:
                if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                    raise  # that says nothing about the file
                self._set_bad_aside(name, error)
                continue
            yield name, body

    def _set_bad_aside(self, name: str, error: Exception) -> None:
        self.lose(1)
        log(f"spool: {name} cannot be read ({error}); it is lost, and set aside in {self.rejected}")
        self._leave(name, lambda file: os.rename(file, os.path.join(self.rejected, f"{name}.bad")))
        self._bound_rejected()

    def _bound_rejected(self) -> None:
        """What falls out of rejected/ is lost; the bad ones were counted when they came."""
        kept = sorted(os.listdir(self.rejected))
        for name in kept[: max(0, len(kept) - REJECTED_LIMIT)]:
            if remove_file(os.path.join(self.rejected, name)) and not name.endswith(".bad"):
                self.lose(1)
        self._save_losses()

    def _leave(self, name: str, away: Callable[[str], None] = os.unlink) -> None:
        """A report's file goes; one that cannot (a read-only disk) is passed over from now on."""
        file, size = os.path.join(self.folder, name), self._size(name)
        if os.path.lexists(file):
            try:
                away(file)
            except OSError:
                self.gone.add(name)
                log_once("remove", f"spool: {self.folder}: reports that are done with cannot be removed")
            self.count -= 1
            self.bytes -= size

    def _settle(self, message: Message) -> None:
        message.is_settled = True
        self._keep_memories(message)

    def _keep_memories(self, message: Message) -> None:
        """The report cannot be lost any more: what the collectors remember becomes true."""
        memories, message.memories = message.memories, {}
        try:
            self.memories.save(memories, time.monotonic())
        except OSError as error:
            log_once("memory", f"memory: cannot write: {error.strerror}")

    def _load_losses(self) -> None:
        try:
            losses = json.loads(read_bytes(self.losses, MIB))
            self.dropped_total, self.told_total = int(losses["dropped_total"]), int(losses["told_total"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SourceError) as error:
            log(f"spool: {self.losses} cannot be used ({error}); the count of lost reports begins anew")

    def _save_losses(self) -> None:
        content = to_json({"dropped_total": self.dropped_total, "told_total": self.told_total})
        if content == self.saved_losses:
            return
        try:
            try:
                write_file(self.losses, content)
            except OSError:  # no room for a second file: into the block it has
                with open(self.losses, "r+b") as handle:
                    handle.write(content)
                    handle.truncate()
            self.saved_losses = content
        except OSError as error:
            log_once(self.losses, f"spool: cannot write {self.losses}: {error.strerror}")


def size_on_disk(size: int) -> int:
    """What a file really takes: whole blocks of 4 KiB."""
    return -(-size // 4096) * 4096


def spooled_at(name: str) -> float:
    """The wall clock when a report was put on disk."""
    return float(name.partition("-")[2].removesuffix(SPOOL_ENDING))


def clock_step(before: float, after: float) -> float:
    """Seconds between two reports by the wall clock, at most an hour: above that the clock was set, or the agent did
    not run. So a clock that jumps years ahead, and back, makes nothing over age."""
    return min(max(0.0, after - before), CLOCK_STEP)


def ages_of(names: list[str], now: float) -> list[float]:
    """Seconds each of these has waited: the sum of the steps since."""
    times = [*map(spooled_at, names), now]
    steps = [clock_step(before, after) for before, after in zip(times, times[1:], strict=False)]
    return list(itertools.accumulate(reversed(steps)))[::-1]


# --- delivery: signed posts; an answer means accepted, later or refused ---

ACCEPTED, LATER, REFUSED, TOO_LARGE = "accepted", "later", "refused", "too large"
REFUSALS = {"invalid_json", "invalid_report", "host_mismatch", "too_large"}  # the codes that mean the report itself
ADVICE = {  # what the operator must do, by the server's code
    "unknown_host": "the server does not know this host: run `proxmox-monitor-server register-host {host}` there, "
    "and put the token it prints into the config",
    "invalid_token": "the token is not the one the server has for {host}: run "
    "`proxmox-monitor-server rotate-token {host}` there, and put the token it prints into the config",
    "clock_skew": "the clock of this host or of the server is wrong: set it right",
}


class Unreachable(Exception):
    """No answer: no route, refused, time-out, TLS, or what came is no HTTP."""


class Answer(NamedTuple):
    """What came back: status, headers with small names, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def fields(self) -> Fields:
        """The JSON object in the body; empty when there is none."""
        return dict(attempt(parse_object, to_text(self.body), "the answer", default={}))


class BoundedReader(io.RawIOBase):
    """What the server says, up to a moment and a size: a socket's own time-out begins anew with each byte."""

    def __init__(self, sock: socket.socket, stream: Any) -> None:
        self.sock = sock
        self.stream = stream
        self.deadline = time.monotonic() + ANSWER_TIMEOUT
        self.left = ANSWER_LIMIT

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        if not self.left:
            raise ValueError("the answer is too large")
        self.sock.settimeout(seconds)
        size: int = self.stream.raw.readinto(memoryview(buffer)[: self.left])
        self.left -= size
        return size

    def close(self) -> None:
        self.stream.close()
        super().close()


class BoundedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **named: Any) -> None:
        super().__init__(sock, *args, **named)
        self.fp: Any = io.BufferedReader(BoundedReader(sock, self.fp))


class PlainConnection(http.client.HTTPConnection):
    response_class = BoundedResponse

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before the end
            super().send(data)


class TlsConnection(PlainConnection, http.client.HTTPSConnection):
    pass


class Door(urllib.request.AbstractHTTPHandler):
    """http and https alone: no redirects, no proxies from the environment, no cookies. Whatever comes is the answer."""

    def __init__(self, context: Any) -> None:
        super().__init__()
        self.context = context

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(PlainConnection, request)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(TlsConnection, request, context=self.context)


class Client:
    """Signs reports and posts them to the host's own address on the server, each over a connection of its own."""

    def __init__(self, config: Config) -> None:
        self.host_id = config.host_id
        self.key = config.key
        self.server = config.url
        self.url = f"{config.url}/api/v1/hosts/{config.host_id}/reports"
        is_tls = config.url.lower().startswith("https:")
        context = ssl.create_default_context(cafile=config.ca_file or None) if is_tls else None
        self.opener = urllib.request.OpenerDirector()
        self.opener.add_handler(Door(context))
        self.clock_offset: float | None = None  # server minus host in seconds, as last measured
        self.signing_offset = 0.0  # the same, where the server has asked for its own time by clock_skew

    def send(self, body: bytes) -> Answer:
        """One signed request. On clock_skew it is signed again with the server's time."""
        packed = pack(body)
        answer = self._post(packed)
        if answer.status == 401 and code_of(answer) == "clock_skew" and server_time(answer) is not None:
            self.signing_offset = self.clock_offset or 0.0
            log_once("clock", f"reporter: this host's clock is off by {-self.signing_offset:.0f} s; set it right")
            answer = self._post(packed)
        return answer

    def _post(self, packed: bytes) -> Answer:
        before = time.time()
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip", "User-Agent": f"{NAME}/{VERSION}"}
        headers |= webhook_headers(self.key, packed, int(before + self.signing_offset))
        request = urllib.request.Request(self.url, packed, headers, method="POST")
        try:
            with self.opener.open(request, timeout=ANSWER_TIMEOUT) as response:
                names = {name.lower(): value for name, value in response.headers.items()}
                answer = Answer(response.status, names, response.read(ANSWER_LIMIT))
        except Exception as error:  # the far end may make http.client stumble in any way
            raise Unreachable(describe_network_error(error)) from None
        at = server_time(answer)
        if at is not None:
            self.clock_offset = round(at - (before + time.time()) / 2, 3)
        return answer


def describe_network_error(error: Any) -> str:
    """In an operator's words."""
    error = getattr(error, "reason", None) if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}; is ca_file needed?"
    if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
        return f"the answer is not HTTP, or cut short ({type(error).__name__})"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]


def judge(answer: Answer, count: int) -> str:
    """What an answer means for the `count` reports that were sent. Only the server's own words can end their wait:
    proxies and other programs say 200 and 400 too, to everything."""
    fields = answer.fields()
    if answer.status == 200 and fields.get("status") == "ok":
        numbers = [fields.get("accepted"), fields.get("duplicates")]
        whole = [number for number in numbers if type(number) is int and number >= 0]
        return ACCEPTED if len(whole) == 2 and sum(whole) == count else LATER
    if answer.status in (400, 413, 422) and code_of(answer) in REFUSALS:
        return REFUSED
    return TOO_LARGE if answer.status == 413 else LATER


def code_of(answer: Answer) -> str:
    """The `code` of the server's problem document; empty when it is none."""
    code = answer.fields().get("code")
    is_problem = answer.headers.get("content-type", "").lower().startswith("application/problem+json")
    return code if is_problem and isinstance(code, str) else ""


def server_time(answer: Answer) -> float | None:
    """The server's clock, if it gave a sane one: none before this version was written, or long after it."""
    value: Any = answer.fields().get("server_time")
    if type(value) not in (int, float) or not CLOCK_FIRST <= value <= CLOCK_LAST:
        return None
    return float(value)


def retry_after(answer: Answer) -> float:
    """Seconds the server asks to wait; 0 when it does not."""
    text = answer.headers.get("retry-after", "")
    return float(text[:6]) if text.isascii() and text.isdigit() else 0.0


def describe_answer(answer: Answer, host_id: str) -> str:
    """An answer that is not an acceptance, with what to do about it, in one line."""
    code, fields = code_of(answer), answer.fields()
    words = " ".join(fields[key] for key in ("detail", "pointer") if isinstance(fields.get(key), str))
    text = f"{answer.status} {code} {words}".strip()[:300]
    if code in ADVICE:
        return f"{text}; {ADVICE[code].format(host=host_id)}"
    if 300 <= answer.status < 400:
        return f"{text}; redirected to {answer.headers.get('location', '?')[:200]}: write that into server_url"
    if answer.status < 300:
        return f"{text}; that is not the monitor's answer: is server_url right, does the proxy pass it on?"
    if answer.status in (403, 404) or (answer.status < 500 and not code):
        return f"{text}; is server_url right, and does the proxy in front of the server let reports through?"
    return text


class Parcel(NamedTuple):
    """What one request carries: the report just made, or some from the disk with their names."""

    bodies: list[bytes]
    names: list[str] = []
    message: Message | None = None

    def body(self) -> bytes:
        return self.bodies[0] if len(self.bodies) == 1 else b"[" + b",".join(self.bodies) + b"]"


class Sender:
    """Delivers reports: the new one first, then what waits on disk, oldest first, in batches.

    Normally a report goes straight out and never touches the disk. As soon as one is not answered at once, it and
    all that follow are put on disk first, so that a crash costs the tick under way at most. `turn` does one step.

    `pending` are the reports in RAM: not answered yet, and while nothing gets through (`trouble`) those alone that
    the disk has not taken either. The loop adds to it, and both threads put its reports on disk.
    """

    def __init__(self, config: Config, spool: Spool) -> None:
        self.client = Client(config)
        self.spool = spool
        self.wakes: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: a report came in; False: the end
        self.lock = threading.Lock()  # for `pending`
        self.pending: list[Message] = []
        self.trouble = ""  # why nothing gets through; empty when all is well
        self.trouble_kind: tuple[int, str] = (0, "")
        self.backoff = BACKOFF_FIRST
        self.retry_at = 0.0
        self.backlog_at = time.monotonic() + BACKLOG_PAUSE  # what was left by an earlier run comes after the new
        self.batch_size = BATCH_REPORTS
        self.passed_over: dict[str, float] = {}  # reports on disk that alone did not get through: until when
        self.accepted_at: float | None = None
        self.greeted = False

    # called by the loop that makes the reports

    def offer(self, message: Message) -> None:
        """Take a report over."""
        message.offered_at = time.monotonic()
        with self.lock:
            is_crowded = bool(self.trouble or self.pending)
            self.pending.append(message)
            overflow = self.pending[: max(0, len(self.pending) - PENDING_LIMIT)]  # the disk takes none either
            del self.pending[: len(overflow)]
        self.spool.lose(sum(not lost.file for lost in overflow))
        if is_crowded:
            self.keep(KEEP_SECONDS / 4)
        self.wakes.put(True)

    def keep(self, patience: float = KEEP_SECONDS) -> bool:
        """Put on disk what has waited longer than `patience` for its answer. True if any still waits for its time."""
        before = time.monotonic() - patience
        for message in self.unwritten():
            if message.offered_at > before and not self.trouble:
                return True
            try:
                self.spool.push(message, time.time())
            except SourceError as error:
                log_once("spool", f"spool: cannot write ({error}); reports are kept in memory")
                return True
        if self.trouble:  # from now on they are found on disk
            with self.lock:
                self.pending = [message for message in self.pending if not message.file]
        return False

    def unwritten(self) -> list[Message]:
        """The reports that are in RAM alone."""
        with self.lock:
            return [message for message in self.pending if not message.file]

    # called by the sender's own thread

    def serve(self) -> None:
        """The thread: a step, then sleep until the next is due or a report comes in."""
        while True:
            try:
                wait = self.turn(time.monotonic())
            except SourceError as error:
                log_once("spool", f"spool: {error}")
                wait = BACKOFF_FIRST
            except Exception as error:  # the thread must live on; nothing is lost by trying again
                log(f"reporter: fault in the agent: {describe_fault(error)}")
                wait = BACKOFF_LAST
            with contextlib.suppress(queue.Empty):
                if not self.wakes.get(timeout=wait):
                    return

    def turn(self, now: float) -> float:
        """One step: at most one request. Returns the seconds until the next one makes sense."""
        if now >= self.retry_at:
            parcel = self._next(now)
            if parcel is not None:
                self._deliver(parcel, now)
            elif not self.spool.count:
                self.trouble = ""
        if self.retry_at > now:
            return self.retry_at - now
        if self.pending:
            return 0.0
        return max(0.0, self.backlog_at - now) if self.spool.count else IDLE_SECONDS

    def _next(self, now: float) -> Parcel | None:
        with self.lock:
            fresh = self.pending[0] if self.pending else None  # in order: their memories build on each other
        if fresh is not None:
            return Parcel([fresh.body], message=fresh)
        if self.trouble and (newest := self.spool.newest()):
            return Parcel([newest[1]], [newest[0]])
        if not self.spool.count or now < self.backlog_at:
            return None
        self.backlog_at = now + BACKLOG_PAUSE
        self.passed_over = {name: until for name, until in self.passed_over.items() if until > now}
        batch = self.spool.oldest(self.batch_size, self.passed_over)
        return Parcel([body for _, body in batch], [name for name, _ in batch]) if batch else None

    def _deliver(self, parcel: Parcel, now: float) -> None:
        """Send reports, and act on the answer."""
        try:
            answer = self.client.send(parcel.body())
        except Unreachable as error:
            self._put_off(parcel, now, f"cannot reach {self.client.server}: {error}")
            return
        if not self.greeted:
            self.greeted = True
            log(f"reporter: connected to {self.client.server}")
        verdict = judge(answer, len(parcel.bodies))
        reason = describe_answer(answer, self.client.host_id)
        if verdict is ACCEPTED:
            self._accepted(parcel)
        elif verdict is LATER:
            self._put_off(parcel, now, reason, answer.status, retry_after(answer))
        elif len(parcel.bodies) > 1:
            self.backlog_at = now + BACKLOG_PAUSE / 10
            self.batch_size = len(parcel.bodies) // 2  # halved until the bad one stands alone
        else:
            self._forget(parcel.message)
            try:
                name = "".join(parcel.names)
                self.spool.reject(name, parcel.bodies[0], f"the server refused it: {reason}", parcel.message)
            except SourceError:  # the disk hangs, too
                self.spool.lose(0 if parcel.names else 1)
                raise

    def _accepted(self, parcel: Parcel) -> None:
        if self.trouble or self.accepted_at is None:
            log(f"reporter: accepted host:{self.client.host_id}")
        if not self.trouble and len(parcel.bodies) >= self.batch_size:
            self.batch_size = min(BATCH_REPORTS, self.batch_size * 2)
        self.trouble = ""
        self.backoff = BACKOFF_FIRST
        self.accepted_at = time.time()
        if parcel.message is not None:
            self._forget(parcel.message)
            self.spool.told_total = max(self.spool.told_total, parcel.message.dropped_total)
        if self.spool.delivered(parcel.names, parcel.message) and not self.spool.count:
            log("reporter: nothing waits on disk any more")

    def _put_off(self, parcel: Parcel, now: float, reason: str, status: int = 0, asked: float = 0.0) -> None:
        """Not now: everything goes to disk, and the next try comes later and later, at most a minute (or one more
        than that, if the server asks for it)."""
        if len(parcel.bodies) > 1:  # in case it is the size, or one of them, that something on the way dislikes
            self.batch_size = len(parcel.bodies) // 2
        elif parcel.names and not self.trouble:  # alone out of the backlog: those behind it go first
            self.passed_over[parcel.names[0]] = now + PASSED_OVER_SECONDS
        kind = (status, reason.translate(NO_DIGITS))
        if not self.trouble or kind != self.trouble_kind:
            log(f"reporter: {reason}; reports wait on disk")
        self.trouble, self.trouble_kind = reason, kind
        self.keep(0.0)
        jitter = 0.5 + os.urandom(1)[0] / 512  # 0.5 to 1, so that a fleet does not come back in step
        wait = max(self.backoff * jitter, BACKOFF_FIRST)
        self.retry_at = now + max(wait, min(asked, wait + RETRY_AFTER_LIMIT))
        self.backoff = min(self.backoff * 2, BACKOFF_LAST)

    def _forget(self, message: Message | None) -> None:
        with self.lock:
            if message in self.pending:
                self.pending.remove(message)


# --- service: monotonic ticks, the cheap look between them, signals, sd_notify ---


class Notifier:
    """systemd's readiness and watchdog protocol: datagrams to $NOTIFY_SOCKET. Silent where there is none."""

    def __init__(self, environ: dict[str, str] | None = None) -> None:
        environ = dict(os.environ) if environ is None else environ
        address = environ.get("NOTIFY_SOCKET", "")
        self.address = "\0" + address[1:] if address.startswith("@") else address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        # WATCHDOG_PID is not compared with our own: a onefile binary has its parent's pid there (packaging.md).
        usec = environ.get("WATCHDOG_USEC", "")
        self.watchdog_seconds = int(usec) / 1_000_000 if usec.isdigit() and address else 0.0

    def tell(self, *lines: str) -> None:
        if self.socket is None:
            return
        with contextlib.suppress(OSError):  # systemd is away for a moment; the next beat comes soon
            self.socket.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, self.address)


class Collected(NamedTuple):
    """Sections, absent, errors, and the memories to be saved with them."""

    sections: Fields
    absent: list[str]
    errors: dict[str, dict[str, str]]
    memories: dict[str, bytes]

    def add(self, other: Collected) -> None:
        self.sections.update(other.sections)
        self.absent.extend(other.absent)
        self.errors.update(other.errors)
        self.memories.update(other.memories)


def nothing() -> Collected:
    return Collected({}, [], {}, {})


class Lane:
    """A thread for collectors that run commands. What is finished is reported while a later one still hangs."""

    def __init__(self, tick: str, probe: Probe, memories: Memories, wake: Callable[[], None]) -> None:
        self.tick = tick
        self.probe = probe
        self.memories = memories
        self.wake = wake
        self.finished: queue.SimpleQueue[Collected | None] = queue.SimpleQueue()
        self.busy = False
        self.waiting = nothing()
        self.waiting_since = 0.0

    def start(self, names: list[str]) -> bool:
        """False while the last round is still under way: rounds do not pile up."""
        if self.busy:
            return False
        self.busy = True
        threading.Thread(target=self._work, args=(names,), name=self.tick, daemon=True).start()
        return True

    def take(self, now: float) -> Collected | None:
        """What is to be reported now: the whole round, or what waits for longer than it should."""
        while not self.finished.empty():
            part = self.finished.get()
            if part is None:
                self.busy = False
                break
            self.waiting_since = self.waiting_since or now
            self.waiting.add(part)
        if not any(self.waiting[:3]) or (self.busy and now - self.waiting_since < FLUSH_SECONDS):
            return None
        ready, self.waiting, self.waiting_since = self.waiting, nothing(), 0.0
        return ready

    def _work(self, names: list[str]) -> None:
        try:
            for name in names:
                collected = collect(self.probe, self.memories.values, [name])
                self.finished.put(Collected(*collected, self.memories.changed([name], time.monotonic())))
        finally:
            self.finished.put(None)
            self.wake()


def look(probe: ProbeLike, seen: Fields) -> Fields:
    """The state of pools and guests as cheaply as it can be had: a few small files and listings, no process. What was
    `seen` by the last look holds where nothing can be read now."""
    memory, known_pools = seen.get("memory", {}), seen.get("pools", {})
    # TRANSITIONING: an import or export is under way, which is no state of its own.
    pools = {
        pool["name"]: known_pools.get(pool["name"]) if pool.get("state") == "TRANSITIONING" else pool.get("state")
        for pool in attempt(lambda: read_pool_states(probe, memory, guids=False), default=())
    }
    inside = read_word(probe, f"{GUEST_GROUPS[1]}/cgroup.stat")  # counts the groups below: some go with a container
    groups = seen["groups"] if inside and seen.get("inside") == inside else {}
    guests = find_running(probe, groups)
    stat = attempt(probe.stat, TASKS_PATH)
    tasks = (stat.st_ino, stat.st_size) if stat else seen.get("tasks")  # it is replaced as a whole
    return {"memory": memory, "pools": pools, "guests": guests, "tasks": tasks, "groups": groups, "inside": inside}


class GuestChanges:
    """Guests seen to start or stop. pvestatd, where the `guests` section comes from, knows up to 20 s later."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[bool, float]] = {}  # vmid -> runs, until when to believe it

    def note(self, before: set[int], after: set[int], now: float) -> None:
        for vmid in before ^ after:
            self.seen[vmid] = (vmid in after, now + GUEST_SECONDS)

    def apply(self, guests: Any, now: float) -> None:
        """Correct the status of those that pvestatd has not caught up with."""
        self.seen = {vmid: change for vmid, change in self.seen.items() if change[1] > now}
        for guest in guests if self.seen and isinstance(guests, list) else ():
            runs, _ = self.seen.get(guest.get("vmid"), (None, 0.0))
            if runs is True and guest.get("status") in ("stopped", "unknown", None):
                guest["status"] = "running"
            elif runs is False and guest.get("status") != "stopped":
                guest["status"] = "stopped"
                for name in ("uptime_seconds", "cpu_ratio", "memory_used_bytes", "memory_host_bytes"):
                    guest.pop(name, None)  # they are those of a moment ago


class RootMail:
    """Opt-in: a mail to root, once a day, when the server has taken no report for hours. The server tells of silent
    hosts; this is for the day when it is the server that is gone, or that no longer knows this host."""

    def __init__(self, config: Config, probe: Probe, folder: str, sender: Sender) -> None:
        self.config = config
        self.probe = probe
        self.sender = sender
        self.mark = os.path.join(folder, "mailed-root")  # the time of the last mail
        self.mailed_at = 0.0
        self.started_at = probe.now()
        self.next_at: float | None = None
        self.busy = False

    def turn(self, now: float) -> None:
        """Look now and then; what may take long is done in a thread."""
        if self.next_at is None:
            self.next_at = now + MAIL_GRACE_SECONDS
        if not self.config.mail_root_seconds or self.busy or now < self.next_at or not self.sender.trouble:
            return
        self.next_at = now + MAIL_LOOK_SECONDS
        self.busy = True
        threading.Thread(target=self._work, name="mail", daemon=True).start()

    def _work(self) -> None:
        try:
            now = self.probe.now()
            oldest = self.sender.spool.waiting_since(now)  # as far as is known after a restart
            since = self.sender.accepted_at or min(oldest or self.started_at, self.started_at)
            if since > CLOCK_UNSET and now - since >= self.config.mail_root_seconds and self.is_due(now):
                self.send(since, now)
        except (SourceError, OSError) as error:
            log_once("mail", f"mail: root could not be told: {error}")
            self.next_at = self.probe.monotonic() + MAIL_RETRY_SECONDS
        finally:
            self.busy = False

    def is_due(self, now: float) -> bool:
        """Not within a day of the last mail, also over restarts; a mark from the future is no mark."""
        try:
            text = read_bytes(self.mark, KIB).strip()
        except FileNotFoundError:
            text = b""
        self.mailed_at = max(self.mailed_at, float(text) if text.isdigit() else 0.0)
        return not 0 <= now - self.mailed_at < DAY

    def send(self, since: float, now: float) -> None:
        self.probe.run("sendmail", "-i", "root", stdin=self.letter(since, now).encode(), limit=30.0)
        self.mailed_at = now
        log(f"mail: told root that the server has taken nothing since {utc_text(since)}")
        write_file(self.mark, b"%d\n" % now)

    def letter(self, since: float, now: float) -> str:
        """Since when, how many wait, why, what to do."""
        spool, host = self.sender.spool, self.config.host_id
        dropped = f"; {spool.dropped} were dropped, for age or want of space" if spool.dropped else ""
        return f"""To: root
Subject: proxmon: nobody takes the reports of {host}, for {int((now - since) // 3600)} hours
Auto-Submitted: auto-generated
MIME-Version: 1.0
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

The monitoring agent on {host} cannot deliver its reports to {self.config.url}.

Since:   {utc_text(since)}
Waiting: {spool.count} reports in {spool.folder}{dropped}
Why:     {one_line(self.sender.trouble)[:DETAIL_LIMIT]}

Until they are taken nobody is alerted about this host. What to do: run `proxmox-monitor-agent check` here, and look
whether the server runs. What waits is delivered by itself afterwards. This mail comes once a day while it lasts, by
mail_root_after_hours in {self.config.path}.
"""


def utc_text(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))


class Agent:
    """The service. `turn(now)` does what is due and says how long nothing will be; `serve` sleeps between turns."""

    def __init__(self, config: Config, probe: Probe, folder: str, *, notifier: Notifier | None = None) -> None:
        self.config = config
        self.probe = probe
        self.notifier = notifier or Notifier({})
        self.spool = Spool(folder, max_bytes=config.max_bytes, max_seconds=config.max_seconds)
        self.memories = self.spool.memories
        self.reporter = Reporter(config.host_id, probe.now())
        self.sender = Sender(config, self.spool)
        self.root_mail = RootMail(config, probe, folder, self.sender)
        self.wakes: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.stopping = False
        self.lanes = {tick: Lane(tick, probe, self.memories, self.wake) for tick in (MEDIUM, SLOW)}
        self.urgent = Lane(FAST, probe, self.memories, self.wake)
        self.urgent_again = False
        self.held: Collected | None = None  # pool_states that wait a moment for the pools in full
        self.held_until = 0.0
        self.seen: Fields = {}
        self.guest_changes = GuestChanges()
        self.next_at: dict[str, float] = {}
        self.second_at: dict[str, float] = {}  # of each tick the first moment after the start
        self.next_look = 0.0
        self.next_beat = 0.0
        self.status = ""  # as systemd shows it

    def serve(self) -> None:
        """Until told to stop."""
        threading.Thread(target=self.sender.serve, name="sender", daemon=True).start()
        gc.freeze()  # what there is now stays: not to be looked through again and again
        while not self.stopping:
            try:
                wait = self.turn(self.probe.monotonic())
            except Exception as error:  # a fault of ours; if it comes each time, the watchdog starts us anew
                log_once("fault", f"agent: fault in the agent: {describe_fault(error)}")
                wait = LOOK_SECONDS
            with contextlib.suppress(queue.Empty):
                self.wakes.get(timeout=wait)
        self.close()

    def wake(self) -> None:
        self.wakes.put(True)

    def stop(self, *_: object) -> None:
        """The signal handler: ends what is under way and wakes the loop. SimpleQueue.put may be called here."""
        self.stopping = True
        self.probe.cancel()
        self.spool.disk.cancel()
        self.wakes.put(False)

    def close(self) -> None:
        """Leave the unsent on disk. No waiting for answers: what is sent twice counts once."""
        self.notifier.tell("STOPPING=1", "STATUS=stopping")
        self.spool.disk.deadline = CLOSE_SECONDS
        self.sender.keep(0.0)
        self.sender.wakes.put(False)
        left = len(self.sender.unwritten())
        if left:
            self.spool.lose(left)
            with contextlib.suppress(SourceError):
                self.spool.save_losses()
        lost = f"; {left} could not be written and are lost" if left else ""
        log(f"agent: stopped; {self.spool.count} reports wait on disk{lost}")

    def turn(self, now: float) -> float:
        """Do what is due at this moment of the monotonic clock. Returns seconds until the next thing is."""
        if not self.next_at:
            self._begin(now)
        if now >= self.next_at[FAST]:
            self.seen.pop("inside", None)  # containers are looked at anew
            with self.probe.ahead():
                self._look(now)
                collected = self._collect(names_of(FAST))
            self._advance(FAST, now)
            self._report(FAST, collected)
        elif now >= self.next_look:
            self._look(now)
        self._run_lanes(now)
        self._send_held(now)
        waiting = self.sender.keep()
        self.root_mail.turn(now)
        self._beat(now)
        due = min(*self.next_at.values(), self.next_look, self.next_beat)
        due = min(due, now + KEEP_SECONDS) if waiting else due
        due = min(due, self.held_until) if self.held else due
        return max(0.0, due - self.probe.monotonic())

    def _begin(self, now: float) -> None:
        """All sections at once; from then on each tick at a moment of its own that depends on the host's name, so
        that a fleet that was started together does not post together."""
        self.next_at = dict.fromkeys(TICKS, now)
        for tick, interval in self.config.intervals.items():
            shift = zlib.crc32(f"{self.config.host_id} {tick}".encode()) / 2**32
            self.second_at[tick] = now + shift * interval
        self.seen = look(self.probe, {})

    def _advance(self, tick: str, now: float) -> None:
        """Set the tick's next moment. Missed ones (the machine slept) are not made up for."""
        interval = self.config.intervals[tick]
        passed = max(0, int((now - self.second_at[tick] + 1e-6) // interval) + 1)
        self.next_at[tick] = self.second_at[tick] + passed * interval

    def _look(self, now: float) -> None:
        """Compare with the last look; what changed is reported at once."""
        self.next_look = now + LOOK_SECONDS
        before, self.seen = self.seen, look(self.probe, self.seen)
        if before["pools"] != self.seen["pools"]:
            self._report_pools(now)
        self.guest_changes.note(before["guests"], self.seen["guests"], now)
        if now >= self.next_at[FAST]:
            return  # the fast tick that is due has the rest
        changed: list[str] = [name for name in ("guests", "tasks") if before[name] != self.seen[name]]
        collected = self._collect([name for name in changed if name in COLLECTORS])
        if "guests" in changed or collected.sections:
            self._report(FAST, collected)

    def _report_pools(self, now: float) -> None:
        """A pool changed: its state is known now, the pools in full a moment later, if no command hangs."""
        self.urgent_again = not self.urgent.start(["pools"])
        held = self._collect(["pool_states"])
        if self.held is not None:
            self.held.add(held)
        else:
            self.held, self.held_until = held, now + URGENT_SECONDS

    def _send_held(self, now: float) -> None:
        pools = self.urgent.take(now)
        if self.held is not None and (pools is not None or now >= self.held_until):
            self.held.add(pools or nothing())
            self._report(FAST, self.held)
            self.held = None
        elif pools is not None:
            self._report(FAST, pools)
        if self.urgent_again and not self.urgent.busy:
            self.urgent_again = not self.urgent.start(["pools"])

    def _run_lanes(self, now: float) -> None:
        """Report what the slower lanes have, and start those that are due."""
        for tick, lane in self.lanes.items():
            collected = lane.take(now)
            if collected is not None:
                self._report(tick, collected)
            if now >= self.next_at[tick]:
                self._advance(tick, now)
                if not lane.start(names_of(tick)):
                    log_once(tick, f"agent: the last {tick} round is still under way, this one is left out")

    def _collect(self, names: list[str]) -> Collected:
        now = self.probe.monotonic()
        gathered = collect(self.probe, self.memories.values, names)
        collected = Collected(*gathered, self.memories.changed(names, now))
        self.guest_changes.apply(collected.sections.get("guests"), now)
        return collected

    def _report(self, tick: str, collected: Collected) -> None:
        """Number it, hand it over. What was cut short by a stop is not reported as a failure."""
        if self.stopping:
            return
        spool, total = self.spool, self.spool.dropped_total
        offset = self.sender.client.clock_offset
        report = self.reporter.build_report(tick, self.probe.now(), collected[:3], clock_offset=offset,
                                            spooled=spool.count, dropped=spool.dropped)  # fmt: skip
        self.sender.offer(Message(encode_report(report), memories=collected.memories, dropped_total=total))

    def _beat(self, now: float) -> None:
        """Tell systemd that the loop turns: from here, so that a loop that hangs is not covered up."""
        if now < self.next_beat:
            return
        if self.next_beat == 0.0:
            self.notifier.tell("READY=1")
        self.next_beat = now + (self.notifier.watchdog_seconds / 3 or BEAT_SECONDS)
        self.notifier.tell("WATCHDOG=1")
        status = f"STATUS={self.sender.trouble or 'reporting'}; {self.spool.count} reports wait on disk"
        if status != self.status:
            self.status = status
            self.notifier.tell(status)


class PidFile:
    """Names the running agent, and is locked as long as it lives: a pid alone may be somebody else's by now."""

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, "agent.pid")
        self.handle = -1

    def claim(self) -> bool:
        """Write our pid; False when another agent holds the file. A disk that is full or read-only is no obstacle."""
        try:
            while not self._has_lock():  # the last holder removed the file that we had just opened
                pass
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, b"%d\n" % os.getpid(), 0)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            log(f"agent: {self.path}: {error.strerror}; going on without")
        return True

    def _has_lock(self) -> bool:
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self.handle), os.stat(self.path)):
                return True
        os.close(self.handle)
        return False

    def release(self) -> None:
        """Remove the file while it is ours: once it is unlocked it may be somebody else's."""
        if self.handle >= 0:
            remove_file(self.path)
            os.close(self.handle)

    def holder(self) -> int | None:
        """The pid of the agent that runs, None when none does."""
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            text = os.read(handle, 32).strip()
            return int(text) if text.isdigit() else None
        finally:
            os.close(handle)
        return None


# --- commands: start, once, check, stop, version ---

TOOLS = (  # command, what shows that this host needs it, what it is for
    ("zpool", "/sys/module/zfs", "pools"),
    ("zfs", "/sys/module/zfs", "datasets, snapshots"),
    ("smartctl", "/etc/pve", "disks: apt install smartmontools"),
    ("systemctl", "/run/systemd/system", "services"),
    ("corosync-quorumtool", "/etc/corosync/corosync.conf", "cluster votes"),
)


def command_start(arguments: Any) -> int:
    """Run the service until SIGTERM."""
    # `python agent.py`: not imported, not frozen, not in a zip, not behind shed_syntax_tree() already
    is_script = __name__ == "__main__" and __spec__ is None and os.path.isfile(globals().get("__file__", ""))
    if is_script and hasattr(os, "memfd_create"):
        shed_syntax_tree()
    config = load_config(config_path(arguments.config))
    folder = state_path()
    os.makedirs(folder, mode=0o700, exist_ok=True)
    pid_file = PidFile(folder)
    if not pid_file.claim():
        raise CommandError(f"another agent runs with {folder} (pid {pid_file.holder()}); stop it first")
    os.chdir("/")
    log(f"agent: starting with host_id={config.host_id}")
    print_warnings(config)
    agent = Agent(config, Probe(state=folder), folder, notifier=Notifier())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, agent.stop)
    try:
        agent.serve()
    finally:
        pid_file.release()
    return OK


def shed_syntax_tree() -> None:
    """Start over in the same process, with the compiled code. Python keeps the syntax tree of the script it was given
    for as long as the script runs, and what compiling took besides: 13 MB here, more than all the rest."""
    with open(__file__, "rb") as handle:
        code = compile(handle.read(), os.path.abspath(__file__), "exec")
    memory = os.memfd_create("agent", 0)  # without MFD_CLOEXEC: it is read behind the exec
    with open(memory, "wb", closefd=False) as handle:
        handle.write(marshal.dumps(code))
    os.lseek(memory, 0, os.SEEK_SET)
    again = "import marshal, sys; del sys.argv[0]; exec(marshal.load(open(int(sys.argv.pop(0)), 'rb')))"
    flags = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv)]
    # -P: no modules from the working directory.
    argv = [sys.executable, *flags, "-P", "-c", again, str(memory), os.path.abspath(__file__), *sys.argv[1:]]
    try:
        os.execv(sys.executable, argv)
    except OSError:
        os.close(memory)  # it works without, only fatter


def command_once(arguments: Any) -> int:
    """Collect once and print the report as it would be sent."""
    path = config_path(arguments.config)
    is_missing = path == CONFIG_PATH and not arguments.config and not os.path.lexists(path)  # none was named either
    config = Config(short_host_name()) if is_missing else load_config(path)
    print_warnings(config)
    if arguments.send and is_missing:
        raise CommandError(f"--send needs a config: {path} is not there")
    probe = Probe()
    traces: list[tuple[str, str, float, int, str]] = []
    if arguments.explain:
        probe.trace = lambda *trace: traces.append(trace)
    names = names_of(arguments.tick) if arguments.tick else list(COLLECTORS)
    now = probe.now()
    collected = collect(probe, load_memories(os.path.join(state_path(), "memory")), names)
    body = encode_report(Reporter(config.host_id, now).build_report(arguments.tick or SLOW, now, collected))
    # Control characters and changes of direction, which a terminal would act on, become escapes: the same JSON.
    print("".join(sign if sign.isprintable() else json.dumps(sign)[1:-1] for sign in body.decode()), flush=True)
    if arguments.explain:  # what was read and run, on stderr, so that stdout stays JSON
        print(f"{'':4} {'ms':>8} {'bytes':>9}  {'result':<10} what", file=sys.stderr)
        for kind, what, seconds, size, outcome in traces:
            print(f"{kind:4} {seconds * 1000:8.1f} {size:9d}  {outcome:<10} {one_line(what)}", file=sys.stderr)
        runs = sum(trace[0] == "run" for trace in traces)
        print(f"{len(traces) - runs} reads, {runs} commands", file=sys.stderr)
    return send_once(config, body) if arguments.send else OK


def send_once(config: Config, body: bytes) -> int:
    """Send a report and print the server's answer."""
    try:
        answer = Client(config).send(body)
    except Unreachable as error:
        raise CommandError(f"cannot reach {config.url}: {error}") from None
    print(f"{answer.status} {one_line(to_text(answer.body))[:2000]}", flush=True)
    if judge(answer, 1) is not ACCEPTED:
        raise CommandError(describe_answer(answer, config.host_id))
    return OK


def command_check(arguments: Any) -> int:
    """Config, tools, server, token, clock: a line each, and what to do about it."""
    path, probe = config_path(arguments.config), Probe()
    results: list[tuple[bool, str]] = []
    config: Config | None = None
    try:
        config = load_config(path)
        results += [(False, f"config: {warning}") for warning in config.warnings]
        results.append((True, f"config: {path}, host_id={config.host_id}"))
    except ConfigError as error:
        results.append((False, f"config: {error}"))
    results += [check_state(), *check_tools(probe)]
    results += [*check_mail(config, probe), *check_server(config)] if config else []
    for good, text in results:
        print("✓" if good else "✗", one_line(text), flush=True)
    return OK if all(good for good, _ in results) else FAILED


def check_state() -> tuple[bool, str]:
    folder = present = state_path()
    while not os.path.exists(present):  # `start` makes it
        present = os.path.dirname(present)
    if os.access(present, os.W_OK):
        return True, f"state: {folder}"
    return False, f"state: cannot write to {folder}; run as root, or set STATE_DIRECTORY"


def check_tools(probe: Probe) -> list[tuple[bool, str]]:
    """Each tool: found, needed and not found, or not needed on this host."""
    results = []
    for name, sign_of_need, purpose in TOOLS:
        found, needed = attempt(probe.find, name), os.path.exists(sign_of_need)
        missing = f"not found, needed for {purpose}" if needed else f"not found, not needed here ({purpose})"
        results.append((bool(found) or not needed, f"{name}: {found or missing}"))
    return results


def check_mail(config: Config, probe: Probe) -> list[tuple[bool, str]]:
    """Whether root can be told where that was asked for."""
    hours, program = config.mail_root_seconds // 3600, attempt(probe.find, "sendmail")
    good = f"mail: {program}, to root when nothing was taken for {hours} h"
    bad = "mail: sendmail: not installed; mail_root_after_hours needs a mail server here, such as postfix"
    return [(bool(program), good if program else bad)] if hours else []


def check_server(config: Config) -> list[tuple[bool, str]]:
    """Post a signed, empty batch: the signature is checked before the content, so nothing is stored."""
    try:
        client = Client(config)
        answer = client.send(b"[]")
    except (Unreachable, OSError) as error:
        advice = "is it running, does a firewall stand between?"
        return [(False, f"server: cannot reach {config.url}: {error}; {advice}")]
    results = [(True, f"server: {config.url} answers")]
    if judge(answer, 0) in (ACCEPTED, REFUSED):
        results.append((True, f"token: accepted for host:{config.host_id}"))
    else:
        results.append((False, f"token: {describe_answer(answer, config.host_id)}"))
    if client.clock_offset is not None:
        good = abs(client.clock_offset) <= CLOCK_TOLERANCE
        advice = "" if good else "; set the clock right (apt install chrony)"
        results.append((good, f"clock: {client.clock_offset:+.3f} s from the server's{advice}"))
    return results


def command_stop(_: Any) -> int:
    """End the running agent (the old unit's ExecStop)."""
    pid = PidFile(state_path()).holder()
    if pid is None:
        print("agent: not running", flush=True)
        return OK
    os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + STOP_SECONDS
    while PidFile(state_path()).holder() == pid:
        if time.monotonic() > until:
            raise CommandError(f"pid {pid} did not stop within {STOP_SECONDS} s")
        time.sleep(0.05)
    print(f"agent: stopped (pid {pid})", flush=True)
    return OK


def command_version(_: Any) -> int:
    """Name and version."""
    print(f"{NAME} {VERSION}", flush=True)
    return OK


class CommandError(Exception):
    """A command that failed, with the reason in one line."""


FUNCTIONS = (command_start, command_once, command_check, command_stop, command_version)
COMMANDS: dict[str, Callable[[Any], int]] = {run.__name__.removeprefix("command_"): run for run in FUNCTIONS}


def parse_arguments(argv: list[str]) -> Any:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--config", metavar="FILE", help=f"settings (default: $AGENT_CONFIG or {CONFIG_PATH})")
    parser = argparse.ArgumentParser(prog=NAME, parents=[common], description="Reports a Proxmox host to its monitor.")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, parents=[common], help=function.__doc__)
        command.set_defaults(command=name)
        if name == "once":
            command.add_argument("--tick", choices=TICKS, default=None, help="only the sections of this tick")
            command.add_argument("--send", action="store_true", default=False, help="send it and print the answer")
            command.add_argument("--explain", action="store_true", default=False, help="list each file and command")
    # Not set_defaults(): the commands share the actions, and their defaults would undo a --config before the command.
    return parser.parse_args(argv, argparse.Namespace(command="start", config=None))


def print_warnings(config: Config) -> None:
    for warning in config.warnings:
        print(f"agent: warning: {one_line(warning)}", file=sys.stderr, flush=True)


def repair_environ() -> None:
    """Take back what a frozen binary's loader put into the environment: with its library path, the host's own
    programs would load our libraries and fail."""
    if not getattr(sys, "frozen", False):
        return
    original = os.environ.pop("LD_LIBRARY_PATH_ORIG", None)
    os.environ.pop("LD_LIBRARY_PATH", None)
    if original:
        os.environ["LD_LIBRARY_PATH"] = original
    for name in [name for name in os.environ if name.startswith("_PYI_")]:
        del os.environ[name]


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done, 1: failed (one line why on stderr), 2: usage."""
    repair_environ()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # also where the locale is C
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        return COMMANDS[arguments.command](arguments)
    except (CommandError, ConfigError, SourceError) as error:
        reason = str(error)
    except BrokenPipeError:  # once | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
    except KeyboardInterrupt:
        reason = "interrupted"
    print(f"agent: {one_line(reason)}", file=sys.stderr, flush=True)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
