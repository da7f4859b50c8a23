"""Server, sections reports, fleet and ingest: what one host may take of it, by size, by number and by odd values."""

from __future__ import annotations

import gzip
import json
import threading
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, START, build_report, encode, sign

import server

SCHEMA = json.loads((ROOT / "docs" / "report.schema.json").read_text())


def zipped(text: bytes) -> bytes:
    return gzip.compress(text, 9)


def as_report(seq: int, at: float, more: str) -> bytes:
    """A small report with a section as text."""
    report = json.dumps(build_report(seq=seq, at=at, guests=None, pools=None, storages=None))
    return (report[:-1] + "," + more + "}").encode()


# --- one request ---


def test_a_gzip_file_of_several_members_is_one_report(register, post):
    body = encode(build_report())
    members = gzip.compress(body[:100]) + gzip.compress(body[100:200]) + gzip.compress(body[200:])
    assert post(register("pve1"), members, Content_Encoding="gzip").json()["accepted"] == 1


@pytest.mark.parametrize("pack", [lambda text: text, zipped, lambda text: zipped(text[:40]) + zipped(text[40:]),
                                  lambda text: zipped(text) + zipped(b"")], ids=["plain", "zipped", "in two", "with an empty one"])
def test_what_is_exactly_as_long_as_it_may_be_is_taken(pack):
    text, encoding = b"x" * 100, "" if pack(b"x") == b"x" else "gzip"
    assert server.unpack(pack(text), encoding, 100) == text
    for most in (99, 50, 39, 0):
        with pytest.raises(server.Problem, match="more than") as refused:
            server.unpack(pack(text), encoding, most)
        assert refused.value.code == "too_large"


def test_a_report_of_several_members_is_read_again_from_the_disk(register, post, admin, monitor):
    body = encode(build_report())
    members = gzip.compress(body[:500]) + gzip.compress(body[500:])
    assert post(register("pve1"), members, Content_Encoding="gzip").status == 200
    monitor.reload()
    guests = admin.get("/api/v1/hosts/pve1").json()["sections"]["guests"]["body"]
    assert [guest["vmid"] for guest in guests] == [100, 101]


@pytest.mark.parametrize("text", ["[" + "[]," * 4_000_000 + "0]", "[" + "{}," * 3_000_000 + "0]",
                                  "[" + "0," * 1_500_000 + "0]"], ids=["lists", "objects", "numbers"])
def test_few_bytes_that_would_take_much_memory_are_too_large(register, post, clock, text):
    answer = post(register("pve1"), zipped(as_report(1, clock(), f'"x":{text}')), Content_Encoding="gzip")
    assert (answer.status, answer.code) == (413, "too_large")


def test_a_large_report_of_a_large_host_is_no_trouble(register, post, clock, admin):
    """600 guests, 4,000 datasets, 9,000 snapshots."""
    report = build_report(
        at=clock(), guests=[{"vmid": n, "type": "qemu", "name": f"g{n}", "status": "running", "cpu_ratio": 0.1,
                             "memory_used_bytes": n, "memory_max_bytes": n, "uptime_seconds": n} for n in range(600)],
        datasets=[{"name": f"tank/data/{n}", "type": "filesystem", "used_bytes": n, "available_bytes": n,
                   "referenced_bytes": n} for n in range(4000)],
        snapshots=[{"dataset": f"tank/data/{n}", "class": "daily", "count": 7, "newest_at": clock(),
                    "oldest_at": clock()} for n in range(9000)])  # fmt: skip
    assert post(register("pve1"), report, zip=True).status == 200
    sections = admin.get("/api/v1/hosts/pve1").json()["sections"]
    assert len(sections["snapshots"]["body"]) == 9000 and not any(section["error"] for section in sections.values())


def test_what_unpacks_to_more_than_it_says_costs_its_sender_and_nobody_else(register, post, clock):
    """gzip's last bytes say how much is inside; here they lie. The host soon has to wait, another one does not."""
    token, other = register("pve1"), register("pve2")
    lie = gzip.compress(b" " * (33 << 20), 9)[:-4] + (1000).to_bytes(4, "little")
    codes = [post(token, lie, Content_Encoding="gzip").code for _ in range(12)]
    assert codes[:10] == ["too_large"] * 10 and codes[-1] == "rate_limited"
    assert post(other, build_report("pve2"), host="pve2").status == 200
    clock.advance(30)
    assert post(token, build_report()).status == 200


