// select and adjoint. A select moves bytes, whatever they mean; only the adjoint adds.
#include "../kernels.h"
#include "../scalar.h"
#include "in_edges.h"
#include "mask.h"
#include "parallel.h"

namespace pmm::cpu {
namespace {

template <bool Streams>
PMM_INLINE void copy_lines(uint8_t* to, const uint8_t* from, int64_t bytes) {
  int64_t at = 0;
  for (; at + kLine <= bytes; at += kLine) store_line<Streams>(to + at, load_line(from + at));
  memcpy(to + at, from + at, bytes - at);
}

PMM_CLONES void copy(uint8_t* to, const uint8_t* from, int64_t bytes, bool streams) {
  streams ? copy_lines<true>(to, from, bytes) : copy_lines<false>(to, from, bytes);
}

template <bool Streams>
PMM_INLINE void select_lines(uint8_t* y, const uint8_t* own, const uint8_t* partner, const PlaneMask& mask,
                             int64_t planes, int64_t bytes) {
  for (; planes > 0; --planes, y += bytes, own += bytes, partner += bytes) {
    int64_t at = 0;
    for (const uint8_t* touched = mask.touched(); at + kLine <= bytes; at += kLine, ++touched) {
      if (*touched) __builtin_prefetch(partner + at + kAhead * bytes);
      store_line<Streams>(y + at, selected_line(own + at, partner + at, mask.bytes() + at, *touched));
    }
    for (; at < bytes; ++at) y[at] = mask.bytes()[at] ? partner[at] : own[at];
  }
}

PMM_CLONES void select_planes(uint8_t* y, const uint8_t* own, const uint8_t* partner, const PlaneMask& mask,
                              int64_t planes, int64_t bytes, bool streams) {
  streams ? select_lines<true>(y, own, partner, mask, planes, bytes)
          : select_lines<false>(y, own, partner, mask, planes, bytes);
}

// For one sample: what becomes of each line of its planes. Its own cells but the replaced ones, and what others took.
struct Taken {
  const uint8_t* dy;    // the taker's map
  const uint8_t* mask;  // and its replaced cells, widened
};

class LineSums {
 public:
  LineSums(const Maps& m, const uint8_t* dy, int64_t size, const uint8_t* replaced, const InEdges& edges, int64_t n)
      : own_(m.cells(), size), first_{0} {
    const int64_t lines = (m.cells() * size + kLine - 1) / kLine;
    own_.read(replaced + n * m.cells());
    for (const int64_t* i = edges.begin(n); i != edges.end(n); ++i) {
      takers_.emplace_back(m.cells(), size);
      takers_.back().read(replaced + *i * m.cells());
    }
    for (int64_t line = 0; line < lines; ++line) {
      for (size_t t = 0; t < takers_.size(); ++t)  // in ascending order of the taker
        if (takers_[t].touched()[line])
          taken_.push_back({dy + edges.begin(n)[t] * m.sample() * size, takers_[t].bytes()});
      first_.push_back(static_cast<int64_t>(taken_.size()));
    }
  }
  const PlaneMask& own() const { return own_; }
  const Taken* begin(int64_t line) const { return taken_.data() + first_[line]; }
  const Taken* end(int64_t line) const { return taken_.data() + first_[line + 1]; }

