"""Train an image classifier, evaluate it, and leave everything about it in a run folder."""

from typing import Any

from nin_text import cli
from nin_text.image_data import load_image_dataset
from nin_text.image_options import ImageTrainOptions, with_image_recipe

EXAMPLES = """\
  python scripts/train_image.py                             # built-in digits, under a minute
  python scripts/train_image.py --dataset mnist --model nin-mnist --epochs 20
  python scripts/train_image.py --dataset fashion_mnist --explain html
  python scripts/train_image.py --dataset cifar10 --model nin-cifar10 --compile   # on a GPU
  python scripts/train_image.py --dataset photos/ --image-size 64
"""


def work(options: ImageTrainOptions) -> dict[str, Any]:
    # Before torch is imported, so that a mistake in the options or the data shows at once.
    with_image_recipe(options)
    dataset = load_image_dataset(options.dataset, **options.arguments())
    from nin_text.image_runs import train_image

    return train_image(options, dataset)


if __name__ == "__main__":
    cli.main(ImageTrainOptions, __doc__, EXAMPLES, work)
