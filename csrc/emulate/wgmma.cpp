// csrc/emulate/wgmma.cpp: the products of a warpgroup. Operands are found through their descriptors and swizzles, bit by bit.
//
// A warp asks for its 16 rows of a product when all 32 lanes have come. Until it waits for them, its accumulators hold 0xFF. Operands are
// read when it waits (the latest legal moment; another warp may have waited long ago), or at once (the earliest).
#include "emulate/hopper_state.h"
#include "emulate/runtime.h"

namespace emulate {
namespace {

constexpr int kKey = 16;  // k of one product

struct Widen {  // 16 bits to float
  float of[2][1 << 16];
  Widen() {
    for (uint32_t i = 0; i < 1 << 16; ++i) of[0][i] = __uint_as_float(i << 16), of[1][i] = __half2float(__half(__half_raw{uint16_t(i)}));
  }
};
const float* widen(bool half) {
  static const Widen table;
  return table.of[half];
}

// A matrix in shared memory. Without a swizzle the unit is a core matrix, 8 rows of 16 bytes; with one of W bytes, 8 rows of W bytes.
// A row belongs to one m or n and runs along k, or, transposed, belongs to one k and runs along m or n.
struct Operand {
  unsigned start, leading, stride, width;  // bytes; width 0: no swizzle
  bool transposed;
  Operand(uint64_t word, bool transposed, Site site) : transposed(transposed) {
    start = unsigned(word & 0x3FFF) << 4, leading = unsigned(word >> 16 & 0x3FFF) << 4, stride = unsigned(word >> 32 & 0x3FFF) << 4;
    const unsigned mode = unsigned(word >> 62);
    width = mode ? 256u >> mode : 0;
    if (word & 0x3FFFC000C000C000u)
      fail("wgmma at %s: descriptor %#llx has bits where none belong", place(site).c_str(), (unsigned long long)word);
    if (width && start % (8 * width) >= width)
      fail("wgmma at %s: a tile at %#x begins inside a group of 8 rows of %u bytes", place(site).c_str(), start, width);
  }
  // Of the 16-byte word that holds this m or n and k, a multiple of 8 of the one that runs along the rows.
  unsigned address(unsigned mn, unsigned k) const {
    if (!width)
      return start + (transposed ? mn / 8 * stride + k % 8 * 16 + k / 8 * leading : mn % 8 * 16 + mn / 8 * stride + k / 8 * leading);
    const unsigned across = width / 2;
    const unsigned at = start + (transposed ? mn % across * 2 + mn / across * leading + k % 8 * width + k / 8 * stride
                                            : mn % 8 * width + mn / 8 * stride + k * 2);
    return at ^ (at >> 3 & (width - 16));
  }
};

// call(offset in dynamic shared memory, m or n, k) for the 16-byte words of `count` rows or columns from `first` on.
template <class Call>
void each_word(const Operand& o, unsigned first, unsigned count, Site site, Call call) {
  const unsigned base = shared_address(dynamic());
  for (unsigned mn = 0; mn < count; mn += o.transposed ? 8 : 1)
    for (unsigned k = 0; k < kKey; k += o.transposed ? 1 : 8) {
      const unsigned at = o.address(first + mn, k) - base;
      if (at > block->dynamic_bytes || 16 > block->dynamic_bytes - at)
        fail("wgmma at %s: row %u, k %u of an operand lies at byte %d of %zu of shared memory", place(site).c_str(), first + mn, k, int(at),
             block->dynamic_bytes);
      call(at, mn, k);
    }
}

void gather(const Operand& o, unsigned first, unsigned count, const float* wide, std::vector<float>& out, Site site) {
  const unsigned char* const seen = hopper().seen.data();
  out.resize(size_t(count) * kKey);
  each_word(o, first, count, site, [&](unsigned at, unsigned mn, unsigned k) {
    uint16_t bits[8];
    memcpy(bits, seen + at, 16);
    for (unsigned i = 0; i < 8; ++i) out[size_t(o.transposed ? mn + i : mn) * kKey + (o.transposed ? k : k + i)] = wide[bits[i]];
  });
}

// Lane 4 g + t holds of D rows g + 8 i, columns 8 j + 2 t + e in element 4 j + 2 i + e; of A in registers, as of mma.m16n8k16.
void run(Pending& p, int warp) {
  const Product& w = p.product;
  const float* const wide = widen(w.half);
  static std::vector<float> A, B;
  if (w.registers) {
    A.resize(16 * kKey);
    for (int lane = 0; lane < 32; ++lane)
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < 2; ++e)
          A[size_t(lane / 4 + 8 * (r & 1)) * kKey + lane % 4 * 2 + 8 * (r >> 1) + e] = wide[p.registers[lane][r] >> (16 * e) & 0xFFFF];
  } else {
    gather(Operand(w.a, w.trans_a, w.site), unsigned(warp % 4) * 16, 16, wide, A, w.site);
  }
  gather(Operand(w.b, w.trans_b, w.site), 0, unsigned(w.N), wide, B, w.site);
  for (int lane = 0; lane < 32; ++lane)
    for (int n = 0; n < w.N / 2; ++n) {
      const float* const a = &A[size_t(lane / 4 + 8 * (n >> 1 & 1)) * kKey];
      const float* const b = &B[size_t(n / 4 * 8 + lane % 4 * 2 + (n & 1)) * kKey];
      float& sum = p.sum[size_t(lane * (w.N / 2) + n)];
      float x = w.add ? sum : 0;
      for (int k = 0; k < kKey; ++k) x += a[k] * b[k];
      sum = x;
    }
  p.done = true;
}

bool same(const Product& a, const Product& b) {
  return a.a == b.a && a.b == b.b && a.N == b.N && !a.registers == !b.registers && a.half == b.half && a.trans_a == b.trans_a &&
         a.trans_b == b.trans_b && a.add == b.add && a.site.line == b.site.line;
}

// The lanes have left what they ask for; the last one to come notes it for the warp.
void ask(unsigned, Slot* slots) {
  Product all[32];
  for (int lane = 0; lane < 32; ++lane) memcpy(&all[lane], slots[lane].bytes, sizeof(Product));
  const Product& first = all[0];
  const int warp = fiber->warp;
  Hopper& h = hopper();
  WarpProducts& own = h.warps[size_t(warp)];
  for (const Product& each : all)
    if (!same(each, first)) fail("wgmma at %s: the lanes of warp %d differ", place(first.site).c_str(), warp);
  if (size_t(warp / 4 * 4 + 3) >= h.warps.size()) fail("wgmma at %s: warp %d has no whole warpgroup", place(first.site).c_str(), warp);
  auto& log = h.issued[size_t(warp / 4)];
  if (own.issued == log.size()) log.push_back(first);
  if (!same(first, log[own.issued]))
    fail("wgmma at %s: warp %d and the other warps of its warpgroup (at %s) differ", place(first.site).c_str(), warp,
         place(log[own.issued].site).c_str());
  ++own.issued;
  if (!own.fenced) fail("wgmma at %s: no wgmma_fence since this warp last could write its registers", place(first.site).c_str());
  Pending p;
  p.product = first, p.done = false;
  for (int lane = 0; lane < 32; ++lane) p.d[lane] = all[lane].d, p.registers[lane] = all[lane].registers;
  const size_t each = size_t(first.N / 2);
  p.sum.resize(32 * each);
  const Pending* before = nullptr;
  for (const auto& group : own.groups)
    for (const Pending& other : group)
      if (other.d[0] == p.d[0]) before = &other;
  if (before && before->sum.size() != p.sum.size())
    fail("wgmma at %s: accumulators of another shape are pending", place(first.site).c_str());
  for (size_t lane = 0; lane < 32; ++lane) {
    if (!before) memcpy(&p.sum[lane * each], p.d[lane], 4 * each);
    memset(p.d[lane], 0xFF, 4 * each);
  }
  if (!first.registers) Operand(first.a, first.trans_a, first.site);
  Operand(first.b, first.trans_b, first.site);
  if (!schedule.late) {
    if (before) p.sum = before->sum;
    run(p, warp);
  }
  own.groups.back().push_back(std::move(p));
}

// The product is over: its sums go to the pending one that adds to them, or to the registers.
void retire(Pending& p, int warp, const std::vector<Pending*>& later) {
  if (!p.done) run(p, warp);
  for (Pending* next : later) {
    if (next->d[0] != p.d[0]) continue;
    if (!next->done) next->sum = p.sum;
    return;
  }
  const size_t each = size_t(p.product.N / 2);
  for (size_t lane = 0; lane < 32; ++lane) memcpy(p.d[lane], &p.sum[lane * each], 4 * each);
}

void end_groups(int left) {
  WarpProducts& own = hopper().warps[size_t(fiber->warp)];
  own.fenced = false;
  std::vector<Pending*> all;
  for (auto& group : own.groups)
    for (Pending& p : group) all.push_back(&p);
  for (; int(own.groups.size()) - 1 > left; own.groups.erase(own.groups.begin())) {
    for (Pending& p : own.groups.front()) {
      all.erase(all.begin());
      retire(p, fiber->warp, all);
    }
  }
}

}  // namespace

