// Forward of bfloat16 where an instruction compares its pairs, as from sm_90 on: all else of the emulation does without.
#define COMPARES_BFLOAT16
#include "topk_ce.cuh"

using namespace sparse_ce::cuda;

extern "C" const char* topk_ce_forward(const Forward* a) {
  static std::string what;
  try {
    if (forward_rows<bfloat16>(*a, nullptr) == cudaSuccess) return nullptr;
    what = "the launch was refused";
  } catch (const std::exception& error) { what = error.what(); }
  return what.c_str();
}
// Of short rows.
extern "C" int64_t topk_ce_scratch_bytes(const Forward*) { return 0; }
