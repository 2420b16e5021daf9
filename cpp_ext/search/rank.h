// Distances of embeddings and what lies within windows of them, compiled once for each instruction set: a file includes
// this where its target is set, and gives an `Isa` with registers and the products of their numbers.
//
// Nothing of the standard library here, as in scan.h.
#pragma once

#include <immintrin.h>
#include <stdlib.h>

#include "search.h"
#include "unroll.h"

namespace pmm::search {
namespace {

constexpr int64_t kStrip = 4096;        // distances that are looked at for all windows while they are in the cache
constexpr int64_t kFewWindows = 48;     // up to which looking at each is faster than a search among them
constexpr int64_t kItemBytes = 400000;  // of packed items: they stay in the second cache beside a tile of queries

// The dot products of kTall queries and kWide items at once.
template <class Isa>
struct Tile {
  using Floats = typename Isa::Floats;
  static constexpr int kAcross = Isa::kAcross, kWide = kAcross * sizeof(Floats) / sizeof(float), kTall = Isa::kTall;

  // Rows [count][dims] less a centre into [dims][width], where what is beyond `count` is 0.
  static void pack(const float* rows, int64_t count, int64_t dims, const float* centre, int64_t width, float* to) {
    int64_t row = 0;
    for (; row + 8 <= width && row + 8 <= count; row += 8) {
      const float* const from = rows + row * dims;
      int64_t dim = 0;
      for (; dim + 8 <= dims; dim += 8) pack_eight(from + dim, dims, centre + dim, width, to + dim * width + row);
      for (; dim < dims; ++dim)
        for (int64_t i = 0; i < 8; ++i) to[dim * width + row + i] = from[i * dims + dim] - centre[dim];
    }
    for (; row < width; ++row)
      for (int64_t dim = 0; dim < dims; ++dim)
        to[dim * width + row] = row < count ? rows[row * dims + dim] - centre[dim] : 0.0f;
  }

  // Eight dimensions of eight rows.
  static PMM_INLINE void pack_eight(const float* rows, int64_t dims, const float* centre, int64_t width, float* to) {
    const __m256 middle = _mm256_loadu_ps(centre);
    __m256 a[8], b[8];
    each<8>(PMM_EACH(i) { a[i] = _mm256_sub_ps(_mm256_loadu_ps(rows + i * dims), middle); });
    each<4>(PMM_EACH(i) {  // pairs, then fours, then halves
      b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
      b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    });
    each<2>(PMM_EACH(i) {
      a[4 * i] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0x44);
      a[4 * i + 1] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0xee);
      a[4 * i + 2] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0x44);
      a[4 * i + 3] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0xee);
    });
    each<4>(PMM_EACH(i) {
      _mm256_storeu_ps(to + i * width, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
      _mm256_storeu_ps(to + (i + 4) * width, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    });
  }

  // In sums of kDimsAtOnce products, which are then added up: see pmm/evaluation/rounding.py.
  static __attribute__((noinline)) void multiply(const float* tall, const float* wide, int64_t dims,
                                                 Floats (*sums)[kAcross]) {
    each<kTall>(PMM_EACH(q) { each<kAcross>(PMM_EACH(i) { sums[q][i] = Floats{}; }); });
    for (int64_t dim = 0; dim < dims;) {
      const int64_t stop = dim + kDimsAtOnce < dims ? dim + kDimsAtOnce : dims;
      Floats part[kTall][kAcross];
      each<kTall>(PMM_EACH(q) { each<kAcross>(PMM_EACH(i) { part[q][i] = Floats{}; }); });
      for (; dim < stop; ++dim) {
        Floats items[kAcross];
        each<kAcross>(PMM_EACH(i) { items[i] = reinterpret_cast<const Floats*>(wide + dim * kWide)[i]; });
        each<kTall>(PMM_EACH(q) {
          const Floats query = Floats{} + tall[dim * kTall + q];
          each<kAcross>(PMM_EACH(i) { part[q][i] = Isa::multiply_add(query, items[i], part[q][i]); });
        });
      }
      each<kTall>(PMM_EACH(q) { each<kAcross>(PMM_EACH(i) { sums[q][i] += part[q][i]; }); });
    }
  }
};

float* lines(int64_t floats) {
  return static_cast<float*>(aligned_alloc(kLine, (floats * sizeof(float) + kLine - 1) / kLine * kLine + kLine));
}

template <class Isa>
int64_t half_distances_of(const HalfDistances& of) {
  using T = Tile<Isa>;
  const int64_t dims = of.dims, tiles = (of.queries + T::kTall - 1) / T::kTall;
  const int64_t fit = kItemBytes / (dims * T::kWide * int64_t(sizeof(float)) + 1), at_once = fit < 1 ? 1 : fit;
  float* const tall = lines(tiles * T::kTall * dims);
  float* const wide = lines(at_once * T::kWide * dims);
  float* const zero = static_cast<float*>(calloc(dims + 1, sizeof(float)));
  const bool memory = tall && wide && zero;
  for (int64_t tile = 0; memory && tile < tiles; ++tile)
    T::pack(of.query + tile * T::kTall * dims, of.queries - tile * T::kTall, dims, zero, T::kTall,
            tall + tile * T::kTall * dims);
  for (int64_t start = 0; memory && start < of.items; start += at_once * T::kWide) {
    int64_t panels = 0;
    for (int64_t item = start; item < of.items && panels < at_once; item += T::kWide, ++panels)
      T::pack(of.item + item * dims, of.items - item, dims, of.centre, T::kWide, wide + panels * T::kWide * dims);
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t panel = 0; panel < panels; ++panel) {
        typename T::Floats sums[T::kTall][T::kAcross];
        T::multiply(tall + tile * T::kTall * dims, wide + panel * T::kWide * dims, dims, sums);
        const int64_t first = start + panel * T::kWide, left = of.items - first;
        for (int64_t q = 0; q < T::kTall && tile * T::kTall + q < of.queries; ++q) {
          const int64_t query = tile * T::kTall + q;
          const float *const products = reinterpret_cast<const float*>(sums[q]), half = of.query_half[query];
          float* const out = of.out + query * of.stride + first;
          if (left >= T::kWide)
            for (int64_t i = 0; i < T::kWide; ++i) out[i] = (of.item_half[first + i] - products[i]) + half;
          else
            for (int64_t i = 0; i < left; ++i) out[i] = (of.item_half[first + i] - products[i]) + half;
        }
      }
  }
  free(tall), free(wide), free(zero);
  return memory ? 0 : -1;
}

