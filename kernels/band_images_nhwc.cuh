// Depthwise convolution with very large kernels of images up to 64 columns, sixteen images a product, as band_images.cuh
// computes it, channels_last: forward, and grad of input at stride 1. fp16 and bf16, fp32 accumulators.
//
// Serves  stride and dilation 1, any kernel height, number of images and padding of rows at run time; channels in eights,
//         aligned tensors. Compile-time are the type, the chunks of band, image and outputs, and kRows.
// Owns    a block computes a strip of kRows rows of outputs of eight channels (16 bytes a pixel) of sixteen images. A warp
//         takes a channel and a column group, with all its sums in registers: all warps walk down the same input rows, and
//         only those have to be in shared memory that are multiplied or on their way. Strips whose rows meet the most input
//         come first. Blocks of neighbouring channels, which share sectors of 32 bytes, follow each other.
// Reads   an input row comes as often as strips meet it, mostly from L2 (31x31 on 56x56, four rows: 7.2 times). A stage is
//         some rows, and three stages make the ring: one that is multiplied, two on their way. The pixels of a chunk of
//         eight columns and eight channels fill 128 bytes, of which ldmatrix and stores make rows of eight pixels of a
//         channel in place. The warp does it that copied them, before the only barrier of a stage.
// Banks   In the 128 bytes of image i, channel c lies at 16 * (c ^ i % 8): the eight images of a matrix lie in different
//         banks, as do the words that a warp stores.
// Writes  sums go where the input was, as rows of pixels of a channel; ldmatrix turns them around, so that four lanes hold
//         the eight channels of a pixel.
// Memory  per channel and kernel row 8 * kChunks + 6 words of weights; 2 KB for each chunk of an input row, or of an output
//         row where the outputs take more. 31x31 on 56x56: 45.6 KB + stages of two rows 86 KB.
// NaN     as in band_images.cuh; the outputs are computed again as they are stored.
// Chosen  select.h.
#pragma once

#include "band_images.cuh"

namespace depthwise {

constexpr int kBandStages = 3;                          // of a ring
constexpr int kCellBytes = kChunk * kChannelsNhwc * 2;  // eight pixels of eight channels
constexpr int kWarpImages = 32 / kChunk;                // that a warp copies, and turns around, at a time
static_assert(kBandImages % kWarpImages == 0);

template <class T_, int kChunks_, int kOrigin_, int kImageChunks_, int kTiles_, int kRows_>
struct BandImagesNhwcTraits : BandImagesTraits<T_, kChunks_, kOrigin_, kImageChunks_, kTiles_, kRows_> {
  using Base = BandImagesTraits<T_, kChunks_, kOrigin_, kImageChunks_, kTiles_, kRows_>;
  static constexpr bool kChannelsLast = true;
  static constexpr int kWarps = kChannelsNhwc * Base::kColumnGroups, kThreads = 32 * kWarps;
  static constexpr int kPairBytes = 2 * kCellBytes;
  static constexpr int kBoundBlocks = 2 / Base::kColumnGroups;  // 128 registers a thread
  // A row of sixteen images: of input, and of outputs.
  static constexpr int kRowBytes = kBandImages * kImageChunks_ * kCellBytes;
  static constexpr int kOutRowBytes = kBandImages * kTiles_ * kCellBytes;
  static constexpr int kRowUnits = kBandImages / kWarpImages * kImageChunks_;  // that warps take
  static constexpr int kOutRowUnits = kBandImages / kWarpImages * kTiles_;
};

struct BandImagesNhwcTiling {
  int strips, groups;  // of an image; of eight channels
  int stage_rows;
};

// What a block computes.
template <class Traits>
struct BandImagesNhwcBlock {
  int image, images, channel, row, rows;
  static constexpr int channels = kChannelsNhwc;

