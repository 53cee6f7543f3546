"""The image models: the paper's networks, class maps that add up, one block for text and images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessorPil, pipeline

from nin_text import (
    IMAGE_PRESETS,
    NiNImageConfig,
    NiNImageForImageClassification,
    NiNTextConfig,
    NiNTextForSequenceClassification,
)
from nin_text.blocks import MLPConv, global_average_pool, pool_image, pooled_size
from nin_text.configuration import with_pointwise_layers
from nin_text.image import EIGENVALUE_BIAS, InputNormalization, augment, map_size

# Parameters of the networks as their author configured them: classes, count.
PAPER = {
    "nin-cifar10": (10, 966_986),
    "nin-cifar100": (100, 984_356),
    "nin-svhn": (10, 1_986_026),
    "nin-mnist": (10, 349_674),
}
# Beside the presets: every option that a preset leaves out.
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in IMAGE_PRESETS},
    "inception, layer norm": {
        "block_channels": [[12, 8], [8, 12, 8]],
        "kernel_sizes": [[1, 3], [3, 5]],
        "pool": ["average", "none"],
        "norm": "layer",
        "residual": True,
        "hidden_act": "gelu",
    },
    "fully connected": {
        "block_channels": [[12, 8]],
        "kernel_sizes": [[3]],
        "pool": ["max"],
        "head": "fully_connected",
    },
}


def make_model(name: str, **overrides: Any) -> NiNImageForImageClassification:
    """A small-image version of a network: 12 pixels a side, 3 classes."""
    options = {"image_size": 12, "num_labels": 3, **VARIANTS[name], "hidden_dropout": 0.0}
    options |= {"image_size": 12, **overrides}
    torch.manual_seed(0)
    preset = name in IMAGE_PRESETS
    config = NiNImageConfig.from_preset(name, **options) if preset else NiNImageConfig(**options)
    return NiNImageForImageClassification(config)


def images(model: NiNImageForImageClassification, n: int = 2, seed: int = 0) -> torch.Tensor:
    """(n, C, H, W) between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    size, channels = model.config.image_size, model.config.num_channels
    return torch.rand(n, channels, size, size, generator=generator)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_networks_have_the_papers_parameter_counts(name: str) -> None:
    classes, count = PAPER[name]
    config = NiNImageConfig.from_preset(name, num_labels=classes)
    with torch.device("meta"):
        model = NiNImageForImageClassification(config)
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_modern_network_has_at_most_a_million_parameters() -> None:
    for channels, classes in ((1, 10), (3, 100)):
        config = NiNImageConfig.from_preset("nin-modern", num_channels=channels, num_labels=classes)
        with torch.device("meta"):
            model = NiNImageForImageClassification(config)
        assert sum(p.numel() for p in model.parameters()) <= 1_000_000


