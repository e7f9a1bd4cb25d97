// Pairs of bfloat16 and their dot products, as AVX512-BF16 has them, compiled with the instruction set of the including
// file. A pair is a dword whose low half is the first number:
//
//   sum[lane] = sum[lane] + x[lane].high * w.high + x[lane].low * w.low
//
// VDPBF16PS computes it as two fused multiply-adds, the high halves first, each rounded to the nearest float (ties to
// even). Subnormal numbers, of x, w and the sum before and after each step, count as zeros of their sign; the
// conversion back, VCVTNEPS2BF16, does the same. NaN and infinities are those of IEEE arithmetic. No mode of the
// processor changes any of this.
//
// With PYINVOLUTION_EMULATED_BF16 a model of the instructions in scalar arithmetic takes their place, so that the tests
// run the same loops on any processor.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd/float16.h"

#if !defined(PYINVOLUTION_EMULATED_BF16)
#include <immintrin.h>
#endif

namespace pyinvolution::cpu {
namespace {

// A pair in memory, aligned like its halves.
struct __attribute__((may_alias)) Pair {
  BFloat16 low, high;
};

inline float flushed(float value) {
  return (bits_of(value) & 0x7f800000u) == 0 ? float_of(bits_of(value) & 0x80000000u) : value;
}
// One lane of the instructions.
inline float dot_model(float sum, uint32_t x, uint32_t w) {
  const auto half = [](uint32_t bits) { return flushed(float_of(bits)); };
  sum = flushed(__builtin_fmaf(half(x & 0xffff0000u), half(w & 0xffff0000u), flushed(sum)));
  return flushed(__builtin_fmaf(half(x << 16), half(w << 16), sum));
}
// All of them; not inline, or compilers would take minutes for the unrolled loops.
template <class Values, class Bits>
[[gnu::noinline]] void dot_model(Values& sums, const Bits& x, const Bits& w) {
  for (size_t lane = 0; lane < sizeof sums / sizeof(float); ++lane)
    sums[lane] = dot_model(sums[lane], x[lane], w[lane]);
}
template <class Values>
[[gnu::noinline]] void round_model(const Values& sums, BFloat16* to) {
  for (size_t lane = 0; lane < sizeof sums / sizeof(float); ++lane) store(flushed(sums[lane]), &to[lane]);
}

template <class Bits>
[[gnu::noinline]] void fours_model(const Pair* from, Bits& to) {
  for (size_t lane = 0; lane < sizeof to / sizeof(Pair); ++lane) {
    uint32_t pair;
    std::memcpy(&pair, from + lane % 4, sizeof pair);
    to[lane] = pair;
  }
}
template <class Bits>
[[gnu::noinline]] void spread_model(const Bits& from, int lane, Bits& to) {
  for (size_t i = 0; i < sizeof to / sizeof(Pair); ++i) to[i] = from[i / 4 * 4 + size_t(lane)];
}

template <class Bits>
[[gnu::noinline]] void shift_model(const Bits& low, const Bits& high, int shift, Bits& to) {
  const int lanes = int(sizeof to / sizeof(Pair));
  for (int i = 0; i < lanes; ++i) to[i] = i + shift < lanes ? low[i + shift] : high[i + shift - lanes];
}

// The types of 16 and of 8 lanes, and halves with zeros before them. (GCC 12 cuts a conversion in pieces.)
template <int Lanes>
struct PairTypes;
template <>
struct PairTypes<16> {
  typedef uint32_t Bits __attribute__((vector_size(64)));
  typedef uint16_t Halves __attribute__((vector_size(32)));
  typedef float Values __attribute__((vector_size(64)));
  [[gnu::always_inline]] static Bits widen(Halves halves) {
#if defined(PYINVOLUTION_EMULATED_BF16)
    return __builtin_convertvector(halves, Bits);
#else
    return (Bits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)halves);
#endif
  }
};
template <>
struct PairTypes<8> {
  typedef uint32_t Bits __attribute__((vector_size(32)));
  typedef uint16_t Halves __attribute__((vector_size(16)));
  typedef float Values __attribute__((vector_size(32)));
  [[gnu::always_inline]] static Bits widen(Halves halves) {
#if defined(PYINVOLUTION_EMULATED_BF16)
    return __builtin_convertvector(halves, Bits);
#else
    return (Bits)_mm256_cvtepu16_epi32((__m128i)halves);
#endif
  }
};

// A register of pairs, 16 or, where less is left, 8.
template <int Lanes>
struct Pairs {
  using Types = PairTypes<Lanes>;
  using Bits = typename Types::Bits;
  Bits bits;

