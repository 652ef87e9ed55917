// csrc/bind_cpu.cpp: ramify._cpu, addresses and integers in, codes out. Python has checked every shape before a pointer comes
// here (law 3), and keeps what the pointers name alive for the call.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "common/rng.h"
#include "common/tree_bits.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace ramify;

namespace {

int level_index(const std::string& name) {
  for (int i = 0; i < level_count(); ++i)
    if (name == level_name(i)) return i;
  return -1;
}

int best_level() {
  int best = 0;
  for (int i = 0; i < level_count(); ++i)
    if (level_runs(i)) best = i;
  return best;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  set_level(best_level());
  m.doc() = "CPU kernels of ramify: pointers in, codes out. Use ramify.ops and ramify.native instead.";
  m.def("levels", [] {
    py::list all;
    for (int i = 0; i < level_count(); ++i) all.append(py::make_tuple(level_name(i), level_runs(i)));
    return all;
  });
  m.def("level", [] { return level_name(current_level()); });
  m.def("set_level", [](const std::string& name) {
    const int i = level_index(name);
    if (i < 0 || !level_runs(i)) return false;
    set_level(i);
    return true;
  });
  m.def("run", [](int64_t id, uintptr_t args, int threads) {
    const Entry entry{id, reinterpret_cast<const void*>(args)};
    py::gil_scoped_release release;
    return replay(&entry, 1, threads);
  });
  m.def("replay", [](uintptr_t entries, int64_t count, int threads) {
    py::gil_scoped_release release;
    return replay(reinterpret_cast<const Entry*>(entries), count, threads);
  });
  m.def("scratch", [](int64_t id, uintptr_t args, int threads) -> int64_t {
    const KernelRow* row = kernel(id);
    if (!row) return -1;
    return row->scratch ? row->scratch(reinterpret_cast<const void*>(args), threads) : 0;
  });
  m.def("draw", [](uintptr_t logits, int64_t V, float temperature, uint64_t seed, uint64_t index) {  // alone: a row is microseconds
    int32_t token = -1;
    DrawArgs args{reinterpret_cast<const float*>(logits), V, temperature, seed, index, &token, nullptr};
    const KernelRow* const row = kernel(kDraw);
    std::vector<char> scratch(row->scratch(&args, 1));
    args.scratch = scratch.data();
    TeamState state;
    Team team{0, 1, &state};
    row->run(&args, team);
    return token;
  });
  m.def("uniform", [](uint64_t seed, uint64_t index, uint32_t purpose, uint32_t lane) { return uniform(seed, index, purpose, lane); });
  m.def("check_words", [](uintptr_t ancestors, int64_t B, int64_t T, int64_t words, uintptr_t used, uintptr_t depth) {
    return check_words(reinterpret_cast<const int64_t*>(ancestors), B, T, words, reinterpret_cast<const int32_t*>(used),
                       reinterpret_cast<int32_t*>(depth));
  });
  m.def("sizes", [] {
    py::dict d;
#define SIZE(T) d[#T] = sizeof(T)
    SIZE(LinearArgs), SIZE(AttentionArgs), SIZE(RopeAppendArgs), SIZE(EmbedArgs), SIZE(RmsNormArgs), SIZE(SiluMulArgs), SIZE(RopeArgs),
        SIZE(CopyRowsArgs), SIZE(CommitArgs), SIZE(RowStatsArgs), SIZE(PackArgs), SIZE(ProbeArgs), SIZE(MergeArgs), SIZE(PlaceArgs),
        SIZE(VerifyArgs), SIZE(ResidualArgs), SIZE(ColsumArgs), SIZE(TableDraftArgs), SIZE(TableLearnArgs);
#undef SIZE
    return d;
  });
}
