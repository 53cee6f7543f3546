"""Configurations and presets: text models, what they are compared with, image models.

Importing this module registers them with transformers' AutoConfig; no torch is needed.
There is no `from __future__ import annotations` here: `strict` reads the types of the fields, and a
Literal that has become a string would not be checked.
"""

import math
from dataclasses import field, fields
from typing import Any, Final, Literal, Self

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from nin_text.options import MAX_LAYERS, MAX_NGRAM, MAX_REACH

# The problem type of models each of whose classes is an answer of its own.
MULTI_LABEL: Final = "multi_label_classification"
# Values of an image that can be whitened: the matrix then takes 600 MB.
MAX_WHITENED: Final = 3 * 64**2

Activation = Literal["relu", "gelu", "silu", "hardswish"]

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
        # No worse and cheaper than those of `nin-text-base` (docs/experiments.md).
        "hidden_act": "hardswish",
        "hidden_dropout": 0.0,
        "word_dropout": 0.0,
    },
    "nin-text-base": {
        **_RESIDUAL,
        "embedding_size": 192,
        "block_channels": [[192, 384, 192]],
        "kernel_sizes": [[3]],
    },
    # Sees 30 tokens to either side. It is worth its cost after long pretraining only.
    "nin-text-large": {
        **_RESIDUAL,
        "embedding_size": 256,
        "block_channels": [[256, 512, 256]] * 8,
        "kernel_sizes": [[3]] * 8,
        "dilations": [1, 2, 4, 8, 1, 2, 4, 8],
        "embedding_dropout": 0.0,
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
        hidden_act: "relu", "gelu", "silu" or "hardswish".
        pooling: "mean" (global average pooling) or "attention" (a learned weight for each token).
        word_dropout: probability of hiding a whole token embedding while training.
        embedding_dropout, hidden_dropout: element dropout after the embeddings and each block.
        class_weights: factor on the loss of each class; one for each label, or None.
        label_smoothing: mass of the target spread over all classes (single-label only).
        ngram_size: tokens of the longest n-gram whose evidence is added to the network's (see
            `ngrams.py`); 0 for the network alone.
        ngram_buckets: rows of the hashed table of n-gram evidence.
        ngram_smoothing: added to every count when that table is fitted.
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
    hidden_act: Activation = "relu"
    pooling: Literal["mean", "attention"] = "mean"
    word_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    class_weights: list[float] | None = None
    label_smoothing: float | int = 0.0
    ngram_size: int = 0
    ngram_buckets: int = 2**20
    ngram_smoothing: float | int = 0.5
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
        _check_blocks(self, ("kernel_sizes", "dilations", "pool"))
        sizes = [self.vocab_size, self.embedding_size, *self.dilations]
        sizes += [size for block in (*self.block_channels, *self.kernel_sizes) for size in block]
        if min(*sizes, self.ngram_buckets) < 1:
            raise ValueError(
                "vocabulary, channels, kernel sizes, dilations and buckets must be positive"
            )
        if not 0 <= self.ngram_size <= MAX_NGRAM:
            raise ValueError(
                f"ngram_size must not be negative, nor above {MAX_NGRAM}, as {self.ngram_size} is"
            )
        if not 0 < self.ngram_smoothing < math.inf:
            raise ValueError(f"ngram_smoothing must be positive, not {self.ngram_smoothing}")
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
            ValueError: if there is no preset of that name, or no such field.
        """
        return _from_preset(cls, name, PRESETS, overrides)


# The author's networks (see `NiNImageConfig` for what the fields mean): ReLU after every layer, the
# class maps included, max pooling and dropout between the blocks.
_PAPER: dict[str, Any] = {
    "pool": ["max", "max", "none"],
    "hidden_dropout": 0.5,
    "rectified_logits": True,
    "initializer_std": 0.05,
}

IMAGE_PRESETS: dict[str, dict[str, Any]] = {
    "nin-cifar10": {
        **_PAPER,
        "block_channels": [[192, 160, 96], [192, 192, 192], [192, 192]],
        "kernel_sizes": [[5], [5], [3]],
        "normalization": "zca",
    },
    "nin-cifar100": {
        **_PAPER,
        "block_channels": [[192, 160, 96], [192, 192, 192], [192, 192]],
        "kernel_sizes": [[5], [5], [3]],
        "normalization": "zca",
    },
    "nin-svhn": {
        **_PAPER,
        "block_channels": [[128, 96, 64], [320, 256, 128], [384, 256]],
        "kernel_sizes": [[5], [5], [5]],
    },
    "nin-mnist": {
        **_PAPER,
        "block_channels": [[96, 64, 48], [128, 96, 48], [128, 96]],
        "kernel_sizes": [[5], [5], [5]],
        "image_size": 28,
        "num_channels": 1,
    },
    # The author's network for ImageNet, of AlexNet's layout; here its first layer is padded, too.
    "nin-imagenet": {
        **_PAPER,
        "block_channels": [[96, 96, 96], [256, 256, 256], [384, 384, 384], [1024, 1024]],
        "kernel_sizes": [[11], [5], [3], [3]],
        "strides": [4, 1, 1, 1],
        "pool": ["max", "max", "max", "none"],
        "image_size": 224,
    },
    # A single block, the smallest network that has all the parts.
    "nin-tutorial": {
        "block_channels": [[192, 64, 64]],
        "kernel_sizes": [[5]],
    },
    # Fewer than a million parameters, and what has been learned since: batch normalization,
    # residual connections, 3x3 convolutions.
    "nin-modern": {
        "block_channels": [
            [64, 64],
            [96, 192, 96],
            [96, 192, 96],
            [160, 320, 160],
            [160, 320, 160],
        ],
        "kernel_sizes": [[3], [3], [3], [3], [3]],
        "pool": ["max", "none", "max", "none", "none"],
        "residual": True,
        "norm": "batch",
    },
}


@strict
class NiNImageConfig(PreTrainedConfig):
    """Configuration of the image models.

    Lists have one entry for each block.

    Args:
        image_size: height and width of the images, in pixels.
        num_channels: 1 for grey images, 3 for RGB.
        block_channels: output channels of each block's spatial convolution and of each 1x1
            convolution after it. The 1x1 convolution to the class maps is not among them.
        kernel_sizes: widths of each block's spatial convolution; several make inception blocks.
        strides: of the spatial convolutions; 1 everywhere if empty.
        pool: "max" or "average" (both 3x3 with stride 2), or "none" after each block; nowhere if
            empty.
        residual: add a block's input to its output, where both have the same size.
        norm: "batch" or "layer" normalization before each block but the first, and after the last;
            or "none".
        hidden_act: "relu", "gelu", "silu" or "hardswish".
        head: "average" (global average pooling of the class maps) or "fully_connected" (a linear
            map from all positions of the class maps, as the paper's section 4.6 compares).
        rectified_logits: ReLU on the class maps, as the author has it; logits are then >= 0.
        hidden_dropout: element dropout after each pooling.
        head_dropout: element dropout before a fully connected head.
        initializer_std: standard deviation of normal first weights; None for He initialization.
        normalization: of the input. "channel": mean 0 and variance 1 for each channel over the
            training images; "zca": global contrast normalization, then ZCA whitening (section 4.1).
        shift: most pixels by which training images are moved in either direction, at random.
        flip: whether training images are mirrored left to right at random.
        erase: side of a square blotted out at a random place of each training image; 0 for none.
        label_smoothing: mass of the target spread over all classes.
        class_weights: factor on the loss of each class, or None.
    """

    model_type = "nin_image"

    image_size: int = 32
    num_channels: int = 3
    block_channels: list[list[int]] = field(default_factory=lambda: [[192, 64, 64]])
    kernel_sizes: list[list[int]] = field(default_factory=lambda: [[5]])
    strides: list[int] = field(default_factory=list)
    pool: list[str] = field(default_factory=list)
    residual: bool = False
    norm: Literal["none", "layer", "batch"] = "none"
    hidden_act: Activation = "relu"
    head: Literal["average", "fully_connected"] = "average"
    rectified_logits: bool = False
    hidden_dropout: float | int = 0.0
    head_dropout: float | int = 0.0
    initializer_std: float | int | None = None
    normalization: Literal["channel", "zca"] = "channel"
    shift: int = 0
    flip: bool = False
    erase: int = 0
    label_smoothing: float | int = 0.0
    class_weights: list[float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not self.strides:
            self.strides = [1] * len(self.block_channels)
        if not self.pool:
            self.pool = ["none"] * len(self.block_channels)
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """C, the channels of the last block."""
        return self.block_channels[-1][-1]

    def validate_architecture(self) -> None:
        """Refuse sizes that no network can have, before anything is allocated."""
        _check_blocks(self, ("kernel_sizes", "strides", "pool"))
        sizes = [self.image_size, self.num_channels, *self.strides]
        sizes += [size for block in (*self.block_channels, *self.kernel_sizes) for size in block]
        if min(sizes) < 1:
            raise ValueError("image size, channels, kernel sizes and strides must be positive")
        for stride, widths in zip(self.strides, self.kernel_sizes, strict=True):
            if stride > 1 and any(width % 2 == 0 for width in widths):
                raise ValueError(f"with a stride above 1 kernel sizes must be odd, not {widths}")
        if not set(self.pool) <= {"max", "average", "none"}:
            raise ValueError(f"pool must hold max, average and none, not {self.pool}")
        values = self.num_channels * self.image_size**2
        if self.normalization == "zca" and values > MAX_WHITENED:
            raise ValueError(
                f"zca whitening of {values:,} values an image takes a matrix of their square; up "
                f"to {MAX_WHITENED:,} can be had, 64 pixels a side of RGB"
            )
        if self.initializer_std is not None and self.initializer_std <= 0:
            raise ValueError(f"initializer_std must be positive, not {self.initializer_std}")
        for name in ("hidden_dropout", "head_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        for name in ("shift", "erase"):
            if not 0 <= getattr(self, name) < self.image_size:
                raise ValueError(
                    f"{name} must be in [0, {self.image_size}), not {getattr(self, name)}"
                )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """The configuration of a preset, with any field overridden.

        Raises:
            ValueError: if there is no preset of that name, or no such field.
        """
        return _from_preset(cls, name, IMAGE_PRESETS, overrides)


def with_pointwise_layers(blocks: list[list[int]], layers: int) -> list[list[int]]:
    """Block channels with another number of 1x1 convolutions in each block.

    Those that are added are as wide as the first one, and the last one keeps its width. Without
    any, a block is its spatial convolution alone.

    Args:
        blocks: as in `block_channels`.
        layers: 1x1 convolutions in each block.
    """
    changed = []
    for channels in blocks:
        first, middle, last = channels[0], channels[min(1, len(channels) - 1)], channels[-1]
        changed.append([first, *[middle] * (layers - 1), last] if layers else [first])
    return changed


def _from_preset(
    cls: Any, name: str, presets: dict[str, dict[str, Any]], overrides: dict[str, Any]
) -> Any:
    if name not in presets:
        raise ValueError(f"no preset named {name!r}; there are {', '.join(presets)}")
    # The base class would keep what it does not know, a misspelled name for one.
    if unknown := set(overrides) - {spec.name for spec in fields(cls)} - {"num_labels"}:
        raise ValueError(f"{cls.__name__} has no {', '.join(sorted(unknown))}")
    return cls(**{**presets[name], **overrides})


def _check_blocks(config: Any, lists: tuple[str, ...]) -> None:
    """Refuse lists that do not have one entry for each block, and blocks without layers."""
    blocks = len(config.block_channels)
    if blocks == 0:
        raise ValueError("block_channels is empty; there must be at least one block")
    for name in lists:
        entries = len(getattr(config, name))
        if entries != blocks:
            raise ValueError(f"{name} has {entries} entries for {blocks} blocks")
    if not all([*config.block_channels, *config.kernel_sizes]):
        raise ValueError("every block needs at least one channel count and kernel size")


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
    # nin-text-base with what the paper did away with: a fully connected layer in place of global
    # average pooling, and, in cnn-fc, a plain convolution in place of an mlpconv block.
    "mlpconv-fc": {
        "architecture": "conv-fc",
        "embedding_size": 192,
        "hidden_size": 192,
        "kernel_sizes": [3],
        "num_layers": 3,
        "dropout": 0.3,
    },
    "cnn-fc": {
        "architecture": "conv-fc",
        "embedding_size": 192,
        "hidden_size": 192,
        "kernel_sizes": [3],
        "num_layers": 1,
        "dropout": 0.3,
    },
}


@strict
class BaselineConfig(PreTrainedConfig):
    """Configuration of the baselines.

    Args:
        architecture: a key of `networks.ENCODERS`.
        vocab_size: rows of the embedding table.
        embedding_size: E, width of the token embeddings.
        hidden_size: H: filters of each width (kim-cnn), channels (dpcnn, conv-fc), units in each
            direction (bilstm) or width of the feed-forward layers (transformer).
        kernel_sizes: widths of the filters (kim-cnn, conv-fc).
        num_layers: blocks (dpcnn), layers (bilstm, transformer), or the convolution and the 1x1
            convolutions after it (conv-fc).
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
        known = {preset["architecture"] for preset in NETWORKS.values()}
        if self.architecture not in known:
            raise ValueError(
                f"no architecture named {self.architecture!r}; there are {', '.join(sorted(known))}"
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
AutoConfig.register(NiNImageConfig.model_type, NiNImageConfig, exist_ok=True)
AutoConfig.register(BaselineConfig.model_type, BaselineConfig, exist_ok=True)
