"""The page's administration in a browser: sessions, users, and links for wall displays."""

from __future__ import annotations

import pytest
from conftest import PASSWORD
from playwright.sync_api import expect
from test_page import DEGRADED, DEGRADED_STATE, NARROW, REFRESHED, chromium, fleet, page  # noqa: F401


def test_an_admin_lets_somebody_in_and_out_again(page, chromium, live_server):  # noqa: F811
    page.goto(live_server.url + "/admin/hosts")
    users = page.locator("section[aria-label=Users]")
    users.locator("input[name=name]").fill("mira")
    users.locator("input[name=password]").fill("one long sentence")
    users.get_by_text("Add user").click()
    expect(users.locator("[data-key=user-mira]")).to_contain_text("viewer")
    other = chromium.new_context().new_page()
    other.goto(live_server.url + "/?tab=pools")
    other.fill("input[name=user]", "mira")
    other.fill("input[name=password]", "one long sentence")
    other.click("button[type=submit]")
    other.wait_for_url(live_server.url + "/?tab=pools")
    page.reload()
    sessions = page.locator("section[aria-label='Who is logged in']")
    expect(sessions).to_contain_text("mira")
    sessions.get_by_text("Log out all others").click()
    page.click("#dialog-yes")
    expect(sessions).not_to_contain_text("mira")
    other.reload()
    assert "/login?next=" in other.url
    other.context.close()


def test_a_link_for_a_wall_display_is_shown_once_and_opens_the_page(page, chromium, live_server):  # noqa: F811
    page.goto(live_server.url + "/admin/hosts")
    panel = page.locator("section[aria-label='Wall displays']")
    panel.locator("input[name=name]").fill("hallway")
    panel.get_by_text("Make a link").click()
    expect(panel.locator("[data-made]")).to_contain_text("/?kiosk=pxk_")
    expect(panel.locator("[data-key=kiosk-hallway]")).to_be_visible()
    display = chromium.new_context().new_page()
    display.goto(panel.locator("[data-made]").inner_text())
    assert display.url == live_server.url + "/?kiosk"
    expect(display.get_by_text("pve1").first).to_be_visible()
    display.context.close()


@pytest.mark.parametrize("viewport", [{"width": 1920, "height": 1080}, NARROW], ids=["tv", "phone"])
def test_a_wall_display_is_large_has_nothing_to_press_and_outlives_an_outage(chromium, live_server, fleet, viewport):  # noqa: F811
    fleet.report("pve2", pools=[DEGRADED], pool_states=DEGRADED_STATE)
    link = live_server.command("create-kiosk-link", "hall").stdout.partition("LINK: ")[2].split()[0]
    display = chromium.new_context(viewport=viewport).new_page()
    display.goto(link)
    problem = display.locator(".wall-problem", has_text="DEGRADED")
    expect(problem).to_be_visible()
    assert display.locator("a[href], button, input, select, summary, form").count() == 0
    assert display.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    size = display.evaluate("parseFloat(getComputedStyle(document.querySelector('.wall-problem')).fontSize)")
    assert size >= (25 if viewport["width"] == 1920 else 15)
    live_server.stop()
    expect(display.locator("#frozen")).to_contain_text("data frozen since", timeout=REFRESHED)
    live_server.start()
    fleet.report("pve2")
    expect(display.locator("#frozen")).to_be_hidden(timeout=REFRESHED)
    expect(display.locator(".wall-problem", has_text="DEGRADED")).to_have_count(0, timeout=REFRESHED)
    live_server.command("revoke-api-token", "hall")
    expect(display.locator("#frozen")).to_contain_text("not valid any more", timeout=REFRESHED)
    display.context.close()


def test_the_form_asks_for_a_name_only_where_users_have_one(chromium, live_server):  # noqa: F811
    context = chromium.new_context()
    form = context.new_page()
    form.goto(live_server.url + "/login")
    assert form.locator("input[name=user]").count() == 0
    assert live_server.command("add-user", "mira", "--role", "viewer", stdin="one long sentence\n").returncode == 0
    form.reload()
    form.fill("input[name=password]", PASSWORD)  # without a name it is admin
    form.click("button[type=submit]")
    form.wait_for_url(live_server.url + "/")
    context.close()
