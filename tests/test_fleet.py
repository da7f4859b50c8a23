"""The demo: what it plays is what agents send, its faults come and go, and one command starts and ends all of it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import fleet
import jsonschema
import pytest
from conftest import ROOT, LiveServer
from simulation import Simulation

import server

NOW = 1_800_000_000.0
SCHEMA = json.loads((ROOT / "docs" / "report.schema.json").read_text())


@pytest.fixture(scope="module")
def played() -> list[fleet.PlayedHost]:
    usual, troubled = fleet.load_recordings()
    return [
        fleet.PlayedHost(number, fleet.recording_of(number, usual, troubled), "whsec_", NOW, 1) for number in range(22)
    ]


# --- the played hosts ---


def test_what_is_played_has_the_form_of_a_report(played):
    check = jsonschema.Draft202012Validator(SCHEMA)
    for host in played:
        for at in range(0, 2 * fleet.CYCLE, 7 * fleet.MINUTE):
            report = host.report(NOW + at)
            wrong = [f"{'/'.join(map(str, one.path))}: {one.message}" for one in check.iter_errors(report)]
            assert not wrong, (host.name, wrong[:3])
            assert json.loads(json.dumps(report, allow_nan=False))["seq"] == host.seq


def test_names_and_guids_are_unique_in_the_fleet(played):
    assert len({host.name for host in played}) == len(played)
    guids = [one["guid"] for host in played for one in host.sections.get("pool_states") or () if one.get("guid")]
    assert len(guids) == len(set(guids))
    for host in played:
        assert host.sections["node"]["name"] == host.name


def test_times_are_of_now_and_counters_only_grow():
    usual, _ = fleet.load_recordings()
    host = fleet.PlayedHost(1, usual[0], "whsec_", NOW, 1)
    before = host.report(NOW)
    after = host.report(NOW + 3600)
    assert after["node"]["uptime_seconds"] - before["node"]["uptime_seconds"] == pytest.approx(3600)
    grown = 0
    for old, new in zip(fleet.walk(before["node"]), fleet.walk(after["node"]), strict=True):
        for key in old:
            if key.endswith("_total") and isinstance(old[key], (int, float)):
                assert new[key] >= old[key]
                grown += new[key] > old[key]
    assert grown
    for one in fleet.walk(after):
        for key, value in one.items():
            if key in ("ended_at", "created_at") and isinstance(value, (int, float)):
                assert value < NOW + 3600


def test_what_a_new_host_brings_along_is_past_and_has_no_gap(tmp_path):
    usual, ill = fleet.load_recordings()
    sim = Simulation(tmp_path)
    now = sim.now
    host = fleet.PlayedHost(14, fleet.recording_of(14, usual, ill), "whsec_", now, 1)
    sim.host(host.name)
    sim.post(host.name, *host.backfill(now)[:33], host.report(now))
    curves = host.curves(now)
    sim.post(host.name, *curves[:20], *curves[-3:])
    state = sim.fleet.find(host.name)
    assert state.sections["node"].time == now and state.body("node")["kernel"] == "6.2.16-3-pve"
    times = [report["time"] for report in curves]
    assert len({report["seq"] for report in curves}) == len(curves) and max(b - a for a, b in zip(times, times[1:])) < 300
    server.forecast_fleet(sim.monitor, now, sim.monitor.store.reader(), 9)
    assert 3 < server.worst_days_until_full(state) < 9
    sim.close()


@pytest.mark.parametrize(
    "fault, during, visible",
    [
        ("disk-fault", 5, lambda r: r["pool_states"][0]["state"] == "DEGRADED"),
        ("disk-fault", 12, lambda r: any(p["scan"]["function"] == "resilver" for p in r["pools"])),
        ("checksum-errors", 10, lambda r: any(d.get("checksum_errors") for d in fleet.leaves(r["pools"][0]["vdevs"]))),
        ("inactive-storage", 10, lambda r: any(s["enabled"] and not s["active"] for s in r["storages"])),
        ("full-pool", 20, lambda r: max(p["capacity_ratio"] for p in r["pools"]) > 0.9),
        ("busy-disks", 10, lambda r: r["node"]["pressure_io_full_avg10_ratio"] > 0.5),
    ],
)
def test_a_fault_appears_and_goes(fault, during, visible):
    usual, _ = fleet.load_recordings()
    number = next(n for n in range(0, 60, 3) if fleet.fault_of(n).name == fault)
    host = fleet.PlayedHost(number, usual[0], "whsec_", NOW, 1)
    assert visible({**host.sections, **host.report(NOW + during * fleet.MINUTE)})
    assert not visible({**host.sections, **host.report(NOW + 38 * fleet.MINUTE)})


# --- played against a server ---


def test_a_fleet_registers_reports_and_keeps_its_tokens(live_server: LiveServer, tmp_path):
    state = tmp_path / "fleet.json"
    env = {"PATH": os.environ["PATH"], "FLEET_API_TOKEN": live_server.api_token("fleet", "--admin")}
    argv = [sys.executable, str(ROOT / "tests" / "fleet.py"), "--server", live_server.url, "--state", str(state)]
    for attempt in (1, 2):  # the second time everything is registered already
        done = subprocess.run(
            [*argv, "--count", "12", "--interval", "1", "--seconds", "4"],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert " 0 failures" in done.stdout, done.stderr
    hosts = live_server.get("/api/v1/hosts", live_server.api_token())["items"]
    assert len(hosts) == 12
    assert all(host["last_seen_at"] and host["site"] and host["tags"] for host in hosts)
    assert {"critical", "ok"} <= {host["verdict"] for host in hosts}


# --- played in simulated time ---


def test_each_trouble_is_told_and_the_healthy_hosts_are_quiet(tmp_path):
    usual, ill = fleet.load_recordings()
    sim = Simulation(tmp_path)
    hosts = [fleet.PlayedHost(number, fleet.recording_of(number, usual, ill), "whsec_", sim.now, 1)
             for number in range(20) if fleet.fault_of(number) is None and number % 20 not in (7, *fleet.AS_RECORDED)]
    for host in hosts:
        sim.host(host.name, tags=["prod"])
        sim.post(host.name, *host.backfill(sim.now))
    began, fired = sim.now, {host.name: set() for host in hosts}
    while sim.now < began + 26 * fleet.HOUR:
        for host in hosts:
            host.ticks = 0  # a full report each time
            sim.post(host.name, host.report(sim.now))
            sim.fleet.find(host.name).last_seen_at = sim.now
        sim.turn()
        server.index_copies(sim.monitor, sim.now, sim.monitor.store.reader())
        server.forecast_fleet(sim.monitor, sim.now, sim.monitor.store.reader(), 9)
        for alert in sim.alerts():
            name = alert["host"] or f"pve-{alert['object'].removeprefix('clusters/cluster-').partition('/')[0]}"
            fired[name].add(alert["rule"] + (" info" if alert["severity"] == "info" else ""))
        sim.now += (5 if sim.now - began < 25 * fleet.MINUTE else 30) * fleet.MINUTE  # five scrubs come at first
    wanted = {host.name: {trouble.rule for trouble in host.troubles} - {""} for host in hosts}
    told = {name: {rule.removesuffix(" info") for rule in rules} for name, rules in fired.items()}
    missing = {name: rules - told[name] for name, rules in wanted.items() if rules - told[name]}
    loud = {name: alarms for name, rules in wanted.items()
            if not rules and (alarms := {rule for rule in fired[name] if not rule.endswith("info")})}
    sick = [sim.fleet.find(host.name) for host in hosts if host.troubles]
    rows = {name: list(server.RESOURCES[name].of_hosts(sim.fleet, sick, sim.now)) for name in (
        "copies", "replacements", "blindspots", "traps", "forecasts", "snapshots", "scrubs", "drift", "cohorts")}
    sim.close()
    assert (missing, loud, [name for name, found in rows.items() if not found]) == ({}, {}, [])
    assert {"warning"} <= {row["verdict"] for row in rows["copies"]} and any(row["grew"] for row in rows["forecasts"])


# --- the command ---


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what is tracked, with nothing made yet."""
    target = tmp_path / "proxmon"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/test_", "docs/", "bench/")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
            (target / name).chmod((ROOT / name).stat().st_mode)
    return target


