"""What a classifier may take over: token embeddings, and the answers of a teacher.

Neither is taken unless asked for; what was taken is a note in the run's metrics and model card and
in comparisons, as a model trained on the same data alone does not have it.

- Embeddings (`borrowed_embeddings`): those of a file of word vectors (GloVe, fastText, word2vec as
  text), or what a transformer makes of each token by itself (Tulkens & van Dongen 2024, model2vec).
- Teachers (`Teacher`): classifiers of the same classes, whose probabilities, in the mean, are
  learned beside the labels (Hinton et al. 2015, arXiv 1503.02531).
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from nin_text import models
from nin_text.errors import UserError, in_one_line
from nin_text.evaluation import predict_logits, softmax
from nin_text.hub import is_hub_id
from nin_text.options import TrainOptions, run_metrics, saved_nin, trained_max_length
from nin_text.readers import open_text, reading, suffix_of
from nin_text.tokenization import CONTINUATION, encode

logger = logging.getLogger(__name__)

VECTOR_SUFFIXES = (".txt", ".vec")
MAX_VECTOR = 2**13  # numbers of a vector: their covariance is a square matrix
TOKENS_AT_ONCE = 2048
FEW = 0.1  # share of the tokens with a vector below which there is a warning
NOTE = "taken over: "  # how the note on a run begins


def notes(options: TrainOptions) -> list[str]:
    """What a run takes over, as a note for whoever reads its figures; local folders by name."""
    embeddings = [options.init_embeddings] if options.init_embeddings is not None else []
    sources = {"embeddings of": embeddings, "answers of": options.teacher}
    taken = [
        f"{what} {' and '.join(map(_name, names))}" for what, names in sources.items() if names
    ]
    before = [options.model] if saved_nin(options.model) else []
    for source in dict.fromkeys([*before, *options.teacher]):
        inherited = of_run(run_metrics(source))
        taken += [f"{_name(source)} has {note.removeprefix(NOTE)}" for note in inherited]
    return [NOTE + ", ".join(taken)] if taken else []


def of_run(metrics: dict[str, Any]) -> list[str]:
    """Those notes on a run that say what it took over."""
    found = metrics.get("notes")
    texts = found if isinstance(found, list) else []
    return [note for note in texts if isinstance(note, str) and note.startswith(NOTE)]


def _name(source: str) -> str:
    """A hub id as it is, and of a path the last part; on one line."""
    return " ".join((source if is_hub_id(source) else Path(source).name).split())


# ---- embeddings --------------------------------------------------------------------------------


def borrowed_embeddings(
    source: str, tokenizer: PreTrainedTokenizerBase, size: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of another origin for the tokens of a vocabulary.

    They are centred and rotated to their principal components, of which the first E are kept, and
    scaled as our random embeddings are: to a mean length of 1 if there are E components, and in
    proportion if there are fewer.

    Args:
        source: a file of word vectors (.txt or .vec, compressed or not), or the folder or hub id
            of a transformer.
        tokenizer: whose tokens are looked up; special ones are not.
        size: E.
        device: where the transformer computes.

    Returns:
        Ids of the tokens that have a vector, (n,), and (n, min(E, D)) float32.

    Raises:
        UserError: if the source is neither, is damaged, or has a vector for hardly any token.
    """
    special = set(tokenizer.all_special_tokens)
    ids = {t: i for t, i in sorted(tokenizer.get_vocab().items()) if t not in special}
    if Path(source).is_file() or suffix_of(Path(source)) in VECTOR_SUFFIXES:
        with reading(Path(source), VECTOR_SUFFIXES):
            found = _read_vectors(Path(source), set(ids))
    else:
        found = _encode_alone(source, list(ids), device)
    share = f"{len(found):,} of the {len(ids):,} tokens of the vocabulary have a vector in {source}"
    if len(found) < 2:
        raise UserError(
            f"{share}; check that it is of the same language and case, and of a word and its "
            f"numbers, with spaces between, on each line if it is a file"
        )
    log = logger.warning if len(found) < FEW * len(ids) else logger.info
    log("%s", share)
    vectors = np.stack([*found.values()])  # (n, D)
    if not np.ptp(vectors, axis=0).any():
        raise UserError(f"all tokens have the same vector in {source}; it tells nothing of them")
    return np.array([ids[token] for token in found]), _principal(vectors, size)


