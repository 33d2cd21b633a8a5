// Which kernel and which tile serve a problem, and why: the one place that decides. Pure C++: no launch, no device.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "problem.h"

namespace depthwise {

enum class Kernel : int {
  kGeneral,
  kDirectNchw,
  kStreamNchw,
  kPlanesNchw,
  kDirectNhwc,
  kTiledNhwc,
  kStreamNhwc,
  kGradInputNchw,
  kGradInputNhwc,
  kGradWeightNchw,
  kGradWeightNhwc,
  kToeplitz,
  kBlocked,
  kToeplitzGradWeightNchw,
  kToeplitzGradWeightNhwc,
  kBlockedGradWeight,
};
constexpr Kernel kSpecialisedKernels[] = {Kernel::kDirectNchw,
                                          Kernel::kStreamNchw,
                                          Kernel::kPlanesNchw,
                                          Kernel::kDirectNhwc,
                                          Kernel::kTiledNhwc,
                                          Kernel::kStreamNhwc,
                                          Kernel::kGradInputNchw,
                                          Kernel::kGradInputNhwc,
                                          Kernel::kGradWeightNchw,
                                          Kernel::kGradWeightNhwc,
                                          Kernel::kToeplitz,
                                          Kernel::kBlocked,
                                          Kernel::kToeplitzGradWeightNchw,
                                          Kernel::kToeplitzGradWeightNhwc,
                                          Kernel::kBlockedGradWeight};

inline bool is_rolling_nchw(Kernel kernel) { return kernel == Kernel::kStreamNchw || kernel == Kernel::kPlanesNchw; }
inline bool is_direct_nchw(Kernel kernel) { return kernel == Kernel::kDirectNchw || is_rolling_nchw(kernel); }
inline bool is_marching_grad_weight(Kernel kernel) {
  return kernel == Kernel::kGradWeightNchw || kernel == Kernel::kGradWeightNhwc;
}
inline bool is_toeplitz_grad_weight(Kernel kernel) {
  return kernel == Kernel::kToeplitzGradWeightNchw || kernel == Kernel::kToeplitzGradWeightNhwc;
}
inline bool is_grad_weight_kernel(Kernel kernel) {
  return is_marching_grad_weight(kernel) || is_toeplitz_grad_weight(kernel) || kernel == Kernel::kBlockedGradWeight;
}
// Kernels of which each tile is a specialisation of its own: together they would be seconds of compilation.
inline bool is_compiled_by_tile(Kernel kernel) {
  return is_rolling_nchw(kernel) || kernel == Kernel::kStreamNhwc || is_marching_grad_weight(kernel) ||
         is_toeplitz_grad_weight(kernel);
}
// Kernels for the grad of input alone; their padding is compile-time.
inline bool is_grad_input_kernel(Kernel kernel) {
  return kernel == Kernel::kGradInputNchw || kernel == Kernel::kGradInputNhwc;
}
// Grad-of-weight kernels that write the results themselves where there is one split.
inline bool stores_grad_weight(Kernel kernel) { return is_grad_weight_kernel(kernel); }

struct Config {
  Kernel kernel = Kernel::kGeneral;
  int tile = 0;  // row of the kernel's tile table
};

// Tile tables; the launchers' switches follow their order. The last tile of a direct kernel reads element by element
// and serves every alignment.
constexpr Tile kDirectNchwTiles32[] = {{"v4r4", 4, 4, 4}, {"v4r4_unaligned", 4, 4, 1}};
constexpr Tile kDirectNchwTiles16[] = {{"v8r4", 8, 4, 8}, {"v4r4", 4, 4, 4}, {"v4r4_unaligned", 4, 4, 1}};
constexpr Tile kDirectNhwcTiles[] = {{"q4r4", 4, 4, 4}, {"q2r2", 2, 2, 4}, {"q2r2_unaligned", 2, 2, 1}};
constexpr Tile kTiledNhwcTiles[] = {{"lanes16", 4, 0, 16}, {"lanes12", 4, 0, 12}, {"lanes8", 4, 0, 8}};
constexpr Tile kStreamNchwTiles32[] = {{"stream_v4", 4, 0, 4}, {"stream_v2", 4, 0, 2}, {"stream_v1", 4, 0, 1}};
constexpr Tile kStreamNchwTiles16[] = {{"stream_v8", 8, 0, 8}, {"stream_v2", 4, 0, 2}, {"stream_v1", 4, 0, 1}};
constexpr Tile kPlanesNchwTiles32[] = {{"planes_v4", 4, 0, 4}, {"planes_v2", 4, 0, 2}, {"planes_v1", 4, 0, 1}};
constexpr Tile kPlanesNchwTiles16[] = {{"planes_v8", 8, 0, 8}, {"planes_v2", 4, 0, 2}, {"planes_v1", 4, 0, 1}};
constexpr Tile kStreamNhwcTiles[] = {{"stream_channels64", 4, 0, 64}, {"stream_channels32", 4, 0, 32}};
constexpr Tile kGradInputNchwTiles32[] = {{"input_v4r4", 4, 4, 2}, {"input_v4r4_unaligned", 4, 4, 1}};
constexpr Tile kGradInputNchwTiles16[] = {{"input_v8r4", 8, 4, 4}, {"input_v4r4_unaligned", 4, 4, 1}};
constexpr Tile kGradInputNhwcTiles[] = {{"input_c4q4", 4, 4, 4}, {"input_c2q4", 4, 4, 2}, {"input_c1q4", 4, 4, 1}};
// Grad of weight, NCHW: the widest loads that rows of input and of grad_output both allow, in order of preference. One
// tile a specialisation: each is seconds of compilation.
constexpr Tile kGradWeightNchwTiles32[] = {{"weight_x4g4", 4, 0, 4, 4}, {"weight_x4g2", 4, 0, 4, 2},
                                           {"weight_x2g2", 4, 0, 2, 2}, {"weight_staged", 4, 0, 1, 1, true},
                                           {"weight_x1g1", 4, 0, 1, 1}, {"weight_x1g1_narrow", 2, 0, 1, 1}};
constexpr Tile kGradWeightNchwTiles16[] = {{"weight_x8g8", 8, 0, 8, 8},         {"weight_x4g4", 4, 0, 4, 4},
                                           {"weight_x8g2", 8, 0, 8, 2},         {"weight_x2g2", 4, 0, 2, 2},
                                           {"weight_staged", 4, 0, 1, 1, true}, {"weight_x1g1", 4, 0, 1, 1},
                                           {"weight_x1g1_narrow", 2, 0, 1, 1}};
// Of few taps, a thread takes several channels; of very many (11x11), a strip of two columns.
constexpr Tile kGradWeightNhwcTiles[] = {
    {"weight_c4q4", 4, 0, 4}, {"weight_c2q4", 4, 0, 2}, {"weight_c1q4", 4, 0, 1}, {"weight_c1q2", 2, 0, 1}};

constexpr Tile kToeplitzTiles[] = {{"band", 64, 0, 8}};
constexpr Tile kBlockedTiles[] = {{"blocked", 7, 4, 1}};
// Columns of input that a stage holds.
constexpr Tile kToeplitzGradWeightNchwTiles[] = {
    {"weight_band64", 64, 0, 1}, {"weight_band32", 32, 0, 1}, {"weight_band16", 16, 0, 1}};
constexpr Tile kToeplitzGradWeightNhwcTiles[] = {{"weight_band32_nhwc", 32, 0, 1}, {"weight_band16_nhwc", 16, 0, 1}};
// One for each layout.
constexpr Tile kBlockedGradWeightTiles[] = {{"weight_blocked", 4, 0, 1}, {"weight_blocked_nhwc", 4, 0, 1}};

struct TileTable {
  const Tile* tiles;
  int size;

