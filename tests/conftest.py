"""What all tests share.

    skips -> reports -> signatures -> the server without a socket -> the server as a process

`client` calls the WSGI application in this process, with a clock that the test sets; `live_server` is a real
`server.py serve` on a free port of the loopback, with a database of its own.
"""

from __future__ import annotations

import base64
import copy
import gzip
import hashlib
import hmac
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import argon2
import pytest
import standardwebhooks
from hypothesis import settings

import server

ROOT = Path(__file__).resolve().parent.parent
IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")

# The same examples in each run: a failure seen once is seen again. No deadline: two processes share two cores.
settings.register_profile("proxmon", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("proxmon")

PASSWORD = "correct horse battery staple"
# Real Argon2id with the least memory: the tests log in often.
PASSWORD_HASH = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)


# --- skips: at a desk a missing program leaves its tests out; in CI that is a failure ---


def leave_out(why: str) -> NoReturn:
    pytest.skip(why)


def find_program(name: str) -> str:
    """The path of a program that a test talks to; without it the test is left out, and fails in CI."""
    path = shutil.which(name)
    if path is None:
        leave_out(f"{name} is not installed: run ./build.sh test as root on Debian, or install it")
    return path


NOT_HERE = "cannot be played here: "


def skip_here(why: str) -> NoReturn:
    """Leave a test out that no installation makes possible on this machine (no loop devices in this container, no old
    versions in this copy). Also in CI it is told as skipped, and fails nothing."""
    leave_out(NOT_HERE + why)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI every skip, whatever made it, is a failure: nothing is green that was not run. Only what this machine
    cannot do stays skipped, with its reason."""
    report = yield
    if IN_CI and report.skipped and NOT_HERE not in str(call.excinfo and call.excinfo.value):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {call.excinfo.value if call.excinfo else 'no reason given'}"
    return report


# --- reports: a valid one, to be changed by the test ---

START = 1_800_000_000.0  # when the clock of a test begins: an arbitrary day in 2027


def build_report(host: str = "pve1", seq: int = 1, at: float = START, run_id: str = "run-a", **sections: Any) -> dict:
    """A whole, valid report; sections named replace the sample's, and None leaves one out."""
    report = {
        "version": 1, "host_id": host, "tick": "medium", "time": at, "run_id": run_id, "seq": seq,
        "agent": {"version": "0.1.0", "started": at - 60, "spooled": 0, "dropped": 0, "clock_offset": 0.01,
                  "cpu_seconds": 1.2, "rss_bytes": 20_000_000},
        "node": {"name": host, "pve_version": "9.0.3", "kernel": "6.14.8-2-pve", "uptime_seconds": 86400.5,
                 "cpu_count": 8, "cpu_ratio": 0.25, "load1": 1.5, "memory_total_bytes": 64 << 30,
                 "memory_available_bytes": 20 << 30, "memory_free_ratio": 0.5, "root_total_bytes": 100 << 30,
                 "root_used_bytes": 30 << 30, "root_available_bytes": 65 << 30},
        "guests": [build_guest(100), build_guest(101, name="db", type="lxc", status="stopped")],
        "storages": [build_storage("local"), build_storage("tank-vm", type="zfspool", dataset="tank/vm")],
        "pool_states": [{"name": "tank", "guid": "1234567890123456789", "state": "ONLINE"}],
        "pools": [build_pool()],
        "absent": ["cluster", "ceph"],
        "errors": {},
    }  # fmt: skip
    report.update(copy.deepcopy(sections))
    return {key: value for key, value in report.items() if value is not None}


def build_guest(vmid: Any, **fields: Any) -> dict:
    return {
        "vmid": vmid, "type": "qemu", "name": f"vm{vmid}", "status": "running", "template": False,
        "uptime_seconds": 500, "cpu_count": 2,
        "cpu_ratio": 0.1, "memory_used_bytes": 1 << 30, "memory_max_bytes": 2 << 30,
        "net_receive_bytes_total": 1000, **fields,
    }  # fmt: skip


def build_storage(name: str, **fields: Any) -> dict:
    return {
        "storage": name, "type": "dir", "content": "images", "shared": False, "enabled": True, "active": True,
        "total_bytes": 1000, "used_bytes": 500, "available_bytes": 500, **fields,
    }  # fmt: skip


def build_disk(name: str, **fields: Any) -> dict:
    return {
        "name": name, "type": "disk", "class": "normal", "state": "ONLINE", "path": f"/dev/{name}", "read_errors": 0,
        "write_errors": 0, "checksum_errors": 0, **fields,
    }  # fmt: skip


