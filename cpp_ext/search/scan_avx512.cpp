// For processors with AVX-512 VNNI: vpdpbusd, four products a lane and instruction.
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC optimize("no-tree-pre")  // which copies every sum to another register and back
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif
#include "scan.h"

namespace pmm::search {
namespace {

// The instruction multiplies unsigned by signed bytes: so rows + 128 by the query, in two planes, code = 128 high + low,
// and from the sums goes what the 128 have added. They may wrap round on the way: the result fits.
struct Vnni {
  using Word = int32_t __attribute__((may_alias));
  using Added = uint32_t __attribute__((may_alias));
  using Unsigned = uint32_t __attribute__((vector_size(kLine)));
  static constexpr int kTogether = 8;

  // what is to be subtracted, in a line of its own; then for each group high and low
  static int64_t query_bytes(int64_t groups) { return kLine + groups * 8; }

  static void prepare(const int16_t* codes, int64_t groups, void* out) {
    uint32_t added = 0;
    int8_t* const planes = static_cast<int8_t*>(out) + kLine;
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
    each<Q>(PMM_EACH(q) { high[q] = low[q] = _mm512_setzero_si512(); });
    const __m512i middle = _mm512_set1_epi8(-128);
    for (int64_t group = 0; group < groups; ++group) {
      const __m512i rows = _mm512_xor_si512(_mm512_load_si512(codes + group * kLine), middle);
      each<Q>(PMM_EACH(q) {
        const Word* const four = reinterpret_cast<const Word*>(prepared + q * size + kLine) + group * 2;
        high[q] = _mm512_dpbusd_epi32(high[q], rows, _mm512_set1_epi32(four[0]));
        low[q] = _mm512_dpbusd_epi32(low[q], rows, _mm512_set1_epi32(four[1]));
      });
    }
    each<Q>(PMM_EACH(q) {
      const Unsigned sums = reinterpret_cast<Unsigned>(high[q]) * 128 + reinterpret_cast<Unsigned>(low[q]);
      products[q] = reinterpret_cast<Ints>(sums - *reinterpret_cast<const Added*>(prepared + q * size));
    });
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
