"""The frozen files as an operator gets them: they run without Python, unpack whole or not at all, and come out equal.

They are built for these tests from the sources as they are (a minute on a new machine, nothing when nothing changed).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from debian import ROOTS, build, debian_root, frozen_programs, in_root, one_at_a_time

import agent
import server

pytestmark = [
    pytest.mark.timeout(600),  # the first of them builds
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: Debian roots are made and entered"),
]
MIB = 1 << 20


@pytest.fixture(scope="session")
def frozen() -> dict[str, Path]:
    return frozen_programs()


@pytest.fixture(scope="session")
def bookworm() -> Path:
    return debian_root("bookworm")


@pytest.fixture(scope="session")
def trixie() -> Path:
    return debian_root("trixie")


@pytest.fixture(params=["bookworm", "trixie"])
def any_root(request) -> Path:
    return request.getfixturevalue(request.param)


# --- they run ---


def test_the_agent_runs_on_debian_without_python(any_root, frozen):
    done = in_root(any_root, "! python3 -V 2>/dev/null && /opt/agent version && /opt/agent once", agent=frozen["agent"])
    assert done.returncode == 0, done.stderr
    version, _, report = done.stdout.partition("\n")
    assert version == f"proxmox-monitor-agent {agent.VERSION}"
    assert json.loads(report)["host_id"] and "node" in json.loads(report)


SERVER_TOUR = r"""
cd /var/lib; export DATABASE_PATH=/var/lib/monitor.db PUBLIC_URL=http://127.0.0.1:4000 INSTALL_DIR=/opt/install
mkdir /opt/install; cp /opt/agent /opt/install/proxmox-monitor-agent_linux_$(dpkg --print-architecture)
/opt/server version; /opt/server migrate; /opt/server register-host pve1 > token 2>/dev/null
export DASHBOARD_PASSWORD_HASH="$(echo secret | /opt/server hash-password)"
/opt/server serve > log 2>&1 & server=$!
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
    curl -sf 127.0.0.1:4000/healthz > /dev/null && break; sleep 0.3; done
for path in login static/app.css static/app.js install/install.sh install/SHA256SUMS install/agent.py; do
    curl -sf 127.0.0.1:4000/$path > "$(basename $path)" && echo "$path ok"; done
curl -s -o /dev/null -w '%{http_code} log-in\n' -d password=secret 127.0.0.1:4000/login
curl -s -o /dev/null -w '%{http_code} wrong\n' -d password=wrong 127.0.0.1:4000/login
printf 'server_url = "http://127.0.0.1:4000"\nhost_id = "pve1"\ntoken = "%s"\n' \
    "$(sed -n 's/TOKEN: //p' token)" > agent.toml
chmod 600 agent.toml; /opt/agent once --send --config agent.toml
/opt/server backup copy.db; /opt/server check || true
kill $server; wait $server && echo stopped; cat log
"""


def test_the_server_runs_on_debian_without_python(any_root, frozen):
    done = in_root(any_root, SERVER_TOUR, agent=frozen["agent"], server=frozen["server"])
    told = done.stdout
    assert f"proxmox-monitor-server {server.VERSION}" in told, done.stderr
    for path in ("login", "static/app.css", "static/app.js", "install/install.sh", "install/agent.py"):
        assert f"{path} ok" in told
    assert "303 log-in" in told and "401 wrong" in told  # argon2 from the bundle
    assert '"accepted"' in told.replace(" ", "") and "integrity: ok" in told and "copy.db" in told
    assert "stopped" in told and "Traceback" not in told + done.stderr


CHILD = r"""#!/bin/sh
{ env; openssl version; curl --version; perl -MNet::SSLeay -e 'print "perl tls ok\n"'; } > /tmp/child 2>&1
"""


def test_commands_never_see_the_libraries_of_the_frozen_agent(trixie, frozen, tmp_path):
    """With the loader's library path left in place, each of these fails on Debian 13 (OPENSSL_3.x.0 not found)."""
    child = tmp_path / "zpool"
    child.write_text(CHILD)
    script = """cp /opt/child /usr/sbin/zpool; chmod 755 /usr/sbin/zpool; trap 'rm -f /usr/sbin/zpool' EXIT
        umount /proc; mount -t tmpfs tmpfs /proc
        mkdir -p /sys/module/zfs /proc/spl/kstat/zfs/tank; echo ONLINE > /proc/spl/kstat/zfs/tank/state
        /opt/agent once --explain >/tmp/told 2>&1; cat /tmp/child; grep ^run /tmp/told"""
    with one_at_a_time("trixie-zpool"):
        done = in_root(trixie, script, agent=frozen["agent"], child=child)
    assert "run " in done.stdout and "zpool" in done.stdout, done.stdout + done.stderr
    assert "OpenSSL 3." in done.stdout and "perl tls ok" in done.stdout and "curl 8" in done.stdout
    assert not re.search(r"^(LD_|_PYI|_MEI|NOTIFY|PYTHON)", done.stdout, re.MULTILINE)
    assert "not found" not in done.stdout


