// csrc/cuda/linear_parts.cuh: what the kernels of linear layers share: copies of weights, inputs in the order of their codes, the end.
//
// Order    eight neighbouring inputs of an output go to one lane, in every format: of 32 inputs lane t of four has 8t to 8t + 7, and what
//          they are multiplied with lies alike (codes.cuh). Canonical rows are read as they are, and nothing is packed.
// Slices   the last block of a panel to arrive adds the slices' sums in order. No float atomics: the same bits in any order of blocks.
#pragma once
#include "cuda/codes.cuh"

namespace ramify::gpu {

int linear_low_bit(const LinearArgs& a, void* stream);  // kInt4, kInt8 and kFp8, of which linear() takes care
int linear_wgmma(const LinearArgs& a, void* stream);    // the same, for many rows

namespace {

constexpr int kPiece = 64;  // bytes of one output that are copied at a time

struct alignas(16) Quad {
  uint32_t word[4];
};

// Where 16 bytes of an output's piece lie: outputs two apart are moved by other amounts, so that no two lanes meet in a bank.
RT_FN int piece_place(int output, int quarter) {
  const int pair = output >> 1 & 3;
  return output * kPiece + (quarter ^ (pair >> 1 | (pair & 1) << 1)) * 16;
}

// A lane's share of its warp's copies: 16 bytes of every eighth output.
struct Source {
  const unsigned char* from;  // of the first of them
  int64_t pitch;              // to the next
  int outputs, bytes;         // that are left from there
  bool words;                 // all lie at multiples of 16 bytes
};

// first: the warp's first output.
template <class W>
RT_FN Source source_of(const LinearArgs& a, int first) {
  const int lane = threadIdx.x % 32, n = first + lane / 4;
  const bool words = (reinterpret_cast<uintptr_t>(a.weight) | uint64_t(a.weight_stride)) % 16 == 0;
  return {static_cast<const unsigned char*>(a.weight) + n * a.weight_stride + lane % 4 * 16, 8 * a.weight_stride, int(a.N) - n,
          (int(a.K) * W::kBits + 7) / 8 - lane % 4 * 16, words};
}

// Copies a piece of 8 kEights outputs, zeros where there are none.
template <int kEights>
RT_FN void fetch(const Source& source, int step, unsigned char* stage) {
  const int lane = threadIdx.x % 32, at = step * kPiece, valid = max(0, min(source.bytes - at, 16));
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    unsigned char* const to = stage + piece_place(8 * j + lane / 4, lane % 4);
    const int count = 8 * j < source.outputs ? valid : 0;
    const unsigned char* const from = source.from + j * source.pitch + at;  // with a count of 0, an address that is not read
    if (source.words) {
      rt::cp16(to, from, count);
    } else {
      for (int i = 0; i < 16; ++i) to[i] = i < count ? from[i] : 0;
    }
  }
}

// Eight inputs of one row of x, from k on, in the order of the codes; zeros where there are none. An input that does not exist is NaN.
template <class W>
RT_FN Quad inputs_at(const LinearArgs& a, const uint16_t* row, int k, bool words) {
  uint16_t x[8];
  if (words && k + 8 <= a.K) {
    const Quad all = *reinterpret_cast<const Quad*>(row + k);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = uint16_t(all.word[i / 2] >> (16 * (i % 2)));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int from = k + i >= a.K ? -1 : a.perm ? a.perm[k + i] : k + i;
      x[i] = k + i >= a.K ? 0 : from >= 0 && from < a.K ? row[from] : 0x7FFF;
    }
  }
  Quad quad;
#pragma unroll
  for (int i = 0; i < 4; ++i) quad.word[i] = uint32_t(x[W::order(2 * i + 1)]) << 16 | x[W::order(2 * i)];
  return quad;
}

template <class T>
RT_FN float number(uint32_t bits) {
  const uint16_t low = uint16_t(bits);
  T x;
  memcpy(static_cast<void*>(&x), &low, 2);
  return to_float(x);
}

// Whether a code of a lane's output, or of the three lanes that share it, was NaN.
RT_FN bool any_nan(uint32_t nan) { return __ballot_sync(rt::kAll, (nan & 0x80808080u) != 0) >> (threadIdx.x % 32 / 4 * 4) & 15; }

// Epilogue of one output; the one rounding.
template <class W>
RT_FN void finish(const LinearArgs& a, int64_t row, int64_t n, float y) {
  using T = typename W::Type;
  if (W::kRowScale) y *= value_at(a.scale, a.scale_type, n * a.scale_stride);
  if (a.bias) y += value_at(a.bias, a.bias_type, n);
  if (a.silu) y = y / (1.f + expf(-y));
  if (a.residual) y += value_at(a.residual, a.residual_type, row * a.residual_stride + n);
  static_cast<T*>(a.out)[row * a.out_stride + n] = from_float<T>(y);
}

// What a block has summed.
struct Part {
  int panel, place, slice, slices, first, rows;  // first output, which of the launch, first row of x and their number
  int* last;                                     // shared
};

// Sums of a slice, sum(token, output), to the output itself where it is the only one, else to those of the other slices. kThreads threads
// come, from the first of the block on, and meet in sync().
template <class W, int kTokens, int kOutputs, int kThreads, class Sum, class Sync>
RT_FN void join(const LinearArgs& a, const Part& part, Sum sum, Sync sync) {
  const int thread = threadIdx.x;
  float* const parts = a.scratch + int64_t(part.place) * part.slices * kTokens * kOutputs;
  for (int n = thread; n < part.rows * kOutputs; n += kThreads) {
    const int token = n / kOutputs, output = n % kOutputs;
    const float y = sum(token, output);
    if (part.slices > 1) {
      parts[part.slice * kTokens * kOutputs + n] = y;
    } else if (part.panel + output < a.N) {
      finish<W>(a, part.first + token, part.panel + output, y);
    }
  }
  if (part.slices == 1) return;
  sync();
  if (thread == 0) {
    __threadfence();
    part.last[0] = atomicAdd(a.tickets + part.place, 1u) == unsigned(part.slices - 1);
    __threadfence();
    if (part.last[0]) atomicExch(a.tickets + part.place, 0u);
  }
  sync();
  if (!part.last[0]) return;
  for (int n = thread; n < part.rows * kOutputs; n += kThreads) {
    const int output = part.panel + n % kOutputs;
    if (output >= a.N) continue;
    float y = parts[n];
    for (int s = 1; s < part.slices; ++s) y += parts[s * kTokens * kOutputs + n];
    finish<W>(a, part.first + n / kOutputs, output, y);
  }
}

}  // namespace
}  // namespace ramify::gpu
