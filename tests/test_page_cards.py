"""The cards in a real headless Chromium: a host, a guest, a pool, a disk, a cluster, each by its own address."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from conftest import LiveServer, build_disk, build_guest, build_pool, build_report, build_storage
from playwright.sync_api import Page, expect
from test_page import Fleet, chromium, open_page  # noqa: F401

HOSTILE = "\u202egnp.exe <img src=x onerror=alert(1)> " + "w" * 160
SUSPECT = {"name": "sdb", "by_id": "/dev/disk/by-id/ata-WDC_WD40-SER2", "model": "WDC WD40", "serial": "SER2",
           "size_bytes": 4 << 40, "kind": "hdd", "passed": False, "bay": "7", "power_on_hours": 40000}
GOOD = {"name": "sda", "by_id": "/dev/disk/by-id/ata-WDC_WD40-SER1", "model": "WDC WD40", "serial": "SER1",
        "size_bytes": 4 << 40, "kind": "hdd", "passed": True}
LOST = {"name": "9155443322110099887", "type": "disk", "class": "normal", "state": "UNAVAIL",
        "path": "/dev/disk/by-id/ata-GONE-part1", "read_errors": 0, "write_errors": 0, "checksum_errors": 0}


def mirror(name: str, *children: dict, state="ONLINE") -> dict:
    return {"name": name, "type": "mirror", "class": "normal", "state": state, "read_errors": 0, "write_errors": 0,
            "checksum_errors": 0, "children": list(children)}


def sections() -> dict:
    """A host whose parts hang together: guest → volume → dataset → pool → disks."""
    now = time.time()
    pool = build_pool(state="DEGRADED", vdevs=[
        mirror("mirror-0", build_disk("sda", disk="sda"), build_disk("sdb", disk="sdb")),
        mirror("mirror-1", build_disk("sdc", disk="sdc"), LOST, state="DEGRADED")])
    return {
        "pools": [pool], "pool_states": [{"name": "tank", "guid": pool["guid"], "state": "DEGRADED"}],
        "disks": [GOOD, SUSPECT, {**GOOD, "name": "sdc", "serial": "SER3", "by_id": None, "model": HOSTILE}],
        "storages": [build_storage("local-zfs", type="zfspool", dataset="tank", shared=True), build_storage("pbs", active=False)],
        "guests": [build_guest(104, name="mail", tags=["prod"],
                               volumes=[{"storage": "local-zfs", "dataset": "tank/vm-104-disk-0",
                                         "size_bytes": 1 << 35}]),
                   build_guest(105, name=HOSTILE)],
        "datasets": [{"name": "tank/vm-104-disk-0", "type": "volume", "used_bytes": 3 << 30,
                      "used_by_snapshots_bytes": 1 << 30, "available_bytes": 1 << 40, "vmid": 104}],
        "snapshots": [{"dataset": "tank/vm-104-disk-0", "class": "pve", "count": 3, "newest_at": now - 3600,
                       "oldest_at": now - 90 * 86400}],
        "backups": {"jobs": [{"id": "nightly", "enabled": True, "schedule": "21:00", "storage": "pbs",
                              "guests": [104]}],
                    "guests": [{"vmid": 104, "newest_ok": {"ended_at": now - 7200, "duration_seconds": 60,
                                                           "size_bytes": 5 << 30, "storage": "pbs",
                                                           "excluded_disks": ["scsi1"]}}]},
        "replication": [{"id": "104-0", "vmid": 104, "target": "pve2", "schedule": "*/15", "enabled": True,
                         "last_sync_at": now - 600, "fail_count": 0}],
        "tasks": [{"upid": "UPID:1", "type": "vzdump", "vmid": 104, "user": "root@pam", "started_at": now - 7300,
                   "ended_at": now - 7200, "status": "OK", "result": "ok"}],
    }  # fmt: skip


CLUSTER = {"name": "lab", "quorate": True, "votes_expected": 3, "votes_present": 2, "votes_needed": 2, "members": [
    {"name": "pve1", "online": True}, {"name": "pve2", "online": True}, {"name": "pve3", "online": False}]}


@pytest.fixture
def fleet(live_server: LiveServer) -> Fleet:
    fleet = Fleet(live_server)
    fleet.report("pve1", **sections(), cluster=CLUSTER, ha={
        "manager": "active", "master": "pve1", "lrm": {"state": "active"},
        "services": [{"id": "vm:104", "node": "pve1", "state": "error"}]},
        ceph={"health": "HEALTH_WARN", "checks": [{"name": "OSD_DOWN", "severity": "HEALTH_WARN",
                                                   "message": "1 osds down"}]})
    return fleet


@pytest.fixture
def page(chromium, live_server: LiveServer, fleet: Fleet) -> Iterator[Page]:  # noqa: F811
    page = open_page(chromium, live_server)
    yield page
    assert page.faults == []  # type: ignore[attr-defined]
    page.context.close()


def opened(page: Page, query: str) -> str:
    """What stands in the card at an address."""
    page.goto(page.url.partition("?")[0] + "?" + query)
    card = page.locator("#drawer")
    expect(card).to_be_visible()
    return card.evaluate("card => card.textContent.replace(/\\s+/g, ' ')")


def test_the_card_of_a_guest_tells_what_it_lies_on_and_of_its_copies(page):
    told = opened(page, "host=pve1&guest=104")
    for text in ("lives on tank", "sdb is suspect", "local-zfs", "tank/vm-104-disk-0", "sda", "32.0 GiB", "3.0 GiB",
                 "fresh", "pbs", "scsi1", "nightly", "104-0", "pve2", "vzdump", "root@pam", "If pve1 burned now"):
        assert text in told, text
    page.locator("#volumes").get_by_role("link", name="tank", exact=True).click()
    expect(page.locator("#drawer-title")).to_have_text("tank")
    assert "pool=tank" in page.url


def test_the_card_of_a_pool_counts_each_vdev_and_its_suspects(page):
    told = opened(page, "host=pve1&pool=tank")
    assert "mirror-0" in told and "SMART: failing" in told
    margins = page.locator("#margins tbody tr")
    expect(margins.nth(0)).to_have_text(re.compile(r"1\s+0\s+sdb"))  # can lose 1, with the suspect 0
    expect(margins.nth(1)).to_have_text(re.compile(r"0\s+0\s+none"))
    expect(page.locator("#guests")).to_contain_text("mail (104)")
    expect(page.locator("#room")).to_contain_text("tank/vm-104-disk-0")
    page.locator("#margins").get_by_role("link", name="sdb").click()
    expect(page.locator("#drawer-title")).to_have_text("sdb")
    assert "disk=SER2" in page.url


def test_the_card_of_a_disk_says_which_one_to_pull_and_what_a_mistake_costs(page):
    told = opened(page, "host=pve1&disk=SER2")
    for text in ("Bay7", "SER2", "WDC WD40", "sdb", "ledctl locate=/dev/disk/by-id/ata-WDC_WD40-SER2",
                 "Pulling this one: no more disk may fail.", "by mistake: no more disk may fail", "mail (104)"):
        assert text in told, text
    told = opened(page, "host=pve1&disk=9155443322110099887")
    for text in ("does not see this disk", "/dev/disk/by-id/ata-GONE-part1", "it no longer counts: ",
                 "Pulling another disk of mirror-1 by mistake: data are lost"):
        assert text in told, text
    assert page.locator("#pull dd", has_text="–").first.locator(".dash").get_attribute("title")


def test_the_card_of_a_cluster_shows_quorum_by_node_and_what_is_in_error(page):
    told = opened(page, "cluster=lab")
    for text in ("1 of 1 monitored nodes", "2 of 3, 2 needed", "pve3", "104-0", "HEALTH_WARN", "OSD_DOWN",
                 "1 osds down"):
        assert text in told, text
    expect(page.locator("#ha .level-critical")).to_have_text("error")


def test_the_card_of_a_storage_tells_what_it_stands_on_and_who_on_it(page, fleet):
    fleet.report("pve2", **{**sections(), "guests": []}, cluster=CLUSTER)
    told = opened(page, "host=pve1&storage=local-zfs")
    for text in ("1 guest on local-zfs", "zfspool", "shared by the cluster", "50%", "as the other nodes", "pve2", "mail (104)"):
        assert text in told, text
    page.locator("#stands").get_by_role("link", name="tank", exact=True).click()
    expect(page.locator("#drawer-title")).to_have_text("tank")
    page.locator("#storages summary").click()
    page.locator("#storages").get_by_role("link", name="local-zfs").click()
    expect(page.locator("#drawer-title")).to_have_text("local-zfs")
    assert "nightly" in opened(page, "host=pve1&storage=pbs")
    expect(page.locator("#backups")).to_contain_text("mail")
    opened(page, "host=pve1&guest=104")
    page.locator("#volumes").get_by_role("link", name="local-zfs").click()
    assert "storage=local-zfs" in page.url


def test_a_problem_leads_to_the_card_of_its_object(page):
    problem = page.locator(".problem", has_text="SMART").first
    problem.locator("summary").first.click()
    problem.locator("a[href*='disk=']").first.click()
    expect(page.locator("#pull")).to_be_visible()


def test_healthy_sections_are_closed_and_the_strip_opens_them(page):
    opened(page, "host=pve1")
    assert page.locator("#snapshots").get_attribute("open") is None
    assert page.locator("#pools").get_attribute("open") is not None
    part = page.locator(".strip-part", has_text="Datasets")
    expect(part).to_contain_text("1")
    part.click()
    expect(page.locator("#datasets table")).to_be_in_viewport()
    page.goto(page.url.partition("#")[0] + "#tasks")
    page.reload()
    expect(page.locator("#tasks table")).to_be_visible()


def test_what_the_reader_closed_stays_closed(page, fleet):
    opened(page, "host=pve1")
    page.locator("#pools > summary").click()
    fleet.report("pve1", **sections(), node={"cpu_ratio": 0.77})
    expect(page.locator("#node")).to_contain_text("77%")
    assert page.locator("#pools").get_attribute("open") is None


def test_only_the_card_can_be_reached_and_the_focus_goes_back(page):
    page.goto(page.url + "?tab=guests")
    page.locator(".row-link", has_text="mail").click()
    expect(page.locator("#drawer-title")).to_be_focused()
    for _ in range(3):
        page.keyboard.press("Shift+Tab")
        assert page.evaluate("document.activeElement === document.body || "
                             "Boolean(document.activeElement.closest('#drawer'))")
    page.keyboard.press("Escape")
    expect(page.locator("#drawer")).to_have_count(0)
    expect(page.locator(".row-link", has_text="mail")).to_be_focused()


@pytest.mark.parametrize("query", ["host=pve1", "host=pve1&guest=105", "host=pve1&pool=tank", "host=pve1&disk=SER3",
                                   "host=pve1&storage=pbs", "cluster=lab"])
def test_no_card_is_wider_than_the_screen_and_names_stay_text(page, query):
    for width in (390, 768, 1024, 1440, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        told = opened(page, query)
        assert "\u202e" not in told
        assert page.evaluate("document.querySelector('#drawer').getBoundingClientRect().right") == width, width
        assert page.evaluate("document.querySelector('#drawer').scrollWidth - "
                             "document.querySelector('#drawer').clientWidth") == 0, (query, width)


# --- charts ---


@pytest.fixture
def history(fleet: Fleet) -> Fleet:
    """Two hosts with two hours of history."""
    for host in ("pve7", "pve8"):
        fleet.tokens[host] = fleet.server.register(host)
        reports = [build_report(host, seq=seq, at=time.time() - 7200 + 30 * seq, run_id=f"run-{host}", pools=None, node={
            "name": host, "cpu_ratio": 0.25, "iowait_ratio": 0.05, "uptime_seconds": 30 * seq,
            "memory_total_bytes": 64 << 30, "memory_available_bytes": 16 << 30, "arc_size_bytes": 8 << 30,
            "temperatures": [{"sensor": "k10temp", "label": "Tctl", "celsius": 61.0},
                             {"sensor": "nvme", "label": "Composite", "celsius": 47.0}],
            "block_devices": [{"name": name, "read_bytes_total": seq * 30 * 1024, "write_bytes_total": seq * 30 * 2048,
                               "busy_seconds_total": seq * 3.0} for name in ("sda", "sdb")]})
            for seq in range(1, 240)]  # fmt: skip
        assert fleet.server.post(fleet.tokens[host], reports, host=host, message_id=f"past-{host}").status == 200
    return fleet


def test_charts_tell_memory_disks_and_the_hottest_sensor_under_one_crosshair(page, history):
    opened(page, "host=pve7&range=6h")
    expect(page.get_by_role("button", name="6 h")).to_have_attribute("aria-pressed", "true")
    charts = page.locator(".chart-figure")
    memory = charts.filter(has=page.locator("strong", has_text="Memory"))
    expect(memory.locator("path.stack")).to_have_count(3)
    for text in ("used 40.0 GiB", "ZFS cache 8.0 GiB", "free 16.0 GiB"):
        expect(memory.locator(".chart-read")).to_contain_text(text)
    expect(memory.locator(".key")).to_have_count(3)
    for title, text in (("Disk IO", "read 2.0 KiB/s · written 4.0 KiB/s"), ("Busiest disk", "busy 10%"),
                        ("Hottest sensor", "now 61 °C")):
        expect(charts.filter(has_text=title).locator(".chart-read")).to_contain_text(text)
    memory.locator("svg.chart").focus()
    page.keyboard.press("Home")
    assert page.locator(".chart-figure.is-read").count() == charts.count() > 5


def test_two_hosts_stand_beside_each_other_and_the_address_keeps_it(page, history):
    opened(page, "host=pve7")
    page.locator("[data-beside]").fill("pve8")
    page.locator("[data-beside]").press("Enter")
    expect(page.locator(".chart-figure strong", has_text="CPU, pve8")).to_be_visible()
    page.get_by_role("button", name="7 d").click()
    assert "beside=pve8" in page.url and "range=7d" in page.url
    page.reload()
    expect(page.locator(".chart-figure strong", has_text="CPU, pve8")).to_be_visible()
    expect(page.get_by_role("button", name="7 d")).to_have_attribute("aria-pressed", "true")


def test_a_host_is_printed_as_a_document_with_all_its_sections(page):
    opened(page, "host=pve1")
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    expect(page.locator("#snapshots table")).to_be_visible()
    expect(page.locator(".posture")).to_be_hidden()
    assert page.evaluate("getComputedStyle(document.querySelector('#drawer')).position") == "static"
    assert page.locator("#drawer :is(button, select, input):visible, #drawer .alert-more:visible").count() == 0


def test_who_wants_no_motion_gets_none(page):
    moving = "[...document.querySelectorAll('*')].filter((one) => (style => parseFloat(style.transitionDuration) || " \
             "style.animationName !== 'none')(getComputedStyle(one))).length"
    page.emulate_media(reduced_motion="reduce")
    opened(page, "host=pve1")
    assert page.evaluate(moving) == 0
    page.evaluate("document.querySelector('#drawer').style.setProperty('transition', 'opacity 1s', 'important')")
    assert page.evaluate(moving) == 1
