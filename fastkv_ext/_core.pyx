# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False
# distutils: language = c++
"""The binding of the C++ engine. Converts and calls; decides nothing.

Pins. A caller's memory is held by the `Batch`: one `Py_buffer` export a buffer, which forbids that
the buffer is resized, freed or released. The engine's table of batches in flight holds the `Batch`
from submit until its completion is drained, whatever the caller does with it meanwhile.
"""
import enum
import os
import sys

cimport cython
from core cimport *
from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS,
    PyBUF_FORMAT,
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_CheckBuffer,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.errno cimport EINTR, errno
from posix.unistd cimport getpid, pid_t
from libcpp.memory cimport make_shared, shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.string_view cimport string_view
from libcpp.utility cimport move
from libcpp.vector cimport vector

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd*, unsigned long, int)
    short POLLIN

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object, Py_ssize_t*) except NULL
    str PyUnicode_DecodeUTF8(const char*, Py_ssize_t, const char*)


# Python turns the GIL on when it imports us, unless it was told not to.
if not getattr(sys, "_is_gil_enabled", lambda: True)():
    raise ImportError("fastkv needs the GIL, and PYTHON_GIL=0 or -X gil=0 keeps it off")


# Nothing catches what Cython's own copies of C++ objects throw, its conversions of strings
# included: these, and loops by reference, stand in for them.
cdef int _assign(string& to, bytes text) except -1:
    to.assign(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
    return 0


cdef str _text(const string& text):
    return PyUnicode_DecodeUTF8(text.data(), text.size(), "replace")


class Command(enum.IntEnum):
    """What a batch does with each of its keys."""

    GET = <int>CppCommand.get
    SET = <int>CppCommand.set
    EXISTS = <int>CppCommand.exists
    UNLINK = <int>CppCommand.unlink


class Code(enum.IntEnum):
    """What became of a batch as a whole; see cpp/status.hpp."""

    OK = <int>_Code.ok
    CLOSED = <int>_Code.closed
    CANCELLED = <int>_Code.cancelled
    TIMED_OUT = <int>_Code.timed_out
    CONNECT_FAILED = <int>_Code.connect_failed
    CONNECTION_LOST = <int>_Code.connection_lost
    STALLED = <int>_Code.stalled
    PROTOCOL_ERROR = <int>_Code.protocol_error
    UNKNOWN_OUTCOME = <int>_Code.unknown_outcome
    INTERNAL_ERROR = <int>_Code.internal_error


class Notice(enum.IntEnum):
    """What `Engine.take_notices` tells of."""

    CONNECTION_LOST = <int>_NoticeKind.connection_lost
    IDLE_CONNECTION_LOST = <int>_NoticeKind.idle_connection_lost
    RANGES_REFUSED = <int>_NoticeKind.ranges_refused


#: Upper bounds in seconds of a histogram's buckets but the last.
DURATION_BOUNDS = tuple([(kFirstBound << i) / 1e9 for i in range(kBuckets - 1)])


@cython.final
cdef class Stats:
    """Counts of one client, over all its engines. Any thread, and a forked child."""

    cdef shared_ptr[CppStats] cpp

    def __cinit__(self):
        self.cpp = make_shared[CppStats]()

    def command(self, int command):
        """What became of the batches of a `Command`.

        Returns:
            ``(batches, keys, bytes, seconds, durations)``: batches that were complete, timed out,
            cancelled, failed; keys that were unanswered, hit, missed, of a wrong size, refused,
            redirected; bytes of the values that were read or stored; the sum of the durations,
            and the number of them up to each of `DURATION_BOUNDS`, and of longer ones.
        """
        cdef const PerCommand* counts = &self.cpp.get().of(<CppCommand>command)
        cdef size_t i
        return (
            [counts.batches[i].get() for i in range(kResults)],
            [counts.keys[i].get() for i in range(kOutcomes)],
            counts.bytes.get(),
            counts.nanoseconds.get() / 1e9,
            [counts.durations[i].get() for i in range(kBuckets)],
        )

    @property
    def retries(self) -> int:
        """Keys that were queued again because their connection was lost."""
        return self.cpp.get().retries.get()

    @property
    def reconnects(self) -> int:
        """Connections made in place of an earlier one."""
        return self.cpp.get().reconnects.get()

    @property
    def stalls(self) -> int:
        """Connections given up because no byte moved."""
        return self.cpp.get().stalls.get()

    def add_retries(self, uint64_t keys):
        """Count keys that are sent again without the engine."""
        self.cpp.get().retries.add(keys)

    def count(self, Batch batch, int result, double seconds):
        """Count a batch that was carried by parts of it; ``result`` as in `command`."""
        self.cpp.get().count(
            batch.cpp.get()[0], <Result>result, Nanoseconds(<int64_t>(seconds * 1e9))
        )


@cython.final
cdef class RetryPolicy:
    """What an operation may do after its connection was lost. Immutable.

    Args:
        retries: Attempts after the first; below 0: no limit.
        delays: Seconds before the first attempt after a loss, the second ...; the last
            serves all later ones.
        connection_lost: Whether a reset or closed connection is a reason to try again.
        stalled: Whether a socket time-out is.
        error_replies: Beginnings of error replies that count as a lost connection.
    """

    cdef shared_ptr[CppRetryPolicy] cpp

    def __init__(
        self, int retries, delays, *, bint connection_lost, bint stalled, error_replies
    ):
        self.cpp = make_shared[CppRetryPolicy]()
        cdef CppRetryPolicy* policy = self.cpp.get()
        policy.retries = retries
        policy.connection_lost = connection_lost
        policy.stalled = stalled
        for delay in delays:
            policy.delays.push_back(Seconds(delay))
        for prefix in error_replies:
            policy.error_replies.resize(policy.error_replies.size() + 1)
            _assign(policy.error_replies.back(), prefix)


@cython.final
cdef class Batch:
    """One call: its keys, its pinned memory and, once drained, what became of each key.

    Args:
        command: What to do with each key.
        keys: Key names: ``bytes``, or what ``encode`` makes bytes of.
        encode: Called for each key that is neither ``bytes`` nor, with ``utf8``, ``str``.
        utf8: Whether ``str`` keys are plain UTF-8, which needs no call of ``encode``.

    Attributes:
        waiter: The caller's own; what to notify when the batch is drained.
        in_flight: Accepted, and not drained yet.
        drained: No worker can touch the memory any more, and the pins are released.
        ended: It must not be submitted any more: its pins are released, or will be.
        whole: Of a part: the batch whose memory it uses, and whose pins hold it.
    """

    cdef shared_ptr[CppBatch] cpp
    cdef Py_buffer* views
    cdef Py_ssize_t view_count
    cdef Py_ssize_t view_room
    cdef readonly object id  # an int; made once, because to end a batch must take no memory
    cdef readonly int command
    cdef readonly bint drained
    cdef readonly object keys
    cdef public object waiter
    cdef readonly Batch whole
    cdef CompletionQueue queue  # while in flight
    cdef readonly bint in_flight
    cdef Py_ssize_t parts_in_flight
    cdef readonly bint ended

    def __cinit__(self):
        self.in_flight = False
        self.parts_in_flight = 0
        self.ended = False
        self.views = NULL
        self.view_count = 0
        self.view_room = 0

    def __init__(self, int command, keys, encode, bint utf8):
        global _last_id
        _last_id += 1
        self.id = _last_id
        self.keys = keys
        self.command = command
        self.cpp = make_shared[CppBatch](<CppCommand>command)
        cdef CppBatch* batch = self.cpp.get()
        batch.reserve(len(keys))
        cdef const char* text
        cdef Py_ssize_t size
        cdef Py_buffer view
        for key in keys:
            if type(key) is str and utf8:
                text = PyUnicode_AsUTF8AndSize(key, &size)
                batch.add_key(string_view(text, size))
                continue
            if type(key) is not bytes:
                key = encode(key)
            if type(key) is bytes:
                batch.add_key(string_view(PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key)))
                continue
            PyObject_GetBuffer(key, &view, PyBUF_SIMPLE)
            try:
                batch.add_key(string_view(<const char*>view.buf, view.len))
            finally:
                PyBuffer_Release(&view)

    def __dealloc__(self):
        self._release()

    def __len__(self):
        return self.cpp.get().size()

    def add_set_option(self, bytes argument):
        """Add an argument to each SET, after its value."""
        self.cpp.get().add_set_option(
            string_view(PyBytes_AS_STRING(argument), PyBytes_GET_SIZE(argument))
        )

    def forbid_repeat(self):
        """Say that an operation must not be sent again once the server may have seen it."""
        self.cpp.get().forbid_repeat()

    def promise_immutable(self):
        """Say that no value changes while it is read."""
        self.cpp.get().promise_immutable()

    def read_whole(self):
        """Say that no value may be read in ranges."""
        self.cpp.get().read_whole()

    def ask(self):
        """Say that each command must be sent behind an ASKING, to a node of a cluster that is about
        to get the key's slot."""
        self.cpp.get().ask()

    @property
    def immutable(self) -> bool:
        """Whether `promise_immutable` was called."""
        return self.cpp.get().immutable()

    def part(self, indices):
        """Make a batch of some of the keys, for one node of a cluster.

        It uses the memory of this one, which stays pinned while a part is in flight.
        """
        global _last_id
        cdef Batch part = Batch.__new__(Batch)
        _last_id += 1
        part.id = _last_id
        part.keys = ()
        part.command = self.command
        part.whole = self
        part.cpp = self.cpp.get().part(indices)
        return part

    def take(self, Batch part):
        """Take over the answers of a part that was drained, or not accepted.

        Returns:
            ``(indices without an answer, [(index, error line)] of those sent elsewhere)``.
        """
        cdef Rest rest = self.cpp.get().take(part.cpp.get()[0])
        cdef const Failure* failure
        cdef size_t i
        cdef list redirected = []
        for i in range(rest.redirected.size()):
            failure = &rest.redirected[i]
            redirected.append((failure.index, _text(failure.error)))
        return list(rest.unanswered), redirected

    def end_parts(self):
        """Say that no part will be submitted any more: the pins go when the last is drained."""
        self.ended = True
        if self.parts_in_flight == 0:
            self._release()

    def unpin(self):
        """Release the pins as soon as no worker can touch the memory: now, unless the batch, or a
        part of it, is in flight. It must not be submitted any more."""
        self.ended = True
        if not self.in_flight and self.parts_in_flight == 0:
            self._release()

    cdef _part_drained(self):
        self.parts_in_flight -= 1
        if self.ended and self.parts_in_flight == 0:
            self._release()

    def pin_values(self, values, bint writable, as_buffer):
        """Pin one value a key: a buffer, or a tuple of buffers to be filled or sent in order.

        Args:
            values: Sequence with one value a key.
            writable: Refuse read-only memory.
            as_buffer: Called for what has no buffer protocol; returns something that has.

        Raises:
            TypeError, ValueError: Names the key, what was expected and what came.
        """
        cdef CppBatch* batch = self.cpp.get()
        cdef Py_ssize_t index = 0
        try:
            for value in values:
                if index == <Py_ssize_t>batch.size():
                    raise ValueError("the sequence of buffers grew while it was read")
                if type(value) is tuple:
                    for part in value:
                        self._pin(part, index, writable, as_buffer)
                else:
                    self._pin(value, index, writable, as_buffer)
                batch.end_value()
                index += 1
            if index != <Py_ssize_t>batch.size():
                raise ValueError("the sequence of buffers shrank while it was read")
        except BaseException:
            self.unpin()  # the traceback holds us
            raise

    def pin_rows(self, array, bint writable, as_buffer):
        """Pin one array whose first axis runs over the keys. Raises as `pin_values` does."""
        cdef CppBatch* batch = self.cpp.get()
        cdef Py_ssize_t rows = batch.size()
        cdef Py_buffer* view
        cdef Py_ssize_t row_bytes
        cdef Py_ssize_t i
        try:
            view = self._export(array, -1, writable, as_buffer)
            if rows == 0:
                return
            row_bytes = view.len // rows
            for i in range(rows):
                batch.add_segment(<char*>view.buf + i * row_bytes, row_bytes)
                batch.end_value()
        except BaseException:
            self.unpin()
            raise

    cdef _pin(self, buffer, Py_ssize_t index, bint writable, as_buffer):
        cdef Py_buffer* view = self._export(buffer, index, writable, as_buffer)
        self.cpp.get().add_segment(view.buf, view.len)

    cdef str _where(self, Py_ssize_t index):
        return "buffers" if index < 0 else f"buffer of key {self.keys[index]!r}"

    cdef Py_buffer* _export(
        self, buffer, Py_ssize_t index, bint writable, as_buffer
    ) except NULL:
        if not PyObject_CheckBuffer(buffer):
            buffer = as_buffer(buffer, self._where(index))
        if self.view_count == self.view_room:
            self._make_room()
        cdef Py_buffer* view = &self.views[self.view_count]
        try:
            PyObject_GetBuffer(buffer, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
        except (BufferError, ValueError) as error:
            # numpy cannot name the format of some element types (datetime64, bfloat16 of
            # ml_dtypes); plain bytes it can give.
            try:
                PyObject_GetBuffer(buffer, view, PyBUF_SIMPLE)
            except (BufferError, ValueError):
                raise ValueError(
                    f"{self._where(index)}: expected C-contiguous memory, got a"
                    f" {type(buffer).__name__} that is not: {error}"
                ) from None
        self.view_count += 1  # from here on, _release gives it back
        if view.format != NULL and _has_objects(view.format):
            raise TypeError(
                f"{self._where(index)}: expected plain data, got a"
                f" {type(buffer).__name__} of Python objects"
            )
        if writable and view.readonly:
            raise ValueError(
                f"{self._where(index)}: expected writable memory, got a read-only"
                f" {type(buffer).__name__}"
            )
        return view

    cdef _make_room(self):
        cdef Py_ssize_t room = max(8, 2 * self.view_room)
        cdef void* grown = PyMem_Realloc(self.views, room * sizeof(Py_buffer))
        if grown == NULL:
            raise MemoryError
        self.views = <Py_buffer*>grown
        self.view_room = room

    cdef _release(self):
        cdef Py_ssize_t i
        for i in range(self.view_count):
            PyBuffer_Release(&self.views[i])
        self.view_count = 0
        self.view_room = 0
        PyMem_Free(self.views)
        self.views = NULL

    @property
    def pins(self) -> int:
        """Buffers that are pinned now."""
        return self.view_count

    @property
    def code(self) -> int:
        """After the drain: what became of the batch as a whole, a `Code`."""
        return <int>self.cpp.get().status().code

    @property
    def detail(self) -> str:
        """After the drain: the text that belongs to `code`."""
        return _text(self.cpp.get().status().detail)

    def hits(self):
        """After the drain: one bool a key; False for a miss and for every failure."""
        cdef CppBatch* batch = self.cpp.get()
        cdef size_t i
        cdef size_t n = batch.size()
        cdef list result = [False] * n
        for i in range(n):
            if batch.outcome(i) == Outcome.hit:
                result[i] = True
        return result

    def failures(self):
        """After the drain: ``(index, expected bytes, actual bytes, error line)`` for each key with
        another length (the line is None then) or an error reply, in the order of the keys."""
        cdef CppBatch* batch = self.cpp.get()
        cdef const Failure* failure
        cdef size_t i
        cdef list result = []
        if batch.all_answered_plainly():
            return result
        for i in range(batch.failures().size()):
            failure = &batch.failures()[i]
            result.append((
                failure.index,
                batch.value_bytes(failure.index),
                failure.actual_bytes,
                _text(failure.error)
                if batch.outcome(failure.index) == Outcome.refused else None,
            ))
        result.sort()
        return result


cdef unsigned long long _last_id = 0


def key_slot(bytes key):
    """The slot of Redis Cluster that a key is in."""
    return cpp_key_slot(string_view(PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key)))


