"""The text models: the encoder, and the classifier whose evidence adds up.

Token embeddings, mlpconv blocks (see `blocks.py`), pooling over tokens, one linear map to classes.
Because everything after the blocks is linear, the logits of a text are exactly a sum over its
tokens: that sum's terms are the evidence (`output_evidence=True`).

Importing this module registers the classes with transformers' AutoModel and
AutoModelForSequenceClassification. Letters in shapes: see `blocks.py`.
"""

import copy
import logging
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from nin_text.blocks import Dropout, MLPConv, Rows, max_pool_rows, pooling_weights
from nin_text.configuration import NiNTextConfig
from nin_text.cpu_gradients import Embedding, of_weights, written_out
from nin_text.modeling import classification_loss, he_initialization
from nin_text.ngrams import NGramEvidence

logger = logging.getLogger(__name__)

# Arguments of `from_pretrained` that say where a model lies.
PLACE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
DTYPE = ("dtype", "torch_dtype")
EMPTY_FORM = "This model card has been automatically generated"  # by transformers, it says


@dataclass
class NiNTextModelOutput(BaseModelOutputWithPooling):
    """Output of the encoder.

    Attributes:
        last_hidden_state: (B, T, C), zeros at padding.
        pooler_output: (B, C), the pooled text.
        pooling_weights: (B, T), the weight of each token in the pooled text.
    """

    pooling_weights: Tensor | None = None


@dataclass
class NiNTextClassifierOutput(ModelOutput):
    """Output of the classifier.

    Attributes:
        loss: scalar, if labels were given.
        logits: (B, K).
        evidence: (B, T, K) if asked for; its sum over tokens is the logits.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    evidence: Tensor | None = None


class NiNTextPreTrainedModel(PreTrainedModel):
    """Initialization and loading shared by the text models."""

    config: NiNTextConfig
    config_class = NiNTextConfig
    base_model_prefix = "nin"
    accepts_loss_kwargs = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """He initialization but for the tables, whose rows are looked up."""
        if isinstance(module, NGramEvidence):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.embedding_dim))
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        else:
            he_initialization(module)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """As for `push_to_hub`, but with the card of the folder that the model is from.

        Where the repository has none yet, transformers would upload an empty form.
        """
        card = Path(working_dir) / "README.md"
        own = Path(self.name_or_path or "") / "README.md"  # where the name is a folder
        both = bool(self.name_or_path) and own.is_file() and card.is_file()
        if both and not own.samefile(card) and EMPTY_FORM in card.read_text(encoding="utf-8"):
            shutil.copyfile(own, card)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


class NiNTextModel(NiNTextPreTrainedModel):
    """The encoder: token ids to one vector for each token and one for the text."""

    # While it is trained: what stands in for `through_blocks`, see `cuda_graphs.py`.
    graphs: Callable[[Tensor, Tensor], Tensor] | None = None
    # It is loaded from saved classifiers, whose head it has no use for.
    _keys_to_ignore_on_load_unexpected = [r"^classifier\.", r"^ngrams\."]

    def __init__(self, config: NiNTextConfig) -> None:
        super().__init__(config)
        self.embeddings: nn.Embedding = Embedding(
            config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id
        )
        inputs = [config.embedding_size, *(c[-1] for c in config.block_channels[:-1])]
        self.blocks = nn.ModuleList(
            MLPConv(
                in_channels,
                channels,
                kernel_sizes,
                dilation=dilation,
                activation=config.hidden_act,
                norm="layer" if config.norm else "none",
                residual=config.residual,
                # Many blocks add no more to the embeddings than one (Radford et al. 2019, GPT-2).
                initial_scale=1 / math.sqrt(len(config.block_channels)) if config.residual else 1.0,
                dropout=config.hidden_dropout,
            )
            for in_channels, channels, kernel_sizes, dilation in zip(
                inputs, config.block_channels, config.kernel_sizes, config.dilations, strict=True
            )
        )
        self.final_norm = nn.LayerNorm(config.hidden_size) if config.norm else nn.Identity()
        self.attention = nn.Linear(config.hidden_size, 1) if config.pooling == "attention" else None
        if self.attention is not None:
            # Softmax would cancel it. It is made and dropped, so that a seed draws what it drew.
            self.attention.register_parameter("bias", None)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        # What one text must keep from the next: the farthest that any layer reaches, in tokens.
        gap, self.stride = 1, 1
        for sizes, dilation, pool in zip(
            config.kernel_sizes, config.dilations, config.pool, strict=True
        ):
            gap = max(gap, self.stride * dilation * (max(sizes) // 2), self.stride * pool)
            self.stride *= 1 + pool
        self.gap = math.ceil(gap / self.stride) * self.stride
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.embeddings = value

    def layout_of(self, attention_mask: Tensor) -> Rows:
        """Where the encoder lays the tokens of a batch, from its (B, T) attention mask."""
        return Rows.from_attention_mask(attention_mask, self.gap, self.stride)

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None, layout: Rows | None = None
    ) -> "EncodedRows":
        """Run embeddings and blocks on a padded batch, computing only its tokens.

        Args:
            input_ids, attention_mask: (B, T), see `forward`.
            layout: what `layout_of` says of the mask, if it has been asked: on a GPU, the answer
                has to be waited for.
        """
        if layout is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            layout = self.layout_of(mask)
        # The hashes of n-grams need 64 bits, and embeddings take 32 without a word.
        ids = layout.pack(input_ids.long(), fill=self.config.pad_token_id or 0)  # (N,)
        x = self.run_blocks(ids, layout.mask)  # (N / stride, C)
        # The pooled sum has one term for each token: bf16 would lose the small ones.
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            scorer = None if self.attention is None else self.attention.weight[0].float()  # (C,)
            pool = _Pooling.apply if written_out(x) else pool_rows
            weights, pooled = pool(x, scorer, layout, self.stride)  # (B, T), (B, C)
        return EncodedRows(ids, x, layout, weights, pooled)

    def run_blocks(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings, blocks and final norm in the rows layout.

        Args:
            ids: (N,) token ids.
            mask: (N, 1), true where there is a token.

        Returns:
            (N / stride, C), arbitrary values where there is no token.
        """
        x = self.embeddings(ids)  # (N, E)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.training and self.config.word_dropout:
            kept = torch.rand(len(ids), 1, device=x.device) >= self.config.word_dropout  # (N, 1)
            x = x * (kept / (1 - self.config.word_dropout)).to(x.dtype)
        x = self.embedding_dropout(x)
        if self.graphs is not None and torch.is_grad_enabled():
            return self.graphs(x, mask)
        return through_blocks(self.blocks, self.config.pool, self.final_norm, x, mask)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> NiNTextModelOutput:
        """Encode texts.

        Args:
            input_ids: (B, T) token ids, padded on either side.
            attention_mask: (B, T), 1 for tokens and 0 for padding; all ones if None.
        """
        encoded = self.encode(input_ids, attention_mask)
        return NiNTextModelOutput(
            last_hidden_state=encoded.layout.unpack(encoded.rows, self.stride),  # (B, T, C)
            pooler_output=encoded.pooled,
            pooling_weights=encoded.weights,
        )


