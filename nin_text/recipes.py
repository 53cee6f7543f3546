"""How each model learns each data set unless told otherwise: data, found on validation splits."""

from __future__ import annotations

from typing import Any

# The stages that only NiN goes through, and averaged weights, which are tuned to it.
_LABELS_ALONE: dict[str, Any] = {
    "ema_decay": 0.0,
    "ngrams": 0,
    "pretrain_epochs": 0,
    "self_training_epochs": 0,
}
_FROM_SCRATCH: dict[str, Any] = {
    **_LABELS_ALONE,
    "epochs": 6,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "tokenizer": "word",
}

# Values of the options of `TrainOptions` by those names.
DEFAULT_RECIPE: dict[str, Any] = {
    "epochs": 8,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "warmup": 0.06,
    "batch_size": 64,
    "batch_tokens": 16_384,
    "tokenizer": "wordpiece",
    "vocab_size": 30_000,
    "max_length": 0,
    "ema_decay": 0.99,
    "patience": 3,
    "label_smoothing": 0.0,
    "ngrams": 3,
    "ngram_smoothing": 0.5,
    "pretrain_epochs": 4,
    "pretrain_learning_rate": 2e-3,
    "mlm_probability": 0.0,
    "self_training_epochs": 2,
    "refit": False,
}

# What differs for a model, whatever it learns; "fine-tuning" is for all that are not named.
MODEL_RECIPES: dict[str, dict[str, Any]] = {
    "fine-tuning": {
        **_LABELS_ALONE,
        "epochs": 3,
        "learning_rate": 5e-5,
        "weight_decay": 0.01,
        "batch_size": 32,
        "max_length": 512,
        "patience": 2,
    },
    # Minutes on a GPU; on IMDB most of a day on one core.
    "nin-text-large": {
        "pretrain_epochs": 9,
        "mlm_probability": 0.15,
        "epochs": 3,
        "learning_rate": 4e-4,
        "batch_size": 128,
        "batch_tokens": 32_768,
    },
    "kim-cnn": _FROM_SCRATCH,
    "dpcnn": _FROM_SCRATCH,
    "bilstm": _FROM_SCRATCH,
    "transformer": {**_FROM_SCRATCH, "max_length": 512},
    "mlpconv-fc": _FROM_SCRATCH,
    "cnn-fc": _FROM_SCRATCH,
}

# What differs for NiN presets on a data set, unless the preset's own recipe says otherwise.
DATASET_RECIPES: dict[str, dict[str, Any]] = {
    "demo_reviews": {"epochs": 10},
    "demo_topics": {"epochs": 10},
    # Smoothing: on reviews of other films, see docs/experiments.md; validation shares the films.
    "imdb": {"pretrain_epochs": 2, "epochs": 2, "ngram_smoothing": 5.0},
    "ag_news": {"epochs": 4},
    "sst2": {
        "pretrain_epochs": 0,
        "epochs": 4,
        "patience": 0,
        "batch_size": 128,
        "dropout": 0.5,
    },
    "trec": {
        "tokenizer": "word",
        "ngrams": 2,
        "epochs": 20,
        "patience": 0,
        "dropout": 0.5,
        "refit": True,
    },
}
