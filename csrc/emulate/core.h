// csrc/emulate/core.h: what the emulator's own files share: fibers, the block that runs, the sanitizers' hooks.
//
// The core is compiled without -fsanitize=thread, and keeps its bookkeeping out of the thread sanitizer's sight (Quiet): the
// sanitizer then sees the kernel's own reads and writes, and the orderings that barriers, __syncwarp and fences give.
#pragma once
#include <stdint.h>

#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulate/emulate.h"

#if defined(EMULATE_TSAN)
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void* __tsan_get_current_fiber();
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#elif defined(EMULATE_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulate {

#if defined(EMULATE_TSAN)
inline void acquire(void* p) { __tsan_acquire(p); }
inline void release(void* p) { __tsan_release(p); }
inline void saw_read(const void* p, size_t n) { __tsan_read_range(const_cast<void*>(p), n); }
inline void saw_write(void* p, size_t n) { __tsan_write_range(p, n); }
struct Quiet {
  Quiet() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Quiet() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};
#else
inline void acquire(void*) {}
inline void release(void*) {}
inline void saw_read(const void*, size_t) {}
inline void saw_write(void*, size_t) {}
struct Quiet {
  Quiet() {}
};
#endif

enum State { kReady, kAtWarp, kAtBlock, kAtNamed, kAtPhase, kDone };

struct Copy {  // one cp.async that has not landed
  void* to;
  const void* from;
  int bytes, filled;  // `bytes` are read, the rest of `filled` becomes zero
};

struct Fiber {  // one CUDA thread
  Thread thread;
  State state = kReady;
  int index = 0, warp = 0, lane = 0;
  Site site = {};                              // where it waits
  std::vector<std::vector<Copy>> copies = {};  // groups of cp.async, oldest first; the last one is not committed yet
  bool fenced = false;                         // __threadfence came before: its next atomic publishes what it has done
  void* touched = nullptr;                     // the last address it used an atomic on: a fence after it acquires
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* sanitizer = nullptr;  // the thread sanitizer's fiber, or the address sanitizer's fake stack
  int pauses = 0;
};

struct Op {  // a warp-wide step that is under way
  unsigned mask, got, seen;
  Step step;
  Site site;
  char sync;
  Slot slot[32];
  bool complete() const { return got == mask; }
};

struct Hopper;  // what hopper.cpp and wgmma.cpp keep of a block
void forget(Hopper* state);

struct Block {  // the block that runs now
  std::vector<Fiber> fibers;
  std::deque<int> ready;
  std::vector<std::list<Op>> ops;  // of each warp
  std::map<const void*, void*> shared;
  void* dynamic = nullptr;
  size_t dynamic_bytes = 0, static_bytes = 0;
  bool granted = false;  // rt::allow_shared was called for this kernel
  int arrived = 0, exited = 0, generation = 0;
  Site barrier = {};
  // Two in turn: a thread is at most one barrier behind. On the heap, because the thread sanitizer forgets what it knows of an address
  // only when it is freed: on a stack the next block would inherit this one's orderings.
  std::unique_ptr<char[]> sync = std::make_unique<char[]>(2);
  std::unique_ptr<Hopper, void (*)(Hopper*)> hopper{nullptr, forget};
};

extern Block* block;
extern Fiber* fiber;  // the one that runs; null outside a launch

void wake(Fiber& f);
void park(State state);                                                                 // to the scheduler, until woken
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));  // ends the launch with a message
std::string place(Site site);
void land(const Copy& copy);
void check_copies_landed(const Fiber& f);
void check_products_waited(const Fiber& f);
void check_block_ended();

}  // namespace emulate
