"""Input that nobody would send, for everything that takes some: bytes, headers, signatures, reports, parsers, arguments, settings.

    dice -> values and texts -> one feeder per door -> what counts as a fault

A feeder makes one input by the dice and gives it to the program in this process; it raises Fault when the answer is
5xx, an exception that is no named error, or too slow. The dice are random.Random, hypothesis' or a seed's.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import gzip
import io
import json
import logging
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import tomllib
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conftest import PASSWORD_HASH, START, Client, Clock, build_report, sign
from recorded import RecordedProbe, recordings

import agent
import server

SLOW_SECONDS = 10.0  # of CPU for one input


class Fault(AssertionError):
    """What must not be."""


# --- values and texts ---

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 1.5, -0.0, 1e19, -1e308, 1e-300, 2**31, 2**53 + 1, 2**63, 2**64, -(2**64), "", " ", "x", "\x00", "\x1b[31m",
    "a\nb", "\u202e", "é", "２", "9" * 50, "-1", "1e5", "nan", "inf", "unknown", "<b>", "'--", "=1+1", "\ud800", "a" * 5000, [], {}, [1], ["a"],
    [None], [[]], [{}], {"a": 1}, {"": None}, {"name": []}, {"name": "x"}, [{"name": "tank"}],
]  # fmt: skip
WORDS = ["", "-", "0", "1", "-1", "nan", "1e999", "9" * 30, "ONLINE", "FAULTED", "tank", "\t", "\n", "\n\n", "\x00", "é", "²", "U", ":", "=",
         "{", "}", "[", "]", ",", '"', "%", "\\", "/", "?", "&", "None", "true", "UPID:a:1:2:69DD8B57:x:100:u:", "1.5K", "+", "*/5", "mon..fri"]  # fmt: skip


def bend(dice: random.Random, value: Any, times: int = 2) -> Any:
    """A copy of JSON data with some places changed, taken out or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(dice.randint(1, times)):
        spots = list(places(value))
        if not spots:
            return dice.choice(ODD)
        holder, key = dice.choice(spots)
        how = dice.randrange(6)
        if how == 0 and isinstance(holder, dict):
            del holder[key]
        elif how == 1 and isinstance(holder, list):
            holder.append(holder[key])
        elif how == 2 and isinstance(holder, dict):
            holder[str(dice.choice(WORDS))] = holder.pop(key)
        elif how == 3 and isinstance(holder[key], str):
            holder[key] = smudge(dice, holder[key])
        else:
            holder[key] = copy.deepcopy(dice.choice(ODD))  # what is put in may be bent in its turn
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in JSON data, as its holder and its key there."""
    stack = [value]
    while stack:
        holder = stack.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ():
            yield holder, key
            stack.append(holder[key])


def smudge(dice: random.Random, text: str, times: int = 4) -> str:
    """A copy of a text with pieces taken out, doubled, moved or put in."""
    for _ in range(dice.randint(1, times)):
        at = dice.randint(0, len(text))
        end = min(len(text), at + dice.choice((0, 1, 2, 5, 20, 200)))
        piece = text[at:end]
        how = dice.randrange(5)
        put = piece * 2 if how == 0 else "" if how == 1 else dice.choice(WORDS) if how < 4 else chr(dice.choice((0, 10, 13, 127, 160, 0x202e)))
        text = text[:at] + put + text[end:]
    return text


def smudge_bytes(dice: random.Random, raw: bytes, times: int = 4) -> bytes:
    for _ in range(dice.randint(1, times)):
        at = dice.randint(0, len(raw))
        end = min(len(raw), at + dice.choice((0, 1, 2, 8, 64)))
        put = dice.choice((b"", raw[at:end] * 2, bytes([dice.randrange(256)]), b"\r\n", b"\0", b": ", b"\n", b"HTTP/1.1"))
        raw = raw[:at] + put + raw[end:]
    return raw


# --- the world: a server in this process, and what was recorded of real hosts ---


class World:
    """A monitor with one host, and all that was said on its log that is a fault of ours."""

    def __init__(self, folder: Path):
        self.folder, self.clock = folder, Clock()
        self.config = server.Config({"DATABASE_PATH": str(folder / "monitor.db"), "SECRET_KEY_BASE": "0123456789abcdef" * 3, "DASHBOARD_PASSWORD_HASH": PASSWORD_HASH,
                                     "SERVER_CONFIG": str(folder / "none.toml")})  # fmt: skip
        (folder / "none.toml").write_text("")
        server.open_database(self.config, create=True).close()
        self.monitor = server.Monitor(self.config, self.clock)
        self.admin = Client(self.monitor)
        token = self.monitor.store.write(lambda db: server.create_api_token(db, "fuzz", START, admin=True, days=None))
        self.admin.headers = {"Authorization": f"Bearer {token}"}
        row = self.monitor.store.write(lambda db: server.insert_host(db, "pve1", START))
        self.token = server.host_token(self.monitor.secret, row["nonce"])
        self.person, self.display = Client(self.monitor), Client(self.monitor)
        self.person.log_in()
        link = self.admin.send("POST", "/api/v1/tokens", {"name": "wall", "kind": "kiosk"}).json()["token"]
        self.display.headers = {"Cookie": f"{server.KIOSK_COOKIE}={link}"}
        self.seq = 0
        self.log: list[str] = []
        self._kept = server.log, agent.log
        server.log = self.log.append  # type: ignore[assignment]
        agent.log = self.log.append  # type: ignore[assignment]
        self.reports = [report_of(path) for path in recordings()[::6]] + [build_report()]
        self.texts, self.hosts = recorded_texts(), recordings()
        self.wire: Wire | None = None

    def close(self) -> None:
        if self.wire:
            self.wire.close()
        server.log, agent.log = self._kept
        self.monitor.close()

    def check_log(self) -> None:
        """A fault that was caught and written down is one all the same."""
        said, self.log[:] = list(self.log), []
        for line in said:
            if "Traceback" in line or "cannot judge" in line or "fault in the agent" in line:
                raise Fault(line[-600:])

    def post(self, body: bytes, headers: dict[str, str], host: str = "pve1") -> Any:
        return self.admin.request("POST", f"/api/v1/hosts/{urllib.parse.quote(host, safe='')}/reports", body, headers)


def report_of(path: Path) -> dict[str, Any]:
    """All that the collectors make of a recorded host, as a report of pve1."""
    sections = {}
    for file in (path / "expect").glob("*.json"):
        outcome = json.loads(file.read_text())
        if outcome.get("section"):
            sections[file.stem] = outcome["section"]
    return build_report(guests=None, storages=None, pools=None, pool_states=None, node=None, absent=None) | sections


def recorded_texts() -> list[str]:
    """What files and commands of real hosts said."""
    found = set()
    for host in recordings():
        for file in [*host.glob("files*/**/*"), *host.glob("commands*/*")]:
            if file.is_file() and file.stat().st_size < 20_000:
                found.add(agent.to_text(file.read_bytes()))
    return sorted(found)


# --- feeders: the server ---


def expect(answer: Any, allowed: tuple[int, ...], what: Any) -> None:
    if answer.status not in allowed:
        raise Fault(f"{answer.status} for {str(what)[:500]}: {answer.body[:300]!r}")


def next_report(world: World, dice: random.Random) -> dict[str, Any]:
    world.seq += 1
    world.clock.advance(dice.choice((1, 1, 30, 400)))
    return {**dice.choice(world.reports), "time": world.clock() - dice.choice((0, 0, 0, 60, 5000)), "seq": world.seq}


def feed_report(dice: random.Random, world: World) -> None:
    """A signed report whose fields are not what they should be; taken or refused, and then shown."""
    report = bend(dice, next_report(world, dice), 4)
    if isinstance(report, dict) and dice.random() < 0.8:
        report |= {"version": 1, "host_id": "pve1", "run_id": "fuzz", "seq": world.seq, "time": world.clock()}
    body = json.dumps(report).encode()
    headers = {"Content-Type": "application/json", **sign(world.token, body, world.clock(), f"m{world.seq}")}
    expect(world.post(body, headers), (200, 400, 413, 422, 429), report)
    if world.seq % 20 == 0:
        world.monitor.store.write(lambda db: server.judge_fleet(world.monitor, world.clock(), db))
        shown = dice.choice(["/api/v1/overview", "/api/v1/hosts/pve1", "/metrics", *(f"/api/v1/{name}" for name in LISTS)])
        expect(world.admin.get(shown), (200,), (shown, report))


def feed_signature(dice: random.Random, world: World) -> None:
    """Headers, names and bytes of a request that are nearly right."""
    body = json.dumps(next_report(world, dice)).encode() if dice.random() < 0.2 else b'{"version":1,"host_id":"pve1"}'
    headers = {"Content-Type": "application/json", **sign(world.token, body, world.clock(), f"s{world.seq}")}
    for _ in range(dice.randint(1, 3)):
        name = dice.choice([*headers, "Content-Encoding", "Content-Length", "X-Forwarded-For", "Authorization", "Cookie"])
        if dice.random() < 0.2:
            headers.pop(name, None)
        else:
            headers[name] = smudge(dice, headers.get(name, dice.choice(WORDS))).encode("utf-8", "replace").decode("latin-1")
    if dice.random() < 0.5:
        headers.pop("Content-Length", None)
    host = "pve1" if dice.random() < 0.7 else smudge(dice, "pve1").encode("utf-8", "replace").decode()
    expect(world.post(body, headers, host), (200, 400, 401, 404, 405, 413, 415, 422, 429, 303), headers)


def feed_body(dice: random.Random, world: World) -> None:
    """Broken gzip and broken JSON under a good signature."""
    body = json.dumps(next_report(world, dice)).encode()
    zipped = dice.random() < 0.6
    if dice.random() < 0.5:
        body = smudge_bytes(dice, body)
    if zipped:
        body = gzip.compress(body, dice.choice((0, 1, 9)))
        body = smudge_bytes(dice, body) if dice.random() < 0.7 else body + body if dice.random() < 0.5 else body
    headers = {"Content-Type": "application/json", **sign(world.token, body, world.clock(), f"b{world.seq}")}
    if zipped:
        headers["Content-Encoding"] = "gzip"
    expect(world.post(body, headers), (200, 400, 413, 422, 429), body[:200])


LISTS = [*server.RESOURCES]
ROUTES = [route for route in server.ROUTES if route.auth != "host" and "logout" not in route.path]
PARAMETERS = ("q", "sort", "limit", "offset", "format", "host", "site", "tag", "state", "kind", "since", "until", "series", "from", "to",
              "step", "tab", "pool", "kiosk", "hours", "severity", "rule", "name", "vmid", "next")  # fmt: skip
ARGUMENTS = [*WORDS, "pve1", "name", "-name", "csv", "text", "json", "now", "10", "1800000000", "1800003600", "30", "node.cpu_ratio",
             "guests/100.cpu_ratio", "pools", "firing", "all", "critical", "host:pve1", "cpu>5", "(", '"', "*", "1e9", "99999999999999999999"]  # fmt: skip
FIELDS = ("name", "site", "tags", "note", "admin", "expires_days", "maintenance_until", "until", "seconds", "reason", "days", "matchers",
          "comment", "source", "hours", "password", "role", "x")  # fmt: skip


def feed_api(dice: random.Random, world: World) -> None:
    """Every route with any parameters, and every write with any body."""
    world.clock.advance(0.1)
    route = dice.choice(ROUTES)
    path = re.sub("<[^>]+>", lambda _: urllib.parse.quote(dice.choice(["pve1", "1", "100", "tank", "install.sh", *WORDS]), safe=""), route.path)
    asked = [(dice.choice([*PARAMETERS, *route.queries]), dice.choice(ARGUMENTS)) for _ in range(dice.randint(0, 3))]
    query = urllib.parse.urlencode(asked) if dice.random() < 0.9 else smudge(dice, "q=1&sort=name").encode("utf-8", "replace").decode("latin-1")
    body, headers = b"", dict(world.admin.headers)
    if route.method in ("POST", "PATCH", "PUT"):
        given = {dice.choice(FIELDS): dice.choice([*ODD[:30], "pve1", "x", 10]) for _ in range(dice.randint(0, 3))}
        if given.get("name") == "pve1" or "pve1" in path:
            given = {"note": "x"} if route.method == "PATCH" else given  # the host of this world stays
        body = json.dumps(given).encode() if dice.random() < 0.9 else smudge_bytes(dice, b'{"note": "x"}' if "pve1" in path else b'{"name": "x"}')
        headers["Content-Type"] = dice.choice(["application/json"] * 5 + ["text/plain", "", "application/x-www-form-urlencoded"])
    if "pve1" in path and (route.method == "DELETE" or "rotate" in path):
        path = path.replace("pve1", "pve2")
    if route.path.endswith(("/test", "/export")) or "preview" in route.path:  # a channel, a process, or all there ever was
        return
    if dice.random() < 0.1:
        headers.pop("Authorization")
    answer = world.admin.request(route.method, f"{path}?{query}", body, headers)
    if answer.status >= 500 and not (answer.status == 503 and b"stopping" in answer.body):
        raise Fault(f"{answer.status} for {route.method} {path}?{query} {body[:200]!r}: {answer.body[:300]!r}")


def feed_page(dice: random.Random, world: World) -> None:
    """The page as somebody who is logged in sees it, or a wall display: lists, cards, searches, pieces, after a report
    that makes sense or none."""
    if dice.random() < 0.2:
        post_bent(dice, world)
    asked = {name: dice.choice(choices) for name, choices in PAGE_QUERY.items() if dice.random() < 0.35}
    if dice.random() < 0.2:
        asked[dice.choice(list(PAGE_QUERY))] = smudge(dice, dice.choice(ARGUMENTS)).encode("utf-8", "replace").decode()
    headers = {"X-Fragment": dice.choice(["main", "main", "x"])} if dice.random() < 0.5 else {}
    if dice.random() < 0.3:
        headers["X-Have"] = headers["If-None-Match"] = dice.choice(WORDS).encode("utf-8", "replace").decode("latin-1")
    client = world.display if dice.random() < 0.2 else world.person
    path = dice.choice(["/"] * 9 + ["/admin/hosts"]) + "?" + urllib.parse.urlencode(asked)
    answer = client.request("GET", path, headers=headers)
    expect(answer, (200, 303, 304), path)
    if answer.status == 200 and b"evil-marker<" in answer.body:
        raise Fault(f"a name came out as markup: {path}")


def post_bent(dice: random.Random, world: World) -> None:
    """A report that gets past the door, bent inside its sections."""
    report = bend(dice, next_report(world, dice), 3)
    if isinstance(report, dict):
        report |= {"version": 1, "host_id": "pve1", "run_id": "fuzz", "seq": world.seq, "time": world.clock()}
        body = json.dumps(report).encode()
        answer = world.post(body, {"Content-Type": "application/json", **sign(world.token, body, world.clock(), f"p{world.seq}")})
        expect(answer, (200, 400, 413, 422, 429), report)


PAGE_QUERY: dict[str, list[str]] = {
    "tab": ["problems", *server.TABS, "x"], "host": ["pve1", "pve1", "pve2", ""], "cluster": ["prod", "lab", "x"],
    "guest": ["100", "101", "104", "x", "9" * 30], "disk": ["sda", "nvme0n1", "sdq", "x"], "pool": ["tank", "rpool", "x"],
    "q": ["", "cpu>5", "host:pve1", "-x", "state:running", "used>80%", "seen<5m", "(", '"', "a b c", "backup:late", "full<14d", "*"],
    "sort": ["name", "-name", "verdict", "-cpu_ratio", "x"], "offset": ["0", "50", "-1", "1e9", "x"], "range": ["day", "week", "x"],
    "view": ["tiles", "list", "x"], "kind": ["audit", "alert", "x"], "since": ["1800000000", "-1", "x"], "until": ["1800009999", "x"],
    "compare": ["pve1", "pve2", "x"], "object": ["pools/tank", "guests/100", "x"], "from": ["1799990000", "x"], "to": ["1800009000", "x"],
}  # fmt: skip


def feed_lists(dice: random.Random, world: World) -> None:
    """Lists in each form, a host's history, timeline and export, and what answers by itself (where copies are, what to replace …)."""
    if dice.random() < 0.1:
        post_bent(dice, world)
    world.clock.advance(0.5)
    path = dice.choice([*(f"/api/v1/{name}" for name in LISTS), "/metrics", "/api/v1/overview", "/api/v1/hosts/pve1", "/api/v1/events",
                        "/api/v1/hosts/pve1/history", "/api/v1/hosts/pve1/alerts"])  # fmt: skip
    if dice.random() < 0.005:
        path = "/api/v1/hosts/pve1/export"  # all there ever was: it takes seconds after some thousand reports
    asked = [("format", dice.choice(["csv", "text", "json", "jsonl", "x"]))] if dice.random() < 0.7 else []
    asked += [(name, dice.choice(PAGE_QUERY.get(name, ARGUMENTS))) for name in dice.sample([*PARAMETERS, "object"], dice.randint(0, 4))]
    answer = world.admin.get(f"{path}?{urllib.parse.urlencode(asked)}")
    expect(answer, (200, 304, 400, 404, 405, 422, 429, 503) if "history" in path else (200, 304, 400, 404, 405, 422, 429), (path, asked))
    if answer.status == 200 and "text/csv" in answer.headers.get("content-type", ""):
        for row in csv.reader(io.StringIO(answer.body.decode())):
            if bad := [cell for cell in row if cell.startswith(("=", "@", "\t", "\r", "\n")) or re.match(r"[+-](?![\d.]+(e[+-]?\d+)?$)", cell)]:
                raise Fault(f"a formula in {path} {asked}: {bad[0][:80]!r}")


