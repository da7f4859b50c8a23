"""Server, section page: what the page shows, escapes and leaves out. (How it behaves in a browser: test_browser.py.)"""

from __future__ import annotations

import copy
import re
import time
from html.parser import HTMLParser

import pytest
from conftest import ROOT, Client, build_disk, build_guest, build_pool, build_report, build_storage
from fuzz import report_of
from recorded import HOSTS

import server

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'><b>&amp;"


@pytest.fixture
def page(client: Client):
    """page("/?tab=guests") -> the document, as somebody who is logged in."""
    client.log_in()

    def page(path: str = "/") -> str:
        answer = client.get(path)
        assert answer.status == 200, answer.text
        assert answer.headers["content-type"].startswith("text/html")
        return answer.text

    return page


class Tags(HTMLParser):
    """Every element of a document with its attributes."""

    def __init__(self, document: str):
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


# --- who sees it ---


def test_without_a_session_the_page_leads_to_the_log_in(client):
    for path in ("/", "/admin/hosts", "/?host=pve1"):
        answer = client.get(path)
        assert answer.status == 303 and answer.headers["location"].startswith("/login")


def test_the_log_in_form_posts_a_password(client):
    tags = Tags(client.get("/login").text).found
    form = next(attrs for tag, attrs in tags if tag == "form")
    assert (form.get("method") or "").lower() == "post" and form.get("action") in ("/login", None, "")
    assert any(
        tag == "input" and attrs.get("name") == "password" and attrs.get("type") == "password" for tag, attrs in tags
    )


def test_the_page_carries_its_token_where_scripts_find_it(page, client):
    meta = next(attrs for tag, attrs in Tags(page()).found if tag == "meta" and attrs.get("name") == "csrf-token")
    assert meta["content"] == client.headers["X-CSRF-Token"]


# --- what it shows ---


def test_an_empty_fleet_says_what_to_do(page):
    assert "No host is registered yet" in page()


def test_the_page_shows_what_is_wrong(page, register, post):
    pools = [build_pool(state="DEGRADED", vdevs=[build_disk("sdq", state="FAULTED", checksum_errors=7)])]
    post(
        register("pve-a"),
        build_report("pve-a", pools=pools, pool_states=[{"name": "tank", "guid": "1", "state": "DEGRADED"}]),
        host="pve-a",
    )
    document = page()
    for word in ("pve-a", "tank", "DEGRADED", "1 critical"):
        assert word in document


def test_every_tab_shows_its_rows(page, register, post):
    post(register("pve1"), build_report(storages=[build_storage("nas-7")], guests=[build_guest(104, name="mail")]))
    for tab, word in (("hosts", "pve1"), ("guests", "mail"), ("pools", "tank"), ("storages", "nas-7"), ("alerts", "")):
        assert word in page(f"/?tab={tab}")


def test_the_drill_down_shows_pool_vdev_and_disk(page, register, post):
    post(register("pve1"), build_report())
    document = page("/?host=pve1")
    for word in ("tank", "mirror-0", "sda", "sdb", "vm100", "tank-vm"):
        assert word in document


def test_the_search_looks_at_all_guests_of_the_fleet(page, register, post):
    for number in (1, 2):
        guests = [build_guest(100 + number, name=f"shop-{number}")]
        post(register(f"pve{number}"), build_report(f"pve{number}", guests=guests), host=f"pve{number}")
    document = page("/?tab=guests&q=shop-2")
    assert "shop-2" in document and "shop-1" not in document


@pytest.mark.parametrize("tab, word", [("disks", "SN-7"), ("backups", "nightstore"), ("volumes", "tank/vm/vm-104-disk-0"),
                                       ("events", "Host pve1 registered")])  # fmt: skip
def test_disks_backups_volumes_and_events_have_lists(page, register, post, tab, word):
    volumes = [{"storage": "tank-vm", "dataset": "tank/vm/vm-104-disk-0", "size_bytes": 1 << 30}]
    backups = {"jobs": [], "guests": [{"vmid": 104, "newest_ok": {"ended_at": 1_799_990_000, "storage": "nightstore"}}]}
    post(register("pve1"), build_report(guests=[build_guest(104, name="mail", volumes=volumes)], backups=backups,
                                        disks=[{"name": "sdq", "serial": "SN-7", "passed": True}]))  # fmt: skip
    assert word in page(f"/?tab={tab}")
    assert word in page(f"/?tab={tab}&q=host:pve1") or tab == "events"
    assert word not in page(f"/?tab={tab}&q=-pve1")


