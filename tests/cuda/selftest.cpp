// Kernels that are right, and kernels that are wrong in one way each, for test_emulation.py.
#include <emulation.h>

#include <cstring>
#include <exception>
#include <map>
#include <string>
#include <vector>

// with a name, so that messages have those of the kernels
namespace selftest {

constexpr unsigned kAll = 0xFFFFFFFF;
constexpr int kThreads = 96;

// Right.

__global__ void reverse(int* out) {
  SHARED_ARRAY(int, values, kThreads);
  const int i = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  values[i] = 1000 * block + i;
  __syncthreads();
  out[block * kThreads + i] = values[kThreads - 1 - i];
}

__global__ void indices(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] += static_cast<int>(1 + thread);
}

__global__ void warps(int* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  double sum = lane;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAll, sum, distance);
  const unsigned odd = __ballot_sync(kAll, lane % 2);
  const int total = __reduce_add_sync(kAll, -lane), third = __shfl_sync(kAll, 7 * lane, 3);
  const int least = __reduce_min_sync(kAll, 5 - lane), greatest = __reduce_max_sync(kAll, 5 - lane);
  int half = 0;
  if (lane < 16) half = __reduce_add_sync(0xFFFF, 1);
  out[threadIdx.x] = sum == 496 && odd == 0xAAAAAAAA && total == -496 && third == 21 &&
                     least == -26 && greatest == 5 && __any_sync(kAll, lane == 7) &&
                     !__any_sync(kAll, 0) && half == (lane < 16 ? 16 : 0);
}

__global__ void atomics(int* out) {
  SHARED_ARRAY(int, count, 1);
  if (threadIdx.x == 0) count[0] = 0;
  __syncthreads();
  out[atomicAdd(count + 0, 1)] += 1;
  __syncthreads();
  if (threadIdx.x == 0) out[kThreads] = count[0];
}

// As the sums of plif: negative numbers are large ones without a sign.
__global__ void wide_atomics(int* out) {
  atomicAdd(reinterpret_cast<unsigned long long*>(out), static_cast<unsigned long long>(-3));
}

__global__ void neighbours(int* out) {
  SHARED_ARRAY(int, values, kThreads);
  const int i = static_cast<int>(threadIdx.x);
  for (int turn = 0; turn < 3; ++turn) {
    values[i] = turn + i;
    __syncwarp();
    out[i] = values[i ^ 1];
    __syncwarp();
  }
}

// The same value from all.
__global__ void writers_of_one_value(int* out) {
  SHARED_ARRAY(int, values, 1);
  values[0] = 1;
  __syncthreads();
  out[threadIdx.x] = values[0];
}

// Races.

__global__ void read_without_barrier(int* out) {
  SHARED_ARRAY(int, values, kThreads);
  values[threadIdx.x] = 1;
  __syncwarp();
  if (threadIdx.x < 32) __syncwarp();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void overwritten_without_barrier(int* out) {
  SHARED_ARRAY(int, values, kThreads);
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
  values[threadIdx.x] = 2;
}

__global__ void two_writers(int*) {
  SHARED_ARRAY(int, values, 1);
  values[0] = static_cast<int>(threadIdx.x);
}

__global__ void many_wrote_and_none_waited(int* out) {
  SHARED_ARRAY(int, values, 1);
  values[0] = 1;
  out[threadIdx.x] = values[0];
}

__global__ void overwritten_after_many_read(int* out) {
  SHARED_ARRAY(int, values, 1);
  if (threadIdx.x == 0) values[0] = 1;
  __syncthreads();
  out[threadIdx.x] = values[0];
  __syncwarp();
  if (threadIdx.x == 5) values[0] = 2;
}

__global__ void shuffle_as_barrier(int* out) {
  SHARED_ARRAY(int, values, 32);
  values[threadIdx.x] = 1;
  __shfl_sync(kAll, 0, 0);
  out[threadIdx.x] = values[31 - threadIdx.x];
}

__global__ void half_a_warp_barrier(int* out) {
  SHARED_ARRAY(int, values, 32);
  values[threadIdx.x] = 1;
  __syncwarp(threadIdx.x < 16 ? 0xFFFF : 0xFFFF0000);
  out[threadIdx.x] = values[31 - threadIdx.x];
}

__global__ void atomic_and_plain(int* out) {
  SHARED_ARRAY(int, count, 1);
  if (threadIdx.x == 0) count[0] = 0;
  __syncthreads();
  atomicAdd(count + 0, 1);
  out[threadIdx.x] = count[0];
}

// Divergence.

__global__ void barrier_after_exit(int*) {
  if (threadIdx.x >= 64) return;
  __syncthreads();
}

__global__ void barrier_in_a_branch(int*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __ballot_sync(kAll, threadIdx.x != 40 || (__syncthreads(), true));
}

__global__ void lane_that_never_comes(int* out) {
  if (threadIdx.x != 7) out[threadIdx.x] = __shfl_sync(kAll, 1, 0);
}

__global__ void lane_not_in_its_mask(int*) { __ballot_sync(0xFF, 1); }

__global__ void lane_outside_of_the_mask(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xFFFF, 1, 16);
}

__global__ void different_collectives(int*) {
  if (threadIdx.x < 16)
    __ballot_sync(kAll, 1);
  else
    __reduce_add_sync(kAll, 1);
}

__global__ void different_masks(int*) { __syncwarp(threadIdx.x == 0 ? 1u : kAll); }

// Shared memory.

__global__ void index_too_large(int*) {
  SHARED_ARRAY(int, values, 4);
  SHARED_ARRAY(int, others, 4);
  if (threadIdx.x == 3) values[4] = 1;
  if (threadIdx.x == 4) others[0] = 1;
}

