"""Server, section commands: what an operator types, what it prints, and how it exits."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
import signal
import sqlite3
import stat
import sys
import time

import pytest
from conftest import LiveServer, build_pool, build_report

import server

REGISTERED = re.compile(
    r"Host '(?P<name>.+)' registered \(id=(?P<id>\d+)\)\.\n"
    r"TOKEN: (?P<token>whsec_[A-Za-z0-9+/]+=*)\n"
    r"Store this token NOW — it will never be shown again\.\n"
)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("list-hosts", …) -> exit code, stdout, stderr; on a database of its own."""
    for name in ("SECRET_KEY_BASE", "DASHBOARD_PASSWORD_HASH", "LISTEN", "PORT", "PUBLIC_URL", "TRUSTED_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATABASE_PATH", str(tmp_path / "monitor.db"))

    def run(*argv: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = server.main(list(argv))
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def assert_failed(result: tuple[int, str, str], word: str) -> None:
    """Exit code 1, nothing on stdout, and one line that says why."""
    code, out, err = result
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1 and word in err


# --- schema ---


def test_migrate_makes_the_schema_and_rollback_takes_it_back(run, tmp_path):
    assert run("migrate")[0] == 0
    newest = len(server.load_migrations())
    db = sqlite3.connect(tmp_path / "monitor.db")
    assert db.execute("PRAGMA user_version").fetchone()[0] == newest
    assert run("migrate")[0] == 0  # nothing to do is no fault
    assert run("rollback", "--to", "0")[0] == 0
    assert db.execute("PRAGMA user_version").fetchone()[0] == 0
    assert run("migrate")[0] == 0
    assert run("rollback")[0] == 0
    assert db.execute("PRAGMA user_version").fetchone()[0] == newest - 1


def test_one_step_back_after_the_other_until_nothing_is_left_and_up_again(run, tmp_path):
    run("migrate")
    for version in reversed(range(len(server.load_migrations()))):
        assert run("rollback")[0] == 0, version
        db = sqlite3.connect(tmp_path / "monitor.db")
        assert db.execute("PRAGMA user_version").fetchone()[0] == version
    assert_failed(run("rollback"), "0 to 0")
    assert run("register-host", "pve1")[0] == 0  # a database with nothing in it is as good as a new one


def test_a_newer_schema_is_not_taken_back(run, tmp_path):
    run("migrate")
    sqlite3.connect(tmp_path / "monitor.db").execute("PRAGMA user_version = 99")
    assert_failed(run("rollback", "--to", "1"), "too old")


def test_a_step_back_that_does_not_exist_is_refused(run):
    run("migrate")
    for to in ("-1", "999"):
        code, _, err = run("rollback", "--to", to)
        assert code in (1, 2) and err


def test_commands_on_an_older_or_newer_schema_say_what_to_do(run, tmp_path):
    run("register-host", "pve1")
    db = sqlite3.connect(tmp_path / "monitor.db")
    db.execute("PRAGMA user_version = 99")
    for argv in (["list-hosts"], ["status"], ["serve"]):
        assert_failed(run(*argv), "too old")
    db.execute(f"PRAGMA user_version = {len(server.load_migrations()) - 1}")
    for argv in (["list-hosts"], ["serve"]):
        assert_failed(run(*argv), "migrate")


# --- hosts ---


def test_register_host_prints_exactly_three_lines(run):
    code, out, err = run("register-host", "pve-host-01")
    assert (code, err) == (0, "")
    found = REGISTERED.fullmatch(out)
    assert found and (found["name"], found["id"]) == ("pve-host-01", "1")
    assert len(base64.b64decode(found["token"].removeprefix("whsec_"), validate=True)) == 32


@pytest.mark.parametrize("name", ["", "-x", ".x", "a b", "a/b", "x" * 64, "a\n", "ä", "$(id)"])
def test_a_name_that_cannot_be_is_refused(run, name):
    code, out, err = run("register-host", "--", name)
    assert (code, out) == (1, "") and len(err.splitlines()) == 1


def test_a_name_that_is_taken_is_refused_whatever_its_case(run):
    run("register-host", "pve1")
    assert_failed(run("register-host", "PVE1"), "already")


def test_rotate_rename_and_remove(run):
    first = REGISTERED.fullmatch(run("register-host", "pve1")[1])["token"]
    code, out, _ = run("rotate-token", "pve1")
    assert code == 0
    second = re.search(r"^TOKEN: (whsec_\S+)$", out, re.M)[1]
    assert second != first
    assert run("rename-host", "pve1", "pve2")[0] == 0
    assert [host["name"] for host in json.loads(run("list-hosts", "--json")[1])] == ["pve2"]
    assert run("remove-host", "pve2")[0] == 0
    assert json.loads(run("list-hosts", "--json")[1]) == []


@pytest.mark.parametrize("argv", [["rotate-token", "x"], ["remove-host", "x"], ["rename-host", "x", "y"]])
def test_a_host_that_is_not_there_is_told_in_one_line(run, argv):
    run("register-host", "pve1")
    assert_failed(run(*argv), "x")


def test_list_hosts_is_a_table_for_people(run):
    for name in ("pve1", "pve2"):
        run("register-host", name)
    code, out, _ = run("list-hosts")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["1", "pve1"], ["2", "pve2"]]


