// CUDA's kernel language on a processor, for tests: the kernels of csrc/cuda compiled as C++, every thread of a block a fiber
// that runs until it waits. One block runs at a time, on the thread that launches.
//
// What is an error here, with the kernel, the block and the thread that met it:
//
//   shared memory     an index outside of its array; reading what nobody in this block has written; a race: two threads touch
//                     an element, at least one of them writes and not both by atomics, nor both the same value, and no
//                     barrier lies between them. A __syncthreads orders the whole block, a __syncwarp of all lanes its warp;
//                     shuffles, ballots and reductions order no memory, as in CUDA.
//   __syncthreads     some threads of the block wait at it while the others have ended or wait for their warp
//   warp collectives  a lane that is not in its own mask; lanes of a mask that never arrive, that have ended, or that are at
//                     another collective or name another mask; a shuffle that reads a lane outside of the mask
//   launches          grids and blocks beyond CUDA's limits, more than 48 KB of static shared memory
//
// The order in which fibers run is another one in each block of each launch: warp by warp upwards, downwards, or shuffled. So a
// missing barrier between accesses to global memory, which nobody watches, shows itself by wrong results, most of the time.
//
// What it cannot show: inline PTX, for which platform.cuh has twins; the weak order in which a GPU's memory makes stores
// visible; races in global memory, where no order of fibers makes them matter; barriers that all threads reach in different
// places of the code; blocks that wait for each other; anything about speed, registers, or bank conflicts.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && !defined(EMULATION_PORTABLE)
#define EMULATION_SWITCHES_STACKS 1
#else
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
// An error of a launch is an exception.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "the launch was refused"; }

// What two libraries in one process, each with its own emulation, must not share.
#define EMULATION_STATE __attribute__((visibility("hidden"))) inline

