// csrc/cpu/colsum.cpp: how much attention each slot received. Meaning: reference/attention.py (attention_colsum).
//
// What     c[b, h, s] = sum over rows, and the query heads of group h, of exp(scale q k - lse), for the committed slots a row sees.
// Tiling   a work item is (sequence, KV head, tile of 64 slots), slots in the lanes; it walks the T * Hq/Hkv packed rows in order, so a
//          slot's sum is one chain of additions and nothing is shared between threads.
// Traffic  D * sizeof(k) bytes a slot, once; the rows again for every tile, from the cache.
#include "cpu/gemm.h"
#include "cpu/softmax.h"

namespace ramify::RAMIFY_ISA {
namespace {

struct Work {
  float *q, *s, *shift, *sum;
  void* keys;
  static int64_t bytes(int64_t D) { return 4 * (kRowBlock * D + kRowBlock * kTile + kRowBlock + kTile + kTile * D) + 64; }
  Work(char* base, int64_t D) {
    q = reinterpret_cast<float*>(base);
    s = q + kRowBlock * D, shift = s + kRowBlock * kTile, sum = shift + kRowBlock, keys = sum + kTile;
  }
};

template <class T>
struct Columns {
  static constexpr bool kPairs = sizeof(T) == 2;
  const ColsumArgs& a;
  const Work& w;
  const T* rows_of_keys[kTile];

  void gather(int64_t b, int64_t h, int64_t slot, int count) {
    for (int i = 0; i < kTile; ++i) {
      const int64_t s = slot + (i < count ? i : count - 1);
      const int64_t page = a.page_table ? a.page_table[b * a.table_stride + s / a.page] : b, in = a.page_table ? s % a.page : s;
      rows_of_keys[i] = static_cast<const T*>(a.k) + page * a.k_stride_b + in * a.k_stride_s + h * a.k_stride_h;
    }
    transpose(reinterpret_cast<const uint32_t* const*>(rows_of_keys), a.D * int64_t(sizeof(T)) / 4, static_cast<uint32_t*>(w.keys));
  }

  // Packed rows [first, first + rows) of KV head h, times scale * log2(e), and what their scores are lowered by.
  void pack(int64_t b, int64_t h, int64_t first, int rows) {
    const int64_t g = a.Hq / a.Hkv;
    const float scale = float(a.scale) * kLog2e;
    for (int m = 0; m < rows; ++m) {
      const int64_t t = (first + m) / g, head = h * g + (first + m) % g, at = b * a.q_stride_b + t * a.q_stride_t + head * a.q_stride_h;
      const float* f = static_cast<const float*>(a.q) + at;
      const bf16* half = static_cast<const bf16*>(a.q) + at;
      float* const out = w.q + m / kRows * kRows * a.D + m % kRows;
      const int together = rows - m / kRows * kRows < kRows ? rows - m / kRows * kRows : kRows;
      for (int64_t d = 0; d < a.D; ++d) out[d * together] = (a.q_dtype == kF32 ? f[d] : widen(half[d])) * scale;
      w.shift[m] = a.lse[b * a.lse_stride_b + t * a.lse_stride_t + head] * kLog2e;
    }
  }

  template <int M>
  RAMIFY_INLINE void scores(const float* q, int count, float* s) {
    constexpr int kWide = tile_vectors(M) < kTile / L ? tile_vectors(M) : kTile / L;
    for (int64_t col = 0; col < count; col += kWide * L) {
      Vec acc[M][kWide];
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < kWide; ++n) acc[m][n] = Vec::set(0.f);
      const T* const keys = static_cast<const T*>(w.keys) + col / kPanel * kPanel * a.D + col % kPanel * (kPairs ? 2 : 1);
      if constexpr (kPairs)
        multiply<M, 1>(acc, q, Bf16Panels{keys, kPanel * a.D}, a.D);
      else
        multiply<M, 1>(acc, q, F32Panels{keys, kPanel * a.D}, a.D);
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < kWide; ++n) acc[m][n].store(s + m * kTile + col + n * L);
    }
  }

