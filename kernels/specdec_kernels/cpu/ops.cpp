// The kernels of this folder as ops of torch, for tensors that the Python side has checked.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;

static const float* data(const Tensor& x) { return static_cast<const float*>(x.data_ptr()); }

static int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

static Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

static Tensor linear_op(const Tensor& x, const Tensor& weight) {
  const Tensor a = dense(x), b = dense(weight);
  Tensor y = torch::stable::new_empty(a, {a.size(0), b.size(0)});
  linear(data(a), data(b), static_cast<float*>(y.data_ptr()), a.size(0), b.size(0), a.size(1), threads());
  return y;
}

static Tensor rows(const Tensor& x) { return x.stride(3) == 1 ? x : torch::stable::contiguous(x); }

template <class E>
static View<E> view(const Tensor& x) {
  return {static_cast<const E*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <class E>
static Tensor attention_of(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias, float scale) {
  const Tensor q = rows(query), k = rows(key), v = rows(value), seen = rows(bias);
  const Sizes z{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3)};
  Tensor y = torch::stable::new_empty(q, {z.batch, z.nodes, z.heads, z.value_dim});
  attention(view<E>(q), view<E>(k), view<E>(v), view<E>(seen), static_cast<E*>(y.data_ptr()), z, scale, threads());
  return y;
}

static Tensor attention_op(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias, double scale) {
  const bool half = query.scalar_type() == torch::headeronly::ScalarType::BFloat16;
  return (half ? attention_of<Bfloat16> : attention_of<float>)(query, key, value, bias, static_cast<float>(scale));
}

STABLE_TORCH_LIBRARY_IMPL(specdec, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear_op));
  m.impl("attention", TORCH_BOX(&attention_op));
}
