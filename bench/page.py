#!/usr/bin/env python3
"""Measure what an open page costs, its reader and the server, and how long it takes: this checkout beside another.

    options -> servers -> feeding -> browser -> one page -> main

    git worktree add /tmp/old c61810b
    bench/page.py --server server.py /tmp/old/server.py        300 hosts × 30 guests, 6 minutes
    bench/page.py --hosts 1000 --seconds 20                    a fleet of another size

All servers get the same reports at the same time, each host every 30 s, while their pages are looked at one after the
other in one Chromium; so a busy machine is busy for all. Seconds of a page are CPU time of its main thread, those of
the server the kernel's accounting, less what the reports alone cost it meanwhile. A click is timed in the page, from
the click to the frame that shows what was asked for.
"""

from __future__ import annotations

import argparse
import base64
import copy
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import history

sys.path.insert(0, str(history.ROOT / "tests"))

import fleet
from playwright.sync_api import Page, sync_playwright

import agent

EVERY, PASSWORD = 30, "as long as it has to be"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-component-update", "--disable-background-networking"]


# --- options ---


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what an open page costs.")
    parser.add_argument("--hosts", type=int, default=300)
    parser.add_argument("--guests", type=int, default=30, help="of each host")
    parser.add_argument("--seconds", type=int, default=30, help="how long each page is left alone")
    parser.add_argument("--server", type=Path, nargs="+", default=[history.ROOT / "server.py"])
    return parser.parse_args()


# --- servers ---


class Server(history.Measured):
    """A server with its hosts registered; `tokens` by host."""

    def __init__(self, program: Path, folder: Path):
        env = {"DATABASE_PATH": str(folder / "monitor.db"), "LISTEN": "127.0.0.1"}
        self.argv = [sys.executable, str(program.resolve())]
        self.command(env, "migrate")
        told = self.command(env, "create-api-token", "bench", "--admin")
        self.token = told.partition("TOKEN: ")[2].split()[0]
        env["DASHBOARD_PASSWORD_HASH"] = self.command(env, "hash-password", text=PASSWORD).strip()
        port = history.free_port()
        self.url, self.tokens = f"http://127.0.0.1:{port}", {}
        super().__init__(*self.argv, "serve", port=port, env={**env, "PORT": str(port), "PUBLIC_URL": self.url})

    def command(self, env: dict[str, str], *argv: str, text: str = "") -> str:
        return subprocess.run([*self.argv, *argv], input=text, text=True, check=True, capture_output=True,
                              env={**os.environ, **env}).stdout

    def register(self, name: str, number: int) -> None:
        os.environ["FLEET_API_TOKEN"] = self.token
        host = {"name": name, "site": fleet.SITES[number % 4], "tags": fleet.TAGS[number % 5]}
        status, answer = fleet.admin_call(fleet.Connection(self.url), "POST", "/hosts", host)
        assert status == 201, answer
        self.tokens[name] = answer["token"]


# --- feeding: a process of its own ---


def play(options: argparse.Namespace) -> list[fleet.PlayedHost]:
    usual, troubled = fleet.load_recordings()
    hosts = [fleet.PlayedHost(number, fleet.recording_of(number, usual, troubled), "", time.time(), 1)
             for number in range(options.hosts)]
    for host in hosts:
        guests = host.sections["guests"]
        for vmid in range(9000, 9000 + options.guests - len(guests)):
            guests.append({**copy.deepcopy(guests[vmid % len(guests)]), "vmid": vmid, "name": f"padded-{vmid}"})
    return hosts


