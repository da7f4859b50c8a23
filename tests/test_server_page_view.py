"""Server, section page: what is searched and in which order, how values are written, and that no text of an agent
becomes a part of the page."""

from __future__ import annotations

import html
import re
import urllib.parse
from html.parser import HTMLParser

import pytest
from conftest import START, Client, build_disk, build_guest, build_pool, build_report, build_storage

import server

EVIL = "<img src=x onerror=alert(1)>\"'&{{7*7}}\n% end"
VOID = {"meta", "link", "input", "img", "br", "hr"}


class Outline(HTMLParser):
    """The elements of a page, and whether they are closed as they were opened."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def browser(client):
    """Somebody who has logged in."""
    assert client.log_in().status == 303
    return client


@pytest.fixture
def two_hosts(register, post):
    """A host that is well, and one whose pool is not."""
    tokens = {"pve1": register("pve1", site="paris", tags=["prod"])}
    post(tokens["pve1"], build_report("pve1"))
    bad = build_pool(state="DEGRADED", capacity_ratio=0.84)
    states = [{"name": "tank", "guid": bad["guid"], "state": "DEGRADED"}]
    guests = [build_guest(300, name="mail", cpu_ratio=0.95), build_guest(301, name="web mail", status="stopped")]
    report = build_report("pve2", pools=[bad], pool_states=states, guests=guests)
    post(register("pve2", site="berlin", tags=["test"]), report, host="pve2")
    return tokens


def shown(browser, query: str) -> list[str]:
    """What the rows of the list are called, in their order."""
    page = browser.get("/?" + query)
    assert page.status == 200
    return re.findall(r'<a class="row-link"[^>]*>([^<]*)</a>', page.text)


# --- the way into Proxmox ---


@pytest.mark.parametrize("address, there", [
    ("192.0.2.11", "https://192.0.2.11:8006/"), ("2001:db8::1", "https://[2001:db8::1]:8006/"), (None, None),
    ("evil.example/", None), ("javascript:alert(1)", None)])
def test_a_card_leads_to_proxmox_where_its_address_is_known(browser, register, post, address, there):
    cluster = {"name": "lab", "quorate": True, "members": [{"name": "pve1", "online": True, "address": address}]}
    post(register("pve1"), build_report("pve1", cluster=cluster, guests=[build_guest(100)]))
    links = [re.findall(r'<a href="([^"]*)" target="_blank" rel="noreferrer">open in Proxmox', browser.get(f"/?{query}").text)
             for query in ("host=pve1", "host=pve1&guest=100", "host=pve1&storage=local")]
    assert links == [[there] if there else [], [f"{there}#v1:0:=qemu%2F100"] if there else [], []]


# --- what is new to whom ---


def test_what_has_happened_since_a_user_looked_is_told_on_any_browser(browser, register, post, clock, store):
    post(register("pve1"), build_report("pve1"))
    assert "you last looked" not in browser.get("/").text  # nobody looks for the first time at news
    looked = clock()
    clock.advance(200)
    assert "you last looked" not in browser.get("/").text
    clock.advance(600)
    store.write(lambda db: server.insert_event(db, clock() - 60, "test", "it rained", host="pve1"))
    assert re.search(">1 event since you last looked", browser.get("/").text)
    other = Client(browser.monitor)
    assert other.log_in().status == 303
    link = re.search(r'id="news"><a href="([^"]*)"', other.get("/").text)[1].replace("&amp;", "&")
    assert f"since={int(looked + 200)}" in link
    page = other.get(link).text
    assert re.findall(r'<tr class="row [^"]*is-new" data-key="events/[^"]*"', page) and "you last looked" not in page
    browser.monitor.looks.clear()  # as after a restart
    assert "since you last looked" in browser.get("/").text
    store.write(lambda db: server.insert_user(db, "eve", "viewer", server.hash_password("long enough"), clock()))
    eve = Client(browser.monitor)
    assert eve.log_in("long enough", user="eve").status == 303
    assert "you last looked" not in eve.get("/").text  # she never did


def test_the_count_of_each_question_is_that_of_what_it_finds(browser, register, post, clock):
    now, nothing = clock(), {"jobs": [], "guests": []}
    job = {"id": "j", "enabled": True, "guests": [100], "schedule": "daily", "storage": "pbs"}
    runs = [{"vmid": 100, "newest_ok": {"ended_at": now - 3 * 86400}}, {"vmid": 102, "newest_ok": {"ended_at": now - 60}}]
    post(register("pve1"), build_report("pve1", node={"kernel": "6.8.12-9-pve", "reboot_needed": True},
         updates={"pending": 3, "security": 1}, pools=[build_pool(capacity_ratio=.9, last_scrub={"ended_at": now - 9e6})],
         guests=[build_guest(number) for number in (100, 101, 102)], backups={"jobs": [job], "guests": runs},
         disks=[build_disk("sda", wear_ratio=.9, temperature_celsius=60), build_disk("sdb")]))
    post(register("pve2"), build_report("pve2", node={"kernel": "6.14.8-2-pve", "reboot_needed": False},
                                        backups=nothing), host="pve2")
    found = {}
    for tab in server.FACETS:
        page = browser.get(f"/?tab={tab}").text
        chips = re.findall(r'<a class="chip facet" href="([^"]*)"(?! data-night)[^>]*>([^<]*?)\s*<span class="chip-count">([^<]*)<', page)
        assert len(chips) == len(server.FACETS[tab]) + (tab == "hosts")
        for link, label, count in chips:
            listed = browser.get(link.replace("&amp;", "&")).text
            assert len(re.findall('<tr class="row ', listed)) == int(count), (tab, label)
            found[tab, label] = int(count)
    assert found["guests", "in no job"] == found["backups", "in no job"] >= 2 and found["hosts", "old kernel"] == 1
    assert {0} < set(found.values()), found


# --- who may see it ---


@pytest.mark.parametrize("path", ["/", "/admin/hosts", "/?host=pve1", "/?tab=guests&q=x"])
def test_without_a_session_there_is_only_the_log_in(client, path):
    answer = client.get(path)
    back = "" if path == "/" else "?next=" + urllib.parse.quote(path, safe="")
    assert (answer.status, answer.headers["location"]) == (303, "/login" + back)


def test_an_api_token_opens_no_page(admin):
    assert admin.get("/").status == 303


# --- order and search ---


def test_hosts_stand_worst_first(browser, two_hosts):
    assert shown(browser, "") == ["pve2", "pve1"]


@pytest.mark.parametrize("query, rows", [
    ("q=pve1", ["pve1"]),
    ("q=site:par", ["pve1"]),
    ("q=-site:par", ["pve2"]),
    ("q=tag:prod", ["pve1"]),
    ("q=tag:pro", []),                              # a tag as a whole
    ("q=state:crit", ["pve2"]),                     # a state from its beginning
    ("q=pool>80", ["pve2"]),
    ("q=pool>84", []),
    ("q=pool<80%25", ["pve1"]),
    ("q=full<10", []),                              # not known is neither more nor less
    ("q=site:berlin+tag:test", ["pve2"]),
    ("q=site:berlin+tag:prod", []),
    ("tab=guests&q=mail", ["mail", "web mail"]),    # over all guests of the fleet
    ('tab=guests&q="web mail"', ["web mail"]),
    ('tab=guests&q="web', ["web mail"]),            # a quote that is still being typed
    ("tab=guests&q=vmid:300", ["mail"]),
    ("tab=guests&q=vmid:30", []),                   # a vmid as a whole
    ("tab=guests&q=cpu>90", ["mail"]),
    ("tab=guests&q=site:paris+state:run", ["vm100"]),
    ("tab=pools&q=state:degraded", ["tank"]),
    ("tab=nonsense&q=pve2", ["pve2"]),
    ("sort=name", ["pve1", "pve2"]),
    ("sort=-name", ["pve2", "pve1"]),
    ("sort=pools_max_capacity_ratio", ["pve1", "pve2"]),
    ("sort=nonsense&offset=x", ["pve2", "pve1"]),
    ("offset=200", ["pve2", "pve1"]),               # past the end is the first page
])  # fmt: skip
def test_search_and_order(browser, two_hosts, query, rows):
    assert sorted(shown(browser, query)) == sorted(rows) if "guests" in query else shown(browser, query) == rows


def test_a_search_that_finds_nothing_says_where_there_is_something(browser, two_hosts):
    page = browser.get("/?q=mail&tab=hosts").text
    assert "None of the hosts matches" in page
    assert "2 guests" in page


def test_a_search_tells_its_hits_of_every_list_and_opens_the_first_that_has_some(browser, two_hosts):
    page = browser.get("/?q=mail").text
    found = re.search(r'<nav class="hits".*?</nav>', page, re.S)[0]
    assert re.findall(r">(\w+ \d+)</a>", found)[:3] == ["hosts 0", "guests 2", "pools 0"]
    assert shown(browser, "q=mail") == ["mail", "web mail"]
    assert shown(browser, "q=mail&tab=hosts") == []
    assert 'class="hits"' not in browser.get("/").text


PARTS = {
    "cluster": {"name": "lab", "quorate": True, "members": [{"name": "pve3", "online": True, "address": "192.0.2.33"}]},
    "node": {"name": "pve3", "cpu_ratio": 0.1},
    "disks": [{"name": "sdr", "by_id": "ata-INTEL_BTYF01", "model": "INTEL", "serial": "BTYF01", "kind": "ssd", "passed": True}],
    "guests": [build_guest(104, name="mail", volumes=[{"storage": "local-zfs", "dataset": "tank/data/vm-104-disk-0"}]),
               build_guest(105, name="sdr-notes")],
    "pools": [build_pool(state="DEGRADED", vdevs=[{"name": "915544332", "type": "disk", "class": "normal",
                                                   "state": "UNAVAIL", "path": "/dev/disk/by-id/scsi-35000cca2-part1"}])],
}  # fmt: skip


@pytest.mark.parametrize("words, tab, card", [
    ("vm-104-disk-0", "Volumes", "tank/data/vm-104-disk-0"), ("btyf01", "Disks", "BTYF01"),
    ("ata-INTEL", "Disks", "BTYF01"), ("sdr", "Disks", "BTYF01"), ("192.0.2.33", "Hosts", "pve3"),
    ("scsi-35000cca2", "Pools", "scsi-35000cca2"), ("tag:mailers", "Guests", "mail")])  # fmt: skip
def test_the_search_finds_by_any_name_and_the_card_is_one_click_away(browser, register, post, words, tab, card):
    parts = {**PARTS, "guests": [{**PARTS["guests"][0], "tags": ["mailers"]}, PARTS["guests"][1]]}
    assert post(register("pve3"), build_report("pve3", **parts), host="pve3").status == 200
    page = browser.get("/?" + urllib.parse.urlencode({"q": words})).text
    assert re.search(r'<h1 class="visually-hidden">(.*?)</h1>', page)[1] == tab
    link = html.unescape(re.search(r'class="row-link" href="([^"]+)"', page)[1])
    opened = browser.get(link).text
    assert card in opened[opened.index('id="drawer"') :]


def test_a_search_filters_the_problems_and_the_chips_too(browser, two_hosts):
    assert 'class="problem"' in browser.get("/?q=pve2").text
    page = browser.get("/?q=pve1").text
    assert 'class="problem"' not in page and "No problem matches the search." in page
    assert "1 critical" in page  # the posture is that of the whole fleet
    chips = re.search(r'<div class="chips".*?<details', page, re.S)[0]
    assert "critical" not in chips and ">ok <" in chips


def test_a_list_can_be_had_as_csv_as_it_is_searched_and_sorted(browser, two_hosts):
    page = browser.get("/?tab=guests&q=cpu>90&sort=-name").text
    address = re.search(r'href="(/api/v1/[^"]+)" download', page)[1].replace("&amp;", "&")
    answer = browser.get(address)
    assert answer.headers["content-type"].startswith("text/csv")
    assert [line.split(",")[3] for line in answer.text.splitlines()[1:]] == ["mail"]


def test_100_rows_are_shown_and_the_next_page_has_the_rest(browser, register, post):
    post(register("pve1"), build_report(guests=[build_guest(100 + n) for n in range(250)]))
    assert len(shown(browser, "tab=guests")) == 100
    assert len(shown(browser, "tab=guests&offset=200")) == 50


# --- what is shown ---


def test_the_posture_is_never_green_while_a_host_is_not_heard(browser, register, post, clock):
    post(register("pve1"), build_report())
    assert 'class="posture look-ok"' in browser.get("/").text
    register("pve2")
    page = browser.get("/").text
    assert 'class="posture look-stale"' in page
    assert "1 of 2 hosts reporting; no open problem." in page
    assert "Nothing needs you." not in page and "No open problem on the hosts that report." in page
    assert "Waiting for the first report of" in page


def test_the_drawer_tells_absent_error_and_no_data_apart(browser, register, post):
    errors = {"storages": {"code": "timeout", "detail": "pvesm hung"}}
    post(register("pve1"), build_report(storages=None, errors=errors))
    page = browser.get("/?host=PVE1").text
    assert 'title="timeout: pvesm hung">could not be collected: no answer in time' in page
    assert "does not apply on this host" in page
    assert re.search(r'<span class="dash" title="[^"]+">–</span>', page)


def test_a_problem_leads_to_its_pool(browser, two_hosts):
    page = browser.get("/").text
    assert 'href="/?host=pve2&amp;pool=tank"' in page
    assert 'id="pool-tank"' in browser.get("/?host=pve2&pool=tank").text


@pytest.mark.parametrize("query, said", [
    ("host=nobody", "There is no host “nobody”"), ("host=pve1&guest=9", "reports no guest “9”"),
    ("host=pve1&pool=x", "reports no pool “x”"), ("host=pve1&disk=x", "reports no disk “x”"),
    ("cluster=x", "No host reports a cluster “x”")])  # fmt: skip
def test_a_card_of_what_is_not_there_says_so(browser, two_hosts, query, said):
    page = browser.get("/?" + urllib.parse.quote(query, safe="=&"))
    assert page.status == 200
    assert said in page.text


def test_the_same_state_is_the_same_fragment_at_any_time(browser, two_hosts, clock):
    first = browser.get("/?host=pve2", X_Fragment="main")
    assert first.text.startswith("\n<main") or "<main" in first.text[:200]
    assert "<html" not in first.text
    clock.advance(7)
    assert browser.get("/?host=pve2", X_Fragment="main").body == first.body
    assert browser.get("/?host=pve2", X_Fragment="main", If_None_Match=first.headers["etag"]).status == 304


def test_a_poll_brings_only_the_rows_that_have_changed(browser, two_hosts, post, clock):
    first = browser.get("/", X_Fragment="main")
    tag = first.headers["etag"]
    assert browser.get("/", X_Fragment="main", X_Base=tag, If_None_Match=tag).status == 304
    token = two_hosts["pve1"]
    post(token, build_report("pve1", seq=9, at=clock(), node={"name": "pve1", "cpu_ratio": 0.777}), host="pve1")
    second = browser.get("/", X_Fragment="main", X_Base=tag)
    assert '<tr data-key="hosts/pve2" data-same></tr>' in second.text and "78%" in second.text
    assert len(second.body) < len(first.body)
    whole = browser.get("/", X_Fragment="main", X_Base="W/unknown")
    assert "data-same" not in whole.text and whole.headers["etag"] == second.headers["etag"]
    third = browser.get("/", X_Fragment="main", X_Base=second.headers["etag"])
    assert re.search(r'<li data-key="problem-\d+" data-same></li>', third.text)
    assert third.text.count("data-same") >= 3 and third.headers["etag"] == second.headers["etag"]


def test_what_one_reader_has_is_not_left_out_for_another(browser, two_hosts):
    tag = browser.get("/?tab=guests", X_Fragment="main").headers["etag"]
    assert "data-same" not in browser.get("/?tab=pools", X_Fragment="main").text
    text = browser.get("/?tab=pools", X_Fragment="main", X_Base=tag).text
    assert '<tr class="row' in text and "data-same" not in text  # its links lead back to another list


def test_the_fragments_that_are_remembered_are_few(browser, two_hosts, monitor):
    for number in range(server.FRAGMENTS_KEPT + 20):
        browser.get(f"/?q={number}", X_Fragment="main")
    assert len(monitor.fragments) <= server.FRAGMENTS_KEPT


def test_without_hosts_the_page_says_how_to_begin(browser):
    page = browser.get("/").text
    assert "proxmox-monitor-server register-host" in page
    assert "/install/install.sh" in page


def test_the_page_carries_its_csrf_token(browser):
    assert f'<meta name="csrf-token" content="{browser.headers["X-CSRF-Token"]}">' in browser.get("/").text


# --- hostile input ---


def hostile_report() -> dict:
    leaf = build_disk(EVIL, path=EVIL, disk=EVIL, reason=EVIL, state=EVIL, **{"class": EVIL})
    pool = build_pool(EVIL, layout=EVIL, state=EVIL, status_text=EVIL, damaged_files=[EVIL], vdevs=[leaf])
    named = {"name": EVIL, "id": EVIL, "file": EVIL, "dataset": EVIL, "class": EVIL, "unit": EVIL, "upid": EVIL}
    return build_report(
        guests=[build_guest(7, name=EVIL, status=EVIL, tags=[EVIL], lock=EVIL, type=EVIL, ha_state=EVIL)],
        storages=[build_storage(EVIL, type=EVIL, content=EVIL, dataset=EVIL)],
        pools=[pool], pool_states=[{"name": EVIL, "guid": EVIL, "state": EVIL}], absent=[EVIL],
        errors={"ha": {"code": EVIL, "detail": EVIL}}, disks=[{**named, "model": EVIL, "serial": EVIL, "pool": EVIL}],
        cluster={"name": EVIL, "members": [{**named, "address": EVIL}]}, replication=[{**named, "error": EVIL}],
        datasets=[{**named, "encryption": EVIL}], snapshots=[named], certificates=[{**named, "subject": EVIL}],
        tasks=[{**named, "type": EVIL, "user": EVIL, "status": EVIL, "result": EVIL}], ceph={"health": EVIL},
        backups={"jobs": [named], "guests": [{"vmid": 7, "newest_failed": {"ended_at": START, "error": EVIL}}]},
    )  # fmt: skip


@pytest.mark.parametrize("query", ["", "?host=pve1", "?tab=guests", "?tab=pools", "?tab=storages", "?tab=alerts"])
def test_nothing_an_agent_sends_becomes_markup(browser, register, post, query):
    answer = post(register("pve1", site=EVIL[:60], tags=[EVIL[:60]]), hostile_report())
    assert answer.status == 200, answer.body
    page = browser.get("/" + query)
    assert page.status == 200
    outline = Outline(page.text)
    assert not [tag for tag, _ in outline.tags if tag == "img"]
    for _, attributes in outline.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert not (attributes.get("href") or "").lower().startswith("javascript:")


@pytest.mark.parametrize("path", ["/?q=%22%3E%3Cimg+src=x%3E", "/?q=%FF%00", "/?host=%3Cimg%3E&pool=%3Cimg%3E",
                                  "/?sort=%3Cimg%3E", "/?offset=-1", "/?offset=%D9%A3", "/?tab=%3Cimg%3E&tab=x"])
def test_nothing_in_an_address_becomes_markup(browser, two_hosts, path):
    page = browser.get(path)
    assert page.status == 200
    assert not [tag for tag, _ in Outline(page.text).tags if tag == "img"]


SECTIONS = ("node", "cluster", "disks", "backups", "replication", "ha", "datasets", "snapshots", "services", "ceph",
            "time_sync", "updates", "certificates", "subscription", "versions", "tasks", "pools", "guests", "storages")
BODIES = (None, "text", 5, True, [], {}, [None], [5], [[]], [{}], {"services": 5}, {"jobs": 5, "guests": [5]},
          {"members": {}}, [{"name": "x", "vdevs": 5}], [{"name": "x", "vdevs": [5, {"children": {}}]}],
          [{"vmid": 5, "newest_ok": 5}], {"packages": [None, {}]}, {"lrm": 5, "services": [5]},
          {"temperatures": [{"celsius": 50}, 5], "kernel": {}, "load1": None})


def test_a_section_of_any_shape_that_is_accepted_can_be_shown(browser, register, post):
    token, seq, accepted = register("pve1"), 0, 0
    for section in SECTIONS:
        for body in BODIES:
            seq += 1
            if post(token, build_report(seq=seq, **{section: body})).status == 200:
                accepted += 1
                page = browser.get("/?host=pve1")
                assert page.status == 200, (section, body)
    assert accepted > len(SECTIONS)


# --- how values are written ---


@pytest.mark.parametrize("write, value, text", [
    (server.show_bytes, None, "–"), (server.show_bytes, 0, "0 B"), (server.show_bytes, 1023, "1023 B"),
    (server.show_bytes, 1024, "1.0 KiB"), (server.show_bytes, 123456789, "118 MiB"), (server.show_bytes, "7", "–"),
    (server.show_bytes, 5e12, "4.5 TiB"), (server.show_bytes, 1e300, "–"), (server.show_bytes, True, "–"),
    (server.show_ratio, None, "–"), (server.show_ratio, 0, "0%"), (server.show_ratio, 0.001, "<1%"),
    (server.show_ratio, 0.834, "83%"), (server.show_ratio, 0.996, "99.6%"), (server.show_ratio, 1, "100%"),
    (server.show_number, None, "–"), (server.show_number, 12345, "12,345"), (server.show_number, 0, "0"),
    (server.show_duration, None, "–"), (server.show_duration, 41, "41 s"), (server.show_duration, -5, "0 s"),
    (server.show_time, START, "2027-01-15 08:00:00 UTC"), (server.show_time, -1, "–"),
])  # fmt: skip
def test_how_values_are_written(write, value, text):
    assert write(value) == text


def test_ages_and_times_to_come():
    assert server.show_age(START - 41, START) == "41 s"
    assert server.show_age(START + 3 * 86400, START) == "in 3 d"
    assert server.show_age(None, START) == "–"


def test_a_sparkline_is_broken_where_a_value_is_unknown():
    assert len(server.spark_points([0.1, 0.2, None, 0.3, 0.4])) == 2
    assert server.spark_points([None]) == server.spark_points([]) == []


def test_causes_fold_what_follows_from_them_and_a_circle_hides_nothing(monitor, client):
    def alert(number, cause):
        return {"id": number, "because_of": cause, "host": "pve1", "object": None, "severity": "warning", "since": 1}
    call = server.Call(monitor, {"QUERY_STRING": ""}, {})
    alerts = [alert(1, None), alert(2, 1), alert(3, 2), alert(4, 99), alert(5, 6), alert(6, 5)]
    tops = server.group_problems(call, alerts, 50)
    children = [child["id"] for top in tops for child in top["children"]]
    assert sorted([top["id"] for top in tops] + children) == [1, 2, 3, 4, 5, 6]
    assert next(top for top in tops if top["id"] == 1)["children"][1]["id"] == 3


def test_many_of_one_host_and_rule_are_one_line_that_stands_for_all(monitor, client):
    def alert(number, rule, host="pve1", acknowledged=None):
        return {"id": number, "because_of": None, "host": host, "object": f"guests/{number}", "severity": "warning",
                "rule": rule, "acknowledged": acknowledged}  # fmt: skip
    call = server.Call(monitor, {"QUERY_STRING": ""}, {})
    alerts = [alert(1, "backup-age"), alert(2, "guest-down"), alert(3, "backup-age"), alert(4, "backup-age"),
              alert(5, "backup-age", host="pve2"), alert(6, "backup-age", acknowledged={"at": 1})]  # fmt: skip
    tops = server.group_problems(call, alerts, 50)
    assert [top["alike"] for top in tops] == [[2], [1, 3, 4], [5], [6]]  # a guest that is down comes first
    assert [child["id"] for child in tops[1]["children"]] == [3, 4]


def alert(number, rule, host="pve1", object=None, severity="warning", message=""):
    return {"id": number, "because_of": None, "host": host, "object": object, "severity": severity, "rule": rule,
            "acknowledged": None, "message": message, "since": 1000.0 - number}  # fmt: skip


def problems_of(monitor, *alerts):
    return server.group_problems(server.Call(monitor, {"QUERY_STRING": ""}, {}), alerts, 50)


def test_one_dying_disk_is_one_line_with_its_pool_what_hangs_on_it_and_what_to_type(monitor, register, post):
    disk = {"name": "sda", "model": "X", "serial": "S1", "kind": "hdd", "passed": False}
    guest = build_guest(104, volumes=[{"dataset": "tank/vm-104-disk-0", "storage": "local-zfs"}])
    post(register("pve1"), build_report(disks=[disk], guests=[guest], pools=[build_pool(vdevs=[{
        "name": "mirror-0", "type": "mirror", "class": "normal", "state": "ONLINE",
        "children": [build_disk("ata-X_S1", disk="sda"), build_disk("ata-X_S2", disk="sdb")]}])]))
    tops = problems_of(monitor, alert(1, "smart-failed", object="disks/sda"), alert(2, "vdev-errors", object="pools/tank/ata-X_S1"),
                       alert(3, "smart-growth", object="disks/sda"), alert(4, "cpu"))
    assert [top["alike"] for top in tops] == [[1, 2, 3], [4]]
    assert "1 guest on tank" in tops[0]["hit"] and tops[0]["means"] == "Redundancy is gone."
    assert tops[0]["commands"] == ["smartctl -a /dev/sda", "zpool replace tank ata-X_S1 /dev/disk/by-id/NEW"]


def test_one_cause_on_many_hosts_is_one_line_and_on_few_it_is_not(monitor):
    tops = problems_of(monitor, *[alert(number, "certificate", host=f"pve{number}") for number in range(1, 6)])
    assert [(top["fold"], top["hosts"], len(top["alike"])) for top in tops] == [("fleet", 5, 5)]
    assert len(problems_of(monitor, *[alert(number, "certificate", host=f"pve{number}") for number in range(1, 5)])) == 4


def test_the_worst_consequence_stands_first(monitor):
    rules = [("cpu", ""), ("backup-overdue", ""), ("guest-down", ""), ("pool-margin", ""), ("pool-state", "Pool a is DEGRADED"),
             ("pool-state", "Pool b is SUSPENDED"), ("pool-data-errors", "")]  # fmt: skip
    alerts = [alert(number, rule, severity="critical", object=f"x/{number}", message=text)
              for number, (rule, text) in enumerate(rules)]
    first = [top["id"] for top in problems_of(monitor, *alerts, alert(9, "pool-data-errors", object="x/9"))]
    assert first == [5, 6, 3, 4, 2, 1, 0, 9]


def test_a_hostile_name_becomes_no_command(monitor, register, post):
    post(register("pve1"), build_report())
    told = problems_of(monitor, alert(1, "pool-state", object="pools/a;reboot"), alert(2, "guest-down", object="guests/\u202e"))
    assert {command for top in told for command in top["commands"]} == {"zpool status -v 'a;reboot'"}


@pytest.mark.parametrize("words", [words for asked in server.FACETS.values() for _, words, _ in asked])
def test_each_question_of_every_week_is_answered_in_whatever_list_it_is_put(browser, two_hosts, words):
    for tab in server.TABS:
        assert browser.get(f"/?tab={tab}&q={urllib.parse.quote(words)}").status == 200, tab


def test_words_that_mean_nothing_are_said(browser, two_hosts):
    assert "“wearr&gt;5” is no filter here" in browser.get("/?tab=guests&q=wearr%3E5").text
    assert "guests have no “wear”" in browser.get("/?tab=guests&q=wear%3E5").text
    assert "is no filter here" not in browser.get("/?tab=guests&q=cpu%3E5%20web").text


def test_the_picture_of_the_fleet_has_every_host_with_its_word(browser, register, post, two_hosts):
    page = browser.get("/").text
    assert re.search(r'class="tile look-\w+ full-\d+"[^>]*title="pve1: \w+, fullest pool \d+%"', page)
    assert page.index('class="tabs"') < page.index('class="problems"') < page.index('class="tiles"')


def test_what_is_only_worth_knowing_is_no_problem(browser, register, post):
    post(register("pve1"), build_report("pve1", disks=[{"name": "sda", "model": "X", "serial": "1", "kind": "hdd"}]))
    assert "reports nothing about its health" in browser.get("/?tab=alerts").text
    assert "Nothing needs you" in browser.get("/").text
