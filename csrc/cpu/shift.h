// The shift that keeps every sum in range, and the test for when it lost something (math.md, eq. 7): the same rules as
// fastclip/backends/shift.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace fastclip {
namespace {

constexpr double kSafeExponent = 60.0;  // every sum stays below e^60
constexpr double kTinySum = 1e-25;      // below this a sum may have lost negatives to underflow

// The one shift that serves n rows and columns while |S| <= bound; infinite beyond float32, NaN where the bound is.
double fixed_shift(double bound, int64_t n) {
  const double shift = std::abs(bound) + (std::log(double(n)) - kSafeExponent);
  if (std::isnan(shift)) return shift;
  if (shift > double(std::numeric_limits<float>::max())) return std::numeric_limits<double>::infinity();
  return std::ceil(std::max(0.0, shift) * 16.0) / 16.0;
}

// A largest negative as a shift: a multiple of 1/16, anything where there is no negative.
double shift_of(double maximum) {
  return maximum == -std::numeric_limits<double>::infinity() ? 0.0 : std::ceil(maximum * 16.0) / 16.0;
}

// Whether the shift lost nothing of these sums.
template <class T>
bool in_range(const T* sum, int64_t count) {
  return std::all_of(sum, sum + count, [](T s) { return s >= T(kTinySum) && s <= std::numeric_limits<T>::max(); });
}

}  // namespace
}  // namespace fastclip
