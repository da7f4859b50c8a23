#!/usr/bin/env python3
"""Receive the signed reports of a fleet of Proxmox VE hosts, keep them, judge them, and show what is wrong.

    constants -> config -> database -> queries -> auth -> reports -> fleet -> rules -> columns -> history -> ingest
        -> jobs -> api -> page -> serving -> commands

A report comes in (ingest), is checked against its signature (auth) and its shape (reports), and is written by the
one writer (database) together with all that follows from it: the latest state (fleet), alerts (rules) and
history. Whoever asks (api, page, commands) reads the state in memory or asks the database (queries).
"""

from __future__ import annotations

import argparse
import base64
import bisect
import csv
import getpass
import hashlib
import hmac
import io
import ipaddress
import json
import math
import os
import queue
import re
import secrets
import shutil
import signal
import sqlite3
import struct
import sys
import threading
import time
import traceback
import urllib.parse
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import accumulate, compress, islice
from typing import Any, NamedTuple

import argon2
import bottle
import waitress
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask

# --- constants: version, limits, exit codes ---

VERSION = "0.1.0"
MINUTE, HOUR, DAY = 60, 3600, 86400

SENT_LIMIT = 2 << 20  # bytes of one request as sent
BUFFERED_LIMIT = 64 << 20  # what waitress takes in before it hangs up: up to here a sender gets our `too_large`
UNPACKED_LIMIT = 32 << 20  # bytes of one request unpacked: a gzip bomb ends here
BATCH_LIMIT = 500  # reports in one request
NESTING_LIMIT = 32  # a pool's vdev tree needs about 8
SKEW_LIMIT = 300  # seconds between a signature's time and ours
REPORTS_BURST, REPORTS_PER_SECOND = 5000, 200  # per host; a backlog of a week is 20,160 reports
QUEUE_LIMIT = 5000  # writes that may wait for the writer
COMMIT_INTERVAL = 0.05  # seconds: under a steady load reports that come closer together share one flush to the disk
FLUSHES_SAVED = 1000

STALE_SECONDS, OFFLINE_SECONDS = 2 * MINUTE, 5 * MINUTE
KEEP_EVENTS = 90 * DAY
KEEP_RESOLVED = 90 * DAY
SESSION_SECONDS = 7 * DAY
LIST_LIMIT, LIST_MOST = 200, 10_000

OK, FAILED, USAGE = 0, 1, 2

VERDICTS = ("critical", "offline", "warning", "stale", "unknown", "info", "maintenance", "ok")  # worst first
SEVERITIES = ("critical", "warning", "info")
HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Failure(Exception):
    """Something an operator has to know, told in one line."""


class Problem(Exception):
    """An answer that is an error: RFC 9457, with a stable `code`."""

    STATUS = {
        "invalid_request": 400, "invalid_json": 400, "invalid_token": 401, "clock_skew": 401, "unauthorized": 401,
        "forbidden": 403, "not_found": 404, "unknown_host": 404, "method_not_allowed": 405, "conflict": 409,
        "too_large": 413, "unsupported_media_type": 415, "host_mismatch": 422, "invalid_report": 422,
        "rate_limited": 429, "storage_full": 503, "busy": 503,
    }
    TITLE = {
        "invalid_request": "The request is not understood", "invalid_json": "The body is not JSON",
        "invalid_token": "The signature is missing or wrong", "clock_skew": "The sender's clock is off",
        "unauthorized": "Log in first", "forbidden": "Not allowed", "not_found": "No such thing",
        "unknown_host": "No such host", "method_not_allowed": "Method not allowed", "conflict": "Already there",
        "too_large": "Too large", "unsupported_media_type": "Unsupported media type",
        "host_mismatch": "The report names another host", "invalid_report": "Not a report",
        "rate_limited": "Too many requests", "storage_full": "The disk is full", "busy": "Busy",
    }

    def __init__(self, code: str, detail: str, *, headers: dict[str, str] | None = None, **extra: Any):
        super().__init__(detail)
        self.code, self.detail, self.headers, self.extra = code, detail, headers or {}, extra
        self.status = self.STATUS[code]

    def body(self) -> bytes:
        """The problem document."""
        document = {"type": "about:blank", "status": self.status, "title": self.TITLE[self.code],
                    "detail": self.detail, "code": self.code, **self.extra}
        return json.dumps(document).encode()


