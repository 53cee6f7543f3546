"""Blocks that are compiled for training. Graphs need a GPU: they are in `test_cuda.py`."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_text import STILL, make_model, pad, random_texts
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from nin_text import models
from nin_text.cuda_graphs import block_graphs
from nin_text.errors import UserError
from nin_text.options import TrainOptions, with_recipe
from nin_text.runs import train_text
from nin_text.text import NiNTextForSequenceClassification, NiNTextModel
from nin_text.training import EncodedTexts, text_trainer

CAN_COMPILE = shutil.which("cc") and Path(sysconfig.get_path("include"), "Python.h").is_file()
needs_compiler = pytest.mark.skipif(
    not CAN_COMPILE, reason="there is no C compiler, or no headers of Python"
)


def gradients(
    model: NiNTextForSequenceClassification,
    batch: dict[str, Any],
    autocast: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """The loss of a batch, and its gradients."""
    model.zero_grad()
    with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
        loss = model(**batch).loss
    loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *found]


@needs_compiler
def test_compiled_blocks_have_the_values_and_gradients_of_others() -> None:
    """For batches of several sizes, with a layout made ahead."""
    model = make_model("nin-text-small", **STILL).train()
    batches = []
    for lengths in ([12, 1, 40], [300, 2, 7]):
        batch = pad(random_texts(lengths)) | {"labels": torch.tensor([0, 2, 1])}
        batches.append(batch | {"layout": model.nin.layout_of(batch["attention_mask"])})
    expected = [gradients(model, batch) for batch in batches]
    with block_graphs(model, graphs=False, compiled=True):
        assert model.nin.graphs is not None
        found = [gradients(model, batch) for batch in batches]
    assert model.nin.graphs is None
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_run_pretrains_with_compiled_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with these alone: all other stages are too short."""
    forwards = []

    def pretend_to_compile(block: nn.Module, **options: Any) -> Any:
        assert options == {"dynamic": True}
        return lambda x, mask: (forwards.append(len(x)), block(x, mask))[1]

    monkeypatch.setattr(torch, "compile", pretend_to_compile)
    options: dict[str, Any] = {"model": "nin-text-small", "limit": 100, "quiet": True}
    summary = train_text(
        TrainOptions(output_dir=tmp_path, compile=True, epochs=1, pretrain_epochs=2, **options)
    )
    assert summary["test_accuracy"] > 0.4
    steps = json.loads((tmp_path / "metrics.json").read_text())["options"]
    assert steps["compile"] is True
    batches = 2 * -(-100 // steps["batch_size"])
    assert batches <= len(forwards) <= 2 * batches


def test_a_compiler_that_fails_is_one_sentence() -> None:
    model = make_model("nin-text-small")
    failure = BackendCompilerFailed(lambda: None, RuntimeError("no compiler\n found"), None)
    message = r"--compile failed .*no compiler found.* leave it out"
    compiling = block_graphs(model, graphs=False, compiled=True)
    with pytest.raises(UserError, match=message), compiling:
        raise failure
    assert model.nin.graphs is None


def test_nothing_changes_for_other_networks() -> None:
    with block_graphs(nn.Linear(2, 2), graphs=False, compiled=True):
        pass
    model = make_model("nin-text-small")
    with block_graphs(model, graphs=False, compiled=False):
        assert model.nin.graphs is None


def test_batches_of_a_nin_say_where_their_tokens_lie(tmp_path: Path) -> None:
    """And of no other network; the model takes its word for it."""
    rows = [np.array([3, 4, 5]), np.array([6])]
    for name in ("nin-text-small", "dpcnn"):
        options = with_recipe(TrainOptions(model=name, vocab_size=500), 100)
        texts, labels = ["good film", "bad film"] * 50, np.array([0, 1] * 50)
        model, tokenizer = models.build(options, texts, labels, ["no", "yes"])
        train = EncodedTexts(rows, [0, 1])
        trainer = text_trainer(
            model,
            tokenizer,
            options,
            tmp_path / name,
            train,
            train,
            epochs=1,
            device=torch.device("cpu"),
        )
        (batch,) = trainer.get_train_dataloader()
        if name == "dpcnn":
            assert "layout" not in batch
            continue
        expected = trainer.model.nin.layout_of(batch["attention_mask"])
        for field in ("index", "token_mask", "tokens", "mask", "text"):
            assert getattr(batch["layout"], field).equal(getattr(expected, field))
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(NiNTextModel, "layout_of")  # which is not asked again
            assert trainer.model(**batch).loss.isfinite()
