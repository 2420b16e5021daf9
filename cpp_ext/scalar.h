// The four dtypes: how each is stored, and its way to and from the type that sums are kept in.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__CUDACC__)
#define PMM_BOTH __host__ __device__ __forceinline__
#else
#define PMM_BOTH inline
#endif

namespace pmm {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;

template <class To, class From>
PMM_BOTH To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

PMM_BOTH float widen(float value) { return value; }
PMM_BOTH double widen(double value) { return value; }
PMM_BOTH float widen(BFloat16 value) { return same_bits<float>(static_cast<uint32_t>(value.bits) << 16); }

PMM_BOTH float widen(Half value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  // no branch and no float below the normal range, so that it vectorises and holds with denormals flushed to zero
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + 0x38000000u;                         // exponent bias 15 -> 127
  const uint32_t special = (magnitude << 13) | 0x7f800000u;                        // infinity and NaN
  const float tiny = same_bits<float>(magnitude + 0x4b000000u) - 8388608.0f;       // the integer, exactly
  const uint32_t denormal = same_bits<uint32_t>(tiny * 5.9604644775390625e-8f);    // times 2^-24
  const uint32_t wide = magnitude >= 0x7c00u ? special : magnitude < 0x400u ? denormal : normal;
  return same_bits<float>(sign | wide);
#endif
}

template <class T>
PMM_BOTH T narrow(Sum<T> value);

template <>
PMM_BOTH float narrow<float>(float value) {
  return value;
}
template <>
PMM_BOTH double narrow<double>(double value) {
  return value;
}
template <>
PMM_BOTH BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = same_bits<uint32_t>(value), nan = (bits >> 16) | 0x40u;
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // ties to even
  return BFloat16{static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : nearest)};
}
template <>
PMM_BOTH Half narrow<Half>(float value) {
#if defined(__CUDA_ARCH__)
  Half half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
  return half;
#else
  // every case is computed and one selected: no branch, so that it vectorises
  const uint32_t bits = same_bits<uint32_t>(value), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;  // ties to even
  // below 2^-14: adding 1/2 leaves in the low bits the multiple of 2^-24, rounded
  const uint32_t denormal = same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? denormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= 0x477ff000u ? special : finite;  // 65520 and more round to infinity
  return Half{static_cast<uint16_t>(sign | half)};
#endif
}

inline int64_t size_of(DType dtype) { return dtype == DType::Double ? 8 : dtype == DType::Float ? 4 : 2; }

// body(T{}) with the storage type of `dtype`.
template <class Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::Half: return body(Half{});
    case DType::BFloat16: return body(BFloat16{});
    case DType::Float: return body(float{});
    case DType::Double: return body(double{});
  }
}

}  // namespace pmm
