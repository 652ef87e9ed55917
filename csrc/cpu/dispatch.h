// csrc/cpu/dispatch.h: which ISA levels this build has, which of them the machine runs, and the kernels of the chosen one.
#pragma once
#include "common/args.h"
#include "cpu/team.h"

namespace ramify {

int level_count();
const char* level_name(int level);
bool level_runs(int level);  // by cpuid, and by how the chip adds pairs; the operating system must save a level's registers
int current_level();
void set_level(int level);            // the caller has checked level_runs
const KernelRow* kernel(int64_t id);  // of the current level; null for an unknown id

struct Entry {  // one captured kernel call
  int64_t kernel;
  const void* args;
};

// Run `count` entries in order inside one parallel region, all threads meeting between entries. Returns 0, or 1 + the index
// of an entry whose kernel is unknown (nothing has run then).
int64_t replay(const Entry* entries, int64_t count, int threads);

}  // namespace ramify
