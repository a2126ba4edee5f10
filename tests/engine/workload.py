"""Prompts for the engine tests, the same in every run."""

from __future__ import annotations

import random

from engine.models import VOCABULARY

BLOCK = 32
"""Tokens of a block in the tests, unless they say otherwise."""

CHUNK = 64
"""Tokens of a chunk at that block size, with ``chunk_tokens: auto``."""

Tokens = tuple[int, ...]


def random_tokens(rng: random.Random, length: int) -> Tokens:
    """``length`` random token ids."""
    return tuple(rng.randrange(VOCABULARY) for _ in range(length))


def prompt(seed: int, length: int) -> Tokens:
    """The random prompt of that seed and length; another seed shares no prefix with it."""
    return random_tokens(random.Random(seed), length)


def mixed_prompts(seed: int, count: int = 50, longest: int = 700) -> list[Tokens]:
    """Prompts of every kind that matters to a cache, in random order.

    A fifth each: of random length; with a beginning that several share; shorter than a chunk;
    a whole number of chunks, so that a hit covers all of them; one token more than that.
    """
    rng = random.Random(seed)
    bases = [random_tokens(rng, longest) for _ in range(3)]

    def shared() -> Tokens:
        return rng.choice(bases)[: rng.randrange(CHUNK, longest)]

    def chunks() -> int:
        return rng.randrange(1, longest // CHUNK)

    kinds = (
        lambda: random_tokens(rng, rng.randrange(CHUNK, longest)),
        lambda: shared() + random_tokens(rng, rng.randrange(1, CHUNK)),
        lambda: random_tokens(rng, rng.randrange(1, CHUNK)),
        lambda: rng.choice(bases)[: chunks() * CHUNK],
        lambda: random_tokens(rng, chunks() * CHUNK + 1),
    )
    prompts = [kinds[index % len(kinds)]() for index in range(count)]
    rng.shuffle(prompts)
    return prompts


def loadable(length: int) -> int:
    """Tokens of a prompt of that length that a second request for it finds: whole chunks, but
    never the last token, whose answer has to be computed."""
    return min(length // CHUNK * CHUNK, (length - 1) // BLOCK * BLOCK)
