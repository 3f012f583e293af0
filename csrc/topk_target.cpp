#include <algorithm>
#include <cmath>

#include "ops.h"
#include "row_statistics.h"
#include "simd.h"
#include "target.h"

namespace d2v {
namespace {

// Statistics over positions: fp32 sums over this many positions, then fp64 over these sums.
constexpr int64_t kGroup = 32;
// Positions read in parallel.
constexpr int64_t kRows = 8;
// Positions per partial result of the statistics of the average.
constexpr int64_t kPart = 64;
// Channels per task of the layers' statistics: many for streaming reads, few for balancing threads.
constexpr int64_t kTile = 1024;

// One row of a layer, with mean and scale of its norm: one number, or one per channel.
struct LayerRow {
  const void* x;
  const void* next;  // the next row, to prefetch
  const float* mean;
  const float* scale;
};

// Working memory of one thread, K entries each.
struct Scratch {
  explicit Scratch(int64_t num_layers) : layers(num_layers), statistics(num_layers) {}

  std::vector<LayerRow> layers;
  std::vector<RowStatistics> statistics;
};

// out[i] <- the average of the normalized layers at kVectors vectors of channels from i on. V is Lanes, or
// float for a single channel.
template <typename V, int kVectors, Norm kNorm, typename T>
D2V_INLINE void average_channels(const LayerRow* layers, int64_t num_layers, int64_t i, float share,
                                 float* out) {
  constexpr int64_t kStep = sizeof(V) / sizeof(float);
  V total[kVectors]{};
  for (int64_t k = 0; k < num_layers; ++k) {
    const T* x = static_cast<const T*>(layers[k].x) + i;
    // the statistics of a layer norm have fetched the row already
    if (kNorm != Norm::layer) __builtin_prefetch(static_cast<const T*>(layers[k].next) + i);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const V value = load_as<V>(x + v * kStep);
      if constexpr (kNorm == Norm::none) {
        total[v] += value;
      } else if constexpr (kNorm == Norm::layer) {
        total[v] += (value - *layers[k].mean) * *layers[k].scale;
      } else {
        const int64_t channel = i + v * kStep;
        total[v] += (value - load<V>(layers[k].mean + channel)) * load<V>(layers[k].scale + channel);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v)
    store<V>(out + i + v * kStep, kNorm == Norm::none ? total[v] * share : total[v]);
}

template <Norm kNorm, typename T>
D2V_INLINE void average_layers(const LayerRow* layers, int64_t num_layers, int64_t width, float share,
                               float* out) {
  // two vectors of fp32 are one cache line
  constexpr int kVectors = 2;
  int64_t i = 0;
  for (; i + kVectors * kLanes <= width; i += kVectors * kLanes) {
    average_channels<Lanes, kVectors, kNorm, T>(layers, num_layers, i, share, out);
  }
  for (; i < width; ++i) average_channels<float, 1, kNorm, T>(layers, num_layers, i, share, out);
}

// out[i] <- (out[i] - mean) * scale, with one mean and scale, or one per channel if `step` is 1.
template <typename V>
D2V_INLINE void normalize_channels(float* out, const float* mean, const float* scale, bool by_channel,
                                   int64_t i) {
  const V x = load<V>(out + i);
  store<V>(out + i, by_channel ? (x - load<V>(mean + i)) * load<V>(scale + i) : (x - *mean) * *scale);
}

D2V_INLINE void normalize_row(float* out, const float* mean, const float* scale, bool by_channel,
                              int64_t width) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) normalize_channels<Lanes>(out, mean, scale, by_channel, i);
  for (; i < width; ++i) normalize_channels<float>(out, mean, scale, by_channel, i);
}

// Computes the target of `row` and prefetches `next_row`.
template <typename T>
D2V_INLINE void target_row(const TargetPlan& plan, int64_t row, int64_t next_row, Scratch& scratch,
                           float* out) {
  LayerRow* layers = scratch.layers.data();
  RowStatistics* statistics = scratch.statistics.data();
  const int64_t width = plan.width, num_layers = plan.num_layers(), sample = row / plan.num_positions;
  const int64_t offset = plan.offset(row), next = plan.offset(next_row);
  const float share = 1.0f / static_cast<float>(num_layers);
  for (int64_t k = 0; k < num_layers; ++k) {
    const T* data = static_cast<const T*>(plan.data[k]);
    layers[k].x = data + offset;
    layers[k].next = data + next;
    if (plan.layer_norm == Norm::layer) {
      statistics[k] = row_statistics(data + offset, data + next, width, plan.eps);
      statistics[k].rstd *= share;
      layers[k].mean = &statistics[k].mean;
      layers[k].scale = &statistics[k].rstd;
    } else if (plan.layer_norm != Norm::none) {
      const int64_t group = plan.layer_norm == Norm::batch ? k : k * plan.num_samples + sample;
      layers[k].mean = plan.layer_mean.data() + group * width;
      layers[k].scale = plan.layer_scale.data() + group * width;
    }
  }
  switch (plan.layer_norm) {
    case Norm::none: average_layers<Norm::none, T>(layers, num_layers, width, share, out); break;
    case Norm::layer: average_layers<Norm::layer, T>(layers, num_layers, width, share, out); break;
    default: average_layers<Norm::instance, T>(layers, num_layers, width, share, out);
  }
  if (plan.final_norm == Norm::layer) {
    const RowStatistics m = row_statistics(out, out, width, plan.eps);
    normalize_row(out, &m.mean, &m.rstd, false, width);
  } else if (plan.final_norm == Norm::instance && !plan.average_mean.empty()) {
    // not yet available while the statistics of the average are being collected
    normalize_row(out, plan.average_mean.data() + sample * width, plan.average_scale.data() + sample * width,
                  true, width);
  }
}

// Adds x - pivot and its square at channel i, over `count` <= kRows rows, to sum and square. V as above.
template <typename V, typename T>
D2V_INLINE void add_positions(const T* x, int64_t stride, int64_t count, int64_t i, const float* pivot,
                              float* sum, float* square) {
  const V p = load<V>(pivot + i);
  V total{}, total2{};
  if (count == kRows) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      const V a = load_as<V>(x + r * stride + i) - p;
      total += a;
      total2 += a * a;
    }
  } else {
    for (int64_t r = 0; r < count; ++r) {
      const V a = load_as<V>(x + r * stride + i) - p;
      total += a;
      total2 += a * a;
    }
  }
  add_to<V>(sum + i, total);
  add_to<V>(square + i, total2);
}

