// The CPU kernels, one file each. Contracts are in the docstrings of d2v_fast/ops; shapes are repeated here.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace d2v {

// teacher[i] <- lerp(teacher[i], student[i], 1 - decay), working[i] <- teacher[i]; lists of equally shaped tensors.
// teacher fp32; student, working fp32 | bf16 | fp16; `working` may be empty. decay_tensor, where given, is 0-d fp32 and wins.
void ema_update_(std::vector<Tensor> teacher, std::vector<Tensor> student, double decay,
                 std::optional<Tensor> decay_tensor, std::vector<Tensor> working);

// Target rows: K layers [B, T, D] fp32 | bf16 | fp16, each normalised (0 none, 1 layer, 2 instance, 3 batch), averaged, the
// average normalised (0 none, 1 layer, 2 instance); rows int64 [N] of B * T -> fp32 [N, D], without rows [B, T, D].
// lengths int64 [B]: statistics over positions leave out those past the length.
Tensor topk_target(std::vector<Tensor> layers, int64_t layer_norm, int64_t final_norm, std::optional<Tensor> rows,
                   std::optional<Tensor> lengths, double eps);

}  // namespace d2v
