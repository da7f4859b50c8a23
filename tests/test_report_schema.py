"""docs/report.schema.json: every recorded host's report is valid, nothing in it is undocumented, and it can refuse.

    reports -> fields -> refusals -> the server's own check
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from recorded import HOSTS, RecordedProbe, recordings

import agent
import server

SCHEMA = json.loads((Path(__file__).resolve().parent.parent / "docs" / "report.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def make_reports(path: Path) -> Iterator[dict[str, Any]]:
    """The reports of three moments, as the agent builds and encodes them."""
    memories: dict[str, dict[str, Any]] = {}
    reporter = agent.Reporter("host-1", RecordedProbe(path).now())
    for tick in (0, 1, 2):
        probe = RecordedProbe(path, tick)
        collected = agent.collect(probe, memories, list(agent.COLLECTORS))
        yield json.loads(agent.encode_report(reporter.build_report("slow", probe.now(), collected)))


@pytest.fixture(scope="module")
def reports() -> dict[str, list[dict[str, Any]]]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "UTC"
    time.tzset()
    try:
        return {path.name: list(make_reports(path)) for path in recordings()}
    finally:
        os.environ.pop("TZ") if before is None else os.environ.update(TZ=before)
        time.tzset()


# reports


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("host", [path.name for path in recordings()])
def test_reports_of_a_recorded_host_are_valid(host: str, reports: dict[str, list[dict[str, Any]]]) -> None:
    for report in reports[host]:
        assert [f"{list(error.path)}: {error.message}" for error in VALIDATOR.iter_errors(report)] == []


@pytest.mark.parametrize("host", [path.name for path in recordings()])
def test_every_section_is_there_absent_or_an_error(host: str, reports: dict[str, list[dict[str, Any]]]) -> None:
    for report in reports[host]:
        for section in agent.COLLECTORS:
            told = section in report, section in report["absent"], section in report["errors"]
            assert any(told) or section == "tasks", section
            assert told[:2] != (True, True), section
        assert not [error for error in report["errors"].values() if "fault in the agent" in error["detail"]]


# fields


def resolve(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The schema and what it is made of."""
    parts = [schema]
    if "$ref" in schema:
        parts += resolve(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    for part in (*schema.get("anyOf", []), *schema.get("allOf", [])):
        parts += resolve(part)
    return parts


def walk(value: Any, schema: dict[str, Any], at: str, seen: set[str]) -> Iterator[str]:
    """Fields that the schema does not name. `seen` gets those that it does."""
    parts = resolve(schema)
    if isinstance(value, list):
        for one in value:
            for part in parts:
                if "items" in part:
                    yield from walk(one, part["items"], at, seen)
    if isinstance(value, dict):
        properties = {name: below for part in parts for name, below in part.get("properties", {}).items()}
        more = next((part["additionalProperties"] for part in parts if "additionalProperties" in part), None)
        for name, below in value.items():
            if name in properties:
                seen.add(f"{at}.{name}")
                yield from walk(below, properties[name], f"{at}.{name}", seen)
            elif more is None:
                yield f"{at}.{name}"


def all_fields(schema: dict[str, Any], at: str, depth: int = 0) -> Iterator[str]:
    for part in resolve(schema):
        if "items" in part and depth < 8:
            yield from all_fields(part["items"], at, depth + 1)
        for name, below in part.get("properties", {}).items() if part is not SCHEMA["$defs"]["units"] else ():
            yield f"{at}.{name}"
            if depth < 8 and name != "children":
                yield from all_fields(below, f"{at}.{name}", depth + 1)


def test_no_recorded_report_has_a_field_that_is_not_documented(reports: dict[str, list[dict[str, Any]]]) -> None:
    for host in reports:
        for report in reports[host]:
            assert list(walk(report, SCHEMA, "", set())) == []


def test_every_documented_field_is_sent_by_some_recorded_host(reports: dict[str, list[dict[str, Any]]]) -> None:
    seen: set[str] = set()
    for host in reports:
        for report in reports[host]:
            list(walk(report, SCHEMA, "", seen))
    assert sorted(set(all_fields(SCHEMA, "")) - seen - {".pools.expansion.progress_ratio", ".disks.failing_attributes"}) == []


# refusals


@pytest.mark.parametrize(
    "way, value",
    [
        ("node.cpu_ratio", "0.5"),
        ("node.memory_total_bytes", -1),
        ("guests.0.vmid", "100"),
        ("guests.0.type", "vm"),
        ("pools.0.guid", 15229773272131684388),
        ("pools.0.scan.state", "running"),
        ("pools.0.vdevs.0.class", "data"),
        ("pools.0.vdevs.0.children.0.name", None),
        ("pools.0.redundancy_margin", -2),
        ("disks.0.kind", "tape"),
        ("storages.0.storage", None),
        ("absent", "cluster"),
        ("errors", {"node": "failed"}),
        ("tick", "hourly"),
        ("seq", 0),
        ("version", 2),
    ],
)
def test_what_does_not_fit_is_refused(way: str, value: Any, reports: dict[str, list[dict[str, Any]]]) -> None:
    report = copy.deepcopy(reports["pve8-mirror"][0])
    *steps, last = [int(step) if step.isdigit() else step for step in way.split(".")]
    place: Any = report
    for step in steps:
        place = place[step]
    place[last] = value
    assert not VALIDATOR.is_valid(report)


def test_unknown_sections_and_fields_and_nulls_are_welcome(reports: dict[str, list[dict[str, Any]]]) -> None:
    report = copy.deepcopy(reports["pve8-mirror"][0])
    report["gpu"] = [{"name": "x"}]
    report["node"].update(fan_count=3, cpu_ratio=None)
    assert VALIDATOR.is_valid(report)


# the server's own check


@pytest.mark.parametrize("host", [path.name for path in recordings()])
def test_the_server_takes_what_the_schema_takes(host: str, reports: dict[str, list[dict[str, Any]]]) -> None:
    for report in reports[host]:
        server.check_report(copy.deepcopy(report))


def test_hosts_are_recorded() -> None:
    assert len(recordings()) >= 8 and HOSTS.is_dir()
