#include <algorithm>
#include <cmath>

#include "ops.h"
#include "target.h"

namespace d2v {
namespace {

// Statistics over positions are collected in groups of this many: fp32 inside a group, fp64 over the groups.
constexpr int64_t kGroup = 8;
// Positions of one partial result of the average's statistics.
constexpr int64_t kPart = 64;
// Channels that one task of the layers' statistics works on: long enough to stream, short enough for many
// tasks.
constexpr int64_t kTile = 1024;
constexpr int64_t kLanes = 16;

struct Moments {
  float mean, rstd;
};

// sum, square [kLanes] <- over 8 vectors of x, of x - pivot and its square; kept straight for the vectoriser.
template <typename T>
D2V_INLINE void add_lanes(const T* __restrict x, float pivot, double* __restrict sum,
                          double* __restrict square) {
  for (int64_t l = 0; l < kLanes; ++l) {
    const float a = static_cast<float>(x[l]) - pivot, b = static_cast<float>(x[l + kLanes]) - pivot;
    const float c = static_cast<float>(x[l + 2 * kLanes]) - pivot,
                d = static_cast<float>(x[l + 3 * kLanes]) - pivot;
    const float e = static_cast<float>(x[l + 4 * kLanes]) - pivot,
                f = static_cast<float>(x[l + 5 * kLanes]) - pivot;
    const float g = static_cast<float>(x[l + 6 * kLanes]) - pivot,
                h = static_cast<float>(x[l + 7 * kLanes]) - pivot;
    sum[l] += ((a + b) + (c + d)) + ((e + f) + (g + h));
    square[l] += ((a * a + b * b) + (c * c + d * d)) + ((e * e + f * f) + (g * g + h * h));
  }
}

// The first element is taken off before anything is summed, so a large mean costs no digits of the variance;
// sums are fp32 over 8 elements and fp64 beyond.
template <typename T>
D2V_INLINE Moments row_moments(const T* __restrict x, int64_t n, double eps) {
  double sum[kLanes] = {}, square[kLanes] = {};
  const float pivot = static_cast<float>(x[0]);
  int64_t i = 0;
  for (; i + kGroup * kLanes <= n; i += kGroup * kLanes) add_lanes(x + i, pivot, sum, square);
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const float a = static_cast<float>(x[i + l]) - pivot;
      sum[l] += a;
      square[l] += a * a;
    }
  }
  for (int64_t l = 0; i < n; ++i, ++l) {
    const float a = static_cast<float>(x[i]) - pivot;
    sum[l] += a;
    square[l] += a * a;
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) {
      sum[l] += sum[l + half];
      square[l] += square[l + half];
    }
  }
  const double share = 1.0 / static_cast<double>(n);
  const double mean = sum[0] * share;
  const double variance = std::max(square[0] * share - mean * mean, 0.0);
  return {static_cast<float>(pivot + mean), static_cast<float>(1.0 / std::sqrt(variance + eps))};
}

