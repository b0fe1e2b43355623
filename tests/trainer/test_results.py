"""What a job's figures say of when it ends."""

import time
from pathlib import Path

import pytest

from basalt.train.plan import Plan, Stage
from basalt.train.recipe import load_recipe
from services.trainer.results import finishes, told

LINE = {"step": 20, "steps": 120, "loss": 1.5, "seconds_per_step": 36.0}


@pytest.fixture
def two_stages(monkeypatch: pytest.MonkeyPatch) -> Plan:
    for name in ("DATA", "SCENES", "CHAT"):
        monkeypatch.setenv(f"BASALT_{name}", "anywhere")
    first, second = (load_recipe(Path(f"recipes/basalt-tiny/{name}.yaml")) for name in ("stage1", "stage2"))
    stages = [Stage(name="stage1", recipe=first), Stage(name="stage2", recipe=second)]
    return Plan(name="mine", stages=stages, lineage={})


def test_each_phase_says_when_it_ends_and_the_last_one_when_the_job_does(two_stages: Plan) -> None:
    hour = int(time.time()) + 3600
    first, last = finishes("stage1", LINE, two_stages), finishes("stage2", LINE, two_stages)
    assert first["estimated_finish"] is None
    for finish in (first["phase_finish"], last["phase_finish"], last["estimated_finish"]):
        assert finish is not None
        assert abs(finish - hour) <= 2
    assert finishes("stage2", {"step": 1, "steps": 9}, two_stages) == {"phase_finish": None, "estimated_finish": None}


def test_an_event_says_how_long_its_phase_still_takes() -> None:
    assert told("stage1", LINE) == "stage1: step 20 of 120, training loss 1.5000, 1:00:00 left"
    assert told("stage1", LINE | {"step": 120}) == "stage1: step 120 of 120, training loss 1.5000"
