// Vectors of the width that the machine has; what stands here is put before every source of this folder.

#include <cstdint>
#include <cstring>

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

// The first half of a float's bits.
struct Bfloat16 {
  uint16_t bits;
};

static inline float widened(float x) { return x; }

static inline float widened(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

static inline Vector load(const Bfloat16* p) {
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
  typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Vector v;
  std::memcpy(&v, &words, sizeof v);
  return v;
}

static inline void narrow(float x, float& y) { y = x; }

// To the nearest, of two that are as near to the one whose last bit is 0. What is no number stays none.
static inline void narrow(float x, Bfloat16& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  y.bits = static_cast<uint16_t>(x != x ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
