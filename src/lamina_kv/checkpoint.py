"""Which weights a model has: a fingerprint of a checkpoint's content.

A name or a path says nothing about weights: a retrained checkpoint often takes the place of the
old one. So every file that can change a cache's bytes is read and hashed, once: digests are
remembered with the file's size, times and inode, and a file that still has them is not read again.

The hash is a cryptographic one, because adapters may come from people who do not trust each other,
and nobody must be able to make an adapter that passes for another. It runs over segments of files
in parallel, so that the disk sets the pace on a machine that serves models.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from hashlib import blake2b
from pathlib import Path

from lamina_kv.keys import pack

logger = logging.getLogger(__name__)

_SCHEME = "lamina checkpoint 1"  # to be changed with anything that changes what is hashed, or how
_SEGMENT_BYTES = 64 << 20
_READ_BYTES = 1 << 20
_MAX_THREADS = 16
_LOCK_SECONDS = 600.0
_LOCK_POLL_SECONDS = 0.02

_SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was read may change again without its times
showing it, where time stamps are coarse; its digest is not remembered."""

_WEIGHTS = {".bin", ".ckpt", ".gguf", ".npz", ".pt", ".pth", ".safetensors", ".tensors"}

# Files that cannot change the cache of given token ids. All others count: one too many costs a
# miss when it is edited, one too few would let caches of different models mix.
_IRRELEVANT_NAMES = {
    "added_tokens.json",
    "chat_template.json",
    "generation_config.json",
    "license",
    "notice",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "trainer_state.json",
    "vocab.json",
}
_IRRELEVANT_SUFFIXES = {
    ".gif",
    ".ipynb",
    ".jinja",
    ".jpeg",
    ".jpg",
    ".lock",
    ".log",
    ".md",
    ".pdf",
    ".png",
    ".svg",
    ".txt",
    ".webp",
}

_ADVICE = "or set `identity` to a text that you change whenever the weights change"


class CheckpointError(ValueError):
    """A checkpoint cannot be told from others; the message says what to do."""


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What a file's metadata says of its content."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> _Stamp | None:
        """The stamp of a regular file; None for what is none, as a link that leads nowhere."""
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def locate(model: str, *, revision: str | None = None, download_dir: Path | None = None) -> Path:
    """Where the checkpoint of ``model`` lies on this machine. Nothing is downloaded.

    Args:
        model: a path, or the name of a model on the Hugging Face hub.
        revision: branch, tag or commit on the hub.
        download_dir: the hub's local cache, if it is not in its usual place.

    Raises:
        CheckpointError: if it is neither a local path nor in the hub's local cache.
    """
    if os.path.exists(model):
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                model, revision=revision, cache_dir=download_dir, local_files_only=True
            )
        )
    except (ImportError, OSError, ValueError) as error:
        raise CheckpointError(
            f"the weights of {model!r} are neither a local path nor in the Hugging Face cache of "
            f"this machine: download them, {_ADVICE}"
        ) from error


Snapshot = tuple[tuple[str, int, int, int, int], ...]
"""What :func:`snapshot` returns."""


def snapshot(path: Path) -> Snapshot:
    """What metadata say of a checkpoint's files, without reading one: while it is the same, so is
    the :func:`fingerprint`. Empty if there are none.

    Raises:
        CheckpointError: if they cannot be looked at.
    """
    root = Path(os.path.abspath(path))
    try:
        found = [(str(file), *astuple(stamp)) for file, stamp in _stamps(root)]
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoint {root} ({error}): make it readable, {_ADVICE}"
        ) from error
    return tuple(sorted(found))


def fingerprint(path: Path, *, cache_dir: Path | None = None) -> str:
    """The fingerprint of a checkpoint's content: a model's or an adapter's.

    Equal for equal content, wherever it lies, and different if a byte, a file's name or the set
    of files differs. Tokenizers, templates and documents do not count. Blocks while files are
    read; of several processes that ask at once, one reads and the others wait for its answer.

    Args:
        path: the checkpoint's directory, or its only file.
        cache_dir: where digests of files are remembered; ``$XDG_CACHE_HOME/lamina`` by default.
            Where that is no usable directory, files are read every time.

    Returns:
        32 hexadecimal digits.

    Raises:
        CheckpointError: if there are no weights at ``path``, or they cannot be read.
    """
    root = Path(os.path.abspath(path))
    try:
        stamps = dict(_stamps(root))
        if not any(file.suffix.lower() in _WEIGHTS for file in stamps):
            raise CheckpointError(f"{root} has no weight files: name a checkpoint, {_ADVICE}")
        digests = _digests(root, stamps, _Memory.of(root, cache_dir))
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoint {root} ({error}): make it readable, {_ADVICE}"
        ) from error
    # The only file has no name of its own, so that it may be renamed.
    named = sorted((file.relative_to(root).as_posix(), digests[file]) for file in stamps)
    return blake2b(pack((_SCHEME, *named)), digest_size=16).hexdigest()


