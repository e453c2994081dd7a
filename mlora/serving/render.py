"""What the page shows of answers and of routes, as HTML; everything a model or a user wrote is escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mlora.serving.engine import Routes
from mlora.wording import counted

STYLE = """
.gradio-container { max-width: 1500px !important; margin: 0 auto; }
footer { display: none !important; }
#title h1 { margin: 0; font-size: 1.35rem; letter-spacing: -0.01em; }
#title p { margin: 0; color: var(--body-text-color-subdued); }
#shown, #routes, #problem, :is(#shown, #routes, #problem) .html-container { padding: 0; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 0.75rem; }
.answer { border: 1px solid var(--border-color-primary); border-top: 3px solid hsl(var(--hue) 60% 52%);
  border-radius: 0.6rem; background: var(--block-background-fill); display: flex; flex-direction: column;
  box-shadow: 0 1px 3px rgb(0 0 0 / 0.1); }
.answer header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 0.6rem; padding: 0.55rem 0.9rem 0; }
.answer header b { font-size: 0.95rem; overflow-wrap: anywhere; }
.answer header span { font-size: 0.75rem; color: var(--body-text-color-subdued); }
.answer .text { padding: 0.35rem 0.9rem 0.9rem; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.55;
  min-height: 4.2em; }
.answer .text.going::after { content: ""; display: inline-block; width: 0.5em; height: 1em; margin-left: 1px;
  vertical-align: -0.15em; background: hsl(var(--hue) 60% 52%); animation: caret 1s steps(2) infinite; }
@keyframes caret { 50% { opacity: 0; } }
@media (prefers-reduced-motion: reduce) { .answer .text.going::after { animation: none; } }
.hint { color: var(--body-text-color-subdued); padding: 1.6rem 0.5rem; text-align: center; }
.notice { border-left: 4px solid #d33; background: color-mix(in srgb, #d33 12%, transparent); border-radius: 0.4rem;
  padding: 0.55rem 0.8rem; overflow-wrap: anywhere; }
.tokens { white-space: pre-wrap; line-height: 2; font-family: var(--font-mono); font-size: 0.85rem; }
.tokens span { border-radius: 0.25rem; padding: 0.12rem 0.05rem; border-bottom: 3px solid hsl(var(--hue) 65% 50%);
  background: hsl(var(--hue) 70% 55% / 0.22); }
.tokens .asked { opacity: 0.55; }
.tokens sub { font-size: 0.65em; opacity: 0.75; vertical-align: -0.3em; padding: 0 1px; }
.experts { display: flex; flex-wrap: wrap; gap: 0.35rem 1rem; margin: 0 0 0.7rem; padding: 0; font-size: 0.8rem; }
.experts span { display: inline-flex; align-items: center; gap: 0.35rem; font-variant-numeric: tabular-nums; }
.experts i { width: 0.8rem; height: 0.8rem; border-radius: 0.2rem; background: hsl(var(--hue) 65% 50%); }
@media (max-width: 768px) {
  #settings { order: 2; }
  #send, #stop { min-height: 2.75rem; }
}
"""


@dataclass
class Answer:
    """One answerer's text so far.

    Attributes:
        who: the adapter's name, or the base model's.
        kind: its method.
        text: so far.
        tokens: new token ids so far.
        seconds: since the request was sent.
        finish: why it ended; None while it goes on.
    """

    who: str
    kind: str
    text: str
    tokens: list[int]
    seconds: float = 0.0
    finish: str | None = None


def answers(shown: Sequence[Answer]) -> str:
    """Return the answers side by side."""
    cards = []
    for number, answer in enumerate(shown):
        rate = f" · {len(answer.tokens) / answer.seconds:.1f} tokens/s" if answer.tokens and answer.seconds else ""
        end = {"stop": "ended", "length": "cut off", "cancelled": "stopped"}.get(answer.finish or "", "")
        parts = [f"{counted(len(answer.tokens), 'token')}{rate}"] if answer.tokens else []
        counts = " · ".join([*parts, *([end] if end else [])]) or "waiting"
        going = " going" if answer.finish is None else ""
        cards.append(
            f'<article class="answer" style="--hue: {_hue(number, 8)}" data-who="{escape(answer.who)}">'
            f"<header><b>{escape(answer.who)}</b><span>{escape(answer.kind)}</span><span>{counts}</span></header>"
            f'<div class="text{going}">{escape(answer.text.strip())}</div></article>'
        )
    return f'<div class="answers" aria-live="polite">{"".join(cards)}</div>'


def hint(text: str) -> str:
    """Return a quiet line where nothing is to be shown yet."""
    return f'<div class="hint">{escape(text)}</div>'


def notice(text: str) -> str:
    """Return an error that stays until the next action; nothing for no text."""
    return f'<div class="notice" role="alert">{escape(text)}</div>' if text else ""


def place(site: str) -> str:
    """Return what a router's place is called."""
    found = re.search(r"\.(\d+)\.(.*)", site)
    return f"layer {found[1]} · {found[2]}" if found else site


def routed(tokenizer: Any, tokens: Sequence[int], asked: int, routes: Routes) -> str:
    """Return the tokens of a text, coloured by the experts that one router sent them to.

    Args:
        tokenizer: of the base model.
        tokens: of prompt and answer.
        asked: how many of them are the prompt's.
        routes: of the router.
    """
    chosen, shares = routes
    experts = chosen.shape[1]
    load = chosen.float().sum(0) / chosen.sum()
    legend = "".join(
        f'<span style="--hue: {_hue(e, experts)}"><i></i>expert {e}: {100 * float(load[e]):.0f}%</span>'
        for e in range(experts)
    )
    parts = []
    for number, token in enumerate(tokens):
        own = sorted(chosen[number].nonzero()[:, 0].tolist(), key=lambda e: -float(shares[number, e]))
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        breaks = "\n" * text.count("\n")  # after the label, which belongs to this line
        text = text.replace("\n", "⏎")
        title = ", ".join(f"expert {e}: {float(shares[number, e]):.2f}" for e in own) or "no expert"
        hue = _hue(own[0], experts) if own else 0
        state = ' class="asked"' if number < asked else ""
        label = f"<sub>{'·'.join(map(str, own))}</sub>"
        parts.append(f'<span{state} style="--hue: {hue}" title="{title}">{escape(text)}{label}</span>{breaks}')
    return f'<div class="experts">{legend}</div><div class="tokens">{"".join(parts)}</div>'


def _hue(number: int, count: int) -> int:
    return round(215 + number * 360 / count) % 360
