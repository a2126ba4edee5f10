"""Write a trace of documents that are asked for in turn, round and round, or at random, for
``lamina-kv bench trace``: what tiers find where there are more documents than fit.

    python bench/loop_trace.py 200 > loop.jsonl
    lamina-kv bench trace loop.jsonl --host 1600 --one-after-another
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from itertools import count

BLOCK_TOKENS = 512
"""Tokens of a block of the published traces."""


def prompts(options: argparse.Namespace) -> Iterator[Sequence[int]]:
    """Block ids of each prompt."""
    chance, fresh = random.Random(options.seed), count(10**9)
    common = range(10**8, 10**8 + options.common)
    for _ in range(options.rounds):
        turn = list(range(options.documents))
        if options.shuffle:
            chance.shuffle(turn)
        if options.random:
            turn = chance.choices(turn, k=len(turn))
        for document in turn:
            first = document * options.blocks
            yield (*common, *range(first, first + options.blocks))
            if chance.random() < options.questions:
                yield [next(fresh) for _ in range(options.blocks)]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("documents", type=int)
    parser.add_argument("--blocks", type=int, default=16, help="Of each document.")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--common", type=int, default=0, help="Blocks in front of every document.")
    parser.add_argument("--questions", type=float, default=0.0, help="One-off prompts a document.")
    parser.add_argument("--shuffle", action="store_true", help="Each round in another order.")
    parser.add_argument("--random", action="store_true", help="Any document at any time.")
    parser.add_argument("--seed", type=int, default=0)
    for number, blocks in enumerate(prompts(parser.parse_args())):
        request = {
            "timestamp": 1000 * number,
            "input_length": BLOCK_TOKENS * len(blocks),
            "output_length": 64,
            "hash_ids": [*blocks],
        }
        print(json.dumps(request))


if __name__ == "__main__":
    main()