template <typename T>
D2V_INLINE void target_row(const TargetPlan& plan, int64_t row, float* __restrict out) {
  const int64_t width = plan.width, num_layers = plan.num_layers();
  const int64_t sample = row / plan.num_positions, position = row % plan.num_positions;
  const int64_t offset = sample * plan.sample_stride + position * plan.position_stride;
  const float share = 1.0f / static_cast<float>(num_layers);
  for (int64_t d = 0; d < width; ++d) out[d] = 0.0f;
  for (int64_t k = 0; k < num_layers; ++k) {
    const T* __restrict x = static_cast<const T*>(plan.data[k]) + offset;
    if (plan.layer_norm == Norm::none) {
      for (int64_t d = 0; d < width; ++d) out[d] += static_cast<float>(x[d]);
    } else if (plan.layer_norm == Norm::layer) {
      const Moments m = row_moments(x, width, plan.eps);
      const float scale = m.rstd * share;
      for (int64_t d = 0; d < width; ++d) out[d] += (static_cast<float>(x[d]) - m.mean) * scale;
    } else {
      const int64_t group = plan.layer_norm == Norm::batch ? k : k * plan.num_samples + sample;
      const float* __restrict mean = plan.layer_mean.data() + group * width;
      const float* __restrict scale = plan.layer_scale.data() + group * width;
      for (int64_t d = 0; d < width; ++d) out[d] += (static_cast<float>(x[d]) - mean[d]) * scale[d];
    }
  }
  if (plan.layer_norm == Norm::none) {
    for (int64_t d = 0; d < width; ++d) out[d] *= share;
  }
  // while the average's own statistics are collected they are not there yet
  if (plan.final_norm == Norm::layer) {
    const Moments m = row_moments(out, width, plan.eps);
    for (int64_t d = 0; d < width; ++d) out[d] = (out[d] - m.mean) * m.rstd;
  } else if (plan.final_norm == Norm::instance && !plan.average_mean.empty()) {
    const float* __restrict mean = plan.average_mean.data() + sample * width;
    const float* __restrict scale = plan.average_scale.data() + sample * width;
    for (int64_t d = 0; d < width; ++d) out[d] = (out[d] - mean[d]) * scale[d];
  }
}

// sum, square [n] <- over `count` rows of x, of x - pivot and its square.
template <typename T>
D2V_INLINE void add_group(const T* __restrict x, int64_t stride, int64_t count, int64_t n,
                          const float* __restrict pivot, double* __restrict sum, double* __restrict square) {
  if (count == kGroup) {
    for (int64_t i = 0; i < n; ++i) {
      const float p = pivot[i];
      const float a = static_cast<float>(x[i]) - p, b = static_cast<float>(x[i + stride]) - p;
      const float c = static_cast<float>(x[i + 2 * stride]) - p,
                  d = static_cast<float>(x[i + 3 * stride]) - p;
      const float e = static_cast<float>(x[i + 4 * stride]) - p,
                  f = static_cast<float>(x[i + 5 * stride]) - p;
      const float g = static_cast<float>(x[i + 6 * stride]) - p,
                  h = static_cast<float>(x[i + 7 * stride]) - p;
      sum[i] += ((a + b) + (c + d)) + ((e + f) + (g + h));
      square[i] += ((a * a + b * b) + (c * c + d * d)) + ((e * e + f * f) + (g * g + h * h));
    }
    return;
  }
  for (int64_t r = 0; r < count; ++r, x += stride) {
    for (int64_t d = 0; d < n; ++d) {
      const float a = static_cast<float>(x[d]) - pivot[d];
      sum[d] += a;
      square[d] += a * a;
    }
  }
}

// mean, deviation [n] <- the mean of `count` rows of x and their summed squared deviation from it. The first
// row is taken off before anything is summed, so a large mean costs no digits.
template <typename T>
D2V_INLINE void part_moments(const T* __restrict x, int64_t stride, int64_t count, int64_t n,
                             float* __restrict pivot, double* __restrict mean, double* __restrict deviation) {
  for (int64_t d = 0; d < n; ++d) {
    pivot[d] = count > 0 ? static_cast<float>(x[d]) : 0.0f;
    mean[d] = 0.0;
    deviation[d] = 0.0;
  }
  if (count == 0) return;
  for (int64_t r = 0; r < count; r += kGroup) {
    add_group(x + r * stride, stride, std::min(kGroup, count - r), n, pivot, mean, deviation);
  }
  const double share = 1.0 / static_cast<double>(count);
  for (int64_t d = 0; d < n; ++d) {
    deviation[d] = std::max(deviation[d] - mean[d] * mean[d] * share, 0.0);
    mean[d] = pivot[d] + mean[d] * share;
  }
}

template <typename T>
D2V_INLINE void target_rows_body(const TargetPlan& plan, const int64_t* rows, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) target_row<T>(plan, rows[i], out + i * plan.width);
}

