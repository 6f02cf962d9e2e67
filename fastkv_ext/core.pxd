# The C++ API as Cython sees it: the only `cdef extern`, all of it callable without the GIL.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libcpp cimport bool as cpp_bool
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.optional cimport optional
from libcpp.string cimport string
from libcpp.string_view cimport string_view
from libcpp.vector cimport vector


cdef extern from "status.hpp" namespace "fastkv" nogil:
    cdef enum class _Code "fastkv::Code"(uint8_t):
        ok
        closed
        cancelled
        timed_out
        connect_failed
        connection_lost
        stalled
        protocol_error
        unknown_outcome
        internal_error

    cdef enum class Outcome(uint8_t):
        unanswered
        hit
        miss
        size_mismatch
        refused

    cdef cppclass Status:
        _Code code
        string detail


cdef extern from "completion_queue.hpp" namespace "fastkv" nogil:
    cdef cppclass CppCompletionQueue "fastkv::CompletionQueue":
        CppCompletionQueue() except +
        int fd() noexcept
        optional[uint64_t] next() noexcept
        void wake() noexcept
        void close() noexcept
        void close_after_fork() noexcept


cdef extern from "resp.hpp" namespace "fastkv" nogil:
    cdef enum class ReplyType "fastkv::ReplyHead::Type"(uint8_t):
        simple
        error
        integer
        bulk
        array

    cdef enum class Found "fastkv::ReplyParser::Found"(uint8_t):
        head
        incomplete
        malformed

    cdef cppclass ReplyHead:
        ReplyType type
        int64_t value
        string_view text

    cdef cppclass ReplyStep "fastkv::ReplyParser::Step":
        Found found
        ReplyHead head
        size_t consumed
        const char* why

    cdef cppclass CppReplyParser "fastkv::ReplyParser":
        ReplyStep next(string_view) noexcept


cdef extern from "<span>" namespace "std" nogil:
    cdef cppclass Owners "std::span<const std::uint16_t>":
        Owners(const uint16_t*, size_t) noexcept

    cdef cppclass Indices "std::span<const std::uint32_t>":
        Indices(const uint32_t*, size_t) noexcept


cdef extern from "slots.hpp" namespace "fastkv" nogil:
    size_t kSlots
    uint16_t cpp_key_slot "fastkv::key_slot"(string_view) noexcept

    cdef cppclass CppSlotMap "fastkv::SlotMap":
        CppSlotMap(Owners) noexcept


cdef extern from "session.hpp" namespace "fastkv" nogil:
    cdef enum class CppCommand "fastkv::Command"(uint8_t):
        get
        set
        exists
        unlink


cdef extern from "batch.hpp" namespace "fastkv" nogil:
    cdef cppclass Seconds "std::chrono::duration<double>":
        Seconds(double) noexcept

    cdef cppclass CppRetryPolicy "fastkv::RetryPolicy":
        int64_t retries
        vector[Seconds] delays
        cpp_bool connection_lost
        cpp_bool stalled
        vector[string] error_replies

    cdef cppclass Failure "fastkv::Batch::Failure":
        uint32_t index
        int64_t actual_bytes
        string error

    cdef cppclass Rest "fastkv::Batch::Rest":
        vector[uint32_t] unanswered
        vector[Failure] redirected

    cdef cppclass CppBatch "fastkv::Batch":
        CppBatch(CppCommand) except +
        vector[vector[uint32_t]] route(const CppSlotMap&, Indices) except +
        shared_ptr[CppBatch] part(vector[uint32_t]) except +
        Rest take(const CppBatch&) except +
        cpp_bool immutable() noexcept
        void read_whole() noexcept
        void ask() noexcept
        void reserve(size_t) except +
        void add_key(string_view) except +
        void add_segment(void*, size_t) except +
        void end_value() except +
        void add_set_option(string_view) except +
        void forbid_repeat() noexcept
        void promise_immutable() noexcept
        size_t size() noexcept
        uint64_t value_bytes(size_t) noexcept
        Outcome outcome(size_t) noexcept
        cpp_bool all_answered_plainly() noexcept
        const vector[Failure]& failures() noexcept
        const Status& status() noexcept


cdef extern from "<chrono>" namespace "std::chrono" nogil:
    cdef cppclass Nanoseconds "std::chrono::nanoseconds":
        Nanoseconds(int64_t) noexcept


