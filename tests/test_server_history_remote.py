"""The history in a VictoriaMetrics: the same answers as from the database, and nothing lost on the way there.

    settings -> equal -> away -> killed -> late -> page -> check
"""

from __future__ import annotations

import http.server
import json
import os
import random
import secrets
import signal
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from beside import Victoria, wait_until
from conftest import (
    PASSWORD_HASH,
    Client,
    Clock,
    LiveServer,
    build_guest,
    build_pool,
    build_report,
    build_storage,
)

import server

HOUR = 3600
SERIES = (
    "node.cpu_ratio", "node.memory_available_bytes", "node.net_receive_bytes_total", "node.net_receive_bytes_per_second",
    "node/interfaces/eno1.receive_bytes_total", "node/temperatures/coretemp Core 0.celsius", "guests/100.cpu_ratio",
    "guests/100.net_receive_bytes_total", "pools/tank.capacity_ratio", "storages/local.used_bytes",
    'datasets/tank/"vm"\\n{é😀}.used_bytes', "guests/999.cpu_ratio", "node.nonsense",
)  # fmt: skip


@pytest.fixture
def victoria(tmp_path):
    victoria = Victoria(tmp_path / "victoria")
    victoria.start()
    yield victoria
    victoria.stop(signal.SIGKILL)


class Recorder:
    """A server's inside with one host, fed and asked directly; its clock begins now, as the store wants it."""

    def __init__(self, folder: Path, url: str = "sqlite:"):
        folder.mkdir()
        self.clock = Clock()
        self.clock.now = float(int(time.time()))
        config = server.Config({"DATABASE_PATH": str(folder / "monitor.db"), "HISTORY_URL": url,
                                "DASHBOARD_PASSWORD_HASH": PASSWORD_HASH})  # fmt: skip
        server.open_database(config, create=True).close()
        self.monitor = server.Monitor(config, self.clock)
        self.keeper: Any = self.monitor.keeper
        self.host = self.add_host("pve1")

    def add_host(self, name: str) -> int:
        row = self.monitor.store.write(lambda db: server.insert_host(db, name, self.clock()))
        self.monitor.fleet.refresh(self.monitor.store.reader())
        return row["id"]

    def take(self, *reports: dict, host: int | None = None) -> int:
        work = partial(server.insert_reports, self.monitor, host or self.host, list(reports), None, self.clock())
        return self.monitor.store.write(work)

    def keep(self) -> None:
        self.keeper.settle(self.clock())

    def admin(self) -> Client:
        client, name = Client(self.monitor), secrets.token_hex(4)
        token = self.monitor.store.write(
            lambda db: server.create_api_token(db, name, self.clock(), admin=True, days=None))
        client.headers = {"Authorization": f"Bearer {token}"}
        return client

    def count(self, table: str) -> int:
        return self.monitor.store.reader().execute(f"SELECT count(*) FROM {table}").fetchone()[0]


@pytest.fixture
def make_recorder(tmp_path):
    made: list[Recorder] = []

    def make(url: str = "sqlite:") -> Recorder:
        made.append(Recorder(tmp_path / f"server{len(made)}", url))
        return made[-1]

    yield make
    for one in made:
        one.monitor.close()


def reports_until(end: float, count: int, seed: int = 1) -> list[dict]:
    """Reports of every 30 s with values that move, a silence, a reboot, and a host that was shortly elsewhere."""
    dice, found, counter, booted = random.Random(seed), [], 5e9, end - 90 * 86400
    for seq in range(1, count + 1):
        at = end - 30 * (count - seq)
        counter += dice.randrange(5 * 10**7, 6 * 10**7)
        if seq == count * 2 // 3:
            counter, booted = 1e6, at - 20
        if count // 4 < seq < count // 4 + 30:
            continue
        node = {"cpu_ratio": round(dice.random(), 4), "uptime_seconds": round(at - booted, 2), "boot_id": str(booted),
                "net_receive_bytes_total": int(counter), "memory_available_bytes": dice.randrange(10**11),
                "interfaces": [{"name": "eno1", "receive_bytes_total": int(counter) * 3}],
                "temperatures": [{"sensor": "coretemp", "label": "Core 0", "celsius": 40 + seq % 9}]}  # fmt: skip
        guests = [build_guest(100, net_receive_bytes_total=int(counter) * 2, cpu_ratio=round(dice.random(), 3),
                              uptime_seconds=round(at - booted, 2))]  # fmt: skip
        found.append(build_report(
            seq=seq, at=at, node=node, guests=guests, pools=[build_pool(capacity_ratio=round(seq / count, 4))],
            storages=[build_storage("local", used_bytes=seq * 4096)],
            datasets=[{"name": 'tank/"vm"\\n{é😀}', "used_bytes": seq * 10**9}]))  # fmt: skip
    return found


