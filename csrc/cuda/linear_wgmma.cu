// csrc/cuda/linear_wgmma.cu: low-bit linear layers for 33 rows and more on sm_90a. Meaning: reference/linear.py with activations "exact".
// Status: compiled and emulated, not yet run on hardware.
//
// What     as linear_low_bit.cu: every format, in its canonical form.
// Operands weights, decoded in registers, are the 64 rows of wgmma m64n64k16; 64 rows of x are its columns, in shared memory. A weight is
//          decoded once for 64 rows, and a scale multiplies the f32 sum of its inputs: no weight is rounded.
// Block    panels of 256 outputs, one after the other. Two warpgroups take 128 outputs each, as two products of 64, so that one is decoded
//          while the other is multiplied; a warp copies the weights of its 32 through a ring of four stages of its own (cp.async: a
//          canonical row gives 64 bytes at a time, too little for a bulk copy). A third one brings tiles of 64 inputs of x into the codes'
//          order, swizzled, through a ring of eight.
// Shares   as in linear_tile.cuh, in pieces of 128 inputs, for half as many blocks: one an SM. Between two panels of a block both rings run
//          empty, for the sums take their place.
// Barriers full[slot] counts the producers' threads, each after a proxy fence behind its stores; empty[slot] one lane of every consumer
//          warp, once its products are over: after the first half of the next tile.
// Bits     a row's are its own among any number of rows that this kernel takes; linear_low_bit.cu, which fewer rows go to, adds the same
//          products with another instruction.
// Traffic  N K bits / 8 bytes and the scales once for 64 rows; 2 M K bytes of x for every 256 outputs, which the L2 cache serves.
// Shared   133 KiB, one block an SM.
// Left out 65 to 128 rows take two blocks beside each other, and each decodes the weights: the second's come from the L2 cache. Clusters
//          that share a decoded tile, and a launch that starts before its predecessor ends, wait for a chip that can say what they bring.
#include "cuda/linear_parts.cuh"
#include "cuda/rt_hopper.cuh"

