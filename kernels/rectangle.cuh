// Copies rectangles of planes from global to shared memory: vector by vector as they lie, by unaligned words, or from
// channels_last with the channels put planar.
#pragma once

#include "async_copy.cuh"
#include "direct.cuh"
#include "unaligned.cuh"

namespace depthwise {

// Rows first_row to first_row + rows of each of some images' planes, and their columns from first_column on. Of these,
// [low, high) are written, with zeros outside [0, height) and [0, width).
template <class Shared, class T>
struct Rectangle {
  Shared* shared;
  int pitch, image_pitch;  // elements from row to row and from image to image
  const T* global;         // row 0, column 0 of the first image
  int64_t image_stride, row_stride;
  int images, rows, first_row, height, first_column, width;
  int low, high;
};

// For every kVector-th column of the rectangle: store(shared, load(shared, global row, column)), kBatch loads before
// the first store. Columns and rows outside the image are told by `row` null and by the column.
template <int kVector, int kBatch, class Shared, class T, class Load, class Store>
__device__ __forceinline__ void for_each_vector(const Rectangle<Shared, T>& r, int lanes, Load load, Store store) {
  const int step = blockDim.x / lanes, first = r.low + static_cast<int>(threadIdx.x % lanes) * kVector;
  int image = 0, row = threadIdx.x / lanes, k = first;
  if (r.rows <= 0 || first >= r.high) return;
  while (row >= r.rows) row -= r.rows, ++image;
#pragma unroll 1
  while (image < r.images) {
    int offset[kBatch];
    decltype(load(r.shared, r.global, 0)) values[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      offset[b] = -1;
      if (image < r.images) {
        const bool in_bounds = static_cast<unsigned>(r.first_row + row) < static_cast<unsigned>(r.height);
        offset[b] = image * r.image_pitch + row * r.pitch + k;
        values[b] = load(r.shared + offset[b],
                         in_bounds ? r.global + image * r.image_stride + (r.first_row + row) * r.row_stride : nullptr,
                         r.first_column + k);
        k += lanes * kVector;
        if (k >= r.high) {
          k = first;
          row += step;
          while (row >= r.rows) row -= r.rows, ++image;
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (offset[b] >= 0) store(r.shared + offset[b], values[b]);
  }
}

template <int kVector, class T>
__device__ __forceinline__ void copy_rectangle(const Rectangle<T, T>& r, int lanes) {
  for_each_vector<kVector, 1>(
      r, lanes,
      [&](T* shared, const T* row, int column) {
        const bool valid = row != nullptr && static_cast<unsigned>(column) < static_cast<unsigned>(r.width);
        copy_async<kVector * sizeof(T)>(shared, valid ? row + column : r.global, valid);
        return 0;
      },
      [](T*, int) {});
}

// The eights of a rectangle whose rows lie on any boundary, dealt to the threads one by one: those that low and
// first_column, multiples of eight, begin, and zeros behind the last column. `tensor`: what the rectangle lies in.
template <class T>
struct UnalignedRectangle {
  const Rectangle<T, T>& r;
  UnalignedTensor tensor;
  Walk at;
  UnalignedEight eight;
  bool is_loaded = false;

  __device__ __forceinline__ UnalignedRectangle(const Rectangle<T, T>& r, const UnalignedTensor& tensor)
      : r(r), tensor(tensor), at(threadIdx.x, blockDim.x, (r.high - r.low + kEight - 1) / kEight, r.rows) {}
  __device__ __forceinline__ bool exists() const { return at.outer < r.images; }
  __device__ __forceinline__ int column() const { return r.low + at.inner * kEight; }  // from first_column on
  __device__ __forceinline__ T* shared() const {
    return r.shared + (at.outer * r.image_pitch + at.middle * r.pitch + column());
  }
  // Whether there is something to store.
  __device__ __forceinline__ bool load() {
    if (!exists()) return false;
    const int row = r.first_row + at.middle, from_column = r.first_column + column();
    eight.clear();
    if (static_cast<unsigned>(row) >= static_cast<unsigned>(r.height) ||
        static_cast<unsigned>(from_column) >= static_cast<unsigned>(r.width))
      return true;
    const T* const from = r.global + at.outer * r.image_stride + (row * r.width + from_column);
    if (eight.load(tensor, from)) return true;
    copy_eight(shared(), from, r.width - from_column);
    return false;
  }
  __device__ __forceinline__ void store() const {
    if (is_loaded) eight.store(shared(), EightMask(r.width - r.first_column - column()));
  }
};

// Several at once, so that their loads are on their way together.
template <class... Rectangles>
__device__ __forceinline__ void copy_unaligned_rectangles(Rectangles... rectangles) {
#pragma unroll 1
  while ((rectangles.exists() || ...)) {
    ((rectangles.is_loaded = rectangles.load()), ...);
    (rectangles.store(), ...);
    (rectangles.at.advance(), ...);
  }
}

// `vector`: elements a copy, more than one.
template <class T>
__device__ __forceinline__ void copy_rectangle(const Rectangle<T, T>& r, int vector, int lanes) {
  switch (vector) {
    case 8: return copy_rectangle<8>(r, lanes);
    case 4: return copy_rectangle<4>(r, lanes);
    default: return copy_rectangle<2>(r, lanes);
  }
}

// channels_last: two pixels of kChannels channels, stored as one word into each channel's plane. `channel_of(k)`: where the
// k-th channel lies, or -1; the planes of those that do not exist are zeros before, and may be left alone.
template <int kChannels, int kBatch, class T, class ChannelOf>
__device__ __forceinline__ void transpose_rectangle(const Rectangle<T, T>& r, bool whole, int lanes, int channels,
                                                    int plane_elements, ChannelOf channel_of) {
  struct Pixels {
    Vector<T, kChannels> first, second;
  };
  const auto in_bounds = [&](const T* row, int column) {
    return row != nullptr && static_cast<unsigned>(column) < static_cast<unsigned>(r.width);
  };
  const auto store = [&](T* shared, int k, T first, T second) {
    *reinterpret_cast<unsigned*>(shared + k * plane_elements) = first.bits | static_cast<unsigned>(second.bits) << 16;
  };
  if (whole)
    for_each_vector<2, kBatch>(
        r, lanes,
        [&](T*, const T* row, int column) {
          const T* const pixel = row + static_cast<int64_t>(column) * channels + channel_of(0);
          return Pixels{load_or_zero<kChannels>(pixel, in_bounds(row, column)),
                        load_or_zero<kChannels>(pixel + channels, in_bounds(row, column + 1))};
        },
        [&](T* shared, const Pixels& pixels) {
#pragma unroll
          for (int k = 0; k < kChannels; ++k) store(shared, k, pixels.first.value[k], pixels.second.value[k]);
        });
  else
    for_each_vector<2, 1>(
        r, lanes,
        [&](T* shared, const T* row, int column) {
          constexpr int kTogether = 4;  // channels whose loads are on their way together
          static_assert(kChannels % kTogether == 0);
          const T* const pixel = row + static_cast<int64_t>(column) * channels;
#pragma unroll 1
          for (int k = 0; k < kChannels && channel_of(k) >= 0; k += kTogether) {
            T first[kTogether], second[kTogether];
#pragma unroll
            for (int e = 0; e < kTogether; ++e) {
              const int channel = channel_of(k + e);
              first[e] = load_or_zero<1>(pixel + channel, in_bounds(row, column) && channel >= 0).value[0];
              second[e] =
                  load_or_zero<1>(pixel + channels + channel, in_bounds(row, column + 1) && channel >= 0).value[0];
            }
#pragma unroll
            for (int e = 0; e < kTogether; ++e) store(shared, k + e, first[e], second[e]);
          }
          return 0;
        },
        [](T*, int) {});
}

// Threads along a row for `vectors` vectors: a power of two, a warp at most.
inline int row_lanes(int vectors) {
  int lanes = 1;
  while (lanes < vectors && lanes < 32) lanes *= 2;
  return lanes;
}

}  // namespace depthwise
