#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "loss.h"
#include "ops.h"

namespace d2v {
namespace {

// Rows of one block: enough that the sums of a block are small beside its rows, few enough that fp32 sums
// stay exact.
constexpr int64_t kMinRows = 64, kMaxRows = 256, kBlocks = 128;
// Channels at a time: four rows of both sides, their slopes and the sums stay in the first-level cache.
constexpr int64_t kTile = 256;

template <bool kSquare>
D2V_INLINE float element_loss(float e, const LossSettings& s) {
  const float size = std::fabs(e);
  return kSquare ? e * e : (size < s.beta ? e * e * s.half_inverse : size - s.half_beta);
}

template <bool kSquare>
D2V_INLINE float element_slope(float e, const LossSettings& s) {
  // written so that NaN stays NaN
  return kSquare ? e * s.near : (e >= s.beta ? s.far : (e <= -s.beta ? -s.far : e * s.near));
}

// All loops below run over channels [first, last); sums is [5, width].
template <typename P, bool kSquare>
D2V_INLINE void add_four(const LossRows& rows, int64_t first, int64_t last, int64_t width,
                         const LossSettings s, float* __restrict sums) {
  const P* __restrict p0 = static_cast<const P*>(rows.pred[0]);
  const P* __restrict p1 = static_cast<const P*>(rows.pred[1]);
  const P* __restrict p2 = static_cast<const P*>(rows.pred[2]);
  const P* __restrict p3 = static_cast<const P*>(rows.pred[3]);
  const float* __restrict t0 = rows.target[0];
  const float* __restrict t1 = rows.target[1];
  const float* __restrict t2 = rows.target[2];
  const float* __restrict t3 = rows.target[3];
  float* __restrict loss = sums;
  float* __restrict pred = sums + width;
  float* __restrict pred2 = sums + 2 * width;
  float* __restrict target = sums + 3 * width;
  float* __restrict target2 = sums + 4 * width;
  for (int64_t i = first; i < last; ++i) {
    const float a = static_cast<float>(p0[i]), b = static_cast<float>(p1[i]);
    const float c = static_cast<float>(p2[i]), d = static_cast<float>(p3[i]);
    const float w = t0[i], x = t1[i], y = t2[i], z = t3[i];
    loss[i] += (element_loss<kSquare>(a - w, s) + element_loss<kSquare>(b - x, s)) +
               (element_loss<kSquare>(c - y, s) + element_loss<kSquare>(d - z, s));
    pred[i] += (a + b) + (c + d);
    pred2[i] += (a * a + b * b) + (c * c + d * d);
    target[i] += (w + x) + (y + z);
    target2[i] += (w * w + x * x) + (y * y + z * z);
  }
}

template <typename P, bool kSquare>
D2V_INLINE void add_one(const P* __restrict p, const float* __restrict t, int64_t first, int64_t last,
                        int64_t width, const LossSettings s, float* __restrict sums) {
  for (int64_t i = first; i < last; ++i) {
    const float a = static_cast<float>(p[i]), w = t[i];
    sums[i] += element_loss<kSquare>(a - w, s);
    sums[i + width] += a;
    sums[i + 2 * width] += a * a;
    sums[i + 3 * width] += w;
    sums[i + 4 * width] += w * w;
  }
}

// A loop of its own: with four more outputs the loop over four rows is not vectorised.
template <typename P, bool kSquare>
D2V_INLINE void slope_row(const P* __restrict p, const float* __restrict t, int64_t first, int64_t last,
                          const LossSettings s, P* __restrict slope) {
  for (int64_t i = first; i < last; ++i) {
    slope[i] = static_cast<P>(element_slope<kSquare>(static_cast<float>(p[i]) - t[i], s));
  }
}

template <typename P, bool kSquare, bool kGrad>
D2V_INLINE void add_rows(const LossRows& rows, int64_t count, int64_t width, const LossSettings s,
                         float* sums) {
  for (int64_t first = 0; first < width; first += kTile) {
    const int64_t last = std::min(width, first + kTile);
    if (count == 4) add_four<P, kSquare>(rows, first, last, width, s, sums);
    for (int64_t r = 0; r < count; ++r) {
      const P* p = static_cast<const P*>(rows.pred[r]);
      if (count < 4) add_one<P, kSquare>(p, rows.target[r], first, last, width, s, sums);
      if (kGrad) slope_row<P, kSquare>(p, rows.target[r], first, last, s, static_cast<P*>(rows.slope[r]));
    }
  }
}

#define D2V_LOSS_ROWS(name, P, kSquare, kGrad)                                                            \
  D2V_INLINE void name##_body(const LossRows& rows, int64_t count, int64_t width, const LossSettings& s,  \
                              float* sums) {                                                              \
    add_rows<P, kSquare, kGrad>(rows, count, width, s, sums);                                             \
  }                                                                                                       \
  D2V_MULTIARCH(name,                                                                                     \
                (const LossRows& rows, int64_t count, int64_t width, const LossSettings& s, float* sums), \
                (rows, count, width, s, sums))

D2V_LOSS_ROWS(smooth_f32, float, false, false)
D2V_LOSS_ROWS(smooth_grad_f32, float, false, true)
D2V_LOSS_ROWS(square_f32, float, true, false)
D2V_LOSS_ROWS(square_grad_f32, float, true, true)
D2V_LOSS_ROWS(smooth_bf16, BFloat16, false, false)
D2V_LOSS_ROWS(smooth_grad_bf16, BFloat16, false, true)
D2V_LOSS_ROWS(square_bf16, BFloat16, true, false)
D2V_LOSS_ROWS(square_grad_bf16, BFloat16, true, true)
D2V_LOSS_ROWS(smooth_f16, Half, false, false)
D2V_LOSS_ROWS(smooth_grad_f16, Half, false, true)
D2V_LOSS_ROWS(square_f16, Half, true, false)
D2V_LOSS_ROWS(square_grad_f16, Half, true, true)

using LossLoop = void (*)(const LossRows&, int64_t, int64_t, const LossSettings&, float*);
constexpr LossLoop kLossLoops[3][2][2] = {{{smooth_f32, smooth_grad_f32}, {square_f32, square_grad_f32}},
                                          {{smooth_bf16, smooth_grad_bf16}, {square_bf16, square_grad_bf16}},
                                          {{smooth_f16, smooth_grad_f16}, {square_f16, square_grad_f16}}};

// What both sides of the loss are read through: fp32 as it is, others by way of a buffer that stays in the
// cache.
#define D2V_ELEMENTWISE(suffix, T)                                                               \
  D2V_INLINE void widen_##suffix##_body(const void* x, int64_t n, float* __restrict out) {       \
    const T* __restrict in = static_cast<const T*>(x);                                           \
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[i]);                          \
  }                                                                                              \
  D2V_MULTIARCH(widen_##suffix, (const void* x, int64_t n, float* out), (x, n, out))             \
  D2V_INLINE void scale_##suffix##_body(const void* x, int64_t n, float factor, void* y) {       \
    const T* __restrict in = static_cast<const T*>(x);                                           \
    T* __restrict out = static_cast<T*>(y);                                                      \
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(static_cast<float>(in[i]) * factor); \
  }                                                                                              \
  D2V_MULTIARCH(scale_##suffix, (const void* x, int64_t n, float factor, void* y), (x, n, factor, y))

D2V_ELEMENTWISE(f32, float)
D2V_ELEMENTWISE(bf16, BFloat16)
D2V_ELEMENTWISE(f16, Half)

constexpr decltype(&widen_f32) kWiden[3] = {widen_f32, widen_bf16, widen_f16};
constexpr decltype(&scale_f32) kScale[3] = {scale_f32, scale_bf16, scale_f16};
constexpr int64_t kBytes[3] = {4, 2, 2};

}  // namespace