def test_one_host_has_so_many_requests_under_way_and_others_theirs(monitor, register, client, clock):
    tokens = {name: register(name) for name in ("pve1", "pve2")}
    sent = [("pve1", seq) for seq in range(1, server.UNDER_WAY + 2)] + [("pve2", 1)]
    inside, release, codes = threading.Barrier(len(sent)), threading.Event(), []

    def send(host: str, seq: int) -> None:
        body = encode(build_report(host, seq=seq))
        headers = {"Content-Type": "application/json", **sign(tokens[host], body, clock())}
        inside.wait(10)
        codes.append((host, client.request("POST", f"/api/v1/hosts/{host}/reports", body, headers).status))

    holder = threading.Thread(target=monitor.store.write, args=(lambda db: release.wait(10),))
    threads = [threading.Thread(target=send, args=one) for one in sent]
    for thread in (holder, *threads):
        thread.start()
    while len(monitor.store._waiting) < server.UNDER_WAY + 1:
        threads[-1].join(0.01)
    release.set()
    for thread in (holder, *threads):
        thread.join(10)
    assert sorted(codes) == [("pve1", 200)] * server.UNDER_WAY + [("pve1", 429), ("pve2", 200)]


def test_requests_that_are_over_are_under_way_no_more():
    room = server.Room()
    for _ in range(3):
        with pytest.raises(KeyError), room.of_host(1):
            raise KeyError  # however it ends
        with ExitStack() as stack:
            for _ in range(server.UNDER_WAY):
                stack.enter_context(room.of_host(1))
            with pytest.raises(server.Problem) as refused, room.of_host(1):
                raise AssertionError("one too many")
            assert (refused.value.code, refused.value.headers) == ("rate_limited", {"Retry-After": "2"})
            stack.enter_context(room.of_host(2))


def test_a_large_request_has_its_turn_or_comes_again(register, post, monitor, monkeypatch, store):
    monkeypatch.setattr(server, "LARGE", 1000)
    monkeypatch.setattr(server, "LARGE_SECONDS", 0.01)
    token = register("pve1")
    with monitor.room.for_large():
        answer = post(token, build_report())
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "busy", "5")
    assert [post(token, build_report(seq=seq)).status for seq in (1, 2)] == [200, 200]  # the turn was given back


def test_who_has_to_wait_is_told_how_long_for_all_that_he_asks():
    host, limiter = SimpleNamespace(id=1), server.RateLimiter(10, 0.5)
    server.Room.take(limiter, host, 10, START)
    for amount, ask, seconds in ((1, 0, 2), (5, 0, 10), (5, 5, 10), (5, 20, 40), (3, 1, 6)):
        with pytest.raises(server.Problem) as refused:
            server.Room.take(limiter, host, amount, START, ask=ask)
        assert (refused.value.code, refused.value.headers["Retry-After"]) == ("rate_limited", str(seconds))
    server.Room.take(limiter, host, 5, START + 10)


# --- the latest state ---


def test_sections_nobody_knows_are_kept_packed(register, post, monitor, admin):
    assert post(register("pve1"), build_report(gpu=[{"name": "a"}])).status == 200
    assert monitor.fleet.find("pve1").sections["gpu"].value is None
    assert admin.get("/api/v1/hosts/pve1").json()["sections"]["gpu"]["body"] == [{"name": "a"}]


@pytest.mark.parametrize("restart", [False, True])
def test_what_is_kept_of_a_host_has_a_limit_and_says_so(register, post, monitor, admin, clock, restart):
    token = register("pve1")
    for seq in range(1, 8):  # each some 4 MiB once parsed
        clock.advance(60)
        text = "[" + "0," * 60_000 + "0]"
        assert post(token, zipped(as_report(seq, clock(), f'"x{seq}":{text}')), Content_Encoding="gzip").status == 200
    if restart:
        monitor.reload()
    sections = admin.get("/api/v1/hosts/pve1").json()["sections"]
    kept = [name for name in sections if name.startswith("x") and sections[name]["body"]]
    refused = [name for name in sections if name.startswith("x") and (sections[name]["error"] or {}).get("code")]
    assert kept == ["x1", "x2", "x3", "x4"] and refused == ["x5", "x6", "x7"]
    assert sections["x5"]["error"]["code"] == "too_large"
    assert sum(section.weight for section in monitor.fleet.find("pve1").sections.values()) <= server.KEPT_LIMIT


