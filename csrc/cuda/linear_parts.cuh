// csrc/cuda/linear_parts.cuh: what the kernels of linear layers share: copies of weights, inputs in the order of their codes, the end.
//
// Order    eight neighbouring inputs of an output go to one lane, in every format: of 32 inputs lane t of four has 8t to 8t + 7, and what
//          they are multiplied with lies alike (codes.cuh). Canonical rows are read as they are, and nothing is packed.
// Shares   the inputs of all panels are one list of equal pieces, panel after panel, and every block takes an equal run of it: a panel is
//          one block's or the sum of several blocks' parts, and the last of these to arrive adds all parts in the order of the inputs.
//          No float atomics: the same bits in any order of blocks.
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

// A warp copies a piece of 32 outputs, from `first` on, zeros where there are none: a lane 16 bytes of every eighth output.
template <class W>
RT_FN void fetch(const LinearArgs& a, int first, int step, unsigned char* stage) {
  const int lane = threadIdx.x % 32, at = step * kPiece + lane % 4 * 16;
  const int valid = max(0, min((int(a.K) * W::kBits + 7) / 8 - at, 16));
  const bool words = (reinterpret_cast<uintptr_t>(a.weight) | uint64_t(a.weight_stride)) % 16 == 0;  // all lie at multiples of 16 bytes
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    unsigned char* const to = stage + piece_place(8 * j + lane / 4, lane % 4);
    const int n = first + 8 * j + lane / 4, count = n < a.N ? valid : 0;
    const unsigned char* const from = static_cast<const unsigned char*>(a.weight) + n * a.weight_stride + at;  // not read for a count of 0
    if (words) {
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

RT_FN float4 plus(const float4& a, const float4& b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

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

// How the pieces of all panels are shared: by the weight's shape and a constant alone, so that a row's bits are its own on every chip. No
// two shares differ by more than a piece.
struct Shares {
  unsigned panels, pieces, count;  // panels, pieces of a panel, shares

  RT_FN int begin(int share) const { return int(unsigned(share) * (panels * pieces) / count); }
  RT_FN int owner(int piece) const { return int((unsigned(piece + 1) * count - 1) / (panels * pieces)); }
};

// Panels of so many outputs, pieces of so many inputs, and at most so many shares: no more than there are windows, so that none is empty.
inline Shares shares_of(const LinearArgs& a, int outputs, int inputs, int64_t most) {
  const int64_t panels = (a.N + outputs - 1) / outputs, windows = (a.K + kLinearWindow - 1) / kLinearWindow;
  const int64_t count = most < panels * windows ? most : panels * windows;
  return {unsigned(panels), unsigned((a.K + inputs - 1) / inputs), unsigned(count < 1 ? 1 : count)};
}

// What a block has summed: one of the parts of a panel.
struct Part {
  int output, row, rows;                 // first output, first row of x and their number
  int part, parts, ticket, slot, apart;  // which of how many; the first one's slot, and how far the next one's is
  int last;                              // whether the others are there

  RT_FN float* at(float* scratch, int i, int sums) const { return scratch + (slot + int64_t(i) * apart) * sums; }
};

// The part of a panel that is summed by this block, x of the grid over rows of x and y over shares. A panel that is cut goes by its number
// or by that of its first share, whichever is less: from one such panel to the next both grow, the share by all parts but one. So no two
// have the same ticket, or a slot in common.
RT_FN Part part_of(const Shares& shares, int panel) {
  const int share = blockIdx.y, block = blockIdx.x, blocks = gridDim.x;
  const int first = shares.owner(panel * int(shares.pieces)), last = shares.owner((panel + 1) * int(shares.pieces) - 1);
  const int name = min(panel, first);
  Part part = {};
  part.part = share - first, part.parts = last - first + 1;
  part.ticket = name * blocks + block, part.slot = (first + name) * blocks + block, part.apart = blocks;
  return part;
}

// Sums of a part, sum(token, output) of that and the next three outputs, become results where it is all of the panel, else they join the
// other parts. kThreads threads come, from the first of the block on, and meet in sync(); `part` is shared.
template <class W, int kTokens, int kOutputs, int kThreads, class Sum, class Sync>
RT_FN void join(const LinearArgs& a, Part& part, Sum sum, Sync sync) {
  const int thread = threadIdx.x, all = part.rows * kOutputs;
  constexpr int kSums = kTokens * kOutputs;
  const auto finish_four = [&](int n, float4 y) {
    const int row = part.row + n / kOutputs, output = part.output + n % kOutputs, there = int(a.N) - output;
    if (there > 0) finish<W>(a, row, output, y.x);
    if (there > 1) finish<W>(a, row, output + 1, y.y);
    if (there > 2) finish<W>(a, row, output + 2, y.z);
    if (there > 3) finish<W>(a, row, output + 3, y.w);
  };
  if (part.parts > 1) {
    float* const mine = part.at(a.scratch, part.part, kSums);
#pragma unroll 1
    for (int n = 4 * thread; n < all; n += 4 * kThreads) *reinterpret_cast<float4*>(mine + n) = sum(n / kOutputs, n % kOutputs);
    sync();
    if (thread == 0) {
      __threadfence();
      part.last = atomicAdd(a.tickets + part.ticket, 1u) == unsigned(part.parts - 1);
      __threadfence();
      if (part.last) atomicExch(a.tickets + part.ticket, 0u);
    }
    sync();
    if (!part.last) return;
  }
  const float* const first = part.at(a.scratch, 0, kSums);
  const int64_t apart = int64_t(part.apart) * kSums;
  const int parts = part.parts;
#pragma unroll 1
  for (int n = 4 * thread; n < all; n += 4 * kThreads) {
    float4 y = parts > 1 ? *reinterpret_cast<const float4*>(first + n) : sum(n / kOutputs, n % kOutputs);
#pragma unroll 2
    for (int i = 1; i < parts; ++i) y = plus(y, *reinterpret_cast<const float4*>(first + i * apart + n));
    finish_four(n, y);
  }
}

}  // namespace
}  // namespace ramify::gpu
