#include <algorithm>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "ops.h"
#include "simd.h"

namespace d2v {
namespace {

// A working copy of more elements than this bypasses the caches, which could not hold it.
constexpr int64_t kStreamElements = 4 << 20;
constexpr int64_t kStrip = 1024;

// As torch.lerp: the weight decides to which end the product is added, so that weight 1 gives `student`
// exactly.
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

// ema_body with a working copy, aligned to 16 bytes, that bypasses the caches through a strip that fits in
// them.
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

// The tensors of one update.
struct Lists {
  std::vector<Tensor> teacher, student, working;
};

// Address, shape, strides, dtype and device of every tensor of a call. The checks and the table of items
// depend on nothing else, so calls with equal layouts share a plan.
using Layout = std::vector<int64_t>;

struct Plan {
  Layout layout;
  bool plain;  // every tensor is contiguous and on the CPU; `items` hold the addresses
  std::vector<Item> items;
  int64_t chunks;
};

void describe(const Tensor& x, const void* data, Layout& layout) {
  const auto sizes = x.sizes(), strides = x.strides();
  layout.push_back(reinterpret_cast<intptr_t>(data));
  layout.push_back(static_cast<int64_t>(x.scalar_type()));
  layout.push_back(static_cast<int64_t>(x.device().type()));
  layout.push_back(x.get_device_index());
  layout.push_back(static_cast<int64_t>(sizes.size()));
  layout.insert(layout.end(), sizes.begin(), sizes.end());
  layout.insert(layout.end(), strides.begin(), strides.end());
}

void describe(const Lists& lists, Layout& layout) {
  layout.clear();
  for (const auto* group : {&lists.teacher, &lists.student, &lists.working})
    layout.push_back(static_cast<int64_t>(group->size()));
  for (const Tensor& x : lists.teacher) describe(x, x.mutable_data_ptr(), layout);
  for (const Tensor& x : lists.student) describe(x, x.const_data_ptr(), layout);
  for (const Tensor& x : lists.working) describe(x, x.mutable_data_ptr(), layout);
}

constexpr const char* kNames[] = {"teacher", "student", "working"};

// Bytes from the first element to the end of the last one.
int64_t span_bytes(const Tensor& x) {
  int64_t reach = 0;
  for (int64_t d = 0; d < x.dim(); ++d) reach += (x.size(d) - 1) * x.stride(d);
  return (reach + 1) * x.element_size();
}

// Whether two elements may share memory: the stride of a dimension is within the reach of the smaller ones.
bool overlaps_itself(const Tensor& x) {
  if (x.is_contiguous()) return false;
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) > 1) steps.emplace_back(x.stride(d), x.size(d));
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : steps) {
    if (stride <= reach) return true;
    reach += (size - 1) * stride;
  }
  return false;
}

struct Span {
  uintptr_t begin, end;
  int kind, index;
};

