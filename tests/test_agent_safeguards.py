"""Whether somebody would hear of trouble: settings of zed, Proxmox's notifications, apt's sources.

    settings -> notifications -> apt sources -> collector
"""

from __future__ import annotations

import pytest
from recorded import HOSTS, RecordedProbe

import agent

# settings


@pytest.mark.parametrize(("text", "value"), [
    ('ZED_EMAIL_ADDR="root"\n', "root"),
    ("#ZED_EMAIL_ADDR=root\n", None),
    ('ZED_EMAIL_ADDR="a@example.org"\nZED_EMAIL_ADDR=""\n', ""),   # the shell takes the last
    ("MY_ZED_EMAIL_ADDR=root\n", None),
])
def test_a_shell_setting_is_the_last_one_that_is_no_comment(text: str, value: str | None) -> None:
    assert agent.parse_shell_setting(text, "ZED_EMAIL_ADDR") == value


@pytest.mark.parametrize(("text", "has"), [
    ("user:root@pam:1:0:::ops@example.org:::\n", True),
    ("user:root@pam:1:0::::::\n", False),
    ("user:root@pam:1:0\n", False),
    ("user:joe@pve:1:0:::joe@example.org:::\n", False),
])
def test_root_has_a_mail_address_only_in_its_own_line(text: str, has: bool) -> None:
    assert agent.parse_root_mail(text) is has


# notifications


def test_without_a_file_what_proxmox_ships_counts() -> None:
    assert agent.parse_notifications("") == {
        "notification_targets": 1, "notification_matchers": 1, "matchers_without_target": []}


def test_a_matcher_of_a_target_that_is_off_leads_nowhere() -> None:
    text = "sendmail: mail-to-root\n\tmailto-user root@pam\n\tdisable 1\n\nsmtp: relay\n\tserver mx\n"
    assert agent.parse_notifications(text)["matchers_without_target"] == ["default-matcher"]


def test_a_matcher_that_is_off_is_not_counted() -> None:
    told = agent.parse_notifications("matcher: default-matcher\n\tdisable 1\n\ttarget nobody\n")
    assert (told["notification_matchers"], told["matchers_without_target"]) == (0, [])


# apt sources


def test_one_line_sources_with_options_and_comments() -> None:
    text = "# deb http://x bookworm main\ndeb [arch=amd64 signed-by=/a] http://s bookworm-security main # why\ndeb-src http://y sid main\n"
    assert agent.parse_apt_sources(text, deb822=False) == [("http://s", ["bookworm-security"], ["main"])]


def test_a_deb822_source_that_is_off_is_none() -> None:
    text = "Enabled: no\nTypes: deb\nURIs: http://a\nSuites: trixie\nComponents: pve-enterprise\n\nTypes: deb deb-src\nURIs: http://b\n http://c\nSuites: trixie-security\nComponents: main\n"
    assert [uri for uri, _, _ in agent.parse_apt_sources(text, deb822=True)] == ["http://b", "http://c"]


def test_debian_ten_named_its_security_suite_otherwise() -> None:
    assert agent.judge_apt_sources([("http://s", ["buster/updates"], ["main"])])["security_source"] is False
    assert agent.judge_apt_sources([("http://s", ["trixie-security"], ["main"])])["security_source"] is True


# collector


def test_a_part_that_cannot_be_read_costs_only_itself() -> None:
    class Broken(RecordedProbe):
        def read(self, path: str, limit: int = 4 << 20) -> str:
            if path.endswith("zed.rc"):
                raise agent.SourceError("failed", f"{path}: Input/output error")
            return super().read(path, limit)

    body, absent, errors = agent.collect(Broken(HOSTS / "pve8-mirror"), {}, ["safeguards"])
    assert "zed_mail" not in body["safeguards"] and body["safeguards"]["scrub_scheduled"] is True
    assert "zed.rc" in body["safeguards"]["unknown_reason"] and errors == {}
