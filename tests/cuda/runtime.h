// The CUDA runtime of a machine without a GPU: what nvcc's code for the host calls, and a launch handed to whoever asked for it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulation {

// The kernels that have been launched, in order, until somebody clears it.
extern std::vector<std::string> launched;

}  // namespace emulation