def ask(client: Client, *names: str, **parameters: Any) -> list[dict]:
    query = urllib.parse.urlencode([*(("series", name) for name in names), *parameters.items()])
    answer = client.get(f"/api/v1/hosts/pve1/history?{query}")
    assert answer.status == 200, answer
    return answer.json()["series"]


# --- settings ---


@pytest.mark.parametrize("url", ["http://victoria:8428", "https://me:secret@metrics.example/vm/", "sqlite:"])
def test_an_address_of_a_store_is_taken(url):
    assert server.Config({"HISTORY_URL": url}).history_url == url.rstrip("/")


@pytest.mark.parametrize("url", ["victoria:8428", "ftp://secret@x", "http://", "http://x:port", "http://x/?a=b", "mysql:"])
def test_anything_else_is_refused_in_one_line(url):
    with pytest.raises(server.Failure, match="^HISTORY_URL: ") as caught:
        server.Config({"HISTORY_URL": url})
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_password_in_the_address_is_sent_and_never_shown():
    store = server.RemoteStore("https://me:s%40cret@metrics.example:8427/vm")
    assert store.shown == "https://metrics.example:8427/vm"
    assert store.headers["Authorization"] == "Basic bWU6c0BjcmV0"


# --- equal: the same reports, the same answers ---


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same reports in a database and in a store."""
    folder = tmp_path_factory.mktemp("pair")
    victoria = Victoria(folder / "victoria")
    victoria.start()
    local, remote = Recorder(folder / "local"), Recorder(folder / "remote", victoria.url)
    remote.clock.now = local.clock.now
    end = local.clock() // HOUR * HOUR - 30 * 7 + 3
    for one in (local, remote):
        reports = reports_until(end, 60 * 12)
        random.Random(5).shuffle(reports)
        for at in range(0, len(reports), 100):
            one.take(*reports[at : at + 100])
        one.keep()
    wait_until(lambda: len(victoria.sequences(local.clock())) == 60 * 12 - 29)
    yield local, remote
    for one in (local, remote):
        one.monitor.close()
    victoria.stop(signal.SIGKILL)


def nearly(points: list[list[float]]) -> Any:
    """As near as averages are rounded: to some hundredth of how far the values lie apart."""
    return [[pytest.approx(at), pytest.approx(average, rel=2e-3, abs=1e-4 + (highest - lowest) / 64),
             pytest.approx(lowest, rel=2e-3), pytest.approx(highest, rel=2e-3)] for at, average, lowest, highest in points]


def test_values_as_received_are_the_same(pair):
    local, remote = pair
    span = {"from": local.clock() - 8 * HOUR, "to": local.clock(), "step": 30}
    for mine, theirs in zip(ask(local.admin(), *SERIES, **span), ask(remote.admin(), *SERIES, **span)):
        assert theirs["name"] == mine["name"] and theirs["step"] == mine["step"] == 30
        assert theirs["points"] == [pytest.approx(point, rel=1e-12) for point in mine["points"]], mine["name"]
        assert mine["points"] or mine["name"] in SERIES[-2:]


@pytest.mark.parametrize("step", [300, 900, 3600, 21600])
def test_steps_are_the_same(pair, step):
    """All but a counter's hour in which something began anew: the whole 5 minutes are left out there."""
    local, remote = pair
    span = {"from": local.clock() - 9 * HOUR, "to": local.clock(), "step": step}
    for mine, theirs in zip(ask(local.admin(), *SERIES, **span), ask(remote.admin(), *SERIES, **span)):
        assert theirs["step"] == mine["step"] == step
        if "_total" not in mine["name"] and "_per_second" not in mine["name"]:
            assert theirs["points"] == nearly(mine["points"]), mine["name"]
            continue
        known = {point[0]: point for point in mine["points"]}
        assert known.keys() - {point[0] for point in theirs["points"]} <= {
            at for at in known if step == 300 and at <= reboot_at(local) < at + 300}
        for at, average, lowest, highest in theirs["points"]:
            disturbed = step > 300 or gap_in(local, at, step)
            assert average == pytest.approx(known[at][1], rel=0.05 if disturbed else 2e-3), (mine["name"], at)
            assert lowest <= average <= highest <= 1.01 * known[at][3]
            assert disturbed or [lowest, highest] == pytest.approx(known[at][2:], rel=2e-3)


