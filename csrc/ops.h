// The CPU kernels, one file each. The docstrings of d2v_fast/ops specify them; shapes are repeated here.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace d2v {

// teacher[i] <- lerp(teacher[i], student[i], 1 - decay), working[i] <- teacher[i]; lists of equally shaped
// tensors. teacher fp32; student, working fp32 | bf16 | fp16; `working` may be empty. decay_tensor, 0-d fp32
// or fp64, overrides decay if given.
void ema_update_(std::vector<Tensor> teacher, std::vector<Tensor> student, double decay,
                 std::optional<Tensor> decay_tensor, std::vector<Tensor> working);

// Checks the arguments of ema_update_ without updating, for tensors on any device.
void ema_check(std::vector<Tensor> teacher, std::vector<Tensor> student, std::vector<Tensor> working);
// Checks the tensors and stores them until ema_release. Returns the handle of this prepared update.
int64_t ema_prepare(std::vector<Tensor> teacher, std::vector<Tensor> student, std::vector<Tensor> working);
// Whether every tensor still has the same address, shape, strides, dtype and device.
bool ema_is_current(int64_t handle);
// Runs ema_update_ on the tensors of a prepared update, which its schema does not mark as written. Returns
// false, without an update, unless the tensors are current, contiguous and on the CPU.
bool ema_run(int64_t handle, double decay, std::optional<Tensor> decay_tensor);
void ema_release(int64_t handle);

// Target rows: K layers [B, T, D] fp32 | bf16 | fp16, each normalized (0 none, 1 layer, 2 instance, 3 batch),
// averaged, the average normalized (0 none, 1 layer, 2 instance); rows int64 [N] of B * T -> fp32 [N, D],
// without rows [B, T, D]. lengths int64 [B]: statistics over positions leave out those past the length.
Tensor topk_target(std::vector<Tensor> layers, int64_t layer_norm, int64_t final_norm,
                   std::optional<Tensor> rows, std::optional<Tensor> lengths, double eps);

// pred [N, D], target [M, D], fp32 | bf16 | fp16; target_rows int64 [N] of M, without it M == N. beta 0 is
// the squared error.
// Returns loss fp32 []: scale times the sum or the mean; fp32 [4, D]: sums of pred, pred^2, target, target^2,
// or [0] without need_moments;
// slope [N, D] in the dtype of pred: derivative of each element's loss times the part of its factor that
// split_factor (loss.h) saves, or [0] without need_grad.
std::tuple<Tensor, Tensor, Tensor> masked_smooth_l1(Tensor pred, Tensor target,
                                                    std::optional<Tensor> target_rows, double beta,
                                                    double scale, bool mean, bool need_grad,
                                                    bool need_moments);

// slope * grad_output * the factor that split_factor left, in the dtype of slope.
Tensor scale_gradient(Tensor slope, Tensor grad_output, double scale, bool mean);
void scale_gradient_(Tensor slope, Tensor grad_output, double scale, bool mean);  // in place

// masked_smooth_l1 of topk_target without storing the target.
std::tuple<Tensor, Tensor, Tensor> data2vec_loss(Tensor pred, std::vector<Tensor> layers, int64_t layer_norm,
                                                 int64_t final_norm, Tensor rows,
                                                 std::optional<Tensor> lengths, double eps,
                                                 std::optional<Tensor> target_rows, double beta, double scale,
                                                 bool mean, bool need_grad, bool need_moments);

// Exact GELU of the layer norm of x [..., C] fp32 | bf16 | fp16, with weight and bias [C] in fp32 or the
// dtype of x. Returns y [..., C] in the dtype of x; mean, rstd [...] fp32.
std::tuple<Tensor, Tensor, Tensor> layer_norm_gelu(Tensor x, Tensor weight, Tensor bias, double eps);
// In place: x, contiguous, <- y. Returns mean, rstd.
std::tuple<Tensor, Tensor> layer_norm_gelu_(Tensor x, Tensor weight, Tensor bias, double eps);

// From grad [..., C], returns grad_x [..., C], grad_weight [C], grad_bias [C] in the dtypes of x, weight,
// bias.
std::tuple<Tensor, Tensor, Tensor> layer_norm_gelu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias,
                                                            Tensor mean, Tensor rstd);
// In place: grad, contiguous, <- grad_x. Returns grad_weight, grad_bias.
std::tuple<Tensor, Tensor> layer_norm_gelu_backward_(Tensor grad, Tensor x, Tensor weight, Tensor bias,
                                                     Tensor mean, Tensor rstd);

}  // namespace d2v
