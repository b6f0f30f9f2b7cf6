"""Rows on their way through a network, in *tiles*: steps of a fixed number of tokens, of any rows.

Rows with the shortest answers come first, and new ones with their prompts before all others. So no step computes a row
that is done, nor padding while enough rows are there; all rows near their ends together, and only the last few steps
are not full.

A product with a matrix of weights may sum up in another way for another number of tokens. Tiles have a number for which
it does not (`Network.tiles`), and all else is computed for each token, or each run of a row, by itself: what comes out
for a row depends on no other row, to the last bit. Knows nothing of what is made of the logits: `settle` does.
"""

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.jobs.attention import PAGE, Pages, Step, filled, pages_for
from tasks.jobs.network import Network

STEP_TOKENS = 64  # what a step costs beside its tokens, as if it were so many of them
LANES_OF_A_GPU = 2
RUN = 256  # tokens of a row that are computed together, at most: a prompt is cut at multiples of it


@dataclass(slots=True, eq=False)
class Row:
    """One text on its way: what is given of it, and what came of it so far.

    `chances` is seeded by the run's seed, the request's id and draw, and gives one number a token: the same
    row draws the same numbers in any batch, any shard and after any restart.
    """

    id: str
    given: list[int]  # the prompt's tokens; where an answer is scored, the answer's, too, all but the last
    chances: random.Random | None = None
    targets: list[int] = field(default_factory=list)  # to be scored: what follows each of the last given tokens
    room: int = 0  # tokens that an answer may have
    answer: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of the first targets
    computed: int = 0  # tokens whose keys and values are in the row's pages
    pages: list[int] = field(default_factory=list)
    borrowed: int = 0  # so many of them, the first ones, are the prefix's
    slot: int = 0  # its line in the lane's table of pages

    @property
    def pending(self) -> int:
        """Tokens that are still to be computed, as far as they are known."""
        return len(self.given) + len(self.answer) - self.computed

    @property
    def first_wanted(self) -> int:
        """From this place on the row wants to know which token follows."""
        return len(self.given) - max(1, len(self.targets))

    def next_run(self, longest: int) -> int:
        """How many of the pending tokens are computed together, and never a part of them; 0 where none is pending.

        So the runs of a row are the same in any company.
        """
        return min(self.pending, longest - self.computed % longest)

    def next_tokens(self, count: int) -> list[int]:
        """The first of the pending tokens; of an answer only its last one is ever pending."""
        return self.answer[-1:] if self.answer else self.given[self.computed : self.computed + count]


@dataclass(slots=True)
class Statistics:
    """What was computed so far. A position is one token going through the network."""

    positions: int = 0
    padded_positions: int = 0
    generated_tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, positions: int = 0, padded: int = 0, generated: int = 0) -> None:
        with self._lock:
            self.positions += positions
            self.padded_positions += padded
            self.generated_tokens += generated

    @property
    def padded_share(self) -> float:
        """Share of the positions that were computed for no row."""
        return self.padded_positions / self.positions if self.positions else 0.0


class Queue:
    """Rows that wait, for several lanes to take from."""

    def __init__(self, rows: Iterable[Row]):
        self._rows, self._lock = deque(rows), threading.Lock()

    def take(self, fits: Callable[[Row], bool]) -> Row | None:
        """The next row, if it fits."""
        with self._lock:
            return self._rows.popleft() if self._rows and fits(self._rows[0]) else None


Wanted = Sequence[tuple[Row, int]]  # a row, and the place of the token in it whose logits are there
Settle = Callable[[Wanted, Tensor], list[tuple[Row, dict[str, Any]]]]


