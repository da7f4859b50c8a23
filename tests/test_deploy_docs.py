"""The guides in docs/, typed command by command: two Debian containers, each with its own systemd, nobody to ask.

Every shell block of deploy-lxc.md and install-agent.md that is marked `on-server` or `on-host` is run here as it
stands, and a test fails when one is not. What the containers lack is a network: packages are put in beforehand, and
`scp` is done by the test. Blocks marked `on-proxmox` (pct) and `from-a-desk` (ssh, scp) are the only ones not run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, find_program
from debian import ROOTS, Container, build, debian_root, one_at_a_time

import server

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: Debian containers are started"),
]
PASSWORD = "a password of the guide's"
NEXT = "0.99.0"


# --- blocks ---


class Block(NamedTuple):
    """A shell block: where it is to be typed, what marks it, its text."""

    place: str
    mark: str
    text: str


def blocks_of(name: str) -> list[Block]:
    text = (ROOT / "docs" / name).read_text()
    found = re.findall(r"^```sh ?([a-z-]*) ?([a-z-]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(*one) for one in found]


def pick(name: str, place: str, mark: str) -> str:
    (found,) = [one.text for one in blocks_of(name) if (one.place, one.mark) == (place, mark)]
    return found


@pytest.mark.parametrize("name", ["deploy-lxc.md", "install-agent.md"])
def test_each_shell_block_says_where_it_is_typed(name):
    blocks = blocks_of(name)
    assert len(blocks) == (ROOT / "docs" / name).read_text().count("```sh")
    assert {one.place for one in blocks} <= {"on-server", "on-host", "on-proxmox", "from-a-desk"}


def test_the_blocks_that_only_a_person_can_type_are_shell(tmp_path):
    for name in ("deploy-lxc.md", "install-agent.md"):
        for one in blocks_of(name):
            checked = subprocess.run(["bash", "-n"], input=one.text, text=True, capture_output=True)
            assert checked.returncode == 0, one.text


def test_links_between_the_guides_lead_somewhere():
    def anchors(path):
        titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    for path in (ROOT / "docs").glob("*.md"):
        # Links may be wrapped over two lines.
        for file, anchor in re.findall(r"\]\(([\w-]+\.md)?(?:#([\w-]+))?\)", path.read_text()):
            target = path.parent / file if file else path
            assert target.is_file(), (path.name, file)
            assert not anchor or anchor in anchors(target), (path.name, file, anchor)


def test_every_setting_of_the_server_is_in_the_guide():
    named = set(re.findall(r'env\.get\("([A-Z_]+)"', (ROOT / "server.py").read_text()))
    listed = set(re.findall(r"`([A-Z_]{4,})`", (ROOT / "docs/deploy-lxc.md").read_text()))
    assert named <= listed


LOGGED = re.compile(r"""\blog(?:_once)?\((?:[^"'()]*, )?f?(["'])((?:(?!\1).)+)\1""")


def test_every_line_that_the_agent_logs_is_in_the_guide():
    table = (ROOT / "docs/install-agent.md").read_text().replace("`", "")
    for _, text in LOGGED.findall((ROOT / "agent.py").read_text()):
        parts = [part.strip() for part in re.split(r"\{[^{}]*\}", text)]
        longest = max(parts, key=len).strip(" ();,.")
        assert longest in table or any(len(p) > 8 and p in table for p in parts), text


# --- the guide, followed ---


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> tuple[Path, Path]:
    """The release of these sources, and one of a next version with one more migration."""
    arch = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True).stdout.strip()
    copy = tmp_path_factory.mktemp("next") / "proxmon"
    ignored = shutil.ignore_patterns(".git", ".venv", ".build", "dist", ".demo", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    for name in ("agent.py", "server.py"):
        text = (copy / name).read_text()
        assert text.count(f'\nVERSION = "{server.VERSION}"\n') == 1
        (copy / name).write_text(text.replace(f'\nVERSION = "{server.VERSION}"\n', f'\nVERSION = "{NEXT}"\n'))
    with open(copy / "schema.sql", "a") as handle:
        handle.write("\n-- +migrate Up\nCREATE TABLE novelty (id INTEGER PRIMARY KEY);\n"
                     "-- +migrate Down\nDROP TABLE novelty;\n")  # fmt: skip
    with one_at_a_time("frozen"):
        build("release", "--arch", arch)
        build("release", "--arch", arch, cwd=copy, BUILD_ROOTS=str(ROOTS.resolve()), SOURCE_DATE_EPOCH="1700000000")
    return ROOT / f"dist/proxmon-{server.VERSION}.tar.gz", copy / f"dist/proxmon-{NEXT}.tar.gz"


APT_GET = """#!/bin/sh
# No network here: what is to be installed has to be there.
[ "$1" = install ] || exit 0
shift; for one in "$@"; do case $one in -*) ;; *) dpkg -s "$one" >/dev/null || exit 1 ;; esac; done
"""


@pytest.fixture(scope="module")
def machines(releases, tmp_path_factory) -> Iterator[tuple[Container, Container]]:
    """A container for the server (Debian 12) and one for a host (Debian 13, as PVE 9), on a network of their own."""
    roots = {"monitor": debian_root("bookworm"), "pve-host-01": debian_root("trixie")}
    folder = tmp_path_factory.mktemp("machines")
    (folder / "hosts").write_text("127.0.0.1 localhost monitor.example.com\n")
    (folder / "apt-get").write_text(APT_GET)
    (folder / "apt-get").chmod(0o755)
    shutil.copy(releases[0], folder / "proxmon.tar.gz")
    netns = f"proxmon-{os.getpid()}"
    ip = find_program("ip")
    subprocess.run([ip, "netns", "add", netns], check=True)
    subprocess.run([ip, "-n", netns, "link", "set", "lo", "up"], check=True)
    shared = {folder / "hosts": "/etc/hosts", folder / "apt-get": "/usr/local/sbin/apt-get"}
    running: list[Container] = []
    try:
        binds = shared | {folder: "/mnt"}
        for name, root in roots.items():
            running.append(Container(root, f"{name}-{os.getpid()}", netns=netns, folder=folder, binds=binds))
        for one in running:
            wait_for_systemd(one)
            one.run("hostname " + one.name.rpartition("-")[0])
        running[0].run("cp /mnt/proxmon.tar.gz /root/")
        yield running[0], running[1]
    finally:
        for one in running:
            one.stop()
        subprocess.run([ip, "netns", "delete", netns], check=False)


def wait_for_systemd(one: Container) -> None:
    """Until its systemd has started all; four minutes, as another test may have both processors."""
    deadline, told = time.monotonic() + 240, ""
    while time.monotonic() < deadline and one.process.poll() is None:
        try:
            told = one.run("systemctl is-system-running --wait || true").stdout.strip()
        except (OSError, IndexError, subprocess.TimeoutExpired) as error:
            told = repr(error)
        if told in ("running", "degraded"):
            return
        time.sleep(0.3)
    ended = one.process.poll()
    raise AssertionError(f"{one.name}: {told!r}, ended: {ended}\n{one.log.read_text(errors='replace')[-3000:]}")


def typed(one: Container, text: str, **settings: str) -> str:
    """Type a block; every command of it has to succeed."""
    began = time.monotonic()
    done = one.run(text, **settings)
    print(f"{time.monotonic() - began:5.1f} s  {text.splitlines()[-1][:100]}")
    assert done.returncode == 0, f"{text}\n--- said:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def token_in(text: str) -> str:
    return re.search(r"^TOKEN: (whsec_\S+)$", text, re.MULTILINE).group(1)


def until(one: Container, script: str, what: str, seconds: float = 30) -> str:
    """The script's output once it holds `what`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        told = one.run(script).stdout
        if what in told:
            return told
        time.sleep(0.3)
    raise AssertionError(f"{what!r} never came from {script!r}; the last was:\n{told[-3000:]}")


LC = "deploy-lxc.md"
IA = "install-agent.md"
LIST = "proxmox-monitor-server list-hosts --json"
RECENT = "journalctl --no-pager -o cat _SYSTEMD_INVOCATION_ID=$(systemctl show -p InvocationID --value {})"
AGENT_LOG = RECENT.format("proxmox-monitor-agent")


def test_a_newcomer_gets_from_nothing_to_a_host_on_the_page_and_back(machines, releases):
    """One long way, as the guides go; each step needs those before it."""
    monitor, host = machines
    ran: list[str] = []

    def step(machine: Container, name: str, mark: str, **settings: str) -> str:
        text = pick(name, "on-server" if machine is monitor else "on-host", mark)
        ran.append(text)
        return typed(machine, text, **settings)

    # deploy-lxc.md, steps 2 to 6: the blocks without a mark in their order, the marked ones in their places
    plain = [one.text for one in blocks_of(LC) if one.place == "on-server" and not one.mark]
    unpack, install, start, caddyfile, caddy, backup, restore = plain
    ran += plain
    typed(monitor, unpack)
    assert f"proxmox-monitor-server {server.VERSION}" in typed(monitor, install)
    step(monitor, LC, "password", stdin=PASSWORD + "\n")
    assert "✗" not in typed(monitor, start)
    typed(monitor, caddyfile)
    step(monitor, LC, "private")
    typed(monitor, caddy)
    began = time.monotonic()
    token = token_in(step(monitor, LC, "token"))

    # install-agent.md: the certificate, the line, and the look at it
    hand_over_certificate(monitor, host, ran)
    assert "pve-host-01" in step(monitor, IA, "token")
    told = step(host, IA, "install", TOKEN=token)
    on_page = time.monotonic() - began
    assert "reporter: accepted host:pve-host-01" in told
    print(f"\nfrom register-host to the host on the page: {on_page:.1f} s")
    look_at_page(monitor, "pve-host-01")
    told = step(host, IA, "check")
    assert "✓ token: accepted" in told and "active (running)" in told and "reads, " in told
    check_running_unit(host, token)

    # again changes nothing, and asks for nothing
    typed(host, "printf '\n[intervals]\nfast_seconds = 3\n' >> /etc/proxmox-monitor/agent.toml")
    before = host.run("sha256sum /etc/proxmox-monitor/agent.toml").stdout
    step(host, IA, "install")
    assert host.run("sha256sum /etc/proxmox-monitor/agent.toml").stdout == before
    assert host.run("ls /usr/local/bin").stdout.split() == ["proxmox-monitor-agent"]

    # backup and restore; then the next version on both sides, and back
    typed(monitor, backup)
    typed(monitor, restore)
    until(monitor, LIST, '"pve-host-01"')
    upgrade_and_back(monitor, host, releases[1], step)

    # a new token: the old one is refused, the line takes the new one
    token = token_in(step(monitor, IA, "rotate"))
    until(host, f"systemctl restart proxmox-monitor-agent; sleep 2; {AGENT_LOG}", "invalid_token")
    assert "accepted host:pve-host-01" in step(host, IA, "rotate", TOKEN=token)

    # removed, and once more by hand
    step(host, IA, "uninstall")
    left = host.run("ls /usr/local/bin /var/cache /etc/systemd/system /etc/proxmox-monitor").stdout
    assert "proxmox-monitor" not in left.replace("/etc/proxmox-monitor:", "") and "agent.toml" in left
    typed(host, "tar -xzf /mnt/proxmon.tar.gz; cp proxmon-*/proxmox-monitor-agent_linux_* "
                "proxmon-*/systemd/proxmox-monitor-agent.service /root/; rm -f /root/*.json\n"
                "[ -e proxmox-monitor-agent_linux_amd64 ] || mv proxmox-monitor-agent_linux_* "
                "proxmox-monitor-agent_linux_amd64")  # fmt: skip
    step(host, IA, "by-hand", TOKEN=token)
    until(host, AGENT_LOG, "reporter: accepted host:pve-host-01")
    assert host.run("stat -c %a /etc/proxmox-monitor/agent.toml").stdout == "600\n"

    check_plain_ways(host)

    wanted = [one.text for name in (LC, IA) for one in blocks_of(name) if one.place in ("on-server", "on-host")]
    assert set(ran) == set(wanted)


def hand_over_certificate(monitor: Container, host: Container, ran: list[str]) -> None:
    """The block's scp is done by the test, its other lines are typed."""
    text = pick(IA, "on-host", "private")
    ran.append(text)
    scp, rest = text.split("\n", 1)
    source, target = re.fullmatch(r"scp root@monitor\.example\.com:(\S+) (\S+)", scp).groups()
    certificate = until(monitor, f"cat {source} || true", "BEGIN CERTIFICATE")
    assert host.run(f"mkdir -p {Path(target).parent}; cat > {target}", stdin=certificate).returncode == 0
    typed(host, rest)


def look_at_page(monitor: Container, name: str) -> None:
    """As a browser: over TLS, by password."""
    root = "--cacert /var/lib/caddy/.local/share/caddy/pki/authorities/local/root.crt"
    page = f"curl -sS {root} -c /tmp/jar -b /tmp/jar https://monitor.example.com"
    answer = typed(monitor, f"{page}/login -o /dev/null -w '%{{http_code}}' --data-urlencode 'password={PASSWORD}'"
                   .replace("guide's", "guide'\\''s"))  # fmt: skip
    assert answer == "303"
    rows = json.loads(typed(monitor, f"{page}/api/v1/hosts"))["items"]
    assert [(row["name"], row["agent_version"]) for row in rows] == [(name, server.VERSION)]
    assert rows[0]["last_seen_at"] is not None


def check_running_unit(host: Container, token: str) -> None:
    """What systemd says of it, that it was ready by its own word, and that a hang ends it."""
    shown = host.run("systemctl show -p Type -p NRestarts -p StatusText -p ActiveState proxmox-monitor-agent").stdout
    assert "ActiveState=active" in shown and "NRestarts=0" in shown and "StatusText=reporting" in shown
    pss = host.run("cat /proc/$(systemctl show -p MainPID --value proxmox-monitor-agent)/smaps_rollup").stdout
    print("frozen agent over TLS:", re.search(r"^Pss: +(.*)$", pss, re.MULTILINE).group(1), "PSS")
    assert token not in host.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '; env; journalctl --no-pager").stdout
    assert host.run("stat -c %a /etc/proxmox-monitor/agent.toml /etc/proxmox-monitor").stdout == "600\n700\n"
    typed(host, "mkdir -p /run/systemd/system/proxmox-monitor-agent.service.d; printf '[Service]\\nWatchdogSec=2\\n' "
                "> /run/systemd/system/proxmox-monitor-agent.service.d/quick.conf; systemctl daemon-reload; "
                "systemctl restart proxmox-monitor-agent; sleep 3; systemctl is-active proxmox-monitor-agent; "
                "kill -STOP $(systemctl show -p MainPID --value proxmox-monitor-agent)")  # fmt: skip
    until(host, "systemctl show -p NRestarts proxmox-monitor-agent", "NRestarts=1", 20)
    typed(host, "rm -r /run/systemd/system/proxmox-monitor-agent.service.d; systemctl daemon-reload; "
                "systemctl restart proxmox-monitor-agent")  # fmt: skip


def check_plain_ways(host: Container) -> None:
    """agent.py under the same unit: in the binary's place, and elsewhere by the guide's override."""
    line = "curl -fsSL --proto =https --proto-redir =https https://monitor.example.com/install/install.sh | sh -s -- --host pve-host-01 --plain"
    assert "reporter: accepted host:pve-host-01" in typed(host, line)
    program = "readlink /proc/$(systemctl show -p MainPID --value proxmox-monitor-agent)/exe"
    assert "/python3" in host.run(program).stdout
    blocks = re.findall(r"^```ini\n(.*?)^```$", (ROOT / "docs" / IA).read_text(), re.MULTILINE | re.DOTALL)
    (override,) = [block for block in blocks if "ExecStart=" in block]
    folder = "/etc/systemd/system/proxmox-monitor-agent.service.d"
    typed(host, f"mkdir -p /opt/proxmon {folder}; cp proxmon-*/agent.py /opt/proxmon/; cat > {folder}/override.conf; "
                "systemctl daemon-reload; systemctl restart proxmox-monitor-agent", stdin=override)  # fmt: skip
    until(host, AGENT_LOG, "reporter: accepted host:pve-host-01")
    assert "/opt/proxmon/agent.py" in host.run("systemctl status --no-pager -n0 proxmox-monitor-agent").stdout


def upgrade_and_back(monitor: Container, host: Container, release: Path, step) -> None:
    """Server up, agent up, server back, agent back: each pair one version apart is understood."""
    old, schema = server.VERSION, len(server.load_migrations())
    before = agent_pid(host)
    put_file(monitor, "/root/next.tar.gz", release.read_bytes())
    typed(monitor, "rm -rf proxmon-*/; tar -xzf next.tar.gz")
    told = step(monitor, LC, "upgrade")
    assert "✗" not in told and f"schema {schema + 1}" in told  # ExecStartPre has migrated
    assert agent_pid(host) == before  # the old agent was not touched, and is understood by the new server
    seen_after_now(monitor, host)

    told = step(host, IA, "upgrade")
    assert f"Installed: proxmox-monitor-agent {NEXT}" in told
    assert "fast_seconds = 3" in host.run("cat /etc/proxmox-monitor/agent.toml").stdout
    typed(monitor, f"systemctl stop proxmox-monitor; proxmox-monitor-server rollback --to {schema}")
    step(monitor, LC, "back")
    assert old in typed(monitor, "proxmox-monitor-server version; proxmox-monitor-server check")
    seen_after_now(monitor, host)  # the new agent by the old server

    step(host, IA, "back")
    assert old in typed(host, "proxmox-monitor-agent version")
    seen_after_now(monitor, host)


def put_file(machine: Container, path: str, body: bytes) -> None:
    argv = ["nsenter", f"--target={machine.find_leader()}", "--mount", "--root", "/bin/sh", "-c", f"cat > {path}"]
    subprocess.run(argv, input=body, check=True, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})


def agent_pid(host: Container) -> str:
    return host.run("systemctl show -p MainPID --value proxmox-monitor-agent").stdout


def seen_after_now(monitor: Container, host: Container) -> None:
    """A report comes in from here on."""
    now = time.time()
    deadline = time.monotonic() + 45
    while time.monotonic() < deadline:
        rows = json.loads(monitor.run(LIST).stdout or "[]")
        if rows and (rows[0]["last_seen_at"] or 0) > now:
            return
        time.sleep(0.5)
    raise AssertionError(host.run(AGENT_LOG).stdout[-3000:])


# --- the release ---


def test_a_release_holds_all_that_is_needed_and_its_sums_fit(releases, tmp_path):
    shutil.unpack_archive(releases[0], tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"proxmon-{server.VERSION}"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    arch = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True).stdout.strip()
    assert {
        f"proxmox-monitor-agent_linux_{arch}", f"proxmox-monitor-server_linux_{arch}", "agent.py", "server.py",
        f"proxmox-monitor-agent_linux_{arch}.cdx.json", f"proxmox-monitor-server_linux_{arch}.cdx.json",
        "install.sh", "Caddyfile.example", "systemd/proxmox-monitor.service", "systemd/proxmox-monitor-agent.service",
        "docs/deploy-lxc.md", "docs/install-agent.md", "docs/deployment-overview.md", "LICENSE", "SHA256SUMS",
        "CHANGELOG.md", "NOTES.md", "README.md", "LICENSES/libssl3.txt", "LICENSES/bottle.txt",
    } <= names  # fmt: skip
    checked = subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=folder)
    assert checked.returncode == 0
    assert len((folder / "SHA256SUMS").read_text().splitlines()) == len(names) - 1
    assert "- " in (folder / "NOTES.md").read_text()
