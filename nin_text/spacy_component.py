"""The spaCy component `nin_textcat`: a trained classifier writes class probabilities to `doc.cats`.

It only answers: training is for `scripts/train_text.py`. Once nin-text is installed, spaCy finds it
by its name; importing this module registers it, too.
There is no `from __future__ import annotations` here: spaCy 3.8.7 and before checks arguments by
their types and cannot read names of types.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from nin_text.errors import UserError

try:
    import srsly
    from spacy.language import Language
    from spacy.pipeline.pipe import Pipe
    from spacy.pipeline.textcat import textcat_score
    from spacy.tokens import Doc
    from spacy.util import minibatch
except ImportError as error:
    raise UserError("spaCy is not installed; pip install 'nin-text[spacy]'") from error

SETTINGS_FILE = "nin_textcat.json"


class NiNTextCategorizer(Pipe):
    """Fills `doc.cats` with the probability of every class.

    Args:
        name: of the component in its pipeline.
        model: run folder, or the hub id of any sequence classifier. It is read when the first text
            comes: a pipeline that is loaded from disk brings a copy, and needs no such folder.
        max_length: cut texts to this many tokens; 0 never, None as in training.
        scorer: what `nlp.evaluate` calls.
    """

    def __init__(
        self,
        name: str,
        model: str,
        max_length: int | None = None,
        scorer: Callable[..., dict[str, Any]] | None = textcat_score,
    ) -> None:
        if max_length is not None and max_length < 0:
            raise UserError(f"max_length of component {name} must not be {max_length}, below zero")
        self.name = name
        self.folder = model
        self.max_length = max_length
        self.scorer = scorer

    @cached_property
    def classifier(self) -> tuple[Any, Any]:
        """Model and tokenizer.

        Raises:
            UserError: if the folder is no model.
        """
        from nin_text import models
        from nin_text.options import trained_max_length

        if not self.folder:
            raise UserError(
                f'component {self.name} has no model; config={{"model": FOLDER}} names the output '
                f"folder of a finished training run"
            )
        folder = models.local(self.folder)
        classifier = models.load(folder)
        if self.max_length is None:
            self.max_length = trained_max_length(folder)
        return classifier

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by index; none as long as there is no model."""
        if not self.folder:
            return ()
        from nin_text.models import label_names

        return tuple(label_names(self.classifier[0]))

    def __call__(self, doc: Doc) -> Doc:
        for classified in self.pipe([doc], batch_size=1):
            return classified
        return doc  # the error handler has taken notice

    def pipe(self, stream: Iterable[Doc], *, batch_size: int = 128) -> Iterator[Doc]:
        """Classify documents in batches of `batch_size`.

        A batch that fails is given to the error handler and left out; by default it raises.
        """
        handle = self.get_error_handler()
        for batch in minibatch(stream, size=batch_size):
            docs = list(batch)
            try:
                for doc, probabilities in zip(docs, self.predict(docs), strict=True):
                    doc.cats.update(zip(self.labels, probabilities.tolist(), strict=True))
            except Exception as error:
                handle(self.name, self, docs, error)
            else:
                yield from docs

    def predict(self, docs: Iterable[Doc]) -> np.ndarray:
        """Class probabilities (n, K). In a text without any token, all classes are equally likely.

        Raises:
            UserError: if the model cannot be loaded.
        """
        from nin_text.evaluation import predict_logits, softmax
        from nin_text.tokenization import clean, truncation

        model, tokenizer = self.classifier
        texts = [clean(doc.text) for doc in docs]
        rows = tokenizer(texts, verbose=False, **truncation(tokenizer, self.max_length))
        rows = [np.asarray(row, dtype=np.int32) for row in rows["input_ids"]]
        filled = [i for i, row in enumerate(rows) if len(row)]
        logits = np.zeros((len(rows), len(self.labels)), dtype=np.float32)
        if filled:
            logits[filled] = predict_logits(
                model, [rows[i] for i in filled], pad_token_id=tokenizer.pad_token_id or 0
            )
        return softmax(logits)

    # ---- saving --------------------------------------------------------------------------------

    def to_disk(self, path: str | Path, *, exclude: Iterable[str] = ()) -> None:
        """Save the model, in safetensors and JSON, to a folder that may exist.

        Files of other names that it holds are left alone.

        Raises:
            UserError: if there is no model to save.
        """
        from nin_text.report import move_files

        model, tokenizer = self.classifier
        path = Path(path)
        aside = path.with_name(f".{path.name}.saving")
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        settings = json.dumps({"max_length": self.max_length})
        (aside / SETTINGS_FILE).write_text(settings, encoding="utf-8")
        path.mkdir(exist_ok=True)
        move_files(aside, path)

    def from_disk(self, path: str | Path, *, exclude: Iterable[str] = ()) -> Self:
        """Load what `to_disk` saved.

        Raises:
            UserError: if it is not there, or damaged.
        """
        path = Path(path)
        try:
            settings = json.loads((path / SETTINGS_FILE).read_text(encoding="utf-8"))
            self.max_length = settings["max_length"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds no saved component nin_textcat ({error})") from error
        self.folder = str(path)
        self.__dict__.pop("classifier", None)
        _ = self.classifier  # now: the folder may be gone when the first text comes
        return self

    def to_bytes(self, *, exclude: Iterable[str] = ()) -> bytes:
        """The files that `to_disk` writes."""
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / self.name
            self.to_disk(folder)
            files = {file.name: file.read_bytes() for file in folder.iterdir()}
        return bytes(srsly.msgpack_dumps(files))

    def from_bytes(self, data: bytes, *, exclude: Iterable[str] = ()) -> Self:
        """Load what `to_bytes` gave."""
        with tempfile.TemporaryDirectory() as place:
            for name, content in srsly.msgpack_loads(data).items():
                (Path(place) / Path(name).name).write_bytes(content)
            return self.from_disk(place)


@Language.factory(
    "nin_textcat",
    assigns=["doc.cats"],
    default_config={"model": "", "max_length": None},
    default_score_weights={"cats_score": 1.0},
)
def make_nin_textcat(
    nlp: Language, name: str, model: str, max_length: int | None
) -> NiNTextCategorizer:
    """The component as spaCy makes it; see `NiNTextCategorizer`."""
    return NiNTextCategorizer(name, model, max_length)
