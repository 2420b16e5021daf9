// The global maximum of a mixed map, and its transpose: pmm/ops/hard_mix_max_pool.py on CUDA.
#include <cmath>

#include "in_edges.h"
#include "vector.h"

namespace pmm::cuda {
namespace {

constexpr int kThreads = 256;

// A value and its cell. Which of two is the maximum does not depend on the order in which they meet: NaN before
// numbers, the last NaN; else the larger value, the first of equals.
template <class S>
struct Best {
  S value;
  uint32_t cell;

  __device__ void merge(S other, uint32_t at) {
    const bool replaces =
        other != other ? value == value || at > cell : other > value || (other == value && at < cell);
    if (replaces) *this = {other, at};
  }
  // merge() for a cell behind all those seen so far, in half the instructions.
  __device__ void next(S other, uint32_t at) {
    if (other > value || other != other) *this = {other, at};
  }
};

template <class T>
__device__ Best<Sum<T>> lowest(uint32_t cell) {  // loses to all, but for -Inf in a later cell
  return {static_cast<Sum<T>>(-INFINITY), cell};
}

// NCHW: `group` lanes of a warp share a plane, `group` a power of two.
template <class T, class L>
__global__ void __launch_bounds__(kThreads)
    pool_planes(const T* x, const uint8_t* replaced, const int64_t* partner, T* pooled, int64_t* cell, int64_t n,
                uint32_t c, uint32_t cells, L layout, uint32_t group, uint32_t tiles) {
  constexpr int ahead = 3;
  const int64_t sample = blockIdx.x / tiles;
  const uint32_t channel = (blockIdx.x % tiles * kThreads + threadIdx.x) / group, lane = threadIdx.x % group;
  const int64_t plane = static_cast<int64_t>(channel) * layout.run;
  const auto* mine = vectors_of(x, layout, sample) + plane;
  const auto* others = vectors_of(x, layout, partner_of(partner, sample, n)) + plane;
  replaced += sample * cells;

  auto best = lowest<T>(lane * L::lanes);
  const uint32_t end = channel < c ? layout.run : 0;  // lanes without a plane stay for the shuffles
  for (uint32_t start = lane; start < end; start += ahead * group) {
    Mixed<T, L> mixed[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i)
      if (const uint32_t at = start + i * group; at < end)
        mixed[i].load(mine + at, others + at, L::Mask::load(replaced + at * L::lanes));
#pragma unroll
    for (int i = 0; i < ahead; ++i)
      if (const uint32_t at = start + i * group; at < end) {
        const auto vector = mixed[i].value();
#pragma unroll
        for (int v = 0; v < L::lanes; ++v) best.next(widen(vector.lanes[v]), at * L::lanes + v);
      }
  }
  for (int distance = static_cast<int>(group) / 2; distance > 0; distance /= 2) {
    const Sum<T> value = __shfl_xor_sync(kWholeWarp, best.value, distance);
    best.merge(value, __shfl_xor_sync(kWholeWarp, best.cell, distance));
  }
  if (lane == 0 && channel < c) {
    pooled[sample * c + channel] = narrow<T>(best.value);
    cell[sample * c + channel] = best.cell;
  }
}

// channels_last: a warp has 32 vectors of channels, each of the block's warps every eighth cell.
template <class T, class L>
__global__ void __launch_bounds__(kThreads)
    pool_channels(const T* x, const uint8_t* replaced, const int64_t* partner, T* pooled, int64_t* cell, int64_t n,
                  uint32_t c, uint32_t cells, L layout, uint32_t tiles) {
  constexpr int V = L::lanes, ahead = 4, slices = kThreads / kWarp;
  const int64_t sample = blockIdx.x / tiles;
  const uint32_t tile = blockIdx.x % tiles * kWarp, column = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const auto* mine = vectors_of(x, layout, sample) + tile + column;
  const auto* others = vectors_of(x, layout, partner_of(partner, sample, n)) + tile + column;
  replaced += sample * cells;

  Best<Sum<T>> best[V];
#pragma unroll
  for (int v = 0; v < V; ++v) best[v] = lowest<T>(slice);
  const uint32_t end = tile + column < layout.run ? cells : 0;  // threads without channels stay for the barrier
  for (uint32_t start = slice; start < end; start += ahead * slices) {
    Mixed<T, L> mixed[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i)
      if (const uint32_t at = start + i * slices; at < end) {
        const int64_t offset = static_cast<int64_t>(at) * layout.run;
        mixed[i].load(mine + offset, others + offset, L::Mask::load(replaced + at));
      }
#pragma unroll
    for (int i = 0; i < ahead; ++i)
      if (const uint32_t at = start + i * slices; at < end)
#pragma unroll
        for (int v = 0; v < V; ++v) best[v].next(widen(mixed[i].own.lanes[v]), at);
  }

  auto* shared = shared_memory<Best<Sum<T>>>();  // [slices][V][32]
#pragma unroll
  for (int v = 0; v < V; ++v) shared[(slice * V + v) * kWarp + column] = best[v];
  __syncthreads();
  const uint32_t channel = tile * V + threadIdx.x;
  if (threadIdx.x >= kWarp * V || channel >= c) return;
  const uint32_t place = threadIdx.x % V * kWarp + threadIdx.x / V;
  auto all = shared[place];
  for (int other = 1; other < slices; ++other) {
    const auto& candidate = shared[other * V * kWarp + place];
    all.merge(candidate.value, candidate.cell);
  }
  pooled[sample * c + channel] = narrow<T>(all.value);
  cell[sample * c + channel] = all.cell;
}

constexpr int kChannels = 128;  // of one block of unpool, and its threads

// A block has some channels of one sample in all cells: it fills them with zero, then each thread adds up one channel.
template <class T, class L>
__global__ void __launch_bounds__(kChannels)
    unpool_kernel(const T* dy, const int64_t* cell, const uint8_t* replaced, InEdges edges, T* dx, uint32_t c,
                  uint32_t cells, L layout, uint32_t tiles) {
  const int64_t sample = blockIdx.x / tiles;
  const uint32_t first = blockIdx.x % tiles * kChannels, channels = min(kChannels, c - first);
  // the region is `rows` times `length` vectors, one row in NCHW, and with channels_last one for each cell
  const uint32_t rows = L::channels_last ? cells : 1;
  const uint32_t length = L::channels_last ? channels / L::lanes : channels * layout.run;
  auto* region = vectors_of(dx, layout, sample) + (L::channels_last ? first / L::lanes : first * layout.run);
  for (uint32_t at = threadIdx.x; at < rows * length; at += kChannels)
    region[L::channels_last ? at / length * layout.run + at % length : at] = {};
  __syncthreads();

  const uint32_t channel = first + threadIdx.x;
  if (channel >= c) return;
  dx += sample * c * cells;
  const int32_t begin = edges.first[sample], count = 1 + edges.first[sample + 1] - begin;
  constexpr int32_t nowhere = -1;
  const auto source = [&](int32_t i) { return i == 0 ? sample : edges.order[begin + i - 1]; };  // itself, then takers
  const auto target = [&](int32_t i) {  // the cell of this sample that contribution i goes to, or nowhere
    const int64_t from = source(i), at = cell[from * c + channel];
    assert(0 <= at && at < cells && "cell must be in [0, height * width)");
    return (replaced[from * cells + at] != 0) == (i > 0) ? static_cast<int32_t>(at) : nowhere;
  };
  for (int32_t i = 0; i < count; ++i) {
    const int32_t at = target(i);
    bool first_there = at != nowhere;  // the first contribution to a cell writes the sum of all
    Sum<T> sum = first_there ? widen(dy[source(i) * c + channel]) : Sum<T>{0};
    for (int32_t other = 0; other < count && first_there; ++other)
      if (other != i && target(other) == at) {
        first_there = other > i;
        sum += widen(dy[source(other) * c + channel]);
      }
    if (first_there) dx[L::channels_last ? at * c + channel : channel * cells + at] = narrow<T>(sum);
  }
}

}  // namespace

void max_pool(const Maps& maps, const void* x, const uint8_t* replaced, const int64_t* partner, void* pooled,
              int64_t* cell, Stream stream) {
  if (maps.n * maps.sample() == 0) return;
  check_sample("max_pool", maps.sample());
  with_type(maps.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_layout<T>(maps, replaced, {x}, [&](auto layout) {
      using L = decltype(layout);
      if constexpr (L::channels_last) {
        const int64_t tiles = ceil_div(layout.run, kWarp);
        launch("max_pool", pool_channels<T, L>,
               {maps.n * tiles, kThreads, kThreads * L::lanes * sizeof(Best<Sum<T>>)}, stream,
               static_cast<const T*>(x), replaced, partner, static_cast<T*>(pooled), cell, maps.n, maps.c, maps.cells(),
               layout, tiles);
      } else {
        uint32_t group = 1;
        while (group < kWarp && group * 3 < layout.run) group *= 2;  // three vectors for each lane
        const int64_t tiles = ceil_div(maps.c * group, kThreads);
        launch("max_pool", pool_planes<T, L>, {maps.n * tiles, kThreads}, stream, static_cast<const T*>(x), replaced,
               partner, static_cast<T*>(pooled), cell, maps.n, maps.c, maps.cells(), layout, group, tiles);
      }
    });
  });
}

size_t unpool_scratch(const Maps& maps) { return in_edges_scratch(maps.n); }

void unpool(const Maps& maps, const void* dy, const int64_t* cell, const uint8_t* replaced, const int64_t* partner,
            void* dx, void* scratch, Stream stream) {
  if (maps.n * maps.sample() == 0) return;
  check_sample("unpool", maps.sample());
  const InEdges edges = in_edges("unpool", partner, maps.n, scratch, stream);
  with_type(maps.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_layout<T>(maps, replaced, {dx}, [&](auto layout) {
      const int64_t tiles = ceil_div(maps.c, kChannels);
      launch("unpool", unpool_kernel<T, decltype(layout)>, {maps.n * tiles, kChannels}, stream,
             static_cast<const T*>(dy), cell, replaced, edges, static_cast<T*>(dx), maps.c, maps.cells(), layout,
             tiles);
    });
  });
}

}  // namespace pmm::cuda
