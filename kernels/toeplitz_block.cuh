// What a block of toeplitz.cuh is: its sizes, and of NCHW what it computes and reads, how images and weights come to shared
// memory and outputs leave it. band_images.cuh loads as it does.
#pragma once

#include "direct.cuh"
#include "tensor_core.cuh"
#include "unaligned.cuh"

namespace depthwise {

constexpr int kChunk = 8;         // columns: one row of an ldmatrix, 16 bytes
constexpr int kTileRows = 16;     // of a product
constexpr int kChannelsNhwc = 8;  // of a block: 16 bytes a pixel
constexpr int kOutside = -(1 << 30);
constexpr int kPartitions = 4;  // of a multiprocessor: warp w of a block is on partition w % 4

// kOrigin: chunk of the input that the first chunk of a block's band lies in, for the block of output column 0.
// kImageChunks: chunks of an image row, where one block spans it and what lies outside is left out at compile time; 0:
// any width. kTilesW: a block's columns, in eights.
template <class T_, int kChunks_, int kStrideW_, int kOrigin_, int kImageChunks_, int kTilesW_, int kTilesH_,
          bool kChannelsLast_>
struct ToeplitzTraits {
  using T = T_;
  static constexpr int kChunks = kChunks_, kStrideW = kStrideW_, kOrigin = kOrigin_, kTilesW = kTilesW_,
                       kTilesH = kTilesH_;
  static constexpr bool kChannelsLast = kChannelsLast_, kWholeRows = kImageChunks_ != 0;
  static constexpr int kColumns = kTilesW * kChunk;                    // of a block
  static constexpr int kChannels = kChannelsLast ? kChannelsNhwc : 1;  // of a block
  // NCHW: large blocks, as each has to lay out its channel's weights (32x128x56x56, 31x31, fp16, H200: 0.112 ms with eight
  // warps, 0.129 with four); but two a multiprocessor, and the widest take more than 128 registers a thread.
  // channels_last: one block a multiprocessor, for the weights of eight channels take much of its shared memory.
  static constexpr bool kManyRegisters =
      kStrideW == 2 ? kTilesW * kTilesH >= (kChannelsLast ? 8 : 12)
                    : kTilesW * kTilesH >= 16 && (!kChannelsLast || kChunks > 6 || kChunks < 4);
  static constexpr int kWarps = kChannelsLast ? (kManyRegisters ? 8 : 16) : kTilesW > 2 && kTilesW < 8 ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  // Sixteen warps with more registers than there are before sm_80, where products of bfloat16 are calls.
  static constexpr bool kSinceSm80 = kChannelsLast && kWarps == 16 && (is_bfloat16<T_> || kTilesW * kTilesH >= 14);
  static constexpr int kMinBlocks = kChannelsLast ? 1 : (kManyRegisters ? 384 : 512) / kThreads;
  // Pairs of weights a kernel row: the band of eight outputs, from the last output's first column on.
  static constexpr int kBand = kChunk * kChunks + (kChunk - 1) * kStrideW - 1;

  // Chunks that the block's band touches; [kLow, kHigh) may lie inside the image. They are fetched in pairs, by ldmatrix,
  // and stored from the first pair on: an odd number a row. What a pair has beyond kHigh is not multiplied.
  static constexpr int kChunksIn = (kTilesW - 1) * kStrideW + kChunks;
  static constexpr int kLow = kWholeRows ? max_int(0, -kOrigin) : 0;
  static constexpr int kHigh = kWholeRows ? min_int(kChunksIn, kImageChunks_ - kOrigin) : kChunksIn;
  static_assert(kLow < kHigh);
  static constexpr int kFirstPair = kLow / 2, kEndPair = (kHigh + 1) / 2;
  static constexpr int kStored = kHigh - 2 * kFirstPair, kPitch = kStored | 1;
  static constexpr int kStagePitch = kTilesW | 1;  // of the outputs

