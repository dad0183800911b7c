// A CUDA device that is none: its tensors lie in the memory of the processor and say cuda:0. An operator runs as that of the CPU,
// on the same memory, after it was refused what a GPU refuses. How it is used and what it cannot show: tests/pretend_cuda.py.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/SparseCsrTensorImpl.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/SparseTensorUtils.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <set>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::SymIntArrayRef;

const c10::Device kDevice(c10::kCUDA, 0);

// The modes of torch.cuda.set_sync_debug_mode, of which this knows that of errors. Backward runs on a thread of its own.
std::atomic<int> sync_mode{0};
std::atomic<bool> capturing{false};
constexpr int kSyncIsAnError = 2;

void waits(const std::string& what) {
  TORCH_CHECK(!capturing, "CUDA error: operation not permitted when stream is capturing: ", what);
  TORCH_CHECK(sync_mode != kSyncIsAnError, "called a synchronizing CUDA operation: ", what);
}

// Memory, counted as the allocator of torch does.
std::atomic<int64_t> held{0}, peak{0};

int64_t rounded(size_t bytes) { return static_cast<int64_t>((bytes + 511) / 512 * 512); }

void hold(size_t bytes) {
  const int64_t now = held += rounded(bytes);
  int64_t before = peak;
  while (now > before && !peak.compare_exchange_weak(before, now)) {}
}

// Owns memory, or a storage of the CPU that has it.
struct Block {
  void* data;
  size_t bytes;
  c10::Storage owner;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  held -= rounded(block->bytes);
  std::free(block->data);
  delete block;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return c10::DataPtr(nullptr, kDevice);
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 512, bytes) == 0, "CUDA out of memory");
    // what nobody has written to is NaN
    std::memset(data, 0xFF, bytes);
    hold(bytes);
    return c10::DataPtr(data, new Block{data, bytes, {}}, &release, kDevice);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
} allocator;

// One device, one stream, on which everything is over when it returns.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Stream = c10::Stream;
  Stream stream() const { return Stream(Stream::DEFAULT, kDevice); }
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  Stream getStream(c10::Device) const override { return stream(); }
  Stream getDefaultStream(c10::Device) const override { return stream(); }
  Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(); }
  Stream getNewStream(c10::Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const override { return stream(); }
  void* getStreamNativeHandle(const Stream) const override { return nullptr; }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Generator final : c10::GeneratorImpl {
  at::Generator cpu = at::detail::createCPUGenerator();
  Generator() : c10::GeneratorImpl(kDevice, c10::DispatchKeySet(DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    cpu.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  c10::GeneratorImpl* clone_impl() const override {
    auto* copy = new Generator();
    copy->cpu = cpu.clone();
    return copy;
  }
};

const at::Generator& default_generator() {
  static const at::Generator generator = at::make_generator<Generator>();
  return generator;
}

at::Generator cpu_generator(const at::Generator& generator) {
  TORCH_CHECK(generator.device().is_cuda(),
              "Expected a 'cuda' device type for generator but found '", generator.device(), "'");
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->cpu;
}

// Torch looks for it by this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  c10::Device getDeviceFromPtr(void*) const override { return kDevice; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>();
  }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

// A tensor of one device that is the memory of a tensor of the other. Tensors of one storage keep one storage.
using Storages = std::unordered_map<const c10::StorageImpl*, c10::Storage>;

c10::Storage storage_on_cpu(const c10::Storage& storage) {
  auto* owner = new c10::Storage(storage);
  c10::DataPtr data(
      storage.mutable_data(), owner,
      [](void* context) { delete static_cast<c10::Storage*>(context); }, c10::Device(c10::kCPU));
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), nullptr, false};
}

c10::Storage storage_on_device(const c10::Storage& storage) {
  const size_t bytes = storage.nbytes();
  hold(bytes);
  c10::DataPtr data(storage.mutable_data(), new Block{nullptr, bytes, storage}, &release, kDevice);
  return {c10::Storage::use_byte_size_t(), bytes, std::move(data), &allocator, true};
}

