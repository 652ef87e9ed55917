// csrc/cuda/kv.cu: kv_append and kv_commit: tail rows to their slots, every layer in one launch. Meaning: reference/kv.py.
// Status: compiled and emulated, not yet run on hardware.
//
// What     tail row path[b, i] of all layers and heads to slot length[b] + i, for i < count[b]; counts, lengths, paths and page
//          tables are read on the device, so the launch needs no answer from the verifier.
// Shape    a block a (row, sequence, layer); threads share the heads' chunks of eight values. Blocks beyond count[b] end at once.
// Traffic  2 D (tail + cache bytes) a row and head. Rejected rows are never touched.
// Outside  a slot or page that does not exist is not written.
#include "cuda/entries.h"
#include "cuda/values.cuh"

namespace ramify::gpu {
namespace {

constexpr int kThreads = 128;

template <class From, class To>
__global__ void __launch_bounds__(kThreads) commit_kernel(const CommitArgs a) {
  const int64_t i = blockIdx.x, b = blockIdx.y, layer = blockIdx.z;
  const int64_t count = a.count ? a.count[b] : a.A;
  if (i >= count) return;
  const int64_t row = a.path ? a.path[b * a.path_stride + i] : i, slot = a.length[b] + i;
  if (row < 0 || row >= a.T || slot < 0) return;
  int64_t place = b, in = slot;
  if (a.page_table) {
    if (slot / a.page >= a.table_width) return;
    place = a.page_table[b * a.table_stride + slot / a.page], in = slot % a.page;
    if (place < 0 || place >= a.pages) return;
  } else if (slot >= a.page) {
    return;
  }
  const From* const tail_k =
      static_cast<const From*>(a.tail_k) + layer * a.tail_k_stride_l + b * a.tail_k_stride_b + row * a.tail_k_stride_t;
  const From* const tail_v =
      static_cast<const From*>(a.tail_v) + layer * a.tail_v_stride_l + b * a.tail_v_stride_b + row * a.tail_v_stride_t;
  To* const k = static_cast<To*>(a.k) + layer * a.k_stride_l + place * a.k_stride_b + in * a.k_stride_s;
  To* const v = static_cast<To*>(a.v) + layer * a.v_stride_l + place * a.v_stride_b + in * a.v_stride_s;
  const bool k_words = wide(tail_k, a.tail_k_stride_h) && wide(k, a.k_stride_h);
  const bool v_words = wide(tail_v, a.tail_v_stride_h) && wide(v, a.v_stride_h);
  const int64_t chunks = (a.D + kChunk - 1) / kChunk;
  for (int64_t n = threadIdx.x; n < 2 * a.Hkv * chunks; n += kThreads) {
    const bool key = n < a.Hkv * chunks;
    const int64_t head = n / chunks % a.Hkv, d = n % chunks * kChunk;
    float x[kChunk];
    if (key) {
      load_chunk(tail_k + head * a.tail_k_stride_h + d, a.D - d, k_words, 0.f, x);
      store_chunk(k + head * a.k_stride_h + d, a.D - d, k_words, x);
    } else {
      load_chunk(tail_v + head * a.tail_v_stride_h + d, a.D - d, v_words, 0.f, x);
      store_chunk(v + head * a.v_stride_h + d, a.D - d, v_words, x);
    }
  }
}

}  // namespace

int commit(const CommitArgs& a, void* stream) {
  if (a.A == 0 || a.B == 0 || a.L == 0) return cudaSuccess;
  return with_type(a.tail_type, [&](auto* from) {
    return with_type(a.cache_type, [&](auto* to) {
      auto* const kernel = commit_kernel<std::remove_pointer_t<decltype(from)>, std::remove_pointer_t<decltype(to)>>;
      RT_LAUNCH(kernel, dim3(unsigned(a.A), unsigned(a.B), unsigned(a.L)), dim3(kThreads), 0, cudaStream_t(stream), a);
      return cudaGetLastError();
    });
  });
}

}  // namespace ramify::gpu
