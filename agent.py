#!/usr/bin/env python3
"""Collect what a Proxmox host knows about itself, and post it to the server, signed.

    constants -> config -> probe -> parsers -> collectors -> report
              -> signature -> spool -> delivery -> service -> commands

The agent listens on no port, runs a fixed list of read-only commands, and nothing a server answers can change
what it runs. Standard library only. Everything it reads or runs goes through the probe, so that
`agent.py once --explain` can list it.
"""

from __future__ import annotations

import argparse
import binascii
import fcntl
import functools
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import tomllib
import zlib
from _queue import Empty, SimpleQueue  # the C half of `queue`: no further imports
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

try:  # the digest alone, without OpenSSL: 4 MB less
    from _sha2 import sha256  # type: ignore[import-not-found]  # Python 3.12 and later
except ImportError:
    try:
        from _sha256 import sha256  # type: ignore[import-not-found]  # Python 3.11
    except ImportError:
        from hashlib import sha256

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
PVE_DEADLINE = 2.0  # seconds for one read below /etc/pve, which is a FUSE file system and may block
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
DISK_DEADLINE = 5.0  # seconds for one write to the spool
CLOSE_SECONDS = 1.2  # the same while stopping

CONNECT_TIMEOUT = 5.0
ANSWER_TIMEOUT = 20.0
BACKOFF_FIRST, BACKOFF_LAST = 1.0, 60.0
BACKLOG_PAUSE = 1.0  # seconds between two batches of the backlog
IDLE_SECONDS = 3600.0
KEEP_SECONDS = 1.0  # a report without an answer for so long goes to disk
CLOCK_TOLERANCE = 30.0  # seconds; `check` complains above it

LOOK_SECONDS = 4.0  # between two looks; the contract allows 5, and the report needs a moment too
URGENT_SECONDS = 1.5  # how long a change of a pool's state waits for the pool in full
FLUSH_SECONDS = 5.0  # how long finished sections wait for the rest of their round
BEAT_SECONDS = 60.0  # between two words to systemd, where it keeps no watchdog
STOP_SECONDS = 10

POOLS_PATH = "/proc/spl/kstat/zfs"
GUEST_PATHS = ("/sys/fs/cgroup/qemu.slice", "/sys/fs/cgroup/lxc")
TASKS_PATH = "/var/log/pve/tasks/active"

OK, FAILED, USAGE = 0, 1, 2

# --- config: settings from TOML; a mistake is told with file, key and reason ---


class ConfigError(Exception):
    """A mistake in the settings: file, key, reason, and what to write instead."""

    def __init__(self, path: str, key: str, reason: str) -> None:
        super().__init__(f"{path}: {key}: {reason}" if key else f"{path}: {reason}")


class Address:
    """A server's address in parts."""

    __slots__ = ("host", "path", "port", "tls", "url")

    def __init__(self, url: str, tls: bool, host: str, port: int, path: str) -> None:
        self.url = url
        self.tls = tls
        self.host = host
        self.port = port
        self.path = path


class Config:
    """The agent's settings. Made by load_config, or by default_config where there is no file."""

    __slots__ = (
        "address",
        "ca_file",
        "host_id",
        "intervals",
        "key",
        "max_bytes",
        "max_seconds",
        "path",
        "warnings",
    )

    def __init__(self, host_id: str) -> None:
        self.path = ""
        self.host_id = host_id
        self.address: Address | None = None
        self.key = b""  # the host's secret; empty without a config
        self.ca_file = ""
        self.intervals = {FAST: 30, MEDIUM: 300, SLOW: 1800}
        self.max_bytes = 256 * MIB
        self.max_seconds = 7 * DAY
        self.warnings: list[str] = []


SETTINGS: dict[str, dict[str, tuple[type, int, int]]] = {  # table -> key -> type, and for numbers the range
    "": {"server_url": (str, 0, 0), "token": (str, 0, 0), "token_file": (str, 0, 0), "host_id": (str, 0, 0)}
    | {"ca_file": (str, 0, 0), "intervals": (dict, 0, 0), "spool": (dict, 0, 0)},
    "intervals": {"fast_seconds": (int, 1, DAY), "medium_seconds": (int, 1, DAY), "slow_seconds": (int, 1, DAY)},
    "spool": {"max_mb": (int, 1, 1024 * 1024), "max_days": (int, 1, 3650)},
}
TYPE_NAMES = {str: "a text in quotes", int: "a whole number", dict: "a table"}
HOST_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def config_path(flag: str | None) -> str:
    """--config, else $AGENT_CONFIG, else the usual place."""
    return flag or os.environ.get("AGENT_CONFIG") or CONFIG_PATH


def state_path() -> str:
    """Where the agent keeps what must survive: systemd's $STATE_DIRECTORY, else the usual place."""
    return os.environ.get("STATE_DIRECTORY", "").split(":")[0] or STATE_PATH


def short_host_name() -> str:
    return os.uname().nodename.split(".")[0]


def default_config() -> Config:
    """What `once` uses where there is no file: nothing can be sent, and the host is named after itself."""
    return Config(short_host_name())


def load_config(path: str) -> Config:
    """The settings in a file, all checked."""
    settings = read_toml(path)
    check_settings(path, "", settings)
    config = Config(find_host_id(path, settings))
    config.path = path
    config.address = parse_url(path, settings.get("server_url"))
    config.key = parse_token(path, *find_token(path, settings, config.warnings))
    config.ca_file = find_ca_file(path, settings)
    config.intervals = find_intervals(path, settings.get("intervals", {}))
    spool = settings.get("spool", {})
    config.max_bytes = spool.get("max_mb", 256) * MIB
    config.max_seconds = spool.get("max_days", 7) * DAY
    warn_if_readable(path, config.warnings)
    return config


