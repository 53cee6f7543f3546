"""The block: one definition for rows, padded texts and images; padding never leaks in."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nin_text.blocks import (
    Dropout,
    MLPConv,
    Rows,
    convolve,
    global_average_pool,
    max_pool_rows,
    pooling_weights,
)

# Lin, Chen & Yan 2013, author's configuration: channels and kernel of each block.
PAPER = {
    "CIFAR-10": (3, [([192, 160, 96], 5), ([192, 192, 192], 5), ([192, 192, 10], 3)], 966_986),
    "CIFAR-100": (3, [([192, 160, 96], 5), ([192, 192, 192], 5), ([192, 192, 100], 3)], 984_356),
    "SVHN": (3, [([128, 96, 64], 5), ([320, 256, 128], 5), ([384, 256, 10], 5)], 1_986_026),
    "MNIST": (1, [([96, 64, 48], 5), ([128, 96, 48], 5), ([128, 96, 10], 5)], 349_674),
}


def random_batch(lengths: list[int], channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(B, T, C) padded on the right with garbage, and its (B, T) mask."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), max([*lengths, 1]), channels, generator=generator)
    mask = torch.arange(x.shape[1])[None] < torch.tensor(lengths)[:, None]
    return x, mask


def to_rows(x: Tensor, layout: Rows) -> Tensor:
    rows = torch.randn(layout.mask.shape[0], x.shape[-1])  # garbage between texts
    rows[layout.index[layout.token_mask]] = x[layout.token_mask]
    return rows


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_networks_have_the_papers_parameter_counts(name: str) -> None:
    channels, blocks, expected = PAPER[name]
    count = 0
    for widths, kernel in blocks:
        block = MLPConv(channels, widths, [kernel], dims=2)
        count += sum(p.numel() for p in block.parameters())
        channels = widths[-1]
    assert count == expected


def test_a_papers_network_maps_an_image_batch_to_one_value_for_each_class() -> None:
    block = MLPConv(3, [16, 12, 10], [5], dims=2)
    out = block(torch.randn(2, 32, 32, 3))
    assert out.shape == (2, 32, 32, 10)
    pooled = global_average_pool(out)
    assert torch.allclose(pooled, out.mean(dim=(1, 2)), atol=1e-6)


def test_a_1x1_convolution_is_linear_on_channels_last() -> None:
    linear = nn.Linear(6, 4)
    x = torch.randn(2, 5, 7, 6)
    reference = nn.functional.conv2d(
        x.movedim(-1, 1), linear.weight[:, :, None, None], linear.bias
    ).movedim(1, -1)
    assert torch.allclose(linear(x), reference, atol=1e-6)


OPTIONS = [
    {},
    {"dilation": 3},
    {"kernel_sizes": [1, 3, 5]},
    {"kernel_sizes": [3, 5], "dilation": 2, "norm": "layer"},
    {"norm": "layer", "residual": True, "activation": "gelu"},
]
# An even 2-D kernel has no middle row, so these have no counterpart of height one.
EVEN = [{"kernel_sizes": [2]}, {"kernel_sizes": [4, 3], "dilation": 2}]


@pytest.mark.parametrize("options", OPTIONS)
def test_one_dimension_is_two_dimensions_of_height_one(options: dict) -> None:
    text = MLPConv(8, [12, 6, 8], **options)
    image = MLPConv(8, [12, 6, 8], dims=2, **options)
    state = text.state_dict()
    for name, weight in image.state_dict().items():
        if weight.dim() == 4:  # (C_out, C_in, k, k): the middle row is the 1-D kernel
            middle = (weight.shape[2] - 1) // 2
            flat, state[name] = state[name], torch.randn_like(weight)
            state[name][:, :, middle] = flat
    image.load_state_dict(state)
    x = torch.randn(3, 17, 8)
    assert torch.allclose(text(x), image(x[:, None])[:, 0], atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS + EVEN)
def test_rows_give_what_each_text_alone_gives(options: dict) -> None:
    torch.manual_seed(1)
    block = MLPConv(8, [12, 6, 8], **options)
    lengths = [4, 1, 0, 9, 2]
    x, mask = random_batch(lengths, 8)
    layout = Rows.from_attention_mask(mask, gap=6)
    y = layout.unpack(block(to_rows(x, layout), layout.mask))
    for i, length in enumerate(lengths):
        if length:
            alone = block(x[i : i + 1, :length])  # nn.Conv1d, the independent path
            assert torch.allclose(y[i, :length], alone[0], atol=1e-5), i
    assert not y[~mask].any()


@pytest.mark.parametrize("options", OPTIONS + EVEN)
def test_rows_and_conv1d_give_equal_gradients(options: dict) -> None:
    """Of weights and of the input, for texts laid end to end and for each by itself."""
    torch.manual_seed(1)
    block = MLPConv(8, [12, 6, 8], **options)
    lengths = [4, 1, 0, 9, 2]
    x, mask = random_batch(lengths, 8)
    layout = Rows.from_attention_mask(mask, gap=6)

    def gradients(output: Callable[[Tensor], Tensor]) -> list[Tensor]:
        given = x.clone().requires_grad_()
        return list(torch.autograd.grad(output(given), [given, *block.parameters()]))

    def of_rows(given: Tensor) -> Tensor:
        return layout.unpack(block(to_rows(given, layout), layout.mask)).square().sum()

    def of_each(given: Tensor) -> Tensor:
        texts = [given[i : i + 1, :n] for i, n in enumerate(lengths) if n]
        return sum((block(text).square().sum() for text in texts), torch.zeros(()))

    for conv1d, rows in zip(gradients(of_each), gradients(of_rows), strict=True):
        assert torch.allclose(conv1d, rows, atol=1e-4)


def test_rows_can_be_traced_and_saved() -> None:
    block = MLPConv(8, [12, 6, 8])
    x, mask = torch.randn(9, 8), torch.ones(9, 1)
    traced = torch.jit.trace(block, (x, mask))
    torch.jit.save(traced, io.BytesIO())
    assert torch.allclose(traced(x, mask), block(x, mask), atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("size", "dilation"), [(1, 1), (3, 1), (4, 2), (5, 3)])
def test_the_gradient_of_a_convolution_over_rows_is_that_of_finite_differences(
    size: int, dilation: int, masked: bool
) -> None:
    conv = nn.Conv1d(3, 2, size, padding="same", dilation=dilation, dtype=torch.float64)
    x = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(11)[:, None] != 4 if masked else None
    assert torch.autograd.gradcheck(
        lambda x, *_: convolve(conv, x, mask), (x, *conv.parameters()), fast_mode=False
    )


@pytest.mark.parametrize("options", OPTIONS + EVEN)
def test_a_mask_hides_padding_from_a_padded_batch(options: dict) -> None:
    block = MLPConv(8, [12, 6, 8], **options)
    x, mask = random_batch([5, 11], 8)
    y = block(x, mask[..., None])
    assert torch.allclose(y[0, :5], block(x[:1, :5])[0], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    gap=st.integers(1, 5),
    stride=st.sampled_from([1, 2, 4]),
    left=st.booleans(),
)
def test_rows_hold_every_token_once_and_keep_texts_apart(
    lengths: list[int], gap: int, stride: int, left: bool
) -> None:
    x, mask = random_batch(lengths, 2)
    if left:
        mask = mask.flip(1)
    layout = Rows.from_attention_mask(mask, gap, stride)
    taken = layout.index[mask]
    assert len(set(taken.tolist())) == sum(lengths) == int(layout.mask.sum())
    assert torch.equal(layout.unpack(to_rows(x, layout)), x * mask[..., None])
    ends = 0
    for i, length in enumerate(lengths):
        rows = layout.index[i][mask[i]]
        assert (layout.text[rows] == i).all()
        if length:
            assert int(rows[0]) % stride == 0
            assert torch.equal(rows, torch.arange(int(rows[0]), int(rows[0]) + length))
            assert int(rows[0]) >= ends
            ends = int(rows[-1]) + 1 + gap
    assert ends <= len(layout.text) or not sum(lengths)


def test_packed_ids_come_back() -> None:
    ids = torch.tensor([[5, 6, 0], [7, 8, 9]])
    layout = Rows.from_attention_mask(ids > 0, gap=2)
    assert layout.pack(ids).tolist() == [5, 6, 0, 0, 7, 8, 9, 0, 0]


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9])
def test_max_pooling_rows_equals_maxpool1d_on_each_text(length: int) -> None:
    x, mask = random_batch([length, 6], 3)
    layout = Rows.from_attention_mask(mask, gap=2, stride=2)
    pooled, pooled_mask = max_pool_rows(to_rows(x, layout), layout.mask)
    reference = nn.MaxPool1d(3, 2, padding=1)(x[:1, :length].movedim(-1, 1)).movedim(1, -1)[0]
    kept = pooled[pooled_mask[:, 0] & (layout.text[::2] == 0)]
    assert kept.shape == reference.shape
    assert torch.equal(kept, reference)
    assert not pooled[~pooled_mask[:, 0]].any()


def test_rows_before_and_after_autocast_agree_roughly() -> None:
    block = MLPConv(16, [16, 16], norm="layer")
    x = torch.randn(20, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = block(x, torch.ones(20, 1))
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), block(x, torch.ones(20, 1)), atol=0.1)


def test_residual_needs_equal_channels() -> None:
    with pytest.raises(ValueError, match="as many channels"):
        MLPConv(8, [12, 6], residual=True)


def test_a_residual_block_adds_its_input() -> None:
    block = MLPConv(4, [4, 4], residual=True)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(3, 4)
    assert torch.equal(block(x), x)


def test_a_plain_block_ends_in_its_activation() -> None:
    block = MLPConv(4, [4, 4], activation="relu")
    assert (block(torch.randn(50, 4)) >= 0).all()


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_dropout_keeps_the_share_and_the_mean(p: float) -> None:
    dropout = Dropout(p)
    x = torch.ones(1001, 301)
    y = dropout(x)
    assert abs(float((y == 0).float().mean()) - p) < 0.01
    assert abs(float(y.mean()) - 1) < 0.02
    assert y.unique().numel() == 2
    assert dropout.eval()(x) is x


def test_dropout_follows_the_seed_and_passes_the_gradient_of_what_it_keeps() -> None:
    dropout = Dropout(0.5)
    x = torch.ones(64, 64, requires_grad=True)
    torch.manual_seed(3)
    y = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(y, dropout(x))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), attention=st.booleans())
def test_pooling_weights_sum_to_one_over_tokens_alone(lengths: list[int], attention: bool) -> None:
    x, mask = random_batch(lengths, 1)
    weights = pooling_weights(mask, 50 * x[..., 0] if attention else None)
    expected = [float(length > 0) for length in lengths]
    assert torch.allclose(weights.sum(dim=1), torch.tensor(expected), atol=1e-6)
    assert not weights[~mask].any()


def test_even_kernels_are_centred_alike_in_both_layouts() -> None:
    """Even kernels: rows and `nn.Conv1d(padding="same")` put the odd zero on the same side."""
    conv = nn.Conv1d(3, 5, 4, padding="same", dilation=3)
    x = torch.randn(11, 3)
    assert torch.allclose(convolve(conv, x), convolve(conv, x[None])[0], atol=1e-5)
