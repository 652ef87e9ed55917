// csrc/cpu/attention.cpp: tree attention and interval attention. Meaning: reference/attention.py.
//
// What     softmax(scale q k^T) v of every query row over the committed slots of its sequence (no mask but the window) and
//          those rows of the step's tree that its ancestor words name; or over the slots of the row's own interval.
// Tiling   a work item is (sequence, KV head, kRowBlock packed rows of T * Hq/Hkv); it walks tiles of 64 slots: scores with
//          slots in the lanes, one softmax update a tile, values with the head dimension in the lanes (gemm.h for both).
// Pairs    where the chip adds pairs of bf16, a bf16 cache's values meet weights rounded to bf16, one chain over slots (gemm.h); sums of
//          weights, and so the log-sum-exp, take them as they are.
// Split    few items: also over chunks of 512 positions, each chunk summed from zero and joined in order. The order of
//          additions is the same either way, so the split never shows.
// Bits     row_invariance: weights are 2^(s - m) with an integral m, so rescaling is exact and tile borders leave no trace;
//          invisible slots add exact zeros; slots add up in order of position.
// Traffic  4 * D * sizeof(kv) bytes a slot and KV head, paid once for kRowBlock rows; 4 * D operations a slot and row.
#include "cpu/gemm.h"
#include "cpu/tiles.h"

namespace ramify::RAMIFY_ISA {
namespace {

// Group g of an item holds rows [g * kRows, ...): the unit of one product.
RAMIFY_INLINE int group_rows(const Item& it, int64_t first) { return int(it.rows - first < kRows ? it.rows - first : kRows); }

template <class T, bool kPlain>
struct Attention {
  static constexpr bool kPairs = sizeof(T) == 2;
  static constexpr bool kDot = RAMIFY_BF16_DOT && kPairs;
  const AttentionArgs& a;
  Buffers& w;
  const int64_t D;
  const float log2_scale = float(a.scale) * kLog2e;  // scores come out in log2 units
  Tiles<T, kPlain> tiles;

  Attention(const AttentionArgs& args, Buffers& buffers) : a(args), w(buffers), D(args.D), tiles(args, buffers) {}

  // q * scale * log2(e), packed group by group. Pairs of bf16 hold q itself: it may be bf16, and then nothing is rounded.
  void pack_queries(const Item& it) {
    const int64_t g = a.Hq / a.Hkv;
    for (int64_t first = 0; first < it.rows; first += kRows) {
      const int rows = group_rows(it, first);
      for (int m = 0; m < rows; ++m) {
        const int64_t r = it.first + first + m, t = r / g, head = it.h * g + r % g;
        const int64_t at =
            (a.row_start ? (a.row_start[it.b] + t) * a.q_stride_t : it.b * a.q_stride_b + t * a.q_stride_t) + head * a.q_stride_h;
        if (a.q_dtype == kF32)
          pack_row(static_cast<const float*>(a.q) + at, w.q + first * D, rows, m);
        else
          pack_row(static_cast<const bf16*>(a.q) + at, w.q + first * D, rows, m);
      }
    }
  }

  template <class X>
  void pack_row(const X* x, float* group, int rows, int m) {
    if constexpr (kDot) {
      float* const out = group + m;
      bf16 rounded[kMaxHead];
      narrow_row(x, rounded, D);
      for (int64_t d = 0; d < D; d += 2) __builtin_memcpy(out + (d >> 1) * rows, rounded + d, 4);
    } else {
      const auto value = [&](int64_t d) {
        if constexpr (sizeof(X) == 2) return widen(x[d]);
        if constexpr (sizeof(X) == 4) return x[d];
      };
      for (int64_t d = 0; d < D; ++d) group[d * rows + m] = value(d) * log2_scale;
    }
  }

  template <int M>
  RAMIFY_INLINE void scores(const float* q, const Tile<T>& tile, float* s) {
    constexpr int kWide = tile_vectors(M) < kTile / L ? tile_vectors(M) : kTile / L;
    for (int64_t col = 0; col < tile.count; col += kWide * L) {
      tiles.ask();
      Vec acc[M][kWide];
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < kWide; ++n) acc[m][n] = Vec::set(0.f);
      const int64_t at = col / kPanel * kPanel * D + col % kPanel * (kPairs ? 2 : 1);
      if constexpr (kDot) {
#if RAMIFY_BF16_DOT
        multiply_bf16<0>(acc, reinterpret_cast<const uint32_t*>(q), Bf16Panels{tile.keys + at, kPanel * D}, D / 2);
#endif
      } else if constexpr (kPairs) {
        multiply<M, 1>(acc, q, Bf16Panels{tile.keys + at, kPanel * D}, D);
      } else {
        multiply<M, 1>(acc, q, F32Panels{tile.keys + at, kPanel * D}, D);
      }
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < kWide; ++n) (kDot ? acc[m][n] * Vec::set(log2_scale) : acc[m][n]).store(s + m * kTile + col + n * L);
    }
  }

