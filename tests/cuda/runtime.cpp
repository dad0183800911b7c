#include "runtime.h"

#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <utility>

namespace emulation {

std::vector<std::string> launched;

namespace {

// A kernel by its mangled name, the grid, threads of a block, and where each parameter lies; 0 where it ran.
using Launcher = int (*)(const char* name, unsigned x, unsigned y, unsigned z, unsigned threads,
                         void** parameters);
Launcher launcher = nullptr;
cudaError_t last_error = cudaSuccess;

// By the function of the host that stands for it.
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;

std::string demangled(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(
      abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status), std::free);
  return status == 0 ? text.get() : name;
}

}  // namespace
}  // namespace emulation

using namespace emulation;

extern "C" {

void launch_by(Launcher wanted) { launcher = wanted; }

void** __cudaRegisterFatBinary(void* binary) { return static_cast<void**>(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  kernels()[host] = device;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return kernels().count(host) ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** parameters,
                               size_t shared, cudaStream_t) {
  const std::string& name = kernels().at(kernel);
  launched.push_back(demangled(name));
  // the kernels use no more shared memory than they declare, and one axis of a block
  if (shared != 0 || block.y != 1 || block.z != 1) {
    last_error = cudaErrorInvalidConfiguration;
  } else if (launcher(name.c_str(), grid.x, grid.y, grid.z, block.x, parameters) != 0) {
    last_error = cudaErrorLaunchFailure;
  }
  return last_error;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

}  // extern "C"