 private:
  PlaneMask own_;
  std::vector<PlaneMask> takers_;
  std::vector<Taken> taken_;
  std::vector<int64_t> first_;
};

template <class T>
PMM_INLINE Line sum_line(Line own, const Taken* taken, const Taken* end, int64_t in_plane, int64_t in_sample,
                         int64_t bytes) {
  constexpr int64_t kValues = kLine / sizeof(T);
  T values[kValues];
  Sum<T> sum[kValues];
  memcpy(values, &own, kLine);
  for (int64_t i = 0; i < kValues; ++i) sum[i] = widen(values[i]);
  for (; taken != end; ++taken) {
    const Line cells = load_line(taken->dy + in_sample, bytes) & load_line(taken->mask + in_plane);
    memcpy(values, &cells, kLine);
    for (int64_t i = 0; i < kValues; ++i) sum[i] += widen(values[i]);
  }
  for (int64_t i = 0; i < kValues; ++i) values[i] = narrow<T>(sum[i]);
  Line line;
  memcpy(&line, values, kLine);
  return line;
}

template <class T, bool Streams>
PMM_INLINE void adjoint_lines(uint8_t* dx, const uint8_t* dy, const LineSums& sums, int64_t first, int64_t last,
                              int64_t bytes) {
  const uint8_t *mask = sums.own().bytes(), *touched = sums.own().touched();
  for (int64_t plane = first * bytes; plane < last * bytes; plane += bytes) {
    for (int64_t at = 0, line = 0; at < bytes; at += kLine, ++line) {
      const int64_t here = plane + at, length = std::min(kLine, bytes - at);
      Line value = load_line(dy + here, length);
      if (touched[line]) value &= ~load_line(mask + at);
      const Taken *taken = sums.begin(line), *end = sums.end(line);
      if (taken != end) {
        for (const Taken* t = taken; t != end; ++t) __builtin_prefetch(t->dy + here + kAhead * bytes);
        value = sum_line<T>(value, taken, end, at, here, length);
      }
      if (length == kLine)
        store_line<Streams>(dx + here, value);
      else
        memcpy(dx + here, &value, length);
    }
  }
}

// dx and dy are the sample's own; planes [first, last) of it.
template <class T>
PMM_CLONES void adjoint_planes(uint8_t* dx, const uint8_t* dy, const LineSums& sums, int64_t first, int64_t last,
                               int64_t bytes, bool streams) {
  streams ? adjoint_lines<T, true>(dx, dy, sums, first, last, bytes)
          : adjoint_lines<T, false>(dx, dy, sums, first, last, bytes);
}

// The sum of several rows of `length` elements.
template <class T>
PMM_CLONES void sum_rows(T* dx, const T* const* rows, int64_t count, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    Sum<T> sum = widen(rows[0][i]);
    for (int64_t row = 1; row < count; ++row) sum += widen(rows[row][i]);
    dx[i] = narrow<T>(sum);
  }
}

template <class T>
void adjoint_of(const Maps& m, const T* dy, const uint8_t* replaced, const int64_t* partner, T* dx) {
  const int64_t cells = m.cells(), size = sizeof(T), row = m.c * size;
  const InEdges edges(partner, m.n);
  if (!m.channels_last) {
    const Sink sink(dx, m.n * m.sample() * size, cells * size);
    parallel_for(m.n * m.c, cells * size, [&](int64_t begin, int64_t end) {
      by_sample(begin, end, m.c, [&](int64_t n, int64_t first, int64_t last) {
        const LineSums sums(m, reinterpret_cast<const uint8_t*>(dy), size, replaced, edges, n);
        adjoint_planes<T>(reinterpret_cast<uint8_t*>(dx + n * m.sample()),
                          reinterpret_cast<const uint8_t*>(dy + n * m.sample()), sums, first, last, cells * size,
                          sink.streams());
      });
      finish_stores();
    });
    return;
  }
  const Sink sink(dx, m.n * m.sample() * size, row);
  parallel_for(m.n * cells, row, [&](int64_t begin, int64_t end) {
    std::vector<const T*> rows;
    by_sample(begin, end, cells, [&](int64_t n, int64_t first, int64_t last) {
      for (int64_t cell = first; cell < last; ++cell) {
        rows.clear();
        if (!replaced[n * cells + cell]) rows.push_back(dy + (n * cells + cell) * m.c);
        for (const int64_t* i = edges.begin(n); i != edges.end(n); ++i)
          if (replaced[*i * cells + cell]) rows.push_back(dy + (*i * cells + cell) * m.c);
        T* to = dx + (n * cells + cell) * m.c;
        if (rows.empty())
          memset(to, 0, row);
        else if (rows.size() == 1)
          copy(reinterpret_cast<uint8_t*>(to), reinterpret_cast<const uint8_t*>(rows[0]), row, sink.streams());
        else
          sum_rows(to, rows.data(), static_cast<int64_t>(rows.size()), m.c);
      }
    });
    finish_stores();
  });
}

}  // namespace

void select(const Maps& m, const void* x, const uint8_t* replaced, const int64_t* partner, void* y) {
  const int64_t cells = m.cells(), size = size_of(m.dtype), plane = cells * size, row = m.c * size;
  const auto* from = static_cast<const uint8_t*>(x);
  auto* to = static_cast<uint8_t*>(y);
  if (!m.channels_last) {
    const Sink sink(y, m.n * m.c * plane, plane);
    parallel_for(m.n * m.c, plane, [&](int64_t begin, int64_t end) {
      PlaneMask mask(cells, size);
      by_sample(begin, end, m.c, [&](int64_t n, int64_t first, int64_t last) {
        const uint8_t* own = from + (n * m.c + first) * plane;
        uint8_t* mine = to + (n * m.c + first) * plane;
        if (mask.read(replaced + n * cells))
          select_planes(mine, own, from + (partner[n] * m.c + first) * plane, mask, last - first, plane, sink.streams());
        else
          copy(mine, own, (last - first) * plane, sink.streams());
      });
      finish_stores();
    });
    return;
  }
  const Sink sink(y, m.n * cells * row, row);
  parallel_for(m.n * cells, row, [&](int64_t begin, int64_t end) {
    by_sample(begin, end, cells, [&](int64_t n, int64_t first, int64_t last) {
      for (int64_t cell = first; cell < last; ++cell) {
        const int64_t source = replaced[n * cells + cell] ? partner[n] : n;
        copy(to + (n * cells + cell) * row, from + (source * cells + cell) * row, row, sink.streams());
      }
    });
    finish_stores();
  });
}

void adjoint(const Maps& m, const void* dy, const uint8_t* replaced, const int64_t* partner, void* dx) {
  with_type(m.dtype, [&](auto type) {
    using T = decltype(type);
    adjoint_of(m, static_cast<const T*>(dy), replaced, partner, static_cast<T*>(dx));
  });
}

}  // namespace pmm::cpu
