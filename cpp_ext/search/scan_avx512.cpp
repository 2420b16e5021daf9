// For processors with AVX-512 VNNI: vpdpbusd, four products a lane and instruction.
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif
#include "scan.h"

namespace pmm::search {
namespace {

// The instruction multiplies unsigned by signed bytes: so rows + 128 by the query, in two planes, code = 128 high + low,
// and from the sums goes what the 128 have added. They may wrap round on the way: the result fits.
struct Vnni {
  static constexpr int kTogether = 8;

  // what is to be subtracted, in a line of its own; then for each group high and low
  static int64_t query_bytes(int64_t groups) { return 64 + groups * 8; }

  static void prepare(const int16_t* codes, int64_t groups, void* out) {
    uint32_t added = 0;
    int8_t* const planes = static_cast<int8_t*>(out) + 64;
    for (int64_t i = 0; i < groups * kGroup; ++i) {
      const int high = (codes[i] + 64) >> 7, low = codes[i] - 128 * high;
      int8_t* const to = planes + i / kGroup * 8 + i % kGroup;
      to[0] = int8_t(high), to[4] = int8_t(low);
      added += 128u * uint32_t(int32_t(codes[i]));
    }
    __builtin_memcpy(out, &added, 4);
  }

  template <int Q>
  static PMM_INLINE void multiply(const int8_t* codes, int64_t groups, const char* prepared, int64_t size,
                                  Ints* products) {
    __m512i high[Q], low[Q];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) high[q] = low[q] = _mm512_setzero_si512();
    const __m512i middle = _mm512_set1_epi8(-128);
    for (int64_t group = 0; group < groups; ++group) {
      const __m512i rows = _mm512_xor_si512(_mm512_load_si512(codes + group * kLine), middle);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        int32_t four[2];
        __builtin_memcpy(four, prepared + q * size + 64 + group * 8, 8);
        high[q] = _mm512_dpbusd_epi32(high[q], rows, _mm512_set1_epi32(four[0]));
        low[q] = _mm512_dpbusd_epi32(low[q], rows, _mm512_set1_epi32(four[1]));
      }
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      int32_t added;
      __builtin_memcpy(&added, prepared + q * size, 4);
      const __m512i sums = _mm512_add_epi32(_mm512_mullo_epi32(high[q], _mm512_set1_epi32(128)), low[q]);
      products[q] = reinterpret_cast<Ints>(_mm512_sub_epi32(sums, _mm512_set1_epi32(added)));
    }
  }

  static PMM_INLINE uint32_t mask(const Ints& lanes) {
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(lanes));
  }
};

}  // namespace

int64_t scan_avx512(const Scan& scan) { return scan_all<Vnni>(scan); }

}  // namespace pmm::search
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
