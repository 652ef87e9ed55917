// csrc/cuda/attention_wgmma.cuh: what the two sm_90a attention kernels share: a ring of key and value tiles, and the warpgroup that fills
// it.
//
// Tile     64 keys, in panels of 64 features: a key is a row of 128 bytes, swizzled. The same bytes serve wgmma with keys along k (values)
//          and with features along k (keys). Features that a head does not have (D 96) are zero.
// Copies   cp.async of 16 bytes with swizzled targets: a bulk copy of a row keeps it in one piece, which no wgmma layout does, and a tensor
//          map, which could swizzle, is made by the host for one address and one page geometry. A lane works out the addresses of one key,
//          once a tile, and the warp shuffles them.
// Barriers full[stage] counts the producers' threads, each when its copies have landed; empty[stage] one lane of every consumer warp,
// once
//          its products are over. Consumers put the proxy fence behind the wait: cp.async writes as ordinary stores do.
#pragma once
#include "cuda/attention_item.cuh"
#include "cuda/rt_hopper.cuh"

namespace ramify::gpu {
namespace {

constexpr int kTileKeys = 64, kPanel = kTileKeys * 128;  // bytes of a panel
constexpr int kMostStages = 4;

// Groups row blocks at a time, a warpgroup and Rows packed rows each; behind them come the warps that produce.
template <class T, int Panels_, int Rows_, int Groups_, int Producers_, int Stages_>
struct Wide {
  using Type = T;
  static constexpr int Panels = Panels_, Rows = Rows_, Groups = Groups_, Producers = Producers_, Stages = Stages_;
  static constexpr int kStage = 2 * Panels * kPanel;    // bytes: keys, then values
  static constexpr int kQueries = Panels * Rows * 128;  // of one group
  static_assert(Stages <= kMostStages);
};

struct Barriers {
  rt::Mbarrier full[kMostStages], empty[kMostStages];
};

// A stage and the parity of its phase; moves on by one tile.
template <int Stages>
struct Turn {
  int stage = 0;
  unsigned parity = 0;
  RT_FN void next() {
    if (++stage == Stages) stage = 0, parity ^= 1;
  }
};

// Packed rows `i` row blocks further on; without rows behind the last one.
RT_FN Item beside(const AttentionArgs& a, Item it, int i) {
  it.block += i, it.first += i * kRowBlock;
  it.rows = min(int(a.T) * it.group - it.first, kRowBlock);
  return it;
}

// The item of this number, if Groups row blocks count as one, or false: like item_at. The item is that of the first of them.
template <int Groups>
RT_FN bool group_at(const AttentionArgs& a, int64_t index, Item& it) {
  const int groups = (int(a.T) * int(a.Hq / a.Hkv) + Groups * kRowBlock - 1) / (Groups * kRowBlock);
  for (int b = 0; b < a.B; ++b) {
    row_item(a, b, 0, 0, it);
    const int here = int(a.Hkv) * groups * it.chunks;
    if (index < here) {
      const int i = int(index), chunk = i / groups % it.chunks;
      row_item(a, b, i / groups / it.chunks, i % groups * Groups, it);
      it.chunk = chunk;
      return true;
    }
    index -= here;
  }
  return false;
}

// Tiles that any of Groups row blocks wants. Every lane of a warp asks for the same.
template <int Groups>
RT_FN Tiling tiles_of(const AttentionArgs& a, const Item& it) {
  Tiling t = tiling(a, it, kTileKeys);
#pragma unroll
  for (int i = 1; i < Groups; ++i) {
    const Tiling u = tiling(a, beside(a, it, i), kTileKeys);
    if (u.count == 0) continue;
    const int tail = t.count ? t.count - t.slots : u.count - u.slots;
    t.begin = t.count ? min(t.begin, u.begin) : u.begin, t.end = t.count ? max(t.end, u.end) : u.end;
    t.lowest = min(t.lowest, u.lowest);
    t.slots = max(0, (t.end - t.begin + kTileKeys - 1) / kTileKeys), t.count = t.slots + tail;
  }
  return t;
}

template <class S>
RT_FN void init_barriers(Barriers& bars) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::Stages; ++i) rt::mbar_init(&bars.full[i], 32 * S::Producers), rt::mbar_init(&bars.empty[i], 4 * S::Groups);
    rt::fence_async();
  }
  __syncthreads();
}

