"""The size of a plan's views, which a network is built for."""

from __future__ import annotations

import numpy as np

from kdcache.data.item import Item
from kdcache.preprocessing import Inputs
from kdcache.views.plan import ViewPlan
from kdcache_stores import UsageError

#: (C, H, W) of images, or what is given to a network where it is none.
InputShape = tuple[int, int, int] | Item


def view_shape(plan: ViewPlan) -> InputShape:
    """(C, H, W) of the views of a plan, see `view_size`; or what they are where they are no images."""
    if plan.dataset.item is not None:
        return plan.dataset.item
    shape = plan.dataset.image_shape
    channels = plan.dataset.decode(0).shape[0] if shape is None else shape[0]
    return channels, *view_size(plan)


def input_shape(inputs: Inputs, plan: ViewPlan) -> InputShape:
    """(C, H, W) of what a network is given of the views of a plan, grey ones as it sees them."""
    return inputs if isinstance(inputs, Item) else (inputs.channels, *view_size(plan))


def view_size(plan: ViewPlan) -> tuple[int, int]:
    """Height and width of the views of a plan in pixels.

    Raises:
        UsageError: the views differ in size.
    """
    shape = plan.dataset.image_shape
    # Two sizes as a probe: an augmentation that gives one size gives it for both.
    sizes = np.array([[331, 257], [256, 340]] if shape is None else [shape[1:]], np.int64)
    outputs = plan.augmentation.output_sizes(sizes)
    if (outputs != outputs[0]).any():
        raise UsageError(
            f"the images of {plan.dataset.name} differ in size and {plan.augmentation.name!r} leaves "
            "them so; a network needs one size: use an augmentation that gives it, such as "
            "resized-crop-flip."
        )
    return int(outputs[0, 0]), int(outputs[0, 1])