// Of ascending numbers, how many are less than a number, or if `equal` not above it.
PMM_INLINE int64_t place(const float* numbers, int64_t count, float number, bool equal) {
  int64_t first = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    const bool after = numbers[first + half] < number || (equal && numbers[first + half] == number);
    first = after ? first + half + 1 : first;
    count = after ? count - half - 1 : half;
  }
  return first;
}

void count_windows(const Windows& of) {
  for (int64_t query = 0; query < of.queries; ++query) {
    const float* const row = of.distances + query * of.stride;
    const int64_t first = of.bounds[query], count = of.bounds[query + 1] - first;
    const float *const low = of.low + first, *const high = of.high + first;
    int64_t *const before = of.before + first, *const upto = of.upto + first;
    for (int64_t window = 0; window < count; ++window) before[window] = upto[window] = 0;
    if (count > kFewWindows) {
      for (int64_t item = 0; item < of.items; ++item) {  // counted at the first window that it is before, or within
        const int64_t reached = place(low, count, row[item], true), beyond = place(high, count, row[item], false);
        if (reached < count) ++before[reached];
        if (beyond < count) ++upto[beyond];
      }
      for (int64_t window = 1; window < count; ++window)
        before[window] += before[window - 1], upto[window] += upto[window - 1];
      continue;
    }
    for (int64_t start = 0; start < of.items; start += kStrip) {
      const int32_t size = of.items - start < kStrip ? of.items - start : kStrip;
      const float* const strip = row + start;
      for (int64_t window = 0; window < count; ++window) {
        const float from = low[window], to = high[window];
        int32_t less = 0, more = 0;
        for (int32_t item = 0; item < size; ++item) less += strip[item] < from, more += strip[item] > to;
        before[window] += less, upto[window] += size - more;
      }
    }
  }
}

// Those of ascending windows that do not overlap.
int64_t within_windows(const Windows& of, int64_t* out, int64_t capacity) {
  int64_t found = 0;
  for (int64_t query = 0; query < of.queries; ++query) {
    const float* const row = of.distances + query * of.stride;
    const int64_t first = of.bounds[query], count = of.bounds[query + 1] - first;
    const float *const low = of.low + first, *const high = of.high + first;
    if (!count) continue;
    for (int64_t start = 0; start < of.items; start += kStrip) {
      int32_t inside[kStrip];
      const int32_t size = of.items - start < kStrip ? of.items - start : kStrip;
      const float* const strip = row + start;
      for (int32_t item = 0; item < size; ++item) inside[item] = 0;
      if (count > kFewWindows) {
        for (int32_t item = 0; item < size; ++item) {
          const int64_t window = place(high, count, strip[item], false);
          inside[item] = window < count && low[window] <= strip[item];
        }
      } else {
        for (int64_t window = 0; window < count; ++window) {
          const float from = low[window], to = high[window];
          for (int32_t item = 0; item < size; ++item) inside[item] |= (strip[item] >= from) & (strip[item] <= to);
        }
      }
      for (int32_t item = 0; item < size; ++item) {
        if (!inside[item]) continue;
        if (found == capacity) return -1;
        out[found++] = query * of.items + start + item;
      }
    }
  }
  return found;
}

template <class Isa>
void half_squares_of(const float* const* queries, const float* const* items, int64_t count, int64_t dims,
                     double* out) {
  using Doubles = typename Isa::Doubles;
  constexpr int kLanes = sizeof(Doubles) / sizeof(double), kSums = 4;
  for (int64_t pair = 0; pair < count; ++pair) {
    const float *const query = queries[pair], *const item = items[pair];
    Doubles sums[kSums] = {};
    int64_t dim = 0;
    for (; dim + kSums * kLanes <= dims; dim += kSums * kLanes)
      each<kSums>(PMM_EACH(i) {
        const auto* const from = reinterpret_cast<const typename Isa::Half*>(query + dim) + i;
        const auto* const to = reinterpret_cast<const typename Isa::Half*>(item + dim) + i;
        const Doubles gap = __builtin_convertvector(*to, Doubles) - __builtin_convertvector(*from, Doubles);
        sums[i] = Isa::multiply_add(gap, gap, sums[i]);
      });
    const Doubles all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += all[lane];
    for (; dim < dims; ++dim) {
      const double gap = double(item[dim]) - double(query[dim]);
      sum += gap * gap;
    }
    out[pair] = sum / 2;
  }
}

template <class Isa>
constexpr Ranking ranking() {
  return {half_distances_of<Isa>, half_squares_of<Isa>, count_windows, within_windows};
}

}  // namespace
}  // namespace pmm::search
