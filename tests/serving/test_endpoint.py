"""The endpoint, as the public `openai` client sees it."""

from __future__ import annotations

import json
import time

import pytest

from mlora.generation.form import find_form
from mlora.generation.opened import ModelOptions, open_model
from mlora.model.generate import complete

endpoint = pytest.importorskip("mlora.serving.endpoint", reason="needs the extra 'web'")
openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(server: str):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def model(options: ModelOptions):
    return open_model(ModelOptions(options.base_model, options.lora_weights[:2], device="cpu"))[0]


ASKED = {"temperature": 0, "max_tokens": 8}


def test_models_are_the_base_and_the_offered_adapters(client, base_name: str) -> None:
    assert [m.id for m in client.models.list()] == [base_name, "plain", "mixture", "asked", "broken", "later"]
    assert client.models.retrieve("plain").id == "plain" and client.models.retrieve(base_name).id == base_name


def test_an_adapter_of_a_run_s_folder_is_loaded_when_it_is_asked(client, options: ModelOptions) -> None:
    folder = f"{options.lora_weights[2]}/adapters/asked"
    alone = open_model(ModelOptions(options.base_model, (folder,), device="cpu"))[0]
    prompt = find_form("none", alone.tokenizer).encode("Hi")
    expected, base = (done.text for done in complete(alone, [prompt] * 2, ["asked", None], 8))
    assert expected != base
    for _ in range(2):
        assert client.completions.create(model="asked", prompt="Hi", **ASKED).choices[0].text == expected


def test_answers_are_those_of_the_library(client, model, base_name: str) -> None:
    prompt = find_form("mlora", model.tokenizer).encode("Hi")
    for name, adapter in ((base_name, None), ("plain", "plain"), ("mixture", "mixture")):
        expected = complete(model, [prompt], [adapter], 8)[0]
        said = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}], **ASKED)
        assert said.choices[0].message.content == expected.text and said.choices[0].finish_reason == expected.finish
        assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (len(prompt), len(expected.token_ids))
        text = client.completions.create(model=name, prompt=["one", "two"], **ASKED)
        plain = complete(model, ["one", "two"], [adapter] * 2, 8)
        assert [c.text for c in text.choices] == [c.text for c in plain]
        assert client.completions.create(model=name, prompt=prompt, **ASKED).choices[0].text == expected.text


@pytest.mark.parametrize("settings", [ASKED, {"temperature": 1.2, "seed": 3, "n": 3, "max_tokens": 12, "top_p": 0.9}])
def test_a_stream_says_what_the_whole_says(client, settings: dict) -> None:
    asked = {"model": "plain", "messages": [{"role": "user", "content": "Hi"}]} | settings
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert own[0].delta.role == "assistant" and own[-1].finish_reason == choice.finish_reason
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert len({c.message.content for c in whole.choices}) == len(whole.choices)
    text = client.completions.create(model="plain", prompt="one", stream=True, **ASKED)
    assert "".join(c.choices[0].text for c in text) == client.completions.create(
        model="plain", prompt="one", **ASKED
    ).choices[0].text  # fmt: skip


def test_stop_and_length(client) -> None:
    free = client.completions.create(model="plain", prompt="one", **ASKED).choices[0]
    assert free.finish_reason == "length"
    ended = client.completions.create(model="plain", prompt="one", stop=[free.text[2]], **ASKED).choices[0]
    assert ended.finish_reason == "stop" and ended.text == free.text[: free.text.index(free.text[2])]


@pytest.mark.parametrize(
    ("settings", "status", "message"),
    [
        ({"model": "nobody"}, 404, "model 'nobody' does not exist"),
        ({"model": "broken"}, 400, "cannot be read"),
        ({"temperature": 3}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_new_tokens: 0 is not allowed"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "at most 2048"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "text"),
        ({"logprobs": True}, 400, "logprobs: is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_openais(client, settings: dict, status: int, message: str, stream: bool) -> None:
    asked = {"model": "plain", "messages": [{"role": "user", "content": "Hi"}]} | settings
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**asked, stream=stream)
    assert caught.value.status_code == status and message in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"
    assert "/" not in (caught.value.body["param"] or "")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message", "code"),
    [
        ("POST", "/chat/completions", b"{nope", 400, "the body is not JSON: Expecting property name", None),
        ("POST", "/chat/completions", b"[1]", 400, "the body is no JSON object", None),
        ("POST", "/completions", b"", 400, "the body is no JSON object", None),
        ("GET", "/models/nobody", None, 404, "model 'nobody' does not exist", "model_not_found"),
        ("POST", "/embeddings", b"{}", 404, "/v1/embeddings does not exist; there are /v1/models, ", "unknown_url"),
        ("GET", "/chat/completions", None, 405, "is not allowed; allowed: POST", "method_not_allowed"),
        ("DELETE", "/models", None, 405, "is not allowed; allowed: GET", "method_not_allowed"),
    ],
)
def test_what_is_no_request_of_openais_has_an_error_of_theirs(
    client, method: str, path: str, body: bytes | None, status: int, message: str, code: str | None
) -> None:
    answer = client._client.request(
        method, f"{client.base_url}{path[1:]}", content=body, headers={"Content-Type": "application/json"}
    )
    error = answer.json()["error"]
    assert answer.status_code == status and message in error["message"] and error["code"] == code
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert ("Allow" in answer.headers) is (status == 405)


def test_the_client_knows_what_is_not_there(client) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="plain", input="one")
    assert caught.value.code == "unknown_url"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_our_own_faults_are_not_the_request_s() -> None:
    answer = endpoint.error_response(None, RuntimeError("no memory"))
    assert answer.status_code == 500
    error = json.loads(answer.body)["error"]
    assert error["type"] == "server_error" and "RuntimeError: no memory" in error["message"]


def test_a_client_that_leaves_gives_the_model_back(client) -> None:
    stream = client.completions.create(
        model="plain", prompt="one", max_tokens=2000, temperature=1, stream=True, extra_body={"seed": 1}
    )
    next(iter(stream))
    stream.close()
    started = time.monotonic()
    client.completions.create(model="plain", prompt="one", max_tokens=1)
    assert time.monotonic() - started < 4


def test_neutral_fields_are_taken(client) -> None:
    client.chat.completions.create(
        model="plain", messages=[{"role": "developer", "content": "Be short."}, {"role": "user", "content": "Hi"}],
        logprobs=False, presence_penalty=0, user="me", max_completion_tokens=2, response_format={"type": "text"},
    )  # fmt: skip
