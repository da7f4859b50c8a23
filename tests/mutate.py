#!/usr/bin/env python3
"""Mutation score of what must not be wrong: ./build.sh mutate [--most N] [PART…]

Each function of a part is changed in one place at a time (another comparison, `or` for `and`, a number one more, a
condition that always holds, a statement left out …), and the part's tests have to fail. A runner of our own: mutmut and
cosmic-ray change whole files, and both programs are one file each of which a part is a few hundred lines; here a
change replaces the code of one function in a forked process that has all imports done.

    parts -> changes of a function -> a forked pytest for each -> score, and what survived
"""

from __future__ import annotations

import argparse
import ast
import copy
import inspect
import io
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import pytest  # noqa: E402

import agent  # noqa: E402
import server  # noqa: E402

LIMIT_SECONDS = 120  # for the tests of one change: what takes longer hangs, which a test would tell
GOAL = 0.85


class Part(NamedTuple):
    module: Any
    functions: str  # names, with their class
    tests: str  # files, and what follows -k


PARTS = {
    "signature": [
        Part(server, "check_signature host_key", "test_security_requests.py test_server_ingest.py -k signature|signed|clock|time|token|posts_for|captured"),
        Part(agent, "sign webhook_headers", "test_agent_signature.py"),
    ],
    "answers": [
        Part(agent, "judge code_of server_time retry_after Answer.fields", "test_agent_answers.py test_agent_delivery.py -k not(bounded_rate)"),
    ],
    "ingest": [
        Part(server, "ingest find_sender read_request_body keep insert_reports find_run write_state unpack check_reports check_report "
                     "add_to_ranges parse_ranges format_ranges Room.of_host Room.take Store.write Store._commit Store._attempt",
             "test_server_ingest.py test_server_limits.py test_server_database.py"),
    ],
    "spool": [
        Part(agent, "Spool.open Spool.push Spool.newest Spool.oldest Spool.delivered Spool.reject Spool.lose Spool._make_room Spool._read "
                    "Spool._set_bad_aside Spool._bound_rejected Spool._load_losses Spool._save_losses spooled_at clock_step ages_of",
             "test_agent_spool.py"),
    ],
    "rules": [
        Part(server, "judge judge_rule limits_for objects_of covers knows", "test_server_rules.py test_server_rules_apart.py"),
    ],
    "routing": [
        Part(server, "Channel.wants routed_by guest_tags concerned_by is_silenced silence_fits tell tell_channels tell_end news_of "
                     "make_message has_token", "test_server_told.py test_server_notifications.py test_server_outbox.py test_server_alerting.py"),
    ],
}  # fmt: skip


# --- changes ---

COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn,
            ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}  # fmt: skip
COUNTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.BitOr: ast.BitAnd}


class Change(NamedTuple):
    line: int
    what: str
    tree: ast.AST  # the function, changed


def changes(function: ast.AST) -> Iterator[Change]:
    """One at a time."""
    for number, node in enumerate(ast.walk(function)):
        for what, edit in edits(node):
            changed = copy.deepcopy(function)
            edit(next(found for at, found in enumerate(ast.walk(changed)) if at == number))
            yield Change(getattr(node, "lineno", 0), what, ast.fix_missing_locations(changed))


def edits(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """What can be done to a node, and how."""
    said = ast.unparse(node).split("\n")[0][:90] if isinstance(node, (ast.expr, ast.stmt)) else ""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        other = COMPARED[type(node.ops[0])]
        yield f"{said}: {other.__name__}", lambda found: found.ops.__setitem__(0, other())
    if isinstance(node, ast.BoolOp):
        swapped = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield f"{said}: {swapped.__name__}", lambda found: setattr(found, "op", swapped())
    if isinstance(node, ast.BinOp) and type(node.op) in COUNTED and not isinstance(node.left, (ast.JoinedStr, ast.Constant)):
        counted = COUNTED[type(node.op)]
        yield f"{said}: {counted.__name__}", lambda found: setattr(found, "op", counted())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield f"{said}: without not", without_not
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield f"{said}: one more", lambda found: setattr(found, "value", found.value + 1)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield f"{said}: the other", lambda found: setattr(found, "value", not found.value)
    if isinstance(node, (ast.If, ast.IfExp)):
        for value in (True, False):
            yield f"{said}: always {value}", lambda found, value=value: setattr(found, "test", ast.Constant(value))
    if isinstance(node, ast.Return) and node.value is not None and not is_none(node.value):
        yield f"{said}: None", lambda found: setattr(found, "value", ast.Constant(None))
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        for at, statement in enumerate(block if isinstance(block, list) else []):
            left_out = isinstance(statement, (ast.Raise, ast.AugAssign, ast.Delete, ast.Continue, ast.Break)) or (
                isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call))
            if left_out:
                text = ast.unparse(statement).split("\n")[0][:90]
                yield f"left out: {text}", lambda found, name=name, at=at: getattr(found, name).__setitem__(at, ast.Pass())


