"""The page: a prompt, answered by the base model and by adapters side by side."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from mlora.data import DataError
from mlora.generation.form import form_names
from mlora.generation.sampling import Sampling
from mlora.serving import render
from mlora.serving.engine import Engine, Routes, form_of
from mlora.serving.render import STYLE, Answer

__all__ = ["STYLE", "build_page", "theme"]

REFRESH_SECONDS = 0.08
"""Between two pictures of a growing answer: quick enough to look steady, slow enough for a phone."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def theme() -> gr.themes.Base:
    """Return the page's look, in fonts that every system has."""
    system = ["ui-sans-serif", "system-ui", "sans-serif"]
    soft = gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=system, font_mono=["ui-monospace", "Consolas", "monospace"]
    )
    return soft.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_padding="0",
        # Soft's own greys are too pale to read and to see
        body_text_color_subdued="*neutral_600",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_hover="*neutral_600",
        checkbox_border_color_dark="*neutral_300",
        checkbox_border_color_hover_dark="*neutral_200",
    )


def build_page(engine: Engine) -> gr.Blocks:
    """Return the page of an engine."""
    page = _Page(engine)
    with gr.Blocks(title="m-LoRA", analytics_enabled=False) as blocks:
        gr.HTML(
            f"<h1>m-LoRA</h1><p>{escape(engine.base)} and its adapters, answering side by side</p>",
            elem_id="title",
        )
        talk, ticked = gr.State({}), gr.State([])
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280, elem_id="settings"):
                loaded = page.adapters()
                problem = gr.HTML(elem_id="problem", visible=False)
                settings = page.settings()
            with gr.Column(scale=4, min_width=320):
                who = gr.CheckboxGroup(label="Who answers", elem_id="who")
                prompt = gr.Textbox(
                    label="Prompt", placeholder="Ask something; Enter sends, Shift+Enter starts a new line",
                    lines=1, max_lines=10, autofocus=True, elem_id="prompt",
                )  # fmt: skip
                with gr.Accordion("Input that the prompt is about", open=False):
                    about = gr.Textbox(show_label=False, lines=3, max_lines=12, elem_id="about", container=False)
                with gr.Row():
                    send = gr.Button("Send", variant="primary", elem_id="send", min_width=100)
                    stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=100)
                shown = gr.HTML(render.hint("Answers appear here, one column for each that you tick."), elem_id="shown")
                with gr.Accordion("Experts", open=False, elem_id="experts", visible=False) as experts:
                    gr.Markdown("Which experts computed each token: the prompt pale, then the answer.")
                    with gr.Row():
                        mixture = gr.Dropdown(label="Adapter", elem_id="mixture")
                        router = gr.Dropdown(label="Router", elem_id="router")
                    routes = gr.HTML(elem_id="routes")

        asking = [prompt, about, who, *settings]
        answered = [talk, shown, send, stop, problem]
        for event in (send.click, prompt.submit):
            event(page.ask, asking, answered, concurrency_limit=8, **QUIET).then(
                page.mixtures, [talk, mixture], [experts, mixture], **QUIET
            ).then(page.routers, [talk, mixture, router], [talk, router, routes], **QUIET)
        stop.click(page.stop, None, None, queue=False, **QUIET)
        mixture.input(page.routers, [talk, mixture, router], [talk, router, routes], **QUIET)
        router.input(page.route, [talk, mixture, router], routes, **QUIET)
        loaded.input(page.change, [loaded, ticked, who], [loaded, ticked, who, problem], **QUIET)
        blocks.load(page.opened, None, [loaded, ticked, who], **QUIET)
        blocks.unload(page.stop)
    return blocks


