"""How far bfloat16 and int8 are from float32, on real test splits, for the ready-made models.

  NIN_TEXT_DATA=... python -m tests.agreement [--limit N]

The last line is JSON: for each model and number type the accuracy, the share of texts with another
answer than float32's, and the largest and mean difference of a probability.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nin_text import export, models
from nin_text.data import load_text_dataset
from nin_text.evaluation import predict_logits, softmax
from nin_text.options import model_folder, trained_max_length
from nin_text.tokenization import encode

DATA = {"imdb-sentiment": "imdb", "ag-news-topics": "ag_news"}


def compare(name: str, limit: int | None) -> dict[str, Any]:
    """One ready-made model on the test split of its data set."""
    model, tokenizer = models.load(name)
    part = load_text_dataset(DATA[name], limit=limit).splits["test"]
    length = trained_max_length(name)
    rows, truth = encode(tokenizer, part.texts, length), np.array(part.labels)
    with tempfile.TemporaryDirectory() as folder:
        export.write_onnx(model, Path(folder) / "a.onnx")  # type: ignore[arg-type]
        export.quantize(Path(folder) / "a.onnx", Path(folder) / "b.onnx")
        session = export.open_session(Path(folder) / "b.onnx")
    answers = {
        "float32": softmax(predict_logits(model, rows, pad_token_id=0)),
        "bfloat16": softmax(predict_logits(model, rows, pad_token_id=0, autocast=torch.bfloat16)),
        "int8": export.predict(session, rows, 0),
    }
    exact = answers["float32"]
    found: dict[str, Any] = {"texts": len(rows), "folder": Path(model_folder(name)).name}
    for kind, probabilities in answers.items():
        difference = np.abs(probabilities - exact)
        found[kind] = {
            "accuracy": float((probabilities.argmax(axis=1) == truth).mean()),
            "other_answers": float((probabilities.argmax(1) != exact.argmax(1)).mean()),
            "largest_difference": float(difference.max()),
            "mean_difference": float(difference.mean()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="texts of each test split (default: all)")
    options = parser.parse_args()
    print(json.dumps({name: compare(name, options.limit) for name in DATA}))


if __name__ == "__main__":
    main()
