"""What is in a shared directory, for a person. Nothing is changed; engines may be at work."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from lamina_kv.tiers.audit import Listed, ListingAudit
from lamina_kv.tiers.config import TierConfig
from lamina_kv.tiers.contract import StoreError
from lamina_kv.tiers.directory.files import read_whole
from lamina_kv.tiers.directory.layout import MARKER
from lamina_kv.tiers.directory.root import read_marker
from lamina_kv.tiers.directory.walk import files, folders, namespaces
from lamina_kv.tiers.names import ABOUT, object_path, parse_about


def open_audit(place: str, tier: TierConfig | None = None) -> ListingAudit | None:
    """Look into a shared directory; None if ``place`` is none. No more than the path is needed.

    Raises:
        StoreError: if this user may not read it, or this Lamina does not know its format.
    """
    try:
        listing = DirectoryListing(Path(place))
    except PermissionError as error:
        raise StoreError(f"{error.filename} may not be read by this user") from error
    except (FileNotFoundError, NotADirectoryError):
        return None
    return ListingAudit(listing)


class DirectoryListing:
    """A :class:`~lamina_kv.tiers.audit.Listing` of a shared directory.

    Args:
        path: the directory.

    Attributes:
        place: see the protocol.
        damage_means: see there.
        clearing: see there.

    Raises:
        StoreError: if it is of another format.
        OSError: if it is no shared directory, or cannot be read.
    """

    damage_means = (
        "Engines take what is damaged for a miss, and the one that has found it replaces it when "
        "it has computed the chunk again. "
        "A few are normal after the file server has crashed."
    )

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        self.clearing = (
            f"{path} is shared by engines, and nobody deletes what others use: to free space, "
            f"`lamina-kv sweep {path} --capacity SIZE`; to give up everything, stop the engines "
            "and delete the directory"
        )
        self._root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.stat(MARKER, dir_fd=self._root)
            read_marker(self._root, path)
        except BaseException:
            self.close()
            raise

    def about(self, namespace: str) -> Mapping[str, str]:
        """See the protocol."""
        try:
            return parse_about(read_whole(self._root, f"{namespace}/{ABOUT}"))
        except OSError:
            return {}

    def chunks(self) -> Iterator[Listed]:
        """See the protocol."""
        root = Path(f"/proc/self/fd/{self._root}")
        for namespace in namespaces(root):
            for folder in folders(str(root / namespace)):
                for file in files(folder):
                    if file.chunk is not None:
                        yield Listed(namespace, *file.chunk, file.size, file.changed)

    def read(self, chunk: Listed) -> bytes | None:
        """See the protocol."""
        try:
            path = object_path(chunk.namespace, chunk.key, chunk.shard)
            return read_whole(self._root, path, chunk.size)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            return None

    def close(self) -> None:
        """See the protocol."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1