  // Scores of one row -> weights; moves the row's reference when a larger score arrives.
  RAMIFY_INLINE void softmax(float* s, int count, uint64_t word, const State& st, int64_t row) {
    word &= ~above(count);
    if (word == 0) {
      for (int j = 0; j < count; j += L) Vec::set(0.f).store(s + j);
      return;
    }
    const Vec nothing = Vec::set(kNothing);
    Vec top = nothing;
    if (word == ~uint64_t(0)) {
      for (int j = 0; j < kTile; j += L) top = max(top, Vec::load(s + j));
    } else {
      for (int j = 0; j < count; j += L) top = max(top, select(uint32_t(word >> j), Vec::load(s + j), nothing));
    }
    const float next = __builtin_floorf(hmax(top)) + 1.f;
    if (next > st.m[row]) {
      const Vec shrink = power2(Vec::set(st.m[row] - next));
      for (int64_t d = row * D; d < (row + 1) * D; d += L) (Vec::load(st.o + d) * shrink).store(st.o + d);
      st.l[row] *= power2_of(st.m[row] - next);
      st.m[row] = next;
    }
    const Vec m = Vec::set(st.m[row]);
    for (int j = 0; j < count; j += L) {
      const Vec x = Vec::load(s + j), i = floor(x);
      const Vec p = exp2_fraction(x - i) * power2(i - m);
      (word == ~uint64_t(0) ? p : select(uint32_t(word >> j), p, Vec::set(0.f))).store(s + j);
    }
  }

