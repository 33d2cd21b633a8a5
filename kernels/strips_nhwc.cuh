// Depthwise convolution on the tensor cores by strips of rows (strips.cuh), channels_last: forward, and grad of input at
// stride 1.
//
// Serves  fp16 and bf16, stride and dilation 1, kernels of 3 to 9 rows and columns; any image and padding; channels in
//         eights, aligned tensors. Compile-time are the type, the kernel's rows and the rows of a strip.
// Owns    a block computes sixteen channels, two a warp, of some images one after the other, or of a part of them: sixteen
//         strips a step.
// Reads   sixteen channels of a pixel are a sector of 32 bytes, which two neighbouring threads copy. A warp copies eight
//         pixels of two chunks at a time, all of its units before the first is used; then ldmatrix turns them around in
//         registers, and they are stored where they were, channel by channel.
// Writes  likewise: ldmatrix turns eight outputs of sixteen channels around, so that four lanes hold a pixel.
// Memory  filters: strips.cuh; where chunks come from; the input of a step. 28x28 outputs under 7x7, strips of 7 rows: 55 KB.
// Chosen  select.h.
#pragma once

#include "strips.cuh"

namespace depthwise {

constexpr int kStripsChannels = 16;                 // of a block
constexpr int kStripsOctets = kStripsChannels / 8;  // copies of 16 bytes a pixel
constexpr int kLaneChannels = kStripsChannels / 4;  // a lane stores
constexpr int kOctetSkew = 4;                       // chunks: the planes of the second octet lie in the other banks
constexpr int kUnitChunks = 2;                      // that a warp copies, and turns around, at a time
static_assert(kUnitChunks * kChunk * kStripsOctets == 32);

// Chunks before the planes of a channel of the block's.
__device__ __forceinline__ int channel_chunk(const StripsPlan& plan, int channel) {
  return channel * plan.channel_pitch + channel / 8 * kOctetSkew;
}

// Where the eight pixels come from that are to fill a chunk.
struct alignas(16) ChunkSource {
  int offset;        // of the first, in elements from the first image of a step
  int first, count;  // of those that lie inside the image
  int image;         // of the step
};

// The sources of all chunks, the same in each step.
template <class Traits>
__device__ __forceinline__ void find_sources(ChunkSource* sources, const DirectArgs& args, const StripsPlan& plan,
                                             const StripsBlock<Traits>& block) {
  for (int chunk = threadIdx.x; chunk < Traits::kChunks; chunk += Traits::kThreads) {
    const int image = plan.image_divider.quotient(chunk), in_image = chunk - image * plan.image_pitch;
    const int strip = plan.strip_pitch_divider.quotient(in_image), in_strip = in_image - strip * plan.strip_pitch;
    const int strip_row = plan.pitch_divider.quotient(in_strip);
    const int row = block.in_row - block.top + strip * Traits::kRows + strip_row;
    const int column = block.in_column - block.left + (in_strip - strip_row * plan.pitch) * kChunk;
    const int first = max(0, -column), count = min(kChunk, args.w - column) - first;
    const bool exists = image < plan.images && strip_row < Traits::kRows && row >= 0 && row < args.h && count > 0;
    ChunkSource source{0, 0, 0, image};
    if (exists) {
      source.offset = image * static_cast<int>(plan.in_image) + (row * args.w + column) * static_cast<int>(args.out_c);
      source.first = first, source.count = count;
    }
    sources[chunk] = source;
  }
}

// The filters of a block, on their way from memory while it finds out where its input lies; but not very many, for which
// there are no registers.
template <class Traits>
struct StripsFilters {
  using T = typename Traits::T;
  static constexpr int kLoads = divide_up(kStripsChannels * Traits::kKernelH * kStripsTaps, Traits::kThreads);
  static constexpr bool kAhead = kLoads <= 4;
  T value[kLoads];
  int channel, channels;

  __device__ __forceinline__ StripsFilters(const DirectArgs& args, int channel, int channels)
      : channel(channel), channels(channels) {
    if constexpr (kAhead) {
      const int taps = Traits::kKernelH * args.kernel_w;
      const auto* const global = filters_of<Traits>(args, channel, taps);
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int k = threadIdx.x + u * Traits::kThreads;
        value[u] = load_rounded<T>(global + k, k < channels * taps);
      }
    }
  }
  __device__ __forceinline__ void store(T* filters, const DirectArgs& args, const StripsPlan& plan) const {
    if constexpr (kAhead) {
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int k = threadIdx.x + u * Traits::kThreads;
        if (k < channels * Traits::kKernelH * args.kernel_w)
          store_strips_filter<Traits>(filters, args, plan, k, value[u]);
      }
    } else {
      load_strips_filters<Traits>(filters, args, plan, channel, channels);
    }
  }
};