@dataclass(frozen=True)
class EncodedRows:
    """What the encoder computed, before anything is put back into a padded batch.

    Attributes:
        ids: (N,) token ids.
        rows: (N / stride, C) float32, arbitrary values where there is no token.
        layout: where the tokens lie.
        weights: (B, T), the weight of each token in `pooled`.
        pooled: (B, C) float32.
    """

    ids: Tensor
    rows: Tensor
    layout: Rows
    weights: Tensor
    pooled: Tensor


def through_blocks(
    blocks: Iterable[Callable[[Tensor, Tensor], Tensor]],
    pools: Iterable[bool],
    final_norm: nn.Module,
    x: Tensor,
    mask: Tensor,
) -> Tensor:
    """What the blocks make of embeddings (N, E) with a mask (N, 1): (N / stride, C)."""
    for block, pool in zip(blocks, pools, strict=True):
        x = block(x, mask.to(x.dtype))  # (N, C); a mask of x's type saves a conversion
        if pool:
            x, mask = max_pool_rows(x, mask)  # (N / 2, C), (N / 2, 1)
    return final_norm(x)


def pool_rows(x: Tensor, scorer: Tensor | None, layout: Rows, stride: int) -> tuple[Tensor, Tensor]:
    """The weights of the tokens of each text, and the sum of its rows by these weights.

    Args:
        x: (N / stride, C).
        scorer: (C,), whose products with the rows are the scores of attention; None for the mean.
        layout, stride: where the tokens lie.

    Returns:
        (B, T) and (B, C).
    """
    scores = None
    if scorer is not None:
        # On a CPU a matrix times a vector is of one thread.
        scores = layout.unpack((x * scorer).sum(dim=1, keepdim=True), stride)[..., 0]  # (B, T)
    weights = pooling_weights(layout.token_mask, scores)  # (B, T)
    token_rows = layout.token_rows(stride)  # (M,)
    token_weights = weights.flatten().index_select(0, layout.tokens)  # (M,)
    if x.device.type == "cpu":  # where it takes a third of the time
        lengths = layout.token_mask.sum(dim=1)  # (B,)
        starts = lengths.cumsum(0) - lengths  # (B,)
        return weights, F.embedding_bag(
            token_rows, x, starts, mode="sum", per_sample_weights=token_weights
        )
    row_weights = x.new_zeros(x.shape[0]).index_add(0, token_rows, token_weights)
    pooled = x.new_zeros(len(weights), x.shape[1])
    return weights, pooled.index_add(0, layout.text[::stride], x * row_weights[:, None])