namespace ramify::gpu {
namespace {

constexpr int kWide = 256, kTokens = 64;      // outputs and rows of a block
constexpr int kTile = 64, kPair = 2 * kTile;  // inputs of a tile of x, and of a round
constexpr int kConsumers = 256, kProducers = 128, kSlots = 8, kStages = 4;
constexpr int kTileBytes = kTokens * 128, kWarpStage = 32 * kPiece, kStage = kConsumers / 32 * kWarpStage;
constexpr int kPitch = kWide + 4, kTotals = kSlots * 2 * kTokens;
constexpr int kBytes = 1024 + kSlots * kTileBytes + kStages * kStage + kTotals * 4;
static_assert(kTokens * kPitch * 4 <= kSlots * kTileBytes + kStages * kStage, "the sums take the place of both rings");

struct Work {
  int panel, first, rows, begin, end;  // first output; first row of x and their number; inputs of the part, in whole pairs of tiles
  unsigned char *tiles, *ring;
  float* total;  // [kSlots][2][kTokens]: sums of x over the group that ends with a half of the tile
  rt::Mbarrier *full, *empty;
};

// A slot of a ring and the parity of its phase.
struct Turn {
  int slot = 0;
  unsigned parity = 0;
  RT_FN void next() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

#if RT_HOPPER

// 32 inputs of one row of x, from k on.
template <class W>
RT_FN void load_half(const LinearArgs& a, const Work& work, int token, int k, bool words, Quad (&x)[4]) {
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    x[t] = {};
    if (token < work.rows && k < work.end)
      x[t] = inputs_at<W>(a, static_cast<const uint16_t*>(a.x) + int64_t(work.first + token) * a.x_stride, k + 8 * t, words);
  }
}

// Tiles of x, a thread half a row, the next one on its way. What lane t of four multiplies lies at columns 2t and 2t + 8 of a product's 16.
template <class W, int kGroup>
RT_FN void produce(const LinearArgs& a, const Work& work, Turn& turn) {
  using T = typename W::Type;
  const int thread = threadIdx.x - kConsumers, token = thread / 2, half = thread % 2;
  const bool words = !a.perm && wide(static_cast<const uint16_t*>(a.x), a.x_stride);
  Quad x[4], ahead[4];
  float before = 0;  // of the group, in the tile before
  load_half<W>(a, work, token, work.begin + 32 * half, words, x);
  for (int k = work.begin; k < work.end; k += kTile) {
    load_half<W>(a, work, token, k + kTile + 32 * half, words, ahead);
    rt::mbar_wait(&work.empty[turn.slot], turn.parity ^ 1);
    float sum = 0;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const Quad quad = {x[0].word[q], x[1].word[q], x[2].word[q], x[3].word[q]};
      *reinterpret_cast<Quad*>(work.tiles + turn.slot * kTileBytes + rt::swizzled(token * 128 + half * 64 + q * 16)) = quad;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += number<T>(quad.word[i]) + number<T>(quad.word[i] >> 16);
    }
    if (a.zero) {
      const float both = sum + __shfl_xor_sync(rt::kAll, sum, 1);
      work.total[(turn.slot * 2 + half) * kTokens + token] = kGroup == 32 ? sum : kGroup == 64 ? both : before + both;
      before = both;
    }
    rt::fence_async();
    rt::mbar_arrive(&work.full[turn.slot]);
    turn.next();
#pragma unroll
    for (int t = 0; t < 4; ++t) x[t] = ahead[t];
  }
}

// Scales and zeros of two outputs of a thread.
struct Scales {
  float scale[2], zero[2];
};

// Of the group of inputs that k belongs to.
template <int kGroup>
RT_FN Scales scales_at(const LinearArgs& a, int output, int k) {
  Scales s;
  const int group = kGroup ? k / kGroup : 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int n = output + 8 * half;
    const bool there = n < a.N && k < a.K;
    s.scale[half] = there ? value_at(a.scale, a.scale_type, n / int(a.lines) * a.scale_stride + group) : 0.f;
    s.zero[half] = there && a.zero ? number<f16>(a.zero[n * a.zero_stride + group]) : 0.f;
  }
  return s;
}

// y += a group's sums under its scale. total: of its inputs, by row of x.
RT_FN void add_group(const Scales& s, const float* total, const float (&part)[kTokens / 2], float (&y)[kTokens / 2]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = part[4 * j + 2 * half + e];
        if (total) sum -= s.zero[half] * total[8 * j + 2 * t + e];
        y[4 * j + 2 * half + e] += s.scale[half] * sum;
      }
}

// Eight codes of two outputs of a thread become its share of A in two products.
template <class W>
RT_FN void operands(const unsigned char* stage, int turn, uint32_t minus, uint32_t (&nan)[2], uint32_t (&a)[2][4]) {
  constexpr int kWords = W::kBits / 4, kCodes = kWords * 4;
  const int lane = threadIdx.x % 32, byte = (4 * turn + lane % 4) * kCodes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t codes[kWords], pair[4];
    memcpy(codes, __builtin_assume_aligned(stage + piece_place(8 * half + lane / 4, byte / 16) + byte % 16, kCodes), kCodes);
    W::decode(codes, minus, pair, nan[half]);
    a[0][half] = pair[0], a[0][2 + half] = pair[1], a[1][half] = pair[2], a[1][2 + half] = pair[3];
  }
}

