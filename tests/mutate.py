#!/usr/bin/env python3
"""Mutation score of what must not be wrong: ./build.sh mutate [--most N] [--seed N] [--jobs N] [PART…]

Each function of a part is changed in one place at a time (another comparison, `or` for `and`, a number one more, a
condition that always holds, a statement left out …), and a test has to fail. A runner of our own: mutmut and
cosmic-ray change whole files, and both programs are one file each of which a part is a few hundred lines. Here the
tests are collected once, a first run notes which test executes which statement, and each change is made in a forked
process, which runs the tests that execute it until the first one fails.

    parts -> changes of a function -> which test runs what -> one fork for each change -> score, and what survived
"""

from __future__ import annotations

import argparse
import ast
import copy
import inspect
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import pytest  # noqa: E402
from _pytest.runner import runtestprotocol  # noqa: E402

import agent  # noqa: E402
import server  # noqa: E402

GOAL = 0.85
SLOW_TIMES, GRACE_SECONDS = 5, 10  # how much longer than without a change the tests may take: then it hangs
TESTS_SECONDS = 30  # of tests for one change; what these do not see counts as not seen
MEMORY_LIMIT = 8 << 30  # for a change that takes ever more


class Part(NamedTuple):
    module: Any
    functions: str  # names, with their class; `section:NAME` is all of a section
    tests: str  # files


PARTS = {
    "signature": [
        Part(server, "check_signature host_key", "test_security_requests.py test_server_ingest.py test_server_auth.py"),
        Part(agent, "section:signature", "test_agent_signature.py test_agent_delivery.py"),
    ],
    "answers": [
        Part(agent, "judge code_of server_time retry_after Answer.fields", "test_agent_answers.py test_agent_delivery.py"),
    ],
    "ingest": [
        Part(server, "section:ingest unpack check_reports check_report Store.write Store._lead Store._commit Store._attempt",
             "test_server_ingest.py test_server_limits.py test_server_database.py test_server_answers.py"),
    ],
    "spool": [
        Part(agent, "section:spool", "test_agent_spool.py test_agent_mail.py test_agent_faults.py"),
    ],
    "rules": [
        Part(server, "Rule.level Rule.severity evaluate is_worse judge judge_rule forget_gone Layers.limits objects_of covers tell_stumble knows",
             "test_server_rules.py test_server_rules_apart.py test_server_alerting.py"),
    ],
    "routing": [
        Part(server, "Channel.wants routed_by guest_tags concerned_by is_silenced silence_fits tell tell_channels tell_end news_of "
                     "make_message has_token", "test_server_told.py test_server_notifications.py test_server_outbox.py test_server_alerting.py"),
    ],
}  # fmt: skip

