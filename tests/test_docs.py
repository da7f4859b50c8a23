"""The guides' examples do what they say: they are run as they stand, against a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, LiveServer, build_disk, build_pool, build_report, find_program


def examples(name: str) -> list[str]:
    """The shell blocks of a guide, in order."""
    return re.findall(r"^```sh[^\n]*\n(.*?)^```$", (ROOT / name).read_text(), re.M | re.S)


@pytest.fixture
def fill_in(live_server: LiveServer):
    """fill_in(text): the placeholders of the guides become this server's address and tokens."""
    find_program("curl")
    host_token, api_token = live_server.register("pve-host-01"), live_server.api_token("examples", "--admin")
    states = [{"name": "tank", "guid": "1", "state": "DEGRADED"}]
    pools = [build_pool(state="DEGRADED", vdevs=[build_disk("sda", checksum_errors=3)])]
    for seq in (1, 2):  # some rules compare a report with the one before
        report = build_report("pve-host-01", seq=seq, at=time.time() - 62 + seq, pools=pools, pool_states=states)
        assert live_server.post(host_token, report, host="pve-host-01", message_id=f"msg_{seq}").status == 200

    def fill_in(text: str) -> str:
        text = text.replace("https://monitor.example.com", live_server.url)
        return text.replace("whsec_…", host_token).replace("pxm_…", api_token)

    return fill_in


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "no_proxy": "*"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=100
    )


def bodies_of(text: str) -> Iterator[dict]:
    """The JSON objects in an output, one after the other."""
    decoder = json.JSONDecoder()
    at = text.find("{")
    while at >= 0:
        found, end = decoder.raw_decode(text, at)
        yield found
        at = text.find("{", end)


def test_every_example_of_the_api_works(fill_in, tmp_path):
    blocks = [fill_in(block) for block in examples("docs/api.md")]
    assert len(blocks) > 20
    answer = run("\n".join(blocks), tmp_path)
    assert answer.returncode == 0, answer.stderr + answer.stdout[-2000:]
    assert "304" in answer.stdout


@pytest.mark.parametrize("name", ["README.md", "docs/api.md"])
def test_a_report_posted_as_the_guide_says_is_accepted(fill_in, live_server, tmp_path, name):
    """Each of the two texts by itself: what is copied from one page has to do."""
    block = next(block for block in examples(name) if "hmac.digest" in block)
    if not re.search(r"^url=", block, re.M):
        block = f"url={live_server.url}\n{block}"
    answer = run(fill_in(block), tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert next(bodies_of(answer.stdout[answer.stdout.index('{"status"') :]))["accepted"] == 1
    api = live_server.api_token("reader")
    host = live_server.get("/api/v1/hosts/pve-host-01", api)
    assert host["sections"]["node"]["body"]["cpu_ratio"] == 0.05


def test_the_readmes_calls_work(fill_in, tmp_path):
    calls = [fill_in(block) for block in examples("README.md") if "/api/v1/" in block and "hmac.digest" not in block]
    assert calls
    answer = run("\n".join(calls), tmp_path)
    assert answer.returncode == 0, answer.stderr
