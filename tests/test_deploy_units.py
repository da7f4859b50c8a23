"""The units and Caddyfile.example as they are shipped: systemd, Caddy and a real agent take them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from beside import Caddy
from conftest import ROOT, LiveServer, find_program

import agent
import server

UNITS = {"proxmox-monitor-agent": agent.COMMANDS, "proxmox-monitor": server.COMMANDS}
# What zpool, smartctl and /etc/pve need, and the server does not: 0 would be nothing allowed at all.
EXPOSURE_MOST = {"proxmox-monitor-agent": 3.2, "proxmox-monitor": 1.3}


# --- units ---


def unit_lines(name: str) -> list[str]:
    return (ROOT / "systemd" / f"{name}.service").read_text().splitlines()


def copy_unit(name: str, folder: Path) -> Path:
    """The unit with its programs replaced by one that is there on every machine."""
    path = folder / f"{name}.service"
    path.write_text(re.sub(r"/usr/local/bin/proxmox-monitor\S*", "/bin/true", "\n".join(unit_lines(name)) + "\n"))
    return path


@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_nothing_wrong_with_a_unit(name, tmp_path):
    checked = subprocess.run([find_program("systemd-analyze"), "verify", "--man=no", copy_unit(name, tmp_path)],
                             capture_output=True, text=True, timeout=60)  # fmt: skip
    # It also reads the units of the machine it runs on: only what it says about ours counts.
    assert [line for line in checked.stderr.splitlines() if name in line] == []
    assert checked.returncode == 0


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_as_closed_as_it_can_be(name, tmp_path):
    argv = [find_program("systemd-analyze"), "security", "--no-pager", "--offline=yes", str(copy_unit(name, tmp_path))]
    told = subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout
    score = float(re.search(r"Overall exposure level for \S+: ([0-9.]+)", told).group(1))
    assert score <= EXPOSURE_MOST[name]


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_runs_commands_that_exist(name):
    commands = [line.split()[1] for line in unit_lines(name) if line.startswith("Exec") and "/bin/kill" not in line]
    assert commands and set(commands) <= set(UNITS[name])


def test_the_agent_unit_leaves_open_what_zpool_and_smartctl_need():
    """Each of these was seen to break them (PrivateDevices hides /dev/zfs, ProcSubset takes /proc/spl away)."""
    settings = dict(line.split("=", 1) for line in unit_lines("proxmox-monitor-agent") if re.match(r"[A-Z]\w+=", line))
    assert not {"PrivateDevices", "PrivateNetwork", "PrivateUsers", "ProcSubset", "DynamicUser"} & set(settings)
    assert "DeviceAllow=/dev/zfs rw" in unit_lines("proxmox-monitor-agent")
    assert {"CAP_SYS_ADMIN", "CAP_SYS_RAWIO"} <= set(settings["CapabilityBoundingSet"].split())


def test_the_watchdog_waits_longer_than_any_command_may_take():
    settings = dict(line.split("=", 1) for line in unit_lines("proxmox-monitor-agent") if re.match(r"[A-Z]\w+=", line))
    assert int(settings["WatchdogSec"]) >= 2 * agent.ZFS_LIMIT


# --- Caddy ---


@pytest.fixture(scope="module")
def caddy(tmp_path_factory):
    """(Caddy, the server behind it)"""
    folder = tmp_path_factory.mktemp("caddy")
    behind = LiveServer(folder)
    caddy = Caddy(folder, behind.port)
    behind.env["PUBLIC_URL"] = caddy.url
    behind.start()
    try:
        caddy.wait()
        yield caddy, behind
    finally:
        behind.stop()
        caddy.process.terminate()
        caddy.process.wait(15)


def write_agent_config(folder: Path, url: str, token: str, ca_file: Path | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "agent.toml"
    text = f'server_url = "{url}"\nhost_id = "pve1"\ntoken = "{token}"\n'
    path.write_text(text + (f'ca_file = "{ca_file}"\n' if ca_file else ""))
    path.chmod(0o600)
    return path


def run_agent(folder: Path, config: Path, until: str, seconds: float = 20) -> str:
    """A real agent until its log says so; the log."""
    env = {"PATH": os.environ["PATH"], "STATE_DIRECTORY": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    log = folder / "agent.log"
    with open(log, "wb") as handle:
        argv = [sys.executable, str(ROOT / "agent.py"), "start", "--config", str(config)]
        process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=handle, stderr=handle)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline and until not in log.read_text() and process.poll() is None:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)
    return log.read_text()


def test_an_agent_posts_through_caddy_with_a_private_ca(caddy, tmp_path):
    proxy, behind = caddy
    token = behind.register("pve1")
    config = write_agent_config(tmp_path / "agent", proxy.url, token, proxy.root)
    told = run_agent(tmp_path / "agent", config, "reporter: accepted host:pve1")
    assert f"reporter: connected to {proxy.url}" in told
    assert "reporter: accepted host:pve1" in told
    host = behind.get("/api/v1/hosts/pve1", behind.api_token("through-caddy"))
    assert host["last_seen_at"] is not None and host["sections"]["node"]["body"]


def test_an_agent_refuses_a_certificate_it_cannot_check(caddy, tmp_path):
    proxy, _ = caddy
    token = "whsec_" + "A" * 43 + "="
    told = run_agent(tmp_path / "agent", write_agent_config(tmp_path / "agent", proxy.url, token), "ca_file")
    assert "certificate" in told and "accepted" not in told.replace("not accepted", "")


def test_caddy_hands_on_pages_with_the_security_headers(caddy):
    headers, body = caddy[0].get("/login")
    assert b"<form" in body
    assert headers["strict-transport-security"].startswith("max-age=")
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "same-origin"
    assert "server" not in headers
    assert headers["content-security-policy"].count("default-src") == 1  # not once more by Caddy


def test_an_address_that_a_client_claims_does_not_reach_the_server(caddy):
    proxy, behind = caddy
    with pytest.raises(urllib.error.HTTPError) as refused:
        proxy.get("/login", b"password=wrong", X_Forwarded_For="203.0.113.9")
    assert refused.value.code == 401
    told = behind.log.read_text()
    assert "failed log-in from 127.0.0.1" in told or "failed log-in from ::1" in told
    assert "203.0.113.9" not in told


def test_a_body_beyond_all_limits_ends_at_caddy(caddy):
    proxy, _ = caddy
    try:
        with pytest.raises(urllib.error.HTTPError) as refused:
            proxy.get("/api/v1/hosts/pve1/reports", bytes(6 << 20), Content_Type="application/json")
        assert refused.value.code in (400, 413, 502)
    except (OSError, urllib.error.URLError):  # cut off while it was still sending
        pass


def test_each_request_is_in_the_access_log(caddy):
    proxy, _ = caddy
    proxy.get("/healthz?seen-in-the-log")
    deadline = time.monotonic() + 5
    while "seen-in-the-log" not in proxy.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    lines = [json.loads(line) for line in proxy.log.read_text().splitlines()]
    assert any(line["request"]["uri"] == "/healthz?seen-in-the-log" and line["status"] == 200 for line in lines)
