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

constexpr int power_of_two(int least) {
  int power = 1;
  while (power < least) power *= 2;
  return power;
}

// kOrigin: chunk of the input that the first chunk of a block's band lies in, for the block of output column 0.
// kImageChunks: chunks of an image row, where one block spans it and what lies outside is left out at compile time; 0:
// any width. kTilesW: a block's columns, in eights. kSlots: channels_last, warps that a channel's tiles are dealt to; 0:
// NCHW. kShared: channels_last with fewer channels than a block takes, whose warps share the kernel rows of tiles.
// kTall: sums of a few kernel rows are added up apart. kApart: kernel rows are taken so far apart. kTurned: rows are taken for
// columns and columns for rows, as the launcher turns its arguments. kSinceSm80: has more registers than there are before.
template <class T_, int kChunks_, int kStrideW_, int kOrigin_, int kImageChunks_, int kTilesW_, int kTilesH_,
          int kSlots_, bool kShared_, bool kTall_, int kApart_, bool kTurned_, bool kSinceSm80_>
struct ToeplitzTraits {
  using T = T_;
  static constexpr int kChunks = kChunks_, kStrideW = kStrideW_, kOrigin = kOrigin_, kTilesW = kTilesW_,
                       kTilesH = kTilesH_, kSlots = kSlots_, kApart = kApart_;
  static constexpr bool kChannelsLast = kSlots > 0, kShared = kShared_, kTall = kTall_, kTurned = kTurned_,
                        kSinceSm80 = kSinceSm80_, kPaired = false, kWholeRows = kImageChunks_ != 0;
  static constexpr int kColumns = kTilesW * kChunk;                    // of a block
  static constexpr int kChannels = kChannelsLast ? kChannelsNhwc : 1;  // of a block
  // NCHW: large blocks, as each has to lay out its channel's weights (32x128x56x56, 31x31, fp16, H200: 0.112 ms with eight
  // warps, 0.129 with four); but two a multiprocessor, and the widest take more than 128 registers a thread.
  // channels_last: one block a multiprocessor, for the weights of eight channels take much of its shared memory; of narrow
  // kernels two.
  static constexpr int kSums = kTilesW * kTilesH * (kTall ? 2 : 1);
  static constexpr bool kManyRegisters = kSums >= (kStrideW == 2 ? 12 : 16);
  static constexpr int kWarps = kChannelsLast ? kChannels * kSlots : kTilesW > 2 && kTilesW < 8 ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
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
  // Sums, input and weights of a kernel row, and what else there is.
  static constexpr bool kFewRegisters =
      kTilesH == 1 && 4 * kSums + 4 * (kEndPair - kFirstPair) + kChunks + 30 <= 65536 / 768;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  static constexpr int kBoundThreads = kManyRegisters ? 384 : kFewRegisters ? 768 : 512;
  static constexpr bool kInTwos = kSlots == 1 && kStrideW == 1 && !kManyRegisters;  // channels_last
#else
  static constexpr int kBoundThreads = kManyRegisters ? 384 : 512;
  static constexpr bool kInTwos = false;  // shared memory is for one
#endif
  static constexpr int kMinBlocks = kInTwos ? 2 : kChannelsLast ? 1 : kBoundThreads / kThreads;
  static constexpr int kStagePitch = kTilesW | 1;  // of the outputs

  // The products of output tile n, in steps. A product of K = 16 takes a pair of chunks, which ldmatrix puts into
  // neighbouring registers; what is left at either end of the band or of the image takes K = 8, two thirds of the time
  // (4.1 and 6.05 cycles of a partition, H100).
  static constexpr int kSteps = kChunks / 2 + 1;
  static constexpr int pair(int n, int step) { return n * kStrideW / 2 + step; }
  static constexpr bool used(int n, int chunk) {
    return chunk >= n * kStrideW && chunk < n * kStrideW + kChunks && chunk >= kLow && chunk < kHigh;
  }
};

