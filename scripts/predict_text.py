"""Classify texts: arguments, a file, or the lines of standard input; one JSON object for each."""

import io
import sys

from nin_text import cli
from nin_text.options import PredictOptions

EXAMPLES = """\
  python scripts/predict_text.py --model runs/demo_reviews-nin-text-base-seed0 "The plot is witty ."
  python scripts/predict_text.py --model runs/demo_reviews-nin-text-base-seed0 --explain \\
      "The plot was witty at first but dull in the end ."
  echo "The plot is dull ." | python scripts/predict_text.py \\
      --model runs/demo_reviews-nin-text-base-seed0
  python scripts/predict_text.py --model runs/imdb-nin-text-base-seed0 --file reviews.csv > out
  python scripts/predict_text.py --model runs/imdb-nin-text-base-seed0 --file 'reviews/*.csv.gz' \\
      --output answers.parquet --resume
"""


def work(options: PredictOptions) -> cli.Results:
    if options.output is not None:
        from nin_text.bulk import score_files

        return score_files(options)
    from nin_text.inference import predict_text

    lines = None
    if not options.texts and options.file is None:
        if sys.stdin.isatty():
            print("reading texts from the keyboard, one a line", file=sys.stderr)
        lines = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="replace")
    return predict_text(options, lines)


if __name__ == "__main__":
    cli.main(PredictOptions, __doc__, EXAMPLES, work)
