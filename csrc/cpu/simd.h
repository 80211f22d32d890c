// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// Vectors of one instruction set, in the compiler's own vector extensions: the same source serves
// all. Included by kernels.inc.h inside the namespace of that instruction set.

using Floats = float __attribute__((vector_size(GKV_VECTOR_BYTES)));
using Ints = int32_t __attribute__((vector_size(GKV_VECTOR_BYTES)));
constexpr int kLanes = GKV_VECTOR_BYTES / 4;

#define GKV_INLINE inline __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class V, class T>
GKV_INLINE V load_as(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

GKV_INLINE Floats load(const float* p) { return load_as<Floats>(p); }
GKV_INLINE void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
GKV_INLINE Floats broadcast(float x) { return x - Floats{}; }
GKV_INLINE Ints broadcast(int32_t x) { return x - Ints{}; }
GKV_INLINE Floats as_floats(Ints v) { return (Floats)v; }
GKV_INLINE Ints as_ints(Floats v) { return (Ints)v; }
GKV_INLINE Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }
GKV_INLINE Ints select(Ints mask, Ints yes, Ints no) { return mask ? yes : no; }
GKV_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
GKV_INLINE Floats minimum(Floats a, Floats b) { return a < b ? a : b; }

GKV_INLINE Ints lane_numbers() {
  Ints v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// Sixteen bits to thirty-two. By name where there is an instruction: compilers split the vector.
GKV_INLINE Ints widen(const uint16_t* p) {
#if GKV_VECTOR_BYTES == 64
  return (Ints)_mm512_cvtepu16_epi32(load_as<__m256i>(p));
#elif GKV_VECTOR_BYTES == 32
  return (Ints)_mm256_cvtepu16_epi32(load_as<__m128i>(p));
#else
  using Halves = uint16_t __attribute__((vector_size(GKV_VECTOR_BYTES / 2)));
  return __builtin_convertvector(load_as<Halves>(p), Ints);
#endif
}

GKV_INLINE Floats load(const BFloat16* p) { return as_floats(widen(&p->bits) << 16); }

GKV_INLINE Floats load(const Float16* p) {
#if GKV_VECTOR_BYTES == 64
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, load_as<__m256i>(p));
#elif GKV_VECTOR_BYTES == 32
  return (Floats)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
  // Exponent and mantissa move into place; a product with 2^112 corrects the exponent's bias.
  const Ints bits = widen(&p->bits);
  const Floats value = as_floats((bits & 0x7fff) << 13) * 0x1p112f;
  const Ints special = (bits & 0x7c00) == 0x7c00;  // infinity and NaN
  return as_floats(as_ints(value) | (special & 0x7f800000) | ((bits & 0x8000) << 16));
#endif
}

GKV_INLINE float to_float(float x) { return x; }
GKV_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
GKV_INLINE float to_float(Float16 x) {
  Float16 lanes[kLanes] = {x};
  return load(lanes)[0];
}

GKV_INLINE float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

GKV_INLINE float largest(Floats v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// One bit for each lane in which a > b.
GKV_INLINE uint32_t bits_greater(Floats a, Floats b) {
#if GKV_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif GKV_VECTOR_BYTES == 32
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
#else
  const Ints mask = a > b;
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

// e^x for x <= 88, exactly 0 below -87. Error under 2 units in the last place: x is split into a
// power of two and a remainder, whose exponential is a polynomial (Cephes' expf).
GKV_INLINE Floats exponential(Floats x) {
  constexpr float kLog2E = 1.44269504088896341f, kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f, kRounder = 12582912.0f;  // 1.5 * 2^23
  const Ints tiny = x < -87.0f;
  x = maximum(x, broadcast(-87.0f));
  const Floats shifted = x * kLog2E + kRounder;
  const Floats power = shifted - kRounder;
  const Floats r = (x - power * kLn2High) - power * kLn2Low;
  Floats p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints exponent = as_ints(shifted) - 0x4b400000;  // the integer that kRounder left in place
  const Floats value = as_floats(as_ints(p) + (exponent << 23));
  return select(tiny, Floats{}, value);
}

// tanh(x): by e^2x where that is accurate, by its series near 0.
GKV_INLINE Floats hyperbolic_tangent(Floats x) {
  const Floats magnitude = minimum(maximum(x, -x), broadcast(10.0f));
  const Floats by_exp = 1.0f - 2.0f / (exponential(2.0f * magnitude) + 1.0f);
  const Floats square = magnitude * magnitude;
  const Floats series =
      magnitude * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315))));
  const Floats value = select(magnitude < 0.2f, series, by_exp);
  return select(x < 0.0f, -value, value);
}
