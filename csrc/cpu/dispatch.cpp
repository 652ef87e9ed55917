// csrc/cpu/dispatch.cpp: the table of ISA levels. Built with baseline flags: nothing here may need a newer chip.
#include "cpu/dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace ramify {

#define X(level)                              \
  namespace level {                           \
  extern const KernelRow linear_kernels[];    \
  extern const KernelRow low_bit_kernels[];   \
  extern const KernelRow attention_kernels[]; \
  extern const KernelRow colsum_kernels[];    \
  extern const KernelRow draft_kernels[];     \
  extern const KernelRow glue_kernels[];      \
  extern const KernelRow kv_kernels[];        \
  extern const KernelRow merge_kernels[];     \
  extern const KernelRow place_kernels[];     \
  extern const KernelRow sample_kernels[];    \
  extern const KernelRow verify_kernels[];    \
  extern const KernelRow probe_kernels[];     \
  bool adds_in_order();                       \
  }
RAMIFY_LEVELS(X)
#undef X

namespace {

constexpr int kFiles = 12;

struct Level {
  const char* name;
  const KernelRow* files[kFiles];
  bool (*adds_in_order)();
};

#define X(level)                                                                                                                      \
  {#level,                                                                                                                            \
   {level::linear_kernels, level::low_bit_kernels, level::attention_kernels, level::colsum_kernels, level::draft_kernels,             \
    level::glue_kernels, level::kv_kernels, level::merge_kernels, level::place_kernels, level::sample_kernels, level::verify_kernels, \
    level::probe_kernels},                                                                                                            \
   level::adds_in_order},
const Level levels[] = {RAMIFY_LEVELS(X)};
#undef X
constexpr int kLevels = sizeof(levels) / sizeof(levels[0]);

bool same(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

int chosen = -1;
const KernelRow* table[kKernels];

}  // namespace

int level_count() { return kLevels; }
const char* level_name(int level) { return levels[level].name; }

bool level_runs(int level) {
  const char* const name = levels[level].name;
  if (same(name, "portable")) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (same(name, "avx2")) return avx2;
  if (same(name, "avx2_vnni")) {  // by hand: compilers that cannot build the level do not know its name either
    unsigned a = 0, b, c, d;
    return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  }
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  if (same(name, "avx512_vnni")) return avx512;
  if (same(name, "avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16") && levels[level].adds_in_order();
#endif
  return false;
}

void set_level(int level) {
  for (int i = 0; i < kKernels; ++i) table[i] = nullptr;
  for (const KernelRow* rows : levels[level].files)
    for (; rows->id >= 0; ++rows) table[rows->id] = rows;
  chosen = level;
}

int current_level() { return chosen; }

const KernelRow* kernel(int64_t id) { return id >= 0 && id < kKernels ? table[id] : nullptr; }

}  // namespace ramify
