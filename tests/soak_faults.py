"""Faults of processes, disks, clocks, wires and files, and what was acknowledged, found and doubled.

FAULTS=name,name plays only some.
"""

from __future__ import annotations

import os
import random
import tempfile
import traceback
from pathlib import Path

from faults import FAULTS, ON_A_DISK, Outcome, can_mount


def run(seconds: float) -> bool:
    names = os.environ.get("FAULTS", "").split(",") if os.environ.get("FAULTS") else list(FAULTS)
    seed = int(os.environ.get("SEED", random.randrange(1 << 30)))
    print(f"   SEED={seed}\n| fault | acknowledged | found | doubled | recovered by itself in | notes |\n|---|---|---|---|---|---|")
    good = True
    for name in names:
        told = play(name, seconds / len(names), random.Random(f"{seed} {name}"))
        good = good and told
    return good


def play(name: str, seconds: float, dice: random.Random) -> bool:
    fault = FAULTS[name]
    words = fault.__doc__ or name
    if name in ON_A_DISK and not can_mount():
        print(f"| {words} | not possible here: no loop devices can be mounted | | | | |", flush=True)
        return True
    with tempfile.TemporaryDirectory(prefix="proxmon-faults-") as folder:
        try:
            outcome: Outcome = fault(Path(folder), seconds, dice)
        except Exception:
            print(f"| {words} | FAILED | | | | {name} |", flush=True)
            traceback.print_exc()
            return False
    recovered = "an operator acts" if outcome.recovered is None else f"{outcome.recovered:.1f} s"
    print(f"| {words} | {outcome.acknowledged} | {outcome.found} | {outcome.doubled} | {recovered} | {outcome.note} |", flush=True)
    return outcome.good