@cython.final
cdef class SlotMap:
    """Who serves each slot of a cluster. Immutable.

    Args:
        owners: For each slot a number of its owner, counted from 0, as an array of ``uint16``;
            65535 is nobody.
    """

    cdef shared_ptr[CppSlotMap] cpp

    def __init__(self, const uint16_t[::1] owners not None):
        self.cpp = make_shared[CppSlotMap](
            Owners(&owners[0] if len(owners) > 0 else NULL, len(owners))
        )

    def route(self, Batch batch, indices):
        """Group keys by owner.

        Args:
            indices: Of the keys; a range must have no step.

        Returns:
            For each owner that is needed ``(number, indices)``, and those of nobody with None.
        """
        cdef vector[uint32_t] wanted
        cdef vector[vector[uint32_t]] routed
        cdef uint32_t index
        if type(indices) is range:  # of all keys, say: 100,000 objects less to make
            for index in range(indices.start, indices.stop):
                wanted.push_back(index)
        else:
            wanted = indices
        with nogil:
            routed = batch.cpp.get().route(
                self.cpp.get()[0], Indices(wanted.data(), wanted.size())
            )
        cdef size_t i
        result = []
        for i in range(routed.size()):
            if not routed[i].empty():
                result.append((None if i + 1 == routed.size() else i, list(routed[i])))
        return result


