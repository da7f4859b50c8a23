"""Where alerts meet people on the page: deliveries, tests, silences, maintenance, and the preview of changed rules."""

from __future__ import annotations

import re
import time

import pytest
from conftest import LiveServer, build_report
from playwright.sync_api import expect
from test_page import DEGRADED, DEGRADED_STATE, NARROW, WIDE, Fleet, chromium, open_page  # noqa: F401
from test_page_axe import violations
from test_server_notifications import HttpSink, hook

PREVIEW_SECONDS = 30_000  # ms: another process starts and reads the history


@pytest.fixture
def sinks():
    """One that takes everything, one that has had enough."""
    good, bad = HttpSink(), HttpSink()
    bad.status = 503
    yield good, bad
    good.close()
    bad.close()


@pytest.fixture
def server_with_channels(tmp_path, sinks):
    settings = tmp_path / "server.toml"
    settings.write_text(hook(sinks[0].url, name="ops") + hook(sinks[1].url, name="b-night"))
    running = LiveServer(tmp_path, SERVER_CONFIG=str(settings))
    running.start()
    yield running
    running.stop()


@pytest.fixture
def fleet(server_with_channels):
    return Fleet(server_with_channels)


@pytest.fixture
def page(chromium, server_with_channels, fleet):  # noqa: F811
    fleet.report("pve1")
    page = open_page(chromium, server_with_channels)
    yield page
    assert page.faults == []
    page.context.close()


def delivery(page, name):
    return page.locator("#delivery li", has=page.get_by_text(name, exact=True))


def open_problem(problem):
    """Its actions stand in the opened panel."""
    problem.locator("summary").click(position={"x": 5, "y": 5})


def act(page, place, name, **fields):
    """Press a button that opens the dialog, fill that in and send it."""
    place.get_by_role("button", name=name).first.click()
    dialog = page.get_by_role("dialog", name=name)
    for field, value in fields.items():
        control = dialog.locator(f"[name={field}]")
        control.fill(value) if field in ("note", "time") else control.select_option(value)
    dialog.locator("button[type=submit]").click()
    expect(page.locator("#act")).to_be_hidden()


def test_a_problem_is_acknowledged_muted_and_unmuted_beside_it(page, fleet):
    fleet.report("pve1", pools=[DEGRADED], pool_states=DEGRADED_STATE)
    problem = page.locator(".problem", has_text="DEGRADED")
    open_problem(problem)
    act(page, problem, "Mute", until="3600")
    expect(problem).to_contain_text("muted, ends in 59 min")
    problem.get_by_role("button", name="Unmute").click()
    expect(problem.get_by_role("button", name="Mute")).to_be_visible()
    before = page.locator(".problems > .problem-list > .problem").count()
    act(page, problem, "Acknowledge", note="ordered a disk")
    expect(page.locator(".acknowledged summary").first).to_have_text("1 acknowledged")
    expect(page.locator(".problems > .problem-list > .problem")).to_have_count(before - 1)


def test_a_refused_action_is_told_on_the_page(page, fleet):
    fleet.report("pve1", pools=[DEGRADED], pool_states=DEGRADED_STATE)
    problem = page.locator(".problem", has_text="DEGRADED")
    open_problem(problem)
    button = problem.get_by_role("button", name="Acknowledge")
    button.evaluate("button => { button.dataset.acknowledge = '999999' }")
    button.click()
    page.get_by_role("dialog").get_by_role("button", name="Acknowledge").click()
    expect(page.get_by_role("dialog")).to_contain_text("no open alert 999999")


def test_the_last_delivery_per_channel_is_seen_and_a_failing_one_at_the_top(page, fleet, sinks):
    page.get_by_role("link", name="no notification delivered yet").click()
    expect(delivery(page, "ops")).to_contain_text("not tried")
    fleet.report("pve1", pools=[DEGRADED], pool_states=DEGRADED_STATE)
    expect(delivery(page, "ops")).to_contain_text(re.compile(r"delivered.*last delivery \d+ s ago", re.S))
    expect(delivery(page, "b-night")).to_contain_text(re.compile(r"failing.*1 waiting.*HTTP 503", re.S))
    page.locator(".brand").click()
    page.get_by_role("link", name="b-night: notifications fail").click()
    expect(page.locator("#delivery")).to_be_in_viewport()
    sinks[1].status = 200
    expect(delivery(page, "b-night")).to_contain_text("last delivery", timeout=15000)


