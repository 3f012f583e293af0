#include <algorithm>
#include <cstring>
#include <vector>

#include "ops.h"
#include "row_statistics.h"
#include "simd.h"

namespace d2v {
namespace {

// Rows per block of sums: few enough that fp32 sums stay accurate. The partition depends on the number of
// rows only.
constexpr int64_t kMinRows = 32, kMaxRows = 256, kBlocks = 128;
// Vectors computed in parallel.
constexpr int kVectors = 4;

template <typename V>
struct BitsOf {
  typedef uint32_t type __attribute__((vector_size(4 * kLanes)));
};
template <>
struct BitsOf<float> {
  typedef uint32_t type;
};

template <typename To, typename From>
D2V_INLINE To same_bits(From x) {
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

// p <- p * x + c for several vectors at once, which hides the latency of the dependent steps.
template <typename V, int n>
D2V_INLINE void step(V (&p)[n], const V (&x)[n], float c) {
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) p[j] = p[j] * x[j] + c;
}

// v <- 2^v for -126 <= v <= 0, with error 2e-9 plus rounding. Keeps NaN.
template <typename V, int n>
D2V_INLINE void exp2_of(V (&v)[n]) {
  using Bits = typename BitsOf<V>::type;
  // adding it rounds to the nearest integer and leaves that in the low bits
  constexpr float kRound = 12582912.0f;
  V shifted[n], p[n];
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) {
    shifted[j] = v[j] + kRound;
    v[j] -= shifted[j] - kRound;
    p[j] = v[j] * 1.5353362e-4f + 1.3398875e-3f;
  }
  step(p, v, 9.6184374e-3f);
  step(p, v, 5.5503325e-2f);
  step(p, v, 2.4022648e-1f);
  step(p, v, 6.9314720e-1f);
  step(p, v, 1.0f);
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j)
    v[j] = same_bits<V>(same_bits<Bits>(p[j]) + (same_bits<Bits>(shifted[j]) << 23));
}

// Parts of the GELU of z and of its slope. Phi, the normal distribution function: Phi(-|z|) = bell * ratio.
template <typename V, int n>
struct Tails {
  V size[n];   // min(|z|, 13): beyond 13, Phi(-|z|) is below 1e-37
  V bell[n];   // exp(-z^2 / 2)
  V ratio[n];  // Mills' ratio / sqrt(2 pi): smooth, without the cancellation of 1 - erf
};

template <typename V, int n>
D2V_INLINE void tails_of(const V (&z)[n], Tails<V, n>& out) {
  using Bits = typename BitsOf<V>::type;
  V t[n];
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) {
    const V largest = V{} + 13.0f, size = same_bits<V>(same_bits<Bits>(z[j]) & 0x7fffffffu);
    // this form keeps NaN
    out.size[j] = largest < size ? largest : size;
    t[j] = 1.0f / (out.size[j] * 0.3f + 1.0f);
    out.bell[j] = out.size[j] * out.size[j] * -0.72134752f;
  }
  exp2_of(out.bell);
  // minimax polynomial, error 4e-9
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) out.ratio[j] = t[j] * 3.3477828e-2f - 1.4626683e-1f;
  step(out.ratio, t, 1.8386865e-1f);
  step(out.ratio, t, -2.9031936e-2f);
  step(out.ratio, t, 1.1307819e-1f);
  step(out.ratio, t, 1.0544711e-1f);
  step(out.ratio, t, 1.1972055e-1f);
  step(out.ratio, t, 1.1970644e-1f);
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) out.ratio[j] *= t[j];
}

// z <- GELU(z)
template <typename V, int n>
D2V_INLINE void gelu(V (&z)[n]) {
  Tails<V, n> tails;
  tails_of(z, tails);
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) {
    const V linear = z[j] > 0.0f ? z[j] : V{};
    z[j] = linear - tails.size[j] * (tails.bell[j] * tails.ratio[j]);
  }
}

// z <- derivative of GELU at z
template <typename V, int n>
D2V_INLINE void gelu_slope(V (&z)[n]) {
  Tails<V, n> tails;
  tails_of(z, tails);
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) {
    // Phi(-a) - a phi(a)
    const V low = tails.bell[j] * (tails.ratio[j] - tails.size[j] * 0.39894228f);
    z[j] = z[j] > 0.0f ? 1.0f - low : low;
  }
}

