// Shared by all CPU kernels: storage types, run-time choice of the instruction set, checks.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace d2v {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// The instruction set that this process uses: the best that the machine supports, unless the environment
// variable D2V_CPU_CAPABILITY (baseline | avx2 | avx512) requests a lower one, as the tests do.
enum class Isa { baseline, avx2, avx512 };
Isa isa();
int64_t cpu_capability();  // `isa()` as a number, for reports and tests

// D2V_MULTIARCH(name, (int64_t n, float* x), (n, x)) defines `name` from the always-inline `name_body`: one
// copy per instruction set, chosen at run time. The body must not contain lambdas, which would be compiled
// for the baseline.
#define D2V_INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__)
#define D2V_MULTIARCH(name, params, args)                                                              \
  __attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) static void name##_avx512 params { \
    name##_body args;                                                                                  \
  }                                                                                                    \
  __attribute__((target("arch=x86-64-v3"))) static void name##_avx2 params { name##_body args; }       \
  static void name##_baseline params { name##_body args; }                                             \
  static void name params {                                                                            \
    switch (d2v::isa()) {                                                                              \
      case d2v::Isa::avx512: return name##_avx512 args;                                                \
      case d2v::Isa::avx2: return name##_avx2 args;                                                    \
      default: return name##_baseline args;                                                            \
    }                                                                                                  \
  }
#else
#define D2V_MULTIARCH(name, params, args) \
  static void name params { name##_body args; }
#endif

// Throws unless `holds`. Python receives std::invalid_argument as ValueError and std::out_of_range as
// IndexError with the message alone; torch's own check would append the path of this file on the build
// machine.
template <typename Error = std::invalid_argument, typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

// Throws if a value of the index tensor `name` is outside [0, limit), with the message of `check_range` in
// d2v_fast/ops/topk_target.py.
inline void require_index(const char* name, int64_t value, int64_t limit) {
  if (value >= 0 && value < limit) return;
  require<std::out_of_range>(limit > 0, "`", name,
                             "` must be empty, as there is nothing to index, but holds ", value, ".");
  require<std::out_of_range>(false, "`", name, "` must be in [0, ", limit - 1, "], but holds ", value, ".");
}

// Index of a storage type in the tables of kernels: fp32, bf16, fp16.
inline int storage_index(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return 0;
    case ScalarType::BFloat16: return 1;
    case ScalarType::Half: return 2;
    default: require(false, "tensors must be fp32, bf16 or fp16"); return -1;
  }
}

// Returns a new uninitialized, contiguous tensor in CPU memory. torch::stable::new_empty finds its operator
// by name at every call, which costs a small tensor more than its computation; this call has no dispatch
// either.
inline Tensor new_empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  const int32_t number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const int64_t dims = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> strides(dims, 1);
  for (int64_t i = dims - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides.data(), number,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Returns the tensor, copied only if it is not contiguous. torch::stable::contiguous finds its operator by
// name at every call.
inline Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// Advises the system to back a large new result with huge pages: its memory is new at every call, and the
// first touch of a 4 KiB page costs more than filling it. Ignores small results.
void prefer_huge_pages(Tensor& x);

// Elements per chunk: few enough to balance threads, enough to amortize the scheduling.
constexpr int64_t kChunk = 1 << 14;

}  // namespace d2v
