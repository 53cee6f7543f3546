"""Tokenizers: train one on the training texts, or take any Hugging Face tokenizer.

Trained tokenizers are built with the `tokenizers` library and saved as an ordinary
`PreTrainedTokenizerFast`, so `AutoTokenizer.from_pretrained` loads them without this package.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nin_text.errors import UserError, in_one_line
from nin_text.word_table import WordTable, clean, cut_and_fill

logger = logging.getLogger(__name__)

PAD, UNK, MASK = "[PAD]", "[UNK]", "[MASK]"
SPECIAL_TOKENS = [PAD, UNK, MASK]
KINDS = ("wordpiece", "bpe", "word")
CONTINUATION = "##"

# Characters beyond the most frequent ones become [UNK]: a text in every script of Unicode must
# not spend the vocabulary on single letters.
MAX_ALPHABET = 1000
MAX_WORD_CHARACTERS = 100
# A longer run of letters (a megabyte of base64) is left out of training, which takes a time that
# grows with the square of a word's length.
MAX_TRAINED_CHARACTERS = 1000
_TOO_LONG = re.compile(
    rf"\w{{{MAX_TRAINED_CHARACTERS + 1},}}|[^\w\s]{{{MAX_TRAINED_CHARACTERS + 1},}}"
)
UNLIMITED = int(1e30)  # what transformers itself writes for "no limit"
CACHE_FORMAT = 1  # to be raised when equal texts no longer give an equal tokenizer
CHUNK = 4096  # texts handed to the tokenizer at once
MANY_TEXTS = 512  # from which on looking words up is worth its preparation


def cache_dir() -> Path:
    """Where trained tokenizers are kept: `NIN_TEXT_CACHE`, or `~/.cache/nin-text`."""
    return Path(os.environ.get("NIN_TEXT_CACHE") or Path.home() / ".cache" / "nin-text")


def train_tokenizer(
    texts: Sequence[str],
    *,
    kind: str = "wordpiece",
    vocab_size: int = 30_000,
    lowercase: bool = True,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer; equal texts and options give an equal tokenizer in every process.

    Text is normalized (NFKC, HTML line breaks to spaces, lower case if asked) and split into runs
    of word characters and runs of punctuation. No special tokens are added around a text.

    Args:
        texts: the training texts.
        kind: "wordpiece", "bpe" or "word".
        vocab_size: most tokens that the vocabulary may hold, special tokens included.
        lowercase: fold case.

    Raises:
        ValueError: if `kind` is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown tokenizer kind {kind!r}; there are {', '.join(KINDS)}")
    texts = [_without_endless_words(clean(text)) for text in texts]
    steps = [normalizers.Replace(Regex(r"<br\s*/?>"), " "), normalizers.NFKC()]
    normalizer = normalizers.Sequence(steps + [normalizers.Lowercase()] * lowercase)
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "min_frequency": 2,  # what is seen once can be learned of no other text
        "show_progress": False,
    }
    trainer: trainers.Trainer
    if kind == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
        trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL_TOKENS, **options)
    elif kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token=UNK))
        trainer = trainers.BpeTrainer(
            special_tokens=SPECIAL_TOKENS, limit_alphabet=MAX_ALPHABET, **options
        )
    else:
        alphabet = _alphabet(texts, normalizer)
        tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
        trainer = trainers.WordPieceTrainer(
            # Continuation letters get their ids in hash order, which changes from process to
            # process and breaks ties between merges. As special tokens they come in ours.
            special_tokens=SPECIAL_TOKENS + [CONTINUATION + letter for letter in alphabet],
            limit_alphabet=len(alphabet),
            **options,
        )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "wordpiece":
        tokenizer = _with_sorted_wordpieces(tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        mask_token=MASK,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=UNLIMITED,
        clean_up_tokenization_spaces=False,
    )


def _without_endless_words(text: str) -> str:
    if max(map(len, text.split()), default=0) <= MAX_TRAINED_CHARACTERS:  # the faster question
        return text
    return _TOO_LONG.sub(" ", text)


def _alphabet(texts: Iterable[str], normalizer: normalizers.Normalizer) -> list[str]:
    """The most frequent characters after normalization, most frequent first."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    normalized: Counter[str] = Counter()
    for character, count in counts.items():
        for letter in normalizer.normalize_str(character):
            if not letter.isspace():
                normalized[letter] += count
    ranked = sorted(normalized, key=lambda letter: (-normalized[letter], letter))
    return ranked[:MAX_ALPHABET]