def reboot_at(recorder: Recorder) -> float:
    return recorder.clock() // HOUR * HOUR - 30 * 7 + 3 - 30 * 240


def gap_in(recorder: Recorder, at: float, step: float) -> bool:
    """Whether the silence or the reboot touches a step."""
    end = recorder.clock() // HOUR * HOUR - 30 * 7 + 3
    silence = (end - 30 * 541, end - 30 * 510)
    return silence[0] - 30 < at + step and at <= silence[1] or at - 300 <= reboot_at(recorder) < at + step


def test_the_step_that_fits_is_the_same(pair):
    local, remote = pair
    now = local.clock()
    for span in ({}, {"from": now - HOUR}, {"from": now - 7 * 86400}, {"from": now - 300 * 86400},
                 {"from": now - 300 * 86400, "step": 7200}, {"from": 0}, {"from": now - 7 * 86400, "step": 1}):
        steps = [ask(one.admin(), "node.cpu_ratio", **span)[0]["step"] for one in pair]
        assert steps[0] == steps[1], span


def test_csv_gaps_and_export_are_the_same(pair):
    local, remote = pair
    mine, theirs = (one.admin() for one in pair)
    query = f"?series=node.cpu_ratio&step=30&format=csv&from={local.clock() - 9 * HOUR}"
    assert theirs.get("/api/v1/hosts/pve1/history" + query).text == mine.get("/api/v1/hosts/pve1/history" + query).text
    assert theirs.get("/api/v1/hosts/pve1/gaps").json() == mine.get("/api/v1/hosts/pve1/gaps").json()
    rows = [[json.loads(line) for line in one.get("/api/v1/hosts/pve1/export").text.splitlines()] for one in (mine, theirs)]
    raw = [sorted((row["series"], row["time"], row["average"]) for row in some if row["step"] == 30) for some in rows]
    assert len(raw[0]) > 5000
    assert [row[:2] for row in raw[1]] == [row[:2] for row in raw[0]]
    assert [row[2] for row in raw[1]] == pytest.approx([row[2] for row in raw[0]], rel=1e-12)


def test_a_guest_that_moved_is_put_together(make_recorder, victoria):
    remote = make_recorder(victoria.url)
    other = remote.add_host("pve2")
    cluster = {"name": "c1", "members": [{"name": "pve1"}, {"name": "pve2"}]}
    now = remote.clock() // 300 * 300
    for seq in range(1, 41):
        for name, host, here in (("pve1", remote.host, seq <= 20), ("pve2", other, seq > 20)):
            guests = [build_guest(100, cpu_ratio=seq / 100)] if here else []
            remote.take(build_report(name, seq=seq, at=now - 1200 + 30 * seq, guests=guests, cluster=cluster), host=host)
    remote.keep()
    wait_until(lambda: len(victoria.sequences(now)) == 80)
    points = ask(remote.admin(), "guests/100.cpu_ratio", step=30, **{"from": now - 1200})[0]["points"]
    assert [point[1] for point in points] == [seq / 100 for seq in range(1, 41)]
    metric = victoria.values('proxmon_guest_cpu_ratio{vmid="100",host="pve2"}', now)[0]["metric"]
    assert metric == {"__name__": "proxmon_guest_cpu_ratio", "host": "pve2", "cluster": "c1", "vmid": "100"}


# --- away: the tail is the queue ---