def read_toml(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as handle:
            return tomllib.loads(handle.read(MIB).decode("utf-8"))
    except OSError as error:
        raise ConfigError(path, "", error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise ConfigError(path, "", "not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(path, "", f"not TOML: {error}") from None


def check_settings(path: str, table: str, settings: dict[str, Any]) -> None:
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
        if isinstance(value, dict):
            check_settings(path, name, value)


def find_host_id(path: str, settings: dict[str, Any]) -> str:
    host_id = settings.get("host_id", short_host_name())
    if not is_host_id(host_id):
        raise ConfigError(
            path, "host_id", f"{host_id!r}: 1 to 63 of a-z A-Z 0-9 . _ -, beginning with a letter or digit"
        )
    return host_id


def is_host_id(text: str) -> bool:
    return 1 <= len(text) <= 63 and text[0] not in "._-" and HOST_ID_CHARACTERS.issuperset(text)


def parse_url(path: str, url: str | None) -> Address:
    """The parts of server_url: https anywhere, http for this machine alone."""
    if not url:
        raise ConfigError(path, "server_url", 'missing; write server_url = "https://monitor.example.com"')
    scheme, found, rest = url.partition("://")
    authority, slash, where = rest.partition("/")
    if scheme.lower() in ("wss", "ws"):
        better = f"https://{authority}"
        raise ConfigError(path, "server_url", f'{scheme}:// was the old agent\'s; write "{better}" instead of "{url}"')
    if not found or scheme.lower() not in ("https", "http"):
        raise ConfigError(path, "server_url", f'{url!r}: write "https://" and the server\'s name')
    tls = scheme.lower() == "https"
    host, port = split_authority(path, url, authority, 443 if tls else 80)
    if not tls and not is_loopback(host):
        better = f"https://{authority}"
        raise ConfigError(
            path, "server_url", f'http:// is for loopback addresses only; write "{better}" instead of "{url}"'
        )
    if "?" in where or "#" in where or not where.isascii() or any(sign <= " " for sign in where):
        raise ConfigError(path, "server_url", f"{url!r}: only scheme, name, port and path may be given")
    return Address(url.rstrip("/"), tls, host, port, (slash + where).rstrip("/"))


def split_authority(path: str, url: str, authority: str, port: int) -> tuple[str, int]:
    """`name`, `name:port`, `[::1]:port` → name and port."""
    if authority.startswith("["):
        host, _, rest = authority[1:].partition("]")
        digits = rest.removeprefix(":") if rest else ""
    else:
        host, colon, digits = authority.partition(":")
        if colon and not digits:
            digits = "?"
    if not host or "@" in authority or not host.isascii() or any(sign <= " " or sign in "?#%\\\x7f" for sign in host):
        raise ConfigError(path, "server_url", f"{url!r}: no server name that can be used")
    if digits:
        if not (digits.isascii() and digits.isdigit() and 1 <= int(digits[:6]) <= 65535):
            raise ConfigError(path, "server_url", f"{url!r}: the port must be 1 to 65535")
        port = int(digits)
    return host, port


def is_loopback(host: str) -> bool:
    """localhost, ::1, and 127.0.0.0/8 written out (a name such as 127.0.0.1.example.com is not)."""
    parts = host.split(".")
    numbers = len(parts) == 4 and all(part.isdigit() and int(part) <= 255 for part in parts)
    return host.lower() in ("localhost", "::1") or (numbers and parts[0] == "127")


def find_token(path: str, settings: dict[str, Any], warnings: list[str]) -> tuple[str, str]:
    """The key that named it and the token: token, token_file, or systemd's credential of the name `token`."""
    if "token" in settings and "token_file" in settings:
        raise ConfigError(path, "token_file", "give token or token_file, not both")
    if "token" in settings:
        return "token", settings["token"]
    credentials = os.environ.get("CREDENTIALS_DIRECTORY", "")
    if "token_file" in settings:
        name = settings["token_file"].replace("${CREDENTIALS_DIRECTORY}", credentials)
        name = name.replace("$CREDENTIALS_DIRECTORY", credentials)
        # A bare name is the credential of that name; else it lies beside the config.
        file = os.path.join(credentials or os.path.dirname(os.path.abspath(path)), name)
    elif credentials:
        file = os.path.join(credentials, "token")
    else:
        raise ConfigError(path, "token", 'missing; write token = "whsec_…" or token_file = "…"')
    try:
        with open(file, encoding="utf-8", errors="replace") as handle:
            text = handle.read(64 * KIB).strip()
    except OSError as error:
        raise ConfigError(path, "token_file", f"{file}: {error.strerror}") from None
    if not file.startswith(credentials or "\0"):
        warn_if_readable(file, warnings)
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


def find_ca_file(path: str, settings: dict[str, Any]) -> str:
    file = settings.get("ca_file", "")
    if "ca_file" in settings and not os.access(file, os.R_OK):
        raise ConfigError(path, "ca_file", f"{file!r}: cannot be read")
    return file


def find_intervals(path: str, table: dict[str, int]) -> dict[str, int]:
    """Seconds per tick; a slower tick may not come more often than a faster one."""
    intervals = {FAST: 30, MEDIUM: 300, SLOW: 1800} | {
        tick: table[f"{tick}_seconds"] for tick in TICKS if f"{tick}_seconds" in table
    }
    for fast, slow in ((FAST, MEDIUM), (MEDIUM, SLOW)):
        if intervals[fast] > intervals[slow]:
            key = f"intervals.{fast}_seconds"
            default = "" if f"{slow}_seconds" in table else " (the default)"
            raise ConfigError(path, key, f"{intervals[fast]} is above {slow}_seconds = {intervals[slow]}{default}")
    return intervals


def warn_if_readable(path: str, warnings: list[str]) -> None:
    """A file with a secret that others may read is worth a word, no more."""
    stat = os.stat(path)
    if stat.st_mode & 0o004 or (stat.st_mode & 0o040 and stat.st_gid != 0):
        warnings.append(f"{path}: readable by others and holds the token; chmod 600 {path}")


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


def write_file(path: str, content: bytes) -> None:
    """Beside, flushed, renamed: after a crash there is the whole file or none of it."""
    partial = path + ".tmp"
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(partial, path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)  # the new name, too, must survive a power cut
    finally:
        os.close(folder)


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
        self.jobs: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]]] = SimpleQueue()
        self.starting = threading.Lock()
        self.thread: threading.Thread | None = None
        self.late: tuple[str, SimpleQueue[Any]] | None = None  # what it hangs on, and where the answer will come
        self.waiting: set[SimpleQueue[Any]] = set()

    def call(self, what: str, job: Callable[[], Any]) -> Any:
        """The job's result; SourceError('timeout') when it takes too long, 'stuck' while an earlier one still does."""
        if self.late is not None:
            if self.late[1].empty():
                raise SourceError("stuck", f"{what}: left out, {self.late[0]} still does not answer")
            self.late = None
        with self.starting:
            if self.thread is None:
                self.thread = threading.Thread(target=self._serve, name=self.name, daemon=True)
                self.thread.start()
        answer: SimpleQueue[Any] = SimpleQueue()
        self.waiting.add(answer)
        self.jobs.put((job, answer))
        try:
            result = answer.get(timeout=self.deadline)
        except Empty:
            self.late = (what, answer)
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
            except Exception as error:  # raised again where it was asked for
                result = error
            answer.put(result)


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

    def __init__(
        self, *, path: str = COMMAND_PATH, pve_root: str = PVE_ROOT, deadline: float = PVE_DEADLINE, state: str = ""
    ) -> None:
        self.path = path
        self.pve_root = pve_root
        self.environ = {**COMMAND_ENVIRON, "PATH": path}
        self.worker = Worker(deadline, "pve")
        self.trace: Callable[[str, str, float, int, str], None] | None = None  # --explain listens here
        self.problems: dict[str, dict[str, str]] = {}
        self.stuck_file = os.path.join(state, "stuck.json") if state else ""
        self.stuck = load_stuck(self.stuck_file)  # argv -> pid and its start ticks
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
                self._save_stuck()
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
                self._save_stuck()
                text = f"{' '.join(child.argv)}: process {child.pid} cannot be killed (hangs in the kernel)"
                raise SourceError("stuck", text)
            time.sleep(0.01)

    def _save_stuck(self) -> None:
        """A restarted agent, too, must not start a second copy."""
        if self.stuck_file:
            stuck = [[list(argv), pid, ticks] for argv, (pid, ticks) in self.stuck.items()]
            try:
                write_file(self.stuck_file, json.dumps(stuck).encode())
            except OSError as error:
                log_once("stuck", f"probe: cannot write {self.stuck_file}: {error.strerror}")

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


