"""History: the same numbers whatever way they came, however they are packed by now; gaps stay gaps.

    columns -> order -> rates -> steps -> late -> gone -> hand -> guests -> api -> export -> migration
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
import sqlite3
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import START, Clock, build_guest, build_pool, build_report, build_storage
from hypothesis import given, settings
from hypothesis import strategies as st

import server

DAY_START = START // 86400 * 86400  # midnight
HERE = Path(__file__).resolve().parent


class Recorder:
    """A server's inside with one host, fed and asked directly."""

    def __init__(self, folder: Path, name: str = "one"):
        self.clock = Clock()
        config = server.Config({"DATABASE_PATH": str(folder / f"{name}.db")})
        server.open_database(config, create=True).close()
        self.monitor = server.Monitor(config, self.clock)
        self.host = self.monitor.store.write(lambda db: server.insert_host(db, "pve1", self.clock()))["id"]
        self.monitor.fleet.refresh(self.monitor.store.reader())

    def take(self, *reports: dict) -> int:
        work = partial(server.insert_reports, self.monitor, self.host, list(reports), None, self.clock())
        return self.monitor.store.write(work)

    def pack(self) -> None:
        self.monitor.keeper.settle(self.clock())

    def expire(self) -> None:
        while self.monitor.store.write(lambda db: server.expire(db, self.clock())):
            pass

    def ask(self, *names: str, since: float, until: float, step: int) -> list[list[Any]]:
        question = server.Question(list(names), since, until, step)
        return self.monitor.keeper.ask(self.monitor.store.reader(), [self.host], question)

    def count(self, table: str) -> int:
        return self.monitor.store.reader().execute(f"SELECT count(*) FROM {table}").fetchone()[0]


@pytest.fixture
def recorder(tmp_path):
    recorder = Recorder(tmp_path)
    yield recorder
    recorder.monitor.close()


def reports_of_a_time(count: int, begin: float, every: float = 30, **fields: Any) -> list[dict]:
    """Reports with a few values that move."""
    found = []
    for seq in range(1, count + 1):
        at = begin + (seq - 1) * every
        node = {"cpu_ratio": round(0.5 + 0.4 * math.sin(seq / 7), 4), "load1": seq % 10 / 2, "uptime_seconds": at,
                "net_receive_bytes_total": 1000 * seq, "memory_available_bytes": 20_000_000_000 + seq * 4096, **fields}
        guests = [build_guest(100, net_receive_bytes_total=seq * 10)]
        found.append(build_report(seq=seq, at=at, node=node, guests=guests, storages=None, pools=None,
                                  pool_states=None))
    return found


# --- columns: what is packed comes out as it went in ---

decimals = st.builds(lambda whole, places: whole / 10**places, st.integers(-(10**12), 10**12), st.integers(0, 6))
doubles = st.one_of(
    decimals,
    st.floats(-1.9e19, 1.9e19, allow_nan=False),
    st.integers(-(1 << 64), 1 << 64).map(float),
    st.just(math.nan),
)


@given(st.lists(doubles, min_size=1, max_size=300))
def test_a_column_is_unpacked_exactly(values):
    packed = server.pack_column(values)
    assert list(map(repr, server.unpack_column(b"junk" + packed, 4, len(values)))) == [
        repr(value + 0.0) for value in values  # -0.0 is 0.0
    ]
    assert server.skip_columns(packed, 0, 1) == len(packed)


@pytest.mark.parametrize("values", [[2.0**64, 0.0], [0.0, 2.0**64 - 2048, 2.0**64], [1.0, 2.0**63, 5.0], [2.0**63, -(2.0**63)]])
def test_the_greatest_numbers_that_are_kept_can_be_packed(values):
    assert server.unpack_column(server.pack_column(values), 0, len(values)) == values


def test_a_host_that_cannot_be_packed_does_not_hold_up_the_others(monitor, register, monkeypatch):
    for name in ("pve1", "pve2", "pve3"):
        register(name)
    monitor.fleet.refresh(monitor.store.reader())
    asked = []

    def step(host_id, now):
        asked.append(host_id)
        if host_id == 1:
            raise OverflowError("int too big to convert")
        return False

    monkeypatch.setattr(monitor.keeper, "step", step)
    monitor.keeper.turn(monitor.clock())
    assert asked == [1, 2, 3]


