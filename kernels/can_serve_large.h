// What the kernels for many taps can serve: on the tensor cores toeplitz, band_images and toeplitz_grad_weight, by
// multiply-adds blocked and blocked_grad_weight.
#pragma once

#include "toeplitz_grad_weight_tiling.h"
#include "variants.h"

namespace depthwise {

// toeplitz, blocked: filters of fewer taps are for the other kernels.
constexpr int kMinLargeTaps = 25;

// toeplitz: columns are counted in chunks of eight.
struct Band {
  int chunks;        // that eight outputs read
  int origin;        // where the chunks of output column 0 begin
  int tiles_w;       // columns of a block, in eights
  int image_chunks;  // of an input row; 0: outputs are too wide for one block
  int tiles_h;       // rows of a warp, in sixteens
  // channels_last, else 0.
  int slots;       // warps that a channel's rows are dealt to
  int shared;      // there are fewer than eight channels: warps share the kernel rows of a tile
  int tall;        // so many products a sum that it is added up in parts, as tensor cores truncate
  int apart;       // kernel rows are taken so far apart
  int turned;      // rows and columns trade places
  int since_sm80;  // has more registers than there are before sm_80, where products of bfloat16 are calls

  int sums() const { return tiles_w * tiles_h * (tall ? 2 : 1); }
  int chunks_in(int stride_w) const { return (tiles_w - 1) * stride_w + chunks; }
};

// Weights and the rows that some outputs read, of eight channels in channels_last.
constexpr int64_t kMaxBandBytes = 160 << 10;

inline int64_t band_bytes(const Problem& p, const Band& band, int out_rows, int64_t pitch) {
  const int64_t in_h = p.direction == Direction::kGradInput ? p.out_h : p.h;
  const int64_t rows = (out_rows - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
  return (min_int64(rows, in_h) * pitch * 16 + p.kernel_h * (8 * band.chunks + 13) * 4) *
         (p.layout == Layout::kNhwc ? 8 : 1);
}

// How outputs are dealt to warps, for the columns that `band` has already. A warp's rows, NCHW: many where a block holds
// many small images; few where shared memory bounds the rows (32x128x56x56, 31x31, fp16, H200: 0.156 ms with 16 rows, 0.112
// with 32; 32x512x14x14, 27x27: 0.106 with 16, 0.044 with 64). Where there are few tiles, one a warp, whose fewer registers
// let three blocks share a multiprocessor.
inline void deal_nchw(const Problem& p, const DirectArgs& args, Band& band) {
  constexpr int64_t kFewTiles = 8 * kMultiprocessors;
  const int64_t strips = divide_up(divide_up(args.out_w, 8), band.tiles_w);
  const bool few = p.stride_w == 1 && p.n * p.out_c * divide_up(args.out_h, 16) * strips < kFewTiles;
  band.tiles_h = band.tiles_w > 2 ? few || band.tall ? 1 : 2 : band.tall ? 2 : 4;
}

// channels_last: as many rows as the registers of sixteen warps hold; of 24 columns fewer (13x13 on 32x200x20x20, fp16, H100:
// 32 rows 22.4 us, 48 22.8).
inline void deal_nhwc(const Problem& p, const DirectArgs& args, Band& band) {
  const int w = band.tiles_w;
  const bool wide = w > 7 || (w == 7 && (band.image_chunks == 0 || band.chunks > 6)) ||
                    (w > 5 && (band.chunks > 7 || band.chunks < 4));
  band.tiles_h = wide || (band.tall && w > 2) ? 1 : band.tall || w > 4 || w == 3 ? 2 : 4;
  band.shared = p.out_c < 8;
  if (band.shared) band.tiles_h = 1;
  // Narrow bands in two blocks a multiprocessor, of eight warps each, one of which stores while the other multiplies, where
  // they find room, and there are so many items that both have some (13x13 on 32x200x20x20, fp16, H100: 20.6 us, one block
  // 22.0; 32x256x28x28: 39.3, 44.2; but 11x11 on 16x64x40x40: 16.1, 14.0).
  constexpr int64_t kManyItems = 3 * kMultiprocessors, kHalfBytes = 112 << 10;
  const int64_t strips = divide_up(divide_up(args.out_w, 8), w);
  const int64_t items = divide_up(p.n * args.out_h, 16) * strips * divide_up(p.out_c, 8);
  const int tiles_h = w > 4 ? 2 : w == 4 ? 3 : 4;
  const int64_t rows = 16 * tiles_h + (p.kernel_h - 1) * p.dilation_h;
  const int64_t bytes = 2 * rows * (w | 1) * 128 + p.kernel_h * (8 * band.chunks + 6) * 32;
  if (p.stride_w == 1 && band.chunks <= 3 && w <= 7 && !band.shared && !band.tall && items >= kManyItems &&
      bytes <= kHalfBytes) {
    band.tiles_h = tiles_h;
    band.slots = 1;
    return;
  }
  const bool many = p.stride_w == 2 ? band.sums() >= 8 : band.sums() >= 16 && (band.chunks > 6 || band.chunks < 4);
  band.slots = many ? 1 : 2;
  band.since_sm80 = band.slots > 1 && (p.dtype == DType::kBFloat16 || band.sums() >= 14);
}

// Whether sums of so many products, `chunks / 2 + 1` a kernel row, drift too far from so few taps: tensor cores truncate.
// Simulated, 600,000 outputs, in units of the tests' reference.py, of which some 4 are allowed: 51x5 by two products a row 4.7,
// in parts of sixteen rows 1.0 (toeplitz_products.cuh takes eight); 63x63 by five 3.9; 41x9 by three 4.7; 31x31 by three 2.7;
// 21x5 by two 2.0.
inline bool is_tall(const Problem& p, const DirectArgs& args, int chunks) {
  const int64_t products = chunks / 2 + 1;
  return min_int64(p.kernel_h, args.h) * products * products > 12 * min_int64(p.kernel_w, args.w);
}

// How far apart kernel rows are taken: sums of many products drift as well where those of one sign come first. Of what
// PyTorch's error allows (an image of one sign, half of the kernel's rows of another, bf16, H200), channels_last: 31x31 all
// rows in turn 1.5, seven apart 0.2; band_images, 31x31 0.6; 25x5, turned, in turn 0.9. It costs up to 3% (31x31 100.1 us for
// 99.3; 5x51 37.3 for 36.3), band_images, which fetches its ring anew, 5% (31x31 70.3 for 67.0).
inline int rows_apart(const Problem& p, const DirectArgs& args, int chunks) {
  constexpr int kFewProducts = 15, kFewRows = 16;
  const int64_t rows = min_int64(p.kernel_h, args.h);
  return rows * (chunks / 2 + 1) < kFewProducts ? 1 : rows <= kFewRows ? 3 : 7;
}

// Chunks of input that eight outputs read, from `origin` on.
inline int band_origin(const DirectArgs& args) { return floor_divide(-args.padding_w, 8); }
inline int band_chunks(const DirectArgs& args, int stride_w) {
  const int last = 7 * stride_w + (args.kernel_w - 1) * args.dilation_w - args.padding_w;
  return floor_divide(last, 8) - band_origin(args) + 1;
}

// Whether rows are taken for columns, and columns for rows: tall kernels have far fewer products a sum then (51x5: 25, not
// 102). To pixels of channels_last it is all one; NCHW: toeplitz_turned.cuh.
constexpr int64_t kMaxBandSpan = 96;
inline bool is_turned(const Problem& p) {
  if (p.stride_h != 1 || p.stride_w != 1 || p.kernel_h <= p.kernel_w) return false;
  if ((p.kernel_h - 1) * p.dilation_h > kMaxBandSpan || p.multiplier != 1) return false;
  const auto products = [](const DirectArgs& args) {
    return min_int64(args.kernel_h, args.h) * (band_chunks(args, 1) / 2 + 1);
  };
  const DirectArgs args = direct_args(p);
  return products(args) >= 2 * products(turned(args));
}
// The problem whose rows are the kernel's.
inline Problem as_multiplied(const Problem& p) { return is_turned(p) ? turned(p) : p; }

inline Band band_of(const Problem& problem) {
  const Problem p = as_multiplied(problem);
  const DirectArgs args = direct_args(p);
  const bool channels_last = p.layout == Layout::kNhwc;
  const int stride = static_cast<int>(p.stride_w);
  Band band{};
  band.turned = is_turned(problem);
  band.origin = band_origin(args);
  band.chunks = band_chunks(args, stride);
  band.image_chunks = floor_divide(args.w + 7, 8);
  band.tiles_w = floor_divide(args.out_w + 7, 8);
  band.tall = is_tall(p, args, band.chunks);
  band.apart = rows_apart(p, args, band.chunks);
  const bool meets_image = band.origin < band.image_chunks && band.origin + band.chunks_in(stride) > 0;
  // Wider in channels_last, where 32 rows of it find room.
  const bool fits =
      band.tiles_w <= 8 || (channels_last && stride == 1 && !band.tall && band.tiles_w <= 12 && band.chunks > 3 &&
                            band.chunks < 8 && band_bytes(p, band, 32, band.image_chunks | 1) <= kMaxBandBytes);
  if (!fits || band.image_chunks > 16 || !meets_image) {
    // The width that wastes the fewest columns; of equals the widest.
    const int all = band.tiles_w;
    band.image_chunks = 0;
    band.tiles_w = 8;
    for (int tiles = 7; tiles >= 5; --tiles)
      if (divide_up(all, tiles) * tiles < divide_up(all, band.tiles_w) * band.tiles_w) band.tiles_w = tiles;
  }
  if (channels_last)
    deal_nhwc(p, args, band);
  else
    deal_nchw(p, args, band);
  return band;
}

constexpr int kMaxBandChunks = 12;

inline bool can_serve_toeplitz(const Problem& p) {
  if (p.kernel_h * p.kernel_w < kMinLargeTaps) return false;
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return false;
  const Problem q = as_multiplied(p);
  const int64_t span_h = (q.kernel_h - 1) * q.dilation_h, span_w = (q.kernel_w - 1) * q.dilation_w;
  if (p.stride_h > 4 || p.stride_w > 2 || span_h > 512 || span_w > kMaxBandSpan) return false;
  if (p.h * p.w > kInt32Max / 2 || p.out_h * p.out_w > kInt32Max / 2 || p.n * p.out_c > kInt32Max / 64) return false;
  if (p.n * p.out_c * ((p.out_h + 15) / 16) * ((p.out_w + 31) / 32) > kInt32Max) return false;
  if (p.layout == Layout::kNchw && p.n * max_int64(q.h, q.out_h) > kInt32Max / 2) return false;  // rows of all images
  if (p.padding_h > 1 << 20 || p.padding_w > 1 << 20) return false;
  const bool channels_last = p.layout == Layout::kNhwc;
  if (channels_last && p.multiplier != 1) return false;
  const Band band = band_of(p);
  if (band.chunks > kMaxBandChunks) return false;
  return band_bytes(q, band, 16, band.chunks_in(static_cast<int>(p.stride_w)) + 2) <= kMaxBandBytes;
}

// band_images: the ring of kernel rows lies in registers, and what sixteen images of a unit read in shared memory.
constexpr int kMaxBandImagesChunks = 7;

inline Band band_images_of(const Problem& p) {
  const DirectArgs args = direct_args(p);
  Band band{};
  band.origin = band_origin(args);
  band.chunks = band_chunks(args, 1);
  band.image_chunks = floor_divide(args.w + 7, 8);
  band.tiles_w = floor_divide(args.out_w + 7, 8);
  band.apart = rows_apart(p, args, band.chunks);
  return band;
}

inline bool can_serve_band_images(const Problem& p, const Tile& tile) {
  if (p.layout != Layout::kNchw || (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16)) return false;
  if (p.kernel_h * p.kernel_w < kMinLargeTaps || p.kernel_h > 512 || p.kernel_w > 8 * kMaxBandImagesChunks)
    return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.w > tile.columns || p.out_w > tile.columns) return false;
  if (p.h * p.w > kInt32Max / 2 || p.out_h * p.out_w > kInt32Max / 2 || p.n * p.out_c > kInt32Max / 64) return false;
  if (p.n * p.out_c * ((p.out_h + 3) / 4) * ((p.h + 3) / 4) > kInt32Max) return false;  // blocks, of either direction
  if (p.padding_h > 1 << 20 || p.padding_w > 1 << 20) return false;
  const Band band = band_images_of(p);
  if (band.chunks > kMaxBandImagesChunks || is_tall(p, direct_args(p), band.chunks)) return false;
  const int64_t in_h = p.direction == Direction::kGradInput ? p.out_h : p.h, rows = tile.rows - 1 + p.kernel_h;
  return (rows < in_h ? rows : in_h) * (band.image_chunks + 1) * 16 * 16 + p.kernel_h * (8 * band.chunks + 8) * 4 <=
         kMaxBandBytes;
}

// blocked: a row of a thread's window lies in registers; of wide tiles, what some of its taps read.
constexpr int kMaxBlockedWindow = 80;
constexpr int kMaxTallBlockedWindow = 40;  // beside the sums of seven rows
constexpr int kMaxWideBlockedWindow = 43;  // likewise, of twelve or ten columns

// Whether the terms of a kernel row are added up before they join an output's sum: a running sum of many loses bits with
// every one. fp32 (16-bit results hide it), where multiply-adds are not all that counts, as this costs one in kernel_w;
// and of one channel, where PyTorch runs a kernel that is not depthwise, of smaller errors (31x31, 64x1x56x56, H100: 4.6e-7
// of the largest value; a running sum 1.3e-6).
inline bool blocked_sums_parts(const Problem& p) {
  const bool is_dense = p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1;
  return p.dtype == DType::kFloat32 && (!is_dense || p.c == 1);
}

inline bool can_serve_blocked(const Problem& p, const Tile& tile) {
  if (p.kernel_h * p.kernel_w < kMinLargeTaps) return false;
  const int64_t span_h = (p.kernel_h - 1) * p.dilation_h, span_w = (p.kernel_w - 1) * p.dilation_w;
  if (p.stride_h > 2 || p.stride_w > 2 || p.kernel_w > 64 || span_h > 512) return false;
  const bool is_wide = tile.columns > 7;
  if (is_wide && (p.stride_w > 1 || p.dilation_w > 1 || p.dilation_h > 1 || blocked_sums_parts(p))) return false;
  const int64_t taps = p.kernel_w < tile.vector ? p.kernel_w : tile.vector;
  if (is_wide && tile.columns - 1 + taps > kMaxWideBlockedWindow) return false;
  if (!is_wide && 6 * p.stride_w + span_w >= (tile.rows > 4 ? kMaxTallBlockedWindow : kMaxBlockedWindow)) return false;
  if (p.h * p.w > kInt32Max / 2 || p.out_h * p.out_w > kInt32Max / 2 || p.n * p.out_c > kInt32Max / 64) return false;
  if (p.n * p.out_c * ((p.out_h + tile.rows - 1) / tile.rows) * ((p.out_w + 6) / 7) > kInt32Max) return false;
  if (p.padding_h > 1 << 20 || p.padding_w > 1 << 20) return false;
  const bool channels_last = p.layout == Layout::kNhwc;
  if (channels_last && p.multiplier != 1) return false;
  // Weights, and what a block one thread wide and high reads.
  const int64_t in_h = p.direction == Direction::kGradInput ? p.out_h : p.h,
                rows = (tile.rows - 1) * p.stride_h + span_h + 1;
  const int64_t channels = channels_last ? 16 / element_size(p.dtype) : 1;
  const int64_t weight_bytes = p.kernel_h * (p.kernel_w + 3) * 4 * channels;
  const int64_t in_bytes = (rows < in_h ? rows : in_h) * ((tile.columns - 1) * p.stride_w + span_w + 1) * 4 * channels;
  // The weights of many channels leave room for few threads (8x64x128x128, 63x63, fp32, channels_last, H200: 67 ms).
  return weight_bytes + in_bytes <= kSharedBytesEverywhere && (!channels_last || weight_bytes <= 24 << 10);
}

// toeplitz_grad_weight and blocked_grad_weight: a kernel's sums are a block's registers.
constexpr int kMaxLargeGradWeight = 64;

// toeplitz_grad_weight, channels_last: shared memory of a block that takes as few rows a step as it can.
inline int toeplitz_grad_weight_least_bytes(const Problem& p, const Tile& tile) {
  constexpr int kRows = kFewestToeplitzStepRows;
  const int eights = toeplitz_eights(p.w, tile.columns);
  const ToeplitzGradWeightLayout layout = toeplitz_grad_weight_layout(
      static_cast<int>(divide_up(p.kernel_h, 16)), static_cast<int>(divide_up(p.kernel_w, 16)), eights, true);
  return layout.shared_bytes(1, layout.plane_elements(layout.kernel_rows() + kRows, kRows),
                             kRows * (8 * eights + layout.grad_pitch));
}

inline bool can_serve_large_grad_weight(const Problem& p, Kernel kernel, int tile) {
  const bool channels_last =
      kernel == Kernel::kBlockedGradWeight ? tile == 1 : kToeplitzGradWeightTiles[tile].vector > 1;
  if (p.layout != (channels_last ? Layout::kNhwc : Layout::kNchw)) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (kernel == Kernel::kToeplitzGradWeight && p.dtype == DType::kFloat32) return false;
  if (p.kernel_h > kMaxLargeGradWeight || p.kernel_w > kMaxLargeGradWeight) return false;
  if (kernel == Kernel::kToeplitzGradWeight && channels_last &&
      toeplitz_grad_weight_least_bytes(p, kToeplitzGradWeightTiles[tile]) > kSharedBytesEverywhere)
    return false;
  // Columns of grad_output that meet padding alone would be missed by the bias.
  if (p.padding_h >= p.kernel_h || p.padding_w >= p.kernel_w) return false;
  const int64_t channels = channels_last ? p.out_c : 1;  // that lie between neighbouring columns
  return p.h * p.w <= kInt32Max && p.out_h * p.out_w <= kInt32Max && p.w * channels <= kInt32Max &&
         p.out_w * channels <= kInt32Max && p.out_c <= kInt32Max &&
         p.n * p.out_h * (p.w + p.out_w + 15) / 16 <= kInt32Max;
}

}  // namespace depthwise