def test_a_test_is_sent_and_its_outcome_told(page, sinks):
    page.get_by_role("link", name="Alerts", exact=False).first.click()
    delivery(page, "ops").get_by_role("button", name="Send a test").click()
    expect(delivery(page, "ops")).to_contain_text("The test was accepted by the channel.")
    expect(delivery(page, "ops")).to_contain_text("delivered")
    assert [one["kind"] for one in sinks[0].json()["alerts"]] == ["test"]
    delivery(page, "b-night").get_by_role("button", name="Send a test").click()
    expect(delivery(page, "b-night")).to_contain_text("The test failed: HTTP 503")
    page.wait_for_timeout(3500)  # a poll later it still stands there
    expect(delivery(page, "b-night")).to_contain_text("The test failed: HTTP 503")


def test_silences_are_listed_and_ended(page, fleet):
    fleet.report("pve1", pools=[DEGRADED], pool_states=DEGRADED_STATE)
    problem = page.locator(".problem", has_text="DEGRADED")
    open_problem(problem)
    act(page, problem, "Mute", until="28800")
    page.goto(page.url.split("?")[0] + "?tab=alerts")
    line = page.locator("#silences li")
    expect(line).to_contain_text(re.compile(r"pool-state.*pve1.*pools/tank.*ends in 7 h.*by admin", re.S))
    line.get_by_role("button", name="End").click()
    expect(page.locator("#silences")).to_have_count(0)


def test_maintenance_is_begun_and_ended_in_the_drawer(page):
    page.locator(".row-link", has_text="pve1").click()
    drawer = page.locator("#drawer")
    act(page, drawer, "Maintenance", until="3600")
    expect(drawer.locator(".drawer-sub")).to_contain_text("maintenance until")
    expect(page.locator(".row", has_text="pve1")).to_contain_text("maintenance")
    drawer.get_by_role("button", name="End maintenance").click()
    expect(drawer.get_by_role("button", name="Maintenance")).to_be_visible()


def test_changed_rules_are_tried_over_the_history(page, fleet):
    begin = time.time() - 2 * 3600
    fleet.tokens["pve9"] = fleet.server.register("pve9")
    reports = [build_report("pve9", seq=seq, at=begin + 60 * seq, run_id="run-p", pools=None,
                            node={"name": "pve9", "cpu_ratio": .7}) for seq in range(1, 100)]
    assert fleet.server.post(fleet.tokens["pve9"], reports, host="pve9", message_id="backlog").status == 200
    page.goto(page.url.split("?")[0] + "?tab=alerts")
    page.get_by_text("Try changed rules").click()
    form = page.locator("[data-preview]")
    form.get_by_role("button", name="What would have fired?").click()
    expect(form.locator(".preview-result")).to_contain_text("0 alerts would have fired.", timeout=PREVIEW_SECONDS)
    form.locator("textarea").fill("[rules.cpu]\nwarn = 0.6\n\n[rules.memory]\nwran = 1\n")
    form.get_by_role("button", name="What would have fired?").click()
    expect(form.locator(".form-error")).to_contain_text("line 5: rules.memory.wran: unknown")
    assert form.locator("textarea").evaluate("one => one.value.slice(one.selectionStart, one.selectionEnd)") == "wran = 1"
    form.locator("textarea").fill("[rules.cpu]\nwarn = 0.6\n")
    form.get_by_role("button", name="What would have fired?").click()
    expect(form.locator("tbody tr")).to_have_count(1, timeout=PREVIEW_SECONDS)
    expect(form.locator("tbody tr")).to_contain_text("pve9")
    page.wait_for_timeout(3500)
    expect(form.locator("tbody tr")).to_have_count(1)
    expect(form.locator("textarea")).to_have_value("[rules.cpu]\nwarn = 0.6\n")


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_nothing_sticks_out_and_axe_finds_nothing(chromium, server_with_channels, fleet, viewport):  # noqa: F811
    fleet.report("pve1", pools=[DEGRADED], pool_states=DEGRADED_STATE)
    page = open_page(chromium, server_with_channels, viewport=viewport)
    page.emulate_media(reduced_motion="reduce")
    problem = page.locator(".problem", has_text="DEGRADED")
    open_problem(problem)
    act(page, problem, "Mute", until="28800")
    expect(page.locator(".problem", has_text="DEGRADED")).to_contain_text("muted")
    page.goto(server_with_channels.url + "/?tab=alerts")
    page.get_by_text("Try changed rules").click()
    expect(delivery(page, "b-night")).to_contain_text("HTTP 503")
    page.locator("textarea").fill("[rules.cpu]\nwarn = 'x'\n")
    page.get_by_role("button", name="What would have fired?").click()
    expect(page.locator("[data-preview] .form-error")).to_contain_text("line 2")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert violations(page) == []
    page.context.close()
