"""Attacks on log-ins: stolen sessions, locked-out operators, roles, wall displays, and who is told to have done what."""

from __future__ import annotations

import io
import json
import sys
import urllib.parse

import pytest
from conftest import PASSWORD, PASSWORD_HASH, START, Client, build_report

import server

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
DAY = 86400


def post_form(client: Client, path: str, **fields: str):
    return client.request("POST", path, urllib.parse.urlencode(fields).encode(), FORM)


def log_in(client: Client, user: str = "", password: str = PASSWORD, **fields: str):
    """Post the form by name; from then on this client has the session's cookie and its CSRF token."""
    answer = post_form(client, "/login", user=user, password=password, **fields)
    if answer.status == 303:
        cookie = answer.headers["set-cookie"].partition(";")[0]
        csrf = server.csrf_token(client.monitor.secret, cookie.partition("=")[2])
        client.headers = {"Cookie": cookie, "X-CSRF-Token": csrf}
    return answer


def restarted(monitor: server.Monitor, **env: str) -> server.Monitor:
    """The server anew on the same database, with other settings."""
    monitor.close()
    given = {"DATABASE_PATH": monitor.config.database_path, "DASHBOARD_PASSWORD_HASH": PASSWORD_HASH, **env}
    return server.Monitor(server.Config(given), monitor.clock)


@pytest.fixture
def add_user(monitor, clock):
    def add_user(name: str, role: str) -> Client:
        hashed = server.PASSWORDS.hash(PASSWORD)
        monitor.store.write(lambda db: server.insert_user(db, name, role, hashed, clock()))
        client = Client(monitor)
        assert log_in(client, name).status == 303
        return client

    return add_user


def events(admin: Client, kind: str = "audit") -> list[dict]:
    return admin.get(f"/api/v1/events?kind={kind}").json()["items"]


# --- a stolen session ---


@pytest.mark.parametrize("setting", ["DASHBOARD_PASSWORD_HASH", "SECRET_KEY_BASE"])
def test_another_password_or_secret_ends_every_session(monitor, client, setting):
    other = {"DASHBOARD_PASSWORD_HASH": server.PASSWORDS.hash("another password"), "SECRET_KEY_BASE": "abcdefghijkl" * 4}
    client.log_in()
    assert client.get("/api/v1/overview").status == 200
    again = restarted(monitor, **{setting: other[setting]})
    try:
        thief = Client(again)
        thief.headers = dict(client.headers)
        assert thief.get("/api/v1/overview").status == 401
        assert thief.send("POST", "/api/v1/tokens", {"name": "thief", "admin": True}).status == 401
        assert server.list_sessions(again.store.reader(), again.clock()) == []
    finally:
        again.close()


def test_a_restart_with_the_same_settings_keeps_the_session(monitor, client):
    client.log_in()
    again = restarted(monitor)
    try:
        user = Client(again)
        user.headers = dict(client.headers)
        assert user.get("/api/v1/overview").status == 200
    finally:
        again.close()


def test_a_session_ends_after_30_days_however_often_it_is_used(client, clock):
    client.log_in()
    for _ in range(7):
        clock.advance(4 * DAY)
        assert client.get("/api/v1/overview").status == 200
    kept = client.get("/").headers.get("set-cookie", "")
    assert not kept or int(kept.partition("Max-Age=")[2].partition(";")[0]) <= 2 * DAY
    clock.advance(2 * DAY + 1)
    assert client.get("/api/v1/overview").status == 401


def test_ending_all_others_leaves_the_one_that_asks(monitor, client):
    other = Client(monitor)
    other.log_in()
    client.log_in()
    rows = client.get("/api/v1/sessions").json()["items"]
    assert [row["current"] for row in rows].count(True) == 1 and len(rows) == 2
    assert client.send("DELETE", "/api/v1/sessions").status == 204
    assert client.get("/api/v1/overview").status == 200
    assert other.get("/api/v1/overview").status == 401


def test_the_database_holds_nothing_that_a_cookie_can_be_made_of(monitor, client):
    client.log_in()
    cookie = client.headers["Cookie"].partition("=")[2]
    row = monitor.store.reader().execute("SELECT * FROM session").fetchone()
    secret_part = cookie.rpartition(".")[2]
    assert secret_part not in str(tuple(row)) and row["hash"] != server.token_hash(cookie)