# --- they unpack whole, once, or not at all ---


def test_a_second_start_unpacks_nothing(bookworm, frozen):
    script = """/opt/agent version; stat -c %Z /var/cache/proxmox-monitor-agent/*/*/complete; sleep 1.1
        /opt/agent version; stat -c %Z /var/cache/proxmox-monitor-agent/*/*/complete; ls -A /tmp"""
    first, before, second, after = in_root(bookworm, script, agent=frozen["agent"]).stdout.splitlines()
    assert first == second
    assert before == after


def test_the_program_takes_the_place_of_the_shell(bookworm, frozen):
    """One process: systemd's notify and watchdog speak with the one it started."""
    script = "/opt/server serve > /dev/null 2>&1 & sleep 2; readlink /proc/$!/exe; kill $!; wait $!"
    done = in_root(bookworm, script, server=frozen["server"])
    assert re.fullmatch(r"/var/cache/proxmox-monitor-server/\S+/proxmox-monitor-server\n", done.stdout), done.stderr


@pytest.mark.parametrize("cut", [1, 1000, 3_000_000])
def test_a_half_written_file_never_starts(bookworm, frozen, cut):
    script = f"""/opt/agent version; head -c -{cut} /opt/agent > /opt/half; chmod 755 /opt/half
        /opt/half version; echo "code $?"; rm -r /var/cache/*
        /opt/half version; echo "code $?"; find /var/cache -type f"""
    done = in_root(bookworm, script, agent=frozen["agent"])
    assert done.stdout.splitlines()[1:] == ["code 1", "code 1"]
    assert done.stderr.count("is incomplete") == 2


def test_a_file_with_a_wrong_byte_never_starts(bookworm, frozen):
    script = """cp /opt/agent /opt/bad
        printf '\\377\\0\\377' | dd of=/opt/bad bs=1 seek=4000000 conv=notrunc status=none
        /opt/bad version; echo "code $?"; find /var/cache -type f"""
    done = in_root(bookworm, script, agent=frozen["agent"])
    assert done.stdout == "code 1\n"
    assert "is damaged" in done.stderr


def test_a_file_for_another_machine_says_so(bookworm, frozen):
    script = """mkdir /opt/bin; printf '#!/bin/sh\\necho riscv64\\n' > /opt/bin/uname; chmod 755 /opt/bin/uname
        PATH=/opt/bin:$PATH /opt/agent version; echo "code $?" """
    done = in_root(bookworm, script, agent=frozen["agent"])
    assert done.stdout == "code 1\n"
    assert "this machine is riscv64" in done.stderr


def test_two_first_starts_at_once_leave_one_tree(bookworm, frozen):
    script = """for i in 1 2 3 4; do /opt/agent version & done; wait; ls -A /var/cache/proxmox-monitor-agent/*"""
    *told, tree = in_root(bookworm, script, agent=frozen["agent"]).stdout.split("\n")[:-1]
    assert told == [f"proxmox-monitor-agent {agent.VERSION}"] * 4
    assert re.fullmatch("[0-9a-f]{64}", tree)


