// The data2vec target in two steps: statistics over all positions, then each row independently.
#pragma once

#include <optional>
#include <vector>

#include "common.h"

namespace d2v {

// In the order of LAYER_NORMS in d2v_fast/ops/topk_target.py. `batch` is not a final norm.
enum class Norm : int64_t { none, layer, instance, batch };

struct TargetPlan {
  std::vector<Tensor> layers;  // K of [B, T, D], last dimension contiguous, the same strides in all
  std::vector<const void*> data;
  ScalarType type;
  int64_t num_samples, num_positions, width;
  int64_t sample_stride, position_stride;
  Norm layer_norm, final_norm;
  double eps;
  std::vector<int64_t> lengths;  // [B], T each if none were given
  bool has_lengths;
  // fp32 statistics over positions; empty if the norm needs none. `layer_scale` includes the division by K.
  std::vector<float> layer_mean, layer_scale;      // [K, B, D], or [K, D] for `batch`
  std::vector<float> average_mean, average_scale;  // [B, D]

  int64_t num_layers() const { return static_cast<int64_t>(data.size()); }
  // Offset of a row in elements.
  int64_t offset(int64_t row) const {
    return row / num_positions * sample_stride + row % num_positions * position_stride;
  }
};

// Checks the arguments and computes the statistics.
TargetPlan plan_target(const std::vector<Tensor>& layers, int64_t layer_norm, int64_t final_norm,
                       const std::optional<Tensor>& lengths, double eps);

// Throws if a row is outside [0, B * T) or past the length of its sample.
void check_rows(const TargetPlan& plan, const int64_t* rows, int64_t n);

// Writes the targets of rows [n] to out [n, D] in one thread. Prefetches the row `after`.
void compute_target_rows(const TargetPlan& plan, const int64_t* rows, int64_t n, int64_t after, float* out);

}  // namespace d2v
