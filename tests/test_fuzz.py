"""Input that nobody would send, a little of it; the long run is `./build.sh soak fuzz`.

    the same dice each time -> one feeder per door -> no 5xx, no traceback, no hang
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzz.World]:
    world = fuzz.World(tmp_path_factory.mktemp("fuzz"))
    yield world
    world.close()


EXAMPLES = {"parsers": 400, "answers": 400, "agent's settings": 200, "settings": 150, "collectors": 25, "wire": 60, "page": 50, "lists": 40}


@pytest.mark.parametrize("name", fuzz.FEEDERS)
def test_no_input_makes_it_stumble(world: fuzz.World, name: str) -> None:
    """Hypothesis gives the seed alone: `tests/fuzz.py NAME SEED` does that one again."""

    @settings(max_examples=EXAMPLES.get(name, 100), database=None)
    @given(seed=st.integers(0, 1 << 32))
    def feed(seed: int) -> None:
        fuzz.feed(name, random.Random(seed), world)

    feed()


@pytest.mark.parametrize("broken", ["reports", "parsers", "answers"])
def test_a_fault_is_seen(world: fuzz.World, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing above would say anything."""
    def stumble(*_: object) -> str:
        raise KeyError("x")

    monkeypatch.setattr(fuzz.server, "check_reports", stumble)
    monkeypatch.setattr(fuzz, "PARSERS", [stumble])
    monkeypatch.setattr(fuzz.agent, "judge", lambda answer, count: fuzz.agent.ACCEPTED)
    with pytest.raises(fuzz.Fault):
        for seed in range(50):
            fuzz.feed(broken, random.Random(seed), world)
    world.log.clear()
