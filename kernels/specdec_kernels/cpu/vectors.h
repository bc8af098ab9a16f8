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

// Calls run(count), with a count from 1 to MOST as a type.
template <int MOST, class Run>
static inline void with_count(int64_t count, Run run) {
  if (count == MOST) run(std::integral_constant<int, MOST>());
  else if constexpr (MOST > 1) with_count<MOST - 1>(count, run);
}
