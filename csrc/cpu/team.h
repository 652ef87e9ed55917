// csrc/cpu/team.h: the threads of one parallel region, as a kernel sees them.
//
// A kernel is a function that every thread of the team calls with the same arguments. It may wait() any number of times,
// every thread equally often. take() hands out work items; the counter starts at zero again after each wait().
#pragma once
#include <stdint.h>

namespace ramify {

struct TeamState {  // one cache line each, so that arrivals do not slow the counter
  alignas(64) int arrived = 0;
  alignas(64) int phase = 0;
  alignas(64) int64_t counter = 0;
};

struct Team {
  int id, size;
  TeamState* state;
};

using KernelFn = void (*)(const void* args, Team& team);
using ScratchFn = int64_t (*)(const void* args, int threads);

struct KernelRow {  // one entry of a source file's table; an id of -1 ends the table
  int64_t id;
  KernelFn run;
  ScratchFn scratch;       // null: needs none
  KernelFn ask = nullptr;  // asks memory for what the kernel reads first and no kernel writes
};

namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

extern "C" int sched_yield(void);

// Sense by phase count: the last thread to arrive resets the counters and opens the next phase.
inline void wait(Team& team) {
  if (team.size == 1) {
    team.state->counter = 0;
    return;
  }
  TeamState& s = *team.state;
  const int phase = __atomic_load_n(&s.phase, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&s.arrived, 1, __ATOMIC_ACQ_REL) == team.size) {
    __atomic_store_n(&s.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&s.counter, int64_t(0), __ATOMIC_RELAXED);
    __atomic_store_n(&s.phase, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spins = 0; __atomic_load_n(&s.phase, __ATOMIC_ACQUIRE) == phase; ++spins) {
    if (spins < 4000)
      pause();
    else
      sched_yield();  // a core that was taken away must be able to come back
  }
}

inline int64_t take(Team& team) { return __atomic_fetch_add(&team.state->counter, int64_t(1), __ATOMIC_RELAXED); }

// Contiguous share of `count` items for this thread: [begin, end).
struct Range {
  int64_t begin, end;
};
inline Range share(const Team& team, int64_t count) { return {count * team.id / team.size, count * (team.id + 1) / team.size}; }

}  // namespace
}  // namespace ramify