@given(st.lists(decimals, min_size=480, max_size=480), st.integers(0, 3))
@settings(max_examples=20)
def test_a_smooth_column_is_small(noise, places):
    values = [round(20 + one % 7 / 10**places, places) for one in noise]
    assert len(server.pack_column(values)) <= 8 + 8 + 2 * len(values)


@given(st.dictionaries(st.integers(0, 287), st.tuples(decimals, decimals, decimals, st.integers(1, 20)), min_size=1))
def test_points_are_unpacked_exactly(points):
    points = {at * 300: (a, min(a, b, c), max(a, b, c), float(n)) for at, (a, b, c, n) in points.items()}
    packed = server.pack_field([points.get(at, math.nan) for at in range(0, 86400, 300)])
    cells = server.unpack_field(packed, 0, 1 + 296 // 8, 288)
    assert {at * 300: cell for at, cell in enumerate(cells) if cell == cell} == points


# --- order: any permutation, duplication and batching gives the same history ---

SERIES = (
    "node.cpu_ratio", "node.load1", "node.net_receive_bytes_total", "node/interfaces/eno1.receive_bytes_per_second",
    "guests/100.cpu_ratio", "guests/100.net_receive_bytes_total", "pools/tank.capacity_ratio",
    "storages/local.used_bytes", "guests/999.cpu_ratio", "node.nonsense",
)  # fmt: skip


@st.composite
def histories(draw: Any) -> list[dict]:
    """Reports of some hours around midnight, with holes, restarts, resets, and fields that come and go."""
    dice = random.Random(draw(st.integers(0, 1 << 30)))
    at = DAY_START + draw(st.sampled_from([0, 3540, 7200, 82_000, 84_000]))
    reports, seq, run, received, uptime = [], 0, 1, 0, 5000.0
    for _ in range(draw(st.integers(1, 60))):
        gap = dice.choice([30, 30, 30, 30.5, 31, 300, 1000, 4000])
        at, seq, uptime, received = at + gap, seq + 1, uptime + gap, received + dice.randrange(100_000)
        if dice.random() < 0.08:
            run, seq, uptime, received = run + 1, 1, 10.0, dice.randrange(1000)
        if dice.random() < 0.1:
            seq += 2  # lost
        guest = build_guest(100, cpu_ratio=dice.choice([None, 0.25, round(dice.random(), 5)]),
                            net_receive_bytes_total=received, uptime_seconds=uptime)
        node = {"cpu_ratio": dice.choice([dice.random(), 0.5]), "load1": 1, "uptime_seconds": uptime,
                "net_receive_bytes_total": received, "boot_id": f"boot-{run}",
                "interfaces": [{"name": "eno1", "receive_bytes_total": received}]}
        if dice.random() < 0.3:
            del node["load1"]
        reports.append(build_report(
            seq=seq, at=round(at, 3), run_id=f"run-{run}", node=node,
            guests=[guest] if dice.random() < 0.9 else [], pool_states=None,
            storages=[build_storage("local", used_bytes=dice.randrange(10))] if dice.random() < 0.5 else None,
            pools=[build_pool(capacity_ratio=round(dice.random(), 3))] if dice.random() < 0.2 else None))
    return reports


def answers(recorder: Recorder) -> list[Any]:
    """Every series at every step."""
    return [recorder.ask(*SERIES, since=DAY_START - 7200, until=DAY_START + 5 * 86400, step=step)
            for step in (30, 300, 900, 3600, 21600, 86400)]


@given(histories(), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_order_duplicates_batches_and_packing_change_no_answer(tmp_path_factory, reports, dice):
    folder = tmp_path_factory.mktemp("order")
    straight, mixed = Recorder(folder, "straight"), Recorder(folder, "mixed")
    try:
        last = reports[-1]["time"]
        straight.clock.now = mixed.clock.now = last + 1
        for report in reports:
            straight.take(report)
        expected = answers(straight)
        assert any(expected[0])
        sent = [*reports, *dice.choices(reports, k=len(reports) // 2)]
        dice.shuffle(sent)
        accepted = 0
        while sent:
            size = dice.randint(1, 12)
            accepted += mixed.take(*sent[:size])
            del sent[:size]
            if dice.random() < 0.3:
                mixed.clock.advance(dice.choice([20, 4000, 30_000]))
                mixed.pack()
            if dice.random() < 0.2:
                mixed.monitor.history.clear()  # as after a restart
        assert accepted == len(reports)
        assert answers(mixed) == expected
        mixed.clock.advance(40 * 3600)
        mixed.pack()
        assert mixed.count("report") == 0
        assert answers(mixed) == expected
    finally:
        straight.monitor.close()
        mixed.monitor.close()


# --- rates: a counter is shown as what it grew by per second ---


def rate_points(recorder: Recorder, *nodes: dict, every: float = 30, series: str = "node.net_receive_bytes_total"):
    for seq, node in enumerate(nodes, 1):
        at = START + seq * every
        recorder.clock.now = at
        recorder.take(build_report(seq=seq, at=at, node=node))
    (points,) = recorder.ask(series, since=START, until=START + 1e6, step=30)
    return [(point[0] - START, point[1]) for point in points]


def counter(total: float | None, uptime: float | None = None, **more: Any) -> dict:
    return {"net_receive_bytes_total": total, **({} if uptime is None else {"uptime_seconds": uptime}), **more}


def test_a_rate_needs_two_values(recorder):
    assert rate_points(recorder, counter(1000), counter(4000), counter(4000)) == [(60, 100), (90, 0)]


def test_a_reset_is_a_gap_and_no_spike(recorder):
    assert rate_points(recorder, counter(1000), counter(4000), counter(300), counter(600)) == [(60, 100), (120, 10)]


def test_a_boot_is_a_gap_even_if_the_counter_is_higher_after_it(recorder):
    nodes = [counter(1000, boot_id="a"), counter(90_000_000, boot_id="b"), counter(90_000_300, boot_id="b")]
    assert rate_points(recorder, *nodes) == [(90, 10)]


def test_a_restart_seen_in_the_uptime_is_a_gap(recorder):
    assert rate_points(recorder, counter(1000, 5000), counter(9_000_000, 12), counter(9_000_300, 42)) == [(90, 10)]


def test_an_unknown_value_between_two_known_ones_spoils_no_rate(recorder):
    assert rate_points(recorder, counter(1000), counter(None), counter(7000)) == [(90, 100)]


def test_values_hours_apart_make_no_rate(recorder):
    assert rate_points(recorder, counter(1000), counter(2000), every=2 * 3600) == []


def test_the_rate_answers_to_its_own_name_too(recorder):
    series = "node.net_receive_bytes_per_second"
    assert rate_points(recorder, counter(1000), counter(4000), series=series) == [(60, 100)]


# --- steps: coarser points keep average, minimum and maximum; nothing is made up ---


def test_coarser_steps_keep_average_minimum_and_maximum(recorder):
    reports = reports_of_a_time(240, DAY_START)
    recorder.clock.now = DAY_START + 240 * 30
    recorder.take(*reports)
    values = [report["node"]["cpu_ratio"] for report in reports]
    (hours,) = recorder.ask("node.cpu_ratio", since=DAY_START, until=DAY_START + 7200, step=3600)
    for hour, part in zip(hours, (values[:120], values[120:])):
        assert hour[1:] == [pytest.approx(sum(part) / 120, abs=2e-4), min(part), max(part)]


def test_a_silence_is_a_gap_at_every_step(recorder):
    reports = [one for one in reports_of_a_time(720, DAY_START) if not 3600 <= one["time"] - DAY_START < 3 * 3600]
    recorder.clock.now = DAY_START + 720 * 30
    recorder.take(*reports)
    for step in (30, 300, 3600):
        (points,) = recorder.ask("node.cpu_ratio", since=DAY_START, until=DAY_START + 86400, step=step)
        assert points
        assert not [point for point in points if 3600 <= point[0] - DAY_START < 3 * 3600]


def test_zero_is_a_value_and_null_is_none(recorder):
    for seq, value in enumerate((0, None, 0.5), 1):
        recorder.clock.now = START + 30 * seq
        recorder.take(build_report(seq=seq, at=START + 30 * seq, node={"cpu_ratio": value}))
    (points,) = recorder.ask("node.cpu_ratio", since=START, until=START + 300, step=30)
    assert [(at - START, value) for at, value, _, _ in points] == [(30, 0), (90, 0.5)]


@pytest.mark.parametrize("span, wanted, step", [
    (3600, None, 30),
    (6 * 3600, None, 30),
    (86400, None, 300),  # 2,880 at 30 s
    (30 * 86400, None, 3600),
    (365 * 86400, None, 6 * 3600),
    (86400, 30, 30),  # as asked: raw
    (7 * 86400, 900, 900),
    (7 * 86400, 300, 3600),  # 2,016 points
    (730 * 86400, 300, 86400),
    (3600, 7, 30),
    (86400, 400, 600),  # made from 300
])  # fmt: skip
def test_the_step_fits_2000_points(span, wanted, step):
    found = server.choose_step(START - span, START, wanted, START - 2 * 86400, START)
    assert found == step
    assert found == 30 or span / found <= 2000


def test_what_is_kept_only_in_steps_is_answered_in_steps():
    assert server.choose_step(START - 10 * 86400, START - 10 * 86400 + 3600, None, START - 2 * 86400, START) == 300
    assert server.choose_step(START - 100 * 86400, START - 100 * 86400 + 3600, None, START - 2 * 86400, START) == 3600


# --- late: a backlog lands in the right place of every step, and old reports go ---


def pass_days(recorder: Recorder, days: int, every: float = 300) -> list[dict]:
    """Take reports of some days, packing as time goes by."""
    count = int(days * 86400 / every)
    reports = reports_of_a_time(count, DAY_START, every)
    for first in range(0, count, 12):
        recorder.clock.now = reports[first : first + 12][-1]["time"] + 1
        recorder.take(*reports[first : first + 12])
        recorder.pack()
    recorder.clock.now = DAY_START + days * 86400 + 7200
    recorder.pack()
    return reports


def test_reports_go_after_eight_days_and_their_points_stay(recorder):
    reports = pass_days(recorder, 11, every=900)
    recorder.clock.advance(3 * 3600)
    recorder.pack()
    oldest = recorder.monitor.store.reader().execute("SELECT min(id) FROM chunk WHERE id < :n", {
        "n": server.chunk_id(recorder.host, 300, 0)}).fetchone()[0]
    assert server.chunk_begin(oldest) == DAY_START + 3 * 86400
    (points,) = recorder.ask("node.cpu_ratio", since=DAY_START, until=DAY_START + 11 * 86400, step=300)
    assert [point[:2] for point in points] == [[one["time"], one["node"]["cpu_ratio"]] for one in reports]


def test_steps_go_when_their_time_is_over(recorder):
    pass_days(recorder, 3)
    recorder.clock.now = DAY_START + 95 * 86400
    recorder.pack()
    recorder.expire()
    assert recorder.ask("node.cpu_ratio", since=DAY_START, until=DAY_START + 3 * 86400, step=300) == [[]]
    (hours,) = recorder.ask("node.cpu_ratio", since=DAY_START, until=DAY_START + 3 * 86400, step=3600)
    assert len(hours) == 72
    recorder.clock.now = DAY_START + 760 * 86400
    recorder.expire()
    assert recorder.count("chunk") == 0


def test_a_backlog_of_a_week_ago_is_as_exact_as_live(recorder):
    reports = pass_days(recorder, 8)
    missing = [build_report(seq=seq, at=DAY_START + 10 + seq * 300, run_id="run-b", node={"cpu_ratio": 0.9999})
               for seq in range(1, 101)]
    recorder.take(*missing, *missing[:50])

    def ask() -> list[Any]:
        return [recorder.ask("node.cpu_ratio", since=DAY_START, until=DAY_START + 86400, step=step)[0]
                for step in (30, 300, 3600)]

    before = ask()
    recorder.clock.advance(60)
    recorder.pack()
    assert ask() == before
    values = {one["time"]: one["node"]["cpu_ratio"] for one in reports}
    assert len(before[0]) == 289 + 100
    for at, average, lowest, highest in before[1][1:101]:
        assert (lowest, highest) == (values[at], max(0.9999, values[at]))
        assert average == pytest.approx((values[at] + 0.9999) / 2, abs=1e-4)
    assert all(hour[3] == 0.9999 for hour in before[2][:8])


def test_what_comes_when_its_day_is_closed_changes_nothing_and_is_told(recorder, capsys):
    pass_days(recorder, 11, every=900)
    asked = [{"since": DAY_START, "until": DAY_START + 86400, "step": step} for step in (300, 3600)]
    before = [recorder.ask("node.cpu_ratio", **how) for how in asked]
    assert recorder.take(build_report(seq=1, at=DAY_START + 10, run_id="run-b", node={"cpu_ratio": 0.9999})) == 1
    assert [recorder.ask("node.cpu_ratio", **how) for how in asked] == before
    recorder.clock.advance(60)
    recorder.pack()
    assert [recorder.ask("node.cpu_ratio", **how) for how in asked] == before and before[0][0]
    assert recorder.count("report") == 0
    assert "1 reports of pve1 came too late for" in capsys.readouterr().out


def test_a_backlog_of_a_time_nothing_was_known_of_is_as_exact_as_live(tmp_path):
    live, late = Recorder(tmp_path, "live"), Recorder(tmp_path, "late")
    reports = pass_days(live, 2, every=600)
    late.clock.now = DAY_START + 6 * 86400
    for first in range(0, len(reports), 50):
        late.take(*reports[first : first + 50])
        late.clock.advance(60)
        late.pack()
    for step in (300, 3600, 86400):
        asked: dict[str, Any] = {"since": DAY_START, "until": DAY_START + 2 * 86400, "step": step}
        names = ("node.cpu_ratio", "node.net_receive_bytes_total", "guests/100.net_receive_bytes_total")
        assert late.ask(*names, **asked) == live.ask(*names, **asked)
        assert late.ask(*names, **asked)[0]
    live.monitor.close()
    late.monitor.close()


# --- gone: what is packed survives a restart; a removed host leaves nothing ---


def test_the_latest_state_survives_packing_and_a_restart(recorder):
    recorder.take(build_report(seq=1, at=START, disks=[{"name": "sda", "temperature_celsius": 30}]))
    recorder.clock.now = START + 3 * 3600
    recorder.take(build_report(seq=2, at=START + 3 * 3600))
    recorder.clock.advance(2 * 3600)
    recorder.pack()
    assert recorder.count("report") == 0
    fleet = server.Fleet()
    fleet.load(recorder.monitor.store.reader())
    state = fleet.hosts[recorder.host]
    assert state.body("disks")[0]["temperature_celsius"] == 30
    assert state.sections["node"].time == START + 3 * 3600
    assert recorder.take(build_report(seq=1, at=START)) == 0


def run_jobs(recorder: Recorder) -> None:
    """What the clock does: judge and history each 5 s, expire and prune seldom."""
    monitor, now = recorder.monitor, recorder.clock()
    monitor.store.write(partial(server.judge_fleet, monitor, now))
    for job in (server.keep_history, server.expire_history):
        job(monitor, now, monitor.store.reader())
    monitor.store.write(partial(server.prune, monitor, now))


@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_that_is_a_year_ahead_for_hours_costs_no_history(recorder, restarted):
    pass_days(recorder, 3)
    monitor, right = recorder.monitor, recorder.clock()
    monitor.store.write(partial(server.sign_of_life, monitor, right))
    since = recorder.ask("node.cpu_ratio", since=right - 2 * 86400, until=right, step=30)
    kept = recorder.count("chunk"), recorder.count("event")
    for hours in range(3):
        recorder.clock.now = right + (365 * 24 + hours) * 3600
        if restarted and not hours:
            recorder.monitor.close()
            recorder.monitor = monitor = server.Monitor(monitor.config, recorder.clock)
        for _ in range(5):
            run_jobs(recorder)
            recorder.clock.advance(5)
    recorder.clock.now = right + 3 * 3600
    run_jobs(recorder)
    assert recorder.ask("node.cpu_ratio", since=right - 2 * 86400, until=right, step=30) == since and since[0]
    assert (recorder.count("chunk"), recorder.count("event")) >= kept


def test_what_is_old_goes_a_day_after_the_clock_was_ahead(recorder):
    pass_days(recorder, 3)
    recorder.clock.advance(20 * 86400)  # suspended for so long
    for _ in range(3):
        run_jobs(recorder)
        recorder.clock.advance(5)
    raw = "SELECT count(*) FROM chunk WHERE id >> 34 & 3 = 0"
    reader = recorder.monitor.store.reader
    assert reader().execute(raw).fetchone()[0]
    recorder.monitor.doubted_until = recorder.clock() - 1  # a day later
    for _ in range(10):
        run_jobs(recorder)
        recorder.clock.advance(5)
    assert not reader().execute(raw).fetchone()[0]


def test_a_removed_host_leaves_nothing(recorder):
    pass_days(recorder, 1)
    recorder.monitor.store.write(lambda db: server.delete_host(db, "pve1", recorder.clock()))
    recorder.expire()
    for table in ("report", "kept_report", "chunk", "history_object", "history_day", "spark"):
        assert recorder.count(table) == 0, table


def test_each_transaction_of_the_background_is_short(recorder):
    guests = [build_guest(vmid) for vmid in range(100, 130)]
    took = []
    write = recorder.monitor.store.write

    def timed(work: Any, **how: Any) -> Any:
        def measured(db: sqlite3.Connection) -> Any:
            begin = server.time.perf_counter()
            result = work(db)
            took.append(server.time.perf_counter() - begin)
            return result

        return write(measured, **how)

    recorder.clock.now = DAY_START + 86400
    for first in range(0, 2880, 480):
        recorder.take(*[build_report(seq=seq, at=DAY_START + seq * 30 - 30, guests=guests)
                        for seq in range(first + 1, first + 481)])
    recorder.clock.advance(86400)
    recorder.monitor.keeper.store.write = timed
    recorder.pack()
    assert len(took) >= 25
    assert max(took) < 0.1


# --- hand: what is kept in memory, by several threads; bounds for a host that makes up names ---


def test_a_true_value_is_one_whatever_the_rest_of_the_report_is(recorder):
    for seq, other in enumerate((1.5, None, "text"), 1):
        recorder.clock.now = START + 30 * seq
        recorder.take(build_report(seq=seq, at=START + 30 * seq, node={"fenced": True, "quiet": False, "load1": other}))
    assert [[point[1] for point in points] for points in recorder.ask(
        "node.fenced", "node.quiet", "node.load1", since=START, until=START + 300, step=30)] == [[1] * 3, [0] * 3, [1.5]]


def test_a_removed_host_gives_back_its_memory(recorder):
    recorder.take(*reports_of_a_time(50, START - 1500))
    assert recorder.monitor.history.bytes > 0 and recorder.monitor.history.hours
    recorder.monitor.store.write(lambda db: server.delete_host(db, "pve1", recorder.clock()))
    recorder.monitor.fleet.refresh(recorder.monitor.store.reader())
    recorder.monitor.keeper.turn(recorder.clock())
    assert recorder.monitor.history.bytes == 0 and not recorder.monitor.history.hours


def test_taking_and_forgetting_at_once_counts_every_byte(recorder):
    history, report = recorder.monitor.history, reports_of_a_time(1, START)[0]
    ids = list(range(2000))

    def take(mine: list[int]) -> None:
        for number in mine:
            history.remember(recorder.host, number, report, START, 1000)
            history.forget(recorder.host, [number])

    threads = [threading.Thread(target=take, args=(ids[nth::4],)) for nth in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert history.bytes == 0


def test_names_are_found_while_others_read_them(recorder):
    pass_days(recorder, 0.5)
    ended, faults = threading.Event(), []

    def ask() -> None:
        try:
            while not ended.is_set():
                recorder.monitor.history.layouts = {}
                assert recorder.ask("node.cpu_ratio", since=DAY_START, until=DAY_START + 86400, step=30)[0]
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    state = recorder.monitor.fleet.hosts[recorder.host]
    names = {("node", ""): ("cpu_ratio",)}
    for nth in range(100):
        recorder.monitor.keeper.numbers(recorder.monitor.store.reader(), state, {**names, ("node", f"new/{nth}"): ("x",)})
    ended.set()
    for thread in threads:
        thread.join()
    assert faults == []


def made_up(seq: int, count: int) -> dict:
    """A report of a host that makes up guests and fields."""
    guests = [build_guest(1000 * seq + nth, **{f"field{seq}_{nth}": nth}) for nth in range(count)]
    return build_report(seq=seq, at=DAY_START + seq * 3600, guests=guests, node={"cpu_ratio": seq / 100})


def test_a_host_that_makes_up_names_is_bounded_and_told(recorder, monkeypatch, capsys):
    monkeypatch.setattr(server, "OBJECTS_KEPT", 20)
    monkeypatch.setattr(server, "LAYOUTS_KEPT", 12)
    for seq in range(1, 11):
        recorder.clock.now = DAY_START + seq * 3600 + 4000
        recorder.take(made_up(seq, 5))
        recorder.pack()
    assert recorder.count("history_object") <= 20 and recorder.count("history_layout") <= 12
    assert "pve1 has sent more than 20 objects or 12 kinds of them" in capsys.readouterr().out
    (points,) = recorder.ask("node.cpu_ratio", since=DAY_START, until=DAY_START + 86400, step=30)
    assert [point[1] for point in points] == [seq / 100 for seq in range(1, 11)]  # what was there before goes on


def test_names_that_are_in_no_step_any_more_are_forgotten(recorder):
    recorder.clock.now = DAY_START + 8000
    recorder.take(made_up(1, 5))
    recorder.pack()
    recorder.take(made_up(2, 0))
    for seconds in (2 * 86400, 60):
        recorder.clock.advance(seconds)
        recorder.pack()
    before = recorder.ask("guests/1000.field1_0", since=DAY_START, until=DAY_START + 86400, step=3600)
    objects, layouts = recorder.count("history_object"), recorder.count("history_layout")
    assert before[0] and recorder.ask("guests/1000.field1_0", since=DAY_START, until=DAY_START + 86400, step=3600) == before
    recorder.clock.now = DAY_START + 740 * 86400
    recorder.take(build_report(seq=3, at=recorder.clock.now, node={"cpu_ratio": 0.5}, guests=[]))
    recorder.expire()
    for seconds in (2 * 86400, 60):
        recorder.clock.advance(seconds)
        recorder.pack()
    assert recorder.count("history_object") == objects - 5
    assert recorder.count("history_layout") < layouts
    assert recorder.ask("node.cpu_ratio", since=recorder.clock.now - 3 * 86400, until=recorder.clock.now, step=30)[0]


# --- guests: a guest's history follows it through its cluster ---


@pytest.fixture
def cluster(admin, register, post, clock):
    """pve1 and pve2 of one cluster, other1 of another one with the same name; guest 104 moves from pve1 to pve2."""
    tokens = {name: register(name) for name in ("pve1", "pve2", "other1")}
    begin = clock.now
    for minute in range(10):
        clock.now = begin + 60 * minute
        for name, members in (("pve1", ("pve1", "pve2")), ("pve2", ("pve1", "pve2")), ("other1", ("other1", "other2"))):
            there = name == "other1" or (name == "pve1") == (minute < 5)
            guests = [build_guest(104, cpu_ratio=0.9 if name == "other1" else minute / 100,
                                  net_receive_bytes_total=600 * minute if minute < 5 else 60_000_000 + 600 * minute)]
            section = {"name": "home", "members": [{"name": one} for one in members]}
            report = build_report(name, seq=minute + 1, at=clock.now, guests=guests if there else [], cluster=section)
            assert post(tokens[name], report, host=name).status == 200
    return admin


def test_a_guest_that_moved_has_one_history(cluster, clock):
    for host in ("pve1", "pve2"):
        answer = cluster.get(f"/api/v1/hosts/{host}/history?series=guests/104.cpu_ratio&step=30").json()
        assert [point[1] for point in answer["series"][0]["points"]] == [minute / 100 for minute in range(10)]


def test_moving_makes_no_spike(cluster):
    answer = cluster.get("/api/v1/hosts/pve2/history?series=guests/104.net_receive_bytes_total&step=30").json()
    assert {point[1] for point in answer["series"][0]["points"]} == {10}


# --- api ---


def test_history_answers_several_series_in_the_order_asked(admin, register, post, clock):
    token = register()
    for seq in range(1, 11):
        clock.advance(30)
        post(token, build_report(seq=seq, at=clock.now, node={"cpu_ratio": seq / 10, "load1": seq}))
    path = "/api/v1/hosts/pve1/history?series=node.load1&series=node.cpu_ratio&series=pools/tank.capacity_ratio"
    answer = admin.get(f"{path}&step=30&from={START}&to={clock.now}").json()["series"]
    assert [one["name"] for one in answer] == ["node.load1", "node.cpu_ratio", "pools/tank.capacity_ratio"]
    assert [one["step"] for one in answer] == [30, 30, 30]
    assert answer[0]["points"][0] == [START + 30, 1, 1, 1]
    assert [point[1] for point in answer[2]["points"]] == [0.4] * 10
    rows = list(csv.reader(io.StringIO(admin.get(f"{path}&step=30&format=csv").text)))
    assert rows[0] == ["time", "step", "series", "average", "minimum", "maximum"]
    assert len(rows) == 31


@pytest.mark.parametrize("query", ["from=x", "step=0.5", "step=-1", "to=1e999"])
def test_a_question_that_makes_no_sense_is_refused(admin, register, query):
    register()
    assert admin.get(f"/api/v1/hosts/pve1/history?series=node.cpu_ratio&{query}").code == "invalid_request"


def test_hostile_series_names_find_nothing(admin, register, post, clock):
    post(register(), build_report())
    for name in ("", ".", "/", "node", "..", "node..", "%00.x", "guests/'; DROP TABLE chunk.x", "~.~boot", "a" * 5000):
        assert admin.get(f"/api/v1/hosts/pve1/history?series={name}&step=30").status == 200
    assert admin.get("/api/v1/hosts/pve1/history?series=node.~boot").json()["series"][0]["points"] == []


def test_lost_reports_and_silence_are_told_with_their_times(admin, register, post, clock):
    token = register()
    for seq in (1, 2, 5, 6, 26):
        clock.now = START + 30 * seq
        post(token, build_report(seq=seq, at=clock.now))
    answer = admin.get("/api/v1/hosts/pve1/gaps").json()
    assert answer["missing_reports"] == 21 == admin.get("/api/v1/hosts/pve1").json()["missing_reports"]
    assert answer["lost"] == [{"from": START + 60, "to": START + 150, "reports": 2},
                              {"from": START + 180, "to": START + 780, "reports": 19}]
    assert answer["silences"] == [{"from": START + 180, "to": START + 780, "seconds": 600}]


# --- export: everything of a host ---


def test_export_has_every_value_once(recorder):
    pass_days(recorder, 4)
    rows = list(recorder.monitor.keeper.export(recorder.monitor.store.reader(), recorder.host, recorder.clock()))
    cpu = [row for row in rows if row[2] == "node.cpu_ratio"]
    assert [sum(row[1] == step for row in cpu) for step in (30, 300, 3600)] == [4 * 288, 4 * 288, 96]
    assert len({(row[0], row[1], row[2]) for row in rows}) == len(rows)
    assert not [row for row in rows if "~" in row[2]]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_export_streams_both_formats(admin, register, post, clock, form):
    clock.advance(60)
    post(register(), build_report(at=clock.now, storages=[build_storage("=cmd|x")]))
    answer = admin.get(f"/api/v1/hosts/pve1/export?format={form}")
    assert answer.status == 200
    if form == "jsonl":
        rows = [json.loads(line) for line in answer.text.splitlines()]
        assert {"time": clock.now, "step": 30, "series": "node.load1", "average": 1.5, "minimum": 1.5, "maximum": 1.5,
                "count": 1} in rows
    else:
        rows = list(csv.DictReader(io.StringIO(answer.text)))
        assert [row["average"] for row in rows if row["series"] == "node.load1" and row["step"] == "30"] == ["1.5"]


# --- migration: a database of the version before keeps its history ---


def test_a_database_of_version_1_keeps_its_history(tmp_path):
    path = tmp_path / "monitor.db"
    old = sqlite3.connect(path)
    old.executescript((HERE / "databases" / "v1.sql").read_text())
    old.close()
    db = server.connect(str(path))
    assert server.migrate(db, server.load_migrations()) >= 1
    db.close()
    clock = Clock()
    clock.now = DAY_START + 3 * 86400
    monitor = server.Monitor(server.Config({"DATABASE_PATH": str(path), "SECRET_KEY_BASE": "x" * 40}), clock)
    question = server.Question(["node.cpu_ratio", "node.net_receive_bytes_total"], DAY_START, clock.now, 30)
    reader = monitor.store.reader()
    before = monitor.keeper.ask(reader, [1], question)
    assert len(before[0]) == 40
    assert {point[1] for point in before[1]} == {1000 / 30}
    monitor.keeper.settle(clock.now)
    assert reader.execute("SELECT count(*) FROM report").fetchone()[0] == 0
    assert monitor.keeper.ask(reader, [1], question) == before
    assert monitor.fleet.find("pve1").body("node")["cpu_count"] == 8
    monitor.close()


def test_many_reports_of_one_millisecond_all_find_a_place_near_it(recorder):
    reports = [build_report(seq=seq, at=START, node={"load1": seq}, guests=None, pools=None, storages=None)
               for seq in range(1, 1201)]
    assert recorder.take(*reports) == 1200
    (points,) = recorder.ask("node.load1", since=START, until=START, step=30)
    assert [point[1] for point in points] == list(range(1, 1201))
    last = recorder.monitor.store.reader().execute("SELECT max(id) FROM report").fetchone()[0]
    assert server.report_time(last) < START + 2
