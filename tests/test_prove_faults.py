"""Each fault of faults.py for a moment: what was acknowledged is there, once. For long: ./build.sh soak faults"""

from __future__ import annotations

import random

import pytest
from conftest import skip_here
from faults import FAULTS, ON_A_DISK, can_mount

# Kills for a moment are in test_end_to_end.py (server) and test_agent_faults.py (agent).
PLAYED = [name for name in FAULTS if name not in ("server_killed", "both_killed", "bare_flush")]


@pytest.mark.parametrize("name", PLAYED)
def test_what_was_acknowledged_is_there_once(name, tmp_path):
    if name in ON_A_DISK and not can_mount():
        skip_here("no loop device can be mounted here: needs root, /dev/loop-control and mkfs.ext4")
    outcome = FAULTS[name](tmp_path, 0.0, random.Random(name))
    assert outcome.good, outcome
