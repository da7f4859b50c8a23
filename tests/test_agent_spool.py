"""Reports that wait on disk: whole or not at all, in order, bounded, and every loss is counted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from agent_support import registered, wait_for

import agent

ROOT = Path(__file__).resolve().parent.parent
NOW = 1_763_880_000.0


def new_spool(folder, *, max_bytes=1 << 20, max_seconds=7 * 86400):
    return agent.Spool(str(folder), max_bytes=max_bytes, max_seconds=max_seconds)


def push(spool, *bodies, now=NOW):
    for body in bodies:
        spool.push(agent.Message(body), now)


def bodies(spool, limit=500):
    return [body for _, body in spool.oldest(limit)]


def test_reports_come_back_oldest_first_and_newest_alone(tmp_path):
    spool = new_spool(tmp_path)
    push(spool, b"1", b"2", b"3")
    assert bodies(spool) == [b"1", b"2", b"3"]
    assert bodies(spool, 2) == [b"1", b"2"]
    assert spool.newest()[1] == b"3"
    assert spool.count == 3


def test_order_does_not_depend_on_the_wall_clock(tmp_path):
    spool = new_spool(tmp_path)
    push(spool, b"1", now=NOW)
    push(spool, b"2", now=NOW - 5000)
    assert bodies(new_spool(tmp_path)) == [b"1", b"2"]


def test_discarded_reports_are_gone_for_good(tmp_path):
    spool = new_spool(tmp_path)
    push(spool, b"1", b"2")
    assert spool.delivered([spool.oldest(1)[0][0]]) == 1
    assert bodies(spool) == bodies(new_spool(tmp_path)) == [b"2"]
    assert spool.count == 1


def test_next_run_goes_on_behind_the_last(tmp_path):
    push(new_spool(tmp_path), b"1", b"2")
    spool = new_spool(tmp_path)
    assert spool.count == 2
    push(spool, b"3")
    assert bodies(spool) == [b"1", b"2", b"3"]


def test_full_spool_drops_the_oldest_and_counts_them(tmp_path):
    spool = new_spool(tmp_path, max_bytes=5 * 4096)
    push(spool, *[b"%d" % number for number in range(8)])
    assert bodies(spool) == [b"3", b"4", b"5", b"6", b"7"]
    assert spool.dropped == 3
    assert sum(4096 for _ in (tmp_path / "spool").iterdir()) <= 5 * 4096


def test_old_reports_go_when_they_are_over_age(tmp_path):
    """A report every half hour, for a day and a half."""
    for name, restarts in (("a", False), ("b", True)):
        spool = new_spool(tmp_path / name, max_seconds=86400)
        for number in range(72):
            spool = new_spool(tmp_path / name, max_seconds=86400) if restarts else spool
            push(spool, b"%d" % number, now=NOW + 1800 * number)
        assert bodies(spool) == [b"%d" % number for number in range(23, 72)]
        assert spool.dropped == 23


@pytest.mark.parametrize("years", [1, -1, 30, -50])
def test_clock_that_jumps_and_comes_back_makes_nothing_over_age(tmp_path, years):
    spool = new_spool(tmp_path, max_seconds=7 * 86400)
    jump = years * 365 * 86400
    for number in range(30):
        wrong = jump if 10 <= number < 20 else 0
        push(spool, b"%d" % number, now=NOW + 30 * number + wrong)
        if number in (5, 12, 25):
            spool = new_spool(tmp_path, max_seconds=7 * 86400)
    assert bodies(spool) == [b"%d" % number for number in range(30)]
    assert spool.dropped == 0


def test_loss_is_remembered_over_restarts_until_it_was_told(tmp_path):
    spool = new_spool(tmp_path, max_bytes=4096)
    push(spool, b"1", b"2", b"3")
    spool = new_spool(tmp_path, max_bytes=4096)
    assert spool.dropped == 2
    spool.delivered([], agent.Message(b"{}", dropped_total=spool.dropped_total))
    spool.told_total = spool.dropped_total
    spool.save_losses()
    assert spool.dropped == 0
    push(spool, b"4")
    assert new_spool(tmp_path).dropped == 1


def test_half_a_file_of_a_crash_is_swept_away(tmp_path):
    push(new_spool(tmp_path), b"1")
    (tmp_path / "spool" / "000000000002-1763880000.json.gz.tmp").write_bytes(b"\x1f\x8b")
    spool = new_spool(tmp_path)
    assert bodies(spool) == [b"1"]
    assert len(os.listdir(tmp_path / "spool")) == 1


def test_damaged_file_is_set_aside_and_does_not_block_the_rest(tmp_path):
    spool = new_spool(tmp_path)
    push(spool, b"1", b"2")
    first = sorted((tmp_path / "spool").iterdir())[0]
    first.write_bytes(first.read_bytes()[:10])
    assert bodies(spool) == [b"2"]
    assert spool.count == 1
    assert [path.name for path in (tmp_path / "rejected").iterdir()] == [f"{first.name}.bad"]
    assert spool.dropped == 1


@pytest.mark.parametrize("harm", ["torn", "folder", "huge", "zeros", "unreadable", "gzip of nothing good"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_bad_file_is_stepped_over_counted_and_blocks_nothing(tmp_path, monkeypatch, harm, place):
    spool = new_spool(tmp_path, max_bytes=1 << 26)
    push(spool, b"1", b"2", b"3")
    number = {"first": 0, "middle": 1, "last": 2}[place]
    path = sorted((tmp_path / "spool").iterdir())[number]
    if harm == "torn":
        path.write_bytes(path.read_bytes()[:-3])
    elif harm == "folder":
        path.unlink()
        path.mkdir()
    elif harm == "huge":
        path.write_bytes(os.urandom(1 << 20) * 17)
    elif harm == "zeros":
        path.write_bytes(bytes(len(path.read_bytes())))
    elif harm == "unreadable":  # a dying disk
        real = agent.read_bytes

        def read_bytes(name, *more, **named):
            if name == str(path):
                raise OSError(5, "Input/output error")
            return real(name, *more, **named)

        monkeypatch.setattr(agent, "read_bytes", read_bytes)
    else:
        path.write_bytes(b"\x1f\x8b" + os.urandom(100))
    good = [body for seq, body in enumerate((b"1", b"2", b"3")) if seq != number]
    assert spool.newest()[1] == good[-1]
    assert bodies(spool) == bodies(spool) == good
    assert (spool.count, spool.dropped) == (2, 1)
    assert [file.name for file in (tmp_path / "rejected").iterdir()] == [f"{path.name}.bad"]


def test_bad_file_on_a_disk_where_nothing_can_be_moved_is_counted_once(tmp_path, monkeypatch):
    spool = new_spool(tmp_path)
    push(spool, b"1", b"2")
    sorted((tmp_path / "spool").iterdir())[0].write_bytes(b"x")

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    for name in ("rename", "unlink", "replace"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(agent, "write_file", refuse)
    assert bodies(spool) == bodies(spool) == [b"2"]
    assert (spool.count, spool.dropped) == (1, 1)
    spool.delivered([spool.newest()[0]])  # what cannot be removed is not sent again and again
    assert bodies(spool) == [] and spool.count == 0


def test_rejected_folder_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "REJECTED_LIMIT", 3)
    spool = new_spool(tmp_path)
    for number in range(6):
        spool.reject("", b"%d" % number, "test")
    kept = sorted((tmp_path / "rejected").iterdir())
    assert [agent.unpack(path.read_bytes()) for path in kept] == [b"3", b"4", b"5"]
    assert spool.dropped == new_spool(tmp_path).dropped == 3  # what falls out is lost


def test_batch_is_bounded_in_size(tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "BATCH_LIMIT", 250)
    spool = new_spool(tmp_path)
    push(spool, *[b"x" * 100] * 5)
    assert len(bodies(spool)) == 2
    push(new_spool(tmp_path / "b"), b"y" * 1000)
    assert len(bodies(new_spool(tmp_path / "b"))) == 1  # one report always goes


def test_foreign_files_are_left_alone(tmp_path):
    spool = new_spool(tmp_path)
    (tmp_path / "spool" / "README").write_text("mine")
    (tmp_path / "spool" / "a-b.json.gz").write_text("mine")
    push(spool, b"1")
    assert bodies(new_spool(tmp_path)) == [b"1"]
    assert (tmp_path / "spool" / "README").exists()


def test_emptied_folder_is_noticed(tmp_path):
    spool = new_spool(tmp_path)
    push(spool, b"1")
    for path in (tmp_path / "spool").iterdir():
        path.unlink()
    assert bodies(spool) == []
    assert spool.count == 0


def test_disk_that_hangs_costs_the_deadline_once_and_then_nothing(tmp_path, monkeypatch):
    spool = new_spool(tmp_path)
    spool.disk.deadline = 0.2
    real = agent.write_file
    monkeypatch.setattr(agent, "write_file", lambda path, content: time.sleep(0.6) or real(path, content))
    began = time.monotonic()
    for code in ("timeout", "stuck", "stuck"):
        with pytest.raises(agent.SourceError) as failed:
            push(spool, b"1")
        assert failed.value.code == code
    assert time.monotonic() - began < 0.4
    time.sleep(0.6)
    push_until = wait_for(lambda: spool.disk.late is None or not spool.disk.late[1].empty())
    assert push_until
    monkeypatch.setattr(agent, "write_file", real)
    push(spool, b"2")
    assert spool.newest()[1] == b"2"


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    spool = new_spool(tmp_path)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    for _ in range(3):
        with pytest.raises(agent.SourceError, match="No space left"):
            push(spool, b"1")
    assert list((tmp_path / "spool").iterdir()) == []


def test_write_that_ends_after_its_deadline_keeps_the_memory_with_its_report(tmp_path, monkeypatch):
    spool = new_spool(tmp_path)
    spool.disk.deadline = 0.1
    gate, real = threading.Event(), agent.write_file
    monkeypatch.setattr(agent, "write_file", lambda path, content: gate.wait(10) and real(path, content))
    message = agent.Message(b"1", memories={"tasks": b'{"offset":5}'})
    with pytest.raises(agent.SourceError):
        spool.push(message, NOW)
    assert not message.file
    gate.set()
    wait_for(lambda: (tmp_path / "memory" / "tasks.json").exists())
    wait_for(lambda: not spool.disk.late[1].empty())
    spool.push(message, NOW)  # the loop tries again: it is there already
    assert bodies(spool) == [b"1"] and spool.count == 1
    assert new_spool(tmp_path).memories.values == {"tasks": {"offset": 5}}


def test_report_that_was_delivered_is_not_put_on_disk_any_more(tmp_path):
    spool = new_spool(tmp_path)
    message = agent.Message(b"1", memories={"tasks": b"{}"})
    assert spool.delivered([], message) == 0
    spool.push(message, NOW)
    assert bodies(spool) == [] and (tmp_path / "memory" / "tasks.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"dropped_total": "x", "told_total": 1}', "[" * 100_000, "\x00" * 50])
def test_damaged_count_of_losses_begins_anew(tmp_path, content):
    push(new_spool(tmp_path), b"1")
    (tmp_path / "losses.json").write_text(content)
    spool = new_spool(tmp_path)
    assert (spool.dropped, bodies(spool)) == (0, [b"1"])


def test_full_disk_is_an_error_and_no_loss(tmp_path, monkeypatch):
    def no_space(path, content):
        raise OSError(28, "No space left on device")

    spool = new_spool(tmp_path)
    monkeypatch.setattr(agent, "write_file", no_space)
    with pytest.raises(agent.SourceError, match="No space left"):
        push(spool, b"1")
    assert spool.count == 0


def test_what_push_has_returned_for_survives_sigkill(tmp_path):
    """A process pushes and prints the number; it is killed at some moment; every number printed is there, whole."""
    script = (
        "import agent, sys\n"
        f"spool = agent.Spool({str(tmp_path)!r}, max_bytes=1 << 26, max_seconds=1e9)\n"
        "for n in range(10**6):\n"
        "    spool.push(agent.Message(b'%d' % n * 500), 1.8e9)\n"
        "    print(n, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    printed = [child.stdout.readline() for _ in range(20)]  # then it goes on, and is hit somewhere
    child.send_signal(signal.SIGKILL)
    printed += child.communicate()[0].split("\n")[:-1]
    spool = new_spool(tmp_path, max_bytes=1 << 26)
    found = [body for _, body in spool.oldest(10**6)]
    wanted = [b"%d" % n * 500 for n in range(len(printed))][: len(found)]
    assert found[: len(wanted)] == wanted
    assert spool.count in (len(printed), len(printed) + 1)


# --- memories ---


def test_memory_is_written_when_it_changed_and_read_at_the_next_start(tmp_path):
    with registered(pools=("medium", print), tasks=("fast", print)):
        memories = new_spool(tmp_path).memories
        memories.values["pools"] = {"last_scrub": {"tank": 1}}
        texts = memories.changed(["pools", "tasks"], 0.0)
        assert set(texts) == {"pools"}
        memories.save(texts, 0.0)
        assert memories.changed(["pools"], 1.0) == {}
        assert new_spool(tmp_path).memories.values == {"pools": {"last_scrub": {"tank": 1}}}


def test_memory_of_fast_sections_is_written_seldom_and_that_of_events_always(tmp_path):
    with registered(node=("fast", print), tasks=("fast", print)):
        memories = new_spool(tmp_path).memories
        written = {"node": 0, "tasks": 0}
        for second in range(0, 601, 10):
            memories.values = {"node": {"jiffies": second}, "tasks": {"offset": second}}
            texts = memories.changed(["node", "tasks"], float(second))
            memories.save(texts, float(second))
            for name in texts:
                written[name] += 1
    assert written == {"node": 3, "tasks": 61}


def test_broken_memory_begins_anew(tmp_path, capsys):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "pools.json").write_text("[1, 2")
    (tmp_path / "memory" / "disks.json").write_text(json.dumps({"a": 1}))
    assert new_spool(tmp_path).memories.values == {"disks": {"a": 1}}
    assert "pools.json cannot be used" in capsys.readouterr().err


def test_reports_made_before_the_clock_was_set_are_not_over_age(tmp_path):
    spool = new_spool(tmp_path, max_seconds=86400)
    push(spool, b"1", now=100.0)
    push(spool, b"2", now=NOW)
    assert bodies(spool) == [b"1", b"2"]


def test_disk_that_cannot_be_used_at_all_does_not_keep_the_agent_from_starting(tmp_path, capsys):
    (tmp_path / "spool").write_text("a file where the folder should be")
    spool = new_spool(tmp_path)
    assert spool.count == 0
    assert "kept in memory" in capsys.readouterr().out
    with pytest.raises(agent.SourceError):
        push(spool, b"1")


def test_memory_that_is_no_json_is_left_out(tmp_path):
    with registered(pools=("medium", print), disks=("slow", print)):
        memories = new_spool(tmp_path).memories
        memories.values = {"pools": {"a": {1, 2}}, "disks": {"a": 1}}
        assert set(memories.changed(["pools", "disks"], 0.0)) == {"disks"}


def test_what_stands_beside_memories_is_no_memory(tmp_path, capsys):
    (tmp_path / "memory").mkdir()
    for name, text in (("pools.json", '{"seen": 1}'), ("pools.json.tmp", '{"seen": 2}'), ("disks.json", "[1]"), ("README", "{}")):
        (tmp_path / "memory" / name).write_text(text)
    assert agent.load_memories(str(tmp_path / "memory")) == {"pools": {"seen": 1}}
    said = capsys.readouterr()
    assert "disks.json" in said.err and said.out == ""  # standard output is for `once`
    assert agent.load_memories(str(tmp_path / "nothing")) == {}


@pytest.mark.parametrize("code", [agent.errno.EMFILE, agent.errno.ENFILE, agent.errno.ENOMEM])
def test_a_machine_that_has_no_room_for_one_more_file_damages_no_report(tmp_path, monkeypatch, code):
    spool = new_spool(tmp_path)
    push(spool, b"1", b"2")
    with monkeypatch.context() as patch:
        patch.setattr(agent, "read_bytes", lambda *_, **__: (_ for _ in ()).throw(OSError(code, "full")))
        with pytest.raises(agent.SourceError):
            spool.oldest(5)
    assert bodies(spool) == [b"1", b"2"] and spool.dropped == 0


def test_a_report_of_this_moment_that_is_refused_is_done_with(tmp_path):
    """Its memories are kept as if it had been taken: else its events come again, and are refused again, for ever."""
    spool = new_spool(tmp_path)
    first, second = agent.Message(b"1", memories={"tasks": b'{"n": 1}'}), agent.Message(b"2")
    spool.reject("", b"1", "422", first)
    spool.reject("", b"2", "422", second)
    assert first.is_settled and agent.load_memories(str(tmp_path / "memory")) == {"tasks": {"n": 1}}
    spool.push(first, NOW)
    assert spool.count == 0
    assert len(os.listdir(tmp_path / "rejected")) == 2  # neither took the other's name


def test_a_report_on_disk_that_is_refused_keeps_its_name(tmp_path):
    spool = new_spool(tmp_path)
    push(spool, b"1", b"2")
    name, body = spool.oldest(1)[0]
    spool.reject(name, body, "422")
    assert os.listdir(tmp_path / "rejected") == [name]
    push(spool, b"3")
    assert [int(name.partition("-")[0]) for name, _ in spool.oldest(5)] == [2, 3]


def test_a_spool_that_is_just_full_drops_nothing(tmp_path):
    spool = new_spool(tmp_path, max_bytes=3 * 4096, max_seconds=600)
    push(spool, b"1", b"2", b"3")
    assert bodies(spool) == [b"1", b"2", b"3"] and spool.dropped == 0
    push(spool, b"4", now=NOW + 599)
    assert bodies(spool) == [b"2", b"3", b"4"] and spool.dropped == 1
    assert spool.bytes == 3 * 4096


def test_a_report_as_old_as_it_may_be_is_kept(tmp_path):
    spool = new_spool(tmp_path, max_seconds=600)
    push(spool, b"1")
    push(spool, b"2", now=NOW + 600)
    assert bodies(spool) == [b"1", b"2"]
    push(spool, b"3", now=NOW + 601)
    assert bodies(spool) == [b"2", b"3"]


def test_losses_are_written_where_only_their_own_block_is_left(tmp_path, monkeypatch):
    spool = new_spool(tmp_path)
    spool.lose(123456)
    spool.save_losses()
    real = agent.write_file

    def full(path, *rest):
        if path == spool.losses:
            raise OSError(agent.errno.ENOSPC, "No space left on device")
        return real(path, *rest)

    monkeypatch.setattr(agent, "write_file", full)
    spool.dropped_total = 7  # fewer letters than what stands there
    spool.save_losses()
    assert json.loads((Path(spool.losses)).read_text())["dropped_total"] == 7
    assert new_spool(tmp_path).dropped_total == 7


@pytest.mark.parametrize("put, since", [(NOW, NOW), (agent.CLOCK_UNSET + 1, agent.CLOCK_UNSET + 1), (5.0, NOW + 60)])
def test_since_when_reports_wait(tmp_path, put, since):
    spool = new_spool(tmp_path)
    assert spool.waiting_since(NOW + 60) is None
    push(spool, b"1", now=put)
    push(spool, b"2", now=NOW + 30)
    assert spool.waiting_since(NOW + 60) == since


def test_many_reports_of_one_moment_are_not_old(tmp_path):
    spool = new_spool(tmp_path, max_seconds=5)
    push(spool, *[b"%d" % number for number in range(10)])
    assert spool.count == len(bodies(spool)) == 10


def test_a_refused_report_that_cannot_be_set_aside_is_counted_and_stands_in_nobodys_way(tmp_path, monkeypatch, capsys):
    spool = new_spool(tmp_path)
    push(spool, b"1", b"2")
    real = agent.write_file

    def full(path, *rest):
        if path.startswith(spool.rejected):
            raise OSError(agent.errno.ENOSPC, "No space left on device")
        return real(path, *rest)

    monkeypatch.setattr(agent, "write_file", full)
    spool.reject(*spool.oldest(1)[0], "422")
    assert bodies(spool) == [b"2"] and spool.dropped_total == 1
    assert "nowhere" in capsys.readouterr().out
