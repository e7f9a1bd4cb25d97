// The weights of 8 pixels beside each other as a band matrix, the operand B of HMMA, in registers: what `mma` and
// `fused` share. For a kernel row,
//
//     Y[16 channels x 8 pixels] += X[16 channels x 8*(S+1) positions] * band[8*(S+1) positions x 8 pixels]
//
// where band[i][p] is the weight of pixel p at tap i - S*p, and zero beside the kernel. With K = 7 and S = 1, the
// number is the tap:
//
//                           pixel p = lane / 4
//     t = lane % 4   i    0  1  2  3  4  5  6  7
//                  +---+-------------------------+
//          0       | 0 |  0  .  .  .  .  .  .  . |
//                  | 1 |  1  0  .  .  .  .  .  . |   fragment 0: a lane's register b[0] has rows
//          1       | 2 |  2  1  0  .  .  .  .  . |   i = 2t (its low half) and i = 2t + 1 (its
//                  | 3 |  3  2  1  0  .  .  .  . |   high half) of column p
//          2       | 4 |  4  3  2  1  0  .  .  . |
//                  | 5 |  5  4  3  2  1  0  .  . |
//          3       | 6 |  6  5  4  3  2  1  0  . |
//                  | 7 |  .  6  5  4  3  2  1  0 |
//                  +---+-------------------------+
//          0       | 8 |  .  .  6  5  4  3  2  1 |
//                  | 9 |  .  .  .  6  5  4  3  2 |   fragment 1: register b[1] has rows
//          1       |10 |  .  .  .  .  6  5  4  3 |   i = 8 + 2t and i = 9 + 2t
//                  |11 |  .  .  .  .  .  6  5  4 |
//          2       |12 |  .  .  .  .  .  .  6  5 |
//                  |13 |  .  .  .  .  .  .  .  6 |
//          3       |14 |  .  .  .  .  .  .  .  . |
//                  |15 |  .  .  .  .  .  .  .  . |
//                  +---+-------------------------+
//
// Rows 8 apart in a column are taps 8 apart, and a kernel row has at most 7 taps. So each lane has exactly one pair of
// neighbouring taps, in one of the fragments, and it is the same pair for all kernel rows: lane 12 (p = 3, t = 0) has
// taps 5 and 6 in fragment 1; lane 4 (p = 1, t = 0) has tap 0 in the high half of fragment 0 and nothing in the low
// half. In `mma`, a kernel row takes two 16-bit loads and a PRMT for each fragment. With S = 2 the band goes down two
// rows from a pixel to the next, and there are three fragments. `shift` positions can come before the first tap; they
// move the whole band down.
#pragma once

#include "tiles.cuh"

namespace pyinvolution::cuda {

// The pair of taps of a kernel row that a lane has in the band, and in which fragment of 8 positions. One of them may
// be beside the kernel.
struct Pair {
  int low, fragment;

  template <class C>
  static __device__ __forceinline__ Pair of_lane(int lane, int shift) {
    const int first = lane % 4 * 2 - C::S * (lane / 4) - shift;  // the tap of the lane's first position
    const int low = ((first + 1) & 7) - 1;
    return {low, (low - first) / 8};
  }
  template <int K>
  __device__ __forceinline__ bool has_low() const {
    return low >= 0 && low < K;
  }
  template <int K>
  __device__ __forceinline__ bool has_high() const {
    return low + 1 < K;
  }
  // The halves of the register that hold taps.
  template <int K>
  __device__ __forceinline__ uint32_t mask() const {
    return (has_low<K>() ? 0xffffu : 0) | (has_high<K>() ? 0xffff0000u : 0);
  }
};

// With this selector, __byte_perm makes the register of a fragment of two taps, each in the low half of a register
// whose high half is zero. A half without a tap becomes zero.
__device__ __forceinline__ uint32_t tap_selector(bool has_low, bool has_high) {
  return (has_low ? 0x0010 : 0x0032) | (has_high ? 0x5400 : 0x7600);
}
constexpr uint32_t no_taps = 0x7632;

// The rows of X below a strip, as fragments [16 channels][8 positions], or transposed.
template <class C, class I>
struct Positions {
  const char* row;

  explicit __device__ __forceinline__ Positions(const char* lane_row) : row(lane_row) {}
  __device__ __forceinline__ Positions(const char* image, int group, int strip, int first_row, int lane) {
    const int matrix = lane / 8, i = lane % 8;
    row = image +
          (I::channels_inner
               ? I::at(first_row, strip * 8 * C::S + matrix / 2 * 8 + i, group * group_channels + matrix % 2 * 8)
               : I::at(first_row, strip * 8 * C::S + matrix / 2 * 8, group * group_channels + matrix % 2 * 8 + i));
  }
  // Fragment f is in registers 2*f and 2*f + 1, one for 8 channels each.
  template <bool ChannelsFirst>
  __device__ __forceinline__ void load(uint32_t (&first)[4], uint32_t (&last)[2], int x_row) const {
    constexpr int row_bytes = I::Columns * (I::channels_inner ? I::pitch : 2);
    constexpr int two_fragments = 16 * (I::channels_inner ? I::pitch : 2);
    constexpr bool transposed = I::channels_inner == ChannelsFirst;
    if constexpr (transposed) {
      load_matrices_transposed(first, row + x_row * row_bytes);
      if constexpr (C::fragments > 2) load_matrices_transposed(last, row + x_row * row_bytes + two_fragments);
    } else {
      load_matrices(first, row + x_row * row_bytes);
      if constexpr (C::fragments > 2) load_matrices(last, row + x_row * row_bytes + two_fragments);
    }
  }
};

// Whether the first sums of all lanes are finite. A product or a sum of numbers of which one is not finite is not
// finite either; large sums can make it overflow, and are then computed again for nothing.
template <int Count = 4, int Rows>
__device__ __forceinline__ bool all_finite(const float (&sums)[Rows][4]) {
  float all = 0;
#pragma unroll
  for (int r = 0; r < Count; ++r) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) all += sums[r][i] * sums[r][i + 1];
  }
  return !__any_sync(~0u, all - all != 0.0f);
}

}  // namespace pyinvolution::cuda
