"""What has to be said at several places is said at all of them: sections, their fields, and where they are told.

    sections -> rules and their documentation
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from recorded import HOSTS

import agent
import server

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = json.loads((ROOT / "docs" / "report.schema.json").read_text())
SECTIONS = SCHEMA["properties"].keys() - agent.HEADER_KEYS


# sections


def test_collectors_schema_and_server_know_the_same_sections() -> None:
    assert set(agent.COLLECTORS) == SECTIONS
    assert set(server.SECTION_TYPES) == SECTIONS


@pytest.mark.parametrize("section", agent.COLLECTORS)
def test_schema_and_server_agree_on_the_kind_of_a_section(section: str) -> None:
    told = SCHEMA["properties"][section]
    assert told["type"] == {dict: "object", list: "array"}[server.SECTION_TYPES[section]]
    if told["type"] == "array":
        assert (told["items"]["type"] == "string") == (section in server.TEXT_LISTS)
        key, kind = server.KEY_FIELDS.get(section, (None, None))
        if key:
            assert key in told["items"]["required"] and kind in (int, str)
            assert told["items"]["properties"][key]["type"] == {int: "integer", str: "string"}[kind]


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
