// Depthwise convolution with very large kernels of images up to 64 columns, sixteen images a product, as band_images.cuh
// computes it, channels_last: forward, and grad of input at stride 1. fp16 and bf16, fp32 accumulators.
//
// Serves  stride and dilation 1, any kernel height, number of images and padding of rows at run time; channels in eights,
//         aligned tensors. Compile-time are the type, the chunks of band, image and outputs, and kRows.
// Owns    a block computes some strips, one after the other, of eight channels (16 bytes a pixel) of sixteen images. A
//         strip is kRows rows of outputs. A warp takes a channel and a column group, with all its sums in registers: all
//         warps walk down the same input rows, and only those have to be in shared memory that are multiplied or on their
//         way; the rows of the next strip follow at once.
// Reads   an input row comes as often as strips meet it, mostly from L2, and of each sector of 32 bytes one half (31x31 on
//         56x56, four rows: 7.2 times). A stage is some rows of a strip, and three stages make the ring: one that is
//         multiplied, two on their way. The pixels of a chunk of eight columns and eight channels fill a cell of 128 bytes,
//         of which ldmatrix and stores make rows of eight pixels of a channel in place. The warp does it that copied them,
//         before the only barrier of a stage.
// Banks   In a cell of image i, channel c lies at 16 * (c ^ i % 8): the eight images of a matrix lie in different banks,
//         as do the words that a warp stores.
// Writes  sums go where the stage was that was multiplied last, as rows of pixels of a channel; ldmatrix turns them around,
//         so that four lanes hold the eight channels of a pixel.
// Memory  per channel and kernel row 8 * kChunks + 6 words of weights; a stage takes 2 KB for each chunk of its rows, and
//         has room for a row of outputs. 31x31 on 56x56: 45.6 KB + 3 * 57.3 KB, stages of four rows.
// NaN     as in band_images.cuh; a strip's outputs are computed again when all of them are stored.
// Chosen  by name alone (variants.h).
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
  static constexpr int kWarpChunks = kWarps / kImageGroups;     // of a row, that warps take at a time
  // A row of sixteen images: of input, and of outputs.
  static constexpr int kRowBytes = kBandImages * kImageChunks_ * kCellBytes;
  static constexpr int kOutRowBytes = kBandImages * kTiles_ * kCellBytes;
};

// How a launch is cut.
struct BandImagesNhwcTiling {
  static constexpr int kMaxParts = 64;

  int stage_rows, stage;     // of a stage, at most; elements of shared memory from stage to stage
  int out_rows;              // of outputs that have room where a stage was
  int begin[kMaxParts + 1];  // strips of each part of an image
};

// What a block computes: some strips, one after the other.
struct BandImagesNhwcBlock {
  int image, images, channel;
  static constexpr int channels = kChannelsNhwc;

  __device__ BandImagesNhwcBlock(const DirectArgs& args) {
    channel = blockIdx.x * kChannelsNhwc;
    image = blockIdx.y * kBandImages;
    images = min(kBandImages, static_cast<int>(args.n) - image);
  }
};

template <class Traits>
__host__ __device__ BandRows<Traits> rows_of_strip(const DirectArgs& args, int strip) {
  const int row = strip * Traits::kRows;
  return BandRows<Traits>(args, row, args.out_h - row < Traits::kRows ? args.out_h - row : Traits::kRows);
}

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

// The input rows of a block's strips in shared memory, stage by stage, each of one strip alone. A row is cells, image by
// image and chunk by chunk.
template <class Traits>
struct BandRing {
  using T = typename Traits::T;
  static constexpr int kRow = Traits::kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kImage = Traits::kImageChunks * kCell;
  static constexpr int kSteps = divide_up(Traits::kImageChunks, Traits::kWarpChunks);  // of a warp, a row

  const DirectArgs& args;
  const BandImagesNhwcTiling& tiling;
  T* ring;
  int slot;          // of the next stage
  int left;          // rows of the present stage that are not multiplied yet
  unsigned address;  // this lane's row of a matrix, of the next row

