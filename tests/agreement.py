"""How far every fast way of answering is from the definition in float32, on real test splits.

  NIN_TEXT_DATA=... python -m tests.agreement [--limit N]
  NIN_TEXT_DATA=... python -m tests.agreement imdb-sentiment:imdb runs/sst2-nin-text-base-seed0:sst2

Each argument is a model, a colon and the data set that it was trained on. The last line is JSON:
for each and each way the accuracy, the share of texts with another answer than the definition's,
and the largest and mean difference of a probability; and for the first model the largest
difference of a logit between a text of a million tokens in slices and the same text as a whole.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nin_text import Predictor, export, models, ngrams
from nin_text.data import load_text_dataset
from nin_text.evaluation import predict_logits, softmax
from nin_text.options import trained_max_length
from nin_text.tokenization import encode

READY_MADE = ("imdb-sentiment:imdb", "ag-news-topics:ag_news")
LONG_TEXT = 1_000_000  # tokens


def compare(name: str, dataset: str, limit: int | None) -> dict[str, Any]:
    """One model on the test split of a data set."""
    model, tokenizer = models.load(name)
    part = load_text_dataset(dataset, limit=limit).splits["test"]
    rows, truth = encode(tokenizer, part.texts, trained_max_length(name)), np.array(part.labels)
    with tempfile.TemporaryDirectory() as folder:
        padded = export.PaddedClassifier(model)  # type: ignore[arg-type]
        export.write_onnx(padded, Path(folder) / "a.onnx", export.OUTPUTS)
        export.quantize(Path(folder) / "a.onnx", Path(folder) / "b.onnx")
        session = export.open_session(Path(folder) / "b.onnx")
    exact = softmax(predict_logits(model, rows, pad_token_id=0))
    autocast = predict_logits(model, rows, pad_token_id=0, autocast=torch.bfloat16)
    answers = {
        "definition, float32": exact,
        "definition, bfloat16": softmax(autocast),
        "Predictor, float32": Predictor(name, precision="fp32").predict_proba(part.texts),
        "Predictor, bfloat16": Predictor(name, precision="bf16").predict_proba(part.texts),
        "ONNX, int8": export.predict(session, rows, 0),
    }
    found: dict[str, Any] = {"texts": len(rows)}
    for way, probabilities in answers.items():
        difference = np.abs(probabilities - exact)
        found[way] = {
            "accuracy": float((probabilities.argmax(axis=1) == truth).mean()),
            "other_answers": float((probabilities.argmax(1) != exact.argmax(1)).mean()),
            "largest_difference": float(difference.max()),
            "mean_difference": float(difference.mean()),
        }
    return found


def long_text(name: str, dataset: str) -> float:
    """Largest difference of a logit that slices make to a text of a million tokens."""
    predictor = Predictor(name, precision="fp32")
    ids, _ = predictor.tokenizer.encode(load_text_dataset(dataset).splits["test"].texts)
    ids = np.resize(ids, LONG_TEXT)
    sliced = predictor.classifier.logits(ids, np.array([LONG_TEXT]))
    predictor.classifier.slice_rows = 2 * LONG_TEXT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "CHUNK_TOKENS", 2 * LONG_TEXT)
        whole = predictor.classifier.logits(ids, np.array([LONG_TEXT]))
    return float(np.abs(sliced - whole).max() / np.abs(whole).max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="*", default=READY_MADE, metavar="MODEL:DATASET")
    parser.add_argument("--limit", type=int, help="texts of each test split (default: all)")
    options = parser.parse_args()
    pairs = [pair.rpartition(":")[::2] for pair in options.pairs]
    found: dict[str, Any] = {name: compare(name, data, options.limit) for name, data in pairs}
    found["long text"] = {"largest_relative_difference": long_text(*pairs[0])}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
