// The part of CUDA that the kernels of cpp_ext/cuda use, for g++: their threads run on the CPU, one after another.
//
// It is stricter than a device. All threads of a block must reach every barrier, all lanes of a warp every exchange,
// and at the same line; else the program ends with a message. Between two meetings a thread runs alone, in an order
// that a seed decides: where a barrier is missing, results depend on the seed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

namespace device_on_host {

struct Site {  // a place in the code where threads meet
  const char* file;
  int line;
  const char* call;
};

bool meet_block(bool value, Site);                     // whether the value of any thread was true
const uint64_t* meet_warp(uint64_t value, Site);       // the values of the 32 lanes, until the next meeting
void* shared_memory();                                 // as many bytes as the launch asked for, full of garbage
void run(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& kernel);

}  // namespace device_on_host

// where the caller stands
#define PMM_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(PMM_AT) { device_on_host::meet_block(false, {file, line, "__syncthreads"}); }
inline int __syncthreads_or(int value, PMM_AT) {
  return device_on_host::meet_block(value != 0, {file, line, "__syncthreads_or"});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, PMM_AT) {
  static_assert(std::is_arithmetic<T>::value && sizeof(T) >= 4, "CUDA shuffles 4 and 8 bytes");
  const device_on_host::Site site{file, line, mask == ~0u ? "__shfl_xor_sync" : nullptr};  // no parts of a warp
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  const uint64_t* lanes = device_on_host::meet_warp(bits, site);
  memcpy(&value, &lanes[(threadIdx.x % 32) ^ static_cast<unsigned>(distance)], sizeof(T));
  return value;
}

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
inline unsigned min(int a, unsigned b) { return min(static_cast<unsigned>(a), b); }

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// Refuses what a device refuses, and the default stream: the stream of the caller must have come all the way.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  const size_t shared = config->dynamicSmemBytes;
  if (blocks == 0 || threads == 0 || threads > 1024 || shared > 48 * 1024 || !config->stream)
    return cudaErrorInvalidConfiguration;
  device_on_host::run(blocks, threads, shared, [&] { kernel(arguments...); });
  return cudaSuccess;
}
