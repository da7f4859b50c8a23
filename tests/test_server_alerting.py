"""The API behind the page's alerting: a test through a channel, and the preview of changed rules."""

from __future__ import annotations

import sys
import threading
import time

import pytest
from conftest import Client
from test_server_notifications import HOUR, degraded, deliver, hook, make, sink  # noqa: F401

import server


def client_of(sim, *, admin=True) -> Client:
    client = Client(sim.monitor)
    token = sim.write(lambda db: server.create_api_token(db, f"tests-{admin}", sim.now, admin=admin, days=None))
    client.headers = {"Authorization": f"Bearer {token}"}
    return client


# --- a test through a channel ---


def test_a_test_goes_out_at_once_and_is_on_record(make, sink):  # noqa: F811
    sim = make(hook(sink.url))
    client = client_of(sim)
    assert client.get("/api/v1/channels").json()["items"][0]["last_sent_at"] is None
    answer = client.send("POST", "/api/v1/channels/hook/test", {})
    assert answer.status == 200 and answer.json() == {"name": "hook", "sent_at": sim.now}
    assert [one["kind"] for one in sink.json()["alerts"]] == ["test"]
    assert client.get("/api/v1/channels").json()["items"][0]["last_sent_at"] == sim.now
    assert client.get("/api/v1/overview").json()["last_notification_at"] == sim.now
    assert "Told hook: [TEST]" in client.get("/api/v1/events").json()["items"][0]["message"]


def test_tests_neither_delay_an_alert_nor_use_up_its_hour(make, sink):  # noqa: F811
    sim = make(hook(sink.url))
    client = client_of(sim)
    for _ in range(server.MESSAGES_AT_ONCE + 1):
        assert client.send("POST", "/api/v1/channels/hook/test", {}).status == 200
    degraded(sim)
    deliver(sim)
    assert sink.json()["alerts"][0]["rule"] == "pool-state"


def test_a_test_that_is_not_taken_says_why_and_is_not_repeated(make, sink):  # noqa: F811
    sim = make(hook(sink.url))
    client, sink.status = client_of(sim), 503
    answer = client.send("POST", "/api/v1/channels/hook/test", {})
    assert (answer.status, answer.code) == (502, "undelivered") and "HTTP 503" in answer.json()["detail"]
    sink.status = 200
    sim.now += HOUR
    deliver(sim)
    assert sink.got == []
    assert client.get("/api/v1/channels").json()["items"][0]["last_sent_at"] is None


def test_only_an_admin_tests_and_only_channels_there_are(make, sink):  # noqa: F811
    sim = make(hook(sink.url))
    assert client_of(sim, admin=False).send("POST", "/api/v1/channels/hook/test", {}).status == 403
    assert client_of(sim).send("POST", "/api/v1/channels/other/test", {}).code == "not_found"
    assert client_of_nobody(sim).send("POST", "/api/v1/channels/hook/test", {}).status == 401
    assert sink.got == []


def client_of_nobody(sim) -> Client:
    return Client(sim.monitor)


def test_what_was_given_up_stays_in_sight_after_the_channel_works_again(make, sink):  # noqa: F811
    shown = server.channel_shown
    row = {"last_sent_at": 10.0, "last_error": None, "last_error_at": None, "given_up": 0}
    assert shown(row)["look"] == "ok"
    assert shown({**row, "last_sent_at": None})["look"] == "unknown"
    assert shown({**row, "last_error": "HTTP 503", "last_error_at": 11.0})["look"] == "critical"
    assert shown({**row, "last_error": "HTTP 503", "last_error_at": 9.0, "given_up": 1})["look"] == "warning"
    assert shown({**row, "last_sent_at": None, "last_error": "HTTP 503", "last_error_at": 9.0})["look"] == "critical"


# --- the preview of changed rules ---


@pytest.fixture
def with_history(make):  # noqa: F811
    """A host whose CPU was at 70 % for an hour, by the real clock: the preview is another process."""
    sim = make("[rules.memory]\nenabled = false\n")
    sim.now = time.time() - 2 * HOUR
    for _ in range(60):
        sim.now += 60
        sim.send("pve1", node={"name": "pve1", "cpu_ratio": .7})
    sim.now = time.time()
    return sim


