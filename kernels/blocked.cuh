// Blocked depthwise convolution for large kernels, plain multiply-adds: forward, and grad of input at stride 1 (filter
// flipped). NCHW and channels_last.
//
// Serves  any kernel height, padding and image size at run time; type, kernel width, strides and dilations at compile
//         time; fp32, fp16, bf16. Wide tiles: stride 1 along rows, no dilation.
// Owns    each thread computes kColumns x kRows outputs of one plane in fp32 registers. It walks down the rows of its
//         window; kWindow values of one of them in registers serve every output row that it meets, against weights that
//         all threads of a warp read alike. NCHW: a block works on one channel of one image, or of several small ones;
//         channels_last: on as many channels as fill 16 bytes, a warp on one of them.
//         Rows of outputs: neighbours; or, of wide tiles, row_step apart, so that a band of row_step tiles take turns:
//         near the edges of an image fewer kernel rows meet it, and all warps then have about as many, while the
//         lanes of a warp skip nearly the same ones.
// Memory  fp32: weights, [channel][kernel row][column]; the input rows inside the image with zeros for the padding left
//         and right, and one row of zeros that stands for all rows outside. The outputs reuse the input's room, or go to
//         memory from registers where a thread has whole words of them. Images lie so far apart that the lanes of a warp
//         read different banks: lanes along a row, an odd number of loads (columns, pairs or fours of them) apart, take
//         one of every so many banks, and those of the next image others.
// Cost    A window row is kWindow loads, and every row of weights a quarter of kernel_w, for kColumns * kernel_w
//         multiply-adds a row of outputs: seven rows of 31x31 issue 93 loads for 1519 multiply-adds. Wide: windows are
//         loaded in pairs or fours. Twelve columns and three rows: 35 loads for 1116, in a quarter of the registers of a
//         block of seven rows, so that four blocks, which wait and compute at different times, share a multiprocessor.
//         Fourteen columns: the same weights serve them all; the window is loaded again for each kTaps taps, 30 pairs
//         and 56 loads of weights for 3038.
// Chosen  select.h.
#pragma once

#include "async_copy.cuh"
#include "blocked_tiling.h"
#include "direct.cuh"

namespace depthwise {

// kTileColumns, kTileRows, kTileTaps: those of variants.h's table.
template <class T_, int kKernelW_, int kStrideH_, int kStrideW_, int kDilationH_, int kDilationW_, bool kChannelsLast_,
          bool kSumsParts_, int kTileColumns, int kTileRows, int kTileTaps>
struct BlockedTraits {
  using T = T_;
  static constexpr int kKernelW = kKernelW_;
  static constexpr int kStrideH = kStrideH_, kStrideW = kStrideW_;
  static constexpr int kDilationH = kDilationH_, kDilationW = kDilationW_;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kChannels = kChannelsLast ? 16 / static_cast<int>(sizeof(T)) : 1;  // of a block
  static constexpr Tile kTile = {"", kTileColumns, kTileRows, kTileTaps};
  static constexpr bool kIsWide = kTileColumns > 7;
  static constexpr bool kHasFewSums = kTileColumns * kTileRows <= 50;  // which leave registers for more blocks
  // An odd number of columns, or of pairs of them: neighbouring threads then read different banks. Seven divides the
  // images of most networks, as columns and as rows.
  static constexpr int kColumns = kTileColumns;
  static constexpr int kVector = !kIsWide ? 1 : kTileColumns % 4 == 0 ? 4 : 2;  // floats of the window a load
  // A row of the kernel is taken in chunks of so many taps: less code, for the instruction cache, and a smaller window.
  static constexpr int kTaps = min_int(kTileTaps, kKernelW);
  static constexpr int kChunks = divide_up(kKernelW, kTaps);
  static constexpr int kLastTaps = kKernelW - (kChunks - 1) * kTaps;
  static constexpr int kWindow = divide_up(window_size(kColumns, kStrideW, kTaps, kDilationW), kVector) * kVector;
  // Columns that the last chunk reads beyond those it needs.
  static constexpr int kSlack = (kTaps - kLastTaps) * kDilationW + kVector - 1;
  static constexpr int kRows = blocked_rows(kTile, kKernelW, kWindow);
  static constexpr bool kSumsParts = kSumsParts_;  // of kernel rows
  static constexpr int kWeightPitch = divide_up(kKernelW, 4) * 4;
  static constexpr int kThreads = blocked_threads(kTile, kChannels) * kChannels;  // a block, at most
  // Of a multiprocessor, by registers.
  static constexpr int kWideBlocks = (kHasFewSums ? 512 : 384) / kThreads;
  static constexpr int kBlocks = kIsWide ? kWideBlocks : kWindow > 60 ? 1 : 2;
  static constexpr int kResidentWarps = kIsWide ? kWideBlocks * kThreads / 32 : kBlocks == 1 ? 8 : kRows > 4 ? 16 : 20;
  // Issue slots of a warp: for a row of its window, and for each kernel row that it meets there.
  static constexpr int kRowSlots = kChunks * (kWindow / kVector + 7) + 48;
  static constexpr int kTapRowSlots = kKernelW * kColumns + kChunks * divide_up(kTaps, 4) + 3;

