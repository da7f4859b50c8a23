"""Who waits for whom when a whole fleet comes back. With a real Caddy and for long: ./build.sh soak load"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from conftest import build_report

import server


class Channel:
    def __init__(self, path: str):
        self.requests = [SimpleNamespace(path=path)]


def test_reports_wait_for_all_others_and_few_are_worked_on_at_once():
    queue: Any = server.WaitingRequests()
    reports = [Channel(f"/api/v1/hosts/h{n}/reports") for n in range(server.REPORTS_AT_ONCE + 3)]
    page, health = Channel("/"), Channel("/healthz")
    for waiting in (*reports, page, health):
        queue.append(waiting)
    assert [queue.popleft(), queue.popleft()] == [page, health]
    taken = [queue.popleft() for _ in range(server.REPORTS_AT_ONCE)]
    assert taken == reports[: server.REPORTS_AT_ONCE] and len(queue) == 0
    queue.append(page)
    assert len(queue) == 1 and queue.popleft() is page
    queue.under_way.discard(taken[0])
    assert len(queue) == 3 and queue.popleft() is reports[server.REPORTS_AT_ONCE]


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
