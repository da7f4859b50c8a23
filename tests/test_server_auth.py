"""Server, section auth: tokens, passwords, sessions, and what a page's write must carry."""

from __future__ import annotations

import base64
import threading
import time
import urllib.parse

import pytest
from conftest import PASSWORD, START, Client, build_report

import server

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def form(**fields: str) -> bytes:
    return urllib.parse.urlencode(fields).encode()


# --- host tokens ---


def test_a_host_token_is_what_standard_webhooks_libraries_take(register):
    token = register("pve1")
    assert token.startswith("whsec_")
    assert 24 <= len(base64.b64decode(token.removeprefix("whsec_"), validate=True)) <= 64


def test_a_host_token_needs_the_secret_and_the_nonce():
    assert server.host_key(b"a" * 32, b"n") != server.host_key(b"b" * 32, b"n")
    assert server.host_key(b"a" * 32, b"n") != server.host_key(b"a" * 32, b"m")


def test_each_host_has_a_token_of_its_own(register):
    assert register("pve1") != register("pve2")


def test_a_removed_and_registered_host_has_another_token(register, admin):
    old = register("pve1")
    assert admin.send("DELETE", "/api/v1/hosts/pve1").status == 204
    assert register("pve1") != old


# --- API tokens ---


def api_token(monitor, clock, **flags) -> str:
    flags = {"admin": False, "days": None, **flags}
    return monitor.store.write(lambda db: server.create_api_token(db, "t", clock(), **flags))


def test_without_a_token_nothing_is_told(client):
    for path in ("overview", "hosts", "hosts/pve1", "guests", "pools", "storages", "alerts", "events", "openapi.json"):
        answer = client.get(f"/api/v1/{path}")
        assert (answer.status, answer.code) == (401, "unauthorized")
    assert client.get("/metrics").status == 401


@pytest.mark.parametrize("given", ["Bearer wrong", "Bearer ", "Basic dXNlcjpwYXNz", "Bearer \xff\xfe", "x" * 5000])
def test_a_wrong_token_is_unauthorized(client, given):
    answer = client.get("/api/v1/overview", Authorization=given)
    assert (answer.status, answer.code) == (401, "unauthorized")


def test_a_token_that_may_read_may_not_write(client, monitor, clock, register):
    register("pve1")
    bearer = {"Authorization": f"Bearer {api_token(monitor, clock)}"}
    assert client.get("/api/v1/hosts", **bearer).status == 200
    for method, path in (
        ("POST", "hosts"),
        ("DELETE", "hosts/pve1"),
        ("PATCH", "hosts/pve1"),
        ("POST", "hosts/pve1/rotate-token"),
        ("POST", "tokens"),
        ("GET", "tokens"),
        ("GET", "sessions"),
    ):
        answer = client.send(method, f"/api/v1/{path}", {"name": "x"}, **bearer)
        assert (answer.status, answer.code) == (403, "forbidden"), (method, path)


def test_a_token_expires(client, monitor, clock):
    bearer = {"Authorization": f"Bearer {api_token(monitor, clock, days=1)}"}
    assert client.get("/api/v1/overview", **bearer).status == 200
    clock.advance(86401)
    assert client.get("/api/v1/overview", **bearer).status == 401


def test_a_revoked_token_is_refused_at_once(client, monitor, clock, admin):
    bearer = {"Authorization": f"Bearer {api_token(monitor, clock)}"}
    assert client.get("/api/v1/overview", **bearer).status == 200
    assert admin.send("DELETE", "/api/v1/tokens/t").status == 204
    assert client.get("/api/v1/overview", **bearer).status == 401


# --- passwords and sessions ---


