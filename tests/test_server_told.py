"""Who is told of what, and when: the table in docs/alerts.md played, and random sequences held against what is promised.

PROXMON_SEQUENCES=50000 pytest tests/test_server_told.py -k random   plays that many sequences instead of 2,000."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import time
from collections import Counter
from pathlib import Path

import pytest
from simulation import Simulation

import server

MINUTE, HOUR, DAY = 60, 3600, 86400
DOC = Path(server.__file__).parent / "docs" / "alerts.md"
NIGHT = 'quiet = { from = "22:00", to = "07:00", severities = ["warning"] }'


def channel(name, extra=""):
    return f'[[channels]]\nname = "{name}"\nkind = "slack"\nurl = "http://127.0.0.1:9/"\n{extra}\n'


# --- the table of docs/alerts.md ---

SETTINGS = (
    "[rules.pool-capacity]\nhold_seconds = 0\n"
    + channel("everything")
    + channel("critical", 'severities = ["critical"]')
    + channel("rules", 'rules = ["pool-capacity", "vdev-errors"]')
    + channel("night", NIGHT)
    + channel("elsewhere", 'sites = ["rom"]')
)
CHANNELS = ("everything", "critical", "rules", "night", "elsewhere")


def table() -> list[tuple[str, dict[str, str]]]:
    """The rows of the table: what happens, and what each channel hears of it."""
    part = DOC.read_text().partition("| what happens |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()[2:]]
    return [(cells[0], dict(zip(CHANNELS, cells[1:], strict=True))) for cells in rows]


class Stage:
    """The words of the table's first column, as a host and an administrator do them; ten minutes lie between them."""

    def __init__(self, folder):
        self.sim = Simulation(folder, SETTINGS)
        self.sim.host("pve1", site="par", tags=["prod"])
        self.sim.now += 12 * HOUR - (self.sim.now + time.localtime(self.sim.now).tm_gmtoff) % DAY
        self.used, self.errors, self.state = 0.5, 0, "ONLINE"
        self.report()

    def report(self):
        vdevs = [{"name": "sda", "read_errors": self.errors}]
        self.sim.send("pve1", pools=[{"name": "tank", "capacity_ratio": self.used, "vdevs": vdevs}],
                      pool_states=[{"name": "tank", "guid": "1", "state": self.state}])

    def wait(self, seconds):
        end = self.sim.now + seconds
        while self.sim.now < end:
            self.sim.now = min(end, self.sim.now + 2 * MINUTE)
            self.report()
            self.sim.turn()

    def play(self, words):
        for word in words.split(" → "):
            name, _, argument = word.partition(" ")
            getattr(self, "do_" + name)(*argument.split())
            self.wait(10 * MINUTE)

    def do_fine(self):
        self.used = 0.5

    def do_warning(self):
        self.used = 0.84

    def do_critical(self):
        self.used = 0.95

    def do_broken(self):
        self.state = "SUSPENDED"

    def do_mended(self, *also):
        self.state = "ONLINE"
        self.errors = 0 if also else self.errors

    def do_errors(self):
        self.errors = 3

    def do_cleared(self):
        self.errors = 0

    def do_hours(self):
        self.wait(2 * HOUR)

    def until(self, hour):
        local = (self.sim.now + time.localtime(self.sim.now).tm_gmtoff) % DAY
        self.wait((hour * HOUR - local) % DAY)

    def do_evening(self):
        self.until(22)

    def do_morning(self):
        self.until(7)

    def do_silence(self, rule):
        fields = {**dict.fromkeys(server.SILENCE_MATCHERS), "rule": rule, "until": self.sim.now + 30 * DAY, "note": None}
        self.sim.write(lambda db: server.insert_silence(db, self.sim.fleet, fields, self.sim.now, by="a"))

    def do_unsilence(self):
        for silence in list(self.sim.fleet.silences):
            self.sim.write(lambda db, number=silence["id"]: server.delete_silence(db, self.sim.fleet, str(number),
                                                                                  self.sim.now, by="a"))

    def do_maintenance(self):
        until = self.sim.now + HOUR
        self.sim.write(lambda db: server.update_host(db, "pve1", {"maintenance_until": until}, self.sim.now))

    def do_acknowledge(self):
        for alert in self.sim.alerts():
            self.sim.write(lambda db, number=alert["id"]: server.acknowledge(
                db, self.sim.fleet, number, self.sim.now, by="a", until=None, note=None))

    def do_restart(self):
        self.sim.restart()

    def heard(self, channel):
        """What a channel was told, in the words of the table."""
        words = []
        for item in self.sim.told():
            if item["channel"] == channel:
                word = {"firing": "{}", "worse": "now {}", "resolved": "over", "reminder": "still {}"}[item["kind"]]
                cause = "cause " if item["rule"] == "pool-state" else ""
                words.append(cause + word.format(item["severity"]))
        return ", ".join(words) or "–"


