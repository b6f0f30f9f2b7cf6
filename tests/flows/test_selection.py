"""A student that is worse than the one before is not built upon, and a loop that gains nothing ends."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lion import arguments, environment, lion, shown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# The command, with an iteration 2 whose learning rate is a hundred times too high.
SABOTAGED = """
from flows.terminal import use_home
use_home(None)  # before anything of Prefect is imported
from flows import distill
from flows.cli import main

iterate = distill.Run.iterate

def sabotaged(self, iteration, pools, student):
    given = self.config
    if iteration == 2:
        training = given.finetune.training.model_copy(update={"learning_rate": 100 * given.finetune.training.learning_rate})
        finetune = given.finetune.model_copy(update={"training": training})
        self.config = given.model_copy(update={"finetune": finetune})
    try:
        return iterate(self, iteration, pools, student)
    finally:
        self.config = given

distill.Run.iterate = sabotaged
main()
"""

SETTINGS = (
    "--set=iterations=5",
    "--set=seeds.max_heldout=40",  # enough that an interval says what the mean says
    "--set=stop.patience=3",
    "--set=stop.min_gain=100",
    "--set=finetune.training.num_train_epochs=2",
    # The tiny model hardly ever ends a line.
    '--set=generate.sampling={temperature: 1.0, max_tokens: 24, stop: ["e"]}',
    "--set=generate.max_attempts=8",
)


@pytest.fixture(scope="module")
def sabotaged(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, dict[str, Any], str]:
    """Home, manifest and output of a run whose second iteration is made worse on purpose, and which gains too little."""
    home = tmp_path_factory.mktemp("sabotaged")
    command = [sys.executable, "-c", SABOTAGED, *arguments(tiny_model, *SETTINGS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(home))
    assert done.returncode == 0, done.stdout + done.stderr
    return home, shown(home), done.stdout


def test_a_worse_student_is_rolled_back_and_the_run_says_so(sabotaged: tuple[Path, dict[str, Any], str]) -> None:
    home, run, output = sabotaged
    first, second, third = run["iterations"]
    assert second["evaluation"]["loss"] > first["evaluation"]["loss"]
    assert [record["rolled_back"] for record in (first, second)] == [False, True]
    assert second["comparison"]["against"] == third["comparison"]["against"] == 1
    assert second["comparison"]["loss_gain"]["high"] < 0
    (line,) = second["notes"]
    assert "rolled back" in line and "iteration 1" in line
    assert "rolled back" in output
    page = (home / "runs" / run["run_id"] / "report.html").read_text()
    assert "rolled back: this student is worse than that of iteration 1" in page


def test_the_iteration_after_starts_from_the_best_student(sabotaged: tuple[Path, dict[str, Any], str]) -> None:
    home, run, _ = sabotaged
    first, second, third = (record["student"]["digest"] for record in run["iterations"])

    def started_from(student: str) -> str:
        return Path(json.loads((home / "checkpoints" / student / "job.json").read_text())["model"]).name

    assert started_from(second) == started_from(third) == first
    asked = json.loads(
        lion(
            home, "sql", "--json", "select distinct model from responses where role = 'student' and iteration = 2"
        ).stdout
    )
    assert asked == [{"model": first}], "hard and easy are found for the student that goes on"


def test_lion_best_prints_the_checkpoint_to_use(sabotaged: tuple[Path, dict[str, Any], str]) -> None:
    home, run, _ = sabotaged
    losses = {
        record["evaluation"]["loss"]: record["student"]["digest"]
        for record in run["iterations"]
        if not record["rolled_back"]
    }
    assert Path(lion(home, "best").stdout.strip()) == home / "checkpoints" / losses[min(losses)]


def test_a_loop_that_gains_nothing_stops_and_says_why(sabotaged: tuple[Path, dict[str, Any], str]) -> None:
    _, run, output = sabotaged
    assert (run["state"], len(run["iterations"])) == ("completed", 3), "five were allowed"
    assert "stopped: no gain above 100 in the last 3 iterations" in " ".join(output.split())
