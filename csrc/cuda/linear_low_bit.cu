// csrc/cuda/linear_low_bit.cu: linear layers over int4, int8 and fp8 weights in their canonical form. Meaning: reference/linear.py with
// activations "exact". Status: compiled and emulated, not yet run on hardware.
//
// What     act(x W^T + bias) + residual for x in bf16 and f16: int4 in groups of 32, 64 or 128 inputs with and without zero points, int8
//          with a scale a row, e4m3 with a scale a row or a block of 128 x 128; inputs in any order (act-order). Made for 1 to 32
//          rows; takes any number, and reads and decodes the weights again for every 32. More than 32 go to linear_wgmma.cu where
//          that runs, unless `variant` keeps them here.
// Packing  none: 16 bytes of a canonical row are one copy, and what a lane needs of them is one load of 4 or 8 bytes. The kernel brings x
//          into the codes' order instead (linear_tile.cuh, codes.cuh), so a weight lies in memory once for every backend.
// Numbers  codes are exact in 16 bits, products exact in f32, scales and zeros multiply f32 sums: no weight is rounded. A NaN code makes
//          its output NaN.
// Traffic  N K bits / 8 bytes and the scales, once for 32 rows; x and sums of parts as in linear.cu.
// Registers within 128, two blocks an SM; 74 to 100 KiB of shared memory, three blocks an SM for up to 8 rows on sm_90.
#include "cuda/entries.h"
#include "cuda/linear_tile.cuh"

namespace ramify::gpu {
namespace {

template <class T>
int start_kind(const LinearArgs& a, void* stream) {
  if (a.kind == kInt4) return start_linear<Int4<T>>(a, stream);
  if (a.kind == kInt8) return start_linear<Int8<T>>(a, stream);
  if (a.kind == kFp8) return start_linear<Fp8<T>>(a, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

int linear_low_bit(const LinearArgs& a, void* stream) {
  const bool group = a.group == 0 || a.group == 32 || a.group == 64 || a.group == 128;
  if (!a.scale || !group || a.lines < 1 || (a.kind == kInt8 && a.group) || (a.kind != kInt4 && a.zero)) return cudaErrorInvalidValue;
  if (a.type != kBf16 && a.type != kF16) return cudaErrorInvalidValue;
  const bool many = a.variant == kManyRows || (a.variant == kByRows && a.rows > kMostFewRows && has_wgmma());
  if (many) return linear_wgmma(a, stream);
  return a.type == kBf16 ? start_kind<bf16>(a, stream) : start_kind<f16>(a, stream);
}

}  // namespace ramify::gpu
