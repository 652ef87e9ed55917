// csrc/cpu/sample.cpp: which path of a tree a step accepts, and draws from what is left. Meaning: reference/verify.py.
//
// What     the walk from the root to the child that a row's arg-max or draw names (verify_greedy, verify_sample "det"), or whose
//          test passes (children drawn from q); residual_sample; the draw of one row alone, for the loop's own verifiers.
// Numbers  Philox on (seed, position, purpose, lane), rng.h. Exponentials are f32, sums f64: a decision is the reference's unless
//          a random number lies within about 1e-7 of its border.
// Traffic  V * sizeof(logits) bytes a row of the path, and as much of q where children are tested: rows that are never reached are
//          never read. A sequence, or a row of residual_sample, is one thread's work.
#include "common/rng.h"
#include "cpu/stats.h"

namespace ramify::RAMIFY_ISA {
namespace {

constexpr float kMasked = -__builtin_inff();

// Sum of f(0), ..., f(n - 1) in eight chains, a fixed order that compilers turn into vectors.
template <class F>
RAMIFY_INLINE double sum_of(int64_t n, F&& f) {
  double part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) part[j] += f(i + j);
  for (; i < n; ++i) part[0] += f(i);
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}
double sum_of(const double* w, int64_t n) {
  return sum_of(n, [=](int64_t i) { return w[i]; });
}

// The first i at which the running sum of w passes u * sum; where rounding leaves none, the last i with a weight, or 0.
int32_t draw(const double* w, int64_t n, double u) {
  const auto width = [=](int64_t j) { return n - j < kStatsBlock ? n - j : kStatsBlock; };
  double total = 0, before = 0;
  for (int64_t j = 0; j < n; j += kStatsBlock) total += sum_of(w + j, width(j));
  for (int64_t j = 0; j < n; j += kStatsBlock) {
    const double after = before + sum_of(w + j, width(j));
    double sum = before;
    for (int64_t i = j; after > u * total && i < j + width(j); ++i) {
      sum += w[i];
      if (sum > u * total) return int32_t(i);
    }
    before = after;
  }
  for (int64_t i = n; i-- > 0;)
    if (w[i] != 0) return int32_t(i);
  return 0;
}

// w = norm([w - q]_+), or w as it is where nothing is left.
void subtract(double* w, const double* q, int64_t n) {
  const double sum = sum_of(n, [=](int64_t i) { return w[i] > q[i] ? w[i] - q[i] : 0; });
  if (!(sum > 0)) return;
  for (int64_t i = 0; i < n; ++i) w[i] = (w[i] > q[i] ? w[i] - q[i] : 0) / sum;
}

void divide(double* w, int64_t n, double by) {
  for (int64_t i = 0; i < n; ++i) w[i] /= by;
}

// Arg-max of a row.
template <class T>
int32_t best_of(const T* x, int64_t V) {
  BlockStats best, block;
  for (int64_t j = 0; j < V; j += kStatsBlock) {
    block_stats(x + j, V - j < kStatsBlock ? V - j : kStatsBlock, int32_t(j), 0, block);
    if (j == 0 || above(block.top, best.top)) best.top = block.top, best.arg = block.arg;
  }
  return best.arg < 0 ? 0 : best.arg;
}

// w = softmax(x / temperature).
template <class T>
void weigh(const T* x, int64_t V, float temperature, double* w) {
  Vec top = Vec::set(kMasked);
  for (int64_t j = 0; j < V; j += L) top = max(load_part(x + j, V - j, kMasked), top);
  const float highest = hmax(top);
  const Vec heat = Vec::set(temperature), most = Vec::set(highest == kMasked ? 0.f : highest) / heat;
  float e[L];
  for (int64_t j = 0; j < V; j += L) {
    exp(load_part(x + j, V - j, kMasked) / heat - most).store(e);
    for (int i = 0; i < L && j + i < V; ++i) w[j + i] = e[i];
  }
  divide(w, V, sum_of(w, V));
}

struct Tree {
  const int32_t *tokens, *parents;
  int64_t rows;
  int64_t child(int64_t parent, int64_t after) const {  // the first one behind `after`, or -1
    for (int64_t r = after + 1; r < rows; ++r)
      if (parents[r] == parent) return r;
    return -1;
  }
  int64_t holder(int64_t parent, int32_t token) const {
    int64_t r = child(parent, parent);
    while (r >= 0 && tokens[r] != token) r = child(parent, r);
    return r;
  }
};

struct Choice {
  int32_t token;
  int64_t next;  // the accepted child, or -1
};

template <class T>
Choice choose(const VerifyArgs& a, const Tree& tree, int64_t b, int64_t row, int64_t depth, double* target, double* guess) {
  if (a.argmax) {
    const int32_t token = a.argmax[b * a.T + row];
    return {token, tree.holder(row, token)};
  }
  const T* const x = static_cast<const T*>(a.logits) + b * a.stride_b + row * a.stride_t;
  const float heat = a.temperature[b];
  if (!(heat > 0.f)) {
    const int32_t token = best_of(x, a.V);
    return {token, tree.holder(row, token)};
  }
  const uint64_t seed = uint64_t(a.seed[b]), at = uint64_t(a.position[b] + depth);
  weigh(x, a.V, heat, target);
  int64_t child = tree.child(row, row);
  if (a.drawn == kByRule || child < 0) {
    const int32_t token = draw(target, a.V, uniform(seed, at, kSample, 0));
    return {token, tree.holder(row, token)};
  }
  for (int64_t i = 0; i < a.V; ++i) guess[i] = a.q[b * a.q_stride_b + row * a.q_stride_t + i];
  divide(guess, a.V, sum_of(guess, a.V));
  for (uint32_t sibling = 0; child >= 0; ++sibling, child = tree.child(row, child)) {
    const int32_t token = tree.tokens[child];
    if (uniform(seed, at, kAccept, sibling) * guess[token] < target[token]) return {token, child};
    subtract(target, guess, a.V);
    if (a.drawn != kWithout) continue;
    guess[token] = 0;
    const double rest = sum_of(guess, a.V);
    if (!(rest > 0)) break;
    divide(guess, a.V, rest);
  }
  return {draw(target, a.V, uniform(seed, at, kResidual, 0)), -1};
}

template <class T>
void walk(const VerifyArgs& a, Team& team) {
  double* const target = static_cast<double*>(a.scratch) + 2 * a.V * team.id;
  for (int64_t b = take(team); b < a.B; b = take(team)) {
    const Tree tree{a.tokens + b * a.T, a.parents + b * a.T, a.n_rows[b]};
    int32_t* const path = a.path + b * a.T;
    int64_t steps = 0;
    for (int64_t row = 0; row >= 0;) {
      const Choice made = choose<T>(a, tree, b, row, steps, target, target + a.V);
      path[steps++] = int32_t(row);
      a.bonus[b] = made.token, row = made.next;
    }
    a.count[b] = int32_t(steps);
    for (; steps < a.T; ++steps) path[steps] = -1;
  }
}

void verify(const void* p, Team& team) {
  const VerifyArgs& a = *static_cast<const VerifyArgs*>(p);
  a.dtype == kF32 ? walk<float>(a, team) : walk<bf16>(a, team);
}

int64_t verify_scratch(const void* p, int threads) {
  const VerifyArgs& a = *static_cast<const VerifyArgs*>(p);
  return a.argmax ? 0 : threads * 2 * a.V * int64_t(sizeof(double));
}

double wide(double x) { return x; }
double wide(float x) { return double(x); }
double wide(bf16 x) { return double(widen(x)); }

template <class T>
void residual(const ResidualArgs& a, Team& team) {
  double* const p = static_cast<double*>(a.scratch) + 2 * a.V * team.id;
  double* const q = p + a.V;
  for (int64_t r = take(team); r < a.rows; r = take(team)) {
    for (int64_t i = 0; i < a.V; ++i) {
      p[i] = wide(static_cast<const T*>(a.p)[r * a.p_stride + i]);
      q[i] = wide(static_cast<const T*>(a.q)[r * a.q_stride + i]);
    }
    subtract(p, q, a.V);
    a.ids[r] = draw(p, a.V, a.u[r]);
  }
}

void residual_sample(const void* p, Team& team) {
  const ResidualArgs& a = *static_cast<const ResidualArgs*>(p);
  a.dtype == kF64 ? residual<double>(a, team) : a.dtype == kF32 ? residual<float>(a, team) : residual<bf16>(a, team);
}

int64_t residual_scratch(const void* p, int threads) {
  return threads * 2 * static_cast<const ResidualArgs*>(p)->V * int64_t(sizeof(double));
}

// Weights are computed twice where the draw falls instead of kept: a row in f64 would leave the first cache.
int32_t draw_of(const DrawArgs& a) {
  Vec top = Vec::set(kMasked);
  for (int64_t j = 0; j < a.V; j += L) top = max(load_part(a.logits + j, a.V - j, kMasked), top);
  const Vec heat = Vec::set(a.temperature), most = Vec::set(hmax(top)) / heat;
  const auto weights = [&](int64_t j) { return exp(load_part(a.logits + j, a.V - j, kMasked) / heat - most); };
  double* const sums = static_cast<double*>(a.scratch);
  double total = 0;
  for (int64_t j = 0; j < a.V; j += kStatsBlock) {
    const int64_t end = j + kStatsBlock < a.V ? j + kStatsBlock : a.V;
    Vec sum = Vec::set(0.f);
    for (int64_t i = j; i < end; i += L) sum = sum + weights(i);
    total += sums[j / kStatsBlock] = hsum(sum);
  }
  if (!(total < __builtin_inf())) return -1;
  const double target = uniform(a.seed, a.index, kSample, 0) * total;  // below the total: the number is below 1
  double before = 0;
  int64_t j = 0;
  for (; before + sums[j / kStatsBlock] <= target; j += kStatsBlock) before += sums[j / kStatsBlock];
  int64_t last = j;
  float e[L];
  for (int64_t i = j; i < a.V && i < j + kStatsBlock; i += L) {
    weights(i).store(e);
    for (int k = 0; k < L && i + k < a.V; ++k) {
      if (e[k] > 0) last = i + k;
      before += e[k];
      if (before > target) return int32_t(last);
    }
  }
  return int32_t(last);  // the sums of a block and within it round differently
}

void draw_row(const void* p, Team& team) {
  const DrawArgs& a = *static_cast<const DrawArgs*>(p);
  if (team.id == 0) *a.token = draw_of(a);
}

int64_t draw_scratch(const void* p, int) {
  return (static_cast<const DrawArgs*>(p)->V + kStatsBlock - 1) / kStatsBlock * int64_t(sizeof(double));
}

}  // namespace

extern const KernelRow sample_kernels[];
const KernelRow sample_kernels[] = {{kVerify, verify, verify_scratch},
                                    {kResidualSample, residual_sample, residual_scratch},
                                    {kDraw, draw_row, draw_scratch},
                                    {-1, nullptr, nullptr}};

}  // namespace ramify::RAMIFY_ISA