  template <int M, int N>
  RAMIFY_INLINE void values(const float* p, const Tile<T>& tile, float* o, int64_t column) {
    tiles.ask();
    Vec acc[M][N];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) acc[m][n] = Vec::load(o + m * D + column + n * L);
    if constexpr (kDot) {
#if RAMIFY_BF16_DOT
      multiply_slots<kTile>(acc, reinterpret_cast<const uint32_t*>(p), Bf16PairRows{tile.values + 2 * column, D}, tile.count);
#endif
    } else if constexpr (kPairs)
      multiply<1, kTile>(acc, p, Bf16PairRows{tile.values + 2 * column, D}, tile.count);
    else
      multiply<1, kTile>(acc, p, F32Rows{tile.values + column, D}, tile.count);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) acc[m][n].store(o + m * D + column + n * L);
  }

  // One tile for all rows of the item: every row's weights, then every row's values, so that one page at a time lies in L1.
  // words[r] names the slots that row r sees; null: all of them.
  void visit(const Item& it, const Tile<T>& tile, const uint64_t* words, const State& st) {
    each_group(it, words, [&]<int M>(int64_t first) {
      float* const s = w.s + first * kTile;
      scores<M>(w.q + first * D, tile, s);
      for (int m = 0; m < M; ++m) softmax(s + m * kTile, tile.count, words ? words[first + m] : ~uint64_t(0), st, first + m);
      float l[M];  // slots add up one by one: a row's sum must not depend on which lane a slot lies in
      for (int m = 0; m < M; ++m) l[m] = st.l[first + m];
      for (int k = 0; k < tile.count; ++k)
        for (int m = 0; m < M; ++m) l[m] += s[m * kTile + k];
      for (int m = 0; m < M; ++m) st.l[first + m] = l[m];
#if RAMIFY_BF16_DOT
      for (int m = 0; kDot && m < M; ++m) pair_slots(s + m * kTile, tile.count);
#endif
    });
    each_group(it, words, [&]<int M>(int64_t first) {
      constexpr int kWide = tile_vectors(M);
      int64_t d = 0;
      for (; d + kWide * L <= D; d += kWide * L) values<M, kWide>(w.s + first * kTile, tile, st.o + first * D, d);
      for (; d < D; d += 2 * L) values<M, 2>(w.s + first * kTile, tile, st.o + first * D, d);
    });
  }

  // Calls f<rows>(first) for every group of which some row sees something.
  template <class F>
  RAMIFY_INLINE void each_group(const Item& it, const uint64_t* words, F&& f) {
    for (int64_t first = 0; first < it.rows; first += kRows) {
      const int rows = group_rows(it, first);
      uint64_t any = words ? 0 : 1;
      for (int m = 0; words && m < rows; ++m) any |= words[first + m];
      if (any) with_rows(rows, [&]<int M>() { f.template operator()<M>(first); });
    }
  }

  // Positions [chunk * kChunk, ...) of one item, from zero.
  void run_chunk(const Item& it, int64_t chunk, const State& st) {
    const int64_t g = a.Hq / a.Hkv, begin = chunk * kChunk, end = begin + kChunk;
    reset(st, it.rows, D);
    int64_t starts[kRowBlock], ends[kRowBlock];  // the slots of the prefix that each row sees, but for the sink
    int64_t lowest = it.prefix, highest = 0, first_end = it.prefix, last_end = 0;
    for (int64_t r = 0; r < it.rows; ++r) {
      const int64_t row = it.query + (it.first + r) / g;
      if (a.start) {
        starts[r] = a.start[row], ends[r] = a.end[row];
      } else {
        const int64_t position = it.prefix + a.row_depth[row];
        starts[r] = a.window > 0 && position - a.window + 1 > 0 ? position - a.window + 1 : 0, ends[r] = it.prefix;
      }
      lowest = starts[r] < lowest ? starts[r] : lowest, highest = starts[r] > highest ? starts[r] : highest;
      first_end = ends[r] < first_end ? ends[r] : first_end, last_end = ends[r] > last_end ? ends[r] : last_end;
    }
    uint64_t words[kRowBlock];
    for (int64_t slot = begin; slot < end && slot < last_end; slot += kTile) {
      const int count = int(it.prefix - slot < kTile ? it.prefix - slot : kTile);
      if (slot + count <= lowest && slot >= a.sink) continue;
      const bool masked = slot < highest || slot + count > first_end;
      uint64_t used = masked ? 0 : ~uint64_t(0);
      for (int64_t r = 0; masked && r < it.rows; ++r) {
        words[r] = (above(starts[r] - slot) | ~above(a.sink - slot)) & ~above(ends[r] - slot);
        used |= words[r];
      }
      if (used == 0) continue;
      const Tile<T> tile = tiles.prefix(it, slot, count, used);
      tiles.expect(it, slot + kTile, kRows);
      visit(it, tile, masked ? words : nullptr, st);
    }
    if (a.start) return;
    const int32_t* depth = a.tail_depth + it.tail;
    for (int64_t first = 0; first < a.tail_len[it.b]; first += kTile) {
      const int count = int(a.tail_len[it.b] - first < kTile ? a.tail_len[it.b] - first : kTile);
      uint64_t inside = 0, any = 0;
      for (int j = 0; j < count; ++j) {
        const int64_t position = it.prefix + depth[first + j];
        inside |= uint64_t(position >= begin && position < end) << j;
      }
      if (inside == 0) continue;
      for (int64_t r = 0; r < it.rows; ++r) {
        const int64_t row = it.query + (it.first + r) / g;
        words[r] = uint64_t(a.ancestors[row * a.words + first / kTile]) & inside;
        if (a.window > 0) {
          for (int j = 0; j < count; ++j) {
            const int64_t position = it.prefix + depth[first + j];
            if (position < starts[r] && position >= a.sink) words[r] &= ~(uint64_t(1) << j);
          }
        }
        any |= words[r];
      }
      if (any) visit(it, tiles.tail(it, first, count), words, st);
    }
  }

  void finish(const Item& it, const State& st) {
    const int64_t g = a.Hq / a.Hkv;
    for (int64_t r = 0; r < it.rows; ++r) {
      const int64_t t = (it.first + r) / g, head = it.h * g + (it.first + r) % g;
      const int64_t row = a.row_start ? a.row_start[it.b] + t : t, b = a.row_start ? 0 : it.b;
      const int64_t at = b * a.out_stride_b + row * a.out_stride_t + head * a.out_stride_h;
      const bool seen = st.l[r] != 0.f;
      const Vec l = Vec::set(seen ? st.l[r] : 1.f);
      for (int64_t d = 0; d < D; d += L) {
        const Vec o = Vec::load(st.o + r * D + d) / l;
        if (a.q_dtype == kF32)
          store_part(static_cast<float*>(a.out) + at + d, o, L);
        else
          store_part(static_cast<bf16*>(a.out) + at + d, o, L);
      }
      if (a.lse) a.lse[b * a.lse_stride_b + row * a.lse_stride_t + head] = seen ? st.m[r] * kLn2 + log_of(st.l[r]) : -__builtin_inff();
    }
  }
};

