// csrc/emulate/hopper_state.h: what the emulator keeps of a block that uses sm_90a.
#pragma once
#include "emulate/core.h"
#include "emulate/hopper.h"

namespace emulate {

struct Landing {  // copies that a barrier waits for
  std::vector<Copy> copies;
  bool bulk;  // counted in bytes, and written past the generic proxy; else one arrival, of a thread's cp.async
};

struct Phases {  // an mbarrier
  unsigned count;
  long pending, bytes = 0;  // arrivals and bytes that this phase still waits for
  unsigned phase = 0;
  int generation = 0;      // __syncthreads that came before its initialisation
  bool published = false;  // a fence followed it, before the next __syncthreads
  std::vector<Landing> landings = {};
  std::vector<int> waiting = {};
  std::unique_ptr<char> sync = std::make_unique<char>();
};

struct Named {  // a barrier of some threads; two places in turn, as in Block
  int threads = 0, arrived = 0, generation = 0;
  bool any[2] = {};
  std::vector<int> waiting = {};
  std::unique_ptr<char[]> sync = std::make_unique<char[]>(2);
};

struct Pending {  // one warp's share of a wgmma that has not been waited for
  Product product;
  float* d[32];
  const uint32_t* registers[32];
  std::vector<float> sum;  // lane by lane: what it adds to, then what it gives
  bool done;               // its operands have been read
};

struct WarpProducts {
  std::vector<std::vector<Pending>> groups{1};  // oldest first; the last one is not committed yet
  bool fenced = false;
  size_t issued = 0;
  std::vector<int> limits = {};  // what setmaxnreg said
};

struct Hopper {
  std::vector<unsigned char> seen;  // dynamic shared memory as the async proxy sees it
  std::map<void*, Phases> barriers;
  Named named[16];
  std::vector<WarpProducts> warps;
  std::vector<std::vector<Product>> issued;  // of each warpgroup, as the first of its warps asked for them
};

Hopper& hopper();                                                              // the running block's
unsigned char* seen_at(const void* p, size_t n, const char* what, Site site);  // the async proxy's view of it

}  // namespace emulate