Tensor strided(const Tensor& like, DispatchKey key, Storages& storages,
               c10::Storage (*other)(const c10::Storage&)) {
  const c10::StorageImpl* storage = like.storage().unsafeGetStorageImpl();
  auto found = storages.find(storage);
  if (found == storages.end()) found = storages.emplace(storage, other(like.storage())).first;
  auto result = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(found->second),
                                                         c10::DispatchKeySet(key), like.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(),
                                                      like.storage_offset());
  result._set_conj(like.is_conj());
  result._set_neg(like.is_neg());
  return result;
}

at::SparseCsrTensorImpl* csr(const Tensor& tensor) {
  return static_cast<at::SparseCsrTensorImpl*>(tensor.unsafeGetTensorImpl());
}

Tensor sparse_on_device(int64_t sparse_dim, int64_t dense_dim, c10::IntArrayRef sizes,
                        const Tensor& indices, const Tensor& values, bool coalesced) {
  auto result = at::detail::make_tensor<at::SparseTensorImpl>(
      c10::DispatchKeySet(DispatchKey::SparseCUDA), values.dtype());
  auto* sparse = at::sparse::get_sparse_impl(result);
  sparse->resize_(sparse_dim, dense_dim, sizes);
  sparse->set_indices_and_values_unsafe(indices, values);
  sparse->set_coalesced(coalesced);
  return result;
}

Tensor on_cpu(const Tensor& tensor, Storages& storages) {
  const auto part = [&](const Tensor& inner) { return on_cpu(inner, storages); };
  const auto options = tensor.options().device(c10::kCPU);
  if (tensor.layout() == c10::kSparse) {
    auto* from = at::sparse::get_sparse_impl(tensor);
    return at::_sparse_coo_tensor_unsafe(part(from->indices()), part(from->values()),
                                         tensor.sizes(), options, from->coalesced());
  }
  if (tensor.layout() == c10::kSparseCsr)
    return at::_sparse_csr_tensor_unsafe(part(csr(tensor)->compressed_indices()),
                                         part(csr(tensor)->plain_indices()),
                                         part(csr(tensor)->values()), tensor.sizes(), options);
  return strided(tensor, DispatchKey::CPU, storages, storage_on_cpu);
}

Tensor on_device(const Tensor& tensor, Storages& storages) {
  if (!tensor.defined() || tensor.is_cuda()) return tensor;
  const auto part = [&](const Tensor& inner) { return on_device(inner, storages); };
  if (tensor.layout() == c10::kSparse) {
    auto* from = at::sparse::get_sparse_impl(tensor);
    return sparse_on_device(from->sparse_dim(), from->dense_dim(), tensor.sizes(),
                            part(from->indices()), part(from->values()), from->coalesced());
  }
  if (tensor.layout() == c10::kSparseCsr) {
    auto result = at::detail::make_tensor<at::SparseCsrTensorImpl>(
        c10::DispatchKeySet(DispatchKey::SparseCsrCUDA), kDevice, c10::kSparseCsr, tensor.dtype());
    csr(result)->set_member_tensors(part(csr(tensor)->compressed_indices()),
                                    part(csr(tensor)->plain_indices()), part(csr(tensor)->values()),
                                    tensor.sizes());
    return result;
  }
  return strided(tensor, DispatchKey::CUDA, storages, storage_on_device);
}

