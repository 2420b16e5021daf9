// Kernels with one planted fault each, and sound ones beside them: what the shim and the sanitizers must catch.
#include "../../../cpp_ext/cuda/launch.h"
#include "../../../cpp_ext/cuda/vector.h"

namespace {

using pmm::cuda::shared_memory;

// Every thread takes its left neighbour's value, through shared memory.
template <bool Barrier>
__global__ void shift(const int* in, int* out) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = in[threadIdx.x];
  if (Barrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + blockDim.x - 1) % blockDim.x];
}

__global__ void copy(const int* in, int* out, int offset) { out[threadIdx.x] = in[threadIdx.x + offset]; }

__global__ void add(const int* in, int* out, int addend) { out[threadIdx.x] = in[threadIdx.x] + addend; }

__global__ void copy_vectors(const int* in, int* out, int offset) {
  using Vector = pmm::cuda::Pack<int, 4>;
  if (threadIdx.x == 0) reinterpret_cast<Vector*>(out)[0] = *reinterpret_cast<const Vector*>(in + offset);
}

__global__ void behind_shared(int*, int offset) { shared_memory<int>()[threadIdx.x + offset] = 0; }

__global__ void half_at_a_barrier(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void half_in_a_shuffle(int* out) {
  if (threadIdx.x % 2) out[threadIdx.x] = __shfl_xor_sync(pmm::cuda::kWholeWarp, 1, 2);
}

__global__ void two_shuffles(int* out) {
  if (threadIdx.x % 2)
    out[threadIdx.x] = __shfl_xor_sync(pmm::cuda::kWholeWarp, 1, 1);
  else
    out[threadIdx.x] = __shfl_xor_sync(pmm::cuda::kWholeWarp, 2, 1);
}

}  // namespace

// One block of 64 threads over in and out [64].
extern "C" void pmm_fault(const char* name, const int* in, int* out) {
  static int stream;
  const auto is = [&](const char* other) { return strcmp(name, other) == 0; };
  const auto launch = [&](auto kernel, size_t shared, auto... arguments) {
    pmm::cuda::launch(name, kernel, {1, 64, shared}, &stream, arguments...);
  };
  constexpr size_t shared = 64 * sizeof(int);
  if (is("none")) launch(shift<true>, shared, in, out);
  if (is("missing barrier")) launch(shift<false>, shared, in, out);
  if (is("read behind the input")) launch(copy, 0, in, out, 1);
  if (is("signed overflow")) launch(add, 0, in, out, INT_MAX);
  if (is("misaligned vector")) launch(copy_vectors, 0, in, out, 1);
  if (is("write behind shared memory")) launch(behind_shared, shared, out, 1);
  if (is("half at a barrier")) launch(half_at_a_barrier, 0, out);
  if (is("half in a shuffle")) launch(half_in_a_shuffle, 0, out);
  if (is("two shuffles")) launch(two_shuffles, 0, out);
  if (is("too much shared memory")) launch(shift<true>, 49 * 1024, in, out);
}
