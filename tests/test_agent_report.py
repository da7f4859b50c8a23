"""Sections, absent and errors are kept apart; one collector's failure is its own; numbers have no gaps."""

from __future__ import annotations

import json
import threading

from agent_support import FakeProbe, registered

import agent


def raising(error):
    def collect(probe, memory):
        raise error

    return collect


def test_values_absence_and_failures_are_three_things():
    collectors = {
        "guests": ("fast", lambda probe, memory: []),
        "cluster": ("fast", raising(agent.Absent())),
        "pools": ("medium", raising(agent.SourceError("timeout", "zpool status tank: no answer in 10 s"))),
        "tasks": ("fast", lambda probe, memory: None),
    }
    with registered(**collectors):
        sections, absent, errors = agent.collect(FakeProbe(), {}, list(agent.COLLECTORS))
    assert sections == {"guests": []}
    assert absent == ["cluster"]
    assert errors == {"pools": {"code": "timeout", "detail": "zpool status tank: no answer in 10 s"}}


def test_a_fault_in_one_collector_does_not_darken_the_others():
    with registered(node=("fast", raising(KeyError("x"))), guests=("fast", lambda probe, memory: [1])):
        sections, _, errors = agent.collect(FakeProbe(), {}, ["node", "guests"])
    assert sections == {"guests": [1]}
    assert errors["node"]["code"] == "failed"
    assert "KeyError" in errors["node"]["detail"]


def test_partial_failure_keeps_the_rest_of_the_section():
    def collect(probe, memory):
        probe.problem("pools", "timeout", "tank")
        return [{"name": "rpool"}]

    with registered(pools=("medium", collect)):
        probe = FakeProbe()
        sections, _, errors = agent.collect(probe, {}, ["pools"])
        again = agent.collect(probe, {}, ["pools"])[2]
    assert sections == {"pools": [{"name": "rpool"}]}
    assert errors == again == {"pools": {"code": "timeout", "detail": "tank"}}


def test_each_section_has_its_own_memory():
    def collect(probe, memory):
        memory["count"] = memory.get("count", 0) + 1
        return memory["count"]

    memories = {}
    with registered(a=("fast", collect), b=("fast", collect)):
        agent.collect(FakeProbe(), memories, ["a"])
        sections, _, _ = agent.collect(FakeProbe(), memories, ["a", "b"])
    assert sections == {"a": 2, "b": 1}


def test_a_collector_never_runs_twice_at_a_time():
    inside, most = [], []
    gate = threading.Event()

    def collect(probe, memory):
        inside.append(1)
        most.append(len(inside))
        gate.wait(0.05)
        inside.pop()

    with registered(a=("fast", collect)):
        threads = [threading.Thread(target=agent.collect, args=(FakeProbe(), {}, ["a"])) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1, 1, 1, 1]


def test_report_has_the_fields_of_the_contract():
    reporter = agent.Reporter("pve-host-01", 1763870000.0)
    report = reporter.build_report(
        "fast", 1763880000.1234, ({"node": {"name": "n"}}, ["ceph"], {}), spooled=3, dropped=2, clock_offset=0.01
    )
    assert report["version"] == 1 and report["host_id"] == "pve-host-01" and report["tick"] == "fast"
    assert report["time"] == 1763880000.123
    assert report["node"] == {"name": "n"} and report["absent"] == ["ceph"] and report["errors"] == {}
    told = report["agent"]
    assert set(told) == {"version", "started", "spooled", "dropped", "clock_offset", "cpu_seconds", "rss_bytes"}
    assert (told["spooled"], told["dropped"], told["clock_offset"]) == (3, 2, 0.01)
    assert told["started"] == 1763870000.0
    assert told["cpu_seconds"] > 0 and told["rss_bytes"] > 1_000_000


def test_unknown_clock_offset_is_null_and_not_zero():
    assert agent.Reporter("h", 0.0).build_report("fast", 0.0, ({}, [], {}))["agent"]["clock_offset"] is None


def test_numbers_have_no_gaps_and_each_start_has_its_own_run():
    reporter, other = agent.Reporter("h", 0.0), agent.Reporter("h", 0.0)
    seqs = [reporter.build_report("fast", 0.0, ({}, [], {}))["seq"] for _ in range(5)]
    assert seqs == [1, 2, 3, 4, 5]
    assert reporter.run_id != other.run_id


def test_section_that_is_no_json_becomes_an_error_and_the_rest_is_sent():
    sections = {"node": {"cpu_ratio": float("nan")}, "guests": [{"vmid": 1}], "disks": {1, 2}}
    report = agent.Reporter("h", 0.0).build_report("fast", 0.0, (sections, [], {}))
    sent = json.loads(agent.encode_report(report))
    assert sent["guests"] == [{"vmid": 1}]
    assert "node" not in sent and "disks" not in sent
    assert sent["errors"]["node"]["code"] == sent["errors"]["disks"]["code"] == "garbage"


def test_half_a_surrogate_pair_does_not_cost_the_report():
    report = agent.Reporter("h", 0.0).build_report("fast", 0.0, ({"guests": [{"name": "a\ud800b"}]}, [], {}))
    assert json.loads(agent.encode_report(report))["guests"] == [{"name": "a?b"}]


def test_section_above_the_servers_limit_is_left_out_with_its_size(monkeypatch):
    monkeypatch.setattr(agent, "REPORT_LIMIT", 5000)
    monkeypatch.setattr(agent, "PACKED_LIMIT", 5000)
    sections = {"snapshots": ["x" * 100] * 100, "node": {"name": "n"}}
    sent = json.loads(agent.encode_report(agent.Reporter("h", 0.0).build_report("slow", 0.0, (sections, [], {}))))
    assert sent["errors"]["snapshots"]["code"] == "too_large"
    assert sent["node"] == {"name": "n"}


def test_sections_come_in_the_order_of_registration():
    nothing = lambda probe, memory: {}  # noqa: E731
    with registered(node=("fast", nothing), disks=("slow", nothing), guests=("fast", nothing)):
        assert agent.names_of("fast") == ["node", "guests"]
        assert agent.names_of("fast", "slow") == ["node", "disks", "guests"]
