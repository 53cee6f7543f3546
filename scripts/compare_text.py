"""Compare classifiers on one data set: quality, cost and speed, on one page.

Every system gets the same splits; what is chosen is chosen on the validation split; each is tested
once, and timed in turn with the others. The folder that it leaves holds comparison.html,
comparison.md and comparison.json. The same command goes on with what is missing after it was
stopped.
"""

from typing import Any

from nin_text import cli
from nin_text.options import CompareOptions

EXAMPLES = """\
  python scripts/compare_text.py --quick                    # two minutes on built-in reviews
  python scripts/compare_text.py --dataset my.csv --models nin-text-base fasttext tfidf-svm
  python scripts/compare_text.py --dataset imdb --models runs/imdb-nin-text-base-seed0 nb-logreg
  python scripts/compare_text.py --dataset trec --models nin-text-base distilbert-base-uncased
"""


def work(options: CompareOptions) -> dict[str, Any]:
    from nin_text.comparison import compare_text

    return compare_text(options)


if __name__ == "__main__":
    cli.main(CompareOptions, __doc__, EXAMPLES, work)
