"""What the peers need to run on a CPU: the copies that they leave to a GPU, and nothing else.

Written for measuring, not for serving. Each replaces the peer's device copies by one batched copy
of memory, and favours the peer where there is a choice: one call for a whole transfer, without the
interpreter's lock, and events that have passed at once. Everything else is the peer's own code as
it is installed.
"""