namespace emulation {

// Contexts: a stack, and where its code goes on.

#ifdef EMULATION_SWITCHES_STACKS
// Saves what a callee has to save, and goes on where `to` was saved.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}

class Context {
 public:
  void start_at(void (*entry)(), char* stack, size_t size) {
    // six registers, the address to return to, and one that entry never returns to
    void** top = reinterpret_cast<void**>(stack + size) - 8;
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(entry);
    stack_pointer_ = top;
  }
  void go_to(Context& other) { switch_stacks(&stack_pointer_, other.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
};
#else
class Context {
 public:
  void start_at(void (*entry)(), char* stack, size_t size) {
    getcontext(&state_);
    state_.uc_stack.ss_sp = stack;
    state_.uc_stack.ss_size = size;
    state_.uc_link = nullptr;
    makecontext(&state_, entry, 0);
  }
  void go_to(Context& other) { swapcontext(&state_, &other.state_); }

 private:
  ucontext_t state_;
};
#endif

// Stacks of all threads that a block can have, each with a page below it that nobody may touch.
class Stacks {
 public:
  static constexpr size_t kSize = 128 << 10, kGuard = 64 << 10, kCount = 1024;
  Stacks() {
    memory_ = static_cast<char*>(mmap(nullptr, kSize * kCount, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = 0; i < kCount; ++i) mprotect(memory_ + i * kSize, kGuard, PROT_NONE);
  }
  ~Stacks() { munmap(memory_, kSize * kCount); }
  char* of(int thread) { return memory_ + static_cast<size_t>(thread) * kSize + kGuard; }

 private:
  char* memory_;
};

// Who has touched an element last, as far as a race needs to know: one thread, or several that no barrier lies between.
struct Touch {
  static constexpr int kNobody = -1, kSeveral = -2;
  int thread = kNobody;
  int warp = kNobody;
  uint32_t block_epoch = 0;
  uint32_t warp_epoch = 0;
  bool atomic = false;
};

struct Element {
  Touch written;
  Touch read;
};

struct SharedArray {
  std::string name;
  size_t count;
  size_t size;  // of an element
  std::vector<unsigned char> data;
  std::vector<Element> elements;
};

enum class Collective { none, syncwarp, shuffle, ballot, reduce_add, reduce_min, reduce_max };

inline const char* name_of(Collective collective) {
  switch (collective) {
    case Collective::syncwarp: return "__syncwarp";
    case Collective::shuffle: return "__shfl";
    case Collective::ballot: return "__ballot_sync";
    case Collective::reduce_add: return "__reduce_add_sync";
    case Collective::reduce_min: return "__reduce_min_sync";
    case Collective::reduce_max: return "__reduce_max_sync";
    default: return "nothing";
  }
}

struct Lane {
  Collective collective = Collective::none;
  unsigned mask = 0;
  uint64_t value = 0;
  int source = 0;
  uint64_t result = 0;
};

struct Warp {
  Lane lanes[32];
  unsigned waiting = 0;  // lanes at a collective
  uint32_t epoch = 0;    // barriers of the whole warp that lie behind it
};

enum class State { ready, at_barrier, in_warp, ended };

struct Thread {
  Context context;
  uint3 index;
  int number;
  State state;
  size_t arrays;  // shared arrays that it has come by
};

// A block that runs.
class Block {
 public:
  dim3 grid, size;
  uint3 index{};

  void run(const std::string& kernel, const std::function<void()>& body, uint64_t seed) {
    kernel_ = kernel;
    body_ = &body;
    random_.seed(seed);
    order_ = static_cast<Order>(random_() % 3);
    const unsigned count = size.x * size.y * size.z;
    threads_.resize(count);
    warps_.assign((count + 31) / 32, {});
    arrays_.clear();
    shared_bytes_ = 0;
    epoch_ = 0;
    at_barrier_ = 0;
    error_ = nullptr;
    for (unsigned i = 0; i < count; ++i) {
      Thread& thread = threads_[i];
      thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
      thread.number = static_cast<int>(i);
      thread.arrays = 0;
      thread.context.start_at(enter, stacks_.of(thread.number), Stacks::kSize - Stacks::kGuard);
    }
    ready_.clear();
    make_all_ready();
    while (!ready_.empty()) {
      current_ = &threads_[next()];
      scheduler_.go_to(current_->context);
      if (error_) std::rethrow_exception(error_);
    }
    const auto ended = [](const Thread& thread) { return thread.state == State::ended; };
    if (!std::all_of(threads_.begin(), threads_.end(), ended))
      throw std::runtime_error(place() + ": " + stuck());
  }

  const Thread& current() const { return *current_; }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(place() + ", thread " + text(current_->index) + ": " + what);
  }

  // What threads do together.

  void barrier() {
    current_->state = State::at_barrier;
    if (++at_barrier_ == threads_.size()) {
      at_barrier_ = 0;
      ++epoch_;
      make_all_ready();
    }
    yield();
  }

  uint64_t collective(Collective collective, unsigned mask, uint64_t value = 0, int source = 0) {
    const int lane = current_->number % 32;
    Warp& warp = warps_[current_->number / 32];
    if (!(mask >> lane & 1))
      fail(std::string(name_of(collective)) + ": the lane is not in its own mask");
    warp.lanes[lane] = {collective, mask, value, source, 0};
    warp.waiting |= 1u << lane;
    if ((warp.waiting & mask) == mask) {
      complete(warp, mask);
    } else {
      current_->state = State::in_warp;
      yield();
    }
    return warp.lanes[lane].result;
  }

  // Shared memory.

  // The array of a declaration: all threads come by the declarations of a kernel in the same order.
  SharedArray* shared_array(const char* name, size_t count, size_t size) {
    const size_t number = current_->arrays++;
    if (number == arrays_.size()) {
      shared_bytes_ += count * size;
      if (shared_bytes_ > 48 << 10)
        fail(std::to_string(shared_bytes_) + " bytes of shared memory up to `" + name +
             "`, the limit is 48 KB");
      arrays_.push_back(std::make_unique<SharedArray>(
          SharedArray{name, count, size, std::vector<unsigned char>(count * size),
                      std::vector<Element>(count)}));
    }
    SharedArray* array = arrays_[number].get();
    if (array->name != name || array->count != count || array->size != size)
      fail("declares `" + std::string(name) + "` where other threads declare `" + array->name +
           "`");
    return array;
  }

  const void* read(SharedArray& array, ptrdiff_t at) const {
    Element& element = element_of(array, at);
    if (element.written.thread == Touch::kNobody)
      fail("reads " + name_of(array, at) + ", which nobody in this block has written");
    if (!before(element.written)) race("reads", "wrote", array, at, element.written);
    merge(element.read);
    return &array.data[static_cast<size_t>(at) * array.size];
  }

  void write(SharedArray& array, ptrdiff_t at, const void* value) const {
    Element& element = element_of(array, at);
    void* place = &array.data[static_cast<size_t>(at) * array.size];
    if (!before(element.read)) race("writes", "read", array, at, element.read);
    if (before(element.written)) {
      element.written = mine();
    } else {
      if (element.written.atomic || std::memcmp(place, value, array.size) != 0)
        race("writes", "wrote", array, at, element.written);
      merge(element.written);
    }
    std::memcpy(place, value, array.size);
  }

  void* update_atomically(SharedArray& array, ptrdiff_t at) const {
    Element& element = element_of(array, at);
    if (element.written.thread == Touch::kNobody)
      fail("updates " + name_of(array, at) + ", which nobody in this block has written");
    if (!before(element.read)) race("updates", "read", array, at, element.read);
    if (!element.written.atomic && !before(element.written))
      race("updates", "wrote", array, at, element.written);
    merge(element.written);
    element.written.atomic = true;
    return &array.data[static_cast<size_t>(at) * array.size];
  }

 private:
  enum class Order { upwards, downwards, shuffled };

  static void enter();

  void yield() { current_->context.go_to(scheduler_); }

  void make_ready(int thread) {
    threads_[thread].state = State::ready;
    ready_.push_back(thread);
  }

  void make_all_ready() {
    const int count = static_cast<int>(threads_.size());
    for (int i = 0; i < count; ++i) make_ready(order_ == Order::upwards ? count - 1 - i : i);
  }

  int next() {
    if (order_ == Order::shuffled) std::swap(ready_[random_() % ready_.size()], ready_.back());
    const int thread = ready_.back();
    ready_.pop_back();
    return thread;
  }

  // All lanes of the mask are at a collective: the current one, the last to come, goes on at once.
  void complete(Warp& warp, unsigned mask) {
    const int me = current_->number % 32;
    const Lane& mine = warp.lanes[me];
    uint64_t sum = 0, ballot = 0;
    auto least = std::numeric_limits<int64_t>::max(),
         greatest = std::numeric_limits<int64_t>::min();
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      const Lane& lane = warp.lanes[i];
      if (lane.collective != mine.collective || lane.mask != mask)
        fail(std::string(name_of(mine.collective)) + " of lanes " + hexadecimal(mask) +
             ", but lane " + std::to_string(i) + " is at " + name_of(lane.collective) +
             " of lanes " + hexadecimal(lane.mask));
      sum += lane.value;
      ballot |= uint64_t{lane.value != 0} << i;
      least = std::min(least, static_cast<int64_t>(lane.value));
      greatest = std::max(greatest, static_cast<int64_t>(lane.value));
    }
    const uint64_t result =
        mine.collective == Collective::ballot       ? ballot
        : mine.collective == Collective::reduce_min ? static_cast<uint64_t>(least)
        : mine.collective == Collective::reduce_max ? static_cast<uint64_t>(greatest)
                                                    : sum;
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      Lane& lane = warp.lanes[i];
      if (mine.collective == Collective::shuffle) {
        if (lane.source < 0 || lane.source > 31 || !(mask >> lane.source & 1))
          fail("__shfl_sync: lane " + std::to_string(i) + " reads lane " +
               std::to_string(lane.source) + ", which is not in the mask " + hexadecimal(mask));
        lane.result = warp.lanes[lane.source].value;
      } else {
        lane.result = result;
      }
      if (i != me) make_ready(current_->number - me + i);
    }
    warp.waiting &= ~mask;
    if (mine.collective == Collective::syncwarp && mask == 0xFFFFFFFF) ++warp.epoch;
  }