// The producers: all tiles of all items of this block, stage by stage. A lane works out where one key lies, or two, before it waits.
template <class S>
RT_FN void produce(const AttentionArgs& a, Barriers& bars, unsigned char* ring) {
  using T = typename S::Type;
  constexpr int kPieces = 8 * S::Panels, kShares = kTileKeys / 32 / S::Producers;
  const int lane = threadIdx.x % 32, first = int(threadIdx.x - 128 * S::Groups) / 32 * 32;
  Turn<S::Stages> turn;
  Item it;
  for (int64_t index = blockIdx.x; group_at<S::Groups>(a, index, it); index += gridDim.x) {
    const Tiling tiles = tiles_of<S::Groups>(a, it);
    for (int tile = tiles.after(-1); tile < tiles.count; tile = tiles.after(tile)) {
      uint64_t wanted = 0;
#pragma unroll
      for (int i = 0; i < S::Groups; ++i) wanted |= wanted_keys(a, beside(a, it, i), tiles, tile);
      unsigned long long from_k[kShares], from_v[kShares];  // 0: zeros come instead
#pragma unroll
      for (int share = 0; share < kShares; ++share) {
        const int key = first + 32 * share + lane;
        Source<T> from = {nullptr, nullptr};
        if (wanted >> key & 1) from = source<T>(a, it, tiles, tile, key);
        from_k[share] = reinterpret_cast<uintptr_t>(from.k), from_v[share] = reinterpret_cast<uintptr_t>(from.v);
      }
      rt::mbar_wait(&bars.empty[turn.stage], turn.parity ^ 1);
      unsigned char* const keys = ring + turn.stage * S::kStage;
#pragma unroll
      for (int share = 0; share < kShares; ++share)
#pragma unroll 2
        for (int n = lane; n < 32 * kPieces; n += 32) {
          const int row = n / kPieces, piece = n % kPieces;  // the words of a key by neighbouring lanes
          const auto k = __shfl_sync(rt::kAll, from_k[share], row), v = __shfl_sync(rt::kAll, from_v[share], row);
          const bool has = k && piece * 8 < a.D;
          const unsigned to = piece / 8 * kPanel + rt::swizzled((first + 32 * share + row) * 128 + piece % 8 * 16);
          rt::cp16(keys + to, has ? reinterpret_cast<const T*>(k) + piece * 8 : static_cast<const T*>(a.q), has ? 16 : 0);
          rt::cp16(keys + S::Panels * kPanel + to, has ? reinterpret_cast<const T*>(v) + piece * 8 : static_cast<const T*>(a.q),
                   has ? 16 : 0);
        }
      rt::mbar_arrive_copies(&bars.full[turn.stage]);
      turn.next();
    }
  }
  rt::cp_commit();
  rt::cp_wait<0>();  // no thread ends before what it copies has landed
}

// The queries of an item, as a tile: a packed row is a row of it. Called by 128 threads, of which this is the one of number `thread`.
template <class S>
RT_FN void load_queries(const AttentionArgs& a, const Item& it, unsigned char* to, int thread) {
  using T = typename S::Type;
  constexpr int kPieces = 8 * S::Panels;
  const bool words = wide(static_cast<const T*>(a.q), a.q_stride_b | a.q_stride_t | a.q_stride_h);
  for (int n = thread; n < S::Rows * kPieces; n += 128) {
    const int r = n / kPieces, piece = n % kPieces;
    Words<T> word;
    const T* const q = r < it.rows && piece * 8 < a.D ? query<T>(a, it, r) + piece * 8 : nullptr;
    if (q && words) {
      word = *reinterpret_cast<const Words<T>*>(q);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) word.value[i] = q ? q[i] : from_float<T>(0.f);
    }
    *reinterpret_cast<Words<T>*>(to + piece / 8 * S::Rows * 128 + rt::swizzled(r * 128 + piece % 8 * 16)) = word;
  }
}

// Whether some row of the item does not see some key of the tile.
RT_FN bool partly_seen(const AttentionArgs& a, const Tiling& t, int tile) {
  return tile >= t.slots || a.start || a.window > 0 || t.begin + (tile + 1) * t.keys > t.end;
}

}  // namespace
}  // namespace ramify::gpu