def test_a_search_among_problems_may_find_what_is_no_host(page, register, post):
    post(register("pve1"), build_report())
    assert "Picture of the fleet" in page("/?tab=problems&q=vm100")
    assert "Picture of the fleet" in page("/?tab=problems&q=nothing-of-this-name")


def test_each_list_has_a_cell_for_each_head(page, register, post):
    post(register("pve1"), report_of(HOSTS / "pve8-mirror") | {"pool_states": [{"name": "tank", "state": "FAULTED"}]})
    filled = set()
    for tab, resource in server.RESOURCES.items():
        document = page(f"/?tab={tab}") if resource.heads else ""
        row = re.search(r"<tbody>.*?<tr.*?</tr>", document, re.S)
        if row:
            filled.add(tab)
            assert row[0].count("<td") == document.count('<th scope="col"') == len(resource.heads), tab
            labels = re.findall(r'data-label="([^"]*)"', row[0])
            assert set(labels) <= {head[0] for head in resource.heads}, tab
    assert filled >= {"hosts", "guests", "pools", "storages", "disks", "alerts", "backups"}


def test_a_host_whose_rows_cannot_be_made_is_named_above_the_list(page, register, post, monkeypatch):
    monkeypatch.setattr(server, "backup_rows", lambda *_: iter([{}["what nobody has thought of"]]))
    jobs = [{"id": "nightly", "enabled": True, "schedule": "02:00", "guests": "all"}]
    post(register("odd"), build_report("odd", backups={"jobs": jobs, "guests": []}), host="odd")
    assert "the backups of odd" in page("/?tab=backups")
    page("/?host=odd")


def test_the_colours_of_bars_move_with_the_thresholds_of_the_rules(page, register, post, monitor):
    post(register("pve1"), build_report(pools=[build_pool(capacity_ratio=0.6)]))

    def level(tab: str) -> str:
        return re.search(r'data-label="(?:Capacity|Pools)".*?meter level-(\w+)', page(f"/?tab={tab}"), re.S)[1]

    assert (level("pools"), level("hosts")) == ("plain", "plain")
    monitor.fleet.layers = server.Layers({"rules": {"pool-capacity": {"warn": 0.5}}})
    assert (level("pools"), level("hosts")) == ("warning", "warning")
    monitor.fleet.layers = server.Layers({"objects": {"pools/tank": {"rules": {"pool-capacity": {"crit": 0.55}}}}})
    assert level("pools") == "critical"
    monitor.fleet.layers = server.Layers({"rules": {"pool-capacity": {"warn": 0.5, "enabled": False}}})
    assert level("pools") == "plain"


def test_no_threshold_and_no_endless_line_is_in_a_template():
    for path in (ROOT / "templates").glob("*.html"):
        text = path.read_text()
        if path.name != "symbols.html":
            assert max(map(len, text.splitlines())) <= 160, path
        assert not re.findall(r"[<>]=? *0?\.\d", text), path
        for line, after in zip(text.splitlines(), text.splitlines()[1:]):  # only before a line of code it joins lines
            assert not line.endswith("\\\\") or after.lstrip().startswith("%"), (path, line)


def test_looking_changes_nothing(page, admin, register, post, monitor, clock):
    backups = {"jobs": [{"id": "nightly", "enabled": True, "schedule": "02:00", "guests": "all"}], "guests": []}
    post(register("pve1"), build_report(backups=backups))
    state = monitor.fleet.find("pve1")
    state.memory, state.coverage = server.Memory(), None  # as before the first judging after a start
    before = copy.deepcopy(state.memory.rules), dict(state.alerts)
    clock.advance(20 * 60)
    for path in ("/", "/?tab=guests", "/?tab=backups", "/?host=pve1", "/admin/hosts"):
        page(path)
    for path in ("hosts", "guests", "backups", "alerts?state=all", "hosts/pve1"):
        assert admin.get(f"/api/v1/{path}").status == 200
    assert (state.memory.rules, state.alerts, state.memory.changed, state.coverage) == (*before, False, None)


def test_a_mirror_with_a_dying_half_is_not_green_and_says_why(page, admin, register, post):
    disks = [{"name": "sda", "passed": False}, {"name": "sdb", "passed": True}]
    leaves = [build_disk(name, disk=name) for name in ("sda", "sdb")]
    vdevs = [{"name": "mirror-0", "type": "mirror", "state": "ONLINE", "children": leaves}]
    post(register("pve1"), build_report(pools=[build_pool(vdevs=vdevs, redundancy_margin=1)], disks=disks))
    row = admin.get("/api/v1/pools").json()["items"][0]
    assert (row["redundancy_margin"], row["margin_with_suspects"], row["suspects"]) == (1, 0, ["sda"])
    assert row["verdict"] == "warning" and row["reason"] == "sda may fail next: in effect no more disk may fail."
    assert "in effect 0" in page("/?tab=pools") and "in effect 0" in page("/?host=pve1")
    assert "tank" in page("/?tab=pools&q=margin<1") and "#pool-tank" not in page("/?tab=pools&q=margin>0")


