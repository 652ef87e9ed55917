// csrc/common/args_cuda.h: the argument structs of the CUDA kernels; pyext/native_cuda.py mirrors them field by field.
//
// As in args.h every field is 8 bytes wide and strides count elements. All pointers are device pointers and all counts that a
// step can change are read on the device: `live` holds how many of the `rows` count in this step, null means all of them.
#pragma once
#include <stdint.h>

#include "common/args_draft.h"

namespace ramify::gpu {

using ramify::TableDraftArgs, ramify::TableLearnArgs;

enum Type : int64_t { kF32 = 0, kBf16 = 1, kF16 = 2, kF64 = 3 };

// out = rms_norm(x, or x + residual, which is stored in `sum`) * weight
struct RmsNormArgs {
  const int32_t* live;
  int64_t rows, hidden, type;
  const void* x;
  int64_t x_stride;
  const void* residual;  // or null, and then sum is not written
  int64_t residual_stride;
  void* sum;  // may be x or residual
  int64_t sum_stride;
  const void* weight;  // [hidden]
  int64_t weight_type;
  double eps;
  void* out;  // may be x
  int64_t out_stride;
};

struct SiluMulArgs {
  const int32_t* live;
  int64_t rows, K, type;
  const void* x;  // [rows, 2K]: gate, up
  int64_t x_stride;
  void* out;
  int64_t out_stride;
};

struct EmbedArgs {  // a row whose id lies outside the table becomes NaN
  const int32_t* live;
  int64_t rows, hidden, V;
  const int32_t* ids;
  const void* table;
  int64_t table_type, table_stride;
  void* out;
  int64_t type, out_stride;
};

struct RopeArgs {  // a row whose position lies outside the tables becomes NaN
  const int32_t* live;
  int64_t rows, H, D, half, positions, type;
  const void* x;
  int64_t x_stride_t, x_stride_h;
  const float *cos, *sin;  // [positions, half]
  const int32_t* position;
  void* out;
  int64_t out_stride_t, out_stride_h;
};

// q and k of each row normed per head (where a weight is given) and rotated; q to `q`, k and v to slot[row] of the caches.
struct RopeAppendArgs {
  const int32_t* live;
  int64_t rows, Hq, Hkv, D, half, positions, type;
  const void* qkv;  // [rows, (Hq + 2 Hkv) D]
  int64_t qkv_stride;
  const void *q_norm, *k_norm;  // [D] or null
  int64_t norm_type;
  double eps;
  const float *cos, *sin;
  const int32_t *position, *slot;
  void* q;  // may be qkv
  int64_t q_stride_t, q_stride_h;
  int64_t cache_type, slots;
  void *k, *v;
  int64_t k_stride_s, k_stride_h, v_stride_s, v_stride_h;
};

// Tail row path[b, i] of every layer goes to slot length[b] + i, for i < count[b].
struct CommitArgs {
  int64_t B, A, T, L, Hkv, D, tail_type, cache_type;
  const void *tail_k, *tail_v;
  int64_t tail_k_stride_l, tail_k_stride_b, tail_k_stride_t, tail_k_stride_h;
  int64_t tail_v_stride_l, tail_v_stride_b, tail_v_stride_t, tail_v_stride_h;
  void *k, *v;
  int64_t k_stride_l, k_stride_b, k_stride_s, k_stride_h;  // b: a sequence's, or with a page table a page's
  int64_t v_stride_l, v_stride_b, v_stride_s, v_stride_h;
  const int32_t* path;  // [B, A], or null: row i goes to place i
  int64_t path_stride;
  const int32_t *count, *length;                   // [B]; count null: A
  const int32_t* page_table;                       // [B, ...] or null
  int64_t table_stride, table_width, page, pages;  // slots of a page, or of a sequence without a table; pages in the pool
};

constexpr int kSampleTile = 2048;  // columns of a row of logits whose weights are one sum

struct RowStatsArgs {  // what is null is not made
  int64_t B, T, V, type;
  const void* logits;  // [B, T, V]
  int64_t stride_b, stride_t;
  const int32_t* n_rows;  // [B]: rows in use of each sequence; null: T
  int32_t* argmax;        // [B, T], as the next two
  float *lse, *top;
  int64_t topk;              // 0 to kMaxTopK
  void* values;              // [B, T, topk] in the logits' type
  int32_t* ids;              // [B, T, topk]
  const float* temperature;  // [B], with weights
  double* weights;           // [B, T, tiles, 2]: a logit / temperature, and the sum of a tile's exp(logit / temperature - it)
  void* scratch;             // stats_scratch(B * T, V, topk) bytes
  uint32_t* tickets;         // [B, T], zero before and after
};

struct VerifyGreedyArgs {
  int64_t B, T;
  const int32_t *tokens, *parents, *argmax;  // [B, T]
  const int32_t* n_rows;                     // [B]
  int32_t *path, *count, *bonus;             // [B, T], [B], [B]
};

// One attention from those over two sets of keys; lse -inf: nothing was seen, and o may hold anything.
struct MergeStatesArgs {
  int64_t rows, D, type;
  const void *o1, *o2;
  int64_t o1_stride, o2_stride;
  const float *lse1, *lse2;
  void* out;
  int64_t out_stride;
  float* lse;
};

enum Mode : int64_t { kDet = 0, kIid = 1, kWor = 2 };

// A tree of rows of logits is walked by chance, after row_stats with weights; position[b] is the absolute position of the token that row 0
// decides. path null: tokens are drawn and nothing is walked.
struct VerifySampleArgs {
  int64_t B, T, V, mode;
  const void* logits;  // [B, T, V]
  int64_t type, stride_b, stride_t;
  const float* q;  // [B, T, V]; null: mode is kDet
  int64_t q_stride_b, q_stride_t;
  const int32_t *tokens, *parents, *n_rows;  // [B, T], [B, T], [B]; where only row 0 draws parents may be null, and n_rows: T
  const float* temperature;                  // [B]
  const int64_t *seed, *position;            // [B]
  const int32_t* argmax;                     // [B, T], of row_stats as the next two
  const float* top;
  const double* weights;
  double* scale;   // [B, T, 2], scratch; null: mode is kDet
  int32_t* drawn;  // [B, T]
  int32_t *path, *count, *bonus;
};

struct ResidualSampleArgs {
  int64_t rows, V, type;
  const void *p, *q;
  int64_t p_stride, q_stride;
  const double* u;  // [rows]
  int32_t* ids;
};

// kColumns and kRows: sm_90a, attention_wgmma.cu. kInvariant: a row's bits are those of plain decoding, attention_invariant.cu.
enum AttentionVariant : int64_t { kAutomatic, kMma, kColumns, kRows, kInvariant };

// Attention of T tree rows a sequence over its committed slots and over those rows of the tree that their words name; or, where
// `start` is given, over the slots from each row's start up to its end, and then there is no tail and no window.
struct AttentionArgs {
  int64_t B, T, Hq, Hkv, D, type;  // q, k and v are of one type, bf16 or f16
  const void* q;
  int64_t q_stride_b, q_stride_t, q_stride_h;
  void* out;
  int64_t out_stride_b, out_stride_t, out_stride_h;
  float* lse;  // natural logarithm
  int64_t lse_stride_b, lse_stride_t;
  double scale;
  int64_t window, sink;       // window 0: unlimited
  const int32_t* prefix_len;  // [B]
  const int32_t* tail_rows;   // [B] or null: T
  const int64_t* ancestors;   // [B, T, words]
  int64_t words;
  const int32_t *start, *end;  // [B, T] or null
  const void *k, *v;
  int64_t k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h;  // b: a sequence's, or with a page table a page's
  const int32_t* page_table;                                                       // [B, ...] or null
  int64_t table_stride, table_width, page, pages;  // slots of a page, or of a sequence without a table; pages in the pool
  const void *tail_k, *tail_v;
  int64_t tail_k_stride_b, tail_k_stride_t, tail_k_stride_h, tail_v_stride_b, tail_v_stride_t, tail_v_stride_h;
  int64_t chunk;  // slots that are summed before they join the rest, a multiple of 64
  void* scratch;  // attention_scratch(...) bytes
  int64_t variant;
};

// The attention that each slot of a cache received from all rows, through the query heads of a group.
struct ColsumArgs {
  int64_t B, T, Hq, Hkv, D, type;  // q and k are of one type, bf16 or f16
  const void* q;
  int64_t q_stride_b, q_stride_t, q_stride_h;
  const void* k;
  int64_t k_stride_b, k_stride_s, k_stride_h;
  const int32_t* page_table;
  int64_t table_stride, table_width, page, pages;  // as in AttentionArgs
  const float* lse;                                // natural logarithm
  int64_t lse_stride_b, lse_stride_t;
  const int32_t *prefix_len, *tail_rows;  // [B]; tail_rows null: T
  const int64_t* ancestors;               // [B, T, words] or null: row t stands t behind the prefix
  int64_t words;
  double scale;
  int64_t window, sink;  // window 0: unlimited
  float* out;            // [B, Hkv, slots]
  int64_t out_stride_b, out_stride_h;
};

// d = a b + c of one instruction mma.m16n8k16, to ask a chip what it promises.
struct MmaArgs {
  int64_t type;       // of a and b: bf16 or f16
  const void *a, *b;  // [16, 16], [16, 8]
  const float* c;     // [16, 8]
  float* d;
};

enum Weights : int64_t { kDense = 0, kInt4 = 1, kInt8 = 2, kFp8 = 3 };

enum LinearVariant : int64_t { kByRows = 0, kFewRows = 1, kManyRows = 2 };  // kFewRows: a row's bits are its own for any number of rows

// out = act(x W^T + bias) + residual. W as it is stored: rows of 16-bit numbers of x's type, or of codes with their scales.
struct LinearArgs {
  const int32_t* live;
  int64_t rows, N, K, type;
  const void* x;
  int64_t x_stride, kind;
  const void* weight;  // [N, K]; int4: the even input in the low bits
  int64_t weight_stride;
  const void* scale;                               // [N / lines, groups]
  int64_t scale_type, scale_stride, group, lines;  // inputs and outputs that share a scale; group 0: all inputs
  const uint16_t* zero;                            // f16 [N, groups], or null: 8 for int4
  int64_t zero_stride;
  const int32_t* perm;  // [K] or null: column k multiplies input perm[k]
  const void* bias;     // [N] or null
  int64_t bias_type, silu;
  const void* residual;  // or null
  int64_t residual_type, residual_stride;
  void* out;
  int64_t out_stride;
  int64_t shares;     // of the inputs of all panels, at most: half as many where a block has 2 kLinearPanel outputs
  float* scratch;     // where there are several shares: sums of panels that end up in more than one, as Python counts them
  uint32_t* tickets;  // one for every such panel and block of rows, zero before and after
  int64_t variant;
};

struct FillArgs {  // out[i] = value + i, to show that a launch works
  uint32_t* out;
  int64_t count, value;
};

enum Kernel : int64_t {
  kFill,
  kRmsNorm,
  kSiluMul,
  kEmbed,
  kRope,
  kRopeAppend,
  kCommit,
  kRowStats,
  kVerifyGreedy,
  kMergeStates,
  kVerifySample,
  kResidualSample,
  kAttention,
  kColsum,
  kMmaProbe,
  kLinear,
  kTableDraft,
  kTableLearn,
  kKernels
};

constexpr int kMaxTopK = 32, kMaxRows = 256;
constexpr int kStatsSlice = 4096;  // columns of a row that one block reads: fixed, so that a row's bits are its own

inline int64_t stats_scratch(int64_t rows, int64_t V, int64_t topk) {
  return rows * ((V + kStatsSlice - 1) / kStatsSlice) * 8 * (1 + (topk > 1 ? topk : 1));
}

constexpr int kLinearPanel = 128, kLinearWindow = 512;  // outputs of one block, inputs that it holds at a time
constexpr int kLinearRows = 256, kMostFewRows = 32;     // rows of one launch, of a block that mma.sync serves

constexpr int kRowBlock = 64;  // packed query rows, T * Hq / Hkv, of one attention block

inline int64_t slots_of(const AttentionArgs& a) { return a.page_table ? a.table_width * a.page : a.page; }
inline int64_t chunks_of(const AttentionArgs& a) {  // at most, of a sequence
  const int64_t n = (slots_of(a) + (a.variant == kInvariant ? a.T : 0) + a.chunk - 1) / a.chunk;
  return n > 1 ? n : 1;
}
inline int64_t row_blocks_of(const AttentionArgs& a) { return (a.T * (a.Hq / a.Hkv) + kRowBlock - 1) / kRowBlock; }
inline int64_t attention_scratch(const AttentionArgs& a) {
  return chunks_of(a) < 2 ? 0 : a.B * a.Hkv * row_blocks_of(a) * chunks_of(a) * kRowBlock * (a.D + 2) * 4;
}

}  // namespace ramify::gpu
