"""Class maps as one HTML page that stands alone: which region of an image spoke for which class.

A NiN's last layer is one map for each class, and the logit of the class is the map's mean (section
3.2 of the paper); no gradient or second network is needed to draw it. Shown is a map beyond the
mean of all classes' maps, because what all classes share changes no probability. The page loads
nothing and runs no script.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
import torch

from nin_text.evaluation import softmax
from nin_text.explain_page import html_page, visible
from nin_text.image import NiNImageForImageClassification
from nin_text.image_data import ImageSplit
from nin_text.image_training import images_at_a_time, to_pixel_values
from nin_text.models import label_names

MAX_IMAGES = 200
MAX_MISTAKES = 60
FOR, AGAINST = (20, 100, 220), (235, 120, 0)  # blue and orange, which all eyes tell apart
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }
main { display: flex; flex-wrap: wrap; gap: 1rem; }
section { border: 1px solid #ccc; border-radius: 6px; padding: 0.6rem; }
section.wrong { border-color: #c33; }
section p { margin: 0 0 0.4rem; max-width: 23.5rem; overflow-wrap: anywhere; }
.maps { display: flex; gap: 0.5rem; }
figure { margin: 0; text-align: center; max-width: 7.5rem; }
.stack { position: relative; width: 7rem; height: 7rem; }
.stack img { position: absolute; inset: 0; width: 100%; height: 100%; }
.pixels { image-rendering: pixelated; }
figcaption { font-size: 0.8rem; overflow-wrap: anywhere; }
.note { color: #666; max-width: 60rem; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818; }
  .note { color: #999; }
}
"""


def class_maps_html(model: NiNImageForImageClassification, split: ImageSplit, title: str) -> str:
    """A page of images, each with the maps of its answer and of the true or next likely class.

    Args:
        model: with global average pooling; one with a fully connected head has no maps to show.
        split: images and true labels; the first MAX_IMAGES are shown.
        title: heading of the page.
    """
    names = [visible(name) for name in label_names(model)]
    shown = split.take(range(min(len(split), MAX_IMAGES)))
    notes = [
        "The logit of a class is the mean of its map. Blue speaks for the class, orange against "
        "it, compared with the mean of all classes; the deepest colour is the strongest evidence "
        "in the image, for any class."
    ]
    if len(shown) < len(split):
        notes.append(f"Shown are the first {len(shown)} of {len(split):,} images.")
    if model.head is not None:
        notes = ["A network with a fully connected head has no class maps; these are its answers."]
    sections = []
    if len(shown):
        probabilities, maps = _answers(model, torch.from_numpy(shown.images))
        for i, truth in enumerate(shown.labels):
            map_ = None if maps is None else maps[i]
            sections.append(_section(shown.images[i], map_, probabilities[i], truth, names))
    else:
        notes = ["There is nothing to show."]
    heading = escape(visible(title))
    body = f"""<h1>{heading}</h1>
{"".join(f'<p class="note">{escape(note)}</p>' for note in notes)}
<main>
{"".join(sections)}
</main>"""
    return html_page(heading, STYLE, body, "img-src data:")


def _answers(
    model: NiNImageForImageClassification, images: torch.Tensor
) -> tuple[np.ndarray, np.ndarray | None]:
    """Probabilities (n, K), and class maps beyond the mean of the classes (n, h, w, K) if any."""
    was_training = model.training
    model.eval()
    has_maps = model.head is None
    with torch.inference_mode():
        outputs = [
            model(to_pixel_values(batch.to(model.device)), output_class_maps=has_maps)
            for batch in images.split(images_at_a_time(images))
        ]
    model.train(was_training)
    probabilities = softmax(np.concatenate([output.logits.cpu().numpy() for output in outputs]))
    if not has_maps:
        return probabilities, None
    maps = np.concatenate([output.class_maps.cpu().numpy() for output in outputs])
    return probabilities, maps - maps.mean(axis=-1, keepdims=True)


def _section(
    image: np.ndarray,
    maps: np.ndarray | None,
    probabilities: np.ndarray,
    truth: int,
    names: Sequence[str],
) -> str:
    order = np.argsort(-probabilities, kind="stable")
    answer = int(order[0])
    other = truth if truth != answer else int(order[1])
    background = f'<img class="pixels" alt="" src="{_png(image)}">'
    figures = [f'<div class="stack">{background}</div><figcaption>image</figcaption>']
    if maps is not None:
        strongest = max(float(np.abs(maps).max()), 1e-9)
        for k in (answer, other):
            overlay = f'<img alt="" src="{_png(_shade(maps[..., k] / strongest))}">'
            figures.append(
                f'<div class="stack">{background}{overlay}</div>'
                f"<figcaption>{escape(names[k])}<br>{probabilities[k]:.1%}</figcaption>"
            )
    verdict = names[answer] if answer == truth else f"{names[answer]}, truly {names[truth]}"
    return (
        f'<section class="{"right" if answer == truth else "wrong"}"><p>{escape(verdict)}</p>'
        f'<div class="maps">{"".join(f"<figure>{figure}</figure>" for figure in figures)}</div>'
        f"</section>\n"
    )


def _shade(values: np.ndarray) -> np.ndarray:
    """(h, w) from -1 to 1 as (h, w, 4) uint8: blue or orange, the deeper the stronger."""
    shades = np.empty((*values.shape, 4), dtype=np.uint8)
    shades[..., :3] = np.where(values[..., None] > 0, FOR, AGAINST)
    shades[..., 3] = np.round(200 * np.abs(values))
    return shades


def _png(pixels: np.ndarray) -> str:
    """(H, W, C) uint8 as the address of an image that is part of the page."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
