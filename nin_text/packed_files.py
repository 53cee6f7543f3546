"""The files of a saved NiN of one block, read without transformers, whose import takes seconds.

Read here is only what is exactly as `save_pretrained` leaves it: every field of the configuration
that is expected and no other, tensors of the names and shapes that these fields describe, a
tokenizer that knows no more tokens than the model. What is otherwise, harmless or not, is left to
`models.load`, which knows more kinds of models and says what is wrong with a damaged one. A
stranger's folder can therefore do no more here than there, and nothing is allocated that its
weights do not hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from nin_text.errors import UserError, in_one_line
from nin_text.options import (
    CONFIG_FILE,
    MAX_JSON_BYTES,
    MAX_NGRAM,
    MAX_REACH,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
)
from nin_text.packed import FoldedBlock
from nin_text.products import ACTIVATIONS

DTYPES = ("F32", "F16", "BF16", "F8_E4M3")  # of weights, as safetensors names them
# Files beside tokenizer.json that could change what it does. This package saves none of them.
TOKENIZER_EXTRAS = ("added_tokens.json", "special_tokens_map.json", "vocab.txt", "vocab.json")


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _is_list(value: Any, of: Callable[[Any], bool], length: int = 0) -> bool:
    return (
        type(value) is list
        and (len(value) == length if length else len(value) > 0)
        and all(map(of, value))
    )


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_names(value: Any) -> bool:
    """Whether these are the names of classes: "0" to "K - 1", each with a name of its own."""
    return (
        type(value) is dict
        and list(value) == [str(i) for i in range(len(value))]
        and all(type(name) is str for name in value.values())
        and len(value) == len(set(value.values())) >= 1
    )


# What each field of the configuration of a model that is read here may be. Those that only
# training uses are looked at as well, so that the same models are refused here and elsewhere.
FIELDS: dict[str, Callable[[Any], bool]] = {
    "architectures": lambda value: value == ["NiNTextForSequenceClassification"],
    "block_channels": lambda value: _is_list(value, lambda block: _is_list(block, _is_size), 1),
    "class_weights": lambda value: (
        value is None or _is_list(value, lambda x: type(x) in (int, float))
    ),
    "dilations": lambda value: _is_list(value, _is_size, 1),
    "dtype": lambda value: value in ("float32", "float16", "bfloat16"),
    "embedding_dropout": _is_share,
    "embedding_size": _is_size,
    "hidden_act": lambda value: type(value) is str and value in ACTIVATIONS,
    "hidden_dropout": _is_share,
    "id2label": _is_names,
    "kernel_sizes": lambda value: _is_list(value, lambda block: _is_list(block, _is_size, 1), 1),
    "label2id": lambda value: type(value) is dict,
    "label_smoothing": _is_share,
    "model_type": lambda value: value == "nin_text",
    "ngram_buckets": _is_size,
    "ngram_size": lambda value: type(value) is int and 0 <= value <= MAX_NGRAM,
    "norm": _is_flag,
    "pad_token_id": lambda value: type(value) is int and value >= 0,
    "pool": lambda value: _is_list(value, _is_flag, 1),
    "pooling": lambda value: value in ("mean", "attention"),
    "residual": _is_flag,
    "transformers_version": lambda value: type(value) is str,
    "vocab_size": _is_size,
    "word_dropout": _is_share,
}
OPTIONAL_FIELDS: dict[str, Callable[[Any], bool]] = {
    "ngram_smoothing": lambda value: type(value) in (int, float) and 0 < value < math.inf,
    "problem_type": lambda value: value == "single_label_classification",
    "use_cache": _is_flag,  # which the Trainer leaves
}


def read_packed(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Configuration and float32 weights of a model that `FoldedBlock` supports.

    Args:
        folder: holds config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    Returns:
        None if the folder holds anything else than what this module reads.
    """
    try:
        config = read_object(folder / CONFIG_FILE)
        if not _is_read_here(config) or not _belongs(folder, config):
            return None
        weights = _read_weights(folder / WEIGHTS_FILE, shapes(config))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        return None
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        return None
    return config, weights


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder.

    Raises:
        UserError: if the file is missing, damaged, too large, or holds something else.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} is too large for what it should be")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({in_one_line(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return value


def _is_read_here(config: dict[str, Any]) -> bool:
    if not FIELDS.keys() <= config.keys():
        return False
    fields = FIELDS | OPTIONAL_FIELDS
    if not all(name in fields and fields[name](value) for name, value in config.items()):
        return False
    weights, channels = config["class_weights"], config["block_channels"][0]
    return (
        FoldedBlock.supports(config)
        and config["label2id"] == {name: int(i) for i, name in config["id2label"].items()}
        and (weights is None or len(weights) == len(config["id2label"]))
        and config["dilations"][0] * config["kernel_sizes"][0][0] <= MAX_REACH
        and config["pad_token_id"] < config["vocab_size"]
        and (not config["residual"] or {config["embedding_size"], channels[-1]} == {channels[0]})
    )


def shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of all tensors of the model that a configuration describes."""
    embedding, channels = config["embedding_size"], config["block_channels"][0]
    classes = len(config["id2label"])
    found = {
        "nin.embeddings.weight": [config["vocab_size"], embedding],
        "nin.blocks.0.spatial.convs.0.weight": [
            channels[0],
            embedding,
            config["kernel_sizes"][0][0],
        ],
        "nin.blocks.0.spatial.convs.0.bias": [channels[0]],
        "classifier.weight": [classes, channels[-1]],
        "classifier.bias": [classes],
    }
    for i, (before, after) in enumerate(pairwise(channels)):
        found[f"nin.blocks.0.pointwise.{i}.weight"] = [after, before]
        found[f"nin.blocks.0.pointwise.{i}.bias"] = [after]
    if config["norm"]:
        for name, size in (("blocks.0.norm", embedding), ("final_norm", channels[-1])):
            found |= {f"nin.{name}.weight": [size], f"nin.{name}.bias": [size]}
    if config["pooling"] == "attention":
        found["nin.attention.weight"] = [1, channels[-1]]
    if config["ngram_size"]:
        found["ngrams.weight"] = [config["ngram_buckets"], classes]
        found["ngrams.bias"] = [classes]
    return found


def _read_weights(path: Path, expected: dict[str, list[int]]) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        names = file.keys()
        if set(names) != set(expected):
            raise ValueError(f"{path} holds other tensors")
        for name in names:
            part = file.get_slice(name)
            if list(part.get_shape()) != expected[name] or part.get_dtype() not in DTYPES:
                raise ValueError(f"{name} of {path} has another shape or type")
        return {name: file.get_tensor(name).float() for name in names}


def _belongs(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the tokenizer is as this package saves it, and knows no more than the model."""
    settings = read_object(folder / TOKENIZER_CONFIG_FILE)
    if settings.get("tokenizer_class") != "TokenizersBackend":
        return False
    if "auto_map" in settings or any((folder / name).exists() for name in TOKENIZER_EXTRAS):
        return False
    limit = settings.get("model_max_length")
    if not isinstance(limit, int | float) or not limit >= 1:
        return False
    try:
        vocabulary = Tokenizer.from_file(str(folder / TOKENIZER_FILE)).get_vocab()
    except Exception:  # of no class of its own
        return False
    special = [settings.get(f"{name}_token") for name in ("pad", "unk", "mask")]
    return (
        max(vocabulary.values(), default=0) < config["vocab_size"]
        and all(type(token) is str and token in vocabulary for token in special)
        and vocabulary[settings["pad_token"]] == config["pad_token_id"]
    )
