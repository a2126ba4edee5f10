"""OpenAI's own client library in front of the proxy, with vLLM's own servers behind it: what people
write with it works, and gives what the decode server gives them alone."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters
from typing import Any, Literal

import httpx2
import openai
import pytest
from pydantic import BaseModel

from engine.deployment import Deployment, decode_spec, prefill_spec
from engine.driver import Fleet
from engine.server import MODEL, Server
from engine.spoken import make_spoken

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

TOKEN = "sesame"
SPOKEN = {
    "skip_tokenizer_init": False,
    "enable_prompt_tokens_details": True,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "structured_outputs_config": json.dumps(
        {"backend": "xgrammar", "disable_any_whitespace": True}
    ),
}
LONG = 700
"""Letters of a question, each of which is a token: worth being pushed."""


@dataclass(frozen=True)
class Served:
    """Clients, and what is behind them.

    Attributes:
        pushed: asks the proxy.
        alone: asks the decode server, which computes everything itself.
        decode: that server.
        proxy: URL of the proxy.
    """

    pushed: openai.OpenAI
    alone: openai.OpenAI
    decode: Server
    proxy: str

    def received(self) -> float:
        """Prompts that have been pushed."""
        return self.decode.metrics().total("lamina_pushes_total", outcome="received")

    @contextmanager
    def pushes(self) -> Iterator[None]:
        """One prompt is pushed while the ``with`` block runs."""
        before = self.received()
        yield
        self.decode.wait_until(lambda: self.received() == before + 1, 30)


def client(url: str, key: str = TOKEN) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{url}/v1",
        api_key=key,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )


@pytest.fixture(scope="module")
def served(llama: Path, fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = make_spoken(llama, tmp_path_factory.mktemp("spoken") / "model")
    prefill = Server(prefill_spec(model, SPOKEN), fleet.next_log(), forked=True)
    decode = Server(decode_spec(model, SPOKEN, {"min_tokens": 0}), fleet.next_log(), forked=True)
    with Deployment([prefill], [decode], fleet.next_log(), f"--token={TOKEN}") as deployment:
        proxy = deployment.proxy.url
        yield Served(client(proxy), client(decode.url), decode, proxy)


def question(seed: int, length: int = LONG) -> list[Any]:
    """A question that nobody has asked before."""
    text = "".join(random.Random(seed).choices(ascii_letters, k=length))
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


class Weather(BaseModel):
    """What an answer has to look like."""

    city: Literal["Paris", "Rome"]
    sunny: bool


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "look_out",
            "description": "Says what the weather is like.",
            "parameters": Weather.model_json_schema(),
        },
    }
]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 12}


def test_a_chat(served: Served) -> None:
    with served.pushes():
        got = served.pushed.chat.completions.create(messages=question(1), **GREEDY)
    assert got._request_id
    assert got.usage is not None
    assert got.usage.prompt_tokens_details is not None
    assert got.usage.prompt_tokens_details.cached_tokens == 0
    alone = served.alone.chat.completions.create(messages=question(1), **GREEDY)
    assert got.choices[0].message.content
    assert got.choices[0].message == alone.choices[0].message
    assert alone.usage is not None
    assert got.usage.prompt_tokens == alone.usage.prompt_tokens > LONG


def test_a_stream(served: Served) -> None:
    whole = {"stream": True, "stream_options": {"include_usage": True}}
    with served.pushes():
        chunks = [*served.pushed.chat.completions.create(messages=question(2), **whole, **GREEDY)]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    alone = served.alone.chat.completions.create(messages=question(2), **GREEDY)
    assert text == alone.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == GREEDY["max_tokens"]
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_what_the_prefill_server_had_is_called_cached(served: Served) -> None:
    beginning = question(3)[1]["content"]
    for end in ("a" * 64, "b" * 64):
        messages: list[Any] = [{"role": "user", "content": beginning + end}]
        got = served.pushed.chat.completions.create(messages=messages, **GREEDY)
    assert got.usage is not None
    assert got.usage.prompt_tokens_details is not None
    cached = got.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert LONG - 64 < cached <= LONG + 32


def test_a_tool_that_is_asked_for(served: Served) -> None:
    asked: dict[str, Any] = {
        "messages": question(4),
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "look_out"}},
        **GREEDY,
        "max_tokens": 100,
    }
    with served.pushes():  # so both servers have rendered the tools alike
        got = served.pushed.chat.completions.create(**asked)
    (call,) = got.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "look_out"
    assert isinstance(json.loads(call.function.arguments), dict)
    (right,) = served.alone.chat.completions.create(**asked).choices[0].message.tool_calls or ()
    assert right.type == "function"
    assert call.function == right.function
    parts = [
        part.function.arguments or ""
        for chunk in served.pushed.chat.completions.create(stream=True, **asked)
        for part in chunk.choices[0].delta.tool_calls or ()
        if part.function is not None
    ]
    assert "".join(parts) == call.function.arguments


def test_a_tool_that_the_model_may_choose(served: Served) -> None:
    with served.pushes():
        got = served.pushed.chat.completions.create(messages=question(5), tools=TOOLS, **GREEDY)
    alone = served.alone.chat.completions.create(messages=question(5), tools=TOOLS, **GREEDY)
    assert got.choices[0].message == alone.choices[0].message


def test_log_probabilities(served: Served) -> None:
    wanted = {"logprobs": True, "top_logprobs": 3}
    got = served.pushed.chat.completions.create(messages=question(6), **GREEDY, **wanted)
    alone = served.alone.chat.completions.create(messages=question(6), **GREEDY, **wanted)
    (mine, right) = (answer.choices[0].logprobs for answer in (got, alone))
    assert mine is not None
    assert mine.content is not None
    assert right is not None
    assert right.content is not None
    assert len(mine.content) == GREEDY["max_tokens"]
    assert [each.token for each in mine.content] == [each.token for each in right.content]
    assert [len(each.top_logprobs) for each in mine.content] == [3] * GREEDY["max_tokens"]
    for one, two in zip(mine.content, right.content, strict=True):
        assert one.logprob == pytest.approx(two.logprob, abs=1e-3)


def test_several_answers(served: Served) -> None:
    asked = {**GREEDY, "temperature": 1, "seed": 7, "n": 3}
    got = served.pushed.chat.completions.create(messages=question(7), **asked)
    alone = served.alone.chat.completions.create(messages=question(7), **asked)
    assert [choice.index for choice in got.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in got.choices}) == 3
    assert [c.message.content for c in got.choices] == [c.message.content for c in alone.choices]


def test_an_answer_of_a_given_form(served: Served) -> None:
    asked = {**GREEDY, "max_tokens": 100}
    with served.pushes():
        got = served.pushed.chat.completions.parse(
            messages=question(8), response_format=Weather, **asked
        )
    assert isinstance(got.choices[0].message.parsed, Weather)
    choices = {"structured_outputs": {"choice": ["red", "green"]}}
    got_choice = served.pushed.chat.completions.create(
        messages=question(9), extra_body=choices, **GREEDY
    )
    assert got_choice.choices[0].message.content in {"red", "green"}


def test_a_completion(served: Served) -> None:
    prompt = question(10)[1]["content"]
    got = served.pushed.completions.create(prompt=prompt, **GREEDY)
    alone = served.alone.completions.create(prompt=prompt, **GREEDY)
    assert got.choices[0].text == alone.choices[0].text
    several = served.pushed.completions.create(prompt=[prompt, "Once"], **GREEDY)
    assert several.choices[0].text == got.choices[0].text


def test_a_response(served: Served) -> None:
    asked = {"model": MODEL, "temperature": 0, "max_output_tokens": 12}
    text = question(11)[1]["content"]
    with served.pushes():
        got = served.pushed.responses.create(input=text, **asked)
    alone = served.alone.responses.create(input=text, **asked)
    assert got.output_text
    assert got.output_text == alone.output_text
    assert got.usage is not None
    assert got.usage.input_tokens_details.cached_tokens == 0
    with served.pushes():
        events = [*served.pushed.responses.create(input=text[::-1], stream=True, **asked)]
    assert events[0].type == "response.created"
    assert events[-1].type in {"response.completed", "response.incomplete"}


def test_a_message(served: Served) -> None:
    """As Anthropic's clients ask."""
    asked = {**GREEDY, "messages": question(15)[1:]}
    with served.pushes():
        got = served.pushed.post("/messages", body=asked, cast_to=httpx2.Response).json()
    alone = served.alone.post("/messages", body=asked, cast_to=httpx2.Response).json()
    assert got["content"] == alone["content"] != []
    assert got["usage"]["input_tokens"] > LONG, "none of them is called cached"
    assert not got["usage"].get("cache_read_input_tokens")


