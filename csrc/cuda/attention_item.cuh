// csrc/cuda/attention_item.cuh: what an attention block works on: its item, the tiles of it, which slots a row sees, addresses.
#pragma once
#include <string.h>

#include "cuda/entries.h"
#include "cuda/values.cuh"

namespace ramify::gpu {
namespace {

constexpr float kNothing = -3.40282347e38f;  // the softmax reference of a row that has seen no key yet: the lowest number
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

template <class T, int D_>
struct Shape {
  using Type = T;
  static constexpr int D = D_, kThreads = 128, kKeys = D > 128 ? 32 : 64, kStages = 2;
  static constexpr int kPitch = D + 8;  // an odd number of 16-byte words: ldmatrix meets no bank twice
  static constexpr bool kHoldQ = D <= 128;
  static constexpr int kBytes = 2 * (kStages * 2 * kKeys + (kHoldQ ? 0 : kRowBlock)) * kPitch;
  static_assert(D % 16 == 0 && kRowBlock == 16 * kThreads / 32, "a warp owns 16 rows");
  static_assert(kBytes <= 99 * 1024, "sm_86, sm_89 and sm_120 have no more");
};

// 2^x for a whole x at most 127; 0 below the normal numbers, and of NaN.
RT_FN float power2(float x) { return x >= -126.f ? __int_as_float((int(x) + 127) << 23) : 0.f; }

struct Item {
  int b, h, block, chunk, chunks;
  int slots, tail, used, group;  // keys in slots and in the tail, query rows in use, query heads of a KV head
  int first, rows;               // packed rows [first, first + rows)
  RT_FN bool live(int r) const { return first + r < used * group; }
  RT_FN int row(int r) const { return (first + r) / group; }
};

// Packed rows of one block, all but the chunk; false beyond the end.
RT_FN bool row_item(const AttentionArgs& a, int b, int h, int block, Item& it) {
  const int slots = int(a.page_table ? a.table_width * a.page : a.page), T = int(a.T);
  it.b = b, it.h = h, it.block = block, it.chunk = 0, it.group = int(a.Hq / a.Hkv);
  it.slots = a.start ? slots : min(max(a.prefix_len[b], 0), slots);
  it.used = a.tail_rows ? min(max(a.tail_rows[b], 0), T) : T;
  it.tail = a.start ? 0 : it.used;
  it.chunks = max(1, int((it.slots + a.chunk - 1) / a.chunk));
  it.first = block * kRowBlock;
  it.rows = min(T * it.group - it.first, kRowBlock);
  return it.rows > 0;
}

// The item of this number; false behind the last one. Rows of one sequence and head stand together, chunk by chunk.
RT_FN bool item_at(const AttentionArgs& a, int64_t index, Item& it) {
  const int64_t blocks = (a.T * (a.Hq / a.Hkv) + kRowBlock - 1) / kRowBlock;
  for (int b = 0; b < a.B; ++b) {
    row_item(a, b, 0, 0, it);
    const int64_t items = a.Hkv * blocks * it.chunks;
    if (index < items) {
      const int chunk = int(index / blocks % it.chunks);
      row_item(a, b, int(index / blocks / it.chunks), int(index % blocks), it);
      it.chunk = chunk;
      return true;
    }
    index -= items;
  }
  return false;
}

RT_FN int depth_of(const AttentionArgs& a, const Item& it, int row) {
  const int64_t* const words = a.ancestors + (it.b * a.T + row) * a.words;
  int seen = 0;
  for (int w = 0; w <= row / 64; ++w) seen += __popcll(static_cast<unsigned long long>(words[w]));
  return seen - 1;
}

// The slots [low, high) that a query row sees; under a window those below `sink` as well.
struct Span {
  int low, high;
};

RT_FN Span span_of(const AttentionArgs& a, const Item& it, int row) {
  if (a.start) return {max(a.start[it.b * a.T + row], 0), min(a.end[it.b * a.T + row], it.slots)};
  return {a.window > 0 ? max(0, it.slots + depth_of(a, it, row) - int(a.window) + 1) : 0, it.slots};
}

// The tiles of an item: those of its slots, then, in the last chunk, those of the tail. They begin at multiples of `keys`.
struct Tiling {
  int keys, begin, end, slots, count, lowest, sink;
  RT_FN bool wanted(int tile) const {  // tiles that lie before every row's window and behind the sink are never fetched
    const int slot = begin + tile * keys;
    return tile >= slots || slot + keys > lowest || slot < sink;
  }
  RT_FN int after(int tile) const {
    do ++tile;
    while (tile < count && !wanted(tile));
    return tile;
  }
};

// Every lane of a warp asks for the same tiling.
RT_FN Tiling tiling(const AttentionArgs& a, const Item& it, int keys) {
  int lowest = 0, highest = it.slots;
  if (a.start || a.window > 0) {
    lowest = it.slots, highest = 0;
    for (int r = threadIdx.x % 32; r < it.rows && it.live(r); r += 32) {
      const Span span = span_of(a, it, it.row(r));
      if (span.low < span.high) lowest = min(lowest, span.low), highest = max(highest, span.high);
    }
    lowest = int(__reduce_min_sync(rt::kAll, unsigned(lowest)));
    highest = int(__reduce_max_sync(rt::kAll, unsigned(highest)));
    if (!a.start) highest = it.slots;  // a window that lies behind the slots leaves the sink
  }
  Tiling t;
  t.keys = keys, t.lowest = lowest;
  t.sink = a.window > 0 ? int(min(a.sink, int64_t(it.slots))) : 0;
  t.begin = int(it.chunk * a.chunk), t.end = min(highest, t.begin + int(a.chunk));
  if (a.start) t.begin = lowest / keys * keys;
  t.slots = max(0, (t.end - t.begin + keys - 1) / keys);
  t.count = t.slots + (it.chunk == it.chunks - 1 ? (it.tail + keys - 1) / keys : 0);
  if (!it.live(0)) t.count = 0;
  return t;
}

// Bits at or above n.
RT_FN uint64_t above(int n) { return n <= 0 ? ~uint64_t(0) : n >= 64 ? 0 : ~uint64_t(0) << n; }

// Bit j: the packed row r of the item sees key j of the tile.
RT_FN uint64_t visible(const AttentionArgs& a, const Item& it, const Tiling& t, int tile, int r) {
  if (r >= it.rows || !it.live(r)) return 0;
  const int row = it.row(r);
  const bool bounded = a.start || a.window > 0;
  const Span span = bounded ? span_of(a, it, row) : Span{0, it.slots};
  if (tile < t.slots) {
    const int slot = t.begin + tile * t.keys;
    uint64_t seen = ~above(min(t.keys, min(t.end, span.high) - slot));
    if (bounded) seen &= above(span.low - slot) | ~above(t.sink - slot);
    return seen;
  }
  const int j = (tile - t.slots) * t.keys, count = min(t.keys, it.tail - j);
  uint64_t seen = (uint64_t(a.ancestors[(it.b * a.T + row) * a.words + j / 64]) >> (j % 64)) & ~above(count);
  if (a.window > 0) {
    for (int i = 0; i < count; ++i) {
      const int position = it.slots + depth_of(a, it, j + i);
      if (position < span.low && position >= a.sink) seen &= ~(uint64_t(1) << i);
    }
  }
  return seen;
}

// Bit j: some row of the item sees key j of the tile; the others may hold anything. Every lane of a warp asks for the same tile.
RT_FN uint64_t wanted_keys(const AttentionArgs& a, const Item& it, const Tiling& t, int tile) {
  if (tile >= t.slots) return ~above(it.tail - (tile - t.slots) * t.keys);
  const int slot = t.begin + tile * t.keys, lane = threadIdx.x % 32;
  if (!a.start) return ~above(t.end - slot) & (above(t.lowest - slot) | ~above(t.sink - slot));
  const uint64_t seen = visible(a, it, t, tile, lane) | visible(a, it, t, tile, lane + 32);  // intervals may leave holes
  return uint64_t(__reduce_or_sync(rt::kAll, unsigned(seen >> 32))) << 32 | __reduce_or_sync(rt::kAll, unsigned(seen));
}

template <class T>
struct Source {
  const T *k, *v;  // null: a page that does not exist
};

// Where the key `row` of a tile lies.
template <class T>
RT_FN Source<T> source(const AttentionArgs& a, const Item& it, const Tiling& t, int tile, int row) {
  if (tile >= t.slots) {
    const int64_t j = (tile - t.slots) * t.keys + row;
    return {static_cast<const T*>(a.tail_k) + it.b * a.tail_k_stride_b + j * a.tail_k_stride_t + it.h * a.tail_k_stride_h,
            static_cast<const T*>(a.tail_v) + it.b * a.tail_v_stride_b + j * a.tail_v_stride_t + it.h * a.tail_v_stride_h};
  }
  int64_t slot = t.begin + tile * t.keys + row, place = it.b;
  if (a.page_table) {
    place = a.page_table[it.b * a.table_stride + slot / a.page], slot %= a.page;
    if (place < 0 || place >= a.pages) return {nullptr, nullptr};
  }
  return {static_cast<const T*>(a.k) + place * a.k_stride_b + slot * a.k_stride_s + it.h * a.k_stride_h,
          static_cast<const T*>(a.v) + place * a.v_stride_b + slot * a.v_stride_s + it.h * a.v_stride_h};
}

template <class T>
RT_FN const T* query(const AttentionArgs& a, const Item& it, int r) {
  const int row = it.row(r), head = it.h * it.group + (it.first + r) % it.group;
  return static_cast<const T*>(a.q) + it.b * a.q_stride_b + row * a.q_stride_t + head * a.q_stride_h;
}
template <class T>
RT_FN T* output(const AttentionArgs& a, const Item& it, int r) {
  const int row = it.row(r), head = it.h * it.group + (it.first + r) % it.group;
  return static_cast<T*>(a.out) + it.b * a.out_stride_b + row * a.out_stride_t + head * a.out_stride_h;
}
RT_FN float* lse_at(const AttentionArgs& a, const Item& it, int r) {
  const int row = it.row(r), head = it.h * it.group + (it.first + r) % it.group;
  return a.lse + it.b * a.lse_stride_b + row * a.lse_stride_t + head;
}

// A chunk's part: for each of kRowBlock rows D outputs, the reference and the sum.
RT_FN float* part_at(const AttentionArgs& a, const Item& it, int chunk) {
  const int64_t slots = a.page_table ? a.table_width * a.page : a.page, chunks = (slots + a.chunk - 1) / a.chunk;
  const int64_t blocks = (a.T * (a.Hq / a.Hkv) + kRowBlock - 1) / kRowBlock;
  const int64_t part = ((it.b * a.Hkv + it.h) * blocks + it.block) * (chunks > 1 ? chunks : 1) + chunk;
  return static_cast<float*>(a.scratch) + part * kRowBlock * (a.D + 2);
}

// Whether every row of keys and values can be copied in 16-byte words.
template <class T>
RT_ANY_FN bool in_words(const AttentionArgs& a) {
  const auto fits = [](const void* p, int64_t x, int64_t y, int64_t z) {
    return (reinterpret_cast<uintptr_t>(p) | uint64_t(x | y | z) * sizeof(T)) % 16 == 0;
  };
  return fits(a.k, a.k_stride_b, a.k_stride_s, a.k_stride_h) && fits(a.v, a.v_stride_b, a.v_stride_s, a.v_stride_h) &&
         fits(a.tail_k, a.tail_k_stride_b, a.tail_k_stride_t, a.tail_k_stride_h) &&
         fits(a.tail_v, a.tail_v_stride_b, a.tail_v_stride_t, a.tail_v_stride_h);
}

}  // namespace
}  // namespace ramify::gpu
