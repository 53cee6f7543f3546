"""Devices, precision and memory."""

from __future__ import annotations

import pytest
import torch

from nin_text.device import pick_device, use_bf16
from nin_text.errors import UserError


def test_a_device_that_is_not_there_is_refused() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("tpu", "cuda:99", "cpu:x", "meta"):
        with pytest.raises(UserError, match="--device"):
            pick_device(name)


def test_precision_is_what_was_asked_for() -> None:
    cpu = torch.device("cpu")
    assert use_bf16("bf16", cpu)
    assert not use_bf16("fp32", cpu)
    assert use_bf16("auto", cpu) == torch.cpu._is_avx512_bf16_supported()
