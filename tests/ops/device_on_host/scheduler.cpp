// Runs the threads of a block as fibers: each until it meets the others or ends, then the next.
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace device_on_host {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr unsigned kWarp = 32;
constexpr int kGarbage = 0xa5;

enum class State { Ready, AtBlock, AtWarp, Ended };

struct Thread {
  State state = State::Ready;
  Site site{};
  uint64_t value = 0;
  ucontext_t context;
  void* fake_stack = nullptr;  // ASan's, kept while another fiber runs
  std::unique_ptr<char[]> stack{new char[kStack]};
};

std::vector<Thread> threads;  // the first `count` are the block that runs; the others keep their stacks
unsigned count, running;
const std::function<void()>* kernel_of_block;
void* shared;
std::vector<std::array<uint64_t, kWarp>> exchanged;  // the values of each warp at its last meeting
bool any_true;                                       // at the last meeting of the block
unsigned seed;

ucontext_t scheduler;
const void* scheduler_stack;
size_t scheduler_size;

[[noreturn]] void fail(const char* what, unsigned thread) {
  const Site& site = threads[thread].site;
  fprintf(stderr, "device_on_host: %s: thread %u of block %u at %s, %s:%d\n", what, thread, blockIdx.x,
          site.call ? site.call : "an exchange of a part of a warp", site.file, site.line);
  abort();
}

void to_scheduler(Thread& self) {
  __sanitizer_start_switch_fiber(self.state == State::Ended ? nullptr : &self.fake_stack, scheduler_stack,
                                 scheduler_size);
  swapcontext(&self.context, &scheduler);
  __sanitizer_finish_switch_fiber(self.fake_stack, &scheduler_stack, &scheduler_size);
}

void fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
  (*kernel_of_block)();
  threads[running].state = State::Ended;
  to_scheduler(threads[running]);
}

void begin(Thread& thread) {
  thread.state = State::Ready;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStack;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, fiber, 0);
}

void resume(unsigned thread) {
  running = thread;
  threadIdx.x = thread;
  Thread& next = threads[thread];
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, next.stack.get(), kStack);
  swapcontext(&scheduler, &next.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void wait_at(State state, uint64_t value, Site site) {
  Thread& self = threads[running];
  self.state = state;
  self.value = value;
  self.site = site;
  to_scheduler(self);
}

// Lets the threads [first, last) go on if all of them wait, in `state` and at one site. Returns whether they went.
bool release(unsigned first, unsigned last, State state) {
  for (unsigned i = first; i < last; ++i)
    if (threads[i].state != state) return false;
  for (unsigned i = first; i < last; ++i) {
    const Site &one = threads[first].site, &other = threads[i].site;
    if (!one.call || one.line != other.line || strcmp(one.file, other.file)) fail("threads meet at two places", i);
    threads[i].state = State::Ready;
  }
  return true;
}

std::vector<unsigned> order_of(unsigned size, unsigned salt) {
  std::vector<unsigned> order(size);
  std::iota(order.begin(), order.end(), 0);
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(seed * 7919 + salt));
  return order;
}

void run_block() {
  for (unsigned i = 0; i < count; ++i) begin(threads[i]);
  for (unsigned pass = 0;; ++pass) {
    unsigned ran = 0, ended = 0;
    for (unsigned thread : order_of(count, pass + blockIdx.x)) {
      if (threads[thread].state == State::Ready) ++ran, resume(thread);
      ended += threads[thread].state == State::Ended;
    }
    if (ended == count) return;
    for (unsigned warp = 0; warp * kWarp + kWarp <= count; ++warp)
      if (release(warp * kWarp, warp * kWarp + kWarp, State::AtWarp))
        for (unsigned lane = 0; lane < kWarp; ++lane) exchanged[warp][lane] = threads[warp * kWarp + lane].value;
    if (release(0, count, State::AtBlock)) {
      any_true = false;
      for (unsigned i = 0; i < count; ++i) any_true = any_true || threads[i].value;
    }
    if (ran) continue;
    for (unsigned i = 0; i < count; ++i)
      if (threads[i].state == State::AtBlock || threads[i].state == State::AtWarp)
        fail("it waits for threads that never come", i);
  }
}

}  // namespace

bool meet_block(bool value, Site site) {
  wait_at(State::AtBlock, value, site);
  return any_true;
}

const uint64_t* meet_warp(uint64_t value, Site site) {
  wait_at(State::AtWarp, value, site);
  return exchanged[running / kWarp].data();
}

void* shared_memory() { return shared; }

void run(unsigned blocks, unsigned threads_of_block, size_t bytes, const std::function<void()>& kernel) {
  count = threads_of_block;
  if (threads.size() < count) threads.resize(count);
  exchanged.resize(count / kWarp);
  gridDim.x = blocks;
  blockDim.x = count;
  kernel_of_block = &kernel;
  for (unsigned block : order_of(blocks, 0)) {
    blockIdx.x = block;
    shared = bytes ? memset(malloc(bytes), kGarbage, bytes) : nullptr;
    run_block();
    free(shared);
  }
}

}  // namespace device_on_host

// The order in which threads and blocks run: 0 forward, 1 backward, any other a shuffle.
extern "C" void pmm_set_schedule(unsigned seed) { device_on_host::seed = seed; }
