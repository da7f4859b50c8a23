"""The page in Chromium while an operator works with it: first host, acting with undo, rows that stand still, and a
server that is lost with a card open."""

from __future__ import annotations

import re
import signal
import time

import pytest
from conftest import PASSWORD, build_guest, build_report
from playwright.sync_api import expect
from test_page import (  # noqa: F401 — fixtures
    DEGRADED,
    DEGRADED_STATE,
    REFRESHED,
    chromium,
    fleet,
    open_page,
    page,
)
from test_page_alerts import act, open_problem


def api(running, path):
    if running.url not in TOKENS:
        TOKENS[running.url] = running.api_token()
    return running.request("GET", path, Authorization=f"Bearer {TOKENS[running.url]}").json()


TOKENS: dict[str, str] = {}


def test_the_first_hosts_token_stays_until_it_is_stored_and_the_host_turns_up(chromium, live_server):  # noqa: F811
    page = open_page(chromium, live_server)  # noqa: F811
    page.get_by_label("Name").fill("pve1")
    page.get_by_role("button", name="Register host").click()
    token = page.locator('[data-fill="token"]')
    expect(token).to_contain_text("whsec_")
    expect(page.locator(".posture")).to_contain_text("1 host registered, not reporting yet.")
    expect(page.locator("main")).to_contain_text("Waiting for the first report of")
    expect(page.locator("main")).not_to_contain_text("Nothing needs you.")
    steps = page.locator("[data-steps]")
    expect(steps).to_contain_text("… waiting for the first report")
    report = build_report("pve1", at=time.time(), guests=[build_guest(100)])
    assert live_server.post(token.inner_text(), report, host="pve1").status == 200
    expect(steps).to_contain_text("✓ it reports")
    expect(steps).to_contain_text("✓ its guests are known")
    expect(steps).to_contain_text("… no backup job seen yet")
    expect(page.locator(".row", has_text="pve1")).to_be_visible(timeout=REFRESHED)
    expect(token).to_contain_text("whsec_")
    page.get_by_role("button", name="I have stored it").click()
    expect(page.locator("#token")).to_be_hidden()
    assert "whsec_" not in page.content() and page.faults == []
    page.context.close()


def test_mute_and_maintenance_ask_first_say_the_scope_and_can_be_undone(page, fleet):  # noqa: F811
    fleet.report("pve1", pools=[DEGRADED], pool_states=DEGRADED_STATE)
    problem = page.locator(".problem", has_text="DEGRADED")
    open_problem(problem)
    problem.get_by_role("button", name="Mute").focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_timeout(300)
    assert api(fleet.server, "/api/v1/silences")["items"] == []  # nothing acts on an arrow key
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Mute")
    expect(dialog).to_contain_text("No notifications for pool-state of pools/tank on pve1 until")
    dialog.locator("[name=scope]").select_option(label="pool-state on pve1")
    dialog.locator("[name=until]").select_option("own")
    dialog.locator("[name=time]").fill("2020-01-01T00:00")
    expect(dialog).to_contain_text("Choose a time to come.")
    expect(dialog.locator("[type=submit]")).to_be_disabled()
    dialog.locator("[name=time]").fill("2099-01-01T06:00")
    dialog.locator("[name=note]").fill("ticket 7")
    dialog.locator("[type=submit]").click()
    expect(page.locator("#undo")).to_contain_text("Muted until")
    made = api(fleet.server, "/api/v1/silences")["items"][0]
    assert (made["rule"], made["host"], made["object"], made["note"]) == ("pool-state", "pve1", None, "ticket 7")
    page.get_by_role("button", name="Undo").click()
    expect(problem.get_by_role("button", name="Mute")).to_be_visible()
    assert api(fleet.server, "/api/v1/silences")["items"] == []

    page.goto(fleet.server.url + "/?host=pve2")
    act(page, page.locator("#drawer"), "Maintenance", until="7200")
    expect(page.locator(".drawer-sub")).to_contain_text("maintenance until")
    until = api(fleet.server, "/api/v1/hosts/pve2")["maintenance_until"]
    assert 7100 < until - time.time() < 7300
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#drawer [data-act=maintenance]")).to_be_visible()