def replay(client: Client, **wanted):
    return client.send("POST", "/api/v1/rules/replay", wanted)


def test_changed_rules_tell_what_would_have_fired_and_change_nothing(with_history):
    client = client_of(with_history)
    assert replay(client, since=86400).json()["items"] == []
    answer = replay(client, since=86400, settings="[rules.cpu]\nwarn = 0.6\n").json()
    assert [(one["rule"], one["host"], one["severity"]) for one in answer["items"]] == [("cpu", "pve1", "warning")]
    assert answer["complete"] is True and answer["total"] == 1
    assert abs(answer["since"] - (with_history.now - 2 * HOUR)) < 400  # to the 5 minutes
    assert replay(client, since=600, settings="[rules.cpu]\nwarn = 0.6\n").json()["items"] == []
    assert client.get("/api/v1/alerts?state=all").json()["total"] == 0
    assert with_history.fleet.layers is with_history.monitor.settings.layers


@pytest.mark.parametrize(("settings", "line", "words"), [
    ("[rules.cpu]\nwarn = 'x'\n", 2, "rules.cpu.warn: should be a number"),
    ("\n\n[rules.no-such]\n", 3, "there is no rule"),
    ("[rules.cpu]\nwarn = = 1\n", 2, "Invalid value"),
    ("[rules.cpu]\nwarn = \"", 2, ""),
    ("[[channels]]\nname = 'a'\nkind = 'pigeon'\n", 3, "one of: email"),
    ("a = " + "[" * 20000, 1, ""),
])
def test_a_mistake_is_told_with_line_and_reason(make, settings, line, words):  # noqa: F811
    answer = replay(client_of(make("")), since=3600, settings=settings)
    assert (answer.status, answer.code) == (400, "invalid_request")
    problem = answer.json()
    assert problem["line"] == line and words in problem["detail"] and problem["pointer"] == "/settings"


@pytest.mark.parametrize("wanted", [{"since": 5}, {"since": "1d"}, {"since": True}, {"since": 1e12}, {"since": 3600, "settings": 1},
                                    {"since": 3600, "config": "/etc/passwd"}])
def test_a_request_that_makes_no_sense_is_refused(make, wanted):  # noqa: F811
    assert replay(client_of(make("")), **wanted).status == 400


def test_a_reader_may_not_preview(make):  # noqa: F811
    assert replay(client_of(make(""), admin=False), since=3600).status == 403


def test_a_preview_ends_at_its_limit_and_says_that_it_is_a_part(with_history, monkeypatch):
    monkeypatch.setattr(server, "REPLAY_SECONDS", 0.000001)
    monkeypatch.setattr(server.subprocess, "run", patient(server.subprocess.run))
    answer = replay(client_of(with_history), since=86400, settings="[rules.cpu]\nwarn = 0.6\n").json()
    assert answer["complete"] is False and answer["items"] == []


def patient(run):
    """The same, with time for the other process to start."""
    return lambda *argv, **more: run(*argv, **{**more, "timeout": 60})


def test_one_that_hangs_is_ended_and_the_writer_never_waits_for_it(with_history, monkeypatch, tmp_path):
    program = tmp_path / "hangs"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(server, "REPLAY_SECONDS", 0.5)
    client, answers = client_of(with_history), []
    thread = threading.Thread(target=lambda: answers.append(replay(client, since=86400)))
    began = time.monotonic()
    thread.start()
    while not with_history.monitor.replaying.locked():
        time.sleep(0.01)
    assert replay(client, since=86400).code == "busy"  # one at a time
    written = time.monotonic()
    with_history.send("pve1", node={"name": "pve1", "cpu_ratio": .7})
    assert time.monotonic() - written < 0.4
    thread.join(20)
    assert answers[0].code == "busy" and "shorter time" in answers[0].json()["detail"]
    assert time.monotonic() - began < 10
    assert not with_history.monitor.replaying.locked()
