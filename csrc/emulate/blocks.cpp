// csrc/emulate/blocks.cpp: runs a grid. Blocks one after the other, every CUDA thread a fiber, switched where CUDA threads meet.
//
// Orders   blocks and ready threads are taken forward, in reverse, or at random by a seed. A kernel that is right gives the
//          same bits in all of them.
// Shared   a fresh heap block for every array and CUDA block, of its exact size, filled with 0xFF bytes: a NaN, an index far
//          outside, or -1.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <new>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "emulate/core.h"
#include "emulate/runtime.h"

namespace emulate {

Thread* current;
Block* block;
Fiber* fiber;

namespace {

#if defined(EMULATE_ASAN) || defined(EMULATE_TSAN)
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 256 << 10;
#endif
constexpr size_t kMostShared = 227 << 10, kFreeShared = 48 << 10;  // bytes a block may have at all, and without asking
constexpr size_t kAlign = 128;                                     // of shared memory
constexpr int kMostPauses = 1 << 20;

std::vector<char*> spare_stacks;
const std::function<void()>* body;
bool failed;
char start_sync, done_sync;
void* main_stack_pointer;
#if defined(EMULATE_TSAN)
constexpr size_t kMostRetired = 4000;  // the sanitizer knows some 8000 threads at a time
void* main_sanitizer;
std::vector<void*> retired;  // fibers of ended threads: while they live, what they did can still race with later blocks
void bury() {
  for (void* f : retired) __tsan_destroy_fiber(f);
  retired.clear();
}
#endif

#if defined(__x86_64__)
extern "C" void emulate_swap(void** save, void* next);
asm(R"(
.text
.globl emulate_swap
.hidden emulate_swap
.type emulate_swap, @function
emulate_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulate_swap, .-emulate_swap
)");
void* prepare(char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 2;
  *top = reinterpret_cast<void*>(entry);  // what `ret` finds; the stack is then aligned as after a call
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}
void swap(void** save, void* next) { emulate_swap(save, next); }
#else
void* prepare(char* stack, void (*entry)()) {
  ucontext_t* context = reinterpret_cast<ucontext_t*>(stack);
  getcontext(context);
  context->uc_stack = {stack + sizeof(ucontext_t), 0, kStack - sizeof(ucontext_t)};
  makecontext(context, entry, 0);
  return context;
}
void swap(void** save, void* next) {
  ucontext_t own;
  if (!*save) *save = &own;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(next));
  if (*save == &own) *save = nullptr;
}
#endif

// Between the scheduler and a fiber. `last`: the one that is left never runs again.
void to_fiber(Fiber& f) {
  fiber = &f, current = &f.thread;
#if defined(EMULATE_TSAN)
  __tsan_switch_to_fiber(f.sanitizer, 1);
#elif defined(EMULATE_ASAN)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f.stack, kStack);
#endif
  swap(&main_stack_pointer, f.stack_pointer);
#if defined(EMULATE_ASAN)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  fiber = nullptr, current = nullptr;
}

#if defined(EMULATE_ASAN)
const void* main_stack;
size_t main_stack_size;
#endif

void to_main(Fiber& f, bool last) {
#if defined(EMULATE_TSAN)
  const bool quiet = schedule.coarse && !last;  // the threads of a block share one state of the sanitizer
  if (quiet) AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  __tsan_switch_to_fiber(main_sanitizer, 1);
#elif defined(EMULATE_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &f.sanitizer, main_stack, main_stack_size);
#else
  (void)last;
#endif
  swap(&f.stack_pointer, main_stack_pointer);
#if defined(EMULATE_TSAN)
  if (quiet) AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#elif defined(EMULATE_ASAN)
  __sanitizer_finish_switch_fiber(f.sanitizer, &main_stack, &main_stack_size);
#endif
}

void run_fiber() {
#if defined(EMULATE_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_size);
#endif
  Fiber& f = *fiber;
  acquire(&start_sync);
  (*body)();
  release(&done_sync);
  {
    Quiet quiet;
    check_copies_landed(f);
    check_products_waited(f);
    f.state = kDone, ++block->exited;
    if (block->exited == int(block->fibers.size())) check_block_ended();
    if (block->arrived) fail("thread %d ended while others wait at the barrier at %s", f.index, place(block->barrier).c_str());
  }
  to_main(f, true);
}

char* new_stack() {
#if !defined(EMULATE_TSAN)  // the thread sanitizer would take the next use of a stack for a race with this one
  if (!spare_stacks.empty()) {
    char* p = spare_stacks.back();
    spare_stacks.pop_back();
#if defined(EMULATE_ASAN)
    __asan_unpoison_memory_region(p, kStack);
#endif
    return p;
  }
#endif
  void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fprintf(stderr, "emulate: no memory for the stacks of a block\n"), abort();
  return static_cast<char*>(p);
}

void free_stack(char* stack) {
#if defined(EMULATE_TSAN)
  munmap(stack, kStack);
#else
  spare_stacks.push_back(stack);
#endif
}

int take_ready() {
  std::deque<int>& ready = block->ready;
  if (schedule.order == kRandom) std::swap(ready[schedule.draw(ready.size())], ready.back());
  const bool front = schedule.order == kForward;
  const int i = front ? ready.front() : ready.back();
  front ? ready.pop_front() : ready.pop_back();
  return i;
}

std::string stuck() {
  std::string text;
  int told = 0, waiting = 0;
  for (const Fiber& f : block->fibers) {
    if (f.state == kDone || ++waiting > 4) continue;
    text += std::string(told++ ? "; thread " : "thread ") + std::to_string(f.index) +
            (f.state == kAtWarp    ? " at a warp step "
             : f.state == kAtPhase ? " at an mbarrier "
                                   : " at a barrier ") +
            place(f.site);
  }
  return text + (waiting > 4 ? " and " + std::to_string(waiting - 4) + " more" : "");
}

void run_block(const Launch& how, uint3 index) {
  Block b;
  block = &b;
  const unsigned threads = how.block.x * how.block.y * how.block.z;
  b.fibers.resize(threads);
  b.ops.resize((threads + 31) / 32);
  b.dynamic_bytes = how.dynamic_bytes;
  b.granted = allowed_shared(how.kernel) > 0;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = b.fibers[i];
    f.thread = {{i % how.block.x, i / how.block.x % how.block.y, i / how.block.x / how.block.y}, index, how.block, how.grid};
    f.index = int(i), f.warp = int(i / 32), f.lane = int(i % 32);
    f.copies.emplace_back();
    f.stack = new_stack();
    f.stack_pointer = prepare(f.stack, run_fiber);
#if defined(EMULATE_TSAN)
    f.sanitizer = schedule.coarse && i ? b.fibers[0].sanitizer : __tsan_create_fiber(0);
#endif
    b.ready.push_back(f.index);
  }
  while (!failed && !b.ready.empty()) to_fiber(b.fibers[take_ready()]);
  if (!failed && b.exited < int(threads)) set_failure("%s: nothing can go on: %s", how.name, stuck().c_str()), failed = true;
  for (Fiber& f : b.fibers) {
#if defined(EMULATE_TSAN)
    if (!schedule.coarse || f.index == 0) retired.push_back(f.sanitizer);
#endif
    free_stack(f.stack);
  }
  for (auto& [key, memory] : b.shared) ::operator delete(memory, std::align_val_t(kAlign));
  ::operator delete(b.dynamic, std::align_val_t(kAlign));
#if defined(EMULATE_TSAN)
  if (retired.size() > kMostRetired) bury();
#endif
  block = nullptr;
}

