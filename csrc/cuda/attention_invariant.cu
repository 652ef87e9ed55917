// csrc/cuda/attention_invariant.cu: tree attention in which a row has the bits of plain decoding, for sm_80 and newer (mma.sync).
// Meaning: reference/attention.py; the interface and the limits of attention.cu, but for intervals.
// Status: compiled and emulated, not yet run on hardware.
//
// Bits     keys are added by position, in blocks of 16: the key at position p is key p % 16 of its block's instruction, whether it lies in
//          the prefix or in the tree. Blocks wholly inside the prefix are shared by all rows of a warp. From the block that holds the end
//          of the prefix on, every tree row gathers its own 16 keys, prefix slots first and then its ancestors by depth, and only its own
//          Hq/Hkv rows of the matrix have weights. So row r of a tree and plain decoding behind the same path run the same instructions
//          on the same values in the same order; the rest of each instruction is other rows and exact zeros. Chunks end at multiples of
//          `chunk` positions, which the size of the cache decides alone. That an instruction's row depends on nothing else is the chip's to
//          keep: tests/gates/test_row_invariant.py asks. A row's softmax reference moves once a block, by its own keys alone, so even
//          weights that underflow are the same.
// Tiling   as attention.cu: a warp has 16 packed rows; shared blocks pass in tiles of kKeys through a ring of two stages, which the warps
//          then divide among themselves for 16 keys and values of one tree row at a time.
// Traffic  as attention.cu, and 4 D bytes for each key of a row's own blocks: depth / 16 + 2 of them.
#include "cuda/attention_mma.cuh"