std::set<std::string> words(const char* text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

// Whose result is a number, or has a size, that the GPU has to be asked for.
const auto kWait = words(
    "nonzero masked_select _unique _unique2 unique_dim unique_consecutive equal is_nonzero "
    "repeat_interleave bincount histc _coalesce _to_sparse _is_all_true");
const auto kIndex =
    words("index index_put index_put_ _index_put_impl_ _unsafe_index _unsafe_index_put");
// Which take a number of the CPU, a tensor without dimensions, beside tensors of the device.
const auto kNumbers = words(
    "add add_ sub sub_ rsub mul mul_ div div_ floor_divide fmod remainder pow xlogy atan2 eq ne lt "
    "le gt ge where maximum minimum fmax fmin clamp clamp_min clamp_max lerp addcmul addcdiv "
    "copysign nextafter isclose bitwise_and bitwise_and_ bitwise_or bitwise_or_ bitwise_left_shift "
    "bitwise_right_shift __lshift__ __rshift__ logical_and logical_or fill fill_ masked_fill "
    "masked_fill_ index_put index_put_ _index_put_impl_ index_fill_ _foreach_add_ _foreach_mul_ "
    "_foreach_div_");

// What went into an operator as a tensor of the device, and what the CPU gets for it.
struct Given {
  Tensor original, alias;
  // an output that the operator gives its size
  bool empty;
};

class Arguments {
 public:
  explicit Arguments(const c10::FunctionSchema& schema)
      : name_(schema.name()), stem_(name_.substr(name_.find("::") + 2)) {
    if (kWait.count(stem_)) waits(name_);
  }

  void convert(c10::IValue& value, const c10::Argument& argument, bool second) {
    const bool written = argument.alias_info() && argument.alias_info()->isWrite();
    const bool index = second && kIndex.count(stem_);
    if (value.isTensor()) {
      value = on_cpu_once(value.toTensor(), written, index);
    } else if (value.isTensorList()) {
      c10::List<Tensor> tensors;
      for (const Tensor& tensor : value.toTensorVector())
        tensors.push_back(on_cpu_once(tensor, written, index));
      value = tensors;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> tensors;
      for (const std::optional<Tensor> tensor : value.toOptionalTensorList())
        tensors.push_back(tensor ? on_cpu_once(*tensor, written, index) : tensor);
      value = tensors;
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    } else if (value.isGenerator()) {
      value = cpu_generator(value.toGenerator());
    } else if (value.isNone() && argument.type()->str() == "Generator?") {
      value = cpu_generator(default_generator());
    }
  }

  bool sparse() const {
    for (const Given& given : given_)
      if (given.alias.layout() != c10::kStrided) return true;
    return false;
  }

  // What the operator made of its outputs.
  void resize_outputs() {
    for (const Given& given : given_) {
      if (given.alias.layout() != c10::kStrided || given.alias.sizes() == given.original.sizes())
        continue;
      auto* impl = given.original.unsafeGetTensorImpl();
      if (given.empty) {
        Storages none;
        impl->set_storage_keep_dtype(on_device(given.alias, none).storage());
      }
      TORCH_CHECK(
          given.empty || given.alias.storage().nbytes() == given.original.storage().nbytes(), name_,
          " on the pretended device: an output needs more memory");
      impl->set_sizes_and_strides(given.alias.sizes(), given.alias.strides(),
                                  given.alias.storage_offset());
    }
  }

  void give_back(c10::IValue& value) {
    if (value.isTensor()) {
      value = original(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> tensors;
      for (const Tensor& tensor : value.toTensorVector()) tensors.push_back(original(tensor));
      value = tensors;
    }
  }

 private:
  Tensor on_cpu_once(const Tensor& tensor, bool written, bool index) {
    if (!tensor.defined()) return tensor;
    const bool mask = tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte;
    if (index && (mask || tensor.is_cpu())) waits(name_ + " by a mask or an index of the CPU");
    if (!tensor.is_cuda()) {
      const bool number = tensor.is_cpu() && tensor.dim() == 0 && kNumbers.count(stem_);
      TORCH_CHECK(number || index, "Expected all tensors to be on the same device, but found ",
                  tensor.device(), " and cuda:0 in ", name_);
      return tensor;
    }
    const bool empty = written && tensor.layout() == c10::kStrided && tensor.numel() == 0;
    const Tensor alias = empty ? at::empty(tensor.sizes(), tensor.options().device(c10::kCPU))
                               : on_cpu(tensor, to_cpu_);
    if (!empty && alias.layout() == c10::kStrided)
      to_device_.emplace(alias.storage().unsafeGetStorageImpl(), tensor.storage());
    given_.push_back({tensor, alias, empty});
    return alias;
  }

  Tensor original(const Tensor& tensor) {
    for (const Given& given : given_)
      if (tensor.is_same(given.alias)) return given.original;
    return on_device(tensor, to_device_);
  }

  std::string name_, stem_;
  Storages to_cpu_, to_device_;
  std::vector<Given> given_;
};

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Arguments arguments(schema);
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  for (size_t i = 0; i < count; ++i)
    arguments.convert((*stack)[first + i], schema.arguments()[i], i == 1);
  if (arguments.sparse()) {
    op.callBoxed(stack);
  } else {
    op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);
  }
  arguments.resize_outputs();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    arguments.give_back((*stack)[i]);
}

