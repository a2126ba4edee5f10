"""What a tier in Mooncake Store is configured with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lamina_kv.tiers.config import SharedConfig
from lamina_kv.values import ADDRESS, SIZE, TEXT, Auto, Kind, WrongValueError, choice, integer

BATCH = 8
"""Objects of one call at most. A donor that is stopped costs a call a second for every four of
them, which is how many connections Mooncake has to a donor."""

_CONNECTIONS = 4


def _parse_master(value: object) -> object:
    if isinstance(value, str) and "://" in value:
        return value
    try:
        return ADDRESS.parse(value)
    except WrongValueError:
        raise WrongValueError from None  # with the words of this kind


MASTER = Kind(
    'an address such as "10.0.0.1:50051", or "etcd://…" where masters are elected',
    _parse_master,
    schema=TEXT.schema,
)


class MooncakeConfig(SharedConfig):
    """A tier in Mooncake Store."""

    kind: Annotated[Literal["mooncake"], choice("mooncake")] = "mooncake"
    master: Annotated[str, MASTER] = Field(
        examples=["10.0.0.1:50051"], description="Where the master answers, `mooncake_master`."
    )
    metadata: Annotated[str, TEXT] = Field(
        default="P2PHANDSHAKE",
        description="Where the transfer engines of all processes find each other. By default they "
        "ask each other; otherwise the address of a metadata server, the same for all.",
    )
    protocol: Annotated[Literal["tcp", "rdma"], choice("tcp", "rdma")] = Field(
        default="tcp", description="How bytes travel."
    )
    devices: Annotated[str | None, TEXT.nullable()] = Field(
        default=None,
        description="RDMA devices, separated by commas. `null`: all that Mooncake finds.",
    )
    hostname: Annotated[str | Auto, TEXT.auto()] = Field(
        default="auto",
        description="Name or address by which other machines reach this one. `auto`: the address "
        "from which this machine reaches the master.",
    )
    segment: Annotated[int | None, SIZE.nullable()] = Field(
        default=None,
        description="Bytes of memory that each rank donates to the store, beside `host`. What it "
        "holds is lost with the rank. `null`: none; other processes donate.",
    )
    replicas: Annotated[int, integer(1)] = Field(
        default=1,
        description="In how many donated segments each chunk is kept, where there are as many.",
    )
    prefix: Annotated[str, TEXT] = Field(
        default="lamina:", description="What the name of every object begins with."
    )

    @property
    def longest_call(self) -> float:
        """See the base class."""
        return self.timeout + BATCH / _CONNECTIONS
