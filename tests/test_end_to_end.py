"""A real agent process, a real server process, and what happens when either is killed."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, LiveAgent, LiveServer, build_report, encode, find_program, sign
from recorded import RecordedProbe, recordings

import agent


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """The condition's first true value."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"did not happen in {seconds} s")


@pytest.fixture
def start_agent(tmp_path, live_server):
    """start_agent(token, …) -> a running agent, ended with the test."""
    started: list[LiveAgent] = []

    def start_agent(token: str, **settings: Any) -> LiveAgent:
        one = LiveAgent(tmp_path, live_server, token, **settings)
        one.start()
        started.append(one)
        return one

    yield start_agent
    for one in started:
        if one.process and one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def stored(server: LiveServer) -> list[sqlite3.Row]:
    """Every report the server has, in the order of arrival."""
    db = sqlite3.connect(f"file:{server.env['DATABASE_PATH']}?mode=ro", uri=True)
    db.row_factory = sqlite3.Row
    return db.execute("""
        SELECT run.run_id, seq, received_at, (report.id & ((1 << 42) - 1)) / 1000.0 AS time
        FROM report JOIN run ON run.id = report.run ORDER BY received_at, report.rowid""").fetchall()


# --- the pair ---


def test_an_agent_reports_and_is_seen(live_server, start_agent):
    started = time.time()
    running = start_agent(live_server.register("pve1"))
    api = live_server.api_token()
    host = wait_for(lambda: (one := live_server.get("/api/v1/hosts/pve1", api))["last_seen_at"] and one)
    assert host["verdict"] == "ok"
    assert time.time() - started < 20
    node = host["sections"]["node"]["body"]
    assert node["memory_total_bytes"] == int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert node["cpu_count"] >= 1 and node["uptime_seconds"] > 0
    wait_for(lambda: "accepted" in running.log.read_text())
    told = running.log.read_text().splitlines()
    assert told[:3] == [
        "agent: starting with host_id=pve1",
        f"reporter: connected to {live_server.url}",
        "reporter: accepted host:pve1",
    ]
    assert running.stop() < 2


def test_an_agent_with_a_revoked_token_keeps_its_reports_and_says_what_to_do(live_server, start_agent):
    running = start_agent(live_server.register("pve1"))
    wait_for(lambda: stored(live_server))
    assert live_server.command("rotate-token", "pve1").returncode == 0
    wait_for(lambda: "rotate" in running.log.read_text() or "token" in running.log.read_text().lower())
    count = len(stored(live_server))
    time.sleep(2.5)
    assert running.process.poll() is None
    assert len(stored(live_server)) == count
    assert list(running.state.rglob("*")), "nothing was spooled"


def test_once_prints_what_would_be_sent(live_server):
    argv, env = [sys.executable, str(ROOT / "agent.py"), "once"], {"PATH": os.environ["PATH"]}
    answer = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=env)
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    token = live_server.register(report["host_id"])
    sent = live_server.post(token, report, host=report["host_id"])
    assert sent.json()["accepted"] == 1


@pytest.mark.parametrize("path", recordings(), ids=lambda path: path.name)
def test_what_the_collectors_make_of_a_recorded_host_is_accepted(live_server, path):
    """Agent side and server side agree on every section of every recording, byte for byte."""
    memories: dict[str, dict[str, Any]] = {}
    for tick in (0, 1):
        probe: Any = RecordedProbe(path, tick)
        collected = agent.collect(probe, memories, agent.COLLECTORS)
    reporter = agent.Reporter("pve1", time.time())
    body = agent.encode_report(reporter.build_report("medium", time.time(), collected))
    token, api = live_server.register("pve1"), live_server.api_token()
    assert live_server.post(token, body).json()["accepted"] == 1
    host = live_server.get("/api/v1/hosts/pve1", api)
    assert {name: one["body"] for name, one in host["sections"].items() if one["body"] is not None} == collected[0]
    assert sorted(name for name, one in host["sections"].items() if one["absent"]) == sorted(collected[1])
    assert {name for name, one in host["sections"].items() if one["error"]} == set(collected[2])


