// Loops whose index is a constant, so that arrays which it indexes become registers.
//
// Nothing of the standard library that is no template of ours: see scan.h and rank.h.
#pragma once

#include <utility>

#define PMM_INLINE inline __attribute__((always_inline))
#define PMM_EACH(i) [&](auto i) __attribute__((always_inline))

namespace pmm::search {
namespace {

// body(0), body(1), ... as constants.
template <class Body, int... i>
PMM_INLINE void each(std::integer_sequence<int, i...>, Body body) {
  (body(std::integral_constant<int, i>()), ...);
}
template <int Count, class Body>
PMM_INLINE void each(Body body) {
  each(std::make_integer_sequence<int, Count>(), body);
}

}  // namespace
}  // namespace pmm::search
