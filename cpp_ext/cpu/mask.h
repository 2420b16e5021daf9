// The replaced cells of one sample, widened to the bytes of one plane [h, w], line by line.
#pragma once

#include <vector>

#include "parallel.h"

namespace pmm::cpu {

class PlaneMask {
 public:
  explicit PlaneMask(int64_t cells, int64_t size)
      : cells_(cells), size_(size), bytes_(cells * size + kLine), touched_(cells * size / kLine + 1) {}

  // Returns whether any cell is replaced.
  bool read(const uint8_t* replaced) {
    std::fill(touched_.begin(), touched_.end(), uint8_t(0));
    bool any = false;
    for (int64_t cell = 0; cell < cells_; ++cell) {
      memset(bytes_.data() + cell * size_, replaced[cell] ? 0xff : 0, size_);
      touched_[cell * size_ / kLine] |= replaced[cell];
      any |= replaced[cell];
    }
    return any;
  }
  const uint8_t* bytes() const { return bytes_.data(); }      // 0xff in every byte of a replaced cell
  const uint8_t* touched() const { return touched_.data(); }  // by line: has it a replaced cell

 private:
  int64_t cells_, size_;
  std::vector<uint8_t> bytes_, touched_;
};

// A line of which only `bytes` may be there; the rest is zero.
PMM_INLINE Line load_line(const uint8_t* from, int64_t bytes) {
  if (bytes == kLine) return load_line(from);
  Line line = {};
  memcpy(&line, from, bytes);
  return line;
}

// One line of the selected map; `bytes` less than a line at the end of a plane.
PMM_INLINE Line selected_line(const uint8_t* own, const uint8_t* partner, const uint8_t* mask, bool touched,
                              int64_t bytes = kLine) {
  const Line mine = load_line(own, bytes);
  if (!touched) return mine;
  const Line taken = load_line(mask);
  return (mine & ~taken) | (load_line(partner, bytes) & taken);
}

}  // namespace pmm::cpu
