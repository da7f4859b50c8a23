#!/usr/bin/env python3
"""The demo: server, agent and a played fleet on this machine, with all they keep in .demo/.

    options -> folder -> processes -> tokens -> the demo

`./build.sh demo` starts it, on whatever Python is there; the programs run in a virtual environment of their own.
Ctrl-C (or SIGTERM) ends them in order, and what was collected is kept for the next time.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / ".demo"
PYTHON = DEMO / "venv" / "bin" / "python"
NOT_OURS = ("SECRET_KEY_BASE", "SERVER_CONFIG", "HISTORY_URL", "TRUSTED_PROXY", "AGENT_CONFIG", "NOTIFY_SOCKET",
            "HEARTBEAT_URL", "INSTALL_DIR")  # fmt: skip


def fail(message: str) -> SystemExit:
    print(f"demo: {message}", file=sys.stderr)
    return SystemExit(1)


# --- options ---


class Usage(argparse.HelpFormatter):
    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, "Usage: ")


def number(least: int, most: int) -> Any:
    """A whole number from `least` to `most`, for argparse."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 6 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"a number from {least} to {most}")
        return int(text)

    return parse


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./build.sh demo", formatter_class=Usage)
    parser.add_argument("--fleet", type=number(1, 2000), default=0, metavar="N", help="also play N Proxmox hosts (1-2000)")
    parser.add_argument("--interval", type=number(1, 3600), default=30, metavar="SECONDS", help="how often they report")
    parser.add_argument("--port", type=number(1, 65535), metavar="PORT", help="this one (default: a free one from 4000)")
    return parser.parse_args(argv)


def choose_port(asked: int | None) -> int:
    """The first free port from 4000 on; one that was asked for has to be free."""
    for port in [asked] if asked else range(4000, 4050):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise fail(f"port {asked or 4000} is taken; name another with --port")


# --- folder ---


def take_folder() -> None:
    """One demo at a time: .demo/pid names it."""
    os.umask(0o077)
    (DEMO / "agent-state").mkdir(parents=True, exist_ok=True)
    try:
        running = int((DEMO / "pid").read_text())
        os.kill(running, 0)
    except (OSError, ValueError):
        (DEMO / "pid").write_text(f"{os.getpid()}\n")
    else:
        raise fail(f"a demo of this folder runs already (process {running})")


def kept_password() -> str:
    path = DEMO / "password"
    if not path.exists() or not path.read_text().strip():
        path.write_text(secrets.token_urlsafe(9) + "\n")
    return path.read_text().strip()


# --- processes ---


class Processes:
    """What the demo has started, each with its log in .demo/; ended in the other order."""

    def __init__(self, env: dict[str, str]):
        self.env = env
        self.running: list[subprocess.Popen[bytes]] = []

    def command(self, *argv: str, text: str = "") -> str:
        """What a command of server.py prints; '' if it failed."""
        done = subprocess.run([PYTHON, "server.py", *argv], cwd=ROOT, env=self.env, input=text, text=True,
                              capture_output=True)  # fmt: skip
        return done.stdout if done.returncode == 0 else ""

    def start(self, name: str, *argv: str | Path, **env: str) -> subprocess.Popen[bytes]:
        """In a session of its own: Ctrl-C at the terminal reaches the demo alone."""
        with open(DEMO / f"{name}.log", "ab") as log:
            process = subprocess.Popen([PYTHON, *argv], cwd=ROOT, env={**self.env, **env}, stdin=subprocess.DEVNULL,
                                       stdout=log, stderr=log, start_new_session=True)  # fmt: skip
        self.running.append(process)
        return process

    def wait_for_server(self, url: str, server: subprocess.Popen[bytes]) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(300):
            try:
                opener.open(url + "/healthz", timeout=2).close()
                return
            except OSError:
                if server.poll() is not None:
                    break
                time.sleep(0.1)
        print("".join((DEMO / "server.log").read_text().splitlines(keepends=True)[-5:]), file=sys.stderr)
        raise fail("the server did not start; see .demo/server.log")

    def stop(self) -> None:
        for process in reversed(self.running):
            process.terminate()
            process.wait()


# --- tokens ---


def read_token(told: str) -> str:
    found = re.search(r"^TOKEN: (\S+)$", told, re.M)
    return found[1] if found else ""


def host_token(processes: Processes, name: str) -> str:
    """Of this machine: kept from the last time, else registered (or rotated, when only the token was lost)."""
    path = DEMO / "host-token"
    kept = path.read_text().split() if path.exists() else []
    if len(kept) != 2 or kept[0] != name:
        token = read_token(processes.command("register-host", name) or processes.command("rotate-token", name))
        if not token:
            raise fail("could not register this machine")
        path.write_text(f"{name}\n{token}\n")
        kept = [name, token]
    return kept[1]


def fleet_token(processes: Processes) -> str:
    """A new admin token for the fleet's player in each run; it registers the hosts it plays."""
    processes.command("revoke-api-token", "demo-fleet")
    return read_token(processes.command("create-api-token", "demo-fleet", "--admin"))


# --- the demo ---


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda *_: sys.exit(0))  # the way a demo ends
    take_folder()
    processes = Processes({})
    try:
        play(processes, options)
    finally:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)
        processes.stop()
        (DEMO / "pid").unlink(missing_ok=True)
        if processes.running:
            print("\nStopped. What was collected is kept in .demo/ for the next time.", flush=True)
    return 1


def play(processes: Processes, options: argparse.Namespace) -> None:
    """Until one of them ends by itself, which none of them should."""
    if subprocess.run(["./build.sh", "venv", DEMO / "venv", "requirements.txt"], cwd=ROOT).returncode:
        raise SystemExit(1)
    port = choose_port(options.port)
    url, password = f"http://127.0.0.1:{port}", kept_password()
    processes.env = {name: value for name, value in os.environ.items() if name not in NOT_OURS} | {
        "DATABASE_PATH": str(DEMO / "monitor.db"), "LISTEN": "127.0.0.1", "PORT": str(port), "PUBLIC_URL": url,
        "PYTHONUNBUFFERED": "1"}  # fmt: skip
    processes.env["DASHBOARD_PASSWORD_HASH"] = processes.command("hash-password", text=password).strip()
    processes.command("migrate")
    processes.wait_for_server(url, processes.start("server", "server.py", "serve"))
    start_agent(processes, url)
    if options.fleet:
        processes.start("fleet", "tests/fleet.py", "--server", url, "--state", DEMO / "fleet.json", "--count",
                        str(options.fleet), "--interval", str(options.interval),
                        FLEET_API_TOKEN=fleet_token(processes))  # fmt: skip
    print(f"\n  URL:      {url}\n  Password: {password}\n\nThis machine reports as '{own_name()}'. "
          "Logs and data are in .demo/. Ctrl-C stops everything.", flush=True)  # fmt: skip
    while all(process.poll() is None for process in processes.running):
        time.sleep(0.5)
    raise fail("one of the processes has ended; see the logs in .demo/")


def own_name() -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname().split(".")[0]).lstrip("._-")
    return name[:63] or "this-machine"


def start_agent(processes: Processes, url: str) -> None:
    config, name = DEMO / "agent.toml", own_name()
    config.write_text(f'server_url = "{url}"\ntoken = "{host_token(processes, name)}"\nhost_id = "{name}"\n\n'
                      "[intervals]\nfast_seconds = 10\nmedium_seconds = 60\n")  # fmt: skip
    processes.start("agent", "agent.py", "start", "--config", config, STATE_DIRECTORY=str(DEMO / "agent-state"))


if __name__ == "__main__":
    sys.exit(main())
