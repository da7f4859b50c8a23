"""A server whose clock the test turns: reports go through the writer's own functions, time passes in no time."""

from __future__ import annotations

from typing import Any

import server

START = 1_790_000_000.0  # a Monday morning in 2026


class Simulation:
    """One monitor on a real database; `now` is whatever the test says."""

    def __init__(self, folder: Any, settings: str = "", **env: str):
        self.now = START
        self.settings_path = folder / "server.toml"
        self.settings_path.write_text(settings)
        self.config = server.Config({"DATABASE_PATH": str(folder / "monitor.db"),
                                     "SERVER_CONFIG": str(self.settings_path),
                                     "SECRET_KEY_BASE": "s" * 40, "PUBLIC_URL": "https://monitor.example", **env})
        server.open_database(self.config, create=True).close()
        self.seq: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        self.monitor = server.Monitor(self.config, clock=lambda: self.now)

    packed: bytes | None = None  # what is kept of a report; b'' to keep nothing, for long simulations

    def restart(self) -> None:
        """As after a crash or an upgrade: only the database is left."""
        self.monitor.close()
        self.start()

    @property
    def fleet(self) -> server.Fleet:
        return self.monitor.fleet

    def host(self, name: str, site: str | None = None, tags: list[str] | None = None) -> int:
        host_id = self.write(lambda db: server.insert_host(db, name, self.now, site=site, tags=tags))["id"]
        self.fleet.refresh(self.monitor.store.reader())
        return host_id

    def write(self, work: Any) -> Any:
        return self.monitor.store.write(work)

    def envelope(self, name: str, at: float | None = None, run: str = "run", **fields: Any) -> dict[str, Any]:
        self.seq[name + run] = self.seq.get(name + run, 0) + 1
        return {"version": 1, "host_id": name, "tick": "fast", "time": self.now if at is None else at, "run_id": run,
                "seq": self.seq[name + run], **fields}

    def send(self, name: str, *, at: float | None = None, run: str = "run", **fields: Any) -> None:
        """One report, as if it had come through the door."""
        self.post(name, self.envelope(name, at, run, **fields))

    def post(self, name: str, *reports: dict[str, Any]) -> None:
        self.write(lambda db: self.insert(db, name, list(reports)))

    def insert(self, db: Any, name: str, reports: list[dict[str, Any]]) -> int:
        self.fleet.refresh(db)
        return server.insert_reports(self.monitor, self.fleet.find(name).id, reports, self.packed, self.now, db)

    def turn(self) -> None:
        """The job that judges what no report brings."""
        self.write(lambda db: server.judge_fleet(self.monitor, self.now, db))

    def wait(self, seconds: float, *, step: float = 5) -> None:
        """Let time pass, with the job running."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            self.turn()

    def alerts(self, rule: str | None = None, state: str = "firing") -> list[dict[str, Any]]:
        rows = server.list_alerts(self.monitor.store.reader(), state)
        return [row for row in rows if rule in (None, row["rule"])]

    def told(self) -> list[dict[str, Any]]:
        """Every notification that was queued."""
        import json
        rows = self.monitor.store.reader().execute("SELECT channel, body FROM notification ORDER BY id")
        return [{"channel": row["channel"], **json.loads(row["body"])} for row in rows]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in server.list_events(self.monitor.store.reader(), since=0, limit=10_000)
                if row["kind"] == kind]

    def close(self) -> None:
        self.monitor.close()
