"""The image models: the paper's two-dimensional networks, of the same blocks as the text's.

Input normalization, mlpconv blocks with pooling between them (see `blocks.py`), a 1x1 convolution
to one map for each class, and global average pooling: the logit of a class is the mean of its map,
so the map tells which region spoke for the class (`output_class_maps=True`).

Normalization and augmentation are layers of the model: what is saved is all that an image with
values between 0 and 1 needs, and both are computed where the model is.

Importing this module registers the class with transformers' AutoModelForImageClassification.
Letters in shapes: see `blocks.py`; H and W are height and width, h and w those of the class maps.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from nin_text.blocks import NORMS, Dropout, MLPConv, global_average_pool, pool_image, pooled_size
from nin_text.configuration import NiNImageConfig
from nin_text.modeling import classification_loss, he_initialization

# Of global contrast normalization and ZCA whitening, as the paper takes them from Goodfellow et al.
# 2013 (arXiv 1302.4389): every image gets this norm, and this is added to every eigenvalue.
CONTRAST_NORM = 55.0
EIGENVALUE_BIAS = 0.1


@dataclass
class NiNImageClassifierOutput(ModelOutput):
    """Output of the classifier.

    Attributes:
        loss: scalar, if labels were given.
        logits: (B, K).
        class_maps: (B, h, w, K) if asked for; its mean over positions is the logits.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    class_maps: Tensor | None = None


