"""What the server hands out for installing a host, and what its commands leave behind for its own user."""

from __future__ import annotations

import ast
import hashlib
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, Client

import server

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
NOBODY = 65534


# --- /install ---


@pytest.fixture
def handing_out(monitor, tmp_path):
    """A client of a server with one agent binary, of its own version."""
    monitor.config.install_dir = str(tmp_path / "install")
    os.mkdir(monitor.config.install_dir)
    write_binary(monitor, "amd64", server.VERSION)
    return Client(monitor)


def write_binary(monitor, arch, version):
    path = os.path.join(monitor.config.install_dir, f"proxmox-monitor-agent_linux_{arch}")
    with open(path, "wb") as handle:
        handle.write(f"#!/bin/sh\n# proxmox-monitor-agent {version} for Linux on {arch}: …\n".encode() + b"\x00\xff")


def test_nobody_has_to_log_in_to_install(handing_out):
    for name in ("install.sh", "agent.py", "proxmox-monitor-agent.service", "proxmox-monitor-agent_linux_amd64"):
        assert handing_out.get(f"/install/{name}").status == 200


def test_the_script_knows_the_server_it_came_from(handing_out):
    text = handing_out.get("/install/install.sh").text
    assert handing_out.get("/install.sh").text == text
    assert f'server_url="{handing_out.monitor.config.public_url}"\n' in text
    assert "@SERVER_URL@" not in text
    assert subprocess.run(["sh", "-n"], input=text, text=True).returncode == 0


def test_sums_name_each_file_as_it_is_handed_out(handing_out):
    sums = dict(reversed(line.split("  ")) for line in handing_out.get("/install/SHA256SUMS").text.splitlines())
    assert set(sums) == set(server.INSTALL_FILES) - {"proxmox-monitor-agent_linux_arm64"}
    for name, digest in sums.items():
        assert hashlib.sha256(handing_out.get(f"/install/{name}").body).hexdigest() == digest


def test_what_a_release_is_signed_with_is_passed_on_as_it_is(handing_out):
    folder = Path(handing_out.monitor.config.install_dir)
    for name in ("SHA256SUMS", "release-key"):  # of an unsigned release nothing is passed on
        (folder / name).write_bytes(b"left over\n")
    assert handing_out.get("/install/release-key").status == handing_out.get("/install/SHA256SUMS.sig").status == 404
    assert "left over" not in handing_out.get("/install/SHA256SUMS").text
    (folder / "SHA256SUMS.sig").write_bytes(b"a signature\n")
    for name in ("SHA256SUMS", "SHA256SUMS.sig", "release-key"):
        assert handing_out.get(f"/install/{name}").body == (folder / name).read_bytes()


def test_an_agent_of_another_version_is_not_handed_out(handing_out):
    write_binary(handing_out.monitor, "arm64", "9.9.9")
    assert handing_out.get("/install/proxmox-monitor-agent_linux_arm64").code == "not_found"
    assert "arm64" not in handing_out.get("/install/SHA256SUMS").text


@pytest.mark.parametrize("name", ["..%2Fserver.py", "server.py", "monitor.db", "", "install.sh%00", "%2Fetc%2Fpasswd"])
def test_nothing_else_is_handed_out(handing_out, name):
    assert handing_out.get(f"/install/{name}").status == 404


def test_what_is_handed_out_holds_no_secret(handing_out, register):
    token = register("pve1")
    secret = handing_out.monitor.secret
    for name in server.INSTALL_FILES:
        body = handing_out.get(f"/install/{name}").body
        assert secret not in body and token.encode() not in body


def test_a_new_host_comes_with_the_line_that_installs_it(admin):
    made = admin.send("POST", "/api/v1/hosts", {"name": "pve1"}).json()
    url = admin.monitor.config.public_url
    assert made["install"] == [f"curl -fsSL {url}/install/install.sh | sh -s -- --host pve1"]
    assert made["token"] not in made["install"][0]  # it would stay in the shell's history


# --- commands ---


