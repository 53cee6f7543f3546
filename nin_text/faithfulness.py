"""Does evidence name the tokens that decide? Deletion tests, beside gradient saliency and chance.

The tokens of a text are deleted one by one, those first that a method holds to speak most for the
answer; the faster the log-odds of the answer fall, the better the method knew what decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from nin_text.blocks import Rows
from nin_text.evaluation import bootstrap_interval, predict_logits
from nin_text.explain import refuse_several_labels
from nin_text.text import NiNTextForSequenceClassification

METHODS = ("evidence", "gradient_x_input", "gradient_norm", "random")
RANDOM_ORDERS = 5  # of each text; their drops are averaged


def deletion_test(
    model: NiNTextForSequenceClassification,
    rows: Sequence[np.ndarray],
    *,
    most: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Fall of the log-odds of the answer as tokens are deleted, by the method that orders them.

    The answer is that to the whole text. The area over the perturbation curve (AOPC, Samek et al.
    2017, arXiv 1509.06321) of a text is the mean fall over 1 to `most` deleted tokens; at least one
    token stays. Gradients are those of the log-odds by the embeddings: the n-gram branch, which
    reads ids, has none.

    Args:
        model: a NiN text classifier, on any device.
        rows: token ids of each text; those with fewer than two are left out.
        most: tokens to delete.
        seed: of the random orders and the bootstrap.

    Returns:
        `n`, and for each of `METHODS` its `aopc` (mean over texts), `interval_95` (bootstrap over
        texts), `curve` (mean fall after 1 to `most` deletions, over the texts long enough) and,
        but for evidence, `evidence_ahead` and `evidence_ahead_interval_95`: how much more evidence
        has, text by text.

    Raises:
        ValueError: if no text has two tokens, or `most` is below one.
        UserError: if the model answers with several labels.
    """
    if most < 1:
        raise ValueError(f"most must be at least one token to delete, not {most}")
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ValueError("no text has two tokens: there is nothing to delete")
    refuse_several_labels(model)
    was_training = model.training
    model.eval()
    generator = np.random.default_rng(seed)
    pad = model.config.pad_token_id or 0
    answers = predict_logits(model, rows, pad_token_id=pad).argmax(axis=1)  # (n,)
    scores = [_scores(model, row, int(answer)) for row, answer in zip(rows, answers, strict=True)]

    def falls(order_of: Callable[[int], np.ndarray]) -> np.ndarray:
        """(n, most) fall of the log-odds; NaN where a text is too short."""
        variants, where = [], []
        for i, row in enumerate(rows):
            order = order_of(i)
            variants += [np.delete(row, order[:k]) for k in range(min(most, len(row) - 1) + 1)]
            where += [(i, k) for k in range(min(most, len(row) - 1) + 1)]
        texts, deleted = np.array(where).T
        odds = np.full((len(rows), most + 1), np.nan)
        logits = predict_logits(model, variants, pad_token_id=pad)
        odds[texts, deleted] = log_odds(logits, answers[texts])
        return odds[:, :1] - odds[:, 1:]

    curves = {
        name: falls(lambda i, name=name: np.argsort(-scores[i][name], kind="stable"))  # type: ignore[misc]
        for name in METHODS[:-1]
    }
    drawn = [falls(lambda i: generator.permutation(len(rows[i]))) for _ in range(RANDOM_ORDERS)]
    curves["random"] = np.mean(drawn, axis=0)
    areas = {name: np.nanmean(curve, axis=1) for name, curve in curves.items()}  # (n,) each

    def mean_of(values: np.ndarray) -> tuple[float, list[float]]:
        interval = bootstrap_interval(lambda i: float(values[i].mean()), len(values), seed=seed)
        return float(values.mean()), interval

    result: dict[str, Any] = {"n": len(rows)}
    for name in METHODS:
        mean, interval = mean_of(areas[name])
        reached = ~np.isnan(curves[name]).all(axis=0)
        curve = np.nanmean(curves[name][:, reached], axis=0)
        result[name] = {"aopc": mean, "interval_95": interval, "curve": curve.tolist()}
        if name != "evidence":
            ahead, interval = mean_of(areas["evidence"] - areas[name])
            result[name] |= {"evidence_ahead": ahead, "evidence_ahead_interval_95": interval}
    model.train(was_training)
    return result


def log_odds(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n,) log of p / (1 - p), for p the probability of one class of each text."""
    values = np.asarray(logits, dtype=np.float64).copy()  # (n, K)
    picked = np.arange(len(values)), labels
    own = values[picked]
    values[picked] = -np.inf
    return own - np.logaddexp.reduce(values, axis=1)


def _scores(
    model: NiNTextForSequenceClassification, row: np.ndarray, answer: int
) -> dict[str, np.ndarray]:
    """(T,) how much each token speaks for the answer, by each method that is not chance."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.asarray(row, dtype=np.int64))[None].to(device)  # (1, T)
    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    hook = model.nin.embeddings.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            output = model(ids, output_evidence=True)
            logits = output.logits[0]  # (K,)
            others = torch.cat([logits[:answer], logits[answer + 1 :]])
            (gradient,) = torch.autograd.grad(
                logits[answer] - others.logsumexp(0), embedded[0]
            )  # (N, E)
    finally:
        hook.remove()
    layout = Rows.from_attention_mask(torch.ones_like(ids), model.nin.gap, model.nin.stride)
    product = layout.unpack((gradient * embedded[0].detach()).sum(dim=1, keepdim=True))  # (1, T, 1)
    norm = layout.unpack(gradient.norm(dim=1, keepdim=True))  # (1, T, 1)
    evidence = output.evidence[0].detach()  # (T, K)
    return {
        "evidence": (evidence[:, answer] - evidence.mean(dim=1)).cpu().numpy(),
        "gradient_x_input": product[0, :, 0].cpu().numpy(),
        "gradient_norm": norm[0, :, 0].cpu().numpy(),
    }
