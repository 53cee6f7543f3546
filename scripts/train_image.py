"""Train an image classifier, evaluate it, and leave everything about it in a run folder."""

from typing import Any

from nin_text import cli
from nin_text.image_data import load_image_dataset
from nin_text.image_options import ImageTrainOptions, with_image_recipe
from nin_text.options import check

EXAMPLES = """\
  python scripts/train_image.py                             # built-in digits, under a minute
  python scripts/train_image.py --dataset mnist --model nin-mnist --epochs 20
  python scripts/train_image.py --dataset fashion_mnist --explain html
  python scripts/train_image.py --dataset cifar10 --model nin-cifar10 --compile   # on a GPU
  python scripts/train_image.py --dataset photos/ --image-size 64
"""


def main() -> None:
    options = cli.parse(ImageTrainOptions, __doc__, EXAMPLES)

    def work() -> dict[str, Any]:
        # A mistake in the options or the data shows at once, before torch is imported.
        check(options)
        with_image_recipe(options)
        dataset = load_image_dataset(options.dataset, **options.arguments())
        from nin_text.image_runs import train_image

        return train_image(options, dataset)

    cli.run(work)


if __name__ == "__main__":
    main()