def load_stuck(path: str) -> dict[tuple[str, ...], tuple[int, str | None]]:
    """The commands that an earlier run of the agent had to leave behind."""
    try:
        with open(path, encoding="utf-8") as handle:
            return {tuple(argv): (int(pid), ticks) for argv, pid, ticks in json.load(handle)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        log(f"probe: {path} cannot be used; commands stuck before the restart are not known")
        return {}


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

    def __enter__(self) -> Self:
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


def one_line(text: str) -> str:
    """Text from outside, safe for a terminal and for one line of a log."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def log(text: str) -> None:
    """A line for the journal."""
    try:
        print(one_line(text), flush=True)
    except OSError:
        pass  # nobody listens any more; the work goes on


def log_once(topic: str, text: str) -> None:
    """A line for the journal, unless it says what was last said on the topic (numbers may differ)."""
    told = text.translate(NO_DIGITS)
    if LAST_TOLD.get(topic) != told:
        LAST_TOLD[topic] = told
        log(text)


NO_DIGITS = dict.fromkeys(map(ord, "0123456789"))
LAST_TOLD: dict[str, str] = {}


# --- parsers: text to values, pure ---

# --- collectors: probe and parsers to one section of the report ---


class Collector:
    """A section of the report and the function that makes it."""

    __slots__ = ("function", "lock", "name", "tick")

    def __init__(self, name: str, tick: str, function: Callable[[Any, dict[str, Any]], Any]) -> None:
        self.name = name
        self.tick = tick
        self.function = function
        self.lock = threading.Lock()  # held while it runs: its memory is its own


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


def names_of(*ticks: str) -> list[str]:
    """The sections of these ticks, in the report's order."""
    return [name for name, one in COLLECTORS.items() if one.tick in ticks]


def collect(
    probe: Probe, memories: dict[str, dict[str, Any]], names: Iterable[str]
) -> tuple[dict[str, Any], list[str], dict[str, dict[str, str]]]:
    """Sections, absent, errors of these collectors. One that fails costs only its own section."""
    sections: dict[str, Any] = {}
    absent: list[str] = []
    errors: dict[str, dict[str, str]] = {}
    for name in names:
        collect_one(probe, memories, name, sections, absent, errors)
    return sections, absent, errors


def collect_one(
    probe: Probe,
    memories: dict[str, dict[str, Any]],
    name: str,
    sections: dict[str, Any],
    absent: list[str],
    errors: dict[str, dict[str, str]],
) -> None:
    """Run one collector, and file what it gave where it belongs. Never twice at a time: its memory is its own."""
    one = COLLECTORS[name]
    with one.lock:
        probe.problems.pop(name, None)
        try:
            section = one.function(probe, memories.setdefault(name, {}))
            if section is not None:
                sections[name] = section
        except Absent:
            absent.append(name)
        except SourceError as error:
            errors[name] = {"code": error.code, "detail": error.detail[:DETAIL_LIMIT]}
        except Exception as error:  # a fault of ours in one section must not darken the others
            errors[name] = {"code": "failed", "detail": f"fault in the agent: {describe_fault(error)}"}
        problem = probe.problems.pop(name, None)
        if problem is not None and name not in errors:
            errors[name] = {"code": problem["code"], "detail": problem["detail"][:DETAIL_LIMIT]}


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

    def build_report(
        self,
        tick: str,
        now: float,
        collected: tuple[dict[str, Any], list[str], dict[str, dict[str, str]]],
        *,
        spooled: int = 0,
        dropped: int = 0,
        clock_offset: float | None = None,
    ) -> dict[str, Any]:
        """A report as the contract has it. `spooled` reports wait on disk, `dropped` were lost since it was last told;
        `clock_offset` is server minus host in seconds, null before the first answer."""
        sections, absent, errors = collected
        self.seq += 1
        agent = {
            "version": VERSION,
            "started": round(self.started, 3),
            "spooled": spooled,
            "dropped": dropped,
            "clock_offset": clock_offset,
            "cpu_seconds": cpu_seconds(),
            "rss_bytes": rss_bytes(),
        }
        report: dict[str, Any] = {"version": 1, "host_id": self.host_id, "tick": tick, "time": round(now, 3)}
        report |= {"run_id": self.run_id, "seq": self.seq, "agent": agent}
        report.update(sections)
        report["absent"] = absent
        report["errors"] = errors
        return report


def cpu_seconds() -> float:
    """User and system time of the agent and of the commands it has run."""
    spent = os.times()
    return round(spent.user + spent.system + spent.children_user + spent.children_system, 3)


def rss_bytes() -> int | None:
    try:
        return int(read_bytes("/proc/self/statm", 4 * KIB).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # macOS
        return None


def encode_report(report: dict[str, Any]) -> bytes:
    """The report as JSON. A section that cannot be sent becomes an error of its own."""
    try:
        body = to_json(report)
    except (TypeError, ValueError, RecursionError):
        drop_unfit(report)
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


def drop_unfit(report: dict[str, Any]) -> None:
    """Turn the sections that are no JSON (NaN, bytes …) into errors."""
    for name in set(report) - HEADER_KEYS:
        try:
            to_json(report[name])
        except (TypeError, ValueError, RecursionError) as error:
            del report[name]
            report["errors"][name] = {"code": "garbage", "detail": str(error)[:DETAIL_LIMIT]}


HEADER_KEYS = {"version", "host_id", "tick", "time", "run_id", "seq", "agent", "absent", "errors"}

# --- signature: the bytes as sent -> webhook headers ---


def sign(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """The Standard Webhooks signature: v1,base64(HMAC-SHA256(key, "id.timestamp.body"))."""
    signed = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    return "v1," + binascii.b2a_base64(hmac_sha256(key, signed), newline=False).decode()


def hmac_sha256(key: bytes, text: bytes) -> bytes:
    """RFC 2104. Written out because `hmac` and `hashlib` load OpenSSL, 4 MB for one digest per tick."""
    if len(key) > 64:
        key = sha256(key).digest()
    key = key.ljust(64, b"\0")
    inner = sha256(key.translate(HMAC_INNER) + text).digest()
    return sha256(key.translate(HMAC_OUTER) + inner).digest()


HMAC_INNER = bytes(byte ^ 0x36 for byte in range(256))
HMAC_OUTER = bytes(byte ^ 0x5C for byte in range(256))


def webhook_headers(key: bytes, body: bytes, timestamp: int) -> dict[str, str]:
    """The three headers. The id comes from the content, so a repetition has the same one."""
    message_id = "msg_" + sha256(body).hexdigest()[:32]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(key, message_id, timestamp, body),
    }


# --- spool: reports that wait on disk until the server has them ---


class Message:
    """One report on its way: its JSON, and the collectors' memories that become true once it cannot be lost."""

    __slots__ = ("body", "dropped_total", "file", "memories", "offered_at")

    def __init__(self, body: bytes, *, memories: dict[str, bytes] | None = None, dropped_total: int = 0) -> None:
        self.body = body
        self.memories = memories or {}
        self.dropped_total = dropped_total  # what the report tells of lost reports
        self.offered_at = 0.0
        self.file = ""  # its name in the spool, once it is there


def size_on_disk(size: int) -> int:
    """What a file really takes: whole blocks of 4 KiB."""
    return -(-size // 4096) * 4096


class Spool:
    """A folder with one file per report, `number-time.json.gz`, in the order they were made.

    All disk work is done by one thread with a deadline: a disk that hangs (the root pool suspended) must not stop
    the loop that reports just that. Then SourceError is raised, and the caller keeps what it has.
    """

    def __init__(self, folder: str, *, max_bytes: int, max_seconds: float, deadline: float = DISK_DEADLINE) -> None:
        self.folder = os.path.join(folder, "spool")
        self.rejected = os.path.join(folder, "rejected")
        self.losses = os.path.join(folder, "losses.json")
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds
        self.disk = Worker(deadline, "spool")
        self.count = 0  # reports waiting
        self.bytes = 0
        self.number = 0  # of the newest
        self.dropped_total = 0  # reports lost for want of space or age, since the agent was installed
        self.told_total = 0  # how many of them the server has been told of
        self.call("open", self._open)

    def call(self, what: str, job: Callable[[], Any]) -> Any:
        try:
            return self.disk.call(f"spool {what}", job)
        except OSError as error:
            raise source_error(error, f"spool {what}") from None

    @property
    def dropped(self) -> int:
        """Reports lost that the server does not know of."""
        return self.dropped_total - self.told_total

    def push(self, message: Message, now: float) -> None:
        """Put a report on disk. When this returns, it survives a power cut."""
        self.call("write", lambda: self._push(message, now))

    def newest(self) -> tuple[str, bytes] | None:
        """Name and JSON of the newest report."""
        return self.call("read", lambda: next(self._read(reversed(self._names())), None))

    def oldest(self, limit: int) -> list[tuple[str, bytes]]:
        """Names and JSON of up to `limit` oldest reports, as many as fit one request."""
        return self.call("read", lambda: self._batch(limit))

    def discard(self, names: list[str]) -> None:
        """Forget reports the server has."""
        self.call("discard", lambda: self._discard(names))

    def reject(self, name: str, body: bytes, reason: str) -> None:
        """Set a report aside that the server will never take."""
        self.call("reject", lambda: self._reject(name, body, reason))

    def tell_dropped(self, total: int) -> None:
        """The server knows of so many losses now."""
        if total > self.told_total:
            self.told_total = total
            self.call("count", self._save_losses)

    def _open(self) -> None:
        for folder in (self.folder, self.rejected):
            os.makedirs(folder, mode=0o700, exist_ok=True)
        for name in os.listdir(self.folder):
            path = os.path.join(self.folder, name)
            if name.endswith(".tmp"):  # cut off by a crash
                os.unlink(path)
            elif name.endswith(SPOOL_ENDING):
                self.count += 1
                self.bytes += size_on_disk(os.stat(path).st_size)
        self.number = max((int(name.split("-")[0]) for name in self._names()), default=0)
        self._load_losses()

    def _names(self) -> list[str]:
        return sorted(name for name in os.listdir(self.folder) if is_spool_name(name))

    def _push(self, message: Message, now: float) -> None:
        packed = pack(message.body)
        self._make_room(size_on_disk(len(packed)), now)
        name = f"{self.number + 1:012d}-{int(now)}{SPOOL_ENDING}"
        write_file(os.path.join(self.folder, name), packed)
        self.number += 1
        self.count += 1
        self.bytes += size_on_disk(len(packed))
        message.file = name

    def _make_room(self, size: int, now: float) -> None:
        """Oldest first: those over age, and as many as the new one needs."""
        lost = 0
        for name in self._names() if self.count else []:
            age = now - int(name.split("-")[1].removesuffix(SPOOL_ENDING))
            if age <= self.max_seconds and self.bytes + size <= self.max_bytes:
                break
            self._remove(name)
            lost += 1
        if lost:
            self.dropped_total += lost
            self._save_losses()
            log_once("full", f"spool: full or over age, dropped the oldest {lost} ({self.dropped} not yet reported)")

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Name and JSON of each; what cannot be read any more is set aside on the way."""
        for name in names:
            try:
                packed = read_bytes(os.path.join(self.folder, name), OUTPUT_LIMIT, chunk=MIB)
                yield name, unpack(packed)
            except FileNotFoundError:
                continue
            except (ValueError, zlib.error, SourceError) as error:
                self._reject(name, packed, f"damaged on disk ({error})")

    def _batch(self, limit: int) -> list[tuple[str, bytes]]:
        """As many of the oldest as fit."""
        batch: list[tuple[str, bytes]] = []
        size = 0
        for name, body in self._read(self._names()):
            size += len(body)
            if batch and size > BATCH_LIMIT:
                break
            batch.append((name, body))
            if len(batch) >= limit:
                break
        if not batch:  # somebody emptied the folder
            self.count = self.bytes = 0
        return batch

    def _discard(self, names: list[str]) -> None:
        for name in names:
            self._remove(name)

    def _remove(self, name: str) -> None:
        path = os.path.join(self.folder, name)
        try:
            size = os.stat(path).st_size
            os.unlink(path)
        except FileNotFoundError:
            return
        self.count -= 1
        self.bytes -= size_on_disk(size)

    def _reject(self, name: str, body: bytes, reason: str) -> None:
        if not name:
            self.number += 1
            name = f"{self.number:012d}-{int(time.time())}{SPOOL_ENDING}"
        body = body if body.startswith(b"\x1f\x8b") else pack(body)
        write_file(os.path.join(self.rejected, name), body)
        self._remove(name)
        kept = sorted(os.listdir(self.rejected))
        for old in kept[: max(0, len(kept) - REJECTED_LIMIT)]:
            os.unlink(os.path.join(self.rejected, old))
        log(f"spool: set aside as {os.path.join(self.rejected, name)}: {reason}")

    def _save_losses(self) -> None:
        write_file(self.losses, to_json({"dropped_total": self.dropped_total, "told_total": self.told_total}))

    def _load_losses(self) -> None:
        try:
            losses = json.loads(read_bytes(self.losses, MIB))
            self.dropped_total, self.told_total = int(losses["dropped_total"]), int(losses["told_total"])
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, SourceError) as error:
            log(f"spool: {self.losses} cannot be used ({error}); the count of lost reports begins anew")


def is_spool_name(name: str) -> bool:
    number, _, rest = name.partition("-")
    return number.isdigit() and rest.endswith(SPOOL_ENDING) and rest.removesuffix(SPOOL_ENDING).isdigit()


class Memories:
    """What the collectors remember over restarts, a file per section; written only when it changed."""

    def __init__(self, folder: str, spool: Spool) -> None:
        self.folder = os.path.join(folder, "memory")
        self.spool = spool
        self.values: dict[str, dict[str, Any]] = {}
        self.saved: dict[str, bytes] = {}
        self.saved_at: dict[str, float] = {}
        spool.call("memory", self._open)

    def changed(self, names: Iterable[str], now: float) -> dict[str, bytes]:
        """The memories to be saved with a report. Fast sections, whose last samples change each time, now and then;
        those that say which events were sent, always."""
        texts = {}
        for name in names:
            memory = self.values.get(name)
            if not memory:
                continue
            rare = COLLECTORS[name].tick == FAST and name not in EVENT_SECTIONS
            if rare and now - self.saved_at.get(name, now - MEMORY_SECONDS - 1) < MEMORY_SECONDS:
                continue
            text = to_json(memory)
            if text != self.saved.get(name):
                texts[name] = text
        return texts

    def save(self, texts: dict[str, bytes], now: float) -> None:
        """Called once the report made with them cannot be lost any more."""
        for name, text in texts.items():
            self.spool.call("memory", functools.partial(write_file, self._path(name), text))
            self.saved[name] = text
            self.saved_at[name] = now

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, f"{name}.json")

    def _open(self) -> None:
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        self.values = load_memories(self.folder)
        self.saved = {name: to_json(memory) for name, memory in self.values.items()}


def load_memories(folder: str) -> dict[str, dict[str, Any]]:
    """What the collectors remember, by section; `once` reads it too, and leaves it as it is."""
    memories = {}
    for file in sorted(os.listdir(folder)) if os.access(folder, os.R_OK) else ():
        if not file.endswith(".json"):
            continue
        try:
            memory = json.loads(read_bytes(os.path.join(folder, file), OUTPUT_LIMIT, chunk=MIB))
            if not isinstance(memory, dict):
                raise ValueError("not an object")
        except (OSError, ValueError, SourceError) as error:
            print(f"memory: {file} cannot be used ({error}); its section begins anew", file=sys.stderr, flush=True)
            continue
        memories[file.removesuffix(".json")] = memory
    return memories


# --- delivery: one kept connection; an answer means accepted, later or refused ---


class Unreachable(Exception):
    """No answer: no route, refused, time-out, TLS."""


class Answer:
    """What came back: status, headers with small names, body."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def fields(self) -> dict[str, Any]:
        """The JSON object in the body; empty when there is none."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}


class Connection:
    """A kept HTTP/1.1 connection to one address. (`http.client` brings `email` and `ssl`: 6 MB, also without TLS.)"""

    def __init__(self, address: Address, ca_file: str = "", *, timeout: float = ANSWER_TIMEOUT) -> None:
        self.address = address
        self.timeout = timeout
        self.socket: Any = None
        self.context: Any = None
        self.rest = b""
        if address.tls:
            import ssl  # 5 MB, only where it is needed

            self.context = ssl.create_default_context(cafile=ca_file or None)

    def post(self, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """Send and wait for the answer. A kept connection that turns out closed is replaced once: reports may be
        repeated without harm."""
        if self.socket is not None:
            if not self._closed():
                try:
                    return self._exchange(path, headers, body)
                except ConnectionClosed:
                    pass
            self.close()
        self._connect()
        try:
            return self._exchange(path, headers, body)
        except ConnectionClosed:
            raise Unreachable("the server closed the connection without an answer") from None

    def close(self) -> None:
        if self.socket is not None:
            try:
                self.socket.close()
            except OSError:
                pass
            self.socket = None

    def _connect(self) -> None:
        where = (self.address.host, self.address.port)
        try:
            raw = socket.create_connection(where, CONNECT_TIMEOUT)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.context is not None:
                raw = self.context.wrap_socket(raw, server_hostname=self.address.host)
        except (OSError, UnicodeError) as error:  # ssl's errors are OSErrors; a name too long is a UnicodeError
            raise Unreachable(describe_network_error(error)) from None
        self.socket = raw
        self.rest = b""

    def _closed(self) -> bool:
        """Nothing should come before we ask; if the socket is readable, the other side has closed."""
        waiting = select.poll()
        waiting.register(self.socket, select.POLLIN)
        return bool(waiting.poll(0))

    def _exchange(self, path: str, headers: dict[str, str], body: bytes) -> Answer:
        lines = [f"POST {path} HTTP/1.1", f"Host: {host_header(self.address)}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.deadline = time.monotonic() + self.timeout
        self.socket.settimeout(self.timeout)
        try:
            self.socket.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            return self._receive()
        except (BrokenPipeError, ConnectionResetError):
            self.close()
            raise ConnectionClosed from None
        except ConnectionClosed:
            self.close()
            raise
        except (OSError, ValueError) as error:
            self.close()
            raise Unreachable(describe_network_error(error)) from None

    def _receive(self) -> Answer:
        status = 100
        while status < 200:  # 1xx: the answer proper follows
            head = self._until(b"\r\n\r\n", first=True).decode("latin-1").split("\r\n")
            protocol, _, rest = head[0].partition(" ")
            if not protocol.startswith("HTTP/1.") or not rest[:3].isdigit():
                raise ValueError("the answer is not HTTP")
            status = int(rest[:3])
        headers = {}
        for line in head[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        body, kept = self._body(status, headers)
        if not kept or "close" in headers.get("connection", "").lower() or protocol == "HTTP/1.0":
            self.close()
        return Answer(status, headers, body)

    def _body(self, status: int, headers: dict[str, str]) -> tuple[bytes, bool]:
        """The body, and whether its end was marked (else the connection cannot be kept)."""
        if status in (204, 304):
            return b"", True
        if "chunked" in headers.get("transfer-encoding", "").lower():
            return self._chunks(), True
        if "content-length" in headers:
            return self._exactly(int(headers["content-length"])), True
        body = self.rest
        while part := self._more():
            body += part
            check_answer_size(len(body))
        return body, False

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self._until(b"\r\n").split(b";")[0], 16):
            body += self._exactly(size)
            check_answer_size(len(body))
            self._until(b"\r\n")
        while self._until(b"\r\n"):  # trailers
            pass
        return body

    def _until(self, mark: bytes, *, first: bool = False) -> bytes:
        while mark not in self.rest:
            part = self._more()
            if not part and first and not self.rest:
                raise ConnectionClosed
            if not part:
                raise ValueError("the answer was cut short")
            self.rest += part
            check_answer_size(len(self.rest))
        found, _, self.rest = self.rest.partition(mark)
        return found

    def _exactly(self, size: int) -> bytes:
        check_answer_size(size)
        while len(self.rest) < size:
            part = self._more()
            if not part:
                raise ValueError("the answer was cut short")
            self.rest += part
        found, self.rest = self.rest[:size], self.rest[size:]
        return found

    def _more(self) -> bytes:
        left = self.deadline - time.monotonic()  # a server that drips bytes must not hold us for ever
        if left <= 0:
            raise TimeoutError("timed out")
        self.socket.settimeout(left)
        return self.socket.recv(64 * KIB)


class ConnectionClosed(Exception):
    """A kept connection was closed by the other side before it answered."""


def check_answer_size(size: int) -> None:
    if not 0 <= size <= MIB:
        raise ValueError("the answer is too large")


def host_header(address: Address) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    return host if address.port == (443 if address.tls else 80) else f"{host}:{address.port}"


def describe_network_error(error: Exception) -> str:
    """In an operator's words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    reason = getattr(error, "verify_message", "")
    if reason:
        return f"certificate not accepted: {reason}; is ca_file needed?"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


ACCEPTED, LATER, REFUSED, BLOCKED, SKEWED = "accepted", "later", "refused", "blocked", "skewed"
VERDICTS = {400: REFUSED, 413: REFUSED, 422: REFUSED, 401: BLOCKED, 403: BLOCKED, 404: BLOCKED}
ADVICE = {  # what the operator must do, by the server's code
    "unknown_host": "the server does not know this host: run `proxmox-monitor-server register-host {host}` there, "
    "and put the token it prints into the config",
    "invalid_token": "the token is not the one the server has for {host}: run "
    "`proxmox-monitor-server rotate-token {host}` there, and put the token it prints into the config",
    "clock_skew": "the clock of this host or of the server is wrong: set it right",
}


def judge(answer: Answer) -> str:
    """What an answer means for the report. No answer can mean more than these five."""
    if 200 <= answer.status < 300:
        # A captive portal says 200 too, in HTML.
        return LATER if answer.body.lstrip()[:1] == b"<" else ACCEPTED
    if answer.status == 401 and answer.fields().get("code") == "clock_skew" and server_time(answer) is not None:
        return SKEWED
    return VERDICTS.get(answer.status, LATER)


def server_time(answer: Answer) -> float | None:
    """The server's clock, if it gave a sane one."""
    value: Any = answer.fields().get("server_time")
    if type(value) not in (int, float) or not 0 < value < 2**33:
        return None
    return float(value)


def retry_after(answer: Answer) -> float:
    """Seconds the server asks to wait, at most an hour; 0 when it does not."""
    text = answer.headers.get("retry-after", "")
    return min(float(text[:6]), 3600.0) if text.isascii() and text.isdigit() else 0.0


def describe_answer(answer: Answer, host_id: str) -> str:
    """An answer that is not an acceptance, with what to do about it, in one line."""
    fields = answer.fields()
    code = fields.get("code")
    words = " ".join(str(fields.get(key)) for key in ("detail", "pointer") if fields.get(key))
    text = f"{answer.status} {code or ''} {words}".strip()[:300]
    if isinstance(code, str) and code in ADVICE:
        return f"{text}; {ADVICE[code].format(host=host_id)}"
    if answer.status in (403, 404):
        return f"{text}; is server_url right, and does the proxy in front of the server let reports through?"
    if 300 <= answer.status < 400:
        return f"{text}; redirected to {answer.headers.get('location', '?')[:200]}: write that into server_url"
    if answer.status < 300:
        return f"{text}; that is a web page, not the server's answer: is server_url right?"
    return text


class Client:
    """Signs reports and posts them to the host's own address on the server."""

    def __init__(self, config: Config) -> None:
        assert config.address is not None
        self.host_id = config.host_id
        self.key = config.key
        self.address = config.address
        self.path = f"{config.address.path}/api/v1/hosts/{config.host_id}/reports"
        self.connection = Connection(config.address, config.ca_file)
        self.clock_offset: float | None = None  # server minus host, in seconds

    def send(self, body: bytes) -> Answer:
        """One signed request. On clock_skew it is signed again with the server's time."""
        packed = pack(body)
        answer = self._post(packed)
        if judge(answer) is SKEWED:
            log_once("clock", f"reporter: this host's clock is off by {-(self.clock_offset or 0):.0f} s; set it right")
            answer = self._post(packed)
        return answer

    def _post(self, packed: bytes) -> Answer:
        before = time.time()
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip", "User-Agent": f"{NAME}/{VERSION}"}
        headers |= webhook_headers(self.key, packed, int(before + (self.clock_offset or 0.0)))
        answer = self.connection.post(self.path, headers, packed)
        told = server_time(answer)
        if told is not None:
            self.clock_offset = round(told - (before + time.time()) / 2, 3)
        return answer


class Sender:
    """Delivers reports: the new one first, then what waits on disk, oldest first, in batches.

    Normally a report goes straight out and never touches the disk. As soon as one is not answered at once, it and
    all that follow are put on disk first, so that a crash costs the tick under way at most. `turn` does one step.
    """

    def __init__(self, config: Config, spool: Spool, memories: Memories | None = None) -> None:
        self.client = Client(config)
        self.spool = spool
        self.memories = memories
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.lock = threading.Lock()
        self.keeping = threading.Lock()
        self.pending: list[Message] = []  # offered, not answered yet
        self.trouble = ""  # why nothing gets through; empty when all is well
        self.backoff = BACKOFF_FIRST
        self.retry_at = 0.0
        self.backlog_at = time.monotonic() + BACKLOG_PAUSE  # what was left by an earlier run comes after the new
        self.batch_size = BATCH_REPORTS
        self.accepted_at: float | None = None
        self.greeted = False

    # called by the loop that makes the reports

    def offer(self, message: Message) -> None:
        """Take a report over."""
        message.offered_at = time.monotonic()
        with self.lock:
            crowd = bool(self.trouble or self.pending)
            self.pending.append(message)
            while len(self.pending) > PENDING_LIMIT:  # the disk does not take them either
                self._lose(self.pending.pop(0))
        if crowd:
            self.keep(KEEP_SECONDS / 4)
        self.inbox.put(message)

    def keep(self, patience: float = KEEP_SECONDS) -> bool:
        """Put on disk what has waited longer than `patience` for its answer. True if any still waits for its time."""
        if not self.pending:
            return False
        with self.keeping:
            return self._keep(time.monotonic() - patience)

    def _keep(self, before: float) -> bool:
        with self.lock:
            waiting = [message for message in self.pending if not message.file]
        for message in waiting:
            if message.offered_at > before and not self.trouble:
                return True
            try:
                self.spool.push(message, time.time())
                self._settle(message)
            except SourceError as error:
                log_once("spool", f"spool: cannot write ({error}); reports are kept in memory")
                return True
        if self.trouble:  # from now on they are found on disk
            with self.lock:
                self.pending = [message for message in self.pending if not message.file]
        return False

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
            try:
                if self.inbox.get(timeout=wait) is None:
                    return
            except Empty:
                pass

    def turn(self, now: float) -> float:
        """One step: at most one request. Returns the seconds until the next one makes sense."""
        if now < self.retry_at:
            return self.retry_at - now
        with self.lock:
            fresh = self.pending[-1] if self.pending else None
        if fresh is not None:
            self._deliver([(fresh.file, fresh.body)], now, fresh)
        elif self.trouble and (newest := self.spool.newest()):
            self._deliver([newest], now)
        elif self.spool.count and now >= self.backlog_at:
            self.backlog_at = now + BACKLOG_PAUSE
            if batch := self.spool.oldest(self.batch_size):
                self._deliver(batch, now)
        elif not self.spool.count:
            self.trouble = ""
        return self._wait(now)

    def _wait(self, now: float) -> float:
        """Seconds until the next step makes sense."""
        if self.retry_at > now:
            return self.retry_at - now
        if self.pending:
            return 0.0
        return max(0.0, self.backlog_at - now) if self.spool.count else IDLE_SECONDS

    def _deliver(self, batch: list[tuple[str, bytes]], now: float, message: Message | None = None) -> None:
        """Send reports (from disk, or the one just made) and act on the answer."""
        body = batch[0][1] if len(batch) == 1 else b"[" + b",".join(body for _, body in batch) + b"]"
        try:
            answer = self.client.send(body)
        except Unreachable as error:
            self._postpone(now, f"cannot reach {self.client.address.url}: {error}")
            return
        self._greet()
        verdict = judge(answer)
        if verdict is ACCEPTED:
            self._accepted(batch, message)
        elif verdict is REFUSED and len(batch) > 1:
            self.backlog_at = now + BACKLOG_PAUSE / 10
            self.batch_size = max(1, len(batch) // 2)  # halved until the bad one stands alone
        elif verdict is REFUSED:
            self._refused(batch[0], message, describe_answer(answer, self.client.host_id))
        else:
            self._postpone(now, describe_answer(answer, self.client.host_id), retry_after(answer))

    def _accepted(self, batch: list[tuple[str, bytes]], message: Message | None) -> None:
        if self.trouble or self.accepted_at is None:
            log(f"reporter: accepted host:{self.client.host_id}")
        self.trouble = ""
        self.backoff = BACKOFF_FIRST
        self.accepted_at = time.time()
        self.batch_size = min(BATCH_REPORTS, self.batch_size * 2)
        if message is not None:
            self._forget(message)
            self._settle(message)
            self.spool.tell_dropped(message.dropped_total)
        names = [name for name, _ in batch if name]
        if message is not None and message.file and not names:  # put on disk while it was under way
            names = [message.file]
        if names:
            self.spool.discard(names)
            if not self.spool.count:
                log("reporter: nothing waits on disk any more")

    def _refused(self, one: tuple[str, bytes], message: Message | None, reason: str) -> None:
        name = message.file if message is not None else one[0]
        if message is not None:
            self._forget(message)
            self._settle(message)
        self.spool.reject(name, one[1], f"the server refused it: {reason}")

    def _postpone(self, now: float, reason: str, asked: float = 0.0) -> None:
        """Not now: everything goes to disk, and the next try comes later and later, at most a minute."""
        if reason.translate(NO_DIGITS) != self.trouble.translate(NO_DIGITS):
            log(f"reporter: {reason}; reports wait on disk")
        self.trouble = reason
        self.keep(0.0)
        jitter = 0.5 + os.urandom(1)[0] / 512  # 0.5 to 1, so that a fleet does not come back in step
        self.retry_at = now + max(asked, self.backoff * jitter, BACKOFF_FIRST)
        self.backoff = min(self.backoff * 2, BACKOFF_LAST)

    def _greet(self) -> None:
        if not self.greeted:
            self.greeted = True
            log(f"reporter: connected to {self.client.address.url}")

    def _forget(self, message: Message) -> None:
        with self.lock:
            if message in self.pending:
                self.pending.remove(message)

    def _settle(self, message: Message) -> None:
        """The report cannot be lost any more: what the collectors remember becomes true."""
        if self.memories is not None and message.memories:
            memories, message.memories = message.memories, {}
            self.memories.save(memories, time.monotonic())

    def _lose(self, message: Message) -> None:
        if not message.file:
            self.spool.dropped_total += 1


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
        self.status = ""

    def tell(self, *lines: str) -> None:
        if self.socket is None:
            return
        try:
            self.socket.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, self.address)
        except OSError:
            pass  # systemd is away for a moment; the next beat comes soon

    def tell_status(self, status: str) -> None:
        if status != self.status:
            self.status = status
            self.tell(f"STATUS={status}")


class Collected:
    """Sections, absent, errors, and the memories to be saved with them."""

    __slots__ = ("absent", "errors", "memories", "sections")

    def __init__(
        self,
        sections: dict[str, Any] | None = None,
        absent: list[str] | None = None,
        errors: dict[str, dict[str, str]] | None = None,
    ) -> None:
        self.sections = sections or {}
        self.absent = absent or []
        self.errors = errors or {}
        self.memories: dict[str, bytes] = {}

    def add(self, other: Collected) -> None:
        self.sections |= other.sections
        self.absent += other.absent
        self.errors |= other.errors
        self.memories |= other.memories

    def is_empty(self) -> bool:
        return not (self.sections or self.absent or self.errors)


class Lane:
    """A thread for collectors that run commands. What is finished is reported while a later one still hangs."""

    def __init__(self, tick: str, probe: Probe, memories: Memories, wake: Callable[[], None]) -> None:
        self.tick = tick
        self.probe = probe
        self.memories = memories
        self.wake = wake
        self.finished: SimpleQueue[Collected | None] = SimpleQueue()
        self.busy = False
        self.waiting = Collected()
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
        try:
            while True:
                part = self.finished.get_nowait()
                if part is None:
                    self.busy = False
                    break
                self.waiting_since = self.waiting_since or now
                self.waiting.add(part)
        except Empty:
            pass
        if self.waiting.is_empty() or (self.busy and now - self.waiting_since < FLUSH_SECONDS):
            return None
        ready, self.waiting, self.waiting_since = self.waiting, Collected(), 0.0
        return ready

    def _work(self, names: list[str]) -> None:
        for name in names:
            part = Collected(*collect(self.probe, self.memories.values, [name]))
            part.memories = self.memories.changed([name], time.monotonic())
            self.finished.put(part)
        self.finished.put(None)
        self.wake()


def look(probe: Probe, seen: dict[str, Any]) -> dict[str, Any]:
    """The state of pools and guests as cheaply as it can be had: a few small files and listings, no process.

    `seen` is the last look; it saves trying files of the ZFS folder that are no pools.
    """
    entries = list_or_none(probe, POOLS_PATH)
    plain = seen.get("plain", frozenset()) if entries == seen.get("entries") else frozenset()
    pools = {}
    no_pools = set(plain)
    for name in entries or ():
        if name in plain:
            continue
        try:
            state = probe.read(f"{POOLS_PATH}/{name}/state", 4 * KIB).strip()
        except SourceError:
            no_pools.add(name)
            continue
        # TRANSITIONING: an import or export is under way, which is no state of its own.
        pools[name] = seen.get("pools", {}).get(name, state) if state == "TRANSITIONING" else state
    guests = {path: [name for name in list_or_none(probe, path) or () if name[:1].isdigit()] for path in GUEST_PATHS}
    return {"entries": entries, "plain": no_pools, "pools": pools, "guests": guests, "tasks": tasks_mark(probe)}


def list_or_none(probe: Probe, path: str) -> list[str] | None:
    try:
        return probe.list_dir(path)
    except SourceError:
        return None


def tasks_mark(probe: Probe) -> tuple[int, int] | None:
    """Inode and size of PVE's list of tasks: it is replaced as a whole."""
    try:
        stat = probe.stat(TASKS_PATH)
    except SourceError:
        return None
    return stat.st_ino, stat.st_size


class Agent:
    """The service. `turn(now)` does what is due and says how long nothing will be; `serve` sleeps between turns."""

    def __init__(self, config: Config, probe: Probe, folder: str, *, notifier: Notifier | None = None) -> None:
        self.config = config
        self.probe = probe
        self.notifier = notifier or Notifier({})
        self.spool = Spool(folder, max_bytes=config.max_bytes, max_seconds=config.max_seconds)
        self.memories = Memories(folder, self.spool)
        self.reporter = Reporter(config.host_id, probe.now())
        self.sender = Sender(config, self.spool, self.memories)
        self.mail: SimpleQueue[str] = SimpleQueue()
        self.stopping = False
        self.lanes = {tick: Lane(tick, probe, self.memories, self.wake) for tick in (MEDIUM, SLOW)}
        self.urgent = Lane(FAST, probe, self.memories, self.wake)
        self.urgent_again = False
        self.held: Collected | None = None  # pool_states that wait a moment for the pools in full
        self.held_until = 0.0
        self.seen: dict[str, Any] | None = None
        self.next_at: dict[str, float] = {}
        self.second_at: dict[str, float] = {}  # of each tick the first moment after the start
        self.next_look = 0.0
        self.next_beat = 0.0

    def serve(self) -> None:
        """Until told to stop."""
        threading.Thread(target=self.sender.serve, name="sender", daemon=True).start()
        while not self.stopping:
            wait = self.turn(self.probe.monotonic())
            try:
                self.mail.get(timeout=wait)
            except Empty:
                pass
        self.close()

    def wake(self) -> None:
        self.mail.put("wake")

    def stop(self, *_: object) -> None:
        """The signal handler: ends what is under way and wakes the loop. SimpleQueue.put may be called here."""
        self.stopping = True
        self.probe.cancel()
        self.spool.disk.cancel()
        self.mail.put("stop")

    def close(self) -> None:
        """Leave the unsent on disk. No waiting for answers: what is sent twice counts once."""
        self.notifier.tell("STOPPING=1", "STATUS=stopping")
        self.spool.disk.deadline = CLOSE_SECONDS
        self.sender.keep(0.0)
        self.sender.inbox.put(None)
        left = len([message for message in self.sender.pending if not message.file])
        lost = f"; {left} could not be written" if left else ""
        log(f"agent: stopped; {self.spool.count} reports wait on disk{lost}")

    def turn(self, now: float) -> float:
        """Do what is due at this moment of the monotonic clock. Returns seconds until the next thing is."""
        if not self.next_at:
            self._begin(now)
        if now >= self.next_at[FAST]:
            self._look(now)
            self._advance(FAST, now)
            self._report(FAST, self._collect(names_of(FAST)))
        elif now >= self.next_look:
            self._look(now)
        self._run_lanes(now)
        self._send_held(now)
        waiting = self.sender.keep()
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
        before, self.seen = self.seen, look(self.probe, self.seen or {})
        if before is None or self.stopping:
            return
        if before["pools"] != self.seen["pools"]:
            self._report_pools(now)
        if now >= self.next_at[FAST]:
            return  # the fast tick that is due has the rest
        changed: list[str] = [
            name for name in ("guests", "tasks") if before[name] != self.seen[name] and name in COLLECTORS
        ]
        if changed:
            collected = self._collect(changed)
            if "guests" in changed or collected.sections:
                self._report(FAST, collected)

    def _report_pools(self, now: float) -> None:
        """A pool changed: its state is known now, the pools in full a moment later, if no command hangs."""
        names = [name for name in ("pools",) if name in COLLECTORS]
        self.urgent_again = not self.urgent.start(names) if names else False
        held = self._collect([name for name in ("pool_states",) if name in COLLECTORS])
        if self.held is not None:
            self.held.add(held)
        else:
            self.held, self.held_until = held, now + URGENT_SECONDS

    def _send_held(self, now: float) -> None:
        pools = self.urgent.take(now)
        if self.held is not None and (pools is not None or now >= self.held_until):
            pools, held = pools or Collected(), self.held
            self.held = None
            held.add(pools)
            self._report(FAST, held)
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
        collected = Collected(*collect(self.probe, self.memories.values, names))
        collected.memories = self.memories.changed(names, self.probe.monotonic())
        return collected

    def _report(self, tick: str, collected: Collected) -> None:
        """Number it, hand it over. What was cut short by a stop is not reported as a failure."""
        if self.stopping:
            return
        report = self.reporter.build_report(
            tick,
            self.probe.now(),
            (collected.sections, collected.absent, collected.errors),
            spooled=self.spool.count,
            dropped=self.spool.dropped,
            clock_offset=self.sender.client.clock_offset,
        )
        body = encode_report(report)
        self.sender.offer(Message(body, memories=collected.memories, dropped_total=self.spool.dropped_total))

    def _beat(self, now: float) -> None:
        """Tell systemd that the loop turns: from here, so that a loop that hangs is not covered up."""
        if now < self.next_beat:
            return
        if self.next_beat == 0.0:
            self.notifier.tell("READY=1")
        self.next_beat = now + (self.notifier.watchdog_seconds / 3 or BEAT_SECONDS)
        self.notifier.tell("WATCHDOG=1")
        waiting = f"{self.spool.count} reports wait on disk"
        self.notifier.tell_status(
            f"{self.sender.trouble}; {waiting}" if self.sender.trouble else f"reporting; {waiting}"
        )


class PidFile:
    """Names the running agent, and is locked as long as it lives: a pid alone may be somebody else's by now."""

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, "agent.pid")
        self.handle = -1

    def claim(self) -> bool:
        """Write our pid; False when another agent holds the file."""
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, b"%d\n" % os.getpid(), 0)
        return True

    def release(self) -> None:
        os.unlink(self.path)
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


def command_start(arguments: Any) -> int:
    """Run the service until SIGTERM."""
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


def command_once(arguments: Any) -> int:
    """Collect once and print the report as it would be sent."""
    config = config_or_default(arguments.config)
    print_warnings(config)
    if arguments.send and config.address is None:
        raise CommandError(f"--send needs a config: {config_path(arguments.config)} is not there")
    probe = Probe()
    traces: list[tuple[str, str, float, int, str]] = []
    if arguments.explain:
        probe.trace = lambda *trace: traces.append(trace)
    names = names_of(arguments.tick) if arguments.tick else list(COLLECTORS)
    now = probe.now()
    collected = collect(probe, load_memories(os.path.join(state_path(), "memory")), names)
    body = encode_report(Reporter(config.host_id, now).build_report(arguments.tick or SLOW, now, collected))
    print(body.decode(), flush=True)
    if arguments.explain:
        print_traces(traces)
    return send_once(config, body) if arguments.send else OK


def config_or_default(flag: str | None) -> Config:
    """The config; where none was named and none is there, defaults that can collect but not send."""
    path = config_path(flag)
    if path == CONFIG_PATH and not flag and not os.path.lexists(path):
        return default_config()
    return load_config(path)


def print_traces(traces: list[tuple[str, str, float, int, str]]) -> None:
    """What was read and run, on stderr, so that stdout stays JSON."""
    print(f"{'':4} {'ms':>8} {'bytes':>9}  {'result':<10} what", file=sys.stderr)
    for kind, what, seconds, size, outcome in traces:
        print(f"{kind:4} {seconds * 1000:8.1f} {size:9d}  {outcome:<10} {one_line(what)}", file=sys.stderr)
    runs = sum(trace[0] == "run" for trace in traces)
    print(f"{len(traces) - runs} reads, {runs} commands", file=sys.stderr)


def send_once(config: Config, body: bytes) -> int:
    """Send a report and print the server's answer."""
    assert config.address is not None
    try:
        answer = Client(config).send(body)
    except Unreachable as error:
        raise CommandError(f"cannot reach {config.address.url}: {error}") from None
    print(f"{answer.status} {one_line(to_text(answer.body))[:2000]}", flush=True)
    if judge(answer) is not ACCEPTED:
        raise CommandError(describe_answer(answer, config.host_id))
    return OK


def command_check(arguments: Any) -> int:
    """Config, tools, server, token, clock: a line each, and what to do about it."""
    path = config_path(arguments.config)
    results: list[tuple[bool, str]] = []
    try:
        config: Config | None = load_config(path)
        results += [(False, f"config: {warning}") for warning in config.warnings]  # type: ignore[union-attr]
        results.append((True, f"config: {path}, host_id={config.host_id}"))  # type: ignore[union-attr]
    except ConfigError as error:
        config = None
        results.append((False, f"config: {error}"))
    results += check_state() + check_tools(Probe())
    results += check_server(config) if config else []
    for good, text in results:
        print("✓" if good else "✗", one_line(text), flush=True)
    return OK if all(good for good, _ in results) else FAILED


def check_state() -> list[tuple[bool, str]]:
    folder = state_path()
    present = folder
    while not os.path.exists(present):  # `start` makes it
        present = os.path.dirname(present)
    if os.access(present, os.W_OK):
        return [(True, f"state: {folder}")]
    return [(False, f"state: cannot write to {folder}; run as root, or set STATE_DIRECTORY")]


TOOLS = (  # command, what shows that this host needs it, what it is for
    ("zpool", "/sys/module/zfs", "pools"),
    ("zfs", "/sys/module/zfs", "datasets, snapshots"),
    ("smartctl", "/etc/pve", "disks: apt install smartmontools"),
    ("systemctl", "/run/systemd/system", "services"),
    ("corosync-quorumtool", "/etc/corosync/corosync.conf", "cluster votes"),
)


def check_tools(probe: Probe) -> list[tuple[bool, str]]:
    """Each tool: found, needed and not found, or not needed on this host."""
    results = []
    for name, sign_of_need, purpose in TOOLS:
        try:
            results.append((True, f"{name}: {probe.find(name)}"))
        except SourceError:
            needed = os.path.exists(sign_of_need)
            missing = f"not found, needed for {purpose}" if needed else f"not found, not needed here ({purpose})"
            results.append((not needed, f"{name}: {missing}"))
    return results


def check_server(config: Config) -> list[tuple[bool, str]]:
    """Post a signed, empty batch: the signature is checked before the content, so nothing is stored."""
    assert config.address is not None
    try:
        client = Client(config)
        answer = client.send(b"[]")
    except (Unreachable, OSError) as error:
        return [
            (
                False,
                f"server: cannot reach {config.address.url}: {error}; is it running, does a firewall stand between?",
            )
        ]
    results = [(True, f"server: {config.address.url} answers")]
    verdict = judge(answer)
    if verdict in (ACCEPTED, REFUSED):
        results.append((True, f"token: accepted for host:{config.host_id}"))
    else:
        results.append((False, f"token: {describe_answer(answer, config.host_id)}"))
    if client.clock_offset is not None:
        good = abs(client.clock_offset) <= CLOCK_TOLERANCE
        advice = "" if good else "; set the clock right (apt install chrony)"
        results.append((good, f"clock: {client.clock_offset:+.3f} s from the server's{advice}"))
    return results


def command_stop(arguments: Any) -> int:
    """End the running agent (the old unit's ExecStop)."""
    del arguments
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


def command_version(arguments: Any) -> int:
    """Name and version."""
    del arguments
    print(f"{NAME} {VERSION}", flush=True)
    return OK


class CommandError(Exception):
    """A command that failed, with the reason in one line."""


COMMANDS: dict[str, Callable[[Any], int]] = {
    "start": command_start,
    "once": command_once,
    "check": command_check,
    "stop": command_stop,
    "version": command_version,
}


def parse_arguments(argv: list[str]) -> Any:
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument("--config", metavar="FILE", help=f"settings (default: $AGENT_CONFIG or {CONFIG_PATH})")
    parser = argparse.ArgumentParser(prog=NAME, parents=[shared], description="Reports a Proxmox host to its monitor.")
    parser.set_defaults(command="start", config=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, function in COMMANDS.items():
        one = commands.add_parser(name, parents=[shared], help=function.__doc__)
        one.set_defaults(command=name)
        if name == "once":
            one.add_argument("--tick", choices=TICKS, default=None, help="only the sections of this tick")
            one.add_argument("--send", action="store_true", default=False, help="send it and print the answer")
            one.add_argument(
                "--explain", action="store_true", default=False, help="list each file read and command run"
            )
    return parser.parse_args(argv)


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
    except (CommandError, ConfigError) as error:
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