@pytest.mark.parametrize("where", ["sections", "absent", "errors"])
def test_names_of_sections_do_not_grow_without_end(register, post, monitor, admin, clock, where):
    token = register("pve1")
    for seq in range(1, 100):
        clock.advance(1)
        names = [f"odd{seq}-{n}" for n in range(3)]
        more: dict[str, Any] = {"sections": dict.fromkeys(names, 1), "absent": {"absent": names},
                                "errors": {"errors": {name: {"code": "odd"} for name in names}}}[where]
        assert post(token, build_report(seq=seq, at=clock(), **more)).status == 200
    state = monitor.fleet.find("pve1")
    strange = state.sections.keys() - server.SECTIONS.keys()
    assert len(strange) == server.STRANGE_SECTIONS + 1
    told = admin.get("/api/v1/hosts/pve1").json()["sections"][server.OTHERS]["error"]
    assert told["code"] == "too_many" and "odd" in told["detail"]
    assert state.body("node")["cpu_ratio"] == 0.25  # what is known goes on
    monitor.reload()
    assert monitor.fleet.find("pve1").sections.keys() - server.SECTIONS.keys() <= strange


def test_starts_of_an_agent_do_not_grow_without_end(register, post, store, clock):
    token = register("pve1")
    small = [build_report(seq=1, at=clock(), run_id=f"run-{n}", guests=None, pools=None, storages=None)
             for n in range(1500)]  # fmt: skip
    answers = [post(token, small[first : first + 250], zip=True) for first in range(0, 1500, 250)]
    assert [answer.status for answer in answers] == [200] * 4 + [429] * 2
    assert store.reader().execute("SELECT count(*) FROM run").fetchone()[0] == 1000
    clock.advance(float(answers[-1].headers["retry-after"]))
    assert post(token, small[1000:1250], zip=True).status == 200  # late, and not lost


def test_gaps_in_the_sequence_do_not_grow_without_end(register, post, store, clock, monkeypatch):
    monkeypatch.setattr(server, "SPANS_LIMIT", 20)
    token = register("pve1")
    small = [build_report(seq=2 * n, guests=None, pools=None, storages=None) for n in range(1, 101)]
    assert post(token, small).json()["accepted"] == 100
    ranges = server.parse_ranges(store.reader().execute("SELECT ranges FROM run").fetchone()[0])
    assert len(ranges) == 20 and ranges[-1] == [200, 200]
    assert ranges[0] == [2, 162, 80] and ranges[1] == [164, 164]  # the oldest are those that are known by their count
    assert post(token, build_report(seq=199)).json()["accepted"] == 1


def test_of_forgotten_gaps_none_is_lost_and_none_is_doubled(register, post, store, clock, monitor, monkeypatch):
    monkeypatch.setattr(server, "SPANS_LIMIT", 20)
    token = register("pve1")

    def reports(numbers):
        return [build_report(seq=n, at=START - 3 * 3600 + n, guests=None, pools=None, storages=None) for n in numbers]

    def missing():
        return server.missing_reports(store.reader(), 1)

    assert post(token, reports(range(2, 201, 2))).json()["accepted"] == 100
    assert missing() == 100  # what is not known any more is missing, as it was
    assert post(token, reports(range(2, 201, 2))).json()["duplicates"] == 100
    assert post(token, reports(range(1, 21))).json() | {"server_time": 0} == {
        "status": "ok", "accepted": 10, "duplicates": 10, "server_time": 0}
    assert missing() == 90
    clock.advance(3 * 3600)
    monitor.keeper.settle(clock())
    assert not store.reader().execute("SELECT 1 FROM report WHERE seq = 2").fetchone()  # it is in a chunk
    monitor.runs.clear()
    assert post(token, reports(range(200, 0, -1))).json() | {"server_time": 0} == {
        "status": "ok", "accepted": 90, "duplicates": 110, "server_time": 0}
    assert missing() == 0
    assert store.reader().execute("SELECT ranges FROM run").fetchone()[0] == "1-200"
    monitor.keeper.settle(clock())
    keys = monitor.keeper.keys(store.reader(), 1, 0, clock())
    assert sorted(key[2] for key in keys) == list(range(1, 201))


@pytest.mark.parametrize(("limit", "most"), [("RUNS_AT_HAND", 3), ("SPANS_AT_HAND", 30)])
def test_only_so_many_runs_and_gaps_are_at_hand_and_none_is_forgotten(register, post, monitor, monkeypatch, limit, most):
    monkeypatch.setattr(server, limit, most)
    token = register("pve1")
    batches = [[build_report(run_id=f"run-{run}", seq=2 * n, guests=None, pools=None) for n in range(1, 8)] for run in range(9)]
    for batch in batches:
        assert post(token, batch).json()["accepted"] == 7
        held = len(monitor.runs) if limit == "RUNS_AT_HAND" else sum(len(run.ranges) for run in monitor.runs.values())
        assert held <= most
    for batch in batches:
        assert post(token, batch).json()["duplicates"] == 7