// One task of the layers' statistics: layer k, sample b, channels [first, last); parts [K, B, 2, D].
template <typename T>
D2V_INLINE void layer_part_body(const TargetPlan& plan, int64_t k, int64_t b, int64_t first, int64_t last,
                                double* parts) {
  float pivot[kTile];
  const T* x = static_cast<const T*>(plan.data[k]) + b * plan.sample_stride + first;
  double* mean = parts + (k * plan.num_samples + b) * 2 * plan.width + first;
  part_moments(x, plan.position_stride, plan.lengths[b], last - first, pivot, mean, mean + plan.width);
}

// One task of the average's statistics: sample b, positions [first, last); part [2, D], rows [kPart, D],
// pivot [D].
template <typename T>
D2V_INLINE void average_part_body(const TargetPlan& plan, int64_t b, int64_t first, int64_t last,
                                  double* part, float* rows, float* pivot) {
  const int64_t width = plan.width;
  for (int64_t t = first; t < last; ++t) {
    target_row<T>(plan, b * plan.num_positions + t, rows + (t - first) * width);
  }
  part_moments(rows, width, last - first, width, pivot, part, part + width);
}

#define D2V_TARGET(suffix, T)                                                                               \
  D2V_INLINE void target_rows_##suffix##_body(const TargetPlan& plan, const int64_t* rows, int64_t n,       \
                                              float* out) {                                                 \
    target_rows_body<T>(plan, rows, n, out);                                                                \
  }                                                                                                         \
  D2V_MULTIARCH(target_rows_##suffix, (const TargetPlan& plan, const int64_t* rows, int64_t n, float* out), \
                (plan, rows, n, out))                                                                       \
  D2V_INLINE void layer_part_##suffix##_body(const TargetPlan& plan, int64_t k, int64_t b, int64_t first,   \
                                             int64_t last, double* parts) {                                 \
    layer_part_body<T>(plan, k, b, first, last, parts);                                                     \
  }                                                                                                         \
  D2V_MULTIARCH(layer_part_##suffix,                                                                        \
                (const TargetPlan& plan, int64_t k, int64_t b, int64_t first, int64_t last, double* parts), \
                (plan, k, b, first, last, parts))                                                           \
  D2V_INLINE void average_part_##suffix##_body(const TargetPlan& plan, int64_t b, int64_t first,            \
                                               int64_t last, double* part, float* rows, float* pivot) {     \
    average_part_body<T>(plan, b, first, last, part, rows, pivot);                                          \
  }                                                                                                         \
  D2V_MULTIARCH(average_part_##suffix,                                                                      \
                (const TargetPlan& plan, int64_t b, int64_t first, int64_t last, double* part, float* rows, \
                 float* pivot),                                                                             \
                (plan, b, first, last, part, rows, pivot))

D2V_TARGET(f32, float)
D2V_TARGET(bf16, BFloat16)
D2V_TARGET(f16, Half)

struct Loops {
  decltype(&target_rows_f32) rows;
  decltype(&layer_part_f32) layer_part;
  decltype(&average_part_f32) average_part;
};

const Loops& loops(ScalarType type) {
  static const Loops table[3] = {{target_rows_f32, layer_part_f32, average_part_f32},
                                 {target_rows_bf16, layer_part_bf16, average_part_bf16},
                                 {target_rows_f16, layer_part_f16, average_part_f16}};
  return table[storage_index(type)];
}

// mean, scale [groups, D] <- the moments of `parts` [groups, num_parts, 2, D] put together, in the order of
// the parts (the pairwise update of Chan, Golub and LeVeque); counts [num_parts] per group, at counts + group
// * count_stride.
void combine_parts(const double* parts, const int64_t* counts, int64_t count_stride, int64_t groups,
                   int64_t num_parts, int64_t width, double eps, double share, std::vector<float>& mean,
                   std::vector<float>& scale) {
  mean.resize(groups * width);
  scale.resize(groups * width);
  torch::stable::parallel_for(0, groups, 8, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      for (int64_t d = 0; d < width; ++d) {
        double n = 0.0, m = 0.0, deviation = 0.0;
        for (int64_t p = 0; p < num_parts; ++p) {
          const double more = static_cast<double>(counts[g * count_stride + p]);
          if (more == 0.0) continue;
          const double* part = parts + (g * num_parts + p) * 2 * width + d;
          const double delta = part[0] - m;
          const double total = n + more;
          m += delta * (more / total);
          deviation += part[width] + delta * delta * (n * more / total);
          n = total;
        }
        mean[g * width + d] = static_cast<float>(m);
        scale[g * width + d] = static_cast<float>(share / std::sqrt(deviation / std::max(n, 1.0) + eps));
      }
    }
  });
}

