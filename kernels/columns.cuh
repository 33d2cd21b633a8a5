// What the columns kernels share: all of them the sizes of a small image, columns_nchw and columns_grad_weight lanes that
// hold neighbouring columns of planes, and get what lies beside them from each other.
#pragma once

#include "columns_tiling.h"
#include "direct.cuh"

namespace depthwise {

// The kernel's size is odd and its padding keeps the images' size.
template <class T_, int kKernelH_, int kKernelW_, int kHeight_, int kWidth_>
struct SmallImageTraits {
  using T = T_;
  static constexpr int kKernelH = kKernelH_, kKernelW = kKernelW_, kTaps = kKernelH * kKernelW;
  static constexpr int kPaddingH = kKernelH / 2, kPaddingW = kKernelW / 2;
  static constexpr int kHeight = kHeight_, kWidth = kWidth_, kPixels = kHeight * kWidth;
  static_assert(kKernelH % 2 == 1 && kKernelW % 2 == 1);
};

template <class T, int kKernelH, int kKernelW, int kHeight, int kWidth>
struct ColumnsTraits : SmallImageTraits<T, kKernelH, kKernelW, kHeight, kWidth> {
  static constexpr int kColumns = columns_of(kWidth), kLanes = columns_lanes(kWidth);
  static constexpr int kWindow = kColumns + 2 * ColumnsTraits::kPaddingW;  // columns that a lane's outputs meet
  // Lanes on each side that hold them.
  static constexpr int kReach = max_int(1, divide_up(ColumnsTraits::kPaddingW, kColumns));
  static_assert(kLanes <= 32);
};

// A lane's columns of a row: in memory one word, in registers words of four bytes.
template <class T, int kColumns>
struct ColumnsWord {
  using Word = typename RawWord<sizeof(T) * kColumns>::type;
  static constexpr int kParts = (sizeof(T) * kColumns + 3) / 4;
  union {
    unsigned part[kParts];
    Word word;
    Vector<T, kColumns> vector;
  };

  __device__ __forceinline__ ColumnsWord() {
#pragma unroll
    for (int k = 0; k < kParts; ++k) part[k] = 0;
  }
  __device__ __forceinline__ float value(int column) const { return to_float(vector.value[column]); }

  // The same columns of the lane kLanes to the left (negative: to the right), or zeros; those parts of them alone that
  // hold [kFirst, kEnd). Lanes beyond the warp's planes do not wrap around to values: they get their own, zeros.
  template <int kLanes, int kFirst, int kEnd>
  __device__ __forceinline__ ColumnsWord of_lane(bool exists) const {
    ColumnsWord other;
#pragma unroll
    for (int k = 0; k < kParts; ++k)
      if (kFirst * static_cast<int>(sizeof(T)) < 4 * k + 4 && kEnd * static_cast<int>(sizeof(T)) > 4 * k) {
        const unsigned theirs = kLanes > 0 ? __shfl_up_sync(~0u, part[k], max_int(0, kLanes))
                                           : __shfl_down_sync(~0u, part[k], max_int(0, -kLanes));
        other.part[k] = exists ? theirs : 0;
      }
    return other;
  }
};

// A lane's place in a plane.
template <class Traits>
struct ColumnsLane {
  using Word = ColumnsWord<typename Traits::T, Traits::kColumns>;
  int lane, plane, place, column;  // of the warp's planes, also beyond the last; lane and column of the plane

  __device__ __forceinline__ ColumnsLane() {
    lane = threadIdx.x % 32;
    plane = lane / Traits::kLanes;
    place = lane - plane * Traits::kLanes;
    column = place * Traits::kColumns;
  }
  // Whether the plane has a lane so many to the left, and to the right.
  __device__ __forceinline__ bool has_left(int distance) const { return place >= distance; }
  __device__ __forceinline__ bool has_right(int distance) const { return place < Traits::kLanes - distance; }
  // A row of what the lane's outputs meet; zeros beyond the plane. All lanes of the warp.
  __device__ __forceinline__ void window(float (&to)[Traits::kWindow], const Word& mine) const {
    constexpr int kColumns = Traits::kColumns, kPadding = Traits::kPaddingW;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) to[kPadding + k] = mine.value(k);
    for_each_index<Traits::kReach>([&](auto nearer) {
      // Of that lane's columns the nearest `kCount`; how many columns lie between.
      constexpr int kDistance = nearer + 1, kBetween = nearer * kColumns,
                    kCount = min_int(kColumns, kPadding - kBetween);
      const Word left = mine.template of_lane<kDistance, kColumns - kCount, kColumns>(has_left(kDistance));
      const Word right = mine.template of_lane<-kDistance, 0, kCount>(has_right(kDistance));
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        to[kPadding - kBetween - kCount + k] = left.value(kColumns - kCount + k);
        to[kPadding + kColumns + kBetween + k] = right.value(k);
      }
    });
  }
};

}  // namespace depthwise