def feed_environment(dice: random.Random, world: World) -> None:
    """server.toml, and the settings in the environment."""
    if dice.random() < 0.3:
        names = ("LISTEN", "PORT", "PUBLIC_URL", "TRUSTED_PROXY", "HISTORY_URL", "SECRET_KEY_BASE", "HEARTBEAT_URL", "DASHBOARD_PASSWORD_HASH")
        env = {dice.choice(names): smudge(dice, dice.choice(["http://[::1]:80/x", "127.0.0.1/8", "4000", "sqlite:", "$argon2id$v=19$m=8"]))}
        with contextlib.suppress(server.Failure):
            list(server.Config({name: value.replace("\0", "") for name, value in env.items()}).doubts())
        return
    source = smudge(dice, dice.choice(SERVER_TOML), 3)
    try:
        tomllib.loads(source)
    except (tomllib.TOMLDecodeError, RecursionError):
        if dice.random() < 0.8:  # mostly what TOML understands
            source = bent_toml(dice, dice.choice(SERVER_TOML))
    with contextlib.suppress(server.BadSettings):
        server.parse_settings(source)


def bent_toml(dice: random.Random, source: str) -> str:
    """A right file with one value in another's place."""
    lines = source.split("\n")
    at = dice.choice([number for number, line in enumerate(lines) if "=" in line])
    value = dice.choice(["0", "-1", "1e308", "nan", "true", '""', '"x"', "[]", "{}", "[1]", '["a"]', "1979-05-27", '"\\u0000"', "9" * 30, '[["a"]]', '"http://[::1/"'])
    lines[at] = lines[at].partition("=")[0] + "= " + value
    return "\n".join(lines)


