"""Explanations as one HTML page that stands alone: the text shaded by evidence, and its sums.

What is shaded is the evidence beyond the mean of the classes (`explain.contrast`), as on the
terminal; the page's table shows that all the evidence adds up to the logits. A page loads nothing
and its policy lets no script run but its own: a text is shown, never obeyed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from nin_text.evaluation import most_confident_mistakes, softmax
from nin_text.explain import Explanation, explain, refuse_several_labels
from nin_text.models import label_names
from nin_text.text import NiNTextForSequenceClassification

LEVELS = 8  # shades of either colour
# Bounds on a page, so that a browser can still show it.
MAX_TEXTS = 200
MAX_PAGE_TOKENS = 100_000
MAX_TOKENS = 2_000  # of one text
MAX_CLASSES = 10  # of one text: the most probable, and the true one
MAX_CHARACTERS = 200  # of one token, of what lies between two, and of a class name
MAX_PHRASES, PHRASE_CHARACTERS = 5, 80

INTRODUCTION = (
    "Every answer is a sum: each token adds its evidence to the logit of each class. Shown is the "
    "evidence for a class beyond the mean of all classes, because what all classes share changes "
    "no probability. The deepest shade is the strongest evidence in the text, for any class listed."
)
# Letters and marks by their kind, which is all that `isprintable` asks for, and drawn as nothing.
NOT_DRAWN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0\U000e0100-\U000e01ef]"
)
JOINERS = "\u200c\u200d"  # change how letters and emoji are drawn, but hide and reorder nothing


class Page:
    """A page that texts are added to, one after another, until it is full.

    Only what will be shown is kept, so that memory stays small however long the texts are.

    Args:
        names: class names by index.
        title: heading of the page.
        subtitle: a sentence below it.
    """

    def __init__(self, names: Sequence[str], title: str, subtitle: str = "") -> None:
        self.names = [_cut(visible(name)) for name in names]
        self.title, self.subtitle = title, subtitle
        self.sections: list[str] = []
        self.data: list[dict[str, Any]] = []
        self.texts = self.tokens = 0

    @property
    def full(self) -> bool:
        """Whether further texts are counted only."""
        return len(self.sections) >= MAX_TEXTS or self.tokens >= MAX_PAGE_TOKENS

    def add(self, explanation: Explanation, truth: int | None = None) -> None:
        """Show a text, its answer chosen by its logits.

        Args:
            explanation: of a classifier with the page's classes.
            truth: index of the true class, if it is known.
        """
        self.texts += 1
        if self.full:
            return
        section, data = _section(explanation, self.names, truth, len(self.sections) + 1)
        self.sections.append(section)
        self.data.append(data)
        self.tokens += len(data["evidence"][0])

    def html(self) -> str:
        """The whole page."""
        notes = [self.subtitle] if self.subtitle else []
        if self.texts > len(self.sections):
            notes.append(
                f"This page shows the first {len(self.sections):,} of {self.texts:,} texts: it "
                f"holds at most {MAX_TEXTS} texts and about {MAX_PAGE_TOKENS:,} tokens."
            )
        here = Path(__file__)
        style = here.with_suffix(".css").read_text(encoding="utf-8")
        script = here.with_suffix(".js").read_text(encoding="utf-8")
        # ensure_ascii, which is the default, also writes line separators and surrogates as escapes.
        data = json.dumps({"levels": LEVELS, "texts": self.data}, separators=(",", ":"))
        data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
        title = escape(visible(self.title))
        body = f"""<header>
