"""N-gram evidence: a linear model of short token sequences beside the network.

Each distinct n-gram of a text adds its evidence once, however often it occurs. The weights are
naive Bayes log-count ratios, corrected by a logistic regression (Wang & Manning, "Baselines and
Bigrams", ACL 2012; Mesnil et al. 2014, arXiv 1412.5335). They are fitted in seconds on the
training split, not by gradient steps. As the model is linear, the credit of an n-gram can be given
to its tokens, and the evidence of a text still adds up exactly.

N-grams are hashed into a table of fixed size, as in fastText (Joulin et al. 2016, arXiv
1607.01759); those that share a bucket share a weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin_text.blocks import Rows
from nin_text.stacking import folds

if TYPE_CHECKING:  # what fits the weights takes seconds to import; adding them up does without
    import scipy.sparse as sparse

# The hash is a polynomial modulo a prime: its products stay below 2**62 on every device.
PRIME = 2_147_483_647
MULTIPLIER = 1_000_003
SCRAMBLE = 1_640_531_527  # spreads neighbouring values, whose order is that of the token ids

SMOOTHING = 0.5  # added to every count of naive Bayes, unless told otherwise
INVERSE_REGULARIZATION = 1.0  # C of the logistic regression
LEAST_TEXTS = 2  # that an n-gram must be in: what a single text has tells little of others
CHUNK_TOKENS = 2**18  # whose n-grams are held at once
# N-grams of so many tokens, of one long text or of short ones together, are sorted at a time. NumPy
# took 1 to 4 ns a number for some hundred and 22 for a hundred thousand (torch: 12).
SORT_TOKENS = 128
Keys = TypeVar("Keys", np.ndarray, Tensor)


def ngram_buckets(ids: Tensor, mask: Tensor, size: int, buckets: int) -> Tensor:
    """The bucket of every n-gram of up to `size` tokens, at the row where it ends.

    Args:
        ids: (N,) token ids in the rows layout, or (B, T) in a padded batch.
        mask: bool of that shape, true where there is a token; n-grams do not cross other rows.
        size: tokens of the longest n-gram.
        buckets: number of buckets.

    Returns:
        (size, N) or (size, B, T) int64: bucket of the 1-gram, 2-gram, ... that ends at each row, -1
        where there is none.
    """
    keys, inside = torch.zeros_like(ids), torch.ones_like(mask)
    found = []
    for n in range(size):
        if n:  # the (n - 1)-gram that ended one row before
            keys = F.pad(keys[..., :-1], (1, 0))
            inside = F.pad(inside[..., :-1], (1, 0), value=False)
        keys = (keys * MULTIPLIER + ids + 1) % PRIME  # (N,) or (B, T)
        inside = inside & mask
        found.append((keys * SCRAMBLE % PRIME % buckets).masked_fill(~inside, -1))
    return torch.stack(found)  # (size, N) or (size, B, T)


def distinct_keys(found: Tensor, text: Tensor, buckets: int) -> Tensor:
    """The distinct buckets of each text, as sorted keys text * buckets + bucket, (D,) int64.

    Equal buckets of different orders stay distinct only if the texts differ: what is counted once
    is the bucket, in fitting as well as here.

    Args:
        found: (size, N) as of `ngram_buckets`.
        text: (N,) the text that each row belongs to.
        buckets: number of buckets.
    """
    return (text * buckets + found)[found >= 0].unique()


def distinct_ngrams(ids: np.ndarray, lengths: np.ndarray, size: int, buckets: int) -> Tensor:
    """What `distinct_keys` makes of `ngram_buckets`, in few passes over texts that lie end to end.

    Args:
        ids: (M,) token ids.
        lengths: (B,) tokens of each text.
        size: tokens of the longest n-gram.
        buckets: number of buckets.

    Returns:
        (D,) int64 text * buckets + bucket, sorted, each once.
    """
    ends = lengths.cumsum()
    parts: list[Tensor] = []
    first = 0
    while first < len(lengths):
        begin = int(ends[first] - lengths[first])
        last = max(first + 1, int(np.searchsorted(ends, begin + CHUNK_TOKENS, "right")))
        here = ids[begin : ends[last - 1]]
        if last == first + 1:
            found = _distinct_of_one(here, size, buckets)
        else:
            found = _distinct_of_some(here, lengths[first:last], size, buckets)
        parts.append(found + first * buckets if first else found)
        first = last
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _distinct_of_one(ids: np.ndarray, size: int, buckets: int) -> Tensor:
    """`distinct_ngrams` of one text; memory does not grow with its length."""
    if len(ids) <= CHUNK_TOKENS:
        return _sorted_and_distinct(np.concatenate(_hashes(ids, size, buckets)), [])
    holds: np.ndarray = np.zeros(buckets, dtype=bool)
    for start in range(0, len(ids), CHUNK_TOKENS):
        first = max(0, start - size + 1)  # n-grams that end in this part may begin before it
        for hashes in _hashes(ids[first : start + CHUNK_TOKENS], size, buckets):
            holds[hashes] = True
    return torch.from_numpy(np.flatnonzero(holds))


def _distinct_of_some(ids: np.ndarray, lengths: np.ndarray, size: int, buckets: int) -> Tensor:
    """`distinct_ngrams` of texts that are sorted together, but for the long ones."""
    # Half as wide where they can be: they are sorted twice as fast.
    dtype = np.int32 if len(lengths) * buckets <= 2**31 else np.int64
    ends = lengths.cumsum()
    place = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)  # of each token in its text
    text = np.repeat(np.arange(len(lengths)) * buckets, lengths)
    keys = np.empty((len(ids), size), dtype=dtype)
    for n, hashes in enumerate(_hashes(ids, size, buckets)):
        hashes += text[n:]
        if n:  # what would begin before its text is none: the single token once more
            keys[:n, n] = keys[:n, 0]
            hashes = np.where(place[n:] >= n, hashes, keys[n:, 0])
        keys[n:, n] = hashes
    stops = ends[:-1][np.diff(ends // SORT_TOKENS) > 0]
    return _sorted_and_distinct(keys.reshape(-1), (stops * size).tolist())


def _sorted_and_distinct(keys: np.ndarray, stops: Sequence[int]) -> Tensor:
    """Sorted keys, each once, int64; those before each stop are below all those after it."""
    for a, b in pairwise([0, *stops, len(keys)]):
        keys[a:b].sort()
    return torch.from_numpy(keys).unique_consecutive().long()


def _hashes(ids: np.ndarray, size: int, buckets: int) -> list[np.ndarray]:
    """The bucket of every n-gram of a row of M ids: (M,) of one token, (M - 1,) of two, ..."""
    tokens = ids.astype(np.int64) + 1
    values, found = tokens, []
    for n in range(size):
        if n:
            values = (values[:-1] * MULTIPLIER + tokens[n:]) % PRIME
        found.append(_remainder(values * SCRAMBLE % PRIME, buckets))
    return found


def sum_of_distinct(keys: Tensor, texts: int, weight: Tensor) -> Tensor:
    """(texts, K): the sum of the weights (buckets, K) of each text's distinct buckets."""
    if texts == 1:
        return weight.index_select(0, keys).sum(dim=0, keepdim=True)
    buckets = len(weight)
    offsets = torch.searchsorted(keys, torch.arange(texts, device=keys.device) * buckets)
    return F.embedding_bag(_remainder(keys, buckets), weight, offsets, mode="sum")


