#include <algorithm>

#include "ops.h"
#include "simd.h"

namespace d2v {
namespace {

// A working copy of more elements than this is stored around the caches: nothing of it would be left in them.
constexpr int64_t kStreamElements = 4 << 20;
constexpr int64_t kStrip = 1024;

// The form of torch.lerp: which end the product is added to depends on the weight, so that weight 1 gives
// `student` exactly.
template <typename S, typename W>
D2V_INLINE void ema_body(int64_t n, float weight, float* __restrict teacher, const S* __restrict student,
                         W* __restrict working) {
  if (weight < 0.5f) {
    for (int64_t i = 0; i < n; ++i) {
      const float t = teacher[i], s = static_cast<float>(student[i]);
      const float r = t + weight * (s - t);
      teacher[i] = r;
      if (working != nullptr) working[i] = static_cast<W>(r);
    }
  } else {
    const float coefficient = weight - 1.0f;
    for (int64_t i = 0; i < n; ++i) {
      const float t = teacher[i], s = static_cast<float>(student[i]);
      const float r = s + coefficient * (s - t);
      teacher[i] = r;
      if (working != nullptr) working[i] = static_cast<W>(r);
    }
  }
}

// The same, the working copy (aligned to 16 bytes) around the caches, by way of a strip that stays in them.
template <typename S, typename W>
D2V_INLINE void ema_stream_body(int64_t n, float weight, float* teacher, const S* student, W* working) {
  alignas(32) W strip[kStrip];
  int64_t i = 0;
  for (; i + kStrip <= n; i += kStrip) {
    ema_body<S, W>(kStrip, weight, teacher + i, student + i, strip);
    stream_copy(working + i, strip, sizeof strip);
  }
  ema_body<S, W>(n - i, weight, teacher + i, student + i, working + i);
  finish_streams();
}

struct Pointers {
  float* teacher;
  const void* student;
  void* working;
  int64_t n;
  bool stream;
};

using Loop = void (*)(const Pointers& p, int64_t begin, int64_t end, float weight);

#define D2V_EMA_LOOP(name, S, W)                                                               \
  D2V_INLINE void name##_body(const Pointers& p, int64_t begin, int64_t end, float weight) {   \
    W* working = static_cast<W*>(p.working);                                                   \
    const S* student = static_cast<const S*>(p.student) + begin;                               \
    if (p.stream) {                                                                            \
      ema_stream_body<S, W>(end - begin, weight, p.teacher + begin, student, working + begin); \
    } else {                                                                                   \
      ema_body<S, W>(end - begin, weight, p.teacher + begin, student,                          \
                     working == nullptr ? nullptr : working + begin);                          \
    }                                                                                          \
  }                                                                                            \
  D2V_MULTIARCH(name, (const Pointers& p, int64_t begin, int64_t end, float weight), (p, begin, end, weight))

D2V_EMA_LOOP(ema_f32_f32, float, float)
D2V_EMA_LOOP(ema_f32_bf16, float, BFloat16)
D2V_EMA_LOOP(ema_f32_f16, float, Half)
D2V_EMA_LOOP(ema_bf16_f32, BFloat16, float)
D2V_EMA_LOOP(ema_bf16_bf16, BFloat16, BFloat16)
D2V_EMA_LOOP(ema_bf16_f16, BFloat16, Half)
D2V_EMA_LOOP(ema_f16_f32, Half, float)
D2V_EMA_LOOP(ema_f16_bf16, Half, BFloat16)
D2V_EMA_LOOP(ema_f16_f16, Half, Half)

int dtype_index(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return 0;
    case ScalarType::BFloat16: return 1;
    case ScalarType::Half: return 2;
    default: require(false, "ema_update_: student and working must be fp32, bf16 or fp16"); return -1;
  }
}