// How a launch is cut into blocks, NCHW.
struct ToeplitzTiling {
  int rows;                   // of a block, counted through all images
  int tiles_w;                // blocks side by side
  int in_vector, out_vector;  // elements a copy
  int round;                  // blocks, one on each multiprocessor
  int part_bits;              // 1 << part_bits warps share the kernel rows of their tiles
  int held_tiles;             // of a warp
  SmallDivider part_divider;  // by those warps
  IntDivider row_divider{1};  // by rows of an output image
  IntDivider tiles_w_divider{1}, channel_divider{1};
};

// Rows of input of a unit of so many rows of outputs, at most. `all`: rows are counted through all images. Then a unit may
// be the last rows of an image, some whole ones, and the first rows of another.
inline int64_t toeplitz_in_rows(const DirectArgs& args, int64_t rows, bool all) {
  const int64_t stride = args.stride_h, span = (args.kernel_h - 1) * args.dilation_h + 1, h = args.h,
                out_h = args.out_h;
  int64_t most = min_int64(h, (min_int64(rows, out_h) - 1) * stride + span);
  if (!all) return most;
  const int64_t above = max_int64(0, h + args.padding_h - out_h * stride),
                below = max_int64(0, span - stride - args.padding_h);
  for (int64_t whole = max_int64(0, divide_up(rows, out_h) - 2); whole <= (rows - 2) / out_h; ++whole)
    most = max_int64(most, whole * h + min_int64(2 * h, (rows - whole * out_h) * stride + above + below));
  return min_int64(most, args.n * h);
}

// Rows of input that come to shared memory: of each image `height` rows from row `base` of the tensor's on, one image after
// the other; of all of these `count`, from the row `first` of the first image on.
struct LoadedRows {
  int base, height, first, count;
};

// What an NCHW block computes and reads: rows that follow each other, even if of several images. Rows of input are those
// inside the images that the first and the last row of outputs reach, and all between.
template <class Traits>
struct ToeplitzBlock {
  int image, channel, row, rows, column, columns;  // outputs; the first row's image, and its place there
  int in_row, in_rows, in_column, in_columns;      // input inside the images, from `image` on
  int offset;                                      // of in_column among the stored columns

  __device__ ToeplitzBlock(const DirectArgs& args, const ToeplitzTiling& tiling) {
    const int strip = tiling.tiles_w_divider.quotient(blockIdx.x), part = tiling.channel_divider.quotient(strip);
    column = (static_cast<int>(blockIdx.x) - strip * tiling.tiles_w) * Traits::kColumns;
    columns = min(Traits::kColumns, args.out_w - column);
    channel = strip - part * static_cast<int>(args.out_c);
    const int begin = part * tiling.rows;
    rows = min(tiling.rows, static_cast<int>(args.n) * args.out_h - begin);
    image = tiling.row_divider.quotient(begin);
    row = begin - image * args.out_h;

    const int last = row + rows - 1, last_image = tiling.row_divider.quotient(last);
    in_row = min(args.h, max(0, row * args.stride_h - args.padding_h));
    const int in_end =
        (last - last_image * args.out_h) * args.stride_h - args.padding_h + (args.kernel_h - 1) * args.dilation_h + 1;
    in_rows = max(0, last_image * args.h + min(args.h, max(0, in_end)) - in_row);
    const int origin = column * Traits::kStrideW + kChunk * Traits::kOrigin;
    const int stored = origin + 2 * kChunk * Traits::kFirstPair;
    in_column = max(0, stored);
    in_columns = max(0, min(args.w, origin + kChunk * Traits::kHigh) - in_column);
    offset = in_column - stored;
  }
};

