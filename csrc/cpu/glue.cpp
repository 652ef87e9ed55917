// csrc/cpu/glue.cpp: what stands between the products of a transformer layer. Meaning: reference/glue.py.
//
// What     embed, rms_norm (+ residual), silu_mul, rope, rope + append, copy. Threads share rows; a row is one thread's work.
// Traffic  a few KiB a row: these never bound a step, their barriers do, which is why linear.cpp can fuse the first ones.
#include "cpu/rows.h"

namespace ramify::RAMIFY_ISA {
namespace {

void embed(const void* p, Team& team) {
  const EmbedArgs& a = *static_cast<const EmbedArgs*>(p);
  const Range mine = share(team, *a.rows);
  for (int64_t m = mine.begin; m < mine.end; ++m) {
    float* out = a.out + m * a.out_stride;
    const int64_t at = int64_t(a.tokens[m]) * a.hidden;
    for (int64_t j = 0; j < a.hidden; j += L) {
      const int64_t left = a.hidden - j;
      store_part(out + j,
                 a.dtype == kF32 ? load_part(static_cast<const float*>(a.table) + at + j, left, 0.f)
                                 : load_part(static_cast<const bf16*>(a.table) + at + j, left, 0.f),
                 left);
    }
  }
}

void rms_norm(const void* p, Team& team) {
  const RmsNormArgs& a = *static_cast<const RmsNormArgs*>(p);
  const Range mine = share(team, *a.rows);
  for (int64_t m = mine.begin; m < mine.end; ++m) {
    const float* x = a.x + m * a.x_stride;
    if (a.residual) {
      float* r = a.residual + m * a.residual_stride;
      for (int64_t j = 0; j < a.hidden; j += L) {
        const int64_t left = a.hidden - j;
        store_part(r + j, load_part(r + j, left, 0.f) + load_part(x + j, left, 0.f), left);
      }
      x = r;
    }
    rms_norm_row(x, a.weight, a.eps, a.out + m * a.out_stride, a.hidden);
  }
}

void silu_mul(const void* p, Team& team) {
  const SiluMulArgs& a = *static_cast<const SiluMulArgs*>(p);
  const Range mine = share(team, *a.rows);
  for (int64_t m = mine.begin; m < mine.end; ++m) silu_mul_row(a.x + m * a.x_stride, a.out + m * a.out_stride, a.K);
}

void rope(const void* p, Team& team) {
  const RopeArgs& a = *static_cast<const RopeArgs*>(p);
  const Range mine = share(team, *a.rows * a.H);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t m = i / a.H, h = i % a.H, angle = a.position[m] * (a.D / 2);
    rope_row(a.x + m * a.x_stride_t + h * a.x_stride_h, a.cos + angle, a.sin + angle, a.out + m * a.out_stride_t + h * a.out_stride_h, a.D);
  }
}

template <class T>
void append(const RopeAppendArgs& a, const float* key, const float* value, int64_t slot, int64_t head) {
  constexpr bool kPairs = sizeof(T) == 2;
  if (a.plain) {
    T* const k = static_cast<T*>(a.k) + slot * a.k_stride_s + head * a.k_stride_h;
    T* const v = static_cast<T*>(a.v) + slot * a.v_stride_s + head * a.v_stride_h;
    for (int64_t d = 0; d < a.D; d += L)
      store_part(k + d, load_part(key + d, a.D - d, 0.f), a.D - d), store_part(v + d, load_part(value + d, a.D - d, 0.f), a.D - d);
    return;
  }
  const int64_t at = slot / kTile * a.page_stride + head * kTile * a.D, in = slot % kTile;
  T *k = static_cast<T*>(a.k) + at, *v = static_cast<T*>(a.v) + at;
  if constexpr (kPairs) {
    bf16 keys[kMaxHead], values[kMaxHead];
    narrow_row(key, keys, a.D), narrow_row(value, values, a.D);
    for (int64_t d = 0; d < a.D; d += 2) __builtin_memcpy(k + key_index(in, d, a.D, true), keys + d, 4);
    for (int64_t d = 0; d < a.D; ++d) v[value_index(in, d, a.D, true)] = values[d];  // its neighbour may be another thread's
  } else {
    for (int64_t d = 0; d < a.D; ++d) k[key_index(in, d, a.D, false)] = key[d], v[value_index(in, d, a.D, false)] = value[d];
  }
}

// All rows of one head, then those of the next: neighbouring rows share cache lines of a page, which one core should write. A KV head
// follows its share of the query heads, so that threads get as many of either.
void rope_append(const void* p, Team& team) {
  const RopeAppendArgs& a = *static_cast<const RopeAppendArgs*>(p);
  const int64_t rows = *a.rows, queries = (a.Hq + a.Hkv - 1) / a.Hkv;
  const Range mine = share(team, a.Hkv * (queries + 1) * rows);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t m = i % rows, head = i / rows / (queries + 1), within = i / rows % (queries + 1), angle = a.position[m] * (a.D / 2);
    const bool query = within < queries;
    if (query ? head * queries + within >= a.Hq : a.draft_slot[m] < 0) continue;
    float* row = a.qkv + m * a.stride;
    float* x = row + (query ? head * queries + within : a.Hq + head) * a.D;
    const float* norm = query ? a.q_norm : a.k_norm;
    if (norm) rms_norm_row(x, norm, a.eps, x, a.D);
    rope_row(x, a.cos + angle, a.sin + angle, x, a.D);
    if (query) continue;
    const float* value = row + (a.Hq + a.Hkv + head) * a.D;
    if (a.kv_dtype == kF32)
      append<float>(a, x, value, a.draft_slot[m], head);
    else
      append<bf16>(a, x, value, a.draft_slot[m], head);
  }
}

void copy_rows(const void* p, Team& team) {
  const CopyRowsArgs& a = *static_cast<const CopyRowsArgs*>(p);
  const Range mine = share(team, *a.rows);
  for (int64_t m = mine.begin; m < mine.end; ++m)
    for (int64_t j = 0; j < a.width; j += L)
      store_part(a.out + m * a.out_stride + j, load_part(a.x + m * a.x_stride + j, a.width - j, 0.f), a.width - j);
}

}  // namespace

extern const KernelRow glue_kernels[];
const KernelRow glue_kernels[] = {{kEmbed, embed, nullptr}, {kRmsNormRows, rms_norm, nullptr},   {kSiluMulRows, silu_mul, nullptr},
                                  {kRope, rope, nullptr},   {kRopeAppend, rope_append, nullptr}, {kCopyRows, copy_rows, nullptr},
                                  {-1, nullptr, nullptr}};

}  // namespace ramify::RAMIFY_ISA
