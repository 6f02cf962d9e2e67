"""The library that fails allocations: see short_of_memory.py."""

SHIM = r"""
#include <Python.h>
#include <execinfo.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>

namespace {

std::atomic<long> live_blocks{0};
std::atomic<int> where{0};  // 1: operator new, 2: Python's, by the caller; 0: nowhere
std::atomic<long> until{0};  // allocations before the first that fails
std::atomic<long> most{0};
std::atomic<int> failed{0};
pthread_t caller;

// For whoever must find what does not stand a failure.
void* frames[30];
int depth = 0;
[[noreturn]] void tell() {
  backtrace_symbols_fd(frames, depth, 2);
  std::abort();
}

bool fails(int here) {
  if (where.load() != here) return false;
  // A thread of CPython's that has no memory to begin hangs whoever has started it.
  if (here == 2 && !pthread_equal(pthread_self(), caller)) return false;
  if (until.fetch_sub(1) > 1) return false;
  if (most.fetch_sub(1) <= 0) return false;
  failed = 1;
  depth = backtrace(frames, 30);
  return true;
}

PyMemAllocatorEx before[3];
const PyMemAllocatorDomain domains[] = {PYMEM_DOMAIN_RAW, PYMEM_DOMAIN_MEM,
                                        PYMEM_DOMAIN_OBJ};

void* py_malloc(void* ctx, size_t size) {
  auto* a = static_cast<PyMemAllocatorEx*>(ctx);
  return fails(2) ? nullptr : a->malloc(a->ctx, size);
}
void* py_calloc(void* ctx, size_t n, size_t size) {
  auto* a = static_cast<PyMemAllocatorEx*>(ctx);
  return fails(2) ? nullptr : a->calloc(a->ctx, n, size);
}
void* py_realloc(void* ctx, void* p, size_t size) {
  auto* a = static_cast<PyMemAllocatorEx*>(ctx);
  return fails(2) ? nullptr : a->realloc(a->ctx, p, size);
}
void py_free(void* ctx, void* p) {
  auto* a = static_cast<PyMemAllocatorEx*>(ctx);
  a->free(a->ctx, p);
}

}  // namespace

extern "C" void arm(int here, long n, long count) {
  std::set_terminate(tell);
  failed = 0;
  caller = pthread_self();
  until = n;
  most = count;
  if (here == 2 && !before[1].malloc) {
    for (int i = 1; i < 3; ++i) {
      PyMem_GetAllocator(domains[i], &before[i]);
      PyMemAllocatorEx ours{&before[i], py_malloc, py_calloc, py_realloc, py_free};
      PyMem_SetAllocator(domains[i], &ours);
    }
  }
  where = here;
}
extern "C" int disarm() {
  where = 0;
  return failed;
}
extern "C" long live() { return live_blocks; }

void* operator new(std::size_t size) {
  void* p = fails(1) ? nullptr : std::malloc(size ? size : 1);
  if (!p) throw std::bad_alloc();
  ++live_blocks;
  return p;
}
void* operator new[](std::size_t size) { return operator new(size); }
void operator delete(void* p) noexcept {
  if (p) --live_blocks;
  std::free(p);
}
void operator delete[](void* p) noexcept { operator delete(p); }
void operator delete(void* p, std::size_t) noexcept { operator delete(p); }
void operator delete[](void* p, std::size_t) noexcept { operator delete(p); }
"""
