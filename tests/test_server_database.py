"""Server, section database: migrations, the one writer, what a stop or a fault leaves behind."""

from __future__ import annotations

import errno
import io
import os
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import build_report
from hypothesis import given
from hypothesis import strategies as st
from simulation import Simulation

import server


def schema_of(db: sqlite3.Connection) -> list[tuple[str, ...]]:
    return [tuple(row) for row in db.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY 1, 2")]


# --- migrations ---


def test_the_schema_goes_up_down_and_up_again_to_the_same():
    migrations = server.load_migrations()
    assert migrations
    db = sqlite3.connect(":memory:", isolation_level=None)
    for number in range(1, len(migrations) + 1):
        before = schema_of(db)
        server.migrate(db, migrations[:number])
        after = schema_of(db)
        assert after != before, f"migration {number} changes nothing"
        assert server.rollback(db, migrations, to=number - 1) == 1
        assert [row for row in schema_of(db) if row[1] != "sqlite_sequence"] == [
            row for row in before if row[1] != "sqlite_sequence"
        ]
        server.migrate(db, migrations[:number])
        assert schema_of(db) == after
    assert server.schema_version(db) == len(migrations)


def test_a_migration_that_fails_leaves_nothing_of_itself():
    migrations = [
        server.Migration(["CREATE TABLE a (x)"], ["DROP TABLE a"]),
        server.Migration(["CREATE TABLE b (x)", "CREATE TABLE a (x)"], ["DROP TABLE b"]),
    ]
    db = sqlite3.connect(":memory:", isolation_level=None)
    with pytest.raises(sqlite3.OperationalError):
        server.migrate(db, migrations)
    assert server.schema_version(db) == 1
    assert [row[1] for row in schema_of(db)] == ["a"]


def test_a_semicolon_in_a_comment_or_a_text_ends_no_statement():
    text = "CREATE TABLE a (x TEXT DEFAULT 'one; two');  -- three; four\nCREATE TABLE b (x);\n"
    assert len(server.statements(text)) == 2


def test_a_newer_schema_is_refused_in_one_line(config):
    db = server.open_database(config, create=True)
    db.execute("PRAGMA user_version = 999")
    with pytest.raises(server.Failure, match="too old") as refused:
        server.open_database(config)
    assert "\n" not in str(refused.value)


def test_an_older_schema_says_to_run_migrate(config):
    db = server.open_database(config, create=True)
    server.rollback(db, server.load_migrations(), to=0)
    db.execute("CREATE TABLE something_else (x)")  # not empty, so nobody makes a schema in it unasked
    with pytest.raises(server.Failure, match="migrate"):
        server.open_database(config, create=True)


def test_the_database_and_the_secret_are_for_their_owner_alone(monitor, config):
    for path in (config.database_path, config.secret_path):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


# --- the writer ---


def write_together(store: server.Store, *works: Callable[[sqlite3.Connection], Any]) -> list[Any]:
    """What each of several writes of one group gives back or raises."""
    holding, results = threading.Event(), [None] * len(works)

    def attempt(number: int, work: Callable[[sqlite3.Connection], Any]) -> None:
        try:
            results[number] = store.write(work)
        except Exception as error:
            results[number] = error

    def hold(db: sqlite3.Connection) -> None:
        holding.set()
        deadline = time.monotonic() + 10
        while len(store._waiting) < len(works) and time.monotonic() < deadline:
            time.sleep(0.001)

    first = threading.Thread(target=store.write, args=(hold,))
    first.start()
    holding.wait(10)
    threads = []
    for number, work in enumerate(works):  # each waits before the next comes: the group has their order
        threads.append(threading.Thread(target=attempt, args=(number, work)))
        threads[-1].start()
        while len(store._waiting) <= number and first.is_alive():
            time.sleep(0.001)
    for thread in [first, *threads]:
        thread.join(10)
    return results


def test_a_write_that_is_refused_leaves_its_neighbours_alone(store):
    def refused(db):
        db.execute("INSERT INTO meta VALUES ('half', '1')")
        raise server.Problem("conflict", "no")

    results = []

    def attempt(work):
        try:
            results.append(store.write(work))
        except server.Problem as problem:
            results.append(problem.code)

    works = [refused] + [lambda db, n=n: server.set_meta(db, f"key{n}", n) for n in range(20)]
    threads = [threading.Thread(target=attempt, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("conflict") == 1 and results.count(None) == 20
    db = store.reader()
    assert server.get_meta(db, "half") is None
    assert all(server.get_meta(db, f"key{n}") == str(n) for n in range(20))


def test_a_failed_commit_is_told_to_the_one_who_wrote_and_the_next_works(store):
    def broken(db):
        db.execute("INSERT INTO no_such_table VALUES (1)")

    with pytest.raises(server.Problem) as told:
        store.write(broken)
    assert told.value.code == "busy" and told.value.headers["Retry-After"]
    store.write(lambda db: server.set_meta(db, "after", "1"))
    assert server.get_meta(store.reader(), "after") == "1"


def test_a_rush_of_urgent_writes_leaves_no_debt_for_reports(config, monitor, monkeypatch):
    """Many host registrations or log-ins: the next report waits for one flush, not for all of theirs."""
    monkeypatch.setattr(server, "FLUSHES_SAVED", 2)
    store = server.Store(monitor.config.database_path)
    for _ in range(60):
        store.write(lambda db: server.set_meta(db, "rush", 1))
    began = time.monotonic()
    store.write(lambda db: server.set_meta(db, "report", 1), urgent=False)
    assert time.monotonic() - began < 1
    store.close()


def test_reports_share_a_flush_where_flushes_are_few(monitor, monkeypatch):
    monkeypatch.setattr(server, "FLUSHES_SAVED", 0)
    monkeypatch.setattr(server, "FLUSHES_PER_SECOND", 0.01)
    monkeypatch.setattr(server, "COMPANY", 3)
    store, sizes = server.Store(monitor.config.database_path), []
    commit = store._commit
    monkeypatch.setattr(store, "_commit", lambda group: (sizes.append(len(group)), commit(group)))
    with ThreadPoolExecutor(3) as senders:
        for done in [senders.submit(store.write, lambda db: None, urgent=False) for _ in range(3)]:
            done.result(timeout=20)
    assert sizes == [3]
    store.close()


def test_who_is_done_does_not_wait_for_the_company_of_the_next(monitor, monkeypatch):
    monkeypatch.setattr(server, "FLUSHES_SAVED", 0)
    monkeypatch.setattr(server, "FLUSHES_PER_SECOND", 0.01)
    monkeypatch.setattr(server, "COMPANY", 3)
    store = server.Store(monitor.config.database_path)

    def write(times):
        for _ in range(times):
            store.write(lambda db: None, urgent=False)

    with ThreadPoolExecutor(5) as senders:
        again = senders.submit(write, 2)  # has the lead, and is back before others have heard that they are done
        for done in [senders.submit(write, 1) for _ in range(2)]:
            done.result(timeout=20)
        assert not again.done()
        for done in [again, *(senders.submit(write, 1) for _ in range(2))]:
            done.result(timeout=20)
    store.close()


@pytest.mark.parametrize("sql", ["INSERT INTO meta VALUES ('same', '2')", "INSERT INTO meta VALUES ('x', :missing)"])
def test_a_write_that_breaks_a_rule_of_the_database_fails_alone(store, sql):
    store.write(lambda db: server.set_meta(db, "same", 1))
    told = []
    store.on_failure = lambda: told.append(server.get_meta(store.db, "before"))
    before, broken, after = write_together(store, lambda db: server.set_meta(db, "before", 1),
                                           lambda db: db.execute(sql, {}), lambda db: server.set_meta(db, "after", 1))
    assert before is None and after is None and isinstance(broken, sqlite3.Error)
    assert server.get_meta(store.reader(), "before") == server.get_meta(store.reader(), "after") == "1"
    assert told == ["1"]  # memory is built again at once, from what is left


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("error", "times"), [(server.Problem("busy", "x"), 0), (server.Failure("x"), 0), (KeyError("x"), 1)])
def test_only_a_fault_in_a_write_makes_memory_anew(store, error, times, alone):
    told = []
    store.on_failure = lambda: told.append(1)

    def fail(db: sqlite3.Connection) -> None:
        server.set_meta(db, "half", 1)
        raise error

    if alone:
        with pytest.raises(type(error)):
            store.write(fail)
    else:
        _, caught, _ = write_together(store, lambda db: None, fail, lambda db: server.set_meta(db, "whole", 1))
        assert caught is error and server.get_meta(store.reader(), "whole") == "1"
    assert len(told) == times and server.get_meta(store.reader(), "half") is None


class Closed(io.StringIO):
    """A log on a full disk, or a pipe whose other end is gone."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def no_more_pages(store: server.Store) -> None:
    """From here on the database cannot grow: to SQLite that is a full disk."""
    pages = store.write(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
    store.db.execute(f"PRAGMA max_page_count = {pages}")


@pytest.mark.parametrize("log_fails", [False, True], ids=["", "and so does the log"])
def test_a_disk_that_fills_up_gets_no_report_acknowledged_that_is_not_on_it(monitor, register, post, clock, monkeypatch,
                                                                          log_fails):
    token, acknowledged, full = register("pve1"), set(), []
    no_more_pages(monitor.store)
    if log_fails:
        monkeypatch.setattr(sys, "stdout", Closed())
    for seq in range(1, 400):
        clock.advance(1)
        answer = post(token, build_report(seq=seq, at=clock(), padding=os.urandom(1000).hex()))
        if answer.status == 200:
            acknowledged.add(seq)
        else:
            full.append((seq, answer.code))
    assert acknowledged and {code for _, code in full} == {"storage_full"}
    assert {row["seq"] for row in monitor.store.reader().execute("SELECT seq FROM report")} == acknowledged
    monitor.store.db.execute("PRAGMA max_page_count = 1000000")  # somebody made room
    again = [build_report(seq=seq, at=clock()) for seq in range(1, 400)]
    told = post(token, again).json()
    assert (told["accepted"], told["duplicates"]) == (len(full), len(acknowledged))


def test_a_log_that_cannot_be_written_is_no_fault_of_the_request(client, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Closed())
    assert client.log_in("wrong").status == 401


def test_a_transaction_that_cannot_be_taken_back_ends_the_process(store, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    store.on_failure = lambda: store.db.execute("BEGIN")  # as if the failed one were still open
    with pytest.raises(server.Problem):
        store.write(lambda db: db.execute("INSERT INTO no_such_table VALUES (1)"))
    assert ended == [1]


def test_nobody_waits_for_ever_for_a_store_that_closes(store):
    holding, told = threading.Event(), []

    def hold(db: sqlite3.Connection) -> None:
        holding.set()
        time.sleep(0.2)

    def attempt(work: Callable[[sqlite3.Connection], Any]) -> None:
        try:
            told.append(store.write(work))
        except server.Problem as problem:
            told.append(problem.code)

    threads = [threading.Thread(target=attempt, args=(hold,))]
    threads += [threading.Thread(target=attempt, args=(lambda db: "done",)) for _ in range(20)]
    threads += [threading.Thread(target=store.close)]
    for thread in threads:
        thread.start()
        holding.wait(10)
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert len(told) == 21 and set(told) <= {None, "done", "busy"}


def test_a_server_outlives_a_state_that_cannot_be_read(monitor, monkeypatch):
    def broken(db):
        raise ValueError("no")

    monkeypatch.setattr(monitor.fleet, "load", broken)
    with pytest.raises(ValueError):
        monitor.store.write(broken)
    monitor.store.write(lambda db: server.set_meta(db, "after", 1))


def test_a_full_disk_is_told_as_storage_full(store):
    def full(db):
        raise sqlite3.OperationalError("database or disk is full")

    with pytest.raises(server.Problem) as told:
        store.write(full)
    assert told.value.code == "storage_full" and told.value.headers["Retry-After"]


def test_a_reader_cannot_write(store):
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        store.reader().execute("INSERT INTO meta VALUES ('x', 'y')")


def test_a_closed_store_refuses_instead_of_waiting(store):
    store.close()
    with pytest.raises(server.Problem) as told:
        store.write(lambda db: None)
    assert told.value.code == "busy"


def test_a_commit_is_flushed_to_the_disk(store):
    """synchronous = FULL (2) in WAL: an answer of 200 means that the report is on the disk."""
    assert store.write(lambda db: db.execute("PRAGMA synchronous").fetchone()[0]) == 2
    assert store.write(lambda db: db.execute("PRAGMA journal_mode").fetchone()[0]) == "wal"


def test_there_is_no_key_in_the_database_that_opens_something(monitor, register, admin, client, config):
    token = register("pve1")
    client.log_in()
    content = Path(config.database_path).read_bytes() + Path(config.database_path + "-wal").read_bytes()
    cookie = client.headers["Cookie"].partition("=")[2]
    api_token = admin.headers["Authorization"].partition(" ")[2]
    for secret in (token, cookie, api_token, monitor.secret.decode()):
        assert secret.encode() not in content
    assert server.base64.b64decode(token.removeprefix("whsec_")) not in content


# --- sequence numbers ---


@given(st.lists(st.integers(1, 40), max_size=60))
def test_ranges_know_each_number_once_whatever_the_order(numbers):
    ranges: list[list[int]] = []
    seen: set[int] = set()
    for number in numbers:
        assert server.add_to_ranges(ranges, number) == (number not in seen)
        seen.add(number)
    assert {n for first, last in ranges for n in range(first, last + 1)} == seen
    assert all(a[1] + 1 < b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    if ranges:
        assert server.parse_ranges(server.format_ranges(ranges)) == ranges


def test_what_the_version_before_had_taken_and_not_yet_counted_does_not_count_twice(tmp_path: Path) -> None:
    """Version 0.1 wrote the ranges of a run every 5 minutes: killed in between, they are behind what it had taken."""
    sim = Simulation(tmp_path)
    sim.host("pve1")
    reports = [sim.envelope("pve1", node={"cpu_ratio": 0.1}) for _ in range(5)]
    sim.post("pve1", *reports)
    sim.write(lambda db: db.execute("UPDATE run SET ranges = '1-2'"))
    sim.write(lambda db: db.execute("DELETE FROM meta WHERE key = 'runs_are_whole'"))
    sim.restart()
    accepted = sim.write(lambda db: sim.insert(db, "pve1", reports))
    assert accepted == 0
    sim.close()


def test_nothing_is_acknowledged_when_the_file_system_has_given_up_after_its_yes(store, client, monkeypatch):
    store.write(lambda db: server.set_meta(db, "x", 1))

    def give_up(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as broken:
        broken.setattr(os, "setxattr", give_up)
        for _ in range(2):  # also when there is nothing more to write, as for a report that comes again
            with pytest.raises(server.Problem) as problem:
                store.write(lambda db: None)
            assert problem.value.code == "busy" and client.get("/healthz").status == 503

    def no_attributes(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", no_attributes)
    store.write(lambda db: None)
    assert client.get("/healthz").status == 200