// The input of a step as it lies in memory, zeros outside the images: pixels of sixteen channels, in the order of the
// chunks that they are to fill. The second octet comes first in every other four pixels, for the banks' sake.
template <class Traits>
__device__ __forceinline__ void load_strips_nhwc(typename Traits::T* tile, const ChunkSource* sources,
                                                 const DirectArgs& args, const StripsPlan& plan,
                                                 const StripsBlock<Traits>& block, int image, int units) {
  using T = typename Traits::T;
  constexpr int kStep = Traits::kWarps * kUnitChunks;  // chunks
  // What follows from the lane is computed anew in each step: kept in registers, it would be too much.
  const int lane = ptx::opaque(threadIdx.x % 32), warp = threadIdx.x / 32;
  const int pixel = lane / kStripsOctets % kChunk, octet = lane % kStripsOctets;
  const int images = min(plan.images, block.image_end - image), channel = block.channel + octet * 8;
  const bool channel_exists = channel < static_cast<int>(args.out_c);
  const T* const input =
      static_cast<const T*>(args.input) + image * plan.in_image + pixel * static_cast<int>(args.out_c) + channel;
  const int first_chunk = warp * kUnitChunks + lane / (kChunk * kStripsOctets);
  T* const to = tile + (first_chunk * kChunk * kStripsOctets + pixel * kStripsOctets + (octet ^ pixel / 4)) * 8;
  ChunkSource next = sources[first_chunk];  // one ahead, as it takes as long as a copy's instructions
#pragma unroll
  for (int u = 0; u < Traits::kUnits; ++u) {
    if (warp + u * Traits::kWarps >= units) break;
    const ChunkSource source = next;
    if (u + 1 < Traits::kUnits) next = sources[first_chunk + (u + 1) * kStep];
    const bool exists = channel_exists && source.image < images &&
                        static_cast<unsigned>(pixel - source.first) < static_cast<unsigned>(source.count);
    copy_async<16>(to + u * kStep * kChunk * kStripsChannels, input + source.offset, exists);
  }
  commit_copies();
}

// Puts what this warp has copied where it belongs: a lane gets two neighbouring pixels of a channel. All warps have read
// theirs before the first is stored.
template <class Traits>
__device__ __forceinline__ void transpose_strips(typename Traits::T* tile, const StripsPlan& plan) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pixel = lane % 8, octet = lane / 8 % kStripsOctets, chunk = lane / (8 * kStripsOctets);
  const int granule = ((warp * kUnitChunks + chunk) * kChunk + pixel) * kStripsOctets + (octet ^ pixel / 4);
  const unsigned address = ptx::shared_address(tile) + granule * 16;
  unsigned words[Traits::kUnits][4];  // of the first chunk's two octets, then of the second's
#pragma unroll
  for (int u = 0; u < Traits::kUnits; ++u)
    ptx::load_matrices_transposed(
        words[u], address + u * Traits::kWarps * kUnitChunks * kChunk * kStripsChannels * sizeof(typename Traits::T));
  __syncthreads();
  unsigned* const first =
      reinterpret_cast<unsigned*>(tile + (channel_chunk(plan, lane / 4) + warp * kUnitChunks) * kChunk) + lane % 4;
  unsigned* const second = first + channel_chunk(plan, 8) * kChunk / 2;
#pragma unroll
  for (int u = 0; u < Traits::kUnits; ++u)
#pragma unroll
    for (int k = 0; k < kUnitChunks; ++k) {
      const int offset = (u * Traits::kWarps * kUnitChunks + k) * kChunk / 2;
      first[offset] = words[u][2 * k];
      second[offset] = words[u][2 * k + 1];
    }
}

