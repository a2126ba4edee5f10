"""The wires: an interface and what implements it."""