  // The slots of the tile that a row sees.
  uint64_t seen(int64_t b, int64_t t, int64_t slot, int count) const {
    uint64_t bits = ~above(count);
    if (a.window > 0) bits &= above(a.prefix_len[b] + a.depth[b * a.T + t] - a.window + 1 - slot) | ~above(a.sink - slot);
    return bits;
  }

  void tile(int64_t b, int64_t h, int64_t slot, int count) {
    const int64_t g = a.Hq / a.Hkv, all = (a.tail_rows ? a.tail_rows[b] : a.T) * g;
    for (int j = 0; j < kTile; ++j) w.sum[j] = 0.f;
    bool gathered = false;
    for (int64_t first = 0; first < all; first += kRowBlock) {
      const int rows = int(all - first < kRowBlock ? all - first : kRowBlock);
      uint64_t any = 0;
      for (int m = 0; m < rows; ++m) any |= seen(b, (first + m) / g, slot, count);
      if (any == 0) continue;
      if (!gathered) gather(b, h, slot, count), gathered = true;
      pack(b, h, first, rows);
      for (int from = 0; from < rows; from += kRows) {
        const int part = rows - from < kRows ? rows - from : kRows;
        with_rows(part, [&]<int M>() { scores<M>(w.q + from * a.D, count, w.s + from * kTile); });
      }
      for (int m = 0; m < rows; ++m) {
        const uint64_t bits = seen(b, (first + m) / g, slot, count);
        if (bits && w.shift[m] != -__builtin_inff()) add(w.s + m * kTile, w.shift[m], bits);
      }
    }
  }

  // One row's weights. A score that is NaN or infinite is a weight that is NaN, and so is every one of a row whose lse is.
  RAMIFY_INLINE void add(const float* s, float shift, uint64_t bits) {
    const Vec none = Vec::set(0.f), most = Vec::set(-128.f);
    for (int j = 0; j < kTile; j += L) {
      const Vec x = Vec::load(s + j) - Vec::set(shift), low = none - max(most, none - x), i = floor(low);  // 2^128 is infinity
      const Vec weight = exp2_fraction(low - i) * power2(i) + (x - x);                                     // what is not finite stays so
      (Vec::load(w.sum + j) + select(uint32_t(bits >> j), weight, none)).store(w.sum + j);
    }
  }
};

template <class T>
void run(const ColsumArgs& a, Team& team) {
  const Work w(static_cast<char*>(a.scratch) + team.id * Work::bytes(a.D), a.D);
  Columns<T> work{a, w, {}};
  const int64_t tiles = (a.slots + kTile - 1) / kTile;
  for (int64_t next = take(team); next < a.B * a.Hkv * tiles; next = take(team)) {
    const int64_t b = next / tiles / a.Hkv, h = next / tiles % a.Hkv, slot = next % tiles * kTile;
    const int64_t n = a.prefix_len[b], wide = a.slots - slot < kTile ? a.slots - slot : kTile;
    const int count = int(n - slot < 0 ? 0 : n - slot < kTile ? n - slot : kTile);
    float* const out = a.out + b * a.out_stride_b + h * a.out_stride_h + slot;
    if (count > 0) work.tile(b, h, slot, count);
    for (int64_t j = 0; j < wide; ++j) out[j] = j < count ? w.sum[j] : 0.f;
  }
}

void colsum(const void* p, Team& team) {
  const ColsumArgs& a = *static_cast<const ColsumArgs*>(p);
  a.kv_dtype == kF32 ? run<float>(a, team) : run<bf16>(a, team);
}

int64_t colsum_scratch(const void* p, int threads) { return threads * Work::bytes(static_cast<const ColsumArgs*>(p)->D); }

}  // namespace

extern const KernelRow colsum_kernels[];
const KernelRow colsum_kernels[] = {{kColsum, colsum, colsum_scratch}, {-1, nullptr, nullptr}};

}  // namespace ramify::RAMIFY_ISA
