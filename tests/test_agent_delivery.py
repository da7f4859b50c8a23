"""What an answer means for a report, against a real HTTP server: nothing is lost, nothing blocks the rest."""

from __future__ import annotations

import base64
import hmac
import json
import socket
import subprocess
import threading
import time

import pytest
from agent_support import TOKEN, Sink, accept, closed_port_url, config_for, problem, wait_for

import agent


def report(seq, run="r"):
    return {"version": 1, "host_id": "pve-host-01", "run_id": run, "seq": seq, "time": 1763880000 + seq}


def message(seq):
    return agent.Message(agent.to_json(report(seq)))


@pytest.fixture
def spool(tmp_path):
    return agent.Spool(str(tmp_path / "state"), max_bytes=1 << 24, max_seconds=7 * 86400)


@pytest.fixture
def sender_for(tmp_path, spool):
    def make(url):
        return agent.Sender(config_for(tmp_path, url), spool)

    return make


def waiting(spool):
    return [json.loads(body)["seq"] for _, body in spool.oldest(500)]


def step(sender, count=1, now=None):
    """So many steps of the sender, with its clock moved past every pause."""
    for _ in range(count):
        sender.turn(max(sender.retry_at, sender.backlog_at, now or 0.0))


# --- accepted ---


def test_accepted_report_never_touches_the_disk(sender_for, spool, tmp_path):
    with Sink() as sink:
        sender = sender_for(sink.url)
        sender.offer(message(1))
        step(sender)
    assert sink.seqs() == [1]
    assert spool.number == 0 and sender.pending == []


def test_request_is_what_the_contract_says(sender_for):
    with Sink() as sink:
        sender = sender_for(sink.url + "/sub")
        sender.offer(message(1))
        step(sender)
    request = sink.requests[0]
    assert request.path == "/sub/api/v1/hosts/pve-host-01/reports"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["content-encoding"] == "gzip"
    signed = {name: value for name, value in request.headers.items() if name.startswith("webhook-")}
    payload = request.headers["webhook-id"] + "." + request.headers["webhook-timestamp"] + "."
    key = agent.parse_token("", "", TOKEN)
    expected = hmac.digest(key, payload.encode() + request.body, "sha256")
    assert signed["webhook-signature"] == "v1," + base64.b64encode(expected).decode()
    assert abs(int(signed["webhook-timestamp"]) - time.time()) < 5


def test_first_log_lines_of_a_good_start(sender_for, capsys):
    with Sink() as sink:
        sender = sender_for(sink.url)
        for seq in (1, 2):
            sender.offer(message(seq))
            step(sender)
    assert capsys.readouterr().out.splitlines() == [
        f"reporter: connected to {sink.url}",
        "reporter: accepted host:pve-host-01",
    ]


# --- later ---


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 302, 418])
def test_report_is_kept_on_disk_when_the_server_answers_with(status, sender_for, spool):
    with Sink(problem(status, "busy")) as sink:
        sender = sender_for(sink.url)
        sender.offer(message(1))
        sender.turn(100.0)
    assert waiting(spool) == [1]
    assert 101.0 <= sender.retry_at <= 160.0


def test_report_is_kept_when_nobody_listens(sender_for, spool, capsys):
    sender = sender_for(closed_port_url())
    sender.offer(message(1))
    step(sender)
    assert waiting(spool) == [1]
    assert "cannot reach" in capsys.readouterr().out


@pytest.mark.parametrize(
    "raw", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", b"SSH-2.0-OpenSSH\r\n\r\n", b"\0" * 99]
)
def test_report_is_kept_when_the_answer_is_cut_short_or_no_http(sender_for, spool, raw):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            while True:
                try:
                    one, _ = listening.accept()
                except OSError:
                    return
                one.recv(65536)
                one.sendall(raw)
                one.close()

        threading.Thread(target=serve, daemon=True).start()
        sender = sender_for(f"http://127.0.0.1:{listening.getsockname()[1]}")
        sender.offer(message(1))
        step(sender)
    assert waiting(spool) == [1]


