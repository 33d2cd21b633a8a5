// How a launch of toeplitz_nhwc.cuh is cut into units; how the pixels of a unit come to shared memory, channel by channel,
// and its outputs leave it as pixels.
#pragma once

#include "toeplitz_block.cuh"

namespace depthwise {

constexpr int kChunkBytes = 16;
constexpr int kTogether = 4;  // copies, loads and stores that are on their way together
constexpr int kTurned = 4;    // chunks that a warp turns around at a time: a matrix for each two of its eight pixels

// How a launch is cut. An item is sixteen rows of outputs by a block's columns; rows are counted through all images, or
// each image's from a new item on. A unit is some items that follow each other.
struct ToeplitzNhwcTiling {
  int items, image_items;  // of a tile of columns; of an image, 0: rows are counted through all images
  int merged;              // items of a unit, at most
  int share, longer;       // items of a block; blocks of a channel group that have one more
  IntDivider items_divider{1}, image_divider{1}, row_divider{1};  // by items, image_items, rows of an output image
  int plane, stage;           // chunks from channel to channel, of the input and of the staged outputs
  int tile;                   // chunks of all of them
  int pixels;                 // chunks of the pixels to come
  int rest_slots;             // of a group that has fewer channels: warps a channel
  SmallDivider rest_divider;  // by those channels
  int parts;                  // kShared: warps that share the kernel rows of a tile
  SmallDivider part_divider;  // by those warps
  bool ahead;                 // pixels come while others are multiplied
  int in_vector, out_vector;  // channels of a pixel that are aligned together

  __device__ __forceinline__ int first_item(int part) const { return part * share + min(part, longer); }
};
// Planes half the banks apart.
constexpr int plane_chunks(int chunks) { return divide_up(chunks, 8) * 8 + 4; }

// Of the calling block. Found anew where they are asked for: kept in registers, they make the widest tiles spill on sm_100
// and sm_120. Of blocks in pairs they are kept, as those spill otherwise (sm_90).
template <class Traits>
__device__ __forceinline__ unsigned first_channel() {
  return (Traits::kPaired ? blockIdx.x : ptx::opaque(blockIdx.x)) * Traits::kChannels;
}
template <class Traits>
__device__ __forceinline__ int block_channels(const DirectArgs& args) {
  if constexpr (Traits::kPaired) return Traits::kChannels;
  return min(Traits::kChannels, static_cast<int>(args.out_c - first_channel<Traits>()));
}
// The same, where a loop over pixels would have them kept.
template <class Traits>
__device__ __forceinline__ int channels_anew(const DirectArgs& args) {
  if constexpr (Traits::kPaired) return Traits::kChannels;
  return ptx::opaque(block_channels<Traits>(args));
}

// Where a pixel lies among those of images of `height` x `width`, counted from the first pixel of its image.
template <class Traits>
__device__ __forceinline__ int pixel_at(int row, int column, int height, int width) {
  return Traits::kTurned ? column * height + row : row * width + column;
}

// What is computed and read at a time: rows that lie one after the other in memory, even if of several images. Rows of
// input are those inside the images that the first and the last row of outputs reach, and all between.
template <class Traits>
struct ToeplitzUnit {
  int item, items;  // items: 0 behind the block's last
  int column;
  int image, row, rows;  // outputs: the first row's image, and its place there
  int in_row, in_rows;   // input, from `image` on
  int first_column;      // of those that are stored