  __device__ __forceinline__ BandRing(const DirectArgs& args, const BandImagesNhwcTiling& tiling, T* ring)
      : args(args), tiling(tiling), ring(ring), slot(0), left(0), address(0) {
    int strip = tiling.begin[blockIdx.z] - 1, row = 0;
    find_strip(strip, row);
#pragma unroll 1
    for (int stage = 0; stage < kBandStages - 1; ++stage) {
      copy_stage(strip, row, stage);
      find_stage(strip, row);
    }
  }

  __device__ __forceinline__ T* stage_at(int slot) const { return ring + slot * tiling.stage; }
  // That of the last stage that was multiplied.
  __device__ __forceinline__ int free_slot() const {
    const int next = ptx::opaque(slot);
    return next == 0 ? kBandStages - 1 : next - 1;
  }

  // Where the next strip begins that reads anything, and the next stage.
  __device__ __forceinline__ void find_strip(int& strip, int& row) const {
    while (++strip < tiling.begin[blockIdx.z + 1]) {
      const BandRows<Traits> rows = rows_of_strip<Traits>(args, strip);
      row = rows.begin;
      if (rows.begin < rows.end) return;
    }
  }
  __device__ __forceinline__ void find_stage(int& strip, int& row) const {
    row += tiling.stage_rows;
    if (strip < tiling.begin[blockIdx.z + 1] && row >= rows_of_strip<Traits>(args, strip).end) find_strip(strip, row);
  }

  // Zeros where there is no column or image.
  __device__ __forceinline__ void copy_stage(int strip, int row, int slot) const {
    if (strip < tiling.begin[blockIdx.z + 1]) {
      const BandImagesNhwcBlock block(args);
      const WarpCells cells;
      const bool image_exists = static_cast<int>(cells.lane_image) < block.images;
      const int column = cells.column();
      const int row_end = min(row + tiling.stage_rows, rows_of_strip<Traits>(args, strip).end);
      const int pixel = ptx::opaque(static_cast<int>(args.out_c)), row_step = pixel * args.w;
      T* to = stage_at(slot) + cells.lane_image * kImage + cells.chunk * kCell + cells.pixel * kChannelsNhwc;
      const T* from =
          static_cast<const T*>(args.input) + block.channel +
          (((block.image + cells.lane_image) * static_cast<int64_t>(args.h) + row) * args.w + column) * pixel;
#pragma unroll 1
      for (; row < row_end; ++row, to += kRow, from += row_step)
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
          if (cells.chunk + k * Traits::kWarpChunks < Traits::kImageChunks)
            copy_async<16>(to + k * Traits::kWarpChunks * kCell, from + k * Traits::kWarpChunks * kChunk * pixel,
                           image_exists && column + k * Traits::kWarpChunks * kChunk < args.w);
    }
    commit_copies();
  }

  // Makes rows of pixels of what this warp has copied.
  __device__ __forceinline__ void turn_stage(int rows) const {
    const WarpCells cells;
    T* const stage = stage_at(slot) + cells.chunk * kCell;
    unsigned from_address = ptx::shared_address(stage + cells.lane_image * kImage + cells.pixel * kChannelsNhwc);
    T* to[kWarpImages];  // lane 4 * g + t gets pixels 2 * t and on of channel g
#pragma unroll
    for (int i = 0; i < kWarpImages; ++i)
      to[i] = stage + (cells.image + i) * kImage + cell_offset(cells.lane / 4, cells.image + i) + cells.lane % 4 * 2;
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (cells.chunk + k * Traits::kWarpChunks >= Traits::kImageChunks) continue;
        unsigned words[kWarpImages];
        ptx::load_matrices_transposed(words, from_address + k * Traits::kWarpChunks * kCellBytes);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kWarpImages; ++i)
          *reinterpret_cast<unsigned*>(to[i] + k * Traits::kWarpChunks * kCell) = words[i];
      }
      from_address += Traits::kRowBytes;
