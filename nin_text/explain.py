"""Which tokens spoke for which class: evidence mapped back to the characters of the text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from nin_text.configuration import MULTI_LABEL
from nin_text.errors import UserError
from nin_text.text import NiNTextForSequenceClassification
from nin_text.tokenization import clean, truncation

CONTRAST = 0.75  # share of the strongest colour given to the strongest token


@dataclass(frozen=True)
class Explanation:
    """The evidence of one text.

    Attributes:
        text: the text, as the tokenizer saw it.
        spans: (start, end) characters of each token in `text`.
        evidence: (T, K); its sum over tokens is `logits`.
        logits: (K,).
    """

    text: str
    spans: list[tuple[int, int]]
    evidence: np.ndarray
    logits: np.ndarray


def explain(
    model: NiNTextForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    max_length: int | None = None,
) -> Explanation:
    """The evidence of each token of a text for each class.

    Args:
        model: a NiN text classifier.
        tokenizer: its (fast) tokenizer.
        text: any text.
        max_length: cut the text to this many tokens, as the model was trained; 0 or None for none.
    """
    text = clean(text)
    cut = truncation(tokenizer, max_length)
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False, **cut)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    if not ids:
        ids, spans = [tokenizer.unk_token_id or 0], [(0, len(text))]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        output = model(torch.tensor([ids], device=device), output_evidence=True)
    model.train(was_training)
    return Explanation(
        text=text,
        spans=[(int(start), int(end)) for start, end in spans],
        evidence=output.evidence[0].cpu().numpy(),
        logits=output.logits[0].cpu().numpy(),
    )


def refuse_several_labels(model: NiNTextForSequenceClassification) -> None:
    """Refuse a model each of whose labels is a yes or no by itself.

    Raises:
        UserError: that what explains one class against the others does not fit it.
    """
    if model.config.problem_type == MULTI_LABEL:
        raise UserError(
            "the model answers with several labels, each by itself; what compares one class with "
            "the others does not fit it (explain has the evidence for each)"
        )


def contrast(explanation: Explanation, label: int) -> np.ndarray:
    """(T,) evidence for a class beyond the mean of all classes.

    Adding the same number to every logit changes no probability, so evidence that all classes
    share says nothing about the answer.
    """
    evidence = explanation.evidence
    return evidence[:, label] - evidence.mean(axis=1)


def to_terminal(explanation: Explanation, label: int) -> str:
    """The text with its tokens on green (for the class) or red (against it) for a terminal.

    Colours are 24-bit ANSI escapes. Control characters of the text itself are made visible, so
    that a text cannot take over the terminal.
    """
    scores = contrast(explanation, label)
    scale = max(float(np.abs(scores).max()), 1e-9)
    parts, at = [], 0
    for (start, end), score in zip(explanation.spans, scores, strict=True):
        parts.append(printable(explanation.text[at:start]))
        fade = int(255 - 255 * CONTRAST * abs(score) / scale)
        red, green, blue = (fade, 255, fade) if score > 0 else (255, fade, fade)
        word = printable(explanation.text[max(start, at) : end])
        parts.append(f"\x1b[38;2;0;0;0m\x1b[48;2;{red};{green};{blue}m{word}\x1b[0m")
        at = max(at, end)
    parts.append(printable(explanation.text[at:]))
    return "".join(parts)


def printable(text: str) -> str:
    """A text that cannot take over the terminal it is printed on."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text
    )