@pytest.mark.parametrize(("happens", "heard"), table(), ids=[row[0] for row in table()])
def test_the_table_of_who_hears_what(tmp_path, happens, heard):
    stage = Stage(tmp_path)
    try:
        stage.play(happens)
        assert {name: stage.heard(name) for name in CHANNELS} == heard
    finally:
        stage.sim.close()


def test_the_table_is_there():
    assert len(table()) >= 20


# --- a whole site goes dark, for channels that ask for one part of it each ---

SITE = {
    "everything": ("", "rules"), "sites": ('sites = ["Par"]', "rules"), "tags": ('tags = ["prod"]', "rules"),
    "hosts": ('hosts = ["h3"]', "rules"), "warnings": ('severities = ["warning"]', None),
    "rules": ('rules = ["host-offline"]', "hosts"), "one": ('rules = ["host-offline"]\nhosts = ["h3"]', "host"),
    "rom": ('sites = ["rom"]', None),
}


def test_a_site_that_goes_dark_and_comes_back(tmp_path):
    sim = Simulation(tmp_path, "".join(channel(name, extra) for name, (extra, _) in SITE.items()))
    hosts = [f"h{number}" for number in range(6)]
    for name in hosts:
        sim.host(name, site="par", tags=["prod"])
    sim.host("other", site="rom", tags=["test"])

    def speak(minutes, *names):
        for _ in range(2 * minutes):
            for name in names:
                sim.send(name, node={"name": name})
                sim.now += 0.5
            sim.wait(30)

    speak(3, *hosts, "other")
    speak(15, "other")
    speak(10, *hosts, "other")
    sim.close()
    expected = {None: [], "rules": [("site-offline", None, "firing"), ("site-offline", None, "resolved")],
                "hosts": [("host-offline", name, kind) for kind in ("firing", "resolved") for name in hosts],
                "host": [("host-offline", "h3", "firing"), ("host-offline", "h3", "resolved")]}
    sim.start()
    told = sim.told()
    for name, (_, what) in SITE.items():
        got = [(item["rule"], item["host"], item["kind"]) for item in told if item["channel"] == name]
        assert sorted(got, key=str) == sorted(expected[what], key=str), name
    assert {item["site"] for item in told} == {"par"}
    sim.close()


# --- random sequences ---

RANDOM_CHANNELS = [
    "", 'severities = ["critical"]', 'severities = ["info", "warning", "critical"]', 'sites = ["par"]', 'sites = ["rom"]',
    'tags = ["prod"]', 'hosts = ["h1"]', 'rules = ["vdev-errors", "host-offline"]', 'rules = ["replication"]', NIGHT,
    "recoveries = false", 'quiet = { from = "22:00", to = "07:00", severities = ["warning", "critical"] }',
    'rules = ["site-offline", "pool-state"]\nseverities = ["critical"]', "reminders = false",
]
OBJECTS = [(host, rule, object) for host in ("h1", "h2", "h3") for rule, object in (
    ("host-offline", ""), ("pool-state", "pools/tank"), ("vdev-errors", "pools/tank/sda"), ("replication", "replication/1"))]
OBJECTS.append((None, "site-offline", "sites/par"))
CAUSE_OF = {"vdev-errors": "pool-state", "replication": "host-offline", "host-offline": "site-offline"}


@pytest.fixture(scope="module")
def database():
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.row_factory = sqlite3.Row
    server.migrate(db, server.load_migrations())
    for name, site in (("h1", "par"), ("h2", "par"), ("h3", "rom")):
        server.insert_host(db, name, 1.0, site=site, tags=["prod"] if name != "h2" else [])
    yield db
    db.close()