def _stamps(root: Path) -> Iterator[tuple[Path, _Stamp]]:
    """Every file that counts. Directories that are links are followed, once each."""
    if stamp := _Stamp.of(root):
        yield root, stamp
        return

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        found = os.stat(folder)
        if (identity := (found.st_dev, found.st_ino)) in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name != "__pycache__"
        )
        for name in names:
            file = Path(folder, name)
            irrelevant = (
                name.startswith(".")
                or name.lower() in _IRRELEVANT_NAMES
                or file.suffix.lower() in _IRRELEVANT_SUFFIXES
            )
            if not irrelevant and (stamp := _Stamp.of(file)):
                yield file, stamp


def _digests(
    root: Path, stamps: Mapping[Path, _Stamp], memory: _Memory | None
) -> Mapping[Path, bytes]:
    """The digest of each file, read or remembered."""
    if memory is None:
        return _read(root, stamps)
    known = memory.recall(stamps)
    if len(known) == len(stamps):
        return known
    with memory.locked():
        known = memory.recall(stamps)
        begin_ns = time.time_ns()
        unknown = {file: stamp for file, stamp in stamps.items() if file not in known}
        digests = {**known, **_read(root, unknown)}
        memory.keep(
            {
                file: (stamps[file], digest)
                for file, digest in digests.items()
                if stamps[file].ctime_ns < begin_ns - _SETTLED_NS
            }
        )
    return digests


def _read(root: Path, stamps: Mapping[Path, _Stamp]) -> dict[Path, bytes]:
    if not stamps:
        return {}
    logger.info(
        "Reading %.2f GiB of %s to tell its weights from others; this happens once",
        sum(stamp.size for stamp in stamps.values()) / (1 << 30),
        root,
    )
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        parts = {
            file: [
                pool.submit(_segment_digest, file, start)
                for start in range(0, stamp.size or 1, _SEGMENT_BYTES)
            ]
            for file, stamp in stamps.items()
        }
        return {
            file: blake2b(b"".join(part.result() for part in segments), digest_size=32).digest()
            for file, segments in parts.items()
        }


def _segment_digest(file: Path, start: int) -> bytes:
    """Hash one segment; both reading and hashing release the GIL."""
    digest = blake2b(digest_size=32)
    buffer = memoryview(bytearray(_READ_BYTES))
    left = _SEGMENT_BYTES
    with open(file, "rb", buffering=0) as source:
        source.seek(start)
        while left and (count := source.readinto(buffer[: min(left, _READ_BYTES)])):
            digest.update(buffer[:count])
            left -= count
    return digest.digest()


class _Memory:
    """What was read of one checkpoint before, in a small file that several processes share.

    A file that is missing, damaged or of another version is an empty one, and where the directory
    cannot be used nothing is remembered: either costs time only.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self._root = root
        name = blake2b(os.fsencode(root), digest_size=16).hexdigest()
        self._file = folder / f"{name}.digests"
        self._lock = folder / f"{name}.lock"

    @classmethod
    def of(cls, root: Path, cache_dir: Path | None) -> _Memory | None:
        """The memory of the checkpoint at ``root``; None if there is no place for it."""
        try:
            folder = (cache_dir or _default_cache_dir()) / "checkpoints"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # Path.home() knows no home
            return None
        return cls(folder, root)

    def recall(self, stamps: Mapping[Path, _Stamp]) -> dict[Path, bytes]:
        """Digests of those files that still have the stamp they were read with."""
        try:
            check, _, body = self._file.read_bytes().partition(b"\n")
        except OSError:
            return {}
        if check != self._check(body):
            return {}
        known = json.loads(body)
        return {
            file: bytes.fromhex(entry[-1])
            for file, stamp in stamps.items()
            if (entry := known.get(str(file))) and entry[:-1] == [*astuple(stamp)]
        }

    def keep(self, digests: Mapping[Path, tuple[_Stamp, bytes]]) -> None:
        """Replace what is remembered."""
        body = json.dumps(
            {
                str(file): [*astuple(stamp), digest.hex()]
                for file, (stamp, digest) in digests.items()
            }
        ).encode()
        draft = self._file.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        try:
            draft.write_bytes(self._check(body) + b"\n" + body)
            draft.replace(self._file)
        except OSError:
            with suppress(OSError):
                draft.unlink()

    @staticmethod
    def _check(body: bytes) -> bytes:
        return blake2b(pack((_SCHEME, body)), digest_size=16).hexdigest().encode()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold off other processes; gives up on a file system without locks, and after
        ``_LOCK_SECONDS``, because reading twice is better than waiting without end."""
        try:
            descriptor = os.open(self._lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except OSError:
            yield
            return
        try:
            _lock(descriptor)
            yield
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_POLL_SECONDS)
        except OSError:
            return
        else:
            return


def _default_cache_dir() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "lamina"
