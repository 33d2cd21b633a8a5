// The kernels and their tiles: everything that can be selected, and forced by name.
#pragma once

#include "problem.h"

namespace depthwise {

enum class Kernel : int {
  kGeneral,
  kDirectNchw,
  kStreamNchw,
  kPlanesNchw,
  kWarpsNchw,
  kColumnsNchw,
  kColumnsNhwc,
  kDirectNhwc,
  kTiledNhwc,
  kStreamNhwc,
  kGradInputNchw,
  kGradInputNhwc,
  kColumnsGradWeight,
  kGradWeightNchw,
  kGradWeightPlanesNchw,
  kGradWeightNhwc,
  kGradWeightStreamNhwc,
  kGradWeightRowsNhwc,
  kToeplitz,
  kBandImages,
  kImagesNchw,
  kImagesNhwc,
  kImageBandsNhwc,
  kBlocked,
  kStripsNchw,
  kStripsNhwc,
  kToeplitzGradWeight,
  kBlockedGradWeight,
  kImagesGradWeightNchw,
  kImagesGradWeightNhwc,
  kImageRowsGradWeight,
  kImagesFma,
  kImagesFmaGradWeight,
  kStripsGradWeightNchw,
  kStripsGradWeightNhwc,
  kGradientsNchw,
  kGradientsPlanesNchw,
  kGradientsNhwc,
};
constexpr Kernel kSpecialisedKernels[] = {Kernel::kDirectNchw,
                                          Kernel::kStreamNchw,
                                          Kernel::kPlanesNchw,
                                          Kernel::kWarpsNchw,
                                          Kernel::kColumnsNchw,
                                          Kernel::kColumnsNhwc,
                                          Kernel::kDirectNhwc,
                                          Kernel::kTiledNhwc,
                                          Kernel::kStreamNhwc,
                                          Kernel::kGradInputNchw,
                                          Kernel::kGradInputNhwc,
                                          Kernel::kColumnsGradWeight,
                                          Kernel::kGradWeightNchw,
                                          Kernel::kGradWeightPlanesNchw,
                                          Kernel::kGradWeightNhwc,
                                          Kernel::kGradWeightStreamNhwc,
                                          Kernel::kGradWeightRowsNhwc,
                                          Kernel::kToeplitz,
                                          Kernel::kBandImages,
                                          Kernel::kImagesNchw,
                                          Kernel::kImagesNhwc,
                                          Kernel::kImageBandsNhwc,
                                          Kernel::kBlocked,
                                          Kernel::kStripsNchw,
                                          Kernel::kStripsNhwc,
                                          Kernel::kToeplitzGradWeight,
                                          Kernel::kBlockedGradWeight,
                                          Kernel::kImagesGradWeightNchw,
                                          Kernel::kImagesGradWeightNhwc,
                                          Kernel::kImageRowsGradWeight,
                                          Kernel::kImagesFma,
                                          Kernel::kImagesFmaGradWeight,
                                          Kernel::kStripsGradWeightNchw,
                                          Kernel::kStripsGradWeightNhwc,
                                          Kernel::kGradientsNchw,
                                          Kernel::kGradientsPlanesNchw,
                                          Kernel::kGradientsNhwc};

inline bool is_rolling_nchw(Kernel kernel) { return kernel == Kernel::kStreamNchw || kernel == Kernel::kPlanesNchw; }
inline bool is_direct_nchw(Kernel kernel) { return kernel == Kernel::kDirectNchw || is_rolling_nchw(kernel); }
inline bool is_marching_grad_weight(Kernel kernel) {
  return kernel == Kernel::kGradWeightNchw || kernel == Kernel::kGradWeightNhwc;
}
inline bool is_images_grad_weight(Kernel kernel) {
  return kernel == Kernel::kImagesGradWeightNchw || kernel == Kernel::kImagesGradWeightNhwc;
}
inline bool is_columns(Kernel kernel) {
  return kernel == Kernel::kColumnsNchw || kernel == Kernel::kColumnsNhwc || kernel == Kernel::kColumnsGradWeight;
}
// Those on the tensor cores for kernels up to 9x9, one for each layout.
inline bool is_strips_grad_weight(Kernel kernel) {
  return kernel == Kernel::kStripsGradWeightNchw || kernel == Kernel::kStripsGradWeightNhwc;
}
inline bool is_grad_weight_kernel(Kernel kernel) {
  return is_marching_grad_weight(kernel) || kernel == Kernel::kToeplitzGradWeight ||
         kernel == Kernel::kBlockedGradWeight || kernel == Kernel::kGradWeightStreamNhwc ||
         kernel == Kernel::kGradWeightRowsNhwc || kernel == Kernel::kGradWeightPlanesNchw ||
         is_images_grad_weight(kernel) || is_strips_grad_weight(kernel) || kernel == Kernel::kImagesFmaGradWeight ||
         kernel == Kernel::kImageRowsGradWeight || kernel == Kernel::kColumnsGradWeight;
}
// Those that compute both gradients at once.
inline bool is_gradients_kernel(Kernel kernel) {
  return kernel == Kernel::kGradientsNchw || kernel == Kernel::kGradientsPlanesNchw || kernel == Kernel::kGradientsNhwc;
}
inline bool is_images_fma(Kernel kernel) {
  return kernel == Kernel::kImagesFma || kernel == Kernel::kImagesFmaGradWeight;
}
inline bool is_images(Kernel kernel) { return kernel == Kernel::kImagesNchw || kernel == Kernel::kImagesNhwc; }
inline bool is_strips(Kernel kernel) { return kernel == Kernel::kStripsNchw || kernel == Kernel::kStripsNhwc; }
// Kernels of which each tile is a specialisation of its own: together they would be seconds of compilation.
inline bool is_compiled_by_tile(Kernel kernel) {
  return is_direct_nchw(kernel) || kernel == Kernel::kDirectNhwc || kernel == Kernel::kStreamNhwc ||
         is_marching_grad_weight(kernel) || kernel == Kernel::kGradWeightPlanesNchw ||
         kernel == Kernel::kToeplitzGradWeight || is_images(kernel) || is_images_grad_weight(kernel) ||
         is_images_fma(kernel) || kernel == Kernel::kBandImages || kernel == Kernel::kBlocked ||
         kernel == Kernel::kGradWeightStreamNhwc || kernel == Kernel::kGradWeightRowsNhwc ||
         is_strips_grad_weight(kernel) || is_strips(kernel) || kernel == Kernel::kImageRowsGradWeight ||
         kernel == Kernel::kWarpsNchw || is_gradients_kernel(kernel);
}
// Kernels for the grad of input alone; their padding is compile-time.
inline bool is_grad_input_kernel(Kernel kernel) {
  return kernel == Kernel::kGradInputNchw || kernel == Kernel::kGradInputNhwc;
}

struct Config {
  Kernel kernel = Kernel::kGeneral;
  int tile = 0;  // row of the kernel's tile table
};

// Tile tables; the launchers' switches follow their order. The last tile of a direct kernel reads element by element
// and serves every alignment.
constexpr Tile kDirectNchwTiles32[] = {
    {"v4r16", 4, 16, 4}, {"v4r8", 4, 8, 4}, {"v4r4", 4, 4, 4}, {"v4r4_unaligned", 4, 4, 1}};
constexpr Tile kDirectNchwTiles16[] = {
    {"v8r8", 8, 8, 8}, {"v8r4", 8, 4, 8}, {"v4r8", 4, 8, 4}, {"v4r4_unaligned", 4, 4, 1}};
constexpr Tile kDirectNhwcTiles[] = {
    {"q4r4", 4, 4, 4}, {"q2r2", 2, 2, 4}, {"q4r4_unaligned", 4, 4, 1}, {"q2r2_unaligned", 2, 2, 1}};
constexpr Tile kTiledNhwcTiles[] = {{"lanes12", 4, 0, 12}, {"lanes16", 4, 0, 16}, {"lanes8", 4, 0, 8}};
constexpr Tile kStreamNchwTiles32[] = {{"stream_v4", 4, 0, 4}, {"stream_v2", 4, 0, 2}, {"stream_v1", 4, 0, 1}};
constexpr Tile kStreamNchwTiles16[] = {{"stream_v8", 8, 0, 8}, {"stream_v2", 4, 0, 2}, {"stream_v1", 4, 0, 1}};
constexpr Tile kPlanesNchwTiles32[] = {{"planes_v4", 4, 0, 4}, {"planes_v2", 4, 0, 2}, {"planes_v1", 4, 0, 1}};
constexpr Tile kPlanesNchwTiles16[] = {{"planes_v8", 8, 0, 8}, {"planes_v2", 4, 0, 2}, {"planes_v1", 4, 0, 1}};
// `vector`: elements a copy.
constexpr Tile kWarpsNchwTiles[] = {{"warps_v8", 8, 0, 8}, {"warps_v2", 8, 0, 2}};
// Columns of a lane, at most; `vector`: channels.
constexpr Tile kColumnsNchwTiles[] = {{"columns", 2, 0, 1}};
constexpr Tile kColumnsNhwcTiles[] = {{"columns_nhwc", 1, 0, 2}};
constexpr Tile kColumnsGradWeightTiles[] = {{"weight_columns", 2, 0, 1}};
// Channels of a block.
constexpr Tile kStreamNhwcTiles[] = {{"stream_channels64", 4, 0, 64}, {"stream_channels32", 4, 0, 32},
                                     {"stream_channels96", 4, 0, 96}, {"stream_channels16", 4, 0, 16},
                                     {"stream_channels8", 4, 0, 8},   {"stream_channels128", 4, 0, 128},
                                     {"stream_channels48", 4, 0, 48}};
constexpr Tile kGradInputNchwTiles32[] = {{"input_v4r4", 4, 4, 2}, {"input_v4r4_unaligned", 4, 4, 1}};
constexpr Tile kGradInputNchwTiles16[] = {{"input_v8r4", 8, 4, 4}, {"input_v4r4_unaligned", 4, 4, 1}};
constexpr Tile kGradInputNhwcTiles[] = {{"input_c4q4", 4, 4, 4}, {"input_c2q4", 4, 4, 2}, {"input_c1q4", 4, 4, 1}};
// Grad of weight, NCHW: the widest loads that rows of input and of grad_output both allow, in order of preference. One
// tile a specialisation: each is seconds of compilation.
constexpr Tile kGradWeightNchwTiles32[] = {{"weight_x4g4", 4, 0, 4, 4},
                                           {"weight_x4g2", 4, 0, 4, 2},
                                           {"weight_x2g2", 4, 0, 2, 2},
                                           {"weight_staged", 4, 0, 1, 1, true},
                                           {"weight_x1g1", 4, 0, 1, 1},
                                           {"weight_x1g1_narrow", 2, 0, 1, 1},
                                           {"weight_x4g4_queue", 4, 0, 4, 4, false, true},
                                           {"weight_x2g2_queue", 4, 0, 2, 2, false, true}};
constexpr Tile kGradWeightNchwTiles16[] = {
    {"weight_x8g8", 8, 0, 8, 8},         {"weight_x4g4", 4, 0, 4, 4},
    {"weight_x8g2", 8, 0, 8, 2},         {"weight_x2g2", 4, 0, 2, 2},
    {"weight_staged", 4, 0, 1, 1, true}, {"weight_x1g1", 4, 0, 1, 1},
    {"weight_x1g1_narrow", 2, 0, 1, 1},  {"weight_x8g8_queue", 8, 0, 8, 8, false, true}};
// Likewise, of whole planes.
constexpr Tile kGradWeightPlanesNchwTiles32[] = {{"weight_planes_x4g4", 4, 0, 4, 4},
                                                 {"weight_planes_x4g2", 4, 0, 4, 2},
                                                 {"weight_planes_x2g2", 4, 0, 2, 2},
                                                 {"weight_planes_x2g1", 4, 0, 2, 1},
                                                 {"weight_planes_x1g1", 4, 0, 1, 1}};
constexpr Tile kGradWeightPlanesNchwTiles16[] = {{"weight_planes_x8g8", 8, 0, 8, 8},
                                                 {"weight_planes_x4g4", 4, 0, 4, 4},
                                                 {"weight_planes_x2g2", 4, 0, 2, 2},
                                                 {"weight_planes_x2g1", 4, 0, 2, 1},
                                                 {"weight_planes_x1g1", 4, 0, 1, 1}};
// Of few taps, a thread takes several channels; of very many (11x11), a strip of two columns.
constexpr Tile kGradWeightNhwcTiles[] = {{"weight_c4q4", 4, 0, 4},
                                         {"weight_c2q4", 4, 0, 2},
                                         {"weight_c1q4", 4, 0, 1},
                                         {"weight_c1q2", 2, 0, 1},
                                         {"weight_c2q4_queue", 4, 0, 2, 0, false, true},
                                         {"weight_c1q4_queue", 4, 0, 1, 0, false, true}};

// Channels of a block.
constexpr Tile kGradWeightStreamNhwcTiles[] = {{"weight_stream64", 4, 0, 64}, {"weight_stream32", 4, 0, 32}};

// Rows of grad_output that a thread takes at a time.
constexpr Tile kGradWeightRowsNhwcTiles[] = {{"weight_rows1", 4, 1, 8}, {"weight_rows2", 4, 2, 8}};

constexpr Tile kToeplitzTiles[] = {{"band", 64, 0, 8}};
// Columns of the images, at most; rows of outputs that a warp takes at a time: those that divide the image's are best.
constexpr Tile kBandImagesTiles[] = {{"band_images7", 32, 7, 8}, {"band_images4", 64, 4, 8}};
// Columns of the images, at most; channels of a block.
constexpr Tile kImagesNchwTiles[] = {{"images_c4", 16, 0, 4}, {"images_c8", 16, 0, 8}};
constexpr Tile kImagesNhwcTiles[] = {{"images_c16_nhwc", 16, 0, 16}};
constexpr Tile kImageBandsNhwcTiles[] = {{"image_bands_nhwc", 16, 0, 16}};
// `vector`: taps of a kernel row that a step takes, at most.
constexpr Tile kBlockedTiles[] = {
    {"blocked", 7, 4, 64},       {"blocked_rows7", 7, 7, 64},      {"blocked_wide", 14, 7, 16},
    {"blocked_rows3", 7, 3, 64}, {"blocked_columns12", 12, 3, 64}, {"blocked_columns10", 10, 5, 64}};
// Rows of a strip: those that divide the images' are best.
constexpr Tile kStripsNchwTiles[] = {{"strips7", 8, 7, 8}, {"strips8", 8, 8, 8}};
constexpr Tile kStripsNhwcTiles[] = {{"strips7_nhwc", 8, 7, 8}, {"strips11_nhwc", 8, 11, 8}};
// Columns of input that a stage holds, at most; `vector`: channels of a block. The narrow one is for very high kernels.
constexpr Tile kToeplitzGradWeightTiles[] = {
    {"weight_band", 64, 0, 1}, {"weight_band_nhwc", 64, 0, 8}, {"weight_band32_nhwc", 32, 0, 8}};
// One for each layout.
constexpr Tile kBlockedGradWeightTiles[] = {{"weight_blocked", 4, 0, 1}, {"weight_blocked_nhwc", 4, 0, 1}};
// Columns of the images, at most.
constexpr Tile kImagesGradWeightNchwTiles[] = {
    {"weight_images32", 32, 0, 1}, {"weight_images16", 16, 0, 1}, {"weight_images8", 8, 0, 1}};
constexpr Tile kImagesGradWeightNhwcTiles[] = {{"weight_images16_nhwc", 16, 0, 8}, {"weight_images8_nhwc", 8, 0, 8}};
constexpr Tile kImageRowsGradWeightTiles[] = {{"weight_image_rows", 16, 0, 8}};
// Rows of outputs a thread; columns 0: of any plane, 1: of planes known at compile time.
constexpr Tile kImagesFmaTiles[] = {{"images_fma", 0, 2, 1}, {"images_fma_plane", 1, 8, 1}};
// The same; rows 0.
constexpr Tile kImagesFmaGradWeightTiles[] = {{"weight_images_fma", 0, 0, 1}, {"weight_images_fma_plane", 1, 0, 1}};
constexpr Tile kStripsGradWeightNchwTiles[] = {{"weight_strips", 8, 0, 1}};
constexpr Tile kStripsGradWeightNhwcTiles[] = {{"weight_strips_nhwc", 8, 0, 8}};
// One of each; of channels_last `vector` is a block's lanes along channels.
constexpr Tile kGradientsNchwTiles[] = {{"gradients", 8, 0, 8}};
constexpr Tile kGradientsPlanesNchwTiles[] = {{"gradients_planes", 7, 0, 8}};
constexpr Tile kGradientsNhwcTiles[] = {{"gradients_lanes32", 4, 0, 32},
                                        {"gradients_lanes24", 4, 0, 24},
                                        {"gradients_lanes16", 4, 0, 16},
                                        {"gradients_lanes8", 4, 0, 8}};

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
    case Kernel::kWarpsNchw: return kWarpsNchwTiles;
    case Kernel::kColumnsNchw: return kColumnsNchwTiles;
    case Kernel::kColumnsNhwc: return kColumnsNhwcTiles;
    case Kernel::kColumnsGradWeight: return kColumnsGradWeightTiles;
    case Kernel::kStreamNhwc: return kStreamNhwcTiles;
    case Kernel::kGradInputNchw: return wide ? TileTable(kGradInputNchwTiles32) : TileTable(kGradInputNchwTiles16);
    case Kernel::kGradInputNhwc: return kGradInputNhwcTiles;
    case Kernel::kGradWeightNchw: return wide ? TileTable(kGradWeightNchwTiles32) : TileTable(kGradWeightNchwTiles16);
    case Kernel::kGradWeightPlanesNchw:
      return wide ? TileTable(kGradWeightPlanesNchwTiles32) : TileTable(kGradWeightPlanesNchwTiles16);
    case Kernel::kGradWeightNhwc: return kGradWeightNhwcTiles;
    case Kernel::kGradWeightStreamNhwc: return kGradWeightStreamNhwcTiles;
    case Kernel::kGradWeightRowsNhwc: return kGradWeightRowsNhwcTiles;
    case Kernel::kToeplitz: return kToeplitzTiles;
    case Kernel::kBandImages: return kBandImagesTiles;
    case Kernel::kImagesNchw: return kImagesNchwTiles;
    case Kernel::kImagesNhwc: return kImagesNhwcTiles;
    case Kernel::kImageBandsNhwc: return kImageBandsNhwcTiles;
    case Kernel::kBlocked: return kBlockedTiles;
    case Kernel::kStripsNchw: return kStripsNchwTiles;
    case Kernel::kStripsNhwc: return kStripsNhwcTiles;
    case Kernel::kToeplitzGradWeight: return kToeplitzGradWeightTiles;
    case Kernel::kBlockedGradWeight: return kBlockedGradWeightTiles;
    case Kernel::kImagesGradWeightNchw: return kImagesGradWeightNchwTiles;
    case Kernel::kImagesGradWeightNhwc: return kImagesGradWeightNhwcTiles;
    case Kernel::kImageRowsGradWeight: return kImageRowsGradWeightTiles;
    case Kernel::kImagesFma: return kImagesFmaTiles;
    case Kernel::kImagesFmaGradWeight: return kImagesFmaGradWeightTiles;
    case Kernel::kStripsGradWeightNchw: return kStripsGradWeightNchwTiles;
    case Kernel::kStripsGradWeightNhwc: return kStripsGradWeightNhwcTiles;
    case Kernel::kGradientsNchw: return kGradientsNchwTiles;
    case Kernel::kGradientsPlanesNchw: return kGradientsPlanesNchwTiles;
    case Kernel::kGradientsNhwc: return kGradientsNhwcTiles;
    default: return {};
  }
}

