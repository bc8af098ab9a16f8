// softmax(scale q k^T + bias) v for a few queries: every key and value is read once for all the queries of its head.
// The queries of the heads that share keys are packed into lanes, so that products with keys need no horizontal sums and
// neither does the softmax, which goes through the slots in blocks and rescales what it has when a larger score is met.

#include <cmath>
#include <memory>
#include <type_traits>

constexpr int BLOCK = 64;                      // slots at a time
constexpr int KEYS = 8;                        // whose products are summed in registers
constexpr int MIXED = LANES == 16 ? 6 : 3;     // rows of results that are, each
constexpr int WIDE = 4;                        // vectors wide
constexpr float NONE = -INFINITY;

template <class E>
struct View {
  const E* data;
  int64_t batch, head, row;  // strides; what is in a row lies together
};

struct Sizes {
  int64_t batch, heads, kv_heads, nodes, slots, dim, value_dim;
};

// Of x <= 0, within two units in the last place; 0 where that would not be a normal number. What is no number stays none.
static inline Vector exp(Vector x) {
  typedef int32_t Whole __attribute__((vector_size(4 * LANES)));
  const float round = 12582912.0f;  // 1.5 * 2^23: the sum's last bit is worth 1
  Vector shifted = x * 1.44269504f + round;
  Vector n = shifted - round;
  Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first of few bits
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Whole bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Vector power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? Vector{} : p * power;
}

// Rows as they lie in the caches of a text, some way apart: the hardware does not see them coming.
template <class E>
struct Rows {
  const E* data;
  int64_t stride;
  const E* operator[](int64_t i) const { return data + i * stride; }
  Rows from(int64_t i) const { return {data + i * stride, stride}; }
  Rows from_column(int64_t i) const { return {data + i, stride}; }
};

// The rows of a block in float32: where they lie, or converted into `room`.
static Rows<float> as_float(Rows<float> x, float*, int64_t, int64_t) { return x; }

static Rows<float> as_float(Rows<Bfloat16> x, float* room, int64_t count, int64_t dim) {
  for (int64_t s = 0; s < count; s++) {
    int64_t i = 0;
    for (; i + LANES <= dim; i += LANES) store(room + s * dim + i, load(x[s] + i));
    for (; i < dim; i++) room[s * dim + i] = widened(x[s][i]);
  }
  return {room, dim};
}

// scores[slot, width] = k[slot, dim] q[dim, width], of U slots and V vectors of queries. `next` is prefetched meanwhile.
template <int U, int V, class E>
static void products(const float* q, Rows<float> k, Rows<E> next, float* scores, int64_t dim, int64_t width) {
  for (int u = 0; u < U; u++)
    for (int64_t i = 0; i < dim; i += LANES) __builtin_prefetch(next[u] + i, 0, 2);
  Vector sums[U][V] = {};
  for (int64_t i = 0; i < dim; i++) {
    Vector a[V];
    for (int v = 0; v < V; v++) a[v] = load(q + i * width + v * LANES);
    for (int u = 0; u < U; u++)
      for (int v = 0; v < V; v++) sums[u][v] += k[u][i] * a[v];
  }
  for (int u = 0; u < U; u++)
    for (int v = 0; v < V; v++) store(scores + u * width + v * LANES, sums[u][v]);
}

template <int V, class E>
static void products(const float* q, Rows<float> k, Rows<E> next, float* scores, int64_t count, int64_t dim,
                     int64_t width) {
  constexpr int U = LANES == 16 ? KEYS : KEYS / V;
  int64_t s = 0;
  for (; s + U <= count; s += U) products<U, V>(q, k.from(s), next.from(s), scores + s * width, dim, width);
  for (; s < count; s++) products<1, V>(q, k.from(s), next.from(s), scores + s * width, dim, width);
}

