"""Server, sections reports, fleet and ingest: what is taken, what is refused with which code, what counts as news."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from typing import Any

import pytest
from conftest import START, build_disk, build_guest, build_pool, build_report, encode, sign
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import server

MIB = 1 << 20


def stored_reports(store) -> int:
    return store.reader().execute("SELECT count(*) FROM report").fetchone()[0]


# --- what is taken ---


def test_a_report_signed_by_the_library_is_accepted_and_shown(register, post, admin):
    token = register("pve1")
    answer = post(token, build_report())
    assert answer.status == 200
    assert answer.json() == {"status": "ok", "accepted": 1, "duplicates": 0, "server_time": START}
    host = admin.get("/api/v1/hosts/pve1").json()
    assert host["sections"]["node"]["body"]["cpu_ratio"] == 0.25
    assert host["missing_reports"] == 0
    assert host["last_seen_at"] == START


def test_a_zipped_report_is_signed_over_the_bytes_as_sent(register, post):
    assert post(register("pve1"), build_report(), zip=True).json()["accepted"] == 1


def test_a_batch_counts_what_is_new_and_what_is_known(register, post, store, monitor):
    token = register("pve1")
    reports = [build_report(seq=n, at=START - 100 + n) for n in range(1, 6)]
    assert post(token, reports[:3]).json()["accepted"] == 3
    answer = post(token, reports).json()
    assert (answer["accepted"], answer["duplicates"]) == (2, 3)
    assert stored_reports(store) == monitor.reports_accepted == 5


def test_what_is_taken_is_judged_told_and_remembered(register, post, admin, clock, monitor):
    token = register("pve1")
    task = {"upid": "U", "type": "qmstop", "vmid": 100, "ended_at": clock(), "status": "OK"}
    for seq in (1, 2, 2):
        clock.advance(30)
        report = build_report(seq=seq, at=clock(), pools=[build_pool(data_errors=2)], tasks=[task] if seq == 1 else [])
        assert post(token, report).status == 200
    assert [alert["rule"] for alert in admin.get("/api/v1/alerts").json()["items"]] == ["pool-data-errors"]
    assert [event["kind"] for event in admin.get("/api/v1/events").json()["items"] if event["kind"] == "task"] == ["task"]
    state = monitor.fleet.find("pve1")
    assert state.heard == 2 and [kept[0] for kept in state.memory.tasks] == ["qmstop"]
    query = f"series=node.cpu_ratio&from={int(clock() - 300)}&to={int(clock() + 1)}"
    (series,) = admin.get(f"/api/v1/hosts/pve1/history?{query}").json()["series"]
    assert series["points"]


def test_what_is_known_already_writes_nothing(register, post, store, admin):
    token = register("pve1")
    batch = [build_report(seq=1), build_report(seq=2)]
    assert post(token, batch).json()["accepted"] == 2
    before, seen = store.db.total_changes, admin.get("/api/v1/hosts/pve1").json()
    assert post(token, batch).json()["duplicates"] == 2
    assert store.db.total_changes == before and admin.get("/api/v1/hosts/pve1").json() == seen


@pytest.mark.parametrize("zip", [False, True])
def test_a_large_request_is_read_again_with_the_larger_limit_and_no_other_is(register, post, store, monkeypatch, zip):
    read, limits = server.read_request_body, []
    monkeypatch.setattr(server, "read_request_body", lambda *words: (limits.append(words[-1]), read(*words))[1])
    monkeypatch.setattr(server, "LARGE", 5000)
    token = register("pve1")
    assert post(token, build_report(later="x" * 5000), zip=zip).status == 200 and stored_reports(store) == 1
    assert limits == [5000, server.UNPACKED_LIMIT]
    assert post(token, build_report(seq=2), zip=zip).status == 200
    assert post(token, broken(seq=-1), zip=zip).code == "invalid_report"
    assert limits[2:] == [5000, 5000]


def test_a_fault_of_ours_is_a_500_that_names_no_reason_and_one_line_in_the_log(register, post, store, monkeypatch, capsys):
    token = register("pve1")
    monkeypatch.setattr(server, "note_changes", lambda *_: [][0])
    answer = post(token, build_report())
    assert (answer.status, answer.code, answer.json()["status"]) == (500, "internal", 500)
    assert answer.headers["content-type"] == "application/problem+json" and "index" not in answer.text
    said = [line for line in capsys.readouterr().out.splitlines() if "IndexError" in line]
    assert len(said) == 1 and "insert_reports" in said[0]
    monkeypatch.undo()
    assert post(token, build_report()).json()["accepted"] == 1  # the sender kept it


def test_the_same_report_twice_in_a_batch_counts_once(register, post, store):
    answer = post(register("pve1"), [build_report(), build_report()]).json()
    assert (answer["accepted"], answer["duplicates"]) == (1, 1)
    assert stored_reports(store) == 1


def test_500_reports_are_taken_at_once_and_501_are_not(register, post):
    token = register("pve1")
    small = [build_report(seq=n, guests=None, pools=None, storages=None) for n in range(1, 502)]
    assert post(token, small, zip=True).code == "invalid_report"
    assert post(token, small[:500], zip=True).json()["accepted"] == 500


def test_one_good_signature_among_several_is_enough(register, client, clock):
    token, body = register("pve1"), encode(build_report())
    headers = sign(token, body, clock())
    headers["webhook-signature"] = "v1,AAAA v1a,xyz " + headers["webhook-signature"]
    answer = client.request("POST", "/api/v1/hosts/pve1/reports", body, {"Content-Type": "application/json", **headers})
    assert answer.status == 200


def test_the_host_in_the_path_is_compared_without_case(register, post):
    assert post(register("PVE1"), build_report("pve1"), host="pve1").status == 200


def test_unknown_sections_and_fields_are_kept(register, post, admin):
    report = build_report(gpu=[{"name": "a", "celsius": 50}])
    report["node"]["new_field"] = {"deep": [1, 2]}
    assert post(register("pve1"), report).status == 200
    sections = admin.get("/api/v1/hosts/pve1").json()["sections"]
    assert sections["node"]["body"]["new_field"] == {"deep": [1, 2]}
    assert sections["gpu"]["body"] == [{"name": "a", "celsius": 50}]


def test_missing_reports_are_counted_in_each_run(register, post, admin):
    token = register("pve1")
    for run, seq in (("run-a", 1), ("run-a", 4), ("run-b", 3)):
        post(token, build_report(seq=seq, run_id=run))
    assert admin.get("/api/v1/hosts/pve1").json()["missing_reports"] == 2 + 2
    post(token, build_report(seq=2, run_id="run-a"))
    assert admin.get("/api/v1/hosts/pve1").json()["missing_reports"] == 3


# --- what is refused, and with which code ---


def broken(**changes: Any) -> dict:
    report = build_report()
    report.update(changes)
    return report


def without(name: str) -> dict:
    report = build_report()
    del report[name]
    return report


def with_node(**fields: Any) -> dict:
    report = build_report()
    report["node"].update(fields)
    return report


def raw(old: str, new: str) -> bytes:
    text = json.dumps(build_report(), separators=(",", ":"))
    assert old in text
    return text.replace(old, new, 1).encode()


NESTED = b'{"version":1,"deep":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

BROKEN = [  # what is wrong, body, status, code, pointer
    ("no body", b"", 400, "invalid_json", None),
    ("not JSON", b"hello", 400, "invalid_json", None),
    ("cut off JSON", encode(build_report())[:-1], 400, "invalid_json", None),
    ("two documents", encode(build_report()) * 2, 400, "invalid_json", None),
    ("not UTF-8", b'{"version":1,"host_id":"\xff\xfe"}', 400, "invalid_json", None),
    ("NaN", raw('"cpu_ratio":0.25', '"cpu_ratio":NaN'), 400, "invalid_json", None),
    ("Infinity", raw('"cpu_ratio":0.25', '"cpu_ratio":-Infinity'), 400, "invalid_json", None),
    ("1e999", raw('"cpu_ratio":0.25', '"cpu_ratio":1e999'), 422, "invalid_report", "/node/cpu_ratio"),
    ("an integer of 5,000 digits", raw('"cpu_count":8', '"cpu_count":' + "9" * 5000), 400, "invalid_json", None),
    ("an integer of 100 digits", with_node(cpu_count=10**100), 422, "invalid_report", "/node/cpu_count"),
    ("an endless number where a later version has a section", broken(later=10**100), 422, "invalid_report", "/later"),
    ("100,000 brackets", NESTED, 400, "invalid_json", None),
    ("50 brackets", with_node(deep=json.loads("[" * 50 + "]" * 50)), 422, "invalid_report", None),
    ("a number", b"42", 422, "invalid_report", ""),
    ("null", b"null", 422, "invalid_report", ""),
    ("an empty list", b"[]", 422, "invalid_report", ""),
    ("a list of numbers", b"[1]", 422, "invalid_report", "/0"),
    ("no version", without("version"), 422, "invalid_report", None),
    ("another version", broken(version=2), 422, "invalid_report", "/version"),
    ("true as a version", broken(version=True), 422, "invalid_report", "/version"),
    ("no host", without("host_id"), 422, "invalid_report", None),
    ("a number as a host", broken(host_id=7), 422, "invalid_report", "/host_id"),
    ("another host", broken(host_id="pve2"), 422, "host_mismatch", "/host_id"),
    ("no run", without("run_id"), 422, "invalid_report", None),
    ("a run without a name", broken(run_id=""), 422, "invalid_report", "/run_id"),
    ("a run with an endless name", broken(run_id="x" * 100_000), 422, "invalid_report", "/run_id"),
    ("no sequence number", without("seq"), 422, "invalid_report", None),
    ("sequence number 0", broken(seq=0), 422, "invalid_report", "/seq"),
    ("a text as a sequence number", broken(seq="1"), 422, "invalid_report", "/seq"),
    ("a sequence number past 2^63", broken(seq=1 << 63), 422, "invalid_report", "/seq"),
    ("half a sequence number", broken(seq=1.5), 422, "invalid_report", "/seq"),
    ("no time", without("time"), 422, "invalid_report", None),
    ("a time before 1970", broken(time=-1), 422, "invalid_report", "/time"),
    ("a time in the year 10^300", broken(time=1e300), 422, "invalid_report", "/time"),
    ("a text as a time", broken(time="now"), 422, "invalid_report", "/time"),
    ("no such tick", broken(tick="hourly"), 422, "invalid_report", "/tick"),
    ("a list as a tick", broken(tick=[]), 422, "invalid_report", "/tick"),
    ("a text as a section", broken(guests="none"), 422, "invalid_report", "/guests"),
    ("an object as a list", broken(pools={"tank": {}}), 422, "invalid_report", "/pools"),
    ("a list as an object", broken(node=[]), 422, "invalid_report", "/node"),
    ("null in a list of objects", broken(guests=[build_guest(1), None]), 422, "invalid_report", "/guests/1"),
    ("a text as a vmid", broken(guests=[build_guest("100")]), 422, "invalid_report", "/guests/0/vmid"),
    ("a pool without a name", broken(pools=[{"state": "ONLINE"}]), 422, "invalid_report", "/pools/0/name"),
    ("a text as bytes", with_node(memory_total_bytes="lots"), 422, "invalid_report", "/node/memory_total_bytes"),
    ("a truth as a ratio", with_node(cpu_ratio=True), 422, "invalid_report", "/node/cpu_ratio"),
    ("a list as absent sections' object", broken(absent={}), 422, "invalid_report", "/absent"),
    ("errors as a list", broken(errors=["timeout"]), 422, "invalid_report", "/errors"),
    ("an agent that is a text", broken(agent="0.1"), 422, "invalid_report", "/agent"),
    ("a wrong one in a batch", [build_report(), broken(seq=-1)], 422, "invalid_report", "/1/seq"),
    ("more than 2 MiB", b" " * (2 * MIB + 1), 413, "too_large", None),
]  # fmt: skip


@pytest.mark.parametrize("body, status, code, pointer", [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_report_gets_its_named_error(register, post, store, body, status, code, pointer):
    answer = post(register("pve1"), body)
    assert (answer.status, answer.code) == (status, code), answer.text
    if pointer is not None:
        assert answer.json()["pointer"] == pointer
    assert stored_reports(store) == 0


def test_a_batch_with_one_wrong_report_is_refused_whole(register, post, store):
    post(register("pve1"), [build_report(), broken(seq=-1)])
    assert stored_reports(store) == 0


def test_exactly_2_mib_are_not_too_large(register, post):
    body = encode(build_report())
    assert post(register("pve1"), body + b" " * (2 * MIB - len(body))).status == 200


MANY_MEMBERS = gzip.compress(b" ") * 100 + gzip.compress(encode(build_report()))
BROKEN_GZIP = [
    ("cut off", gzip.compress(encode(build_report()))[:-9], 400, "invalid_json"),
    ("no gzip at all", encode(build_report()), 400, "invalid_json"),
    ("a damaged checksum", gzip.compress(encode(build_report()))[:-8] + b"\0" * 8, 400, "invalid_json"),
    ("many members", MANY_MEMBERS, 400, "invalid_json"),
    ("something behind it", gzip.compress(encode(build_report())) + b"more", 400, "invalid_json"),
    ("zlib instead of gzip", zlib.compress(encode(build_report())), 400, "invalid_json"),
    ("nothing", b"", 400, "invalid_json"),
]


@pytest.mark.parametrize("body, status, code", [row[1:] for row in BROKEN_GZIP], ids=[row[0] for row in BROKEN_GZIP])
def test_broken_gzip_gets_its_named_error(register, post, body, status, code):
    answer = post(register("pve1"), body, Content_Encoding="gzip")
    assert (answer.status, answer.code) == (status, code)
    assert ("is not gzip" in answer.text) == (len(body) not in (0, len(MANY_MEMBERS)))


def test_a_gzip_bomb_ends_at_32_mib(register, post):
    bomb = gzip.compress(b" " * (33 * MIB), 9)
    assert len(bomb) < MIB
    answer = post(register("pve1"), bomb, Content_Encoding="gzip")
    assert (answer.status, answer.code) == (413, "too_large")


def test_a_bomb_in_a_bomb_is_just_broken(register, post):
    inner = gzip.compress(b" " * (33 * MIB), 9)
    assert post(register("pve1"), gzip.compress(inner), Content_Encoding="gzip").code == "invalid_json"


@pytest.mark.parametrize("name", ["Content_Type", "Content_Encoding"])
def test_another_media_type_or_encoding_is_named(register, post, name):
    answer = post(register("pve1"), build_report(), **{name: "text/plain" if name == "Content_Type" else "br"})
    assert (answer.status, answer.code) == (415, "unsupported_media_type")


def test_lone_surrogates_are_replaced_and_harm_nothing(register, post, admin):
    report = build_report(guests=[build_guest(100, name="a\ud800b")])
    assert post(register("pve1"), report).status == 200
    assert admin.get("/api/v1/guests").json()["items"][0]["name"] == "a\ufffdb"


def test_a_nul_in_a_name_harms_nothing(register, post, admin):
    report = build_report(guests=[build_guest(100, name="a\0b")], pools=[build_pool("ta\0nk")])
    assert post(register("pve1"), report).status == 200
    assert admin.get("/api/v1/pools?format=text").status == 200


# --- who may ---


def test_no_signature_is_an_invalid_token(register, client):
    register("pve1")
    answer = client.send("POST", "/api/v1/hosts/pve1/reports", build_report())
    assert (answer.status, answer.code) == (401, "invalid_token")


@pytest.mark.parametrize(
    "header, value",
    [
        ("webhook_signature", "v1,AAAA"),
        ("webhook_signature", ""),
        ("webhook_signature", "v1,\xff\xfe"),
        ("webhook_signature", "v2,abc v1"),
        ("webhook_timestamp", ""),
        ("webhook_timestamp", "soon"),
        ("webhook_timestamp", "²"),
        ("webhook_timestamp", "-5"),
        ("webhook_timestamp", "9" * 400),
        ("webhook_id", ""),
        ("webhook_id", "another"),
        ("webhook_id", "x" * 5000),
    ],
)
def test_a_wrong_signature_header_is_an_invalid_token(register, post, header, value):
    answer = post(register("pve1"), build_report(), **{header: value})
    assert (answer.status, answer.code) == (401, "invalid_token")


def test_the_signature_is_checked_before_anything_is_read(register, post):
    """A body that would be refused as broken is refused as unsigned first."""
    token = register("pve1")
    register("pve2")
    assert post(token, b"not json", host="pve2").code == "invalid_token"


def test_another_hosts_token_opens_nothing(register, post):
    register("pve1")
    assert post(register("pve2"), build_report("pve1")).code == "invalid_token"


def test_a_host_that_is_not_registered_is_unknown(register, post):
    token = register("pve1")
    answer = post(token, build_report("pve9"), host="pve9")
    assert (answer.status, answer.code) == (404, "unknown_host")


@pytest.mark.parametrize(
    "name",
    ["..", "../../etc/passwd", "%2e%2e", "a/b", "", " ", "x" * 64, "pve1\n", "pve1\0", "ä", "'; DROP TABLE host"],
)
def test_a_host_name_that_cannot_be_one_is_refused(register, post, name):
    answer = post(register("pve1"), build_report(), host=name)
    assert answer.status == 404
    assert answer.code in ("unknown_host", "not_found")


@pytest.mark.parametrize(
    "offset, status", [(-299, 200), (299, 200), (-301, 401), (301, 401), (-(10**9), 401), (10**9, 401)]
)
def test_a_signature_of_another_time_is_clock_skew(register, client, clock, offset, status):
    token, body = register("pve1"), encode(build_report())
    headers = {"Content-Type": "application/json", **sign(token, body, clock() + offset)}
    answer = client.request("POST", "/api/v1/hosts/pve1/reports", body, headers)
    assert answer.status == status
    if status == 401:
        assert answer.code == "clock_skew"
        assert answer.json()["server_time"] == clock()


def test_a_token_that_is_rotated_while_a_report_is_being_read_takes_it_no_more(register, post, admin, monitor, monkeypatch):
    """The signature was right when it was looked at; what counts is the token at the moment of writing."""
    token, take = register("pve1"), monitor.room.take

    def rotated(*words: Any, **more: Any) -> Any:
        monkeypatch.setattr(monitor.room, "take", take)
        assert admin.send("POST", "/api/v1/hosts/pve1/rotate-token").status == 200
        return take(*words, **more)

    monkeypatch.setattr(monitor.room, "take", rotated)
    answer = post(token, build_report())
    assert (answer.status, answer.code) == (401, "invalid_token")
    assert admin.get("/api/v1/hosts/pve1").json()["sections"] == {}


def test_a_token_that_another_process_rotates_meanwhile_takes_no_report(register, post, admin, monitor, config, monkeypatch):
    token, take = register("pve1"), monitor.room.take

    def rotated(*words: Any, **more: Any) -> Any:
        monkeypatch.setattr(monitor.room, "take", take)
        db = server.open_database(config)
        with server.transaction(db):
            server.rotate_nonce(db, "pve1", START)
        db.close()
        return take(*words, **more)

    monkeypatch.setattr(monitor.room, "take", rotated)
    assert post(token, build_report()).code == "invalid_token"
    assert admin.get("/api/v1/hosts/pve1").json()["sections"] == {}


def test_a_report_of_a_host_that_is_removed_meanwhile_is_of_an_unknown_one(register, monitor, store):
    register("pve1")
    with pytest.raises(server.Problem) as refused:
        store.write(lambda db: server.insert_reports(monitor, 999, [build_report()], None, START, db))
    assert refused.value.code == "unknown_host" and stored_reports(store) == 0


def test_a_rotated_token_is_refused_from_then_on(register, post, admin):
    old = register("pve1")
    answer = admin.send("POST", "/api/v1/hosts/pve1/rotate-token")
    assert answer.status == 200
    assert post(old, build_report()).code == "invalid_token"
    assert post(answer.json()["token"], build_report()).status == 200


def test_reports_are_posted_and_nothing_else(register, admin):
    register("pve1")
    for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD"):
        answer = admin.request(method, "/api/v1/hosts/pve1/reports")
        assert answer.status == 405
        assert answer.headers["allow"] == "POST"


def test_a_flood_is_told_when_to_come_again(register, post, clock):
    token = register("pve1")
    small = [build_report(seq=n, guests=None, pools=None, storages=None) for n in range(1, 501)]
    answers = [post(token, small, zip=True) for _ in range(11)]
    assert [answer.status for answer in answers] == [200] * 10 + [429]
    assert answers[-1].code == "rate_limited"
    clock.advance(int(answers[-1].headers["retry-after"]))
    assert post(token, small, zip=True).status == 200


# --- what is news ---


def latest_cpu(admin) -> float:
    return admin.get("/api/v1/hosts/pve1").json()["sections"]["node"]["body"]["cpu_ratio"]


def cpu_report(ratio: float, **fields: Any) -> dict:
    report = build_report(**fields)
    report["node"]["cpu_ratio"] = ratio
    return report


@pytest.mark.parametrize(
    "arrivals, shown",
    [  # (run, seq, time relative to now, cpu) in the order of arrival
        ([("a", 1, -60, 0.1), ("a", 2, -30, 0.2)], 0.2),
        ([("a", 2, -30, 0.2), ("a", 1, -60, 0.1)], 0.2),  # a backlog does not turn the state back
        ([("a", 9, -30, 0.2), ("b", 1, -60, 0.1)], 0.2),  # between runs the time decides
        ([("a", 9, -30, 0.2), ("b", 1, -10, 0.1)], 0.1),
        ([("a", 1, 86400, 0.1), ("a", 2, -30, 0.2)], 0.2),  # a time in the future keeps nobody away
        ([("a", 1, 86400, 0.1), ("b", 1, 0, 0.2)], 0.2),
        ([("a", 2, -3600, 0.2), ("a", 1, -30, 0.1)], 0.2),  # in one run the sequence, whatever the clock did
    ],
)
def test_the_latest_state_is_of_the_newest_report(register, post, admin, clock, arrivals, shown):
    token = register("pve1")
    for run, seq, offset, ratio in arrivals:
        assert post(token, cpu_report(ratio, run_id=run, seq=seq, at=clock() + offset)).status == 200
        clock.advance(1)
    assert latest_cpu(admin) == shown


CRASHES = {  # (run, seq, seconds since the report before, age of the report) in the order of arrival
    "each soon after the other": [("a", n, 2, 1) for n in range(1, 8)],
    "out of order, with holes": [("a", n, 2, 10 - n) for n in (1, 4, 3, 7, 2)],
    "over several times of writing": [("a", n, 13, 1) for n in range(1, 12)],
    "late ones between": [("a", 1, 5, 1), ("a", 2, 5, 7200), ("b", 1, 5, 1), ("a", 3, 5, 3600), ("b", 2, 5, 0)],
    "a clock that was set back": [("a", 1, 40, 0), ("a", 2, 1, 0), ("a", 3, -7200, 0), ("a", 4, 1, 0)],
    "a new run at the end": [("a", 1, 1, 0), ("a", 2, 1, 0), ("b", 1, 1, 0)],
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("arrivals", CRASHES.values(), ids=CRASHES.keys())
def test_a_crash_forgets_nothing_that_was_acknowledged(monitor, config, register, post, clock, tmp_path, arrivals,
                                                       packed):
    """The files as they are after a kill -9: what has come is known there, once, and so is the latest state."""
    token, sent = register("pve1"), []
    for run, seq, pause, age in arrivals:
        clock.advance(pause)
        fields = {"guests": None} if seq % 3 == 0 else {"errors": {"node": {"code": "timeout", "detail": "-"}}}
        sent.append(cpu_report(seq / 100, run_id=run, seq=seq, at=clock() - age, **fields))
        assert post(token, sent[-1]).json()["accepted"] == 1
    if packed:
        monitor.keeper.settle(clock() + 7200)
    for name in ("monitor.db", "monitor.db-wal", "monitor.db.secret"):
        if (tmp_path / name).exists():
            (tmp_path / ("copy-" + name)).write_bytes((tmp_path / name).read_bytes())
    other = server.Monitor(server.Config({"DATABASE_PATH": str(tmp_path / "copy-monitor.db"),
                                          "SECRET_KEY_BASE": "x" * 64}), clock)
    try:
        (mine,), (theirs,) = monitor.fleet.hosts.values(), other.fleet.hosts.values()
        assert theirs.sections == mine.sections
        assert (theirs.stamp, theirs.agent, theirs.last_seen_at) == (mine.stamp, mine.agent, mine.last_seen_at)
        db, own = other.store.reader(), monitor.store.reader()
        assert server.missing_reports(db, mine.id) == server.missing_reports(own, mine.id)
        again = other.store.write(lambda db: server.insert_reports(other, mine.id, sent, None, clock(), db))
        assert again == 0
        assert [dict(row) for row in server.list_host_records(db)] == [
            dict(row) for row in server.list_host_records(own)]
    finally:
        other.close()


def test_a_report_from_the_future_is_shown_as_clock_skew(register, post, admin, clock):
    post(register("pve1"), build_report(at=clock() + 7200))
    assert admin.get("/api/v1/hosts/pve1").json()["clock_offset_seconds"] == pytest.approx(7200, abs=1)


def test_a_section_that_failed_keeps_its_last_value_and_says_so(register, post, admin, clock):
    token = register("pve1")
    post(token, build_report(seq=1))
    clock.advance(30)
    failed = {"pools": {"code": "timeout", "detail": "zpool list: no answer in 20 s"}}
    post(token, build_report(seq=2, at=clock(), pools=None, errors=failed))
    host = admin.get("/api/v1/hosts/pve1").json()
    assert [pool["name"] for pool in host["sections"]["pools"]["body"]] == ["tank"]
    assert host["sections"]["pools"]["error"]["code"] == "timeout"
    assert host["sections"]["pools"]["time"] == START


def test_state_and_sequence_survive_a_restart(register, post, monitor, config, clock, admin):
    token = register("pve1")
    for seq in (1, 2, 5):
        post(token, build_report(seq=seq, at=START + seq, gpu=[{"name": "g"}]))
    before = admin.get("/api/v1/hosts/pve1").json()
    monitor.close()
    again = server.Monitor(config, clock)
    try:
        state = again.fleet.find("pve1")
        assert state.body("gpu") == [{"name": "g"}]
        assert state.stamp is not None and state.stamp.seq == 5
        call = server.host_row(again.fleet, state, clock())
        assert {key: before[key] for key in call} == call
        headers = {}
        body = encode(build_report(seq=5, at=START + 5))
        headers = {**sign(token, body, clock()), "content-type": "application/json"}
        answer = json.loads(server.ingest(again, "pve1", lambda name: headers.get(name, ""), body).body)
        assert (answer["accepted"], answer["duplicates"]) == (0, 1)
    finally:
        again.close()


@pytest.mark.parametrize("way", ["gzip", "plain", "batch", "surrogates", "restart"])
def test_large_sections_are_kept_as_they_came_and_read_again(register, post, monitor, clock, admin, way):
    token = register("pve1")
    guests = [build_guest(100 + n, name="half \ud800" if way == "surrogates" else f"g{n}") for n in range(5)]
    backups = {"as_of": START - 90, "jobs": [], "guests": []}
    report = build_report(guests=guests, backups=backups)
    assert post(token, [report, build_report(seq=2)] if way == "batch" else report, zip=way == "gzip").status == 200
    if way == "restart":
        monitor.reload()
    state = monitor.fleet.find("pve1")
    assert state.sections["guests"].value is None and state.has("guests") and not state.has("snapshots")
    shown = admin.get("/api/v1/hosts/pve1").json()
    if way != "batch":
        assert [one["vmid"] for one in shown["sections"]["guests"]["body"]] == [100, 101, 102, 103, 104]
    assert shown["guests_total"] == len(shown["sections"]["guests"]["body"])
    assert shown["sections"]["backups"]["body"] == backups
    assert shown["sections"]["backups"]["time"] == START - 90
    post(token, build_report(seq=9, at=START + 9, absent=["guests"], guests=None))
    assert state.body("guests") is None and not state.has("guests")
    assert admin.get("/api/v1/hosts/pve1").json()["guests_total"] is None


@pytest.mark.parametrize("seed", range(4))
def test_a_crash_at_any_moment_forgets_no_report(seed, register, post, monitor, clock):
    """Which reports have come is written every few minutes; in between the tail has to tell it, whatever their run and
    however late they are."""
    token, dice, sent = register("pve1"), random.Random(seed), []
    host = server.find_host(monitor.store.reader(), "pve1")["id"]
    runs = {f"run{number}": 0 for number in range(4)}
    for _ in range(60):
        clock.now += dice.choice((1, 30, 200, 400))
        run_id = dice.choice(sorted(runs))
        runs[run_id] += dice.choice((1, 1, 1, 2))
        late = dice.choice((0, 0, 5, 150, 290, 320, 5000))
        sent.append(build_report(run_id=run_id, seq=runs[run_id], at=clock.now - late))
        assert post(token, sent[-1]).json()["accepted"] == 1
        if dice.random() < 0.2:
            missing = server.missing_reports(monitor.store.reader(), host)
            monitor.reload()
            again = dice.choice(sent)
            assert post(token, again).json()["duplicates"] == 1, again
            assert server.missing_reports(monitor.store.reader(), host) == missing
    monitor.reload()
    assert [post(token, one).json()["duplicates"] for one in sent] == [1] * len(sent)


# --- whatever comes ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
NAMES = sorted(build_report()) + [
    "disks",
    "snapshots",
    "datasets",
    "tasks",
    "services",
    "backups",
    "time_sync",
    "updates",
]


TOKENS: dict[str, str] = {}


def token_of(store, register) -> str:
    """The host of this test's database; all examples of a test share one."""
    if store.path not in TOKENS:
        TOKENS[store.path] = register("pve1")
    return TOKENS[store.path]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(changes=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3), seq=st.integers(1, 1 << 40))
