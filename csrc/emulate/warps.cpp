// csrc/emulate/warps.cpp: what the 32 lanes of a warp do together, asynchronous copies, fences and atomics.
#include <cstdio>

#include "emulate/core.h"
#include "emulate/runtime.h"

namespace emulate {
namespace {

const char* const kNames[] = {"__syncwarp", "shuffle", "ballot", "reduce", "mma", "ldmatrix", "wgmma", "setmaxnreg"};

struct Words {  // 16 bits to float
  float half[1 << 16], bf16[1 << 16];
  Words() {
    for (uint32_t i = 0; i < 1 << 16; ++i) half[i] = __half2float(__half(__half_raw{uint16_t(i)})), bf16[i] = __uint_as_float(i << 16);
  }
};

struct MmaIo {
  uint32_t a[4], b[2];
  float c[4];
};

// D[16, 8] = A[16, 16] B[16, 8] + C. Lane g * 4 + t holds of A rows g and g + 8, columns 2t, 2t + 1 and both + 8; of B column g, the
// same four rows; of C rows g and g + 8, columns 2t and 2t + 1 (PTX ISA, mma.m16n8k16). The sum runs over k from 0, in f32.
void multiply(Slot* slots, const float* widen) {
  float A[16][16], B[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaIo& io = *reinterpret_cast<const MmaIo*>(slots[lane].bytes);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r)
      for (int e = 0; e < 2; ++e) A[g + 8 * (r & 1)][2 * t + 8 * (r >> 1) + e] = widen[io.a[r] >> (16 * e) & 0xFFFF];
    for (int r = 0; r < 2; ++r)
      for (int e = 0; e < 2; ++e) B[2 * t + 8 * r + e][g] = widen[io.b[r] >> (16 * e) & 0xFFFF];
  }
  for (int lane = 0; lane < 32; ++lane) {
    MmaIo& io = *reinterpret_cast<MmaIo*>(slots[lane].bytes);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      const int row = g + 8 * (r >> 1), column = 2 * t + (r & 1);
      float sum = io.c[r];
      for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
      io.c[r] = sum;
    }
  }
}
const Words& words() {
  static const Words table;
  return table;
}
void multiply_half(unsigned, Slot* slots) { multiply(slots, words().half); }
void multiply_bf16(unsigned, Slot* slots) { multiply(slots, words().bf16); }

// Matrix i is the eight rows of 16 bytes that lanes 8i to 8i + 7 brought; lane g * 4 + t receives of each its row g, elements 2t
// and 2t + 1, or those of the transposed matrix (PTX ISA, ldmatrix).
template <bool kTransposed>
void spread(unsigned, Slot* slots) {
  uint16_t in[32][8];
  for (int lane = 0; lane < 32; ++lane) memcpy(in[lane], slots[lane].bytes, 16);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < 2; ++e) {
        const int row = lane / 4, column = lane % 4 * 2 + e;
        const uint16_t x = kTransposed ? in[8 * i + column][row] : in[8 * i + row][column];
        memcpy(slots[lane].bytes + 4 * i + 2 * e, &x, 2);
      }
}

template <int kOperation>
void combine(unsigned mask, Slot* slots) {
  bool first = true;
  uint32_t all = 0, x;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    memcpy(&x, slots[lane].bytes, 4);
    all = first             ? x
          : kOperation == 0 ? std::max(all, x)
          : kOperation == 1 ? std::min(all, x)
          : kOperation == 2 ? all + x
          : kOperation == 3 ? all | x
                            : uint32_t(std::max(int32_t(all), int32_t(x)));
    first = false;
  }
  for (int lane = 0; lane < 32; ++lane) memcpy(slots[lane].bytes, &all, 4);
}

}  // namespace

int lane() { return fiber->lane; }

void land(const Copy& c) {
  memcpy(c.to, c.from, size_t(c.bytes));
  memset(static_cast<char*>(c.to) + c.bytes, 0, size_t(c.filled - c.bytes));
}

