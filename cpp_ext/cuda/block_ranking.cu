// The cells that a mix replaces: pmm/ops/block_ranking.py on CUDA. One thread block ranks one sample.
#include <algorithm>
#include <cmath>

#include "../scalar.h"
#include "launch.h"

namespace pmm::cuda {
namespace {

struct Extent {
  int32_t h, w, bh, bw, rows, blocks;
};

// Calls visit(cell) for the cells of a block, row-major; edge blocks have those that exist. Ids run down the columns.
template <class Visit>
__device__ void for_cells(const Extent& map, int32_t block, Visit visit) {
  const int32_t top = block % map.rows * map.bh, left = block / map.rows * map.bw;
  const int32_t bottom = min(map.bh, map.h - top) + top, right = min(map.bw, map.w - left) + left;
  for (int32_t row = top; row < bottom; ++row)
    for (int32_t column = left; column < right; ++column) visit(row * map.w + column);
}

// Every thread sums, ranks and writes the same blocks, one or more; between, all see all scores.
template <class T>
__global__ void rank_kernel(const T* cam, Extent map, int32_t k, bool skip_empty, T* scores, uint8_t* replaced) {
  cam += static_cast<int64_t>(blockIdx.x) * map.h * map.w;
  replaced += static_cast<int64_t>(blockIdx.x) * map.h * map.w;
  scores += static_cast<int64_t>(blockIdx.x) * map.blocks;
  const int32_t thread = static_cast<int32_t>(threadIdx.x), threads = static_cast<int32_t>(blockDim.x);

  bool positive = false;
  for (int32_t block = thread; block < map.blocks; block += threads) {
    T sum = 0;
    for_cells(map, block, [&](int32_t cell) {
      sum += cam[cell];  // one after another: the bits of the reference
      positive = positive || cam[cell] > 0;
    });
    scores[block] = sum != sum ? static_cast<T>(-INFINITY) : sum;
  }
  const bool replaces = __syncthreads_or(positive) || !skip_empty;

  for (int32_t block = thread; block < map.blocks; block += threads) {
    const T mine = scores[block];
    int32_t rank = 0;
    for (int32_t other = 0; other < map.blocks; ++other)
      rank += scores[other] > mine || (scores[other] == mine && other < block);
    const uint8_t selected = replaces && rank < k;
    for_cells(map, block, [&](int32_t cell) { replaced[cell] = selected; });
  }
}

}  // namespace

size_t rank_blocks_scratch(const Ranking& ranking) {
  return ranking.n * ranking.blocks() * (ranking.dtype == DType::Double ? sizeof(double) : sizeof(float));
}

void rank_blocks(const Ranking& ranking, const void* cam, uint8_t* replaced, void* scratch, Stream stream) {
  const int64_t h = ranking.h, w = ranking.w;
  if (ranking.n * h * w == 0) return;
  check_sample("rank_blocks", h * w);
  const Extent map{static_cast<int32_t>(h),
                   static_cast<int32_t>(w),
                   static_cast<int32_t>(std::min(ranking.bh, h)),
                   static_cast<int32_t>(std::min(ranking.bw, w)),
                   static_cast<int32_t>(ranking.rows()),
                   static_cast<int32_t>(ranking.blocks())};
  const int threads = static_cast<int>(std::min<int64_t>(256, ceil_div(map.blocks, kWarp) * kWarp));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    launch("rank_blocks", rank_kernel<T>, {ranking.n, threads}, stream, static_cast<const T*>(cam), map, ranking.k,
           ranking.skip_empty, static_cast<T*>(scratch), replaced);
  };
  return ranking.dtype == DType::Double ? run(double{}) : run(float{});
}

}  // namespace pmm::cuda