  __device__ BandImagesNhwcBlock(const DirectArgs& args, const BandImagesNhwcTiling& tiling) {
    unsigned block = ptx::opaque(blockIdx.x);  // not kept in registers through the walk
    channel = block % tiling.groups * kChannelsNhwc, block /= tiling.groups;
    const unsigned all_images = divide_up(static_cast<unsigned>(args.n), unsigned{kBandImages});
    image = block % all_images * kBandImages, block /= all_images;
    images = min(kBandImages, static_cast<int>(args.n) - image);
    const int place = static_cast<int>(block), middle = tiling.strips / 2;  // from the middle strip outwards
    row = (place % 2 == 0 ? middle + place / 2 : middle - divide_up(place, 2)) * Traits::kRows;
    rows = min(Traits::kRows, args.out_h - row);
  }
};

// The input rows of a strip in shared memory, stage by stage. A row is cells, image by image and chunk by chunk.
template <class Traits>
struct BandRing {
  using T = typename Traits::T;
  static constexpr int kRow = Traits::kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kCell = kCellBytes / static_cast<int>(sizeof(T));
  const DirectArgs& args;
  const BandImagesNhwcTiling& tiling;
  T* ring;
  int end;                     // of all rows
  int copied, turned;          // the first rows of the next stage to copy, and to turn around
  int copy_slot, slot;         // places of those stages
  int left;                    // rows of the present stage
  unsigned lane_row, address;  // this lane's row of a matrix: of the ring's first row, of the next row

  __device__ __forceinline__ BandRing(const DirectArgs& args, const BandImagesNhwcTiling& tiling, T* ring, int begin,
                                      int end)
      : args(args), tiling(tiling), ring(ring), end(end), copied(begin), turned(begin), copy_slot(0), slot(0), left(0) {
    // Lane l names image l % 16 to ldmatrix, and chunk l / 16 of a pair.
    const int lane = threadIdx.x % 32, image = lane % kBandImages, channel = threadIdx.x / 32 % kChannelsNhwc;
    lane_row = ptx::shared_address(ring) + (image * Traits::kImageChunks + lane / kBandImages) * kCellBytes +
               cell_offset(channel, image) * static_cast<int>(sizeof(T));
    address = lane_row;
#pragma unroll 1
    for (int stage = 0; stage < kBandStages - 1; ++stage) copy_stage();
  }
  // Where a channel's row begins in a cell.
  __device__ __forceinline__ static int cell_offset(int channel, int image) {
    return (channel ^ image % kChannelsNhwc) * kChunk;
  }

  // What a warp does at a time is a chunk of four images. Calls body(row of the stage, first image, chunk, its first cell)
  // for what is this warp's of the stage that begins with row `first`.
  template <class Body>
  __device__ __forceinline__ void for_each_unit(int first, int slot, Body&& body) const {
    const int rows = min(tiling.stage_rows, end - first);
    T* const stage = ring + slot * tiling.stage_rows * kRow;
#pragma unroll 1
    for (int unit = threadIdx.x / 32; unit < rows * Traits::kRowUnits; unit += Traits::kWarps) {
      const int row = unit / Traits::kRowUnits, in_row = unit - row * Traits::kRowUnits;
      const int group = in_row / Traits::kImageChunks, chunk = in_row - group * Traits::kImageChunks;
      const int image = group * kWarpImages;
      body(row, image, chunk, stage + row * kRow + (image * Traits::kImageChunks + chunk) * kCell);
    }
  }

  // Zeros where there is no column or image.
  __device__ __forceinline__ void copy_stage() {
    const BandImagesNhwcBlock<Traits> block(args, tiling);
    const int lane = ptx::opaque(threadIdx.x % 32), pixel = lane % kChunk, lane_image = lane / kChunk;
    const int64_t in_image = static_cast<int64_t>(args.h) * args.w;
    const T* const input =
        static_cast<const T*>(args.input) + (block.image + lane_image) * in_image * args.out_c + block.channel;
    for_each_unit(copied, copy_slot, [&](int row, int image, int chunk, T* cell) {
      const int column = chunk * kChunk + pixel;
      const int64_t at = image * in_image + ((copied + row) * args.w + column);
      copy_async<16>(cell + lane_image * Traits::kImageChunks * kCell + pixel * kChannelsNhwc, input + at * args.out_c,
                     image + lane_image < block.images && column < args.w);
    });
    commit_copies();
    copied += tiling.stage_rows;
    copy_slot = copy_slot + 1 == kBandStages ? 0 : copy_slot + 1;
  }

