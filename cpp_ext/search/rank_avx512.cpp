// For processors with AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#include "rank.h"

namespace pmm::search {
namespace {

struct Avx512 {
  using Floats = float __attribute__((vector_size(64), may_alias));
  using Doubles = double __attribute__((vector_size(64), may_alias));
  using Half = float __attribute__((vector_size(32), aligned(4), may_alias));  // as many as Doubles has
  static constexpr int kTall = 14, kAcross = 2;  // 28 sums, which with items and a query nearly fill 32 registers

  static PMM_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static PMM_INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
};

}  // namespace

const Ranking kRankingAvx512 = ranking<Avx512>();

}  // namespace pmm::search
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