def test_behind_https_the_cookie_belongs_to_this_host_alone(client):
    """A sibling of the domain could set `proxmon_session`, never `__Host-proxmon_session`."""
    client.headers = {"X-Forwarded-Proto": "https"}
    cookie = client.log_in().headers["set-cookie"]
    assert cookie.startswith("__Host-proxmon_session=") and "; Secure" in cookie and "Path=/;" in cookie
    value = cookie.partition("=")[2].partition(";")[0]
    https = {"X_Forwarded_Proto": "https"}
    assert client.get("/api/v1/overview", Cookie=f"__Host-proxmon_session={value}", **https).status == 200
    assert client.get("/api/v1/overview", Cookie=f"proxmon_session={value}", **https).status == 401


def test_log_out_has_the_browser_forget_the_page(client):
    client.log_in()
    assert client.request("POST", "/logout", headers=client.headers).headers["clear-site-data"] == '"cache"'


def test_nothing_that_a_session_saw_is_kept_by_the_browser(client, admin):
    client.log_in()
    for path in ("/", "/?tab=guests", "/api/v1/hosts"):
        assert client.get(path).headers["cache-control"] == "no-store", path
    assert admin.get("/api/v1/hosts").headers["cache-control"] == "private, no-cache"


# --- the way back ---


def test_log_in_leads_back_to_where_one_was(client):
    where = "/?tab=pools&q=state:crit"
    answer = client.get(where)
    assert answer.status == 303
    path, _, query = answer.headers["location"].partition("?")
    assert path == "/login" and urllib.parse.parse_qs(query)["next"] == [where]
    assert where.replace("&", "&amp;") in client.get(answer.headers["location"]).text
    assert log_in(client, next=where).headers["location"] == where
    assert Client(client.monitor).get("/").headers["location"] == "/login"


@pytest.mark.parametrize(
    "target",
    ["https://evil.example/", "//evil.example", "/\\evil.example", "/\t/evil.example", "\\\\evil.example", "/\n/evil",
     "javascript:alert(1)", "evil.example", "/logout", "/login?next=/", "/x\r\nSet-Cookie: a=b", "/" + "a" * 3000, "/é"],
)  # fmt: skip
def test_log_in_leads_nowhere_else(client, target):
    assert log_in(client, next=target).headers["location"] == "/"


# --- guesses, and the operator meanwhile ---


def guess(client: Client, address: str, **cookies: str):
    client.headers = {"X-Forwarded-For": address, "Cookie": "; ".join(f"{k}={v}" for k, v in cookies.items())}
    return client.log_in("wrong")


def test_the_addresses_of_one_ipv6_network_count_together(client):
    answers = [guess(client, f"2001:db8:1:1::{number:x}").status for number in range(12)]
    assert answers == [401] * 5 + [429] * 7
    assert guess(client, "2001:db8:2:1::1").status == 401


def test_the_networks_of_one_customer_count_together(client):
    answers = [guess(client, f"2001:db8:1:{number:x}::1").status for number in range(24)]
    assert answers == [401] * 20 + [429] * 4


def test_an_ipv4_address_written_as_ipv6_is_the_same(client):
    answers = [guess(client, address).status for address in ["203.0.113.9", "::ffff:203.0.113.9"] * 4]
    assert answers == [401] * 5 + [429] * 3


def guess_from_everywhere(client: Client) -> None:
    for number in range(51):
        last = guess(client, f"198.51.{number}.1").status
    assert last == 429


def test_strangers_lock_out_nobody_who_was_here_before(client, clock):
    client.headers = {"X-Forwarded-For": "192.0.2.1"}
    assert client.log_in().status == 303
    guess_from_everywhere(client)
    client.headers = {"X-Forwarded-For": "192.0.2.99"}
    assert client.log_in().status == 429  # somebody new has to wait with the strangers
    client.headers = {"X-Forwarded-For": "192.0.2.1"}
    assert client.log_in().status == 303


def test_a_browser_that_was_in_before_is_known_from_any_address(client):
    assert client.log_in().status == 303
    seen = client.get("/").headers["set-cookie"].partition(";")[0]
    assert seen.startswith("proxmon_seen=")
    guess_from_everywhere(client)
    for given, expected in ((seen[:-1], 429), ("proxmon_seen=" + "0" * 16 + ".00", 429), (seen, 303)):
        client.headers = {"X-Forwarded-For": "192.0.2.99", "Cookie": given}
        assert client.log_in().status == expected, given


