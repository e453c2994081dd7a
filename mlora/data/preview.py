"""Training rows as text, with what is trained on marked: whoever looks sees prompts, masks, end tokens and cuts."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from mlora.data.dataset import Samples
from mlora.data.tokenize import NO_LABEL, Sample
from mlora.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE, CUT = "⟦", "⟧", "…"
LEGEND = f"{OPEN}trained on{CLOSE}  {CUT} cut off here"


def render(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    """Return a row as the model reads it, special tokens included, with its labels in ⟦ ⟧ and … where it was cut."""
    ids, text, shown, end = list(sample.input_ids), "", "", 0
    bos = bool(ids) and ids[0] == tokenizer.bos_token_id
    for labelled, run in groupby(sample.labels, lambda label: label != NO_LABEL):
        start, end = end, end + len(list(run))
        if sample.truncated and start == 0:
            shown = str(tokenizer.decode(ids[:1])) if bos else ""
            shown, text = shown + CUT, shown
        # the difference of two decoded beginnings: a run alone would lose its leading space with some tokenizers
        whole = str(tokenizer.decode(ids[:end]))
        part, text = whole[len(text) :], whole
        shown += f"{OPEN}{part}{CLOSE}" if labelled else part
    return shown


def preview(tokenizer: PreTrainedTokenizerBase, samples: Samples) -> str:
    """Return all rows, each below a line of its numbers, and what became of the rows that were read."""
    blocks = []
    for number, sample in enumerate(samples, 1):
        trained = sum(label != NO_LABEL for label in sample.labels)
        facts = [f"row {number}", sample.task, counted(len(sample.input_ids), "token"), f"{trained} trained on"]
        facts += ["the prompt is cut"] if sample.truncated else []
        facts += [] if sample.class_id is None else [f"class {sample.class_id}"]
        blocks.append(f"--- {', '.join(facts)}\n{render(tokenizer, sample)}")
    return "\n\n".join([*blocks, f"{LEGEND}\n{samples.report}"])
