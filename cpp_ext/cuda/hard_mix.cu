// The select and its adjoint: pmm/ops/hard_mix.py on CUDA.
//
// A thread block has a tile of one sample; a thread has kAhead vectors of it, far enough apart that a warp reads them
// in whole lines, and asks for all of them before it waits for one.
#include "in_edges.h"
#include "vector.h"

namespace pmm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 4;
constexpr int kTile = kThreads * kAhead;

template <class T, class L>
__global__ void __launch_bounds__(kThreads)
    select_kernel(const T* x, const uint8_t* replaced, const int64_t* partner, T* y, int64_t n, uint32_t cells,
                  L layout, uint32_t tiles) {
  const int64_t sample = blockIdx.x / tiles;
  const uint32_t start = blockIdx.x % tiles * kTile + threadIdx.x;
  const auto* mine = vectors_of(x, layout, sample);
  const auto* others = vectors_of(x, layout, partner_of(partner, sample, n));
  replaced += sample * cells;

  Mixed<T, L> mixed[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (const uint32_t at = start + i * kThreads; at < layout.sample)
      mixed[i].load(mine + at, others + at, L::Mask::load(replaced + layout.cell(at)));
  auto* out = vectors_of(y, layout, sample);
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (const uint32_t at = start + i * kThreads; at < layout.sample) out[at] = mixed[i].value();
}

// As a gather: what each sample keeps of its own, then what the samples that took from it send back, in a fixed order.
template <class T, class L>
__global__ void __launch_bounds__(kThreads) adjoint_kernel(const T* dy, const uint8_t* replaced, InEdges edges, T* dx,
                                                           uint32_t cells, L layout, uint32_t tiles) {
  using Vector = Pack<T, L::lanes>;
  const int64_t sample = blockIdx.x / tiles;
  const uint32_t start = blockIdx.x % tiles * kTile + threadIdx.x;

  Sum<T> sums[kAhead][L::lanes] = {};
  const auto add = [&](int64_t source, bool where) {  // to the sums: dy[source] at the cells whose mask is `where`
    const Vector* vectors = vectors_of(dy, layout, source);
    Vector read[kAhead]{};
    typename L::Mask masks[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (const uint32_t at = start + i * kThreads; at < layout.sample) {
        masks[i] = L::Mask::load(replaced + source * cells + layout.cell(at));
        if (where ? masks[i].any() : !masks[i].all()) read[i] = vectors[at];
      }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int lane = 0; lane < L::lanes; ++lane)
        if (masks[i][lane] == where) sums[i][lane] += widen(read[i].lanes[lane]);
  };
  const int32_t begin = edges.first[sample], end = edges.first[sample + 1];  // asked for before the first sum waits
  add(sample, false);
  for (int32_t edge = begin; edge < end; ++edge) add(edges.order[edge], true);

  auto* out = vectors_of(dx, layout, sample);
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (const uint32_t at = start + i * kThreads; at < layout.sample) {
      Vector sum;
#pragma unroll
      for (int lane = 0; lane < L::lanes; ++lane) sum.lanes[lane] = narrow<T>(sums[i][lane]);
      out[at] = sum;
    }
}

}  // namespace

void select(const Maps& maps, const void* x, const uint8_t* replaced, const int64_t* partner, void* y, Stream stream) {
  if (maps.n * maps.sample() == 0) return;
  check_sample("select", maps.sample());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    with_layout<T>(maps, replaced, {x, y}, [&](auto layout) {
      const int64_t tiles = ceil_div(layout.sample, kTile);
      launch("select", select_kernel<T, decltype(layout)>, {maps.n * tiles, kThreads}, stream,
             static_cast<const T*>(x), replaced, partner, static_cast<T*>(y), maps.n, maps.cells(), layout, tiles);
    });
  };
  switch (maps.dtype) {  // a select only moves bits
    case DType::Half:
    case DType::BFloat16: return run(uint16_t{});
    case DType::Float: return run(uint32_t{});
    case DType::Double: return run(uint64_t{});
  }
}

size_t adjoint_scratch(const Maps& maps) { return in_edges_scratch(maps.n); }

void adjoint(const Maps& maps, const void* dy, const uint8_t* replaced, const int64_t* partner, void* dx, void* scratch,
             Stream stream) {
  if (maps.n * maps.sample() == 0) return;
  check_sample("adjoint", maps.sample());
  const InEdges edges = in_edges("adjoint", partner, maps.n, scratch, stream);
  with_type(maps.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_layout<T>(maps, replaced, {dy, dx}, [&](auto layout) {
      const int64_t tiles = ceil_div(layout.sample, kTile);
      launch("adjoint", adjoint_kernel<T, decltype(layout)>, {maps.n * tiles, kThreads}, stream,
             static_cast<const T*>(dy), replaced, edges, static_cast<T*>(dx), maps.cells(), layout, tiles);
    });
  });
}

}  // namespace pmm::cuda