def build_pool(name: str = "tank", **fields: Any) -> dict:
    mirror = {"name": "mirror-0", "type": "mirror", "class": "normal", "state": "ONLINE", "read_errors": 0,
              "write_errors": 0, "checksum_errors": 0, "children": [build_disk("sda"), build_disk("sdb")]}  # fmt: skip
    return {
        "name": name, "guid": "1234567890123456789", "state": "ONLINE", "layout": "mirror ×2", "size_bytes": 1000,
        "allocated_bytes": 400, "free_bytes": 600, "capacity_ratio": 0.4, "fragmentation_ratio": 0.1, "data_errors": 0,
        "redundancy_margin": 1, "scan": {"function": "scrub", "state": "finished", "ended_at": START - 86400},
        "last_scrub": {"ended_at": START - 86400, "errors": 0}, "vdevs": [mirror], **fields,
    }  # fmt: skip


# --- signatures: as a Standard Webhooks library makes them ---


def sign(token: str, body: bytes, at: float, message_id: str = "msg_1") -> dict[str, str]:
    """The three headers; by the library where the body is text (it takes nothing else)."""
    when = datetime.fromtimestamp(int(at), UTC)
    try:
        signature = standardwebhooks.Webhook(token).sign(message_id, when, body.decode("utf-8"))
    except UnicodeDecodeError:
        key = base64.b64decode(token.removeprefix("whsec_"))
        digest = hmac.digest(key, f"{message_id}.{int(at)}.".encode() + body, hashlib.sha256)
        signature = "v1," + base64.b64encode(digest).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(int(at)), "webhook-signature": signature}


def encode(report: Any, *, zip: bool = False) -> bytes:
    body = report if isinstance(report, bytes) else json.dumps(report).encode()
    return gzip.compress(body) if zip else body


# --- the server without a socket ---


class Clock:
    """Unix time that stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Response(NamedTuple):
    status: int
    headers: dict[str, str]  # names in small letters
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8")

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The stable code of a problem document, which it has to be."""
        assert self.headers["content-type"] == "application/problem+json", (self.status, self.body[:300])
        problem = self.json()
        assert problem["status"] == self.status
        assert problem["title"] and problem["detail"]
        return problem["code"]