void layer_statistics(TargetPlan& plan) {
  const int64_t num_samples = plan.num_samples, width = plan.width, num_layers = plan.num_layers();
  const int64_t tiles = (width + kTile - 1) / kTile;
  std::vector<double> parts(num_layers * num_samples * 2 * width);
  const auto layer_part = loops(plan.type).layer_part;
  torch::stable::parallel_for(0, num_layers * num_samples * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % tiles * kTile;
      layer_part(plan, task / tiles / num_samples, task / tiles % num_samples, first,
                 std::min(width, first + kTile), parts.data());
    }
  });
  const double share = 1.0 / static_cast<double>(num_layers);
  if (plan.layer_norm == Norm::batch) {
    combine_parts(parts.data(), plan.lengths.data(), 0, num_layers, num_samples, width, plan.eps, share,
                  plan.layer_mean, plan.layer_scale);
  } else {
    std::vector<int64_t> counts;
    for (int64_t k = 0; k < num_layers; ++k)
      counts.insert(counts.end(), plan.lengths.begin(), plan.lengths.end());
    combine_parts(parts.data(), counts.data(), 1, num_layers * num_samples, 1, width, plan.eps, share,
                  plan.layer_mean, plan.layer_scale);
  }
}

void average_statistics(TargetPlan& plan) {
  const int64_t num_samples = plan.num_samples, width = plan.width;
  const int64_t num_parts = (plan.num_positions + kPart - 1) / kPart;
  std::vector<double> parts(num_samples * num_parts * 2 * width);
  std::vector<int64_t> counts(num_samples * num_parts);
  const auto average_part = loops(plan.type).average_part;
  torch::stable::parallel_for(0, num_samples * num_parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> rows((kPart + 1) * width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / num_parts, first = task % num_parts * kPart;
      const int64_t last = std::clamp(plan.lengths[b], first, first + kPart);
      counts[task] = last - first;
      average_part(plan, b, first, last, parts.data() + task * 2 * width, rows.data(),
                   rows.data() + kPart * width);
    }
  });
  combine_parts(parts.data(), counts.data(), num_parts, num_samples, num_parts, width, plan.eps, 1.0,
                plan.average_mean, plan.average_scale);
}

bool same_strides(const std::vector<Tensor>& layers) {
  for (const Tensor& x : layers) {
    if (x.stride(2) != 1 && x.size(2) > 1) return false;
    if (x.stride(0) != layers[0].stride(0) || x.stride(1) != layers[0].stride(1)) return false;
  }
  return true;
}

}  // namespace

