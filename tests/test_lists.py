"""What has to be said at several places is said at all of them: sections, their fields, and where they are told.

    sections -> rules and their documentation
"""

from __future__ import annotations

import ast
import json
import re
import types
from pathlib import Path
from typing import Any

import pytest
from recorded import HOSTS, recordings
from test_report_schema import all_fields, make_reports, walk

import agent
import server

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = json.loads((ROOT / "docs" / "report.schema.json").read_text())
SECTIONS = SCHEMA["properties"].keys() - agent.HEADER_KEYS


# sections


def test_collectors_schema_and_server_know_the_same_sections() -> None:
    assert set(agent.COLLECTORS) == SECTIONS
    assert set(server.SECTIONS) == SECTIONS


@pytest.mark.parametrize("section", agent.COLLECTORS)
def test_schema_and_server_agree_on_the_kind_of_a_section(section: str) -> None:
    told, shape = SCHEMA["properties"][section], server.SECTIONS[section]
    assert told["type"] == {dict: "object", list: "array"}[shape.form]
    if shape.form is list:
        assert told["items"]["type"] == {dict: "object", str: "string"}[shape.items]
    if shape.key:
        assert shape.key in told["items"]["required"]
        assert told["items"]["properties"][shape.key]["type"] == {int: "integer", str: "string"}[shape.key_form]


@pytest.mark.parametrize("section", agent.COLLECTORS)
def test_some_recorded_host_has_the_section(section: str) -> None:
    """Else the schema, and every rule that reads it, would be held against nothing."""
    outcomes = [json.loads(path.read_text()) for path in HOSTS.glob(f"*/expect/{section}.json")]
    given = [outcome["section"] for outcome in outcomes if outcome.get("section")]
    assert given or section == "tasks"  # those that ended before the first start are no news


# rules and their documentation