def test_what_is_on_its_way_to_an_alert_is_seen(page, admin, register, post, clock):
    token = register("pve1")
    for seq in range(1, 4):
        post(token, build_report(seq=seq, at=clock(), pools=[build_pool(capacity_ratio=0.85)]))
        clock.advance(150)
    watching = admin.get("/api/v1/hosts").json()["items"][0]["watching"]
    assert re.fullmatch(r"Pool tank is 85% full.*\((5|7) of 15 min\)", watching), watching
    assert "watching: Pool tank" in page("/?q=pve1") or "stale" in page("/?q=pve1")
    assert 'id="watching"' in page("/?host=pve1") and "Pool tank is 85% full" in page("/?tab=alerts")


BACKUP_NOW = 1_800_000_000.0  # START: Friday 08:00 UTC


@pytest.mark.parametrize("jobs, newest, word, verdict", [
    ([{"id": "j", "enabled": True, "schedule": "02:00", "guests": "all"}], 3600 * 6 - 60, "fresh", "ok"),
    ([{"id": "j", "enabled": True, "schedule": "07:00", "guests": "all"}], 86400 + 600, "due", "ok"),
    ([{"id": "j", "enabled": True, "schedule": "00:30", "guests": "all"}], 86400 * 3, "late", "critical"),
    ([{"id": "j", "enabled": True, "schedule": "02:00", "guests": "all"}], None, "none yet", "unknown"),
    ([{"id": "j", "enabled": True, "schedule": "02:00", "guests": [999]}], None, "in no job", "unknown"),
    ([{"id": "j", "enabled": True, "schedule": "02:00", "guests": [999]}], 600, "in no job", "unknown"),
])  # fmt: skip
def test_five_words_tell_how_a_guests_backup_stands(page, admin, register, post, monkeypatch, jobs, newest, word, verdict):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    told = [] if newest is None else [{"vmid": 100, "newest_ok": {"ended_at": BACKUP_NOW - newest, "storage": "pbs"}}]
    post(register("pve1"), build_report(guests=[build_guest(100, name="mail")], backups={"jobs": jobs, "guests": told}))
    row = admin.get("/api/v1/backups").json()["items"][0]
    assert (row["state"], row["verdict"]) == (word, verdict)
    guest = admin.get("/api/v1/guests").json()["items"][0]
    assert guest["backup"] == word and guest["job"] == ("none" if word == "in no job" else "yes")
    host = admin.get("/api/v1/hosts").json()["items"][0]["backups_state"]
    assert host == ("fresh" if word == "fresh" else f"1 {word}")
    assert "on time" not in page("/")
    if verdict == "unknown":
        assert row["reason"] in ("It is in no backup job.", "It is in no backup job; its newest backup is 10 min old.",
                                 "It has no backup yet.")
    assert (guest["verdict"] == "ok") == (word in ("fresh", "due")) and (verdict == "critical" or guest["verdict"] == verdict)
    copied = admin.get("/api/v1/copies").json()["items"][0]
    assert copied["verdict"] != "ok" or word in ("fresh", "due", "late", "none yet")


@pytest.mark.parametrize("due, reason", [
    (18 * 3600, "It has no backup yet (first run due in 18 h)."),
    (-1800, "It has no backup yet (the first run was due 30 min ago)."),
])  # fmt: skip
def test_a_guest_that_was_never_backed_up_says_when_its_first_run_is_due(admin, register, post, clock, due, reason):
    job = {"id": "j", "enabled": True, "schedule": "sat 22:00", "guests": "all", "next_run_at": BACKUP_NOW + max(due, 86400)}
    if due > 0:
        job["next_run_at"] = BACKUP_NOW + due
    guest = build_guest(100, name="mail", created_at=BACKUP_NOW - 7200)
    job["due_times"] = [BACKUP_NOW + due] if due < 0 else []
    post(register("pve1"), build_report(guests=[guest], backups={"jobs": [job], "guests": []}))
    for path in ("/api/v1/backups", "/api/v1/guests"):
        row = admin.get(path).json()["items"][0]
        assert (row["verdict"], row["reason"]) == ("unknown", reason)


def test_an_override_of_direction_in_a_name_is_shown_as_a_mark(page, register, post):
    post(register("pve1"), build_report(guests=[build_guest(104, name="\u202egnp.exe")]))
    assert "\u202e" not in page("/?tab=guests") and "\ufffdgnp.exe" in page("/?tab=guests")


