"""The benchmark of the image networks: what it counts, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Script

from nin_text import NiNImageConfig, NiNImageForImageClassification
from nin_text.image_speed import resnet_of


def test_the_residual_network_has_about_as_many_parameters() -> None:
    for parameters, channels in ((350_000, 1), (967_000, 3), (1_986_000, 3)):
        network = resnet_of(parameters, channels).eval()
        found = sum(p.numel() for p in network.parameters())
        assert found == pytest.approx(parameters, rel=0.15)
        with torch.inference_mode():
            assert network(torch.rand(2, channels, 28, 28)).logits.shape == (2, 10)


def test_the_script_measures_every_network_and_says_what_it_counted(
    script: Script, tmp_path: Path
) -> None:
    options = ("--models", "nin-tutorial", "--image-size", 8, "--batch-size", 4, "--rounds", 2)
    result = script("benchmark_image", *options, "--output-dir", "out").result
    assert json.loads((tmp_path / "out" / "image_benchmark.json").read_text()) == result
    rows = {(row["network"], row["work"]): row for row in result["rows"]}
    assert set(rows) == {
        ("convolution", "limit"),
        *(
            (name, work)
            for name in ("nin-tutorial", "resnet")
            for work in ("prediction", "training")
        ),
    }
    assert rows["convolution", "limit"]["share_of_limit"] == 1.0
    assert all(row["images_per_second"] > 0 for row in rows.values())
    # A multiplication and an addition for each weight of each of the 64 positions.
    config = NiNImageConfig.from_preset("nin-tutorial", num_labels=10, image_size=8)
    model = NiNImageForImageClassification(config)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    counted = rows["nin-tutorial", "prediction"]["gflops_per_image"]
    assert counted == pytest.approx(2 * 64 * weights / 1e9, abs=1e-4)
    assert rows["nin-tutorial", "training"]["gflops_per_image"] > 2 * counted


def test_an_unknown_network_is_a_mistake(script: Script) -> None:
    complaint = script("benchmark_image", "--models", "resnet18").complaint
    assert "there is no image network 'resnet18'" in complaint
