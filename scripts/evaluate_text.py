"""Evaluate a saved text classifier on any split of a data set, or on a file."""

from typing import Any

from nin_text import cli
from nin_text.options import EvaluateOptions, add_options, parse_options

EXAMPLES = """\
  python scripts/evaluate_text.py --model runs/demo_reviews-nin-text-base-seed0
  python scripts/evaluate_text.py --model runs/imdb-nin-text-base-seed0 --dataset rotten_tomatoes
  python scripts/evaluate_text.py --model runs/my.csv-nin-text-base-seed0 --dataset new.csv
"""


def main() -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    add_options(parser, EvaluateOptions)
    options = parse_options(EvaluateOptions, parser.parse_args())
    cli.set_up_logging(quiet=options.quiet, verbose=options.verbose)

    def work() -> dict[str, Any]:
        from nin_text.inference import (
            evaluate_text,  # imports torch: seconds that --help must not take
        )

        return evaluate_text(options)

    cli.run(work)


if __name__ == "__main__":
    main()