  [[gnu::always_inline]] static Pairs load(const Pair* from) {
    Pairs pairs;
    std::memcpy(&pairs.bits, from, sizeof pairs.bits);
    return pairs;
  }
  // The first `count`, with zeros after them, whose memory is not touched.
  [[gnu::always_inline]] static Pairs load_first(const Pair* from, int64_t count) {
#if defined(PYINVOLUTION_EMULATED_BF16)
    Pairs pairs{};
    std::memcpy(&pairs.bits, from, size_t(count < Lanes ? count : Lanes) * sizeof(Pair));
    return pairs;
#else
    const uint32_t mask = count < Lanes ? (1u << count) - 1 : 0xffffu;
    if constexpr (Lanes == 16)
      return {(Bits)_mm512_maskz_loadu_epi32(__mmask16(mask), from)};
    else
      return {(Bits)_mm256_maskz_loadu_epi32(__mmask8(mask), from)};
#endif
  }
  // The low halves, with zeros in place of the high ones.
  [[gnu::always_inline]] static Pairs load_low(const Pair* from) {
#if defined(PYINVOLUTION_EMULATED_BF16)
    return {load(from).bits & 0xffffu};
#else
    if constexpr (Lanes == 16)
      return {(Bits)_mm512_maskz_loadu_epi16(0x55555555u, from)};
    else
      return {(Bits)_mm256_maskz_loadu_epi16(0x5555u, from)};
#endif
  }
  // Neighbours from two runs, as (low[i], high[i]).
  [[gnu::always_inline]] static Pairs interleave(const BFloat16* low, const BFloat16* high) {
    typename Types::Halves one, other;
    std::memcpy(&one, low, sizeof one);
    std::memcpy(&other, high, sizeof other);
    return {Types::widen(one) | Types::widen(other) << 16};
  }
  // The first `count` of them, with zeros after them, whose memory is not touched.
  [[gnu::always_inline]] static Pairs interleave_first(const BFloat16* low, const BFloat16* high, int64_t count) {
    static_assert(Lanes == 16);
#if defined(PYINVOLUTION_EMULATED_BF16)
    BFloat16 halves[2][Lanes] = {};
    const size_t bytes = size_t(count < Lanes ? count : Lanes) * sizeof(BFloat16);
    std::memcpy(halves[0], low, bytes), std::memcpy(halves[1], high, bytes);
    return interleave(halves[0], halves[1]);
#else
    const __mmask16 mask = __mmask16(count < Lanes ? (1u << count) - 1 : 0xffffu);
    const auto load = [&](const BFloat16* from) {
      return (typename Types::Halves)_mm256_maskz_loadu_epi16(mask, from);
    };
    return {Types::widen(load(low)) | Types::widen(load(high)) << 16};
#endif
  }
  // Four neighbours, as often as there is room for them, and pair `lane` of each four in its four lanes.
  [[gnu::always_inline]] static Pairs load_fours(const Pair* from) {
#if defined(PYINVOLUTION_EMULATED_BF16)
    Pairs pairs;
    fours_model(from, pairs.bits);
    return pairs;
#else
    const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (Lanes == 16)
      return {(Bits)_mm512_maskz_broadcast_i32x4(0xffff, four)};
    else
      return {(Bits)_mm256_maskz_broadcast_i32x4(0xff, four)};
#endif
  }
  [[gnu::always_inline]] Pairs spread(int lane) const {
#if defined(PYINVOLUTION_EMULATED_BF16)
    Pairs pairs;
    spread_model(bits, lane, pairs.bits);
    return pairs;
#else
    // Numbers in the instructions.
    switch (lane) {
      case 0: return shuffled<0x00>();
      case 1: return shuffled<0x55>();
      case 2: return shuffled<0xaa>();
      default: return shuffled<0xff>();
    }
  }
  template <int Order>
  [[gnu::always_inline]] Pairs shuffled() const {
    if constexpr (Lanes == 16)
      return {(Bits)_mm512_maskz_shuffle_epi32(0xffff, (__m512i)bits, _MM_PERM_ENUM(Order))};
    else
      return {(Bits)_mm256_maskz_shuffle_epi32(0xff, (__m256i)bits, _MM_PERM_ENUM(Order))};
#endif
  }
  // The low halves of these and the high ones of others.
  [[gnu::always_inline]] Pairs with_high_of(const Pairs& other) const {
    return {(bits & 0xffffu) | (other.bits & 0xffff0000u)};
  }
  // Pairs shift, shift + 1, ... of `low` and then of `high`, for a shift of 1 to 7: see Vector::shifted.
  [[gnu::always_inline]] static Pairs shifted(const Pairs& low, const Pairs& high, int shift) {
    static_assert(Lanes == 16);
#if defined(PYINVOLUTION_EMULATED_BF16)
    Pairs pairs;
    shift_model(low.bits, high.bits, shift, pairs.bits);
    return pairs;
#else
    const __m512i a = (__m512i)high.bits, b = (__m512i)low.bits;
    switch (shift) {
#define PYINVOLUTION_CASE(n) \
  case n: return {(Bits)_mm512_maskz_alignr_epi32(0xffff, a, b, n)};
      PYINVOLUTION_CASE(1)
      PYINVOLUTION_CASE(2)
      PYINVOLUTION_CASE(3)
      PYINVOLUTION_CASE(4)
      PYINVOLUTION_CASE(5)
      PYINVOLUTION_CASE(6)
#undef PYINVOLUTION_CASE
      default: return {(Bits)_mm512_maskz_alignr_epi32(0xffff, a, b, 7)};
    }
#endif
  }
  [[gnu::always_inline]] void store(Pair* to) const { std::memcpy(to, &bits, sizeof bits); }
};

// The sums of a register of pairs.
template <int Lanes>
struct PairSums {
  using Types = PairTypes<Lanes>;
  using Values = typename Types::Values;
  Values value;