<h1>{title}</h1>
<button id="theme" class="script-only" type="button">dark / light</button>
{"".join(f'<p class="note">{escape(visible(note))}</p>' for note in notes)}
<p class="dim">{INTRODUCTION}</p>
{_legend()}
</header>
<main>
{"".join(self.sections)}
</main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>"""
        return html_page(title, style, body, f"script-src {_digest(script)}")


def html_page(title: str, style: str, body: str, sources: str) -> str:
    """A page that loads nothing and runs nothing, but for what `sources` allows.

    Args:
        title: escaped.
        style: CSS.
        body: HTML.
        sources: directives of its content security policy.
    """
    policy = (
        f"default-src 'none'; {sources}; style-src {_digest(style)}; "
        f"base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def explain_html(
    model: NiNTextForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    *,
    truths: Sequence[int] | None = None,
    title: str = "Explanations",
    subtitle: str = "",
    max_length: int | None = None,
) -> str:
    """One HTML page that explains a classifier's answers to one text or several.

    Args:
        model: a NiN text classifier.
        tokenizer: its (fast) tokenizer.
        texts: any texts; the first `MAX_TEXTS` are shown.
        truths: index of the true class of each, if they are known.
        title, subtitle: what the page says at the top.
        max_length: cut texts to this many tokens.

    Returns:
        The page, which needs no other file and no network.

    Raises:
        ValueError: if `truths` are not one index of a class for each text.
        UserError: if the model answers with several labels.
    """
    refuse_several_labels(model)
    texts = [texts] if isinstance(texts, str) else texts
    names = label_names(model)
    if truths is not None and (
        len(truths) != len(texts) or any(truth not in range(len(names)) for truth in truths)
    ):
        raise ValueError(f"truths must be {len(texts)} indices of classes, 0 to {len(names) - 1}")
    page = Page(names, title, subtitle)
    for i, text in enumerate(texts):
        if page.full:
            page.texts = len(texts)
            break
        page.add(explain(model, tokenizer, text, max_length), None if truths is None else truths[i])
    return page.html()


def mistakes_html(
    model: NiNTextForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[int],
    probabilities: np.ndarray,
    *,
    most: int = 20,
    max_length: int | None = None,
) -> str:
    """The page of a run: its most confident mistakes on the validation split.

    Args:
        model, tokenizer: what gave the probabilities.
        texts: (n) of the validation split.
        labels: (n,) their classes.
        probabilities: (n, K) of each class.
        most: mistakes to show.
        max_length: cut texts to this many tokens, as in training.
    """
    truth = np.asarray(labels)
    wrong = most_confident_mistakes(probabilities, labels)
    worst = wrong[:most]
    shown = "none" if not len(wrong) else "all" if len(worst) == len(wrong) else f"{len(worst)}"
    return explain_html(
        model,
        tokenizer,
        [texts[i] for i in worst],
        truths=[int(truth[i]) for i in worst],
        title="Most confident mistakes",
        subtitle=(
            f"Of {len(truth):,} texts of the validation split, {len(wrong):,} got a wrong answer; "
            f"{shown} of these are here, the most confident first. The test split is not looked "
            f"at. The page was made before the n-grams, if the model has any, were fitted once "
            f"more to training and validation texts: to the saved model these texts are no longer "
            f"unseen."
        ),
        max_length=max_length,
    )


def visible(text: str) -> str:
    """A text in which no character hides, reorders others or controls anything.

    Line breaks and tabs stay, other white space becomes a space; controls, bidirectional marks
    and whatever else is not drawn are written as their code points.
    """
    plain = text.isprintable() and not NOT_DRAWN.search(text)
    return text if plain else "".join(map(_visible, text))


def _visible(c: str) -> str:
    if c in "\n\t" or c in JOINERS or (c.isprintable() and not NOT_DRAWN.match(c)):
        return c
    if (c.isspace() and unicodedata.category(c) != "Cc") or c in "\r\v\f":
        return " "
    return f"⟨U+{ord(c):04X}⟩"


def _cut(text: str, most: int = MAX_CHARACTERS) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _digest(source: str) -> str:
    """The expression by which a content security policy allows an inline script or style."""
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


class Units(NamedTuple):
    """Tokens as they are shown: those that share their characters are one.

    Attributes:
        gaps: (U + 1) what lies before each, and after the last.
        words: (U) their characters.
        evidence: (U, K) beyond the mean of the classes.
    """

    gaps: list[str]
    words: list[str]
    evidence: np.ndarray


def _units(explanation: Explanation) -> Units:
    text, at = explanation.text, 0
    gaps: list[str] = []
    words: list[str] = []
    owner: list[int] = []
    for start, end in explanation.spans:
        # Byte-level tokenizers make several tokens of one character. A token without characters,
        # such as [CLS], is shown nevertheless, for it has its share of the sum.
        if not (start < end <= at and words):
            gaps.append(text[at:start])
            words.append(text[max(start, at) : end])
            at = max(at, end)
        owner.append(len(words) - 1)
    gaps.append(text[at:])
    evidence = np.nan_to_num(explanation.evidence.astype(np.float64))
    evidence -= evidence.mean(axis=1, keepdims=True)  # (T, K)
    added = np.zeros((len(words), evidence.shape[1]))
    np.add.at(added, owner, evidence)
    return Units(gaps, words, added)


def _level(value: float, scale: float) -> int:
    return min(LEVELS, int(LEVELS * abs(value) / scale + 0.5))


def _shade(value: float, scale: float) -> str:
    """Name of the style of a token: f1 to f8 for the class, a1 to a8 against it, or none."""
    level = _level(value, scale)
    return f"{'f' if value > 0 else 'a'}{level}" if level else ""


def _figure(value: float) -> str:
    # Adding zero makes a rounded minus zero a plain one.
    return f"{round(float(value), 2) + 0.0:+.2f}".replace("-", "\N{MINUS SIGN}")


def phrases(units: Units, label: int, scale: float) -> list[tuple[str, float, int]]:
    """Neighbouring words that are shaded alike: their text, evidence and number of occurrences.

    A word is what the tokenizer cut without a gap between letters. Words too weak to be shaded
    end a phrase. Equal phrases are added up.
    """
    runs: list[list[Any]] = []  # text, evidence, sign
    ends_word = False
    words: list[list[Any]] = []  # gap, word, evidence
    for gap, word, value in zip(units.gaps, units.words, units.evidence[:, label], strict=False):
        if words and ends_word and not gap and word[:1].isalnum():
            words[-1][1] += word
            words[-1][2] += value
        else:
            words.append([gap, word, value])
        ends_word = word[-1:].isalnum()
    before = 0
    for gap, word, value in words:
        sign = int(np.sign(value)) if _level(value, scale) else 0
        if sign and sign == before:
            runs[-1][0] += gap + word
            runs[-1][1] += value
        elif sign:
            runs.append([word, value])
        before = sign
    found: dict[str, tuple[str, float, int]] = {}
    for text, value in runs:
        key = f"{value > 0} {' '.join(text.split()).casefold()}"
        first, total, count = found.get(key, (text, 0.0, 0))
        found[key] = (first, total + value, count + 1)
    return sorted(found.values(), key=lambda phrase: -abs(phrase[1]))


def _legend() -> str:
    def ramp(letter: str) -> str:
        levels = range(1, LEVELS + 1) if letter == "f" else range(LEVELS, 0, -1)
        return "".join(f'<span class="{letter}{level}"></span>' for level in levels)

    return (
        f'<div class="legend"><span>against the class (dotted)</span>'
        f'<span class="ramp" aria-hidden="true">{ramp("a")}<span></span>{ramp("f")}</span>'
        f"<span>for it (solid)</span></div>"
    )


def _section(
    explanation: Explanation, names: Sequence[str], truth: int | None, number: int
) -> tuple[str, dict[str, Any]]:
    """One text as HTML, its answer's class shown, and what the script needs for the others."""
    probabilities = softmax(np.nan_to_num(explanation.logits)[None])[0]  # (K,)
    answer = int(probabilities.argmax())
    order = [int(k) for k in np.argsort(-probabilities, kind="stable")[:MAX_CLASSES]]
    if truth is not None and truth not in order:
        order.append(truth)
    classes = sorted(order) if len(order) == len(names) else order
    units = _units(explanation)
    shown = min(len(units.words), MAX_TOKENS)
    evidence = np.round(units.evidence[:shown, classes], 4)  # (U, C)
    # The strongest in the whole text, so that a shade means the same in all of it.
    scale = max(round(float(np.abs(units.evidence[:, classes]).max(initial=0)), 4), 1e-4)
    place = classes.index(answer)
    notes = []
    if shown < len(units.words):
        notes.append(
            f"The first {shown:,} of {len(units.words):,} tokens are shown; phrases and sums are "
            f"of all."
        )
    if len(classes) < len(names):
        notes.append(f"{len(classes)} of {len(names)} classes are listed, the most probable first.")
    true = "" if truth is None else f'<span class="truth">truth: <bdi>{_name(names, truth)}</bdi>'
    about = "".join(
        _about_class(units, explanation, names, k, scale, i, shown=i == place)
        for i, k in enumerate(classes)
    )
    html = f"""<section class="text" id="t{number}">
<h2><a class="number" href="#text={number}">{number}</a> <bdi>{_name(names, answer)}</bdi> \
{_percent(probabilities[answer])}{true and f" {true}</span>"}</h2>
<p class="words" dir="auto" tabindex="0" aria-label="Text {number}">\
{_words(units, evidence[:, place], scale)}</p>
<p class="readout script-only" aria-live="polite">Point at a token, tap it, or focus the text and \
use the arrow keys.</p>
{"".join(f'<p class="more">{escape(note)}</p>' for note in notes)}
<div class="figures">
{_table(explanation, probabilities, names, classes, place)}
{about}
</div>
</section>
"""
    return html, {
        "classes": [names[k] for k in classes],
        "shown": place,
        "scale": scale,
        "evidence": evidence.T.tolist(),
    }