SERVER_TOML = [
    '[[channels]]\nname = "mail"\nkind = "email"\nhost = "127.0.0.1"\nport = 25\nsecurity = "plain"\nfrom = "a@b"\nto = ["c@d"]\nseverities = ["critical"]\n',
    '[[channels]]\nname = "hook"\nkind = "webhook"\nurl = "https://x.example/y"\nsecret = "whsec_AAAA"\nsites = ["a"]\ntags = ["b"]\nhosts = ["c"]\n',
    '[[channels]]\nname = "chat"\nkind = "telegram"\ntoken = "1:a"\nchat_id = 5\nquiet = "22:00-07:00"\n[digest]\nweekday = "mon"\nat = "07:00"\nchannels = ["chat"]\n',
    '[rules.pool-capacity]\nwarn = 0.8\ncrit = 0.9\nhold = 60\n[rules.host-offline]\nenabled = false\n[[sites]]\nname = "a"\n',
    '[[override]]\nmatch = { host = "a", tag = "b" }\n[override.rules.guest-down]\nenabled = false\n[history]\ndays = 5\n',
]  # fmt: skip


def feed_server_command(dice: random.Random, world: World) -> None:
    """Arguments of the server's commands, and what those do that change hosts and tokens."""
    name = dice.choice(sorted(server.COMMANDS))
    argv = [smudge(dice, name) if dice.random() < 0.1 else name]
    argv += [dice.choice(["--json", "--admin", "--expires", "--role", "--site", "--tag", "-h", "--", "admin", "0.5", "x", *WORDS]) for _ in range(dice.randint(0, 4))]
    argv = [word.replace("\0", "") for word in argv]
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            args = server.build_parser().parse_args(argv)
            if args.command in DONE_HERE:
                server.COMMANDS[args.command][0](world.config, args)
    except SystemExit as ended:
        if ended.code not in (0, 2):
            raise Fault(f"exit {ended.code} for {argv}")
    except (server.Failure, server.Problem):
        pass