  // The products of output tile n, in steps. A product of K = 16 takes a pair of chunks, which ldmatrix puts into
  // neighbouring registers; what is left at either end of the band or of the image takes K = 8.
  static constexpr int kSteps = kChunks / 2 + 1;
  static constexpr int pair(int n, int step) { return n * kStrideW / 2 + step; }
  static constexpr bool used(int n, int chunk) {
    return chunk >= n * kStrideW && chunk < n * kStrideW + kChunks && chunk >= kLow && chunk < kHigh;
  }
};

// How a launch is cut into blocks, NCHW.
struct ToeplitzTiling {
  int images, rows;           // of a block; more than one image only where `rows` is the whole image
  int tiles_h, tiles_w;       // blocks of an image
  int in_vector, out_vector;  // elements a copy
  int round;                  // blocks, one on each multiprocessor
  IntDivider row_divider{1};  // by rows of an output image
};

// What an NCHW block computes and reads.
template <class Traits>
struct ToeplitzBlock {
  int image, images, channel, row, rows, column, columns;  // outputs
  int in_row, in_rows, in_column, in_columns;              // input inside the image
  int offset;                                              // of in_column among the stored columns

  __device__ ToeplitzBlock(const DirectArgs& args, const ToeplitzTiling& tiling) {
    const unsigned channels = static_cast<unsigned>(args.out_c);
    unsigned block = blockIdx.x;
    column = block % tiling.tiles_w * Traits::kColumns, block /= tiling.tiles_w;
    row = block % tiling.tiles_h * tiling.rows, block /= tiling.tiles_h;
    channel = block % channels;
    image = block / channels * tiling.images;
    images = min(tiling.images, static_cast<int>(args.n) - image);
    rows = min(tiling.rows, args.out_h - row);
    columns = min(Traits::kColumns, args.out_w - column);

    in_row = max(0, row * args.stride_h - args.padding_h);
    const int in_end = (row + rows - 1) * args.stride_h - args.padding_h + (args.kernel_h - 1) * args.dilation_h + 1;
    in_rows = max(0, min(args.h, in_end) - in_row);
    const int origin = column * Traits::kStrideW + kChunk * Traits::kOrigin;
    const int stored = origin + 2 * kChunk * Traits::kFirstPair;
    in_column = max(0, stored);
    in_columns = max(0, min(args.w, origin + kChunk * Traits::kHigh) - in_column);
    offset = in_column - stored;
  }
};

// The input of an NCHW block, kVector elements a copy; rows start on a kVector boundary. `image_pitch`: elements from
// image to image.
template <int kVector, class Traits, class Block>
__device__ __forceinline__ void load_nchw(typename Traits::T* tile, const DirectArgs& args, const Block& block,
                                          int image_pitch) {
  using T = typename Traits::T;
  constexpr int kItem = kVector > 1 ? kVector : kEight;
  if (block.in_columns == 0 || block.in_rows == 0) return;
  const int64_t plane = static_cast<int64_t>(args.h) * args.w;
  const int64_t in_c = args.out_c / args.multiplier, image_step = ptx::opaque(in_c * plane);
  const T* const input =
      ptx::opaque(static_cast<const T*>(args.input) + (block.image * in_c + block.channel / args.multiplier) * plane +
                  static_cast<int64_t>(block.in_row) * args.w + block.in_column);
  tile += block.offset;
  const auto to = [&](const Walk& at) {
    return at.outer * image_pitch + at.middle * Traits::kPitch * kChunk + at.inner * kItem;
  };
  const auto from = [&](const Walk& at) {
    return input + at.outer * image_step + (at.middle * args.w + at.inner * kItem);
  };
  Walk at(threadIdx.x, Traits::kThreads, divide_up(block.in_columns, kItem), block.in_rows);
  if constexpr (kVector > 1) {
    for (; at.outer < block.images; at.advance()) copy_async<kVector * sizeof(T)>(tile + to(at), from(at));
  } else {
    // What is put together in registers is no asynchronous copy: several on their way at a time.
    static_assert(kEight == kChunk);
    constexpr int kAhead = 4;
    const UnalignedTensor tensor{args.input, static_cast<const T*>(args.input) + args.n * in_c * plane};
    const EightMask last = last_eight(block.in_columns);
#pragma unroll 1
    while (at.outer < block.images) {
      UnalignedEight eight[kAhead];
      int target[kAhead];  // -1: none
      bool is_last[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k, at.advance()) {
        target[k] = -1;
        if (at.outer >= block.images) continue;
        is_last[k] = at.inner == at.inners - 1;
        if (eight[k].load(tensor, from(at)))
          target[k] = to(at);
        else
          copy_eight(tile + to(at), from(at), block.in_columns - at.inner * kChunk);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (target[k] >= 0) eight[k].store(tile + target[k], last, is_last[k] ? 0 : ~0u);
    }
  }
}

// One output over its own taps alone.
template <class Traits>
__device__ __noinline__ float toeplitz_exact(const DirectArgs& args, int image, int channel, int row, int column) {
  using T = typename Traits::T;
  const int64_t in_c = args.out_c / args.multiplier, in_channel = channel / args.multiplier;
  const int64_t plane = static_cast<int64_t>(args.h) * args.w;
  const T* input =
      static_cast<const T*>(args.input) + image * in_c * plane + in_channel * (Traits::kChannelsLast ? 1 : plane);
  const int taps = args.kernel_h * args.kernel_w;
  const T* filter = static_cast<const T*>(args.weight) + static_cast<int64_t>(channel) * taps;
  float sum = args.bias ? load(static_cast<const T*>(args.bias) + channel) : 0.f;
  for (int tap = 0; tap < taps && sum == sum; ++tap) {
    const int h = row * args.stride_h - args.padding_h + tap / args.kernel_w * args.dilation_h;
    const int w = column * Traits::kStrideW - args.padding_w + tap % args.kernel_w * args.dilation_w;
    if (h < 0 || h >= args.h || w < 0 || w >= args.w) continue;
    const int64_t pixel = static_cast<int64_t>(h) * args.w + w;
    sum = fmaf(load(input + pixel * (Traits::kChannelsLast ? in_c : 1)),
               load(filter + (args.flip ? taps - 1 - tap : tap)), sum);
  }
  return sum;
}

template <class T>
__device__ __forceinline__ bool is_nan(T value) {
  const float wide = to_float(value);
  return wide != wide;
}

// Where an NCHW block's outputs are staged. On 16-byte boundaries: row by row. On others: each run of outputs that lie
// side by side in memory, all rows of an image or one, as it lies within words of 16 bytes.
template <class Traits>
struct ToeplitzOutputs {
  using T = typename Traits::T;
  T* out;  // of the block's first output
  int64_t image_step;
  int out_w, rows, length, pitch;  // length: of a run; pitch: from run to run in shared memory
  bool whole;                      // all rows are one run

  __device__ ToeplitzOutputs(const DirectArgs& args, const ToeplitzTiling& tiling, const ToeplitzBlock<Traits>& block) {
    const int64_t plane = static_cast<int64_t>(args.out_h) * args.out_w;
    out = static_cast<T*>(args.out) + (block.image * args.out_c + block.channel) * plane +
          static_cast<int64_t>(block.row) * args.out_w + block.column;
    image_step = args.out_c * plane;
    out_w = args.out_w;
    rows = block.rows;
    whole = tiling.tiles_w == 1;
    length = whole ? rows * out_w : block.columns;
    pitch = divide_up(length + kChunk - 1, kChunk) * kChunk;
  }
  __device__ __forceinline__ int runs_of_image() const { return whole ? 1 : rows; }  // runs of an image
  __device__ __forceinline__ T* run(int image, int row) const { return out + image * image_step + row * out_w; }
  // How many elements of the first word are not the run's.
  __device__ __forceinline__ static int skew(const T* run) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(run) / sizeof(T) % kChunk);
  }
  // Where a row of outputs begins in shared memory.
  __device__ __forceinline__ int offset(int image, int row) const {
    return whole ? image * pitch + skew(run(image, 0)) + row * out_w
                 : (image * rows + row) * pitch + skew(run(image, row));
  }
};

