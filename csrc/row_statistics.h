// Mean and deviation of a row, for norms over channels. For use in D2V_INLINE functions only.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace d2v {

struct RowStatistics {
  float mean, rstd;
};

// Sums the lanes, halves first.
D2V_INLINE float add_lanes(Lanes v) {
  float x[kLanes];
  store<Lanes>(x, v);
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// Mean and reciprocal deviation of n numbers, by the corrected two-pass algorithm: the second pass, from the
// cache, corrects the rounding of the first mean. Prefetches n numbers at `next`.
template <typename T>
D2V_INLINE RowStatistics row_statistics(const T* x, const T* next, int64_t n, double eps) {
  constexpr int64_t kStep = 4 * kLanes;
  Lanes a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    __builtin_prefetch(next + i);
    if (sizeof(T) == 4) __builtin_prefetch(next + i + kStep / 2);
    a += load_as<Lanes>(x + i);
    b += load_as<Lanes>(x + i + kLanes);
    c += load_as<Lanes>(x + i + 2 * kLanes);
    d += load_as<Lanes>(x + i + 3 * kLanes);
  }
  float sum = add_lanes((a + b) + (c + d));
  for (; i < n; ++i) sum += load_as<float>(x + i);
  const float first_mean = sum / static_cast<float>(n);

  Lanes sums[2]{}, squares[2]{};
  i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    for (int64_t j = 0; j < 2; ++j) {
      const Lanes e = load_as<Lanes>(x + i + j * kLanes) - first_mean;
      sums[j] += e;
      squares[j] += e * e;
    }
  }
  float rest = add_lanes(sums[0] + sums[1]), square = add_lanes(squares[0] + squares[1]);
  for (; i < n; ++i) {
    const float e = load_as<float>(x + i) - first_mean;
    rest += e;
    square += e * e;
  }
  const double share = 1.0 / static_cast<double>(n), correction = rest * share;
  const double variance = std::max(square * share - correction * correction, 0.0);
  return {static_cast<float>(first_mean + correction), static_cast<float>(1.0 / std::sqrt(variance + eps))};
}

}  // namespace d2v
