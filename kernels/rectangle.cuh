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

// The threads that share a rectangle, this one's number among them, and those along a row: 1 << lane_bits.
struct CopyThreads {
  int count, index, lane_bits;
};

// For every `width`-th column of a rectangle that its thread takes: visit(column, first row, rows between two of its own).
template <class Shared, class T, class Visit>
__device__ __forceinline__ void for_each_column(const Rectangle<Shared, T>& r, int width, const CopyThreads& threads,
                                                Visit visit) {
  const int lane = threads.index & ((1 << threads.lane_bits) - 1);
#pragma unroll 1
  for (int k = r.low + lane * width; k < r.high; k += width << threads.lane_bits)
    visit(k, threads.index >> threads.lane_bits, threads.count >> threads.lane_bits);
}

template <int kVector, class T>
__device__ __forceinline__ void copy_rectangle(const Rectangle<T, T>& r, const CopyThreads& threads) {
  for_each_column(r, kVector, threads, [&](int k, int first_row, int step) {
    const int row_stride = static_cast<int>(r.row_stride);
    const bool is_column = static_cast<unsigned>(r.first_column + k) < static_cast<unsigned>(r.width);
#pragma unroll 1
    for (int image = 0; image < r.images; ++image) {
      const T* const from = r.global + image * r.image_stride;
      int row = r.first_row + first_row, offset = row * row_stride + r.first_column + k;
      T* to = r.shared + image * r.image_pitch + first_row * r.pitch + k;
#pragma unroll 1
      for (const int end = r.first_row + r.rows; row < end; row += step) {
        const bool valid = is_column && static_cast<unsigned>(row) < static_cast<unsigned>(r.height);
        copy_async<kVector * sizeof(T)>(to, from + (valid ? offset : 0), valid);
        offset += step * row_stride;
        to += step * r.pitch;
      }
    }
  });
}

// The same by eights whose rows lie on any boundary: those that low and first_column, multiples of eight, begin, and zeros
// behind the last column. `tensor`: what the rectangle lies in. kBatch loads are on their way together.
template <int kBatch, class T>
__device__ __forceinline__ void copy_unaligned_rectangle(const Rectangle<T, T>& r, const CopyThreads& threads,
                                                         const UnalignedTensor& tensor) {
  for_each_column(r, kEight, threads, [&](int k, int first_row, int step) {
    const int column = r.first_column + k, row_stride = static_cast<int>(r.row_stride);
    const bool is_column = static_cast<unsigned>(column) < static_cast<unsigned>(r.width);
#pragma unroll 1
    for (int image = 0; image < r.images; ++image) {
      const T* const from = r.global + image * r.image_stride + column;
      T* const to = r.shared + image * r.image_pitch + k;
#pragma unroll 1
      for (int first = first_row; first < r.rows; first += kBatch * step) {
        UnalignedEight eights[kBatch];
        bool is_loaded[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int row = r.first_row + first + b * step;
          eights[b].clear();
          is_loaded[b] = first + b * step < r.rows;
          if (!is_loaded[b] || !is_column || static_cast<unsigned>(row) >= static_cast<unsigned>(r.height)) continue;
          is_loaded[b] = eights[b].load(tensor, from + row * row_stride);
          if (!is_loaded[b]) copy_eight(to + (first + b * step) * r.pitch, from + row * row_stride, r.width - column);
        }
        const EightMask mask(r.width - column);
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
          if (is_loaded[b]) eights[b].store(to + (first + b * step) * r.pitch, mask);
      }
    }
  });
}

// `vector`: elements a copy, more than one.
template <class T>
__device__ __forceinline__ void copy_rectangle(const Rectangle<T, T>& r, int vector, const CopyThreads& threads) {
  switch (vector) {
    case 8: return copy_rectangle<8>(r, threads);
    case 4: return copy_rectangle<4>(r, threads);
    default: return copy_rectangle<2>(r, threads);
  }
}