void* poisoned(size_t bytes) { return memset(::operator new(bytes, std::align_val_t(kAlign)), 0xFF, bytes); }

const char* kernel_name;

}  // namespace

std::string place(Site site) {
  const char* name = strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

void fail(const char* format, ...) {
  char text[600];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof(text), format, list);
  va_end(list);
  set_failure("%s, block (%u, %u, %u): %s", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z, text);
  failed = true;
  to_main(*fiber, true);
  abort();  // a failed launch never comes back to its threads
}

void wake(Fiber& f) { f.state = kReady, block->ready.push_back(f.index); }

void park(State state) {
  Fiber& f = *fiber;
  f.state = state;
  to_main(f, false);
}

void barrier(Site site) {
  Fiber& f = *fiber;
  Block& b = *block;
  char* const sync = &b.sync[b.generation & 1];
  {
    Quiet quiet;
    if (b.exited) fail("barrier at %s after %d threads of the block ended", place(site).c_str(), b.exited);
    if (b.arrived && (b.barrier.line != site.line || strcmp(b.barrier.file, site.file)))
      fail("divergent barrier: thread %d at %s, others at %s", f.index, place(site).c_str(), place(b.barrier).c_str());
    b.barrier = f.site = site;
    release(sync);
    if (++b.arrived == int(b.fibers.size())) {
      b.arrived = 0, ++b.generation;
      f.state = kAtBlock;
      for (Fiber& other : b.fibers) wake(other);
      to_main(f, false);
    } else {
      park(kAtBlock);
    }
  }
  acquire(sync);
}

