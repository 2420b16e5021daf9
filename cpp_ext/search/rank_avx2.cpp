// For x86-64 since 2013: AVX2, and products and sums in one instruction.
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "rank.h"

namespace pmm::search {
namespace {

struct Avx2 {
  using Floats = float __attribute__((vector_size(32), may_alias));
  using Doubles = double __attribute__((vector_size(32), may_alias));
  using Half = float __attribute__((vector_size(16), aligned(4), may_alias));  // as many as Doubles has
  static constexpr int kTall = 4, kAcross = 3;  // 12 sums, which with items and a query fill 16 registers

  static PMM_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static PMM_INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }
};

}  // namespace

const Ranking kRankingAvx2 = ranking<Avx2>();

}  // namespace pmm::search
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
