#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "loss.h"
#include "ops.h"
#include "simd.h"

namespace d2v {
namespace {

// Rows per block: enough that the block's sums cost little memory beside its rows, few enough that fp32 sums
// stay accurate.
constexpr int64_t kMinRows = 64, kMaxRows = 256, kBlocks = 128;
// Channels per tile: four rows of predictions, targets and slopes and the sums fit in L1.
constexpr int64_t kTile = 1024;

// Up to four rows, at the channels of one tile.
template <typename P>
struct TileRows {
  const P* pred[4];
  const float* target[4];
  const P* next_pred[4];
  const float* next_target[4];
  P* slope[4];
};

// Adds the rows at channel i to sums, see add_loss_rows. V is Lanes, or float for a single channel.
template <typename V, int kRows, bool kSquare, bool kGrad, bool kMoments, typename P>
D2V_INLINE void add_channels(const TileRows<P>& rows, int64_t i, int64_t width, const LossSettings s,
                             float* sums) {
  V loss{}, pred{}, pred2{}, target{}, target2{};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const V p = load_as<V>(rows.pred[r] + i), t = load<V>(rows.target[r] + i), e = p - t;
    __builtin_prefetch(rows.next_pred[r] + i);
    __builtin_prefetch(rows.next_target[r] + i);
    V slope;
    if (kSquare) {
      loss += e * e;
      slope = e * s.near;
    } else {
      // clamping the error at beta gives the quadratic and the linear part without a branch, and keeps NaN
      const V high = V{} + s.beta, low = V{} - s.beta;
      V near = low > e ? low : e;
      near = high < near ? high : near;
      const V share = near * s.inverse;
      loss += share * (e - near * 0.5f);
      slope = share * s.far;
    }
    if constexpr (kGrad && std::is_same_v<P, float>) {
      if (s.stream) stream<V>(rows.slope[r] + i, slope);
    }
    if (kGrad && !s.stream) store_as<V>(rows.slope[r] + i, slope);
    if constexpr (kMoments) {
      pred += p;
      pred2 += p * p;
      target += t;
      target2 += t * t;
    }
  }
  add_to<V>(sums + i, loss);
  if constexpr (!kMoments) return;
  add_to<V>(sums + width + i, pred);
  add_to<V>(sums + 2 * width + i, pred2);
  add_to<V>(sums + 3 * width + i, target);
  add_to<V>(sums + 4 * width + i, target2);
}

template <int kRows, bool kSquare, bool kGrad, bool kMoments, typename P>
D2V_INLINE void add_tile(const TileRows<P> rows, int64_t n, int64_t width, const LossSettings s,
                         float* sums) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    add_channels<Lanes, kRows, kSquare, kGrad, kMoments>(rows, i, width, s, sums);
  for (; i < n; ++i) add_channels<float, kRows, kSquare, kGrad, kMoments>(rows, i, width, s, sums);
}

template <typename P, bool kSquare, bool kGrad, bool kMoments>
D2V_INLINE void add_rows(const LossRows& rows, int64_t count, int64_t width, const LossSettings& s,
                         float* sums) {
  for (int64_t first = 0; first < width; first += kTile) {
    const int64_t n = std::min(width - first, kTile);
    TileRows<P> tile{};
    for (int64_t r = 0; r < count; ++r) {
      tile.pred[r] = static_cast<const P*>(rows.pred[r]) + first;
      tile.next_pred[r] = static_cast<const P*>(rows.next_pred[r]) + first;
      tile.target[r] = rows.target[r] + first;
      tile.next_target[r] = rows.next_target[r] + first;
      if (kGrad) tile.slope[r] = static_cast<P*>(rows.slope[r]) + first;
    }
    if (count == 4) {
      add_tile<4, kSquare, kGrad, kMoments>(tile, n, width, s, sums + first);
    } else {
      for (int64_t r = 0; r < count; ++r) {
        const TileRows<P> one{
            {tile.pred[r]}, {tile.target[r]}, {tile.next_pred[r]}, {tile.next_target[r]}, {tile.slope[r]}};
        add_tile<1, kSquare, kGrad, kMoments>(one, n, width, s, sums + first);
      }
    }
  }
  if (s.stream) finish_streams();
}

