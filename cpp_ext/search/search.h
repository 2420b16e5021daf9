// The scan of short codes (pmm/exact_search): which rows may be within a distance of a query. Without torch, called
// through ctypes; the truth about every rule is pmm/exact_search/scan.py.
//
// Rows lie in blocks of 16: the codes as [groups][16 rows][4 dimensions], so that a register of products holds one sum
// per row and nothing is added across it; then the terms as [square, scale, rest, error][16 rows] in float. What fills up
// the last group and the last block is 0.
#pragma once

#include <cstdint>

namespace pmm::search {

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

}  // namespace pmm::search
