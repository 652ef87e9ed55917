// csrc/cuda/attention_wgmma.cu: tree and interval attention for sm_90a (wgmma). Meaning: reference/attention.py; the same items, chunks,
// parts and masks as attention.cu, and the same rule for weights.
// Status: compiled and emulated, not yet run on hardware.
//
// Kernels  columns (attention_columns.cuh): up to 64 packed rows T * Hq/Hkv a block, as 16 or 64 columns of wgmma; one warpgroup, and a
//          warp that fills its ring. rows (attention_rows.cuh): more rows; two warpgroups of 64 rows share every tile, two warps copy.
//          Every block reads its own tiles: no clusters and no multicast, so row blocks of one head meet in L2 only, and rows are at most
//          128 a block. To be weighed against a run on hardware.
// Takes    bf16 and f16, head sizes 64, 96, 128 and 256, keys and values at multiples of 16 bytes; attention.cu takes the rest.
// Bits     as attention.cu: chunks end at multiples of `chunk` slots, weights are 2^(s - m) with an integral m that only a row's own
//          scores move, so scaling is exact; the same bits for any grid. The order in which wgmma adds is the chip's own.
// Traffic  as attention.cu for 64 rows a block, half of it for rows. A stage is 16 KiB at D 64, 32 at 96 and 128, 64 at 256.
#include "cuda/attention_columns.cuh"
#include "cuda/attention_rows.cuh"

namespace ramify::gpu {
namespace {

template <class S>
constexpr int bytes_of = 1024 + S::Stages * S::kStage + S::Groups * S::kQueries;

// Five warps: of two blocks an SM, a quarter of it has three, which leaves each thread 168 registers.
template <class S>
__global__ void __launch_bounds__(160, 2) columns_kernel(const AttentionArgs a) {
#if RT_HOPPER
  RT_DYN(unsigned char, memory);
  RT_SHARED(Barriers, bars, [1]);
  RT_SHARED(ColumnsShared, shared, [1]);
  unsigned char *const ring = rt::tile_memory(memory), *const queries = ring + S::Stages * S::kStage;
  init_barriers<S>(bars[0]);
  if (threadIdx.x >= 128)
    produce<S>(a, bars[0], ring);
  else
    consume_columns<S>(a, bars[0], ring, queries, queries + S::kQueries, shared[0]);
#else
  __trap();  // launched where the library has no code for this chip
#endif
}

// Three warpgroups of 168 registers a thread; the producers, of which only some warps have work, give theirs to the consumers.
template <class S>
__global__ void __launch_bounds__(384, 1) rows_kernel(const AttentionArgs a) {
#if RT_HOPPER
  RT_DYN(unsigned char, memory);
  RT_SHARED(Barriers, bars, [1]);
  unsigned char *const ring = rt::tile_memory(memory), *const queries = ring + S::Stages * S::kStage;
  init_barriers<S>(bars[0]);
  if (threadIdx.x >= 128 * S::Groups) {
    rt::registers_down<72>();
    if (threadIdx.x < 128 * S::Groups + 32 * S::Producers) produce<S>(a, bars[0], ring);
  } else {
    rt::registers_up<216>();
    consume_rows<S>(a, bars[0], ring, queries + threadIdx.x / 128 * S::kQueries);
  }
#else
  __trap();
#endif
}

template <class S>
int start(void (*kernel)(AttentionArgs), const AttentionArgs& a, int threads, int bytes, int blocks_an_sm, cudaStream_t stream) {
  if (const int error = rt::allow_shared(kernel, bytes)) return error;
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t groups = (row_blocks_of(a) + S::Groups - 1) / S::Groups;
  const int64_t most = a.B * a.Hkv * groups * chunks_of(a), blocks = blocks_an_sm * processors;
  RT_LAUNCH(kernel, dim3(unsigned(most < blocks ? most : blocks)), dim3(unsigned(threads)), bytes, stream, a);
  return join_attention(a, stream);
}

template <class T, int Panels, int StagesFew, int StagesSome, int StagesRows>
int start_of_size(const AttentionArgs& a, cudaStream_t stream) {
  using Few = Wide<T, Panels, 16, 1, 1, StagesFew>;
  using Rows = Wide<T, Panels, 64, 2, 2, StagesRows>;
  constexpr int kBlocks = Panels < 4 ? 2 : 1, kMost = 226 * 1024;
  static_assert(kBlocks * (bytes_of<Few> + kPanel + 3072) <= kMost && bytes_of<Rows> <= kMost);
  if (attention_variant(a) == kRows) return start<Rows>(rows_kernel<Rows>, a, 384, bytes_of<Rows>, 1, stream);
  if (a.T * (a.Hq / a.Hkv) <= Few::Rows) return start<Few>(columns_kernel<Few>, a, 160, bytes_of<Few> + kPanel, kBlocks, stream);
  if constexpr (Panels < 4) {
    using Some = Wide<T, Panels, 64, 1, 1, StagesSome>;
    static_assert(kBlocks * (bytes_of<Some> + kPanel + 3072) <= kMost);
    return start<Some>(columns_kernel<Some>, a, 160, bytes_of<Some> + kPanel, kBlocks, stream);
  }
  return cudaErrorInvalidValue;
}

template <class T>
int start_of_type(const AttentionArgs& a, cudaStream_t stream) {
  if (a.D == 64) return start_of_size<T, 1, 4, 4, 4>(a, stream);
  if (a.D == 96 || a.D == 128) return start_of_size<T, 2, 3, 2, 4>(a, stream);
  if (a.D == 256) return start_of_size<T, 4, 3, 0, 2>(a, stream);  // 64 columns of 256 features are more registers than there are
  return cudaErrorInvalidValue;
}

}  // namespace

bool has_wgmma() {
#if defined(__CUDACC__) && !defined(RAMIFY_SM90A)
  return false;  // built without code for sm_90a
#else
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major == 9;
#endif
}

AttentionVariant attention_variant(const AttentionArgs& a) {
  if (a.variant != kAutomatic) return AttentionVariant(a.variant);
  if (!has_wgmma() || !(a.type == kBf16 ? in_words<bf16>(a) : in_words<f16>(a))) return kMma;
  return a.T * (a.Hq / a.Hkv) > (a.D > 128 ? 16 : kRowBlock) ? kRows : kColumns;
}

int attention_wgmma(const AttentionArgs& a, void* stream) {
  if (!(a.type == kBf16 ? in_words<bf16>(a) : in_words<f16>(a))) return cudaErrorInvalidValue;
  return a.type == kBf16 ? start_of_type<bf16>(a, cudaStream_t(stream)) : start_of_type<f16>(a, cudaStream_t(stream));
}

}  // namespace ramify::gpu