cdef bint _has_objects(const char* format) noexcept:
    # PEP 3118: "O" is a Python object, but field names stand between colons.
    cdef bint named = False
    while format[0] != 0:
        if format[0] == c":":
            named = not named
        elif format[0] == c"O" and not named:
            return True
        format += 1
    return False


def has_tls():
    """Whether this build can speak TLS."""
    return cpp_has_tls()


@cython.final
cdef class TlsStream:
    """The client's end of a TLS connection over a non-blocking socket; one thread at a time.

    Args:
        fd: Of a connected socket; the stream has a duplicate of its own.
        Others: See `TlsSettings` in cpp/tls.hpp.

    Raises:
        RuntimeError: Why OpenSSL does not take the settings.
        OSError: No descriptor is left.
    """

    cdef unique_ptr[CppTlsStream] cpp
    cdef pid_t pid

    def __cinit__(self):
        self.pid = getpid()

    def __init__(
        self,
        int fd,
        *,
        bytes server_name,
        bint check_server_name,
        bint check_common_name,
        bint wants_certificate,
        uint64_t verify_flags,
        uint64_t options,
        int min_version,
        int max_version,
        int security_level,
        bytes ciphers,
        bytes cipher_suites,
        bytes system_ca_file,
        bytes system_ca_path,
        bytes ca_file,
        bytes ca_path,
        bytes ca_data,
        bint ca_data_is_pem,
        bytes certificate_file,
        bytes key_file,
        bytes password,
    ):
        cdef CppTlsSettings settings
        _assign(settings.server_name, server_name)
        settings.check_server_name = check_server_name
        settings.check_common_name = check_common_name
        settings.wants_certificate = wants_certificate
        settings.verify_flags = verify_flags
        settings.options = options
        settings.min_version = min_version
        settings.max_version = max_version
        settings.security_level = security_level
        _assign(settings.ciphers, ciphers)
        _assign(settings.cipher_suites, cipher_suites)
        _assign(settings.system_ca_file, system_ca_file)
        _assign(settings.system_ca_path, system_ca_path)
        _assign(settings.ca_file, ca_file)
        _assign(settings.ca_path, ca_path)
        _assign(settings.ca_data, ca_data)
        settings.ca_data_is_pem = ca_data_is_pem
        _assign(settings.certificate_file, certificate_file)
        _assign(settings.key_file, key_file)
        settings.password = string_view(
            PyBytes_AS_STRING(password), PyBytes_GET_SIZE(password)
        )
        with nogil:
            self.cpp = make_tls_stream(fd, settings)

    def __dealloc__(self):
        self.close()

    def handshake(self):
        """Go on with the handshake; True: it is complete."""
        self._check_open()
        cdef Moved moved
        with nogil:
            moved = self.cpp.get().handshake()
        return _bytes_moved(moved) > 0

    def read_into(self, buffer):
        """Return how many bytes came, 0 if none are there now."""
        return self._move(buffer, True)

    def write(self, data):
        """Return how many bytes were taken. What was not must be given again."""
        return self._move(data, False)

    @property
    def holds_bytes(self) -> bool:
        """There may be something to read though the socket is not readable."""
        self._check_open()
        return self.cpp.get().holds_bytes()

    @property
    def crossed(self) -> bool:
        """What was tried waits for the other readiness of the socket than one would think."""
        self._check_open()
        return self.cpp.get().crossed()

    def close(self):
        """Give the descriptor back, and say nothing to the peer: a child after a fork may do so,
        too. Idempotent."""
        if self.cpp.get() != NULL:
            self.cpp.get().close_after_fork()
            if self.pid == getpid():
                self.cpp.reset()
            else:
                # Its thread, which does not exist here, may have been in the middle of anything.
                self.cpp.release()

    cdef _check_open(self):
        if self.cpp.get() == NULL:
            raise ConnectionError("the stream was closed, or is the engine's")

    cdef _move(self, buffer, bint reading):
        self._check_open()
        cdef Py_buffer view
        cdef iovec part
        cdef Moved moved
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE if reading else PyBUF_SIMPLE)
        try:
            part.iov_base = view.buf
            part.iov_len = view.len
            with nogil:
                if reading:
                    moved = self.cpp.get().read(Parts(&part, 1))
                else:
                    moved = self.cpp.get().write(Parts(&part, 1))
        finally:
            PyBuffer_Release(&view)
        return _bytes_moved(moved)


