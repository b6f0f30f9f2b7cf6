"""Programs that run in a process of their own: they may import torch, which nothing else does.

`python -m tasks.jobs.NAME` runs `convert`, `prune`, `sft`, `infer`, `suite` and `chat`; `reload` is run by `sft`. Who starts
them imports `launch`, `process` and `settings`, which import no torch. Where to begin: inference with `engine`, which shows
what its parts are, and training with `sft`, which names its own. `template` is the prompt of both.
"""
