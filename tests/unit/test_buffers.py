"""What is accepted as memory, how it is pinned, and what is said of the rest. No
server.
"""

from __future__ import annotations

import array
import mmap
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fastkv._core import Batch, Command
from fastkv.buffers import pin


def batch(keys: int = 1) -> Batch:
    return Batch(Command.GET, [f"key{i}" for i in range(keys)], None, True)


def pinned(buffers: Any, keys: int = 1, writable: bool = True) -> Batch:
    made = batch(keys)
    pin(made, buffers, writable=writable)
    return made


@pytest.mark.parametrize(
    "buffer",
    [
        bytearray(24),
        memoryview(bytearray(24)),
        memoryview(bytearray(24)).cast("h"),
        memoryview(bytearray(24)).cast("B", (2, 3, 4)),
        array.array("d", [0.0] * 3),
        mmap.mmap(-1, 24),
        np.zeros((2, 3), np.float32),
        np.zeros(3, "datetime64[s]"),
        np.zeros(12, ml_dtypes.bfloat16),
        np.zeros(24, ml_dtypes.float8_e4m3fn),
        np.zeros((), np.complex256 if hasattr(np, "complex256") else np.complex128),
        np.zeros(0),
        bytearray(),
    ],
    ids=lambda b: f"{type(b).__name__}-{getattr(b, 'dtype', '')}",
)
def test_every_kind_of_plain_memory_is_pinned(buffer: Any) -> None:
    assert pinned([buffer]).pins == 1
    assert pinned([(buffer, buffer)]).pins == 2


def test_a_pinned_bytearray_cannot_be_resized_and_a_released_one_can() -> None:
    memory = bytearray(8)
    made = pinned([memory])
    with pytest.raises(BufferError):
        memory.append(1)
    view = memoryview(memory)
    made_of_view = pinned([view])
    del made
    with pytest.raises(BufferError):
        view.release()
    del made_of_view
    view.release()
    memory.append(1)


@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 5), (4,)])
def test_the_first_axis_of_one_array_runs_over_the_keys(shape: tuple[int, ...]) -> None:
    made = pinned(np.zeros(shape, np.uint16), keys=4)
    assert made.pins == 1


@pytest.mark.parametrize(
    ("buffers", "error", "said"),
    [
        (
            [b"read-only"],
            ValueError,
            "'key0': expected writable memory, got a read-only bytes",
        ),
        ([np.zeros((4, 4))[:, 0]], ValueError, "'key0': expected C-contiguous memory"),
        ([np.asfortranarray(np.zeros((4, 4)))], ValueError, "C-contiguous"),
        ([memoryview(bytearray(8))[::2]], ValueError, "C-contiguous"),
        ([17], TypeError, "'key0': expected a buffer .* got int"),
        (["text"], TypeError, "got str"),
        ([None], TypeError, "got NoneType"),
        ([(bytearray(2), 3)], TypeError, "'key0': expected a buffer"),
        ([np.zeros(3, object)], TypeError, "'key0': expected plain data"),
        (
            [bytearray(1), bytearray(1)],
            ValueError,
            "expected 1 buffers, one a key, got 2",
        ),
        (
            [],
            ValueError,
            "expected 1 buffers, one a key, got 0; keys begin with 'key0'",
        ),
        (bytearray(4), TypeError, "one array of shape .1, ....*got bytearray"),
        (5, TypeError, "got int"),
        (
            np.zeros((3, 2)),
            ValueError,
            r"shape \(1, ...\), one row a key, got shape \(3, 2\)",
        ),
        (np.zeros(()), ValueError, r"got shape \(\)"),
        (np.zeros((1, 4, 4))[:, :, ::2], ValueError, "buffers: expected C-contiguous"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    buffers: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        pinned(buffers)


def test_a_refused_batch_leaves_nothing_pinned() -> None:
    memory = bytearray(8)
    with pytest.raises(ValueError):
        pinned([memory, b"read-only"], keys=2)
    memory.append(1)


def test_a_sequence_that_lies_about_its_length_is_refused() -> None:
    class Liar(list[Any]):
        def __len__(self) -> int:
            return 2

    for count in (1, 3):
        with pytest.raises(ValueError, match="while it was read"):
            pinned(Liar([bytearray(1)] * count), keys=2)


def test_fields_may_be_named_as_they_like() -> None:
    assert pinned([np.zeros(2, np.dtype([("Offset", "f4"), ("O", "i4")]))]).pins == 1


def test_read_only_memory_can_be_sent() -> None:
    assert pinned([b"value", memoryview(b"x")], keys=2, writable=False).pins == 2


def test_pins_survive_the_growth_of_their_table() -> None:
    memory = [bytearray(i % 7) for i in range(10_000)]
    made = pinned(memory, keys=10_000)
    assert made.pins == 10_000
    with pytest.raises(BufferError):
        memory[0].append(1)
    del made
    for one in memory:
        one.append(1)