def test_nothing_leaves_the_tail_before_the_store_gives_it_back(make_recorder, victoria, monkeypatch):
    remote = make_recorder(victoria.url)
    reports = reports_until(remote.clock(), 60)
    remote.take(*reports)
    victoria.stop(signal.SIGKILL)
    with pytest.raises(server.Problem) as caught:
        remote.keep()
    assert caught.value.code == "busy" and remote.count("report") == len(reports)
    victoria.start()
    remote.keep()
    assert remote.count("report") == len(reports)
    victoria.stop(signal.SIGKILL)  # with what it took last in its memory only
    victoria.start()
    monkeypatch.setattr(server, "CONFIRM_SECONDS", 0)
    there = victoria.sequences(remote.clock())
    remote.keeper.confirm()
    assert remote.count("report") == len(reports) - len(there)
    remote.keep()
    wait_until(lambda: victoria.sequences(remote.clock()) == [report["seq"] for report in reports])
    remote.keeper.confirm()
    assert remote.count("report") == 0 and remote.count("chunk") == 0
    assert remote.count("kept_report") == 1  # the latest state
    remote.monitor.reload()
    assert remote.monitor.fleet.hosts[remote.host].body("node", {})["cpu_ratio"] == reports[-1]["node"]["cpu_ratio"]


def test_what_was_packed_here_before_gets_old_and_goes(make_recorder, victoria, tmp_path):
    local = make_recorder()
    now = local.clock()
    local.take(*reports_until(now, 300))
    local.clock.now = now + 3 * HOUR
    local.keep()
    packed = local.count("chunk")
    assert packed and local.count("report") == 0
    local.monitor.close()
    config = server.Config({"DATABASE_PATH": local.monitor.config.database_path, "HISTORY_URL": victoria.url})
    local.monitor = server.Monitor(config, local.clock)
    for day in range(1, 13):
        local.clock.now = now + day * 86400
        local.monitor.store.write(lambda db: db.execute("UPDATE chunk SET written_at = written_at - 86400"))
        local.monitor.keeper.turn(local.clock())
        local.monitor.keeper.turn(local.clock())
    rows = local.monitor.store.reader().execute("SELECT id >> 34 & 3 FROM chunk").fetchall()
    assert {row[0] for row in rows} == {1, 2}  # 5 minutes and hours, until they are old too


def test_what_the_store_takes_and_never_gives_back_does_not_stay_for_ever(make_recorder, victoria, monkeypatch, capsys):
    remote = make_recorder(victoria.url)
    remote.take(build_report(seq=1, at=remote.clock() - 20 * 365 * 86400))  # older than it keeps anything
    monkeypatch.setattr(server, "CONFIRM_SECONDS", 0)
    for _ in range(server.PUSH_TRIES):
        assert remote.count("report") == 1
        remote.keep()
        remote.keeper.confirm()
    assert remote.count("report") == 0 and "older than it keeps" in capsys.readouterr().out


def test_questions_without_the_store_are_busy_and_the_page_lives(make_recorder, victoria):
    remote = make_recorder(victoria.url)
    admin = remote.admin()
    remote.take(*reports_until(remote.clock(), 10))
    victoria.stop()
    for path in ("history?series=node.cpu_ratio", "history?series=node.cpu_ratio&step=30&format=csv", "gaps", "export"):
        answer = admin.get(f"/api/v1/hosts/pve1/{path}")
        assert answer.status == 503 and answer.code == "busy", path
        assert answer.headers["content-type"] == "application/problem+json" and "retry-after" in answer.headers
        assert victoria.url in answer.json()["detail"]
    assert admin.get("/api/v1/hosts/pve1").status == 200
    assert admin.log_in().status in (200, 303)
    page = admin.get("/")
    assert page.status == 200 and "pve1" in page.text


