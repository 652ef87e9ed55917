// tests/gates/faults.cu: three small kernels with one fault each on demand: the test of the emulator that tests our kernels.
//
//     faults FAULT ORDER SEED LATE      exit 0: right values; 4: wrong values; 2: the launch failed, message on stderr; else: a sanitizer
//
// block_sum  sums 4 numbers a thread over a block and adds the block's sum to one cell.
// decode     one warp and one query tile: softmax-free attention over 64 keys in four stages, cp.async double buffer, mma.
// product    sm_90a: one warp copies tiles in bulk, a warpgroup multiplies them by wgmma; mbarriers between them, one stage.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/rt_hopper.cuh"

extern "C" void ramify_emulate(int order, uint64_t seed, int late);

namespace {

enum Fault {
  kNone,
  kPastTheInput,        // reads one element behind its input
  kHalfMask,            // a shuffle whose mask names half of the lanes that reach it
  kLaneOutsideMask,     // reads a lane that its mask does not name
  kNoBarrier,           // no __syncthreads after a shared write
  kDivergentBarrier,    // __syncthreads at another place for some warps
  kHalfWarpBarrier,     // __syncthreads in half a warp's branch
  kUnwrittenShared,     // reads a shared cell that nobody wrote
  kPastTheShared,       // an index behind a shared array
  kPlainAdd,            // += across blocks instead of atomicAdd
  kNoFence,             // publishes without __threadfence
  kEarlyExit,           // a thread returns before the barrier
  kOrder,               // block 0 adds one where another block ran before it
  kWaitTooShort,        // cp_wait<1> where <0> is needed
  kNoSyncBeforeRead,    // no __syncwarp between the wait and the first read of the tile
  kNoSyncBeforeRefill,  // no __syncwarp between the last read and the next copy into the same stage
  kCopiesUnderWay,      // ends before its copies have landed
  kMisaligned,          // cp.async from an odd address
  kTooMuchShared,       // more dynamic shared memory than a block has without asking
  kNoSuchGrid,          // more blocks along y than a GPU takes
  kWrongParity,         // waits for the phase before the one that brings the tile
  kNoExpect,            // arrives without saying how many bytes the phase waits for
  kNoInitFence,         // no fence between mbar_init and the first bulk copy
  kMisalignedBulk,      // a bulk copy from an address that is no multiple of 16
  kOneArrivalLess,      // fewer arrivals than the mbarrier was made for
  kEarlyRelease,        // gives the stage back before the products that read it were waited for
  kNoProxyFence,        // no fence_async between a thread's stores and the wgmma that reads them
  kShortBarrier,        // a named barrier of half of the threads that it should hold
  kNoWgmmaFence,        // no wgmma_fence before the first product
  kReadBeforeWait,      // reads accumulators that it has not waited for
  kNotWaited,           // ends before its products have
  kOneWarpLess,         // a product that one warp of the warpgroup leaves out
  kNoSwizzle,           // stores an operand in plain order that the descriptor calls swizzled
  kWrongStride,         // a descriptor whose groups of 8 rows lie too near
  kTileAnywhere,        // a swizzled tile that does not begin at a multiple of 1024
  kOneWarpsRegisters,   // setmaxnreg in one warp of the warpgroup
  kAllRegisters,        // setmaxnreg for more threads than the registers are enough for
  kOneArrivalMore,      // arrives once more than the mbarrier was made for
  kFarOperand,          // a descriptor of what lies behind shared memory
};

__global__ void block_sum(const float* x, float* out, float* parts, unsigned* ticket, int fault) {
  RT_SHARED(float, part, [2]);
  const int thread = threadIdx.x, at = blockIdx.x * blockDim.x + thread;
  if (fault == kEarlyExit && thread == 40) return;
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += x[4 * at + i + (fault == kPastTheInput)];
  const unsigned mask = fault == kHalfMask || fault == kLaneOutsideMask ? 0xFFFFu : rt::kAll;
  if (fault == kLaneOutsideMask) {
    if (thread % 32 < 16) sum += 0 * __shfl_sync(mask, sum, 20);
  } else {
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(mask, sum, step);
  }
  const int where = thread / 32 + (fault == kPastTheShared);
  if (thread % 32 == 0 && !(fault == kUnwrittenShared && thread == 32)) part[where] = sum;
  if (fault == kDivergentBarrier && thread / 32 == 1) {
    __syncthreads();
  } else if (fault == kHalfWarpBarrier) {
    if (thread % 32 < 16) __syncthreads();
    if (thread % 32 >= 16) sum += 0 * __shfl_sync(0xFFFF0000u, sum, 16);
  } else if (fault != kNoBarrier) {
    __syncthreads();
  }
  if (thread == 0) {
    const float total = part[0] + part[1];
    if (fault == kPlainAdd)
      *out += total;
    else
      atomicAdd(out, total);
    if (fault == kOrder && blockIdx.x == 0 && atomicAdd(ticket, 0u) != 0) atomicAdd(out, 1.f);
    parts[blockIdx.x] = total;
    if (fault != kNoFence) __threadfence();
    if (atomicAdd(ticket, 1u) == gridDim.x - 1) {  // the last block adds the parts once more, in order
      if (fault != kNoFence) __threadfence();
      float again = 0;
      for (unsigned b = 0; b < gridDim.x; ++b) again += parts[b];
      parts[gridDim.x] = again;
    }
  }
  __syncthreads();  // an ordering of this block; were the next block to inherit it, kPlainAdd and kNoFence would go unseen
  __syncthreads();
}

constexpr int kKeys = 16, kStages = 2, kTiles = 4, kDim = 16;

// out[16, 16] = (q k^T) k over 64 keys k [64, 16]; two warps share the tiles, each takes half of the output's columns.
__global__ void decode(const bf16* q, const bf16* k, float* out, int fault) {
  RT_DYN(bf16, ring);  // [stage][key][dim]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  bf16* const own = ring + warp * kStages * kKeys * kDim;
  const auto fetch = [&](int tile) {
    if (tile < kTiles)  // a tile is 512 bytes: 16 a lane
      rt::cp16(own + (tile % kStages) * kKeys * kDim + lane * 8, k + tile * kKeys * kDim + lane * 8 + (fault == kMisaligned));
    rt::cp_commit();
  };
  uint32_t a[4];
  for (int r = 0; r < 4; ++r) memcpy(&a[r], q + (g + 8 * (r & 1)) * kDim + 2 * t + 8 * (r >> 1), 4);
  float o[4] = {0, 0, 0, 0};
  fetch(0);
  for (int tile = 0; tile < kTiles; ++tile) {
    fetch(tile + 1);
    if (fault == kWaitTooShort)
      rt::cp_wait<2>();
    else
      rt::cp_wait<1>();
    if (fault != kNoSyncBeforeRead) __syncwarp();
    const bf16* const keys = own + (tile % kStages) * kKeys * kDim;
    uint32_t weights[4];
    for (int half = 0; half < 2; ++half) {
      uint32_t b[2];
      for (int r = 0; r < 2; ++r) memcpy(&b[r], keys + (8 * half + g) * kDim + 2 * t + 8 * r, 4);
      float s[4] = {0, 0, 0, 0};
      rt::mma<bf16>(s, a, b);
      for (int r = 0; r < 2; ++r) {
        const bf16 low = __float2bfloat16(s[2 * r]), high = __float2bfloat16(s[2 * r + 1]);
        weights[2 * half + r] = uint32_t(__bfloat16_as_ushort(high)) << 16 | __bfloat16_as_ushort(low);
      }
    }
    uint32_t b[2];
    for (int r = 0; r < 2; ++r) {
      const int key = 2 * t + 8 * r, column = 8 * warp + g;
      b[r] = uint32_t(__bfloat16_as_ushort(keys[(key + 1) * kDim + column])) << 16 | __bfloat16_as_ushort(keys[key * kDim + column]);
    }
    rt::mma<bf16>(o, weights, b);
    if (fault != kNoSyncBeforeRefill) __syncwarp();
  }
  if (fault != kCopiesUnderWay) rt::cp_wait<0>();
  if (fault == kCopiesUnderWay) rt::cp16(own, k), rt::cp_commit();
  for (int r = 0; r < 4; ++r) out[(g + 8 * (r >> 1)) * kDim + 8 * warp + 2 * t + (r & 1)] = o[r];
}

constexpr int kM = 64, kN = 8, kDepth = 64, kSteps = 3;  // of a tile; tiles
constexpr int kTileA = kM * 128, kTileB = kN * 128;      // bytes

// out[64, 8] = a[64, 192] b[8, 192]^T; `a` comes in tiles as they lie in shared memory.
__global__ void product(const unsigned char* a, const bf16* b, float* out, int fault) {
  RT_DYN(unsigned char, memory);
  RT_SHARED(rt::Mbarrier, bars, [2]);
  unsigned char *const tile_a = fault == kTileAnywhere ? memory : rt::tile_memory(memory), *const tile_b = tile_a + kTileA;
  rt::Mbarrier *const full = &bars[0], *const empty = &bars[1];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  if (thread == 0) {
    rt::mbar_init(full, 1);
    rt::mbar_init(empty, fault == kOneArrivalLess ? 5 : 4);
    if (fault != kNoInitFence) rt::fence_async();
  }
  __syncthreads();
  if (fault == kAllRegisters) rt::registers_up<240>();
  if (warp > 4) return;
  if (warp == 4) {
    for (int tile = 0; lane == 0 && tile < kSteps; ++tile) {
      rt::mbar_wait(empty, (tile & 1) ^ 1);
      if (fault == kNoExpect)
        rt::mbar_arrive(full);
      else
        rt::mbar_expect(full, kTileA);
      if (fault == kOneArrivalMore) rt::mbar_arrive(full);
      rt::copy_bulk(tile_a, a + tile * kTileA + 2 * (fault == kMisalignedBulk), kTileA, full);
    }
    return;
  }
  if (fault == kOneWarpsRegisters && warp == 1) rt::registers_up<232>();
  float d[kN / 2] = {0, 0, 0, 0};
  for (int tile = 0; tile < kSteps; ++tile) {
    const unsigned at = thread / 16 * 128 + thread % 16 * 8;  // four numbers a thread
    memcpy(tile_b + (fault == kNoSwizzle ? at : rt::swizzled(at)), b + thread / 16 * kDepth * kSteps + tile * kDepth + thread % 16 * 4, 8);
    if (fault != kNoProxyFence) rt::fence_async();
    rt::mbar_wait(full, (tile & 1) ^ (fault == kWrongParity));
    rt::bar_sync(1, fault == kShortBarrier ? 64 : 128);
    if (fault != kNoWgmmaFence) rt::wgmma_fence(d);
    for (int k = 0; k < 4; ++k) {
      const int stride = fault == kWrongStride ? 512 : 1024, far = fault == kFarOperand ? 32 << 10 : 0;
      if (!(fault == kOneWarpLess && warp == 3 && k == 3))
        rt::wgmma<bf16, 0, 0>(d, rt::descriptor(tile_a + 32 * k, 0, stride), rt::descriptor(tile_b + 32 * k + far, 0, stride), 1);
    }
    rt::wgmma_commit();
    if (fault == kEarlyRelease && lane == 0) rt::mbar_arrive(empty);
    if (fault == kReadBeforeWait)
      for (float& x : d) x += 1;
    if (fault != kNotWaited || tile < kSteps - 1) rt::wgmma_wait<0>(d);
    if (fault != kEarlyRelease && lane == 0) rt::mbar_arrive(empty);
    rt::bar_sync(2, 128);  // or the next tile_b would overwrite what another warp reads
  }
  for (int r = 0; r < 4; ++r) out[(warp * 16 + g + 8 * (r >> 1)) * kN + 2 * t + (r & 1)] = d[r] - (fault == kReadBeforeWait ? kSteps : 0);
}

constexpr int kWrong = 4;  // what no sanitizer ends with

int finished() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return 0;
  fprintf(stderr, "%s\n", cudaGetErrorString(error));
  return 2;
}