def read_until(process: subprocess.Popen[str], words: str, seconds: float) -> str:
    """Output up to the line with these words."""
    told, until = "", time.monotonic() + seconds
    assert process.stdout is not None
    while time.monotonic() < until:
        line = process.stdout.readline()
        told += line
        if words in line or not line:
            break
    assert words in told, told
    return told


def test_the_demo_starts_shows_its_password_reports_and_stops(checkout):
    argv = ["./build.sh", "demo", "--fleet", "3"]
    for how in (signal.SIGINT, signal.SIGTERM):  # the second run finds what the first has left
        process = subprocess.Popen(
            argv, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            told = read_until(process, "Ctrl-C", 100)
            url, password = re.search(r"URL: +(\S+)", told)[1], re.search(r"Password: +(\S+)", told)[1]
            assert password == (checkout / ".demo" / "password").read_text().strip()
            wait_for_hosts(checkout, 4)
            assert urllib.request.urlopen(url + "/healthz").status == 200
        finally:
            process.send_signal(how)
            assert process.wait(20) == 0
            assert process.stdout is not None
            process.stdout.close()
        with pytest.raises(OSError):
            urllib.request.urlopen(url + "/healthz", timeout=2)
        left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        assert str(checkout) not in left


def wait_for_hosts(checkout: Path, count: int) -> None:
    """Until so many hosts have reported."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        env = {"PATH": os.environ["PATH"], "DATABASE_PATH": str(checkout / ".demo" / "monitor.db")}
        answer = subprocess.run(
            [sys.executable, "server.py", "list-hosts", "--json"], cwd=checkout, env=env, capture_output=True, text=True
        )
        if answer.returncode == 0 and sum(bool(host["last_seen_at"]) for host in json.loads(answer.stdout)) == count:
            return
        time.sleep(0.5)
    raise AssertionError(answer)


def test_a_demo_on_a_taken_port_says_so(checkout):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        argv = ["./build.sh", "demo", "--port", str(taken.getsockname()[1])]
        answer = subprocess.run(argv, cwd=checkout, capture_output=True, text=True, timeout=100)
    assert answer.returncode == 1
    assert "taken" in answer.stderr


@pytest.mark.parametrize(
    "words", [["--fleet"], ["--fleet", "many"], ["--fleet", "0"], ["--port", "99999"], ["--unknown"]]
)
def test_a_wrong_option_of_the_demo_is_a_matter_of_usage(words):
    answer = subprocess.run(["./build.sh", "demo", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 2
    assert "Usage" in answer.stderr
