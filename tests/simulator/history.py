"""Random histories: a seed decides the engine, the weather and everything that happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from unittest.mock import patch

from lamina_kv.tiers.regard import USUAL, Regard
from simulator.content import Violation
from simulator.engine import Simulator
from simulator.faults import Weather
from simulator.options import BLOCK_TOKENS, Far, Options, Sort
from simulator.stores import Past

_DOCUMENTS = 3
_BUSY = 8
_REGARDS = [USUAL] * 30 + [
    Regard(share=True),
    Regard(keep=False),
    Regard(prefetch=True),
    Regard(pin_seconds=0.01, priority=1),
    Regard(priority=-1),
]
_LONGEST = 5_000
"""Steps after which an engine with a few requests is idle."""


class Prompts:
    """Prompts that share prefixes.

    Args:
        random: chooses.
        longest: tokens of the longest request.
    """

    def __init__(self, random: Random, longest: int) -> None:
        self._random = random
        self._longest = longest
        self._documents = [
            [random.randrange(50) for _ in range(longest)] for _ in range(_DOCUMENTS)
        ]

    def draw(self) -> tuple[list[int], int]:
        """A prompt and how many tokens may follow it."""
        random = self._random
        max_tokens = random.choice((1, 1, 2, 8))
        most = max(2, self._longest - max_tokens - 4)
        document = random.choice(self._documents)
        prompt = document[: random.randint(1, most)]
        if random.random() < 0.3:
            prompt = prompt[: most - 4] + [random.randrange(50, 100) for _ in range(4)]
        return prompt, max_tokens


def run_history(
    seed: int,
    steps: int,
    store: Path | None = None,
    *,
    options: Options | None = None,
    weather: Weather | None = None,
    virtual: bool = True,
) -> Counter[str]:
    """Live through ``steps`` steps, then let everything end. With far tiers the engine may be
    killed half-way, and another one goes on with what they have.

    Args:
        seed: decides.
        steps: how long.
        store: a directory for a disk; without one there is none.
        options: the engine, if the seed is not to decide.
        weather: likewise; does not change then.
        virtual: whether threads and time are virtual.

    Returns:
        What has happened how often.

    Raises:
        Violation: if a promise was broken; its notes say what led to it.
    """
    random = Random(seed)
    options = options or Options.draw(random, disk=store is not None)
    prompts = Prompts(random, options.longest)
    past, counts = Past(), Counter[str]()
    lives = random.choice((1, 2)) if options.tiers else 1
    for life in range(1, lives + 1):
        with Simulator(seed + life, options, store, past=past, virtual=virtual) as simulator:
            simulator.weather = weather or Weather()
            try:
                for _ in range(steps // lives):
                    if weather is None and random.random() < 0.02:
                        turn(simulator, random)
                    happen(simulator, random, prompts)
                    simulator.step()
                if life == lives:
                    simulator.drain()
                else:
                    simulator.kill()
            except Violation as violation:
                violation.add_note(f"seed {seed}, life {life}")
                raise
            simulator.counts["steps"] = simulator.steps
            counts += simulator.counts
    counts["lives"] = lives
    return counts


def turn(simulator: Simulator, random: Random) -> None:
    """Let the weather turn, on all far tiers or on some."""
    simulator.weather = Weather.draw(random)
    names = [tier.name for tier in simulator.options.tiers]
    simulator.dry = {name for name in names if random.random() < 0.3}


def run_crowd(
    seed: int, store: Path | None = None, *, far: Sort | None = None, hand_off: bool = False
) -> Counter[str]:
    """Let several requests about one document come at once, in fair weather, while another one
    runs.

    Args:
        seed: decides how many there are, how long everything is, and what engine it is; one that
            has a prefix cache.
        store: a directory for a disk.
        far: the far tier in which the document is then, and nowhere else; None if it is near.
        hand_off: whether the engine's scheduler knows nothing of loads.

    Returns:
        What has happened how often.

    Raises:
        Violation: if a promise was broken, or if more was loaded than the document once.
    """
    random = Random(seed)
    options = replace(
        Options.draw(random),
        blocks=64,
        chunk_blocks=random.randint(1, 2),
        max_running=6,
        prefix_caching=True,
        host_slots=100,
        tiers=(Far("far", far, room=100),) if far is not None else (),
        when="always",
        min_tokens=0,
        saves_in_flight=64,
        save_tokens="all",
        deadline=1.0,
    )
    if hand_off:
        options = replace(options.with_hand_off(random), boundary_blocks=1)
    chunks = random.randint(2, 8)
    document = [random.randrange(50) for _ in range(chunks * options.chunk_tokens)]
    with Simulator(seed, options, store) as simulator:
        simulator.submit([*document, 50], 1)
        _idle(simulator)
        simulator.forget_prefixes()
        if far is not None:
            simulator.empty_near()
        simulator.submit([51] * 5, 30)
        for _ in range(random.randint(0, 3)):
            simulator.step()
        before = simulator.counts["chunks loaded"]
        for number in range(random.randint(2, 5)):
            simulator.submit([*document, *[60 + number] * random.randint(1, 5)], 2)
        _idle(simulator)
        loaded = simulator.counts["chunks loaded"] - before
        if loaded > chunks:
            violation = Violation(f"{loaded} chunks were loaded of a document of {chunks}")
            violation.add_note(f"seed {seed}")
            violation.add_note(simulator.describe())
            raise violation
        simulator.drain()
        return simulator.counts


def run_return(
    seed: int,
    store: Path | None = None,
    *,
    sorts: Sequence[Sort],
    broken: int | None = None,
    hand_off: bool = False,
) -> Counter[str]:
    """Let an engine end and another one begin, in fair weather: it finds again what is in far
    tiers, and loads it near first.

    Args:
        seed: decides what engine it is, and what is asked of it.
        store: a directory for disks.
        sorts: its far tiers. What the first engine has saved is in one of them only.
        broken: the tier that delivers nothing to the second engine; then everything is in all of
            them, and only the first request gets less than there is.
        hand_off: whether the engine's scheduler knows nothing of loads.

    Returns:
        What has happened how often in the second engine.

    Raises:
        Violation: if a promise was broken, or if something was not found again.
    """
    random, past = Random(seed), Past()
    tiers = tuple(Far(f"far-{n}", sort, room=400) for n, sort in enumerate(sorts))
    options = replace(
        Options.draw(random),
        blocks=64,
        tiers=tiers,
        prefix_caching=False,
        host_slots=400,
        when="always",
        min_tokens=0,
        saves_in_flight=400,
        save_tokens="all",
        deadline=1.0,
    )
    if hand_off:
        options = replace(options.with_hand_off(random), boundary_blocks=1)
    draw = Prompts(random, options.longest).draw
    prompts = [draw()[0] for _ in range(6)]
    with taken_whole(), Simulator(seed, options, store, past=past) as simulator:
        for prompt in prompts:
            simulator.submit(prompt, 1)
        _idle(simulator)
        simulator.drain()
    if broken is None:
        past.spread(random)
    expected = 0
    options = replace(options, breaker_failures=1, breaker_pause=1e4)
    with taken_whole(), Simulator(seed, options, store, past=past) as simulator:
        if broken is not None:
            simulator.dry = {tier.name for n, tier in enumerate(tiers) if n != broken}
            simulator.weather = Weather(raises=0.5, unread=1.0)
            prompts.sort(key=len)
            simulator.submit(prompts.pop(), 1)
            _idle(simulator)
        before = simulator.tokens_loaded
        for prompt in prompts:
            simulator.submit(prompt, 1)
            whole = len(prompt) // options.chunk_tokens * options.chunk_tokens
            usable = (len(prompt) - 1 - options.drafts) // BLOCK_TOKENS * BLOCK_TOKENS
            expected += max(0, min(whole, usable))
        _idle(simulator)
        if (found := simulator.tokens_loaded - before) != expected:
            violation = Violation(f"{found} tokens were found again, of {expected}")
            violation.add_note(f"seed {seed}")
            violation.add_note(simulator.describe())
            raise violation
        simulator.drain()
        return simulator.counts


@contextmanager
def taken_whole() -> Iterator[None]:
    """Engines take what is offered while the context is open."""
    with patch("simulator.scheduler.DECLINED", -1), patch("simulator.hand_off.DECLINED", -1):
        yield


def _idle(simulator: Simulator) -> None:
    for _ in range(_LONGEST):
        if not simulator.has_work:
            return
        simulator.step()
    raise Violation("the engine would step for ever")


def happen(simulator: Simulator, random: Random, prompts: Prompts) -> None:
    """Whatever may happen between two steps."""
    dice = random.random()
    active = simulator.active
    if dice < 0.35 and len(active) < _BUSY:
        prompt, max_tokens = prompts.draw()
        salt, regard = int(random.random() < 0.05), random.choice(_REGARDS)
        simulator.submit(prompt, max_tokens, salt, regard=regard)
    elif dice < 0.38 and active:
        simulator.abort(random.choice(active))
    elif dice < 0.40:
        simulator.preempt()
    elif dice < 0.42:
        simulator.hurry()
    elif dice < 0.45:
        simulator.forget_prefixes()
    elif dice < 0.454:
        simulator.reset()
    elif dice < 0.456:
        simulator.change_weights()
    elif dice < 0.46:
        simulator.damage()
