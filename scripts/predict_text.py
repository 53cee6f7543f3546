"""Classify texts: arguments, a file, or the lines of standard input; one JSON object for each."""

import io
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from nin_text import cli
from nin_text.options import PredictOptions, add_options, parse_options

EXAMPLES = """\
  python scripts/predict_text.py --model runs/demo_reviews-nin-text-base-seed0 "The plot is witty ."
  python scripts/predict_text.py --model runs/imdb-nin-text-base-seed0 --file reviews.csv
  head reviews.txt | python scripts/predict_text.py --model runs/imdb-nin-text-base-seed0 --explain
"""


def main() -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="text to classify")
    add_options(parser, PredictOptions)
    arguments = parser.parse_args()
    options = parse_options(PredictOptions, arguments)
    if arguments.texts and options.file:
        parser.error("give texts or --file, not both")
    cli.set_up_logging(quiet=options.quiet, verbose=options.verbose)

    def work() -> Iterator[dict[str, Any]]:
        from nin_text.inference import (
            predict_text,  # imports torch: seconds that --help must not take
        )

        texts: Iterable[str] | None = arguments.texts or None
        if texts is None and options.file is None:
            if sys.stdin.isatty():
                print("reading texts from the keyboard, one a line", file=sys.stderr)
            lines = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="replace")
            texts = (line.rstrip("\n") for line in lines)
        return predict_text(options, texts)

    cli.run(work)


if __name__ == "__main__":
    main()
