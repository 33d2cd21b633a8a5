// Which kernel and which tile serve a problem, and why: the one place that decides. Pure C++: no launch, no device.
// select_config, at the end, decides top to bottom; the functions before it, and for the grad of weight those of
// select_grad_weight.h, for both gradients at once those of select_gradients.h, choose among kernels and tiles of one kind.
#pragma once

#include <string>

#include "select_grad_weight.h"
#include "select_gradients.h"

namespace depthwise {

// tiled_nhwc: the tile that wastes the fewest channels; of equals 12 lanes, whose blocks are smaller (7x7 on 32x192x28x28,
// fp32 / fp16, H200: 0.039 / 0.036 ms, 16 lanes 0.040 / 0.038).
inline int tiled_nhwc_tile(int64_t channels) {
  int best = 0;
  int64_t least = 0;
  for (int tile = 0; tile < TileTable(kTiledNhwcTiles).size; ++tile) {
    const int64_t block = kTiledNhwcTiles[tile].vector * 4;
    const int64_t padded = (channels + block - 1) / block * block;
    if (least == 0 || padded < least) least = padded, best = tile;
  }
  return best;
}

// strips: those of a channel that are worth a product, which takes sixteen.
constexpr int64_t kFewestStrips = 12;

// Small images on the tensor cores, several a product. 32 images, fp16, H200, ms; what else there is for comparison.
inline Config select_images(const Problem& p) {
  if (p.n < kImagesBatch) return {};
  const DirectArgs args = direct_args(p);
  // NCHW: 3x3, 384x14x14: 0.0083, planes 0.0107; 5x5, 672x14x14: 0.011, 0.021; 7x7, 384x14x14: 0.0087, 0.019; 27x27,
  // 512x14x14: 0.012, toeplitz 0.034. Planes of few elements, eight channels a block: 7x7, 768x7x7: 0.0071, four 0.0076;
  // 13x13, 512x7x7: 0.0080, 0.0092.
  if (p.layout == Layout::kNchw) {
    const int tile = args.h * args.w <= 64 && args.out_h * args.out_w <= 64 ? 1 : 0;
    return can_serve(p, Kernel::kImagesNchw, tile) ? Config{Kernel::kImagesNchw, tile} : Config{};
  }
  // channels_last. Few kernel rows on more than eight columns, in bands (H100): 5x5, 672x14x14: 0.0146, whole images 0.0197,
  // stream 0.0190; 7x7, 384x14x14: 0.0120, 0.0121; not 3x3, 384x14x14: 0.0108, 0.0115, stream 0.0104.
  const int64_t taps = p.kernel_h * p.kernel_w;
  if (taps >= k5x5 && !is_narrow_image(args.w, args.out_w) && can_serve(p, Kernel::kImageBandsNhwc, 0))
    return Config{Kernel::kImageBandsNhwc, 0};
  // 3x3, 960x7x7: 0.0079, stream 0.0083; 27x27, 512x14x14: 0.015, toeplitz 0.043; not few taps on larger images (5x5,
  // 672x14x14: 0.0185, 0.0180).
  const bool few = taps <= k5x5 && args.h * args.w > 64;
  return !few && can_serve(p, Kernel::kImagesNhwc, 0) ? Config{Kernel::kImagesNhwc, 0} : Config{};
}

// Small images by columns. 32 images, H100, us; what else there is for comparison. NCHW, fp32: 3x3, 384x14x14: 11.9, planes
// 13.7; 960x7x7: 9.1, 10.9; 384x16x16: 13.3, 14.1; 192x28x28: 17.8, 20.5; 256 images of 384x14x14: 56.9, 67.5; 5x5, 672x14x14:
// 20.0, images_fma 20.6; 384x16x16: 14.6, 15.8; not 960x7x7 (11.8, 11.5), nor 240x28x28 (25.9, direct 24.8). 16 bits: 3x3,
// 192x28x28: 12.6, planes 16.8; not where images serves (384x14x14: 9.0, 9.2; 256 images: 33.0, 32.0; 960x7x7: 8.2, 7.6; 5x5,
// 672x14x14: 16.0, 11.5). channels_last, 3x3, fp32 / fp16: 384x14x14: 11.5 / 9.4, stream 12.5 / 10.8; 384x16x16: 13.7 / 10.7,
// 14.9 / 12.1; 256 images of 384x14x14: 57.8 / 34.0, 59.0 / 34.0; 960x7x7: 8.7 / 7.7, stream 10.3, images 8.4.
inline Config select_columns(const Problem& p) {
  const bool few = p.kernel_h * p.kernel_w <= k3x3, small = p.h <= kMaxImageSize && p.w <= kMaxImageSize;
  if (p.kernel_h < 3 || p.kernel_w < 3) return {};
  if (p.layout == Layout::kNhwc) return first_that_serves(p, Kernel::kColumnsNhwc);
  const bool wide = p.dtype == DType::kFloat32, narrow = p.w <= 8;
  const bool wins = few ? wide || (!small && p.w % 8 != 0) : wide && small && !narrow;
  return wins && columns_fill_warps(p.w) ? first_that_serves(p, Kernel::kColumnsNchw) : Config{};
}

// Small images by multiply-adds, an image a lane. 32 images, fp32, H200, ms.
inline Config select_images_fma(const Problem& p) {
  const bool nchw = p.layout == Layout::kNchw;
  const int64_t taps = p.kernel_h * p.kernel_w;
  if (p.n < (taps > kMaxRegisterTaps ? kImagesBatch : kImagesFmaBatch)) return {};
  // NCHW: 5x5, 672x14x14: 0.018, direct 0.022; 7x7, 384x14x14: 0.014, 0.020; 27x27, 512x14x14: 0.037, blocked 0.098. Whole
  // planes: 7x7, 768x7x7: 0.0097, by rows 0.0104, planes 0.015; 13x13, 512x7x7: 0.013, by rows 0.014, blocked 0.030.
  // channels_last: 7x7, 384x14x14: 0.017, tiled 0.024; 27x27, 512x14x14: 0.045, blocked 0.109; not 5x5, 672x14x14: 0.022,
  // stream 0.020. Wider than 16 (grad of input, H100): 13x13, 200x20x20: 0.028, blocked 0.034; channels_last 0.031, 0.045.
  if (taps <= (p.w > 16 || p.out_w > 16 ? kMaxRegisterTaps : nchw ? 0 : k5x5)) return {};
  return can_serve(p, Kernel::kImagesFma, 1) ? Config{Kernel::kImagesFma, 1} : first_that_serves(p, Kernel::kImagesFma);
}

// Strips of rows on the tensor cores, 5x5 to 9x9. 32 images, fp16, H200, ms.
inline Config select_strips(const Problem& p) {
  const DirectArgs args = direct_args(p);
  if (p.kernel_h * p.kernel_w < k5x5 || p.n * divide_up(args.out_h, 7) * divide_up(args.out_w, 8) < kFewestStrips)
    return {};
  if (p.layout == Layout::kNhwc) {
    // Strips of seven rows, but eleven where halos are large: 7x7, 96x56x56: 0.026, eleven 0.033, tiled 0.049; 192x28x28:
    // 0.017, 0.021, 0.032; 5x5, 240x28x28: 0.019, 0.020, stream 0.022; 9x9, 768x32x32: 0.078, 0.061, toeplitz 0.170.
    // Not 5x5 on small images: 672x14x14: 0.0187, stream 0.0178.
    if (p.kernel_h * p.kernel_w == k5x5 && args.out_h * args.out_w <= 16 * 16) return {};
    const int tile = p.kernel_h > 7 ? 1 : 0;
    return can_serve(p, Kernel::kStripsNhwc, tile) ? Config{Kernel::kStripsNhwc, tile} : Config{};
  }
  // Rows that divide the image's (7x7, 96x56x56: seven 0.018, eight 0.018, toeplitz 0.031; 192x28x28: 0.0140, 0.0143,
  // 0.025; 5x5, 240x28x28: 0.0160, 0.0163, planes 0.025; 9x9, 768x32x32: 0.057, 0.044, 0.090).
  const int tile = divide_up(args.out_h, 8) * 8 < divide_up(args.out_h, 7) * 7 ? 1 : 0;
  return can_serve(p, Kernel::kStripsNchw, tile) ? Config{Kernel::kStripsNchw, tile} : Config{};
}

// Very large filters on the tensor cores, sixteen images a product. 32 images, fp16, H200, ms: 31x31, 128x56x56: 0.068,
// toeplitz 0.090; 29x29, 256x28x28: seven rows a unit 0.036, four 0.039, toeplitz 0.058. 13x13, 200x20x20, H100: 0.0196,
// toeplitz 0.0223. Smaller kernels and batches: not measured. Not few channels, which leave multiprocessors without a
// block (31x31, 64x3x56x56, H100: 0.0152, toeplitz 0.0133; 27x27, 32x40x33x47: 0.0248, 0.0243).
inline Config select_band_images(const Problem& p) {
  constexpr int64_t kFewestImages = 12, kFewestRows = 13, kFewestChannels = 64;
  if (p.n < kFewestImages || p.kernel_h < kFewestRows || p.c < kFewestChannels) return {};
  // Of the two tiles the one that rounds up the rows less; of equals the first, which has more. That rests on one shape
  // (13x13, 200x20x20, H100: four rows 0.0193, seven 0.0205), and for equals on another (29x29, 256x28x28, above).
  const DirectArgs args = direct_args(p);
  const auto padded = [&](int tile) {
    const int rows = kBandImagesTiles[tile].rows;
    return divide_up(args.out_h, rows) * rows;
  };
  const int tile = padded(1) < padded(0) ? 1 : 0;
  return can_serve(p, Kernel::kBandImages, tile) ? Config{Kernel::kBandImages, tile}
                                                 : first_that_serves(p, Kernel::kBandImages);
}

// Multiply-adds for many taps: the tile that fills its threads best, whose rows and columns divide the image's. fp32, us,
// H100, grad of input; columns x rows, where 7x4 are six rows from 29 columns on. NCHW, 7x4 / 7x7 / 14x7 / 7x3 / 12x3 /
// 10x5: 31x31, 8x40x96x96: 156 / 194 / 196 / - / 121 / -; 29x29, 16x200x48x48: 334 / 385 / 384 / - / 254 / -; 27x27,
// 32x40x33x47: 90 / 114 / 113 / 93 / 79 / -; 13x13, 32x200x20x20: 41 / 43 / 54 / 44 / - / 34; 31x31, 64x3x56x56: 66 / 52 /
// 86 / 41 / 54 / -; 32x128x56x56: 14x7 473; 29x29, 32x256x28x28: 244 / 184 / - / - / - / 222. channels_last, 7x4
// / 12x3 / 10x5: 16x200x48x48: 387 / 290 / -; 32x40x33x47: 108 / 96 / -; 32x200x20x20: 51 / - / 45; 64x3x56x56: 7x3 55.
// 7x4 also on small images (27x27, 32x512x14x14, channels_last, H200: 105, 7x7 166) and for small kernels; 14x7 in NCHW,
// where that makes warps enough. 7x3 where even 7x4 leaves multiprocessors with little to do, or most loads meet few
// kernel rows (9x9, 32x768x32x32, channels_last: 278, 7x7 285, 7x4 299).
inline Config select_blocked(const Problem& p) {
  // 7x7 loads less for as many multiply-adds; of fewer warps than this (two rounds of the twelve that each of an H100's
  // multiprocessors holds) smaller tiles are dealt more evenly. With fewer than two of 7x4 for each of the schedulers,
  // of which a multiprocessor has four, some have twice the work of others.
  constexpr int64_t kManyWarps = 24 * kMultiprocessors, kFewWarps = 8 * kMultiprocessors;
  // How much better a tile has to fill its threads than one with more warps; how much worse 12x3 and 10x5 may than 7x4.
  constexpr double kClearly = 1.02, kWorse = 0.9;
  const DirectArgs args = direct_args(p);
  const bool nchw = p.layout == Layout::kNchw;
  const auto tile_of = [](int columns, int rows) {
    int tile = 0;
    while (kBlockedTiles[tile].columns != columns || kBlockedTiles[tile].rows != rows) ++tile;
    return tile;
  };
  const int four = tile_of(7, 4), seven = tile_of(7, 7), fourteen = tile_of(14, 7), three = tile_of(7, 3);
  const auto serves = [&](int tile) { return can_serve(p, Kernel::kBlocked, tile); };
  // The share of a block's threads and of their outputs that there is, in the best cut of an image's height.
  const auto share_of = [&](int index) {
    const Tile& tile = kBlockedTiles[index];
    const int threads = blocked_threads(tile, nchw ? 1 : 16 / element_size(p.dtype)) / 32 * 32;
    const int window =
        window_size(tile.columns, static_cast<int>(p.stride_w), args.kernel_w, static_cast<int>(p.dilation_w));
    const int rows = blocked_rows(tile, args.kernel_w, window);
    const int all_w = divide_up(args.out_w, tile.columns), all_h = divide_up(args.out_h, rows),
              tiles_w = divide_up(all_w, divide_up(all_w, 32));
    double best = 0;
    // Blocks one tile high would mostly load.
    const int highest = threads / tiles_w < all_h ? threads / tiles_w : all_h;
    for (int tiles_h = highest; tiles_h == highest || tiles_h > 1; --tiles_h) {
      const int fitting = threads / (tiles_w * tiles_h), images = p.n < fitting ? static_cast<int>(p.n) : fitting;
      const double blocks = static_cast<double>(divide_up(all_w, tiles_w)) * divide_up(all_h, tiles_h);
      const double outputs = blocks * (divide_up(tiles_w * tiles_h * images, 32) * 32) * rows * tile.columns;
      const double share = static_cast<double>(images) * args.out_h * args.out_w / outputs;
      if (share > best) best = share;
    }
    return best;
  };
  const auto warps_of = [&](int index) {
    const Tile& tile = kBlockedTiles[index];
    return p.n * p.out_c * divide_up(args.out_w, tile.columns) * divide_up(args.out_h, tile.rows) / 32;
  };
  if ((args.kernel_h <= 9 || (nchw && warps_of(four) < kFewWarps)) && serves(three)) return {Kernel::kBlocked, three};
  Config config = first_that_serves(p, Kernel::kBlocked);
  double share = share_of(four);
  if (args.out_h > 14 && args.kernel_h > 9 && serves(seven) &&
      share_of(seven) > share * (warps_of(seven) >= kManyWarps ? 1 / kClearly : kClearly)) {
    config = {Kernel::kBlocked, seven};
    share = share_of(seven);
  }
  if (nchw && args.out_w > 32 && warps_of(fourteen) >= kManyWarps && serves(fourteen) && share_of(fourteen) >= share)
    return {Kernel::kBlocked, fourteen};
  double least = config.tile == four ? kWorse * share : share;
  for (const int tile : {tile_of(12, 3), tile_of(10, 5)})
    if (p.dtype == DType::kFloat32 && args.out_h > 14 && args.kernel_h > 9 && warps_of(tile) >= kFewWarps &&
        serves(tile) && share_of(tile) > least) {
      config = {Kernel::kBlocked, tile};
      least = share_of(tile);
    }
  return config;
}

// Kernels for many taps or small images, where they are the fastest; else the general kernel, which stands for none.
inline Config select_large(const Problem& p, bool frugal) {
  const DirectArgs args = direct_args(p);
  const bool nchw = p.layout == Layout::kNchw, dilated = p.dilation_h > 1 || p.dilation_w > 1;
  const int64_t taps = p.kernel_h * p.kernel_w;
  constexpr int64_t kFewTurnedTaps = 33;
  if (!frugal)
    for (const Config& config : {select_images(p), select_strips(p), select_band_images(p)})
      if (config.kernel != Kernel::kGeneral) return config;
  if (can_serve(p, Kernel::kToeplitz, 0) && !(frugal && band_of(p).since_sm80)) {
    if (taps > kMaxRegisterTaps) return {Kernel::kToeplitz, 0};
    // Dilation 3, 8x64x56x56, fp16, H200: NCHW 0.012, direct 0.016; channels_last 0.021.
    const bool fits = nchw ? args.out_w > 14 : args.out_w <= 16;
    if (taps == kMaxRegisterTaps && (dilated || fits)) return {Kernel::kToeplitz, 0};
    // Tall kernels that are turned, fp16, H200, ms: 11x3, 32x128x56x56 0.040, stream_nhwc 0.054; 15x3, 32x96x56x56
    // 0.032, tiled_nhwc 0.064.
    if (!nchw && taps >= kFewTurnedTaps && is_turned(p)) return {Kernel::kToeplitz, 0};
  }
  const Config images = select_images_fma(p);
  if (images.kernel != Kernel::kGeneral) return images;
  // fp32 9x9 on 32x768x32x32, H100: NCHW 0.279 ms, planes 0.168; channels_last 0.274.
  const int64_t few = nchw && !dilated ? k9x9 : kMaxRegisterTaps;
  return taps > few ? select_blocked(p) : Config{};
}

// direct_nchw: a tile that reads and writes whole vectors, or the general kernel, which stands for none. H200, ms.
inline Config select_direct_nchw(const Problem& p) {
  const DirectArgs args = direct_args(p);
  const bool wide = p.dtype == DType::kFloat32, strided = p.stride_h > 1 || p.stride_w > 1;
  const int64_t taps = p.kernel_h * p.kernel_w;
  const auto tile_of = [&](int rows, int columns) {
    const TileTable table = tile_table(Kernel::kDirectNchw, p.dtype);
    for (int tile = 0; tile < table.size; ++tile)
      if (table[tile].rows == rows && table[tile].columns == columns && table[tile].vector == columns &&
          can_serve(p, Kernel::kDirectNchw, tile))
        return Config{Kernel::kDirectNchw, tile};
    return Config{};
  };
  // Eight rows a thread, but four for kernels of one row (1x11, 16x64x128x128: 0.038 / 0.025, 0.040 / 0.029 with eight),
  // for dilated ones (3x3, dilation 12, 8x256x64x64: 0.025 / 0.020, 0.030 / 0.022) and for 3x3 at stride 2
  // (32x96x112x112: 0.054 / 0.032, 0.057 / 0.035), and sixteen for more work on tall planes (3x7, 32x128x128x256, fp32:
  // 0.277, 0.285 with eight). In 16 bits four also where outputs are not aligned, whose windows are wide (3x3,
  // 16x64x512x512: 0.279, 0.305 with eight), and narrow vectors for 5x5 at stride 2 (32x144x56x56:
  // 0.022, 0.024 with wide ones).
  const bool few_rows =
      p.kernel_h == 1 || p.dilation_h > 1 || (strided && taps <= k3x3) || (!wide && args.out_w % 8 != 0);
  const int columns = wide ? 4 : 8;
  Config best;
  if (wide && !strided && !few_rows && taps > k3x3 && taps < k5x5 && args.w % 4 == 0 && args.out_h >= 64)
    best = tile_of(16, 4);
  if (!wide && strided && taps > k3x3) best = tile_of(8, 4);
  if (best.kernel == Kernel::kGeneral) best = tile_of(few_rows ? 4 : 8, columns);
  if (best.kernel == Kernel::kGeneral) best = tile_of(8, columns);
  return best.kernel != Kernel::kGeneral ? best : tile_of(8, 4);
}

// warps_nchw: rows that begin within vectors, on one side or the other, and fill a warp. 3x7, 32x128x128x256, fp16, H100:
// forward 0.191, direct 0.207; grad of input 0.190, by copies of words 0.197, direct 0.247. Not few taps, of which
// direct_nchw reads wide windows without waiting for them, nor half as wide rows (1x11, 16x64x128x128: 0.034, direct
// 0.029). The thresholds, 10 to 49 taps and 192 columns, rest on these two shapes alone: 21 taps at 250 columns, 11 at 118.
inline Config select_warps_nchw(const Problem& p) {
  constexpr int kFewestColumns = 192;
  const DirectArgs args = direct_args(p);
  if (p.kernel_h * p.kernel_w <= k3x3 || args.out_w < kFewestColumns || (args.w % 8 == 0 && args.out_w % 8 == 0))
    return {};
  return first_that_serves(p, Kernel::kWarpsNchw);
}

// Forward, and grad of input at stride 1. Times are of 32 images on an H200, ms, fp32 / fp16 where nothing else is said.
inline Config select_nchw(const Problem& p) {
  const DirectArgs args = direct_args(p);
  const int64_t taps = p.kernel_h * p.kernel_w;
  // Small planes, of which many are loaded at once (3x3, 384x14x14: planes 0.012 / 0.011, direct 0.014 / 0.012; 5x5,
  // 672x14x14, fp16: 0.021, 0.024). In fp32 large filters repay that detour later (5x5, 672x14x14: 0.026, direct 0.022;
  // 7x7, 96x56x56: 0.049, 0.039; 192x28x28: 0.031, 0.026; 768x7x7: 0.015, 0.023), at stride 2 in 16 bits on images of 28x28
  // (5x5, 240x28x28, fp16, H100: 0.0166, 0.0149).
  const bool wide = p.dtype == DType::kFloat32, large = taps >= k5x5;
  const int64_t small = wide && large ? 12 * 12 : large && p.stride_w > 1 ? 16 * 16 : 32 * 32;
  if (p.dilation_h == 1 && p.dilation_w == 1 && args.h * args.w <= small) {
    const Config planes = first_that_serves(p, Kernel::kPlanesNchw);
    if (planes.kernel != Kernel::kGeneral) return planes;
  }
  const Config warps = select_warps_nchw(p);
  if (warps.kernel != Kernel::kGeneral) return warps;
  const Config direct = select_direct_nchw(p);
  if (direct.kernel != Kernel::kGeneral) return direct;
  // What has too many taps, or lies off the boundaries of words: shared memory is where that costs little.
  const Config planes = first_that_serves(p, Kernel::kPlanesNchw);
  if (planes.kernel != Kernel::kGeneral) return planes;
  const Config stream = first_that_serves(p, Kernel::kStreamNchw);
  return stream.kernel != Kernel::kGeneral ? stream : first_that_serves(p, Kernel::kDirectNchw);
}

// stream_nhwc: channels of a block. Wide pixels are whole cache lines (3x3, 16x64x512x512: 64 channels 0.56 / 0.29, 32
// channels 0.64 / 0.37), unless channels beyond the last are wasted (144x56x56: 32 channels 0.041 / 0.0275, 96 channels
// 0.040 / 0.029, 64 channels 0.043 / 0.032; 5x5, 672x14x14: 32 channels 0.022 / 0.018, 96 channels 0.020 / 0.019;
// 3x1, 64x8x512x512: 8 channels 0.308 / 0.150, 32 channels 0.338 / 0.257). At stride 2, 96 win where they waste no more
// (96x112x112: 0.057 / 0.036, 64 channels 0.058 / 0.038; 5x5, 144x56x56: 0.030 / 0.023, 0.031 / 0.025). 7x7, of one
// channel a thread: few (96x56x56: 8 channels 0.043 / 0.040, 16 channels 0.049 / 0.047, tiled 0.058 / 0.049). In 16 bits
// of tall images 128, whose pixels two blocks of 64 would share (fp16, H100: 3x3, 64x128x256x512: 1.427, 64 channels 1.466;
// 3x7, 32x128x128x256: 0.187, 0.191; not 3x5: 0.188, 0.186).
inline Config select_stream_nhwc(const Problem& p) {
  const bool wide = p.dtype == DType::kFloat32;
  const auto padded = [&](int64_t block) { return (p.c + block - 1) / block * block; };
  int channels = padded(32) < padded(64) ? 32 : 64;
  if (p.stride_w > 1 ? padded(96) <= padded(64) : wide && padded(96) < padded(64) && padded(96) <= padded(32))
    channels = 96;
  const bool would_share = p.h >= 96 && p.out_h >= 96 && p.kernel_h == 3 && (p.kernel_w <= 3 || p.kernel_w >= 7);
  const bool is_dense = p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1;
  if (!wide && would_share && is_dense && padded(128) <= padded(channels)) channels = 128;
  // Of 144 channels, 56x56, fp32 / fp16, H100: 0.0495 / 0.0308, blocks of 32 channels 0.0516 / 0.0323.
  if (is_dense && p.kernel_h == 3 && p.kernel_w == 3 && padded(48) < padded(channels)) channels = 48;
  // 7x7 at stride 2 in 16 bits, 96x56x56, fp16, H100: 96 channels 0.0223, 64 channels 0.0243, 8 channels 0.0310.
  const bool is_long = p.kernel_h * p.kernel_w > k5x5 && (wide || p.stride_w == 1);
  if (is_long || p.c <= 8)
    channels = 8;
  else if (p.c <= 16)
    channels = 16;
  for (int tile = 0; tile < TileTable(kStreamNhwcTiles).size; ++tile)
    if (kStreamNhwcTiles[tile].vector == channels && can_serve(p, Kernel::kStreamNhwc, tile))
      return {Kernel::kStreamNhwc, tile};
  return first_that_serves(p, Kernel::kStreamNhwc);
}

// direct_nhwc: dilated kernels of few taps, and what is not aligned. One channel a thread, of four by four pixels, which read
// about half as much for an output as two by two (3x3, 32x125x56x56, fp16, H100: 0.036, two by two 0.057; two channels a
// thread, 126x56x56: 0.049; 5x5, 32x124x14x14: 0.0093, 0.0117), where that makes threads enough.
inline Config select_direct_nhwc(const Problem& p) {
  constexpr int64_t kFewestThreads = 256 * kMultiprocessors;
  const DirectArgs args = direct_args(p);
  for (int tile = 0; tile < TileTable(kDirectNhwcTiles).size; ++tile) {
    const Tile& t = kDirectNhwcTiles[tile];
    const int64_t threads = p.n * divide_up(args.out_h, t.rows) * divide_up(args.out_w, t.columns) * (p.c / t.vector);
    if (t.vector == 1 && t.rows > 2 && threads < kFewestThreads) continue;
    if (can_serve(p, Kernel::kDirectNhwc, tile)) return {Kernel::kDirectNhwc, tile};
  }
  return {};
}

inline Config select_nhwc(const Problem& p) {
  // fp32 3x3 at stride 2: a channel a thread, without shared memory (96x112x112: 0.053, stream 0.057).
  if (p.dtype == DType::kFloat32 && p.stride_w == 2 && p.kernel_h == 3 && p.kernel_w == 3)
    for (int tile = 0; tile < TileTable(kDirectNhwcTiles).size; ++tile)
      if (kDirectNhwcTiles[tile].vector == 1 && can_serve(p, Kernel::kDirectNhwc, tile))
        return {Kernel::kDirectNhwc, tile};
  const Config stream = select_stream_nhwc(p);
  if (stream.kernel != Kernel::kGeneral) return stream;
  const Config direct = select_direct_nhwc(p);
  if (direct.kernel != Kernel::kGeneral && p.kernel_h * p.kernel_w <= k3x3) return direct;
  const int tiled = tiled_nhwc_tile(p.c);
  if (can_serve(p, Kernel::kTiledNhwc, tiled)) return {Kernel::kTiledNhwc, tiled};
  // What is not aligned, of more taps, in 16 bits (fp16, H100: 5x5 at stride 2, 32x126x56x56: 0.036, toeplitz 0.062; 5x5,
  // 16x17x14x14: 0.0062, 0.0100). In fp32 blocked was not compared.
  return p.dtype != DType::kFloat32 ? direct : Config{};
}

// `frugal`: without the kernels that some GPUs refuse.
inline Config select_config(const Problem& p, bool frugal = false) {
  const bool nchw = p.layout == Layout::kNchw;
  if (p.direction == Direction::kGradWeight) return select_grad_weight(p);
  if (p.direction == Direction::kGradients) return select_gradients(p);
  if (p.direction == Direction::kGradInput && (p.stride_h != 1 || p.stride_w != 1))
    return first_that_serves(p, nchw ? Kernel::kGradInputNchw : Kernel::kGradInputNhwc);
  const Config columns = select_columns(p);
  if (columns.kernel != Kernel::kGeneral) return columns;
  const Config large = select_large(p, frugal);
  if (large.kernel != Kernel::kGeneral) return large;
  const Config config = nchw ? select_nchw(p) : select_nhwc(p);
  if (config.kernel != Kernel::kGeneral) return config;
  // What needs too many registers or too much shared memory elsewhere, such as 7x7 with dilation 3 in channels_last.
  const Config toeplitz = first_that_serves(p, Kernel::kToeplitz);
  return toeplitz.kernel != Kernel::kGeneral ? toeplitz : select_blocked(p);
}

// The config whose tile is called `name`; false where it cannot serve `p`.
inline bool forced_config(const Problem& p, const std::string& name, Config* config) {
  if (name == "general") {
    *config = {};
    return true;
  }
  for (const Kernel kernel : kSpecialisedKernels)
    for (int tile = 0; tile < tile_table(kernel, p.dtype).size; ++tile)
      if (name == tile_table(kernel, p.dtype)[tile].name && can_serve(p, kernel, tile)) {
        *config = {kernel, tile};
        return true;
      }
  return false;
}

}  // namespace depthwise
