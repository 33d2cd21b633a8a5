// The channels_last kernel of toeplitz.cuh.
//
// Owns    a block takes eight channels, whose weights it lays out once, and computes units of some rows of outputs one after
//         the other. Rows are counted through all images, so that sixteen of a product are sixteen outputs; or from each
//         image's first on, where that wastes little and reads less. A channel's tiles are dealt to two warps, or to more
//         where there are fewer channels.
// Reads   eight channels of a pixel, 16 bytes, are an asynchronous copy. While a unit is multiplied, half of the warps
//         fetch the pixels of the next to shared memory as they lie; then ldmatrix turns eight pixels of eight channels
//         around in registers, and they are stored channel by channel. Where there is no room for both, or tensors are not
//         aligned, pixels are loaded when the unit before is done.
// Writes  outputs are staged channel by channel where the input was; ldmatrix turns them around into pixels.
// Memory  weights; input rows of eight channels, planes half the banks apart, or outputs; a row of zeros; pixels to come.
//         31x31 on 56x56, 64 rows of outputs a unit: 44.6 + 82.8 + 0.1 + 82.3 KB. One block a multiprocessor.
// Times   fp16, us, H100: 31x31 on 32x128x56x56: 112, with an image's rows from a new tile on 117, with nothing fetched
//         ahead 122; 29x29 on 32x256x28x28: 58, 69, 62; on 16x200x48x48: 67, 64, 74; 27x27 on 32x40x33x47: 24.3, 26.9,
//         25.7; 13x13 on 32x200x20x20: 22.5, 34, 26. All warps fetch: 115, 60, 69, 24.1, 23.1.
#pragma once

#include "toeplitz_products.cuh"

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
  int plane, stage;            // chunks from channel to channel, of the input and of the staged outputs
  int tile;                    // chunks of all of them
  int rest_slots;              // of a group that has fewer channels: warps a channel
  SmallDivider rest_divider;   // by those channels
  bool ahead;                  // pixels come while others are multiplied
  bool in_pixels, out_pixels;  // are aligned

  __device__ __forceinline__ int first_item(int part) const { return part * share + min(part, longer); }
};
// Planes half the banks apart.
constexpr int plane_chunks(int chunks) { return divide_up(chunks, 8) * 8 + 4; }

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
           ((static_cast<int64_t>(image) * args.h + in_row) * args.w + first_column) * args.out_c +
           blockIdx.x * Traits::kChannels;
  }
};

template <class Traits>
__device__ __forceinline__ int block_channels(const DirectArgs& args) {
  return min(Traits::kChannels, static_cast<int>(args.out_c - blockIdx.x * Traits::kChannels));
}

// The filters as they lie in memory come to where the input will be.
template <class Traits>
__device__ __forceinline__ void fetch_weights(typename Traits::T* staged, const DirectArgs& args, int channel,
                                              int channels) {
  using T = typename Traits::T;
  const int taps = args.kernel_h * args.kernel_w, elements = channels * taps;
  const T* const filters = static_cast<const T*>(args.weight) + static_cast<int64_t>(channel) * taps;
  if (reinterpret_cast<uintptr_t>(filters) % kChunkBytes == 0) {
    for (int k = threadIdx.x * kChunk; k < elements; k += Traits::kThreads * kChunk)
      copy_16_async(staged + k, filters + k, min(kChunk, elements - k) * static_cast<int>(sizeof(T)));
  } else {
#pragma unroll 8
    for (int k = threadIdx.x; k < elements; k += Traits::kThreads)
      staged[k] = load_or_zero<1>(filters + k, true).value[0];
  }
}

