"""Two built-in corpora that need no download: `demo_reviews` and `demo_topics`.

Both are generated from small grammars with a fixed seed. They exist so that a fresh clone can
train, save and evaluate a classifier at once; they prove nothing about real text. Word order
decides the label: most constructions come in pairs that hold the same words and opposite labels
("dull at first but gripping later" / "gripping at first but dull later"), so a bag of words
cannot tell them apart. A frame (the wording around the slots) belongs to train or to test, never
to both, and no text occurs twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

POSITIVE = (
    "good great brilliant charming gripping funny clever moving elegant fresh honest lively "
    "superb tender vivid witty"
).split()
NEGATIVE = (
    "bad awful dull boring clumsy flat silly tedious lifeless messy shallow stale weak wooden "
    "hollow forgettable"
).split()
ASPECTS = (
    (
        "story plot acting script cast music ending dialogue camera work|pacing direction humour "
        "opening lead|villain|romance|finale"
    )
    .replace("|", " ")
    .split()
)
OPENINGS = (
    "We saw it on Friday .|My sister chose it .|I went in knowing nothing .|It runs two hours .|"
    "The room was half full .|This is a sequel .|I had read the book .|It was raining anyway ."
).split("|")

# Slots: {a} {b} aspects; {good} {bad} words of either kind; {x} {y} one of each, in the order that
# makes the label. Each construction has frames for training and frames for testing.


@dataclass(frozen=True)
class Construction:
    """One way to say something good or bad.

    Attributes:
        train, test: frames with slots {a}, {b} (aspects), {x} and {y}.
        same: true if {x} carries the label itself (its word agrees with the label), false if the
            construction turns it round. {y} is always of the opposite kind to {x}.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    same: bool


# Every word of a test frame also occurs in a training frame: what is new is how they are put
# together. tests/test_demo_data.py holds both grammars to this.
REVIEWS = (
    # Contrast: what follows "but" decides.
    Construction(
        train=(
            "the {a} was {y} at first but {x} in the end",
            "the {a} looks {y} but it is {x}",
            "at first I found the {a} {y} , but the {b} was {x}",
            "the {a} is {y} but the {b} is {x}",
        ),
        test=(
            "the {a} was {y} but the {b} was {x}",
            "I found the {a} {y} at first but it is {x} in the end",
        ),
        same=True,
    ),
    # Negation and its scope.
    Construction(
        train=(
            "the {a} is {x} , not {y}",
            "the {a} was {x} and never {y}",
            "I found the {a} {x} , it is not {y} at all",
            "not {y} , the {a} is {x}",
        ),
        test=(
            "the {a} was {x} , not {y}",
            "never {y} , the {a} is {x}",
        ),
        same=True,
    ),
    Construction(
        train=(
            "the {a} is not {x} at all",
            "I never found the {a} {x}",
            "nobody would call the {a} {x}",
            "the {a} was never {x} , and the {b} was not {x}",
        ),
        test=(
            "the {a} was not {x} at all",
            "nobody would call the {b} {x} , and the {a} was never {x}",
        ),
        same=False,
    ),
    # Comparison: the side that the film is on decides.
    Construction(
        train=(
            "I expected something {y} and got something {x}",
            "the {a} is more {x} than {y}",
            "the trailer is {y} ; the film itself is {x}",
            "it is {x} where the book was {y}",
        ),
        test=(
            "I expected something {y} and the film is {x}",
            "the book was {y} ; the film is {x}",
            "the film is more {x} than {y}",
        ),
        same=True,
    ),
    # Hedged praise and hedged blame.
    Construction(
        train=(
            "I wanted it to be {x} and it is {y}",
            "they say the {a} is {x} ; to me it was {y}",
            "it could have been {x} , yet the {a} is {y}",
            "for all the talk of {x} , the {a} stays {y}",
        ),
        test=(
            "they say it could have been {x} ; the {a} is {y}",
            "I wanted the {a} to be {x} , yet it was {y}",
        ),
        same=False,
    ),
    # Plain statements: the words alone tell.
    Construction(
        train=(
            "the {a} is {x}",
            "I found the {a} {x} , and the {b} as well",
            "what a {x} {a}",
        ),
        test=("the {a} was {x} , and the {b} as well",),
        same=True,
    ),
)

