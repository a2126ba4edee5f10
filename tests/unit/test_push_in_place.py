"""A prefill engine does not send a recurrent state that its next step overwrites, whatever the
decode engine keeps of its own.
"""

from __future__ import annotations

import pytest
from driven_planner import BLOCK, CHUNK, Pool, View, prompt

from lamina_kv.config import PushConfig
from lamina_kv.control.cost import Costs
from lamina_kv.control.leases import LeaseBook
from lamina_kv.control.push.source import PushSource
from lamina_kv.control.requests import BoundaryState, PushParameters, RequestRecord
from lamina_kv.control.shape import ChunkShape
from lamina_kv.control.transfers import TransferTable
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.keys import ChunkChain, prompt_digest
from lamina_kv.push.cards import EngineCard, RankCard, RowCard
from lamina_kv.push.letters import Letter, News, Opened
from lamina_kv.push.messages import Announce, Attempt, BlockTable, Bound, Failed, Fenced
from push_books import ClockByHand, push_books

TOKENS = prompt(CHUNK + 8)


def card(name: str) -> EngineCard:
    """What a prefill engine and a decode engine say of themselves alike: that states are in place
    is not among it."""
    ranks = (RankCard(0, b"", 1000, (RowCard(0, 64, 64, 1, (0, 1)),)),)
    return EngineCard(name, b"model", False, (("full", BLOCK, 0), ("state", CHUNK, 0)), ranks)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("announced", ["before", "when the request has ended"])
def test_a_state_that_is_overwritten_is_not_sent(in_place: bool, announced: str) -> None:
    groups = (Group(GroupKind.FULL, BLOCK), Group(GroupKind.STATE, CHUNK, in_place=in_place))
    pool = Pool()
    source = PushSource(
        PushConfig(),
        push_books(ChunkShape(CHUNK, groups, 0), TransferTable(1), LeaseBook(pool), ClockByHand()),
        card("p"),
        Costs(),
    )
    view = View("r", TOKENS, tables={0: [1, 2, 3], 1: [9]})
    view.push = PushParameters("push", None)
    record = RequestRecord(view, ChunkChain(b"namespace", CHUNK, b"", 2))
    attempt = Attempt("push", 1)
    tables = (BlockTable(0, (21, 22)), BlockTable(0, (29,)))
    digest = prompt_digest(TOKENS, b"", b"")
    announcement = Announce(attempt, digest, 0, CHUNK, 60.0, tables)
    news: list[News] = [Opened("d", "d", card("d")), Letter("d", announcement)]

    source.admitted(record, 0)
    if announced == "before":
        source.receive(news)
    for start, end in ((0, CHUNK), (CHUNK, len(TOKENS))):
        if end == CHUNK:
            source.state(record, BoundaryState("r", 1, 9, CHUNK))
        source.progress(record, start, end)
        source.plan()
    source.finished(record, len(TOKENS), [[1, 2, 3], [9]])
    if announced != "before":
        source.receive(news)
        source.plan()

    said = [type(letter.message) for letter in source.letters]
    sent = {block for order in source.orders for part in order.pages for block in part.sources}
    if in_place:
        assert said == [Failed, Fenced]
        assert not sent
        assert not pool.held
    else:
        assert said == [Bound]
        assert sent == {1, 2, 9}