# Survivors that change nothing that anybody could see, which are not tried again: (function, change) -> why.
JUDGED: dict[tuple[str, str], str] = {
    ("webhook_headers", "32: one more in: message_id = 'msg_' + hashlib.sha256(body).hexdigest()[:32]"):
        "33 digits of a hash tell reports apart as well as 32",
    ("retry_after", "6: one more in: return float(text[:6]) if text.isascii() and text.isdigit() else 0.0"):
        "what is above a minute counts as a minute",
    ("Message.__init__", "0.0: one more in: self.offered_at = 0.0"): "it is set before it is read",
    ("Spool.open", "448: one more in: os.makedirs(folder, mode=448, exist_ok=True)"): "one bit less: others may enter, and read nothing",
    ("Spool._make_room", "if self.bytes + size <= self.max_bytes and self.age <= self.max_seconds:: always False"):
        "a short cut: the loop below finds nothing to drop either",
    ("Spool._make_room", "self.bytes + size <= self.max_bytes: Lt"): "the same short cut",
    ("Spool._make_room", "True: the other in: for name, self.age in zip(names, ages_of(names, now), strict=True):"):
        "both are of the same length always",
    ("on_disk", "return self.disk.call(what, lambda: method(self, *args, **named)): None"): "inside a decorator: done when the program is loaded",
    ("Spool.open", "left out: self._save_losses()"): "writes what was read a moment before",
    ("Spool._size", "0: one more in: return 0"): "of a file that is gone",
    ("Spool._make_room", "self.age + clock_step(self.newest_at, now) if self.count else 0.0: always True"):
        "the loop below finds how old each is; this says only whether to look",
    ("Spool._make_room", "0.0: one more in: self.age = self.age + clock_step(self.newest_at, now) if self.count else 0.0"): "the same",
    ("Spool._make_room", "if lost:: always True"): "counts 0 lost ones, and writes what stands there already",
    ("Store._attempt", "left out: db.execute('RELEASE one')"): "the end of the transaction releases all; it only keeps the journal short",
    ("guest_changes", "if after == before:: always False"): "a short cut: where nothing differs nothing is told",
    ("fills_a_gap", "return False: None"): "it is only asked whether it is so",
    ("is_worse", "return False: None"): "it is only asked whether it is so",
    ("insert_reports", "gaps and sum((len(run.ranges) for run in monitor.runs.values())) > SPANS_AT_HAND: Or"): "what is not at hand is read again",
    ("insert_reports", "len(run.ranges) > SPANS_AT_HAND // RUNS_AT_HAND: GtE"): "says only whether to count",
    ("insert_reports", "SPANS_AT_HAND // RUNS_AT_HAND: Mult"): "at the numbers as they are few runs have so many: says only whether to count",
    ("insert_reports", "len(monitor.runs) > RUNS_AT_HAND: GtE"): "what is not at hand is read again",
    ("insert_reports", "if len(monitor.runs) > RUNS_AT_HAND or (gaps and sum((len(run.ranges) for run in monitor.r: always True"):
        "what is not at hand is read again",
    ("insert_reports", "sum((len(run.ranges) for run in monitor.runs.values())) > SPANS_AT_HAND: GtE"): "what is not at hand is read again",
    ("unpack", "most + 1 - len(text): Add"): "what is too much is seen all the same, after at most twice as much",
    ("unpack", "1: one more in: text += unpacker.decompress(rest, most + 1 - len(text))"): "two bytes too many tell what one does",
    ("read_request_body", "16: one more in: if weight > min(16 * most, PARSED_LIMIT):"): "a bound of memory by estimate",
    ("find_sender", "False: the other in: for looked_up in (False, True):"): "looks for changed hosts each time",
    ("insert_reports", "if packed is None:: always True"): "packed anew instead of kept as it came",
    ("has_token", "0.0: one more in: empty_until = 0.0"): "a second after 1970 is long past too",
    ("make_message", "12: one more in: message_id = 'msg_' + secrets.token_hex(12)"): "13 bytes by chance are as good as 12",
    ("is_silenced", "0: one more in: if hosts and all(((host.maintenance_until or 0) > now for host in hosts)):"): "a second after 1970 is long past too",
    ("keep", "if strange:: always True"): "of no new runs none are counted",
    ("ingest", "20: one more in: reserved = max(20, min(BATCH_LIMIT, len(body) >> 6))"): "what a refused request costs, by estimate",
    ("Rule.level", "value < bound - 1e-09: LtE"): "no number is exactly a billionth off",
    ("is_worse", "(alert.value - alert.acknowledged_value) * rule.worse: FloorDiv"): "1 and -1 divide as they multiply",
    ("Layers.limits", "0: one more in: if kept is None or kept[0] is not self:"): "found again in a table instead of beside the host",
    ("judge", "if found:: always True"): "a short cut: of no changes nothing is made",
    ("judge_rule", "if rule.field and (not open_alerts) and (not layered):: always False"): "a short cut: evaluate() opens nothing for what is well",
    ("judge_rule", "if open_alerts or rule.tidy:: always True"): "a short cut: nothing is open, and nothing to be forgotten",
    ("Layers.limits", "if kept is None or kept[0] is not self:: always True"): "found again in a table instead of beside the host",
    ("Layers.limits", "name if name in self.hosts else '': always True"): "a table for each host instead of one for all that have nothing of their own",
    ("Layers.limits", "if found is None:: always True"): "made again instead of kept",
}


# --- changes ---

COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn,
            ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}  # fmt: skip
COUNTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.BitOr: ast.BitAnd}


class Change(NamedTuple):
    function: str
    line: int  # of the statement that it is in
    what: str
    tree: ast.FunctionDef  # the function, changed


def changes(name: str, function: ast.FunctionDef) -> Iterator[Change]:
    """One at a time, in what is executed when it is called."""
    statement = {}
    for node in ast.walk(function):  # outer ones first
        if isinstance(node, ast.stmt):
            statement.update(dict.fromkeys(ast.walk(node), node))
    annotations = [node.annotation for node in ast.walk(function) if isinstance(node, ast.AnnAssign)]
    heads = [function.args, *function.decorator_list, *annotations, *filter(None, [function.returns])]
    elsewhere = {inner for head in heads for inner in ast.walk(head)}
    for number, node in enumerate(ast.walk(function)):
        for what, edit, place in edits(node) if node not in elsewhere else ():
            changed = copy.deepcopy(function)
            edit(next(found for at, found in enumerate(ast.walk(changed)) if at == number))
            within = statement.get(place, function)
            if isinstance(node, ast.Constant) and within is not function:
                what = f"{what} in: {first_line(within)}"
            yield Change(name, within.lineno, what, ast.fix_missing_locations(changed))


