"""The rows of the lists are kept as long as what they are made of: kept ones are what making them anew gives."""

from __future__ import annotations

import random
from typing import Any

import pytest
from conftest import build_disk, build_guest, build_pool, build_storage
from simulation import START, Simulation

import server

LISTS = [resource for resource in server.RESOURCES.values() if resource.of_host]


@pytest.fixture
def sim(tmp_path):
    simulation = Simulation(tmp_path)
    for name in ("a", "b", "c"):
        simulation.host(name, site="s")
    yield simulation
    simulation.close()


def compare(sim: Simulation, after: str) -> None:
    """Twice: the second time all may be kept."""
    for resource in LISTS * 2:
        for state in sim.fleet.hosts.values():
            fresh = list(resource.of_host(sim.fleet, state, sim.now))
            for kept, row in zip(server.host_rows(resource, sim.fleet, state, sim.now), fresh, strict=True):
                told = {column: (kept.get(column), value) for column, value in row.items() if kept.get(column) != value}
                assert not told, (resource.name, state.name, after)


# --- what may happen to a host, each drawn with `dice` ---


def draw_sections(dice: random.Random, now: float, name: str) -> dict[str, Any]:
    """Each section a report may bring that a list is made of, with another content each time."""
    vmids, vdevs = dice.sample(range(100, 104), 3), build_pool()["vdevs"]
    vdevs[0]["children"] = [build_disk(disk, disk=disk, state=dice.choice(["ONLINE", "ONLINE", "UNAVAIL"]),
                                       read_errors=dice.choice([0, 0, 7])) for disk in ("sda", "sdb")]  # fmt: skip
    full, state = dice.choice([0.4, 0.83, 0.97]), dice.choice(["ONLINE", "ONLINE", "DEGRADED"])
    return {
        "node": {"name": name, "pve_version": dice.choice(["8.4", "9.0"]), "cpu_ratio": dice.random(),
                 "kernel": dice.choice(["6.8", "6.14"]), "root_used_bytes": dice.randrange(99), "root_available_bytes": 5},
        "cluster": {"name": dice.choice(["east", "west"]), "quorate": dice.random() < 0.7, "votes_expected": 3,
                    "members": [{"name": member, "address": f"10.0.0.{dice.randrange(9)}"} for member in "abc"]},
        "updates": {"pending": dice.randrange(9), "security": dice.randrange(2)},
        "guests": [build_guest(vmid, status=dice.choice(["running", "stopped", "unknown"]), cpu_ratio=dice.random(),
                               tags=dice.choice([None, "web", "no-backup"]), volumes=[{"dataset": f"tank/{vmid}"}])
                   for vmid in vmids],
        "snapshots": [{"dataset": f"tank/{vmid}", "class": "pve", "count": 1, "oldest_at": now - dice.randrange(99999)}
                      for vmid in vmids],
        "storages": [build_storage("store", active=dice.choice([True, True, False, None]), used_bytes=dice.randrange(999))],
        "pools": [build_pool(capacity_ratio=full, state=state, vdevs=vdevs)],
        "pool_states": [{"name": "tank", "state": dice.choice(["ONLINE", "ONLINE", "SUSPENDED"])}],
        "disks": [{"name": disk, "serial": disk * 2, "passed": dice.choice([True, True, False, None]),
                   "power_on_hours": dice.randrange(9)} for disk in ("sda", "sdb")],
        "backups": {"jobs": [{"id": "nightly", "enabled": dice.random() < 0.7, "guests": dice.choice(["all", [100]]),
                              "schedule": "21:00", "due_times": [now - dice.randrange(99999)], "next_run_at": now + 9999}],
                    "guests": [{"vmid": vmid, "newest_ok": {"ended_at": now - dice.randrange(300000), "storage": "x"}}
                               for vmid in vmids[:2]]},
    }  # fmt: skip


def report(dice: random.Random, sim: Simulation, state: server.HostState) -> None:
    made = draw_sections(dice, sim.now, state.name)
    names = dice.sample(list(made), dice.randrange(1, 4))
    absent = dice.sample(list(made), dice.choice([0, 0, 0, 1]))
    sim.send(
        state.name,
        at=sim.now + dice.choice([0, 0, 0, 5]),
        agent={"version": dice.choice("12")},
        absent=absent,
        **{name: made[name] for name in names if name not in absent},
    )


def settings(dice: random.Random, sim: Simulation, state: server.HostState) -> None:
    changes = dice.choice(
        [
            {"maintenance_until": sim.now + 100},
            {"maintenance_until": None},
            {"note": str(sim.now)},
            {"tags": [str(sim.now)]},
            {"site": dice.choice("st")},
            {"name": f"{state.name[0]}{int(sim.now)}"},
        ]
    )
    sim.write(lambda db: server.update_host(db, state.name, changes, sim.now))  # fmt: skip


def register_anew(dice: random.Random, sim: Simulation, state: server.HostState) -> None:
    sim.write(lambda db: server.delete_host(db, state.name, sim.now))
    sim.write(lambda db: server.insert_host(db, state.name, sim.now, site="s"))


def acknowledge(dice: random.Random, sim: Simulation, state: server.HostState) -> None:
    alerts = [alert for owner in sim.fleet.everything() for alert in owner.alerts.values() if alert.state == "firing"]
    if alerts:
        alert = dice.choice(alerts)
        act = server.unacknowledge if alert.acknowledged_at else server.acknowledge
        more = {} if alert.acknowledged_at else {"until": sim.now + 50, "note": None}
        sim.write(lambda db: act(db, sim.fleet, alert.id, sim.now, by="x", **more))