void wgmma(const Product& product) {
  Product io = product;
  static_assert(sizeof(io) <= kSlotBytes, "a lane's request fits its slot");
  warp_step(~0u, kWgmma, &io, sizeof(io), ask, -1, false, product.site);
#if defined(EMULATE_TSAN)  // each lane reads its share: a missing barrier before or behind the product is a race
  const auto watch = [&](uint64_t word, bool transposed, unsigned first, unsigned count) {
    unsigned n = 0;
    each_word(Operand(word, transposed, product.site), first, count, product.site, [&](unsigned at, unsigned, unsigned) {
      if (n++ % 32 == unsigned(fiber->lane)) saw_read(static_cast<char*>(dynamic()) + at, 16);
    });
  };
  if (!product.registers) watch(product.a, product.trans_a, unsigned(fiber->warp) % 4 * 16, 16);
  watch(product.b, product.trans_b, 0, unsigned(product.N));
#endif
}

void wgmma_fence() {
  const Finish note = [](unsigned, Slot*) { hopper().warps[size_t(fiber->warp)].fenced = true; };
  warp_step(~0u, kWgmma, nullptr, 0, note, -1, false, {"wgmma_fence", 0});
}

void wgmma_commit() {
  const Finish note = [](unsigned, Slot*) { hopper().warps[size_t(fiber->warp)].groups.emplace_back(); };
  warp_step(~0u, kWgmma, nullptr, 0, note, -1, false, {"wgmma_commit", 0});
}

// Orders the warp's memory: all that its products read was read before.
void wgmma_wait(int groups_left) {
  const Finish end = [](unsigned, Slot* slots) {
    int left;
    memcpy(&left, slots[0].bytes, sizeof(left));
    end_groups(left);
  };
  warp_step(~0u, kWgmma, &groups_left, sizeof(groups_left), end, -1, true, {"wgmma_wait", 0});
}

void check_products_waited(const Fiber& f) {
  if (!block->hopper) return;
  size_t open = 0;
  for (const auto& group : hopper().warps[size_t(f.warp)].groups) open += group.size();
  if (open) fail("thread %d ends with %zu wgmma that were not waited for", f.index, open);
}

}  // namespace emulate
