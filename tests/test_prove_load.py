"""Who waits for whom when a whole fleet comes back. With a real Caddy and for long: ./build.sh soak load"""

from __future__ import annotations

import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, build_report

import agent
import server


class Channel:
    def __init__(self, path: str):
        self.requests = [SimpleNamespace(path=path, error=None)]


@pytest.fixture
def queue() -> Any:
    return server.WaitingRequests()


def reports(count: int) -> list[Channel]:
    return [Channel(f"/api/v1/hosts/h{n}/reports") for n in range(count)]


def test_what_is_asked_for_takes_turns(queue):
    fleet, page, health, history = reports(3), Channel("/"), Channel("/healthz"), Channel("/api/v1/hosts/a/history")
    for waiting in (*fleet, page, history, health):
        queue.append(waiting)
    assert [queue.popleft() for _ in range(6)] == [health, page, fleet[0], history, fleet[1], fleet[2]]
    assert len(queue) == 0


@pytest.mark.parametrize("lane, path", [
    ("reports", "/api/v1/hosts/a/reports"), ("page", "/"), ("page", "/api/v1/guests"), ("health", "/healthz"),
    ("other", "/api/v1/hosts/a/history"), ("other", "/login"), ("other", "/metrics"), ("other", ""),
])  # fmt: skip
def test_nothing_that_is_asked_for_takes_all_threads(queue, lane, path):
    most = server.AT_ONCE[lane]
    crowd, late = [Channel(path) for _ in range(most + 3)], Channel("/install/x" if lane != "other" else "/")
    for waiting in crowd:
        queue.append(waiting)
    assert [queue.popleft() for _ in range(most)] == crowd[:most] and len(queue) == 0
    queue.append(late)
    assert len(queue) == 1 and queue.popleft() is late
    queue.done(crowd[0])
    assert len(queue) == 3 and queue.popleft() is crowd[most]
    assert sum(server.AT_ONCE.values()) <= server.THREADS


def test_who_would_wait_too_long_is_told_at_once_to_come_again(queue):
    """With a time for each that grows with their number, so that they do not all come back together."""
    crowd, late = reports(server.WAITING_MOST), reports(2000)
    for channel in (*crowd, *late):
        queue.append(channel)
    assert queue.popleft() is late[0] and queue.popleft() is crowd[0]  # a refusal takes no report's turn
    again = [channel.requests[0].error.again for channel in late]
    assert min(again) >= server.AGAIN_FIRST and max(again[:25]) <= server.AGAIN_FIRST + 10
    assert server.AGAIN_LAST / 2 < max(again) <= server.AGAIN_LAST <= agent.RETRY_AFTER_LIMIT
    assert all(channel.requests[0].error is None for channel in crowd)


def test_a_refusal_says_why_and_when_to_come_again(live_server):
    """As it goes out: seen by a sender that comes while no more may wait."""
    program = "import sys, server; server.WAITING_MOST = 0; sys.exit(server.main(sys.argv[1:]))"
    live_server.stop()
    live_server.argv = [sys.executable, "-c", program]
    live_server.env["PYTHONPATH"] = str(ROOT)
    live_server.start()
    told = live_server.post(live_server.register("pve1"), build_report())
    assert (told.status, told.json()["code"], told.headers["content-type"]) == (503, "busy", "application/problem+json")
    assert server.AGAIN_FIRST <= int(told.headers["retry-after"]) <= server.AGAIN_LAST
    assert live_server.request("GET", "/healthz").status == 200


def test_who_has_hung_up_while_he_waited_long_is_seen():
    """And who has only ended his side, as HTTP lets him, gets his answer as long as it comes soon."""
    ours, theirs = socket.socketpair()
    new, old = time.monotonic(), time.monotonic() - server.PATIENCE_SECONDS

    def left(began: float) -> bool:
        channel: Any = SimpleNamespace(socket=ours, requests=[SimpleNamespace(began=began)])
        return server.HttpChannel.has_left(channel)

    assert not left(new) and not left(old)
    theirs.send(b"GET")
    assert not left(old) and ours.recv(9) == b"GET"
    theirs.shutdown(socket.SHUT_WR)
    assert left(old) and not left(new)
    theirs.close()
    ours.close()
    assert left(old)


def test_a_report_is_taken_however_many_wait_and_health_does_not(live_server):
    token = live_server.register("pve1")
    ended: list[int] = []
    stop = threading.Event()

    def report(run: int) -> None:
        for seq in range(1, 6):
            batch = [build_report(run_id=f"run-{run}", seq=seq * 100 + n, at=time.time()) for n in range(20)]
            status = 0
            while status != 200 and not stop.is_set():
                status = live_server.post(token, batch, message_id=f"{run}-{seq}-{time.time()}").status
        ended.append(run)

    with ThreadPoolExecutor(24) as senders:
        jobs = [senders.submit(report, run) for run in range(24)]
        while not all(job.done() for job in jobs):
            assert live_server.request("GET", "/healthz").status == 200
            time.sleep(0.1)
        stop.set()
        for job in jobs:
            job.result()
    assert len(ended) == 24