class Lane:
    """Takes rows from a queue and computes them, tile after tile, in pages of its own.

    Args:
        prefix: tokens that many rows begin with, computed once.
        rows: how many are held in the cache together.
        tokens: how many tokens the cache holds; more where the longest row alone has more.
        longest: tokens of that row, with its answer.
    """

    def __init__(
        self,
        network: Network,
        statistics: Statistics,
        *,
        prefix: Sequence[int],
        rows: int,
        tokens: int,
        longest: int,
    ):
        self.network, self.statistics, self.rows = network, statistics, rows
        self.longest_run = min(RUN, network.tiles[-1])
        width = pages_for(longest)
        pages = min(rows * width, max(tokens // PAGE, width))
        self.cache = Pages(1 + pages_for(len(prefix)) + pages, width)
        self.table = np.zeros((1 + rows, max(width, pages_for(len(prefix)))), np.int32)  # pages of the row in each slot
        self.slots = list(range(rows, 0, -1))  # free ones; 0 is the prefix's
        self.prefix = Row("", list(prefix))
        self.prefix.pages = self.cache.take(len(prefix))
        self.table[0, : len(self.prefix.pages)] = self.prefix.pages

    @torch.inference_mode()
    def run(self, waiting: Queue, settle: Settle) -> Iterator[list[dict[str, Any]]]:
        """Yield the replies of each step, often none, until no row waits.

        Args:
            settle: is given the tokens whose logits (tokens, vocabulary) are wanted, and returns the rows that are done
                with them, and their replies.
        """
        active: list[Row] = []
        while True:
            while len(active) < self.rows and (row := waiting.take(self._fits)):
                self._admit(row)
                active.append(row)
            if not active:
                return
            done = [each for wanted, logits in self._compute(active) for each in settle(wanted, logits)]
            for row, _ in done:
                active.remove(row)
                self.cache.give_back(row.pages[row.borrowed :])
                self.slots.append(row.slot)
            yield [reply for _, reply in done]

    def _fits(self, row: Row) -> bool:
        return len(self.cache.free) >= pages_for(len(row.given) + row.room)

    def _admit(self, row: Row) -> None:
        """Give a row its pages. What it has in common with the prefix is there already."""
        known = len(self.prefix.given)
        if known and row.first_wanted >= known and row.given[:known] == self.prefix.given:
            while self.prefix.pending:
                list(self._compute([self.prefix]))
            row.borrowed, row.computed = known // PAGE, known
        row.pages = self.prefix.pages[: row.borrowed]
        row.pages += self.cache.take(len(row.given) + row.room - row.borrowed * PAGE)
        row.slot = self.slots.pop()
        self.table[row.slot, : len(row.pages)] = row.pages
        if row.computed % PAGE:
            self.cache.copy(self.prefix.pages[row.borrowed], row.pages[row.borrowed])

    def _tile(self, tokens: int, fewest: int) -> int:
        """The size that is cheapest by token while so many wait, and has room for the fewest that can be taken."""
        sizes = [size for size in self.network.tiles if size >= fewest]
        return min(sizes, key=lambda size: (size + STEP_TOKENS) / min(size, tokens))

    def _compute(self, active: Sequence[Row]) -> Iterator[tuple[Wanted, Tensor]]:
        """One step: tokens whose logits are wanted, and these logits, some at a time."""
        step, wanted = self._next_step(active)
        self.statistics.add(positions=len(step.tokens), padded=len(step.tokens) - step.used)
        begin = 0
        for logits in self.network.forward(step):
            yield wanted[begin : begin + len(logits)], logits
            begin += len(logits)

    def _next_step(self, active: Sequence[Row]) -> tuple[Step, Wanted]:
        """The next runs of as many rows as fit into the cheapest tile, and the places in rows whose logits are wanted."""
        rows = sorted(active, key=lambda row: len(row.answer))
        most = self._tile(sum(row.pending for row in rows), rows[0].next_run(self.longest_run))
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        runs, wanted, at_wanted, at = [], [], [], 0
        for row in rows:
            while (count := row.next_run(self.longest_run)) and count <= most - at:
                known, computed = row.computed, row.computed + count
                tokens += row.next_tokens(count)
                positions += range(known, computed)
                slots += [row.slot] * count
                runs.append((at, at + count))
                for place in range(max(row.first_wanted, known), computed):
                    wanted.append((row, place))
                    at_wanted.append(at + place - known)
                row.computed, at = computed, at + count
            if at == most:
                break
        tile = next(size for size in self.network.tiles if size >= at)
        width = max(len(row.pages) for row in rows)
        pages = np.zeros((tile, width), np.int32)
        pages[:at] = self.table[slots, :width]
        return Step(filled(tokens, tile), filled(positions, tile), pages, runs, self.cache, at_wanted), wanted