  // Floats from one row of input to the next, where a block reads `width` columns, of which `padding` lie left of the
  // image. Wide: zeros right of a row are those left of the next one.
  static int row_pitch(int width, int padding, int image_width) {
    if (!kIsWide) return width;
    const int left = min_int(max_int(0, padding), width);
    return divide_up(max_int(min_int(left + image_width, width), width - left), kVector) * kVector;
  }
  // Floats from one image to the next, of `floats` each, where `tiles_w` lanes lie along a row.
  __host__ __device__ static int image_pitch(int floats, int tiles_w) {
    constexpr int kLoads = 32 / kVector;  // that all banks answer at once
    int lanes = 1;
    while (lanes < tiles_w) lanes *= 2;
    const int loads = divide_up(floats, kVector);
    if (kVector == 4) return (loads | 1) * kVector;  // an odd number of loads
    return (loads + ((lanes - loads) & ((kIsWide ? min_int(2 * lanes, kLoads) : kLoads) - 1))) * kVector;
  }
};

// An element of T, or of float32 in T's place, as float32 in shared memory.
template <class T, class Stored>
__device__ __forceinline__ void copy_one(float* shared, const Stored* global) {
  if constexpr (sizeof(T) == sizeof(float))
    copy_async<4>(shared, global);
  else
    *shared = load_for_sums<T>(global);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    blocked_kernel(const __grid_constant__ DirectArgs args, const BlockedTiling tiling) {
  using T = typename Traits::T;
  constexpr int kChannels = Traits::kChannels, kColumns = Traits::kColumns, kRows = Traits::kRows;

  // Which outputs: `images` x `rows` x `columns` from (image, row, column) on, of `channels` channels.
  const unsigned groups = divide_up(static_cast<int>(args.out_c), kChannels);
  unsigned block = blockIdx.x;
  const int column = block % tiling.blocks_w * tiling.tiles_w * kColumns;
  block /= tiling.blocks_w;
  const int row = block % tiling.blocks_h * tiling.tiles_h * kRows;
  block /= tiling.blocks_h;
  const int channel = block % groups * kChannels;
  const int image = block / groups * tiling.images;
  const int images = min(tiling.images, static_cast<int>(args.n) - image);
  const int channels = min(kChannels, static_cast<int>(args.out_c) - channel);
  const int rows = min(tiling.tiles_h * kRows, args.out_h - row);
  const int columns = min(tiling.tiles_w * kColumns, args.out_w - column);

  // Which input: the rows from in_row on, `in_rows` of them, and columns from in_column on, as far as the image goes.
  const int first_row = row * Traits::kStrideH - args.padding_h;
  const int first_column = column * Traits::kStrideW - args.padding_w;
  const int last_tap = (args.kernel_h - 1) * Traits::kDilationH;
  const int in_row = max(0, first_row), in_column = max(0, first_column);
  const int in_rows = max(0, min(args.h, first_row + (rows - 1) * Traits::kStrideH + last_tap + 1) - in_row);
  const int in_columns = max(0, min(args.w, first_column + tiling.width) - in_column);
  const int64_t in_c = args.out_c / args.multiplier;

  extern __shared__ __align__(16) float shared[];
  float* tile = shared + kChannels * args.kernel_h * Traits::kWeightPitch;
  const int image_pitch = Traits::image_pitch(in_rows * tiling.pitch, tiling.tiles_w);
  const int tile_floats = kChannels * images * image_pitch;

  // Load the weights, a row a warp, and the tile into zeros.
  const int taps = args.kernel_h * Traits::kKernelW;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const auto* weight = filters_of<Traits>(args, channel, taps);
  for (int e = 0; e < channels; ++e, weight += taps) {
    float* to = shared + (e * args.kernel_h + warp) * Traits::kWeightPitch;
    const auto* from = args.flip ? weight + taps - 1 - warp * Traits::kKernelW : weight + warp * Traits::kKernelW;
    const int step = args.flip ? -warps * Traits::kKernelW : warps * Traits::kKernelW;
#pragma unroll 4
    for (int i = warp; i < args.kernel_h; i += warps, to += warps * Traits::kWeightPitch, from += step)
#pragma unroll
      for (int j = 0; j < Traits::kKernelW; j += 32)
        if (j + lane < Traits::kKernelW) copy_one<T>(to + j + lane, args.flip ? from - j - lane : from + j + lane);
  }
  const int zeroed = divide_up(tile_floats + tiling.width + Traits::kSlack, 4);
  for (int k = threadIdx.x; k < zeroed; k += blockDim.x) reinterpret_cast<float4*>(tile)[k] = float4{};
  __syncthreads();
  if (in_rows > 0 && in_columns > 0) {
    const int64_t plane = static_cast<int64_t>(args.h) * args.w;
    float* corner = tile + in_column - first_column;
    if constexpr (Traits::kChannelsLast) {
      const T* input = static_cast<const T*>(args.input) + image * plane * in_c +
                       (static_cast<int64_t>(in_row) * args.w + in_column) * in_c + channel;
      const bool vectors = in_c % kChannels == 0 && reinterpret_cast<uintptr_t>(args.input) % 16 == 0;
      for (Walk at(threadIdx.x, blockDim.x, in_columns, in_rows); at.outer < images;) {
        constexpr int kBatch = Traits::kSumsParts ? 4 : 8;  // pixels loaded before the first is stored
        Vector<T, kChannels> pixel[kBatch];
        float* to[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const bool valid = at.outer < images;
          const T* from = input + (at.outer * plane + static_cast<int64_t>(at.middle) * args.w + at.inner) * in_c;
          to[b] = valid ? corner + at.outer * image_pitch + at.middle * tiling.pitch + at.inner : nullptr;
          if (vectors) {
            pixel[b] = load_or_zero<kChannels>(from, valid);
          } else {
#pragma unroll
            for (int e = 0; e < kChannels; ++e)
              pixel[b].value[e] = load_or_zero<1>(from + e, valid && e < channels).value[0];
          }
          at.advance();
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (to[b] == nullptr) continue;
#pragma unroll
          for (int e = 0; e < kChannels; ++e) to[b][e * images * image_pitch] = to_float(pixel[b].value[e]);
        }
      }
    } else {
      const T* input = static_cast<const T*>(args.input) + (image * in_c + channel / args.multiplier) * plane +
                       static_cast<int64_t>(in_row) * args.w + in_column;
      constexpr int kWord = 4;  // elements a load, where rows allow it
      const bool vectors = args.w % kWord == 0 && in_column % kWord == 0 && in_columns % kWord == 0 &&
                           reinterpret_cast<uintptr_t>(args.input) % 16 == 0;
      if (vectors) {
        for (Walk at(threadIdx.x, blockDim.x, in_columns / kWord, in_rows); at.outer < images;) {
          constexpr int kBatch = 8;  // words loaded before the first is stored
          Vector<T, kWord> word[kBatch];
          float* to[kBatch];
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            const bool valid = at.outer < images;
            word[b] = load_or_zero<kWord>(
                input + at.outer * in_c * plane + static_cast<int64_t>(at.middle) * args.w + at.inner * kWord, valid);
            to[b] = valid ? corner + at.outer * image_pitch + at.middle * tiling.pitch + at.inner * kWord : nullptr;
            at.advance();
          }
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            if (to[b] == nullptr) continue;
#pragma unroll
            for (int e = 0; e < kWord; ++e) to[b][e] = to_float(word[b].value[e]);
          }
        }
      } else {
        // Some threads a row; from row to row, all is added to.
        const int first = threadIdx.x % tiling.lanes, step = blockDim.x / tiling.lanes;
        int from_image = 0, from_row = threadIdx.x / tiling.lanes;
        const T* from = input + static_cast<int64_t>(from_row) * args.w + first;
        float* to = corner + from_row * tiling.pitch + first;
        const int64_t next_rows = static_cast<int64_t>(step) * args.w;
        const int64_t next_image = in_c * plane - static_cast<int64_t>(in_rows) * args.w;
        const int shared_rows = step * tiling.pitch, shared_image = image_pitch - in_rows * tiling.pitch;
#pragma unroll 1
        while (true) {
          while (from_row >= in_rows) from_row -= in_rows, ++from_image, from += next_image, to += shared_image;
          if (from_image >= images) break;
#pragma unroll 4
          for (int k = 0; k < in_columns - first; k += tiling.lanes) copy_one<T>(to + k, from + k);
          from_row += step, from += next_rows, to += shared_rows;
        }
      }
    }
  }
  wait_for_all_copies();

