"""Control's half of pushes, which is a part of the planner like any other: ``pushes.py``.

===============  ===============================================================================
pushes.py        What does the planner ask of pushes?
source.py        Prefill: which requests are pushed, to whom, and how does that end?
outbound.py      What is known of one push to another engine?
queue.py         Which requests wait for blocks because of their pushes, and for how long?
fit.py           Does what a decode engine announces fit what is computed here?
open_prompts.py  What may be bound while a step runs?
sender.py        Which pages are due, and how are they ordered?
undelivered.py   How much do prompts take whose destination is not known?
target.py        Decode: what is announced, expected, given up and quarantined?
claims.py        Which requests wait for room, and what did the prefill engine say of them?
inbound.py       What is known of one push to this engine?
room.py          How much of this engine's cache may pushes take?
endings.py       Which attempts are over, for as long as a decode engine may ask?
failures.py      What is logged of pushes that failed?
===============  ===============================================================================

``docs/push.md`` is the protocol.
"""