  std::string stuck() const {
    std::string what = "threads wait for others that never come:";
    size_t begin = 0;
    while (begin < threads_.size()) {
      const std::string where = whereabouts(threads_[begin]);
      size_t end = begin + 1;
      while (end < threads_.size() && whereabouts(threads_[end]) == where) ++end;
      what += (begin ? ", " : " ") + std::to_string(begin) +
              (end - begin > 1 ? "-" + std::to_string(end - 1) : "") + " " + where;
      begin = end;
    }
    return what;
  }

  std::string whereabouts(const Thread& thread) const {
    if (thread.state == State::ended) return "ended";
    if (thread.state == State::at_barrier) return "at __syncthreads";
    const Lane& lane = warps_[thread.number / 32].lanes[thread.number % 32];
    return std::string("at ") + name_of(lane.collective) + " of lanes " + hexadecimal(lane.mask);
  }

  Touch mine() const {
    const int warp = current_->number / 32;
    return {current_->number, warp, epoch_, warps_[warp].epoch, false};
  }

  // A barrier lies between that touch and the current thread, or it was its own.
  bool before(const Touch& touch) const {
    const int warp = current_->number / 32;
    return touch.thread == Touch::kNobody || touch.block_epoch < epoch_ ||
           touch.thread == current_->number ||
           (touch.warp == warp && touch.warp_epoch < warps_[warp].epoch);
  }

