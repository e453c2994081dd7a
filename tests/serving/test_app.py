"""Where the server listens, what it lets in, and what it lets a browser fetch."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError

import pytest
import torch

from mlora.generation.opened import ModelOptions
from mlora.generation.sampling import Sampling
from mlora.model.errors import ModelError
from mlora.serving import app, render
from mlora.serving.engine import Engine
from mlora.wording import install

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def engine(options: ModelOptions) -> Engine:
    return Engine(options)


def fetch(address: str, **headers: str) -> tuple[str, dict[str, str]]:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
        return answer.read().decode(), dict(answer.headers)


def test_the_page_comes_from_here_alone(server: str) -> None:
    html, headers = fetch(f"{server}/")
    assert "m-LoRA" in html and "default-src 'self'" in headers["content-security-policy"]
    assert '"analytics_enabled":false' in html.replace(" ", "")
    assert "fonts.googleapis" not in html


def test_another_hosts_name_is_refused(server: str) -> None:
    with pytest.raises(HTTPError) as caught:
        fetch(f"{server}/v1/models", Host="evil.example")
    assert caught.value.code == 400


@pytest.mark.parametrize(
    ("host", "own"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)]
)
def test_loopback(host: str, own: bool) -> None:
    assert app.is_loopback(host) is own
    assert app.Served(ModelOptions("m")).host == "127.0.0.1"


def test_another_address_warns(
    options: ModelOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app, "build", lambda served: None)
    monkeypatch.setattr(app, "_run", lambda built, listening: None)
    assert app.main(app.Served(options, host="0.0.0.0", port=0)) == 0
    assert "Warning: on 0.0.0.0 anybody" in capsys.readouterr().err
    assert app.main(app.Served(options, port=0)) == 0
    assert capsys.readouterr().err == ""


def test_a_port_in_use_and_a_missing_extra_are_said(
    options: ModelOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert app.main(app.Served(options, port=taken.getsockname()[1])) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert app.main(app.Served(options, port=0)) == 2
    assert install("web") in capsys.readouterr().err


def test_bad_input_exits_with_2() -> None:
    command = [sys.executable, str(ROOT / "inference.py"), "--base_model", "./nowhere", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no such file or folder" in done.stderr and "Traceback" not in done.stderr
    shared = subprocess.run([*command, "--share"], capture_output=True, text=True, check=False)
    assert shared.returncode == 2 and "No such option" in shared.stderr


def test_adapters_come_from_the_given_folders_alone(engine: Engine, options: ModelOptions) -> None:
    assert engine.adapters == ["plain", "mixture"]
    assert list(engine.offered()) == ["plain", "mixture", "asked", "broken", "later"]
    engine.load("later")
    with pytest.raises(ModelError, match="exists already"):
        engine.load("later")
    engine.unload("later")
    for name in ("../later", options.lora_weights[0], "/etc", "nobody"):
        with pytest.raises(ModelError, match="is not offered; offered: plain"):
            engine.load(name)
    with pytest.raises(ModelError, match="broken.*cannot be read"):
        engine.load("broken")
    assert engine.adapters == ["plain", "mixture"]


def test_an_adapter_that_is_asked_is_loaded(engine: Engine) -> None:
    short = Sampling(max_new_tokens=2)
    assert list(engine.ask([[1, 2]], ["later"], short))
    assert engine.adapters == ["plain", "mixture", "later"]
    engine.unload("later")
    with pytest.raises(ModelError, match="'nobody' is not offered"):
        list(engine.ask([[1, 2]], ["nobody"], short))


def test_an_adapter_keeps_its_name_and_its_place_in_memory(options: ModelOptions, tmp_path: Path) -> None:
    saved = Path(options.lora_weights[0])
    for parent in ("one", "two"):
        shutil.copytree(saved, tmp_path / parent / "x")
    engine = Engine(ModelOptions(options.base_model, (str(tmp_path / "one"), str(tmp_path / "two")), device="cpu"))
    assert engine.offered() == {"x": tmp_path / "one" / "x", "x-2": tmp_path / "two" / "x"}
    engine.load("x-2")
    shutil.copytree(saved, tmp_path / "one" / "a")
    shutil.rmtree(tmp_path / "one" / "x")
    shutil.rmtree(tmp_path / "two" / "x")
    assert engine.offered() == {"x-2": tmp_path / "two" / "x", "a": tmp_path / "one" / "a"}
    with pytest.raises(ModelError, match="'x' is not offered"):
        engine.load("x")


def test_a_tick_changes_what_it_ticks_alone(engine: Engine) -> None:
    from mlora.serving.page import _Page

    page = _Page(engine)
    _, ticked, _ = page.opened()
    engine.load("later")  # by the endpoint, after the page was drawn
    _, ticked, *_ = page.change(["plain"], ticked, [])
    assert ticked == engine.adapters == ["plain", "later"]
    _, ticked, *_ = page.change(["plain", "later", "mixture"], ticked, [])
    assert ticked == ["plain", "later", "mixture"]
    engine.unload("later")


def test_an_adapter_that_left_meanwhile_does_not_answer_as_the_base(engine: Engine) -> None:
    from mlora.serving.page import _Page

    sampling, tab = (0.0, 1.0, 0, 1.0, 4, ""), SimpleNamespace(session_hash="")
    *_, (talk, *_) = _Page(engine).ask("Hi", "", ["later", engine.base], engine.form.name, *sampling, tab)
    assert engine.adapters[-1] == "later"
    assert talk["answers"]["later"] != talk["answers"][engine.base]
    engine.unload("later")


def test_one_request_at_a_time_and_none_after_a_stop(engine: Engine) -> None:
    asked = ([[5, 6]], ["plain"], Sampling(max_new_tokens=500))
    first = engine.ask(*asked)
    next(first)
    assert list(engine.ask(*asked, cancelled=lambda: True)) == []
    first.close()
    assert len(list(engine.ask([[5, 6]], [None], Sampling(max_new_tokens=2)))) == 2


def test_routes_are_those_of_the_routers(engine: Engine) -> None:
    tokens = [5, 9, 30, 7]
    routes = engine.routes(tokens, "mixture")
    assert list(map(render.place, routes)) == ["layer 0 · mlp", "layer 1 · mlp"]
    module = engine.model.adapter_module("mixture")
    seen: dict[str, torch.Tensor] = {}

    def remember(path: str, x: torch.Tensor) -> None:
        seen[path] = x.flatten(0, -2)

    hooks = [
        engine.model.hf_model.get_submodule(path).register_forward_pre_hook(
            lambda _, x, path=path: remember(path, x[0])
        )
        for path in routes
    ]
    engine.routes(tokens, "mixture")
    for hook in hooks:
        hook.remove()
    for path, (chosen, shares) in routes.items():
        expected = (seen[path] @ module.tensors[path]["router"].T).softmax(-1)
        assert (shares - expected).abs().max() < 1e-5
        assert (chosen.sum(1) == 2).all() and (chosen == (shares >= shares.topk(2).values[:, 1:])).all()


def test_what_models_and_users_write_is_escaped(engine: Engine) -> None:
    shown = render.answers([render.Answer("<b>", "lora", "<script>alert(1)</script>", [1])])
    assert "<script>" not in shown and "<b>&lt;b&gt;" in shown
    tokens = engine.model.tokenizer("<i>\nx", add_special_tokens=False)["input_ids"]
    html = render.routed(engine.model.tokenizer, tokens, 2, engine.routes(tokens, "mixture")["model.layers.0.mlp"])
    assert html.count('class="asked"') == 2 and "<i>\n" not in html and "&lt;" in html
    assert "<img" not in render.notice("<img src=x>") and render.notice("") == ""
