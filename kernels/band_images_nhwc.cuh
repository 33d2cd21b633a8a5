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

constexpr int kBandStages = 3;                 // of a ring
constexpr int kCell = kChunk * kChannelsNhwc;  // elements: eight pixels of eight channels
constexpr int kCellBytes = 2 * kCell;
constexpr int kWarpImages = 32 / kChunk, kImageGroups = kBandImages / kWarpImages;  // of a warp; groups of so many

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

// Where a channel's row of pixels begins in a cell of an image.
__device__ __forceinline__ unsigned cell_offset(unsigned channel, unsigned image) {
  return (channel ^ image % kChannelsNhwc) * kChunk;
}

// A warp copies, turns around and stores the cells of four images: of every row those of the same chunks. Lane l is at
// pixel l % 8 of image l / 8, in global memory and in cells that have not been turned around yet.
struct WarpCells {
  unsigned image, chunk;  // of the first cell
  unsigned lane, pixel, lane_image;

  __device__ __forceinline__ WarpCells() {
    const unsigned thread = ptx::thread_index();
    image = thread / 32 % kImageGroups * kWarpImages, chunk = thread / 32 / kImageGroups;
    lane = thread % 32, pixel = lane % kChunk, lane_image = image + lane / kChunk;
  }
  __device__ __forceinline__ int column() const { return chunk * kChunk + pixel; }
};

// The input rows of a strip in shared memory, stage by stage. A row is cells, image by image and chunk by chunk.
template <class Traits>
struct BandRing {
  using T = typename Traits::T;
  static constexpr int kRow = Traits::kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kImage = Traits::kImageChunks * kCell;
  // Chunks of a row that a warp takes, at most.
  static constexpr int kWarpChunks = Traits::kWarps / kImageGroups;
  static constexpr int kSteps = divide_up(Traits::kImageChunks, kWarpChunks);

  const DirectArgs& args;
  const BandImagesNhwcTiling& tiling;
  T* ring;
  int end;           // of all rows
  int next, slot;    // the first row of the next stage, and that stage's place
  int left;          // rows of the present stage that are not multiplied yet
  unsigned address;  // this lane's row of a matrix, of the next row
  const T* from;     // this lane's pixel, of the next row to copy
  bool image_exists;

  __device__ __forceinline__ BandRing(const DirectArgs& args, const BandImagesNhwcTiling& tiling,
                                      const BandImagesNhwcBlock<Traits>& block, T* ring, const BandRows<Traits>& rows)
      : args(args), tiling(tiling), ring(ring), end(rows.end), next(rows.begin), slot(0), left(0), address(0) {
    const WarpCells cells;
    image_exists = static_cast<int>(cells.lane_image) < block.images;
    from = static_cast<const T*>(args.input) + block.channel +
           (((block.image + cells.lane_image) * static_cast<int64_t>(args.h) + next) * args.w + cells.column()) *
               args.out_c;
#pragma unroll 1
    for (int stage = 0; stage < kBandStages - 1; ++stage) copy_stage(next + stage * tiling.stage_rows, stage);
  }

  __device__ __forceinline__ T* stage_at(int slot) const { return ring + slot * tiling.stage_rows * kRow; }

  // Zeros where there is no column or image.
  __device__ __forceinline__ void copy_stage(int row, int slot) {
    const WarpCells cells;
    const int column = cells.column(), row_end = min(row + tiling.stage_rows, end);
    T* to = stage_at(slot) + cells.lane_image * kImage + cells.chunk * kCell + cells.pixel * kChannelsNhwc;
    const int64_t step = args.out_c * (kWarpChunks * kChunk), row_step = args.out_c * args.w;
#pragma unroll 1
    for (; row < row_end; ++row, to += kRow, from += row_step)
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
        if (cells.chunk + k * kWarpChunks < Traits::kImageChunks)
          copy_async<16>(to + k * kWarpChunks * kCell, from + k * step,
                         image_exists && column + k * kWarpChunks * kChunk < args.w);
    commit_copies();
  }

