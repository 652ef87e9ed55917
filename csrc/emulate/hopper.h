// csrc/emulate/hopper.h: sm_90a as a CUDA source sees it under g++; csrc/cuda/rt_hopper.cuh includes this file, kernels include that.
#pragma once
#include "emulate/emulate.h"

namespace emulate {

unsigned shared_address(const void* p);  // of dynamic shared memory, which begins at an odd multiple of 128 here

void mbar_init(void* bar, unsigned count, Site site);
void mbar_arrive(void* bar, unsigned expected, Site site);
void mbar_arrive_copies(void* bar, Site site);
void mbar_wait(void* bar, unsigned parity, Site site);
void copy_bulk(void* to, const void* from, unsigned bytes, void* bar, Site site);
void fence_async();

bool named_barrier(int id, int threads, bool own, bool waits, Site site);
void set_registers(int count, bool up, Site site);

struct Product {  // one wgmma as one lane asks for it
  float* d;
  const uint32_t* registers;  // A, or null: A is in shared memory
  uint64_t a, b;              // descriptors
  int N;
  bool half, trans_a, trans_b, add;
  Site site;
};
void wgmma(const Product& product);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups_left);

}  // namespace emulate