  [[gnu::always_inline]] static PairSums splat(float start) {
#if defined(PYINVOLUTION_EMULATED_BF16)
    return {Values{} + start};
#else
    // Not a sum with zero, which would be an addition for the sake of -0.
    if constexpr (Lanes == 16)
      return {(Values)_mm512_set1_ps(start)};
    else
      return {(Values)_mm256_set1_ps(start)};
#endif
  }
  [[gnu::always_inline]] static PairSums load(const float* from) {
    PairSums sums;
    std::memcpy(&sums.value, from, sizeof sums.value);
    return sums;
  }
  [[gnu::always_inline]] void store(float* to) const { std::memcpy(to, &value, sizeof value); }
  // The first `count`, with zeros after them, whose memory is not touched.
  [[gnu::always_inline]] static PairSums load_first(const float* from, int64_t count) {
    return {(Values)Pairs<Lanes>::load_first(reinterpret_cast<const Pair*>(from), count).bits};
  }
  // Stores a whole register: the lanes of `mask` next to each other, and after them anything.
  [[gnu::always_inline]] void store_lanes(uint32_t mask, float* to) const {
    static_assert(Lanes == 16);
#if defined(PYINVOLUTION_EMULATED_BF16)
    float lanes[Lanes] = {};
    for (int lane = 0, at = 0; lane < Lanes; ++lane)
      if (mask >> lane & 1) lanes[at++] = value[lane];
    std::memcpy(to, lanes, sizeof lanes);
#else
    const __m512 lanes = _mm512_maskz_compress_ps(__mmask16(mask), (__m512)value);
    std::memcpy(to, &lanes, sizeof lanes);
#endif
  }
  // Of neighbours in bfloat16.
  [[gnu::always_inline]] static PairSums widen(const BFloat16* from) {
    typename Types::Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return {(Values)(Types::widen(halves) << 16)};
  }

