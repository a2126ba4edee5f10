"""The local disk as a far tier: one store a server, found again after a restart.

==============  ==================================================================================
config.py       What is a disk tier configured with?
store.py        How does a rank open its part, read it and write it? The order that makes it safe.
heads.py        Which chunk is in which slot? In memory, and in tables on the disk.
layout.py       Where in a slab, a rank's one file, is what?
tables.py       How is a table of a slab kept in memory and on the disk?
data.py         How is a slab made, read and written?
mending.py      What if a slab is new, cut short, damaged, or of another size?
shrinking.py    Which chunks survive a smaller capacity?
aio.py          How does a batch reach the kernel in one call?
directory.py    What is in a store's directory?
room.py         What may be removed from it for a slab, and does that fit on the disk?
lock.py         Who uses a store, and is it still there?
audit.py        What is in a slab, for a person, and is all of it whole?
file_system.py  What must an operator know about the file system below?
==============  ==================================================================================

``docs/disk.md`` has the format and the reasons.
"""
