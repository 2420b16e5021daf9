// For x86-64 since 2013: vpmaddwd, 16-bit codes of the query beside rows that are widened.
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC optimize("no-tree-pre")  // which copies every sum to another register and back
#pragma GCC target("avx2")
#endif
#include "scan.h"

namespace pmm::search {
namespace {

struct Avx2 {
  using Four = int64_t __attribute__((may_alias));
  static constexpr int kTogether = 2;

  static int64_t query_bytes(int64_t groups) { return groups * kGroup * 2; }

  static void prepare(const int16_t* codes, int64_t groups, void* out) {
    __builtin_memcpy(out, codes, query_bytes(groups));
  }

  template <int Q>
  static PMM_INLINE void multiply(const int8_t* codes, int64_t groups, const char* prepared, int64_t size,
                                  Ints* products) {
    __m256i sums[Q][4];
    each<Q>(PMM_EACH(q) { each<4>(PMM_EACH(part) { sums[q][part] = _mm256_setzero_si256(); }); });
    for (int64_t group = 0; group < groups; ++group) {
      __m256i rows[4];  // four each
      each<4>(PMM_EACH(part) {
        const __m128i* const from = reinterpret_cast<const __m128i*>(codes + group * kLine);
        rows[part] = _mm256_cvtepi8_epi16(_mm_load_si128(from + part));
      });
      each<Q>(PMM_EACH(q) {
        const __m256i query = _mm256_set1_epi64x(reinterpret_cast<const Four*>(prepared + q * size)[group]);
        each<4>(PMM_EACH(part) {
          sums[q][part] = _mm256_add_epi32(sums[q][part], _mm256_madd_epi16(rows[part], query));
        });
      });
    }
    each<Q>(PMM_EACH(q) {
      __m256i eight[2];
      each<2>(PMM_EACH(i) {  // of each row two sums beside each other
        eight[i] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[q][2 * i], sums[q][2 * i + 1]), 0xd8);
      });
      __builtin_memcpy(&products[q], eight, kLine);
    });
  }

  static PMM_INLINE uint32_t mask(const Ints& lanes) {
    __m256 eight[2];
    __builtin_memcpy(eight, &lanes, kLine);
    return _mm256_movemask_ps(eight[0]) | _mm256_movemask_ps(eight[1]) << 8;
  }
};

}  // namespace

int64_t scan_avx2(const Scan& scan) { return scan_all<Avx2>(scan); }

}  // namespace pmm::search
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
