// A device that runs one thread at a time: fibers, and a scheduler that switches between them at collectives.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

enum class ThreadOrder : int32_t { natural, reversed, shuffled };

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 64 << 10;

struct Fiber {
  enum class State { ready, in_collective, in_barrier, exited };

  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  uint3 thread;
  unsigned index;
  // The collective this lane waits in, then the values that the lanes of its mask contributed.
  const char* collective;
  uint32_t mask;
  uint64_t value;
  uint64_t received[kWarpSize];
  void* sanitizer_stack;

  unsigned lane() const { return index % kWarpSize; }
};

class Device {
 public:
  ThreadOrder thread_order = ThreadOrder::natural;
  std::string error;

  unsigned lane() const { return running_->lane(); }

  void launch(dim3 grid, dim3 block, std::function<void()> kernel) {
    gridDim = grid;
    blockDim = block;
    kernel_ = std::move(kernel);
    fibers_.resize(block.x * block.y * block.z);
    for (unsigned z = 0; z < grid.z; z++)
      for (unsigned y = 0; y < grid.y; y++)
        for (unsigned x = 0; x < grid.x; x++) {
          blockIdx = {x, y, z};
          run_block();
          if (!error.empty()) return;
        }
  }

  // Wait for every lane of `mask`, hand each the values of all, and return those of the caller.
  const uint64_t* exchange(const char* collective, uint32_t mask, uint64_t value) {
    Fiber& self = *running_;
    const unsigned warp_start = self.index - self.lane();
    if (!(mask >> self.lane() & 1))
      fail("%s: lane %u calls with mask %08x, which leaves it out", collective, self.lane(), mask);
    self.collective = collective;
    self.mask = mask;
    self.value = value;
    self.state = Fiber::State::in_collective;
    bool complete = true;
    for_each_lane(mask, [&](unsigned lane) {
      const unsigned index = warp_start + lane;
      if (index >= fibers_.size()) fail("%s: mask %08x names lane %u, which does not exist", collective, mask, lane);
      const Fiber& other = fibers_[index];
      if (other.state == Fiber::State::exited)
        fail("%s: mask %08x names lane %u, which has exited", collective, mask, lane);
      if (other.state != Fiber::State::in_collective) {
        complete = false;
      } else if (other.mask != mask || std::strcmp(other.collective, collective) != 0) {
        fail("lane %u is in %s with mask %08x and lane %u in %s with mask %08x", self.lane(), collective, mask, lane,
             other.collective, other.mask);
      }
    });
    if (complete) {
      for_each_lane(mask, [&](unsigned receiver) {
        Fiber& other = fibers_[warp_start + receiver];
        for_each_lane(mask, [&](unsigned lane) { other.received[lane] = fibers_[warp_start + lane].value; });
        other.state = Fiber::State::ready;
      });
    } else {
      switch_to_scheduler();
    }
    return self.received;
  }

  // The thread that runs ends. No lane may be waiting for it.
  void exit() {
    Fiber& self = *running_;
    self.state = Fiber::State::exited;
    const unsigned warp_start = self.index - self.lane();
    for (unsigned i = warp_start; i < fibers_.size() && i < warp_start + kWarpSize; i++) {
      if (fibers_[i].state == Fiber::State::in_collective && fibers_[i].mask >> self.lane() & 1) {
        fail("%s: mask %08x names lane %u, which has exited", fibers_[i].collective, fibers_[i].mask, self.lane());
      }
    }
    switch_to_scheduler();
  }

  void barrier() {
    running_->state = Fiber::State::in_barrier;
    switch_to_scheduler();
  }