// The rows of a tensor [..., C] with contiguous channels. The rows of a view such as x[:, :T] form groups.
struct Rows {
  const char* data;
  int64_t per_group, group_bytes, row_bytes;

  template <typename T>
  __attribute__((always_inline)) const T* at(int64_t i) const {
    return reinterpret_cast<const T*>(data + i / per_group * group_bytes + i % per_group * row_bytes);
  }
};

// Settings of one call.
struct Plan {
  Rows x, grad;
  const float *weight, *bias;
  float *mean, *rstd;
  char* out;  // y or grad_x
  int64_t num_rows, width;
  double eps;
  bool stream;
};

template <typename V, typename T>
D2V_INLINE void put(T* out, V v, bool around_caches) {
  if constexpr (std::is_same_v<T, float>) {
    if (around_caches) return stream<V>(out, v);
  }
  store_as<V>(out, v);
}

// The following functions work on n vectors V of channels from i on. V is Lanes, or float for one channel.
template <typename V>
constexpr int64_t kStep = sizeof(V) / sizeof(float);

template <typename V, int n, typename T>
D2V_INLINE void forward_channels(const Plan& plan, const T* x, RowStatistics statistics, int64_t i, T* y) {
  V z[n];
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) {
    const int64_t c = i + j * kStep<V>;
    const V normal = (load_as<V>(x + c) - statistics.mean) * statistics.rstd;
    z[j] = normal * load<V>(plan.weight + c) + load<V>(plan.bias + c);
  }
  gelu(z);
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) put<V>(y + i + j * kStep<V>, z[j], plan.stream);
}

template <typename T>
D2V_INLINE void forward_rows(const Plan& plan, int64_t begin, int64_t end) {
  const int64_t width = plan.width;
  for (int64_t row = begin; row < end; ++row) {
    const T *x = plan.x.at<T>(row), *next = plan.x.at<T>(std::min(row + 1, end - 1));
    T* y = reinterpret_cast<T*>(plan.out) + row * width;
    const RowStatistics statistics = row_statistics<T>(x, next, width, plan.eps);
    plan.mean[row] = statistics.mean;
    plan.rstd[row] = statistics.rstd;
    int64_t i = 0;
    for (; i + kVectors * kLanes <= width; i += kVectors * kLanes) {
      forward_channels<Lanes, kVectors, T>(plan, x, statistics, i, y);
    }
    for (; i + kLanes <= width; i += kLanes) forward_channels<Lanes, 1, T>(plan, x, statistics, i, y);
    for (; i < width; ++i) forward_channels<float, 1, T>(plan, x, statistics, i, y);
  }
  if (plan.stream) finish_streams();
}

// Sums over the channels of a row, through which the mean and the deviation propagate gradient.
template <typename V>
struct RowSums {
  V slope{}, slope_normal{};
};

// sums [2, width]: gradients of weight and bias. slope [width]: gradient of the normalized row.
template <typename V, int n, typename T>
D2V_INLINE void backward_channels(const Plan& plan, const T* x, const T* grad, RowStatistics statistics,
                                  int64_t i, float* sums, float* slope, RowSums<V>& row) {
  V normal[n], d[n];
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) {
    const int64_t c = i + j * kStep<V>;
    normal[j] = (load_as<V>(x + c) - statistics.mean) * statistics.rstd;
    d[j] = normal[j] * load<V>(plan.weight + c) + load<V>(plan.bias + c);
  }
  gelu_slope(d);
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) {
    const int64_t c = i + j * kStep<V>;
    d[j] *= load_as<V>(grad + c);
    add_to<V>(sums + c, d[j] * normal[j]);
    add_to<V>(sums + plan.width + c, d[j]);
    const V s = d[j] * load<V>(plan.weight + c);
    store<V>(slope + c, s);
    row.slope += s;
    row.slope_normal += s * normal[j];
  }
}

template <typename V, typename T>
D2V_INLINE void grad_x_channels(const T* x, const float* slope, RowStatistics statistics, float shift,
                                float tilt, int64_t i, T* out, bool around_caches) {
  const V normal = (load_as<V>(x + i) - statistics.mean) * statistics.rstd;
  put<V>(out + i, (load<V>(slope + i) - shift - normal * tilt) * statistics.rstd, around_caches);
}

