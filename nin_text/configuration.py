"""Configuration of the text models and the presets; also of the networks they are compared with.

Importing this module registers both with transformers' AutoConfig; no torch is needed.
There is no `from __future__ import annotations` here: `strict` reads the types of the fields, and a
Literal that has become a string would not be checked.
"""

from dataclasses import field
from typing import Any, Final, Literal, Self

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

# The problem type of models each of whose classes is an answer of its own.
MULTI_LABEL: Final = "multi_label_classification"

# Bounds that no trained model reaches. A configuration may come from a stranger.
MAX_LAYERS = 1000  # convolutions, spatial and 1x1, of the whole network
MAX_REACH = 2**14  # tokens to either side that a layer sees; texts are kept that far apart
MAX_NGRAM = 32

# What the presets of our own have in common. Stride 1, so that there is evidence for each token.
_RESIDUAL: dict[str, Any] = {
    "residual": True,
    "norm": True,
    "pooling": "attention",
    "hidden_act": "gelu",
    "embedding_dropout": 0.3,
    "hidden_dropout": 0.3,
    "word_dropout": 0.1,
}

PRESETS: dict[str, dict[str, Any]] = {
    # The paper's CIFAR-10 network carried to one dimension: ReLU everywhere, dropout and max
    # pooling between blocks, no norm, plain global average pooling.
    "nin-text-paper": {
        "embedding_size": 128,
        "block_channels": [[192, 160, 96], [192, 192, 192], [192, 192, 192]],
        "kernel_sizes": [[5], [5], [3]],
        "pool": [True, True, False],
        "hidden_dropout": 0.5,
    },
    "nin-text-small": {
        **_RESIDUAL,
        "embedding_size": 128,
        "block_channels": [[128, 256, 128]],
        "kernel_sizes": [[3]],
    },
    "nin-text-base": {
        **_RESIDUAL,
        "embedding_size": 192,
        "block_channels": [[192, 384, 192]],
        "kernel_sizes": [[3]],
    },
}


