"""Attacks by names: in the head of a mail, and on the page in a browser."""

from __future__ import annotations

import base64
import email
import email.policy
import time

import pytest
from conftest import LiveServer, build_disk, build_guest, build_pool, build_report, build_storage, encode, sign
from test_end_to_end import wait_for
from test_page import chromium, fleet, page  # noqa: F401
from test_server_notifications import smtp  # noqa: F401

import server

FORGED = [
    "a\r\nBcc: evil@x", "a\nBcc: evil@x", "a\rBcc: evil@x", "a\x0bBcc: e@x", "a\x85Bcc: e@x", "a\u2028Bcc: e@x",
    "=?utf-8?q?hello=0D=0ABcc=3A_evil=40x?=", "=?utf-8?q?x=0D=0AReply-To:_e@evil.example=0D=0AX:?= =?utf-8?q?=0D=0A=0D=0A<h1>?=",
    "=?utf-8?b?" + base64.b64encode(b"x\r\nBcc: e@x\r\n\r\nbody").decode() + "?=", "x" * 70 + " =?utf-8?q?=0D=0ABcc:_e?= " + "y" * 70,
    "=?utf-7?q?+AA0ACg-Bcc:?=", "é=?utf-8?q?=0ABcc:_e=40x?=", "=?utf-8?q?=ff=fe?=", "\u00a0=??q?=ED=A0=80?=Z😀", "\ud800", "= ?=?utf-8?q?=0A?=",
]  # fmt: skip
HEAD = {"subject", "from", "to", "date", "message-id", "content-type", "content-transfer-encoding", "mime-version",
        "auto-submitted"}  # fmt: skip


@pytest.mark.parametrize("name", FORGED, ids=lambda name: ascii(name)[:30])
def test_no_name_writes_into_the_head_of_a_mail(name):
    options = {"host": "localhost", "from": "monitor@example.com", "to": ["ops@example.com"]}
    body = {**server.canary("https://monitor.example.com", 1.0), "subject": server.one_line(f"critical: pool {name}")}
    mail = email.message_from_bytes(server.write_mail(options, "msg_1", body), policy=email.policy.default)
    extra = {header.lower() for header in mail} - HEAD
    assert extra <= {header for header in extra if header.startswith(("x-proxmon", "list-", "references", "in-reply"))}
    assert mail["To"] == "ops@example.com" and mail["From"] == "monitor@example.com"
    assert len(mail["Subject"].splitlines()) == 1


def test_a_report_with_such_names_becomes_a_mail_of_ours_alone(tmp_path, smtp):  # noqa: F811
    """From the report to the mail as it arrives, by a real server."""
    settings = tmp_path / "server.toml"
    settings.write_text(f'[[channels]]\nname = "mail"\nkind = "email"\nhost = "127.0.0.1"\nport = {smtp.port}\nsecurity = "plain"\n'
                        'from = "monitor@example.com"\nto = ["ops@example.com"]\n')  # fmt: skip
    live = LiveServer(tmp_path, SERVER_CONFIG=str(settings))
    token = live.register("pve1")
    live.start()
    try:
        names = [name for name in FORGED if name.isascii() or name.isprintable()]
        pools = [{"name": name, "guid": str(number), "state": "FAULTED"} for number, name in enumerate(names)]
        body = encode(build_report(at=time.time(), pool_states=pools, pools=None))
        answer = live.request("POST", "/api/v1/hosts/pve1/reports", body, Content_Type="application/json",
                              **sign(token, body, time.time()))  # fmt: skip
        assert answer.status == 200, answer.body
        wait_for(lambda: sum(mail.count(b"is FAULTED") for mail in smtp.mails) >= 3)
    finally:
        live.stop()
    for raw in smtp.mails:
        mail = email.message_from_bytes(raw, policy=email.policy.default)
        assert {header.lower() for header in mail} <= HEAD
        assert mail["To"] == "ops@example.com" and "FAULTED" in mail.get_content()
        assert mail.get_content_type() == "text/plain" and not mail.get_content().lstrip().startswith("<h1>")


SCRIPTS = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"><svg onload=alert(1)>", "javascript:alert(1)",
           "' onmouseover='alert(1)", "{{7*7}}", "<iframe src=https://evil.example>", "\u202e<b>"]  # fmt: skip


def test_no_name_runs_or_loads_anything_on_the_page(page, fleet, live_server):  # noqa: F811
    """The page's fixture fails for each dialog, script error and whatever its CSP had to stop."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for number, script in enumerate(SCRIPTS):
        fleet.report("evil", guests=[build_guest(100 + n, name=script, tags=[script]) for n in range(2)],
                     storages=[build_storage(script, active=False)], pool_states=[{"name": script, "guid": "1", "state": "FAULTED"}],
                     pools=[build_pool(script, guid="1", state="FAULTED", vdevs=[build_disk(script, state="FAULTED", reason=script)])],
                     node={"name": "evil", "pve_version": script, "kernel": script}, seq_note=[script, number])  # fmt: skip
        for path in ("/", "/?tab=guests", "/?tab=pools", "/?host=evil"):
            page.goto(live_server.url + path)
        assert page.locator("main script, main iframe, main img, main svg[onload]").count() == 0
    assert asked and all(url.startswith(live_server.url) for url in asked)