template <typename T>
D2V_INLINE void backward_rows(const Plan& plan, int64_t begin, int64_t end, float* sums, float* slope) {
  const int64_t width = plan.width;
  const float share = 1.0f / static_cast<float>(width);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t next = std::min(row + 1, end - 1);
    const T *x = plan.x.at<T>(row), *next_x = plan.x.at<T>(next);
    const T *grad = plan.grad.at<T>(row), *next_grad = plan.grad.at<T>(next);
    T* out = reinterpret_cast<T*>(plan.out) + row * width;
    const RowStatistics statistics{plan.mean[row], plan.rstd[row]};
    RowSums<Lanes> lanes;
    RowSums<float> rest;
    int64_t i = 0;
    for (; i + kVectors * kLanes <= width; i += kVectors * kLanes) {
      for (int64_t j = 0; j < kVectors * kLanes; j += 64 / static_cast<int64_t>(sizeof(T))) {
        __builtin_prefetch(next_x + i + j);
        __builtin_prefetch(next_grad + i + j);
      }
      backward_channels<Lanes, kVectors, T>(plan, x, grad, statistics, i, sums, slope, lanes);
    }
    for (; i + kLanes <= width; i += kLanes) {
      backward_channels<Lanes, 1, T>(plan, x, grad, statistics, i, sums, slope, lanes);
    }
    for (; i < width; ++i) backward_channels<float, 1, T>(plan, x, grad, statistics, i, sums, slope, rest);
    const float shift = (add_lanes(lanes.slope) + rest.slope) * share;
    const float tilt = (add_lanes(lanes.slope_normal) + rest.slope_normal) * share;
    i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      grad_x_channels<Lanes, T>(x, slope, statistics, shift, tilt, i, out, plan.stream);
    }
    for (; i < width; ++i) grad_x_channels<float, T>(x, slope, statistics, shift, tilt, i, out, plan.stream);
  }
  if (plan.stream) finish_streams();
}

#define D2V_NORM_GELU(suffix, T)                                                                      \
  D2V_INLINE void forward_##suffix##_body(const Plan& plan, int64_t begin, int64_t end) {             \
    forward_rows<T>(plan, begin, end);                                                                \
  }                                                                                                   \
  D2V_MULTIARCH(forward_##suffix, (const Plan& plan, int64_t begin, int64_t end), (plan, begin, end)) \
  D2V_INLINE void backward_##suffix##_body(const Plan& plan, int64_t begin, int64_t end, float* sums, \
                                           float* slope) {                                            \
    backward_rows<T>(plan, begin, end, sums, slope);                                                  \
  }                                                                                                   \
  D2V_MULTIARCH(backward_##suffix,                                                                    \
                (const Plan& plan, int64_t begin, int64_t end, float* sums, float* slope),            \
                (plan, begin, end, sums, slope))

D2V_NORM_GELU(f32, float)
D2V_NORM_GELU(bf16, BFloat16)
D2V_NORM_GELU(f16, Half)

constexpr decltype(&forward_f32) kForward[3] = {forward_f32, forward_bf16, forward_f16};
constexpr decltype(&backward_f32) kBackward[3] = {backward_f32, backward_bf16, backward_f16};

// Returns a contiguous copy. torch::stable::contiguous finds its operator by name at every call, and a copy
// by torch still takes longer than the rest of the work on a small tensor.
Tensor contiguous_copy(const Tensor& x) {
  constexpr int64_t kSmall = 256;
  Tensor copy = new_empty(x.sizes(), x.scalar_type());
  const int64_t n = x.numel(), bytes = x.element_size();
  if (n > kSmall) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), x.get(), 0));
    return copy;
  }
  const auto sizes = x.sizes(), strides = x.strides();
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(copy.mutable_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    int64_t rest = i, offset = 0;
    for (int64_t d = x.dim() - 1; d >= 0; --d) {
      offset += rest % sizes[d] * strides[d];
      rest /= sizes[d];
    }
    std::memcpy(to + i * bytes, from + offset * bytes, bytes);
  }
  return copy;
}

