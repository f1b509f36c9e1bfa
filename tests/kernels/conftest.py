"""Let the kernel tests import what they share (`paged_cases`, `aot`) from this folder."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from interpreter import INTERPRETED


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where Triton kernels run: each test of theirs runs twice, on a CPU under the interpreter, in
    a child process that its file starts, and on a CUDA device."""
    if request.param == "interpreter":
        if not INTERPRETED:
            pytest.skip("test_under_the_interpreter runs it in a child process")
        return "cpu"
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and compiled kernels")
    return "cuda"
