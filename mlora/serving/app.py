"""The server: page and endpoint on one port of this machine, and nothing from anywhere else.

It listens on 127.0.0.1 unless told otherwise. The page's files all come from here: a content security policy forbids
the browser anything else, no analytics are sent, and nothing is ever shared through another host.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any

from mlora.data import DataError
from mlora.generation.opened import ModelOptions
from mlora.model.errors import ModelError
from mlora.wording import install

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Served:
    """The flags of `inference.py`.

    Attributes:
        model: what is loaded; of folders of adapters, those may be loaded later.
        template: form of prompts where a request names none.
        host: address to listen on.
        port: to listen on.
    """

    model: ModelOptions
    template: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860


def main(served: Served) -> int:
    """Serve until interrupted, and return the exit status."""
    missing = [name for name in ("gradio", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"Error: inference.py needs {', '.join(missing)}: {install('web')}", file=sys.stderr)
        return 2
    try:
        listening = _listen(served.host, served.port)
    except OSError as error:
        print(f"Error: cannot listen on {served.host}, port {served.port}: {error.strerror}", file=sys.stderr)
        return 2
    with listening:
        try:
            app = build(served)
        except (ModelError, DataError, ValueError) as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2
        if not is_loopback(served.host):
            print(
                f"Warning: on {served.host} anybody who reaches this machine can use the model; there is no password.",
                file=sys.stderr,
            )
        _run(app, listening)
    return 0


def build(served: Served) -> Any:
    """Return the application: the endpoint, and the page at its root."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from mlora.serving.endpoint import ERRORS, error_response, router
    from mlora.serving.engine import Engine
    from mlora.serving.page import STYLE, build_page, theme

    engine = Engine(served.model, served.template)
    app = FastAPI(title="m-LoRA", docs_url=None, redoc_url=None, openapi_url=None)
    for kind in ERRORS:
        app.add_exception_handler(kind, error_response)
    app.include_router(router(engine))

    @app.middleware("http")
    async def _policy(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    if is_loopback(served.host):  # a page elsewhere cannot reach this one by giving its own name this address
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", served.host])
    app.state.engine = engine
    return gradio.mount_gradio_app(
        app, build_page(engine), path="/", theme=theme(), css=STYLE, ssr_mode=False, footer_links=[], pwa=False
    )


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(64)
    except OSError:
        listening.close()
        raise
    return listening


def _run(app: Any, listening: socket.socket) -> None:
    import uvicorn

    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"page      http://{shown}:{port}/\nendpoint  http://{shown}:{port}/v1\nCtrl-C ends it", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])
