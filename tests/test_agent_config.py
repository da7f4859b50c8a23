"""Settings: what is taken, and that every mistake is refused with file, key and reason."""

from __future__ import annotations

import os

import pytest
from agent_support import KEY, TOKEN, write_config

import agent

GOOD = f'server_url = "https://monitor.example.com"\ntoken = "{TOKEN}"\n'


def load(tmp_path, text):
    path = tmp_path / "agent.toml"
    path.write_text(text)
    path.chmod(0o600)
    return agent.load_config(str(path))


def refusal(tmp_path, text):
    with pytest.raises(agent.ConfigError) as refused:
        load(tmp_path, text)
    assert str(refused.value).startswith(str(tmp_path / "agent.toml"))
    return str(refused.value).removeprefix(str(tmp_path / "agent.toml"))


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("AGENT_CONFIG", "CREDENTIALS_DIRECTORY", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


def test_the_least_config_gets_the_documented_defaults(tmp_path):
    config = load(tmp_path, GOOD)
    assert config.host_id == agent.short_host_name()
    assert config.key == KEY
    assert config.intervals == {"fast": 30, "medium": 300, "slow": 1800}
    assert (config.max_bytes, config.max_seconds) == (256 * 1024 * 1024, 7 * 86400)
    assert config.warnings == []
    assert config.url == "https://monitor.example.com"


def test_everything_can_be_set(tmp_path):
    more = (
        'host_id = "Pve_1.a-b"\n[intervals]\nfast_seconds = 1\nmedium_seconds = 1\nslow_seconds = 86400\n'
        "[spool]\nmax_mb = 1\nmax_days = 2\n"
    )
    config = load(tmp_path, GOOD + more)
    assert config.host_id == "Pve_1.a-b"
    assert config.intervals == {"fast": 1, "medium": 1, "slow": 86400}
    assert (config.max_bytes, config.max_seconds) == (1024 * 1024, 2 * 86400)


@pytest.mark.parametrize(
    "text, key, reason",
    [
        (GOOD + 'tokn = "x"', "tokn", "unknown key"),
        (GOOD + "[intervals]\nfast = 3", "intervals.fast", "unknown key"),
        (GOOD + "[spool]\nmax_gb = 3", "spool.max_gb", "unknown key"),
        (GOOD + "[logging]\nlevel = 3", "logging", "unknown key"),
        (GOOD + "host_id = 3", "host_id", "must be a text"),
        (GOOD + "intervals = 3", "intervals", "must be a table"),
        (GOOD + '[intervals]\nfast_seconds = "3"', "intervals.fast_seconds", "whole number"),
        (GOOD + "[intervals]\nfast_seconds = 3.5", "intervals.fast_seconds", "whole number"),
        (GOOD + "[intervals]\nfast_seconds = true", "intervals.fast_seconds", "whole number"),
        (GOOD + "[intervals]\nfast_seconds = 0", "intervals.fast_seconds", "out of range"),
        (GOOD + "[intervals]\nslow_seconds = 86401", "intervals.slow_seconds", "out of range"),
        (
            GOOD + "[intervals]\nfast_seconds = 301",
            "intervals.fast_seconds",
            "above medium_seconds = 300 (the default)",
        ),
        (GOOD + "[intervals]\nslow_seconds = 299", "intervals.medium_seconds", "above slow_seconds = 299"),
        (GOOD + "[spool]\nmax_mb = 0", "spool.max_mb", "out of range"),
        (GOOD + "[spool]\nmax_days = -1", "spool.max_days", "out of range"),
        (GOOD + 'host_id = ""', "host_id", "1 to 63"),
        (GOOD + 'host_id = "-x"', "host_id", "beginning with a letter"),
        (GOOD + 'host_id = "../x"', "host_id", "1 to 63"),
        (GOOD + 'host_id = "ä"', "host_id", "1 to 63"),
        (GOOD + f'host_id = "{"a" * 64}"', "host_id", "1 to 63"),
        (GOOD + 'ca_file = "/nonexistent.pem"', "ca_file", "cannot be read"),
        (GOOD + r'ca_file = "/etc/ca\u0000"', "ca_file", "NUL"),
        (GOOD + 'token_file = "t"', "token_file", "not both"),
        (f'token = "{TOKEN}"', "server_url", "missing"),
        ('server_url = "https://x"', "token", "missing"),
        ('server_url = "https://x"\ntoken = "hunter2"', "token", "begins with whsec_"),
        ('server_url = "https://x"\ntoken = "whsec_@@@"', "token", "not base64"),
        ('server_url = "https://x"\ntoken = "whsec_MDEy"', "token", "too short"),
        ('server_url = "https://x"\ntoken_file = "/nonexistent"', "token_file", "No such file"),
    ],
)
def test_mistake_is_refused_with_file_key_and_reason(tmp_path, text, key, reason):
    told = refusal(tmp_path, text)
    assert told.startswith(f": {key}: ")
    assert reason in told


@pytest.mark.parametrize(
    "url, instead",
    [
        ("wss://mon.example.com/agent", "https://mon.example.com"),
        ("ws://mon.example.com:4000/x", "https://mon.example.com:4000"),
        ("http://mon.example.com", "https://mon.example.com"),
        ("http://192.168.1.5:4000", "https://192.168.1.5:4000"),
        ("http://127.0.0.1.example.com", "https://127.0.0.1.example.com"),
        ("mon.example.com", "https://"),
        ("ftp://mon.example.com", "https://"),
    ],
)
def test_other_schemes_are_refused_with_what_to_write_instead(tmp_path, url, instead):
    told = refusal(tmp_path, f'server_url = "{url}"\ntoken = "{TOKEN}"')
    assert told.startswith(": server_url: ")
    assert f'"{instead}"' in told


@pytest.mark.parametrize(
    "url", ["https://", "https://:443", "https://a:b@c", "https://a:99999", "https://a:", "https://a b"]
)
def test_broken_address_is_refused(tmp_path, url):
    assert ": server_url: " in refusal(tmp_path, f'server_url = "{url}"\ntoken = "{TOKEN}"')


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:4000", "http://127.0.0.1", "http://127.8.9.1:1", "http://[::1]:4000/",
        "HTTPS://mon.example.com:8443/sub/path/",
    ],
)  # fmt: skip
def test_address_is_taken_without_the_slash_at_its_end(tmp_path, url):
    assert load(tmp_path, f'server_url = "{url}"\ntoken = "{TOKEN}"').url == url.rstrip("/")


