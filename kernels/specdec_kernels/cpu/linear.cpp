// x W^T for a few rows of x: every weight is read once, in the order in which it lies, and multiplied with all of them.
// A tile is `ROWS` rows of W and up to `MOST` of x, whose products are summed in registers. What comes after it is asked
// for meanwhile, one line after the other: memory gives what is asked for in order almost twice as fast as rows side by side.

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#include <immintrin.h>
#endif

constexpr int ROWS = 4;
constexpr int64_t AHEAD = 16384;  // bytes from what is multiplied to what is asked for, if tiles are smaller: as memory is far away

// For numbers of type S: rows of x in a tile, how many numbers are multiplied at once, and their products added to sums. Tiles of
// more rows of bfloat16 are slower: their products are done sooner than memory gives what comes next, which it then gives slower.
template <class S>
constexpr int MOST = LANES == 16 ? 6 : 3;
template <class S>
constexpr int COUNT = LANES;
template <class S>
static inline Vector get(const S* p) { return load(p); }
template <class S>
static inline Vector add_products(Vector sums, Vector a, Vector b) { return sums + a * b; }

#if defined(__AVX512F__) && defined(__AVX512BF16__)
template <>
constexpr int MOST<Brain> = 4;
template <>
constexpr int COUNT<Brain> = 2 * LANES;
template <>
inline Vector get(const Brain* p) { return load(reinterpret_cast<const float*>(p)); }  // as bits
template <>
inline Vector add_products<Brain>(Vector sums, Vector a, Vector b) {
  return (Vector)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}
#endif

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

template <int R, int T, class S>
static void tile(const S* x, const S* w, S* y, int64_t n, int64_t k) {
  const int64_t least = AHEAD / sizeof(S);
  const S* ahead = w + (R * k > least ? R * k : least);
  Vector sums[R][T] = {};
  int64_t i = 0;
  for (; i + COUNT<S> <= k; i += COUNT<S>) {
    Vector a[R];
    for (int r = 0; r < R; r++) {
      a[r] = get(w + r * k + i);
      ask_for<(T > 1)>(ahead + R * i + r * COUNT<S>);
    }
    for (int t = 0; t < T; t++) {
      Vector b = get(x + t * k + i);
      if constexpr (T <= 4) keep(b);  // tiles of more rows of float32 wait less for memory if it is read again
      for (int r = 0; r < R; r++) sums[r][t] = add_products<S>(sums[r][t], a[r], b);
    }
  }
  float lanes[R][T][LANES];  // a copy, so that the sums may be in registers
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) store(lanes[r][t], sums[r][t]);
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) {
      float total = sum<LANES>(lanes[r][t]);
      for (int64_t j = i; j < k; j++) total = __builtin_fmaf(widened(w[r * k + j]), widened(x[t * k + j]), total);
      round_to(y + t * n + r, total);
    }
}

template <int R, class S>
static void tiles(const S* x, const S* w, S* y, int64_t m, int64_t n, int64_t k) {
  in_parts<MOST<S>>(m, [&](int64_t t, auto count) { tile<R, decltype(count)::value>(x + t * k, w, y + t * n, n, k); });
}

// y[m, n] = x[m, k] w[n, k]^T, all as they lie one row after the other.
template <class S>
static void linear(const S* x, const S* w, S* y, int64_t m, int64_t n, int64_t k, int threads) {
  const int64_t whole = n / ROWS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < whole; i++) tiles<ROWS>(x, w + i * ROWS * k, y + i * ROWS, m, n, k);
  for (int64_t j = whole * ROWS; j < n; j++) tiles<1>(x, w + j * k, y + j, m, n, k);
}