class Play:
    """One random sequence over a real database, and beside it what each channel believes. A promise that is broken is
    an AssertionError."""

    def __init__(self, db, seed):
        self.db, self.random = db, random.Random(seed)
        self.now = 1_790_000_000.0 + self.random.randrange(DAY)
        chosen = self.random.sample(RANDOM_CHANNELS, self.random.randint(1, 5))
        settings = server.parse_settings("".join(channel(f"c{n}", extra) for n, extra in enumerate(chosen)))
        self.fleet = server.Fleet()
        self.fleet.channels, self.fleet.layers = settings.channels, settings.layers
        self.fleet.load(db)
        for name in ("h1", "h2", "h3"):  # their replication goes to the next
            job = [{"id": "1", "target": {"h1": "h2", "h2": "h3", "h3": "h1"}[name]}]
            self.fleet.names[name].sections["replication"] = server.Section(job)
        self.concerns = frozenset(self.fleet.names[name].id for name in ("h1", "h2"))
        self.begun = {one.name: {} for one in self.fleet.channels}  # identity -> since when it is believed to be there
        self.wanting, self.owed = {}, {}  # (channel, identity) -> since when it should have been told
        self.counts = Counter()

    # What can happen

    def owner(self, host):
        return self.fleet.shared if host is None else self.fleet.names[host]

    def alert(self, identity):
        return self.owner(identity[0]).alerts.get(identity[1:])

    def put(self, identity, old, new):
        owner = self.owner(identity[0])
        owner.alerts = {key: one for key, one in owner.alerts.items() if key != identity[1:]}
        server.write_alert(self.db, owner, old, new, self.now)
        if new.state == "firing":
            owner.alerts[identity[1:]] = new
        self.fleet.shared.concerns = {"sites/par": set(self.concerns)}
        self.fleet.concerned = server.concerned_hosts(self.fleet.shared)

    def fire(self, identity):
        severity = self.random.choice(server.SEVERITIES)
        new = server.Alert(object=identity[2], severity=severity, message="It is so.", value=None, since=self.now,
                           rule=identity[1], state="firing", fired_at=self.now)
        self.put(identity, None, new)

    def change(self, identity, alert):
        self.put(identity, alert, alert.changed(severity=self.random.choice(server.SEVERITIES)))

    def end(self, identity, alert):
        self.put(identity, alert, alert.changed(state="resolved", resolved_at=self.now))

    def acknowledge(self, identity, alert):
        until = self.now + self.random.choice((MINUTE, HOUR)) if self.random.random() < .7 else None
        self.put(identity, alert, alert.changed(acknowledged_at=self.now, acknowledged_until=until))

    def unacknowledge(self, identity, alert):
        self.put(identity, alert, alert.changed(**server.NOT_ACKNOWLEDGED))

    def silence(self):
        match = self.random.choice([{"rule": "pool-state"}, {"host": "h1"}, {"site": "par"}, {"tag": "prod"},
                                    {"object": "pools/tank"}, {"rule": "site-offline"}])
        until = self.now + self.random.choice((2 * MINUTE, HOUR, 9 * HOUR))
        self.fleet.silences = [*self.fleet.silences, {**dict.fromkeys(server.SILENCE_MATCHERS), **match, "until": until}]

    def maintain(self):
        host = self.random.choice(("h1", "h2", "h3"))
        self.fleet.names[host].maintenance_until = self.now + self.random.choice((MINUTE, HOUR))

    def happen(self):
        identity, chance = self.random.choice(OBJECTS), self.random.random()
        alert = self.alert(identity)
        if chance < 0.06:
            self.silence()
        elif chance < 0.09:
            self.fleet.silences = []
        elif chance < 0.12:
            self.maintain()
        elif alert is None:
            self.fire(identity)
        else:
            acts = [self.change, self.end, self.end, self.unacknowledge if alert.acknowledged_at else self.acknowledge]
            self.random.choice(acts)(identity, alert)

    # What is told of it, and what was promised

    def pass_time(self, seconds):
        self.now += seconds
        before = {identity: alert.told for identity in OBJECTS if (alert := self.alert(identity))}
        server.dispatch(self.db, self.fleet, self.fleet.everything(), self.now)
        for identity, told in before.items():
            for one in self.fleet.channels:
                said = self.alert(identity).told.get(one.name)  # an older one is what it was told of the alert before
                if said and said[1] == self.now and one.name not in told:
                    assert not self.was_told_of_cause(one, identity), f"{one.name} is told of {identity}, which follows"
        for one in self.fleet.channels:
            made = server.make_message(self.db, one, self.now)
            if made is not None:
                self.take(one, json.loads(self.db.execute("SELECT body FROM message WHERE id = ?", [made]).fetchone()[0]))
                self.db.execute("UPDATE message SET sent_at = ?, attempts = 1 WHERE id = ?", [self.now, made])
        self.hold_against_the_promises()

    def take(self, one, body):
        assert not body["left_out"]
        for item in sorted(body["items"], key=lambda item: item["kind"] != "resolved"):
            identity, begun = (item["host"], item["rule"], item["object"] or ""), self.begun[one.name]
            self.counts[item["kind"]] += 1
            if item["kind"] == "resolved":
                assert one.recoveries and identity in begun, f"{one.name}: the end of what it was not told: {item}"
                del begun[identity]
                continue
            alert = self.alert(identity)
            assert alert is not None and alert.id == item["alert_id"], f"{one.name} is told of what is over: {item}"
            assert alert.severity == item["severity"] and item["severity"] in one.severities
            assert item["kind"] != "firing" or identity not in begun or not one.recoveries, f"told twice: {item}"
            begun[identity] = self.now

    def hosts_of(self, identity):
        return [self.owner(identity[0])] if identity[0] else [self.fleet.names["h1"], self.fleet.names["h2"]]

    def is_wanted(self, one, identity, alert):
        hosts = self.hosts_of(identity)
        have = {"sites": {host.site for host in hosts}, "hosts": {host.name for host in hosts}, "rules": {identity[1]},
                "tags": {tag for host in hosts for tag in host.tags}}
        return alert.severity in one.severities and all(have[key] & only for key, only in one.only.items())

    def is_hushed(self, identity):
        hosts = self.hosts_of(identity)
        if all((host.maintenance_until or 0) > self.now for host in hosts):
            return True
        for one in self.fleet.silences:
            fits = [not one["rule"] or one["rule"] == identity[1], not one["host"] or [h.name for h in hosts] == [one["host"]],
                    not one["site"] or {h.site for h in hosts} == {one["site"]},
                    not one["tag"] or all(one["tag"] in h.tags for h in hosts),
                    not one["object"] or (identity[2] + "/").startswith(one["object"] + "/")]
            if one["until"] > self.now and all(fits):
                return True
        return False

    def cause(self, identity):
        host, rule, _ = identity
        if rule == "replication":
            host = {"h1": "h2", "h2": "h3", "h3": "h1"}[host]
        found = next((one for one in OBJECTS if one[1] == CAUSE_OF.get(rule) and one[0] in (host, None)), None)
        if found and found[0] is None and host == "h3":
            found = None  # it is not of this site
        cause, alert = found and self.alert(found), self.alert(identity)
        return found if cause and not server.is_milder(cause.severity, alert.severity) else None  # it excuses nothing worse

    def was_told_of_cause(self, one, identity):
        """Whether a channel was told of what this follows from; a cause that is told in this very moment counts too."""
        while (identity := self.cause(identity)) is not None:
            if one.name in self.alert(identity).told:
                return True
        return False

    def hold_against_the_promises(self):
        for one in self.fleet.channels:
            for identity in OBJECTS:
                alert, key, believed = self.alert(identity), (one.name, identity), identity in self.begun[one.name]
                waits = (alert is not None and not believed and alert.acknowledged_at is None
                         and self.is_wanted(one, identity, alert) and not self.is_hushed(identity)
                         and not one.is_quiet(alert.severity, self.now) and not self.was_told_of_cause(one, identity))
                self.note(self.wanting, key, waits, "is not told of what fires")
                owes = (alert is None and believed and one.recoveries and not self.is_hushed(identity)
                        and not any(one.is_quiet(severity, self.now) for severity in server.SEVERITIES))
                self.note(self.owed, key, owes, "is not told of the end")

    def note(self, since, key, waits, complaint):
        if not waits:
            since.pop(key, None)
        elif self.now - since.setdefault(key, self.now) > 2 * MINUTE:  # a cause's minute, a group's 30 s, two rounds
            raise AssertionError(f"{key} {complaint}")

    def finish(self):
        """In the end all is well, and everybody knows."""
        self.fleet.silences = []
        for identity in OBJECTS:
            if (alert := self.alert(identity)) is not None:
                self.end(identity, alert)
        self.pass_time(18 * HOUR - (self.now + time.localtime(self.now).tm_gmtoff) % DAY + DAY)
        for _ in range(3):
            self.pass_time(MINUTE)
        believed = {one.name: begun for one in self.fleet.channels if (begun := self.begun[one.name]) and one.recoveries}
        assert not believed and not any(owner.over for owner in self.fleet.everything())


