"""Far tiers: every place for chunks but host memory.

=============  ==================================================================================
contract.py    What is a far tier? ``Index`` is control's half, ``Store`` the data room's.
objects.py     What are the bytes of a chunk outside the engine, and how are they verified?
names.py       What is a chunk called in stores that find chunks by key?
once.py        What was said of a store already?
audit.py       What is in a store, for a person, and is all of it whole?
config.py      What is every far tier configured with?
slots.py       Which chunk is in which slot (near, and far tiers whose slots control assigns)?
agreed.py      Which chunks do all ranks have in such a tier when it is opened?
hints.py       What did others say they have (stores that find chunks by key)?
touches.py     Which uses is a store still to hear of?
eviction.py    Which chunk does a full tier give up?
reuse.py       How likely is a chunk used again: what is it worth?
regard.py      What does a request say of how long its chunks are worth keeping?
disk/          The local disk.
directory/     A directory that engines of one or several machines share.
valkey/        A Valkey or Redis server that engines share.
mooncake/      Mooncake Store.
s3/            Object stores.
=============  ==================================================================================

A kind of tier is registered in :data:`KINDS`. Beside its folder only the command line, and the
message about the former ``disk`` section, name a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina_kv.tiers.config import TierConfig
from lamina_kv.tiers.directory.config import DirectoryConfig
from lamina_kv.tiers.disk.config import DiskConfig
from lamina_kv.tiers.mooncake.config import MooncakeConfig
from lamina_kv.tiers.s3.config import SCHEMES, S3Config
from lamina_kv.tiers.valkey.config import ValkeyConfig

if TYPE_CHECKING:
    from lamina_kv.tiers.audit import Audit
    from lamina_kv.tiers.contract import Store, Tenant


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of far tier.

    Attributes:
        config: what an entry of ``tiers`` of this kind holds.
        opener: ``module:function``. The function takes that entry and a
            :class:`~lamina_kv.tiers.contract.Tenant`, and returns a
            :class:`~lamina_kv.tiers.contract.Store`. Only a rank that opens the tier imports it.
        auditor: ``module:function``; empty if such a store cannot list what it holds. The function
            takes the place of a store, and its entry in a configuration or None. It returns an
            :class:`~lamina_kv.tiers.audit.Audit`, or None if no store of this kind is there.
        schemes: of URLs that are places of such stores. Without any, places are paths.
    """

    config: type[TierConfig]
    opener: str
    auditor: str = ""
    schemes: tuple[str, ...] = ()

    def audit(self, place: str, tier: TierConfig | None = None) -> Audit | None:
        """Look into a store; None if no store of this kind is there.

        Args:
            place: a path or a URL.
            tier: the store's entry in a configuration; of this kind. None: there is none, and what
                is needed beside the place comes from the environment.

        Raises:
            StoreError: if it cannot be looked into.
        """
        auditor: Callable[[str, TierConfig | None], Audit | None] = _imported(self.auditor)
        return auditor(place, tier)

    def open(self, config: TierConfig, tenant: Tenant) -> Store:
        """Open the store of one rank.

        Args:
            config: the tier's entry in the configuration; of this kind.
            tenant: for whom.

        Raises:
            StoreError: if the store cannot be used.
        """
        opener: Callable[[TierConfig, Tenant], Store] = _imported(self.opener)
        return opener(config, tenant)


def _imported(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)


KINDS: dict[str, Kind] = {
    "disk": Kind(
        DiskConfig,
        "lamina_kv.tiers.disk.store:open_store",
        auditor="lamina_kv.tiers.disk.audit:open_audit",
    ),
    "directory": Kind(
        DirectoryConfig,
        "lamina_kv.tiers.directory.store:open_store",
        auditor="lamina_kv.tiers.directory.listing:open_audit",
    ),
    "valkey": Kind(
        ValkeyConfig,
        "lamina_kv.tiers.valkey.opening:open_store",
        auditor="lamina_kv.tiers.valkey.opening:open_audit",
        schemes=("valkey", "valkeys", "redis", "rediss", "unix"),
    ),
    "mooncake": Kind(MooncakeConfig, "lamina_kv.tiers.mooncake.store:open_store"),
    "s3": Kind(
        S3Config,
        "lamina_kv.tiers.s3.store:open_store",
        auditor="lamina_kv.tiers.s3.listing:open_audit",
        schemes=SCHEMES,
    ),
}
"""The kinds of tiers that a configuration may name."""


def open_audit(place: str, tiers: Sequence[TierConfig] = ()) -> Audit:
    """Look into the store that is at a place, whatever kind it is.

    Args:
        place: a path, a URL, or the name of one of ``tiers``.
        tiers: of a configuration. The store of one of these is reached as an engine reaches it,
            with the tier's options and credentials.

    Raises:
        StoreError: if there is none, or it cannot be looked into.
    """
    from lamina_kv.tiers.contract import StoreError

    for tier in tiers:
        if place == tier.name or tier.is_at(place):
            return _audit_of(tier)
    scheme, separator, _ = place.partition("://")
    kinds = [
        kind
        for kind in KINDS.values()
        if kind.auditor and (scheme in kind.schemes if separator else not kind.schemes)
    ]
    for kind in kinds:
        if (audit := kind.audit(place)) is not None:
            return audit
    if separator:
        known = sorted(each for kind in KINDS.values() if kind.auditor for each in kind.schemes)
        if not kinds:
            raise StoreError(
                f"{scheme}:// is no place of stores that can list what they hold: use a path"
                + "".join(f", {each}://" for each in known)
            )
        place = f"what this {scheme}:// URL leads to"  # it may have a password
    elif tiers:
        names = ", ".join(tier.name for tier in tiers)
        raise StoreError(
            f"{place} is neither a Lamina store nor a tier that is configured: {names}"
        )
    elif not Path(place).exists():
        raise StoreError(f"{place} is not there")
    raise StoreError(f"{place} is not a Lamina store")


def _audit_of(tier: TierConfig) -> Audit:
    from lamina_kv.tiers.contract import StoreError

    kind = KINDS[tier.kind]
    if not kind.auditor:
        raise StoreError(f"tier {tier.name}: stores of kind {tier.kind} cannot list what they hold")
    audit = kind.audit(tier.place, tier)
    if audit is None:
        raise StoreError(f"tier {tier.name}: {tier.place} is not a store of kind {tier.kind} yet")
    return audit