// channels_last: pixels of kChannels channels, each of them to eight elements; r.shared is that of row 0 and column `low`.
// `channels`: from pixel to pixel. Of a pixel, neighbouring threads copy kVector channels each, which are aligned together:
// zeros for those from `existing` on.
constexpr int kPixelElements = 8;
template <int kVector, int kChannels, class T>
__device__ __forceinline__ void copy_pixels(const Rectangle<T, T>& r, const CopyThreads& threads, int channels,
                                            int existing) {
  constexpr int kPieces = kChannels / kVector;
  Rectangle<T, T> pieces = r;
  pieces.low = 0, pieces.high = (r.high - r.low) * kPieces;
  for_each_column(pieces, 1, threads, [&](int k, int first_row, int step) {
    const int column = r.first_column + r.low + k / kPieces, channel = k % kPieces * kVector;
    const bool exists =
        static_cast<unsigned>(column) < static_cast<unsigned>(r.width) && (kPieces == 1 || channel < existing);
    const T* from =
        r.global + ((r.first_row + first_row) * r.row_stride + static_cast<int64_t>(column) * channels + channel);
    T* to = r.shared + first_row * r.pitch + k / kPieces * kPixelElements + channel;
#pragma unroll 1
    for (int row = r.first_row + first_row; row < r.first_row + r.rows; row += step) {
      const bool valid = exists && static_cast<unsigned>(row) < static_cast<unsigned>(r.height);
      copy_async<kVector * sizeof(T)>(to, valid ? from : r.global, valid);
      from += step * r.row_stride;
      to += step * r.pitch;
    }
  });
}
// `vector`: channels that are aligned together, more than one.
template <int kChannels, class T>
__device__ __forceinline__ void copy_pixels(const Rectangle<T, T>& r, int vector, const CopyThreads& threads,
                                            int channels, int existing) {
  with_vector(vector, [&](auto constant) {
    constexpr int kVector = constant.value;
    if constexpr (kVector > 1 && kVector <= kChannels) copy_pixels<kVector, kChannels>(r, threads, channels, existing);
  });
}

// Rows of `eights` times eight such pixels to the planes of their channels; `rows`: a multiple of four. (Four loads on their
// way together: no gain, grad of weight of 31x31 on 32x128x56x56, fp16, H100: 112.3 us for 111.4.)
template <int kChannels, class T, class Quotient>
__device__ __forceinline__ void transpose_pixels(const T* pixels, int pixel_pitch, T* planes, int pitch,
                                                 int plane_elements, int rows, int eights, Quotient quotient) {
  const int thread = ptx::thread_index(), lane = thread % 32;
#pragma unroll 1
  for (int k = thread / 32; k < rows / 4 * eights; k += blockDim.x / 32) {
    const int row = quotient(k) * 4, column = (k - quotient(k) * eights) * 8;
    unsigned matrices[4];  // of one row each
    ptx::load_matrices_transposed(
        matrices, ptx::shared_address(pixels + (row + lane / 8) * pixel_pitch + (column + lane % 8) * kPixelElements));
    if (lane / 4 >= kChannels) continue;
    T* const to = planes + lane / 4 * plane_elements + row * pitch + column + lane % 4 * 2;
#pragma unroll
    for (int e = 0; e < 4; ++e) *reinterpret_cast<unsigned*>(to + e * pitch) = matrices[e];
  }
}

// The same at once, for pixels on any boundary: neighbouring threads take the channels of two pixels. `channel_of(k)`: where
// the k-th of `existing` channels lies; the planes of others are zeros before, and are left alone.
template <class T, class ChannelOf>
__device__ __forceinline__ void transpose_rectangle(const Rectangle<T, T>& r, const CopyThreads& threads, int channels,
                                                    int plane_elements, int existing, ChannelOf channel_of) {
  constexpr int kTogether = 4;  // rows whose loads are on their way together
  const CopyThreads pairs{threads.count / existing, threads.index / existing, threads.lane_bits};
  if (pairs.index >> pairs.lane_bits >= pairs.count >> pairs.lane_bits) return;
  const int plane = threads.index - pairs.index * existing, channel = channel_of(plane);
  for_each_column(r, 2, pairs, [&](int k, int first_row, int step) {
    const int column = r.first_column + k;
    const bool is_first = static_cast<unsigned>(column) < static_cast<unsigned>(r.width);
    const bool is_second = static_cast<unsigned>(column + 1) < static_cast<unsigned>(r.width);
    const T* from =
        r.global + ((r.first_row + first_row) * r.row_stride + static_cast<int64_t>(column) * channels + channel);
    T* to = r.shared + plane * plane_elements + first_row * r.pitch + k;
#pragma unroll 1
    for (int first = first_row; first < r.rows; first += kTogether * step) {
      T left[kTogether], right[kTogether];
#pragma unroll
      for (int t = 0; t < kTogether; ++t, from += step * r.row_stride) {
        const int row = first + t * step;
        const bool is_row = row < r.rows && static_cast<unsigned>(r.first_row + row) < static_cast<unsigned>(r.height);
        left[t] = load_or_zero<1>(from, is_row && is_first).value[0];
        right[t] = load_or_zero<1>(from + channels, is_row && is_second).value[0];
      }
#pragma unroll
      for (int t = 0; t < kTogether; ++t, to += step * r.pitch)
        if (first + t * step < r.rows)
          *reinterpret_cast<unsigned*>(to) = left[t].bits | static_cast<unsigned>(right[t].bits) << 16;
    }
  });
}

// Threads along a row for `vectors` vectors: a power of two, a warp at most.
inline int row_lane_bits(int vectors) {
  int bits = 0;
  while (1 << bits < vectors && bits < 5) ++bits;
  return bits;
}

}  // namespace depthwise
