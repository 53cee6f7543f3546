"""Answer texts of random sizes for a long time: memory must not grow, and answers must not drift.

  OMP_NUM_THREADS=1 python -m tests.soak --minutes 30

Batches of random numbers of texts of random lengths, with ever new words among them, go through a
ready-made model by `Predictor`. Every so often the same probes are answered, in one thread and in
eight at once, and must be equal to the first answers, bit for bit. The last line is JSON: minutes,
texts, and the slope of the resident memory after the first fifth of the time, in MiB an hour.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nin_text import Predictor, demo_data

PROBES, THREADS, EVERY = 32, 8, 5.0  # every so many seconds the probes are answered
NEW_WORDS = 0.02  # share of words that no text had before: what is remembered of words must end


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split(maxsplit=1)[0]) / 2**10


def soak(minutes: float, seed: int = 0) -> dict[str, float | int]:
    """See the top of this module.

    Raises:
        AssertionError: if an answer differs from the first.
    """
    answers = Predictor("imdb-sentiment").logits
    draw = random.Random(seed)
    words = " ".join(demo_data.generate("demo_reviews")["train"][0]).split()

    def word() -> str:
        if draw.random() < NEW_WORDS:
            return "".join(draw.choices("abcdefghijklmnopqrstuvwxyzäéñжя", k=draw.randint(3, 12)))
        return draw.choice(words)

    def some(count: int, longest: int) -> list[str]:
        return [" ".join(word() for _ in range(draw.randint(0, longest))) for _ in range(count)]

    probes = some(PROBES, 60)
    first = answers(probes)
    begun = time.monotonic()
    texts, checks, points = 0, 0, []
    while (elapsed := time.monotonic() - begun) < 60 * minutes:
        texts += len(answers(some(draw.randint(1, 64), draw.choice((5, 50, 500)))))
        if len(points) <= elapsed / EVERY:
            np.testing.assert_array_equal(answers(probes), first)
            with ThreadPoolExecutor(THREADS) as pool:
                for other in pool.map(answers, [probes] * THREADS):
                    np.testing.assert_array_equal(other, first)
            checks += 1 + THREADS
            points.append((elapsed, resident_mb()))
    seconds, memory = np.array([p for p in points if p[0] > 12 * minutes]).T
    slope = float(np.polyfit(seconds / 3600, memory, 1)[0]) if len(seconds) > 1 else 0.0
    return {
        "minutes": round(elapsed / 60, 1),
        "texts": texts,
        "checks": checks,
        "memory_mb": round(float(memory[-1]), 1),
        "memory_range_mb": round(float(memory.max() - memory.min()), 1),
        "memory_slope_mb_per_hour": round(slope, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    options = parser.parse_args()
    print(json.dumps(soak(options.minutes)))


if __name__ == "__main__":
    main()