// Throws if memory that is written through one tensor is read or written through another.
void check_overlap(const Lists& lists) {
  std::vector<Span> spans;
  int kind = 0;
  for (const auto* group : {&lists.teacher, &lists.student, &lists.working}) {
    for (size_t i = 0; i < group->size(); ++i) {
      const Tensor& x = (*group)[i];
      if (x.numel() == 0) continue;
      require(kind == 1 || !overlaps_itself(x), "ema_update_: ", kNames[kind], " ", i,
              " has several elements in one place of memory");
      const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
      spans.push_back({begin, begin + span_bytes(x), kind, static_cast<int>(i)});
    }
    ++kind;
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  // per kind, the span that reaches furthest so far
  Span furthest[3] = {};
  for (const Span& span : spans) {
    for (int other = 0; other < 3; ++other)
      require(span.begin >= furthest[other].end || (span.kind == 1 && other == 1),
              "ema_update_: ", kNames[span.kind], " ", span.index, " and ", kNames[other], " ",
              furthest[other].index, " share memory");
    if (span.end > furthest[span.kind].end) furthest[span.kind] = span;
  }
}

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

// Checks what the docstring of `ema_update_` requires. Python rewords the errors for users.
void check(const Lists& lists) {
  const auto& [teacher, student, working] = lists;
  require(teacher.size() == student.size(), "ema_update_: ", teacher.size(), " teacher and ", student.size(),
          " student tensors");
  require(working.empty() || working.size() == teacher.size(), "ema_update_: ", teacher.size(),
          " teacher and ", working.size(), " working tensors");
  for (int kind = 0; kind < 3; ++kind) {
    const auto& group = kind == 0 ? teacher : kind == 1 ? student : working;
    for (size_t i = 0; i < group.size(); ++i)
      require(!group[i].is_cpu() || group[i].numel() == 0 || group[i].const_data_ptr() != nullptr,
              "ema_update_: ", kNames[kind], " ", i, " has no memory");
  }
  for (size_t i = 0; i < teacher.size(); ++i) {
    require(teacher[i].scalar_type() == ScalarType::Float, "ema_update_: teacher ", i, " must be fp32");
    for (int kind = 1; kind < (working.empty() ? 2 : 3); ++kind) {
      const Tensor& other = kind == 1 ? student[i] : working[i];
      dtype_index(other.scalar_type());
      require(same_shape(teacher[i], other), "ema_update_: ", kNames[kind], " ", i,
              " must have the shape of its teacher");
      require(teacher[i].device() == other.device(), "ema_update_: ", kNames[kind], " ", i,
              " must be on the device of its teacher");
    }
  }
  check_overlap(lists);
}

// Fills the table. Replaces tensors with gaps in `lists` by contiguous copies, and adds those to be copied
// back to `write_back`.
void fill(Plan& plan, Lists& lists, std::vector<std::pair<Tensor, Tensor>>* write_back) {
  const auto plain = [write_back](Tensor& x, bool written) {
    if (x.is_contiguous()) return;
    Tensor copy = torch::stable::contiguous(x);
    if (written) write_back->emplace_back(x, copy);
    x = copy;
  };
  int64_t elements = 0;
  for (const Tensor& w : lists.working) elements += w.numel();
  plan.items.reserve(lists.teacher.size());
  plan.chunks = 0;
  for (size_t i = 0; i < lists.teacher.size(); ++i) {
    const int64_t n = lists.teacher[i].numel();
    if (n == 0) continue;
    plain(lists.teacher[i], true);
    plain(lists.student[i], false);
    ScalarType working_type = ScalarType::Float;
    void* working_data = nullptr;
    if (!lists.working.empty()) {
      plain(lists.working[i], true);
      working_type = lists.working[i].scalar_type();
      working_data = lists.working[i].mutable_data_ptr();
    }
    const bool stream = elements > kStreamElements && reinterpret_cast<uintptr_t>(working_data) % 16 == 0;
    const Pointers pointers = {static_cast<float*>(lists.teacher[i].mutable_data_ptr()),
                               lists.student[i].const_data_ptr(), working_data, n, stream};
    plan.items.push_back({pointers, choose_loop(lists.student[i].scalar_type(), working_type), plan.chunks});
    plan.chunks += (n + kChunk - 1) / kChunk;
  }
}

bool is_plain(const Lists& lists) {
  for (const auto* group : {&lists.teacher, &lists.student, &lists.working})
    for (const Tensor& x : *group)
      if (!x.is_cpu() || !x.is_contiguous()) return false;
  return true;
}

// Checks the tensors and returns their plan. Caches the latest layouts; a training loop has one or two.
std::shared_ptr<const Plan> plan_of(Lists& lists) {
  constexpr size_t kRemembered = 4;
  static std::mutex mutex;
  static auto& remembered = *new std::list<std::shared_ptr<const Plan>>;
  thread_local Layout layout;
  describe(lists, layout);
  {
    const std::lock_guard lock(mutex);
    for (auto known = remembered.begin(); known != remembered.end(); ++known) {
      if ((*known)->layout != layout) continue;
      remembered.splice(remembered.begin(), remembered, known);
      return remembered.front();
    }
  }
  check(lists);
  auto plan = std::make_shared<Plan>();
  plan->layout = layout;
  plan->plain = is_plain(lists);
  if (plan->plain) fill(*plan, lists, nullptr);
  const std::lock_guard lock(mutex);
  remembered.push_front(plan);
  if (remembered.size() > kRemembered) remembered.pop_back();
  return plan;
}

void run(const Plan& plan, float weight) {
  const auto& items = plan.items;
  torch::stable::parallel_for(0, plan.chunks, 4, [&](int64_t begin, int64_t end) {
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
}

double decay_of(double decay, const std::optional<Tensor>& decay_tensor) {
  if (!decay_tensor.has_value()) return decay;
  const void* value = decay_tensor->const_data_ptr();
  return decay_tensor->scalar_type() == ScalarType::Double ? *static_cast<const double*>(value)
                                                           : *static_cast<const float*>(value);
}

// The tensors of a prepared update. They are the caller's own objects, so that changes to them (`set_`,
// `.data`) are visible here.
struct Prepared {
  Lists lists;
  std::shared_ptr<const Plan> plan;
};

std::mutex prepared_mutex;
int64_t last_handle = 0;

// never destroyed: at process exit torch may be unloaded first
std::unordered_map<int64_t, std::shared_ptr<const Prepared>>& all_prepared() {
  static auto& all = *new std::unordered_map<int64_t, std::shared_ptr<const Prepared>>;
  return all;
}

std::shared_ptr<const Prepared> find_prepared(int64_t handle) {
  const std::lock_guard lock(prepared_mutex);
  const auto found = all_prepared().find(handle);
  require(found != all_prepared().end(), "ema_update_: no prepared update has number ", handle);
  return found->second;
}

bool is_current(const Prepared& prepared) {
  thread_local Layout layout;
  describe(prepared.lists, layout);
  return layout == prepared.plan->layout;
}

}  // namespace

void ema_update_(std::vector<Tensor> teacher, std::vector<Tensor> student, double decay,
                 std::optional<Tensor> decay_tensor, std::vector<Tensor> working) {
  Lists lists{std::move(teacher), std::move(student), std::move(working)};
  const auto plan = plan_of(lists);
  decay = decay_of(decay, decay_tensor);
  if (decay == 1.0) return;
  const float weight = static_cast<float>(1.0 - decay);
  if (plan->plain) return run(*plan, weight);
  // update contiguous copies of tensors with gaps
  Plan copied;
  std::vector<std::pair<Tensor, Tensor>> write_back;
  fill(copied, lists, &write_back);
  run(copied, weight);
  for (auto& [target, copy] : write_back) torch::stable::copy_(target, copy);
}

void ema_check(std::vector<Tensor> teacher, std::vector<Tensor> student, std::vector<Tensor> working) {
  Lists lists{std::move(teacher), std::move(student), std::move(working)};
  plan_of(lists);
}

int64_t ema_prepare(std::vector<Tensor> teacher, std::vector<Tensor> student, std::vector<Tensor> working) {
  Lists lists{std::move(teacher), std::move(student), std::move(working)};
  auto plan = plan_of(lists);
  const auto prepared = std::make_shared<const Prepared>(Prepared{std::move(lists), std::move(plan)});
  const std::lock_guard lock(prepared_mutex);
  all_prepared().emplace(++last_handle, prepared);
  return last_handle;
}

bool ema_is_current(int64_t handle) { return is_current(*find_prepared(handle)); }

bool ema_run(int64_t handle, double decay, std::optional<Tensor> decay_tensor) {
  const auto prepared = find_prepared(handle);
  if (!prepared->plan->plain || !is_current(*prepared)) return false;
  decay = decay_of(decay, decay_tensor);
  if (decay != 1.0) run(*prepared->plan, static_cast<float>(1.0 - decay));
  return true;
}

void ema_release(int64_t handle) {
  std::shared_ptr<const Prepared> released;  // frees its tensors after the lock is released
  const std::lock_guard lock(prepared_mutex);
  const auto found = all_prepared().find(handle);
  if (found == all_prepared().end()) return;
  released = std::move(found->second);
  all_prepared().erase(found);
}

}  // namespace d2v