def first_line(node: ast.AST) -> str:
    return ast.unparse(node).split("\n")[0][:90]


def edits(node: ast.AST) -> Iterator[tuple[str, Any, ast.AST]]:
    """What can be done to a node, how, and where that is."""
    said = first_line(node) if isinstance(node, (ast.expr, ast.stmt)) else ""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        other = COMPARED[type(node.ops[0])]
        yield f"{said}: {other.__name__}", lambda found: found.ops.__setitem__(0, other()), node
    if isinstance(node, ast.BoolOp):
        swapped = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield f"{said}: {swapped.__name__}", lambda found: setattr(found, "op", swapped()), node
    if isinstance(node, ast.BinOp) and type(node.op) in COUNTED and not isinstance(node.left, (ast.JoinedStr, ast.Constant)):
        counted = COUNTED[type(node.op)]
        yield f"{said}: {counted.__name__}", lambda found: setattr(found, "op", counted()), node
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield f"{said}: without not", without_not, node
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield f"{said}: one more", lambda found: setattr(found, "value", found.value + 1), node
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield f"{said}: the other", lambda found: setattr(found, "value", not found.value), node
    if isinstance(node, (ast.If, ast.IfExp)):
        for value in (True, False):
            yield f"{said}: always {value}", lambda found, value=value: setattr(found, "test", ast.Constant(value)), node
    if isinstance(node, ast.Return) and node.value is not None and not is_none(node.value):
        yield f"{said}: None", lambda found: setattr(found, "value", ast.Constant(None)), node
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        for at, statement in enumerate(block if isinstance(block, list) else []):
            left_out = isinstance(statement, (ast.Raise, ast.AugAssign, ast.Delete, ast.Continue, ast.Break)) or (
                isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) and not is_log(statement.value))
            if left_out:
                yield f"left out: {first_line(statement)}", lambda found, name=name, at=at: getattr(found, name).__setitem__(at, ast.Pass()), statement


def without_not(node: ast.UnaryOp) -> None:
    node.op, node.operand = ast.UAdd(), ast.Call(ast.Name("bool", ast.Load()), [node.operand], [])


def is_log(call: ast.Call) -> bool:
    """A line for the journal decides nothing."""
    return isinstance(call.func, ast.Name) and call.func.id in ("log", "log_once", "print")


def is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


# --- one function's code in another's place ---


def find_definition(tree: ast.Module, name: str) -> ast.FunctionDef:
    block: list[ast.stmt] = tree.body
    for part in name.split(".")[:-1]:
        block = next((node.body for node in block if isinstance(node, ast.ClassDef) and node.name == part), [])
    for node in block:
        if isinstance(node, ast.FunctionDef) and node.name == name.split(".")[-1]:
            return node
    raise SystemExit(f"there is no {name} (any more): change PARTS in tests/mutate.py")


def names_in(part: Part, tree: ast.Module) -> Iterator[str]:
    """The functions that a part names, those of whole sections among them."""
    lines = Path(part.module.__file__).read_text().splitlines()
    banners = [at for at, line in enumerate(lines, 1) if line.startswith("# --- ")]
    for word in part.functions.split():
        if not word.startswith("section:"):
            yield word
            continue
        begin = next(at for at in banners if lines[at - 1].startswith(f"# --- {word[8:]}:"))
        end = next((at for at in banners if at > begin), len(lines))
        for node in tree.body:
            if begin < node.lineno < end:
                members = node.body if isinstance(node, ast.ClassDef) else [node]
                above = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                yield from (f"{above}{found.name}" for found in members if isinstance(found, ast.FunctionDef))