def test_without_a_database_a_command_says_so(run):
    assert_failed(run("list-hosts"), "no database")


@pytest.mark.parametrize(
    "argv", [[], ["no-such-command"], ["register-host"], ["rename-host", "a"], ["rollback", "--to", "x"]]
)
def test_wrong_usage_exits_with_2(run, argv):
    code, out, err = run(*argv)
    assert (code, out) == (2, "") and "usage" in err


# --- passwords, secrets, API tokens ---


def test_status_knows_alerts_that_belong_to_no_host(run, tmp_path):
    run("migrate")
    assert run("status")[0] == 0
    with sqlite3.connect(tmp_path / "monitor.db") as db:
        db.execute("""
            INSERT INTO alert (rule, object, severity, state, message, since, fired_at)
            VALUES ('site-silent', 'site/par', 'critical', 'firing', 'Site par is silent.', 1, 1)""")
    assert run("status")[0] == 2


def test_hash_password_reads_stdin_and_gives_argon2id(run, monkeypatch):
    code, out, _ = run("hash-password", stdin="s3cret sentence\n")
    assert code == 0 and out.startswith("$argon2id$")
    assert server.verify_password(out.strip(), "s3cret sentence")
    assert not server.verify_password(out.strip(), "s3cret sentence\n")


@pytest.mark.parametrize("password", ["", "1", "five5"])
def test_a_password_that_is_soon_guessed_is_refused(run, password):
    assert_failed(run("hash-password", stdin=password + "\n"), "6 characters")


def test_generate_secret_is_long_and_never_the_same(run):
    first, second = run("generate-secret")[1], run("generate-secret")[1]
    assert first != second and len(first.strip()) >= 43  # 32 bytes as base64


def test_api_tokens_are_created_listed_and_revoked(run):
    code, out, _ = run("create-api-token", "grafana", "--expires", "30")
    assert code == 0
    token = re.search(r"^TOKEN: (\S+)$", out, re.M)[1]
    run("create-api-token", "ansible", "--admin")
    rows = {row["name"]: row for row in json.loads(run("list-api-tokens", "--json")[1])}
    assert rows["ansible"]["admin"] is True and rows["grafana"]["admin"] is False
    assert rows["grafana"]["expires_at"] and rows["ansible"]["expires_at"] is None
    assert token not in run("list-api-tokens")[1]
    assert_failed(run("create-api-token", "grafana"), "already")
    assert run("revoke-api-token", "grafana")[0] == 0
    assert_failed(run("revoke-api-token", "grafana"), "grafana")


# --- status, backup, check ---


def test_status_exits_like_a_nagios_check(live_server: LiveServer):
    assert live_server.command("status").returncode == 0  # nothing is registered
    token = live_server.register("pve1")
    assert live_server.command("status").returncode == 1  # unknown: no report yet
    assert live_server.post(token, build_report(at=time.time())).status == 200
    assert live_server.command("status").returncode == 0
    pools = {"pools": [build_pool(state="FAULTED")], "pool_states": [{"name": "tank", "guid": "1", "state": "FAULTED"}]}
    assert live_server.post(token, build_report(seq=2, at=time.time(), **pools), message_id="msg_2").status == 200
    answer = live_server.command("status")
    assert answer.returncode == 2
    assert "FAULTED" in answer.stdout
    answer = live_server.command("status", "--json")
    assert answer.returncode == 2
    assert json.loads(answer.stdout)["hosts"][0]["verdict"] == "critical"