def test_rows_stand_still_under_the_pointer_and_say_that_another_order_waits(page, fleet):  # noqa: F811
    expect(page.locator(".row-link")).to_have_text(["pve1", "pve2"])
    page.locator(".row-link").last.hover()
    fleet.report("pve2", pools=[DEGRADED], pool_states=DEGRADED_STATE)
    expect(page.locator(".row").nth(1)).to_contain_text("critical", timeout=REFRESHED)  # its new state is seen
    expect(page.locator(".row-link")).to_have_text(["pve1", "pve2"])
    page.get_by_role("button", name="Order has changed").click()
    expect(page.locator(".row-link")).to_have_text(["pve2", "pve1"])


@pytest.mark.parametrize("viewport", [{"width": 1440, "height": 900}, {"width": 390, "height": 844}], ids=["wide", "narrow"])
def test_with_a_card_open_a_lost_server_is_told_on_top_and_the_card_closes(chromium, live_server, fleet, viewport):  # noqa: F811
    page = open_page(chromium, live_server, viewport=viewport)  # noqa: F811
    page.goto(live_server.url + "/?host=pve1")
    live_server.process.send_signal(signal.SIGSTOP)
    try:
        banner = page.locator("#frozen")
        expect(banner).to_contain_text("data frozen since", timeout=REFRESHED)
        middle = "box => { const b = box.getBoundingClientRect(); return document.elementFromPoint(b.x + b.width / 2, b.y + b.height / 2).closest('#frozen') !== null }"
        assert banner.evaluate(middle)  # nothing lies over it
        assert page.evaluate("[...document.querySelectorAll('main, main > *')].every(part => getComputedStyle(part).opacity === '1')")
        act_button = page.locator("#drawer [data-act=maintenance]")
        act_button.evaluate("button => button.click()")
        page.get_by_role("dialog", name="Maintenance").locator("[type=submit]").click()
        expect(page.get_by_role("dialog", name="Maintenance")).to_contain_text("no connection to the server")
        page.get_by_role("button", name="Cancel").click()
        page.locator(".drawer-close").evaluate("link => link.click()")
        expect(page.locator("#drawer")).to_have_count(0)
    finally:
        live_server.process.send_signal(signal.SIGCONT)
    expect(banner).to_be_hidden(timeout=REFRESHED)
    page.context.close()


def test_a_write_gives_up_after_eight_seconds_and_says_so(page, fleet):  # noqa: F811
    page.goto(fleet.server.url + "/?host=pve1")
    page.route("**/api/v1/hosts/pve1", lambda route: None if route.request.method == "PATCH" else route.continue_())
    page.locator("#drawer [data-act=maintenance]").click()
    page.get_by_role("dialog", name="Maintenance").locator("[type=submit]").click()
    expect(page.get_by_role("dialog", name="Maintenance")).to_contain_text("has not answered within 8 s", timeout=11_000)


def test_log_in_leads_back_to_where_one_was(page, fleet):  # noqa: F811
    page.goto(fleet.server.url + "/?tab=guests&q=mail&host=pve1")
    page.context.clear_cookies()
    link = page.locator("#frozen").get_by_role("link", name="Log in")
    expect(link).to_be_visible(timeout=REFRESHED)
    link.click()
    page.fill("input[name=password]", PASSWORD)
    page.click("button[type=submit]")
    expect(page).to_have_url(re.compile(r"/\?tab=guests&q=mail&host=pve1$"))


def test_the_tabs_are_within_ten_tab_stops_and_the_lists_on_the_first_screen(page, fleet):  # noqa: F811
    fleet.report("pve1", pools=[DEGRADED], pool_states=DEGRADED_STATE)
    expect(page.locator(".problem").first).to_be_visible(timeout=REFRESHED)
    page.evaluate("document.activeElement.blur()")
    for stop in range(1, 11):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('tab')"):
            break
    assert stop < 10, stop
    expect(page.locator(".tab[aria-current]")).to_contain_text("Problems")
    page.locator(".tab", has_text="Guests").click()
    expect(page.locator(".row").first).to_be_in_viewport()
    expect(page.locator(".problem")).to_have_count(0)
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="What the search understands")).to_contain_text("snapshots")
    page.keyboard.press("Escape")
    page.get_by_role("link", name="no backup in 24 h").click()
    expect(page).to_have_url(re.compile(r"q=backup%3E24h"))
