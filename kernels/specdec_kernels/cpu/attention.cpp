// softmax(scale q k^T) v for a few queries: every key and value is read once for all the queries of its head, and no slot behind
// the last that a query sees is. The queries of the heads that share keys are packed into lanes, so that products with keys need
// no horizontal sums and neither does the softmax, which goes through the slots in blocks and rescales what it has when a larger
// score is met.

#include <cmath>
#include <memory>

// Slots are read in blocks. The products of a few keys are summed in registers, and so are some rows of results, which are
// several vectors wide.
constexpr int BLOCK = 64;
constexpr int KEYS = 8;
constexpr int MIXED = LANES == 16 ? 6 : 3;
constexpr int WIDE = 4;
constexpr float NONE = -INFINITY;

template <class T>
struct View {
  T* data;
  int64_t batch, head, row;  // strides; what is in a row lies together
};

struct Sizes {
  int64_t batch, heads, kv_heads, nodes, slots, dim, value_dim, words;
};

// Integers as they lie: entry i of row b is data[b * batch + i * row].
struct Whole {
  const int32_t* data;
  int64_t batch, row;
  const int32_t* operator()(int64_t b, int64_t i) const { return data + b * batch + i * row; }
};

// What the nodes of text b see: slots from first(b, node) up to its length, and slot length + j where bit j of its words is set.
struct Seen {
  Whole first, lengths, words;
  int64_t b;
  int64_t length() const { return *lengths(b, 0); }
  int64_t start(int64_t t) const { return *first(b, t) < 0 ? 0 : *first(b, t); }
  bool node(int64_t t, int64_t j) const { return words(b, t)[j >> 5] >> (j & 31) & 1; }
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
struct Rows {
  const float* data;
  int64_t stride;
  const float* operator[](int64_t i) const { return data + i * stride; }
  Rows from(int64_t i) const { return {data + i * stride, stride}; }
};

// `count` rows as floats: where they lie, or in `room`.
static Rows floats(const float* from, int64_t stride, int64_t, int64_t, float*) { return {from, stride}; }

static Rows floats(const Brain* from, int64_t stride, int64_t count, int64_t dim, float* room) {
  for (int64_t s = 0; s < count; s++) {
    const Brain* row = from + s * stride;
    for (int64_t i = 0; i < dim; i += 32) __builtin_prefetch(row + BLOCK * stride + i, 0, 2);
    int64_t i = 0;
    for (; i + LANES <= dim; i += LANES) store(room + s * dim + i, load(row + i));
    for (; i < dim; i++) room[s * dim + i] = widened(row[i]);
  }
  return {room, dim};
}

// scores[slot, width] = k[slot, dim] q[dim, width], of U slots and V vectors of queries. `next` is prefetched meanwhile.
template <int U, int V>
static void products(const float* q, Rows k, Rows next, float* scores, int64_t dim, int64_t width) {
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

template <int V>
static void products(const float* q, Rows k, Rows next, float* scores, int64_t count, int64_t dim, int64_t width) {
  constexpr int U = LANES == 16 ? KEYS : KEYS / V;
  int64_t s = 0;
  for (; s + U <= count; s += U) products<U, V>(q, k.from(s), next.from(s), scores + s * width, dim, width);
  for (; s < count; s++) products<1, V>(q, k.from(s), next.from(s), scores + s * width, dim, width);
}

// sums[T, N vectors] = sums * fix + weights[slot, T]^T v[slot, N vectors].
template <int T, int N>
static void mix(const float* weights, int64_t width, Rows v, Rows next, float* sums, int64_t dim, const float* fix,
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

template <int T>
static void mix(const float* weights, int64_t width, Rows v, Rows next, float* sums, int64_t dim, const float* fix,
                int64_t count) {
  int64_t i = 0;
  for (; i + WIDE * LANES <= dim; i += WIDE * LANES)
    mix<T, WIDE>(weights, width, {v[0] + i, v.stride}, {next[0] + i, next.stride}, sums + i, dim, fix, count);
  for (; i < dim; i += LANES)
    mix<T, 1>(weights, width, {v[0] + i, v.stride}, {next[0] + i, next.stride}, sums + i, dim, fix, count);
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

// cap * tanh(x / cap) of packed scores.
static void cap(float* scores, int64_t width, int64_t count, float softcap) {
  for (int64_t i = 0; i < count * width; i += LANES) {
    Vector x = load(scores + i) * (1 / softcap);
    Vector below = exp((x > 0.0f ? -x : x) * 2.0f), size = (1.0f - below) / (1.0f + below);
    store(scores + i, softcap * (x > 0.0f ? size : -size));
  }
}

// Take away the scores of slots that a node does not see, of a block from slot `start` on.
static void hide(const Seen& seen, float* scores, int64_t width, int64_t start, int64_t count, int64_t group, int64_t nodes) {
  const int64_t length = seen.length();
  for (int64_t t = 0; t < nodes; t++) {
    const int64_t first = seen.start(t);
    if (start >= first && start + count <= length) continue;  // most blocks of most texts
    for (int64_t s = 0; s < count; s++) {
      const int64_t slot = start + s;
      if (slot < length ? slot >= first : seen.node(t, slot - length)) continue;
      for (int64_t h = 0; h < group; h++) scores[s * width + h * nodes + t] = NONE;
    }
  }
}

// The slots from the first to behind the last that any node sees.
static void range(const Seen& seen, const Sizes& z, int64_t& first, int64_t& end) {
  int64_t last = -1;
  first = seen.length();
  for (int64_t t = 0; t < z.nodes; t++) {
    if (seen.start(t) < first) first = seen.start(t);
    for (int64_t j = 32 * z.words - 1; j > last; j--)
      if (seen.node(t, j)) last = j;
  }
  end = seen.length() + last + 1;
  if (end > z.slots) end = z.slots;
}

// The heads that share the keys k and values v; y[node, heads of all, value_dim].
template <class T>
static void attend(const T* q, int64_t q_head, int64_t q_row, const T* k, int64_t k_row, const T* v, int64_t v_row,
                   const Seen& seen, const float* sinks, T* y, const Sizes& z, float scale, float softcap) {
  const int64_t group = z.heads / z.kv_heads, rows = group * z.nodes, width = (rows + LANES - 1) / LANES * LANES;
  const int64_t wide = sizeof(T) == sizeof(float) ? 0 : BLOCK;
  const int64_t room = width * (z.dim + BLOCK + 3) + rows * z.value_dim + wide * (z.dim + z.value_dim);
  std::unique_ptr<float[]> memory(new float[room + LANES]());
  uintptr_t start = (reinterpret_cast<uintptr_t>(memory.get()) + sizeof(Vector) - 1) / sizeof(Vector) * sizeof(Vector);
  float *packed = reinterpret_cast<float*>(start), *scores = packed + width * z.dim, *most = scores + width * BLOCK;
  float *total = most + width, *fix = total + width, *sums = fix + width, *wide_keys = sums + rows * z.value_dim;
  for (int64_t r = 0; r < rows; r++) {
    const T* from = q + r / z.nodes * q_head + r % z.nodes * q_row;
    for (int64_t i = 0; i < z.dim; i++) packed[i * width + r] = scale * widened(from[i]);
  }
  for (int64_t r = 0; r < width; r++) most[r] = NONE;
  for (int64_t r = 0; sinks && r < rows; r++) most[r] = sinks[r / z.nodes], total[r] = most[r] != NONE;

  int64_t first, end;
  range(seen, z, first, end);
  for (int64_t s = first; s < end; s += BLOCK) {
    const int64_t count = end - s < BLOCK ? end - s : BLOCK;
    const Rows keys = floats(k + s * k_row, k_row, count, z.dim, wide_keys);
    const Rows values = floats(v + s * v_row, v_row, count, z.value_dim, wide_keys + wide * z.dim);
    const Rows next_keys = wide ? keys : keys.from(BLOCK), next_values = wide ? values : values.from(BLOCK);
    int64_t r = 0;
    for (; r + 2 * LANES <= width; r += 2 * LANES) products<2>(packed + r, keys, next_keys, scores + r, count, z.dim, width);
    if (r < width) products<1>(packed + r, keys, next_keys, scores + r, count, z.dim, width);
    if (softcap != 0) cap(scores, width, count, softcap);
    hide(seen, scores, width, s, count, group, z.nodes);
    for (r = 0; r < width; r += LANES) soften(scores + r, width, count, most + r, total + r, fix + r);
    for (r = 0; r < rows; r += MIXED) {
      float* mixed = sums + r * z.value_dim;
      with_count<MIXED>(rows - r < MIXED ? rows - r : MIXED, [&](auto several) {
        mix<decltype(several)::value>(scores + r, width, values, next_values, mixed, z.value_dim, fix + r, count);
      });
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    const float share = total[r] == 0 ? 0 : 1 / total[r];  // 0: it sees nothing
    T* to = y + (r % z.nodes * z.heads + r / z.nodes) * z.value_dim;
    for (int64_t i = 0; i < z.value_dim; i++) round_to(to + i, share * sums[r * z.value_dim + i]);
  }
}

// y[batch, node, heads, value_dim], first[batch, node], lengths[batch], words[batch, node, word], sinks[heads] or null.
template <class T>
static void attention(View<const T> q, View<const T> k, View<const T> v, Whole first, Whole lengths, Whole words,
                      const float* sinks, T* y, const Sizes& z, float scale, float softcap, int threads) {
  const int64_t group = z.heads / z.kv_heads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < z.batch * z.kv_heads; i++) {
    const int64_t b = i / z.kv_heads, h = i % z.kv_heads;
    attend(q.data + b * q.batch + h * group * q.head, q.head, q.row, k.data + b * k.batch + h * k.head, k.row,
           v.data + b * v.batch + h * v.head, v.row, Seen{first, lengths, words, b}, sinks ? sinks + h * group : nullptr,
           y + (b * z.nodes * z.heads + h * group) * z.value_dim, z, scale, softcap);
  }
}
