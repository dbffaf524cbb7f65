"""Pictures of the samples whose logits vary most over the views, with what was done to each."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from kdcache.data.dataset import Dataset
from kdcache.report.figures import table_csv
from kdcache.report.page import Strip, Tile
from kdcache.report.survey import Survey
from kdcache.views.plan import ViewPlan
from kdcache_stores import Samples, Store
from kdcache_stores.errors import about

COUNT = 20
VIEWS = 6
SIDE = 192  # pixels of a picture in the page; small images grow by whole factors up to it


def varied_samples(
    store: Store, statistics: Survey, dataset: Dataset
) -> tuple[list[Strip], str, bytes]:
    """Strips of the original and of some views, from the teacher's lowest to its highest probability.

    Returns:
        Strips, a CSV of everything under the pictures, and one picture of them all.

    Raises:
        KDCacheError: the dataset is not the one of the store, or its augmentation is a user's own.
    """
    samples = Samples(store.keys, store.labels, store.keys_hashed)
    with about(store.where):
        plan = ViewPlan.from_store(store.plan, dataset, samples, partial=True)
    names = store.plan.class_names
    strips, lines, sheet = [], [], []
    here = [row for row in statistics.most_varied(len(statistics.rows)) if plan.has(int(row))][
        :COUNT
    ]
    for row in map(int, here):
        label = int(store.labels[row])
        logits = np.stack([store.read(view, [row])[0] for view in statistics.views])
        chance = _softmax(logits)
        # By the probability of the label, or of the commonest prediction where there is none.
        wanted = label if label >= 0 else int(np.bincount(logits.argmax(axis=1)).argmax())
        order = np.argsort(chance[:, wanted], kind="stable")
        picked = order[np.unique(np.linspace(0, len(order) - 1, VIEWS).round().astype(int))]
        views = np.array([statistics.views[i] for i in picked])
        images = plan.images(np.full(len(views), row), views)
        parameters, unused = plan.parameters(np.full(len(views), row), views)
        original = dataset.decode(int(plan.dataset_rows[row]))
        truth = _name(label, names) if label >= 0 else "no label"
        tiles = [
            Tile(_png(original), f"{samples.keys[row]} as it is, {truth}", ("original", truth))
        ]
        for place, (index, view) in enumerate(zip(picked, views, strict=True)):
            top, confidence = int(logits[index].argmax()), float(chance[index].max())
            done = _describe(parameters, unused, place)
            prediction = f"{_name(top, names)} {confidence:.0%}"
            tiles.append(
                Tile(_png(images[place]), f"View {view}: the teacher predicts {prediction}",
                     (f"view {view}", prediction, *done))
            )  # fmt: skip
            lines.append(
                (row, samples.keys[row], label, int(view), top, confidence, "; ".join(done))
            )
        varies = statistics.variation[np.flatnonzero(statistics.rows == row)[0]]
        strips.append(Strip(f"{samples.keys[row]}: {truth}; logits vary by {varies:.2f}", tiles))
        sheet.append([_picture(original), *(_picture(image) for image in images)])
    columns = ("row", "key", "label", "view", "prediction", "probability", "augmentation")
    return strips, table_csv(columns, lines), _contact_sheet(sheet)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    chance: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return chance


def _name(label: int, names: list[str] | None) -> str:
    return names[label] if names else f"class {label}"


def _describe(
    parameters: dict[str, np.ndarray], unused: dict[str, np.ndarray], place: int
) -> tuple[str, ...]:
    """The parameters that have an effect on a view, such as "top 2"."""

    def text(value: Any) -> str:
        if isinstance(value, (bool, np.bool_)):
            return "yes" if value else "no"
        return f"{value:.3g}" if isinstance(value, (float, np.floating)) else str(value)

    return tuple(
        f"{name} {text(values[place])}"
        for name, values in parameters.items()
        if not (name in unused and unused[name][place])
    )


def _picture(image: torch.Tensor) -> Image.Image:
    """uint8 (C, H, W) as a picture of at most `SIDE` pixels a side."""
    array = image.cpu().numpy()
    made = Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))
    longest = max(made.size)
    if longest > SIDE:
        made.thumbnail((SIDE, SIDE))
        return made
    factor = SIDE // longest
    return made.resize((made.width * factor, made.height * factor), Image.Resampling.NEAREST)


def _png(image: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    # Small images are sent as they are: the page enlarges them without smoothing.
    array = image.cpu().numpy()
    if max(array.shape[1:]) <= SIDE:
        Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)).save(
            stream, "PNG"
        )
    else:
        _picture(image).save(stream, "PNG")
    return stream.getvalue()


def _contact_sheet(rows: list[list[Image.Image]]) -> bytes:
    gap, columns = 8, max(len(row) for row in rows)
    sheet = Image.new(
        "RGB", (columns * (SIDE + gap) + gap, len(rows) * (SIDE + gap) + gap), "white"
    )
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (gap + x * (SIDE + gap), gap + y * (SIDE + gap)))
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()