  template <int kSize>
  constexpr TileTable(const Tile (&table)[kSize]) : tiles(table), size(kSize) {}
  constexpr TileTable() : tiles(nullptr), size(0) {}
  const Tile& operator[](int tile) const { return tiles[tile]; }
};

inline TileTable tile_table(Kernel kernel, DType dtype) {
  const bool wide = dtype == DType::kFloat32;
  switch (kernel) {
    case Kernel::kDirectNchw: return wide ? TileTable(kDirectNchwTiles32) : TileTable(kDirectNchwTiles16);
    case Kernel::kDirectNhwc: return kDirectNhwcTiles;
    case Kernel::kTiledNhwc: return kTiledNhwcTiles;
    case Kernel::kStreamNchw: return wide ? TileTable(kStreamNchwTiles32) : TileTable(kStreamNchwTiles16);
    case Kernel::kPlanesNchw: return wide ? TileTable(kPlanesNchwTiles32) : TileTable(kPlanesNchwTiles16);
    case Kernel::kStreamNhwc: return kStreamNhwcTiles;
    case Kernel::kGradInputNchw: return wide ? TileTable(kGradInputNchwTiles32) : TileTable(kGradInputNchwTiles16);
    case Kernel::kGradInputNhwc: return kGradInputNhwcTiles;
    case Kernel::kGradWeightNchw: return wide ? TileTable(kGradWeightNchwTiles32) : TileTable(kGradWeightNchwTiles16);
    case Kernel::kGradWeightNhwc: return kGradWeightNhwcTiles;
    case Kernel::kToeplitz: return kToeplitzTiles;
    case Kernel::kBlocked: return kBlockedTiles;
    case Kernel::kToeplitzGradWeightNchw: return kToeplitzGradWeightNchwTiles;
    case Kernel::kToeplitzGradWeightNhwc: return kToeplitzGradWeightNhwcTiles;
    case Kernel::kBlockedGradWeight: return kBlockedGradWeightTiles;
    default: return {};
  }
}

// 7x7: beyond this many fp32 weights a thread, registers spill.
constexpr int kMaxRegisterTaps = 49;
// direct_nhwc's filters are registers as well.
constexpr int kMaxDirectNhwcTaps = 9;
// stream_nhwc: filters, sums of the live rows and one row of the window.
constexpr int kMaxStreamNhwcRegisters = 116;
// Windows are described by 64-bit masks: eight outputs at stride 4 and this much kernel are 64 rows.
constexpr int kMaxSpan = 35;
constexpr int64_t kInt32Max = 0x7fffffff;

// The problem as a direct kernel sees it; only the sizes are filled in.
inline DirectArgs direct_args(const Problem& p) {
  DirectArgs args{};
  args.n = p.n;
  args.out_c = p.out_c;
  args.multiplier = static_cast<int>(p.multiplier);
  args.flip = p.direction == Direction::kGradInput;
  args.h = static_cast<int>(args.flip ? p.out_h : p.h);
  args.w = static_cast<int>(args.flip ? p.out_w : p.w);
  args.out_h = static_cast<int>(args.flip ? p.h : p.out_h);
  args.out_w = static_cast<int>(args.flip ? p.w : p.out_w);
  args.padding_h = static_cast<int>(args.flip ? p.dilation_h * (p.kernel_h - 1) - p.padding_h : p.padding_h);
  args.padding_w = static_cast<int>(args.flip ? p.dilation_w * (p.kernel_w - 1) - p.padding_w : p.padding_w);
  args.kernel_h = static_cast<int>(p.kernel_h);
  args.kernel_w = static_cast<int>(p.kernel_w);
  args.stride_h = static_cast<int>(p.stride_h);
  args.dilation_h = static_cast<int>(p.dilation_h);
  args.dilation_w = static_cast<int>(p.dilation_w);
  return args;
}

inline int element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// toeplitz: columns are counted in chunks of eight.
struct Band {
  int chunks;        // that eight outputs read
  int origin;        // where the chunks of output column 0 begin
  int tiles_w;       // columns of a block, in eights
  int image_chunks;  // of an input row; 0: outputs are too wide for one block
  int tiles_h;       // rows of a warp, in sixteens

