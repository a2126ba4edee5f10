"""The data room: carries out a rank's part of every plan, in threads of its own.

====================  ============================================================================
executor.py           What does an engine adapter call, and when?
assembly.py           How is an executor put together, and what does it open?
near.py               Where are a chunk's bytes in host memory?
movers/               How do pages get from host memory into the engine's cache, and back?
loads.py              What is one load, and what has become of it?
load_pipeline.py      In what order do the rows of loads come?
row_fences.py         Which rows has the device still to copy?
load_times.py         How long did rows take, and how long did the model wait?
step_loads.py         When may a layer read its row?
written_rows.py       Which rows has a step written?
save_pipeline.py      When is a row copied out?
arrivals.py           When does a parked request go on?
compute_lane.py       When did layers compute?
copier.py             What do all loads share, and all saves?
moving.py             When is a far tier read, written and asked?
far.py                What is believed of a store? Nothing: chunks are sealed and verified.
replicas.py           Which ranks hold the same cache, and who of them keeps it?
shared_memory.py      How do they share memory?
worker_pool.py        Who runs a job, and who answers for one that is lost?
threads.py            How does a thread begin?
push_*.py             What goes to and comes from other engines.
====================  ============================================================================
"""
