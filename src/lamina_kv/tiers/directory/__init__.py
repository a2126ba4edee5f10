"""A directory that engines of one or several machines share, as a far tier: one file a chunk.

==========  ======================================================================================
config.py   What is a directory tier configured with?
store.py    How does a rank find, read and write its chunks, and what does an error mean?
root.py     Is it the directory that it was, and what is it?
files.py    How does a file appear whole or not at all?
present.py  Which of many files are there, in one call?
fan.py      Who asks a slow file system many small questions at once?
layout.py   Where is what, and which names are Lamina's?
sweeper.py  Which files does ``lamina-kv sweep`` delete?
lease.py    Who is the one that sweeps?
listing.py  What is in a directory, for a person?
==========  ======================================================================================

``docs/stores.md`` says how to use it.
"""
