// x W^T for a few rows of x, with W stored in fewer bits than float32; `reference/stored_linear.py` says how it lies.
// 64 bytes of W hold 4 bytes of each of 16 outputs: two numbers in bfloat16, or four integers. They are multiplied with the same
// numbers of x, so that each output has a lane of its own and no lanes are summed. Whatever the number of rows, the products
// of a row are summed in one order.

#include <type_traits>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace stored {
namespace {  // a library for another CPU has the same names

constexpr int OUTPUTS = 16;
constexpr int GROUP = 32;  // inputs that share a scale in 4 bits
constexpr int TILES = LANES == 16 ? 2 : 1;
constexpr int TOKENS = LANES == 16 ? 12 : 3;
constexpr int GROUPED_TOKENS = LANES == 16 ? 8 : 2;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

template <class V>
inline V get(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The vectors are machine words of one size, which casts reinterpret.
inline Ints add_products_of_bytes(Ints sum, Bits w, const uint8_t* x) {
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(get<int32_t>(x)));
#else
  for (int b = 0; b < 4; b++) sum += (Ints)((w >> (8 * b)) & 255) * (int32_t)(int8_t)x[b];
  return sum;
#endif
}

// 16 finite numbers in float16.
inline Floats widen(const uint16_t* p) {
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
  return (Floats)_mm512_cvtph_ps(get<__m256i>(p));
#else
  const Bits h = __builtin_convertvector(get<Halves>(p), Bits);
  const Floats size = (Floats)((h & 0x7fff) << 13) * 0x1p112f;
  return (Floats)((Bits)size | (h & 0x8000) << 16);
#endif
}

// Finds the largest size of n numbers; as bits, so that what is no number is larger than all numbers.
inline uint32_t largest(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t size = get<uint32_t>(x + i) & 0x7fffffffu;
    most = size > most ? size : most;
  }
  return most;
}

// Rounds n numbers to integers of up to 127 times the scale that it returns, and adds those to `sum`.
inline float round_bytes(const float* x, uint8_t* q, int64_t n, int32_t& sum) {
  const uint32_t found = largest(x, n);
  const float most = get<float>(&found), inverse = found == 0 ? 0 : 127 / most;
  sum = 0;
  if (found >= 0x7f800000u) {
    std::memset(q, 0, n);
    return __builtin_nanf("");
  }
  for (int64_t i = 0; i < n; i++) {
    const int32_t whole = (int32_t)__builtin_rintf(x[i] * inverse);
    q[i] = (uint8_t)whole;
    sum += whole;
  }
  return most / 127;
}

// A format says how products are summed, and what they give. It holds rows of x as they are multiplied: INPUTS numbers a step.
struct Bf16 {
  static constexpr int INPUTS = 2;
  typedef Floats Sum;
  static Sum add(Sum sum, Bits w, const float* x) {
    sum += (Floats)(w << 16) * x[0];
    sum += (Floats)(w & 0xffff0000u) * x[1];
    return sum;
  }
  Floats finish(Sum sum, int64_t, int64_t) const { return sum; }

  std::vector<float> x;

  Bf16(const float* rows, int64_t m, int64_t k, int64_t steps) : x(m * steps * INPUTS) {
    for (int64_t t = 0; t < m; t++) std::memcpy(x.data() + t * steps * INPUTS, rows + t * k, 4 * k);
  }
};

struct Int8 {
  static constexpr int INPUTS = 4;
  typedef Ints Sum;
  static Sum add(Sum sum, Bits w, const uint8_t* x) { return add_products_of_bytes(sum, w, x); }
  // W is stored with 128 added.
  Floats finish(Sum sum, int64_t t, int64_t tile) const {
    const Ints products = sum - 128 * sums[t];
    return __builtin_convertvector(products, Floats) * get<Floats>(of_outputs + tile * OUTPUTS) * of_rows[t];
  }

  const float* of_outputs;
  std::vector<uint8_t> x;
  std::vector<float> of_rows;
  std::vector<int32_t> sums;

  Int8(const float* rows, const float* scale, int64_t m, int64_t k, int64_t steps)
      : of_outputs(scale), x(m * steps * INPUTS), of_rows(m), sums(m) {
    for (int64_t t = 0; t < m; t++) of_rows[t] = round_bytes(rows + t * k, x.data() + t * steps * INPUTS, k, sums[t]);
  }
};

void put(float* y, Floats v, int64_t count) {
  std::memcpy(y, &v, 4 * (count < OUTPUTS ? count : OUTPUTS));
}

template <int MOST, class Run>
void with_count(int64_t count, Run run) {
  if (count == MOST) run(std::integral_constant<int, MOST>());
  else if constexpr (MOST > 1) with_count<MOST - 1>(count, run);
}

// Calls run(first row, number of rows as a type) for m rows, in parts of about one size.
template <int MOST, class Run>
void in_parts(int64_t m, Run run) {
  const int64_t parts = (m + MOST - 1) / MOST;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t t = m * part / parts;
    with_count<MOST>(m * (part + 1) / parts - t, [&](auto count) { run(t, count); });
  }
}

