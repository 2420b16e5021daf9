// What ctypes calls: rows into blocks, and the scan and the ranks on the instruction set that is asked for.
#include "search.h"

#include <cstring>

#include "built.h"

namespace pmm::search {
namespace {

struct Path {
  const char* name;
  int64_t (*scan)(const Scan&);
  const Ranking* ranking;  // nullptr: numpy is as fast
  bool (*runs)();
};

// The best first.
const Path kPaths[] = {
#if defined(__x86_64__)
    {"AVX-512 VNNI", scan_avx512, &kRankingAvx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512vnni");
     }},
    {"AVX2", scan_avx2, &kRankingAvx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"plain C++", scan_plain, nullptr, [] { return true; }},
};

float* terms_of(uint8_t* block, int64_t groups) { return reinterpret_cast<float*>(block + kLine * groups); }

}  // namespace
}  // namespace pmm::search

#define PMM_API extern "C" __attribute__((visibility("default")))
using namespace pmm::search;

// The name of a way to scan, the best first; nullptr for one that this processor lacks. Returns their number.
PMM_API int32_t pmm_search_paths(const char** names) {
  int32_t count = 0;
  for (const Path& path : kPaths) names[count++] = path.runs() ? path.name : nullptr;
  return count;
}

PMM_API int64_t pmm_search_scan(int32_t path, const Scan* scan) { return kPaths[path].scan(*scan); }

// Of codes [rows][dims] and terms [rows][scale, rest, square, error], the rows [first, last) into blocks that are 0,
// where row 0 is row `start` there.
PMM_API void pmm_search_pack(const int8_t* codes, const float* terms, int64_t dims, int64_t start, int64_t first,
                             int64_t last, uint8_t* blocks) {
  const int64_t groups = (dims + kGroup - 1) / kGroup, whole = dims / kGroup;
  constexpr int order[kTerms] = {2, 0, 1, 3};
  for (int64_t row = first; row < last; ++row) {
    uint8_t* const block = blocks + (start + row) / kRows * block_bytes(groups);
    const int64_t lane = (start + row) % kRows;
    const int8_t* const from = codes + row * dims;
    uint8_t* const to = block + lane * kGroup;
    for (int64_t group = 0; group < whole; ++group)
      std::memcpy(to + group * kLine, from + group * kGroup, kGroup);
    std::memcpy(to + whole * kLine, from + whole * kGroup, dims % kGroup);
    for (int64_t term = 0; term < kTerms; ++term)
      terms_of(block, groups)[term * kRows + lane] = terms[row * kTerms + order[term]];
  }
}

// Of `blocks`, the rows that `rows` names at [first, last), into the same places of blocks that are 0.
PMM_API void pmm_search_take(const uint8_t* blocks, int64_t groups, const int64_t* rows, int64_t first, int64_t last,
                             uint8_t* out) {
  for (int64_t place = first; place < last; ++place) {
    const uint8_t* const from = blocks + rows[place] / kRows * block_bytes(groups) + rows[place] % kRows * kGroup;
    uint8_t* const to = out + place / kRows * block_bytes(groups) + place % kRows * kGroup;
    for (int64_t word = 0; word < groups + kTerms; ++word)  // a term is as wide as a group of codes
      std::memcpy(to + word * kLine, from + word * kLine, kGroup);
  }
}

// Whether there are the following for it.
PMM_API bool pmm_search_ranks(int32_t path) { return kPaths[path].ranking; }

PMM_API int64_t pmm_search_half_distances(int32_t path, const HalfDistances* of) {
  return kPaths[path].ranking->half_distances(*of);
}

PMM_API void pmm_search_half_squares(int32_t path, const float* const* queries, const float* const* items,
                                     int64_t count, int64_t dims, double* out) {
  kPaths[path].ranking->half_squares(queries, items, count, dims, out);
}

PMM_API void pmm_search_count(int32_t path, const Windows* of) { kPaths[path].ranking->count(*of); }

PMM_API int64_t pmm_search_within(int32_t path, const Windows* of, int64_t* out, int64_t capacity) {
  return kPaths[path].ranking->within(*of, out, capacity);
}

// Read from the file by pmm/utils/build_info.py, which need not load it. setup.py writes PMM_BUILT, a text of JSON.
extern "C" __attribute__((used, visibility("default"))) const char pmm_search_built[] = "pmm kernels built " PMM_BUILT;