# --- the server is killed ---


def test_each_acknowledged_report_survives_kill_9_of_the_server_once(live_server):
    token = live_server.register("pve1")
    acknowledged: list[tuple[str, int]] = []
    stop = threading.Event()

    def post_until_killed(run: str) -> None:
        for seq in range(1, 100_000):
            if stop.is_set():
                return
            try:
                answer = live_server.post(
                    token, build_report(run_id=run, seq=seq, at=time.time()), message_id=f"{run}-{seq}"
                )
            except (OSError, http.client.HTTPException):
                return
            if answer.status == 200:
                acknowledged.append((run, seq))

    threads = [threading.Thread(target=post_until_killed, args=(f"run-{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(acknowledged) > 150)
    live_server.stop(signal.SIGKILL)
    stop.set()
    for thread in threads:
        thread.join()
    live_server.start()
    kept = [(row["run_id"], row["seq"]) for row in stored(live_server)]
    assert len(kept) == len(set(kept)), "a report is there twice"
    assert set(acknowledged) <= set(kept), "an acknowledged report is gone"
    again = [build_report(run_id=run, seq=seq, at=time.time()) for run, seq in acknowledged[:500]]
    answer = live_server.post(token, again, message_id="again").json()
    assert (answer["accepted"], answer["duplicates"]) == (0, len(again))


# --- the server is away, the agent is killed in between ---


def test_an_outage_with_a_killed_agent_leaves_no_gap(live_server, start_agent):
    running = start_agent(live_server.register("pve1"))
    wait_for(lambda: len(stored(live_server)) >= 2)
    before = len(stored(live_server))
    live_server.stop()
    time.sleep(6)
    running.stop(signal.SIGKILL)
    running.start()
    time.sleep(6)
    returned = time.time()
    live_server.start()
    wait_for(lambda: "nothing waits on disk any more" in running.log.read_text().rpartition("agent: starting")[2], 60)
    rows = stored(live_server)
    assert running.stop() < 2

    pairs = [(row["run_id"], row["seq"]) for row in rows]
    assert len(pairs) == len(set(pairs))
    runs: dict[str, list[int]] = {}
    for run, seq in pairs:
        runs.setdefault(run, []).append(seq)
    assert len(runs) == 2
    for run, numbers in runs.items():
        assert sorted(numbers) == list(range(1, max(numbers) + 1)), f"{run} has a gap: {sorted(numbers)}"
    times = sorted(row["time"] for row in rows)
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert max(gaps) < 3.5, gaps  # one tick is lost with the killed process at the most

    arrived = [row for row in rows[before:] if row["received_at"] >= returned - 1]
    first = arrived[0]
    backlog = [row for row in arrived if row["time"] < returned - 1.5]
    assert len(backlog) >= 8, "the outage was not bridged by the spool"
    assert first["time"] >= max(row["time"] for row in backlog) - 1.5, "the newest did not come first"
    old = [row["time"] for row in backlog if row is not first]
    assert old == sorted(old), "the backlog did not come oldest first"


def test_reports_that_wait_survive_a_stop_of_the_agent(live_server, start_agent):
    token = live_server.register("pve1")
    live_server.stop()
    running = start_agent(token)
    time.sleep(3.5)
    assert running.stop() < 2
    waiting = [path for path in running.state.rglob("*") if path.is_file() and path.stat().st_size > 200]
    assert waiting
    live_server.start()
    running.start()
    wait_for(lambda: len({row["run_id"] for row in stored(live_server)}) == 2)


# --- by other hands ---


def test_openssl_and_curl_can_post_a_report(live_server, tmp_path):
    openssl, curl = find_program("openssl"), find_program("curl")
    token = live_server.register("pve1")
    (tmp_path / "report.json").write_bytes(encode(build_report(at=time.time())))
    script = f"""
        id=msg_$(date +%s) now=$(date +%s)
        key=$(printf %s "${{TOKEN#whsec_}}" | {openssl} base64 -d -A | od -An -v -tx1 | tr -d ' \\n')
        signature=$({{ printf '%s.%s.' "$id" "$now"; cat report.json; }} |
            {openssl} dgst -sha256 -mac HMAC -macopt "hexkey:$key" -binary | {openssl} base64 -A)
        {curl} -sS -w '\\n%{{http_code}}' -H 'Content-Type: application/json' -H "webhook-id: $id" \\
            -H "webhook-timestamp: $now" -H "webhook-signature: v1,$signature" \\
            --data-binary @report.json {live_server.url}/api/v1/hosts/pve1/reports
    """
    env = {"PATH": os.environ["PATH"], "TOKEN": token}
    answer = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert answer.stdout.splitlines()[-1:] == ["200"], answer
    assert json.loads(answer.stdout.splitlines()[0])["accepted"] == 1


# --- on the wire ---


def exchange(server: LiveServer, *parts: bytes, pause: float = 0, limit: float = 30) -> bytes:
    """Send bytes as they are; everything that comes back until the server closes or the limit is over."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=limit) as wire:
        for part in parts:
            try:
                wire.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(pause)
        try:
            wire.shutdown(socket.SHUT_WR)
        except OSError:  # refused and closed already; what it said may still be read
            pass
        received = b""
        while True:
            try:
                chunk = wire.recv(65536)
            except ConnectionResetError:
                break
            if not chunk:
                break
            received += chunk
    return received


def status_of(answer: bytes) -> int:
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.") else 0


PATH = b"/api/v1/hosts/pve1/reports"
WIRE = [
    ("no request line", b"\r\n\r\n"),
    ("rubbish", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS hello\r\n\r\n"),
    ("no version", b"GET /\r\n\r\n"),
    ("a method nobody knows", b"BREW /healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("a path with a NUL", b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("broken escapes", b"GET /api/v1/hosts/%zz%ff%00 HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("an endless header", b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 300_000 + b"\r\n\r\n"),
    ("many headers", b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n"),
    ("a negative length", b"POST " + PATH + b" HTTP/1.1\r\nContent-Length: -5\r\n\r\nhello"),
    ("a length that is no number", b"POST " + PATH + b" HTTP/1.1\r\nContent-Length: many\r\n\r\nhello"),
    ("two lengths", b"POST " + PATH + b" HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 5\r\n\r\nhello"),
    ("length and chunks", b"POST " + PATH + b" HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0"),
    ("broken chunks", b"POST " + PATH + b" HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n"),
    ("an unknown transfer", b"POST " + PATH + b" HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\nhello"),
    ("a body cut short", b"POST " + PATH + b" HTTP/1.1\r\nContent-Length: 500\r\n\r\nhello"),
    ("a body of 1 TB", b"POST " + PATH + b" HTTP/1.1\r\nContent-Length: 1099511627776\r\n\r\nhello"),
    ("3 MB of body", b"POST " + PATH + b" HTTP/1.1\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 3_000_000),
    ("a header with a newline in it", b"GET /healthz HTTP/1.1\r\nA: b\r\n c\r\n: d\r\n\r\n"),
]  # fmt: skip


def test_no_bytes_on_the_wire_give_a_5xx_or_hang_it(live_server):
    for name, sent in WIRE:
        answer = exchange(live_server, sent)  # raises when nothing comes for 30 s
        assert status_of(answer) < 500, (name, answer[:300])
        assert live_server.request("GET", "/healthz").status == 200, name
    assert "Traceback" not in live_server.log.read_text()


def test_what_the_http_server_refuses_has_the_same_form(live_server):
    answer = exchange(live_server, b"POST " + PATH + b" HTTP/1.1\r\nContent-Length: many\r\n\r\nhello")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert status_of(answer) == 400
    assert b"application/problem+json" in head.lower() or b"Application/Problem+json" in head
    assert json.loads(body)["code"]
    assert b"content-security-policy" in head.lower() and b"waitress" not in answer.lower()


def test_a_chunked_report_is_taken_like_any_other(live_server):
    token, body = live_server.register("pve1"), gzip.compress(encode(build_report(at=time.time())))
    lines = [b"POST " + PATH + b" HTTP/1.1", b"Host: x", b"Connection: close", b"Transfer-Encoding: chunked",
             b"Content-Type: application/json", b"Content-Encoding: gzip"]  # fmt: skip
    lines += [f"{name}: {value}".encode() for name, value in sign(token, body, time.time()).items()]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:100], body[100:])) + b"0\r\n\r\n"
    answer = exchange(live_server, b"\r\n".join(lines) + b"\r\n\r\n" + chunks)
    assert status_of(answer) == 200, answer
    assert b'"accepted": 1' in answer or b'"accepted":1' in answer


def test_slow_senders_keep_nobody_from_the_server(live_server):
    held = [socket.create_connection(("127.0.0.1", live_server.port)) for _ in range(60)]
    try:
        for wire in held:
            wire.sendall(b"POST " + PATH + b" HTTP/1.1\r\nContent-Length: 1000\r\n\r\nh")
        began = time.monotonic()
        assert live_server.request("GET", "/healthz").status == 200
        assert time.monotonic() - began < 2
    finally:
        for wire in held:
            wire.close()


def test_a_connection_is_kept_over_an_error(live_server):
    request = b"GET /api/v1/overview HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = exchange(live_server, request, request + b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n", pause=0.1)
    assert answer.count(b"HTTP/1.1 401") == 2 and answer.count(b"HTTP/1.1 200") == 1


# --- what may happen to connections ---


def raw_report(token: str, seq: int, *, run: str = "raw", version: str = "1.1", more: bytes = b"", pad: int = 0,
               path: bytes = PATH) -> bytes:
    report = build_report(at=time.time(), seq=seq, run_id=run)
    report["padding"] = os.urandom(pad // 2).hex()
    body = gzip.compress(encode(report), 1)
    head = [b"POST " + path + b" HTTP/" + version.encode(), b"Host: x", b"Content-Type: application/json",
            b"Content-Encoding: gzip", b"Content-Length: %d" % len(body)]  # fmt: skip
    head += [f"{name}: {value}".encode() for name, value in sign(token, body, time.time()).items()]
    return b"\r\n".join(head) + b"\r\n" + more + b"\r\n" + body


def read_answer(wire: socket.socket) -> bytes:
    """Up to the end of its JSON."""
    answer = b""
    while not answer.endswith(b"}"):
        answer += wire.recv(65536) or b" (closed) }"
    return answer


def test_pipelined_reports_are_answered_in_order(live_server):
    token = live_server.register("pve1")
    answer = exchange(live_server, *(b"".join(raw_report(token, 3 * part + n) for n in (1, 2, 3)) for part in range(3)),
                      raw_report(token, 1), b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n")
    told = [json.loads(part.partition(b"\r\n\r\n")[2]) for part in answer.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert [one.get("accepted") for one in told] == [1] * 9 + [0, None]
    assert len(stored(live_server)) == 9


def test_a_sender_that_is_gone_before_its_answer_harms_nobody(live_server):
    token = live_server.register("pve1")
    for seq in range(1, 31):
        wire = socket.create_connection(("127.0.0.1", live_server.port))
        wire.sendall(raw_report(token, seq))
        if seq % 2:  # a reset instead of an end
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wire.close()
    again = [build_report(at=time.time(), seq=seq, run_id="raw") for seq in range(1, 31)]
    while (answer := live_server.post(token, again, message_id="again")).status == 429:  # those above are under way yet
        time.sleep(0.1)
    told = answer.json()
    assert told["accepted"] + told["duplicates"] == 30  # taken or not, none is there twice
    assert sorted(row["seq"] for row in stored(live_server)) == list(range(1, 31))
    assert "Traceback" not in live_server.log.read_text()


@pytest.mark.parametrize(("version", "more", "kept"), [
    ("1.1", b"", True), ("1.1", b"Connection: close\r\n", False), ("1.0", b"", False),
    ("1.0", b"Connection: Keep-Alive\r\n", True)])
def test_a_connection_is_kept_as_the_sender_wants_it(live_server, version, more, kept):
    token = live_server.register("pve1")
    with socket.create_connection(("127.0.0.1", live_server.port), timeout=20) as wire:
        for seq in (1, 2) if kept else (1,):
            wire.sendall(raw_report(token, seq, version=version, more=more))
            answer = read_answer(wire)
            assert status_of(answer) == 200 and b'"accepted": 1' in answer
            assert answer.startswith(f"HTTP/{version} ".encode()) and b"\r\nContent-Security-Policy: " in answer
        assert kept or wire.recv(10) == b""


def test_refused_reports_get_their_code_and_keep_the_connection(live_server):
    token = live_server.register("pve1")
    other = live_server.register("pve2")
    with socket.create_connection(("127.0.0.1", live_server.port), timeout=20) as wire:
        for sent, status, code in (
                (raw_report(other, 1), 401, b"invalid_token"),
                (raw_report(other, 1, path=b"/api/v1/hosts/pve2/reports"), 422, b"host_mismatch"),
                (raw_report(token, 1, path=b"/api/v1/hosts/pve3/reports"), 404, b"unknown_host"),
                (raw_report(token, 1).replace(b"application/json", b"text/html"), 415, b"unsupported_media_type"),
                (raw_report(token, 1), 200, b"accepted")):
            wire.sendall(sent)
            answer = read_answer(wire)
            assert (status_of(answer), code in answer) == (status, True), answer


def test_large_reports_and_small_ones_take_turns_on_one_connection(live_server):
    token = live_server.register("pve1")
    with socket.create_connection(("127.0.0.1", live_server.port), timeout=20) as wire:
        for seq, pad in enumerate((0, 300_000, 0, 300_000, 300_000, 0), 1):
            wire.sendall(raw_report(token, seq, pad=pad))
            assert b'"accepted": 1' in read_answer(wire)


def test_a_report_that_unpacks_to_much_keeps_nobody_waiting(live_server):
    """8 MB of JSON in a few kB: small reports of others are answered meanwhile."""
    token, other = live_server.register("pve1"), live_server.register("pve2")
    report = build_report(at=time.time(), run_id="large", seq=1, gpu=[{"n": n % 10, "note": "x" * 70} for n in range(100_000)])
    body = gzip.compress(encode(report), 9)
    assert len(body) < 1 << 16 and len(encode(report)) > 8_000_000
    head = raw_report(token, 1).partition(b"\r\n\r\n")[0]
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith((b"content-length", b"webhook"))]
    lines += [f"{name}: {value}".encode() for name, value in sign(token, body, time.time()).items()]
    sent = b"\r\n".join([*lines, b"Content-Length: %d" % len(body)]) + b"\r\n\r\n" + body
    with socket.create_connection(("127.0.0.1", live_server.port), timeout=60) as wire:
        wire.sendall(sent)
        small = build_report(host="pve2", at=time.time())
        assert live_server.post(other, small, host="pve2").json()["accepted"] == 1
        assert b'"accepted": 1' in read_answer(wire)


def test_a_stop_under_load_answers_or_hangs_up_and_loses_nothing(live_server):
    token, acknowledged = live_server.register("pve1"), []

    def post(run: str) -> None:
        with socket.create_connection(("127.0.0.1", live_server.port), timeout=20) as wire:
            for seq in range(1, 100_000):
                try:
                    wire.sendall(raw_report(token, seq, run=run))
                    answer = read_answer(wire)
                except OSError:
                    return
                if b"(closed)" in answer:
                    return
                assert status_of(answer) in (200, 503), answer
                if status_of(answer) == 200:
                    acknowledged.append((run, seq))

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(post, f"run{n}") for n in range(8)]
        wait_for(lambda: len(acknowledged) > 200)
        live_server.stop(signal.SIGTERM)
        for one in running:
            one.result(30)
    live_server.start()
    assert set(acknowledged) <= {(row["run_id"], row["seq"]) for row in stored(live_server)}