@strict
class NiNTextConfig(PreTrainedConfig):
    """Configuration of the text models.

    Lists have one entry for each block.

    Args:
        vocab_size: rows of the embedding table.
        embedding_size: E, width of the token embeddings.
        block_channels: output channels of each block's spatial convolution and of each 1x1
            convolution after it; `[[192, 384, 192]]` is one block with two 1x1 convolutions.
        kernel_sizes: widths of each block's spatial convolution. One width is a plain mlpconv;
            several are an inception block (parallel widths behind 1x1 reductions).
        dilations: distance between the taps of each block; 1 everywhere if empty.
        pool: whether max pooling (width 3, stride 2) follows each block; nowhere if empty.
        residual: add each block's input to its output; needs equal channels throughout.
        norm: layer normalization before each block and after the last.
        hidden_act: "relu", "gelu" or "silu".
        pooling: "mean" (global average pooling) or "attention" (a learned weight for each token).
        word_dropout: probability of hiding a whole token embedding while training.
        embedding_dropout, hidden_dropout: element dropout after the embeddings and each block.
        class_weights: factor on the loss of each class; one for each label, or None.
        label_smoothing: mass of the target spread over all classes (single-label only).
        ngram_size: tokens of the longest n-gram whose evidence is added to the network's (see
            `ngrams.py`); 0 for the network alone.
        ngram_buckets: rows of the hashed table of n-gram evidence.
        pad_token_id: embedding row that stays zero.
    """

    model_type = "nin_text"

    vocab_size: int = 30_000
    embedding_size: int = 192
    block_channels: list[list[int]] = field(default_factory=lambda: [[192, 384, 192]])
    kernel_sizes: list[list[int]] = field(default_factory=lambda: [[3]])
    dilations: list[int] = field(default_factory=list)
    pool: list[bool] = field(default_factory=list)
    residual: bool = False
    norm: bool = False
    hidden_act: Literal["relu", "gelu", "silu"] = "relu"
    pooling: Literal["mean", "attention"] = "mean"
    word_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    class_weights: list[float] | None = None
    label_smoothing: float | int = 0.0
    ngram_size: int = 0
    ngram_buckets: int = 2**20
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if not self.dilations:
            self.dilations = [1] * len(self.block_channels)
        if not self.pool:
            self.pool = [False] * len(self.block_channels)
        # Other libraries read the width of last_hidden_state under this name.
        kwargs.pop("hidden_size", None)
        if self.id2label and kwargs.get("num_labels") not in (None, len(self.id2label)):
            # A saved configuration read for other labels: the base class would warn of the names.
            self.id2label = self.label2id = None
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """C, the width of `last_hidden_state` and `pooler_output`."""
        return self.block_channels[-1][-1]

    def validate_architecture(self) -> None:
        """Refuse sizes that no network can have, before anything is allocated."""
        blocks = len(self.block_channels)
        if blocks == 0:
            raise ValueError("block_channels is empty; there must be at least one block")
        for name in ("kernel_sizes", "dilations", "pool"):
            entries = len(getattr(self, name))
            if entries != blocks:
                raise ValueError(f"{name} has {entries} entries for {blocks} blocks")
        sizes = [self.vocab_size, self.embedding_size, *self.dilations]
        for block in [*self.block_channels, *self.kernel_sizes]:
            if not block:
                raise ValueError("every block needs at least one channel count and kernel size")
            sizes += block
        if min(*sizes, self.ngram_buckets) < 1:
            raise ValueError(
                "vocabulary, channels, kernel sizes, dilations and buckets must be positive"
            )
        if not 0 <= self.ngram_size <= MAX_NGRAM:
            raise ValueError(
                f"ngram_size must not be negative, nor above {MAX_NGRAM}, as {self.ngram_size} is"
            )
        if sum(map(len, [*self.block_channels, *self.kernel_sizes])) > MAX_LAYERS:
            raise ValueError(f"there are more than {MAX_LAYERS} layers")
        reach = max(
            dilation * max(widths)
            for dilation, widths in zip(self.dilations, self.kernel_sizes, strict=True)
        )
        if reach * 2 ** sum(self.pool) > MAX_REACH:
            raise ValueError(f"a layer reaches farther than {MAX_REACH} tokens")
        _check_pad(self.pad_token_id, self.vocab_size)
        for name in ("word_dropout", "embedding_dropout", "hidden_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """The configuration of a preset, with any field overridden.

        Raises:
            ValueError: if there is no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset named {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


def _check_pad(pad_token_id: int | None, vocab_size: int) -> None:
    if pad_token_id is not None and not 0 <= pad_token_id < vocab_size:
        raise ValueError(f"pad_token_id is {pad_token_id}, of {vocab_size} tokens")


# Networks that NiN is compared with (see `networks.py`).
NETWORKS: dict[str, dict[str, Any]] = {
    "kim-cnn": {
        "architecture": "kim-cnn",
        "embedding_size": 300,
        "hidden_size": 100,
        "kernel_sizes": [3, 4, 5],
        "dropout": 0.5,
    },
    "dpcnn": {
        "architecture": "dpcnn",
        "embedding_size": 300,
        "hidden_size": 250,
        "num_layers": 4,
        "dropout": 0.5,
    },
    "bilstm": {
        "architecture": "bilstm",
        "embedding_size": 300,
        "hidden_size": 150,
        "num_layers": 1,
        "dropout": 0.5,
    },
    "transformer": {
        "architecture": "transformer",
        "embedding_size": 256,
        "hidden_size": 1024,
        "num_layers": 4,
        "num_heads": 4,
        "max_positions": 512,
        "dropout": 0.1,
    },
}


@strict
class BaselineConfig(PreTrainedConfig):
    """Configuration of the baselines.

    Args:
        architecture: a key of NETWORKS, and of `networks.ENCODERS`.
        vocab_size: rows of the embedding table.
        embedding_size: E, width of the token embeddings.
        hidden_size: H: filters of each width (kim-cnn), channels (dpcnn), units in each direction
            (bilstm) or width of the feed-forward layers (transformer).
        kernel_sizes: widths of the filters (kim-cnn).
        num_layers: blocks (dpcnn) or layers (bilstm, transformer).
        num_heads: attention heads of each layer (transformer).
        max_positions: tokens that a text is cut to (transformer).
        dropout: after the encoder and, in the transformer, within it.
        pad_token_id: embedding row that stays zero.
    """

    model_type = "nin-text-baseline"

    architecture: str = "kim-cnn"
    vocab_size: int = 30_000
    embedding_size: int = 300
    hidden_size: int = 100
    kernel_sizes: list[int] = field(default_factory=lambda: [3, 4, 5])
    num_layers: int = 1
    num_heads: int = 1
    max_positions: int = 512
    dropout: float | int = 0.5
    pad_token_id: int | None = 0

    def validate_architecture(self) -> None:
        """Refuse sizes that no network can have, before anything is allocated."""
        if self.architecture not in NETWORKS:
            raise ValueError(
                f"no architecture named {self.architecture!r}; there are {', '.join(NETWORKS)}"
            )
        if not self.kernel_sizes:
            raise ValueError("kernel_sizes is empty; there must be at least one")
        _check_pad(self.pad_token_id, self.vocab_size)
        if len(self.kernel_sizes) + self.num_layers > MAX_LAYERS:
            raise ValueError(f"there are more than {MAX_LAYERS} layers")
        sizes = (self.vocab_size, self.embedding_size, self.hidden_size, *self.kernel_sizes)
        if min(*sizes, self.num_layers, self.num_heads, self.max_positions) < 1:
            raise ValueError("vocabulary, sizes, layers, heads and positions must be positive")
        if self.architecture == "transformer" and self.embedding_size % self.num_heads:
            raise ValueError(
                f"{self.num_heads} heads cannot share embeddings of size {self.embedding_size}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")


AutoConfig.register(NiNTextConfig.model_type, NiNTextConfig, exist_ok=True)
AutoConfig.register(BaselineConfig.model_type, BaselineConfig, exist_ok=True)
