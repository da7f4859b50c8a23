"""From a pool's state file to somebody's phone, with nothing in between left out: a real agent process that looks by
itself, a real server process, a real HTTP sink. Only the files of the ZFS module are the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, LiveServer
from test_end_to_end import wait_for
from test_server_notifications import HttpSink, hook

# The agent as it is, but for where it finds /proc/spl and /sys/module/zfs.
LAUNCHER = """
import sys
sys.path.insert(0, {root!r})
import agent

def moved(path):
    return {files!r} + path if path.startswith(("/proc/spl/", "/sys/module/zfs")) else path

for name in ("read", "read_line", "list_dir", "exists", "stat", "readlink"):
    def wrap(real):
        return lambda self, path, *rest, **more: real(self, moved(path), *rest, **more)
    setattr(agent.Probe, name, wrap(getattr(agent.Probe, name)))
sys.exit(agent.main(["start", "--config", {config!r}]))
"""


class ZfsHost:
    """A host with one pool, watched by a real agent process at its usual pace."""

    def __init__(self, folder: Path, server: LiveServer, token: str):
        self.files, self.state, self.log = folder / "host", folder / "agent-state", folder / "agent.log"
        self.state.mkdir()
        (self.files / "sys/module/zfs").mkdir(parents=True)
        (self.files / "proc/spl/kstat/zfs/tank").mkdir(parents=True)
        self.set("ONLINE")
        config = folder / "agent.toml"
        config.write_text(f'server_url = "{server.url}"\ntoken = "{token}"\nhost_id = "pve1"\n')
        config.chmod(0o600)
        script = LAUNCHER.format(root=str(ROOT), files=str(self.files), config=str(config))
        env = {"PATH": os.environ["PATH"], "STATE_DIRECTORY": str(self.state), "PYTHONUNBUFFERED": "1"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([sys.executable, "-c", script], env=env, stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log)  # fmt: skip

    def set(self, state: str) -> None:
        (self.files / "proc/spl/kstat/zfs/tank/state").write_text(state + "\n")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(15)


@pytest.fixture
def sink():
    one = HttpSink()
    yield one
    one.close()


def test_a_pool_that_degrades_is_told_within_ten_seconds_and_its_recovery_too(tmp_path, sink):
    settings = tmp_path / "server.toml"
    settings.write_text(hook(sink.url, 'rules = ["pool-state"]'))
    live = LiveServer(tmp_path, SERVER_CONFIG=str(settings))
    token, api = live.register("pve1"), live.api_token()
    live.start()
    host = ZfsHost(tmp_path, live, token)
    try:
        wait_for(lambda: [one["state"] for one in live.get("/api/v1/pools", api)["items"]] == ["ONLINE"])
        time.sleep(1)  # anywhere between two looks
        assert sink.got == []
        began = time.monotonic()
        host.set("DEGRADED")
        wait_for(lambda: sink.got, 15)
        took = time.monotonic() - began
        print(f"state file to notification: {took:.2f} s")
        alert = sink.json()["alerts"][0]
        assert (alert["kind"], alert["rule"], alert["host"], alert["object"], alert["severity"]) == (
            "firing", "pool-state", "pve1", "pools/tank", "critical")  # fmt: skip
        assert took <= 10
        host.set("ONLINE")
        wait_for(lambda: any(one["kind"] == "resolved" for got in range(len(sink.got))
                             for one in sink.json(got)["alerts"]), 60)  # fmt: skip
    finally:
        host.stop()
        live.stop()
