"""Real servers of shared stores, started for a test and ended with it."""