TOPICS = {
    "sports": (
        "team match coach striker referee season final goalkeeper stadium league sprint medal"
    ).split(),
    "business": (
        "company market shares bank profit merger investor price contract budget revenue trade"
    ).split(),
    "science": (
        "laboratory telescope virus planet experiment genome particle climate sensor fossil "
        "molecule orbit"
    ).split(),
    "politics": (
        "minister parliament election senate vote treaty party campaign governor reform embassy "
        "coalition"
    ).split(),
}
# {x} is a word of the topic that the text is about, {y} one of another topic that is only named.
TOPIC_FRAMES = {
    "train": (
        "this is not about the {y} but about the {x}",
        "leave the {y} aside : the {x} is what we report on",
        "after the news of the {y} we turn to the {x}",
        "the {x} , and not the {y} , is our subject today",
        "our subject is the {x} rather than the {y}",
        "instead of the {y} we report on the {x}",
        "the {x} made the news today , unlike the {y}",
        "the {x} and the {x2} made the news",
    ),
    "test": (
        "our subject today is not the {y} but the {x}",
        "this is about the {x} rather than the {y}",
        "leave the {y} aside : we report on the {x}",
        "the {x} , and not the {y} , made the news today",
        "after the {y} we turn to the {x} and the {x2}",
    ),
}

LABELS = {"demo_reviews": ["negative", "positive"], "demo_topics": sorted(TOPICS)}
SIZES = {"train": 4000, "validation": 500, "test": 1000}


def _review(rng: random.Random, part: str) -> tuple[str, int]:
    label = rng.randrange(2)
    construction = rng.choices(REVIEWS, weights=(3, 3, 2, 3, 3, 2))[0]
    frames = construction.test if part == "test" else construction.train
    words = (POSITIVE, NEGATIVE) if (label == 1) == construction.same else (NEGATIVE, POSITIVE)
    aspects = rng.sample(ASPECTS, 2)
    sentence = rng.choice(frames).format(
        a=aspects[0], b=aspects[1], x=rng.choice(words[0]), y=rng.choice(words[1])
    )
    text = sentence[0].upper() + sentence[1:] + " ."
    if rng.random() < 0.5:
        text = f"{rng.choice(OPENINGS)} {text}"
    return text, label


def _topic(rng: random.Random, part: str) -> tuple[str, int]:
    names = LABELS["demo_topics"]
    label, other = rng.sample(range(len(names)), 2)
    x, x2 = rng.sample(TOPICS[names[label]], 2)
    frames = TOPIC_FRAMES["test" if part == "test" else "train"]
    sentence = rng.choice(frames).format(x=x, x2=x2, y=rng.choice(TOPICS[names[other]]))
    return sentence[0].upper() + sentence[1:] + " .", label


GENERATORS: dict[str, Callable[[random.Random, str], tuple[str, int]]] = {
    "demo_reviews": _review,
    "demo_topics": _topic,
}


def generate(name: str, seed: int = 0) -> dict[str, tuple[list[str], list[int]]]:
    """Texts and labels of each split of a built-in corpus.

    Args:
        name: "demo_reviews" or "demo_topics".
        seed: another seed gives another sample of the same grammar.

    Returns:
        {"train" | "validation" | "test": (texts, label indices)}, no text in two places.
    """
    rng = random.Random(f"{name} {seed}")
    seen: set[str] = set()
    splits = {}
    for part, size in SIZES.items():
        texts: list[str] = []
        labels: list[int] = []
        while len(texts) < size:
            text, label = GENERATORS[name](rng, part)
            if text not in seen:
                seen.add(text)
                texts.append(text)
                labels.append(label)
        splits[part] = (texts, labels)
    return splits
