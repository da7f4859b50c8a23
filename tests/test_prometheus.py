"""docs/prometheus-rules.yml and docs/grafana-dashboard.json: read by promtool, and only of metrics that there are."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, build_report, find_program

import server

RULES = ROOT / "docs" / "prometheus-rules.yml"
DASHBOARD = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())
OTHERS = {"proxmon_host_up", "proxmon_host_alerts", "proxmon_shared_alerts", "proxmon_reports_total"}
METRICS = OTHERS | {f"proxmon_{r.one}_{metric.name}" for r in server.RESOURCES.values() for metric in r.metrics}


def named(text: str) -> set[str]:
    return set(re.findall(r"\bproxmon_[a-z_0-9]+", text))


def promtool(*argv: str) -> None:
    done = subprocess.run([find_program("promtool"), *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


# --- rules ---


def test_promtool_takes_the_rules_and_they_name_metrics_that_there_are():
    promtool("check", "rules", str(RULES))
    expressions = re.findall(r"expr: (.*)", RULES.read_text())
    assert len(expressions) >= 10 and named(" ".join(expressions)) <= METRICS


def test_the_metrics_named_here_are_those_that_are_served(admin, register, post):
    post(register("pve1"), build_report())
    assert OTHERS - {"proxmon_shared_alerts"} <= named(admin.get("/metrics").text) <= METRICS


CASES = [
    ("ProxmonHostOffline", 'proxmon_host_up{host="a", site="s"}', "1x3 0x20", "0x3 1x20", {"host": "a", "site": "s", "severity": "critical"}),
    ("ProxmonCritical", 'proxmon_host_alerts{host="a", severity="critical"}', "0 2x20", "0x20", {"host": "a", "severity": "critical"}),
    ("ProxmonSharedAlert", 'proxmon_shared_alerts{object="clusters/c", severity="warning"}', "1x20", "0x20", {"object": "clusters/c", "severity": "warning"}),
    ("ProxmonPoolNotOnline", 'proxmon_pool_online{host="a", pool="tank"}', "1 0x20", "1x20", {"host": "a", "pool": "tank", "severity": "critical"}),
    ("ProxmonPoolWithoutRedundancy", 'proxmon_pool_redundancy_margin{host="a", pool="tank"}', "1x3 0x20", "0x20", {"host": "a", "pool": "tank", "severity": "critical"}),
    ("ProxmonBackupLate", 'proxmon_backup_late_seconds{host="a", vmid="100"}', "4000x20", "-100x20", {"host": "a", "vmid": "100", "severity": "warning"}),
]  # fmt: skip


@pytest.mark.parametrize("alert, series, bad, good, labels", CASES, ids=[case[0] for case in CASES])
def test_a_rule_fires_when_it_should_and_else_not(alert, series, bad, good, labels, tmp_path: Path):
    def test(values: str, fires: bool) -> dict[str, Any]:
        expected = [{"exp_labels": labels}] if fires else []
        return {"interval": "1m", "input_series": [{"series": series, "values": values}],
                "alert_rule_test": [{"eval_time": "18m", "alertname": alert, "exp_alerts": expected}]}  # fmt: skip

    bare = re.sub(r"\n        annotations:\n(?:          .*\n)+", "\n", RULES.read_text())  # tested are labels and conditions
    (tmp_path / "rules.yml").write_text(bare)
    cases = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [test(bad, True), test(good, False)]}
    (tmp_path / "tests.yml").write_text(json.dumps(cases))
    promtool("test", "rules", str(tmp_path / "tests.yml"))


# --- dashboard ---


def test_the_dashboard_is_of_grafanas_json_model():
    assert DASHBOARD["schemaVersion"] >= 36 and DASHBOARD["title"] and re.fullmatch(r"[\w-]{1,40}", DASHBOARD["uid"])
    assert "id" not in DASHBOARD, "an id of one Grafana is another dashboard's in the next"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) >= 12
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    for panel in DASHBOARD["panels"]:
        assert panel["type"] in ("stat", "timeseries", "table") and panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert {"defaults", "overrides"} == panel["fieldConfig"].keys()
        assert [target["refId"] for target in panel["targets"]] == [chr(65 + n) for n in range(len(panel["targets"]))]
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables


def test_no_panel_lies_on_another_or_beyond_the_edge():
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        assert 0 <= x and x + w <= 24 and w > 0 and h > 0
        cells = {(column, row) for column in range(x, x + w) for row in range(y, y + h)}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_promtool_reads_each_expression_and_it_names_metrics_that_there_are(tmp_path: Path):
    assert named(" ".join(expressions())) <= METRICS
    plain = [expr.replace("$__rate_interval", "5m").replace("$host", ".*") for expr in expressions()]
    rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(plain)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "rules.yml"))
