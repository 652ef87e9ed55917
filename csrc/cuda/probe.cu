// csrc/cuda/probe.cu: what the CUDA driver says about this machine, one kernel to show that a launch works, and the way in.
// Nothing here runs at load: a machine without a GPU imports the module and gets error codes.
#include "cuda/entries.h"
#include "cuda/rt.cuh"

namespace ramify::gpu {
namespace {

__global__ void fill_kernel(uint32_t* out, int64_t count, uint32_t value) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < count) out[i] = value + uint32_t(i);
}

template <class T>
__global__ void mma_probe_kernel(const MmaArgs args) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint16_t *const a = static_cast<const uint16_t*>(args.a), *const b = static_cast<const uint16_t*>(args.b);
  uint32_t x[4], y[2];
  float d[4];
  for (int r = 0; r < 4; ++r) {
    const uint16_t* const p = a + (g + 8 * (r & 1)) * 16 + 2 * t + 8 * (r >> 1);
    x[r] = uint32_t(p[1]) << 16 | p[0], d[r] = args.c[(g + 8 * (r >> 1)) * 8 + 2 * t + (r & 1)];
  }
  for (int r = 0; r < 2; ++r) {
    const uint16_t* const p = b + (2 * t + 8 * r) * 8 + g;
    y[r] = uint32_t(p[8]) << 16 | p[0];
  }
  rt::mma<T>(d, x, y);
  for (int r = 0; r < 4; ++r) args.d[(g + 8 * (r >> 1)) * 8 + 2 * t + (r & 1)] = d[r];
}

template <class Args>
int call(int (*kernel)(const Args&, void*), const void* args, void* stream) {
  return kernel(*static_cast<const Args*>(args), stream);
}

}  // namespace

int fill(const FillArgs& a, void* stream) {
  if (a.count < 1) return cudaErrorInvalidValue;
  RT_LAUNCH(fill_kernel, dim3(unsigned((a.count + 255) / 256)), dim3(256), 0, cudaStream_t(stream), a.out, a.count, uint32_t(a.value));
  return cudaGetLastError();
}

int mma_probe(const MmaArgs& a, void* stream) {
  if (a.type != kBf16 && a.type != kF16) return cudaErrorInvalidValue;
  auto* const kernel = a.type == kBf16 ? mma_probe_kernel<bf16> : mma_probe_kernel<f16>;
  RT_LAUNCH(kernel, dim3(1), dim3(32), 0, cudaStream_t(stream), a);
  return cudaGetLastError();
}

}  // namespace ramify::gpu

extern "C" {

// Number of devices into *count; returns a cudaError_t.
int ramify_cuda_devices(int* count) { return cudaGetDeviceCount(count); }

// Version of the driver and of the linked runtime, 1000 * major + 10 * minor, 0 where there is none; returns a cudaError_t.
int ramify_cuda_versions(int* driver, int* runtime) {
  const cudaError_t error = cudaDriverGetVersion(driver);
  return error != cudaSuccess ? error : cudaRuntimeGetVersion(runtime);
}

// The runtime's words for a cudaError_t.
const char* ramify_cuda_message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Run one kernel of args_cuda.h on a stream; returns a cudaError_t.
int ramify_cuda_run(int64_t kernel, const void* args, void* stream) {
  using namespace ramify::gpu;
  switch (kernel) {
    case kFill:
      return call(fill, args, stream);
    case kMmaProbe:
      return call(mma_probe, args, stream);
    case kRmsNorm:
      return call(rms_norm, args, stream);
    case kSiluMul:
      return call(silu_mul, args, stream);
    case kEmbed:
      return call(embed, args, stream);
    case kRope:
      return call(rope, args, stream);
    case kRopeAppend:
      return call(rope_append, args, stream);
    case kCommit:
      return call(commit, args, stream);
    case kRowStats:
      return call(row_stats, args, stream);
    case kVerifyGreedy:
      return call(verify_greedy, args, stream);
    case kMergeStates:
      return call(merge_states, args, stream);
    case kVerifySample:
      return call(verify_sample, args, stream);
    case kAttention:
      return call(attention, args, stream);
    case kColsum:
      return call(colsum, args, stream);
    case kLinear:
      return call(linear, args, stream);
    case kResidualSample:
      return call(residual_sample, args, stream);
    case kTableDraft:
      return call(table_draft, args, stream);
    case kTableLearn:
      return call(table_learn, args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

// Bytes of a kernel's argument struct, or -1: Python compares them with its own.
int64_t ramify_cuda_size(int64_t kernel) {
  using namespace ramify::gpu;
  switch (kernel) {
    case kFill:
      return sizeof(FillArgs);
    case kMmaProbe:
      return sizeof(MmaArgs);
    case kRmsNorm:
      return sizeof(RmsNormArgs);
    case kSiluMul:
      return sizeof(SiluMulArgs);
    case kEmbed:
      return sizeof(EmbedArgs);
    case kRope:
      return sizeof(RopeArgs);
    case kRopeAppend:
      return sizeof(RopeAppendArgs);
    case kCommit:
      return sizeof(CommitArgs);
    case kRowStats:
      return sizeof(RowStatsArgs);
    case kVerifyGreedy:
      return sizeof(VerifyGreedyArgs);
    case kMergeStates:
      return sizeof(MergeStatesArgs);
    case kVerifySample:
      return sizeof(VerifySampleArgs);
    case kAttention:
      return sizeof(AttentionArgs);
    case kColsum:
      return sizeof(ColsumArgs);
    case kLinear:
      return sizeof(LinearArgs);
    case kResidualSample:
      return sizeof(ResidualSampleArgs);
    case kTableDraft:
      return sizeof(TableDraftArgs);
    case kTableLearn:
      return sizeof(TableLearnArgs);
    default:
      return -1;
  }
}

// Bytes of scratch that row_stats needs.
int64_t ramify_cuda_stats_scratch(int64_t rows, int64_t V, int64_t topk) { return ramify::gpu::stats_scratch(rows, V, topk); }

// Which AttentionVariant attention takes.
int64_t ramify_cuda_attention_variant(const void* args) {
  return ramify::gpu::attention_variant(*static_cast<const ramify::gpu::AttentionArgs*>(args));
}

// Bytes of scratch that attention needs.
int64_t ramify_cuda_attention_scratch(const void* args) {
  return ramify::gpu::attention_scratch(*static_cast<const ramify::gpu::AttentionArgs*>(args));
}

}  // extern "C"
