"""The page in a real headless Chromium, against a real server: what an operator does with it, and what he sees."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator

import pytest
from conftest import PASSWORD, LiveServer, build_disk, build_guest, build_pool, build_report, find_program
from playwright.sync_api import Browser, Page, expect, sync_playwright

# Chromium's sandbox needs rights that root in a container does not have; and nothing may leave this machine.
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
                  "--disable-background-networking", "--disable-sync"]
SOON = 8000  # ms; the page promises 5 s, and two cores are shared by all tests
REFRESHED = 15_000  # the page is brought up to date every 10 s, and at once when the overview has news
WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    program = find_program("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.path.realpath(program), args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


class Fleet:
    """Hosts that report to the server when the test says so."""

    def __init__(self, running: LiveServer):
        self.server, self.tokens, self.seq = running, {}, 0

    def report(self, host: str, **sections) -> None:
        if host not in self.tokens:
            self.tokens[host] = self.server.register(host)
        self.seq += 1
        body = build_report(host, seq=self.seq, at=time.time(), **sections)
        answer = self.server.post(self.tokens[host], body, host=host, message_id=f"msg_{self.seq}")
        assert answer.status == 200, answer.body


@pytest.fixture
def fleet(live_server: LiveServer) -> Fleet:
    fleet = Fleet(live_server)
    fleet.report("pve1", guests=[build_guest(100, name="web"), build_guest(101, name="<b>mail</b>")])
    fleet.report("pve2", guests=[build_guest(200, name="dns")])
    return fleet


def open_page(chromium: Browser, live_server: LiveServer, *, script=True, viewport=WIDE, scheme="light") -> Page:
    """A page that is logged in. A mistake of its script, or anything that its CSP had to stop, fails the test."""
    context = chromium.new_context(viewport=viewport, color_scheme=scheme, java_script_enabled=script)
    page = context.new_page()
    page.set_default_timeout(SOON)
    page.faults = []  # type: ignore[attr-defined]
    page.on("pageerror", lambda error: page.faults.append(str(error)))  # type: ignore[attr-defined]
    page.on("console", lambda message: page.faults.append(message.text)  # type: ignore[attr-defined]
            if "Content Security Policy" in message.text else None)
    page.on("dialog", lambda dialog: page.faults.append("a dialog opened"))  # type: ignore[attr-defined]
    page.goto(live_server.url + "/")
    page.fill("input[name=password]", PASSWORD)
    page.click("button[type=submit]")
    page.wait_for_url(live_server.url + "/")
    return page


@pytest.fixture
def page(chromium: Browser, live_server: LiveServer, fleet: Fleet) -> Iterator[Page]:
    page = open_page(chromium, live_server)
    yield page
    assert page.faults == []  # type: ignore[attr-defined]
    page.context.close()


DEGRADED = build_pool(state="DEGRADED", vdevs=[{
    "name": "mirror-0", "type": "mirror", "class": "normal", "state": "DEGRADED", "children": [
        build_disk("sda"), build_disk("sdb", state="FAULTED", checksum_errors=312, reason="too many errors")]}])
DEGRADED_STATE = [{"name": "tank", "guid": DEGRADED["guid"], "state": "DEGRADED"}]


def test_a_wrong_password_is_told_and_opens_nothing(chromium, live_server):
    page = chromium.new_page()
    page.goto(live_server.url + "/")
    page.fill("input[name=password]", "wrong")
    page.click("button[type=submit]")
    expect(page.get_by_text("That is not the password.")).to_be_visible()
    page.close()


def test_a_fault_appears_by_itself_and_goes_again(page, fleet):
    expect(page.get_by_text("Nothing needs you.")).to_be_visible()
    fleet.report("pve2", pools=[DEGRADED], pool_states=DEGRADED_STATE)
    expect(page.locator(".problem").first).to_contain_text("DEGRADED", timeout=REFRESHED)
    expect(page.locator(".row").first).to_contain_text("pve2")
    expect(page.locator(".posture")).to_contain_text(re.compile(r"\d critical"))
    expect(page).to_have_title(re.compile(r"\([23]\) proxmon"))
    fleet.report("pve2")
    expect(page.get_by_text("Nothing needs you.")).to_be_visible(timeout=REFRESHED)


def test_from_a_problem_to_the_disk_in_one_click(page, fleet):
    fleet.report("pve2", pools=[DEGRADED], pool_states=DEGRADED_STATE)
    page.locator(".problem-host").first.click()
    row = page.locator("#pool-tank .tree-row", has_text="sdb")
    expect(row).to_be_in_viewport()
    for text in ("FAULTED", "312", "too many errors"):
        expect(row).to_contain_text(text)


def test_search_finds_a_guest_anywhere_and_the_address_keeps_it(page, live_server):
    page.keyboard.press("/")
    page.keyboard.type("dns")
    expect(page.locator(".hits")).to_contain_text("guests 1")  # and that list is shown
    expect(page.locator(".row")).to_have_count(1)
    page.locator(".row-link").click()
    expect(page.locator("#drawer")).to_contain_text("pve2")
    page.keyboard.press("Escape")
    expect(page.locator("#drawer")).to_have_count(0)
    page.reload()
    expect(page.locator(".row")).to_have_count(1)
    page.go_back()
    expect(page.locator("#drawer")).to_be_visible()


def test_what_the_reader_opened_typed_and_scrolled_stays_when_new_data_comes(page, fleet):
    fleet.report("pve2", pools=[DEGRADED], pool_states=DEGRADED_STATE)
    page.locator(".problem summary").first.click(position={"x": 5, "y": 5})
    page.locator(".row-link", has_text="pve2").click()
    page.locator("#drawer").evaluate("drawer => { drawer.scrollTop = 150; }")
    fleet.report("pve2", pools=[DEGRADED], pool_states=DEGRADED_STATE, node={"cpu_ratio": 0.77})
    expect(page.locator("#node")).to_contain_text("77%", timeout=REFRESHED)
    assert page.locator("#drawer").evaluate("drawer => drawer.scrollTop") == 150
    assert page.locator(".problem details[open]").count() == 1


def test_register_copy_rotate_rename_and_remove_a_host(page, live_server):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(live_server.url + "/admin/hosts")
    page.get_by_label("Name").first.fill("pve9")
    page.get_by_role("button", name="Register host").click()
    token = page.locator('[data-fill="token"]')
    expect(token).to_contain_text("whsec_")
    first = token.inner_text()
    page.get_by_role("button", name="Copy token").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == first
    assert live_server.post(first, build_report("pve9", at=time.time()), host="pve9").status == 200

    line = page.locator(".host-line", has_text="pve9")
    line.get_by_role("button", name="Rotate token").click()
    page.get_by_role("dialog").get_by_role("button", name="Rotate token").click()
    expect(token).not_to_have_text(first)
    assert live_server.post(first, build_report("pve9", seq=2, at=time.time()), host="pve9").code == "invalid_token"

    line.get_by_role("button", name="Edit").click()
    line.get_by_label("Name").fill("pve10")
    line.get_by_label("Note").fill("rack 4")
    line.get_by_role("button", name="Save").click()
    line = page.locator(".host-line", has_text="pve10")
    expect(line).to_contain_text("rack 4")
    line.get_by_role("button", name="Remove").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove pve10").click()
    expect(line).to_have_count(0)


def test_a_refused_name_is_told_beside_the_form(page, live_server):
    page.goto(live_server.url + "/admin/hosts")
    page.get_by_label("Name").first.fill("pve1")
    page.get_by_role("button", name="Register host").click()
    expect(page.get_by_role("alert").filter(has_text="already registered")).to_be_visible()


def test_a_server_that_is_gone_freezes_the_page_in_words(page, live_server):
    live_server.stop()
    expect(page.get_by_text("data frozen since")).to_be_visible()
    live_server.start()
    expect(page.locator("#frozen")).to_be_hidden()


def test_a_session_that_ended_is_told(page):
    page.context.clear_cookies()
    expect(page.get_by_text("You are signed out")).to_be_visible()


def test_the_chosen_colours_are_kept(page):
    def ground():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = ground()
    page.locator("#theme").click()
    page.locator("#theme").click()
    assert ground() != light
    page.reload()
    assert ground() != light


def test_hostile_names_are_text(page):
    page.goto(page.url + "?host=pve1")
    expect(page.locator("#guests")).to_contain_text("<b>mail</b>")


def test_without_script_links_and_forms_do(chromium, live_server, fleet):
    page = open_page(chromium, live_server, script=False)
    page.fill("input[name=q]", "pve2")
    page.keyboard.press("Enter")
    expect(page.locator(".row")).to_have_count(1)
    page.locator(".row-link").click()
    expect(page.locator("#drawer")).to_contain_text("pve2")
    page.get_by_label("Close").click()
    expect(page.locator("#drawer")).to_have_count(0)
    page.goto(live_server.url + "/admin/hosts")
    expect(page.get_by_text("Changes need JavaScript")).to_be_visible()
    page.context.close()


# --- charts: the history of the opened host ---


def test_charts_show_gaps_as_gaps_and_single_values_to_the_keyboard(page, fleet):
    begin = time.time() - 3 * 3600
    node = {"name": "pve3", "cpu_count": 4}
    reports = [build_report("pve3", seq=seq, at=begin + 30 * seq, run_id="run-c", pools=None, node={
        **node, "cpu_ratio": 0.25 if seq < 150 else 0.75, "uptime_seconds": 30 * (seq if seq < 300 else seq - 299)})
        for seq in range(1, 360) if not 150 <= seq < 200]  # fmt: skip
    fleet.tokens["pve3"] = fleet.server.register("pve3")
    assert fleet.server.post(fleet.tokens["pve3"], reports, host="pve3", message_id="backlog").status == 200
    page.locator(".row-link", has_text="pve3").click()
    page.get_by_role("button", name="6 h").click()
    chart = page.locator(".chart-figure", has_text="CPU")
    expect(chart.locator("path.curve-0")).to_have_count(2)
    expect(chart.locator(".event-reboot")).to_have_count(1)
    expect(chart.locator(".chart-read")).to_have_text("in use 75%")
    chart.locator("svg").focus()
    page.keyboard.press("Home")
    expect(chart.locator(".chart-read")).to_contain_text("in use –")
    for _ in range(75):
        page.keyboard.press("ArrowRight")
    expect(chart.locator(".chart-read")).to_contain_text("in use 25%")
    expect(page.locator("[data-charts-note]")).to_contain_text("Silent in the last two days")


def test_a_guest_is_charted_on_request_and_the_choice_stays_when_new_data_comes(page, fleet):
    for _ in range(3):
        fleet.report("pve1", guests=[build_guest(100, name="web"), build_guest(101, name="<b>mail</b>")])
    page.locator(".row-link", has_text="pve1").click()
    page.locator("[data-subject]").select_option("guests/101")
    expect(page.locator(".chart-figure strong").nth(1)).to_have_text("Memory")
    fleet.report("pve1")
    page.wait_for_timeout(3500)
    expect(page.locator("[data-subject]")).to_have_value("guests/101")