// The staged outputs to memory, two strips a warp: lane 4 * g + t stores channels 4 * t and on of pixel g of each.
template <class Traits>
__device__ __forceinline__ void store_strips_nhwc(const typename Traits::T* tile, const DirectArgs& args,
                                                  const StripsPlan& plan, const StripsBlock<Traits>& block, int image) {
  using T = typename Traits::T;
  static_assert(2 * Traits::kWarps == kTileRows);
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 2, all = plan.all_strips();
  const int images = min(plan.images, block.image_end - image);
  if (first >= all) return;
  // ldmatrix: the first two matrices are of the first strip, the others of the second; their rows are channels, of the
  // four of a lane the first two or the last two. The lanes of the second octet get them the other way round, for else the
  // rows of a matrix would share banks.
  const int matrix = lane / 8, quad = lane % 8 / 2;
  const int from_channel = quad * kLaneChannels + (matrix % 2 ^ quad / 2) * 2 + lane % 2;
  const bool swapped = lane % 4 / 2;
  const unsigned address =
      ptx::shared_address(tile) + (channel_chunk(plan, from_channel) + min(first + matrix / 2, all - 1)) * 16;
  const int channel = block.channel + lane % 4 * kLaneChannels;
  T* out[2];
  int rows[2];  // that exist
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const StripPlace place(plan, min(first + k, all - 1));
    const int row = block.row + place.strip * Traits::kRows;
    const int column = block.first_column + place.tile * kChunk + lane / 4;
    const bool exists = first + k < all && place.image < images && column >= 0 && column < args.out_w;
    rows[k] = exists && channel < args.out_c ? args.out_h - row : 0;
    out[k] = static_cast<T*>(args.out) + (image + place.image) * plan.out_image +
             (static_cast<int64_t>(row) * args.out_w + column) * args.out_c + channel;
  }
  const int row_elements = args.out_w * static_cast<int>(args.out_c);
#pragma unroll
  for (int j = 0; j < Traits::kRows; ++j) {
    unsigned words[4];
    ptx::load_matrices_transposed(words, address + j * Traits::kStageStrips * 16);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      union {
        unsigned word[2];
        Vector<T, kLaneChannels> vector;
      } values;
      values.word[0] = swapped ? words[2 * k + 1] : words[2 * k];
      values.word[1] = swapped ? words[2 * k] : words[2 * k + 1];
      if (j < rows[k]) store_streaming(out[k], values.vector);
      out[k] += row_elements;
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBoundBlocks)
    strips_nhwc_kernel(const __grid_constant__ DirectArgs args, const __grid_constant__ StripsPlan plan) {
  using T = typename Traits::T;
  const StripsBlock<Traits> block(args, plan, kStripsChannels, blockIdx.x);
  const int channels = min(kStripsChannels, static_cast<int>(args.out_c) - block.channel);
  const int units = divide_up(plan.images * plan.image_pitch, kUnitChunks);
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const filters = reinterpret_cast<T*>(shared_memory);
  ChunkSource* const sources = reinterpret_cast<ChunkSource*>(filters + kStripsChannels * Traits::kFilterElements);
  T* const tile = reinterpret_cast<T*>(sources + Traits::kChunks);

  const StripsFilters<Traits> all_filters(args, block.channel, channels);
  find_sources<Traits>(sources, args, plan, block);
  clear_shared(filters, kStripsChannels * Traits::kFilterElements * static_cast<int>(sizeof(T)));
  const unsigned address = ptx::opaque(strips_address<Traits>(tile, plan, 0));
  const auto load_images = [&](int image) {
    if (image < block.image_end) load_strips_nhwc<Traits>(tile, sources, args, plan, block, image, units);
  };

  __syncthreads();
  load_images(block.image);
  all_filters.store(filters, args, plan);
#pragma unroll 1
  for (int image = block.image; image < block.image_end; image += plan.images) {
    wait_for_copies<0>();
    __syncwarp();  // a warp turns around what it has copied itself
    transpose_strips<Traits>(tile, plan);
    __syncthreads();

    bool poisoned = false;
    // The first channel is opaque for the registers' sake, as above.
#pragma unroll 1
    for (int channel = ptx::opaque(threadIdx.x / 32); channel < channels; channel += Traits::kWarps) {
      float bias[4];
      load_bias(bias, bias_of<Traits>(args, block.channel, channel));
      const int chunk = channel_chunk(plan, channel);
      unsigned band[Traits::kKernelH][2], results[Traits::kRows][2];
      load_bands<Traits>(band, filters + channel * Traits::kFilterElements);
      poisoned |= is_poisoned(walk_strips<Traits>(results, address + chunk * 16, plan, band, bias));
      __syncwarp();  // no other warp reads this channel's input
      stage_strips<Traits>(stage_place<Traits>(tile + chunk * kChunk, 0), results);
    }
    if (__syncthreads_or(poisoned)) {
      for (int channel = 0; channel < channels; ++channel)
        mend_strips<Traits>(tile + channel_chunk(plan, channel) * kChunk, args, plan, image, kStripsChannels, channel);
      __syncthreads();
    }
    store_strips_nhwc<Traits>(tile, args, plan, block, image);
    __syncthreads();
    load_images(image + plan.images);
  }
}

