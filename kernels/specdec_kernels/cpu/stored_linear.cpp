// x W^T for a few rows of x, with W stored in fewer bits than float32; `reference/stored_linear.py` says how it lies.
// 64 bytes of W hold 4 bytes of each of 16 outputs: two numbers in bfloat16, or four integers. They are multiplied with the same
// numbers of x, so that each output has a lane of its own and no lanes are summed. Whatever the number of rows, the products
// of a row are summed in one order.

#include <vector>

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace stored {
namespace {  // a library for another CPU has the same names

constexpr int OUTPUTS = 16;
constexpr int GROUP = 32;  // inputs whose rounding has one scale
constexpr int STEPS = GROUP / 4;
constexpr float LEAST = 0x1p-100f;  // a group of smaller numbers counts as 0: their scale has no inverse
constexpr int AHEAD = 16;  // groups from what is read to what is prefetched
constexpr int TILES = LANES == 16 ? 2 : 1;
constexpr int TOKENS = LANES == 16 ? 12 : 3;
constexpr int INTEGER_TOKENS = LANES == 16 ? 8 : 2;

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
inline Ints add_products(Ints sum, Bits w, const uint8_t* x) {
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

// Rounds n numbers to integers of up to 127 times the scale that it returns, and adds those to `total`.
inline float round_bytes(const float* x, uint8_t* q, int64_t n, int32_t& total) {
  const uint32_t found = largest(x, n);
  const float most = get<float>(&found), inverse = 127 / most;
  total = 0;
  if (most < LEAST || found >= 0x7f800000u) {
    std::memset(q, 0, n);
    return most < LEAST ? 0 : __builtin_nanf("");
  }
  for (int64_t i = 0; i < n; i++) {
    const int32_t whole = (int32_t)__builtin_rintf(x[i] * inverse);
    q[i] = (uint8_t)whole;
    total += whole;
  }
  return most / 127;
}

void put(float* y, Floats v, int64_t count) {
  std::memcpy(y, &v, 4 * (count < OUTPUTS ? count : OUTPUTS));
}

// R tiles of 16 outputs, of which the first begins at output n0, times T rows. x: [T][2 * steps]; w: [R][steps][64]; y: rows of n.
template <int R, int T>
void bf16_tile(const float* x, const uint8_t* w, float* y, int64_t n0, int64_t n, int64_t steps) {
  Floats sums[R][T] = {};
  for (int64_t i = 0; i < steps; i++) {
    Floats first[R], second[R];
    for (int r = 0; r < R; r++) {
      const Bits both = get<Bits>(w + 64 * (r * steps + i));
      first[r] = (Floats)(both << 16);
      second[r] = (Floats)(both & 0xffff0000u);
      ask_for<true>(w + 64 * (R * (steps + i) + r));
    }
    for (int t = 0; t < T; t++)
      for (int r = 0; r < R; r++) {
        sums[r][t] += first[r] * x[2 * (t * steps + i)];
        sums[r][t] += second[r] * x[2 * (t * steps + i) + 1];
      }
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) put(y + t * n + n0 + r * OUTPUTS, sums[r][t], n - n0 - r * OUTPUTS);
}

template <int R>
void bf16_tiles(const float* x, const uint8_t* w, float* y, int64_t m, int64_t i, int64_t n, int64_t steps) {
  in_parts<TOKENS>(m, [&](int64_t t, auto count) {
    bf16_tile<R, decltype(count)::value>(x + t * 2 * steps, w + i * 64 * steps, y + t * n, i * OUTPUTS, n, steps);
  });
}

// x: [m][k]; w: [tile][steps][64]; y: [m][n].
void linear_bf16(const float* x, const uint8_t* w, float* y, int64_t m, int64_t n, int64_t k, int64_t steps, int threads) {
  std::vector<float> whole(m * 2 * steps);
  for (int64_t t = 0; t < m; t++) std::memcpy(whole.data() + t * 2 * steps, x + t * k, 4 * k);
  const int64_t all = (n + OUTPUTS - 1) / OUTPUTS, blocks = all / TILES;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; i++) bf16_tiles<TILES>(whole.data(), w, y, m, i * TILES, n, steps);
  for (int64_t i = blocks * TILES; i < all; i++) bf16_tiles<1>(whole.data(), w, y, m, i, n, steps);
}

// Rows of x in groups: integers, their scale and their sum.
struct Rows {
  std::vector<uint8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> total;

  Rows(const float* x, int64_t m, int64_t k, int64_t groups) : q(m * groups * GROUP), scale(m * groups), total(m * groups) {
    for (int64_t t = 0; t < m; t++)
      for (int64_t g = 0; g < groups; g++) {
        const int64_t at = t * groups + g, left = k - g * GROUP;
        scale[at] = round_bytes(x + t * k + g * GROUP, q.data() + at * GROUP, left < GROUP ? left : GROUP, total[at]);
      }
  }
};

// How 16 outputs are stored: what a group of them is multiplied as, and what its products give. Groups are told by their place.
struct Int8 {
  static constexpr int BYTES = OUTPUTS * GROUP;
  const uint8_t* w;
  const float* of_outputs;

  void load(int64_t at, Bits (&q)[STEPS]) const {
    for (int v = 0; v < STEPS; v++) q[v] = get<Bits>(w + at * BYTES + 64 * v);
  }
  int grid(int64_t) const { return 0; }
  // Integers are stored with 128 added.
  static void add(Floats& sum, Ints products, float scale, int32_t total, int) {
    sum += __builtin_convertvector(products - 128 * total, Floats) * scale;
  }
  Floats finish(Floats sum, int64_t tile) const { return sum * get<Floats>(of_outputs + tile * OUTPUTS); }
};

struct Int4 {
  static constexpr int BYTES = OUTPUTS * GROUP / 2;
  const uint8_t* w;
  const uint16_t* scales;
  struct Grid {
    Floats step, least;
  };

  void load(int64_t at, Bits (&q)[STEPS]) const {
    for (int v = 0; v < STEPS / 2; v++) {
      const Bits both = get<Bits>(w + at * BYTES + 64 * v);
      q[v] = both & 0x0f0f0f0f;
      q[STEPS / 2 + v] = (both >> 4) & 0x0f0f0f0f;
    }
  }
  Grid grid(int64_t at) const {
    const uint16_t* p = scales + at * 2 * OUTPUTS;
    __builtin_prefetch(p + 2 * OUTPUTS * AHEAD);
    return {widen(p), widen(p + OUTPUTS)};
  }
  static void add(Floats& sum, Ints products, float scale, int32_t total, const Grid& grid) {
    sum += __builtin_convertvector(products, Floats) * (grid.step * scale);
    sum += grid.least * (scale * total);
  }
  Floats finish(Floats sum, int64_t) const { return sum; }
};

// The 16 outputs of a tile times T rows, of which t0 is the first.
template <int T, class Format>
void integer_tile(const Rows& x, const Format& format, float* y, int64_t t0, int64_t tile, int64_t n, int64_t groups) {
  Floats sums[T] = {};
  for (int64_t g = 0; g < groups; g++) {
    Bits q[STEPS];
    const int64_t place = tile * groups + g;
    format.load(place, q);
    const auto grid = format.grid(place);
    for (int i = 0; i < Format::BYTES; i += 64) ask_for<(T > 2)>(format.w + (place + AHEAD) * Format::BYTES + i);
    for (int t = 0; t < T; t++) {
      const int64_t at = (t0 + t) * groups + g;
      Ints even = {}, odd = {};
      for (int v = 0; v < STEPS; v += 2) {
        even = add_products(even, q[v], x.q.data() + at * GROUP + 4 * v);
        odd = add_products(odd, q[v + 1], x.q.data() + at * GROUP + 4 * v + 4);
      }
      Format::add(sums[t], even + odd, x.scale[at], x.total[at], grid);
    }
  }
  for (int t = 0; t < T; t++) put(y + (t0 + t) * n + tile * OUTPUTS, format.finish(sums[t], tile), n - tile * OUTPUTS);
}

template <class Format>
void linear(const Rows& x, const Format& format, float* y, int64_t m, int64_t n, int64_t groups, int threads) {
  const int64_t all = (n + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < all; i++)
    in_parts<INTEGER_TOKENS>(m, [&](int64_t t, auto count) {
      integer_tile<decltype(count)::value>(x, format, y, t, i, n, groups);
    });
}

}  // namespace
}  // namespace stored
