// The kernels by names that ctypes can call.
#include "cuda_runtime.h"

#include "../../../cpp_ext/kernels.h"

using namespace pmm;

namespace {
int stream_of_the_caller;
cuda::Stream stream = &stream_of_the_caller;  // any but the default: the launches must pass it on
}  // namespace

extern "C" {

size_t pmm_rank_blocks_scratch(const Ranking* ranking) { return cuda::rank_blocks_scratch(*ranking); }
size_t pmm_adjoint_scratch(const Maps* maps) { return cuda::adjoint_scratch(*maps); }
size_t pmm_unpool_scratch(const Maps* maps) { return cuda::unpool_scratch(*maps); }
size_t pmm_mixed_cam_scratch(const Maps* maps) { return cuda::mixed_cam_scratch(*maps); }

void pmm_rank_blocks(const Ranking* ranking, const void* cam, uint8_t* replaced, void* scratch) {
  cuda::rank_blocks(*ranking, cam, replaced, scratch, stream);
}
void pmm_select(const Maps* maps, const void* x, const uint8_t* replaced, const int64_t* partner, void* y) {
  cuda::select(*maps, x, replaced, partner, y, stream);
}
void pmm_adjoint(const Maps* maps, const void* dy, const uint8_t* replaced, const int64_t* partner, void* dx,
                 void* scratch) {
  cuda::adjoint(*maps, dy, replaced, partner, dx, scratch, stream);
}
void pmm_max_pool(const Maps* maps, const void* x, const uint8_t* replaced, const int64_t* partner, void* pooled,
                  int64_t* cell) {
  cuda::max_pool(*maps, x, replaced, partner, pooled, cell, stream);
}
void pmm_unpool(const Maps* maps, const void* dy, const int64_t* cell, const uint8_t* replaced, const int64_t* partner,
                void* dx, void* scratch) {
  cuda::unpool(*maps, dy, cell, replaced, partner, dx, scratch, stream);
}
void pmm_mixed_cam(const Maps* maps, const void* x, const uint8_t* replaced, const int64_t* partner,
                   const void* weights, void* cam, void* scratch) {
  cuda::mixed_cam(*maps, x, replaced, partner, weights, cam, scratch, stream);
}

}  // extern "C"