def play(db, seed):
    db.execute("BEGIN")
    try:
        sequence = Play(db, seed)
        for _ in range(sequence.random.randint(4, 14)):
            sequence.happen()
            for _ in range(sequence.random.choice((1, 1, 2, 5))):
                sequence.pass_time(sequence.random.choice((5, 5, 31, 31, 70, 700, 2 * HOUR)))
            if sequence.random.random() < 0.1:  # after a restart there is only what the database has
                silences, sections = sequence.fleet.silences, {s.name: s.sections for s in sequence.fleet.hosts.values()}
                until = {state.name: state.maintenance_until for state in sequence.fleet.hosts.values()}
                sequence.fleet.load(db)
                sequence.fleet.silences = silences
                for state in sequence.fleet.hosts.values():
                    state.sections, state.maintenance_until = sections[state.name], until[state.name]
                sequence.fleet.shared.concerns = {"sites/par": set(sequence.concerns)}
                sequence.fleet.concerned = server.concerned_hosts(sequence.fleet.shared)
        sequence.finish()
        return sequence.counts
    except AssertionError as broken:
        raise AssertionError(f"sequence {seed}: {broken}") from broken
    finally:
        db.execute("ROLLBACK")


SEQUENCES = int(os.environ.get("PROXMON_SEQUENCES") or 2000)


