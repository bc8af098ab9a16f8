// Vectors of the width that the machine has; what stands here is put before every source of this folder.

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX512F__
constexpr int LANES = 16;  // 32 registers
#else
constexpr int LANES = 8;  // 16 registers
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));

static inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

// Keeps a vector in its register: GCC would read it from memory anew for each of its uses.
static inline void keep(Vector& v) {
#if defined(__x86_64__) && defined(__AVX512F__)
  __asm__("" : "+v"(v));
#endif
}

// A bfloat16: the first half of a float.
struct Brain {
  uint16_t bits;
};

static inline float widened(float x) { return x; }

static inline float widened(Brain x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

static inline Vector load(const Brain* p) {
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
  typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Vector v;
  std::memcpy(&v, &words, sizeof v);
  return v;
}

static inline void round_to(float* to, float x) { *to = x; }

static inline void round_to(Brain* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}

// Calls run(count), with a count from 1 to MOST as a type.
template <int MOST, class Run>
static inline void with_count(int64_t count, Run run) {
  if (count == MOST) run(std::integral_constant<int, MOST>());
  else if constexpr (MOST > 1) with_count<MOST - 1>(count, run);
}

// Calls run(first row, number of rows as a type) for m rows, in parts of about one size.
template <int MOST, class Run>
static inline void in_parts(int64_t m, Run run) {
  const int64_t parts = (m + MOST - 1) / MOST;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t t = m * part / parts;
    with_count<MOST>(m * (part + 1) / parts - t, [&](auto count) { run(t, count); });
  }
}

// Asks for memory that is read soon: into the nearest cache, which is soonest there but waits for few lines at a time, or into the
// second one, which keeps memory busy while much is computed in between.
template <bool SECOND>
static inline void ask_for(const void* p) {
  if constexpr (SECOND) __builtin_prefetch(p, 0, 2);
  else __builtin_prefetch(p, 0, 3);
}
