"""Blocks that are compiled for training. Graphs need a GPU: they are in `test_cuda.py`."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from test_text import make_model, pad, random_texts
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from nin_text.cuda_graphs import block_graphs
from nin_text.errors import UserError
from nin_text.options import TrainOptions
from nin_text.runs import train_text

needs_compiler = pytest.mark.skipif(
    not (shutil.which("cc") and Path(sysconfig.get_path("include"), "Python.h").is_file()),
    reason="there is no C compiler, or no headers of Python",
)


@needs_compiler
def test_compiled_blocks_have_the_values_and_gradients_of_others() -> None:
    """For batches of several sizes, with a layout made ahead."""
    without = {"hidden_dropout": 0.0, "embedding_dropout": 0.0, "word_dropout": 0.0}
    model = make_model("nin-text-small", **without).train()
    batches = [
        pad(random_texts(lengths)) | {"labels": torch.tensor([0, 2, 1])}
        for lengths in ([12, 1, 40], [300, 2, 7])
    ]

    def losses_and_gradients() -> list[torch.Tensor]:
        found = []
        for batch in batches:
            layout = model.nin.layout_of(batch["attention_mask"])
            model.zero_grad()
            loss = model(**batch, layout=layout).loss
            loss.backward()
            found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr]
        return found

    expected = losses_and_gradients()
    with block_graphs(model, graphs=False, compiled=True):
        assert model.nin.graphs is not None
        found = losses_and_gradients()
    assert model.nin.graphs is None
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@needs_compiler
def test_a_run_pretrains_with_compiled_blocks(tmp_path: Path) -> None:
    options = {"model": "nin-text-small", "limit": 100, "epochs": 1, "pretrain_epochs": 1}
    summary = train_text(TrainOptions(output_dir=tmp_path, compile=True, quiet=True, **options))
    assert summary["test_accuracy"] > 0.4


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
