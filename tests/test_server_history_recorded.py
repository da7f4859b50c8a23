"""A database of an earlier version: what it answered then, it answers still; and the way back stays open.

    recorded -> answers -> packing -> rollback
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import Clock

import server

HERE = Path(__file__).resolve().parent
BEGIN = 1_799_971_200 // 86400 * 86400  # the first of the four days in v3.sql
NOW = BEGIN + 4 * 86400 + 5401.0
SERIES = (
    "node.cpu_ratio", "node.load1", "node.net_receive_bytes_total", "node/interfaces/eno1.receive_bytes_per_second",
    "node/temperatures/coretemp Core 0.celsius", "guests/100.cpu_ratio", "guests/100.net_receive_bytes_total",
    "guests/101.net_receive_bytes_total", "pools/tank.capacity_ratio", "pools/tank.scan_progress_ratio",
    "storages/local.used_bytes", "datasets/tank/vm.used_bytes", "disks/sda.temperature_celsius", "node.nonsense",
)  # fmt: skip


# --- recorded: the database, and what version 0.1.0 answered from it ---


@pytest.fixture
def recorded(tmp_path):
    path = tmp_path / "monitor.db"
    old = sqlite3.connect(path)
    old.executescript((HERE / "databases" / "v3.sql").read_text())
    old.close()
    config = server.Config({"DATABASE_PATH": str(path), "SECRET_KEY_BASE": "x" * 40})
    db = server.connect(str(path))
    server.migrate(db, server.load_migrations())
    db.close()
    clock = Clock()
    clock.now = NOW
    monitor = server.Monitor(config, clock)
    yield monitor
    monitor.close()


def shorten(points: list[Any]) -> list[Any]:
    """What tells apart one list of points from another: how many, the first, the last, and a checksum of all."""
    return [len(points), *points[:1], *points[-1:], zlib.crc32(json.dumps(points).encode())]


def list_answers(monitor: server.Monitor) -> dict[str, Any]:
    """Every question there is, with its answer."""
    keeper, db = monitor.keeper, monitor.store.reader()
    answers: dict[str, Any] = {}
    for step in (30, 300, 900, 3600, 21600):
        for hosts, since, until in (([1, 2], BEGIN - 7200, NOW), ([2], BEGIN + 150_000.5, BEGIN + 333_333)):
            lines = keeper.ask(db, hosts, server.Question(list(SERIES), since, until, step))
            for name, points in zip(SERIES, lines):
                answers[f"{name} of {hosts} by {step}"] = shorten(points)
    for host in (1, 2):
        keys = keeper.keys(db, host, 0, NOW)
        answers[f"keys of {host}"] = shorten(keeper.keys(db, host, BEGIN + 200_000, NOW))
        answers[f"lost of {host}"] = server.list_lost(keys)
        answers[f"silences of {host}"] = server.list_silences(keys)
        answers[f"begin of {host}"] = keeper.begin(db, host)
        answers[f"line of {host}"] = keeper.sparks(db, [host], NOW)[host]
        series: dict[str, list[Any]] = {}
        for row in keeper.export(db, host, NOW):
            series.setdefault(f"export {row[2]} of {host} by {row[1]}", []).append(row)
        answers.update({name: shorten(rows) for name, rows in series.items()})
    return json.loads(json.dumps(answers))


# --- answers ---


def test_a_database_of_version_0_1_0_answers_every_question_as_it_did(recorded):
    expected = json.loads((HERE / "databases" / "v3.json").read_text())
    answers = list_answers(recorded)
    assert answers.keys() == expected.keys()
    assert {name: answer for name, answer in answers.items() if answer != expected[name]} == {}


# --- packing: what is packed further from there ---


def test_what_is_packed_further_by_this_version_changes_no_answer(recorded):
    before = list_answers(recorded)
    recorded.keeper.settle(NOW + 7200)
    assert recorded.store.reader().execute("SELECT count(*) FROM report").fetchone()[0] == 0
    after = list_answers(recorded)
    changed = {name for name, answer in after.items() if answer != before[name]}
    assert changed == {"line of 1", "line of 2"}  # a server that has just started knows them of whole hours only


# --- rollback: to the version that wrote it ---


def test_the_way_back_to_the_version_that_wrote_it_keeps_the_history(recorded):
    before = list_answers(recorded)
    db = server.connect(recorded.config.database_path)
    rows = db.execute("SELECT id, body FROM chunk ORDER BY id").fetchall()
    server.rollback(db, server.load_migrations(), to=3)
    assert [tuple(row) for row in db.execute("SELECT id, body FROM chunk ORDER BY id")] == [tuple(row) for row in rows]
    server.migrate(db, server.load_migrations())
    db.close()
    assert list_answers(recorded) == before