TargetPlan plan_target(const std::vector<Tensor>& layers, int64_t layer_norm, int64_t final_norm,
                       const std::optional<Tensor>& lengths, double eps) {
  STD_TORCH_CHECK(!layers.empty(), "topk_target: no layers");
  TargetPlan plan;
  plan.type = layers[0].scalar_type();
  for (const Tensor& x : layers) {
    STD_TORCH_CHECK(x.dim() == 3 && x.scalar_type() == plan.type && x.size(0) == layers[0].size(0) &&
                        x.size(1) == layers[0].size(1) && x.size(2) == layers[0].size(2),
                    "topk_target: every layer must have the shape [B, T, D] and the dtype of the first");
  }
  const bool plain = same_strides(layers);
  for (const Tensor& x : layers) {
    plan.layers.push_back(plain ? x : torch::stable::contiguous(x));
    plan.data.push_back(plan.layers.back().const_data_ptr());
  }
  const Tensor& x = plan.layers[0];
  plan.num_samples = x.size(0);
  plan.num_positions = x.size(1);
  plan.width = x.size(2);
  plan.sample_stride = x.stride(0);
  plan.position_stride = x.stride(1);
  STD_TORCH_CHECK(layer_norm >= 0 && layer_norm <= 3 && final_norm >= 0 && final_norm <= 2,
                  "topk_target: no such norm");
  plan.layer_norm = static_cast<Norm>(layer_norm);
  plan.final_norm = static_cast<Norm>(final_norm);
  plan.eps = eps;
  plan.has_lengths = lengths.has_value();
  plan.lengths.assign(plan.num_samples, plan.num_positions);
  if (lengths.has_value()) {
    STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Long && lengths->numel() == plan.num_samples,
                    "topk_target: lengths must be int64, one per sample");
    const Tensor values = torch::stable::contiguous(*lengths);
    const int64_t* data = static_cast<const int64_t*>(values.const_data_ptr());
    for (int64_t b = 0; b < plan.num_samples; ++b) {
      STD_TORCH_CHECK(data[b] >= 0 && data[b] <= plan.num_positions, "`lengths` must be in [0, ",
                      plan.num_positions, "], but holds ", data[b], ".");
      plan.lengths[b] = data[b];
    }
  }
  if (plan.num_samples == 0 || plan.num_positions == 0 || plan.width == 0) return plan;
  if (plan.layer_norm == Norm::instance || plan.layer_norm == Norm::batch) layer_statistics(plan);
  if (plan.final_norm == Norm::instance) average_statistics(plan);
  return plan;
}

void check_rows(const TargetPlan& plan, const int64_t* rows, int64_t n) {
  const int64_t limit = plan.num_samples * plan.num_positions;
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < limit, "`rows` must be in [0, ", limit - 1, "], but holds ",
                    rows[i], ".");
    STD_TORCH_CHECK(
        !plan.has_lengths || rows[i] % plan.num_positions < plan.lengths[rows[i] / plan.num_positions],
        "`rows` must lie within `lengths`, but ", rows[i], " is a position past its sample's length.");
  }
}

void compute_target_rows(const TargetPlan& plan, const int64_t* rows, int64_t n, float* out) {
  if (plan.width > 0) loops(plan.type).rows(plan, rows, n, out);
}

Tensor topk_target(std::vector<Tensor> layers, int64_t layer_norm, int64_t final_norm,
                   std::optional<Tensor> rows, std::optional<Tensor> lengths, double eps) {
  const TargetPlan plan = plan_target(layers, layer_norm, final_norm, lengths, eps);
  const int64_t width = plan.width;
  if (rows.has_value()) {
    STD_TORCH_CHECK(rows->scalar_type() == ScalarType::Long && rows->dim() == 1,
                    "topk_target: rows must be 1-d int64");
    const Tensor index = torch::stable::contiguous(*rows);
    const int64_t n = index.numel();
    const int64_t* wanted = static_cast<const int64_t*>(index.const_data_ptr());
    check_rows(plan, wanted, n);
    Tensor out = torch::stable::new_empty(plan.layers[0], {n, width}, ScalarType::Float);
    float* target = static_cast<float*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
      compute_target_rows(plan, wanted + begin, end - begin, target + begin * width);
    });
    return out;
  }
  const int64_t num_positions = plan.num_positions;
  Tensor out =
      torch::stable::new_empty(plan.layers[0], {plan.num_samples, num_positions, width}, ScalarType::Float);
  float* target = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, plan.num_samples * num_positions, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (row % num_positions < plan.lengths[row / num_positions]) {
        compute_target_rows(plan, &row, 1, target + row * width);
      } else {
        std::fill_n(target + row * width, width, 0.0f);
      }
    }
  });
  return out;
}

}  // namespace d2v
