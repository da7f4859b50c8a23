"""Small Debian roots to try the shipped files in: bare ones for a chroot, and one that boots with systemd.

    roots -> a chroot -> a booted container

Made once by `./build.sh root` and kept in .build/; whatever a test writes in one is gone after it.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import ROOT, find_program

BUILD = ROOT / ".build"
ROOTS = Path(os.environ.get("BUILD_ROOTS") or BUILD / "roots")

# Bookworm has no Python and is the server's container; trixie is a host (PVE 9) with what Proxmox brings at least.
PACKAGES = {
    "bookworm": "ca-certificates,curl,systemd,systemd-sysv,dbus,procps,caddy,openssl",
    "trixie": "ca-certificates,curl,systemd,systemd-sysv,dbus,procps,openssl,perl,libnet-ssleay-perl,python3",
}

# --- roots ---


@contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """The tests run in two processes: what one makes, the other waits for."""
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / f"{name}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build(*argv: str, cwd: Path = ROOT, **env: str) -> str:
    """./build.sh …; what it said."""
    done = subprocess.run(["./build.sh", *argv], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def frozen_programs() -> dict[str, Path]:
    """Agent and server, frozen for this machine's architecture from the sources as they are."""
    with one_at_a_time("frozen"):
        told = build("all")
    return {name: ROOT / line.split()[0] for name, line in zip(("agent", "server"), told.splitlines()[-2:])}


def debian_root(suite: str) -> Path:
    directory = ROOTS / f"try-{suite}-{zlib.crc32(PACKAGES[suite].encode()):08x}"
    with one_at_a_time(directory.name):
        build("root", suite, str(directory), PACKAGES[suite])
    return directory


# --- a chroot ---


def in_root(root: Path, script: str, *, cache: str = "", user: str = "0:0", seconds: float = 60,
            **files: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in the root, with its own processes, network and empty /var/cache, /var/lib, /opt, /root, /tmp.

    `files` lie in /opt by their names. `cache` are mount options of /var/cache (noexec, size=4m).
    """
    shell = [f"cd {shlex.quote(str(root))}", "ip link set lo up"]
    for place in ("var/cache", "var/lib", "opt", "root", "tmp", "run", "sys"):
        options = {"var/cache": cache or "mode=755", "tmp": "mode=1777"}.get(place, "mode=755")
        shell.append(f"mount -t tmpfs -o {options} tmpfs {place}")
    shell.append("mount -t proc proc proc")
    shell.append("for one in usr/bin/python3.*; do [ ! -e $one ] || mount --bind /dev/null $one; done")  # none there
    shell += [f"cp {shlex.quote(str(path))} opt/{name}" for name, path in files.items()]
    shell.append(f"exec chroot --userspec={user} . /bin/sh -c {shlex.quote(script)}")
    own = ("--mount", "--pid", "--net", "--fork", "--kill-child")
    argv = [find_program("unshare"), *own, "sh", "-ec", "; ".join(shell)]
    env = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
    return subprocess.run(argv, env=env, capture_output=True, text=True, errors="replace", timeout=seconds,
                          stdin=subprocess.DEVNULL)  # fmt: skip


# --- a booted container ---


class Container:
    """A Debian with its own systemd as process 1, started from a root that it does not change."""

    def __init__(self, root: Path, name: str, *, netns: str, folder: Path, binds: dict[Path, str]):
        self.name, self.log = name, folder / f"{name}.console"
        argv = [
            find_program("systemd-nspawn"), "--quiet", "--volatile=overlay", "--boot", f"--directory={root}",
            f"--machine={name}", "--register=no", "--keep-unit", f"--network-namespace-path=/run/netns/{netns}",
            "--resolv-conf=off", "--timezone=off", f"--hostname={name}", "--console=pipe",
            *(f"--bind={source}:{target}" for source, target in binds.items()),
        ]  # fmt: skip
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.leader = 0

    def run(
        self, script: str, *, stdin: str = "", seconds: float = 120, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """As root, in a shell of the container."""
        argv = ["nsenter", f"--target={self.find_leader()}", "--mount", "--uts", "--ipc", "--pid", "--net", "--cgroup",
                "--root", "--wdns=/", "/bin/bash", "-euo", "pipefail", "-c", f"cd /root\n{script}"]  # fmt: skip
        given = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
                 "LC_ALL": "C.UTF-8", "TERM": "dumb", **env}  # fmt: skip
        return subprocess.run(argv, env=given, input=stdin, capture_output=True, text=True, timeout=seconds)

    def find_leader(self) -> int:
        """systemd-nspawn's child that is process 1 inside."""
        if not self.leader:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            self.leader = int(children[0])
        return self.leader

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
