// What is compiled of search and evaluation, without torch: called through ctypes.
#pragma once

#include <cstdint>

namespace pmm::search {

// The scan of short codes (pmm/exact_search): which rows may be within a distance of a query. The truth about every rule
// is pmm/exact_search/scan.py.
//
// Rows lie in blocks of 16: the codes as [groups][16 rows][4 dimensions], so that a register of products holds one sum
// per row and nothing is added across it; then the terms as [square, scale, rest, error][16 rows] in float. What fills up
// the last group and the last block is 0.

constexpr int64_t kRows = 16;       // of a block
constexpr int64_t kGroup = 4;       // dimensions
constexpr int64_t kTerms = 4;       // floats per row
constexpr int64_t kLine = kRows * kGroup;  // bytes of a group, and of a term
constexpr int64_t kTileBytes = 32 << 10;   // stays in the cache while all queries pass over it
constexpr int64_t kTileBlocks = 32;        // at most

inline int64_t block_bytes(int64_t groups) { return kLine * (groups + kTerms); }

// As ctypes lays it out (pmm/exact_search/kernel.py).
struct Scan {
  const uint8_t* blocks;
  int64_t groups;
  int64_t first, last;     // rows
  const int16_t* queries;  // codes [count][groups * 4]
  const float* terms;      // [count][square, 2 scale, 2 rest, reach]: reach is the limit and the query's error
  int64_t count;
  int64_t* rows;     // what is found, ascending: of each query from its `stride` on, up to `capacity`
  float* reaches;    // beside each row: the least reach that it is found with, or a little less
  int64_t* counts;   // [count], of each query; 0 at first
  int64_t capacity;  // at least kTileBlocks * kRows
  int64_t stride;
};

// Returns the row up to which all is found: less than `last` where a query might have no room for more; -1 without
// memory. Sums of products fit int32; the caller sees to that.
int64_t scan_plain(const Scan&);
int64_t scan_avx2(const Scan&);
int64_t scan_avx512(const Scan&);

// Ranks by distance (pmm/evaluation): half the squared Euclidean distances of all pairs in float, and of some in double;
// and the items within windows of distance. The truth is pmm/evaluation/distances.py and ranks.py.

constexpr int64_t kDimsAtOnce = 64;  // products in one sum

// As ctypes lays them out (pmm/evaluation/compiled.py).
struct HalfDistances {
  const float *query, *item;            // [queries][dims], [items][dims]
  const float *query_half, *item_half;  // half the squared norms, of items less the centre
  const float* centre;                  // [dims], of which the queries are free already
  int64_t queries, items, dims;
  float* out;  // [queries], `stride` apart
  int64_t stride;
};

struct Windows {
  const float* distances;  // [queries][items], `stride` apart
  int64_t stride, queries, items;
  const int64_t* bounds;   // [queries + 1]: which windows are a query's
  const float *low, *high;  // both ascending
  int64_t *before, *upto;  // out: of each window, the items that are nearer, and those that are not beyond it
};

struct Ranking {
  int64_t (*half_distances)(const HalfDistances&);  // -1 without memory
  void (*half_squares)(const float* const* queries, const float* const* items, int64_t count, int64_t dims, double*);
  void (*count)(const Windows&);
  int64_t (*within)(const Windows&, int64_t* out, int64_t capacity);  // -1 if there are more
};
extern const Ranking kRankingAvx2, kRankingAvx512;

}  // namespace pmm::search
