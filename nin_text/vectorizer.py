"""A NiN encoder as a scikit-learn vectorizer."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin, clone
from sklearn.utils.validation import check_is_fitted

from nin_text.errors import UserError
from nin_text.estimator import NiNTextClassifier
from nin_text.estimator_inputs import as_texts, threads
from nin_text.probe import vectors
from nin_text.text import NiNTextModel
from nin_text.tokenization import encode


class NiNTextVectorizer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Texts to vectors: the pooled output of a NiN encoder.

    Args:
        model: ready-made model or run folder whose encoder is used as it is; `fit` learns nothing.
        classifier: a NiNTextClassifier in place of `model`: `fit` trains a clone of it on labelled
            texts and its encoder is used.
        n_jobs: threads; None leaves the number as it is, -1 is one for each core.

    Attributes:
        encoder_: the Hugging Face model.
        tokenizer_: its tokenizer.
    """

    def __init__(
        self,
        model: str = "imdb-sentiment",
        *,
        classifier: NiNTextClassifier | None = None,
        n_jobs: int | None = None,
    ) -> None:
        self.model = model
        self.classifier = classifier
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: N803
        """Load the encoder, or train it on texts X with labels y if there is a classifier."""
        if self.classifier is None:
            as_texts(X)
            source = NiNTextClassifier.load(self.model)
        elif y is None:
            raise UserError("to train its encoder, NiNTextVectorizer needs labels y")
        else:
            source = clone(self.classifier).fit(X, y)
        self.encoder_: NiNTextModel = source.model_.nin.eval()
        self.tokenizer_, self.max_length_ = source.tokenizer_, source.max_length_
        return self

    def transform(self, X: Any) -> np.ndarray:  # noqa: N803
        """(n, C) float32: one vector for each text."""
        check_is_fitted(self, "encoder_")
        texts = as_texts(X)
        with threads(self.n_jobs):
            rows = encode(self.tokenizer_, texts, self.max_length_)
            return vectors(self.encoder_, rows)

    @property
    def _n_features_out(self) -> int:
        return self.encoder_.config.hidden_size

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        tags.requires_fit = True
        return tags
