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

}  // namespace d2v
