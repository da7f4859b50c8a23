"""The outbox: no message stands before another, no host crowds out another, and whatever a far end does is on record."""

from __future__ import annotations

import email
import email.policy
import json
import random
import smtplib
import sqlite3
import time

import pytest
from test_server_notifications import DAY, HOUR, MINUTE, degraded, deliver, hook, make, sink, smtp  # noqa: F401

import server


def mail_channel(port, name="mail"):
    return (f'[[channels]]\nname = "{name}"\nkind = "email"\nhost = "127.0.0.1"\nport = {port}\nsecurity = "plain"\n'
            'from = "a@example.com"\nto = ["b@example.com"]\n')


def live(sim, seconds, step=5, report=None):
    """Time passes as in life: the rules are judged and the channels work."""
    end = sim.now + seconds
    while sim.now < end:
        sim.now += step
        if report:
            report()
        sim.turn()
        deliver(sim)


def messages(sim):
    return [dict(row) for row in sim.monitor.store.reader().execute("SELECT * FROM message ORDER BY created_at")]


# --- a message that is not taken stands before no other ---

HALF_A_PAIR = "\xa0=??q?=ED=A0=80?=Z\N{GRINNING FACE}"  # Python's email package decodes this to half a surrogate pair
FORGED = "=?utf-8?q?x=0D=0AReply-To:_e@evil.example=0D=0AX:?= =?utf-8?q?=0D=0A=0D=0A<h1>log_in_here?="


@pytest.mark.parametrize("name", [HALF_A_PAIR, FORGED, "=?utf-8?q?=00?=", "=?bogus?q?x?=", "x" * 5000])
def test_a_name_that_no_mail_can_hold_is_told_all_the_same(make, smtp, name):  # noqa: F811
    sim = make(mail_channel(smtp.port))
    degraded(sim, name=name)
    live(sim, 2 * MINUTE)
    mail = email.message_from_bytes(smtp.mails[0], policy=email.policy.default)
    assert mail["Subject"].startswith("[CRITICAL] pve1: ") and mail["Reply-To"] is None
    assert "https://monitor.example/?host=pve1" in mail.get_content()


def test_a_head_that_was_not_written_like_this_is_refused(monkeypatch):
    options = {"from": "a@example.com", "to": ["b@example.com"]}
    body = {"subject": "[CRITICAL] all is well", "items": [], "left_out": {}}
    assert b"Subject: [CRITICAL] all is well\r\n" in server.write_mail(options, "m", body)
    for subject in (FORGED, "=?utf-8?q?x=0ABcc:_e@evil.example?=", "=?utf-8?q?x=0D=0A=0D=0Abody?="):
        try:
            written = server.write_mail(options, "m", {**body, "subject": subject})
        except (server.Undelivered, ValueError):  # newer Pythons refuse it themselves
            continue
        assert b"evil" not in written.partition(b"\r\n\r\n")[0] or b"\nBcc" not in written
    as_bytes = email.message.EmailMessage.as_bytes
    monkeypatch.setattr(email.message.EmailMessage, "as_bytes",
                        lambda mail, **more: as_bytes(mail, **more).replace(b"Date:", b"Bcc: evil@example.com\r\nDate:", 1))
    with pytest.raises(server.Undelivered):
        server.write_mail(options, "m", body)


class Filter:
    """A far end that finds fault with some texts."""

    def __init__(self, monkeypatch, error):
        self.error, self.taken = error, []
        monkeypatch.setitem(server.KINDS, "slack", server.KINDS["slack"]._replace(send=self.send))

    def send(self, options, message_id, body):
        if "GTUBE" in server.message_text(body):
            raise self.error
        self.taken.append(body)