  int chunks_in(int stride_w) const { return (tiles_w - 1) * stride_w + chunks; }
};

inline Band band_of(const Problem& p) {
  const DirectArgs args = direct_args(p);
  Band band{};
  band.origin = floor_divide(-args.padding_w, 8);
  const int last = static_cast<int>(7 * p.stride_w) + (args.kernel_w - 1) * args.dilation_w - args.padding_w;
  band.chunks = floor_divide(last, 8) - band.origin + 1;
  band.image_chunks = floor_divide(args.w + 7, 8);
  band.tiles_w = floor_divide(args.out_w + 7, 8);
  const int stride = static_cast<int>(p.stride_w);
  // A warp's rows: many where a block holds many small images or, in channels_last, lays out the weights of eight
  // channels; few where shared memory bounds the rows (channels_last; 32x128x56x56, 31x31, fp16, H200: 0.48 ms with 16
  // rows, 0.54 with 32; 32x256x28x28, 29x29: 0.34 and 0.14 with 64; NCHW: 0.156 ms with 16, 0.112 with 32;
  // 32x512x14x14, 27x27: 0.106 with 16, 0.044 with 64).
  const auto rows_of = [&](int tiles_w) {
    if (p.layout == Layout::kNhwc) return tiles_w > 4 ? 1 : 4;
    return tiles_w > 2 ? 2 : 4;
  };
  band.tiles_h = rows_of(band.tiles_w);
  const bool meets_image = band.origin < band.image_chunks && band.origin + band.chunks_in(stride) > 0;
  if (band.tiles_w <= 8 && band.image_chunks <= 16 && meets_image) return band;
  // The width that wastes the fewest columns; of equals the widest.
  const int all = band.tiles_w;
  band.image_chunks = 0;
  band.tiles_w = 8;
  for (int tiles = 7; tiles >= 5; --tiles)
    if (floor_divide(all + tiles - 1, tiles) * tiles <
        floor_divide(all + band.tiles_w - 1, band.tiles_w) * band.tiles_w)
      band.tiles_w = tiles;
  band.tiles_h = rows_of(band.tiles_w);
  return band;
}

// Weights and the rows that sixteen outputs read, of eight channels in channels_last.
constexpr int64_t kMaxBandBytes = 160 << 10;
constexpr int kMaxBandChunks = 12;

// toeplitz, blocked: filters of fewer taps are for the other kernels.
constexpr int kMinLargeTaps = 25;

inline bool can_serve_toeplitz(const Problem& p) {
  if (p.kernel_h * p.kernel_w < kMinLargeTaps) return false;
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return false;
  const int64_t span_h = (p.kernel_h - 1) * p.dilation_h, span_w = (p.kernel_w - 1) * p.dilation_w;
  if (p.stride_h > 4 || p.stride_w > 2 || span_h > 512 || span_w > 96) return false;
  if (p.h * p.w > kInt32Max / 2 || p.out_h * p.out_w > kInt32Max / 2 || p.n * p.out_c > kInt32Max / 64) return false;
  if (p.n * p.out_c * ((p.out_h + 15) / 16) * ((p.out_w + 31) / 32) > kInt32Max) return false;
  if (p.padding_h > 1 << 20 || p.padding_w > 1 << 20) return false;
  const bool channels_last = p.layout == Layout::kNhwc;
  if (channels_last && p.multiplier != 1) return false;
  const Band band = band_of(p);
  if (band.chunks > kMaxBandChunks) return false;
  const int64_t in_h = p.direction == Direction::kGradInput ? p.out_h : p.h, rows = 15 * p.stride_h + span_h + 1;
  const int64_t pitch = band.chunks_in(static_cast<int>(p.stride_w)) + 2;
  return ((rows < in_h ? rows : in_h) * pitch * 16 + p.kernel_h * (8 * band.chunks + 13) * 4) *
             (channels_last ? 8 : 1) <=
         kMaxBandBytes;
}

// blocked: a row of a thread's window lies in registers.
constexpr int kMaxBlockedWindow = 80;

inline bool can_serve_blocked(const Problem& p) {
  if (p.kernel_h * p.kernel_w < kMinLargeTaps) return false;
  const int64_t span_h = (p.kernel_h - 1) * p.dilation_h, span_w = (p.kernel_w - 1) * p.dilation_w;
  if (p.stride_h > 2 || p.stride_w > 2 || p.kernel_w > 64 || span_h > 512) return false;
  if (6 * p.stride_w + span_w >= kMaxBlockedWindow) return false;
  if (p.h * p.w > kInt32Max / 2 || p.out_h * p.out_w > kInt32Max / 2 || p.n * p.out_c > kInt32Max / 64) return false;
  if (p.n * p.out_c * ((p.out_h + 3) / 4) * ((p.out_w + 6) / 7) > kInt32Max) return false;
  if (p.padding_h > 1 << 20 || p.padding_w > 1 << 20) return false;
  const bool channels_last = p.layout == Layout::kNhwc;
  if (channels_last && p.multiplier != 1) return false;
  // Weights, and what a block one thread wide and high reads.
  const int64_t in_h = p.direction == Direction::kGradInput ? p.out_h : p.h, rows = 3 * p.stride_h + span_h + 1;
  const int64_t channels = channels_last ? 16 / element_size(p.dtype) : 1;
  const int64_t weight_bytes = p.kernel_h * (p.kernel_w + 3) * 4 * channels;
  const int64_t in_bytes = (rows < in_h ? rows : in_h) * (6 * p.stride_w + span_w + 1) * 4 * channels;
  // The weights of many channels leave room for few threads (8x64x128x128, 63x63, fp32, channels_last, H200: 67 ms).
  return weight_bytes + in_bytes <= kSharedBytesEverywhere && (!channels_last || weight_bytes <= 24 << 10);
}

// Grad of weight: every tap is a register (11x11), and a dilated row of taps must leave room beside them.
constexpr int kMaxGradWeightTaps = 121;
constexpr int kMaxGradWeightSpan = 40;
// Beyond these, registers spill: a thread of channels_last has an address for each load as well.
constexpr int kMaxMarchRegisters = 200;
constexpr int kMaxMarchRegistersNhwc = 225;
constexpr int kGradWeightThreads = 128;  // a block, at most
constexpr int kMaxWideStripTaps = 25;    // NCHW, strips of eight columns

inline bool can_serve_grad_weight(const Problem& p, Kernel kernel, const Tile& tile) {
  const bool channels_last = kernel == Kernel::kGradWeightNhwc;
  const int64_t taps = p.kernel_h * p.kernel_w;
  if (p.layout != (channels_last ? Layout::kNhwc : Layout::kNchw) || taps > kMaxGradWeightTaps) return false;
  // Rows that are `dilation_h` apart are a problem of their own; with a stride they are not.
  if (p.dilation_h > 1 && p.stride_h > 1) return false;
  if (p.stride_h > 2 || p.stride_w > 2 || (p.kernel_w - 1) * p.dilation_w > kMaxGradWeightSpan) return false;
  // Rows of grad_output that meet padding alone would be missed.
  if (p.padding_h > (p.kernel_h - 1) * p.dilation_h || p.padding_w > 64) return false;
  if (p.h * p.w > kInt32Max || p.n * p.out_h * p.out_w > kInt32Max) return false;
  const int load = channels_last || tile.vector < tile.grad_vector ? tile.vector : tile.grad_vector;
  const MarchRegisters registers =
      march_registers(static_cast<int>(p.kernel_h), static_cast<int>(p.kernel_w), static_cast<int>(p.stride_h),
                      static_cast<int>(p.stride_w), static_cast<int>(p.dilation_w), tile.columns,
                      channels_last ? tile.vector : 1, load, element_size(p.dtype));
  if (channels_last) {
    const int loads = registers.step * 4 / (tile.vector * (load == 1 ? 4 : element_size(p.dtype)));
    const int limit = tile.vector == 1 ? kMaxMarchRegistersNhwc : kMaxMarchRegisters;
    return p.multiplier == 1 && p.c % tile.vector == 0 && (p.aligned || tile.vector == 1) &&
           registers.kept + registers.step + 2 * loads <= limit && p.h * p.w * p.c <= kInt32Max &&
           p.out_h * p.out_w * p.c <= kInt32Max;
  }
  if (registers.kept + registers.step > kMaxMarchRegisters) return false;
  if (tile.staged) {
    // The images that a block's threads may meet at once, and one more at either end.
    const int64_t strips = (p.out_w + tile.columns - 1) / tile.columns;
    const int64_t elements = (kGradWeightThreads / strips + 2) * (p.h * p.w + p.out_h * p.out_w);
    if (p.dilation_h != 1 || strips > kGradWeightThreads || elements * element_size(p.dtype) > 44 << 10) return false;
  }
  if (tile.columns == 8 && taps > kMaxWideStripTaps) return false;
  return (p.aligned || (tile.vector == 1 && tile.grad_vector == 1)) && p.w % tile.vector == 0 &&
         p.out_w % tile.grad_vector == 0;
}

// stream_nchw and planes_nchw: registers for the filter, the sums of the live rows and a row of the window, and the
// multiply-adds of an unrolled stage, which are compile time.
constexpr int kMaxRollingRegisters = 150;
constexpr int kMaxRollingStage = 3000;
constexpr int kMaxThreadsW = 256;

inline bool can_roll(const Problem& p, const DirectArgs& args, Kernel kernel, const Tile& tile) {
  const bool aligned = p.aligned || tile.vector == 1;
  if (p.layout != Layout::kNchw || p.multiplier != 1 || !aligned || args.w % tile.vector != 0 || args.padding_w < -64 ||
      args.out_w > kMaxThreadsW * tile.columns)
    return false;
  const int taps = static_cast<int>(p.kernel_h * p.kernel_w);
  const int live_rows =
      rolling_live_rows(static_cast<int>(p.kernel_h), static_cast<int>(p.stride_h), static_cast<int>(p.dilation_h));
  const int stage_rows = rolling_stage_outputs(live_rows) * static_cast<int>(p.stride_h);
  const int window = window_size(tile.columns, static_cast<int>(p.stride_w), static_cast<int>(p.kernel_w),
                                 static_cast<int>(p.dilation_w));
  if (taps + live_rows * tile.columns + window > kMaxRollingRegisters ||
      stage_rows * taps * tile.columns > kMaxRollingStage * static_cast<int>(p.stride_h))
    return false;
  // Shared memory for the smallest launch: one plane, or a ring of the fewest stages, and its outputs.
  const int64_t granule = 16 / element_size(p.dtype);
  const int64_t depth = stream_depth(args.w % granule == 0 && p.aligned ? 2 : 3, stage_rows * args.w, granule);
  const int64_t elements = kernel == Kernel::kPlanesNchw
                               ? static_cast<int64_t>(args.h) * args.w + static_cast<int64_t>(args.out_h) * args.out_w
                               : depth * stage_rows * args.w + rolling_stage_outputs(live_rows) * args.out_w;
  return (elements + 4 * granule) * element_size(p.dtype) <= kSharedBytesEverywhere;
}

// toeplitz_grad_weight and blocked_grad_weight: a kernel's sums are a block's registers.
constexpr int kMaxLargeGradWeight = 64;

inline bool can_serve_large_grad_weight(const Problem& p, Kernel kernel, int tile) {
  const bool channels_last =
      kernel == Kernel::kBlockedGradWeight ? tile == 1 : kernel == Kernel::kToeplitzGradWeightNhwc;
  if (p.layout != (channels_last ? Layout::kNhwc : Layout::kNchw)) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (is_toeplitz_grad_weight(kernel) && p.dtype == DType::kFloat32) return false;
  if (p.kernel_h > kMaxLargeGradWeight || p.kernel_w > kMaxLargeGradWeight) return false;
  // Columns of grad_output that meet padding alone would be missed by the bias.
  if (p.padding_h >= p.kernel_h || p.padding_w >= p.kernel_w) return false;
  const int64_t channels = channels_last ? p.out_c : 1;  // that lie between neighbouring columns
  return p.h * p.w <= kInt32Max && p.out_h * p.out_w <= kInt32Max && p.w * channels <= kInt32Max &&
         p.out_w * channels <= kInt32Max && p.out_c <= kInt32Max &&
         p.n * p.out_h * (p.w + p.out_w + 15) / 16 <= kInt32Max;
}

// blocked_grad_weight: the taps of a thread, as few multiply-adds wasted as can be; the loads of a step and the
// kRows - 1 steps more than rows are counted in, at 12 rows.
struct TapTile {
  int rows, columns;
};
constexpr TapTile best_tap_tile(int64_t kernel_h, int64_t kernel_w) {
  constexpr TapTile kCandidates[] = {{4, 8}, {3, 8}, {2, 8}, {8, 4}, {7, 4}, {6, 4}, {5, 4}, {4, 4}, {3, 4}};
  constexpr int kLoads = 8, kSteps = 12, kMaxThreads = 256;
  TapTile best{};
  int64_t least = 0;
  for (const TapTile tile : kCandidates) {
    const int64_t tiles = ((kernel_h + tile.rows - 1) / tile.rows) * ((kernel_w + tile.columns - 1) / tile.columns);
    const int64_t cost = tiles * (tile.rows * tile.columns + tile.columns + kLoads) * (kSteps + tile.rows - 1);
    if (tiles <= kMaxThreads && (least == 0 || cost < least)) least = cost, best = tile;
  }
  return best;
}

// Whether `kernel` with tile `tile` can serve `p` at all.
inline bool can_serve(const Problem& p, Kernel kernel, int tile) {
  if (kernel == Kernel::kGeneral) return true;
  if (p.dtype == DType::kFloat64 || is_grad_weight_kernel(kernel) != (p.direction == Direction::kGradWeight))
    return false;
  if (is_toeplitz_grad_weight(kernel) || kernel == Kernel::kBlockedGradWeight)
    return can_serve_large_grad_weight(p, kernel, tile);
  if (is_grad_weight_kernel(kernel)) return can_serve_grad_weight(p, kernel, tile_table(kernel, p.dtype)[tile]);
  const bool grad_input_kernel = is_grad_input_kernel(kernel);
  if (grad_input_kernel && p.direction != Direction::kGradInput) return false;
  // The grad of input is a flipped forward pass only where every output position has its own input position.
  const bool strided = p.stride_h != 1 || p.stride_w != 1;
  if (p.direction == Direction::kGradInput && (strided != grad_input_kernel || p.multiplier != 1)) return false;
  if (grad_input_kernel && (p.stride_h == 3 || p.stride_w == 3)) return false;  // tiles are four rows and columns
  if (kernel == Kernel::kToeplitz) return can_serve_toeplitz(p);
  if (kernel == Kernel::kBlocked) return can_serve_blocked(p);
  const int64_t taps = p.kernel_h * p.kernel_w;
  if (p.stride_h > 4 || p.stride_w > 4 || p.dilation_h > 32 || p.dilation_w > 32) return false;
  if (p.h * p.w > kInt32Max || p.out_h * p.out_w > kInt32Max || p.n * p.out_c > kInt32Max) return false;
  const int64_t span = (p.kernel_h - 1) * p.dilation_h > (p.kernel_w - 1) * p.dilation_w
                           ? (p.kernel_h - 1) * p.dilation_h
                           : (p.kernel_w - 1) * p.dilation_w;
  if (span > kMaxSpan) return false;
  if (p.n * p.out_c * p.out_h * p.out_w / 4 > kInt32Max || p.padding_h > 1 << 20 || p.padding_w > 64) return false;

  const DirectArgs args = direct_args(p);
  const Tile& t = tile_table(kernel, p.dtype)[tile];
  const bool aligned = p.aligned || t.vector == 1;
  const int kernel_h = static_cast<int>(p.kernel_h), kernel_w = static_cast<int>(p.kernel_w);
  const int stride_h = static_cast<int>(p.stride_h), stride_w = static_cast<int>(p.stride_w);
  const int dilation_h = static_cast<int>(p.dilation_h), dilation_w = static_cast<int>(p.dilation_w);
  if (grad_input_kernel) {
    const bool channels_last = kernel == Kernel::kGradInputNhwc;
    if (p.layout != (channels_last ? Layout::kNhwc : Layout::kNchw) || !aligned || args.padding_w < -64 ||
        (channels_last ? p.c : args.w) % t.vector != 0)
      return false;
    if (channels_last && (p.w * p.c > kInt32Max / 64 || p.out_w * p.c > kInt32Max / 64)) return false;
    return grad_input_registers(t.columns, t.rows, channels_last ? t.vector : 1, kernel_h, kernel_w, stride_h, stride_w,
                                dilation_h, dilation_w) <= kMaxGradInputRegisters;
  }
  if (is_rolling_nchw(kernel)) return can_roll(p, args, kernel, t);
  if (taps > kMaxRegisterTaps) return false;
  if (kernel == Kernel::kDirectNchw)
    return p.layout == Layout::kNchw && aligned && args.w % t.vector == 0 && args.padding_w >= -64;
  if (p.layout != Layout::kNhwc || p.multiplier != 1 || p.w * p.c > kInt32Max / 64 || p.out_w * p.c > kInt32Max / 64)
    return false;

  if (kernel == Kernel::kDirectNhwc)
    return aligned && p.c % t.vector == 0 && taps <= kMaxDirectNhwcTaps &&
           window_pixels(t.rows, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w) <= kMaxWindowPixels;
  const int in_rows = window_size(4, stride_h, kernel_h, dilation_h);
  const int in_columns = window_size(4, stride_w, kernel_w, dilation_w);
  if (kernel == Kernel::kStreamNhwc) {
    const int vector = stream_nhwc_vector(kernel_h, kernel_w);
    const int live_rows = rolling_live_rows(kernel_h, stride_h, dilation_h);
    const int stage_rows = rolling_stage_outputs(live_rows) * stride_h;
    const int stage_bytes = stage_rows * in_columns * t.vector * element_size(p.dtype);
    return p.aligned && p.c * element_size(p.dtype) % 16 == 0 && 2 * stage_bytes <= kSharedBytesEverywhere &&
           static_cast<int>(taps) * vector + (4 * live_rows + in_columns) * vector <= kMaxStreamNhwcRegisters;
  }
  const int pixel_bytes = (t.vector * 4 + 8) * element_size(p.dtype);
  return p.aligned && p.c * element_size(p.dtype) % 16 == 0 &&
         in_rows * in_columns * pixel_bytes + taps * t.vector * 16 <= kSharedBytesEverywhere;
}

// tiled_nhwc: the tile that wastes the fewest channels; of equals the widest (whole cache lines a pixel).
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

// The first tile of a kernel's table that serves `p`, or the general kernel.
inline Config first_that_serves(const Problem& p, Kernel kernel) {
  for (int tile = 0; tile < tile_table(kernel, p.dtype).size; ++tile)
    if (can_serve(p, kernel, tile)) return {kernel, tile};
  return {};
}

// toeplitz and blocked, where they are the fastest; else the general kernel, which stands for none. H200, 32 images, ms.
inline Config select_large(const Problem& p) {
  const DirectArgs args = direct_args(p);
  const bool nchw = p.layout == Layout::kNchw, dilated = p.dilation_h > 1 || p.dilation_w > 1;
  const int64_t taps = p.kernel_h * p.kernel_w;
  if (can_serve(p, Kernel::kToeplitz, 0)) {
    // 9x9 on 768x32x32: 0.077, planes 0.158.
    if (taps > kMaxRegisterTaps) return {Kernel::kToeplitz, 0};
    // 7x7. NCHW: 96x56x56: 0.031, planes 0.046; 192x28x28: 0.024, 0.030; 384x14x14: 0.019, 0.019; 768x7x7: 0.019, 0.014.
    // channels_last: 96x56x56: 0.060, tiled 0.053; 192x28x28: 0.036, 0.039; 384x14x14: 0.021, 0.027.
    // Dilation 3, 8x64x56x56: NCHW 0.012, direct 0.016; channels_last 0.021. 5x5 on 240x28x28: 0.027, planes 0.024.
    const bool fits = nchw ? args.out_w > 14 : args.out_w <= 28;
    if (taps == kMaxRegisterTaps && (dilated || fits)) return {Kernel::kToeplitz, 0};
  }
  // fp32 9x9 on 768x32x32: NCHW 0.345, planes 0.163; channels_last 0.325.
  const int64_t few = nchw && !dilated ? 81 : kMaxRegisterTaps;
  if (taps > few && can_serve(p, Kernel::kBlocked, 0)) return {Kernel::kBlocked, 0};
  return {};
}

// Forward, and grad of input at stride 1. Times are of 32 images on an H200, ms, fp32 / fp16 where nothing else is said.
inline Config select_nchw(const Problem& p) {
  const DirectArgs args = direct_args(p);
  const int64_t taps = p.kernel_h * p.kernel_w;
  if (p.dilation_h == 1 && p.dilation_w == 1) {
    // Small planes, of which many are loaded at once (3x3, 384x14x14: planes 0.012 / 0.011, direct 0.016 / 0.014), and
    // filters that cost registers or loads elsewhere (7x7, 96x56x56: 0.048 / 0.046, direct 0.064 / 0.058). Larger planes
    // of few taps are read faster without the detour (3x3, 144x56x56: 0.037 / 0.029, direct 0.036 / 0.026).
    if (args.h * args.w <= 32 * 32 || taps >= 25) {
      const Config planes = first_that_serves(p, Kernel::kPlanesNchw);
      if (planes.kernel != Kernel::kGeneral) return planes;
    }
    // Rows that fill a warp at least, where a thread saves instructions by rolling down them: 16-bit (3x3, 16x64x512x512:
    // 0.31, direct 0.44) and larger filters (3x7, 128x128x256: 0.31 / 0.24, direct 0.39 / 0.29), not 3x1 (64x8x512x512:
    // 0.28 / 0.15, direct 0.26 / 0.13) nor 3x3 in fp32 (16x64x512x512: 0.60, direct 0.58).
    // Rows off the boundaries of words: shared memory is where they cost little.
    const bool fills_warps = args.out_w * element_size(p.dtype) >= 28 * 16;
    const bool saves = p.kernel_h > 1 && (taps > 9 || (taps > 3 && p.dtype != DType::kFloat32));
    const bool unaligned = !p.aligned || args.w % 4 != 0;
    if (p.stride_h == 1 && p.stride_w == 1 && fills_warps && (saves || unaligned)) {
      const Config stream = first_that_serves(p, Kernel::kStreamNchw);
      if (stream.kernel != Kernel::kGeneral) return stream;
    }
  }
  for (const Kernel kernel : {Kernel::kDirectNchw, Kernel::kPlanesNchw, Kernel::kStreamNchw}) {
    const Config config = first_that_serves(p, kernel);
    if (config.kernel != Kernel::kGeneral) return config;
  }
  return {};
}

inline Config select_nhwc(const Problem& p) {
  // Wide pixels are whole cache lines (3x3, 16x64x512x512: 64 channels 0.57 / 0.30, 32 channels 0.64 / 0.37), unless
  // channels beyond the last are wasted (144x56x56: 0.043 / 0.032 against 0.040 / 0.029). At stride 2 they win all the
  // same (96x112x112: 0.058 / 0.038 against 0.063 / 0.043).
  const auto padded = [&](int64_t block) { return (p.c + block - 1) / block * block; };
  const bool narrow = padded(32) < padded(64) && (p.stride_w == 1 || p.c < 64);
  for (const int tile : {narrow ? 1 : 0, narrow ? 0 : 1})
    if (can_serve(p, Kernel::kStreamNhwc, tile)) return {Kernel::kStreamNhwc, tile};
  // Dilated kernels of few taps, and what is not aligned.
  const Config direct = first_that_serves(p, Kernel::kDirectNhwc);
  if (direct.kernel != Kernel::kGeneral) return direct;
  const int tiled = tiled_nhwc_tile(p.c);
  if (can_serve(p, Kernel::kTiledNhwc, tiled)) return {Kernel::kTiledNhwc, tiled};
  return {};
}

inline Config select_grad_weight(const Problem& p) {
  const bool channels_last = p.layout == Layout::kNhwc;
  const Config marching = first_that_serves(p, channels_last ? Kernel::kGradWeightNhwc : Kernel::kGradWeightNchw);
  if (marching.kernel != Kernel::kGeneral) return marching;
  const Kernel toeplitz = channels_last ? Kernel::kToeplitzGradWeightNhwc : Kernel::kToeplitzGradWeightNchw;
  if (can_serve(p, toeplitz, 0)) {
    // The narrowest tile that holds a row, or the widest.
    int tile = tile_table(toeplitz, p.dtype).size - 1;
    while (tile > 0 && p.w > tile_table(toeplitz, p.dtype)[tile].columns) --tile;
    return {toeplitz, tile};
  }
  if (can_serve(p, Kernel::kBlockedGradWeight, channels_last)) return {Kernel::kBlockedGradWeight, channels_last};
  return marching;
}

inline Config select_config(const Problem& p) {
  const bool nchw = p.layout == Layout::kNchw;
  if (p.direction == Direction::kGradWeight) return select_grad_weight(p);
  if (p.direction == Direction::kGradInput && (p.stride_h != 1 || p.stride_w != 1))
    return first_that_serves(p, nchw ? Kernel::kGradInputNchw : Kernel::kGradInputNhwc);
  const Config large = select_large(p);
  if (large.kernel != Kernel::kGeneral) return large;
  const Config config = nchw ? select_nchw(p) : select_nhwc(p);
  if (config.kernel != Kernel::kGeneral) return config;
  // What needs too many registers or too much shared memory elsewhere, such as 7x7 with dilation 3 in channels_last.
  const Config toeplitz = first_that_serves(p, Kernel::kToeplitz);
  return toeplitz.kernel != Kernel::kGeneral ? toeplitz : first_that_serves(p, Kernel::kBlocked);
}

// What a specialisation is compiled for: the compile-time part of a problem.
struct Specialisation {
  Kernel kernel;
  DType dtype;
  int kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  int padding_w;      // NCHW and grad of input: where aligned words lie (window_phase), and which taps meet
  int padding_h;      // grad of input alone
  int tile;           // of a kernel that is compiled tile by tile, else 0
  int channels_last;  // toeplitz, blocked
  Band band;          // toeplitz, which takes the kernel's size at run time

