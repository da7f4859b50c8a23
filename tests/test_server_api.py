"""Server, section api: overview, hosts, lists in three formats, history, health, metrics and the description."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import socket
import subprocess
import time
import urllib.parse

import pytest
from conftest import START, build_disk, build_guest, build_pool, build_report, build_storage, find_program

import server

LISTS = tuple(server.RESOURCES)


def items(answer) -> list[dict]:
    assert answer.status == 200, answer.text
    return answer.json()["items"]


@pytest.fixture
def fleet(register, post, clock):
    """Three hosts: well, with a degraded pool, and registered without a report."""
    for number, name in enumerate(("pve1", "pve2")):
        pools = [build_pool(state="DEGRADED" if number else "ONLINE")]
        states = [{"name": "tank", "guid": "1", "state": pools[0]["state"]}]
        report = build_report(name, pools=pools, pool_states=states)
        post(register(name, site=f"site{number}", tags=["prod"]), report, host=name)
    register("pve3")


# --- how often what a host sent is read again ---


def test_the_list_of_hosts_reads_no_report_again_and_a_search_each_once(register, post, admin, monkeypatch):
    backups = {"jobs": [], "guests": []}
    for number in range(5):
        post(register(f"pve{number}"), build_report(f"pve{number}", backups=backups), host=f"pve{number}")
    read: list[bytes] = []

    def count(body: bytes) -> dict:
        read.append(body)
        return server.read_body(body)

    monkeypatch.setattr(server, "reread", functools.lru_cache(1)(count))  # as in a large fleet: the next host's is another
    first = admin.get("/api/v1/hosts").text
    read.clear()
    assert admin.get("/api/v1/hosts").text == first and not read
    metrics = admin.get("/metrics").text
    assert "proxmon_guest_" in metrics and "proxmon_backup_" in metrics and 0 < len(read) <= 5
    admin.get("/api/v1/guests")
    read.clear()
    call = server.Call(admin.monitor, {"QUERY_STRING": ""}, {})
    assert len(server.find_all(call, server.parse_terms("vm100"))["guests"]) == 5 and 0 < len(read) <= 5


# --- backups and disks ---


def test_backups_are_listed_by_guest_with_their_lateness(register, post, admin, clock):
    backups = {"jobs": [{"id": "nightly", "enabled": True, "schedule": "02:00", "guests": [100]}],
               "guests": [{"vmid": 100, "newest_ok": {"ended_at": START - 3600, "duration_seconds": 60, "size_bytes": 5,
                                                      "storage": "pbs"},
                           "newest_failed": {"ended_at": START - 90000, "error": "no space"}},
                          {"vmid": 999, "newest_ok": {"ended_at": START}}]}  # fmt: skip
    post(register("pve1"), build_report(backups=backups))
    register("pve2")
    covered, bare = sorted(items(admin.get("/api/v1/backups")), key=lambda row: row["vmid"])
    assert (covered["host"], covered["vmid"], covered["name"], covered["verdict"]) == ("pve1", 100, "vm100", "ok")
    assert (covered["newest_ok_at"], covered["storage"], covered["size_bytes"]) == (START - 3600, "pbs", 5)
    assert (covered["newest_failed_at"], covered["error"]) == (START - 90000, "no space")
    assert covered["covered"] is True and covered["late_seconds"] < 0 and covered["as_of"] == START
    assert (bare["vmid"], bare["covered"], bare["newest_ok_at"], bare["verdict"]) == (101, False, None, "unknown")
    clock.advance(3 * 86400)
    assert all(row["verdict"] != "ok" for row in items(admin.get("/api/v1/backups")))


def test_disks_are_listed_with_their_pool_and_health(register, post, admin):
    disks = [{"name": "sda", "model": "X", "serial": "1", "pool": "tank", "passed": True, "temperature_celsius": 30},
             {"name": "sdb", "passed": False, "pool": "tank"}, {"name": "sdc", "passed": None}]  # fmt: skip
    post(register("pve1"), build_report(disks=disks))
    rows = {row["name"]: row for row in items(admin.get("/api/v1/disks"))}
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "sda": "ok", "sdb": "critical", "sdc": "info"}  # fmt: skip
    assert (rows["sda"]["pool"], rows["sda"]["temperature_celsius"], rows["sda"]["as_of"]) == ("tank", 30, START)
    assert rows["sdb"]["reason"] and rows["sdb"]["temperature_celsius"] is None
    answer = admin.get("/api/v1/disks?format=csv&pool=tank")
    assert [row["name"] for row in csv.DictReader(io.StringIO(answer.text))] == ["sda", "sdb"]


# --- overview ---


def test_the_overview_counts_hosts_and_problems(fleet, admin, clock):
    overview = admin.get("/api/v1/overview").json()
    assert overview["hosts"] == {"total": 3, "reporting": 2, "stale": 0, "offline": 0}
    assert overview["problems"]["critical"] == 1
    assert overview["server_time"] == clock()
    assert overview["oldest_verified_at"] == START
    assert overview["last_notification_at"] is None
    assert overview["version"] == server.VERSION


def test_silence_turns_stale_and_then_offline(fleet, admin, clock):
    clock.advance(121)
    assert admin.get("/api/v1/overview").json()["hosts"] == {"total": 3, "reporting": 0, "stale": 2, "offline": 0}
    clock.advance(180)
    assert admin.get("/api/v1/overview").json()["hosts"] == {"total": 3, "reporting": 0, "stale": 0, "offline": 2}


def test_the_overview_stays_small(register, admin):
    for number in range(120):
        register(f"host-with-a-rather-long-name-{number}")
    assert len(admin.get("/api/v1/overview").body) < 5000


# --- hosts ---


def test_hosts_come_worst_first(fleet, admin):
    rows = items(admin.get("/api/v1/hosts"))
    assert [row["name"] for row in rows] == ["pve2", "pve3", "pve1"]
    assert [row["verdict"] for row in rows] == ["critical", "unknown", "ok"]
    assert "DEGRADED" in rows[0]["reason"]


def test_a_host_row_tells_unknown_from_zero(fleet, admin):
    row = next(row for row in items(admin.get("/api/v1/hosts")) if row["name"] == "pve3")
    for column in ("last_seen_at", "pve_version", "pools_total", "guests_running", "guests_total", "cpu_ratio",
                   "memory_free_ratio", "storages_inactive", "uptime_seconds"):  # fmt: skip
        assert row[column] is None, column


def test_no_pools_is_zero_and_no_zfs_is_unknown(register, post, admin):
    post(register("a"), build_report("a", pools=[], pool_states=[]), host="a")
    absent = ["pools", "pool_states", "cluster"]
    post(register("b"), build_report("b", pools=None, pool_states=None, absent=absent), host="b")
    rows = {row["name"]: row["pools_total"] for row in items(admin.get("/api/v1/hosts"))}
    assert rows == {"a": 0, "b": None}


def test_a_host_is_found_whatever_its_case(fleet, admin):
    assert admin.get("/api/v1/hosts/PVE1").json()["name"] == "pve1"


@pytest.mark.parametrize("name", ["nobody", "..", "%2e%2e%2fetc", "x" * 5000, "%00", "%ff"])
def test_a_host_that_is_not_there_is_not_found(admin, name):
    answer = admin.get(f"/api/v1/hosts/{name}")
    assert (answer.status, answer.code) == (404, "not_found")


def test_registering_shows_the_token_once(admin, post):
    answer = admin.send("POST", "/api/v1/hosts", {"name": "pve1", "site": "fra1", "tags": ["prod", "ssd"]})
    assert answer.status == 201
    body = answer.json()
    assert (body["host"]["name"], body["host"]["site"], body["host"]["tags"]) == ("pve1", "fra1", ["prod", "ssd"])
    assert answer.headers["cache-control"] == "no-store"
    assert post(body["token"], build_report()).status == 200
    assert "whsec_" not in admin.get("/api/v1/hosts/pve1").text


@pytest.mark.parametrize(
    "body",
    [{}, {"name": ""}, {"name": "-a"}, {"name": "a b"}, {"name": "x" * 64}, {"name": 7}, {"name": None}, {"name": "ä"},
     {"name": "a", "site": 7}, {"name": "a", "tags": "prod"}, {"name": "a", "tags": [1]}, {"name": "a", "color": "red"},
     {"name": "../a"}, {"name": "a\n"}, {"name": "a", "site": "x" * 100_000}],
)  # fmt: skip
def test_a_host_that_cannot_be_is_refused(admin, body):
    answer = admin.send("POST", "/api/v1/hosts", body)
    assert answer.status in (400, 413, 422), answer.text
    assert answer.code
    assert items(admin.get("/api/v1/hosts")) == []


@pytest.mark.parametrize("name", ["pve1", "PVE1"])
def test_a_name_that_is_taken_is_a_conflict(admin, register, name):
    register("pve1")
    answer = admin.send("POST", "/api/v1/hosts", {"name": name})
    assert (answer.status, answer.code) == (409, "conflict")


def test_a_host_can_be_changed(admin, register):
    register("pve1")
    changes = {"site": "ams2", "tags": ["test"], "note": "top of rack", "maintenance_until": START + 3600}
    answer = admin.send("PATCH", "/api/v1/hosts/pve1", changes)
    assert answer.status == 200
    row = admin.get("/api/v1/hosts/pve1").json()
    assert {key: row[key] for key in changes} == changes
    assert row["verdict"] == "maintenance"
    admin.send("PATCH", "/api/v1/hosts/pve1", {"note": None, "maintenance_until": None})
    row = admin.get("/api/v1/hosts/pve1").json()
    assert (row["note"], row["site"]) == (None, "ams2")


def test_a_renamed_host_keeps_its_token_and_the_old_name_is_refused(admin, register, post):
    token = register("old")
    post(token, build_report("old"), host="old")
    assert admin.send("PATCH", "/api/v1/hosts/old", {"name": "new"}).status == 200
    assert post(token, build_report("old", seq=2), host="old").code == "unknown_host"
    assert post(token, build_report("old", seq=2), host="new").code == "host_mismatch"
    assert post(token, build_report("new", seq=2), host="new").status == 200
    assert admin.get("/api/v1/hosts/new").json()["missing_reports"] == 0


def test_a_removed_host_is_gone_with_all_it_sent(admin, register, post, store):
    post(register("pve1"), build_report())
    assert admin.send("DELETE", "/api/v1/hosts/pve1").status == 204
    assert admin.get("/api/v1/hosts/pve1").code == "not_found"
    assert items(admin.get("/api/v1/guests")) == []
    assert store.reader().execute("SELECT count(*) FROM report").fetchone()[0] == 0
    assert admin.send("DELETE", "/api/v1/hosts/pve1").code in ("not_found", "unknown_host")


# --- lists ---


@pytest.mark.parametrize("name", LISTS)
def test_a_list_has_its_frame_and_three_formats(fleet, admin, name):
    body = admin.get(f"/api/v1/{name}").json()
    assert set(body) - {"basis", "summary"} == {"items", "total", "limit", "offset"}  # the answers say what they go by
    assert (body["limit"], body["offset"], body["total"]) == (200, 0, len(body["items"]))
    answer = admin.get(f"/api/v1/{name}?format=csv")
    assert answer.headers["content-type"].startswith("text/csv")
    assert len(list(csv.reader(io.StringIO(answer.text)))) == 1 + body["total"]
    answer = admin.get(f"/api/v1/{name}?format=text")
    assert answer.headers["content-type"].startswith("text/plain")
    assert len(answer.text.splitlines()) == 1 + body["total"]


def test_a_list_can_be_cut(fleet, admin):
    body = admin.get("/api/v1/guests?limit=2&offset=1").json()
    assert (len(body["items"]), body["total"], body["limit"], body["offset"]) == (2, 4, 2, 1)
    assert body["items"] == items(admin.get("/api/v1/guests"))[1:3]


def test_a_list_can_be_had_with_some_of_its_columns(fleet, admin):
    assert {tuple(row) for row in items(admin.get("/api/v1/guests?columns=vmid,name"))} == {("vmid", "name")}
    assert admin.get("/api/v1/guests?columns=vmid,name&format=csv").text.splitlines()[0] == "vmid,name"
    assert admin.get("/api/v1/guests?columns=vmid,nope").status == 400


@pytest.mark.parametrize(
    "query", ["limit=-1", "limit=x", "offset=-1", "format=xml", "sort=nope", "limit=1e9", "limit=nan"]
)
def test_a_query_that_cannot_be_is_a_400(fleet, admin, query):
    assert admin.get(f"/api/v1/guests?{query}").status == 400


@pytest.mark.parametrize(
    "query, count",
    [("", 4), ("?site=site1", 2), ("?host=pve1", 2), ("?host=pve1&status=running", 1), ("?q=vm100", 2),
     ("?tag=prod", 4),
     ("?tag=nope", 0), ("?q=pve2%20db", 1)],
)  # fmt: skip
def test_guests_are_found_by_filter_and_search(fleet, admin, query, count):
    assert len(items(admin.get(f"/api/v1/guests{query}"))) == count


def test_every_list_is_narrowed_to_a_cluster_by_filter_and_search(register, post, admin, monitor, store):
    for name, cluster in (("a1", "Lab"), ("a2", "lab2"), ("a3", None)):
        more = {"cluster": {"name": cluster, "quorate": False, "members": []}} if cluster else {}
        post(register(name), build_report(name, **more), host=name)
    for seconds in (0, 60, 120, 180):
        store.write(lambda db, at=START + seconds: server.judge_shared(db, monitor.fleet, at))
    for listed in ("hosts", "guests", "pools", "disks", "copies", "drift"):
        for query in ("cluster=lab", "q=cluster:lab%20-cluster:lab2"):
            answer = admin.get(f"/api/v1/{listed}?{query}")
            assert {row.get("host") or row["name"] for row in items(answer)} <= {"a1"}, listed
    assert [row["name"] for row in items(admin.get("/api/v1/hosts?cluster=LAB"))] == ["a1"]
    assert len(items(admin.get("/api/v1/guests?q=cluster:lab"))) == 2 * len(items(admin.get("/api/v1/guests?host=a1")))
    assert items(admin.get("/api/v1/hosts?cluster=nope")) == []
    objects = {row["object"] for row in items(admin.get("/api/v1/alerts?q=cluster:lab2"))}
    assert objects == {row["object"] for row in items(admin.get("/api/v1/alerts?cluster=lab2"))} == {"clusters/lab2"}


def test_the_row_of_a_host_tells_what_is_installed_and_how_old_that_knowledge_is(register, post, admin):
    node = {"kernel": "6.14.8-2-pve", "kernel_next": "6.14.11-4-pve", "reboot_needed": True}
    versions = {"zfs_userland": "2.3.4-pve1", "zfs_module": "2.3.3-pve1"}
    post(register("a1"), build_report("a1", node=node, versions=versions,
                                            updates={"pending": 3, "as_of": START - 9 * 86400}),
         host="a1")
    post(register("a2"), build_report("a2", node={"kernel": "6.14.11-4-pve"}), host="a2")
    (row,) = items(admin.get("/api/v1/hosts?q=apt%3E7d"))
    assert row["name"] == "a1" and row["apt_lists_at"] == START - 9 * 86400
    assert [row["kernel_next"], row["zfs_userland"], row["zfs_module"]] == ["6.14.11-4-pve", "2.3.4-pve1", "2.3.3-pve1"]
    (other,) = items(admin.get("/api/v1/hosts?q=-zfs:2"))
    assert other["name"] == "a2" and other["zfs_module"] is None and other["apt_lists_at"] is None


def test_the_rows_have_the_columns_of_the_contract(fleet, admin):
    columns = {
        "guests": "host vmid type name status verdict template lock tags cpu_count cpu_ratio memory_used_bytes "
        "memory_max_bytes disk_used_bytes disk_max_bytes uptime_seconds onboot ha_state as_of",
        "pools": "host name guid state verdict reason layout size_bytes allocated_bytes free_bytes usable_used_bytes "
        "usable_available_bytes capacity_ratio fragmentation_ratio dedup_ratio redundancy_margin data_errors "
        "read_errors write_errors checksum_errors scan_function scan_state scan_progress_ratio last_scrub_at as_of",
        "storages": "host storage type content shared enabled active verdict reason total_bytes used_bytes "
        "available_bytes used_ratio dataset as_of",
        "alerts": "id rule severity state host object message value since resolved_at acknowledged because_of",
        "hosts": "name verdict reason site tags last_seen_at",
    }
    for name, wanted in columns.items():
        rows = items(admin.get(f"/api/v1/{name}"))
        assert rows
        for row in rows:
            assert set(wanted.split()) <= set(row), name


def test_a_formula_in_a_name_stays_a_text_in_csv(register, post, admin):
    names = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", '=HYPERLINK("http://x","y")', 'a,b\n"c"']
    post(register("pve1"), build_report(guests=[build_guest(100 + n, name=name) for n, name in enumerate(names)]))
    rows = list(csv.DictReader(io.StringIO(admin.get("/api/v1/guests?format=csv").text, newline="")))
    found = {int(row["vmid"]): row["name"] for row in rows}
    for number, name in enumerate(names):
        shown = found[100 + number]
        assert shown.lstrip("'") == name
        assert shown[0] not in "=+-@\t\r"


@pytest.mark.parametrize("sign", ["\n", "\r", "\t", "＝", "＋", "－", "＠"])
def test_whatever_a_spreadsheet_takes_for_the_begin_of_a_formula_is_quoted(register, post, admin, sign):
    post(register("pve1"), build_report(guests=[build_guest(100, name=f"{sign}=1+1")]))
    answer = admin.get("/api/v1/guests?format=csv")
    assert next(csv.DictReader(io.StringIO(answer.text, newline="")))["name"] == f"'{sign}=1+1"
    assert answer.headers["content-disposition"] == 'attachment; filename="guests.csv"'


def test_a_newline_or_an_escape_in_a_name_does_not_break_a_line_of_text(register, post, admin):
    post(register("pve1"), build_report(guests=[build_guest(100, name="a\nb\x1b[31m"), build_guest(101)]))
    text = admin.get("/api/v1/guests?format=text").text
    assert len(text.splitlines()) == 3
    assert "\x1b" not in text


def test_etag_saves_the_answer_until_something_changes(fleet, admin, register, post, clock):
    for path in ("overview", "hosts", "guests", "pools", "hosts/pve1", "openapi.json"):
        tag = admin.get(f"/api/v1/{path}").headers["etag"]
        again = admin.get(f"/api/v1/{path}", If_None_Match=tag)
        assert (again.status, again.body) == (304, b"")
    tag = admin.get("/api/v1/guests").headers["etag"]
    post(register("pve9"), build_report("pve9"), host="pve9")
    assert admin.get("/api/v1/guests", If_None_Match=tag).status == 200


def test_what_was_asked_while_a_report_was_written_is_not_taken_for_the_new_state(fleet, admin, store, monitor):
    during = []

    def work(db):
        during.append(admin.get("/api/v1/alerts"))
        state = monitor.fleet.find("pve2")
        state.alerts = {key: alert.changed(message="new") for key, alert in state.alerts.items()}
        during.append(admin.get("/api/v1/alerts"))

    store.write(work)
    before, amidst = during
    assert '"new"' not in before.text and '"new"' in amidst.text
    assert admin.get("/api/v1/alerts", If_None_Match=before.headers["etag"]).status == 200
    assert admin.get("/api/v1/alerts", If_None_Match=amidst.headers["etag"]).status == 304


def test_an_etag_of_one_list_is_not_good_for_another(fleet, admin):
    tag = admin.get("/api/v1/guests").headers["etag"]
    assert admin.get("/api/v1/pools", If_None_Match=tag).status == 200
    assert admin.get("/api/v1/guests?format=csv", If_None_Match=tag).status == 200


@pytest.mark.parametrize("path", ["/nowhere", "/api/v1/", "/api/v1/nowhere", "/api/v2/hosts", "/static/../server.py",
                                  "/static/..%2fserver.py", "/static/", "/static/page.html",
                                  "/.git/config"])  # fmt: skip
def test_what_is_not_there_is_not_found(admin, path):
    answer = admin.get(path)
    assert (answer.status, answer.code) == (404, "not_found")


@pytest.mark.parametrize(
    "method, path", [("PUT", "hosts"), ("DELETE", "overview"), ("POST", "guests"), ("PATCH", "hosts")]
)
def test_a_method_that_is_not_there_is_named(admin, method, path):
    answer = admin.send(method, f"/api/v1/{path}", {})
    assert (answer.status, answer.code) == (405, "method_not_allowed")
    assert "GET" in answer.headers["allow"]


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"null", b"\xff", b"[" * 5000, b'{"name": NaN}', b'{"a":' + b"9" * 5000 + b"}"]
)
def test_a_write_that_is_no_json_object_is_a_400(admin, body):
    answer = admin.request("POST", "/api/v1/hosts", body, {"Content-Type": "application/json"})
    assert answer.status == 400
    assert answer.code in ("invalid_json", "invalid_request")


# --- one host's values are its own affair ---


def test_a_host_with_odd_values_costs_the_others_no_row_and_is_named(register, post, admin, capsys, monkeypatch):
    server.log_once.cache_clear()
    make_rows = server.backup_rows

    def stumble(state, *rest):
        return make_rows(state, *rest) if state.name != "odd" else iter([{}["what nobody has thought of"]])

    monkeypatch.setattr(server, "backup_rows", stumble)
    jobs = [{"id": "nightly", "enabled": True, "schedule": "02:00", "guests": "all"}]
    post(register("odd"), build_report("odd", backups={"jobs": jobs, "guests": []}), host="odd")
    jobs = [{"id": "nightly", "enabled": True, "schedule": "02:00", "guests": "all"}]
    post(register("well"), build_report("well", backups={"jobs": jobs, "guests": []}), host="well")
    answer = admin.get("/api/v1/backups").json()
    assert [row["host"] for row in answer["items"]] == ["well", "well"]
    assert answer["failed"] == ["odd"]
    assert admin.get("/api/v1/backups?format=csv").headers["x-failed-hosts"] == "odd"
    assert admin.get("/metrics").status == 200
    assert "backups of odd left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, resource in server.RESOURCES.items() if resource.of_host])
def test_every_list_is_answered_whatever_the_types_of_a_host(register, post, admin, monitor, name):
    sections = {"guests": [build_guest(100, name=7, status=[], tags=5, template="x", ha_state={}, volumes=7)],
                "storages": [build_storage("a", active=[], enabled="no", content=5, dataset=[])],
                "pools": [build_pool(layout=5, scan=7, last_scrub="x", vdevs="x", state=5)],
                "disks": [{"name": "sda", "passed": "x", "model": [], "pool": {}, "kind": 7}],
                "backups": {"jobs": [{"exclude": 5, "guests": 7, "schedule": []}], "guests": [{"vmid": 100}, 7]}}  # fmt: skip
    register("odd")

    def keep(db):  # past the checks of today: a database may hold what an older version took
        monitor.fleet.refresh(db)
        host = monitor.fleet.find("odd").id
        return server.insert_reports(monitor, host, [build_report("odd", **sections)], None, START, db)

    assert monitor.store.write(keep) == 1
    post(register("well"), build_report("well"), host="well")
    for column in server.RESOURCES[name].columns:
        for sign in ("", "-"):
            assert admin.get(f"/api/v1/{name}?sort={sign}{column}").status == 200, column
    hosts = {row.get("host") or row.get("name") for row in items(admin.get(f"/api/v1/{name}"))}
    assert "well" in hosts or name in ("disks", "backups", "volumes")


def test_numbers_and_texts_of_one_column_are_sorted_each_by_its_kind(register, post, admin):
    names = ["b", 10, 9, "A"]
    post(register("pve1"), build_report(guests=[build_guest(100 + n, name=name) for n, name in enumerate(names)]))
    assert [row["name"] for row in items(admin.get("/api/v1/guests?sort=name"))] == [9, 10, "A", "b"]
    assert [row["name"] for row in items(admin.get("/api/v1/guests?sort=-name"))] == ["b", "A", 10, 9]


# --- alerts and events: filtered before they are cut ---


def insert_resolved(store, count: int, host_id: int | None = None) -> None:
    def work(db):
        db.executemany(
            "INSERT INTO alert (host_id, rule, object, severity, state, message, since, fired_at, resolved_at)"
            " VALUES (?, 'pool-state', 'pools/tank', 'critical', 'resolved', 'old', ?, ?, ?)",
            [(host_id, START - 9, START - 9, START - n) for n in range(count)])  # fmt: skip
    store.write(work)


def test_what_fires_comes_before_any_number_of_resolved(register, post, admin, store, monitor):
    post(register("pve1"), build_report(disks=[{"name": "sda", "passed": None}]))  # info: the least of all severities
    insert_resolved(store, server.LIST_MOST + 1, monitor.fleet.find("pve1").id)
    answer = admin.get("/api/v1/alerts?state=all&limit=1").json()
    assert (answer["items"][0]["state"], answer["total"]) == ("firing", server.LIST_MOST + 2)
    assert server.list_alerts(store.reader(), "all")[0]["state"] == "firing"


def test_the_alerts_of_one_host_are_found_behind_those_of_another(register, post, admin, store, monitor):
    register("noisy"), register("quiet")
    admin.get("/api/v1/hosts")
    insert_resolved(store, server.LIST_MOST + 1, monitor.fleet.find("noisy").id)
    insert_resolved(store, 3, monitor.fleet.find("quiet").id)
    for query, total in (("host=quiet", 3), ("host=noisy", server.LIST_MOST + 1), ("q=quiet", 3)):
        assert admin.get(f"/api/v1/alerts?state=resolved&{query}&limit=1").json()["total"] == total, query


def test_events_are_filtered_before_they_are_cut(register, admin, store):
    register("pve1", site="berlin")
    store.write(lambda db: [server.insert_event(db, START, "test", "x", host="other") for _ in range(300)])
    assert [row["kind"] for row in items(admin.get("/api/v1/events?host=pve1"))] == ["host-registered"]
    assert [row["kind"] for row in items(admin.get("/api/v1/events?site=berlin"))] == ["host-registered"]
    assert admin.get("/api/v1/events?kind=test&limit=5").json()["total"] == 300


def test_a_site_that_goes_dark_is_among_its_alerts_and_the_metrics(register, post, admin, monitor, clock):
    tokens = {name: register(name, site="berlin" if name < "b" else "paris")
              for name in ("a1", "a2", "a3", "a4", "a5", "b1")}
    for name, token in tokens.items():
        post(token, build_report(name), host=name)
    for seq in range(2, 42):
        clock.advance(10)
        post(tokens["b1"], build_report("b1", seq=seq, at=clock()), host="b1")
        monitor.store.write(lambda db: server.judge_fleet(monitor, clock(), db))
    rules = {row["rule"] for row in items(admin.get("/api/v1/alerts?site=berlin"))}
    assert "site-offline" in rules
    assert items(admin.get("/api/v1/alerts?site=paris")) == []
    assert "site-offline" not in {row["rule"] for row in items(admin.get("/api/v1/alerts?host=a1"))}
    metrics = admin.get("/metrics").text
    assert 'proxmon_shared_alerts{object="sites/berlin",severity="critical"} 1.0' in metrics


def test_an_alert_is_the_same_from_memory_and_from_the_disk(fleet, admin, store):
    alert = items(admin.get("/api/v1/alerts"))[0]
    admin.send("POST", f"/api/v1/alerts/{alert['id']}/acknowledge", {"note": "ordered"})
    told = [{**row, "at_stake": None} for row in items(admin.get("/api/v1/alerts?state=all"))]  # worked out when asked
    assert told == server.list_alerts(store.reader(), "all")


FACETS = {
    "hosts": {"reboot:yes": ["old"], "reboot:no": ["new"], "kernel:6.8": ["old"], "security>0": ["old"], "seen>1min": [],
              "seen<1h": ["new", "old"], "backup:late": ["old"], "full<30": []},
    "guests": {"backup>24h": ["bare", "stale"], "backup<24h": ["fresh"], "backup:none": [], "job:none": ["bare"],
               "backup:fresh": ["fresh"], "snapshots>30d": ["stale"], "snapshots<5w": [], "cpu>50": ["fresh"],
               "cpu>0.5": ["bare", "fresh", "stale"], "-backup:fresh": ["bare", "new1", "new2", "stale"]},
    "pools": {"scrub>30d": ["tank"], "scrub>41d": [], "used>10%": ["tank", "tank"], "state:online": ["tank", "tank"]},
    "disks": {"serial:rgx": ["sda"], "9RGX03": ["sda"], "temp>40": ["sda"]},
}  # fmt: skip


@pytest.mark.parametrize("name, query", [(name, query) for name, wanted in FACETS.items() for query in wanted])
def test_what_operators_ask_every_week_is_found(register, post, admin, name, query):
    day = 86400
    volumes = [{"storage": "tank-vm", "dataset": "tank/vm-101"}]
    jobs = [{"id": "j", "enabled": True, "schedule": "08:00", "guests": [100, 101]}]
    backups = [{"vmid": 100, "newest_ok": {"ended_at": START - 3600}}, {"vmid": 101, "newest_ok": {"ended_at": START - 2 * day}}]
    guests = [build_guest(100, name="fresh", cpu_ratio=0.9), build_guest(101, name="stale", cpu_ratio=0.01, volumes=volumes),
              build_guest(102, name="bare", cpu_ratio=0.01)]  # fmt: skip
    old = build_report("old", guests=guests, backups={"jobs": jobs, "guests": backups},
                       pools=[build_pool(last_scrub={"ended_at": START - 40 * day})],
                       updates={"pending": 9, "security": 2},
                       disks=[{"name": "sda", "serial": "9RGX03", "temperature_celsius": 44, "passed": True}],
                       snapshots=[{"dataset": "tank/vm-101", "class": "pve", "count": 1, "oldest_at": START - 40 * day}])  # fmt: skip
    old["node"] |= {"reboot_needed": True, "kernel": "6.8.12-1-pve"}
    new = build_report("new", guests=[build_guest(200, name="new1", cpu_ratio=None), build_guest(201, name="new2", cpu_ratio=None)])
    new["node"] |= {"reboot_needed": False}
    post(register("old"), old, host="old")
    post(register("new"), new, host="new")
    rows = items(admin.get(f"/api/v1/{name}?q={urllib.parse.quote(query)}"))
    assert sorted(row["name"] for row in rows) == FACETS[name][query]


def test_an_answer_is_packed_for_whoever_takes_gzip(fleet, admin):
    plain = admin.get("/api/v1/guests")
    for accepted in ("gzip", "br, gzip;q=0.5", "gzip, deflate"):
        answer = admin.get("/api/v1/guests", Accept_Encoding=accepted)
        assert answer.headers["content-encoding"] == "gzip" and answer.headers["vary"] == "Accept-Encoding"
        assert gzip.decompress(answer.body) == plain.body and answer.headers["etag"] == plain.headers["etag"]
        assert len(answer.body) < len(plain.body) / 2
    for headers in ({}, {"Accept_Encoding": "br"}, {"Accept_Encoding": "gzip;q=0"},
                    {"Accept_Encoding": "gzip", "Sec_Fetch_Site": "cross-site"}):  # fmt: skip
        assert "content-encoding" not in admin.get("/api/v1/guests", **headers).headers, headers


def test_volumes_tell_where_the_disks_of_guests_lie(register, post, admin):
    volumes = [{"storage": "tank-vm", "dataset": "tank/vm/vm-100-disk-0", "size_bytes": 5}, {"storage": "nfs"}]
    post(register("pve1"), build_report(guests=[build_guest(100, name="mail", volumes=volumes)]))
    rows = items(admin.get("/api/v1/volumes"))
    assert [(row["vmid"], row["name"], row["storage"], row["pool"], row["size_bytes"]) for row in rows] == [
        (100, "mail", "tank-vm", "tank", 5), (100, "mail", "nfs", None, None)]  # fmt: skip


# --- what the rows say ---


def test_errors_of_the_disks_are_summed_over_the_leaves(register, post, admin):
    leaves = [build_disk("sda", read_errors=1, checksum_errors=2), build_disk("sdb", checksum_errors=None)]
    vdevs = [{"name": "mirror-0", "type": "mirror", "state": "ONLINE", "checksum_errors": 99, "children": leaves}]
    post(register("pve1"), build_report(pools=[build_pool(vdevs=vdevs)]))
    row = items(admin.get("/api/v1/pools"))[0]
    assert (row["read_errors"], row["write_errors"], row["checksum_errors"]) == (1, 0, 2)


def test_a_pool_whose_state_is_not_known_is_not_green(register, post, admin):
    pool = build_pool()
    del pool["state"]
    post(register("pve1"), build_report(pools=[pool], pool_states=None))
    assert items(admin.get("/api/v1/pools"))[0]["verdict"] != "ok"


def test_a_storage_whose_state_is_not_known_is_not_green(register, post, admin):
    unknown = build_storage("nas", active=None, total_bytes=None, used_bytes=None, available_bytes=None)
    post(register("pve1"), build_report(storages=[unknown]))
    row = items(admin.get("/api/v1/storages"))[0]
    assert row["verdict"] != "ok"
    assert row["used_ratio"] is None and row["total_bytes"] is None


def test_an_inactive_storage_counts_and_a_disabled_one_does_not(register, post, admin):
    storages = [build_storage("a", active=False), build_storage("b", active=False, enabled=False)]
    post(register("pve1"), build_report(storages=storages))
    assert items(admin.get("/api/v1/hosts"))[0]["storages_inactive"] == 1


def test_a_guest_whose_state_is_not_known_is_not_green(register, post, admin):
    post(register("pve1"), build_report(guests=[build_guest(100, status="unknown"), build_guest(101, status=None)]))
    assert [row["verdict"] for row in items(admin.get("/api/v1/guests"))] == ["unknown", "unknown"]


def test_what_is_old_is_not_green(fleet, admin, clock):
    clock.advance(250)
    for name in ("guests", "storages"):
        assert {row["verdict"] for row in items(admin.get(f"/api/v1/{name}?host=pve1"))} == {"stale"}


# --- history ---


def test_history_gives_what_was_reported(register, post, admin, clock):
    token = register("pve1")
    for seq in range(1, 5):
        report = build_report(seq=seq, at=clock())
        report["node"]["cpu_ratio"] = seq / 10
        report["guests"][0]["cpu_ratio"] = seq / 20
        post(token, report)
        clock.advance(30)
    query = f"series=node.cpu_ratio&series=guests/100.cpu_ratio&from={START - 10}&to={START + 300}&step=30"
    series = admin.get(f"/api/v1/hosts/pve1/history?{query}").json()["series"]
    assert [one["name"] for one in series] == ["node.cpu_ratio", "guests/100.cpu_ratio"]
    assert [point[1] for point in series[0]["points"]] == [0.1, 0.2, 0.3, 0.4]
    assert [point[1] for point in series[1]["points"]] == [0.05, 0.1, 0.15, 0.2]
    assert [round(point[0] - START) for point in series[0]["points"]] == [0, 30, 60, 90]


def test_a_backlog_fills_history_at_its_own_times(register, post, admin, clock):
    token = register("pve1")
    post(token, build_report(seq=10, at=START))
    post(token, [build_report(seq=n, at=START - 300 + n * 30) for n in range(1, 10)])
    query = f"series=node.cpu_ratio&from={START - 400}&to={START + 1}"
    points = admin.get(f"/api/v1/hosts/pve1/history?{query}").json()["series"][0]["points"]
    assert [round(point[0] - START) for point in points] == list(range(-270, 1, 30))


@pytest.mark.parametrize("query", ["from=x", "to=nan", "from=1e400"])
def test_a_history_of_no_time_is_a_400(fleet, admin, query):
    assert admin.get(f"/api/v1/hosts/pve1/history?series=node.load1&{query}").status == 400


@pytest.mark.parametrize(
    "series", ["", "x", ".", "/", "node.", ".cpu_ratio", "guests/.x", "guests/100.name", "node.nope", "%00.x"]
)
def test_a_series_that_is_not_there_has_no_points(fleet, admin, series):
    answer = admin.get(f"/api/v1/hosts/pve1/history?series={series}")
    assert answer.status in (200, 400)
    if answer.status == 200:
        assert all(one["points"] == [] for one in answer.json()["series"])


# --- health, metrics, description ---


def test_health_needs_no_login_and_tells_the_writers_state(client, store):
    answer = client.get("/healthz")
    assert answer.status == 200
    health = answer.json()
    assert health["writer_alive"] is True and health["database_writable"] is True
    assert health["last_commit_age_seconds"] < 60


def test_health_is_503_when_nothing_can_be_written(client, store):
    with pytest.raises(server.Problem):
        store.write(lambda db: db.execute("INSERT INTO no_such_table VALUES (1)"))
    assert client.get("/healthz").status == 503
    store.write(lambda db: server.set_meta(db, "x", 1))
    assert client.get("/healthz").status == 200
    store.close()
    assert client.get("/healthz").status == 503


def test_health_is_503_when_a_job_fails_or_a_loop_has_ended(client, admin, monitor, monkeypatch):
    monitor.store.write(lambda db: None)
    monkeypatch.setattr(server, "JOBS", (server.Job("odd", 3600, lambda *_: 1 / 0, first_after=0),))
    scheduler = server.Scheduler(monitor)
    jobs = server.every(3600, "jobs", scheduler.turn, monitor.stop, first=3600)
    assert client.get("/healthz").status == 200
    jobs.turn()
    assert client.get("/healthz").status == 503
    assert admin.get("/healthz").json()["troubles"] == {"jobs": "Failure: odd: ZeroDivisionError: division by zero"}
    monkeypatch.setattr(server, "JOBS", (server.Job("odd", 3600, lambda *_: None, first_after=0),))
    scheduler._due["odd"] -= 61  # what failed comes again in a minute, not in an hour
    jobs.turn()
    assert client.get("/healthz").status == 200
    jobs._ended = True
    jobs.wake()
    jobs.thread.join(10)
    assert admin.get("/healthz").json()["troubles"] == {"jobs": "has ended"}


def test_jobs_sleep_until_the_next_is_due_and_one_may_ask_to_come_again_sooner(monitor, monkeypatch):
    ran = []
    monkeypatch.setattr(server, "JOBS", (server.Job("seldom", 3600, lambda *_: ran.append("seldom"), first_after=0),
                                         server.Job("busy", 600, lambda *_: ran.append("busy") or 7, True, 0)))
    scheduler = server.Scheduler(monitor)
    assert 6 < scheduler.turn() <= 7 and ran == ["seldom", "busy"]
    assert 6 < scheduler.turn() <= 7 and len(ran) == 2  # woken for nothing
    assert scheduler._due["seldom"] - scheduler._due["busy"] > 3590


def test_the_history_is_looked_at_again_soon_only_where_there_was_something_to_pack(monitor, monkeypatch):
    left = [True, True, False]
    monkeypatch.setattr(server.Keeper, "in_turn", lambda keeper: iter([1]))
    monkeypatch.setattr(server.Keeper, "step", lambda keeper, host_id, now: left.pop(0))
    assert server.keep_history(monitor, monitor.clock(), monitor.store.reader()) == 5 and not left
    left.append(False)
    assert server.keep_history(monitor, monitor.clock(), monitor.store.reader()) is None


def test_health_is_degraded_and_200_while_reports_are_taken_judged_and_told_of(client, admin, monitor):
    monitor.store.write(lambda db: None)
    monitor.fleet.public_url, monitor.config.heartbeat_url = "https://127.0.0.1:9", "http://127.0.0.1:9/beat"
    monitor.judged_at = time.monotonic()
    server.start_watches(monitor)
    beat = next(loop for loop in monitor.stop.loops if loop.name == "heartbeat")
    beat.wake()
    until = time.monotonic() + 10
    while beat.error is None and time.monotonic() < until:
        time.sleep(0.01)
    answer = admin.get("/healthz")
    assert (answer.status, answer.json()["status"]) == (200, "degraded")
    assert answer.json()["troubles"].keys() == {"heartbeat"} and client.get("/healthz").json()["status"] == "degraded"
    assert {loop.name for loop in monitor.stop.loops if not loop.vital} == {"certificate", "heartbeat"}


@pytest.mark.parametrize("name", ["notify", "@proxmon-test-notify"])
def test_the_watchdog_of_the_unit_is_fed_also_on_a_full_disk(monitor, monkeypatch, tmp_path, name):
    address = name if name.startswith("@") else str(tmp_path / name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + address[1:] if name.startswith("@") else address)
        systemd.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        pages = monitor.store.write(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
        monitor.store.db.execute(f"PRAGMA max_page_count = {pages}")
        monitor.store.db.execute("PRAGMA cache_size = 0")
        try:
            server.Scheduler(monitor).turn()
        except server.Failure:
            pass
        assert systemd.recv(100) == b"WATCHDOG=1"


HOSTILE = ['a"b', "a\\b", "a\nb", "a{b}", "ä ✓", "a\ud800".encode("utf-8", "replace").decode(), "\0"]


def test_metrics_pass_promtool(register, post, admin):
    promtool = find_program("promtool")
    guests = [build_guest(100 + n, name=name) for n, name in enumerate(HOSTILE)]
    pools = [build_pool(name) for name in HOSTILE]
    post(register("pve1", site='s"1'), build_report(guests=guests, pools=pools))
    text = admin.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    told = subprocess.run([promtool, "check", "metrics"], input=text.body, capture_output=True, timeout=60)
    assert (told.returncode, told.stdout, told.stderr) == (0, b"", b"")
    assert b'proxmon_guest_running{host="pve1"' in text.body


def test_a_metric_that_is_not_known_has_no_line(register, post, admin):
    post(register("pve1"), build_report(node={"name": "pve1", "cpu_ratio": None}, guests=None, pools=None))
    lines = admin.get("/metrics").text.splitlines()
    assert not [line for line in lines if line.startswith("proxmon_host_cpu_ratio{")]


def test_the_description_names_every_route(admin):
    paths = admin.get("/api/v1/openapi.json").json()["paths"]
    for one in server.ROUTES:
        if one.path.startswith("/api/"):
            path = one.path.replace("<", "{").replace(">", "}")
            assert one.method.lower() in paths[path], one
    assert "post" in paths["/api/v1/hosts/{id}/reports"]
    json.dumps(paths, allow_nan=False)



def test_the_description_has_bodies_parameters_and_the_right_status(admin):
    paths = admin.get("/api/v1/openapi.json").json()["paths"]
    history = {one["name"] for one in paths["/api/v1/hosts/{id}/history"]["get"]["parameters"]}
    assert history == {"id", "series", "from", "to", "step", "format"}
    assert "requestBody" in paths["/api/v1/silences"]["post"] and "requestBody" in paths["/api/v1/hosts/{id}"]["patch"]
    assert "201" in paths["/api/v1/tokens"]["post"]["responses"]
    assert "200" in paths["/api/v1/rules/replay"]["post"]["responses"]
