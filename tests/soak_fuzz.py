"""Input that nobody would send, for hours, over every door: 0 faults, and memory that does not grow.

FUZZ_SEED chooses where the dice begin, so that two runs beside each other see different things.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import fuzz

MOST_GROWTH = 100 << 20  # after the first tenth, in which caches fill


def run(seconds: float) -> bool:
    """Feed for so long; print what was fed, by kind, and how memory went."""
    seed = int(os.environ.get("FUZZ_SEED", "0"))
    with tempfile.TemporaryDirectory() as folder:
        world = fuzz.World(Path(folder))
        first, early = fuzz.run(world, seconds / 10, seed)
        before = fuzz.resident_bytes()
        second, late = fuzz.run(world, seconds * 9 / 10, seed + sum(first.values()))
        grown = fuzz.resident_bytes() - before
        world.close()
    counts, faults = first + second, early + late
    for name, count in counts.most_common():
        print(f"   {name}: {count}")
    print(f"   all: {sum(counts.values())} inputs, {sum(faults.values())} faults of {len(faults)} kinds, memory {grown / 2**20:+.0f} MiB")
    return not faults and grown < MOST_GROWTH