// How many of its `all_steps` steps a block takes, where three or more share a multiprocessor, which then is the faster the
// more it has: k blocks of as many steps take as long as k + 1.3. To begin a block costs as much as half a step. (us, H100,
// fp16, by steps; 5x5, 32x240x28x28: 1: 19.2, 2: 20.9, 3: 23.6, 4: 25.3; 7x7, 32x192x28x28: 16.1, 20.2, 21.1, 24.3;
// 32x96x56x56: 27.5, 26.9, 28.9, 31.7.)
inline int best_steps_of_many(int64_t blocks, int all_steps) {
  constexpr int kMostSteps = 32, kStep = 2, kBegin = 1, kTenths = 10, kAlone = 13;
  int64_t least = 0;
  int best = 1;
  for (int steps = 1; steps <= min_int(all_steps, kMostSteps); ++steps) {
    const int64_t shared = divide_up<int64_t>(blocks * divide_up(all_steps, steps), device_limits().multiprocessors);
    const int64_t cost = (kStep * steps + kBegin) * (kTenths * shared + kAlone);
    if (least == 0 || cost < least) least = cost, best = even_part(all_steps, steps);
  }
  return best;
}

// Cuts images into steps of sixteen strips: in time, a warp's walk counts as much as loading as many rows of chunks as it
// has strips and rows. A block takes as many steps as keep all multiprocessors busy for the shortest time, if beginning a
// block costs as much as a third of a step.
template <class Traits>
int launch_strips_nhwc(const DirectArgs& args, int, cudaStream_t stream) {
  constexpr int kWalk = kTileRows * Traits::kRows;
  const DeviceLimits& device = device_limits();
  StripsPlan plan = strips_plan(args), best{};
  const int all_tiles = divide_up(args.out_w - plan.first_column, kChunk);
  const int all_strips = divide_up(args.out_h, Traits::kRows), images = static_cast<int>(args.n);
  const int groups = divide_up(static_cast<int>(args.out_c), kStripsChannels);
  plan.group_divider = IntDivider(groups);
  plan.in_image = static_cast<int64_t>(args.h) * args.w * args.out_c;
  plan.out_image = static_cast<int64_t>(args.out_h) * args.out_w * args.out_c;
  int64_t least = 0;
  int bytes = 0;
  for (int most_tiles = 1; most_tiles <= min_int(all_tiles, kTileRows); ++most_tiles) {
    plan.tiles = even_part(all_tiles, most_tiles);
    plan.strips = even_part(all_strips, kTileRows / plan.tiles);
    // As many strips and images as there is room to turn around, and as offsets of 32 bits reach.
    const auto image_chunks = [&] {
      return strips_layout(plan.tiles, plan.strips, Traits::kRows, Traits::kKernelH).image_pitch;
    };
    while (plan.strips > 1 && image_chunks() > Traits::kChunks) plan.strips = even_part(all_strips, plan.strips - 1);
    plan.blocks_w = divide_up(all_tiles, plan.tiles);
    plan.blocks_h = divide_up(all_strips, plan.strips);
    const bool whole = plan.blocks_w * plan.blocks_h == 1;
    const int most_images = min_int(min_int(kTileRows / (plan.strips * plan.tiles), Traits::kChunks / image_chunks()),
                                    static_cast<int>(INT32_MAX / plan.in_image));
    plan.images = whole ? even_part(images, max_int(1, most_images)) : 1;
    const int plan_bytes = lay_out_strips<Traits>(&plan, kStripsChannels) + kStripsOctets * kOctetSkew * 16 +
                           Traits::kChunks * static_cast<int>(sizeof(ChunkSource));
    if (plan_bytes > device.shared_bytes_block || plan.images * plan.image_pitch > Traits::kChunks) continue;
    const int64_t count = static_cast<int64_t>(divide_up(images, plan.images)) * plan.blocks_w * plan.blocks_h;
    const int64_t cost = count * (kWalk + plan.images * plan.image_pitch);
    if (least == 0 || cost < least) least = cost, best = plan, bytes = plan_bytes;
  }
  if (least == 0) return kTooLittleSharedMemory;
  const int64_t blocks = static_cast<int64_t>(groups) * best.blocks_w * best.blocks_h;  // of an image
  const int resident = min_int(Traits::kMinBlocks, device.shared_bytes / (bytes + kBlockSharedBytes));
  const int all_steps = divide_up(images, best.images);
  best.steps = resident < 3 ? best_steps(blocks, all_steps, resident, 3, 1) : best_steps_of_many(blocks, all_steps);

  const auto kernel = strips_nhwc_kernel<Traits>;
  if (const int error = allow_shared_bytes(kernel, bytes)) return error;
  const int64_t grid = blocks * divide_up(images, best.images * best.steps);
  kernel<<<static_cast<unsigned>(grid), Traits::kThreads, bytes, stream>>>(args, best);
  return cudaGetLastError();
}

}  // namespace depthwise
