// csrc/cuda/linear.cu: linear layers over dense 16-bit weights, and the way in for low-bit ones. Meaning: reference/linear.py.
// Status: compiled and emulated, not yet run on hardware.
//
// What     act(x W^T + bias) + residual for bf16 and f16, W [N, K] of x's type as it lies. Made for 1 to 32 rows; takes any number, and
//          reads the weights again for every 32. How: linear_tile.cuh.
// Bits     one instruction and one order of inputs for every number of rows: a row has the same bits alone and among others.
// Traffic  2 N K bytes, once for 32 rows; 2 M K bytes of x for every 128 outputs and 1 KiB for each part of them and row, which the L2
// cache serves.
#include "cuda/entries.h"
#include "cuda/linear_tile.cuh"

namespace ramify::gpu {

int linear(const LinearArgs& a, void* stream) {
  if (a.rows == 0 || a.N == 0) return cudaSuccess;
  if (a.K < 1 || (a.K | a.N | a.rows) >> 28 || a.shares < 1 || a.shares >> 16) return cudaErrorInvalidValue;
  const int64_t panels = (a.N + kLinearPanel - 1) / kLinearPanel, windows = (a.K + kLinearWindow - 1) / kLinearWindow;
  if ((panels + 1) * windows * a.shares >> 31) return cudaErrorInvalidValue;  // more than Shares counts to
  if (a.kind != kDense) return linear_low_bit(a, stream);
  if (a.type == kBf16) return start_linear<Dense<bf16>>(a, stream);
  if (a.type == kF16) return start_linear<Dense<f16>>(a, stream);
  return cudaErrorInvalidValue;
}

}  // namespace ramify::gpu