// sums[T, N vectors] = sums * fix + weights[slot, T]^T v[slot, N vectors].
template <int T, int N, class E>
static void mix(const float* weights, int64_t width, Rows<float> v, Rows<E> next, float* sums, int64_t dim, const float* fix,
                int64_t count) {
  Vector mixed[T][N];
  for (int t = 0; t < T; t++)
    for (int n = 0; n < N; n++) mixed[t][n] = load(sums + t * dim + n * LANES) * fix[t];
  for (int64_t s = 0; s < count; s++)
    for (int n = 0; n < N; n++) {
      Vector b = load(v[s] + n * LANES);
      __builtin_prefetch(next[s] + n * LANES, 0, 2);
      for (int t = 0; t < T; t++) mixed[t][n] += weights[s * width + t] * b;
    }
  for (int t = 0; t < T; t++)
    for (int n = 0; n < N; n++) store(sums + t * dim + n * LANES, mixed[t][n]);
}

template <int T, class E>
static void mix(const float* weights, int64_t width, Rows<float> v, Rows<E> next, float* sums, int64_t dim, const float* fix,
                int64_t count) {
  int64_t i = 0;
  for (; i + WIDE * LANES <= dim; i += WIDE * LANES)
    mix<T, WIDE>(weights, width, v.from_column(i), next.from_column(i), sums + i, dim, fix, count);
  for (; i < dim; i += LANES)
    mix<T, 1>(weights, width, v.from_column(i), next.from_column(i), sums + i, dim, fix, count);
}

// The packed scores of a block become weights: `most` and `total` are the largest score and the sum of weights so far, and
// what was summed before must be multiplied with `fix`.
static void soften(float* scores, int64_t width, int64_t count, float* most, float* total, float* fix) {
  Vector top = load(most);
  for (int64_t s = 0; s < count; s++) {
    Vector x = load(scores + s * width);
    top = x > top ? x : top;
  }
  Vector shift = top == NONE ? Vector{} : top;  // nothing seen yet: -inf - -inf is no number
  Vector factor = exp(load(most) - shift), sum = load(total) * factor;
  for (int64_t s = 0; s < count; s++) {
    Vector weight = exp(load(scores + s * width) - shift);
    store(scores + s * width, weight);
    sum += weight;
  }
  store(most, top);
  store(total, sum);
  store(fix, factor);
}

// Most slots of most texts are seen by all nodes: their bias of 0 need not be added.
template <class E>
static void add(Rows<E> bias, float* scores, int64_t width, int64_t count, int64_t group, int64_t nodes) {
  for (int64_t t = 0; t < nodes; t++) {
    const E* row = bias[t];
    int hidden = 0;
    for (int64_t s = 0; s < count; s++) hidden |= widened(row[s]) != 0;
    if (!hidden) continue;
    for (int64_t s = 0; s < count; s++)
      for (int64_t h = 0; h < group; h++) scores[s * width + h * nodes + t] += widened(row[s]);
  }
}