#pragma unroll
      for (int i = 0; i < kWarpImages; ++i) to[i] += kRow;
    }
  }

  // This lane's row of a matrix, of the next row, which is `row` of a strip's. All warps of the block come here as often.
  __device__ __forceinline__ unsigned next_row(int row, int strip) {
    if (left == 0) {
      left = min(tiling.stage_rows, rows_of_strip<Traits>(args, ptx::opaque(strip)).end - row);
      wait_for_copies<kBandStages - 2>();
      __syncwarp();
      turn_stage(left);
      __syncthreads();  // the stage before this one has been multiplied, too
#pragma unroll 1
      for (int stage = 0; stage < kBandStages - 1; ++stage) find_stage(strip, row);
      copy_stage(strip, row, free_slot());
      // Lane l names image l % 16 to ldmatrix, and chunk l / 16 of a pair.
      const unsigned thread = ptx::thread_index(), lane = thread % 32, image = lane % kBandImages;
      address = ptx::shared_address(stage_at(slot) + image * kImage + lane / kBandImages * kCell +
                                    cell_offset(thread / 32 % kChannelsNhwc, image));
      slot = slot + 1 == kBandStages ? 0 : slot + 1;
    }
    --left;
    const unsigned present = address;
    address += Traits::kRowBytes;
    return present;
  }
};

// A warp's sums of rows [first, end) to where a stage was: cells, row by row, image by image and tile by tile.
template <int kGroup, class Traits>
__device__ __forceinline__ void stage_sums(typename Traits::T* staged,
                                           const float (&sum)[Traits::kRows][Traits::tiles(kGroup)][4], int first,
                                           int end) {
  using T = typename Traits::T;
  constexpr int kRow = Traits::kOutRowBytes / static_cast<int>(sizeof(T));
  const unsigned thread = ptx::thread_index(), lane = thread % 32, channel = thread / 32 % kChannelsNhwc;
  const unsigned image = lane / 4;  // and the eighth one after it, whose channels are in the same places
  T* to =
      staged + (image * Traits::kTiles + kGroup) * kCell + cell_offset(channel, image) + lane % 4 * 2 - first * kRow;
#pragma unroll
  for (int q = 0; q < Traits::kRows; ++q)
    if (q >= first && q < end)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int t = 0; t < Traits::tiles(kGroup); ++t)
          *reinterpret_cast<unsigned*>(to + q * kRow +
                                       (half * kBandImages / 2 * Traits::kTiles + t * Traits::kStep) * kCell) =
              pack<T>(sum[q][t][2 * half], sum[q][t][2 * half + 1]);
}

// Staged outputs to memory, `rows` of them: lane 4 * g + t stores channels 2 * t and on of pixel g of a cell.
template <class Traits>
__device__ __forceinline__ void store_staged(const typename Traits::T* staged, const DirectArgs& args, int first_row,
                                             int rows) {
  using T = typename Traits::T;
  constexpr int kImage = Traits::kTiles * kCell;
  const BandImagesNhwcBlock block(args);
  const WarpCells cells;
  const int images = block.images - static_cast<int>(cells.image), pixel = ptx::opaque(static_cast<int>(args.out_c));
  const int64_t image_step = static_cast<int64_t>(args.out_h * args.out_w) * pixel;
  unsigned row_address = ptx::shared_address(staged + cells.lane_image * kImage + cells.chunk * kCell +
                                             cell_offset(cells.lane % kChannelsNhwc, cells.lane_image));
  const int first_column = cells.chunk * kChunk + cells.lane / 4;
  T* out = static_cast<T*>(args.out) + (block.image + cells.image) * image_step +
           static_cast<int64_t>(first_row * args.out_w) * pixel + block.channel + cells.lane % 4 * 2;
#pragma unroll 1
  for (int row = 0; row < rows; ++row) {
    unsigned address = row_address;
    // Not unrolled: sums of rows yet to come are in most registers.
#pragma unroll 1
    for (int column = first_column; column < Traits::kTiles * kChunk; column += Traits::kWarpChunks * kChunk) {
      unsigned words[kWarpImages];
      ptx::load_matrices_transposed(words, address);
      T* to = out + column * pixel;
#pragma unroll
      for (int i = 0; i < kWarpImages; ++i, to += image_step) {
        union {
          unsigned word;
          Vector<T, 2> vector;
        } values{words[i]};
        if (i < images && column < args.out_w) store_streaming(to, values.vector);
      }
      address += Traits::kWarpChunks * kCellBytes;
    }
    row_address += Traits::kOutRowBytes;
    out += args.out_w * pixel;
  }
}

