// The kernels of this folder as ops of torch, for tensors that the Python side has checked.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;

template <class T>
static const T* data(const Tensor& x) { return static_cast<const T*>(x.data_ptr()); }

static bool is_float(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Float; }

static int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

static Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

template <class T>
static Tensor linear_of(const Tensor& x, const Tensor& weight) {
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  linear(data<T>(x), data<T>(weight), static_cast<T*>(y.data_ptr()), x.size(0), weight.size(0), x.size(1), threads());
  return y;
}

static Tensor linear_op(const Tensor& x, const Tensor& weight) {
  return (is_float(x) ? linear_of<float> : linear_of<Brain>)(dense(x), dense(weight));
}

static Tensor rows(const Tensor& x) { return x.stride(3) == 1 ? x : torch::stable::contiguous(x); }

template <class T>
static View<const T> view(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1), x.stride(2)};
}

// Of [batch], [batch, node] or [batch, node, word]; words lie together.
static Whole whole(const Tensor& x) {
  return {data<int32_t>(x), x.stride(0), x.dim() > 1 ? x.stride(1) : 0};
}

template <class T>
static Tensor attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& first, const Tensor& lengths,
                           const Tensor& words, const float* sinks, double scale, double softcap) {
  const Sizes z{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3), words.size(2)};
  Tensor y = torch::stable::new_empty(q, {z.batch, z.nodes, z.heads, z.value_dim});
  attention<T>(view<T>(q), view<T>(k), view<T>(v), whole(first), whole(lengths), whole(words), sinks,
               static_cast<T*>(y.data_ptr()), z, static_cast<float>(scale), static_cast<float>(softcap), threads());
  return y;
}

static Tensor attention_op(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& first,
                           const Tensor& lengths, const Tensor& ancestors, double scale, double softcap,
                           const std::optional<Tensor>& sinks) {
  const Tensor words = ancestors.stride(2) == 1 ? ancestors : torch::stable::contiguous(ancestors);
  const Tensor added = sinks ? dense(*sinks) : query;
  const auto run = is_float(query) ? attention_of<float> : attention_of<Brain>;
  return run(rows(query), rows(key), rows(value), first, lengths, words, sinks ? data<float>(added) : nullptr, scale, softcap);
}

static const uint8_t* bytes(const Tensor& x) { return data<uint8_t>(x); }

static Tensor outputs(const Tensor& x, int64_t out) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out;
  return torch::stable::new_empty(x, sizes);
}

// How many rows lie in the last dimension, which may have no numbers.
static int64_t row_count(const Tensor& x) {
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) count *= x.size(i);
  return count;
}

static Tensor linear_bf16_op(const Tensor& x, const Tensor& weight, int64_t out) {
  const Tensor a = dense(x), y = outputs(a, out);
  const int64_t k = a.size(a.dim() - 1), m = row_count(a);
  stored::linear_bf16(data<float>(a), bytes(weight), static_cast<float*>(y.data_ptr()), m, out, k, weight.size(1), threads());
  return y;
}

template <class Format>
static Tensor integer_op(const Tensor& x, const Format& format, int64_t out, int64_t groups) {
  const Tensor a = dense(x), y = outputs(a, out);
  const int64_t k = a.size(a.dim() - 1), m = row_count(a);
  const stored::Rows rows(data<float>(a), m, k, groups);
  stored::linear(rows, format, static_cast<float*>(y.data_ptr()), m, out, groups, threads());
  return y;
}

static Tensor linear_int8_op(const Tensor& x, const Tensor& weight, const Tensor& scale, int64_t out) {
  return integer_op(x, stored::Int8{bytes(weight), data<float>(scale)}, out, weight.size(1) / stored::STEPS);
}

static Tensor linear_int4_op(const Tensor& x, const Tensor& weight, const Tensor& scales, int64_t out) {
  return integer_op(x, stored::Int4{bytes(weight), data<uint16_t>(scales)}, out, weight.size(1));
}

STABLE_TORCH_LIBRARY_IMPL(specdec, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear_op));
  m.impl("linear_bf16", TORCH_BOX(&linear_bf16_op));
  m.impl("linear_int8", TORCH_BOX(&linear_int8_op));
  m.impl("linear_int4", TORCH_BOX(&linear_int4_op));
  m.impl("attention", TORCH_BOX(&attention_op));
}
