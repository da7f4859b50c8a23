"""The project holds to its own rules: what ships, what it names, how long its functions are."""

from __future__ import annotations

import os
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def lines_of(name: str) -> list[str]:
    return (ROOT / name).read_text(encoding="utf-8", errors="replace").splitlines()


# --- entry points ---


@pytest.mark.parametrize("name", ["build.sh", ".ci/run"])
def test_entry_point_can_be_run(name):
    assert os.stat(ROOT / name).st_mode & stat.S_IXUSR


def test_ci_calls_the_command_that_people_use():
    assert any("./build.sh test" in line for line in lines_of(".ci/run"))


def test_an_unknown_command_prints_the_commands_there_are():
    answer = subprocess.run(["./build.sh", "dmo"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 2
    assert "  test " in answer.stderr


# --- requirements ---


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_each_requirement_is_pinned_and_has_hashes(name):
    entries = "\n".join(line for line in lines_of(name) if not line.lstrip().startswith("#")).replace("\\\n", " ")
    for entry in filter(None, map(str.strip, entries.splitlines())):
        assert "==" in entry.split()[0], entry
        assert "--hash=sha256:" in entry, entry


def test_the_server_needs_three_packages_and_what_they_need():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"] == [
        "bottle",
        "waitress",
        "argon2-cffi",
    ]


def test_the_tests_run_with_the_versions_that_the_server_runs_with():
    def pins(name):
        return {line.split()[0] for line in lines_of(name) if "==" in line and not line.startswith("#")}

    assert pins("requirements.txt") <= pins("requirements-dev.txt")


# --- what no file names ---


def test_no_file_names_a_place_of_the_machine_it_was_made_on():
    # The folder above only where its name says something: a clone may lie in /tmp or /.
    foreign = [str(place) + "/" for place in (ROOT, ROOT.parent) if len(place.parts) > 2]
    for name in tracked_files():
        for number, line in enumerate(lines_of(name), 1):
            assert not any(place in line for place in foreign), f"{name}:{number}: {line[:100]}"


def test_no_file_names_a_package_registry():
    words = ("pypi" + ".org", "pythonhosted" + ".org", "--" + "index-url", "--extra-" + "index-url")
    for name in tracked_files():
        for number, line in enumerate(lines_of(name), 1):
            assert not any(word in line for word in words), f"{name}:{number}"
