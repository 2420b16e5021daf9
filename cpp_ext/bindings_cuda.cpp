// The CUDA side of the kernels: the device and the stream that torch is on, and the work memory.
#include <torch/csrc/stable/accelerator.h>

#include "bindings.h"

namespace pmm {
namespace {

// Torch's current stream on the device of `tensor`, which is the current device as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  cuda::Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// From torch's allocator, which keeps it until the stream is done with it.
Tensor scratch(size_t bytes, const Tensor& like) {
  return torch::stable::empty({static_cast<int64_t>(bytes)}, torch::headeronly::ScalarType::Byte, std::nullopt,
                              like.device());
}

void rank_blocks(const Tensor& cam, int64_t bh, int64_t bw, int64_t k, bool skip_empty, const Tensor& replaced) {
  const OnDevice on(cam);
  const Ranking ranking = ranking_of(cam, bh, bw, k, skip_empty);
  const Tensor work = scratch(cuda::rank_blocks_scratch(ranking), cam);
  cuda::rank_blocks(ranking, cam.data_ptr(), static_cast<uint8_t*>(replaced.data_ptr()), work.data_ptr(), on.stream());
}
void select(const Tensor& x, const Tensor& replaced, const Tensor& partner, const Tensor& y) {
  const OnDevice on(x);
  cuda::select(maps_of(x), x.data_ptr(), cells_in(replaced), indices_in(partner), y.data_ptr(), on.stream());
}
void adjoint(const Tensor& dy, const Tensor& replaced, const Tensor& partner, const Tensor& dx) {
  const OnDevice on(dy);
  const Maps maps = maps_of(dy);
  const Tensor work = scratch(cuda::adjoint_scratch(maps), dy);
  cuda::adjoint(maps, dy.data_ptr(), cells_in(replaced), indices_in(partner), dx.data_ptr(), work.data_ptr(),
                on.stream());
}
void max_pool(const Tensor& x, const Tensor& replaced, const Tensor& partner, const Tensor& pooled,
              const Tensor& cell) {
  const OnDevice on(x);
  cuda::max_pool(maps_of(x), x.data_ptr(), cells_in(replaced), indices_in(partner), pooled.data_ptr(),
                 static_cast<int64_t*>(cell.data_ptr()), on.stream());
}
void unpool(const Tensor& dy, const Tensor& cell, const Tensor& replaced, const Tensor& partner, const Tensor& dx) {
  const OnDevice on(dx);
  const Maps maps = maps_of(dx);
  const Tensor work = scratch(cuda::unpool_scratch(maps), dx);
  cuda::unpool(maps, dy.data_ptr(), indices_in(cell), cells_in(replaced), indices_in(partner), dx.data_ptr(),
               work.data_ptr(), on.stream());
}
void mixed_cam(const Tensor& x, const Tensor& replaced, const Tensor& partner, const Tensor& weights,
               const Tensor& cam) {
  const OnDevice on(x);
  const Maps maps = maps_of(x);
  const Tensor work = scratch(cuda::mixed_cam_scratch(maps), x);
  cuda::mixed_cam(maps, x.data_ptr(), cells_in(replaced), indices_in(partner), weights.data_ptr(), cam.data_ptr(),
                  work.data_ptr(), on.stream());
}

}  // namespace
}  // namespace pmm

STABLE_TORCH_LIBRARY_IMPL(pmm_kernels, CUDA, m) {
  m.impl("rank_blocks", TORCH_BOX(&pmm::rank_blocks));
  m.impl("select", TORCH_BOX(&pmm::select));
  m.impl("adjoint", TORCH_BOX(&pmm::adjoint));
  m.impl("max_pool", TORCH_BOX(&pmm::max_pool));
  m.impl("unpool", TORCH_BOX(&pmm::unpool));
  m.impl("mixed_cam", TORCH_BOX(&pmm::mixed_cam));
}