// A unit's pixels as they lie, in the order of the chunks that they are to fill, with zeros outside the image; within a
// chunk such that the eight rows of a matrix that turn_pixels reads lie in banks of their own. The calling thread is the
// thread `worker` of so many.
template <class Traits>
__device__ __forceinline__ void fetch_pixels(typename Traits::T* pixels, const DirectArgs& args,
                                             const ToeplitzUnit<Traits>& unit, int worker, int workers) {
  constexpr int kColumns = Traits::kStored * kChunk;
  const int all = unit.in_rows * kColumns, first_column = unit.first_column;
  const auto* const input = unit.input(args);
#pragma unroll kTogether
  for (int k = worker; k < all; k += workers) {
    const int row = k / kColumns, column = k - row * kColumns, chunk = row * Traits::kPitch + column / kChunk;
    const int place = chunk * kChunk + (k % kChunk ^ chunk % kTurned * 2);
    const bool in_bounds = static_cast<unsigned>(first_column + column) < static_cast<unsigned>(args.w);
    copy_async<kChunkBytes>(pixels + place * kChunk, input + (row * args.w + column) * args.out_c, in_bounds);
  }
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

// The same from memory: a thread turns two neighbouring pixels.
template <class Traits>
__device__ __forceinline__ void load_pixels(typename Traits::T* tile, const DirectArgs& args,
                                            const ToeplitzNhwcTiling& tiling, const ToeplitzUnit<Traits>& unit) {
  using T = typename Traits::T;
  using Pixel = Vector<T, kChannelsNhwc>;
  const int channels = block_channels<Traits>(args), rows = unit.in_rows, first_column = unit.first_column;
  const T* const input = unit.input(args);
  constexpr int kAhead = 2;
  Walk at(ptx::thread_index(), Traits::kThreads, Traits::kStored * kChunk / 2, max(1, rows));
  while (at.outer == 0 && at.middle < rows) {
    Pixel left[kAhead], right[kAhead];
    T* target[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k, at.advance()) {
      const T* const from = input + (static_cast<int64_t>(at.middle) * args.w + 2 * at.inner) * args.out_c;
      const int column = first_column + 2 * at.inner;
      const bool exists = at.outer == 0 && at.middle < rows;
      const bool has_left = exists && static_cast<unsigned>(column) < static_cast<unsigned>(args.w);
      const bool has_right = exists && static_cast<unsigned>(column + 1) < static_cast<unsigned>(args.w);
      target[k] = exists ? tile + at.middle * Traits::kPitch * kChunk + 2 * at.inner : nullptr;
      if (tiling.in_pixels) {
        left[k] = load_or_zero<kChannelsNhwc>(from, has_left);
        right[k] = load_or_zero<kChannelsNhwc>(from + args.out_c, has_right);
      } else {
#pragma unroll
        for (int e = 0; e < kChannelsNhwc; ++e) {
          left[k].value[e] = load_or_zero<1>(from + e, has_left && e < channels).value[0];
          right[k].value[e] = load_or_zero<1>(from + args.out_c + e, has_right && e < channels).value[0];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (target[k] != nullptr)
#pragma unroll
        for (int e = 0; e < kChannelsNhwc; ++e)
          *reinterpret_cast<unsigned*>(target[k] + e * tiling.plane * kChunk) =
              left[k].value[e].bits | static_cast<unsigned>(right[k].value[e].bits) << 16;
  }
}

// Staged outputs that are NaN, computed again.
template <class Traits>
__device__ __noinline__ void mend_outputs(typename Traits::T* staged, const DirectArgs& args,
                                          const ToeplitzNhwcTiling& tiling, const ToeplitzUnit<Traits>& unit) {
  const int rows = unit.rows, columns = min(Traits::kColumns, args.out_w - unit.column);
  const int channels = block_channels<Traits>(args), channel = blockIdx.x * Traits::kChannels;
  for (Walk at(ptx::thread_index(), Traits::kThreads, columns, rows); at.outer < channels; at.advance()) {
    auto& value = staged[(at.outer * tiling.stage + at.middle * Traits::kStagePitch) * kChunk + at.inner];
    const int image = (unit.row + at.middle) / args.out_h;
    if (is_nan(value))
      value = from_float<typename Traits::T>(toeplitz_exact<Traits>(args, unit.image + image, channel + at.outer,
                                                                    unit.row + at.middle - image * args.out_h,
                                                                    unit.column + at.inner));
  }
}

// Lane 4 * g + t gets pixel g of chunk t.
template <class Traits>
__device__ __forceinline__ void store_pixels(const typename Traits::T* staged, const DirectArgs& args,
                                             const ToeplitzNhwcTiling& tiling, const ToeplitzUnit<Traits>& unit) {
  using T = typename Traits::T;
  constexpr int kStep = Traits::kWarps * kTurned;
  const int thread = ptx::thread_index(), lane = thread % 32, first = thread / 32 * kTurned;
  const int chunks = unit.rows * Traits::kStagePitch, columns = args.out_w - unit.column;
  const int channels = block_channels<Traits>(args);
  // Row r of matrix m is channel 2 * m + r % 2 of chunk r / 2.
  unsigned from =
      ptx::shared_address(staged) + ((lane / 8 * 2 + lane % 2) * tiling.stage + first + lane % 8 / 2) * kChunkBytes;
  T* const out = static_cast<T*>(args.out) +
                 ((static_cast<int64_t>(unit.image) * args.out_h + unit.row) * args.out_w + unit.column) * args.out_c +
                 blockIdx.x * Traits::kChannels;
  // Several loads before the first use, several stores before registers are used again.
#pragma unroll 1
  for (int first_chunk = first; first_chunk < chunks; first_chunk += kTogether * kStep) {
    union {
      unsigned word[4];
      Vector<T, kChannelsNhwc> vector;
    } values[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      if (first_chunk + j * kStep < chunks)
        ptx::load_matrices_transposed(values[j].word, from + j * kStep * kChunkBytes);
    from += kTogether * kStep * kChunkBytes;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int chunk = first_chunk + j * kStep + lane % 4, row = chunk / Traits::kStagePitch;  // of all images
      const int column = (chunk - row * Traits::kStagePitch) * kChunk + lane / 4;
      if (chunk >= chunks || column >= min(Traits::kColumns, columns)) continue;
      T* const to = out + (row * args.out_w + column) * args.out_c;
      if (tiling.out_pixels) {
        store_streaming(to, values[j].vector);
      } else {
#pragma unroll
        for (int e = 0; e < kChannelsNhwc; ++e)
          if (e < channels) to[e] = values[j].vector.value[e];
      }
    }
  }
}

// A channel's tiles are dealt to `slots` warps.
template <class Traits>
struct ToeplitzSlot {
  int channel, slots, slot;

  __device__ __forceinline__ ToeplitzSlot(const DirectArgs& args, const ToeplitzNhwcTiling& tiling) {
    const int channels = ptx::opaque(block_channels<Traits>(args)), warp = ptx::thread_index() / 32;
    const bool all = channels == Traits::kChannels;
    slots = all ? Traits::kWarps / Traits::kChannels : tiling.rest_slots;
    slot = all ? warp / Traits::kChannels : tiling.rest_divider.quotient(warp);
    channel = warp - slot * channels;
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    toeplitz_nhwc_kernel(const __grid_constant__ DirectArgs args, const __grid_constant__ ToeplitzNhwcTiling tiling) {
  using T = typename Traits::T;
  using Unit = ToeplitzUnit<Traits>;
  using Slot = ToeplitzSlot<Traits>;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  if constexpr (Traits::kSinceSm80) return;
#endif
  extern __shared__ __align__(16) unsigned char shared_memory[];
  // What a unit is takes no registers while products are added up.
  __shared__ Unit units[4];
  Unit &now = units[0], &next = units[1], &later = units[2], &stored = units[3];
  const int channel_pairs = args.kernel_h * Traits::kBand;
  unsigned* const pairs = reinterpret_cast<unsigned*>(shared_memory);
  // What is derived from these is opaque, and found anew too.
  const auto tile = [&] { return reinterpret_cast<T*>(pairs + ptx::opaque(Traits::kChannels * channel_pairs)); };
  const auto pixels = [&] { return tile() + (tiling.tile + Traits::kPitch + 1) * kChunk; };
  const auto zeros = [&] { return shared_memory + Traits::kChannels * channel_pairs * 4 + tiling.tile * kChunkBytes; };

  fetch_weights<Traits>(tile(), args, blockIdx.x * Traits::kChannels, block_channels<Traits>(args));
  commit_copies();
  {
    Unit unit;
    unit.find(args, tiling, tiling.first_item(blockIdx.y));
    if (tiling.ahead) fetch_pixels<Traits>(pixels(), args, unit, threadIdx.x, Traits::kThreads);
    commit_copies();
    if (threadIdx.x == 0) {
      now = unit;
      next.find(args, tiling, unit.item + unit.items);
    }
  }
  if (threadIdx.x <= Traits::kPitch) reinterpret_cast<uint4*>(zeros())[threadIdx.x] = uint4{};
  wait_for_copies<1>();
  __syncthreads();
  if (const Slot at(args, tiling); at.slot < at.slots) {
    const T* const filter = tile() + at.channel * args.kernel_h * args.kernel_w;
    lay_out_weights<Traits>(pairs + at.channel * channel_pairs, args, at.slot, at.slots,
                            [&](int tap) -> unsigned { return filter[tap].bits; });
  }

#pragma unroll 1
  while (now.items > 0) {
    wait_for_all_copies();
    if (tiling.ahead)
      turn_pixels<Traits>(tile(), pixels(), now.in_rows, tiling.plane);
    else
      load_pixels<Traits>(tile(), args, tiling, now);
    __syncthreads();
    // The warps that have fewer tiles, if any have, fetch; the others keep the tensor cores busy.
    constexpr int kFirst = Traits::kWarps > Traits::kChannels ? 32 * Traits::kChannels : 0;
    const int worker = ptx::thread_index() - kFirst;
    if (tiling.ahead && worker >= 0 && next.items > 0)
      fetch_pixels<Traits>(pixels(), args, next, worker, Traits::kThreads - kFirst);
    if (ptx::thread_index() == 0) {
      stored = now;
      later.find(args, tiling, next.item + next.items);
    }

    ToeplitzSums<Traits> sum;
    {
      const Slot at(args, tiling);
      const T* const bias = static_cast<const T*>(args.bias);
      const float first = bias ? load(bias + blockIdx.x * Traits::kChannels + at.channel) : 0.f;
      const ToeplitzRows<Traits> rows(args, now, tile() + at.channel * tiling.plane * kChunk,
                                      ptx::shared_address(zeros()), tiling.row_divider, now.rows, args.h, at.slot,
                                      at.slots);
      start_sums<Traits>(sum, first);
      multiply_rows<Traits>(sum, rows, args, pairs + at.channel * channel_pairs);
    }

    const bool poisoned = __syncthreads_or(has_nan<Traits>(sum));
    if (ptx::thread_index() == 0) now = next, next = later;
    if (const Slot at(args, tiling); at.slot < at.slots) {
      T* const to = tile() + at.channel * tiling.stage * kChunk + 2 * (ptx::lane_index() % 4);
      for_each_row<Traits>(sum, at.slot, at.slots, stored.rows, [&](int row, auto&& pair) {
#pragma unroll
        for (int n = 0; n < Traits::kTilesW; ++n)
          *reinterpret_cast<unsigned*>(to + (row * Traits::kStagePitch + n) * kChunk) = pair(n);
      });
    }
    __syncthreads();
    if (poisoned) {
      mend_outputs<Traits>(tile(), args, tiling, stored);
      __syncthreads();
    }
    store_pixels<Traits>(tile(), args, tiling, stored);
  }
}

// Rows of input of a unit of so many rows of outputs, at most. `all`: rows are counted through all images. Then a unit may
// be the last rows of an image, some whole ones, and the first rows of another.
inline int64_t toeplitz_in_rows(const DirectArgs& args, int64_t rows, bool all) {
  const int64_t stride = args.stride_h, span = (args.kernel_h - 1) * args.dilation_h + 1, h = args.h,
                out_h = args.out_h;
  const auto most_of = [](int64_t a, int64_t b) { return a > b ? a : b; };
  const auto least_of = [](int64_t a, int64_t b) { return a < b ? a : b; };
  int64_t most = least_of(h, (least_of(rows, out_h) - 1) * stride + span);
  if (!all) return most;
  const int64_t above = most_of(0, h + args.padding_h - out_h * stride),
                below = most_of(0, span - stride - args.padding_h);
  for (int64_t whole = most_of(0, divide_up(rows, out_h) - 2); whole <= (rows - 2) / out_h; ++whole)
    most = most_of(most, whole * h + least_of(2 * h, (rows - whole * out_h) * stride + above + below));
  return least_of(most, args.n * h);
}

template <class Traits>
int launch_toeplitz_nhwc(const DirectArgs& args, cudaStream_t stream) {
  constexpr int kSlots = Traits::kWarps / Traits::kChannels, kMostItems = kSlots * Traits::kTilesH;
  constexpr int kUnitBytes = 4 * sizeof(ToeplitzUnit<Traits>);
  constexpr int kMostInRows = 1 << 12, kMostRounds = 3;  // more rows find no room anywhere
  const DeviceLimits& device = device_limits();
  // Blocks have as little as that before sm_80 alone.
  if (Traits::kSinceSm80 && device.shared_bytes_block <= 64 << 10) return kTooLittleSharedMemory;
  const int pair_bytes = Traits::kChannels * args.kernel_h * Traits::kBand * 4;
  const int filter_chunks = divide_up(Traits::kChannels * args.kernel_h * args.kernel_w, kChunk);
  const int groups = divide_up(static_cast<int>(args.out_c), Traits::kChannels);
  const int tiles_w = divide_up(args.out_w, Traits::kColumns);
  ToeplitzNhwcTiling tiling{}, best{};
  if (const int rest = static_cast<int>(args.out_c % Traits::kChannels); rest > 0) {
    tiling.rest_slots = Traits::kWarps / rest;
    tiling.rest_divider = SmallDivider(rest);
  }
  tiling.row_divider = IntDivider(args.out_h);
  tiling.in_pixels = copy_width(args.input, args.out_c) == kChunk;
  tiling.out_pixels = copy_width(args.out, args.out_c) == kChunk;

  const auto shared_bytes = [&](int in_rows) {
    const int in_chunks = in_rows * Traits::kPitch;
    tiling.plane = plane_chunks(in_chunks);
    tiling.stage = plane_chunks(tiling.merged * kTileRows * Traits::kStagePitch);
    tiling.tile = max_int(filter_chunks, Traits::kChannels * max_int(tiling.plane, tiling.stage));
    const int pixel_chunks = tiling.ahead ? divide_up(in_chunks, kTurned) * kTurned * kChunk : 0;
    return pair_bytes + (tiling.tile + Traits::kPitch + 1 + pixel_chunks) * kChunkBytes;
  };
  // Cycles of the block that takes longest.
  const auto cost = [&](int in_rows, int rounds) {
    // A product of K = 16 takes six cycles of a partition's tensor cores; one warp alone keeps them busy for less than half
    // of the time.
    constexpr float kItemCycles = Traits::kTilesW * Traits::kChunks * 2.7f, kBusy = 0.8f, kAlone = 0.4f;
    constexpr float kBlockCycles = 6000, kUnitCycles = 1500, kWaitCycles = 2000, kChunkCycles = 6, kLoadedCycles = 14;
    const int channels = min_int(Traits::kChannels, static_cast<int>(args.out_c)), slots = Traits::kWarps / channels;
    const auto products = [&](int items) {
      const float all = items * channels / (kPartitions * kBusy), one = divide_up(items, slots) / kAlone;
      return args.kernel_h * kItemCycles * (all > one ? all : one);
    };
    const int items = tiling.share + (tiling.longer > 0 ? 1 : 0);
    const int merged = tiling.image_items > 0 ? min_int(tiling.merged, tiling.image_items) : tiling.merged;
    const int units = divide_up(items, merged);
    const int large = divide_up(items, units), small = items / units, larger = items - small * units;
    const float chunks = static_cast<float>(in_rows) * Traits::kPitch;
    const float unit = kUnitCycles + (tiling.ahead ? kChunkCycles * chunks : kWaitCycles + kLoadedCycles * chunks);
    return rounds *
           (kBlockCycles + kWaitCycles + units * unit + larger * products(large) + (units - larger) * products(small));
  };

  float least = 0;
  int bytes = 0, best_parts = 0;
  for (const bool all : {true, false}) {
    if (all && args.n * args.out_h > kInt32Max / 2) continue;
    tiling.image_items = all ? 0 : divide_up(args.out_h, kTileRows);
    const int64_t items = all ? divide_up<int64_t>(args.n * args.out_h, kTileRows) : args.n * tiling.image_items;
    tiling.items = static_cast<int>(items);
    for (const bool ahead : {true, false}) {
      if (ahead && !tiling.in_pixels) continue;
      tiling.ahead = ahead;
      for (tiling.merged = kMostItems; tiling.merged > 0; --tiling.merged) {
        const int64_t in_rows = toeplitz_in_rows(args, tiling.merged * kTileRows, all);
        if (in_rows > kMostInRows) continue;
        const int needed = shared_bytes(static_cast<int>(in_rows));
        if (needed + kUnitBytes > device.shared_bytes_block) continue;
        for (int rounds = 1; rounds <= kMostRounds; ++rounds) {
          const int64_t all_items = items * tiles_w;
          const int most_parts = max_int(1, rounds * device.multiprocessors / groups);
          const int parts = static_cast<int>(all_items < most_parts ? all_items : most_parts);
          tiling.share = static_cast<int>(all_items / parts), tiling.longer = static_cast<int>(all_items % parts);
          const float cycles = cost(static_cast<int>(in_rows), divide_up(groups * parts, device.multiprocessors));
          if (bytes == 0 || cycles < least) least = cycles, best = tiling, best_parts = parts, bytes = needed;
        }
      }
    }
  }
  if (bytes == 0) return kTooLittleSharedMemory;
  if (best.image_items == 0) {  // evenly
    const int items = best.share + (best.longer > 0 ? 1 : 0);
    best.merged = divide_up(items, divide_up(items, best.merged));
  }
  best.items_divider = IntDivider(best.items);
  if (best.image_items > 0) best.image_divider = IntDivider(best.image_items);

  const auto kernel = toeplitz_nhwc_kernel<Traits>;
  if (const int error = allow_shared_bytes(kernel, bytes, kUnitBytes)) return error;
  // Blocks that run together read whole pixels together.
  const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(best_parts));
  kernel<<<grid, Traits::kThreads, bytes, stream>>>(args, best);
  return cudaGetLastError();
}

}  // namespace depthwise
