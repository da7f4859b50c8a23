"""What people type: start, once, check, stop, version; exit codes and what stands on which stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from agent_support import (
    FakeProbe,
    Sink,
    accept,
    closed_port_url,
    problem,
    registered,
    wait_for,
    write_config,
)

import agent

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_state(monkeypatch, tmp_path):
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    for name in ("AGENT_CONFIG", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No config at the usual place."""
    monkeypatch.setattr(agent, "CONFIG_PATH", str(tmp_path / "no" / "agent.toml"))


def say(probe, memory):
    return {"name": probe.read("/proc/sys/kernel/hostname").strip(), "ran": probe.run("echo", "hi").strip()}


COLLECTORS = {"node": ("fast", say), "pools": ("medium", lambda p, m: []), "disks": ("slow", lambda p, m: [m.get("x")])}


# --- once ---


def test_once_works_without_a_config_and_prints_the_report(nowhere, capsys):
    with registered(**COLLECTORS):
        assert agent.main(["once"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["host_id"] == agent.short_host_name()
    assert report["seq"] == 1
    assert report["node"]["ran"] == "hi" and report["pools"] == [] and "disks" in report


@pytest.mark.parametrize("tick, section", [("fast", "node"), ("medium", "pools"), ("slow", "disks")])
def test_once_collects_only_the_tick_that_is_named(tick, section, nowhere, capsys):
    with registered(**COLLECTORS):
        assert agent.main(["once", "--tick", tick]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tick"] == tick
    assert set(report) - agent.HEADER_KEYS == {section}


def test_once_reads_the_agents_memory_and_leaves_it_alone(nowhere, tmp_path, capsys):
    (tmp_path / "state" / "memory").mkdir(parents=True)
    kept = tmp_path / "state" / "memory" / "disks.json"
    kept.write_text('{"x": 7}')
    with registered(**COLLECTORS):
        assert agent.main(["once", "--tick", "slow"]) == 0
    assert json.loads(capsys.readouterr().out)["disks"] == [7]
    assert kept.read_text() == '{"x": 7}' and len(list((tmp_path / "state").rglob("*"))) == 2


def test_once_prints_nothing_that_a_terminal_acts_on(nowhere, capsys):
    name = "\x9b31m\x7f\u202eevil\x1b]0;x\x07\n\U000e0001ü"
    with registered(pools=("medium", lambda p, m: [{"name": name}])):
        assert agent.main(["once"]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip("\n").isprintable() and "ü" in printed
    assert json.loads(printed)["pools"] == [{"name": name}]


def test_explain_lists_reads_and_commands_on_stderr_and_leaves_stdout_json(nowhere, capsys):
    with registered(**COLLECTORS):
        assert agent.main(["once", "--tick", "fast", "--explain"]) == 0
    told = capsys.readouterr()
    json.loads(told.out)
    rows = [line.split(maxsplit=3) for line in told.err.splitlines()]
    assert any(row[0] == "read" and row[3] == "ok         /proc/sys/kernel/hostname" for row in rows)
    assert any(row[0] == "run" and row[3] == "exit 0     echo hi" and int(row[2]) == 3 for row in rows)
    assert "1 reads, 1 commands" in told.err


def test_once_send_sends_what_it_printed_and_prints_the_answer(tmp_path, capsys):
    with Sink() as sink, registered(**COLLECTORS):
        config = write_config(tmp_path, sink.url)
        assert agent.main(["--config", str(config), "once", "--send"]) == 0
    printed, answer = capsys.readouterr().out.splitlines()
    assert json.loads(printed) == sink.reports[0]
    assert answer.startswith("200 ") and '"accepted": 1' in answer


def test_once_send_fails_when_the_server_refuses(tmp_path, capsys):
    with Sink(problem(404, "unknown_host")) as sink, registered(**COLLECTORS):
        config = write_config(tmp_path, sink.url)
        assert agent.main(["once", "--send", "--config", str(config)]) == 1
    told = capsys.readouterr()
    assert "register-host pve-host-01" in told.err
    assert told.out.splitlines()[1].startswith("404 ")


def test_once_send_without_a_config_says_so(nowhere, capsys):
    with registered(**COLLECTORS):
        assert agent.main(["once", "--send"]) == 1
    assert "needs a config" in capsys.readouterr().err


def test_config_that_was_named_must_be_there(monkeypatch, tmp_path, capsys):
    assert agent.main(["once", "--config", str(tmp_path / "none.toml")]) == 1
    monkeypatch.setenv("AGENT_CONFIG", str(tmp_path / "none.toml"))
    assert agent.main(["once"]) == 1
    assert capsys.readouterr().err.count("none.toml: No such file") == 2


# --- check ---


def check(capsys, config):
    code = agent.main(["check", "--config", str(config)])
    lines = capsys.readouterr().out.splitlines()
    assert all(line[:2] in ("✓ ", "✗ ") for line in lines)
    return code, [line[2:] for line in lines if line[0] == "✗"], lines


def test_check_is_content_with_a_good_host(tmp_path, capsys):
    with Sink() as sink:
        code, bad, lines = check(capsys, write_config(tmp_path, sink.url))
    assert (code, bad) == (0, [])
    text = "\n".join(lines)
    for subject in ("config:", "state:", "zpool:", "server:", "token: accepted", "clock:"):
        assert subject in text
    assert sink.requests[0].reports == []  # nothing was reported by checking


@pytest.mark.parametrize(
    "answer, told",
    [
        (problem(401, "invalid_token"), "rotate-token pve-host-01"),
        (problem(404, "unknown_host"), "register-host pve-host-01"),
        (problem(503, "busy"), "503 busy"),
        (lambda request: (200, "<html>", {}), "server_url"),
    ],
)
def test_check_says_what_is_wrong_with_the_token_or_server(answer, told, tmp_path, capsys):
    with Sink(answer) as sink:
        code, bad, _ = check(capsys, write_config(tmp_path, sink.url))
    assert code == 1
    assert any(told in line for line in bad)


def test_check_takes_a_server_that_dislikes_only_the_empty_batch(tmp_path, capsys):
    with Sink(problem(422, "invalid_report")) as sink:
        code, bad, _ = check(capsys, write_config(tmp_path, sink.url))
    assert (code, bad) == (0, [])


def test_check_measures_the_clock(tmp_path, capsys):
    def ahead(request):
        status, answer, headers = accept(request)
        return status, {**answer, "server_time": time.time() + 200}, headers

    with Sink(ahead) as sink:
        code, bad, _ = check(capsys, write_config(tmp_path, sink.url))
    assert code == 1
    assert any(line.startswith("clock: +200") or line.startswith("clock: +199") for line in bad)


def test_check_without_server_or_config(tmp_path, capsys):
    code, bad, _ = check(capsys, write_config(tmp_path, closed_port_url()))
    assert code == 1 and any("cannot reach" in line for line in bad)
    code, bad, _ = check(capsys, tmp_path / "none.toml")
    assert code == 1 and any("No such file" in line for line in bad)


def test_tool_is_missed_only_where_it_is_needed(monkeypatch):
    monkeypatch.setattr(agent, "TOOLS", (("no-zpool", "/proc", "pools"), ("no-smartctl", "/none", "disks")))
    results = agent.check_tools(FakeProbe())
    assert [good for good, _ in results] == [False, True]


# --- stop, version, usage ---


def run(*argv, **environ):
    return subprocess.run(
        [sys.executable, "agent.py", *argv],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=30,
    )


def test_stop_ends_the_running_agent(tmp_path):
    with Sink() as sink:
        config = write_config(tmp_path, sink.url)
        argv = [sys.executable, "agent.py", "--config", str(config)]  # `start` is what it does without a command
        with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            wait_for(lambda: sink.requests)
            assert run("stop").returncode == 0
            assert process.wait(5) == 0


def test_stop_without_an_agent_and_with_an_old_pid_file(tmp_path):
    assert run("stop").returncode == 0
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "agent.pid").write_text(f"{os.getpid()}\n")  # a process that is no agent: not ours to end
    stopped = run("stop")
    assert stopped.returncode == 0 and "not running" in stopped.stdout


def test_version():
    assert run("version").stdout == f"proxmox-monitor-agent {agent.VERSION}\n"


@pytest.mark.parametrize("argv", [["frobnicate"], ["once", "--tick", "hourly"], ["start", "--fast"]])
def test_wrong_usage_is_exit_code_2(argv):
    answer = run(*argv)
    assert answer.returncode == 2 and "usage:" in answer.stderr


def test_mistake_in_the_config_is_one_line_and_exit_code_1(tmp_path):
    config = write_config(tmp_path, "wss://mon.example.com")
    answer = run("start", "--config", str(config))
    assert answer.returncode == 1 and answer.stdout == ""
    assert answer.stderr.count("\n") == 1 and '"https://mon.example.com"' in answer.stderr


def test_warning_about_a_readable_config_does_not_disturb_the_first_lines(tmp_path):
    config = write_config(tmp_path, closed_port_url())
    config.chmod(0o644)
    answer = run("once", "--tick", "fast", "--config", str(config))
    assert answer.returncode == 0
    assert "readable by others" in answer.stderr
    json.loads(answer.stdout)


def test_output_is_utf8_in_the_c_locale(tmp_path):
    answer = run("check", "--config", str(tmp_path / "none"), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert answer.returncode == 1 and "✗" in answer.stdout


def test_state_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    config = write_config(tmp_path, "https://x")
    answer = run("start", "--config", str(config), STATE_DIRECTORY=str(tmp_path / "file" / "state"))
    assert answer.returncode == 1 and answer.stderr.count("\n") == 1


def test_frozen_binarys_environment_is_repaired(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/agent/_internal:/mine")
    monkeypatch.setenv("LD_LIBRARY_PATH_ORIG", "/mine")
    monkeypatch.setenv("_PYI_ARCHIVE_FILE", "x")
    agent.repair_environ()
    assert os.environ["LD_LIBRARY_PATH"] == "/mine"
    assert not [name for name in os.environ if name.startswith("_PYI_") or name == "LD_LIBRARY_PATH_ORIG"]


def test_every_command_has_a_sentence_for_its_help():
    told = run("--help").stdout
    for name in agent.COMMANDS:
        assert name in told