int run_block_sum(int fault) {
  constexpr int kBlocks = 4, kThreads = 64;
  std::vector<float> x(kBlocks * kThreads * 4), parts(kBlocks + 1, NAN);
  float out = 0, want = 0;
  unsigned ticket = 0;
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 7) + 1, want += x[i];
  RT_LAUNCH(block_sum, dim3(kBlocks), dim3(kThreads), 0, nullptr, x.data(), &out, parts.data(), &ticket, fault);
  if (const int failed = finished()) return failed;
  return out == want && parts[kBlocks] == want ? 0 : kWrong;
}

int run_decode(int fault) {
  std::vector<bf16> q(16 * kDim), k(kTiles * kKeys * kDim);
  std::vector<float> out(16 * kDim, NAN);
  for (size_t i = 0; i < q.size(); ++i) q[i] = __float2bfloat16(float(int(i * 7 % 5) - 2));
  for (size_t i = 0; i < k.size(); ++i) k[i] = __float2bfloat16(float(int(i * 5 % 7) - 3));
  const int bytes = fault == kTooMuchShared ? 60 << 10 : 2 * kStages * kKeys * kDim * int(sizeof(bf16));
  RT_LAUNCH(decode, dim3(1, fault == kNoSuchGrid ? 65536 : 1), dim3(64), bytes, nullptr, q.data(), k.data(), out.data(), fault);
  if (const int failed = finished()) return failed;
  for (int row = 0; row < 16; ++row)
    for (int d = 0; d < kDim; ++d) {
      float want = 0;
      for (int key = 0; key < kTiles * kKeys; ++key) {
        float s = 0;
        for (int i = 0; i < kDim; ++i) s += __bfloat162float(q[row * kDim + i]) * __bfloat162float(k[key * kDim + i]);
        want += s * __bfloat162float(k[key * kDim + d]);
      }
      if (out[row * kDim + d] != want) return kWrong;  // small whole numbers: every sum is exact
    }
  return 0;
}