def test_the_right_password_opens_a_session(client):
    answer = client.log_in()
    assert (answer.status, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    for attribute in ("HttpOnly", "SameSite=Lax", "Path=/", f"Max-Age={7 * 86400}"):
        assert attribute in cookie
    assert "Secure" not in cookie  # the address is http
    assert client.get("/api/v1/overview").status == 200


def test_behind_https_the_cookie_is_secure(config, clock):
    server.open_database(config, create=True).close()
    config.public_url = "https://monitor.example.com"
    monitor = server.Monitor(config, clock)
    try:
        answer = Client(monitor).log_in()
        assert "; Secure" in answer.headers["set-cookie"]
        assert "strict-transport-security" in answer.headers
    finally:
        monitor.close()


@pytest.mark.parametrize("password", ["", "wrong", PASSWORD + " ", PASSWORD.upper(), "x" * 10_000, "\0", "\ud7ff"])
def test_another_password_opens_nothing(client, password):
    answer = client.log_in(password)
    assert answer.status in (401, 413)
    assert "set-cookie" not in answer.headers


def test_without_a_password_set_nobody_gets_in(config, clock):
    server.open_database(config, create=True).close()
    config.password_hash = ""
    monitor = server.Monitor(config, clock)
    try:
        assert Client(monitor).log_in("").status == 401
        assert Client(monitor).log_in().status == 401
    finally:
        monitor.close()


def test_log_out_ends_the_session_on_the_server(client):
    client.log_in()
    answer = client.request("POST", "/logout", form(csrf=client.headers["X-CSRF-Token"]), FORM)
    assert answer.status == 303
    assert client.get("/api/v1/overview").status == 401  # with the old cookie


def test_a_session_slides_and_ends_after_7_days_without_use(client, clock):
    client.log_in()
    for _ in range(3):
        clock.advance(6 * 86400)
        assert client.get("/api/v1/overview").status == 200
    clock.advance(7 * 86400 + 1)
    assert client.get("/api/v1/overview").status == 401


def test_the_browsers_cookie_slides_with_the_session(client, clock):
    client.log_in()
    assert "set-cookie" not in client.get("/api/v1/overview").headers
    clock.advance(2 * 3600)
    given = client.get("/").headers["set-cookie"]
    assert given.startswith(client.headers["Cookie"] + ";") and f"Max-Age={server.SESSION_SECONDS}" in given
    assert "HttpOnly" in given and "SameSite=Lax" in given
    assert "set-cookie" not in client.get("/").headers  # once an hour is enough
    clock.advance(2 * 3600)
    gone = client.request("POST", "/logout", headers=client.headers).headers["set-cookie"]
    assert "Max-Age=0" in gone


@pytest.mark.parametrize(("address", "secure"), [("127.0.0.1", True), ("192.0.2.1", False)])
def test_the_cookie_is_secure_when_a_trusted_proxy_says_https(client, address, secure):
    client.headers = {"REMOTE_ADDR": address, "X-Forwarded-Proto": "https"}
    assert ("; Secure" in client.log_in().headers["set-cookie"]) is secure


def test_a_session_can_be_ended_from_another(monitor, client, admin):
    client.log_in()
    sessions = admin.get("/api/v1/sessions").json()["items"]
    assert len(sessions) == 1
    assert admin.send("DELETE", f"/api/v1/sessions/{sessions[0]['id']}").status == 204
    assert client.get("/api/v1/overview").status == 401


@pytest.mark.parametrize("cookie", ["proxmon_session=", "proxmon_session=guess", "=", ";;;", "proxmon_session=\xff"])
def test_a_made_up_cookie_opens_nothing(client, cookie):
    assert client.get("/api/v1/overview", Cookie=cookie).status == 401


# --- attempts ---


def test_failed_attempts_have_to_wait_longer_and_longer(client, clock):
    for _ in range(5):
        assert client.log_in("wrong").status == 401
    waits = []
    for _ in range(5):
        answer = client.log_in("wrong")
        assert answer.status == 429
        waits.append(int(answer.headers["retry-after"]))
        clock.advance(waits[-1])
        assert client.log_in("wrong").status == 401
    assert waits == sorted(waits) and waits[-1] > waits[0]


def tries_at_once(client, monkeypatch, count: int, allowed: int) -> tuple[list[str], list[int]]:
    """What comes of so many log-ins while every verification takes long: the passwords verified, the answers."""
    end, judged, answers = threading.Event(), [], []

    def slow(_, password):
        judged.append(password)
        return end.wait(20) and False

    monkeypatch.setattr(server, "verify_password", slow)
    tries = [threading.Thread(target=lambda: answers.append(client.log_in("wrong").status)) for _ in range(count)]
    for one in tries:
        one.start()
    deadline = time.monotonic() + 10
    while sum(one.is_alive() for one in tries) > allowed and time.monotonic() < deadline:
        time.sleep(0.01)  # the others have been told to wait
    end.set()
    for one in tries:
        one.join(10)
    return judged, answers


def test_tries_at_the_same_moment_are_counted_before_they_are_judged(client, monkeypatch):
    for _ in range(3):
        client.log_in("wrong")
    judged, answers = tries_at_once(client, monkeypatch, count=12, allowed=2)
    assert (len(judged), answers.count(429)) == (2, 10)  # the fourth and the fifth


def test_many_log_ins_at_once_hold_four_threads_and_no_more(client, monkeypatch):
    judged, answers = tries_at_once(client, monkeypatch, count=12, allowed=4)
    assert (len(judged), answers.count(429)) == (4, 8)


def test_waiting_holds_for_the_right_password_too(client, clock):
    for _ in range(5):
        client.log_in("wrong")
    answer = client.log_in()
    assert answer.status == 429
    clock.advance(int(answer.headers["retry-after"]))
    assert client.log_in().status == 303


def test_one_address_that_guesses_locks_no_other_out(client):
    client.headers = {"X-Forwarded-For": "192.0.2.1"}  # REMOTE_ADDR is a proxy that is trusted
    for _ in range(8):
        client.log_in("wrong")
    assert client.log_in().status == 429
    client.headers = {"X-Forwarded-For": "192.0.2.2"}
    assert client.log_in().status == 303


def test_many_addresses_that_guess_are_slowed_together(client):
    for number in range(50):
        client.headers = {"X-Forwarded-For": f"192.0.2.{number}"}
        assert client.log_in("wrong").status == 401
    client.headers = {"X-Forwarded-For": "198.51.100.1"}
    assert client.log_in("wrong").status == 429


def test_who_is_no_trusted_proxy_cannot_claim_an_address(client):
    for number in range(5):
        client.headers = {"X-Forwarded-For": f"192.0.2.{number}", "REMOTE_ADDR": "203.0.113.5"}
        assert client.log_in("wrong").status == 401
    assert client.log_in("wrong").status == 429


# --- what a page's write must carry ---


def test_a_write_by_a_session_needs_the_pages_token(client):
    client.log_in()
    csrf = client.headers.pop("X-CSRF-Token")
    for given in ({}, {"X_CSRF_Token": "0" * 64}, {"X_CSRF_Token": csrf[:-1]}, {"X_CSRF_Token": "\xff"}):
        answer = client.send("POST", "/api/v1/hosts", {"name": "pve1"}, **given)
        assert (answer.status, answer.code) == (403, "forbidden")
    assert client.send("POST", "/api/v1/hosts", {"name": "pve1"}, X_CSRF_Token=csrf).status == 201


def test_the_pages_token_is_of_one_session(monitor, client):
    other = Client(monitor)
    other.log_in()
    client.log_in()
    client.headers["X-CSRF-Token"] = other.headers["X-CSRF-Token"]
    assert client.send("POST", "/api/v1/hosts", {"name": "pve1"}).status == 403


@pytest.mark.parametrize(
    "header, value",
    [
        ("Origin", "https://evil.example"),
        ("Origin", "null"),
        ("Origin", "http://["),
        ("Sec_Fetch_Site", "cross-site"),
        ("Sec_Fetch_Site", "same-site"),
    ],
)
def test_a_write_from_another_site_is_refused(client, header, value):
    client.log_in()
    answer = client.send("POST", "/api/v1/hosts", {"name": "pve1"}, **{header: value})
    assert (answer.status, answer.code) == (403, "forbidden")


def test_a_write_from_the_page_itself_passes(client):
    client.log_in()
    headers = {"Origin": "http://127.0.0.1:4000", "Sec_Fetch_Site": "same-origin"}
    assert client.send("POST", "/api/v1/hosts", {"name": "pve1"}, **headers).status == 201


def test_another_site_cannot_log_somebody_in(client):
    body = form(password=PASSWORD)
    answer = client.request("POST", "/login", body, {**FORM, "Origin": "https://evil.example"})
    assert answer.status == 403


def test_an_api_token_needs_no_page(admin):
    assert admin.send("POST", "/api/v1/hosts", {"name": "pve1"}).status == 201


def test_a_write_cannot_be_a_link(client, register):
    register("pve1")
    client.log_in()
    assert client.get("/logout").status in (404, 405)
    assert client.get("/api/v1/hosts/pve1/rotate-token").status in (404, 405)


# --- every answer ---


def test_every_answer_carries_the_protective_headers(client, register, post):
    answers = [
        client.get(path) for path in ("/login", "/", "/healthz", "/api/v1/overview", "/nowhere", "/static/x.css")
    ]
    answers.append(post(register("pve1"), build_report(at=START)))
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy or "default-src 'none'" in policy
        assert "unsafe-inline" not in policy and "unsafe-eval" not in policy and "http" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"]
        assert "server" not in answer.headers