def test_an_unpacking_that_was_killed_is_done_anew(bookworm, frozen):
    script = """/opt/agent version & sleep 0.05; kill -9 $!; wait; sleep 0.2
        touch -d '2 hours ago' /var/cache/proxmox-monitor-agent/*/.new.* 2>/dev/null
        /opt/agent version; ls -A /var/cache/proxmox-monitor-agent/*"""
    version, tree = in_root(bookworm, script, agent=frozen["agent"]).stdout.splitlines()
    assert version == f"proxmox-monitor-agent {agent.VERSION}"
    assert re.fullmatch("[0-9a-f]{64}", tree)  # and what the first left behind is swept up


@pytest.mark.parametrize("options, told", [("noexec", "noexec"), ("size=4m", "is the disk full?")])
def test_a_cache_that_cannot_be_used_is_told_in_one_line(bookworm, frozen, options, told):
    script = 'HOME=/nonexistent /opt/agent version; echo "code $?"; ls -A /var/cache/proxmox-monitor-agent/*'
    done = in_root(bookworm, script, cache=options, agent=frozen["agent"])
    assert "code 1" in done.stdout
    assert told in done.stderr.splitlines()[-1]
    assert ".new" not in done.stdout  # nothing half unpacked stays


def test_a_user_who_may_not_write_the_cache_gets_one_of_his_own(bookworm, frozen):
    script = "mkdir /tmp/home; HOME=/tmp/home /opt/agent version; ls /tmp/home/.cache"
    done = in_root(bookworm, script, user="65534:65534", agent=frozen["agent"])
    assert done.stdout == f"proxmox-monitor-agent {agent.VERSION}\nproxmox-monitor-agent\n", done.stderr


def test_root_runs_nothing_from_a_directory_that_another_user_could_fill(bookworm, frozen):
    script = """/opt/agent version >/dev/null; chown -R 65534 /var/cache/proxmox-monitor-agent
        printf '#!/bin/sh\\necho caught\\n' | tee /var/cache/proxmox-monitor-agent/*/*/proxmox-monitor-agent >/dev/null
        /opt/agent version; ls $HOME/.cache"""
    done = in_root(bookworm, script, agent=frozen["agent"])
    assert "caught" not in done.stdout and "/var/cache/proxmox-monitor-agent" in done.stderr, done.stderr


NEXT_VERSION = """
trees() { ls /var/cache/proxmox-monitor-server; }
cd /var/lib; export DATABASE_PATH=/var/lib/monitor.db
/opt/server serve >log 2>&1 & old=$!
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do curl -sf 127.0.0.1:4000/healthz >/dev/null && break; sleep 0.3; done
cp /opt/server /opt/next; sed -i '1,/^main /s/__VERSION__/9.9.9/g' /opt/next
/opt/next version >/dev/null; trees; curl -sf 127.0.0.1:4000/login >/dev/null && echo "old one still whole"
kill $old; wait $old; rm -r /var/cache/proxmox-monitor-server/9.9.9; /opt/next version >/dev/null; trees
""".replace("__VERSION__", re.escape(server.VERSION))


def test_an_upgrade_pulls_nothing_from_under_the_running_version(bookworm, frozen):
    done = in_root(bookworm, NEXT_VERSION, server=frozen["server"])
    assert done.stdout.splitlines() == [server.VERSION, "9.9.9", "old one still whole", "9.9.9"], done.stderr


# --- what is in them ---


@pytest.fixture(scope="session")
def trees(frozen, tmp_path_factory) -> dict[str, Path]:
    """The two programs unpacked on this machine."""
    home = tmp_path_factory.mktemp("unpacked")
    found = {}
    for name, path in frozen.items():
        head, _, payload = path.read_bytes().partition(b'\nmain "$@"\nexit 1\n')
        assert head.startswith(b"#!/bin/sh\n")
        archive = home / f"{name}.tar.gz"
        archive.write_bytes(payload)
        shutil.unpack_archive(archive, home / name)
        found[name] = home / name
    return found


def elf_files(tree: Path) -> list[Path]:
    return [path for path in tree.rglob("*") if path.is_file() and path.read_bytes()[:4] == b"\x7fELF"]


def test_they_need_no_newer_c_library_than_debian_12_has(trees):
    for tree in trees.values():
        for path in elf_files(tree):
            versions = re.findall(rb"GLIBC_2\.(\d+)", path.read_bytes())
            assert max(map(int, versions), default=0) <= 36, path.name


