"""Sixteen things that operators come to the page for, done in Chromium over a played fleet of 20 hosts. Each has a most
of clicks and keys; `-s` prints how many of each it took, and the seconds of the browser.

    the fleet -> the operator -> looking (a-e, i-m) -> acting (f, g, h, n) -> giving away (o, p)
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import PASSWORD, LiveServer
from fleet import PlayedHost, Sender, host_name, load_recordings, recording_of, register
from playwright.sync_api import Locator, Page, expect
from test_page import REFRESHED, chromium, open_page  # noqa: F401 — fixtures
from test_page_alerts import HttpSink, hook

FILLS_UP = 14  # the host whose pool is full within days: see troubles.SICK


# the fleet


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder, sink = tmp_path_factory.mktemp("tasks"), HttpSink()
    (folder / "server.toml").write_text(hook(sink.url, name="ops"))
    running = LiveServer(folder, SERVER_CONFIG=str(folder / "server.toml"))
    running.start()
    options = argparse.Namespace(server=running.url, state=folder / "tokens", count=20, interval=60, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEET_API_TOKEN", running.api_token("fleet", "--admin"))
        tokens, new = register(options)
    (usual, troubled), now = load_recordings(), time.time()
    hosts = [PlayedHost(n, recording_of(n, usual, troubled), tokens[host_name(n)], now, 1) for n in range(20)]
    sender = Sender(hosts, options, new, None)  # type: ignore[arg-type]
    for number, host in enumerate(hosts):
        host.kept = host.backfill_days(now) if number == FILLS_UP else []
        sender.post(host, [*host.kept, host.report(now)])
    yield running
    running.stop()
    sink.close()


# the operator


class Operator:
    """Somebody at the page, whose clicks and keys are counted."""

    def __init__(self, page: Page, url: str):
        self.page, self.url = page, url
        self.clicks = self.keys = 0
        self.began = time.monotonic()

    def click(self, what: Locator, **where) -> None:
        self.clicks += 1
        what.first.click(**where)

    def type(self, *keys: str) -> None:
        """Words are typed letter by letter."""
        for key in keys:
            self.keys += 1 if key in ("Enter", "Escape") else len(key)
            self.page.keyboard.press(key) if key in ("Enter", "Escape") else self.page.keyboard.type(key)

    def tab(self, name: str) -> None:
        self.click(self.page.locator(".tab, .answers a", has_text=re.compile(rf"^\s*{name}")))
        expect(self.page.locator(".tab[aria-current], .answers a[aria-current]").first).to_contain_text(name)

    @property
    def card(self) -> Locator:
        return self.page.locator("#drawer")

    @property
    def rows(self) -> Locator:
        return self.page.locator(".lists .row")


TOOK: dict[str, tuple[int, int, float]] = {}


@pytest.fixture(scope="module")
def seat(chromium, played) -> Iterator[Page]:  # noqa: F811
    page = open_page(chromium, played)
    yield page
    assert page.faults == []  # type: ignore[attr-defined]
    page.context.close()
    print("\ntask                                     clicks  keys  seconds")
    for task, (clicks, keys, seconds) in TOOK.items():
        print(f"{task:<40} {clicks:>6} {keys:>5} {seconds:>8.1f}")


@pytest.fixture
def operator(seat, played, request) -> Iterator[Operator]:
    """At the front page, as it is opened; afterwards what was done is counted and held against the most of it."""
    seat.goto(played.url + "/")
    expect(seat.locator(".problem").first).to_be_visible()
    somebody = Operator(seat, played.url)
    yield somebody
    TOOK[request.node.name.removeprefix("test_")] = somebody.clicks, somebody.keys, time.monotonic() - somebody.began
    clicks, keys = request.function.most
    assert somebody.clicks <= clicks and somebody.keys <= keys, (somebody.clicks, somebody.keys)


def most(clicks: int, keys: int = 0) -> Callable[[Any], Any]:
    def mark(test: Any) -> Any:
        test.most = clicks, keys
        return test

    return mark


# looking


@most(1)
def test_a_what_is_broken_and_which_disk_to_pull(operator):
    problem = operator.page.locator(".problem", has=operator.page.locator(".problem-text", has_text=re.compile(r"^\s*Disk .*SMART")))
    operator.click(problem.locator(".problem-host"))
    for told in ("Serial", "/dev/disk/by-id/", "ledctl", "Pulling this one"):
        expect(operator.card).to_contain_text(told)


@most(2)
def test_b_guests_without_a_backup_in_24_hours(operator):
    operator.tab("Guests")
    operator.click(operator.page.get_by_role("link", name="no backup in 24 h"))
    expect(operator.page).to_have_url(re.compile("backup%3E24h"))
    expect(operator.rows.filter(has_text="It is in no backup job").first).to_be_visible()
    late = operator.page.locator(".list-guests .row", has_text=re.compile("backup of guest .* late"))
    expect(late.first).to_be_visible()
    count = operator.page.locator(".chips-total")
    expect(count).not_to_have_text("366 guests")
    assert count.inner_text() == f"{operator.rows.count()} guests"


@most(2)
def test_c_pools_that_are_full_within_30_days(operator):
    operator.tab("Pools")
    operator.click(operator.page.get_by_role("link", name="full within 30 d"))
    expect(operator.rows).to_have_count(1, timeout=REFRESHED)
    expect(operator.rows).to_contain_text(host_name(FILLS_UP))
    expect(operator.rows.locator("[data-label='Full in']")).to_have_text(re.compile(r"^\s*\d+(–\d+)? d"))


@most(2)
def test_d_hosts_that_need_a_reboot_or_have_an_old_kernel(operator):
    operator.tab("Hosts")
    operator.click(operator.page.get_by_role("link", name="needs a reboot"))
    expect(operator.rows.first).to_contain_text("reboot")
    assert 0 < operator.rows.count() < 20
    expect(operator.page.get_by_role("link", name="old kernel")).to_be_visible()


@most(1, 5)
def test_e_where_the_vm_mail_is_and_on_which_disks(operator):
    operator.type("/", "mail")
    expect(operator.page.locator(".hits")).to_contain_text(re.compile(r"guests [1-9]"))
    operator.click(operator.page.locator(".row-link", has_text=re.compile("^mail$")))
    expect(operator.card.locator("#drawer-title")).to_have_text("mail")
    expect(operator.card).to_contain_text(re.compile(r"vm-\d+-disk-0"))
    expect(operator.card).to_contain_text("rpool")


@most(3)
def test_i_30_days_of_a_host_beside_another(operator):
    operator.click(operator.page.locator(".tile", has_text=host_name(0)))
    expect(operator.card.locator(".chart").first).to_be_visible()
    operator.click(operator.card.get_by_role("button", name="30 d"))
    expect(operator.page).to_have_url(re.compile("range=30d"))
    operator.click(operator.card.locator("[data-beside]"))
    operator.card.locator("[data-beside]").fill(host_name(1))
    operator.card.locator("[data-beside]").blur()
    expect(operator.page).to_have_url(re.compile(f"beside={host_name(1)}"))
    expect(operator.card.locator("figcaption", has_text=f"CPU, {host_name(1)}")).to_be_visible()


@most(2)
def test_j_when_each_pool_was_scrubbed_and_whose_scrub_is_oldest(operator):
    operator.tab("Pools")
    operator.click(operator.page.locator(".list th a", has_text="Last scrub"))
    expect(operator.page.locator("th[aria-sort]")).to_contain_text("Last scrub")
    ages = operator.page.locator(".list td[data-label='Last scrub'] time")
    times = [float(age.get_attribute("data-unix")) for age in ages.all()]
    assert times == sorted(times) and len(times) > 10


@most(1)
def test_k_snapshots_of_the_fleet_and_who_lacks_them(operator):
    operator.tab("Snapshots")
    expect(operator.rows.first).to_contain_text("autosnap")
    assert operator.rows.count() > 20


@most(1)
def test_l_replication_ha_and_quorum_of_a_cluster(operator):
    operator.click(operator.page.locator(".problem", has_text=re.compile("HA service")).locator(".problem-host"))
    for told in ("quorate", "HA", "error"):
        expect(operator.card).to_contain_text(told)


@most(2)
def test_m_what_happened_last_night(operator):
    operator.tab("Timeline")
    expect(operator.rows.first).to_be_visible()
    operator.click(operator.page.get_by_role("link", name="last night"))
    expect(operator.page).to_have_url(re.compile(r"since=\d+&until=\d+"))
    since, until = (float(parse_qs(urlsplit(operator.page.url).query)[name][0]) for name in ("since", "until"))
    for _ in range(80):  # until the rows are those of the night, of which a fleet that was just made has none
        times = operator.page.locator(".list .c-time time").evaluate_all("all => all.map((each) => Number(each.dataset.unix))")
        if all(since <= at <= until for at in times):
            break
        operator.page.wait_for_timeout(100)
    assert all(since <= at <= until for at in times)


# acting


@most(3)
def test_f_two_hours_of_maintenance(operator):
    operator.click(operator.page.locator(".tile", has_text=host_name(3)))
    operator.click(operator.card.get_by_role("button", name="Maintenance"))
    dialog = operator.page.get_by_role("dialog", name="Maintenance")
    expect(dialog).to_contain_text("in 2 h")
    operator.click(dialog.locator("[type=submit]"))
    expect(operator.card).to_contain_text("maintenance until")
    operator.page.get_by_role("button", name="Undo").click()


@most(0, 3)
def test_g_a_problem_is_acknowledged_until_it_is_worse(operator):
    seen = operator.page.locator(".acknowledged > summary")
    expect(seen).to_have_count(0)
    operator.type("j", "a")
    expect(operator.page.get_by_role("dialog", name="Acknowledge")).to_contain_text("Quiet until it gets worse.")
    operator.type("Enter")
    expect(seen).to_have_text("1 acknowledged", timeout=REFRESHED)
    operator.page.get_by_role("button", name="Undo").click()
    expect(seen).to_have_count(0, timeout=REFRESHED)


@most(3, 10)
def test_h_a_host_is_added(operator):
    operator.click(operator.page.locator(".tab", has_text="Manage hosts"))
    operator.click(operator.page.locator("#register [name=name]"))
    operator.type("pve-new-1", "Enter")
    expect(operator.page.locator('#token [data-fill="token"]')).to_contain_text("whsec_")
    operator.click(operator.page.get_by_role("button", name="Copy command"))
    expect(operator.page.locator("[data-steps]")).to_contain_text("waiting for the first report")
    operator.page.get_by_role("button", name="I have stored it").click()


@most(2)
def test_n_a_channel_is_tested(operator):
    operator.tab("Alerts")
    operator.click(operator.page.get_by_role("button", name="Send a test"))
    expect(operator.page.locator("#delivery")).to_contain_text("The test was accepted by the channel.")


# giving away


@most(1)
def test_o_a_view_is_shared_and_opens_after_the_log_in(operator, chromium):  # noqa: F811
    address = f"{operator.url}/?tab=guests&q=mail&sort=-cpu_ratio"
    operator.page.goto(address)
    operator.click(operator.page.get_by_role("button", name="Copy link"))
    expect(operator.page.get_by_role("button", name=re.compile("Copied|Copy it"))).to_be_visible()
    context = chromium.new_context()
    other = context.new_page()
    other.goto(address)
    other.fill("input[name=password]", PASSWORD)
    other.click("button[type=submit]")
    expect(other).to_have_url(address)
    expect(other.locator("th[aria-sort]")).to_contain_text("CPU")
    context.close()


@most(2)
def test_p_a_list_is_taken_along_as_csv(operator):
    operator.tab("Guests")
    with operator.page.expect_download() as told:
        operator.click(operator.page.locator("[download]"))
    lines = told.value.path().read_text().splitlines()
    assert lines[0].startswith("host,vmid,type,name") and len(lines) > 200