DONE_HERE = {"register-host", "rename-host", "list-hosts", "create-api-token", "revoke-api-token", "list-api-tokens", "list-sessions",
             "list-users", "end-sessions", "version", "unlock-login", "status"} & server.COMMANDS.keys()  # fmt: skip


class Wire:
    """The same monitor behind a real socket, in a thread of this process."""

    def __init__(self, world: World):
        world.config.port = 0
        self.server = server.open_sockets(world.monitor)
        self.port = self.server.effective_port
        self.errors: list[str] = []

        class Catch(logging.Handler):
            def emit(handler, record: logging.LogRecord) -> None:
                if record.exc_info:
                    self.errors.append(f"{record.getMessage()}: {record.exc_info[1]!r}")

        self.catch = Catch()
        logging.getLogger("waitress").addHandler(self.catch)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()

    def close(self) -> None:
        logging.getLogger("waitress").removeHandler(self.catch)
        self.server.close()
        self.server.task_dispatcher.shutdown()


def feed_wire(dice: random.Random, world: World) -> None:
    """Bytes on a connection."""
    wire = world.wire = world.wire or Wire(world)
    body = b'{"version":1}'
    head = {"Host": "x", "Content-Type": "application/json", **sign(world.token, body, world.clock(), "w")}
    head |= dice.choice([{"Content-Length": str(len(body))}, {"Transfer-Encoding": "chunked"}, {}])
    line = dice.choice(["POST /api/v1/hosts/pve1/reports HTTP/1.1", "GET /healthz HTTP/1.1", "GET /api/v1/hosts?q=a HTTP/1.0", "POST /login HTTP/1.1"])
    if "chunked" in str(head):
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    raw = "\r\n".join([line, *(f"{name}: {value}" for name, value in head.items()), "", ""]).encode() + body
    raw = smudge_bytes(dice, raw, 5)
    answer = b""
    with socket.create_connection(("127.0.0.1", wire.port), timeout=SLOW_SECONDS) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                answer += chunk
    if re.search(rb"HTTP/1\.[01] 5\d\d ", answer) or wire.errors:
        raise Fault(f"{answer[:200]!r} {wire.errors} for {raw[:600]!r}")


