"""The engine's block pool: reference counts, a free list and a prefix cache, as vLLM has them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from simulator.content import Violation


class EnginePool:
    """Blocks ``1 .. blocks - 1``; block 0 belongs to nobody.

    A freed block that is not in the prefix cache is reused first, the latest freed one before
    all others; one that is in the cache is reused last and found again until then.

    Args:
        blocks: how many.
        caching: whether full blocks are kept findable by their prefix.
        reused: called with a block that is given to somebody new.
    """

    def __init__(self, blocks: int, caching: bool, reused: Callable[[int], None]) -> None:
        self.references = [0] * blocks
        self._caching = caching
        self._reused = reused
        self._hash_of: dict[int, int] = {}
        self._cached: dict[int, dict[int, None]] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody refers to."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """``count`` free blocks; what the cache knew of them is forgotten."""
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self.forget(block)
            self.references[block] = 1
            self._reused(block)
        return taken

    def touch(self, blocks: Iterable[int]) -> None:
        """One more reference to each block."""
        for block in blocks:
            if self.references[block] == 0:
                del self._free[block]
            self.references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each block; the first given up is the first reused."""
        first: list[int] = []
        for block in blocks:
            self.references[block] -= 1
            if self.references[block] < 0:
                raise Violation(f"block {block} was freed more often than it was taken")
            if self.references[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    first.append(block)
        for block in reversed(first):
            self._free.move_to_end(block, last=False)

    def free_of(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` are in the free list."""
        return sum(self.references[block] == 0 for block in blocks)

    def remember(self, block: int, prefix: int) -> None:
        """Let ``block`` be found by the hash of the prefix that it ends."""
        if self._caching and block not in self._hash_of:
            self._hash_of[block] = prefix
            self._cached.setdefault(prefix, {})[block] = None

    def forget(self, block: int) -> None:
        """Let nobody find ``block`` any more."""
        prefix = self._hash_of.pop(block, None)
        if prefix is not None:
            del self._cached[prefix][block]
            if not self._cached[prefix]:
                del self._cached[prefix]

    def find(self, prefix: int) -> int | None:
        """A block that ends this prefix."""
        return next(iter(self._cached.get(prefix, ())), None)

    def forget_all(self) -> None:
        """Empty the prefix cache."""
        for block in list(self._hash_of):
            self.forget(block)


class LeasedPool:
    """What control sees of the pool; counts leases apart from the engine's own references.

    Args:
        pool: the engine's pool.
    """

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self._leases: dict[int, int] = {}

    @property
    def leased(self) -> dict[int, int]:
        """Leases by block, of blocks that have any."""
        return {block: count for block, count in self._leases.items() if count}

    def hold(self, blocks: Sequence[int]) -> None:
        """See :class:`lamina_kv.control.leases.BlockPool`."""
        for block in blocks:
            if not self._pool.references[block]:
                raise Violation(f"a lease was taken on block {block}, which nobody holds")
            self._leases[block] = self._leases.get(block, 0) + 1
        self._pool.touch(blocks)

    def free(self, blocks: Sequence[int]) -> None:
        """See :class:`lamina_kv.control.leases.BlockPool`."""
        for block in blocks:
            if not self._leases.get(block):
                raise Violation(f"a lease on block {block} was released twice")
            self._leases[block] -= 1
        self._pool.release(reversed(blocks))
