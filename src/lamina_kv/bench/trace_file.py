"""A trace of requests as the replay needs it: by time, its blocks numbered."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lamina_kv.observe.traces import TracedRequest, read_requests


@dataclass(frozen=True, slots=True)
class ReplayedRequest:
    """One request of a trace.

    Attributes:
        seconds: when it comes, from the first one on.
        input_tokens: tokens of its prompt.
        output_tokens: tokens of its answer.
        blocks: the blocks of its prompt, in prefix order, numbered over the whole trace. A number
            stands for the block and all blocks before it, so it has one place in every prompt.
        answer: likewise the blocks that its answer has completed, if the trace has them.
        prefill_seconds: what computing its prompt was predicted to take; 0 if the trace does not
            say.
    """

    seconds: float
    input_tokens: int
    output_tokens: int
    blocks: array[int]
    answer: array[int]
    prefill_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Trace:
    """See the module.

    Attributes:
        requests: by the time at which they come.
        blocks: blocks of all prompts.
        different: different blocks, those of answers included.
        block_tokens: tokens of one block.
        block_bytes: bytes of one block; 0 if nobody knows.
    """

    requests: tuple[ReplayedRequest, ...]
    blocks: int
    different: int
    block_tokens: int
    block_bytes: int

    @property
    def prefill_rate(self) -> float:
        """Tokens of prompts computed a second, as the server has measured it; 0 if it has not."""
        measured = [request for request in self.requests if request.prefill_seconds]
        seconds = sum(request.prefill_seconds for request in measured)
        return sum(request.input_tokens for request in measured) / seconds if seconds else 0.0

    @property
    def most_found(self) -> int:
        """Blocks of prompts that were in a prompt, or an answer, before: what a tier without
        bounds finds, if one request has ended before the next comes."""
        seen: set[int] = set()
        found = 0
        for request in self.requests:
            found += sum(block in seen for block in request.blocks)
            seen.update(request.blocks)
            seen.update(request.answer)
        return found


def read_trace(path: Path, block_bytes: int = 0) -> Trace:
    """Read a trace.

    Args:
        path: the file, see :mod:`lamina_kv.observe.traces`.
        block_bytes: bytes of one block; 0 for what the trace says.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no trace; says what is wrong with it.
    """
    with path.open("rb") as file:
        traced = sorted(read_requests(file), key=lambda request: request.timestamp)
    if not any(request.hash_ids for request in traced):
        raise ValueError("no request has a block")
    numbers: dict[tuple[int, int], int] = {}
    began = traced[0].timestamp
    requests = []
    for request in traced:
        chain, last = array("I"), -1
        for block in (*request.hash_ids, *request.output_hash_ids):
            last = numbers.setdefault((last, block), len(numbers))
            chain.append(last)
        prompt = len(request.hash_ids)
        requests.append(
            ReplayedRequest(
                (request.timestamp - began) / 1e3,
                request.input_length,
                request.output_length,
                chain[:prompt],
                chain[prompt:],
                request.prefill_seconds,
            )
        )
    return Trace(
        tuple(requests),
        sum(len(request.blocks) for request in requests),
        len(numbers),
        max(request.chunk_tokens for request in traced) or _tokens_of_a_block(traced),
        block_bytes or max(request.chunk_bytes for request in traced),
    )


def _tokens_of_a_block(traced: Sequence[TracedRequest]) -> int:
    """The fewest tokens that a block can have, in sixteens, so that every prompt fits into its
    blocks."""
    least = max(-(-each.input_length // len(each.hash_ids)) for each in traced if each.hash_ids)
    return -(-max(1, least) // 16) * 16
