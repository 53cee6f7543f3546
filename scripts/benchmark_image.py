"""Measure how fast the image networks are, beside a residual network of as many parameters."""

from typing import Any

from nin_text import cli
from nin_text.image_options import ImageBenchmarkOptions, check_networks

EXAMPLES = """\
  python scripts/benchmark_image.py
  python scripts/benchmark_image.py --models nin-mnist --image-size 28 --rounds 3
  python scripts/benchmark_image.py --device cuda --compile --batch-size 1024
"""


def work(options: ImageBenchmarkOptions) -> dict[str, Any]:
    check_networks(options.models)
    from nin_text.image_speed import benchmark_images

    return benchmark_images(options)


if __name__ == "__main__":
    cli.main(ImageBenchmarkOptions, __doc__, EXAMPLES, work)
