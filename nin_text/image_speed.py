"""How fast the image networks are: what `scripts/benchmark_image.py` measures.

All networks are timed in the same process, in rounds in which each has its turn, so that whatever
else the machine does hits all alike; figures are medians over rounds. The limit is the machine's
own: the rate of one large convolution, measured in the same rounds.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import ResNetConfig, ResNetForImageClassification

from nin_text import report
from nin_text.configuration import NiNImageConfig
from nin_text.device import keep_freed_memory, pick_device, use_bf16
from nin_text.errors import UserError, in_one_line
from nin_text.image import NiNImageForImageClassification
from nin_text.image_options import ImageBenchmarkOptions, check_networks
from nin_text.options import check

logger = logging.getLogger(__name__)

CLASSES = 10
# The convolution whose rate is the limit: 3x3, wide enough to be bound by arithmetic.
PEAK_CHANNELS, PEAK_SIZE, PEAK_BATCH = 256, 16, 64
GPU_TIMES = 16  # as many images on a GPU, which 64 keep busy for less time than it takes to start
RESNET = "resnet"
FILE = "image_benchmark.json"


@dataclass(frozen=True)
class Timed:
    """Something that is timed.

    Attributes:
        run: does the work once.
        images: how many images it takes.
        operations: floating point operations of it; a multiplication and an addition are two.
    """

    run: Callable[[], None]
    images: int
    operations: int


def benchmark_images(options: ImageBenchmarkOptions) -> dict[str, Any]:
    """Images per second of prediction and training, and the share of the measured limit.

    Returns:
        The table as JSON values, also written to `image_benchmark.json` if there is an output
        folder.

    Raises:
        UserError: if a network is not known.
    """
    check(options)
    check_networks(options.models)
    device = pick_device(options.device)
    bf16 = use_bf16(options.precision, device)
    keep_freed_memory()
    torch.manual_seed(0)
    networks: dict[str, nn.Module] = {name: _network(name, options) for name in options.models}
    largest = max(networks.values(), key=_parameters)
    networks[RESNET] = resnet_of(_parameters(largest), _channels(largest))
    for network in networks.values():
        network.to(device)
    rate = _Rates(device, bf16, options.compile)
    systems: dict[tuple[str, str], Timed] = {("convolution", "limit"): rate.limit()}
    for name, network in networks.items():
        pixels = torch.rand(
            options.batch_size, _channels(network), options.image_size, options.image_size
        )
        pixels = pixels.to(device).contiguous(memory_format=torch.channels_last)
        systems[name, "prediction"] = rate.prediction(network, pixels)
        systems[name, "training"] = rate.training(network, pixels)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in systems}
    for round_ in tqdm(range(options.rounds + 1), desc="rounds", disable=None, leave=False):
        for key, system in systems.items():
            took = _time(system.run, device)
            if round_ > 0:  # the first one warms up
                seconds[key].append(took)
    return _result(options, networks, systems, seconds, device, bf16)


def resnet_of(parameters: int, channels: int) -> nn.Module:
    """A residual network (He et al. 2016) for small images, of about as many parameters.

    transformers' implementation, with basic blocks in three stages; the first layer keeps the
    size of the image, as is usual for small ones.
    """

    def build(width: int) -> nn.Module:
        config = ResNetConfig(
            num_channels=channels,
            embedding_size=width,
            hidden_sizes=[width, 2 * width, 4 * width],
            depths=[2, 2, 2],
            layer_type="basic",
        )
        config.num_labels = CLASSES
        model = ResNetForImageClassification(config)
        embedder: Any = model.resnet.embedder
        embedder.embedder.convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        embedder.pooler = nn.Identity()
        return model

    def distance(width: int) -> int:
        with torch.device("meta"):
            return abs(_parameters(build(width)) - parameters)

    return build(min(range(8, 129, 4), key=distance))


def _network(name: str, options: ImageBenchmarkOptions) -> NiNImageForImageClassification:
    try:
        config = NiNImageConfig.from_preset(name, num_labels=CLASSES, image_size=options.image_size)
    except Exception as error:
        raise UserError(f"{name} cannot be built: {in_one_line(error)}") from error
    return NiNImageForImageClassification(config)


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _channels(network: nn.Module) -> int:
    return int(network.config.num_channels)  # type: ignore[union-attr,arg-type]


class _Rates:
    """Makes what is timed, all in the same precision."""

    def __init__(self, device: torch.device, bf16: bool, compiled: bool) -> None:
        self.device, self.compiled = device, compiled
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    def limit(self) -> Timed:
        batch = PEAK_BATCH * (1 if self.device.type == "cpu" else GPU_TIMES)
        shape = (batch, PEAK_CHANNELS, PEAK_SIZE, PEAK_SIZE)
        x = torch.randn(shape, device=self.device, dtype=self.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(
            PEAK_CHANNELS, PEAK_CHANNELS, 3, 3, device=self.device, dtype=self.dtype
        ).contiguous(memory_format=torch.channels_last)

        def run() -> None:
            with torch.inference_mode():
                F.conv2d(x, weight, padding=1)

        return Timed(run, batch, 2 * 9 * PEAK_CHANNELS**2 * batch * PEAK_SIZE**2)

    def prediction(self, network: nn.Module, pixels: Tensor) -> Timed:
        forward = torch.compile(network) if self.compiled else network

        def run() -> None:
            network.eval()
            with torch.inference_mode(), self.autocast():
                forward(pixel_values=pixels)

        network.eval()
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            network(pixel_values=pixels)
        return Timed(run, len(pixels), counter.get_total_flops())

    def training(self, network: nn.Module, pixels: Tensor) -> Timed:
        forward = torch.compile(network) if self.compiled else network
        labels = torch.arange(len(pixels), device=self.device) % CLASSES
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)

        def run() -> None:
            network.train()
            with self.autocast():
                loss = forward(pixel_values=pixels, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        network.train()
        with FlopCounterMode(display=False) as counter:
            network(pixel_values=pixels, labels=labels).loss.backward()
        network.zero_grad()
        return Timed(run, len(pixels), counter.get_total_flops())


def _time(run: Callable[[], None], device: torch.device) -> float:
    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def _result(
    options: ImageBenchmarkOptions,
    networks: dict[str, nn.Module],
    systems: dict[tuple[str, str], Timed],
    seconds: dict[tuple[str, str], list[float]],
    device: torch.device,
    bf16: bool,
) -> dict[str, Any]:
    limit = ("convolution", "limit")
    rows = []
    for (name, work), system in systems.items():
        times = seconds[name, work]
        ratios = [
            system.operations / took / (systems[limit].operations / limit_took)
            for took, limit_took in zip(times, seconds[limit], strict=True)
        ]
        took = statistics.median(times)
        row: dict[str, Any] = {
            "network": name,
            "work": work,
            "images_per_second": round(system.images / took, 1),
            "gflops_per_image": round(system.operations / system.images / 1e9, 4),
            "share_of_limit": round(statistics.median(ratios), 4),
        }
        if (name, work) == limit:
            row["gflops_per_second"] = round(system.operations / took / 1e9, 1)
        else:
            row["parameters"] = _parameters(networks[name])
        rows.append(row)
    result = {
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "precision": "bf16" if bf16 else "fp32",
        "rows": rows,
        "command": report.command(),
        "environment": report.environment(device),
    }
    logger.info("%s", to_markdown(result))
    if options.output_dir is not None:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        report.write_json(Path(options.output_dir) / FILE, result)
    return result


def to_markdown(result: dict[str, Any]) -> str:
    """The table for a page."""
    lines = [
        "| network | parameters | work | images/s | GFLOP an image | share of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        parameters = f"{row['parameters']:,}" if "parameters" in row else "-"
        lines.append(
            f"| {row['network']} | {parameters} | {row['work']} | {row['images_per_second']:,.0f} "
            f"| {row['gflops_per_image']:.3f} | {row['share_of_limit']:.0%} |"
        )
    return "\n".join(lines)