  // Adds the products with one pair. It is an operand in memory that the instruction repeats: compilers load it with an
  // instruction of its own, which costs as much as a load of a whole register.
  [[gnu::always_inline]] void add_dot(const Pairs<Lanes>& x, const Pair& w) {
#if defined(PYINVOLUTION_EMULATED_BF16)
    uint32_t pair;
    std::memcpy(&pair, &w, sizeof pair);
    dot_model(value, x.bits, typename Types::Bits{} + pair);
#else
    Values sums = value;  // a copy, since GCC does not take an array apart whose elements are operands
    if constexpr (Lanes == 16)
      asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(x.bits), "m"(w));
    else
      asm("vdpbf16ps %2%{1to8%}, %1, %0" : "+v"(sums) : "v"(x.bits), "m"(w));
    value = sums;
#endif
  }

  // Adds the products with a pair for each lane.
  [[gnu::always_inline]] void add_dot(const Pairs<Lanes>& x, const Pairs<Lanes>& w) {
#if defined(PYINVOLUTION_EMULATED_BF16)
    dot_model(value, x.bits, w.bits);
#else
    Values sums = value;
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(x.bits), "v"(w.bits));
    value = sums;
#endif
  }

  // A NaN stays a NaN.
  [[gnu::always_inline]] void relu() { value = value < 0 ? Values{} : value; }

  // Rounded to bfloat16.
  [[gnu::always_inline]] void round_to(BFloat16* to) const {
#if defined(PYINVOLUTION_EMULATED_BF16)
    round_model(value, to);
#else
    if constexpr (Lanes == 16) {
      const auto rounded = _mm512_cvtneps_pbh((__m512)value);
      std::memcpy(to, &rounded, sizeof rounded);
    } else {
      const auto rounded = _mm256_cvtneps_pbh((__m256)value);
      std::memcpy(to, &rounded, sizeof rounded);
    }
#endif
  }
  // Rounded to bfloat16 as low halves, with zeros as high ones.
  [[gnu::always_inline]] Pairs<Lanes> round_low() const {
    BFloat16 rounded[Lanes];
    round_to(rounded);
    typename Types::Halves low;
    std::memcpy(&low, rounded, sizeof low);
    return {Types::widen(low)};
  }
  // And with `high` rounded as high halves.
  [[gnu::always_inline]] Pairs<Lanes> round_with(const PairSums& high) const {
#if defined(PYINVOLUTION_EMULATED_BF16)
    return {round_low().bits | high.round_low().bits << 16};
#else
    using Bits = typename Types::Bits;
    if constexpr (Lanes == 16) {
      const auto order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                          21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      const auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high.value, (__m512)value);
      return {(Bits)_mm512_maskz_permutexvar_epi16(__mmask32(-1), order, halves)};
    } else {
      const auto order = _mm256_set_epi16(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
      const auto halves = (__m256i)_mm256_cvtne2ps_pbh((__m256)high.value, (__m256)value);
      return {(Bits)_mm256_maskz_permutexvar_epi16(__mmask16(-1), order, halves)};
    }
#endif
  }
};

}  // namespace
}  // namespace pyinvolution::cpu
