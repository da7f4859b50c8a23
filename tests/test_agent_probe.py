"""The door outside: limits, process groups, and that nothing behind it can hold the agent up."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from agent_support import wait_for
from recorded import HOSTS, RecordedProbe

import agent


@pytest.fixture
def probe():
    return agent.Probe()


def failure(function, *arguments, **more):
    with pytest.raises(agent.SourceError) as failed:
        function(*arguments, **more)
    return failed.value


def children_named(mark):
    listed = subprocess.run(["pgrep", "-f", mark], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


# --- files ---


def test_file_is_read_as_text_and_odd_bytes_stay_visible(probe, tmp_path):
    (tmp_path / "f").write_bytes(b"ol\xc3\xa9 \xff\x00 z")
    text = probe.read(str(tmp_path / "f"))
    assert text == "olé \\xff\x00 z"
    text.encode("utf-8")


def test_missing_denied_and_directory_are_told_apart(probe, tmp_path):
    assert failure(probe.read, str(tmp_path / "none")).code == "missing"
    assert failure(probe.read, str(tmp_path)).code == "failed"
    assert failure(probe.list_dir, str(tmp_path / "none")).code == "missing"
    assert probe.list_dir(str(tmp_path)) == []


def test_file_above_the_limit_is_refused_and_not_cut(probe, tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 200_000)
    assert len(probe.read(str(tmp_path / "f"), 200_000)) == 200_000
    assert failure(probe.read, str(tmp_path / "f"), 199_999).code == "too_large"


def test_only_the_first_line_of_a_long_file_is_read(probe, tmp_path):
    (tmp_path / "f").write_bytes(b"a" * 100_000 + b"\n" + b"b" * 9_000_000)
    assert probe.read_line(str(tmp_path / "f")) == "a" * 100_000


def test_a_pipe_without_a_writer_does_not_block(probe, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert probe.read(str(tmp_path / "pipe")) == ""


class Hanging:
    """What lies below some folders does not answer until it is let go."""

    def __init__(self, monkeypatch, *folders):
        self.folders = folders
        self.let_go = threading.Event()
        self.asked = []
        for owner, name in ((agent, "read_bytes"), (os, "listdir"), (os, "stat"), (os, "statvfs"), (os.path, "exists")):
            monkeypatch.setattr(owner, name, self.held(getattr(owner, name)))
        monkeypatch.setattr(os.path, "realpath", self.held(os.path.realpath))

    def held(self, real):
        def ask(path, *more, **named):
            if isinstance(path, str) and path.startswith(self.folders):
                self.asked.append(path)
                self.let_go.wait(30)
                return None
            return real(path, *more, **named)

        return ask


@pytest.fixture
def hanging(monkeypatch):
    made = []

    def make(*folders):
        made.append(Hanging(monkeypatch, *folders))
        return made[-1]

    yield make
    monkeypatch.undo()
    for one in made:
        one.let_go.set()


SLOW_PATHS = ["/etc/pve/.rrd", "/boot", "/lib/modules", "/var/log/pve/tasks/index", "/etc/corosync/corosync.conf", "/usr/share/perl5/PVE/pvecfg.pm", "/sys/class/hwmon/hwmon3/temp1_input"]


@pytest.mark.parametrize("call", ["read", "read_line", "list_dir", "exists", "stat", "readlink"])
@pytest.mark.parametrize("path", SLOW_PATHS)
def test_a_read_that_may_block_has_a_deadline_and_is_not_started_twice(call, path, hanging):
    probe = agent.Probe(deadline=0.1)
    disk = hanging(path)
    began = time.monotonic()
    assert failure(getattr(probe, call), path).code == "timeout"
    assert failure(getattr(probe, call), path).code == "stuck"
    assert time.monotonic() - began < 10
    wait_for(lambda: disk.asked)  # on a busy machine the thread itself comes late
    assert disk.asked == [path]


def test_a_round_reads_ahead_what_the_last_one_asked_for_and_keeps_nothing_for_later(probe, tmp_path, monkeypatch):
    file, gone = tmp_path / "f", str(tmp_path / "gone")
    started = []
    monkeypatch.setattr(agent.Worker, "call", lambda worker, what, job, deadline=0.0: started.append(worker.name) or job())
    rounds = []
    for text in ("first", "second", "third"):
        file.write_text(text)
        started.clear()
        with probe.ahead():
            rounds.append((probe.read(str(file)), failure(probe.stat, gone).code, list(started)))
    file.write_text("later")
    assert [words[:2] for words in rounds] == [(text, "missing") for text in ("first", "second", "third")]
    assert [words[2] for words in rounds] == [["ahead", "disk", "disk"], ["ahead"], ["ahead"]]
    assert probe.read(str(file)) == "later"


def test_what_hangs_while_it_is_read_ahead_costs_its_own_values_alone(hanging, tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "AHEAD_DEADLINE", 0.1)
    (tmp_path / "f").write_text("well")
    sick = "/sys/class/hwmon/hwmon3/temp1_input"
    probe = agent.Probe(deadline=0.1)
    codes = []
    for number in range(3):
        if number == 1:
            hanging(sick)
        with probe.ahead():
            codes.append(failure(probe.read, sick).code)
            assert probe.read(str(tmp_path / "f")) == "well"
    assert codes == ["missing", "timeout", "stuck"]


def test_size_of_the_root_file_system_has_a_deadline(hanging):
    probe = agent.Probe(deadline=0.1)
    hanging("/")
    assert failure(probe.statvfs, "/").code == "timeout"
    assert failure(probe.statvfs, "/").code == "stuck"


def test_what_hangs_costs_its_own_values_alone(hanging):
    """A blocked /etc/pve, a suspended root pool, a dying NVMe: each in turn, and then all at once."""
    sources = {  # where it hangs, and a call that asks there
        "/etc/pve/": lambda probe: probe.read("/etc/pve/.rrd"),
        "/boot": lambda probe: probe.list_dir("/boot"),
        "/sys/class/hwmon/hwmon0/": lambda probe: probe.read("/sys/class/hwmon/hwmon0/temp1_input"),
    }
    well = [lambda probe: probe.statvfs("/"), lambda probe: probe.read("/proc/uptime"), lambda probe: probe.list_dir("/sys/class")]
    for sick in [*({folder} for folder in sources), set(sources)]:
        disk = hanging(*sick)
        probe = agent.Probe(deadline=0.1)
        for folder, ask in sources.items():
            try:
                ask(probe)
                code = ""
            except agent.SourceError as error:
                code = error.code
            assert (code == "timeout") is (folder in sick), (sick, folder, code)
        for ask in well:
            assert ask(probe)
        disk.folders = ("//none",)


def test_a_lane_gives_a_busy_disk_more_time_than_the_loop(monkeypatch):
    monkeypatch.setattr(agent, "LANE_DEADLINE", 5.0)
    monkeypatch.setattr(os, "listdir", lambda path: time.sleep(0.4) or ["vmlinuz"])
    probe, found = agent.Probe(deadline=0.1), []
    lane = threading.Thread(target=lambda: found.append(probe.list_dir("/boot")), name=agent.SLOW)
    lane.start()
    lane.join()
    assert found == [["vmlinuz"]]
    assert failure(probe.list_dir, "/boot").code == "timeout"


def test_it_answers_again_once_it_is_let_go(hanging):
    probe = agent.Probe(deadline=0.1)
    disk = hanging("/etc/pve/")
    assert failure(probe.read, "/etc/pve/.rrd").code == "timeout"
    disk.folders = ("//none",)
    disk.let_go.set()
    wait_for(lambda: not probe.workers["pve"].late[1].empty())
    assert failure(probe.read, "/etc/pve/no-such-file").code == "missing"


# --- commands ---


def test_stdout_is_given_and_stderr_is_kept_apart(probe):
    assert probe.run("sh", "-c", "echo out; echo noise >&2") == "out\n"


def test_exit_code_counts_and_the_error_quotes_stderr(probe):
    error = failure(probe.run, "sh", "-c", "echo half; echo 'no such pool' >&2; exit 3")
    assert error.code == "failed"
    assert "exit code 3" in error.detail and "no such pool" in error.detail
    assert probe.run("sh", "-c", "echo half; exit 3", ok=None) == "half\n"
    assert probe.run("sh", "-c", "exit 3", ok=(0, 3)) == ""


def test_command_that_is_not_installed_is_missing(probe):
    assert failure(probe.run, "no-such-command-here").code == "missing"


def test_permission_denied_is_told_apart(probe):
    assert failure(probe.run, "sh", "-c", "echo 'cannot open: Permission denied' >&2; exit 1").code == "denied"


def test_children_see_a_small_fixed_environment(probe, monkeypatch):
    leaks = ("LD_LIBRARY_PATH", "NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY", "WATCHDOG_USEC", "_PYI_ARCHIVE_FILE")
    for name in leaks:
        monkeypatch.setenv(name, "/leak")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    seen = dict(line.split("=", 1) for line in probe.run("env").splitlines())
    assert seen["LC_ALL"] == "C"
    assert seen["PATH"] == "/usr/sbin:/usr/bin:/sbin:/bin"
    assert not set(leaks) & set(seen)


def test_children_have_no_stdin_and_no_ignored_signals(probe):
    assert probe.run("cat") == ""
    ignored = [line for line in probe.run("cat", "/proc/self/status").splitlines() if line.startswith("SigIgn")]
    assert int(ignored[0].split()[1], 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1) == 0


def test_child_that_never_ends_is_killed_with_its_whole_group(probe):
    mark = f"987{os.getpid()}"
    began = time.monotonic()
    error = failure(probe.run, "sh", "-c", f"trap '' TERM; sleep {mark} & sleep {mark}", limit=0.3)
    assert error.code == "timeout"
    assert time.monotonic() - began < 2
    wait_for(lambda: not children_named(f"sleep {mark}"))


@pytest.mark.parametrize("stream", ["1", "2"])
def test_flood_is_cut_off_and_memory_stays_bounded(probe, stream):
    error = failure(probe.run, "sh", "-c", f"exec yes >&{stream}", limit=1.5)
    assert error.code in ("too_large", "timeout")


def test_noise_and_nul_come_through_as_text(probe):
    text = probe.run("sh", "-c", r"printf 'a\000b\377c'")
    assert text == "a\x00b\\xffc"


def test_grandchild_that_holds_the_pipe_is_not_waited_for(probe):
    began = time.monotonic()
    assert probe.run("sh", "-c", "sleep 5 & echo done", limit=4) == "done\n"
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("pipes", ["", ">/dev/null 2>&1 "])
def test_what_a_command_leaves_in_the_background_ends_with_it(probe, pipes):
    mark = f"986{os.getpid()}"
    assert probe.run("sh", "-c", f"for n in 1 2 3; do sleep {mark} {pipes}& done; echo done", limit=5) == "done\n"
    wait_for(lambda: not children_named(f"sleep {mark}"))


def test_long_output_of_both_streams_does_not_deadlock(probe):
    script = "import sys; sys.stderr.write('e' * 900000); sys.stdout.write('o' * 900000)"
    assert len(probe.run(sys.executable, "-c", script)) == 900_000


def test_closed_pipes_do_not_end_the_wait_for_the_child(probe):
    began = time.monotonic()
    assert probe.run("sh", "-c", "exec 1>&- 2>&-; sleep 0.3") == ""
    assert time.monotonic() - began > 0.25


def test_program_that_cannot_be_opened_costs_its_own_command_alone(tmp_path):
    """As on a suspended root pool: here a lease on the program keeps waiting whoever opens it [man fcntl, F_SETLEASE]."""
    shutil.copy("/bin/true", tmp_path / "slow")
    lease = os.open(tmp_path / "slow", os.O_RDONLY)
    fcntl.fcntl(lease, 10, signal.SIGURG)  # F_SETSIG: tell of the one who waits by a signal that is ignored
    fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    probe, began = agent.Probe(path=f"{tmp_path}:/usr/bin:/bin", deadline=0.3), time.monotonic()
    try:
        with pytest.raises(agent.SourceError, match="timeout: slow: no answer in 0.3 s"):
            probe.run("slow")
        with pytest.raises(agent.SourceError, match="stuck: true: left out, slow still does not answer"):
            probe.run("true")
        assert time.monotonic() - began < 5
    finally:
        fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(lease)
    wait_for(lambda: agent.attempt(probe.run, "slow") == "")
    assert probe.run("true") == ""


def test_child_that_cannot_be_killed_is_left_behind_and_not_started_again(probe, monkeypatch, tmp_path):
    """State D cannot be made at will: here the signal does not get through, which looks the same from outside."""
    monkeypatch.setattr(agent, "KILL_GRACE", 0.1)
    monkeypatch.setattr(agent, "kill_group", lambda child: None)
    probe.stuck_file = str(tmp_path / "stuck.json")
    argv = ("sh", "-c", "sleep 1.2")
    began = time.monotonic()
    assert failure(probe.run, *argv, limit=0.1).code == "stuck"
    again = failure(probe.run, *argv, limit=0.1)
    assert again.code == "stuck" and "not started again" in again.detail
    assert time.monotonic() - began < 1
    assert probe.run("echo", "others", "go", "on") == "others go on\n"

    restarted = agent.Probe(state=str(tmp_path))  # the list survives a restart of the agent
    assert failure(restarted.run, *argv).code == "stuck"

    time.sleep(1.4 - (time.monotonic() - began))
    assert probe.run("sh", "-c", "sleep 1.2", limit=3) == ""


def test_many_stuck_children_stop_new_ones(probe, monkeypatch):
    monkeypatch.setattr(agent, "is_gone", lambda pid, ticks: False)
    probe.stuck = {(f"zpool{number}",): (1, None) for number in range(agent.STUCK_LIMIT)}
    assert failure(probe.run, "true").code == "stuck"


def test_pid_that_went_to_another_process_is_not_taken_for_the_stuck_one():
    assert agent.is_gone(1, "12345678901")  # pid 1 runs, but began at another time
    assert not agent.is_gone(1, agent.start_ticks(1))


def test_stop_ends_what_is_under_way(probe):
    threading.Timer(0.2, probe.cancel).start()
    began = time.monotonic()
    failure(probe.run, "sleep", "20", limit=15)
    assert time.monotonic() - began < 2
    assert failure(probe.run, "true").code == "unavailable"


def test_no_descriptor_is_left_open(probe):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        probe.run("true")
        failure(probe.run, "false")
        failure(probe.run, "sleep", "9", limit=0.01)
    assert len(os.listdir("/proc/self/fd")) == before


# --- notes ---


def test_trace_names_every_file_and_command(probe, tmp_path):
    (tmp_path / "f").write_text("abc")
    notes = []
    probe.trace = lambda *note: notes.append(note)
    probe.read(str(tmp_path / "f"))
    failure(probe.read, str(tmp_path / "none"))
    probe.run("sh", "-c", "echo hi; exit 4", ok=None)
    kinds = [(kind, what, size, outcome) for kind, what, _, size, outcome in notes]
    assert kinds == [
        ("read", str(tmp_path / "f"), 3, "ok"),
        ("read", str(tmp_path / "none"), 0, "missing"),
        ("run", "sh -c echo hi; exit 4", 3, "exit 4"),
    ]


def test_problems_of_one_section_add_up(probe):
    probe.problem("pools", "timeout", "tank: no answer")
    probe.problem("pools", "failed", "rpool: gone")
    assert probe.problems == {"pools": {"code": "timeout", "detail": "tank: no answer; rpool: gone"}}


def test_lines_for_the_journal_cannot_be_forged():
    assert agent.one_line("pool\nagent: all well\x1b[0m") == "pool\\nagent: all well\\x1b[0m"


# --- what collectors use ---


def test_recorded_and_real_probe_are_both_what_a_collector_may_ask(probe):
    asked: list[agent.ProbeLike] = [probe, RecordedProbe(HOSTS / "pve8-mirror")]
    for one in asked:
        for name in vars(agent.ProbeLike):
            assert name.startswith("_") or hasattr(one, name), name


def test_optional_lets_only_what_is_missing_pass():
    def fail(code):
        raise agent.SourceError(code, "x")

    assert agent.optional(fail, "missing") is None
    assert agent.optional(fail, "missing", default="") == ""
    assert agent.optional(str, 5) == "5"
    for code in ("denied", "timeout", "stuck", "failed", "too_large"):
        assert failure(agent.optional, fail, code, default=[]).code == code


def test_a_part_that_fails_is_noted_and_the_rest_goes_on(probe):
    with agent.part_of(probe, "pools", "tank"):
        raise agent.SourceError("timeout", "no answer")
    with agent.part_of(probe, "pools"):
        raise agent.SourceError("failed", "rpool: gone")
    assert probe.problems == {"pools": {"code": "timeout", "detail": "tank: no answer; rpool: gone"}}
    with pytest.raises(ZeroDivisionError), agent.part_of(probe, "pools"):
        raise ZeroDivisionError
