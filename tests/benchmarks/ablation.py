"""Does the method help? `lion ablate --preset offline --seeds 3`, every arm's gain over plain imitation.

Takes about an hour on two quiet cores; what was run before in `$LION_HOME` is found again.
"""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from tests.benchmarks.run import figure

SEEDS = 3


def run() -> list[dict[str, Any]]:
    home = os.environ.get("LION_HOME") or tempfile.mkdtemp(prefix="ablation.")
    command = [sys.executable, "-c", "from flows.cli import main; main()"]
    asked = ["ablate", "--preset", "offline", "--seeds", str(SEEDS), "--json"]
    done = subprocess.run([*command, *asked], env=os.environ | {"LION_HOME": home}, stdout=subprocess.PIPE, check=True)
    rows = {row["arm"]: row for row in json.loads(done.stdout)}
    plain = rows["imitation-only"]
    figures = []
    for arm, row in rows.items():
        for measure, unit, better in (("loss", "nats per token", -1), ("score", "of 10", 1)):
            found, other = row[measure], plain[measure]
            ratio = (found["value"] / other["value"]) ** better
            bounds = f"95 % {found['low']:.3f} to {found['high']:.3f}"
            against = f"imitation-only ({other['value']:.3f}); {row['teacher_tokens']} teacher tokens, {bounds}"
            measured = figure(f"ablation-{arm}-{measure}", found["value"], unit, against, ratio)
            figures.append(measured | {"seeds": SEEDS, "loss_by_seed": row["loss_by_seed"]})
    return figures