__global__ void index_negative(int* out) {
  SHARED_ARRAY(int, others, 4);
  SHARED_ARRAY(int, values, 4);
  if (threadIdx.x == 3) {
    others[3] = 1;
    out[0] = *(values + 2 + -3);
  }
}

__global__ void not_initialised(int* out) {
  SHARED_ARRAY(int, values, 4);
  if (threadIdx.x == 0) values[0] = 1;
  __syncthreads();
  out[threadIdx.x] = values[1];
}

// The first block writes, the second reads what it left behind.
__global__ void left_by_another_block(int* out) {
  SHARED_ARRAY(int, values, 1);
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) values[0] = 1;
  out[0] = values[0];
}

__global__ void count_not_initialised(int*) {
  SHARED_ARRAY(int, count, 1);
  atomicAdd(count + 0, 1);
}

__global__ void too_much_shared_memory(int*) {
  SHARED_ARRAY(double, values, 6000);
  SHARED_ARRAY(double, others, 145);
}

__global__ void nothing(int*) {}

// A barrier is missing, and nobody watches global memory: the order of the threads shows it.
__global__ void race_in_global_memory(int* out) {
  int* mine = out + blockIdx.x * kThreads;
  mine[threadIdx.x] = 1;
  if (mine[kThreads - 1 - threadIdx.x] == 1) atomicAdd(out + 1000, 1);
}

void expect(bool right) {
  if (!right) throw std::runtime_error("wrong result");
}

std::vector<int> run(void (*kernel)(int*), dim3 grid = 2, dim3 size = kThreads) {
  std::vector<int> out(2000, 0);
  emulation::launch(kernel, grid, size, 0, nullptr, out.data());
  return out;
}

const std::map<std::string, std::function<void()>> kCases = {
    {"reverse",
     [] {
       for (int repeat = 0; repeat < 10; ++repeat) {
         const auto out = run(reverse);
         for (int i = 0; i < 2 * kThreads; ++i)
           expect(out[i] == i / kThreads * 1000 + kThreads - 1 - i % kThreads);
       }
     }},
    {"indices",
     [] {
       const auto out = run(indices, dim3(2, 3, 4), dim3(4, 3, 5));
       for (int i = 0; i < 24 * 60; ++i) expect(out[i] == 1 + i % 60);
       expect(out[24 * 60] == 0);
     }},
    {"warps",
     [] {
       const auto out = run(warps);
       for (int i = 0; i < kThreads; ++i) expect(out[i]);
     }},
    {"atomics",
     [] {
       const auto out = run(atomics, 1);
       for (int i = 0; i < kThreads; ++i) expect(out[i] == 1);
       expect(out[kThreads] == kThreads);
     }},
    {"wide_atomics",
     [] {
       const auto out = run(wide_atomics, 1);
       int64_t sum;
       std::memcpy(&sum, out.data(), sizeof(sum));
       expect(sum == -3 * kThreads);
     }},
    {"neighbours",
     [] {
       const auto out = run(neighbours);
       for (int i = 0; i < kThreads; ++i) expect(out[i] == 2 + (i ^ 1));
     }},
    {"writers_of_one_value",
     [] {
       const auto out = run(writers_of_one_value);
       for (int i = 0; i < kThreads; ++i) expect(out[i] == 1);
     }},
    {"read_without_barrier", [] { run(read_without_barrier); }},
    {"overwritten_without_barrier", [] { run(overwritten_without_barrier); }},
    {"two_writers", [] { run(two_writers); }},
    {"many_wrote_and_none_waited", [] { run(many_wrote_and_none_waited); }},
    {"overwritten_after_many_read", [] { run(overwritten_after_many_read); }},
    {"shuffle_as_barrier", [] { run(shuffle_as_barrier, 1, 32); }},
    {"half_a_warp_barrier", [] { run(half_a_warp_barrier, 1, 32); }},
    {"atomic_and_plain", [] { run(atomic_and_plain); }},
    {"barrier_after_exit", [] { run(barrier_after_exit); }},
    {"barrier_in_a_branch", [] { run(barrier_in_a_branch); }},
    {"lane_that_never_comes", [] { run(lane_that_never_comes); }},
    {"lanes_that_do_not_exist", [] { run(warps, 1, 40); }},
    {"lane_not_in_its_mask", [] { run(lane_not_in_its_mask); }},
    {"lane_outside_of_the_mask", [] { run(lane_outside_of_the_mask); }},
    {"different_collectives", [] { run(different_collectives); }},
    {"different_masks", [] { run(different_masks); }},
    {"index_too_large", [] { run(index_too_large); }},
    {"index_negative", [] { run(index_negative); }},
    {"not_initialised", [] { run(not_initialised); }},
    {"left_by_another_block", [] { run(left_by_another_block); }},
    {"count_not_initialised", [] { run(count_not_initialised); }},
    {"too_much_shared_memory", [] { run(too_much_shared_memory); }},
    {"block_too_large", [] { run(nothing, 1, 1056); }},
    {"grid_too_large", [] { run(nothing, dim3(1, 65536)); }},
    {"grid_empty", [] { run(nothing, dim3(0)); }},
    {"race_in_global_memory",
     [] { expect(run(race_in_global_memory, 10)[1000] == 10 * kThreads); }},
};

}  // namespace selftest

// The names of all cases, one a line.
extern "C" const char* names() {
  static std::string all;
  all.clear();
  for (const auto& entry : selftest::kCases) all += entry.first + "\n";
  return all.c_str();
}

// Null, or what was found.
extern "C" const char* run(const char* name) {
  static std::string what;
  try {
    selftest::kCases.at(name)();
    return nullptr;
  } catch (const std::exception& error) {
    what = error.what();
    return what.c_str();
  }
}