  // Compute. Threads count columns first, then images, then rows, so that the lanes of a warp share their rows.
  const int own_channel = threadIdx.x / tiling.threads;
  // Warps take turns from block to block and from wave to wave: those of other rows have other amounts of work.
  const unsigned turn = (blockIdx.x + blockIdx.x / 128) % (tiling.threads / 32) * 32;
  const int unit = static_cast<int>((threadIdx.x + turn) % tiling.threads);
  const int tile_w = unit % tiling.tiles_w;
  const int own_image = unit / tiling.tiles_w % images;
  const int tile_h = unit / tiling.tiles_w / images;
  const int row_step = Traits::kIsWide ? tiling.row_step : 1;
  const int begin_row = tile_h / row_step * row_step * kRows + tile_h % row_step;
  const bool exists =
      tile_h < tiling.tiles_h && begin_row < rows && tile_w * kColumns < columns && own_channel < channels;
  const int own_row = first_row + begin_row * Traits::kStrideH;  // input row of the window's row 0
  const float* zeros = tile + tile_floats + tile_w * kColumns * Traits::kStrideW;
  const float* window_row = tile + (own_channel * images + own_image) * image_pitch +
                            (own_row - in_row) * tiling.pitch + tile_w * kColumns * Traits::kStrideW;

  // Rows of the window that lie inside the image for any lane of the warp.
  const int window_rows = (kRows - 1) * row_step * Traits::kStrideH + last_tap + 1;
  int begin = exists ? max(0, -own_row) : window_rows;
  int end = exists ? min(window_rows, args.h - own_row) : 0;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    begin = min(begin, __shfl_xor_sync(~0u, begin, offset));
    end = max(end, __shfl_xor_sync(~0u, end, offset));
  }

  const float bias = own_channel < channels ? bias_of<Traits>(args, channel + own_channel) : 0.f;
  float sum[kRows][kColumns];
