// Memory for large gradients, and for logits of a chunk of tokens, on the CPU. A fresh mapping is dominated by page faults, which
// cost several times the zeros that the backward pass writes, so this keeps freed blocks for the next use: two, as the step of an
// output layer has a gradient and a chunk. A kept block is marked MADV_FREE: the system takes its pages back whenever it wants
// memory, and only then does the next use fault again.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <memory>
#include <mutex>
#include <utility>

namespace sparse_ce::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)

class GradientMemory final : public c10::Allocator {
 public:
  // Below it malloc recycles memory by itself.
  static constexpr size_t smallest = size_t{32} << 20;

  static GradientMemory* get() {
    // never destroyed: tensors may outlive every static object
    static auto* memory = new GradientMemory;
    return memory;
  }

  c10::DataPtr allocate(size_t bytes) override {
    std::unique_ptr<Block> block;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto& kept : kept_)
        if (kept && kept->bytes >= bytes && kept->bytes / 2 <= bytes &&
            (!block || kept->bytes < block->bytes))
          std::swap(block, kept);
    }
    if (!block) block = map(bytes);
    void* data = block->data;
    report(data, static_cast<int64_t>(block->bytes));
    return {data, block.release(), &release, at::Device(at::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  struct Block {
    void* mapping;
    size_t mapped;
    void* data;  // at a huge page
    size_t bytes;
    ~Block() { munmap(mapping, mapped); }
  };

  static std::unique_ptr<Block> map(size_t bytes) {
    constexpr size_t page = size_t{2} << 20;
    const size_t mapped = bytes + page;
    void* mapping =
        mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, mapping != MAP_FAILED,
                     "sparse_ce: no memory for a gradient of ", bytes, " bytes");
    void* data =
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(mapping) + page - 1) / page * page);
    madvise(data, bytes, MADV_HUGEPAGE);  // advice: failure changes nothing
    return std::unique_ptr<Block>(new Block{mapping, mapped, data, bytes});
  }

  static void release(void* context) {
    std::unique_ptr<Block> block(static_cast<Block*>(context));
    report(block->data, -static_cast<int64_t>(block->bytes));
    GradientMemory& memory = *get();
    {
      const std::lock_guard<std::mutex> lock(memory.mutex_);
      madvise(block->data, block->bytes, MADV_FREE);
      // of three the one goes that was freed first: sizes that are no longer in use must not keep others out
      for (auto& kept : memory.kept_)
        if (block) std::swap(kept, block);
    }
    // what is left in `block` goes back to the system, outside of the lock
  }

  static void report(void* data, int64_t bytes) {
    if (c10::memoryProfilingEnabled())
      c10::reportMemoryUsageToProfiler(data, bytes, 0, 0, at::Device(at::kCPU));
  }

  std::mutex mutex_;
  std::unique_ptr<Block> kept_[2];
};

// An uninitialised contiguous tensor.
inline at::Tensor empty_gradient(at::IntArrayRef shape, at::ScalarType dtype) {
  size_t bytes = c10::elementSize(dtype);
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  if (bytes < GradientMemory::smallest) return at::empty(shape, at::TensorOptions().dtype(dtype));
  return at::detail::empty_generic(shape, GradientMemory::get(),
                                   c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

#else

inline at::Tensor empty_gradient(at::IntArrayRef shape, at::ScalarType dtype) {
  return at::empty(shape, at::TensorOptions().dtype(dtype));
}

#endif

}  // namespace sparse_ce::cpu
