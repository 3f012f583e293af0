// The loss over rows, shared by masked_smooth_l1 and data2vec_loss.
#pragma once

#include <functional>
#include <tuple>

#include "common.h"

namespace d2v {

// Up to four rows: predictions and slopes in their storage type, targets in fp32.
struct LossRows {
  const void* pred[4];
  const float* target[4];
  void* slope[4];  // unused without a gradient
  // the next rows to prefetch: the hardware cannot predict the order of rows
  const void* next_pred[4];
  const float* next_target[4];
};

// Settings of all rows. beta 0 is the squared error. The slopes include the part of `factor` that
// split_factor saves; `slope` is [N, D] in the dtype of the predictions, or empty without a gradient.
struct LossSettings {
  LossSettings(double beta, double factor, const Tensor& slope, bool need_moments);

  double factor;        // of the sum over rows and channels
  float beta, inverse;  // 1 / beta
  float near, far;      // slope per unit of error within beta, and slope beyond beta
  bool is_square, need_grad, need_moments, stream;
};

// Adds `count` <= 4 rows to sums [5, width]: the loss of every element, pred, pred^2, target, target^2;
// without moments [1, width]. With a gradient, writes the derivative of each element's loss to slope. Runs in
// one thread.
void add_loss_rows(ScalarType pred_type, const LossRows& rows, int64_t count, int64_t width,
                   const LossSettings& settings, float* sums);

// Runs block(begin, end, sums) over blocks of the n rows and adds the blocks' sums in order. The partition
// depends on n only, so the result does not depend on the number of threads. Returns {loss fp32 [], sums
// fp32 [4, width], or [0] without moments} on the device of `pred`.
std::tuple<Tensor, Tensor> sum_loss_blocks(const Tensor& pred, const LossSettings& settings,
                                           const std::function<void(int64_t, int64_t, float*)>& block);

// Factor of the sum over rows and channels; finite if there are no rows.
double loss_factor(int64_t num_elements, double scale, bool mean);

// The loss's factor, divided between the saved slope (`saved`) and the backward pass (`left`). The slope
// holds all of it except in fp16, where it holds the mantissa only: the power of two could underflow before
// the loss scale is applied. The slope is rounded once either way.
struct FactorParts {
  double saved, left;
};
FactorParts split_factor(double factor, ScalarType type);

// Returns the predictions [N, D] with a contiguous last dimension; copies only if necessary.
Tensor plain_rows(const Tensor& x);

}  // namespace d2v
