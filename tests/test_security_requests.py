"""Attacks on what the server takes from strangers, hosts and browsers: signatures, replays, foreign pages, hostile names."""

from __future__ import annotations

import base64
import csv
import hmac
import io
import json
import re
import time
import urllib.parse

import pytest
from conftest import START, Client, build_guest, build_pool, build_report, build_storage, encode, sign

import server

JSON = {"Content-Type": "application/json"}


def report_path(name: str) -> str:
    return f"/api/v1/hosts/{name}/reports"


def post_signed(client: Client, signed: dict[str, str], body: bytes, host: str = "pve1"):
    return client.request("POST", report_path(host), body, {**JSON, **signed})


# --- signatures ---


@pytest.fixture
def signed(register, client):
    """A report of pve1 with the headers of a good signature."""
    body = encode(build_report(at=START))
    return sign(register("pve1"), body, START), body


def test_everything_that_is_signed_is_covered(client, signed):
    headers, body = signed
    for changed in ({"webhook-id": "msg_2"}, {"webhook-timestamp": str(int(START) + 1)}):
        assert post_signed(client, {**headers, **changed}, body).code == "invalid_token"
    assert post_signed(client, headers, body + b" ").code == "invalid_token"
    assert post_signed(client, headers, body).status == 200


def test_no_weaker_form_of_a_signature_is_taken(client, signed):
    headers, body = signed
    good = headers["webhook-signature"]
    digest = good.removeprefix("v1,")
    for weaker in (digest, f"v1a,{digest}", f"v2,{digest}", f"v0,{digest}", f"V1,{digest}", "v1,", f"v1, {digest}", good.lower(),
                   good[:-1], good + "A", "none", " ".join(["v1,x"] * 1000), good.replace("=", ""),
                   "v1," + base64.b64encode(bytes(32)).decode()):  # fmt: skip
        answer = post_signed(client, {**headers, "webhook-signature": weaker}, body)
        assert (answer.status, answer.code) == (401, "invalid_token"), weaker[:40]


@pytest.mark.parametrize("stamp", ["-1", "1e9", "+5", " 5", "0x10", "١٢٣", "9" * 400, "0" * 300 + "1", "12.5", ""])
def test_a_time_that_is_no_number_is_no_time(client, signed, stamp):
    headers, body = signed
    assert post_signed(client, {**headers, "webhook-timestamp": stamp}, body).status == 401


@pytest.mark.parametrize(("message_id", "stamp"), [("m" * 300, str(int(START))), ("msg", "x"), ("msg", "12.5"), ("msg", "-5"), ("", "1800000000")])
def test_a_good_signature_makes_an_odd_head_no_better(register, client, message_id, stamp):
    """Signed by whoever has the key, over just these words."""
    key, body = base64.b64decode(register("pve1").removeprefix("whsec_")), encode(build_report(at=START))
    digest = hmac.digest(key, f"{message_id}.{stamp}.".encode() + body, "sha256")
    headers = {"webhook-id": message_id, "webhook-timestamp": stamp, "webhook-signature": "v1," + base64.b64encode(digest).decode()}
    assert post_signed(client, headers, body).code == "invalid_token"


@pytest.mark.parametrize(("message_id", "stamp", "code"), [
    ("m" * 256, int(START), ""), ("m" * 257, int(START), "invalid_token"), ("a", int(START) + 300, ""), ("a", int(START) - 300, ""),
    ("a", int(START) + 301, "clock_skew"), ("a", int(START) - 301, "clock_skew"), ("a", f"{int(START):012d}", ""), ("a", f"{int(START):013d}", "clock_skew"),
])  # fmt: skip
def test_where_the_limits_of_a_signed_head_are(register, client, message_id, stamp, code):
    key, body = base64.b64decode(register("pve1").removeprefix("whsec_")), encode(build_report(at=START))
    digest = hmac.digest(key, f"{message_id}.{stamp}.".encode() + body, "sha256")
    headers = {"webhook-id": message_id, "webhook-timestamp": str(stamp), "webhook-signature": "v1," + base64.b64encode(digest).decode()}
    answer = post_signed(client, headers, body)
    assert (answer.status, "") == (200, code) or answer.code == code


