"""Data moves bytes and never decides: the executor, its pipelines, the movers and the tiers."""