#pragma unroll
  for (int o = 0; o < kRows; ++o)
#pragma unroll
    for (int v = 0; v < kColumns; ++v) sum[o][v] = bias;

  const float* filter = shared + own_channel * args.kernel_h * Traits::kWeightPitch;
  const int weights_step = row_step * Traits::kStrideH * Traits::kWeightPitch;
  const float* row_weights = filter;
  // Wide: counted from the same row in all warps, so that it is known to be the same in all lanes.
#pragma unroll 1
  for (int r = Traits::kIsWide ? 0 : begin; r < (Traits::kIsWide ? window_rows : end);
       ++r, row_weights += Traits::kWeightPitch) {
    if (Traits::kIsWide && (r < begin || r >= end)) continue;
    const bool in_bounds = exists && static_cast<unsigned>(own_row + r - in_row) < static_cast<unsigned>(in_rows);
    const float* from = in_bounds ? window_row + r * tiling.pitch : zeros;
    // Kernel rows that the window's row meets, one of each row of outputs.
    unsigned meets = 0;
#pragma unroll
    for (int o = 0; o < kRows; ++o) {
      const int offset = r - o * row_step * Traits::kStrideH;
      if (offset >= 0 && offset <= last_tap && offset % Traits::kDilationH == 0) meets |= 1u << o;
    }
    const float* chunk_weights = row_weights;
#pragma unroll 1
    for (int chunk = 0; chunk < Traits::kChunks; ++chunk) {
      const bool is_whole = Traits::kLastTaps == Traits::kTaps || chunk < Traits::kChunks - 1;
      float window[Traits::kWindow];
#pragma unroll
      for (int k = 0; k < Traits::kWindow; k += Traits::kVector) {
        const auto part = *reinterpret_cast<const Vector<float, Traits::kVector>*>(from + k);
#pragma unroll
        for (int e = 0; e < Traits::kVector; ++e) window[k + e] = part.value[e];
      }
#pragma unroll
      for (int o = 0; o < kRows; ++o) {
        if ((meets & 1u << o) == 0) continue;
        const int kernel_row = (r - o * Traits::kStrideH) / Traits::kDilationH;
        const float* weights =
            Traits::kIsWide ? chunk_weights - o * weights_step : filter + kernel_row * Traits::kWeightPitch;
        float part[kColumns] = {};
#pragma unroll
        for (int j = 0; j < Traits::kTaps; j += 4) {
          const float4 four = *reinterpret_cast<const float4*>(weights + j);
          const float w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (int k = 0; k < 4 && j + k < Traits::kTaps; ++k) {
            if (j + k >= Traits::kLastTaps && !is_whole) continue;
#pragma unroll
            for (int v = 0; v < kColumns; ++v) {
              float& to = Traits::kSumsParts ? part[v] : sum[o][v];
              to = fmaf(window[v * Traits::kStrideW + (j + k) * Traits::kDilationW], w[k], to);
            }
          }
        }
        if constexpr (Traits::kSumsParts) {
#pragma unroll
          for (int v = 0; v < kColumns; ++v) sum[o][v] += part[v];
        }
      }
      from += Traits::kTaps * Traits::kDilationW;
      chunk_weights += Traits::kTaps;
    }
  }

  if constexpr (Traits::kVector == 4 && !Traits::kChannelsLast) {
    if (args.out_w % Traits::kVector == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0) {
      if (!exists) return;
      T* to = static_cast<T*>(args.out) +
              (((image + own_image) * args.out_c + channel) * args.out_h + row + begin_row) * args.out_w + column +
              tile_w * kColumns;
#pragma unroll
      for (int o = 0; o < kRows; ++o)
#pragma unroll
        for (int v = 0; v < kColumns; v += Traits::kVector) {
          if (begin_row + o * row_step >= rows || tile_w * kColumns + v >= columns) continue;
          float part[Traits::kVector];
#pragma unroll
          for (int e = 0; e < Traits::kVector; ++e) part[e] = sum[o][v + e];
          store_streaming<Traits::kVector>(to + static_cast<int64_t>(o * row_step) * args.out_w + v, part);
        }
      return;
    }
  }

  // Store, through shared memory: [channel][image][row][column].
  __syncthreads();
  if (exists) {
    float* stage = tile + ((own_channel * images + own_image) * rows + begin_row) * columns + tile_w * kColumns;
#pragma unroll
    for (int o = 0; o < kRows; ++o)
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
        if (begin_row + o * row_step < rows && tile_w * kColumns + v < columns)
          stage[o * row_step * columns + v] = sum[o][v];
  }
  __syncthreads();
  const int64_t plane = static_cast<int64_t>(args.out_h) * args.out_w;
  if constexpr (Traits::kChannelsLast) {
    T* out = static_cast<T*>(args.out) + image * plane * args.out_c +
             (static_cast<int64_t>(row) * args.out_w + column) * args.out_c + channel;
    const bool vectors = args.out_c % kChannels == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
    for (Walk at(threadIdx.x, blockDim.x, columns, rows); at.outer < images; at.advance()) {
      T* to = out + (at.outer * plane + static_cast<int64_t>(at.middle) * args.out_w + at.inner) * args.out_c;
      const float* from = tile + (at.outer * rows + at.middle) * columns + at.inner;
      float pixel[kChannels];
#pragma unroll
      for (int e = 0; e < kChannels; ++e) pixel[e] = e < channels ? from[e * images * rows * columns] : 0.f;
      if (vectors) {
        store_streaming<kChannels>(to, pixel);
      } else {
#pragma unroll
        for (int e = 0; e < kChannels; ++e)
          if (e < channels) to[e] = from_float<T>(pixel[e]);
      }
    }
  } else {
    T* out = static_cast<T*>(args.out) + (image * args.out_c + channel) * plane +
             static_cast<int64_t>(row) * args.out_w + column;
    constexpr int kWord = 4;
    if (args.out_w % kWord == 0 && columns % kWord == 0 && column % kWord == 0 &&
        reinterpret_cast<uintptr_t>(args.out) % 16 == 0) {
      for (Walk at(threadIdx.x, blockDim.x, columns / kWord, rows); at.outer < images; at.advance())
        store_streaming<kWord>(
            out + at.outer * args.out_c * plane + static_cast<int64_t>(at.middle) * args.out_w + at.inner * kWord,
            reinterpret_cast<const Vector<float, kWord>*>(
                tile)[(at.outer * rows + at.middle) * (columns / kWord) + at.inner]
                .value);
    } else {
      for (Walk at(threadIdx.x, blockDim.x, columns, rows); at.outer < images; at.advance())
        out[at.outer * args.out_c * plane + static_cast<int64_t>(at.middle) * args.out_w + at.inner] =
            from_float<T>(tile[(at.outer * rows + at.middle) * columns + at.inner]);
    }
  }
}

template <class Traits>
int launch_blocked(const DirectArgs& args, int, cudaStream_t stream) {
  const BlockedTiling tiling = blocked_tiling<Traits>(args, device_limits());
  if (tiling.threads == 0) return kTooLittleSharedMemory;
  const int bytes = blocked_shared_bytes<Traits>(args, tiling);
  if (const int error = allow_shared_bytes(blocked_kernel<Traits>, bytes)) return error;
  const int64_t blocks = divide_up<int64_t>(args.out_c, Traits::kChannels) *
                         divide_up(static_cast<int>(args.n), tiling.images) * tiling.blocks_w * tiling.blocks_h;
  blocked_kernel<Traits>
      <<<static_cast<unsigned>(blocks), tiling.threads * Traits::kChannels, bytes, stream>>>(args, tiling);
  return cudaGetLastError();
}

}  // namespace depthwise
