"""Wrong answers of every kind, from a real socket: no report is lost, none waits for long, the log stays readable.

    kinds -> the far end -> what must hold
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from agent_support import Sink, config_for

import agent

# --- kinds: name -> the bytes of the answer, or what is done with the connection ---

Reply = bytes | Callable[[socket.socket], None]


def http(status: str, body: bytes | str = b"", *headers: str, length: bool = True) -> bytes:
    raw = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status}", *headers, *([f"Content-Length: {len(raw)}"] if length else [])]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + raw


GOOD = '{"status":"ok","accepted":1,"duplicates":0}'
PROBLEM = "Content-Type: application/problem+json"
STATUSES = [101, 103, *range(200, 209), 226, 299, *range(300, 309), *range(400, 419), 421, 422, 423, 425, 426, 428, 429,
            431, 444, 451, 499, *range(500, 512), 520, 521, 522, 523, 524, 525, 526, 530, 599, 600, 999]  # fmt: skip
BODIES = [  # with status 200
    "", " ", "OK", "ok\n", "true", "null", "0", "1", '"ok"', "[]", "{}", "[1]", '["status","ok"]', "<html>Please log in</html>",
    "\ufeff<!doctype html>", "\ufeff" + GOOD + "x", '{"status":"error"}', '{"status":"OK","accepted":1,"duplicates":0}', '{"status":true,"accepted":1,"duplicates":0}',
    '{"status":"ok"}', '{"status":"ok","accepted":1}', '{"status":"ok","duplicates":1}', '{"accepted":1,"duplicates":0}', '{"status":["ok"],"accepted":1,"duplicates":0}',
    '{"status":"ok","accepted":0,"duplicates":0}', '{"status":"ok","accepted":2,"duplicates":0}', '{"status":"ok","accepted":1,"duplicates":1}',
    '{"status":"ok","accepted":2,"duplicates":-1}', '{"status":"ok","accepted":-1,"duplicates":2}', '{"status":"ok","accepted":"1","duplicates":"0"}',
    '{"status":"ok","accepted":1.0,"duplicates":0}', '{"status":"ok","accepted":true,"duplicates":0}', '{"status":"ok","accepted":true,"duplicates":false}',
    '{"status":"ok","accepted":null,"duplicates":1}', '{"status":"ok","accepted":[1],"duplicates":0}', '{"status":"ok","accepted":NaN,"duplicates":0}',
    '{"status":"ok","accepted":1e0,"duplicates":0}', '{"status":"ok","accepted":500,"duplicates":0}', '{"status":"ok","accepted":' + "9" * 5000 + ',"duplicates":0}',
    '{"data":{"status":"ok","accepted":1,"duplicates":0}}', "[" + GOOD + "]", GOOD[:-1], GOOD + GOOD, "[" * 60_000, '{"a":' * 10_000, "\0" * 100, "\x1b[2J", "x" * 60_000,
    '{"error":"no such route"}', '{"code":"unknown_host"}', '{"success":true}', '{"status":"success","data":{"resultType":"vector"}}', '{"status":"UP"}', '{"ok":true}',
]  # fmt: skip
FOREIGN = ["", "Bad Request", "<html><h1>400</h1></html>", "{}", '{"code":"invalid_report"}', '{"error":{"code":"invalid_json"}}', "[" * 9000]
OTHER_CODES = ["", "invalid_token", "busy", "unknown_host", "clock_skew", "rate_limited", "INVALID_JSON", "x\\n\\u001b[31m"]
WAITS = ["0", "1", "60", "3600", "99999999999999", "9" * 3000, "1e300", "1e99", "inf", "NaN", "-5", "+7", "0x10", "1.5", "Wed, 21 Oct 2099 07:28:00 GMT", "\xb2", "", " ", "5, 7", "soon"]
TIMES = ["0", "-1", "1e308", "-1e308", "NaN", "Infinity", "-Infinity", "null", "true", "[]", '"x"', "9" * 400, "9" * 5000, "1", "4000000000", "8589934591", "253402300800"]  # fmt: skip
RAW: dict[str, bytes] = {
    "nothing": b"", "ssh": b"SSH-2.0-OpenSSH_9.2\r\n", "smtp": b"220 mail ESMTP\r\n", "tls alert": b"\x15\x03\x01\x00\x02\x02\x28", "http/2": b"\0\0\x12\4\0\0\0\0\0",
    "zeros": bytes(999), "no status": b"HTTP/1.1\r\n\r\n", "status a": b"HTTP/1.1 abc OK\r\n\r\n", "status -1": b"HTTP/1.1 -1 OK\r\n\r\n", "status 20": b"HTTP/1.1 20 OK\r\n\r\n", "http/9": b"HTTP/9.9 200 OK\r\n\r\n" + GOOD.encode(),
    "http/0.9": GOOD.encode(), "icy": b"ICY 200 OK\r\n\r\n" + GOOD.encode(), "rtsp": b"RTSP/1.0 200 OK\r\n\r\n", "lower": b"http/1.1 200 ok\r\n\r\n",
    "half a status line": b"HTTP/1.1 2", "half a head": b"HTTP/1.1 200 OK\r\nContent-Le", "no end of the head": b"HTTP/1.1 200 OK\r\nA: b\r\n",
    "cut body": b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", "length -1": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "length x": b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
    "length huge": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n{}", "length 10 GB": b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n{}",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 9\r\n\r\n{}", "chunk zz": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "chunk -1": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n{}\r\n", "chunk huge": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
    "chunk cut": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{}", "chunks of one byte": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 200_000,
    "no last chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", "unknown coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: br\r\n\r\n{}",
    "60 kB header": http("200 OK", GOOD[:-1], "X: " + "a" * 60_000), "70 kB header": http("200 OK", GOOD, "X: " + "a" * 70_000), "500 headers": http("200 OK", GOOD, *(f"X-{n}: y" for n in range(500))),
    "endless head": b"HTTP/1.1 503 No\r\n" + b"X: y\r\n" * 100_000, "header of bytes": b"HTTP/1.1 503 No\r\n\xff\xfe: \x80\r\n\r\n", "header without colon": b"HTTP/1.1 503 No\r\nnonsense\r\n\r\n",
    "folded": b"HTTP/1.1 503 No\r\nA: b\r\n c\r\n\r\n", "bare lf": b"HTTP/1.1 503 No\nContent-Length: 0\n\n", "endless 100": b"HTTP/1.1 100 C\r\n\r\n" * 20_000, "100 then nothing": b"HTTP/1.1 100 Continue\r\n\r\n",
    "long reason": b"HTTP/1.1 503 " + b"x" * 60_000 + b"\r\n\r\n", "reason with escapes": b"HTTP/1.1 503 \x1b[31m\x07\x9b\r\n\r\n", "5 MB body": http("503 No", b"x" * 5_000_000), "5 MB without a length": http("200 OK", b"x" * 5_000_000, length=False),
    "gzip": http("200 OK", gzip.compress(GOOD.encode()), "Content-Encoding: gzip"), "gzip bomb": http("200 OK", gzip.compress(bytes(20_000_000)), "Content-Encoding: gzip"),
    "redirect home": http("307 T", "", "Location: /api/v1/hosts/x/reports"), "redirect to a file": http("302 F", "", "Location: file:///etc/passwd"), "redirect with escapes": http("301 M", "", "Location: \x1b[31m\x07"),
    "redirect without a place": http("308 P"), "auth": http("401 U", "", 'WWW-Authenticate: Basic realm="x"'), "proxy auth": http("407 P", "", "Proxy-Authenticate: NTLM"),
    "words with escapes": http("403 F", json.dumps({"code": "x\x1b[31m\nfake: line", "detail": "\x1b]0;owned\x07\u202e\x9b", "pointer": "p" * 50_000}), PROBLEM),
    "words that are no text": http("503 B", '{"code":["busy"],"detail":{"a":[1]},"pointer":7}', PROBLEM),
}  # fmt: skip


def drip(peer: socket.socket) -> None:
    for sign in b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + b" " * 9999:
        peer.sendall(bytes([sign]))
        time.sleep(0.01)


def silence(peer: socket.socket) -> None:
    time.sleep(1.0)


def reset(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def half_and_reset(peer: socket.socket) -> None:
    peer.sendall(http("200 OK", GOOD)[:30])
    reset(peer)


def kinds() -> Iterator[tuple[str, Reply]]:
    for status in STATUSES:
        yield f"status {status}", http(f"{status} X")
    for number, body in enumerate(BODIES):
        yield f"200 {number} {body[:30]!r}", http("200 OK", body, "Content-Type: application/json")
    for status in (201, 202, 203, 206, 226, 302, 400, 404, 409, 413, 422, 429, 500, 503):
        yield f"good words with {status}", http(f"{status} X", GOOD, "Content-Type: application/json")
    for status in (400, 413, 422):
        for number, body in enumerate(FOREIGN):
            yield f"foreign {status} {number}", http(f"{status} X", body, "Content-Type: application/json")
        for code in OTHER_CODES:
            yield f"{status} problem {code!r}", http(f"{status} X", f'{{"code":"{code}"}}', PROBLEM)
    for text in WAITS:
        yield f"wait {text[:20]!r}", http("503 X", '{"code":"busy"}', PROBLEM, f"Retry-After: {text}")
    for text in TIMES:
        yield f"clock {text[:20]}", http("401 U", f'{{"code":"clock_skew","server_time":{text}}}', PROBLEM)
        yield f"clock on a 503 {text[:20]}", http("503 U", f'{{"code":"busy","server_time":{text}}}', PROBLEM)
    yield from RAW.items()
    yield from {"drip": drip, "silence": silence, "reset": reset, "half and reset": half_and_reset}.items()


KINDS = dict(kinds())
TO_NOTHING = f"200 {BODIES.index(GOOD.replace('1', '0'))} {GOOD.replace('1', '0')[:30]!r}"  # right, if nothing was sent


# --- the far end ---


class Speaker:
    """Hears each request to its end, and gives the one answer."""

    def __init__(self) -> None:
        self.reply: Reply = b""
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                peer, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self.speak, args=(peer,), daemon=True).start()

    def speak(self, peer: socket.socket) -> None:
        with contextlib.suppress(OSError), peer:
            head = b""
            while b"\r\n\r\n" not in head:
                head += peer.recv(65536)
            head, _, body = head.partition(b"\r\n\r\n")
            size = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
            while len(body) < size:
                body += peer.recv(65536)
            if callable(self.reply):
                self.reply(peer)
            else:
                peer.sendall(self.reply)
                peer.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def speaker() -> Iterator[Speaker]:
    one = Speaker()
    yield one
    one.listening.close()


def message(seq: int) -> agent.Message:
    return agent.Message(agent.to_json({"version": 1, "host_id": "pve-host-01", "run_id": "r", "seq": seq}))


def kept(sender: agent.Sender) -> list[int]:
    """The reports that are somewhere: in RAM, on disk, or set aside."""
    bodies = [message.body for message in sender.unwritten()] + [body for _, body in sender.spool.oldest(500)]
    folder = sender.spool.rejected
    bodies += [agent.unpack(agent.read_bytes(f"{folder}/{name}", 1 << 24)) for name in agent.os.listdir(folder)]
    return sorted(json.loads(body)["seq"] for body in bodies)


# --- what must hold ---


def test_there_are_at_least_two_hundred_kinds():
    assert len(KINDS) >= 200


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_answer_loses_no_report_and_is_one_clean_line(kind, speaker, tmp_path, monkeypatch, capsys):
    """One report just made and three from the disk; then the right server has each of them, once."""
    monkeypatch.setattr(agent, "ANSWER_TIMEOUT", 0.3)
    speaker.reply = KINDS[kind]
    spool = agent.Spool(str(tmp_path / "state"), max_bytes=1 << 24, max_seconds=7 * 86400)
    sender = agent.Sender(config_for(tmp_path, speaker.url), spool)
    for seq in (1, 2, 3):
        spool.push(message(seq), time.time())
    sender.offer(message(4))
    now, used = sender.backlog_at, time.process_time()
    sender.turn(now)
    assert kept(sender) == [1, 2, 3, 4]
    sender.trouble = ""  # as if the new one had been taken: a batch out of the backlog
    sender.turn(max(now, sender.retry_at))
    assert kept(sender) == [1, 2, 3, 4]
    assert time.process_time() - used < 1.5
    assert 0 < sender.retry_at - now <= 600 or "413" in kind
    assert abs(sender.client.signing_offset) < 20 * 365 * 86400
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 8 and all(line.isprintable() and len(line) < 900 for line in lines), lines
    assert not any("fault in the agent" in line or "accepted" in line for line in lines)

    monkeypatch.setattr(agent, "ANSWER_TIMEOUT", 20.0)
    with Sink() as sink:
        sender.client.url = sink.url + "/x"
        for _ in range(8):
            sender.turn(max(sender.retry_at, sender.backlog_at) + agent.PASSED_OVER_SECONDS)
        aside = len(agent.os.listdir(spool.rejected))
        assert len(sink.seqs()) == len(set(sink.seqs())) == 4 - aside
    assert aside == 0 or "413" in kind
    assert spool.count == 0 and spool.dropped == 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "good words" not in kind and kind != TO_NOTHING])
def test_check_takes_no_wrong_answer_for_the_server(kind, speaker, tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "ANSWER_TIMEOUT", 0.3)
    speaker.reply = KINDS[kind]
    results = agent.check_server(config_for(tmp_path, speaker.url))
    assert not all(good for good, _ in results)
    assert not any(good and text.startswith("token") for good, text in results)


def test_no_answer_makes_us_sign_for_any_year(speaker, tmp_path):
    """A signature is good for five minutes; none is given for a time that is far from every clock."""
    sender = agent.Sender(config_for(tmp_path, speaker.url), agent.Spool(str(tmp_path), max_bytes=1 << 24, max_seconds=1e9))
    for told in (4e9, 1e9, time.time() + 86400):
        speaker.reply = http("200 OK", f'{{"status":"ok","accepted":1,"duplicates":0,"server_time":{told}}}')
        sender.offer(message(1))
        sender.turn(1e9)
        assert sender.client.signing_offset == 0.0
    speaker.reply = http("401 U", f'{{"code":"clock_skew","server_time":{time.time() + 86400}}}', PROBLEM)
    sender.offer(message(2))
    sender.turn(1e9)
    assert 86390 < sender.client.signing_offset < 86410


@pytest.mark.parametrize("status, code, meaning", [
    (400, "invalid_json", agent.REFUSED), (422, "invalid_report", agent.REFUSED), (400, "host_mismatch", agent.REFUSED),
    (413, "too_large", agent.REFUSED), (413, "", agent.TOO_LARGE), (413, "rate_limited", agent.TOO_LARGE),
    (401, "too_large", agent.LATER), (404, "unknown_host", agent.LATER), (400, "clock_skew", agent.LATER), (500, "invalid_report", agent.LATER),
    (429, "rate_limited", agent.LATER), (503, "busy", agent.LATER),
])  # fmt: skip
def test_only_the_servers_own_words_about_the_report_end_its_wait(status, code, meaning):
    problem = {"content-type": "application/problem+json"}
    body = json.dumps({"code": code, "title": "x"}).encode()
    assert agent.judge(agent.Answer(status, problem, body), 1) == meaning
    unmarked = agent.judge(agent.Answer(status, {"content-type": "application/json"}, body), 1)
    assert unmarked == (agent.TOO_LARGE if status == 413 else agent.LATER)


@pytest.mark.parametrize("given, seconds", [("", 0), ("0", 0), ("7", 7), ("999999", 999999), ("-5", 0), ("1.5", 0), ("²", 0), ("soon", 0)])
def test_how_long_the_server_asks_to_wait(given, seconds):
    assert agent.retry_after(agent.Answer(503, {"retry-after": given}, b"")) == seconds
    assert agent.retry_after(agent.Answer(503, {}, b"")) == 0


@pytest.mark.parametrize("told, taken", [
    (agent.CLOCK_FIRST, True), (agent.CLOCK_LAST, True), (agent.CLOCK_FIRST - 1, False), (agent.CLOCK_LAST + 1, False), ("1800000000", False),
    (True, False), (None, False), (1.8e9, True),
])  # fmt: skip
def test_a_clock_is_the_servers_if_it_is_of_these_years(told, taken):
    clock = agent.server_time(agent.Answer(200, {}, json.dumps({"server_time": told}).encode()))
    assert clock == (told if taken else None)