def names_in_table(path: Path) -> list[str]:
    """The first cells of a Markdown table's rows, as far as they are code."""
    rows = re.findall(r"^\| ((?:`[a-z-]+`[^|]*)) \|", path.read_text(), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([a-z-]+)`", row)]


def test_every_rule_has_its_row_and_every_row_its_rule() -> None:
    told: Any = names_in_table(ROOT / "docs" / "alerts.md")
    rules = {rule if isinstance(rule, str) else rule.name for rule in server.RULES}
    assert rules <= set(told), rules - set(told)
    assert [name for name in told if told.count(name) > 1] == []


def table_rows() -> dict[str, tuple[str, ...]]:
    """Of each rule: what stands in its row, cell by cell."""
    rows = {}
    for line in (ROOT / "docs" / "alerts.md").read_text().splitlines():
        first, *cells = [cell.strip() for cell in line.strip("|").split(" |")]
        if re.match(r"\| `[a-z-]+`", line):
            rows.update((name, (first, *cells)) for name in re.findall(r"`([a-z-]+)`", first))
    return rows


def as_told(rule: server.Rule) -> dict[str, str]:
    """Where a rule's numbers are in the row, as they are written there."""
    def span(seconds: float | None) -> str:
        return "at once" if not seconds else "24 h" if seconds == 86400 else f"{seconds / 60:g} min"

    days = isinstance(rule.warn, (int, float)) and rule.warn > 86400
    levels = ["–" if level is None else f"{level / 86400:g} d" if days else f"{level:g}" for level in (rule.warn, rule.crit)]
    told = {"hold": span(rule.hold) + (f" / {span(rule.hold_crit)}" if rule.hold_crit != rule.hold else "")}
    if rule.warn is not None or rule.crit is not None:
        told["levels"] = " / ".join(levels)
        told["clears"] = "half" if rule.clear_part == 0.5 else "" if not rule.clear_by else f"{'+' if rule.low else '−'}{rule.clear_by:g}"
    return told


@pytest.mark.parametrize("rule", server.RULES, ids=lambda rule: rule.name)
def test_a_row_tells_what_the_rule_does(rule: server.Rule) -> None:
    """Signs, object, thresholds, hold."""
    name, kind, levels, clears, hold, why = table_rows()[rule.name]
    told = as_told(rule)
    assert ("✓" in name, "↻" in name) == (rule.accept is not None, rule.data_risk)
    assert kind == rule.of
    assert why
    assert hold == told["hold"]
    if "levels" in told and rule.name not in ("host-offline", "space-forecast"):  # 5 min; "the same for …"
        assert levels.startswith(told["levels"].removesuffix(" / –"))
        assert clears == told["clears"]


FIELDS = set(all_fields(SCHEMA, ""))


def words_of(code: Any, seen: set[Any]) -> set[str]:
    """The texts and names in a function and in what it uses of the server: names of sections and fields among them."""
    if isinstance(code, str):
        return set(code.split("."))
    if isinstance(code, (dict, tuple, list, set, frozenset)):
        return set().union(*(words_of(part, seen) for part in code))
    if not isinstance(code, (types.FunctionType, types.CodeType)) or code in seen:
        return set()
    seen.add(code)
    if isinstance(code, types.FunctionType):
        cells = [cell.cell_contents for cell in code.__closure__ or ()]
        return words_of(code.__code__, seen) | words_of(cells, seen)
    used = [getattr(server, name, None) for name in code.co_names]
    return {*code.co_names, *words_of(code.co_consts, seen), *words_of(used, seen)}


# what a rule is given is made of these sections by a function before it
MADE_BY = {"clusters": server.view_of, "guests": server.absorb_tasks, server.AGENT: server.watch_agent}


def read_fields(rule: server.Rule) -> set[str]:
    """The fields that a rule reads, as the schema's test writes them: `.section.field.below`."""
    words = words_of([rule.judge, MADE_BY.get(rule.each or rule.on[0])], set())
    sections = {*rule.each.split("."), *rule.on, *words}
    return {field for field in FIELDS if field.split(".")[1] in sections and set(field.split(".")[2:]) <= words}


@pytest.fixture(scope="module")
def sent() -> set[str]:
    """Every field that some recorded host sends."""
    seen: set[str] = set()
    for path in recordings():
        for report in make_reports(path):
            list(walk(report, SCHEMA, "", seen))
    return seen


@pytest.mark.parametrize("rule", server.RULES, ids=lambda rule: rule.name)
def test_what_a_rule_reads_is_sent_by_some_recorded_host(rule: server.Rule, sent: set[str]) -> None:
    """A rule that reads what nobody sends can never fire."""
    assert read_fields(rule) & sent or rule.name in OF_THE_SERVER


OF_THE_SERVERS_ROWS = {"margin_with_suspects"}  # a column, read from a row of our own


def test_every_field_that_is_read_by_its_name_is_one_that_agents_send() -> None:
    """A misspelt field is never there, and nothing complains."""
    called = {}
    for node in ast.walk(ast.parse(Path(server.__file__).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("number", "text"):
            for argument in node.args[1:2]:
                if isinstance(argument, ast.Constant):
                    called[argument.value] = node.lineno
    names = {part for field in FIELDS for part in field.split(".")} | OF_THE_SERVERS_ROWS
    assert {name: line for name, line in called.items() if name not in names} == {}


# rules about what no section tells: whether reports come, from whom, and the server itself
OF_THE_SERVER = {"host-offline", "site-offline", "host-twice", "server-certificate", "section-failing", "log-ins-fail"}


# What tells a state, and no rule reads: shown only, and why.
SHOWN_ONLY = {
    "says which one it is, and nothing of how it is": """
        guests.unused
        backups.guests.vmid backups.guests.newest_ok.storage backups.jobs.storage backups.jobs.mode ceph.checks.name
        certificates.file cluster.members.address datasets.origin disks.by_id disks.firmware disks.model disks.paths disks.vdev
        ha.master node.block_devices.name node.interfaces.name node.name node.temperatures.label node.temperatures.sensor
        pool_states.guid pools.guid pools.layout pools.name pools.vdevs.guid pools.vdevs.path replication.id
        snapshots.dataset snapshots.newest_name storages.content storages.storage tasks.user""",
    "a version or a size of what is there: drift of a fleet is told in the list of its own": """
        guests.cpu_count node.cpu_count node.kernel node.kernel_next node.pve_version versions.agent_python versions.pve
        versions.qemu versions.smartctl versions.zfs_module versions.zfs_userland versions.microcode
        pools.features_disabled""",
    "a measure that is high on a well host too; what it leads to has rules: cpu, io-pressure": """
        node.load1 node.load5 node.load15 disks.power_on_hours time_sync.stratum""",
    "why something is not known: it ends no alert, and stands in the row": """
        pools.vdevs.reason certificates.unknown_reason cluster.unknown_reason datasets.unknown_reason replication.unknown_reason
        snapshots.unknown_reason""",
    "the time of a value, which each rule's reading of it goes by": "disks.as_of guests.as_of storages.as_of",
    "the same in other words: what is read is the state behind it": """
        pools.status_text pools.action_text services.sub tasks.status ha.lrm.mode ha.lrm.state ha.manager
        updates.packages subscription.level datasets.encryption""",
    "a choice of the administrator, or a thing that may be so for years": """
        node.interfaces.up mail_queue.hold safeguards.no_subscription_source safeguards.notification_matchers
        safeguards.notification_targets safeguards.test_source""",
    "settings, held against what is advised in a list of their own": "pool_settings",
    "its change is an event": "versions.storage_cfg_digest guests.config_changed",
    "passes by itself": "mail_queue.incoming pools.expansion.state",
    "a sensor's own limits are seldom set right by its maker": "node.temperatures.celsius",
}
MEASURES = ("_bytes", "_seconds", "_ratio", "_celsius", "_at", "_total")


def test_every_field_that_tells_a_state_is_judged_or_shown_only_with_a_reason() -> None:
    """Words, flags and counts; what ends in a unit is a measure."""
    known = set(all_fields(SCHEMA, ""))
    read = {field for rule in server.RULES for field in read_fields(rule)}
    leaves = {field for field in known if not any(other.startswith(field + ".") for other in known)
              and not field.endswith(MEASURES) and field.split(".")[1] in SECTIONS}
    shown = {f".{field}" for fields in SHOWN_ONLY.values() for field in fields.split()}
    shown |= {field for field in leaves for whole in shown if field.startswith(whole + ".")}
    assert leaves - read - shown == set(), "sent, and judged by nobody"
    assert shown - known == set(), "said to be shown only, and not there"
