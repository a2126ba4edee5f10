"""The smallest paged engine that makes sense, with Lamina attached: what is marked [1] to [7].

It runs: ``python docs/examples/tiny_engine.py`` asks the same long questions twice, of an engine
whose cache holds two of them. docs/engines.md says what each mark is about.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import torch

from lamina_kv.config import load_config
from lamina_kv.engines.hand_off import Phase
from lamina_kv.engines.ranks import Ranks
from lamina_kv.engines.standalone import Standalone, TextRequest
from lamina_kv.geometry import CacheGeometry, Group, GroupKind, Row
from lamina_kv.keys import Namespace

LAYERS, BLOCKS, BLOCK, LIMIT, VOCABULARY = 4, 40, 16, 8, 1000


class Request(TextRequest):  # [1] what Lamina must know of a request
    def __init__(self, request_id: str, prompt: Sequence[int], max_tokens: int) -> None:
        super().__init__(request_id)
        self.ids, self.prompt, self.end = list(prompt), len(prompt), len(prompt) + max_tokens
        self.computed, self.table = 0, list[int]()

    @property
    def num_prompt_tokens(self) -> int:
        return self.prompt

    def tokens(self) -> Sequence[int]:
        return self.ids

    def blocks(self, group: int) -> Sequence[int]:
        return self.table


class Pool:  # [2] a block pool that counts references
    def __init__(self) -> None:
        self.unused, self.references = deque(range(BLOCKS)), Counter[int]()

    def take(self, count: int) -> list[int]:
        blocks = [self.unused.popleft() for _ in range(count)]
        self.hold(blocks)
        return blocks

    def hold(self, blocks: Sequence[int]) -> None:
        self.references.update(blocks)

    def free(self, blocks: Sequence[int]) -> None:
        self.references.subtract(blocks)
        self.unused.extend(block for block in blocks if not self.references[block])


class TinyEngine:
    """Its "model" adds up what it has cached: one wrong page, and the next token is wrong."""

    def __init__(self, settings: dict[str, object], ranks: Ranks | None = None) -> None:
        self.cache = torch.zeros(LAYERS, BLOCKS, BLOCK, dtype=torch.int64)
        page = BLOCK * self.cache.itemsize
        geometry = CacheGeometry(  # [3] where the cache is
            rows=tuple(
                Row((f"layer {layer}",), 0, layer * BLOCKS * page, page, page)
                for layer in range(LAYERS)
            ),
            num_blocks=BLOCKS,
            block_tokens=BLOCK,
            chunk_tokens=BLOCK,
            allocation_bytes=(self.cache.nbytes,),
        )
        namespace = Namespace(  # [4] everything but tokens that changes a page's bytes
            model="sum", checkpoint="1", model_dtype="int64", cache_dtype="int64", quantization="",
            groups=(("full", BLOCK, 0),), chunk_tokens=BLOCK, layout="plain", page_bytes=(page,),
            tensor_parallel=1, pipeline_parallel=1, context_parallel=1, speculation="",
            engine="tiny", engine_format="1",
        )  # fmt: skip
        self.pool, self.computed = Pool(), 0
        self.waiting, self.running = deque[Request](), list[Request]()
        self.parked = dict[str, Request]()
        self.lamina = Standalone(
            load_config(settings, {}), geometry, [Group(GroupKind.FULL, BLOCK)],
            [self.cache.view(-1).view(torch.uint8)], namespace, self.pool, limit=LIMIT,
            ranks=ranks,  # of an engine that runs in several processes; none in one
        )  # fmt: skip

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int = 8) -> list[list[int]]:
        requests = [Request(f"r{i}", prompt, max_tokens) for i, prompt in enumerate(prompts)]
        self.waiting.extend(requests)
        while self.waiting or self.running or self.lamina.hand_off.has_work:
            self.step()
        return [request.ids[request.prompt :] for request in requests]

    def step(self) -> None:
        hand_off = self.lamina.hand_off
        for resumption in hand_off.take_ready():  # [5] those whose load is over come first
            request = self.parked.pop(resumption.request_id)
            request.computed = resumption.start
            self.running.append(request)
        while self.waiting and hand_off.has_room:
            needed = -(-self.waiting[0].end // BLOCK)
            if needed > len(self.pool.unused):
                break
            if hand_off.look(self.waiting[0], floor=0) is None:  # far tiers bring what it needs
                break
            request = self.waiting.popleft()
            request.table = self.pool.take(needed)
            admission = hand_off.admit(request, floor=0)  # it has no prefix cache of its own
            if admission.phase is Phase.PARKED:
                self.parked[request.request_id] = request
            else:
                request.computed = admission.start
                self.running.append(request)
        self.lamina.begin_step([(r.request_id, r.computed, len(r.ids)) for r in self.running])
        sums = self.forward()
        self.lamina.finish_loads()
        self.lamina.end_step()
        for request, total in zip(list(self.running), sums, strict=True):
            self.computed += len(request.ids) - request.computed
            request.computed = len(request.ids)
            request.ids.append(total % VOCABULARY)
            if len(request.ids) == request.end:
                self.running.remove(request)  # [7] over: say so, and then free what it has
                hand_off.finished(request.request_id, request.computed, [request.table])
                self.pool.free(request.table)

    def forward(self) -> list[int]:
        sums = [0] * len(self.running)
        for layer in range(LAYERS if self.running else 0):  # [6] each layer waits, and says when
            self.lamina.wait_layer(f"layer {layer}")
            for index, request in enumerate(self.running):
                for position in range(request.computed, len(request.ids)):
                    block, offset = request.table[position // BLOCK], position % BLOCK
                    mixed = (request.ids[position] + layer) * (position + 1)
                    self.cache[layer, block, offset] = mixed
                pages = self.cache[layer, request.table].flatten()[: len(request.ids)]
                sums[index] += int(pages.sum())
            self.lamina.layer_written(f"layer {layer}")
        return sums


def main() -> None:
    questions = [[(7 * i + j) % VOCABULARY for j in range(200)] for i in range(6)]
    engine = TinyEngine({"load": {"when": "always"}, "host": {"capacity": "1MiB"}})
    first, computed = engine.generate(questions), engine.computed
    again = engine.generate(questions)
    print(f"{computed} tokens computed, and {engine.computed - computed} when asked again")
    print("the answers are the same" if again == first else "THE ANSWERS DIFFER")
    engine.lamina.close()


if __name__ == "__main__":
    main()