cdef extern from "stats.hpp" namespace "fastkv" nogil:
    cdef enum class Result "fastkv::Stats::Result"(uint8_t):
        ok
        timed_out
        cancelled
        failed

    cdef size_t kResults "fastkv::Stats::kResults"
    cdef size_t kOutcomes "fastkv::Stats::kOutcomes"
    cdef size_t kBuckets "fastkv::Stats::kBuckets"
    cdef uint64_t kFirstBound "fastkv::Stats::kFirstBound"

    cdef cppclass Counter "fastkv::Stats::Counter":
        void add(uint64_t) noexcept
        uint64_t get() noexcept

    cdef cppclass PerCommand "fastkv::Stats::PerCommand":
        Counter* batches
        Counter* keys
        Counter bytes
        Counter nanoseconds
        Counter* durations

    cdef cppclass CppStats "fastkv::Stats":
        CppStats() except +
        void count(const CppBatch&, Result, Nanoseconds) noexcept
        const PerCommand& of(CppCommand) noexcept
        Counter retries
        Counter reconnects
        Counter stalls


cdef extern from "worker.hpp" namespace "fastkv" nogil:
    cdef cppclass Window:
        uint64_t bytes
        size_t requests
        uint64_t range_bytes
        uint64_t near_load_bytes
        cpp_bool fits_allocator


cdef extern from "fd.hpp" namespace "fastkv" nogil:
    cdef cppclass UniqueFd:
        UniqueFd(int) noexcept
    UniqueFd duplicate(int) except +


cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void* iov_base
        size_t iov_len


cdef extern from "<span>" namespace "std" nogil:
    cdef cppclass Parts "std::span<const iovec>":
        Parts(const iovec*, size_t) noexcept


cdef extern from "stream.hpp" namespace "fastkv" nogil:
    cdef cppclass Moved "fastkv::Stream::Moved":
        size_t bytes
        Status status


cdef extern from "tls.hpp" namespace "fastkv" nogil:
    cdef cppclass CppTlsSettings "fastkv::TlsSettings":
        string server_name
        cpp_bool check_server_name
        cpp_bool check_common_name
        cpp_bool wants_certificate
        uint64_t verify_flags
        uint64_t options
        int min_version
        int max_version
        int security_level
        string ciphers
        string cipher_suites
        string system_ca_file
        string system_ca_path
        string ca_file
        string ca_path
        string ca_data
        cpp_bool ca_data_is_pem
        string certificate_file
        string key_file
        string_view password

    cdef cppclass CppTlsStream "fastkv::TlsStream":
        Moved handshake() noexcept
        Moved read(Parts) noexcept
        Moved write(Parts) noexcept
        cpp_bool holds_bytes() noexcept
        cpp_bool crossed() noexcept
        void close_after_fork() noexcept

    cpp_bool cpp_has_tls "fastkv::has_tls"() noexcept
    unique_ptr[CppTlsStream] make_tls_stream(int, const CppTlsSettings&) except +


cdef extern from "schedule.hpp" namespace "fastkv" nogil:
    cdef enum class _NoticeKind "fastkv::Notice::Kind"(uint8_t):
        connection_lost
        idle_connection_lost
        ranges_refused

    cdef cppclass CppNotice "fastkv::Notice":
        _NoticeKind kind
        string text

    cdef cppclass Gauges "fastkv::Schedule::Gauges":
        size_t connections
        size_t* queued  # an array, as those of Stats


cdef extern from "engine.hpp" namespace "fastkv" nogil:
    cdef cppclass CppEngine "fastkv::Engine":
        CppEngine(size_t, size_t, Window, shared_ptr[CppStats]) except +
        Status submit(
            shared_ptr[CppBatch],
            uint64_t,
            shared_ptr[CppCompletionQueue],
            shared_ptr[const CppRetryPolicy],
            double,
        ) except +
        void cancel(uint64_t) noexcept
        void close() except +
        void close_fds() except +
        void retire_connections() except +
        int connect_event() noexcept
        void wake_connector() noexcept
        optional[uint32_t] take_connect_request() noexcept
        vector[CppNotice] take_notices() except +
        Gauges gauges() except +
        void adopt(uint32_t, UniqueFd, double, double) except +
        void adopt(uint32_t, unique_ptr[CppTlsStream], double, double) except +
        void connect_failed(uint32_t, uint64_t, string_view, double) except +
        void before_fork() except +
        void after_fork_in_parent() except +
        void close_fds_after_fork(bint) noexcept
