"""CPU tensors of PyTorch, without a copy; skipped where torch is not installed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.unit.test_buffers import pinned

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    "dtype",
    [
        "uint8",
        "int64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "bool",
        "complex64",
        "float8_e4m3fn",
        "float8_e5m2",
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 4)])
def test_tensors_of_every_type_and_shape_are_pinned(dtype: str, shape: Any) -> None:
    tensor = torch.zeros(shape, dtype=getattr(torch, dtype))
    assert pinned([tensor]).pins == 1


def test_one_tensor_gives_a_row_to_each_key() -> None:
    assert pinned(torch.zeros(4, 3, dtype=torch.bfloat16), keys=4).pins == 1


def test_a_parameter_that_wants_gradients_is_only_memory() -> None:
    assert pinned([torch.nn.Parameter(torch.zeros(3))]).pins == 1


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: torch.zeros(4, 4).t(), ValueError, "strides"),
        (
            lambda: torch.zeros(4, device="meta"),
            TypeError,
            "CPU tensor, got one on meta",
        ),
        (lambda: torch.zeros(4, 4).to_sparse(), TypeError, "dense"),
        (
            lambda: torch.zeros(4, dtype=torch.complex64).conj(),
            ValueError,
            "resolve_conj",
        ),
    ],
)
def test_tensors_that_are_not_plain_memory_are_refused(
    make: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=f"'key0'.*{said}"):
        pinned([make()])


def test_storage_cannot_be_freed_or_moved_under_a_pin() -> None:
    tensor = torch.zeros(1000, dtype=torch.uint8)
    made = pinned([tensor])
    with pytest.raises(RuntimeError):
        tensor.resize_(10_000_000)
    with pytest.raises(RuntimeError):
        tensor.untyped_storage().resize_(0)
    del made


def test_fastkv_does_not_import_torch_or_numpy() -> None:
    code = (
        "import sys, fastkv, fastkv.asyncio\n"
        "print({'torch', 'numpy'} & set(sys.modules))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert said.stdout == "set()\n"