int64_t rows_of(const AttentionArgs& a, int64_t b) {
  if (a.start) return a.T;
  if (a.row_start) return a.row_start[b + 1] - a.row_start[b];
  return a.T < a.tail_len[b] ? a.T : a.tail_len[b];
}

int64_t blocks_of(const AttentionArgs& a, int64_t b) { return (rows_of(a, b) * (a.Hq / a.Hkv) + kRowBlock - 1) / kRowBlock; }

Item item_at(const AttentionArgs& a, int64_t index) {
  int64_t b = 0;
  for (; index >= a.Hkv * blocks_of(a, b); ++b) index -= a.Hkv * blocks_of(a, b);
  const int64_t blocks = blocks_of(a, b), first = index % blocks * kRowBlock, left = rows_of(a, b) * (a.Hq / a.Hkv) - first;
  const int64_t query = a.row_start ? a.row_start[b] : b * a.T, tail = a.start ? 0 : a.tail_offset[b];
  return {b, index / blocks, first, left < kRowBlock ? left : kRowBlock, query, tail, a.prefix_len[b]};
}

int64_t chunks_of(const AttentionArgs& a, int64_t b) {
  int64_t last = a.prefix_len[b];
  for (int64_t j = 0; !a.start && j < a.tail_len[b]; ++j) {
    const int64_t position = a.prefix_len[b] + a.tail_depth[a.tail_offset[b] + j] + 1;
    last = position > last ? position : last;
  }
  return (last + kChunk - 1) / kChunk;
}

// Most rows of an item: what a chunk's part has room for.
int64_t block_rows(const AttentionArgs& a) { return a.T * (a.Hq / a.Hkv) < kRowBlock ? a.T * (a.Hq / a.Hkv) : kRowBlock; }

template <class T, bool kPlain>
void run(const AttentionArgs& a, Team& team) {
  char* const base = static_cast<char*>(a.scratch);
  Buffers w(base + team.id * Buffers::bytes(a.D), a.D);
  float* const pieces = reinterpret_cast<float*>(base + team.size * Buffers::bytes(a.D));
  Attention<T, kPlain> work{a, w};
  const int64_t rows = block_rows(a), part = Buffers::state_floats(a.D, rows);
  int64_t items = 0, chunks = 0;
  for (int64_t b = 0; b < a.B; ++b) {
    items += a.Hkv * blocks_of(a, b);
    const int64_t n = chunks_of(a, b);
    chunks = n > chunks ? n : chunks;
  }
  const bool split = chunks > 1 && items < 2 * team.size;
  for (int64_t next = take(team); next < (split ? items * chunks : items); next = take(team)) {
    const Item it = item_at(a, split ? next / chunks : next);
    work.pack_queries(it);
    if (split) {
      work.run_chunk(it, next % chunks, Buffers::state_at(pieces + next * part, rows));
      continue;
    }
    work.run_chunk(it, 0, w.total);
    for (int64_t c = 1; c < chunks_of(a, it.b); ++c) {
      work.run_chunk(it, c, w.chunk);
      join(w.total, w.chunk, it.rows, a.D);
    }
    work.finish(it, w.total);
  }
  if (!split) return;
  wait(team);
  for (int64_t next = take(team); next < items; next = take(team)) {
    const Item it = item_at(a, next);
    const State total = Buffers::state_at(pieces + next * chunks * part, rows);
    for (int64_t c = 1; c < chunks; ++c) join(total, Buffers::state_at(pieces + (next * chunks + c) * part, rows), it.rows, a.D);
    work.finish(it, total);
  }
}

void attention(const void* p, Team& team) {
  const AttentionArgs& a = *static_cast<const AttentionArgs*>(p);
  if (a.kv_dtype == kF32)
    a.plain ? run<float, true>(a, team) : run<float, false>(a, team);
  else
    a.plain ? run<bf16, true>(a, team) : run<bf16, false>(a, team);
}

int64_t attention_scratch(const void* p, int threads) {
  const AttentionArgs& a = *static_cast<const AttentionArgs*>(p);
  const int64_t chunks = (a.max_slots + kChunk - 1) / kChunk;
  return threads * Buffers::bytes(a.D) + (chunks > 1 ? 2 * threads * chunks * Buffers::state_floats(a.D, block_rows(a)) * 4 : 0);
}

}  // namespace

extern const KernelRow attention_kernels[];
const KernelRow attention_kernels[] = {{kAttention, attention, attention_scratch}, {-1, nullptr, nullptr}};

}  // namespace ramify::RAMIFY_ISA