def send(connection: fleet.Connection, token: str, name: str, report: dict[str, Any]) -> None:
    body = agent.pack(agent.to_json([report]))
    headers = agent.webhook_headers(base64.b64decode(token.removeprefix("whsec_")), body, int(time.time()))
    headers |= {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    status, answer = connection.ask("POST", f"/api/v1/hosts/{name}/reports", body, headers)
    assert status == 200, answer


def feed(targets: list[tuple[str, dict[str, str]]], options: argparse.Namespace, full: Any, paused: Any) -> None:
    """Each host once as fast as it goes, which sets `full`; then each every 30 s, but while `paused`."""
    hosts, connections = play(options), [fleet.Connection(url) for url, _ in targets]
    due = time.monotonic()
    while True:
        for host in hosts:
            while paused.is_set() and full.is_set():
                time.sleep(0.2)
            report = host.report(time.time())
            for connection, (_, tokens) in zip(connections, targets):
                send(connection, tokens[host.name], host.name, report)
            due = max(due + EVERY / len(hosts), time.monotonic() - 1) if full.is_set() else time.monotonic()
            time.sleep(max(0, due - time.monotonic()))
        full.set()


# --- browser: what a page did, by Chromium's own accounting ---


class Watched:
    """A page that is logged in, with its traffic and its main thread's CPU time."""

    def __init__(self, browser: Any, server: Server):
        self.page: Page = browser.new_page(viewport={"width": 1440, "height": 900})
        self.page.set_default_timeout(120_000)
        self.server, self.polls = server, []
        self.tools = self.page.context.new_cdp_session(self.page)
        self.tools.send("Performance.enable", {"timeDomain": "threadTicks"})
        self.tools.send("Network.enable")
        self.tools.on("Network.loadingFinished", lambda event: self.polls.append(event["encodedDataLength"]))
        self.page.goto(server.url)
        self.page.fill("input[name=password]", PASSWORD)
        self.page.click("button[type=submit]")
        self.page.wait_for_selector(".posture")

    def thread(self) -> float:
        metrics = self.tools.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def leave_alone(self, seconds: float) -> dict[str, float]:
        """Bytes a minute, its main thread's seconds and the server's, a minute; and the middle poll's bytes."""
        self.page.wait_for_timeout(4000)
        self.polls.clear()
        thread, cpu, began = self.thread(), self.server.cpu(), time.monotonic()
        self.page.wait_for_timeout(seconds * 1000)
        minutes = (time.monotonic() - began) / 60
        return {"thread": (self.thread() - thread) / minutes, "server": (self.server.cpu() - cpu) / minutes,
                "bytes": sum(self.polls) / minutes, "poll": statistics.median(self.polls or [0]),
                "largest": max(self.polls, default=0), "polls": len(self.polls) / minutes}

    def paint(self, path: str, times: int = 5) -> float:
        """Seconds from the request to the first text, the middle one."""
        taken = []
        for _ in range(times):
            self.page.goto(self.server.url + path)
            taken.append(self.page.evaluate("new Promise((done) => new PerformanceObserver((list) => "
                                            "{ for (const entry of list.getEntriesByName('first-contentful-paint')) done(entry.startTime); })"
                                            ".observe({ type: 'paint', buffered: true }))"))
        return statistics.median(taken) / 1000

    def click(self, link: str, shown: str) -> float | None:
        """None if the page has no such link; else seconds from a click on a link to the frame in which `shown`, an expression of the page, is true."""
        if not self.page.locator(link).count():
            return None
        return self.page.evaluate(f"""() => new Promise((done) => {{
            const began = performance.now();
            const look = () => ({shown}) ? requestAnimationFrame(() => done((performance.now() - began) / 1000)) : setTimeout(look, 5);
            document.querySelector({json.dumps(link)}).click();
            look();
        }})""")


# --- one page: the figures of one server ---


def measure(browser: Any, server: Server, options: argparse.Namespace, paused: Any) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    cpu, began = server.cpu(), time.monotonic()
    time.sleep(options.seconds)
    alone = (server.cpu() - cpu) / (time.monotonic() - began) * 60
    figures["server, reports alone"] = f"{alone:.2f} s/min"
    watched = Watched(browser, server)
    for name, path in (("front page", "/"), ("hosts", "/?tab=hosts"), ("guests", "/?tab=guests")):
        figures[f"first paint, {name}"] = f"{watched.paint(path):.2f} s"
    for name, path in (("front page", "/"), ("hosts", "/?tab=hosts"), ("guests", "/?tab=guests")):
        watched.page.goto(server.url + path)
        cost = watched.leave_alone(options.seconds)
        figures[f"main thread, {name}"] = f"{cost['thread']:.2f} s/min"
        figures[f"server, {name}"] = f"{cost['server'] - alone:.2f} s/min"
        figures[f"traffic, {name}"] = f"{cost['bytes'] / 1e3:.0f} kB/min in {cost['polls']:.0f} answers, largest {cost['largest'] / 1e3:.1f} kB"
    figures.update(clicks(watched, server))
    paused.set()
    watched.page.goto(server.url + "/?tab=hosts")
    cost = watched.leave_alone(max(15, options.seconds // 2))
    paused.clear()
    figures["poll, nothing new"] = f"{cost['poll'] / 1e3:.2f} kB in the middle, largest {cost['largest'] / 1e3:.1f} kB"
    figures["thread, nothing new"] = f"{cost['thread']:.2f} s/min"
    watched.page.close()
    return figures


def clicks(watched: Watched, server: Server) -> dict[str, str]:
    """Tab, sort, filter, search and card, the middle of five."""
    asked: tuple[tuple[str, str, str, str], ...] = (
        ("tab", "/?tab=pools", ".tab[href*='tab=hosts']", "document.querySelector('.row[data-key^=host]')"),
        ("sort", "/?tab=hosts", "th a[href*='cpu_ratio']", "document.querySelector('th[aria-sort]:has(a[href*=cpu_ratio])')"),
        ("filter", "/?tab=hosts", ".chips .chip", "document.querySelector('.chip[aria-current]')"),
        ("guests tab", "/?tab=hosts", ".tab[href*='tab=guests']", "document.querySelector('.row[data-key^=guest]')"),
        ("guests sort", "/?tab=guests", "th a[href*='cpu_ratio']", "document.querySelector('th[aria-sort]:has(a[href*=cpu_ratio])')"),
        ("card of a host", "/?tab=hosts", ".row .row-link", "document.querySelector('#drawer')"))
    figures = {}
    for name, path, link, shown in asked:
        taken = []
        for _ in range(5):
            watched.page.goto(server.url + path)
            watched.page.wait_for_timeout(300)
            taken.append(watched.click(link, shown))
        figures[f"{name} (click)"] = "–" if None in taken else f"{statistics.median(taken):.2f} s"
    return figures


# --- main ---


def main() -> None:
    options = parse_options()
    folder = Path(tempfile.mkdtemp(prefix="proxmon-page-"))
    servers: list[Server] = []
    feeder, figures = None, []
    full, paused = multiprocessing.Event(), multiprocessing.Event()
    try:
        for number, program in enumerate(options.server):
            (folder / str(number)).mkdir()
            servers.append(Server(program, folder / str(number)))
        for server in servers:
            for number in range(options.hosts):
                server.register(fleet.host_name(number), number)
        targets = [(server.url, server.tokens) for server in servers]
        feeder = multiprocessing.Process(target=feed, args=(targets, options, full, paused), daemon=True)
        feeder.start()
        full.wait()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=os.path.realpath(shutil.which("chromium") or ""), args=FLAGS)
            figures = [measure(browser, server, options, paused) for server in servers]
            browser.close()
    finally:
        for process in [feeder] if feeder else []:
            process.terminate()
        for server in servers:
            server.stop()
        shutil.rmtree(folder)
    print_table(options, figures)


def print_table(options: argparse.Namespace, figures: list[dict[str, Any]]) -> None:
    print(f"\n{options.hosts} hosts × {options.guests} guests\n\n| | {' | '.join(map(str, options.server))} |")
    print("|---|" + "---|" * len(figures))
    for name in figures[0]:
        print(f"| {name} | {' | '.join(str(column.get(name)) for column in figures)} |")


if __name__ == "__main__":
    main()