// R tiles of 16 outputs, of which tile0 is the first, times T rows, of which t0 is the first. w: [tile][steps][64]; y: [m][n].
template <class Format, int R, int T>
void tile(const Format& format, const uint8_t* w, float* y, int64_t t0, int64_t tile0, int64_t n, int64_t steps) {
  typename Format::Sum sums[R][T] = {};
  const auto* x = format.x.data() + t0 * steps * Format::INPUTS;
  w += 64 * tile0 * steps;
  for (int64_t i = 0; i < steps; i++) {
    Bits a[R];
    for (int r = 0; r < R; r++) {
      a[r] = get<Bits>(w + 64 * (r * steps + i));
      __builtin_prefetch(w + 64 * ((R + r) * steps + i));
    }
    for (int t = 0; t < T; t++)
      for (int r = 0; r < R; r++) sums[r][t] = Format::add(sums[r][t], a[r], x + (t * steps + i) * Format::INPUTS);
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) {
      const int64_t first = (tile0 + r) * OUTPUTS;
      put(y + (t0 + t) * n + first, format.finish(sums[r][t], t0 + t, tile0 + r), n - first);
    }
}

template <class Format, int R>
void tiles(const Format& format, const uint8_t* w, float* y, int64_t m, int64_t i, int64_t n, int64_t steps) {
  in_parts<TOKENS>(m, [&](int64_t t, auto count) { tile<Format, R, decltype(count)::value>(format, w, y, t, i, n, steps); });
}

template <class Format>
void linear(const Format& format, const uint8_t* w, float* y, int64_t m, int64_t n, int64_t steps, int threads) {
  const int64_t all = (n + OUTPUTS - 1) / OUTPUTS, whole = all / TILES;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < whole; i++) tiles<Format, TILES>(format, w, y, m, i * TILES, n, steps);
  for (int64_t i = whole * TILES; i < all; i++) tiles<Format, 1>(format, w, y, m, i, n, steps);
}

// Rows of x in groups: integers, their scale, and their sum times it.
struct Groups {
  std::vector<uint8_t> q;
  std::vector<float> scale, sum;

  Groups(const float* x, int64_t m, int64_t k, int64_t groups)
      : q(m * groups * GROUP), scale(m * groups), sum(m * groups) {
    for (int64_t t = 0; t < m; t++)
      for (int64_t g = 0; g < groups; g++) {
        const int64_t at = t * groups + g, left = k - g * GROUP;
        int32_t total;
        scale[at] = round_bytes(x + t * k + g * GROUP, q.data() + at * GROUP, left < GROUP ? left : GROUP, total);
        sum[at] = scale[at] * total;
      }
  }
};

// 16 outputs times T rows, in groups of 4 bits. w: [groups][4][64], scales: [groups][2][16] in float16.
template <int T>
void grouped_tile(const Groups& x, const uint8_t* w, const uint16_t* scales, float* y, int64_t t0, int64_t n,
                         int64_t first, int64_t groups) {
  constexpr int VECTORS = GROUP / 8;
  Floats sums[T] = {};
  for (int64_t g = 0; g < groups; g++, w += 64 * VECTORS, scales += 2 * OUTPUTS) {
    Bits low[VECTORS], high[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
      const Bits both = get<Bits>(w + 64 * v);
      low[v] = both & 0x0f0f0f0f;
      high[v] = (both >> 4) & 0x0f0f0f0f;
      __builtin_prefetch(w + 64 * (v + VECTORS * 16));
    }
    __builtin_prefetch(scales + 2 * OUTPUTS * 16);
    const Floats step = widen(scales), least = widen(scales + OUTPUTS);
    for (int t = 0; t < T; t++) {
      const int64_t at = (t0 + t) * groups + g;
      const uint8_t* q = x.q.data() + at * GROUP;
      Ints a = {}, b = {};
      for (int v = 0; v < VECTORS; v++) {
        a = add_products_of_bytes(a, low[v], q + 4 * v);
        b = add_products_of_bytes(b, high[v], q + 4 * (v + VECTORS));
      }
      sums[t] += __builtin_convertvector(a + b, Floats) * (step * x.scale[at]);
      sums[t] += least * x.sum[at];
    }
  }
  for (int t = 0; t < T; t++) put(y + (t0 + t) * n + first, sums[t], n - first);
}

void grouped_linear(const Groups& x, const uint8_t* w, const uint16_t* scales, float* y, int64_t m, int64_t n,
                           int64_t groups, int threads) {
  const int64_t all = (n + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < all; i++)
    in_parts<GROUPED_TOKENS>(m, [&](int64_t t, auto count) {
      grouped_tile<decltype(count)::value>(x, w + i * groups * 8 * GROUP, scales + i * groups * 2 * OUTPUTS, y, t, n,
                                           i * OUTPUTS, groups);
    });
}

}  // namespace
}  // namespace stored
