// x W^T for a few rows of x: every weight is read once, in the order in which it lies, and multiplied with all of them.
// A tile is `ROWS` rows of W and up to `TOKENS` of x, whose products are summed in registers; the tile after it is
// prefetched meanwhile, as rows may be too short for the hardware to see them coming.

constexpr int TOKENS = LANES == 16 ? 6 : 3;
constexpr int ROWS = 4;

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

template <int R, int T>
static void tile(const float* x, const float* w, float* y, int64_t n, int64_t k) {
  Vector sums[R][T] = {};
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) {
    Vector a[R];
    for (int r = 0; r < R; r++) {
      a[r] = load(w + r * k + i);
      __builtin_prefetch(w + (R + r) * k + i);
    }
    for (int t = 0; t < T; t++) {
      Vector b = load(x + t * k + i);
      for (int r = 0; r < R; r++) sums[r][t] += a[r] * b;
    }
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) {
      float lanes[LANES];
      std::memcpy(lanes, &sums[r][t], sizeof lanes);
      float total = sum<LANES>(lanes);
      for (int64_t j = i; j < k; j++) total += w[r * k + j] * x[t * k + j];
      y[t * n + r] = total;
    }
}

template <int R>
static void tiles(const float* x, const float* w, float* y, int64_t m, int64_t n, int64_t k) {
  for (; m > 0; m -= TOKENS, x += TOKENS * k, y += TOKENS * n)
    with_count<TOKENS>(m < TOKENS ? m : TOKENS, [&](auto count) { tile<R, decltype(count)::value>(x, w, y, n, k); });
}

// y[m, n] = x[m, k] w[n, k]^T, all as they lie one row after the other.
static void linear(const float* x, const float* w, float* y, int64_t m, int64_t n, int64_t k, int threads) {
  int64_t whole = n / ROWS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < whole; i++) tiles<ROWS>(x, w + i * ROWS * k, y + i * ROWS, m, n, k);
  for (int64_t j = whole * ROWS; j < n; j++) tiles<1>(x, w + j * k, y + j, m, n, k);
}
