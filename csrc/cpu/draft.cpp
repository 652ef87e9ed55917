// csrc/cpu/draft.cpp: guesses from a table of likely successors, and what a step teaches it. Meaning: reference/draft.py.
//
// What     table_draft: row t of a tree is the successor of rank ranks[t] of its parent's token. table_learn: a token's row of the table
//          becomes what is likely after it now.
// Threads  share sequences; of table_learn the table's rows: each walks all tokens in order and writes those that are its own, so
//          the last row of a token wins.
// Traffic  8 bytes a row drafted; 8 W bytes a row learned, and 4 a thread.
// Outside  what points outside the tree or the table is as what was never seen: a bound call has had no look at values.
#include "cpu/isa.h"

namespace ramify::RAMIFY_ISA {
namespace {

RAMIFY_INLINE bool in(int64_t x, int64_t count) { return uint64_t(x) < uint64_t(count); }

void table_draft(const void* p, Team& team) {
  const TableDraftArgs& a = *static_cast<const TableDraftArgs*>(p);
  const Range mine = share(team, a.B);
  for (int64_t b = mine.begin; b < mine.end; ++b) {
    int32_t* const tokens = a.out + b * a.out_stride;
    tokens[0] = in(a.roots[b], a.V) ? a.roots[b] : -1;
    for (int64_t t = 1; t < a.T; ++t) {
      const int64_t parent = a.parents[t], rank = a.ranks[t];
      const int64_t above = in(parent, t) && in(rank, a.W) ? tokens[parent] : -1;
      const int32_t token = above < 0 ? -1 : a.table[above * a.table_stride + rank];
      tokens[t] = in(token, a.V) ? token : -1;
    }
  }
}

void table_learn(const void* p, Team& team) {
  const TableLearnArgs& a = *static_cast<const TableLearnArgs*>(p);
  for (int64_t m = 0; m < a.M; ++m) {
    const int32_t token = a.tokens[m];
    if (!in(token, a.V) || token % team.size != team.id) continue;
    __builtin_memcpy(a.table + token * a.table_stride, a.likely + m * a.likely_stride, size_t(a.W) * sizeof(int32_t));
  }
}

}  // namespace

extern const KernelRow draft_kernels[];
const KernelRow draft_kernels[] = {{kTableDraft, table_draft, nullptr}, {kTableLearn, table_learn, nullptr}, {-1, nullptr, nullptr}};

}  // namespace ramify::RAMIFY_ISA