def _with_sorted_wordpieces(trained: Tokenizer) -> Tokenizer:
    """The same tokenizer with ids in alphabetical order and nothing special but three tokens."""
    words = sorted(set(trained.get_vocab()) - set(SPECIAL_TOKENS))
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS + words)}
    model = models.WordPiece(
        vocabulary, unk_token=UNK, max_input_chars_per_word=MAX_WORD_CHARACTERS
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = trained.normalizer
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    return tokenizer


def cached_tokenizer(texts: Sequence[str], **options: object) -> PreTrainedTokenizerFast:
    """`train_tokenizer`, kept in `cache_dir()` under a hash of the texts and the options."""
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, options], sort_keys=True).encode())
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    folder = cache_dir() / "tokenizers" / digest.hexdigest()[:32]
    if (folder / "tokenizer.json").is_file():
        try:
            logger.info("tokenizer: from the cache")
            return PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception:  # a damaged cache entry is trained anew
            logger.warning("the cached tokenizer in %s cannot be read; training it again", folder)
    tokenizer = train_tokenizer(texts, **options)  # type: ignore[arg-type]
    aside = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        tokenizer.save_pretrained(aside)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    except Exception as error:  # of any type: a full disk is an Exception to the library
        shutil.rmtree(aside, ignore_errors=True)
        logger.warning("the tokenizer could not be cached in %s: %s", folder, error)
    return tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer by hub id or folder.

    Raises:
        UserError: if there is none, or it cannot be fetched.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if not tokenizer.model_max_length >= 1:
            raise ValueError(f"model_max_length is {tokenizer.model_max_length}")
    except Exception as error:
        raise UserError(
            f"no tokenizer could be loaded from {name!r} ({in_one_line(error)}); give a folder "
            f"that holds a tokenizer.json, the id of a model on the Hugging Face hub, or one of "
            f"{', '.join(KINDS)} to train one"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def truncation(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> dict[str, Any]:
    """Arguments of a tokenizer's call that cut texts to `max_length` or to what it can take."""
    limit = min(max_length or UNLIMITED, tokenizer.model_max_length)
    return {"truncation": True, "max_length": limit} if limit < UNLIMITED else {}


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int | None = None,
    progress: str | None = None,
) -> list[np.ndarray]:
    """Token ids (int32) of each text; a text without any becomes [UNK].

    Args:
        tokenizer: any Hugging Face tokenizer. Many texts and one of those that are trained here
            are looked up word by word, which gives the same ids.
        texts: any strings.
        max_length: cut texts to this many tokens; None or 0 keeps everything.
        progress: title of a progress bar, or None for no bar.
    """
    cut = truncation(tokenizer, max_length)
    fallback = tokenizer.unk_token_id if tokenizer.unk_token_id is not None else 0
    words = _word_table(tokenizer) if len(texts) >= MANY_TEXTS else None
    ids: list[np.ndarray] = []
    bar = tqdm(
        total=len(texts),
        desc=progress,
        disable=None if progress else True,
        unit="texts",
        leave=False,
    )
    with bar:
        for start in range(0, len(texts), CHUNK):
            batch = texts[start : start + CHUNK]
            if words is not None:
                flat, lengths = words.encode(batch)
                flat, lengths = cut_and_fill(flat, lengths, cut.get("max_length"), fallback)
                ids += [row.copy() for row in np.split(flat, lengths.cumsum()[:-1])]
            else:
                cleaned = [clean(text) for text in batch]
                encoded = tokenizer(cleaned, return_attention_mask=False, verbose=False, **cut)
                rows = encoded["input_ids"]
                ids += [np.asarray(row or [fallback], dtype=np.int32) for row in rows]
            bar.update(len(batch))
    return ids


def _word_table(tokenizer: PreTrainedTokenizerBase) -> WordTable | None:
    """What looks words up as a tokenizer would have them, if it is one that can be looked up."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    backend.no_truncation()  # transformers sets both anew at each call
    backend.no_padding()
    return WordTable(backend) if WordTable.supports(backend) else None
