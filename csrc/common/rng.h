// csrc/common/rng.h: the counter-based random numbers of pyext/sampling/rng.py, bit for bit. Source: Random123, Philox4x32-10.
//
// A number is a function of (seed, index, purpose, lane) and of nothing else: index is the absolute position of the token that
// is decided, lane tells siblings or vocabulary entries apart. No state, so any thread may compute any number.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define RAMIFY_RNG __host__ __device__ static inline
#else
#define RAMIFY_RNG static inline
#endif

namespace ramify {

enum Purpose : uint32_t { kSample = 0, kDraft = 1, kAccept = 2, kResidual = 3 };

struct Words4 {
  uint32_t w[4];
};

// Ten rounds of Philox4x32; the key is (low, high) of the seed.
RAMIFY_RNG Words4 philox(Words4 c, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c.w[0], p1 = static_cast<uint64_t>(0xCD9E8D57u) * c.w[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.w[1] ^ k0, static_cast<uint32_t>(p1), static_cast<uint32_t>(p0 >> 32) ^ c.w[3] ^ k1,
          static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c;
}

// 53 bits of two words as a number in [0, 1).
RAMIFY_RNG double unit(uint32_t low, uint32_t high) {
  return static_cast<double>((static_cast<uint64_t>(high) << 32 | low) >> 11) * 0x1p-53;
}

RAMIFY_RNG double uniform(uint64_t seed, uint64_t index, uint32_t purpose, uint32_t lane) {
  const Words4 r = philox({{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), lane, purpose}}, seed);
  return unit(r.w[0], r.w[1]);
}

}  // namespace ramify