inline const char* kernel_name(Kernel kernel) {
  constexpr const char* kNames[] = {"general",
                                    "direct_nchw",
                                    "stream_nchw",
                                    "planes_nchw",
                                    "warps_nchw",
                                    "columns_nchw",
                                    "columns_nhwc",
                                    "direct_nhwc",
                                    "tiled_nhwc",
                                    "stream_nhwc",
                                    "grad_input_nchw",
                                    "grad_input_nhwc",
                                    "columns_grad_weight",
                                    "grad_weight_nchw",
                                    "grad_weight_planes_nchw",
                                    "grad_weight_nhwc",
                                    "grad_weight_stream_nhwc",
                                    "grad_weight_rows_nhwc",
                                    "toeplitz",
                                    "band_images",
                                    "images_nchw",
                                    "images_nhwc",
                                    "image_bands_nhwc",
                                    "blocked",
                                    "strips_nchw",
                                    "strips_nhwc",
                                    "toeplitz_grad_weight",
                                    "blocked_grad_weight",
                                    "images_grad_weight_nchw",
                                    "images_grad_weight_nhwc",
                                    "image_rows_grad_weight",
                                    "images_fma",
                                    "images_fma_grad_weight",
                                    "strips_grad_weight_nchw",
                                    "strips_grad_weight_nhwc",
                                    "gradients_nchw",
                                    "gradients_planes_nchw",
                                    "gradients_nhwc"};
  return kNames[static_cast<int>(kernel)];
}

inline const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "float64"};
  return kNames[static_cast<int>(dtype)];
}

}  // namespace depthwise