// Computes those of a strip's outputs that are NaN again, one by one.
template <class Traits>
__device__ __noinline__ void mend_strip(const DirectArgs& args, int strip) {
  using T = typename Traits::T;
  const BandImagesNhwcBlock block(args);
  const int first_row = strip * Traits::kRows, rows = min(Traits::kRows, args.out_h - first_row);
  for (int k = threadIdx.x; k < block.images * rows * args.out_w * kChannelsNhwc; k += Traits::kThreads) {
    const int channel = block.channel + k % kChannelsNhwc, column = k / kChannelsNhwc % args.out_w;
    const int in_column = k / kChannelsNhwc / args.out_w, row = first_row + in_column % rows;
    const int64_t image = block.image + in_column / rows;
    T* const at = static_cast<T*>(args.out) + ((image * args.out_h + row) * args.out_w + column) * args.out_c + channel;
    if (is_nan(*at)) *at = from_float<T>(toeplitz_exact<Traits>(args, static_cast<int>(image), channel, row, column));
  }
}

// All of the block's strips, for a warp of a column group.
template <int kGroup, class Traits>
__device__ __forceinline__ void compute_strips(const DirectArgs& args, const BandImagesNhwcTiling& tiling,
                                               BandRing<Traits>& ring, const unsigned* band_rows) {
  using T = typename Traits::T;
  constexpr int kRows = Traits::kRows, kTiles = Traits::tiles(kGroup);
#pragma unroll 1
  for (int strip = tiling.begin[blockIdx.z]; strip < tiling.begin[blockIdx.z + 1]; ++strip) {
    float sum[kRows][kTiles][4];
    const int channel = BandImagesNhwcBlock(args).channel + ptx::thread_index() / 32 % kChannelsNhwc;
    const float bias = args.bias ? load(static_cast<const T*>(args.bias) + channel) : 0.f;
#pragma unroll
    for (int q = 0; q < kRows; ++q)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[q][t][e] = bias;
    const BandRows<Traits> rows = rows_of_strip<Traits>(args, strip);
    walk_rows<kGroup, Traits>(sum, rows, args.kernel_h, band_rows, [&](int row) { return ring.next_row(row, strip); });

    float probe = 0;
#pragma unroll
    for (int q = 0; q < kRows; ++q)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) probe += sum[q][t][e];

    const int all_rows = min(kRows, args.out_h - strip * kRows);
#pragma unroll 1
    for (int q = 0; q < all_rows; q += tiling.out_rows) {
      // Opaque: what follows from them is not kept in registers beside the sums.
      T* const staged = ring.stage_at(ring.free_slot());
      const int row = ptx::opaque(strip) * kRows + q, count = min(tiling.out_rows, all_rows - q);
      __syncthreads();  // what was here has been multiplied, or stored
      stage_sums<kGroup, Traits>(staged, sum, q, q + tiling.out_rows);
      __syncthreads();
      store_staged<Traits>(staged, args, row, count);
    }
    if (__syncthreads_or(probe != probe)) mend_strip<Traits>(args, strip);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBoundBlocks)
    band_images_nhwc_kernel(const __grid_constant__ DirectArgs args,
                            const __grid_constant__ BandImagesNhwcTiling tiling) {
  using T = typename Traits::T;
  const BandImagesNhwcBlock block(args);
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, channel = warp % kChannelsNhwc;

  // Shared memory: the ring, weights.
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const stages = reinterpret_cast<T*>(shared_memory);
  unsigned* const pairs = reinterpret_cast<unsigned*>(stages + kBandStages * tiling.stage);
  BandRing<Traits> ring(args, tiling, stages);
  load_weights<Traits>(pairs, args, block);
  __syncthreads();

  const unsigned* const band = pairs + channel * args.kernel_h * Traits::kBand + kChunk - 1 + 2 * (lane % 4) - lane / 4;
  for_each_index<Traits::kColumnGroups>([&](auto group) {
    if (warp / kChannelsNhwc == group.value) compute_strips<group.value, Traits>(args, tiling, ring, band);
  });
}