cdef Py_ssize_t _bytes_moved(const Moved& moved) except -1:
    if moved.status.code != _Code.ok:
        # An OSError, which redis-py expects of a socket, with the number of SSLError.
        raise ConnectionError(1, _text(moved.status.detail).rstrip("."))
    return moved.bytes


cdef int _SIGNAL_CHECK_MS = 50


@cython.final
cdef class CompletionQueue:
    """Where completed batches wait for one caller: an event loop, or a thread.

    Attributes:
        in_flight: Batches submitted for this queue and not yet drained from it.
    """

    cdef shared_ptr[CppCompletionQueue] cpp
    cdef readonly Py_ssize_t in_flight
    cdef optional[uint64_t] taken  # completed, and in the engine's table still

    def __cinit__(self):
        self.cpp = make_shared[CppCompletionQueue]()
        self.in_flight = 0

    def fileno(self):
        """A descriptor that is readable when there is something to drain."""
        return self.cpp.get().fd()

    def wait(self):
        """Sleep until there is something to drain, or `wake` was called. Signal handlers run."""
        # A signal that comes right before poll does not interrupt it, so look now and then.
        PyErr_CheckSignals()
        while not self._poll(_SIGNAL_CHECK_MS):
            PyErr_CheckSignals()

    def wake(self):
        """Make one `wait` return with nothing to drain. Any thread."""
        self.cpp.get().wake()

    def clear(self):
        """Forget wakes. For a queue that no engine completes batches on."""
        self.cpp.get().next()

    def close(self):
        """Give the descriptor back; nothing must be in flight on this queue."""
        self.cpp.get().close()

    def close_after_fork(self):
        """In a child: give the descriptor back."""
        self.cpp.get().close_after_fork()

    cdef bint _poll(self, int milliseconds) except -1:
        # 0: a signal came, or the time is over.
        cdef pollfd entry
        cdef int ready
        cdef int error
        entry.fd = self.cpp.get().fd()
        entry.events = POLLIN
        if entry.fd < 0:
            raise OSError("the queue was closed, or left behind by a fork")
        with nogil:
            ready = poll(&entry, 1, milliseconds)
            error = errno
        if ready < 0 and error != EINTR:
            raise OSError(error, os.strerror(error))
        return ready > 0