@pytest.fixture
def state_directory():
    """A directory of another user's that he can reach, as /var/lib/proxmox-monitor is."""
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o755)
        folder = Path(above) / "state"
        folder.mkdir(mode=0o700)
        os.chown(folder, NOBODY, NOBODY)
        yield folder


def run_command(folder, *argv, **settings):
    env = {"PATH": os.environ["PATH"], "DATABASE_PATH": str(folder / "monitor.db"), **settings}
    return subprocess.run([sys.executable, ROOT / "server.py", *argv], env=env, capture_output=True, text=True)


def test_register_host_prints_three_lines(tmp_path):
    told = run_command(tmp_path, "register-host", "pve-host-01", PUBLIC_URL="https://monitor.example.com")
    assert re.fullmatch(
        r"Host 'pve-host-01' registered \(id=1\)\.\nTOKEN: whsec_[A-Za-z0-9+/]{43}=\n"
        r"Store this token NOW — it will never be shown again\.\n", told.stdout)  # fmt: skip
    assert told.stderr == ""  # a script gets the three lines and nothing else


def test_register_host_shows_a_person_the_way_on(tmp_path):
    ours, theirs = pty.openpty()  # standard error is a terminal
    env = {"PATH": os.environ["PATH"], "DATABASE_PATH": str(tmp_path / "monitor.db"),
           "PUBLIC_URL": "https://monitor.example.com"}  # fmt: skip
    command = [sys.executable, ROOT / "server.py", "register-host", "pve-host-01"]
    told = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=theirs, text=True)
    line = b"curl -fsSL --proto =https --proto-redir =https https://monitor.example.com/install/install.sh | sh -s -- --host pve-host-01"
    assert line in os.read(ours, 4096)
    assert told.stdout.count("\n") == 3


@needs_root
@pytest.mark.parametrize("command", [("register-host", "pve1"), ("migrate",), ("create-api-token", "one")])
def test_what_root_makes_in_the_service_directory_is_the_services(command, state_directory):
    assert run_command(state_directory, *command).returncode == 0
    made = list(state_directory.iterdir())
    assert made and all(path.stat().st_uid == NOBODY for path in made)
    assert all(path.stat().st_mode & 0o077 == 0 for path in made)


def test_settings_come_from_the_units_file_for_the_installed_program_alone(tmp_path, monkeypatch):
    file = tmp_path / "settings"
    file.write_text("# a comment\nDATABASE_PATH=/data/monitor.db\n\nPORT=\"4001\"\nDASHBOARD_PASSWORD_HASH='$a$b=='\n")
    monkeypatch.setattr(server, "SETTINGS_FILE", str(file))
    monkeypatch.setattr(os, "environ", {"PORT": "5000"})
    assert server.read_environ() == {"PORT": "5000"}
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert server.read_environ() == {
        "DATABASE_PATH": "/data/monitor.db", "PORT": "5000", "DASHBOARD_PASSWORD_HASH": "$a$b=="}  # fmt: skip
    monkeypatch.setattr(os, "environ", {"DATABASE_PATH": "/elsewhere"})
    assert server.read_environ() == {"DATABASE_PATH": "/elsewhere"}


def test_the_frozen_server_takes_back_what_its_loader_put_into_the_environment(monkeypatch):
    before = {"LD_LIBRARY_PATH": "/bundle", "LD_LIBRARY_PATH_ORIG": "/own", "_PYI_ARCHIVE_FILE": "x", "HOME": "/h"}
    monkeypatch.setattr(os, "environ", dict(before))
    server.repair_environ()
    assert os.environ == {"LD_LIBRARY_PATH": "/own", "HOME": "/h"}


# --- install.sh, as far as it goes without a host to change ---