def thresholds(dice: random.Random, sim: Simulation, state: server.HostState) -> None:
    sim.fleet.layers = server.Layers(
        {
            "rules": {
                "host-offline": {"crit": dice.choice([200, 700])},
                "pool-capacity": {"warn": dice.choice([0.2, 0.9])},
                "cluster-quorum": {"hold_seconds": dice.choice([0, 60])},
                "root-full": {"hold_seconds": dice.choice([60, 900])},
            }
        }
    )


def forecasts(dice: random.Random, sim: Simulation, state: server.HostState) -> None:
    days = dice.choice([None, 3.0, 40.0])
    space = server.Space("pools/tank", 100.0, 10.0, "pools/tank.x", None)
    state.forecasts = {"pools/tank": server.Filling(space, server.Forecast(days, days, 5.0, 9.0), sim.now)}


def judging(dice: random.Random, sim: Simulation, state: server.HostState) -> None:
    sim.turn()


def outage(dice: random.Random, sim: Simulation, state: server.HostState) -> None:
    sim.fleet.serving_since = sim.now


CHANGES = [report] * 8 + [settings, acknowledge, thresholds, forecasts, judging, outage] * 2 + [register_anew]


@pytest.mark.parametrize("seed", range(3))
def test_kept_rows_are_what_making_them_anew_gives_whatever_happens(sim, seed):
    dice = random.Random(seed)
    for _ in range(130):
        sim.now += dice.choice([0, 0, 0.5, 5, 30, 61, 130, 1000, 8000, -40])
        change = dice.choice(CHANGES)
        change(dice, sim, dice.choice(list(sim.fleet.hosts.values())))
        sim.fleet.refresh(sim.monitor.store.reader())
        compare(sim, change.__name__)


def test_rows_of_a_host_of_which_nothing_is_new_are_not_made_again(sim):
    """And of a host that tells of its guests, those alone in which guests are."""
    made: list[str] = []
    watched = [resource._replace(of_host=lambda fleet, state, now, resource=resource: (
        made.append(resource.name), resource.of_host(fleet, state, now))[1]) for resource in LISTS]  # fmt: skip

    def ask() -> list[str]:
        made.clear()
        for resource in watched:
            server.host_rows(resource, sim.fleet, sim.fleet.find("a"), sim.now)
        return made

    told = draw_sections(random.Random(1), START, "a")
    sim.send("a", **told)
    assert len(ask()) == len(LISTS)
    sim.now += 1
    assert ask() == []
    sim.send("a", guests=told["guests"])
    assert set(ask()) == {"hosts", "guests", "volumes"}
    sim.now += server.STALE_SECONDS
    assert {"hosts", "guests", "storages"} <= set(ask()) and "disks" not in made


def well(name: str, now: float) -> dict[str, Any]:
    """A host of which nothing is to be said but that no job holds its guests: that is said with the age of a backup."""
    return {**draw_sections(random.Random(1), now, name), "guests": [build_guest(100), build_guest(101)],
            "storages": [build_storage("store")], "pools": [build_pool()], "pool_states": [{"name": "tank", "state": "ONLINE"}],
            "disks": [{"name": "sda", "passed": True}], "cluster": {"name": "east"},
            "backups": {"jobs": [], "guests": [{"vmid": 100, "newest_ok": {"ended_at": now - 3000.5, "storage": "x"}}]}}  # fmt: skip


@pytest.mark.parametrize("offline_after", [90, 350])
def test_kept_rows_change_with_the_time_alone(sim, offline_after):
    sim.fleet.layers = server.Layers({"rules": {"host-offline": {"crit": offline_after}}})
    sim.send("a", **well("a", sim.now))
    sim.fleet.find("a").alerts = {}
    sim.fleet.serving_since = START + 33  # silence counts from here
    dice = random.Random(1)
    while sim.now < START + 7500:
        compare(sim, f"{sim.now - START} s")
        sim.now += dice.choice([1, 20, 59, 60, 61]) if sim.now > START + 800 else dice.choice([1, 7.5])


SUSPECT = [server.VdevMargin("tank", "mirror-0", 1, (({"name": "sda"}, None, ["old"]),))]
CLUSTER = server.Alert(
    "cluster-quorum", "clusters/east", "critical", "No quorum.", None, START, "firing", fired_at=START
)
OWN = {"agent": {"version": "9"}, "clock_ahead": 7.0, "guest_counts": (7, 8, 9), "no_backup": frozenset(["100", "101"]),
       "margins": {"tank": SUSPECT}, "note": "n", "site": "t", "tags": ["x"], "last_seen_at": START - 9,
       "maintenance_until": START + 9, "alerts": {("x", ""): CLUSTER}}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_kept_rows_change_with_each_thing_known_of_a_host(sim, name):
    sim.send("a", **well("a", sim.now))
    state = sim.fleet.find("a")
    state.alerts = {}
    compare(sim, "a report")
    setattr(state, name, OWN[name])
    compare(sim, name)


def test_kept_rows_change_with_what_a_host_shares(sim):
    compare(sim, "nothing")
    state = sim.fleet.find("a")
    sim.send("a", **well("a", sim.now))
    state.alerts = {}
    compare(sim, "a report")
    sim.fleet.concerned = {state.id: [CLUSTER]}
    compare(sim, "a cluster's alert")