def test_models(served: Served) -> None:
    assert [model.id for model in served.pushed.models.list()] == [MODEL]
    (mine,), (right,) = (one.models.list().data for one in (served.pushed, served.alone))
    assert (mine.owned_by, mine.to_dict()["root"]) == (right.owned_by, right.to_dict()["root"])


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"model": "another"}, openai.NotFoundError, "another"),
        ({"messages": question(12, 5000)}, openai.BadRequestError, "2048"),
        ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, "json_schema"),
        ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens"),
    ],
    ids=["parameter", "model", "length", "form", "max_tokens"],
)
def test_a_mistake(
    served: Served, changed: dict[str, Any], error: type[openai.APIStatusError], said: str
) -> None:
    """Is told as the decode server tells it, and is nobody's failure."""
    asked = {**GREEDY, "messages": question(12), **changed}
    said_by = []
    for one in (served.pushed, served.alone):
        with pytest.raises(error) as wrong:
            one.chat.completions.create(**asked)
        said_by.append((wrong.value.status_code, wrong.value.body))
    assert said_by[0] == said_by[1]
    assert said in str(said_by[0])
    got = served.pushed.chat.completions.create(messages=question(13), **GREEDY)
    assert got.choices[0].message.content


def test_a_key_that_is_wrong(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError, match="token"):
        client(served.proxy, "wrong").chat.completions.create(messages=question(14), **GREEDY)


def test_what_the_model_cannot_do(served: Served) -> None:
    with pytest.raises(openai.NotFoundError):
        served.pushed.embeddings.create(model=MODEL, input="Hello")
