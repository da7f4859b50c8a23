"""Drills of an operator with a running fleet, for a moment each. For long, with the search for growth: ./build.sh soak operations"""

from __future__ import annotations

import random

import pytest
from conftest import skip_here
from soak_operations import DRILLS, LAST_VERSION, has_grown, has_last_version


@pytest.mark.parametrize("name", DRILLS)
def test_a_drill_loses_nothing(name, tmp_path):
    if name == "upgrade" and not has_last_version():
        skip_here(f"{LAST_VERSION}, to upgrade from, is not in this copy: fetch the whole history")
    outcome = DRILLS[name](tmp_path, 0.0, random.Random(1))
    assert outcome.good, outcome


def test_growth_is_seen():
    steady = [(50.0 + n % 3, 20, 8) for n in range(90)]
    assert not has_grown(steady)
    assert has_grown([(50.0 + n / 4, 20, 8) for n in range(90)])
    assert has_grown([(50.0, 20 + n // 8, 8) for n in range(90)])
    assert has_grown([(50.0, 20, 8 + n // 10) for n in range(90)])
