"""What a classifier may take over from outside: token embeddings, and the answers of a teacher.

Both are left alone unless they are asked for; whatever a run took is named in its metrics and its
model card, as a comparison with models trained on the same data alone would be unfair.

- Embeddings (`init_embeddings`): those of a file of word vectors (GloVe, fastText, word2vec as
  text), or what a transformer makes of each token by itself (Tulkens & van Dongen 2024, model2vec).
- A teacher (`teacher_answers`): any sequence classifier for the same labels, whose probabilities
  are learned beside the labels (Hinton et al. 2015, arXiv 1503.02531).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from nin_text import models
from nin_text.errors import UserError
from nin_text.evaluation import predict_logits, softmax
from nin_text.model_files import check_folder, check_weights
from nin_text.readers import open_text, suffix_of
from nin_text.tokenization import CONTINUATION, encode, load_tokenizer

logger = logging.getLogger(__name__)

VECTOR_SUFFIXES = (".txt", ".vec")
TOKENS_AT_ONCE = 2048
TEACHER_LENGTH = 512  # tokens of a text that a teacher reads


def init_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, device: torch.device
) -> None:
    """Start the token embeddings of a classifier from vectors of another origin.

    The vectors are centred and rotated to their principal components, of which the first E are
    kept, and scaled to a mean length of 1, that of the embeddings which they replace. Tokens
    without a vector, special ones among them, and components that the vectors do not have keep
    their random values.

    Args:
        model: whose input embeddings (V, E) are changed in place.
        tokenizer: the model's.
        source: a file of word vectors (.txt or .vec, compressed or not), or the folder or hub id
            of a transformer.
        device: where the transformer computes.

    Raises:
        UserError: if it is neither, or has a vector for hardly any token.
    """
    special = set(tokenizer.all_special_tokens)
    ids = {t: i for t, i in sorted(tokenizer.get_vocab().items()) if t not in special}
    if Path(source).is_file():
        found, vectors = _read_vectors(Path(source), list(ids))
    else:
        found, vectors = _encode_alone(source, list(ids), device)
    if len(found) < 2:
        raise UserError(
            f"{source} has vectors for {len(found)} of the {len(ids):,} tokens of this vocabulary; "
            f"check that it is of the same language and case"
        )
    embeddings: Any = model.get_input_embeddings()
    reduced = torch.from_numpy(_principal(vectors, embeddings.embedding_dim))
    rows = torch.tensor([ids[token] for token in found])
    with torch.no_grad():
        embeddings.weight[rows, : reduced.shape[1]] = reduced
    logger.info("embeddings of %s of %s tokens from %s", f"{len(found):,}", f"{len(ids):,}", source)


def _principal(vectors: np.ndarray, size: int) -> np.ndarray:
    """(n, D) to the first `size` principal components (n, min(size, D)), of mean length 1."""
    centred = vectors - vectors.mean(axis=0)
    _, directions = np.linalg.eigh(centred.T @ centred)  # by rising variance
    reduced = centred @ directions[:, ::-1][:, :size]
    return (reduced / max(float(np.linalg.norm(reduced, axis=1).mean()), 1e-12)).astype(np.float32)


def _read_vectors(path: Path, tokens: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The lines of a file of word vectors that belong to tokens: these, and (n, D) float32.

    Raises:
        UserError: if a line is not a word and as many finite numbers as the first has.
    """
    if suffix_of(path) not in VECTOR_SUFFIXES:
        raise UserError(
            f"{path} is no file of word vectors ({' or '.join(VECTOR_SUFFIXES)}, a word and its "
            f"numbers on each line)"
        )
    wanted, found, size = set(tokens), {}, 0
    with open_text(path) as (lines, _):
        for number, line in enumerate(lines, 1):
            word, _, rest = line.rstrip().partition(" ")
            size = size or len(rest.split(" "))
            if number == 1 and size == 1:  # of fastText and word2vec: how many, of what size
                size = 0
                continue
            if word not in wanted or word in found:
                continue
            numbers = rest.split(" ")
            if len(numbers) > size:  # a word that holds spaces
                continue
            try:
                found[word] = np.array(numbers, dtype=np.float32)
            except ValueError:
                found[word] = np.zeros(0, np.float32)
            if len(found[word]) != size or not np.isfinite(found[word]).all():
                raise UserError(
                    f"{path}, line {number}: not a word and {size} finite numbers; check that the "
                    f"file is whole"
                )
    return list(found), np.stack([*found.values()]) if found else np.zeros((0, 1), np.float32)


def _encode_alone(
    source: str, tokens: Sequence[str], device: torch.device
) -> tuple[list[str], np.ndarray]:
    """Each token read alone by a transformer: mean of its last hidden states, (n, D) float32."""
    encoder, tokenizer = _load_encoder(source)
    encoder.to(device).eval()  # type: ignore[arg-type]
    by_length: defaultdict[int, list[tuple[str, list[int]]]] = defaultdict(list)
    for token in tokens:
        if ids := tokenizer.encode(token.removeprefix(CONTINUATION)):
            by_length[len(ids)].append((token, ids))
    found: list[str] = []
    vectors = []
    bar = tqdm(total=len(tokens), desc="embeddings", unit="tokens", leave=False, disable=None)
    with torch.inference_mode(), bar:
        for length, items in by_length.items():
            step = max(1, TOKENS_AT_ONCE // length)
            for start in range(0, len(items), step):
                part = items[start : start + step]
                ids_of_part = torch.tensor([ids for _, ids in part], device=device)  # (n, T)
                hidden = encoder(input_ids=ids_of_part).last_hidden_state  # (n, T, D)
                vectors.append(hidden.float().mean(dim=1).cpu().numpy())
                found += [token for token, _ in part]
                bar.update(len(part))
    return found, np.concatenate(vectors) if vectors else np.zeros((0, 1), np.float32)


def _load_encoder(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = models.local(models.packaged(source))
    try:
        check_folder(Path(folder))
        encoder = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"no embeddings could be had from {source!r} "
            f"({' '.join(str(error).split())[:200] or type(error).__name__}); give a file of word "
            f"vectors, or the folder or hub id of a transformer"
        ) from error
    check_weights(encoder, source)
    return encoder, load_tokenizer(folder)


def teacher_answers(
    teacher: str,
    texts: Sequence[str],
    names: Sequence[str],
    *,
    device: torch.device,
    bf16: bool,
    batch_tokens: int,
) -> np.ndarray:
    """Class probabilities (n, K) float32 of texts by a trained classifier.

    Args:
        teacher: ready-made model, run folder, or hub id.
        texts: what it is asked.
        names: the K class names, in the order wanted; the teacher must have the same ones.
        device, bf16, batch_tokens: of the teacher's computation.

    Raises:
        UserError: if it is no classifier, or tells other classes.
    """
    model, tokenizer = models.load(models.packaged(teacher))
    its = models.label_names(model)
    if sorted(its) != sorted(names):
        raise UserError(
            f"the teacher {teacher} tells {', '.join(its[:8])}, not {', '.join(names[:8])}; train "
            f"it on the same data set"
        )
    model.to(device)  # type: ignore[arg-type]
    logits = predict_logits(
        model,
        encode(tokenizer, texts, TEACHER_LENGTH, progress="encoding for the teacher"),
        pad_token_id=tokenizer.pad_token_id or 0,
        batch_tokens=batch_tokens,
        autocast=torch.bfloat16 if bf16 else None,
        progress="asking the teacher",
    )
    return softmax(logits)[:, [its.index(name) for name in names]].astype(np.float32)