def test_ranges_read_as_they_are_written():
    for text in ("", "7", "1-3,7", "1-9?2", "1-9?2,11,13-14"):
        assert server.format_ranges(server.parse_ranges(text)) == text
    ranges = server.parse_ranges("1-9?2,11")
    assert server.add_to_ranges(ranges, 10) and server.format_ranges(ranges) == "1-11?2"
    ranges = server.parse_ranges("3,5-9?2")
    assert server.add_to_ranges(ranges, 4) and server.format_ranges(ranges) == "3-9?2"


def test_runs_go_when_nothing_they_brought_is_kept(register, post, store, clock, monitor):
    token = register("pve1")
    for n in range(3):
        assert post(token, build_report(seq=2, at=clock(), run_id=f"run-{n}")).status == 200
        clock.advance(server.DAY)
    clock.advance(server.KEPT[server.COARSE] - 2.5 * server.DAY)
    monitor.looked_at = clock()
    store.write(lambda db: server.prune(monitor, clock(), db))
    assert [row[0] for row in store.reader().execute("SELECT run_id FROM run")] == ["run-1", "run-2"]
    clock.advance(10 * server.DAY)
    monitor.looked_at = clock()
    store.write(lambda db: server.prune(monitor, clock(), db))
    assert [row[0] for row in store.reader().execute("SELECT run_id FROM run")] == ["run-2"]  # when it was last seen
    assert post(token, build_report(seq=3, at=clock(), run_id="run-1")).json()["accepted"] == 1


# --- odd values ---


@pytest.mark.parametrize("section, pointer", [
    ({"pools": [{"name": "tank", "capacity_ratio": []}]}, "/pools/0/capacity_ratio"),
    ({"pools": [{"name": "tank", "state": ["ONLINE"]}]}, "/pools/0/state"),
    ({"guests": [{"vmid": 100, "type": "qemu", "name": {"a": 1}}]}, "/guests/0/name"),
    ({"guests": [{"vmid": 100, "type": "qemu", "uptime_seconds": {}}]}, "/guests/0/uptime_seconds"),
    ({"services": [{"unit": "pvestatd.service", "restarts_total": [1]}]}, "/services/0/restarts_total"),
    ({"disks": [{"name": "sda", "passed": []}]}, "/disks/0/passed"),  # the page chose a word by it: 500
    ({"services": {"unit": "x"}}, "/services"), ({"failed_units": [{"a": 1}]}, "/failed_units/0"),
])  # fmt: skip
def test_a_list_or_an_object_in_the_place_of_one_value_is_refused(register, post, section, pointer):
    answer = post(register("pve1"), build_report(**section))
    assert (answer.status, answer.code, answer.json()["pointer"]) == (422, "invalid_report", pointer)


def test_a_name_that_perl_made_a_number_is_no_reason_to_refuse_a_host(register, post):
    assert post(register("pve1"), build_report(guests=[{"vmid": 100, "type": "qemu", "name": 100}])).status == 200


def schema_types() -> dict[str, set[str]]:
    """Which types stand under a name, anywhere in the sections of the schema."""
    found: dict[str, set[str]] = {}

    def walk(node: Any, name: str | None = None) -> None:
        kind = node.get("type")
        if name is not None:
            found.setdefault(name, set()).update(kind if isinstance(kind, list) else [kind] if kind else [])
        for key, value in node.get("properties", {}).items():
            walk(value, key)
        for key in ("items", "additionalProperties"):
            if isinstance(node.get(key), dict):
                walk(node[key])

    for name, section in SCHEMA["properties"].items():
        if name not in server.ENVELOPE:
            walk(section)
    walk(SCHEMA["$defs"]["vdev"])
    return found


def test_the_server_and_the_schema_have_the_same_sections_and_the_same_kinds_of_names():
    sections = {name: part for name, part in SCHEMA["properties"].items() if name not in server.ENVELOPE}
    assert sections.keys() == server.SECTIONS.keys()
    for name, shape in server.SECTIONS.items():
        assert sections[name]["type"] == ("object" if shape.form is dict else "array"), name
        if shape.key:
            assert shape.key in sections[name]["items"]["required"], name
    types = schema_types()
    for name in server.NUMBER_NAMES & types.keys():
        assert types[name] <= {"number", "integer", "null"}, name
    for name in server.TEXT_NAMES:
        assert types[name] and not types[name] & {"object", "array"}, name
    for name in server.TRUTH_NAMES:
        assert "boolean" in types[name] and not types[name] & {"object", "array"}, name
    assert {name for name, kinds in types.items() if kinds & {"number", "integer"} and kinds & {"array", "object"}} == set()
