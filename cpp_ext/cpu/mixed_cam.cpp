// mixed_cam: a weighted sum over channels. Its order is fixed by the shape alone, never by threads or by the
// instruction set, so that a machine's answers repeat (and no fused multiply-add: see setup.py).
#include "../kernels.h"
#include "../scalar.h"
#include "mask.h"
#include "parallel.h"

namespace pmm::cpu {
namespace {

constexpr int64_t kRun = 64;    // channels added before they join the total: a blocked sum errs far less than a long one
constexpr int64_t kTile = 256;  // cells whose sums stay in the first-level cache

template <class S>
S relu(S value) {
  return value < 0 ? S(0) : value;  // NaN stays NaN
}

// `count` cells (at most kTile) of one sample, in planes of `plane` bytes; `touched` by line of these cells.
template <class T>
PMM_CLONES void cam_tile(const uint8_t* own, const uint8_t* partner, const uint8_t* mask, const uint8_t* touched,
                         const Sum<T>* weights, Sum<T>* cam, int64_t channels, int64_t plane, int64_t count) {
  constexpr int64_t kValues = kLine / sizeof(T);
  const int64_t bytes = count * int64_t(sizeof(T));
  Sum<T> total[kTile] = {};
  for (int64_t start = 0; start < channels; start += kRun) {
    Sum<T> sum[kTile] = {};
    for (int64_t c = start; c < std::min(start + kRun, channels); ++c) {
      const uint8_t *mine = own + c * plane, *theirs = partner + c * plane;
      const Sum<T> weight = weights[c];
      for (int64_t at = 0, line = 0; at < bytes; at += kLine, ++line) {
        if (touched[line]) __builtin_prefetch(theirs + at + kAhead * plane);
        const Line cells = selected_line(mine + at, theirs + at, mask + at, touched[line], std::min(kLine, bytes - at));
        T values[kValues];
        memcpy(values, &cells, kLine);
        for (int64_t i = 0; i < kValues; ++i) sum[line * kValues + i] += weight * widen(values[i]);
      }
    }
    for (int64_t i = 0; i < kTile; ++i) total[i] += sum[i];
  }
  for (int64_t i = 0; i < count; ++i) cam[i] = relu(total[i]);
}

template <class T>
PMM_CLONES Sum<T> dot(const T* row, const Sum<T>* weights, int64_t channels) {
  using S = Sum<T>;
  constexpr int64_t kLanes = 64;
  S sum[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] += weights[c + lane] * widen(row[c + lane]);
  for (int64_t lane = 0; c + lane < channels; ++lane) sum[lane] += weights[c + lane] * widen(row[c + lane]);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
  return sum[0];
}

template <class T>
void mixed_cam_of(const Maps& m, const T* x, const uint8_t* replaced, const int64_t* partner, const Sum<T>* weights,
                  Sum<T>* cam) {
  const int64_t cells = m.cells(), size = sizeof(T);
  if (!m.channels_last) {
    const int64_t tiles = (cells + kTile - 1) / kTile;
    const auto* from = reinterpret_cast<const uint8_t*>(x);
    parallel_for(m.n * tiles, m.c * kTile * size, [&](int64_t begin, int64_t end) {
      PlaneMask mask(cells, size);
      by_sample(begin, end, tiles, [&](int64_t n, int64_t first, int64_t last) {
        mask.read(replaced + n * cells);
        for (int64_t cell = first * kTile; cell < std::min(last * kTile, cells); cell += kTile) {
          const int64_t at = cell * size;
          cam_tile<T>(from + n * m.sample() * size + at, from + partner[n] * m.sample() * size + at, mask.bytes() + at,
                      mask.touched() + at / kLine, weights + n * m.c, cam + n * cells + cell, m.c, cells * size,
                      std::min(kTile, cells - cell));
        }
      });
    });
    return;
  }
  parallel_for(m.n * cells, m.c * size, [&](int64_t begin, int64_t end) {
    by_sample(begin, end, cells, [&](int64_t n, int64_t first, int64_t last) {
      for (int64_t cell = first; cell < last; ++cell) {
        const int64_t source = replaced[n * cells + cell] ? partner[n] : n;
        cam[n * cells + cell] = relu(dot(x + (source * cells + cell) * m.c, weights + n * m.c, m.c));
      }
    });
  });
}

}  // namespace

void mixed_cam(const Maps& m, const void* x, const uint8_t* replaced, const int64_t* partner, const void* weights,
               void* cam) {
  with_type(m.dtype, [&](auto type) {
    using T = decltype(type);
    mixed_cam_of(m, static_cast<const T*>(x), replaced, partner, static_cast<const Sum<T>*>(weights),
                 static_cast<Sum<T>*>(cam));
  });
}

}  // namespace pmm::cpu