Loop choose_loop(ScalarType student, ScalarType working) {
  static const Loop table[3][3] = {{ema_f32_f32, ema_f32_bf16, ema_f32_f16},
                                   {ema_bf16_f32, ema_bf16_bf16, ema_bf16_f16},
                                   {ema_f16_f32, ema_f16_bf16, ema_f16_f16}};
  return table[dtype_index(student)][dtype_index(working)];
}

struct Item {
  Pointers pointers;
  Loop loop;
  int64_t first_chunk;  // over the whole list
};

}  // namespace

void ema_update_(std::vector<Tensor> teacher, std::vector<Tensor> student, double decay,
                 std::optional<Tensor> decay_tensor, std::vector<Tensor> working) {
  require(teacher.size() == student.size(), "ema_update_: ", teacher.size(), " teacher and ", student.size(),
          " student tensors");
  require(working.empty() || working.size() == teacher.size(), "ema_update_: ", teacher.size(),
          " teacher and ", working.size(), " working tensors");
  if (decay_tensor.has_value()) {
    const void* value = decay_tensor->const_data_ptr();
    decay = decay_tensor->scalar_type() == ScalarType::Double ? *static_cast<const double*>(value)
                                                              : *static_cast<const float*>(value);
  }
  if (decay == 1.0) return;
  const float weight = static_cast<float>(1.0 - decay);

  int64_t elements = 0;
  for (const Tensor& w : working) elements += w.numel();

  std::vector<Item> items;
  items.reserve(teacher.size());
  // tensors that are not plain memory are updated in a contiguous copy, which is written back at the end
  std::vector<std::pair<Tensor, Tensor>> write_back;
  int64_t chunks = 0;
  const auto plain = [&write_back](Tensor& t) {
    if (t.is_contiguous()) return t;
    Tensor copy = torch::stable::contiguous(t);
    write_back.emplace_back(t, copy);
    return copy;
  };
  std::vector<Tensor> alive;
  for (size_t i = 0; i < teacher.size(); ++i) {
    require(teacher[i].scalar_type() == ScalarType::Float, "ema_update_: teacher ", i, " must be fp32");
    const int64_t n = teacher[i].numel();
    require(student[i].numel() == n, "ema_update_: tensor ", i, " has ", n, " teacher and ",
            student[i].numel(), " student elements");
    if (n == 0) continue;
    Tensor s = torch::stable::contiguous(student[i]);
    Tensor t = plain(teacher[i]);
    alive.push_back(s);
    ScalarType working_type = ScalarType::Float;
    void* working_data = nullptr;
    if (!working.empty()) {
      require(working[i].numel() == n, "ema_update_: tensor ", i, " has ", n, " teacher and ",
              working[i].numel(), " working elements");
      Tensor w = plain(working[i]);
      working_type = w.scalar_type();
      working_data = w.mutable_data_ptr();
    }
    const bool stream = elements > kStreamElements && reinterpret_cast<uintptr_t>(working_data) % 16 == 0;
    items.push_back({{static_cast<float*>(t.mutable_data_ptr()), s.const_data_ptr(), working_data, n, stream},
                     choose_loop(s.scalar_type(), working_type),
                     chunks});
    chunks += (n + kChunk - 1) / kChunk;
  }

  torch::stable::parallel_for(0, chunks, 4, [&](int64_t begin, int64_t end) {
    auto item = std::upper_bound(items.begin(), items.end(), begin,
                                 [](int64_t chunk, const Item& i) { return chunk < i.first_chunk; }) -
                1;
    for (int64_t chunk = begin; chunk < end;) {
      const int64_t offset = (chunk - item->first_chunk) * kChunk;
      const int64_t stop = std::min(item->pointers.n, offset + (end - chunk) * kChunk);
      item->loop(item->pointers, offset, stop, weight);
      chunk += (stop - offset + kChunk - 1) / kChunk;
      ++item;
    }
  });
  for (auto& [target, copy] : write_back) torch::stable::copy_(target, copy);
}

}  // namespace d2v
