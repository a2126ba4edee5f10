"""A simulated engine that drives Lamina's real planner and executors through random histories.

It schedules like vLLM 0.32 (``scheduler.py``), with a block pool and a prefix cache of its own
(``pool.py``), on one or two ranks (``rank.py``). What it computes is not attention but *stamps*
(``content.py``): a slot of a page holds a number that only the right prefix, row and rank gives,
so that a wrong byte is seen when it is read, and named. Threads and time are virtual
(``virtual.py``): a seed decides which transfer moves when, and the same seed gives the same
history. The device may run behind the engine (``device.py``). Far tiers are stores in memory or on
the real disk (``stores.py``), and outlive the engine. What goes wrong is decided by the weather
(``faults.py``). What must hold all the same is checked as it runs and when it has drained: by
``engine.py`` and ``watch.py``, for slots and moves by ``moves.py``, by ``origins.py`` for which
tier gets the credit for a chunk, and by ``subscriber.py`` for what is told of tiers.
"""