  bool operator==(const Specialisation& other) const { return std::memcmp(this, &other, sizeof(*this)) == 0; }
};

// direct_nchw, stream_nchw, planes_nchw: where windows start within aligned words of input. A specialisation of
// direct_nchw serves all tiles of its table, so its words are the widest.
inline int window_phase(int padding_w, Kernel kernel, DType dtype, int tile) {
  const int words = tile_table(kernel, dtype)[is_compiled_by_tile(kernel) ? tile : 0].vector;
  return (padding_w % words + words) % words;
}

inline Specialisation specialisation_of(const Problem& p, const Config& config) {
  const Kernel kernel = config.kernel;
  Specialisation s{};
  s.kernel = kernel;
  s.dtype = p.dtype;
  s.stride_w = static_cast<int>(p.stride_w);
  if (kernel == Kernel::kToeplitz || kernel == Kernel::kBlocked) s.channels_last = p.layout == Layout::kNhwc;
  if (kernel == Kernel::kToeplitz) {
    s.band = band_of(p);
    return s;
  }
  if (is_toeplitz_grad_weight(kernel)) {  // compiled for the kernel's size in eights
    s.kernel_h = static_cast<int>(p.kernel_h + 7) / 8 * 8;
    s.kernel_w = static_cast<int>(p.kernel_w + 7) / 8 * 8;
    s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
    s.tile = config.tile;
    return s;
  }
  if (kernel == Kernel::kBlockedGradWeight) {  // compiled for the taps of a thread
    const TapTile taps = best_tap_tile(p.kernel_h, p.kernel_w);
    s.kernel_h = taps.rows;
    s.kernel_w = taps.columns;
    s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
    return s;
  }
  if (kernel != Kernel::kBlocked) s.kernel_h = static_cast<int>(p.kernel_h);
  s.kernel_w = static_cast<int>(p.kernel_w);
  s.stride_h = static_cast<int>(p.stride_h);
  s.dilation_h = static_cast<int>(p.dilation_h);
  s.dilation_w = static_cast<int>(p.dilation_w);
  if (is_direct_nchw(kernel)) s.padding_w = window_phase(direct_args(p).padding_w, kernel, p.dtype, config.tile);
  if (is_grad_input_kernel(kernel)) {
    s.padding_w = direct_args(p).padding_w;
    s.padding_h = direct_args(p).padding_h;
  }
  if (kernel == Kernel::kGradWeightNchw) s.padding_w = static_cast<int>(p.padding_w);
  if (is_compiled_by_tile(kernel)) s.tile = config.tile;
  return s;
}

inline const char* kernel_name(Kernel kernel) {
  constexpr const char* kNames[] = {"general",
                                    "direct_nchw",
                                    "stream_nchw",
                                    "planes_nchw",
                                    "direct_nhwc",
                                    "tiled_nhwc",
                                    "stream_nhwc",
                                    "grad_input_nchw",
                                    "grad_input_nhwc",
                                    "grad_weight_nchw",
                                    "grad_weight_nhwc",
                                    "toeplitz",
                                    "blocked",
                                    "toeplitz_grad_weight_nchw",
                                    "toeplitz_grad_weight_nhwc",
                                    "blocked_grad_weight"};
  return kNames[static_cast<int>(kernel)];
}

inline const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "float64"};
  return kNames[static_cast<int>(dtype)];
}

