// csrc/cuda/draft.cu: guesses from a table of likely successors, and what a step teaches it. Meaning: reference/draft.py.
// Status: compiled and emulated, not yet run on hardware.
//
// What     table_draft: row t of every sequence is the successor of rank ranks[t] of its parent's token. table_learn: row tokens[m] of the
//          table becomes row m of what is likely, where no later row holds the same token.
// Shape    table_draft: a block a sequence, a thread a row, tokens in shared memory. Each thread counts its row's steps to the root; then
//          the rows of one depth at a time look their tokens up. table_learn: a warp a row; it reads the tokens behind its own, 32 at a
//          time, until one is equal, and so no two warps write one row and no order of blocks shows.
// Traffic  table_draft: 8 bytes a row and sequence, one load after the other as deep as the tree is. table_learn: 8 W bytes a row that
//          stays, and up to 4 M to find out, mostly from the cache.
// Outside  a parent that is no earlier row, a rank outside the table, an id outside the vocabulary: as what was never seen.
#include "cuda/entries.h"
#include "cuda/values.cuh"

namespace ramify::gpu {
namespace {

constexpr int kThreads = 128;  // of table_learn

RT_FN bool in(int64_t x, int64_t count) { return x >= 0 && x < count; }

__global__ void __launch_bounds__(kMaxRows) table_draft_kernel(const TableDraftArgs a) {
  RT_SHARED(int, parents, [kMaxRows]);
  RT_SHARED(int, tokens, [kMaxRows]);
  RT_SHARED(Key, part, [kMaxRows / 32]);
  const int t = threadIdx.x;
  const bool row = t < int(a.T);
  int64_t rank = 0;
  if (row) {
    const int parent = a.parents[t];
    rank = a.ranks[t];
    parents[t] = t > 0 && in(parent, t) && in(rank, a.W) ? parent : -1;
    const int32_t root = a.roots[blockIdx.x];
    tokens[t] = t == 0 && in(root, a.V) ? root : -1;
  }
  __syncthreads();
  int depth = 0, above = row ? t : -1;
  for (; above > 0; above = parents[above]) ++depth;  // a parent stands before its child, so this ends
  if (above < 0) depth = 0;                           // not in use, or below a row that is not
  const int deepest = int(block_best(Key(depth), part));
  for (int level = 1; level <= deepest; ++level) {
    if (depth == level) {
      const int64_t token = tokens[parents[t]];
      const int32_t found = token < 0 ? -1 : a.table[token * a.table_stride + rank];
      tokens[t] = in(found, a.V) ? found : -1;
    }
    __syncthreads();
  }
  if (row) a.out[blockIdx.x * a.out_stride + t] = tokens[t];
}

__global__ void __launch_bounds__(kThreads) table_learn_kernel(const TableLearnArgs a) {
  const int64_t m = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (m >= a.M) return;
  const int32_t token = a.tokens[m];
  if (!in(token, a.V)) return;
  for (int64_t first = (m + 1) / 32 * 32; first < a.M; first += 32) {
    const int64_t r = first + lane;
    if (__any_sync(rt::kAll, r > m && r < a.M && a.tokens[r] == token)) return;
  }
  for (int64_t w = lane; w < a.W; w += 32) a.table[token * a.table_stride + w] = a.likely[m * a.likely_stride + w];
}

}  // namespace

int table_draft(const TableDraftArgs& a, void* stream) {
  if (a.B == 0) return cudaSuccess;
  if (a.T < 1 || a.T > kMaxRows) return cudaErrorInvalidValue;
  RT_LAUNCH(table_draft_kernel, dim3(unsigned(a.B)), dim3(unsigned((a.T + 31) / 32 * 32)), 0, cudaStream_t(stream), a);
  return cudaGetLastError();
}

int table_learn(const TableLearnArgs& a, void* stream) {
  if (a.M == 0) return cudaSuccess;
  constexpr int kWarps = kThreads / 32;
  RT_LAUNCH(table_learn_kernel, dim3(unsigned((a.M + kWarps - 1) / kWarps)), dim3(kThreads), 0, cudaStream_t(stream), a);
  return cudaGetLastError();
}

}  // namespace ramify::gpu
