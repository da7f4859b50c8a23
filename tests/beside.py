"""Real programs that stand beside the server, each with folders and ports of its own: Caddy, VictoriaMetrics."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from conftest import ROOT, find_program, free_port


class Caddy:
    """Debian's Caddy with Caddyfile.example: only the name, the ports and the folders are this test's."""

    def __init__(self, folder: Path, upstream: int):
        self.folder, self.port = folder, free_port()
        self.url = f"https://localhost:{self.port}"
        self.log = folder / "access.log"
        text = (ROOT / "Caddyfile.example").read_text()
        for old, new in (
            ("monitor.example.com {\n", f"{self.url} {{\n\ttls internal\n"),
            ("{\n\t# Slow", f"{{\n\tadmin off\n\tskip_install_trust\n\thttp_port {free_port()}\n\t# Slow"),
            ("127.0.0.1:4000", f"127.0.0.1:{upstream}"),
            ("/var/log/caddy/monitor.log", str(self.log)),
        ):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / "Caddyfile").write_text(text)
        env = {name: str(folder) for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
        env["PATH"] = os.environ["PATH"]
        argv = [find_program("caddy"), "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]
        with open(folder / "caddy.log", "wb") as log:
            self.process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.root = folder / "caddy/pki/authorities/local/root.crt"

    def wait(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/healthz")
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError((self.folder / "caddy.log").read_text()[-2000:])

    def get(self, path: str, body: bytes | None = None, **headers: str):
        context = ssl.create_default_context(cafile=str(self.root))
        handlers = urllib.request.HTTPSHandler(context=context), urllib.request.ProxyHandler({})
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, given)
        with urllib.request.build_opener(*handlers).open(request, timeout=10) as answer:
            return {name.lower(): value for name, value in answer.headers.items()}, answer.read()


class Victoria:
    """A real VictoriaMetrics on a free port; it can be killed and started again."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        argv = [find_program("victoria-metrics"), f"-storageDataPath={self.folder}", "-retentionPeriod=10y",
                f"-httpListenAddr=127.0.0.1:{self.port}", "-dedup.minScrapeInterval=1ms", *more]  # fmt: skip
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self.answers)

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(self.url + "/health", timeout=5).close()
            return True
        except OSError:
            return False

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(30)

    def values(self, which: str, at: float) -> list[dict[str, Any]]:
        form = {"query": f"{which}[1y]", "time": at + 60, "nocache": 1}
        with urllib.request.urlopen(self.url + "/api/v1/query", urllib.parse.urlencode(form).encode()) as answer:
            return json.load(answer)["data"]["result"]

    def sequences(self, at: float) -> list[int]:
        """The sequence numbers of all reports that are there."""
        found = self.values("proxmon_report_seq", at)
        return sorted(int(value) for one in found for _, value in one["values"])


def wait_until(true: Any, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.1)
