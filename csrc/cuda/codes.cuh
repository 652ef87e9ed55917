// csrc/cuda/codes.cuh: weights as they are stored, eight inputs of one output at a time, become operands of a matrix product.
//
// Eight numbers fill four words, two numbers of 16 bits a word, in the order that takes the fewest instructions: place i holds input
// order(i), and x is laid out alike. Every code becomes its value exactly, in bf16 and in f16: its bits are put into the fraction of
// a power of two (2^7 or 2^10), which is taken off again, or into the place of exponent and fraction (e4m3).
#pragma once
#include "cuda/values.cuh"

namespace ramify::gpu {
namespace {

// Numbers of both types, two a word.
template <class T>
struct Numbers;
template <>
struct Numbers<bf16> {
  static constexpr uint32_t kOne = 0x3F803F80, kMinusOne = 0xBF80BF80;
  static constexpr uint32_t kBase = 0x43004300;                                 // 128, whose last bit is worth 1
  static constexpr uint32_t kMinusBase = 0xC300C300, kMinusBase8 = 0xC308C308;  // -128, -136
  static constexpr uint32_t kTinyPlace = 0x07F007F0, kTinyFactor = 0x7B807B80;  // of e4m3 behind the sign; 2^120
  static constexpr int kTinyShift = 4;
};
template <>
struct Numbers<f16> {
  static constexpr uint32_t kOne = 0x3C003C00;
  static constexpr uint32_t kBase = 0x64006400;  // 1024
  static constexpr uint32_t kMinusBase = 0xE400E400, kMinusBase8 = 0xE408E408, kMinusBase128 = 0xE480E480;
  static constexpr uint32_t kTinyPlace = 0x3F803F80, kTinyFactor = 0x5C005C00;  // 2^8
  static constexpr int kTinyShift = 1;
};

// A kind of weight: bits of a code; whether groups of inputs have scales, or each row one; whether a code may be NaN; and decode(words,
// minus, pairs, nan): `minus` is what the base is taken off with, a NaN among the codes sets the high bit of a byte of `nan`.
template <class T>
struct Dense {
  using Type = T;
  static constexpr int kBits = 16;
  static constexpr bool kGroups = false, kRowScale = false, kNan = false;
  RT_FN static constexpr int order(int i) { return i; }
  RT_FN static void decode(const uint32_t (&w)[4], uint32_t, uint32_t (&pair)[4], uint32_t&) {
#pragma unroll
    for (int p = 0; p < 4; ++p) pair[p] = w[p];
  }
};

template <class T>
struct Int4 {
  using Type = T;
  static constexpr int kBits = 4;
  static constexpr bool kGroups = true, kRowScale = false, kNan = false;
  RT_FN static constexpr int order(int i) { return i / 2 + i % 2 * 4; }
  RT_FN static void decode(const uint32_t (&w)[1], uint32_t minus, uint32_t (&pair)[4], uint32_t&) {
    using N = Numbers<T>;
#pragma unroll
    for (int p = 0; p < 4; ++p) pair[p] = rt::fma2<T>(rt::and_or(w[0] >> (4 * p), 0x000F000F, N::kBase), N::kOne, minus);
  }
};

RT_FN constexpr int order_of_bytes(int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * 2; }

template <class T>
struct Int8 {
  using Type = T;
  static constexpr int kBits = 8;
  static constexpr bool kGroups = false, kRowScale = true, kNan = false;
  RT_FN static constexpr int order(int i) { return order_of_bytes(i); }
  RT_FN static void decode(const uint32_t (&w)[2], uint32_t, uint32_t (&pair)[4], uint32_t&) {
    using N = Numbers<T>;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const uint32_t x = w[p / 2] >> (8 * (p % 2));
      if constexpr (std::is_same<T, bf16>::value) {  // 128 + the low bits, less 128 or, with the sign bit, 256
        pair[p] = rt::fma2<T>(rt::and_or(x, 0x00800080, N::kBase), N::kMinusOne, rt::and_or(x, 0x007F007F, N::kBase));
      } else {
        pair[p] = rt::fma2<T>(rt::and_or(x ^ 0x00800080, 0x00FF00FF, N::kBase), N::kOne, N::kMinusBase128);
      }
    }
  }
};

template <class T>
struct Fp8 {
  using Type = T;
  static constexpr int kBits = 8;
  static constexpr bool kGroups = true, kRowScale = false, kNan = true;
  RT_FN static constexpr int order(int i) { return order_of_bytes(i); }
  RT_FN static void decode(const uint32_t (&w)[2], uint32_t, uint32_t (&pair)[4], uint32_t& nan) {
    using N = Numbers<T>;
    nan |= (w[0] & 0x7F7F7F7F) + 0x01010101;
    nan |= (w[1] & 0x7F7F7F7F) + 0x01010101;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const uint32_t x = p % 2 ? w[p / 2] : w[p / 2] << 8;  // the code in the high byte of each half
      pair[p] = rt::fma2<T>(rt::and_or(x, 0x80008000, (x >> N::kTinyShift) & N::kTinyPlace), N::kTinyFactor, 0x80008000);
    }
  }
};

}  // namespace
}  // namespace ramify::gpu
