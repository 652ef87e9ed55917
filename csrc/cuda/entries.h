// csrc/cuda/entries.h: one host function for each kernel. Python has checked what the struct holds; the answer is a cudaError_t.
#pragma once
#include "common/args_cuda.h"

namespace ramify::gpu {

int fill(const FillArgs& a, void* stream);
int mma_probe(const MmaArgs& a, void* stream);
int rms_norm(const RmsNormArgs& a, void* stream);
int silu_mul(const SiluMulArgs& a, void* stream);
int embed(const EmbedArgs& a, void* stream);
int rope(const RopeArgs& a, void* stream);
int rope_append(const RopeAppendArgs& a, void* stream);
int commit(const CommitArgs& a, void* stream);
int row_stats(const RowStatsArgs& a, void* stream);
int verify_greedy(const VerifyGreedyArgs& a, void* stream);
int merge_states(const MergeStatesArgs& a, void* stream);
int verify_sample(const VerifySampleArgs& a, void* stream);
int attention(const AttentionArgs& a, void* stream);
int colsum(const ColsumArgs& a, void* stream);
int attention_wgmma(const AttentionArgs& a, void* stream);   // kColumns and kRows
AttentionVariant attention_variant(const AttentionArgs& a);  // what `attention` takes
bool has_wgmma();                                            // whether the device of this moment runs the kernels of sm_90a
int attention_invariant(const AttentionArgs& a, void* stream);
int join_attention(const AttentionArgs& a, void* stream);  // the parts of all chunks, after either
int linear(const LinearArgs& a, void* stream);
int table_draft(const TableDraftArgs& a, void* stream);
int table_learn(const TableLearnArgs& a, void* stream);
int residual_sample(const ResidualSampleArgs& a, void* stream);

}  // namespace ramify::gpu
