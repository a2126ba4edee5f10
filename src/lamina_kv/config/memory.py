"""How much memory this process may use, by the machine and by its control groups."""

from __future__ import annotations

import os
from pathlib import Path

_V2_LIMIT = "memory.max"
_V1_LIMIT = "memory.limit_in_bytes"


def memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory: the machine's, or the tightest limit of a control group above us.

    Args:
        root: where ``proc`` and ``sys`` are found.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_group_limits(root)])


def _group_limits(root: Path) -> list[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        # hierarchy:controllers:/path, where version 2 has no controllers.
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", _V2_LIMIT
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", _V1_LIMIT
        else:
            continue
        # In a container the path may be the host's, with the mount showing only our own
        # group: levels that do not exist are skipped and the mount itself is looked at.
        for level in (Path(group.lstrip("/")), *Path(group.lstrip("/")).parents):
            try:
                limits.append(int((mount / level / name).read_text()))
            except (OSError, ValueError):  # "max" stands for no limit
                continue
    return limits