def find_function(module: Any, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    found = getattr(found, "fget", None) or getattr(found, "func", None) or getattr(found, "__func__", found)
    return inspect.unwrap(found)


def find_code(code: CodeType, name: str) -> CodeType:
    """The code of a function inside a module's."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_qualname == name:
                return inner
            if name.startswith(inner.co_qualname + "."):
                return find_code(inner, name)
    raise LookupError(name)


def replace(module: Any, name: str, changed: ast.FunctionDef) -> None:
    body: ast.stmt = copy.copy(changed)
    body.decorator_list = []  # type: ignore[attr-defined]
    for part in reversed(name.split(".")[:-1]):
        body = ast.ClassDef(part, [], [], [body], [])
    tree = ast.fix_missing_locations(ast.Module([body], []))
    find_function(module, name).__code__ = find_code(compile(tree, module.__file__, "exec", dont_inherit=True), name)


class Marked(ast.NodeTransformer):
    """Each statement says first that it is executed."""

    def __init__(self, name: str):
        self.name = name

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                marks = [ast.parse(f"__executed__(({self.name!r}, {statement.lineno}))").body[0] for statement in block]
                setattr(node, field, [both for pair in zip(marks, block) for both in pair])
        return node


# --- one pytest session for all ---


class Session:
    """Collects the tests once; all else happens in forks of it, before any test has run in this process."""

    def __init__(self, names: list[str], most: int, seed: int, jobs: int):
        self.names, self.most, self.seed, self.jobs = names, most, seed, jobs
        self.items: list[Any] = []
        self.seconds: dict[int, float] = {}
        self.runs: dict[tuple[str, int], set[int]] = defaultdict(set)  # function and line -> tests
        self.kills: dict[str, Counter[int]] = defaultdict(Counter)  # function -> tests that saw a change of it
        self.scores: list[tuple[int, int]] = []
        self.trees = {module: ast.parse(Path(str(module.__file__)).read_text()) for module in (agent, server)}

    def pytest_runtestloop(self, session: Any) -> bool:
        self.items, self.config = session.items, session.config
        self.look()
        self.scores = [self.run_part(name) for name in self.names]
        return True

    def child(self, work: Any) -> int:
        """Fork, do it there; gives back the process's id."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 3
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
            for descriptor in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            self.config._tmp_path_factory._basetemp = Path(tempfile.mkdtemp(prefix=f"mutate.{os.getpid()}."))
            code = work()
        finally:
            os._exit(code)

    def end(self, pid: int) -> None:
        """Whatever a child left."""
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for left in Path(tempfile.gettempdir()).glob(f"mutate.{pid}.*"):
            shutil.rmtree(left, ignore_errors=True)

    def passes(self, at: int, following: int | None) -> bool:
        reports = runtestprotocol(self.items[at], log=False, nextitem=None if following is None else self.items[following])
        return not any(report.failed for report in reports)

    def look(self) -> None:
        """Run every test once without a change: how long it takes, and which statements it executes."""
        size = -(-len(self.items) // self.jobs)
        shares = [list(range(at, min(len(self.items), at + size))) for at in range(0, len(self.items), size)]
        files = [tempfile.NamedTemporaryFile("w+") for _ in shares]
        pids = [self.child(partial(self.look_at, share, file.name)) for share, file in zip(shares, files)]
        for pid, file in zip(pids, files):
            os.waitpid(pid, 0)
            self.end(pid)
            for at, seconds, passed, marks in map(json.loads, Path(file.name).read_text().splitlines()):
                if not passed:
                    print(f"   red without any change, so not asked: {self.items[at].nodeid}", flush=True)
                    continue
                self.seconds[at] = seconds
                for function, line in marks:
                    self.runs[function, line].add(at)
        print(f"{len(self.seconds)} of {len(self.items)} tests looked at, {sum(self.seconds.values()):.0f} s", flush=True)

    def look_at(self, share: list[int], file: str) -> int:
        executed: set[tuple[str, int]] = set()
        for name in self.names:
            for part in PARTS[name]:
                for function in names_in(part, self.trees[part.module]):
                    marked = Marked(function).visit(copy.deepcopy(find_definition(self.trees[part.module], function)))
                    part.module.__executed__ = executed.add
                    replace(part.module, function, ast.fix_missing_locations(marked))
        with open(file, "w") as out:
            for at, following in zip(share, [*share[1:], None]):
                executed.clear()
                began = time.monotonic()
                passed = self.passes(at, following)
                print(json.dumps([at, time.monotonic() - began, passed, sorted(executed)]), file=out, flush=True)
        return 0

    # one fork for each change

    def run_part(self, name: str) -> tuple[int, int]:
        """How many changes of how many were seen by a test."""
        made = [(part, change) for part in PARTS[name] for function in names_in(part, self.trees[part.module])
                for change in changes(function, find_definition(self.trees[part.module], function))]
        all_made = len(made)
        if len(made) > self.most:
            made = random.Random(self.seed).sample(made, self.most)
        waiting, left = list(made), list[bool]()
        running: dict[int, tuple[Part, Change, list[int], Any, float]] = {}
        while waiting or running:
            while waiting and len(running) < self.jobs:
                part, change = waiting.pop(0)
                if (change.function, change.what) in JUDGED:
                    left.append(self.tell_survivor(part, change, 0))
                    continue
                tests = self.tests_for(change)
                result = tempfile.NamedTemporaryFile("w+")
                limit = time.monotonic() + 60 + SLOW_TIMES * sum(self.seconds[at] for at in tests)
                pid = self.child(partial(self.try_change, part, change, tests, result.name))
                running[pid] = part, change, tests, result, limit
            time.sleep(0.02)
            for pid in [pid for pid, at_work in running.items() if self.is_over(pid, at_work[4])]:
                part, change, tests, result, _ = running.pop(pid)
                seen = Path(result.name).read_text()
                if seen == "survived":
                    left.append(self.tell_survivor(part, change, len(tests)))
                elif seen:
                    self.kills[change.function][int(seen)] += 1
        return self.tell(name, left, len(made), all_made)

    def tests_for(self, change: Change) -> list[int]:
        """Those that run the statement, the likeliest to see it first, then the shortest: as many as fit in a time."""
        kills = self.kills[change.function]
        found = sorted(self.runs[change.function, change.line], key=lambda at: (-kills[at], self.seconds[at]))
        spent = itertools.accumulate(self.seconds[at] for at in found)
        return [at for at, so_far in zip(found, spent) if so_far < TESTS_SECONDS] or found[:1]

    def try_change(self, part: Part, change: Change, tests: list[int], result: str) -> int:
        replace(part.module, change.function, change.tree)
        for at, following in zip(tests, [*tests[1:], None]):
            hangs = threading.Timer(GRACE_SECONDS + SLOW_TIMES * self.seconds[at], self.give_up, [result, at])
            hangs.daemon = True
            hangs.start()
            passed = self.passes(at, following)
            hangs.cancel()
            if not passed:
                Path(result).write_text(str(at))
                return 0
        Path(result).write_text("survived")
        return 0

    def give_up(self, result: str, at: int) -> None:
        """A test that hangs has seen the change."""
        Path(result).write_text(str(at))
        os._exit(0)

    def is_over(self, pid: int, limit: float) -> bool:
        """A process that ended, also by its limit of time or memory: that is seen too."""
        over = os.waitpid(pid, os.WNOHANG)[0] == pid
        if not over and time.monotonic() > limit:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            over = True
        if over:
            self.end(pid)
        return over

    def tell_survivor(self, part: Part, change: Change, tests: int) -> bool:
        """Print it as soon as it is known; gives back whether it is judged."""
        reason = JUDGED.get((change.function, change.what))
        note = f"judged: {reason}" if reason else f"passed {tests} tests" if tests else "no test runs it"
        print(f"   survived: {part.module.__name__}.py:{change.line} {change.function}: {change.what} ({note})", flush=True)
        return reason is not None

    def tell(self, name: str, left: list[bool], count: int, all_made: int) -> tuple[int, int]:
        killed, judged = count - len(left), sum(left)
        of = f"{count} changes" if count == all_made else f"{count} of {all_made} changes, drawn by seed {self.seed},"
        print(f"{name}: {killed} of {of} were seen, {killed / max(1, count):.1%}; of the other {len(left)}, {judged} are judged", flush=True)
        return killed, count - judged


def main() -> int:
    parser = argparse.ArgumentParser(prog="./build.sh mutate", description="Mutation score of what must not be wrong.")
    parser.add_argument("part", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--most", type=int, default=10_000, metavar="N", help="changes of a part (default: all)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="which ones are drawn where that is not all (default: 1)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at once (default: 2)")
    options = parser.parse_args()
    if strange := set(options.part) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(strange))}; there are {', '.join(PARTS)}")
    os.nice(19)
    names = options.part or list(PARTS)
    files = dict.fromkeys(file for name in names for part in PARTS[name] for file in part.tests.split())
    session = Session(names, options.most, options.seed, options.jobs)
    code = pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", *(str(HERE / file) for file in files)], plugins=[session])
    return 0 if session.scores and code in (0, 5) and all(seen >= GOAL * count for seen, count in session.scores) else 1


if __name__ == "__main__":
    sys.exit(main())