int run_product(int fault) {
  const int depth = kDepth * kSteps;
  std::vector<bf16> a(kM * depth), b(kN * depth);
  std::vector<unsigned char> tiles(kSteps * kTileA + 16);
  std::vector<float> out(kM * kN, NAN);
  for (size_t i = 0; i < a.size(); ++i) a[i] = __float2bfloat16(float(int(i * 7 % 11) - 5));
  for (size_t i = 0; i < b.size(); ++i) b[i] = __float2bfloat16(float(int(i * 5 % 9) - 4));
  for (int m = 0; m < kM; ++m)
    for (int k = 0; k < depth; ++k) memcpy(&tiles[k / kDepth * kTileA + rt::swizzled(m * 128 + k % kDepth * 2)], &a[m * depth + k], 2);
  const int bytes = kTileA + kTileB + 1024;
  RT_LAUNCH(product, dim3(1), dim3(fault == kAllRegisters ? 512 : 160), bytes, nullptr, tiles.data(), b.data(), out.data(), fault);
  if (const int failed = finished()) return failed;
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) {
      float want = 0;
      for (int k = 0; k < depth; ++k) want += __bfloat162float(a[m * depth + k]) * __bfloat162float(b[n * depth + k]);
      if (out[m * kN + n] != want) return kWrong;
    }
  return 0;
}

}  // namespace

int main(int count, char** words) {
  const int fault = count > 1 ? atoi(words[1]) : 0;
  if (count > 4) ramify_emulate(atoi(words[2]), strtoull(words[3], nullptr, 10), atoi(words[4]));
  if (fault < kWaitTooShort)
    if (const int wrong = run_block_sum(fault)) return wrong;
  if (fault == kNone || (fault >= kWaitTooShort && fault < kWrongParity))
    if (const int wrong = run_decode(fault)) return wrong;
  return fault == kNone || fault >= kWrongParity ? run_product(fault) : 0;
}