  __device__ __forceinline__ void find(const DirectArgs& args, const ToeplitzNhwcTiling& tiling, int first) {
    item = first;
    const int strip = tiling.items_divider.quotient(item), in_strip = item - strip * tiling.items;
    column = strip * Traits::kColumns;
    first_column = column * Traits::kStrideW + kChunk * Traits::kOrigin + 2 * kChunk * Traits::kFirstPair;

    items = min(min(tiling.first_item(blockIdx.y + 1) - item, tiling.items - in_strip), tiling.merged);
    image = 0, row = in_strip * kTileRows;
    int end = args.out_h;
    if (tiling.image_items > 0) {
      image = tiling.image_divider.quotient(in_strip);
      row -= image * tiling.image_items * kTileRows;
      items = min(items, tiling.image_items - row / kTileRows);
    } else {
      end *= static_cast<int>(args.n);
    }
    rows = min(items * kTileRows, end - row);
    const int skipped = tiling.row_divider.quotient(row), last = row + rows - 1;
    const int last_image = tiling.row_divider.quotient(last) - skipped;
    const int last_row = last - (skipped + last_image) * args.out_h;
    image += skipped, row -= skipped * args.out_h;
    in_row = min(args.h, max(0, row * args.stride_h - args.padding_h));
    const int in_end = last_row * args.stride_h - args.padding_h + (args.kernel_h - 1) * args.dilation_h + 1;
    in_rows = max(0, last_image * args.h + min(args.h, max(0, in_end)) - in_row);
  }
  // The first stored pixel, though it may lie before the image's row.
  __device__ __forceinline__ const typename Traits::T* input(const DirectArgs& args) const {
    return static_cast<const typename Traits::T*>(args.input) +
           (static_cast<int64_t>(image) * args.h * args.w + pixel_at<Traits>(in_row, first_column, args.h, args.w)) *
               args.out_c +
           first_channel<Traits>();
  }
};

// A channel's filter as it lies in memory: in so many chunks of shared memory, its first tap at such a place there.
inline __host__ __device__ int filter_chunks(const DirectArgs& args) {
  return divide_up(args.kernel_h * args.kernel_w, kChunk) + 1;
}
// Whether chunks are copied as they are.
template <class Traits>
__device__ __forceinline__ bool copies_filters(const DirectArgs& args) {
  return sizeof(weight_t<Traits>) == sizeof(typename Traits::T) &&
         reinterpret_cast<uintptr_t>(args.weight) % kChunkBytes == 0;
}
template <class Traits>
__device__ __forceinline__ int filter_offset(const DirectArgs& args, int64_t channel) {
  const auto* const filter = filters_of<Traits>(args, channel, args.kernel_h * args.kernel_w);
  return copies_filters<Traits>(args)
             ? static_cast<int>(reinterpret_cast<uintptr_t>(filter) % kChunkBytes / sizeof(*filter))
             : 0;
}
// A warp fetches it.
template <class Traits>
__device__ __forceinline__ void fetch_filter(typename Traits::T* staged, const DirectArgs& args, int64_t channel) {
  using T = typename Traits::T;
  const int taps = args.kernel_h * args.kernel_w, lane = ptx::lane_index();
  const auto* const filter = filters_of<Traits>(args, channel, taps);
  if (copies_filters<Traits>(args)) {
    const int before = filter_offset<Traits>(args, channel);
    const int64_t end = before + (args.out_c - channel) * taps;  // of the tensor
    for (int k = lane * kChunk; k < before + taps; k += 32 * kChunk)
      copy_16_async(staged + k, filter - before + k,
                    static_cast<int>(min(int64_t{kChunk}, end - k)) * static_cast<int>(sizeof(T)));
  } else {
#pragma unroll 8
    for (int k = lane; k < taps; k += 32) staged[k] = load_rounded<T>(filter + k);
  }
}

// A unit's pixels as they lie, in the order of the chunks that they are to fill, with zeros outside the image; within a
// chunk such that the eight rows of a matrix that turn_pixels reads lie in banks of their own. Neighbouring threads fetch
// what of a pixel is aligned together. The calling thread is the thread `worker` of so many.
template <class Traits>
__device__ __forceinline__ void fetch_pixels(typename Traits::T* pixels, const DirectArgs& args,
                                             const ToeplitzNhwcTiling& tiling, const ToeplitzUnit<Traits>& unit,
                                             int worker, int workers) {
  using T = typename Traits::T;
  constexpr int kColumns = Traits::kStored * kChunk;
  const int all = unit.in_rows * kColumns, first_column = unit.first_column, channels = channels_anew<Traits>(args);
  const T* const input = unit.input(args);
  with_vector(tiling.in_vector, [&](auto vector) {
    constexpr int kVector = vector.value, kPieces = kChannelsNhwc / kVector;
    if constexpr (kVector > 1) {
#pragma unroll kTogether
      for (int k = worker; k < all * kPieces; k += workers) {
        const int pixel = k / kPieces, channel = k % kPieces * kVector;
        const int row = pixel / kColumns, column = pixel - row * kColumns,
                  chunk = row * Traits::kPitch + column / kChunk;
        T* const to = pixels + (chunk * kChunk + (pixel % kChunk ^ chunk % kTurned * 2)) * kChunk + channel;
        const T* const from = input + pixel_at<Traits>(row, column, args.h, args.w) * args.out_c + channel;
        const bool in_bounds = static_cast<unsigned>(first_column + column) < static_cast<unsigned>(args.w);
        copy_async<kVector * sizeof(T)>(to, from, in_bounds && (kPieces == 1 || channel < channels));
      }
    }
  });
}

// Lane 4 * g + t gets chunk t of channel g.
template <class Traits>
__device__ __forceinline__ void turn_pixels(typename Traits::T* tile, const typename Traits::T* pixels, int in_rows,
                                            int plane) {
  constexpr int kStep = Traits::kWarps * kTurned;
  const int thread = ptx::thread_index(), lane = thread % 32, first = thread / 32 * kTurned;
  const int chunks = in_rows * Traits::kPitch;
  // Row r of matrix m is pixel 2 * m + r % 2 of chunk r / 2.
  const int from_chunk = lane % 8 / 2, from_pixel = lane / 8 * 2 + lane % 2;
  unsigned from =
      ptx::shared_address(pixels) + ((first + from_chunk) * kChunk + (from_pixel ^ from_chunk * 2)) * kChunkBytes;
  auto* to = tile + (lane / 4 * plane + first + lane % 4) * kChunk;
#pragma unroll 1
  for (int k = first; k < chunks; k += kTogether * kStep) {
    unsigned words[kTogether][4];
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      if (k + j * kStep < chunks) ptx::load_matrices_transposed(words[j], from + j * kStep * kChunk * kChunkBytes);
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      if (k + j * kStep + lane % 4 < chunks)
        *reinterpret_cast<uint4*>(to + j * kStep * kChunk) = uint4{words[j][0], words[j][1], words[j][2], words[j][3]};
    from += kTogether * kStep * kChunk * kChunkBytes;
    to += kTogether * kStep * kChunk;
  }
}

// The same from memory: a thread turns two neighbouring pixels, or what of them is aligned together.
template <class Traits>
__device__ __forceinline__ void load_pixels(typename Traits::T* tile, const DirectArgs& args,
                                            const ToeplitzNhwcTiling& tiling, const ToeplitzUnit<Traits>& unit) {
  using T = typename Traits::T;
  const int channels = channels_anew<Traits>(args), rows = unit.in_rows, first_column = unit.first_column;
  const T* const input = unit.input(args);
  with_vector(tiling.in_vector, [&](auto vector) {
    constexpr int kVector = vector.value, kAhead = min_int(8, 2 * kChannelsNhwc / kVector);
    const int pieces = kVector == kChannelsNhwc ? 1 : channels / kVector;
    Walk at(ptx::thread_index(), Traits::kThreads, pieces, Traits::kStored * kChunk / 2);
    while (at.outer < rows) {
      Vector<T, kVector> left[kAhead], right[kAhead];
      int target[kAhead];  // in the tile, or -1
#pragma unroll
      for (int k = 0; k < kAhead; ++k, at.advance()) {
        const int channel = at.inner * kVector, column = first_column + 2 * at.middle;
        const T* const from = input + pixel_at<Traits>(at.outer, 2 * at.middle, args.h, args.w) * args.out_c + channel;
        const bool exists = at.outer < rows;
        left[k] = load_or_zero<kVector>(from, exists && static_cast<unsigned>(column) < static_cast<unsigned>(args.w));
        right[k] = load_or_zero<kVector>(from + pixel_at<Traits>(0, 1, args.h, args.w) * args.out_c,
                                         exists && static_cast<unsigned>(column + 1) < static_cast<unsigned>(args.w));
        target[k] = exists ? (channel * tiling.plane + at.outer * Traits::kPitch) * kChunk + 2 * at.middle : -1;
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (target[k] >= 0)
#pragma unroll
          for (int e = 0; e < kVector; ++e)
            *reinterpret_cast<unsigned*>(tile + target[k] + e * tiling.plane * kChunk) =
                left[k].value[e].bits | static_cast<unsigned>(right[k].value[e].bits) << 16;
    }
  });
}

// Staged outputs that are NaN, computed again.
template <class Traits>
__device__ __noinline__ void mend_outputs(typename Traits::T* staged, const DirectArgs& args,
                                          const ToeplitzNhwcTiling& tiling, const ToeplitzUnit<Traits>& unit) {
  const int rows = unit.rows, columns = min(Traits::kColumns, args.out_w - unit.column);
  const int channels = channels_anew<Traits>(args), channel = first_channel<Traits>();
  for (Walk at(ptx::thread_index(), Traits::kThreads, columns, rows); at.outer < channels; at.advance()) {
    auto& value = staged[(at.outer * tiling.stage + at.middle * Traits::kStagePitch) * kChunk + at.inner];
    const int image = (unit.row + at.middle) / args.out_h;
    if (is_nan(value))
      value = from_float<typename Traits::T>(
          toeplitz_exact<Traits, Traits::kTurned>(args, unit.image + image, channel + at.outer,
                                                  unit.row + at.middle - image * args.out_h, unit.column + at.inner));
  }
}

// body(chunk, its outputs) of the staged chunks from `first` to `last`, and of some behind: lane 4 * g + t gets pixel g of
// the chunk t. kAtOnce loads before the first use.
template <class Traits, int kAtOnce, class Body>
__device__ __forceinline__ void for_each_chunk(const typename Traits::T* staged, int stage, int first, int last,
                                               Body body) {
  constexpr int kStep = Traits::kWarps * kTurned;
  const int thread = ptx::thread_index(), lane = thread % 32, own = first + thread / 32 * kTurned;
  // Row r of matrix m is channel 2 * m + r % 2 of chunk r / 2.
  unsigned from = ptx::shared_address(staged) + ((lane / 8 * 2 + lane % 2) * stage + own + lane % 8 / 2) * kChunkBytes;
#pragma unroll 1
  for (int k = own; k < last; k += kAtOnce * kStep, from += kAtOnce * kStep * kChunkBytes) {
    unsigned words[kAtOnce][4];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (k + j * kStep < last) ptx::load_matrices_transposed(words[j], from + j * kStep * kChunkBytes);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (k + j * kStep >= last) continue;
      VectorWord<typename Traits::T, kChannelsNhwc> outputs;
      outputs.word = uint4{words[j][0], words[j][1], words[j][2], words[j][3]};
      body(k + j * kStep + lane % 4, outputs);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void store_pixels(const typename Traits::T* staged, const DirectArgs& args,
                                             const ToeplitzNhwcTiling& tiling, const ToeplitzUnit<Traits>& unit) {
  using T = typename Traits::T;
  const int channels = channels_anew<Traits>(args), columns = min(Traits::kColumns, args.out_w - unit.column);
  T* const out = static_cast<T*>(args.out) +
                 (static_cast<int64_t>(unit.image) * args.out_h * args.out_w +
                  pixel_at<Traits>(unit.row, unit.column, args.out_h, args.out_w)) *
                     args.out_c +
                 first_channel<Traits>();
  with_vector(tiling.out_vector, [&](auto vector) {
    constexpr int kVector = vector.value;
    if constexpr (kVector == kChannelsNhwc) {
      const int chunks = unit.rows * Traits::kStagePitch;
      for_each_chunk<Traits, kTogether>(staged, tiling.stage, 0, chunks, [&](int chunk, const auto& outputs) {
        const int row = chunk / Traits::kStagePitch;  // of all images
        const int column = (chunk - row * Traits::kStagePitch) * kChunk + ptx::lane_index() / 4;
        if (chunk < chunks && column < columns)
          store_streaming(out + pixel_at<Traits>(row, column, args.out_h, args.out_w) * args.out_c, outputs.vector);
      });
    } else {
      // Neighbouring threads store what lies side by side. Not streaming: the rest of a sector is still to come.
      Walk at(ptx::thread_index(), Traits::kThreads, channels / kVector, Traits::kColumns);
#pragma unroll kTogether
      for (; at.outer < unit.rows; at.advance()) {
        if (at.middle >= columns) continue;
        const int channel = at.inner * kVector;
        const T* const from = staged + (channel * tiling.stage + at.outer * Traits::kStagePitch) * kChunk + at.middle;
        Vector<T, kVector> piece;
#pragma unroll
        for (int e = 0; e < kVector; ++e) piece.value[e] = from[e * tiling.stage * kChunk];
        const int pixel = pixel_at<Traits>(at.outer, at.middle, args.out_h, args.out_w);
        *reinterpret_cast<Vector<T, kVector>*>(out + pixel * args.out_c + channel) = piece;
      }
    }
  });
}

}  // namespace depthwise
