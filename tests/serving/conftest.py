"""A tiny model with adapters, some in memory, some on offer, one broken, served on a free port of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlora.generation.opened import ModelOptions
from mlora.model.multi import MultiAdapterModel
from tests import tinybase
from tests.families import awaken


@pytest.fixture(scope="package")
def options(tmp_path_factory: pytest.TempPathFactory) -> ModelOptions:
    place = tmp_path_factory.mktemp("served")
    base = tinybase.save(place / "tiny")
    model = MultiAdapterModel.from_pretrained(str(base))
    model.add_adapter("plain", {"r": 4})
    model.add_adapter("mixture", {"routing_strategy": "mixlora", "num_experts": 4, "r": 4, "router_init_range": 0.5})
    model.add_adapter("later", {"r": 2})
    awaken(model, std=0.5)
    model.save_adapter("plain", place / "plain")
    model.save_adapter("mixture", place / "mixture")
    model.save_adapter("later", place / "run" / "adapters" / "later")
    model.save_adapter("later", place / "run" / "adapters" / "asked")
    model.save_adapter("later", place / "run" / "adapters" / "broken")
    (place / "run" / "adapters" / "broken" / "adapter_model.safetensors").write_bytes(b"junk")
    return ModelOptions(str(base), tuple(str(place / name) for name in ("plain", "mixture", "run")), device="cpu")


@pytest.fixture(scope="module")
def server(options: ModelOptions) -> Iterator[str]:
    """The address of a running server."""
    pytest.importorskip("gradio", reason="needs the extra 'web'")
    import uvicorn

    from mlora.serving import app

    listening = app._listen("127.0.0.1", 0)
    served = app.build(app.Served(options))
    running = uvicorn.Server(uvicorn.Config(served, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    running.should_exit = True
    thread.join(10)
    listening.close()


@pytest.fixture
def base_name(options: ModelOptions) -> str:
    return str(Path(options.base_model))