class _Page:
    """What the page's controls do; each browser tab has its own stop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.stops: dict[str, threading.Event] = {}

    # -- controls ------------------------------------------------------------------------------------------------

    def adapters(self) -> gr.CheckboxGroup:
        """Return the list of adapters that can be loaded and unloaded."""
        info = "tick to load, untick to unload" if self.engine.offered() else "none; start with --lora_weights FOLDER"
        return gr.CheckboxGroup(label="Adapters in memory", info=info, elem_id="loaded")

    def settings(self) -> list[gr.components.Component]:
        """Return the controls of a prompt's form and of sampling, in the order that `ask` takes them."""
        names = form_names(self.engine.model.tokenizer)
        own = self.engine.form.name
        names = names if own in names else [own, *names]
        form = gr.Dropdown(
            names, value=own, label="Template", info="chat is the model's own; none sends the text as it is",
            elem_id="template",
        )  # fmt: skip
        with gr.Accordion("Sampling", open=True):
            temperature = gr.Slider(
                0, 2, 0.7, step=0.05, label="Temperature", info="0 is greedy", elem_id="temperature"
            )
            top_p = gr.Slider(0.05, 1, 0.95, step=0.01, label="Top p")
            top_k = gr.Slider(0, 200, 0, step=1, label="Top k", info="0 keeps every token")
            penalty = gr.Slider(1, 2, 1.1, step=0.01, label="Repetition penalty")
            length = gr.Slider(1, 2048, 256, step=1, label="Longest answer in tokens", elem_id="length")
            seed = gr.Textbox(
                label="Seed", info="a number; all columns draw alike", placeholder="a new one each time", elem_id="seed"
            )
        return [form, temperature, top_p, top_k, penalty, length, seed]

    def opened(self) -> tuple[Any, ...]:
        """Return what is loaded when a browser opens the page."""
        return *self._loaded(), self._who(None)

    def change(self, wanted: list[str], ticked: list[str], who: list[str]) -> tuple[Any, ...]:
        """Load and unload what has been ticked and unticked since the page was drawn.

        What others have loaded and unloaded meanwhile stays as it is.
        """
        said = ""
        for name in set(ticked) ^ set(wanted):
            try:
                if (name in wanted) != (name in self.engine.adapters):
                    (self.engine.load if name in wanted else self.engine.unload)(name)
                who = [*who, name] if name in wanted else who
            except ValueError as error:
                said = str(error)
        return *self._loaded(), self._who(who), gr.HTML(render.notice(said), visible=bool(said))

    def _loaded(self) -> tuple[Any, list[str]]:
        loaded = self.engine.adapters
        return gr.CheckboxGroup(choices=list(self.engine.offered()), value=loaded, visible=True), loaded

    def _who(self, kept: list[str] | None) -> Any:
        choices = [self.engine.base, *self.engine.adapters]
        return gr.CheckboxGroup(
            choices=choices, value=choices[:4] if kept is None else [n for n in kept if n in choices]
        )

    # -- answers -------------------------------------------------------------------------------------------------

    def ask(
        self,
        prompt: str,
        about: str,
        who: list[str],
        form: str,
        temperature: float,
        top_p: float,
        top_k: int,
        penalty: float,
        length: int,
        seed: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the answers as they grow."""
        busy, idle = (
            (gr.Button(interactive=False), gr.Button(interactive=True), gr.HTML("", visible=False)),
            (gr.Button(interactive=True), gr.Button(interactive=False), gr.skip()),
        )
        if not prompt.strip() or not who:
            yield {}, render.hint("Write a prompt." if who else "Tick who is to answer."), *idle
            return
        stop = self.stops[request.session_hash or ""] = threading.Event()
        kinds = {name: method.method for name, method in self.engine.model.adapters.items()}
        kinds[self.engine.base] = "base model"
        shown = [Answer(name, kinds.get(name, ""), "", []) for name in who]
        yield {}, render.answers(shown), *busy
        try:
            tokens = form_of(self.engine, form).encode(prompt, about)
            sampling = Sampling(
                max_new_tokens=int(length), temperature=temperature, top_p=top_p, top_k=int(top_k),
                repetition_penalty=penalty, seed=_seed(seed),
            )  # fmt: skip
            names = [None if name == self.engine.base else name for name in who]
            for _ in self._grow(shown, tokens, names, sampling, stop):
                yield gr.skip(), render.answers(shown), gr.skip(), gr.skip(), gr.skip()
        except (ValueError, DataError) as error:
            yield {}, render.notice(str(error)), *idle
            return
        finally:
            stop.set()
        for answer in shown:
            answer.finish = answer.finish or "cancelled"
        talk = {"prompt": tokens, "answers": {answer.who: answer.tokens for answer in shown}, "routes": {}}
        yield talk, render.answers(shown), *idle

    def _grow(
        self, shown: list[Answer], tokens: list[int], names: list[str | None], sampling: Sampling, stop: threading.Event
    ) -> Iterator[None]:
        """Let the answers grow, and yield when they are to be drawn again."""
        started = drawn = time.monotonic()
        for piece in self.engine.ask([tokens] * len(names), names, sampling, stop.is_set):
            now = time.monotonic()
            answer = shown[piece.row]
            answer.text += piece.text
            answer.tokens.append(piece.token)
            answer.seconds, answer.finish = now - started, piece.finish
            if now - drawn >= REFRESH_SECONDS:
                drawn = now
                yield

    def stop(self, request: gr.Request) -> None:
        """Stop what this tab asked for."""
        if (event := self.stops.get(request.session_hash or "")) is not None:
            event.set()

    # -- experts -------------------------------------------------------------------------------------------------

    def mixtures(self, talk: dict[str, Any], chosen: str | None) -> tuple[Any, Any]:
        """Return the mixtures that have answered, to choose from."""
        names = [name for name in talk.get("answers", ()) if name in self.engine.mixtures()]
        value = chosen if chosen in names else next(iter(names), None)
        return gr.Accordion(visible=bool(names)), gr.Dropdown(choices=names, value=value)

    def routers(self, talk: dict[str, Any], name: str | None, chosen: str | None) -> tuple[Any, Any, str]:
        """Return the routers of a mixture, to choose from, and what the chosen one did."""
        if name not in talk.get("answers", {}) or name not in self.engine.mixtures():
            return talk, gr.Dropdown(choices=[], value=None), ""
        if name not in talk["routes"]:
            found = self.engine.routes(talk["prompt"] + talk["answers"][name], name)
            talk["routes"][name] = {render.place(site): routes for site, routes in found.items()}
        places = list(talk["routes"][name])
        value = chosen if chosen in places else next(iter(places), None)
        return talk, gr.Dropdown(choices=places, value=value), self.route(talk, name, value)

    def route(self, talk: dict[str, Any], name: str | None, place: str | None) -> str:
        """Return what one router did with the tokens of prompt and answer."""
        routes: Routes | None = talk.get("routes", {}).get(name, {}).get(place)
        if routes is None or name is None:
            return ""
        tokens = talk["prompt"] + talk["answers"][name]
        return render.routed(self.engine.model.tokenizer, tokens, len(talk["prompt"]), routes)


def _seed(written: str) -> int:
    if not written.strip():
        return random.getrandbits(31)
    if not written.strip().isdecimal():
        raise ValueError(f"seed: {written!r} is not allowed; allowed: a whole number, or nothing")
    return int(written)