// The block's outputs to memory; `poisoned`: some may be NaN that should not.
template <class Traits>
__device__ __forceinline__ void store_aligned(const typename Traits::T* staged, const ToeplitzOutputs<Traits>& stage,
                                              const DirectArgs& args, const ToeplitzBlock<Traits>& block,
                                              bool poisoned) {
  using T = typename Traits::T;
  for (Walk at(threadIdx.x, Traits::kThreads, divide_up(block.columns, kChunk), block.rows); at.outer < block.images;
       at.advance()) {
    const int column = at.inner * kChunk;
    auto values = *reinterpret_cast<const Vector<T, kChunk>*>(
        staged + (at.outer * block.rows + at.middle) * Traits::kStagePitch * kChunk + column);
    if (poisoned)
      for (int k = 0; k < kChunk; ++k)
        if (is_nan(values.value[k]))
          values.value[k] = from_float<T>(toeplitz_exact<Traits>(args, block.image + at.outer, block.channel,
                                                                 block.row + at.middle, block.column + column + k));
    store_streaming(stage.run(at.outer, at.middle) + column, values);
  }
}

template <class Traits>
__device__ __forceinline__ void store_runs(const typename Traits::T* staged, const ToeplitzOutputs<Traits>& stage,
                                           const DirectArgs& args, const ToeplitzBlock<Traits>& block, bool poisoned) {
  using T = typename Traits::T;
  const int runs = stage.runs_of_image();
  for (Walk at(threadIdx.x, Traits::kThreads, stage.pitch / kChunk, runs); at.outer < block.images; at.advance()) {
    T* const run = stage.run(at.outer, at.middle);
    auto values = *reinterpret_cast<const Vector<T, kChunk>*>(staged + (at.outer * runs + at.middle) * stage.pitch +
                                                              at.inner * kChunk);
    const int begin = at.inner * kChunk - stage.skew(run);
    const auto exists = [&](int k) { return begin + k >= 0 && begin + k < stage.length; };
    if (poisoned)
      for (int k = 0; k < kChunk; ++k)
        if (exists(k) && is_nan(values.value[k])) {
          const int row = stage.whole ? (begin + k) / stage.out_w : at.middle;
          const int column = stage.whole ? begin + k - row * stage.out_w : begin + k;
          values.value[k] = from_float<T>(toeplitz_exact<Traits>(args, block.image + at.outer, block.channel,
                                                                 block.row + row, block.column + column));
        }
    if (exists(0) && exists(kChunk - 1)) {
      store_streaming(run + begin, values);
    } else {
#pragma unroll
      for (int k = 0; k < kChunk; ++k)
        if (exists(k)) run[begin + k] = values.value[k];
    }
  }
}

