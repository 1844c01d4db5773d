"""The engine's gradients on a GPU, for each number format and layout, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.bench.gpu_numbers import check_numbers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def test_numbers_hold() -> None:
    assert [one for one in check_numbers() if not one["holds"]] == []