// One of the two warpgroups that multiply. Its warps have 32 outputs each, of which product i takes 16i to 16i + 15. Where groups begin
// and end is known to the compiler, or it would wait for each product before it lets the next operand be decoded.
template <class W, int kGroup, class Finish>
RT_FN void consume(const LinearArgs& a, const Work& work, Turn& turn, Finish finish_panel) {
  using T = typename W::Type;
  using N = Numbers<T>;
  constexpr int kStep = kPiece * 8 / W::kBits, kOften = kStep / kTile;  // tiles of a stage
  constexpr int kBegin = kGroup ? kGroup : kPair;                       // inputs that share a scale, of a round
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, output = work.panel + 32 * warp + lane / 4;
  unsigned char* const ring = work.ring + warp * kWarpStage;
  int ahead = work.begin / kStep;
  const auto fetch_next = [&](int stage) {
    if (ahead * kStep < work.end) fetch<W>(a, work.panel + 32 * warp, ahead, ring + stage * kStage);
    ++ahead;
    rt::cp_commit();
  };
  for (int stage = 0; stage < kStages; ++stage) fetch_next(stage);
  const uint32_t minus = a.zero ? N::kMinusBase : N::kMinusBase8;
  float y[2][kTokens / 2], part[2][kTokens / 2];  // without groups `part` is all there is
  uint32_t nan[2][2] = {}, operand[2][2][4];
  Scales now[2], then[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kTokens / 2; ++j) y[i][j] = part[i][j] = 0;
    if constexpr (kGroup > 0) now[i] = scales_at<kGroup>(a, output + 16 * i, work.begin);
  }
  rt::wgmma_fence(part[0], part[1]);
  int stage = 0, done = -1;  // the slot of the tile before
  for (int k = work.begin; k < work.end; k += kPair) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      if (tile % kOften == 0) {
        rt::cp_wait<kStages - 1>();
        __syncwarp();
      }
      rt::mbar_wait(&work.full[turn.slot], turn.parity);
      const unsigned char* const x = work.tiles + turn.slot * kTileBytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = 64 * tile + 32 * half;
        const uint64_t first = rt::descriptor(x + half * 64, 0, 1024), second = rt::descriptor(x + half * 64 + 32, 0, 1024);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (kGroup && at % kBegin == 0) then[i] = scales_at<kGroup>(a, output + 16 * i, k + at + kGroup);  // while this one is multiplied
          rt::wgmma_wait<1>(part[i]);  // the last that read this operand
          operands<W>(ring + stage * kStage + 16 * i * kPiece, tile % kOften * 2 + half, minus, nan[i], operand[i]);
          rt::wgmma_fence(part[i], operand[i][0], operand[i][1]);
          rt::wgmma_registers<T, 0>(part[i], operand[i][0], first, kGroup == 0 || at % kBegin != 0);
          rt::wgmma_registers<T, 0>(part[i], operand[i][1], second, 1);
          rt::wgmma_commit();
        }
        if (half == 0 && done >= 0 && lane == 0) rt::mbar_arrive(&work.empty[done]);
        if (kGroup && (at + 32) % kBegin == 0) {
          const float* const total = a.zero ? work.total + (turn.slot * 2 + half) * kTokens : nullptr;
          rt::wgmma_wait<1>(part[0]);
          add_group(now[0], total, part[0], y[0]);
          rt::wgmma_wait<0>(part[1]);
          add_group(now[1], total, part[1], y[1]);
          now[0] = then[0], now[1] = then[1];
        }
      }
      done = turn.slot;
      turn.next();
      if (tile % kOften == kOften - 1) {
        __syncwarp();
        fetch_next(stage);
        stage = (stage + 1) % kStages;
      }
    }
  }
  rt::wgmma_wait<0>(part[0], part[1]);
  if (lane == 0) rt::mbar_arrive(&work.empty[done]);
  rt::cp_wait<0>();
  rt::bar_sync(1, kConsumers);  // all are done with the rings
  float* const sums = reinterpret_cast<float*>(work.tiles);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (W::kGroups && !kGroup) add_group(scales_at<0>(a, output + 16 * i, 0), nullptr, part[i], y[i]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool bad = W::kNan && any_nan(nan[i][half]);
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float value = (W::kGroups ? y : part)[i][4 * j + 2 * half + e];
          sums[(8 * j + 2 * (lane % 4) + e) * kPitch + 32 * warp + 16 * i + 8 * half + lane / 4] = bad ? not_a_number() : value;
        }
    }
  }
  rt::bar_sync(1, kConsumers);
  finish_panel([&](int token, int n) { return *reinterpret_cast<const float4*>(sums + token * kPitch + n); });
}

#endif

