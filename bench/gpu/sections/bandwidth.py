"""E: bandwidth of the mover by page size, as a share of one large copy's.

By kernel and by copy engine. Which of them a page size takes is promised, and is to be what is
faster: the section's last rows say from which size on that is the copy engine, for the table in
``movers/crossover.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator

from gpu.copies import Cache, seconds
from gpu.lab import Lab
from gpu.plan import Bench
from gpu.report import Bound, Row
from lamina_kv.data.movers.crossover import Way, way_of

PAGES = tuple(kib << 10 for kib in (8, 16, 18, 32, 64, 128))
LEAST_PROMISED = 16 << 10
PIECES = tuple(mib << 20 for mib in (8, 32))
PROGRAMS = (4, 8, 12, 16, 32, 64)
SWEPT_PAGE = 64 << 10

SIZE, SMALL_SIZE = 256 << 20, 64 << 10
"""Bytes of one round, and where memory is scarce."""

ROUNDS = 3
PROMISED = Bound(0.9, at_least=True)

Rates = dict[tuple[Way, str, int], float]
"""GB/s of scattered pages, by way, direction and page size."""


def run(bench: Bench[Lab]) -> Generator[Row, None, None]:
    """See the module."""
    size = SIZE if bench.lab.is_large else SMALL_SIZE
    rates: Rates = {}
    for page in PAGES:
        cache = Cache(bench.lab, page, size)
        try:
            for piece in PIECES:
                for scattered in (True, False):
                    yield from _shares(bench, cache, page, piece, rates, scattered=scattered)
            if page == SWEPT_PAGE:
                yield from _programs(bench, cache)
        finally:
            cache.close()
    for direction in ("H2D", "D2H"):
        yield Row(f"{direction}, copy engine from pages of", crossover(rates, direction), "KiB")


def crossover(rates: Rates, direction: str) -> float:
    """The page size in KiB from which on the copy engine is at least as fast as the kernel;
    infinite if it is at none, not a number if there is none."""
    pages = sorted({page for way, towards, page in rates if towards == direction}, reverse=True)
    least = math.inf
    for page in pages:
        engine = rates.get((Way.COPY_ENGINE, direction, page))
        if engine is None:
            return math.nan
        if engine < rates[Way.KERNEL, direction, page]:
            break
        least = page / 1024
    return least


def share(rate: float, ceiling: float | None) -> float:
    """Of the ceiling; not a number if that was not measured."""
    return math.nan if ceiling is None else rate / ceiling


def _shares(
    bench: Bench[Lab], cache: Cache, page: int, piece: int, rates: Rates, *, scattered: bool
) -> Generator[Row, None, None]:
    order = "scattered" if scattered else "neighbours"
    for direction, way in itertools.product(("H2D", "D2H"), cache.ways):
        with bench.lab.way(way):
            rate = _rate(cache, piece, direction, scattered=scattered)
        if scattered and piece == max(PIECES):
            rates[way, direction, page] = rate
        # Small pieces are bounded by launches: they are noted, the large ones are promised.
        taken = way_of(page, to_engine=direction == "H2D") if len(cache.ways) > 1 else way
        promised = page >= LEAST_PROMISED and piece == max(PIECES) and way is taken
        bound = PROMISED if promised else None
        what = (
            f"{direction}, pages of {page >> 10} KiB, {order}, pieces of {piece >> 20} MiB, {way}"
        )
        yield Row(what, share(rate, bench.ceilings.get(direction)), "of B", bound)


def _programs(bench: Bench[Lab], cache: Cache) -> Generator[Row, None, None]:
    for count in PROGRAMS:
        with bench.lab.programs(count), bench.lab.way(Way.KERNEL):
            for direction in ("H2D", "D2H"):
                rate = _rate(cache, max(PIECES), direction, scattered=True)
                yield Row(f"{direction}, {count} programs", rate, "GB/s")


def _rate(cache: Cache, piece: int, direction: str, *, scattered: bool) -> float:
    """The best of some rounds in GB/s, behind one that compiles and uploads."""
    to_engine = direction == "H2D"
    pieces = cache.pieces(piece, scattered=scattered)
    seconds(cache.move(pieces, to_engine=to_engine))
    best = min(seconds(cache.move(pieces, to_engine=to_engine)) for _ in range(ROUNDS))
    return cache.size / best / 1e9