def test_host_administration_has_what_it_needs(page, register):
    register("pve1")
    document = page("/admin/hosts")
    assert "pve1" in document
    for word in ("Register", "Rotate", "Remove", 'name="name" value="pve1"'):
        assert word in document, word


def test_what_is_not_known_is_a_dash_and_not_zero(page, register, post):
    node = {"name": "pve1"}
    post(register("pve1"), build_report(node=node, guests=None, pools=None, pool_states=None, storages=None))
    row = next(part for part in page().split("<tr")[1:] if "pve1" in part and "<td" in part)
    assert "–" in row
    assert not re.search(r">\s*0\s*%?\s*<", row)


def test_a_host_without_a_report_is_not_green(page, register):
    register("pve1")
    document = page()
    assert "1 host registered, not reporting yet." in document and "Nothing needs you." not in document
    assert "No report has come yet" in document


# --- what others send ---


def hostile_report() -> dict:
    pool = build_pool(EVIL, vdevs=[build_disk(EVIL, state=EVIL, path=EVIL, reason=EVIL)], status_text=EVIL, layout=EVIL)
    report = build_report(
        guests=[build_guest(100, name=EVIL, tags=EVIL, status=EVIL, lock=EVIL)],
        storages=[build_storage(EVIL, type=EVIL, content=EVIL, dataset=EVIL, active=False)],
        pools=[pool, build_pool("second", state=EVIL)],
        pool_states=[{"name": EVIL, "guid": EVIL, "state": EVIL}],
        errors={EVIL: {"code": EVIL, "detail": EVIL}, "datasets": {"code": EVIL, "detail": EVIL}},
        absent=[EVIL],
    )
    report["node"].update(pve_version=EVIL, kernel=EVIL)
    report["agent"]["version"] = EVIL
    return report


PAGES = ("/", "/?tab=guests", "/?tab=pools", "/?tab=storages", "/?tab=alerts", "/?host=pve1", "/admin/hosts",
         "/?q=%3Cscript%3E&tab=guests", "/?host=%3Cscript%3E", "/?sort=%22%3E%3Cscript%3E")  # fmt: skip


@pytest.mark.parametrize("path", PAGES)
def test_whatever_an_agent_sends_stays_text(page, register, post, path):
    assert post(register("pve1", site=EVIL, tags=[EVIL]), hostile_report()).status == 200
    document = page(path)
    for tag, attrs in Tags(document).found:
        assert tag not in ("img", "b", "iframe", "object", "embed")
        if tag == "script":
            assert (attrs.get("src") or "").startswith("/static/")
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, attrs)
            assert name != "style", (tag, attrs)
            assert not (value or "").lower().lstrip().startswith("javascript:")


@pytest.mark.parametrize("path", PAGES)
def test_no_value_breaks_the_page(page, register, post, path):
    odd = {"state": None, "layout": None, "vdevs": None, "scan": None, "last_scrub": 7, "capacity_ratio": None}
    report = build_report(
        guests=[{"vmid": 1}, {"vmid": 2, "name": None, "tags": [1], "type": 7}],
        storages=[{"storage": "a"}, {"storage": "b", "active": "maybe", "content": 7}],
        pools=[{"name": "a"}, build_pool("b", **odd), build_pool("c", vdevs=[{}, 7, {"children": [None]}], scan=[1])],
        pool_states=[{"name": "z"}],
        node={},
        cluster={"members": 7},
    )
    assert post(register("pve1"), report).status == 200
    page(path)


@pytest.mark.parametrize(
    "path", ["/?tab=nope", "/?offset=-1", "/?offset=99999999999", "/?host=nobody", "/?sort=nope", "/?q=" + "x" * 9000]
)
def test_no_query_breaks_the_page(page, register, path):
    register("pve1")
    page(path)


def test_the_page_names_no_other_origin(page, register, post, client):
    post(register("pve1"), build_report())
    for path in ("/", "/?host=pve1", "/admin/hosts", "/login"):
        for tag, attrs in Tags(client.get(path).text).found:
            for name in ("src", "href", "action"):
                if tag != "a" and attrs.get(name):
                    assert not re.match(r"(https?:)?//", attrs[name] or ""), (path, tag, attrs)


def test_what_scrolls_sideways_can_be_scrolled_by_keyboard():
    for path in (ROOT / "templates").glob("*.html"):
        for region in re.findall(r'<div class="scroll"[^>]*>', path.read_text()):
            assert 'tabindex="0"' in region and "aria-label" in region, path
