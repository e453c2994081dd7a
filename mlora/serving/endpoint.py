"""An OpenAI-compatible endpoint: `/v1/models`, `/v1/chat/completions`, `/v1/completions`, streamed or not.

The model of a request is the base model or an adapter, by name; one that is offered and not loaded is loaded. What is
not supported is refused by name, in OpenAI's form of errors, rather than ignored.
https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from mlora.data import DataError
from mlora.generation.form import Form
from mlora.generation.sampling import Sampling
from mlora.model.errors import ModelError
from mlora.model.generate import Piece
from mlora.serving.engine import Engine

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
}
"""Fields that would change an answer, with the values that do not."""


class RequestError(Exception):
    """A request that cannot be answered, in OpenAI's words."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Asked(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: int | None = None
    temperature: float | None = Field(None, le=2)
    top_p: float | None = None
    n: int | None = Field(None, ge=1, le=16)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None

    def sampling(self, max_tokens: int | None) -> Sampling:
        """Return how answers are drawn; OpenAI's defaults are a temperature and a top_p of 1."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        temperature = 1.0 if self.temperature is None else self.temperature
        tokens: dict[str, Any] = {} if max_tokens is None else {"max_new_tokens": max_tokens}
        return Sampling(
            temperature=temperature, top_p=self.top_p, seed=self.seed, stop=tuple(filter(None, stop)), **tokens
        )


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]

    def plain(self) -> dict[str, str]:
        """Return the message with its parts joined."""
        parts = [{"type": "text", "text": self.content}] if isinstance(self.content, str) else self.content
        if any(part.get("type") != "text" for part in parts):
            raise RequestError("messages: only parts of type 'text' are supported", "messages")
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(str(part.get("text", "")) for part in parts)}


class _ChatAsked(_Asked):
    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = None


class _TextAsked(_Asked):
    prompt: str | list[str] | list[int] | list[list[int]]

    def prompts(self, form: Form) -> list[list[int]]:
        """Return the token ids of every prompt."""
        given: Any = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if not given:
            raise RequestError("prompt: holds nothing", "prompt")
        if isinstance(given[0], int):
            given = [given]
        vocabulary = len(form.tokenizer)
        found = [Form(form.tokenizer).encode(p) if isinstance(p, str) else p for p in given]
        wrong = next((token for tokens in found for token in tokens if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise RequestError(f"prompt: token {wrong} is not in the vocabulary of {vocabulary}", "prompt")
        return found


class _Reply:
    """The answer to one request: names, numbers and the two forms in which it is sent."""

    def __init__(self, kind: Literal["chat", "text"], model: str, prompts: Sequence[Sequence[int]], n: int) -> None:
        self.chat, self.n = kind == "chat", n
        self.choices = len(prompts) * n
        self.prompt_tokens = sum(map(len, prompts))
        self.new_tokens = 0
        stem, name = ("chatcmpl", "chat.completion") if self.chat else ("cmpl", "text_completion")
        self.head = {"id": f"{stem}-{uuid.uuid4().hex}", "object": name, "created": int(time.time()), "model": model}

    def usage(self) -> dict[str, int]:
        """Return the counts; an end of text is among the new tokens."""
        total = self.prompt_tokens + self.new_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.new_tokens, "total_tokens": total}

    def whole(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """Return the answer at once."""
        texts = dict.fromkeys(range(self.choices), "")
        ends: dict[int, str | None] = {}
        for piece in pieces:
            self.new_tokens += 1
            texts[piece.row] += piece.text
            ends[piece.row] = piece.finish
        choices = []
        for index, text in texts.items():
            own = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": index, **own, "logprobs": None, "finish_reason": ends.get(index)})
        return {**self.head, "choices": choices, "usage": self.usage()}

    def events(self, pieces: Iterable[Piece], include_usage: bool) -> Iterator[str]:
        """Yield the answer as server-sent events."""
        head = {**self.head, "object": "chat.completion.chunk"} if self.chat else self.head
        if include_usage:
            head["usage"] = None

        def event(index: int, text: str | None, finish: str | None, **delta: str) -> str:
            said = delta if text is None else {**delta, "content": text}
            own = {"delta": said} if self.chat else {"text": text or ""}
            choice = {"index": index, **own, "logprobs": None, "finish_reason": finish}
            return _event({**head, "choices": [choice]})

        if self.chat:
            yield from (event(index, "", None, role="assistant") for index in range(self.choices))
        try:
            for piece in pieces:
                self.new_tokens += 1
                if piece.text:
                    yield event(piece.row, piece.text, None)
                if piece.finish:
                    yield event(piece.row, None, piece.finish)
        except Exception as error:  # the status has been sent, so this is the one way left to say it
            yield _event({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
        if include_usage:
            yield _event({**head, "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"


def router(engine: Engine) -> APIRouter:
    """Return the endpoint's routes."""
    routes = APIRouter(prefix="/v1")
    started = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "mlora"}

    @routes.get("/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in (engine.base, *engine.offered())]}

    @routes.get("/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        return card(_find(engine, name) or engine.base)

    @routes.post("/chat/completions")
    def chat(asked: _ChatAsked) -> Response:
        adapter = _find(engine, asked.model)
        _refuse_unsupported(asked)
        prompt = engine.form.encode_messages([message.plain() for message in asked.messages])
        limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        return _answer(engine, asked, adapter, "chat", [prompt], asked.sampling(_to_the_end(engine, limit)))

    @routes.post("/completions")
    def completions(asked: _TextAsked) -> Response:
        adapter = _find(engine, asked.model)
        _refuse_unsupported(asked)
        limit = 16 if asked.max_tokens is None else asked.max_tokens  # OpenAI's own default
        return _answer(engine, asked, adapter, "text", asked.prompts(engine.form), asked.sampling(limit))

    answered: list[Any] = list(routes.routes)

    @routes.api_route("{path:path}", methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
    def other(path: str, request: Request) -> Response:
        known = [route for route in answered if route.path_regex.fullmatch(request.url.path)]
        if not known:
            paths = ", ".join(route.path for route in answered if "{" not in route.path)
            raise RequestError(f"{request.url.path} does not exist; there are {paths}", None, "unknown_url", 404)
        allowed = ", ".join(sorted({method for route in known for method in route.methods}))
        error = RequestError(
            f"{request.method} {request.url.path}: is not allowed; allowed: {allowed}", None, "method_not_allowed", 405
        )
        return JSONResponse(error.body, error.status, {"Allow": allowed})

    return routes


def error_response(request: Request, error: Exception) -> Response:
    """Return an error in OpenAI's form."""
    if isinstance(error, RequestValidationError):
        error = _refusal(error.errors()[0])
    elif not isinstance(error, (RequestError, DataError, ValueError)):
        error = RequestError(f"the server failed: {type(error).__name__}: {error}", status=500)
    elif isinstance(error, ModelError):
        error = RequestError(str(error))  # of the adapter or of the prompt
    elif not isinstance(error, RequestError):
        message = str(error)
        error = RequestError(message, message.partition(":")[0] if ":" in message else None)
    return JSONResponse(error.body, error.status)


ERRORS: tuple[type[Exception], ...] = (RequestError, RequestValidationError, DataError, ValueError, Exception)
"""What a request can cause, and what it cannot; `error_response` answers each."""


def _refusal(problem: Mapping[str, Any]) -> RequestError:
    """Return what is wrong with a request's body, or with one of its fields, from what pydantic says of it."""
    if problem["type"] == "json_invalid":
        return RequestError(f"the body is not JSON: {problem['ctx']['error']}, at character {problem['loc'][-1]}")
    where = ".".join(str(part) for part in problem["loc"] if part != "body")
    if not where:
        return RequestError("the body is no JSON object, or was not sent as application/json")
    return RequestError(f"{where}: {problem['msg']}", where)


def _answer(
    engine: Engine,
    asked: _Asked,
    adapter: str | None,
    kind: Literal["chat", "text"],
    prompts: list[list[int]],
    sampling: Sampling,
) -> Response:
    n = asked.n or 1
    reply = _Reply(kind, asked.model, prompts, n)
    rows = [prompt for prompt in prompts for _ in range(n)]
    seeds: dict[str, Any] = (
        {} if sampling.seed is None else {"seed": [sampling.seed + i for _ in prompts for i in range(n)]}
    )
    pieces = engine.ask(rows, [adapter] * len(rows), sampling, **seeds)
    first = next(pieces, None)  # what is wrong with a request is said before a stream begins
    answered = chain([] if first is None else [first], pieces)
    if not asked.stream:
        return JSONResponse(reply.whole(answered))
    include_usage = bool((asked.stream_options or {}).get("include_usage"))

    def events() -> Iterator[str]:
        try:
            yield from reply.events(answered, include_usage)
        finally:  # the client may have gone
            pieces.close()  # type: ignore[attr-defined]

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _to_the_end(engine: Engine, limit: int | None) -> int:
    """Return a chat's longest answer: as asked, else as long as the model goes; rows end there by themselves."""
    if limit is not None:
        return limit
    return int(getattr(engine.model.hf_model.config.get_text_config(), "max_position_embeddings", None) or 2048)


def _find(engine: Engine, name: str) -> str | None:
    """Return the adapter of a model's name, loaded or on offer; None for the base model."""
    if name == engine.base:
        return None
    if name in engine.adapters or name in (offered := engine.offered()):
        return name
    known = ", ".join([engine.base, *offered])
    raise RequestError(f"model {name!r} does not exist; there are {known}", "model", "model_not_found", 404)


def _refuse_unsupported(asked: _Asked) -> None:
    for name, value in (asked.model_extra or {}).items():
        if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
            shown = json.dumps(UNSUPPORTED[name][-1])
            raise RequestError(f"{name}: is not supported; allowed: {shown}", name, "unsupported_parameter")


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
