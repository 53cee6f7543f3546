"""Make the fixture of the version that is installed: a model of a few kilobytes and its answers.

  python tests/make_fixture.py

Run once when a version is released. `test_untrusted_models.py` and `test_compatibility.py` load
what it left for every version that there has been.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import nin_text
from nin_text import NiNTextConfig, NiNTextForSequenceClassification, demo_data
from nin_text.evaluation import predict_logits
from nin_text.tokenization import encode, train_tokenizer

TEXTS = ["The plot is witty .", "dull, dull!", "", "Überraschung 🎬 x", "not bad at all " * 9]


def main() -> None:
    folder = Path(__file__).parent / "fixtures" / f"v{nin_text.__version__}"
    tokenizer = train_tokenizer(demo_data.generate("demo_reviews")["train"][0], vocab_size=120)
    torch.manual_seed(0)
    config = NiNTextConfig(
        vocab_size=len(tokenizer),
        embedding_size=8,
        block_channels=[[8, 16, 8], [8, 8]],
        kernel_sizes=[[3], [2, 3]],
        pool=[True, False],
        residual=True,
        norm=True,
        pooling="attention",
        ngram_size=2,
        ngram_buckets=64,
        id2label={0: "negative", 1: "positive", 2: "neither, nor"},
        label2id={"negative": 0, "positive": 1, "neither, nor": 2},
    )
    model = NiNTextForSequenceClassification(config).eval()
    assert model.ngrams is not None
    model.ngrams.weight.normal_()
    model.ngrams.bias.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logits = predict_logits(model, encode(tokenizer, TEXTS), pad_token_id=0)
    expected = {"texts": TEXTS, "logits": logits.tolist()}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
    print(folder, sum(path.stat().st_size for path in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