inline std::string specialisation_name(const Specialisation& s) {
  char name[128];
  if (s.kernel == Kernel::kBlocked) {
    std::snprintf(name, sizeof(name), "blocked_%s_%s_kw%d_s%dx%d_d%dx%d", s.channels_last ? "nhwc" : "nchw",
                  dtype_name(s.dtype), s.kernel_w, s.stride_h, s.stride_w, s.dilation_h, s.dilation_w);
    return name;
  }
  if (s.kernel == Kernel::kToeplitz) {
    std::snprintf(name, sizeof(name), "toeplitz_%s_%s_b%d_s%d_o%s%d_i%d_t%d", s.channels_last ? "nhwc" : "nchw",
                  dtype_name(s.dtype), s.band.chunks, s.stride_w, s.band.origin < 0 ? "m" : "",
                  s.band.origin < 0 ? -s.band.origin : s.band.origin, s.band.image_chunks, s.band.tiles_w);
    return name;
  }
  std::snprintf(name, sizeof(name), "%s_%s_k%dx%d_s%dx%d_d%dx%d_p%s%d", kernel_name(s.kernel), dtype_name(s.dtype),
                s.kernel_h, s.kernel_w, s.stride_h, s.stride_w, s.dilation_h, s.dilation_w, s.padding_w < 0 ? "m" : "",
                s.padding_w < 0 ? -s.padding_w : s.padding_w);
  std::string full = name;
  if (is_grad_input_kernel(s.kernel)) full += (s.padding_h < 0 ? "xm" : "x") + std::to_string(std::abs(s.padding_h));
  if (is_compiled_by_tile(s.kernel)) full += std::string("_") + tile_table(s.kernel, s.dtype)[s.tile].name;
  return full;
}