def without_not(node: ast.UnaryOp) -> None:
    node.op, node.operand = ast.UAdd(), ast.Call(ast.Name("bool", ast.Load()), [node.operand], [])


def is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


# --- one function's code in another's place ---


def find_definition(tree: ast.Module, name: str) -> tuple[list[ast.stmt], int]:
    """The block that holds a function, and where in it."""
    block: list[ast.stmt] = tree.body
    for part in name.split(".")[:-1]:
        block = next(node for node in block if isinstance(node, ast.ClassDef) and node.name == part).body
    at = next(at for at, node in enumerate(block) if isinstance(node, ast.FunctionDef) and node.name == name.split(".")[-1])
    return block, at


def find_function(module: Any, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    found = getattr(found, "__func__", found)
    return inspect.unwrap(found)


def find_code(code: CodeType, name: str) -> CodeType:
    """The code of a function inside a module's."""
    if code.co_name == name.split(".")[-1] and code.co_qualname == name:
        return code
    for inner in code.co_consts:
        if isinstance(inner, CodeType) and (name == inner.co_qualname or name.startswith(inner.co_qualname + ".")):
            return find_code(inner, name)
    raise LookupError(name)


def replace(module: Any, tree: ast.Module, name: str, changed: ast.AST) -> None:
    block, at = find_definition(tree, name)
    block[at] = changed  # type: ignore[call-overload]
    find_function(module, name).__code__ = find_code(compile(tree, module.__file__, "exec", dont_inherit=True), name)


# --- a forked pytest for each ---


def survives(module: Any, tree: ast.Module, name: str, change: Change | None, tests: str) -> bool:
    """Whether all tests still pass."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        sys.stdout = sys.stderr = io.StringIO()
        for descriptor in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        code = 1
        try:
            if change is not None:
                replace(module, tree, name, change.tree)
            files, _, wanted = tests.partition(" -k ")
            selected = ["-k", wanted.replace("|", " or ").replace("not(", "not (")] if wanted else []
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--basetemp=/tmp/mutate.{os.getpid()}", *selected,
                                    *(str(HERE / file) for file in files.split())]))  # fmt: skip
        finally:
            os._exit(code)
    try:
        return wait(pid) == 0
    finally:
        import shutil

        shutil.rmtree(f"/tmp/mutate.{pid}", ignore_errors=True)


def wait(pid: int) -> int:
    """The exit code; 124 for one that had to be ended."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 124


def run_part(name: str, most: int) -> tuple[int, int]:
    """How many changes of how many were seen by a test."""
    made: list[tuple[Part, str, Change]] = []
    for part in PARTS[name]:
        for function in part.functions.split():
            tree = ast.parse(Path(part.module.__file__).read_text())
            block, at = find_definition(tree, function)
            made += [(part, function, change) for change in changes(block[at])]
    if len(made) > most:
        made = random.Random(1).sample(made, most)  # the same ones each time
    for part in PARTS[name]:
        if not survives(part.module, ast.parse(""), "", None, part.tests):
            raise SystemExit(f"{name}: the tests are red without any change: {part.tests}")
    killed = 0
    for part, function, change in made:
        tree = ast.parse(Path(part.module.__file__).read_text())
        if survives(part.module, tree, function, change, part.tests):
            print(f"   survived: {part.module.__name__}.py {change.line} {function}: {change.what}", flush=True)
        else:
            killed += 1
    print(f"{name}: {killed} of {len(made)} changes were seen, {killed / max(1, len(made)):.1%}", flush=True)
    return killed, len(made)


def main() -> int:
    parser = argparse.ArgumentParser(prog="./build.sh mutate", description="Mutation score of what must not be wrong.")
    parser.add_argument("part", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--most", type=int, default=10_000, metavar="N", help="changes of a part (default: all)")
    options = parser.parse_args()
    if strange := set(options.part) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(strange))}; there are {', '.join(PARTS)}")
    scores = [run_part(name, options.most) for name in options.part or PARTS]
    return 0 if all(killed >= GOAL * count for killed, count in scores) else 1


if __name__ == "__main__":
    sys.exit(main())