def test_no_value_anywhere_makes_the_server_stumble(register, post, admin, changes, seq, store, clock):
    clock.advance(1)
    answer = post(token_of(store, register), {**build_report(seq=seq), **changes})
    assert answer.status in (200, 400, 422), (changes, answer.text)
    for path in ("overview", "hosts", "hosts/pve1", "guests", "pools", "storages", "alerts"):
        shown = admin.get(f"/api/v1/{path}")
        assert shown.status == 200, (path, changes, shown.text)
    assert admin.get("/metrics").status == 200


@pytest.mark.parametrize("count", [2**63 - 1, 2**63, 2**64, -(2**64)])
def test_a_counter_of_64_bits_may_be_the_value_of_an_alert(register, post, admin, clock, count):
    token = register("pve1")
    for seq in (1, 2):
        clock.advance(1)
        disk = build_disk("sda", read_errors=count, checksum_errors=count)
        pool = build_pool(vdevs=[disk], data_errors=count, capacity_ratio=count)
        assert post(token, build_report(seq=seq, at=clock(), pools=[pool])).status == 200
    assert admin.get("/api/v1/alerts?state=all").json()["total"] > 0 or count < 0


def test_what_a_report_names_twice_has_one_alert(register, post, admin):
    """Two alerts of one object cannot be written: the report was answered by 500 for ever, and so were those behind it."""
    token = register("pve1")
    for seq in (1, 2):
        twice = [build_disk("sda", state="FAULTED", read_errors=seq), build_disk("sda", state="FAULTED", read_errors=seq + 1)]
        services = [{"id": "vm:100", "state": "error", "node": "pve1"}] * 2
        answer = post(token, build_report(seq=seq, pools=[build_pool(vdevs=twice, state="DEGRADED")] * 2, ha={"services": services},
                                          disks=[{"name": "sda", "passed": False}] * 2, backups={"jobs": [{"id": "j", "exclude": 5}]}))  # fmt: skip
        assert answer.status in (200, 422), answer.text
    objects = [(row["rule"], row["object"]) for row in admin.get("/api/v1/alerts?state=all").json()["items"]]
    assert len(objects) == len(set(objects))