// The weights of a channel as words of neighbours: word y of a kernel row holds the taps at y and y + 1 columns from the
// first that the last of eight outputs meets. A warp lays out every row_step-th kernel row; read(tap): bits of a weight.
template <class Traits, class Read>
__device__ __forceinline__ void lay_out_weights(unsigned* pairs, const DirectArgs& args, int first_row, int row_step,
                                                Read read) {
  constexpr int kRounds = divide_up(Traits::kBand, 32), kTogether = 4;  // of a row; rows whose loads go together
  const int inverse = (1 << 16) / args.dilation_w + 1;                  // exact quotients: offset * dilation_w < 2^16
  const int last_tap = args.kernel_h * args.kernel_w - 1, sign = args.flip ? -1 : 1;
  int column[kRounds][2];     // of the kernel, as an offset
  unsigned mask[kRounds][2];  // 0: there is none
#pragma unroll
  for (int k = 0; k < kRounds; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int y = k * 32 + threadIdx.x % 32 + half;
      const int offset = y - (kChunk - 1) * Traits::kStrideW + kChunk * Traits::kOrigin + args.padding_w;
      const int j = max(offset, 0) * inverse >> 16;
      const bool exists = offset >= 0 && j < args.kernel_w && j * args.dilation_w == offset;
      column[k][half] = exists ? sign * j : 0;
      mask[k][half] = exists ? 0xffff : 0;
    }
  // No branches around the loads: all of an unrolled step are on their way together.
#pragma unroll kTogether
  for (int i = first_row; i < args.kernel_h; i += row_step) {
    const int row = (args.flip ? last_tap : 0) + sign * i * args.kernel_w;
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
      const int y = k * 32 + threadIdx.x % 32;
      const unsigned low = read(row + column[k][0]) & mask[k][0], high = read(row + column[k][1]) & mask[k][1];
      if (y < Traits::kBand) pairs[i * Traits::kBand + y] = low | high << 16;
    }
  }
}

// Of an NCHW block's channel.
template <class Traits, class Block>
__device__ __forceinline__ void load_weights(unsigned* pairs, const DirectArgs& args, const Block& block) {
  const auto* const filter = static_cast<const typename Traits::T*>(args.weight) +
                             static_cast<int64_t>(block.channel) * args.kernel_h * args.kernel_w;
  lay_out_weights<Traits>(pairs, args, threadIdx.x / 32, Traits::kWarps,
                          [&](int tap) -> unsigned { return __ldg(&filter[tap].bits); });
}

}  // namespace depthwise