@pytest.mark.parametrize("text", ["a = = b", 'a = "b', "\xff\xfe"])
def test_what_is_no_toml_is_refused_with_the_file(tmp_path, text):
    path = tmp_path / "agent.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(agent.ConfigError, match="agent.toml: not"):
        agent.load_config(str(path))


def test_no_message_repeats_the_token(tmp_path):
    secret = "whsec_" + "c2VjcmV0" * 5 + "!"
    assert "c2VjcmV0" not in refusal(tmp_path, f'server_url = "https://x"\ntoken = "{secret}"')


@pytest.mark.parametrize("mode, warned", [(0o600, False), (0o644, True), (0o604, True), (0o660, False)])
def test_config_readable_by_others_gets_a_warning(tmp_path, mode, warned):
    path = write_config(tmp_path, "https://x")
    path.chmod(mode)
    warnings = agent.load_config(str(path)).warnings
    assert bool(warnings) is warned
    assert all("chmod 600" in warning for warning in warnings)


@pytest.mark.parametrize("mode, words", [(0o622, "writable by others"), (0o602, "writable by others"), (0o666, "readable by others")])
def test_config_that_others_may_write_gets_a_warning(tmp_path, mode, words):
    path = write_config(tmp_path, "https://x")
    path.chmod(mode)
    assert any(words in warning and "chmod 600" in warning for warning in agent.load_config(str(path)).warnings)


def test_config_of_another_user_or_in_a_folder_that_others_may_write_gets_a_warning(tmp_path, monkeypatch):
    path = write_config(tmp_path, "https://x")
    tmp_path.chmod(0o777)
    (warning,) = agent.load_config(str(path)).warnings
    assert str(tmp_path) in warning and "another config" in warning
    tmp_path.chmod(0o1777)  # as /tmp: others cannot rename what is not theirs
    assert agent.load_config(str(path)).warnings == []
    real = os.stat

    def stat(name, *more, **named):
        found = real(name, *more, **named)
        return os.stat_result((*found[:4], 4711, *found[5:])) if str(name) == str(path) else found

    monkeypatch.setattr(os, "stat", stat)
    (warning,) = agent.load_config(str(path)).warnings
    assert "owned by another user (uid 4711)" in warning


def test_token_may_lie_in_a_file_beside_the_config(tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "token").chmod(0o600)
    assert load(tmp_path, 'server_url = "https://x"\ntoken_file = "token"').key == KEY


@pytest.mark.parametrize("named", ["", 'token_file = "token"', 'token_file = "${CREDENTIALS_DIRECTORY}/token"'])
def test_token_may_be_a_credential_of_systemd(tmp_path, monkeypatch, named):
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "token").write_text(TOKEN)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    config = load(tmp_path, f'server_url = "https://x"\n{named}')
    assert config.key == KEY
    assert config.warnings == []


def test_flag_goes_before_environment_before_the_usual_place(monkeypatch):
    assert agent.config_path(None) == "/etc/proxmox-monitor/agent.toml"
    monkeypatch.setenv("AGENT_CONFIG", "/a")
    assert agent.config_path(None) == "/a"
    assert agent.config_path("/b") == "/b"


def test_state_lies_where_systemd_says(monkeypatch):
    assert agent.state_path() == "/var/lib/proxmox-monitor-agent"
    monkeypatch.setenv("STATE_DIRECTORY", "/a:/b")
    assert agent.state_path() == "/a"
