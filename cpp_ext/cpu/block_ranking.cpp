// rank_blocks: small beside everything else, so written plainly.
#include <cmath>
#include <limits>
#include <vector>

#include "../kernels.h"
#include "parallel.h"

namespace pmm::cpu {
namespace {

template <class T>
void rank_sample(const Ranking& r, const T* cam, T* scores, uint8_t* replaced) {
  const int64_t rows = r.rows(), blocks = r.blocks();
  bool positive = !r.skip_empty;
  std::fill(scores, scores + blocks, T(0));
  for (int64_t i = 0; i < r.h; ++i) {  // row-major: each block's cells come in the order the definition adds them
    for (int64_t j = 0; j < r.w; ++j) {
      const T value = cam[i * r.w + j];
      T& score = scores[j / r.bw * rows + i / r.bh];
      score = i % r.bh == 0 && j % r.bw == 0 ? value : score + value;
      positive |= value > 0;
    }
  }
  for (int64_t b = 0; b < blocks; ++b)
    if (std::isnan(scores[b])) scores[b] = -std::numeric_limits<T>::infinity();
  std::fill(replaced, replaced + r.h * r.w, uint8_t(0));
  if (!positive) return;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t rank = 0;
    for (int64_t other = 0; other < blocks; ++other)
      rank += scores[other] > scores[b] || (scores[other] == scores[b] && other < b);
    if (rank >= r.k) continue;
    const int64_t top = b % rows * r.bh, left = b / rows * r.bw;
    for (int64_t i = top; i < std::min(top + r.bh, r.h); ++i)
      for (int64_t j = left; j < std::min(left + r.bw, r.w); ++j) replaced[i * r.w + j] = 1;
  }
}

template <class T>
void rank_all(const Ranking& r, const T* cam, uint8_t* replaced) {
  const int64_t cells = r.h * r.w;
  parallel_for(r.n, r.blocks() * r.blocks(), [&](int64_t begin, int64_t end) {
    std::vector<T> scores(r.blocks());
    for (int64_t n = begin; n < end; ++n) rank_sample(r, cam + n * cells, scores.data(), replaced + n * cells);
  });
}

}  // namespace

void rank_blocks(const Ranking& r, const void* cam, uint8_t* replaced) {
  if (r.dtype == DType::Double)
    rank_all(r, static_cast<const double*>(cam), replaced);
  else
    rank_all(r, static_cast<const float*>(cam), replaced);
}

}  // namespace pmm::cpu
