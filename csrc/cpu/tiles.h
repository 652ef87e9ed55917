// csrc/cpu/tiles.h: the slots of an attention item, 64 at a time, as a page of keys and one of values.
//
// What     of our own caches the pages themselves; of a user's tensors (kPlain) rows that lie anywhere, gathered into a page.
// Traffic  the next tile is asked for while this one is used, into L2: rows lie a stride apart or pages anywhere, which no
//          prefetcher of the chip foresees.
#pragma once
#include "cpu/softmax.h"

namespace ramify::RAMIFY_ISA {
namespace {

struct Item {
  int64_t b, h, first, rows;  // packed rows [first, first + rows) of KV head h
  int64_t query, tail;        // where the sequence's rows begin in ancestors / row_depth, and in tail_depth
  int64_t prefix;
};

template <class T>
struct Tile {  // 64 slots, `count` of them live
  const T *keys, *values;
  int count;
};

template <class T, bool kPlain>
class Tiles {
 public:
  Tiles(const AttentionArgs& args, Buffers& buffers) : a(args), w(buffers), D(args.D) {}

  // `used` names the slots that some row sees: the others may hold anything, and 0 * NaN is NaN.
  Tile<T> prefix(const Item& it, int64_t slot, int count, [[maybe_unused]] uint64_t used) {
    locate(it, slot, count, key_rows, value_rows);
    if constexpr (!kPlain) return {key_rows[0], value_rows[0], count};
    for (int i = 0; i < kTile; ++i)
      if (!(used >> i & 1)) value_rows[i] = kZeros;
    return gathered(count);
  }

  Tile<T> tail(const Item& it, int64_t first, int count) {
    if constexpr (!kPlain) {
      const int64_t at = (a.tail_page[it.b] + first / kTile) * a.tail_page_stride + it.h * kTile * D;
      return {static_cast<const T*>(a.tail_k) + at, static_cast<const T*>(a.tail_v) + at, count};
    } else {
      for (int i = 0; i < kTile; ++i) {
        const int64_t t = first + (i < count ? i : count - 1);
        key_rows[i] = static_cast<const T*>(a.tail_k) + it.b * a.tail_stride_b + t * a.tail_stride_t + it.h * a.tail_stride_h;
        value_rows[i] = static_cast<const T*>(a.tail_v) + it.b * a.tail_v_stride_b + t * a.tail_v_stride_t + it.h * a.tail_v_stride_h;
      }
      return gathered(count);
    }
  }

  // The tile from `slot` on is next: every product with this one asks for a part of it. A group of `group` rows makes at least three.
  void expect(const Item& it, int64_t slot, int group) {
    const int64_t left = it.prefix - slot;
    if (left <= 0) return;
    locate(it, slot, int(left < kTile ? left : kTile), ahead, ahead + kTile);
    asked = 0, at_once = 2 * kTile / int(3 * ((it.rows + group - 1) / group)) + 1;
  }

  RAMIFY_INLINE void ask() {
    for (int n = 0; n < at_once && asked < 2 * kTile; ++n, ++asked)
      for (int64_t d = 0; d < D; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(ahead[asked] + d, 0, 2);
  }

 private:
  static constexpr T kZeros[kMaxHead] = {};
  const AttentionArgs& a;
  Buffers& w;
  const int64_t D;
  const T* key_rows[kTile];
  const T* value_rows[kTile];
  const T* ahead[2 * kTile];  // rows of keys, then of values, of the next tile
  int asked = 2 * kTile, at_once = 0;

  // Where keys and values of `count` slots from `slot` on lie, the last of them again up to 64. Of a page of ours, its 64ths.
  void locate(const Item& it, int64_t slot, [[maybe_unused]] int count, const T** keys, const T** values) const {
    if constexpr (!kPlain) {
      const int64_t at = a.page_table[it.b * a.table_stride + slot / kTile] * a.page_stride + it.h * kTile * D;
      for (int i = 0; i < kTile; ++i)
        keys[i] = static_cast<const T*>(a.k) + at + i * D, values[i] = static_cast<const T*>(a.v) + at + i * D;
    } else {
      for (int i = 0; i < kTile; ++i) {
        const int64_t s = slot + (i < count ? i : count - 1);
        const int64_t page = a.page_table ? a.page_table[it.b * a.table_stride + s / a.page] : it.b, in = a.page_table ? s % a.page : s;
        keys[i] = static_cast<const T*>(a.k) + page * a.k_stride_b + in * a.k_stride_s + it.h * a.k_stride_h;
        values[i] = static_cast<const T*>(a.v) + page * a.v_stride_b + in * a.v_stride_s + it.h * a.v_stride_h;
      }
    }
  }

  Tile<T> gathered(int count) {
    transpose(reinterpret_cast<const uint32_t* const*>(key_rows), D * int64_t(sizeof(T)) / 4, static_cast<uint32_t*>(w.keys));
    interleave(value_rows, D, static_cast<T*>(w.values));
    return {static_cast<const T*>(w.keys), static_cast<const T*>(w.values), count};
  }
};

}  // namespace
}  // namespace ramify::RAMIFY_ISA