def test_a_store_that_hangs_is_not_waited_for_again_and_again(make_recorder, monkeypatch):
    monkeypatch.setattr(server, "QUERY_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        remote = make_recorder(f"http://127.0.0.1:{silent.getsockname()[1]}")
        remote.take(build_report(at=remote.clock()))
        admin, began = remote.admin(), time.monotonic()
        for _ in range(20):
            assert admin.get("/api/v1/hosts/pve1/history?series=node.cpu_ratio").code == "busy"
        assert time.monotonic() - began < 3


@contextmanager
def strange_store(answer: bytes) -> Iterator[str]:
    """A store that answers everything with some bytes, and hangs up."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


@pytest.mark.parametrize("answer", [
    b"HTTP/1.0 500 No\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nbroken off",
    b"HTTP/1.0 500 No\r\nContent-Length: 5000\r\n\r\nbroken off",
    b"HTTP/1.0 200 OK\r\nContent-Length: 5000\r\n\r\n{",
    b"HTTP/1.0 200 OK\r\n\r\n[]",
    b'HTTP/1.0 200 OK\r\n\r\n{"data": {"result": [{"metric": [], "values": 5}]}}',
    b'HTTP/1.0 200 OK\r\n\r\n{"data": {"result": [{"metric": {}, "values": [["x", "y"]]}]}}',
    b"nonsense\r\n\r\n",
])  # fmt: skip
def test_whatever_the_store_answers_is_busy_and_nothing_is_lost(make_recorder, answer, monkeypatch):
    monkeypatch.setattr(server, "CONFIRM_SECONDS", 0)
    monkeypatch.setattr(server, "AWAY_SECONDS_MOST", 0)
    with strange_store(answer) as url:
        remote = make_recorder(url)
        remote.take(build_report(at=remote.clock()))
        admin = remote.admin()
        for path in ("history?series=node.cpu_ratio", "history?series=node.net_receive_bytes_total&step=30", "gaps", "export"):
            assert admin.get(f"/api/v1/hosts/pve1/{path}").code == "busy", path
        assert remote.keeper.sparks(remote.monitor.store.reader(), [remote.host], remote.clock()) == {remote.host: []}
        pauses = [remote.keeper.push_all() for _ in range(6)]
        assert remote.keeper.trouble and remote.count("report") == 1
        assert pauses[-1] == server.PUSH_SECONDS_MOST and pauses == sorted(pauses)


def test_series_of_others_in_the_same_store_do_no_harm(make_recorder, victoria):
    remote = make_recorder(victoria.url)
    now = remote.clock()
    lines = "".join(f"{name} 1 {int(now - 60) * 1000}\n" for name in (
        'proxmon_report_seq{host="pve1"}', 'proxmon_report_seq{host="pve1",run="x"}', 'proxmon_other{host="pve1"}'))
    urllib.request.urlopen(victoria.url + "/api/v1/import/prometheus", lines.encode()).close()
    wait_until(lambda: len(victoria.values('{host="pve1"}', now)) == 3)
    remote.take(build_report(at=now))
    remote.keep()
    wait_until(lambda: len(victoria.values('proxmon_node_load1{host="pve1"}', now)) == 1)
    admin = remote.admin()
    assert admin.get("/api/v1/hosts/pve1/gaps").status == 200
    assert '"node.load1"' in admin.get("/api/v1/hosts/pve1/export").text


def test_the_small_lines_of_the_page_come_from_the_store(pair):
    local, remote = pair
    mine, theirs = (one.keeper.sparks(one.monitor.store.reader(), [one.host], one.clock())[one.host] for one in pair)
    assert len(theirs) == 24 and theirs == [pytest.approx(value, abs=2e-4) if value is not None else None for value in mine]
    assert sum(value is not None for value in theirs) in (6, 7)


# --- killed: a server that dies between sending and clearing away ---


class Crossing(http.server.BaseHTTPRequestHandler):
    """On the way to the real store; `fault` says what befalls an import."""

    victoria: Victoria
    fault: str | None = None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = self.fault if self.path.endswith("/import") else None
        type(self).fault = None if fault else self.fault
        if fault == "killed before":
            self.victoria.stop(signal.SIGKILL)
        try:
            request = urllib.request.Request(self.victoria.url + self.path, body, dict(self.headers))
            with urllib.request.urlopen(request, timeout=20) as answer:
                status, found = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, found = error.code, error.read()
        except OSError:
            return self.close()
        if fault == "killed after":
            self.victoria.stop(signal.SIGKILL)
        if fault in ("killed after", "answer lost"):
            return self.close()
        if fault == "slow":
            time.sleep(1.5)
            return self.close()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(found)

    def close(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: Any) -> None:
        pass


def test_a_store_killed_slow_or_cut_off_in_the_middle_loses_nothing(make_recorder, victoria, monkeypatch):
    monkeypatch.setattr(server, "CONFIRM_SECONDS", 1.5)
    monkeypatch.setattr(server, "AWAY_SECONDS_MOST", 0)
    monkeypatch.setattr(server, "QUERY_SECONDS", 1)
    crossing = type("Crossing", (Crossing,), {"victoria": victoria})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), crossing) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        remote = make_recorder(f"http://127.0.0.1:{web.server_port}")
        reports, sent = reports_until(remote.clock(), 240), 0
        for fault in ("killed before", "killed after", "answer lost", "slow", None):
            remote.take(*reports[sent : sent + 40])
            sent += 40
            crossing.fault = fault
            remote.keeper.push_all()
            assert (remote.keeper.trouble is None) == (fault is None), fault
            if fault and "killed" in fault:
                victoria.start()
            remote.keeper.push_all()
        remote.take(*reports[sent:])
        everything = [report["seq"] for report in reports]

        def arrived() -> bool:
            remote.keeper.push_all()
            return remote.count("report") == 0

        wait_until(arrived)
        assert victoria.sequences(remote.clock()) == everything
        points = ask(remote.admin(), "node.cpu_ratio", step=30, **{"from": remote.clock() - 3 * HOUR})[0]["points"]
        assert [point[1] for point in points] == [report["node"]["cpu_ratio"] for report in reports]
        web.shutdown()


def test_a_store_whose_disk_is_full_takes_nothing_and_loses_nothing(make_recorder, victoria, monkeypatch):
    monkeypatch.setattr(server, "CONFIRM_SECONDS", 0)
    victoria.stop()
    victoria.start("-storage.minFreeDiskSpaceBytes=1000000000000000")  # it is read-only then
    remote = make_recorder(victoria.url)
    reports = reports_until(remote.clock(), 20)
    remote.take(*reports)
    for _ in range(server.PUSH_TRIES + 1):
        remote.keeper.push_all()
    assert remote.count("report") == len(reports) and remote.keeper.trouble
    victoria.stop()
    victoria.start()
    remote.keeper.push_all()
    wait_until(lambda: victoria.sequences(remote.clock()) == [report["seq"] for report in reports])
    remote.keeper.push_all()
    assert remote.count("report") == 0


def test_kill_9_of_both_loses_nothing(tmp_path, victoria):
    running = LiveServer(tmp_path, HISTORY_URL=victoria.url)
    running.start()
    token, reader = running.register("pve1"), running.api_token()
    begin, seq = time.time() - 600, 0
    try:
        for fault in (None, "server", "store", "server", None):
            for _ in range(40):
                seq += 1
                assert running.post(token, build_report(seq=seq, at=begin + seq), message_id=f"m{seq}").status == 200
            if fault == "server":
                time.sleep(random.Random(seq).uniform(0, 6))
                running.stop(signal.SIGKILL)
                running.start()
            elif fault == "store":
                victoria.stop(signal.SIGKILL)
            elif not victoria.answers():
                assert running.request("GET", "/api/v1/hosts/pve1/history?series=node.cpu_ratio",
                                       Authorization=f"Bearer {reader}").code == "busy"
                victoria.start()
        everything = list(range(1, seq + 1))
        wait_until(lambda: victoria.sequences(time.time()) == everything)
        wait_until(lambda: "database: " in running.command("check").stdout and left(tmp_path) == 0, 60)
        points = running.get(f"/api/v1/hosts/pve1/history?series=node.cpu_ratio&step=30&from={begin}", reader)
        assert len(points["series"][0]["points"]) == seq
        assert running.get("/api/v1/hosts/pve1/gaps", reader)["lost"] == []
    finally:
        running.stop(signal.SIGKILL)
    assert victoria.sequences(time.time()) == everything


def left(folder: Path) -> int:
    """Reports in the tail of a server's database."""
    db = server.connect(str(folder / "monitor.db"), readonly=True)
    try:
        return db.execute("SELECT count(*) FROM report").fetchone()[0]
    finally:
        db.close()


# --- check ---


def test_check_says_whether_the_store_answers(tmp_path, victoria):
    running = LiveServer(tmp_path, HISTORY_URL=victoria.url.replace("//", "//me:hidden@"))
    assert running.command("migrate").returncode == 0
    answer = running.command("check")
    assert f"✓ history: {victoria.url} answers" in answer.stdout and "hidden" not in answer.stdout + answer.stderr
    victoria.stop()
    answer = running.command("check")
    assert answer.returncode == 1 and f"✗ history: the history store at {victoria.url} does not answer" in answer.stdout
    assert os.linesep not in answer.stderr.strip()
