"""The mail to root when nobody takes the reports: opt-in, once a day, with a sendmail that is a real program."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from agent_support import closed_port_url, config_for, wait_for

import agent

HOUR = 3600
SENDMAIL = """#!/bin/sh
[ -e {folder}/hangs ] && exec sleep 60
[ -e {folder}/fails ] && {{ echo 'postdrop: Read-only file system' >&2; exit 75; }}
echo "$@" >> {folder}/argv
cat >> {folder}/mails
echo ===== >> {folder}/mails
"""


class Host:
    """An agent that has been silent, with a mail program of the test's own. `hours` pass as the test says."""

    def __init__(self, folder: Path, more: str = "[alert]\nmail_root_after_hours = 6\n"):
        self.folder, self.more = folder, more
        self.now = time.time()
        self.monotonic = 1000.0
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin/sendmail").write_text(SENDMAIL.format(folder=folder))
        (folder / "bin/sendmail").chmod(0o755)
        self.start()

    def start(self) -> None:
        """As after an upgrade: what is on disk is left."""
        probe = agent.Probe(path=f"{self.folder}/bin:/usr/bin:/bin")
        probe.now = lambda: self.now  # type: ignore[method-assign]
        probe.monotonic = lambda: self.monotonic  # type: ignore[method-assign]
        config = config_for(self.folder, closed_port_url(), self.more)
        self.agent = agent.Agent(config, probe, str(self.folder / "state"))
        self.mail, self.sender, self.probe = self.agent.root_mail, self.agent.sender, probe
        self.mail.turn(self.monotonic)  # the grace begins

    def fail(self, reason: str = "cannot reach https://monitor.example.com: connection refused") -> None:
        self.sender.trouble = reason

    def spool(self, count: int = 1) -> None:
        for _ in range(count):
            self.agent.spool.push(agent.Message(b'{"version":1}'), self.now)

    def look(self, hours: float = 0.0) -> list[str]:
        """Some hours later: the mails so far."""
        self.now += hours * HOUR
        self.monotonic += hours * HOUR + agent.MAIL_GRACE_SECONDS
        self.mail.turn(self.monotonic)
        wait_for(lambda: not self.mail.busy)
        path = self.folder / "mails"
        return path.read_text().split("=====\n")[:-1] if path.exists() else []


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def test_root_is_told_since_when_how_many_wait_and_why(host):
    host.sender.accepted_at = since = host.now
    host.spool(3)
    host.fail("the server says unknown_host\r\nBcc: all@example.com")
    assert host.look(5.9) == []
    (mail,) = host.look(0.2)
    head, _, text = mail.partition("\n\n")
    assert "To: root" in head and "Subject: proxmon: nobody takes the reports of pve-host-01, for 6 hours" in head
    assert agent.utc_text(since) in text and f"Waiting: 3 reports in {host.agent.spool.folder}" in text
    assert "unknown_host" in text and "\nBcc" not in mail
    assert host.agent.config.url in text and "mail_root_after_hours" in text
    assert (host.folder / "argv").read_text() == "-i root\n"


def test_one_mail_a_day_also_over_restarts(host):
    host.spool()
    host.fail()
    assert len(host.look(7)) == 1
    assert len(host.look(23)) == 1
    host.start()
    host.fail()
    assert len(host.look(0.5)) == 1
    assert len(host.look(0.6)) == 2


@pytest.mark.parametrize("more", ["", "[alert]\n", "[alert]\nmail_root_after_hours = 0\n"])
def test_nobody_is_mailed_who_did_not_ask(tmp_path, more):
    host = Host(tmp_path, more)
    host.spool()
    host.fail()
    assert host.look(1000) == []


def test_no_mail_while_reports_are_taken_or_after_a_night_switched_off(host):
    host.spool()
    assert host.look(48) == []  # no trouble: the backlog is on its way
    host.start()  # what waits is two days old; the first tries get their time
    host.fail()
    host.mail.turn(host.monotonic + agent.MAIL_GRACE_SECONDS / 2)
    assert not host.mail.busy and not (host.folder / "mails").exists()
    assert "Since:" in host.look()[0]


def test_a_restart_does_not_begin_the_hours_anew(host):
    host.spool()
    host.fail()
    assert host.look(4) == []
    host.start()
    host.fail()
    assert len(host.look(2.1)) == 1


@pytest.mark.parametrize("how", ["fails", "gone"])
def test_a_mail_that_cannot_be_sent_is_told_and_tried_again(host, capsys, how):
    host.spool()
    host.fail()
    path = host.folder / ("fails" if how == "fails" else "bin/sendmail")
    good = path.read_text() if path.exists() else ""
    path.unlink() if good else path.touch()
    assert host.look(7) == []
    assert ("Read-only file system" if how == "fails" else "not installed") in capsys.readouterr().out
    assert host.mail.next_at == host.monotonic + agent.MAIL_RETRY_SECONDS
    if good:
        path.write_text(good)
        path.chmod(0o755)
    else:
        path.unlink()
    assert len(host.look(1.1)) == 1


def test_a_mail_program_that_hangs_stops_nothing(host):
    host.spool()
    host.fail()
    (host.folder / "hangs").touch()
    host.now += 7 * HOUR
    began = time.monotonic()
    host.mail.turn(host.monotonic + agent.MAIL_GRACE_SECONDS)
    assert host.mail.busy and time.monotonic() - began < 0.5

    def is_over() -> bool:
        host.probe.cancel()  # again and again: the program may not have been started yet
        return not host.mail.busy

    wait_for(is_over, 5)


def test_a_mark_from_a_clock_that_was_ahead_does_not_silence_root(host):
    (host.folder / "state/mailed-root").write_text(f"{int(host.now) + 400 * 86400}\n")
    host.spool()
    host.fail()
    assert len(host.look(7)) == 1


@pytest.mark.parametrize(("more", "key", "reason"), [
    ("[alert]\nmail_root = 3", "alert.mail_root", "unknown key; known here: mail_root_after_hours"),
    ("[alert]\nmail_root_after_hours = '6'", "alert.mail_root_after_hours", "whole number"),
    ("[alert]\nmail_root_after_hours = true", "alert.mail_root_after_hours", "whole number"),
    ("[alert]\nmail_root_after_hours = -1", "alert.mail_root_after_hours", "out of range"),
    ("alert = 6", "", "must be a table"),
])  # fmt: skip
def test_a_mistake_is_refused_with_key_and_reason(tmp_path, more, key, reason):
    with pytest.raises(agent.ConfigError) as caught:
        config_for(tmp_path, closed_port_url(), more)
    assert key in str(caught.value) and reason in str(caught.value)


def test_check_says_whether_root_can_be_told(host):
    (good, text), = agent.check_mail(host.agent.config, host.probe)
    assert good and "6 h" in text and "/bin/sendmail" in text
    empty = agent.Probe(path=str(host.folder / "state"))
    (good, text), = agent.check_mail(host.agent.config, empty)
    assert not good and "not installed" in text
