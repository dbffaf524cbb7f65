"""Warnings are errors, but for two notices of torch on a GPU; this needs none."""

from __future__ import annotations

import warnings

import pytest

NOTICES = [
    "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
    "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. Consider "
    "setting `torch.set_float32_matmul_precision('high')` for better performance.",
]


@pytest.mark.parametrize("text", NOTICES)
def test_a_notice_is_no_error(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=1)
    with pytest.raises(UserWarning, match="of something else"):
        warnings.warn("of something else: " + text, UserWarning, stacklevel=1)
