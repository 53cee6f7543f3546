"""Token ids of many texts at once: words are found and looked up, not tokenized again and again.

The tokenizers that this package trains cut a text at white space and between letters and
punctuation, and give each of the pieces, a word, the same tokens wherever it occurs. `WordTable`
finds all words of a batch in a few passes of NumPy over its bytes and looks them up in a hash
table; a word that is not there yet is given to the tokenizer itself. The ids are those of the
tokenizer, exactly, at a small part of its cost. NumPy releases Python's global lock meanwhile.

Letters in shapes: B texts, L bytes, W words, N tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Lock
from typing import Any

import numpy as np
from tokenizers import Tokenizer

# White space as the tokenizer's regular expressions know it, which is not quite Python's.
LINE_BREAK = re.compile("<br[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*/?>")
_SURROGATE = re.compile("[\ud800-\udfff]")

# Classes of bytes. Words are runs of bytes of one class other than SPACE.
SPACE, LETTER, MARK, OTHER = range(4)
_CLASSES = bytes(
    OTHER
    if byte >= 128
    else SPACE
    if byte in b" \t\n\v\f\r"
    else LETTER
    if chr(byte).isalnum() or byte == ord("_")
    else MARK
    for byte in range(256)
)

KEY_BYTES = 15  # longest word of the table; the sixteenth byte of its key is the word's length
_LOW_BYTES = np.array([2 ** (8 * n) - 1 for n in range(9)], dtype="<u8")
_MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
SLOTS = 2**15  # of an empty table; it doubles when half full
MAX_WORDS = 2**18  # a table with so many is emptied,
MAX_BYTES = 2**24  # and one whose ids and words without a key take so many
LONG_WORDS = 48  # bytes, in the mean, of words of other scripts that are not worth looking up:
# those of a script without spaces, of which each is new
CHUNK_BYTES = 2**18  # looked at together, so that memory stays bounded and near


class WordTable:
    """The ids that a tokenizer gives, faster.

    Safe to be called from several threads.

    Args:
        tokenizer: one that `supports` approves of.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        description = json.loads(tokenizer.to_str())
        self.lowercase = _is_lowercase(description)
        self.special = [token["content"].encode() for token in description["added_tokens"]]
        self.lock = Lock()
        self._clear()

    def _clear(self) -> None:
        # Rows of the table: both halves of the key, and the number of the word; -1 if empty.
        self.slots = _empty(SLOTS)
        self.odd: dict[bytes, int] = {}  # words that have no key: number of each
        self.odd_bytes = 0  # that they are spelled with
        self.first = np.zeros(1, dtype=np.int64)  # (words + 1,): where the ids of each begin
        self.pieces = np.zeros(0, dtype=np.int32)  # ids of all words, end to end

    @staticmethod
    def supports(tokenizer: Tokenizer) -> bool:
        """Whether words get the same tokens wherever they are, by rules that are known here."""
        description = json.loads(tokenizer.to_str())
        normalizer = description["normalizer"] or {}
        steps = list(normalizer.get("normalizers", []))
        if steps and steps[-1] == {"type": "Lowercase"}:
            steps.pop()
        break_to_space = {"type": "Replace", "pattern": {"Regex": r"<br\s*/?>"}, "content": " "}
        return bool(
            steps == [break_to_space, {"type": "NFKC"}]
            and description["pre_tokenizer"] == {"type": "Whitespace"}
            and description["truncation"] is None
            and description["padding"] is None
            and not tokenizer.num_special_tokens_to_add(False)
            and not description["model"].get("dropout")
            and all(
                _is_plain(token) and not token["normalized"]
                for token in description["added_tokens"]
            )
        )

    def encode(
        self, texts: Sequence[str], map_fn: Callable[..., Iterable[Any]] = map
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, and how many each has.

        Args:
            texts: B of them.
            map_fn: calls a function with each of several items, as `map` does, or several at once.

        Returns:
            (N,) int32 and (B,) int64.
        """
        lengths: np.ndarray = np.zeros(len(texts), dtype=np.int64)
        owners: list[int] = []  # the text of each part
        encoded = list(map_fn(self._encode, _chunks(texts, owners)))
        if not encoded:
            return np.zeros(0, dtype=np.int32), lengths
        ids, counts = zip(*encoded, strict=True)
        np.add.at(lengths, owners, np.concatenate(counts))
        return np.concatenate(ids), lengths

    def _encode(self, chunk: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the parts of a chunk, end to end, and how many each has."""
        data = b"\n".join(chunk) + b"\n" * (KEY_BYTES + 2)  # keys may be read beyond the last word
        if (found := self._words(data)) is None:
            return self._without_table(chunk)
        starts, ends, odd = found  # (W,) each
        with self.lock:
            words = self._look_up(data, starts, ends, odd)  # (W,)
            first, pieces = self.first, self.pieces
            if len(first) > MAX_WORDS or self.odd_bytes + pieces.nbytes > MAX_BYTES:
                self._clear()
        begin = first[words]
        counts = first[words + 1] - begin  # (W,)
        total = np.concatenate([[0], counts.cumsum()])  # (W + 1,)
        ids = pieces[np.repeat(begin - total[:-1], counts) + np.arange(total[-1])]
        if len(chunk) == 1:
            return ids, np.array([len(ids)])
        ends_of_parts = np.cumsum([len(part) + 1 for part in chunk])
        return ids, np.diff(total[np.searchsorted(starts, ends_of_parts)], prepend=0)

    def _without_table(self, chunk: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """`_encode` by the tokenizer itself."""
        texts = [part.decode() for part in chunk]
        return ids_end_to_end(self.tokenizer, texts, add_special_tokens=False)

    def _words(self, data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Where the words are: (W,) starts, ends, and whether the word has no key.

        None if the words are not worth looking up.
        """
        kinds = np.frombuffer(bytearray(data.translate(_CLASSES)), dtype=np.uint8)  # (L,)
        special = [match.start() for token in self.special for match in _find(token, data)]
        kinds[special] = OTHER
        if special or not data.isascii():
            # Letters of other scripts may change or split when they are normalized, and so may
            # their neighbours: all from white space to white space is one word.
            spaces = np.flatnonzero(kinds == SPACE)
            odd_bytes = np.diff((kinds == OTHER).cumsum()[spaces], prepend=0)  # before each space
            after = np.flatnonzero(odd_bytes)
            if odd_bytes.sum() > LONG_WORDS * len(after):
                return None
            before = np.where(after > 0, spaces[after - 1] + 1, 0)
            for start, end in zip(before.tolist(), spaces[after].tolist(), strict=True):
                kinds[start:end] = OTHER
        bounds = np.flatnonzero(kinds[1:] != kinds[:-1]) + 1
        if kinds[0] != SPACE:
            bounds = np.concatenate([[0], bounds])
        kind = kinds[bounds]
        words = np.flatnonzero(kind != SPACE)
        starts, ends = bounds[words], bounds[words + 1]  # white space ends the data
        return starts, ends, (kind[words] == OTHER) | (ends - starts > KEY_BYTES)

    def _look_up(
        self, data: bytes, starts: np.ndarray, ends: np.ndarray, odd: np.ndarray
    ) -> np.ndarray:
        """(W,) numbers of the words; new words get one."""
        lowered = data.lower() if self.lowercase else data
        low, high = _keys(lowered, starts, ends - starts)
        words = _find_slots(self.slots, low, high)  # (W,), -1 where there is none
        if words.min(initial=0) >= 0 and not odd.any():
            return words
        unknown = np.flatnonzero((words < 0) & ~odd)
        new: dict[tuple[int, int], int] = {}
        for i, key in zip(
            unknown.tolist(), zip(low[unknown].tolist(), high[unknown].tolist(), strict=True),
            strict=True,
        ):  # fmt: skip
            new.setdefault(key, i)
        places = np.fromiter(new.values(), dtype=np.int64, count=len(new))
        odd_places = np.flatnonzero(odd).tolist()
        spelled = [data[starts[i] : ends[i]] for i in odd_places]
        new_odd = [word for word in dict.fromkeys(spelled) if word not in self.odd]
        if new or new_odd:
            known = len(self.first) - 1
            self._tokenize([data[starts[i] : ends[i]] for i in places] + new_odd)
            self._insert(low[places], high[places], np.arange(known, known + len(new)))
            known += len(new)
            self.odd.update(zip(new_odd, range(known, known + len(new_odd)), strict=True))
            self.odd_bytes += sum(map(len, new_odd))
            words[unknown] = _find_slots(self.slots, low[unknown], high[unknown])
        words[odd_places] = [self.odd[word] for word in spelled]
        return words

    def _tokenize(self, words: list[bytes]) -> None:
        """Ask the tokenizer for the ids of new words."""
        texts = [word.decode() for word in words]
        flat, counts = ids_end_to_end(self.tokenizer, texts, add_special_tokens=False)
        self.first = np.concatenate([self.first, self.first[-1] + counts.cumsum()])
        self.pieces = np.concatenate([self.pieces, flat])

    def _insert(self, low: np.ndarray, high: np.ndarray, words: np.ndarray) -> None:
        """Add keys that are not in the table."""
        while 2 * len(self.first) > len(self.slots):
            old = self.slots[self.slots[:, 2] >= 0]
            self.slots = _empty(2 * len(self.slots))
            _fill(self.slots, old[:, 0].view("<u8"), old[:, 1].view("<u8"), old[:, 2])
        _fill(self.slots, low, high, words)


def ids_end_to_end(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """What a tokenizer says: ids of B texts end to end (N,) int32, how many each has (B,) int64."""
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    rows = [encoding.ids for encoding in encoded]
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    return np.array([i for row in rows for i in row], dtype=np.int32), counts


def cut_and_fill(
    ids: np.ndarray, lengths: np.ndarray, limit: int | None, fallback: int
) -> tuple[np.ndarray, np.ndarray]:
    """Texts cut to a number of tokens; one without any becomes `fallback`.

    Args:
        ids: (N,) of all texts, end to end.
        lengths: (B,) how many each has.
        limit: tokens of a text, or None for no limit.
        fallback: token id.

    Returns:
        The same two arrays of what is left.
    """
    if limit is not None and len(lengths) and lengths.max() > limit:
        place = np.arange(len(ids)) - np.repeat(lengths.cumsum() - lengths, lengths)
        ids, lengths = ids[place < limit], np.minimum(lengths, limit)
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        ids = np.insert(ids, (lengths.cumsum() - lengths)[empty], fallback)
        lengths = np.maximum(lengths, 1)
    return ids, lengths


def clean(text: str) -> str:
    """Replace what no tokenizer accepts: lone surrogates become U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


def _is_lowercase(description: dict) -> bool:
    return {"type": "Lowercase"} in description["normalizer"]["normalizers"]


def _is_plain(token: dict) -> bool:
    """Whether an added token is found wherever its letters are, and only between white space."""
    content = token["content"]
    whole = token["single_word"] or token["lstrip"] or token["rstrip"]
    return not whole and content.isascii() and not re.search(r"\s", content)


def _parts(text: str) -> list[bytes]:
    """A text in UTF-8 without line breaks of HTML, cut at white space if it is long."""
    if "<br" in text:
        text = LINE_BREAK.sub(" ", text)
    try:
        data = text.encode()
    except UnicodeEncodeError:
        data = clean(text).encode()
    if len(data) <= 2 * CHUNK_BYTES:
        return [data]
    parts, start = [], 0
    while len(data) - start > CHUNK_BYTES:
        space = _ASCII_SPACE.search(data, start + CHUNK_BYTES)
        if space is None:
            break
        parts.append(data[start : space.start()])
        start = space.start()
    return [*parts, data[start:]]


def _chunks(texts: Sequence[str], owners: list[int]) -> Iterator[list[bytes]]:
    """Parts of texts, `CHUNK_BYTES` at a time or little more; `owners` gets the text of each."""
    chunk: list[bytes] = []
    size = 0
    for i, text in enumerate(texts):
        for part in _parts(text):
            chunk.append(part)
            owners.append(i)
            size += len(part)
            if size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


_ASCII_SPACE = re.compile(rb"[ \t\n\v\f\r]")


def _find(token: bytes, data: bytes) -> list[re.Match[bytes]]:
    return list(re.finditer(re.escape(token), data)) if token in data else []


def _keys(data: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(W,) halves of the keys: up to fifteen bytes of the word, and its length."""
    # Eight bytes from every place on, read where they lie.
    eight = np.ndarray((len(data) - 7,), dtype="<u8", buffer=data, strides=(1,))
    low = eight[starts] & _LOW_BYTES[np.minimum(lengths, 8)]
    more = np.clip(lengths - 8, 0, 7)
    high = eight[starts + 8] & _LOW_BYTES[more]
    return low, high | (np.minimum(lengths, 255).astype("<u8") << np.uint64(56))


def _empty(slots: int) -> np.ndarray:
    table: np.ndarray = np.zeros((slots, 3), dtype=np.int64)
    table[:, 2] = -1
    return table


def _hash(low: np.ndarray, high: np.ndarray, slots: int) -> np.ndarray:
    mixed = (low * _MIX[0]) ^ (high * _MIX[1])
    mixed ^= mixed >> np.uint64(29)
    mixed *= _MIX[0]
    return (mixed >> np.uint64(64 - (slots.bit_length() - 1))).astype(np.int64)


def _find_slots(table: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(W,) numbers of the words with these keys, -1 where there is none."""
    slot = _hash(low, high, len(table))  # (W,)
    low, high = low.view(np.int64), high.view(np.int64)
    row = table[slot]  # (W, 3)
    words = row[:, 2].copy()
    other = np.flatnonzero((words >= 0) & ((row[:, 0] != low) | (row[:, 1] != high)))
    while len(other):  # the slot holds another word: the next one
        slot[other] = (slot[other] + 1) & (len(table) - 1)
        row = table[slot[other]]
        words[other] = row[:, 2]
        differs = (row[:, 0] != low[other]) | (row[:, 1] != high[other])
        other = other[(row[:, 2] >= 0) & differs]
    return words


def _fill(table: np.ndarray, low: np.ndarray, high: np.ndarray, words: np.ndarray) -> None:
    """Put new keys into the first free slot from their own on."""
    slots = _hash(low, high, len(table)).tolist()
    low, high = low.view(np.int64), high.view(np.int64)
    taken = table[:, 2]
    for i, slot in enumerate(slots):
        while taken[slot] >= 0:
            slot = (slot + 1) & (len(table) - 1)
        table[slot] = low[i], high[i], words[i]
