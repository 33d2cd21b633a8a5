// Depthwise convolution with very large kernels of images up to 64 columns as products with banded (Toeplitz) matrices on
// the tensor cores, sixteen images a product: forward, and grad of input at stride 1 (filter flipped). NCHW, fp16 and
// bf16, fp32 accumulators.
//
// Idea    The products are those of toeplitz.cuh, but the sixteen rows of a product are sixteen images. They all lie at
//         the same row of outputs y and of input r, so that only pairs (y, r) which a kernel row joins are multiplied:
//         no row of padding takes part, whereas sixteen rows of an image of 28x28 meet all 29 kernel rows, if each but
//         for 21.5 of them. Column tiles (eight outputs) take the chunks of eight input columns that lie both in their
//         band and in the image. Of the multiplies of 29x29 on 28x28 67% are useful, of 31x31 on 56x56 81%.
// Reuse   A warp computes a unit: kRows rows of outputs by up to four column tiles, kStep tiles apart, with all sums in
//         registers. It walks down the input rows: each is fetched once and multiplied with the kRows kernel rows that
//         join it to the unit's rows. Those move by one from input row to input row; so they too are registers, a ring of
//         kRows, of which a step fetches one. (31x31 on 56x56, kRows = 4: 36 products on average for 3.5 ldmatrix and 5
//         words of the band; toeplitz.cuh: 18 for 4 and 2.5.) At both ends of the walk, where some of the unit's rows are
//         not met, the band is fetched for each that is.
//         kApart: rounds of the ring come in turn from the lower and the upper half of the walk, for which the ring is fetched
//         anew: so sums stay small where the kernel's halves have different signs, and truncated ones drift less.
//         The tiles of a unit are an even number apart, so that all fetch the band's chunks in the same pairs, which are
//         register pairs to a product; pairs of input chunks are even everywhere.
// Serves  stride and dilation 1, any kernel height, number of images and padding of rows at run time; compile-time are the
//         type, the chunks of band, image and outputs, and kRows. Fewer than sixteen images leave rows of products idle.
// Owns    a block computes some rows of one channel of sixteen images, or of twice as many where that makes fewer waves of
//         blocks. Its units are dealt to its warps by the launcher, so that all four partitions of a multiprocessor have
//         as many products. Outputs go from registers to memory, so that the stores of a unit overlap with other products.
// Memory  per kernel row 8 * kChunks + 6 words of weights, each a pair of neighbours as B wants it; the input rows inside
//         the image in chunks of 16 bytes, images an odd number of chunks apart (ldmatrix without bank conflicts). 31x31
//         on 56x56: 5.7 KB + 100.6 KB.
// NaN     A zero of the band times an infinity or NaN gives NaN in outputs that do not see it. So where a thread finds a
//         NaN among its sums it computes those outputs again with plain multiply-adds over their own taps.
// Chosen  select.h.
#pragma once

#include "band_images_units.cuh"
#include "toeplitz_block.cuh"

