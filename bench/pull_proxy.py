"""A router for vLLM's NixlConnector, as vLLM's own examples have it: the prefill engine is asked
first, and the decode engine pulls when it has answered. Engines take turns.

    python bench/pull_proxy.py --port 8000 --prefill URL --prefill URL --decode URL --decode URL

For comparison only: it has no retries and no health checks.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import AsyncIterator

import fastapi
import httpx
import uvicorn
from fastapi.responses import StreamingResponse

from lamina_kv.bench.settings import REMOTE_DECODE


def make_app(prefill: list[str], decode: list[str]) -> fastapi.FastAPI:
    """The router."""
    sources, targets = itertools.cycle(prefill), itertools.cycle(decode)
    limits = httpx.Limits(max_connections=None)
    client = httpx.AsyncClient(timeout=None, trust_env=False, limits=limits)
    app = fastapi.FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {}

    @app.post("/v1/chat/completions")
    async def chat(request: fastapi.Request) -> StreamingResponse:
        body = await request.json()
        part = {**body, "stream": False, "max_tokens": 1, "kv_transfer_params": REMOTE_DECODE}
        part.pop("stream_options", None)
        part.pop("min_tokens", None)
        answer = await client.post(f"{next(sources)}/v1/chat/completions", json=part)
        answer.raise_for_status()
        body["kv_transfer_params"] = answer.json()["kv_transfer_params"]
        target = next(targets)

        async def pieces() -> AsyncIterator[bytes]:
            url = f"{target}/v1/chat/completions"
            async with client.stream("POST", url, json=body) as response:
                async for piece in response.aiter_raw():
                    yield piece

        return StreamingResponse(pieces(), media_type="text/event-stream")

    return app


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", action="append", required=True)
    parser.add_argument("--decode", action="append", required=True)
    options = parser.parse_args()
    app = make_app(options.prefill, options.decode)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