#define D2V_LOSS_ROWS(name, P, kSquare, kGrad, kMoments)                                                  \
  D2V_INLINE void name##_body(const LossRows& rows, int64_t count, int64_t width, const LossSettings& s,  \
                              float* sums) {                                                              \
    add_rows<P, kSquare, kGrad, kMoments>(rows, count, width, s, sums);                                   \
  }                                                                                                       \
  D2V_MULTIARCH(name,                                                                                     \
                (const LossRows& rows, int64_t count, int64_t width, const LossSettings& s, float* sums), \
                (rows, count, width, s, sums))

#define D2V_LOSS_LOOPS(suffix, P)                               \
  D2V_LOSS_ROWS(smooth_##suffix, P, false, false, false)        \
  D2V_LOSS_ROWS(smooth_moments_##suffix, P, false, false, true) \
  D2V_LOSS_ROWS(smooth_grad_##suffix, P, false, true, false)    \
  D2V_LOSS_ROWS(smooth_both_##suffix, P, false, true, true)     \
  D2V_LOSS_ROWS(square_##suffix, P, true, false, false)         \
  D2V_LOSS_ROWS(square_moments_##suffix, P, true, false, true)  \
  D2V_LOSS_ROWS(square_grad_##suffix, P, true, true, false)     \
  D2V_LOSS_ROWS(square_both_##suffix, P, true, true, true)

D2V_LOSS_LOOPS(f32, float)
D2V_LOSS_LOOPS(bf16, BFloat16)
D2V_LOSS_LOOPS(f16, Half)

using LossLoop = void (*)(const LossRows&, int64_t, int64_t, const LossSettings&, float*);
// by storage type, squared error, gradient, moments
#define D2V_LOSS_TABLE(suffix)                                                                    \
  {                                                                                               \
    {{smooth_##suffix, smooth_moments_##suffix}, {smooth_grad_##suffix, smooth_both_##suffix}}, { \
      {square_##suffix, square_moments_##suffix}, { square_grad_##suffix, square_both_##suffix }  \
    }                                                                                             \
  }
constexpr LossLoop kLossLoops[3][2][2][2] = {D2V_LOSS_TABLE(f32), D2V_LOSS_TABLE(bf16), D2V_LOSS_TABLE(f16)};

// Reads rows as fp32: fp32 in place, other types through a buffer that stays in the cache.
#define D2V_ELEMENTWISE(suffix, T)                                                                   \
  D2V_INLINE void widen_##suffix##_body(const void* x, int64_t n, float* __restrict out) {           \
    const T* __restrict in = static_cast<const T*>(x);                                               \
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[i]);                              \
  }                                                                                                  \
  D2V_MULTIARCH(widen_##suffix, (const void* x, int64_t n, float* out), (x, n, out))                 \
  D2V_INLINE void scale_##suffix##_body(const void* x, int64_t n, float factor, void* y) {           \
    const T* in = static_cast<const T*>(x);                                                          \
    T* out = static_cast<T*>(y);                                                                     \
    _Pragma("GCC ivdep") /* one buffer or two that do not overlap */                                 \
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(static_cast<float>(in[i]) * factor); \
  }                                                                                                  \
  D2V_MULTIARCH(scale_##suffix, (const void* x, int64_t n, float factor, void* y), (x, n, factor, y))

D2V_ELEMENTWISE(f32, float)
D2V_ELEMENTWISE(bf16, BFloat16)
D2V_ELEMENTWISE(f16, Half)

constexpr decltype(&widen_f32) kWiden[3] = {widen_f32, widen_bf16, widen_f16};
constexpr decltype(&scale_f32) kScale[3] = {scale_f32, scale_bf16, scale_f16};
constexpr int64_t kBytes[3] = {4, 2, 2};

}  // namespace

LossSettings::LossSettings(double beta_, double factor_, const Tensor& slope, bool need_moments_) {
  // a subnormal beta has no finite inverse, and no fp32 error lies between it and the least normal number
  const double least = std::numeric_limits<float>::min();
  is_square = beta_ == 0.0;
  beta = static_cast<float>(std::max(beta_, least));
  inverse = static_cast<float>(1.0 / std::max(beta_, least));
  factor = factor_;
  const double slope_factor = split_factor(factor, slope.scalar_type()).saved;
  near = static_cast<float>(2.0 * slope_factor);
  far = static_cast<float>(slope_factor);
  need_grad = slope.dim() == 2;
  need_moments = need_moments_;
  const int64_t bytes = slope.numel() * 4;
  stream =
      need_grad && slope.scalar_type() == ScalarType::Float && bytes > kStreamBytes && slope.size(1) % 4 == 0;
}

void add_loss_rows(ScalarType pred_type, const LossRows& rows, int64_t count, int64_t width,
                   const LossSettings& settings, float* sums) {
  const auto& loops = kLossLoops[storage_index(pred_type)][settings.is_square];
  loops[settings.need_grad][settings.need_moments](rows, count, width, settings, sums);
}

std::tuple<Tensor, Tensor> sum_loss_blocks(const Tensor& pred, const LossSettings& settings,
                                           const std::function<void(int64_t, int64_t, float*)>& block) {
  const int64_t n = pred.size(0), width = pred.size(1), kinds = settings.need_moments ? 5 : 1;
  const int64_t rows_per_block = std::clamp((n + kBlocks - 1) / kBlocks, kMinRows, kMaxRows) / 4 * 4;
  const int64_t blocks = (n + rows_per_block - 1) / rows_per_block;
  std::vector<float> sums(blocks * kinds * width);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      block(i * rows_per_block, std::min(n, (i + 1) * rows_per_block), sums.data() + i * kinds * width);
    }
  });
  Tensor loss = new_empty({}, ScalarType::Float);
  Tensor statistics = new_empty(
      settings.need_moments ? std::vector<int64_t>{4, width} : std::vector<int64_t>{0}, ScalarType::Float);
  float* result = static_cast<float*>(statistics.mutable_data_ptr());
  std::vector<double> channel_loss(width);
  constexpr int64_t kStrip = 64;
  torch::stable::parallel_for(0, (width + kStrip - 1) / kStrip, 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kStrip, count = std::min(kStrip, width - first);
      for (int64_t i = 0; i < kinds; ++i) {
        double total[kStrip] = {};
        for (int64_t b = 0; b < blocks; ++b) {
          const float* __restrict part = sums.data() + (b * kinds + i) * width + first;
          for (int64_t d = 0; d < count; ++d) total[d] += part[d];
        }
        for (int64_t d = 0; d < count; ++d) {
          if (i == 0)
            channel_loss[first + d] = total[d];
          else
            result[(i - 1) * width + first + d] = static_cast<float>(total[d]);
        }
      }
    }
  });
  double total = 0.0;
  for (const double value : channel_loss) total += value;
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total * settings.factor);
  return {loss, statistics};
}

double loss_factor(int64_t num_elements, double scale, bool mean) {
  return mean ? scale / static_cast<double>(std::max<int64_t>(num_elements, 1)) : scale;
}

FactorParts split_factor(double factor, ScalarType type) {
  if (type != ScalarType::Half) return {factor, 1.0};
  int exponent;
  const double mantissa = std::frexp(factor, &exponent);
  return {mantissa, std::ldexp(1.0, exponent)};
}

Tensor plain_rows(const Tensor& x) {
  return x.stride(1) == 1 || x.size(1) <= 1 ? x : torch::stable::contiguous(x);
}

std::tuple<Tensor, Tensor, Tensor> masked_smooth_l1(Tensor pred, Tensor target,
                                                    std::optional<Tensor> target_rows, double beta,
                                                    double scale, bool mean, bool need_grad,
                                                    bool need_moments) {
  require(pred.dim() == 2 && target.dim() == 2 && pred.size(1) == target.size(1),
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
    require(target_rows->scalar_type() == ScalarType::Long && target_rows->numel() == n,
            "masked_smooth_l1: target_rows must be int64, one per row of pred");
    map_storage = packed(*target_rows);
    map = static_cast<const int64_t*>(map_storage.const_data_ptr());
    const int64_t num_targets = target.size(0);
    for (int64_t i = 0; i < n; ++i) require_index("target_rows", map[i], num_targets);
  } else {
    require(target.size(0) == n, "masked_smooth_l1: ", n, " rows of pred and ", target.size(0), " of target");
  }
  Tensor slope = new_empty(need_grad ? std::vector<int64_t>{n, width} : std::vector<int64_t>{0}, type);
  prefer_huge_pages(slope);
  const char* pred_data = static_cast<const char*>(pred.const_data_ptr());
  const char* target_data = static_cast<const char*>(target.const_data_ptr());
  char* slope_data = static_cast<char*>(slope.mutable_data_ptr());
  const int64_t pred_stride = pred.stride(0) * bytes, target_stride = target.stride(0) * kBytes[target_type];
  const LossSettings settings(beta, loss_factor(n * width, scale, mean), slope, need_moments);
  auto [loss, statistics] = sum_loss_blocks(pred, settings, [&](int64_t begin, int64_t end, float* sums) {
    std::vector<float> wide(target_type == 0 ? 0 : 4 * width);
    for (int64_t i = begin; i < end; i += 4) {
      const int64_t count = std::min<int64_t>(4, end - i);
      LossRows rows;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t next = std::min(i + 4 + r, end - 1);
        const char* t = target_data + (map != nullptr ? map[i + r] : i + r) * target_stride;
        rows.pred[r] = pred_data + (i + r) * pred_stride;
        rows.target[r] = reinterpret_cast<const float*>(t);
        rows.next_pred[r] = pred_data + next * pred_stride;
        rows.next_target[r] =
            reinterpret_cast<const float*>(target_data + (map != nullptr ? map[next] : next) * target_stride);
        if (target_type != 0) {
          kWiden[target_type](t, width, wide.data() + r * width);
          rows.target[r] = rows.next_target[r] = wide.data() + r * width;
        }
        rows.slope[r] = need_grad ? slope_data + (i + r) * width * bytes : nullptr;
      }
      add_loss_rows(type, rows, count, width, settings, sums);
    }
  });
  return {loss, statistics, slope};
}

namespace {

// out <- slope * grad_output * the remaining factor of the loss. Both are contiguous; out may be slope.
void scale_into(const Tensor& slope, const Tensor& grad_output, Tensor& out, double scale, bool mean) {
  require(grad_output.scalar_type() == ScalarType::Float && grad_output.numel() == 1,
          "scale_gradient: grad_output must be one fp32 number");
  const int type = storage_index(slope.scalar_type());
  const int64_t n = slope.numel();
  const double left = split_factor(loss_factor(n, scale, mean), slope.scalar_type()).left;
  const float factor = static_cast<float>(*static_cast<const float*>(grad_output.const_data_ptr()) * left);
  const char* in = static_cast<const char*>(slope.const_data_ptr());
  char* result = static_cast<char*>(out.mutable_data_ptr());
  if (factor == 1.0f && in == result) return;
  torch::stable::parallel_for(0, n, kChunk, [&](int64_t begin, int64_t end) {
    kScale[type](in + begin * kBytes[type], end - begin, factor, result + begin * kBytes[type]);
  });
}

}  // namespace

Tensor scale_gradient(Tensor slope, Tensor grad_output, double scale, bool mean) {
  slope = packed(slope);
  Tensor out = torch::stable::empty_like(slope);
  scale_into(slope, grad_output, out, scale, mean);
  return out;
}

void scale_gradient_(Tensor slope, Tensor grad_output, double scale, bool mean) {
  require(slope.is_contiguous(), "scale_gradient_: slope must be contiguous");
  scale_into(slope, grad_output, slope, scale, mean);
}

}  // namespace d2v