# --- feeders: the agent ---


def feed_parser(dice: random.Random, world: World) -> None:
    """A parser with what a real host said, damaged: values or a named error."""
    parser = dice.choice(PARSERS)
    text = dice.choice(world.texts)
    if len(text) > 2000 and dice.random() < 0.8:  # a piece, for more inputs in the same time
        start = dice.randrange(len(text) - 1000)
        text = text[start:start + 1000]
    text = smudge(dice, text, 6)
    if dice.random() < 0.3:
        with contextlib.suppress(ValueError, RecursionError):
            text = json.dumps(bend(dice, json.loads(text), 4))
    try:
        json.dumps(parser(text))
    except agent.SourceError:
        pass


def make_parsers() -> list[Callable[[str], Any]]:
    """Those that take a text, as the tests of parsers list them."""
    import test_agent_parsers as tests

    return [*tests.TEXT_PARSERS, *tests.JSON_PARSERS]


PARSERS = make_parsers()


class DamagedProbe(RecordedProbe):
    """A recorded host some of whose files and commands say something else, or nothing."""

    dice: random.Random

    def read(self, path: str, limit: int = 4 << 20) -> str:
        return self.damaged(super().read(path, limit))

    def run(self, *argv: str, limit: float = 10.0, ok: tuple[int, ...] | None = (0,)) -> str:
        return self.damaged(super().run(*argv, limit=limit, ok=ok))

    def _find(self, path: str) -> Path:
        try:
            return super()._find(path)
        except OSError as error:  # a name that no file system takes; the real probe says so too
            raise agent.source_error(error, path) from None

    def damaged(self, text: str) -> str:
        chance = self.dice.random()
        if chance < 0.6:
            return text
        if chance < 0.65:
            raise agent.SourceError(self.dice.choice(("missing", "timeout", "failed", "denied")), "damaged")
        if chance < 0.8:
            with contextlib.suppress(ValueError):
                return json.dumps(bend(self.dice, json.loads(text), 4))
        return smudge(self.dice, text, 5)