// The heads that share the keys k and values v, slots `first` to `end`; y[node, heads of all, value_dim].
template <class E>
static void attend(const E* q, int64_t q_head, int64_t q_row, Rows<E> k, Rows<E> v, Rows<E> bias, E* y,
                   const Sizes& z, int64_t first, int64_t end, float scale) {
  const int64_t group = z.heads / z.kv_heads, rows = group * z.nodes, width = (rows + LANES - 1) / LANES * LANES;
  const int64_t room = std::is_same<E, float>::value ? 0 : BLOCK * (z.dim > z.value_dim ? z.dim : z.value_dim);
  std::unique_ptr<float[]> memory(new float[width * (z.dim + BLOCK + 3) + rows * z.value_dim + room + LANES]());
  uintptr_t start = (reinterpret_cast<uintptr_t>(memory.get()) + sizeof(Vector) - 1) / sizeof(Vector) * sizeof(Vector);
  float *packed = reinterpret_cast<float*>(start), *scores = packed + width * z.dim, *most = scores + width * BLOCK;
  float *total = most + width, *fix = total + width, *sums = fix + width;
  float* converted = sums + rows * z.value_dim;
  for (int64_t r = 0; r < rows; r++) {
    const E* from = q + r / z.nodes * q_head + r % z.nodes * q_row;
    for (int64_t i = 0; i < z.dim; i++) packed[i * width + r] = scale * widened(from[i]);
  }
  for (int64_t r = 0; r < width; r++) most[r] = NONE;

  for (int64_t s = first; s < end; s += BLOCK) {
    const int64_t count = end - s < BLOCK ? end - s : BLOCK;
    const Rows<E> later = k.from(s + BLOCK), raw = v.from(s);
    const Rows<float> keys = as_float(k.from(s), converted, count, z.dim);
    int64_t r = 0;
    for (; r + 2 * LANES <= width; r += 2 * LANES) products<2>(packed + r, keys, raw, scores + r, count, z.dim, width);
    if (r < width) products<1>(packed + r, keys, raw, scores + r, count, z.dim, width);
    add(bias.from_column(s), scores, width, count, group, z.nodes);
    for (r = 0; r < width; r += LANES) soften(scores + r, width, count, most + r, total + r, fix + r);
    const Rows<float> values = as_float(raw, converted, count, z.value_dim);
    for (r = 0; r < rows; r += MIXED) {
      float* mixed = sums + r * z.value_dim;
      switch (rows - r < MIXED ? rows - r : MIXED) {
        case 1: mix<1>(scores + r, width, values, later, mixed, z.value_dim, fix + r, count); break;
        case 2: mix<2>(scores + r, width, values, later, mixed, z.value_dim, fix + r, count); break;
        case 3: mix<3>(scores + r, width, values, later, mixed, z.value_dim, fix + r, count); break;
#ifdef __AVX512F__
        case 4: mix<4>(scores + r, width, values, later, mixed, z.value_dim, fix + r, count); break;
        case 5: mix<5>(scores + r, width, values, later, mixed, z.value_dim, fix + r, count); break;
        case 6: mix<6>(scores + r, width, values, later, mixed, z.value_dim, fix + r, count); break;
#endif
      }
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    const float share = total[r] == 0 ? 0 : 1 / total[r];  // 0: it sees nothing
    E* to = y + (r % z.nodes * z.heads + r / z.nodes) * z.value_dim;
    for (int64_t i = 0; i < z.value_dim; i++) narrow(share * sums[r * z.value_dim + i], to[i]);
  }
}

// The slots from the first to behind the last that any node sees: buffers are longer than texts, windows shorter.
template <class E>
static void seen(Rows<E> bias, const Sizes& z, int64_t& first, int64_t& end) {
  first = z.slots, end = 0;
  for (int64_t t = 0; t < z.nodes; t++) {
    int64_t a = 0, b = z.slots;
    while (a < first && widened(bias[t][a]) == NONE) a++;
    while (b > end && widened(bias[t][b - 1]) == NONE) b--;
    first = a, end = b;
  }
}

// y[batch, node, heads, value_dim]
template <class E>
static void attention(View<E> q, View<E> k, View<E> v, View<E> bias, E* y, const Sizes& z, float scale, int threads) {
  const int64_t group = z.heads / z.kv_heads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < z.batch * z.kv_heads; i++) {
    const int64_t b = i / z.kv_heads, h = i % z.kv_heads;
    const Rows<E> keys{k.data + b * k.batch + h * k.head, k.row}, values{v.data + b * v.batch + h * v.head, v.row};
    const Rows<E> hidden{bias.data + b * bias.batch, bias.row};
    int64_t first, end;
    seen(hidden, z, first, end);
    attend(q.data + b * q.batch + h * group * q.head, q.head, q.row, keys, values, hidden,
           y + (b * z.nodes * z.heads + h * group) * z.value_dim, z, first, end, scale);
  }
}
