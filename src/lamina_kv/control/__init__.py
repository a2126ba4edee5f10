"""Control decides and never touches bytes: no torch, no blocking I/O, no engine."""