  // The current thread joins those that have touched the element since the last barrier.
  void merge(Touch& touch) const {
    const Touch now = mine();
    if (before(touch)) {
      touch = now;
      return;
    }
    touch.thread = Touch::kSeveral;
    if (touch.warp != now.warp) touch.warp = Touch::kSeveral;
  }

  Element& element_of(SharedArray& array, ptrdiff_t at) const {
    if (at < 0 || static_cast<size_t>(at) >= array.count)
      fail("index " + std::to_string(at) + " of `" + array.name + "`, which has " +
           std::to_string(array.count) + " elements");
    return array.elements[static_cast<size_t>(at)];
  }

  [[noreturn]] void race(const char* now, const char* then, const SharedArray& array, ptrdiff_t at,
                         const Touch& touch) const {
    const std::string who = touch.thread >= 0 ? "thread " + std::to_string(touch.thread)
                            : touch.warp >= 0
                                ? "several threads of warp " + std::to_string(touch.warp)
                                : "threads of several warps";
    fail(std::string("race: ") + now + " " + name_of(array, at) + ", which " + who + " " + then +
         ", and no barrier lies between them");
  }

  static std::string name_of(const SharedArray& array, ptrdiff_t at) {
    return array.name + "[" + std::to_string(at) + "]";
  }
  static const char* name_of(Collective collective) { return emulation::name_of(collective); }
  static std::string text(uint3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) +
           ")";
  }
  static std::string hexadecimal(unsigned mask) {
    char text[16];
    std::snprintf(text, sizeof(text), "0x%X", mask);
    return text;
  }
  std::string place() const { return kernel_ + ", block " + text(index); }

  std::string kernel_;
  const std::function<void()>* body_ = nullptr;
  Stacks stacks_;
  Context scheduler_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<SharedArray>> arrays_;
  std::vector<int> ready_;
  std::exception_ptr error_;
  std::mt19937_64 random_;
  Order order_{};
  Thread* current_ = nullptr;
  size_t at_barrier_ = 0;
  size_t shared_bytes_ = 0;
  uint32_t epoch_ = 0;  // barriers of the block that lie behind it
};

// One block runs at a time: it is found without asking which thread of the processor this is.
EMULATION_STATE Block* running = nullptr;

inline void Block::enter() {
  Block& block = *running;
  try {
    (*block.body_)();
  } catch (...) { block.error_ = std::current_exception(); }
  block.current_->state = State::ended;
  block.yield();
  std::abort();
}

// Shared memory as kernels see it: T* but for the checks.

template <class T> class Reference {
 public:
  Reference(SharedArray& array, ptrdiff_t at) : array_(array), at_(at) {}
  operator T() const {
    T value;
    std::memcpy(static_cast<void*>(&value), running->read(array_, at_), sizeof(T));
    return value;
  }
  Reference& operator=(const T& value) {
    running->write(array_, at_, &value);
    return *this;
  }
  Reference& operator=(const Reference& other) { return *this = static_cast<T>(other); }

 private:
  SharedArray& array_;
  ptrdiff_t at_;
};

