"""Export a trained NiN text classifier to ONNX: float32 and int8, checked against PyTorch."""

from typing import Any

from nin_text import cli
from nin_text.options import ExportOptions

EXAMPLES = """\
  python scripts/export_onnx.py --model runs/demo_reviews-nin-text-base-seed0
  python scripts/export_onnx.py --model runs/demo_reviews-nin-text-base-seed0 --no-int8 \\
      --output-dir exported
  python scripts/export_onnx.py --model runs/imdb-nin-text-base-seed0 --data-dir ~/data
  python scripts/export_onnx.py --model runs/my.csv-nin-text-base-seed0 --dataset labelled.csv
then, where torch need not be installed:
  python scripts/classify_onnx.py runs/demo_reviews-nin-text-base-seed0/onnx "The plot is witty ."
"""


def work(options: ExportOptions) -> dict[str, Any]:
    from nin_text.export import export_onnx

    return export_onnx(options)


if __name__ == "__main__":
    cli.main(ExportOptions, __doc__, EXAMPLES, work)
