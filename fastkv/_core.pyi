# Written by hand, checked against the module by stubtest (make lint). The docstrings
# are in fastkv_ext/_core.pyx.
import enum
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, final

from typing_extensions import Buffer

class Command(enum.IntEnum):
    GET = 0
    SET = 1
    EXISTS = 2
    UNLINK = 3

class Code(enum.IntEnum):
    OK = 0
    CLOSED = 1
    CANCELLED = 2
    TIMED_OUT = 3
    CONNECT_FAILED = 4
    CONNECTION_LOST = 5
    STALLED = 6
    PROTOCOL_ERROR = 7
    UNKNOWN_OUTCOME = 8
    INTERNAL_ERROR = 9

@final
class RetryPolicy:
    def __init__(
        self,
        retries: int,
        delays: Iterable[float],
        *,
        connection_lost: bool,
        stalled: bool,
        error_replies: Iterable[bytes],
    ) -> None: ...

@final
class Batch:
    waiter: Any
    @property
    def id(self) -> int: ...
    @property
    def command(self) -> int: ...
    @property
    def drained(self) -> bool: ...
    @property
    def keys(self) -> Sequence[object]: ...
    @property
    def pins(self) -> int: ...
    @property
    def code(self) -> int: ...
    @property
    def detail(self) -> str: ...
    def __init__(
        self,
        command: int,
        keys: Sequence[object],
        encode: Callable[[object], Buffer] | None,
        utf8: bool,
    ) -> None: ...
    def __len__(self) -> int: ...
    def add_set_option(self, argument: bytes) -> None: ...
    def forbid_repeat(self) -> None: ...
    def promise_immutable(self) -> None: ...
    def pin_values(
        self,
        values: Iterable[object],
        writable: bool,
        as_buffer: Callable[[object, str], object],
    ) -> None: ...
    def pin_rows(
        self, array: object, writable: bool, as_buffer: Callable[[object, str], object]
    ) -> None: ...
    def hits(self) -> list[bool]: ...
    def failures(self) -> list[tuple[int, int, int, str | None]]: ...

def has_tls() -> bool: ...

@final
class TlsStream:
    def __init__(
        self,
        fd: int,
        *,
        server_name: bytes,
        check_server_name: bool,
        check_common_name: bool,
        wants_certificate: bool,
        verify_flags: int,
        options: int,
        min_version: int,
        max_version: int,
        security_level: int,
        ciphers: bytes,
        cipher_suites: bytes,
        system_ca_file: bytes,
        system_ca_path: bytes,
        ca_file: bytes,
        ca_path: bytes,
        ca_data: bytes,
        ca_data_is_pem: bool,
        certificate_file: bytes,
        key_file: bytes,
        password: bytes,
    ) -> None: ...
    def handshake(self) -> bool: ...
    def read_into(self, buffer: Buffer) -> int: ...
    def write(self, data: Buffer) -> int: ...
    @property
    def holds_bytes(self) -> bool: ...
    @property
    def crossed(self) -> bool: ...
    def close(self) -> None: ...

@final
class CompletionQueue:
    @property
    def in_flight(self) -> int: ...
    def fileno(self) -> int: ...
    def wait(self) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...
    def close_after_fork(self) -> None: ...

@final
class Engine:
    def __new__(
        cls,
        workers: int,
        connections: int,
        window_bytes: int,
        window_requests: int,
        range_bytes: int,
    ) -> Engine: ...
    @property
    def batches_in_flight(self) -> int: ...
    def submit(
        self, batch: Batch, queue: CompletionQueue, policy: RetryPolicy, timeout: float
    ) -> int: ...
    def run(
        self, batch: Batch, queue: CompletionQueue, policy: RetryPolicy, timeout: float
    ) -> int: ...
    def cancel(self, batch: Batch) -> None: ...
    def drain(self, queue: CompletionQueue) -> list[Batch]: ...
    def close(self) -> None: ...
    def close_fds(self) -> None: ...
    def retire_connections(self) -> None: ...
    def connect_event(self) -> int: ...
    def wake_connector(self) -> None: ...
    def take_connect_requests(self) -> list[int]: ...
    def adopt(
        self, lane: int, fd: int, stall_timeout: float, health_interval: float
    ) -> None: ...
    def adopt_tls(
        self,
        lane: int,
        stream: TlsStream,
        stall_timeout: float,
        health_interval: float,
    ) -> None: ...
    def connect_failed(
        self, lane: int, newest: int, why: str, delay: float
    ) -> None: ...
    @staticmethod
    def newest_batch() -> int: ...
    def before_fork(self) -> None: ...
    def after_fork_in_parent(self) -> None: ...
    def after_fork_in_child(self) -> list[Batch]: ...

@final
class ReplyParser:
    def __init__(self, error: Callable[[str], object] = ...) -> None: ...
    def feed(self, data: Buffer) -> list[object]: ...

__test__: Final[dict[str, str]]
