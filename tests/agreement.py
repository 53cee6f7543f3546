"""How far every fast way of answering is from the definition in float32, on real test splits.

  NIN_TEXT_DATA=... python -m tests.agreement [--limit N]
  NIN_TEXT_DATA=... python -m tests.agreement imdb-sentiment:imdb runs/sst2-nin-text-base-seed0:sst2

Each argument is a model, a colon and the data set that it was trained on, text or images. The last
line is JSON: for each and each way the accuracy, the share of examples with another answer than the
definition's, and the largest and mean difference of a probability; and, if the first is a model of
texts, the largest difference of a logit between a text of a million tokens in slices and the same
text as a whole.
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
from transformers import AutoModelForImageClassification

from nin_text import Predictor, export, models, ngrams
from nin_text.data import load_text_dataset
from nin_text.evaluation import predict_logits, softmax
from nin_text.image_data import load_image_dataset
from nin_text.image_training import ImageTensors, predict_image_logits
from nin_text.options import trained_max_length
from nin_text.tokenization import encode

READY_MADE = ("imdb-sentiment:imdb", "ag-news-topics:ag_news")
LONG_TEXT = 1_000_000  # tokens


def compare(name: str, dataset: str, limit: int | None) -> dict[str, Any]:
    """One model on the test split of a data set."""
    if (Path(name) / "preprocessor_config.json").is_file():
        return compare_images(name, dataset, limit)
    model, tokenizer = models.load(name)
    part = load_text_dataset(dataset, limit=limit).splits["test"]
    rows = encode(tokenizer, part.texts, trained_max_length(name))
    with tempfile.TemporaryDirectory() as folder:
        padded = export.PaddedClassifier(model)  # type: ignore[arg-type]
        export.write_onnx(padded, Path(folder) / "a.onnx", export.OUTPUTS)
        export.quantize(Path(folder) / "a.onnx", Path(folder) / "b.onnx")
        session = export.open_session(Path(folder) / "b.onnx")
    autocast = predict_logits(model, rows, pad_token_id=0, autocast=torch.bfloat16)
    answers = {
        "definition, float32": softmax(predict_logits(model, rows, pad_token_id=0)),
        "definition, bfloat16": softmax(autocast),
        "Predictor, float32": Predictor(name, precision="fp32").predict_proba(part.texts),
        "Predictor, bfloat16": Predictor(name, precision="bf16").predict_proba(part.texts),
        "ONNX, int8": export.predict(session, rows, 0),
    }
    return differences(answers, np.array(part.labels))


def compare_images(name: str, dataset: str, limit: int | None) -> dict[str, Any]:
    """The same of a model of images, which has no other ways than these."""
    model = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True).eval()
    side = model.config.image_size
    part = load_image_dataset(dataset, limit=limit, image_size=side).splits["test"]
    tensors = ImageTensors(part, torch.device("cpu"))
    answers = {
        f"definition, {way}": softmax(predict_image_logits(model, tensors.images, autocast=dtype))
        for way, dtype in (("float32", None), ("bfloat16", torch.bfloat16))
    }
    return differences(answers, np.array(part.labels))


def differences(answers: dict[str, np.ndarray], truth: np.ndarray) -> dict[str, Any]:
    """What the probabilities (n, K) of each way have to do with the labels and with the first."""
    exact = next(iter(answers.values()))
    found: dict[str, Any] = {"examples": len(truth)}
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
    parser.add_argument("--limit", type=int, help="examples of each test split (default: all)")
    options = parser.parse_args()
    pairs = [pair.rpartition(":")[::2] for pair in options.pairs]
    found: dict[str, Any] = {name: compare(name, data, options.limit) for name, data in pairs}
    if "ONNX, int8" in found[pairs[0][0]]:
        found["long text"] = {"largest_relative_difference": long_text(*pairs[0])}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