def test_server_that_drips_its_answer_is_given_up(sender_for, spool, monkeypatch):
    monkeypatch.setattr(agent, "ANSWER_TIMEOUT", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip():
            one, _ = listening.accept()
            try:
                while True:
                    one.send(b"H")
                    time.sleep(0.05)
            except OSError:
                pass

        threading.Thread(target=drip, daemon=True).start()
        sender = sender_for(f"http://127.0.0.1:{listening.getsockname()[1]}")
        began = time.monotonic()
        sender.offer(message(1))
        step(sender)
        assert time.monotonic() - began < 2
    assert waiting(spool) == [1]


def test_web_page_with_status_200_is_no_acceptance(sender_for, spool):
    with Sink(lambda _: (200, "<html>Please log in</html>", {"Content-Type": "text/html"})) as sink:
        sender = sender_for(sink.url)
        sender.offer(message(1))
        step(sender)
    assert waiting(spool) == [1]


def test_chunked_answer_is_understood(sender_for, spool):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw = head + b'8\r\n{"status\r\n23;x=y\r\n":"ok","accepted":1,"duplicates":0}\r\n0\r\n\r\n'
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            for _ in range(2):
                one, _ = listening.accept()
                one.recv(65536)
                one.sendall(raw)
                one.close()

        threading.Thread(target=serve, daemon=True).start()
        sender = sender_for(f"http://127.0.0.1:{listening.getsockname()[1]}")
        for seq in (1, 2):
            sender.offer(message(seq))
            step(sender)
    assert spool.number == 0 and sender.trouble == ""


def test_back_off_grows_to_a_minute_with_jitter(sender_for):
    sender = sender_for(closed_port_url())
    sender.offer(message(1))
    waits, now = [], 1000.0
    for _ in range(10):
        sender.turn(now)
        waits.append(sender.retry_at - now)
        now = sender.retry_at
    for number, wait in enumerate(waits):
        assert max(1.0, 0.5 * min(2**number, 60)) <= wait <= max(1.0, min(2**number, 60))
    assert len(set(waits[2:])) > 3


def test_another_reason_is_told_also_when_only_its_number_differs(sender_for, capsys):
    answers = [429, 429, 503, 503, 429]
    with Sink(lambda request: problem(answers.pop(0), "busy")(request)) as sink:
        sender = sender_for(sink.url)
        sender.offer(message(1))
        step(sender, 5)
    lines = [line for line in capsys.readouterr().out.splitlines() if "wait on disk" in line]
    assert [line.split()[1] for line in lines] == ["429", "503", "429"]


@pytest.mark.parametrize("text", ["99999999999999", "3600", "1e300", "-1", "soon"])
def test_no_answer_holds_reports_back_for_more_than_two_minutes(sender_for, text):
    with Sink(problem(503, "busy", headers={"Retry-After": text})) as sink:
        sender = sender_for(sink.url)
        sender.offer(message(1))
        now = 1000.0
        for _ in range(12):
            sender.turn(now)
            assert 1.0 <= sender.retry_at - now <= 120.0
            now = sender.retry_at


def test_retry_after_is_honoured(sender_for):
    with Sink(problem(503, "storage_full", headers={"Retry-After": "120"})) as sink:
        sender = sender_for(sink.url)
        sender.offer(message(1))
        sender.turn(50.0)
        assert 110.0 < sender.retry_at <= 112.0  # a minute beyond our own back-off, not the two it asked for
        assert sender.turn(100.0) == sender.retry_at - 100.0
        assert len(sink.requests) == 1


def test_success_ends_the_back_off(sender_for):
    answers = [problem(503, "busy")] * 4 + [accept] * 9
    with Sink(lambda request: answers.pop(0)(request)) as sink:
        sender = sender_for(sink.url)
        sender.offer(message(1))
        step(sender, 5)
        assert sender.backoff == agent.BACKOFF_FIRST and sender.trouble == ""


# --- the backlog ---


def test_newest_goes_first_then_the_backlog_oldest_first_each_once(sender_for, spool):
    away = [True]
    with Sink(lambda request: problem(503, "busy")(request) if away[0] else accept(request)) as sink:
        sender = sender_for(sink.url)
        for seq in range(1, 8):
            sender.offer(message(seq))
            step(sender)
        away[0] = False
        sink.requests.clear()
        step(sender, 4)
    assert sink.seqs() == [7, 1, 2, 3, 4, 5, 6]
    assert [request.is_batch for request in sink.requests] == [False, True]
    assert spool.count == 0


def test_backlog_of_an_earlier_run_waits_for_the_first_fresh_report(tmp_path, spool):
    for seq in range(1, 4):
        spool.push(message(seq), 1.8e9)
    with Sink() as sink:
        sender = agent.Sender(config_for(tmp_path, sink.url), spool)
        assert sender.turn(time.monotonic()) > 0
        sender.offer(message(9))
        sender.turn(time.monotonic())
        step(sender)
    assert sink.seqs() == [9, 1, 2, 3]


def test_backlog_goes_at_a_bounded_rate_and_fresh_reports_in_between(sender_for, spool, monkeypatch):
    monkeypatch.setattr(agent, "BATCH_REPORTS", 2)
    for seq in range(1, 7):
        spool.push(message(seq), 1.8e9)
    with Sink() as sink:
        sender = sender_for(sink.url)
        now = sender.backlog_at
        assert sender.turn(now) == pytest.approx(1.0)
        sender.turn(now + 0.2)
        assert sink.seqs() == [1, 2]
        sender.offer(message(9))
        assert sender.turn(now + 0.3) == pytest.approx(0.7)
        sender.turn(now + 1.0)
        sender.turn(now + 2.0)
    assert sink.seqs() == [1, 2, 9, 3, 4, 5, 6]


# --- blocked: the operator must act ---


@pytest.mark.parametrize(
    "status, code, advice",
    [
        (404, "unknown_host", "register-host pve-host-01"),
        (401, "invalid_token", "rotate-token pve-host-01"),
        (403, "forbidden", "server_url"),
        (404, "", "server_url"),
        (401, "clock_skew", "clock"),
    ],
)
def test_keeps_spooling_and_says_what_the_operator_must_do(status, code, advice, sender_for, spool, capsys):
    with Sink(problem(status, code)) as sink:
        sender = sender_for(sink.url)
        for seq in (1, 2, 3):
            sender.offer(message(seq))
            step(sender)
    told = capsys.readouterr().out
    assert advice in told
    assert told.count("reports wait on disk") == 1  # said once, not at each try
    assert waiting(spool) == [1, 2, 3]


# --- refused: this report never ---


@pytest.mark.parametrize("status, code", [(400, "invalid_json"), (413, "too_large"), (422, "invalid_report")])
def test_refused_report_is_set_aside_and_the_next_goes_on(status, code, sender_for, spool, tmp_path, capsys):
    refuse = problem(status, code, pointer="/node/load1")
    with Sink(
        lambda request: refuse(request) if 1 in [one["seq"] for one in request.reports] else accept(request)
    ) as sink:
        sender = sender_for(sink.url)
        for seq in (1, 2):
            sender.offer(message(seq))
            step(sender)
    assert spool.count == 0
    aside = list((tmp_path / "state" / "rejected").iterdir())
    assert [json.loads(agent.unpack(path.read_bytes()))["seq"] for path in aside] == [1]
    assert sink.seqs() == [1, 2]
    assert code in capsys.readouterr().out


@pytest.mark.parametrize("bad", [{1}, {13}, {7, 8}, {1, 5, 13}])
def test_refused_batch_is_split_until_only_the_bad_reports_are_set_aside(bad, sender_for, spool, tmp_path):
    taken = []

    def answer(request):
        seqs = [one["seq"] for one in request.reports]
        if bad & set(seqs):
            return problem(422, "invalid_report")(request)
        taken.extend(seqs)
        return accept(request)

    for seq in range(1, 14):
        spool.push(message(seq), 1.8e9)
    with Sink(answer) as sink:
        sender = sender_for(sink.url)
        step(sender, 40)
    aside = (tmp_path / "state" / "rejected").iterdir()
    assert {json.loads(agent.unpack(path.read_bytes()))["seq"] for path in aside} == bad
    assert sorted(taken) == [seq for seq in range(1, 14) if seq not in bad]
    assert spool.count == 0


@pytest.mark.parametrize("status, body", [(413, "<html>413 Request Entity Too Large</html>"), (400, "Bad Request"), (403, "<h1>blocked by the firewall</h1>"), (None, "")])
def test_report_that_something_on_the_way_dislikes_does_not_hold_up_the_rest(status, body, sender_for, spool):
    """A proxy's own word about report 5 (None: it hangs up): a 413 alone is believed, all else is tried again later."""

    def answer(request):
        if 5 in [one["seq"] for one in request.reports]:
            return None if status is None else (status, body, {"Content-Type": "text/html"})
        return accept(request)

    for seq in range(1, 10):
        spool.push(message(seq), 1.8e9)
    with Sink(answer) as sink:
        sender = sender_for(sink.url)
        for seq in range(11, 18):
            sender.offer(message(seq))
            for _ in range(12):
                step(sender)
        taken = {seq for request in sink.requests if 5 not in (seqs := [one["seq"] for one in request.reports]) for seq in seqs}
        assert taken >= {1, 2, 3, 4, 6, 7, 8, 9, 11, 17}
        if status == 413:
            assert spool.count == 0 and len(agent.os.listdir(spool.rejected)) == 1
        else:
            assert waiting(spool) == [5]
            sink.answer = accept
            step(sender, 3, now=max(sender.retry_at, sender.backlog_at) + agent.PASSED_OVER_SECONDS)
            assert waiting(spool) == []
    assert spool.dropped == 0


# --- clocks ---


def test_on_clock_skew_it_signs_with_the_servers_time_and_knows_the_offset(sender_for, spool):
    ahead = 7200

    def strict(request):
        server_now = time.time() + ahead
        if abs(int(request.headers["webhook-timestamp"]) - server_now) > 300:
            return problem(401, "clock_skew", server_time=server_now)(request)
        return 200, {"status": "ok", "accepted": 1, "duplicates": 0, "server_time": server_now}, {}

    with Sink(strict) as sink:
        sender = sender_for(sink.url)
        for seq in (1, 2):
            sender.offer(message(seq))
            step(sender)
    assert sink.seqs() == [1, 1, 2]
    ids = [request.headers["webhook-id"] for request in sink.requests]
    assert ids[0] == ids[1] != ids[2]
    assert sender.client.clock_offset == pytest.approx(ahead, abs=2)
    assert spool.number == 0


@pytest.mark.parametrize("told", ["soon", None, True, -5, 1e30, [1]])
def test_senseless_server_time_is_no_clock(told):
    answer = agent.Answer(200, {}, json.dumps({"server_time": told}).encode())
    assert agent.server_time(answer) is None


# --- durability ---


def test_report_without_an_answer_is_on_disk_after_a_second(sender_for, spool):
    gate = threading.Event()

    def late(request):
        gate.wait(10)
        return accept(request)

    with Sink(late) as sink:
        sender = sender_for(sink.url)
        sender.offer(message(1))
        thread = threading.Thread(target=sender.turn, args=(0.0,))
        thread.start()
        wait_for(lambda: sink.requests)
        assert sender.keep(patience=60.0) is True  # it may still come
        assert waiting(spool) == []
        sender.keep(0.0)
        assert waiting(spool) == [1]
        gate.set()
        thread.join()
    assert waiting(spool) == []  # accepted after all


def test_collectors_memory_is_saved_only_when_the_report_is_safe(tmp_path, spool):
    sender = agent.Sender(config_for(tmp_path, closed_port_url()), spool)
    one = message(1)
    one.memories = {"tasks": b'{"offset":5}'}
    sender.offer(one)
    assert not (tmp_path / "state" / "memory" / "tasks.json").exists()
    step(sender)
    assert (tmp_path / "state" / "memory" / "tasks.json").read_bytes() == b'{"offset":5}'
    assert waiting(spool) == [1]


def test_loss_is_told_once_it_was_accepted(tmp_path):
    spool = agent.Spool(str(tmp_path / "state"), max_bytes=2 * 4096, max_seconds=1e9)
    for seq in range(1, 6):
        spool.push(message(seq), 1.8e9)
    with Sink() as sink:
        sender = agent.Sender(config_for(tmp_path, sink.url), spool)
        assert spool.dropped == 3
        sender.offer(agent.Message(agent.to_json(report(9)), dropped_total=spool.dropped_total))
        step(sender)
    assert spool.dropped == 0


def test_reports_stay_in_memory_within_bounds_when_the_disk_does_not_take_them(sender_for, spool, monkeypatch):
    def broken(path, content):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(agent, "write_file", broken)
    monkeypatch.setattr(agent, "PENDING_LIMIT", 5)
    sender = sender_for(closed_port_url())
    for seq in range(1, 9):
        sender.offer(message(seq))
        step(sender)
    assert [json.loads(one.body)["seq"] for one in sender.pending] == [4, 5, 6, 7, 8]
    assert spool.dropped == 3


# --- TLS ---


@pytest.fixture
def certificate(tmp_path):
    argv = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    more = [
        "-addext",
        "subjectAltName=DNS:localhost",
        "-keyout",
        str(tmp_path / "key.pem"),
        "-out",
        str(tmp_path / "ca.pem"),
    ]
    subprocess.run([*argv.split(), *more], check=True, capture_output=True)
    return tmp_path


def tls_sink(folder):
    import ssl

    sink = Sink()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.pem", folder / "key.pem")
    sink.server.socket = context.wrap_socket(sink.server.socket, server_side=True)
    return sink


def test_https_with_a_private_ca(certificate, tmp_path, spool):
    with tls_sink(certificate) as sink:
        url = f"https://localhost:{sink.port}"
        sender = agent.Sender(config_for(tmp_path, url, f'ca_file = "{certificate}/ca.pem"'), spool)
        for seq in (1, 2):
            sender.offer(message(seq))
            step(sender)
    assert sink.seqs() == [1, 2]


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_certificate_that_is_not_trusted_or_of_another_name_is_refused(name, certificate, tmp_path, spool, capsys):
    ca_file = f'ca_file = "{certificate}/ca.pem"' if name != "localhost" else ""
    with tls_sink(certificate) as sink:
        sender = agent.Sender(config_for(tmp_path, f"https://{name}:{sink.port}", ca_file), spool)
        sender.offer(message(1))
        step(sender)
    assert sink.requests == []
    assert waiting(spool) == [1]
    assert "certificate not accepted" in capsys.readouterr().out


def test_answer_that_comes_before_the_whole_body_was_sent_is_heard(sender_for, spool, tmp_path):
    """A proxy that refuses a large body answers at once and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def refuse():
            while True:
                try:
                    one, _ = listening.accept()
                except OSError:
                    return
                one.recv(100)
                one.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                one.shutdown(socket.SHUT_WR)
                time.sleep(0.3)
                one.close()

        threading.Thread(target=refuse, daemon=True).start()
        sender = sender_for(f"http://127.0.0.1:{listening.getsockname()[1]}")
        noise = agent.os.urandom(900_000).hex()
        sender.offer(agent.Message(agent.to_json({**report(1), "noise": noise})))
        step(sender)
    assert spool.count == 0
    assert len(list((tmp_path / "state" / "rejected").iterdir())) == 1


def test_reports_in_memory_go_in_order_because_memories_build_on_each_other(tmp_path, spool):
    with Sink() as sink:
        sender = agent.Sender(config_for(tmp_path, sink.url), spool)
        for seq in (1, 2):
            one = message(seq)
            one.memories = {"tasks": b'{"offset":%d}' % seq}
            sender.offer(one)
        step(sender, 2)
    assert sink.seqs() == [1, 2]
    assert (tmp_path / "state" / "memory" / "tasks.json").read_bytes() == b'{"offset":2}'