// What makes tensors of the device, and what goes from device to device or changes a tensor rather than its memory.
using Type = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Device = std::optional<at::Device>;
using Flag = std::optional<bool>;
const c10::DispatchKeySet kKeys(DispatchKey::CUDA);

at::ScalarType or_default(Type dtype) {
  return dtype.value_or(at::get_default_dtype_as_scalartype());
}

Tensor empty(SymIntArrayRef size, Type dtype, Layout, Device, Flag,
             std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, kKeys,
                                   or_default(dtype), format);
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, Type dtype, Layout, Device, Flag) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), &allocator, kKeys,
                                           or_default(dtype));
}

const Tensor& resize_(const Tensor& self, SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const size_t bytes = (c10::multiply_integers(sizes) + self.storage_offset()) * self.itemsize();
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (storage->nbytes() < bytes) {
    auto data = allocator.allocate(bytes);
    if (storage->nbytes() > 0) std::memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr(std::move(data));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

// No memory is pinned: a copy to the device waits unless it is asked not to, one to the CPU does in any case.
Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  const bool between = self.device() != source.device() && self.numel() > 0;
  if (between && (capturing || self.is_cpu() || !non_blocking)) waits("a copy between CPU and GPU");
  Storages storages;
  Tensor to = self.is_cuda() ? on_cpu(self, storages) : self;
  to.copy_(source.is_cuda() ? on_cpu(source, storages) : source);
  return self;
}

at::Scalar local_scalar(const Tensor& self) {
  waits("item");
  Storages storages;
  return at::_local_scalar_dense(on_cpu(self, storages));
}

Tensor& set_storage(Tensor& self, at::Storage storage, c10::SymInt offset, SymIntArrayRef size,
                    SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

Tensor& set_storage_flat(Tensor& self, at::Storage storage) {
  const auto elements = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  self.unsafeGetTensorImpl()->set_sizes_contiguous({elements});
  return self;
}

Tensor sparse_coo(int64_t sparse_dim, int64_t dense_dim, SymIntArrayRef size, const Tensor& indices,
                  const Tensor& values, Type, Layout, Device, Flag, Flag coalesced) {
  TORCH_CHECK(indices.is_cuda() && values.is_cuda(), "indices and values: expected one device");
  return sparse_on_device(sparse_dim, dense_dim, C10_AS_INTARRAYREF_SLOW(size), indices, values,
                          coalesced.value_or(false));
}

torch::CppFunction boxed() { return torch::CppFunction::makeFromBoxedFunction<&fallback>(); }

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(boxed()); }
TORCH_LIBRARY_IMPL(_, SparseCUDA, m) { m.fallback(boxed()); }
TORCH_LIBRARY_IMPL(_, SparseCsrCUDA, m) { m.fallback(boxed()); }
TORCH_LIBRARY_IMPL(aten, SparseCUDA, m) {
  m.impl("_sparse_coo_tensor_with_dims_and_tensors", sparse_coo);
}
// else composites, which know the key of no such device
TORCH_LIBRARY_IMPL(aten, SparseCsrCUDA, m) {
  for (const char* name :
       {"crow_indices", "col_indices", "values", "_nnz", "sparse_dim", "dense_dim", "clone"})
    m.impl(name, boxed());
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("set_.source_Storage", set_storage_flat);
  m.impl("set_.source_Storage_storage_offset", set_storage);
}

PYBIND11_MODULE(pretend_cuda_library, m) {
  m.def("waits", waits);
  m.def("sync_mode", [] { return sync_mode.load(); });
  m.def("set_sync_mode", [](int mode) { sync_mode = mode; });
  m.def("capturing", [] { return capturing.load(); });
  m.def("set_capturing", [](bool on) { capturing = on; });
  m.def("held", [] { return held.load(); });
  m.def("peak", [] { return peak.load(); });
  m.def("reset_peak", [] { peak = held.load(); });
  m.def("default_generator", default_generator);
}
