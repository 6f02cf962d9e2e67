"""What a user may pass as memory: bytearray, numpy, torch ... -> a pin in a `Batch`.

Knows neither commands nor connections.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from fastkv._core import Batch

if TYPE_CHECKING:
    from typing_extensions import Buffer
else:
    Buffer = object


class Tensor(Protocol):
    """A CPU tensor of PyTorch, of any element type."""

    def data_ptr(self) -> int: ...


OneBuffer: TypeAlias = "Buffer | Tensor"
#: One value a key: a buffer, or a tuple of buffers that hold its parts in order. Or one
#: array whose first axis runs over the keys.
Buffers: TypeAlias = "Iterable[OneBuffer | tuple[OneBuffer, ...]] | Buffer | Tensor"

_ACCEPTED = (
    "a buffer (bytearray, memoryview, array, mmap, numpy array), a CPU torch tensor, "
    "or a tuple of them"
)


def pin(batch: Batch, buffers: Buffers, *, writable: bool) -> None:
    """Pin the memory of each key of ``batch``.

    Args:
        batch: Has its keys already.
        buffers: One value a key, or one array of shape ``(keys, ...)``.
        writable: Refuse read-only memory.

    Raises:
        TypeError: Something is no memory that can be used.
        ValueError: It is, but read-only, not contiguous, or not one value a key.
    """
    keys = len(batch)
    shape = _shape_of_array(buffers)
    if shape is None:
        values = _values(buffers, keys)
        if len(values) != keys:
            raise ValueError(
                f"expected {keys} buffers, one a key, got {len(values)}; "
                f"keys begin with {_first(batch)}"
            )
        batch.pin_values(values, writable, as_buffer)
        return
    if not shape or shape[0] != keys:
        raise ValueError(
            f"expected an array of shape ({keys}, ...), one row a key, got shape "
            f"{tuple(shape)}; keys begin with {_first(batch)}"
        )
    batch.pin_rows(buffers, writable, as_buffer)


def as_buffer(value: object, where: str) -> object:
    """Give a tensor the buffer protocol, without a copy.

    The array that is returned keeps the tensor's storage alive and, by PyTorch's own
    rule for tensors that numpy looks into, forbids for good that it is resized.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        raise TypeError(f"{where}: expected {_ACCEPTED}, got {type(value).__name__}")
    if value.device.type != "cpu":
        raise TypeError(
            f"{where}: expected a CPU tensor, got one on {value.device}; copy it to "
            "(pinned) host memory first"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{where}: expected a dense tensor, got {value.layout}")
    if value.is_conj() or value.is_neg():
        raise ValueError(
            f"{where}: expected plain memory, got a lazily conjugated or negated view; "
            "call resolve_conj() or resolve_neg()"
        )
    if not value.is_contiguous():
        raise ValueError(
            f"{where}: expected C-contiguous memory, got a tensor of shape "
            f"{tuple(value.shape)} with strides {tuple(value.stride())}"
        )
    # By way of bytes: numpy has no bfloat16 and no float8. A view(dtype) wants a last
    # dimension, which reshape gives to scalars.
    return value.detach().reshape(-1).view(torch.uint8).numpy()


def _shape_of_array(buffers: object) -> Sequence[int] | None:
    """The shape, if ``buffers`` is one array rather than one value a key."""
    if isinstance(buffers, (list, tuple, bytes, bytearray, str)):
        return None
    shape: Any = getattr(buffers, "shape", None)
    if shape is None:
        return None
    numpy = sys.modules.get("numpy")
    if (
        numpy is not None
        and isinstance(buffers, numpy.ndarray)
        and buffers.dtype.hasobject
    ):
        return None  # an array of buffers is a sequence like any other
    return list(shape)


def _values(buffers: object, keys: int) -> Sequence[object]:
    if isinstance(buffers, (list, tuple)):
        return buffers
    if isinstance(buffers, (bytes, bytearray, str, dict)) or not isinstance(
        buffers, Iterable
    ):
        raise TypeError(
            f"expected {keys} buffers, one a key, or one array of shape ({keys}, ...), "
            f"got {type(buffers).__name__}"
        )
    return list(buffers)


def _first(batch: Batch) -> str:
    return repr(batch.keys[0]) if len(batch) else "none"