@pytest.mark.parametrize("arguments, told", [
    (["--host", "a/b"], "--host"),
    (["--host", ""], "--host NAME is missing"),
    (["--host", "pve1", "--server", "http://monitor.example.com"], "only https"),
    (["--host", "pve1", "--server", "https://x$(id)"], "not an address"),
    (["--host", "pve1", "--ca-file", "relative.pem"], "whole path"),
    (["--host", "pve1", "--nonsense"], "Usage"),
])  # fmt: skip
@needs_root
def test_install_sh_refuses_what_it_cannot_use(arguments, told, tmp_path):
    script = tmp_path / "install.sh"
    text = (ROOT / "packaging/install.sh").read_text()
    script.write_text(text.replace("/etc/proxmox-monitor", str(tmp_path / "etc")))
    argv = ["sh", str(script), "--server", "https://monitor.example.com", "--no-start", *arguments]
    answer = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert answer.returncode != 0
    assert told in answer.stderr + answer.stdout
    assert not (tmp_path / "etc").exists()


@pytest.mark.parametrize("script", ["install.sh", "unpack.sh"])
def test_a_script_cut_off_anywhere_does_nothing(script, tmp_path):
    """`curl | sh` runs what has come so far: everything is in functions, and the call is the last line."""
    whole = (ROOT / "packaging" / script).read_bytes()
    last = whole.rindex(b"\nmain ")
    for end in range(0, last, 97):
        argv = ["/bin/sh", "-c", whole[:end], "x"]
        answer = subprocess.run(argv, capture_output=True, cwd=tmp_path, env={"PATH": ""})
        assert answer.stdout == b""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("shellcheck") is None and "CI" not in os.environ, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", ["build.sh", "packaging/install.sh", "packaging/freeze.sh"])
def test_shellcheck_finds_no_fault(script):
    answer = subprocess.run(["shellcheck", "--severity=warning", script], cwd=ROOT, capture_output=True, text=True)
    assert answer.stdout == ""


# --- build.sh on a machine that is no Linux ---

STUB_PYTHON = """#!/bin/bash
# Stands for Python with PyInstaller: says what it was asked for, and makes what it would make.
case "$*" in
    "-c "*|"-VV"|"-V") exec {python} "$@" ;;
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m PyInstaller "*) printf '%s\\n' "$@" > asked; mkdir -p dist; : > "dist/$(sed -n '/^--name$/{{n;p;}}' asked)" ;;
esac
"""
MAC_TOOLS = "bash cat cp cut dirname env expand grep id mkdir mv printf rm sed sort tr which xargs".split()


def test_on_a_mac_the_agent_is_frozen_for_a_try_without_any_linux_tool(tmp_path):
    """The machine is played: uname says Darwin, and of the commands only those are there that macOS has too."""
    for name in ("build.sh", "agent.py", "server.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "packaging", tmp_path / "packaging")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in MAC_TOOLS:
        (tools / name).symlink_to(str(shutil.which(name)))
    (tools / "uname").write_text('#!/bin/bash\n[ "$1" = -m ] && echo arm64 || echo Darwin\n')
    (tools / "python3").write_text(STUB_PYTHON.format(python=sys.executable))
    for name in ("uname", "python3"):
        (tools / name).chmod(0o755)
    answer = subprocess.run(["./build.sh", "agent"], cwd=tmp_path, capture_output=True, text=True,
                            env={"PATH": str(tools), "HOME": str(tmp_path)})  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert "for a try on this machine alone" in answer.stdout
    assert (tmp_path / "dist/proxmox-monitor-agent_darwin_arm64").exists()
    assert "--onefile" in (tmp_path / "asked").read_text().splitlines()


# --- what is left out of the frozen files ---


@pytest.mark.parametrize("name", ["agent", "server"])
def test_nothing_that_a_program_imports_is_left_out_of_its_frozen_file(name):
    """Also what is imported only on the way (mail, TLS): that would show on the day it is needed."""
    text = (ROOT / "packaging/freeze.sh").read_text()
    common = re.search(r'^excludes="([^"]+)"$', text, re.MULTILINE).group(1).split()
    own = re.search(rf'^    {name}\)\n        excludes="\$excludes ([^"]+)"', text, re.MULTILINE).group(1).split()
    assert {"readline", "_curses"} <= set(common)
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {one.name.partition(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    assert "json" in found
    assert not found & {*common, *own}
