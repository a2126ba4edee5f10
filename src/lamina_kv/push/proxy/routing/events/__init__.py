"""What engines announce of their caches: vLLM's KV events, and Lamina's of its tiers.

===================  ===============================================================
``messages``         what is in a batch of events
``blocks``           which blocks does one rank hold, and where
``stores``           which blocks are in a store that several engines share
``follow``           a rank's events, as they come
``tokens``           which tokens does a prompt have: asked of an engine, if it pays
===================  ===============================================================

Hashes of blocks differ from engine to engine, so blocks are known here by a name of our own: that
of the block in front, and the tokens.
"""
