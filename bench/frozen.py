#!/usr/bin/env python3
"""What the frozen files cost: size, first and warm start, memory of agent and server as they run.

    bench/frozen.py [--runs 15]        as root on Linux, after ./build.sh all

A first start unpacks into an empty /var/cache; a cold one has the file and what was unpacked evicted from memory; a
warm one finds all. Times are wall clock from exec to the first line in the log, best and median; memory is PSS from
smaps_rollup after the first report (the agent's over http; TLS is some 5 MB more).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

DIST = Path(__file__).resolve().parent.parent / "dist"
ARCH = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
PORT = "4977"


def program(name: str) -> Path:
    return DIST / f"proxmox-monitor-{name}_linux_{ARCH}"


def pss_bytes(pid: int) -> int:
    """Memory of a process, what it shares counted by its share."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("no Pss in smaps_rollup")


def time_to_line(argv: list[str], env: dict[str, str], log: Path, stop: bool = True) -> tuple[float, subprocess.Popen]:
    """Seconds from exec until the log has a line."""
    log.write_bytes(b"")
    with open(log, "wb") as handle:
        began = time.perf_counter()
        process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=handle, stderr=subprocess.STDOUT)
    while b"\n" not in log.read_bytes() and process.poll() is None:
        time.sleep(0.002)
    elapsed = time.perf_counter() - began
    if stop:
        end(process)
    return elapsed, process


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(20)


def show(what: str, seconds: list[float]) -> None:
    best, middle = min(seconds) * 1000, statistics.median(seconds) * 1000
    print(f"  {what:<28} best {best:6.0f} ms   median {middle:6.0f} ms   ({len(seconds)} runs)")


def evict(*roots: Path) -> None:
    """Take files out of the page cache."""
    os.sync()
    for path in (path for root in roots for path in (root, *root.rglob("*")) if path.is_file()):
        with open(path, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    name: str, argv: list[str], env: dict[str, str], folder: Path, runs: int, settle: Callable[[], None]
) -> None:
    path = program(name)
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    log, cache = folder / f"{name}.log", Path("/var/cache", f"proxmox-monitor-{name}")
    first = []
    for _ in range(5):
        shutil.rmtree(cache, ignore_errors=True)
        first.append(time_to_line(argv, env, log)[0])
    show("first start, unpacking", first)
    cold = []
    for _ in range(5):
        evict(path, cache)
        cold.append(time_to_line(argv, env, log)[0])
    show("cold start", cold)
    show("warm start", [time_to_line(argv, env, log)[0] for _ in range(runs)])
    size = sum(one.stat().st_size for one in cache.rglob("*") if one.is_file())
    print(f"  unpacked                     {size / 1e6:.1f} MB")
    _, process = time_to_line(argv, env, log, stop=False)
    settle()
    print(f"  PSS after the first report   {pss_bytes(process.pid) / 1e6:.1f} MB")
    end(process)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    if os.environ.get("BENCH_OWN_CACHE") != "yes":  # again, where /var/cache is its own
        script = "d=$(mktemp -d /var/tmp/frozen.XXXXXX); mount --bind $d /var/cache && \"$@\"; rm -rf $d"
        again = [sys.executable, os.path.abspath(__file__), "--runs", str(runs)]
        env = {**os.environ, "BENCH_OWN_CACHE": "yes"}
        os.execvpe("unshare", ["unshare", "--mount", "sh", "-c", script, "sh", *again], env)
    folder = Path(tempfile.mkdtemp(prefix="frozen-"))
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(folder), "DATABASE_PATH": str(folder / "monitor.db"),
           "PORT": PORT, "STATE_DIRECTORY": str(folder / "state"), "MALLOC_ARENA_MAX": "2"}  # fmt: skip
    server = str(program("server"))
    argv = [server, "register-host", "bench"]
    told = subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout
    config = folder / "agent.toml"
    token = told.splitlines()[1].removeprefix("TOKEN: ")
    config.write_text(f'server_url = "http://127.0.0.1:{PORT}"\nhost_id = "bench"\ntoken = "{token}"\n')
    config.chmod(0o600)
    agent_argv = [str(program("agent")), "start", "--config", str(config)]

    def one_report() -> None:
        argv = [str(program("agent")), "once", "--send", "--config", str(config)]
        subprocess.run(argv, env=env, capture_output=True, check=True, timeout=60)

    measure("server", [server, "serve"], env, folder, runs, one_report)
    _, running = time_to_line([server, "serve"], env, folder / "serve.log", stop=False)
    measure("agent", agent_argv, env, folder, runs, lambda: time.sleep(8))
    end(running)
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