def feed_collector(dice: random.Random, world: World) -> None:
    """One collector on a damaged host, twice, for what it remembers."""
    probe = DamagedProbe(dice.choice(world.hosts))
    probe.dice = dice
    name = dice.choice(list(agent.COLLECTORS))
    memories: dict[str, Any] = {}
    for _ in range(2):
        sections, _, errors = agent.collect(probe, memories, [name])
        fault = errors.get(name, {}).get("detail", "")
        if "fault in the agent" in fault:
            raise Fault(f"{name} of {probe.path.name}: {fault}")
        memories = json.loads(json.dumps([sections, memories]))[1]


AGENT_TOML = ('server_url = "https://m.example"\ntoken = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="\nhost_id = "pve1"\nca_file = "/etc/ca"\n'
              "[intervals]\nfast_seconds = 30\nmedium_seconds = 300\nslow_seconds = 1800\n[spool]\nmax_mb = 256\nmax_days = 7\n"
              "[alert]\nmail_root_after_hours = 24\n")  # fmt: skip


def feed_agent_config(dice: random.Random, world: World) -> None:
    """agent.toml, and the agent's arguments."""
    if dice.random() < 0.2:
        argv = [dice.choice([*agent.COMMANDS, "--config", "--tick", "--send", "--explain", "-h", "fast", *WORDS]) for _ in range(dice.randint(0, 4))]
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            agent.parse_arguments(argv)
        return
    source = bent_toml(dice, AGENT_TOML) if dice.random() < 0.5 else smudge(dice, AGENT_TOML, 3)
    path = world.folder / "agent.toml"
    path.write_bytes(source.encode("utf-8", "surrogateescape"))
    path.chmod(0o600)
    with contextlib.suppress(agent.ConfigError):
        agent.load_config(str(path))


