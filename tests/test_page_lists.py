"""The lists in Chromium: their columns, their filters, what the search finds, and the timeline."""

from __future__ import annotations

import re
import time
from pathlib import Path

from conftest import build_disk, build_guest
from playwright.sync_api import Page, expect
from test_page import (  # noqa: F401 — fixtures
    DEGRADED,
    DEGRADED_STATE,
    REFRESHED,
    chromium,
    fleet,
    open_page,
    page,
)

import server

ROOT = Path(__file__).resolve().parent.parent


def labels(page: Page) -> list[str]:  # noqa: F811
    return page.locator(".list th:visible").all_inner_texts()


def test_columns_are_chosen_kept_in_the_address_and_remembered_for_the_list(page, live_server):  # noqa: F811
    page.locator(".tab", has_text="Guests").click()
    expect(page.locator(".list-guests")).to_be_visible()
    page.locator(".columns > summary").click()
    page.get_by_label("Lives on").check()
    page.get_by_label("CPU", exact=True).uncheck()
    expect(page.locator(".list th", has_text="CPU")).to_have_count(0)
    assert "Lives on" in labels(page) and "cols=verdict%2Cname%2C" in page.url and "lives_on" in page.url
    expect(page.get_by_label("Guest", exact=True)).to_be_disabled()  # the column with the link stays
    rows = page.request.get(live_server.url + page.locator("[download]").get_attribute("href")).text().splitlines()
    head = rows[0].split(",")
    assert "lives_on" in head and "cpu_ratio" not in head and len(rows) == 4
    page.keyboard.press("Escape")
    expect(page.locator(".columns-form")).to_be_hidden()
    page.locator(".tab", has_text="Pools").click()
    expect(page.locator(".tab[aria-current]")).to_contain_text("Pools")
    assert "cols=" not in page.url  # each list has its own
    page.goto(live_server.url + "/?tab=guests")
    expect(page.locator(".list th", has_text="Lives on")).to_be_visible()  # and the script has settled
    page.locator(".columns > summary").click()
    page.get_by_role("link", name="The usual columns").click()
    expect(page.locator(".list th", has_text="CPU")).to_be_visible()
    assert "cols=" not in page.url and "Lives on" not in labels(page)


def test_the_heads_stay_in_sight_where_columns_are_chosen(page, fleet):  # noqa: F811
    fleet.report("pve1", guests=[build_guest(number) for number in range(100, 160)])
    for view in ("/?tab=guests", "/?tab=guests&cols=status,host,lives_on,tags,as_of"):
        page.goto(fleet.server.url + view)
        row, head = page.locator(".row").nth(55), page.locator(".list th").nth(1)
        row.scroll_into_view_if_needed()
        expect(row).to_be_in_viewport()
        expect(head).to_be_in_viewport()


def test_a_narrow_screen_says_how_many_columns_it_hides_and_they_can_be_had(chromium, live_server, fleet):  # noqa: F811
    page = open_page(chromium, live_server, viewport={"width": 1024, "height": 800})  # noqa: F811
    page.goto(live_server.url + "/?tab=hosts")
    hint = page.locator(".columns > summary")
    hidden = page.locator(".list th").count() - len(labels(page))
    expect(hint).to_contain_text(f"{hidden} hidden")
    assert hidden and "Backups" not in labels(page)
    hint.click()
    page.get_by_label("CPU", exact=True).uncheck()
    expect(page.locator(".list th", has_text="Backups")).to_be_visible()
    assert "hidden" not in hint.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1024
    page.context.close()


def test_without_script_a_form_chooses_the_columns(chromium, live_server, fleet):  # noqa: F811
    page = open_page(chromium, live_server, script=False)  # noqa: F811
    page.goto(live_server.url + "/?tab=guests&q=web")
    page.locator(".columns > summary").click()
    page.get_by_label("Tags").check()
    page.get_by_role("button", name="Show").click()
    expect(page).to_have_url(re.compile(r"q=web.*cols=tags"))  # without script nothing else tells that the form was sent
    expect(page.locator(".row")).to_have_count(1)
    assert "Tags" in labels(page)
    page.context.close()