namespace ramify::gpu {
namespace {

constexpr int kBlock = 16;  // positions that one instruction adds

template <class S>
RT_FN void add_block(Rows<S>& rows, const typename S::Type* staged, const typename S::Type* keys, const typename S::Type* values,
                     const uint64_t (&seen)[2], float scale) {
  float s[kBlock / 8][4];
  scores<S, kBlock>(rows, staged, keys, scale, s);
  softmax<S, kBlock>(rows, seen, s);
  add_values<S, kBlock>(rows, s, values);
}

// The tail row that stands `rank` places behind the prefix on the path of `row`; -1 where its words do not say.
RT_FN int on_path(const AttentionArgs& a, const Item& it, int row, int rank) {
  const int64_t* const words = a.ancestors + (it.b * a.T + row) * a.words;
  for (int w = 0; w <= row / 64; ++w) {
    unsigned long long word = static_cast<unsigned long long>(words[w]);
    const int here = __popcll(word);
    if (rank >= here) {
      rank -= here;
      continue;
    }
    while (rank-- > 0) word &= word - 1;
    const int found = w * 64 + __ffsll(static_cast<long long>(word)) - 1;
    return found < it.tail ? found : -1;
  }
  return -1;
}

// Bit i: a row at `position` sees position 16 * block + i.
RT_FN uint64_t sees(const AttentionArgs& a, int position, int block) {
  const int first = block * kBlock;
  uint64_t seen = ~above(min(kBlock, position + 1 - first));
  if (a.window > 0) {
    const int low = int(max(int64_t(0), position - a.window + 1)), sink = int(min(a.sink, int64_t(position) + 1));
    seen &= above(low - first) | ~above(sink - first);
  }
  return seen;
}

// The 16 keys and values of a block as one tree row sees them, by position; zeros for those it does not see. One warp's work.
template <class S>
RT_FN void gather(const AttentionArgs& a, const Item& it, int row, int block, uint64_t seen, bool words, typename S::Type* keys,
                  typename S::Type* values) {
  using T = typename S::Type;
  constexpr int kPieces = S::D / 8;
  const int lane = threadIdx.x % 32, position = block * kBlock + lane % kBlock;
  const int mine = position < it.slots ? position : on_path(a, it, row, position - it.slots);
  for (int n = lane; n < kBlock * kPieces; n += 32) {
    const int i = n / kPieces, d = n % kPieces * 8, at = __shfl_sync(rt::kAll, mine, i);
    Tiling where{};
    where.keys = kBlock, where.slots = block * kBlock + i < it.slots ? INT32_MAX : 0;
    const bool there = (seen >> i & 1) && at >= 0;
    const Source<T> from = there ? source<T>(a, it, where, 0, at) : Source<T>{nullptr, nullptr};
    T *const k = keys + i * S::kPitch + d, *const v = values + i * S::kPitch + d;
    if (words) {
      rt::cp16(k, from.k ? from.k + d : static_cast<const T*>(a.k), from.k ? 16 : 0);
      rt::cp16(v, from.k ? from.v + d : static_cast<const T*>(a.v), from.k ? 16 : 0);
    } else {
      for (int e = 0; e < 8; ++e) {
        k[e] = from.k ? from.k[d + e] : from_float<T>(0.f);
        v[e] = from.k ? from.v[d + e] : from_float<T>(0.f);
      }
    }
  }
  rt::cp_commit();
  rt::cp_wait<0>();
  __syncwarp();
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 2) invariant_kernel(const AttentionArgs a) {
  using T = typename S::Type;
  RT_DYN(T, ring);  // as in attention_kernel
  T* const staged = ring + S::kStages * 2 * S::kKeys * S::kPitch;
  static_assert(S::kStages * S::kKeys >= S::kThreads / 32 * kBlock, "the ring holds a block of every warp");
  const auto keys = [&](int stage) { return ring + stage * 2 * S::kKeys * S::kPitch; };
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
  const bool words = in_words<T>(a);
  const float scale = float(a.scale) * kLog2e;
  for (int64_t index = blockIdx.x;; index += gridDim.x) {
    Item it;
    if (!item_at(a, index, it)) return;
    __syncthreads();  // the item before is done with shared memory
    Rows<S> rows;
    rows.m[0] = rows.m[1] = kNothing, rows.l[0] = rows.l[1] = 0;
#pragma unroll
    for (int n = 0; n < S::D / 8; ++n) rows.o[n][0] = rows.o[n][1] = rows.o[n][2] = rows.o[n][3] = 0;
    load_queries<S>(a, it, rows, staged);
    __syncthreads();
    const int shared = it.slots / kBlock * kBlock;  // positions of whole blocks of the prefix
    Tiling tiles = tiling(a, it, S::kKeys);
    tiles.end = min(tiles.end, shared);
    tiles.slots = tiles.count = it.live(0) ? max(0, (tiles.end - tiles.begin + S::kKeys - 1) / S::kKeys) : 0;
    int tile = tiles.after(-1);
    if (tile < tiles.count) fetch<S>(a, it, tiles, tile, words, keys(0), keys(0) + S::kKeys * S::kPitch);
    rt::cp_commit();
    for (int stage = 0; tile < tiles.count; stage ^= 1) {
      const int ahead = tiles.after(tile);
      if (ahead < tiles.count) fetch<S>(a, it, tiles, ahead, words, keys(stage ^ 1), keys(stage ^ 1) + S::kKeys * S::kPitch);
      rt::cp_commit();
      rt::cp_wait<1>();
      __syncthreads();
      if (warp * 16 < it.rows) {
        const uint64_t first = visible(a, it, tiles, tile, warp * 16 + g), second = visible(a, it, tiles, tile, warp * 16 + g + 8);
        for (int k = 0; k < S::kKeys; k += kBlock) {
          const uint64_t seen[2] = {first >> k & 0xFFFF, second >> k & 0xFFFF};
          if (!__any_sync(rt::kAll, (seen[0] | seen[1]) != 0)) continue;
          const T* const at = keys(stage) + k * S::kPitch;
          add_block<S>(rows, staged, at, at + S::kKeys * S::kPitch, seen, scale);
        }
      }
      __syncthreads();  // or the next copy would overwrite what a warp still reads
      tile = ahead;
    }
    rt::cp_wait<0>();
    const int begin = int(max(it.chunk * a.chunk, int64_t(shared))), end = int(min((it.chunk + 1) * a.chunk, int64_t(INT32_MAX)));
    const int from = it.first + warp * 16, to = min(min(from + 16, it.first + it.rows), it.used * it.group);
    T *const own_keys = ring + warp * 2 * kBlock * S::kPitch, *const own_values = own_keys + kBlock * S::kPitch;
    for (int row = from / it.group; row * it.group < to; ++row) {
      const int position = it.slots + depth_of(a, it, row);
      for (int block = begin / kBlock; block * kBlock <= position && block * kBlock < end; ++block) {
        const uint64_t bits = sees(a, position, block);
        if (bits == 0) continue;
        __syncwarp();  // the block before is read
        gather<S>(a, it, row, block, bits, words, own_keys, own_values);
        uint64_t seen[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = warp * 16 + g + 8 * half;
          seen[half] = r < it.rows && it.live(r) && it.row(r) == row ? bits : 0;
        }
        add_block<S>(rows, staged, own_keys, own_values, seen, scale);
      }
    }
    finish<S>(a, it, rows);
  }
}

struct InvariantKernel {
  template <class S>
  static constexpr auto of = invariant_kernel<S>;
};

}  // namespace

int attention_invariant(const AttentionArgs& a, void* stream) { return start_mma<InvariantKernel>(a, cudaStream_t(stream)); }

}  // namespace ramify::gpu