HOSTILE = (["x"], {"a": ["x"]}, True, -1e15, 2**64)


@pytest.mark.parametrize("value", HOSTILE, ids=str)
def test_the_page_stands_whatever_an_agent_says(register, post, client, clock, value):
    token = register("pve1")
    assert client.log_in().status == 303
    backup = {"ended_at": value if type(value) is float else clock() - 60, "storage": value, "excluded_disks": value}
    sections = {
        "guests": [build_guest(100, name=value, status=value, tags=value, created_at=value)],
        "pools": [build_pool(guid=value, layout=value, scan=value, last_scrub=value)],
        "backups": {"jobs": [{"id": value, "enabled": True, "schedule": "02:00", "guests": "all", "storage": value}],
                    "guests": [{"vmid": value, "newest_ok": backup}, {"vmid": 100, "newest_ok": backup}]},
    }  # fmt: skip
    for seq, (name, section) in enumerate(sections.items(), 1):
        clock.advance(1)
        assert post(token, build_report(seq=seq, at=clock(), **{name: section})).status in (200, 422)
        assert client.get("/?host=pve1").status == 200, name
    clock.advance(400)
    assert client.get("/").status == 200


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200), encoding=st.sampled_from(["", "gzip"]))
def test_no_bytes_make_the_server_stumble(register, post, store, clock, body, encoding):
    clock.advance(1)
    answer = post(token_of(store, register), body, Content_Encoding=encoding)
    assert answer.status in (400, 413, 422), answer.text
