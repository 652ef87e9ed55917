// csrc/emulate/hopper.cpp: mbarriers, bulk copies, the async proxy's view of shared memory, named barriers, setmaxnreg.
//
// Late     a copy that counts on an mbarrier fills its target with 0xFF and lands when some thread waits for the phase and nothing but
//          copies is missing from it: the latest legal moment. Otherwise it lands at once.
// Proxies  wgmma and bulk copies see shared memory through a copy of it. A bulk copy writes both; what threads store, and what cp.async
//          brings, enters the copy with the next fence_async of a thread.
#include "emulate/hopper_state.h"
#include "emulate/runtime.h"

namespace emulate {
namespace {

constexpr unsigned kDynamicBase = 1024 + 128;  // where dynamic shared memory begins: no kernel may count on more than 128
constexpr long kMostBytes = (1 << 20) - 1;
constexpr int kRegisterFile = 65536;

Phases& phases(void* bar, const char* what, Site site) {
  auto& all = hopper().barriers;
  const auto found = all.find(bar);
  if (found == all.end()) fail("%s at %s: no mbarrier was initialised there", what, place(site).c_str());
  return found->second;
}

void land_all(Phases& p) {
  for (const Landing& each : p.landings) {
    for (const Copy& copy : each.copies) {
      land(copy);
      if (each.bulk) memcpy(seen_at(copy.to, size_t(copy.bytes), "copy", {"", 0}), copy.from, size_t(copy.bytes));
    }
    if (each.bulk)
      p.bytes -= each.copies.front().bytes;
    else
      --p.pending;
  }
  p.landings.clear();
}

// Arrivals that come with copies which have not landed.
long deferred(const Phases& p) {
  long n = 0;
  for (const Landing& each : p.landings) n += !each.bulk;
  return n;
}

// Ends the phase if nothing is missing from it, or if someone waits and nothing but copies is.
void settle(Phases& p) {
  const long threads = deferred(p);
  const bool early = !schedule.late, wanted = !p.waiting.empty() && (threads || p.bytes);
  if (early || (wanted && p.pending == threads)) land_all(p);
  if (p.pending || p.bytes) return;
  ++p.phase, p.pending = p.count;
  for (const int i : p.waiting) wake(block->fibers[size_t(i)]);
  p.waiting.clear();
}

}  // namespace

void forget(Hopper* state) { delete state; }

Hopper& hopper() {
  if (!block->hopper) {
    block->hopper.reset(new Hopper);
    Hopper& h = *block->hopper;
    const size_t warps = (block->fibers.size() + 31) / 32;
    h.seen.assign(block->dynamic_bytes, 0xFF), h.warps.resize(warps), h.issued.resize((warps + 3) / 4);
  }
  return *block->hopper;
}

unsigned char* seen_at(const void* p, size_t n, const char* what, Site site) {
  const size_t at = size_t(static_cast<const char*>(p) - static_cast<const char*>(dynamic()));
  if (at > block->dynamic_bytes || n > block->dynamic_bytes - at)
    fail("%s at %s: %zu bytes at %p are not in dynamic shared memory", what, place(site).c_str(), n, p);
  return hopper().seen.data() + at;
}

unsigned shared_address(const void* p) {
  Quiet quiet;
  return kDynamicBase + unsigned(static_cast<const char*>(p) - static_cast<const char*>(dynamic()));
}

void mbar_init(void* bar, unsigned count, Site site) {
  Quiet quiet;
  if (reinterpret_cast<uintptr_t>(bar) % 8 || count == 0 || count >= 1 << 20)
    fail("mbarrier init at %s: count %u at %p; takes 1 or more at a multiple of 8 bytes", place(site).c_str(), count, bar);
  Phases fresh;
  fresh.count = count, fresh.pending = count, fresh.generation = block->generation;
  if (!hopper().barriers.emplace(bar, std::move(fresh)).second) fail("mbarrier init at %s: there is one already", place(site).c_str());
}

void mbar_arrive(void* bar, unsigned expected, Site site) {
  Phases* p;
  {
    Quiet quiet;
    p = &phases(bar, "mbarrier arrive", site);
  }
  release(p->sync.get());
  Quiet quiet;
  if (p->pending <= deferred(*p)) fail("mbarrier arrive at %s: more arrivals than the %u it was made for", place(site).c_str(), p->count);
  --p->pending, p->bytes += expected;
  if (p->bytes > kMostBytes) fail("mbarrier arrive at %s: %ld bytes expected; takes %ld", place(site).c_str(), p->bytes, kMostBytes);
  settle(*p);
}

void mbar_arrive_copies(void* bar, Site site) {
  Phases* p;
  {
    Quiet quiet;
    p = &phases(bar, "mbarrier arrive", site);
  }
  release(p->sync.get());
  Quiet quiet;
  if (p->pending <= deferred(*p)) fail("mbarrier arrive at %s: more arrivals than the %u it was made for", place(site).c_str(), p->count);
  Landing landing = {{}, false};
  for (const auto& group : fiber->copies) landing.copies.insert(landing.copies.end(), group.begin(), group.end());
  fiber->copies.assign(1, {});
  p->landings.push_back(std::move(landing));
  settle(*p);
}

void mbar_wait(void* bar, unsigned parity, Site site) {
  Phases* p;
  {
    Quiet quiet;
    p = &phases(bar, "mbarrier wait", site);
    fiber->site = site;
    while ((p->phase & 1) == (parity & 1)) {
      p->waiting.push_back(fiber->index);
      settle(*p);
      park(kAtPhase);  // woken already if this wait let the copies land
    }
  }
  acquire(p->sync.get());
}

void copy_bulk(void* to, const void* from, unsigned bytes, void* bar, Site site) {
  Phases* p;
  {
    Quiet quiet;
    p = &phases(bar, "bulk copy", site);
    if (!p->published)
      fail("bulk copy at %s: no fence_async between the initialisation of its mbarrier and __syncthreads", place(site).c_str());
    if (reinterpret_cast<uintptr_t>(from) % 16 || shared_address(to) % 16 || bytes % 16 || bytes == 0)
      fail("bulk copy at %s: %u bytes from %p to %#x; takes multiples of 16", place(site).c_str(), bytes, from, shared_address(to));
  }
  saw_read(from, bytes);
  saw_write(to, bytes);
  release(p->sync.get());
  Quiet quiet;
  unsigned char* const view = seen_at(to, bytes, "bulk copy", site);
  const Copy copy = {to, from, int(bytes), int(bytes)};
  land(copy);  // an address outside its buffer shows here, at the line that asked for it
  memset(to, 0xFF, bytes), memset(view, 0xFF, bytes);
  p->landings.push_back({{copy}, true});
  settle(*p);
}

void fence_async() {
  Quiet quiet;
  Hopper& h = hopper();
  if (block->dynamic_bytes) memcpy(h.seen.data(), dynamic(), block->dynamic_bytes);
  for (auto& [bar, p] : h.barriers) p.published |= p.generation == block->generation;
}

bool named_barrier(int id, int threads, bool own, bool waits, Site site) {
  Named* b;
  int turn;
  {
    Quiet quiet;
    if (id < 1 || id > 15 || threads < 32 || threads % 32 || threads > int(block->fibers.size()))
      fail("named barrier at %s: id %d of %d threads; takes 1 to 15, and whole warps of the block", place(site).c_str(), id, threads);
    b = &hopper().named[id];
    if (b->arrived && b->threads != threads)
      fail("named barrier %d at %s: %d threads, others say %d", id, place(site).c_str(), threads, b->threads);
    b->threads = threads, turn = b->generation & 1, fiber->site = site;
  }
  release(&b->sync[turn]);
  {
    Quiet quiet;
    if (b->arrived == 0) b->any[turn] = false;
    b->any[turn] |= own;
    if (++b->arrived == threads) {
      b->arrived = 0, ++b->generation;
      for (const int i : b->waiting) wake(block->fibers[size_t(i)]);
      b->waiting.clear();
    } else if (waits) {
      b->waiting.push_back(fiber->index);
      park(kAtNamed);
    }
  }
  if (waits) acquire(&b->sync[turn]);
  return b->any[turn];
}

// All 32 lanes ask, and all four warps of a warpgroup ask for the same.
void set_registers(int count, bool up, Site site) {
  int wanted = up ? count : -count;
  warp_step(~0u, kSetRegisters, &wanted, sizeof(wanted), nullptr, -1, false, site);
  Quiet quiet;
  if (count < 24 || count > 256 || count % 8)
    fail("setmaxnreg at %s: %d registers; takes a multiple of 8 from 24 to 256", place(site).c_str(), count);
  if (fiber->lane == 0) hopper().warps[size_t(fiber->warp)].limits.push_back(wanted);
}

void check_block_ended() {
  if (!block->hopper) return;
  Hopper& h = *block->hopper;
  for (const auto& [bar, p] : h.barriers)
    if (!p.landings.empty()) fail("the block ends with copies under way that nobody waited for");
  int registers = 0;
  for (size_t w = 0; w < h.warps.size(); ++w) {
    const WarpProducts &own = h.warps[w], &first = h.warps[w / 4 * 4];
    if (own.issued != first.issued) fail("warp %zu took part in %zu wgmma, warp %zu in %zu", w, own.issued, w / 4 * 4, first.issued);
    if (own.limits != first.limits) fail("setmaxnreg: warp %zu and warp %zu of one warpgroup differ", w, w / 4 * 4);
    registers += own.limits.empty() ? 0 : 32 * std::abs(own.limits.back());
  }
  if (registers > kRegisterFile) fail("setmaxnreg: %d registers in all; takes %d", registers, kRegisterFile);
}

}  // namespace emulate