// Cuts an image's strips into parts that read as many rows, and as many parts as make all blocks end first. A strip's
// outputs cost about two rows, and a block's beginning four.
template <class Traits>
int cut_strips(BandImagesNhwcTiling& tiling, const DirectArgs& args, int64_t groups, int concurrent) {
  constexpr int kStripCost = 2, kBlockCost = 4;
  const int strips = divide_up(args.out_h, Traits::kRows);
  const auto cost = [&](int strip) {
    const BandRows<Traits> rows = rows_of_strip<Traits>(args, strip);
    return kStripCost + max_int(0, rows.end - rows.begin);
  };
  int64_t all = 0;
  for (int strip = 0; strip < strips; ++strip) all += cost(strip);
  // Part p ends where the strips' cost comes closest to p + 1 of all parts'. Returns the most that a part costs.
  const auto cut = [&](int parts) {
    int64_t before = 0, begun = 0, most = 0;
    int part = 0;
    tiling.begin[0] = 0;
    for (int strip = 0; strip < strips; ++strip) {
      const int64_t strip_cost = cost(strip);
      if (part + 1 < parts && (2 * before + strip_cost) * parts > 2 * all * (part + 1))
        tiling.begin[++part] = strip, begun = before;
      before += strip_cost;
      if (before - begun > most) most = before - begun;
    }
    tiling.begin[part + 1] = strips;
    return part + 1 == parts ? most : INT64_MAX / 2;
  };
  int best = 1;
  int64_t least = INT64_MAX;
  for (int parts = 1; parts <= min_int(strips, BandImagesNhwcTiling::kMaxParts); ++parts) {
    const int64_t most = cut(parts);
    if (most == INT64_MAX / 2) continue;
    const int64_t all_blocks = divide_up<int64_t>(groups * parts, concurrent) * (most + kBlockCost);
    if (all_blocks < least) least = all_blocks, best = parts;
  }
  cut(best);
  return best;
}

template <class Traits>
int launch_band_images_nhwc(const DirectArgs& args, int, cudaStream_t stream) {
  using T = typename Traits::T;
  constexpr int kMostStageRows = 4;
  const DeviceLimits& device = device_limits();
  BandImagesNhwcTiling tiling{};
  const auto stage_bytes = [](int rows) { return max_int(rows * Traits::kRowBytes, Traits::kOutRowBytes); };
  const auto bytes = [&](int rows) {
    return kChannelsNhwc * args.kernel_h * Traits::kBand * 4 + kBandStages * stage_bytes(rows);
  };
  tiling.stage_rows = kMostStageRows;
  while (tiling.stage_rows > 1 && bytes(tiling.stage_rows) > device.shared_bytes_for(Traits::kBoundBlocks))
    --tiling.stage_rows;
  const int all_bytes = bytes(tiling.stage_rows);
  if (all_bytes > device.shared_bytes_block) return kTooLittleSharedMemory;
  tiling.stage = stage_bytes(tiling.stage_rows) / static_cast<int>(sizeof(T));
  tiling.out_rows = stage_bytes(tiling.stage_rows) / Traits::kOutRowBytes;
  const int channels = static_cast<int>(args.out_c) / kChannelsNhwc;
  const int images = static_cast<int>(divide_up<int64_t>(args.n, kBandImages));
  const int parts =
      cut_strips<Traits>(tiling, args, int64_t{channels} * images, Traits::kBoundBlocks * device.multiprocessors);

  const auto kernel = band_images_nhwc_kernel<Traits>;
  if (const int error = allow_shared_bytes(kernel, all_bytes)) return error;
  const dim3 blocks(channels, images, parts);
  kernel<<<blocks, Traits::kThreads, all_bytes, stream>>>(args, tiling);
  return cudaGetLastError();
}

}  // namespace depthwise