// Updates mean and deviation [n] of `before` rows with `count` more (the pairwise update of Chan, Golub and
// LeVeque). The first row is subtracted before summing, so that a large mean does not cost precision.
template <typename T>
D2V_INLINE void add_group(const T* x, int64_t stride, int64_t before, int64_t count, int64_t n,
                          double* __restrict mean, double* __restrict deviation) {
  float pivot[kTile], sums[kTile], squares[kTile];
  const double more = static_cast<double>(count), total = static_cast<double>(before + count);
  const double weight = more / total, cross = static_cast<double>(before) * weight, share = 1.0 / more;
  for (int64_t first = 0; first < n; first += kTile) {
    const int64_t width = std::min(kTile, n - first);
    for (int64_t i = 0; i < width; ++i) {
      pivot[i] = static_cast<float>(x[first + i]);
      sums[i] = squares[i] = 0.0f;
    }
    for (int64_t r = 0; r < count; r += kRows) {
      const T* rows = x + r * stride + first;
      const int64_t few = std::min(kRows, count - r);
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes)
        add_positions<Lanes>(rows, stride, few, i, pivot, sums, squares);
      for (; i < width; ++i) add_positions<float>(rows, stride, few, i, pivot, sums, squares);
    }
    for (int64_t i = 0; i < width; ++i) {
      const double sum = sums[i], square = squares[i], old = mean[first + i];
      const double delta = pivot[i] + sum * share - old;
      mean[first + i] = old + delta * weight;
      deviation[first + i] += std::max(square - sum * sum * share, 0.0) + delta * delta * cross;
    }
  }
}