LossSettings::LossSettings(double beta_, double factor, bool need_grad_) : need_grad(need_grad_) {
  int exponent;
  const double mantissa = std::frexp(factor, &exponent);
  // a denormal beta has no finite inverse; nothing but 0 is then closer than beta
  const double inverse = std::min(1.0 / beta_, static_cast<double>(std::numeric_limits<float>::max()));
  beta = static_cast<float>(beta_);
  half_beta = static_cast<float>(0.5 * beta_);
  half_inverse = static_cast<float>(0.5 * inverse);
  near = static_cast<float>(beta == 0.0f ? 2.0 * mantissa : inverse * mantissa);
  far = static_cast<float>(mantissa);
}

void add_loss_rows(ScalarType pred_type, const LossRows& rows, int64_t count, int64_t width,
                   const LossSettings& settings, float* sums) {
  kLossLoops[storage_index(pred_type)][settings.beta == 0.0f][settings.need_grad](rows, count, width,
                                                                                  settings, sums);
}

std::tuple<Tensor, Tensor> sum_loss_blocks(const Tensor& pred, double factor,
                                           const std::function<void(int64_t, int64_t, float*)>& block) {
  const int64_t n = pred.size(0), width = pred.size(1);
  const int64_t rows_per_block = std::clamp((n + kBlocks - 1) / kBlocks, kMinRows, kMaxRows) / 4 * 4;
  const int64_t blocks = (n + rows_per_block - 1) / rows_per_block;
  std::vector<float> sums(blocks * 5 * width);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      block(i * rows_per_block, std::min(n, (i + 1) * rows_per_block), sums.data() + i * 5 * width);
    }
  });
  Tensor loss = torch::stable::new_empty(pred, {}, ScalarType::Float);
  Tensor moments = torch::stable::new_empty(pred, {4, width}, ScalarType::Float);
  float* result = static_cast<float*>(moments.mutable_data_ptr());
  std::vector<double> channel_loss(width);
  torch::stable::parallel_for(0, width, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < 5; ++i) {
      for (int64_t d = begin; d < end; ++d) {
        double total = 0.0;
        for (int64_t b = 0; b < blocks; ++b) total += sums[(b * 5 + i) * width + d];
        if (i == 0)
          channel_loss[d] = total;
        else
          result[(i - 1) * width + d] = static_cast<float>(total);
      }
    }
  });
  double total = 0.0;
  for (const double value : channel_loss) total += value;
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total * factor);
  return {loss, moments};
}

