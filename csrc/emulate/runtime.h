// csrc/emulate/runtime.h: the emulator's settings, its errors, and the few calls of the CUDA runtime that kernels' hosts make.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace emulate {

enum Order : int { kForward, kReverse, kRandom };

struct Schedule {
  int order = kForward;
  bool late = true;     // cp.async lands when it is waited for; else at once: both are legal
  bool coarse = false;  // thread sanitizer: a whole block is one thread, so that it can tell many blocks apart
  uint64_t state = 1;
  uint64_t draw(uint64_t below) {  // splitmix64
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u, z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (z ^ (z >> 31)) % below;
  }
};
extern Schedule schedule;

// How mma adds its sixteen products to c. No chip tells; a kernel that counts on more than the instruction promises fails under one of
// these.
enum Sums : int {
  kInOrder,  // one by one, from k = 0
  kPairs,    // as a tree, c last
  kAligned   // eight at a time, cut off at 2^-24 of the largest, c among them
};
extern int sums;

void set_failure(const char* format, ...) __attribute__((format(printf, 1, 2)));
size_t allowed_shared(const void* kernel);  // what cudaFuncSetAttribute granted it

}  // namespace emulate