@pytest.mark.timeout(120 + SEQUENCES / 10)
def test_random_sequences_keep_the_promises(database):
    count = SEQUENCES
    began, counts = time.monotonic(), Counter()
    for seed in range(count):
        counts += play(database, seed)
    print(f"{count} sequences in {time.monotonic() - began:.1f} s, told: {dict(counts)}")
    assert all(counts[kind] > count / 50 for kind in ("firing", "worse", "resolved")), counts


@pytest.mark.parametrize(("severity", "told", "news"), [
    ("warning", None, "firing"), ("critical", ("warning", 5), "worse"), ("warning", ("", 5), "worse"), ("info", ("", 9 * HOUR), "worse"),
    ("warning", ("critical", HOUR), None), ("warning", ("critical", HOUR + 1), "less"), ("info", ("warning", 2 * HOUR), "less"),
    ("warning", ("warning", 2 * HOUR), None), ("warning", ("warning", DAY - 1), None),
    ("warning", ("warning", DAY), "reminder")])
def test_what_is_news_to_somebody_who_was_told(severity, told, news):
    now = 1_800_000_000.0
    told = told and (told[0], now - told[1])  # as how severe, and how long ago
    for rule, reminds in (("pool-state", True), ("pool-capacity", False), ("of a later version", False)):
        alert = server.Alert(rule, "pools/tank", severity, "", None, now - 99 * HOUR, "firing")
        assert server.news_of(alert, told, now) == (None if news == "reminder" and not reminds else news)


@pytest.mark.parametrize(("made", "later", "may"), [
    (19, 0, True), (20, 0, False), (20, 179, False), (20, 180, True), (20, HOUR, True), (99, 179, False), (99, 180, True)])
def test_a_channel_makes_20_messages_at_once_and_then_one_each_3_minutes(made, later, may):
    now = 1_800_000_000.0
    assert server.has_token([now] * made, now + later) is may
