"""Adapters: each tells an engine's scheduler and workers apart, and knows nothing of tiers."""
