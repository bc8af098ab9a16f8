// x W^T for a few rows of x: every weight is read once, in the order in which it lies, and multiplied with all of them.
// A tile is `ROWS` rows of W and up to `TOKENS` of x, whose products are summed in registers. What comes after it is asked
// for meanwhile, one line after the other: memory gives what is asked for in order almost twice as fast as rows side by side.

#include <vector>

constexpr int TOKENS = LANES == 16 ? 6 : 3;
constexpr int ROWS = 4;
constexpr int64_t AHEAD = 16384;  // bytes from what is multiplied to what is asked for, if tiles are smaller: as memory is far away

// A vector's width of W is so many vectors of floats. Those of bfloat16 are its even numbers and its odd ones, as that takes one
// instruction each; x is brought into the same order. (AVX-512 has products of bfloat16, too: no faster than these on a Zen 4.)
template <class S>
constexpr int PARTS = sizeof(float) / sizeof(S);

template <int P>
static inline Vector part(const float* p) { return load(p); }

template <int P>
static inline Vector part(const Brain* p) {
  typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
  Words both;
  std::memcpy(&both, p, sizeof both);
  const Words one = P == 0 ? both << 16 : both & 0xffff0000u;
  Vector v;
  std::memcpy(&v, &one, sizeof v);
  return v;
}

static const float* in_parts_of(const float* x, int64_t, int64_t, std::vector<float>&) { return x; }

static const float* in_parts_of(const Brain* x, int64_t m, int64_t k, std::vector<float>& room) {
  room.resize(m * k);
  for (int64_t t = 0; t < m; t++) {
    const Brain* from = x + t * k;
    float* to = room.data() + t * k;
    int64_t i = 0;
    for (; i + 2 * LANES <= k; i += 2 * LANES) {
      store(to + i, part<0>(from + i));
      store(to + i + LANES, part<1>(from + i));
    }
    for (; i < k; i++) to[i] = widened(from[i]);
  }
  return room.data();
}

template <int N>
static inline float sum(const float* p) {
  typedef float Half __attribute__((vector_size(2 * N)));
  Half a, b;
  std::memcpy(&a, p, sizeof a);
  std::memcpy(&b, p + N / 2, sizeof b);
  a += b;
  float q[N / 2];
  std::memcpy(q, &a, sizeof a);
  return sum<N / 2>(q);
}
template <>
inline float sum<1>(const float* p) { return *p; }

// Adds products of one part of R rows of W with T of x. What is read from W and x is kept in registers where products are waited
// for. Where memory is, the same loop is slower for it (float32, Zen 4: 4 to 6 rows of x take 1.6 times as long), as it soon runs
// into lines that were asked for and are not there.
template <int P, int R, int T, class S>
static inline void add_products(Vector (&sums)[R][T], const float* x, const S* w, int64_t k) {
  constexpr bool BUSY = PARTS<S> > 1;
  Vector a[R];
  for (int r = 0; r < R; r++) {
    a[r] = part<P>(w + r * k);
    if constexpr (BUSY) keep(a[r]);
  }
  for (int t = 0; t < T; t++) {
    Vector b = load(x + t * k + P * LANES);
    if constexpr (BUSY || T <= 4) keep(b);
    for (int r = 0; r < R; r++) sums[r][t] += a[r] * b;
  }
}

template <int R, int T, class S>
static void tile(const float* x, const S* w, S* y, int64_t n, int64_t k) {
  constexpr int COUNT = LANES * PARTS<S>;
  const int64_t least = AHEAD / sizeof(S);
  const S* ahead = w + (R * k > least ? R * k : least);
  Vector sums[R][T] = {};
  int64_t i = 0;
  for (; i + COUNT <= k; i += COUNT) {
    for (int r = 0; r < R; r++) ask_for<(T > 1)>(ahead + R * i + r * COUNT);
    add_products<0>(sums, x + i, w + i, k);
    if constexpr (PARTS<S> > 1) add_products<1>(sums, x + i, w + i, k);
  }
  float lanes[R][T][LANES];  // a copy, so that the sums may be in registers
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) store(lanes[r][t], sums[r][t]);
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) {
      float total = sum<LANES>(lanes[r][t]);
      for (int64_t j = i; j < k; j++) total = __builtin_fmaf(widened(w[r * k + j]), x[t * k + j], total);
      round_to(y + t * n + r, total);
    }
}

template <int R, class S>
static void tiles(const float* x, const S* w, S* y, int64_t m, int64_t n, int64_t k) {
  in_parts<TOKENS>(m, [&](int64_t t, auto count) { tile<R, decltype(count)::value>(x + t * k, w, y + t * n, n, k); });
}

// y[m, n] = x[m, k] w[n, k]^T, all as they lie one row after the other.
template <class S>
static void linear(const S* x, const S* w, S* y, int64_t m, int64_t n, int64_t k, int threads) {
  std::vector<float> room;
  const float* floats = in_parts_of(x, m, k, room);
  const int64_t whole = n / ROWS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < whole; i++) tiles<ROWS>(floats, w + i * ROWS * k, y + i * ROWS, m, n, k);
  for (int64_t j = whole * ROWS; j < n; j++) tiles<1>(floats, w + j * k, y + j, m, n, k);
}