def test_a_stolen_browser_cookie_buys_five_guesses(client):
    client.log_in()
    name, _, value = client.get("/").headers["set-cookie"].partition(";")[0].partition("=")
    answers = [guess(client, f"203.0.113.{number}", **{name: value}).status for number in range(8)]
    assert answers == [401] * 5 + [429] * 3


def test_unlock_login_lets_the_next_try_count(monitor, client, clock, capsys, monkeypatch):
    guess_from_everywhere(client)
    monkeypatch.setenv("DATABASE_PATH", monitor.config.database_path)
    assert server.main(["unlock-login"]) == 0
    client.headers = {"X-Forwarded-For": "192.0.2.99"}
    assert client.log_in().status == 303


# --- users and roles ---


def test_each_role_may_what_it_may_and_no_more(monitor, admin, add_user, register, post, clock):
    token = register("pve1")
    assert post(token, build_report(at=START)).status == 200
    viewer, operator, chief = add_user("vera", "viewer"), add_user("otto", "operator"), add_user("anna", "admin")
    silence = {"host": "pve1", "until": clock() + 3600}
    for client, reads, mutes, writes in ((viewer, 200, 403, 403), (operator, 200, 201, 403), (chief, 200, 201, 201)):
        assert client.get("/").status == 200
        assert client.get("/api/v1/hosts").status == reads
        assert client.send("POST", "/api/v1/silences", silence).status == mutes
        assert client.send("POST", "/api/v1/hosts", {"name": "new"}).status == writes
    for client in (viewer, operator):
        for method, path in (("GET", "users"), ("GET", "tokens"), ("GET", "sessions"), ("DELETE", "sessions"),
                             ("POST", "users"), ("PATCH", "users/vera"), ("POST", "channels/x/test"),
                             ("DELETE", "hosts/pve1"), ("POST", "rules/replay")):  # fmt: skip
            assert client.send(method, f"/api/v1/{path}", {}).status == 403, (method, path)


def test_another_role_counts_at_once_and_another_password_ends_the_sessions(admin, add_user):
    vera = add_user("vera", "admin")
    assert vera.get("/api/v1/users").status == 200
    assert admin.send("PATCH", "/api/v1/users/vera", {"role": "viewer"}).json()["role"] == "viewer"
    assert vera.get("/api/v1/users").status == 403
    assert admin.send("PATCH", "/api/v1/users/VERA", {"password": "a new long one"}).status == 200
    assert vera.get("/api/v1/overview").status == 401
    assert log_in(vera, "vera").status == 401
    assert log_in(vera, "vera", "a new long one").status == 303
    assert admin.send("DELETE", "/api/v1/users/vera").status == 204
    assert vera.get("/api/v1/overview").status == 401
    assert log_in(vera, "vera", "a new long one").status == 401


@pytest.mark.parametrize(
    "body, code",
    [({"name": "a b", "role": "viewer", "password": PASSWORD}, "invalid_request"),
     ({"name": "vera", "role": "god", "password": PASSWORD}, "invalid_request"),
     ({"name": "vera", "role": ["admin"], "password": PASSWORD}, "invalid_request"),
     ({"name": "vera", "role": "viewer", "password": "short"}, "invalid_request"),
     ({"name": "vera", "role": "viewer", "password": ["x"] * 20}, "invalid_request"),
     ({"name": "vera", "role": "viewer"}, "invalid_request"),
     ({"name": "vera", "role": "viewer", "password": PASSWORD, "admin": True}, "invalid_request"),
     ({"name": "Admin", "role": "viewer", "password": PASSWORD}, "conflict")],
)  # fmt: skip
def test_a_user_that_cannot_be_is_refused(admin, body, code):
    assert admin.send("POST", "/api/v1/users", body).code == code
    assert [row["name"] for row in admin.get("/api/v1/users").json()["items"]] == ["admin"]


def test_nobody_takes_the_built_in_admins_place(admin):
    assert admin.send("PATCH", "/api/v1/users/admin", {"password": "taken over now"}).status == 404
    assert admin.send("DELETE", "/api/v1/users/admin").status == 404
    assert log_in(Client(admin.monitor), "ADMIN").status == 303


