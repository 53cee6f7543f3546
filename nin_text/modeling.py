"""What the text and the image models share beside the blocks: first weights, and the loss."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nin_text.configuration import MULTI_LABEL


def he_initialization(module: nn.Module) -> None:
    """He initialization, which keeps the variance through deep ReLU stacks.

    The default of transformers, N(0, 0.02), makes a nine-layer ReLU network constant. Through
    `nn.init`, which leaves alone what `from_pretrained` has already loaded. A layer's
    `initial_scale`, if it has one, is a factor on its weights.
    """
    if isinstance(module, (nn.LayerNorm, nn.BatchNorm1d)):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm1d):
            assert module.running_mean is not None and module.running_var is not None
            assert module.num_batches_tracked is not None
            nn.init.zeros_(module.running_mean)
            nn.init.ones_(module.running_var)
            nn.init.zeros_(module.num_batches_tracked)
    elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        std = math.sqrt(2 / math.prod(module.weight.shape[1:]))
        std *= getattr(module, "initial_scale", 1.0)
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    config: Any,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy, or one binary cross-entropy for each class if multi-label.

    Class weights multiply each example's (or each class's) loss; the sum is divided by the number
    of examples, so that accumulated gradients equal those of the whole batch.

    Args:
        logits: (B, K).
        labels: (B,) integers; (B, K) probabilities; or, if multi-label, (B, K) zeros and ones, or
            (B, 2, K) how much speaks for each class, and how much against it.
        config: gives `problem_type`, `class_weights` and `label_smoothing`.
        num_items_in_batch: number of label values to divide by; this batch's if None.

    Raises:
        ValueError: for a single label without `problem_type`, which transformers takes for a number
            to be predicted.
    """
    if logits.shape[1] == 1 and config.problem_type != MULTI_LABEL:
        raise ValueError(
            "num_labels=1 is regression, which NiN does not do; give two labels, or "
            'problem_type="multi_label_classification"'
        )
    items: Tensor | float = labels.numel() if num_items_in_batch is None else num_items_in_batch
    weight = None if config.class_weights is None else logits.new_tensor(config.class_weights)
    if config.problem_type == MULTI_LABEL:
        yes = labels.to(logits.dtype)
        if labels.dim() == 3:
            yes, no = yes.unbind(dim=1)  # (B, K) each
            loss = -(yes * F.logsigmoid(logits) + no * F.logsigmoid(-logits))
            items = items / 2
        else:
            loss = F.binary_cross_entropy_with_logits(logits, yes, reduction="none")
        loss = (loss if weight is None else loss * weight).sum()
    else:
        loss = F.cross_entropy(
            logits, labels, weight, reduction="sum", label_smoothing=config.label_smoothing
        )
        if labels.dim() == 2:  # K values for each example
            items = items / labels.shape[1]
    return loss / items
