"""Mooncake Store: memory that the processes of a cluster donate, and a master that knows what is
in it.

==========  =====================================================================================
config.py   What is the tier configured with?
client.py   How is the library made ready, and how does one find out that the master is not there?
codes.py    What does an answer of the library mean for a chunk?
store.py    The store.
==========  =====================================================================================
"""