def test_users_are_managed_by_command(monitor, client, monkeypatch, capsys):
    def run(*argv: str, stdin: str = "") -> tuple[int, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = server.main(list(argv))
        return code, capsys.readouterr().out

    monkeypatch.setenv("DATABASE_PATH", monitor.config.database_path)
    assert run("add-user", "vera", "--role", "operator", stdin="one long sentence\n")[0] == 0
    assert log_in(client, "vera", "one long sentence").status == 303
    assert json.loads(run("list-users", "--json")[1])[0]["role"] == "operator"
    assert [row["user"] for row in json.loads(run("list-sessions", "--json")[1])] == ["vera"]
    assert run("set-password", "vera", stdin="another long sentence\n")[0] == 0
    assert client.get("/api/v1/overview").status == 401
    assert log_in(client, "vera", "another long sentence").status == 303
    assert run("end-sessions")[1] == "1 session ended.\n"
    assert client.get("/api/v1/overview").status == 401
    assert run("end-sessions", "0123456789abcdef")[0] == 1
    assert run("remove-user", "vera")[0] == 0
    assert log_in(client, "vera", "another long sentence").status == 401


def test_administration_shows_who_is_let_in_to_admins_alone(add_user, admin):
    anna, vera = add_user("anna", "admin"), add_user("vera", "viewer")
    admin.send("POST", "/api/v1/tokens", {"name": "hallway", "kind": "kiosk"})
    page = anna.get("/admin/hosts").text
    assert "Logged in" in page and "vera" in page and "hallway" in page and "this browser" in page
    answer = vera.get("/admin/hosts")
    assert (answer.status, answer.headers["location"]) == (303, "/")
    tag = anna.get("/admin/hosts").headers["etag"]
    assert admin.send("DELETE", "/api/v1/users/vera").status == 204
    assert anna.get("/admin/hosts", If_None_Match=tag).status == 200  # and not: nothing has changed


# --- who did it ---


def test_a_token_named_session_is_no_session(monitor, clock):
    token = monitor.store.write(lambda db: server.create_api_token(db, "session", clock(), admin=False, days=None))
    client = Client(monitor)
    client.headers = {"Authorization": f"Bearer {token}"}
    assert client.get("/").status == 303
    assert client.send("POST", "/logout").status == 303
    assert client.send("POST", "/api/v1/hosts", {"name": "x"}).status == 403


def test_every_write_says_who_and_from_where(admin, add_user, clock):
    vera = add_user("vera", "admin")
    vera.headers["X-Forwarded-For"] = "192.0.2.7"
    vera.send("POST", "/api/v1/hosts", {"name": "pve1"})
    vera.send("PATCH", "/api/v1/hosts/pve1", {"note": "x"})
    admin.send("POST", "/api/v1/hosts/pve1/rotate-token")
    vera.send("POST", "/api/v1/silences", {"host": "pve1", "until": clock() + 60})
    vera.send("DELETE", "/api/v1/hosts/pve1")
    told = {row["kind"]: (row["by"], row["address"]) for row in events(admin)}
    for kind in ("host-registered", "host-changed", "silence-created", "host-removed"):
        assert told[kind] == ("session:vera", "192.0.2.7"), kind
    assert told["token-rotated"] == ("token:tests", "127.0.0.1")
    assert told["login"][0] == "session:vera"


def test_a_refused_write_is_told_and_a_flood_of_them_is_not(admin, add_user):
    vera = add_user("vera", "viewer")
    for _ in range(150):
        assert vera.send("DELETE", "/api/v1/hosts/pve1").status == 403
    refused = events(admin, "refused")
    assert 50 <= len(refused) <= 100
    assert refused[0]["by"] == "session:vera" and "DELETE /api/v1/hosts/pve1" in refused[0]["message"]


def test_failed_log_ins_are_told_without_what_was_typed(monitor, admin, client, clock):
    client.headers = {"X-Forwarded-For": "203.0.113.9"}
    log_in(client, user="my-password-by-mistake", password="x")
    log_in(client, user="admin", password="wrong")
    rows = events(admin, "login-failed")
    assert [row["address"] for row in rows] == ["203.0.113.9"] * 2 and all(row["by"] is None for row in rows)
    assert "mistake" not in json.dumps(rows) and "admin" in rows[0]["message"]
    assert server.failed_logins(monitor.store.reader(), clock() - 60) == 2
    assert len(events(admin)) >= 2  # they are of the audit


def test_commands_say_who_typed_them(monitor, admin, monkeypatch, capsys):
    monkeypatch.setenv("DATABASE_PATH", monitor.config.database_path)
    monkeypatch.setenv("SUDO_USER", "otto")
    assert server.main(["register-host", "pve1"]) == 0
    assert events(admin, "host-registered")[0]["by"] == "command:otto"


def test_what_reports_bring_about_is_nobodys_doing(register, post, admin, clock):
    token = register("pve1")
    report = build_report(pool_states=[{"name": "tank", "guid": "1", "state": "FAULTED"}])
    post(token, report)
    fired = events(admin, "alert-firing")
    assert fired and all(row["by"] is None and row["address"] is None for row in fired)


# --- a wall display ---


@pytest.fixture
def kiosk(admin):
    """A browser that was opened with a kiosk's link."""
    made = admin.send("POST", "/api/v1/tokens", {"name": "hallway", "kind": "kiosk"}).json()
    display = Client(admin.monitor)
    answer = display.get(urllib.parse.urlsplit(made["link"])._replace(scheme="", netloc="").geturl())
    assert (answer.status, answer.headers["location"]) == (303, "/?kiosk")  # the token leaves the address
    assert "HttpOnly" in answer.headers["set-cookie"]
    display.headers = {"Cookie": answer.headers["set-cookie"].partition(";")[0]}
    return display


def test_a_kiosk_sees_the_page_and_nothing_else(kiosk, register):
    register("pve1")
    assert kiosk.get("/?kiosk").status == 200 and "pve1" in kiosk.get("/").text
    for path in ("/admin/hosts", "/api/v1/overview", "/api/v1/hosts", "/api/v1/tokens", "/metrics"):
        assert kiosk.get(path).status in (303, 401), path
    for method, path in (("POST", "/api/v1/hosts"), ("DELETE", "/api/v1/hosts/pve1"), ("POST", "/api/v1/silences")):
        assert kiosk.send(method, path, {"name": "x"}).status == 401
    assert kiosk.request("POST", "/logout").status == 303


def test_a_kiosks_token_is_no_api_token_and_the_other_way_round(monitor, admin, clock):
    made = admin.send("POST", "/api/v1/tokens", {"name": "hallway", "kind": "kiosk"}).json()
    client = Client(monitor)
    assert client.get("/api/v1/overview", Authorization=f"Bearer {made['token']}").status == 401
    read = admin.send("POST", "/api/v1/tokens", {"name": "reader"}).json()["token"]
    assert client.get(f"/?kiosk={read}").headers["location"].startswith("/login")


def test_a_revoked_link_shows_the_log_in(kiosk, admin):
    assert admin.send("DELETE", "/api/v1/tokens/hallway").status == 204
    assert kiosk.get("/?kiosk").status == 303


# --- tokens ---


def test_a_token_that_ends_makes_none_that_lasts_longer(monitor, clock):
    token = monitor.store.write(lambda db: server.create_api_token(db, "short", clock(), admin=True, days=2))
    client = Client(monitor)
    client.headers = {"Authorization": f"Bearer {token}"}
    for wanted, status in (({}, 403), ({"expires_days": 3}, 403), ({"expires_days": 1}, 201)):
        assert client.send("POST", "/api/v1/tokens", {"name": "more", **wanted}).status == status


def test_an_unknown_field_of_a_token_is_refused(admin):
    answer = admin.send("POST", "/api/v1/tokens", {"name": "y", "scope": "all"})
    assert answer.code == "invalid_request" and "scope" in answer.json()["detail"]


def test_strangers_hear_from_healthz_only_whether_it_lives(client, admin):
    told = client.get("/healthz").json()
    assert set(told) == {"status", "writer_alive", "database_writable", "last_commit_age_seconds"}
    assert client.get("/healthz", Authorization="Bearer wrong").status == 200
    assert admin.get("/healthz").json()["version"] == server.VERSION


def test_a_host_removed_while_it_is_registered_is_no_fault(monitor, admin, clock, monkeypatch):
    """Its token was made; the answer with it must not be lost."""
    told = server.insert_host

    def removed_at_once(db, name, now, **fields):
        row = told(db, name, now, **fields)
        server.delete_host(db, name, now)
        return row

    monkeypatch.setattr(server, "insert_host", removed_at_once)
    answer = admin.send("POST", "/api/v1/hosts", {"name": "race"})
    assert answer.status == 201 and answer.json()["host"]["name"] == "race"
