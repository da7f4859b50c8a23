#!/usr/bin/env python3
"""Receive the signed reports of a fleet of Proxmox VE hosts, keep them, judge them, and show what is wrong.

    constants -> config -> loops -> database -> queries -> auth -> reports -> fleet -> answers -> ingest -> rules
        -> notifications -> columns -> history -> remote -> monitor -> jobs -> resources -> api -> cards -> problems
        -> page -> serving -> commands

A report comes in (ingest), is checked against its signature (auth) and its shape (reports), and is written in one
transaction (database) with all that follows from it: the latest state (fleet), alerts (rules) and history. Whoever
asks (api, page, commands) reads the state in memory or asks the database (queries).
"""

from __future__ import annotations

import argparse
import base64
import bisect
import copy
import csv
import dataclasses
import datetime
import email.message
import email.utils
import errno
import fcntl
import getpass
import gzip
import hashlib
import hmac
import http.client
import io
import ipaddress
import json
import marshal
import math
import os
import pwd
import re
import secrets
import shlex
import shutil
import signal
import smtplib
import socket
import sqlite3
import ssl
import statistics
import struct
import subprocess
import sys
import threading
import time
import tomllib
import traceback
import urllib.error
import urllib.parse
import urllib.request
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache, partial
from itertools import accumulate, chain, compress, groupby, islice
from operator import attrgetter, eq, itemgetter, lt, mul, sub
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from typing import IO, Any, NamedTuple

import argon2
import bottle
import waitress
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import BaseWSGIServer
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import Error

# --- constants: version, limits, exit codes ---

VERSION = "0.1.0"
MINUTE, HOUR, DAY = 60, 3600, 86400

Fields = dict[str, Any]  # an object of JSON, or a row: values by name
Database = sqlite3.Connection

SENT_LIMIT = 2 << 20  # bytes of one request as sent
TAKEN_LIMIT = 4 << 20  # up to here a body is read, to be refused with a word; beyond it the connection is closed
HEAD_SECONDS, REQUEST_SECONDS = 20, 60  # that a request's head and all of it may take to come in
CROWDED_SECONDS = 2  # that a connection may stand open without a request while places run short
PATIENCE_SECONDS = 5  # that a request waits before we look whether its sender has hung up
UNREAD_SECONDS = 60  # that an answer may wait to be read on
UNREAD_LIMIT = 4 << 20  # bytes of an answer that are made before they are read
UNPACKED_LIMIT = 32 << 20  # bytes of one request unpacked: a gzip bomb ends here
PARSED_LIMIT = 64 << 20  # bytes of one request once parsed, as weigh() has it
LARGE = 2 << 20  # bytes unpacked; of larger requests one is read at a time. A batch of the agent's has less
LARGE_SECONDS = 10  # that one waits for its turn
WEIGHED = 1 << 20  # bytes parsed: of a larger report each section is weighed
KEPT_LIMIT = 16 << 20  # bytes parsed of such sections that are kept in the latest state of a host
STRANGE_SECTIONS = 64  # of names that this version does not know, per host
MEMBERS_LIMIT = 16  # of one gzip file
UNDER_WAY = 8  # requests of one host at once: a quarter of the threads
RUNS_BURST, RUNS_PER_SECOND = 1000, 1 / 300  # starts of one host's agent: each is a row for two years
RUNS_AT_HAND = 10_000  # whose sequence numbers are in memory
SPANS_LIMIT = 10_000  # of sequence numbers that have come, per run; a week in any order makes half as many
SPANS_AT_HAND = 200_000  # in memory, over all runs
BATCH_LIMIT = 500  # reports in one request
NAME_LIMIT = 64  # characters of a field's name that means anything here
NESTING_LIMIT = 32  # a pool's vdev tree needs about 8
SKEW_LIMIT = 300  # seconds between a signature's time and ours
REPORTS_BURST, REPORTS_PER_SECOND = 5000, 200  # per host; a backlog of a week is 20,160 reports
CONNECTIONS_MOST = 4096  # a proxy has one for each request under way; who stalls loses his to who comes anew
OTHER_FILES = 512  # descriptors for all else: the database for each thread, bodies and answers, channels
THREADS = 32  # a report keeps one until it is on the disk
# Of these threads, by what is asked for: neither a fleet that comes back, nor a page that is polled without end, nor a
# history store that hangs takes those of the rest. A page only computes: more at once are not ready sooner, and reports
# wait for each of them at every step.
AT_ONCE = {"health": 2, "page": 3, "reports": 16, "other": 11}
READ_AT_ONCE = 2  # of the requests with reports: a page waits for each of them at every step, the disk for none
SWITCH_SECONDS = 0.001  # that a thread computes while others want to; Python's own 5 ms add up with each that waits
WAITING_MOST = 512  # requests with reports; who comes then is told to come again, or all would wait until they give up
AGAIN_FIRST, AGAIN_LAST, AGAIN_PER_SECOND = 5, 55, 25  # seconds after which, and so many of them a second
STREAMS_AT_ONCE, STREAMS_OF_ONE = 8, 3  # answers that are made while they are read: of all, and of one who asks
FLUSHES_SAVED, FLUSHES_PER_SECOND = 1000, 20  # of the disk, by reports: see Store
COMPANY = AT_ONCE["reports"] * 3 // 4  # so many wait for no more

STALE_SECONDS, OFFLINE_SECONDS = 2 * MINUTE, 5 * MINUTE
AWAY_SECONDS = MINUTE  # the rules are judged every 5 s; a longer gap means that we were away, not the hosts
KEEP_EVENTS = 90 * DAY
KEEP_TASKS = 14 * DAY  # of these a busy host has a hundred a day
KEEP_RESOLVED = 90 * DAY
SESSION_SECONDS, SESSION_MOST = 7 * DAY, 30 * DAY  # without use, and from the log-in on
LIST_LIMIT, LIST_MOST = 200, 10_000

OK, FAILED = 0, 1  # and 2 for a usage that argparse refuses

VERDICTS = ("critical", "offline", "warning", "stale", "unknown", "info", "maintenance", "ok")  # worst first
SEVERITIES = ("critical", "warning", "info")
HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def count_of(count: float, word: str, words: str = "") -> str:
    """'1 guest', '1,200 guests'; `words` where an s does not make the plural."""
    return f"{int(count):,} {word if int(count) == 1 else words or word + 's'}"


class Failure(Exception):
    """Something an operator has to know, told in one line."""


class Problem(Exception):
    """An answer that is an error: RFC 9457, with a stable `code`."""

    CODES = {
        "invalid_request": (400, "The request is not understood"), "invalid_json": (400, "The body is not JSON"),
        "invalid_token": (401, "The signature is missing or wrong"), "clock_skew": (401, "The sender's clock is off"),
        "unauthorized": (401, "Log in first"), "forbidden": (403, "Not allowed"), "not_found": (404, "No such thing"),
        "unknown_host": (404, "No such host"), "method_not_allowed": (405, "Method not allowed"),
        "conflict": (409, "Already there"), "too_large": (413, "Too large"),
        "unsupported_media_type": (415, "Unsupported media type"),
        "host_mismatch": (422, "The report names another host"), "invalid_report": (422, "Not a report"),
        "rate_limited": (429, "Too many requests"), "undelivered": (502, "The channel did not take it"),
        "storage_full": (503, "The disk is full"), "busy": (503, "Busy"),
    }

    def __init__(self, code: str, detail: str, *, headers: dict[str, str] | None = None, **extra: Any):
        super().__init__(detail)
        self.code, self.detail, self.headers, self.extra = code, detail, headers or {}, extra
        self.status, self.title = self.CODES[code]

    def body(self) -> bytes:
        """The problem document."""
        return json.dumps({"type": "about:blank", "status": self.status, "title": self.title, "detail": self.detail,
                           "code": self.code, **self.extra}).encode()


# --- config: settings from the environment, and how any field that is given is checked ---


Path = tuple[Any, ...]


class Mistake(Exception):
    """A field that is not what it should be: the way to it (names and list positions, from 0), and why."""

    def __init__(self, path: Path, reason: str):
        super().__init__(reason)
        self.path, self.reason = path, reason


SPEC_WORDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text",
                               list: "a list", dict: "a table"}


def checked(given: Any, spec: Any, path: Path = ()) -> Any:
    """`given` as `spec` wants it, or `Mistake`. A spec is one of

        bool, int, float, str, list, dict  a value of this type: whole numbers are floats too, true and false are none
        (int, 1, 65535), (float, 0, 1e11)  a number within these bounds; (str, 1, 128) a text of so many characters
        ("fast", "medium", "slow")         one of these texts
        [spec]                             a list of such values
        {"name": spec, "port?": spec}      a table (JSON: object) of these fields and no others; one with `?` may be
                                           missing or null and is left out then; "*" is the spec of all other fields
        function                           gives back the value as it is used from then on, or raises ValueError(why)
                                           or a Mistake of its own
    """
    if isinstance(spec, dict):
        return checked_table(given, spec, path)
    if isinstance(spec, list):
        return [checked(item, spec[0], (*path, place)) for place, item in enumerate(checked(given, list, path))]
    if isinstance(spec, tuple) and isinstance(spec[0], str):
        if isinstance(given, str) and given in spec:
            return given
        raise Mistake(path, f"should be one of: {', '.join(spec)}")
    if isinstance(spec, (type, tuple)):
        return checked_value(given, *(spec if isinstance(spec, tuple) else (spec,)), path=path)
    try:
        return spec(given)
    except Mistake as mistake:
        raise Mistake((*path, *mistake.path), mistake.reason) from None
    except ValueError as error:
        raise Mistake(path, str(error)) from None


def checked_table(given: Any, fields: Fields, path: Path) -> Fields:
    given, result = checked_value(given, dict, path=path), {}
    for name, spec in fields.items():
        key = name.removesuffix("?")
        if given.get(key) is not None:
            result[key] = checked(given[key], spec, (*path, key))
        elif name == key != "*":
            raise Mistake((*path, key), "is missing")
    for key in [key for key in given if key not in result and key + "?" not in fields]:
        if "*" in fields:
            result[key] = checked(given[key], fields["*"], (*path, key))
        else:
            here = ", ".join(name.removesuffix("?") for name in fields) or "no fields"
            raise Mistake((*path, key), f"unknown; here belong: {here}")
    return result


def checked_value(given: Any, kind: type, least: float | None = None, most: float | None = None, *, path: Path) -> Any:
    if kind is float and least is None:
        least, most = -sys.float_info.max, sys.float_info.max  # TOML knows inf and nan
    if type(given) is not kind and not (kind is float and type(given) is int):
        raise Mistake(path, f"should be {SPEC_WORDS[kind]}")
    size: Any = len(given) if isinstance(given, str) else given
    if least is not None and most is not None and not least <= size <= most:
        what = f"{least} to {most} characters" if kind is str else f"{SPEC_WORDS[kind]} from {least:g} to {most:g}"
        raise Mistake(path, f"should be {what}")
    return given


class Config:
    """What the environment says. `Failure` names the setting, its value and what it should be."""

    def __init__(self, env: dict[str, str] | os._Environ[str] = os.environ):
        self.database_path = os.path.abspath(env.get("DATABASE_PATH") or "monitor.db")
        self.password_hash = env.get("DASHBOARD_PASSWORD_HASH") or ""
        self.listen = env.get("LISTEN") or "127.0.0.1"
        self.port = self._port(env.get("PORT") or "4000")
        shown = f"[{self.listen}]" if ":" in self.listen else self.listen
        self.public_url = self._url(env.get("PUBLIC_URL") or f"http://{shown}:{self.port}")
        self.trusted_proxies = self._networks(env.get("TRUSTED_PROXY", "127.0.0.1"))
        self.history_url = self._history_url(env.get("HISTORY_URL") or "sqlite:")
        self.given_secret = env.get("SECRET_KEY_BASE") or ""
        self.install_dir = env.get("INSTALL_DIR") or default_install_dir()
        self.settings_given = bool(env.get("SERVER_CONFIG"))
        self.settings_path = env.get("SERVER_CONFIG") or "/etc/proxmox-monitor/server.toml"
        self.heartbeat_url = env.get("HEARTBEAT_URL") or ""
        if self.heartbeat_url and not is_http_address(self.heartbeat_url):  # not shown: its path may be a secret
            raise Failure("HEARTBEAT_URL: not an http(s) address")
        if self.password_hash and not self.password_hash.startswith("$argon2id$"):
            raise Failure("DASHBOARD_PASSWORD_HASH: not an Argon2id hash; make one with `hash-password`")
        if self.given_secret and len(self.given_secret.strip()) < 32:
            raise Failure("SECRET_KEY_BASE: shorter than 32 characters; make one with `generate-secret`")

    def doubts(self) -> Iterator[str]:
        """What is allowed and yet no good: told by `check` and when the server starts."""
        if self.given_secret and len(set(self.given_secret)) < 10:  # of 32 random hex digits 13 differ
            yield "SECRET_KEY_BASE can be guessed; make one with `generate-secret`, then `rotate-token` for each host"
        for network in self.trusted_proxies:
            if network.num_addresses > 1 << 64 or network.version == 4 and network.prefixlen < 8:
                yield f"TRUSTED_PROXY {network}: anybody may claim any address, which undoes the limit on log-ins"

    @property
    def secret_path(self) -> str:
        """Where the secret lives when the environment does not give it: beside the database, never in it."""
        return self.database_path + ".secret"

    @property
    def https(self) -> bool:
        return self.public_url.startswith("https://")

    def secret(self) -> bytes:
        """SECRET_KEY_BASE, or the content of its file, which is made on first use."""
        if self.given_secret:
            return self.given_secret.encode()
        try:
            with open(self.secret_path, encoding="utf-8") as handle:
                text = handle.read().strip()
        except FileNotFoundError:
            text = create_secret_file(self.secret_path)
        except (OSError, UnicodeDecodeError) as error:
            raise Failure(f"{self.secret_path}: {getattr(error, 'strerror', None) or error}") from None
        if len(text) < 32:
            raise Failure(f"{self.secret_path}: shorter than 32 characters; restore it from a backup")
        return text.encode()

    @staticmethod
    def _port(text: str) -> int:
        if text.isascii() and text.isdigit() and int(text) < 65536:
            return int(text)
        raise Failure(f"PORT: {text!r} is not a port number")

    @staticmethod
    def _url(text: str) -> str:
        """What hosts get in their install.sh as well: no sign that a shell knows."""
        if not is_http_address(text) or not re.fullmatch(r"[A-Za-z0-9.:/_~%@\[\]-]+", text):
            raise Failure(f"PUBLIC_URL: {text!r} is not an http(s) address")
        return text.rstrip("/")

    @staticmethod
    def _history_url(text: str) -> str:
        """`sqlite:`, or the base address of a store. What is wrong is told without the password it may hold."""
        if text != "sqlite:" and (not is_http_address(text) or "?" in text or "#" in text):
            raise Failure("HISTORY_URL: neither sqlite: nor the address of a VictoriaMetrics like http://127.0.0.1:8428")
        return text.rstrip("/")

    @staticmethod
    def _networks(text: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        try:
            return [ipaddress.ip_network(part.strip(), strict=False) for part in text.split(",") if part.strip()]
        except ValueError as error:
            raise Failure(f"TRUSTED_PROXY: {error}") from None


def is_http_address(text: str) -> bool:
    """Whether this is an http(s) address with a host, and with a port only if that can be one."""
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # what is no IPv6 address in brackets, no port
        return False


def create_secret_file(path: str) -> str:
    """Write a new secret, 0600, and give it back; the first of two processes wins."""
    partial_path = f"{path}.{secrets.token_hex(8)}"
    with open(os.open(partial_path, NEW_FILE, 0o600), "w") as handle:
        handle.write(secrets.token_urlsafe(48) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    try:
        os.link(partial_path, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(partial_path)
    with open(path, encoding="utf-8") as handle:
        return handle.read().strip()


NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def become_owner(path: str) -> None:
    """Root's commands work in a directory that the service's user can fill with links; so they are done as the
    owner of that directory, for good, and what they make is readable for the service."""
    try:
        owner = os.stat(os.path.dirname(path))
    except OSError:
        return  # told by whoever opens it
    if os.geteuid() != 0 or owner.st_uid == 0:
        return
    try:
        entry = pwd.getpwuid(owner.st_uid)
        os.initgroups(entry.pw_name, owner.st_gid)
    except KeyError:
        os.setgroups([owner.st_gid])
    os.setresgid(owner.st_gid, owner.st_gid, owner.st_gid)
    os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)
    if not os.access(os.path.dirname(path), os.X_OK):
        raise Failure(f"{os.path.dirname(path)}: its owner, uid {owner.st_uid}, cannot reach it: see the folders above")


def default_install_dir() -> str:
    """Where the agent's binaries lie that hosts are installed from: of the release, else of this checkout."""
    released = "/usr/local/share/proxmox-monitor"
    return released if os.path.isdir(released) else resource("dist")


def resource(*names: str) -> str:
    """Path of a file that belongs to the program, also inside a PyInstaller bundle."""
    root = getattr(sys, "_MEIPASS", os.path.dirname(os.path.abspath(__file__)))
    return os.path.join(root, *names)


def log(message: str) -> None:
    """One line for the journal, whatever a hostile name holds. Where none can be written (a closed pipe, a full disk)
    the work goes on without it."""
    try:
        print(printable(message), flush=True)
    except (OSError, ValueError):
        pass


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


# --- loops: what goes on in the background, one thread each ---


class Stop(threading.Event):
    """Ends all the loops that were started with it, and knows how each of them fares."""

    def __init__(self) -> None:
        super().__init__()
        self.loops: list[Loop] = []

    def set(self) -> None:
        super().set()
        for loop in self.loops:
            loop.wake()

    def troubles(self, *, vital: bool = False) -> dict[str, str]:
        """What is wrong with which loop (or which of those that reports and alerts need); empty when all is well."""
        return {loop.name: trouble for loop in list(self.loops)
                if (loop.vital or not vital) and (trouble := loop.trouble()) is not None}


class Loop:
    """One background thread, made by `every`. A fault in its work is told once, when it comes and when it is over,
    and ends nothing."""

    STUCK_SECONDS = 10 * MINUTE  # at one piece of work, or late for it

    def __init__(self, seconds: float, name: str, work: Callable[[], float | None], stop: Stop, first: float,
                 vital: bool):
        self.seconds, self.name, self.work, self.stop, self.vital = seconds, name, work, stop, vital
        self.error: str | None = None  # of the last turn
        self.due_at = time.monotonic() + first
        self._wake, self._ended = threading.Event(), False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def wake(self) -> None:
        """Have it work now, whenever it would have been due."""
        self.due_at = min(self.due_at, time.monotonic())
        self._wake.set()

    def end(self) -> None:
        """Stop this one alone; what it is at is finished."""
        self._ended = True
        self.stop.loops = [loop for loop in self.stop.loops if loop is not self]
        self.wake()

    def turn(self) -> None:
        """Work once, and note when the next time is."""
        pause, error = None, None
        try:
            pause = self.work()
        except BaseException as fault:  # also SystemExit: a thread that ends without a word is the worst of faults
            error = f"{type(fault).__name__}: {fault}"
        if error != self.error:
            log(f"{self.name}: {error or 'works again'}")
        self.error, self.due_at = error, time.monotonic() + (self.seconds if pause is None else pause)

    def trouble(self) -> str | None:
        """What is wrong with it, in words; None while it works."""
        late = time.monotonic() - self.due_at
        if not self.thread.is_alive():
            return "has ended"
        return self.error or (f"has done nothing for {late:.0f} s" if late > self.STUCK_SECONDS else None)

    def _run(self) -> None:
        while not (self.stop.is_set() or self._ended):
            self._wake.wait(max(0.0, self.due_at - time.monotonic()))
            if self._wake.is_set() or self.due_at <= time.monotonic():
                self._wake.clear()
                if not (self.stop.is_set() or self._ended):
                    self.turn()


def every(seconds: float, name: str, work: Callable[[], float | None], stop: Stop, *, first: float = 0.0,
          vital: bool = True) -> Loop:
    """Start a thread that calls `work` every so many seconds until `stop` is set, for the first time after `first`.
    `work` may give back another pause for this once. `Loop.wake` has it work at once; `stop.troubles` tells faults.
    Not `vital`: its faults are told, and reports are taken, judged and told of all the same."""
    loop = Loop(seconds, name, work, stop, first, vital)
    stop.loops.append(loop)
    loop.thread.start()
    return loop


# --- database: connections, migrations, and one write at a time ---


class Migration(NamedTuple):
    up: list[str]
    down: list[str]


def load_migrations(text: str | None = None) -> list[Migration]:
    """The migrations of schema.sql, in order, each as two lists of statements."""
    if text is None:
        with open(resource("schema.sql"), encoding="utf-8") as handle:
            text = handle.read()
    migrations = []
    for part in text.split("-- +migrate Up")[1:]:
        up, _, down = part.partition("-- +migrate Down")
        migrations.append(Migration(statements(up), statements(down)))
    return migrations


def statements(text: str) -> list[str]:
    """Split SQL at the ends of its statements. Not executescript(): that commits what is open."""
    found, pending = [], ""
    for line in text.splitlines(keepends=True):
        pending += line
        if ";" in line and sqlite3.complete_statement(pending):
            found.append(pending.strip())
            pending = ""
    return found


def connect(path: str, *, readonly: bool = False) -> Database:
    """Open the database; the caller says BEGIN. `Failure` when there is none to read."""
    address = f"file:{urllib.parse.quote(path)}?mode={'ro' if readonly else 'rwc'}"
    try:
        db = sqlite3.connect(address, uri=True, timeout=5, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        if not readonly:
            if not os.path.getsize(path):
                db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only works before the first table
            os.chmod(path, 0o600)
            db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # an answer of 200 means the report is on the disk
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA temp_store = MEMORY")
        # Debian's SQLite overwrites all that is deleted: another 2 KiB written for each report that goes into a chunk.
        db.execute("PRAGMA secure_delete = FAST")
        if readonly:
            db.execute("PRAGMA cache_size = -512")  # KiB; each thread has one, and the kernel caches the file too
        return db
    except sqlite3.Error as error:
        raise Failure(f"{path}: {error}") from None
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None


@contextmanager
def transaction(db: Database) -> Iterator[Database]:
    """Everything inside is written, or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def schema_version(db: Database) -> int:
    return db.execute("PRAGMA user_version").fetchone()[0]


def is_empty(db: Database) -> bool:
    ours = "SELECT 1 FROM sqlite_schema WHERE name NOT LIKE 'sqlite|_%' ESCAPE '|' LIMIT 1"
    return not schema_version(db) and not db.execute(ours).fetchone()


def check_schema(db: Database) -> None:
    """`Failure` that says in one line what to do when the schema is not this program's."""
    have, want = schema_version(db), len(load_migrations())
    if have > want:
        raise Failure(f"the database has schema {have}, this is version {VERSION} with schema {want}: too old for it")
    if have < want:
        raise Failure(f"the database has schema {have}, this version needs {want}: run `migrate`")


def migrate(db: Database, migrations: list[Migration]) -> int:
    """Bring the schema up to date, each step whole or not at all; gives back how many steps it took."""
    taken = 0
    while True:
        with transaction(db):
            version = schema_version(db)
            if version > len(migrations):
                raise Failure(f"the database has schema {version}, this version ends at {len(migrations)}: too old")
            if version == len(migrations):
                return taken
            for statement in migrations[version].up:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {version + 1}")  # rolls back with the rest
        taken += 1


def rollback(db: Database, migrations: list[Migration], *, to: int) -> int:
    """Take steps back until the schema is version `to`; gives back how many it took."""
    taken = 0
    while schema_version(db) > to:
        with transaction(db):
            version = schema_version(db)
            for statement in migrations[version - 1].down:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {version - 1}")
        taken += 1
    return taken


class Write:
    """One piece of work: `work(db)` runs inside the transaction of its group. It has failed until it is committed."""

    def __init__(self, work: Callable[[Database], Any], urgent: bool):
        self.work, self.urgent = work, urgent
        self.woken = threading.Event()  # it is done, or has the lead now
        self.value: Any = None
        self.error: Exception | None = Problem("busy", "the server is stopping", headers={"Retry-After": "5"})


class Store:
    """The database of a running server. The first who writes has the lead: he commits for all that wait by then, so
    that they share one flush to the disk, and hands the lead to the next. Every thread reads for itself.

    `on_failure` is called when a write or the commit failed: what was derived in memory is then ahead of the disk.
    """

    def __init__(self, path: str, on_failure: Callable[[], None] = lambda: None):
        self.path, self.on_failure = path, on_failure
        self.db = connect(path)
        self.last_commit = 0.0  # monotonic
        self.last_error: str | None = None
        self.writing_since: float | None = None  # monotonic; memory may be ahead of what readers of the database see
        self.closed = False
        self._flushes, self._counted_at = float(FLUSHES_SAVED), time.monotonic()
        self._waiting: deque[Write] = deque()
        self._leader: Write | None = None
        self._guard, self._turn = threading.Lock(), threading.Lock()  # of the two above; of the connection
        self._local = threading.local()

    @property
    def alive(self) -> bool:
        began = self.writing_since
        return not self.closed and (began is None or time.monotonic() - began < MINUTE)

    def reader(self) -> Database:
        """This thread's own connection, read-only."""
        if not hasattr(self._local, "db"):
            self._local.db = connect(self.path, readonly=True)
        return self._local.db

    def write(self, work: Callable[[Database], Any], *, urgent: bool = True) -> Any:
        """Run `work(db)` in the next transaction, wait until it is on the disk, give back what it returned. What
        `work` raises is raised here, and a `Problem` (storage_full, busy) when the commit fails."""
        write = Write(work, urgent)
        with self._guard:
            self._waiting.append(write)
            self._leader = self._leader or write
            leads = self._leader is write
        if leads or (write.woken.wait() and self._leader is write):
            self._lead(write)
        if write.error is not None:
            raise write.error
        return write.value

    def _lead(self, first: Write) -> None:
        """Write for all that wait. Those who are done go on at once, while the next leader waits for company."""
        group: list[Write] = []
        try:
            with self._turn:
                if not self.closed:
                    self._linger(first)
                group = [self._waiting.popleft() for _ in range(len(self._waiting))]
                if not self.closed:
                    self._commit(group)
        finally:
            with self._guard:
                heir = self._leader = self._waiting[0] if self._waiting else None
            for write in [heir, *group] if heir else group:
                write.woken.set()

    def close(self) -> None:
        """Finish what is being written; who still waits is told that the server is stopping."""
        with self._turn:
            self.closed = True
            self.db.close()

    def _linger(self, first: Write) -> None:
        """Each flush wears the disk. Under a steady load reports that come close together wait for each other; a
        short rush does not have to: flushes that were not used are saved up."""
        now = time.monotonic()
        left = min(FLUSHES_SAVED, self._flushes + (now - self._counted_at) * FLUSHES_PER_SECOND) - 1
        self._flushes = max(-1.0, left)  # a rush of urgent ones, who do not wait, leaves no debt for others to wait off
        self._counted_at = now
        if self._flushes < 0 and not first.urgent:
            end = now - self._flushes / FLUSHES_PER_SECOND
            while len(self._waiting) < COMPANY and (left := end - time.monotonic()) > 0:
                time.sleep(min(left, 0.005))

    def _commit(self, group: list[Write]) -> None:
        """One transaction for the group; one that fails in its own work leaves the others alone."""
        self.writing_since = time.monotonic()
        try:
            with transaction(self.db) as db:
                failed = [self._attempt(db, write, alone=len(group) == 1) for write in group]
            self._ask_disk()
            for write, error in zip(group, failed):
                write.error = error
            self.last_commit, self.last_error = time.monotonic(), None
        except Exception as error:
            for write in group:
                write.error = store_problem(error)
            self._failed(error)
        finally:
            self.writing_since = None

    def _ask_disk(self) -> None:
        """`OSError` when the file system has given up meanwhile. ext4 says yes to a flush whose transaction its journal
        drops at that moment (Linux 6.18: jbd2_complete_transaction() waits for none that is neither running nor
        committing), and no to whoever wants to change anything then: here an attribute, to what it is already."""
        try:
            os.setxattr(self.path, "user.proxmon", b"1")
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EIO):
                raise  # all else: the file system has no attributes, or we may not; what it flushed is flushed

    def _attempt(self, db: Database, write: Write, *, alone: bool) -> Exception | None:
        error: Exception | None = None
        if not alone:
            db.execute("SAVEPOINT one")
        try:
            write.value = write.work(db)
        except Exception as caught:
            if isinstance(caught, sqlite3.Error) and not isinstance(caught, OWN_FAULTS):
                raise  # the database's trouble is everybody's
            error = caught
            for statement in ("ROLLBACK", "BEGIN") if alone else ("ROLLBACK TO one",):
                db.execute(statement)
            if not isinstance(error, (Problem, Failure)):
                self.on_failure()  # memory is ahead of what is left; the next of the group must not build on that
        if not alone:
            db.execute("RELEASE one")
        return error

    def _failed(self, error: Exception) -> None:
        """Nothing of a group is on the disk: take memory back to what is there."""
        self.last_error = f"{type(error).__name__}: {error}"
        log(f"database: {self.last_error}")
        self.on_failure()
        if self.db.in_transaction:
            log("database: what has failed cannot be taken back; the process ends, to be started anew")
            os._exit(FAILED)


OWN_FAULTS = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError)


def store_problem(error: Exception) -> Problem:
    """What the sender is told when a commit failed: it keeps the report and comes again."""
    if "full" in str(error):
        return Problem("storage_full", "the server's disk is full", headers={"Retry-After": "60"})
    return Problem("busy", "the database could not be written", headers={"Retry-After": "10"})


# --- queries: one function per question, its SQL in full beside it ---


def find_host(db: Database, name: str) -> sqlite3.Row | None:
    return db.execute("SELECT * FROM host WHERE name = :name", {"name": name}).fetchone()


def list_host_records(db: Database) -> list[sqlite3.Row]:
    """Every registered host with the time anything was last received from it."""
    return db.execute("""
        SELECT host.*, (SELECT max(last_seen_at) FROM run WHERE run.host_id = host.id) AS last_seen_at
        FROM host ORDER BY name""").fetchall()


def required_host(db: Database, name: str) -> sqlite3.Row:
    """The host's row; `Problem('unknown_host')` if there is none."""
    row = find_host(db, name)
    if row is None:
        raise Problem("unknown_host", f"no host '{name}' is registered")
    return row


def checked_name(name: Any, whose: str) -> str:
    """The name, if a host, a token or a user may have it."""
    if not isinstance(name, str) or not HOST_NAME.fullmatch(name):
        rule = f"a {whose}'s name has 1-63 of a-z A-Z 0-9 . _ - and begins with a letter or digit"
        raise Problem("invalid_request", rule, pointer="/name")
    return name


def insert_host(db: Database, name: Any, now: float, *, site: str | None = None,
                tags: list[str] | None = None) -> sqlite3.Row:
    """Register a host with a fresh nonce. `Problem`: invalid_request or conflict."""
    if find_host(db, checked_name(name, "host")):
        raise Problem("conflict", f"host '{name}' is already registered")
    db.execute("""
        INSERT INTO host (name, nonce, site, tags, created_at) VALUES (:name, :nonce, :site, :tags, :now)""",
        {"name": name, "nonce": secrets.token_bytes(32), "site": site, "tags": json.dumps(tags or []), "now": now})
    insert_event(db, now, "host-registered", f"Host {name} registered", host=name)
    hosts_changed(db)
    return required_host(db, name)


def rotate_nonce(db: Database, name: str, now: float) -> sqlite3.Row:
    """A new nonce: from here on the old token is refused."""
    row = required_host(db, name)
    db.execute("UPDATE host SET nonce = :nonce, rotated_at = :now WHERE id = :id",
               {"nonce": secrets.token_bytes(32), "now": now, "id": row["id"]})
    insert_event(db, now, "token-rotated", f"Token of {row['name']} rotated", host=row["name"])
    hosts_changed(db)
    return required_host(db, name)


def update_host(db: Database, name: str, changes: Fields, now: float) -> sqlite3.Row:
    """Change name, site, tags, note or maintenance_until. The nonce stays, so the token stays with a new name."""
    row = required_host(db, name)
    new = checked_name(changes.get("name", row["name"]), "host")
    other = find_host(db, new)
    if other and other["id"] != row["id"]:
        raise Problem("conflict", f"host '{new}' is already registered")
    merged = {**dict(row), **changes}
    if "tags" in changes:
        merged["tags"] = json.dumps(changes["tags"])
    db.execute("""
        UPDATE host SET name = :name, site = :site, tags = :tags, note = :note,
                        maintenance_until = :maintenance_until WHERE id = :id""", merged)
    if new != row["name"]:
        insert_event(db, now, "host-renamed", f"Host {row['name']} renamed to {new}", host=new)
    others = sorted(key for key in changes if key != "name" and merged[key] != row[key])
    if others:
        insert_event(db, now, "host-changed", f"Host {new}: {', '.join(others)} changed", host=new)
    hosts_changed(db)
    return required_host(db, new)


def delete_host(db: Database, name: str, now: float) -> None:
    """Forget a host with all it has sent; the events stay."""
    row = required_host(db, name)
    for table in ("report", "kept_report"):  # its chunks go bit by bit: see expire()
        db.execute(f"DELETE FROM {table} WHERE id BETWEEN :first AND :last", report_span(row["id"]))
    db.execute("DELETE FROM host WHERE id = :id", {"id": row["id"]})
    insert_event(db, now, "host-removed", f"Host {row['name']} removed", host=row["name"])
    hosts_changed(db)


def hosts_changed(db: Database) -> None:
    """Tell a running server, also from another process, that the table of hosts is not what it read."""
    db.execute("""
        INSERT INTO meta VALUES ('hosts_version', '1')
        ON CONFLICT (key) DO UPDATE SET value = CAST(value AS INTEGER) + 1""")


def get_meta(db: Database, key: str) -> str | None:
    row = db.execute("SELECT value FROM meta WHERE key = :key", {"key": key}).fetchone()
    return row[0] if row else None


def set_meta(db: Database, key: str, value: Any) -> None:
    db.execute("INSERT INTO meta VALUES (:key, :value) ON CONFLICT (key) DO UPDATE SET value = :value",
               {"key": key, "value": str(value)})


DOING: ContextVar[tuple[str | None, str | None]] = ContextVar("doing", default=(None, None))


@contextmanager
def done_by(by: str | None, address: str | None = None) -> Iterator[None]:
    """Events inserted inside tell who it was: `kind:name`, and the address he came from."""
    before = DOING.set((by, address))
    try:
        yield
    finally:
        DOING.reset(before)


def insert_event(db: Database, at: float, kind: str, message: str, *, host: str | None = None,
                 object: str | None = None, severity: str | None = None) -> None:
    by, address = DOING.get()
    db.execute("""
        INSERT INTO event (at, kind, host, object, message, "by", address, severity)
        VALUES (:at, :kind, :host, :object, :message, :by, :address, :severity)""",
        {"at": at, "kind": kind, "host": host, "object": object, "message": message, "by": by, "address": address,
         "severity": severity})


def each_event(db: Database, *, since: float, until: float | None = None, kind: str | None = None,
               host: str | None = None) -> Iterator[Fields]:
    """What changed since then, newest first; of one kind, or (`audit`) all that somebody did or was refused."""
    for row in db.execute("""
            SELECT id, at, kind, host, object, message, "by", address, severity FROM event
            WHERE at >= :since AND (:until IS NULL OR at <= :until) AND (:host IS NULL OR host = :host)
              AND (:kind IS NULL OR kind = :kind OR :kind = 'audit' AND ("by" IS NOT NULL OR address IS NOT NULL))
            ORDER BY at DESC, id DESC""", {"since": since, "until": until, "kind": kind, "host": host}):
        yield dict(row)


def list_events(db: Database, *, since: float, limit: int, kind: str | None = None) -> list[Fields]:
    return list(islice(each_event(db, since=since, kind=kind), limit))


def failed_logins(db: Database, since: float) -> int:
    """How many log-ins have failed since then: what a rule can tell of."""
    return db.execute("SELECT count(*) FROM event WHERE kind = 'login-failed' AND at >= :since",
                      {"since": since}).fetchone()[0]


SILENCE_MATCHERS = ("tag", "site", "host", "object", "rule")


def active_silences(db: Database, now: float = 0.0) -> list[Fields]:
    """The silences that have not ended, the next to end first."""
    return [dict(row) for row in db.execute("SELECT * FROM silence WHERE until > :now ORDER BY until, id",
                                            {"now": now})]


def last_notification_at(db: Database) -> float | None:
    return db.execute("SELECT max(sent_at) FROM message WHERE sent_at IS NOT NULL").fetchone()[0]


def missing_reports(db: Database, host_id: int) -> int:
    """How many reports of a host never came: holes in the sequence numbers of each run of its agent."""
    rows = db.execute("SELECT ranges FROM run WHERE host_id = :id", {"id": host_id})
    every = (parse_ranges(row["ranges"]) for row in rows)
    return sum(ranges[-1][1] - sum(last - first + 1 - sum(unknown) for first, last, *unknown in ranges)
               for ranges in every if ranges)


def has_report(db: Database, host_id: int, run: int, seq: int) -> bool:
    """Whether a report is kept as it came."""
    return db.execute("""
        SELECT 1 FROM report WHERE id BETWEEN :first AND :last AND run = :run AND seq = :seq UNION ALL
        SELECT 1 FROM kept_report WHERE id BETWEEN :first AND :last AND run = :run AND seq = :seq""",
        {**report_span(host_id), "run": run, "seq": seq}).fetchone() is not None


def find_report(db: Database, report_id: int) -> sqlite3.Row | None:
    """A report by its id, wherever it is kept."""
    return db.execute("""
        SELECT * FROM report WHERE id = :id UNION ALL SELECT * FROM kept_report WHERE id = :id""",
        {"id": report_id}).fetchone()


def parse_ranges(text: str) -> list[list[int]]:
    """'1-3,7' -> [[1, 3], [7, 7]]; '1-9?2' -> [[1, 9, 2]]: two of these have not come, and which ones is not known any
    more; '' of a run whose first report has not been counted yet -> []"""
    spans = (list(map(int, part.replace("?", "-").split("-"))) for part in text.split(",") if part)
    return [span if len(span) > 1 else span * 2 for span in spans]


def format_ranges(ranges: list[list[int]]) -> str:
    return ",".join([str(first) if first == last else f"{first}-{last}?{unknown[0]}" if unknown else f"{first}-{last}"
                     for first, last, *unknown in ranges])


def find_range(ranges: list[list[int]], number: int) -> int:
    """Where a number stands: its span is the one before this place, if it is in any."""
    return bisect.bisect_right(ranges, number, key=itemgetter(0))


def add_to_ranges(ranges: list[list[int]], number: int) -> bool:
    """Put a number into sorted, disjoint ranges; False if it was there."""
    at = find_range(ranges, number)
    if at and number <= ranges[at - 1][1]:
        return False
    if at and ranges[at - 1][1] == number - 1:
        ranges[at - 1][1] = number
        if at < len(ranges) and ranges[at][0] == number + 1:
            join_ranges(ranges, at - 1)
    elif at < len(ranges) and ranges[at][0] == number + 1:
        ranges[at][0] = number
    else:
        ranges.insert(at, [number, number])
    return True


def join_ranges(ranges: list[list[int]], at: int) -> None:
    """Make one of a span and the next; what is between them is from then on known by its count alone."""
    left, right = ranges[at], ranges.pop(at + 1)
    unknown = right[0] - left[1] - 1 + sum(left[2:]) + sum(right[2:])
    left[1:] = [right[1], unknown] if unknown else [right[1]]


HOST_SHIFT = 42  # bits of milliseconds: until the year 2109


def report_span(host_id: int, since: float = 0, until: float = math.inf) -> dict[str, int]:
    """First and last possible id of a host's reports in a span of time, for SQL."""
    most = (1 << HOST_SHIFT) - 1
    return {name: host_id << HOST_SHIFT | int(max(0, min(most, at * 1000)))
            for name, at in (("first", since), ("last", until))}


def report_time(report_id: int) -> float:
    return (report_id & ((1 << HOST_SHIFT) - 1)) / 1000


def read_text(body: bytes) -> bytes:
    """A stored report's JSON; how it was packed, zlib or gzip, shows in its first bytes. As it came, gzip may have
    several members."""
    text = b""
    while body:
        unpacker = zlib.decompressobj(47)
        text += unpacker.decompress(body)
        body = unpacker.unused_data
    return text


def read_body(body: bytes) -> Fields:
    return json.loads(read_text(body))


def insert_report(db: Database, host_id: int, run: int, seq: int, at: float, received_at: float, body: bytes) -> int:
    """Keep a report; gives back its id. When its millisecond is taken, the next free one after its neighbours: the
    id is a place, the time that counts stands in the report."""
    report_id, window = report_span(host_id, at)["first"], 1000
    while True:
        added = db.execute("""
            INSERT OR IGNORE INTO report SELECT :id, :run, :seq, :received_at, :body
            WHERE NOT EXISTS (SELECT 1 FROM kept_report WHERE id = :id)""",
            {"id": report_id, "run": run, "seq": seq, "received_at": received_at, "body": body})
        if added.rowcount:
            return report_id
        span = {"first": report_id, "last": report_id + window}
        last = db.execute("""
            SELECT max(ifnull((SELECT max(id) FROM report WHERE id BETWEEN :first AND :last), 0),
                       ifnull((SELECT max(id) FROM kept_report WHERE id BETWEEN :first AND :last), 0))""", span)
        report_id, window = last.fetchone()[0] + 1, window * 2


# --- auth: host keys and signatures, API tokens, passwords, sessions ---


@lru_cache(10_000)
def host_key(secret: bytes, nonce: bytes) -> bytes:
    """The key of a host: nobody can make it from the database alone."""
    return hmac.digest(secret, b"proxmon host key\0" + nonce, "sha256")


def host_token(secret: bytes, nonce: bytes) -> str:
    """The key as Standard Webhooks libraries take it."""
    return "whsec_" + base64.b64encode(host_key(secret, nonce)).decode()


def check_signature(key: bytes, headers: Callable[[str], str], body: bytes, now: float) -> None:
    """Standard Webhooks, over the bytes as sent. `Problem`: invalid_token, or clock_skew for a good signature
    made at another time than ours (within 300 s)."""
    message_id, stamp, given = headers("webhook-id"), headers("webhook-timestamp"), headers("webhook-signature")
    if not message_id or len(message_id) > 256 or not given or not (stamp.isascii() and stamp.isdigit()):
        raise Problem("invalid_token", "webhook-id, webhook-timestamp and webhook-signature are needed")
    digest = hmac.digest(key, f"{message_id}.{stamp}.".encode("latin-1", "replace") + body, "sha256")
    expected = b"v1," + base64.b64encode(digest)
    if not any(hmac.compare_digest(expected, one.encode("latin-1", "replace")) for one in given.split(" ")):
        raise Problem("invalid_token", "the signature does not fit: is this the host's current token?")
    if len(stamp) > 12 or abs(int(stamp) - now) > SKEW_LIMIT:
        raise Problem("clock_skew", f"signed for another time than ours; {SKEW_LIMIT} s are allowed", server_time=now)


def token_hash(token: str) -> bytes:
    """How a random token is kept. A fast hash will do: there is nothing to guess in 256 random bits."""
    return hashlib.sha256(token.encode()).digest()


TOKEN_KINDS = {"token": "pxm_", "kiosk": "pxk_"}  # a kiosk's opens the page to look at, and nothing else


def create_api_token(db: Database, name: Any, now: float, *, admin: bool, days: float | None,
                     kind: str = "token") -> str:
    """A new token, shown this once. `Problem`: invalid_request or conflict."""
    if db.execute("SELECT 1 FROM api_token WHERE name = :name", {"name": checked_name(name, "token")}).fetchone():
        raise Problem("conflict", f"there is an API token '{name}' already")
    token = TOKEN_KINDS[kind] + secrets.token_urlsafe(32)
    db.execute("""
        INSERT INTO api_token (name, hash, admin, kind, created_at, expires_at)
        VALUES (:name, :hash, :admin, :kind, :now, :expires)""",
        {"name": name, "hash": token_hash(token), "admin": int(admin), "kind": kind, "now": now,
         "expires": now + days * DAY if days else None})
    insert_event(db, now, "token-created", f"{'API token' if kind == 'token' else 'Kiosk link'} {name} created")
    return token


def revoke_api_token(db: Database, name: str, now: float) -> None:
    if not db.execute("DELETE FROM api_token WHERE name = :name", {"name": name}).rowcount:
        raise Problem("not_found", f"no API token '{name}'")
    insert_event(db, now, "token-revoked", f"API token {name} revoked")


def list_api_tokens(db: Database) -> list[Fields]:
    return [{**dict(row), "admin": bool(row["admin"])} for row in db.execute(
        "SELECT name, admin, kind, created_at, expires_at FROM api_token ORDER BY name")]


def find_api_token(db: Database, token: str, now: float, *, kind: str = "token") -> sqlite3.Row | None:
    return db.execute("""
        SELECT * FROM api_token WHERE hash = :hash AND kind = :kind AND (expires_at IS NULL OR expires_at > :now)""",
        {"hash": token_hash(token), "kind": kind, "now": now}).fetchone()


class Login(NamedTuple):
    """Somebody who may log in."""

    name: str
    role: str
    hash: str  # of the password, Argon2id


ROLES = ("viewer", "operator", "admin")  # each may what stands before it may
BUILT_IN = "admin"  # whose password is DASHBOARD_PASSWORD_HASH


def find_login(db: Database, name: str, built_in_hash: str) -> Login | None:
    """Who logs in by this name; None if nobody does."""
    if name.lower() == BUILT_IN:
        return Login(BUILT_IN, "admin", built_in_hash) if built_in_hash else None
    row = db.execute("SELECT name, role, hash FROM user WHERE name = :name", {"name": name}).fetchone()
    return Login(*row) if row else None


def session_key(secret: bytes, login: Login, cookie: str) -> bytes:
    """What a session is kept under. Another password or another secret: another key, so the session is over."""
    return hmac.digest(secret, f"proxmon session\0{login.hash}\0{cookie}".encode("utf-8", "replace"), "sha256")


def create_session(db: Database, secret: bytes, login: Login, now: float, address: str, user_agent: str) -> str:
    """A new session; gives back the cookie's value, which begins with the name of whose it is."""
    cookie = f"{login.name}.{secrets.token_urlsafe(32)}"
    db.execute("""
        INSERT INTO session (hash, user, created_at, used_at, address, user_agent)
        VALUES (:hash, :user, :now, :now, :address, :user_agent)""",
        {"hash": session_key(secret, login, cookie), "user": login.name, "now": now, "address": address,
         "user_agent": user_agent[:200]})
    insert_event(db, now, "login", f"Log-in of {login.name} from {address}")
    return cookie


LIVING_SESSION = f"used_at > :now - {SESSION_SECONDS} AND created_at > :now - {SESSION_MOST}"


def find_session(db: Database, secret: bytes, cookie: str, now: float,
                 built_in_hash: str) -> tuple[Login | None, sqlite3.Row | None]:
    """Whose living session this cookie is of."""
    login = find_login(db, cookie.rpartition(".")[0], built_in_hash)
    return login, login and db.execute(f"SELECT * FROM session WHERE hash = :hash AND {LIVING_SESSION}",
                                       {"hash": session_key(secret, login, cookie), "now": now}).fetchone()


def list_sessions(db: Database, now: float) -> list[Fields]:
    """The living sessions; `id` is the beginning of the hash, from which no cookie can be made."""
    return [dict(row) for row in db.execute(f"""
        SELECT lower(hex(substr(hash, 1, 8))) AS id, user, created_at, used_at, address, user_agent FROM session
        WHERE {LIVING_SESSION} ORDER BY used_at DESC""", {"now": now})]


def end_sessions(db: Database, now: float, *, id: str | None = None, user: str | None = None, but: bytes = b"") -> int:
    """End the session with this public id, those of a user, or all; gives back how many that were."""
    ended = db.execute("""
        DELETE FROM session WHERE (:id IS NULL OR lower(hex(substr(hash, 1, 8))) = :id)
        AND (:user IS NULL OR user = :user) AND hash <> :but""", {"id": id, "user": user, "but": but}).rowcount
    if ended:
        insert_event(db, now, "session-ended", f"{count_of(ended, 'session')} ended")
    return ended


def end_foreign_sessions(db: Database, secret: bytes, built_in_hash: str, now: float) -> None:
    """Sessions of another password or secret open nothing any more; they need not be listed either."""
    mark = session_key(secret, Login(BUILT_IN, "admin", built_in_hash), "").hex()
    if get_meta(db, "sessions_of") not in (None, mark):
        end_sessions(db, now)
    set_meta(db, "sessions_of", mark)


def check_user_name(db: Database, name: Any) -> str:
    """The name, if somebody new may have it. `Problem`: invalid_request or conflict."""
    taken = db.execute("SELECT 1 FROM user WHERE name = :name", {"name": checked_name(name, "user")}).fetchone()
    if taken or name.lower() == BUILT_IN:
        raise Problem("conflict", f"there is a user '{name}' already")
    return name


def insert_user(db: Database, name: Any, role: str, password_hash: str, now: float) -> None:
    """Somebody new who may log in."""
    db.execute("INSERT INTO user VALUES (:name, :hash, :role, :now)",
               {"name": check_user_name(db, name), "hash": password_hash, "role": role, "now": now})
    insert_event(db, now, "user-added", f"User {name} added as {role}")


def update_user(db: Database, name: str, now: float, *, role: str | None = None,
                password_hash: str | None = None) -> None:
    """Another role, which counts at once, or another password, which ends the user's sessions."""
    row = required_user(db, name)
    if password_hash:
        db.execute("UPDATE user SET hash = :hash WHERE name = :name", {"hash": password_hash, "name": row["name"]})
        insert_event(db, now, "user-password", f"Password of user {row['name']} set")
        end_sessions(db, now, user=row["name"])
    if role:
        db.execute("UPDATE user SET role = :role WHERE name = :name", {"role": role, "name": row["name"]})
        insert_event(db, now, "user-role", f"User {row['name']} is {role} now")


def delete_user(db: Database, name: str, now: float) -> None:
    """Nobody logs in by this name any more; the sessions end."""
    row = required_user(db, name)
    db.execute("DELETE FROM user WHERE name = :name", {"name": row["name"]})
    db.execute("DELETE FROM meta WHERE key = :key", {"key": f"looked/{row['name']}"})
    insert_event(db, now, "user-removed", f"User {row['name']} removed")
    end_sessions(db, now, user=row["name"])


def required_user(db: Database, name: str) -> sqlite3.Row:
    """The user's row. `Problem('not_found')`; the built-in one is not in the table."""
    row = db.execute("SELECT name, role, created_at FROM user WHERE name = :name", {"name": name}).fetchone()
    if row is None:
        raise Problem("not_found", "its password is DASHBOARD_PASSWORD_HASH" if name.lower() == BUILT_IN
                      else f"no user '{name}'")
    return row


def list_users(db: Database, built_in_hash: str) -> list[Fields]:
    """Who may log in, and when he last did."""
    built_in = [{"name": BUILT_IN, "role": "admin", "created_at": None}] if built_in_hash else []
    rows = built_in + [dict(row) for row in db.execute("SELECT name, role, created_at FROM user ORDER BY name")]
    last = dict(db.execute("""SELECT "by", max(at) FROM event WHERE kind = 'login' GROUP BY "by" """).fetchall())
    return [{**row, "last_login_at": last.get(f"session:{row['name']}")} for row in rows]


def csrf_token(secret: bytes, cookie: str) -> str:
    """What a page must send back with its writes; bound to the session, kept nowhere."""
    return hmac.digest(secret, b"proxmon csrf\0" + cookie.encode(), "sha256").hex()


def seen_cookie(secret: bytes, browser: str = "") -> str:
    """What a browser gets that has logged in once: its guesses are counted apart from everybody's."""
    browser = browser or secrets.token_hex(8)
    return f"{browser}.{hmac.digest(secret, b'proxmon seen' + browser.encode('utf-8', 'replace'), 'sha256').hex()}"


def seen_browser(secret: bytes, cookie: str) -> str | None:
    """The browser that such a cookie names, if we made it."""
    browser = cookie.partition(".")[0]
    fits = hmac.compare_digest(cookie.encode("utf-8", "replace"), seen_cookie(secret, browser or "-").encode())
    return browser if fits else None


PASSWORDS = argon2.PasswordHasher()
VERIFYING = threading.BoundedSemaphore(2)  # each takes 64 MiB
LOGINS = threading.BoundedSemaphore(4)  # two that are verified and two that wait; each holds a thread
PASSWORD_LEAST = 6  # characters; fewer are a slip. 12 and more are better, as the refusal says


def hash_password(password: str) -> str:
    """The Argon2id hash. `Failure` for a password that is soon guessed."""
    if len(password) < PASSWORD_LEAST:
        raise Failure(f"a password has {PASSWORD_LEAST} characters or more, better 12")
    return PASSWORDS.hash(password)


def verify_password(encoded: str, password: str | bytes) -> bool:
    """Argon2id, never more than two at once. No hash set: nobody gets in."""
    if not encoded:
        return False
    with VERIFYING:
        try:
            return PASSWORDS.verify(encoded, password)
        except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
            return False


def unlock_logins(db: Database, now: float) -> None:
    """Have a running server forget the failed log-ins."""
    set_meta(db, "logins_unlocked", secrets.token_hex(8))
    insert_event(db, now, "login-unlocked", "Failed log-ins forgotten")


class LoginLimiter:
    """After some failures of one origin, and after 50 from everywhere, each further try has to wait longer:
    1, 2, 4 … 900 s. A success clears the origin; 15 minutes without a failure clear everything."""

    FREE, FREE_GLOBAL, MOST, FORGET = 5, 50, 900, 900
    EVERYWHERE = "*"

    def __init__(self) -> None:
        self._failures: dict[str, tuple[int, float]] = {}
        self._unlocked: str | None = None
        self._lock = threading.Lock()

    def origins(self, address: str, browser: str | None) -> dict[str, int]:
        """What a try is counted under, and how many failures are free there. One IPv6 customer has 2^64 addresses
        or more (RFC 6177), so those count by /64 and /48; a browser that was in before counts for itself alone."""
        if browser:
            return {f"browser {browser}": self.FREE}
        try:
            parsed = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return {address: self.FREE, self.EVERYWHERE: self.FREE_GLOBAL}
        parsed = getattr(parsed, "ipv4_mapped", None) or parsed
        if parsed.version == 4:
            return {str(parsed): self.FREE, self.EVERYWHERE: self.FREE_GLOBAL}
        site, customer = (str(ipaddress.ip_network((parsed, length), strict=False)) for length in (64, 48))
        return {site: self.FREE, customer: 4 * self.FREE, self.EVERYWHERE: self.FREE_GLOBAL}

    def attempt(self, origins: dict[str, int], now: float) -> int:
        """How long these have to wait before the next try counts; 0 = not at all, and the try is counted as a
        failure until it has succeeded: many at the same moment are not one."""
        with self._lock:
            wait = max(self._wait(key, free, now) for key, free in origins.items())
            if not wait:
                self._count(origins, now)
            return wait

    def crowded(self, now: float) -> bool:
        """Whether those that nobody knows have to wait for each other."""
        return self._wait(self.EVERYWHERE, self.FREE_GLOBAL, now) > 0

    def succeeded(self, origins: dict[str, int]) -> None:
        with self._lock:
            for key in origins:
                count, last = self._failures.pop(key, (0, 0.0))
                if key == self.EVERYWHERE:
                    self._failures[key] = max(0, count - 1), last

    def unlock(self, mark: str | None) -> None:
        """Forget all failures, once for each new mark that `unlock-login` leaves in the database."""
        if mark is not None and mark != self._unlocked:
            self._unlocked = mark
            self._failures.clear()

    def _count(self, origins: Iterable[str], now: float) -> None:
        if len(self._failures) > 10_000:
            self._failures = {a: f for a, f in self._failures.items() if f[1] + self.FORGET > now}
        for key in origins:
            count, last = self._failures.get(key, (0, now))
            self._failures[key] = (count + 1 if last + self.FORGET > now else 1, now)

    def _wait(self, key: str, free: int, now: float) -> int:
        count, last = self._failures.get(key, (0, 0.0))
        if count < free or last + self.FORGET <= now:
            return 0
        return max(0, math.ceil(last + min(2 ** (count - free), self.MOST) - now))


class RateLimiter:
    """A bucket of tokens per key: `burst` at once, then `per_second`."""

    def __init__(self, burst: float, per_second: float):
        self.burst, self.per_second = burst, per_second
        self._buckets: dict[Any, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def take(self, key: Any, amount: int, now: float) -> float:
        """Seconds to wait until `amount` may pass; 0 = it may, and has been taken."""
        with self._lock:
            level, last = self._buckets.get(key, (self.burst, now))
            level = min(self.burst, level + max(0.0, now - last) * self.per_second)
            if level < amount:
                self._buckets[key] = (level, now)
                return (amount - level) / self.per_second
            self._buckets[key] = (level - amount, now)
            return 0.0


# --- reports: what a report must look like ---


class SectionShape(NamedTuple):
    """What a section is: one object (dict), or a list of objects, which a field tells apart."""

    form: type
    key: str = ""
    key_form: type = str
    items: type = dict


SECTIONS: dict[str, SectionShape] = {
    **dict.fromkeys(("node", "cluster", "backups", "ha", "time_sync", "updates", "subscription", "safeguards",
                     "versions", "ceph", "mail_queue"), SectionShape(dict)),
    **dict.fromkeys(("pool_states", "pools", "pool_settings", "datasets", "disks"), SectionShape(list, "name")),
    "guests": SectionShape(list, "vmid", int), "storages": SectionShape(list, "storage"),
    "snapshots": SectionShape(list, "dataset"), "tasks": SectionShape(list, "upid"),
    "replication": SectionShape(list, "id"), "services": SectionShape(list), "certificates": SectionShape(list),
    "failed_units": SectionShape(list, items=str),
}
NUMBER_SUFFIXES = ("_bytes", "_seconds", "_ratio", "_celsius", "_at", "_total")
NUMBER_NAMES = frozenset((
    "vmid", "cpu_count", "load1", "load5", "load15", "read_errors", "write_errors", "checksum_errors", "slow_ios",
    "data_errors", "redundancy_margin", "votes_expected", "votes_present", "votes_needed", "power_on_hours",
    "reallocated_sectors", "pending_sectors", "uncorrectable_errors", "crc_errors", "media_errors", "fail_count",
))
TEXT_NAMES = frozenset((  # text, or a number that Perl made of it
    "name", "status", "state", "type", "class", "storage", "content", "node", "layout", "pool", "dataset", "guid",
    "upid", "user", "schedule", "kernel", "pve_version", "model", "serial", "firmware", "path", "disk", "by_id", "id",
    "unit", "label", "sensor", "source", "target", "message", "reason", "lock", "health", "level", "mode", "address",
    "issuer", "subject", "severity", "encryption", "origin", "master", "manager", "file",
))
TRUTH_NAMES = frozenset((  # true, false or not told: what pages choose a word by
    "active", "onboot", "online", "passed", "quorate", "synchronised", "standby", "template", "shared", "mounted",
))
NUMBER_MOST = 2.0**64  # counters are unsigned 64 bit at the most
NUMBER_LEAST = -NUMBER_MOST


def unpack(body: bytes, encoding: str, most: int = UNPACKED_LIMIT) -> bytes:
    """The body without its gzip (one member or several: RFC 1952, 2.2). `Problem`: too_large beyond `most` bytes,
    invalid_json."""
    text, rest = (b"", body) if encoding == "gzip" else (body, b"")
    try:
        for _ in range(MEMBERS_LIMIT):
            if not rest or len(text) > most:
                break
            unpacker = zlib.decompressobj(31)
            text += unpacker.decompress(rest, most + 1 - len(text))
            if not unpacker.eof and len(text) <= most:
                raise zlib.error
            rest = unpacker.unused_data
    except zlib.error:
        raise Problem("invalid_json", "the body is not gzip as a whole, though Content-Encoding says so") from None
    if len(text) > most:
        raise Problem("too_large", f"unpacked it is more than {most} bytes")
    if rest:
        raise Problem("invalid_json", f"more than {MEMBERS_LIMIT} members in one gzip file")
    return text


def weigh(text: bytes) -> int:
    """About the bytes of memory that JSON text takes once it is parsed: each value is an object of its own."""
    return len(text) + 64 * (text.count(b",") + text.count(b"[") + text.count(b"{"))


def parse_json(text: bytes) -> Any:
    """JSON and nothing but: no NaN, no endless nesting, no half of a surrogate pair. `Problem('invalid_json')`."""
    try:
        parsed = STRICT_JSON.decode(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError, and integers of thousands of digits
        raise Problem("invalid_json", f"the body is not JSON: {str(error)[:200]}") from None
    if has_surrogates(text):
        parsed = without_surrogates(parsed)
    return parsed


def has_surrogates(text: bytes) -> bool:
    """Whether JSON text may hold halves of surrogate pairs."""
    return b"\\" in text and (b"\\ud" in text or b"\\uD" in text)


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


STRICT_JSON = json.JSONDecoder(parse_constant=refuse_constant)
compact_json = json.JSONEncoder(separators=(",", ":")).encode  # made once: json.dumps() makes one for each call


def without_surrogates(value: Any, depth: int = 0) -> Any:
    """Half a surrogate pair cannot be written as UTF-8 by anybody after us; names with broken bytes have them."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if depth > NESTING_LIMIT:
        return value  # refused by check_values()
    if isinstance(value, list):
        return [without_surrogates(one, depth + 1) for one in value]
    if isinstance(value, dict):
        return {without_surrogates(k): without_surrogates(v, depth + 1) for k, v in value.items()}
    return value


def check_reports(parsed: Any, host_name: str) -> list[Fields]:
    """The reports of one request, oldest first. `Problem`: invalid_report with a JSON pointer, or host_mismatch."""
    batch = parsed if isinstance(parsed, list) else [parsed]
    if not 1 <= len(batch) <= BATCH_LIMIT:
        raise Problem("invalid_report", f"1 to {BATCH_LIMIT} reports in one request, not {len(batch)}", pointer="")
    for number, report in enumerate(batch):
        steps = [number] if isinstance(parsed, list) else []
        try:
            check_report(report)
        except Mistake as bad:
            raise Problem("invalid_report", bad.reason, pointer=json_pointer([*steps, *bad.path])) from None
        if report["host_id"].lower() != host_name.lower():
            raise Problem("host_mismatch", f"the report is of another host than {host_name}",
                          pointer=json_pointer([*steps, "host_id"]))
    return batch


def json_pointer(steps: list[Any]) -> str:
    """RFC 6901"""
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in steps)


ENVELOPE_SPEC = {  # all else in a report is a section
    "version": (int, 1, 1), "host_id": (str, 1, 63), "tick": ("fast", "medium", "slow"), "time": (float, 0, 1e11),
    "run_id": (str, 1, 128), "seq": (int, 1, (1 << 53) - 1), "agent?": dict, "absent?": [str], "errors?": {"*": dict},
}
ENVELOPE = frozenset(name.removesuffix("?") for name in ENVELOPE_SPEC)


def check_report(report: Any) -> None:
    """`Mistake` unless this is a report as docs/report.schema.json has it. Unknown sections and fields pass."""
    if type(report) is not dict:
        raise Mistake((), "a report is an object")
    checked({name: report[name] for name in ENVELOPE & report.keys()}, ENVELOPE_SPEC)
    for name, value in report.items():
        try:
            if name in SECTIONS:
                check_section(SECTIONS[name], value)
            if type(value) in (dict, list):
                check_values(value, strict=name in SECTIONS)
            elif type(value) in (int, float) and not is_number(value):
                raise Mistake((), "not a number that can be kept")
        except Mistake as bad:
            raise Mistake((name, *bad.path), bad.reason) from None


def check_section(shape: SectionShape, value: Any) -> None:
    if type(value) is not shape.form:
        raise Mistake((), f"should be {'an object' if shape.form is dict else 'a list'}")
    items: Iterable[Any] = value if type(value) is list else ()
    for place, item in enumerate(items):
        if not isinstance(item, shape.items):
            raise Mistake((place,), f"should be {'an object' if shape.items is dict else 'text'}")
        fields: Any = item
        if shape.key and type(fields.get(shape.key)) is not shape.key_form:
            raise Mistake((place, shape.key), f"should be {'a number' if shape.key_form is int else 'text'}")


def is_number(value: Any) -> bool:
    kind = type(value)
    return (kind is float or kind is int) and NUMBER_LEAST <= value <= NUMBER_MOST


@lru_cache(4096)
def kind_of_name(key: str) -> type | None:
    """What belongs under a name: a number (float; units are in the names), a text (str), a truth value (bool), or
    whatever (None)."""
    if key.endswith(NUMBER_SUFFIXES) or key in NUMBER_NAMES:
        return float
    return str if key in TEXT_NAMES else bool if key in TRUTH_NAMES else None


def check_values(value: Any, *, strict: bool, depth: int = 0) -> None:
    """`Mistake` for a value anywhere in there that cannot be kept. `strict`: also for a list or an object where the
    name says that it is a number or a text, and for a text or a truth value where it says that it is a number."""
    if depth > NESTING_LIMIT:
        raise Mistake((), "nested too deeply")
    least, most = NUMBER_LEAST, NUMBER_MOST
    pairs: Iterable[tuple[Any, Any]] = value.items() if type(value) is dict else enumerate(value)
    for key, item in pairs:
        kind = type(item)
        if kind is float or kind is int:  # the most frequent first: this loop sees every value of every report
            if not least <= item <= most:
                raise Mistake((key,), "not a number that can be kept")
        elif kind is dict or kind is list:
            if strict and type(key) is str and len(key) < NAME_LIMIT and kind_of_name(key):
                raise Mistake((key,), "should be a single value")
            try:
                check_values(item, strict=strict, depth=depth + 1)
            except Mistake as bad:
                raise Mistake((key, *bad.path), bad.reason) from None
        elif strict and item is not None and type(key) is str and len(key) < NAME_LIMIT and kind_of_name(key) is float:
            raise Mistake((key,), "should be a number or null")


# --- fleet: the latest state of every host, in memory ---


class Stamp(NamedTuple):
    """Where a report stands in time. `time` is never later than the receipt: a clock that is ahead must not
    keep later reports from being the latest."""

    run: int
    seq: int
    time: float
    received_at: float
    report_id: int

    def newer_than(self, other: Stamp | None) -> bool:
        """Within a run of the agent the sequence decides, between runs the time."""
        if other is None:
            return True
        return self.seq > other.seq if self.run == other.run else self.time >= other.time


class Section(NamedTuple):
    """The latest of one section. `status` is the newest word on it, `stamp` the report of the value:
    after an error the old value stays, with its own time."""

    value: Any = None
    stamp: Stamp | None = None
    status: Stamp | None = None
    absent: bool = False
    error: Fields | None = None
    as_of: float | None = None
    report: bytes | None = None  # once the value has been let go: what it is in
    name: str = ""
    weight: int = 0  # of a large one, as weigh() has it

    @property
    def body(self) -> Any:
        return self.value if self.report is None else reread(self.report)[self.name]

    @property
    def time(self) -> float | None:
        """When the value was true: the section's own `as_of` where it has one."""
        if self.stamp is None:
            return None
        return self.stamp.time if self.as_of is None else min(self.as_of, self.stamp.time)


# Parsed, a host of 30 guests takes 38 kB, and nearly nobody asks for its guests once they have been judged. As they
# came they take 2 kB, and are read again in 0.1 ms. So are sections that this version does not know.
STAY_PARSED = SECTIONS.keys() - {"guests", "datasets", "snapshots", "tasks", "backups", "disks"}
OTHERS = "(others)"  # stands for the sections that were too many


@lru_cache(64)
def reread(body: bytes) -> Fields:
    return read_body(body)


@dataclasses.dataclass(slots=True)
class Alert:
    """An open alert: pending or firing. It is replaced, not changed; the fields are the columns of its table."""

    rule: str
    object: str
    severity: str
    message: str
    value: float | None
    since: float  # when the condition was first seen
    state: str = "pending"
    worse_since: float | None = None  # critical since
    fired_at: float | None = None
    resolved_at: float | None = None
    because_of: int | None = None
    acknowledged_at: float | None = None
    acknowledged_by: str | None = None
    acknowledged_until: float | None = None
    acknowledged_note: str | None = None
    acknowledged_severity: str | None = None
    acknowledged_value: float | None = None
    told: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)  # by channel: as how severe, when
    id: int | None = None

    def changed(self, **fields: Any) -> Alert:
        """A copy with some fields changed; the same alert if nothing does."""
        if all(getattr(self, key) == value for key, value in fields.items()):
            return self
        return dataclasses.replace(self, **fields)


ALERT_FIELDS = tuple(field.name for field in dataclasses.fields(Alert))


class Memory:
    """What rules remember of a host across restarts, JSON as {rule: {key: value}}, and its tasks of the last days.
    Only the judging transaction writes it: pages and the API read."""

    def __init__(self, kept: Fields | None = None):
        self.changed = False
        kept = modern_memory(kept or {})
        self.began: float | None = kept.pop("began", None)  # when it first kept something
        self.tasks: list[Any] = kept.pop("tasks", [])  # [type, vmid or None, started, ended]: why a guest may be down
        self.rules: dict[str, Fields] = {  # pool-forecast: it is made from the history now
            rule: entries for rule, entries in kept.items() if rule not in ("shape", "pool-forecast")}

    def keys(self, rule: str) -> list[str]:
        return list(self.rules.get(rule, ()))

    def get(self, rule: str, key: str, default: Any = None) -> Any:
        return self.rules.get(rule, {}).get(key, default)

    def keep(self, rule: str, key: str, value: Any) -> None:
        """Keep a value; it is written with the report that brought it."""
        entries = self.rules.setdefault(rule, {})
        if key not in entries or entries[key] != value:
            entries[key] = value
            self.changed = True

    def drop(self, rule: str, key: str) -> bool:
        """Forget a value; False if there was none."""
        if key not in self.rules.get(rule, {}):
            return False
        del self.rules[rule][key]
        self.changed = True
        return True

    def since(self, rule: str, key: str, now: float) -> float:
        """Since when something is so, which is now if it is new."""
        entry = self.get(rule, key, [True, now])
        self.keep(rule, key, entry)
        return entry[1]

    def known_from(self, now: float) -> float:
        """From when on what is new now has been there: 0 while all is new, as we only begin to look."""
        self.began = now if self.began is None else self.began
        return 0.0 if now - self.began < HOUR else now

    def forget(self, object: str) -> None:
        """Forget all of an object and its parts: another one has its name now."""
        for rule, entries in self.rules.items():
            for key in [key for key in entries if key == object or key.startswith(object + "/")]:
                self.drop(rule, key)

    def grown(self, rule: str, key: str, total: float, now: float, *, from_zero: bool = False) -> Growth:
        """A counter against its baseline, which is what it was when it was first seen, or 0."""
        entry = self.get(rule, key)
        first = 0 if from_zero else total
        base, last, steps = entry or (first, first, [])
        if total < last:  # it has begun anew: `zpool clear`, an import, a start of the host
            base, last, steps = (0, 0, []) if from_zero else (min(base, total), total, steps)
        if total > last:
            steps = [*(step for step in steps if step[0] > now - 7 * DAY), [now, total - last]]
        if entry or total or not from_zero:
            self.keep(rule, key, [base, total, steps])
        return Growth(base, total, steps)

    def accept(self, rule: str, key: str) -> bool:
        """Make what a counter is now its baseline; False if it is not known."""
        entry = self.get(rule, key)
        if entry is not None:
            self.keep(rule, key, [entry[1], entry[1], []])
        return entry is not None

    def to_json(self) -> str:
        return compact_json({"shape": 2, "began": self.began, **self.rules, "tasks": self.tasks})


class Growth(NamedTuple):
    """A counter: its baseline, its value, and its steps of the last 7 days as [time, how much]."""

    base: float
    total: float
    steps: list[list[float]]

    @property
    def above(self) -> float:
        return self.total - self.base

    def lately(self, since: float) -> float:
        return sum(step[1] for step in self.steps if step[0] > since)


def modern_memory(kept: Fields) -> Fields:
    """What version 0.1.0 remembered, in today's shape; jobs of backups are learned anew."""
    if not kept or "shape" in kept:
        return kept
    found: Fields = dict(kept)
    for rule in ("reboot-needed", "updates-security", "scrub-age"):
        found[rule] = {key: [True, at] for key, at in kept.get(rule, {}).items()}
    for rule in ("smart-growth", "smart-crc"):
        found[rule] = {f"{disk} {field}": [*pair, []] for disk, fields in kept.get(rule, {}).items()
                       for field, pair in fields.items() if field}
    down = kept.get("guest-down", {})
    guests = {**dict.fromkeys(down.get("up", ()), (0, RUNNING)), **down.get("down", {})}
    found["guest-down"] = {f"guests/{vmid}": [words, at, down.get("boot")] for vmid, (at, words) in guests.items()}
    oom, dropped = kept.get("oom", {}), kept.get("spool-dropped", {}).get("")
    found["backup-overdue"] = {}
    found["backup-failed"] = {f"guests/{vmid}": times for vmid, times in kept.get("backup-failed", {}).items()}
    found["snapshot-age"] = {object: [None, None, [], True] for object in kept.get("snapshot-age", {})}
    found["oom"] = {"": [oom["last"], oom["last"], []]} if "last" in oom else {}
    found["spool-dropped"] = {"": [0, dropped[0], [dropped[1:]]]} if dropped else {}
    return found


RUNNING = "running"


class AlertOwner:
    """What has alerts: a host, or what hosts share. `alerts`, `memory` and `over` are written by the judging
    transaction alone; containers are replaced, not changed, so that whoever reads has a whole one."""

    id: int | None = None
    name: str | None = None
    site: str | None = None
    maintenance_until: float | None = None

    def __init__(self) -> None:
        self.tags: list[str] = []
        self.alerts: dict[tuple[str, str], Alert] = {}
        self.memory = Memory()
        self.over: dict[int, Alert] = {}  # ended alerts, by id, whose end somebody has still to be told
        self.stumbled: dict[str, float] = {}  # when it was last logged that a rule cannot judge something here
        self.limits: tuple[Any, Fields] | None = None
        self.sections: dict[str, Section] = {}
        self.made: dict[tuple[str, Callable[[Any], Any]], tuple[bytes, Any]] = {}  # see made_of(); from which report

    def body(self, section: str, default: Any = None) -> Any:
        """The latest value of a section."""
        section_now = self.sections.get(section)
        value = None if section_now is None else section_now.body
        return default if value is None else value

    def made_of(self, section: str, make: Callable[[Any], Any]) -> Any:
        """`make(value)` of a section. Where the value has been let go it is made once for each that comes: to read
        that again takes longer than all else that a list does."""
        latest = self.sections.get(section, NOTHING)
        if latest.report is None:
            return make(latest.value)
        kept = self.made.get((section, make))
        if kept is None or kept[0] is not latest.report:
            kept = self.made[section, make] = latest.report, make(latest.body)
        return kept[1]

    def items(self, section: str) -> list[Fields]:
        """The objects of a section that is a list, or of a list inside a section: 'backups.guests'."""
        name, _, part = section.partition(".")
        body = self.body(name)
        return dicts(body if not part else body.get(part) if isinstance(body, dict) else None)


class HostState(AlertOwner):
    """All the server knows of one host. The writer's transaction changes it; others read."""

    id: int
    name: str

    def __init__(self, record: sqlite3.Row):
        super().__init__()
        self.id = record["id"]
        self.named: dict[str, list[tuple[str, Any]]] = {}  # see objects()
        self.agent: Fields = {}
        self.guest_counts: tuple[int | None, int | None, int] = None, None, 0  # running, real ones, all
        self.guest_words: dict[int, str | None] = {}  # status by vmid: what the next report is held against
        self.no_backup: Set[str] = frozenset()  # the vmids of the guests that are tagged so
        self.settings_changed: dict[int, float] = {}  # by vmid, as far as guests tell of it
        self.stamp: Stamp | None = None  # of the newest report
        self.clock_ahead: float | None = None
        self.last_seen_at: float | None = record["last_seen_at"]
        # What rules know until the next start, written by the judging transaction:
        self.coverage: tuple[Any, float, list[Coverage]] | None = None  # of its guests by backups; see covered()
        self.forecasts: dict[str, Filling] | None = None  # by object, from the history; None: not looked at yet
        self.forecast_at = 0.0
        self.margins: dict[str, list[VdevMargin]] | None = None  # by pool, as pool_margins() has it; None: not made
        self.failures: dict[str, int] = {}  # of sections that could not be collected: times in a row
        self.heard = 0  # reports since it was last silent
        self.skews: tuple[float, ...] = ()  # of its clock in the last live reports
        self.runs: dict[int, tuple[float, float]] = {}  # of its agent: first and last time
        self.twice_at: float | None = None  # when two agents were last seen under its name
        self.past: tuple[HostState, float] | None = None  # a state for late reports, and when it was last used
        self.rows: dict[str, KeptRows] = {}  # by list; see host_rows()
        self.set_record(record)

    def set_record(self, record: sqlite3.Row) -> None:
        """Take over what an administrator may change."""
        self.name = record["name"]
        self.nonce: bytes = record["nonce"]
        self.site = record["site"]
        self.tags = json.loads(record["tags"])
        self.note: str | None = record["note"]
        self.maintenance_until = record["maintenance_until"]
        self.limits = None  # thresholds depend on name and tags

    def has(self, section: str) -> bool:
        """Whether a section has a value."""
        found = self.sections.get(section, NOTHING)
        return found.value is not None or found.report is not None

    def apply(self, report: Fields, stamp: Stamp, weight: int = 0) -> list[str]:
        """Take over what is newer than what is there; gives back the sections whose value changed hands. Of a large
        report (`weight`, as weigh() has it) and of sections nobody knows only so much is kept."""
        sections, changed = dict(self.sections), []
        report = self.known_sections(report)
        for name in report.keys() - ENVELOPE:
            if stamp.newer_than(sections.get(name, NOTHING).status):
                sections[name] = Section(report[name], stamp, stamp, as_of=number(report[name], "as_of"))
                changed.append(name)
        if weight > WEIGHED:
            sections = with_limit(sections, changed)
        for name in report.get("absent") or ():
            if stamp.newer_than(sections.get(name, NOTHING).status):
                sections[name] = Section(None, None, stamp, absent=True)
                changed.append(name)
        for name, error in (report.get("errors") or {}).items():
            old = sections.get(name, NOTHING)
            if old.status == stamp or stamp.newer_than(old.status):  # part of a section may come with an error
                sections[name] = old._replace(status=stamp, error={**error, "time": stamp.time}, absent=False)
        self.sections, self.named = sections, {}
        if "pools" in changed or "disks" in changed:
            self.margins = None
        if "guests" in changed:
            guests = self.body("guests")
            self.guest_counts, self.guest_words = count_guests(guests), guest_words(guests)
            self.settings_changed.update(settings_changed(guests))
            self.no_backup = frozenset(str(guest["vmid"]) for guest in dicts(guests)
                                       if guest.get("tags") and wants_no_backup(guest))
        if stamp.newer_than(self.stamp):
            self.stamp, self.agent = stamp, report.get("agent") or {}
            ahead = report["time"] - stamp.received_at
            self.clock_ahead = ahead if ahead > 2 else None
        self.last_seen_at = max(self.last_seen_at or 0.0, stamp.received_at)
        return changed

    def known_sections(self, report: Fields) -> Fields:
        """The report without what would make the names of sections ever more."""
        strange = {*report, *(report.get("absent") or ()), *(report.get("errors") or ())} - ENVELOPE - SECTIONS.keys()
        if not strange:
            return report
        room = STRANGE_SECTIONS - len(self.sections.keys() - SECTIONS.keys() - {OTHERS})
        left_out = set(sorted(strange - self.sections.keys())[max(0, room):])
        if not left_out:
            return report
        told = {"code": "too_many",
                "detail": f"more than {STRANGE_SECTIONS} unknown sections; left out is {min(left_out)[:80]}"}
        errors = {name: error for name, error in (report.get("errors") or {}).items() if name not in left_out}
        return {**{name: value for name, value in report.items() if name not in left_out},
                "absent": [name for name in report.get("absent") or () if name not in left_out],
                "errors": {**errors, OTHERS: told}}

    def let_go(self, bodies: dict[int, bytes]) -> None:
        """Keep the large sections only packed: as they came, by their report's id; of a large report by itself."""
        sections = dict(self.sections)
        for name in sections.keys() - STAY_PARSED:
            section = sections[name]
            if section.value is not None and section.stamp is not None and section.stamp.report_id in bodies:
                packed = bodies[section.stamp.report_id]
                if section.weight:
                    packed = zlib.compress(json.dumps({name: section.value}).encode(), 1)
                sections[name] = section._replace(value=None, report=packed, name=name)
        self.sections, self.named = sections, {}

    def pointers(self) -> dict[str, list[int | None]]:
        """Which reports hold the latest state: what is needed to build it again."""
        kept = {"": [self.stamp.report_id, None]} if self.stamp else {}
        for name, section in self.sections.items():
            kept[name] = [section.stamp and section.stamp.report_id, section.status and section.status.report_id]
        return kept

    def objects(self, each: str) -> list[tuple[str, Any]]:
        """The objects of a section by name, as rules look at them; the same list until the next report."""
        found = self.named.get(each)
        if found is None:
            found = self.named[each] = self._name_objects(each)
        return found

    def _name_objects(self, each: str) -> list[tuple[str, Any]]:
        if each == "pool_states":
            return [(f"pools/{pool['name']}", pool) for pool in pools_now(self)]
        if each == "failures":
            errors = {name: self.sections.get(name, NOTHING).error for name in self.failures}
            return [(f"sections/{name}", {**error, "name": name, "count": self.failures[name]})
                    for name, error in errors.items() if error]
        kind = each.partition(".")[0]
        if each in OBJECT_NAMES:
            return [(f"{kind}/{OBJECT_NAMES[each](item)}", item) for item in self.items(each)]
        key = SECTIONS[each].key
        return [(f"{kind}/{item[key]}", item) for item in self.items(each)]


NOTHING = Section()


def pools_now(host: HostState) -> list[Fields]:
    """Every pool with all that is known of it; its state is the newer of the kernel's word and `zpool status`'s."""
    brief, full = host.sections.get("pool_states", NOTHING), host.sections.get("pools", NOTHING)
    pools = full_pools(host)
    if brief.body is None or brief.stamp is None:
        return list(pools.values())
    if full.stamp is not None and full.stamp != brief.stamp and full.stamp.newer_than(brief.stamp):
        return list(pools.values())
    return [{**pools.get(pool["name"], {}), "name": pool["name"], "state": pool.get("state")} for pool in brief.body]


def full_pools(host: Any) -> dict[str, Fields]:
    return {pool["name"]: pool for pool in host.items("pools")}


def service_name(unit: Fields) -> str:
    return (text(unit, "unit") or "").removesuffix(".service")


OBJECT_NAMES: dict[str, Callable[[Fields], Any]] = {
    "snapshots": lambda kind: f"{kind['dataset']}@{text(kind, 'class') or 'other'}",
    "services": service_name, "certificates": lambda cert: cert.get("file"), "backups.jobs": lambda job: job.get("id"),
}


class KeptRows(NamedTuple):
    """A host's rows of a list: what they were made of, from and until when they are so, and the rows as marshal has
    them: 25 kB a host for all lists, of which nearly nobody looks at any, and whoever reads them has his own."""

    read: tuple[Any, ...]
    since: float
    until: float
    packed: bytes


class Shared(AlertOwner):
    """What has alerts but is no host: clusters, sites, the server itself."""

    def __init__(self) -> None:
        super().__init__()
        self.clusters: list[Cluster] = []
        self.silent: dict[str, set[int]] = {}  # hosts that fell silent together, by site
        self.concerns: dict[str, set[int]] = {}  # the hosts of a cluster or site

    def objects(self, each: str) -> list[tuple[str, Any]]:
        """Clusters and sites; a cluster of which nothing fresh is known is there all the same."""
        if each == "sites":
            return [(object, (object, hosts)) for object, hosts in self.silent.items()]
        return [(f"clusters/{cluster.name}", cluster if cluster.views else None) for cluster in self.clusters]

    def hosts_of(self, object: str) -> set[int]:
        """The hosts that an object of a cluster or a site concerns."""
        return set().union(*(hosts for about, hosts in self.concerns.items()
                             if object == about or object.startswith(about + "/")))


class Fleet:
    """Every registered host's state, built from the database at start and kept by the writer from then on."""

    layers: Layers  # the rules' thresholds as set; as shipped until a server.toml is read: see Layers

    def __init__(self) -> None:
        self.hosts: dict[int, HostState] = {}
        self.names: dict[str, HostState] = {}  # in lower case
        self.nodes: dict[str, list[HostState]] = {}  # by the names they may have as nodes of a cluster
        self.hosts_version = 0
        self.lock = threading.Lock()
        self.serving_since = 0.0  # silence is counted from here at the earliest
        self.shared = Shared()
        self.concerned: dict[int, list[Alert]] = {}  # shared alerts, by the hosts they are about
        self.channels: list[Channel] = []
        self.silences: list[Fields] = []
        self.told_at: float | None = None  # when a channel last took a message
        self.outbox_changed: Callable[[str], None] = lambda channel: None  # something was queued for it
        self.freed: dict[int, float] = {}  # alerts whose cause has just ended, and when: they may be about to end too
        self.failed_logins: deque[float] = deque(maxlen=100)  # when the last ones were
        self.public_url = ""
        self.certificate_ends_at: float | None = None  # of this server itself
        self.copies: SnapshotIndex | None = None  # whose snapshots lie where; see index_copies()

    def load(self, db: Database) -> None:
        """Build everything anew."""
        hosts = {}
        for record in list_host_records(db):
            state = hosts[record["id"]] = HostState(record)
            load_sections(db, state)
            load_alerts(db, state)
        load_alerts(db, self.shared)
        self.concerned = {}
        self.silences = active_silences(db)
        self.told_at = last_notification_at(db)
        self._take_over(hosts, int(get_meta(db, "hosts_version") or 0))

    def refresh(self, db: Database) -> None:
        """Take over hosts that were registered, changed or removed, also by a command in another process."""
        version = int(get_meta(db, "hosts_version") or 0)
        if version <= self.hosts_version:
            return
        with self.lock:  # two that take over at once would each make a state of a new host
            if version <= self.hosts_version:
                return
            hosts = {}
            for record in list_host_records(db):
                state = hosts[record["id"]] = self.hosts.get(record["id"]) or HostState(record)
                state.set_record(record)
            self._take_over(hosts, version)

    def _take_over(self, hosts: dict[int, HostState], version: int) -> None:
        nodes: dict[str, list[HostState]] = {}
        for state in hosts.values():
            for name in node_names(state):
                nodes.setdefault(name, []).append(state)
        self.hosts, self.nodes = hosts, nodes
        self.names = {state.name.lower(): state for state in hosts.values()}
        self.hosts_version = version

    def sorted(self, now: float) -> list[HostState]:
        """Worst first, of the silent ones the longest silent, then by name: rows stand still from report to report."""
        def order(state: HostState) -> tuple[int, float, str]:
            verdict = self.verdict(state, now)[0]
            silent_since = state.last_seen_at or 0.0 if verdict in ("offline", "stale") else 0.0
            return VERDICTS.index(verdict), silent_since, state.name.lower()
        return sorted(self.hosts.values(), key=order)

    def everything(self) -> list[Any]:
        """All that can have alerts: hosts, and what they share."""
        return [self.shared, *self.hosts.values()]

    def find(self, name: str) -> HostState:
        """The state of the host with this name, whatever its case. `Problem('not_found')`."""
        state = self.names.get(name.lower())
        if state is None:
            raise Problem("not_found", f"no host '{name}' is registered")
        return state

    def silent_seconds(self, state: HostState, now: float) -> float | None:
        """Since when nothing has come, by our own clock; None before the first report. An outage of the server
        is no silence of the host."""
        if state.last_seen_at is None:
            return None
        return max(0.0, now - max(state.last_seen_at, self.serving_since))

    def offline_after(self, state: HostState) -> float:
        """Seconds of silence after which a host is offline."""
        limits = self.layers.named("host-offline", state)
        return min((limit for limit in (limits.warn, limits.crit) if limit is not None), default=OFFLINE_SECONDS)

    def is_offline(self, state: HostState, now: float) -> bool:
        silent = self.silent_seconds(state, now)
        return silent is not None and silent >= self.offline_after(state)

    def mates(self, state: HostState) -> list[HostState]:
        """A host and the others of its cluster that are registered: each names the other as a member, by the name it
        is registered under, never by one that it gives itself (or by its tag `node:NAME`)."""
        cluster, own_names, found = state.body("cluster"), node_names(state), [state]
        for member in member_names(cluster):
            others = [other for other in self.nodes.get(member, ()) if other is not state
                      and text(other.body("cluster"), "name") == text(cluster, "name")
                      and not own_names.isdisjoint(member_names(other.body("cluster")))]
            if len(others) > 1:  # another site may have a node of this name
                others = [other for other in others if other.site == state.site]
            found += [other for other in others if other not in found]
        return found

    def cluster_of(self, state: HostState) -> list[HostState]:
        """All hosts of a host's cluster, also those that only others of it name."""
        found = [state]
        for host in found:
            found += [mate for mate in self.mates(host) if mate not in found]
        return found

    def verdict(self, state: HostState, now: float) -> tuple[str, str]:
        """What is to be thought of a host, in a word and a sentence."""
        silent = self.silent_seconds(state, now)
        if state.maintenance_until and state.maintenance_until > now:
            return "maintenance", "In maintenance."
        if silent is None:
            return "unknown", "No report has come yet."
        if silent >= self.offline_after(state):
            return "offline", f"Nothing received for {format_duration(silent)}."
        worst, reason = worst_alert((*state.alerts.values(), *self.concerned.get(state.id, ())))
        if worst == "critical":
            return worst, reason
        if silent >= STALE_SECONDS:
            return "stale", f"Nothing received for {format_duration(silent)}; what is shown is old."
        return (worst, reason) if worst else ("ok", "No problem found.")


def with_limit(sections: dict[str, Section], changed: list[str]) -> dict[str, Section]:
    """The sections with an error in the place of each changed one that is too much."""
    kept = sum(section.weight for name, section in sections.items() if name not in changed)
    for name in changed:
        section = sections[name]
        weight = weigh(json.dumps(section.value).encode())
        if kept + weight > KEPT_LIMIT:
            error = {"code": "too_large", "detail": f"too large to keep: {weight >> 20} MiB parsed, of "
                                                    f"{KEPT_LIMIT >> 20} MiB for all large sections of a host"}
            sections[name] = Section(status=section.status, error={**error, "time": section.time})
        else:
            kept, sections[name] = kept + weight, section._replace(weight=weight)
    return sections


def load_sections(db: Database, state: HostState) -> None:
    """The latest sections of a host, from the reports that hold them."""
    row = db.execute("SELECT sections FROM latest WHERE host_id = :id", {"id": state.id}).fetchone()
    wanted = {one for pair in json.loads(row[0]).values() for one in pair if one} if row else set()
    found = [find_report(db, one) for one in wanted]
    for report in sorted(filter(None, found), key=lambda r: (report_time(r["id"]), r["run"], r["seq"])):
        stamp = Stamp(report["run"], report["seq"], report_time(report["id"]), report["received_at"], report["id"])
        text = read_text(report["body"])
        state.apply(json.loads(text), stamp, weigh(text))
    state.let_go({report["id"]: report["body"] for report in found if report})


def load_alerts(db: Database, state: HostState | Shared) -> None:
    owner = {"id": state.id or 0}
    rows = db.execute("SELECT * FROM alert WHERE ifnull(host_id, 0) = :id AND state <> 'resolved'", owner)
    state.alerts = {(row["rule"], row["object"]): read_alert(row) for row in rows}
    rows = db.execute("SELECT * FROM alert WHERE ifnull(host_id, 0) = :id AND state = 'resolved' AND told <> '{}'",
                      owner)
    state.over = {row["id"]: read_alert(row) for row in rows}
    memory = db.execute("SELECT memory FROM rule_memory WHERE host_id = :id", owner).fetchone()
    state.memory = Memory(json.loads(memory[0]) if memory else None)


def read_alert(row: sqlite3.Row) -> Alert:
    told = {channel: (severity, at) for channel, (severity, at) in json.loads(row["told"]).items()}
    return Alert(**{**{key: row[key] for key in ALERT_FIELDS}, "told": told})


def node_names(state: HostState) -> set[str]:
    """The names a host may have as a member of a cluster, which an administrator gave it."""
    return {state.name.lower(), *(tag[5:].lower() for tag in state.tags if tag.lower().startswith("node:"))}


def member_names(cluster: Any) -> set[str]:
    members = cluster.get("members") if isinstance(cluster, dict) else None
    return {name.lower() for member in dicts(members) if (name := text(member, "name"))}


def worst_alert(alerts: Iterable[Alert]) -> tuple[str | None, str]:
    """Severity and sentence of the worst that fires and that nobody has acknowledged; None if nothing does."""
    firing = [alert for alert in alerts if alert.state == "firing" and alert.acknowledged_at is None]
    if not firing:
        return None, ""
    worst = min(firing, key=lambda alert: (SEVERITIES.index(alert.severity), -alert.since))
    more = f" (+{len(firing) - 1} more)" if len(firing) > 1 else ""
    return worst.severity, worst.message + more


def dicts(value: Any) -> list[Fields]:
    """The objects of a list, whatever else an agent put into it."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def first_of(rows: Iterable[Fields], **wanted: Any) -> Fields | None:
    """The first row that has these values."""
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def number(fields: Any, key: str) -> float | None:
    """A field if it is a number: what an agent sends is not to be trusted."""
    value = fields.get(key) if type(fields) is dict else None
    kind = type(value)
    return value if kind is float or kind is int else None  # how large it may be has been checked: misfit()


def text(fields: Any, key: str) -> str | None:
    value = fields.get(key) if type(fields) is dict else None
    return value if type(value) is str else None


def tags_of(guest: Fields) -> list[str]:
    """A guest's tags, which PVE separates by ; , or blanks."""
    tags = guest.get("tags")
    if isinstance(tags, str):
        return tags.replace(",", ";").replace(" ", ";").lower().split(";")
    return [str(tag).lower() for tag in tags] if isinstance(tags, list) else []


def wants_no_backup(guest: Fields) -> bool:
    return not {"no-backup", "nobackup"}.isdisjoint(tags_of(guest))


def ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


SECTION_TICKS = {
    **dict.fromkeys(("node", "cluster", "guests", "storages", "pool_states"), STALE_SECONDS),
    **dict.fromkeys(("pools", "datasets", "backups", "replication", "ha", "services", "time_sync"), 15 * MINUTE),
}


def is_stale(state: HostState, section: str, now: float) -> bool:
    """Whether a section's value is older than it should be."""
    time_of_value = state.sections.get(section, NOTHING).time
    return time_of_value is not None and now - time_of_value > SECTION_TICKS.get(section, 2 * HOUR)


def count_guests(guests: list[Fields] | None) -> tuple[int | None, int | None, int]:
    """How many run, how many are no templates, how many there are; None: not known."""
    if guests is None:
        return None, None, 0
    real = [guest for guest in guests if not guest.get("template")]
    return sum(guest.get("status") == "running" for guest in real), len(real), len(guests)


def guest_words(guests: Any) -> dict[int, str | None]:
    """The status of each guest by vmid."""
    return {guest["vmid"]: text(guest, "status") for guest in dicts(guests)}


def settings_changed(guests: Any) -> dict[int, float]:
    """By vmid when a guest's configuration changed last, of those that tell of it: for an hour."""
    return {guest["vmid"]: guest["config_changed_at"] for guest in dicts(guests)
            if "config_changed_at" in guest and is_number(guest["config_changed_at"])}


def vdev_errors(pool: Fields) -> Fields:
    """Errors of all leaves together: the pool's own row may show 0 (zpool counts where they happen)."""
    leaves = [vdev for vdev in walk_vdevs(pool.get("vdevs")) if not vdev.get("children")]
    return {key: sum_known(number(leaf, key) for leaf in leaves) for key in VDEV_COUNTERS}


VDEV_COUNTERS = ("read_errors", "write_errors", "checksum_errors")


def walk_vdevs(vdevs: Any) -> Iterator[Fields]:
    """Each vdev of a tree, parents first."""
    for vdev in vdevs if isinstance(vdevs, list) else ():
        if isinstance(vdev, dict):
            yield vdev
            yield from walk_vdevs(vdev.get("children"))


def sum_known(values: Iterable[float | None]) -> float | None:
    """The sum of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def storage_used_ratio(storage: Fields) -> float | None:
    return ratio(number(storage, "used_bytes"), number(storage, "total_bytes"))


def format_duration(seconds: float) -> str:
    """'41 s', '7 min', '3 h', '12 d'"""
    size, unit = duration_unit(seconds)
    return f"{int(seconds // size)} {unit}"


def duration_unit(seconds: float) -> tuple[int, str]:
    """In what a duration is told: the unit's size, and its sign."""
    if seconds < 2 * HOUR:
        return (MINUTE, "min") if seconds >= MINUTE else (1, "s")
    return (HOUR, "h") if seconds < 2 * DAY else (DAY, "d")


def next_age(since: float, now: float, unit: int = 0) -> float:
    """When the time since then is next told by another number, in format_duration's unit or in another."""
    age = max(0.0, now - since)
    size = unit or duration_unit(age)[0]
    return max(since, now) - age % size + size


def format_bytes(size: float) -> str:
    """1536 -> '1.5 KiB': powers of 1024, as zfs and Proxmox count."""
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while abs(size) >= 1023.5 and len(units) > 1:
        size = size / 1024
        units.pop(0)
    return f"{size:.{0 if units[0] == 'B' or abs(size) >= 99.95 else 1}f} {units[0]}"


# --- answers: what an operator would otherwise work out by hand, pure functions over the latest states ---


# What a report of odd types makes our own code raise: it costs that host's rows, never the list of all hosts.
ODD = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


@lru_cache(1000)
def log_once(line: str) -> None:
    """What would be said again with each poll of a page."""
    log(line)


def of_each(hosts: Iterable[HostState], what: str,
            make: Callable[[HostState], Iterable[Any]]) -> Iterator[tuple[HostState, Any]]:
    """What is made of each host, with it; a host of which it cannot be made is left out, and named in the log."""
    for host in hosts:
        try:
            yield from [(host, made) for made in make(host)]
        except ODD as error:
            log_once(f"server: {what} of {host.name} left out: {type(error).__name__}: {error}")


class Copy(NamedTuple):
    """One copy of a guest's data that would survive the loss of its host."""

    at: float  # the guest as it was then
    kind: str  # backup, replication or snapshot
    where: str  # a storage or a host
    sure: bool  # False: the same volume by name and time, not by guid


# On the host's own disks, unless Proxmox calls the storage shared.
OWN_STORAGE = frozenset(("dir", "zfspool", "lvm", "lvmthin", "btrfs"))


def is_unseen(host: HostState, section: str) -> bool:
    """Whether a section may hold what we have not seen: it failed, or has not come yet. An absent one holds nothing."""
    latest = host.sections.get(section, NOTHING)
    return latest.error is not None or (latest.status is None and not latest.absent)


def unseen_row(host: HostState, columns: Iterable[str], *sections: str) -> Iterator[Fields]:
    """One row for what an answer cannot say of a host; nothing of one that has never reported."""
    unseen = [section for section in sections if is_unseen(host, section)]
    if unseen and host.stamp is not None:
        why = [f"{section} ({(host.sections.get(section, NOTHING).error or {}).get('code', 'has not come yet')})"
               for section in unseen]
        yield {**dict.fromkeys(columns), "host": host.name, "verdict": "unknown",
               "reason": f"could not be looked at: {', '.join(why)}"}


def storages_of(host: HostState) -> dict[str, Fields]:
    return {str(storage.get("storage")): storage for storage in host.items("storages")}


def is_elsewhere(storage: Fields | None, addresses: set[str]) -> bool | None:
    """Whether what lies on a storage survives a host of these addresses; None if the storage is not known."""
    if storage is None:
        return None
    if text(storage, "type") in OWN_STORAGE:
        return bool(storage.get("shared"))
    return (text(storage, "server") or "").lower() not in addresses


def own_addresses(host: HostState) -> set[str]:
    """The names and addresses by which a storage may point back at its own host."""
    node = (text(host.body("node"), "name") or host.name).lower()
    members = host.items("cluster.members")
    own = {text(member, "address") for member in members if (text(member, "name") or "").lower() == node}
    return {"localhost", "127.0.0.1", "::1", node, host.name.lower()} | {address for address in own if address}


def volumes_of(guest: Fields) -> list[str]:
    return [dataset for volume in dicts(guest.get("volumes")) if (dataset := text(volume, "dataset"))]


class SnapshotIndex:
    """Which hosts have the newest snapshots of all hosts: by guid, which send/receive keeps, and by the volume's name
    and the class, in the order of time. A host's own guests' volumes are no copies of others of the same name."""

    def __init__(self, hosts: Iterable[HostState]):
        self.by_guid: dict[str, list[tuple[float, str]]] = {}
        self.by_series: dict[tuple[str, Any], list[tuple[float, str]]] = {}
        for host, (guid, series, at) in of_each(hosts, "snapshots", indexed_snapshots):
            if guid:
                self.by_guid.setdefault(guid, []).append((at, host.name))
            if series:
                self.by_series.setdefault(series, []).append((at, host.name))
        for known in self.by_series.values():
            known.sort()

    def newest(self, host: HostState, own: list[Fields]) -> Copy | None:
        """The newest copy on another host of a dataset of which `host` has these series. A snapshot that is no longer
        the newest here is known by name only: same volume and class, made while such were made here."""
        found = [Copy(at, "snapshot", name, True) for entry in own
                 for at, name in self.by_guid.get(text(entry, "newest_guid") or "", ()) if name != host.name]
        for entry in own:
            first, last = number(entry, "oldest_at"), number(entry, "newest_at")
            known = self.by_series.get(((text(entry, "dataset") or "").rpartition("/")[2], entry.get("class")), [])
            end = bisect.bisect_right(known, (last, "\uffff")) if last is not None else 0
            at, where = next(((at, name) for at, name in map(known.__getitem__, range(end - 1, -1, -1))
                              if name != host.name), (None, ""))
            if at is not None and first is not None and at >= first:
                found.append(Copy(at, "snapshot", where, False))
        return max(found, key=lambda copy: (copy.at, copy.sure), default=None)


def indexed_snapshots(host: HostState) -> Iterator[tuple[str | None, tuple[str, Any] | None, float]]:
    """Guid, (volume, class) and time of the newest of each series that may be a copy of another host's."""
    guests = {str(guest.get("vmid")) for guest in host.items("guests")}
    for entry in host.items("snapshots"):
        at, volume = number(entry, "newest_at"), (text(entry, "dataset") or "").rpartition("/")[2]
        mine = GUEST_VOLUME.fullmatch(volume)
        if at is not None and volume:
            yield text(entry, "newest_guid"), None if mine and mine[1] in guests else (volume, entry.get("class")), at


class CopySources:
    """What the guests of a host could come back from, made once for all of them."""

    def __init__(self, host: HostState, index: SnapshotIndex):
        self.host, self.index, self.storages = host, index, storages_of(host)
        self.node, self.addresses = text(host.body("node"), "name") or host.name, own_addresses(host)
        self.unseen = [section for section in ("backups", "snapshots") if is_unseen(host, section)]
        self.backups: dict[Any, Any] = {}
        self.jobs: dict[Any, list[Fields]] = {}
        self.series: dict[Any, list[Fields]] = {}
        for run in host.items("backups.guests"):
            self.backups[run.get("vmid")] = run.get("newest_ok")
        for job in host.items("replication"):
            self.jobs.setdefault(job.get("vmid"), []).append(job)
        for entry in host.items("snapshots"):
            self.series.setdefault(entry.get("dataset"), []).append(entry)

    def find(self, guest: Fields) -> list[Copy | None]:
        """The newest copy of each kind; None for a backup whose storage is not known."""
        return [*self._backup(guest), *self._replicas(guest), *self._snapshots(guest)]

    def _backup(self, guest: Fields) -> Iterator[Copy | None]:
        good, created = self.backups.get(guest.get("vmid")), number(guest, "created_at")
        ended, storage = number(good, "ended_at"), text(good, "storage") or ""
        if ended is None or (created is not None and ended < created):
            return
        elsewhere = is_elsewhere(self.storages.get(storage), self.addresses)
        if elsewhere is not False:
            yield Copy(ended - (number(good, "duration_seconds") or 0), "backup", storage, True) if elsewhere else None

    def _replicas(self, guest: Fields) -> Iterator[Copy]:
        for job in self.jobs.get(guest.get("vmid"), ()):
            synced, target = number(job, "last_sync_at"), text(job, "target")
            if synced and target not in (None, self.node):
                yield Copy(synced, "replication", target or "?", True)

    def _snapshots(self, guest: Fields) -> Iterator[Copy]:
        """The newest state of which every volume has a copy: the oldest of the volumes' newest copies."""
        newest = [self.index.newest(self.host, self.series.get(dataset, [])) for dataset in volumes_of(guest)]
        known = [copy for copy in newest if copy]
        if newest and len(known) == len(newest):
            yield min(known, key=lambda copy: copy.at)

    def only_copy(self, guest: Fields) -> str:
        """Why there is no copy: none at all, or one that burns with the host."""
        storage = text(self.backups.get(guest.get("vmid")), "storage")
        if not storage:
            return "all of it would be lost: no copy elsewhere"
        pool = (text(self.storages.get(storage), "dataset") or "").partition("/")[0]
        same = pool in {dataset.partition("/")[0] for dataset in volumes_of(guest)}
        return f"its only copy lies on the same {'pool' if same else 'host'} (backup on {storage})"


COPY_COLUMNS = ("host", "vmid", "name", "verdict", "reason", "lost_seconds", "copy_at", "copy_kind", "copy_where",
                "sure", "tags")


def copy_rows(host: HostState, index: SnapshotIndex, now: float) -> Iterator[Fields]:
    """If this host burned now: for each guest what would be lost, and from which copy it would come back."""
    sources = CopySources(host, index)
    for guest in host.items("guests"):
        if not guest.get("template"):
            yield guest_copy(sources, guest, now)


def guest_copy(sources: CopySources, guest: Fields, now: float) -> Fields:
    found, unknown = sources.find(guest), sources.unseen
    best = max((copy for copy in found if copy), key=lambda copy: (copy.at, copy.sure), default=None)
    row = {"host": sources.host.name, "vmid": guest.get("vmid"), "name": text(guest, "name"),
           "tags": guest.get("tags"), **dict.fromkeys(("lost_seconds", "copy_at", "copy_kind", "copy_where", "sure"))}
    if best:
        row.update(lost_seconds=max(0.0, now - best.at), copy_at=best.at, copy_kind=best.kind, copy_where=best.where,
                   sure=best.sure and not unknown, verdict="ok", reason=describe_copy(best, now))
    elif unknown or None in found:
        row.update(verdict="unknown", reason=f"no copy is known, but {' and '.join(unknown) or 'a storage'} "
                                             "could not be looked at")
    else:
        row.update(verdict="warning", reason=sources.only_copy(guest))
    return row


def describe_copy(copy: Copy, now: float) -> str:
    likely = "" if copy.sure else " (by its name; no common snapshot seen)"
    return f"{format_duration(max(0.0, now - copy.at))} of work would be lost: {copy.kind} on {copy.where}{likely}"


def sum_up_copies(rows: Sequence[Fields]) -> str:
    bare, unknown = (sum(row["verdict"] == word for row in rows) for word in ("warning", "unknown"))
    return f"{bare} of {len(rows)} guests have no copy outside their own host" \
        + (f"; of {unknown} it is not known" if unknown else "") + "."


# Margins: how many more disks each top-level vdev survives.


MANY_ERRORS = 10  # of ZFS on a disk; one or two are often the cable's, or a bit that flipped


def suspicions(disk: Fields | None, leaf: Fields, accepted: float = 0) -> list[str]:
    """Why a member may be the next to fail: what SMART says of the disk and what ZFS counted on the vdev beyond the
    errors that are accepted as normal."""
    disk = disk or {}
    warning, pending = number(disk, "critical_warning"), number(disk, "pending_sectors")
    wear, failing = number(disk, "wear_ratio"), disk.get("failing_attributes")
    errors = (sum_known(number(leaf, key) for key in VDEV_COUNTERS) or 0) - accepted
    test = disk.get("selftest")
    reasons = [
        (is_failing(disk), "SMART: failing"),
        (bool(failing), f"SMART: {', '.join(map(str, failing or ()))} at the threshold"),
        (bool(warning) and warning != HOT_ONLY, f"critical warning 0x{int(warning or 0):02x}"),
        (lacks_spare(disk), "spare blocks used up"),
        (wear is not None and wear >= 1, f"{wear or 0:.0%} worn"),
        (bool(pending), f"{int(pending or 0)} pending sectors"),
        (isinstance(test, dict) and test.get("passed") is False, "self-test failed"),
        (errors >= MANY_ERRORS, f"{int(errors)} I/O errors in ZFS"),
    ]
    return [reason for holds, reason in reasons if holds]


HOT_ONLY = 0x02  # of critical_warning: the temperature, and nothing else


def is_failing(disk: Fields) -> bool:
    """What SMART says of the whole. smartctl calls an NVMe failed for any bit of critical_warning, heat too."""
    return disk.get("passed") is False and number(disk, "critical_warning") != HOT_ONLY


def lacks_spare(disk: Fields) -> bool:
    """Whether its spare is down to its own limit; a limit of 0 says that it does not tell."""
    spare, least = number(disk, "spare_ratio"), number(disk, "spare_threshold_ratio")
    return spare is not None and bool(least) and spare <= (least or 0)


class VdevMargin(NamedTuple):
    """One top-level vdev: how many more members may fail, and how many if the suspects fail first."""

    pool: str
    vdev: str
    margin: int
    suspects: tuple[tuple[Fields, Fields | None, list[str]], ...]  # (leaf, disk, reasons)

    @property
    def with_suspects(self) -> int:
        return self.margin - len(self.suspects)


def tolerance(vdev: Fields) -> int:
    """Members a healthy vdev may lose: copies − 1 of a mirror, the parity of a raidz or draid, else none."""
    kind, children = text(vdev, "type") or "", dicts(vdev.get("children"))
    parity = re.match(r"(?:raidz|draid)(\d?)", kind) or re.match(r"(?:raidz|draid)(\d?)", text(vdev, "name") or "")
    if parity:
        return int(parity[1] or 1)
    return max(0, len(children) - 1) if kind in ("mirror", "replacing", "spare") else 0


def is_whole(member: Fields) -> bool:
    """Whether a member counts as redundancy now: ONLINE, or a spare or replacement with a member that is."""
    children = dicts(member.get("children"))
    return any(is_whole(child) for child in children) if children else text(member, "state") == "ONLINE"


def pool_margins(host: HostState, pool: Fields) -> list[VdevMargin]:
    """Each top-level vdev that holds data (special and dedup too: their loss is the pool's loss)."""
    known = None if host.margins is None else host.margins.get(str(pool.get("name")))
    return make_margins(host, pool) if known is None else known


def keep_margins(host: HostState) -> None:
    """Make the margins with the report that brought disks or pools: lists would have to read the disks again."""
    try:
        host.margins = {str(pool.get("name")): make_margins(host, pool) for pool in host.items("pools")}
    except ODD:
        host.margins = None


def make_margins(host: HostState, pool: Fields) -> list[VdevMargin]:
    disks = {str(disk.get("name")): disk for disk in host.items("disks")}
    told = number(pool, "redundancy_margin")  # counts resilvering members as the agent sees them
    found = []
    for vdev in dicts(pool.get("vdevs")):
        if text(vdev, "class") in ("log", "cache", "spare"):
            continue
        members = dicts(vdev.get("children")) or [vdev]
        missing = sum(not is_whole(member) for member in members)
        margin = tolerance(vdev) - missing
        suspects = tuple((leaf, disks.get(str(leaf.get("disk"))), why) for leaf in walk_vdevs([vdev])
                         if not leaf.get("children") and text(leaf, "state") == "ONLINE"
                         and (why := suspicions(disks.get(str(leaf.get("disk"))), leaf,
                                                accepted_errors(host, pool, leaf))))
        found.append(VdevMargin(str(pool.get("name")), str(vdev.get("name")), margin, suspects))
    least = min((vdev.margin for vdev in found), default=None)
    if told is not None and least is not None and told < least:  # the worst one is worse than its words
        found = [vdev._replace(margin=int(told)) if vdev.margin == least else vdev for vdev in found]
    return found


def accepted_errors(host: HostState, pool: Fields, leaf: Fields) -> float:
    kept = host.memory.get("vdev-errors", f"pools/{pool.get('name')}/{leaf.get('name')}")
    return kept[0] if kept else 0


REPLACE_COLUMNS = ("host", "disk", "verdict", "reason", "serial", "model", "size_bytes", "by_id", "bay", "pool", "vdev",
                   "margin", "margin_with_suspects", "guests", "power_on_hours")


def replacement_rows(hosts: Iterable[HostState]) -> list[Fields]:
    """The disks to replace, over the fleet, in order: least margin left first, then the more suspect, the older."""
    rows = [row for _, row in of_each(hosts, "replacements", host_replacements)]
    return sorted(rows, key=lambda row: (row["verdict"] == "unknown", row["margin_with_suspects"] or 0,
                                         -row["reason"].count(";"), -(row["power_on_hours"] or 0)))


def host_replacements(host: HostState) -> Iterator[Fields]:
    yield from unseen_row(host, REPLACE_COLUMNS, "disks", "pools")
    for pool in host.items("pools"):
        margins = pool_margins(host, pool)
        guests = len(guests_on(host, str(pool.get("name")))) if any(vdev.suspects for vdev in margins) else 0
        for vdev in margins:
            for leaf, disk, reasons in vdev.suspects:
                known = disk or {}
                yield {"host": host.name, "disk": text(leaf, "disk") or text(leaf, "name"),
                       "verdict": "critical" if vdev.with_suspects < 0 else "warning", "reason": "; ".join(reasons),
                       **{key: known.get(key) for key in ("serial", "model", "size_bytes", "by_id", "bay",
                                                          "power_on_hours")},
                       "pool": vdev.pool, "vdev": vdev.vdev, "margin": vdev.margin,
                       "margin_with_suspects": vdev.with_suspects, "guests": guests}


# Blast radius: disk → vdev → pool → storage → guests → whom they serve.


def guests_on(host: HostState, pool: str) -> list[Fields]:
    return [guest for guest in host.items("guests") if not guest.get("template")
            and any(dataset.partition("/")[0] == pool for dataset in volumes_of(guest))]


CRITICAL_TAGS = frozenset(("critical", "prod", "production"))


def is_critical(host: HostState, guest: Fields) -> bool:
    """Whom a guest serves is not in the data; a tag that says so, or HA, is the nearest to it."""
    managed = {text(service, "id") for service in host.items("ha.services")}
    name = f"{'ct' if guest.get('type') == 'lxc' else 'vm'}:{guest.get('vmid')}"
    return not CRITICAL_TAGS.isdisjoint(tags_of(guest)) or name in managed


def blast_radius(host: HostState, object: str) -> Fields | None:
    """What depends on a pool, a disk or a storage: {pool, vdev, margin, guests, critical, sentence}; None for else."""
    kind, _, name = object.partition("/")
    if kind in ("pools", "disks"):
        pool_name, _, member = name.partition("/") if kind == "pools" else (None, "", name)
        place = place_of(host, member, pool=pool_name) if member else None
        return (describe_blast(host, place.pool, str(place.vdev.get("name"))) if place
                else describe_blast(host, pool_name or "", None))
    if kind == "storages":
        guests = [guest for guest in host.items("guests")
                  if any(volume.get("storage") == name for volume in dicts(guest.get("volumes")))]
        return {"pool": None, "vdev": None, "margin": None, **count_guests_hit(host, guests, name)}
    return None


class Place(NamedTuple):
    """Where a disk or a vdev is in a pool: the top-level vdev it is part of, and its own row there."""

    pool: str
    vdev: Fields
    member: Fields


def place_of(host: HostState, *names: Any, pool: str | None = None) -> Place | None:
    """The first member of a pool that goes by one of these names: of a disk, of a vdev, or a path."""
    wanted = {str(name) for name in names if name}
    for found in host.items("pools"):
        for vdev in dicts(found.get("vdevs")) if pool in (None, found.get("name")) else ():
            for member in walk_vdevs([vdev]):
                if wanted & {str(member.get(field)) for field in ("disk", "name", "path") if member.get(field)}:
                    return Place(str(found.get("name")), vdev, member)
    return None


def at_stake(host: Any, object: str | None) -> str | None:
    """The blast radius in a sentence, for an alert; None where nothing depends on what the alert is about."""
    try:
        found = blast_radius(host, object) if object and isinstance(host, HostState) else None
    except ODD:
        return None
    return found["sentence"] or None if found else None


def describe_blast(host: HostState, name: str, vdev: str | None) -> Fields | None:
    pool = first_of(host.items("pools"), name=name)
    if pool is None:
        return None
    margins = [margin for margin in pool_margins(host, pool) if vdev in (None, margin.vdev)]
    margin = min((margin.margin for margin in margins), default=None)
    return {"pool": name, "vdev": vdev, "margin": margin, **count_guests_hit(host, guests_on(host, name), name, margin)}


def count_guests_hit(host: HostState, guests: list[Fields], place: str,
                     margin: int | None = None) -> Fields:
    critical = sum(is_critical(host, guest) for guest in guests)
    parts = [] if margin is None else [may_fail(margin)]
    if guests:
        parts.append(f"{count_of(len(guests), 'guest')} on {place}"
                     + (f", {critical} of them critical" if critical else ""))
    return {"guests": [guest.get("vmid") for guest in guests], "critical": critical, "sentence": "; ".join(parts)}


def may_fail(margin: int) -> str:
    if margin < 0:
        return "data are lost"
    return "no more disk may fail" if margin == 0 else f"{count_of(margin, 'more disk')} may fail"


def grounds(host: HostState) -> dict[str, str]:
    """Each pool of a host as its guests see it: 'lives on tank (raidz2, 1 more disk may fail), sdf is suspect'."""
    told = {}
    for pool in host.items("pools"):
        margins, name = pool_margins(host, pool), str(pool.get("name"))
        suspects = [str(leaf.get("disk") or leaf.get("name")) for vdev in margins for leaf, _, _ in vdev.suspects]
        left = [may_fail(min(vdev.margin for vdev in margins))] if margins else []
        told[name] = f"lives on {name} ({', '.join(filter(None, [text(pool, 'layout'), *left]))})" \
            + (f", {', '.join(suspects)} {'is' if len(suspects) == 1 else 'are'} suspect" if suspects else "")
    return told


def lives_on(guest: Fields, told: dict[str, str]) -> list[str]:
    """For a guest: each pool it lives on, in a sentence; `told` as grounds() gives it."""
    return [told.get(name) or f"lives on {name}, of which nothing is known"
            for name in dict.fromkeys(dataset.partition("/")[0] for dataset in volumes_of(guest))]


# Silent failures: what would not be heard of when it is needed.


GRAVE_SPOTS = ("zed", "fencing", "security-source")
TOLD_ELSEWHERE = ("mail-queue", "clock-source")  # by rules of their own: here they are listed only
CLOCKS = ("chrony.service", "systemd-timesyncd.service", "ntpsec.service")


def is_off(host: HostState, name: str) -> bool:
    """Whether a unit is installed and does not run."""
    return any(text(unit, "unit") == name and text(unit, "load") == "loaded"
               and text(unit, "active") in ("inactive", "failed") for unit in host.items("services"))


def safeguard(host: HostState, name: str) -> Any:
    told = host.body("safeguards")
    return told.get(name) if isinstance(told, dict) else None


def says_no(host: HostState, name: str) -> bool:
    return safeguard(host, name) is False


def has_zfs(host: HostState) -> bool:
    return bool(host.items("pools"))


def lacks_subscription(host: HostState) -> bool:
    status = text(host.body("subscription"), "status")
    return safeguard(host, "enterprise_source") is True and status is not None \
        and status.lower() not in ("active", "new")


def lacks_trim(host: HostState) -> bool:
    """Whether a pool with an SSD has autotrim off, and no timer trims it."""
    off = {text(pool, "name") for pool in host.items("pool_settings") if pool.get("autotrim") is False}
    return says_no(host, "trim_scheduled") and any(
        text(disk, "pool") in off and disk.get("kind") in ("ssd", "nvme") for disk in host.items("disks"))


def lacks_clock(host: HostState) -> bool:
    states = [text(unit, "active") for unit in host.items("services") if unit.get("unit") in CLOCKS]
    return bool(states) and "active" not in states


# What it is, whether it holds (or what to add to why), why it is silent, what to do
BLIND_SPOTS: tuple[tuple[str, Callable[[HostState], Any], str, str], ...] = (
    ("zed", lambda host: has_zfs(host) and is_off(host, "zfs-zed.service"), "zfs-zed does not run: ZFS's own mails and "
     "automatic spares do not work", "systemctl enable --now zfs-zed"),
    ("zed-mail", lambda host: has_zfs(host) and says_no(host, "zed_mail"), "zed has no mail address (ZED_EMAIL_ADDR)",
     "set ZED_EMAIL_ADDR in /etc/zfs/zed.d/zed.rc; systemctl restart zfs-zed"),
    ("smartd", lambda host: host.body("disks") != [] and is_off(host, "smartmontools.service"),
     "smartd does not run: no self-tests, no mails",
     "systemctl enable --now smartmontools"),
    ("mail-queue", lambda host: f"{waiting:.0f}" if (waiting := number(host.body("mail_queue"), "deferred")) else None,
     "mails of this host could not be delivered", "mailq"),
    ("scrub-timer", lambda host: has_zfs(host) and says_no(host, "scrub_scheduled"), "no scrub is scheduled",
     "apt-get install --reinstall zfsutils-linux, or systemctl enable --now zfs-scrub-monthly@POOL.timer"),
    ("trim-timer", lacks_trim, "a pool on SSDs is never trimmed: no timer, and autotrim is off",
     "zpool set autotrim=on POOL, or systemctl enable --now zfs-trim-monthly@POOL.timer"),
    ("root-mail", lambda host: says_no(host, "root_mail"), "root@pam has no mail address: Proxmox's mails go nowhere",
     "pveum user modify root@pam --email you@example.com"),
    ("notification-target", lambda host: ", ".join(map(str, names)) if isinstance(
        names := safeguard(host, "matchers_without_target"), list) else None,
     "a notification matcher has no target", "Datacenter → Notifications"),
    ("security-source", lambda host: says_no(host, "security_source"), "no source of security updates is configured",
     "add the Debian security suite to /etc/apt/sources.list.d/debian.sources"),
    ("enterprise-source", lacks_subscription, "the enterprise repository is on without a subscription: apt-get update "
     "fails, no updates are seen", "disable pve-enterprise or enter a subscription; enable pve-no-subscription"),
    ("fencing", lambda host: host.items("ha.services") and is_off(host, "watchdog-mux.service"),
     "HA guests, but watchdog-mux does not run: this node cannot fence itself", "systemctl start watchdog-mux"),
    ("clock-source", lacks_clock, "no daemon sets the clock", "systemctl enable --now chrony"),
)


def silent_failures(host: HostState, vmids: Set[Any] | None = None) -> Iterator[tuple[str, str, str]]:
    """(what, why it is silent, what to do) of one host; nothing for what the agent could not look at. `vmids` are the
    guests of its cluster, where all its nodes are known."""
    for what, holds, why, todo in BLIND_SPOTS:
        if found := holds(host):
            yield what, f"{why}: {found}" if isinstance(found, str) else why, todo
    yield from empty_jobs(host, vmids)


def empty_jobs(host: HostState, vmids: Set[Any] | None) -> Iterator[tuple[str, str, str]]:
    """Enabled backup jobs that name guests of which none exists on any node of the cluster."""
    if host.body("cluster") is None:
        vmids = {guest.get("vmid") for guest in host.items("guests")}
    for job in host.items("backups.jobs"):
        chosen = job.get("guests")
        if vmids and job.get("enabled") and isinstance(chosen, list) and not text(job, "pool") \
                and vmids.isdisjoint(map(to_vmid, chosen)):
            yield f"backup-job-{job.get('id')}", f"backup job {job.get('id')} covers no guest that exists", \
                "Datacenter → Backup: choose guests, or remove the job"


def vmids_of_cluster(fleet: Fleet, host: HostState) -> set[Any] | None:
    """The guests of all nodes of a host's cluster; None where not all of them report here."""
    members, hosts = host.items("cluster.members"), fleet.cluster_of(host)
    if len(hosts) < max(2, len(members)) or any(is_unseen(mate, "guests") for mate in hosts):
        return None
    return {guest.get("vmid") for mate in hosts for guest in mate.items("guests")}


def blindspot_rows(fleet: Fleet, host: HostState) -> Iterator[Fields]:
    for what, why, todo in silent_failures(host, vmids_of_cluster(fleet, host)):
        yield {"host": host.name, "what": what, "verdict": "warning" if what in GRAVE_SPOTS else "info", "reason": why,
               "todo": todo}
    yield from unseen_row(host, BLINDSPOT_COLUMNS, "safeguards", "services")


def to_vmid(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdigit() else value if isinstance(value, int) else None


# Drift: the odd ones out.


DRIFT_FACTS = {  # field of a section; of a list each value once
    "PVE": "node.pve_version", "kernel": "node.kernel", "ZFS module": "versions.zfs_module",
    "ZFS userland": "versions.zfs_userland", "QEMU": "versions.qemu", "microcode": "versions.microcode",
    "ARC limit": "node.arc_max_bytes", "sector size": "pool_settings.ashift", "atime": "pool_settings.atime",
    "compression": "pool_settings.compression", "sync": "pool_settings.sync", "agent": "agent.version",
    "storage.cfg": "versions.storage_cfg_digest", "features off": "pools.features_disabled",
}


def read_fact(field: str, host: HostState) -> str | None:
    section, _, name = field.partition(".")
    body = host.agent if section == "agent" else host.body(section)
    if name == "arc_max_bytes":
        share = ratio(number(body, name), number(body, "memory_total_bytes"))
        return None if share is None else f"{share:.0%} of memory"
    values = [item.get(name) for item in (dicts(body) if isinstance(body, list) else [body]) if isinstance(item, dict)]
    told = {{True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value) for value in values
            if value is not None}
    return ", ".join(sorted(told)) or None


def apart_from_itself(host: HostState) -> Iterator[Fields]:
    """ZFS's module and its tools are of two releases: it was upgraded and not restarted."""
    module, tools = (text(host.body("versions"), f"zfs_{part}") for part in ("module", "userland"))
    if module and tools and release_of(module) != release_of(tools):
        yield {"fact": "ZFS module and tools", "usual": tools, "share_ratio": None, "host": host.name, "value": module}


def release_of(version: str) -> str:
    """2.2.8 of 2.2.8-pve1, zfs-2.2.8-1 and 2.2.8-0+deb12u1."""
    found = re.search(r"[0-9]+\.[0-9.]*[0-9]", version)
    return found[0] if found else version


def drift_rows(hosts: Sequence[HostState], most: int = 200) -> list[Fields]:
    """Per fact that at least two thirds of the hosts share: who differs. Rows of DRIFT_COLUMNS."""
    rows = [row for _, row in of_each(hosts, "drift", apart_from_itself)]
    for fact, field in DRIFT_FACTS.items():
        told = of_each(hosts, fact, lambda host, field=field: [read_fact(field, host)])  # type: ignore[misc]
        values = {host.name: value for host, value in told if value is not None}
        counted = Counter(values.values()).most_common(1)
        if len(values) < 3 or counted[0][1] * 3 < len(values) * 2:
            continue  # no usual value: a fleet that is being upgraded, or too few to say
        usual, count = counted[0]
        rows += [{"fact": fact, "usual": usual, "share_ratio": count / len(values), "host": name, "value": value}
                 for name, value in values.items() if value != usual]
    return rows[:most]


DRIFT_COLUMNS = ("fact", "host", "value", "usual", "share_ratio")
COHORT_COLUMNS = ("model", "firmware", "disks", "suspect", "wear_per_year_ratio", "hosts")
TRAP_COLUMNS = ("host", "object", "trap", "bytes", "reason")
BLINDSPOT_COLUMNS = ("host", "what", "verdict", "reason", "todo")


def cohort_rows(hosts: Iterable[HostState]) -> list[Fields]:
    """Disks of one model and firmware: how many, how worn per year of power-on, how many are suspect, and where."""
    cohorts: dict[tuple[str, str], list[tuple[HostState, Fields]]] = {}
    for host, disk in of_each(hosts, "disks", lambda state: state.items("disks")):
        if model := text(disk, "model"):
            cohorts.setdefault((model, text(disk, "firmware") or ""), []).append((host, disk))
    return sorted((describe_cohort(key, members) for key, members in cohorts.items()),
                  key=lambda row: (-row["suspect"], -(row["wear_per_year_ratio"] or 0)))


def describe_cohort(key: tuple[str, str], members: list[tuple[HostState, Fields]]) -> Fields:
    yearly = sorted(wear * 8766 / hours for _, disk in members
                    if (wear := number(disk, "wear_ratio")) is not None and (hours := number(disk, "power_on_hours")))
    suspect = [disk for _, disk in members if suspicions(disk, {})]
    return {"model": key[0], "firmware": key[1], "disks": len(members), "suspect": len(suspect),
            "wear_per_year_ratio": yearly[len(yearly) // 2] if yearly else None,
            "hosts": sorted({host.name for host, _ in members})[:50]}


# Space traps.


def padding_ratio(block: int, ashift: int, width: int, parity: int) -> float:
    """Share of a zvol's used space that is raidz padding. A block takes its data, its parity, and is rounded up to a
    multiple of parity + 1 sectors (vdev_raidz_asize in OpenZFS); `used` is told as if blocks had 128 KiB."""
    def sectors(size: int) -> int:
        data = -(-size // (1 << ashift))
        total = data + parity * -(-data // (width - parity))
        return -(-total // (parity + 1)) * (parity + 1)

    told = sectors(block) * ((128 << 10) / (1 << ashift) / sectors(128 << 10)) * (1 << ashift)
    return max(0.0, 1 - block / told)


def space_traps(host: HostState) -> Iterator[Fields]:
    """{host, object, trap, bytes, reason}: what takes space that nobody expects it to take."""
    settings = {pool.get("name"): pool for pool in host.items("pool_settings")}
    datasets = {dataset.get("name"): dataset for dataset in host.items("datasets")}
    for pool in host.items("pools"):
        yield from raidz_padding(host, pool, settings.get(pool.get("name"), {}))
        yield from special_full(host, pool)
    for dataset in datasets.values():
        used, held = number(dataset, "refreservation_bytes"), number(dataset, "used_by_dataset_bytes")
        if used and held is not None and used > held + GIB and text(dataset, "type") == "volume":
            yield trap(host, dataset, "refreservation", used - held, "thick volume: reserved and not written")
        origin = text(dataset, "origin") or ""
        if origin and not origin.endswith("@__base__"):  # a linked clone of a template is meant so (PVE::ZFSPoolPlugin)
            most = number(datasets.get(origin.partition("@")[0]), "used_by_snapshots_bytes")
            yield trap(host, dataset, "clone", most, f"holds {origin}, which cannot be destroyed"
                       + ("" if most is None else "; told is what all snapshots there hold, at most that is its part"))
    for guest in host.items("guests"):
        for volume in dicts(guest.get("unused")):
            name = text(volume, "dataset") or f"{text(volume, 'storage')}:{text(volume, 'name')}"
            yield trap(host, {"name": name}, "unused", number(datasets.get(name), "used_bytes"),
                       f"{text(volume, 'name')} of guest {guest.get('vmid')}: taken from it, and still there")
    yield from volumes_without_guest(host)


GIB = 1 << 30


def trap(host: HostState, dataset: Fields, kind: str, bytes: float | None, reason: str) -> Fields:
    return {"host": host.name, "object": f"datasets/{dataset.get('name')}", "trap": kind, "bytes": bytes,
            "reason": reason}


def raidz_padding(host: HostState, pool: Fields, settings: Fields) -> Iterator[Fields]:
    ashift, name = number(settings, "ashift"), text(pool, "name") or ""
    blocks = {volume.get("name"): number(volume, "block_bytes") for volume in dicts(settings.get("volumes"))}
    raidz = [(len(dicts(vdev.get("children"))), tolerance(vdev)) for vdev in dicts(pool.get("vdevs"))
             if (text(vdev, "type") or "").startswith("raidz") and text(vdev, "class") in (None, "normal")]
    if ashift is None or not raidz:
        return
    width, parity = max(raidz)
    for dataset in host.items("datasets"):
        block, used = blocks.get(dataset.get("name")), number(dataset, "used_by_dataset_bytes")
        if (text(dataset, "name") or "").partition("/")[0] != name or not block or not used or width <= parity:
            continue
        share = padding_ratio(int(block), int(ashift), width, parity)
        if share > 0.1 and used * share > GIB:
            yield trap(host, dataset, "padding", used * share, f"{share:.0%} of it is padding: volblocksize "
                       f"{int(block) >> 10}K on raidz{parity} of {width} disks with {1 << int(ashift)}-byte sectors")


def sum_up_traps(rows: Sequence[Fields]) -> str:
    known = [row["bytes"] for row in rows if row["bytes"] and row["trap"] not in ("special", "clone")]
    unknown = sum(row["bytes"] is None for row in rows)
    return f"They take {format_bytes(sum(known))}" + (f"; of {unknown} it is not known" if unknown else "") + "."


def special_full(host: HostState, pool: Fields) -> Iterator[Fields]:
    for vdev in dicts(pool.get("vdevs")):
        share = ratio(number(vdev, "allocated_bytes"), number(vdev, "size_bytes"))
        if text(vdev, "class") == "special" and share is not None and share > SPECIAL_FULL:
            yield {"host": host.name, "object": f"pools/{pool.get('name')}", "trap": "special",
                   "bytes": number(vdev, "allocated_bytes"), "reason":
                   f"special vdev {vdev.get('name')} is {share:.0%} full: small blocks go to the slow disks"}


SPECIAL_FULL = 0.75  # zfs_special_class_metadata_reserve_pct is 25: beyond it only metadata go there (zfs(4))


def volumes_without_guest(host: HostState) -> Iterator[Fields]:
    guests = {guest.get("vmid") for guest in host.items("guests")}
    if host.body("guests") is None or host.body("cluster") is not None:
        return  # of a cluster the volume may belong to a guest of another node (replication)
    for dataset in host.items("datasets"):
        if isinstance(dataset.get("vmid"), int) and dataset["vmid"] not in guests:
            yield trap(host, dataset, "orphan", number(dataset, "used_bytes"), f"there is no guest {dataset['vmid']}")


# Snapshots: their rhythm, who has none, who never lets go


def snapshot_class(snapshots: Fields) -> str | None:
    """The class of snapshots, None where no interval can be held to: made by hand, or by who knows what."""
    name = text(snapshots, "class") or "other"
    return None if name in ("pve", "other") or name.startswith("__replicate") else name


NEIGHBOURS = 4  # so many datasets of one parent, and three of four that have a class: the others lack it


def missing_snapshots(host: HostState) -> dict[str, list[str]]:
    """By dataset, the classes of at most a day's rhythm that its neighbours (guests' disks, or datasets of the same
    parent) have and it has not. Nothing where a pool could not be asked."""
    entries = host.items("snapshots")
    dark = {(text(entry, "dataset") or "").partition("/")[0] for entry in entries if entry.get("unknown_reason")}
    families: dict[tuple[str, bool], list[str]] = {}
    for dataset in host.items("datasets"):
        name = text(dataset, "name") or ""
        parent, _, last = name.rpartition("/")
        if parent and name.partition("/")[0] not in dark and not UNSNAPPED.search(last):
            families.setdefault((parent, GUEST_VOLUME.fullmatch(last) is not None), []).append(name)
    having: dict[str, set[str]] = {}
    for entry in entries:
        rhythm, kind = number(entry, "interval_seconds"), snapshot_class(entry)
        if kind and rhythm and rhythm <= 1.5 * DAY and (number(entry, "count") or 0) >= 5:
            having.setdefault(kind, set()).add(str(entry.get("dataset")))
    found: dict[str, list[str]] = {}
    for members in families.values():
        for kind, owners in sorted(having.items()):
            without = [name for name in members if name not in owners]
            if len(members) >= NEIGHBOURS and 0 < len(without) <= len(members) // 4:
                for name in without:
                    found.setdefault(name, []).append(kind)
    some = {(str(entry.get("dataset")), snapshot_class(entry)) for entry in entries}  # new, or fewer than five
    kept = {name: [kind for kind in kinds if (name, kind) not in some] for name, kinds in found.items()}
    return {name: kinds for name, kinds in kept.items() if kinds}


UNSNAPPED = re.compile(r"-cloudinit$|^base|-state-|swap")  # what nobody wants to go back to, and templates


SERIES_COLUMNS = ("host", "dataset", "class", "verdict", "reason", "count", "interval_seconds", "newest_at",
                  "oldest_at", "held_bytes", "held_most_bytes")
UNPRUNED = 200  # snapshots of a series, of which none in between is gone
UNPRUNED_AGE = 60 * DAY  # and the first of which is so old: no usual plan keeps hours or days for longer


def series_rows(host: HostState, now: float) -> Iterator[Fields]:
    """Each series of snapshots (dataset and class) with the rhythm that it has shown, and each that is missing. What a
    class holds is known exactly where a dataset has no other; else at least what its snapshots hold each for itself,
    and at most what all snapshots of the dataset hold."""
    held = {dataset.get("name"): number(dataset, "used_by_snapshots_bytes") for dataset in host.items("datasets")}
    entries = [entry for entry in host.items("snapshots") if entry.get("count")]
    series = Counter(text(entry, "dataset") for entry in entries)
    for entry in entries:
        name = text(entry, "dataset") or ""
        verdict, reason = describe_series(host, entry)
        yield {**{column: entry.get(column) for column in SERIES_COLUMNS}, "host": host.name, "verdict": verdict,
               "reason": reason, "held_most_bytes": held.get(name),
               "held_bytes": held.get(name) if series[name] == 1 else number(entry, "used_bytes")}
    for name, kinds in missing_snapshots(host).items():
        for kind in kinds:
            yield {**dict.fromkeys(SERIES_COLUMNS), "host": host.name, "dataset": name, "class": kind, "count": 0,
                   "verdict": "warning", "reason": "missing: its neighbours have it"}
    yield from unseen_row(host, SERIES_COLUMNS, "snapshots")


def describe_series(host: HostState, entry: Fields) -> tuple[str, str | None]:
    """Late, as the rule has it; never pruned; or as regular as ever."""
    kind, rhythm = snapshot_class(entry), number(entry, "interval_seconds")
    late = host.alerts.get(("snapshot-age", f"snapshots/{entry.get('dataset')}@{kind}"))
    if late is not None:
        return late.severity, late.message
    if number(entry, "newest_at") is None:
        return "unknown", "when they were made is not known"
    span = unpruned_span(entry)
    if span is not None:
        return "info", f"never pruned: {entry['count']} in {format_duration(span)}, none in between is gone"
    return "ok", f"one each {format_duration(rhythm)}" if rhythm else None


def unpruned_span(entry: Fields) -> float | None:
    """The time over which a series has lost none of its snapshots, if nobody seems to prune it."""
    count, rhythm = number(entry, "count") or 0, number(entry, "interval_seconds")
    newest, oldest = number(entry, "newest_at"), number(entry, "oldest_at")
    if not rhythm or newest is None or oldest is None or count < UNPRUNED or newest - oldest < UNPRUNED_AGE:
        return None
    return newest - oldest if 0.8 < (newest - oldest) / (rhythm * count) < 1.25 else None


def grown_snapshots(host: HostState) -> Iterator[tuple[GrownSpace, Filling, float]]:
    """Datasets of pools that fill up whose snapshots grew, with their share of what was free: from the forecasts."""
    for filling in (host.forecasts or {}).values():
        for growth in filling.grown or ():
            share = ratio(growth.bytes, growth.bytes + filling.space.free)
            if growth.kind == "snapshots" and share is not None:
                yield growth, filling, share


# Scrubs: how long they take, what they repair, and which disk holds them up.


SCRUB_LEAST = 10 * MINUTE  # what takes less says nothing of the disks
SLOW_WAIT, SLOW_TIMES = 0.001, 2  # seconds more than the others of its vdev, and so many times as long


class SlowMember(NamedTuple):
    """A disk that answers later than the others of its vdev: seconds, on average since the import."""

    disk: str
    wait: float
    usual: float


def slow_member(pool: Fields) -> SlowMember | None:
    """The slowest to read of those that are slower than the median of the others beside them."""
    found = []
    for vdev in dicts(pool.get("vdevs")):
        waits = [(wait, str(leaf.get("disk") or leaf.get("name"))) for leaf in walk_vdevs([vdev])
                 if (wait := number(leaf, "read_wait_seconds")) is not None]
        for wait, disk in waits:
            usual = statistics.median([other for other, name in waits if name != disk] or [wait])
            if wait > max(SLOW_TIMES * usual, usual + SLOW_WAIT):
                found.append(SlowMember(disk, wait, usual))
    return max(found, key=lambda member: member.wait, default=None)


def describe_slow_member(pool: Fields) -> str:
    """'; sdf answers after 48 ms, the others of its vdev after 9 ms', or the disk that had slow I/Os; else ''."""
    if slow := slow_member(pool):
        return f"; {slow.disk} answers after {slow.wait * 1000:.3g} ms, the others of its vdev after " \
               f"{slow.usual * 1000:.3g} ms"
    count, worst = max(((number(leaf, "slow_ios") or 0, str(leaf.get("disk") or leaf.get("name")))
                        for leaf in walk_vdevs(pool.get("vdevs"))), default=(0, ""))
    return f"; {worst} had slow I/Os" if count else ""


class Scrub(NamedTuple):
    """What is remembered of a scrub; `repaired` is None of those that ended before that was kept."""

    ended_at: float
    took: float
    size: float
    repaired: float | None = None


def known_scrubs(host: HostState, pool: str) -> list[Scrub]:
    """The last scrubs of a pool, oldest first."""
    return [Scrub(*kept[:4]) for kept in host.memory.get("scrub-slow", f"pools/{pool}", ())]


def usual_scrub(scrubs: Sequence[Scrub]) -> float | None:
    """Seconds that the last scrub would have taken, by the median per byte of at least three before it."""
    if len(scrubs) < 4:
        return None
    return statistics.median(scrub.took / scrub.size for scrub in scrubs[:-1]) * scrubs[-1].size


def repaired_before(scrubs: Sequence[Scrub], ended: float) -> str:
    """'; before it, oldest first: nothing, 4 KiB'; '' where that is not known."""
    known = [scrub.repaired for scrub in scrubs if scrub.ended_at < ended and scrub.repaired is not None][-3:]
    said = ", ".join(format_bytes(repaired) if repaired else "nothing" for repaired in known)
    return f"; before it, oldest first: {said}" if known else ""


SCRUB_COLUMNS = ("host", "pool", "verdict", "reason", "ended_at", "duration_seconds", "usual_seconds", "repaired_bytes",
                 "repaired_before", "errors", "scheduled", "slow_disk")


def scrub_rows(host: HostState) -> Iterator[Fields]:
    """Each pool's last scrub against those before it, and the disk that is slower than those beside it."""
    scheduled = (host.body("safeguards") or {}).get("scrub_scheduled")
    for pool in host.items("pools"):
        name, last = str(pool.get("name")), pool.get("last_scrub")
        scrubs, slow = known_scrubs(host, name), slow_member(pool)
        usual = usual_scrub(scrubs)
        alerts = [alert for rule in ("scrub-result", "scrub-age", "scrub-slow", "scrub-stuck")
                  if (alert := host.alerts.get((rule, f"pools/{name}"))) is not None and alert.state == "firing"]
        reason = "; ".join(alert.message for alert in alerts) or (
            "no scrub of it is known" if number(last, "ended_at") is None else
            f"how long it takes is not known yet: {len(scrubs)} of 4 were seen" if usual is None else "as usual")
        yield {"host": host.name, "pool": name, "reason": reason + ("" if alerts else describe_slow_member(pool)),
               "verdict": alerts[0].severity if alerts else "unknown" if number(last, "ended_at") is None else "ok",
               **{key: number(last, key) for key in ("ended_at", "duration_seconds", "repaired_bytes", "errors")},
               "usual_seconds": usual, "repaired_before": [scrub.repaired for scrub in scrubs[:-1]],
               "scheduled": scheduled, "slow_disk": slow and slow.disk}
    yield from unseen_row(host, SCRUB_COLUMNS, "pools")


# When it is full, and what grew: from values of the past that history gives.


class Forecast(NamedTuple):
    """When a space is full, as a range of days: `soonest` by the fastest growth that is likely, `latest` by the
    slowest. Neither: it does not grow. No `latest`: it grew in one of the last 7 and 30 days only, and may stop."""

    soonest: float | None
    latest: float | None
    bytes_per_day: float  # the median of the last 7 days; negative: it shrinks
    known_days: float  # of how much of the past that was made


FORECAST_SPANS = (7 * DAY, 30 * DAY)
FORECAST_PARTS = 56  # of each span: the medians of so many make 1,540 slopes
FORECAST_MOST = 3650 * DAY  # what lies beyond is not told
LIKELY = 1.645  # so many standard deviations to either side hold 90 % of a normal distribution


def fill_forecast(points: Sequence[tuple[float, float]], capacity: float, now: float) -> Forecast | None:
    """When a space of so many bytes is full, from (unix time, bytes used), oldest first; None: unknown, since less
    than 3 of the last 7 days is there to see. One import and one big deletion are no growth."""
    growths = [likely_growth([point for point in points if now - span < point[0] <= now], span)
               for span in FORECAST_SPANS]
    if growths[0] is None:
        return None
    known = [growth for growth in growths if growth]
    rising = [growth for growth in known if growth[0] > 0]
    left = capacity - points[-1][1]
    soonest, latest = None, None
    if left <= 0:
        soonest = latest = 0.0
    elif rising and left / max(most for _, _, most in rising) < FORECAST_MOST:
        soonest = left / max(most for _, _, most in rising) / DAY
        if rising == known and left / min(least for least, _, _ in rising) < FORECAST_MOST:
            latest = left / min(least for least, _, _ in rising) / DAY
    return Forecast(soonest, latest, growths[0][1] * DAY, (now - points[0][0]) / DAY)


def likely_growth(points: list[tuple[float, float]], span: float) -> tuple[float, float, float] | None:
    """Bytes per second at the least, in the middle and at the most that is likely; None if less than 3/7 of a span is
    known. The median of the slopes between any two points (Theil 1950) and its bounds (Sen 1968); but no more than
    three of four sevenths of the span grew by, whichever way it is cut: one import lies in one of them."""
    part = span / FORECAST_PARTS
    parts: dict[int, list[tuple[float, float]]] = {}
    for at, used in points:
        parts.setdefault(int(at // part), []).append((at, used))
    middles = [(statistics.median(at for at, _ in some), statistics.median(used for _, used in some))
               for some in parts.values()]
    count = len(middles)
    if count < FORECAST_PARTS // 4 or middles[-1][0] - middles[0][0] < span * 3 / 7 - part:
        return None
    slopes = sorted((used - before) / (at - then)
                    for nth, (then, before) in enumerate(middles) for at, used in middles[nth + 1 :])
    reach = LIKELY * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)  # in ranks: Kendall's deviation
    least = slopes[max(0, int((len(slopes) - reach) / 2))]
    most = slopes[min(len(slopes) - 1, math.ceil((len(slopes) + reach) / 2))]
    stride = FORECAST_PARTS // 7
    strides = sorted((used - before) / (at - then) for (then, before), (at, used) in zip(middles, middles[stride:]))
    bound = strides[len(strides) * 3 // 4]
    return min(least, bound), min(statistics.median(slopes), bound), min(most, bound)


def describe_forecast(forecast: Forecast | None) -> str:
    """"9–14 d", "9 d or later", "no growth", "full", "unknown"."""
    if forecast is None:
        return "unknown"
    if forecast.soonest is None:
        return "no growth"
    if not forecast.soonest:
        return "full"
    soonest = math.floor(forecast.soonest)
    if soonest >= 730:
        return f"over {soonest // 365} years"
    if forecast.latest is None:
        return f"{soonest} d or later"
    latest = math.ceil(forecast.latest)
    return f"{soonest}–{latest} d" if latest - soonest > soonest / 50 else f"{soonest} d"


class GrownSpace(NamedTuple):
    """What a dataset itself, without its children, or its snapshots grew by."""

    dataset: str
    kind: str  # "snapshots", "data", or "both": how much of it is snapshots is not known
    vmid: int | None  # the guest whose volume it is
    bytes: float


def what_grew(before: dict[str, Fields], after: dict[str, Fields]) -> list[GrownSpace] | None:
    """What made a pool grow, the most first, from {dataset: {"used_bytes": …, "used_by_snapshots_bytes": …}} of two
    times. A dataset that was not there before grew by all it has. None: nothing is known of one of the two times."""
    if not before or not after:
        return None
    now, then = own_space(after), own_space(before)
    growths = []
    for name, (own, snapshots) in now.items():
        own_before, snapshots_before = then.get(name, (0.0, 0.0))
        kinds = {"both": own - own_before}
        if snapshots is not None and snapshots_before is not None:
            kinds = {"snapshots": snapshots - snapshots_before, "data": own - snapshots - own_before + snapshots_before}
        volume = GUEST_VOLUME.fullmatch(name.rpartition("/")[2])
        growths += [GrownSpace(name, kind, int(volume[1]) if volume else None, grown)
                    for kind, grown in kinds.items() if grown > 0]
    return sorted(growths, key=lambda growth: -growth.bytes)


# Names of PVE's ZFS volumes: ZFSPoolPlugin.pm, parse_volname
GUEST_VOLUME = re.compile(r"(?:base|subvol|basevol|vm)-([0-9]+)-.+")


def pool_space(pool: Fields) -> tuple[float | None, float | None]:
    """Used and free bytes, as users mean them (RAIDZ parity not counted) where that is known."""
    used, free = number(pool, "usable_used_bytes"), number(pool, "usable_available_bytes")
    if used is None or free is None:
        used, free = number(pool, "allocated_bytes"), number(pool, "free_bytes")
    return used, free


class Space(NamedTuple):
    """What may become full."""

    object: str
    called: str
    series: str  # of what is used of it, in the history
    used: float
    free: float


def spaces_of(host: HostState) -> Iterator[Space]:
    """Pools, storages that lie on none (thin pools too), datasets with a quota, and the root file system."""
    for pool in host.items("pools"):
        name, (used, free) = pool.get("name"), pool_space(pool)
        field = "allocated" if None in (number(pool, f"usable_{key}_bytes") for key in ("used", "available")) \
            else "usable_used"
        if used is not None and free is not None:
            yield Space(f"pools/{name}", f"Pool {name}", f"pools/{name}.{field}_bytes", used, free)
    for storage in host.items("storages"):
        name, used, total = storage.get("storage"), number(storage, "used_bytes"), number(storage, "total_bytes")
        if used is not None and total and not text(storage, "dataset"):
            yield Space(f"storages/{name}", f"Storage {name}", f"storages/{name}.used_bytes", used, total - used)
    for dataset in host.items("datasets"):
        name = dataset.get("name")
        for field, limit in (("used_bytes", "quota_bytes"), ("referenced_bytes", "refquota_bytes")):
            used, most = number(dataset, field), number(dataset, limit)
            if used is not None and most:
                yield Space(f"datasets/{name}", f"Dataset {name}", f"datasets/{name}.{field}", used, most - used)
    used, free = (number(host.body("node"), f"root_{key}_bytes") for key in ("used", "available"))
    if used is not None and free is not None:
        yield Space("root", "The root file system", "node.root_used_bytes", used, free)


class Filling(NamedTuple):
    """How a space fills up, and of a pool that does: what made it grow, and what could be won."""

    space: Space
    forecast: Forecast | None
    as_of: float
    grown: list[GrownSpace] | None = None
    grown_days: float = 0.0
    wins: list[Fields] | None = None


def describe_filling(filling: Filling) -> str:
    """'Pool tank will be full in 9–14 d; vm-104-disk-0 grew by 168 GiB in 7 d (snapshots).'"""
    said = describe_forecast(filling.forecast)
    when = "is full" if said == "full" else f"will be full in {said}"
    return f"{filling.space.called} {when}{describe_growth(filling)}."


def describe_growth(filling: Filling) -> str:
    if not filling.grown:
        return ""
    most = filling.grown[0]
    return f"; {most.dataset} grew by {format_bytes(most.bytes)} in {filling.grown_days:.0f} d" \
        + ("" if most.kind == "both" else f" ({most.kind})")


GROWN_MOST = 10  # of a pool's datasets are told
OLD_SNAPSHOT = 7 * DAY  # made by hand and older than this: probably forgotten


def winnings(host: HostState, pool: str, now: float) -> list[Fields]:
    """{what, object, bytes, reason}: what could be won of a pool, the most first. Where other snapshots of a dataset
    are kept too, those made by hand hold less than what is told."""
    datasets = {str(dataset.get("name")): dataset for dataset in host.items("datasets")}
    kinds = Counter(text(entry, "dataset") for entry in host.items("snapshots"))
    found = [{"what": found["trap"], **{key: found[key] for key in ("object", "bytes", "reason")}}
             for found in space_traps(host) if found["trap"] in ("orphan", "refreservation", "unused")]
    for entry in host.items("snapshots"):
        name, oldest = text(entry, "dataset") or "", number(entry, "oldest_at")
        held = number(datasets.get(name), "used_by_snapshots_bytes")
        if text(entry, "class") == "pve" and held and oldest is not None and now - oldest > OLD_SNAPSHOT:
            most = "at most that: " if kinds[name] > 1 else ""
            found.append({"what": "snapshots", "object": f"datasets/{name}", "bytes": held,
                          "reason": f"{most}made by hand, the oldest {format_duration(now - oldest)} ago"})
    own = [win for win in found if win["bytes"] and str(win["object"]).split("/")[1] == pool]
    return sorted(own, key=lambda win: -win["bytes"])[:GROWN_MOST]


def worst_days_until_full(host: HostState) -> float | None:
    """Of all that fills up what may be full first: days, at the soonest."""
    return min((days for filling in (host.forecasts or {}).values()
                if filling.forecast and (days := filling.forecast.soonest) is not None), default=None)


FORECAST_COLUMNS = ("host", "object", "verdict", "reason", "days_until_full", "days_at_most", "used_bytes",
                    "available_bytes", "daily_growth_bytes", "known_days", "grew", "wins", "as_of")


def forecast_rows(host: HostState) -> Iterator[Fields]:
    for object, filling in (host.forecasts or {}).items():
        forecast, space = filling.forecast, filling.space
        alerts = [alert.severity for rule in ("pool-forecast", "space-forecast")
                  if (alert := host.alerts.get((rule, object))) is not None and alert.state == "firing"]
        yield {"host": host.name, "object": object, "used_bytes": space.used, "available_bytes": space.free,
               "verdict": alerts[0] if alerts else "unknown" if forecast is None else "ok",
               "reason": describe_forecast(forecast) + describe_growth(filling),
               "days_until_full": forecast and forecast.soonest, "days_at_most": forecast and forecast.latest,
               "daily_growth_bytes": forecast and forecast.bytes_per_day,
               "known_days": forecast and round(forecast.known_days, 1),
               "grew": filling.grown and [growth._asdict() for growth in filling.grown], "wins": filling.wins,
               "as_of": filling.as_of}


def own_space(datasets: dict[str, Fields]) -> dict[str, tuple[float, float | None]]:
    """Bytes that each dataset uses without its children, and those of its snapshots in it, if they are known."""
    used = {name: bytes for name, space in datasets.items() if (bytes := number(space, "used_bytes")) is not None}
    own = dict(used)
    for name, bytes in used.items():
        parent = name.rpartition("/")[0]
        if parent in own:
            own[parent] -= bytes
    return {name: (bytes, number(datasets[name], "used_by_snapshots_bytes")) for name, bytes in own.items()}


# --- ingest: a report counts whole or not at all, and once ---


# What changed: facts of a report that belong on the time line.


Change = tuple[float, str, str, str]  # at, kind, object, message


def chronicle(host: HostState, report: Fields, now: float, *, newest: bool = True) -> Iterator[Change]:
    """What a report tells beyond the one before it; called before it is applied."""
    at = min(number(report, "time") or now, now)
    yield from ended_tasks(report.get("tasks"), now)
    if not newest:
        return  # it is held against a state that is newer
    yield from node_changes(host.body("node"), report.get("node"), at)
    if "versions" in report:
        yield from version_changes(host.body("versions"), report["versions"], at)
    if "pools" in report:
        yield from scrub_ends(host.body("pools"), report["pools"], now)
    if "guests" in report and host.has("guests"):
        yield from guest_changes(host.guest_words, report["guests"], at)
        yield from setting_changes(host, report["guests"], now)


def ended_tasks(tasks: Any, now: float) -> Iterator[Change]:
    for task in dicts(tasks):
        ended = number(task, "ended_at")
        if ended is not None:
            yield min(ended, now), "task", f"guests/{task['vmid']}" if task.get("vmid") else "", describe_task(task)


def describe_task(task: Fields) -> str:
    result = text(task, "status") or text(task, "result") or "unknown"
    of = f" of {task['vmid']}" if task.get("vmid") else ""
    return f"Task {text(task, 'type') or '?'}{of} by {text(task, 'user') or '?'}: {result}"[:500]


def node_changes(old: Any, new: Any, at: float) -> Iterator[Change]:
    before, after = text(old, "boot_id"), text(new, "boot_id")
    if before and after and before != after:
        uptime = number(new, "uptime_seconds")
        yield at - (uptime or 0), "reboot", "", f"Host started, kernel {text(new, 'kernel') or '?'}"


def version_changes(old: Any, new: Any, at: float) -> Iterator[Change]:
    for name in ("pve", "zfs_module", "zfs_userland", "qemu"):
        before, after = text(old, name), text(new, name)
        if before and after and before != after:
            yield at, "update", "", f"{name.replace('_', ' ')} {before} → {after}"
    before, after = text(old, "storage_cfg_digest"), text(new, "storage_cfg_digest")
    if before and after and before != after:
        yield at, "config", "", "storage.cfg changed"


def scrub_ends(old: Any, new: Any, now: float) -> Iterator[Change]:
    known = {pool.get("guid"): pool for pool in dicts(old)}
    for pool in dicts(new):
        scrub = pool.get("last_scrub")
        ended = number(scrub, "ended_at")
        before = known.get(pool.get("guid"))
        if ended and before is not None and number(before.get("last_scrub"), "ended_at") != ended:
            took, repaired = number(scrub, "duration_seconds"), number(scrub, "repaired_bytes")
            yield min(ended, now), "scrub", f"pools/{pool.get('name')}", \
                f"Scrub of {pool.get('name')} ended" + (f" after {format_duration(took)}" if took else "") \
                + (f", {int(repaired)} bytes repaired" if repaired else "")


def guest_changes(before: dict[int, str | None], guests: Any, at: float) -> Iterator[Change]:
    after = guest_words(guests)
    if after == before:
        return
    names = {guest["vmid"]: text(guest, "name") or "" for guest in dicts(guests)}
    for vmid, word in after.items():
        was, name = before.get(vmid), names[vmid]
        if vmid not in before:
            yield at, "guest", f"guests/{vmid}", f"Guest {vmid} {name} appeared"
        elif was and word and was != word and "unknown" not in (was, word):
            yield at, "guest", f"guests/{vmid}", f"Guest {vmid} {name}: {was} → {word}"
    for vmid in before.keys() - after.keys():
        yield at, "guest", f"guests/{vmid}", f"Guest {vmid} is gone from this host"


def setting_changes(host: HostState, guests: Any, now: float) -> Iterator[Change]:
    """Guests whose configuration changed since the report before, with the names of the settings."""
    changed = settings_changed(guests)
    for guest in dicts(guests) if changed else ():
        at, vmid = changed.get(guest["vmid"]), guest["vmid"]
        if at is not None and vmid in host.guest_words and at > host.settings_changed.get(vmid, 0):
            names = guest.get("config_changed")
            yield min(at, now), "config", f"guests/{vmid}", \
                f"Configuration of guest {vmid} {text(guest, 'name') or ''} changed: " \
                + ", ".join(map(str, names if isinstance(names, list) else ()))


class Run(NamedTuple):
    """A run of an agent as the database has it: row id and the sequence numbers that have come."""

    id: int
    ranges: list[list[int]]


class Answer:
    """A finished answer."""

    def __init__(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None,
                 stream: Iterator[bytes] | IO[bytes] | None = None):
        self.status, self.body, self.headers = status, body, headers or {}
        self.stream = stream  # instead of a body, when it would be too long to hold


def error_answer(error: Exception) -> Answer:
    """What the asker is told of an error. A fault of ours: a sender keeps its report, the log has the reason."""
    if isinstance(error, Problem):
        return problem_answer(error)
    log("".join(traceback.format_exception(error)).replace("\n", " | "))
    return Answer(500, b'{"status":500,"title":"Internal error","detail":"see the log","code":"internal"}',
                  {"Content-Type": "application/problem+json"})


def problem_answer(problem: Problem) -> Answer:
    headers = {"Content-Type": "application/problem+json", "Cache-Control": "no-store", **problem.headers}
    return Answer(problem.status, problem.body(), headers)


def media_type(text: str) -> str:
    return text.partition(";")[0].strip().lower()


class Room:
    """What requests with reports may take of the server while they are under way."""

    def __init__(self) -> None:
        self.reports = RateLimiter(REPORTS_BURST, REPORTS_PER_SECOND)
        self.runs = RateLimiter(RUNS_BURST, RUNS_PER_SECOND)
        self.reading = threading.Semaphore(READ_AT_ONCE)
        self._large, self._lock = threading.Lock(), threading.Lock()
        self._under_way: Counter[int] = Counter()

    @contextmanager
    def of_host(self, host_id: int) -> Iterator[None]:
        """So many requests of one host at once: else one would keep all threads from the others."""
        with self._lock:
            if self._under_way[host_id] >= UNDER_WAY:
                raise Problem("rate_limited", f"{UNDER_WAY} requests of this host are under way",
                              headers={"Retry-After": "2"})
            self._under_way[host_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way[host_id] -= 1

    @contextmanager
    def for_large(self) -> Iterator[None]:
        """One large request at a time: it takes some 100 MB while it is read."""
        if not self._large.acquire(timeout=LARGE_SECONDS):
            raise Problem("busy", "other large requests are being read", headers={"Retry-After": "5"})
        try:
            yield
        finally:
            self._large.release()

    @staticmethod
    def take(limiter: RateLimiter, host: HostState, amount: int, now: float, *, ask: int = 0) -> None:
        """Count so much; less than 0 is given back. `Problem('rate_limited')` until so much, or `ask`, is there."""
        wait = limiter.take(host.id, amount, now)
        if wait:
            headers = {"Retry-After": str(math.ceil(wait + max(0, ask - amount) / limiter.per_second))}
            raise Problem("rate_limited", "too many reports of this host", headers=headers)


class Request(NamedTuple):
    """What one request brought, checked; not on the disk yet."""

    reports: list[Fields]
    body: bytes | None  # as it can be kept for its one report
    weight: int  # see weigh()


def ingest(monitor: Monitor, host_name: str, header: Callable[[str], str], body: bytes) -> Answer:
    """Take the reports of one request; returns when what is new is on the disk. `Problem` for everything else."""
    now, room = monitor.clock(), monitor.room
    encoding = header("content-encoding").lower()
    if media_type(header("content-type")) != "application/json":
        raise Problem("unsupported_media_type", "send application/json")
    if encoding not in ("", "identity", "gzip"):
        raise Problem("unsupported_media_type", "Content-Encoding: gzip or none")
    host, nonce = find_sender(monitor, host_name, header, body, now)
    with room.of_host(host.id):
        reserved = max(20, min(BATCH_LIMIT, len(body) >> 6))  # what is refused has cost so much: it may unpack to much
        room.take(room.reports, host, reserved, now, ask=BATCH_LIMIT)
        try:
            with room.reading:
                request = read_request_body(body, encoding, host.name, LARGE)
            return keep(monitor, host, nonce, request, now, reserved)
        except Problem as problem:
            if problem.code != "too_large":
                raise
        with room.for_large():
            request = read_request_body(body, encoding, host.name, UNPACKED_LIMIT)
            return keep(monitor, host, nonce, request, now, reserved)


def find_sender(monitor: Monitor, host_name: str, header: Callable[[str], str], body: bytes,
                now: float) -> tuple[HostState, bytes]:
    """The host that has signed this, and the nonce of its key. `Problem`: unknown_host, invalid_token, clock_skew."""
    for looked_up in (False, True):  # only when it does not fit: another process may have changed the hosts
        if looked_up:
            monitor.fleet.refresh(monitor.store.reader())
        host = monitor.fleet.names.get(host_name.lower())
        try:
            if host is None:
                raise Problem("unknown_host", "no host of this name is registered")
            nonce = host.nonce
            check_signature(host_key(monitor.secret, nonce), header, body, now)
            return host, nonce
        except Problem:
            if looked_up:
                raise
    raise AssertionError


def read_request_body(body: bytes, encoding: str, host_name: str, most: int) -> Request:
    """The reports in a body of at most `most` bytes unpacked."""
    text = unpack(body, encoding, most)
    weight = weigh(text)
    if weight > min(16 * most, PARSED_LIMIT):
        raise Problem("too_large", "too many values in one request")
    parsed = parse_json(text)
    as_it_came = encoding == "gzip" and isinstance(parsed, dict) and not has_surrogates(text)
    return Request(check_reports(parsed, host_name), body if as_it_came else None, weight)


def keep(monitor: Monitor, host: HostState, nonce: bytes, request: Request, now: float, reserved: int) -> Answer:
    """Write what was checked, for which so much of the host's rate is `reserved`; gives back what the sender is told
    once it is on the disk."""
    room, count = monitor.room, len(request.reports)
    room.take(room.reports, host, max(count, request.weight >> 16) - reserved, now)
    strange = [run for run in {report["run_id"] for report in request.reports} if (host.id, run) not in monitor.runs]
    if strange:
        room.take(room.runs, host, len(strange), now)

    def work(db: Database) -> int:
        monitor.fleet.refresh(db)
        if host.nonce != nonce:
            raise Problem("invalid_token", "the host has just been given another token")
        return insert_reports(monitor, host.id, request.reports, request.body, now, db, request.weight)

    accepted = monitor.store.write(work, urgent=False)
    return Answer(200, json.dumps({"status": "ok", "accepted": accepted, "duplicates": count - accepted,
                                   "server_time": now}).encode())


# What the sections below do with each report as it is taken, and once with all that is new of a request: inside the
# transaction, in the order in which they stand in the file.
EACH_REPORT: list[Callable[[Monitor, Database, HostState, Fields, Stamp, int], None]] = []  # int: its weight
EACH_REQUEST: list[Callable[[Monitor, Database, HostState, set[str], float], object]] = []


def insert_reports(monitor: Monitor, host_id: int, reports: list[Fields], kept: bytes | None, now: float,
                   db: Database, weight: int = 0) -> int:
    """Write what is new of a batch and all that follows from it; gives back how many were new. Inside a write.
    `kept`: the body of one report as it came, and `weight` its weight, see weigh()."""
    state = monitor.fleet.hosts.get(host_id)
    if state is None:
        raise Problem("unknown_host", "the host has just been removed")
    accepted, bodies = 0, {}
    changed: set[str] = set()
    runs: dict[int, Run] = {}
    for report in reports:
        run = find_run(monitor, db, state, report["run_id"], now)
        at = min(report["time"], now)
        if not add_to_ranges(run.ranges, report["seq"]) and not fills_a_gap(monitor, db, host_id, run, report, at):
            continue
        packed = kept
        if packed is None:
            text = compact_json(report).encode()
            packed, weight = zlib.compress(text, 1), weigh(text)
        report_id = insert_report(db, host_id, run.id, report["seq"], at, now, packed)
        stamp, bodies[report_id] = Stamp(run.id, report["seq"], at, now, report_id), packed
        note_changes(db, state, report, stamp)
        changed.update(state.apply(report, stamp, weight))
        for follow in EACH_REPORT:
            follow(monitor, db, state, report, stamp, weight)
        runs[run.id] = run
        accepted += 1
    if accepted:
        write_state(db, state, runs.values())
        for follow_up in EACH_REQUEST:
            follow_up(monitor, db, state, changed, now)
        state.let_go(bodies)
    # Few have so many gaps; only where one has are those of all runs counted.
    gaps = any(len(run.ranges) > SPANS_AT_HAND // RUNS_AT_HAND for run in runs.values())
    if len(monitor.runs) > RUNS_AT_HAND or (
            gaps and sum(len(run.ranges) for run in monitor.runs.values()) > SPANS_AT_HAND):
        monitor.runs.clear()
    monitor.reports_accepted += accepted
    return accepted


def note_changes(db: Database, state: HostState, report: Fields, stamp: Stamp) -> None:
    """Write down what a report tells beyond what is known, before it is known."""
    newest = stamp.newer_than(state.stamp)
    for _, (at, kind, object, message) in of_each(
            [state], "chronicle", lambda host: chronicle(host, report, stamp.received_at, newest=newest)):
        failed = kind == "task" and not message.endswith((": OK", ": ok", ": unknown"))
        insert_event(db, at, kind, message, host=state.name, object=object or None,
                     severity="warning" if failed else None)


def find_run(monitor: Monitor, db: Database, state: HostState, run_id: str, now: float) -> Run:
    """The run a report belongs to, made with its first report."""
    run = monitor.runs.get((state.id, run_id))
    if run is None:
        row = db.execute("SELECT id, ranges FROM run WHERE host_id = :host AND run_id = :run",
                         {"host": state.id, "run": run_id}).fetchone()
        if row is None:
            new_id = db.execute("""
                INSERT INTO run (host_id, run_id, ranges, first_at, last_seen_at)
                VALUES (:host, :run, '', :now, :now)""", {"host": state.id, "run": run_id, "now": now}).lastrowid
            run = Run(new_id or 0, [])
        else:
            run = Run(row["id"], parse_ranges(row["ranges"]))
        monitor.runs[state.id, run_id] = run
    return run


def fills_a_gap(monitor: Monitor, db: Database, host_id: int, run: Run, report: Fields,
                at: float) -> bool:
    """Whether a number that seems to have come is new after all: where only the count of gaps is known, what is kept
    of the reports of that time tells. What is older than is kept is taken: rather a point anew than a report lost."""
    span = run.ranges[find_range(run.ranges, report["seq"]) - 1]
    if (len(span) == 2 or has_report(db, host_id, run.id, report["seq"])
            or monitor.keeper.has_packed(db, host_id, at, report)):
        return False
    span[2:] = [span[2] - 1] if span[2] > 1 else []
    return True


def write_state(db: Database, state: HostState, runs: Iterable[Run]) -> None:
    """Write which sequence numbers have come, and which reports hold the latest state."""
    for run in runs:
        while len(run.ranges) > SPANS_LIMIT:
            join_ranges(run.ranges, 0)
        db.execute("UPDATE run SET ranges = :ranges, last_seen_at = :now WHERE id = :id",
                   {"ranges": format_ranges(run.ranges), "now": state.last_seen_at, "id": run.id})
    db.execute("INSERT INTO latest VALUES (:id, :sections) ON CONFLICT DO UPDATE SET sections = :sections",
               {"id": state.id, "sections": compact_json(state.pointers())})


# --- rules: what is wrong, from when on, and until when ---
#
# A rule looks at one object of a host and says what is wrong with it: critical("…"), warning("…"), info("…"), or
# measured(number), which is held against the rule's thresholds. None = it is well; UNKNOWN = it cannot be told, which
# ends nothing and alarms nobody. Where a field, thresholds and a sentence are all there is, the rule is a row().

CLOCK, SHARED, AGENT = "(clock)", "(shared)", "(agent)"  # as what a rule is judged on: the job, or every report


Thresholds = tuple[float | None, float | None]  # of a warning, and of what is critical


class Reading(NamedTuple):
    """What a rule says of an object: a severity, or with severity LEVEL a value for the thresholds."""

    severity: str
    message: str | Callable[[], str]  # most numbers are fine, and nobody wants their sentence
    value: float | None = None
    object: str | None = None  # what it is about, where that is not what the rule looked at
    limits: Thresholds | None = None  # the object's own, where nobody set any


LEVEL = ""
UNKNOWN = Reading("unknown", "")
critical, warning, info = (partial(Reading, severity) for severity in SEVERITIES)


def measured(value: float | None, message: str | Callable[[], str], **more: Any) -> Reading:
    """A number for the rule's thresholds; unknown stays unknown."""
    return UNKNOWN if value is None else Reading(LEVEL, message, value, **more)


Found = Reading | Iterable[Reading] | None
Judge = Callable[..., Found]


@dataclasses.dataclass(slots=True)
class Rule:
    """One rule: what it looks at and when, how it is judged, what to tell."""

    name: str
    judge: Judge  # of one object
    why: str
    todo: str
    each: str = ""  # the section whose objects it looks at, one by one; '' = the host as a whole
    on: tuple[str, ...] = ()  # judged when one of these sections comes
    of: str = ""  # kind of object
    warn: float | None = None
    crit: float | None = None
    clear_by: float = 0.0  # fires at the threshold, clears this much on the good side of it
    clear_part: float = 1.0  # or at this part of it
    hold: float = 0.0  # seconds before it fires
    hold_crit: float = 0.0  # before it is critical; as long where nothing else is said
    low: bool = False  # low numbers are the bad ones
    by_number: bool = False  # says nothing but numbers of the report: works on points of the past too
    data_risk: bool = False  # said again each day until somebody acknowledges it
    worse: int = 0  # an acknowledgement ends when the value rises (1) or falls (-1)
    always: bool = False  # judged also on values older than 10 minutes: about what does not change by the minute
    tidy: bool = False  # what it remembers of an object goes with the object
    accept: Callable[[HostState, str], bool] | None = None  # take the present value as normal
    wants: tuple[bool, ...] = ()  # whether its function gets host, fleet and now besides the object
    field: str = ""  # of a row(): the number it holds against the thresholds
    enabled: bool = True
    layer: str = ""  # of server.toml that set this; '' = as shipped: see Layers

    def thresholds(self, reading: Reading) -> Thresholds:
        """Set by somebody, else the object's own, else the rule's."""
        return (self.warn, self.crit) if self.layer or reading.limits is None else reading.limits

    def level(self, value: float, current: str | None, thresholds: Thresholds | None = None) -> str | None:
        """Severity of a number; what is reached (`current`) clears on the good side of its threshold."""
        warn, crit = thresholds or (self.warn, self.crit)
        for severity, threshold in (("critical", crit), ("warning", warn)):
            if threshold is None:
                continue
            held = current == "critical" or current == severity
            bound = threshold
            if held:
                bound = threshold * self.clear_part + (self.clear_by if self.low else -self.clear_by)
            if bound != threshold:
                bad = value < bound - 1e-9 if self.low else value > bound + 1e-9
            else:
                bad = value < threshold if self.low else value >= threshold
            if bad:
                return severity
        return None

    def severity(self, reading: Reading, alert: Alert | None = None) -> str | None:
        """Severity of a reading: 'unknown', or None if it is well. Before an alert fires, each look counts by
        itself: the hold starts anew."""
        if reading.severity != LEVEL:
            return reading.severity
        current = None
        if alert is not None and alert.state == "firing":
            current = "critical" if alert.worse_since is not None else alert.severity
        return self.level(reading.value or 0.0, current, self.thresholds(reading))


RULE: dict[str, Rule] = {}
KINDS_OF = {"pools": "pool", "pool_states": "pool", "datasets": "dataset", "snapshots": "snapshots", "disks": "disk",
            "storages": "storage", "guests": "guest", "certificates": "certificate", "replication": "replication",
            "services": "service", "clusters": "cluster", "sites": "site", "failures": "section", "backups.jobs": "job"}


def rule(name: str, **fields: Any) -> Callable[[Judge], Judge]:
    """Make the function below a rule. It gets the object, and of `host`, `fleet`, `now` what it names."""

    def register(function: Judge) -> Judge:
        wanted = function.__code__.co_varnames[1:function.__code__.co_argcount]
        wants = tuple(word in wanted for word in GIVEN)
        if tuple(compress(GIVEN, wants)) != wanted:
            raise TypeError(f"rule {name}: its function may want {', '.join(GIVEN)}, in this order")
        add_rule(name, function, wants=wants if any(wants) else (), **fields)
        return function

    return register


GIVEN = ("host", "fleet", "now")


def row(name: str, *, reads: str, says: str, **fields: Any) -> None:
    """A rule that holds one number against thresholds; the sentence `says` it with {value} and the object's fields."""

    def read(item: Any) -> Found:
        value = number(item, reads)
        return measured(value, lambda: says.format_map({**item, "value": value}))

    add_rule(name, read, field=reads, by_number=True, **fields)


def add_rule(name: str, judge: Judge, *, each: str = "", on: str = "", of: str = "", **fields: Any) -> None:
    sections = tuple(on.split()) or (each,)
    fields.setdefault("hold_crit", fields.get("hold", 0.0))
    RULE[name] = Rule(name, judge, each=each, on=sections, of=of or KINDS_OF.get(each, "host"), **fields)


def evaluate(rule: Rule, alert: Alert | None, object: str, reading: Reading | None, now: float) -> Alert | None:
    """The next state of an alert, pure: none -> pending -> firing -> resolved. Unknown changes nothing."""
    severity = None if reading is None else rule.severity(reading, alert)
    if severity is None or reading is None:
        if alert is None or alert.state != "firing":
            return None
        return alert.changed(state="resolved", resolved_at=now)
    if severity == UNKNOWN.severity:
        return alert
    message = reading.message if isinstance(reading.message, str) else reading.message()
    since = alert.since if alert else now
    worse_since = None
    if severity == "critical":
        worse_since = alert.worse_since if alert and alert.worse_since is not None else now
    ripe = now - (since if worse_since is None else worse_since) >= (
        rule.hold_crit if severity == "critical" else rule.hold)
    fires = (alert is not None and alert.state == "firing") or ripe or now - since >= rule.hold
    if severity == "critical" and fires and not ripe and rule.thresholds(reading)[0] is not None:
        severity = "warning"  # bad enough for long enough, but critical only for a moment so far
    old = alert or Alert(rule.name, object, severity, message, reading.value, now)
    new = old.changed(severity=severity, message=message, value=reading.value, worse_since=worse_since,
                      state="firing" if fires else "pending", fired_at=old.fired_at or (now if fires else None))
    if new.acknowledged_at is not None and is_worse(new, rule):
        told = {channel: ("", at) for channel, (_, at) in new.told.items()}  # of it, but of nothing as bad as this
        new = new.changed(**NOT_ACKNOWLEDGED, told=told)
    return new


NOT_ACKNOWLEDGED = dict.fromkeys(("acknowledged_at", "acknowledged_by", "acknowledged_until", "acknowledged_note",
                                  "acknowledged_severity", "acknowledged_value"))


def is_worse(alert: Alert, rule: Rule) -> bool:
    """Whether an alert is worse than what was acknowledged: more severe, or by a number that tells it."""
    if SEVERITIES.index(alert.severity) < SEVERITIES.index(alert.acknowledged_severity or alert.severity):
        return True
    if not rule.worse or alert.value is None or alert.acknowledged_value is None:
        return False
    return (alert.value - alert.acknowledged_value) * rule.worse > 0


Changes = list[tuple[Alert | None, Alert | None]]  # old and new alert; None = not there
JUDGED_WITHIN = 10 * MINUTE  # older values are history, not news


def alike(rules: Iterable[Rule]) -> tuple[tuple[Rule, ...], ...]:
    """Rules, in their order, and those in a row together that look at the same things."""
    return tuple(tuple(group) for _, group in groupby(rules, attrgetter("on", "always", "each")))


def judge(host: Any, groups: Iterable[tuple[Rule, ...]], fleet: Fleet, now: float) -> Changes:
    """Run rules over a state; gives back what changed. `host.alerts` is replaced rule by rule: a later rule may look
    at the alerts of an earlier one."""
    changes: Changes = []
    open_alerts: dict[str, dict[str, Alert]] = {}
    for (name, object), alert in host.alerts.items():
        open_alerts.setdefault(name, {})[object] = alert
    for group in groups:
        known = knows(host, group[0], now)
        objects = objects_of(host, group[0]) if known in ("whole", "partly") else []
        for shipped in group:
            rule = fleet.layers.limits(host, shipped)
            seen = (known, objects) if rule.enabled else ("absent", [])  # of one that is switched off nothing is left
            found = judge_rule(host, rule, *seen, open_alerts.get(rule.name, {}), fleet, now)
            if found:
                changes += found
                host.alerts = with_changes(rule, host.alerts, found)
    return changes


def with_changes(rule: Rule, alerts: dict[tuple[str, str], Alert], changes: Changes) -> dict[tuple[str, str], Alert]:
    """A copy of the alerts with what changed."""
    alerts = dict(alerts)
    for old, new in changes:
        if old is not None:
            alerts.pop((rule.name, old.object), None)
        if new is not None and new.state != "resolved":
            alerts[rule.name, new.object] = new
    return alerts


def judge_rule(host: Any, rule: Rule, known: str | None, objects: list[tuple[str, Any]], open_alerts: dict[str, Alert],
               fleet: Fleet, now: float) -> Changes:
    """One rule, as it holds on this host, over all it looks at; gives back the alerts that changed. What was looked at
    and gave no reading is well; what is not there any more is over, if the section is whole."""
    if known is None:
        return []
    layered = fleet.layers.has_objects
    if rule.field and not open_alerts and not layered:  # most are fine: nothing is made of them
        objects = [(object, item) for object, item in objects
                   if (value := number(item, rule.field)) is not None and rule.level(value, None)]
    changes: dict[str, tuple[Alert | None, Alert | None]] = {}  # a report may name an object twice: the first counts
    said: set[str] = set()
    more = tuple(compress((host, fleet, now), rule.wants)) if rule.wants else ()
    for object, item in objects:
        try:
            found = UNKNOWN if item is None else rule.judge(item, *more)
            if found is None or (found is UNKNOWN and not open_alerts):  # most end here
                continue
            for reading in (found,) if isinstance(found, Reading) else list(found):
                about = object if reading.object is None else reading.object
                said.add(about)
                own, old = fleet.layers.limits(host, rule, about) if layered else rule, open_alerts.get(about)
                if about in changes:
                    continue
                new = evaluate(own, old, about, reading if own.enabled else None, now)
                if new is not old:
                    changes[about] = old, new
        except ODD as error:  # a report can hold anything: it costs this object, and no other
            said.add(object)
            tell_stumble(host, rule, object, error, now)
    if not open_alerts and not rule.tidy:
        return list(changes.values())
    looked_at = {object for object, _ in objects}
    ended = [(old, evaluate(rule, old, object, None, now)) for object, old in open_alerts.items()
             if not covers(said, object) and (known != "partly" or covers(looked_at, object))]
    if rule.tidy and known == "whole":
        forget_gone(host, rule, looked_at)
    return [*changes.values(), *ended]


def forget_gone(host: Any, rule: Rule, looked_at: set[str]) -> None:
    """Forget what a rule remembers of objects that are not there any more."""
    for key in host.memory.rules.get(rule.name, {}).keys() - looked_at:
        if not covers(looked_at, key):
            host.memory.drop(rule.name, key)


def objects_of(host: Any, rule: Rule) -> list[tuple[str, Any]]:
    """What a rule looks at: the name of each object and what is known of it; None = it is there, and nothing is."""
    if rule.each:
        return host.objects(rule.each)
    return [("", host if rule.on[0] in (CLOCK, SHARED, AGENT) else host.body(rule.on[0], {}))]


def covers(objects: Set[str], object: str) -> bool:
    """Whether an object, or what it is a part of (the pool of a disk), is among some."""
    while object not in objects:
        object, slash, _ = object.rpartition("/")
        if not slash:
            return object in objects
    return True


def tell_stumble(host: Any, rule: Rule, object: str, error: Exception, now: float) -> None:
    """A line an hour, not one for each report."""
    if not 0 <= now - host.stumbled.get(rule.name, -HOUR) < HOUR:
        host.stumbled[rule.name] = now
        log(f"rules: {rule.name} cannot judge {object or 'it'} of {host.name}: {type(error).__name__}: {error}")


def knows(host: Any, rule: Rule, now: float) -> str | None:
    """Whether what a rule looks at is there: 'whole', 'partly', 'absent', or None for not known."""
    best: str | None = "absent"
    for name in rule.on:
        if name in (CLOCK, SHARED, AGENT):
            return "whole"
        section = host.sections.get(name, NOTHING)
        if section.absent:
            continue
        fresh = section.stamp is not None and (rule.always or now - section.time <= JUDGED_WITHIN)
        if fresh and section.error is None:
            return "whole"
        if fresh and section.stamp == section.status:
            best = "partly"
        elif best == "absent":
            best = None
    return best


def accepts(rule: str, *, counter: bool = False) -> Callable[[HostState, str], bool]:
    """An `accept` that takes what is now as the baseline, or drops what a rule remembers of an object."""
    return lambda host, object: (host.memory.accept if counter else host.memory.drop)(rule, object)


def percent(part: float) -> str:
    return f"{part:.0%}"


def days(seconds: float) -> str:
    return f"{seconds / DAY:.0f} d"


def some_of(names: list[str], most: int) -> str:
    """'a, b and 3 more'"""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# Why a section could not be had, by the code that the agent gives, in words that need no command line.
FAILURES = {"timeout": "no answer in time", "denied": "permission denied", "missing": "a tool that it needs is missing",
            "failed": "a command fails", "garbage": "an answer that it does not understand",
            "stuck": "an earlier command still hangs", "too_large": "too much to take in",
            "unavailable": "it cannot be asked now"}


def failure_words(error: Fields) -> str:
    code = str(error.get("code") or "unknown")
    return FAILURES.get(code, code.replace("_", " ")[:40])


def without_command(told: str) -> str:
    """'timeout: smartctl -j -H /dev/sda: no answer in 30 s' -> 'no answer in 30 s': who reads it typed no command."""
    parts = told.split(": ")
    kept = [part for place, part in enumerate(parts) if " -" not in part and (place or part not in FAILURES)]
    return ": ".join(kept) or parts[-1]


def called(guest: Fields) -> str:
    """'104 (web)'"""
    return f"{guest['vmid']} ({text(guest, 'name') or guest['vmid']})"


def worst_each(readings: Iterable[Reading]) -> Iterable[Reading]:
    """Of several readings of one object the worst: by severity, then by number."""
    worst: dict[str | None, Reading] = {}
    for reading in sorted(readings, key=lambda one: (WORST_FIRST.index(one.severity), -(one.value or 0))):
        worst.setdefault(reading.object, reading)
    return worst.values()


WORST_FIRST = (*SEVERITIES, LEVEL, UNKNOWN.severity)


# Pools


@rule("pool-state", each="pool_states", on="pool_states pools", data_risk=True, worse=-1,
      why="A pool that is not ONLINE has lost redundancy, or data.",
      todo="zpool status -v POOL; replace or bring back the disk that is named.")
def pool_state(pool: Fields) -> Found:
    """The worst of what the pool's word, its disks and its margin say: which disk, how far the repair is, and how many
    more disks it can lose. A label that was overwritten leaves the word ONLINE (openzfs/zfs issue 4653)."""
    word, margin = text(pool, "state"), number(pool, "redundancy_margin")
    leaves = [leaf for leaf, _ in leaves_with_parent(pool) if text(leaf, "state") not in (None, "ONLINE")]
    if word in (None, "UNKNOWN", "TRANSITIONING") and not leaves:  # the latter during import and export
        return UNKNOWN
    if word == "ONLINE" and not leaves and (margin is None or margin >= 0):
        return None
    parts = [f"Pool {pool['name']} is {word}"] + resilver_words(pool)
    if leaves:
        parts.append(some_of([f"{leaf.get('name')} {leaf.get('state')}" for leaf in leaves], 4))
    if margin is not None:
        parts.append(may_fail(int(margin)))
    by_hand = word in ("ONLINE", "DEGRADED") and leaves and all(text(leaf, "state") == "OFFLINE" for leaf in leaves)
    severe = warning if by_hand and margin is not None and margin >= 1 else critical
    return severe("; ".join(parts) + ".", margin)


def resilver_words(pool: Fields) -> list[str]:
    scan = scan_of(pool)
    if text(scan, "function") != "resilver" or text(scan, "state") != "scanning":
        return []
    done = number(scan, "progress_ratio")
    return ["resilvering" + ("" if done is None else f" {percent(done)}")]


@rule("pool-margin", each="pools", tidy=True, accept=accepts("pool-margin"),
      why="It can lose fewer disks than it was built for, whatever its word is.",
      todo="zpool status: wait for a resilver, or attach a disk; accept as normal if it was made smaller on purpose.")
def pool_margin(pool: Fields, host: HostState, now: float) -> Found:
    """A margin below the best that was seen: said at once, and a warning after an hour."""
    margin, object = number(pool, "redundancy_margin"), f"pools/{pool['name']}"
    if margin is None:
        return UNKNOWN
    best, since = host.memory.get("pool-margin", object, (margin, None))
    best, since = max(best, margin), (since or now) if margin < best else None
    host.memory.keep("pool-margin", object, [best, since])
    if margin >= best or pool_state(pool) is not None:
        return None
    message = "; ".join([f"Pool {pool['name']} can lose {count_of(margin, 'more disk')}; it could lose {int(best)}",
                         *resilver_words(pool)])
    return (warning if now - (since or now) >= HOUR else info)(message + ".", margin)


@rule("pool-spare", each="pools", of="vdev", hold=15 * MINUTE,
      why="A spare that is in use or dead steps in for nobody, and a dead cache only slows down.",
      todo="zpool status; zpool detach the disk or the spare that is not to stay, zpool remove what is dead.")
def pool_spare(pool: Fields) -> Iterator[Reading]:
    """Spares that stay in use beside a disk that came back; spares and caches that are dead."""
    if pool.get("vdevs") is None:
        yield UNKNOWN
    for vdev in walk_vdevs(pool.get("vdevs")):
        object, state = f"pools/{pool['name']}/{vdev.get('name')}", text(vdev, "state")
        members = dicts(vdev.get("children"))
        dead = state in ("UNAVAIL", "FAULTED", "REMOVED", "DEGRADED")
        if text(vdev, "class") in ("spare", "cache") and not members and dead:
            yield warning(f"{str(vdev['class']).capitalize()} {vdev.get('name')} of pool {pool['name']} is {state}.",
                          object=object)
        elif (text(vdev, "type") == "spare" and len(members) > 1 and text(scan_of(pool), "state") != "scanning"
              and all(text(member, "state") == "ONLINE" for member in members)):
            yield warning(f"Pool {pool['name']}: spare {members[-1].get('name')} is still in use beside "
                          f"{members[0].get('name')}, which is ONLINE again: no spare is left for the next.",
                          object=object)


@rule("pool-readonly", each="pools", hold=15 * MINUTE,
      why="Its guests and backups cannot write.",
      todo="zpool get readonly POOL; export it and import it without -o readonly=on.")
def pool_readonly(pool: Fields) -> Found:
    if pool.get("readonly") is None:
        return UNKNOWN
    return warning(f"Pool {pool['name']} is imported read-only.") if pool["readonly"] is True else None


@rule("pool-unanswered", each="pools", hold=15 * MINUTE,
      why="What cannot be asked may be failing: nobody sees its disks, errors and space.",
      todo="zpool status POOL; dmesg: does a disk or a controller hang?")
def pool_unanswered(pool: Fields) -> Found:
    reason = text(pool, "unknown_reason")
    return warning(f"Pool {pool['name']} cannot be looked at: {reason[:200]}") if reason else None


@rule("slow-ios", each="pools", of="vdev", tidy=True, accept=accepts("slow-ios", counter=True),
      why="A disk that needs half a minute for an answer is failing, or its cable is; all guests wait for it.",
      todo="smartctl -a, the cable, dmesg; replace it if it is the only slow one. accept as normal if it is over.")
def slow_ios(pool: Fields, host: HostState, now: float) -> Iterator[Reading]:
    """Ten or more I/Os of over 30 s within a day (zio_slow_io_ms, zfs(4))."""
    if pool.get("vdevs") is None:
        yield UNKNOWN
    for vdev, _ in leaves_with_parent(pool):
        object, total = f"pools/{pool['name']}/{vdev.get('name')}", number(vdev, "slow_ios")
        if total is None:
            yield UNKNOWN._replace(object=object)
            continue
        lately = host.memory.grown("slow-ios", object, total, now).lately(now - DAY)
        if lately >= 10:
            yield warning(f"{vdev.get('name')} in pool {pool['name']} took over 30 s for {int(lately)} I/Os in a day.",
                          lately, object)


def scan_of(pool: Fields) -> Fields:
    scan = pool.get("scan")
    return scan if isinstance(scan, dict) else {}


@rule("pool-vanished", on="pool_states", of="pool", data_risk=True, accept=accepts("pool-vanished"),
      why="A pool that is not imported is no longer there for its guests.",
      todo="zpool import; if it was exported on purpose, accept this as normal.")
def pool_vanished(pools: list[Fields], host: HostState) -> Iterator[Reading]:
    """Pools that were there and are not. Only an export, a destroy, or a start without an import does that."""
    here = {f"pools/{pool['name']}" for pool in pools}
    boot, memory = text(host.body("node"), "boot_id"), host.memory
    for object in here:
        if memory.get("pool-vanished", object, {}).get("boot", NOTHING) not in (boot, None):
            memory.keep("pool-vanished", object, {"boot": boot})
    if host.sections["pool_states"].error:
        return  # what is missing may be what could not be looked at
    for object in set(memory.keys("pool-vanished")) - here:
        name = object.partition("/")[2]
        if any(kind == "zfsremove" and of == name for kind, of, _, _ in memory.tasks):  # PVE destroyed it
            memory.drop("pool-vanished", object)
            continue
        same_boot = memory.get("pool-vanished", object).get("boot") == boot
        if same_boot and host.body("storages") is not None and not uses_pool(host, name):
            yield info(f"Pool {name} is gone: exported? Nothing in Proxmox uses it.", object=object)
        else:
            how = "after the host started" if not same_boot else "though Proxmox needs it"
            yield critical(f"Pool {name} was there and is gone {how}.", object=object)


def uses_pool(host: HostState, pool: str) -> bool:
    """Whether a storage or a guest's volume lies on a pool."""
    storages = [storage.get("dataset") for storage in host.items("storages")
                if storage.get("enabled") not in (False, 0)]
    volumes = [volume.get("dataset") for guest in host.items("guests") for volume in dicts(guest.get("volumes"))]
    return any(pool_of(dataset) == pool for dataset in storages + volumes)


def pool_of(dataset: Any) -> str | None:
    return dataset.partition("/")[0] if dataset and isinstance(dataset, str) else None


def leaves_with_parent(pool: Fields) -> Iterator[tuple[Fields, str]]:
    """Every leaf that holds data, with the name of the top-level vdev it belongs to; spares and caches are left out."""
    for top in dicts(pool.get("vdevs")):
        if text(top, "class") in ("spare", "cache"):
            continue
        for vdev in walk_vdevs([top]):
            if not vdev.get("children") and text(vdev, "state") not in ("AVAIL", "INUSE"):
                yield vdev, str(top.get("name"))


def groups_to_blame(pool: Fields) -> Iterator[tuple[Fields, str]]:
    """Top-level groups with errors of which none is counted on their disks: ZFS could not tell which one was wrong
    (openzfs/zfs issue 5018)."""
    for top in dicts(pool.get("vdevs")):
        members = [number(vdev, key) for vdev in walk_vdevs(top.get("children")) for key in VDEV_COUNTERS]
        if members and not any(members) and any(number(top, key) for key in VDEV_COUNTERS):
            yield top, str(top.get("name"))


@rule("vdev-errors", each="pools", of="vdev", data_risk=True, tidy=True, accept=accepts("vdev-errors", counter=True),
      why="A disk, cable or controller gives errors; ZFS has covered for them so far.",
      todo="Look at the disk's SMART values and cable; then zpool clear, or accept as normal.")
def vdev_errors_grown(pool: Fields, host: HostState, now: float) -> Iterator[Reading]:
    """Errors above the accepted baseline; 10 in 24 h, or two disks of one vdev, are critical."""
    if pool.get("vdevs") is None:
        yield UNKNOWN
    found: list[tuple[str, Fields, str, Growth]] = []
    for vdev, top in [*leaves_with_parent(pool), *groups_to_blame(pool)]:
        object = f"pools/{pool['name']}/{vdev.get('name')}"
        total = sum_known(number(vdev, key) for key in VDEV_COUNTERS)
        if total is None:
            yield UNKNOWN._replace(object=object)
            continue
        growth = host.memory.grown("vdev-errors", object, total, now, from_zero=True)
        if growth.above > 0:
            found.append((object, vdev, top, growth))
    tops = [top for _, vdev, top, _ in found if vdev.get("name") != top]
    for object, vdev, top, growth in found:
        counts = ", ".join(f"{int(count)} {key.partition('_')[0]}" for key in VDEV_COUNTERS
                           if (count := number(vdev, key)))
        several = tops.count(top) > 1
        reason = "; another disk of the same vdev has some too" if several else ""
        severe = critical if several or growth.lately(now - DAY) >= MANY_ERRORS else warning
        yield severe(f"{vdev.get('name')} in pool {pool['name']} has errors: {counts} ({int(growth.above)} new)"
                     f"{reason}.", growth.above, object)


@rule("pool-data-errors", each="pools", data_risk=True, worse=1,
      why="Data is damaged and ZFS has no good copy.",
      todo="zpool status -v names the files: restore them from a backup, then zpool clear and scrub.")
def pool_data_errors(pool: Fields) -> Found:
    errors = number(pool, "data_errors")
    if not errors:
        return UNKNOWN if errors is None else None
    files = ", ".join(str(file) for file in (pool.get("damaged_files") or ())[:3])
    found = count_of(errors, "permanent data error")
    return critical(f"Pool {pool['name']} has {found}{': ' + files if files else ''}.", errors)


@rule("pool-capacity", each="pools", warn=0.80, crit=0.90, clear_by=0.03, hold=15 * MINUTE, by_number=True,
      why="ZFS slows down when little is free, and a full pool stops its guests.",
      todo="Delete old snapshots, move guests, or add a vdev.")
def pool_capacity(pool: Fields) -> Found:
    """How full it is; also full when nothing is left for its datasets, as reservations may have it (openzfs/zfs issue
    7321)."""
    full, used, left = (number(pool, key) for key in ("capacity_ratio", "usable_used_bytes", "usable_available_bytes"))
    share = None if used is None or left is None else ratio(used, used + left)
    if full is not None and share is not None and share > max(full, 0.98):
        return critical(f"Pool {pool['name']} is {full:.0%} full, but only {format_bytes(left or 0)} are left for its "
                        "datasets: the rest is reserved.", share)
    return measured(full, lambda: f"Pool {pool['name']} is {full:.0%} full.")


FORECAST_RULE: Fields = {"warn": 14, "crit": 3, "clear_by": 1, "low": True, "hold": HOUR}


@rule("pool-forecast", each="pools", **FORECAST_RULE,
      why="It grows steadily, and a full pool stops its guests.",
      todo="The list of forecasts says what grew and what could be won; or plan disks.")
def pool_forecast(pool: Fields, host: HostState) -> Found:
    return forecast_reading(host, f"pools/{pool['name']}")


@rule("space-forecast", on="node", of="space", **FORECAST_RULE,
      why="It grows steadily, and writes fail when it is full.",
      todo="Find what grows and delete, move or enlarge it.")
def space_forecast(node: Fields, host: HostState) -> Iterator[Reading]:
    """Storages and thin pools, datasets with a quota, and the root file system."""
    if host.forecasts is None:
        yield UNKNOWN
    for object in host.forecasts or ():
        if not object.startswith("pools/") and (reading := forecast_reading(host, object)) is not None:
            yield reading._replace(object=object)


def forecast_reading(host: HostState, object: str) -> Reading | None:
    """The soonest day counts; where it grew in one of the last 7 and 30 days only, it is no more than a warning."""
    filling = (host.forecasts or {}).get(object)
    if filling is None or filling.forecast is None:
        return UNKNOWN
    soonest, latest = filling.forecast.soonest, filling.forecast.latest
    if soonest is None:
        return None
    limits = None if latest is not None else (FORECAST_RULE["warn"], None)
    return measured(soonest, lambda: describe_filling(filling), limits=limits)


@rule("dataset-quota", each="datasets", warn=0.90, crit=0.95, clear_by=0.03, hold=15 * MINUTE,
      why="Writes fail when the quota is used up.",
      todo="Raise the quota or delete something.")
def dataset_quota(dataset: Fields, host: HostState) -> Found:
    full = [part / whole for part, whole in (
        (number(dataset, "used_bytes"), number(dataset, "quota_bytes")),
        (number(dataset, "referenced_bytes"), number(dataset, "refquota_bytes"))) if part is not None and whole]
    if not full or any(guest["vmid"] == dataset.get("vmid") and number(guest, "disk_used_bytes") is not None
                       for guest in host.items("guests") if dataset.get("vmid") is not None):
        return None  # it has none, or is a container's own disk: see guest-disk-full
    return measured(max(full), f"Dataset {dataset['name']} has used {percent(max(full))} of its quota.")


RECEIVED = ("__replicate", "syncoid", "zrepl", "bdup", "zfs_autobackup")  # names that senders give to snapshots


def accept_unmounted(host: HostState, object: str) -> bool:
    host.memory.keep("dataset-unmounted", object, "accepted")
    return True


@rule("dataset-unmounted", each="datasets", hold=15 * MINUTE, tidy=True, accept=accept_unmounted,
      why="Whoever writes to its mount point fills the file system below, or finds nothing there.",
      todo="zfs mount -a says why it cannot be mounted: zfs load-key, or a folder that is not empty.")
def dataset_unmounted(dataset: Fields, host: HostState) -> Found:
    """A file system that should be mounted and is not. What is received from elsewhere often never is."""
    name, object = dataset["name"], f"datasets/{dataset['name']}"
    if dataset.get("type") != "filesystem" or dataset.get("mounted") is None:
        return UNKNOWN if dataset.get("type") == "filesystem" else None
    known = host.memory.get("dataset-unmounted", object)
    if dataset["mounted"]:
        host.memory.keep("dataset-unmounted", object, "mounted")
        return None
    wanted = dataset.get("canmount") == "on" and (text(dataset, "mountpoint") or "").startswith("/")
    if not wanted or known == "accepted" or (known is None and is_received(dataset, host)):
        return None
    reason = ": its key is not loaded" if dataset.get("key_available") is False else ""
    return warning(f"Dataset {name} should be mounted on {dataset['mountpoint']} and is not{reason}.")


def is_received(dataset: Fields, host: HostState) -> bool:
    """Whether a dataset is a copy of another one: a guest's that does not live here, or with snapshots of a sender."""
    if dataset.get("vmid") is not None and dataset["vmid"] not in [guest["vmid"] for guest in host.items("guests")]:
        return True
    own = [kind for kind in host.items("snapshots") if kind.get("dataset") == dataset["name"]]
    return any((text(kind, "class") or "").startswith(RECEIVED)
               or (number(kind, "newest_seen_at") or 0) - (number(kind, "newest_at") or 0) > HOUR for kind in own)


@rule("pool-fragmentation", each="pools", warn=0.70, clear_by=0.10, hold=DAY,
      why="Little and scattered free space makes writes slow.",
      todo="Free space below 80 % use.")
def pool_fragmentation(pool: Fields) -> Found:
    """Fragmentation matters once little is free."""
    fragmented, used = number(pool, "fragmentation_ratio"), number(pool, "capacity_ratio")
    if fragmented is None or used is None:
        return UNKNOWN
    if used <= 0.80:
        return None
    return measured(fragmented, f"Pool {pool['name']} is {percent(used)} full and its free space "
                                f"{percent(fragmented)} fragmented.")


@rule("pool-special", each="pools", warn=SPECIAL_FULL, crit=0.90, clear_by=0.03, hold=15 * MINUTE,
      why="What no longer fits on the special vdev goes to the slow disks, for as long as it is not written anew.",
      todo="zpool list -v POOL; add a special mirror, or set special_small_blocks lower.")
def pool_special(pool: Fields) -> Found:
    """The fullest special vdev."""
    special = [vdev for vdev in dicts(pool.get("vdevs")) if text(vdev, "class") == "special"]
    shares = [share for vdev in special
              if (share := ratio(number(vdev, "allocated_bytes"), number(vdev, "size_bytes"))) is not None]
    if special and not shares:
        return UNKNOWN
    return measured(max(shares), f"A special vdev of pool {pool['name']} is {percent(max(shares))} full.") \
        if shares else None


@rule("scrub-age", each="pools", warn=40 * DAY, crit=75 * DAY, tidy=True,
      why="Errors that nobody reads are found only by a scrub.",
      todo="zpool scrub POOL; look at Debian's monthly job in /etc/cron.d/zfsutils-linux.")
def scrub_age(pool: Fields, host: HostState, now: float) -> Found:
    """Age of the last scrub; of a pool that never had one, the time since it is known here."""
    known_since = host.memory.since("scrub-age", f"pools/{pool['name']}", now)
    ended, scan = number(pool.get("last_scrub"), "ended_at"), scan_of(pool)
    if text(scan, "function") == "scrub" and text(scan, "state") == "scanning":
        return None
    if ended is not None:
        return measured(now - ended, lambda: f"Pool {pool['name']} was last scrubbed {days(now - ended)} ago.")
    if not scan:
        return UNKNOWN
    age = now - known_since
    return warning(f"Pool {pool['name']} has never been scrubbed.", age) if age > 40 * DAY else None


def last_result(pool: Fields) -> tuple[str, Fields]:
    """The last scrub, or a resilver that ended after it with errors."""
    scan, scrub = scan_of(pool), pool.get("last_scrub")
    scrub = scrub if isinstance(scrub, dict) else {}
    resilvered = text(scan, "function") == "resilver" and text(scan, "state") == "finished" and number(scan, "errors")
    later = (number(scan, "ended_at") or 0) > (number(scrub, "ended_at") or 0)
    return ("resilver", scan) if resilvered and later else ("scrub", scrub)


def accept_scrub_result(host: HostState, object: str) -> bool:
    ended = number(last_result(full_pools(host).get(object.partition("/")[2], {}))[1], "ended_at")
    if ended is not None:
        host.memory.keep("scrub-result", object, ended)
    return ended is not None


@rule("scrub-result", each="pools", tidy=True, accept=accept_scrub_result,
      why="A disk returned wrong data.",
      todo="Find the disk with zpool status -v; accept as normal if it was a single event.")
def scrub_result(pool: Fields, host: HostState) -> Found:
    (word, last), name = last_result(pool), pool["name"]
    ended, repaired, errors = number(last, "ended_at"), number(last, "repaired_bytes"), number(last, "errors")
    if ended is None or host.memory.get("scrub-result", f"pools/{name}") == ended:
        return None
    if errors:
        found = count_of(errors, "error")
        return critical(f"The last {word} of pool {name} found {found} it could not repair.", errors)
    if not repaired:
        return None
    return warning(f"The last scrub of pool {name} repaired {int(repaired)} bytes"
                   f"{repaired_before(known_scrubs(host, str(name)), ended)}.", repaired)


SCRUBS_KEPT = 10  # of a pool are remembered


@rule("scrub-slow", each="pools", tidy=True,
      why="A scrub that takes much longer than it used to is often a disk that ages.",
      todo="zpool iostat -vl POOL 5 shows which disk is slow; was there other load, a backup or a rebuild?")
def scrub_slow(pool: Fields, host: HostState) -> Found:
    """The last scrub took half as long again per byte as the median of at least three before it."""
    last, name = pool.get("last_scrub"), str(pool["name"])
    ended, took, size = number(last, "ended_at"), number(last, "duration_seconds"), number(pool, "allocated_bytes")
    scrubs = known_scrubs(host, name)
    if ended is not None and took and size and ended not in (scrub.ended_at for scrub in scrubs):
        scrubs = [*scrubs, Scrub(ended, took, size, number(last, "repaired_bytes"))][-SCRUBS_KEPT:]
        host.memory.keep("scrub-slow", f"pools/{name}", [list(scrub) for scrub in scrubs])
    usual = usual_scrub(scrubs)
    if usual is None:
        return UNKNOWN
    took = scrubs[-1].took
    if took < SCRUB_LEAST or took <= 1.5 * usual:
        return None
    return warning(f"The last scrub of pool {name} took {format_duration(took)}; for as much data it used to take "
                   f"{format_duration(usual)}{describe_slow_member(pool)}.", took / usual)


@rule("scrub-stuck", each="pools", tidy=True,
      why="A scrub or resilver that stands still, or begins again and again, protects nothing.",
      todo="zpool status; a paused scrub goes on with zpool scrub POOL; look for the disk with errors in dmesg.")
def scrub_stuck(pool: Fields, host: HostState, now: float) -> Found:
    """A scrub or resilver that has not got beyond its highest mark for 24 h: stuck, paused, or one that begins anew
    again and again (openzfs/zfs issues 9551, 11572)."""
    scan, object = scan_of(pool), f"pools/{pool['name']}"
    done, state, function = number(scan, "progress_ratio"), text(scan, "state"), text(scan, "function")
    if state not in ("scanning", "paused") or done is None:
        if state is not None:
            host.memory.drop("scrub-stuck", object)
        return None
    which = number(scan, "started_at") if function == "scrub" else None  # of a scrub each has marks of its own
    mark, since, *of = host.memory.get("scrub-stuck", object, (-1.0, now, which))
    if done > mark or of != [which]:
        mark, since = done, now
    host.memory.keep("scrub-stuck", object, [mark, since, which])
    if now - since < DAY:
        return None
    anew = "" if done >= mark else f", it is at {percent(done)} now"
    return warning(f"The {function} of pool {pool['name']} has not got beyond {percent(mark)} for "
                   f"{format_duration(now - since)}{anew}.", mark)


# Snapshots


SANOID_AGES = {"hourly": (90 * MINUTE, 360 * MINUTE), "daily": (28 * HOUR, 32 * HOUR),
               "monthly": (32 * DAY, 40 * DAY)}  # sanoid.defaults.conf: *_warn, *_crit


PAUSES_SEEN = 15 * DAY  # two weekends


def accept_missing(host: HostState, object: str) -> bool:
    missing = missing_snapshots(host).get(object.partition("/")[2])
    if missing:
        host.memory.keep("snapshot-missing", object, missing)
    return bool(missing)


def snapshot_limits(snapshots: Fields) -> tuple[float, float] | None:
    """Warning and critical age of a class of snapshots: learned from 5 samples, else by name."""
    interval, count = number(snapshots, "interval_seconds"), number(snapshots, "count") or 0
    if interval and count >= 5:
        return 1.5 * interval + 10 * MINUTE, 3 * interval + 10 * MINUTE
    return next((ages for word, ages in SANOID_AGES.items() if word in (text(snapshots, "class") or "")), None)


@rule("snapshot-age", each="snapshots", always=True, tidy=True,
      why="Whoever makes these snapshots, or sends them here, has stopped.",
      todo="systemctl status sanoid.timer (or what makes or sends them).")
def snapshot_age(snapshots: Fields, host: HostState, now: float) -> Found:
    """Age of the newest snapshot of each class; on a replication target they come in batches, and what counts is how
    long ago the last batch came. Classes that were given up long before we looked are left alone."""
    name, newest, limits = snapshot_class(snapshots), number(snapshots, "newest_at"), snapshot_limits(snapshots)
    if name is None or newest is None or limits is None:
        return None
    object, age = f"snapshots/{snapshots['dataset']}@{name}", now - newest
    given, here = snapshots.get("newest_guid"), host.memory.get("snapshot-age", object)
    guid, seen_at, gaps, judged, *pauses = here or (given, newest if age < 2 * DAY else None, [], age <= 10 * limits[1])
    if guid != given:  # a new one has come
        gap = now - seen_at if seen_at is not None else 0.0
        gaps, guid, seen_at = [*gaps, gap][-6:] if gap else gaps, given, now
        pauses = [pause for pause in pauses if pause[0] > now - PAUSES_SEEN] + ([[now, gap]] if gap > limits[0] else [])
        judged = judged or age <= 10 * limits[1]
    host.memory.keep("snapshot-age", object, [guid, seen_at, gaps, judged, *pauses[-20:]])
    if not judged:
        return None
    twice = sorted(length for _, length in pauses)[-2:-1]  # nights, weekends: what comes again is their rhythm
    gap = max([*gaps, *twice, number(snapshots, "arrival_interval_seconds") or 0.0])
    if gap > limits[0]:  # as seldom as they come, they are not expected more often
        limits = 1.25 * gap + HOUR, 2.5 * gap + HOUR
    return measured(age, lambda: f"The newest {name} snapshot of {snapshots['dataset']} is {format_duration(age)} old; "
                                 f"it should be at most {format_duration(limits[0])}.", limits=limits)


@rule("snapshot-gone", on="snapshots", of="snapshots", accept=accepts("snapshot-gone"),
      why="A kind of snapshot that was always there is not.",
      todo="If it was given up on purpose, accept this as normal.")
def snapshot_gone(classes: list[Fields], host: HostState, now: float) -> Iterator[Reading]:
    """A class of snapshots that had 5 and has none now, while its dataset is still there: said for a week."""
    counts = {f"snapshots/{kind['dataset']}@{snapshot_class(kind)}": number(kind, "count") or 0
              for kind in dicts(classes) if snapshot_class(kind)}
    dark = {kind["dataset"].partition("/")[0] for kind in dicts(classes) if kind.get("unknown_reason")}
    for object, count in counts.items():
        if count >= 5:
            host.memory.keep("snapshot-gone", object, 0)
    datasets = {dataset["name"] for dataset in host.items("datasets")}
    for object in set(host.memory.keys("snapshot-gone")) - counts.keys():
        dataset, _, name = object.partition("/")[2].rpartition("@")
        gone_at = host.memory.get("snapshot-gone", object) or now
        if pool_of(dataset) in dark:
            yield UNKNOWN._replace(object=object)
            continue
        if dataset not in datasets or now - gone_at > 7 * DAY:
            host.memory.drop("snapshot-gone", object)
            continue
        host.memory.keep("snapshot-gone", object, gone_at)
        yield warning(f"Dataset {dataset} has no {name} snapshot any more.", 0, object)


@rule("snapshot-missing", on="snapshots", of="dataset", hold=DAY, always=True, accept=accept_missing,
      why="Its neighbours are snapshotted and it is not: nobody could go back.",
      todo="Add it to what makes the snapshots (sanoid.conf …), or accept this as normal.")
def snapshot_missing(classes: list[Fields], host: HostState) -> Iterator[Reading]:
    for dataset, missing in missing_snapshots(host).items():
        object = f"datasets/{dataset}"
        if host.memory.get("snapshot-missing", object) != missing:
            yield warning(f"Dataset {dataset} has no {', '.join(missing)} snapshots, as its neighbours have.", None,
                          object)
    if not host.has("datasets") or is_unseen(host, "datasets") or is_unseen(host, "snapshots"):
        yield UNKNOWN


@rule("snapshot-unpruned", each="snapshots", hold=DAY, always=True,
      why="Snapshots that nobody deletes fill the pool in the end.",
      todo="See to it that what makes them also prunes them (sanoid: autoprune = yes).")
def snapshot_unpruned(snapshots: Fields) -> Found:
    """A series of hundreds over months of which none is gone."""
    span = unpruned_span(snapshots)
    return None if span is None else info(
        f"None of the {int(snapshots['count'])} {snapshots.get('class')} snapshots of {snapshots['dataset']} was "
        f"deleted in {format_duration(span)}.", snapshots["count"])


@rule("snapshot-growth", on="pools", of="dataset", warn=0.20, clear_by=0.05, hold=HOUR, always=True,
      why="Snapshots that grow fill the pool, and it is not the guests' data that do.",
      todo="Delete old snapshots of it, keep fewer, or find what rewrites so much.")
def snapshot_growth(pools: list[Fields], host: HostState) -> Iterator[Reading]:
    """Share of what was free that the snapshots of one dataset took in the last week, of a pool that fills up."""
    if host.forecasts is None:
        yield UNKNOWN
    for growth, filling, share in grown_snapshots(host):
        if filling.forecast and (filling.forecast.soonest or 0) <= FORECAST_RULE["warn"]:
            continue  # pool-forecast says what grew
        reading = measured(share, f"Snapshots of {growth.dataset} grew by {format_bytes(growth.bytes)} in "
                                  f"{filling.grown_days:.0f} d: {percent(share)} of what was free.")
        if reading is not None:
            yield reading._replace(object=f"datasets/{growth.dataset}")


@rule("guest-snapshot-age", on="snapshots", of="guest", always=True,
      why="Forgotten snapshots hold space and grow.",
      todo="Delete the snapshot if nobody needs it any more.")
def guest_snapshot_age(classes: list[Fields], host: HostState, now: float) -> Found:
    """Snapshots made of guests by hand that are old, or hold much of what is free."""
    return worst_each(old_snapshots(classes, host, now))


def old_snapshots(classes: list[Fields], host: HostState, now: float) -> Iterator[Reading]:
    datasets = {dataset["name"]: dataset for dataset in host.items("datasets")}
    for kind in dicts(classes):
        oldest = number(kind, "oldest_at")
        if text(kind, "class") != "pve" or oldest is None or kind["dataset"].rpartition("/")[2].startswith("base-"):
            continue  # base-…: a template's disk, whose snapshot its clones live on
        dataset = datasets.get(kind["dataset"], {})
        vmid = number(dataset, "vmid")
        object = f"guests/{int(vmid)}" if vmid is not None else f"datasets/{kind['dataset']}"
        age, held = now - oldest, number(dataset, "used_by_snapshots_bytes")
        free = pool_space(full_pools(host).get(pool_of(kind["dataset"]) or "", {}))[1]
        share = held / free if held is not None and free else 0
        if age > 30 * DAY or share > 0.20:
            much = f" and its snapshots hold {percent(share)} of what is free" if share > 0.20 else ""
            yield warning(f"The oldest snapshot of {kind['dataset']} is {days(age)} old{much}.", age, object)


# Disks


def disk_key(disk: Fields) -> str:
    """What stays with a disk when its letter changes."""
    return text(disk, "serial") or text(disk, "wwn") or disk["name"]


def disk_called(disk: Fields) -> str:
    known = ", ".join(filter(None, (text(disk, "model"), text(disk, "serial"))))
    where = f" of pool {disk['pool']}" if text(disk, "pool") else ""
    return f"Disk {disk['name']}{f' ({known})' if known else ''}{where}"


NVME_WARNINGS = {0x01: "spare below its limit", 0x02: "temperature", 0x04: "reliability lost", 0x08: "read-only",
                 0x10: "volatile memory backup failed", 0x20: "persistent memory region"}  # NVMe base spec., log 02h


def disk_troubles(disk: Fields) -> list[str]:
    """What a disk itself says of its end, all of it: these are signs of one cause."""
    bits, worn, spare, least = (number(disk, key) for key in ("critical_warning", "wear_ratio", "spare_ratio",
                                                              "spare_threshold_ratio"))
    failing = disk.get("failing_attributes") or ()
    words = [word for bit, word in NVME_WARNINGS.items() if int(bits or 0) & bit]
    return [*(["critical warning: " + ", ".join(words or [f"0x{int(bits):02x}"])] if bits else []),
            *([f"{percent(spare or 0)} of its spare left, its own limit is {percent(least or 0)}"]
              if lacks_spare(disk) else []),
            *([f"{', '.join(map(str, failing))} at the threshold of failure"] if failing else []),
            *([f"{percent(worn)} of its rated life used"] if worn is not None and worn >= 0.80 else []),
            *(["its last self-test failed"] if selftest_passed(disk) is False else [])]


def selftest_passed(disk: Fields) -> bool | None:
    test = disk.get("selftest")
    return test.get("passed") if isinstance(test, dict) else None


@rule("smart-failed", each="disks", data_risk=True, always=True,
      why="The disk itself expects to fail.",
      todo="Replace it: zpool replace POOL OLD NEW.")
def smart_failed(disk: Fields) -> Found:
    if not is_failing(disk) and not disk.get("failing_attributes"):
        return UNKNOWN if disk.get("passed") is None else None
    return critical("; ".join([f"{disk_called(disk)} is failing (SMART)", *disk_troubles(disk)]) + ".")


@rule("smart-warning", each="disks", data_risk=True, always=True, worse=1,
      why="The NVMe controller reports worn-out spare, heat, lost reliability or read-only media.",
      todo="smartctl -a; replace the disk, or cool it if it is the temperature alone.")
def smart_warning(disk: Fields) -> Found:
    bits = number(disk, "critical_warning")
    if not bits:
        return UNKNOWN if bits is None and disk.get("kind") == "nvme" else None
    if is_failing(disk):
        return UNKNOWN  # told by smart-failed
    return (warning if bits == HOT_ONLY else critical)(f"{disk_called(disk)}: {'; '.join(disk_troubles(disk))}.", bits)


@rule("selftest-failed", each="disks", data_risk=True, always=True,
      why="The disk could not read itself: what lies there may be lost.",
      todo="smartctl -l selftest; scrub the pool; replace the disk. Over with the next extended test that passes.")
def selftest(disk: Fields) -> Found:
    passed = selftest_passed(disk)
    if passed:
        return None
    known = passed is not None and not is_failing(disk)
    return warning(f"{disk_called(disk)}: its last self-test failed.") if known else UNKNOWN


DAMAGE = {"reallocated_sectors": "reallocated sectors", "reported_uncorrectable": "reported uncorrectable errors",
          "pending_sectors": "pending sectors", "uncorrectable_errors": "uncorrectable sectors",
          "media_errors": "media errors"}


def smart_counts(disk: Fields, host: HostState, rule: str, fields: dict[str, str],
                 now: float) -> tuple[list[str], set[float], bool]:
    """Counts above what they were when the disk was first seen, or accepted: in words, when they grew, and whether
    one that stood above cannot be read now."""
    words: list[str] = []
    times: set[float] = set()
    lost = False
    for field, noun in fields.items():
        count, key = number(disk, field), f"{disk_key(disk)} {field}"
        if count is None:
            base, total, _ = host.memory.get(rule, key, (0, 0, ()))
            lost = lost or total > base
            continue
        growth = host.memory.grown(rule, key, count, now)
        times |= {step[0] for step in growth.steps if step[0] > now - 7 * DAY}
        if growth.above > 0:
            words.append(f"{int(count)} {noun} ({int(growth.above)} more)")
    return words, times, lost


def accepts_counts(rule: str) -> Callable[[HostState, str], bool]:
    def accept(host: HostState, object: str) -> bool:
        keys = [f"{disk_key(disk)} " for name, disk in host.objects("disks") if name == object]
        return sum(host.memory.accept(rule, key) for key in host.memory.keys(rule) if key.startswith(tuple(keys))) > 0

    return accept


@rule("smart-growth", each="disks", data_risk=True, always=True, accept=accepts_counts("smart-growth"),
      why="Damage that grows is the best sign of a disk about to fail.",
      todo="Order a spare; accept as normal if it stays as it is.")
def smart_growth(disk: Fields, host: HostState, now: float) -> Found:
    """Growth warns; twice within 7 days, or with errors of its vdev, is critical."""
    words, times, lost = smart_counts(disk, host, "smart-growth", DAMAGE, now)
    if not words:
        return UNKNOWN if lost else None
    with_errors = any(name == "vdev-errors" and alert.state == "firing" and names_disk(alert.object, disk)
                      for (name, _), alert in host.alerts.items())
    severe = critical if len(times) >= 2 or with_errors else warning
    return severe(f"{disk_called(disk)} has {', '.join(words)}.")


def names_disk(object: str, disk: Fields) -> bool:
    """Whether a vdev is this disk: by its name, or by a partition of it (sda1, nvme0n1p1, ata-…-part1)."""
    vdev = object.rpartition("/")[2]
    names = {disk["name"], text(disk, "by_id"), text(disk, "vdev")} - {None, ""}
    return vdev in names or re.sub(r"(?<=\d)p\d+$|(?<=[a-z])\d+$|-part\d+$", "", vdev) in names


@rule("smart-crc", each="disks", always=True, accept=accepts_counts("smart-crc"),
      why="Transfer errors: cable, backplane or power, seldom the disk.",
      todo="Reseat or replace the cable, then accept as normal.")
def smart_crc(disk: Fields, host: HostState, now: float) -> Found:
    words, _, lost = smart_counts(disk, host, "smart-crc", {"crc_errors": "CRC errors"}, now)
    if not words:
        return UNKNOWN if lost else None
    return warning(f"{disk_called(disk)} has {words[0]}.")


@rule("smart-unknown", each="disks", always=True,
      why="Behind a RAID controller or USB bridge nobody sees it fail.",
      todo="Ask the controller's own tool.")
def smart_unknown(disk: Fields) -> Found:
    if disk.get("passed") is not None or disk.get("standby"):
        return None
    reason = text(disk, "unknown_reason")
    why = f": {without_command(reason)[:200]}" if reason else ""
    return info(f"{disk_called(disk)} reports nothing about its health{why}.")


def accept_gone(host: HostState, object: str) -> bool:
    keys = [key for key in host.memory.keys("disk-gone") if f"disks/{host.memory.get('disk-gone', key)[0]}" == object]
    return sum(host.memory.drop("disk-gone", key) for key in keys) > 0


@rule("disk-gone", on="disks", of="disk", data_risk=True, always=True, accept=accept_gone,
      why="A disk that was there does not answer any more.",
      todo="Is it plugged in? If it was taken out on purpose, accept this as normal.")
def disk_gone(disks: list[Fields], host: HostState) -> Iterator[Reading]:
    """Disks that were there, that the kernel lists no more, and that no pool has ONLINE; forgotten once no pool names
    them and every pool is well. A disk that does not answer smartctl is not gone."""
    memory = host.memory
    here = {disk_key(disk): [disk["name"], text(disk, "pool"), disk_called(disk)] for disk in disks}
    mute = {disk["name"] for disk in disks if disk.get("listed") and not text(disk, "serial")}
    known = {entry[0] for key, entry in here.items() if key != entry[0]}  # names of disks that say who they are
    pools = host.items("pools")
    leaves = {str(leaf.get(key)): text(leaf, "state") for pool in pools for leaf, _ in leaves_with_parent(pool)
              for key in ("name", "disk")}
    well = host.body("pools") is not None and all(pool.get("state") == "ONLINE" for pool in pools)
    for key in set(memory.keys("disk-gone")) - here.keys():
        name, pool, called = memory.get("disk-gone", key)
        if name in mute or (leaves.get(name) == "ONLINE" and name not in known):
            yield UNKNOWN._replace(object=f"disks/{name}")
        elif pool and well and (name not in leaves or name in known):  # another disk has its place
            memory.drop("disk-gone", key)
        else:
            yield (critical if pool else warning)(f"{called} is gone.", object=f"disks/{name}")
    for key, entry in here.items():
        if entry[0] not in mute:
            memory.keep("disk-gone", key, entry)


HOT = {"hdd": (55.0, 60.0), "ssd": (65.0, 70.0), "nvme": (75.0, 80.0)}

@rule("disk-temperature", each="disks", clear_by=5, hold=15 * MINUTE, by_number=True,
      why="Heat shortens a disk's life and makes it throttle.",
      todo="Look at fans, filters and airflow.")
def disk_temperature(disk: Fields) -> Found:
    """By kind; a disk's own limit goes before that, but for no more than 10 °C above it."""
    degrees, own = number(disk, "temperature_celsius"), number(disk, "temperature_limit_celsius")
    warn, crit = HOT.get(text(disk, "kind") or "", HOT["ssd"])
    if own is not None:
        warn, crit = min(own - 5, warn + 10), min(own, crit + 10)
    return measured(degrees, lambda: f"{disk_called(disk)} is {degrees:.0f} °C hot.",
                    limits=(warn, crit))


@rule("disk-wear", each="disks", warn=0.80, crit=0.95, always=True,
      why="Flash that is used up fails, often at once.",
      todo="Replace it; in a mirror not both at the same time.")
def disk_wear(disk: Fields) -> Found:
    worn = number(disk, "wear_ratio")
    if is_failing(disk) or number(disk, "critical_warning") not in (None, 0, HOT_ONLY):
        return UNKNOWN  # told there, with all facts
    if lacks_spare(disk):
        return critical(f"{disk_called(disk)}: {'; '.join(disk_troubles(disk))}.", worn)
    return measured(worn, lambda: f"{disk_called(disk)} has used {worn:.0%} of its rated life.")


@rule("disk-wear-forecast", each="disks", warn=180, clear_by=14, low=True, always=True,
      why="Its rated life ends within half a year.",
      todo="Plan its replacement; look at what writes so much.")
def disk_wear_forecast(disk: Fields, host: HostState, now: float) -> Found:
    """Days until a disk's rated life is used up, from one point a week over at least 30 days."""
    worn, key = number(disk, "wear_ratio"), disk_key(disk)
    if worn is None:
        return None
    points = host.memory.get("disk-wear-forecast", key, [])
    if not points or now - points[-1][0] >= 7 * DAY:
        points = [*points[-25:], [int(now), worn]]
        host.memory.keep("disk-wear-forecast", key, points)
    if now - points[0][0] < 30 * DAY or worn >= 1:
        return None
    slope = statistics.linear_regression(*zip(*points, (now, worn))).slope
    if slope <= 0:
        return None
    left = (1 - worn) / slope
    return measured(left / DAY, f"{disk_called(disk)} will have used its rated life in {days(left)} "
                                f"({percent(worn)} now).")


# Host


row("cpu", on="node", reads="cpu_ratio", says="CPU is {value:.0%} busy.", warn=0.90, clear_by=0.10, hold=30 * MINUTE,
    why="Guests wait for CPU time.",
    todo="See which guests use it; move some.")
row("memory", on="node", reads="memory_free_ratio", says="{value:.0%} of memory is free or can be freed (ARC counted).",
    warn=0.10, crit=0.05, clear_by=0.03, hold=10 * MINUTE, hold_crit=5 * MINUTE, low=True,
    why="The kernel will kill processes, guests among them.",
    todo="Shrink or move guests, or limit the ARC.")
row("io-pressure", on="node", reads="pressure_io_full_avg300_ratio",
    says="All tasks wait for I/O {value:.0%} of the time.", warn=0.20, crit=0.40, clear_part=0.5, hold=15 * MINUTE,
    why="Storage cannot keep up: guests stall.",
    todo="zpool iostat -v 5; is a disk slow, or a backup or scrub running?")
row("memory-pressure", on="node", reads="pressure_memory_full_avg300_ratio",
    says="All tasks wait for memory {value:.0%} of the time.", warn=0.05, crit=0.15, clear_part=0.5, hold=5 * MINUTE,
    why="The host is thrashing.",
    todo="Shrink or move guests.")


@rule("root-full", on="node", warn=0.85, crit=0.93, clear_by=0.03, hold=10 * MINUTE, by_number=True,
      why="A full root file system stops logs, tasks and pmxcfs.",
      todo="du -xh --max-depth=2 / | sort -h | tail")
def root_full(node: Fields) -> Found:
    used, free = number(node, "root_used_bytes"), number(node, "root_available_bytes")
    full = None if used is None or free is None else ratio(used, used + free)
    return measured(full, lambda: f"The root file system is {full:.0%} full.")


def waiting(host: HostState, rule: str, count: Any, says: str, now: float) -> Found:
    """For how long something has waited; None: it is not known whether anything does."""
    if count is None:
        return UNKNOWN
    if not count:
        host.memory.drop(rule, "")
        return None
    age = now - host.memory.since(rule, "", now)
    return measured(age, f"{says} for {days(age)}.")


@rule("reboot-needed", on="node", warn=30 * DAY,
      why="Kernel fixes are installed but not running.",
      todo="Plan a reboot.")
def reboot_needed(node: Fields, host: HostState, now: float) -> Found:
    return waiting(host, "reboot-needed", node.get("reboot_needed"), "A new kernel waits for a reboot", now)


# Storages


def storage_reading(storage: Fields, object: str | None = None) -> Reading:
    """How full a storage is; a full thin pool stops every guest on it, so it is told sooner."""
    used = storage_used_ratio(storage)
    return measured(used, lambda: f"Storage {storage['storage']} is {used:.0%} full.", object=object,
                    limits=(0.80, 0.90) if storage.get("type") == "lvmthin" else None)


@rule("storage-full", each="storages", warn=0.85, crit=0.93, clear_by=0.03, hold=10 * MINUTE, by_number=True,
      why="Guests and backups on it fail when it is full.",
      todo="Delete old backups or images, or move some.")
def storage_full(storage: Fields, host: HostState, fleet: Fleet) -> Found:
    """Use of each storage of this host alone; one on a pool or root disk that is told as full as this is told by it."""
    elsewhere = storage.get("shared") in (True, 1) and host.body("cluster") is not None
    if storage.get("enabled") in (False, 0) or elsewhere:
        return None
    below = alert_below(storage, host)
    if below is not None:
        level = fleet.layers.named("storage-full", host).level(storage_used_ratio(storage) or 0.0, None)
        if level is None or not is_milder(below.severity, level):
            return None
    return storage_reading(storage)


def alert_below(storage: Fields, host: HostState) -> Alert | None:
    """The alert about what a storage lies on being full: its pool, or the root file system. A directory lies on that
    when it is as large and as full."""
    size, used = number(storage, "total_bytes"), number(storage, "used_bytes")
    total, of_root = number(host.body("node"), "root_total_bytes"), number(host.body("node"), "root_used_bytes")
    if storage.get("type") == "dir" and size and size == total and abs((used or 0) - (of_root or 0)) < 0.01 * size:
        return host.alerts.get(("root-full", ""))
    return host.alerts.get(("pool-capacity", f"pools/{pool_of(storage.get('dataset'))}"))


row("storage-metadata", each="storages", reads="metadata_used_ratio",
    says="The metadata of thin pool {storage} is {value:.0%} full.",
    warn=0.75, crit=0.85, clear_by=0.03, hold=10 * MINUTE,
    why="A thin pool without metadata space goes read-only.",
    todo="lvextend --poolmetadatasize")


@rule("storage-inactive", each="storages", hold=10 * MINUTE,
      why="Guests and backups cannot use it.",
      todo="pvesm status; is the server of it up, is the pool imported?")
def storage_inactive(storage: Fields, host: HostState) -> Found:
    active, name = storage.get("active"), storage["storage"]
    if active or storage.get("enabled") in (False, 0):
        return None
    if active is None:
        return UNKNOWN
    users = [guest for guest in host.items("guests") if guest.get("status") == "running" and any(
        volume.get("storage") == name for volume in dicts(guest.get("volumes")))]
    needed = f"; {count_of(len(users), 'running guest uses', 'running guests use')} it" if users else ""
    return (critical if users else warning)(
        f"Storage {name} ({storage.get('type') or 'unknown type'}) is not active{needed}.")


# Guests


STOPPING = frozenset((
    "qmstop", "qmshutdown", "vzstop", "vzshutdown", "qmigrate", "vzmigrate", "hamigrate", "hastop", "stopall",
    "vzsuspend", "qmsuspend", "qmpause", "suspendall", "migrateall", "qmdestroy", "vzdestroy",
    "qmrollback", "vzrollback", "qmrestore", "vzrestore"))
STOPPING_ALL = frozenset(("stopall", "suspendall", "migrateall"))
RESTARTING = frozenset(("vzdump", "qmreboot", "vzreboot", "qmreset"))  # explain a stop only while they run
BROKEN = frozenset(("io-error", "internal-error", "guest-panicked", "watchdog"))  # it stands still [QEMU, RunState]
HA_STOPPED = frozenset(("stopped", "disabled", "request_stop", "ignored", "deleting", "disarm"))
BOOT_SECONDS = 10 * MINUTE


def absorb_tasks(state: HostState, tasks: Any, now: float) -> None:
    """Remember tasks that explain what is gone: [type, vmid or pool or None for all, started, ended]."""
    found = []
    for task in dicts(tasks):
        kind, ended = text(task, "type") or "", number(task, "ended_at")
        did = kind in STOPPING and text(task, "result") != "error"  # what failed has stopped nobody
        if (did or kind in RESTARTING or kind == "zfsremove") and ended is not None:
            of = task.get("vmid") or [*(text(task, "upid") or "").split(":"), *[""] * 7][6]  # UPID:…:type:ID:user:
            found.append([kind, str(of) or None, number(task, "started_at") or ended, ended])
    if found:
        kept = [task for task in state.memory.tasks if task[3] > now - 2 * DAY]
        state.memory.tasks = (kept + found)[-200:]
        state.memory.changed = True


WAS_RUNNING, NOT_STARTED = "was running and stopped", "should start with the host and does not run"


@rule("guest-down", each="guests", hold=2 * MINUTE, tidy=True,
      why="It was running, and nobody stopped it through Proxmox.",
      todo="Look at its task log and console; start it. A lock that was left behind: qm unlock VMID, pct unlock VMID.")
def guest_down(guest: Fields, host: HostState, now: float) -> Found:
    """A guest that was running and is not, with nothing to explain it, or that did not start with the host."""
    status, vmid = guest.get("status"), str(guest["vmid"])
    object = "guests/" + vmid
    known = host.memory.get("guest-down", object, ("", 0, None))
    if status == RUNNING:
        if known[0] != RUNNING:
            host.memory.keep("guest-down", object, [RUNNING, 0, None])
        return None
    words, since, known_boot, *_ = known
    boot, uptime = text(host.body("node"), "boot_id"), number(host.body("node"), "uptime_seconds")
    if status in (None, "unknown") or (uptime is not None and uptime < BOOT_SECONDS and status not in BROKEN):
        return UNKNOWN
    if guest.get("template"):
        return None
    severe = severe_for(guest)
    if status in BROKEN:
        return severe(f"Guest {called(guest)} is in state {status}.")
    if status not in ("stopped", "shutdown"):
        return None  # paused, prelaunch, suspended: somebody's doing
    if words == RUNNING:
        words, since = WAS_RUNNING, now
    elif not words and guest.get("onboot") and boot != known_boot and uptime is not None and uptime < 2 * HOUR:
        words, since = NOT_STARTED, now
    if words and (text(guest, "ha_state") in HA_STOPPED or explains_stop(host, vmid, since, now)):
        words = ""
    host.memory.keep("guest-down", object, [words, since, boot])
    if not words or guest.get("lock") == "suspended":  # to disk, by somebody
        return None
    if is_restarting(host, vmid, now) or (guest.get("lock") and lock_explains(guest, since, now)):
        return UNKNOWN
    left = f"; its lock '{guest['lock']}' was left behind" if guest.get("lock") else ""
    return severe(f"Guest {called(guest)} {words}; no task, backup, migration or HA explains it{left}.")


@rule("oom", on="node", accept=accepts("oom", counter=True),
      why="The kernel killed processes to get memory.",
      todo="journalctl -k -g 'Killed process' shows which.")
def oom(node: Fields, host: HostState, now: float) -> Found:
    """Processes killed for want of memory: told for an hour; critical when a guest went down with it."""
    kills = number(node, "oom_kills_total")
    if kills is None:
        return UNKNOWN
    steps = [step for step in host.memory.grown("oom", "", kills, now).steps if step[0] > now - HOUR]
    if not steps:
        return None
    at, count = steps[-1]
    hit = [alert.object for (name, _), alert in host.alerts.items()
           if name == "guest-down" and abs(alert.since - at) <= 2 * MINUTE]
    more = f"; {', '.join(hit)} went down" if hit else ""
    return (critical if hit else warning)(f"{int(count)} process(es) were killed because memory ran out{more}.", count)


def severe_for(guest: Fields) -> Callable[..., Reading]:
    """How bad it is when a guest is down."""
    managed = text(guest, "ha_state") not in (None, "", *HA_STOPPED)
    return critical if managed or "critical" in tags_of(guest) else warning


def lock_explains(guest: Fields, since: float, now: float) -> bool:
    """A lock explains a stop while the task that holds it runs; where that is not known, for an hour."""
    held = guest.get("lock_held")
    return held if isinstance(held, bool) else now - since < HOUR


def explains_stop(host: HostState, vmid: str, since: float, now: float) -> bool:
    """A task on the guest, or on all guests, around the time it was seen to have stopped."""
    uptime = number(host.body("node"), "uptime_seconds")
    earliest = since - 3 * MINUTE
    if uptime is not None and since - (now - uptime) < 2 * BOOT_SECONDS:
        earliest = min(earliest, now - uptime - 30 * MINUTE)  # stopped for a reboot
    return any(kind in STOPPING and (task_vmid == vmid or kind in STOPPING_ALL) and ended >= earliest
               and started <= since + 2 * MINUTE
               for kind, task_vmid, started, ended in host.memory.tasks)


def is_restarting(host: HostState, vmid: str, now: float) -> bool:
    """A backup in mode stop, or a restart, that has only just ended: the guest is given 2 minutes to be back."""
    return any(kind in RESTARTING and task_vmid in (vmid, None) and started <= now <= ended + 2 * MINUTE
               for kind, task_vmid, started, ended in host.memory.tasks)


NORMAL_LOCKS = ("suspended", "mounted")  # `qm suspend --todisk` and `pct mount` leave them until they are undone


@rule("guest-locked", each="guests", hold=HOUR,
      why="What no task holds any more keeps backups, snapshots and migration from the guest.",
      todo="Look at its last tasks; when none is at work: qm unlock VMID, or for a container: pct unlock VMID.")
def guest_locked(guest: Fields) -> Found:
    """A lock that was left on a guest that runs; of one that is down `guest-down` tells."""
    lock = text(guest, "lock")
    if not lock or lock in NORMAL_LOCKS or guest.get("status") != RUNNING or guest.get("lock_held") is True:
        return None
    if guest.get("lock_held") is None:
        return UNKNOWN
    return warning(f"Guest {called(guest)} has the lock '{lock}', which no task holds.")


@rule("guest-hangs", each="guests", hold=5 * MINUTE,
      why="Proxmox goes on calling it running, and it does nothing.",
      todo="Look at its console; qm status VMID --verbose; then reset it.")
def guest_hangs(guest: Fields) -> Found:
    """A running VM whose QEMU answers no question; while a task is at work on it that is no news."""
    responds = guest.get("responds")
    if responds is True or guest.get("status") != RUNNING or guest.get("lock_held") is True:
        return None
    if responds is not False:
        return UNKNOWN if guest.get("type") == "qemu" else None
    return severe_for(guest)(f"Guest {called(guest)}: its QEMU does not answer.")


@rule("guest-disk-full", each="guests", warn=0.90, crit=0.95, clear_by=0.03, hold=15 * MINUTE, by_number=True,
      why="What runs in the container fails when its disk is full.",
      todo="Delete something in it, or pct resize VMID rootfs +5G")
def guest_disk_full(guest: Fields) -> Found:
    """The root disk of a container; of a VM only its own system knows."""
    if guest.get("type") != "lxc" or guest.get("status") != RUNNING:
        return None
    full = ratio(number(guest, "disk_used_bytes"), number(guest, "disk_max_bytes"))
    return measured(full, lambda: f"The root disk of container {called(guest)} is {full:.0%} full.")


# Backups


class Coverage(NamedTuple):
    """What is known of a guest's backups: `late_seconds` since the run it missed (negative: until the next one)."""

    vmid: str
    name: str
    covered: bool | None  # by an enabled job; None: cannot be told
    late_seconds: float | None
    missed_twice: bool
    newest_ok_at: float | None


BACKUP_GRACE = 6 * HOUR


def backup_coverage(state: HostState, fleet: Fleet, now: float,
                    newest: dict[int, float] | None = None) -> list[Coverage]:
    """Every real guest of a host, with the lateness of its backup by the due times of the jobs that hold it."""
    body = state.body("backups", {})
    jobs = dicts(body.get("jobs"))
    enabled = [job for job in jobs if job.get("enabled") not in (False, 0)]
    newest = newest_backups(state, fleet) if newest is None else newest
    found = []
    for guest in state.items("guests"):
        if guest.get("template"):
            continue
        verdicts = [(job, job_holds(job, guest["vmid"], state)) for job in enabled]
        holding = [job for job, holds in verdicts if holds]
        unsure = body.get("jobs") is None or any(holds is None for _, holds in verdicts)
        ok_at = newest.get(guest["vmid"])
        if ok_at is not None and ok_at < (number(guest, "created_at") or 0):
            ok_at = None  # of the guest that had this vmid before
        late, twice = lateness(state, guest, holding, ok_at, now, schedules_known=bool(jobs))
        found.append(Coverage(str(guest["vmid"]), text(guest, "name") or str(guest["vmid"]),
                              True if holding else None if unsure else False, late, twice, ok_at))
    return found


def job_holds(job: Fields, vmid: int, state: HostState) -> bool | None:
    """Whether a job backs a guest up; None where only PVE knows who is in its pool."""
    node = text(job, "node")
    if node and node.lower() not in (state.name.lower(), (text(state.body("node"), "name") or state.name).lower()):
        return False
    exclude, guests = job.get("exclude"), job.get("guests")
    if isinstance(exclude, list) and str(vmid) in [str(excluded) for excluded in exclude]:
        return False
    if guests == "all":
        return True
    if isinstance(guests, list) and (guests or not text(job, "pool")):
        return str(vmid) in [str(held) for held in guests]
    return None if text(job, "pool") else False


def newest_backups(state: HostState, fleet: Fleet) -> dict[int, float]:
    """When the newest good backup of each guest began; also as other nodes of the cluster know it (migration)."""
    found: dict[int, float] = {}
    for mate in fleet.mates(state):
        for guest in mate.items("backups.guests"):
            good = guest.get("newest_ok")
            ended, began = number(good, "ended_at"), number(good, "started_at")
            if ended is not None and is_number(guest.get("vmid")):
                began = ended - (number(good, "duration_seconds") or 0) if began is None else began
                found[guest["vmid"]] = max(found.get(guest["vmid"], 0), began)
    return found


def lateness(state: HostState, guest: Fields, holding: list[Fields], ok_at: float | None, now: float, *,
             schedules_known: bool) -> tuple[float | None, bool]:
    """Seconds since the run that should have been (negative: until it), and whether two have been missed. A run is
    missed once its time, as the agent tells it, has passed; what was due before the guest was there, or its job had
    this schedule, does not count."""
    worst: tuple[float | None, bool] = (None, False)
    since = state.memory.get("backup-overdue", f"guests/{guest['vmid']}", {})
    for job in holding:
        start = max(ok_at or number(guest, "created_at") or 0, since.get(job_key(job), 0 if not since else now))
        due = missed_times(job, start, was_good=ok_at == start)
        if is_at_work(job, now):
            due = due[:-1]  # what was due last is being made
        first = due[0] if due else number(job, "next_run_at")
        if first is not None and (worst[0] is None or now - first > worst[0]):
            worst = now - first, len(due) > 1 and now - due[1] > BACKUP_GRACE
    if worst[0] is None and ok_at is not None and not (schedules_known and not holding):
        late = now - ok_at - 20 * HOUR  # no schedule known: a day, then 26 h with the grace, 50 h
        worst = late, now - ok_at > 50 * HOUR
    return worst


def is_at_work(job: Fields, now: float) -> bool:
    """Whether the run that was due last is under way: a job may take all night. No excuse for the run after it, nor for
    more than a day."""
    began, times = number(job, "last_run_at"), job.get("due_times")
    return (text(job, "last_state") in ("starting", "started") and began is not None and now - began < DAY
            and isinstance(times, list) and all(not is_number(time) or time <= began + MINUTE for time in times))


def job_key(job: Fields) -> str:
    return f"{job.get('id')} {job.get('schedule')}"


def missed_times(job: Fields, last: float, *, was_good: bool) -> list[float]:
    """The times later than `last` at which a job was due, oldest first. The agent tells the last few: when all of them
    were missed since a good run, the first was about one interval after that."""
    told = job.get("due_times")
    times = sorted(time for time in told if is_number(time)) if isinstance(told, list) else []
    missed = [time for time in times if time > last]
    if was_good and len(missed) == len(times) > 1:
        missed[0] = min(missed[0], last + missed[1] - missed[0])
    return missed


def coverage(state: HostState, fleet: Fleet, now: float) -> list[Coverage]:
    """backup_coverage as the last judging left it, which is worked out anew for each report that brings something
    about it, and each 5 minutes."""
    kept = state.coverage
    mark = state.sections.get("backups", NOTHING).stamp, state.guest_counts[2]
    fresh = kept is not None and kept[0] == mark and 0 <= now - kept[1] < 6 * MINUTE  # the next backups come after 5
    return kept[2] if kept is not None and fresh else backup_coverage(state, fleet, now)


def keep_coverage(host: HostState, fleet: Fleet, now: float) -> list[Coverage]:
    """Work the coverage out, and remember since when each guest is known in which job with which schedule."""
    jobs = [job for job in host.items("backups.jobs") if job.get("enabled") not in (False, 0)]
    guests = dict(host.objects("guests"))
    for object in set(host.memory.keys("backup-overdue")) - guests.keys():
        host.memory.drop("backup-overdue", object)
    backed_up = newest_backups(host, fleet)
    for object, guest in guests.items():
        dated = number(guest, "created_at") is not None or guest["vmid"] in backed_up
        known, new = host.memory.get("backup-overdue", object, {}), host.memory.known_from(now) if dated else now
        holding = [job_key(job) for job in jobs if job_holds(job, guest["vmid"], host)]
        host.memory.keep("backup-overdue", object, {key: known.get(key, new) for key in holding})
    found = backup_coverage(host, fleet, now, backed_up)
    host.coverage = (host.sections.get("backups", NOTHING).stamp, host.guest_counts[2]), now, found
    return found


@rule("backup-overdue", on="backups", of="guest", data_risk=True, always=True,
      why="There is no backup as recent as the schedule promises.",
      todo="Look at the last vzdump task and whether the job runs.")
def backup_overdue(backups: Fields, host: HostState, fleet: Fleet, now: float) -> Iterator[Reading]:
    for guest in keep_coverage(host, fleet, now):
        if guest.late_seconds is not None and guest.late_seconds > BACKUP_GRACE:
            when = "it has none yet"
            if guest.newest_ok_at is not None:
                when = f"the newest is {format_duration(now - guest.newest_ok_at)} old"
            yield (critical if guest.missed_twice else warning)(
                f"The backup of guest {guest.vmid} ({guest.name}) is {format_duration(guest.late_seconds)} late; "
                f"{when}.", guest.late_seconds, f"guests/{guest.vmid}")


def worst_backup(state: HostState, fleet: Fleet, now: float) -> float | None:
    """The host table's column: seconds the latest backup is late, 0 or less = all on time, None = not known."""
    late = [guest.late_seconds for guest in known_coverage(state, fleet, now) or () if guest.late_seconds is not None]
    worst = max(late, default=None)
    return worst if worst is None or worst > BACKUP_GRACE else min(worst, 0)


def known_coverage(state: HostState, fleet: Fleet, now: float) -> list[Coverage] | None:
    """The backups of a host's guests; None where they are not known, or told in a way that nobody can read."""
    if not (state.has("backups") and state.has("guests")):
        return None
    try:
        return coverage(state, fleet, now)
    except ODD:  # the list of backups says so
        return None


@rule("backup-failed", each="guests", on="backups", data_risk=True, always=True, tidy=True,
      why="The newest backup of it does not exist.",
      todo="Read the task log; run the backup by hand.")
def backup_failed(guest: Fields, host: HostState) -> Found:
    """The newest run failed; two in a row are critical."""
    vmid, object = guest["vmid"], f"guests/{guest['vmid']}"
    runs = runs_of(host, vmid)
    failed, good = number(runs.get("newest_failed"), "ended_at"), number(runs.get("newest_ok"), "ended_at") or 0
    if guest.get("template") or failed is None or max(good, number(guest, "created_at") or 0) >= failed:
        host.memory.drop("backup-failed", object)
        return None
    times = [at for at in host.memory.get("backup-failed", object, ()) if good < at != failed] + [failed]
    host.memory.keep("backup-failed", object, times[-5:])
    why = (text(runs["newest_failed"], "error") or "no reason told")[:200]
    which = "backup" if len(times) < 2 else f"{len(times)} backups"
    return (warning if len(times) < 2 else critical)(f"The last {which} of guest {called(guest)} failed: {why}",
                                                     len(times))


def runs_of(host: HostState, vmid: Any) -> Fields:
    """The newest good and the newest failed backup of a guest."""
    return first_of(host.items("backups.guests"), vmid=vmid) or {}


@rule("backup-job", each="backups.jobs", on="backups", data_risk=True, always=True, tidy=True,
      why="A job that fails as a whole backs nobody up.",
      todo="Read the newest vzdump task without a guest's number; is the storage there?")
def backup_job(job: Fields, host: HostState) -> Found:
    """What PVE says of a job's last run on this node (its state file): one alert a job, with the reason."""
    object, told, began = f"backups/{job.get('id')}", text(job, "last_state"), number(job, "last_run_at")
    if job.get("enabled") in (False, 0):
        return None
    if told in (None, "", "created", "starting", "started"):
        return UNKNOWN
    if told == "OK" or told.startswith("WARNINGS"):
        told = None
    elif told == "job errors" and began is not None:
        told = why_all_failed(job, host, began)
    if told is None:
        host.memory.drop("backup-job", object)
        return None
    runs = [run for run in host.memory.get("backup-job", object, []) if run != began] + [began]
    host.memory.keep("backup-job", object, runs[-5:])
    again = f", {len(runs)} times in a row" if len(runs) > 1 else ""
    return (critical if len(runs) > 1 else warning)(f"Backup job {job.get('id')} failed{again}: {told[:200]}",
                                                    len(runs))


def why_all_failed(job: Fields, host: HostState, began: float) -> str | None:
    """Proxmox says "job errors" as soon as one guest has failed, which is told by that guest; None where any guest of
    the job was backed up since."""
    runs = [run for run in host.items("backups.guests") if job_holds(job, run["vmid"], host) is not False]
    if any((number(run.get("newest_ok"), "ended_at") or 0) >= began for run in runs):
        return None
    why = [text(run["newest_failed"], "error") for run in runs
           if (number(run.get("newest_failed"), "ended_at") or 0) >= began]
    return "; ".join(["job errors", *dict.fromkeys(filter(None, why))])


@rule("backup-excludes", each="guests", on="backups", always=True,
      why="What is not in the backup cannot be brought back from it.",
      todo="Set backup=1 on the disk, or accept that it is meant so and switch the rule off for this guest.")
def backup_excludes(guest: Fields, host: HostState) -> Found:
    """Guests whose last good backup has none of their disks, or not all."""
    good = runs_of(host, guest["vmid"]).get("newest_ok")
    left_out = good.get("excluded_disks") if isinstance(good, dict) else None
    volumes = [name for volume in dicts(guest.get("volumes")) if (name := text(volume, "name"))]
    if guest.get("template") or not isinstance(left_out, list) or not left_out or not isinstance(good, dict):
        return None
    disks, size = ", ".join(map(str, left_out[:5])), number(good, "size_bytes")
    if set(volumes) <= set(map(str, left_out)) and (volumes or size is not None and size < 1 << 20):
        return warning(f"The backup of guest {called(guest)} holds none of its disks ({disks}): they are set to "
                       "backup=0.")
    return info(f"The backup of guest {called(guest)} leaves out {disks}.")


@rule("backup-missing", on="backups", hold=HOUR, always=True,
      why="A guest in no job is never backed up.",
      todo="Add them to a job, or tag them no-backup.")
def backup_missing(backups: Fields, host: HostState, fleet: Fleet, now: float) -> Found:
    """Guests in no enabled job, in one list; a guest tagged no-backup is meant to have none."""
    bare = [f"{guest.vmid} ({guest.name})" for guest in coverage(host, fleet, now)
            if guest.covered is False and guest.vmid not in host.no_backup
            and (guest.newest_ok_at is None or now - guest.newest_ok_at > 8 * DAY)]
    many = count_of(len(bare), "guest is", "guests are")
    return warning(f"{many} in no backup job: {some_of(bare, 10)}.", len(bare)) if bare else None


# Answers that are a danger: see the section answers


@rule("copy-missing", on="backups", warn=None, hold=HOUR, always=True,
      why="If this host burned now, these guests would be lost with their backups.",
      todo="Back them up to a storage of another machine (PBS, NFS, CIFS), replicate them, or tag them no-backup.")
def copy_missing(backups: Fields, host: HostState, fleet: Fleet, now: float) -> Found:
    """Guests older than a day that are backed up, but only onto their own host. The backup rules tell who is late or
    in no job."""
    if fleet.copies is None:
        return UNKNOWN
    in_time = {guest.vmid for guest in coverage(host, fleet, now) if guest.newest_ok_at is not None}
    in_time -= {str(guest["vmid"]) for guest in host.items("guests")
                if wants_no_backup(guest) or now - (number(guest, "created_at") or 0) < DAY}
    bare = [called(row) for row in copy_rows(host, fleet.copies, now) if row["verdict"] == "warning"
            and str(row["vmid"]) in in_time and "only copy" in row["reason"]]
    if not bare:
        return None
    return warning(f"{count_of(len(bare), 'guest')} would be lost with this host, backups included: "
                   f"{some_of(bare, 10)}.", len(bare))


@rule("suspects-hold-pool", each="pools", on="disks pools", always=True, data_risk=True,
      why="If the disks that are suspect fail, the pool is lost.",
      todo="Replace the suspect disk before anything else; until then no scrub, and check the backups.")
def suspects_hold_pool(pool: Fields, host: HostState) -> Found:
    """A vdev that would not outlive the failure of the members that SMART or their errors make suspect."""
    worst = min(pool_margins(host, pool), key=lambda vdev: vdev.with_suspects, default=None)
    if worst is None or worst.with_suspects >= 0 or worst.margin < 0:
        return None
    named = ", ".join(f"{leaf.get('disk') or leaf.get('name')} ({why[0]})" for leaf, _, why in worst.suspects[:3])
    return critical(f"{worst.vdev} of {worst.pool} hangs on suspect disks: {named}; {may_fail(worst.margin)}.",
                    worst.with_suspects)


@rule("blind-spot", on="safeguards", always=True, hold=HOUR,
      why="When something fails here, nobody hears of it.",
      todo="The list of blind spots names what to do for each.")
def blind_spot(safeguards: Fields, host: HostState, fleet: Fleet) -> Found:
    """What would stay silent on this host, in one line; a danger by itself where ZFS or the cluster counts on it."""
    found = [spot for spot in silent_failures(host, vmids_of_cluster(fleet, host)) if spot[0] not in TOLD_ELSEWHERE]
    if not found:
        return None
    grave = any(what in GRAVE_SPOTS for what, _, _ in found)
    return (warning if grave else info)("Blind spots: " + "; ".join(why for _, why, _ in found) + ".", len(found))


# Upkeep


@rule("updates-security", on="updates", warn=14 * DAY, always=True,
      why="Known holes stay open.",
      todo="apt update && apt dist-upgrade")
def updates_security(updates: Fields, host: HostState, now: float) -> Found:
    count = number(updates, "security")
    if count is None and number(updates, "pending") is not None and host.memory.keys("updates-security"):
        count = 0  # the list marks security updates here, and marks none any more
    says = count_of(count or 0, "security update waits", "security updates wait")
    return waiting(host, "updates-security", count, says, now)


@rule("updates-stale", on="updates", warn=7 * DAY, always=True,
      why="Without a fresh list nobody knows what is missing.",
      todo="systemctl status pve-daily-update.timer; check the repositories.")
def updates_stale(updates: Fields, now: float) -> Found:
    as_of = number(updates, "as_of")
    return UNKNOWN if as_of is None else measured(
        now - as_of, f"The list of updates is {days(now - as_of)} old: apt update does not run.")


@rule("certificate", each="certificates", low=True, always=True, tidy=True,
      why="When it expires, browsers and other nodes refuse the host.",
      todo="pvenode acme cert renew, or pvecm updatecerts --force")
def certificate(cert: Fields, host: HostState, now: float) -> Found:
    """Time left; PVE renews ACME certificates at 30 d and its own at 14 d, so less means that failed. One that lives
    for days only is judged by the part of its life that is left: pveupdate renews it every day. Where its beginning is
    not told, its life is what it had left when it was first seen to be renewed."""
    expires, starts, object = number(cert, "expires_at"), number(cert, "starts_at"), f"certificates/{cert.get('file')}"
    if expires is None:
        return UNKNOWN
    left = expires - now
    known, life = host.memory.get("certificate", object, (expires, None))
    life = left if expires > known else life
    host.memory.keep("certificate", object, [expires, life])
    life = expires - starts if starts is not None else life or math.inf
    issuer, subject = text(cert, "issuer") or "", text(cert, "subject") or ""
    own = bool(issuer) and ("proxmox" in issuer.lower() or "PVE" in issuer or issuer == subject)
    acme = cert.get("acme")
    warn = 25 * DAY if acme else 12 * DAY if own else 21 * DAY
    failed = "; it was not renewed" if acme or own else ""
    return measured(left, lambda: certificate_text(str(cert.get("file")), left, failed),
                    limits=(min(warn, life / 3), min(5 * DAY, life / 6)))


def certificate_text(file: str, left: float, failed: str) -> str:
    when = f"expires in {format_duration(left)}" if left > 0 else f"expired {format_duration(-left)} ago"
    return f"Certificate {file} {when}{failed}."


@rule("clock-skew", on=AGENT, warn=30, crit=120,
      why="Wrong time breaks the cluster, certificates and logs.",
      todo="chronyc tracking; systemctl restart chrony")
def clock_skew(host: HostState) -> Found:
    """How far the clock is off at the least in the last 3 live reports."""
    value = min(host.skews) if len(host.skews) >= 3 else None
    return measured(value, lambda: f"The host's clock is {format_duration(value or 0.0)} off the server's.")


@rule("clock-unsynced", on="time_sync", hold=30 * MINUTE,
      why="The clock will drift away.",
      todo="chronyc sources -v")
def clock_unsynced(time_sync: Fields) -> Found:
    synchronised = time_sync.get("synchronised")
    if synchronised is None:
        return UNKNOWN
    return None if synchronised else warning(
        f"The clock is not synchronised ({text(time_sync, 'source') or 'no source'}).")


# Replication, HA, services, the agent


@rule("replication", each="replication", tidy=True,
      why="The copy on the other node gets older.",
      todo="pvesr status; read the job's log in /var/log/pve/replicate.")
def replication(job: Fields, host: HostState, now: float) -> Found:
    """Failures, and runs that were due and did not bring a good sync: three of them, or one for hours."""
    said, object = f"Replication {job['id']} to {job.get('target')}", f"replication/{job['id']}"
    if job.get("enabled") in (False, 0):
        running = [guest["vmid"] for guest in host.items("guests") if guest.get("status") == RUNNING]
        return info(f"{said} is disabled while its guest runs.") if job.get("vmid") in running else None
    fails, last = number(job, "fail_count"), number(job, "last_sync_at")
    schedule, since = host.memory.get("replication", object, (None, 0.0))
    if schedule != job.get("schedule"):
        since = host.memory.known_from(now) if last else now
        host.memory.keep("replication", object, [job.get("schedule"), since])
    start = max(last or 0, since)
    missed = [due for due in missed_times(job, start, was_good=last == start) if now - due > 30 * MINUTE]
    late = len(missed) >= 3
    if not fails and not late and not (missed and now - missed[0] > BACKUP_GRACE):
        return UNKNOWN if fails is None else None
    why, shown = without_command(text(job, "error") or ""), f"{format_duration(now - last)} ago" if last else "never"
    return (critical if late or (fails or 0) >= 3 else warning)(
        f"{said}: {count_of(fails or 0, 'failure')} in a row, last good sync {shown}{f': {why[:200]}' if why else ''}.",
        fails)


@rule("ha-stale", on="ha", of="service", always=True,
      why="A dead resource manager lets the watchdog reset the node.",
      todo="systemctl status pve-ha-lrm pve-ha-crm")
def ha_stale(ha: Fields, host: HostState) -> Iterator[Reading]:
    """LRM or CRM without a sign of life, on a host where HA has something to do: an idle one stops writing."""
    section = host.sections["ha"]
    if not ha.get("services") or section.stamp is None:
        return
    for part, name, as_of in (("lrm", "local resource", number(ha.get("lrm"), "as_of")),
                              ("manager", "cluster", number(ha, "manager_as_of"))):
        silent = None if as_of is None else section.stamp.time - as_of
        if silent is not None and silent > 2 * MINUTE:
            yield warning(f"HA's {name} manager has been silent for {format_duration(silent)}.", silent, f"ha/{part}")


TIME_SERVICES = frozenset(("chrony", "chronyd", "ntpsec", "ntp", "systemd-timesyncd"))
CORE_SERVICES = frozenset(("pve-cluster", "pvestatd", "pveproxy"))
WATCHED_SERVICES = CORE_SERVICES | frozenset((
    "pvedaemon", "pvescheduler", "pve-firewall", "pve-ha-crm", "pve-ha-lrm", "corosync", "qmeventd", "watchdog-mux",
    "zfs-zed", "zed", "smartmontools", "smartd", "chrony", "chronyd", "rrdcached"))


@rule("service-failed", each="services", hold=10 * MINUTE, tidy=True,
      why="What it does is not being done.",
      todo="systemctl status UNIT; journalctl -u UNIT")
def service_failed(unit: Fields, host: HostState, now: float) -> Found:
    """Services that Proxmox, ZFS and the clock need: failed, stopped, disabled, or started again and again."""
    name, active, enabled = service_name(unit), text(unit, "active"), text(unit, "enabled")
    if name not in WATCHED_SERVICES or text(unit, "load") in ("not-found", "masked"):
        return None
    restarts, severe = number(unit, "restarts"), critical if name in CORE_SERVICES else warning
    if restarts is not None:
        lately = host.memory.grown("service-failed", f"services/{name}", restarts, now).lately(now - HOUR)
        if lately >= 3 and active != "failed":
            return severe(f"Service {name} was restarted {int(lately)} times in an hour: it ends again and again.")
    if active is None:
        return UNKNOWN
    if active != "failed" and not (active == "inactive" and enabled in ("enabled", "disabled") and needs(host, name)):
        return None
    return severe(f"Service {name} is {active}{' and disabled' if enabled == 'disabled' else ''}.")


def needs(host: HostState, service: str) -> bool:
    """Whether a service has work on this host at all: corosync only in a cluster, zed only with pools."""
    if service == "corosync":
        return host.body("cluster") is not None
    if service in TIME_SERVICES:  # one that keeps the time is enough
        return not any(service_name(unit) in TIME_SERVICES and text(unit, "active") == "active"
                       for unit in host.items("services"))
    if service in ("smartmontools", "smartd"):  # does not start in a virtual machine, which has no real disks
        return host.body("disks") != []
    if service in ("zfs-zed", "zed"):
        return bool(host.body("pool_states") or host.body("pools"))
    return service not in ("pve-ha-crm", "pve-ha-lrm", "watchdog-mux", "pve-firewall")


# Beginnings of units that Proxmox, ZFS or the way to the storages need, as Debian and Proxmox name them.
NEEDED_UNITS = ("pve", "proxmox", "zfs", "zpool", "zed", "corosync", "ceph", "lxc", "qmeventd", "watchdog", "ksmtuned",
                "rrdcached", "spiceproxy", "smart", "lvm2", "iscsi", "open-iscsi", "multipath", "nfs", "rpcbind",
                "mnt-", "networking", "ifupdown", "frr", "postfix", "cron", "chrony", "systemd-modules",
                "systemd-udevd", "dm-event")


@rule("unit-failed", on="failed_units", of="service", hold=10 * MINUTE,
      why="Proxmox or ZFS need it, and it has failed.",
      todo="systemctl status UNIT; journalctl -u UNIT; systemctl reset-failed UNIT when it is over.")
def unit_failed(units: list[Any], host: HostState) -> Iterator[Reading]:
    """Failed units beyond the services that are watched one by one: imports, mounts, timers' jobs."""
    watched = {text(unit, "unit") for unit in host.items("services") if service_name(unit) in WATCHED_SERVICES}
    for unit in units:
        if isinstance(unit, str) and unit.startswith(NEEDED_UNITS) and unit not in watched:
            yield warning(f"Unit {unit[:100]} has failed.", object=f"services/{unit[:100].removesuffix('.service')}")


@rule("mail-queue", on="mail_queue", hold=10 * MINUTE,
      why="The host's own warnings do not reach anybody.",
      todo="mailq says why it cannot be delivered; set a relayhost in /etc/postfix/main.cf, then postqueue -f")
def mail_queue(queue: Fields, now: float) -> Found:
    counts = [number(queue, key) for key in ("deferred", "active")]
    waiting, oldest = sum_known(counts), number(queue, "oldest_at")
    age = 0 if oldest is None or not waiting else now - oldest
    if waiting is None:
        return UNKNOWN
    if waiting <= 20 and age <= 6 * HOUR:
        return None
    return warning(f"{int(waiting)} mails wait to leave the host, the oldest for {format_duration(age)}.", waiting)


@rule("section-failing", on=AGENT, each="failures",
      why="This part of the host is not being watched.",
      todo="proxmox-monitor-agent once --explain shows the command that fails.")
def section_failing(failure: Fields) -> Found:
    """A section of which nothing could be had in 3 of its ticks in a row."""
    if failure["count"] < 3:
        return UNKNOWN
    name = failure["name"].replace("_", " ")
    return warning(f"The agent cannot collect the {name}: {failure_words(failure)}.", failure["count"])


# What a rule's `todo` calls the object, and its alert by name: not with a name that a shell or a reader could mistake.
PLACEHOLDERS = {"pools": "POOL", "services": "UNIT", "units": "UNIT", "guests": "VMID"}


def todo_of(state: Any, rule: str, object: str | None) -> str:
    """What to do about an alert; of a section that could not be had also what the agent was told."""
    told = RULE[rule].todo if rule in RULE else ""
    kind, _, name = (object or "").partition("/")
    if kind in PLACEHOLDERS and name.isascii() and name.isprintable():
        told = re.sub(rf"\b{PLACEHOLDERS[kind]}\b", lambda _: shlex.quote(name.partition("/")[0]), told)
    error = state.sections.get(name, NOTHING).error if kind == "sections" and isinstance(state, HostState) else None
    return f"{told} It was told: {str(error['detail'])[:300]}" if error and error.get("detail") else told


@rule("spool-dropped", on=AGENT, accept=accepts("spool-dropped", counter=True),
      why="History has a hole.",
      todo="Was the server away for long? Raise [spool] max_mb.")
def spool_dropped(host: HostState, now: float) -> Found:
    """Reports the agent had to throw away because its spool was full: told for a day."""
    dropped = number(host.agent, "dropped")
    if dropped is None:
        return UNKNOWN
    lost = host.memory.grown("spool-dropped", "", dropped, now, from_zero=True).lately(now - DAY)
    many = count_of(lost or 0, "report is", "reports are")
    return warning(f"The agent's spool was full: {many} lost.", lost) if lost else None


@rule("agent-old", on=AGENT,
      why="An old agent knows fewer things.",
      todo="Install the newer one.")
def agent_old(host: HostState) -> Found:
    have, want = release(text(host.agent, "version")), release(VERSION)
    if have and want and (want[0] > have[0] or want[1] - have[1] > 2):
        return info(f"The agent is version {text(host.agent, 'version')}, the server {VERSION}.")
    return None


def release(version: str | None) -> tuple[int, int] | None:
    """'1.4.2' -> (1, 4)"""
    parts = (version or "").split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) > 1 and parts[0].isdigit() and parts[1].isdigit() else None


@rule("host-twice", on=AGENT,
      why="Two machines mix their reports: neither can be judged.",
      todo="Was this host cloned? Give each its own host_id and token.")
def host_twice(host: HostState, now: float) -> Found:
    if host.twice_at is None or now - host.twice_at >= 15 * MINUTE:
        return None
    return critical(f"Two machines report as {host.name}: their reports take turns.")


def watch_agent(state: HostState, report: Fields, stamp: Stamp) -> None:
    """What rules want to know of the reports themselves: skew, failing sections, two senders under one name."""
    if stamp.received_at - report["time"] < 2 * MINUTE:
        offset = abs(number(report.get("agent"), "clock_offset") or 0.0)
        state.skews = (*state.skews, max(offset, report["time"] - stamp.received_at))[-3:]
        watch_runs(state, report["time"], stamp)
    failed = report.get("errors") or {}
    well = report.keys() | set(report.get("absent") or ())
    failures = {name: count for name, count in state.failures.items() if name not in well}
    for name in failed.keys() - well:
        failures[name] = failures.get(name, 0) + 1
    state.failures = failures


def watch_runs(state: HostState, at: float, stamp: Stamp) -> None:
    """Two agents under one name: a run goes on after a later one has begun."""
    begun = {run: span for run, span in state.runs.items() if span[1] > at - 10 * MINUTE}
    if stamp.run in begun and any(run != stamp.run and begun[stamp.run][0] < span[0] and span[0] + 5 < at
                                  for run, span in begun.items()):
        state.twice_at = stamp.received_at
    begun[stamp.run] = begun.get(stamp.run, (at, at))[0], at
    state.runs = begun


# Clusters: facts that several nodes report are judged once, over all the fresh views there are


class View(NamedTuple):
    """What one node says of its cluster; what it says in a strange form is not known."""

    host: HostState
    quorate: bool | None
    votes_expected: float | None
    votes_present: float | None
    votes_needed: float | None
    members: dict[str, bool]  # name and whether it is online


class Cluster(NamedTuple):
    name: str
    views: list[View]  # those that are fresh


def view_of(host: HostState) -> View:
    body = host.body("cluster", {})
    quorate = body.get("quorate")
    members = {name: member.get("online") in (True, 1) for member in dicts(body.get("members"))
               if (name := text(member, "name"))}
    return View(host, quorate if isinstance(quorate, bool) else None, number(body, "votes_expected"),
                number(body, "votes_present"), number(body, "votes_needed"), members)


def list_clusters(fleet: Fleet, now: float) -> list[tuple[Cluster, list[int]]]:
    """Every cluster with its fresh views and the ids of all its hosts. Two of one name are told apart by a member."""
    groups: list[list[HostState]] = []
    grouped: set[int] = set()
    for state in fleet.hosts.values():
        if state.id not in grouped and isinstance(state.body("cluster"), dict):
            group = fleet.cluster_of(state)
            grouped |= {mate.id for mate in group}
            groups.append(group)
    names = [text(group[0].body("cluster"), "name") or "unnamed" for group in groups]
    found = []
    for name, group in zip(names, groups):
        views = [view_of(host) for host in group if (stamp := host.sections.get("cluster", NOTHING).stamp) is not None
                 and now - stamp.received_at < 3 * MINUTE]
        shown = name if names.count(name) == 1 else f"{name} ({min(host.name for host in group)})"
        found.append((Cluster(shown, views), [host.id for host in group]))
    return found


def disagreement(views: list[View]) -> str | None:
    """In what the nodes of a cluster contradict each other."""
    if len({view.quorate for view in views} - {None}) > 1:
        without = sorted(view.host.name for view in views if view.quorate is False)
        return f"{', '.join(without[:5])} have no quorum, the others have"
    if len({frozenset(view.members) for view in views if view.members}) > 1:
        return "they name different members"
    online = {frozenset(name for name, here in view.members.items() if here) for view in views if view.members}
    return "they see different members online" if len(online) > 1 else None


@rule("cluster-quorum", on=SHARED, each="clusters", hold=MINUTE, data_risk=True,
      why="Without quorum /etc/pve is read-only: nothing starts, HA fences nodes.",
      todo="pvecm status; bring nodes or their network back.")
def cluster_quorum(cluster: Cluster) -> Found:
    words = {view.quorate for view in cluster.views} - {None}
    if words == {True}:
        return None
    if words != {False}:
        return UNKNOWN
    view = cluster.views[0]
    votes = ""
    if view.votes_present is not None and view.votes_expected is not None:
        votes = f" ({int(view.votes_present)} of {int(view.votes_expected)} votes)"
    return critical(f"Cluster {cluster.name} has lost quorum{votes}: nothing can be started or changed.",
                    view.votes_present)


@rule("cluster-disagree", on=SHARED, each="clusters", hold=MINUTE,
      why="The cluster is split, or a node's view is wrong.",
      todo="pvecm status on each node; journalctl -u corosync")
def cluster_disagree(cluster: Cluster) -> Found:
    found = disagreement(cluster.views)
    return critical(f"The nodes of cluster {cluster.name} disagree: {found}.") if found else None


@rule("cluster-member", on=SHARED, each="clusters", hold=5 * MINUTE,
      why="The cluster can lose fewer nodes than it was built for.",
      todo="pvecm status; start the node, or remove it for good.")
def cluster_member(cluster: Cluster, host: Shared, fleet: Fleet) -> Found:
    """Votes that are missing; a member that is known here to be offline is told by its own alert."""
    quorate = [view for view in cluster.views if view.quorate] or cluster.views
    missing = [view.votes_expected - view.votes_present for view in quorate
               if view.votes_expected is not None and view.votes_present is not None]
    if not missing or max(missing) < 1:
        return None
    away = sorted({name for view in quorate for name, online in view.members.items() if not online})
    offline = {name for state in fleet.hosts.values() if ("host-offline", "") in state.alerts
               for name in node_names(state)}
    if away and all(name.lower() in offline for name in away):
        return None
    return warning(f"Cluster {cluster.name} misses {int(max(missing))} of its votes"
                   f"{': ' + ', '.join(away[:5]) if away else ''}.", max(missing))


@rule("cluster-margin", on=SHARED, each="clusters", hold=5 * MINUTE,
      why="One more failure stops the whole cluster.",
      todo="Add a node or a QDevice.")
def cluster_margin(cluster: Cluster) -> Found:
    view = cluster.views[0]
    if len(view.members) > 1 and view.quorate and view.votes_present is not None \
            and view.votes_present == view.votes_needed:
        return info(f"Cluster {cluster.name} loses quorum with the next vote it loses.", 0)
    return None


@rule("cluster-clock", on=SHARED, each="clusters", warn=0.5, clear_by=0.1, hold=5 * MINUTE,
      why="Corosync and Ceph need equal clocks.",
      todo="chronyc tracking on both nodes.")
def cluster_clock(cluster: Cluster) -> Found:
    """Clocks of one cluster against each other, by each node's own time source."""
    offsets = {view.host.name: number(view.host.body("time_sync"), "offset_seconds") for view in cluster.views}
    known = sorted((offset, name) for name, offset in offsets.items() if offset is not None)
    if len(known) < 2:
        return None
    apart = known[-1][0] - known[0][0]
    return measured(apart, f"The clocks of {known[0][1]} and {known[-1][1]} in cluster {cluster.name} are {apart:.1f} "
                           "s apart.")


HA_TROUBLE = {"error": critical, "fence": critical, "recovery": warning}  # recovery: no node for it has been found


@rule("ha-service", on=SHARED, each="clusters", of="service", hold=2 * MINUTE, hold_crit=0,
      why="HA has given up on it, is fencing its node, or finds no node for it.",
      todo="ha-manager status; set it to disabled, mend it, start it.")
def ha_service(cluster: Cluster) -> Found:
    """HA services as the node tells that sees them worst: a stale or untrue view must not hide one."""
    services = [(service, text(service, "state") or "") for view in cluster.views
                for service in view.host.items("ha.services")]
    return worst_each(HA_TROUBLE[state](
        f"HA service {service.get('id')} of cluster {cluster.name} on {service.get('node')} is in state {state}.",
        object=f"clusters/{cluster.name}/ha/{service.get('id')}")
        for service, state in services if state in HA_TROUBLE)


@rule("ha-disarmed", on=SHARED, each="clusters", of="service", hold=MINUTE,
      why="HA watches nothing: a node that dies takes its guests with it.",
      todo="ha-manager crm-command arm-ha, when the work is done.")
def ha_disarmed(cluster: Cluster) -> Found:
    for view in cluster.views:
        disarm = view.host.body("ha", {}).get("disarm")
        if isinstance(disarm, dict) and (disarm.get("state") or disarm.get("mode")):
            return warning(f"HA of cluster {cluster.name} is {text(disarm, 'state') or 'disarmed'} "
                           f"(mode {text(disarm, 'mode') or 'unknown'}): no service is watched or restarted.")
    return None


HA_NODES = {"fence": critical, "unknown": warning, "gone": warning, "maintenance": info}


@rule("ha-node", on=SHARED, each="clusters", of="service", hold=5 * MINUTE, hold_crit=0,
      why="HA fences the node, has lost it, or keeps it free of services.",
      todo="ha-manager status; is the node up? ha-manager crm-command node-maintenance disable NODE")
def ha_node(cluster: Cluster, host: Shared, fleet: Fleet) -> Found:
    """Nodes as HA sees them; one that is known here to be offline is told by its own alert, but for its fencing."""
    offline = {name for view in cluster.views for mate in fleet.cluster_of(view.host)
               if ("host-offline", "") in mate.alerts for name in node_names(mate)}
    nodes = [(str(node.get("name")), text(node, "state") or "") for view in cluster.views
             for node in view.host.items("ha.nodes")]
    return worst_each(HA_NODES[state](f"HA has node {name} of cluster {cluster.name} in state {state}.",
                                      object=f"clusters/{cluster.name}/ha-node/{name}")
                      for name, state in nodes
                      if state in HA_NODES and (state == "fence" or name.lower() not in offline))


def ceph_reading(ceph: Any, of: str) -> Reading | None:
    """Ceph's health by the checks that are not muted; its one word where it tells no checks."""
    word, checks = text(ceph, "health"), [check for check in dicts(ceph.get("checks")) if not check.get("muted")]
    words = {text(check, "severity") for check in checks} if ceph.get("checks") else {word}
    if word is None:
        return UNKNOWN
    if not words & {"HEALTH_ERR", "HEALTH_WARN"}:
        return None
    shown = "; ".join(str(check.get("message") or check.get("name")) for check in checks[:4]) or "no reason told"
    worst = "HEALTH_ERR" if "HEALTH_ERR" in words else "HEALTH_WARN"
    return (critical if worst == "HEALTH_ERR" else warning)(f"Ceph{of} is {worst}: {shown[:300]}.")


CEPH = {"hold": 5 * MINUTE, "hold_crit": 0.0, "data_risk": True, "always": True,
        "why": "Data may be short of copies, or writes may have stopped.", "todo": "ceph health detail; ceph osd tree"}


@rule("ceph", on="ceph", **CEPH)
def ceph_health(ceph: Fields, host: HostState) -> Found:
    return None if host.body("cluster") is not None else ceph_reading(ceph, "")  # see cluster-ceph


@rule("cluster-ceph", on=SHARED, each="clusters", **CEPH)
def cluster_ceph(cluster: Cluster, host: Shared, now: float) -> Found:
    """Ceph's health once a cluster, as the newest word of its nodes has it."""
    told = [(section.time or 0.0, section.body) for view in cluster.views
            if (section := view.host.sections.get("ceph", NOTHING)).stamp and isinstance(section.body, dict)]
    at, ceph = max(told, key=lambda pair: pair[0], default=(0.0, None))
    if ceph is None:
        return None
    return UNKNOWN if now - at > 2 * HOUR else ceph_reading(ceph, f" of cluster {cluster.name}")


@rule("cluster-storage-full", on=SHARED, each="clusters", of="storage", warn=0.85, crit=0.93, clear_by=0.03,
      hold=10 * MINUTE,
      why="Guests and backups on it fail when it is full.",
      todo="Delete old backups or images, or move some.")
def cluster_storage_full(cluster: Cluster) -> Found:
    """A storage that all nodes share is full once, not once per node."""
    return worst_each(storage_reading(storage, f"clusters/{cluster.name}/storages/{storage['storage']}")
                      for view in cluster.views for storage in view.host.items("storages")
                      if storage.get("shared") in (True, 1) and storage.get("enabled") not in (False, 0))


# Silence: judged by our own clock


@rule("host-offline", on=CLOCK, crit=OFFLINE_SECONDS,
      why="What is not seen cannot be judged: its guests may be down too.",
      todo="Is the host up and on the network? On it: systemctl status proxmox-monitor-agent")
def host_offline(host: HostState, fleet: Fleet, now: float) -> Found:
    """Silence. After it, two reports have to come before it is over."""
    silent = fleet.silent_seconds(host, now)
    if silent is not None and silent >= fleet.offline_after(host):
        host.heard = 0
    elif silent is None or (("host-offline", "") in host.alerts and host.heard < 2):
        return UNKNOWN
    return measured(silent, lambda: f"Nothing received from {host.name} for {format_duration(silent or 0)}.")


SITE_PART, SITE_LEAST, SITE_WINDOW = 0.30, 5, 2 * MINUTE


def judge_silence(fleet: Fleet, now: float) -> dict[str, set[int]]:
    """The hosts that fell silent together, by site: 30 % of it, at least 5, within 2 minutes, at least one of them
    offline by now. 'sites' = across the sites."""
    sites: dict[str, list[HostState]] = {}
    for state in fleet.hosts.values():
        if state.last_seen_at is not None:
            sites.setdefault(state.site or "none", []).append(state)
    found = {f"sites/{site}": together for site, states in sites.items()
             if (together := fell_silent(fleet, states, now))}
    return {"sites": set().union(*found.values())} if len(found) > 1 else found


def fell_silent(fleet: Fleet, states: list[HostState], now: float) -> set[int]:
    silent = []  # since when, how long until it is offline, and which
    for state in states:
        seconds, limit = fleet.silent_seconds(state, now) or 0.0, fleet.offline_after(state)
        if seconds >= limit - SITE_WINDOW:
            silent.append((now - seconds, limit, state.id))
    silent.sort()
    need = max(SITE_LEAST, math.ceil(SITE_PART * len(states)))
    best: list[tuple[float, float, int]] = []
    start = 0
    for end in range(len(silent)):
        while silent[end][0] - silent[start][0] > SITE_WINDOW:
            start += 1
        if end - start + 1 > len(best):
            best = silent[start:end + 1]
    if len(best) < need or not any(now - since >= limit for since, limit, _ in best):
        return set()
    return {host_id for _, _, host_id in best}


@rule("site-offline", on=SHARED, each="sites",
      why="Many hosts fell silent at once: one cause, not many.",
      todo="Look at the site's power, uplink and firewall, and at this server's own network.")
def site_offline(site: tuple[str, set[int]], host: Shared, fleet: Fleet) -> Found:
    object, hosts = site
    where = "the fleet" if object == "sites" else f"site {object.partition('/')[2]}"
    names = sorted(fleet.hosts[host_id].name for host_id in hosts if host_id in fleet.hosts)
    return critical(f"{len(hosts)} hosts of {where} fell silent within 2 minutes: {some_of(names, 5)}.", len(hosts))


@rule("server-certificate", on=SHARED, of="server", warn=21 * DAY, crit=5 * DAY, low=True,
      why="When it expires, agents and people cannot reach this server.",
      todo="Look at Caddy's log.")
def server_certificate(shared: Shared, fleet: Fleet, now: float) -> Found:
    left = None if fleet.certificate_ends_at is None else fleet.certificate_ends_at - now
    return measured(left, lambda: certificate_text(f"of {fleet.public_url}", left or 0, ""))._replace(
        object="server/certificate")


@rule("log-ins-fail", on=SHARED, of="server",
      why="Somebody tries passwords.",
      todo="The events say from where; shut it out at the proxy, look at who is logged in.")
def log_ins_fail(shared: Shared, fleet: Fleet, now: float) -> Found:
    """Ten failed log-ins within 15 minutes."""
    lately = sum(0 <= now - at < 15 * MINUTE for at in fleet.failed_logins)
    return warning(f"{lately} log-ins have failed in 15 minutes.", lately, "server/log-ins") if lately >= 10 else None


RULES = tuple(RULE.values())
SHARED_RULES = alike(rule for rule in RULES if SHARED in rule.on)
JUDGED = frozenset(chain.from_iterable(rule.on for rule in RULES)) - {SHARED}  # a report may hold any other section


@lru_cache(1000)
def rules_on(sections: frozenset[str], *, numbers: bool = False) -> tuple[tuple[Rule, ...], ...]:
    """The rules that look at one of these, in the order of the file; or only those that say nothing but numbers."""
    return alike(rule for rule in RULES if not sections.isdisjoint(rule.on) and (rule.by_number or not numbers))


# Thresholds from server.toml: fleet -> tag -> host -> object


class Layers:
    """The thresholds as set: [rules.NAME], [tags.TAG.rules.NAME], [hosts.HOST.rules.NAME], and for single objects
    [objects."pools/tank".rules.NAME] and [hosts.HOST.objects."pools/tank".rules.NAME]."""

    def __init__(self, document: Fields | None = None):
        document = document or {}
        self.fleet: Fields = document.get("rules", {})
        self.tags = {tag.lower(): one.get("rules", {}) for tag, one in document.get("tags", {}).items()}
        self.hosts = {host.lower(): one for host, one in document.get("hosts", {}).items()}
        self.objects: Fields = document.get("objects", {})
        self.has_objects = bool(self.objects) or any(one.get("objects") for one in self.hosts.values())
        self._tables: dict[tuple[str, ...], dict[str, Rule]] = {}  # by what hosts have of their own

    def limits(self, state: Any, rule: Rule, object: str = "") -> Rule:
        """A rule as it holds on a host (or for the fleet's own alerts, which have no host), or for an object of it."""
        kept = state.limits
        if kept is None or kept[0] is not self:
            name, tags = (state.name or "").lower(), {tag.lower() for tag in state.tags}
            look = name if name in self.hosts else "", *(tag for tag in self.tags if tag in tags)
            kept = state.limits = self, self._tables.setdefault(look, {})
        if object and self.has_objects and (object in self.objects or object in self.hosts.get(
                (state.name or "").lower(), {}).get("objects", {})):
            return self._resolve(state, rule, object)
        found = kept[1].get(rule.name)
        if found is None:
            found = kept[1][rule.name] = self._resolve(state, RULE[rule.name], "")
        return found

    def named(self, rule: str, state: Any) -> Rule:
        return self.limits(state, RULE[rule])

    def _resolve(self, state: Any, rule: Rule, object: str) -> Rule:
        own, tags = self.hosts.get((state.name or "").lower(), {}), {tag.lower() for tag in state.tags}
        layers = [("fleet", self.fleet), *((f"tag {tag}", rules) for tag, rules in self.tags.items() if tag in tags),
                  ("host", own.get("rules", {})),
                  *(("object", objects.get(object, {}).get("rules", {})) for objects in (
                      self.objects, own.get("objects", {})))]
        for layer, rules in layers:
            if rule.name in rules:
                rule = overridden(rule, rules[rule.name], layer)
        return rule


Fleet.layers = Layers()


def overridden(rule: Rule, given: Fields, layer: str) -> Rule:
    """A rule with what one layer sets; another hold counts for critical too unless that is set by itself."""
    fields = {LIMITS_NAMES.get(name, name): value for name, value in given.items()}
    if "clear_by" in given:
        fields["clear_part"] = 1.0
    if "hold_seconds" in given:
        fields.setdefault("hold_crit", given["hold_seconds"])
    return dataclasses.replace(rule, layer=layer, **fields)


LIMITS_NAMES = {"hold_seconds": "hold", "hold_crit_seconds": "hold_crit"}


def check_layers(document: Fields) -> None:
    """`Mistake` unless every threshold is one of a rule that exists, and a number."""
    rules = {"rules?": check_rules}
    objects = {"*": rules}
    layers = {"rules?": check_rules, "tags?": {"*": rules}, "hosts?": {"*": {**rules, "objects?": objects}},
              "objects?": objects}
    checked(document, {**layers, "*": lambda value: value})


LIMITS_FIELDS = {"enabled?": bool, "warn?": float, "crit?": float, "clear_by?": (float, 0, 1e15),
                 "hold_seconds?": (float, 0, 1e9), "hold_crit_seconds?": (float, 0, 1e9)}


def check_rules(rules: Any) -> None:
    for name, given in checked(rules, dict).items():
        if name not in RULE:
            raise Mistake((name,), f"there is no rule {name!r}; see docs/alerts.md")
        fields = checked(given, LIMITS_FIELDS, (name,))
        warn, crit = fields.get("warn", RULE[name].warn), fields.get("crit", RULE[name].crit)
        if warn is not None and crit is not None and (warn < crit) == RULE[name].low and warn != crit:
            raise Mistake((name,), f"warn {warn} is beyond crit {crit}")


# Judging and writing: by the writer, in the transaction of the report


def judge_host(db: Database, fleet: Fleet, state: HostState, now: float,
               changed: Iterable[str] | None = None) -> None:
    """Run the rules of the sections that came (None: only those of the clock) over a host's latest state, and write
    what changed."""
    if changed is not None:
        follow_names(db, state, changed, now)
    rules = rules_on(JUDGED.intersection((CLOCK,) if changed is None else (CLOCK, AGENT, *changed)))
    write_changes(db, state, judge(state, rules, fleet, now), now)


IDENTITY = {"guests": "created_at", "pools": "guid"}  # what another one of the same name would have another of


def follow_names(db: Database, state: HostState, changed: Iterable[str], now: float) -> None:
    """Names move: what is known of a guest or a pool is forgotten when another one has its name, and alerts about a
    disk follow it to its new letter."""
    for section, field in IDENTITY.items():
        if section in changed:
            known = state.memory.rules.get("identity", {})
            for object, item in state.objects(section):
                identity = item.get(field)
                if identity is not None and known.get(object) != identity:
                    if object in known:
                        state.memory.forget(object)
                    state.memory.keep("identity", object, identity)
    if "disks" in changed:
        was = {key: state.memory.get("disk-gone", key)[0] for key in state.memory.keys("disk-gone")}
        moved = {f"disks/{was[disk_key(disk)]}": object for object, disk in state.objects("disks")
                 if was.get(disk_key(disk), disk["name"]) != disk["name"]}
        if moved:
            rename_alerts(db, state, moved)


def rename_alerts(db: Database, state: HostState, moved: dict[str, str]) -> None:
    """Alerts under other names, old to new; in two steps, as two disks may have changed places."""
    renamed = {key: alert.changed(object=moved[alert.object]) for key, alert in state.alerts.items()
               if alert.object in moved and alert.rule != "disk-gone"}
    for alert in renamed.values():
        db.execute("UPDATE alert SET object = :between WHERE id = :id", {"between": f"{alert.id}", "id": alert.id})
    kept = {key: alert for key, alert in state.alerts.items() if key not in renamed}
    for alert in renamed.values():
        stands = kept.pop((alert.rule, alert.object), None)  # of a disk that is not here now
        if stands is not None:
            write_alert(db, state, stands, None, 0)
        kept[alert.rule, alert.object] = alert
        db.execute(UPDATE_ALERT, alert_fields(alert))
    state.alerts = kept


def judge_shared(db: Database, fleet: Fleet, now: float) -> None:
    """What no single host can tell: clusters, sites."""
    shared, silent, clusters = fleet.shared, judge_silence(fleet, now), list_clusters(fleet, now)
    shared.clusters = [cluster for cluster, _ in clusters]
    shared.silent = silent
    shared.concerns = {**{f"clusters/{cluster.name}": set(hosts) for cluster, hosts in clusters}, **silent}
    write_changes(db, shared, judge(shared, SHARED_RULES, fleet, now), now)
    fleet.concerned = concerned_hosts(shared)


def concerned_hosts(shared: Shared) -> dict[int, list[Alert]]:
    """The shared alerts by host, for its verdict."""
    found: dict[int, list[Alert]] = {}
    for (_, object), alert in shared.alerts.items():
        for host_id in shared.hosts_of(object):
            found.setdefault(host_id, []).append(alert)
    return found


def find_causes(fleet: Fleet, state: Any, alert: Alert) -> list[Alert]:
    """The open alerts that this one follows from: its cause, the cause of that one, and so on."""
    found: list[Alert] = []
    while (cause := find_cause(fleet, state, alert)) is not None and cause[1].state == "firing" \
            and not is_milder(cause[1].severity, alert.severity):
        state, alert = cause
        found.append(alert)
    return found


def is_milder(severity: str, other: str) -> bool:
    """A mild cause excuses nothing that is worse than it."""
    return SEVERITIES.index(severity) > SEVERITIES.index(other)


def find_cause(fleet: Fleet, state: Any, alert: Alert) -> tuple[Any, Alert] | None:
    """The open alert that this one follows from at once, after whose it is."""
    kind, _, name = alert.object.partition("/")
    cause: Alert | None = None
    if alert.rule == "host-offline":
        site = next((other for other in fleet.concerned.get(state.id, ()) if other.rule == "site-offline"), None)
        state, cause = fleet.shared, site and fleet.shared.alerts.get((site.rule, site.object))  # as it is by now
    elif kind == "storages":
        cause = broken_pool(state, [pool_of(storage.get("dataset")) for storage in state.items("storages")
                                    if storage["storage"] == name])
    elif kind == "guests" and alert.rule in ("guest-down", "guest-hangs"):
        cause = cause_of_guest(state, name)
    elif alert.rule == "backup-failed":
        jobs = [job for job in state.items("backups.jobs") if name.isdigit() and job_holds(job, int(name), state)]
        cause = next((failed for job in jobs
                      if (failed := state.alerts.get(("backup-job", f"backups/{job.get('id')}")))), None)
    elif kind == "pools" and alert.rule in ("vdev-errors", "pool-data-errors", "pool-unanswered", "slow-ios",
                                            "pool-spare", "scrub-stuck", "suspects-hold-pool"):
        cause = broken_pool(state, [name.partition("/")[0]])
    elif kind == "replication":
        target = next((text(job, "target") for job in state.items("replication") if job["id"] == name), None) or ""
        state = fleet.names.get(target.lower())
        cause = state.alerts.get(("host-offline", "")) if state else None
    return None if cause is None else (state, cause)


def broken_pool(state: Any, pools: Iterable[str | None]) -> Alert | None:
    for pool in pools:
        for name in ("pool-state", "pool-vanished"):
            alert = state.alerts.get((name, f"pools/{pool}"))
            if alert is not None and alert.state == "firing":
                return alert
    return None


def cause_of_guest(state: Any, vmid: str) -> Alert | None:
    """A guest's volumes lead to its pools and storages."""
    volumes = [volume for guest in state.items("guests") if str(guest["vmid"]) == vmid
               for volume in dicts(guest.get("volumes"))]
    inactive = (state.alerts.get(("storage-inactive", f"storages/{volume.get('storage')}")) for volume in volumes)
    firing = (alert for alert in inactive if alert is not None and alert.state == "firing")
    return broken_pool(state, [pool_of(volume.get("dataset")) for volume in volumes]) or next(firing, None)


def write_changes(db: Database, state: Any, changes: Changes, now: float) -> None:
    """Put changed alerts, their transitions, and what the rules remember on record."""
    for old, new in changes:
        write_alert(db, state, old, new, now)
    if state.memory.changed and state.id is not None:
        db.execute("INSERT INTO rule_memory VALUES (:id, :memory) ON CONFLICT DO UPDATE SET memory = :memory",
                   {"id": state.id, "memory": state.memory.to_json()})
        state.memory.changed = False


def write_alert(db: Database, state: Any, old: Alert | None, new: Alert | None, now: float) -> None:
    """Put a changed alert and its transition on record."""
    if new is None:
        if old is not None and old.id is not None:
            db.execute("DELETE FROM alert WHERE id = :id", {"id": old.id})
        return
    if new.id is None:
        new.id = db.execute(INSERT_ALERT, {**alert_fields(new), "host_id": state.id}).lastrowid
    elif new != old:
        db.execute(UPDATE_ALERT, alert_fields(new))
    if new.state == "resolved" and new.id is not None:
        state.over.pop(new.id, None)
        if new.told:
            state.over[new.id] = new
    if new.state != "pending" and (old is None or (old.state, old.severity) != (new.state, new.severity)):
        message = new.message if new.state == "firing" else f"Over: {new.message}"
        insert_event(db, now, f"alert-{new.state}", message, host=state.name, object=new.object or None,
                     severity=new.severity)


def alert_fields(alert: Alert) -> Fields:
    """An alert as its row. A counter of 64 bits is too much for an INTEGER of SQLite."""
    fields = {key: getattr(alert, key) for key in ALERT_FIELDS}
    for key in ("value", "acknowledged_value"):
        fields[key] = None if fields[key] is None else float(fields[key])
    return {**fields, "told": compact_json(alert.told)}


INSERT_ALERT = (f"INSERT INTO alert (host_id, {', '.join(ALERT_FIELDS)}) "
                f"VALUES (:host_id, {', '.join(':' + key for key in ALERT_FIELDS)})")
UPDATE_ALERT = f"UPDATE alert SET {', '.join(f'{key} = :{key}' for key in ALERT_FIELDS)} WHERE id = :id"


def update_alert(db: Database, fleet: Fleet, alert_id: int, **fields: Any) -> tuple[Any, Alert]:
    """Change an open alert in memory and on disk; gives back whose it is and what it is now. `Problem('not_found')`."""
    state, alert = find_alert(fleet, alert_id)
    new = alert.changed(**fields)
    state.alerts = {**state.alerts, (new.rule, new.object): new}
    if state is fleet.shared:
        fleet.concerned = concerned_hosts(fleet.shared)
    db.execute(UPDATE_ALERT, alert_fields(new))
    return state, new


def tell_done(db: Database, now: float, state: Any, alert: Alert, kind: str, words: str) -> None:
    """Put on record what somebody did to an alert."""
    insert_event(db, now, kind, f"{words}: {alert.message}", host=state.name, object=alert.object or None)


def find_alert(fleet: Fleet, alert_id: int) -> tuple[Any, Alert]:
    for state in fleet.everything():
        for alert in state.alerts.values():
            if alert.id == alert_id:
                return state, alert
    raise Problem("not_found", f"no open alert {alert_id}")


def acknowledge(db: Database, fleet: Fleet, alert_id: int, now: float, *, by: str, until: float | None,
                note: str | None) -> None:
    """Take note of an alert: it is quiet and colours nothing until it gets worse, or until then."""
    state, alert = find_alert(fleet, alert_id)
    update_alert(db, fleet, alert_id, acknowledged_at=now, acknowledged_by=by, acknowledged_until=until,
                 acknowledged_note=note, acknowledged_severity=alert.severity, acknowledged_value=alert.value)
    tell_done(db, now, state, alert, "alert-acknowledged", f"{by} acknowledged")


def unacknowledge(db: Database, fleet: Fleet, alert_id: int, now: float, *, by: str) -> None:
    tell_done(db, now, *update_alert(db, fleet, alert_id, **NOT_ACKNOWLEDGED), "alert-unacknowledged",
              f"{by} took back the acknowledgement of")


def accept_as_normal(db: Database, fleet: Fleet, alert_id: int, now: float, *, by: str) -> None:
    """Make what an alert is about the new baseline; it is over with that. `Problem('conflict')` for a rule without."""
    state, alert = find_alert(fleet, alert_id)
    rule = RULE.get(alert.rule)
    if rule is None or rule.accept is None:
        raise Problem("conflict", f"the rule {alert.rule} has no baseline: acknowledge it, or set its threshold")
    if not rule.accept(state, alert.object):
        raise Problem("conflict", "what this alert is about is not there any more")
    tell_done(db, now, state, alert, "alert-accepted", f"{by} accepted as normal")
    changes = judge(state, [(dataclasses.replace(rule, always=True),)], fleet, now)
    if state.alerts.get((alert.rule, alert.object)) is alert:  # not known any more: it was accepted all the same
        changes.append((alert, alert.changed(state="resolved", resolved_at=now)))
        state.alerts = {key: other for key, other in state.alerts.items() if other is not alert}
    write_changes(db, state, changes, now)


# Backlog and replay: the same rules over reports of the past


class Past(NamedTuple):
    """What a rule would have said: when it fired, and when it was over."""

    fired_at: float
    over_at: float | None
    severity: str
    host: str
    rule: str
    object: str
    message: str


def past_state(state: HostState) -> HostState:
    """A state to run old reports through: it knows what the rules remember, and nothing that came later."""
    past = copy.copy(state)
    past.sections, past.named, past.alerts, past.stamp, past.coverage, past.past = {}, {}, {}, None, None, None
    past.memory, past.margins = Memory(json.loads(state.memory.to_json())), None
    return past


def judge_past(past: HostState, fleet: Fleet, report: Fields, stamp: Stamp, *, whole: bool = True) -> list[Past]:
    """Take one old report in; gives back what fired and what ended with it. Not `whole`: only numbers are known."""
    changed = past.apply(report, stamp)
    absorb_tasks(past, report.get("tasks"), stamp.time)
    found = []
    for old, new in judge(past, rules_on(JUDGED.intersection(changed), numbers=not whole), fleet, stamp.time):
        if new is None or new.severity == "info" or new.state == "pending":
            continue
        if old is None or old.state != new.state:
            found.append(Past(new.fired_at or stamp.time, stamp.time if new.state == "resolved" else None,
                              new.severity, past.name, new.rule, new.object, new.message))
    return found


def judge_backlog(db: Database, fleet: Fleet, state: HostState, report: Fields, stamp: Stamp) -> None:
    """A report that is older than what is known raises nothing; what it tells is put on record as past."""
    past, used_at = state.past or (past_state(state), stamp.received_at)
    if stamp.received_at - used_at > HOUR or (past.stamp and past.stamp.time > stamp.time):
        past = past_state(state)
    state.past = past, stamp.received_at
    for told in judge_past(past, fleet, report, stamp):
        if (told.rule, told.object) not in state.alerts:
            word = "over" if told.over_at else "fired"
            insert_event(db, told.over_at or told.fired_at, f"alert-past-{word}",
                         f"{told.message} (told late, by a backlog)", host=state.name, object=told.object or None)


def forget_backlog(state: HostState, now: float) -> None:
    """An hour after the last late report nothing of the past is needed; it is as large as the present."""
    if state.past is not None and not 0 <= now - state.past[1] <= HOUR:
        state.past = None


def follow_report(monitor: Monitor, db: Database, state: HostState, report: Fields, stamp: Stamp) -> None:
    """Remember of each report what rules ask for; of an old one the past is told."""
    newest = state.stamp is stamp
    watch_agent(state, report, stamp)
    absorb_tasks(state, report.get("tasks"), stamp.time)
    if state.margins is None:
        keep_margins(state)
    state.heard += newest
    if stamp.received_at - stamp.time > JUDGED_WITHIN or (not newest and stamp.received_at - stamp.time > 2 * MINUTE):
        judge_backlog(db, monitor.fleet, state, report, stamp)


EACH_REPORT.append(lambda monitor, db, state, report, stamp, weight: follow_report(monitor, db, state, report, stamp))
EACH_REQUEST.append(lambda monitor, db, state, changed, now: judge_host(db, monitor.fleet, state, now, changed))


# --- notifications: what is told, through which channel, and until it has arrived ---
#
# What a channel was told of an alert is kept with the alert (`told`). Whenever alerts are judged, dispatch() holds what
# is there against what each channel was told, and the difference becomes a `notification` row for it, in the same
# transaction. A channel's loop makes a `message` of what waits, writes it down, sends it, and writes down that it was
# sent: a crash at any point loses nothing, and what is sent twice has the same id. docs/alerts.md has the table of who
# hears what, and when.

GROUP_SECONDS = 30  # between two messages of a channel
MESSAGES_AT_ONCE, MESSAGE_EVERY = 20, 3 * MINUTE  # so many when it was quiet for an hour, then one each 3 minutes
HOST_ITEMS, HOST_ITEMS_HOURLY = 5, 20  # of one host in a message at least, and in an hour; the rest is one line
ITEMS_SHOWN = 20
BACKOFF = (5, 10, 30, 60, 120, 300)  # seconds before the next try; the last one from then on
GIVE_UP_SECONDS = DAY
REFUSED_TRIES, FORBIDDEN_TRIES = 3, 6  # of a message that the far end finds fault with, or may have (HTTP 403)
SEND_TIMEOUT = 10
REMINDER_SECONDS = DAY
AFTER_CAUSE_SECONDS = MINUTE  # what followed from a cause that is over gets this long to be over too


class Undelivered(Exception):
    """A message was not taken. `tries`: after how many the message itself is held to be the reason; None: never."""

    def __init__(self, detail: str, *, tries: int | None = None):
        super().__init__(detail)
        self.tries = tries


class Quiet(NamedTuple):
    """Hours (minutes of the server's local day) in which some severities wait."""

    begin: int
    end: int
    severities: frozenset[str]

    def holds(self, severity: str, now: float) -> bool:
        """Whether this has to wait now."""
        local = time.localtime(now)
        minute = local.tm_hour * 60 + local.tm_min
        inside = self.begin <= minute < self.end if self.begin < self.end else not self.end <= minute < self.begin
        return severity in self.severities and inside and self.begin != self.end


class Channel(NamedTuple):
    """One [[channels]] of server.toml: whom it tells of what."""

    name: str
    kind: str
    options: Fields
    severities: frozenset[str]
    only: dict[str, frozenset[str]]  # sites, tags, hosts, rules; all lower case
    quiet: Quiet | None
    reminders: bool
    recoveries: bool

    def wants(self, fleet: Fleet, state: Any, alert: Alert) -> bool:
        """Whether it is to hear of an alert, as severe as it is now."""
        if alert.severity not in self.severities:
            return False
        return all(wanted & routed_by(fleet, state, alert, key) for key, wanted in self.only.items())

    def is_quiet(self, severity: str, now: float) -> bool:
        return self.quiet is not None and self.quiet.holds(severity, now)


class Digest(NamedTuple):
    """[digest]: the week in one message."""

    weekday: int
    minute: int
    channels: frozenset[str] | None


class Settings(NamedTuple):
    """What server.toml says. It holds secrets, `source` too."""

    layers: Layers
    channels: list[Channel]
    digest: Digest | None
    source: str = ""


class BadSettings(Failure):
    """A mistake in the text of a server.toml, with the line it is in."""

    def __init__(self, line: int, reason: str):
        super().__init__(reason)
        self.line = line


def load_settings(config: Config) -> Settings:
    """Read server.toml; without one everything is as shipped. `Failure` with file, line and reason."""
    try:
        with open(config.settings_path, encoding="utf-8") as handle:
            source = handle.read()
    except FileNotFoundError:
        if config.settings_given:
            raise Failure(f"{config.settings_path}: no such file (SERVER_CONFIG)") from None
        source = ""
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{config.settings_path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        return parse_settings(source)
    except BadSettings as mistake:
        raise Failure(f"{config.settings_path}: {mistake}") from None


def parse_settings(source: str) -> Settings:
    """The settings in the text of a server.toml. `BadSettings`."""
    try:
        return build_settings(tomllib.loads(source))._replace(source=source)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"at line (\d+)", str(error))
        raise BadSettings(int(found[1]) if found else source.count("\n") + 1, str(error)) from None
    except RecursionError:
        raise BadSettings(1, "nested too deeply") from None
    except Mistake as mistake:
        line = line_of(source, mistake.path)
        where = f"line {line}: {'.'.join(str(step) for step in mistake.path)}"
        raise BadSettings(line, f"{where}: {mistake.reason}") from None


def line_of(source: str, path: Path) -> int:
    """The line of a TOML file that names the last step of a path; steps that it does not name are passed over."""
    start, end = 0, len(source)
    for step in path:
        if isinstance(step, int):  # of several [[channels]]
            tables = [found.start() for found in re.finditer(r"(?m)^\s*\[\[", source)]
            start, end = (*tables, end, end)[step:step + 2] if step < len(tables) else (start, end)
            continue
        named = re.compile(rf"(?m)^[^#\n]*?(?<![\w-]){re.escape(str(step))}(?![\w-])").search(source, start, end)
        start = named.start() if named else start
    return source.count("\n", 0, start + len(source[start:]) - len(source[start:].lstrip())) + 1


def build_settings(document: Fields) -> Settings:
    tables = checked(document, {"rules?": dict, "tags?": dict, "hosts?": dict, "objects?": dict,
                                "channels?": list, "digest?": dict})
    check_layers(document)
    channels: list[Channel] = []
    for place, given in enumerate(tables.get("channels", ())):
        channels.append(build_channel(given, ("channels", place)))
        if channels[-1].name in [other.name for other in channels[:-1]]:
            raise Mistake(("channels", place, "name"), f"there is another channel {channels[-1].name!r}")
    digest = None
    if "digest" in tables:
        names = tuple(channel.name for channel in channels) or ("",)
        given = checked(tables["digest"], {"weekday?": weekday_of, "at?": minute_of, "channels?": [names]}, ("digest",))
        chosen = frozenset(given["channels"]) if "channels" in given else None
        digest = Digest(given.get("weekday", 0), given.get("at", 8 * 60), chosen)
    return Settings(Layers(document), channels, digest)


def build_channel(given: Any, path: Path) -> Channel:
    """`Mistake` unless this is a channel of a known kind with what that needs."""
    kind = checked(given, {"kind": tuple(KINDS), "*": lambda value: value}, path)["kind"]
    fields = checked(given, {**CHANNEL_FIELDS, **KINDS[kind].fields}, path)
    if fields.get("security") == "plain" and fields["host"] not in ("localhost", "127.0.0.1", "::1"):
        raise Mistake((*path, "security"), "plain only to this machine: mails would travel in the open")
    only = {key: frozenset(name.lower() for name in fields[key]) for key in ("sites", "tags", "hosts", "rules")
            if fields.get(key)}
    quiet = fields.get("quiet")
    if quiet is not None:
        quiet = Quiet(quiet["from"], quiet["to"], frozenset(quiet.get("severities", ["warning"])))
    return Channel(fields["name"], kind, {key: value for key, value in fields.items() if key in KINDS[kind].options},
                   frozenset(fields.get("severities", ["critical", "warning"])), only, quiet,
                   fields.get("reminders", True), fields.get("recoveries", True))


def channel_name(value: Any) -> str:
    if not isinstance(value, str) or not HOST_NAME.fullmatch(value):
        raise ValueError("should be 1-63 of a-z A-Z 0-9 . _ -")
    return value


def rule_name(value: Any) -> str:
    if value not in list(RULE):
        raise ValueError(f"there is no rule {value!r}; see docs/alerts.md")
    return str(value)


def minute_of(value: Any) -> int:
    """'22:30' -> 1350"""
    found = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", value) if isinstance(value, str) else None
    if found is None:
        raise ValueError('should be a time like "22:30"')
    return int(found[1]) * 60 + int(found[2])


WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def weekday_of(value: Any) -> int:
    """'Monday' -> 0"""
    if str(value).lower()[:3] not in WEEKDAYS:
        raise ValueError(f"should be one of: {', '.join(WEEKDAYS)}")
    return WEEKDAYS.index(str(value).lower()[:3])


def http_url(value: Any) -> str:
    if not (isinstance(value, str) and is_http_address(value) and re.fullmatch(r"[!-~]+", value)):
        raise ValueError("should be an http(s) address")
    return value


def mail_address(value: Any) -> str:
    """An address as a header takes it, with or without a name: 'Ops <ops@example.com>'."""
    address = email.utils.parseaddr(value)[1] if isinstance(value, str) and value.isprintable() else ""
    if not address or not address.isascii():
        raise ValueError("should be a mail address")
    return value


def mail_addresses(value: Any) -> list[str]:
    if not value:
        raise ValueError("should be a list of mail addresses")
    return [mail_address(item) for item in checked(value, [str])]


def webhook_key(value: Any) -> bytes:
    """'whsec_…' -> the key itself"""
    try:
        return base64.b64decode(checked(value, str).removeprefix("whsec_"), validate=True)
    except ValueError:
        raise ValueError("should be whsec_ and base64, as Standard Webhooks has it") from None


CHANNEL_FIELDS: Fields = {
    "name": channel_name, "kind": str, "severities?": [SEVERITIES], "sites?": [str], "tags?": [str], "hosts?": [str],
    "rules?": [rule_name], "quiet?": {"from": minute_of, "to": minute_of, "severities?": [SEVERITIES]},
    "reminders?": bool, "recoveries?": bool,
}


# What is told: from alerts to notifications


def insert_silence(db: Database, fleet: Fleet, fields: Fields, now: float, *, by: str) -> Fields:
    """Make a silence; gives it back as it is listed."""
    made = db.execute("""
        INSERT INTO silence (tag, site, host, object, rule, until, note, created_by, created_at)
        VALUES (:tag, :site, :host, :object, :rule, :until, :note, :by, :now)""",
        {**fields, "by": by, "now": now}).lastrowid
    fleet.silences = active_silences(db, now)
    what = ", ".join(f"{key} {fields[key]}" for key in SILENCE_MATCHERS if fields[key])
    insert_event(db, now, "silence-created", f"{by} silenced {what}", host=fields["host"], object=fields["object"])
    return next(silence for silence in fleet.silences if silence["id"] == made)


def delete_silence(db: Database, fleet: Fleet, silence_id: str, now: float, *, by: str) -> None:
    """End a silence: what fires is told now."""
    if not db.execute("DELETE FROM silence WHERE CAST(id AS TEXT) = :id", {"id": silence_id}).rowcount:
        raise Problem("not_found", "no such silence")
    insert_event(db, now, "silence-ended", f"{by} ended a silence")
    fleet.silences = active_silences(db, now)


def concerned_by(fleet: Fleet, state: Any, alert: Alert) -> list[HostState]:
    """The hosts that an alert is about: its own, or those that a shared one concerns (a cluster's, a site's)."""
    if state is not fleet.shared:
        return [state]
    concerned = fleet.shared.hosts_of(alert.object)
    return [fleet.hosts[host_id] for host_id in concerned if host_id in fleet.hosts]


def routed_by(fleet: Fleet, state: Any, alert: Alert, key: str) -> set[str]:
    """What an alert has under `key` (sites, tags, hosts, rules), in lower case."""
    if key == "rules":
        return {alert.rule}
    hosts = concerned_by(fleet, state, alert)
    if key == "tags":
        return guest_tags(state, alert).union(*({tag.lower() for tag in host.tags} for host in hosts))
    return {((host.site if key == "sites" else host.name) or "").lower() for host in hosts}


def guest_tags(state: Any, alert: Alert) -> set[str]:
    """The tags of the guest that an alert is about."""
    kind, _, vmid = alert.object.partition("/")
    guests = state.body("guests", ()) if kind == "guests" else ()
    return set().union(*(tags_of(guest) for guest in guests if str(guest["vmid"]) == vmid))


def is_silenced(fleet: Fleet, state: Any, alert: Alert, now: float) -> bool:
    """Whether a silence covers an alert, or maintenance all hosts that it is about."""
    hosts = concerned_by(fleet, state, alert)
    if hosts and all((host.maintenance_until or 0) > now for host in hosts):
        return True
    return any(silence["until"] > now and silence_fits(silence, fleet, state, alert) for silence in fleet.silences)


def silence_fits(silence: Fields, fleet: Fleet, state: Any, alert: Alert) -> bool:
    """All that a silence names has to fit, and fit all hosts that the alert is about; a guest's own tags count as well
    as its host's."""
    if silence["rule"] and silence["rule"] != alert.rule:
        return False
    if silence["object"] and not (alert.object + "/").startswith(silence["object"] + "/"):
        return False
    hosts = concerned_by(fleet, state, alert)
    name, site, tag = ((silence[key] or "").lower() for key in ("host", "site", "tag"))
    return ((not name or {host.name.lower() for host in hosts} == {name})
            and (not site or alert.object.lower() == f"sites/{site}"
                 or {(host.site or "").lower() for host in hosts} == {site})
            and (not tag or tag in guest_tags(state, alert)
                 or bool(hosts) and all(tag in map(str.lower, host.tags) for host in hosts)))


CAUSES = ("site-offline", "host-offline", "pool-state", "pool-vanished", "storage-inactive")  # told before what follows


def dispatch(db: Database, fleet: Fleet, states: Iterable[Any], now: float) -> None:
    """Queue what people have to be told of the alerts as they are now. Looking at the state, not at its changes,
    makes the end of a silence, of quiet hours or of a cause bring the news that was held back."""
    states = list(states)
    fleet.freed = {alert_id: at for alert_id, at in fleet.freed.items() if 0 <= now - at < AFTER_CAUSE_SECONDS}
    firing = [(state, alert) for state in states for alert in state.alerts.values() if alert.state == "firing"]
    firing.sort(key=lambda pair: CAUSES.index(pair[1].rule) if pair[1].rule in CAUSES else len(CAUSES))
    for state, alert in firing:
        tell(db, fleet, state, alert, now)
    for state in states:
        for alert in list(state.over.values()):
            tell_end(db, fleet, state, alert, now)


def tell(db: Database, fleet: Fleet, state: Any, alert: Alert, now: float) -> None:
    """One firing alert: find its cause, end an acknowledgement that has run out, queue what is to be said."""
    causes = find_causes(fleet, state, alert)
    new = alert.changed(because_of=causes[0].id if causes else None)
    if alert.because_of is not None and new.because_of is None and alert.id is not None:
        fleet.freed[alert.id] = now
    if alert.acknowledged_until is not None and alert.acknowledged_until <= now:
        new = new.changed(**NOT_ACKNOWLEDGED)
    for earlier in [old for old in state.over.values() if (old.rule, old.object) == (alert.rule, alert.object)]:
        new = new.changed(told={**earlier.told, **new.told})  # it was not over for those who have not heard of its end
        write_alert(db, state, earlier, earlier.changed(told={}), now)
        db.execute("UPDATE notification SET alert_id = :new WHERE alert_id = :old", {"new": new.id, "old": earlier.id})
    new = new.changed(told=tell_channels(db, fleet, state, new, causes, now))
    if new is not alert:
        state.alerts = {**state.alerts, (new.rule, new.object): new}
        write_alert(db, state, alert, new, now)


def tell_channels(db: Database, fleet: Fleet, state: Any, alert: Alert, causes: list[Alert],
                  now: float) -> dict[str, tuple[str, float]]:
    """Queue the news of a firing alert for each channel that wants it and was not told of its cause; gives back what
    each has been told by then."""
    told, held = dict(alert.told), alert.acknowledged_at is not None or alert.id in fleet.freed
    for channel in fleet.channels:
        kind = news_of(alert, told.get(channel.name), now)
        if kind == "less":  # nothing to say; the next rise is one again
            told[channel.name] = alert.severity, told[channel.name][1]
        elif (kind and not held and not any(channel.name in cause.told for cause in causes)
              and channel.wants(fleet, state, alert) and not channel.is_quiet(alert.severity, now)
              and (channel.reminders or kind != "reminder") and not is_silenced(fleet, state, alert, now)):
            queue_notification(db, fleet, channel, alert.id, notification_body(fleet, state, alert, kind, now), now)
            told[channel.name] = alert.severity, now
    return told


def tell_end(db: Database, fleet: Fleet, state: Any, alert: Alert, now: float) -> None:
    """Tell each channel that was told of an alert that it is over, once its silence or quiet hours are."""
    left = dict(alert.told)
    channels = {channel.name: channel for channel in fleet.channels}
    silenced = is_silenced(fleet, state, alert, now)
    for name, (severity, _) in alert.told.items():
        if name not in channels or not channels[name].recoveries:
            db.execute("UPDATE notification SET message_id = '-' WHERE alert_id = :alert AND channel = :channel "
                       "AND message_id IS NULL", {"alert": alert.id, "channel": name})
            del left[name]
        elif not silenced and not channels[name].is_quiet(severity or alert.severity, now):
            body = notification_body(fleet, state, alert, "resolved", now)
            queue_notification(db, fleet, channels[name], alert.id, body, now)
            del left[name]
    if left != alert.told:
        write_alert(db, state, alert, alert.changed(told=left), now)


def news_of(alert: Alert, told: tuple[str, float] | None, now: float) -> str | None:
    """What is new about a firing alert for somebody who was told of it like this."""
    if told is None:
        return "firing"
    severity, told_at = told
    if SEVERITIES.index(alert.severity) < (*SEVERITIES, "").index(severity):
        return "worse"
    if alert.severity != severity and severity and now - told_at > HOUR:
        return "less"
    rule = RULE.get(alert.rule)
    return "reminder" if rule is not None and rule.data_risk and now - told_at >= REMINDER_SECONDS else None


def queue_notification(db: Database, fleet: Fleet, channel: Channel, alert_id: int | None,
                       body: Fields, now: float) -> None:
    """Have something told through a channel. By the writer."""
    db.execute("""
        INSERT INTO notification (channel, alert_id, body, created_at) VALUES (:channel, :alert, :body, :now)""",
        {"channel": channel.name, "alert": alert_id, "body": json.dumps(body), "now": now})
    fleet.outbox_changed(channel.name)


def notification_body(fleet: Fleet, state: Any, alert: Alert, kind: str, now: float) -> Fields:
    """What, where, since, why, what to do, link."""
    rule = RULE.get(alert.rule)
    followers = sum(other.because_of == alert.id for owner in fleet.everything()
                    for other in owner.alerts.values()) if alert.rule in CAUSES else 0
    kind_of, _, name = alert.object.partition("/")
    site = state.site or (name if kind_of == "sites" and name else None)  # the same when it begins and when it ends
    link = fleet.public_url + ("/?host=" + urllib.parse.quote(state.name) if state.name else "/")
    told = notice(kind, alert.severity, alert.message, link, now, alert_id=alert.id, rule=alert.rule, host=state.name,
                  site=site, object=alert.object or None, value=alert.value, since=alert.since,
                  children=followers, at_stake=None if kind == "resolved" else at_stake(state, alert.object))
    return told if rule is None else told | {
        "why": rule.why, "todo": todo_of(state, alert.rule, alert.object),
        "threshold": threshold_text(fleet.layers.limits(state, rule, alert.object))}


def notice(kind: str, severity: str, message: str, link: str, now: float, **fields: Any) -> Fields:
    """What is told, in one shape: an alert's news, or a test, digest, many (of a host), lost (a message)."""
    return {"kind": kind, "alert_id": None, "rule": "", "severity": severity, "host": None, "site": None,
            "object": None, "message": message, "value": None, "since": now, "at": now, "why": "", "todo": "",
            "threshold": "", "children": 0, "at_stake": None, "link": link, **fields}


def threshold_text(rule: Rule) -> str:
    """'0.8/0.9, set for the host'"""
    if rule.warn is None and rule.crit is None:
        return ""
    shown = "/".join("–" if threshold is None else f"{threshold:g}" for threshold in (rule.warn, rule.crit))
    return shown + (f", set for {rule.layer}" if rule.layer else ", as shipped")


def rule_row(fleet: Fleet, state: Any, rule: Rule, object: str) -> Fields:
    rule = fleet.layers.limits(state, rule, object)
    return {"rule": rule.name, "of": rule.of, "enabled": rule.enabled, "warn": rule.warn, "crit": rule.crit,
            "clear_by": rule.clear_by, "hold_seconds": rule.hold, "layer": rule.layer or "shipped",
            "why": rule.why, "todo": rule.todo}


# Messages: what waits for a channel becomes one message


def make_message(db: Database, channel: Channel, now: float) -> str | None:
    """Put what waits into one message, unless it is too soon for one; gives back its id. By the writer."""
    made = [at for (at,) in db.execute(
        "SELECT created_at FROM message WHERE channel = :channel AND created_at > :day ORDER BY created_at",
        {"channel": channel.name, "day": now - DAY}) if at <= now]
    untried = db.execute("SELECT 1 FROM message WHERE channel = :channel AND attempts = 0 AND sent_at IS NULL AND "
                         "given_up_at IS NULL", {"channel": channel.name}).fetchone()
    if untried or (made and now - made[-1] < GROUP_SECONDS):
        return None
    items, whole = waiting_items(db, channel), KINDS[channel.kind].whole
    heard = dict(db.execute("""
        SELECT body ->> '$.host', count(*) FROM notification WHERE message_id IN
            (SELECT id FROM message WHERE channel = :channel AND created_at > :hour) GROUP BY 1""",
        {"channel": channel.name, "hour": now - HOUR}).fetchall())
    urgent = any(item["severity"] == "critical" and item["kind"] in ("firing", "worse") and item["host"] not in heard
                 for item in items.values())
    if not items or not (whole or urgent or has_token(made, now)):
        return None
    message_id = "msg_" + secrets.token_hex(12)
    body = build_message(list(items.values()), heard, whole=whole)
    db.execute("INSERT INTO message (id, channel, body, created_at, due_at) VALUES (:id, :channel, :body, :now, :now)",
               {"id": message_id, "channel": channel.name, "body": json.dumps(body), "now": now})
    db.executemany("UPDATE notification SET message_id = ? WHERE id = ?", [(message_id, row_id) for row_id in items])
    return message_id


def has_token(made: list[float], now: float) -> bool:
    """Whether a channel that made messages at these times may make one more: 20 at once, then one each 3 minutes."""
    empty_until = 0.0  # when the bucket will be full again
    for at in made:
        empty_until = min(max(empty_until, at) + MESSAGE_EVERY, at + MESSAGES_AT_ONCE * MESSAGE_EVERY)
    return empty_until - now <= (MESSAGES_AT_ONCE - 1) * MESSAGE_EVERY


def waiting_items(db: Database, channel: Channel) -> dict[int, Fields]:
    """What waits for a channel, by row, as it is now. Of one alert only the last counts; what eased meanwhile is told
    as it is, or not yet if the channel does not ask for that; the end of what was never said to begin is not told."""
    db.execute("""
        UPDATE notification SET message_id = '-' WHERE channel = :channel AND message_id IS NULL AND EXISTS (
            SELECT 1 FROM notification AS later WHERE later.channel = :channel AND later.message_id IS NULL
            AND later.alert_id = notification.alert_id AND later.id > notification.id)""", {"channel": channel.name})
    kept: dict[int, Fields] = {}
    rows = db.execute("""
        SELECT waiting.id, body, alert_id, state, severity, message,
               (SELECT max(message_id) FROM notification AS same
                WHERE same.alert_id = waiting.alert_id AND channel = :channel) AS told
        FROM notification AS waiting LEFT JOIN alert ON alert.id = alert_id
        WHERE channel = :channel AND message_id IS NULL ORDER BY waiting.id""", {"channel": channel.name}).fetchall()
    for row in rows:
        item = json.loads(row["body"])
        if item["kind"] == "resolved" and row["told"] == DROPPED:
            db.execute("UPDATE notification SET message_id = :dropped WHERE id = :id",
                       {"dropped": DROPPED, "id": row["id"]})
        elif row["alert_id"] is None or item["kind"] == "resolved":
            kept[row["id"]] = item
        elif row["state"] == "firing" and row["severity"] in channel.severities:  # else it may rise again, or end
            told = row["told"] not in (None, DROPPED)
            kept[row["id"]] = {**item, "kind": item["kind"] if told else "firing", "severity": row["severity"],
                               "message": row["message"]}
    return kept


DROPPED = "-"  # in the place of a message's id: never told. It comes before every id ("msg_…") in their order


MESSAGE_ORDER = {"test": 0, "digest": 0, "firing": 1, "worse": 1, "many": 1, "lost": 1, "reminder": 2, "resolved": 3}


def build_message(items: list[Fields], heard: dict[str | None, int] | None = None, *, whole: bool = False) -> Fields:
    """Worst first; the rest is counted. `heard`: how many items of a host were told in this hour."""
    items = shown = sorted(items, key=message_order)
    left: list[Fields] = []
    if not whole:
        shown = sorted(summed_up(items, heard or {}), key=message_order)
        ranks, nth = [], Counter[str | None]()
        for place, item in enumerate(shown):  # each host's worst before any host's second
            ranks.append((nth[item["host"]] > 0, nth[item["host"]] // HOST_ITEMS, place))
            nth[item["host"]] += 1
        places = [place for _, _, place in sorted(ranks)]
        left = [shown[place] for place in sorted(places[ITEMS_SHOWN:])]
        shown = [shown[place] for place in sorted(places[:ITEMS_SHOWN])]
    return {"subject": subject_of(items), "items": shown, "left_out": count_items(left)}


def message_order(item: Fields) -> tuple[int, int, float]:
    return MESSAGE_ORDER[item["kind"]], SEVERITIES.index(item["severity"]), item["at"]


def count_items(items: Iterable[Fields]) -> dict[str, int]:
    """How many of each severity, and how many that are over."""
    counts = Counter[str]()
    for item in items:
        counts["over" if item["kind"] == "resolved" else item["severity"]] += (
            item["children"] if item["kind"] == "many" else 1)
    return counts


def counts_text(items: Iterable[Fields]) -> str:
    return ", ".join(f"{count} {word}" for word, count in count_items(items).items())


def summed_up(items: list[Fields], heard: dict[str | None, int]) -> list[Fields]:
    """What one host has more than its share of an hour, but never its worst, becomes one line."""
    by_host: dict[str | None, list[Fields]] = {}
    for item in items:
        by_host.setdefault(item["host"], []).append(item)
    result = by_host.pop(None, [])
    for host, own in by_host.items():
        room = max(HOST_ITEMS, HOST_ITEMS_HOURLY - heard.get(host, 0))
        rest = own[room:]
        result += own[:room]
        if rest:
            message = f"{count_of(len(rest), 'more alert')}: {counts_text(rest)}. See the page."
            result.append(notice("many", rest[0]["severity"], message, rest[0]["link"], rest[0]["at"], host=host,
                                 site=rest[0]["site"], children=len(rest)))
    return result


def subject_of(items: list[Fields]) -> str:
    first = items[0]
    if len(items) == 1:
        word = {"resolved": "OK", "test": "TEST", "digest": "DIGEST"}.get(first["kind"], first["severity"].upper())
        where = f"{first['host']}: " if first.get("host") else ""
        return one_line(f"[{word}] {where}{first['message']}")[:200]
    standing = [item for item in items if item["kind"] != "resolved"]
    critical = sum(item["severity"] == "critical" for item in standing)
    counts = [f"{critical} critical" if critical else "",
              f"{len(standing) - critical} more" if len(standing) > critical else "",
              f"{len(items) - len(standing)} over" if len(items) > len(standing) else ""]
    word = (standing[0]["severity"] if standing else "OK").upper()
    return one_line(f"[{word}] {', '.join(filter(None, counts))}: {first['message']}")[:200]


def one_line(text: str) -> str:
    """Text for a header or a subject: nothing that breaks the line, and nothing that Python's email package would read
    as an encoded word (RFC 2047) and decode into what does."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split()).replace("=?", "= ?")


def message_text(body: Fields, limit: int = 100_000, escape: Callable[[str], str] = str) -> str:
    """A message as plain text: what, where, since, why, what to do, link. `escape`: what the far end would take for
    markup; names come from agents."""
    parts = [item_text(item, escape) for item in body["items"]]
    if body["left_out"]:
        counts = ", ".join(f"{count} {key}" for key, count in body["left_out"].items())
        parts.append(f"And {counts} more: see the page.")
    whole = "\n\n".join(parts)
    return whole if len(whole) <= limit else whole[:limit - 20] + "\n… (cut)"


def item_text(item: Fields, escape: Callable[[str], str]) -> str:
    if item["kind"] in ("test", "digest"):
        return escape(item["message"])
    if not item["rule"]:
        return "\n".join((escape(f"{item['host'] or 'The monitor'}: {one_line(item['message'])}"), item["link"]))
    word = {"resolved": "OVER", "reminder": "STILL {}", "worse": "NOW {}"}.get(item["kind"], "{}")
    word = word.format(item["severity"].upper())
    where = " ".join(filter(None, (item["host"], f"({item['site']})" if item["site"] else "", item["object"] or "")))
    since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(item["since"]))
    lines = [f"{word}: {one_line(item['message'])}", f"Where: {one_line(where) or 'the monitor'}",
             f"Since: {since} ({format_duration(item['at'] - item['since'])})"]
    if item["children"]:
        many = count_of(item["children"], "other alert that follows", "other alerts that follow")
        lines.append(f"With it: {many} from this one")
    if item.get("at_stake"):  # what was queued by an older version has none
        lines.append(f"At stake: {one_line(item['at_stake'])}")
    if item["kind"] != "resolved":
        limit = f" (rule {item['rule']}{', ' + item['threshold'] if item['threshold'] else ''})"
        lines += [f"Why: {item['why']}{limit}", f"Do: {one_line(item['todo'])}"]
    return "\n".join([*map(escape, lines), item["link"]])


def safe_message(body: Fields) -> Fields:
    """The same message without any text that an agent sent: rule, severity, host and link."""
    items = [{**item, "object": None, "value": None, "site": None, "at_stake": None,
              "todo": RULE[item["rule"]].todo if item["rule"] in RULE else "",
              "message": f"{item['rule'] or item['kind']} ({item['severity']}); its text was not taken, see the page"}
             for item in body["items"]]
    return {**build_message(items, whole=True), "left_out": body["left_out"], "safe": True}


# Senders: one per kind of channel


def post(url: str, payload: Any, headers: dict[str, str] | None = None) -> None:
    """POST JSON; anything but 2xx is `Undelivered`, in words that never hold the address: some are secret."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    try:
        request = urllib.request.Request(url, body, {
            "Content-Type": "application/json", "User-Agent": f"proxmon/{VERSION}", **(headers or {})}, method="POST")
        OPENER.open(request, timeout=SEND_TIMEOUT).close()  # the status is all that counts
    except urllib.error.HTTPError as error:
        raise Undelivered(f"HTTP {error.code} {what_it_says(error, 300)}", tries=patience_with(error.code)) from None
    except OSError as error:
        raise Undelivered(f"{type(error).__name__}: {getattr(error, 'reason', error)}") from None
    except (http.client.HTTPException, ValueError) as error:
        raise Undelivered(type(error).__name__) from None


def what_it_says(answer: Any, most: int) -> str:
    """The first words of an error's answer, as far as they come at once."""
    try:
        return one_line(answer.fp.read1(most).decode("utf-8", "replace"))
    except (OSError, http.client.HTTPException, ValueError, AttributeError):
        return ""


def patience_with(status: int) -> int | None:
    """After how many answers of this status the message is held to be wrong, and not the channel (401, 404), the load
    (429) or the far end (5xx)."""
    if status == 403:  # a web application firewall in front of it, or a token that is not good any more
        return FORBIDDEN_TRIES
    return REFUSED_TRIES if 400 <= status < 500 and status not in (401, 404, 408, 425, 429) else None


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET without its body: an error instead."""

    def redirect_request(self, *_: Any) -> None:
        return None


OPENER = urllib.request.build_opener(NoRedirects)


EMAIL_PORTS = {"starttls": 587, "tls": 465, "plain": 25}


def email_server(options: Fields) -> tuple[str, int]:
    return options["host"], options.get("port", EMAIL_PORTS[options.get("security", "starttls")])


def send_email(options: Fields, message_id: str, body: Fields) -> None:
    security, server = options.get("security", "starttls"), email_server(options)
    mail = write_mail(options, message_id, body)
    sender, *receivers = (email.utils.parseaddr(address)[1] for address in (options["from"], *options["to"]))
    try:
        context = ssl.create_default_context(cafile=options.get("ca_file"))
        made = (smtplib.SMTP_SSL(*server, timeout=SEND_TIMEOUT, context=context) if security == "tls"
                else smtplib.SMTP(*server, timeout=SEND_TIMEOUT))
        with made as smtp:
            if security == "starttls":
                smtp.starttls(context=context)
            if "username" in options:
                smtp.login(options["username"], options.get("password", ""))
            refused = smtp.sendmail(sender, receivers, mail)
        if refused:
            log(f"notifications: mail refused for {', '.join(refused)}")
    except smtplib.SMTPResponseException as error:
        wrong = isinstance(error, smtplib.SMTPDataError) and 500 <= error.smtp_code < 600
        raise Undelivered(f"SMTP {error.smtp_code} {one_line(str(error.smtp_error))}",
                          tries=REFUSED_TRIES if wrong else None) from None
    except (OSError, smtplib.SMTPException, ValueError) as error:
        raise Undelivered(f"{type(error).__name__}: {error}") from None


def write_mail(options: Fields, message_id: str, body: Fields) -> bytes:
    """The mail as it travels. `Undelivered` if its head is not, line by line, what is written here: Python before the
    fix of CVE-2024-6923 (3.11.10, 3.12.5) lets an encoded word in a header break the line."""
    mail = email.message.EmailMessage()
    mail["Subject"], mail["From"], mail["To"] = body["subject"], options["from"], ", ".join(options["to"])
    mail["Date"], mail["Message-ID"] = email.utils.formatdate(), f"<{message_id}@proxmon>"
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content(message_text(body))
    written = mail.as_bytes(policy=mail.policy.clone(linesep="\r\n"))
    head = written.partition(b"\r\n\r\n")[0].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    if [line.partition(b":")[0].decode() for line in head if line[:1] not in (b" ", b"\t")] != list(mail.keys()):
        raise Undelivered("the mail's head would not be as it was written", tries=1)
    return written


def worst_of(body: Fields) -> str:
    standing = [item["severity"] for item in body["items"] if item["kind"] not in ("resolved", "test", "digest")]
    return min(standing, key=SEVERITIES.index, default="info")


def send_ntfy(options: Fields, message_id: str, body: Fields) -> None:
    server, _, topic = options["url"].rstrip("/").rpartition("/")
    post(server, {"topic": topic, "title": body["subject"], "message": message_text(body, 3500),
                  "priority": {"critical": 5, "warning": 4}.get(worst_of(body), 3), "click": body["items"][0]["link"]},
         login_headers(options))


def send_gotify(options: Fields, message_id: str, body: Fields) -> None:
    post(options["url"].rstrip("/") + "/message", {
        "title": body["subject"], "message": message_text(body),
        "priority": {"critical": 8, "warning": 5}.get(worst_of(body), 2)}, {"X-Gotify-Key": options["token"]})


def send_telegram(options: Fields, message_id: str, body: Fields) -> None:
    base = options.get("url", "https://api.telegram.org").rstrip("/")
    try:
        post(f"{base}/bot{options['token']}/sendMessage", {  # no parse_mode: names are not markup
            "chat_id": options["chat_id"], "text": f"{body['subject']}\n\n{message_text(body, 3500)}",
            "disable_web_page_preview": True})
    except Undelivered as error:  # the address holds the token
        raise Undelivered(str(error).replace(options["token"], "…"), tries=error.tries) from None


def send_slack(options: Fields, message_id: str, body: Fields) -> None:
    text = f"{body['subject']}\n{message_text(body, 30_000)}"
    post(options["url"], {"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")})


def without_markdown(text: str) -> str:
    """Text that stays text where Markdown is read: no link under other words, no picture that is loaded, nobody called
    by a guest whose name is @all."""
    return re.sub(r"([\\`*_{}\[\]()<>#|~!])", r"\\\1", text).replace("@", "@\N{ZERO WIDTH SPACE}")


def markdown_text(body: Fields, limit: int) -> str:
    return f"{without_markdown(body['subject'])}\n{message_text(body, limit, without_markdown)}"


def send_discord(options: Fields, message_id: str, body: Fields) -> None:
    post(options["url"], {"content": markdown_text(body, 1500)[:2000], "allowed_mentions": {"parse": []}})


def send_mattermost(options: Fields, message_id: str, body: Fields) -> None:
    post(options["url"], {"text": markdown_text(body, 12_000)})


def send_teams(options: Fields, message_id: str, body: Fields) -> None:
    """An Adaptive Card, as Teams' workflows take it. A TextRun knows no Markdown."""
    lines = [body["subject"], *filter(None, message_text(body, 18_000).split("\n"))]
    blocks = [{"type": "RichTextBlock", "inlines": [
        {"type": "TextRun", "text": line, "weight": "Default" if place else "Bolder"}]}
        for place, line in enumerate(lines)]
    card = {"$schema": "http://adaptivecards.io/schemas/adaptive-card.json", "type": "AdaptiveCard", "version": "1.4",
            "body": blocks, "actions": [{"type": "Action.OpenUrl", "title": "Open", "url": body["items"][0]["link"]}]}
    post(options["url"], {"type": "message", "attachments": [
        {"contentType": "application/vnd.microsoft.card.adaptive", "content": card}]})


def login_headers(options: Fields) -> dict[str, str]:
    """A channel's token, or its user and password."""
    if "token" in options:
        return {"Authorization": "Bearer " + options["token"]}
    if "username" not in options:
        return {}
    pair = f"{options['username']}:{options.get('password', '')}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def send_alertmanager(options: Fields, message_id: str, body: Fields) -> None:
    post(options["url"].rstrip("/") + "/api/v2/alerts", [to_alertmanager(item) for item in body["items"]],
         login_headers(options))


def to_alertmanager(item: Fields) -> Fields:
    """An alert as Alertmanager knows it: by its labels, so that these hold what it is and nothing that changes. It
    forgets what has no end after 5 minutes, so a firing one ends in a day; the channel says it again every few minutes
    while it fires."""
    over = item["kind"] in ("resolved", "test", "digest", "lost")
    labels = {"alertname": item["rule"] or item["kind"], "host": item["host"] or "", "site": item["site"] or "",
              "object": item["object"] or ""}
    ends = item["at"] + (0 if item["kind"] == "resolved" else MINUTE if over else DAY)
    return {"labels": {key: value for key, value in labels.items() if value}, "generatorURL": item["link"],
            "annotations": {"summary": item["message"], "severity": item["severity"], "why": item["why"],
                            "todo": item["todo"]},
            "startsAt": iso_time(item["since"]), "endsAt": iso_time(ends)}


def iso_time(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def send_webhook(options: Fields, message_id: str, body: Fields) -> None:
    """Standard Webhooks: the same scheme by which agents sign their reports."""
    content = json.dumps({"type": "alerts", "subject": body["subject"], "text": message_text(body),
                          "alerts": body["items"], "left_out": body["left_out"]}).encode()
    stamp = str(int(time.time()))
    digest = hmac.digest(options["secret"], f"{message_id}.{stamp}.".encode() + content, "sha256")
    post(options["url"], content, {"webhook-id": message_id, "webhook-timestamp": stamp,
                                   "webhook-signature": "v1," + base64.b64encode(digest).decode()})


class Kind(NamedTuple):
    """A kind of channel: how it sends, what fields it has, whether it takes all there is at any pace (a machine)."""

    send: Callable[[Fields, str, Fields], None]
    fields: Fields
    whole: bool = False

    @property
    def options(self) -> set[str]:
        return {name.removesuffix("?") for name in self.fields}


KINDS = {
    "email": Kind(send_email, {"host": str, "from": mail_address, "to": mail_addresses, "port?": (int, 1, 65535),
                               "security?": ("starttls", "tls", "plain"), "username?": str, "password?": str,
                               "ca_file?": str}),
    "ntfy": Kind(send_ntfy, {"url": http_url, "token?": str}),
    "gotify": Kind(send_gotify, {"url": http_url, "token": str}),
    "telegram": Kind(send_telegram, {"token": str, "chat_id": str, "url?": http_url}),
    "slack": Kind(send_slack, {"url": http_url}),
    "discord": Kind(send_discord, {"url": http_url}),
    "mattermost": Kind(send_mattermost, {"url": http_url}),
    "teams": Kind(send_teams, {"url": http_url}),
    "alertmanager": Kind(send_alertmanager, {"url": http_url, "username?": str, "password?": str, "token?": str},
                         whole=True),
    "webhook": Kind(send_webhook, {"url": http_url, "secret": webhook_key}),
}


def channel_rows(db: Database, fleet: Fleet) -> list[Fields]:
    """Each channel with its last delivery, what waits, and what was given up in the last 7 days."""
    rows = []
    for channel in fleet.channels:
        row = db.execute("""
            SELECT (SELECT max(sent_at) FROM message WHERE channel = :name AND sent_at IS NOT NULL) AS last_sent_at,
                   (SELECT count(*) FROM notification WHERE channel = :name AND message_id IS NULL) +
                   (SELECT count(*) FROM message
                    WHERE channel = :name AND sent_at IS NULL AND given_up_at IS NULL) AS waiting,
                   (SELECT count(*) FROM message WHERE channel = :name AND given_up_at > :week) AS given_up
            """, {"name": channel.name, "week": time.time() - 7 * DAY}).fetchone()
        failed = db.execute("""
            SELECT error, ifnull(given_up_at, due_at) AS at FROM message
            WHERE channel = :name AND error IS NOT NULL AND sent_at IS NULL ORDER BY created_at DESC LIMIT 1""",
            {"name": channel.name}).fetchone()
        rows.append({"name": channel.name, "kind": channel.kind, **dict(row), "last_error": failed and failed["error"],
                     "last_error_at": failed and failed["at"]})
    return rows


# The loops that send: one for each channel, so that one that hangs holds up nobody else


class Notifier:
    """Makes messages of what waits and sends them. `turn` is one step; its store and fleet are the server's."""

    REFRESH_SECONDS = 3 * MINUTE  # Alertmanager is told again of all that fires

    def __init__(self, store: Store, fleet: Fleet, clock: Callable[[], float], stop: Stop):
        self.store, self.fleet, self.clock, self.stop = store, fleet, clock, stop
        self._loops: dict[str, Loop] = {}
        self._news: set[str] = set()  # channels for which something was queued that may not be committed yet
        self._refreshed: dict[str, float] = {}
        self._testing = threading.Lock()
        fleet.outbox_changed = self.wake

    def start(self) -> None:
        """Have a loop for every channel there is; called again after the settings changed."""
        names = {channel.name for channel in self.fleet.channels}
        for name in self._loops.keys() - names:
            self._loops.pop(name).end()
        for name in names - self._loops.keys():
            self._loops[name] = every(MINUTE, f"to {name}", partial(self._work, name), self.stop)

    def wake(self, name: str) -> None:
        """Something was queued for a channel; it is committed when the transaction that says so is."""
        self._news.add(name)
        if name in self._loops:
            self._loops[name].wake()

    def _work(self, name: str) -> float | None:
        channel = next((channel for channel in self.fleet.channels if channel.name == name), None)
        if channel is None:
            return None
        if self.turn(channel):
            return 0.0
        due, waits = self.store.reader().execute("""
            SELECT (SELECT min(due_at) FROM message
                    WHERE channel = :name AND sent_at IS NULL AND given_up_at IS NULL),
                   EXISTS (SELECT 1 FROM notification WHERE channel = :name AND message_id IS NULL)""",
            {"name": name}).fetchone()
        return min(MINUTE, 5 if waits else MINUTE, max(0.0, due - self.clock()) if due is not None else MINUTE)

    def turn(self, channel: Channel) -> bool:
        """Send what is due, or make a message of what waits; whether there was anything to do. A message that failed
        never stands before one that was tried less often."""
        now, db = self.clock(), self.store.reader()
        message = db.execute("""
            SELECT * FROM message
            WHERE channel = :channel AND sent_at IS NULL AND given_up_at IS NULL AND due_at <= :now
            ORDER BY attempts, created_at LIMIT 1""", {"channel": channel.name, "now": now}).fetchone()
        if message is not None and message["attempts"] == 0:
            self.deliver(channel, message)
            return True
        if channel.kind == "alertmanager":
            self._refresh(channel, now)
        waits = db.execute("SELECT 1 FROM notification WHERE channel = :channel AND message_id IS NULL LIMIT 1",
                           {"channel": channel.name}).fetchone()
        if waits or channel.name in self._news:  # the writer sees also what is not committed yet
            self._news.discard(channel.name)
            if self.store.write(lambda write: make_message(write, channel, now)) is not None:
                return True
        if message is not None:
            self.deliver(channel, message)
        return message is not None

    def deliver(self, channel: Channel, message: sqlite3.Row) -> None:
        """Send one message and write down what came of it, whatever that is."""
        error: Undelivered | None = None
        try:
            KINDS[channel.kind].send(channel.options, message["id"], json.loads(message["body"]))
        except Undelivered as undelivered:
            error = undelivered
        except Exception as fault:  # what cannot even be written as a mail or sent as a request
            error = Undelivered(f"{type(fault).__name__}: {fault}", tries=1)
        now = self.clock()
        self.store.write(lambda db: record_delivery(db, self.fleet, channel, message, error, now))
        if error is None:
            self.fleet.told_at = now

    def test(self, channel: Channel) -> float:
        """Send a test now, past all that waits, and put it on record; when it was taken. `Undelivered`, `Problem`."""
        if not self._testing.acquire(blocking=False):
            raise Problem("busy", "another test is under way", headers={"Retry-After": "5"})
        try:
            body, message_id = canary(self.fleet.public_url, self.clock()), "msg_" + secrets.token_hex(12)
            KINDS[channel.kind].send(channel.options, message_id, body)
        finally:
            self._testing.release()
        now = self.clock()
        self.store.write(lambda db: record_test(db, channel, message_id, body, now))
        self.fleet.told_at = now
        return now

    def _refresh(self, channel: Channel, now: float) -> None:
        if 0 <= now - self._refreshed.setdefault(channel.name, now) < self.REFRESH_SECONDS:
            return
        self._refreshed[channel.name] = now
        items = [notification_body(self.fleet, state, alert, "firing", now)
                 for state in self.fleet.everything() for alert in state.alerts.values()
                 if alert.state == "firing" and channel.name in alert.told]
        if items:
            try:
                send_alertmanager(channel.options, "", {"items": items})
            except Undelivered as error:
                log(f"notifications: {channel.name}: {error}")


def record_delivery(db: Database, fleet: Fleet, channel: Channel, message: sqlite3.Row,
                    error: Undelivered | None, now: float) -> None:
    """Sent, to be tried again, to be tried in a safe form, or given up: the last is told on the page, in the log and
    through the other channels."""
    body = json.loads(message["body"])
    if error is None:
        db.execute("UPDATE message SET sent_at = :now, attempts = attempts + 1, error = NULL WHERE id = :id",
                   {"now": now, "id": message["id"]})
        insert_event(db, now, "notification-sent", f"Told {channel.name}: {body['subject']}")
        return
    attempts, lost = message["attempts"] + 1, now - message["created_at"] > GIVE_UP_SECONDS
    if not lost and error.tries is not None and body.get("tries", 0) + 1 >= error.tries:
        lost = body.get("safe", False)
        body = body if lost else safe_message(body)
    elif error.tries is not None:
        body["tries"] = body.get("tries", 0) + 1  # in a row that say that the message is wrong
    due = now + BACKOFF[min(attempts, len(BACKOFF)) - 1]
    db.execute("""
        UPDATE message SET attempts = :attempts, error = :error, due_at = :due, given_up_at = :lost, body = :body
        WHERE id = :id""", {"attempts": attempts, "error": str(error)[:500], "due": due, "lost": now if lost else None,
                            "body": json.dumps(body), "id": message["id"]})
    log(f"notifications: {channel.name}: {error}{'; given up' if lost else ''}")
    if lost:
        insert_event(db, now, "notification-given-up",
                     f"Could not tell {channel.name}: {error}; given up: {body['subject']}")
        tell_of_loss(db, fleet, channel, body, error, now)


def tell_of_loss(db: Database, fleet: Fleet, channel: Channel, body: Fields, error: Undelivered, now: float) -> None:
    """Have the other channels say that this one did not take a message, unless it was about just that."""
    items = [item for item in body["items"] if item["kind"] != "lost"]
    if not items:
        return
    item = notice("lost", worst_of({"items": items}), f"Channel {channel.name} did not take a message "
                  f"({counts_text(items)}): {str(error)[:200]}. See the page.", fleet.public_url + "/", now)
    for other in fleet.channels:
        if other.name != channel.name:
            queue_notification(db, fleet, other, None, item, now)


def record_test(db: Database, channel: Channel, message_id: str, body: Fields, now: float) -> None:
    """A test that was taken. As if made a day ago: it neither delays nor counts against what is to be told."""
    db.execute("""
        INSERT INTO message (id, channel, body, created_at, due_at, attempts, sent_at)
        VALUES (:id, :channel, :body, :made, :now, 1, :now)""",
        {"id": message_id, "channel": channel.name, "body": json.dumps(body), "made": now - DAY, "now": now})
    insert_event(db, now, "notification-sent", f"Told {channel.name}: {body['subject']}")


def drop_orphans(db: Database, fleet: Fleet, now: float) -> None:
    """What waits for a channel that is not there any more is given up, and that is told."""
    names = {channel.name for channel in fleet.channels}
    waiting = {name for (name,) in db.execute("""
        SELECT DISTINCT channel FROM notification WHERE message_id IS NULL
        UNION SELECT DISTINCT channel FROM message WHERE sent_at IS NULL AND given_up_at IS NULL""")}
    for name in sorted(waiting - names):
        db.execute("UPDATE notification SET message_id = '-' WHERE message_id IS NULL AND channel = :name",
                   {"name": name})
        db.execute("UPDATE message SET given_up_at = :now, error = 'the channel is not set up any more' "
                   "WHERE sent_at IS NULL AND given_up_at IS NULL AND channel = :name", {"now": now, "name": name})
        insert_event(db, now, "notification-given-up",
                     f"Channel {name} is not set up any more; what waited for it is given up")


def canary(public_url: str, now: float) -> Fields:
    """The message of test-notification."""
    words = f"This is a test of proxmon at {public_url}. If you read it, this channel works."
    return build_message([notice("test", "info", words, public_url + "/", now)])


# The weekly digest, and the sign of life to the outside


def digest_due(digest: Digest, last: float | None, now: float) -> bool:
    """Whether the digest of this week has still to be sent."""
    local = time.localtime(now)
    ripe = local.tm_wday == digest.weekday and local.tm_hour * 60 + local.tm_min >= digest.minute
    return ripe and (last is None or now - last > DAY)


def run_digest(monitor: Monitor, now: float, db: Database) -> None:
    digest, last = monitor.settings.digest, get_meta(db, "digest_at")
    if digest is None or not digest_due(digest, float(last) if last else None, now):
        return
    set_meta(db, "digest_at", now)
    fleet = monitor.fleet
    item = notice("digest", "info", digest_text(db, fleet, now), fleet.public_url + "/", now)
    for channel in fleet.channels:
        if digest.channels is None or channel.name in digest.channels:
            queue_notification(db, fleet, channel, None, item, now)


def digest_text(db: Database, fleet: Fleet, now: float) -> str:
    """The week: opened and closed, nearest to full, worst backups, most worn disks, silent hosts, noisiest rules."""
    week = {"week": now - 7 * DAY}
    opened = db.execute("SELECT count(*) FROM alert WHERE fired_at > :week", week).fetchone()[0]
    closed = db.execute("SELECT count(*) FROM alert WHERE state = 'resolved' AND resolved_at > :week "
                        "AND fired_at IS NOT NULL", week).fetchone()[0]
    noisy = db.execute("SELECT rule, count(*) AS n FROM alert WHERE fired_at > :week "
                       "GROUP BY rule ORDER BY n DESC LIMIT 5", week).fetchall()
    full, late, worn = digest_numbers(fleet, now)
    silent = [host.name for host in fleet.hosts.values() if fleet.is_offline(host, now)]
    day = time.strftime("%Y-%m-%d", time.localtime(now))
    parts = (
        ("Nearest to full", [f"{percent(used)} {host} {pool}" for used, host, pool in sorted(full, reverse=True)[:5]]),
        ("Latest backups", [f"{format_duration(by)} late on {host}" for by, host in sorted(late, reverse=True)[:5]]),
        ("Most worn disks", [f"{percent(used)} {host} {disk}" for used, host, disk in sorted(worn, reverse=True)[:5]]),
        ("Silent hosts", sorted(silent)[:20]),
        ("Noisiest rules", [f"{row['rule']} {row['n']}×" for row in noisy]),
    )
    lines = [f"The week until {day}: {opened} alerts opened, {closed} closed."]
    lines += [f"{title}: {'; '.join(found) or 'none'}." for title, found in parts]
    return "\n".join(one_line(line) for line in lines)


def digest_numbers(fleet: Fleet, now: float) -> tuple[list[Any], list[Any], list[Any]]:
    """How full the pools are, how late the backups, how worn the disks. A host that sends nonsense is left out."""
    full, late, worn = [], [], []
    for host in fleet.hosts.values():
        try:
            full += [(used, host.name, str(pool["name"])) for pool in host.items("pools")
                     if (used := number(pool, "capacity_ratio")) is not None]
            worn += [(used, host.name, str(disk["name"])) for disk in host.body("disks", ())
                     if (used := number(disk, "wear_ratio"))]
            overdue = worst_backup(host, fleet, now)
            late += [(overdue, host.name)] if overdue is not None and overdue > 0 else []
        except Exception as error:
            log(f"digest: {host.name} is left out: {type(error).__name__}: {error}")
    return full, late, worn


def certificate_ends_at(url: str) -> float | None:
    """When the certificate of an https address expires; None for http, or when nobody answers."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https":
        return None
    context = ssl.create_default_context()
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 443), timeout=SEND_TIMEOUT) as plain:
            with context.wrap_socket(plain, server_hostname=parts.hostname) as secure:
                return ssl.cert_time_to_seconds(str((secure.getpeercert() or {}).get("notAfter")))
    except ssl.SSLCertVerificationError as error:
        return 0.0 if error.verify_code == 10 else None  # X509_V_ERR_CERT_HAS_EXPIRED
    except (OSError, ValueError):
        return None


def watch_certificate(fleet: Fleet) -> None:
    """Look at this server's own certificate."""
    fleet.certificate_ends_at = certificate_ends_at(fleet.public_url)


def is_well(monitor: Monitor) -> bool:
    """Whether what comes in is written and judged."""
    store, judged = monitor.store, monitor.judged_at
    return store.alive and store.last_error is None and judged is not None and time.monotonic() - judged < MINUTE


def beat(monitor: Monitor) -> float:
    """Call HEARTBEAT_URL while all is well: when the monitor dies, whoever waits for the call notices. Gives back the
    seconds to the next call."""
    if not is_well(monitor):
        return 5
    request = urllib.request.Request(monitor.config.heartbeat_url, headers={"User-Agent": f"proxmon/{VERSION}"})
    try:
        with OPENER.open(request, timeout=SEND_TIMEOUT):
            return MINUTE
    except urllib.error.HTTPError as error:
        raise Undelivered(f"HTTP {error.code}") from None


def start_watches(monitor: Monitor) -> None:
    """The loops that ask the network: this server's certificate, twice a day; the sign of life to the outside."""
    if monitor.fleet.public_url.startswith("https://"):
        every(12 * HOUR, "certificate", partial(watch_certificate, monitor.fleet), monitor.stop, first=MINUTE,
              vital=False)
    if monitor.config.heartbeat_url:
        every(MINUTE, "heartbeat", partial(beat, monitor), monitor.stop, first=5, vital=False)


EACH_REQUEST.append(lambda monitor, db, state, changed, now: dispatch(db, monitor.fleet, [state], now))


# --- columns: numbers packed into few bytes, exactly ---

CONSTANT, PLAIN, DELTA, DOUBLES, HOLES = 0, 1, 2, 3, 8
COLUMN = struct.Struct("<BBI")  # how it is packed (with HOLES: not every row has a value), decimals, bytes that follow
SCALES = tuple(10**decimals for decimals in range(7))
CHUNK_LEVEL = 1  # of zlib: 6 takes three times as long and saves 3 %
NAN = math.nan


def pack_column(values: Sequence[float], scaled: tuple[int, list[int]] | None = None) -> bytes:
    """Doubles, NaN where there is none. What agents send are decimals: whole numbers of 1, 0.1 … 0.000001, whose
    differences are small; bytes of the same weight stand together, which zlib likes. What is no such decimal stays
    as it is. `scaled` is what scale() would find, if it is known."""
    how, holes = 0, b""
    total = sum(values)
    if total != total:
        how, holes = HOLES, pack_bits([value == value for value in values])
        values = [value for value in values if value == value]
    if not values or values.count(values[0]) == len(values):
        kind, decimals, packed = CONSTANT, 0, struct.pack("<d", values[0] if values else NAN)
    else:
        scaled = scaled or scale(values)
        kind, decimals, packed = pack_whole(*scaled) if scaled else (DOUBLES, 0, b"")
        if kind == DOUBLES:
            packed = array("d", values).tobytes()
    return COLUMN.pack(how | kind, decimals, len(holes) + len(packed)) + holes + packed


def pack_whole(decimals: int, whole: list[int]) -> tuple[int, int, bytes]:
    """How, decimals and bytes of whole numbers that are not all the same; DOUBLES if they are too large."""
    steps = [step << 1 if step >= 0 else ~(step << 1) for step in map(sub, whole[1:], whole)]  # zig-zag
    if min(whole) >= 0 and max(whole) < 1 << 64 and sum(whole) <= sum(steps):
        return PLAIN, decimals, pack_planes(whole)
    if max(steps) < 1 << 63 and abs(whole[0]) < 1 << 63:
        return DELTA, decimals, struct.pack("<q", whole[0]) + pack_planes(steps)
    return DOUBLES, 0, b""


def scale(values: Sequence[float]) -> tuple[int, list[int]] | None:
    """The fewest decimals that give the values exactly, and the whole numbers; None if six are too few."""
    wanted = list(values)
    decimals = need_decimals(wanted[:: len(wanted) // 8 + 1], 0)  # by some of them, so that mostly one try is enough
    while decimals < len(SCALES):
        by = SCALES[decimals]
        whole = list(map(round, [value * by for value in wanted])) if decimals else list(map(int, wanted))
        again = [number / by for number in whole] if decimals else list(map(float, whole))
        if again == wanted:
            return decimals, whole
        decimals = need_decimals([value for value, other in zip(wanted, again) if value != other], decimals)
    return None


def need_decimals(values: Sequence[float], decimals: int) -> int:
    """How many decimals the values need, from so many on."""
    for value in values:
        while decimals < len(SCALES) and round(value * SCALES[decimals]) / SCALES[decimals] != value:
            decimals += 1
    return decimals


def pack_planes(numbers: list[int]) -> bytes:
    """Whole numbers from 0 in as few bytes as the largest needs: first all the lowest bytes, then the next."""
    width = (max(numbers).bit_length() + 7) // 8
    if width == 1:
        return bytes(numbers)
    packed = array("Q", numbers).tobytes()
    return b"".join(packed[plane::8] for plane in range(width))


def unpack_planes(packed: bytes, count: int) -> list[int]:
    if len(packed) == count:
        return list(packed)
    spread = bytearray(8 * count)
    for plane in range(len(packed) // count):
        spread[plane::8] = packed[plane * count : (plane + 1) * count]
    return array("Q", bytes(spread)).tolist()


def pack_bits(flags: Sequence[bool]) -> bytes:
    return int("1" + "".join("1" if flag else "0" for flag in flags), 2).to_bytes((len(flags) + 8) // 8, "big")


def unpack_bits(packed: bytes, count: int) -> list[bool]:
    return [digit == "1" for digit in bin(int.from_bytes(packed, "big"))[3:]] if count else []


def place(values: Iterable[Any], there: Sequence[bool]) -> list[Any]:
    """Values at the rows that have one, NaN at the others."""
    column = [NAN] * len(there)
    for row, value in zip(compress(range(len(there)), there), values):
        column[row] = value
    return column


def unpack_column(packed: bytes, at: int, rows: int) -> list[float]:
    """The values of the column that begins at a byte."""
    how, decimals, size = COLUMN.unpack_from(packed, at)
    at, end = at + COLUMN.size, at + COLUMN.size + size
    if not how & HOLES:
        return unpack_numbers(how, decimals, packed[at:end], rows)
    width = (rows + 8) // 8
    there = unpack_bits(packed[at : at + width], rows)
    return place(unpack_numbers(how & ~HOLES, decimals, packed[at + width : end], sum(there)), there)


def unpack_numbers(how: int, decimals: int, packed: bytes, count: int) -> list[float]:
    if how == CONSTANT:
        return [struct.unpack("<d", packed)[0]] * count
    if how == DOUBLES:
        return array("d", packed).tolist()
    if how == PLAIN:
        whole: Iterable[int] = unpack_planes(packed, count)
    else:
        steps = [(step >> 1) ^ -(step & 1) for step in unpack_planes(packed[8:], count - 1)]
        whole = accumulate(steps, initial=struct.unpack_from("<q", packed)[0])
    by = SCALES[decimals]
    return list(map(float, whole)) if by == 1 else [number / by for number in whole]


def skip_columns(packed: bytes, at: int, columns: int) -> int:
    """The byte after so many columns."""
    for _ in range(columns):
        at += COLUMN.size + COLUMN.unpack_from(packed, at)[2]
    return at


def pack_chunk(segments: list[tuple[int, int, bytes]]) -> bytes:
    """Segments (object, layout, bytes), each compressed alone so that one is read without the others; in front of
    them a directory: how many, then all objects, all layouts, all ends."""
    packed = []
    for _, _, segment in segments:
        packer = zlib.compressobj(CHUNK_LEVEL, zlib.DEFLATED, -15)
        packed.append(packer.compress(segment) + packer.flush())
    objects, layouts = [segment[0] for segment in segments], [segment[1] for segment in segments]
    directory = array("I", [len(segments), *objects, *layouts, *accumulate(map(len, packed))])
    return directory.tobytes() + b"".join(packed)


def open_chunk(body: bytes) -> dict[int, tuple[int, slice]]:
    """Object -> layout, and where in the body its segment is."""
    count = int.from_bytes(body[:4], "little")
    begin = 4 + 12 * count
    head = array("I", body[4:begin]).tolist()
    ends = [begin + end for end in head[2 * count :]]
    return {thing: (layout, slice(start, end)) for thing, layout, start, end in zip(
        head, head[count:], [begin, *ends], ends)}


def inflate(segment: bytes) -> bytes:
    return zlib.decompress(segment, -15)


# --- history: reports as they came, the numbers in them, and what time leaves of these ---

# The steps of history: how long each is kept, and what span of time one chunk of it holds.
RAW, FINE, COARSE = 30, 5 * MINUTE, HOUR
KEPT = {RAW: 8 * DAY, FINE: 90 * DAY, COARSE: 730 * DAY}  # RAW: longer than an agent's spool, so no day is made twice
SPANS = {RAW: HOUR, FINE: DAY, COARSE: 10 * DAY}
STEP_CODES = {RAW: 0, FINE: 1, COARSE: 2}
ON_REQUEST = (6 * HOUR, DAY, 10 * DAY)  # made from hours when years are asked for
POINTS_MOST = 2000
RATE_MOST = HOUR  # a counter's values that are farther apart make no rate
HISTORY_MEMORY = 16 << 20  # bytes of numbers not yet in chunks that are kept at hand
FRESH_MOST, FRESH_WEIGHT = 16, 1 << 20  # reports, and bytes of them as weigh() has it, whose numbers may wait

OBJECTS_MOST = 5000  # of one section of a report
FIELDS_MOST = 300  # of one object
OBJECTS_KEPT, LAYOUTS_KEPT = 20_000, 2000  # of one host; what is beyond has no history

ObjectKey = tuple[str, str]  # section, object ('' = the section itself)
Wanted = dict[ObjectKey, set[str]] | None  # fields by object; None: everything
ObjectIds = dict[ObjectKey, int]
LayoutIds = dict[tuple[str, ...], int]  # names of fields -> number
TickKey = tuple[int, int, int]  # milliseconds, run, seq
Point = tuple[float, float, float, float]  # average, minimum, maximum, count

NODE_PARTS = (("interfaces", ("name",)), ("block_devices", ("name",)), ("temperatures", ("sensor", "label")))
ONLY = {"datasets": frozenset(("used_bytes", "available_bytes", "referenced_bytes", "used_by_snapshots_bytes"))}
NOT_NUMBERS = TEXT_NAMES | TRUTH_NAMES | {
    "vmid", "as_of", "tags", "ha_state", "boot_id", "kernel_next", "reboot_needed", "interfaces", "block_devices",
    "temperatures", "volumes", "damaged_files", "status_text", "action_text", "scan", "last_scrub", "expansion",
    "readonly", "features_disabled", "vdevs", "enabled", "wwn", "kind", "vdev", "selftest", "up", "unused",
    "config_changed"}
BOOT = "~boot"  # a number that is another after each boot: counters begin anew then

Parts = tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]  # sections, names of objects, fields of each of them


class Tick(NamedTuple):
    """The numbers of one report. The first three together name it and are its place in the order of time."""

    ms: int
    run: int  # crc32 of run_id
    seq: int
    parts: Parts  # what the values are
    values: array[float]


def build_tick(report: Fields, received_at: float) -> Tick:
    """Every number of the sections that have a history; NaN where something else stands."""
    parts: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
    cells: list[Any] = []
    for section, names, objects in history_sections(report):
        layouts = list(map(tuple, objects))
        alike = layouts.count(layouts[0]) == len(objects)  # most: all at once
        for layout, some, of in ((layouts[0], names, objects),) if alike else zip(layouts, zip(names), zip(objects)):
            kept, mask = kept_fields(section, layout)
            parts.append((section, tuple(some), kept))
            cells += compress(chain.from_iterable(map(dict.values, of)), mask * len(of))
    try:
        values = array("d", cells)
    except TypeError:
        values = array("d", [cell if type(cell) in (float, int, bool) else NAN for cell in cells])
    at = min(report["time"], received_at)
    run = zlib.crc32(report["run_id"].encode("utf-8", "replace"))
    return Tick(int(at * 1000), run, report["seq"], tuple(parts), values)


def history_sections(report: Fields) -> Iterator[tuple[str, list[str], list[Fields]]]:
    """Section, names of its objects and their fields, of all that has a history."""
    if isinstance(report.get("node"), dict):
        yield "node", *history_of_node(report["node"])
    for section in ("guests", "storages", "datasets", "disks"):
        objects = (report.get(section) or [])[:OBJECTS_MOST]
        if objects:
            key = SECTIONS[section].key
            yield section, [str(object[key])[:200] for object in objects], objects
    pools = []
    for pool in (report.get("pools") or [])[:OBJECTS_MOST]:
        more = {**vdev_errors(pool), "scan_progress_ratio": number(pool.get("scan"), "progress_ratio")}
        pools.append({**pool, **{name: NAN if value is None else value for name, value in more.items()}})
    if pools:
        yield "pools", [pool["name"][:200] for pool in pools], pools


def history_of_node(node: Fields) -> tuple[list[str], list[Fields]]:
    """The host itself, and its interfaces, disks and sensors."""
    boot = {BOOT: zlib.crc32(node["boot_id"].encode("utf-8", "replace"))} if text(node, "boot_id") else {}
    names, objects = [""], [{**node, **boot}]
    for part, keys in NODE_PARTS:
        for device in dicts(node.get(part))[:OBJECTS_MOST]:
            name = " ".join(device[key] for key in keys if text(device, key))
            names.append(f"{part}/{name}"[:200])
            objects.append({**device, **boot})
    return names, objects


def kept_fields(section: str, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """Of an object's fields those that may be numbers with a history, and which ones of all these are."""
    wild = len(names) > FIELDS_MOST or max(map(len, names), default=0) > 200  # nothing to remember for long
    return (choose_fields.__wrapped__ if wild else choose_fields)(section, names)


@lru_cache(1000)
def choose_fields(section: str, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """No times, no keys, no texts."""
    only = ONLY.get(section)
    mask = tuple(at < FIELDS_MOST and (name in only if only else name not in NOT_NUMBERS and not name.endswith("_at")
                                       and len(name) < 100) for at, name in enumerate(names))
    return tuple(compress(names, mask)), mask


class History:
    """What a running server keeps at hand of the history: the numbers of reports that are in no chunk yet, as far
    as HISTORY_MEMORY goes, and the names of layouts. Asked by many threads; `_lock` guards what they change."""

    def __init__(self) -> None:
        self.bytes = 0
        self.hours: dict[int, dict[int, tuple[float, int]]] = {}  # host -> hour -> sum and count of CPU in use
        self.layouts: dict[int, tuple[str, ...]] = {}
        self._ticks: dict[int, dict[int, Tick]] = {}  # host -> report -> its numbers
        self._parts: dict[int, dict[Parts, Parts]] = {}  # host -> what its last reports held: one copy for all alike
        self._parsed: dict[int, Tick] = {}  # what had to be read from the disk for somebody's question
        self._fresh: list[tuple[int, int, Fields, float]] = []  # reports whose numbers are not taken out yet
        self._fresh_weight = 0
        self._lock = threading.Lock()

    def remember(self, host_id: int, report_id: int, report: Fields, received_at: float, weight: int) -> None:
        """A report has come; called by who writes it, one at a time. `weight`: see weigh()."""
        value = number(report.get("node"), "cpu_ratio")
        if value is not None:
            hours, hour = self.hours.setdefault(host_id, {}), int(min(report["time"], received_at)) // HOUR * HOUR
            total, count = hours.get(hour, (0.0, 0))
            if len(hours) > 100:
                hours.clear()
            hours[hour] = total + value, count + 1
        with self._lock:
            if self.bytes < HISTORY_MEMORY:
                self._fresh.append((host_id, report_id, report, received_at))
                self._fresh_weight += weight
                if len(self._fresh) >= FRESH_MOST or self._fresh_weight > FRESH_WEIGHT:
                    self._take_in()

    def _take_in(self) -> None:
        """Take the numbers out of the fresh reports; several in a row cost half of what each costs by itself. Under
        the lock."""
        fresh, self._fresh, self._fresh_weight = self._fresh, [], 0
        for host_id, report_id, report, received_at in fresh:
            try:
                tick = build_tick(report, received_at)
            except ODD as error:  # this report's: it must not cost the others of the group, nor who comes by
                log_once(f"history: the numbers of report {report_id} cannot be taken out: {error!r}")
                continue
            same = self._parts.setdefault(host_id, {})
            if len(same) > 10:
                same.clear()
            tick = tick._replace(parts=same.setdefault(tick.parts, tick.parts))
            self._ticks.setdefault(host_id, {})[report_id] = tick
            self.bytes += tick_bytes(tick)

    def forget(self, host_id: int, report_ids: Iterable[int]) -> None:
        """Reports went into a chunk."""
        with self._lock:
            self._take_in()
            ticks = self._ticks.get(host_id, {})
            for report_id in report_ids:
                self._parsed.pop(report_id, None)
                tick = ticks.pop(report_id, None)
                self.bytes -= tick_bytes(tick) if tick else 0

    def forget_hosts(self, but: Set[int]) -> None:
        """Hosts were removed: give back what is kept of all others than these."""
        with self._lock:
            self._take_in()
            for host_id in (self._ticks.keys() | self._parts.keys() | self.hours.keys()) - but:
                self.bytes -= sum(map(tick_bytes, self._ticks.pop(host_id, {}).values()))
                self._parts.pop(host_id, None)
                self.hours.pop(host_id, None)

    def clear(self) -> None:
        with self._lock:
            self._ticks, self._parts, self._parsed, self.bytes = {}, {}, {}, 0
            self._fresh, self._fresh_weight = [], 0

    def tail(self, db: Database, host_id: int, since: float = 0, until: float = math.inf, *,
             most: int | None = None, without: Set[int] = frozenset()) -> dict[int, Tick]:
        """Reports of a span of time that are in no chunk yet, oldest first."""
        with self._lock:
            self._take_in()
        known, ids = self._ticks.get(host_id, {}), tail_ids(db, host_id, since, until)
        ticks = {report_id: known.get(report_id) or self._parsed.get(report_id) or self._parse(db, report_id)
                 for report_id in islice((report_id for report_id in ids if report_id not in without), most)}
        return {report_id: tick for report_id, tick in ticks.items() if tick}

    def _parse(self, db: Database, report_id: int) -> Tick | None:
        row = find_report(db, report_id)
        if row is None:
            return None
        tick = build_tick(read_body(row["body"]), row["received_at"])
        with self._lock:
            if len(self._parsed) > 3000:
                self._parsed = {}
            self._parsed[report_id] = tick
        return tick

    def layout(self, db: Database, layout_id: int) -> tuple[str, ...]:
        """The names of a layout's fields."""
        if layout_id not in self.layouts:
            self.read_layouts(db)
        return self.layouts[layout_id]

    def read_layouts(self, db: Database) -> LayoutIds:
        rows = db.execute("SELECT id, fields FROM history_layout").fetchall()
        self.layouts = {row["id"]: tuple(json.loads(row["fields"])) for row in rows}  # a new one: others read the old
        return {fields: number for number, fields in self.layouts.items()}


def tick_bytes(tick: Tick) -> int:
    return 300 + 8 * len(tick.values)


def tail_ids(db: Database, host_id: int, since: float = 0, until: float = math.inf) -> Iterator[int]:
    """Ids of a host's reports that are in no chunk yet, oldest first."""
    for row in db.execute("SELECT id FROM report WHERE id BETWEEN :first AND :last ORDER BY id",
                          report_span(host_id, since, until)):
        yield row[0]


# Frames: the numbers of one host, column by column.


class Frame(NamedTuple):
    """Rows and their keys, rising, and of each field of each object a cell for every row; NaN = not there. Either of
    reports, whose keys are TickKeys and whose cells are doubles; or of steps: the times they begin at, and Points."""

    keys: list[Any]
    objects: dict[ObjectKey, dict[str, list[Any]]]


def merge(frames: Iterable[Frame]) -> Frame:
    """Several as one. A row that is in several is there once."""
    keys: list[Any] = []
    objects: dict[ObjectKey, dict[str, list[Any]]] = {}
    frames = sorted((frame for frame in frames if frame.keys), key=lambda frame: frame.keys[0])
    if len(frames) == 1:
        return frames[0]
    for frame in frames:
        for name, fields in frame.objects.items():
            columns = objects.setdefault(name, {})
            for field, column in fields.items():
                whole = columns.setdefault(field, [])
                whole += [NAN] * (len(keys) - len(whole))
                whole += column
        keys += frame.keys
    for columns in objects.values():
        for column in columns.values():
            column += [NAN] * (len(keys) - len(column))
    if all(map(lt, keys, keys[1:])):
        return Frame(keys, objects)
    in_order = itemgetter(*sorted({key: row for row, key in enumerate(keys)}.values(), key=keys.__getitem__), -1)
    return Frame(list(in_order(keys)[:-1]), {  # of one row alone it would give no tuple
        name: {field: list(in_order(column)[:-1]) for field, column in columns.items()}
        for name, columns in objects.items()})


def cut(frame: Frame, since: float, until: float) -> Frame:
    """The rows of a frame of steps from one time to before another."""
    first, last = bisect.bisect_left(frame.keys, since), bisect.bisect_left(frame.keys, until)
    return Frame(frame.keys[first:last], {name: {field: column[first:last] for field, column in columns.items()}
                                          for name, columns in frame.objects.items()})


def frame_of(ticks: Iterable[Tick], wanted: Wanted = None) -> Frame:
    """The numbers of reports, in the order of their time."""
    alike: dict[Parts, list[Tick]] = {}
    for tick in sorted(ticks, key=lambda tick: tick[:3]):
        alike.setdefault(tick.parts, []).append(tick)
    return merge(frame_of_alike(parts, same, wanted) for parts, same in alike.items())


def frame_of_alike(parts: Parts, ticks: list[Tick], wanted: Wanted) -> Frame:
    """Reports that hold the same are turned into columns at once."""
    rows, objects, start = [tick.values for tick in ticks], {}, 0
    matrix = list(map(list, zip(*rows))) if wanted is None else []
    for section, names, fields in parts:
        for name in names:
            key = section, name
            if wanted is None:
                objects[key] = dict(zip(fields, matrix[start : start + len(fields)]))
            elif key in wanted:
                objects[key] = {field: [row[at] for row in rows] for at, field in enumerate(fields, start)
                                if field in wanted[key]}
            start += len(fields)
    return Frame([tick[:3] for tick in ticks], objects)


def stored_names(frame: Frame) -> dict[ObjectKey, tuple[str, ...]]:
    """The columns of each object that hold anything."""
    names = {key: tuple(sorted(field for field, column in columns.items() if any(cell == cell for cell in column)))
             for key, columns in frame.objects.items()}
    return {key: fields for key, fields in names.items() if fields}


def pack_reports(frame: Frame, objects: ObjectIds, layouts: LayoutIds) -> bytes:
    """A frame of reports as a chunk: segment 0 has their times and names, then a segment for each object, with the
    rows that have it."""
    segments = [(0, len(frame.keys), b"".join(map(pack_column, zip(*frame.keys))))]
    for key, names in stored_names(frame).items():
        if key in objects and names in layouts:
            columns = [frame.objects[key][name] for name in names]
            head = b"\1"
            if all(math.isnan(sum(column)) for column in columns):  # none is whole
                known = [list(map(eq, column, column)) for column in columns]
                there = known[0] if known.count(known[0]) == len(known) else list(map(any, zip(*known)))
                if not all(there):
                    head = b"\0" + pack_bits(there)
                    columns = [list(compress(column, there)) for column in columns]
            segments.append((objects[key], layouts[names], head + b"".join(map(pack_column, columns))))
    return pack_chunk(segments)


def unpack_reports(history: History, db: Database, body: bytes, objects: dict[int, ObjectKey], wanted: Wanted) -> Frame:
    """What is wanted of a chunk of reports."""
    chunk = open_chunk(body)
    count, segment = chunk[0]
    packed, at, heads = inflate(body[segment]), 0, []
    for _ in range(3):
        heads.append(list(map(int, unpack_column(packed, at, count))))
        at = skip_columns(packed, at, 1)
    found = {}
    for object_id in objects.keys() & chunk.keys():
        layout_id, segment = chunk[object_id]
        key = objects[object_id]
        names = history.layout(db, layout_id)
        found[key] = unpack_object(inflate(body[segment]), count, names, wanted[key] if wanted else None)
    return Frame(list(zip(*heads)), found)


def unpack_object(packed: bytes, count: int, names: tuple[str, ...], wanted: set[str] | None) -> dict[str, list[float]]:
    there, at = [True] * count, 1
    if not packed[0]:
        at += (count + 8) // 8
        there = unpack_bits(packed[1:at], count)
    rows, columns = sum(there), {}
    for name in names:
        if wanted is None or name in wanted:
            column = unpack_column(packed, at, rows)
            columns[name] = column if rows == count else place(column, there)
        at = skip_columns(packed, at, 1)
    return columns


# Points: averages, minima and maxima of steps.


def stored_field(field: str) -> str:
    """The field that is kept for a name: a rate is made from its counter."""
    return field.removesuffix("_per_second") + "_total" if field.endswith("_per_second") else field


def list_values(frame: Frame, key: ObjectKey, field: str) -> list[float]:
    """The values of a series in a frame of reports; a counter as its rate per second; NaN = none."""
    columns = frame.objects.get(key, {})
    if field not in columns:
        return [NAN] * len(frame.keys)
    if field.endswith("_total"):
        return list_rates([row[0] for row in frame.keys], columns, [field])[field]
    return columns[field]


def list_rates(times: list[int], columns: dict[str, list[float]], fields: Iterable[str]) -> dict[str, list[float]]:
    """Counters' growth per second, at the end of each interval. A restart, a counter that fell and too long a time
    between make a gap: nobody knows what happened in it."""
    fields, rates = list(fields), {}
    waits = list_waits(times, columns) if fields else []
    for field in fields:
        values = columns[field]
        if not math.isnan(sum(values)):
            rates[field] = list_growth(values, waits)
            continue
        there = list(map(eq, values, values))
        known = {name: list(compress(columns[name], there)) for name in (field, "uptime_seconds", BOOT)
                 if name in columns}
        known_waits = list_waits(list(compress(times, there)), known)
        rates[field] = place(list_growth(known[field], known_waits), there)
    return rates


def list_waits(times: list[int], columns: dict[str, list[float]]) -> list[float]:
    """Seconds from each row to the next; 0 where counters cannot be compared: what was counted may have begun anew
    (its uptime fell or is shorter than the wait, or another boot), or the wait was too long."""
    waits = [(after - before) / 1000 for before, after in zip(times, times[1:])]
    uptimes, boots = columns.get("uptime_seconds"), columns.get(BOOT)
    if uptimes:
        waits = [0.0 if after < before or after + 1 < wait else wait
                 for before, after, wait in zip(uptimes, uptimes[1:], waits)]
    if boots and boots.count(boots[0]) < len(boots):
        waits = [0.0 if abs(after - before) > 0 else wait for before, after, wait in zip(boots, boots[1:], waits)]
    return waits if min(waits, default=0) >= 0 and max(waits, default=0) <= RATE_MOST else [
        wait if 0 < wait <= RATE_MOST else 0.0 for wait in waits]


def list_growth(values: list[float], waits: list[float]) -> list[float]:
    return [NAN] + [(after - before) / wait if wait and after >= before else NAN
                    for before, after, wait in zip(values, values[1:], waits)]


def fold(frame: Frame, plain: Wanted, day: int) -> Frame:
    """The points of 5 minutes of a day, from its reports and those of the hour before."""
    times, grid = [key[0] for key in frame.keys], range(day, day + DAY, FINE)
    bounds = [bisect.bisect_left(times, at * 1000) for at in (*grid, day + DAY)]
    spans = {b"": list(zip(bounds, bounds[1:]))}  # by which rows have a value: a step's first row, and after its last
    objects: dict[ObjectKey, dict[str, list[Any]]] = {}
    for key, columns in frame.objects.items():
        fields = columns.keys() - {BOOT} if plain is None else columns.keys() & plain[key]
        rates = list_rates(times, columns, [field for field in fields if field.endswith("_total")])
        objects[key] = {}
        for field in fields:
            values, rows = rates.get(field, columns[field]), b""
            if math.isnan(sum(values)):
                there = list(map(eq, values, values))
                values, rows = list(compress(values, there)), bytes(there)
                if rows not in spans:
                    counts = [0, *accumulate(there)]
                    spans[rows] = [(counts[row], counts[end]) for row, end in spans[b""]]
            objects[key][field] = fold_column(values, spans[rows], is_rate=field in rates)
    return Frame(list(grid), objects)


def fold_column(values: list[float], spans: list[tuple[int, int]], *, is_rate: bool) -> list[Any]:
    """Points of values that are all known; NaN for a step without any."""
    first = values[0] if values else NAN
    if values.count(first) == len(values) and not is_rate:
        return [(first, first, first, float(end - row)) if row < end else NAN for row, end in spans]
    there = [row < end for row, end in spans]
    parts = [values[row:end] for row, end in compress(spans, there)]
    lows, highs = list(map(min, parts)), list(map(max, parts))
    if is_rate:
        lows, highs = list(map(rough, lows)), list(map(rough, highs))
    return place([(low if low == high else tidy(sum(part) / len(part), low, high), low, high, float(len(part)))
                  for part, low, high in zip(parts, lows, highs)], there)


def tidy(average: float, lowest: float, highest: float) -> float:
    """An average with as many digits as say something beside its minimum and maximum; zeros take no room."""
    if -1000 < average < 1000:
        rounded = round(average * 10000) / 10000
    else:
        bits = max(0, math.frexp(highest - lowest)[1] - 8)
        rounded = math.ldexp(round(math.ldexp(average, -bits)), bits)
    return lowest if rounded < lowest else highest if rounded > highest else rounded


def rough(rate: float) -> float:
    """A rate to about a thousandth: it is a quotient of noisy times anyway."""
    if rate < 1000:
        return round(rate * 1000) / 1000
    part, bits = math.frexp(rate)
    return math.ldexp(round(part * 2048), bits - 11)


def combine(cells: Iterable[Any]) -> Any:
    """Several points as one; NaN if there is none."""
    points = [cell for cell in cells if cell == cell]
    if len(points) < 2:
        return points[0] if points else NAN
    averages, lows, highs, counts = zip(*points)
    lowest, highest, count = min(lows), max(highs), sum(counts)
    return tidy(sum(map(mul, averages, counts)) / count, lowest, highest), lowest, highest, count


def coarsen(frame: Frame, step: int) -> Frame:
    """A frame of longer steps."""
    starts = [at // step * step for at in frame.keys]
    bounds = [row for row, at in enumerate(starts) if not row or at > starts[row - 1]]
    spans = list(zip(bounds, [*bounds[1:], len(starts)]))
    return Frame([starts[row] for row in bounds], {
        key: {field: [combine(column[row:end]) for row, end in spans] for field, column in columns.items()}
        for key, columns in frame.objects.items()})


def pack_points(frame: Frame, objects: ObjectIds, layouts: LayoutIds) -> bytes:
    """The points of a chunk's whole span as a chunk. Of a field: which steps it has, averages, how far minimum and
    maximum are from them, and how many values were in each step."""
    return pack_chunk([
        (objects[key], layouts[names], b"".join(pack_field(frame.objects[key][name]) for name in names))
        for key, names in stored_names(frame).items() if key in objects and names in layouts])


def pack_field(cells: list[Any]) -> bytes:
    there = [cell == cell for cell in cells]
    averages, lowest, highest, counts = zip(*compress(cells, there))
    size, scaled = len(averages), scale((*averages, *lowest, *highest))
    if scaled is None or max(scaled[1]) >= 1 << 52 or min(scaled[1]) <= -(1 << 52):  # differences have to be exact
        return bytes([NOT_SCALED]) + pack_bits(there) + b"".join(map(pack_column, (averages, lowest, highest, counts)))
    decimals, whole = scaled
    middle, low, high = whole[:size], whole[size : 2 * size], whole[2 * size :]
    columns = (middle, list(map(sub, middle, low)), list(map(sub, high, middle)), list(map(int, counts)))
    return bytes([decimals]) + pack_bits(there) + b"".join(pack_column(column, (0, column)) for column in columns)


NOT_SCALED = 255


def unpack_points(history: History, db: Database, body: bytes | None, steps: range,
                  objects: dict[int, ObjectKey], wanted: Wanted) -> Frame:
    """What is wanted of a chunk of points; every step of its span is a row."""
    chunk = open_chunk(body) if body else {}
    frame = Frame(list(steps), {})
    for object_id in objects.keys() & chunk.keys():
        layout_id, segment = chunk[object_id]
        key, packed, at = objects[object_id], inflate((body or b"")[segment]), 0
        columns = frame.objects[key] = {}
        for name in history.layout(db, layout_id):
            begin = at + 1 + (len(steps) + 8) // 8
            if wanted is None or name in wanted[key]:
                columns[name] = unpack_field(packed, at, begin, len(steps))
            at = skip_columns(packed, begin, 4)
    return frame


def unpack_field(packed: bytes, at: int, begin: int, steps: int) -> list[Any]:
    """The points of a field whose head is at a byte, and whose columns begin at another."""
    decimals, there = packed[at], unpack_bits(packed[at + 1 : begin], steps)
    columns = []
    for _ in range(4):
        columns.append(unpack_column(packed, begin, sum(there)))
        begin = skip_columns(packed, begin, 1)
    if decimals == NOT_SCALED:
        return place(zip(*columns), there)
    by = SCALES[decimals]
    return place(((middle / by, (middle - low) / by, (middle + high) / by, count)
                  for middle, low, high, count in zip(*columns)), there)


# Reading: chunks and tail together, whatever has been packed by now.


class Reader:
    """One host's history for one question: `asked` are the fields by object; None = everything."""

    def __init__(self, history: History, db: Database, host_id: int, asked: Wanted):
        self.history, self.db, self.host_id = history, db, host_id
        self.objects = find_objects(db, host_id, asked)
        self.plain = asked
        self.stored: Wanted = asked and {  # to make a rate, one has to know of restarts
            key: fields | {"uptime_seconds", BOOT} if any(field.endswith("_total") for field in fields) else fields
            for key, fields in asked.items()}

    def reports(self, since: float, until: float, *, tail: bool = True) -> Frame:
        """The reports of a span of time. The tail comes first: what leaves it meanwhile is in a chunk by then."""
        ticks = self.history.tail(self.db, self.host_id, since, until) if tail else {}
        return merge([*(unpack_reports(self.history, self.db, row["body"], self.objects, self.stored)
                        for row in list_chunks(self.db, self.host_id, RAW, int(since) // HOUR * HOUR, until)),
                      frame_of(ticks.values(), self.stored)])

    def points(self, step: int, since: int, until: int) -> Frame:
        """Points of 5 minutes or an hour, from the beginning of a step on. Those of a day with reports that are not
        rolled up are made from its reports."""
        span, frames = SPANS[step], []
        fresh = self._changed_days(since // DAY * DAY, until)
        chunks = {chunk_begin(row["id"]): row["body"]
                  for row in list_chunks(self.db, self.host_id, step, since // span * span, until)}
        for begin in sorted(chunks.keys() | {day // span * span for day in fresh}):
            frame = unpack_points(self.history, self.db, chunks.get(begin), range(begin, begin + span, step),
                                  self.objects, self.plain)
            for day in fresh:
                if begin <= day < begin + span:
                    frame = replace_day(frame, day, self.day_points(day), step)
            frames.append(frame)
        return cut(merge(frames), since, until)

    def _changed_days(self, since: int, until: int) -> list[int]:
        """Days with reports in the tail, and such as have changed since their roll-up. In this order: what leaves
        the tail changes its day."""
        busy = {begin_of(report_id, DAY) for report_id in tail_ids(self.db, self.host_id, since, until)}
        states = day_states(self.db, self.host_id, since, until)
        return sorted({day for day in busy if states.get(day) != SEALED} | {
            day for day, state in states.items() if state == CHANGED})

    def day_points(self, day: int, *, tail: bool = True) -> Frame:
        """The points of 5 minutes of a day, from its reports."""
        return fold(self.reports(day - RATE_MOST, day + DAY - 0.001, tail=tail), self.plain, day)


def replace_day(frame: Frame, day: int, fine: Frame, step: int) -> Frame:
    """A frame of steps with one day made anew from points of 5 minutes."""
    return merge([cut(frame, 0, day), fine if step == FINE else coarsen(fine, step), cut(frame, day + DAY, math.inf)])


CHANGED, ROLLED, SEALED = 0, 1, 2  # states of a day


def day_states(db: Database, host_id: int, since: float, until: float) -> dict[int, int]:
    return dict(db.execute("""
        SELECT day, state FROM history_day WHERE host_id = :host AND day BETWEEN :since AND :until""",
        {"host": host_id, "since": int(since) // DAY * DAY, "until": int(until)}).fetchall())


def find_objects(db: Database, host_id: int, asked: Wanted) -> dict[int, ObjectKey]:
    """Number -> name of the objects asked for."""
    if asked is None:
        rows = db.execute("SELECT id, section, object FROM history_object WHERE host_id = :host", {"host": host_id})
    else:
        rows = db.execute("""
            SELECT thing.id, section, object FROM json_each(:asked) CROSS JOIN history_object AS thing
            ON host_id = :host AND section = value ->> 0 AND object = value ->> 1""",
            {"host": host_id, "asked": json.dumps(list(asked))})
    return {row["id"]: (row["section"], row["object"]) for row in rows}


CHUNK_SHIFT = 34


def chunk_id(host_id: int, step: int, begin: float) -> int:
    return (host_id << 2 | STEP_CODES[step]) << CHUNK_SHIFT | max(0, int(begin))


def chunk_begin(number: int) -> int:
    return number & ((1 << CHUNK_SHIFT) - 1)


def chunk_span(host_id: int, step: int, since: float = 0, until: float = math.inf) -> dict[str, int]:
    """First and last possible id of a host's chunks that begin from since to until, for SQL."""
    return {"first": chunk_id(host_id, step, since),
            "last": chunk_id(host_id, step, min(until, 1 << CHUNK_SHIFT - 1))}


def list_chunks(db: Database, host_id: int, step: int, since: float, until: float) -> Iterator[sqlite3.Row]:
    return db.execute("SELECT id, body FROM chunk WHERE id BETWEEN :first AND :last ORDER BY id",
                      chunk_span(host_id, step, since, until))


def begin_of(report_id: int, span: int) -> int:
    """When the span of time begins that a report is in."""
    return int(report_time(report_id)) // span * span


def find_chunk(db: Database, host_id: int, step: int, begin: int) -> bytes | None:
    return next((row["body"] for row in list_chunks(db, host_id, step, begin, begin)), None)


class Question(NamedTuple):
    """What somebody wants to see: series of a host, from, to, and the step that fits."""

    names: list[str]
    since: float
    until: float
    step: int


def parse_series(name: str) -> tuple[ObjectKey, str]:
    """`section.field` or `section/object.field`; an object's name may hold dots and slashes."""
    path, _, field = name.rpartition(".")
    section, _, object = path.partition("/")
    return (section, object), field


def series_name(section: str, object: str, field: str) -> str:
    return f"{section}/{object}.{field}" if object else f"{section}.{field}"


def choose_step(since: float, until: float, wanted: float | None, oldest_raw: float, now: float) -> int:
    """The finest step that fits 2,000 points and is still kept; a step that is asked for, if it fits. 30 = as
    received, always as asked."""
    steps: tuple[int, ...] = (RAW, FINE, COARSE, *ON_REQUEST)
    if wanted is not None and wanted <= RAW and since >= oldest_raw - DAY:
        return RAW
    if wanted is not None and wanted > RAW:
        base = COARSE if wanted >= COARSE or since < now - KEPT[FINE] else FINE
        steps = (max(base, int(-(-wanted // base) * base)), *(step for step in steps if step > wanted))
    kept = [step for step in steps if (step >= FINE or since >= oldest_raw) and (
        step >= COARSE or since >= now - KEPT[FINE])]
    return next((step for step in kept if (until - since) / step <= POINTS_MOST), kept[-1])


def list_raw(frame: Frame, key: ObjectKey, field: str, since: float, until: float) -> list[list[Any]]:
    """A series as it was received: [time, average, minimum, maximum, count] of each value."""
    first, last = since * 1000, until * 1000
    return [[row[0] / 1000, value, value, value, 1] for row, value in zip(frame.keys, list_values(frame, key, field))
            if value == value and first <= row[0] <= last]


def list_points(frame: Frame, key: ObjectKey, field: str) -> list[list[Any]]:
    """A series in steps: [time, average, minimum, maximum, count]."""
    column = frame.objects.get(key, {}).get(field, [])
    return [[at, *cell] for at, cell in zip(frame.keys, column) if cell == cell]


def join_points(points: list[list[Any]]) -> list[list[Any]]:
    """Points of several hosts: two of one step become one."""
    steps: dict[float, list[Any]] = {}
    for at, *point in points:
        steps.setdefault(at, []).append(point)
    return [[at, *combine(steps[at])] for at in sorted(steps)]


def begin_of_history(db: Database, host_id: int) -> float | None:
    """The oldest time of which anything is known."""
    oldest = [db.execute("SELECT min(id) FROM chunk WHERE id BETWEEN :first AND :last",
                         chunk_span(host_id, step)).fetchone()[0] for step in STEP_CODES]
    return min([*(chunk_begin(number) for number in oldest if number is not None),
                *map(report_time, islice(tail_ids(db, host_id), 1))], default=None)


def list_lost(keys: list[TickKey]) -> list[dict]:
    """When reports of a host did not come: holes in the sequence of a run, with the times around them."""
    lost: list[dict] = []
    before: dict[int, tuple[int, int]] = {}
    for ms, run, seq in sorted(keys, key=lambda key: (key[1], key[2])):
        if run in before and seq - before[run][1] > 1:
            lost.append({"from": before[run][0] / 1000, "to": ms / 1000, "reports": seq - before[run][1] - 1})
        before[run] = ms, seq
    return sorted(lost, key=lambda hole: hole["from"])


def list_silences(keys: list[TickKey]) -> list[dict]:
    """When nothing is known of a host: more than 5 minutes without a report that was made in them."""
    ordered = sorted({key[0] for key in keys})
    return [{"from": a / 1000, "to": b / 1000, "seconds": (b - a) / 1000}
            for a, b in zip(ordered, ordered[1:]) if b - a > OFFLINE_SECONDS * 1000]


def export_frame(frame: Frame, step: int, since: float, until: float, asked: Wanted = None) -> Iterator[list[Any]]:
    """Everything asked for: [time, step, series, average, minimum, maximum, count]. What is there for rates is not."""
    for key, columns in sorted(frame.objects.items()):
        for field in sorted(columns.keys() - {BOOT} if asked is None else asked[key] & columns.keys()):
            points = list_raw(frame, key, field, since, until) if step == RAW else list_points(frame, key, field)
            name = series_name(*key, field)
            yield from ([at, step, name, *point] for at, *point in points)


# Replay: what the rules would have said of the past


def replay(db: Database, fleet: Fleet, since: float, until: float,
           in_time: Callable[[], bool] = lambda: True) -> tuple[list[Past], float | None]:
    """What the fleet's rules would have said of what is kept, oldest first; and where that begins. Of the reports
    themselves every rule; of points of 5 minutes, which are older, the rules with thresholds. Until not `in_time`."""
    found: list[Past] = []
    begins = []
    for record in list_host_records(db):
        past = past_state(HostState(record))
        fired: dict[tuple[str, str], Past] = {}
        for count, (at, report, whole) in enumerate(list_past_reports(db, record["id"], since, until)):
            if not in_time():
                break
            begins += [at] if not count else []
            for one in judge_past(past, fleet, report, Stamp(0, count, at, at, 0), whole=whole):
                if one.over_at is None:
                    fired[one.rule, one.object] = one
                elif (one.rule, one.object) in fired:
                    found.append(one)
                    del fired[one.rule, one.object]
        found += fired.values()
    return sorted(found, key=lambda one: one.fired_at), min(begins, default=None)


def list_past_reports(db: Database, host_id: int, since: float, until: float) -> Iterator[tuple[float, Fields, bool]]:
    """Time and content of a host's past, oldest first; `whole` are the reports as they came."""
    whole_from = next(map(report_time, tail_ids(db, host_id, since, until)), until)
    reader = Reader(History(), db, host_id, None)
    begin = begin_of_history(db, host_id)
    for day in range(int(max(since, begin or until)) // DAY * DAY, int(whole_from) + 1, DAY):
        yield from ((at, report, False) for at, report in reports_of_points(reader.points(FINE, day, day + DAY))
                    if since <= at < whole_from)
    for row in db.execute("SELECT id, body FROM report WHERE id BETWEEN :first AND :last ORDER BY id",
                          report_span(host_id, since, until)):
        yield report_time(row["id"]), read_body(row["body"]), True


def reports_of_points(frame: Frame) -> Iterator[tuple[int, Fields]]:
    """Averages of 5 minutes in the form of reports; counters are left out, their points are rates, and so are guests:
    their status has no history."""
    for row, at in enumerate(frame.keys):
        sections: dict[str, dict[str, Fields]] = {}
        for (section, object), columns in frame.objects.items():
            fields = {field: column[row][0] for field, column in columns.items()
                      if column[row] == column[row] and not field.endswith("_total")}
            if fields and section != "guests" and not (section == "node" and object):
                sections.setdefault(section, {})[object] = fields
        if sections:
            yield at, {"time": at, **{
                section: [{**fields, SECTIONS[section].key: object} for object, fields in objects.items()]
                if SECTIONS[section].key else objects[""] for section, objects in sections.items()}}


# Packing: closed hours become chunks, closed days become points, old ones go. Everything is worked out beside the
# writer; what it then writes takes it some milliseconds.

HOUR_GRACE = 2 * MINUTE  # an hour is packed so long after its end, each host at its own moment
DAY_GRACE = 15 * MINUTE
QUIET_SECONDS = 15  # a backlog that is still coming in is left alone, but not for ever
PACK_ROWS = 20_000  # reports in one go
ROLL_OBJECTS = 16  # objects in one go


class Keeper:
    """Packs the history of a server's hosts, some at each turn, and answers from it."""

    def __init__(self, store: Store, history: History, fleet: Fleet):
        self.store, self.history, self.fleet = store, history, fleet
        self.keeps_all = False  # no day is closed for now
        self._after = 0  # the host whose turn was last
        self._layouts: dict[int, set[int]] = {}  # host -> numbers of layouts in its chunks
        self._looked_at: set[int] = set()  # hosts, since unused layouts were deleted

    def turn(self, now: float, seconds: float = 0.5) -> bool:
        """Work for about so long, the next turn goes on with the next host; whether there was anything to do."""
        end, worked = time.monotonic() + seconds, False
        self.history.forget_hosts(but=set(self.fleet.hosts))
        for host_id in self.in_turn():
            while self._attempt(host_id, now):
                worked = True
                if time.monotonic() > end:
                    break
            if time.monotonic() > end:
                self._after = host_id
                return True
        self._after = 0
        return worked

    def _attempt(self, host_id: int, now: float) -> bool:
        """A step; one host's trouble must not keep the others from their turn."""
        try:
            return self.step(host_id, now)
        except Problem:
            raise  # the writer's: everybody's trouble
        except Exception as error:
            log(f"history: host {host_id}: {type(error).__name__}: {error}")
            return False

    def step(self, host_id: int, now: float) -> bool:
        """The next piece of work for a host; False if there is none."""
        state = self.fleet.hosts.get(host_id)
        if state is None:
            return False
        db = self.store.reader()
        hour = find_due_hour(db, host_id, now)
        if hour is not None:
            self.pack_hour(db, state, hour, now)
            return True
        return self.step_day(db, host_id, now)

    def in_turn(self) -> Iterator[int]:
        """The hosts, beginning with the one after whose turn was last."""
        ids = sorted(self.fleet.hosts)
        start = bisect.bisect_right(ids, self._after)
        yield from (*ids[start:], *ids[:start])

    def step_day(self, db: Database, host_id: int, now: float) -> bool:
        """The next day that is to be rolled up, or whose reports may go; False if there is none."""
        for day, work in list_due_days(db, host_id, now):
            if work == CHANGED:
                self.roll_day(db, host_id, day, now)
            elif not self.keeps_all:
                self.store.write(partial(seal_day, host_id, day))
            else:
                continue
            return True
        return False

    def settle(self, now: float) -> None:
        """Do all there is to do by now (tests, bench)."""
        while any(self.step(host_id, now) for host_id in list(self.fleet.hosts)):
            pass

    def pack_hour(self, db: Database, state: HostState, hour: int, now: float) -> None:
        """Move an hour's reports from the tail into its chunk. What comes for a day whose reports are gone already is
        older than any agent keeps by itself: it joins nothing."""
        tail = self.history.tail(db, state.id, hour, hour + HOUR - 0.001, most=PACK_ROWS)
        if day_states(db, state.id, hour, hour).get(hour // DAY * DAY) == SEALED:
            log(f"history: {len(tail)} reports of {state.name} came too late for {datetime.date.fromtimestamp(hour)}, "
                "a day that is closed; they are counted, and not in its history")
            self.store.write(partial(drop_from_tail, state, tail), urgent=False)
        else:
            old = find_chunk(db, state.id, RAW, hour)
            objects = find_objects(db, state.id, None)
            frame = merge([*([unpack_reports(self.history, db, old, objects, None)] if old else []),
                           frame_of(tail.values())])
            body = pack_reports(frame, *self.numbers(db, state, stored_names(frame)))
            self.store.write(partial(put_hour, state, hour, tail, body, spark_of(frame), now), urgent=False)
        self.history.forget(state.id, tail)

    def roll_day(self, db: Database, host_id: int, day: int, now: float) -> None:
        """Make the points of a day from its reports, one object after the other; its hours go to those around them."""
        reader = Reader(self.history, db, host_id, None)
        fine = Frame(list(range(day, day + DAY, FINE)), {})
        objects = sorted(reader.objects.items())
        for first in range(0, len(objects), ROLL_OBJECTS):  # a whole day of everything would take much memory
            reader.objects = dict(objects[first : first + ROLL_OBJECTS])
            fine.objects.update(reader.day_points(day, tail=False).objects)
        begin = day // SPANS[COARSE] * SPANS[COARSE]
        hours = unpack_points(self.history, db, find_chunk(db, host_id, COARSE, begin),
                              range(begin, begin + SPANS[COARSE], COARSE), dict(objects), None)
        state = self.fleet.hosts[host_id]
        chunks = [(chunk_id(host_id, step, at), pack_points(frame, *self.numbers(db, state, stored_names(frame))))
                  for step, at, frame in ((FINE, day, fine), (COARSE, begin, replace_day(hours, day, fine, COARSE)))]
        self.store.write(partial(put_day, host_id, day, chunks, now), urgent=False)
        self.prune_names(db, host_id)

    def numbers(self, db: Database, state: HostState,
                names: dict[ObjectKey, tuple[str, ...]]) -> tuple[ObjectIds, LayoutIds]:
        """The numbers of objects and layouts; what is new gets one, as long as there are not too many."""
        objects = {key: number for number, key in find_objects(db, state.id, None).items()}
        layouts = {fields: number for number, fields in self.history.layouts.items()}
        new_objects = sorted(names.keys() - objects.keys())
        new_layouts = sorted(set(names.values()) - layouts.keys())
        if new_objects or new_layouts:
            room = OBJECTS_KEPT - len(objects), LAYOUTS_KEPT - len(self._layouts.get(state.id, ()))
            if len(new_objects) > room[0] or len(new_layouts) > room[1]:
                log(f"history: {state.name} has sent more than {OBJECTS_KEPT} objects or {LAYOUTS_KEPT} kinds of them; "
                    "new ones have no history until old ones are forgotten")
            self.store.write(partial(number_names, state.id, new_objects[: max(0, room[0])],
                                     new_layouts[: max(0, room[1])]))
            objects = {key: number for number, key in find_objects(db, state.id, None).items()}
            layouts = self.history.read_layouts(db)
        self._layouts.setdefault(state.id, set()).update(
            layouts[fields] for fields in names.values() if fields in layouts)
        return objects, layouts

    def prune_names(self, db: Database, host_id: int) -> None:
        """Forget the names of what is in none of a host's chunks any more, by their directories; of layouts, which
        hosts share, when all hosts have been looked at."""
        objects = find_objects(db, host_id, None)
        used, layouts, unused = set[int](), set[int](), set[int]()
        for (head,) in db.execute("SELECT substr(body, 1, :size) FROM chunk WHERE id BETWEEN :first AND :last", {
                "size": 8 * len(objects) + 12, "first": chunk_id(host_id, RAW, 0),
                "last": chunk_id(host_id, COARSE, 1 << CHUNK_SHIFT - 1)}):
            count = int.from_bytes(head[:4], "little")
            numbers = array("I", head[4 : 4 + 8 * count])
            used.update(numbers[:count])
            layouts.update(numbers[count:])
        self._layouts[host_id] = layouts
        self._looked_at.add(host_id)
        if self._looked_at >= self.fleet.hosts.keys():
            unused = set(self.history.read_layouts(db).values()).difference(*self._layouts.values())
            self._looked_at.clear()
        self.store.write(partial(delete_names, objects.keys() - used, unused))

    # Questions. What another keeper (see remote) gets from elsewhere: begin, frame, stored_keys, hourly, export.

    def ask(self, db: Database, host_ids: list[int], question: Question) -> list[list[Any]]:
        """Points [time, average, minimum, maximum] of each series. A guest is looked for on all hosts given: it may
        have been on one and then on another."""
        answers: list[list[Any]] = [[] for _ in question.names]
        parsed = [(key, stored_field(field)) for key, field in map(parse_series, question.names)]
        for nth, host_id in enumerate(host_ids):
            wanted: dict[ObjectKey, set[str]] = {}
            for key, field in parsed:
                if field != BOOT and (nth == 0 or key[0] == "guests"):
                    wanted.setdefault(key, set()).add(field)
            frame = self.frame(db, host_id, wanted, question) if wanted else Frame([], {})
            for points, (key, field) in zip(answers, parsed):
                if field in wanted.get(key, ()):
                    points += list_points(frame, key, field) if question.step != RAW else list_raw(
                        frame, key, field, question.since, question.until)
        if len(host_ids) > 1:
            answers = [sorted(points) if question.step == RAW else join_points(points) for points in answers]
        return [[point[:4] for point in points] for points in answers]

    def begin(self, db: Database, host_id: int) -> float | None:
        """The oldest time of which anything is known of a host."""
        return begin_of_history(db, host_id)

    def frame(self, db: Database, host_id: int, wanted: dict[ObjectKey, set[str]], question: Question) -> Frame:
        """What is wanted of a host: reports, and of counters those of the hour before too; or points of the step."""
        reader = Reader(self.history, db, host_id, wanted)
        if question.step == RAW:
            counted = any(field.endswith("_total") for fields in wanted.values() for field in fields)
            since = question.since - (RATE_MOST if counted else 0)
            return reader.reports(since, question.until + 10)  # a report's id may lie a little after its time
        base = COARSE if question.step >= COARSE else FINE
        since = int(question.since // question.step * question.step)
        frame = reader.points(base, since, int(question.until) + 1)
        return frame if question.step == base else coarsen(frame, question.step)

    def past_values(self, db: Database, host_id: int, series: list[str], now: float) -> list[list[tuple[float, float]]]:
        """Of each series (unix time, average of the hour) of 30 days, as fill_forecast() wants them."""
        asked = self.ask(db, [host_id], Question(series, now - 30 * DAY, now, COARSE))
        return [[(at, average) for at, average, _, _ in points] for points in asked]

    def past_space(self, db: Database, host_id: int, datasets: Iterable[str], at: float) -> dict[str, dict[str, float]]:
        """What datasets used at a time, as what_grew() wants it: the last that is known of the 6 hours around it."""
        wanted = {("datasets", name): {"used_bytes", "used_by_snapshots_bytes"} for name in datasets}
        frame = self.frame(db, host_id, wanted, Question([], at - 3 * HOUR, at + 3 * HOUR, COARSE))
        found: dict[str, dict[str, float]] = {}
        for (_, name), columns in frame.objects.items():
            known = {field: [cell[0] for cell in column if cell == cell] for field, column in columns.items()}
            found[name] = {field: values[-1] for field, values in known.items() if values}
        return {name: space for name, space in found.items() if space}

    def keys(self, db: Database, host_id: int, since: float, until: float) -> list[TickKey]:
        """Which reports of a span of time there are, oldest first."""
        keys = {tick[:3] for tick in self.history.tail(db, host_id, since, until).values()}
        return sorted(keys | self.stored_keys(db, host_id, since, until))

    def stored_keys(self, db: Database, host_id: int, since: float, until: float) -> set[TickKey]:
        return {key for row in list_chunks(db, host_id, RAW, since // HOUR * HOUR, until)
                for key in unpack_reports(self.history, db, row["body"], {}, {}).keys}

    def has_packed(self, db: Database, host_id: int, at: float, report: Fields) -> bool:
        """Whether a report of that time is among those that are packed here. (Another store's is not asked: it keeps
        the same number of the same time once.)"""
        key = zlib.crc32(report["run_id"].encode("utf-8", "replace")), report["seq"]
        return any(packed[1:] == key for packed in Keeper.stored_keys(self, db, host_id, at, at))

    def sparks(self, db: Database, host_ids: list[int], now: float) -> dict[int, list[float | None]]:
        """CPU in use of the last 24 hours by host, the hour under way last; [] where nothing is known."""
        last = int(now) // HOUR * HOUR
        known = self.hourly(db, host_ids, now)
        lines = {host_id: [known[host_id].get(hour) for hour in range(last - 23 * HOUR, last + 1, HOUR)]
                 for host_id in host_ids}
        return {host_id: line if any(value is not None for value in line) else [] for host_id, line in lines.items()}

    def hourly(self, db: Database, host_ids: list[int], now: float) -> dict[int, dict[int, float | None]]:
        """CPU in use by host and hour: one query, and what is at hand."""
        rows = db.execute("SELECT host_id, hours FROM spark WHERE host_id IN (SELECT value FROM json_each(:ids))",
                          {"ids": json.dumps(host_ids)})
        packed = {row["host_id"]: json.loads(row["hours"]) for row in rows}
        return {host_id: {
            **{hour: total / count for hour, (total, count) in self.history.hours.get(host_id, {}).items()},
            **{int(hour): value for hour, value in packed.get(host_id, {}).items()}} for host_id in host_ids}

    def export(self, db: Database, host_id: int, now: float) -> Iterator[list[Any]]:
        """Everything there is of a host, by step, then by time. Memory holds one span at a time."""
        for step, size in SPANS.items():
            begins = {chunk_begin(row[0]) for row in db.execute(
                "SELECT id FROM chunk WHERE id BETWEEN :first AND :last", chunk_span(host_id, step))}
            if step != RAW:
                begins |= {day // size * size for day in day_states(db, host_id, 0, now)}
            begins |= {begin_of(report_id, size) for report_id in tail_ids(db, host_id)}
            for begin in sorted(begins):
                reader, end = Reader(self.history, db, host_id, None), begin + size - 0.001
                frame = reader.reports(begin - RATE_MOST, end) if step == RAW else reader.points(
                    step, begin, begin + size)
                yield from export_frame(frame, step, begin, end)


def number_names(host_id: int, objects: list[ObjectKey], layouts: list[tuple[str, ...]], db: Database) -> None:
    """Give numbers to objects and layouts that have none. `Problem` if the host is gone."""
    if not db.execute("SELECT 1 FROM host WHERE id = :id", {"id": host_id}).fetchone():
        raise Problem("unknown_host", "the host has just been removed")
    db.executemany("INSERT OR IGNORE INTO history_object (host_id, section, object) VALUES (?, ?, ?)",
                   [(host_id, *key) for key in objects])
    db.executemany("INSERT OR IGNORE INTO history_layout (fields) VALUES (?)",
                   [(json.dumps(names),) for names in layouts])


def delete_names(objects: Set[int], layouts: Set[int], db: Database) -> None:
    db.executemany("DELETE FROM history_object WHERE id = ?", [(number,) for number in objects])
    db.executemany("DELETE FROM history_layout WHERE id = ?", [(number,) for number in layouts])


def find_due_hour(db: Database, host_id: int, now: float) -> int | None:
    """The oldest hour with reports in the tail, if it is over and its reports are all there, as far as one can
    tell."""
    hour = next((begin_of(report_id, HOUR) for report_id in tail_ids(db, host_id)), None)
    if hour is None or hour + HOUR + HOUR_GRACE + host_id * 37 % (5 * MINUTE) > now:
        return None
    first, last = db.execute("SELECT min(received_at), max(received_at) FROM report WHERE id BETWEEN :first AND :last",
                             report_span(host_id, hour, hour + HOUR - 0.001)).fetchone()
    return hour if last + QUIET_SECONDS <= now or first + 4 * QUIET_SECONDS <= now else None


def list_due_days(db: Database, host_id: int, now: float) -> list[tuple[int, int]]:
    """Days to roll up, and rolled-up days whose reports may go; the oldest first."""
    due = []
    for day, state in db.execute("""
            SELECT day, state FROM history_day WHERE host_id = :host AND (
                state = 0 AND day < :over OR state = 1 AND day < :old) ORDER BY day""",
            {"host": host_id, "over": now - DAY - DAY_GRACE - host_id * 37 % (5 * MINUTE),
             "old": now - DAY - KEPT[RAW]}).fetchall():
        last = db.execute("SELECT max(written_at) FROM chunk WHERE id BETWEEN :first AND :last",
                          chunk_span(host_id, RAW, day, day + DAY - 1))
        written_at = last.fetchone()[0] or 0.0
        # A late part of a day may follow soon after another: with all its reports it is exact.
        if written_at + (MINUTE if state == CHANGED else KEPT[RAW]) <= now:
            due.append((day, state))
    return due


def put_hour(state: HostState, hour: int, ids: Iterable[int], body: bytes, spark: float | None, now: float,
             db: Database) -> None:
    """Write an hour's chunk, and take its reports out of the tail; those with a latest state are kept elsewhere."""
    if not put_chunks(db, state.id, [(chunk_id(state.id, RAW, hour), body)], now):
        return
    drop_from_tail(state, ids, db)
    day = hour // DAY * DAY
    db.execute("INSERT INTO history_day VALUES (:host, :day, 0) ON CONFLICT DO UPDATE SET state = 0",
               {"host": state.id, "day": day})
    if hour + HOUR == day + DAY:  # the next day's first rates begin in this hour
        db.execute("UPDATE history_day SET state = 0 WHERE host_id = :host AND day = :day AND state = 1",
                   {"host": state.id, "day": day + DAY})
    put_spark(db, state.id, hour, spark, now)


def drop_from_tail(state: HostState, ids: Iterable[int], db: Database) -> None:
    """Take reports out of the tail; those with a latest state are kept elsewhere."""
    held = {report_id for pair in state.pointers().values() for report_id in pair if report_id}
    db.executemany("INSERT OR REPLACE INTO kept_report SELECT * FROM report WHERE id = ?",
                   [(report_id,) for report_id in ids if report_id in held])
    db.executemany("DELETE FROM report WHERE id = ?", [(report_id,) for report_id in ids])
    db.execute("""
        DELETE FROM kept_report WHERE id BETWEEN :first AND :last AND id NOT IN (SELECT value FROM json_each(:held))""",
        {**report_span(state.id), "held": json.dumps(sorted(held))})


def put_chunks(db: Database, host_id: int, chunks: list[tuple[int, bytes]], now: float) -> bool:
    """Write chunks of a host; False if it is gone."""
    if not db.execute("SELECT 1 FROM host WHERE id = :id", {"id": host_id}).fetchone():
        return False
    for number, body in chunks:
        db.execute("INSERT OR REPLACE INTO chunk VALUES (:id, :now, :body)", {"id": number, "now": now, "body": body})
    return True


def put_day(host_id: int, day: int, chunks: list[tuple[int, bytes]], now: float, db: Database) -> None:
    """Write a day's points. Only the keeper changes chunks of reports, so the day is as it was read."""
    if put_chunks(db, host_id, chunks, now):
        db.execute("UPDATE history_day SET state = 1 WHERE host_id = :host AND day = :day",
                   {"host": host_id, "day": day})


def seal_day(host_id: int, day: int, db: Database) -> None:
    """Drop a day's reports; its points stay."""
    db.execute("DELETE FROM chunk WHERE id BETWEEN :first AND :last", chunk_span(host_id, RAW, day, day + DAY - 1))
    db.execute("UPDATE history_day SET state = 2 WHERE host_id = :host AND day = :day", {"host": host_id, "day": day})


def spark_of(frame: Frame) -> float | None:
    """The hour's CPU in use."""
    known = [value for value in list_values(frame, ("node", ""), "cpu_ratio") if value == value]
    return round(sum(known) / len(known), 4) if known else None


def put_spark(db: Database, host_id: int, hour: int, value: float | None, now: float) -> None:
    """Take an hour into the host's small line of the last day."""
    if hour < now - 2 * DAY:
        return
    row = db.execute("SELECT hours FROM spark WHERE host_id = :host", {"host": host_id}).fetchone()
    hours = {at: known for at, known in (json.loads(row[0]) if row else {}).items() if int(at) > now - 2 * DAY}
    hours[str(hour)] = value
    db.execute("INSERT INTO spark VALUES (:host, :hours) ON CONFLICT DO UPDATE SET hours = :hours",
               {"host": host_id, "hours": json.dumps(hours)})


EXPIRE_ROWS = 40  # chunks dropped in one go: some megabytes


def expire(db: Database, now: float) -> int:
    """Drop what is older than its step is kept, and chunks of hosts that are gone, a little at a time; gives back
    how many."""
    found = list_expired(db, now)[:EXPIRE_ROWS]
    db.executemany("DELETE FROM chunk WHERE id = ?", [(number,) for number in found])
    db.execute("DELETE FROM history_day WHERE day < :before AND state = 2", {"before": now - KEPT[FINE] - DAY})
    return len(found)


def list_expired(db: Database, now: float) -> list[int]:
    """Ids of chunks that may go. From host to host and step to step by single steps in the index."""
    hosts = {row[0] for row in db.execute("SELECT id FROM host")}
    found: list[int] = []
    after = -1
    while len(found) < EXPIRE_ROWS:
        row = db.execute("SELECT id FROM chunk WHERE id > :after ORDER BY id LIMIT 1", {"after": after}).fetchone()
        if row is None:
            break
        host_id = row[0] >> CHUNK_SHIFT + 2
        for step, seconds in KEPT.items():
            ends = now - seconds - SPANS[step] if host_id in hosts else 1 << 33
            if step != RAW or host_id not in hosts:  # reports go with their day, when it is sealed
                found += [chunk[0] for chunk in db.execute(
                    "SELECT id FROM chunk WHERE id BETWEEN :first AND :last LIMIT :most",
                    {**chunk_span(host_id, step, 0, ends), "most": EXPIRE_ROWS})]
        after = ((host_id + 1) << CHUNK_SHIFT + 2) - 1
    return found


EACH_REPORT.append(lambda monitor, db, state, report, stamp, weight: monitor.history.remember(
    state.id, stamp.report_id, report, stamp.received_at, weight))


# --- remote: the same history, in and out of a VictoriaMetrics (HISTORY_URL=http…) ---

# The tail in the database is the queue: a report leaves it when the store has taken its numbers and, some seconds
# later, gives them back (what it took last may be in its memory only). What is sent twice is the same points again.

QUERY_SECONDS = 10  # so long may an answer take
AWAY_SECONDS_MOST = 15  # after no answer nobody waits for the next one, for so long
PUSH_REPORTS, PUSH_OF_HOST = 200, 50  # in one request
PUSHED_MOST = 20_000  # reports that the store has taken and not given back yet
CONFIRM_SECONDS = 15  # VictoriaMetrics writes to its disk every 5 s; with each try twice as long: it may crash often
PUSH_SECONDS, PUSH_SECONDS_MOST = 5, MINUTE  # between two turns; the most is while the store is away
PUSH_TRIES = 8  # taken so often in an hour and never given back: older than the store keeps anything
QUERY_BYTES = 12_000  # of one question: the store's own limit is 16,384
SUBQUERY_MOST = 25_000  # points: the store's own limit is 30,000
REPORT_SERIES = "proxmon_report_seq"  # which reports there are: its value is the sequence number, label `run`
NAMES = {  # section or part of the node -> how its metrics begin, and the label that has the object's name
    "guests": ("guest", "vmid"), "storages": ("storage", "storage"), "pools": ("pool", "pool"),
    "datasets": ("dataset", "dataset"), "disks": ("disk", "disk"), "node/interfaces": ("node_interface", "interface"),
    "node/block_devices": ("node_block_device", "block_device"), "node/temperatures": ("node_temperature", "sensor"),
    "node": ("node", ""),
}


def metric_names(key: ObjectKey, field: str) -> tuple[str, dict[str, str]]:
    """Name and labels of a series: guests/104.cpu_ratio -> proxmon_guest_cpu_ratio{vmid="104"}."""
    section, object = key
    if section == "node" and object:
        part, _, object = object.partition("/")
        section = f"node/{part}"
    word, label = NAMES.get(section, (section, "object"))
    return f"proxmon_{word}_{field}", {label: object} if label else {}


def series_of(labels: dict[str, str]) -> tuple[ObjectKey, str] | None:
    """The series that a metric of the store is; None for what is not ours."""
    metric = labels.get("__name__", "")
    for section, (word, label) in NAMES.items():
        prefix = f"proxmon_{word}_"
        if metric.startswith(prefix) and (not label or label in labels):
            part, _, of_node = section.partition("/")
            object = labels.get(label, "")
            return (part, f"{of_node}/{object}" if of_node else object), metric[len(prefix):]
    return None


@lru_cache(50_000)
def metric_json(host: str, cluster: str, key: ObjectKey, field: str) -> str:
    name, labels = metric_names(key, field)
    of_guest = {"cluster": cluster} if cluster and key[0] == "guests" else {}
    return json.dumps({"__name__": name, "host": host, **of_guest, **labels})


def quoted(text: str) -> str:
    """Text in a question to the store."""
    return json.dumps(text, ensure_ascii=False)


def selector(host: str, key: ObjectKey, fields: Iterable[str]) -> str:
    """The series of an object's fields. What is scraped from /metrics has similar names, and a `job`."""
    names = sorted(metric_names(key, field)[0] for field in fields)
    labels = {"host": host, "job": "", **metric_names(key, "")[1]}
    which = f"={quoted(names[0])}" if len(names) == 1 else "=~" + quoted("|".join(map(re.escape, names)))
    return f"{{__name__{which}," + ",".join(f"{label}={quoted(value)}" for label, value in labels.items()) + "}"


def uptime_of(key: ObjectKey) -> ObjectKey | None:
    """Whose uptime says that an object's counters began anew."""
    return key if key[0] == "guests" else ("node", "") if key[0] == "node" else None


def write_lines(host: str, cluster: str, frame: Frame) -> str:
    """The numbers of some reports of a host, a JSON line for each series."""
    lines, times = [], [key[0] for key in frame.keys]
    for key, columns in frame.objects.items():
        for field in columns.keys() - {BOOT}:
            lines.append(write_line(metric_json(host, cluster, key, field), times, columns[field]))
    for run in {key[1] for key in frame.keys}:
        metric = json.dumps({"__name__": REPORT_SERIES, "host": host, "run": f"{run:08x}"})
        lines.append(write_line(metric, times, [seq if of == run else NAN for _, of, seq in frame.keys]))
    return "".join(lines)


def write_line(metric: str, times: list[int], values: list[float]) -> str:
    there = [value == value for value in values]
    values, times = list(compress(values, there)), list(compress(times, there))
    return f'{{"metric":{metric},"values":{values},"timestamps":{times}}}\n' if values else ""


def step_expressions(host: str, key: ObjectKey, field: str, step: int) -> tuple[str, str, str]:
    """Average, minimum and maximum of a step, for its end: its values are those from its beginning until 1 ms before
    that. A counter's average is that of its rate in 5 minutes, and they are left out when something began anew."""
    one = selector(host, key, [field])
    if not field.endswith("_total"):
        average, lowest, highest = (f"{name}_over_time({one}[{step}s] offset 1ms)" for name in ("avg", "min", "max"))
        return average, lowest, highest
    window = f"[{FINE}s] offset 1ms"
    count = f"count_over_time({one}{window})"
    steady = f"and ({count} > 0) unless (resets({one}{window}) > 0)"
    owner = uptime_of(key)
    if owner:
        steady += f" unless on() (resets({selector(host, owner, ['uptime_seconds'])}{window}) > 0)"
    latest = f"((irate({one}{window}) {steady})[{step}s:{rate_grid(step)}s])"
    spans = f"[{step}s:{FINE}s])"
    return (f"sum_over_time((rate({one}{window}) * {count} {steady}){spans} / "
            f"sum_over_time(({count} and rate({one}{window}) {steady}){spans}",
            f"min_over_time{latest}", f"max_over_time{latest}")


def rate_grid(step: int) -> int:
    """How often a step is looked at for the lowest and highest rate, in seconds: every report, up to an hour."""
    return max(15, step // 240)


class RemoteStore:
    """The door to the store. `Problem('busy')` when it does not answer as it should."""

    def __init__(self, url: str):
        parts = urllib.parse.urlsplit(url)
        self.shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self.headers = {"User-Agent": f"proxmon/{VERSION}"}
        if parts.username is not None:
            login = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}").encode()
            self.headers["Authorization"] = "Basic " + base64.b64encode(login).decode()
        self.away_until = 0.0  # monotonic
        self.away_because = ""

    def post(self, path: str, body: bytes, kind: str) -> bytes:
        request = urllib.request.Request(self.shown + path, body, {**self.headers, "Content-Type": kind})
        try:
            with OPENER.open(request, timeout=QUERY_SECONDS) as answer:
                found = answer.read()
        except urllib.error.HTTPError as error:
            raise self._problem(f"answers HTTP {error.code} {what_it_says(error, 1 << 16)[-300:]}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.away_because = f"does not answer: {getattr(error, 'reason', error) or type(error).__name__}"
            self.away_until = time.monotonic() + AWAY_SECONDS_MOST
            raise self._problem(self.away_because) from None
        self.away_until = 0.0
        return found

    def query(self, expression: str, at: float, **more: Any) -> list[tuple[dict[str, str], dict[float, float]]]:
        """What the store says now, or at each step of a span (start, end, step); also of what came just now or late.
        Labels and values by time of each series."""
        if time.monotonic() < self.away_until:
            raise self._problem(self.away_because)
        form = {"query": expression, "nocache": 1, "latency_offset": "1ms", "timeout": f"{QUERY_SECONDS}s",
                **(more or {"time": math.ceil(at)})}
        body = urllib.parse.urlencode(form, errors="replace").encode()
        found = self.post("/api/v1/query_range" if more else "/api/v1/query", body, "application/x-www-form-urlencoded")
        try:
            return [({str(label): str(value) for label, value in series["metric"].items()},
                     {float(at): float(value) for at, value in series.get("values") or [series["value"]]})
                    for series in json.loads(found)["data"]["result"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._problem("answers with something else than a Prometheus API") from None

    def samples(self, which: str, since: float, until: float) -> list[tuple[dict[str, str], dict[int, float]]]:
        """Labels and values by millisecond of each series, as they were received."""
        end = math.ceil(until) + 1
        return [(labels, {round(at * 1000): value for at, value in values.items()})
                for labels, values in self.query(f"{which}[{end - math.floor(since) + 1}s]", end)]

    def _problem(self, what: str) -> Problem:
        return Problem("busy", f"the history store at {self.shown} {what}",
                       headers={"Retry-After": str(AWAY_SECONDS_MOST)})


class Pushed(NamedTuple):
    """A report that the store has taken, and that is still in the tail."""

    key: tuple[int, int]  # milliseconds, run
    at: float  # monotonic
    tries: int


class RemoteKeeper(Keeper):
    """Pushes the tail to the store, and answers from there."""

    def __init__(self, store: Store, history: History, fleet: Fleet, stop: Stop, url: str):
        super().__init__(store, history, fleet)
        self.remote, self.stop = RemoteStore(url), stop
        self.pushed: dict[int, dict[int, Pushed]] = {}
        self.again: dict[int, int] = {}  # reports that the store took and did not give back: how often
        self.begins: dict[int, float] = {}
        self.trouble: str | None = None
        self._pause = PUSH_SECONDS
        self._host_lines: dict[str, dict[int, float | None]] = {}
        self._lines_until = 0.0
        self._loop: Loop | None = None

    def turn(self, now: float, seconds: float = 0.5) -> bool:
        """Have the thread that pushes: a store that hangs holds up nobody else. What was packed here before this
        store was named gets old as ever."""
        self.history.forget_hosts(but=set(self.fleet.hosts))
        if self._loop is None:
            self._loop = every(PUSH_SECONDS, "history", self.push_all, self.stop)
        worked = False
        for host_id in list(self.fleet.hosts):
            worked |= self.step_day(self.store.reader(), host_id, now)
        return worked

    def settle(self, now: float) -> None:
        """Push all there is."""
        while self.push():
            pass

    def push_all(self) -> float:
        """Push what waits and clear away what has arrived; gives back the pause until the next time. A store that is
        away is told once, and asked less and less often."""
        trouble = None
        try:
            while sum(map(len, self.pushed.values())) < PUSHED_MOST and not self.stop.is_set() and self.push():
                pass
            self.confirm()
        except Problem as problem:
            trouble = problem.detail
        if (trouble is None) != (self.trouble is None):
            log(f"history: {trouble}; what waits is sent later" if trouble else "history: the store takes again")
        self._pause = min(PUSH_SECONDS_MOST, 2 * self._pause) if trouble else PUSH_SECONDS
        self.trouble = trouble
        return self._pause

    def push(self) -> bool:
        """Send some reports that the store has not taken yet; False if there are none."""
        db, chosen = self.store.reader(), dict[int, dict[int, Tick]]()
        for host_id in self.in_turn():
            ticks = self.history.tail(db, host_id, most=PUSH_OF_HOST, without=self.pushed.get(host_id, {}).keys())
            if ticks:
                chosen[host_id] = ticks
                self._after = host_id
            if sum(map(len, chosen.values())) >= PUSH_REPORTS:
                break
        states = {host_id: state for host_id in chosen if (state := self.fleet.hosts.get(host_id))}
        lines = "".join(write_lines(state.name, text(state.body("cluster", {}), "name") or "",
                                    frame_of(chosen[host_id].values())) for host_id, state in states.items())
        if lines:
            self.remote.post("/api/v1/import", lines.encode("utf-8", "replace"), "application/json")
        for host_id in states:
            self._note_pushed(host_id, chosen[host_id])
        return bool(states)

    def _note_pushed(self, host_id: int, ticks: dict[int, Tick]) -> None:
        now = time.monotonic()
        self.pushed.setdefault(host_id, {}).update(
            (report_id, Pushed(tick[:2], now, self.again.pop(report_id, 0) + 1)) for report_id, tick in ticks.items())
        if host_id in self.begins:
            self.begins[host_id] = min(self.begins[host_id], *(tick.ms / 1000 for tick in ticks.values()))

    def confirm(self) -> None:
        """Take out of the tail what the store gives back; what it has forgotten is sent again."""
        now = time.monotonic()
        for host_id, waiting in list(self.pushed.items()):
            due = {report_id: pushed for report_id, pushed in waiting.items()
                   if pushed.at + CONFIRM_SECONDS * 2 ** (pushed.tries - 1) <= now}
            state = self.fleet.hosts.get(host_id)
            if state is None:
                del self.pushed[host_id]
            elif due:
                self._confirm_host(state, due)

    def _confirm_host(self, state: HostState, due: dict[int, Pushed]) -> None:
        times = [pushed.key[0] / 1000 for pushed in due.values()]
        there = {key[:2] for key in self._remote_keys(state.name, min(times), max(times))}
        done = [report_id for report_id, pushed in due.items() if pushed.key in there or pushed.tries >= PUSH_TRIES]
        unknown = sum(due[report_id].key not in there for report_id in done)
        if unknown:
            log(f"history: the store took {unknown} reports of {state.name} {PUSH_TRIES} times and does not give them "
                "back; they are older than it keeps")
        if done:
            self.store.write(partial(drop_from_tail, state, done), urgent=False)
            self.history.forget(state.id, done)
        for report_id, pushed in due.items():
            del self.pushed[state.id][report_id]
            if report_id not in done:
                self.again[report_id] = pushed.tries

    def _remote_keys(self, host: str, since: float, until: float) -> set[TickKey]:
        found = self.remote.samples(f'{REPORT_SERIES}{{host={quoted(host)},job=""}}', since, until)
        return {(ms, int(labels["run"], 16), int(seq)) for labels, values in found
                if re.fullmatch("[0-9a-f]{8}", labels.get("run", "")) for ms, seq in values.items()}  # else not ours

    def begin(self, db: Database, host_id: int) -> float | None:
        """The oldest time of which the store knows anything."""
        state = self.fleet.hosts.get(host_id)
        if state and host_id not in self.begins:
            which = f'{REPORT_SERIES}{{host={quoted(state.name)},job=""}}'
            for _, values in self.remote.query(f"min(tfirst_over_time({which}[{KEPT[COARSE]}s]))", time.time() + 1):
                self.begins[host_id] = min(values.values())
        return self.begins.get(host_id)

    def frame(self, db: Database, host_id: int, wanted: dict[ObjectKey, set[str]], question: Question) -> Frame:
        state = self.fleet.hosts.get(host_id)
        if state is None:
            return Frame([], {})
        if question.step != RAW:
            return self._steps(state.name, wanted, question)
        values = {key: self._values(state.name, key, fields, question) for key, fields in wanted.items()}
        times = sorted({ms for columns in values.values() for column in columns.values() for ms in column})
        return Frame([(ms, 0, 0) for ms in times], {
            key: {field: [column.get(ms, NAN) for ms in times] for field, column in columns.items()}
            for key, columns in values.items()})

    def _values(self, host: str, key: ObjectKey, fields: set[str], question: Question) -> dict[str, dict[int, float]]:
        """Values of an object by field and millisecond, as they were received; with a counter the uptime, which tells
        when it began anew."""
        counted = any(field.endswith("_total") for field in fields)
        since = question.since - (RATE_MOST if counted else 0)
        owner = uptime_of(key) if counted else None
        columns: dict[str, dict[int, float]] = {}
        for which, names in [(key, fields), *([(owner, {"uptime_seconds"})] if owner else [])]:
            fields_of = {metric_names(which, name)[0]: name for name in names}
            for labels, values in self.remote.samples(selector(host, which, names), since, question.until):
                if field := fields_of.get(labels.get("__name__", "")):
                    columns.setdefault(field, {}).update(values)
        return columns

    def _steps(self, host: str, wanted: dict[ObjectKey, set[str]], question: Question) -> Frame:
        step = question.step
        first, last = (int(at // step * step) for at in (question.since, int(question.until)))
        reach = max(1, SUBQUERY_MOST * rate_grid(step) // step) * step
        series = [(key, field) for key, fields in wanted.items() for field in sorted(fields)]
        labelled = [f'label_replace({expression}, "point", "{at} {nth}", "", "")' for at, which in enumerate(series)
                    for nth, expression in enumerate(step_expressions(host, *which, step))]
        cells: dict[tuple[int, float], list[Point]] = {}
        for whole in join_expressions(labelled):
            for begin in range(first, last + 1, reach):
                end = min(begin + reach - step, last)
                found = self.remote.query(whole, end, start=begin + step, end=end + step, step=f"{step}s")
                for place, at, point in read_steps(found, step):
                    cells.setdefault((place, at), []).append(point)
        frame = Frame(list(range(first, last + 1, step)), {})
        for place, (key, field) in enumerate(series):
            frame.objects.setdefault(key, {})[field] = [combine(cells.get((place, at), ())) for at in frame.keys]
        return frame

    def stored_keys(self, db: Database, host_id: int, since: float, until: float) -> set[TickKey]:
        state = self.fleet.hosts.get(host_id)
        return self._remote_keys(state.name, since, until) if state else set()

    def hourly(self, db: Database, host_ids: list[int], now: float) -> dict[int, dict[int, float | None]]:
        """The page lives without its small lines when the store is away. Asked once a minute for all."""
        last = int(now) // HOUR * HOUR
        if time.monotonic() >= self._lines_until:
            self._lines_until = time.monotonic() + MINUTE
            try:
                found = self.remote.query('avg_over_time(proxmon_node_cpu_ratio{job=""}[1h] offset 1ms)', now,
                                          start=last - 22 * HOUR, end=last + HOUR, step="1h")
                self._host_lines = {labels.get("host", ""): {
                    int(at) - HOUR: round(value, 4) for at, value in values.items()} for labels, values in found}
            except Problem:
                self._host_lines = {}
        states = {host_id: self.fleet.hosts.get(host_id) for host_id in host_ids}
        return {host_id: self._host_lines.get(state.name, {}) if state else {} for host_id, state in states.items()}

    def export(self, db: Database, host_id: int, now: float) -> Iterator[list[Any]]:
        begin = self.begin(db, host_id)  # a store that is away is told before the answer has begun
        return self._export_days(db, host_id, begin, now) if begin is not None else iter(())

    def _export_days(self, db: Database, host_id: int, begin: float, now: float) -> Iterator[list[Any]]:
        """All values as received, a day and an object at a time."""
        which = f'{{__name__=~"proxmon_.+",host={quoted(self.fleet.hosts[host_id].name)},job=""}}'
        for day in range(int(begin) // DAY * DAY, int(now) + 1, DAY):
            objects: dict[ObjectKey, set[str]] = {}
            for labels, _ in self.remote.query(f"last_over_time({which}[1d] offset 1ms)", day + DAY):
                if (series := series_of(labels)) is not None:
                    objects.setdefault(series[0], set()).add(series[1])
            for key, fields in sorted(objects.items()):
                question = Question([], day, day + DAY - 0.001, RAW)
                frame = self.frame(db, host_id, {key: fields}, question)
                yield from export_frame(frame, RAW, day, question.until, {key: fields})


def join_expressions(expressions: Iterable[str]) -> Iterator[str]:
    """As many as fit into one question, side by side."""
    whole = ""
    for expression in expressions:
        if whole and len(whole.encode()) + len(expression.encode()) > QUERY_BYTES:
            yield whole
            whole = ""
        whole = f"{whole} or {expression}" if whole else expression
    if whole:
        yield whole


def read_steps(found: list[tuple[dict[str, str], dict[float, float]]], step: int) -> Iterator[tuple[int, float, Point]]:
    """The store's answers to expressions that are labelled `place nth`: place, time, and point."""
    series: dict[tuple[int, str], dict[int, dict[float, float]]] = {}
    for labels, values in found:
        place, _, nth = labels.pop("point", "0 0").partition(" ")
        labels.pop("__name__", None)
        same = series.setdefault((int(place), json.dumps(labels, sort_keys=True)), {})
        same.setdefault(int(nth), {}).update(values)
    for (place_of, _), lines in series.items():
        for at, average in lines.get(0, {}).items():
            lowest, highest = (lines.get(nth, {}).get(at, average) for nth in (1, 2))
            yield place_of, at - step, (tidy(average, lowest, highest), lowest, highest, 1.0)


def open_keeper(config: Config, store: Store, history: History, fleet: Fleet, stop: Stop) -> Keeper:
    """The one that keeps the history where HISTORY_URL says."""
    if config.history_url == "sqlite:":
        return Keeper(store, history, fleet)
    return RemoteKeeper(store, history, fleet, stop, config.history_url)


# --- monitor: a running server: what stands above, put together ---


class Monitor:
    """A running server: its settings, its database, and the fleet in memory. `clock` gives unix time."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.time):
        self.config, self.clock = config, clock
        self.secret = config.secret()
        self.fleet: Fleet = Fleet()
        self.fleet.serving_since = clock()
        self.fleet.public_url = config.public_url
        self.judged_at: float | None = None  # monotonic: the rules' last round
        self.looked_at = clock()
        self.doubted_until = 0.0
        self.use_settings(load_settings(config))
        self.runs: dict[tuple[int, str], Run] = {}
        self.history: History = History()
        self.logins = LoginLimiter()
        self.refusals = RateLimiter(100, 1 / MINUTE)  # that are written down: nobody fills the disk with them
        self.room = Room()
        self.reports_accepted = 0
        self.streams: list[tuple[str, str | None]] = []  # who is being sent one: see streamed()
        self.looks: dict[str, tuple[float, float, float]] = {}  # by user: see note_look()
        self.fragments: dict[str, dict[bytes, int]] = {}  # what pages have shown, by ETag: see changed_pieces()
        self.store = Store(config.database_path, self.reload)
        self.store.write(self._start)
        self.stop = Stop()  # of all background loops; its troubles() are what /healthz has to tell
        self.keeper = open_keeper(config, self.store, self.history, self.fleet, self.stop)
        self.notifier = Notifier(self.store, self.fleet, clock, self.stop)
        self.replaying = threading.Lock()

    def _start(self, db: Database) -> None:
        check_secret(db, self.secret)
        end_foreign_sessions(db, self.secret, self.config.password_hash, self.clock())
        set_meta(db, "serving_since", self.fleet.serving_since)
        count_what_came(db)
        self.doubted_until = float(get_meta(db, "clock_doubted_until") or 0)
        alive_at = float(get_meta(db, "alive_at") or self.looked_at)
        if self.looked_at - alive_at > DAY:
            self.doubt_clock(db, self.looked_at, self.looked_at - alive_at)
        self.fleet.load(db)
        drop_orphans(db, self.fleet, self.clock())

    def doubt_clock(self, db: Database, now: float, jump: float) -> None:
        """A clock that is so far ahead of where it was may be wrong, and all that is kept looks old then. Whoever has
        to set it right has a day, before anything goes for its age."""
        self.doubted_until = now + DAY
        set_meta(db, "clock_doubted_until", self.doubted_until)
        log(f"server: the clock is {jump:.0f} s ahead of where it was; for a day nothing is thrown away for its age")

    def doubts_clock(self, now: float) -> bool:
        """Whether it was set forward less than a day ago."""
        return now - self.looked_at > AWAY_SECONDS or 0 < self.doubted_until - now <= DAY

    def use_settings(self, settings: Settings) -> None:
        """Take over what server.toml says."""
        self.settings = settings
        self.fleet.layers, self.fleet.channels = settings.layers, settings.channels

    def reload_settings(self) -> bool:
        """Read server.toml anew (SIGHUP); a mistake in it keeps the old rules, and is told."""
        try:
            self.use_settings(load_settings(self.config))
        except Failure as failure:
            log(f"server: {failure}; the old rules stay")
            told = f"{failure}; the old rules stay"
            self.store.write(lambda db: insert_event(db, self.clock(), "settings-refused", told))
            return False
        log(f"server: {self.config.settings_path} read again, {count_of(len(self.fleet.channels), 'channel')}")
        self.store.write(lambda db: drop_orphans(db, self.fleet, self.clock()))
        self.notifier.start()
        return True

    def reload(self) -> None:
        """After a failed commit memory is ahead of the disk: take the disk's word."""
        self.runs.clear()
        self.history.clear()
        try:
            self.fleet.load(self.store.db)
        except Exception as error:  # the server lives on, and the next failure tries again
            log(f"database: the state could not be read again: {error}")

    def close(self) -> None:
        self.stop.set()
        self.store.close()


def count_what_came(db: Database) -> None:
    """Once, after an upgrade: version 0.1 wrote which numbers had come every 5 minutes only. What it took after that
    and is still kept as it came would count twice if its agent sent it again."""
    if get_meta(db, "runs_are_whole"):
        return
    came: dict[int, list[int]] = {}
    for run, seq in db.execute("SELECT run, seq FROM report"):
        came.setdefault(run, []).append(seq)
    for run, numbers in came.items():
        row = db.execute("SELECT ranges FROM run WHERE id = :id", {"id": run}).fetchone()
        if row is not None:
            ranges = parse_ranges(row["ranges"])
            for seq in numbers:
                add_to_ranges(ranges, seq)
            db.execute("UPDATE run SET ranges = :ranges WHERE id = :id", {"ranges": format_ranges(ranges), "id": run})
    set_meta(db, "runs_are_whole", 1)


def check_secret(db: Database, secret: bytes) -> None:
    """Remember which secret the tokens were made with; say so in the log if it is another now. One byte is kept: it
    tells a mix-up in 255 of 256 cases, and whoever has the database can hardly try guesses on it."""
    known, mark = get_meta(db, "secret_check"), hmac.digest(secret, b"proxmon secret check", "sha256").hex()
    if known is not None and known[:2] != mark[:2]:
        log("server: SECRET_KEY_BASE is not the one the hosts' tokens were made with: "
            "restore it, or rotate the token of every host")
    else:
        set_meta(db, "secret_check", mark[:2])  # an older version kept all of it


# --- jobs: what runs by the clock, in one thread ---


class Job(NamedTuple):
    name: str
    seconds: float  # from one run to the next
    work: Callable[[Monitor, float, Database], float | None]  # may give back another pause for this once
    beside: bool = False  # takes long, or must not wait for a write: works with a reader, and writes in small pieces
    first_after: float = 5


def judge_fleet(monitor: Monitor, now: float, db: Database) -> None:
    """Rules that need no report: silence, clusters, sites; and what was held back and may be told now."""
    fleet = monitor.fleet
    fleet.refresh(db)
    if not 0 <= now - monitor.looked_at <= AWAY_SECONDS:  # suspended, or the clock was set: hosts get their time anew
        fleet.serving_since = now
        set_meta(db, "serving_since", now)
        if now > monitor.looked_at:
            monitor.doubt_clock(db, now, now - monitor.looked_at)
        for state in fleet.hosts.values():  # seen by a clock that was ahead: from here on by this one
            state.last_seen_at = state.last_seen_at and min(state.last_seen_at, now)
    monitor.looked_at = now
    for state in fleet.hosts.values():
        judge_host(db, fleet, state, now)
        forget_backlog(state, now)
    judge_shared(db, fleet, now)
    dispatch(db, fleet, fleet.everything(), now)
    monitor.judged_at = time.monotonic()


def sign_of_life(monitor: Monitor, now: float, db: Database) -> None:
    """Proof that the database can be written, and until when the server was there."""
    set_meta(db, "alive_at", now)


def keep_history(monitor: Monitor, now: float, db: Database) -> float | None:
    """Hours into chunks, days into points; or all of it to another store. Where there was work there may be more."""
    monitor.keeper.keeps_all = monitor.doubts_clock(now)
    return 5 if monitor.keeper.turn(now) else None


def expire_history(monitor: Monitor, now: float, db: Database) -> None:
    """What is too old goes, and the file gets smaller, each in pieces that nobody notices."""
    for _ in range(0 if monitor.doubts_clock(now) else 20):
        if not monitor.store.write(lambda db: expire(db, now)):
            break
    monitor.store.write(vacuum)


def tell_systemd(monitor: Monitor, now: float, db: Database) -> None:
    """A beat for the unit's watchdog: jobs still run, so no write has hung. A full disk is no reason to start anew."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wire:
            wire.sendto(b"WATCHDOG=1", "\0" + address[1:] if address.startswith("@") else address)


VACUUM_PAGES = 256  # 1 MiB: some milliseconds


def vacuum(db: Database) -> None:
    """Give free pages back to the file system, a few at a time; a tenth stays for what comes next."""
    free, pages = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_count"))
    if free > max(pages // 10, 2 * VACUUM_PAGES):
        db.execute(f"PRAGMA incremental_vacuum({VACUUM_PAGES})").fetchall()


def prune(monitor: Monitor, now: float, db: Database) -> None:
    """Drop what is older than it is kept, of what is not history."""
    if monitor.doubts_clock(now):
        return
    db.execute("""DELETE FROM event WHERE at < :before OR (at < :seldom AND kind IN ('task', 'guest'))""",
               {"before": now - KEEP_EVENTS, "seldom": now - KEEP_TASKS})
    db.execute("DELETE FROM alert WHERE state = 'resolved' AND resolved_at < :before", {"before": now - KEEP_RESOLVED})
    db.execute(f"DELETE FROM session WHERE NOT ({LIVING_SESSION})", {"now": now})
    gone = db.execute("""
        DELETE FROM run WHERE last_seen_at < :before AND EXISTS (
            SELECT 1 FROM run AS later WHERE later.host_id = run.host_id AND later.last_seen_at > run.last_seen_at)""",
                      {"before": now - KEPT[COARSE]})  # all it brought is gone; the last tells when a host was seen
    if gone.rowcount:
        monitor.runs.clear()
    db.execute("DELETE FROM silence WHERE until < :before", {"before": now - KEEP_RESOLVED})
    db.execute("DELETE FROM notification WHERE message_id IS NOT NULL AND created_at < :before",
               {"before": now - KEEP_RESOLVED})
    db.execute("DELETE FROM message WHERE created_at < :before AND (sent_at IS NOT NULL OR given_up_at IS NOT NULL)",
               {"before": now - KEEP_RESOLVED})


def index_copies(monitor: Monitor, now: float, db: Database) -> None:
    """Look over all hosts' snapshots beside the writes: a thousand hosts take most of a second."""
    monitor.fleet.copies = SnapshotIndex(list(monitor.fleet.hosts.values()))


FORECAST_SECONDS = HOUR  # a host's forecasts are made anew
FORECAST_AGAIN = MINUTE  # but after the first ones: its backlog may just have been on its way


def forecast_fleet(monitor: Monitor, now: float, db: Database, seconds: float = 0.2) -> None:
    """Forecasts of the hosts whose turn it is, for about so long. What the history cannot tell now stays as it was; a
    host that is silent is as full as when it was last heard."""
    end = time.monotonic() + seconds
    for host in sorted(monitor.fleet.hosts.values(), key=lambda host: host.forecast_at):
        if time.monotonic() > end or 0 <= now - host.forecast_at < FORECAST_SECONDS:
            return
        if host.last_seen_at is None:
            continue  # its turn is when it has told of itself, not an hour later
        host.forecast_at = now if host.forecasts is not None else now - FORECAST_SECONDS + FORECAST_AGAIN
        try:
            host.forecasts = forecast_host(monitor.keeper, db, host, min(now, host.last_seen_at or now))
        except Problem:
            return  # another store's, which tells of it itself
        except ODD as error:
            log_once(f"server: forecasts of {host.name} left out: {type(error).__name__}: {error}")


def forecast_host(keeper: Keeper, db: Database, host: HostState, now: float) -> dict[str, Filling]:
    """When each space of a host is full; of pools that fill up also what grew in the last 7 days."""
    spaces = list(spaces_of(host))
    past: list[list[tuple[float, float]]] = [[] for _ in spaces]
    if spaces and now - (keeper.begin(db, host.id) or now) > 2 * DAY:  # of less nothing can be told: likely_growth()
        past = keeper.past_values(db, host.id, [space.series for space in spaces], now)
    found: dict[str, Filling] = {}
    for space, points in zip(spaces, past):
        filling = Filling(space, fill_forecast([*points, (now, space.used)], space.used + space.free, now), now)
        kind, _, name = space.object.partition("/")
        if kind == "pools" and filling.forecast and filling.forecast.soonest is not None:
            filling = explain_filling(keeper, db, host, filling, name)
        known = found.get(space.object)
        if known is None or days_left(filling) < days_left(known):  # of two quotas the one that is reached first
            found[space.object] = filling
    return found


def days_left(filling: Filling) -> float:
    return math.inf if filling.forecast is None or filling.forecast.soonest is None else filling.forecast.soonest


def explain_filling(keeper: Keeper, db: Database, host: HostState, filling: Filling, pool: str) -> Filling:
    after = {str(dataset.get("name")): dataset for dataset in host.items("datasets")
             if str(dataset.get("name")).partition("/")[0] == pool}
    span = min(7.0, filling.forecast.known_days if filling.forecast else 0.0)
    grown = what_grew(keeper.past_space(db, host.id, after, filling.as_of - span * DAY), after) if after else None
    return filling._replace(grown=grown and grown[:GROWN_MOST], grown_days=span,
                            wins=winnings(host, pool, filling.as_of))


JOBS = (
    Job("judge", 5, judge_fleet),
    Job("alive", 30, sign_of_life, first_after=0),
    Job("watchdog", 30, tell_systemd, beside=True, first_after=0),
    Job("digest", 5 * MINUTE, run_digest, first_after=5 * MINUTE),
    Job("prune", HOUR, prune, first_after=HOUR),
    Job("history", 30, keep_history, beside=True),
    Job("copies", 10 * MINUTE, index_copies, beside=True, first_after=MINUTE),
    Job("expire", 10 * MINUTE, expire_history, beside=True, first_after=10 * MINUTE),
)


class Scheduler:
    """What is due when. A job that fails comes again within a minute."""

    def __init__(self, monitor: Monitor):
        self.monitor = monitor
        self._errors: dict[str, str] = {}  # of jobs whose last run failed
        self._due = {job.name: time.monotonic() + job.first_after for job in JOBS}

    def start(self) -> None:
        monitor = self.monitor
        every(1, "jobs", self.turn, monitor.stop)  # a second where a job fails; else when the next is due
        every(5, "forecasts", lambda: forecast_fleet(monitor, monitor.clock(), monitor.store.reader()), monitor.stop,
              vital=False)

    def turn(self) -> float:
        """Run what is due, and give back the seconds until the next is; `Failure` while there is a job whose last run
        failed."""
        for job in JOBS:
            if self._due[job.name] <= time.monotonic():
                self._errors.pop(job.name, None)
                try:
                    pause = self._run(job)
                except Exception as error:  # one job's fault must not end the others
                    self._errors[job.name] = f"{job.name}: {type(error).__name__}: {error}"
                    pause = min(job.seconds, MINUTE)
                self._due[job.name] = time.monotonic() + (job.seconds if pause is None else pause)
        if self._errors:
            raise Failure("; ".join(self._errors.values()))
        return max(0.0, min(self._due.values()) - time.monotonic())

    def _run(self, job: Job) -> float | None:
        work = partial(job.work, self.monitor, self.monitor.clock())
        return work(self.monitor.store.reader()) if job.beside else self.monitor.store.write(work)


# --- resources: every list of the fleet: rows, columns, search words, metrics, and its place on the page ---

Row = Fields
Rows = list[Row]


def is_time(column: str) -> bool:
    return column.endswith("_at") or column in ("at", "since", "as_of", "until", "maintenance_until")


def is_numeric(column: str) -> bool:
    return is_time(column) or column in ("vmid", "count") or column.endswith(
        ("_bytes", "_ratio", "_seconds", "_celsius", "_hours", "_count", "_errors", "_sectors"))


def object_verdict(state: HostState, section: str, object: str, now: float) -> tuple[str, str | None]:
    """Verdict of a pool, storage, guest or disk: its worst alert; else stale, or ok."""
    name = f"{section}/{object}"
    alerts = [a for a in state.alerts.values() if a.object == name or a.object.startswith(name + "/")]
    worst, reason = worst_alert(alerts)
    if worst:
        return worst, reason
    for alert in alerts:
        if alert.state == "pending":
            return "info", alert.message
    if is_stale(state, section, now):
        return "stale", "What is shown is old."
    return "ok", None


def pick(fields: Row, columns: Sequence[str]) -> Row:
    return dict(zip(columns, map(fields.get, columns)))


PLACES = ("host", "site", "cluster", "tag")  # by which any list can be narrowed to some hosts


def cluster_of(state: HostState) -> str:
    """The cluster that a host is in, in lower case; '' for none."""
    return (text(state.body("cluster"), "name") or "").lower()


HOST_COLUMNS = tuple("""
    name verdict reason site tags note maintenance_until address last_seen_at pve_version agent_version cluster
    pools_total pools_worst_state pools_max_capacity_ratio days_until_full guests_running guests_total cpu_ratio
    memory_free_ratio io_pressure_ratio root_used_ratio load1 uptime_seconds storages_inactive disks_suspect
    backups_worst backups_state updates_pending updates_security apt_lists_at reboot_needed kernel kernel_next
    zfs_userland zfs_module clock_offset_seconds
    alerts_critical alerts_warning watching""".split())


def host_row(fleet: Fleet, state: HostState, now: float) -> Row:
    """One line of the host table; what is not known is None."""
    verdict, reason = fleet.verdict(state, now)
    node = state.body("node", {})
    firing = [alert.severity for alert in state.alerts.values() if alert.state == "firing"]
    root = [number(node, "root_used_bytes"), number(node, "root_available_bytes")]
    return {
        "name": state.name, "verdict": verdict, "reason": reason, "site": state.site, "tags": state.tags,
        "note": state.note, "maintenance_until": state.maintenance_until, "last_seen_at": state.last_seen_at,
        "pve_version": text(node, "pve_version"), "agent_version": text(state.agent, "version"),
        "cluster": text(state.body("cluster"), "name"), "address": own_address(state), **pool_columns(state),
        "days_until_full": worst_days_until_full(state),
        "guests_running": state.guest_counts[0], "guests_total": state.guest_counts[1],
        "cpu_ratio": number(node, "cpu_ratio"),
        "memory_free_ratio": number(node, "memory_free_ratio"),
        "io_pressure_ratio": number(node, "pressure_io_full_avg10_ratio"),
        "root_used_ratio": None if None in root else ratio(root[0], sum_known(root)),
        "load1": number(node, "load1"), "uptime_seconds": number(node, "uptime_seconds"),
        "storages_inactive": count_inactive(state), "disks_suspect": count_suspect(state),
        "backups_worst": worst_backup(state, fleet, now), "backups_state": backups_state(state, fleet, now),
        "updates_pending": number(state.body("updates"), "pending"),
        "updates_security": number(state.body("updates"), "security"),
        "apt_lists_at": number(state.body("updates"), "as_of"),
        "kernel": text(node, "kernel"), "kernel_next": text(node, "kernel_next"),
        "zfs_userland": text(state.body("versions"), "zfs_userland"),
        "zfs_module": text(state.body("versions"), "zfs_module"),
        "reboot_needed": node.get("reboot_needed") if isinstance(node.get("reboot_needed"), bool) else None,
        "clock_offset_seconds": state.clock_ahead or number(state.agent, "clock_offset"),
        "alerts_critical": firing.count("critical"), "alerts_warning": firing.count("warning"),
        "watching": watching(fleet, state, "", now),
    }


def own_address(state: HostState) -> str | None:
    """The address by which its cluster knows a host."""
    own = text(state.body("node"), "name") or state.name
    members = state.items("cluster.members")
    return next((text(member, "address") for member in members if member.get("name") == own), None)


def watching(fleet: Fleet, state: HostState, object: str, now: float) -> str | None:
    """What is not well but not yet for long enough to fire, with how far it is: 'Pool a is 87% full. (9 of 15 min)'."""
    pending = [alert for alert in state.alerts.values()
               if alert.state == "pending" and alert.rule in RULE and alert.object.startswith(object)]
    if not pending:
        return None
    worst = min(pending, key=lambda alert: (SEVERITIES.index(alert.severity), alert.since))
    hold = fleet.layers.limits(state, RULE[worst.rule]).hold
    more = f" (+{len(pending) - 1} more)" if len(pending) > 1 else ""
    return f"{worst.message} ({int(max(0, now - worst.since) // MINUTE)} of {int(hold // MINUTE)} min){more}"


POOL_STATES = ("SUSPENDED", "UNAVAIL", "FAULTED", "REMOVED", "OFFLINE", "DEGRADED", "UNKNOWN", "ONLINE")  # worst first


def pool_columns(state: HostState) -> Row:
    states = [text(pool, "state") or "UNKNOWN" for pool in state.body("pool_states") or state.body("pools") or ()]
    full = [number(pool, "capacity_ratio") for pool in state.body("pools") or ()]
    return {
        "pools_total": None if state.body("pool_states") is None and state.body("pools") is None else len(states),
        "pools_worst_state": min(states, key=state_rank, default=None),
        "pools_max_capacity_ratio": max((used for used in full if used is not None), default=None),
    }


def state_rank(word: str) -> int:
    return POOL_STATES.index(word if word in POOL_STATES else "UNKNOWN")


def count_inactive(state: HostState) -> int | None:
    storages = state.body("storages")
    if storages is None:
        return None
    return sum(storage.get("active") in (False, 0) and storage.get("enabled") not in (False, 0)
               for storage in storages)


def count_suspect(state: HostState) -> int | None:
    """Disks that something is wrong with, as the alerts have it; None if no disk could be looked at."""
    if not state.has("disks"):
        return None
    return len({alert.object for alert in state.alerts.values()
                if alert.object.startswith("disks/") and alert.state == "firing" and alert.severity != "info"})


GUEST_COLUMNS = tuple("""
    host vmid type name status verdict reason template lock tags cpu_count cpu_ratio memory_used_bytes
    memory_max_bytes disk_used_bytes disk_max_bytes uptime_seconds onboot ha_state backup backup_at job
    oldest_snapshot_at lives_on as_of""".split())


def guest_rows(state: HostState, now: float, fleet: Fleet | None = None) -> Iterator[Row]:
    """A host's guests as the fleet's list shows them; what is told of their backups takes the fleet."""
    as_of = state.sections.get("guests", NOTHING).time
    covers = {cover.vmid: cover for cover in (known_coverage(state, fleet, now) or () if fleet else ())}
    snapshots, pools = state.made_of("snapshots", oldest_snapshots), grounds(state)
    usual = None if state.alerts else object_verdict(state, "guests", "", now)  # the same for all, mostly
    for guest in state.body("guests", ()):
        verdict, reason = usual or object_verdict(state, "guests", str(guest.get("vmid")), now)
        if verdict == "ok" and guest.get("status") in (None, "unknown"):
            verdict, reason = "unknown", "Proxmox does not say whether it runs."
        cover = covers.get(str(guest.get("vmid")))
        word = cover and backup_word(cover, state.no_backup)
        if verdict == "ok" and cover and word not in ("fresh", "due", "not wanted"):
            verdict, reason = backup_verdict(word or "", cover, now)
        own = number(guest, "as_of")  # pvestatd's time; a clock that is ahead makes nothing fresher than its report
        yield {**pick(guest, GUEST_COLUMNS), "host": state.name, "verdict": verdict, "reason": reason,
               "backup": word, "backup_at": cover and cover.newest_ok_at,
               "job": cover and {True: "yes", False: "none", None: None}[cover.covered],
               "oldest_snapshot_at": min((snapshots[dataset] for dataset in volumes_of(guest) if dataset in snapshots),
                                         default=None) if snapshots else None,
               "lives_on": "; ".join(lives_on(guest, pools)) or None,
               "as_of": as_of if own is None or as_of is None else min(own, as_of)}


def oldest_snapshots(snapshots: Any) -> dict[str, float]:
    """By dataset, when the oldest of the snapshots was made that somebody made by hand in Proxmox."""
    return {str(entry.get("dataset")): at for entry in dicts(snapshots)
            if text(entry, "class") == "pve" and (at := number(entry, "oldest_at")) is not None}


# A guest's backup in a word, worst first.
BACKUP_WORDS = ("late", "in no job", "none yet", "not known", "due", "fresh", "not wanted")


def backup_word(cover: Coverage, no_backup: Set[str]) -> str:
    """Green is only what has a good backup that is in time: 'fresh', and 'due' while the next one is under way."""
    if cover.late_seconds is not None and cover.late_seconds > BACKUP_GRACE:
        return "late"
    if cover.covered is False:
        return "not wanted" if cover.vmid in no_backup else "in no job"
    if cover.newest_ok_at is None:
        return "none yet" if cover.covered else "not known"
    return "due" if cover.late_seconds is not None and cover.late_seconds > 0 else "fresh"


def backups_state(state: HostState, fleet: Fleet, now: float) -> str | None:
    """The worst word of a host's guests, with how many it holds for: '2 late'; None if nothing is known of backups."""
    covers = known_coverage(state, fleet, now)
    if covers is None:
        return None
    words = [backup_word(cover, state.no_backup) for cover in covers]
    worst = min(words, key=BACKUP_WORDS.index, default="not wanted")
    return worst if worst in ("fresh", "not wanted") else f"{words.count(worst)} {worst}"


VOLUME_COLUMNS = ("host", "vmid", "name", "storage", "dataset", "pool", "size_bytes", "as_of")


def volume_rows(state: HostState, now: float) -> Iterator[Row]:
    """What the disks of a host's guests lie on: storage, dataset, pool."""
    as_of = state.sections.get("guests", NOTHING).time
    for guest in state.body("guests", ()):
        for volume in dicts(guest.get("volumes")):
            dataset = text(volume, "dataset")
            yield {**pick(volume, VOLUME_COLUMNS), "host": state.name, "vmid": guest.get("vmid"),
                   "name": guest.get("name"), "pool": dataset and dataset.partition("/")[0], "as_of": as_of}


POOL_COLUMNS = tuple("""
    host name guid state verdict reason layout size_bytes allocated_bytes free_bytes usable_used_bytes
    usable_available_bytes capacity_ratio fragmentation_ratio dedup_ratio redundancy_margin margin_with_suspects
    suspects missing data_errors read_errors write_errors checksum_errors scan_function scan_state scan_progress_ratio
    last_scrub_at days_until_full full_in as_of""".split())


def pool_rows(state: HostState, now: float) -> Iterator[Row]:
    """A host's pools: the state from the kernel's files, all else from `pools`."""
    full = {pool["name"]: pool for pool in state.body("pools", ())}
    brief = {pool["name"]: pool for pool in state.body("pool_states", ())}
    for name in {**brief, **full}:
        pool = {**full.get(name, {}), **{k: v for k, v in brief.get(name, {}).items() if v is not None}}
        verdict, reason = object_verdict(state, "pools", name, now)
        if verdict == "ok" and pool.get("state") is None:
            verdict, reason = "unknown", "The pool's state could not be read."
        weak = weak_members(state, pool)
        if verdict == "ok" and weak["suspects"] and weak["margin_with_suspects"] < 1:
            left = may_fail(max(0, weak["margin_with_suspects"]))
            verdict, reason = "warning", f"{', '.join(weak['suspects'])} may fail next: in effect {left}."
        scan = pool.get("scan")
        yield {**pick(pool, POOL_COLUMNS), "host": state.name, "verdict": verdict, "reason": reason, **weak,
               "missing": missing_members(pool), **vdev_errors(pool),
               "scan_function": text(scan, "function"), "scan_state": text(scan, "state"),
               "scan_progress_ratio": number(scan, "progress_ratio"),
               "last_scrub_at": number(pool.get("last_scrub"), "ended_at"), **fills_up(state, name),
               "as_of": state.sections.get("pools", NOTHING).time}


def missing_members(pool: Row) -> list[str]:
    """What a pool lacks, by the path that it had: what is left of a disk that is gone."""
    return [text(leaf, "path") or str(leaf.get("name")) for leaf in walk_vdevs(dicts(pool.get("vdevs")))
            if not dicts(leaf.get("children")) and text(leaf, "state") in ("UNAVAIL", "REMOVED")]


def fills_up(state: HostState, pool: str) -> Row:
    """When a pool is full: days at the soonest, and the range in words; None where nothing is known."""
    filling = (state.forecasts or {}).get(f"pools/{pool}")
    forecast = filling and filling.forecast
    return {"days_until_full": forecast and forecast.soonest, "full_in": forecast and describe_forecast(forecast)}


def weak_members(state: HostState, pool: Row) -> Row:
    """The margin of the vdev that is nearest to loss if the suspects fail first, and all suspects of the pool."""
    margins = pool_margins(state, pool)
    suspects = [str(leaf.get("disk") or leaf.get("name")) for vdev in margins for leaf, _, _ in vdev.suspects]
    least = min((vdev.with_suspects for vdev in margins), default=None)
    return {"margin_with_suspects": least, "suspects": suspects}


STORAGE_COLUMNS = tuple("""
    host storage type content shared enabled active verdict reason total_bytes used_bytes available_bytes used_ratio
    dataset as_of""".split())


def storage_rows(state: HostState, now: float, fleet: Fleet | None = None) -> Iterator[Row]:
    """A host's storages, inactive and disabled ones too. How full is too full: as `fleet` has set, else as shipped."""
    as_of = state.sections.get("storages", NOTHING).time
    limits = fleet.layers.named("storage-full", state) if fleet else RULE["storage-full"]
    for storage in state.body("storages", ()):
        verdict, reason = object_verdict(state, "storages", storage["storage"], now)
        if verdict == "ok" and storage.get("active") is None:
            verdict, reason = "unknown", "Proxmox does not say whether it is active."
        used, below = storage_used_ratio(storage), alert_below(storage, state)
        if verdict == "ok" and below and below.state == "firing" and limits.level(used or 0.0, None):
            verdict, reason = below.severity, below.message
        yield {**pick(storage, STORAGE_COLUMNS), "host": state.name, "verdict": verdict, "reason": reason,
               "used_ratio": used, "as_of": as_of}


BACKUP_COLUMNS = tuple("""
    host vmid name verdict reason state covered late_seconds newest_ok_at duration_seconds size_bytes storage
    excluded_disks newest_failed_at error as_of""".split())


def backup_rows(state: HostState, fleet: Fleet, now: float) -> Iterator[Row]:
    """The backup of each guest of a host; nothing where the host does not tell of backups."""
    body = state.body("backups")
    if body is None:
        return
    known = {guest.get("vmid"): guest for guest in dicts(body.get("guests")) if is_number(guest.get("vmid"))}
    alerts = [alert for (rule, _), alert in state.alerts.items() if rule.startswith("backup-")]
    for cover in coverage(state, fleet, now):
        guest = known.get(int(cover.vmid), {})
        word = backup_word(cover, state.no_backup)
        worst, message = worst_alert(alert for alert in alerts if alert.object == f"guests/{cover.vmid}")
        verdict, reason = worst or "ok", message or None
        if verdict == "ok" and word not in ("fresh", "due"):
            verdict, reason = backup_verdict(word, cover, now)
        elif verdict == "ok" and is_stale(state, "backups", now):
            verdict, reason = "stale", "What is shown is old."
        good, failed = guest.get("newest_ok") or {}, guest.get("newest_failed")
        yield {"host": state.name, "vmid": int(cover.vmid), "name": cover.name, "verdict": verdict, "reason": reason,
               "state": word, "covered": cover.covered, "late_seconds": cover.late_seconds,
               "newest_ok_at": number(good, "ended_at"),
               "duration_seconds": number(good, "duration_seconds"), "size_bytes": number(good, "size_bytes"),
               "storage": text(good, "storage"), "excluded_disks": good.get("excluded_disks") if good else None,
               "newest_failed_at": number(failed, "ended_at"),
               "error": text(failed, "error"), "as_of": state.sections["backups"].time}


def backup_verdict(word: str, cover: Coverage, now: float) -> tuple[str, str]:
    """What is said of a guest without a good backup in time while no alert fires: never that it is well."""
    if word == "late":
        return "warning", f"Its backup is {format_duration(cover.late_seconds or 0)} late."
    if word == "none yet":
        return "unknown", f"It has no backup yet{first_run(cover.late_seconds)}."
    if word == "not wanted":
        return "info", "It is tagged no-backup."
    if word == "in no job":
        newest = cover.newest_ok_at
        kept = "" if newest is None else f"; its newest backup is {format_duration(max(0, now - newest))} old"
        return "unknown", f"It is in no backup job{kept}."
    return "unknown", "Neither a backup nor a job that makes one is known."


def first_run(late_seconds: float | None) -> str:
    """When a guest that was never backed up is backed up for the first time, where that is known."""
    if late_seconds is None:
        return ""
    ago = format_duration(abs(late_seconds))
    return f" (first run due in {ago})" if late_seconds < 0 else f" (the first run was due {ago} ago)"


DISK_COLUMNS = tuple("""
    host name verdict reason by_id model serial firmware kind size_bytes pool vdev passed standby temperature_celsius
    power_on_hours wear_ratio spare_ratio reallocated_sectors pending_sectors uncorrectable_errors crc_errors
    media_errors as_of""".split())


def disk_rows(state: HostState, now: float) -> Iterator[Row]:
    """A host's disks, with their place in a pool and what SMART says of them."""
    for disk in state.body("disks", ()):
        verdict, reason = object_verdict(state, "disks", disk["name"], now)
        if verdict == "ok" and (why := suspicions(disk, {})):
            verdict, reason = "info", f"It may fail next: {'; '.join(why)}."
        elif verdict == "ok" and disk.get("passed") is None:
            verdict, reason = "unknown", "The disk reports nothing about its health."
        yield {**pick(disk, DISK_COLUMNS), "host": state.name, "verdict": verdict, "reason": reason,
               "as_of": state.sections["disks"].time}


ALERT_COLUMNS = ("id", "rule", "severity", "state", "host", "object", "message", "value", "since", "resolved_at",
                 "acknowledged", "because_of", "at_stake")


def alert_row(alert: Alert, host: str | None) -> Row:
    """An alert as the API and the page have it; clusters, sites and the server itself have no host. What is at stake
    is filled in where it is shown: with_stakes()."""
    acknowledged = None
    if alert.acknowledged_at is not None:
        acknowledged = {"at": alert.acknowledged_at, "by": alert.acknowledged_by, "until": alert.acknowledged_until,
                        "note": alert.acknowledged_note}
    return {**{column: getattr(alert, column) for column in ALERT_COLUMNS if hasattr(alert, column)}, "host": host,
            "object": alert.object or None, "acknowledged": acknowledged, "at_stake": None}


def with_stakes(fleet: Fleet, rows: Iterable[Row]) -> Iterator[Row]:
    """Open alerts with what depends on the disk, vdev, pool or storage that each is about."""
    for row in rows:
        yield {**row, "at_stake": at_stake(fleet.names.get((row["host"] or "").lower()), row["object"])}


def alert_order(row: Row) -> tuple[Any, ...]:
    """Firing first, then the worst, then the newest."""
    return row["state"] != "firing", SEVERITIES.index(row["severity"]), -row["since"], row["id"] or 0


def open_alerts(owners: Iterable[Any], state: str = "firing") -> Rows:
    """The alerts of hosts and of what they share, from memory. `state`: firing, pending or all."""
    return sorted((alert_row(alert, owner.name) for owner in owners for alert in owner.alerts.values()
                   if state in ("all", alert.state)), key=alert_order)


def stored_alerts(db: Database, where: str, **values: Any) -> Iterator[Row]:
    """Alerts from the database, those that are over too, one at a time."""
    for row in db.execute(f"""
            SELECT alert.*, host.name AS host FROM alert LEFT JOIN host ON host.id = alert.host_id WHERE {where}
            ORDER BY alert.state = 'resolved', alert.state <> 'firing', alert.resolved_at DESC,
                     CASE severity WHEN 'critical' THEN 0 WHEN 'warning' THEN 1 ELSE 2 END, since DESC, alert.id""",
            values):
        yield alert_row(Alert(**{field: row[field] for field in Alert.__slots__}), row["host"])


def list_alerts(db: Database, state: str = "firing", *, limit: int = LIST_MOST) -> Rows:
    """Alerts as they are on the disk, firing before resolved. `state`: pending, firing, resolved or all."""
    return list(islice(stored_alerts(db, ":state IN ('all', alert.state)", state=state), limit))


def asked_alerts(call: Call) -> Iterator[Row]:
    """The alerts of the hosts asked for, and without `host` those of their clusters and sites too."""
    wanted, states = call.query.get("state", "firing"), call.states()
    if wanted not in ("firing", "pending", "resolved", "all"):
        raise Problem("invalid_request", "state: firing, pending, resolved or all", parameter="state")
    places = {"sites", *(f"sites/{state.site}".lower() for state in states if state.site)}  # sites: across them all
    places |= {f"clusters/{cluster_of(state)}" for state in states}
    everything = not call.query.keys() & {*PLACES}
    hosts = {state.name for state in states}

    def meant(row: Row) -> bool:
        place = "/".join((row["object"] or "").lower().split("/")[:2])
        return everything or row["host"] in hosts or (
            row["host"] is None and "host" not in call.query and place in places)

    yield from with_stakes(call.fleet, filter(meant, open_alerts(call.fleet.everything(), wanted)))
    if wanted in ("resolved", "all"):
        yield from filter(meant, stored_alerts(call.db, "alert.state = 'resolved'"))


def asked_events(call: Call) -> Iterator[Row]:
    """What changed since then, newest first, of the hosts asked for."""
    everything = not call.query.keys() & {*PLACES}
    hosts = {state.name for state in call.states()}
    until = call.number("until", 0) if "until" in call.query else None
    events = each_event(call.db, since=call.number("since", 0), until=until, kind=call.query.get("kind"))
    return (event for event in events if everything or event["host"] in hosts)


def asked_rules(call: Call) -> Rows:
    host = call.query.get("host")
    state = call.fleet.find(host) if host else call.fleet.shared
    return [rule_row(call.fleet, state, rule, call.query.get("object", "")) for rule in RULES]


def fleet_copies(fleet: Fleet, states: list[HostState], now: float) -> Iterator[Row]:
    """Whoever would lose most, first: no copy at all, then the oldest copy. Any host may hold copies for another."""
    index = fleet.copies or SnapshotIndex(fleet.hosts.values())
    jobless = {(state.name, cover.vmid) for state in states for cover in known_coverage(state, fleet, now) or ()
               if cover.covered is False}
    rows = [beside_no_job(row) if (row["host"], str(row["vmid"])) in jobless else row
            for _, row in of_each(states, "copies", lambda state: copy_rows(state, index, now))]
    yield from sorted(rows, key=lambda row: (min(urgency(row), 3), -(row["lost_seconds"] or 0)))


def beside_no_job(row: Row) -> Row:
    """A copy of a guest that no job holds may be fresh, and nothing makes the next one."""
    if row["verdict"] != "ok":
        return row
    return {**row, "verdict": "info", "reason": f"{row['reason']}; it is in no backup job"}


def fleet_blindspots(fleet: Fleet, states: list[HostState], now: float) -> Iterator[Row]:
    rows = [row for _, row in of_each(states, "blindspots", partial(blindspot_rows, fleet))]
    yield from sorted(rows, key=urgency)


def urgency(row: Row) -> int:
    """The place of a row of an answer: what is not known stands before what is only worth knowing."""
    return {"critical": 0, "warning": 1, "unknown": 2, "info": 3}.get(row["verdict"], 4)


def fleet_traps(fleet: Fleet, states: list[HostState], now: float) -> Iterator[Row]:
    rows = [row for _, row in of_each(states, "traps", space_traps)]
    yield from sorted(rows, key=lambda row: -(row["bytes"] or 0))


def fleet_scrubs(fleet: Fleet, states: list[HostState], now: float) -> Iterator[Row]:
    """The worst first, then those of longest ago."""
    rows = [row for _, row in of_each(states, "scrubs", scrub_rows)]
    yield from sorted(rows, key=lambda row: (urgency(row), row["ended_at"] or 0))


def fleet_forecasts(fleet: Fleet, states: list[HostState], now: float) -> Iterator[Row]:
    """What is full first, first; what is not known before what does not grow."""
    rows = [row for _, row in of_each(states, "forecasts", forecast_rows)]
    yield from sorted(rows, key=lambda row: (math.inf if row["days_until_full"] is None else row["days_until_full"],
                                             row["verdict"] != "unknown"))


def fleet_series(fleet: Fleet, states: list[HostState], now: float) -> Iterator[Row]:
    rows = [row for _, row in of_each(states, "snapshots", lambda state: series_rows(state, now))]
    yield from sorted(rows, key=urgency)


def build_overview(fleet: Fleet, now: float) -> Row:
    """The fleet in a few numbers, of the same size for 1 host and 10,000."""
    known = [state for state in fleet.hosts.values() if state.last_seen_at is not None]
    offline = sum(fleet.is_offline(state, now) for state in known)
    reporting = [state for state in fleet.hosts.values()
                 if (silent := fleet.silent_seconds(state, now)) is not None and silent < STALE_SECONDS]
    firing = [alert.severity for state in fleet.everything() for alert in state.alerts.values()
              if alert.state == "firing" and alert.acknowledged_at is None]
    return {
        "server_time": now,
        "hosts": {
            "total": len(fleet.hosts), "reporting": len(reporting),
            "stale": len(known) - len(reporting) - offline, "offline": offline,
        },
        "problems": {"critical": firing.count("critical"), "warning": firing.count("warning")},
        "oldest_verified_at": min((state.last_seen_at or 0.0 for state in reporting), default=None),
        "last_notification_at": fleet.told_at,
        "version": VERSION,
    }


class Metric(NamedTuple):
    """A gauge of /metrics: a column of the list, or what `value` makes of a row."""

    name: str
    help: str
    value: Callable[[Row], Any] | None = None


class Head(NamedTuple):
    """A column of a list on the page: `sort` is the column with its first direction."""

    label: str
    sort: str
    classes: str  # c-name: with the link to the row's card, always shown; opt-2, opt-3: not on narrow screens

    @property
    def column(self) -> str:
        return self.sort.removeprefix("-")


class Resource(NamedTuple):
    """One list: what GET /api/v1/NAME answers, the page shows as a tab, the search box finds and /metrics counts."""

    name: str
    summary: str
    columns: tuple[str, ...]
    of_host: Callable[[Fleet, HostState, float], Iterable[Row]] | None = None  # the rows of one host
    reads: tuple[str, ...] = ()  # the sections that those are made of; 'backups' stands for the coverage too
    of_hosts: Callable[[Fleet, list[HostState], float], Iterable[Row]] | None = None  # or those of some hosts together
    of_fleet: Callable[[Any], Iterable[Row]] | None = None  # or all that a Call asks for
    auth: str = "read"
    queries: tuple[str, ...] = PLACES  # parameters with a meaning of their own
    words: dict[str, tuple[str, ...]] = {}  # of the search box: the columns meant, the first that is known
    labels: dict[str, str] = {}  # of the metrics: label -> column
    metrics: tuple[Metric, ...] = ()
    heads: tuple[tuple[str, str, str], ...] = ()  # on the page, as Head has them; all other columns can be chosen
    tab: str = ""  # what its tab is called, if not as the list
    title: str = ""  # of an answer: it stands in a line of its own under the lists
    basis: str = ""  # of an answer: what it was computed from, and how sure it is
    sum_up: Callable[[Rows], str] | None = None  # of an answer: all its rows in a sentence

    @property
    def one(self) -> str:
        return re.sub("ies$", "ys", self.name).removesuffix("s")

    @property
    def label(self) -> str:
        return self.title or self.tab or self.name.capitalize()

    def usual(self) -> list[Head]:
        return [Head(*head) for head in self.heads]

    def every(self) -> list[Head]:
        """All columns, the usual ones first, the others called by their names."""
        usual = self.usual()
        others = [column for column in self.columns if column not in {head.column for head in usual}]
        return usual + [Head(column_label(column), f"-{column}", "c-num") if is_numeric(column)
                        else Head(column_label(column), column, "c-text") for column in others]

    def chosen(self, asked: str) -> list[str]:
        """The columns named, in the list's own order: 'name,site'. None that it has: []."""
        names = set(asked.split(","))
        return [head.column for head in self.every() if head.column in names]


ACRONYMS = {"pve": "PVE", "cpu": "CPU", "io": "IO", "ha": "HA", "vmid": "VMID", "crc": "CRC", "id": "ID",
            "guid": "GUID", "ram": "RAM", "zfs": "ZFS", "os": "OS", "load1": "Load (1 min)", "next": "installed"}


def column_label(column: str) -> str:
    """'oldest_snapshot_at' -> 'Oldest snapshot'; what its unit is the values say."""
    words = re.sub(r"_(at|bytes|ratio|seconds|celsius)$", "", column).split("_")
    return " ".join(ACRONYMS.get(word, word.capitalize() if not place else word) for place, word in enumerate(words))


def is_running(guest: Row) -> bool | None:
    return None if guest["status"] in (None, "unknown") else guest["status"] == "running"


RESOURCES = {resource.name: resource for resource in (
    Resource(
        "hosts", "Every host, worst first.", HOST_COLUMNS,
        of_host=lambda fleet, state, now: [host_row(fleet, state, now)],
        reads=("node", "cluster", "updates", "versions", "storages", "pools", "pool_states", "disks", "backups"),
        words={"host": ("name",), "version": ("pve_version",), "pool": ("pools_max_capacity_ratio",),
               "cpu": ("cpu_ratio",), "ram": ("memory_free_ratio",), "io": ("io_pressure_ratio",),
               "root": ("root_used_ratio",), "full": ("days_until_full",), "updates": ("updates_pending",),
               "load": ("load1",), "security": ("updates_security",), "reboot": ("reboot_needed",),
               "seen": ("last_seen_at",), "apt": ("apt_lists_at",), "zfs": ("zfs_module",),
               "backup": ("backups_state",), "agent": ("agent_version",)},
        labels={"host": "name"},
        metrics=(
            Metric("cpu_ratio", "CPU in use, 0-1."),
            Metric("memory_free_ratio", "Memory that is free or can be freed, ARC included, 0-1."),
            Metric("io_pressure_ratio", "PSI io full, average of 10 s, 0-1."),
            Metric("root_used_ratio", "Root file system in use, 0-1."),
            Metric("load1", "Load average of one minute."),
            Metric("uptime_seconds", "Time since the host started."),
            Metric("guests_running", "Guests that run."),
            Metric("guests", "Guests, templates left out.", lambda row: row["guests_total"]),
            Metric("clock_offset_seconds", "How far the host's clock is off."),
            Metric("last_seen_timestamp_seconds", "When the last report came.", lambda row: row["last_seen_at"])),
        heads=(("State", "verdict", "c-state"), ("Host", "name", "c-name"), ("Last seen", "last_seen_at", "c-num"),
               ("Pools", "-pools_max_capacity_ratio", "c-meter"), ("Guests", "-guests_running", "c-num"),
               ("CPU", "-cpu_ratio", "c-meter"), ("RAM used", "memory_free_ratio", "c-meter opt-2"),
               ("IO pressure", "-io_pressure_ratio", "c-num opt-3"), ("Backups", "-backups_worst", "c-num opt-3"),
               ("Disks", "-disks_suspect", "c-num opt-3"), ("Updates", "-updates_pending", "c-num opt-2"))),
    Resource(
        "guests", "Every guest of the fleet.", GUEST_COLUMNS,
        of_host=lambda fleet, state, now: guest_rows(state, now, fleet),
        reads=("guests", "snapshots", "pools", "backups"),
        words={"cpu": ("cpu_ratio",), "backup": ("backup", "backup_at"), "snapshots": ("oldest_snapshot_at",)},
        labels={"host": "host", "vmid": "vmid", "name": "name"},
        metrics=(
            Metric("running", "Whether it runs.", is_running),
            Metric("cpus", "Virtual CPUs.", lambda row: row["cpu_count"]),
            Metric("cpu_ratio", "Of its own CPUs, 0-1."),
            Metric("memory_used_bytes", "Memory in use."), Metric("memory_max_bytes", "Memory it may use.")),
        heads=(("Verdict", "verdict", "c-state"), ("Guest", "name", "c-name"), ("Status", "status", "c-text opt-2"),
               ("Host", "host", "c-host"), ("Newest backup", "backup_at", "c-num"),
               ("CPU", "-cpu_ratio", "c-meter"),
               ("Memory", "-memory_used_bytes", "c-meter"),
               ("Disk", "-disk_max_bytes", "c-num opt-2"), ("Uptime", "-uptime_seconds", "c-num opt-2"),
               ("As of", "-as_of", "c-num opt-3"))),
    Resource(
        "pools", "Every ZFS pool of the fleet.", POOL_COLUMNS,
        of_host=lambda fleet, state, now: pool_rows(state, now), reads=("pools", "pool_states"),
        words={"pool": ("capacity_ratio", "name"), "used": ("capacity_ratio",), "frag": ("fragmentation_ratio",),
               "margin": ("margin_with_suspects", "redundancy_margin"), "scrub": ("last_scrub_at",),
               "full": ("days_until_full",)},
        labels={"host": "host", "pool": "name"},
        metrics=(
            Metric("size_bytes", "Raw size."), Metric("allocated_bytes", "Raw space in use."),
            Metric("capacity_ratio", "Raw space in use, 0-1."),
            Metric("usable_available_bytes", "Space left for data sets."),
            Metric("fragmentation_ratio", "Fragmentation of free space, 0-1."),
            Metric("redundancy_margin", "Disks that may still fail before data is lost."),
            Metric("data_errors", "Damaged objects."), Metric("read_errors", "Read errors of all disks."),
            Metric("write_errors", "Write errors of all disks."),
            Metric("checksum_errors", "Checksum errors of all disks."),
            Metric("online", "Whether the pool's state is ONLINE.",
                   lambda row: None if row["state"] is None else row["state"] == "ONLINE")),
        heads=(("State", "verdict", "c-state"), ("Pool", "name", "c-name"), ("Host", "host", "c-host"),
               ("Capacity", "-capacity_ratio", "c-meter"), ("Full in", "days_until_full", "c-num opt-2"),
               ("Free", "usable_available_bytes", "c-num opt-2"), ("Frag.", "-fragmentation_ratio", "c-num opt-3"),
               ("Can lose", "redundancy_margin", "c-num"),
               ("Errors", "-checksum_errors", "c-num opt-2"), ("Scan", "scan_function", "c-text opt-2"),
               ("Last scrub", "last_scrub_at", "c-num opt-3"))),
    Resource(
        "storages", "Every Proxmox storage of the fleet, inactive and disabled ones too.", STORAGE_COLUMNS,
        of_host=lambda fleet, state, now: storage_rows(state, now, fleet), reads=("storages", "node"),
        words={"name": ("storage",), "used": ("used_ratio",)},
        labels={"host": "host", "storage": "storage"},
        metrics=(Metric("total_bytes", "Size."), Metric("used_bytes", "In use."),
                 Metric("active", "Whether it is active.")),
        heads=(("Verdict", "verdict", "c-state"), ("Storage", "storage", "c-name"),
               ("Status", "active", "c-text opt-2"), ("Host", "host", "c-host"), ("Type", "type", "c-text opt-2"),
               ("Used", "-used_ratio", "c-meter"),
               ("Free", "available_bytes", "c-num"), ("Size", "-total_bytes", "c-num opt-2"),
               ("Content", "content", "clip opt-3"), ("As of", "-as_of", "c-num opt-3"))),
    Resource(
        "disks", "Every disk of the fleet, with its place in a pool and what SMART says of it.", DISK_COLUMNS,
        of_host=lambda fleet, state, now: disk_rows(state, now), reads=("disks",),
        words={"wear": ("wear_ratio",), "temp": ("temperature_celsius",), "hours": ("power_on_hours",)},
        labels={"host": "host", "disk": "name"},
        metrics=(Metric("temperature_celsius", "Temperature."), Metric("wear_ratio", "Worn, 0-1."),
                 Metric("passed", "Whether SMART says that it is well.")),
        heads=(("State", "verdict", "c-state"), ("Disk", "name", "c-name"), ("Host", "host", "c-host"),
               ("Model", "model", "c-text opt-2"), ("Serial", "serial", "c-text"),
               ("Size", "-size_bytes", "c-num opt-2"),
               ("Pool", "pool", "c-text"), ("Temperature", "-temperature_celsius", "c-num"),
               ("Worn", "-wear_ratio", "c-num"), ("Power-on hours", "-power_on_hours", "c-num opt-3"))),
    Resource(
        "backups", "The backup of every guest of the fleet: the newest good and failed run, and how late it is.",
        BACKUP_COLUMNS, of_host=lambda fleet, state, now: backup_rows(state, fleet, now), reads=("backups",),
        words={"late": ("late_seconds",), "backup": ("state", "newest_ok_at"), "job": ("covered",)},
        labels={"host": "host", "vmid": "vmid"},
        metrics=(Metric("late_seconds", "Seconds since the run that was missed; below 0: until the next."),
                 Metric("newest_ok_timestamp_seconds", "End of the newest good backup.",
                        lambda row: row["newest_ok_at"])),
        heads=(("Verdict", "verdict", "c-state"), ("Guest", "name", "c-name"), ("VMID", "vmid", "c-num"),
               ("Host", "host", "c-host"), ("Backup", "state", "c-text"), ("Newest good", "newest_ok_at", "c-num"),
               ("Late", "-late_seconds", "c-num"), ("Size", "-size_bytes", "c-num opt-2"),
               ("Took", "-duration_seconds", "c-num opt-3"), ("Where", "storage", "c-text opt-2"),
               ("Last failed", "-newest_failed_at", "c-num opt-3"))),
    Resource(
        "volumes", "What the disks of every guest lie on.", VOLUME_COLUMNS,
        of_host=lambda fleet, state, now: volume_rows(state, now), reads=("guests",),
        heads=(("Guest", "name", "c-name"), ("VMID", "vmid", "c-num"), ("Host", "host", "c-host"),
               ("Storage", "storage", "c-text"), ("Dataset", "dataset", "c-text"), ("Pool", "pool", "c-text"),
               ("Size", "-size_bytes", "c-num"))),
    Resource(
        "copies", "If a host burned now: for every guest the newest copy of its data that is not on it, and what would "
        "be lost.", COPY_COLUMNS, of_hosts=fleet_copies, title="If a host burned",
        basis="From backups on storages that are not the host's own, PVE replication, and snapshots whose guid "
              "another host has too: these are sure. A snapshot of the same name, class and time on a host where no"
              " such guest runs is likely: the column sure is false.",
        sum_up=sum_up_copies,
        words={"lost": ("lost_seconds",)},
        heads=(("State", "verdict", "c-state"), ("Guest", "name", "c-name"), ("VMID", "vmid", "c-num"),
               ("Host", "host", "c-host"), ("Would be lost", "-lost_seconds", "c-num"), ("Copy", "copy_kind", "c-text"),
               ("Where", "copy_where", "c-text"), ("Why", "reason", "c-text"))),
    Resource(
        "replacements", "The disks to replace, in order: where the least margin would be left first.",
        REPLACE_COLUMNS, of_hosts=lambda fleet, states, now: replacement_rows(states), title="Disks to replace",
        basis="From SMART, self-tests and the errors that ZFS counted, against what each vdev may still lose. A "
              "disk that SMART cannot look at is never suspect by that.",
        words={"name": ("disk",), "margin": ("margin_with_suspects",)},
        heads=(("State", "verdict", "c-state"), ("Disk", "disk", "c-name"), ("Host", "host", "c-host"),
               ("Why", "reason", "c-text"), ("Serial", "serial", "c-text"), ("Model", "model", "c-text opt-2"),
               ("Vdev", "vdev", "c-text"), ("Pool", "pool", "c-text"), ("Can lose", "margin", "c-num"),
               ("With suspects", "margin_with_suspects", "c-num"), ("Guests", "-guests", "c-num opt-2"))),
    Resource(
        "blindspots", "Where trouble would go unheard: mail addresses, timers, daemons, jobs, sources of updates.",
        BLINDSPOT_COLUMNS, of_hosts=fleet_blindspots, title="Blind spots",
        basis="From the host's own configuration and running services, half an hour old at most: sure. What could "
              "not be looked at is said to be unknown.",
        words={"name": ("what",)},
        heads=(("State", "verdict", "c-state"), ("Blind spot", "reason", "c-name"), ("Host", "host", "c-host"),
               ("What to do", "todo", "c-text"))),
    Resource(
        "traps", "What takes space that nobody expects it to take.", TRAP_COLUMNS, of_hosts=fleet_traps,
        title="Space traps",
        basis="From zfs list and the pool's geometry. Padding is computed from volblocksize, sector size and width,"
              " to some percent; for clones it is an upper bound; all else is as ZFS counts it.",
        sum_up=sum_up_traps, words={"name": ("object",)},
        heads=(("Object", "object", "c-name"), ("Host", "host", "c-host"), ("Trap", "trap", "c-text"),
               ("Takes", "-bytes", "c-num"), ("Why", "reason", "c-text"))),
    Resource(
        "snapshots", "Series of snapshots, by dataset and class: their rhythm, who is late, who has none though its "
        "neighbours have, who never prunes.", SERIES_COLUMNS, of_hosts=fleet_series, title="Snapshots",
        basis="The rhythm is the median of the last 20 intervals. Holds is exact where a dataset has one class; "
              "else it is what each snapshot alone holds, at least that, and At most is what all of the dataset's "
              "hold together.",
        words={"name": ("dataset",)},
        heads=(("State", "verdict", "c-state"), ("Dataset", "dataset", "c-name"), ("Host", "host", "c-host"),
               ("Class", "class", "c-text"), ("Newest", "newest_at", "c-num"), ("Count", "-count", "c-num opt-2"),
               ("Rhythm", "interval_seconds", "c-num opt-2"), ("Oldest", "oldest_at", "c-num opt-3"),
               ("Holds", "-held_bytes", "c-num opt-2"), ("At most", "-held_most_bytes", "c-num opt-3"),
               ("Why", "reason", "c-text"))),
    Resource(
        "scrubs", "Each pool's last scrub against those before it: how long it took, what it repaired, the slow disk.",
        SCRUB_COLUMNS, of_hosts=fleet_scrubs, title="Scrubs",
        basis="Usual is the median per byte of at least three scrubs that were seen here, for as much data. The "
              "slow disk reads twice as slow as the others of its vdev, by ZFS's own averages since the import.",
        words={"name": ("pool",), "scrub": ("ended_at",)},
        heads=(("State", "verdict", "c-state"), ("Pool", "pool", "c-name"), ("Host", "host", "c-host"),
               ("Ended", "ended_at", "c-num"), ("Took", "-duration_seconds", "c-num"),
               ("Usual", "usual_seconds", "c-num"), ("Repaired", "-repaired_bytes", "c-num"),
               ("Slow disk", "slow_disk", "c-text"), ("Why", "reason", "c-text"))),
    Resource(
        "forecasts", "When pools, storages, thin pools, datasets with a quota and root file systems are full, as a "
        "range of days, what grew, and what could be won.", FORECAST_COLUMNS, of_hosts=fleet_forecasts,
        title="When it is full",
        basis="From the history of the last 7 and 30 days, by the median of slopes with its 90 % bounds: what grows"
              " steadily. Less than 3 days known: unknown.",
        words={"name": ("object",), "full": ("days_until_full",)},
        heads=(("State", "verdict", "c-state"), ("Space", "object", "c-name"), ("Host", "host", "c-host"),
               ("Full in", "reason", "c-text"), ("Days", "days_until_full", "c-num"),
               ("Free", "available_bytes", "c-num"), ("A day", "-daily_growth_bytes", "c-num opt-2"))),
    Resource(
        "drift", "The odd ones out: where a host differs from what at least two thirds of the hosts asked for share.",
        DRIFT_COLUMNS, of_hosts=lambda fleet, states, now: drift_rows(states), title="Drift",
        basis="A value is usual if two thirds of at least three hosts that tell of it share it; who does not tell "
              "is not odd. ZFS's module is also held against its tools on the same host.",
        words={"name": ("fact",)},
        heads=(("Fact", "fact", "c-name"), ("Host", "host", "c-host"), ("Here", "value", "c-text"),
               ("Usual", "usual", "c-text"), ("Share", "share_ratio", "c-num"))),
    Resource(
        "cohorts", "Disks of one model and firmware: how many, how fast they wear, how many are suspect, where.",
        COHORT_COLUMNS, of_hosts=lambda fleet, states, now: cohort_rows(states), title="Disk models",
        basis="Wear is what the disk says of itself over its power-on time, the median of the model: a year or two "
              "of a few disks say little.",
        words={"name": ("model",)},
        heads=(("Model", "model", "c-name"), ("Firmware", "firmware", "c-text"), ("Disks", "-disks", "c-num"),
               ("Suspect", "-suspect", "c-num"), ("Worn a year", "-wear_per_year_ratio", "c-num"),
               ("Hosts", "hosts", "c-text opt-2"))),
    Resource(
        "alerts", "Alerts, worst first: ?state=firing (default), pending, resolved or all.", ALERT_COLUMNS,
        of_fleet=asked_alerts, queries=("state", *PLACES),
        words={"name": ("object",)},
        heads=(("Severity", "severity", "c-state"), ("Problem", "message", "c-name"), ("Host", "host", "c-host"),
               ("Object", "object", "clip opt-2"), ("Since", "-since", "c-num"),
               ("Ended", "-resolved_at", "c-num"), ("Rule", "rule", "c-text opt-3"))),
    Resource(
        "events",
        "What changed, newest first: ?since=unix time, ?kind=audit for all that people, tokens and commands did.",
        ("id", "at", "kind", "host", "object", "message", "by", "address", "severity"),
        of_fleet=asked_events, queries=("since", "until", "kind", *PLACES), tab="Timeline",
        words={"name": ("object",)},
        heads=(("When", "-at", "c-time"), ("What", "message", "c-name"), ("Severity", "severity", "c-text opt-2"),
               ("Kind", "kind", "c-text"),
               ("Host", "host", "c-host"), ("Object", "object", "clip opt-2"))),
    Resource(
        "silences", "The silences that have not ended.",
        ("id", *SILENCE_MATCHERS, "until", "note", "created_by", "created_at"),
        of_fleet=lambda call: active_silences(call.db, call.now), queries=()),
    Resource(
        "rules", "Every rule with its thresholds, for one host or object too, and the layer that set them.",
        ("rule", "of", "enabled", "warn", "crit", "clear_by", "hold_seconds", "layer", "why", "todo"),
        of_fleet=asked_rules, queries=("host", "object")),
    Resource(
        "channels", "Where notifications go, and the last delivery of each.",
        ("name", "kind", "last_sent_at", "last_error", "last_error_at", "waiting", "given_up"),
        of_fleet=lambda call: channel_rows(call.db, call.fleet), queries=()),
    Resource(
        "tokens", "The API tokens' names.", ("name", "kind", "admin", "created_at", "expires_at"),
        of_fleet=lambda call: list_api_tokens(call.db), auth="admin", queries=()),
    Resource(
        "sessions", "Who is logged in; `current` is the session that asks.",
        ("id", "user", "created_at", "used_at", "address", "user_agent", "current"),
        of_fleet=lambda call: [{**row, "current": row["id"] == call.session_key.hex()[:16]}
                               for row in list_sessions(call.db, call.now)], auth="admin", queries=()),
    Resource(
        "users", "Who may log in, and as what: viewer, operator (acknowledges and mutes), admin.",
        ("name", "role", "created_at", "last_login_at"),
        of_fleet=lambda call: list_users(call.db, call.monitor.config.password_hash), auth="admin", queries=()),
)}


def host_rows(resource: Resource, fleet: Fleet, state: HostState, now: float) -> Rows:
    """A host's rows of a list. They are made anew only if something that they are made of is another, or if time
    changes them: a fleet's lists are asked for more often than its hosts report."""
    assert resource.of_host is not None
    covers = known_coverage(state, fleet, now) if "backups" in resource.reads else None
    read, kept = what_is_read(resource, fleet, state, covers), state.rows.get(resource.name)
    if kept is not None and kept.since <= now < kept.until and kept.read == read:
        return marshal.loads(kept.packed)
    rows = list(resource.of_host(fleet, state, now))
    if what_is_read(resource, fleet, state, covers) == read:  # it was the same all the while
        until = min((at for at in changes_by_time(resource, fleet, state, covers, now) if at > now), default=math.inf)
        state.rows[resource.name] = KeptRows(read, now, until, marshal.dumps(rows))
    return rows


def what_is_read(resource: Resource, fleet: Fleet, state: HostState, covers: list[Coverage] | None) -> tuple[Any, ...]:
    """All that a host's rows are made of beside the time. A section is known by its report."""
    sections = state.sections
    read = (state.name, [*state.alerts.values()], state.margins, state.forecasts, covers, state.no_backup, fleet.layers,
            *[sections.get(name, NOTHING).stamp for name in resource.reads])
    if resource.name != "hosts":
        return read
    return (*read, state.site, state.tags, state.note, state.maintenance_until, state.last_seen_at, state.agent,
            state.clock_ahead, state.guest_counts, fleet.concerned.get(state.id), fleet.serving_since)


def changes_by_time(resource: Resource, fleet: Fleet, state: HostState, covers: list[Coverage] | None,
                    now: float) -> Iterator[float]:
    """When a host's rows say something else though nothing has come: a value is old, an age in a sentence goes on."""
    for name in resource.reads:
        time_of_value = state.sections.get(name, NOTHING).time
        yield math.inf if time_of_value is None else time_of_value + SECTION_TICKS.get(name, 2 * HOUR)
    for cover in covers or ():
        if cover.covered is False and cover.newest_ok_at is not None:
            yield next_age(cover.newest_ok_at, now)
    if resource.name != "hosts":
        return
    yield state.maintenance_until or 0.0
    for alert in state.alerts.values():
        if alert.state == "pending":
            yield next_age(alert.since, now, unit=MINUTE)
    silent = fleet.silent_seconds(state, now)
    if silent is not None:
        yield from (now - silent + limit for limit in (STALE_SECONDS, fleet.offline_after(state)))
        yield next_age(now - silent, now) if silent >= STALE_SECONDS else math.inf


def rows_of_hosts(resource: Resource, fleet: Fleet, states: Iterable[HostState], now: float) -> tuple[Rows, list[str]]:
    """The rows of these hosts, and the names of the hosts whose rows could not be made."""
    rows: Rows = []
    failed: list[str] = []
    for state in states:
        try:
            rows += host_rows(resource, fleet, state, now)
        except ODD as error:
            failed.append(state.name)
            log_once(f"server: {resource.name} of {state.name} left out: {type(error).__name__}: {error}")
            if resource.name == "hosts":  # the list of hosts is complete, whatever else is not
                rows.append({**dict.fromkeys(resource.columns), "name": state.name, "tags": state.tags,
                             "verdict": "unknown", "reason": "What it has sent cannot be shown."})
    return rows, failed


# --- api: read the request, ask, answer ---


class Call:
    """One request, with who is asking."""

    def __init__(self, monitor: Monitor, environ: Fields, params: dict[str, str], *, fresh: bool = True):
        self.monitor, self.environ, self.params = monitor, environ, params
        self.now = monitor.clock()
        self.query = {key: ",".join(values) if key == "cols" else values[-1] for key, values in urllib.parse.parse_qs(
            environ.get("QUERY_STRING", ""), keep_blank_values=True, errors="replace").items()}  # cols: boxes of a form
        self.actor: str | None = None  # the user's or the token's name
        self.kind, self.role = "", ROLES[0]  # 'session', 'token' or 'kiosk', and what that may
        self.token_expires_at: float | None = None
        self.cookie = ""
        self.session: sqlite3.Row | None = None
        self.set_cookie: str | None = None
        if fresh:
            monitor.fleet.refresh(self.db)

    @property
    def db(self) -> Database:
        return self.monitor.store.reader()

    @property
    def fleet(self) -> Fleet:
        return self.monitor.fleet

    @property
    def admin(self) -> bool:
        return self.role == "admin"

    @property
    def session_key(self) -> bytes:
        return self.session["hash"] if self.session else b""

    def write(self, work: Callable[[Database], Any], *, urgent: bool = True) -> Any:
        """`Store.write`; the events of it tell who asked, and from where."""
        by, address = f"{self.kind}:{self.actor}" if self.actor else None, self.address()

        def signed(db: Database) -> Any:
            with done_by(by, address):
                return work(db)

        return self.monitor.store.write(signed, urgent=urgent)

    def header(self, name: str) -> str:
        """A request header, '' if it is not there."""
        key = name.upper().replace("-", "_")
        return self.environ.get(key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else "HTTP_" + key, "") or ""

    def json(self, spec: Fields, *, nulls: tuple[str, ...] = ()) -> Fields:
        """The body of a write, a JSON object of at most 64 KiB, as checked() has it; in it are the fields of `nulls`
        that are to be emptied. `Problem` with a pointer."""
        body = read_request(self.environ, 1 << 16)
        if body and media_type(self.header("content-type")) != "application/json":
            raise Problem("unsupported_media_type", "send application/json")
        given = parse_json(body) if body else {}
        try:
            fields = checked(given, spec)
        except Mistake as mistake:
            name = mistake.path[0] if mistake.path else "the body, a JSON object,"
            raise Problem("invalid_request", f"{name} {mistake.reason}",
                          pointer=json_pointer([*mistake.path])) from None
        return fields | {name: None for name in nulls if name in given and given[name] is None}

    def future(self, given: Any) -> float:
        """As a spec: a unix time to come."""
        if not (is_number(given) and given > self.now):
            raise ValueError("should be a unix time in the future")
        return given

    def address(self) -> str:
        """Where the request comes from; a proxy's word counts only if it is trusted."""
        address = self.environ.get("REMOTE_ADDR", "")
        for hop in reversed([one.strip() for one in self.header("x-forwarded-for").split(",") if one.strip()]):
            if not is_trusted(address, self.monitor.config):
                break
            address = hop
        return address[:64]

    @property
    def https(self) -> bool:
        """Whether the browser came by https, as PUBLIC_URL or a trusted proxy has it."""
        proxied = is_trusted(self.environ.get("REMOTE_ADDR", ""), self.monitor.config)
        return self.monitor.config.https or (proxied and self.header("x-forwarded-proto").lower() == "https")

    def states(self) -> list[HostState]:
        """The hosts that the filters in PLACES leave, worst first."""
        wanted = {key: self.query[key].lower() for key in PLACES if key in self.query}
        return [state for state in self.fleet.sorted(self.now)
                if wanted.get("host", state.name.lower()) == state.name.lower()
                and wanted.get("site", (state.site or "").lower()) == (state.site or "").lower()
                and ("cluster" not in wanted or wanted["cluster"] == cluster_of(state))
                and ("tag" not in wanted or wanted["tag"] in (tag.lower() for tag in state.tags))]

    def number(self, key: str, default: float) -> float:
        """A number of the query. `Problem('invalid_request')`."""
        try:
            value = float(self.query.get(key, default))
        except ValueError:
            value = math.nan
        if not -NUMBER_MOST < value < NUMBER_MOST:
            raise Problem("invalid_request", f"{key} should be a number", parameter=key)
        return value


def is_trusted(address: str, config: Config) -> bool:
    try:
        return any(ipaddress.ip_address(address) in network for network in config.trusted_proxies)
    except ValueError:
        return False


def read_request(environ: Fields, limit: int) -> bytes:
    """The body as sent. `Problem('too_large')` before it is read."""
    length = environ.get("CONTENT_LENGTH") or "0"
    if not (length.isascii() and length.isdigit()) or int(length) > limit:
        raise Problem("too_large", f"at most {limit} bytes in one request")
    return environ["wsgi.input"].read(int(length))


def read_cookie(call: Call, name: str) -> str:
    """One of the cookies that came."""
    wanted = cookie_name(call, name)
    for part in call.header("cookie").split(";"):
        found, _, value = part.strip().partition("=")
        if found == wanted:
            return value
    return ""


def check_same_origin(call: Call) -> None:
    """Refuse what another site made the browser send."""
    if call.header("sec-fetch-site") not in ("", "same-origin", "none"):
        raise Problem("forbidden", "sent by another site")
    origin = call.header("origin")
    own = {urllib.parse.urlsplit(call.monitor.config.public_url).netloc.lower(), call.header("host").lower()}
    if origin and origin.partition("://")[2].lower() not in own:
        raise Problem("forbidden", "sent by another origin")


COOKIE, KIOSK_COOKIE, SEEN_COOKIE = "proxmon_session", "proxmon_kiosk", "proxmon_seen"


def cookie_name(call: Call, name: str) -> str:
    """With __Host- no other host of the domain can set it (RFC 6265bis, 4.1.3.2); browsers want https for that."""
    return f"__Host-{name}" if call.https else name


def cookie_header(call: Call, name: str, value: str, seconds: int) -> str:
    secure = "; Secure" if call.https else ""
    return f"{cookie_name(call, name)}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax{secure}"


BEARER = {"WWW-Authenticate": "Bearer"}


def identify(call: Call) -> None:
    """Find out who is asking: an API token in Authorization, else a session's cookie."""
    scheme, _, given = call.header("authorization").partition(" ")
    if given:
        token = find_api_token(call.db, given.strip(), call.now) if scheme.lower() == "bearer" else None
        if token is None:
            raise Problem("unauthorized", "the API token is not known, revoked or expired", headers=BEARER)
        call.actor, call.kind, call.role = token["name"], "token", "admin" if token["admin"] else "viewer"
        call.token_expires_at = token["expires_at"]
        return
    cookie, config = read_cookie(call, COOKIE), call.monitor.config
    login, session = find_session(call.db, call.monitor.secret, cookie, call.now, config.password_hash)
    if login is None or session is None:
        return
    call.actor, call.kind, call.role = login.name, "session", login.role
    call.cookie, call.session = cookie, session
    if call.now - session["used_at"] > HOUR:  # used anew, and the browser's cookie with it; no write for each request
        left = session["created_at"] + SESSION_MOST - call.now
        call.set_cookie = cookie_header(call, COOKIE, cookie, int(min(SESSION_SECONDS, left)))
        call.monitor.store.write(lambda db: db.execute("UPDATE session SET used_at = :now WHERE hash = :hash", {
            "now": call.now, "hash": session["hash"]}).rowcount, urgent=False)


def is_known(call: Call) -> bool:
    """Whether somebody asks who is let in; for routes that tell strangers less."""
    try:
        identify(call)
    except Problem:
        pass
    return call.actor is not None


class Route(NamedTuple):
    method: str
    path: str
    auth: str  # none, page (a session or a kiosk; else to the log-in), read, operate, admin
    handler: Callable[[Call], Any]
    summary: str
    queries: tuple[str, ...]
    makes: bool  # answers 201
    resource: Resource | None


ROUTES: list[Route] = []
MAY = {"read": ROLES, "operate": ROLES[1:], "admin": ROLES[2:]}  # who is let to such a route


def route(method: str, path: str, *, auth: str, queries: tuple[str, ...] = (),
          makes: bool = False) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Register a handler; its docstring's first line is the summary in the API's description."""
    assert auth in ("none", "host", "page", *MAY)

    def register(handler: Callable[[Call], Any]) -> Callable[[Call], Any]:
        summary = (handler.__doc__ or "").partition("\n")[0]
        ROUTES.append(Route(method, path, auth, handler, summary, queries, makes, None))
        return handler

    return register


LIST_QUERIES = ("format", "q", "sort", "limit", "offset", "columns")


def get_list(resource: Resource, call: Call) -> Answer:
    """A resource's rows: filtered, sorted, cut, and written in the format the caller asks for."""
    form, sort = call.query.get("format", "json"), call.query.get("sort", "")
    limit, offset = int(call.number("limit", LIST_LIMIT)), int(call.number("offset", 0))
    if form not in ("json", "csv", "text"):
        raise Problem("invalid_request", "format: json, csv or text", parameter="format")
    if sort and sort.removeprefix("-") not in resource.columns:
        raise Problem("invalid_request", f"sort: one of {', '.join(resource.columns)}", parameter="sort")
    columns = tuple(call.query["columns"].split(",")) if call.query.get("columns") else resource.columns
    if not set(columns) <= set(resource.columns):
        raise Problem("invalid_request", f"columns: some of {','.join(resource.columns)}", parameter="columns")
    if not (0 <= limit <= LIST_MOST and offset >= 0):
        raise Problem("invalid_request", f"limit: 0 to {LIST_MOST}; offset: from 0", parameter="limit")
    rows, failed = list_rows(resource, call)
    rows = find_rows(call, resource, filter_rows(resource, rows, call.query), parse_terms(call.query.get("q", "")))
    whole = list(rows) if resource.title else []
    rows = iter(sort_rows(whole or list(rows), sort) if sort else whole or rows)
    before, page = sum(1 for _ in islice(rows, offset)), list(islice(rows, limit))
    total = before + len(page) + sum(1 for _ in rows)
    if form == "json":
        items = [pick(row, columns) for row in page] if "columns" in call.query else page
        told = {"items": items, "total": total, "limit": limit, "offset": offset, **about_answer(resource, whole)}
        return Answer(200, json.dumps({**told, "failed": failed} if failed else told).encode())
    headers = {"X-Total-Count": str(total), **({"X-Failed-Hosts": ", ".join(failed)} if failed else {})}
    if form == "csv":
        return csv_answer(to_csv(page, columns), resource.name, headers)
    return Answer(200, to_text(page, columns).encode("utf-8", "replace"),
                  {"Content-Type": "text/plain; charset=utf-8", **headers})


def about_answer(resource: Resource, rows: Rows) -> Row:
    """What an answer was computed from, how sure that is, and all its rows in a sentence."""
    if not resource.title:
        return {}
    return {"basis": resource.basis, "summary": resource.sum_up(rows) if resource.sum_up else None}


def list_rows(resource: Resource, call: Call) -> tuple[Iterable[Row], list[str]]:
    """All rows a call asks for, and the hosts whose rows could not be made."""
    if resource.of_fleet is not None:
        return resource.of_fleet(call), []
    if resource.of_hosts is not None:
        return resource.of_hosts(call.fleet, call.states(), call.now), []
    return rows_of_hosts(resource, call.fleet, call.states(), call.now)


def body_etag(body: bytes) -> str:
    return f'W/"{hashlib.sha256(body).hexdigest()[:16]}"'


def csv_answer(text: str, name: str, headers: dict[str, str] | None = None) -> Answer:
    """CSV for a file: a browser saves it, whatever it holds."""
    return Answer(200, text.encode("utf-8", "replace"), {
        "Content-Type": "text/csv; charset=utf-8",
        "Content-Disposition": f'attachment; filename="{name}.csv"', **(headers or {})})


for listed in RESOURCES.values():
    ROUTES.append(Route("GET", f"/api/v1/{listed.name}", listed.auth, partial(get_list, listed), listed.summary,
                        (*LIST_QUERIES, *listed.queries), False, listed))


@route("GET", "/api/v1/overview", auth="read")
def get_overview(call: Call) -> Any:
    """The fleet in a few numbers."""
    return build_overview(call.fleet, call.now)


@route("POST", "/api/v1/hosts", auth="admin", makes=True)
def post_host(call: Call) -> Any:
    """Register a host; its token is in the answer and never again."""
    wanted = call.json({"name": str, "site?": (str, 0, 63), "tags?": host_tags})
    row = call.write(lambda db: insert_host(db, now=call.now, **wanted))
    return token_answer(call, row)


@route("GET", "/api/v1/hosts/<id>", auth="read")
def get_host(call: Call) -> Any:
    """All that is known of a host: the latest of each section as sent, alerts, missing reports."""
    return host_detail(call, call.fleet.find(call.params["id"]))


@route("PATCH", "/api/v1/hosts/<id>", auth="admin")
def patch_host(call: Call) -> Any:
    """Change name, site, tags, note or maintenance_until; the token stays."""
    wanted = call.json({"name?": str, "tags?": host_tags, "site?": (str, 0, 63), "note?": NOTE,
                        "maintenance_until?": (float, 0, 1e11)}, nulls=("site", "note", "maintenance_until"))
    row = call.write(lambda db: update_host(db, call.params["id"], wanted, call.now))
    return {"host": shown_host(call, row)}


@route("POST", "/api/v1/hosts/<id>/rotate-token", auth="admin")
def post_rotate_token(call: Call) -> Any:
    """A new token for a host; the old one is refused from here on."""
    row = call.write(lambda db: rotate_nonce(db, call.params["id"], call.now))
    return token_answer(call, row)


@route("GET", "/api/v1/hosts/<id>/history", auth="read", queries=("series", "from", "to", "step", "format"))
def get_history(call: Call) -> Any:
    """Points [time, average, minimum, maximum] of the series named: section.field or section/object.field."""
    state = call.fleet.find(call.params["id"])
    question = read_question(call, state)
    of_guests = any(name.startswith("guests/") for name in question.names)
    hosts = [host.id for host in call.fleet.mates(state)] if of_guests else [state.id]
    answers = call.monitor.keeper.ask(call.db, hosts, question)
    if call.query.get("format", "json") == "csv":
        rows = [dict(zip(HISTORY_COLUMNS, (point[0], question.step, name, *point[1:])))
                for name, points in zip(question.names, answers) for point in points]
        return csv_answer(to_csv(rows, HISTORY_COLUMNS), f"{state.name}-history")
    return {"series": [{"name": name, "step": question.step, "points": points}
                       for name, points in zip(question.names, answers)]}


HISTORY_COLUMNS = ("time", "step", "series", "average", "minimum", "maximum")
SERIES_MOST = 500  # in one question


def read_question(call: Call, state: HostState) -> Question:
    """What ?series=…&from=…&to=…&step=… asks for. `Problem('invalid_request')`."""
    names = urllib.parse.parse_qs(call.environ.get("QUERY_STRING", ""), errors="replace").get("series", [])
    if len(names) > SERIES_MOST:
        raise Problem("invalid_request", f"at most {SERIES_MOST} series in one question", parameter="series")
    until = min(call.number("to", call.now), call.now + DAY)
    since = call.number("from", until - DAY)
    wanted = call.number("step", 0) or None
    if wanted is not None and not 1 <= wanted <= 366 * DAY:
        raise Problem("invalid_request", "step: 1 to 31622400 seconds; 30 = as received", parameter="step")
    begin = call.monitor.keeper.begin(call.db, state.id)
    since = max(since, begin if begin is not None else since, 0)  # nothing was before: no need for a coarser step
    oldest_raw = call.now - KEPT[RAW]
    return Question(names, since, until, choose_step(since, until, wanted, oldest_raw, call.now))


@route("GET", "/api/v1/hosts/<id>/gaps", auth="read", queries=("from",))
def get_gaps(call: Call) -> Any:
    """What never came of a host, and when: reports lost by their sequence numbers, and times of silence."""
    state = call.fleet.find(call.params["id"])
    since = call.number("from", call.now - KEPT[RAW])
    keys = call.monitor.keeper.keys(call.db, state.id, since, call.now)
    return {"missing_reports": missing_reports(call.db, state.id), "from": since,
            "lost": list_lost(keys), "silences": list_silences(keys)}


def streamed(call: Call, parts: Iterable[bytes]) -> Iterator[bytes]:
    """The same parts. Who does not read them keeps a thread for UNREAD_SECONDS: so many have one at once."""
    streams, who = call.monitor.streams, (call.kind, call.actor)
    streams.append(who)
    if len(streams) > STREAMS_AT_ONCE or streams.count(who) > STREAMS_OF_ONE:
        streams.remove(who)
        raise Problem("busy", "other answers of this kind are being read", headers={"Retry-After": "5"})

    def send() -> Iterator[bytes]:
        try:
            yield from parts
        finally:
            streams.remove(who)

    return send()


@route("GET", "/api/v1/hosts/<id>/export", auth="read", queries=("format",))
def get_export(call: Call) -> Any:
    """The whole history of a host: ?format=jsonl (default) or csv."""
    state = call.fleet.find(call.params["id"])
    form = call.query.get("format", "jsonl")
    if form not in ("jsonl", "csv"):
        raise Problem("invalid_request", "format: jsonl or csv", parameter="format")
    rows = call.monitor.keeper.export(call.db, state.id, call.now)
    kind = "application/x-ndjson" if form == "jsonl" else "text/csv; charset=utf-8"
    return Answer(200, b"", {"Content-Type": kind, "Cache-Control": "no-store",
                             "Content-Disposition": f'attachment; filename="{state.name}-history.{form}"'},
                  stream=streamed(call, write_export(rows, form)))


EXPORT_COLUMNS = (*HISTORY_COLUMNS, "count")


def write_export(rows: Iterator[list[Any]], form: str) -> Iterator[bytes]:
    """Rows as JSON lines or CSV, some hundreds at a time."""
    if form == "csv":
        yield to_csv([], EXPORT_COLUMNS).encode()
    while batch := list(islice(rows, 500)):
        dicts = [dict(zip(EXPORT_COLUMNS, row)) for row in batch]
        if form == "csv":
            yield to_csv(dicts, EXPORT_COLUMNS).partition("\r\n")[2].encode("utf-8", "replace")
        else:
            yield "".join(json.dumps(one) + "\n" for one in dicts).encode("utf-8", "replace")


def alert_number(call: Call) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", call.params["id"]):
        raise Problem("not_found", "no such alert")
    return int(call.params["id"])


NOTE = (str, 0, 2000)


def shown_alert(call: Call, number: int) -> Row:
    row = next(stored_alerts(call.db, "alert.id = :id", id=number), None)
    if row is None:
        raise Problem("not_found", f"no alert {number}")
    return row


@route("GET", "/api/v1/alerts/<id>", auth="read")
def get_alert(call: Call) -> Any:
    """One alert, open or over: what depends on what it is about, and what happened before it."""
    row = shown_alert(call, alert_number(call))
    state = call.fleet.names.get((row["host"] or "").lower())
    stakes = state and row["resolved_at"] is None and at_stake(state, row["object"])
    return {**row, "at_stake": stakes or None,
            "blast_radius": blast_radius(state, row["object"]) if state and stakes else None,
            "before": events_before(call, row, state)}


BEFORE_SECONDS, BEFORE_MOST = HOUR, 100


def events_before(call: Call, alert: Row, state: HostState | None) -> Rows:
    """What happened on an alert's host and its cluster in the hour before it began, newest first: tasks, updates,
    reboots, changes of guests and of the configuration, other alerts."""
    fleet, object = call.fleet, alert["object"] or ""
    hosts = fleet.cluster_of(state) if state else [
        fleet.hosts[host_id] for host_id in fleet.shared.hosts_of(object) if host_id in fleet.hosts]
    names, cluster = {host.name for host in hosts}, text(state.body("cluster"), "name") if state else None
    events = each_event(call.db, since=alert["since"] - BEFORE_SECONDS, until=alert["since"])
    own = (event for event in events if event["host"] in names
           or (event["host"] is None and (event["object"] or "").startswith(f"clusters/{cluster}")))
    return list(islice(own, BEFORE_MOST))


@route("POST", "/api/v1/alerts/<id>/acknowledge", auth="operate")
def post_acknowledge(call: Call) -> Any:
    """Take note of an alert, until it gets worse: note, until (both optional)."""
    wanted, number = call.json({"note?": NOTE, "until?": call.future}), alert_number(call)
    call.write(lambda db: acknowledge(db, call.fleet, number, call.now, by=call.actor or "",
                                      until=wanted.get("until"), note=wanted.get("note")))
    return shown_alert(call, number)


@route("POST", "/api/v1/alerts/<id>/accept", auth="admin")
def post_accept(call: Call) -> Any:
    """Accept what an alert is about as normal: it is the baseline from here on."""
    number = alert_number(call)
    call.json({})

    def work(db: Database) -> None:
        accept_as_normal(db, call.fleet, number, call.now, by=call.actor or "")
        dispatch(db, call.fleet, call.fleet.everything(), call.now)

    call.write(work)
    return shown_alert(call, number)


@route("POST", "/api/v1/silences", auth="operate", makes=True)
def post_silence(call: Call) -> Any:
    """No notification for what fits all of tag, site, host, object, rule that are given, until a time: until, note."""
    matcher = (str, 1, 300)
    wanted = call.json({"until": call.future, "note?": NOTE, **{f"{key}?": matcher for key in SILENCE_MATCHERS}})
    if not wanted.keys() & set(SILENCE_MATCHERS):
        raise Problem("invalid_request", f"at least one of {', '.join(SILENCE_MATCHERS)}", pointer="")
    fields = {**dict.fromkeys((*SILENCE_MATCHERS, "note")), **wanted}
    return call.write(lambda db: insert_silence(db, call.fleet, fields, call.now, by=call.actor or ""))


@route("POST", "/api/v1/channels/<name>/test", auth="admin")
def post_channel_test(call: Call) -> Any:
    """Send a test message through a channel, now; 502 with the reason if it is not taken."""
    call.json({})
    channel = next((one for one in call.fleet.channels if one.name == call.params["name"]), None)
    if channel is None:
        raise Problem("not_found", "no such channel")
    try:
        return {"name": channel.name, "sent_at": call.monitor.notifier.test(channel)}
    except Undelivered as error:
        log(f"notifications: test of {channel.name}: {error}")
        raise Problem("undelivered", str(error)) from None


@route("POST", "/api/v1/rules/replay", auth="admin")
def post_replay(call: Call) -> Any:
    """What rules would have said of the history: since (seconds back), settings (a server.toml, default: as loaded)."""
    wanted = call.json({"since?": (float, MINUTE, REPLAY_LONGEST), "settings?": str})
    since, source = wanted.get("since", DAY), wanted.get("settings")
    try:
        source = call.monitor.settings.source if source is None else parse_settings(source).source
    except BadSettings as mistake:
        raise Problem("invalid_request", str(mistake), pointer="/settings", line=mistake.line) from None
    return run_replay(call.monitor, source, since)


REPLAY_LONGEST = 800 * DAY  # nothing is kept for longer
REPLAY_SECONDS = 20  # of work; what was found by then is told
REPLAY_SHOWN = 1000


def run_replay(monitor: Monitor, source: str, since: float) -> Fields:
    """`replay-rules` in a process of its own, one at a time: it takes no time from the writer, and it ends."""
    if not monitor.replaying.acquire(blocking=False):
        raise Problem("busy", "another preview is under way", headers={"Retry-After": "5"})
    program = [sys.executable] if getattr(sys, "frozen", False) else [sys.executable, os.path.abspath(__file__)]
    argv = [*program, "replay-rules", "--json", "--since", f"{int(since)}s", "--seconds", str(REPLAY_SECONDS),
            "--config", "-"]
    environ = {**os.environ, "DATABASE_PATH": monitor.config.database_path}
    for secret in ("SECRET_KEY_BASE", "DASHBOARD_PASSWORD_HASH"):
        environ.pop(secret, None)
    try:
        done = subprocess.run(argv, input=source.encode(), capture_output=True, env=environ, check=False,
                              timeout=2 * REPLAY_SECONDS)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise Problem("busy", f"the preview did not end ({type(error).__name__}); try a shorter time") from None
    finally:
        monitor.replaying.release()
    if done.returncode != OK:
        raise Problem("busy", f"the preview failed: {one_line(done.stderr[-500:].decode('utf-8', 'replace'))}")
    told = json.loads(done.stdout)
    return {"items": told["alerts"][-REPLAY_SHOWN:], "total": len(told["alerts"]), "since": told["since"],
            "complete": told["complete"]}


@route("POST", "/api/v1/tokens", auth="admin", makes=True)
def post_token(call: Call) -> Any:
    """Create an API token: name, kind (token, kiosk), admin (false), expires_days (never); told this once."""
    wanted = {"kind": "token", "admin": False, "expires_days": None, **call.json({
        "name": str, "kind?": tuple(TOKEN_KINDS), "admin?": bool, "expires_days?": (float, 0.001, 36500)})}
    name, kind, admin, days = (wanted[key] for key in ("name", "kind", "admin", "expires_days"))
    if admin and kind == "kiosk":
        raise Problem("invalid_request", "a kiosk's link is to look at", pointer="/admin")
    if call.token_expires_at and not (days and call.now + days * DAY <= call.token_expires_at):
        raise Problem("forbidden", "this API token expires; those it makes have to expire no later: expires_days")
    token = call.write(lambda db: create_api_token(db, name, call.now, admin=admin, days=days, kind=kind))
    link = {"link": kiosk_link(call.monitor.config, token)} if kind == "kiosk" else {}
    return {"name": name, "token": token, **link}


def kiosk_link(config: Config, token: str) -> str:
    """What a wall display is opened with, once: the page then keeps the token in a cookie."""
    return f"{config.public_url}/?kiosk={token}"


# What goes: path, who may, what it is, and what is done; there is no such thing where that gives back False.
REMOVALS: tuple[tuple[str, str, str, Callable[[Database, Call], Any]], ...] = (
    ("hosts/<id>", "admin", "Remove a host with all it has sent.",
     lambda db, call: delete_host(db, call.params["id"], call.now)),
    ("alerts/<id>/acknowledge", "operate", "Take an acknowledgement back.",
     lambda db, call: unacknowledge(db, call.fleet, alert_number(call), call.now, by=call.actor or "")),
    ("silences/<id>", "operate", "End a silence.",
     lambda db, call: delete_silence(db, call.fleet, call.params["id"], call.now, by=call.actor or "")),
    ("tokens/<name>", "admin", "Revoke an API token.",
     lambda db, call: revoke_api_token(db, call.params["name"], call.now)),
    ("sessions", "admin", "End all sessions but the one that asks.",
     lambda db, call: end_sessions(db, call.now, but=call.session_key)),
    ("sessions/<id>", "admin", "End a session.",
     lambda db, call: end_sessions(db, call.now, id=call.params["id"]) > 0),
    ("users/<name>", "admin", "Let somebody log in no longer; his sessions end.",
     lambda db, call: delete_user(db, call.params["name"], call.now)),
)


def remove(work: Callable[[Database, Call], Any], call: Call) -> None:
    if call.write(lambda db: work(db, call)) is False:
        raise Problem("not_found", "no such thing here")


for _path, _auth, _summary, _work in REMOVALS:
    ROUTES.append(Route("DELETE", f"/api/v1/{_path}", _auth, partial(remove, _work), _summary, (), False, None))


@route("POST", "/api/v1/users", auth="admin", makes=True)
def post_user(call: Call) -> Any:
    """Let somebody log in: name, role (viewer, operator, admin), password."""
    wanted = call.json({"name": str, "role": ROLES, "password": new_password})
    name = check_user_name(call.db, wanted["name"])
    call.write(lambda db: insert_user(db, name, wanted["role"], wanted["password"], call.now))
    return dict(required_user(call.db, name))


@route("PATCH", "/api/v1/users/<name>", auth="admin")
def patch_user(call: Call) -> Any:
    """Change a user's role or password; a new password ends his sessions."""
    wanted = call.json({"role?": ROLES, "password?": new_password})
    name = required_user(call.db, call.params["name"])["name"]
    call.write(lambda db: update_user(db, name, call.now, role=wanted.get("role"),
                                      password_hash=wanted.get("password")))
    return dict(required_user(call.db, name))


def new_password(given: Any) -> str:
    """As a spec: a password, of which the hash is kept."""
    try:
        if isinstance(given, str) and len(given) <= 1000:
            with VERIFYING:
                return hash_password(given)
    except (Failure, UnicodeEncodeError):
        pass
    raise ValueError(f"should be {PASSWORD_LEAST} to 1,000 characters")


@route("POST", "/api/v1/hosts/<id>/reports", auth="host")
def post_reports(call: Call) -> Any:
    """Post one report or a batch, signed by the Standard Webhooks scheme."""
    return ingest(call.monitor, call.params["id"], call.header, read_request(call.environ, SENT_LIMIT))


@route("GET", "/api/v1/openapi.json", auth="read")
def get_openapi(call: Call) -> Any:
    """This description."""
    return build_openapi(call.monitor.config.public_url)


@route("GET", "/healthz", auth="none")
def get_health(call: Call) -> Any:
    """Whether the database can be written, when it last was, and whether what works in the background does: 503 when
    reports are not taken, judged or told of; 200 and "degraded" when something else fails."""
    store, stop = call.monitor.store, call.monitor.stop
    troubles = stop.troubles()
    age = time.monotonic() - store.last_commit if store.last_commit else None
    free = shutil.disk_usage(os.path.dirname(store.path)).free
    writes = store.alive and store.last_error is None and age is not None and age < 2 * MINUTE
    well = writes and not stop.troubles(vital=True)
    status = "failing" if not well else "degraded" if troubles else "ok"
    document: Fields = {"status": status, "writer_alive": store.alive,
                "database_writable": store.last_error is None, "last_commit_age_seconds": age}
    if is_known(call):
        document |= {"last_error": store.last_error, "disk_free_bytes": free, "version": VERSION,
                     "troubles": troubles}
    return Answer(200 if well else 503, json.dumps(document).encode(), {"Cache-Control": "no-store"})


@route("GET", "/metrics", auth="read")
def get_metrics(call: Call) -> Any:
    """The fleet for Prometheus."""
    pieces = in_pieces(render_metrics(call.monitor, call.now))
    return Answer(200, b"", {"Content-Type": "text/plain; version=0.0.4; charset=utf-8", "Cache-Control": "no-store"},
                  stream=streamed(call, pieces))


def in_pieces(texts: Iterable[str], size: int = 1 << 17) -> Iterator[bytes]:
    """Texts put together until they are so long: an answer is not made much before it is read."""
    held: list[str] = []
    length = 0
    for text in texts:
        held.append(text)
        length += len(text)
        if length >= size:
            yield "".join(held).encode()
            held, length = [], 0
    if held:
        yield "".join(held).encode()


def host_tags(given: Any) -> list[str]:
    """As a spec: the tags of a host."""
    if not (isinstance(given, list) and len(given) <= 32
            and all(isinstance(tag, str) and 0 < len(tag) <= 63 for tag in given)):
        raise ValueError("should be a list of up to 32 short texts")
    return given


def shown_host(call: Call, record: sqlite3.Row) -> Fields:
    """The row of a host that was just written; of one that somebody else has removed since, as it was registered."""
    call.fleet.refresh(call.db)
    state = call.fleet.hosts.get(record["id"])
    bare: Any = {**dict(record), "last_seen_at": None, "kept_at": None}
    return host_row(call.fleet, state or HostState(bare), call.now)


def token_answer(call: Call, record: sqlite3.Row) -> Fields:
    """A host with its token and the commands that install its agent: for this once."""
    return {"host": shown_host(call, record), "token": host_token(call.monitor.secret, record["nonce"]),
            "install": install_commands(call.monitor.config, record["name"])}


def install_commands(config: Config, name: str) -> list[str]:
    """What to type as root on the host. It asks for the token, which so stays out of the shell's history."""
    only = " --proto =https --proto-redir =https" if config.https else ""  # no redirect to plain http
    return [f"curl -fsSL{only} {config.public_url}/install/install.sh | sh -s -- --host {name}"]


INSTALL_FILES: dict[str, tuple[str, ...]] = {  # name -> where it lies in the program; () = in INSTALL_DIR
    "install.sh": ("packaging", "install.sh"),
    "install.sh.in": ("packaging", "install.sh"),  # as released: what a host keeps, to upgrade without trusting us
    "agent.py": ("agent.py",),
    "proxmox-monitor-agent.service": ("systemd", "proxmox-monitor-agent.service"),
    "proxmox-monitor-agent_linux_amd64": (),
    "proxmox-monitor-agent_linux_arm64": (),
}


# What a release is signed with, beside the binaries in INSTALL_DIR; it is passed on as it is and checked on the host.
SIGNED = ("SHA256SUMS.sig", "release-key")


@route("GET", "/install/<name>", auth="none")
@route("GET", "/install.sh", auth="none")  # which people type from memory
def get_install(call: Call) -> Any:
    """What installs an agent of this server's version: install.sh, agent.py, unit, binaries, SHA256SUMS. No secrets."""
    name, config = call.params.get("name", "install.sh"), call.monitor.config
    signed = os.path.exists(os.path.join(config.install_dir, "SHA256SUMS.sig"))
    if signed and name in ("SHA256SUMS", *SIGNED):
        with open(os.path.join(config.install_dir, name), "rb") as signed_file:
            return Answer(200, signed_file.read(), {"Content-Type": "text/plain; charset=utf-8"})
    if name == "SHA256SUMS":
        sums = {file: install_sum(config, file) for file in INSTALL_FILES}
        body = "".join(f"{digest}  {file}\n" for file, digest in sums.items() if digest)
        return Answer(200, body.encode(), {"Content-Type": "text/plain; charset=utf-8"})
    handle = open_install_file(config, name) if name in INSTALL_FILES else None
    if handle is None:
        raise Problem("not_found", f"no such file here; the agent's binaries are looked for in {config.install_dir}"
                      if name in INSTALL_FILES else "no such file")
    kind = "application/octet-stream" if "_linux_" in name else "text/plain; charset=utf-8"
    return Answer(200, b"", {"Content-Type": kind, "ETag": f'W/"{install_sum(config, name)[:16]}"'}, stream=handle)


def open_install_file(config: Config, name: str) -> IO[bytes] | None:
    """The file, which is sent as it is read; install.sh with this server's address filled in. None for a binary that
    is not there or of another version."""
    inside = INSTALL_FILES[name]
    try:
        handle = open(resource(*inside) if inside else os.path.join(config.install_dir, name), "rb")
    except OSError:
        return None
    if name == "install.sh":
        with handle:
            return io.BytesIO(handle.read().replace(b"@SERVER_URL@", config.public_url.encode()))
    named = f"# proxmox-monitor-agent {VERSION} for Linux on ".encode()  # the second line of each binary
    if not inside and not handle.read(200).partition(b"\n")[2].startswith(named):
        handle.close()
        return None
    handle.seek(0)
    return handle


def install_sum(config: Config, name: str) -> str:
    """SHA-256 of the file, '' if there is none; worked out when the file has changed."""
    handle = open_install_file(config, name)
    if handle is None:
        return ""
    with handle:
        if isinstance(handle, io.BytesIO):
            return hashlib.sha256(handle.getvalue()).hexdigest()
        now = os.fstat(handle.fileno())
        return file_sum(handle.name, now.st_mtime_ns, now.st_size)


@lru_cache(32)
def file_sum(path: str, changed_at: int, size: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def host_detail(call: Call, state: HostState) -> Fields:
    """The row of a host, the latest of each section as sent, its alerts, and what never came."""
    sections: Fields = {}
    for name, section in sorted(state.sections.items()):
        sections[name] = {"time": section.time, "received_at": section.stamp and section.stamp.received_at,
                          "stale": is_stale(state, name, call.now), "absent": section.absent,
                          "error": section.error, "body": section.body}
    return {**host_row(call.fleet, state, call.now), "sections": sections, "agent": state.agent,
            "alerts": list(with_stakes(call.fleet, open_alerts([state]))),
            "missing_reports": missing_reports(call.db, state.id)}


def filter_rows(resource: Resource, rows: Iterable[Row], query: dict[str, str]) -> Iterator[Row]:
    """Rows whose columns equal what the query says of them."""
    wanted = {column: query[column].lower() for column in resource.columns
              if column in query and column not in resource.queries}
    return (row for row in rows if all(to_cell(row[column]).lower() == value for column, value in wanted.items()))


# The search box: `site:par -tag:test state:crit pool>80 "two words"`, all of which must hold. A word before the sign is
# one of a resource's own, one of these, or a column; the first of its columns that a row has is meant. Ratios are
# written as percent.
WORDS = {"tag": ("tags",), "state": ("verdict", "severity", "state", "status")}
OF_HOSTS = {  # words of every list, that are told by the host of a row
    "site": lambda state: (state.site or "").lower(), "cluster": cluster_of}
KNOWN_WORDS = {*OF_HOSTS, *WORDS, *(word for listed in RESOURCES.values() for word in (*listed.words, *listed.columns))}


class Term(NamedTuple):
    """One word of a search. `operator`: ':', '<', '>', or '' for a word that may stand anywhere."""

    wanted: bool
    field: str
    operator: str
    value: str


def parse_terms(text: str) -> list[Term]:
    """What was typed; a quote that is not closed yet is no mistake."""
    words = re.findall(r'(?:[^\s"]|"[^"]*"?)+', text[:500])
    return [term for word in words if (term := parse_term(word.replace('"', "").lower())).value]


def parse_term(word: str) -> Term:
    wanted = not (word.startswith("-") and len(word) > 1)
    bare = word if wanted else word[1:]
    for operator in ":<>":
        field, _, value = bare.partition(operator)
        fits = value if operator == ":" else MEASURE.fullmatch(value)
        if field in KNOWN_WORDS and fits:
            return Term(wanted, field, operator, value)
    return Term(wanted, "", "", bare)


def find_rows(call: Call, resource: Resource, rows: Iterable[Row], terms: list[Term]) -> Iterator[Row]:
    """The rows for which every term holds."""
    words = [term for term in terms if term.operator == ""]
    fields = [term for term in terms if term.operator]
    for row in rows:
        texts = row_text(row) if words else ""
        if all((term.value in texts) == term.wanted for term in words) and all(
                term_holds(call, resource, term, row) == term.wanted for term in fields):
            yield row


def term_holds(call: Call, resource: Resource, term: Term, row: Row) -> bool:
    """Whether a term with a field holds; words that may stand anywhere find_rows looks for."""
    host = call.fleet.names.get((row.get("host") or row.get("name") or "").lower())
    if term.field in OF_HOSTS:
        place, _, name = (row.get("object") or "").lower().partition("/")  # of what a cluster or a site shares
        shared = name.partition("/")[0] if place == f"{term.field}s" else ""
        return term.value in (OF_HOSTS[term.field](host) if host else shared)
    if term.field == "tag" and host and term.value in (tag.lower() for tag in host.tags):
        return True
    columns = [column for column in resource.words.get(term.field) or WORDS.get(term.field) or (term.field,)
               if column in row]
    if term.operator == ":":
        return any(field_holds(row[column], column, term.value) for column in columns)
    return number_holds(term, row, columns, call.now)


def field_holds(value: Any, column: str, wanted: str) -> bool:
    """Tags and vmids as a whole, states from their beginning, other texts anywhere."""
    found = to_cell(value).lower()
    if isinstance(value, bool):
        return wanted in (("yes", "true") if value else ("no", "none", "false"))
    if column in ("tags", "vmid"):
        return wanted in re.split("[;, ]+", found)
    return found.startswith(wanted) if column in WORDS["state"] else wanted in found


MEASURE = re.compile(r"(-?\d{1,15}(?:\.\d{1,9})?)(%|s|min|h|d|w)?", re.ASCII)
UNITS = {"%": 0.01, "s": 1, "min": MINUTE, "h": HOUR, "d": DAY, "w": 7 * DAY}


def number_holds(term: Term, row: Row, columns: list[str], now: float) -> bool:
    """A comparison; of a time its age counts. What is not known is neither more nor less, but what has no backup has
    had none for any time."""
    if term.field == "backup" and columns and row[columns[0]] in ("none yet", "in no job"):
        return term.operator == ">"
    column = next((column for column in columns if is_number(row[column])), None)
    measure = MEASURE.fullmatch(term.value)
    if column is None or measure is None:
        return False
    value = now - row[column] if is_time(column) else row[column]
    unit = UNITS[measure[2]] if measure[2] else 0.01 if column.endswith("_ratio") else 1
    limit = float(measure[1]) * (1 if unit == 0.01 and not column.endswith("_ratio") else unit)
    return value > limit if term.operator == ">" else value < limit


def row_text(row: Row) -> str:
    """A row's texts and its vmid, in which a word may stand anywhere."""
    texts = [value if type(value) is str else to_cell(value) for value in row.values() if type(value) in TEXTS]
    if "vmid" in row:
        texts.append(to_cell(row["vmid"]))
    return " ".join(texts).lower()


TEXTS = {str, list}


def sort_rows(rows: Rows, by: str) -> Rows:
    """By one column, '-' in front for downwards, verdicts worst first; what is not known comes last."""
    column = by.removeprefix("-")
    known = [row for row in rows if row[column] is not None]
    known.sort(key=lambda row: sort_key(column, row[column]), reverse=by.startswith("-"))
    return known + [row for row in rows if row[column] is None]


def sort_key(column: str, value: Any) -> tuple[int, float, str]:
    """Numbers before texts: two hosts may send one field as different types."""
    if column in ("verdict", "severity"):
        return 0, verdict_rank(value), ""
    return (0, value, "") if isinstance(value, (int, float)) else (1, 0, to_cell(value).lower())


def verdict_rank(word: Any) -> int:
    return VERDICTS.index(word) if word in VERDICTS else len(VERDICTS)


def to_cell(value: Any) -> str:
    """A value as text; what is not known is empty."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ";".join(to_cell(one) for one in value)
    return json.dumps(value) if isinstance(value, dict) else str(value)


def to_csv(rows: list[Fields], columns: tuple[str, ...]) -> str:
    """CSV by RFC 4180. A text that a spreadsheet would run as a formula gets an apostrophe in front."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(columns)
    for row in rows:
        cells = [to_cell(row[column]) for column in columns]
        writer.writerow(["'" + cell if cell[:1] in FORMULA and not is_number(row[column]) else cell
                         for cell, column in zip(cells, columns, strict=True)])
    return out.getvalue()


FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # what a spreadsheet may take for one, in full width too (OWASP, CSV Injection)


def to_text(rows: list[Fields], columns: tuple[str, ...]) -> str:
    """Aligned columns for a terminal; columns without any value are left out, control characters replaced."""
    shown = [column for column in columns if any(row[column] not in (None, "", []) for row in rows)] or list(columns)
    lines = [[column.upper() for column in shown]]
    lines += [[printable(to_text_cell(column, row[column])) for column in shown] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n"
                   for line in lines)


def to_text_cell(column: str, value: Any) -> str:
    if is_number(value) and is_time(column):
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(value)) if 0 <= value < 2e11 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else to_cell(value) or "-"


IS_UP = Metric("up", "Whether the host reports.", lambda row: row["verdict"] not in ("offline", "stale", "unknown"))


def render_metrics(monitor: Monitor, now: float) -> Iterator[str]:
    """Prometheus text; a value that is not known has no line."""
    fleet = monitor.fleet
    yield from object_metrics("proxmon_host", count_alerts(fleet.hosts.values()), {
        "host": "host", "severity": "severity"}, (Metric("alerts", "Alerts that fire."),))
    yield from object_metrics("proxmon_shared", count_alerts([fleet.shared]), {
        "object": "place", "severity": "severity"}, (Metric("alerts", "Alerts of clusters and sites that fire."),))
    measured = [resource for resource in RESOURCES.values() if resource.metrics]
    families: Families = {}
    for states in ([], *([state] for state in fleet.sorted(now))):  # by host: what it sent is read again once
        for resource in measured:
            rows, _ = rows_of_hosts(resource, fleet, states, now)
            if resource.name == "hosts":
                add_samples(families, "proxmon_host", rows, {"host": "name", "site": "site"}, (IS_UP,))
            add_samples(families, f"proxmon_{resource.one}", rows, resource.labels, resource.metrics)
    yield from write_families(families)
    yield from object_metrics("proxmon", [{"reports_total": monitor.reports_accepted}], {}, (
        Metric("reports_total", "Reports taken since the server started."),), kind="counter")


def count_alerts(owners: Iterable[Any]) -> Iterator[Row]:
    """How many fire, by host or by what the fleet shares (clusters/NAME, sites/NAME), critical ones and warnings."""
    for owner in owners:
        firing = [alert for alert in owner.alerts.values() if alert.state == "firing"]
        places = {"/".join(alert.object.split("/")[:2]) for alert in firing} if owner.name is None else {None}
        for place in sorted(places, key=str):
            here = [alert.severity for alert in firing if place is None or f"{alert.object}/".startswith(f"{place}/")]
            for severity in ("critical", "warning"):
                yield {"host": owner.name, "place": place, "severity": severity, "alerts": here.count(severity)}


def object_metrics(prefix: str, rows: Iterable[Fields], labels: dict[str, str],
                   metrics: tuple[Metric, ...], *, kind: str = "gauge") -> Iterator[str]:
    """Metric families."""
    families: Families = {}
    add_samples(families, prefix, rows, labels, metrics)
    yield from write_families(families, kind=kind)


Families = dict[tuple[str, str], list[str]]  # by name and help: the lines, some at a time


def add_samples(families: Families, prefix: str, rows: Iterable[Fields], labels: dict[str, str],
                metrics: tuple[Metric, ...]) -> None:
    """Of rows with the same labels the first counts, as Prometheus wants it; the rows of a label are given at once."""
    by_labels: dict[str, Fields] = {}
    for row in rows:
        shown = ",".join([f'{label}="{escape_label(to_cell(row.get(key)))}"' for label, key in labels.items()])
        by_labels.setdefault(f"{{{shown}}}" if shown else "", row)
    for metric in metrics:
        name, of = f"{prefix}_{metric.name}", metric.value or itemgetter(metric.name)
        values = [(shown, of(row)) for shown, row in by_labels.items()]
        families.setdefault((name, metric.help), []).append("".join([
            f"{name}{shown} {float(value)!r}\n" for shown, value in values
            if value is not None and (isinstance(value, bool) or is_number(value))]))


def write_families(families: Families, *, kind: str = "gauge") -> Iterator[str]:
    for name, help in list(families):
        yield f"# HELP {name} {help}\n# TYPE {name} {kind}\n"
        yield from families.pop((name, help))


def escape_label(text: str) -> str:
    if text.isascii() and not LABEL_SIGNS.search(text):
        return text
    clean = text.encode("utf-8", "replace").decode()
    return clean.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


LABEL_SIGNS = re.compile(r'[\\\n"]')


def build_openapi(public_url: str) -> Fields:
    """OpenAPI 3.1 of every route under /api/v1, from the same table that serves them."""
    paths: Fields = {}
    for one in ROUTES:
        if one.path.startswith("/api/v1/"):
            path = one.path.replace("<", "{").replace(">", "}")
            paths.setdefault(path, {})[one.method.lower()] = describe_route(one)
    problem = {"type": "object", "required": ["status", "title", "detail", "code"], "properties": {
        "status": {"type": "integer"}, "title": STRING, "detail": STRING, "code": {"enum": sorted(Problem.CODES)}}}
    return {"openapi": "3.1.0", "info": {"title": "proxmon", "version": VERSION}, "servers": [{"url": public_url}],
            "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
                           "schemas": {"Problem": problem}},
            "security": [{"token": []}], "paths": paths}


STRING = {"type": "string"}
PROBLEM_RESPONSE = {"description": "What went wrong", "content": {
    "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}


def describe_route(one: Route) -> Fields:
    signed = ("webhook-id", "webhook-timestamp", "webhook-signature") if one.auth == "host" else ()
    parameters = [{"name": name, "in": place, "required": place != "query", "schema": STRING}
                  for place, names in (("path", re.findall(r"<(\w+)>", one.path)), ("query", one.queries),
                                       ("header", signed)) for name in names]
    content: Fields = {"application/json": {"schema": {"type": "object"}}}
    if one.resource:
        row = {"type": "object", "properties": {column: {} for column in one.resource.columns}}
        listing = {"type": "object", "properties": {
            "items": {"type": "array", "items": row}, "failed": {"type": "array", "items": STRING},
            **{key: {"type": "integer"} for key in ("total", "limit", "offset")}}}
        content = {"application/json": {"schema": listing}, "text/csv": {}, "text/plain": {}}
    status = "204" if one.method == "DELETE" else "201" if one.makes else "200"
    answer = {"description": "Done"} if status == "204" else {"description": one.summary, "content": content}
    responses = {status: answer, "default": PROBLEM_RESPONSE}
    described = {"summary": one.summary, "parameters": parameters, "responses": responses}
    if one.method in ("POST", "PATCH"):
        described["requestBody"] = {"required": bool(signed), "content": {
            "application/json": {} if signed else {"schema": {"type": "object"}}}}
    return {**described, "security": []} if signed else described


# --- cards: one host, guest, pool, disk, storage or cluster, opened: what it stands on, and what depends on it ---

CARD_EVENTS = 50  # of the last 30 days, the newest
BEFORE_SHOWN = 8  # of what happened before an alert
# What says that something was done or has happened to a host, not that somebody was told of it.
CHANGES = ("task", "reboot", "update", "scrub", "guest", "config", "host-", "token-")


def open_card(call: Call) -> Row | None:
    """What the address names, with all that its card shows; `kind` is host, guest, pool, disk, storage, cluster, or
    missing for what is not there (any more). None: nothing is opened."""
    query = call.query
    if query.get("cluster"):
        return cluster_card(call, query["cluster"])
    if not query.get("host"):
        return None
    try:
        state = call.fleet.find(query["host"])
    except Problem:
        return missing_card(f"There is no host “{query['host']}”; it may have been renamed or removed.")
    for kind, make in (("guest", guest_card), ("disk", disk_card), ("pool", pool_card), ("storage", storage_card)):
        if query.get(kind):
            name = query[kind]
            found = make(call, state, name) or missing_card(
                f"{state.name} reports no {kind} “{name}” now. What was known of it is in the history.")
            return {**found, "key": f"{state.name}/{kind}/{name}", "host": host_facts(call, state)}
    return host_card(call, state)


def missing_card(sentence: str) -> Row:
    return {"kind": "missing", "key": sentence, "title": "Not found", "verdict": "unknown", "sentences": [sentence],
            "alerts": [], "watching": [], "host": None}


def host_facts(call: Call, state: HostState) -> Row:
    """What any card of a host or of one of its objects shows of the host."""
    sections = {
        name: {"body": latest.body, "time": latest.time, "received_at": latest.stamp.received_at,
               "stale": is_stale(state, name, call.now)}
        for name, latest in state.sections.items() if latest.stamp is not None}
    return {
        "row": host_row(call.fleet, state, call.now), "sections": sections,
        "absent": [name for name, latest in state.sections.items() if latest.absent],
        "errors": {name: latest.error for name, latest in state.sections.items() if latest.error},
        **{name: card_rows(call, state, name) for name in ("pools", "guests", "storages", "backups", "disks")},
    }


def card_rows(call: Call, state: HostState, name: str) -> Rows:
    """A list's rows of one host, worst first."""
    rows, _ = rows_of_hosts(RESOURCES[name], call.fleet, [state], call.now)
    return sorted(rows, key=lambda row: verdict_rank(row["verdict"]))


def card_alerts(call: Call, owner: Any, *objects: str, state: str = "firing") -> Rows:
    """The open alerts of an owner, or of some of its objects; those that follow from another are its `children`."""
    rows = [row for row in open_alerts([owner], state)
            if not objects or is_of_object(row["object"] or "", objects)]
    for row in rows:
        radius = blast_radius(owner, row["object"] or "") if isinstance(owner, HostState) else None
        row.update(silence=silence_of(call, owner, row), site=getattr(owner, "site", None),
                   tags=getattr(owner, "tags", []), blast=radius and radius["sentence"], children=[],
                   todo=todo_of(owner, row["rule"], row["object"]), before=changes_before(call, owner, row))
    shown = {row["id"]: row for row in rows}
    tops: Rows = []
    for row in rows:
        cause = root_cause(row, shown)
        (tops if cause is row else cause["children"]).append(row)
    return tops


def is_of_object(object: str, names: Iterable[str]) -> bool:
    return any(object == name or object.startswith(name + "/") for name in names)


def changes_before(call: Call, owner: AlertOwner, alert: Row) -> Rows:
    """What changed on its host and cluster in the hour before: the first place to look for a cause."""
    state = owner if isinstance(owner, HostState) else None
    return [event for event in events_before(call, alert, state)
            if event["kind"].startswith((*CHANGES, "alert-firing"))][:BEFORE_SHOWN]


def card_events(call: Call, host: str | None, *objects: str) -> Rows:
    """The newest events of a host, or of some of its objects."""
    events = each_event(call.db, since=call.now - 30 * DAY, host=host) if host else each_event(
        call.db, since=call.now - 30 * DAY)
    return list(islice((event for event in events
                        if not objects or is_of_object(event["object"] or "", objects)), CARD_EVENTS))


def silence_of(call: Call, state: Any, alert: Fields) -> Fields | None:
    """The silence that covers an alert; of several the one that ends last."""
    known = state.alerts.get((alert.get("rule"), alert["object"] or ""))
    covering = [one for one in call.fleet.silences
                if known is not None and one["until"] > call.now and silence_fits(one, call.fleet, state, known)]
    return max(covering, key=lambda one: one["until"], default=None)


def root_cause(problem: Fields, shown: dict[Any, Fields]) -> Fields:
    """The alert at the top of the chain of causes, as far as that is shown; the alert itself if it has none, or if
    the chain is a circle."""
    top, passed = problem, {problem["id"]}
    while (cause := top["because_of"]) in shown:
        if cause in passed:
            return problem
        passed.add(cause)
        top = shown[cause]
    return top


def proxmox_url(address: str | None, guest: Row | None = None) -> str | None:
    """Proxmox's own page of a host, or of a guest there (as its address bar has it: #v1:0:=qemu%2F100); None without an
    address that can be one."""
    try:
        found = ipaddress.ip_address(address or "")
    except ValueError:
        return None
    place = f"#v1:0:={guest['type']}%2F{guest['vmid']}" if guest and guest["type"] in ("qemu", "lxc") else ""
    return f"https://{f'[{found}]' if found.version == 6 else found}:8006/{place}"


def alert_url(alert: Fields, url: Callable[..., str]) -> str:
    """The link to what an alert is about: the card of its guest, pool, disk or cluster, else its section of the
    host's card."""
    kind, _, rest = (alert["object"] or "").partition("/")
    name = rest.partition("/")[0]
    if kind == "clusters":
        return url(host=None, cluster=name)
    if not alert["host"]:
        return url(tab="alerts", q=None, host=None)
    if name and kind in ("guests", "pools", "disks", "storages") and not alert.get("rule", "").startswith("backup-job"):
        return url(host=alert["host"], **{kind[:-1]: name})
    section = next((id for id, _, parts in STRIP if kind in parts), "host-alerts")
    return url(host=alert["host"]) + f"#{section}"


def object_url(url: Callable[..., str], list: str, row: Row) -> str:
    """The card that a row of a list belongs to."""
    host = row.get("host")
    if list in ("alerts", "events"):
        return alert_url(row, url)
    for kind, field in (("guest", "vmid"), ("disk", "serial"), ("disk", "disk")):
        if row.get(field) is not None:
            return url(host=host, **{kind: row[field]})
    if list in ("disks", "storages"):
        return url(host=host, **{list[:-1]: row["name" if list == "disks" else "storage"]})
    return alert_url(row, url) if row.get("object") else url(host=host)


# The host: its sections in the order of the card, and what of an alert's object belongs to each.
STRIP = (
    ("node", "Node", ("node", "clock", "kernel", "memory", "root")), ("pools", "Pools", ("pools", "pool_states")),
    ("guests", "Guests", ("guests",)), ("storages", "Storages", ("storages",)), ("disks", "Disks", ("disks",)),
    ("cluster", "Cluster", ("cluster",)), ("backups", "Backups", ("backups",)),
    ("replication", "Replication", ("replication",)), ("ha", "HA", ("ha",)),
    ("datasets", "Datasets", ("datasets",)), ("snapshots", "Snapshots", ("snapshots",)),
    ("services", "Services", ("services", "time_sync", "failed_units", "units")),
    ("upkeep", "Upkeep", ("updates", "versions", "subscription", "certificates")), ("tasks", "Tasks", ("tasks",)),
    ("ceph", "Ceph", ("ceph",)), ("timeline", "Timeline", ()), ("freshness", "Freshness", ("sections",)))


def host_card(call: Call, state: HostState) -> Row:
    facts = host_facts(call, state)
    alerts = card_alerts(call, state)
    return {
        "kind": "host", "key": state.name, "title": state.name, "verdict": facts["row"]["verdict"], "host": facts,
        "sentences": host_sentences(facts), "alerts": alerts, "watching": open_alerts([state], "pending"),
        "missing_reports": missing_reports(call.db, state.id), "events": card_events(call, state.name),
        "strip": host_strip(facts, open_alerts([state]))}


def host_sentences(facts: Row) -> list[str]:
    """The verdict, and what one asks of a host first, in words."""
    row = facts["row"]
    told = [row["reason"] or "No problem found."]
    if row["guests_total"] is not None:
        told.append(f"{row['guests_running']} of {row['guests_total']} guests run.")
    if row["backups_state"]:
        told.append(f"Backups: {row['backups_state']}.")
    weak = [pool for pool in facts["pools"] if pool["suspects"] or (number(pool, "redundancy_margin") or 1) < 1]
    told += [f"{pool['name']}: {may_fail(max(-1, int(pool['margin_with_suspects'])))}." for pool in weak
             if number(pool, "margin_with_suspects") is not None]
    return told


def host_strip(facts: Row, alerts: Rows) -> Rows:
    """The card's sections: {id, title, count, verdict}; a section that the host does not have is left out."""
    strip = []
    for id, title, parts in STRIP:
        present = [part for part in parts if part in facts["sections"] or part in facts["errors"]]
        if not present and id not in ("node", "timeline", "freshness"):
            continue
        own = [alert["severity"] for alert in alerts if belongs_to(alert, id, parts)]
        rows = facts.get(id)
        verdict = min(own, key=verdict_rank, default="ok")
        if verdict == "ok" and any(part in facts["errors"] or facts["sections"][part]["stale"] for part in present):
            verdict = "stale"
        if verdict == "ok" and rows:
            verdict = min((row["verdict"] for row in rows), key=verdict_rank)
        body = facts["sections"].get(id, {}).get("body")
        count = len(rows) if rows is not None else len(body) if isinstance(body, list) else None
        strip.append({"id": id, "title": title, "count": count, "verdict": verdict})
    return strip


def belongs_to(alert: Row, id: str, parts: tuple[str, ...]) -> bool:
    """Whether an alert is told in a section of the card; one of a late backup is told with the backups."""
    kind = (alert["object"] or "node").partition("/")[0]
    if alert["rule"].startswith("backup-"):
        return id == "backups"
    return kind in parts


# The guest: node, volumes → dataset → pool → disks, backups, snapshots, replication, copies.


def guest_card(call: Call, state: HostState, vmid: str) -> Row | None:
    guest = next((guest for guest in state.items("guests") if str(guest.get("vmid")) == vmid), None)
    row = first_of(card_rows(call, state, "guests"), vmid=guest["vmid"]) if guest else None
    if guest is None or row is None:
        return None
    index = call.fleet.copies or SnapshotIndex(call.fleet.hosts.values())
    copy = None if guest.get("template") else guest_copy(CopySources(state, index), guest, call.now)
    datasets = set(volumes_of(guest))
    return {
        **object_card(call, state, "guest", f"guests/{vmid}", row,
                      *(f"It {ground}." for ground in lives_on(guest, grounds(state))),
                      *([f"If {state.name} burned now: {copy['reason']}."] if copy else []),
                      title=row["name"] or vmid),
        "guest": guest,
        "volumes": [guest_volume(state, volume) for volume in dicts(guest.get("volumes"))],
        "unused": [{"name": text(volume, "name"), **guest_volume(state, volume)}
                   for volume in dicts(guest.get("unused"))],
        "backup": first_of(card_rows(call, state, "backups"), vmid=guest["vmid"]),
        "jobs": [job for job in state.items("backups.jobs") if names_guest(job, guest)],
        "snapshots": [series for series in series_rows(state, call.now) if series["dataset"] in datasets],
        "replication": [job for job in state.items("replication") if str(job.get("vmid")) == vmid],
        "tasks": newest_tasks(task for task in state.items("tasks") if str(task.get("vmid")) == vmid)}


def object_card(call: Call, owner: AlertOwner, kind: str, object: str, row: Row, *sentences: str, title: str) -> Row:
    """What the card of any object shows. `watching`: what is not well, but not for long enough to fire."""
    return {
        "kind": kind, "title": title, "verdict": row["verdict"], "row": row,
        "sentences": [row["reason"] or "No problem found.", *sentences], "alerts": card_alerts(call, owner, object),
        "watching": [alert for alert in open_alerts([owner], "pending")
                     if is_of_object(alert["object"] or "", [object])],
        "events": card_events(call, owner.name if isinstance(owner, HostState) else None, object)}


def guests_in(call: Call, state: HostState, pool: str) -> Rows:
    """The rows of the guests that lie in a pool."""
    here = {guest.get("vmid") for guest in guests_on(state, pool)}
    return [row for row in card_rows(call, state, "guests") if row["vmid"] in here]


def names_guest(job: Row, guest: Row) -> bool:
    """Whether a backup job names this guest; one of all guests may leave it out."""
    guests, vmid = job.get("guests"), guest.get("vmid")
    left_out = job.get("exclude")
    return vmid in guests if isinstance(guests, list) else guests == "all" and not (
        isinstance(left_out, list) and vmid in left_out)


def newest_tasks(tasks: Iterable[Row]) -> Rows:
    return sorted(tasks, key=lambda task: -(number(task, "ended_at") or 0))[:20]


def guest_volume(state: HostState, volume: Row) -> Row:
    """A guest's volume, with what its dataset takes and the disks that it lies on in the end."""
    name = text(volume, "dataset")
    dataset = first_of(state.items("datasets"), name=name) or {}
    pool = name.partition("/")[0] if name else None
    body = first_of(state.items("pools"), name=pool) or {}
    leaves = [leaf for leaf in walk_vdevs(dicts(body.get("vdevs"))) if not dicts(leaf.get("children"))]
    return {**pick(volume, ("storage", "dataset", "size_bytes")), "pool": pool,
            "used_bytes": number(dataset, "used_bytes"),
            "snapshots_bytes": number(dataset, "used_by_snapshots_bytes"),
            "disks": [str(leaf.get("disk") or leaf.get("name")) for leaf in leaves]}


# The pool: what each vdev may still lose, who lives on it, when it is full.


def pool_card(call: Call, state: HostState, name: str) -> Row | None:
    row = first_of(card_rows(call, state, "pools"), name=name)
    if row is None:
        return None
    object = f"pools/{name}"
    body = first_of(state.items("pools"), name=name) or {}
    radius = blast_radius(state, object)
    card = object_card(call, state, "pool", object, row, *([f"{capital(radius['sentence'])}."] if radius else []),
                       title=name)
    return {
        **card, "body": body, "filling": first_of(forecast_rows(state), object=object),
        "wins": winnings(state, name, call.now), "scrub": first_of(scrub_rows(state), pool=name),
        "margins": pool_margins(state, body), "guests": guests_in(call, state, name),
        "datasets": sorted((dataset for dataset in state.items("datasets")
                            if str(dataset.get("name")).partition("/")[0] == name),
                           key=lambda dataset: -(number(dataset, "used_bytes") or 0)),
        "storages": [storage for storage in card_rows(call, state, "storages")
                     if str(storage["dataset"]).partition("/")[0] == name],
        "scrubs": [event for event in card["events"] if event["kind"] == "scrub"]}


def capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


# The disk: which one to pull, and what happens if it is the wrong one.


def disk_card(call: Call, state: HostState, name: str) -> Row | None:
    """A disk by serial, by-id, wwn or kernel name; or what is left of it in a pool by the name it has there."""
    disk = next((disk for field in ("serial", "by_id", "wwn", "name") for disk in state.items("disks")
                 if disk.get(field) and str(disk[field]) == name), None)
    own, place = disk or {}, place_of(state, disk.get("name") if disk else name)
    if place and dicts(place.member.get("children")):
        place = None  # a group of disks is none
    if disk is None and place is None:
        return None
    row = first_of(card_rows(call, state, "disks"), name=own.get("name")) or {}
    leaf = place.member if place else {}
    margin = vdev_margin(state, place)
    verdict = row.get("verdict") or ("ok" if text(leaf, "state") == "ONLINE" else "critical")
    why = suspicions(own, leaf)
    verdict = "info" if verdict == "ok" and why else verdict
    reason = row.get("reason") or "; ".join(why) if disk else (
        "The host does not see this disk: it is missing, or its connection is.")
    card = object_card(call, state, "disk", f"disks/{own.get('name') or leaf.get('disk') or leaf.get('name')}",
                       {**row, "verdict": verdict, "reason": reason}, title=own.get("name") or name)
    return {**card, "row": row, "disk": own, "place": place, "margin": margin, "suspicions": why,
            "pulls": pull_sentences(place, margin), "guests": guests_in(call, state, place.pool) if place else []}


def vdev_margin(state: HostState, place: Place | None) -> VdevMargin | None:
    pool = first_of(state.items("pools"), name=place.pool) if place else None
    return next((margin for margin in (pool_margins(state, pool) if pool else ())
                 if place and margin.vdev == str(place.vdev.get("name"))), None)


def pull_sentences(place: Place | None, margin: VdevMargin | None) -> Rows:
    """What pulling this disk, and what pulling a wrong one, would do: {verdict, text}."""
    if place is None:
        return [{"verdict": "unknown",
                 "text": "It is in no pool that is imported here; whether anything else uses it is not known."}]
    kind = text(place.vdev, "class")
    if margin is None:
        return [{"verdict": "info" if kind in ("log", "cache", "spare") else "unknown", "text":
                 f"It is a {kind} device: no data are lost without it." if kind in ("log", "cache", "spare")
                 else "How many disks the vdev may lose is not known."}]
    counts = text(place.member, "state") == "ONLINE"
    own = margin.margin - counts
    told = [{"verdict": "critical" if own < 0 else "ok", "text":
             f"Pulling this one{'' if counts else ' changes nothing, it no longer counts'}: {may_fail(own)}."}]
    told.append({"verdict": "critical" if margin.margin < 1 else "warning", "text":
                 f"Pulling another disk of {margin.vdev} by mistake: {may_fail(margin.margin - 1)}."})
    others = [str(leaf.get("disk") or leaf.get("name")) for leaf, _, _ in margin.suspects if leaf is not place.member]
    if others:
        told.append({"verdict": "warning", "text": f"{', '.join(others)} in the same vdev may fail next."})
    return told


# The storage: what lies on it, what is backed up to it, and what it stands on itself.


def storage_card(call: Call, state: HostState, name: str) -> Row | None:
    row = first_of(card_rows(call, state, "storages"), storage=name)
    if row is None:
        return None
    object = f"storages/{name}"
    radius = blast_radius(state, object) or {}
    others = [call.fleet.hosts[id] for _, ids in list_clusters(call.fleet, call.now) if state.id in ids
              for id in ids if row["shared"] and id != state.id]
    stored = {guest.get("vmid") for guest in state.items("guests")
              if first_of(dicts(guest.get("volumes")), storage=name)}
    return {
        **object_card(call, state, "storage", object, row,
                      *([f"{capital(radius['sentence'])}."] if radius.get("sentence") else []), title=name),
        "filling": first_of(forecast_rows(state), object=object),
        "pool": first_of(card_rows(call, state, "pools"), name=str(row["dataset"] or "").partition("/")[0]),
        "guests": [guest for guest in card_rows(call, state, "guests") if guest["vmid"] in stored],
        "backups": [backup for backup in card_rows(call, state, "backups") if backup["storage"] == name],
        "jobs": [job for job in state.items("backups.jobs") if job.get("storage") == name],
        "elsewhere": [other for host in others for other in storage_rows(host, call.now, call.fleet)
                      if other["storage"] == name]}


# The cluster: quorum as each node sees it, HA, replication, Ceph.


def cluster_card(call: Call, name: str) -> Row:
    found = next(((cluster, ids) for cluster, ids in list_clusters(call.fleet, call.now)
                  if cluster.name.lower() == name.lower()), None)
    if found is None:
        return missing_card(f"No host reports a cluster “{name}” now.")
    cluster, ids = found
    states = [call.fleet.hosts[id] for id in ids]
    object = f"clusters/{cluster.name}"
    rows = [host_row(call.fleet, state, call.now) for state in states]
    views = {view.host.name: view for view in cluster.views}
    quorate = [view.quorate for view in cluster.views]
    card = object_card(call, call.fleet.shared, "cluster", object, {"verdict": "ok", "reason": ""}, title=cluster.name)
    worst = min([alert["severity"] for alert in card["alerts"]], key=verdict_rank,
                default="ok" if quorate else "unknown")
    with_quorum = sum(word is True for word in quorate)
    return {
        **card, "key": object, "verdict": worst, "host": None, "nodes": rows, "views": views,
        "sentences": [*[alert["message"] for alert in card["alerts"][:1]],
                      f"{with_quorum} of {len(states)} monitored nodes say that the cluster is quorate."],
        "services": [(state.name, service) for state in states
                     for service in state.items("ha.services")
                     if service.get("node") in (text(state.body("node"), "name") or state.name, None)],
        "replication": [{"host": state.name, **job} for state in states for job in state.items("replication")],
        "ceph": [(state.name, state.body("ceph")) for state in states if isinstance(state.body("ceph"), dict)]}


# --- problems: one cause is one line, the worst consequence first, with the next step ---

# What a problem means for whoever owns the data, the worst first, and the rules that say so; all others are upkeep.
CONSEQUENCES = (
    ("Data is at risk now.", "pool-data-errors pool-vanished cluster-quorum"),
    ("Redundancy is gone.", "pool-state pool-margin pool-spare suspects-hold-pool vdev-errors smart-failed smart-growth"
                            " selftest-failed disk-gone ceph cluster-ceph"),
    ("Hosts or guests are down, or stop soon.",
     "host-offline site-offline guest-down guest-hangs ha-service ha-node pool-readonly pool-unanswered pool-capacity"
     " root-full storage-full storage-inactive guest-disk-full oom"),
    ("A promise is not kept.",
     "backup-overdue backup-failed backup-job backup-missing backup-excludes replication copy-missing snapshot-age"
     " snapshot-gone scrub-age scrub-result scrub-stuck blind-spot"),
    ("It ages.", ""),
)
RANKS = {rule: rank for rank, (_, rules) in enumerate(CONSEQUENCES) for rule in rules.split()}
UPKEEP = len(CONSEQUENCES) - 1


def consequence(problem: Row) -> int:
    """The place in CONSEQUENCES. A pool that does not answer is worse than one that lacks a disk."""
    rule = problem.get("rule") or ""
    if rule == "pool-state" and re.match(r"Pool .+? is (SUSPENDED|UNAVAIL|FAULTED)\b", problem.get("message") or ""):
        return 0
    return RANKS.get(rule, UPKEEP)


def problem_order(problem: Row) -> tuple[Any, ...]:
    return (SEVERITIES.index(problem["severity"]), consequence(problem), -(problem.get("since") or 0), problem["id"])


ALIKE = 3  # so many problems of one host by one rule become one line
EVERYWHERE = 5  # and those of one rule on so many hosts


def thing_of(problem: Row, state: HostState | None) -> tuple[Any, ...]:
    """What a problem is about as one can touch it: a disk is its pool's, and by its serial the same under any name."""
    host, (kind, _, name) = problem["host"], (problem["object"] or "").partition("/")
    if state is None or not name:
        return host, kind, name, problem["id"]
    if kind == "pools":
        return host, kind, name.partition("/")[0]
    if kind != "disks":
        return host, kind, name
    if place := place_of(state, name):
        return host, "pools", place.pool
    disk = first_of(state.items("disks"), name=name) or {}
    return host, kind, text(disk, "serial") or name


def fold_problems(tops: Rows, things: dict[Any, tuple[Any, ...]]) -> Rows:
    """One line for all of one thing, then for many of one host and rule, then for one rule on many hosts. `alike` are
    the ids of all that a line stands for; `fold` says why: '', thing, rule or fleet."""
    def seen(problem: Row) -> bool:
        return bool(problem.get("acknowledged"))

    rows: Rows = [{**problem, "alike": [problem["id"]], "fold": ""} for problem in sorted(tops, key=problem_order)]
    rows = fold_by(rows, "thing", 2, lambda row: (things[row["id"]], seen(row)))
    rows = fold_by(rows, "rule", ALIKE,
                   lambda row: (row["host"], row.get("rule"), seen(row), row["fold"] and row["id"]))
    return fold_by(rows, "fleet", EVERYWHERE,
                   lambda row: (row.get("rule"), seen(row), (row["fold"] or not row["host"]) and row["id"]))


def fold_by(rows: Rows, fold: str, least: int, key: Callable[[Row], Any]) -> Rows:
    """Rows of the same key, when they are at least so many, folded into the first of them."""
    groups: dict[Any, Rows] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    folded: Rows = []
    for group in groups.values():
        if len(group) < least:
            folded += group
            continue
        first, *others = group
        rest = [problem for row in others for problem in (row, *row["children"])]
        folded.append({**first, "fold": fold, "hosts": len({row["host"] for row in group}),
                       "alike": [number for row in group for number in row["alike"]],
                       "children": [*first["children"], *rest]})
    return sorted(folded, key=problem_order)


def describe_problem(problem: Row, state: HostState | None) -> Row:
    """What a line adds to its alert: what hangs on it, what it means, and what to type."""
    told = at_stake(state, problem["object"])
    if told:  # the message of a pool says itself how many may fail
        told = "; ".join(part for part in told.split("; ") if part not in problem["message"]) or None
    if state and problem.get("rule") == "host-offline":
        told = f"{state.guest_counts[0]} guests ran on it" if state.guest_counts[0] else None
    return {**problem, "hit": told, "means": CONSEQUENCES[consequence(problem)][0],
            "commands": commands_for(problem, state) if state else []}


def commands_for(problem: Row, state: HostState) -> list[str]:
    """What to type on the host, with names filled in; not with such as a shell or a reader could mistake."""
    kind, _, name = (problem["object"] or "").partition("/")
    if not (name.isascii() and name.isprintable()):
        return []
    quoted = shlex.quote(name)
    if kind == "pools":
        pool = shlex.quote(name.partition("/")[0])
        scrub = [f"zpool scrub {pool}"] if (problem.get("rule") or "").startswith("scrub-") else []
        return [f"zpool status -v {pool}", *scrub]
    if kind == "disks":
        return disk_commands(state, name)
    if kind == "guests":
        guest = next((guest for guest in state.items("guests") if str(guest.get("vmid")) == name), {})
        tool = "pct" if guest.get("type") == "lxc" else "qm"
        start = [f"{tool} start {quoted}"] if problem.get("rule") == "guest-down" else []
        return [f"{tool} status {quoted} --verbose", *start]
    if kind == "storages":
        return [f"pvesm status --storage {quoted}"]
    return [f"systemctl status {quoted}", f"journalctl -u {quoted}"] if kind in ("services", "units") else []


def disk_commands(state: HostState, name: str) -> list[str]:
    """Look at the disk, and replace it in its pool."""
    found = [f"smartctl -a /dev/{shlex.quote(name)}"]
    for pool in state.items("pools"):
        for leaf in walk_vdevs(pool.get("vdevs")):
            if text(leaf, "disk") == name and str(leaf.get("name")).isprintable():
                old, into = shlex.quote(str(leaf.get("name"))), shlex.quote(str(pool.get("name")))
                found.append(f"zpool replace {into} {old} /dev/disk/by-id/NEW")
    return found


# --- page: the one page, its fragment, log-in and log-out ---

STATIC_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
PAGE_LIMIT, PROBLEMS_ABOVE, PROBLEMS_SHOWN = 100, 7, 50

TABS = {name: resource for name, resource in RESOURCES.items() if resource.heads}

# What a guest, pool, vdev or alert calls its own state -> the verdict whose shape and colour it is shown with.
STATE_LOOKS = {
    **dict.fromkeys(("running", "online", "avail", "active", "passed"), "ok"),
    **dict.fromkeys(("degraded", "faulted", "unavail", "removed", "suspended", "io-error", "internal-error", "failed",
                     "inactive", "error"), "critical"),
    **dict.fromkeys(("inuse", "paused"), "warning"),
    **dict.fromkeys(("prelaunch", "suspending", "pending"), "info"),
    **dict.fromkeys(("disabled", "stopped", "off", "absent", "resolved"), "off"),
}


@route("GET", "/", auth="page")
def get_page(call: Call) -> Any:
    """The page: posture, problems, lists, and one host opened."""
    return page_answer(call, managing=False)


@route("GET", "/admin/hosts", auth="page")
def get_host_administration(call: Call) -> Any:
    """The page, opened at host administration; for others than admins the page as it is."""
    if not call.admin:
        return Answer(303, b"", {"Location": "/"})
    return page_answer(call, managing=True)


def page_answer(call: Call, *, managing: bool) -> Answer:
    """The whole document, or for the script's polls what is in its <main> alone, and of that only what has changed.
    Times are absolute there, so that a state of the fleet is the same bytes whenever it is asked for."""
    fragment = call.header("x-fragment") == "main"
    page = build_page(call, managing=managing, fragment=fragment)
    document = "kiosk.html" if page["view"] == "kiosk" else "page.html"
    body = render("main.html" if fragment else document, page=page, **PAGE_FUNCTIONS)
    return changed_pieces(call, body) if fragment else html(body)


# A row of any table, and a line of the problems: what a poll leaves out when the browser has it already.
PIECE = re.compile(rb'<(tr)(?: class="[^"]*")? data-key="([^"]*)"[^>]*>.*?</tr>'
                   rb'|<(li) class="problem" data-key="([^"]*)">.*?<!--end-->', re.S)
FRAGMENTS_KEPT = 200


def changed_pieces(call: Call, body: bytes) -> Answer:
    """A fragment in which the rows that are as in the fragment named by X-Base stand as empty marks with their keys:
    the script leaves them as they are."""
    kept = call.monitor.fragments
    tag = body_etag(body)
    pieces: dict[bytes, int] = {}
    for piece in PIECE.finditer(body):
        key = piece[2] or piece[4]
        pieces[key] = 0 if key in pieces else hash(piece[0])  # two of one key cannot be told apart
    while len(kept) >= FRAGMENTS_KEPT:
        kept.pop(next(iter(kept)), None)
    base, kept[tag] = kept.get(call.header("x-base"), {}), pieces

    def mark(piece: re.Match[bytes]) -> bytes:
        key, name = piece[2] or piece[4], piece[1] or piece[3]
        same = pieces[key] and pieces[key] == base.get(key)
        return b'<%b data-key="%b" data-same></%b>' % (name, key, name) if same else piece[0]

    return html(PIECE.sub(mark, body), headers={"ETag": tag})


def build_page(call: Call, *, managing: bool, fragment: bool) -> Fields:
    """All that the templates are given."""
    query, terms = call.query, parse_terms(call.query.get("q", ""))
    view = "problems" if query.get("tab") == "problems" else "list"
    hits = find_all(call, terms) if terms else {}
    counts, found = count_tabs(call, terms, hits)
    resource = TABS.get(query.get("tab", ""), TABS[found if view == "list" else "hosts"])
    tab = resource.name
    if not terms and "tab" not in query:
        view = "kiosk" if "kiosk" in query else "home"
    everything, failed = tab_rows(call, resource)
    matching = hits[tab] if tab in hits else list(find_rows(call, resource, everything, terms))
    rows = order_rows(resource, matching, query.get("sort", ""))
    chip = "kind" if tab == "events" else "state"
    of_any_state = [term for term in terms if term.field != chip]
    in_any_state = rows if of_any_state == terms else find_rows(call, resource, everything, of_any_state)
    offset = page_offset(query.get("offset", ""), len(rows))
    overview, alerts = build_overview(call.fleet, call.now), open_alerts(call.fleet.everything())
    posture, sentence = describe_posture(overview, alerts)
    shown = rows[offset : offset + PAGE_LIMIT]
    if tab == "hosts":
        shown = add_sparks(call, shown)
    problems = [alert for alert in alerts if alert["severity"] != "info"]  # the tab has those as well
    unseen = sum(not alert["acknowledged"] for alert in problems)
    card, heads = open_card(call), list_heads(resource, query.get("cols", ""))
    looked = note_look(call) if call.kind == "session" else 0.0
    return {
        "version": VERSION, "now": call.now, "fragment": fragment, "admin": call.admin, "role": call.role,
        "user": call.actor, "kiosk": call.kind == "kiosk",
        "csrf": csrf_token(call.monitor.secret, call.cookie), "title": f"({unseen}) proxmon" if unseen else "proxmon",
        "url": page_url(query), "level": partial(level_of, call.fleet), "tabs": TABS, "tab": tab, "failed": failed,
        "heads": heads, "every": resource.every(), "cols": ",".join(resource.chosen(query.get("cols", ""))),
        "q": query.get("q", "").strip(), "sort": query.get("sort", ""),
        "offset": offset, "limit": PAGE_LIMIT, "total": len(rows), "rows": shown,
        "chip": chip, "states": count_states(chip, in_any_state),
        "counts": {**counts, tab: len(rows)}, "csv": csv_url(resource, query),
        "overview": overview, "posture": posture, "sentence": sentence,
        "problems": group_problems(call, find_rows(call, TABS["alerts"], problems, terms), PROBLEMS_SHOWN),
        "view": view, "lines": PROBLEMS_SHOWN if view == "problems" else 0 if "tab" in query else PROBLEMS_ABOVE,
        "tiles": fleet_tiles(everything) if view in ("home", "problems", "kiosk") else [],
        "about": about_answer(resource, rows),
        "not_words": not_words(query.get("q", ""), resource) if view == "list" else [],
        "facets": facets(tab, everything, rows, call.now), "night": last_night(call.now) if tab == "events" else None,
        "span": [unix_time(query.get(name, "")) for name in ("since", "until")] if tab == "events" else [None, None],
        "looked": looked, "news": find_news(call, looked) if tab != "events" else None,
        "next_due": None if unseen else find_next_due(call),
        "card": card, "host": card and card["host"],
        "admin_hosts": tab_rows(call, TABS["hosts"])[0] if managing else None,
        "access": page_access(call) if managing else None,
        "channels": [channel_shown(row) for row in channel_rows(call.db, call.fleet)],
        "silences": active_silences(call.db, call.now),
        "install": install_commands(call.monitor.config, "pve-host-01"), "waiting": waiting_hosts(call),
    }


AWAY = 5 * MINUTE  # who had no page before him for so long looks anew, and what happened meanwhile is new to him


def note_look(call: Call) -> float:
    """When this user last looked before the present look, on whatever browser; 0 for the first look ever. Kept in the
    database every few minutes, and when a look begins."""
    looks, name = call.monitor.looks, call.actor or ""
    if name not in looks:
        seen, looked = json.loads(get_meta(call.db, f"looked/{name}") or "[0, 0]")
        looks[name] = seen, looked, 0.0
    seen, looked, kept = looks[name]
    if call.now - seen > AWAY:
        looked, kept = seen, 0.0
    if call.now - kept > AWAY / 2:
        kept, value = call.now, json.dumps([call.now, looked])
        with suppress(Problem):  # a full disk keeps nobody from looking
            call.monitor.store.write(lambda db: set_meta(db, f"looked/{name}", value), urgent=False)
    looks[name] = call.now, looked, kept
    return looked


def find_news(call: Call, looked: float) -> Row | None:
    """How much has happened since: {count, since}."""
    count = call.db.execute("SELECT count(*) FROM event WHERE at > :at", {"at": looked}).fetchone()[0] if looked else 0
    return {"count": count, "since": int(looked)} if count else None


def list_heads(resource: Resource, asked: str) -> list[Head]:
    """The columns shown: those asked for, on a screen of any width, and the one with the link; else the usual."""
    chosen = resource.chosen(asked)
    if not chosen:
        return resource.usual()
    return [head._replace(classes=re.sub(r" opt-\d", "", head.classes)) for head in resource.every()
            if head.column in chosen or head.classes == "c-name"]


def some_heads(name: str, *left_out: str) -> list[Head]:
    """The usual columns of a list without some: a card does not repeat what is in its title."""
    return [head for head in RESOURCES[name].usual() if head.column not in left_out]


def tab_rows(call: Call, resource: Resource) -> tuple[Rows, list[str]]:
    """What a tab shows, of the whole fleet whatever the address says, and the hosts whose rows could not be made."""
    if resource.name == "alerts":
        over = islice(stored_alerts(call.db, "alert.state = 'resolved'"), LIST_MOST)
        return [*open_alerts(call.fleet.everything(), "all"), *over], []
    if resource.name == "events":
        since, until = (unix_time(call.query.get(name, "")) for name in ("since", "until"))
        return list(islice(each_event(call.db, since=since or 0, until=until), LIST_MOST)), []
    if resource.of_hosts is not None:
        return list(resource.of_hosts(call.fleet, call.fleet.sorted(call.now), call.now)), []
    return rows_of_hosts(resource, call.fleet, call.fleet.sorted(call.now), call.now)


def unix_time(text: str) -> float | None:
    return float(text) if re.fullmatch(r"[0-9]{1,11}(\.[0-9]{1,6})?", text, re.ASCII) else None


def last_night(now: float) -> tuple[int, int]:
    """From eight in the evening to eight in the morning, by this machine's clock; the script goes by the reader's."""
    today = time.localtime(now)
    morning = int(time.mktime((today.tm_year, today.tm_mon, today.tm_mday, 8, 0, 0, 0, 0, -1)))
    return morning - 12 * HOUR, morning


def fleet_tiles(hosts: Rows) -> list[tuple[str, Rows]]:
    """The hosts as the picture of the fleet has them: by site, else by cluster; in a group by name, so that each keeps
    its place."""
    groups: dict[str, Rows] = {}
    for row in sorted(hosts, key=lambda row: row["name"].lower()):
        groups.setdefault(row.get("site") or row.get("cluster") or "", []).append(row)
    return sorted(groups.items(), key=lambda group: (not group[0], group[0].lower()))


DAYS_WITHOUT = {"none yet", "in no job"}  # whoever has no backup has had none for any time


def older(column: str, seconds: float) -> Callable[[Row, float], bool]:
    """Whether a time of a row is longer ago; what is not known is not."""
    return lambda row, now: is_number(row[column]) and now - row[column] > seconds


def above(column: str, limit: float) -> Callable[[Row, float], bool]:
    return lambda row, now: is_number(row[column]) and row[column] > limit


def full_soon(row: Row, now: float) -> bool:
    return is_number(row["days_until_full"]) and row["days_until_full"] < 30


# What operators ask every week: the words to show, those of the search, and whether a row is meant (the search itself
# would cost too much for all rows of each page).
FACETS: dict[str, tuple[tuple[str, str, Callable[[Row, float], bool]], ...]] = {
    "hosts": (("needs a reboot", "reboot:yes", lambda row, now: row["reboot_needed"] is True),
              ("security updates", "security>0", above("updates_security", 0)),
              ("full within 30 d", "full<30", full_soon)),
    "guests": (("no backup in 24 h", "backup>24h",
                lambda row, now: row["backup"] in DAYS_WITHOUT or older("backup_at", DAY)(row, now)),
               ("in no job", "job:none", lambda row, now: row["job"] == "none"),
               ("snapshots over 30 d", "snapshots>30d", older("oldest_snapshot_at", 30 * DAY))),
    "pools": (("full within 30 d", "full<30", full_soon),
              ("over 80%", "used>80", above("capacity_ratio", 0.8)),
              ("no scrub in 35 d", "scrub>35d", older("last_scrub_at", 35 * DAY))),
    "backups": (("no backup in 24 h", "backup>24h",
                 lambda row, now: row["state"] in DAYS_WITHOUT or older("newest_ok_at", DAY)(row, now)),
                ("in no job", "job:none", lambda row, now: row["covered"] is False)),
    "disks": (("worn over 80%", "wear>80", above("wear_ratio", 0.8)),
              ("over 50 °C", "temp>50", above("temperature_celsius", 50))),
    "events": (("last hour", "at<1h", lambda row, now: now - row["at"] < HOUR),
               ("last 24 h", "at<24h", lambda row, now: now - row["at"] < DAY),
               ("critical", "state:critical", lambda row, now: row["severity"] == "critical")),
}


def facets(tab: str, everything: Rows, rows: Rows, now: float) -> list[tuple[str, str, int]]:
    """Questions of a list: the words to show, the words to search, and how many of the rows that are shown they leave.
    A kernel is old if a host of the fleet has a newer one."""
    asked = [(label, words, sum(meant(row, now) for row in rows)) for label, words, meant in FACETS.get(tab, ())]
    kernels = {row["kernel"] for row in everything if row.get("kernel")} if tab == "hosts" else set()
    newest = max(kernels, key=lambda name: [int(part) for part in re.findall(r"\d{1,9}", name)], default="")
    if len(kernels) > 1 and re.fullmatch(r"[\w.+~-]+", newest):
        old = sum(bool(row["kernel"]) and newest not in row["kernel"] for row in rows)
        asked.append(("old kernel", f"-kernel:{newest} kernel:.", old))
    return asked


def not_words(query: str, resource: Resource) -> list[str]:
    """What of a search is no word of this list, in sentences: it finds nothing, or is looked for as text."""
    said = []
    for word in re.findall(r'(?:[^\s"]|"[^"]*"?)+', query[:500].lower()):
        field = re.match(r"-?([a-z_]+)[:<>].", word)
        term = parse_term(word.replace('"', ""))
        if field and not term.operator:
            said.append(f"“{word}” is no filter here and is looked for as text; ? shows the words.")
        elif term.field and term.field not in (*OF_HOSTS, *WORDS, *resource.words, *resource.columns):
            said.append(f"{resource.name} have no “{term.field}”; ? shows the words.")
    return said


def waiting_hosts(call: Call) -> dict[str, list[str]]:
    """The hosts that have never reported, each with what installs its agent."""
    names = sorted(state.name for state in call.fleet.hosts.values() if state.last_seen_at is None)
    return {name: install_commands(call.monitor.config, name) for name in names}


def limits_of(fleet: Fleet, rule: str, host: str | None, object: str) -> Rule:
    state: Any = fleet.names.get((host or "").lower(), fleet.shared)
    return fleet.layers.limits(state, RULE[rule], object)


def level_of(fleet: Fleet, rule: str, host: str | None, value: Any, object: str = "") -> str:
    """'warning' or 'critical' where a value reaches what the rule is set to for this host and object, else ''."""
    limits = limits_of(fleet, rule, host, object)
    if not (is_number(value) and limits.enabled):
        return ""
    return limits.level(value, None) or ""


def page_access(call: Call) -> dict[str, Rows]:
    """Who is let in, for administration: sessions, users, and links for wall displays."""
    own = call.session_key.hex()[:16]
    return {"sessions": [{**row, "current": row["id"] == own} for row in list_sessions(call.db, call.now)],
            "users": list_users(call.db, call.monitor.config.password_hash),
            "kiosks": [row for row in list_api_tokens(call.db) if row["kind"] == "kiosk"]}


def add_sparks(call: Call, rows: Rows) -> Rows:
    """The rows of one page with 24 numbers each: CPU in use, hour by hour."""
    ids = {state.name: state.id for state in call.fleet.hosts.values()}
    sparks = call.monitor.keeper.sparks(call.db, [ids[row["name"]] for row in rows], call.now)
    return [{**row, "spark": sparks[ids[row["name"]]]} for row in rows]


def page_url(query: dict[str, str]) -> Callable[..., str]:
    """`url(**changes)`: the link to this page with some of its parameters changed; None drops one."""
    def url(**changes: Any) -> str:
        kept = {name: query.get(name) for name in ("tab", "q", "sort", "offset", "cols", "since", "until", "host")}
        if changes.keys() & {"tab", "q", "since"}:
            kept["offset"] = None
        if changes.get("tab", query.get("tab")) != query.get("tab"):
            kept.update(dict.fromkeys(("sort", "cols", "since", "until")))
        pairs = [(name, value) for name, value in {**kept, **changes}.items() if value not in (None, "")]
        return "/?" + urllib.parse.urlencode(pairs, errors="replace") if pairs else "/"
    return url


def csv_url(resource: Resource, query: dict[str, str]) -> str:
    """The list as it is searched and sorted, whole, from the API."""
    wanted = {"format": "csv", "limit": str(LIST_MOST), "q": query.get("q", "").strip(),
              "sort": query["sort"] if query.get("sort", "").removeprefix("-") in resource.columns else "",
              "columns": ",".join(resource.chosen(query.get("cols", ""))),
              "state": "all" if resource.name == "alerts" else "",
              **{name: query.get(name, "") for name in ("since", "until") if resource.name == "events"}}
    return f"/api/v1/{resource.name}?" + urllib.parse.urlencode(
        {key: value for key, value in wanted.items() if value}, errors="replace")


def page_offset(asked: str, total: int) -> int:
    """The first row of the page asked for; nonsense and what is past the end is the first page."""
    offset = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 9 else 0
    return offset // PAGE_LIMIT * PAGE_LIMIT if offset < total else 0


def describe_posture(overview: Fields, alerts: Rows) -> tuple[str, str]:
    """The fleet in one word, the worst that nobody has acknowledged, and in one sentence."""
    hosts, problems = overview["hosts"], overview["problems"]
    if not hosts["total"]:
        return "unknown", "No host is registered yet."
    unseen = {alert["severity"] for alert in alerts if not alert["acknowledged"]}
    word = next((severity for severity in SEVERITIES if severity in unseen), "ok")
    if word in ("ok", "info") and hosts["reporting"] < hosts["total"]:
        word = "stale"  # nothing fires, yet not every host is known to be well: never green
    told = [f"{problems['critical']} critical"] if problems["critical"] else []
    told += [count_of(problems["warning"], "warning")] if problems["warning"] else []
    told += [f"{hosts[key]} {key}" for key in ("offline", "stale") if hosts[key]]
    many = count_of(hosts["total"], "host")
    if not hosts["reporting"] + hosts["stale"] + hosts["offline"]:
        return ("unknown" if word == "stale" else word), f"{many} registered, not reporting yet."
    return word, f"{hosts['reporting']} of {many} reporting; {', '.join(told) or 'no open problem'}."


def group_problems(call: Call, alerts: Iterable[Row], most: int) -> Rows:
    """Firing alerts, the worst first, each with those that follow from it folded in as `children`; of the first
    `most` what hangs on them and what to do."""
    url, hosts = page_url(call.query), {state.name: state for state in call.fleet.hosts.values()}
    shown: dict[Any, Row] = {}
    for alert in alerts:
        state = hosts.get(alert["host"])
        rule = RULE.get(alert.get("rule", ""))
        shown[alert["id"]] = {"why": rule and rule.why, **alert,
                              "todo": todo_of(state, alert.get("rule", ""), alert["object"]),
                              "silence": silence_of(call, state or call.fleet.shared, alert),
                              "site": state.site if state else None, "tags": state.tags if state else [],
                              "href": alert_url(alert, url), "children": []}
    tops: Rows = []
    for problem in shown.values():
        cause = root_cause(problem, shown)
        (tops if cause is problem else cause["children"]).append(problem)
    things = {problem["id"]: thing_of(problem, hosts.get(problem["host"])) for problem in tops}
    folded = fold_problems(tops, things)
    return [describe_problem(problem, hosts.get(problem["host"])) for problem in folded[:most]] + folded[most:]


def channel_shown(row: Fields) -> Fields:
    """A channel's row with `look` and `word`: whether what is to be told arrives."""
    if row["last_error"] and (row["last_error_at"] or 0) > (row["last_sent_at"] or 0):
        return {**row, "look": "critical", "word": "failing"}
    if row["given_up"]:
        return {**row, "look": "warning", "word": "given up"}
    return {**row, "look": "ok", "word": "delivered"} if row["last_sent_at"] else {
        **row, "look": "unknown", "word": "not tried"}


def find_next_due(call: Call) -> Fields | None:
    """What will need somebody next, told while nothing does: a scrub that falls due."""
    scrubs: list[Fields] = []
    for host in call.fleet.hosts.values():
        for pool in host.items("pools"):
            limits = limits_of(call.fleet, "scrub-age", host.name, f"pools/{pool['name']}")
            ended = number(pool.get("last_scrub"), "ended_at")
            if ended is not None and limits.enabled and limits.warn is not None:
                scrubs.append({"at": ended + limits.warn,
                               "text": f"the scrub of {pool['name']} on {host.name} falls due"})
    return min((due for due in scrubs if due["at"] > call.now), key=lambda due: due["at"], default=None)


def count_states(chip: str, rows: Iterable[Row]) -> list[tuple[str, int]]:
    """How many rows are in each state, worst first; of events, how many of each kind, the most first."""
    if chip == "kind":
        return Counter(row["kind"].partition("-")[0] for row in rows).most_common()
    counts = Counter(row.get("verdict") or (row["severity"] if row.get("state") == "firing" else row.get("state"))
                     for row in rows)
    return sorted(((word, count) for word, count in counts.items() if word), key=lambda pair: verdict_rank(pair[0]))


def count_tabs(call: Call, terms: list[Term], hits: dict[str, Rows]) -> tuple[dict[str, int], str]:
    """How many rows each tab would show, without a search only what is cheap to count; and the tab to open: that in
    which something is called as what is searched, else the first with hits."""
    if terms:
        called = [name for name, rows in hits.items() for row in rows if is_called(TABS[name], row, terms[0].value)]
        return ({name: len(rows) for name, rows in hits.items()},
                next(chain(called, (name for name, rows in hits.items() if rows)), "hosts"))
    states = call.fleet.hosts.values()
    firing = sum(alert.state == "firing" for owner in call.fleet.everything() for alert in owner.alerts.values())
    return {"hosts": len(states), "guests": sum(state.guest_counts[2] for state in states),
            "storages": sum(len(state.body("storages", ())) for state in states), "alerts": firing,
            "pools": sum(len({pool["name"] for section in ("pools", "pool_states")
                              for pool in state.body(section, ())}) for state in states)}, "hosts"


def find_all(call: Call, terms: list[Term]) -> dict[str, Rows]:
    """What each tab has for a search. Host by host, as far as that goes: what a host sent is read again once then."""
    tabs = [resource for resource in TABS.values() if not resource.title]
    hits: dict[str, Rows] = {resource.name: [] for resource in tabs}
    for state in call.fleet.sorted(call.now):
        for resource in tabs:
            if resource.of_host:
                rows, _ = rows_of_hosts(resource, call.fleet, [state], call.now)
                hits[resource.name] += find_rows(call, resource, rows, terms)
    for resource in tabs:
        if not resource.of_host:
            hits[resource.name] += find_rows(call, resource, tab_rows(call, resource)[0], terms)
    return hits


def is_called(resource: Resource, row: Row, name: str) -> bool:
    return any("c-name" in head.classes and str(row[head.column]).lower() == name for head in resource.usual())


def order_rows(resource: Resource, rows: Rows, sort: str) -> Rows:
    """By a column (`-cpu_ratio`: downwards), else worst first where there is a verdict."""
    if sort.removeprefix("-") in resource.columns:
        return sort_rows(rows, sort)
    if resource.name == "hosts" or resource.title or "verdict" not in resource.columns:
        return rows
    return sorted(rows, key=lambda row: (verdict_rank(row["verdict"]), row["host"].lower()))


# How the page writes values: what is not known is a dash, never 0, and so is what an agent sent in its place.

def known(value: Any) -> Any:
    return value if is_number(value) else None


def fields(body: Any) -> Fields:
    return body if isinstance(body, dict) else {}


def show_cell(column: str, value: Any) -> str:
    """A value by what its column's name says it is; times are written by age() in the templates."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(show_cell(column, part) for part in value) or "–"
    if isinstance(value, dict):
        return " ".join(show_cell(key, part) for key, part in value.items() if part is not None)
    if column.endswith("bytes"):
        return show_bytes(value)
    if column.endswith("_ratio"):
        return show_ratio(value)
    if column.endswith("_seconds"):
        return f"in {show_duration(-value)}" if is_number(value) and value < 0 else show_duration(value)
    if column.endswith("_celsius"):
        return f"{show_number(value)} °C" if is_number(value) else "–"
    if column.startswith("margin") and is_number(value) and value < 0:
        return "data lost"
    if column != "vmid" and is_number(value):
        return show_number(value)
    return to_cell(value) or "–"


def show_bytes(value: Any) -> str:
    return format_bytes(value) if is_number(value) else "–"


def show_ratio(value: Any) -> str:
    """0.834 -> '83%'; what is little more than nothing is '<1%', and only what is full is '100%'."""
    if not is_number(value):
        return "–"
    percent = value * 100
    return "<1%" if 0 < percent < 0.5 else f"{percent:.1f}%" if 99 <= percent < 99.95 else f"{percent:.0f}%"


def show_number(value: Any, digits: int = 0) -> str:
    return f"{value:,.{digits}f}" if is_number(value) else "–"


def show_duration(value: Any) -> str:
    return format_duration(max(0, value)) if is_number(value) else "–"


def show_age(at: Any, now: float) -> str:
    """'41 s', or 'in 3 d' for a time to come."""
    if not is_number(at):
        return "–"
    return f"in {format_duration(at - now)}" if at > now + 1 else show_duration(now - at)


def show_time(at: Any) -> str:
    """As the server writes it, in UTC; the page's script shows the reader's own zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at)) if is_number(at) and 0 <= at < 2e11 else "–"


def look(state: Any) -> str:
    """The verdict that a state is shown as: always one of our own words, whatever an agent sends."""
    word = str(state or "unknown").lower()
    return word if word in VERDICTS else STATE_LOOKS.get(word, "unknown")


def anchor(name: Any) -> str:
    """A name as an element's id."""
    return "".join(sign if sign.isascii() and sign.isalnum() else f"_{ord(sign):x}" for sign in str(name))


def spark_points(values: Any, width: int = 72, height: int = 18) -> list[str]:
    """Numbers 0-1 as the points of polylines, one for each stretch without a gap."""
    lines: list[list[str]] = [[]]
    for place, value in enumerate(values):
        if is_number(value):
            y = height - 1 - min(1, max(0, value)) * (height - 2)
            lines[-1].append(f"{place * width / max(1, len(values) - 1):.1f},{y:.1f}")
        elif lines[-1]:
            lines.append([])
    return [" ".join(line) for line in lines if line]


def why_unknown(host: Fields, section: str) -> str:
    """Why a value is not there: absent, error, no data yet and stale are four different things."""
    if section in host["errors"]:
        error = host["errors"][section]
        return f"could not look: {failure_words(error)}"
    if section in host["absent"]:
        return f"{section}: does not apply on this host"
    if section not in host["sections"]:
        return f"{section}: no data yet"
    return "stale, and not known before" if host["sections"][section]["stale"] else "not reported by the host"


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def can_accept(rule: str) -> bool:
    """Whether what a rule says can be taken as normal: whether it has a baseline."""
    return rule in RULE and RULE[rule].accept is not None


PARTS = ("mark", "badge", "age", "bar", "dash", "cell", "table", "reason")  # what parts.html defines
PAGE_FUNCTIONS: dict[str, Any] = {"PARTS": PARTS} | {one.__name__: one for one in (
    can_accept, proxmox_url, failure_words, known, dicts, fields, object_url, to_json, show_bytes, show_ratio,
    show_number, show_duration, show_age, show_time, count_of, show_cell, some_heads, is_time, is_numeric, look, anchor,
    spark_points, why_unknown)}


class Template(bottle.SimpleTemplate):
    """Everything a template prints is escaped, and what would turn or hide other text is shown as a mark."""

    def prepare(self, **settings: Any) -> None:
        super().prepare(escape_func=lambda text: bottle.html_escape(visible(text)), **settings)


def visible(text: str) -> str:
    """Without control characters: an override like U+202E would let 'gnp.exe' be read as 'exe.png'."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in "\n\t\u00a0" else "\N{REPLACEMENT CHARACTER}" for sign in text)


@lru_cache(64)
def template(name: str) -> Template:
    """A template of the page, read once."""
    return Template(name=name, lookup=[resource("templates")])


def render(name: str, **model: Any) -> bytes:
    return template(name).render(**model).encode("utf-8", "replace")


def html(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, body, {"Content-Type": "text/html; charset=utf-8", **(headers or {})})


@route("GET", "/login", auth="none")
def get_login(call: Call) -> Any:
    """The log-in form."""
    return login_page(call, 200, next=safe_path(call.query.get("next", "")))


@route("POST", "/login", auth="none")
def post_login(call: Call) -> Any:
    """Check user (default: admin) and password, begin a session, and go on to `next`."""
    check_same_origin(call)
    form = urllib.parse.parse_qs(read_request(call.environ, 1 << 14).decode("utf-8", "replace"))
    given = {name: form.get(name, [""])[0] for name in ("user", "password", "next")}
    target = safe_path(given["next"])
    if not LOGINS.acquire(blocking=False):  # the others wait for memory, each with a thread
        return login_page(call, 429, wait_seconds=2, next=target)
    try:
        login, wait = try_login(call, given["user"].strip() or BUILT_IN, given["password"])
    finally:
        LOGINS.release()
    if wait:
        return login_page(call, 429, wait_seconds=wait, next=target)
    if login is None:
        return login_page(call, 401, error="That is not the password.", next=target)
    call.actor, call.kind, address, secret = login.name, "session", call.address(), call.monitor.secret
    cookie = call.write(lambda db: create_session(db, secret, login, call.now, address, call.header("user-agent")))
    set_cookie = cookie_header(call, COOKIE, cookie, SESSION_SECONDS)
    return Answer(303, b"", {"Location": target or "/", "Set-Cookie": set_cookie})


def try_login(call: Call, name: str, password: str) -> tuple[Login | None, int]:
    """Who that is, or None; or how many seconds to wait before a try counts."""
    logins, address = call.monitor.logins, call.address()
    logins.unlock(get_meta(call.db, "logins_unlocked"))
    origins = logins.origins(address, seen_browser(call.monitor.secret, read_cookie(call, SEEN_COOKIE)))
    if logins.crowded(call.now) and was_here(call.db, address):
        origins.pop(logins.EVERYWHERE, None)  # strangers do not lock out who has logged in from there before
    wait = logins.attempt(origins, call.now)
    if wait:
        return None, wait
    login = find_login(call.db, name, call.monitor.config.password_hash)
    if verify_password(login.hash if login else nobodys_hash(), password) and login:
        logins.succeeded(origins)
        return login, 0
    log(f"server: failed log-in from {address}")
    call.fleet.failed_logins.append(call.now)
    who = login.name if login else "an unknown user"  # what was typed may be a password
    call.write(lambda db: insert_event(db, call.now, "login-failed", f"Failed log-in of {who} from {address}"))
    return None, 0


def was_here(db: Database, address: str) -> bool:
    """Whether somebody has logged in from this address."""
    asked = "SELECT 1 FROM event WHERE kind = 'login' AND address = :address LIMIT 1"
    return db.execute(asked, {"address": address}).fetchone() is not None


@lru_cache(1)
def nobodys_hash() -> str:
    """So that a name that nobody has takes as long as a wrong password."""
    return PASSWORDS.hash(secrets.token_hex(16))


@route("POST", "/logout", auth="page")
def post_logout(call: Call) -> Any:
    """End this session; what the browser has kept of the page goes too."""
    call.write(lambda db: db.execute("DELETE FROM session WHERE hash = :hash", {"hash": call.session_key}).rowcount)
    return Answer(303, b"", {"Location": "/login", "Set-Cookie": cookie_header(call, COOKIE, "", 0),
                             "Clear-Site-Data": '"cache"'})


@route("GET", "/static/<name>", auth="none")
def get_static(call: Call) -> Any:
    """The page's own CSS, JavaScript and icon."""
    name = call.params["name"]
    kind = STATIC_TYPES.get(os.path.splitext(name)[1])
    if kind is None or name not in os.listdir(resource("templates")):
        raise Problem("not_found", "no such file")
    with open(resource("templates", name), "rb") as handle:
        return Answer(200, handle.read(), {"Content-Type": kind})


def login_page(call: Call, status: int, *, error: str | None = None, wait_seconds: int | None = None,
               next: str = "") -> Answer:
    headers = {"Retry-After": str(wait_seconds)} if wait_seconds else {}
    users = call.db.execute("SELECT count(*) FROM user").fetchone()[0]
    body = render("login.html", version=VERSION, error=error, wait_seconds=wait_seconds, named=users > 0,
                  password_set=bool(call.monitor.config.password_hash or users), next=next)
    return html(body, status, {**headers, "Cache-Control": "no-store"})


def safe_path(text: str) -> str:
    """A path of this server with its query, '' for all that could lead elsewhere: browsers take // and /\\ for
    another host, and leave tabs and line breaks out."""
    fine = re.fullmatch(r"/(?![/\\])[!-\[\]-~]*", text) and not re.match(r"/(login|logout)\b", text)
    return text if fine and len(text) <= 2000 else ""


# --- serving: who asks, what he may, and how an answer leaves ---


def identify_browser(call: Call, route: Route) -> Answer | None:
    """For the page: a session, else a wall display with its link or the cookie it got for that; where to go
    instead of what was asked for."""
    identify(call)
    secret, given = call.monitor.secret, call.query.get("kiosk", "")
    if given:
        call.query["kiosk"] = ""  # nowhere else: not in a link, not in the log-in's
    new = call.session is not None and call.session["created_at"] > call.now - 10 * MINUTE
    if new and not seen_browser(secret, read_cookie(call, SEEN_COOKIE)):
        call.set_cookie = cookie_header(call, SEEN_COOKIE, seen_cookie(secret), 400 * DAY)  # browsers keep no longer
    token = "" if call.kind or route.path != "/" else given or read_cookie(call, KIOSK_COOKIE)
    kiosk = find_api_token(call.db, token, call.now, kind="kiosk") if token else None
    if kiosk and given:  # out of the address, which is shown and kept in lists
        cookie = cookie_header(call, KIOSK_COOKIE, token, 400 * DAY)
        return Answer(303, b"", {"Location": "/?kiosk", "Set-Cookie": cookie, "Cache-Control": "no-store"})
    if kiosk:
        call.actor, call.kind = kiosk["name"], "kiosk"
    known = call.kind in ("session", "kiosk")
    return None if known else Answer(303, b"", {"Location": login_address(call, route)})


def check_access(call: Call, route: Route) -> Answer | None:
    """Let the request pass, or say where to go instead, or raise. A route without a rule cannot be registered."""
    if route.auth in ("none", "host"):  # a host's signature is looked at where its body is
        return None
    if route.auth == "page":
        elsewhere = identify_browser(call, route)
        if elsewhere:
            return elsewhere
    else:
        identify(call)
        if call.actor is None:
            raise Problem("unauthorized", "log in, or send an API token: Authorization: Bearer …", headers=BEARER)
        if call.role not in MAY[route.auth]:
            raise Problem("forbidden", "this API token may only read" if call.kind == "token"
                          else f"{call.actor} is {call.role}: {' or '.join(MAY[route.auth])} is needed")
    if route.method not in ("GET", "HEAD") and call.kind != "token":
        check_csrf(call)
    return None


def login_address(call: Call, route: Route) -> str:
    """Where to log in, with the way back to where one was."""
    asked = call.environ.get("PATH_INFO", "/")
    if call.environ.get("QUERY_STRING"):
        asked += "?" + call.environ["QUERY_STRING"]
    back = safe_path(asked) if route.method == "GET" and asked != "/" else ""
    return "/login?" + urllib.parse.urlencode({"next": back}) if back else "/login"


def note_refusal(call: Call, problem: Problem) -> None:
    """A write that somebody known was refused is an event; of very many only some."""
    if problem.code != "forbidden" or not call.actor or call.monitor.refusals.take("", 1, call.now):
        return
    what = f"{call.environ['REQUEST_METHOD']} {call.environ.get('PATH_INFO', '')[:200]}: {problem.detail}"
    call.write(lambda db: insert_event(db, call.now, "refused", printable(what)), urgent=False)


def check_csrf(call: Call) -> None:
    """A write by a session has to come from our own page. `Problem('forbidden')`."""
    check_same_origin(call)
    given = call.header("x-csrf-token")
    if not given and media_type(call.header("content-type")) == "application/x-www-form-urlencoded":
        form = urllib.parse.parse_qs(read_request(call.environ, 1 << 14).decode("utf-8", "replace"))
        given = form.get("csrf", [""])[0]
    expected = csrf_token(call.monitor.secret, call.cookie)
    if not hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode()):
        raise Problem("forbidden", "the page's CSRF token is missing or old: load the page again")


def respond(monitor: Monitor, one: Route, environ: Fields, params: dict[str, str]) -> Answer:
    """Run a route for a request; every refusal comes back as an answer."""
    try:
        call = Call(monitor, environ, params, fresh=one.auth != "host")
        try:
            elsewhere = check_access(call, one)
        except Problem as problem:
            note_refusal(call, problem)
            raise
        if elsewhere:
            return elsewhere
        answer = finish(call, one, one.handler(call))
        if call.set_cookie:
            answer.headers.setdefault("Set-Cookie", call.set_cookie)
        return answer
    except Exception as error:
        return error_answer(error)


def finish(call: Call, one: Route, result: Any) -> Answer:
    """What a handler gave back, as bytes with their headers. What a write answers with may be a secret."""
    reads = call.environ["REQUEST_METHOD"] in ("GET", "HEAD")
    if result is None:
        result = Answer(204)
    elif not isinstance(result, Answer):
        result = Answer(201 if one.makes else 200, json.dumps(result).encode(),
                        {} if reads else {"Cache-Control": "no-store"})
    if reads and result.status == 200 and "Cache-Control" not in result.headers:
        tag = result.headers.get("ETag") or body_etag(result.body)
        keep = "no-store" if call.kind in ("session", "kiosk") else "private, no-cache"  # for Back after log-out
        result.headers.update({"ETag": tag, "Cache-Control": keep})
        if call.header("if-none-match") == tag:
            return Answer(304, b"", {"ETag": tag})
    return packed(call, result)


def packed(call: Call, answer: Answer) -> Answer:
    """The answer as gzip for whoever takes that. Not where another site made the browser ask: by the length of what
    comes it could guess at what is in it (BREACH)."""
    if len(answer.body) < 1000 or answer.headers.get("Content-Type") == "application/octet-stream":
        return answer
    takes = re.search(r"\bgzip\b(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|$))", call.header("accept-encoding"))
    if not takes or call.header("sec-fetch-site") not in ("", "same-origin", "none"):
        return answer
    answer.body = gzip.compress(answer.body, 4, mtime=0)
    answer.headers.update({"Content-Encoding": "gzip", "Vary": "Accept-Encoding"})
    return answer


STATUS_LINES = {**bottle._HTTP_STATUS_LINES}
SECURITY_HEADERS = {
    "Content-Security-Policy":
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


def build_app(monitor: Monitor) -> Callable[..., Iterable[bytes]]:
    """The WSGI application."""
    app, extra = bottle.Bottle(), list(security_headers(monitor.config).items())
    app.config["catchall"] = False
    for one in ROUTES:
        app.route(one.path, one.method, partial(handle_route, monitor, one), skip=True)
    app.default_error_handler = handle_http_error

    def serve(environ: Fields, start_response: Callable[..., Any]) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            return start_response(status, [*headers, *extra], exc_info)

        return app(environ, start)

    return serve


def security_headers(config: Config) -> dict[str, str]:
    return {**SECURITY_HEADERS, **({"Strict-Transport-Security": "max-age=31536000"} if config.https else {})}


def handle_route(monitor: Monitor, one: Route, **params: str) -> bottle.HTTPResponse:
    """A route's answer as Bottle's response."""
    answer = respond(monitor, one, bottle.request.environ, params)
    headers = dict(answer.headers)
    if answer.body:
        headers.setdefault("Content-Type", "application/json")
    return bottle.HTTPResponse(answer.stream or answer.body, answer.status, headers)


def handle_http_error(error: bottle.HTTPError) -> bytes:
    """What Bottle itself refuses: no such path, or not this method."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    answer = problem_answer(Problem(code, "no such path" if code == "not_found" else str(error.body)[:200]))
    bottle.response.status = answer.status
    for key, value in answer.headers.items():
        bottle.response.set_header(key, value)
    if error.headers.get("Allow"):
        bottle.response.set_header("Allow", error.headers["Allow"])
    return answer.body


class RefusedTask(ErrorTask):
    """What waitress refuses before we see it (broken or endless requests), in the same form as our own errors."""

    def execute(self) -> None:
        error = self.request.error
        code = {413: "too_large", 431: "too_large", 501: "unsupported_media_type", 503: "busy"}.get(
            error.code, "invalid_request")
        problem = Problem(code, str(error.body).strip() or error.reason)
        problem.status = 415 if error.code == 501 else error.code  # a strange Transfer-Encoding is the sender's fault
        body = problem.body()
        self.status = STATUS_LINES[problem.status]
        self.response_headers.extend([("Content-Type", "application/problem+json"), *SECURITY_HEADERS.items()])
        if isinstance(error, Crowded):
            self.response_headers.append(("Retry-After", str(error.again)))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Crowded(Error):
    """More reports wait than are taken in the time that their senders have."""

    code, reason = 503, "Service Unavailable"

    def __init__(self, refused: int):
        super().__init__("many reports wait to be taken")
        spread = min(AGAIN_LAST - AGAIN_FIRST, 10 + refused // AGAIN_PER_SECOND)
        self.again = AGAIN_FIRST + secrets.randbelow(spread)


class AnswerTask(WSGITask):
    """An answer as it goes out."""

    wrote_header: bool

    def write(self, data: bytes) -> None:
        """A short answer goes out in one piece with its head: a system call less here, and a wake-up less there."""
        if self.wrote_header or not self.complete or not 0 < len(data) == self.content_length < 1 << 16 \
                or not self.has_body:
            return super().write(data)
        self.wrote_header, self.content_bytes_written = True, len(data)
        self.channel.write_soon(self.build_response_header() + data)

    def execute(self) -> None:
        super().execute()
        if len(self.channel.requests) > 1 and self.channel.total_outbufs_len > UNREAD_LIMIT:
            self.set_close_on_finish()  # who asks for more and does not read: its next request would keep this thread


class HttpRequest(HTTPRequestParser):
    """A request as it comes in."""

    def __init__(self, adj: Any):
        super().__init__(adj)
        self.began = time.monotonic()

    def parse_header(self, header_plus: bytes) -> None:
        super().parse_header(header_plus)
        if self.chunked and "CONTENT_LENGTH" in self.headers:  # two readers may see two requests: RFC 9112, 6.3
            raise ParsingError("Content-Length beside Transfer-Encoding")


class Lane:
    """Channels that wait for a thread, and those that have one: at most so many at once."""

    def __init__(self, most: int):
        self.most = most
        self.waiting: deque[HttpChannel] = deque()
        self.under_way: set[HttpChannel] = set()
        self.refused = 0  # since nobody waited

    def ready(self) -> int:
        return len(self.waiting) if len(self.under_way) < self.most else 0


def lane_of(path: str) -> str:
    """What is asked for: a key of AT_ONCE."""
    if path == "/healthz":
        return "health"
    if path.endswith("/reports"):
        return "reports"
    return "page" if path == "/" or re.fullmatch("/api/v1/[a-z]+", path) else "other"


class WaitingRequests:
    """waitress's queue of channels with a request, in lanes that take turns."""

    def __init__(self) -> None:
        self.lanes = {name: Lane(most) for name, most in AT_ONCE.items()}
        self.turns = deque(self.lanes.values())

    def append(self, channel: HttpChannel) -> None:
        request = channel.requests[0] if channel.requests else None
        name = lane_of(getattr(request, "path", ""))
        lane = self.lanes[name]
        if request and name == "reports" and len(lane.waiting) >= WAITING_MOST:
            request.error = Crowded(lane.refused)
            lane.refused += 1
            lane = self.lanes["health"]  # as quick to answer
        lane.waiting.append(channel)

    def __len__(self) -> int:
        """How many a thread may take. Each that ends one looks again, so none waits for ever."""
        return sum(lane.ready() for lane in self.turns)

    def popleft(self) -> HttpChannel:
        while not self.turns[0].ready():
            self.turns.rotate(-1)
        lane = self.turns[0]
        self.turns.rotate(-1)
        channel = lane.waiting.popleft()
        lane.refused = lane.refused if lane.waiting else 0
        lane.under_way.add(channel)
        return channel

    def done(self, channel: HttpChannel) -> None:
        for lane in self.turns:
            lane.under_way.discard(channel)


class HttpChannel(HTTPChannel):
    """A connection. waitress hangs up on one that is silent; here also on one that drips, and on one that does not
    read while a thread has more to write: else a few of them would hold every thread."""

    task_class, error_task_class, parser_class = AnswerTask, RefusedTask, HttpRequest
    sendbuf_len: int

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sendbuf_len = min(self.sendbuf_len, 1 << 17)  # read from a file at once; the kernel's buffer is 2.5 MiB

    def readable(self) -> bool:  # asked at each turn of the loop
        if self.is_late():
            self.will_close = True
        return super().readable()

    def is_late(self) -> bool:
        """Whether a request takes too long to come in. Where places run short, who has asked for nothing for two
        seconds gives his to who comes anew: at its limit waitress takes nobody, and a stranger who only opens
        connections could keep every host out."""
        if self.requests:  # it is waiting for us: in a storm nearly all are
            return False
        crowded = len(self.server.active_channels) > self.adj.connection_limit * 7 // 8
        if self.request is not None:
            head = CROWDED_SECONDS if crowded else HEAD_SECONDS
            return time.monotonic() - self.request.began > (REQUEST_SECONDS if self.request.headers_finished else head)
        return crowded and not self.total_outbufs_len and time.time() - self.last_activity > CROWDED_SECONDS

    def has_left(self) -> bool:
        """Whether who asked has hung up after a long wait; waitress does not read on while a request waits. Sooner it
        may be one who has only ended his side, as HTTP lets him, and still reads."""
        if time.monotonic() - self.requests[0].began < PATIENCE_SECONDS:
            return False
        try:
            return not self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def service(self) -> None:
        try:
            if self.has_left():
                self.connected = False  # nobody reads the answer, and a sender keeps what was not acknowledged
            super().service()
        finally:
            self.server.task_dispatcher.queue.done(self)

    def writable(self) -> bool:
        if self.total_outbufs_len and time.time() - self.last_activity > UNREAD_SECONDS:
            self.will_close = True
        return super().writable()


def accept_waiting(listener: BaseWSGIServer) -> None:
    """Take all who wait. waitress takes one at each turn of its loop, and a turn costs for each open connection."""
    for _ in range(CONNECTIONS_MOST // 16):
        before = len(listener.active_channels)
        BaseWSGIServer.handle_accept(listener)
        if len(listener.active_channels) == before:
            return


def run_server(monitor: Monitor) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is being written."""
    config = monitor.config
    try:
        server = open_sockets(monitor)
    except OSError as error:
        raise Failure(f"cannot listen on {config.listen}:{config.port}: {error.strerror}") from None
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop_serving)
    signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=monitor.reload_settings, daemon=True).start())
    sys.setswitchinterval(SWITCH_SECONDS)
    Scheduler(monitor).start()
    start_watches(monitor)
    monitor.notifier.start()
    port = getattr(server, "effective_port", config.port)
    log(f"server: listening on http://{config.listen}:{port}")
    for doubt in config.doubts():
        log(f"server: {doubt}")
    if not config.password_hash:
        log("server: nobody can log in until DASHBOARD_PASSWORD_HASH is set; make one with `hash-password`")
    try:
        server.run()
    except SystemExit:
        pass
    finally:
        server.close()
        monitor.close()
        log("server: stopped")


def room_for_connections() -> int:
    """How many at once: CONNECTIONS_MOST, or as the descriptors allow that this process may have."""
    wanted = CONNECTIONS_MOST + OTHER_FILES
    soft, hard = getrlimit(RLIMIT_NOFILE)
    if 0 <= soft < wanted:  # -1: no limit
        soft = wanted if hard < 0 else min(hard, wanted)
        setrlimit(RLIMIT_NOFILE, (soft, hard))
    return CONNECTIONS_MOST if soft < 0 else min(CONNECTIONS_MOST, max(soft // 2, soft - OTHER_FILES))


def open_sockets(monitor: Monitor) -> Any:
    """waitress's server, listening."""
    config = monitor.config
    sockets: dict[int, Any] = {}
    server = waitress.create_server(
        build_app(monitor), sockets, host=config.listen, port=config.port, threads=THREADS, ident="",
        expose_tracebacks=False, asyncore_use_poll=True, connection_limit=room_for_connections(), backlog=4096,
        channel_timeout=120, cleanup_interval=10, max_request_header_size=1 << 15, max_request_body_size=TAKEN_LIMIT,
        inbuf_overflow=1 << 16, outbuf_high_watermark=UNREAD_LIMIT, clear_untrusted_proxy_headers=False)
    for one in sockets.values():
        if isinstance(one, BaseWSGIServer):  # one for each address
            one.channel_class, one.handle_accept = HttpChannel, partial(accept_waiting, one)
    server.task_dispatcher.queue = WaitingRequests()
    return server


def stop_serving(*_: Any) -> None:
    raise SystemExit(0)


# --- commands: what an operator types ---

Handler = Callable[[Config, argparse.Namespace], int | None]
Argument = tuple[str, Fields]
COMMANDS: dict[str, tuple[Handler, str, tuple[Argument, ...]]] = {}  # with help and arguments
AS_ROOT = {"backup", "restore"}  # open a file of root's; all others become the owner of the database's directory


def command(name: str, *arguments: Argument, help: str = "") -> Callable[[Handler], Handler]:
    """Register a command with its arguments; its docstring is its help. Nothing given back is exit code 0."""

    def register(handler: Handler) -> Handler:
        COMMANDS[name] = handler, help or handler.__doc__ or "", arguments
        return handler

    return register


def open_database(config: Config, *, create: bool = False, readonly: bool = False, any_older: bool = False) -> Database:
    """The database with this program's schema, or `any_older` one; made if `create` and there is none or an empty
    one."""
    if not create and not os.path.exists(config.database_path):
        raise Failure(f"{config.database_path}: there is no database; `serve` or `migrate` makes it")
    db = connect(config.database_path, readonly=readonly)
    if create and is_empty(db):
        migrate(db, load_migrations())
    if not any_older or schema_version(db) > len(load_migrations()):
        check_schema(db)
    return db


@contextmanager
def database(config: Config, *, create: bool = False) -> Iterator[Database]:
    """The database for a command that writes: all of it or nothing, and its events say who typed it."""
    db = open_database(config, create=create)
    try:
        with done_by(f"command:{typist()}"), transaction(db):
            yield db
    finally:
        db.close()


def typist() -> str:
    """Who typed the command: also through sudo."""
    try:
        return os.environ.get("SUDO_USER") or pwd.getpwuid(ASKED_AS).pw_name
    except KeyError:
        return str(ASKED_AS)


ASKED_AS = os.getuid()  # before root's commands become somebody else


def print_list(rows: list[Fields], columns: tuple[str, ...], as_json: bool) -> None:
    """Rows for people, or for programs."""
    print(json.dumps(rows, indent=2) + "\n" if as_json else to_text(rows, columns), end="")


NAME_ARGUMENT = ("name", {"help": "the name"})
JSON_ARGUMENT = ("--json", {"action": "store_true", "help": "as JSON"})
EXPIRES_ARGUMENT = ("--expires", {"type": float, "metavar": "DAYS", "help": "valid for so long (default: for ever)"})
ROLE_ARGUMENT = ("--role", {"choices": ROLES, "required": True, "help": "an operator acknowledges and mutes"})
SHOWN_ONCE = "Store this token NOW — it will never be shown again."


# Commands that write one thing and say so: name, help, arguments, what is done, what is said.
Writing = tuple[str, str, tuple[Argument, ...], Callable[[Database, Any, float], Any], str]
WRITES: tuple[Writing, ...] = (
    ("remove-host", "Remove a host with all it has sent.", (NAME_ARGUMENT,),
     lambda db, args, now: delete_host(db, args.name, now), "Host '{name}' removed."),
    ("rename-host", "Rename a host; its token stays, its agent's host_id must follow.", (("old", {}), ("new", {})),
     lambda db, args, now: update_host(db, args.old, {"name": args.new}, now),
     "Host '{old}' renamed to '{new}'.\nSet host_id = \"{new}\" in its agent.toml and restart the agent."),
    ("revoke-api-token", "Revoke an API token or a kiosk's link.", (NAME_ARGUMENT,),
     lambda db, args, now: revoke_api_token(db, args.name, now), "API token '{name}' revoked."),
    ("remove-user", "Let a user log in no longer; his sessions end.", (NAME_ARGUMENT,),
     lambda db, args, now: delete_user(db, args.name, now), "User '{name}' removed."),
    ("unlock-login", "Forget the failed log-ins: nobody has to wait for the next try.", (),
     lambda db, args, now: unlock_logins(db, now), "The next log-in counts at once."),
)
HOST_RECORD = ("id", "name", "site", "tags", "note", "maintenance_until", "created_at", "last_seen_at")
# Commands that show rows: name, help, columns, rows.
Listed = tuple[str, str, tuple[str, ...], Callable[[Database, Config], list[Fields]]]
LISTED: tuple[Listed, ...] = (
    ("list-hosts", "List the registered hosts.", ("id", "name", "site", "tags", "created_at", "last_seen_at"),
     lambda db, config: [{key: json.loads(row[key]) if key == "tags" else row[key] for key in HOST_RECORD}
                         for row in list_host_records(db)]),
    ("list-api-tokens", "List the API tokens' names.", RESOURCES["tokens"].columns,
     lambda db, config: list_api_tokens(db)),
    ("list-sessions", "List who is logged in.", RESOURCES["sessions"].columns[:-1],
     lambda db, config: list_sessions(db, time.time())),
    ("list-users", "List who may log in, and as what.", RESOURCES["users"].columns,
     lambda db, config: list_users(db, config.password_hash)),
)


def run_write(row: Writing, config: Config, args: argparse.Namespace) -> None:
    with database(config) as db:
        row[3](db, args, time.time())
    print(row[4].format_map(vars(args)))


def run_list(row: Listed, config: Config, args: argparse.Namespace) -> None:
    print_list(row[3](open_database(config, readonly=True), config), row[2], args.json)


for _writing in WRITES:
    command(_writing[0], *_writing[2], help=_writing[1])(partial(run_write, _writing))
for _listed in LISTED:
    command(_listed[0], JSON_ARGUMENT, help=_listed[1])(partial(run_list, _listed))


@command("serve")
def command_serve(config: Config, args: argparse.Namespace) -> None:
    """Run the server."""
    open_database(config, create=True).close()
    with only_server(config):
        run_server(Monitor(config))


@contextmanager
def only_server(config: Config) -> Iterator[None]:
    """Two servers on one database would each keep a state of their own. A lock on the database itself would not
    do: closing the file would take SQLite's locks away."""
    path = config.database_path + ".lock"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Failure(f"{config.database_path}: another server is running on it") from None
        yield


@command("migrate")
def command_migrate(config: Config, args: argparse.Namespace) -> None:
    """Bring the database's schema up to date."""
    db = connect(config.database_path)
    taken = migrate(db, load_migrations())
    print(f"schema {schema_version(db)}, {count_of(taken, 'migration')} applied")


@command("rollback", ("--to", {"type": int, "metavar": "N", "help": "the schema to go back to (default: one step)"}))
def command_rollback(config: Config, args: argparse.Namespace) -> None:
    """Take the schema back, before an older version of this program is installed."""
    db = open_database(config, any_older=True)
    have = schema_version(db)
    to = have - 1 if args.to is None else args.to
    if not 0 <= to <= have:
        raise Failure(f"--to: 0 to {have}, not {to}")
    taken = rollback(db, load_migrations(), to=to)
    print(f"schema {schema_version(db)}, {count_of(taken, 'migration')} taken back")


def show_token(config: Config, record: sqlite3.Row, said: str) -> None:
    print(f"Host '{record['name']}' {said}")
    print(f"TOKEN: {host_token(config.secret(), record['nonce'])}")
    print(SHOWN_ONCE)


@command("register-host", NAME_ARGUMENT)
def command_register_host(config: Config, args: argparse.Namespace) -> None:
    """Register a host and print its token, once."""
    with database(config, create=True) as db:
        record = insert_host(db, args.name, time.time())
    show_token(config, record, f"registered (id={record['id']}).")
    sys.stdout.flush()
    if sys.stderr.isatty():  # for people: scripts get the three lines and nothing else
        for line in ("", "Then, as root on the host:", "", *install_commands(config, record["name"])):
            print(line and f"  {line}", file=sys.stderr)


@command("rotate-token", NAME_ARGUMENT)
def command_rotate_token(config: Config, args: argparse.Namespace) -> None:
    """Give a host a new token; the old one is refused from here on."""
    with database(config) as db:
        record = rotate_nonce(db, args.name, time.time())
    show_token(config, record, "has a new token.")


def load_fleet(db: Database) -> Fleet:
    """The fleet as a running server has it, for a command beside it."""
    fleet = Fleet()
    since, alive = get_meta(db, "serving_since"), get_meta(db, "alive_at")
    if alive and time.time() - float(alive) > 2 * MINUTE:
        print("note: the server is not running; hosts are judged by when they were last seen", file=sys.stderr)
    elif since:
        fleet.serving_since = float(since)
    fleet.load(db)
    return fleet


@command("status", JSON_ARGUMENT)
def command_status(config: Config, args: argparse.Namespace) -> int:
    """The fleet, worst first. Exit code 0 ok, 1 warning, 2 critical."""
    db = open_database(config, readonly=True)
    now, fleet = time.time(), load_fleet(db)
    rows = [host_row(fleet, state, now) for state in fleet.sorted(now)]
    shared = worst_alert(fleet.shared.alerts.values())[0]
    worst = max([STATUS_CODES[row["verdict"]] for row in rows] + [STATUS_CODES[shared or "ok"]])
    if args.json:
        print(json.dumps({"status": ("ok", "warning", "critical")[worst], "overview": build_overview(fleet, now),
                          "hosts": rows, "alerts": list_alerts(db)}, indent=2))
    else:
        overview = build_overview(fleet, now)
        print(f"{overview['hosts']['reporting']} of {overview['hosts']['total']} hosts reporting; "
              f"{overview['problems']['critical']} critical, {overview['problems']['warning']} warnings")
        print(to_text(rows, ("verdict", "name", "site", "reason", "last_seen_at")), end="")
    return worst


STATUS_CODES = {"ok": 0, "info": 0, "maintenance": 0, "warning": 1, "stale": 1, "unknown": 1, "critical": 2,
                "offline": 2}


def ask_password() -> str:
    """A password: asked for twice without showing it, or the first line of standard input."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("Password: ")
    if password != getpass.getpass("Again: "):
        raise Failure("the two are not the same")
    return password


# Commands that print one thing: name, help, what they print.
for _name, _help, _text in (
    ("hash-password", "Make DASHBOARD_PASSWORD_HASH from a password: asks twice, or reads standard input.",
     lambda: hash_password(ask_password())),
    ("generate-secret", "Make a SECRET_KEY_BASE.", lambda: secrets.token_urlsafe(48)),
    ("version", "Print the version.", lambda: f"proxmox-monitor-server {VERSION}"),
):
    command(_name, help=_help)(partial(lambda text, config, args: print(text()), _text))


@command("create-api-token", NAME_ARGUMENT, ("--admin", {"action": "store_true", "help": "may also write"}),
         EXPIRES_ARGUMENT)
def command_create_api_token(config: Config, args: argparse.Namespace) -> None:
    """Create an API token and print it, once."""
    token = make_token(config, args, admin=args.admin, kind="token")
    print(f"API token '{args.name}' created ({'admin' if args.admin else 'read only'}).")
    print(f"TOKEN: {token}")
    print(SHOWN_ONCE)


@command("create-kiosk-link", NAME_ARGUMENT, EXPIRES_ARGUMENT)
def command_create_kiosk_link(config: Config, args: argparse.Namespace) -> None:
    """Create a link that shows the page to a wall display, to look at only; revoke-api-token ends it."""
    print(f"LINK: {kiosk_link(config, make_token(config, args, admin=False, kind='kiosk'))}")
    print("Open it once on the display: it will never be shown again.")


def make_token(config: Config, args: argparse.Namespace, *, admin: bool, kind: str) -> str:
    if args.expires is not None and not 0 < args.expires <= 36500:
        raise Failure("--expires: a number of days above 0")
    with database(config, create=True) as db:
        return create_api_token(db, args.name, time.time(), admin=admin, days=args.expires, kind=kind)


@command("end-sessions", ("id", {"nargs": "?", "metavar": "ID", "help": "only this one, as list-sessions has it"}))
def command_end_sessions(config: Config, args: argparse.Namespace) -> None:
    """End all sessions, or one: whoever it is has to log in again."""
    with database(config) as db:
        ended = end_sessions(db, time.time(), id=args.id)
        if args.id and not ended:
            raise Failure(f"no session '{args.id}'")
    print(f"{count_of(ended, 'session')} ended.")


@command("add-user", NAME_ARGUMENT, ROLE_ARGUMENT)
def command_add_user(config: Config, args: argparse.Namespace) -> None:
    """Let somebody log in by name; asks for the password twice, or reads standard input."""
    hashed = hash_password(ask_password())
    with database(config, create=True) as db:
        insert_user(db, args.name, args.role, hashed, time.time())
    print(f"User '{args.name}' added ({args.role}).")


@command("set-password", NAME_ARGUMENT)
def command_set_password(config: Config, args: argparse.Namespace) -> None:
    """Give a user another password, which ends his sessions."""
    required_user(open_database(config, readonly=True), args.name)
    hashed = hash_password(ask_password())
    with database(config) as db:
        update_user(db, args.name, time.time(), password_hash=hashed)
    print(f"Password of '{args.name}' set.")


@command("backup", ("file", {"help": "where to write the copy"}))
def command_backup(config: Config, args: argparse.Namespace) -> None:
    """Write a consistent copy of the database while the server runs."""
    target = os.path.abspath(args.file)
    folder = f"{target}.{secrets.token_hex(8)}"
    try:
        os.close(os.open(target, NEW_FILE, 0o600))  # the name is ours now, and no link
    except FileExistsError:
        raise Failure(f"{target}: exists already") from None
    except OSError as error:
        raise Failure(f"{target}: {error.strerror}") from None
    try:
        os.mkdir(folder, 0o700)  # nobody else can put anything beside the copy
        copy_database(open_database(config, readonly=True), os.path.join(folder, "copy"))
        os.replace(os.path.join(folder, "copy"), target)
    except (OSError, sqlite3.Error, Failure) as error:
        os.unlink(target)
        raise Failure(f"{target}: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    where = "SECRET_KEY_BASE of the environment" if config.given_secret else config.secret_path
    print(f"{target}: {os.path.getsize(target)} bytes. Keep the secret apart from it: {where}")


def copy_database(source: Database, path: str) -> None:
    """A copy in one file, 0600."""
    os.close(os.open(path, NEW_FILE, 0o600))
    copy = sqlite3.connect(path)
    source.backup(copy)  # one read transaction: the writer is not kept waiting
    copy.execute("PRAGMA journal_mode = DELETE")  # one file, without -wal beside it
    copy.close()


@command("restore", ("file", {"help": "a copy that `backup` wrote"}))
def command_restore(config: Config, args: argparse.Namespace) -> None:
    """Put a backup in the place of the database while the server is stopped; ends all sessions."""
    path, now = config.database_path, time.time()
    kept = f"{path}.before-restore-{int(now)}"
    try:
        with open(args.file, "rb") as source:  # root's file, before we become the owner of the directory
            become_owner(path)
            with only_server(config), copied_beside(path, source) as copy:
                undone = prepare_restore(copy, path, now)
                for suffix in [suffix for suffix in ("-wal", "-shm", "") if os.path.lexists(path + suffix)]:
                    os.rename(path + suffix, kept + suffix)
                os.rename(copy, path)
    except (OSError, sqlite3.Error) as error:
        raise Failure(f"{args.file}: {getattr(error, 'strerror', None) or error}") from None
    tell_restored(args.file, path, kept, undone)


@contextmanager
def copied_beside(path: str, source: IO[bytes]) -> Iterator[str]:
    """The path of a copy of an open file in the same directory, to be renamed; what is left of it goes."""
    partial_path = f"{path}.{secrets.token_hex(8)}"
    try:
        with open(os.open(partial_path, NEW_FILE, 0o600), "wb") as target:
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
        yield partial_path
    finally:
        for suffix in [suffix for suffix in ("", "-journal", "-wal", "-shm") if os.path.lexists(partial_path + suffix)]:
            os.unlink(partial_path + suffix)


def prepare_restore(path: str, current: str, now: float) -> list[str]:
    """Check the copy, end its sessions, and tell what has been taken back since it was made, as far as the
    database knows that it replaces."""
    db = connect(path)
    found = db.execute("PRAGMA quick_check").fetchone()[0]
    if found != "ok" or is_empty(db):
        raise Failure(f"not a whole database of this program: {found if found != 'ok' else 'it is empty'}")
    check_schema(db)
    made_at = db.execute("SELECT max(at) FROM event").fetchone()[0] or 0.0
    with done_by(f"command:{typist()}"), transaction(db):
        end_sessions(db, now)
        insert_event(db, now, "restored", f"Restored from a backup whose last event is of {iso_time(made_at)}")
    db.execute("PRAGMA journal_mode = DELETE")
    db.close()
    return list_undone(current, made_at)


TAKEN_BACK = ("token-rotated", "token-revoked", "host-removed", "user-removed", "user-password", "user-role")


def list_undone(path: str, since: float) -> list[str]:
    """What the database at this path says was taken from somebody since then, and a backup of then gives back."""
    try:
        db = connect(path, readonly=True)
        marks = ", ".join("?" * len(TAKEN_BACK))
        return [f"{iso_time(row['at'])}  {printable(row['message'])}" for row in db.execute(
            f"SELECT at, message FROM event WHERE at >= ? AND kind IN ({marks}) ORDER BY id", (since, *TAKEN_BACK))]
    except (Failure, sqlite3.Error):
        return []


def tell_restored(file: str, path: str, kept: str, undone: list[str]) -> None:
    print(f"{path} is {file} now, all sessions ended. What was there before: {kept}")
    print("A backup gives back what was taken from somebody after it was made. "
          + ("Undo that again, by rotate-token, revoke-api-token, remove-host, remove-user or set-password:" if undone
             else "Nothing of the kind is known; rotate what you know of."))
    for line in undone:
        print(f"  {line}")


class Check(NamedTuple):
    fine: bool | None  # None: a note
    text: str


@command("check")
def command_check(config: Config, args: argparse.Namespace) -> int:
    """Check settings, schema, integrity, disk space and channels; exit 1 if anything is wrong."""
    checks = [*check_settings(config), *check_database(config)]
    for one in checks:
        print(f"{'·' if one.fine is None else '✓' if one.fine else '✗'} {one.text}")
    return FAILED if any(one.fine is False for one in checks) else OK


def check_settings(config: Config) -> Iterator[Check]:
    yield Check(True, f"settings: {config.public_url}, listening on {config.listen}:{config.port}")
    try:
        config.secret()
        yield Check(True, "secret: " + ("SECRET_KEY_BASE" if config.given_secret else config.secret_path))
    except Failure as failure:
        yield Check(False, f"secret: {failure}")
    for doubt in config.doubts():
        yield Check(None, f"settings: {doubt}")
    if config.password_hash:
        yield Check(True, "password: set")
    else:
        yield Check(None, "password: DASHBOARD_PASSWORD_HASH is not set: nobody can log in; see `hash-password`")
    yield from check_channels(config)
    if config.history_url != "sqlite:":
        yield check_remote(RemoteStore(config.history_url))


def check_remote(remote: RemoteStore) -> Check:
    """Whether the store of the history answers."""
    try:
        remote.query("vector(1)", time.time())
        return Check(True, f"history: {remote.shown} answers")
    except Problem as problem:
        return Check(False, f"history: {problem.detail}")


def check_channels(config: Config) -> Iterator[Check]:
    """server.toml, and whether each channel can be reached; nothing is sent."""
    try:
        settings = load_settings(config)
    except Failure as failure:
        yield Check(False, f"rules: {failure}")
        return
    there = os.path.exists(config.settings_path)
    yield Check(True, f"rules: {config.settings_path if there else 'as shipped'}")
    if there and settings.channels and os.stat(config.settings_path).st_mode & 0o007:
        yield Check(None, f"rules: {config.settings_path} holds secrets and others can read it: chmod o=")
    if not settings.channels:
        yield Check(None, "channels: none is set up, alerts are shown on the page only")
    for channel in settings.channels:
        host = port = None
        try:
            host, port = channel_address(channel)
            socket.create_connection((host, port), timeout=5).close()
            yield Check(True, f"channel {channel.name}: {host}:{port} answers; `test-notification` sends a message")
        except OSError as error:
            yield Check(False, f"channel {channel.name}: {host}:{port}: {error.strerror or error}")
        except ValueError:  # not shown: a channel's address may be its secret
            yield Check(False, f"channel {channel.name}: its address is not one")


def channel_address(channel: Channel) -> tuple[str, int]:
    """Host and port that a channel talks to."""
    if channel.kind == "email":
        return email_server(channel.options)
    parts = urllib.parse.urlsplit(channel.options.get("url", "https://api.telegram.org"))
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


@command("test-notification", ("--channel", {"metavar": "NAME", "help": "only this one"}))
def command_test_notification(config: Config, args: argparse.Namespace) -> int:
    """Send a test message through every channel; exit 1 if any does not take it."""
    channels = [one for one in load_settings(config).channels if args.channel in (None, one.name)]
    if not channels:
        raise Failure(f"no channel {'is set up' if args.channel is None else repr(args.channel)} in "
                      f"{config.settings_path}")
    failed = 0
    for channel in channels:
        try:
            message = canary(config.public_url, time.time())
            KINDS[channel.kind].send(channel.options, "msg_" + secrets.token_hex(12), message)
            print(f"✓ {channel.name}: taken")
        except Undelivered as error:
            failed += 1
            print(f"✗ {channel.name}: {error}")
    return FAILED if failed else OK


@command("replay-rules", ("--since", {"default": "30d", "metavar": "TIME", "help": "how far back: 30d, 12h, 600s"}),
         ("--config", {"metavar": "FILE", "help": "rules to try, instead of SERVER_CONFIG; - reads them from stdin"}),
         ("--seconds", {"type": float, "metavar": "N", "help": "stop after so long and tell what was found by then"}),
         JSON_ARGUMENT)
def command_replay_rules(config: Config, args: argparse.Namespace) -> None:
    """Run the rules over the reports that are kept and say what would have fired; nothing is changed or sent."""
    found = re.fullmatch(r"(\d+)([shd])", args.since)
    if found is None:
        raise Failure("--since: a number with s, h or d, such as 30d")
    if args.config:
        config.settings_path, config.settings_given = args.config, True
    db, now = open_database(config, readonly=True), time.time()
    fleet, ends = Fleet(), time.monotonic() + (args.seconds or math.inf)
    fleet.layers = (parse_settings(sys.stdin.read()) if args.config == "-" else load_settings(config)).layers
    seconds = int(found[1]) * {"s": 1, "h": HOUR, "d": DAY}[found[2]]
    past, first = replay(db, fleet, now - seconds, now, lambda: time.monotonic() < ends)
    complete = time.monotonic() < ends
    rows = [{**alert._asdict(), "object": alert.object or None} for alert in past]
    if args.json:
        print(json.dumps({"since": first, "complete": complete, "alerts": rows}, indent=2))
        return
    if not complete:
        print(f"Stopped after {args.seconds:g} s: this is only a part.")
    reach = "no reports are kept" if first is None else f"reports since {iso_time(first)}"
    print(f"{count_of(len(rows), 'alert')} would have fired ({reach}).")
    if rows:
        print_list(rows, Past._fields, False)


def check_database(config: Config) -> Iterator[Check]:
    try:
        db = open_database(config, readonly=True)
    except Failure as failure:
        yield Check(False, f"database: {failure}")
        return
    yield Check(True, f"database: {config.database_path}, schema {schema_version(db)}")
    found = db.execute("PRAGMA quick_check").fetchone()[0]
    yield Check(found == "ok", f"integrity: {found}")
    size = os.path.getsize(config.database_path)
    free = shutil.disk_usage(os.path.dirname(config.database_path)).free
    yield Check(free > max(size, 512 << 20), f"disk: {free >> 20} MiB free, the database has {size >> 20} MiB")
    alive = get_meta(db, "alive_at")
    if alive is None or time.time() - float(alive) > 2 * MINUTE:
        yield Check(None, "server: not running")
    else:
        yield Check(True, f"server: alive {format_duration(max(0, time.time() - float(alive)))} ago")


SETTINGS_FILE = "/etc/default/proxmox-monitor"


def repair_environ() -> None:
    """Take back what a frozen binary's loader put into the environment: children would load our libraries."""
    original = os.environ.pop("LD_LIBRARY_PATH_ORIG", None)
    os.environ.pop("LD_LIBRARY_PATH", None)
    if original:
        os.environ["LD_LIBRARY_PATH"] = original
    for name in [name for name in os.environ if name.startswith("_PYI_")]:
        del os.environ[name]


def read_settings_file() -> dict[str, str]:
    """The unit's settings for a command that an operator types; {} where they are missing or not for this user."""
    try:
        with open(SETTINGS_FILE, encoding="utf-8") as handle:
            lines = [line.strip().partition("=") for line in handle if not line.lstrip().startswith(("#", ";"))]
    except OSError:
        return {}
    return {key: value[1:-1] if value[:1] in ("'", '"') and value[-1:] == value[:1] and len(value) > 1 else value
            for key, _, value in lines if key}


def read_environ() -> dict[str, str]:
    """The environment. The installed program, started without a database's place, takes the unit's settings."""
    if not getattr(sys, "frozen", False):
        return dict(os.environ)
    repair_environ()
    return dict(os.environ) if "DATABASE_PATH" in os.environ else {**read_settings_file(), **os.environ}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="proxmox-monitor-server", description="Monitor for Proxmox VE hosts.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text, arguments) in COMMANDS.items():
        subparser = commands.add_parser(name, help=text, description=text)
        for argument, settings in arguments:
            subparser.add_argument(argument, **settings)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 ok, 1 failed (one line why on stderr), 2 usage."""
    args = build_parser().parse_args(argv)
    try:
        config = Config(read_environ())
        if args.command not in AS_ROOT:
            become_owner(config.database_path)
        return COMMANDS[args.command][0](config, args) or OK
    except (Failure, Problem) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
    except sqlite3.Error as error:
        print(f"{args.command}: database: {error}", file=sys.stderr)
    except BrokenPipeError:
        sys.stderr.close()
    except KeyboardInterrupt:
        print(f"{args.command}: stopped", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