  // Makes rows of pixels of what this warp has copied.
  __device__ __forceinline__ void turn_stage() const {
    const int lane = ptx::opaque(threadIdx.x % 32);
    for_each_unit(turned, slot, [&](int, int image, int, T* cell) {
      unsigned words[kWarpImages];
      ptx::load_matrices_transposed(words, ptx::shared_address(cell + lane / kChunk * Traits::kImageChunks * kCell +
                                                               lane % kChunk * kChannelsNhwc));
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kWarpImages; ++k)
        *reinterpret_cast<unsigned*>(cell + k * Traits::kImageChunks * kCell + cell_offset(lane / 4, image + k) +
                                     lane % 4 * 2) = words[k];
    });
  }

  // All warps of the block come here, and to next_row(), as often.
  __device__ __forceinline__ void next_stage() {
    wait_for_copies<kBandStages - 2>();
    __syncwarp();
    turn_stage();
    __syncthreads();  // the stage before this one has been multiplied, too
    copy_stage();
    address = lane_row + slot * tiling.stage_rows * Traits::kRowBytes;
    left = tiling.stage_rows;
    turned += tiling.stage_rows;
    slot = slot + 1 == kBandStages ? 0 : slot + 1;
  }

  // This lane's row of a matrix, of the next row.
  __device__ __forceinline__ unsigned next_row() {
    if (left == 0) next_stage();
    --left;
    const unsigned row = address;
    address += Traits::kRowBytes;
    return row;
  }
};

// A warp's sums to where the input was: cells, row by row, image by image and tile by tile. Returns whether one is NaN.
template <int kGroup, class Traits>
__device__ __forceinline__ bool stage_sums(typename Traits::T* staged,
                                           const float (&sum)[Traits::kRows][Traits::tiles(kGroup)][4]) {
  using T = typename Traits::T;
  constexpr int kCell = kCellBytes / static_cast<int>(sizeof(T));
  const int lane = ptx::opaque(threadIdx.x % 32), channel = threadIdx.x / 32 % kChannelsNhwc, image = lane / 4;
  // Images g and g + 8 have their channels in the same places.
  T* const to = staged + image * Traits::kTiles * kCell + (channel ^ image) * kChunk + lane % 4 * 2;
  float probe = 0;
#pragma unroll
  for (int q = 0; q < Traits::kRows; ++q)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int t = 0; t < Traits::tiles(kGroup); ++t) {
        const int cell = (q * kBandImages + half * kBandImages / 2) * Traits::kTiles + kGroup + t * Traits::kStep;
        *reinterpret_cast<unsigned*>(to + cell * kCell) = pack<T>(sum[q][t][2 * half], sum[q][t][2 * half + 1]);
        probe += sum[q][t][2 * half] + sum[q][t][2 * half + 1];
      }
  return probe != probe;
}

