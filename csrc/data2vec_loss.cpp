#include <algorithm>
#include <numeric>
#include <vector>

#include "loss.h"
#include "ops.h"
#include "target.h"

namespace d2v {
namespace {

// Compute targets in strips of 16 rows before comparing: interleaving would evict the loss accumulators from
// L1.
constexpr int64_t kStrip = 16;

// Orders the predictions so that those sharing a target are adjacent and the target is computed once.
std::vector<int64_t> by_target(const std::vector<int64_t>& wanted, int64_t num_rows) {
  std::vector<int64_t> first(num_rows + 1);
  for (const int64_t row : wanted) ++first[row + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  std::vector<int64_t> order(wanted.size());
  for (size_t i = 0; i < wanted.size(); ++i) order[first[wanted[i]]++] = static_cast<int64_t>(i);
  return order;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> data2vec_loss(Tensor pred, std::vector<Tensor> layers, int64_t layer_norm,
                                                 int64_t final_norm, Tensor rows,
                                                 std::optional<Tensor> lengths, double eps,
                                                 std::optional<Tensor> target_rows, double beta, double scale,
                                                 bool mean, bool need_grad, bool need_moments) {
  const TargetPlan plan = plan_target(layers, layer_norm, final_norm, lengths, eps);
  require(pred.dim() == 2 && pred.size(1) == plan.width, "data2vec_loss: pred must have shape [N, ",
          plan.width, "]");
  require(rows.scalar_type() == ScalarType::Long && rows.dim() == 1, "data2vec_loss: rows must be 1-d int64");
  const int64_t n = pred.size(0), width = plan.width;
  const ScalarType type = pred.scalar_type();
  const int64_t bytes = storage_index(type) == 0 ? 4 : 2;
  pred = plain_rows(pred);
  rows = packed(rows);
  const int64_t* row_data = static_cast<const int64_t*>(rows.const_data_ptr());
  check_rows(plan, row_data, rows.numel());

  std::vector<int64_t> wanted(n), order;
  if (target_rows.has_value()) {
    require(target_rows->scalar_type() == ScalarType::Long && target_rows->numel() == n,
            "data2vec_loss: target_rows must be int64, one per row of pred");
    const Tensor map_storage = packed(*target_rows);
    const int64_t* map = static_cast<const int64_t*>(map_storage.const_data_ptr());
    const int64_t num_targets = rows.numel();
    for (int64_t i = 0; i < n; ++i) {
      require_index("target_rows", map[i], num_targets);
      wanted[i] = row_data[map[i]];
    }
    order = by_target(wanted, plan.num_samples * plan.num_positions);
  } else {
    require(rows.numel() == n, "data2vec_loss: ", n, " rows of pred and ", rows.numel(), " rows");
    wanted.assign(row_data, row_data + n);
    order.resize(n);
    std::iota(order.begin(), order.end(), 0);
  }

  Tensor slope = new_empty(need_grad ? std::vector<int64_t>{n, width} : std::vector<int64_t>{0}, type);
  prefer_huge_pages(slope);
  const char* pred_data = static_cast<const char*>(pred.const_data_ptr());
  char* slope_data = static_cast<char*>(slope.mutable_data_ptr());
  const int64_t pred_stride = pred.stride(0) * bytes;
  const LossSettings settings(beta, loss_factor(n * width, scale, mean), slope, need_moments);
  auto [loss, statistics] = sum_loss_blocks(pred, settings, [&](int64_t begin, int64_t end, float* sums) {
    // one strip of targets, and the last target of the previous strip
    std::vector<float> targets((kStrip + 1) * width);
    const float* target[kStrip];
    int64_t slot = 0, held = -1;
    for (int64_t first = begin; first < end; first += kStrip) {
      const int64_t last = std::min(end, first + kStrip);
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = wanted[order[i]];
        if (row != held) {
          slot = (slot + 1) % (kStrip + 1);
          const int64_t after = wanted[order[std::min(i + 1, end - 1)]];
          compute_target_rows(plan, &row, 1, after, targets.data() + slot * width);
          held = row;
        }
        target[i - first] = targets.data() + slot * width;
      }
      for (int64_t i = first; i < last; i += 4) {
        const int64_t count = std::min<int64_t>(4, last - i);
        LossRows group;
        for (int64_t r = 0; r < count; ++r) {
          const int64_t p = order[i + r];
          group.pred[r] = pred_data + p * pred_stride;
          group.target[r] = group.next_target[r] = target[i + r - first];
          group.next_pred[r] = pred_data + order[std::min(i + 4 + r, end - 1)] * pred_stride;
          group.slope[r] = need_grad ? slope_data + p * width * bytes : nullptr;
        }
        add_loss_rows(type, group, count, width, settings, sums);
      }
    }
  });
  return {loss, statistics, slope};
}

}  // namespace d2v