// Rows of x from `row` on. Blocks of the same weights are neighbours.
template <class W, int kGroup>
__global__ void __launch_bounds__(kConsumers + kProducers, 1) wgmma_kernel(const LinearArgs a, const Shares shares, int row) {
#if RT_HOPPER
  RT_DYN(unsigned char, space);
  RT_SHARED(rt::Mbarrier, full, [kSlots]);
  RT_SHARED(rt::Mbarrier, empty, [kSlots]);
  RT_SHARED(Part, part, [1]);
  const int share = int(blockIdx.y), pieces = int(shares.pieces);
  Work work;
  work.first = row + int(blockIdx.x) * kTokens, work.rows = min(kTokens, int(live_rows(a.live, a.rows)) - work.first);
  if (work.rows <= 0) return;
  work.tiles = rt::tile_memory(space), work.ring = work.tiles + kSlots * kTileBytes;
  work.total = reinterpret_cast<float*>(work.ring + kStages * kStage);
  work.full = full, work.empty = empty;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) rt::mbar_init(full + i, kProducers), rt::mbar_init(empty + i, kConsumers / 32);
    rt::fence_async();
  }
  __syncthreads();
  const int end = shares.begin(share + 1);
  // what(panel) for each panel of the share. All threads meet between two of them, for the sums of one lie where tiles of the next will.
  const auto each_panel = [&](auto what) {
    for (int piece = shares.begin(share); piece < end;) {
      const int panel = piece / pieces, from = panel * pieces, stop = min(from + pieces, end);
      work.panel = panel * kWide, work.begin = (piece - from) * kPair, work.end = (stop - from) * kPair;
      what(panel);
      piece = stop;
      if (piece < end) rt::bar_sync(2, kConsumers + kProducers);
    }
  };
  Turn turn;
  if (threadIdx.x < kConsumers) {
    rt::registers_up<216>();
    each_panel([&](int panel) {
      if (threadIdx.x == 0) {
        part[0] = part_of(shares, panel);
        part[0].output = work.panel, part[0].row = work.first, part[0].rows = work.rows;
      }
      consume<W, kGroup>(a, work, turn,
                         [&](auto sum) { join<W, kTokens, kWide, kConsumers>(a, part[0], sum, [] { rt::bar_sync(1, kConsumers); }); });
    });
  } else {
    rt::registers_down<72>();
    each_panel([&](int) { produce<W, kGroup>(a, work, turn); });
  }
#endif
}

template <class W, int kGroup = 0>
int start(const LinearArgs& a, cudaStream_t stream) {
  auto* const kernel = wgmma_kernel<W, kGroup>;
  if (const int error = rt::allow_shared(kernel, kBytes)) return error;
  const Shares shares = shares_of(a, kWide, kPair, a.shares / 2);
  for (int64_t row = 0; row < a.rows; row += kLinearRows) {
    const int64_t rows = a.rows - row < kLinearRows ? a.rows - row : kLinearRows;
    const dim3 grid(unsigned((rows + kTokens - 1) / kTokens), shares.count);
    RT_LAUNCH(kernel, grid, dim3(kConsumers + kProducers), kBytes, stream, a, shares, int(row));
    if (const int error = cudaGetLastError()) return error;
  }
  return cudaSuccess;
}

template <class T>
int start_kind(const LinearArgs& a, cudaStream_t stream) {
  if (a.kind == kInt8) return start<Int8<T>>(a, stream);
  if (a.kind == kFp8) return a.group ? start<Fp8<T>, 128>(a, stream) : start<Fp8<T>>(a, stream);
  if (a.group == 32) return start<Int4<T>, 32>(a, stream);
  return a.group == 64 ? start<Int4<T>, 64>(a, stream) : start<Int4<T>, 128>(a, stream);
}

}  // namespace

int linear_wgmma(const LinearArgs& a, void* stream) {
  return a.type == kBf16 ? start_kind<bf16>(a, cudaStream_t(stream)) : start_kind<f16>(a, cudaStream_t(stream));
}

}  // namespace ramify::gpu