def test_the_timeline_tells_of_last_night_in_two_clicks(page, fleet, live_server):  # noqa: F811
    now = time.time()
    task = {"upid": "UPID:1", "type": "vzdump", "vmid": 100, "user": "root@pam", "started_at": now - 60,
            "ended_at": now - 30, "status": "job errors", "result": "error"}  # fmt: skip
    fleet.report("pve1", tasks=[task], pools=[DEGRADED], pool_states=DEGRADED_STATE)
    fleet.report("pve2", guests=[build_guest(200, name="dns", status="stopped")])
    page.locator(".tab", has_text="Timeline").click()
    rows = page.locator(".list-events .row")
    for text in ("Task vzdump of 100 by root@pam: job errors", "DEGRADED", "Guest 200 dns: running → stopped"):
        expect(rows.filter(has_text=text).first).to_be_visible(timeout=REFRESHED)
    expect(rows.filter(has_text="Task vzdump")).to_contain_text("warning")
    expect(rows.filter(has_text="tank is DEGRADED").first).to_contain_text("critical")
    page.locator(".chip", has_text=re.compile(r"^\s*guest \d")).click()
    expect(rows.filter(has_text="DEGRADED")).to_have_count(0)
    expect(rows.filter(has_text="Guest 200")).to_have_count(1)
    page.locator(".chip-clear").click()
    page.get_by_role("link", name="last night").click()
    expect(page.get_by_role("link", name="last night")).to_have_attribute("aria-current", "true")
    times = {name: float(value) for name, value in re.findall(r"(since|until)=(\d+)", page.url)}
    assert times["until"] - times["since"] == 12 * 3600
    csv = page.locator("[download]").get_attribute("href")
    assert f"since={times['since']:.0f}" in csv and f"until={times['until']:.0f}" in csv


FORMATS = {  # of the script, and of the server
    "showDuration": (server.show_duration, (0, 0.4, 41, 59.9, 60, 119, 120, 7199, 7200, 86400, 172799, 172800, 1e9)),
    "showBytes": (server.show_bytes, (0, 1, 1023, 1023.4, 1023.5, 1024, 1280, 1536, 102348, 123456789, 5e12, 2**62)),
    "showRatio": (server.show_ratio, (0, 0.001, 0.005, 0.125, 0.834, 0.985, 0.99, 0.996, 0.9995, 1, 1.25, 12)),
    "showNumber": (server.show_number, (0, 0.5, 1.5, 7, 999, 1000, 12345.6, 1234567)),
    "countOf": (lambda value: server.count_of(value, "guest"), (0, 1, 2, 1200)),
}


def test_script_and_server_write_numbers_times_and_units_alike(chromium):  # noqa: F811
    script = (ROOT / "templates" / "app.js").read_text()
    section = re.search(r"// --- formats: .*?\n(.*?)\n  // --- ", script, re.S)[1]
    page = chromium.new_page()  # noqa: F811
    for name, (write, values) in FORMATS.items():
        more = ', "guest"' if name == "countOf" else ""
        told = page.evaluate(f"(values) => {{ {section}; return values.map((value) => {name}(value{more})); }}", [*values])
        assert told == [write(value) for value in values], name
    page.close()


def test_no_list_or_dialog_is_wider_than_the_screen_at_any_width(chromium, live_server, fleet):  # noqa: F811
    wide = "\u202egnp.exe " + "w" * 192
    host = "a" + "b" * 61 + "c"
    fleet.report(host, guests=[build_guest(7, name=wide, tags=[wide[:60]])], pools=[DEGRADED], pool_states=DEGRADED_STATE,
                 disks=[build_disk("sda", model=wide, serial=wide[:64])])  # fmt: skip
    page, found = open_page(chromium, live_server), []  # noqa: F811
    views = ["", *(f"tab={name}" for name in ("problems", *server.TABS)), f"q={host}", f"host={host}"]
    for view in views:
        page.goto(f"{live_server.url}/?{view}")
        expect(page.locator("#main")).to_be_visible()
        for width in (390, 768, 1024, 1440, 1920):
            page.set_viewport_size({"width": width, "height": 900})
            across = page.evaluate("document.documentElement.scrollWidth")
            found += [(view, width, across)] if across > width else []
    page.goto(live_server.url + "/")
    expect(page.locator(".problem").first).to_be_visible()
    for dialog in ("#words", "#act", "#dialog"):
        for width in (390, 768, 1024, 1440, 1920):
            page.set_viewport_size({"width": width, "height": 900})
            box = page.evaluate(f"""() => {{ const dialog = document.querySelector("{dialog}"); dialog.showModal();
                const box = dialog.getBoundingClientRect(); dialog.close(); return [box.left, box.right]; }}""")
            found += [(dialog, width, box)] if box[0] < 0 or box[1] > width else []
    assert found == []
    page.context.close()
