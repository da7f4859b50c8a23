"""The project holds to its own rules: what ships, what it names, how it is written, what the guides tell."""

from __future__ import annotations

import ast
import dis
import os
import re
import stat
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import mutate
import pytest

import agent
import server

ROOT = Path(__file__).resolve().parent.parent


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def lines_of(name: str) -> list[str]:
    return (ROOT / name).read_text(encoding="utf-8", errors="replace").splitlines()


# --- entry points ---


def test_what_is_mutated_is_there():
    trees = {module: ast.parse(Path(module.__file__).read_text()) for module in (agent, server)}
    for part in [part for parts in mutate.PARTS.values() for part in parts]:
        names = list(mutate.names_in(part, trees[part.module]))
        assert names and all(mutate.find_definition(trees[part.module], name) for name in names)


@pytest.mark.parametrize("name", ["build.sh", ".ci/run"])
def test_entry_point_can_be_run(name):
    assert os.stat(ROOT / name).st_mode & stat.S_IXUSR


def test_ci_calls_the_command_that_people_use():
    assert any("./build.sh test" in line for line in lines_of(".ci/run"))


def test_an_unknown_command_prints_the_commands_there_are():
    answer = subprocess.run(["./build.sh", "dmo"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 2
    assert "  test " in answer.stderr


def test_an_audit_that_could_not_be_made_says_so_and_is_red_only_where_somebody_asked_for_it():
    cut_off = ["unshare", "--net", "--map-root-user", "./build.sh", "audit"]
    asked = subprocess.run(cut_off, cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 1 and "nothing was checked" in asked.stderr
    in_ci = subprocess.run([*cut_off, "--if-reachable"], cwd=ROOT, capture_output=True, text=True)
    assert in_ci.returncode == 0 and "NOT CHECKED" in in_ci.stdout
    assert any("./build.sh audit --if-reachable" in line for line in lines_of(".ci/run"))


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


def test_nothing_built_elsewhere_is_in_the_tree():
    built = (".whl", ".zip", ".tar.gz", ".tgz", ".so", ".pyc", ".min.js", ".woff2")
    assert not [name for name in tracked_files() if str(name).endswith(built)]


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


def test_no_test_steps_aside():
    """Only a program that is not installed may leave a test out, through conftest's find_program, and in CI nothing may
    but what the machine cannot do at all (skip_here)."""
    words = re.compile(r"pytest\.(skip|xfail|importorskip)\(|mark\.(skip|xfail)\b")
    for name in tracked_files():
        if name.startswith("tests/") and name.endswith(".py") and name != "tests/test_project.py":
            found = [line for line in lines_of(name) if words.search(line)]
            assert len(found) <= (name == "tests/conftest.py"), f"{name}: {found}"


def test_the_page_needs_nobody_else():
    for name in tracked_files():
        if name.startswith("templates/"):
            for number, line in enumerate(lines_of(name), 1):
                outside = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", line.replace("//www.w3.org/", ""))
                assert not outside, f"{name}:{number}: {outside}"


# --- how the two programs are written ---

PROGRAMS = ["agent.py", "server.py"]


def functions_of(name: str) -> list[tuple[int, str]]:
    """Length in lines and name of each function."""
    tree = ast.parse((ROOT / name).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [((node.end_lineno or 0) - node.lineno + 1, node.name) for node in ast.walk(tree) if isinstance(node, kinds)]


def imports_of(name: str) -> set[str]:
    """The top-level names of everything that is imported, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_map_and_banners_of_a_program_agree(name):
    docstring = ast.get_docstring(ast.parse((ROOT / name).read_text())) or ""
    mapped = re.search(r"^ *(\w+(?:\s*->\s*\w+)+)$", docstring, re.M)
    assert mapped, "the docstring has no map"
    banners = [found[1] for line in lines_of(name) if (found := re.match(r"# --- (\w+)(?:, \w+)*: .+ ---$", line))]
    assert re.split(r"\s*->\s*", mapped[1]) == banners


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_function_is_longer_than_a_screen(name):
    lengths = functions_of(name)
    tables = {"rule_rows"}  # nothing but rows, in a function because they name what stands below
    assert [one for one in lengths if one[0] > 60 and one[1] not in tables] == []
    assert statistics.median(length for length, _ in lengths) <= 10


def test_the_agent_imports_nothing_outside_the_standard_library():
    assert imports_of("agent.py") <= {name for name in sys.stdlib_module_names if not name.startswith("_")} | {"__future__"}
    heavy = {"dataclasses", "inspect", "uuid", "decimal", "asyncio"}  # each costs more memory than it saves lines
    assert not imports_of("agent.py") & heavy


def test_the_server_imports_three_packages():
    assert imports_of("server.py") - set(sys.stdlib_module_names) == {"bottle", "waitress", "argon2"}


def test_the_version_is_one():
    assert agent.VERSION == server.VERSION


# --- what the guides tell ---


def guides() -> str:
    names = [name for name in tracked_files() if name == "README.md" or re.fullmatch(r"docs/[\w-]+\.md", name)]
    return "\n".join((ROOT / name).read_text() for name in names)


def test_every_command_of_the_server_is_told():
    text = guides()
    assert [
        name for name in server.COMMANDS if not re.search(rf"proxmox-monitor-server {name}\b|`{name}\b", text)
    ] == []


def test_every_command_of_the_agent_is_told():
    text = guides()
    for name in ("start", "once", "check", "stop", "version"):
        assert re.search(rf"proxmox-monitor-agent {name}\b|`{name}\b", text), name


def test_every_section_is_told():
    readme = (ROOT / "README.md").read_text()
    assert [name for name in agent.COLLECTORS if f"`{name}`" not in readme] == []


def test_every_setting_is_told():
    text = guides()
    settings = set(re.findall(r"env\.get\(\"([A-Z_]+)\"", (ROOT / "server.py").read_text()))
    assert len(settings) > 5
    assert [name for name in sorted(settings) if f"`{name}`" not in text] == []


def test_every_call_of_the_api_is_told_with_curl():
    text = (ROOT / "docs" / "api.md").read_text()
    blocks = "\n".join(re.findall(r"^```sh.*?^```", text, re.M | re.S))
    for one in server.ROUTES:
        if one.path.startswith("/api/") or one.path in ("/healthz", "/metrics"):
            shown = re.sub(r"<\w+>", "{id}", one.path)
            assert f"{one.method} {shown}" in re.sub(r"\{\w+\}", "{id}", text), f"{one.method} {shown}"
            path = re.sub(r"<\w+>", r"[^/?\\s\"']+", one.path)
            assert re.search(rf"{path}(?![\w/])", blocks), f"{one.method} {shown} has no example"


def test_every_test_that_a_guide_names_is_there():
    named = set(re.findall(r"`(test_\w+)`", guides()))
    there = {found for path in (ROOT / "tests").glob("test_*.py") for found in re.findall(r"def (test_\w+)", path.read_text())}
    assert named and named - there == set()


def test_the_guides_link_to_what_there_is():
    for name in tracked_files():
        if name.endswith(".md"):
            for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / name).read_text()):
                assert (ROOT / name).parent.joinpath(target).exists(), f"{name} -> {target}"


@pytest.mark.parametrize("name", ["agent.py", "server.py"])
def test_a_section_uses_only_what_stands_above_it(name):
    """Globals that a function asks for, by its compiled code: names of types alone do not count."""
    source = (ROOT / name).read_text()
    begins = [0] + [number for number, line in enumerate(source.splitlines(), 1) if re.match(r"# --- \w+.*: ", line)]

    def section(line):
        return sum(begin <= line for begin in begins)

    defined = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
        names += [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        for found in names:
            defined.setdefault(found, section(node.lineno))

    def below(code):
        line = code.co_firstlineno
        for step in dis.get_instructions(code):
            line = step.starts_line if isinstance(step.starts_line, int) and step.starts_line > 0 else line
            if step.opname == "LOAD_GLOBAL" and defined.get(step.argval, 0) > section(line):
                yield f"line {line}: {step.argval}"
        for const in code.co_consts:
            if hasattr(const, "co_code"):
                yield from below(const)

    assert list(below(compile(source, name, "exec"))) == []
