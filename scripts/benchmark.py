"""Measure how fast models answer, and how near that is to what the machine can do.

Throughput end to end and by stage, latency, first answer of a process, memory, bytes, training; the
machine's own peak, and fastText, TF-IDF + SVM and MiniLM-L6 beside it, in interleaved rounds; and
how cost grows with length, number of texts, classes and vocabulary. Leaves benchmark.md and
benchmark.json in the output folder.
"""

from typing import Any

from nin_text import cli
from nin_text.options import BenchmarkOptions

EXAMPLES = """\
  python scripts/benchmark.py --quick              # about two minutes on built-in reviews
  python scripts/benchmark.py --dataset imdb
  python scripts/benchmark.py --dataset my.csv --model runs/my.csv-nin-text-base-seed0
"""


def work(options: BenchmarkOptions) -> dict[str, Any]:
    from nin_text.speed import benchmark

    return benchmark(options)


if __name__ == "__main__":
    cli.main(BenchmarkOptions, __doc__, EXAMPLES, work)