WRONG = [server.Undelivered("HTTP 422", tries=3), server.Undelivered("HTTP 403", tries=6), RuntimeError("surprise"),
         UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no")]


@pytest.mark.parametrize("error", WRONG, ids=lambda error: type(error).__name__ + str(getattr(error, "tries", "")))
def test_what_a_filter_refuses_delays_nobody_and_is_told_in_a_safe_form(make, monkeypatch, error):  # noqa: F811
    sim, far = make(hook("http://x.example/", kind="slack")), Filter(monkeypatch, error)
    sim.host("pve2")
    degraded(sim, name="GTUBE")
    live(sim, 10)
    assert far.taken == [] or far.taken[0]["safe"]
    degraded(sim, host="pve2")
    live(sim, 35)
    assert [item for body in far.taken for item in body["items"] if item["message"] == "Pool tank is DEGRADED."]
    live(sim, 10 * MINUTE)
    safe = next(body for body in far.taken if body.get("safe"))
    assert "GTUBE" not in json.dumps(safe) and "pve1: pool-state (critical)" in safe["subject"]
    assert not sim.events("notification-given-up")


def test_what_is_refused_in_its_safe_form_too_is_given_up_and_told_through_the_others(make, sink, monkeypatch):  # noqa: F811
    sim = make(hook("http://x.example/", kind="slack", name="chat") + hook(sink.url))
    def refuse(*_):
        raise server.Undelivered("HTTP 400 no", tries=3)

    monkeypatch.setitem(server.KINDS, "slack", server.KINDS["slack"]._replace(send=refuse))
    degraded(sim)
    live(sim, 20 * MINUTE, step=20, report=lambda: degraded(sim))
    lost = [item for got in range(len(sink.got)) for item in sink.json(got)["alerts"] if item["kind"] == "lost"]
    assert len(lost) == 1 and "chat did not take a message (1 critical)" in lost[0]["message"]
    assert lost[0]["severity"] == "critical" and len(sim.events("notification-given-up")) == 1
    assert server.channel_rows(sim.monitor.store.reader(), sim.fleet)[0]["waiting"] == 0


def test_two_channels_that_fail_do_not_tell_each_other_for_ever(make, monkeypatch):  # noqa: F811
    sim = make(hook("http://x.example/", kind="slack", name="a") + hook("http://x.example/", kind="slack", name="b"))
    def refuse(*_):
        raise server.Undelivered("HTTP 400 no", tries=3)

    monkeypatch.setitem(server.KINDS, "slack", server.KINDS["slack"]._replace(send=refuse))
    degraded(sim)
    live(sim, HOUR, step=20, report=lambda: degraded(sim))
    assert len(messages(sim)) == 4 and all(row["given_up_at"] for row in messages(sim))


@pytest.mark.parametrize(("status", "tries"), [
    (400, 3), (413, 3), (422, 3), (410, 3), (403, 6), (401, None), (404, None), (408, None), (425, None), (429, None),
    (500, None), (502, None), (503, None)])
def test_which_answers_find_fault_with_the_message(sink, status, tries):  # noqa: F811
    sink.status = status
    with pytest.raises(server.Undelivered) as error:
        server.post(sink.url, {})
    assert error.value.tries == tries


@pytest.mark.parametrize(("error", "tries"), [
    (smtplib.SMTPDataError(554, b"spam"), 3), (smtplib.SMTPDataError(452, b"later"), None),
    (smtplib.SMTPAuthenticationError(535, b"wrong"), None), (smtplib.SMTPSenderRefused(550, b"no", "a"), None),
    (smtplib.SMTPServerDisconnected("gone"), None)])
def test_which_mail_errors_find_fault_with_the_message(monkeypatch, error, tries):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(server.smtplib, "SMTP", fail)
    with pytest.raises(server.Undelivered) as undelivered:
        server.send_email({"host": "localhost", "security": "plain", "from": "a@b", "to": ["c@d"]}, "m",
                          server.canary("http://x", 1.0))
    assert undelivered.value.tries == tries


def test_what_ends_in_maintenance_while_it_waits_is_never_said(make, sink):  # noqa: F811
    sim = make(hook(sink.url))

    def report(*names):
        sim.send("pve1", pool_states=[{"name": name, "guid": name, "state": state} for name, state in names])

    report(("a", "DEGRADED"), ("b", "ONLINE"))
    deliver(sim)
    sim.now += 5
    report(("a", "DEGRADED"), ("b", "DEGRADED"))  # waits for the 30 s of its group
    sim.write(lambda db: server.update_host(db, "pve1", {"maintenance_until": sim.now + 5 * MINUTE}, sim.now))
    sim.now += 5
    report(("a", "DEGRADED"), ("b", "ONLINE"))
    live(sim, 10 * MINUTE, step=20, report=lambda: report(("a", "DEGRADED"), ("b", "ONLINE")))
    assert [item["object"] for number in range(len(sink.got)) for item in sink.json(number)["alerts"]] == ["pools/a"]


# --- whatever goes wrong is on record, and no address is told ---


def test_an_error_whose_text_breaks_off_is_recorded_and_backed_off(make, monkeypatch):  # noqa: F811
    sim = make(hook("http://x.example/", kind="slack"))
    tries = []

    class Broken:
        def read1(self, _):
            raise ConnectionResetError("in the middle")

        def close(self):
            pass

    def answer(request, timeout):
        tries.append(sim.now)
        raise server.urllib.error.HTTPError(request.full_url, 500, "no", {}, Broken())

    monkeypatch.setattr(server.OPENER, "open", answer)
    degraded(sim)
    live(sim, 4 * MINUTE)
    row, = messages(sim)
    assert row["error"] == "HTTP 500 " and row["attempts"] == len(tries)
    assert [b - a for a, b in zip(tries, tries[1:], strict=False)] == [5, 10, 30, 60, 120]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/SECRET", "http://127.0.0.1:1/SEC RET", "http://[::1/SECRET",
                                 "http://x:99999/SECRET", "http://nope.invalid/SECRET"])