  // Makes rows of pixels of what this warp has copied.
  __device__ __forceinline__ void turn_stage() const {
    const WarpCells cells;
    const int rows = min(tiling.stage_rows, end - next);
    T* const stage = stage_at(slot) + cells.chunk * kCell;
    unsigned from_address = ptx::shared_address(stage + cells.lane_image * kImage + cells.pixel * kChannelsNhwc);
    T* to[kWarpImages];  // lane 4 * g + t gets pixels 2 * t and on of channel g
#pragma unroll
    for (int i = 0; i < kWarpImages; ++i)
      to[i] = stage + (cells.image + i) * kImage + cell_offset(cells.lane / 4, cells.image + i) + cells.lane % 4 * 2;
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      unsigned words[kSteps][kWarpImages];
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
        if (cells.chunk + k * kWarpChunks < Traits::kImageChunks)
          ptx::load_matrices_transposed(words[k], from_address + k * kWarpChunks * kCellBytes);
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int i = 0; i < kWarpImages; ++i)
          if (cells.chunk + k * kWarpChunks < Traits::kImageChunks)
            *reinterpret_cast<unsigned*>(to[i] + k * kWarpChunks * kCell) = words[k][i];
      from_address += Traits::kRowBytes;
#pragma unroll
      for (int i = 0; i < kWarpImages; ++i) to[i] += kRow;
    }
  }

  // All warps of the block come here, and to next_row(), as often.
  __device__ __forceinline__ void next_stage() {
    wait_for_copies<kBandStages - 2>();
    __syncwarp();
    turn_stage();
    __syncthreads();  // the stage before this one has been multiplied, too
    copy_stage(next + (kBandStages - 1) * tiling.stage_rows, slot == 0 ? kBandStages - 1 : slot - 1);
    // Lane l names image l % 16 to ldmatrix, and chunk l / 16 of a pair.
    const unsigned thread = ptx::thread_index(), lane = thread % 32, image = lane % kBandImages;
    const unsigned channel = thread / 32 % kChannelsNhwc;
    address =
        ptx::shared_address(stage_at(slot) + image * kImage + lane / kBandImages * kCell + cell_offset(channel, image));
    left = tiling.stage_rows;
    next += tiling.stage_rows;
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
  const unsigned thread = ptx::thread_index(), lane = thread % 32, channel = thread / 32 % kChannelsNhwc;
  const unsigned image = lane / 4;
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

// Computes those of the staged outputs that are NaN again, one by one.
template <class Traits>
__device__ __noinline__ void mend_staged(typename Traits::T* staged, const DirectArgs& args,
                                         const BandImagesNhwcTiling& tiling) {
  using T = typename Traits::T;
  const BandImagesNhwcBlock<Traits> block(args, tiling);
  for (int k = threadIdx.x; k < block.rows * kBandImages * Traits::kTiles * kCell; k += Traits::kThreads) {
    const int pixel = k % kChunk, channel = k / kChunk % kChannelsNhwc, tile = k / kCell % Traits::kTiles;
    const int image = k / kCell / Traits::kTiles % kBandImages, row = k / kCell / Traits::kTiles / kBandImages;
    const int column = tile * kChunk + pixel;
    T& value = staged[k / kCell * kCell + cell_offset(channel, image) + pixel];
    if (image < block.images && column < args.out_w && is_nan(value))
      value = from_float<T>(
          toeplitz_exact<Traits>(args, block.image + image, block.channel + channel, block.row + row, column));
  }
}

// The staged outputs to memory: lane 4 * g + t stores channels 2 * t and on of pixel g of a cell.
template <class Traits>
__device__ __forceinline__ void store_staged(const typename Traits::T* staged, const DirectArgs& args,
                                             const BandImagesNhwcTiling& tiling) {
  using T = typename Traits::T;
  constexpr int kImage = Traits::kTiles * kCell, kWarpChunks = Traits::kWarps / kImageGroups;
  const BandImagesNhwcBlock<Traits> block(args, tiling);
  const WarpCells cells;
  const int images = block.images - static_cast<int>(cells.image);
  unsigned address = ptx::shared_address(staged + cells.lane_image * kImage + cells.chunk * kCell +
                                         cell_offset(cells.lane % kChannelsNhwc, cells.lane_image));
  const int column = cells.chunk * kChunk + cells.lane / 4;
  const int64_t image_step = static_cast<int64_t>(args.out_h) * args.out_w * args.out_c;
  T* out = static_cast<T*>(args.out) + (block.image + cells.image) * image_step +
           (static_cast<int64_t>(block.row) * args.out_w + column) * args.out_c + block.channel + cells.lane % 4 * 2;
#pragma unroll 1
  for (int row = 0; row < block.rows; ++row) {
#pragma unroll
    for (int k = 0; k < divide_up(Traits::kTiles, kWarpChunks); ++k) {
      if (cells.chunk + k * kWarpChunks >= Traits::kTiles) continue;
      unsigned words[kWarpImages];
      ptx::load_matrices_transposed(words, address + k * kWarpChunks * kCellBytes);
      T* to = out + k * (kWarpChunks * kChunk) * args.out_c;
#pragma unroll
      for (int i = 0; i < kWarpImages; ++i, to += image_step) {
        union {
          unsigned word;
          Vector<T, 2> vector;
        } values{words[i]};
        if (i < images && column + k * kWarpChunks * kChunk < args.out_w) store_streaming(to, values.vector);
      }
    }
    address += Traits::kOutRowBytes;
    out += args.out_w * args.out_c;
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBoundBlocks)
    band_images_nhwc_kernel(const __grid_constant__ DirectArgs args,
                            const __grid_constant__ BandImagesNhwcTiling tiling) {
  using T = typename Traits::T;
  const BandImagesNhwcBlock<Traits> block(args, tiling);
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, channel = warp % kChannelsNhwc;

  // Shared memory: weights, the ring, where outputs go as well.
  extern __shared__ __align__(16) unsigned char shared_memory[];
  unsigned* const pairs = reinterpret_cast<unsigned*>(shared_memory);
  T* const tile = reinterpret_cast<T*>(pairs + kChannelsNhwc * args.kernel_h * Traits::kBand);
  const BandRows<Traits> rows(args, block.row, block.rows);
  BandRing<Traits> ring(args, tiling, block, tile, rows);
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
  if (__syncthreads_or(poisoned)) {
    mend_staged<Traits>(tile, args, tiling);
    __syncthreads();
  }
  store_staged<Traits>(tile, args, tiling);
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
