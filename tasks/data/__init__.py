"""Instructions written for this project: `seeds.jsonl` starts a run, `heldout.jsonl` measures it."""
