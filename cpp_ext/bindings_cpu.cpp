// The schemas of the kernels, their CPU side, and what this build is. Outputs come last and are written in place.
// They are private to pmm/ops, which checks every argument before it calls them: here a wrong one corrupts memory.
#include "bindings.h"
#include "built.h"
#include "cpu/parallel.h"

namespace pmm {

void cpu::run_parallel(int64_t begin, int64_t end, int64_t grain, Body body, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

namespace {

void rank_blocks(const Tensor& cam, int64_t bh, int64_t bw, int64_t k, bool skip_empty, const Tensor& replaced) {
  cpu::rank_blocks(ranking_of(cam, bh, bw, k, skip_empty), cam.data_ptr(), static_cast<uint8_t*>(replaced.data_ptr()));
}
void select(const Tensor& x, const Tensor& replaced, const Tensor& partner, const Tensor& y) {
  cpu::select(maps_of(x), x.data_ptr(), cells_in(replaced), indices_in(partner), y.data_ptr());
}
void adjoint(const Tensor& dy, const Tensor& replaced, const Tensor& partner, const Tensor& dx) {
  cpu::adjoint(maps_of(dy), dy.data_ptr(), cells_in(replaced), indices_in(partner), dx.data_ptr());
}
void max_pool(const Tensor& x, const Tensor& replaced, const Tensor& partner, const Tensor& pooled,
              const Tensor& cell) {
  cpu::max_pool(maps_of(x), x.data_ptr(), cells_in(replaced), indices_in(partner), pooled.data_ptr(),
                static_cast<int64_t*>(cell.data_ptr()));
}
void unpool(const Tensor& dy, const Tensor& cell, const Tensor& replaced, const Tensor& partner, const Tensor& dx) {
  cpu::unpool(maps_of(dx), dy.data_ptr(), indices_in(cell), cells_in(replaced), indices_in(partner), dx.data_ptr());
}
void mixed_cam(const Tensor& x, const Tensor& replaced, const Tensor& partner, const Tensor& weights,
               const Tensor& cam) {
  cpu::mixed_cam(maps_of(x), x.data_ptr(), cells_in(replaced), indices_in(partner), weights.data_ptr(), cam.data_ptr());
}

}  // namespace
}  // namespace pmm

STABLE_TORCH_LIBRARY(pmm_kernels, m) {
  m.def("rank_blocks(Tensor cam, int bh, int bw, int k, bool skip_empty, Tensor(a!) replaced) -> ()");
  m.def("select(Tensor x, Tensor replaced, Tensor partner, Tensor(a!) y) -> ()");
  m.def("adjoint(Tensor dy, Tensor replaced, Tensor partner, Tensor(a!) dx) -> ()");
  m.def("max_pool(Tensor x, Tensor replaced, Tensor partner, Tensor(a!) pooled, Tensor(b!) cell) -> ()");
  m.def("unpool(Tensor dy, Tensor cell, Tensor replaced, Tensor partner, Tensor(a!) dx) -> ()");
  m.def("mixed_cam(Tensor x, Tensor replaced, Tensor partner, Tensor weights, Tensor(a!) cam) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pmm_kernels, CPU, m) {
  m.impl("rank_blocks", TORCH_BOX(&pmm::rank_blocks));
  m.impl("select", TORCH_BOX(&pmm::select));
  m.impl("adjoint", TORCH_BOX(&pmm::adjoint));
  m.impl("max_pool", TORCH_BOX(&pmm::max_pool));
  m.impl("unpool", TORCH_BOX(&pmm::unpool));
  m.impl("mixed_cam", TORCH_BOX(&pmm::mixed_cam));
}

// Read from the file by pmm/utils/build_info.py, which must not load torch for it. setup.py writes PMM_BUILT, a text of JSON.
extern "C" __attribute__((used, visibility("default"))) const char pmm_kernels_built[] = "pmm kernels built " PMM_BUILT;