class InputNormalization(nn.Module):
    """Brings images to the scale that the network learns from; `fit` sets it, the file keeps it.

    Args:
        config: gives `normalization`, and the size of the images.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, config: NiNImageConfig) -> None:
        super().__init__()
        self.whiten = config.normalization == "zca"
        channels = config.num_channels
        size = channels * config.image_size**2 if self.whiten else channels
        # Of a pixel's channels, or of all the values of an image and the matrix that whitens them.
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones((size, size) if self.whiten else size))

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Take mean and scale from (n, H, W, C) uint8 training images."""
        if not self.whiten:
            # From how often each value occurs: as floats, pixels would take eight times the room.
            values = torch.arange(256, dtype=torch.float64) / 255
            for i, plane in enumerate(images.unbind(-1)):
                share = plane.flatten().bincount(minlength=256) / plane.numel()  # (256,)
                mean = (share * values).sum()
                deviation = (share * (values - mean) ** 2).sum().sqrt()
                self.mean[i] = mean
                self.scale[i] = 1 / deviation.clamp(min=1e-3)
            return
        x = _normalize_contrast(images.flatten(1).float() / 255)  # (n, D)
        mean = x.mean(0)
        x = x - mean
        eigenvalues, vectors = torch.linalg.eigh((x.t() @ x / len(x)).double())
        whitening = vectors * (eigenvalues.clamp(min=0) + EIGENVALUE_BIAS).rsqrt() @ vectors.t()
        self.mean.copy_(mean)
        self.scale.copy_(whitening)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) values between 0 and 1 to the same shape, in float32."""
        mean, scale = self.mean.float(), self.scale.float()
        with torch.autocast(x.device.type, enabled=False):
            if not self.whiten:
                return (x.float() - mean) * scale
            flat = _normalize_contrast(x.flatten(1).float())  # (B, H * W * C)
            return ((flat - mean) @ scale).view(x.shape)


def _normalize_contrast(flat: Tensor) -> Tensor:
    """Each row of (n, D) with its mean subtracted, and of norm CONTRAST_NORM unless it is flat."""
    flat = flat - flat.mean(1, keepdim=True)
    norm = flat.norm(dim=1, keepdim=True)
    return flat * (CONTRAST_NORM / torch.where(norm < 1e-6, CONTRAST_NORM, norm))


def augment(x: Tensor, *, shift: int = 0, flip: bool = False, erase: int = 0) -> Tensor:
    """Random changes that leave the class of an image as it is, other ones for each image.

    Args:
        x: (B, H, W, C), normalized: what is moved in from outside, or erased, becomes 0.
        shift: most pixels by which an image is moved in either direction.
        flip: mirror images left to right, each with probability 1/2.
        erase: side of a square blotted out around a random pixel (DeVries & Taylor 2017, arXiv
            1708.04552).
    """
    batch, height, width, _ = x.shape
    device = x.device
    if flip:
        mirrored = torch.rand(batch, 1, 1, 1, device=device) < 0.5
        x = torch.where(mirrored, x.flip(2), x)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    if shift:
        dy, dx = torch.randint(0, 2 * shift + 1, (2, batch, 1), device=device)
        x = F.pad(x, (0, 0, shift, shift, shift, shift))
        image = torch.arange(batch, device=device)[:, None, None]
        x = x[image, (rows + dy)[:, :, None], (columns + dx)[:, None, :]]  # (B, H, W, C)
    if erase:
        y = torch.randint(0, height, (batch, 1), device=device)
        z = torch.randint(0, width, (batch, 1), device=device)
        # Offsets from -erase // 2 on: `erase` of them.
        tall = ((rows - y + erase // 2) >= 0) & ((rows - y + erase // 2) < erase)  # (B, H)
        wide = ((columns - z + erase // 2) >= 0) & ((columns - z + erase // 2) < erase)  # (B, W)
        x = x.masked_fill((tall[:, :, None] & wide[:, None, :])[..., None], 0)
    return x


class NiNImageForImageClassification(PreTrainedModel):
    """The network and its class maps."""

    config: NiNImageConfig
    config_class = NiNImageConfig
    base_model_prefix = "nin"
    main_input_name = "pixel_values"
    input_modalities = "image"
    accepts_loss_kwargs = True
    # A matrix that whitens has entries that cancel, which fewer digits would spoil.
    _keep_in_fp32_modules_strict = ["normalization"]

    def __init__(self, config: NiNImageConfig) -> None:
        super().__init__(config)
        classes = config.num_labels or 0
        if config.class_weights is not None and len(config.class_weights) != classes:
            raise ValueError(f"{len(config.class_weights)} class weights for {classes} labels")
        self.normalization = InputNormalization(config)
        inputs = [config.num_channels, *(c[-1] for c in config.block_channels[:-1])]
        self.blocks = nn.ModuleList(
            MLPConv(
                in_channels,
                channels,
                kernel_sizes,
                dims=2,
                stride=stride,
                activation=config.hidden_act,
                norm=config.norm if i > 0 else "none",
                residual=config.residual and stride == 1 and in_channels == channels[-1],
            )
            for i, (in_channels, channels, kernel_sizes, stride) in enumerate(
                zip(inputs, config.block_channels, config.kernel_sizes, config.strides, strict=True)
            )
        )
        self.dropout = Dropout(config.hidden_dropout)
        self.final_norm = NORMS[config.norm](config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, classes)
        self.head = None
        if config.head == "fully_connected":
            self.head_dropout = Dropout(config.head_dropout)
            self.head = nn.Linear(map_size(config) ** 2 * classes, classes)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        he_initialization(module)
        std = self.config.initializer_std
        if std is not None and isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, InputNormalization):
            nn.init.zeros_(module.mean)
            (nn.init.eye_ if module.whiten else nn.init.ones_)(module.scale)

    def features(self, pixel_values: Tensor) -> Tensor:
        """What the class maps are made of: (B, C, H, W) or, for grey models, RGB, to (B, h, w, C).

        Raises:
            ValueError: if the images have another size than the model's.
        """
        x = pixel_values.movedim(1, -1)  # (B, H, W, C)
        if self.config.num_channels == 1 and x.shape[-1] == 3:
            x = x.mean(-1, keepdim=True)  # libraries hand grey images over as RGB
        expected = (self.config.image_size, self.config.image_size, self.config.num_channels)
        if x.shape[1:] != expected:
            raise ValueError(f"images must be (H, W, C) = {expected}, not {tuple(x.shape[1:])}")
        x = self.normalization(x).to(self.classifier.weight.dtype)
        if self.training:
            config = self.config
            x = augment(x, shift=config.shift, flip=config.flip, erase=config.erase)
        for block, pool in zip(self.blocks, self.config.pool, strict=True):
            x = block(x)  # (B, H, W, C)
            if pool != "none":
                x = self.dropout(pool_image(x, pool))  # (B, H / 2, W / 2, C)
        return self.final_norm(x)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_class_maps: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> NiNImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (B, C, H, W), between 0 and 1; a grey model takes RGB as well.
            labels: (B,) class indices, or (B, K) class probabilities.
            output_class_maps: also return the maps whose means are the logits.
            num_items_in_batch: what the summed loss is divided by, if not by this batch alone.

        Raises:
            ValueError: if the images have another size than the model's, or if class maps are asked
                of a fully connected head.
        """
        maps = self.classifier(self.features(pixel_values))  # (B, h, w, K)
        if self.config.rectified_logits:
            maps = maps.relu()
        if self.head is None:
            logits = global_average_pool(maps.float())  # (B, K)
        elif output_class_maps:
            raise ValueError("a fully connected head has no class maps")
        else:
            logits = self.head(self.head_dropout(maps.flatten(1))).float()
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config, num_items_in_batch)
        return NiNImageClassifierOutput(
            loss=loss, logits=logits, class_maps=maps.float() if output_class_maps else None
        )


def map_size(config: NiNImageConfig) -> int:
    """Height and width of the class maps."""
    size = config.image_size
    for stride, pool in zip(config.strides, config.pool, strict=True):
        size = -(-size // stride)
        size = size if pool == "none" else pooled_size(size)
    return size


AutoModelForImageClassification.register(
    NiNImageConfig, NiNImageForImageClassification, exist_ok=True
)
