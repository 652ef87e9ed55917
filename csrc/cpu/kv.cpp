// csrc/cpu/kv.cpp: committing draft rows. Meaning: reference/kv.py.
//
// What     copies the key and value of accepted draft rows to their slots in the pages, every layer and head in one call.
// Traffic  4 * L * Hkv * D * sizeof(kv) bytes a row: read and written once each. Rejected rows are never touched.
#include "cpu/isa.h"

namespace ramify::RAMIFY_ISA {
namespace {

template <class T>
void commit(const CommitArgs& a, Team& team) {
  constexpr bool kPairs = sizeof(T) == 2;
  const Range mine = share(team, a.L * a.Hkv);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t layer = i / a.Hkv, head = i % a.Hkv * kTile * a.D;
    const T* const dk = static_cast<const T*>(a.draft_k) + layer * a.draft_layer_stride + head;
    const T* const dv = static_cast<const T*>(a.draft_v) + layer * a.draft_layer_stride + head;
    T* const k = static_cast<T*>(a.k) + layer * a.layer_stride + head;
    T* const v = static_cast<T*>(a.v) + layer * a.layer_stride + head;
    for (int32_t n = 0; n < *a.count; ++n) {
      const int64_t from = a.source[n] / kTile * a.page_stride, to = a.target[n] / kTile * a.page_stride;
      const int64_t s = a.source[n] % kTile, t = a.target[n] % kTile;
      for (int64_t d = 0; d < a.D; ++d) {
        k[to + key_index(t, d, a.D, kPairs)] = dk[from + key_index(s, d, a.D, kPairs)];
        v[to + value_index(t, d, a.D, kPairs)] = dv[from + value_index(s, d, a.D, kPairs)];
      }
    }
  }
}

void kv_commit(const void* p, Team& team) {
  const CommitArgs& a = *static_cast<const CommitArgs*>(p);
  a.kv_dtype == kF32 ? commit<float>(a, team) : commit<bf16>(a, team);
}

}  // namespace

extern const KernelRow kv_kernels[];
const KernelRow kv_kernels[] = {{kCommit, kv_commit, nullptr}, {-1, nullptr, nullptr}};

}  // namespace ramify::RAMIFY_ISA
