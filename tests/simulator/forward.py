"""The forward pass: which stamps a step writes, and what its requests read before they go on."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import numpy.typing as npt

from simulator.content import SPOILED, Ledger, Stamps, extend
from simulator.options import BLOCK_TOKENS
from simulator.request import VOCABULARY, Request, RunState
from simulator.step import Item

Indices = npt.NDArray[np.int64]

_RIGHT_DRAFTS = 0.7


class Part:
    """An item of a step, ready to be computed on every rank.

    Its tokens are those that are known and, behind them, drafts; ``item.sampled`` is what the
    model says after the last known token and after each draft that was right.

    Args:
        item: the item.
        random: decides which drafts are right.
        ledger: learns whose the stamps are.
        window: tokens that a layer looks at, and that the run's ring holds; 0 if it is all.

    Attributes:
        after: tokens of its run that are computed when the step is over.
        trusted: whether its run is believed so far, so that what it reads must be right.
        spoiled: whether it has read something wrong.
        written: the hashes to write, shape ``(count,)``.
        blocks: the block for each of them.
        offsets: the token within its block.
        first: the first token that is read.
        prefix: the hashes that must be there, shape ``(start - first,)``.
        prefix_blocks: the block for each of them.
        prefix_offsets: the token within its block.
    """

    def __init__(self, item: Item, random: Random, ledger: Ledger, window: int = 0) -> None:
        run, request = item.run, item.run.request
        start = run.position
        self.item = item
        self.trusted = run.state is not RunState.DROPPED
        self.after = start + item.count
        known = max(0, request.num_tokens - start)
        self.spoiled = not self.trusted and known == 0  # goes on from a token that did not count
        written = request.hashes[start : start + item.count]
        if self.trusted and known <= item.count:
            drafts = self._sample(item, request, item.count - known, random)
            added = extend(int(request.hashes[-1]), drafts)
            ledger.note(added, f"a draft of {request.request_id}", request.num_tokens)
            written = np.concatenate([written, np.array(added, np.uint64)])
            self.after -= len(drafts) - (len(item.sampled) - 1)
        if len(written) < item.count:
            written = np.resize(np.append(written, np.uint64(1)), item.count)
        kept = min(item.count, window or item.count)  # what a ring has of a longer step at its end
        self.written: Stamps = written[item.count - kept :]
        end = start + item.count
        self.blocks, self.offsets = self._places(np.arange(end - kept, end), window)
        self.first = max(0, start - window + 1) if window else 0
        self.prefix: Stamps = request.hashes[self.first : start]
        read = self.first + np.arange(len(self.prefix))
        self.prefix_blocks, self.prefix_offsets = self._places(read, window)

    def _places(self, positions: Indices, window: int) -> tuple[Indices, Indices]:
        """The block of each token, and the token's place in it."""
        blocks = np.array(self.item.run.blocks.ids, np.int64)
        places = positions % window if window else positions
        return blocks[places // BLOCK_TOKENS], places % BLOCK_TOKENS

    @staticmethod
    def _sample(item: Item, request: Request, count: int, random: Random) -> list[int]:
        """Drafts to run with the item, and what is sampled with them."""
        parent = int(request.hashes[-1])
        item.sampled = [Request.next_token(parent)]
        drafts: list[int] = []
        while len(drafts) < count:
            accepting = len(item.sampled) > len(drafts)
            right = item.sampled[-1]
            token = right if random.random() < _RIGHT_DRAFTS else random.randrange(VOCABULARY)
            drafts.append(token)
            if accepting and token == right:
                parent = extend(parent, [token])[0]
                item.sampled.append(Request.next_token(parent))
        return drafts


class Pages:
    """One rank's cache: stamps by block, row and token, and a gap after each block.

    Args:
        blocks: how many blocks.
        rows: how many rows.
        salts: of this rank's rows, shape ``(rows,)``.
        ledger: names what is found.

    Attributes:
        memory: all of it, shape ``(blocks, rows * BLOCK_TOKENS + 1)``.
    """

    _GAP = 0x0123456789ABCDEF

    def __init__(self, blocks: int, rows: int, salts: Stamps, ledger: Ledger) -> None:
        width = rows * BLOCK_TOKENS
        self.memory: Stamps = np.zeros((blocks, width + 1), np.uint64)
        self.memory[:, width] = self._GAP
        self._stamps = np.lib.stride_tricks.as_strided(
            self.memory,
            (blocks, rows, BLOCK_TOKENS),
            (self.memory.strides[0], BLOCK_TOKENS * 8, 8),
        )
        self._salts = salts
        self._ledger = ledger

    @property
    def gaps_untouched(self) -> bool:
        """Whether nothing but pages was ever written."""
        return bool((self.memory[:, -1] == self._GAP).all())

    def write(self, part: Part, rows: slice) -> None:
        """Write what a part computes, in some rows."""
        salts = self._salts[rows] ^ np.uint64(SPOILED if part.spoiled else 0)
        self._stamps[part.blocks, rows, part.offsets] = part.written[:, None] ^ salts

    def scribble(self, blocks: Sequence[int]) -> None:
        """Write to whole blocks what nobody has computed."""
        self._stamps[blocks] = 0

    def misread(self, part: Part, rows: slice) -> tuple[int, str] | None:
        """What of a part's prefix is not what it should be, in some rows.

        Returns:
            The index of the first wrong block of the request, and words; None if all is right.
        """
        found = self._stamps[part.prefix_blocks, rows, part.prefix_offsets]
        wrong = found != part.prefix[:, None] ^ self._salts[rows]
        if not wrong.any():
            return None
        index = int(np.flatnonzero(wrong.any(axis=1))[0])
        row = int(np.flatnonzero(wrong[index])[0])
        position = part.first + index
        return position // BLOCK_TOKENS, (
            f"{part.item.run.request.request_id} read token {position} in row "
            f"{range(len(self._salts))[rows][row]} of block {part.prefix_blocks[index]} and found: "
            f"{self._ledger.name(int(found[index, row]))}"
        )