def test_only_who_has_the_key_learns_the_servers_clock(client, signed):
    headers = {"webhook-id": "x", "webhook-timestamp": "1", "webhook-signature": "v1,AAAA"}
    answer = post_signed(client, headers, signed[1])
    assert answer.code == "invalid_token" and "server_time" not in answer.json()


def test_no_host_posts_for_another(register, client):
    ours, theirs = register("pve1"), register("pve2")
    body = encode(build_report("pve2", at=START))
    captured = sign(theirs, body, START)
    assert post_signed(client, captured, body, "pve1").code == "invalid_token"
    assert post_signed(client, sign(ours, body, START), body, "pve1").code == "host_mismatch"
    batch = encode([build_report("pve1", at=START), build_report("pve2", at=START)])
    assert post_signed(client, sign(ours, batch, START), batch, "pve1").code == "host_mismatch"
    hidden = body[:-1] + b',"host_id":"pve1"}'  # the same key twice
    post_signed(client, sign(ours, hidden, START), hidden, "pve1")
    assert client.monitor.fleet.find("pve2").last_seen_at is None


def test_what_was_captured_is_worth_nothing_after_rotation_rename_and_removal(register, client, admin):
    body = encode(build_report(at=START))
    captured = sign(register("pve1"), body, START)
    assert admin.send("POST", "/api/v1/hosts/pve1/rotate-token").status == 200
    assert post_signed(client, captured, body).code == "invalid_token"
    assert admin.send("DELETE", "/api/v1/hosts/pve1").status == 204
    assert post_signed(client, captured, body).code == "unknown_host"
    register("pve1")
    assert post_signed(client, captured, body).code == "invalid_token"


# --- other sites ---

FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:4000.evil.example"},
    {"Origin": "http://127.0.0.1:4001"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"X-CSRF-Token": ""},
    {"X-CSRF-Token": "0" * 64},
    {"X-CSRF-Token": "", "Content-Type": "text/plain"},
    {"X-CSRF-Token": "", "Content-Type": "application/x-www-form-urlencoded"},
]


@pytest.mark.parametrize("route", [one for one in server.ROUTES if one.method != "GET" and one.auth not in ("none", "host")],
                         ids=lambda route: f"{route.method} {route.path}")  # fmt: skip
def test_no_write_can_come_from_another_site(client, route):
    client.log_in()
    path = re.sub("<[^>]+>", "1", route.path)
    for foreign in FOREIGN:
        answer = client.request(route.method, path, b"{}", {**client.headers, **JSON, **foreign})
        assert (answer.status, answer.code) == (403, "forbidden"), foreign
    assert client.get("/api/v1/sessions").json()["total"] == 1  # and nothing has been done


def test_no_header_of_a_stranger_is_shown_as_our_own_address(admin, client):
    client.log_in()
    claimed = {"Host": "evil.example", "X_Forwarded_Host": "evil.example", "Forwarded": "host=evil.example"}
    for path in ("/install.sh", "/install/install.sh", "/", "/admin/hosts", "/api/v1/openapi.json"):
        answer = client.get(path, **claimed)
        assert answer.status == 200 and b"evil.example" not in answer.body and "evil" not in str(answer.headers)


# --- hostile names where people and programs read them ---

HOSTILE = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", "＋1", "－1", "＠1", "a\nb", "\x1b]0;t\x07", "\x9b31m",
           "\u202e", 'x"} 1\nevil{a="b', "\\", '\\"', "\x00", "a,b"]  # fmt: skip


@pytest.fixture
def hostile(register, post):
    """A host whose guests, storages and pools have such names."""
    sections = {
        "guests": [build_guest(100 + number, name=name, tags=[name]) for number, name in enumerate(HOSTILE)],
        "storages": [build_storage(name, active=False) for name in HOSTILE],
        "pools": [build_pool(name, guid=str(number)) for number, name in enumerate(HOSTILE)],
        "pool_states": [],
    }
    assert post(register("pve1"), build_report(**sections)).status == 200