# --- config: settings from the environment ---


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
        self.history_url = env.get("HISTORY_URL") or "sqlite:"
        self.given_secret = env.get("SECRET_KEY_BASE") or ""
        self.install_dir = env.get("INSTALL_DIR") or default_install_dir()
        if self.history_url != "sqlite:":
            raise Failure(f"HISTORY_URL: {self.history_url!r} is not supported by this version; leave it out, or "
                          "set it to sqlite: (history is then kept in the database)")
        if self.password_hash and not self.password_hash.startswith("$argon2id$"):
            raise Failure("DASHBOARD_PASSWORD_HASH: not an Argon2id hash; make one with `hash-password`")
        if self.given_secret and len(self.given_secret) < 32:
            raise Failure("SECRET_KEY_BASE: shorter than 32 characters; make one with `generate-secret`")

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
            with open(self.secret_path, encoding="ascii") as handle:
                text = handle.read().strip()
        except FileNotFoundError:
            text = create_secret_file(self.secret_path)
        except OSError as error:
            raise Failure(f"{self.secret_path}: {error.strerror}") from None
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
        parts = urllib.parse.urlsplit(text)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Failure(f"PUBLIC_URL: {text!r} is not an http(s) address")
        return text.rstrip("/")

    @staticmethod
    def _networks(text: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        try:
            return [ipaddress.ip_network(part.strip(), strict=False) for part in text.split(",") if part.strip()]
        except ValueError as error:
            raise Failure(f"TRUSTED_PROXY: {error}") from None


def create_secret_file(path: str) -> str:
    """Write a new secret, 0600, and give it back; the first of two processes wins."""
    partial_path = f"{path}.{os.getpid()}"
    with open(os.open(partial_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
        handle.write(secrets.token_urlsafe(48) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    try:
        os.link(partial_path, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(partial_path)
    give_to_owner(path)
    with open(path, encoding="ascii") as handle:
        return handle.read().strip()


def give_to_owner(path: str) -> None:
    """What root makes in the service's directory belongs to the service's user, or the service could not read it."""
    owner = os.stat(os.path.dirname(path) or ".")
    if os.geteuid() == 0 and owner.st_uid != 0 and os.stat(path).st_uid == 0:
        os.chown(path, owner.st_uid, owner.st_gid)


def default_install_dir() -> str:
    """Where the agent's binaries lie that hosts are installed from: of the release, else of this checkout."""
    released = "/usr/local/share/proxmox-monitor"
    return released if os.path.isdir(released) else resource("dist")


def resource(*names: str) -> str:
    """Path of a file that belongs to the program, also inside a PyInstaller bundle."""
    root = getattr(sys, "_MEIPASS", os.path.dirname(os.path.abspath(__file__)))
    return os.path.join(root, *names)


def log(message: str) -> None:
    """One line for the journal, whatever a hostile name holds."""
    print("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in message), flush=True)


# --- database: connections, migrations, and the one writer ---


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


def connect(path: str, *, readonly: bool = False) -> sqlite3.Connection:
    """Open the database; the caller says BEGIN. `Failure` when there is none to read."""
    address = f"file:{urllib.parse.quote(path)}?mode={'ro' if readonly else 'rwc'}"
    try:
        db = sqlite3.connect(address, uri=True, timeout=5, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        if not readonly:
            if not os.path.getsize(path):
                db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only works before the first table
            os.chmod(path, 0o600)
            give_to_owner(path)
            db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # an answer of 200 means the report is on the disk
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA temp_store = MEMORY")
        return db
    except sqlite3.Error as error:
        raise Failure(f"{path}: {error}") from None
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Everything inside is written, or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def schema_version(db: sqlite3.Connection) -> int:
    return db.execute("PRAGMA user_version").fetchone()[0]


def is_empty(db: sqlite3.Connection) -> bool:
    return not schema_version(db) and not db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone()


def check_schema(db: sqlite3.Connection) -> None:
    """`Failure` that says in one line what to do when the schema is not this program's."""
    have, want = schema_version(db), len(load_migrations())
    if have > want:
        raise Failure(f"the database has schema {have}, this is version {VERSION} with schema {want}: too old for it")
    if have < want:
        raise Failure(f"the database has schema {have}, this version needs {want}: run `migrate`")


def migrate(db: sqlite3.Connection, migrations: list[Migration]) -> int:
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


def rollback(db: sqlite3.Connection, migrations: list[Migration], *, to: int) -> int:
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
    """One piece of work for the writer: `work(db)` runs inside the transaction, `result()` waits for the commit."""

    __slots__ = ("work", "urgent", "done", "value", "error")

    def __init__(self, work: Callable[[sqlite3.Connection], Any], urgent: bool):
        self.work, self.urgent = work, urgent
        self.done = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None

    def result(self) -> Any:
        self.done.wait()
        if self.error is not None:
            raise self.error
        return self.value


class Store:
    """The database of a running server: one thread writes in groups, every other thread reads for itself.

    `on_failure` is called when a commit failed: what was derived in memory is then ahead of the disk.
    """

    def __init__(self, path: str, on_failure: Callable[[], None] = lambda: None):
        self.path, self.on_failure = path, on_failure
        self.db = connect(path)
        self.last_commit = 0.0  # monotonic
        self._flushes = float(FLUSHES_SAVED)
        self.last_error: str | None = None
        self._queue: queue.Queue[Write | None] = queue.Queue(QUEUE_LIMIT)
        self._local = threading.local()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._closed = False
        self._astray = False  # a fault in our own code may have left memory ahead of the disk
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def reader(self) -> sqlite3.Connection:
        """This thread's own connection, read-only."""
        if not hasattr(self._local, "db"):
            self._local.db = connect(self.path, readonly=True)
        return self._local.db

    def write(self, work: Callable[[sqlite3.Connection], Any], *, urgent: bool = True) -> Any:
        """Run `work(db)` in the next transaction, wait until it is on the disk, give back what it returned."""
        if not self.alive:
            raise Problem("busy", "the server is stopping", headers={"Retry-After": "5"})
        write = Write(work, urgent)
        try:
            self._queue.put_nowait(write)
        except queue.Full:
            raise Problem("busy", "too many reports at once", headers={"Retry-After": "5"}) from None
        return write.result()

    def close(self) -> None:
        """Finish what waits, then stop."""
        self._closed = True
        self._queue.put(None)
        self._thread.join(10)
        self.db.close()

    def _run(self) -> None:
        while True:
            first = self._queue.get()
            if first is None:
                return
            group = self._gather(first)
            self._commit([write for write in group if write])
            if None in group:
                return

    def _gather(self, first: Write) -> list[Write | None]:
        """What has come in by now. Under a steady load reports wait for company, as each flush wears flash; a short
        rush does not have to: flushes not used are saved up."""
        waited = time.monotonic() - self.last_commit
        self._flushes = min(FLUSHES_SAVED, self._flushes + waited / COMMIT_INTERVAL)
        if self._flushes >= 1:
            self._flushes -= 1
        elif not first.urgent:
            time.sleep(max(0.0, COMMIT_INTERVAL - waited))
            self._flushes = 0.0
        group: list[Write | None] = [first]
        while len(group) < QUEUE_LIMIT:
            try:
                group.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return group

    def _commit(self, group: list[Write]) -> None:
        """One transaction for the group; one that fails in its own work leaves the others alone."""
        try:
            with transaction(self.db) as db:
                for write in group:
                    self._attempt(db, write)
            self.last_commit, self.last_error = time.monotonic(), None
            if self._astray:
                self.on_failure()
                self._astray = False
        except Exception as error:  # whatever it is, nobody of the group may wait for ever
            self.last_error = f"{type(error).__name__}: {error}"
            log(f"writer: {self.last_error}")
            for write in group:
                write.error = store_problem(error)
            self.on_failure()
        for write in group:
            write.done.set()

    def _attempt(self, db: sqlite3.Connection, write: Write) -> None:
        db.execute("SAVEPOINT one")
        try:
            write.value = write.work(db)
        except sqlite3.Error:
            raise  # the database's trouble is everybody's
        except Exception as error:
            write.error = error
            db.execute("ROLLBACK TO one")
            self._astray = self._astray or not isinstance(error, (Problem, Failure))
        db.execute("RELEASE one")


def store_problem(error: Exception) -> Problem:
    """What the sender is told when a commit failed: it keeps the report and comes again."""
    if "full" in str(error):
        return Problem("storage_full", "the server's disk is full", headers={"Retry-After": "60"})
    return Problem("busy", "the database could not be written", headers={"Retry-After": "10"})


# --- queries: one function per question, its SQL in full beside it ---


def find_host(db: sqlite3.Connection, name: str) -> sqlite3.Row | None:
    return db.execute("SELECT * FROM host WHERE name = :name", {"name": name}).fetchone()


def list_host_records(db: sqlite3.Connection) -> list[sqlite3.Row]:
    """Every registered host with the time anything was last received from it."""
    return db.execute("""
        SELECT host.*, (SELECT max(last_seen_at) FROM run WHERE run.host_id = host.id) AS last_seen_at
        FROM host ORDER BY name""").fetchall()


def required_host(db: sqlite3.Connection, name: str) -> sqlite3.Row:
    """The host's row; `Problem('unknown_host')` if there is none."""
    row = find_host(db, name)
    if row is None:
        raise Problem("unknown_host", f"no host '{name}' is registered")
    return row


def checked_host_name(name: Any) -> str:
    """The name, if it may be one."""
    if not isinstance(name, str) or not HOST_NAME.fullmatch(name):
        rule = "a host's name has 1-63 of a-z A-Z 0-9 . _ - and begins with a letter or digit"
        raise Problem("invalid_request", rule, pointer="/name")
    return name


def insert_host(db: sqlite3.Connection, name: Any, now: float, *, site: str | None = None,
                tags: list[str] | None = None) -> sqlite3.Row:
    """Register a host with a fresh nonce. `Problem`: invalid_request or conflict."""
    if find_host(db, checked_host_name(name)):
        raise Problem("conflict", f"host '{name}' is already registered")
    db.execute("""
        INSERT INTO host (name, nonce, site, tags, created_at) VALUES (:name, :nonce, :site, :tags, :now)""",
        {"name": name, "nonce": secrets.token_bytes(32), "site": site, "tags": json.dumps(tags or []), "now": now})
    insert_event(db, now, "host-registered", f"Host {name} registered", host=name)
    hosts_changed(db)
    return required_host(db, name)


def rotate_nonce(db: sqlite3.Connection, name: str, now: float) -> sqlite3.Row:
    """A new nonce: from here on the old token is refused."""
    row = required_host(db, name)
    db.execute("UPDATE host SET nonce = :nonce, rotated_at = :now WHERE id = :id",
               {"nonce": secrets.token_bytes(32), "now": now, "id": row["id"]})
    insert_event(db, now, "token-rotated", f"Token of {row['name']} rotated", host=row["name"])
    return required_host(db, name)


def update_host(db: sqlite3.Connection, name: str, changes: dict[str, Any], now: float) -> sqlite3.Row:
    """Change name, site, tags, note or maintenance_until. The nonce stays, so the token stays with a new name."""
    row = required_host(db, name)
    new = checked_host_name(changes.get("name", row["name"]))
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
    hosts_changed(db)
    return required_host(db, new)


def delete_host(db: sqlite3.Connection, name: str, now: float) -> None:
    """Forget a host with all it has sent; the events stay."""
    row = required_host(db, name)
    first, last = report_span(row["id"], 0, None)
    for table in ("report", "kept_report"):  # its chunks go bit by bit: see expire()
        db.execute(f"DELETE FROM {table} WHERE id BETWEEN :first AND :last", {"first": first, "last": last})
    db.execute("DELETE FROM host WHERE id = :id", {"id": row["id"]})
    insert_event(db, now, "host-removed", f"Host {row['name']} removed", host=row["name"])
    hosts_changed(db)


def hosts_changed(db: sqlite3.Connection) -> None:
    """Tell a running server, also from another process, that the table of hosts is not what it read."""
    db.execute("""
        INSERT INTO meta VALUES ('hosts_version', '1')
        ON CONFLICT (key) DO UPDATE SET value = CAST(value AS INTEGER) + 1""")


def get_meta(db: sqlite3.Connection, key: str) -> str | None:
    row = db.execute("SELECT value FROM meta WHERE key = :key", {"key": key}).fetchone()
    return row[0] if row else None


def set_meta(db: sqlite3.Connection, key: str, value: Any) -> None:
    db.execute("INSERT INTO meta VALUES (:key, :value) ON CONFLICT (key) DO UPDATE SET value = :value",
               {"key": key, "value": str(value)})


def insert_event(db: sqlite3.Connection, at: float, kind: str, message: str, *, host: str | None = None,
                 object: str | None = None) -> None:
    db.execute("INSERT INTO event (at, kind, host, object, message) VALUES (:at, :kind, :host, :object, :message)",
               {"at": at, "kind": kind, "host": host, "object": object, "message": message})


def list_events(db: sqlite3.Connection, *, since: float, limit: int) -> list[dict[str, Any]]:
    """What changed since then, newest first."""
    return [dict(row) for row in db.execute("""
        SELECT id, at, kind, host, object, message FROM event
        WHERE at >= :since ORDER BY id DESC LIMIT :limit""", {"since": since, "limit": limit})]


ALERT_SELECT = """
    SELECT alert.id, rule, severity, state, host.name AS host, object, message, value, since, resolved_at,
           NULL AS acknowledged, because_of
    FROM alert JOIN host ON host.id = alert.host_id"""


def list_alerts(db: sqlite3.Connection, state: str = "firing", *, limit: int = LIST_MOST) -> list[dict[str, Any]]:
    """Alerts worst first, then newest; `state`: pending, firing, resolved or all."""
    order = "CASE severity WHEN 'critical' THEN 0 WHEN 'warning' THEN 1 ELSE 2 END, since DESC, alert.id"
    if state == "resolved":
        order = "resolved_at DESC"
    return [dict(row) for row in db.execute(f"""
        {ALERT_SELECT} WHERE :state IN ('all', state) ORDER BY {order} LIMIT :limit""",
        {"state": state, "limit": limit})]


def missing_reports(db: sqlite3.Connection, host_id: int) -> int:
    """How many reports of a host never came: holes in the sequence numbers of each run of its agent."""
    rows = db.execute("SELECT ranges FROM run WHERE host_id = :id", {"id": host_id})
    return sum(ranges[-1][1] - sum(last - first + 1 for first, last in ranges)
               for ranges in (parse_ranges(row[0]) for row in rows))


def find_report(db: sqlite3.Connection, report_id: int) -> sqlite3.Row | None:
    """A report by its id, wherever it is kept."""
    return db.execute("""
        SELECT * FROM report WHERE id = :id UNION ALL SELECT * FROM kept_report WHERE id = :id""",
        {"id": report_id}).fetchone()


def parse_ranges(text: str) -> list[list[int]]:
    """'1-3,7' -> [[1, 3], [7, 7]]"""
    spans = (part.partition("-") for part in text.split(","))
    return [[int(first), int(last or first)] for first, _, last in spans]


def format_ranges(ranges: list[list[int]]) -> str:
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def add_to_ranges(ranges: list[list[int]], number: int) -> bool:
    """Put a number into sorted, disjoint ranges; False if it was there."""
    at = bisect.bisect_right(ranges, number, key=lambda span: span[0])
    if at and number <= ranges[at - 1][1]:
        return False
    joins_left = at > 0 and ranges[at - 1][1] == number - 1
    joins_right = at < len(ranges) and ranges[at][0] == number + 1
    if joins_left and joins_right:
        ranges[at - 1][1] = ranges.pop(at)[1]
    elif joins_left:
        ranges[at - 1][1] = number
    elif joins_right:
        ranges[at][0] = number
    else:
        ranges.insert(at, [number, number])
    return True


# --- auth: host keys and signatures, API tokens, passwords, sessions ---


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


def create_api_token(db: sqlite3.Connection, name: Any, now: float, *, admin: bool, days: float | None) -> str:
    """A new token, shown this once. `Problem`: invalid_request or conflict."""
    if not isinstance(name, str) or not HOST_NAME.fullmatch(name):
        raise Problem("invalid_request", "a token's name has 1-63 of a-z A-Z 0-9 . _ -", pointer="/name")
    if db.execute("SELECT 1 FROM api_token WHERE name = :name", {"name": name}).fetchone():
        raise Problem("conflict", f"there is an API token '{name}' already")
    token = "pxm_" + secrets.token_urlsafe(32)
    db.execute("INSERT INTO api_token VALUES (:name, :hash, :admin, :now, :expires)",
               {"name": name, "hash": token_hash(token), "admin": int(admin), "now": now,
                "expires": now + days * DAY if days else None})
    insert_event(db, now, "token-created", f"API token {name} created")
    return token


def revoke_api_token(db: sqlite3.Connection, name: str, now: float) -> None:
    if not db.execute("DELETE FROM api_token WHERE name = :name", {"name": name}).rowcount:
        raise Problem("not_found", f"no API token '{name}'")
    insert_event(db, now, "token-revoked", f"API token {name} revoked")


def list_api_tokens(db: sqlite3.Connection) -> list[dict[str, Any]]:
    return [{**dict(row), "admin": bool(row["admin"])} for row in db.execute(
        "SELECT name, admin, created_at, expires_at FROM api_token ORDER BY name")]


def find_api_token(db: sqlite3.Connection, token: str, now: float) -> sqlite3.Row | None:
    return db.execute("""
        SELECT * FROM api_token WHERE hash = :hash AND (expires_at IS NULL OR expires_at > :now)""",
        {"hash": token_hash(token), "now": now}).fetchone()


def create_session(db: sqlite3.Connection, now: float, address: str, user_agent: str) -> str:
    """A new session; gives back the cookie's value."""
    cookie = secrets.token_urlsafe(32)
    db.execute("INSERT INTO session VALUES (:hash, :now, :now, :address, :user_agent)",
               {"hash": token_hash(cookie), "now": now, "address": address, "user_agent": user_agent[:200]})
    insert_event(db, now, "login", f"Log-in from {address}")
    return cookie


def find_session(db: sqlite3.Connection, cookie: str, now: float) -> sqlite3.Row | None:
    return db.execute("SELECT * FROM session WHERE hash = :hash AND used_at > :since",
                      {"hash": token_hash(cookie), "since": now - SESSION_SECONDS}).fetchone()


def list_sessions(db: sqlite3.Connection, now: float) -> list[dict[str, Any]]:
    """The living sessions; `id` is the beginning of the hash, from which no cookie can be made."""
    return [dict(row) for row in db.execute("""
        SELECT lower(hex(substr(hash, 1, 8))) AS id, created_at, used_at, address, user_agent FROM session
        WHERE used_at > :since ORDER BY used_at DESC""", {"since": now - SESSION_SECONDS})]


def delete_session(db: sqlite3.Connection, session_id: str) -> int:
    """End the session with this public id; gives back how many that were."""
    return db.execute("DELETE FROM session WHERE lower(hex(substr(hash, 1, 8))) = :id", {"id": session_id}).rowcount


def csrf_token(secret: bytes, cookie: str) -> str:
    """What a page must send back with its writes; bound to the session, kept nowhere."""
    return hmac.digest(secret, b"proxmon csrf\0" + cookie.encode(), "sha256").hex()


PASSWORDS = argon2.PasswordHasher()
VERIFYING = threading.BoundedSemaphore(2)  # each takes 64 MiB


def verify_password(encoded: str, password: str) -> bool:
    """Argon2id, never more than two at once. No hash set: nobody gets in."""
    if not encoded:
        return False
    with VERIFYING:
        try:
            return PASSWORDS.verify(encoded, password)
        except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
            return False


class LoginLimiter:
    """After 5 failures from an address, and after 50 from everywhere, each further try has to wait longer:
    1, 2, 4 … 900 s. A success clears the address; 15 minutes without a failure clear everything."""

    FREE, FREE_GLOBAL, MOST, FORGET = 5, 50, 900, 900
    EVERYWHERE = "*"

    def __init__(self) -> None:
        self._failures: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def wait_seconds(self, address: str, now: float) -> int:
        """How long this address has to wait before its next try counts; 0 = not at all."""
        with self._lock:
            return max(self._wait(address, self.FREE, now), self._wait(self.EVERYWHERE, self.FREE_GLOBAL, now))

    def failed(self, address: str, now: float) -> None:
        with self._lock:
            if len(self._failures) > 10_000:
                self._failures = {a: f for a, f in self._failures.items() if f[1] + self.FORGET > now}
            for key in (address, self.EVERYWHERE):
                count, last = self._failures.get(key, (0, now))
                self._failures[key] = (count + 1 if last + self.FORGET > now else 1, now)

    def succeeded(self, address: str) -> None:
        with self._lock:
            self._failures.pop(address, None)

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

ENVELOPE = frozenset(("version", "host_id", "tick", "time", "run_id", "seq", "agent", "absent", "errors"))
SECTION_TYPES: dict[str, type] = {
    "node": dict, "cluster": dict, "guests": list, "storages": list, "pool_states": list, "tasks": list,
    "pools": list, "datasets": list, "backups": dict, "replication": list, "ha": dict, "time_sync": dict,
    "snapshots": list, "disks": list, "updates": dict, "certificates": list, "subscription": dict,
    "versions": dict, "ceph": dict,
}
KEY_FIELDS: dict[str, tuple[str, type]] = {
    "guests": ("vmid", int), "storages": ("storage", str), "pool_states": ("name", str), "pools": ("name", str),
    "datasets": ("name", str), "disks": ("name", str), "snapshots": ("dataset", str), "tasks": ("upid", str),
    "replication": ("id", str),
}
NUMBER_SUFFIXES = ("_bytes", "_seconds", "_ratio", "_celsius", "_at", "_total")
NUMBER_NAMES = frozenset((
    "vmid", "cpu_count", "load1", "load5", "load15", "read_errors", "write_errors", "checksum_errors", "slow_ios",
    "data_errors", "redundancy_margin", "votes_expected", "votes_present", "votes_needed", "power_on_hours",
    "reallocated_sectors", "pending_sectors", "uncorrectable_errors", "crc_errors", "media_errors", "fail_count",
))
NUMBER_MOST = 1 << 64  # counters are unsigned 64 bit at the most


class BadReport(Exception):
    """Where in the report something is wrong (steps from its root), and what."""

    def __init__(self, steps: list[Any], detail: str):
        super().__init__(detail)
        self.steps, self.detail = steps, detail


def unpack(body: bytes, encoding: str) -> bytes:
    """The body without its gzip; never more than 32 MiB. `Problem`: too_large, invalid_json."""
    if encoding != "gzip":
        return body
    try:
        unpacker = zlib.decompressobj(31)
        text = unpacker.decompress(body, UNPACKED_LIMIT)
    except zlib.error:
        raise Problem("invalid_json", "the body is not gzip, though Content-Encoding says so") from None
    if unpacker.unconsumed_tail:
        raise Problem("too_large", f"unpacked it is more than {UNPACKED_LIMIT} bytes")
    if not unpacker.eof or unpacker.unused_data:
        raise Problem("invalid_json", "the gzip stream is cut off, or something follows it")
    return text


def parse_json(text: bytes) -> Any:
    """JSON and nothing but: no NaN, no endless nesting, no half of a surrogate pair. `Problem('invalid_json')`."""
    try:
        parsed = json.loads(text.decode("utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError, and integers of thousands of digits
        raise Problem("invalid_json", f"the body is not JSON: {str(error)[:200]}") from None
    if has_surrogates(text):
        parsed = without_surrogates(parsed)
    return parsed


def has_surrogates(text: bytes) -> bool:
    """Whether JSON text may hold halves of surrogate pairs."""
    return b"\\ud" in text or b"\\uD" in text


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def without_surrogates(value: Any, depth: int = 0) -> Any:
    """Half a surrogate pair cannot be written as UTF-8 by anybody after us; names with broken bytes have them."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if depth > NESTING_LIMIT:
        return value  # refused by misfit()
    if isinstance(value, list):
        return [without_surrogates(one, depth + 1) for one in value]
    if isinstance(value, dict):
        return {without_surrogates(k): without_surrogates(v, depth + 1) for k, v in value.items()}
    return value


def check_reports(parsed: Any, host_name: str) -> list[dict[str, Any]]:
    """The reports of one request, oldest first. `Problem`: invalid_report with a JSON pointer, or host_mismatch."""
    batch = parsed if isinstance(parsed, list) else [parsed]
    if not 1 <= len(batch) <= BATCH_LIMIT:
        raise Problem("invalid_report", f"1 to {BATCH_LIMIT} reports in one request, not {len(batch)}", pointer="")
    for number, report in enumerate(batch):
        steps = [number] if isinstance(parsed, list) else []
        try:
            check_report(report)
        except BadReport as bad:
            raise Problem("invalid_report", bad.detail, pointer=json_pointer(steps + bad.steps)) from None
        if report["host_id"].lower() != host_name.lower():
            raise Problem("host_mismatch", f"the report is of another host than {host_name}",
                          pointer=json_pointer([*steps, "host_id"]))
    return batch


def json_pointer(steps: list[Any]) -> str:
    """RFC 6901"""
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in steps)


def check_report(report: Any) -> None:
    """`BadReport` unless this is a report as docs/report.schema.json has it. Unknown sections and fields pass."""
    if not isinstance(report, dict):
        raise BadReport([], "a report is an object")
    check_envelope(report)
    for name, value in report.items():
        if name not in ENVELOPE:
            check_section(name, value)
        wrong = misfit({name: value}, strict=name in SECTION_TYPES)
        if wrong is not None:
            raise BadReport(wrong[:-1], wrong[-1])


def check_envelope(report: dict[str, Any]) -> None:
    required: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("version", lambda v: type(v) is int and v == 1, "the report's version is 1"),
        ("host_id", lambda v: isinstance(v, str) and bool(v), "a host's name"),
        ("tick", lambda v: v in ("fast", "medium", "slow"), "fast, medium or slow"),
        ("time", lambda v: is_number(v) and 0 <= v < 1e11, "unix seconds"),
        ("run_id", lambda v: isinstance(v, str) and 0 < len(v) <= 128, "1 to 128 characters"),
        ("seq", lambda v: type(v) is int and 1 <= v < 1 << 53, "a whole number from 1"),
    )
    for name, fits, wanted in required:
        if name not in report:
            raise BadReport([], f"{name} is missing")
        if not fits(report[name]):
            raise BadReport([name], f"should be: {wanted}")
    absent, errors = report.get("absent"), report.get("errors")
    if not isinstance(report.get("agent", {}), dict):
        raise BadReport(["agent"], "should be an object")
    if absent is not None and not (isinstance(absent, list) and all(isinstance(one, str) for one in absent)):
        raise BadReport(["absent"], "should be a list of section names")
    if errors is not None and not (isinstance(errors, dict) and all(isinstance(e, dict) for e in errors.values())):
        raise BadReport(["errors"], "should be {section: {code, detail}}")


def check_section(name: str, value: Any) -> None:
    wanted = SECTION_TYPES.get(name)
    if wanted is None:
        return
    if type(value) is not wanted:
        raise BadReport([name], f"should be {'an object' if wanted is dict else 'a list'}")
    if isinstance(value, list):
        key, key_type = KEY_FIELDS.get(name, (None, None))
        for number, one in enumerate(value):
            if type(one) is not dict:
                raise BadReport([name, number], "should be an object")
            if key is not None and type(one.get(key)) is not key_type:
                raise BadReport([name, number, key], f"should be {'a number' if key_type is int else 'text'}")


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and -NUMBER_MOST <= value <= NUMBER_MOST


@lru_cache(4096)
def names_a_number(key: str) -> bool:
    """Units are in the names, so the name tells that a number belongs here."""
    return key.endswith(NUMBER_SUFFIXES) or key in NUMBER_NAMES


def misfit(value: Any, *, strict: bool, depth: int = 0) -> list[Any] | None:
    """The way to the first value that cannot be kept, with the reason as its last step; None if all is well.
    `strict`: also text or a truth value where the name says that it is a number."""
    if depth > NESTING_LIMIT:
        return ["nested too deeply"]
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    for key, one in pairs:
        kind = type(one)
        if kind is dict or kind is list:
            wrong = misfit(one, strict=strict, depth=depth + 1)
            if wrong is not None:
                return [key, *wrong]
        elif kind is int or kind is float:
            if not -NUMBER_MOST <= one <= NUMBER_MOST:
                return [key, "not a number that can be kept"]
        elif strict and one is not None and type(key) is str and names_a_number(key):
            return [key, "should be a number or null"]
    return None


# --- fleet: the latest state of every host, in memory, and the rows made from it ---


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

    body: Any = None
    stamp: Stamp | None = None
    status: Stamp | None = None
    absent: bool = False
    error: dict[str, Any] | None = None

    @property
    def time(self) -> float | None:
        """When the value was true: the section's own `as_of` where it has one."""
        if self.stamp is None:
            return None
        as_of = self.body.get("as_of") if isinstance(self.body, dict) else None
        return min(as_of, self.stamp.time) if as_of is not None and is_number(as_of) else self.stamp.time


class Alert:
    """An open alert: pending or firing."""

    __slots__ = ("id", "rule", "object", "severity", "state", "message", "value", "since", "fired_at")

    def __init__(self, rule: str, object: str, severity: str, message: str, value: float | None, since: float, *,
                 id: int | None = None, state: str = "pending", fired_at: float | None = None):
        self.id, self.rule, self.object, self.severity, self.state = id, rule, object, severity, state
        self.message, self.value, self.since, self.fired_at = message, value, since, fired_at


class HostState:
    """All the server knows of one host. The writer changes it; others read: containers are replaced, not changed."""

    def __init__(self, record: sqlite3.Row):
        self.id: int = record["id"]
        self.sections: dict[str, Section] = {}
        self.alerts: dict[tuple[str, str], Alert] = {}
        self.agent: dict[str, Any] = {}
        self.stamp: Stamp | None = None  # of the newest report
        self.clock_ahead: float | None = None
        self.last_seen_at: float | None = record["last_seen_at"]
        self.generation = 0
        self.set_record(record)

    def set_record(self, record: sqlite3.Row) -> None:
        """Take over what an administrator may change."""
        self.name: str = record["name"]
        self.site: str | None = record["site"]
        self.tags: list[str] = json.loads(record["tags"])
        self.note: str | None = record["note"]
        self.maintenance_until: float | None = record["maintenance_until"]
        self.generation += 1

    def body(self, section: str, default: Any = None) -> Any:
        """The latest value of a section."""
        found = self.sections.get(section)
        return default if found is None or found.body is None else found.body

    def apply(self, report: dict[str, Any], stamp: Stamp) -> list[str]:
        """Take over what is newer than what is there; gives back the sections whose value changed hands."""
        sections, changed = dict(self.sections), []
        for name in report.keys() - ENVELOPE:
            if stamp.newer_than(sections.get(name, NOTHING).status):
                sections[name] = Section(report[name], stamp, stamp)
                changed.append(name)
        for name in report.get("absent") or ():
            if stamp.newer_than(sections.get(name, NOTHING).status):
                sections[name] = Section(None, None, stamp, absent=True)
                changed.append(name)
        for name, error in (report.get("errors") or {}).items():
            old = sections.get(name, NOTHING)
            if old.status == stamp or stamp.newer_than(old.status):  # part of a section may come with an error
                sections[name] = old._replace(status=stamp, error={**error, "time": stamp.time}, absent=False)
        self.sections = sections
        if stamp.newer_than(self.stamp):
            self.stamp, self.agent = stamp, report.get("agent") or {}
            ahead = report["time"] - stamp.received_at
            self.clock_ahead = ahead if ahead > 2 else None
        self.last_seen_at = max(self.last_seen_at or 0.0, stamp.received_at)
        self.generation += 1
        return changed

    def pointers(self) -> dict[str, list[int | None]]:
        """Which reports hold the latest state: what is needed to build it again."""
        kept = {"": [self.stamp.report_id, None]} if self.stamp else {}
        for name, section in self.sections.items():
            kept[name] = [section.stamp and section.stamp.report_id, section.status and section.status.report_id]
        return kept


NOTHING = Section()


class Fleet:
    """Every registered host's state, built from the database at start and kept by the writer from then on."""

    def __init__(self) -> None:
        self.hosts: dict[int, HostState] = {}
        self.generation = 0
        self.hosts_version = 0
        self.lock = threading.Lock()
        self.serving_since = 0.0  # silence is counted from here at the earliest

    def load(self, db: sqlite3.Connection) -> None:
        """Build everything anew."""
        hosts = {}
        for record in list_host_records(db):
            state = hosts[record["id"]] = HostState(record)
            load_sections(db, state)
            load_alerts(db, state)
        self.hosts, self.hosts_version = hosts, int(get_meta(db, "hosts_version") or 0)
        self.generation += 1

    def refresh(self, db: sqlite3.Connection) -> None:
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
            self.hosts, self.hosts_version = hosts, version
            self.generation += 1

    def sorted(self, now: float) -> list[HostState]:
        """Worst first, then the longest silent, then by name."""
        def order(state: HostState) -> tuple[int, float, str]:
            return VERDICTS.index(self.verdict(state, now)[0]), state.last_seen_at or 0.0, state.name.lower()
        return sorted(self.hosts.values(), key=order)

    def find(self, name: str) -> HostState:
        """The state of the host with this name, whatever its case. `Problem('not_found')`."""
        for state in self.hosts.values():
            if state.name.lower() == name.lower():
                return state
        raise Problem("not_found", f"no host '{name}' is registered")

    def silent_seconds(self, state: HostState, now: float) -> float | None:
        """Since when nothing has come, by our own clock; None before the first report. An outage of the server
        is no silence of the host."""
        if state.last_seen_at is None:
            return None
        return max(0.0, now - max(state.last_seen_at, self.serving_since))

    def verdict(self, state: HostState, now: float) -> tuple[str, str]:
        """What is to be thought of a host, in a word and a sentence."""
        silent = self.silent_seconds(state, now)
        if state.maintenance_until and state.maintenance_until > now:
            return "maintenance", "In maintenance."
        if silent is None:
            return "unknown", "No report has come yet."
        if silent >= OFFLINE_SECONDS:
            return "offline", f"Nothing received for {format_duration(silent)}."
        worst, reason = worst_alert(state.alerts.values())
        if worst == "critical":
            return worst, reason
        if silent >= STALE_SECONDS:
            return "stale", f"Nothing received for {format_duration(silent)}; what is shown is old."
        return (worst, reason) if worst else ("ok", "All that was looked at is well.")


def load_sections(db: sqlite3.Connection, state: HostState) -> None:
    """The latest sections of a host, from the reports that hold them."""
    row = db.execute("SELECT sections FROM latest WHERE host_id = :id", {"id": state.id}).fetchone()
    wanted = {one for pair in json.loads(row[0]).values() for one in pair if one} if row else ()
    found = [find_report(db, one) for one in wanted]
    for report in sorted(filter(None, found), key=lambda r: (report_time(r["id"]), r["run"], r["seq"])):
        stamp = Stamp(report["run"], report["seq"], report_time(report["id"]), report["received_at"], report["id"])
        state.apply(read_body(report["body"]), stamp)


def load_alerts(db: sqlite3.Connection, state: HostState) -> None:
    rows = db.execute("""
        SELECT id, rule, object, severity, state, message, value, since, fired_at FROM alert
        WHERE host_id = :id AND state <> 'resolved'""", {"id": state.id})
    state.alerts = {(row["rule"], row["object"]): Alert(**dict(row)) for row in rows}


def worst_alert(alerts: Iterable[Alert]) -> tuple[str | None, str]:
    """Severity and sentence of the worst that fires; None if nothing does."""
    firing = [alert for alert in alerts if alert.state == "firing"]
    if not firing:
        return None, ""
    worst = min(firing, key=lambda alert: (SEVERITIES.index(alert.severity), -alert.since))
    more = f" (+{len(firing) - 1} more)" if len(firing) > 1 else ""
    return worst.severity, worst.message + more


def number(fields: Any, key: str) -> float | None:
    """A field if it is a number: what an agent sends is not to be trusted."""
    value = fields.get(key) if isinstance(fields, dict) else None
    return value if is_number(value) else None


def text(fields: Any, key: str) -> str | None:
    value = fields.get(key) if isinstance(fields, dict) else None
    return value if isinstance(value, str) else None


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


def object_verdict(state: HostState, section: str, object: str, now: float) -> tuple[str, str | None]:
    """Verdict of a pool, storage, guest or disk: its worst alert; else stale, or ok."""
    name = f"{section}/{object}"
    alerts = (a for a in state.alerts.values() if a.object == name or a.object.startswith(name + "/"))
    worst, reason = worst_alert(alerts)
    if worst:
        return worst, reason
    if is_stale(state, section, now):
        return "stale", "What is shown is old."
    return "ok", None


HOST_COLUMNS = (
    "name", "verdict", "reason", "site", "tags", "note", "maintenance_until", "last_seen_at", "pve_version",
    "agent_version", "cluster", "pools_total", "pools_worst_state", "pools_max_capacity_ratio", "days_until_full",
    "guests_running", "guests_total", "cpu_ratio", "memory_free_ratio", "io_pressure_ratio", "root_used_ratio", "load1",
    "uptime_seconds", "storages_inactive", "disks_suspect", "backups_worst", "updates_pending", "reboot_needed",
    "clock_offset_seconds", "alerts_critical", "alerts_warning",
)


def host_row(fleet: Fleet, state: HostState, now: float) -> dict[str, Any]:
    """One line of the host table; what is not known is None."""
    verdict, reason = fleet.verdict(state, now)
    node = state.body("node", {})
    firing = [alert.severity for alert in state.alerts.values() if alert.state == "firing"]
    root = [number(node, "root_used_bytes"), number(node, "root_available_bytes")]
    return {
        "name": state.name, "verdict": verdict, "reason": reason, "site": state.site, "tags": state.tags,
        "note": state.note, "maintenance_until": state.maintenance_until, "last_seen_at": state.last_seen_at,
        "pve_version": text(node, "pve_version"), "agent_version": text(state.agent, "version"),
        "cluster": text(state.body("cluster"), "name"), **pool_columns(state), "days_until_full": None,
        **guest_columns(state), "cpu_ratio": number(node, "cpu_ratio"),
        "memory_free_ratio": number(node, "memory_free_ratio"),
        "io_pressure_ratio": number(node, "pressure_io_full_avg10_ratio"),
        "root_used_ratio": None if None in root else ratio(root[0], sum_known(root)),
        "load1": number(node, "load1"), "uptime_seconds": number(node, "uptime_seconds"),
        "storages_inactive": count_inactive(state), "disks_suspect": count_suspect(state), "backups_worst": None,
        "updates_pending": number(state.body("updates"), "pending"),
        "reboot_needed": node.get("reboot_needed") if isinstance(node.get("reboot_needed"), bool) else None,
        "clock_offset_seconds": state.clock_ahead or number(state.agent, "clock_offset"),
        "alerts_critical": firing.count("critical"), "alerts_warning": firing.count("warning"),
    }


POOL_STATES = ("SUSPENDED", "UNAVAIL", "FAULTED", "REMOVED", "OFFLINE", "DEGRADED", "UNKNOWN", "ONLINE")  # worst first


def pool_columns(state: HostState) -> dict[str, Any]:
    states = [text(pool, "state") or "UNKNOWN" for pool in state.body("pool_states") or state.body("pools") or ()]
    full = [number(pool, "capacity_ratio") for pool in state.body("pools") or ()]
    return {
        "pools_total": None if state.body("pool_states") is None and state.body("pools") is None else len(states),
        "pools_worst_state": min(states, key=state_rank, default=None),
        "pools_max_capacity_ratio": max((one for one in full if one is not None), default=None),
    }


def state_rank(word: str) -> int:
    return POOL_STATES.index(word) if word in POOL_STATES else POOL_STATES.index("UNKNOWN")


def guest_columns(state: HostState) -> dict[str, Any]:
    guests = state.body("guests")
    if guests is None:
        return {"guests_running": None, "guests_total": None}
    real = [guest for guest in guests if not guest.get("template")]
    return {"guests_running": sum(guest.get("status") == "running" for guest in real), "guests_total": len(real)}


def count_inactive(state: HostState) -> int | None:
    storages = state.body("storages")
    if storages is None:
        return None
    return sum(one.get("active") in (False, 0) and one.get("enabled") not in (False, 0) for one in storages)


def count_suspect(state: HostState) -> int | None:
    disks = state.body("disks")
    return None if disks is None else sum(d.get("passed") is False or bool(d.get("critical_warning")) for d in disks)


GUEST_FIELDS = (
    "vmid", "type", "name", "status", "template", "lock", "tags", "cpu_count", "cpu_ratio", "memory_used_bytes",
    "memory_max_bytes", "disk_used_bytes", "disk_max_bytes", "uptime_seconds", "onboot", "ha_state",
)
GUEST_COLUMNS = ("host", "vmid", "type", "name", "status", "verdict", *GUEST_FIELDS[4:], "as_of")


def guest_rows(state: HostState, now: float) -> Iterator[dict[str, Any]]:
    """A host's guests as the fleet's list shows them."""
    as_of = state.sections.get("guests", NOTHING).time
    for guest in state.body("guests", ()):
        verdict, _ = object_verdict(state, "guests", str(guest.get("vmid")), now)
        if verdict == "ok" and guest.get("status") in (None, "unknown"):
            verdict = "unknown"
        yield {"host": state.name, **{key: guest.get(key) for key in GUEST_FIELDS}, "verdict": verdict,
               "as_of": number(guest, "as_of") or as_of}


POOL_COLUMNS = (
    "host", "name", "guid", "state", "verdict", "reason", "layout", "size_bytes", "allocated_bytes", "free_bytes",
    "usable_used_bytes", "usable_available_bytes", "capacity_ratio", "fragmentation_ratio", "dedup_ratio",
    "redundancy_margin", "data_errors", "read_errors", "write_errors", "checksum_errors", "scan_function",
    "scan_state", "scan_progress_ratio", "last_scrub_at", "as_of",
)


def pool_rows(state: HostState, now: float) -> Iterator[dict[str, Any]]:
    """A host's pools: the state from the kernel's files, all else from `pools`."""
    section = state.sections.get("pools", NOTHING)
    full = {pool["name"]: pool for pool in state.body("pools", ())}
    brief = {pool["name"]: pool for pool in state.body("pool_states", ())}
    for name in {**brief, **full}:
        pool = {**full.get(name, {}), **{k: v for k, v in brief.get(name, {}).items() if v is not None}}
        verdict, reason = object_verdict(state, "pools", name, now)
        if verdict == "ok" and pool.get("state") is None:
            verdict, reason = "unknown", "The pool's state could not be read."
        scan = pool.get("scan") if isinstance(pool.get("scan"), dict) else {}
        yield {"host": state.name, **{key: pool.get(key) for key in POOL_COLUMNS[1:16]}, "verdict": verdict,
               "reason": reason, **vdev_errors(pool), "data_errors": pool.get("data_errors"),
               "scan_function": text(scan, "function"), "scan_state": text(scan, "state"),
               "scan_progress_ratio": number(scan, "progress_ratio"),
               "last_scrub_at": number(pool.get("last_scrub"), "ended_at"),
               "as_of": section.time}


def vdev_errors(pool: dict[str, Any]) -> dict[str, Any]:
    """Errors of all leaves together: the pool's own row may show 0 (zpool counts where they happen)."""
    leaves = [vdev for vdev in walk_vdevs(pool.get("vdevs")) if not vdev.get("children")]
    return {key: sum_known(number(leaf, key) for leaf in leaves) for key in VDEV_COUNTERS}


VDEV_COUNTERS = ("read_errors", "write_errors", "checksum_errors")


def walk_vdevs(vdevs: Any) -> Iterator[dict[str, Any]]:
    """Each vdev of a tree, parents first."""
    for vdev in vdevs if isinstance(vdevs, list) else ():
        if isinstance(vdev, dict):
            yield vdev
            yield from walk_vdevs(vdev.get("children"))


def sum_known(values: Iterable[float | None]) -> float | None:
    """The sum of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


STORAGE_FIELDS = ("storage", "type", "content", "shared", "enabled", "active")
STORAGE_COLUMNS = ("host", *STORAGE_FIELDS, "verdict", "reason", "total_bytes", "used_bytes", "available_bytes",
                   "used_ratio", "dataset", "as_of")


def storage_rows(state: HostState, now: float) -> Iterator[dict[str, Any]]:
    """A host's storages, inactive and disabled ones too."""
    as_of = state.sections.get("storages", NOTHING).time
    for one in state.body("storages", ()):
        verdict, reason = object_verdict(state, "storages", one["storage"], now)
        if verdict == "ok" and one.get("active") is None:
            verdict, reason = "unknown", "Proxmox does not say whether it is active."
        yield {"host": state.name, **{key: one.get(key) for key in STORAGE_FIELDS}, "verdict": verdict,
               "reason": reason, "total_bytes": one.get("total_bytes"), "used_bytes": one.get("used_bytes"),
               "available_bytes": one.get("available_bytes"), "used_ratio": storage_used_ratio(one),
               "dataset": one.get("dataset"), "as_of": as_of}


def storage_used_ratio(storage: dict[str, Any]) -> float | None:
    return ratio(number(storage, "used_bytes"), number(storage, "total_bytes"))


def build_overview(fleet: Fleet, now: float) -> dict[str, Any]:
    """The fleet in a few numbers, of the same size for 1 host and 10,000."""
    silences = [fleet.silent_seconds(state, now) for state in fleet.hosts.values()]
    known = [silent for silent in silences if silent is not None]
    reporting = [state for state in fleet.hosts.values()
                 if (silent := fleet.silent_seconds(state, now)) is not None and silent < STALE_SECONDS]
    firing = [a.severity for state in fleet.hosts.values() for a in state.alerts.values() if a.state == "firing"]
    return {
        "server_time": now,
        "hosts": {
            "total": len(silences), "reporting": len(reporting),
            "stale": sum(STALE_SECONDS <= silent < OFFLINE_SECONDS for silent in known),
            "offline": sum(silent >= OFFLINE_SECONDS for silent in known),
        },
        "problems": {"critical": firing.count("critical"), "warning": firing.count("warning")},
        "oldest_verified_at": min((state.last_seen_at or 0.0 for state in reporting), default=None),
        "last_notification_at": None,
        "version": VERSION,
    }


def format_duration(seconds: float) -> str:
    """'41 s', '7 min', '3 h', '12 d'"""
    for size, unit in ((DAY, "d"), (HOUR, "h"), (MINUTE, "min")):
        if seconds >= 2 * size or (unit == "min" and seconds >= size):
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


# --- rules: what is wrong, from when on, and until when ---


class Judgement(NamedTuple):
    """What a rule makes of an object now; severity None = well."""

    severity: str | None
    message: str = ""
    value: float | None = None


class Rule(NamedTuple):
    """One row: what it looks at, how it judges, and how long that must hold before anybody is told.

    `judge(subject, current)` gives a Judgement, or None for "not known": that resolves nothing and alarms
    nobody. `current` is the severity that is open, for thresholds that clear lower than they fire."""

    name: str
    section: str
    objects: Callable[[HostState], Iterable[tuple[str, Any]]]
    judge: Callable[[Any, str | None], Judgement | None]
    hold_seconds: float = 0


def level(value: float | None, warn: float, crit: float, clear_by: float, current: str | None) -> str | None:
    """Severity of a number against its thresholds; what is open clears `clear_by` lower."""
    if value is None:
        return None
    if value >= crit - (clear_by if current == "critical" else 0):
        return "critical"
    if value >= warn - (clear_by if current else 0):
        return "warning"
    return None


def judge_pool_state(pool: dict[str, Any], current: str | None) -> Judgement | None:
    state = text(pool, "state")
    if state is None or state in ("UNKNOWN", "TRANSITIONING"):  # the latter during import and export
        return None
    if state == "ONLINE":
        return Judgement(None)
    return Judgement("critical", f"Pool {pool['name']} is {state}.")


def judge_pool_capacity(pool: dict[str, Any], current: str | None) -> Judgement | None:
    used = number(pool, "capacity_ratio")
    if used is None:
        return None
    return Judgement(level(used, 0.80, 0.90, 0.03, current), f"Pool {pool['name']} is {used:.0%} full.", used)


def judge_vdev_errors(vdev: dict[str, Any], current: str | None) -> Judgement | None:
    counts = {key: number(vdev, key) for key in VDEV_COUNTERS}
    total = sum_known(counts.values())
    if total is None:
        return None
    told = ", ".join(f"{int(count)} {key.partition('_')[0]}" for key, count in counts.items() if count)
    return Judgement("warning" if total else None, f"{vdev.get('name')} has errors: {told}.", total)


def judge_storage_active(storage: dict[str, Any], current: str | None) -> Judgement | None:
    active = storage.get("active")
    if storage.get("enabled") in (False, 0):
        return Judgement(None)
    if active is None:
        return None
    return Judgement(None if active else "warning", f"Storage {storage['storage']} is not active.")


def judge_storage_full(storage: dict[str, Any], current: str | None) -> Judgement | None:
    used = storage_used_ratio(storage)
    if used is None:
        return None
    return Judgement(level(used, 0.85, 0.93, 0.03, current), f"Storage {storage['storage']} is {used:.0%} full.", used)


def pool_objects(section: str) -> Callable[[HostState], Iterable[tuple[str, Any]]]:
    return lambda state: ((f"pools/{pool['name']}", pool) for pool in state.body(section, ()))


def vdev_objects(state: HostState) -> Iterator[tuple[str, Any]]:
    for pool in state.body("pools", ()):
        for vdev in walk_vdevs(pool.get("vdevs")):
            if not vdev.get("children"):
                yield f"pools/{pool['name']}/{vdev.get('name')}", vdev


def storage_objects(state: HostState) -> Iterator[tuple[str, Any]]:
    for storage in state.body("storages", ()):
        yield f"storages/{storage['storage']}", storage


RULES = (
    Rule("pool-state", "pool_states", pool_objects("pool_states"), judge_pool_state),
    Rule("vdev-errors", "pools", vdev_objects, judge_vdev_errors),
    Rule("pool-capacity", "pools", pool_objects("pools"), judge_pool_capacity, 15 * MINUTE),
    Rule("storage-inactive", "storages", storage_objects, judge_storage_active, 10 * MINUTE),
    Rule("storage-full", "storages", storage_objects, judge_storage_full, 10 * MINUTE),
)
JUDGED_WITHIN = 10 * MINUTE  # older values are history, not news


def evaluate(alert: Alert | None, rule: str, object: str, found: Judgement | None, hold: float,
             now: float) -> Alert | None:
    """The next state of an alert, pure: ok (None) -> pending -> firing -> resolved."""
    if found is None:
        return alert
    if found.severity is None:
        if alert is None or alert.state == "pending":
            return None
        return Alert(rule, object, alert.severity, alert.message, alert.value, alert.since, id=alert.id,
                     state="resolved", fired_at=alert.fired_at)
    since = alert.since if alert else now
    fires = (alert is not None and alert.state == "firing") or now - since >= hold
    return Alert(rule, object, found.severity, found.message, found.value, since, id=alert.id if alert else None,
                 state="firing" if fires else "pending",
                 fired_at=(alert and alert.fired_at) or (now if fires else None))


def judge_host(db: sqlite3.Connection, fleet: Fleet, state: HostState, now: float) -> None:
    """Run every rule over a host's latest state and write what changed. Called by the writer only."""
    alerts = dict(state.alerts)
    judge_silence(db, fleet, state, alerts, now)
    for rule in RULES:
        section = state.sections.get(rule.section, NOTHING)
        if section.absent:
            seen: dict[str, Any] | None = {}
        elif section.time is None or section.error or now - section.time > JUDGED_WITHIN:
            seen = None
        else:
            seen = dict(rule.objects(state))
        judge_rule(db, state, alerts, rule, seen, now)
    state.alerts = alerts


def judge_rule(db: sqlite3.Connection, state: HostState, alerts: dict[tuple[str, str], Alert], rule: Rule,
               seen: dict[str, Any] | None, now: float) -> None:
    """One rule over the objects that were seen (None: it is not known which there are)."""
    if seen is None:
        return
    gone = {object for name, object in alerts if name == rule.name} - seen.keys()
    for object in gone:
        settle(db, state, alerts, (rule.name, object), Judgement(None), 0, now)
    for object, subject in seen.items():
        open_alert = alerts.get((rule.name, object))
        found = rule.judge(subject, open_alert.severity if open_alert else None)
        settle(db, state, alerts, (rule.name, object), found, rule.hold_seconds, now)


def judge_silence(db: sqlite3.Connection, fleet: Fleet, state: HostState, alerts: dict[tuple[str, str], Alert],
                  now: float) -> None:
    """Host offline: the only rule about what does not come."""
    silent = fleet.silent_seconds(state, now)
    if silent is None:
        return
    severity = "critical" if silent >= OFFLINE_SECONDS else None
    found = Judgement(severity, f"Nothing received from {state.name} for {format_duration(silent)}.", silent)
    settle(db, state, alerts, ("host-offline", ""), found, 0, now)


def settle(db: sqlite3.Connection, state: HostState, alerts: dict[tuple[str, str], Alert], key: tuple[str, str],
           found: Judgement | None, hold: float, now: float) -> None:
    """Evaluate one alert and write it if it changed."""
    old = alerts.get(key)
    new = evaluate(old, *key, found, hold, now)
    if new is None or new.state == "resolved":
        alerts.pop(key, None)
    else:
        alerts[key] = new
    if new is old or (old and new and (old.state, old.severity, old.message) == (new.state, new.severity, new.message)):
        return
    write_alert(db, state, old, new, now)


def write_alert(db: sqlite3.Connection, state: HostState, old: Alert | None, new: Alert | None, now: float) -> None:
    """Put a changed alert and its transition on record."""
    if new is None:
        db.execute("DELETE FROM alert WHERE id = :id", {"id": old.id if old else None})
        return
    fields = {"id": new.id, "rule": new.rule, "host": state.id, "object": new.object, "severity": new.severity,
              "state": new.state, "message": new.message, "value": new.value, "since": new.since,
              "fired_at": new.fired_at, "resolved_at": now if new.state == "resolved" else None}
    if new.id is None:
        new.id = db.execute("""
            INSERT INTO alert (rule, host_id, object, severity, state, message, value, since, fired_at)
            VALUES (:rule, :host, :object, :severity, :state, :message, :value, :since, :fired_at)""", fields).lastrowid
    else:
        db.execute("""
            UPDATE alert SET severity = :severity, state = :state, message = :message, value = :value,
                             fired_at = :fired_at, resolved_at = :resolved_at WHERE id = :id""", fields)
    if new.state != "pending" and (old is None or (old.state, old.severity) != (new.state, new.severity)):
        insert_event(db, now, f"alert-{new.state}", new.message, host=state.name, object=new.object or None)


# --- columns: numbers packed into few bytes, exactly ---

CONSTANT, PLAIN, DELTA, DOUBLES, HOLES = 0, 1, 2, 3, 8
COLUMN = struct.Struct("<BBI")  # how it is packed (with HOLES: not every row has a value), decimals, bytes that follow
SCALES = tuple(10**decimals for decimals in range(7))
NAN = math.nan


def pack_column(values: Sequence[float]) -> bytes:
    """Doubles, NaN where there is none. What agents send are decimals: whole numbers of 1, 0.1 … 0.000001, whose
    differences are small; bytes of the same weight stand together, which zlib likes. What is no such decimal stays
    as it is."""
    how, holes = 0, b""
    total = sum(values)
    if total != total:
        how, holes = HOLES, pack_bits([value == value for value in values])
        values = [value for value in values if value == value]
    if not values or values.count(values[0]) == len(values):
        kind, decimals, packed = CONSTANT, 0, struct.pack("<d", values[0] if values else NAN)
    else:
        kind, decimals, packed = pack_numbers(values)
    return COLUMN.pack(how | kind, decimals, len(holes) + len(packed)) + holes + packed


def pack_numbers(values: Sequence[float]) -> tuple[int, int, bytes]:
    """How, decimals and bytes of numbers that are not all the same."""
    scaled = scale(values)
    if scaled is not None:
        decimals, whole = scaled
        steps = [(b - a) << 1 if b >= a else ((a - b) << 1) - 1 for a, b in zip(whole, whole[1:])]  # zig-zag
        if min(whole) >= 0 and sum(whole) <= sum(steps):
            return PLAIN, decimals, pack_planes(whole)
        if max(steps) < 1 << 63 and abs(whole[0]) < 1 << 63:
            return DELTA, decimals, struct.pack("<q", whole[0]) + pack_planes(steps)
    return DOUBLES, 0, array("d", values).tobytes()


def scale(values: Sequence[float]) -> tuple[int, list[int]] | None:
    """The fewest decimals that give the values exactly, and the whole numbers; None if six are too few."""
    decimals = 0
    for value in (values[0], values[-1], values[len(values) // 2]):
        while decimals < len(SCALES) and round(value * SCALES[decimals]) / SCALES[decimals] != value:
            decimals += 1
    wanted = list(values)
    for more in range(decimals, len(SCALES)):
        by = SCALES[more]
        whole = [round(value * by) for value in values] if more else list(map(int, values))
        if [one / by for one in whole] == wanted:
            return more, whole
    return None


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


def unpack_column(packed: bytes, at: int, rows: int) -> list[float]:
    """The values of the column that begins at a byte."""
    how, decimals, size = COLUMN.unpack_from(packed, at)
    at, end = at + COLUMN.size, at + COLUMN.size + size
    if not how & HOLES:
        return unpack_numbers(how, decimals, packed[at:end], rows)
    width = (rows + 8) // 8
    there = unpack_bits(packed[at : at + width], rows)
    known = iter(unpack_numbers(how & ~HOLES, decimals, packed[at + width : end], sum(there)))
    return [next(known) if one else NAN for one in there]


def unpack_numbers(how: int, decimals: int, packed: bytes, count: int) -> list[float]:
    if how == CONSTANT:
        return [struct.unpack("<d", packed)[0]] * count
    if how == DOUBLES:
        return array("d", packed).tolist()
    if how == PLAIN:
        whole: Iterable[int] = unpack_planes(packed, count)
    else:
        steps = [(one >> 1) ^ -(one & 1) for one in unpack_planes(packed[8:], count - 1)]
        whole = accumulate(steps, initial=struct.unpack_from("<q", packed)[0])
    by = SCALES[decimals]
    return [one / by for one in whole]


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
    directory = array("I", [len(segments)])
    directory.extend(one[0] for one in segments)
    directory.extend(one[1] for one in segments)
    directory.extend(accumulate(map(len, packed)))
    return directory.tobytes() + b"".join(packed)


CHUNK_LEVEL = 1  # of zlib: 6 takes three times as long and saves 3 %


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

HOST_SHIFT = 42  # bits of milliseconds: until the year 2109


def report_span(host_id: int, since: float, until: float | None) -> tuple[int, int]:
    """First and last possible id of a host's reports in a span of time."""
    most = (1 << HOST_SHIFT) - 1
    last = most if until is None else max(0, min(most, int(until * 1000)))
    return host_id << HOST_SHIFT | max(0, min(most, int(since * 1000))), host_id << HOST_SHIFT | last


def report_time(report_id: int) -> float:
    return (report_id & ((1 << HOST_SHIFT) - 1)) / 1000


def read_body(body: bytes) -> dict[str, Any]:
    """A stored report; how it was packed shows in its first bytes."""
    return json.loads(zlib.decompress(body, 47))


def insert_report(db: sqlite3.Connection, host_id: int, run: int, seq: int, at: float, received_at: float,
                  body: bytes) -> int:
    """Keep a report; gives back its id. Two of one millisecond: the later comer takes the next free one."""
    report_id = report_span(host_id, at, None)[0]
    while True:
        added = db.execute("""
            INSERT OR IGNORE INTO report SELECT :id, :run, :seq, :received_at, :body
            WHERE NOT EXISTS (SELECT 1 FROM kept_report WHERE id = :id)""",
            {"id": report_id, "run": run, "seq": seq, "received_at": received_at, "body": body})
        if added.rowcount:
            return report_id
        report_id += 1


# The steps of history: how long each is kept, and what span of time one chunk of it holds.
RAW, FINE, COARSE = 30, 5 * MINUTE, HOUR
KEPT = {RAW: 2 * DAY, FINE: 90 * DAY, COARSE: 730 * DAY}
SPANS = {RAW: HOUR, FINE: DAY, COARSE: 10 * DAY}
STEP_CODES = {RAW: 0, FINE: 1, COARSE: 2}
ON_REQUEST = (6 * HOUR, DAY, 10 * DAY)  # made from hours when years are asked for
POINTS_MOST = 2000
RATE_MOST = HOUR  # a counter's values that are farther apart make no rate
OBJECTS_MOST = 5000  # of one report
HISTORY_MEMORY = 24 << 20  # bytes of numbers not yet in chunks that are kept at hand

ObjectKey = tuple[str, str]  # section, object ('' = the section itself)
Point = tuple[float, float, float, float]  # average, minimum, maximum, count
Points = dict[ObjectKey, dict[str, dict[int, Point]]]  # object -> field -> beginning of the step -> point

NODE_PARTS = (("interfaces", ("name",)), ("block_devices", ("name",)), ("temperatures", ("sensor", "label")))
ONLY = {"datasets": frozenset(("used_bytes", "available_bytes", "referenced_bytes", "used_by_snapshots_bytes"))}
NOT_NUMBERS = frozenset((
    "vmid", "as_of", "name", "type", "status", "template", "lock", "tags", "onboot", "ha_state", "boot_id", "kernel",
    "kernel_next", "pve_version", "reboot_needed", "interfaces", "block_devices", "temperatures", "volumes", "guid",
    "state", "layout", "damaged_files", "status_text", "action_text", "scan", "last_scrub", "expansion", "readonly",
    "features_disabled", "vdevs", "storage", "content", "shared", "enabled", "active", "dataset", "by_id", "model",
    "serial", "wwn", "firmware", "kind", "pool", "vdev", "passed", "standby", "selftest", "up", "sensor", "label",
))
BOOT = "~boot"  # a number that is another after each boot: counters begin anew then


class Shape:
    """Which numbers a report has, and where in its row: shared by all reports that look alike."""

    __slots__ = ("parts", "where")

    def __init__(self, parts: tuple[tuple[str, str, tuple[str, ...]], ...]):
        self.parts = parts
        self.where: dict[ObjectKey, tuple[int, tuple[str, ...]]] = {}
        start = 0
        for section, object, names in parts:
            self.where[section, object] = start, names
            start += len(names)


SHAPES: dict[tuple[Any, ...], Shape] = {}


class Tick(NamedTuple):
    """The numbers of one report. The first three together name it and are its place in the order of time."""

    ms: int
    run: int  # crc32 of run_id
    seq: int
    shape: Shape
    values: array[float]


def build_tick(report: dict[str, Any], received_at: float) -> Tick:
    """Every number of the sections that have a history; NaN where something else stands."""
    parts: list[tuple[str, str, tuple[str, ...]]] = []
    cells: list[Any] = []
    for section, object, fields in islice(history_objects(report), OBJECTS_MOST):
        names, mask = kept_fields(section, tuple(fields))
        parts.append((section, object[:200], names))
        cells.extend(compress(fields.values(), mask))
    try:
        values = array("d", cells)
    except TypeError:
        values = array("d", [cell if type(cell) in (int, float) else NAN for cell in cells])
    key = tuple(parts)
    shape = SHAPES.get(key)
    if shape is None:
        if len(SHAPES) > 10_000:
            SHAPES.clear()
        shape = SHAPES[key] = Shape(key)
    at = min(report["time"], received_at)
    return Tick(int(at * 1000), zlib.crc32(report["run_id"].encode("utf-8", "replace")), report["seq"], shape, values)


def history_objects(report: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Section, object and fields of all that has a history."""
    node = report.get("node")
    if isinstance(node, dict):
        boot = {BOOT: zlib.crc32(node["boot_id"].encode("utf-8", "replace"))} if text(node, "boot_id") else {}
        yield "node", "", {**node, **boot}
        for part, keys in NODE_PARTS:
            for one in node[part] if isinstance(node.get(part), list) else ():
                if isinstance(one, dict):
                    name = " ".join(one[key] for key in keys if text(one, key))
                    yield "node", f"{part}/{name}", {**one, **boot}
    for section in ("guests", "storages", "datasets", "disks"):
        key = KEY_FIELDS[section][0]
        for one in report.get(section) or ():
            yield section, str(one[key]), one
    for pool in report.get("pools") or ():
        progress = number(pool.get("scan"), "progress_ratio")
        yield "pools", pool["name"], {**pool, **vdev_errors(pool), "scan_progress_ratio": progress}


@lru_cache(4096)
def kept_fields(section: str, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """Of an object's fields those that may be numbers with a history: no times, no keys, no texts."""
    only = ONLY.get(section)
    mask = tuple(name in only if only else name not in NOT_NUMBERS and not name.endswith("_at") and len(name) < 100
                 for name in names)
    return tuple(compress(names, mask)), mask


class History:
    """What a running server keeps at hand of the history: the numbers of reports that are in no chunk yet, as far
    as HISTORY_MEMORY goes, and the names of layouts."""

    def __init__(self) -> None:
        self.ticks: dict[int, dict[int, Tick]] = {}  # host -> report -> its numbers
        self.bytes = 0
        self.hours: dict[int, dict[int, tuple[float, int]]] = {}  # host -> hour -> sum and count of CPU in use
        self.layouts: dict[int, tuple[str, ...]] = {}
        self._parsed: dict[int, Tick] = {}  # what had to be read from the disk for somebody's question
        self._next_host = 0
        self.written_hours: dict[tuple[int, int], float] = {}

    def remember(self, host_id: int, report_id: int, tick: Tick) -> None:
        """A report has come; called by the writer."""
        start, names = tick.shape.where.get(("node", ""), (0, ()))
        value = tick.values[start + names.index("cpu_ratio")] if "cpu_ratio" in names else NAN
        if value == value:
            hours = self.hours.setdefault(host_id, {})
            total, count = hours.get(tick.ms // 3_600_000 * HOUR, (0.0, 0))
            if len(hours) > 100:
                hours.clear()
            hours[tick.ms // 3_600_000 * HOUR] = total + value, count + 1
        if self.bytes < HISTORY_MEMORY:
            self.ticks.setdefault(host_id, {})[report_id] = tick
            self.bytes += tick_bytes(tick)

    def forget(self, host_id: int, report_ids: Iterable[int]) -> None:
        """Reports went into a chunk; called by the writer after the commit."""
        kept = self.ticks.get(host_id, {})
        for report_id in report_ids:
            self._parsed.pop(report_id, None)
            tick = kept.pop(report_id, None)
            self.bytes -= tick_bytes(tick) if tick else 0

    def clear(self) -> None:
        self.ticks, self._parsed, self.bytes = {}, {}, 0

    def tail(self, db: sqlite3.Connection, host_id: int, since: float, until: float) -> dict[int, Tick]:
        """Reports of a span of time that are in no chunk yet, oldest first."""
        first, last = report_span(host_id, since, until)
        known = self.ticks.get(host_id, {})
        found = {}
        for (report_id,) in db.execute("SELECT id FROM report WHERE id BETWEEN :first AND :last ORDER BY id",
                                       {"first": first, "last": last}).fetchall():
            tick = known.get(report_id) or self._parsed.get(report_id) or self._parse(db, report_id)
            if tick is not None:
                found[report_id] = tick
        return found

    def _parse(self, db: sqlite3.Connection, report_id: int) -> Tick | None:
        row = find_report(db, report_id)
        if row is None:
            return None
        tick = build_tick(read_body(row["body"]), row["received_at"])
        if len(self._parsed) > 3000:
            self._parsed = {}
        self._parsed[report_id] = tick
        return tick

    def layout(self, db: sqlite3.Connection, layout_id: int) -> tuple[str, ...]:
        """The names of a layout's fields."""
        if layout_id not in self.layouts:
            row = db.execute("SELECT fields FROM history_layout WHERE id = :id", {"id": layout_id}).fetchone()
            self.layouts[layout_id] = tuple(json.loads(row[0]))
        return self.layouts[layout_id]


def tick_bytes(tick: Tick) -> int:
    return 300 + 8 * len(tick.values)


# Blocks: the numbers of some reports of one host, column by column.

TickKey = tuple[int, int, int]  # milliseconds, run, seq
Columns = tuple[list[int], dict[str, list[float]]]  # which of the block's reports have the object; field -> values


class Block(NamedTuple):
    keys: list[TickKey]  # rising
    objects: dict[ObjectKey, Columns]


Wanted = dict[ObjectKey, set[str]] | None  # None: everything


def block_of(ticks: Iterable[Tick], wanted: Wanted = None) -> Block:
    """The numbers of reports, in the order of their time."""
    rows = sorted(ticks, key=lambda tick: tick[:3])
    gathered: dict[ObjectKey, tuple[list[int], list[tuple[tuple[str, ...], Any]]]] = {}
    for place, tick in enumerate(rows):
        where, values = tick.shape.where, tick.values
        for key in where if wanted is None else wanted.keys() & where.keys():
            start, names = where[key]
            found = gathered.get(key)
            if found is None:
                found = gathered[key] = [], []
            found[0].append(place)
            found[1].append((names, values[start : start + len(names)]))
    return Block([tick[:3] for tick in rows], {
        key: (places, columns_of(cells, wanted[key] if wanted else None)) for key, (places, cells) in gathered.items()})


def columns_of(cells: list[tuple[tuple[str, ...], Any]], fields: set[str] | None) -> dict[str, list[float]]:
    """Rows of one object as columns; a field that a row does not have is NaN there."""
    names = cells[0][0]
    if all(one[0] is names or one[0] == names for one in cells):
        columns = dict(zip(names, map(list, zip(*(one[1] for one in cells)))))
        return columns if fields is None else {name: columns[name] for name in fields & columns.keys()}
    every = {name for one in cells for name in one[0]}
    rows = [dict(zip(*one)) for one in cells]
    return {name: [row.get(name, NAN) for row in rows] for name in (every if fields is None else fields & every)}


def merge_blocks(blocks: list[Block]) -> Block:
    """Several as one; the same report twice is there once."""
    blocks = sorted((block for block in blocks if block.keys), key=lambda block: block.keys[0])
    if all(a.keys[-1] < b.keys[0] for a, b in zip(blocks, blocks[1:])):
        return join_blocks(blocks)
    keys = sorted({key for block in blocks for key in block.keys})
    place = {key: at for at, key in enumerate(keys)}
    rows: dict[ObjectKey, dict[int, tuple[Columns, int]]] = {}
    for block in blocks:
        for name, columns in block.objects.items():
            found = rows.setdefault(name, {})
            for row, at in enumerate(columns[0]):
                found[place[block.keys[at]]] = columns, row
    return Block(keys, {name: merge_columns(found) for name, found in rows.items()})


def join_blocks(blocks: list[Block]) -> Block:
    """Blocks that follow each other, as one."""
    if len(blocks) == 1:
        return blocks[0]
    keys: list[TickKey] = []
    objects: dict[ObjectKey, Columns] = {}
    for block in blocks:
        for name, (places, columns) in block.objects.items():
            all_places, all_columns = objects.setdefault(name, ([], {}))
            before = len(all_places)
            all_places += [len(keys) + at for at in places]
            for field in columns.keys() - all_columns.keys():
                all_columns[field] = [NAN] * before
            for field, values in all_columns.items():
                values += columns.get(field) or [NAN] * len(places)
        keys += block.keys
    return Block(keys, objects)


def merge_columns(rows: dict[int, tuple[Columns, int]]) -> Columns:
    places = sorted(rows)
    ordered = [rows[at] for at in places]
    fields = {field for columns, _ in ordered for field in columns[1]}
    empty: list[float] = []
    values = {field: [columns[1].get(field, empty)[row] if field in columns[1] else NAN for columns, row in ordered]
              for field in fields}
    return places, values


def pack_block(block: Block, object_ids: dict[ObjectKey, int], layout_ids: dict[tuple[str, ...], int]) -> bytes:
    """A block as a chunk: segment 0 has the reports' times and names, then a segment for each object."""
    heads = [pack_column(column) for column in zip(*block.keys)]
    segments = [(0, len(block.keys), b"".join(heads))]
    for key, (places, columns) in block.objects.items():
        names = stored_names(columns)
        if names:
            everywhere = len(places) == len(block.keys)
            present = set(places)
            there = b"" if everywhere else pack_bits([at in present for at in range(len(block.keys))])
            packed = b"".join(pack_column(columns[name]) for name in names)
            segments.append((object_ids[key], layout_ids[names], bytes([everywhere]) + there + packed))
    return pack_chunk(segments)


def stored_names(columns: dict[str, list[float]]) -> tuple[str, ...]:
    """The columns that hold any number."""
    return tuple(sorted(name for name, values in columns.items() if any(value == value for value in values)))


def unpack_block(history: History, db: sqlite3.Connection, body: bytes, objects: dict[int, ObjectKey],
                 wanted: Wanted) -> Block:
    """What is wanted of a chunk of reports."""
    chunk = open_chunk(body)
    count, head = chunk[0]
    packed, at, heads = inflate(body[head]), 0, []
    for _ in range(3):
        heads.append([int(one) for one in unpack_column(packed, at, count)])
        at = skip_columns(packed, at, 1)
    found = {}
    for object_id in objects.keys() & chunk.keys():
        layout_id, segment = chunk[object_id]
        key = objects[object_id]
        names = history.layout(db, layout_id)
        found[key] = unpack_columns(inflate(body[segment]), count, names, wanted[key] if wanted else None)
    return Block(list(zip(*heads)), found)


def unpack_columns(packed: bytes, count: int, names: tuple[str, ...], fields: set[str] | None) -> Columns:
    places, at = list(range(count)), 1
    if not packed[0]:
        width = (count + 8) // 8
        places = [place for place, there in enumerate(unpack_bits(packed[1 : 1 + width], count)) if there]
        at += width
    columns = {}
    for name in names:
        if fields is None or name in fields:
            columns[name] = unpack_column(packed, at, len(places))
        at = skip_columns(packed, at, 1)
    return places, columns


# Points: averages, minima and maxima of steps.


def stored_field(field: str) -> str:
    """The field that is kept for a name: a rate is made from its counter."""
    return field.removesuffix("_per_second") + "_total" if field.endswith("_per_second") else field


def needed_fields(field: str) -> set[str]:
    """What has to be read for a field: a rate needs to know of restarts too."""
    stored = stored_field(field)
    return {stored, "uptime_seconds", BOOT} if stored.endswith("_total") else {stored}


def list_values(block: Block, key: ObjectKey, field: str) -> tuple[list[int], list[float]]:
    """Milliseconds and values of one series in a block; a counter as its rate per second; NaN = none."""
    places, columns = block.objects.get(key, ([], {}))
    stored = stored_field(field)
    if stored not in columns:
        return [], []
    times = [block.keys[at][0] for at in places]
    values = columns[stored]
    if stored.endswith("_total"):
        values = list_rates(times, values, columns.get("uptime_seconds"), columns.get(BOOT))
    return times, values


def list_rates(times: list[int], values: list[float], uptimes: list[float] | None,
               boots: list[float] | None) -> list[float]:
    """A counter's growth per second, at the end of each interval. A restart, a counter that fell and too long a
    time between make a gap: nobody knows what happened in it."""
    rates = [NAN] * len(values)
    last = -1
    for row, value in enumerate(values):
        if value != value:
            continue
        seconds = (times[row] - times[last]) / 1000 if last >= 0 else 0
        if 0 < seconds <= RATE_MOST and value >= values[last]:
            restarted = uptimes is not None and (uptimes[row] < uptimes[last] or uptimes[row] + 1 < seconds)
            rebooted = boots is not None and abs(boots[row] - boots[last]) > 0  # not known: False
            if not restarted and not rebooted:
                rates[row] = (value - values[last]) / seconds
        last = row
    return rates


def fold_object(block: Block, key: ObjectKey, fields: Iterable[str], since: float, until: float) -> dict[
        str, dict[int, Point]]:
    """The points of 5 minutes of an object's fields from since to until, from reports."""
    places, columns = block.objects.get(key, ([], {}))
    steps = [block.keys[at][0] // (FINE * 1000) * FINE for at in places]
    spans = []
    row, last = bisect.bisect_left(steps, since), bisect.bisect_left(steps, until)
    while row < last:
        end = bisect.bisect_right(steps, steps[row], row, last)
        spans.append((steps[row], row, end))
        row = end
    return {field: fold(list_values(block, key, field)[1], spans, is_rate=stored_field(field).endswith("_total"))
            for field in fields if stored_field(field) in columns}


def fold(values: list[float], spans: list[tuple[int, int, int]], *, is_rate: bool) -> dict[int, Point]:
    """Points of values; a span is the beginning of a step with its first row and the one after its last."""
    if values[0] == values[0] and values.count(values[0]) == len(values) and not is_rate:
        return {step: (values[0], values[0], values[0], float(end - row)) for step, row, end in spans}
    points = {}
    for step, row, end in spans:
        known = values[row:end]
        average = sum(known) / len(known)
        if average != average:
            known = [value for value in known if value == value]
            if not known:
                continue
            average = sum(known) / len(known)
        lowest, highest = min(known), max(known)
        if is_rate:
            lowest, highest = rough(lowest), rough(highest)
        points[step] = tidy(average, lowest, highest), lowest, highest, float(len(known))
    return points


def tidy(average: float, lowest: float, highest: float) -> float:
    """An average with as many digits as say something beside its minimum and maximum; zeros take no room."""
    if lowest == highest:
        return lowest
    if -1000 < average < 1000:
        rounded = round(average, 4)
    else:
        step = max(1.0, 2.0 ** (math.frexp(highest - lowest)[1] - 8))
        rounded = round(average / step) * step
    return min(highest, max(lowest, rounded))


def rough(rate: float) -> float:
    """A rate to about a thousandth: it is a quotient of noisy times anyway."""
    return round(rate, 3) if rate < 1000 else round(rate / (step := 2.0 ** (math.frexp(rate)[1] - 11))) * step


def combine(points: Iterable[Point]) -> Point:
    """Several points as one."""
    averages, lowest, highest, counts = zip(*points)
    count = sum(counts)
    average = sum(one * weight for one, weight in zip(averages, counts)) / count
    return tidy(average, min(lowest), max(highest)), min(lowest), max(highest), count


def coarsen(points: dict[int, Point], step: int) -> dict[int, Point]:
    """Points of a longer step."""
    groups: dict[int, list[Point]] = {}
    for at in sorted(points):
        groups.setdefault(at // step * step, []).append(points[at])
    return {at: combine(group) for at, group in groups.items()}


def add_points(into: Points, more: Points) -> None:
    """Put points beside those that are there; two of one step become one."""
    for key, fields in more.items():
        for field, points in fields.items():
            old = into.setdefault(key, {}).setdefault(field, {})
            if not old:
                old.update(points)
                continue
            for at, point in points.items():
                old[at] = combine((old[at], point)) if at in old else point


def pack_points(points: Points, begin: int, step: int, object_ids: dict[ObjectKey, int],
                layout_ids: dict[tuple[str, ...], int]) -> bytes:
    """Points as a chunk. Of a field: which steps it has, averages, how far minimum and maximum are from them, and
    how many values were in each step."""
    steps = range(begin, begin + SPANS[step], step)
    segments = []
    for key, fields in points.items():
        names = tuple(sorted(name for name in fields if fields[name]))
        if names:
            packed = b"".join(pack_field([fields[name].get(at) for at in steps]) for name in names)
            segments.append((object_ids[key], layout_ids[names], packed))
    return pack_chunk(segments)


def pack_field(points: list[Point | None]) -> bytes:
    there = pack_bits([point is not None for point in points])
    averages, lowest, highest, counts = zip(*(point for point in points if point))
    scaled = scale((*averages, *lowest, *highest))
    columns: tuple[Sequence[float], ...]
    if scaled is None or max(map(abs, scaled[1])) >= 1 << 52:  # differences have to be exact as doubles
        head, columns = NOT_SCALED, (averages, lowest, highest, counts)
    else:
        head, whole = scaled
        middle, low, high = (whole[at : at + len(averages)] for at in range(0, len(whole), len(averages)))
        columns = (middle, [a - b for a, b in zip(middle, low)], [b - a for a, b in zip(middle, high)], counts)
    return bytes([head]) + there + b"".join(pack_column(column) for column in columns)


NOT_SCALED = 255


def unpack_points(history: History, db: sqlite3.Connection, body: bytes, begin: int, step: int,
                  objects: dict[int, ObjectKey], wanted: Wanted) -> Points:
    """What is wanted of a chunk of points."""
    steps = range(begin, begin + SPANS[step], step)
    chunk = open_chunk(body)
    found: Points = {}
    for object_id in objects.keys() & chunk.keys():
        layout_id, segment = chunk[object_id]
        key, packed, at = objects[object_id], inflate(body[segment]), 0
        fields = found[key] = {}
        for name in history.layout(db, layout_id):
            body_at = at + 1 + (len(steps) + 8) // 8
            if wanted is None or name in wanted[key]:
                fields[name] = unpack_field(packed, at, body_at, steps)
            at = skip_columns(packed, body_at, 4)
    return found


def unpack_field(packed: bytes, at: int, body_at: int, steps: range) -> dict[int, Point]:
    head = packed[at]
    times = [step for step, there in zip(steps, unpack_bits(packed[at + 1 : body_at], len(steps))) if there]
    columns = []
    for _ in range(4):
        columns.append(unpack_column(packed, body_at, len(times)))
        body_at = skip_columns(packed, body_at, 1)
    if head == NOT_SCALED:
        return dict(zip(times, zip(*columns)))
    by, (middle, low, high, counts) = SCALES[head], columns
    return {time: (a / by, (a - b) / by, (a + c) / by, n)
            for time, a, b, c, n in zip(times, middle, low, high, counts)}


# Reading: chunks and tail together, whatever has been packed by now.


class Source:
    """One host's history for one question: `wanted` are the fields asked for, by object; None = everything."""

    def __init__(self, history: History, db: sqlite3.Connection, host_id: int, asked: Wanted):
        self.history, self.db, self.host_id, self.asked = history, db, host_id, asked
        self.objects = find_objects(db, host_id, asked)
        self.stored: Wanted = asked and {
            key: {one for field in fields for one in needed_fields(field)} for key, fields in asked.items()}
        self.plain: Wanted = asked and {key: {stored_field(field) for field in fields} for key, fields in asked.items()}

    def block(self, since: float, until: float, *, tail: bool = True) -> Block:
        """The reports of a span of time. The tail comes first: what leaves it meanwhile is in a chunk by then."""
        ticks = self.history.tail(self.db, self.host_id, since, until) if tail else {}
        first = int(since) // HOUR * HOUR
        blocks = [unpack_block(self.history, self.db, row["body"], self.objects, self.stored)
                  for row in list_chunks(self.db, self.host_id, RAW, first, until)]
        return merge_blocks([*blocks, block_of(ticks.values(), self.stored)]) if blocks or ticks else Block([], {})

    def points(self, step: int, since: int, until: int) -> Points:
        """Points of 5 minutes or an hour, from the beginning of a step on."""
        found: Points = {}
        days = day_states(self.db, self.host_id, since, until)
        first, last = report_span(self.host_id, since // DAY * DAY, until)
        busy = {int(report_time(row[0])) // DAY * DAY for row in self.db.execute(
            "SELECT id FROM report WHERE id BETWEEN :first AND :last", {"first": first, "last": last})}
        for row in list_chunks(self.db, self.host_id, step, since // SPANS[step] * SPANS[step], until):
            begin = chunk_begin(row["id"])
            add_points(found, unpack_points(self.history, self.db, row["body"], begin, step, self.objects, self.plain))
        for day in range(since // DAY * DAY, int(until) + 1, DAY):
            if day in busy or days.get(day) == CHANGED:
                self._renew(found, step, day, whole=days.get(day) != SEALED)
        return {key: {field: {at: point for at, point in points.items() if since <= at < until}
                      for field, points in fields.items()} for key, fields in found.items()}

    def _renew(self, found: Points, step: int, day: int, *, whole: bool) -> None:
        """Make the points of a day from its reports: it has some that are not rolled up yet. `whole`: all its
        reports are there; else they are more of what is rolled up."""
        fresh = self.day_points(day)
        if whole:
            for fields in found.values():
                for points in fields.values():
                    for at in [at for at in points if day <= at < day + DAY]:
                        del points[at]
        elif step == COARSE:  # the day's hours are made from its 5 minutes, as the roll-up will do it
            fine = self._stored_fine(day)
            add_points(fine, fresh)
            self._renew_with(found, step, day, fine)
            return
        if step == COARSE:
            fresh = coarsen_all(fresh, COARSE)
        add_points(found, fresh)

    def _renew_with(self, found: Points, step: int, day: int, fine: Points) -> None:
        for key, fields in coarsen_all(fine, step).items():
            for field, points in fields.items():
                found.setdefault(key, {}).setdefault(field, {}).update(points)

    def _stored_fine(self, day: int) -> Points:
        row = find_chunk(self.db, self.host_id, FINE, day)
        return unpack_points(self.history, self.db, row["body"], day, FINE, self.objects, self.plain) if row else {}

    def day_points(self, day: int, *, tail: bool = True) -> Points:
        """The points of 5 minutes of a day, from its reports."""
        block = self.block(day - RATE_MOST, day + DAY - 0.001, tail=tail)
        found: Points = {}
        for key, (_, columns) in block.objects.items():
            fields = self.plain[key] if self.plain else columns.keys() - {BOOT}
            found[key] = fold_object(block, key, fields, day, day + DAY)
        return found


def coarsen_all(points: Points, step: int) -> Points:
    return {key: {field: coarsen(one, step) for field, one in fields.items()} for key, fields in points.items()}


CHANGED, ROLLED, SEALED = 0, 1, 2  # states of a day


def day_states(db: sqlite3.Connection, host_id: int, since: float, until: float) -> dict[int, int]:
    return dict(db.execute("""
        SELECT day, state FROM history_day WHERE host_id = :host AND day BETWEEN :since AND :until""",
        {"host": host_id, "since": int(since) // DAY * DAY, "until": int(until)}).fetchall())


def find_objects(db: sqlite3.Connection, host_id: int, asked: Wanted) -> dict[int, ObjectKey]:
    """Number -> name of the objects asked for."""
    if asked is None:
        rows = db.execute("SELECT id, section, object FROM history_object WHERE host_id = :host", {"host": host_id})
        return {row["id"]: (row["section"], row["object"]) for row in rows}
    found = {}
    for section, object in asked:
        row = db.execute("""
            SELECT id FROM history_object WHERE host_id = :host AND section = :section AND object = :object""",
            {"host": host_id, "section": section, "object": object}).fetchone()
        if row:
            found[row[0]] = section, object
    return found


CHUNK_SHIFT = 34


def chunk_id(host_id: int, step: int, begin: float) -> int:
    return (host_id << 2 | STEP_CODES[step]) << CHUNK_SHIFT | max(0, int(begin))


def chunk_begin(number: int) -> int:
    return number & ((1 << CHUNK_SHIFT) - 1)


def list_chunks(db: sqlite3.Connection, host_id: int, step: int, since: float, until: float) -> Iterator[sqlite3.Row]:
    """Chunks that begin from since to until."""
    return db.execute("SELECT id, body FROM chunk WHERE id BETWEEN :first AND :last ORDER BY id",
                      {"first": chunk_id(host_id, step, since),
                       "last": chunk_id(host_id, step, min(until, 1 << CHUNK_SHIFT - 1))})


def find_chunk(db: sqlite3.Connection, host_id: int, step: int, begin: int) -> sqlite3.Row | None:
    return db.execute("SELECT id, body FROM chunk WHERE id = :id", {"id": chunk_id(host_id, step, begin)}).fetchone()


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


def ask_history(history: History, db: sqlite3.Connection, host_ids: list[int], question: Question) -> list[list[Point]]:
    """Points [time, average, minimum, maximum] of each series. A guest is looked for on all hosts given: it may
    have been on one and then on another."""
    answers: list[list[Any]] = [[] for _ in question.names]
    parsed = [parse_series(name) for name in question.names]
    for nth, host_id in enumerate(host_ids):
        asked: dict[ObjectKey, set[str]] = {}
        for key, field in parsed:
            if nth == 0 or key[0] == "guests":
                asked.setdefault(key, set()).add(field)
        if asked:
            source = Source(history, db, host_id, asked)
            answer = answer_raw if question.step == RAW else answer_steps
            for found, points in zip(answers, answer(source, parsed, question)):
                found.extend(points)
    if len(host_ids) > 1:
        answers = [sorted(points) if question.step == RAW else join_points(points) for points in answers]
    return [[point[:4] for point in points] for points in answers]


def answer_raw(source: Source, parsed: list[tuple[ObjectKey, str]], question: Question) -> Iterator[list[Any]]:
    """Each value as it was received, with its time."""
    before = RATE_MOST if any(stored_field(field).endswith("_total") for _, field in parsed) else 0
    block = source.block(question.since - before, question.until)
    first, last = question.since * 1000, question.until * 1000
    for key, field in parsed:
        times, values = list_values(block, key, field)
        yield [[at / 1000, value, value, value, 1] for at, value in zip(times, values)
               if value == value and first <= at <= last]


def answer_steps(source: Source, parsed: list[tuple[ObjectKey, str]], question: Question) -> Iterator[list[Any]]:
    """Points of the step, from the finer ones that are kept."""
    base = COARSE if question.step >= COARSE else FINE
    since = int(question.since // question.step * question.step)
    found = source.points(base, since, int(question.until) + 1)
    for key, field in parsed:
        points = found.get(key, {}).get(stored_field(field), {})
        if question.step != base:
            points = coarsen(points, question.step)
        yield [[at, *points[at]] for at in sorted(points)]


def join_points(points: list[list[Any]]) -> list[list[Any]]:
    """Points of several hosts: two of one step become one."""
    groups: dict[float, list[Point]] = {}
    for at, *point in points:
        groups.setdefault(at, []).append((point[0], point[1], point[2], point[3]))
    return [[at, *(combine(groups[at]) if len(groups[at]) > 1 else groups[at][0])] for at in sorted(groups)]


def begin_of_history(db: sqlite3.Connection, host_id: int) -> float | None:
    """The oldest time of which anything is known."""
    found: list[float] = []
    for step in STEP_CODES:
        row = db.execute("SELECT min(id) FROM chunk WHERE id BETWEEN :first AND :last",
                         {"first": chunk_id(host_id, step, 0), "last": chunk_id(host_id, step, 1 << 33)}).fetchone()
        found += [chunk_begin(row[0])] if row[0] is not None else []
    first, last = report_span(host_id, 0, None)
    row = db.execute("SELECT min(id) FROM report WHERE id BETWEEN :first AND :last",
                     {"first": first, "last": last}).fetchone()
    found += [report_time(row[0])] if row[0] is not None else []
    return min(found, default=None)


def same_cluster(fleet: Fleet, state: HostState) -> list[int]:
    """This host and the others of its cluster; two clusters may have the same name, so their members count."""
    cluster = state.body("cluster", {})
    name, members = text(cluster, "name"), member_names(cluster)
    others = [other.id for other in fleet.hosts.values() if other is not state and name
              and text(other.body("cluster", {}), "name") == name
              and (not members or not members.isdisjoint((other.name.lower(), node_name(other))))]
    return [state.id, *others]


def member_names(cluster: Any) -> set[str]:
    members = cluster.get("members") if isinstance(cluster, dict) else None
    return {one["name"].lower() for one in members if text(one, "name")} if isinstance(members, list) else set()


def node_name(state: HostState) -> str:
    return (text(state.body("node", {}), "name") or "").lower()


def list_lost(history: History, db: sqlite3.Connection, host_id: int, since: float, until: float) -> list[dict]:
    """When reports of a host did not come: holes in the sequence of a run, with the times around them."""
    keys: dict[TickKey, None] = dict.fromkeys(
        tick[:3] for tick in history.tail(db, host_id, since, until).values())
    for row in list_chunks(db, host_id, RAW, since // HOUR * HOUR, until):
        keys.update(dict.fromkeys(unpack_block(history, db, row["body"], {}, {}).keys))
    lost: list[dict] = []
    before: dict[int, tuple[int, int]] = {}
    for ms, run, seq in sorted(keys, key=lambda key: (key[1], key[2])):
        if run in before and seq - before[run][1] > 1:
            lost.append({"from": before[run][0] / 1000, "to": ms / 1000, "reports": seq - before[run][1] - 1})
        before[run] = ms, seq
    return sorted(lost, key=lambda one: one["from"])


def list_silences(history: History, db: sqlite3.Connection, host_id: int, since: float, until: float) -> list[dict]:
    """When nothing is known of a host: more than 5 minutes without a report that was made in them."""
    times = {tick.ms for tick in history.tail(db, host_id, since, until).values()}
    for row in list_chunks(db, host_id, RAW, since // HOUR * HOUR, until):
        times.update(key[0] for key in unpack_block(history, db, row["body"], {}, {}).keys)
    ordered = sorted(times)
    return [{"from": a / 1000, "to": b / 1000, "seconds": (b - a) / 1000}
            for a, b in zip(ordered, ordered[1:]) if b - a > OFFLINE_SECONDS * 1000]


def list_sparks(history: History, db: sqlite3.Connection, host_ids: list[int],
                now: float) -> dict[int, list[float | None]]:
    """CPU in use of the last 24 hours by host, the hour under way last: one query, and what is at hand."""
    last = int(now) // HOUR * HOUR
    rows = db.execute("SELECT host_id, hours FROM spark WHERE host_id IN (SELECT value FROM json_each(:ids))",
                      {"ids": json.dumps(host_ids)})
    packed = {row["host_id"]: json.loads(row["hours"]) for row in rows}
    found = {}
    for host_id in host_ids:
        fresh, old = history.hours.get(host_id, {}), packed.get(host_id, {})
        hours = range(last - 23 * HOUR, last + 1, HOUR)
        line = [old[str(hour)] if str(hour) in old else fresh[hour][0] / fresh[hour][1] if hour in fresh else None
                for hour in hours]
        found[host_id] = line if any(value is not None for value in line) else []
    return found


def export_host(history: History, db: sqlite3.Connection, host_id: int, now: float) -> Iterator[list[Any]]:
    """Everything there is of a host: [time, step, series, average, minimum, maximum, count], by step, then by
    chunk. Memory holds one chunk at a time."""
    for step, begin in export_spans(db, host_id, now):
        source = Source(history, db, host_id, None)
        if step == RAW:
            yield from export_raw(source, begin)
            continue
        for (section, object), fields in sorted(source.points(step, begin, begin + SPANS[step]).items()):
            for field, points in sorted(fields.items()):
                name = series_name(section, object, field)
                yield from ([at, step, name, *points[at]] for at in sorted(points))


def export_spans(db: sqlite3.Connection, host_id: int, now: float) -> Iterator[tuple[int, int]]:
    """Step and beginning of each span that may hold anything."""
    oldest = begin_of_history(db, host_id)
    if oldest is not None:
        for step in STEP_CODES:
            spans = {chunk_begin(row[0]) for row in db.execute(
                "SELECT id FROM chunk WHERE id BETWEEN :first AND :last",
                {"first": chunk_id(host_id, step, 0), "last": chunk_id(host_id, step, 1 << 33)})}
            if step != RAW:
                spans |= {day // SPANS[step] * SPANS[step] for day in day_states(db, host_id, 0, now)}
            first, last = report_span(host_id, 0, None)
            spans |= {int(report_time(row[0])) // SPANS[step] * SPANS[step] for row in db.execute(
                "SELECT id FROM report WHERE id BETWEEN :first AND :last", {"first": first, "last": last})}
            yield from ((step, span) for span in sorted(spans))


def export_raw(source: Source, begin: int) -> Iterator[list[Any]]:
    """An hour as received."""
    block = source.block(begin - RATE_MOST, begin + HOUR - 0.001)
    for key, (_, columns) in sorted(block.objects.items()):
        for field in sorted(columns.keys() - {BOOT}):
            times, values = list_values(block, key, field)
            name = series_name(*key, field)
            yield from ([at / 1000, RAW, name, value, value, value, 1] for at, value in zip(times, values)
                        if value == value and at >= begin * 1000)


def series_name(section: str, object: str, field: str) -> str:
    return f"{section}/{object}.{field}" if object else f"{section}.{field}"


# Packing: closed hours become chunks, closed days become points, old ones go. Everything is worked out beside the
# writer; what it then writes takes it some milliseconds.

HOUR_GRACE = 2 * MINUTE  # an hour is packed so long after its end, each host at its own moment
DAY_GRACE = 15 * MINUTE
QUIET_SECONDS = 15  # a backlog that is still coming in is left alone, but not for ever
PACK_ROWS = 20_000  # reports in one go
ROLL_OBJECTS = 8  # objects in one go


class Keeper:
    """Packs the history of a server's hosts, some at each turn."""

    def __init__(self, store: Store, history: History, fleet: Fleet):
        self.store, self.history, self.fleet = store, history, fleet
        self._after = 0  # the host whose turn was last

    def turn(self, now: float, seconds: float = 0.5) -> None:
        """Work for about so long; the next turn goes on with the next host."""
        end = time.monotonic() + seconds
        ids = sorted(self.fleet.hosts)
        start = bisect.bisect_right(ids, self._after)
        for host_id in [*ids[start:], *ids[:start]]:
            while self.step(host_id, now):
                if time.monotonic() > end:
                    self._after = host_id
                    return
            if time.monotonic() > end:
                self._after = host_id
                return
        self._after = 0

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
        for day, work in list_due_days(db, host_id, now):
            if work == CHANGED:
                self.roll_day(db, host_id, day, now)
            else:
                self.store.write(partial(seal_day, host_id, day))
            return True
        return False

    def settle(self, now: float) -> None:
        """Do all there is to do by now (tests, bench)."""
        while any(self.step(host_id, now) for host_id in list(self.fleet.hosts)):
            pass

    def pack_hour(self, db: sqlite3.Connection, state: HostState, hour: int, now: float) -> None:
        """Move an hour's reports from the tail into its chunk; of a sealed day, into its points."""
        tail = self.history.tail(db, state.id, hour, hour + HOUR - 0.001)
        ids = list(tail)[:PACK_ROWS]
        block = block_of(tail[one] for one in ids)
        day = hour // DAY * DAY
        if day_states(db, state.id, day, day).get(day) == SEALED:
            points = {key: fold_object(block, key, columns.keys() - {BOOT}, day, day + DAY)
                      for key, (_, columns) in block.objects.items()}
            chunks = self._points_chunks(db, state.id, day, points, now, add=True)
            self.store.write(partial(put_hour, state, hour, ids, chunks, None, SEALED, now), urgent=False)
        else:
            old = find_chunk(db, state.id, RAW, hour)
            if old:
                objects = find_objects(db, state.id, None)
                block = merge_blocks([unpack_block(self.history, db, old["body"], objects, None), block])
            body = pack_block(block, *self.numbers(db, state.id, {
                key: stored_names(columns) for key, (_, columns) in block.objects.items()}))
            chunks = [(chunk_id(state.id, RAW, hour), body)]
            self.store.write(partial(put_hour, state, hour, ids, chunks, spark_of(block), CHANGED, now), urgent=False)
        self.history.forget(state.id, ids)

    def roll_day(self, db: sqlite3.Connection, host_id: int, day: int, now: float) -> None:
        """Make the points of a day from its reports, one object after the other."""
        points: Points = {}
        source = Source(self.history, db, host_id, None)
        objects = sorted(source.objects.items())
        for first in range(0, len(objects), ROLL_OBJECTS):  # a whole day of everything would take much memory
            source.objects = dict(objects[first : first + ROLL_OBJECTS])
            points.update(source.day_points(day, tail=False))
        chunks = self._points_chunks(db, host_id, day, points, now, add=False) if points else []
        self.store.write(partial(put_day, host_id, day, chunks, now), urgent=False)

    def _points_chunks(self, db: sqlite3.Connection, host_id: int, day: int, points: Points, now: float, *,
                       add: bool) -> list[tuple[int, bytes]]:
        """The chunk of a day's 5 minutes, and the one of hours that the day is in."""
        objects = find_objects(db, host_id, None)
        if add:
            row = find_chunk(db, host_id, FINE, day)
            old = unpack_points(self.history, db, row["body"], day, FINE, objects, None) if row else {}
            add_points(old, points)
            points = old
        begin = day // SPANS[COARSE] * SPANS[COARSE]
        row = find_chunk(db, host_id, COARSE, begin)
        hours = unpack_points(self.history, db, row["body"], begin, COARSE, objects, None) if row else {}
        for key, fields in coarsen_all(points, COARSE).items():
            for field, one in fields.items():
                hours.setdefault(key, {}).setdefault(field, {}).update(one)
        chunks = []
        for step, first, found in ((FINE, day, points), (COARSE, begin, hours)):
            names = {key: tuple(sorted(name for name in fields if fields[name])) for key, fields in found.items()}
            body = pack_points(found, first, step, *self.numbers(db, host_id, names))
            chunks.append((chunk_id(host_id, step, first), body))
        return chunks

    def numbers(self, db: sqlite3.Connection, host_id: int,
                names: dict[ObjectKey, tuple[str, ...]]) -> tuple[dict[ObjectKey, int], dict[tuple[str, ...], int]]:
        """The numbers of objects and layouts; what is new gets one."""
        objects = {key: number for number, key in find_objects(db, host_id, None).items()}
        layouts = {names: number for number, names in self.history.layouts.items()}
        if names.keys() - objects.keys() or set(names.values()) - layouts.keys():
            objects, layouts = self.store.write(partial(number_names, host_id, names))
            self.history.layouts.update((number, names) for names, number in layouts.items())
        return objects, layouts


def find_due_hour(db: sqlite3.Connection, host_id: int, now: float) -> int | None:
    """The oldest hour with reports in the tail, if it is over and its reports are all there, as far as one can
    tell."""
    first, last = report_span(host_id, 0, None)
    row = db.execute("SELECT id FROM report WHERE id BETWEEN :first AND :last ORDER BY id LIMIT 1",
                     {"first": first, "last": last}).fetchone()
    if row is None:
        return None
    hour = int(report_time(row[0])) // HOUR * HOUR
    if hour + HOUR + HOUR_GRACE + host_id * 37 % (5 * MINUTE) > now:
        return None
    first, last = report_span(host_id, hour, hour + HOUR - 0.001)
    came = db.execute("SELECT min(received_at), max(received_at) FROM report WHERE id BETWEEN :first AND :last",
                      {"first": first, "last": last}).fetchone()
    return hour if came[1] + QUIET_SECONDS <= now or came[0] + 4 * QUIET_SECONDS <= now else None


def list_due_days(db: sqlite3.Connection, host_id: int, now: float) -> list[tuple[int, int]]:
    """Days to roll up, and rolled-up days whose reports may go; the oldest first."""
    due = []
    for day, state in db.execute("""
            SELECT day, state FROM history_day WHERE host_id = :host AND (
                state = 0 AND day < :over OR state = 1 AND day < :old) ORDER BY day""",
            {"host": host_id, "over": now - DAY - DAY_GRACE - host_id * 37 % (5 * MINUTE),
             "old": now - DAY - KEPT[RAW]}).fetchall():
        last = db.execute("SELECT max(written_at) FROM chunk WHERE id BETWEEN :first AND :last",
                          {"first": chunk_id(host_id, RAW, day), "last": chunk_id(host_id, RAW, day + DAY - 1)})
        written_at = last.fetchone()[0] or 0.0
        # A late part of a day may follow soon after another: with all its reports it is exact.
        if written_at + (MINUTE if state == CHANGED else KEPT[RAW]) <= now:
            due.append((day, state))
    return due


def number_names(host_id: int, names: dict[ObjectKey, tuple[str, ...]],
                 db: sqlite3.Connection) -> tuple[dict[ObjectKey, int], dict[tuple[str, ...], int]]:
    """Give numbers to objects and layouts that have none. `Problem` if the host is gone."""
    if not db.execute("SELECT 1 FROM host WHERE id = :id", {"id": host_id}).fetchone():
        raise Problem("unknown_host", "the host has just been removed")
    db.executemany("INSERT OR IGNORE INTO history_object (host_id, section, object) VALUES (?, ?, ?)",
                   [(host_id, *key) for key in names])
    db.executemany("INSERT OR IGNORE INTO history_layout (fields) VALUES (?)",
                   [(json.dumps(one),) for one in sorted(set(names.values()))])
    layouts = {tuple(json.loads(row["fields"])): row["id"] for row in db.execute("SELECT * FROM history_layout")}
    return {key: number for number, key in find_objects(db, host_id, None).items()}, layouts


def put_hour(state: HostState, hour: int, ids: list[int], chunks: list[tuple[int, bytes]],
             spark: float | None, day_state: int, now: float, db: sqlite3.Connection) -> None:
    """Write an hour's chunk, and take its reports out of the tail; those with a latest state are kept elsewhere."""
    if not put_chunks(db, state.id, chunks, now):
        return
    held = {one for pair in state.pointers().values() for one in pair if one}
    db.executemany("INSERT OR REPLACE INTO kept_report SELECT * FROM report WHERE id = ?",
                   [(one,) for one in ids if one in held])
    db.executemany("DELETE FROM report WHERE id = ?", [(one,) for one in ids])
    first, last = report_span(state.id, 0, None)
    db.execute("""
        DELETE FROM kept_report WHERE id BETWEEN :first AND :last AND id NOT IN (SELECT value FROM json_each(:held))""",
        {"first": first, "last": last, "held": json.dumps(sorted(held))})
    day = hour // DAY * DAY
    if day_state == CHANGED:
        db.execute("INSERT INTO history_day VALUES (:host, :day, 0) ON CONFLICT DO UPDATE SET state = 0",
                   {"host": state.id, "day": day})
        if hour + HOUR == day + DAY:  # the next day's first rates begin in this hour
            db.execute("UPDATE history_day SET state = 0 WHERE host_id = :host AND day = :day AND state = 1",
                       {"host": state.id, "day": day + DAY})
        put_spark(db, state.id, hour, spark, now)


def put_chunks(db: sqlite3.Connection, host_id: int, chunks: list[tuple[int, bytes]], now: float) -> bool:
    """Write chunks of a host; False if it is gone."""
    if not db.execute("SELECT 1 FROM host WHERE id = :id", {"id": host_id}).fetchone():
        return False
    for number, body in chunks:
        db.execute("INSERT OR REPLACE INTO chunk VALUES (:id, :now, :body)", {"id": number, "now": now, "body": body})
    return True


def put_day(host_id: int, day: int, chunks: list[tuple[int, bytes]], now: float, db: sqlite3.Connection) -> None:
    """Write a day's points. Only the keeper changes chunks of reports, so the day is as it was read."""
    if put_chunks(db, host_id, chunks, now):
        db.execute("UPDATE history_day SET state = 1 WHERE host_id = :host AND day = :day",
                   {"host": host_id, "day": day})


def seal_day(host_id: int, day: int, db: sqlite3.Connection) -> None:
    """Drop a day's reports; its points stay."""
    db.execute("DELETE FROM chunk WHERE id BETWEEN :first AND :last",
               {"first": chunk_id(host_id, RAW, day), "last": chunk_id(host_id, RAW, day + DAY - 1)})
    db.execute("UPDATE history_day SET state = 2 WHERE host_id = :host AND day = :day", {"host": host_id, "day": day})


def spark_of(block: Block) -> float | None:
    """The hour's CPU in use."""
    _, values = list_values(block, ("node", ""), "cpu_ratio")
    known = [value for value in values if value == value]
    return round(sum(known) / len(known), 4) if known else None


def put_spark(db: sqlite3.Connection, host_id: int, hour: int, value: float | None, now: float) -> None:
    """Take an hour into the host's small line of the last day."""
    if hour < now - 2 * DAY:
        return
    row = db.execute("SELECT hours FROM spark WHERE host_id = :host", {"host": host_id}).fetchone()
    hours = {at: one for at, one in (json.loads(row[0]) if row else {}).items() if int(at) > now - 2 * DAY}
    hours[str(hour)] = value
    db.execute("INSERT INTO spark VALUES (:host, :hours) ON CONFLICT DO UPDATE SET hours = :hours",
               {"host": host_id, "hours": json.dumps(hours)})


EXPIRE_ROWS = 40  # chunks dropped in one go: some megabytes


def expire(db: sqlite3.Connection, now: float) -> int:
    """Drop what is older than its step is kept, and chunks of hosts that are gone, a little at a time; gives back
    how many."""
    found = list_expired(db, now)[:EXPIRE_ROWS]
    db.executemany("DELETE FROM chunk WHERE id = ?", [(one,) for one in found])
    db.execute("DELETE FROM history_day WHERE day < :before", {"before": now - KEPT[FINE] - DAY})
    return len(found)


def list_expired(db: sqlite3.Connection, now: float) -> list[int]:
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
                found += [one[0] for one in db.execute(
                    "SELECT id FROM chunk WHERE id BETWEEN :first AND :last LIMIT :most",
                    {"first": chunk_id(host_id, step, 0), "last": chunk_id(host_id, step, ends), "most": EXPIRE_ROWS})]
        after = ((host_id + 1) << CHUNK_SHIFT + 2) - 1
    return found


VACUUM_PAGES = 256  # 1 MiB: some milliseconds


def vacuum(db: sqlite3.Connection) -> None:
    """Give free pages back to the file system, a few at a time; a tenth stays for what comes next."""
    free, pages = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_count"))
    if free > max(pages // 10, 2 * VACUUM_PAGES):
        db.execute(f"PRAGMA incremental_vacuum({VACUUM_PAGES})").fetchall()


def prune(db: sqlite3.Connection, now: float) -> None:
    """Drop what is older than it is kept, of what is not history."""
    db.execute("DELETE FROM event WHERE at < :before", {"before": now - KEEP_EVENTS})
    db.execute("DELETE FROM alert WHERE state = 'resolved' AND resolved_at < :before", {"before": now - KEEP_RESOLVED})
    db.execute("DELETE FROM session WHERE used_at < :before", {"before": now - SESSION_SECONDS})


# --- ingest: a report counts whole or not at all, and once ---


class Monitor:
    """A running server: its settings, its database, and the fleet in memory. `clock` gives unix time."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.time):
        self.config, self.clock = config, clock
        self.secret = config.secret()
        self.fleet = Fleet()
        self.fleet.serving_since = clock()
        self.runs: dict[tuple[int, str], Run] = {}
        self.history = History()
        self.logins = LoginLimiter()
        self.ingest_rate = RateLimiter(REPORTS_BURST, REPORTS_PER_SECOND)
        self.boot = secrets.token_hex(4)  # makes ETags of another start of the server invalid
        self.reports_accepted = self.reports_duplicate = 0
        self.store = Store(config.database_path, self.reload)
        self.store.write(self._start)
        self.keeper = Keeper(self.store, self.history, self.fleet)

    def _start(self, db: sqlite3.Connection) -> None:
        check_secret(db, self.secret)
        set_meta(db, "serving_since", self.fleet.serving_since)
        self.fleet.load(db)

    def reload(self) -> None:
        """After a failed commit memory is ahead of the disk: take the disk's word."""
        self.runs.clear()
        self.history.clear()
        try:
            self.fleet.load(self.store.db)
        except sqlite3.Error as error:
            log(f"writer: could not read the state again: {error}")

    def close(self) -> None:
        self.store.close()


class Run(NamedTuple):
    """A run of an agent as the database has it: row id and the sequence numbers that have come."""

    id: int
    ranges: list[list[int]]


def check_secret(db: sqlite3.Connection, secret: bytes) -> None:
    """Remember which secret the tokens were made with; say so in the log if it is another now."""
    mark = hmac.digest(secret, b"proxmon secret check", "sha256").hex()
    known = get_meta(db, "secret_check")
    if known is None:
        set_meta(db, "secret_check", mark)
    elif known != mark:
        log("server: SECRET_KEY_BASE is not the one the hosts' tokens were made with: "
            "restore it, or rotate the token of every host")


def ingest(monitor: Monitor, host_name: str, header: Callable[[str], str], body: bytes) -> dict[str, Any]:
    """Take the reports of one request; returns when they are on the disk. `Problem` for everything else."""
    now = monitor.clock()
    host = find_host(monitor.store.reader(), host_name) if HOST_NAME.fullmatch(host_name) else None
    if host is None:
        raise Problem("unknown_host", "no host of this name is registered")
    check_signature(host_key(monitor.secret, host["nonce"]), header, body, now)
    encoding = header("content-encoding").lower()
    unpacked = unpack(body, encoding)
    parsed = parse_json(unpacked)
    reports = check_reports(parsed, host["name"])
    wait = monitor.ingest_rate.take(host["id"], len(reports), now)
    if wait:
        raise Problem("rate_limited", "too many reports of this host", headers={"Retry-After": str(math.ceil(wait))})
    kept = body if encoding == "gzip" and isinstance(parsed, dict) and not has_surrogates(unpacked) else None
    accepted = monitor.store.write(partial(insert_reports, monitor, host["id"], reports, kept, now), urgent=False)
    return {"status": "ok", "accepted": accepted, "duplicates": len(reports) - accepted, "server_time": now}


def insert_reports(monitor: Monitor, host_id: int, reports: list[dict[str, Any]], kept: bytes | None, now: float,
                   db: sqlite3.Connection) -> int:
    """Write what is new of a batch and all that follows from it; gives back how many were new. By the writer."""
    monitor.fleet.refresh(db)
    state = monitor.fleet.hosts.get(host_id)
    if state is None:
        raise Problem("unknown_host", "the host has just been removed")
    accepted, touched = 0, {}
    for report in reports:
        run = find_run(monitor, db, host_id, report["run_id"], now)
        if not add_to_ranges(run.ranges, report["seq"]):
            continue
        at = min(report["time"], now)
        packed = kept or zlib.compress(json.dumps(report, separators=(",", ":")).encode(), 1)
        report_id = insert_report(db, host_id, run.id, report["seq"], at, now, packed)
        state.apply(report, Stamp(run.id, report["seq"], at, now, report_id))
        monitor.history.remember(host_id, report_id, build_tick(report, now))
        touched[run.id] = run
        accepted += 1
    if accepted:
        keep_state(db, state, touched.values(), now)
        judge_host(db, monitor.fleet, state, now)
        monitor.fleet.generation += 1
    monitor.reports_accepted += accepted
    monitor.reports_duplicate += len(reports) - accepted
    return accepted


def find_run(monitor: Monitor, db: sqlite3.Connection, host_id: int, run_id: str, now: float) -> Run:
    """The run a report belongs to, made with its first report."""
    run = monitor.runs.get((host_id, run_id))
    if run is None:
        row = db.execute("SELECT id, ranges FROM run WHERE host_id = :host AND run_id = :run",
                         {"host": host_id, "run": run_id}).fetchone()
        if row is None:
            new_id = db.execute("""
                INSERT INTO run (host_id, run_id, ranges, first_at, last_seen_at)
                VALUES (:host, :run, '', :now, :now)""", {"host": host_id, "run": run_id, "now": now}).lastrowid
            run = Run(new_id or 0, [])
        else:
            run = Run(row["id"], parse_ranges(row["ranges"]))
        monitor.runs[host_id, run_id] = run
    return run


def keep_state(db: sqlite3.Connection, state: HostState, runs: Iterable[Run], now: float) -> None:
    """Write which sequence numbers have come, and which reports hold the latest state."""
    for run in runs:
        db.execute("UPDATE run SET ranges = :ranges, last_seen_at = :now WHERE id = :id",
                   {"ranges": format_ranges(run.ranges), "now": now, "id": run.id})
    db.execute("INSERT INTO latest VALUES (:id, :sections) ON CONFLICT DO UPDATE SET sections = :sections",
               {"id": state.id, "sections": json.dumps(state.pointers(), separators=(",", ":"))})


# --- jobs: what runs by the clock, in one thread ---


class Job(NamedTuple):
    name: str
    every_seconds: float
    work: Callable[[Monitor, float, sqlite3.Connection], None]
    beside: bool = False  # takes long: works beside the writer and gives it small pieces


def judge_fleet(monitor: Monitor, now: float, db: sqlite3.Connection) -> None:
    """Rules that need no report: silence, and holds that have run out."""
    monitor.fleet.refresh(db)
    for state in monitor.fleet.hosts.values():
        judge_host(db, monitor.fleet, state, now)
    monitor.fleet.generation += 1  # verdicts depend on the time too


def sign_of_life(monitor: Monitor, now: float, db: sqlite3.Connection) -> None:
    """Proof that the database can be written, and until when the server was there."""
    set_meta(db, "alive_at", now)


def run_prune(monitor: Monitor, now: float, db: sqlite3.Connection) -> None:
    prune(db, now)


def keep_history(monitor: Monitor, now: float, db: sqlite3.Connection) -> None:
    """Hours into chunks, days into points."""
    monitor.keeper.turn(now)


def expire_history(monitor: Monitor, now: float, db: sqlite3.Connection) -> None:
    """What is too old goes, and the file gets smaller, each in pieces that nobody notices."""
    for _ in range(20):
        if not monitor.store.write(lambda db: expire(db, now)):
            break
    monitor.store.write(vacuum)


JOBS = (
    Job("judge", 5, judge_fleet),
    Job("alive", 30, sign_of_life),
    Job("prune", HOUR, run_prune),
    Job("history", 5, keep_history, beside=True),
    Job("expire", 10 * MINUTE, expire_history, beside=True),
)


class Scheduler:
    """The thread of jobs. A job that fails is logged and comes again; its last end and error are kept."""

    def __init__(self, monitor: Monitor):
        self.monitor = monitor
        self.last: dict[str, tuple[float, str | None]] = {}
        self._due = {job.name: time.monotonic() + (0 if job.name == "alive" else job.every_seconds) for job in JOBS}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def turn(self) -> None:
        """Run what is due."""
        for job in JOBS:
            if self._due[job.name] <= time.monotonic():
                self._due[job.name] = time.monotonic() + job.every_seconds
                self._attempt(job)

    def _attempt(self, job: Job) -> None:
        error = None
        try:
            if job.beside:
                job.work(self.monitor, self.monitor.clock(), self.monitor.store.reader())
            else:
                self.monitor.store.write(partial(job.work, self.monitor, self.monitor.clock()))
        except Exception as caught:  # one job's fault must not end the others
            error = f"{type(caught).__name__}: {caught}"
            log(f"jobs: {job.name}: {error}")
        self.last[job.name] = (self.monitor.clock(), error)

    def _run(self) -> None:
        while not self._stop.wait(1):
            self.turn()


# --- api: read the request, ask, answer ---


class Answer(Exception):
    """A finished answer; raised or returned."""

    def __init__(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None,
                 stream: Iterator[bytes] | None = None):
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers or {}
        self.stream = stream  # instead of a body, when it would be too long to hold


class Listing(NamedTuple):
    """Rows that the caller gets as json, csv or text."""

    rows: list[dict[str, Any]]
    columns: tuple[str, ...]


class Call:
    """One request, with who is asking."""

    def __init__(self, monitor: Monitor, environ: dict[str, Any], params: dict[str, str]):
        self.monitor, self.environ, self.params = monitor, environ, params
        self.now = monitor.clock()
        self.db = monitor.store.reader()
        self.query = {key: values[-1] for key, values in urllib.parse.parse_qs(
            environ.get("QUERY_STRING", ""), keep_blank_values=True, errors="replace").items()}
        self.actor: str | None = None  # 'session' or the API token's name
        self.admin = False
        self.cookie = ""
        monitor.fleet.refresh(self.db)

    @property
    def fleet(self) -> Fleet:
        return self.monitor.fleet

    def header(self, name: str) -> str:
        """A request header, '' if it is not there."""
        key = name.upper().replace("-", "_")
        return self.environ.get(key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else "HTTP_" + key, "") or ""

    def json(self) -> dict[str, Any]:
        """The body of a write: a JSON object of at most 64 KiB, or none."""
        body = read_request(self.environ, 1 << 16)
        if not body:
            return {}
        if media_type(self.header("content-type")) != "application/json":
            raise Problem("unsupported_media_type", "send application/json")
        parsed = parse_json(body)
        if not isinstance(parsed, dict):
            raise Problem("invalid_request", "the body should be a JSON object", pointer="")
        return parsed

    def address(self) -> str:
        """Where the request comes from; a proxy's word counts only if it is trusted."""
        address = self.environ.get("REMOTE_ADDR", "")
        for hop in reversed([one.strip() for one in self.header("x-forwarded-for").split(",") if one.strip()]):
            if not is_trusted(address, self.monitor.config):
                break
            address = hop
        return address[:64]

    def states(self) -> list[HostState]:
        """The hosts the filters `host`, `site` and `tag` leave, worst first."""
        wanted = {key: self.query[key].lower() for key in ("host", "site", "tag") if key in self.query}
        return [state for state in self.fleet.sorted(self.now)
                if wanted.get("host", state.name.lower()) == state.name.lower()
                and wanted.get("site", (state.site or "").lower()) == (state.site or "").lower()
                and ("tag" not in wanted or wanted["tag"] in (tag.lower() for tag in state.tags))]


def is_trusted(address: str, config: Config) -> bool:
    try:
        return any(ipaddress.ip_address(address) in network for network in config.trusted_proxies)
    except ValueError:
        return False


def media_type(text: str) -> str:
    return text.partition(";")[0].strip().lower()


def read_request(environ: dict[str, Any], limit: int) -> bytes:
    """The body as sent. `Problem('too_large')` before it is read."""
    length = environ.get("CONTENT_LENGTH") or "0"
    if not length.isdigit() or int(length) > limit:
        raise Problem("too_large", f"at most {limit} bytes in one request")
    return environ["wsgi.input"].read(int(length))


class Route(NamedTuple):
    method: str
    path: str
    auth: str  # none, read, admin, or page (a session; without one to the log-in)
    handler: Callable[[Call], Any]
    summary: str
    live: bool  # depends on nothing but the fleet's state: can be answered 304 without work
    columns: tuple[str, ...]


ROUTES: list[Route] = []


def route(method: str, path: str, *, auth: str, live: bool = False,
          columns: tuple[str, ...] = ()) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Register a handler; its docstring's first line is the summary in the API's description."""
    assert auth in ("none", "read", "admin", "page")

    def register(handler: Callable[[Call], Any]) -> Callable[[Call], Any]:
        summary = (handler.__doc__ or "").partition("\n")[0]
        ROUTES.append(Route(method, path, auth, handler, summary, live, columns))
        return handler

    return register


@route("GET", "/api/v1/overview", auth="read", live=True)
def get_overview(call: Call) -> Any:
    """The fleet in a few numbers."""
    return build_overview(call.fleet, call.now)


@route("GET", "/api/v1/hosts", auth="read", live=True, columns=HOST_COLUMNS)
def get_hosts(call: Call) -> Any:
    """Every host, worst first."""
    return Listing([host_row(call.fleet, state, call.now) for state in call.states()], HOST_COLUMNS)


@route("POST", "/api/v1/hosts", auth="admin")
def post_host(call: Call) -> Any:
    """Register a host; its token is in the answer and never again."""
    wanted = host_changes(call.json(), {"name", "site", "tags"})
    row = call.monitor.store.write(lambda db: insert_host(
        db, wanted.get("name"), call.now, site=wanted.get("site"), tags=wanted.get("tags")))
    return token_answer(call, row, 201)


@route("GET", "/api/v1/hosts/<id>", auth="read", live=True)
def get_host(call: Call) -> Any:
    """All that is known of a host: the latest of each section as sent, alerts, missing reports."""
    return host_detail(call, call.fleet.find(call.params["id"]))


@route("PATCH", "/api/v1/hosts/<id>", auth="admin")
def patch_host(call: Call) -> Any:
    """Change name, site, tags, note or maintenance_until; the token stays."""
    wanted = host_changes(call.json(), {"name", "site", "tags", "note", "maintenance_until"})
    row = call.monitor.store.write(lambda db: update_host(db, call.params["id"], wanted, call.now))
    return {"host": shown_host(call, row)}


@route("DELETE", "/api/v1/hosts/<id>", auth="admin")
def remove_host(call: Call) -> Any:
    """Remove a host with all it has sent."""
    call.monitor.store.write(lambda db: delete_host(db, call.params["id"], call.now))
    return Answer(204)


@route("POST", "/api/v1/hosts/<id>/rotate-token", auth="admin")
def post_rotate_token(call: Call) -> Any:
    """A new token for a host; the old one is refused from here on."""
    row = call.monitor.store.write(lambda db: rotate_nonce(db, call.params["id"], call.now))
    return token_answer(call, row, 200)


@route("GET", "/api/v1/hosts/<id>/history", auth="read")
def get_history(call: Call) -> Any:
    """Points [time, average, minimum, maximum] of the series named: section.field or section/object.field."""
    state = call.fleet.find(call.params["id"])
    question = read_question(call, state)
    of_guests = any(name.startswith("guests/") for name in question.names)
    hosts = same_cluster(call.fleet, state) if of_guests else [state.id]
    answers = ask_history(call.monitor.history, call.db, hosts, question)
    if call.query.get("format", "json") == "csv":
        rows = [dict(zip(HISTORY_COLUMNS, (point[0], question.step, name, *point[1:])))
                for name, points in zip(question.names, answers) for point in points]
        return Answer(200, to_csv(rows, HISTORY_COLUMNS).encode("utf-8", "replace"),
                      {"Content-Type": "text/csv; charset=utf-8"})
    return {"series": [{"name": name, "step": question.step, "points": points}
                       for name, points in zip(question.names, answers)]}


HISTORY_COLUMNS = ("time", "step", "series", "average", "minimum", "maximum")
SERIES_MOST = 500  # in one question


def read_question(call: Call, state: HostState) -> Question:
    """What ?series=…&from=…&to=…&step=… asks for. `Problem('invalid_request')`."""
    names = urllib.parse.parse_qs(call.environ.get("QUERY_STRING", ""), errors="replace").get("series", [])
    if len(names) > SERIES_MOST:
        raise Problem("invalid_request", f"at most {SERIES_MOST} series in one question", parameter="series")
    until = min(query_number(call, "to", call.now), call.now + DAY)
    since = query_number(call, "from", until - DAY)
    wanted = query_number(call, "step", 0) or None
    if wanted is not None and not 1 <= wanted <= 366 * DAY:
        raise Problem("invalid_request", "step: 1 to 31622400 seconds; 30 = as received", parameter="step")
    begin = begin_of_history(call.db, state.id)
    since = max(since, begin if begin is not None else since, 0)  # nothing was before: no need for a coarser step
    oldest_raw = call.now - KEPT[RAW]
    return Question(names, since, until, choose_step(since, until, wanted, oldest_raw, call.now))


@route("GET", "/api/v1/hosts/<id>/gaps", auth="read")
def get_gaps(call: Call) -> Any:
    """What never came of a host, and when: reports lost by their sequence numbers, and times of silence."""
    state = call.fleet.find(call.params["id"])
    since = query_number(call, "from", call.now - KEPT[RAW])
    return {"missing_reports": missing_reports(call.db, state.id), "from": since,
            "lost": list_lost(call.monitor.history, call.db, state.id, since, call.now),
            "silences": list_silences(call.monitor.history, call.db, state.id, since, call.now)}


@route("GET", "/api/v1/hosts/<id>/export", auth="read")
def get_export(call: Call) -> Any:
    """The whole history of a host: ?format=jsonl (default) or csv."""
    state = call.fleet.find(call.params["id"])
    form = call.query.get("format", "jsonl")
    if form not in ("jsonl", "csv"):
        raise Problem("invalid_request", "format: jsonl or csv", parameter="format")
    rows = export_host(call.monitor.history, call.db, state.id, call.now)
    kind = "application/x-ndjson" if form == "jsonl" else "text/csv; charset=utf-8"
    return Answer(200, b"", {"Content-Type": kind, "Cache-Control": "no-store",
                             "Content-Disposition": f'attachment; filename="{state.name}-history.{form}"'},
                  stream=write_export(rows, form))


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


@route("GET", "/api/v1/guests", auth="read", live=True, columns=GUEST_COLUMNS)
def get_guests(call: Call) -> Any:
    """Every guest of the fleet."""
    return Listing([row for state in call.states() for row in guest_rows(state, call.now)], GUEST_COLUMNS)


@route("GET", "/api/v1/pools", auth="read", live=True, columns=POOL_COLUMNS)
def get_pools(call: Call) -> Any:
    """Every ZFS pool of the fleet."""
    return Listing([row for state in call.states() for row in pool_rows(state, call.now)], POOL_COLUMNS)


@route("GET", "/api/v1/storages", auth="read", live=True, columns=STORAGE_COLUMNS)
def get_storages(call: Call) -> Any:
    """Every Proxmox storage of the fleet, inactive and disabled ones too."""
    return Listing([row for state in call.states() for row in storage_rows(state, call.now)], STORAGE_COLUMNS)


ALERT_COLUMNS = ("id", "rule", "severity", "state", "host", "object", "message", "value", "since", "resolved_at",
                 "acknowledged", "because_of")


@route("GET", "/api/v1/alerts", auth="read", live=True, columns=ALERT_COLUMNS)
def get_alerts(call: Call) -> Any:
    """Alerts, worst first: ?state=firing (default), pending, resolved or all."""
    state = call.query.pop("state", "firing")
    if state not in ("firing", "pending", "resolved", "all"):
        raise Problem("invalid_request", "state: firing, pending, resolved or all", parameter="state")
    hosts = {one.name for one in call.states()}
    return Listing([row for row in list_alerts(call.db, state) if row["host"] in hosts], ALERT_COLUMNS)


EVENT_COLUMNS = ("id", "at", "kind", "host", "object", "message")


@route("GET", "/api/v1/events", auth="read", columns=EVENT_COLUMNS)
def get_events(call: Call) -> Any:
    """What changed, newest first: ?since=unix time."""
    return Listing(list_events(call.db, since=query_number(call, "since", 0), limit=LIST_MOST), EVENT_COLUMNS)


TOKEN_COLUMNS = ("name", "admin", "created_at", "expires_at")


@route("GET", "/api/v1/tokens", auth="admin", columns=TOKEN_COLUMNS)
def get_tokens(call: Call) -> Any:
    """The API tokens' names."""
    return Listing(list_api_tokens(call.db), TOKEN_COLUMNS)


@route("POST", "/api/v1/tokens", auth="admin")
def post_token(call: Call) -> Any:
    """Create an API token: name, admin (false), expires_days (never); it is in the answer and never again."""
    wanted = call.json()
    admin, days = wanted.get("admin", False), wanted.get("expires_days")
    if not isinstance(admin, bool):
        raise Problem("invalid_request", "admin is true or false", pointer="/admin")
    if days is not None and not (is_number(days) and 0 < days <= 36500):
        raise Problem("invalid_request", "expires_days is a number of days", pointer="/expires_days")
    name = wanted.get("name")
    token = call.monitor.store.write(lambda db: create_api_token(db, name, call.now, admin=admin, days=days))
    return Answer(201, json.dumps({"name": name, "token": token}).encode(), {"Cache-Control": "no-store"})


@route("DELETE", "/api/v1/tokens/<name>", auth="admin")
def remove_token(call: Call) -> Any:
    """Revoke an API token."""
    call.monitor.store.write(lambda db: revoke_api_token(db, call.params["name"], call.now))
    return Answer(204)


SESSION_COLUMNS = ("id", "created_at", "used_at", "address", "user_agent")


@route("GET", "/api/v1/sessions", auth="admin", columns=SESSION_COLUMNS)
def get_sessions(call: Call) -> Any:
    """Who is logged in."""
    return Listing(list_sessions(call.db, call.now), SESSION_COLUMNS)


@route("DELETE", "/api/v1/sessions/<id>", auth="admin")
def remove_session(call: Call) -> Any:
    """End a session."""
    if not call.monitor.store.write(lambda db: delete_session(db, call.params["id"])):
        raise Problem("not_found", "no such session")
    return Answer(204)


@route("GET", "/api/v1/openapi.json", auth="read")
def get_openapi(call: Call) -> Any:
    """This description."""
    return build_openapi(call.monitor.config.public_url)


@route("GET", "/healthz", auth="none")
def get_health(call: Call) -> Any:
    """Whether the database can be written, and when it last was; 503 if not."""
    store = call.monitor.store
    age = time.monotonic() - store.last_commit if store.last_commit else None
    free = shutil.disk_usage(os.path.dirname(store.path)).free
    well = store.alive and store.last_error is None and age is not None and age < 2 * MINUTE
    document = {"status": "ok" if well else "failing", "writer_alive": store.alive,
                "database_writable": store.last_error is None, "last_commit_age_seconds": age,
                "last_error": store.last_error, "disk_free_bytes": free, "version": VERSION}
    return Answer(200 if well else 503, json.dumps(document).encode(), {"Cache-Control": "no-store"})


@route("GET", "/metrics", auth="read")
def get_metrics(call: Call) -> Any:
    """The fleet for Prometheus."""
    body = "".join(render_metrics(call.monitor, call.now)).encode()
    return Answer(200, body, {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def host_changes(wanted: dict[str, Any], allowed: set[str]) -> dict[str, Any]:
    """What a write to a host may say. `Problem('invalid_request')` with a pointer to the field."""
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "name": (lambda v: isinstance(v, str), "text"),
        "site": (lambda v: v is None or isinstance(v, str) and len(v) <= 63, "at most 63 characters"),
        "note": (lambda v: v is None or isinstance(v, str) and len(v) <= 2000, "at most 2,000 characters"),
        "tags": (lambda v: isinstance(v, list) and len(v) <= 32 and all(
            isinstance(tag, str) and 0 < len(tag) <= 63 for tag in v), "a list of up to 32 short texts"),
        "maintenance_until": (lambda v: v is None or is_number(v), "unix time or null"),
    }
    for key, value in wanted.items():
        if key not in allowed:
            raise Problem("invalid_request", f"unknown field {key!r}; allowed: {', '.join(sorted(allowed))}",
                          pointer=json_pointer([key]))
        fits, expected = checks[key]
        if not fits(value):
            raise Problem("invalid_request", f"{key} should be {expected}", pointer=json_pointer([key]))
    return wanted


def shown_host(call: Call, record: sqlite3.Row) -> dict[str, Any]:
    call.fleet.refresh(call.db)
    return host_row(call.fleet, call.fleet.hosts[record["id"]], call.now)


def token_answer(call: Call, record: sqlite3.Row, status: int) -> Answer:
    """A host with its token and the commands that install its agent: for this once."""
    token = host_token(call.monitor.secret, record["nonce"])
    document = {"host": shown_host(call, record), "token": token,
                "install": install_commands(call.monitor.config, record["name"], token)}
    return Answer(status, json.dumps(document).encode(), {"Cache-Control": "no-store"})


def install_commands(config: Config, name: str, token: str) -> list[str]:
    """What to type as root on the host. It asks for the token, which so stays out of the shell's history."""
    return [f"curl -fsSL {config.public_url}/install/install.sh | sh -s -- --host {name}"]


INSTALL_FILES: dict[str, tuple[str, ...]] = {  # name -> where it lies in the program; () = in INSTALL_DIR
    "install.sh": ("packaging", "install.sh"),
    "agent.py": ("agent.py",),
    "proxmox-monitor-agent.service": ("systemd", "proxmox-monitor-agent.service"),
    "proxmox-monitor-agent_linux_amd64": (),
    "proxmox-monitor-agent_linux_arm64": (),
}


@route("GET", "/install/<name>", auth="none")
def get_install(call: Call) -> Any:
    """What installs an agent of this server's version: install.sh, agent.py, unit, binaries, SHA256SUMS. No secrets."""
    name, config = call.params["name"], call.monitor.config
    if name == "SHA256SUMS":
        bodies = {one: read_install_file(config, one) for one in INSTALL_FILES}
        body = "".join(f"{hashlib.sha256(found).hexdigest()}  {one}\n" for one, found in bodies.items() if found)
        return Answer(200, body.encode(), {"Content-Type": "text/plain; charset=utf-8"})
    found = read_install_file(config, name) if name in INSTALL_FILES else None
    if found is None:
        raise Problem("not_found", f"no such file here; the agent's binaries are looked for in {config.install_dir}"
                      if name in INSTALL_FILES else "no such file")
    kind = "application/octet-stream" if "_linux_" in name else "text/plain; charset=utf-8"
    return Answer(200, found, {"Content-Type": kind})


def read_install_file(config: Config, name: str) -> bytes | None:
    """The file, with this server's address filled in; None for a binary that is not there or of another version."""
    inside = INSTALL_FILES[name]
    try:
        with open(resource(*inside) if inside else os.path.join(config.install_dir, name), "rb") as handle:
            body = handle.read()
    except OSError:
        return None
    if name == "install.sh":
        return body.replace(b"@SERVER_URL@", config.public_url.encode())
    named = f"# proxmox-monitor-agent {VERSION} for Linux on ".encode()  # the second line of each binary
    return body if inside or body[:200].partition(b"\n")[2].startswith(named) else None


def host_detail(call: Call, state: HostState) -> dict[str, Any]:
    """The row of a host, the latest of each section as sent, its alerts, and what never came."""
    sections: dict[str, Any] = {}
    for name, section in sorted(state.sections.items()):
        sections[name] = {"time": section.time, "received_at": section.stamp and section.stamp.received_at,
                          "stale": is_stale(state, name, call.now), "absent": section.absent,
                          "error": section.error, "body": section.body}
    return {**host_row(call.fleet, state, call.now), "sections": sections, "agent": state.agent,
            "alerts": [row for row in list_alerts(call.db) if row["host"] == state.name],
            "missing_reports": missing_reports(call.db, state.id)}


def query_number(call: Call, key: str, default: float) -> float:
    try:
        value = float(call.query.get(key, default))
    except ValueError:
        value = math.nan
    if not -NUMBER_MOST < value < NUMBER_MOST:
        raise Problem("invalid_request", f"{key} should be a number", parameter=key)
    return value


def render_listing(call: Call, listing: Listing) -> Answer:
    """Filter, sort, cut and write a list in the format the caller asks for."""
    rows = sort_rows(filter_rows(listing, call.query), call.query.get("sort"), listing.columns)
    limit = int(query_number(call, "limit", LIST_LIMIT))
    offset = int(query_number(call, "offset", 0))
    if not (0 <= limit <= LIST_MOST and offset >= 0):
        raise Problem("invalid_request", f"limit: 0 to {LIST_MOST}; offset: from 0", parameter="limit")
    page = rows[offset : offset + limit]
    form = call.query.get("format", "json")
    if form == "json":
        return Answer(200, json.dumps({"items": page, "total": len(rows), "limit": limit, "offset": offset}).encode())
    if form == "csv":
        return Answer(200, to_csv(page, listing.columns).encode("utf-8", "replace"),
                      {"Content-Type": "text/csv; charset=utf-8", "X-Total-Count": str(len(rows))})
    if form == "text":
        return Answer(200, to_text(page, listing.columns).encode("utf-8", "replace"),
                      {"Content-Type": "text/plain; charset=utf-8", "X-Total-Count": str(len(rows))})
    raise Problem("invalid_request", "format: json, csv or text", parameter="format")


def filter_rows(listing: Listing, query: dict[str, str]) -> list[dict[str, Any]]:
    """Rows whose columns equal what the query says of them; `q` is found anywhere in a row's texts."""
    rows = listing.rows
    for column in query.keys() & set(listing.columns):
        rows = [row for row in rows if to_cell(row[column]).lower() == query[column].lower()]
    words = query.get("q", "").lower().split()
    if words:
        rows = [row for row in rows if matches(row, words)]
    return rows


def matches(row: dict[str, Any], words: list[str]) -> bool:
    """Whether every word occurs in one of the row's texts or is its vmid."""
    found = " ".join(to_cell(value) for key, value in row.items() if isinstance(value, (str, list)) or key == "vmid")
    return all(word in found.lower() for word in words)


def sort_rows(rows: list[dict[str, Any]], by: str | None, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """By one column, '-' in front for downwards; what is not known comes last."""
    if not by:
        return rows
    column, down = by.lstrip("-"), by.startswith("-")
    if column not in columns:
        raise Problem("invalid_request", f"sort: one of {', '.join(columns)}", parameter="sort")
    known = [row for row in rows if row[column] is not None]
    known.sort(key=lambda row: (isinstance(row[column], str), row[column] if is_number(row[column])
                                else to_cell(row[column]).lower()) if not isinstance(row[column], bool)
               else (False, int(row[column])), reverse=down)
    return known + [row for row in rows if row[column] is None]


def to_cell(value: Any) -> str:
    """A value as text; what is not known is empty."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ";".join(to_cell(one) for one in value)
    return json.dumps(value) if isinstance(value, dict) else str(value)


def to_csv(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """CSV by RFC 4180. A text that a spreadsheet would run as a formula gets an apostrophe in front."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(columns)
    for row in rows:
        cells = [to_cell(row[column]) for column in columns]
        writer.writerow(["'" + cell if cell[:1] in "=+-@\t\r" and cell and not is_number(row[column]) else cell
                         for cell, column in zip(cells, columns, strict=True)])
    return out.getvalue()


def to_text(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """Aligned columns for a terminal; columns without any value are left out, control characters replaced."""
    shown = [column for column in columns if any(row[column] not in (None, "", []) for row in rows)] or list(columns)
    lines = [[column.upper() for column in shown]]
    lines += [[printable(to_text_cell(column, row[column])) for column in shown] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n"
                   for line in lines)


def to_text_cell(column: str, value: Any) -> str:
    if is_number(value) and (column.endswith("_at") or column in ("at", "since", "as_of", "maintenance_until")):
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(value)) if 0 <= value < 2e11 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else to_cell(value) or "-"


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


METRICS: tuple[tuple[str, str, str], ...] = (  # of host rows: name, column, help
    ("proxmon_host_cpu_ratio", "cpu_ratio", "CPU in use, 0-1."),
    ("proxmon_host_memory_free_ratio", "memory_free_ratio", "Memory that is free or can be freed, ARC included, 0-1."),
    ("proxmon_host_io_pressure_ratio", "io_pressure_ratio", "PSI io full, average of 10 s, 0-1."),
    ("proxmon_host_root_used_ratio", "root_used_ratio", "Root file system in use, 0-1."),
    ("proxmon_host_load1", "load1", "Load average of one minute."),
    ("proxmon_host_uptime_seconds", "uptime_seconds", "Time since the host started."),
    ("proxmon_host_guests_running", "guests_running", "Guests that run."),
    ("proxmon_host_guests", "guests_total", "Guests, templates left out."),
    ("proxmon_host_clock_offset_seconds", "clock_offset_seconds", "How far the host's clock is off."),
    ("proxmon_host_last_seen_timestamp_seconds", "last_seen_at", "When the last report came."),
)


def render_metrics(monitor: Monitor, now: float) -> Iterator[str]:
    """Prometheus text; a value that is not known has no line."""
    fleet = monitor.fleet
    states = fleet.sorted(now)
    rows = [host_row(fleet, state, now) for state in states]
    up = [({"host": row["name"], "site": row["site"] or ""}, int(row["verdict"] not in ("offline", "stale", "unknown")))
          for row in rows]
    yield from metric("proxmon_host_up", "Whether the host reports.", up)
    for name, column, help_text in METRICS:
        yield from metric(name, help_text, [({"host": row["name"]}, row[column]) for row in rows])
    yield from metric("proxmon_host_alerts", "Alerts that fire.", [
        ({"host": row["name"], "severity": severity}, row[f"alerts_{severity}"])
        for row in rows for severity in ("critical", "warning")])
    pools = [row for state in states for row in pool_rows(state, now)]
    yield from object_metrics("proxmon_pool", pools, {"host": "host", "pool": "name"}, (
        ("size_bytes", "Raw size."), ("allocated_bytes", "Raw space in use."),
        ("capacity_ratio", "Raw space in use, 0-1."),
        ("usable_available_bytes", "Space left for data sets."),
        ("fragmentation_ratio", "Fragmentation of free space, 0-1."),
        ("redundancy_margin", "Disks that may still fail before data is lost."),
        ("data_errors", "Damaged objects."), ("read_errors", "Read errors of all disks."),
        ("write_errors", "Write errors of all disks."), ("checksum_errors", "Checksum errors of all disks.")))
    yield from metric("proxmon_pool_online", "Whether the pool's state is ONLINE.", [
        ({"host": row["host"], "pool": row["name"]}, None if row["state"] is None else int(row["state"] == "ONLINE"))
        for row in pools])
    storages = [row for state in states for row in storage_rows(state, now)]
    yield from object_metrics("proxmon_storage", storages, {"host": "host", "storage": "storage"}, (
        ("total_bytes", "Size."), ("used_bytes", "In use."), ("active", "Whether it is active.")))
    guests = [{**row, "cpus": row["cpu_count"], "running": None if row["status"] in (None, "unknown")
               else row["status"] == "running"} for state in states for row in guest_rows(state, now)]
    yield from object_metrics("proxmon_guest", guests, {"host": "host", "vmid": "vmid", "name": "name"}, (
        ("running", "Whether it runs."), ("cpus", "Virtual CPUs."), ("cpu_ratio", "Of its own CPUs, 0-1."),
        ("memory_used_bytes", "Memory in use."), ("memory_max_bytes", "Memory it may use.")))
    yield from metric("proxmon_reports_total", "Reports taken since the server started.",
                      [({}, monitor.reports_accepted)], kind="counter")


def object_metrics(prefix: str, rows: list[dict[str, Any]], labels: dict[str, str],
                   columns: tuple[tuple[str, str], ...]) -> Iterator[str]:
    for column, help_text in columns:
        yield from metric(f"{prefix}_{column}", help_text, [
            ({label: to_cell(row[key]) for label, key in labels.items()}, row[column]) for row in rows])


Samples = list[tuple[dict[str, str], Any]]


def metric(name: str, help_text: str, samples: Samples, *, kind: str = "gauge") -> Iterator[str]:
    """One metric family; of samples with the same labels the first counts, as Prometheus wants it."""
    yield f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n"
    seen = set()
    for labels, value in samples:
        if isinstance(value, bool) or is_number(value):
            shown = ",".join(f'{key}="{escape_label(one)}"' for key, one in labels.items())
            if shown not in seen:
                seen.add(shown)
                yield f"{name}{{{shown}}} {float(value)!r}\n" if shown else f"{name} {float(value)!r}\n"


def escape_label(text: str) -> str:
    clean = text.encode("utf-8", "replace").decode()
    return clean.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def build_openapi(public_url: str) -> dict[str, Any]:
    """OpenAPI 3.1 of every route under /api/v1, from the same table that serves them."""
    paths: dict[str, Any] = {}
    listed = [one for one in ROUTES if one.path.startswith("/api/v1/")]
    for one in listed:
        path = one.path.replace("<", "{").replace(">", "}")
        paths.setdefault(path, {})[one.method.lower()] = describe_route(one)
    paths["/api/v1/hosts/{id}/reports"] = {"post": describe_ingest()}
    problem = {"type": "object", "required": ["status", "title", "detail", "code"], "properties": {
        "status": {"type": "integer"}, "title": {"type": "string"}, "detail": {"type": "string"},
        "code": {"enum": sorted(Problem.STATUS)}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "proxmon", "version": VERSION},
        "servers": [{"url": public_url}],
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Problem": problem},
        },
        "security": [{"token": []}],
        "paths": paths,
    }


PROBLEM_RESPONSE = {"description": "What went wrong", "content": {
    "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}


def describe_route(one: Route) -> dict[str, Any]:
    steps = re.findall(r"<(\w+)>", one.path)
    parameters = [{"name": step, "in": "path", "required": True, "schema": {"type": "string"}} for step in steps]
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if one.columns:
        names = ("format", "q", "sort", "limit", "offset")
        parameters += [{"name": name, "in": "query", "required": False, "schema": {"type": "string"}} for name in names]
        row = {"type": "object", "properties": {column: {} for column in one.columns}}
        listing = {"type": "object", "properties": {"items": {"type": "array", "items": row}, **{
            key: {"type": "integer"} for key in ("total", "limit", "offset")}}}
        content = {"application/json": {"schema": listing}, "text/csv": {}, "text/plain": {}}
    status = "204" if one.method == "DELETE" else "201" if one.method == "POST" and not steps else "200"
    answer = {"description": "Done"} if status == "204" else {"description": one.summary, "content": content}
    responses = {status: answer, "default": PROBLEM_RESPONSE}
    return {"summary": one.summary, "parameters": parameters, "responses": responses}


def describe_ingest() -> dict[str, Any]:
    return {
        "summary": "Post one report or a batch, signed by the Standard Webhooks scheme.",
        "security": [],
        "parameters": [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}},
            *({"name": f"webhook-{name}", "in": "header", "required": True, "schema": {"type": "string"}}
              for name in ("id", "timestamp", "signature")),
        ],
        "requestBody": {"required": True, "content": {"application/json": {}}},
        "responses": {"200": {"description": "On the disk", "content": {"application/json": {}}},
                      "default": PROBLEM_RESPONSE},
    }


# --- page: the one page, its fragment, log-in and log-out ---

COOKIE = "proxmon_session"
STATIC_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
PAGE_LIMIT = 200
SCRUB_DUE = 40 * DAY  # Debian scrubs monthly; the gap between two is 35 days at most

# Each tab: its columns, and where its rows come from.
Rows = list[dict[str, Any]]


def rows_of(list_rows: Callable[[HostState, float], Iterable[dict[str, Any]]]) -> Callable[[Call], Rows]:
    return lambda call: [row for state in call.fleet.hosts.values() for row in list_rows(state, call.now)]


TABS: dict[str, tuple[tuple[str, ...], Callable[[Call], Rows]]] = {
    "hosts": (HOST_COLUMNS, lambda call: [host_row(call.fleet, one, call.now) for one in call.fleet.sorted(call.now)]),
    "guests": (GUEST_COLUMNS, rows_of(guest_rows)),
    "pools": (POOL_COLUMNS, rows_of(pool_rows)),
    "storages": (STORAGE_COLUMNS, rows_of(storage_rows)),
    "alerts": (ALERT_COLUMNS, lambda call: [row for row in list_alerts(call.db, "all") if row["state"] != "pending"]),
}

# What a guest, pool, vdev or alert calls its own state -> the verdict whose shape and colour it is shown with.
STATE_LOOKS = {
    **dict.fromkeys(("running", "online", "avail", "active", "passed"), "ok"),
    **dict.fromkeys(("degraded", "faulted", "unavail", "removed", "suspended", "io-error", "internal-error", "failed",
                     "inactive", "error"), "critical"),
    **dict.fromkeys(("inuse", "paused"), "warning"),
    **dict.fromkeys(("prelaunch", "suspending", "pending"), "info"),
    **dict.fromkeys(("disabled", "stopped", "off", "absent", "resolved"), "off"),
}


@route("GET", "/", auth="page", live=True)
def get_page(call: Call) -> Any:
    """The page: posture, problems, lists, and one host opened."""
    return page_answer(call, managing=False)


@route("GET", "/admin/hosts", auth="page", live=True)
def get_host_administration(call: Call) -> Any:
    """The page, opened at host administration."""
    return page_answer(call, managing=True)


def page_answer(call: Call, *, managing: bool) -> Answer:
    """The whole document, or for the script's polls what is in its <main> alone. Times are absolute there, so
    that a state of the fleet is the same bytes whenever it is asked for."""
    fragment = call.header("x-fragment") == "main"
    page = build_page(call, managing=managing, fragment=fragment)
    return html(render("main.html" if fragment else "page.html", page=page, **PAGE_FUNCTIONS))


def build_page(call: Call, *, managing: bool, fragment: bool) -> dict[str, Any]:
    """All that the templates are given."""
    query, terms = call.query, parse_terms(call.query.get("q", ""))
    tab = query["tab"] if query.get("tab") in TABS else "hosts"
    columns, list_rows = TABS[tab]
    everything = list_rows(call)
    rows = order_rows(tab, find_rows(call, everything, terms), query.get("sort", ""))
    offset = page_offset(query.get("offset", ""), len(rows))
    overview, alerts = build_overview(call.fleet, call.now), list_alerts(call.db)
    posture, sentence = describe_posture(overview, alerts)
    shown = rows[offset : offset + PAGE_LIMIT]
    if tab == "hosts":
        shown = add_sparks(call, shown)
    unseen = sum(not alert["acknowledged"] for alert in alerts)
    return {
        "version": VERSION, "now": call.now, "fragment": fragment, "admin": call.admin,
        "csrf": csrf_token(call.monitor.secret, call.cookie), "title": f"({unseen}) proxmon" if unseen else "proxmon",
        "url": page_url(query), "tab": tab, "q": query.get("q", "").strip(), "sort": query.get("sort", ""),
        "offset": offset, "limit": PAGE_LIMIT, "total": len(rows), "rows": shown,
        "states": count_states(everything), "counts": count_tabs(call, terms) | {tab: len(rows)},
        "overview": overview, "posture": posture, "sentence": sentence,
        "problems": group_problems(call, alerts), "next_due": None if unseen else find_next_due(call),
        "host": page_host(call, alerts), "pool": query.get("pool", ""),
        "admin_hosts": TABS["hosts"][1](call) if managing else None,
        "install": install_commands(call.monitor.config, "pve-host-01", "whsec_…"),
    }


def add_sparks(call: Call, rows: Rows) -> Rows:
    """The rows of one page with 24 numbers each: CPU in use, hour by hour."""
    ids = {state.name: state.id for state in call.fleet.hosts.values()}
    sparks = list_sparks(call.monitor.history, call.db, [ids[row["name"]] for row in rows], call.now)
    return [{**row, "spark": sparks[ids[row["name"]]]} for row in rows]


def page_url(query: dict[str, str]) -> Callable[..., str]:
    """`url(**changes)`: the link to this page with some of its parameters changed; None drops one."""
    def url(**changes: Any) -> str:
        kept = {name: query.get(name) for name in ("tab", "q", "sort", "offset", "host")}
        if "tab" in changes or "q" in changes:
            kept["offset"] = None
        if "tab" in changes:
            kept["sort"] = None
        pairs = [(name, value) for name, value in {**kept, **changes}.items() if value not in (None, "")]
        return "/?" + urllib.parse.urlencode(pairs, errors="replace") if pairs else "/"
    return url


def page_offset(asked: str, total: int) -> int:
    """The first row of the page asked for; nonsense and what is past the end is the first page."""
    offset = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 9 else 0
    return offset // PAGE_LIMIT * PAGE_LIMIT if offset < total else 0


def page_host(call: Call, alerts: Rows) -> dict[str, Any] | None:
    """The host that is opened, with all that its drawer shows; None if there is none of that name."""
    try:
        state = call.fleet.find(call.query.get("host", ""))
    except Problem:
        return None
    sections = {
        name: {"body": one.body, "time": one.time, "received_at": one.stamp.received_at,
               "stale": is_stale(state, name, call.now)}
        for name, one in state.sections.items() if one.stamp is not None}
    return {
        "row": host_row(call.fleet, state, call.now), "sections": sections,
        "absent": [name for name, one in state.sections.items() if one.absent],
        "errors": {name: one.error for name, one in state.sections.items() if one.error},
        "alerts": [alert for alert in alerts if alert["host"] == state.name],
        "missing_reports": missing_reports(call.db, state.id),
        "pools": order_rows("pools", list(pool_rows(state, call.now)), ""),
        "guests": list(guest_rows(state, call.now)), "storages": list(storage_rows(state, call.now)),
    }


def describe_posture(overview: dict[str, Any], alerts: Rows) -> tuple[str, str]:
    """The fleet in one word, the worst that nobody has acknowledged, and in one sentence."""
    hosts, problems = overview["hosts"], overview["problems"]
    if not hosts["total"]:
        return "unknown", "No host is registered yet."
    unseen = {alert["severity"] for alert in alerts if not alert["acknowledged"]}
    word = next((severity for severity in SEVERITIES if severity in unseen), "ok")
    if word in ("ok", "info") and hosts["reporting"] < hosts["total"]:
        word = "stale"  # nothing fires, yet not every host is known to be well: never green
    told = [f"{problems['critical']} critical"] if problems["critical"] else []
    told += [f"{problems['warning']} warning{'s' if problems['warning'] != 1 else ''}"] if problems["warning"] else []
    told += [f"{hosts[key]} {key}" for key in ("offline", "stale") if hosts[key]]
    reporting = f"{hosts['reporting']} of {hosts['total']} host{'s' if hosts['total'] != 1 else ''} reporting"
    return word, f"{reporting}; {', '.join(told) or 'no open problem'}."


def group_problems(call: Call, alerts: Rows) -> Rows:
    """Firing alerts, worst first and then newest, each with those that follow from it folded in as `children`."""
    url, hosts = page_url(call.query), {state.name: state for state in call.fleet.hosts.values()}
    shown: dict[Any, dict[str, Any]] = {}
    for alert in alerts:
        state = hosts.get(alert["host"])
        shown[alert["id"]] = {"why": None, "todo": None, **alert, "site": state.site if state else None,
                              "host_verdict": call.fleet.verdict(state, call.now)[0] if state else None,
                              "href": alert_url(alert, url), "children": []}
    tops: Rows = []
    for problem in shown.values():
        cause = root_cause(problem, shown)
        (tops if cause is problem else cause["children"]).append(problem)
    return tops


def root_cause(problem: dict[str, Any], shown: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    """The alert at the top of the chain of causes, as far as that is shown; the alert itself if it has none, or if
    the chain is a circle."""
    top, passed = problem, {problem["id"]}
    while (cause := top["because_of"]) in shown:
        if cause in passed:
            return problem
        passed.add(cause)
        top = shown[cause]
    return top


def alert_url(alert: dict[str, Any], url: Callable[..., str]) -> str:
    """The link to what an alert is about: its host, opened, and in it the pool if it is of one."""
    kind, _, rest = (alert["object"] or "").partition("/")
    pool = rest.partition("/")[0] if kind == "pools" else None
    return url(host=alert["host"], pool=pool) + (f"#pool-{anchor(pool)}" if pool else "")


def find_next_due(call: Call) -> dict[str, Any] | None:
    """What will need somebody next, told while nothing does: a scrub that falls due."""
    scrubs = [{"at": row["last_scrub_at"] + SCRUB_DUE, "text": f"the scrub of {row['name']} on {row['host']} falls due"}
              for row in TABS["pools"][1](call) if row["last_scrub_at"] is not None]
    return min((due for due in scrubs if due["at"] > call.now), key=lambda due: due["at"], default=None)


def count_states(rows: Rows) -> list[tuple[str, int]]:
    """How many rows are in each state, worst first."""
    counts: dict[str, int] = {}
    for row in rows:
        word = row.get("verdict") or (row["severity"] if row["state"] == "firing" else row["state"])
        counts[word] = counts.get(word, 0) + 1
    return sorted(counts.items(), key=lambda pair: verdict_rank(pair[0]))


def count_tabs(call: Call, terms: list[Term]) -> dict[str, int]:
    """How many rows each tab would show. Without a search that is cheap: nothing is judged."""
    if terms:
        return {tab: len(find_rows(call, list_rows(call), terms)) for tab, (_, list_rows) in TABS.items()}
    states = call.fleet.hosts.values()
    counts = {tab: sum(len(state.body(tab, ())) for state in states) for tab in ("guests", "storages")}
    pools = sum(len({pool["name"] for section in ("pools", "pool_states") for pool in state.body(section, ())})
                for state in states)
    return {"hosts": len(states), **counts, "pools": pools, "alerts": len(TABS["alerts"][1](call))}


def verdict_rank(word: Any) -> int:
    return VERDICTS.index(word) if word in VERDICTS else len(VERDICTS)


def order_rows(tab: str, rows: Rows, sort: str) -> Rows:
    """By a column (`-cpu_ratio`: downwards), else worst first; alerts: firing, worst, newest."""
    column = sort.lstrip("-")
    if column in ("verdict", "severity"):
        return sorted(rows, key=lambda row: verdict_rank(row.get(column)), reverse=sort.startswith("-"))
    if column in TABS[tab][0]:
        return sort_rows(rows, sort, TABS[tab][0])
    if tab == "alerts":
        return sorted(rows, key=lambda row: (row["state"] == "resolved", verdict_rank(row["severity"]), -row["since"]))
    return rows if tab == "hosts" else sorted(rows, key=lambda row: (verdict_rank(row["verdict"]), row["host"].lower()))


# The search box: `site:par -tag:test state:crit pool>80 "two words"`, all of which must hold. The first of the
# fields that a row has is meant; ratios are written as percent.
TERM_FIELDS = {
    "host": ("host", "name"), "name": ("name", "storage", "object"), "tag": ("tags",), "type": ("type",),
    "rule": ("rule",), "state": ("verdict", "severity", "state", "status"), "version": ("pve_version",),
    "cluster": ("cluster",), "vmid": ("vmid",), "storage": ("storage",),
}
TERM_NUMBERS = {
    "pool": ("pools_max_capacity_ratio", "capacity_ratio"), "cpu": ("cpu_ratio",), "ram": ("memory_free_ratio",),
    "io": ("io_pressure_ratio",), "root": ("root_used_ratio",), "used": ("used_ratio", "capacity_ratio"),
    "frag": ("fragmentation_ratio",), "full": ("days_until_full",), "updates": ("updates_pending",),
    "load": ("load1",), "vmid": ("vmid",), "margin": ("redundancy_margin",),
}


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
        if operator == ":" and value and (field == "site" or field in TERM_FIELDS):
            return Term(wanted, field, operator, value)
        if operator != ":" and field in TERM_NUMBERS and re.fullmatch(r"-?\d{1,15}(\.\d{1,9})?%?", value, re.ASCII):
            return Term(wanted, field, operator, value)
    return Term(wanted, "", "", bare)


def find_rows(call: Call, rows: Rows, terms: list[Term]) -> Rows:
    """The rows for which every term holds."""
    if not terms:
        return rows
    sites = {state.name: (state.site or "").lower() for state in call.fleet.hosts.values()}
    return [row for row in rows if all(term_holds(term, row, sites) == term.wanted for term in terms)]


def term_holds(term: Term, row: dict[str, Any], sites: dict[str, str]) -> bool:
    if term.operator == "":
        return matches(row, [term.value])
    if term.field == "site":
        return term.value in sites.get(row.get("host") or row.get("name", ""), "")
    if term.operator == ":":
        return any(field_holds(row[field], field, term.value) for field in TERM_FIELDS[term.field] if field in row)
    return number_holds(term, row)


def field_holds(value: Any, field: str, wanted: str) -> bool:
    """Tags and vmids as a whole, states from their beginning, other texts anywhere."""
    found = to_cell(value).lower()
    if field in ("tags", "vmid"):
        return wanted in re.split("[;, ]+", found)
    return found.startswith(wanted) if field in TERM_FIELDS["state"] else wanted in found


def number_holds(term: Term, row: dict[str, Any]) -> bool:
    """A comparison; what is not known is neither more nor less."""
    field = next((field for field in TERM_NUMBERS[term.field] if is_number(row.get(field))), None)
    if field is None:
        return False
    limit = float(term.value.rstrip("%")) / (100 if field.endswith("_ratio") else 1)
    return row[field] > limit if term.operator == ">" else row[field] < limit


# How the page writes values: what is not known is a dash, never 0, and so is what an agent sent in its place.

def known(value: Any) -> Any:
    return value if is_number(value) else None


def entries(body: Any) -> Rows:
    """The objects of a section that is a list, whatever else an agent put there."""
    return [one for one in body if isinstance(one, dict)] if isinstance(body, list) else []


def fields(body: Any) -> dict[str, Any]:
    return body if isinstance(body, dict) else {}


def show_bytes(value: Any) -> str:
    """1536 -> '1.5 KiB': powers of 1024, as zfs and Proxmox count."""
    if not is_number(value):
        return "–"
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while abs(value) >= 1023.5 and len(units) > 1:
        value = value / 1024
        units.pop(0)
    return f"{value:.{0 if units[0] == 'B' or abs(value) >= 99.95 else 1}f} {units[0]}"


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


def why_unknown(host: dict[str, Any], section: str) -> str:
    """Why a value is not there: absent, error, no data yet and stale are four different things."""
    if section in host["errors"]:
        error = host["errors"][section]
        return f"could not look: {error.get('code')}: {error.get('detail')}"
    if section in host["absent"]:
        return f"{section}: does not apply on this host"
    if section not in host["sections"]:
        return f"{section}: no data yet"
    return "stale, and not known before" if host["sections"][section]["stale"] else "not reported by the host"


PAGE_FUNCTIONS = {one.__name__: one for one in (
    known, entries, fields, show_bytes, show_ratio, show_number, show_duration, show_age, show_time, look, anchor,
    spark_points, why_unknown)}


@lru_cache(64)
def template(name: str) -> bottle.SimpleTemplate:
    """A template of the page, read once; everything a template prints is escaped."""
    return bottle.SimpleTemplate(name=name, lookup=[resource("templates")])


def render(name: str, **model: Any) -> bytes:
    return template(name).render(**model).encode("utf-8", "replace")


def html(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, body, {"Content-Type": "text/html; charset=utf-8", **(headers or {})})


@route("GET", "/login", auth="none")
def get_login(call: Call) -> Any:
    """The log-in form."""
    return login_page(call, 200)


@route("POST", "/login", auth="none")
def post_login(call: Call) -> Any:
    """Check the password and begin a session."""
    check_same_origin(call)
    form = urllib.parse.parse_qs(read_request(call.environ, 1 << 14).decode("utf-8", "replace"))
    address, logins = call.address(), call.monitor.logins
    wait = logins.wait_seconds(address, call.now)
    if wait:
        return login_page(call, 429, wait_seconds=wait)
    if not verify_password(call.monitor.config.password_hash, form.get("password", [""])[0]):
        logins.failed(address, call.now)
        log(f"server: failed log-in from {address}")
        return login_page(call, 401, error="That is not the password.")
    logins.succeeded(address)
    cookie = call.monitor.store.write(lambda db: create_session(db, call.now, address, call.header("user-agent")))
    set_cookie = session_cookie(call.monitor.config, cookie, SESSION_SECONDS)
    return Answer(303, b"", {"Location": "/", "Set-Cookie": set_cookie})


@route("POST", "/logout", auth="page")
def post_logout(call: Call) -> Any:
    """End this session."""
    call.monitor.store.write(lambda db: db.execute("DELETE FROM session WHERE hash = :hash",
                                                   {"hash": token_hash(call.cookie)}).rowcount)
    return Answer(303, b"", {"Location": "/login", "Set-Cookie": session_cookie(call.monitor.config, "", 0)})


@route("GET", "/static/<name>", auth="none")
def get_static(call: Call) -> Any:
    """The page's own CSS, JavaScript and icon."""
    name = call.params["name"]
    kind = STATIC_TYPES.get(os.path.splitext(name)[1])
    if kind is None or name not in os.listdir(resource("templates")):
        raise Problem("not_found", "no such file")
    with open(resource("templates", name), "rb") as handle:
        return Answer(200, handle.read(), {"Content-Type": kind})


def login_page(call: Call, status: int, *, error: str | None = None, wait_seconds: int | None = None) -> Answer:
    headers = {"Retry-After": str(wait_seconds)} if wait_seconds else {}
    body = render("login.html", version=VERSION, error=error, wait_seconds=wait_seconds,
                  password_set=bool(call.monitor.config.password_hash), csrf=None, next=None)
    return html(body, status, {**headers, "Cache-Control": "no-store"})


def session_cookie(config: Config, value: str, seconds: int) -> str:
    secure = "; Secure" if config.https else ""
    return f"{COOKIE}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax{secure}"


# --- serving: who asks, what he may, and how an answer leaves ---


def identify(call: Call) -> None:
    """Find out who is asking: an API token in Authorization, else a session's cookie."""
    scheme, _, given = call.header("authorization").partition(" ")
    if given:
        token = find_api_token(call.db, given.strip(), call.now) if scheme.lower() == "bearer" else None
        if token is None:
            raise Problem("unauthorized", "the API token is not known, revoked or expired", headers=BEARER)
        call.actor, call.admin = token["name"], bool(token["admin"])
        return
    cookie = read_cookie(call.header("cookie"))
    session = find_session(call.db, cookie, call.now) if cookie else None
    if session is not None:
        call.actor, call.admin, call.cookie = "session", True, cookie
        if call.now - session["used_at"] > HOUR:  # sliding, without a write for each request
            call.monitor.store.write(lambda db: db.execute(
                "UPDATE session SET used_at = :now WHERE hash = :hash",
                {"now": call.now, "hash": session["hash"]}).rowcount, urgent=False)


BEARER = {"WWW-Authenticate": "Bearer"}


def read_cookie(header: str) -> str:
    """The session's cookie among those that came."""
    for part in header.split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return ""


def check_access(call: Call, one: Route) -> None:
    """Let the request pass, or raise. A route without a rule cannot be registered."""
    if one.auth == "none":
        return
    identify(call)
    if call.actor is None:
        if one.auth == "page":
            raise Answer(303, b"", {"Location": "/login"})
        raise Problem("unauthorized", "log in, or send an API token: Authorization: Bearer …", headers=BEARER)
    if one.auth == "page" and call.actor != "session":
        raise Answer(303, b"", {"Location": "/login"})
    if one.auth == "admin" and not call.admin:
        raise Problem("forbidden", "this API token may only read")
    if one.method not in ("GET", "HEAD") and call.actor == "session":
        check_csrf(call)


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


def check_same_origin(call: Call) -> None:
    """Refuse what another site made the browser send."""
    if call.header("sec-fetch-site") not in ("", "same-origin", "none"):
        raise Problem("forbidden", "sent by another site")
    origin = call.header("origin")
    own = {urllib.parse.urlsplit(call.monitor.config.public_url).netloc.lower(), call.header("host").lower()}
    if origin and urllib.parse.urlsplit(origin).netloc.lower() not in own:
        raise Problem("forbidden", "sent by another origin")


def respond(monitor: Monitor, one: Route, environ: dict[str, Any], params: dict[str, str]) -> Answer:
    """Run a route for a request; every refusal comes back as an answer."""
    try:
        call = Call(monitor, environ, params)
        check_access(call, one)
        tag = live_etag(call) if one.live else ""
        if tag and call.header("if-none-match") == tag:
            return Answer(304, b"", {"ETag": tag})
        return finish(call, one.handler(call), tag)
    except Answer as answer:
        return answer
    except Problem as problem:
        return problem_answer(problem)


def live_etag(call: Call) -> str:
    """Names a state of the fleet as one asker sees it, before any work is done."""
    environ = call.environ
    asked = f"{environ.get('PATH_INFO')}?{environ.get('QUERY_STRING')} {call.cookie} {call.header('x-fragment')}"
    return f'W/"{call.monitor.boot}-{call.fleet.generation}-{zlib.crc32(asked.encode("utf-8", "replace")):x}"'


def finish(call: Call, result: Any, tag: str) -> Answer:
    """What a handler gave back, as bytes with their headers."""
    if isinstance(result, Listing):
        result = render_listing(call, result)
    elif not isinstance(result, Answer):
        result = Answer(200, json.dumps(result).encode())
    reads = call.environ["REQUEST_METHOD"] in ("GET", "HEAD")
    if reads and result.status == 200 and "Cache-Control" not in result.headers:
        tag = tag or f'W/"{hashlib.sha256(result.body).hexdigest()[:16]}"'
        result.headers.update({"ETag": tag, "Cache-Control": "private, no-cache"})
        if call.header("if-none-match") == tag:
            return Answer(304, b"", {"ETag": tag})
    return result


def problem_answer(problem: Problem) -> Answer:
    headers = {"Content-Type": "application/problem+json", "Cache-Control": "no-store", **problem.headers}
    return Answer(problem.status, problem.body(), headers)


STATUS_LINES = {**bottle._HTTP_STATUS_LINES}
SECURITY_HEADERS = (
    ("Content-Security-Policy",
     "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Permissions-Policy", "camera=(), geolocation=(), microphone=()"),
)


def build_app(monitor: Monitor) -> Callable[..., Iterable[bytes]]:
    """The WSGI application: ingest by the direct way, everything else through Bottle's routes."""
    app = bottle.Bottle()
    app.config["catchall"] = False
    for one in ROUTES:
        app.route(one.path, one.method, partial(handle_route, monitor, one))
    app.default_error_handler = handle_http_error
    extra: tuple[tuple[str, str], ...] = SECURITY_HEADERS
    if monitor.config.https:
        extra += (("Strict-Transport-Security", "max-age=31536000"),)

    def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            return start_response(status, [*headers, *extra])

        steps = environ.get("PATH_INFO", "").split("/")
        try:
            if len(steps) == 6 and steps[:4] == ["", "api", "v1", "hosts"] and steps[5] == "reports":
                return send(handle_ingest(monitor, environ, steps[4]), start)
            return app(environ, start)
        except Exception:  # a fault of ours: the sender keeps its report, the log has the reason
            log(traceback.format_exc().replace("\n", " | "))
            return send(Answer(500, b'{"status":500,"title":"Internal error","detail":"see the log","code":"internal"}',
                               {"Content-Type": "application/problem+json"}), start)

    return serve


def send(answer: Answer, start: Callable[..., Any]) -> Iterable[bytes]:
    """An answer the plain WSGI way."""
    headers = {"Content-Type": "application/json", **answer.headers, "Content-Length": str(len(answer.body))}
    start(STATUS_LINES[answer.status], list(headers.items()))
    return [answer.body]


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


def handle_ingest(monitor: Monitor, environ: dict[str, Any], host_name: str) -> Answer:
    """POST /api/v1/hosts/{id}/reports, without cookies, templates or plugins: most requests are these."""

    def header(name: str) -> str:
        return environ.get("HTTP_" + name.upper().replace("-", "_"), "") or ""

    try:
        if environ["REQUEST_METHOD"] != "POST":
            raise Problem("method_not_allowed", "reports are posted", headers={"Allow": "POST"})
        if media_type(environ.get("CONTENT_TYPE", "")) != "application/json":
            raise Problem("unsupported_media_type", "send application/json")
        if header("content-encoding").lower() not in ("", "identity", "gzip"):
            raise Problem("unsupported_media_type", "Content-Encoding: gzip or none")
        answer = ingest(monitor, host_name, header, read_request(environ, SENT_LIMIT))
        return Answer(200, json.dumps(answer).encode())
    except Problem as problem:
        return problem_answer(problem)


class RefusedTask(ErrorTask):
    """What waitress refuses before we see it (broken or endless requests), in the same form as our own errors."""

    def execute(self) -> None:
        error = self.request.error
        code = {413: "too_large", 431: "too_large", 501: "unsupported_media_type"}.get(error.code, "invalid_request")
        problem = Problem(code, str(error.body).strip() or error.reason)
        problem.status = 415 if error.code == 501 else error.code  # a strange Transfer-Encoding is the sender's fault
        body = problem.body()
        self.status = STATUS_LINES[problem.status]
        self.response_headers.extend([("Content-Type", "application/problem+json"), *SECURITY_HEADERS])
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Channel(HTTPChannel):
    error_task_class = RefusedTask


def run_server(monitor: Monitor) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is being written."""
    config = monitor.config
    server = waitress.create_server(
        build_app(monitor), host=config.listen, port=config.port, threads=16, ident="", expose_tracebacks=False,
        connection_limit=8192, asyncore_use_poll=True, channel_timeout=120, cleanup_interval=30, backlog=2048,
        max_request_header_size=1 << 15, max_request_body_size=BUFFERED_LIMIT, inbuf_overflow=SENT_LIMIT,
        clear_untrusted_proxy_headers=False)
    for one in getattr(server, "_server_list", None) or [server]:
        one.channel_class = Channel
    scheduler = Scheduler(monitor)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop_serving)
    scheduler.start()
    port = getattr(server, "effective_port", config.port)
    log(f"server: listening on http://{config.listen}:{port}")
    if not config.password_hash:
        log("server: nobody can log in until DASHBOARD_PASSWORD_HASH is set; make one with `hash-password`")
    try:
        server.run()
    except SystemExit:
        pass
    finally:
        scheduler.stop()
        server.close()
        monitor.close()
        log("server: stopped")


def stop_serving(*_: Any) -> None:
    raise SystemExit(0)


# --- commands: what an operator types ---

COMMANDS: dict[str, tuple[Callable[[Config, argparse.Namespace], int], tuple[tuple[str, dict[str, Any]], ...]]] = {}
Handler = Callable[[Config, argparse.Namespace], int]


def command(name: str, *arguments: tuple[str, dict[str, Any]]) -> Callable[[Handler], Handler]:
    """Register a command with its arguments; its docstring is its help."""

    def register(handler: Handler) -> Handler:
        COMMANDS[name] = handler, arguments
        return handler

    return register


def open_database(config: Config, *, create: bool = False, readonly: bool = False) -> sqlite3.Connection:
    """The database with this program's schema; made if `create` and there is none or an empty one."""
    if not create and not os.path.exists(config.database_path):
        raise Failure(f"{config.database_path}: there is no database; `serve` or `migrate` makes it")
    db = connect(config.database_path, readonly=readonly)
    if create and is_empty(db):
        migrate(db, load_migrations())
    check_schema(db)
    return db


HOST_ARGUMENT = ("name", {"help": "the host's name"})
JSON_ARGUMENT = ("--json", {"action": "store_true", "help": "as JSON"})


@command("serve")
def command_serve(config: Config, args: argparse.Namespace) -> int:
    """Run the server."""
    open_database(config, create=True).close()
    try:
        run_server(Monitor(config))
    except OSError as error:
        raise Failure(f"cannot listen on {config.listen}:{config.port}: {error.strerror}") from None
    return OK


@command("migrate")
def command_migrate(config: Config, args: argparse.Namespace) -> int:
    """Bring the database's schema up to date."""
    db = connect(config.database_path)
    taken = migrate(db, load_migrations())
    print(f"schema {schema_version(db)}, {taken} migration{'' if taken == 1 else 's'} applied")
    return OK


@command("rollback", ("--to", {"type": int, "metavar": "N", "help": "the schema to go back to (default: one step)"}))
def command_rollback(config: Config, args: argparse.Namespace) -> int:
    """Take the schema back, before an older version of this program is installed."""
    db = open_database(config)
    have = schema_version(db)
    to = have - 1 if args.to is None else args.to
    if not 0 <= to <= have:
        raise Failure(f"--to: 0 to {have}, not {to}")
    taken = rollback(db, load_migrations(), to=to)
    print(f"schema {schema_version(db)}, {taken} migration{'' if taken == 1 else 's'} taken back")
    return OK


def show_token(config: Config, record: sqlite3.Row, said: str) -> int:
    print(f"Host '{record['name']}' {said}")
    print(f"TOKEN: {host_token(config.secret(), record['nonce'])}")
    print("Store this token NOW — it will never be shown again.")
    return OK


@command("register-host", HOST_ARGUMENT)
def command_register_host(config: Config, args: argparse.Namespace) -> int:
    """Register a host and print its token, once."""
    with transaction(open_database(config, create=True)) as db:
        record = insert_host(db, args.name, time.time())
    show_token(config, record, f"registered (id={record['id']}).")
    sys.stdout.flush()
    if sys.stderr.isatty():  # for people: scripts get the three lines and nothing else
        for line in ("", "Then, as root on the host:", "", *install_commands(config, record["name"], "")):
            print(line and f"  {line}", file=sys.stderr)
    return OK


@command("rotate-token", HOST_ARGUMENT)
def command_rotate_token(config: Config, args: argparse.Namespace) -> int:
    """Give a host a new token; the old one is refused from here on."""
    with transaction(open_database(config)) as db:
        record = rotate_nonce(db, args.name, time.time())
    return show_token(config, record, "has a new token.")


@command("remove-host", HOST_ARGUMENT)
def command_remove_host(config: Config, args: argparse.Namespace) -> int:
    """Remove a host with all it has sent."""
    with transaction(open_database(config)) as db:
        delete_host(db, args.name, time.time())
    print(f"Host '{args.name}' removed.")
    return OK


@command("rename-host", ("old", {"help": "the name it has"}), ("new", {"help": "the name it gets"}))
def command_rename_host(config: Config, args: argparse.Namespace) -> int:
    """Rename a host; its token stays, its agent's host_id must follow."""
    with transaction(open_database(config)) as db:
        update_host(db, args.old, {"name": args.new}, time.time())
    print(f"Host '{args.old}' renamed to '{args.new}'.")
    print(f'Set host_id = "{args.new}" in its agent.toml and restart the agent.')
    return OK


def load_fleet(db: sqlite3.Connection) -> Fleet:
    """The fleet as a running server has it, for a command beside it."""
    fleet = Fleet()
    since, alive = get_meta(db, "serving_since"), get_meta(db, "alive_at")
    if alive and time.time() - float(alive) > 2 * MINUTE:
        print("note: the server is not running; hosts are judged by when they were last seen", file=sys.stderr)
    elif since:
        fleet.serving_since = float(since)
    fleet.load(db)
    return fleet


@command("list-hosts", JSON_ARGUMENT)
def command_list_hosts(config: Config, args: argparse.Namespace) -> int:
    """List the registered hosts."""
    db = open_database(config, readonly=True)
    rows = [{"id": row["id"], "name": row["name"], "site": row["site"], "tags": json.loads(row["tags"]),
             "note": row["note"], "maintenance_until": row["maintenance_until"], "created_at": row["created_at"],
             "last_seen_at": row["last_seen_at"]} for row in list_host_records(db)]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print(to_text(rows, ("id", "name", "site", "tags", "created_at", "last_seen_at")), end="")
    return OK


@command("status", JSON_ARGUMENT)
def command_status(config: Config, args: argparse.Namespace) -> int:
    """The fleet, worst first. Exit code 0 ok, 1 warning, 2 critical."""
    db = open_database(config, readonly=True)
    now, fleet = time.time(), load_fleet(db)
    rows = [host_row(fleet, state, now) for state in fleet.sorted(now)]
    worst = max((STATUS_CODES[row["verdict"]] for row in rows), default=0)
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


@command("hash-password")
def command_hash_password(config: Config, args: argparse.Namespace) -> int:
    """Make DASHBOARD_PASSWORD_HASH from a password: asks twice, or reads standard input."""
    if sys.stdin.isatty():
        password = getpass.getpass("Password: ")
        if password != getpass.getpass("Again: "):
            raise Failure("the two are not the same")
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise Failure("an empty password")
    print(PASSWORDS.hash(password))
    return OK


@command("generate-secret")
def command_generate_secret(config: Config, args: argparse.Namespace) -> int:
    """Make a SECRET_KEY_BASE."""
    print(secrets.token_urlsafe(48))
    return OK


@command("create-api-token", ("name", {"help": "what it is for"}),
         ("--admin", {"action": "store_true", "help": "may also write"}),
         ("--expires", {"type": float, "metavar": "DAYS", "help": "valid for so many days (default: for ever)"}))
def command_create_api_token(config: Config, args: argparse.Namespace) -> int:
    """Create an API token and print it, once."""
    if args.expires is not None and not 0 < args.expires <= 36500:
        raise Failure("--expires: a number of days above 0")
    with transaction(open_database(config, create=True)) as db:
        token = create_api_token(db, args.name, time.time(), admin=args.admin, days=args.expires)
    print(f"API token '{args.name}' created ({'admin' if args.admin else 'read only'}).")
    print(f"TOKEN: {token}")
    print("Store this token NOW — it will never be shown again.")
    return OK


@command("revoke-api-token", ("name", {"help": "the token's name"}))
def command_revoke_api_token(config: Config, args: argparse.Namespace) -> int:
    """Revoke an API token."""
    with transaction(open_database(config)) as db:
        revoke_api_token(db, args.name, time.time())
    print(f"API token '{args.name}' revoked.")
    return OK


@command("list-api-tokens", JSON_ARGUMENT)
def command_list_api_tokens(config: Config, args: argparse.Namespace) -> int:
    """List the API tokens' names."""
    rows = list_api_tokens(open_database(config, readonly=True))
    print(json.dumps(rows, indent=2) if args.json else to_text(rows, TOKEN_COLUMNS), end="\n" if args.json else "")
    return OK


@command("backup", ("file", {"help": "where to write the copy"}))
def command_backup(config: Config, args: argparse.Namespace) -> int:
    """Write a consistent copy of the database while the server runs."""
    target = os.path.abspath(args.file)
    if os.path.exists(target):
        raise Failure(f"{target}: exists already")
    source, partial_path = open_database(config, readonly=True), target + ".partial"
    try:
        os.close(os.open(partial_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        copy = sqlite3.connect(partial_path)
        source.backup(copy)  # one read transaction: the writer is not kept waiting
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, without -wal beside it
        copy.close()
        os.replace(partial_path, target)
    except (OSError, sqlite3.Error) as error:
        raise Failure(f"{target}: {error}") from None
    where = "SECRET_KEY_BASE of the environment" if config.given_secret else config.secret_path
    print(f"{target}: {os.path.getsize(target)} bytes. Keep the secret apart from it: {where}")
    return OK


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
    if config.password_hash:
        yield Check(True, "password: set")
    else:
        yield Check(None, "password: DASHBOARD_PASSWORD_HASH is not set: nobody can log in; see `hash-password`")
    yield Check(None, "channels: none is set up, alerts are shown on the page only")


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


@command("version")
def command_version(config: Config, args: argparse.Namespace) -> int:
    """Print the version."""
    print(f"proxmox-monitor-server {VERSION}")
    return OK


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
    for name, (handler, arguments) in COMMANDS.items():
        one = commands.add_parser(name, help=handler.__doc__, description=handler.__doc__)
        for argument, settings in arguments:
            one.add_argument(argument, **settings)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 ok, 1 failed (one line why on stderr), 2 usage."""
    args = build_parser().parse_args(argv)
    try:
        return COMMANDS[args.command][0](Config(read_environ()), args)
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
