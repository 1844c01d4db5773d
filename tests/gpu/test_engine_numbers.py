"""The engine on a GPU: gradients against float64 on the CPU, samples against the trainer's numbers."""

from __future__ import annotations

import pytest
import torch

from tests.bench.gpu_numbers import check_numbers
from tests.bench.gpu_sampling import check_sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def test_numbers_hold() -> None:
    assert [one for one in check_numbers() if not one["holds"]] == []


def test_numbers_of_sampling_hold() -> None:
    assert [one for one in check_sampling() if not one["holds"]] == []
