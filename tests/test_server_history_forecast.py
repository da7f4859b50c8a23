"""When a space is full, and what made it grow: right, rightly silent, and unknown.

    played -> range -> silent -> unknown -> grew -> asked
"""

from __future__ import annotations

import random
import time

import pytest
from conftest import build_pool, build_report
from test_server_history import Recorder

import server

DAY, GB = 86400, 10**9
NOW = 1_800_000_000.0


# --- played: hourly values of a space ---


def play(days: float, used: float, per_day: float, *, noise: float = 0.0, seed: int = 1) -> list[tuple[float, float]]:
    """A space that is `used` now, and grew so much a day."""
    dice, hours = random.Random(seed), int(days * 24)
    return [(NOW - 3600 * hour, used - per_day * hour / 24 + dice.gauss(0, noise)) for hour in range(hours, -1, -1)]


# --- range ---


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("days", [4, 10, 40])
def test_a_steady_growth_is_told_as_a_range_that_holds_the_truth(days, seed):
    forecast = server.fill_forecast(play(days, 700 * GB, 10 * GB, noise=2 * GB, seed=seed), 820 * GB, NOW)
    assert forecast.soonest is not None and forecast.latest is not None
    assert forecast.soonest - 0.5 <= 12 <= forecast.latest + 0.5
    assert forecast.latest - forecast.soonest < 6
    assert forecast.bytes_per_day == pytest.approx(10 * GB, rel=0.25)
    assert forecast.known_days == pytest.approx(days, abs=0.1)


def test_a_growth_that_got_faster_makes_the_range_wider():
    slow = play(30, 600 * GB, 2 * GB)
    points = [(at, used + max(0.0, at - NOW + 7 * DAY) / DAY * 8 * GB) for at, used in slow]
    forecast = server.fill_forecast(points, points[-1][1] + 100 * GB, NOW)
    assert forecast.soonest == pytest.approx(10, abs=1) and forecast.latest > 20
    assert server.describe_forecast(forecast).startswith(("9–", "10–"))


def test_a_growth_of_the_last_week_only_has_no_end_of_its_range():
    flat = play(30, 600 * GB, 0, noise=GB / 10)
    points = [(at, used + max(0.0, at - NOW + 6 * DAY) / DAY * 10 * GB) for at, used in flat]
    forecast = server.fill_forecast(points, points[-1][1] + 100 * GB, NOW)
    assert 8 < forecast.soonest < 11 and forecast.latest is None
    assert "d or later" in server.describe_forecast(forecast)


def test_what_is_full_is_full():
    forecast = server.fill_forecast(play(10, 100 * GB, GB), 100 * GB, NOW)
    assert (forecast.soonest, forecast.latest) == (0, 0) and server.describe_forecast(forecast) == "full"


# --- silent ---


@pytest.mark.parametrize("per_day", [0.0, -5 * GB])
def test_what_does_not_grow_is_never_full(per_day):
    forecast = server.fill_forecast(play(40, 500 * GB, per_day, noise=GB), 600 * GB, NOW)
    assert forecast.soonest is None and server.describe_forecast(forecast) == "no growth"


@pytest.mark.parametrize("days_ago", [1, 3.4, 5])
def test_one_import_is_no_growth(days_ago):
    points = [(at, used + (200 * GB if at > NOW - days_ago * DAY else 0)) for at, used in play(30, 500 * GB, 0)]
    forecast = server.fill_forecast(points, 800 * GB, NOW)
    assert forecast.soonest is None


@pytest.mark.parametrize("days_ago", [1, 3.4, 5])
def test_one_import_makes_a_slow_growth_no_faster(days_ago):
    points = [(at, used + (200 * GB if at > NOW - days_ago * DAY else 0)) for at, used in play(30, 500 * GB, GB / 10)]
    forecast = server.fill_forecast(points, 800 * GB, NOW)
    assert forecast.soonest == pytest.approx(1000, rel=0.05)