def _remainder(keys: Keys, buckets: int) -> Keys:
    """`keys % buckets`: of a power of two a mask, which takes a fifth to a tenth of the time."""
    return keys % buckets if buckets & (buckets - 1) else keys & (buckets - 1)


class NGramEvidence(nn.Module):
    """Adds up the weights of the distinct n-grams of each text.

    Args:
        size: tokens of the longest n-gram.
        buckets: rows of the table.
        num_labels: K.
        smoothing: for `fit`, added to every count of naive Bayes.
    """

    def __init__(
        self, size: int, buckets: int, num_labels: int, smoothing: float = SMOOTHING
    ) -> None:
        super().__init__()
        self.size = size
        self.buckets = buckets
        self.smoothing = smoothing
        # Buffers: no optimizer touches them, `fit` and `fuse` set them.
        self.register_buffer("weight", torch.zeros(buckets, num_labels))
        self.register_buffer("bias", torch.zeros(num_labels))

    weight: Tensor
    bias: Tensor

    def forward(
        self, ids: Tensor, layout: Rows, output_evidence: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Evidence of n-grams, without the bias.

        Args:
            ids: (N,) token ids in the rows layout.
            layout: where the texts lie.
            output_evidence: also return the share of each token.

        Returns:
            (B, K) its sum over each text, and (N, K) the share of each token if asked for: an
            n-gram's weight is divided among its occurrences, and there among its tokens.
        """
        found = ngram_buckets(ids, layout.mask[:, 0], self.size, self.buckets)  # (size, N)
        texts = len(layout.index)
        if not output_evidence:
            distinct = distinct_keys(found, layout.text, self.buckets)
            return sum_of_distinct(distinct, texts, self.weight), None
        order, end = (found >= 0).nonzero(as_tuple=True)  # (M,) each
        keys = layout.text[end] * self.buckets + found[order, end]
        distinct, place, count = keys.unique(return_inverse=True, return_counts=True)
        logits = sum_of_distinct(distinct, texts, self.weight)
        weights = self.weight[distinct % self.buckets]  # (D, K)
        share = (weights / count[:, None])[place] / (order[:, None] + 1)  # (M, K)
        evidence = weights.new_zeros(len(ids), weights.shape[1])
        for back in range(self.size):
            reaches = order >= back
            evidence = evidence.index_add(0, end[reaches] - back, share[reaches])
        return logits, evidence  # (B, K), (N, K)


def buckets_of_texts(
    rows: Sequence[np.ndarray], size: int, buckets: int
) -> tuple[np.ndarray, np.ndarray]:
    """`ngram_buckets` of texts laid end to end, each followed by one separator.

    Returns:
        (size, N) buckets, and (N,) the text that each row belongs to.
    """
    lengths = np.array([len(row) + 1 for row in rows])
    ids = np.zeros(lengths.sum(), dtype=np.int64)
    mask = np.ones(len(ids), dtype=bool)
    mask[lengths.cumsum() - 1] = False
    ids[mask] = np.concatenate(rows)
    found = ngram_buckets(torch.from_numpy(ids), torch.from_numpy(mask), size, buckets)
    return found.numpy(), np.repeat(np.arange(len(rows)), lengths)


def features(rows: Sequence[np.ndarray], size: int, buckets: int) -> sparse.csr_matrix:
    """(n, buckets) ones where a text has an n-gram of that bucket."""
    import scipy.sparse as sparse

    indices, counts = [], []
    for chunk in _chunks(rows):
        lengths = np.array([len(row) for row in chunk])
        keys = distinct_ngrams(np.concatenate(chunk), lengths, size, buckets).numpy()
        indices.append((keys % buckets).astype(np.int32))
        counts.append(np.bincount(keys // buckets, minlength=len(chunk)))
    columns = np.concatenate(indices)
    starts = np.concatenate([[0], np.concatenate(counts).cumsum()])
    ones = np.ones(len(columns), dtype=np.float32)
    return sparse.csr_matrix((ones, columns, starts), shape=(len(rows), buckets))


def _chunks(rows: Sequence[np.ndarray]) -> Iterator[Sequence[np.ndarray]]:
    """Consecutive texts of up to `CHUNK_TOKENS` tokens, or a longer one, put end to end at once."""
    start = tokens = 0
    for i, row in enumerate(rows):
        if start < i and tokens + len(row) > CHUNK_TOKENS:
            yield rows[start:i]
            start, tokens = i, 0
        tokens += len(row)
    if start < len(rows):
        yield rows[start:]


def fit(
    branch: NGramEvidence,
    rows: Sequence[np.ndarray],
    labels: np.ndarray,
    class_weights: Sequence[float] | None = None,
    sample_weight: np.ndarray | None = None,
) -> None:
    """Set the weights of the branch from labelled texts: each class against all others.

    With two classes the evidence for one is the negative of that for the other. N-grams of fewer
    than `LEAST_TEXTS` texts get none, unless all are so rare.

    Args:
        branch: its `weight` and `bias` are overwritten.
        rows: token ids of each text.
        labels: (n,) class index of each text.
        class_weights: factor on the loss of each class.
        sample_weight: (n,) how often each text counts; once if None.
    """
    counts = features(rows, branch.size, branch.buckets)
    if class_weights is not None:
        by_class = np.asarray(class_weights)[labels]
        sample_weight = by_class if sample_weight is None else sample_weight * by_class
    texts = np.bincount(counts.indices, minlength=1)
    common = np.flatnonzero(texts >= min(LEAST_TEXTS, texts.max()))
    weight, bias = fit_naive_bayes_regression(
        counts[:, common],
        labels,
        len(branch.bias),
        smoothing=branch.smoothing,
        sample_weight=sample_weight,
    )
    device = branch.weight.device
    branch.weight.zero_()
    branch.weight[torch.from_numpy(common).to(device)] = torch.from_numpy(weight).to(device)
    branch.bias.copy_(torch.from_numpy(bias))


def fit_naive_bayes_regression(
    counts: sparse.csr_matrix,
    labels: np.ndarray,
    classes: int,
    *,
    c: float = INVERSE_REGULARIZATION,
    smoothing: float,
    sample_weight: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One NB-weighted logistic regression for each class against all others; of two, one does.

    Args:
        counts: (n, V) ones where a text has a feature.
        labels: (n,) class indices.
        classes: K.
        c: inverse regularization.
        smoothing: added to every count of naive Bayes.
        sample_weight: (n,) how often each text counts; once if None.

    Returns:
        Weight (V, K) and bias (K,) of the logits.
    """
    weight: np.ndarray = np.zeros((counts.shape[1], classes), dtype=np.float32)
    bias: np.ndarray = np.zeros(classes, dtype=np.float32)
    for label in [1] if classes == 2 else range(classes):
        is_label = labels == label
        if not is_label.any():  # no n-gram speaks for it, and it is at best as rare as this
            bias[label] = -np.log(len(labels) + 1)
            continue
        if is_label.all():  # of many classes the others say as much; of two this is all there is
            bias[label] = np.log(len(labels) + 1) if classes == 2 else 0.0
            continue
        weight[:, label], bias[label] = _fit_one(counts, is_label, c, smoothing, sample_weight)
    if classes == 2:
        weight = np.stack([-weight[:, 1], weight[:, 1]], axis=1) / 2
        bias = np.array([-bias[1], bias[1]], dtype=np.float32) / 2
    return weight, bias


def _fit_one(
    counts: sparse.csr_matrix,
    is_label: np.ndarray,
    c: float,
    smoothing: float,
    sample_weight: np.ndarray | None,
) -> tuple[np.ndarray, float]:
    """Weight (buckets,) and bias of "is it this class?"."""
    import scipy.sparse as sparse
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    times = np.ones(len(is_label)) if sample_weight is None else sample_weight
    inside = smoothing + counts[is_label].T @ times[is_label]  # (V,)
    outside = smoothing + counts[~is_label].T @ times[~is_label]  # (V,)
    ratio = np.log(inside / inside.sum()) - np.log(outside / outside.sum())
    ratio = ratio.astype(np.float32)
    scaled = sparse.csr_matrix((ratio[counts.indices], counts.indices, counts.indptr), counts.shape)
    regression = LogisticRegression(C=c, solver="liblinear", dual=True, tol=0.01, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near enough, after 100 passes
        regression.fit(scaled, is_label, sample_weight)
    return regression.coef_[0] * ratio, float(regression.intercept_[0])


def predict(branch: NGramEvidence, rows: Sequence[np.ndarray]) -> np.ndarray:
    """(n, K) logits of the branch alone."""
    counts = features(rows, branch.size, branch.buckets)
    return np.asarray(counts @ branch.weight.cpu().numpy() + branch.bias.cpu().numpy())


def out_of_fold_logits(
    branch: NGramEvidence,
    rows: Sequence[np.ndarray],
    labels: np.ndarray,
    class_weights: Sequence[float] | None = None,
    sample_weight: np.ndarray | None = None,
) -> np.ndarray | None:
    """(n, K) logits of each text by a branch fitted to the other folds; None if `folds` has none.

    Fitted to few texts it is too sure of others. A validation split of a few dozen texts hardly
    tells by how much; all labelled texts do.

    Args:
        branch: gives the sizes; it is left as it is.
        rows, labels, class_weights, sample_weight: as of `fit`.
    """
    parts = folds(len(rows))
    logits = np.zeros((len(rows), len(branch.bias)))  # (n, K)
    other = NGramEvidence(branch.size, branch.buckets, len(branch.bias), branch.smoothing)
    for rest, held in parts:
        weight = None if sample_weight is None else sample_weight[rest]
        fit(other, [rows[i] for i in rest], labels[rest], class_weights, weight)
        logits[held] = predict(other, [rows[i] for i in held])
    return logits if parts else None
