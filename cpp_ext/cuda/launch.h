// Starting a kernel, and the memory that the threads of a block share.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <stdexcept>
#include <string>

#include "../kernels.h"

namespace pmm::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared = 0;  // bytes of shared_memory() in each block
};

inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Runs kernel(arguments...) on the stream; nothing at all for an empty grid. Never waits for the device.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, Stream stream,
            const Arguments&... arguments) {
  if (grid.blocks == 0) return;
  if (grid.blocks > INT_MAX)
    throw std::runtime_error(std::string(name) + ": " + std::to_string(grid.blocks) +
                             " thread blocks; CUDA takes at most 2147483647 at once");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // reported here, so the next caller must not meet it
  throw std::runtime_error(std::string(name) + ": the kernel did not start: " + cudaGetErrorString(error) +
                           " (pmm.ops.build_info() names the GPUs it is built for; TORCH_CUDA_ARCH_LIST chooses them)");
}

// Kernels count inside a sample in 32 bits: divisions are several times cheaper than in 64.
inline void check_sample(const char* name, int64_t elements) {
  if (elements > INT_MAX)
    throw std::runtime_error(std::string(name) + ": " + std::to_string(elements) +
                             " elements in one sample; the CUDA kernels take at most 2147483647");
}

#if defined(__CUDACC__)
// The Grid::shared bytes of this block. (The array may have one type only, whatever T is.)
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ uint4 block_memory[];
  return reinterpret_cast<T*>(block_memory);
}
#else
template <class T>
T* shared_memory() {
  return static_cast<T*>(device_on_host::shared_memory());  // from the cuda_runtime.h of tests/ops/device_on_host
}
#endif

}  // namespace pmm::cuda
