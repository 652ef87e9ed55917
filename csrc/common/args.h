// csrc/common/args.h: the argument structs of every kernel, shared by the CPU sources, the CUDA sources and the bindings.
//
// Every field is 8 bytes wide (pointer, int64_t or double), so a struct has no padding and pyext/native.py can mirror it
// field by field; a test compares the sizes. Strides count elements, never bytes. Counts that change from step to step
// (rows, lengths, trees) are read through pointers, so a captured step can be replayed without touching its arguments.
#pragma once
#include <stdint.h>

#include "common/args_draft.h"

namespace ramify {

// kInt8 to kFp8 are weights only (layouts.h), kF16 scales and zeros only, kF64 probabilities only.
enum DType : int64_t { kF32 = 0, kBf16 = 1, kF16 = 2, kInt8 = 3, kInt4 = 4, kFp8 = 5, kF64 = 6 };

// What a linear layer does to its input row before the product.
enum Prologue : int64_t { kCopy = 0, kRmsNorm = 1, kSiluMul = 2 };
enum Activation : int64_t { kNone = 0, kSilu = 1 };
// How a low-bit layer takes its input: as it is; rounded to int8 with one scale a row, or one for each group of a row; rounded to bf16.
enum Activations : int64_t { kExact = 0, kInt8Row = 1, kInt8Group = 2, kToBf16 = 3 };

// y[M, N] = activation(prologue(x)[M, K] @ W^T + bias) + residual, W packed in panels (layouts.h). The one struct of kLinear and
// of kLinearLowBit, which alone reads what follows topk_values.
struct LinearArgs {
  const int32_t* rows;     // M
  const float* x;          // [M, K], or [M, 2K] (gate, up) for kSiluMul
  int64_t x_stride, K, N;  // N counts real features; the last panel is zero-padded
  const void* weight;
  int64_t dtype;  // DType of the weight
  int64_t prologue;
  const float* norm_weight;  // [K], kRmsNorm only
  double eps;
  const float* bias;  // [N] or null
  int64_t activation;
  const float* residual;  // [M, N] or null; may be `out`
  int64_t residual_stride;
  float* out;  // [M, N]
  int64_t out_stride;
  void* scratch;  // as many bytes as the kernel's scratch function asks for at the largest M
  // Row statistics of the output, filled while a block of columns is still in cache; argmax is null when not wanted.
  int32_t* argmax;      // [M]
  float *top, *lse;     // [M]
  int64_t topk;         // 0 or at most kMaxTopK
  int32_t* topk_ids;    // [M, topk]
  float* topk_values;   // [M, topk], descending; the lower id first on a tie
  int64_t group;        // inputs that share a scale, 0: a whole row
  int64_t scale_dtype;  // kF32, kBf16 or kF16
  int64_t zeros;        // 1: zeros follow the scales, 0: the zero is 8 for kInt4
  const int32_t* perm;  // [K] or null: the weight's column j multiplies input perm[j]
  int64_t activations;  // Activations; kFp8 takes kExact
};

// o = attention of every row over the committed prefix of its sequence (no mask but the window) and over those rows of the
// step's tree that the row's ancestor words name.
struct AttentionArgs {
  const int32_t* row_start;  // [B + 1] query rows of each sequence, packed, T at most; null: T rows each at q_stride_b
  int64_t B, T, Hq, Hkv, D;
  const void* q;
  int64_t q_dtype, q_stride_b, q_stride_t, q_stride_h;
  void* out;  // dtype of q
  int64_t out_stride_b, out_stride_t, out_stride_h;
  float* lse;  // natural log-sum-exp, [rows, Hq] packed like q, or null
  int64_t lse_stride_b, lse_stride_t;
  double scale;
  int64_t window, sink;       // window 0: unlimited
  const int32_t* prefix_len;  // [B]
  const int32_t* tail_len;    // [B] rows of the tree that lie in the tail
  const int64_t* ancestors;   // [rows, words], packed like q when row_start is given, else [B, T, words]
  int64_t words;
  const int32_t* row_depth;    // depth of each query row, indexed like ancestors without the word
  const int32_t* tail_depth;   // depth of each tail row
  const int32_t* tail_offset;  // [B] where a sequence's rows begin in tail_depth
  int64_t kv_dtype;
  int64_t plain;  // 0: tiles of 64 slots (layouts.h); 1: rows of D values at the strides below
  const void *k, *v;
  int64_t page_stride;         // tiles: elements between pages. plain: unused
  const int32_t* page_table;   // [B, table_stride] or null
  int64_t table_stride, page;  // plain: slots in a page
  int64_t k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h;
  const void *tail_k, *tail_v;
  int64_t tail_page_stride;
  const int32_t* tail_page;  // tiles: [B] first draft page of each sequence
  int64_t tail_stride_b, tail_stride_t, tail_stride_h, tail_v_stride_b, tail_v_stride_t, tail_v_stride_h;
  int64_t max_slots;  // upper bound of prefix_len + tail depth, sizes the scratch
  void* scratch;
  const int32_t *start, *end;  // [B, T] or null: the slots that each row sees instead, up to prefix_len; the tail is empty then
};

// c[b, h, s]: the attention that slot s received from all rows, through the query heads of group h.
struct ColsumArgs {
  int64_t B, T, Hq, Hkv, D, slots;
  const void* q;
  int64_t q_dtype, q_stride_b, q_stride_t, q_stride_h;
  const void* k;
  int64_t kv_dtype, k_stride_b, k_stride_s, k_stride_h;  // b: a sequence's, or with a page table a page's
  const int32_t* page_table;                             // [B, table_stride] or null
  int64_t table_stride, page;
  const float* lse;  // natural logarithm
  int64_t lse_stride_b, lse_stride_t;
  const int32_t *prefix_len, *tail_rows;  // [B]; tail_rows null: T
  const int32_t* depth;                   // [B, T], read under a window
  double scale;
  int64_t window, sink;  // window 0: unlimited
  float* out;
  int64_t out_stride_b, out_stride_h;
  void* scratch;
};

// One attention over two disjoint sets of keys, row by row.
struct MergeArgs {
  int64_t rows, D, dtype;
  const void *o1, *o2;  // a side whose lse is -inf may hold anything
  int64_t o1_stride, o2_stride;
  const float *lse1, *lse2;
  void* out;
  int64_t out_stride;
  float* lse;
};

// Rotate q and k by position (after an optional RMS norm per head), append k and v to the draft region.
struct RopeAppendArgs {
  const int32_t* rows;
  float* qkv;  // [M, (Hq + 2 Hkv) D]; q is rotated in place
  int64_t stride, Hq, Hkv, D;
  const float *q_norm, *k_norm;  // [D] or null
  double eps;
  const float *cos, *sin;     // [positions, D / 2]
  const int32_t* position;    // [M]
  const int32_t* draft_slot;  // [M] slot in the draft region; below 0: nothing is appended
  int64_t kv_dtype;
  void *k, *v;  // this layer's draft pages
  int64_t page_stride;
  int64_t plain;  // 1: k and v hold rows of D values at these strides, not tiles
  int64_t k_stride_s, k_stride_h, v_stride_s, v_stride_h;
};

struct EmbedArgs {
  const int32_t *rows, *tokens;
  const void* table;  // [V, hidden], row-major
  int64_t dtype, V, hidden;
  float* out;
  int64_t out_stride;
};

struct RmsNormArgs {
  const int32_t* rows;
  const float* x;
  int64_t x_stride, hidden;
  float* residual;  // when given: residual += x first, and the sum is normed
  int64_t residual_stride;
  const float* weight;
  double eps;
  float* out;
  int64_t out_stride;
};

struct SiluMulArgs {
  const int32_t* rows;
  const float* x;  // [M, 2K]: gate, up
  int64_t x_stride, K;
  float* out;
  int64_t out_stride;
};

struct RopeArgs {  // x[rows, H, D] rotated into out
  const int32_t* rows;
  const float* x;
  int64_t x_stride_t, x_stride_h, H, D;
  const float *cos, *sin;
  const int32_t* position;
  float* out;
  int64_t out_stride_t, out_stride_h;
};

struct CopyRowsArgs {
  const int32_t* rows;
  const float* x;
  int64_t x_stride, width;
  float* out;
  int64_t out_stride;
};

// Append draft rows to the committed pages, every layer and head in one call. Slots count from the pool's first page.
struct CommitArgs {
  const int32_t* count;  // moves in this call
  const int32_t *source, *target;
  int64_t L, Hkv, D, kv_dtype;
  void *k, *v;  // [L, pages, Hkv, 64 D]
  int64_t layer_stride, page_stride;
  const void *draft_k, *draft_v;  // [L, draft pages, Hkv, 64 D]
  int64_t draft_layer_stride;
};

// Rows of a plain tensor into slots of a plain cache: step i of sequence b goes to slot length[b] + i.
struct PlaceArgs {
  int64_t L, B, A, Hkv, D;  // A: steps a sequence at most
  const int32_t* path;      // [B, A] the row of each step; null: step i is row i
  const int32_t *count, *length;
  const void* x;
  int64_t dtype, x_stride_l, x_stride_b, x_stride_t, x_stride_h;
  void* cache;
  int64_t cache_dtype, cache_stride_l, cache_stride_b, cache_stride_s, cache_stride_h;
  const int32_t* page_table;  // [B, table_stride] or null
  int64_t table_stride, page;
};

struct RowStatsArgs {
  const int32_t* rows;
  const void* logits;
  int64_t dtype, V, stride;
  int32_t* argmax;
  float *top, *lse;
  int64_t topk;
  int32_t* topk_ids;
  float* topk_values;
  void* scratch;
};

// How the children of a row were chosen: by any rule, or drawn from q with or without replacement.
enum Drawn : int64_t { kByRule = 0, kWith = 1, kWithout = 2 };

// The path of each tree that a step accepts: by arg-maxes where they are given, else by chance.
struct VerifyArgs {
  int64_t B, T;
  const int32_t *tokens, *parents, *n_rows;  // [B, T], [B, T], [B]
  int32_t *path, *count, *bonus;             // [B, T], [B], [B]
  const int32_t* argmax;                     // [B, T] or null; what follows is for null
  const void* logits;                        // [B, T, V]
  int64_t dtype, V, stride_b, stride_t;
  const float* temperature;  // [B]; 0: the most likely token
  const int64_t *seed, *position;
  const float* q;  // [B, T, V], what the children of each row were drawn from; not for kByRule
  int64_t q_stride_b, q_stride_t, drawn;
  void* scratch;
};

// A draw from norm([p - q]_+), or from p where nothing is left.
struct ResidualArgs {
  int64_t rows, V, dtype;
  const void *p, *q;
  int64_t p_stride, q_stride;
  const double* u;
  int32_t* ids;
  void* scratch;
};

// A draw from softmax(logits / temperature) of one row, for a host that walks a tree.
struct DrawArgs {
  const float* logits;
  int64_t V;
  float temperature;
  uint64_t seed, index;
  int32_t* token;  // -1 where the weights have no finite sum
  void* scratch;
};

// Weight [N, K] row-major -> panels. Zero-pads the last panel and an odd K.
struct PackArgs {
  const void* weight;
  int64_t dtype, N, K, stride;
  void* out;
};

// What a core can do at most (probe.cpp): the floors of benchmarks/.
enum Probe : int64_t { kProbeRead = 0, kProbeFp32 = 1, kProbeBf16 = 2, kProbeInt8 = 3 };

struct ProbeArgs {
  int64_t kind;
  const void* data;        // kProbeRead: 64-byte aligned
  int64_t bytes, streams;  // streams a thread
  int64_t repeat;
  int64_t* done;  // what one thread did: bytes, or products and sums; 0 where the level has no such instruction
  double* sink;
};

enum Kernel : int64_t {
  kLinear,
  kAttention,
  kRopeAppend,
  kEmbed,
  kRmsNormRows,
  kSiluMulRows,
  kRope,
  kCopyRows,
  kCommit,
  kRowStats,
  kPack,
  kProbe,
  kLinearLowBit,
  kMerge,
  kPlace,
  kVerify,
  kResidualSample,
  kColsum,
  kDraw,
  kTableDraft,
  kTableLearn,
  kKernels
};

constexpr int kPanel = 32;         // features in a weight panel, keys in a key panel
constexpr int kLowBitPanel = 16;   // features in a panel of a low-bit weight
constexpr int kLowBitGroup = 128;  // inputs whose products are summed before they are scaled, where the weight has no smaller group
constexpr int kTile = 64;          // slots in a page: one ancestor word
constexpr int kChunk = 512;        // slots whose attention is summed before it joins the rest: fixed, so no split shows
constexpr int kStatsBlock = 512;   // columns whose statistics are summed before they join the rest
constexpr int kMaxTopK = 32;
constexpr int kMaxHead = 256;  // head size
constexpr int kRowBlock = 96;  // packed query rows of one attention work item

}  // namespace ramify