def test_a_papers_network_equals_one_written_out_with_torchs_own_layers() -> None:
    """The author's MNIST network, layer by layer, on the same weights."""
    model = make_model("nin-mnist", image_size=28, num_labels=10).eval()
    ours = [
        layer
        for block in model.blocks
        for layer in (block.spatial.convs[0], *block.pointwise)  # type: ignore[union-attr,index]
    ]
    ours.append(model.classifier)
    shapes = [(1, 96, 5), (96, 64, 1), (64, 48, 1), (48, 128, 5), (128, 96, 1), (96, 48, 1)]
    shapes += [(48, 128, 5), (128, 96, 1), (96, 10, 1)]
    layers: list[nn.Module] = []
    for i, ((inputs, outputs, kernel), layer) in enumerate(zip(shapes, ours, strict=True)):
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        conv.weight.data.copy_(layer.weight.view(conv.weight.shape))  # type: ignore[operator,union-attr]
        conv.bias.data.copy_(layer.bias)  # type: ignore[union-attr]
        layers += [conv, nn.ReLU()]
        if i in (2, 5):
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
    reference = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = images(model, 4)
    with torch.inference_mode():
        assert torch.allclose(model(x).logits, reference(x), atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = make_model(name, rectified_logits=False).train()
    model(images(model, 4), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.parametrize("name", VARIANTS)
def test_a_network_can_learn_32_images_by_heart(name: str) -> None:
    # Without the author's first weights, with which the loss stays where it is for hundreds of
    # steps, and his rectified class maps, of which one that is zero everywhere learns no more.
    options = {"initializer_std": None, "rectified_logits": False}
    model = make_model(name, image_size=8, **options).train()
    x = images(model, 32)
    labels = torch.arange(32) % 3
    model.normalization.fit((x.movedim(1, -1) * 255).round().to(torch.uint8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(300):
        output = model(x, labels=labels)
        wrong = int((output.logits.argmax(1) != labels).sum())
        if wrong == 0:
            return
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    pytest.fail(f"{wrong} are still wrong, the loss is {output.loss:.3f}")


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "fully connected"])
def test_the_mean_of_the_class_maps_is_the_logits(name: str) -> None:
    model = make_model(name).eval()
    with torch.inference_mode():
        output = model(images(model), output_class_maps=True)
    side = map_size(model.config)
    assert output.class_maps.shape == (2, side, side, 3)
    assert torch.allclose(output.class_maps.mean(dim=(1, 2)), output.logits, atol=1e-5)


def test_a_fully_connected_head_has_no_class_maps() -> None:
    model = make_model("fully connected").eval()
    assert model(images(model)).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="no class maps"):
        model(images(model), output_class_maps=True)


def test_the_text_network_equals_an_image_network_of_height_one() -> None:
    """The same weights in the middle row of square kernels, texts of equal length as images."""
    torch.manual_seed(0)
    config = NiNTextConfig(
        vocab_size=40,
        embedding_size=12,
        block_channels=[[16, 10, 12], [16, 12]],
        kernel_sizes=[[5], [3]],
        residual=True,
        norm=True,
        num_labels=4,
    )
    text = NiNTextForSequenceClassification(config).eval()
    ids = torch.randint(1, 40, (3, 17))
    with torch.inference_mode():
        x = text.nin.embeddings(ids)[:, None]  # (B, 1, T, E): height one
        for block, channels, (kernel,) in zip(
            text.nin.blocks, config.block_channels, config.kernel_sizes, strict=True
        ):
            image_block = MLPConv(12, channels, [kernel], dims=2, norm="layer", residual=True)
            state = block.state_dict()
            weight = torch.zeros(channels[0], 12, kernel, kernel)
            weight[:, :, kernel // 2] = state["spatial.convs.0.weight"]
            image_block.load_state_dict(state | {"spatial.convs.0.weight": weight})
            x = image_block(x)
        maps = text.classifier(text.nin.final_norm(x))  # (B, 1, T, K)
        assert torch.allclose(global_average_pool(maps), text(ids).logits, atol=1e-5)


@given(size=st.integers(1, 40), kind=st.sampled_from(["max", "average"]))
@settings(deadline=None, max_examples=60)
def test_pooling_halves_and_rounds_up(size: int, kind: str) -> None:
    x = torch.randn(1, size, size, 2)
    pooled = pool_image(x, kind)
    assert pooled.shape == (1, pooled_size(size), pooled_size(size), 2)
    assert abs(pooled.shape[1] - size / 2) <= 1
    assert torch.isfinite(pooled).all()
    assert pooled.max() <= x.max() and pooled.min() >= x.min()


def test_every_size_that_a_network_is_made_for_is_the_size_of_its_maps() -> None:
    for size in (4, 7, 12, 28, 33):
        model = make_model("nin-cifar10", image_size=size).eval()
        maps = model(images(model), output_class_maps=True).class_maps
        assert maps.shape[1] == map_size(model.config)


# ---- input -------------------------------------------------------------------------------------


def random_images(n: int, size: int, channels: int) -> torch.Tensor:
    """(n, H, W, C) uint8 whose pixels depend on each other, as those of pictures do."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 3, 3, generator=generator)
    smooth = nn.functional.interpolate(coarse, size, mode="bilinear")
    noisy = smooth + 0.1 * torch.rand(n, channels, size, size, generator=generator)
    return (noisy / 1.1 * 255).to(torch.uint8).movedim(1, -1)


def test_channels_are_brought_to_mean_zero_and_variance_one() -> None:
    pictures = random_images(50, 8, 3)
    normalization = InputNormalization(NiNImageConfig(image_size=8))
    normalization.fit(pictures)
    x = normalization(pictures.float() / 255)
    assert torch.allclose(x.mean(dim=(0, 1, 2)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(x.std(dim=(0, 1, 2)), torch.ones(3), atol=1e-3)


def test_whitening_leaves_no_correlation() -> None:
    """Of whitened values the covariance has the eigenvalues e / (e + bias)."""
    pictures = random_images(2000, 5, 3)
    normalization = InputNormalization(NiNImageConfig(image_size=5, normalization="zca"))
    normalization.fit(pictures)
    x = normalization(pictures.float() / 255).flatten(1)
    assert torch.allclose(x.mean(0), torch.zeros(75), atol=1e-3)
    covariance = (x.t() @ x / len(x)).double()
    inverse = torch.linalg.inv(normalization.scale.double())  # (e + bias) ** 0.5
    eigenvalues = torch.linalg.eigvalsh(inverse) ** 2 - EIGENVALUE_BIAS
    expected = torch.sort(eigenvalues / (eigenvalues + EIGENVALUE_BIAS)).values
    assert torch.allclose(torch.linalg.eigvalsh(covariance), expected, atol=1e-3)
    assert expected[1:].min() > 0.5  # all but the direction that contrast normalization took out


def test_contrast_normalization_ignores_brightness_and_contrast() -> None:
    normalization = InputNormalization(NiNImageConfig(image_size=5, normalization="zca"))
    normalization.fit(random_images(100, 5, 3))
    x = torch.rand(4, 5, 5, 3)
    assert torch.allclose(normalization(x), normalization(0.3 + 0.4 * x), atol=1e-3)
    assert torch.isfinite(normalization(torch.full((1, 5, 5, 3), 0.5))).all()


@given(
    shift=st.integers(0, 3), flip=st.booleans(), erase=st.integers(0, 4), seed=st.integers(0, 99)
)
@settings(deadline=None, max_examples=60)
def test_augmentation_moves_mirrors_and_erases(
    shift: int, flip: bool, erase: int, seed: int
) -> None:
    """Every pixel of the result comes from one that is at most `shift` away, mirrored or not."""
    torch.manual_seed(seed)
    x = 1 + torch.arange(2 * 6 * 7, dtype=torch.float32).view(2, 6, 7, 1)
    changed = augment(x, shift=shift, flip=flip, erase=erase)
    assert changed.shape == x.shape
    for before, after in zip(x[..., 0], changed[..., 0], strict=True):
        candidates = []
        for picture in (before, before.flip(1)) if flip else (before,):
            padded = nn.functional.pad(picture, (shift, shift, shift, shift))
            for dy in range(2 * shift + 1):
                for dx in range(2 * shift + 1):
                    candidates.append(padded[dy : dy + 6, dx : dx + 7])
        differing = [(candidate != after) for candidate in candidates]
        gone = [
            difference
            for difference in differing
            if not after[difference].any() and difference.sum() <= erase * erase
        ]
        assert gone


def test_augmentation_is_for_training_alone_and_repeats_under_a_seed() -> None:
    model = make_model("nin-tutorial", shift=2, flip=True, erase=3)
    x = images(model, 8)
    model.train()
    torch.manual_seed(1)
    first = model(x).logits
    assert not torch.allclose(first, model(x).logits)
    torch.manual_seed(1)
    assert torch.equal(first, model(x).logits)
    model.eval()
    assert torch.equal(model(x).logits, model(x).logits)


# ---- saving ------------------------------------------------------------------------------------


def test_what_is_saved_is_what_was_made(tmp_path: Path) -> None:
    """Statistics of normalization included, and in a fresh process under another seed."""
    expected = {}
    for name in ("nin-cifar10", "nin-modern", "fully connected"):
        model = make_model(name)
        model.normalization.fit(random_images(64, 12, 3))
        for _ in range(2):  # running statistics that are not the first ones
            model.train()(images(model, 8))
        model.eval().save_pretrained(tmp_path / name)
        assert not list(tmp_path.glob("*/*.bin"))
        expected[name] = model(images(model)).logits.detach()
    save_file({"x": images(model)}, tmp_path / "x")
    code = (
        "import sys, torch, nin_text\n"
        "from safetensors.torch import load_file, save_file\n"
        "from transformers import AutoModelForImageClassification as Auto\n"
        "torch.manual_seed(7)\n"
        "x, logits = load_file('x')['x'], {}\n"
        "for name in sys.argv[1:]:\n"
        "    model = Auto.from_pretrained(name).eval()\n"
        "    logits[name] = model(x).logits.detach()\n"
        "save_file(logits, 'logits')\n"
    )
    subprocess.run([sys.executable, "-c", code, *expected], check=True, cwd=tmp_path)
    for name, logits in load_file(tmp_path / "logits").items():
        assert torch.equal(logits, expected[name]), name


@pytest.mark.parametrize("name", ["nin-modern", "nin-cifar10", "fully connected"])
def test_a_model_loads_in_half_the_bits(name: str, tmp_path: Path) -> None:
    """And normalizes its input in all of them."""
    model = make_model(name, rectified_logits=False).eval()
    model.normalization.fit(random_images(64, 12, 3))
    model.save_pretrained(tmp_path)
    half = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.classifier.weight.dtype == torch.bfloat16
    assert torch.equal(half.normalization.scale, model.normalization.scale)
    x = random_images(8, 12, 3).movedim(-1, 1).float() / 255
    with torch.inference_mode():
        expected = model(x).logits
        for logits in (half(x).logits, half.bfloat16()(x.bfloat16()).logits):
            assert torch.isfinite(logits).all()
        assert (half(x).logits - expected).norm() < 0.1 * expected.norm()


def test_the_auto_classes_know_the_image_models() -> None:
    config = AutoConfig.for_model("nin_image", block_channels=[[8, 8]], kernel_sizes=[[3]])
    assert isinstance(config, NiNImageConfig)
    model = AutoModelForImageClassification.from_config(config)
    assert isinstance(model, NiNImageForImageClassification)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_image_classification_pipeline_gives_the_models_answers(
    channels: int, tmp_path: Path
) -> None:
    """For a picture of another size, too; grey models get the grey picture that was opened."""
    model = make_model("nin-modern", num_channels=channels).eval()
    model.normalization.fit(random_images(64, 12, channels))
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 12, "width": 12}, do_normalize=False).save_pretrained(
        tmp_path
    )
    pixels = random_images(1, 12, channels)[0].numpy()
    Image.fromarray(pixels.squeeze()).save(tmp_path / "small.png")
    Image.fromarray(np.kron(pixels, np.ones((5, 5, 1), np.uint8)).squeeze()).save(
        tmp_path / "large.png"
    )
    classify = pipeline("image-classification", model=str(tmp_path))
    with torch.inference_mode():
        x = torch.from_numpy(pixels).movedim(-1, 0)[None].float() / 255
        expected = model(x).logits.softmax(1)[0].max().item()
    assert classify(str(tmp_path / "small.png"))[0]["score"] == pytest.approx(expected, abs=1e-4)
    large = {answer["label"] for answer in classify(str(tmp_path / "large.png"))}
    assert large == set(model.config.id2label.values())


def test_blocks_with_other_numbers_of_1x1_convolutions() -> None:
    blocks = [[96, 64, 48], [128, 96]]
    assert with_pointwise_layers(blocks, 0) == [[96], [128]]
    assert with_pointwise_layers(blocks, 1) == [[96, 48], [128, 96]]
    assert with_pointwise_layers(blocks, 2) == [[96, 64, 48], [128, 96, 96]]
    assert with_pointwise_layers(blocks, 3) == [[96, 64, 64, 48], [128, 96, 96, 96]]
    assert with_pointwise_layers([[32]], 2) == [[32, 32, 32]]


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_channels", [], "block_channels is empty"),
        ("block_channels", [[]], "at least one channel count"),
        ("kernel_sizes", [[3], [3]], "kernel_sizes has 2 entries for 1 blocks"),
        ("pool", ["median"], "pool must hold"),
        ("strides", [0], "must be positive"),
        ("image_size", -1, "must be positive"),
        ("shift", 32, "shift must be in"),
        ("initializer_std", -1.0, "initializer_std must be positive"),
        ("hidden_dropout", 1.0, "hidden_dropout must be in"),
        ("norm", "group", "norm"),
        ("head", "linear", "head"),
    ],
)
def test_a_configuration_that_no_network_can_have_is_refused(
    field: str, value: Any, message: str
) -> None:
    with pytest.raises(Exception, match=message):
        NiNImageConfig(**{field: value})


def test_a_matrix_that_does_not_fit_into_memory_is_refused() -> None:
    with pytest.raises(Exception, match="zca whitening of 3,145,728 values"):
        NiNImageConfig(image_size=1024, normalization="zca")
    assert NiNImageConfig(image_size=64, normalization="zca").image_size == 64


def test_an_unknown_preset_names_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="nin-cifar10"):
        NiNImageConfig.from_preset("nin-cifar11")
    with pytest.raises(ValueError, match="NiNImageConfig has no hiden_dropout"):
        NiNImageConfig.from_preset("nin-cifar10", hiden_dropout=0.1)


def test_images_of_another_size_are_refused() -> None:
    model = make_model("nin-tutorial").eval()
    with pytest.raises(ValueError, match="images must be"):
        model(torch.rand(1, 3, 11, 12))


def test_batch_normalization_of_texts_and_residuals_of_unequal_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="for images"):
        MLPConv(8, [8], norm="batch")
    with pytest.raises(ValueError, match="stride 1"):
        MLPConv(8, [8], dims=2, stride=2, residual=True)