void pause(Site site) {
  Quiet quiet;
  if (++fiber->pauses > kMostPauses) fail("thread %d spins at %s; blocks run one after the other here", fiber->index, place(site).c_str());
  block->ready.push_front(fiber->index);
  to_main(*fiber, false);
}

void* shared(const void* key, size_t bytes) {
  Quiet quiet;
  void*& memory = block->shared[key];
  if (!memory) {
    memory = poisoned(bytes);
    block->static_bytes += bytes;
    const size_t all = block->static_bytes + block->dynamic_bytes, most = block->granted ? kMostShared : kFreeShared;
    if (block->static_bytes > kFreeShared) fail("%zu bytes of RT_SHARED; takes %zu", block->static_bytes, kFreeShared);
    if (all > most) fail("%zu bytes of shared memory; takes %zu", all, most);
  }
  return memory;
}

void* dynamic() {
  Quiet quiet;
  if (!block->dynamic) block->dynamic = poisoned(block->dynamic_bytes);
  return block->dynamic;
}

void launch(const Launch& how, const std::function<void()>& kernel) {
  Quiet quiet;
  kernel_name = how.name;
  const uint64_t threads = uint64_t(how.block.x) * how.block.y * how.block.z, blocks = uint64_t(how.grid.x) * how.grid.y * how.grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || how.grid.y > 65535 || how.grid.z > 65535)
    return set_failure("%s: grid (%u, %u, %u) of %llu threads cannot be launched", how.name, how.grid.x, how.grid.y, how.grid.z,
                       (unsigned long long)threads);
  const size_t limit = std::max(allowed_shared(how.kernel), kFreeShared);
  if (how.dynamic_bytes > limit || how.dynamic_bytes > kMostShared)
    return set_failure("%s: %zu bytes of dynamic shared memory; takes %zu. Use rt::allow_shared.", how.name, how.dynamic_bytes,
                       std::min(limit, kMostShared));
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = schedule.order == kReverse ? blocks - 1 - i : i;
  if (schedule.order == kRandom)
    for (uint64_t i = blocks - 1; i > 0; --i) std::swap(order[i], order[schedule.draw(i + 1)]);
  body = &kernel, failed = false;
#if defined(EMULATE_TSAN)
  main_sanitizer = __tsan_get_current_fiber();
#endif
  release(&start_sync);
  for (uint64_t i = 0; i < blocks && !failed; ++i) {
    const uint64_t at = order[i];
    run_block(how, {unsigned(at % how.grid.x), unsigned(at / how.grid.x % how.grid.y), unsigned(at / how.grid.x / how.grid.y)});
  }
  acquire(&done_sync);
#if defined(EMULATE_TSAN)
  bury();
#endif
}

}  // namespace emulate
