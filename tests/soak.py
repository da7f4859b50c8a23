#!/usr/bin/env python3
"""The long proofs: ./build.sh soak [--minutes N] [PART]. Without a part: all of them, one after the other.

A part is a file soak_PART.py beside this one: the first line of its docstring says what it does, and its
`run(seconds)` prints what it measured, for about so long, and gives back whether that is as promised.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
PARTS = sorted(path.stem.removeprefix("soak_") for path in HERE.glob("soak_*.py"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./build.sh soak", description="Run the long proofs.")
    parser.add_argument("part", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=60, metavar="N", help="for each part (default: 60)")
    options = parser.parse_args(argv)
    if strange := set(options.part) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(strange))}; there are {', '.join(PARTS)}")
    failed = []
    for name in options.part or PARTS:
        part = importlib.import_module(f"soak_{name}")
        print(f"== {name}: {(part.__doc__ or '').splitlines()[0]}", flush=True)
        print(f"   load of this machine at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
        if not part.run(options.minutes * 60):
            failed.append(name)
        print(f"   load at the end: {os.getloadavg()[0]:.1f}", flush=True)
    print(f"FAILED: {', '.join(failed)}" if failed else "all as promised", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
