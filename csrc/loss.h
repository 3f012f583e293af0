// The rows of the loss, shared by masked_smooth_l1 and data2vec_loss.
#pragma once

#include <functional>
#include <tuple>

#include "common.h"

namespace d2v {

// Predictions and slopes in their storage type, targets fp32.
struct LossRows {
  const void* pred[4];
  const float* target[4];
  void* slope[4];  // unused without a gradient
  // what is wanted after these, fetched meanwhile: rows jump about in memory too much for the machine to
  // guess
  const void* next_pred[4];
  const float* next_target[4];
};

// What all rows share. beta 0 is the squared error. The slopes include `slope_factor`; `slope` is [N, D], or
// empty without a gradient.
struct LossSettings {
  LossSettings(double beta, double slope_factor, const Tensor& slope);

  float beta, inverse;  // 1 / beta
  float near, far;      // slope of a squared error, per error, and of an error above beta
  bool is_square, need_grad, stream;
};

// sums [5, width] += over `count` <= 4 rows: the loss of every element, pred, pred^2, target, target^2;
// slope <- derivative of each element's loss, where wanted. Called by one thread.
void add_loss_rows(ScalarType pred_type, const LossRows& rows, int64_t count, int64_t width,
                   const LossSettings& settings, float* sums);

// Runs block(begin, end, sums) over blocks of the n rows, whose partition depends on n only, then adds the
// blocks' sums in order, so the result does not depend on the threads. Returns {loss fp32 [], moments fp32
// [4, width]} made like `pred`.
std::tuple<Tensor, Tensor> sum_loss_blocks(const Tensor& pred, double factor,
                                           const std::function<void(int64_t, int64_t, float*)>& block);

// What the sum over n rows and channels is multiplied with; finite for no rows.
double loss_factor(int64_t num_elements, double scale, bool mean);

// What of the loss's factor the saved slope holds, and what the backward pass multiplies with: all and
// nothing but for fp16, whose exponent is too short. There it is the mantissa and the power of two, so that a
// small factor does not underflow before a loss scale reaches it, and the slope is rounded once.
struct FactorParts {
  double saved, left;
};
FactorParts split_factor(double factor, ScalarType type);

// The predictions [N, D] with a contiguous last dimension: themselves where they are so.
Tensor plain_rows(const Tensor& x);

}  // namespace d2v
