"""The pools of the next iteration: the accepted candidates are trained on, and join all that came before."""

from pydantic import BaseModel

from storage.files import Snapshot
from storage.pools import read_rows, write_snapshot
from tasks.policies import stage

VERSION = 1


class Pools(BaseModel):
    """What an iteration starts from. The train pool is part of the cache pool."""

    train: Snapshot
    cache: Snapshot

    @property
    def by_view(self) -> dict[str, Snapshot]:
        """As a manifest keeps them."""
        return {"train_pool": self.train, "cache_pool": self.cache}


@stage("refresh", version=VERSION)
def refresh_pools(cache_pool: Snapshot, candidates: Snapshot) -> Pools:
    """Replace the train pool by the accepted candidates, and add them to the cache pool (as the paper does)."""
    accepted = [
        {key: row[key] for key in ("instruction_id", "instruction", "input", "category", "parent_id")}
        | {"origin": row["side"]}
        for row in read_rows(candidates)
        if row["rejection"] is None
    ]
    inputs = [cache_pool, candidates]
    return Pools(
        train=write_snapshot("instructions", accepted, step="refresh", version=VERSION, inputs=inputs),
        cache=write_snapshot(
            "instructions", [*read_rows(cache_pool), *accepted], step="refresh", version=VERSION, inputs=inputs
        ),
    )