// Returns the rows in place if the channels are contiguous and two strides address all rows. Otherwise copies
// the tensor and stores the copy in `x`.
Rows rows_of(Tensor& x) {
  const int64_t last = x.dim() - 1, bytes = x.element_size();
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0};
  int level = 0;
  bool plain = x.size(last) <= 1 || x.stride(last) == 1;
  for (int64_t i = last - 1; i >= 0 && plain; --i) {
    if (x.size(i) == 1) continue;
    if (sizes[level] > 1 && x.stride(i) != sizes[level] * strides[level]) {
      plain = ++level < 2;
      if (!plain) break;
    }
    if (sizes[level] == 1) strides[level] = x.stride(i);
    sizes[level] *= x.size(i);
  }
  if (!plain) {
    x = contiguous_copy(x);
    return {static_cast<const char*>(x.const_data_ptr()), std::max<int64_t>(x.numel(), 1), 0,
            x.size(last) * bytes};
  }
  return {static_cast<const char*>(x.const_data_ptr()), std::max<int64_t>(sizes[0], 1), strides[1] * bytes,
          strides[0] * bytes};
}

std::vector<float> widened(Tensor x) {
  x = packed(x);
  std::vector<float> out(x.numel());
  const int type = storage_index(x.scalar_type());
  const void* data = x.const_data_ptr();
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = type == 0   ? static_cast<const float*>(data)[i]
             : type == 1 ? static_cast<float>(static_cast<const BFloat16*>(data)[i])
                         : static_cast<float>(static_cast<const Half*>(data)[i]);
  }
  return out;
}

std::vector<int64_t> sizes_of(const Tensor& x, int64_t num_dims) {
  std::vector<int64_t> sizes(num_dims);
  for (int64_t i = 0; i < num_dims; ++i) sizes[i] = x.size(i);
  return sizes;
}

void check_channels(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  require(x.dim() >= 1 && weight.dim() == 1 && bias.dim() == 1 && weight.size(0) == x.size(x.dim() - 1) &&
              bias.size(0) == weight.size(0),
          "layer_norm_gelu: weight and bias must be [C] for an x of [..., C]");
}

bool goes_around_caches(const Tensor& out) {
  return out.scalar_type() == ScalarType::Float && out.numel() * 4 > kStreamBytes &&
         out.size(out.dim() - 1) % 4 == 0;
}

// Sums the partial sums [num_blocks, 2, width] over the blocks, in the dtype of `like`.
Tensor sum_blocks(const Tensor& like, const float* sums, int64_t num_blocks, int64_t width) {
  Tensor out = new_empty({width}, like.scalar_type());
  const int type = storage_index(out.scalar_type());
  void* data = out.mutable_data_ptr();
  constexpr int64_t kStrip = 64;
  torch::stable::parallel_for(0, (width + kStrip - 1) / kStrip, 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kStrip, count = std::min(kStrip, width - first);
      double total[kStrip] = {};
      for (int64_t b = 0; b < num_blocks; ++b) {
        const float* __restrict part = sums + b * 2 * width + first;
        for (int64_t d = 0; d < count; ++d) total[d] += part[d];
      }
      for (int64_t d = 0; d < count; ++d) {
        const float value = static_cast<float>(total[d]);
        if (type == 0) static_cast<float*>(data)[first + d] = value;
        if (type == 1) static_cast<BFloat16*>(data)[first + d] = static_cast<BFloat16>(value);
        if (type == 2) static_cast<Half*>(data)[first + d] = static_cast<Half>(value);
      }
    }
  });
  return out;
}

// Writes the values to `out`, which may be `x`: each row is read before it is written. Returns mean, rstd.
std::tuple<Tensor, Tensor> forward_into(Tensor& out, bool stream, Tensor x, const Tensor& weight,
                                        const Tensor& bias, double eps) {
  check_channels(x, weight, bias);
  const int64_t last = x.dim() - 1, width = x.size(last);
  const int type = storage_index(x.scalar_type());
  Tensor mean = new_empty(sizes_of(x, last), ScalarType::Float);
  Tensor rstd = new_empty(sizes_of(x, last), ScalarType::Float);
  const std::vector<float> w = widened(weight), b = widened(bias);
  Plan plan{};
  plan.x = rows_of(x);
  plan.weight = w.data();
  plan.bias = b.data();
  plan.mean = static_cast<float*>(mean.mutable_data_ptr());
  plan.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  plan.out = static_cast<char*>(out.mutable_data_ptr());
  plan.num_rows = mean.numel();
  plan.width = width;
  plan.eps = eps;
  plan.stream = stream;
  const int64_t rows_per_task = std::max<int64_t>(kChunk / std::max<int64_t>(width, 1), 1);
  torch::stable::parallel_for(0, plan.num_rows, rows_per_task,
                              [&](int64_t begin, int64_t end) { kForward[type](plan, begin, end); });
  return {mean, rstd};
}