@cython.final
@cython.no_gc_clear  # the table must outlive the worker threads, which __dealloc__ joins
cdef class Engine:
    """The native client of one server.

    Args:
        workers: Threads.
        connections: Connections over all threads. One carries lookups only, unless it is alone.
        window_bytes: Value bytes that a connection may have asked for and not yet read.
        window_requests: Requests that a connection may have in flight.
        range_bytes: Values of half of this and more are read in ranges of this; 0: none is.
        near_load_bytes: Instead of window_bytes, of loads from a server that answers at once.
        fits_allocator: Read small values in smaller ranges if the server's allocator wants that.
        stats: Where to count.
    """

    cdef CppEngine* cpp
    cdef dict in_flight
    cdef bint held_for_fork
    cdef pid_t pid  # a fork in C tells nobody

    def __cinit__(
        self,
        size_t workers,
        size_t connections,
        size_t window_bytes,
        size_t window_requests,
        size_t range_bytes,
        size_t near_load_bytes,
        bint fits_allocator,
        Stats stats not None,
    ):
        cdef Window window
        window.bytes = window_bytes
        window.requests = window_requests
        window.range_bytes = range_bytes
        window.near_load_bytes = near_load_bytes
        window.fits_allocator = fits_allocator
        self.in_flight = {}
        self.held_for_fork = False
        self.pid = getpid()
        self.cpp = new CppEngine(workers, connections, window, stats.cpp)

    def __dealloc__(self):
        cdef CppEngine* cpp = self.cpp
        # In a child the threads do not exist and locks may be held for ever: leave it alone.
        if cpp != NULL and not self._forked():
            with nogil:
                del cpp

    cdef bint _forked(self) noexcept:
        return self.pid != getpid()

    def submit(
        self, Batch batch, CompletionQueue queue, RetryPolicy policy, double timeout
    ):
        """Hand a batch over. Its memory is pinned until `drain` returns it.

        Args:
            timeout: Seconds for the whole batch; 0: no limit.

        Returns:
            A `Code`: OK, or why the batch was not accepted.
        """
        cdef Status status
        cdef shared_ptr[CppBatch] cpp = batch.cpp
        cdef shared_ptr[CppCompletionQueue] cpp_queue = queue.cpp
        cdef shared_ptr[const CppRetryPolicy] cpp_policy = policy.cpp
        cdef uint64_t id = batch.id
        if self._forked():
            return <int>_Code.closed
        if batch.ended or (batch.whole is not None and batch.whole.ended):
            raise RuntimeError("the memory of the batch is not pinned any more")
        self.in_flight[batch.id] = batch
        queue.in_flight += 1
        batch.queue = queue
        batch.in_flight = True
        if batch.whole is not None:
            batch.whole.parts_in_flight += 1
        try:
            with nogil:
                status = self.cpp.submit(
                    move(cpp), id, move(cpp_queue), move(cpp_policy), timeout
                )
        except BaseException:
            self._take_out(batch, queue)
            raise
        if status.code != _Code.ok:
            self._take_out(batch, queue)
        return <int>status.code

    cdef _take_out(self, Batch batch, CompletionQueue queue):
        # Not, or not any more, in flight.
        del self.in_flight[batch.id]
        queue.in_flight -= 1
        batch.queue = None
        batch.in_flight = False
        if batch.whole is not None:
            batch.whole._part_drained()

    def run(self, Batch batch, CompletionQueue queue, RetryPolicy policy, double timeout):
        """Submit and wait. Signal handlers run meanwhile; if one raises, the batch is cancelled
        and the exception raised once no worker can touch the memory any more."""
        cdef int code = self.submit(batch, queue, policy, timeout)
        if code != 0:
            return code
        try:
            while not batch.drained:
                queue.wait()
                self.drain(queue)
        except BaseException:
            self._take_back(batch, queue)
            raise
        return code

    cdef _take_back(self, Batch batch, CompletionQueue queue):
        # Workers let go within one turn of their loops, whatever the network does.
        self.cancel(batch)
        while not batch.drained:
            try:
                queue._poll(-1)
                self.drain(queue)
            except MemoryError:
                pass  # its memory must not be written when the caller has it again

    def cancel(self, Batch batch):
        """Take a batch back. It completes, cancelled, as soon as no worker can touch its memory;
        if it had completed already, nothing happens."""
        cdef uint64_t id = batch.id
        if self._forked():
            return
        with nogil:
            self.cpp.cancel(id)

    def drain(self, CompletionQueue queue):
        """Return the batches that completed on ``queue``, their pins released.

        Raises:
            MemoryError: They can be drained later.
        """
        cdef Batch batch
        cdef list done = []
        # With the GIL, or two threads that drain would lose what one of them has taken.
        try:
            while True:
                if not queue.taken.has_value():
                    queue.taken = queue.cpp.get().next()
                if not queue.taken.has_value():
                    break
                batch = self.in_flight[queue.taken.value()]
                done.append(batch)
                # From here on nothing takes memory.
                queue.taken.reset()
                batch.drained = True
                batch._release()
                self._take_out(batch, queue)
        except MemoryError:
            if not done:
                raise
        return done

    @property
    def batches_in_flight(self) -> int:
        """Batches submitted and not yet drained."""
        return len(self.in_flight)

    def gauges(self):
        """Return ``(open connections, keys that no connection has taken yet)``, the latter for
        lookups, loads and stores. Zeros in a forked child."""
        cdef Gauges gauges
        if self._forked():
            return 0, (0, 0, 0)
        with nogil:
            gauges = self.cpp.gauges()
        return gauges.connections, (gauges.queued[0], gauges.queued[1], gauges.queued[2])

    def close(self):
        """Complete every batch, with an error if need be, and join the threads. Idempotent."""
        if self._forked():
            return
        with nogil:
            self.cpp.close()

    def close_fds(self):
        """Give all descriptors back: after `close`, and when the connector has ended."""
        if self._forked():
            return
        with nogil:
            self.cpp.close_fds()

    def retire_connections(self):
        """Let every connection end once it is idle; the next batch opens new ones."""
        if self._forked():
            return
        with nogil:
            self.cpp.retire_connections()

    def connect_event(self):
        """A descriptor that is readable when the engine wants connections."""
        return self.cpp.connect_event()

    def wake_connector(self):
        """Make `connect_event` readable with nothing to take."""
        if not self._forked():
            self.cpp.wake_connector()

    def take_connect_request(self):
        """Return a lane that the engine wants a connection for, once, or None."""
        cdef optional[uint32_t] lane
        with nogil:
            lane = self.cpp.take_connect_request()
        return lane.value() if lane.has_value() else None

    def take_notices(self):
        """Return ``(Notice, text)`` of what happened since the last call; `connect_event` tells.
        The text is the system's, or the server's."""
        cdef vector[CppNotice] notices
        cdef const CppNotice* notice
        cdef size_t i
        cdef list result = []
        with nogil:
            notices = self.cpp.take_notices()
        for i in range(notices.size()):
            notice = &notices[i]
            result.append((Notice(<int>notice.kind), _text(notice.text)))
        return result

    def adopt(self, uint32_t lane, int fd, double stall_timeout, double health_interval):
        """Take over a connected socket; closes it in the end, and also when this raises.

        Args:
            stall_timeout: Seconds without a byte after which the connection is given up; 0: never.
            health_interval: Seconds idle after which it is checked by a PING; 0: never.
        """
        with nogil:
            self.cpp.adopt(lane, UniqueFd(fd), stall_timeout, health_interval)

    def adopt_tls(
        self, uint32_t lane, TlsStream stream, double stall_timeout, double health_interval
    ):
        """Take over a stream after its handshake, as `adopt` does a socket. It is closed for
        everybody else."""
        stream._check_open()
        with nogil:
            self.cpp.adopt(lane, move(stream.cpp), stall_timeout, health_interval)

    def connect_failed(self, uint32_t lane, uint64_t newest, str why, double delay):
        """Say that a connection cannot be made; it is not asked for again for ``delay`` seconds if
        another can do its work. Batches that need it end with `Code.CONNECT_FAILED`, if they are
        not newer than ``newest``: what `newest_batch` was when the last try began."""
        cdef bytes detail = why.encode()
        cdef string_view text = string_view(PyBytes_AS_STRING(detail), PyBytes_GET_SIZE(detail))
        with nogil:
            self.cpp.connect_failed(lane, newest, text, delay)

    @staticmethod
    def newest_batch():
        """The id of the newest batch of any engine; ids grow."""
        return _last_id

    def before_fork(self):
        """Bring the list of descriptors in order; one of the next two must follow."""
        if self.held_for_fork:
            return  # a signal handler forks while its thread does
        with nogil:
            self.cpp.before_fork()
        self.held_for_fork = True

    def after_fork_in_parent(self):
        """Go on, if `before_fork` came so far."""
        if self.held_for_fork:
            self.held_for_fork = False
            self.cpp.after_fork_in_parent()

    def after_fork_in_child(self):
        """Give back the parent's descriptors. The engine must not be used any more.

        Returns:
            The batches in flight at the fork. They will not complete here, and no thread
            could touch their memory: the pins are released. Whoever waits for one, because a
            signal handler has forked meanwhile, finds its queue closed.
        """
        cdef Batch batch
        self.cpp.close_fds_after_fork(self.held_for_fork)
        batches = list(self.in_flight.values())
        self.in_flight.clear()
        for batch in batches:
            batch.in_flight = False
            batch.ended = True
            if batch.queue is not None:
                batch.queue.close_after_fork()
                batch.queue = None
            batch._release()
            if batch.whole is not None:
                batch.whole._part_drained()
        return batches


