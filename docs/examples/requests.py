"""The requests of docs/sizing.md: an afternoon of 60 people who talk to one server.

Run it to see them; ``docs/examples/requests.jsonl`` is what it prints. They are made up, and in the
form that ``observe.trace`` records: a line for each request, a number for each chunk of 64 tokens.
"""

from __future__ import annotations

import json
import random

CHUNK = 64
CHUNK_BYTES = 8 << 20  # 128 KiB a token: 32 layers, 8 heads of 128 for keys and for values, bf16
PREFILL = 9000.0  # tokens a second


def main() -> None:
    """Print the requests, by time."""
    source = random.Random(7)
    number = iter(range(10_000, 100_000))
    assistants = [[next(number) for _ in range(size)] for size in (10, 16, 24)]
    requests = []
    for _ in range(60):
        prompt, when = list(source.choice(assistants)), source.uniform(0, 4 * 3600)
        for _ in range(source.choice((1, 1, 2, 4, 8))):
            prompt = prompt + [next(number) for _ in range(source.choice((1, 2, 4, 12)))]
            answer = [next(number) for _ in range(source.choice((2, 4, 8)))]
            requests.append((when, list(prompt), answer))
            prompt = prompt + answer
            when += source.expovariate(1 / 300)  # five minutes, on average, to the next turn
    for when, prompt, answer in sorted(requests):
        tokens = CHUNK * len(prompt) + 20
        line = {
            "timestamp": round(1e3 * when),
            "input_length": tokens,
            "output_length": CHUNK * len(answer) + 8,
            "hash_ids": prompt,
            "output_hash_ids": answer,
            "chunk_tokens": CHUNK,
            "chunk_bytes": CHUNK_BYTES,
            "prefill_seconds": round(tokens / PREFILL, 6),
        }
        print(json.dumps(line, separators=(",", ":")))


if __name__ == "__main__":
    main()
