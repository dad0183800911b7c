#include "isa.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>

namespace sparse_ce::cpu {

const Isa& isa() {
  const char* wanted = std::getenv("SPARSE_CE_CPU_ISA");
  for (const Isa* candidate : {&avx512, &avx2, &neon, &portable})
    if (candidate->supported() && (!wanted || !*wanted || !std::strcmp(wanted, candidate->name)))
      return *candidate;
  TORCH_CHECK(false,
              "SPARSE_CE_CPU_ISA: expected avx512, avx2, neon or portable and a processor that has "
              "it, got ",
              wanted);
}

}  // namespace sparse_ce::cpu