def test_what_grows_on_sundays_only_grows():
    points = [(at, 500 * GB + at // (7 * DAY) % 10 * 70 * GB) for at, _ in play(30, 0, 0)]
    forecast = server.fill_forecast(points, points[-1][1] + 200 * GB, NOW)
    assert 8 < forecast.soonest < 30


def test_one_big_deletion_hides_no_growth():
    points = [(at, used + (300 * GB if at < NOW - 2 * DAY else 0)) for at, used in play(30, 500 * GB, 10 * GB)]
    forecast = server.fill_forecast(points, 600 * GB, NOW)
    assert forecast.soonest == pytest.approx(10, abs=1.5)


def test_what_is_pruned_every_week_is_not_told_to_be_full_for_sure():
    points = [(at, 500 * GB + at % (7 * DAY) / DAY * 10 * GB) for at, _ in play(30, 0, 0)]
    forecast = server.fill_forecast(points, 800 * GB, NOW)
    assert forecast.latest is None


# --- unknown ---


def test_less_than_three_days_are_too_little():
    assert server.fill_forecast(play(2.5, 500 * GB, 10 * GB), 600 * GB, NOW) is None
    assert server.fill_forecast([], 600 * GB, NOW) is None
    assert server.fill_forecast([(NOW - 6 * DAY, 1.0), (NOW, 2.0)], 600 * GB, NOW) is None
    said = {(5.2, 5.9): "5–6 d", (107.2, 107.8): "107 d", (100, 130): "100–130 d", (1030, 1031): "over 2 years"}
    assert {days: server.describe_forecast(server.Forecast(*days, 1.0, 7.0)) for days in said} == said
    assert server.describe_forecast(None) == "unknown"


def test_what_is_known_of_long_ago_only_says_nothing_of_now():
    points = [point for point in play(30, 500 * GB, 10 * GB) if point[0] < NOW - 8 * DAY]
    assert server.fill_forecast(points, 900 * GB, NOW) is None


def test_a_forecast_is_cheap():
    points, began = play(30, 500 * GB, GB, noise=GB), time.process_time()
    for _ in range(10):
        server.fill_forecast(points, 600 * GB, NOW)
    assert time.process_time() - began < 0.5


# --- grew ---


def space(used: float, snapshots: float | None = 0.0) -> dict[str, float]:
    return {"used_bytes": used * GB, **({} if snapshots is None else {"used_by_snapshots_bytes": snapshots * GB})}


def test_growth_is_told_of_the_dataset_that_made_it_and_not_of_its_parents():
    before = {"tank": space(100), "tank/vm": space(60), "tank/vm/vm-104-disk-0": space(40, 10), "tank/data": space(30, 5)}
    after = {"tank": space(181), "tank/vm": space(110), "tank/vm/vm-104-disk-0": space(90, 55), "tank/data": space(60, 5),
             "tank/subvol-105-disk-0": space(1)}
    assert server.what_grew(before, after) == [
        ("tank/vm/vm-104-disk-0", "snapshots", 104, 45 * GB), ("tank/data", "data", None, 30 * GB),
        ("tank/vm/vm-104-disk-0", "data", 104, 5 * GB), ("tank/subvol-105-disk-0", "data", 105, GB)]


def test_what_was_deleted_and_what_shrank_made_nothing_grow():
    before = {"tank": space(100), "tank/old": space(50), "tank/data": space(30)}
    assert server.what_grew(before, {"tank": space(40), "tank/data": space(20)}) == []


def test_unknown_snapshots_are_not_taken_for_none():
    assert server.what_grew({"tank": space(10, None)}, {"tank": space(15, 5)}) == [("tank", "both", None, 5 * GB)]
    assert server.what_grew({"tank": space(10)}, {"tank": {"used_bytes": None}}) == []
    assert server.what_grew({}, {"tank": space(15)}) is None is server.what_grew({"tank": space(15)}, {})


# --- asked: the past as history has it ---


@pytest.fixture
def recorder(tmp_path):
    recorder = Recorder(tmp_path)
    yield recorder
    recorder.monitor.close()


def test_history_gives_what_a_forecast_and_its_reasons_are_made_of(recorder):
    begin = int(NOW) // DAY * DAY
    for hour in range(9 * 24):
        recorder.clock.now = begin + 3600 * hour + 60
        used = 100 * GB + hour * GB
        recorder.take(build_report(
            seq=hour + 1, at=recorder.clock.now, guests=[], pools=[build_pool(allocated_bytes=used)], datasets=[
                {"name": "tank", "used_bytes": used, "used_by_snapshots_bytes": 0},
                {"name": "tank/vm-104-disk-0", "used_bytes": used - 90 * GB, "used_by_snapshots_bytes": hour * GB}]))
        recorder.pack()
    keeper, db, now = recorder.monitor.keeper, recorder.monitor.store.reader(), recorder.clock.now
    (points,) = keeper.past_values(db, recorder.host, ["pools/tank.allocated_bytes"], now)
    assert len(points) == 9 * 24
    forecast = server.fill_forecast(points, points[-1][1] + 240 * GB, now)
    assert server.describe_forecast(forecast) in ("9–10 d", "10–11 d", "10 d", "9–11 d")
    datasets = recorder.monitor.fleet.hosts[recorder.host].body("datasets")
    before = keeper.past_space(db, recorder.host, [dataset["name"] for dataset in datasets], now - 7 * DAY)
    growths = server.what_grew(before, {dataset["name"]: dataset for dataset in datasets})
    assert [(growth.dataset, growth.kind, growth.vmid) for growth in growths] == [("tank/vm-104-disk-0", "snapshots", 104)]
    assert growths[0].bytes == pytest.approx(168 * GB, abs=4 * GB)
    assert keeper.past_space(db, recorder.host, ["tank"], now - 60 * DAY) == {}
