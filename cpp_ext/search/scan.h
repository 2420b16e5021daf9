// The scan itself, compiled once for each instruction set: a file includes this where its target is set, and gives an
// `Isa` with the sums of products. The rest is the same operations in the same order, so all find the same rows.
//
// Nothing of the standard library here: the linker might take an inline function of it from the file of a newer
// instruction set for all.
#pragma once

#include <math.h>
#include <stdlib.h>

#include "search.h"
#include "unroll.h"

namespace pmm::search {
namespace {

using Floats = float __attribute__((vector_size(kLine), may_alias));
using Ints = int32_t __attribute__((vector_size(kLine)));

// Of (square + square), before the rest is taken off it. Let u = 2^-24 and S = square_q + square_x, so that the two
// products are at most S together (Cauchy-Schwarz) and the distance at most 2 S. The two squares come rounded (u S), and
// each of the operations adds: their sum u S, this factor u S, the product of three 3 u S, that of two u S, the
// differences 2 u S each (Higham, Accuracy and Stability of Numerical Algorithms, 3.1): 11 u S. On the right, the sum and
// its square are wrong by 3 u of it: where it is above 2.1 S the row is found anyhow, else 6.3 u S. So 17.3 u S, and
// what is of order u^2; 32 u = 2^-19 covers it.
constexpr float kShrink = 1.0f - 0x1p-19f;

PMM_INLINE uint32_t lanes_before(int64_t lane) { return lane < 0 ? 0 : lane < kRows ? (1u << lane) - 1 : 0xffff; }

constexpr int64_t kAhead = 80 * kLine;  // bytes that are fetched before they are needed; harmless beyond the end

// Of a query.
struct Terms {
  float square, scale, rest, reach;
};

// Of the 16 rows of a block: no distance between what the codes stand for is less than the root of this.
PMM_INLINE void squared(const Ints& products, const Floats* terms, const Terms& query, Floats& left) {
  const Floats sums = __builtin_convertvector(products, Floats);
  left = (terms[0] + query.square) * kShrink - terms[1] * sums * query.scale - terms[2] * query.rest;
}

__attribute__((noinline)) void append(const Scan& scan, int64_t query, uint32_t found, int64_t first, const Floats& left,
                       const Floats& errors) {
  int64_t& count = scan.counts[query];
  for (; found; found &= found - 1, ++count) {
    const int lane = __builtin_ctz(found);
    const float root = sqrtf(left[lane] > 0 ? left[lane] : 0.0f), error = errors[lane];
    scan.rows[query * scan.stride + count] = first + lane;
    scan.reaches[query * scan.stride + count] = root - error - 0x1p-21f * (root + error);  // below all rounding
  }
}

// `Q` queries, from `query` on, over the blocks [begin, end).
template <class Isa, int Q>
void scan_queries(const Scan& scan, const void* prepared, int64_t query, int64_t begin, int64_t end) {
  const Terms* const terms = reinterpret_cast<const Terms*>(scan.terms) + query;
  const int64_t size = Isa::query_bytes(scan.groups);
  const char* const codes = static_cast<const char*>(prepared) + query * size;
  for (int64_t block = begin; block < end; ++block) {
    const uint8_t* const at = scan.blocks + block * block_bytes(scan.groups);
    const Floats* const row_terms = reinterpret_cast<const Floats*>(at + kLine * scan.groups);
    const uint32_t here = lanes_before(scan.last - block * kRows) & ~lanes_before(scan.first - block * kRows);
    for (int64_t line = 0; line < scan.groups + kTerms && query == 0; ++line)
      __builtin_prefetch(at + kAhead + line * kLine);
    Ints products[Q];
    Isa::template multiply<Q>(reinterpret_cast<const int8_t*>(at), scan.groups, codes, size, products);
    each<Q>(PMM_EACH(q) {
      Floats left;
      squared(products[q], row_terms, terms[q], left);
      const Floats reach = row_terms[3] + terms[q].reach;
      const Ints beyond = left > reach * reach;  // not where something is NaN: such a row is found
      if (const uint32_t found = here & ~Isa::mask(beyond))
        append(scan, query + q, found, block * kRows, left, row_terms[3]);
    });
  }
}

template <class Isa>
int64_t scan_tiles(const Scan& scan, const void* prepared) {
  const int64_t fit = kTileBytes / block_bytes(scan.groups);
  const int64_t step = fit < 1 ? 1 : fit < kTileBlocks ? fit : kTileBlocks;
  const int64_t blocks = (scan.last + kRows - 1) / kRows;
  for (int64_t begin = scan.first / kRows; begin < blocks; begin += step) {
    const int64_t end = begin + step < blocks ? begin + step : blocks;
    for (int64_t query = 0; query < scan.count; ++query)
      if (scan.counts[query] + (end - begin) * kRows > scan.capacity) return begin * kRows;
    int64_t query = 0;
    for (; query + Isa::kTogether <= scan.count; query += Isa::kTogether)
      scan_queries<Isa, Isa::kTogether>(scan, prepared, query, begin, end);
    for (; query < scan.count; ++query) scan_queries<Isa, 1>(scan, prepared, query, begin, end);
  }
  return scan.last;
}

template <class Isa>
int64_t scan_all(const Scan& scan) {
  const int64_t size = Isa::query_bytes(scan.groups);
  void* const prepared = aligned_alloc(kLine, (scan.count * size + kLine - 1) / kLine * kLine);
  if (!prepared && scan.count) return -1;
  for (int64_t query = 0; query < scan.count; ++query)
    Isa::prepare(scan.queries + query * scan.groups * kGroup, scan.groups,
                 static_cast<char*>(prepared) + query * size);
  const int64_t reached = scan_tiles<Isa>(scan, prepared);
  free(prepared);
  return reached;
}

}  // namespace
}  // namespace pmm::search
