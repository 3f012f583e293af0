// The target of data2vec in two steps: what needs every position (statistics), then any row by itself.
#pragma once

#include <optional>
#include <vector>

#include "common.h"

namespace d2v {

// In the order of LAYER_NORMS in d2v_fast/ops/topk_target.py; a final norm is never `batch`.
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
  // statistics over positions, fp32; empty where a norm needs none. The layers' scale has the division by K
  // in it.
  std::vector<float> layer_mean, layer_scale;      // [K, B, D], or [K, D] for `batch`
  std::vector<float> average_mean, average_scale;  // [B, D]

  int64_t num_layers() const { return static_cast<int64_t>(data.size()); }
  // Where a row begins, in elements.
  int64_t offset(int64_t row) const {
    return row / num_positions * sample_stride + row % num_positions * position_stride;
  }
};

// Checks the arguments and computes the statistics.
TargetPlan plan_target(const std::vector<Tensor>& layers, int64_t layer_norm, int64_t final_norm,
                       const std::optional<Tensor>& lengths, double eps);

// Refuses rows outside [0, B * T) or past the length of their sample.
void check_rows(const TargetPlan& plan, const int64_t* rows, int64_t n);

// out[i] <- target of rows[i], [n, D]. Called by one thread, which will want the row `after` next.
void compute_target_rows(const TargetPlan& plan, const int64_t* rows, int64_t n, int64_t after, float* out);

}  // namespace d2v
