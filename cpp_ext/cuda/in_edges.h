// Who takes from each sample: the edges i -> partner[i] sorted by target, without atomics and with a fixed order.
#pragma once

#include "launch.h"
#include "vector.h"

namespace pmm::cuda {

// The samples that take from n are order[first[n]] .. order[first[n + 1] - 1], ascending.
struct InEdges {
  const int32_t *order, *first;
};

inline size_t in_edges_scratch(int64_t n) { return n ? (2 * n + 1) * sizeof(int32_t) : 0; }

// One thread for each i in [0, n]. The place of an edge is the number of edges before it; n is a batch: n^2 is small.
static __global__ void sort_in_edges(const int64_t* partner, int32_t n, int32_t* order, int32_t* first) {
  const int32_t i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i > n) return;
  const int64_t target = i < n ? partner_of(partner, i, n) : n;
  int32_t before = 0, below = 0;
  for (int32_t other = 0; other < n; ++other) {
    const int64_t value = partner[other];
    before += value < target || (value == target && other < i);
    below += value < i;
  }
  first[i] = below;
  if (i < n) order[before] = i;
}

inline InEdges in_edges(const char* name, const int64_t* partner, int64_t n, void* scratch, Stream stream) {
  check_sample(name, n);
  int32_t* const order = static_cast<int32_t*>(scratch);
  constexpr int threads = 128;
  launch(name, sort_in_edges, {n ? ceil_div(n + 1, threads) : 0, threads}, stream, partner, n, order, order + n);
  return {order, order + n};
}

}  // namespace pmm::cuda