// The staged outputs to memory: a warp takes a tile of four images at a time, and lane 4 * g + t channels 2 * t and on of
// pixel g of each.
template <class Traits>
__device__ __forceinline__ void store_staged(const typename Traits::T* staged, const DirectArgs& args,
                                             const BandImagesNhwcBlock<Traits>& block, bool poisoned) {
  using T = typename Traits::T;
  constexpr int kCell = kCellBytes / static_cast<int>(sizeof(T)), kRowUnits = Traits::kOutRowUnits;
  const int lane = threadIdx.x % 32, from_image = lane / kChunk, from_channel = lane % kChunk;
  const int channel = block.channel + lane % 4 * 2;
  const int64_t out_image = static_cast<int64_t>(args.out_h) * args.out_w * args.out_c;
#pragma unroll 1
  for (int unit = threadIdx.x / 32; unit < block.rows * kRowUnits; unit += Traits::kWarps) {
    const int row = unit / kRowUnits, in_row = unit - row * kRowUnits;
    const int group = in_row / Traits::kTiles, tile = in_row - group * Traits::kTiles, image = group * kWarpImages;
    const T* const cell = staged + ((row * kBandImages + image + from_image) * Traits::kTiles + tile) * kCell;
    unsigned words[kWarpImages];
    ptx::load_matrices_transposed(
        words, ptx::shared_address(cell + BandRing<Traits>::cell_offset(from_channel, image + from_image)));
    const int column = tile * kChunk + lane / 4;
    T* to = static_cast<T*>(args.out) + (block.image + image) * out_image +
            (static_cast<int64_t>(block.row + row) * args.out_w + column) * args.out_c + channel;
#pragma unroll
    for (int k = 0; k < kWarpImages; ++k, to += out_image) {
      if (image + k >= block.images || column >= args.out_w) continue;
      union {
        unsigned word;
        Vector<T, 2> vector;
      } values{words[k]};
      if (poisoned)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (is_nan(values.vector.value[e]))
            values.vector.value[e] = from_float<T>(
                toeplitz_exact<Traits>(args, block.image + image + k, channel + e, block.row + row, column));
      store_streaming(to, values.vector);
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBoundBlocks)
    band_images_nhwc_kernel(const __grid_constant__ DirectArgs args,
                            const __grid_constant__ BandImagesNhwcTiling tiling) {
  using T = typename Traits::T;
  const BandImagesNhwcBlock<Traits> block(args, tiling);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, channel = warp % kChannelsNhwc;

  // Shared memory: weights, the ring, where outputs go as well.
  extern __shared__ __align__(16) unsigned char shared_memory[];
  unsigned* const pairs = reinterpret_cast<unsigned*>(shared_memory);
  T* const tile = reinterpret_cast<T*>(pairs + kChannelsNhwc * args.kernel_h * Traits::kBand);
  const BandRows<Traits> rows(args, block.row, block.rows);
  BandRing<Traits> ring(args, tiling, tile, rows.begin, rows.end);
  load_weights<Traits>(pairs, args, block);
  ring.next_stage();  // the first, and the weights

  const float bias = args.bias ? load(static_cast<const T*>(args.bias) + block.channel + channel) : 0.f;
  const unsigned* const band = pairs + channel * args.kernel_h * Traits::kBand + kChunk - 1 + 2 * (lane % 4) - lane / 4;
  bool poisoned = false;
  for_each_index<Traits::kColumnGroups>([&](auto group) {
    constexpr int kGroup = group.value, kTiles = Traits::tiles(kGroup);
    if (warp / kChannelsNhwc != kGroup) return;
    float sum[Traits::kRows][kTiles][4];
#pragma unroll
    for (int q = 0; q < Traits::kRows; ++q)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[q][t][e] = bias;
    walk_rows<kGroup, Traits>(sum, rows, args.kernel_h, band, [&] { return ring.next_row(); });
    __syncthreads();
    poisoned = stage_sums<kGroup, Traits>(tile, sum);
  });
  poisoned = __syncthreads_or(poisoned);
  store_staged<Traits>(tile, args, BandImagesNhwcBlock<Traits>(args, tiling), poisoned);
}

// Stages of as many rows as there is room for, up to kMostStageRows: more make the first stage late.
template <class Traits>
int launch_band_images_nhwc(const DirectArgs& args, int, cudaStream_t stream) {
  constexpr int kMostStageRows = 2;
  const DeviceLimits& device = device_limits();
  BandImagesNhwcTiling tiling{};
  tiling.strips = divide_up(args.out_h, Traits::kRows);
  tiling.groups = static_cast<int>(args.out_c) / kChannelsNhwc;
  const auto bytes = [&](int stage_rows) {
    return kChannelsNhwc * args.kernel_h * Traits::kBand * 4 +
           max_int(kBandStages * stage_rows * Traits::kRowBytes, Traits::kRows * Traits::kOutRowBytes);
  };
  tiling.stage_rows = kMostStageRows;
  while (tiling.stage_rows > 1 && bytes(tiling.stage_rows) > device.shared_bytes_block) --tiling.stage_rows;
  if (bytes(tiling.stage_rows) > device.shared_bytes_block) return kTooLittleSharedMemory;

  const auto kernel = band_images_nhwc_kernel<Traits>;
  if (const int error = allow_shared_bytes(kernel, bytes(tiling.stage_rows))) return error;
  const int64_t blocks = divide_up<int64_t>(args.n, kBandImages) * tiling.groups * tiling.strips;
  kernel<<<static_cast<unsigned>(blocks), Traits::kThreads, bytes(tiling.stage_rows), stream>>>(args, tiling);
  return cudaGetLastError();
}

}  // namespace depthwise