  void check_alignment(const void* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes) fail("access of %zu bytes at an address not aligned", bytes);
  }

  // End the launch: the caller's fiber is never resumed.
  [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    error = text;
    switch_to_scheduler();
    __builtin_unreachable();
  }

 private:
  template <typename Visit>
  static void for_each_lane(uint32_t mask, Visit visit) {
    for (unsigned lane = 0; lane < kWarpSize; lane++)
      if (mask >> lane & 1) visit(lane);
  }

  void run_block() {
    std::vector<unsigned> order(fibers_.size());
    for (unsigned i = 0; i < fibers_.size(); i++) {
      start(fibers_[i], i);
      order[i] = i;
    }
    if (thread_order == ThreadOrder::reversed) std::reverse(order.begin(), order.end());
    for (;;) {
      if (thread_order == ThreadOrder::shuffled) std::shuffle(order.begin(), order.end(), random_);
      bool progressed = false;
      for (unsigned i : order) {
        if (fibers_[i].state != Fiber::State::ready) continue;
        resume(fibers_[i]);
        if (!error.empty()) return;
        progressed = true;
      }
      if (progressed) continue;
      if (!release_barrier()) return;
    }
  }

  // Nothing can run: either all is done, or every thread that has not exited waits at the barrier, or it is a deadlock.
  bool release_barrier() {
    const auto in = [this](Fiber::State state) {
      return std::count_if(fibers_.begin(), fibers_.end(), [state](const Fiber& f) { return f.state == state; });
    };
    const auto waiting = in(Fiber::State::in_barrier), exited = in(Fiber::State::exited);
    const auto stuck = std::find_if(fibers_.begin(), fibers_.end(),
                                    [](const Fiber& f) { return f.state == Fiber::State::in_collective; });
    if (stuck != fibers_.end()) {
      error = "deadlock: thread " + std::to_string(stuck->index) + " waits in " + stuck->collective +
              " for lanes that never come";
      return false;
    }
    for (Fiber& fiber : fibers_)
      if (fiber.state == Fiber::State::in_barrier) fiber.state = Fiber::State::ready;
    if (waiting > 0 && exited > 0) error = "deadlock: some threads of the block exited before a barrier";
    return waiting > 0 && exited == 0;
  }

  void start(Fiber& fiber, unsigned index) {
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    fiber.state = Fiber::State::ready;
    fiber.index = index;
    fiber.thread = {index % blockDim.x, index / blockDim.x % blockDim.y, index / (blockDim.x * blockDim.y)};
    fiber.sanitizer_stack = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Device::run_thread, 0);
  }

  static void run_thread();

  void resume(Fiber& fiber) {
    running_ = &fiber;
    threadIdx = fiber.thread;
#if defined(__SANITIZE_ADDRESS__)
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fiber.stack.get(), kStackBytes);
    swapcontext(&scheduler_, &fiber.context);
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#else
    swapcontext(&scheduler_, &fiber.context);
#endif
  }

  void switch_to_scheduler() {
    Fiber& self = *running_;
#if defined(__SANITIZE_ADDRESS__)
    // An exiting fiber passes null, so that its fake stack is freed.
    void** keep = self.state == Fiber::State::exited ? nullptr : &self.sanitizer_stack;
    __sanitizer_start_switch_fiber(keep, scheduler_stack_, scheduler_stack_bytes_);
    swapcontext(&self.context, &scheduler_);
    finish_switch(self);
#else
    swapcontext(&self.context, &scheduler_);
#endif
  }

#if defined(__SANITIZE_ADDRESS__)
  void finish_switch(Fiber& fiber) {
    __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, &scheduler_stack_, &scheduler_stack_bytes_);
  }
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
#endif

  std::vector<Fiber> fibers_;
  std::function<void()> kernel_;
  ucontext_t scheduler_;
  Fiber* running_ = nullptr;
  std::mt19937 random_{1};
};

inline Device& device() {
  static Device instance;
  return instance;
}

inline void Device::run_thread() {
  Device& self = device();
#if defined(__SANITIZE_ADDRESS__)
  self.finish_switch(*self.running_);
#endif
  self.kernel_();
  self.exit();
}

}  // namespace emulation