// Computes the mean [n] of `count` rows of x and their summed squared deviation [n] from it.
template <typename T>
D2V_INLINE void part_statistics(const T* x, int64_t stride, int64_t count, int64_t n, double* __restrict mean,
                                double* __restrict deviation) {
  for (int64_t d = 0; d < n; ++d) mean[d] = deviation[d] = 0.0;
  for (int64_t r = 0; r < count; r += kGroup) {
    add_group(x + r * stride, stride, r, std::min(kGroup, count - r), n, mean, deviation);
  }
}

template <typename T>
D2V_INLINE void target_rows_body(const TargetPlan& plan, const int64_t* rows, int64_t n, int64_t after,
                                 Scratch& scratch, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    target_row<T>(plan, rows[i], i + 1 < n ? rows[i + 1] : after, scratch, out + i * plan.width);
  }
}

// One task of the layers' statistics: layer k, sample b, channels [first, last); parts [K, B, 2, D].
template <typename T>
D2V_INLINE void layer_part_body(const TargetPlan& plan, int64_t k, int64_t b, int64_t first, int64_t last,
                                double* parts) {
  const T* x = static_cast<const T*>(plan.data[k]) + b * plan.sample_stride + first;
  double* mean = parts + (k * plan.num_samples + b) * 2 * plan.width + first;
  part_statistics(x, plan.position_stride, plan.lengths[b], last - first, mean, mean + plan.width);
}

// One task of the average's statistics: sample b, positions [first, last); part [2, D], rows [kPart, D].
template <typename T>
D2V_INLINE void average_part_body(const TargetPlan& plan, int64_t b, int64_t first, int64_t last,
                                  double* part, float* rows, Scratch& scratch) {
  const int64_t width = plan.width;
  for (int64_t t = first; t < last; ++t) {
    const int64_t row = b * plan.num_positions + t;
    target_row<T>(plan, row, t + 1 < last ? row + 1 : row, scratch, rows + (t - first) * width);
  }
  part_statistics(rows, width, last - first, width, part, part + width);
}

#define D2V_TARGET(suffix, T)                                                                                \
  D2V_INLINE void target_rows_##suffix##_body(const TargetPlan& plan, const int64_t* rows, int64_t n,        \
                                              int64_t after, Scratch& scratch, float* out) {                 \
    target_rows_body<T>(plan, rows, n, after, scratch, out);                                                 \
  }                                                                                                          \
  D2V_MULTIARCH(                                                                                             \
      target_rows_##suffix,                                                                                  \
      (const TargetPlan& plan, const int64_t* rows, int64_t n, int64_t after, Scratch& scratch, float* out), \
      (plan, rows, n, after, scratch, out))                                                                  \
  D2V_INLINE void layer_part_##suffix##_body(const TargetPlan& plan, int64_t k, int64_t b, int64_t first,    \
                                             int64_t last, double* parts) {                                  \
    layer_part_body<T>(plan, k, b, first, last, parts);                                                      \
  }                                                                                                          \
  D2V_MULTIARCH(layer_part_##suffix,                                                                         \
                (const TargetPlan& plan, int64_t k, int64_t b, int64_t first, int64_t last, double* parts),  \
                (plan, k, b, first, last, parts))                                                            \
  D2V_INLINE void average_part_##suffix##_body(const TargetPlan& plan, int64_t b, int64_t first,             \
                                               int64_t last, double* part, float* rows, Scratch& scratch) {  \
    average_part_body<T>(plan, b, first, last, part, rows, scratch);                                         \
  }                                                                                                          \
  D2V_MULTIARCH(average_part_##suffix,                                                                       \
                (const TargetPlan& plan, int64_t b, int64_t first, int64_t last, double* part, float* rows,  \
                 Scratch& scratch),                                                                          \
                (plan, b, first, last, part, rows, scratch))

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