class _Pooling(torch.autograd.Function):
    """`pool_rows` with a backward pass of its own (see `cpu_gradients.py`).

    For the rows x of a text, a scorer a, scores s = x a, weights w = softmax(s) and the sum p = w x
    the gradients are, with g = x dp + dw: ds = w (g - w g), dx = w dp + ds a and da = ds x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scorer: Tensor | None, layout: Rows, stride: int
    ) -> tuple[Tensor, Tensor]:
        weights, pooled = pool_rows(x, scorer, layout, stride)
        ctx.save_for_backward(x, scorer, weights)
        ctx.layout, ctx.stride = layout, stride
        ctx.set_materialize_grads(False)
        return weights, pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights: Tensor | None, dpooled: Tensor | None) -> tuple[Any, ...]:
        x, scorer, weights = ctx.saved_tensors
        layout = ctx.layout
        text = layout.text[:: ctx.stride]  # (N,)
        rows = layout.token_rows(ctx.stride)  # (M,)
        of_tokens = weights.flatten()[layout.tokens]  # (M,)
        w = of_tokens.new_zeros(len(x)).index_add_(0, rows, of_tokens)  # (N,)
        if dpooled is None:
            dpooled = x.new_zeros(len(weights), x.shape[1])
        dx = dpooled.index_select(0, text)  # (N, C), of the text of each row
        if scorer is None:
            return dx.mul_(w[:, None]), None, None, None
        wg = w * torch.linalg.vecdot(x, dx)  # (N,)
        if dweights is not None:
            wg.index_add_(0, rows, of_tokens * dweights.flatten()[layout.tokens])
        sums = wg.new_zeros(len(weights)).index_add_(0, text, wg)  # (B,)
        dscores = wg - w * sums[text]  # (N,)
        dscorer = of_weights(dscores[:, None], x)[0]  # (C,)
        return dx.mul_(w[:, None]).addr_(dscores, scorer), dscorer, None, None


class NiNTextForSequenceClassification(NiNTextPreTrainedModel):
    """The encoder and one linear map to the classes, with n-gram evidence if it is configured.

    The n-gram branch is left out in training mode: its weights have been fitted to the labels of
    the training texts, and beside it the network would find nothing left to learn.
    """

    def __init__(self, config: NiNTextConfig) -> None:
        super().__init__(config)
        classes = config.num_labels or 0
        if config.class_weights is not None and len(config.class_weights) != classes:
            raise ValueError(f"{len(config.class_weights)} class weights for {classes} labels")
        self.nin = NiNTextModel(config)
        self.classifier = nn.Linear(config.hidden_size, classes)
        self.ngrams = (
            NGramEvidence(config.ngram_size, config.ngram_buckets, classes, config.ngram_smoothing)
            if config.ngram_size
            else None
        )
        self.post_init()

    @classmethod
    def from_encoder(cls, encoder: NiNTextModel) -> Self:
        """A classifier with a new head for the labels of `encoder.config`.

        Args:
            encoder: is taken over, not copied.
        """
        model = cls(encoder.config)
        model.classifier.to(encoder.device, encoder.dtype)
        model.nin = encoder
        return model.train(encoder.training)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As of PreTrainedModel; for another number of labels, the encoder of the saved model.

        The head is then new, as is to be expected, and so there is one warning and no need for
        `ignore_mismatched_sizes`. N-gram evidence, which is of the old labels, is left out, and so
        are class weights. With as many labels as before, whatever their names, nothing is new.

        Raises:
            ValueError, OSError: as transformers does.
        """
        folder = pretrained_model_name_or_path
        if folder is None:
            return super().from_pretrained(folder, *model_args, **kwargs)
        place = {name: kwargs[name] for name in PLACE if name in kwargs}
        saved = NiNTextConfig.from_pretrained(folder, **place)
        config, loading = kwargs.get("config"), dict(kwargs)
        if not isinstance(config, NiNTextConfig):
            kept = {n: value for n, value in kwargs.items() if n in (*PLACE, *DTYPE)}
            given = {n: value for n, value in kwargs.items() if n not in kept and n != "config"}
            config, unused = NiNTextConfig.from_pretrained(
                config or folder, return_unused_kwargs=True, **place, **given
            )
            loading = {**kept, **unused}
        if config.num_labels == saved.num_labels:
            return super().from_pretrained(folder, *model_args, **kwargs)
        wants_info = loading.pop("output_loading_info", False)
        loaded: Any = NiNTextModel.from_pretrained(
            folder,
            *model_args,
            **{**loading, "config": _of_new_labels(config), "output_loading_info": True},
        )
        logger.warning(
            "%s was saved with %s labels, not %s: its encoder is kept%s; the classifier is new and "
            "has to be trained",
            folder,
            saved.num_labels,
            config.num_labels,
            ", its n-gram evidence is left out" if saved.ngram_size else "",
        )
        encoder, info = loaded
        model = cls.from_encoder(encoder)
        info["missing_keys"] |= {"classifier.weight", "classifier.bias"}
        return (model, info) if wants_info else model

    @torch.no_grad()
    def rescale(self, network: float, ngrams: float) -> None:
        """Multiply what the network, and what the n-grams, add to the logits by a factor."""
        assert self.ngrams is not None
        for weights, scale in (
            (self.classifier.weight, network),
            (self.classifier.bias, network),
            (self.ngrams.weight, ngrams),
            (self.ngrams.bias, ngrams),
        ):
            weights.mul_(float(scale))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_evidence: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        layout: Rows | None = None,
    ) -> NiNTextClassifierOutput:
        """Classify texts.

        Args:
            input_ids: (B, T) token ids, padded on either side.
            attention_mask: (B, T), 1 for tokens and 0 for padding; all ones if None.
            labels: (B,) class indices; (B, K) class probabilities; or (B, K) zeros and ones if the
                configuration's `problem_type` is "multi_label_classification".
            output_evidence: also return what each token adds to each logit.
            num_items_in_batch: what the summed loss is divided by, if not by this batch alone:
                the size of the whole batch when gradients are accumulated.
            layout: what `self.nin.layout_of` says of the mask, if it has been asked.
        """
        encoded = self.nin.encode(input_ids, attention_mask, layout)
        with torch.autocast(input_ids.device.type, enabled=False):
            # The bias is spread over the tokens by their weights, which sum to one. A text without
            # tokens has no evidence: its logits are zero and its classes equally likely.
            total = encoded.weights.sum(dim=1, keepdim=True)  # (B, 1)
            # The weights may be loaded in half precision.
            weight, bias = self.classifier.weight.float(), self.classifier.bias.float()  # (K, C)
            logits = encoded.pooled @ weight.t() + total * bias  # (B, K)
            evidence = None
            ngrams = None if self.training else self.ngrams
            ngram_maps = None
            if ngrams is not None:
                added, ngram_maps = ngrams(encoded.ids, encoded.layout, output_evidence)
                logits = logits + added + total * ngrams.bias
            if output_evidence:
                maps = F.linear(encoded.rows, weight, bias)  # (N, K): one map for each class
                maps = encoded.layout.unpack(maps, self.nin.stride)  # (B, T, K)
                if ngrams is not None:
                    maps = maps + ngrams.bias
                evidence = maps * encoded.weights[..., None]
                if ngram_maps is not None:
                    evidence = evidence + encoded.layout.unpack(ngram_maps)
            loss = None
            if labels is not None:
                loss = classification_loss(logits, labels, self.config, num_items_in_batch)
        return NiNTextClassifierOutput(loss=loss, logits=logits, evidence=evidence)


def _of_new_labels(config: NiNTextConfig) -> NiNTextConfig:
    """A copy without what belongs to the labels before."""
    config = copy.deepcopy(config)
    config.ngram_size = 0
    if config.class_weights is not None and len(config.class_weights) != config.num_labels:
        config.class_weights = None
    config.label2id = {str(name): int(i) for i, name in (config.id2label or {}).items()}
    return config


AutoModel.register(NiNTextConfig, NiNTextModel, exist_ok=True)
AutoModelForSequenceClassification.register(
    NiNTextConfig, NiNTextForSequenceClassification, exist_ok=True
)