double loss_factor(int64_t num_elements, double scale, bool mean) {
  return mean ? scale / static_cast<double>(std::max<int64_t>(num_elements, 1)) : scale;
}

Tensor plain_rows(const Tensor& x) {
  return x.stride(1) == 1 || x.size(1) <= 1 ? x : torch::stable::contiguous(x);
}

std::tuple<Tensor, Tensor, Tensor> masked_smooth_l1(Tensor pred, Tensor target,
                                                    std::optional<Tensor> target_rows, double beta,
                                                    double scale, bool mean, bool need_grad) {
  STD_TORCH_CHECK(pred.dim() == 2 && target.dim() == 2 && pred.size(1) == target.size(1),
                  "masked_smooth_l1: pred and target must be 2-d and equally wide");
  const int64_t n = pred.size(0), width = pred.size(1);
  const ScalarType type = pred.scalar_type();
  const int64_t bytes = kBytes[storage_index(type)];
  const int target_type = storage_index(target.scalar_type());
  pred = plain_rows(pred);
  target = plain_rows(target);
  Tensor map_storage;
  const int64_t* map = nullptr;
  if (target_rows.has_value()) {
    STD_TORCH_CHECK(target_rows->scalar_type() == ScalarType::Long && target_rows->numel() == n,
                    "masked_smooth_l1: target_rows must be int64, one per row of pred");
    map_storage = torch::stable::contiguous(*target_rows);
    map = static_cast<const int64_t*>(map_storage.const_data_ptr());
    for (int64_t i = 0; i < n; ++i) {
      STD_TORCH_CHECK(map[i] >= 0 && map[i] < target.size(0), "`target_rows` must be in [0, ",
                      target.size(0) - 1, "], but holds ", map[i], ".");
    }
  } else {
    STD_TORCH_CHECK(target.size(0) == n, "masked_smooth_l1: ", n, " rows of pred and ", target.size(0),
                    " of target");
  }
  Tensor slope =
      torch::stable::new_empty(pred, need_grad ? std::vector<int64_t>{n, width} : std::vector<int64_t>{0});
  const char* pred_data = static_cast<const char*>(pred.const_data_ptr());
  const char* target_data = static_cast<const char*>(target.const_data_ptr());
  char* slope_data = static_cast<char*>(slope.mutable_data_ptr());
  const int64_t pred_stride = pred.stride(0) * bytes, target_stride = target.stride(0) * kBytes[target_type];
  const double factor = loss_factor(n * width, scale, mean);
  const LossSettings settings(beta, factor, need_grad);
  auto [loss, moments] = sum_loss_blocks(pred, factor, [&](int64_t begin, int64_t end, float* sums) {
    std::vector<float> wide(target_type == 0 ? 0 : 4 * width);
    for (int64_t i = begin; i < end; i += 4) {
      const int64_t count = std::min<int64_t>(4, end - i);
      LossRows rows;
      for (int64_t r = 0; r < count; ++r) {
        const char* t = target_data + (map != nullptr ? map[i + r] : i + r) * target_stride;
        rows.pred[r] = pred_data + (i + r) * pred_stride;
        rows.target[r] = reinterpret_cast<const float*>(t);
        if (target_type != 0) {
          kWiden[target_type](t, width, wide.data() + r * width);
          rows.target[r] = wide.data() + r * width;
        }
        rows.slope[r] = need_grad ? slope_data + (i + r) * width * bytes : nullptr;
      }
      add_loss_rows(type, rows, count, width, settings, sums);
    }
  });
  return {loss, moments, slope};
}

Tensor scale_gradient(Tensor slope, Tensor grad_output, double scale, bool mean) {
  STD_TORCH_CHECK(grad_output.scalar_type() == ScalarType::Float && grad_output.numel() == 1,
                  "scale_gradient: grad_output must be one fp32 number");
  slope = torch::stable::contiguous(slope);
  const int type = storage_index(slope.scalar_type());
  const int64_t n = slope.numel();
  int exponent;
  std::frexp(loss_factor(n, scale, mean), &exponent);
  const float factor = std::ldexp(*static_cast<const float*>(grad_output.const_data_ptr()), exponent);
  Tensor out = torch::stable::empty_like(slope);
  const char* in = static_cast<const char*>(slope.const_data_ptr());
  char* result = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, n, kChunk, [&](int64_t begin, int64_t end) {
    kScale[type](in + begin * kBytes[type], end - begin, factor, result + begin * kBytes[type]);
  });
  return out;
}

}  // namespace d2v