def test_a_secret_address_is_in_no_error(url):
    with pytest.raises(server.Undelivered) as error:
        server.post(url, {})
    assert "SEC" not in str(error.value)


def test_an_answer_that_drips_holds_nobody(make):  # noqa: F811
    import socket
    import threading
    listener = socket.create_server(("127.0.0.1", 0))

    def drip():
        peer, _ = listener.accept()
        peer.recv(1 << 16)
        peer.sendall(b"HTTP/1.1 500 no\r\nContent-Length: 1000\r\n\r\nx")
        ended.wait(20)
        peer.close()

    ended = threading.Event()
    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    began = time.monotonic()
    with pytest.raises(server.Undelivered, match="HTTP 500 x"):
        server.post(f"http://127.0.0.1:{listener.getsockname()[1]}/", {})
    assert time.monotonic() - began < 3
    ended.set()
    thread.join(5)
    listener.close()


# --- one host against another ---


def test_a_noisy_host_delays_nobody_and_crowds_nobody_out(make, sink):  # noqa: F811
    sim = make(hook(sink.url))
    sim.host("pve2")
    count, fired = 0, None
    for step in range(0, HOUR, 30):
        count += 1
        sim.send("pve1", pool_states=[{"name": f"p{n}", "guid": str(n), "state": "FAULTED"} for n in range(count)])
        if step == 45 * MINUTE:
            degraded(sim, host="pve2")
            fired, got = sim.now, len(sink.got)
        live(sim, 30)
        if fired and sim.now - fired == MINUTE:
            late = [sink.json(number) for number in range(got, len(sink.got))]
            assert [item for body in late for item in body["alerts"] if item["host"] == "pve2"]
    hour = [sink.json(number) for number in range(len(sink.got))]
    assert len(hour) <= 20 + 20 + 1
    many = [item for body in hour for item in body["alerts"] if item["kind"] == "many"]
    assert many and all(item["host"] == "pve1" and "See the page" in item["message"] for item in many)


def test_each_host_is_named_before_any_host_is_named_twice():
    def item(host, number, severity="critical"):
        return server.notice("firing", severity, f"{number}", "", float(number), host=host, rule="cpu")

    items = [item(f"h{host}", number) for host in range(5) for number in range(30)]
    items += [item(f"q{host}", 1000 + host, "warning") for host in range(12)]
    body = server.build_message(items)
    assert len(body["items"]) == 20 and {one["host"] for one in body["items"]} == {one["host"] for one in items}
    assert sum(body["left_out"].values()) + sum(one["children"] or 1 for one in body["items"]) == len(items)
    alone = server.build_message([item("h", number) for number in range(103)], {"h": 40})
    assert [one["kind"] for one in alone["items"]] == ["firing"] * 5 + ["many"]
    assert "98 more alerts: 98 critical" in server.message_text(alone)


def test_20_messages_at_once_then_one_each_3_minutes():
    rng = random.Random(5)
    now, made, tokens, before = 0.0, [], 20.0, 0.0
    for _ in range(3000):
        now += rng.choice((1, 10, 30, 200, 2000))
        tokens, before = min(20.0, tokens + (now - before) / 180), now
        assert server.has_token([at for at in made if at > now - DAY], now) is (tokens >= 1 - 1e-9)
        if tokens >= 1 - 1e-9:
            made.append(now)
            tokens -= 1
    assert len(made) > 500


# --- what far ends make of names ---

MARKUP = "[Log in](https://evil.example) ![](https://evil.example/p.png) @all *b* `c` <https://evil.example|x>"


@pytest.mark.parametrize("kind", ["discord", "mattermost"])
def test_names_are_no_markup(make, sink, kind):  # noqa: F811
    sim = make(hook(sink.url, kind=kind))
    degraded(sim, name=MARKUP)
    deliver(sim)
    text = sink.json().get("content") or sink.json()["text"]
    assert "\\[Log in\\]\\(https" in text and "](https" not in text and "@all" not in text and "\\<https" in text
    assert "\nhttps://monitor.example/?host=pve1" in text  # our own link is one