class Client:
    """Calls a WSGI application as a browser or an agent would, without a socket."""

    def __init__(self, monitor: server.Monitor):
        self.monitor = monitor
        self.app = server.build_app(monitor)
        self.headers: dict[str, str] = {}

    def request(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Response:
        path, _, query = path.partition("?")
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method, "PATH_INFO": urllib.parse.unquote(path, "latin-1"), "QUERY_STRING": query,
            "SERVER_NAME": "127.0.0.1", "SERVER_PORT": "4000", "SERVER_PROTOCOL": "HTTP/1.1", "SCRIPT_NAME": "",
            "REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "127.0.0.1:4000", "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": io.BytesIO(body), "wsgi.errors": sys.stderr, "wsgi.url_scheme": "http",
            "wsgi.version": (1, 0), "wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False,
        }  # fmt: skip
        for name, value in {**self.headers, **(headers or {})}.items():
            key = name.upper().replace("-", "_")
            environ[key if key in ("CONTENT_TYPE", "CONTENT_LENGTH", "REMOTE_ADDR") else "HTTP_" + key] = value
        started: list[Any] = []

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            started[:] = [int(status.split()[0]), headers]
            return lambda data: None

        result = self.app(environ, start_response)
        content = b"".join(result)
        if hasattr(result, "close"):
            result.close()
        return Response(started[0], {name.lower(): value for name, value in started[1]}, content)

    def get(self, path: str, **headers: str) -> Response:
        return self.request("GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()})

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Response:
        """A write with a JSON body."""
        given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        return self.request(method, path, b"" if body is None else json.dumps(body).encode(), given)

    def log_in(self, password: str = PASSWORD, **fields: str) -> Response:
        """Post the form; from then on this client has the session's cookie and its CSRF token."""
        form = urllib.parse.urlencode({"password": password, **fields}).encode()
        answer = self.request("POST", "/login", form, {"Content-Type": "application/x-www-form-urlencoded"})
        if answer.status == 303:
            cookie = answer.headers["set-cookie"].partition(";")[0]
            csrf = server.csrf_token(self.monitor.secret, cookie.partition("=")[2])
            self.headers = {"Cookie": cookie, "X-CSRF-Token": csrf}
        return answer


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def config(tmp_path: Path) -> server.Config:
    return server.Config({"DATABASE_PATH": str(tmp_path / "monitor.db"), "DASHBOARD_PASSWORD_HASH": PASSWORD_HASH})


@pytest.fixture
def monitor(config: server.Config, clock: Clock) -> Iterator[server.Monitor]:
    """A server's inside, on a new database."""
    server.open_database(config, create=True).close()
    monitor = server.Monitor(config, clock)
    yield monitor
    monitor.close()


@pytest.fixture
def store(monitor: server.Monitor) -> server.Store:
    return monitor.store


@pytest.fixture
def client(monitor: server.Monitor) -> Client:
    """Nobody in particular."""
    return Client(monitor)


@pytest.fixture
def admin(monitor: server.Monitor, clock: Clock) -> Client:
    """Somebody with an admin token."""
    client = Client(monitor)
    token = monitor.store.write(lambda db: server.create_api_token(db, "tests", clock(), admin=True, days=None))
    client.headers = {"Authorization": f"Bearer {token}"}
    return client


@pytest.fixture
def register(monitor: server.Monitor, clock: Clock):
    """register(name) -> the host's token."""

    def register(name: str = "pve1", **fields: Any) -> str:
        row = monitor.store.write(lambda db: server.insert_host(db, name, clock(), **fields))
        return server.host_token(monitor.secret, row["nonce"])

    return register


@pytest.fixture
def post(client: Client, clock: Clock):
    """post(token, report or list or bytes) -> the server's answer; signed by the Standard Webhooks library."""
    count = 0

    def post(token: str, report: Any, *, host: str = "pve1", zip: bool = False, **headers: str) -> Response:
        nonlocal count
        count += 1
        body = encode(report, zip=zip)
        signed = sign(token, body, clock(), f"msg_{count}")
        given = {"Content-Type": "application/json", **({"Content-Encoding": "gzip"} if zip else {}), **signed}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        path = f"/api/v1/hosts/{urllib.parse.quote(host, safe='')}/reports"
        return client.request("POST", path, body, given)

    return post


# --- the server as a process ---


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LiveServer:
    """A real `server.py serve`, with its database in a folder. It can be killed and started again."""

    def __init__(self, folder: Path, **env: str):
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        self.env = {
            "PATH": os.environ["PATH"], "DATABASE_PATH": str(folder / "monitor.db"), "PORT": str(self.port),
            "LISTEN": "127.0.0.1", "PUBLIC_URL": self.url, "DASHBOARD_PASSWORD_HASH": PASSWORD_HASH,
            "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", **env,
        }  # fmt: skip
        self.argv = [sys.executable, str(ROOT / "server.py")]
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command of server.py beside the server."""
        return subprocess.run([*self.argv, *argv], env=self.env, input=stdin, capture_output=True, text=True, timeout=60)

    def register(self, name: str) -> str:
        answer = self.command("register-host", name)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.splitlines()[1].removeprefix("TOKEN: ")

    def api_token(self, name: str = "tests", *flags: str) -> str:
        answer = self.command("create-api-token", name, *flags)
        assert answer.returncode == 0, answer.stderr
        return next(line for line in answer.stdout.splitlines() if line.startswith("TOKEN: ")).removeprefix("TOKEN: ")

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([*self.argv, "serve"], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                if self.request("GET", "/healthz").status == 200:
                    return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("the server did not start:\n" + self.log.read_text()[-2000:])

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End the process; gives back its exit code."""
        assert self.process is not None
        self.process.send_signal(how)
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Response:
        """One request on a connection of its own."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, given, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirect)
        try:
            answer = opener.open(request, timeout=30)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            names = {name.lower(): value for name, value in answer.headers.items()}
            return Response(answer.status, names, answer.read())

    def get(self, path: str, token: str) -> Any:
        answer = self.request("GET", path, Authorization=f"Bearer {token}")
        assert answer.status == 200, answer
        return answer.json()

    def post(self, token: str, report: Any, *, host: str = "pve1", message_id: str = "msg_1") -> Response:
        body = encode(report)
        headers = {"Content-Type": "application/json", **sign(token, body, time.time(), message_id)}
        return self.request("POST", f"/api/v1/hosts/{host}/reports", body, **headers)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


@pytest.fixture
def live_server(tmp_path: Path) -> Iterator[LiveServer]:
    """A running server on a free port."""
    running = LiveServer(tmp_path)
    running.start()
    yield running
    if running.process and running.process.poll() is None:
        running.stop()


class LiveAgent:
    """A real `agent.py start` with a state directory of its own."""

    def __init__(self, folder: Path, server: LiveServer, token: str, *, host: str = "pve1", fast: int = 1,
                 program: Path = ROOT / "agent.py"):
        self.state, self.log, self.config = folder / "agent-state", folder / "agent.log", folder / "agent.toml"
        self.program = program
        self.state.mkdir(exist_ok=True)
        self.config.write_text(
            f'server_url = "{server.url}"\ntoken = "{token}"\nhost_id = "{host}"\n'
            f"[intervals]\nfast_seconds = {fast}\nmedium_seconds = {5 * fast}\nslow_seconds = {60 * fast}\n"
        )
        self.config.chmod(0o600)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        env = {"PATH": os.environ["PATH"], "STATE_DIRECTORY": str(self.state), "PYTHONUNBUFFERED": "1"}
        argv = [sys.executable, str(self.program), "start", "--config", str(self.config)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> float:
        """End it; gives back how long that took."""
        assert self.process is not None
        began = time.monotonic()
        self.process.send_signal(how)
        self.process.wait(15)
        return time.monotonic() - began