def after_fork_in_parent(list nodes, lock):
    """Tell all nodes that the fork is over, and release the RLock, if it is this thread's. Here,
    because no signal handler can come between two steps; one that comes in a node is raised in
    the end, and the node told again. It may have forked: the list then is the outer fork's, too,
    or empty, in its child."""
    error = None
    cdef Py_ssize_t told = 0
    if not lock._is_owned():
        return
    while told < len(nodes):
        try:
            nodes[told].after_fork_in_parent()
        except BaseException as raised:
            error = raised
        else:
            told += 1
    if lock._is_owned():
        lock.release()
    if not lock._is_owned():
        nodes.clear()
    if error is not None:
        raise error


def run_all(parts, double timeout):
    """`Engine.run` for several at once.

    Args:
        parts: ``(engine, batch, queue, policy)`` each, with a queue of its own.
        timeout: Seconds; 0: no limit.

    Returns:
        A `Code` for each, as `Engine.submit` returns it.
    """
    cdef Engine engine
    cdef Batch batch
    cdef CompletionQueue queue
    cdef RetryPolicy policy
    cdef int code
    cdef list codes = []
    try:
        for engine, batch, queue, policy in parts:
            codes.append(engine.submit(batch, queue, policy, timeout))
        for code, (engine, batch, queue, _) in zip(codes, parts):
            while code == 0 and not batch.drained:
                queue.wait()
                engine.drain(queue)
    except BaseException:
        for engine, batch, _, _ in parts:
            engine.cancel(batch)
        for engine, batch, queue, _ in parts:
            if batch.in_flight:
                engine._take_back(batch, queue)
        raise
    return codes