def feed_answer(dice: random.Random, world: World) -> None:
    """What the agent makes of a server's answer."""
    status = dice.choice((200, 200, 202, 204, 301, 400, 401, 403, 404, 413, 422, 429, 500, 503, 999, 0))
    body = {"status": "ok", "accepted": 1, "duplicates": 0, "server_time": 1.8e9, "code": dice.choice(["clock_skew", "unknown_host", "invalid_token", "x"])}
    raw = json.dumps(bend(dice, body, 3)).encode() if dice.random() < 0.8 else smudge_bytes(dice, json.dumps(body).encode())
    headers = {"content-type": dice.choice(["application/json", "application/problem+json", "text/html", ""]), "retry-after": dice.choice(WORDS)}
    answer = agent.Answer(status, headers, raw)
    counted = answer.fields()
    meaning = agent.judge(answer, 1)
    if meaning == agent.ACCEPTED and not (status == 200 and counted.get("accepted", 0) + counted.get("duplicates", 0) == 1):
        raise Fault(f"taken for an acceptance: {status} {raw[:300]!r}")
    agent.retry_after(answer), agent.server_time(answer), agent.describe_answer(answer, "pve1")


FEEDERS: dict[str, tuple[Callable[[random.Random, World], None], int]] = {  # with its share of the long run
    "reports": (feed_report, 20), "signatures": (feed_signature, 60), "bodies": (feed_body, 20), "api": (feed_api, 50), "page": (feed_page, 5),
    "lists": (feed_lists, 6), "wire": (feed_wire, 20), "answers": (feed_answer, 100),
    "settings": (feed_environment, 60), "commands": (feed_server_command, 4), "parsers": (feed_parser, 300), "collectors": (feed_collector, 30),
    "agent's settings": (feed_agent_config, 20),
}  # fmt: skip