def test_teams_gets_runs_of_text_that_know_no_markup(make, sink):  # noqa: F811
    sim = make(hook(sink.url, kind="teams"))
    degraded(sim, name=MARKUP)
    deliver(sim)
    card = sink.json()["attachments"][0]["content"]
    assert {block["type"] for block in card["body"]} == {"RichTextBlock"}
    assert card["actions"][0]["url"] == "https://monitor.example/?host=pve1"


def test_alertmanager_knows_an_alert_by_what_does_not_change(make, sink):  # noqa: F811
    sim = make("[rules.pool-capacity]\nhold_seconds = 0\n" + hook(sink.url, kind="alertmanager"))
    for used in (0.84, 0.95, 0.5):
        sim.send("pve1", pools=[{"name": "tank", "capacity_ratio": used}])
        live(sim, 40, step=20)
    sent = [sink.json(number)[0] for number in range(len(sink.got))]
    assert len({json.dumps(alert["labels"]) for alert in sent}) == 1 and "severity" not in sent[0]["labels"]
    assert [alert["annotations"]["severity"] for alert in sent][:2] == ["warning", "critical"]
    assert sent[-1]["endsAt"] <= time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(sim.now))


def test_alertmanager_gets_all_there_is(make, sink):  # noqa: F811
    sim = make(hook(sink.url, kind="alertmanager"))
    sim.send("pve1", pool_states=[{"name": f"p{n}", "guid": str(n), "state": "DEGRADED"} for n in range(60)])
    deliver(sim)
    assert len(sink.json()) == 60


# --- settings that end in a sentence, not in a traceback ---

SLACK = "[[channels]]\nname = 'a'\nkind = 'slack'\nurl = "
MAIL = "[[channels]]\nname = 'm'\nkind = 'email'\nhost = 'h'\n"


@pytest.mark.parametrize(("text", "where"), [
    (SLACK + "'http://[::1/'", "channels.0.url"), (SLACK + "'http://x:99999/'", "channels.0.url"),
    (SLACK + "'http://x/SEC RET'", "channels.0.url"), ("[[channels]]\nname = 'a'\nkind = ['x']", "channels.0.kind"),
    (MAIL + "from = \"a@b\\nBcc: c@d\"\nto = ['b@c']", "channels.0.from"), (MAIL + "from = 'a@b'\nto = []", "channels.0.to"),
    (MAIL + "from = 'a@b'\nto = ['c@d', \"e\\nf@g\"]", "channels.0.to"), (MAIL + "from = 'a@b'\nto = 'c@d'", "channels.0.to"),
    (MAIL + "from = 'a@b'\nto = ['c@d']\nport = -5", "channels.0.port"), ("channels = 5", "channels"),
    (MAIL + "from = 'a@b'\nto = ['c@d']\nsecurity = ['tls']", "channels.0.security"), ("rules = 5", "rules"),
    ("[digest]\nchannels = 'all'", "digest.channels"), ("[digest]\nat = 8", "digest.at"), ("[hosts]\na = 1", "hosts.a"),
    (SLACK + "'http://x/'\nquiet = { from = '22:00' }", "channels.0.quiet.to"),
    (SLACK + "'http://x/'\nrules = ['nonsense']", "channels.0.rules.0"), ("[rules.cpu]\nwarn = nan", "rules.cpu.warn"),
    (SLACK + "'http://x/'\nseverities = ['grave']", "channels.0.severities.0"),
    ("[[channels]]\nname = 'w'\nkind = 'webhook'\nurl = 'http://x/'\nsecret = 'whsec_ä'", "channels.0.secret"),
])
def test_a_mistake_in_the_settings_is_one_sentence(text, where):
    with pytest.raises(server.BadSettings) as mistake:
        server.parse_settings(text)
    assert f": {where}: " in str(mistake.value), str(mistake.value)


# --- the rest ---


def test_a_host_that_sends_nonsense_is_left_out_of_the_digest(make, sink):  # noqa: F811
    sim = make(hook(sink.url) + '[digest]\nweekday = "mon"\n')
    sim.host("pve2")
    sim.write(lambda db: None)
    sim.send("pve1", pools=[{"name": "tank", "capacity_ratio": []}], disks=[{"name": "sda", "wear_ratio": {"x": 1}}],
             backups={"jobs": [{"schedule": 5, "exclude": 5}], "guests": [{"vmid": "x"}]})
    sim.send("pve2", pools=[{"name": "fine", "capacity_ratio": .7}])
    text = sim.write(lambda db: server.digest_text(db, sim.fleet, sim.now))
    assert "pve2 fine" in text