def test_they_bundle_nothing_under_the_gpl_and_no_test_framework(trees):
    for name, tree in trees.items():
        names = [path.name for path in tree.rglob("*")]
        assert not [one for one in names if re.match(r"(lib)?(readline|ncurses|tinfo|bz2|lzma|gdbm|db-)", one)], name


def test_what_the_server_reads_at_run_time_is_inside(trees):
    inside = trees["server"] / "_internal"
    for path in ("schema.sql", "agent.py", "packaging/install.sh", "systemd/proxmox-monitor-agent.service"):
        assert (inside / path).read_bytes() == (ROOT / path).read_bytes()
    assert {path.name for path in (ROOT / "templates").iterdir()} == {p.name for p in (inside / "templates").iterdir()}
    named = re.findall(r'resource\("([^"]+)"', (ROOT / "server.py").read_text())
    assert set(named) <= {"schema.sql", "templates", "dist"}  # another one has to be added to packaging/freeze.sh


@pytest.mark.parametrize("name", ["agent", "server"])
def test_the_bill_of_materials_names_each_part_with_its_licence(frozen, trees, name):
    bill = json.loads((frozen[name].parent / f"{frozen[name].name}.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    parts = {one["name"]: one for one in bill["components"]}
    assert {"libpython3.11", "libssl3", "zlib1g", "pyinstaller"} <= set(parts)
    if name == "server":
        assert {"bottle", "waitress", "argon2-cffi", "argon2-cffi-bindings", "libsqlite3-0"} <= set(parts)
    for part in parts.values():
        assert part["version"] and part["purl"].startswith(("pkg:deb/", "pkg:pypi/")) and part["licenses"]
        text = (frozen[name].parent / "LICENSES" / f"{part['name']}.txt").read_text()
        assert len(text) > 300 and text in (trees[name] / "LICENSES.txt").read_text()


def test_the_sums_fit(frozen):
    folder = frozen["agent"].parent
    named = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    for path in frozen.values():
        assert named[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_they_stay_small(frozen):
    assert frozen["agent"].stat().st_size <= 8_000_000
    assert frozen["server"].stat().st_size <= 10_000_000


def test_the_first_log_line_comes_soon_after_a_warm_start(bookworm, frozen):
    """0.15 s when the machine is idle; ten times that is allowed here, where other tests run beside."""
    script = """cd /var/lib; printf 'server_url = "http://127.0.0.1:9"\\ntoken = "whsec_%s="\\n' \
        AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA > a.toml; chmod 600 a.toml; /opt/agent version
        a=$(date +%s%N); /opt/agent start --config a.toml > log & until [ -s log ]; do sleep 0.01; done
        b=$(date +%s%N); kill $!; head -1 log; echo $(( (b - a) / 1000000 ))"""
    _, first, elapsed = in_root(bookworm, script, agent=frozen["agent"]).stdout.splitlines()
    assert first.startswith("agent: starting with host_id=")
    assert int(elapsed) < 1500


# --- they come out the same ---


def test_two_builds_give_the_same_bytes(frozen, tmp_path):
    """In another folder, with other dates on the files, and another environment made for it."""
    copy = tmp_path / "elsewhere"
    ignored = shutil.ignore_patterns(".git", ".venv", ".build", "dist", ".demo", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored, copy_function=shutil.copy)
    for path in copy.rglob("*"):
        os.utime(path, (time.time() - 1_000_000,) * 2)
    dated = build_date()
    with one_at_a_time("frozen"):
        build("all", cwd=copy, BUILD_ROOTS=str(ROOTS.resolve()), SOURCE_DATE_EPOCH=dated)
    for path in frozen.values():
        assert (copy / "dist" / path.name).read_bytes() == path.read_bytes()
        bill = path.name + ".cdx.json"
        assert (copy / "dist" / bill).read_bytes() == (path.parent / bill).read_bytes()


def build_date() -> str:
    if "SOURCE_DATE_EPOCH" in os.environ:
        return os.environ["SOURCE_DATE_EPOCH"]
    shown = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=True)
    return shown.stdout.strip()
