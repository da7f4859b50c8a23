"""What has to be said at several places is said at all of them: sections, their fields, and where they are told.

    sections -> rules and their documentation
"""

from __future__ import annotations

import json
import re
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


def read_fields(rule: server.Rule) -> set[str]:
    """The fields that a rule says it reads, as the schema's test writes them: `.section.field.below`."""
    return {f".{field}" for field in rule.reads.split()}


@pytest.fixture(scope="module")
def sent() -> set[str]:
    """Every field that some recorded host sends."""
    seen: set[str] = set()
    for path in recordings():
        for report in make_reports(path):
            list(walk(report, SCHEMA, "", seen))
    return seen


@pytest.mark.parametrize("rule", server.RULES, ids=lambda rule: rule.name)
def test_what_a_rule_reads_is_documented_and_sent_by_some_recorded_host(rule: server.Rule, sent: set[str]) -> None:
    assert rule.reads or rule.name in OF_THE_SERVER, "it says of no field that it reads it"
    assert read_fields(rule) - set(all_fields(SCHEMA, "")) == set()
    assert read_fields(rule) - sent == set()


# rules about what no section tells: whether reports come, from whom, and the server itself
OF_THE_SERVER = {"host-offline", "log-ins-fail", "site-offline", "host-twice", "server-certificate", "section-failing"}