namespace depthwise {

// A kernel row's band, as far as the unit's tiles use it.
template <int kGroup, class Traits>
__device__ __forceinline__ void fetch_band(unsigned (&band)[Traits::kChunks], const unsigned* row) {
#pragma unroll
  for (int s = 0; s < Traits::kChunks; ++s)
    if (Traits::fetches_band(kGroup, s)) band[s] = row[s * kChunk];
}

// The k-th pair of chunks of an input row of sixteen images: images 0-7 and 8-15 of the first chunk, then of the second.
template <class Traits>
__device__ __forceinline__ void fetch_input(unsigned (&in)[4], unsigned address, int k) {
  if (2 * k + 1 < Traits::kImageChunks) {
    ptx::load_matrices(in, address + k * 32);
  } else {
    unsigned first[2];
    ptx::load_matrices(first, address + k * 32);
    in[0] = first[0], in[1] = first[1];
  }
}

// Adds the products of a pair of chunks with a kernel row's band to the sums of a row of outputs.
template <int kGroup, class Traits>
__device__ __forceinline__ void multiply_pair(float (&sum)[Traits::tiles(kGroup)][4], const unsigned (&in)[4],
                                              const unsigned (&band)[Traits::kChunks], int k) {
  using T = typename Traits::T;
#pragma unroll
  for (int t = 0; t < Traits::tiles(kGroup); ++t) {
    const int n = kGroup + t * Traits::kStep, s = 2 * k - n - Traits::kOrigin;
    const bool left = Traits::used(n, 2 * k), right = Traits::used(n, 2 * k + 1);
    if (left && right)
      multiply_k16<T>(sum[t], in[0], in[1], in[2], in[3], band[s], band[s + 1]);
    else if (left)
      multiply_k8<T>(sum[t], in[0], in[1], band[s]);
    else if (right)
      multiply_k8<T>(sum[t], in[2], in[3], band[s + 1]);
  }
}

// Where a thread's outputs lie: two neighbouring columns of each tile of images g and g + 8 of the unit's sixteen.
template <class Traits>
struct BandOutputs {
  using T = typename Traits::T;
  T* out;  // of the first image, row and column
  int image, images, channel, row, rows, column, columns;
  int64_t image_step;

  __device__ BandOutputs(const DirectArgs& args, const BandImagesBlock& block, const BandUnit<Traits>& unit) {
    const int lane = threadIdx.x % 32, first = unit.group * kBandImages + lane / 4;
    image = block.image + first, images = block.images - first;
    channel = block.channel;
    row = block.row + unit.row, rows = min(Traits::kRows, block.rows - unit.row);
    column = unit.column_group * kChunk + lane % 4 * 2, columns = args.out_w - column;
    image_step = args.out_c * args.out_h * args.out_w * (kBandImages / 2);
    out = static_cast<T*>(args.out) +
          ((image * args.out_c + channel) * args.out_h + row) * static_cast<int64_t>(args.out_w) + column;
  }
  // Calls body(pointer, q, t, half) for the pairs that exist; of a pair the first element.
  template <int kTiles, class Body>
  __device__ __forceinline__ void for_each_pair(int out_w, Body&& body) const {
#pragma unroll
    for (int q = 0; q < Traits::kRows; ++q)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* const to = out + half * image_step + q * out_w;
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
          if (q < rows && half * (kBandImages / 2) < images && t * Traits::kStep * kChunk < columns)
            body(to + t * Traits::kStep * kChunk, q, t, half);
      }
  }
};

// Computes those of a thread's outputs that are NaN again, one by one.
template <class Traits>
__device__ __noinline__ void repair_unit(const DirectArgs& args, const BandImagesTiling& tiling, int number) {
  using T = typename Traits::T;
  const BandUnit<Traits> unit(number, tiling);
  const BandOutputs<Traits> outputs(args, BandImagesBlock(args, tiling), unit);
  const int tiles = Traits::tiles(unit.column_group);
#pragma unroll 1
  for (int k = 0; k < outputs.rows * tiles * 4; ++k) {
    const int e = k % 2, half = k / 2 % 2, offset = k / 4 % tiles * Traits::kStep * kChunk + e, q = k / 4 / tiles;
    if (half * (kBandImages / 2) >= outputs.images || offset >= outputs.columns) continue;
    T* const at = outputs.out + half * outputs.image_step + q * args.out_w + offset;
    if (is_nan(*at))
      *at = from_float<T>(toeplitz_exact<Traits>(args, outputs.image + half * (kBandImages / 2), outputs.channel,
                                                 outputs.row + q, outputs.column + offset));
  }
}

