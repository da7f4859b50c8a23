"""What everything is built on: the checker of given fields, and the background loops."""

from __future__ import annotations

import json
import threading
import time

import pytest

import server

# --- checked ---

PORT = {"name": (str, 1, 5), "port?": (int, 1, 65535), "kinds?": [("a", "b")], "inner?": {"on": bool}}


def upper(value):
    if not isinstance(value, str):
        raise ValueError("should be a word")
    return value.upper()


@pytest.mark.parametrize(("given", "spec", "result"), [
    (True, bool, True), (3, float, 3), (1.5, (float, 0, 2), 1.5), ("x", ("x", "y"), "x"), ([], [int], []),
    ({"name": "n"}, PORT, {"name": "n"}),
    ({"name": "n", "port": None, "kinds": ["b"], "inner": {"on": False}}, PORT,
     {"name": "n", "kinds": ["b"], "inner": {"on": False}}),
    ({"x": {"on": True}, "y": {"on": False}}, {"*": {"on": bool}}, {"x": {"on": True}, "y": {"on": False}}),
    ({"known": None, "other": 1}, {"known?": str, "*": int}, {"other": 1}), ("a", upper, "A"),
])
def test_what_fits_comes_back_as_it_is_used(given, spec, result):
    assert server.checked(given, spec) == result


@pytest.mark.parametrize(("given", "spec", "path", "reason"), [
    (1, bool, (), "should be true or false"), (True, int, (), "should be a whole number"),
    (True, float, (), "should be a number"), (float("nan"), float, (), "should be a number from"),
    (float("inf"), float, (), "should be a number from"), (10**400, float, (), "should be a number from"),
    (None, str, (), "should be text"), ("z", ("x", "y"), (), "should be one of: x, y"),
    (["x"], ("x", "y"), (), "should be one of: x, y"), ({}, PORT, ("name",), "is missing"),
    ({"name": None}, PORT, ("name",), "is missing"), ({"name": "toolong"}, PORT, ("name",), "1 to 5 characters"),
    ({"name": "n", "port": 0}, PORT, ("port",), "a whole number from 1 to 65535"),
    ({"name": "n", "port": 5.0}, PORT, ("port",), "should be a whole number"),
    ({"name": "n", "kinds": ["a", "c"]}, PORT, ("kinds", 1), "should be one of: a, b"),
    ({"name": "n", "kinds": "a"}, PORT, ("kinds",), "should be a list"),
    ({"name": "n", "inner": {"on": 1}}, PORT, ("inner", "on"), "should be true or false"),
    ({"name": "n", "x": 1}, PORT, ("x",), "unknown; here belong: name, port, kinds, inner"),
    ([], PORT, (), "should be a table"), ({"x": 1}, {}, ("x",), "unknown"), ({"a": {"b": 1}}, {"a": {"b": upper}},
                                                                            ("a", "b"), "should be a word"),
])
def test_what_does_not_fit_is_told_with_the_way_to_it(given, spec, path, reason):
    with pytest.raises(server.Mistake) as mistake:
        server.checked(given, spec, ("top",))
    assert mistake.value.path == ("top", *path) and reason in mistake.value.reason


# --- every ---


def wait_for(condition, seconds=5.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture
def stop():
    stop = server.Stop()
    yield stop
    stop.set()
    for loop in stop.loops:
        loop.thread.join(5)
        assert not loop.thread.is_alive()


def test_a_loop_works_at_its_pace_at_another_for_once_and_when_it_is_woken(stop):
    turns, pauses = [], iter([0.0, 0.01])
    loop = server.every(3600, "work", lambda: turns.append(1) or next(pauses, None), stop)
    wait_for(lambda: len(turns) == 3)  # at once, and after each of the two short pauses
    loop.wake()
    wait_for(lambda: len(turns) == 4)
    time.sleep(0.05)
    assert len(turns) == 4 and stop.troubles() == {}


def test_a_wake_during_the_work_is_not_lost(stop):
    turns, inside, go_on = [], threading.Event(), threading.Event()

    def work():
        turns.append(1)
        inside.set()
        go_on.wait(5)

    loop = server.every(3600, "work", work, stop)
    inside.wait(5)
    loop.wake()
    go_on.set()
    wait_for(lambda: len(turns) == 2)


@pytest.mark.parametrize("fault", [RuntimeError("no"), SystemExit(3), MemoryError()])
def test_a_fault_is_told_once_and_ends_nothing(stop, capsys, fault):
    faults = [fault] * 5
    turns = []

    def work():
        turns.append(1)
        if faults:
            raise faults.pop()

    loop = server.every(0.001, "digger", work, stop)
    wait_for(lambda: len(turns) > 8)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("digger: ")]
    assert len(said) == 2 and type(fault).__name__ in said[0] and said[1] == "digger: works again"
    assert loop.trouble() is None and loop.thread.is_alive()


def test_what_is_wrong_with_a_loop_is_seen(stop):
    go_on = threading.Event()
    broken = server.every(3600, "broken", lambda: 1 / 0, stop)
    hanging = server.every(3600, "hanging", lambda: go_on.wait(10) and None, stop)
    ended = server.every(3600, "ended", lambda: None, stop)
    wait_for(lambda: broken.error)
    hanging.due_at -= hanging.STUCK_SECONDS + 1
    ended._ended = True
    ended.wake()
    ended.thread.join(5)
    told = stop.troubles()
    go_on.set()
    assert told["ended"] == "has ended" and "ZeroDivisionError" in told["broken"]
    assert told["hanging"].startswith("has done nothing for 60") and len(told) == 3
    ended.end()
    assert "ended" not in stop.troubles()  # ended on purpose: a channel that was taken out of server.toml


def test_a_channel_that_is_taken_out_loses_its_loop_and_a_new_one_gets_one(tmp_path):
    from simulation import Simulation
    hook = '[[channels]]\nname = "{}"\nkind = "slack"\nurl = "http://127.0.0.1:9/"\n'
    sim = Simulation(tmp_path, hook.format("a") + hook.format("b"))
    try:
        sim.monitor.notifier.start()
        sim.settings_path.write_text(hook.format("b") + hook.format("c"))
        assert sim.monitor.reload_settings()
        assert sorted(loop.name for loop in sim.monitor.stop.loops) == ["to b", "to c"]
        assert json.dumps(sim.monitor.stop.troubles()) == "{}"
    finally:
        sim.close()
