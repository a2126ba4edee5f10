"""Where in a shared directory is what, and which names are Lamina's.

::

    lamina-directory.json                    the format, its version, and what tells this directory
    sweeper.json                             who sweeps it, see lease.py
    <namespace>/about.json                   what the fingerprint stands for, for people
    <namespace>/<hh>/<key>.<shard>           one chunk of one rank; hh: the key's first digits
    .lamina-<host>-<pid>-<n>-<random>.tmp    not written to its end yet, beside what it becomes

A chunk's file holds its object and never changes. All paths here are relative to the directory.

256 folders a namespace: 4,000 files in each at a million chunks. With 65,536, most chunks of a
smaller store have a folder of their own, which costs a call more to write it and two to sweep it:
on JuiceFS 3,000 files took 14 s instead of 5 s to make and 4.7 s instead of 0.4 s to walk through.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import socket

FORMAT_NAME = "lamina shared directory"
FORMAT_VERSION = 1
"""Changed with anything that changes what a file of the directory means."""

MARKER = "lamina-directory.json"
LEASE = "sweeper.json"

NAMESPACE = re.compile(r"[0-9a-f]{8,128}")
FOLDER = re.compile(r"[0-9a-f]{2}")
TEMPORARY = re.compile(r"\.lamina-.+\.tmp")

FILE_MODE = 0o660
FOLDER_MODE = 0o770
"""Before the umask: with the usual one others of the group may read, and nobody else. A cache holds
what users wrote."""

_HOST = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:40]
_counter = itertools.count()


def temporary_beside(path: str) -> str:
    """A name in the folder of ``path`` that no other process on any machine takes."""
    name = f".lamina-{_HOST}-{os.getpid()}-{next(_counter)}-{secrets.token_hex(4)}.tmp"
    return os.path.join(os.path.dirname(path), name)