// Combines the statistics of `parts` [groups, num_parts, 2, D] in order into mean and scale [groups, D] (the
// pairwise update of Chan, Golub and LeVeque). counts [num_parts] of a group start at counts + group *
// count_stride.
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
    std::vector<float> rows(kPart * width);
    Scratch scratch(plan.num_layers());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / num_parts, first = task % num_parts * kPart;
      const int64_t last = std::clamp(plan.lengths[b], first, first + kPart);
      counts[task] = last - first;
      average_part(plan, b, first, last, parts.data() + task * 2 * width, rows.data(), scratch);
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
  require(!layers.empty(), "topk_target: no layers");
  TargetPlan plan;
  plan.type = layers[0].scalar_type();
  for (const Tensor& x : layers) {
    require(x.dim() == 3 && x.scalar_type() == plan.type && x.size(0) == layers[0].size(0) &&
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
  require(layer_norm >= 0 && layer_norm <= 3 && final_norm >= 0 && final_norm <= 2,
          "topk_target: no such norm");
  plan.layer_norm = static_cast<Norm>(layer_norm);
  plan.final_norm = static_cast<Norm>(final_norm);
  plan.eps = eps;
  plan.has_lengths = lengths.has_value();
  plan.lengths.assign(plan.num_samples, plan.num_positions);
  if (lengths.has_value()) {
    require(lengths->scalar_type() == ScalarType::Long && lengths->numel() == plan.num_samples,
            "topk_target: lengths must be int64, one per sample");
    const Tensor values = packed(*lengths);
    const int64_t* data = static_cast<const int64_t*>(values.const_data_ptr());
    for (int64_t b = 0; b < plan.num_samples; ++b) {
      require_index("lengths", data[b], plan.num_positions + 1);
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
    require_index("rows", rows[i], limit);
    require<std::out_of_range>(
        !plan.has_lengths || rows[i] % plan.num_positions < plan.lengths[rows[i] / plan.num_positions],
        "`rows` must lie within `lengths`, but ", rows[i], " is a position past its sample's length.");
  }
}

void compute_target_rows(const TargetPlan& plan, const int64_t* rows, int64_t n, int64_t after, float* out) {
  thread_local Scratch scratch(0);
  if (plan.width == 0 || n == 0) return;
  scratch.layers.resize(plan.num_layers());
  scratch.statistics.resize(plan.num_layers());
  loops(plan.type).rows(plan, rows, n, after, scratch, out);
}

Tensor topk_target(std::vector<Tensor> layers, int64_t layer_norm, int64_t final_norm,
                   std::optional<Tensor> rows, std::optional<Tensor> lengths, double eps) {
  const TargetPlan plan = plan_target(layers, layer_norm, final_norm, lengths, eps);
  const int64_t width = plan.width;
  if (rows.has_value()) {
    require(rows->scalar_type() == ScalarType::Long && rows->dim() == 1,
            "topk_target: rows must be 1-d int64");
    const Tensor index = packed(*rows);
    const int64_t n = index.numel();
    const int64_t* wanted = static_cast<const int64_t*>(index.const_data_ptr());
    check_rows(plan, wanted, n);
    Tensor out = new_empty({n, width}, ScalarType::Float);
    prefer_huge_pages(out);
    float* target = static_cast<float*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
      compute_target_rows(plan, wanted + begin, end - begin, wanted[end - 1], target + begin * width);
    });
    return out;
  }
  const int64_t num_positions = plan.num_positions;
  Tensor out = new_empty({plan.num_samples, num_positions, width}, ScalarType::Float);
  prefer_huge_pages(out);
  float* target = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, plan.num_samples * num_positions, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (row % num_positions < plan.lengths[row / num_positions]) {
        compute_target_rows(plan, &row, 1, row + 1 < end ? row + 1 : row, target + row * width);
      } else {
        std::fill_n(target + row * width, width, 0.0f);
      }
    }
  });
  return out;
}

}  // namespace d2v