def feed(name: str, dice: random.Random, world: World) -> None:
    """One input; Fault for whatever must not be. (Real time: an input that hangs is ended after a minute.)"""
    began = time.process_time()
    try:
        FEEDERS[name][0](dice, world)
    except Fault:
        raise
    except Exception as error:
        raise Fault(f"{name}: {type(error).__name__}: {error}") from error
    world.check_log()
    if time.process_time() - began > SLOW_SECONDS:
        raise Fault(f"{name}: took {time.process_time() - began:.1f} s")


def hang(*_: Any) -> None:
    raise Fault("hangs: nothing for a minute")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(world: World, seconds: float, seed: int, most: int = 1 << 60, say: Callable[[str], None] = print) -> tuple[Counter[str], Counter[str]]:
    """Feed for so long, or so many: how many inputs of each kind, and how often each kind of fault."""
    names = [name for name, (_, share) in FEEDERS.items() for _ in range(share)]
    counts: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    signal.signal(signal.SIGALRM, hang)
    end, told = time.monotonic() + seconds, time.monotonic()
    number = seed
    while time.monotonic() < end and number < seed + most:
        number += 1
        dice = random.Random(number)
        name = dice.choice(names)
        signal.alarm(60)
        try:
            feed(name, dice, world)
        except Fault as fault:
            kind = re.sub(r"\d+", "#", str(fault))[-160:]
            faults[kind] += 1
            if faults[kind] == 1:
                say(f"   FAULT seed {number} ({name}): {str(fault)[:700]}")
        counts[name] += 1
        if time.monotonic() - told > 60:
            told = time.monotonic()
            say(f"   {sum(counts.values())} inputs, {sum(faults.values())} faults, {resident_bytes() >> 20} MiB")
    signal.alarm(0)
    return counts, faults


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        here = World(Path(made))
        if len(sys.argv) > 2:  # fuzz.py NAME SEED: that one again
            feed(sys.argv[1], random.Random(int(sys.argv[2])), here)
        else:
            print(run(here, float(sys.argv[1]), 0))
