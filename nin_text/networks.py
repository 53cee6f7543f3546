"""Networks from the literature that NiN is compared with, trained from scratch by the same trainer.

Token embeddings, one of the ENCODERS, dropout, one linear map to classes. They differ in the
encoder alone, so each is a small module that maps embedded texts to one vector for each.

Their configuration is in `configuration.py`. Importing this module registers the class with
transformers' AutoModelForSequenceClassification.

Letters in shapes: B texts, T tokens, E embedding size, H hidden size, C size of a text's vector,
K classes.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from nin_text.blocks import Dropout, MLPConv
from nin_text.configuration import BaselineConfig, with_pointwise_layers


class Encoder(nn.Module):
    """Maps embedded texts (B, T, E), padded on the right, and their mask (B, T) to (B, C).

    The mask is true at tokens, of which every text has at least one. Embeddings are zero elsewhere.
    """

    width: int  # C


class KimCNN(Encoder):
    """Filters of several widths, max over time (Kim, EMNLP 2014, arXiv 1408.5882: CNN-rand)."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        # Padded, so that a text of any length has as many windows as tokens, and a few to spare.
        self.convolutions = nn.ModuleList(
            nn.Conv1d(config.embedding_size, config.hidden_size, size, padding=size // 2)
            for size in config.kernel_sizes
        )
        self.width = config.hidden_size * len(config.kernel_sizes)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x.transpose(1, 2)  # (B, E, T)
        maps = [convolution(x)[..., : x.shape[2]] for convolution in self.convolutions]  # (B, H, T)
        return F.relu(max_over_time(torch.cat(maps, dim=1), mask))  # (B, C)


class DPCNN(Encoder):
    """Residual blocks of two convolutions, with half the tokens in each that are in the last.

    Johnson & Zhang, ACL 2017, "Deep Pyramid Convolutional Neural Networks for Text Categorization",
    without their region embeddings from unlabelled text.
    """

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.width = config.hidden_size

        def convolution(channels: int) -> nn.Conv1d:
            return nn.Conv1d(channels, config.hidden_size, 3, padding=1)

        self.region = convolution(config.embedding_size)
        self.first, self.second = (
            nn.ModuleList(convolution(config.hidden_size) for _ in range(config.num_layers))
            for _ in range(2)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.region(x.transpose(1, 2))  # (B, C, T)
        for i, block in enumerate(zip(self.first, self.second, strict=True)):
            if i:
                x = x.masked_fill(~mask[:, None], -math.inf)  # (B, C, T)
                x = F.max_pool1d(x, 3, stride=2, padding=1)  # (B, C, T / 2)
                mask = mask[:, ::2]  # (B, T / 2): a window lies around every second token
            y = x
            for convolution in cast(nn.ModuleList, block):
                y = convolution(F.relu(y).masked_fill(~mask[:, None], 0))  # (B, C, T)
            x = x + y  # (B, C, T)
        return max_over_time(x, mask)  # (B, C)


class BiLSTM(Encoder):
    """An LSTM in both directions (Graves & Schmidhuber 2005) and the max over time."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.width = 2 * config.hidden_size
        self.lstm = nn.LSTM(
            config.embedding_size,
            config.hidden_size,
            config.num_layers,
            batch_first=True,
            bidirectional=True,
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(dim=1).cpu()  # (B,)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        states, _ = self.lstm(packed)
        states, _ = pad_packed_sequence(states, batch_first=True)  # (B, T, C)
        return max_over_time(states.transpose(1, 2), mask)  # (B, C)


class Transformer(Encoder):
    """Self-attention (Vaswani et al., 2017, arXiv 1706.03762) and the mean over tokens.

    Norms come before each sublayer (Xiong et al. 2020), positions are learned.
    """

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.width = config.embedding_size
        self.positions = nn.Embedding(config.max_positions, config.embedding_size)
        self.dropout = nn.Dropout(config.dropout)
        layer = nn.TransformerEncoderLayer(
            config.embedding_size,
            config.num_heads,
            config.hidden_size,
            config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        layer.self_attn.dropout = 0.0  # with it, a CPU cannot use fused attention
        self.layers = nn.TransformerEncoder(
            layer,
            config.num_layers,
            nn.LayerNorm(config.embedding_size),
            enable_nested_tensor=False,
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        positions = self.positions.weight[: x.shape[1]]  # (T, E)
        x, mask = x[:, : len(positions)], mask[:, : len(positions)]  # (B, T, E), (B, T)
        x = self.dropout(x + positions)  # (B, T, E)
        x = self.layers(x, src_key_padding_mask=~mask)  # (B, T, E)
        shares = mask / mask.sum(dim=1, keepdim=True)  # (B, T)
        return (x * shares[..., None]).sum(dim=1)  # (B, E)


class ConvFC(Encoder):
    """The block of `nin-text-base`, then the max over time and a fully connected layer.

    It is there for the question of what mlpconv layers and global average pooling are worth on
    text (the paper, section 3): `num_layers` of 1 leaves the convolution alone.
    """

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.width = size = config.hidden_size
        (channels,) = with_pointwise_layers([[size, 2 * size, size]], config.num_layers - 1)
        self.dropout = Dropout(config.dropout)
        self.block = MLPConv(
            config.embedding_size,
            channels,
            config.kernel_sizes,
            activation="gelu",
            norm="layer",
            residual=config.embedding_size == size,
            dropout=config.dropout,
        )
        self.norm = nn.LayerNorm(size)
        self.hidden = nn.Linear(size, size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.block(self.dropout(x), mask[..., None]))  # (B, T, C)
        return F.gelu(self.hidden(max_over_time(x.transpose(1, 2), mask)))  # (B, C)


ENCODERS: dict[str, type[Encoder]] = {
    "kim-cnn": KimCNN,
    "dpcnn": DPCNN,
    "bilstm": BiLSTM,
    "transformer": Transformer,
    "conv-fc": ConvFC,
}


class BaselineForSequenceClassification(PreTrainedModel):
    """Embeddings, an encoder and one linear map to the classes."""

    config: BaselineConfig
    config_class = BaselineConfig
    accepts_loss_kwargs = True
    _input_embed_layer = "embeddings"

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(
            config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id
        )
        self.encoder = ENCODERS[config.architecture](config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(self.encoder.width, config.num_labels or 0)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """He before ReLU, Glorot elsewhere: for the default of transformers, see `text.py`."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.embedding_dim))
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.LSTM, nn.MultiheadAttention)):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.zeros_(parameter)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SequenceClassifierOutput:
        """Classify texts.

        Args:
            input_ids: (B, T) token ids, padded on either side.
            attention_mask: (B, T), 1 for tokens and 0 for padding; all ones if None.
            labels: (B,) class indices.
            num_items_in_batch: what the summed loss is divided by, if not by this batch alone:
                the size of the whole batch when gradients are accumulated.

        Returns:
            `logits` (B, K), and the scalar `loss` if labels were given.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)  # (B, T)
        ids, mask = to_front(input_ids, attention_mask)  # (B, T) each
        x = self.embeddings(ids) * mask[..., None]  # (B, T, E)
        x = self.encoder(x, mask)  # (B, C)
        with torch.autocast(x.device.type, enabled=False):  # as NiN: bf16 logits are too coarse
            logits = self.classifier(self.dropout(x.float()))  # (B, K)
            loss = None
            if labels is not None:
                items = len(labels) if num_items_in_batch is None else num_items_in_batch
                loss = F.cross_entropy(logits, labels, reduction="sum") / items
        return SequenceClassifierOutput(loss=loss, logits=logits)


def to_front(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the tokens of each text to the front, and leave out what is padding in every text.

    Args:
        input_ids, attention_mask: (B, T), padded on either side.

    Returns:
        (B, T') ids, and a bool mask of the tokens. A text without any gets one of its padding
        tokens, so that an encoder need not know such texts.
    """
    order = attention_mask.argsort(dim=1, descending=True, stable=True)  # (B, T)
    ids, mask = input_ids.gather(1, order), attention_mask.gather(1, order).bool()  # (B, T) each
    mask[:, 0] = True
    width = int(mask.sum(dim=1).max())
    return ids[:, :width], mask[:, :width]


def max_over_time(x: Tensor, mask: Tensor) -> Tensor:
    """The largest value of each channel at the tokens of a text: (B, C, T), (B, T) to (B, C)."""
    return x.masked_fill(~mask[:, None], -math.inf).amax(dim=2)


AutoModelForSequenceClassification.register(
    BaselineConfig, BaselineForSequenceClassification, exist_ok=True
)