def _name(names: Sequence[str], label: int) -> str:
    return escape(names[label]) or "(no name)"


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", "\N{NARROW NO-BREAK SPACE}%")


def _words(units: Units, scores: np.ndarray, scale: float) -> str:
    parts = []
    for gap, word, score in zip(units.gaps, units.words, scores, strict=False):
        token = escape(visible(_cut(word))) if word else "▫"
        shade = _shade(score, scale)
        style = f' class="{shade}"' if shade else ""
        parts.append(f'{_gap(gap)}<span{style} title="{_figure(score)}">{token}</span>')
    rest = units.gaps[len(scores)] if len(scores) == len(units.words) else "…"
    return "".join(parts) + _gap(rest)


def _gap(text: str) -> str:
    """What no token covers; if that is more than white space, in a fainter colour."""
    shown = escape(visible(_cut(text)))
    return f"<i>{shown}</i>" if shown.strip() else shown


def _table(
    explanation: Explanation,
    probabilities: np.ndarray,
    names: Sequence[str],
    classes: Sequence[int],
    place: int,
) -> str:
    """Class, probability and logit, and that the logit is the sum of the evidence."""
    sums = explanation.evidence.astype(np.float64).sum(axis=0)  # (K,)
    rows = []
    for i, k in enumerate(classes):
        pressed = "true" if i == place else "false"
        difference = abs(sums[k] - explanation.logits[k])
        rows.append(
            f'<tr><th scope="row"><button type="button" disabled aria-pressed="{pressed}">'
            f"<bdi>{_name(names, k)}</bdi></button></th>"
            f'<td><svg class="bar" aria-hidden="true"><rect width="{probabilities[k]:.2%}" '
            f'height="100%"/></svg><span class="share">{_percent(probabilities[k])}</span></td>'
            f"<td>{_figure(sums[k])}</td><td>{_figure(explanation.logits[k])}</td>"
            f"<td>{f'{difference:.0e}' if difference else '0'}</td></tr>"
        )
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">class</th>'
        f'<th scope="col">probability</th><th scope="col">sum of evidence</th>'
        f'<th scope="col">logit</th><th scope="col">difference</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _about_class(
    units: Units,
    explanation: Explanation,
    names: Sequence[str],
    label: int,
    scale: float,
    place: int,
    *,
    shown: bool,
) -> str:
    """How the shaded evidence adds up for one class, and the phrases that count most."""
    evidence = units.evidence[:, label]
    good, bad = evidence[evidence > 0].sum(), evidence[evidence < 0].sum()
    logits = explanation.logits.astype(np.float64)
    found = phrases(units, label, scale)
    return (
        f'<div data-class="{place}"{"" if shown else " hidden"}>'
        f'<div class="phrases">{_list("For", found, 1, names[label], scale)}'
        f"{_list('Against', found, -1, names[label], scale)}</div>"
        f'<p class="dim">All tokens for <bdi>{_name(names, label)}</bdi> {_figure(good)}, '
        f"against it {_figure(bad)}: together {_figure(good + bad)}, which is its logit "
        f"{_figure(logits[label])} less the mean of the logits {_figure(logits.mean())}.</p></div>"
    )


def _list(
    title: str, found: Sequence[tuple[str, float, int]], sign: int, name: str, scale: float
) -> str:
    items = []
    for text, value, count in [p for p in found if p[1] * sign > 0][:MAX_PHRASES]:
        words = visible(_cut(" ".join(text.split()), PHRASE_CHARACTERS))
        times = f" <small>&times;{count}</small>" if count > 1 else ""
        items.append(
            f'<li><span><bdi class="{_shade(value, scale)}">{escape(words) or "▫"}</bdi>{times}'
            f"</span><span>{_figure(value)}</span></li>"
        )
    listed = f"<ol>{''.join(items)}</ol>" if items else '<p class="dim">no phrase</p>'
    return f"<div><h3>{title} <bdi>{escape(name)}</bdi></h3>{listed}</div>"
