"""Prefill-to-decode: the protocol between two engines, the link and the wire that carry it."""
