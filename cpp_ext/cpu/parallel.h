// How the CPU kernels use the machine: torch's thread pool, big pages for fresh outputs, stores past the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// A leaf loop compiled for several instruction sets; the loader picks the best one that the processor has.
#if defined(PMM_CLONES)  // set by a test
#elif !defined(__x86_64__) || !defined(__GLIBC__) || !defined(__GNUC__) || defined(__clang__)
#define PMM_CLONES
#elif __GNUC__ >= 12
#define PMM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PMM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#define PMM_INLINE inline __attribute__((always_inline))

namespace pmm::cpu {

constexpr int64_t kLine = 64;             // bytes of a cache line
constexpr int64_t kGrain = 64 * 1024;     // bytes worth a thread
constexpr int64_t kStreamed = 4 << 20;    // outputs of at least these bytes go past the cache: nobody finds them there

// Planes ahead that a partner's lines are fetched: they lie too scattered for the processor to guess.
constexpr int64_t kAhead = 4;

// body(begin, end) on parts of [begin, end) of at least `grain`, in torch's thread pool (bindings.cpp).
using Body = void (*)(int64_t begin, int64_t end, void* context);
void run_parallel(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

template <class F>
void parallel_for(int64_t count, int64_t bytes_each, F body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, bytes_each));
  run_parallel(0, count, grain, [](int64_t begin, int64_t end, void* f) { (*static_cast<F*>(f))(begin, end); }, &body);
}

// fn(n, begin, end): the parts of `per_sample` pieces of each sample that fall to this thread.
template <class F>
void by_sample(int64_t begin, int64_t end, int64_t per_sample, F fn) {
  while (begin < end) {
    const int64_t n = begin / per_sample, stop = std::min(end, (n + 1) * per_sample);
    fn(n, begin - n * per_sample, stop - n * per_sample);
    begin = stop;
  }
}

// An output that the allocator has just mapped costs a page fault per 4 KB, several times the work of a kernel; with
// 2 MB pages it is one per 2 MB. Only advice: memory that is already there stays as it is.
inline void prefer_big_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t big = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + big - 1) & ~(big - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(big - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// Where an output is written: past the cache, a line at a time, where that is possible and worth it.
class Sink {
 public:
  Sink(void* memory, int64_t bytes, int64_t piece)
      : streams_(bytes >= kStreamed && reinterpret_cast<uintptr_t>(memory) % kLine == 0 && piece % kLine == 0) {
    prefer_big_pages(memory, bytes);
  }
  bool streams() const { return streams_; }

 private:
  bool streams_;
};

using Line = uint8_t __attribute__((vector_size(kLine)));

PMM_INLINE Line load_line(const uint8_t* from) {
  Line line;
  memcpy(&line, from, kLine);
  return line;
}

template <bool Streams>
PMM_INLINE void store_line(uint8_t* to, Line line) {
#if defined(__SSE2__)
  if constexpr (Streams) {
    __m128i parts[4];
    memcpy(parts, &line, kLine);
    for (int i = 0; i < 4; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, parts[i]);
    return;
  }
#endif
  memcpy(to, &line, kLine);
}

// Before another thread reads what was streamed.
inline void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace pmm::cpu
