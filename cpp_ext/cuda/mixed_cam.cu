// The class activation map of a mixed map: pmm/ops/mixed_cam.py on CUDA.
//
// Sums run in a fixed order through partial sums of a few terms each, so that they are the same in every run and keep
// the accuracy of a pairwise sum.
#include "vector.h"

namespace pmm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 4;
constexpr int kSlice = 128;  // channels of one partial sum in NCHW

template <class S>
__device__ S relu(S value) {
  return value <= 0 ? S{0} : value;  // keeps NaN, as torch does
}

// NCHW, first step: partial [n, slices, cells]. A block has one slice of channels and up to kThreads vectors of cells;
// where a plane has fewer, rows of threads share the channels. A thread stays at its cells: it needs one mask.
template <class T, class L>
__global__ void __launch_bounds__(kThreads)
    sum_slices(const T* x, const uint8_t* replaced, const int64_t* partner, const Sum<T>* weights, Sum<T>* partial,
               int64_t n, uint32_t c, uint32_t cells, L layout, uint32_t slices, uint32_t tiles) {
  constexpr int V = L::lanes;
  const uint32_t tile = blockIdx.x % tiles * kThreads, slice = blockIdx.x / tiles % slices;
  const int64_t sample = blockIdx.x / tiles / slices;
  const uint32_t width = min(kThreads, layout.run - tile), rows = kThreads / width;
  const uint32_t column = threadIdx.x % width, row = threadIdx.x / width;
  const auto* mine = vectors_of(x, layout, sample) + tile + column;
  const auto* others = vectors_of(x, layout, partner_of(partner, sample, n)) + tile + column;
  const auto mask = L::Mask::load(replaced + sample * cells + (tile + column) * V);
  weights += sample * c;

  Sum<T> sums[V] = {};
  const uint32_t end = row < rows ? min(c, (slice + 1) * kSlice) : 0;
  for (uint32_t start = slice * kSlice + row; start < end; start += kAhead * rows) {
    Mixed<T, L> mixed[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (const uint32_t channel = start + i * rows; channel < end) {
        const int64_t plane = static_cast<int64_t>(channel) * layout.run;
        mixed[i].load(mine + plane, others + plane, mask);
      }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (const uint32_t channel = start + i * rows; channel < end) {
        const Sum<T> weight = weights[channel];
        const auto vector = mixed[i].value();
#pragma unroll
        for (int v = 0; v < V; ++v) sums[v] += weight * widen(vector.lanes[v]);
      }
  }

  auto* shared = shared_memory<Sum<T>>();  // [rows][V][width]
  if (row < rows)
#pragma unroll
    for (int v = 0; v < V; ++v) shared[(row * V + v) * width + column] = sums[v];
  __syncthreads();
  partial += (sample * slices + slice) * cells + tile * V;
  for (uint32_t at = threadIdx.x; at < width * V; at += kThreads) {
    Sum<T> sum = 0;
    for (uint32_t other = 0; other < rows; ++other) sum += shared[(other * V + at % V) * width + at / V];
    partial[at] = sum;
  }
}

// NCHW, second step: a thread adds the slices of one cell.
template <class S>
__global__ void __launch_bounds__(kThreads)
    add_slices(const S* partial, S* cam, int64_t size, uint32_t cells, uint32_t slices) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= size) return;
  partial += at / cells * slices * cells + at % cells;
  S sum = 0;
  for (uint32_t slice = 0; slice < slices; ++slice) sum += partial[static_cast<int64_t>(slice) * cells];
  cam[at] = relu(sum);
}

// channels_last: a warp has kAhead cells, which share each weight it reads.
template <class T, class L>
__global__ void __launch_bounds__(kThreads)
    sum_channels(const T* x, const uint8_t* replaced, const int64_t* partner, const Sum<T>* weights, Sum<T>* cam,
                 int64_t n, uint32_t c, uint32_t cells, L layout, uint32_t tiles) {
  constexpr int V = L::lanes, W = V * sizeof(Sum<T>) > 16 ? 16 / sizeof(Sum<T>) : V;  // weights in one load
  const int64_t sample = blockIdx.x / tiles;
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t first = (blockIdx.x % tiles * kThreads + threadIdx.x) / kWarp * kAhead;
  const int64_t other = partner_of(partner, sample, n);
  const Pack<T, V>* vectors[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const uint32_t cell = min(first + i, cells - 1);  // behind the end: the last cell again, not stored
    const int64_t source = replaced[sample * cells + cell] ? other : sample;
    vectors[i] = vectors_of(x, layout, source) + static_cast<int64_t>(cell) * layout.run;
  }
  weights += sample * c;

  Sum<T> sums[kAhead] = {};
  for (uint32_t at = lane; at < layout.run; at += kWarp) {
    Pack<T, V> read[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) read[i] = vectors[i][at];
#pragma unroll
    for (int part = 0; part < V / W; ++part) {
      const auto weight = reinterpret_cast<const Pack<Sum<T>, W>*>(weights)[at * (V / W) + part];
#pragma unroll
      for (int w = 0; w < W; ++w)
#pragma unroll
        for (int i = 0; i < kAhead; ++i) sums[i] += weight.lanes[w] * widen(read[i].lanes[part * W + w]);
    }
  }
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      sums[i] += __shfl_xor_sync(kWholeWarp, sums[i], distance);
    if (lane == 0 && first + i < cells) cam[sample * cells + first + i] = relu(sums[i]);
  }
}

int64_t slices_of(const Maps& maps) { return ceil_div(maps.c, kSlice); }

}  // namespace

size_t mixed_cam_scratch(const Maps& maps) {
  const size_t sum = maps.dtype == DType::Double ? sizeof(double) : sizeof(float);
  return maps.channels_last ? 0 : maps.n * slices_of(maps) * maps.cells() * sum;
}

void mixed_cam(const Maps& maps, const void* x, const uint8_t* replaced, const int64_t* partner, const void* weights,
               void* cam, void* scratch, Stream stream) {
  if (maps.n * maps.cells() == 0) return;
  check_sample("mixed_cam", maps.sample());
  with_type(maps.dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Sum<T>;
    with_layout<T>(maps, replaced, {x, weights}, [&](auto layout) {
      using L = decltype(layout);
      if constexpr (L::channels_last) {
        const int64_t tiles = ceil_div(maps.cells(), kThreads / kWarp * kAhead);
        launch("mixed_cam", sum_channels<T, L>, {maps.n * tiles, kThreads}, stream, static_cast<const T*>(x), replaced,
               partner, static_cast<const S*>(weights), static_cast<S*>(cam), maps.n, maps.c, maps.cells(), layout,
               tiles);
      } else {
        const int64_t slices = slices_of(maps), tiles = ceil_div(layout.run, kThreads), size = maps.n * maps.cells();
        launch("mixed_cam", sum_slices<T, L>, {maps.n * slices * tiles, kThreads, kThreads * L::lanes * sizeof(S)},
               stream, static_cast<const T*>(x), replaced, partner, static_cast<const S*>(weights),
               static_cast<S*>(scratch), maps.n, maps.c, maps.cells(), layout, slices, tiles);
        launch("mixed_cam", add_slices<S>, {ceil_div(size, kThreads), kThreads}, stream, static_cast<const S*>(scratch),
               static_cast<S*>(cam), size, maps.cells(), slices);
      }
    });
  });
}

}  // namespace pmm::cuda