// The CUDA source that compiles `s`: one exported function that serves every tile of its table, or its own tile.
inline std::string specialisation_source(const Specialisation& s) {
  constexpr const char* kTypes[] = {"float", "depthwise::float16", "depthwise::bfloat16", "double"};
  const std::string kernel = is_toeplitz_grad_weight(s.kernel) ? "toeplitz_grad_weight" : kernel_name(s.kernel);
  char arguments[128];
  std::snprintf(arguments, sizeof(arguments), "%s, %d, %d, %d, %d, %d, %d", kTypes[static_cast<int>(s.dtype)],
                s.kernel_h, s.kernel_w, s.stride_h, s.stride_w, s.dilation_h, s.dilation_w);
  std::string traits = std::string("NhwcTraits<") + arguments;
  if (is_direct_nchw(s.kernel)) traits = std::string("NchwTraits<") + arguments + ", " + std::to_string(s.padding_w);
  if (is_grad_input_kernel(s.kernel))
    traits = "GradInput" + std::string(s.kernel == Kernel::kGradInputNchw ? "NchwTraits<" : "NhwcTraits<") + arguments +
             ", " + std::to_string(s.padding_w) + ", " + std::to_string(s.padding_h);
  if (is_toeplitz_grad_weight(s.kernel)) {
    const bool channels_last = s.kernel == Kernel::kToeplitzGradWeightNhwc;
    std::snprintf(arguments, sizeof(arguments), "%s, %d, %d, %d, %s", kTypes[static_cast<int>(s.dtype)], s.kernel_h / 8,
                  s.kernel_w / 8, tile_table(s.kernel, s.dtype)[s.tile].columns / 16, channels_last ? "true" : "false");
    traits = std::string("ToeplitzGradWeightTraits<") + arguments;
  }
  if (s.kernel == Kernel::kBlockedGradWeight) {
    std::snprintf(arguments, sizeof(arguments), "%s, %d, %d", kTypes[static_cast<int>(s.dtype)], s.kernel_h,
                  s.kernel_w);
    traits = std::string("BlockedGradWeightTraits<") + arguments;
  }
  if (is_marching_grad_weight(s.kernel)) {
    const Tile& tile = tile_table(s.kernel, s.dtype)[s.tile];
    traits = "GradWeight" + std::string(s.kernel == Kernel::kGradWeightNchw ? "NchwTraits<" : "NhwcTraits<") +
             arguments + ", " + std::to_string(tile.columns) + ", " + std::to_string(tile.vector);
    if (s.kernel == Kernel::kGradWeightNchw)
      traits += ", " + std::to_string(tile.grad_vector) + ", " + std::to_string(s.padding_w) +
                (tile.staged ? ", true" : ", false");
  }
  if (s.kernel == Kernel::kToeplitz) {
    std::snprintf(arguments, sizeof(arguments), "%s, %d, %d, %d, %d, %d, %d, %s", kTypes[static_cast<int>(s.dtype)],
                  s.band.chunks, s.stride_w, s.band.origin, s.band.image_chunks, s.band.tiles_w, s.band.tiles_h,
                  s.channels_last ? "true" : "false");
    traits = std::string("ToeplitzTraits<") + arguments;
  }
  if (s.kernel == Kernel::kBlocked) {
    std::snprintf(arguments, sizeof(arguments), "%s, %d, %d, %d, %d, %d, %s", kTypes[static_cast<int>(s.dtype)],
                  s.kernel_w, s.stride_h, s.stride_w, s.dilation_h, s.dilation_w, s.channels_last ? "true" : "false");
    traits = std::string("BlockedTraits<") + arguments;
  }
  traits += ">";
  const Tile& tile = tile_table(s.kernel, s.dtype)[s.tile];
  if (is_rolling_nchw(s.kernel)) traits += ", " + std::to_string(tile.columns) + ", " + std::to_string(tile.vector);
  if (s.kernel == Kernel::kStreamNhwc) traits += ", " + std::to_string(tile.vector);
  const std::string args = is_grad_weight_kernel(s.kernel) ? "depthwise::GradWeightArgs" : "depthwise::DirectArgs";
  return "#include \"" + kernel + ".cuh\"\n" +
         "extern \"C\" int depthwise_inline_launch(const void* args, int tile, void* stream) {\n" +
         "  return depthwise::launch_" + kernel + "<depthwise::" + traits + ">(*static_cast<const " + args +
         "*>(args), tile, static_cast<cudaStream_t>(stream));\n}\n";
}

// "specialisation/tile", or "general".
inline std::string variant_name(const Problem& p, const Config& config) {
  if (config.kernel == Kernel::kGeneral) return "general";
  return specialisation_name(specialisation_of(p, config)) + "/" + tile_table(config.kernel, p.dtype)[config.tile].name;
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
