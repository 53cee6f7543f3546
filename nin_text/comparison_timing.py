"""How fast a system answers: whole texts in, probabilities out, tokenization counted.

A system is measured (`measure_cost`); in another process it is made ready (`warm_up`) and then
timed once in every round (`time_round`). In a comparison the rounds of all systems are interleaved,
so that whatever else the machine does hits them alike. `summarize` takes the medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nin_text.baselines import count_tokens
from nin_text.splits import SPLIT_SEED
from nin_text.systems import BATCH_TOKENS, System

SINGLES = 50  # texts answered one by one in each round
BULK_TOKENS = 32_768  # the whole sample: at least so many tokens,
BULK_TEXTS = (128, 4096)  # within these numbers of texts
LEAST_SECONDS = 0.3  # fast systems go over the sample again until a measurement lasts this long
COST_TEXTS = 32  # texts whose multiply-accumulates are counted
BATCHES = ("1", "32", "best")
LEFT_OUT = [
    "loading the model and its first answers (warm-up)",
    "reading texts from disk and writing answers: texts are strings in memory, answers an array",
    "training and tuning (given on their own)",
]


@dataclass
class Sample:
    """Texts to answer, the same for every system, in random order."""

    texts: list[str]
    tokens: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str]) -> Sample:
        """A sample of the test texts, drawn with a fixed seed."""
        order = np.random.default_rng(SPLIT_SEED).permutation(len(texts))[: BULK_TEXTS[1]]
        tokens = count_tokens([texts[i] for i in order])
        enough = int(np.searchsorted(tokens.cumsum(), BULK_TOKENS)) + 1
        kept = min(max(enough, BULK_TEXTS[0]), len(order))
        return cls([texts[i] for i in order[:kept]], tokens[:kept])


def measure_cost(system: System, sample: Sample) -> dict[str, Any]:
    """Parameters, operations, and the batch size that answers the sample fastest.

    Returns:
        `parameters`, `macs_per_token`, and for a network that pads `batch_tokens`.
    """
    first = sample.texts[:COST_TEXTS]
    cost = system.cost(first)
    measured: dict[str, Any] = {
        "parameters": int(cost["parameters"]),
        "macs_per_token": cost["macs"] / int(sample.tokens[:COST_TEXTS].sum()),
    }
    if getattr(system, "batch_tokens", None) is not None:
        measured["batch_tokens"] = _fastest_batch(system, sample)
    return measured


def _fastest_batch(system: Any, sample: Sample) -> int:
    seconds: dict[int, float] = {}
    for size in BATCH_TOKENS:
        system.batch_tokens = size
        clock = time.perf_counter()
        try:
            system.probabilities(sample.texts)
        except RuntimeError:  # too little memory for batches of this size
            if not seconds:
                raise
            break
        seconds[size] = time.perf_counter() - clock
        if seconds[size] > min(seconds.values()):
            break  # larger ones are slower still
    return min(seconds, key=seconds.__getitem__)


def warm_up(system: System, sample: Sample) -> None:
    """The first answers, which are slow and not to be timed."""
    system.probabilities(sample.texts[:1])
    system.probabilities(sample.texts)


def time_round(system: System, sample: Sample) -> dict[str, Any]:
    """One round: texts one by one, in batches of 32, and all at once.

    Returns:
        For each of BATCHES the tokens per second, and `latencies`, seconds of each single text.
    """
    latencies = []
    for text in sample.texts[:SINGLES]:
        clock = time.perf_counter()
        system.probabilities([text])
        latencies.append(time.perf_counter() - clock)
    rates = {"1": int(sample.tokens[:SINGLES].sum()) / sum(latencies)}
    for batch, size in (("32", 32), ("best", len(sample.texts))):
        seconds, passes = 0.0, 0
        while seconds < LEAST_SECONDS:
            clock = time.perf_counter()
            for start in range(0, len(sample.texts), size):
                system.probabilities(sample.texts[start : start + size])
            seconds += time.perf_counter() - clock
            passes += 1
        rates[batch] = passes * int(sample.tokens.sum()) / seconds
    return {"tokens_per_second": rates, "latencies": latencies}


def summarize(rounds: Sequence[dict[str, Any]], sample: Sample) -> dict[str, Any]:
    """Medians over rounds; texts per second are those of texts as long as the sample's mean."""
    mean = float(sample.tokens.mean())
    summary: dict[str, Any] = {}
    for batch in BATCHES:
        rates = [entry["tokens_per_second"][batch] for entry in rounds]
        middle = statistics.median(rates)
        summary[batch] = {
            "tokens_per_second": middle,
            "documents_per_second": middle / mean,
            "documents_per_second_range": [min(rates) / mean, max(rates) / mean],
        }
    latencies = np.concatenate([entry["latencies"] for entry in rounds]) * 1000
    return summary | {
        "latency_p50_ms": float(np.quantile(latencies, 0.5)),
        "latency_p99_ms": float(np.quantile(latencies, 0.99)),
        "latency_n": len(latencies),
    }