@cython.final
cdef class ReplyParser:
    """The engine's RESP2 parser with Python objects for results: for tests, as `hiredis.Reader`.

    Args:
        error: Makes the object that stands for an error reply from its line.
    """

    cdef CppReplyParser cpp
    cdef bytearray unread
    cdef list stack
    cdef object error

    def __init__(self, error=RuntimeError):
        self.unread = bytearray()
        self.stack = []
        self.error = error

    def feed(self, data):
        """Return the replies that ``data`` completes.

        Raises:
            ValueError: The bytes are no RESP2. The parser is of no use afterwards.
        """
        self.unread += data
        replies = []
        cdef ReplyStep step
        cdef Py_ssize_t end
        cdef Py_ssize_t have
        while True:
            step = self.cpp.next(string_view(self.unread, len(self.unread)))
            if step.found == Found.incomplete:
                return replies
            if step.found == Found.malformed:
                raise ValueError(step.why.decode())
            if step.head.type == ReplyType.bulk and step.head.value >= 0:
                have = len(self.unread) - <Py_ssize_t>step.consumed
                if have - 2 < step.head.value:
                    return replies
                end = <Py_ssize_t>step.consumed + step.head.value
                if self.unread[end:end + 2] != b"\r\n":
                    raise ValueError("no line break after a value")
                reply = bytes(self.unread[<Py_ssize_t>step.consumed:end])
                del self.unread[:end + 2]
            else:
                if step.head.type == ReplyType.simple:
                    reply = bytes(step.head.text.data()[:step.head.text.size()])
                elif step.head.type == ReplyType.error:
                    text = bytes(step.head.text.data()[:step.head.text.size()])
                    reply = self.error(text.decode("utf-8", "replace"))
                elif step.head.type == ReplyType.integer:
                    reply = step.head.value
                elif step.head.value < 0:
                    reply = None
                else:
                    reply = []
                del self.unread[:<Py_ssize_t>step.consumed]
                if step.head.type == ReplyType.array and step.head.value > 0:
                    self.stack.append((reply, step.head.value))
                    continue
            self._nest(reply, replies)

    cdef _nest(self, reply, list replies):
        while self.stack:
            items, size = self.stack.pop()
            items.append(reply)
            if len(items) < size:
                self.stack.append((items, size))
                return
            reply = items
        replies.append(reply)
