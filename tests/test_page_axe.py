"""axe-core on every view of the page: no rule of it may find anything, in both themes, on a wide screen and a phone."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
from conftest import PASSWORD, LiveServer
from playwright.sync_api import Page, expect
from test_page import NARROW, WIDE, Fleet, chromium, open_page  # noqa: F401
from test_page_cards import fleet  # noqa: F401

AXE = (files("axe_playwright_python") / "axe.min.js").read_text("utf-8")
LISTS = ("problems", "hosts", "guests", "pools", "storages", "alerts")  # each with a template of its own
MORE = ("disks", "backups", "events", "forecasts", "drift")  # all by one
CARDS = ("host=pve1", "host=pve1&guest=104", "host=pve1&guest=105", "host=pve1&pool=tank", "host=pve1&disk=SER2",
         "host=pve1&disk=9155443322110099887", "host=pve1&storage=local", "cluster=lab", "host=nobody")
# Structure once for the whole document; colours, the costly part, in both themes and only in what is new on the view.
RUN = """async (schemes) => {
  const told = [], colours = ["color-contrast", "link-in-text-block"];
  const run = async (name, where, options) => {
    const { violations } = await axe.run(where, { resultTypes: ["violations"], ...options });
    for (const { id, nodes } of violations) told.push(`${name} ${id}: ${nodes.slice(0, 4).map((node) => node.html.slice(0, 160)).join(" | ")}`);
  };
  await run("", document, { rules: Object.fromEntries(colours.map((rule) => [rule, { enabled: false }])) });
  for (const scheme of schemes) {
    document.documentElement.dataset.theme = scheme;
    await run(scheme, document.querySelector("dialog[open], #drawer") || document, { runOnly: colours });
  }
  delete document.documentElement.dataset.theme;
  return told;
}"""


def violations(page: Page, *schemes: str) -> list[str]:
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE)
    return page.evaluate(RUN, schemes or ["light", "dark"])


def check(page: Page, where: str, found: dict[str, list[str]], *schemes: str) -> None:
    if told := violations(page, *schemes):
        found[where] = told


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["1440", "390"])
def test_axe_finds_nothing_in_any_list_or_card(chromium, live_server, fleet, viewport):  # noqa: F811
    page, found = open_page(chromium, live_server, viewport=viewport), {}
    page.emulate_media(reduced_motion="reduce")
    more = [f"/?tab={name}" for name in MORE] if viewport is WIDE else []
    addresses = ["/", "/?q=nothing-has-this-name", "/admin/hosts", *(f"/?tab={name}" for name in LISTS), *more,
                 *(f"/?{query}" for query in CARDS)]
    for address in addresses:
        page.goto(live_server.url + address)
        assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"], address
        page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
        check(page, address, found, *([] if viewport is WIDE and address not in more else ["light"]))
    page.context.close()
    assert not found, json.dumps(found, indent=1)


def test_axe_finds_nothing_while_something_is_asked_or_told(chromium, live_server, fleet):  # noqa: F811
    page, found = open_page(chromium, live_server), {}
    page.emulate_media(reduced_motion="reduce")
    page.locator(".problem summary").first.click(position={"x": 5, "y": 5})
    check(page, "a problem opened", found)
    page.locator(".problem [data-act]").first.click()
    expect(page.locator("#act")).to_be_visible()
    check(page, "acting", found)
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.locator("#words")).to_be_visible()
    check(page, "words", found)
    page.goto(live_server.url + "/admin/hosts")
    page.locator("[data-remove]").first.click()
    check(page, "a question", found)
    page.keyboard.press("Escape")
    page.get_by_label("Name").first.fill("pve9")
    page.get_by_role("button", name="Register host").click()
    expect(page.locator("#token")).to_be_visible()
    check(page, "a token", found)
    page.goto(live_server.url + "/?host=pve1")
    live_server.stop()
    expect(page.locator("#frozen")).to_be_visible()
    check(page, "the server lost", found)
    page.context.close()
    assert not found, json.dumps(found, indent=1)


def test_axe_finds_nothing_before_there_is_a_host_or_a_log_in(chromium, live_server: LiveServer):  # noqa: F811
    page, found = open_page(chromium, live_server), {}
    check(page, "no host", found)
    link = live_server.command("create-kiosk-link", "hall").stdout.partition("LINK: ")[2].split()[0]
    page.context.clear_cookies()
    page.goto(live_server.url + "/login")
    check(page, "log-in", found)
    page.fill("input[name=password]", PASSWORD + "!")
    page.click("button[type=submit]")
    check(page, "log-in refused", found)
    Fleet(live_server).report("pve1")
    page.goto(link)
    check(page, "kiosk", found)
    page.context.close()
    assert not found, json.dumps(found, indent=1)


def test_axe_would_find_something(chromium, live_server: LiveServer):  # noqa: F811
    page = open_page(chromium, live_server)
    page.evaluate("document.querySelector('main').append(document.createElement('img'))")
    page.evaluate("document.querySelector('.posture-text strong').style.color = 'gray'")
    assert {told.split(":")[0] for told in violations(page)} == {" image-alt", "light color-contrast", "dark color-contrast"}
    page.context.close()
