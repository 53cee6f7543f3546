"""Evaluate a saved text classifier on any split of a data set, or on a file."""

from typing import Any

from nin_text import cli
from nin_text.options import EvaluateOptions

EXAMPLES = """\
  python scripts/evaluate_text.py --model runs/demo_reviews-nin-text-base-seed0  # its test split
  python scripts/evaluate_text.py --model runs/demo_reviews-nin-text-base-seed0 --split validation
  python scripts/evaluate_text.py --model runs/imdb-nin-text-base-seed0 --dataset rotten_tomatoes
  python scripts/evaluate_text.py --model runs/my.csv-nin-text-base-seed0 --dataset new.csv
"""


def work(options: EvaluateOptions) -> dict[str, Any]:
    from nin_text.inference import evaluate_text

    return evaluate_text(options)


if __name__ == "__main__":
    cli.main(EvaluateOptions, __doc__, EXAMPLES, work)