void warp_step(unsigned mask, Step step, void* io, size_t bytes, Finish finish, int from, bool fences, Site site) {
  Fiber& f = *fiber;
  std::list<Op>& ops = block->ops[f.warp];
  Op* op = nullptr;
  {
    Quiet quiet;
    const char* const name = kNames[step];
    if (!(mask >> f.lane & 1)) fail("%s at %s: lane %d is not in its own mask %#x", name, place(site).c_str(), f.lane, mask);
    for (int other = 0; other < 32; ++other) {
      const size_t index = size_t(f.warp) * 32 + other;
      if ((mask >> other & 1) && (index >= block->fibers.size() || block->fibers[index].state == kDone))
        fail("%s at %s: mask %#x names lane %d, which has ended or was never there", name, place(site).c_str(), mask, other);
    }
    for (Op& each : ops)
      if (!each.complete() && (each.mask & mask)) op = &each;
    if (op && (op->mask != mask || op->step != step || op->site.line != site.line || strcmp(op->site.file, site.file)))
      fail("divergent warp step: lane %d of warp %d at %s %s with mask %#x, others at %s %s with mask %#x", f.lane, f.warp, name,
           place(site).c_str(), mask, kNames[op->step], place(op->site).c_str(), op->mask);
    if (!op) {
      ops.emplace_back();
      op = &ops.back();
      op->mask = mask, op->got = op->seen = 0, op->step = step, op->site = site;
    }
    if (bytes) memcpy(op->slot[f.lane].bytes, io, bytes);
    op->got |= 1u << f.lane;
    f.site = site;
    if (fences) release(&op->sync);
    if (!op->complete()) {
      park(kAtWarp);
    } else {
      if (finish) finish(mask, op->slot);
      for (int other = 0; other < 32; ++other)
        if (other != f.lane && (mask >> other & 1)) wake(block->fibers[size_t(f.warp) * 32 + other]);
    }
    if (from >= 0 && !(mask >> from & 1))
      fail("%s at %s: lane %d reads lane %d, which is not in mask %#x", name, place(site).c_str(), f.lane, from, mask);
    if (bytes) memcpy(io, op->slot[from < 0 ? f.lane : from].bytes, bytes);
  }
  if (fences) acquire(&op->sync);
  Quiet quiet;
  op->seen |= 1u << f.lane;
  if (op->seen == mask) ops.remove_if([op](const Op& each) { return &each == op; });
}

uint32_t reduce(unsigned mask, uint32_t value, int operation, Site site) {
  static const Finish all[] = {combine<0>, combine<1>, combine<2>, combine<3>, combine<4>};
  warp_step(mask, operation == 3 ? kBallot : kReduce, &value, 4, all[operation], -1, false, site);
  return value;
}

void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool half, Site site) {
  MmaIo io;
  memcpy(io.a, a, 16), memcpy(io.b, b, 8), memcpy(io.c, c, 16);
  warp_step(~0u, kMma, &io, sizeof(io), half ? multiply_half : multiply_bf16, -1, false, site);
  memcpy(c, io.c, 16);
}

void load_matrix(uint32_t* r, int count, const void* row, bool transposed, Site site) {
  unsigned char io[16] = {};
  {
    Quiet quiet;
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix at %s: row %p is not aligned to 16 bytes", place(site).c_str(), row);
  }
  if (fiber->lane < 8 * count) {
    saw_read(row, 16);
    Quiet quiet;
    memcpy(io, row, 16);
  }
  warp_step(~0u, kLoadMatrix, io, 16, transposed ? spread<true> : spread<false>, -1, false, site);
  memcpy(r, io, size_t(count) * 4);
}

void copy_async(void* to, const void* from, int bytes, int filled, Site site) {
  if (bytes) saw_read(from, size_t(bytes));
  saw_write(to, size_t(filled));
  Quiet quiet;
  if (reinterpret_cast<uintptr_t>(to) % size_t(filled) || (bytes && reinterpret_cast<uintptr_t>(from) % size_t(filled)) || bytes > filled)
    fail("cp.async at %s: %d of %d bytes from %p to %p; takes addresses aligned to the size", place(site).c_str(), bytes, filled, from, to);
  const Copy copy = {to, from, bytes, filled};
  land(copy);  // an address outside its buffer shows here, at the line that asked for it
  if (!schedule.late) return;
  memset(to, 0xFF, size_t(filled));
  fiber->copies.back().push_back(copy);
}

void copy_commit() {
  Quiet quiet;
  fiber->copies.emplace_back();
}

void copy_wait(int groups_left) {
  Quiet quiet;
  auto& groups = fiber->copies;
  while (int(groups.size()) - 1 > groups_left) {
    for (const Copy& c : groups.front()) land(c);
    groups.erase(groups.begin());
  }
}

void check_copies_landed(const Fiber& f) {
  size_t open = 0;
  for (const auto& group : f.copies) open += group.size();
  if (open) fail("thread %d ends with %zu asynchronous copies under way", f.index, open);
}

// A fence orders what came before it with the thread's next atomic, and the thread's last atomic with what comes after it: the
// pattern of "write, fence, count; count, fence, read". An atomic alone orders nothing.
void fence() {
  fiber->fenced = true;
  if (fiber->touched) acquire(fiber->touched);
}
void before_atomic(void* address) {
  if (fiber->fenced) release(address);
}
void after_atomic(void* address) { fiber->touched = address; }

}  // namespace emulate