def test_what_commands_change_takes_effect_in_the_running_server(live_server: LiveServer):
    token = live_server.register("pve1")
    assert live_server.post(token, build_report()).status == 200
    assert live_server.command("rotate-token", "pve1").returncode == 0
    assert live_server.post(token, build_report(seq=2), message_id="msg_2").code == "invalid_token"
    api = live_server.api_token("t")
    assert live_server.get("/api/v1/hosts", api)["total"] == 1
    assert live_server.command("rename-host", "pve1", "pve2").returncode == 0
    assert [row["name"] for row in live_server.get("/api/v1/hosts", api)["items"]] == ["pve2"]
    assert live_server.command("remove-host", "pve2").returncode == 0
    assert live_server.get("/api/v1/hosts", api)["total"] == 0
    assert live_server.command("revoke-api-token", "t").returncode == 0
    assert live_server.request("GET", "/api/v1/hosts", Authorization=f"Bearer {api}").status == 401


def test_a_backup_made_while_the_server_runs_is_a_whole_database(live_server: LiveServer, tmp_path):
    token = live_server.register("pve1")
    live_server.post(token, build_report())
    target = tmp_path / "backup.db"
    answer = live_server.command("backup", str(target))
    assert answer.returncode == 0, answer.stderr
    assert stat.S_IMODE(os.stat(target).st_mode) == 0o600
    copy = sqlite3.connect(target)
    assert copy.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert copy.execute("SELECT count(*) FROM report").fetchone()[0] == 1
    assert token.removeprefix("whsec_").encode() not in target.read_bytes()
    again = live_server.command("backup", str(target))
    assert again.returncode == 1 and "exists" in again.stderr


def test_check_of_a_running_server_is_green_without_any_channel(live_server: LiveServer):
    answer = live_server.command("check")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "✗" not in answer.stdout and "✓" in answer.stdout
    assert any("channel" in line for line in answer.stdout.splitlines())


def test_check_without_a_database_fails_and_says_what_to_do(run):
    code, out, _ = run("check")
    assert code == 1
    assert any(line.startswith("✗") and "database" in line for line in out.splitlines())


@pytest.mark.parametrize(
    "name, value",
    [("PORT", "http"), ("PORT", "70000"), ("PUBLIC_URL", "ftp://x"), ("TRUSTED_PROXY", "proxy"),
     ("SECRET_KEY_BASE", "short"),
     ("DASHBOARD_PASSWORD_HASH", "plain text")],
)  # fmt: skip
def test_a_wrong_setting_is_named(run, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert_failed(run("list-hosts"), name)


def test_version_is_the_only_one(run):
    code, out, _ = run("version")
    assert code == 0 and server.VERSION in out


# --- serve ---


def test_the_server_stops_cleanly_and_soon(live_server: LiveServer):
    assert live_server.stop(signal.SIGTERM) == 0
    assert "stopped" in live_server.log.read_text()
    assert "Traceback" not in live_server.log.read_text()


def test_a_port_that_is_taken_is_told_in_one_line(live_server: LiveServer):
    live_server.env["DATABASE_PATH"] += ".other"
    answer = live_server.command("serve")
    assert answer.returncode == 1
    assert len(answer.stderr.splitlines()) == 1 and str(live_server.port) in answer.stderr


def test_another_fault_while_it_runs_is_not_told_as_a_port(monitor, monkeypatch):
    class Full:
        effective_port, closed = 4000, False

        def run(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.closed = True

    sockets = Full()
    monkeypatch.setattr(server, "open_sockets", lambda monitor: sockets)
    monkeypatch.setattr(server.signal, "signal", lambda *_: None)
    with pytest.raises(OSError, match="No space left"):
        server.run_server(monitor)
    assert sockets.closed


def test_a_second_server_on_one_database_is_refused(live_server: LiveServer, tmp_path):
    live_server.env["PORT"] = "0"
    answer = live_server.command("serve")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert len(answer.stderr.splitlines()) == 1 and "another server" in answer.stderr
    live_server.stop(signal.SIGKILL)
    live_server.env["PORT"] = str(live_server.port)
    live_server.start()  # what a dead server leaves behind keeps nobody out


def test_a_first_start_makes_schema_and_secret_and_says_how_to_log_in(tmp_path):
    first = LiveServer(tmp_path, DASHBOARD_PASSWORD_HASH="")
    first.start()
    try:
        assert "hash-password" in first.log.read_text()
        modes = {
            name: stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in os.listdir(tmp_path) if "monitor" in name
        }
        assert set(modes.values()) == {0o600}, modes
    finally:
        assert first.stop() == 0
