// Maps as vectors of 16 bytes (or, where they do not fit, of one element), and reading them mixed.
//
// A vector holds V cells of one plane or, with channels_last, V channels of one cell; so every kernel is written once
// over vectors, and V = 1 is its path for odd sizes and addresses.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "../scalar.h"
#include "launch.h"

#undef NDEBUG  // the assertions below are the only check of partner and cell on a device: they stay in every build
#include <cassert>

namespace pmm::cuda {

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T lanes[V];
};

// Whether each of W neighbouring cells is replaced: W bytes of 0 or 1, read as one word.
template <int W>
struct Cells {
  using Word = std::conditional_t<
      W == 8, uint64_t, std::conditional_t<W == 4, uint32_t, std::conditional_t<W == 2, uint16_t, uint8_t>>>;
  Word word = 0;

  __device__ static Cells load(const uint8_t* replaced) { return {*reinterpret_cast<const Word*>(replaced)}; }
  __device__ bool any() const { return word != 0; }
  __device__ bool all() const { return word == static_cast<Word>(~Word{0}) / 0xff; }
  __device__ bool operator[](int lane) const { return word >> (lane % W * 8) & 1; }
};

template <int V, bool ChannelsLast>
struct Layout {
  static constexpr int lanes = V;
  static constexpr bool channels_last = ChannelsLast;
  using Mask = Cells<ChannelsLast ? 1 : V>;

  uint32_t run;     // vectors of a plane; with channels_last, of a cell
  uint32_t sample;  // vectors of a sample

  __device__ uint32_t cell(uint32_t vector) const { return ChannelsLast ? vector / run : vector % run * V; }
};

// Calls body(Layout) with 16-byte vectors of T where runs and addresses allow it, else with vectors of one element.
template <class T, class Body>
void with_layout(const Maps& maps, const uint8_t* replaced, std::initializer_list<const void*> data, Body body) {
  constexpr int wide = 16 / sizeof(T);
  const int64_t run = maps.channels_last ? maps.c : maps.cells();
  bool fits = run % wide == 0 && reinterpret_cast<uintptr_t>(replaced) % wide == 0;
  for (const void* address : data) fits = fits && reinterpret_cast<uintptr_t>(address) % 16 == 0;
  const auto call = [&](auto lanes, auto channels_last) {
    constexpr int V = decltype(lanes)::value;
    body(Layout<V, decltype(channels_last)::value>{static_cast<uint32_t>(run / V),
                                                   static_cast<uint32_t>(maps.sample() / V)});
  };
  using One = std::integral_constant<int, 1>;
  using Wide = std::integral_constant<int, wide>;
  if (maps.channels_last) return fits ? call(Wide{}, std::true_type{}) : call(One{}, std::true_type{});
  return fits ? call(Wide{}, std::false_type{}) : call(One{}, std::false_type{});
}

// The vectors of one sample of maps.
template <class L, class T>
__device__ const Pack<T, L::lanes>* vectors_of(const T* maps, const L& layout, int64_t sample) {
  return reinterpret_cast<const Pack<T, L::lanes>*>(maps) + sample * layout.sample;
}
template <class L, class T>
__device__ Pack<T, L::lanes>* vectors_of(T* maps, const L& layout, int64_t sample) {
  return reinterpret_cast<Pack<T, L::lanes>*>(maps) + sample * layout.sample;
}

// A vector of the mixed map, in two steps, so that a thread can have many loads under way before it uses the first.
template <class T, class L>
struct Mixed {
  using Vector = Pack<T, L::lanes>;
  Vector own{}, taken{};
  typename L::Mask mask{};

  // Reads no more than the mask needs: the partner's vector only if a cell is replaced, the own only if one is not.
  __device__ void load(const Vector* mine, const Vector* others, typename L::Mask replaced) {
    mask = replaced;
    if constexpr (L::channels_last || L::lanes == 1) {
      own = *(mask.any() ? others : mine);
    } else {
      if (!mask.all()) own = *mine;
      if (mask.any()) taken = *others;
    }
  }

  __device__ Vector value() const {
    if constexpr (L::channels_last || L::lanes == 1) {
      return own;
    } else if constexpr (sizeof(T) == 2) {  // two halves at a time: alone, each would take a register
      using Words = Pack<uint32_t, L::lanes / 2>;
      Words mixed = same_bits<Words>(own);
      const Words other = same_bits<Words>(taken);
#pragma unroll
      for (int pair = 0; pair < L::lanes / 2; ++pair) {
        const uint32_t where = (mask[2 * pair] | mask[2 * pair + 1] << 16) * 0xffffu;
        mixed.lanes[pair] = (mixed.lanes[pair] & ~where) | (other.lanes[pair] & where);
      }
      return same_bits<Vector>(mixed);
    } else {
      Vector mixed = own;
#pragma unroll
      for (int lane = 0; lane < L::lanes; ++lane)
        if (mask[lane]) mixed.lanes[lane] = taken.lanes[lane];
      return mixed;
    }
  }
};

__device__ inline int64_t partner_of(const int64_t* partner, int64_t sample, int64_t n) {
  const int64_t other = partner[sample];
  assert(0 <= other && other < n && "partner must be in [0, n)");
  return other;
}

}  // namespace pmm::cuda