// `band`: this lane's words of kernel row 0; `tile`: this lane's row of a matrix, of the unit's images, of input row 0.
template <int kGroup, class Traits>
__device__ __forceinline__ void compute_unit(const DirectArgs& args, const BandImagesTiling& tiling, int number,
                                             const unsigned* band_rows, unsigned tile, float bias) {
  using T = typename Traits::T;
  constexpr int kRows = Traits::kRows, kTiles = Traits::tiles(kGroup);
  constexpr int kRowBytes = Traits::kPitch * kChunk * sizeof(T);
  const BandUnit<Traits> unit(number, tiling);
  float sum[kRows][kTiles][4];
  start_sums(sum, bias);

  // Input row r meets the unit's row q by kernel row r - first - q: rows [full, full_end) meet all of them.
  const BandImagesBlock block(args, tiling);
  const int first = block.row + unit.row - args.padding_h, rows = min(kRows, block.rows - unit.row);
  const int begin = max(0, first), end = min(args.h, first + args.kernel_h + rows - 1);
  const int full = min(end, max(begin, first + kRows - 1)), full_end = max(full, min(end, first + args.kernel_h));

#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    // Either end of the walk: the band is fetched for each row that is met.
#pragma unroll 1
    for (int r = pass == 0 ? begin : full_end; r < (pass == 0 ? full : end); ++r) {
      unsigned in[Traits::kPairs][4];
#pragma unroll
      for (int k = 0; k < Traits::kPairs; ++k)
        if (Traits::fetches(kGroup, k)) fetch_input<Traits>(in[k], tile + r * kRowBytes, k);
#pragma unroll
      for (int q = 0; q < kRows; ++q) {
        const int i = r - first - q;
        if (static_cast<unsigned>(i) >= static_cast<unsigned>(args.kernel_h)) continue;
        unsigned band[Traits::kChunks];
        fetch_band<kGroup, Traits>(band, band_rows + i * Traits::kBand);
#pragma unroll
        for (int k = 0; k < Traits::kPairs; ++k) multiply_pair<kGroup, Traits>(sum[q], in[k], band, k);
      }
    }
    if (pass > 0 || full >= full_end) continue;
    // Between them. Kernel row i of a round from r on is in place (i - r + first) % kRows of the ring.
    unsigned band[kRows][Traits::kChunks];
    const int rounds = divide_up(full_end - full, kRows);
    int r = full;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round, r += kRows) {
      if constexpr (Traits::kApart) r = full + kRows * (round / 2 + (round % 2 == 0 ? rounds / 2 : 0));
      const unsigned* row = band_rows + (r - first - kRows + 1) * Traits::kBand;
      if (Traits::kApart || round == 0) {
#pragma unroll
        for (int q = 1; q < kRows; ++q) fetch_band<kGroup, Traits>(band[q], row + (q - 1) * Traits::kBand);
      }
      row += (kRows - 1) * Traits::kBand;
      unsigned address = tile + r * kRowBytes;
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        if (r + j >= full_end) break;
        fetch_band<kGroup, Traits>(band[j], row);
#pragma unroll
        for (int k = 0; k < Traits::kPairs; ++k) {
          if (!Traits::fetches(kGroup, k)) continue;
          unsigned in[4];
          fetch_input<Traits>(in, address, k);
#pragma unroll
          for (int q = kRows - 1; q >= 0; --q)  // the newest kernel row last
            multiply_pair<kGroup, Traits>(sum[q], in, band[(j - q + kRows) % kRows], k);
        }
        row += Traits::kBand;
        address += kRowBytes;
      }
    }
  }

  const bool poisoned = has_nan(sum);
  const BandOutputs<Traits> outputs(args, BandImagesBlock(args, tiling), BandUnit<Traits>(number, tiling));
  if (tiling.pairs)
    outputs.template for_each_pair<kTiles>(args.out_w, [&](T* to, int q, int t, int half) {
      *reinterpret_cast<unsigned*>(to) = pack<T>(sum[q][t][2 * half], sum[q][t][2 * half + 1]);
    });
  else
    outputs.template for_each_pair<kTiles>(args.out_w, [&](T* to, int q, int t, int half) {
      const bool both = t * Traits::kStep * kChunk + 1 < outputs.columns;
      const unsigned pair = pack<T>(sum[q][t][2 * half], sum[q][t][2 * half + 1]);
      if (both && reinterpret_cast<uintptr_t>(to) % sizeof(pair) == 0) {
        *reinterpret_cast<unsigned*>(to) = pair;
      } else {
        to[0].bits = static_cast<unsigned short>(pair);
        if (both) to[1].bits = static_cast<unsigned short>(pair >> 16);
      }
    });
  if (poisoned) repair_unit<Traits>(args, tiling, number);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBoundBlocks)
    band_images_kernel(const __grid_constant__ DirectArgs args, const __grid_constant__ BandImagesTiling tiling) {
  using T = typename Traits::T;
  const BandImagesBlock block(args, tiling);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // Shared memory: weights, input rows of every image, zeros in the last chunk behind each.
  extern __shared__ __align__(16) unsigned char shared_memory[];
  unsigned* const pairs = reinterpret_cast<unsigned*>(shared_memory);
  T* const tile = reinterpret_cast<T*>(pairs + divide_up(args.kernel_h * Traits::kBand, 4) * 4);
  // In parts: the early rows of the first sixteen images and the weights, their other rows, the other images. Rows that no
  // asynchronous copy can fetch are waited for anyhow: all at once.
  const bool in_parts = tiling.in_vector > 1;
  if (!in_parts) {
    load_weights<Traits>(pairs, args, block);
    load_nchw<1, Traits>(tile, args, block, block.loaded(), block.gap<Traits>(tiling));
  }
#pragma unroll 1
  for (int part = 0; in_parts && part < 3; ++part) {
    BandImagesBlock loaded = block;
    T* to = tile;
    if (part < 2) {
      const int early = min(tiling.early_rows, block.in_rows), skipped = part == 0 ? 0 : early;
      loaded.images = min(kBandImages, block.images);
      loaded.in_row += skipped;
      loaded.in_rows = part == 0 ? early : block.in_rows - early;
      to += skipped * Traits::kPitch * kChunk;
    } else {
      loaded.image += kBandImages;
      loaded.images -= kBandImages;
      to += kBandImages * tiling.image_pitch;
    }
    switch (tiling.in_vector) {
      case 8: load_nchw<8, Traits>(to, args, loaded, loaded.loaded(), loaded.gap<Traits>(tiling)); break;
      case 4: load_nchw<4, Traits>(to, args, loaded, loaded.loaded(), loaded.gap<Traits>(tiling)); break;
      default: load_nchw<2, Traits>(to, args, loaded, loaded.loaded(), loaded.gap<Traits>(tiling));
    }
    if (part != 1) commit_copies();
    if (part == 0) load_weights<Traits>(pairs, args, block);  // which do not queue behind all rows
  }
  const int behind = Traits::kImageChunks * kChunk - args.w;
  if (in_parts && behind > 0 && block.in_rows > 0)
    for (Walk at(threadIdx.x, Traits::kThreads, behind, block.in_rows); at.outer < block.images; at.advance())
      tile[at.outer * tiling.image_pitch + at.middle * Traits::kPitch * kChunk + args.w + at.inner] = T{};
  if (tiling.all_early)
    wait_for_copies<0>();
  else
    wait_for_copies<1>();
  __syncthreads();

  const float bias = bias_of<Traits>(args, block.channel);
  const unsigned* const band = pairs + kChunk - 1 + 2 * (lane % 4) - lane / 4;
  // The blocks that come second to their multiprocessor have their partitions the other way round, so that those which have
  // a unit more are not the same.
  const int worker = warp ^ (blockIdx.x / tiling.round % 2 * (kPartitions / 2));
  const int begin = tiling.begin[worker], end = tiling.begin[worker + 1];
#pragma unroll 1
  for (int k = begin; k < max(end, begin + 2); ++k) {
    if (k == begin + 1) wait_for_all_copies();  // every warp comes here
    if (k >= end) continue;
    const BandUnit<Traits> unit(tiling.unit[k], tiling);
    if (unit.row >= block.rows || unit.group * kBandImages >= block.images) continue;
    // Lane l names image l % 16 to ldmatrix; one that does not exist is another's.
    const int image = min(unit.group * kBandImages + lane % kBandImages, block.images - 1);
    const T* const rows = tile + image * tiling.image_pitch + lane / kBandImages * kChunk;
    const unsigned address = ptx::shared_address(rows) - block.in_row * Traits::kPitch * kChunk * sizeof(T);
    for_each_index<Traits::kColumnGroups>([&](auto group) {
      if (unit.column_group == group.value)
        compute_unit<group.value, Traits>(args, tiling, tiling.unit[k], band, address, bias);
    });
  }
}

