// Registers the CPU kernels for the schemas defined in d2v_fast/ops/_library.py.
#include <cstdlib>
#include <cstring>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "ops.h"

namespace d2v {

static Isa detect_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  Isa best = Isa::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512cd"))
    best = Isa::avx512;
  const char* wanted = std::getenv("D2V_CPU_CAPABILITY");
  if (wanted != nullptr) {
    if (std::strcmp(wanted, "baseline") == 0) return Isa::baseline;
    if (std::strcmp(wanted, "avx2") == 0 && best >= Isa::avx2) return Isa::avx2;
  }
  return best;
#else
  return Isa::baseline;
#endif
}

Isa isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

int64_t cpu_capability() { return static_cast<int64_t>(isa()); }

void prefer_huge_pages(Tensor& x) {
#ifdef MADV_HUGEPAGE
  // glibc maps blocks of this size anew at every call; in the heap, the advice would outlive the result
  constexpr uintptr_t kMapped = 32 << 20, kHuge = 2 << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(x.mutable_data_ptr()),
                  bytes = x.numel() * x.element_size();
  if (bytes < kMapped) return;
  const uintptr_t end = (data + bytes) / kHuge * kHuge;
  const uintptr_t begin = (data + kHuge - 1) / kHuge * kHuge;
  // advice only: if the kernel refuses, pages stay small
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace d2v

STABLE_TORCH_LIBRARY_IMPL(d2v, CPU, m) {
  m.impl("ema_update_", TORCH_BOX(&d2v::ema_update_));
  m.impl("topk_target", TORCH_BOX(&d2v::topk_target));
  m.impl("masked_smooth_l1", TORCH_BOX(&d2v::masked_smooth_l1));
  m.impl("scale_gradient", TORCH_BOX(&d2v::scale_gradient));
  m.impl("scale_gradient_", TORCH_BOX(&d2v::scale_gradient_));
  m.impl("data2vec_loss", TORCH_BOX(&d2v::data2vec_loss));
  m.impl("layer_norm_gelu", TORCH_BOX(&d2v::layer_norm_gelu));
  m.impl("layer_norm_gelu_", TORCH_BOX(&d2v::layer_norm_gelu_));
  m.impl("layer_norm_gelu_backward", TORCH_BOX(&d2v::layer_norm_gelu_backward));
  m.impl("layer_norm_gelu_backward_", TORCH_BOX(&d2v::layer_norm_gelu_backward_));
}

STABLE_TORCH_LIBRARY_IMPL(d2v, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&d2v::cpu_capability));
  m.impl("ema_check", TORCH_BOX(&d2v::ema_check));
  m.impl("ema_prepare", TORCH_BOX(&d2v::ema_prepare));
  m.impl("ema_is_current", TORCH_BOX(&d2v::ema_is_current));
  m.impl("ema_run", TORCH_BOX(&d2v::ema_run));
  m.impl("ema_release", TORCH_BOX(&d2v::ema_release));
}