// The input of an NCHW block, kVector elements a copy; rows start on a kVector boundary. `gap`: elements of shared memory
// between the rows of an image and those of the next.
template <int kVector, class Traits, class Block>
__device__ __forceinline__ void load_nchw(typename Traits::T* tile, const DirectArgs& args, const Block& block,
                                          const LoadedRows& rows, int gap) {
  using T = typename Traits::T;
  constexpr int kItem = kVector > 1 ? kVector : kEight;
  if (block.in_columns == 0 || rows.count <= 0) return;
  const int64_t plane = static_cast<int64_t>(args.h) * args.w;
  // Most multipliers are 1; of 64 bits, a division would be a call.
  const unsigned multiplier = args.multiplier, out_c = static_cast<unsigned>(args.out_c);
  const int64_t in_c = multiplier == 1 ? out_c : out_c / multiplier;
  const int channel = multiplier == 1 ? block.channel : block.channel / multiplier;
  const int64_t image_step = ptx::opaque(in_c * plane);
  const T* const input = ptx::opaque(static_cast<const T*>(args.input) + (block.image * in_c + channel) * plane +
                                     static_cast<int64_t>(rows.base) * args.w + block.in_column);
  tile += block.offset;
  if constexpr (kVector > 1) {
    // A power of two of lanes along a row: no divisions before the first copy either.
    constexpr int kLanes = power_of_two(Traits::kStored * kChunk / kItem), kStep = Traits::kThreads / kLanes;
    const int column = threadIdx.x % kLanes * kItem;
    if (column >= block.in_columns) return;
    int number = threadIdx.x / kLanes, row = rows.first + number;
    const T* from = input + (static_cast<int64_t>(row) * args.w + column);
    T* to = tile + number * Traits::kPitch * kChunk + column;
#pragma unroll 1
    for (; number < rows.count; number += kStep, row += kStep) {
      for (; row >= rows.height; row -= rows.height) {
        from += image_step - static_cast<int64_t>(rows.height) * args.w;
        to += gap;
      }
      copy_async<kVector * sizeof(T)>(to, from);
      from += kStep * args.w;
      to += kStep * Traits::kPitch * kChunk;
    }
  } else {
    const auto to = [&](const Walk& at) {
      const int number = at.outer * rows.height + at.middle - rows.first;
      return number * Traits::kPitch * kChunk + at.outer * gap + at.inner * kItem;
    };
    const auto from = [&](const Walk& at) {
      return input + at.outer * image_step + (at.middle * args.w + at.inner * kItem);
    };
    const int items = divide_up(block.in_columns, kItem), end = rows.first + rows.count;
    Walk at(threadIdx.x + rows.first * items, Traits::kThreads, items, rows.height);
    const auto exists = [&] { return at.outer * rows.height + at.middle < end; };
    // What is put together in registers is no asynchronous copy: several on their way at a time.
    static_assert(kEight == kChunk);
    constexpr int kAhead = 4;
    const UnalignedTensor tensor{args.input, static_cast<const T*>(args.input) + args.n * in_c * plane};
    const EightMask last = last_eight(block.in_columns);
#pragma unroll 1
    while (exists()) {
      UnalignedEight eight[kAhead];
      int target[kAhead];  // -1: none
      bool is_last[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k, at.advance()) {
        target[k] = -1;
        if (!exists()) continue;
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

// Zeros for what products meet of an NCHW block's rows beside the input, and for the row of zeros behind all of them.
template <class Traits>
__device__ __forceinline__ void zero_beside(typename Traits::T* tile, const ToeplitzBlock<Traits>& block, int rows,
                                            bool in_eights) {
  using T = typename Traits::T;
  auto* const chunks = reinterpret_cast<uint4*>(tile);
  const int thread = Traits::kThreads - 1 - threadIdx.x;  // those that copy least
  if (thread <= Traits::kPitch) chunks[rows * Traits::kPitch + thread] = uint4{};
  // What is loaded in eights is zeros behind the row's end.
  const int left = block.in_columns > 0 ? block.offset / kChunk : 0;
  const int end = block.in_columns > 0 ? block.offset + block.in_columns : 0, right = divide_up(end, kChunk);
  if (left == 0 && (in_eights ? right * kChunk : end) >= Traits::kStored * kChunk) return;
#pragma unroll 1
  for (int row = thread; row < rows; row += Traits::kThreads) {
    uint4* const to = chunks + row * Traits::kPitch;
#pragma unroll 1
    for (int k = 0; k < left; ++k) to[k] = uint4{};
#pragma unroll 1
    for (int k = end; k < right * kChunk && !in_eights; ++k) tile[row * Traits::kPitch * kChunk + k] = T{};
#pragma unroll 1
    for (int k = right; k < Traits::kStored; ++k) to[k] = uint4{};
  }
}

// One output over its own taps alone.
template <class Traits, bool kTurned = false>
__device__ __noinline__ float toeplitz_exact(const DirectArgs& args, int image, int channel, int row, int column) {
  using T = typename Traits::T;
  const int64_t in_c = args.out_c / args.multiplier, in_channel = channel / args.multiplier;
  const int64_t plane = static_cast<int64_t>(args.h) * args.w;
  const T* input =
      static_cast<const T*>(args.input) + image * in_c * plane + in_channel * (Traits::kChannelsLast ? 1 : plane);
  const int taps = args.kernel_h * args.kernel_w;
  const auto* const filter = filters_of<Traits>(args, channel, taps);
  float sum = bias_of<Traits>(args, channel);
  for (int tap = 0; tap < taps && sum == sum; ++tap) {
    const int i = tap / args.kernel_w, j = tap - i * args.kernel_w, at = kTurned ? j * args.kernel_h + i : tap;
    const int h = row * args.stride_h - args.padding_h + i * args.dilation_h;
    const int w = column * Traits::kStrideW - args.padding_w + j * args.dilation_w;
    if (h < 0 || h >= args.h || w < 0 || w >= args.w) continue;
    const int64_t pixel = kTurned ? static_cast<int64_t>(w) * args.h + h : static_cast<int64_t>(h) * args.w + w;
    sum = fmaf(load(input + pixel * (Traits::kChannelsLast ? in_c : 1)),
               load_for_sums<T>(filter + (args.flip ? taps - 1 - at : at)), sum);
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
// Rows are counted from row 0 of the block's first image on, here and below.
template <class Traits>
struct ToeplitzOutputs {
  using T = typename Traits::T;
  T* out;  // of the block's first image and column
  int64_t image_step;
  IntDivider divider;
  int out_h, out_w, row, end, columns, pitch;  // rows of the block; pitch: from run to run in shared memory
  bool whole;                                  // all rows of an image are one run

  __device__ ToeplitzOutputs(const DirectArgs& args, const ToeplitzTiling& tiling, const ToeplitzBlock<Traits>& block)
      : divider(tiling.row_divider) {
    const int64_t plane = static_cast<int64_t>(args.out_h) * args.out_w;
    out = static_cast<T*>(args.out) + (block.image * args.out_c + block.channel) * plane + block.column;
    image_step = args.out_c * plane;
    out_h = args.out_h, out_w = args.out_w;
    row = block.row, end = block.row + block.rows, columns = block.columns;
    whole = tiling.tiles_w == 1;
    pitch = divide_up((whole ? min(block.rows, out_h) * out_w : columns) + kChunk - 1, kChunk) * kChunk;
  }
  __device__ __forceinline__ int runs() const { return whole ? divider.quotient(end - 1) + 1 : end - row; }
  // The first row of a run, and how many elements it has.
  __device__ __forceinline__ int first_row(int run) const { return whole ? max(row, run * out_h) : row + run; }
  __device__ __forceinline__ int length(int run) const {
    return whole ? (min(end, (run + 1) * out_h) - first_row(run)) * out_w : columns;
  }
  __device__ __forceinline__ T* at(int row) const {
    const int image = divider.quotient(row);
    return out + image * image_step + static_cast<int64_t>(row - image * out_h) * out_w;
  }
  // How many elements of the first word are not the run's.
  __device__ __forceinline__ static int skew(const T* run) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(run) / sizeof(T) % kChunk);
  }
  // Where a row of outputs begins in shared memory.
  __device__ __forceinline__ int offset(int row_) const {
    const int run = whole ? divider.quotient(row_) : row_ - row, first = first_row(run);
    return run * pitch + skew(at(first)) + (row_ - first) * out_w;
  }
  __device__ __forceinline__ T exact(const DirectArgs& args, const ToeplitzBlock<Traits>& block, int row,
                                     int column) const {
    const int image = divider.quotient(row);
    return from_float<T>(
        toeplitz_exact<Traits>(args, block.image + image, block.channel, row - image * out_h, block.column + column));
  }
};

// The block's outputs to memory; `poisoned`: some may be NaN that should not.
template <class Traits>
__device__ __forceinline__ void store_aligned(const typename Traits::T* staged, const ToeplitzOutputs<Traits>& stage,
                                              const DirectArgs& args, const ToeplitzBlock<Traits>& block,
                                              bool poisoned) {
  using T = typename Traits::T;
  constexpr int kLanes = power_of_two(Traits::kTilesW), kStep = Traits::kThreads / kLanes;
  const int column = threadIdx.x % kLanes * kChunk;
  if (column >= block.columns) return;
#pragma unroll 1
  for (int row = threadIdx.x / kLanes; row < block.rows; row += kStep) {
    auto values = *reinterpret_cast<const Vector<T, kChunk>*>(staged + row * Traits::kStagePitch * kChunk + column);
    if (poisoned)
      for (int k = 0; k < kChunk; ++k)
        if (is_nan(values.value[k])) values.value[k] = stage.exact(args, block, block.row + row, column + k);
    store_streaming(stage.at(block.row + row) + column, values);
  }
}

template <class Traits>
__device__ __forceinline__ void store_runs(const typename Traits::T* staged, const ToeplitzOutputs<Traits>& stage,
                                           const DirectArgs& args, const ToeplitzBlock<Traits>& block, bool poisoned) {
  using T = typename Traits::T;
  const int words = stage.pitch / kChunk, runs = stage.runs();
  for (Walk at(threadIdx.x, Traits::kThreads, words, runs); at.outer == 0; at.advance()) {
    const int first = stage.first_row(at.middle), length = stage.length(at.middle);
    T* const run = stage.at(first);
    auto values = *reinterpret_cast<const Vector<T, kChunk>*>(staged + at.middle * stage.pitch + at.inner * kChunk);
    const int begin = at.inner * kChunk - stage.skew(run);
    const auto exists = [&](int k) { return begin + k >= 0 && begin + k < length; };
    if (poisoned)
      for (int k = 0; k < kChunk; ++k)
        if (exists(k) && is_nan(values.value[k])) {
          const int down = stage.whole ? (begin + k) / stage.out_w : 0;
          values.value[k] = stage.exact(args, block, first + down, begin + k - down * stage.out_w);
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
  // Exact quotients: offset * dilation_w < 2^16.
  const int inverse = args.dilation_w == 1 ? (1 << 16) + 1 : (1 << 16) / args.dilation_w + 1;
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
      column[k][half] = exists ? sign * j * (Traits::kTurned ? args.kernel_h : 1) : 0;
      mask[k][half] = exists ? 0xffff : 0;
    }
  // All loads of some rows before their first store, which a load from shared memory may not pass.
#pragma unroll 1
  for (int first = first_row; first < args.kernel_h; first += kTogether * row_step) {
    unsigned words[kTogether][kRounds];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      const int i = min(first + t * row_step, args.kernel_h - 1);
      const int row = (args.flip ? last_tap : 0) + sign * i * (Traits::kTurned ? 1 : args.kernel_w);
#pragma unroll
      for (int k = 0; k < kRounds; ++k) {
        const unsigned low = read(row + column[k][0]) & mask[k][0], high = read(row + column[k][1]) & mask[k][1];
        words[t][k] = low | high << 16;
      }
    }
#pragma unroll
    for (int t = 0; t < kTogether; ++t)
#pragma unroll
      for (int k = 0; k < kRounds; ++k) {
        const int i = first + t * row_step, y = k * 32 + threadIdx.x % 32;
        if (i < args.kernel_h && y < Traits::kBand) pairs[i * Traits::kBand + y] = words[t][k];
      }
  }
}

template <class Traits, class Block>
__device__ __forceinline__ void load_weights(unsigned* pairs, const DirectArgs& args, const Block& block) {
  const auto* const filter = filters_of<Traits>(args, block.channel, args.kernel_h * args.kernel_w);
  lay_out_weights<Traits>(pairs, args, threadIdx.x / 32, Traits::kWarps,
                          [&](int tap) -> unsigned { return load_rounded<typename Traits::T>(filter + tap).bits; });
}

}  // namespace depthwise
