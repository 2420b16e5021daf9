// How the kernels read tensors. The stable ABI of torch: one build serves every torch from 2.11 on, and every Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels.h"

namespace pmm {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return DType::Half;
    case ScalarType::BFloat16: return DType::BFloat16;
    case ScalarType::Float: return DType::Float;
    case ScalarType::Double: return DType::Double;
    default: STD_TORCH_CHECK(false, "pmm_kernels: not a floating tensor"); return DType::Float;
  }
}

// The callers in pmm/ops have checked everything else; dense memory is what a kernel relies on to stay inside it.
inline Maps maps_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "pmm_kernels: maps must be [N, C, H, W]");
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const bool channels_last = !x.is_contiguous();
  const auto has = [&](int64_t dim, int64_t stride) { return x.size(dim) == 1 || x.stride(dim) == stride; };
  STD_TORCH_CHECK(!channels_last || (has(0, h * w * c) && has(1, 1) && has(2, w * c) && has(3, c)),
                  "pmm_kernels: maps must be contiguous or channels_last");
  return Maps{n, c, h, w, dtype_of(x), channels_last};
}

inline Ranking ranking_of(const Tensor& cam, int64_t bh, int64_t bw, int64_t k, bool skip_empty) {
  return Ranking{cam.size(0), cam.size(1), cam.size(2), bh, bw, k, dtype_of(cam), skip_empty};
}

inline const uint8_t* cells_in(const Tensor& replaced) { return static_cast<const uint8_t*>(replaced.data_ptr()); }
inline const int64_t* indices_in(const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); }

}  // namespace pmm
