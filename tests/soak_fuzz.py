"""Input that nobody would send, for hours, over every door: 0 faults, and memory that does not grow.

FUZZ_SEED chooses where the dice begin, so that two runs beside each other see different things.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import fuzz

MOST_GROWTH = 100 << 20  # after the first round, in which caches fill
ROUND = 10_000  # inputs for one server: what they bring about makes its lists longer and longer


def run(seconds: float) -> bool:
    """Feed for so long; print what was fed, by kind, and how memory went."""
    seed, end, before = int(os.environ.get("FUZZ_SEED", "0")), time.monotonic() + seconds, 0
    counts: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    while (left := end - time.monotonic()) > 0:
        with tempfile.TemporaryDirectory() as folder:
            world = fuzz.World(Path(folder))
            fed, found = fuzz.run(world, left, seed + sum(counts.values()), ROUND)
            world.close()
        counts, faults = counts + fed, faults + found
        before = before or fuzz.resident_bytes()
        print(f"   {sum(counts.values())} inputs, {sum(faults.values())} faults, {fuzz.resident_bytes() >> 20} MiB", flush=True)
    grown = fuzz.resident_bytes() - before
    for name, count in counts.most_common():
        print(f"   {name}: {count}")
    print(f"   all: {sum(counts.values())} inputs, {sum(faults.values())} faults of {len(faults)} kinds, memory {grown / 2**20:+.0f} MiB")
    return not faults and grown < MOST_GROWTH