// Writes the gradient of x to `out`, which may be `grad`: each row is read before it is written. Returns
// grad_weight, grad_bias.
std::tuple<Tensor, Tensor> backward_into(Tensor& out, bool stream, Tensor grad, Tensor x,
                                         const Tensor& weight, const Tensor& bias, Tensor mean, Tensor rstd) {
  check_channels(x, weight, bias);
  const int64_t last = x.dim() - 1, width = x.size(last);
  const int type = storage_index(x.scalar_type());
  mean = packed(mean);
  rstd = packed(rstd);
  require(sizes_of(grad, grad.dim()) == sizes_of(x, x.dim()) && grad.scalar_type() == x.scalar_type(),
          "layer_norm_gelu_backward: grad must have the shape and dtype of x");
  require(mean.scalar_type() == ScalarType::Float && rstd.scalar_type() == ScalarType::Float &&
              mean.numel() * width == x.numel() && rstd.numel() == mean.numel(),
          "layer_norm_gelu_backward: mean and rstd must be fp32, one for every row of x");
  const std::vector<float> w = widened(weight), b = widened(bias);
  Plan plan{};
  plan.x = rows_of(x);
  plan.grad = rows_of(grad);
  plan.weight = w.data();
  plan.bias = b.data();
  plan.mean = static_cast<float*>(mean.mutable_data_ptr());
  plan.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  plan.out = static_cast<char*>(out.mutable_data_ptr());
  plan.num_rows = mean.numel();
  plan.width = width;
  plan.stream = stream;
  const int64_t n = plan.num_rows,
                rows_per_block = std::clamp((n + kBlocks - 1) / kBlocks, kMinRows, kMaxRows);
  const int64_t num_blocks = (n + rows_per_block - 1) / rows_per_block;
  std::vector<float> sums(num_blocks * 2 * width);
  torch::stable::parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> slope(width);
    for (int64_t i = begin; i < end; ++i) {
      kBackward[type](plan, i * rows_per_block, std::min(n, (i + 1) * rows_per_block),
                      sums.data() + i * 2 * width, slope.data());
    }
  });
  return {sum_blocks(weight, sums.data(), num_blocks, width),
          sum_blocks(bias, sums.data() + width, num_blocks, width)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_norm_gelu(Tensor x, Tensor weight, Tensor bias, double eps) {
  Tensor y = new_empty(sizes_of(x, x.dim()), x.scalar_type());
  prefer_huge_pages(y);
  const auto [mean, rstd] = forward_into(y, goes_around_caches(y), x, weight, bias, eps);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor> layer_norm_gelu_(Tensor x, Tensor weight, Tensor bias, double eps) {
  require(x.is_contiguous(), "layer_norm_gelu_: x must be contiguous");
  // each row was just read and is in the caches
  return forward_into(x, false, x, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_gelu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias,
                                                            Tensor mean, Tensor rstd) {
  Tensor grad_x = new_empty(sizes_of(x, x.dim()), x.scalar_type());
  prefer_huge_pages(grad_x);
  const auto [grad_weight, grad_bias] =
      backward_into(grad_x, goes_around_caches(grad_x), grad, x, weight, bias, mean, rstd);
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor> layer_norm_gelu_backward_(Tensor grad, Tensor x, Tensor weight, Tensor bias,
                                                     Tensor mean, Tensor rstd) {
  require(grad.is_contiguous(), "layer_norm_gelu_backward_: grad must be contiguous");
  // each row was just read and is in the caches
  return backward_into(grad, false, grad, x, weight, bias, mean, rstd);
}

}  // namespace d2v
