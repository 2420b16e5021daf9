// max_pool and unpool. Values are compared as integers: the order of floats, with -0 equal to 0 and NaN above all, costs
// the same few instructions in every dtype.
#include <limits>
#include <type_traits>

#include "../kernels.h"
#include "../scalar.h"
#include "in_edges.h"
#include "mask.h"
#include "parallel.h"

namespace pmm::cpu {
namespace {

// The integer as wide as T, and the bits of T's infinity.
template <class T>
struct Bits;
template <>
struct Bits<Half> {
  using type = int16_t;
  static constexpr type infinity = 0x7c00;
};
template <>
struct Bits<BFloat16> {
  using type = int16_t;
  static constexpr type infinity = 0x7f80;
};
template <>
struct Bits<float> {
  using type = int32_t;
  static constexpr type infinity = 0x7f800000;
};
template <>
struct Bits<double> {
  using type = int64_t;
  static constexpr type infinity = 0x7ff0000000000000;
};
template <class T>
using Key = typename Bits<T>::type;
template <class T>
constexpr Key<T> kNaN = std::numeric_limits<Key<T>>::max();
template <class T>
struct LineOfKeys {
  typedef Key<T> type __attribute__((vector_size(kLine)));
};
template <class T>
using Keys = typename LineOfKeys<T>::type;

template <class T>
PMM_INLINE Keys<T> keys_of(Line line) {
  const Keys<T> bits = reinterpret_cast<Keys<T>>(line);
  const Keys<T> sign = bits >> (sizeof(T) * 8 - 1), magnitude = bits & std::numeric_limits<Key<T>>::max();
  const Keys<T> key = (magnitude ^ sign) - sign;
  return magnitude > Bits<T>::infinity ? Keys<T>{} + kNaN<T> : key;
}

template <class T>
bool is_nan(T value) {
  return (same_bits<Key<T>>(value) & std::numeric_limits<Key<T>>::max()) > Bits<T>::infinity;
}

// The largest lane (or, Least, the smallest), by halves: several lanes at a time until one is left.
template <bool Least, class K, int64_t Bytes>
PMM_INLINE K folded(K __attribute__((vector_size(Bytes))) lanes) {
  if constexpr (Bytes == 2 * sizeof(K)) {
    return (lanes[0] < lanes[1]) == Least ? lanes[0] : lanes[1];
  } else {
    typedef K Lanes __attribute__((vector_size(Bytes / 2)));
    Lanes low, high;
    memcpy(&low, &lanes, Bytes / 2);
    memcpy(&high, reinterpret_cast<const char*>(&lanes) + Bytes / 2, Bytes / 2);
    if constexpr (Least)
      return folded<Least, K, Bytes / 2>(low < high ? low : high);
    else
      return folded<Least, K, Bytes / 2>(low > high ? low : high);
  }
}

// The cell of the largest value of one selected plane: the first of equals, but the last NaN.
template <class T>
PMM_INLINE int64_t largest_cell(const uint8_t* own, const uint8_t* partner, const PlaneMask& mask, int64_t bytes) {
  using K = Key<T>;
  constexpr int64_t kLanes = kLine / sizeof(T);
  // bytes whose cells a lane can count
  constexpr int64_t kSpan = std::min<int64_t>(1 << 20, std::numeric_limits<K>::max() / kLanes) * kLine;
  const uint8_t *taken = mask.bytes(), *touched = mask.touched();
  K best = 0;
  int64_t where = -1;
  for (int64_t start = 0; start < bytes; start += kSpan) {
    const int64_t end = std::min(bytes, start + kSpan);
    Keys<T> most = Keys<T>{} + std::numeric_limits<K>::min(), line_of = {}, number = {};
    for (int64_t at = start; at < end; at += kLine, number += 1) {
      const int64_t length = std::min(kLine, end - at);
      if (touched[at / kLine]) __builtin_prefetch(partner + at + kAhead * bytes);
      Keys<T> keys = keys_of<T>(selected_line(own + at, partner + at, taken + at, touched[at / kLine], length));
      if (length < kLine)
        for (int64_t lane = length / int64_t(sizeof(T)); lane < kLanes; ++lane) keys[lane] = std::numeric_limits<K>::min();
      line_of = keys > most ? number : line_of;
      most = keys > most ? keys : most;
    }
    const K largest = folded<false, K, kLine>(most);
    if (where >= 0 && largest <= best) continue;
    best = largest;
    Keys<T> cells = line_of * K(kLanes);
    for (int64_t lane = 0; lane < kLanes; ++lane) cells[lane] += K(lane);
    cells = most == largest ? cells : Keys<T>{} + std::numeric_limits<K>::max();
    where = start / int64_t(sizeof(T)) + folded<true, K, kLine>(cells);
  }
  if (best != kNaN<T>) return where;
  const auto at = [&](int64_t cell) { return reinterpret_cast<const T*>(taken[cell * sizeof(T)] ? partner : own)[cell]; };
  for (where = bytes / int64_t(sizeof(T)) - 1; !is_nan(at(where));) --where;
  return where;
}

template <class T>
PMM_CLONES void pool_planes(const uint8_t* own, const uint8_t* partner, const PlaneMask& mask, int64_t planes,
                            int64_t bytes, T* pooled, int64_t* cell) {
  for (int64_t plane = 0; plane < planes; ++plane, own += bytes, partner += bytes) {
    const int64_t where = largest_cell<T>(own, partner, mask, bytes);
    cell[plane] = where;
    pooled[plane] = reinterpret_cast<const T*>(mask.bytes()[where * sizeof(T)] ? partner : own)[where];
  }
}

// channels_last: the row of `channels` channels in cell `here` comes; `best` and `where` hold the largest so far.
template <class T>
PMM_CLONES void pool_row(const T* row, Key<T> here, int64_t channels, Key<T>* best, Key<T>* where) {
  for (int64_t c = 0; c < channels; ++c) {
    const Key<T> bits = same_bits<Key<T>>(row[c]), sign = bits >> (sizeof(T) * 8 - 1);
    const Key<T> magnitude = bits & std::numeric_limits<Key<T>>::max();
    const Key<T> key = magnitude > Bits<T>::infinity ? kNaN<T> : Key<T>((magnitude ^ sign) - sign);
    const bool larger = (key > best[c]) | (key == kNaN<T>);
    best[c] = larger ? key : best[c];
    where[c] = larger ? here : where[c];
  }
}

template <class T>
void max_pool_of(const Maps& m, const T* x, const uint8_t* replaced, const int64_t* partner, T* pooled, int64_t* cell) {
  const int64_t cells = m.cells(), size = sizeof(T);
  if (!m.channels_last) {
    const int64_t plane = cells * size;
    const auto* from = reinterpret_cast<const uint8_t*>(x);
    parallel_for(m.n * m.c, plane, [&](int64_t begin, int64_t end) {
      PlaneMask mask(cells, size);
      by_sample(begin, end, m.c, [&](int64_t n, int64_t first, int64_t last) {
        mask.read(replaced + n * cells);
        pool_planes(from + (n * m.c + first) * plane, from + (partner[n] * m.c + first) * plane, mask, last - first,
                    plane, pooled + n * m.c + first, cell + n * m.c + first);
      });
    });
    return;
  }
  constexpr int64_t kTile = 512;  // channels whose state stays in the first-level cache
  constexpr int64_t kCells = std::numeric_limits<Key<T>>::max();
  const int64_t tiles = (m.c + kTile - 1) / kTile;
  parallel_for(m.n * tiles, cells * kTile * size, [&](int64_t begin, int64_t end) {
    Key<T> best[kTile], where[kTile];
    by_sample(begin, end, tiles, [&](int64_t n, int64_t first, int64_t last) {
      for (int64_t c = first * kTile; c < std::min(last * kTile, m.c); c += kTile) {
        const int64_t channels = std::min(kTile, m.c - c), out = n * m.c + c;
        const auto row_of = [&](int64_t cell) {
          return x + ((replaced[n * cells + cell] ? partner[n] : n) * cells + cell) * m.c + c;
        };
        std::fill(best, best + kTile, std::numeric_limits<Key<T>>::min());
        for (int64_t start = 0; start < cells; start += kCells) {  // so far as a key can count
          std::fill(where, where + kTile, Key<T>(-1));
          for (int64_t here = start; here < std::min<int64_t>(cells, start + kCells); ++here)
            pool_row(row_of(here), Key<T>(here - start), channels, best, where);
          for (int64_t i = 0; i < channels; ++i)
            if (where[i] >= 0) cell[out + i] = start + where[i];
        }
        for (int64_t i = 0; i < channels; ++i) pooled[out + i] = row_of(cell[out + i])[i];
      }
    });
  });
}

// The values that reach one channel of sample n, each at its cell: its own first, then those taken from it, ascending.
template <class T, class F>
PMM_INLINE void for_each_value(const T* dy, const int64_t* cell, const uint8_t* replaced, const InEdges& edges,
                               const Maps& m, int64_t n, int64_t c, F fn) {
  const int64_t own = cell[n * m.c + c];
  if (!replaced[n * m.cells() + own]) fn(own, widen(dy[n * m.c + c]));
  for (const int64_t* i = edges.begin(n); i != edges.end(n); ++i) {
    const int64_t theirs = cell[*i * m.c + c];
    if (replaced[*i * m.cells() + theirs]) fn(theirs, widen(dy[*i * m.c + c]));
  }
}

template <class T>
void unpool_of(const Maps& m, const T* dy, const int64_t* cell, const uint8_t* replaced, const int64_t* partner,
               T* dx) {
  const int64_t cells = m.cells(), size = sizeof(T);
  const InEdges edges(partner, m.n);
  prefer_big_pages(dx, m.n * m.sample() * size);
  const int64_t stride = m.channels_last ? m.c : 1;
  parallel_for(m.n * m.c, cells * size, [&](int64_t begin, int64_t end) {
    std::vector<Sum<T>> sums(cells);
    by_sample(begin, end, m.c, [&](int64_t n, int64_t first, int64_t last) {
      T* to = dx + n * m.sample() + first * (m.channels_last ? 1 : cells);
      if (!m.channels_last) {
        memset(static_cast<void*>(to), 0, (last - first) * cells * size);
      } else {
        for (int64_t row = 0; row < cells; ++row) memset(static_cast<void*>(to + row * m.c), 0, (last - first) * size);
      }
      for (int64_t c = first; c < last; ++c, to += m.channels_last ? 1 : cells) {
        for_each_value(dy, cell, replaced, edges, m, n, c, [&](int64_t at, Sum<T> value) {
          sums[at] += value;  // kept wide, so that several values at one cell are rounded once
          to[at * stride] = narrow<T>(sums[at]);
        });
        for_each_value(dy, cell, replaced, edges, m, n, c, [&](int64_t at, Sum<T>) { sums[at] = 0; });
      }
    });
  });
}

}  // namespace

void max_pool(const Maps& m, const void* x, const uint8_t* replaced, const int64_t* partner, void* pooled,
              int64_t* cell) {
  with_type(m.dtype, [&](auto type) {
    using T = decltype(type);
    max_pool_of(m, static_cast<const T*>(x), replaced, partner, static_cast<T*>(pooled), cell);
  });
}

void unpool(const Maps& m, const void* dy, const int64_t* cell, const uint8_t* replaced, const int64_t* partner,
            void* dx) {
  with_type(m.dtype, [&](auto type) {
    using T = decltype(type);
    unpool_of(m, static_cast<const T*>(dy), cell, replaced, partner, static_cast<T*>(dx));
  });
}

}  // namespace pmm::cpu