def _principal(vectors: np.ndarray, size: int) -> np.ndarray:
    """(n, D) to the first principal components (n, min(size, D)), of the scale of embeddings."""
    vectors = vectors.astype(np.float64)
    vectors /= np.abs(vectors).max()
    vectors -= vectors.mean(axis=0)
    _, directions = np.linalg.eigh(vectors.T @ vectors)  # by rising variance
    reduced = vectors @ directions[:, ::-1][:, :size]
    length = np.sqrt(reduced.shape[1] / size)
    return (reduced * (length / np.linalg.norm(reduced, axis=1).mean())).astype(np.float32)


def _read_vectors(path: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """The vector (D,) float32 of each wanted word that the file has; the first if it has several.

    Raises:
        UserError: if the line of a wanted word has fewer numbers than D, or others than numbers.
    """
    found: dict[str, np.ndarray] = {}
    size = 0  # D, of the header or of the first line
    logger.info("reading word vectors from %s", path)
    with open_text(path, errors="replace") as (lines, _):
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            word, *rest = line.split(None, 1)
            numbers = rest[0] if rest else ""
            if not size:
                is_header = word.isdecimal() and numbers.strip().isdecimal()  # words, D
                size = int(numbers) if is_header else len(numbers.split())
                if not 1 <= size <= MAX_VECTOR:
                    raise UserError(
                        f"{path} begins with a line of {size:,} numbers after the word; there "
                        f"must be 1 to {MAX_VECTOR:,}, with spaces between"
                    )
                if is_header:
                    continue
            if word not in wanted or word in found:
                continue
            values = numbers.split()
            if len(values) > size:  # a word that holds spaces
                continue
            try:
                found[word] = np.array(values, dtype=np.float32)
            except ValueError:
                values = []
            if len(values) != size or not np.isfinite(found[word]).all():
                raise UserError(
                    f"{path}, line {number}: not a word and {size} finite numbers; check that the "
                    f"file is whole"
                )
    return found


def _encode_alone(
    source: str, tokens: Sequence[str], device: torch.device
) -> dict[str, np.ndarray]:
    """Mean of the last hidden states (D,) of each token, read alone by a transformer.

    Tokens that it does not know, either, are left out.
    """
    encoder, tokenizer, _ = models.load_encoder(source, _no_embeddings)
    try:
        return _hidden_states(encoder.to(device).eval(), tokenizer, tokens, device)  # type: ignore[arg-type]
    except Exception as error:
        raise UserError(_no_embeddings(source, error)) from error


def _hidden_states(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[str],
    device: torch.device,
) -> dict[str, np.ndarray]:
    texts = [token.removeprefix(CONTINUATION) for token in tokens]
    encoded = tokenizer(texts, truncation=True, return_special_tokens_mask=True)
    by_length: defaultdict[int, list[tuple[str, list[int]]]] = defaultdict(list)
    for token, ids, special in zip(
        tokens, encoded["input_ids"], encoded["special_tokens_mask"], strict=True
    ):
        own = [i for i, added in zip(ids, special, strict=True) if not added]
        if own and set(own) != {tokenizer.unk_token_id}:
            by_length[len(ids)].append((token, ids))
    found: dict[str, np.ndarray] = {}
    total = sum(map(len, by_length.values()))
    bar = tqdm(total=total, desc="embeddings", unit="tokens", leave=False, disable=None)
    with torch.inference_mode(), bar:
        for length, items in by_length.items():
            step = max(1, TOKENS_AT_ONCE // length)
            for start in range(0, len(items), step):
                names, rows = zip(*items[start : start + step], strict=True)
                input_ids = torch.tensor(rows, device=device)  # (n, T)
                hidden = encoder(input_ids=input_ids).last_hidden_state  # (n, T, D)
                found |= zip(names, hidden.float().mean(dim=1).cpu().numpy(), strict=True)
                bar.update(len(names))
    return found


def _no_embeddings(source: str, error: Exception) -> str:
    reason = in_one_line(error)
    return (
        f"no embeddings could be had from {source!r} ({reason}); give a file of word vectors "
        f"({' or '.join(VECTOR_SUFFIXES)}), or the folder or hub id of a transformer"
    )


# ---- teachers ----------------------------------------------------------------------------------


class Teacher:
    """A trained classifier that is asked about texts.

    Args:
        name: ready-made model, run folder, or hub id.
        label_names: the K class names in the order wanted; the teacher must have the same ones,
            though perhaps in upper or lower case.

    Raises:
        UserError: if it is no classifier, or tells other classes.
    """

    def __init__(self, name: str, label_names: Sequence[str]) -> None:
        folder = models.local(models.packaged(name))
        self.model, self.tokenizer = models.load(folder)
        self.max_length = trained_max_length(folder)
        its, ours = models.label_names(self.model), list(label_names)
        folded = [label.casefold() for label in its], [label.casefold() for label in ours]
        if set(its) != set(ours) and len(set(folded[1])) == len(ours):
            its, ours = folded
        if sorted(its) != sorted(ours):
            raise UserError(
                f"the teacher {name} tells the classes {', '.join(its[:8])}, not "
                f"{', '.join(label_names[:8])}; give one that has been trained on this data set"
            )
        self.order = [its.index(label) for label in ours]

    def probabilities(
        self, rows: Sequence[np.ndarray], *, device: torch.device, bf16: bool, batch_tokens: int
    ) -> np.ndarray:
        """Class probabilities (n, K) float32 of texts.

        Args:
            rows: what `read` made of each.
            device, bf16, batch_tokens: of the computation.
        """
        logits = predict_logits(
            self.model.to(device),  # type: ignore[arg-type]
            rows,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            batch_tokens=batch_tokens,
            autocast=torch.bfloat16 if bf16 else None,
            progress="asking the teacher",
        )
        self.model.to("cpu")  # type: ignore[arg-type]  # there may be more teachers than fit
        return softmax(logits)[:, self.order].astype(np.float32)

    def read(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, as long as the teacher's training texts were."""
        return encode(self.tokenizer, texts, self.max_length, progress="encoding for the teacher")

    def reads_as(self, other: Teacher) -> bool:
        """Whether another teacher reads a text alike, as far as can be told."""
        mine, its = self.tokenizer, other.tokenizer
        return (
            (self.max_length, mine.model_max_length) == (other.max_length, its.model_max_length)
            and isinstance(mine, PreTrainedTokenizerFast)
            and isinstance(its, PreTrainedTokenizerFast)
            and _rules(mine) == _rules(its)
        )


def _rules(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What a tokenizer does to a text, without what the last call has left in it."""
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return rules | {"truncation": None, "padding": None}


def mean_probabilities(
    teachers: Sequence[Teacher], texts: Sequence[str], **computation: Any
) -> np.ndarray:
    """Class probabilities (n, K) float32 of texts: the mean of what one teacher and more say.

    Args:
        teachers: those that read alike are best named one after another: it is read once for them.
        texts: what they are asked about.
        computation: as of `Teacher.probabilities`.
    """
    answers = []
    for number, teacher in enumerate(teachers):
        logger.info("asking teacher %d of %d", number + 1, len(teachers))
        if number == 0 or not teacher.reads_as(teachers[number - 1]):
            rows = teacher.read(texts)
        answers.append(teacher.probabilities(rows, **computation))
    return np.mean(answers, axis=0)
