"""Train a text classifier, evaluate it, and leave everything about it in a run folder."""

from typing import Any

from nin_text import cli
from nin_text.data import load_text_dataset
from nin_text.options import TrainOptions

EXAMPLES = """\
  python scripts/train_text.py                              # built-in reviews, under a minute
  python scripts/train_text.py --dataset demo_topics --model nin-text-small --seed 1
  python scripts/train_text.py --dataset imdb               # about half an hour on one core
  python scripts/train_text.py --dataset my.csv --text-column body --label-column topic
  python scripts/train_text.py --dataset trec --model distilbert-base-uncased
  python scripts/train_text.py --dataset sst2 --init-embeddings glove.6B.300d.txt
  python scripts/train_text.py --dataset sst2 --teacher runs/sst2-distilbert-base-uncased-seed0
  python scripts/train_text.py --dataset imdb --teacher runs/large-0 runs/large-1 runs/large-2
"""


def work(options: TrainOptions) -> dict[str, Any]:
    # Before torch is imported, so that a mistake in the data shows at once.
    dataset = load_text_dataset(options.dataset, **options.arguments())
    from nin_text.runs import train_text

    return train_text(options, dataset)


if __name__ == "__main__":
    cli.main(TrainOptions, __doc__, EXAMPLES, work)
