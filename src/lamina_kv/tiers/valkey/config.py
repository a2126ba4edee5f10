"""What a tier on a Valkey or Redis server is configured with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lamina_kv.tiers.config import SharedConfig
from lamina_kv.tiers.valkey.address import WORDS, Address, parse
from lamina_kv.values import ABSOLUTE_PATH, FLAG, TEXT, Kind, WrongValueError, choice, integer

URL = Kind(WORDS, parse, secret=True, schema=TEXT.schema)


class ValkeyConfig(SharedConfig):
    """A tier on a Valkey or Redis server, or on a cluster of them."""

    kind: Annotated[Literal["valkey"], choice("valkey")] = "valkey"
    url: Annotated[Address, URL] = Field(
        repr=False,
        examples=["valkey://cache.internal:6379"],
        description="The server. `valkeys://` and `rediss://` are encrypted. A password in it is "
        "seen by whoever sees the configuration: prefer `password_file` or `password_env`.",
    )
    cluster: Annotated[bool, FLAG] = Field(
        default=False,
        description="Whether the server is a cluster. Its URL may then name several nodes, with "
        "commas between them.",
    )
    password_file: Annotated[Path | None, ABSOLUTE_PATH.nullable()] = Field(
        default=None,
        description="A file with the password, read at every connection, so that a new password "
        "needs no restart.",
    )
    password_env: Annotated[str | None, TEXT.nullable()] = Field(
        default=None, description="The environment variable that holds the password."
    )
    ca_file: Annotated[Path | None, ABSOLUTE_PATH.nullable()] = Field(
        default=None,
        description="Certificates, in PEM, of those who may vouch for the server. null: those of "
        "this machine.",
    )
    certificate_file: Annotated[Path | None, ABSOLUTE_PATH.nullable()] = Field(
        default=None,
        description="This client's certificate, in PEM, for a server that asks for one (Valkey "
        "does by default).",
    )
    key_file: Annotated[Path | None, ABSOLUTE_PATH.nullable()] = Field(
        default=None, description="The private key of `certificate_file`, in PEM."
    )
    prefix: Annotated[str, TEXT] = Field(
        default="lamina:", description="How the names of all keys on the server begin."
    )
    ttl: Annotated[int | None, integer(1).nullable()] = Field(
        default=None,
        description="Seconds after its last use at which the server forgets a chunk. null: it "
        "evicts chunks only when it needs the memory.",
    )

    @property
    def place(self) -> str:
        """See the base class."""
        return str(self.url)

    def is_at(self, place: str) -> bool:
        """See the base class. Who asks, and how, does not matter."""
        try:
            return str(parse(place)) == self.place
        except WrongValueError:
            return place == self.place

    @model_validator(mode="after")
    def _fits_together(self) -> ValkeyConfig:
        given = [bool(self.url.password), self.password_file, self.password_env]
        if sum(map(bool, given)) > 1:
            raise ValueError(
                "the password is given more than once; keep one of url, "
                "password_file and password_env"
            )
        if len(self.url.hosts) > 1 and not self.cluster:
            raise ValueError(
                "url names several nodes, which only a cluster has; set cluster to true or name one"
            )
        if self.cluster and self.url.socket:
            raise ValueError("a cluster is not reached by a socket; name a host in url")
        if self.cluster and self.url.database:
            raise ValueError(
                "a cluster has no numbered databases here; leave the number out of url"
            )
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file go together; give both or none")
        if not self.url.tls and (self.ca_file or self.certificate_file):
            raise ValueError("ca_file and certificate_file are for TLS; begin url with valkeys://")
        return self
