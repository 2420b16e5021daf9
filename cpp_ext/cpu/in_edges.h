// Who takes cells from whom: for every sample the samples it is the partner of, in ascending order.
#pragma once

#include <cstdint>
#include <vector>

namespace pmm::cpu {

class InEdges {
 public:
  InEdges(const int64_t* partner, int64_t n) : first_(n + 1), order_(n) {
    for (int64_t i = 0; i < n; ++i) ++first_[partner[i] + 1];
    for (int64_t i = 0; i < n; ++i) first_[i + 1] += first_[i];
    std::vector<int64_t> next(first_.begin(), first_.end() - 1);
    for (int64_t i = 0; i < n; ++i) order_[next[partner[i]]++] = i;
  }
  const int64_t* begin(int64_t n) const { return order_.data() + first_[n]; }
  const int64_t* end(int64_t n) const { return order_.data() + first_[n + 1]; }

 private:
  std::vector<int64_t> first_, order_;
};

}  // namespace pmm::cpu
