// The six kernels of the mix, on the CPU and on CUDA: what each computes, on plain memory, without torch.
//
// All arguments have been checked by the caller (pmm/ops): sizes fit, memory is dense, dtypes are as said. Outputs are
// written completely. The truth about every rule is the plain-torch reference in pmm/ops/<op>.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pmm {

enum class DType : int32_t { Half, BFloat16, Float, Double };

// Dense maps [n, c, h, w], in memory [n][c][h][w] or, with channels_last, [n][h][w][c].
struct Maps {
  int64_t n, c, h, w;
  DType dtype;
  bool channels_last;

  int64_t cells() const { return h * w; }
  int64_t sample() const { return c * h * w; }  // elements of one sample
};

// Which cells a mix replaces: CAMs [n, h, w] of Float or Double in blocks of bh x bw, the k first blocks of each.
struct Ranking {
  int64_t n, h, w, bh, bw, k;
  DType dtype;
  bool skip_empty;  // a CAM without a positive cell replaces nothing

  int64_t rows() const { return (h + bh - 1) / bh; }
  int64_t columns() const { return (w + bw - 1) / bw; }
  int64_t blocks() const { return rows() * columns(); }
};

// In every signature: `replaced` is [n, h, w] of 0 or 1, `partner` [n] in [0, n).
//   rank_blocks  cam -> replaced: the cells of the k blocks with the largest sums, ties to the lower id, NaN last
//   select       y[n] = x[partner[n]] where replaced[n], else x[n]
//   adjoint      dx[n] = dy[n] where not replaced[n], + dy[i] where replaced[i], for each i with partner[i] = n, ascending
//   max_pool     pooled [n, c], cell [n, c]: the largest value of the selected map and where (first of equals, last NaN)
//   unpool       dx: zero, but for the sums of dy [n, c] at the cells they were read from
//   mixed_cam    cam [n, h, w] = ReLU(sum over c of weights [n, c] * selected map); weights and cam in float, or double
//                beside Double maps
// Sums are kept in float (double for Double) and rounded once.

namespace cpu {
void rank_blocks(const Ranking&, const void* cam, uint8_t* replaced);
void select(const Maps&, const void* x, const uint8_t* replaced, const int64_t* partner, void* y);
void adjoint(const Maps&, const void* dy, const uint8_t* replaced, const int64_t* partner, void* dx);
void max_pool(const Maps&, const void* x, const uint8_t* replaced, const int64_t* partner, void* pooled, int64_t* cell);
void unpool(const Maps&, const void* dy, const int64_t* cell, const uint8_t* replaced, const int64_t* partner, void* dx);
void mixed_cam(const Maps&, const void* x, const uint8_t* replaced, const int64_t* partner, const void* weights,
               void* cam);
}  // namespace cpu

// On CUDA a partner outside [0, n) stops the device with an assertion: looking at it on the host would synchronise.
// Work memory is the caller's: as many bytes as the function beside the kernel says (256-byte aligned, any content).
namespace cuda {
using Stream = void*;  // a cudaStream_t

size_t rank_blocks_scratch(const Ranking&);
void rank_blocks(const Ranking&, const void* cam, uint8_t* replaced, void* scratch, Stream);

void select(const Maps&, const void* x, const uint8_t* replaced, const int64_t* partner, void* y, Stream);

size_t adjoint_scratch(const Maps&);
void adjoint(const Maps&, const void* dy, const uint8_t* replaced, const int64_t* partner, void* dx, void* scratch,
             Stream);

void max_pool(const Maps&, const void* x, const uint8_t* replaced, const int64_t* partner, void* pooled, int64_t* cell,
              Stream);

size_t unpool_scratch(const Maps&);
void unpool(const Maps&, const void* dy, const int64_t* cell, const uint8_t* replaced, const int64_t* partner, void* dx,
            void* scratch, Stream);

size_t mixed_cam_scratch(const Maps&);
void mixed_cam(const Maps&, const void* x, const uint8_t* replaced, const int64_t* partner, const void* weights,
               void* cam, void* scratch, Stream);
}  // namespace cuda

}  // namespace pmm
