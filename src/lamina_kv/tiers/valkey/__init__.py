"""A Valkey or Redis server, or a cluster of them, that engines share. It evicts by itself.

=============  ==================================================================================
config.py      What is it configured with?
address.py     Which server does a URL name?
connection.py  How is the server reached, again after it broke, and what do its errors mean?
reading.py     How do values come into buffers?
opening.py     What is wrong if a store cannot be opened?
store.py       Where is a chunk on the server, and how is it read, written and found there?
listing.py     What is on a server, for a person?
=============  ==================================================================================
"""
