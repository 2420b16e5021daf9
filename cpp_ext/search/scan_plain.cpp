// For any processor: loops that a compiler turns into what the least of its kind has.
#include "scan.h"

namespace pmm::search {
namespace {

struct Plain {
  static constexpr int kTogether = 1;
  static constexpr int64_t kRepeated = 16;  // a group's four numbers, as often as a register may want them

  static int64_t query_bytes(int64_t groups) { return groups * kRepeated * 2; }

  static void prepare(const int16_t* codes, int64_t groups, void* out) {
    int16_t* const to = static_cast<int16_t*>(out);
    for (int64_t i = 0; i < groups * kRepeated; ++i) to[i] = codes[i / kRepeated * kGroup + i % kGroup];
  }

  template <int Q>
  static void multiply(const int8_t* codes, int64_t groups, const void* prepared, int64_t, Ints* products) {
    static_assert(Q == 1);
    constexpr int64_t half = kLine / 2;  // as many sums as there are registers
    const int16_t* const query = static_cast<const int16_t*>(prepared);
    for (int64_t rows = 0; rows < 2; ++rows) {
      int32_t sums[half] = {};
      for (int64_t group = 0; group < groups; ++group) {
        const int8_t* const from = codes + group * kLine + rows * half;
        const int16_t* const with = query + group * kRepeated;
        for (int64_t part = 0; part < half; part += kRepeated)
          for (int64_t i = 0; i < kRepeated; ++i) sums[part + i] += int16_t(from[part + i]) * with[i];
      }
      for (int64_t i = 0; i < half; i += kGroup)
        (*products)[rows * kRows / 2 + i / kGroup] = sums[i] + sums[i + 1] + sums[i + 2] + sums[i + 3];
    }
  }

  static PMM_INLINE uint32_t mask(const Ints& lanes) {
    uint32_t bits = 0;
    for (int i = 0; i < kRows; ++i) bits |= (lanes[i] & 1u) << i;
    return bits;
  }
};

}  // namespace

int64_t scan_plain(const Scan& scan) { return scan_all<Plain>(scan); }

}  // namespace pmm::search
