"""Train a text classifier, evaluate it, and leave everything about it in a run folder."""

from typing import Any

from nin_text import cli
from nin_text.data import load_text_dataset
from nin_text.options import TrainOptions, add_options, check, parse_options

EXAMPLES = """\
  python scripts/train_text.py                                   # built-in reviews, a minute
  python scripts/train_text.py --dataset imdb --seed 1
  python scripts/train_text.py --dataset my.csv --text-column body --label-column topic
  python scripts/train_text.py --dataset trec --model distilbert-base-uncased
"""


def main() -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    add_options(parser, TrainOptions)
    options = parse_options(TrainOptions, parser.parse_args())
    cli.set_up_logging(quiet=options.quiet, verbose=options.verbose)

    def work() -> dict[str, Any]:
        # A mistake in the options or the data shows at once, before torch is imported.
        check(options)
        dataset = load_text_dataset(options.dataset, **options.arguments())
        from nin_text.runs import train_text

        return train_text(options, dataset)

    cli.run(work)


if __name__ == "__main__":
    main()