template <class T> class Pointer {
 public:
  Pointer(SharedArray* array, ptrdiff_t at) : array_(array), at_(at) {}
  Reference<T> operator[](ptrdiff_t i) const { return {*array_, at_ + i}; }
  Reference<T> operator*() const { return {*array_, at_}; }
  Pointer operator+(ptrdiff_t i) const { return {array_, at_ + i}; }
  T add_atomically(T x) const {
    static_assert(std::is_arithmetic_v<T>);
    void* place = running->update_atomically(*array_, at_);
    T before;
    std::memcpy(&before, place, sizeof(T));
    const T after = before + x;
    std::memcpy(place, &after, sizeof(T));
    return before;
  }

 private:
  SharedArray* array_;
  ptrdiff_t at_;
};

template <class T> uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T> T value_of(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Its name, where the dynamic linker knows it.
inline std::string name_of(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "a kernel";
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status), std::free);
  return status == 0 ? name.get() : info.dli_sname;
}

// The kernels that have been launched, in order, until somebody clears it.
EMULATION_STATE std::vector<std::string> launched;

EMULATION_STATE void run_grid(const std::string& name, dim3 grid, dim3 size,
                              const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  static uint64_t blocks = 0;
  static Block block;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  const auto within = [](dim3 d, unsigned x, unsigned y, unsigned z) {
    return 1 <= d.x && d.x <= x && 1 <= d.y && d.y <= y && 1 <= d.z && d.z <= z;
  };
  if (!within(grid, 0x7FFFFFFF, 65535, 65535) || !within(size, 1024, 1024, 64) ||
      size.x * size.y * size.z > 1024)
    throw std::runtime_error(name + ": no GPU takes such a grid of such blocks");
  launched.push_back(name);
  running = &block;
  block.grid = grid;
  block.size = size;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block.index = {x, y, z};
        block.run(name, body, ++blocks);
      }
}

// The kernels use no dynamic shared memory.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t, cudaStream_t,
            Arguments... arguments) {
  run_grid(name_of(reinterpret_cast<const void*>(kernel)), grid, size,
           [&] { kernel(arguments...); });
}

}  // namespace emulation

#define SHARED_ARRAY(T, name, count) \
  const ::emulation::Pointer<T> name(::emulation::running->shared_array(#name, count, sizeof(T)), 0)
template <class T> using Shared = ::emulation::Pointer<T>;

#define threadIdx (::emulation::running->current().index)
#define blockIdx (::emulation::running->index)
#define blockDim (::emulation::running->size)
#define gridDim (::emulation::running->grid)

inline void __syncthreads() { ::emulation::running->barrier(); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFF) {
  ::emulation::running->collective(::emulation::Collective::syncwarp, mask);
}
template <class T> T __shfl_sync(unsigned mask, T value, int source) {
  return ::emulation::value_of<T>(::emulation::running->collective(
      ::emulation::Collective::shuffle, mask, ::emulation::bits_of(value), source & 31));
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, (::emulation::running->current().number & 31) ^ distance);
}
// The lanes that there is no such lane below keep their own.
template <class T> T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = ::emulation::running->current().number & 31;
  return __shfl_sync(mask, value, lane < distance ? lane : lane - distance);
}
inline unsigned __ballot_sync(unsigned mask, int yes) {
  return static_cast<unsigned>(
      ::emulation::running->collective(::emulation::Collective::ballot, mask, yes != 0));
}
inline int reduce_in_warp(::emulation::Collective collective, unsigned mask, int value) {
  return static_cast<int>(
      ::emulation::running->collective(collective, mask, static_cast<uint64_t>(int64_t{value})));
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return reduce_in_warp(::emulation::Collective::reduce_add, mask, value);
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return reduce_in_warp(::emulation::Collective::reduce_min, mask, value);
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return reduce_in_warp(::emulation::Collective::reduce_max, mask, value);
}
inline bool __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
template <class T> T atomicAdd(::emulation::Pointer<T> place, T value) {
  return place.add_atomically(value);
}
template <class T> T atomicAdd(T* place, T value) {
  const T before = *place;
  *place = before + value;
  return before;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
