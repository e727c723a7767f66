"""Runs of the vision transformer of `tests.trained` over digits, in groups that are classes and by chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from attncap.corpus import CorpusOptions
from attncap.options import ScanOptions
from attncap.scan import scan
from attncap.types import StatSpec
from tests import trained

A_CLASS = 12  # images of each


def make_digit_runs(folder: Path, digits_model: Any) -> tuple[Path, Path]:
    """Scans of the digits that the model was not trained on: by class, and by groups drawn at random."""
    model = folder / "model"
    digits_model.save_pretrained(model)
    transformers.ViTImageProcessor(
        do_resize=False, do_rescale=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": 8, "width": 8}
    ).save_pretrained(model)
    # The scan's images have three colours, so the projection is given the mean of them.
    _reads_colours(model)
    pixels, digit = (part[trained.held_out()] for part in trained.digits())
    source = np.random.default_rng(0)
    for digit_class in range(trained.CLASSES):
        for place in (digit == digit_class).nonzero()[:A_CLASS, 0].tolist():
            image = Image.fromarray(((pixels[place, 0] + 1) * 127.5).round().numpy().astype(np.uint8))
            for kind, group in (("class", digit_class), ("chance", source.integers(trained.CLASSES))):
                path = folder / kind / str(group) / f"{place}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    for kind in ("class", "chance"):
        scan(
            str(model),
            [str(folder / kind)],
            folder / f"run-{kind}",
            spec=StatSpec(distance=True),
            corpus_options=CorpusOptions(group_by="folder"),
            options=ScanOptions(keep=("sequences",), workers=1),
        )
    return folder / "run-class", folder / "run-chance"


def _reads_colours(folder: Path) -> None:
    """Make the saved model one of images of three equal colours, which it takes the mean of."""
    model = transformers.ViTForImageClassification.from_pretrained(folder)
    grey = model.vit.embeddings.patch_embeddings.projection
    colours = torch.nn.Conv2d(3, grey.out_channels, 2, stride=2)
    with torch.no_grad():
        colours.weight.copy_(grey.weight.expand(-1, 3, -1, -1) / 3)
        colours.bias.copy_(grey.bias)
    model.vit.embeddings.patch_embeddings.projection = colours
    model.config.num_channels = 3
    model.save_pretrained(folder)