def test_an_alert_over_a_counter_of_64_bits_can_be_acknowledged(make):  # noqa: F811
    sim = make("")
    degraded(sim)
    alert = sim.alerts()[0]["id"]
    sim.write(lambda db: server.update_alert(db, sim.fleet, alert, value=2**63))
    sim.write(lambda db: server.acknowledge(db, sim.fleet, alert, sim.now, by="a", until=None, note=None))
    assert sim.alerts()[0]["acknowledged"]["by"] == "a"


def test_a_loop_wakes_when_something_is_queued(make, sink):  # noqa: F811
    sim = make(hook(sink.url))
    sim.monitor.notifier.start()
    time.sleep(0.3)  # it has looked, and would look again in a minute
    began = time.monotonic()
    degraded(sim)
    while not sink.got and time.monotonic() - began < 10:
        time.sleep(0.01)
    assert sink.got and time.monotonic() - began < 5


def test_who_was_told_before_the_upgrade_is_known_after_it():
    migrations = server.load_migrations()
    before = next(number for number, (up, _) in enumerate(migrations) if any("COLUMN told " in sql for sql in up))
    db = sqlite3.connect(":memory:", isolation_level=None)
    server.migrate(db, migrations[:before])
    db.execute("INSERT INTO alert (id, rule, object, severity, state, message, since, told_severity, told_at) VALUES "
               "(1, 'cpu', '', 'critical', 'firing', 'm', 1, 'critical', 20)")
    for channel, severity, at, not_before, kind in (
            ("a", "warning", 10, 10, "firing"), ("a", "critical", 20, 20, "worse"), ("b", "critical", 20, 20, "firing"),
            ("night", "critical", 20, 9000, "firing")):
        db.execute("INSERT INTO notification (channel, alert_id, body, created_at, not_before) VALUES (?, 1, ?, ?, ?)",
                   [channel, json.dumps({"severity": severity, "kind": kind}), at, not_before])
    server.migrate(db, migrations[:before + 1])
    assert json.loads(db.execute("SELECT told FROM alert").fetchone()[0]) == {"a": ["critical", 20.0],
                                                                              "b": ["critical", 20.0]}
    assert db.execute("SELECT count(*) FROM notification").fetchone()[0] == 3  # the night's is queued in the morning
    db.close()




def test_what_was_never_tried_goes_before_all_that_failed(make, sink):  # noqa: F811
    sim = make(hook(sink.url))

    def fill(db):
        for number in range(4):
            body = json.dumps(server.canary(f"http://{number}", sim.now))
            db.execute("INSERT INTO message (id, channel, body, created_at, due_at, attempts) VALUES (?, 'hook', ?, ?, ?, ?)",
                       [f"msg_{number}", body, sim.now - 90 + number, sim.now - 1, 3 - number])

    sim.write(fill)
    deliver(sim)
    assert [headers["Webhook-Id"] for _, headers, _ in sink.got] == ["msg_3", "msg_2", "msg_1", "msg_0"]


def test_without_a_token_only_what_is_new_and_critical_of_another_host_goes_out(make, sink):  # noqa: F811
    sim = make("[rules.pool-capacity]\nhold_seconds = 0\n" + hook(sink.url))
    sim.host("pve2")
    for number in range(25):
        sim.send("pve1", pool_states=[{"name": f"p{n}", "guid": str(n), "state": "DEGRADED"} for n in range(number + 1)])
        live(sim, 31, step=31)
    before = len(sink.got)
    sim.send("pve2", pools=[{"name": "tank", "capacity_ratio": 0.84}])  # a warning waits
    live(sim, 31, step=31)
    assert len(sink.got) == before
    degraded(sim, host="pve2")
    live(sim, 31, step=31)
    assert len(sink.got) == before + 1
    assert {(item["host"], item["severity"]) for item in sink.json()["alerts"]} >= {("pve2", "critical"), ("pve2", "warning")}


def test_an_acknowledgement_that_ends_because_it_got_worse_is_told_again(make, sink):  # noqa: F811
    sim = make(hook(sink.url))

    def lose(margin):
        sim.send("pve1", pool_states=[{"name": "tank", "guid": "1", "state": "DEGRADED"}],
                 pools=[{"name": "tank", "guid": "1", "state": "DEGRADED", "redundancy_margin": margin}])
        live(sim, 40, step=20)

    lose(1)
    sim.write(lambda db: server.acknowledge(db, sim.fleet, sim.alerts("pool-state")[0]["id"], sim.now, by="a", until=None,
                                            note=None))
    lose(1)
    assert [item["kind"] for item in sim.told()] == ["firing"]
    lose(0)
    assert [item["kind"] for item in sim.told()] == ["firing", "worse"]
