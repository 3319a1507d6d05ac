// The kernels of one instruction set, as a table. Included once by each isa_*.cpp, after it has set its target.
#pragma once
#include "backward.h"
#include "finish.h"
#include "forward.h"
#include "pack.h"
#include "ranks.h"
#include "sigmoid.h"

namespace fastclip {
namespace FC_ISA {

template <class T>
static Kernels<T> kernels() {
  return {Simd<T>::kPanel, pack<T>, sums<T>, maxima<T>, pair_scores<T>, ranks<T>, gradients<T>, sigmoid<T>, finish<T>};
}

}  // namespace FC_ISA
}  // namespace fastclip
