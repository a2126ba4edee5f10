"""Arguments that several verbs take. Imports nothing that a verb alone needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Place = Annotated[str, typer.Argument(metavar="PATH|URL", help="A store: its directory, or URL.")]

StorePlace = Annotated[
    str,
    typer.Argument(
        metavar="PATH|URL|TIER",
        help="A store: its directory, its URL, or the name of a tier that is configured.",
    ),
]

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="A configuration file (`LAMINA_CONFIG`)."),
]

TransferConfig = Annotated[
    str | None,
    typer.Option(
        "--kv-transfer-config", metavar="JSON", help="What vLLM is given as `--kv-transfer-config`."
    ),
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