LISTS = ["hosts", "guests", "pools", "storages", "disks", "backups", "alerts", "events"]


@pytest.mark.parametrize("name", LISTS)
def test_no_cell_of_csv_is_a_formula(hostile, admin, name):
    answer = admin.get(f"/api/v1/{name}?format=csv&limit=1000")
    assert answer.headers["content-disposition"] == f'attachment; filename="{name}.csv"'
    rows = list(csv.reader(io.StringIO(answer.text, newline="")))
    assert len({len(row) for row in rows}) == 1
    cells = [cell for row in rows[1:] for cell in row if not re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", cell)]
    assert not [cell for cell in cells if re.match(r"[=+\-@\t\r\n＝＋－＠]", cell)]


@pytest.mark.parametrize("name", LISTS)
def test_no_cell_of_text_moves_the_cursor(hostile, admin, name):
    text = admin.get(f"/api/v1/{name}?format=text&limit=1000").text
    assert all(sign == "\n" or sign.isprintable() for sign in text)


def test_no_name_makes_a_metric_of_its_own(hostile, admin):
    line = re.compile(r'(#.*|[a-z_0-9]+(\{[a-z_]+="(?:[^"\\\n]|\\["\\n])*"(,[a-z_]+="(?:[^"\\\n]|\\["\\n])*")*\})? \S+|)')
    lines = admin.get("/metrics").text.split("\n")
    assert len(lines) > 50 and not [text for text in lines if not line.fullmatch(text)]


INJECTIONS = ["' OR 1=1--", "'; DROP TABLE host;--", '" OR ""="', "\\", "%", "\x00", "*", "a" * 5000, "(" * 500, '"' * 2001, "-" * 3000,
              " " * 4000, "pool>" + "9" * 400, "NaN", "inf", "1e400", "0x10", "1_000", "-1", "9" * 20, "２"]  # fmt: skip
ASKED = {
    "/api/v1/guests": ("q", "sort", "limit", "offset", "format", "name", "host", "site", "tag"),
    "/api/v1/alerts": ("state", "q", "sort", "host"),
    "/api/v1/events": ("since", "q", "kind"),
    "/api/v1/hosts/pve1/history": ("series", "from", "to", "step", "format"),
    "/": ("q", "sort", "tab", "offset", "host", "pool", "kiosk"),
}


@pytest.mark.parametrize("path", ASKED)
def test_no_parameter_reaches_the_database_or_holds_the_server(hostile, client, path):
    client.log_in()
    slowest = 0.0
    for parameter in ASKED[path]:
        for text in INJECTIONS:
            began = time.monotonic()
            answer = client.get(f"{path}?{urllib.parse.urlencode({parameter: text})}")
            slowest = max(slowest, time.monotonic() - began)
            assert answer.status < 500, (parameter, text[:40])
    assert slowest < 2
    assert client.get("/api/v1/hosts").json()["total"] == 1


def test_a_flood_of_wrong_tokens_writes_nothing(client, admin):
    before = admin.get("/api/v1/events").json()["total"]
    for number in range(20):
        assert client.send("POST", "/api/v1/hosts", {}, Authorization=f"Bearer pxm_{number}").status == 401
    assert admin.get("/api/v1/events").json()["total"] == before


def test_what_a_stolen_database_holds_is_no_key(monitor, client, register, admin):
    """Every text and blob of every table, against everything that opens something."""
    client.log_in()
    secrets = [register("pve1").removeprefix("whsec_"), admin.headers["Authorization"].removeprefix("Bearer "),
               client.headers["Cookie"].rpartition(".")[2], monitor.secret.decode(), "correct horse"]  # fmt: skip
    raw = base64.b64decode(secrets[0])
    db = monitor.store.reader()
    for (table,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
        held = repr([tuple(row) for row in db.execute(f"SELECT * FROM {table}")])
        assert not [secret for secret in secrets if secret in held] and repr(raw)[2:-1] not in held, table
    assert json.loads(admin.get("/api/v1/tokens").body)["items"][0].keys() >= {"name"}