template <class Traits>
int launch_band_images(const DirectArgs& args, int, cudaStream_t stream) {
  const DeviceLimits& device = device_limits();
  const int images = static_cast<int>(args.n), roomy = device.shared_bytes_for(Traits::kBlocks);
  BandImagesTiling tiling{};
  tiling.in_vector = copy_width(args.input, args.w);
  tiling.pairs = copy_width(args.out, args.out_w) > 1;
  tiling.round = device.multiprocessors;
  const auto cut = [&](int groups, int rows) {  // returns bytes of shared memory
    tiling.groups = groups, tiling.rows = rows;
    tiling.tiles_h = divide_up(args.out_h, rows);
    const int in_rows = min_int(args.h, rows - 1 + args.kernel_h);
    tiling.image_pitch = (in_rows * Traits::kPitch | 1) * kChunk;
    return divide_up(args.kernel_h * Traits::kBand, 4) * 16 +
           min_int(images, groups * kBandImages) * tiling.image_pitch * static_cast<int>(sizeof(typename Traits::T));
  };
  const auto blocks = [&] { return args.out_c * divide_up(images, tiling.groups * kBandImages) * tiling.tiles_h; };
  const auto units = [&] { return tiling.groups * divide_up(tiling.rows, Traits::kRows) * Traits::kColumnGroups; };

  // All rows of sixteen images, or as many as leave room for another block.
  constexpr int kMaxRows = BandImagesTiling::kMaxUnits / Traits::kColumnGroups * Traits::kRows;
  const auto whole_units = [](int count) { return divide_up(count, Traits::kRows) * Traits::kRows; };
  int rows = min_int(kMaxRows, whole_units(args.out_h));
  int bytes = cut(1, rows);
  while (rows > Traits::kRows && bytes > roomy) rows = whole_units(divide_up(rows, 2)), bytes = cut(1, rows);
  // Where multiprocessors would be idle, fewer: as leave the fewest units to the partition that has most of them. A block
  // costs about half a unit beside them.
  if (blocks() < device.multiprocessors) {
    const auto cost = [&] {
      const int64_t rounds = divide_up<int64_t>(blocks(), device.multiprocessors);
      return 2 * divide_up<int64_t>(rounds * units(), kPartitions) + rounds;
    };
    int64_t least = cost();
    for (int most = rows - Traits::kRows; most > 0; most -= Traits::kRows) {
      const int even = whole_units(divide_up(args.out_h, divide_up(args.out_h, most)));
      cut(1, even);
      if (cost() < least) least = cost(), rows = even;
    }
    bytes = cut(1, rows);
  }
  // Twice as many images, if the blocks then take fewer waves; a wave also loads and stores, which counts as a quarter of
  // the products of sixteen images.
  const auto cost = [&] {
    return divide_up<int64_t>(blocks(), Traits::kBlocks * device.multiprocessors) * (4 * tiling.groups + 1);
  };
  const int64_t of_one = cost();
  bytes = cut(2, rows);
  if (images <= kBandImages || bytes > roomy || units() > BandImagesTiling::kMaxUnits || cost() >= of_one)
    bytes = cut(1, rows);
  if (bytes > device.shared_bytes_block) return kTooLittleSharedMemory;
  deal_units<Traits>(tiling, args);

  const auto kernel = band_images_kernel<Traits>;
  if (const int error = allow_shared_bytes(kernel, bytes)) return error;
  kernel<<<static_cast<unsigned>(blocks()), Traits::kThreads, bytes, stream>>>(args, tiling);
  return cudaGetLastError();
}

}  // namespace depthwise
