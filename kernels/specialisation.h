// What a kernel is compiled for, the name of that, and its CUDA source.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "blocked_grad_weight_tiling.h"
#include "can_serve.h"
#include "toeplitz_grad_weight_tiling.h"

namespace depthwise {

// What a specialisation is compiled for: the compile-time part of a problem.
struct Specialisation {
  Kernel kernel;
  DType dtype;
  int kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  int padding_w;         // NCHW: where windows begin within aligned words of input; grad of input: which taps meet
  int padding_h;         // grad of input; images_fma of whole planes; images_grad_weight of 8 columns: of the first row
                         // that meets the image
  int width, out_width;  // direct_nchw: of rows, modulo a word and modulo a thread's columns (warps_nchw: the latter);
  // images_grad_weight: rows; toeplitz_grad_weight: columns of a stage; gradients_nchw: 1 where rows
  // are wider than a warp; gradients_planes_nchw: 1 where strips divide them
  int height;         // images_fma: of whole planes, columns; else 0
  int tile;           // of a kernel that is compiled tile by tile, else 0
  int channels_last;  // toeplitz, blocked, images_fma
  int sums_parts;     // blocked
  int float_weight;   // all but the grad of weight: weight and bias are float32 beside 16-bit tensors
  ImageShape image;   // images and image_bands, which take the kernel's width at run time
  Band band;          // toeplitz and band_images, which take the kernel's size at run time

  bool operator==(const Specialisation& other) const { return std::memcmp(this, &other, sizeof(*this)) == 0; }
};

inline Specialisation specialisation_of(const Problem& p, const Config& config) {
  const Kernel kernel = config.kernel;
  Specialisation s{};
  s.kernel = kernel;
  s.dtype = p.dtype;
  s.stride_w = static_cast<int>(p.stride_w);
  s.float_weight = p.float_weight && p.direction != Direction::kGradWeight;
  if (kernel == Kernel::kToeplitz || kernel == Kernel::kBlocked) s.channels_last = p.layout == Layout::kNhwc;
  if (kernel == Kernel::kBlocked) s.sums_parts = blocked_sums_parts(p);
  if (kernel == Kernel::kToeplitz) {
    s.band = band_of(p);
    return s;
  }
  if (kernel == Kernel::kBandImages) {
    s.band = band_images_of(p);
    s.tile = config.tile;
    return s;
  }
  if (is_images(kernel) || kernel == Kernel::kImageBandsNhwc) {
    s.image = image_shape_of(p);
    s.tile = config.tile;
    return s;
  }
  if (is_gradients_kernel(kernel)) {
    s.stride_w = 1;
    s.kernel_h = s.kernel_w = static_cast<int>(p.kernel_h);
    if (kernel == Kernel::kGradientsPlanesNchw) s.width = p.w % kGradientsStrip == 0;
    if (kernel == Kernel::kGradientsNchw) s.width = p.w * element_size(p.dtype) / 16 > 32;
    s.tile = config.tile;
    return s;
  }
  if (kernel == Kernel::kToeplitzGradWeight) {  // compiled for the kernel's size in sixteens, and a stage's columns
    s.kernel_h = static_cast<int>(p.kernel_h + 15) / 16 * 16;
    s.kernel_w = static_cast<int>(p.kernel_w + 15) / 16 * 16;
    s.width = 8 * toeplitz_eights(p.w, tile_table(kernel, p.dtype)[config.tile].columns);
    s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
    s.tile = config.tile;
    return s;
  }
  if (is_images_grad_weight(kernel)) {
    const LiveRows live = live_rows_of(p);
    const bool channels_last = p.layout == Layout::kNhwc;
    s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
    s.tile = config.tile;
    if (tile_table(kernel, p.dtype)[config.tile].columns > 8) {  // compiled for the length of its segments
      const int cuts = images_cuts(channels_last, tile_table(kernel, p.dtype)[config.tile].columns, live.count);
      s.kernel_h = (live.count + cuts - 1) / cuts * cuts;
    } else {
      s.kernel_h = live.count;
      s.padding_h = -live.first;
      s.width = static_cast<int>(p.h);
      s.out_width = static_cast<int>(p.out_h);
    }
    return s;
  }
  // Compiled for the kernel's rows; nine columns stand for all.
  if (is_strips_grad_weight(kernel) || kernel == Kernel::kImageRowsGradWeight) {
    s.kernel_h = static_cast<int>(p.kernel_h);
    s.kernel_w = kMaxSmallGradWeight;
    s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
    s.tile = config.tile;
    return s;
  }
  if (is_columns(kernel)) {  // compiled for the sizes of kernel and planes
    s.kernel_h = static_cast<int>(p.kernel_h);
    s.kernel_w = static_cast<int>(p.kernel_w);
    s.height = static_cast<int>(p.h);
    s.width = static_cast<int>(p.w);
    s.stride_h = s.dilation_h = s.dilation_w = 1;
    return s;
  }
  if (kernel == Kernel::kBlockedGradWeight) {  // compiled for the taps of a thread
    const TapTile taps = best_tap_tile(p.kernel_h, p.kernel_w);
    s.kernel_h = taps.rows;
    s.kernel_w = taps.columns;
    s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
    return s;
  }
  if (is_images_fma(kernel)) {
    const DirectArgs args = direct_args(p);
    s.channels_last = p.layout == Layout::kNhwc;
    s.kernel_w = args.kernel_w;
    s.padding_w = args.padding_w;
    s.width = args.w;
    s.tile = config.tile;
    if (tile_table(kernel, p.dtype)[config.tile].columns > 0) {
      s.kernel_h = args.kernel_h;
      s.padding_h = args.padding_h;
      s.height = args.h;
    }
    return s;
  }
  if (is_strips(kernel)) {  // which take the kernel's columns at run time
    s.kernel_h = static_cast<int>(p.kernel_h);
    s.tile = config.tile;
    return s;
  }
  if (kernel != Kernel::kBlocked) s.kernel_h = static_cast<int>(p.kernel_h);
  s.kernel_w = static_cast<int>(p.kernel_w);
  s.stride_h = static_cast<int>(p.stride_h);
  s.dilation_h = static_cast<int>(p.dilation_h);
  s.dilation_w = static_cast<int>(p.dilation_w);
  const DirectArgs args = direct_args(p);
  const Tile& tile = tile_table(kernel, p.dtype)[config.tile];
  if (is_rolling_nchw(kernel)) s.padding_w = modulo(args.padding_w, tile.vector);
  if (kernel == Kernel::kDirectNchw) {
    s.padding_w = direct_nchw_phase(args, tile);
    s.width = args.w % tile.vector;
    s.out_width = tile.vector > 1 ? args.out_w % tile.columns : 0;
  }
  if (kernel == Kernel::kWarpsNchw) {  // where windows begin beside vectors
    s.padding_w = modulo(-args.padding_w, tile.vector);
    s.width = args.w % tile.vector;
    s.out_width = args.out_w % tile.columns;
  }
  if (is_grad_input_kernel(kernel)) {
    s.padding_w = args.padding_w;
    s.padding_h = args.padding_h;
  }
  if (kernel == Kernel::kGradWeightNchw || kernel == Kernel::kGradWeightPlanesNchw)
    s.padding_w = static_cast<int>(p.padding_w);
  if (is_compiled_by_tile(kernel)) s.tile = config.tile;
  return s;
}

// Its name but for the weights' dtype.
inline std::string name_beside_weights(const Specialisation& s) {
  char name[128];
  if (s.kernel == Kernel::kBlocked) {
    std::snprintf(name, sizeof(name), "blocked_%s_%s_kw%d_s%dx%d_d%dx%d_c%d_r%d_t%d%s",
                  s.channels_last ? "nhwc" : "nchw", dtype_name(s.dtype), s.kernel_w, s.stride_h, s.stride_w,
                  s.dilation_h, s.dilation_w, kBlockedTiles[s.tile].columns, kBlockedTiles[s.tile].rows,
                  kBlockedTiles[s.tile].vector, s.sums_parts ? "_parts" : "");
    return name;
  }
  if (s.kernel == Kernel::kToeplitz) {
    std::snprintf(name, sizeof(name), "toeplitz_%s_%s_b%d_s%d_o%s%d_i%d_t%dx%d", s.channels_last ? "nhwc" : "nchw",
                  dtype_name(s.dtype), s.band.chunks, s.stride_w, s.band.origin < 0 ? "m" : "",
                  s.band.origin < 0 ? -s.band.origin : s.band.origin, s.band.image_chunks, s.band.tiles_w,
                  s.band.tiles_h);
    return name + (s.channels_last ? "x" + std::to_string(s.band.slots) : "") + (s.band.shared ? "_shared" : "") +
           (s.band.tall ? "_tall" : "") + (s.band.apart > 1 ? "_apart" + std::to_string(s.band.apart) : "") +
           (s.band.turned ? "_turned" : "");
  }
  if (s.kernel == Kernel::kBandImages) {
    std::snprintf(name, sizeof(name), "band_images_%s_b%d_o%s%d_i%d_t%d_%s", dtype_name(s.dtype), s.band.chunks,
                  s.band.origin < 0 ? "m" : "", std::abs(s.band.origin), s.band.image_chunks, s.band.tiles_w,
                  tile_table(s.kernel, s.dtype)[s.tile].name);
    return name + std::string(s.band.apart > 1 ? "_apart" : "");
  }
  if (is_images(s.kernel) || s.kernel == Kernel::kImageBandsNhwc) {
    const ImageShape& i = s.image;
    std::snprintf(name, sizeof(name), "%s_%s_%dx%d_%dx%d_f%s%d_r%d_d%d_%s", kernel_name(s.kernel), dtype_name(s.dtype),
                  i.h, i.w, i.out_h, i.out_w, i.first_shift < 0 ? "m" : "", std::abs(i.first_shift), i.shifts,
                  i.shift_step, tile_table(s.kernel, s.dtype)[s.tile].name);
    return name;
  }
  if (is_images_grad_weight(s.kernel)) {
    std::snprintf(name, sizeof(name), "%s_%s_l%d_h%dx%d_p%d_%s", kernel_name(s.kernel), dtype_name(s.dtype), s.kernel_h,
                  s.width, s.out_width, s.padding_h, tile_table(s.kernel, s.dtype)[s.tile].name);
    return name;
  }
  if (is_images_fma(s.kernel)) {
    const auto signed_number = [](int value) { return (value < 0 ? "m" : "") + std::to_string(std::abs(value)); };
    std::string full = std::string(kernel_name(s.kernel)) + (s.channels_last ? "_nhwc_" : "_nchw_") +
                       dtype_name(s.dtype) + "_kw" + std::to_string(s.kernel_w) + "_p" + signed_number(s.padding_w) +
                       "_w" + std::to_string(s.width);
    if (s.height > 0)
      full += "_kh" + std::to_string(s.kernel_h) + "_p" + signed_number(s.padding_h) + "_h" + std::to_string(s.height);
    return full + "_" + tile_table(s.kernel, s.dtype)[s.tile].name;
  }
  if (is_gradients_kernel(s.kernel)) {
    std::snprintf(name, sizeof(name), "%s_%s_k%d%s_%s", kernel_name(s.kernel), dtype_name(s.dtype), s.kernel_h,
                  s.width == 0                         ? ""
                  : s.kernel == Kernel::kGradientsNchw ? "_wide"
                                                       : "_exact",
                  tile_table(s.kernel, s.dtype)[s.tile].name);
    return name;
  }
  if (is_columns(s.kernel)) {
    std::snprintf(name, sizeof(name), "%s_%s_k%dx%d_h%dx%d", kernel_name(s.kernel), dtype_name(s.dtype), s.kernel_h,
                  s.kernel_w, s.height, s.width);
    return name;
  }
  if (is_strips(s.kernel)) {
    std::snprintf(name, sizeof(name), "%s_%s_kh%d_%s", kernel_name(s.kernel), dtype_name(s.dtype), s.kernel_h,
                  tile_table(s.kernel, s.dtype)[s.tile].name);
    return name;
  }
  std::snprintf(name, sizeof(name), "%s_%s_k%dx%d_s%dx%d_d%dx%d_p%s%d", kernel_name(s.kernel), dtype_name(s.dtype),
                s.kernel_h, s.kernel_w, s.stride_h, s.stride_w, s.dilation_h, s.dilation_w, s.padding_w < 0 ? "m" : "",
                s.padding_w < 0 ? -s.padding_w : s.padding_w);
  std::string full = name;
  if (is_grad_input_kernel(s.kernel)) full += (s.padding_h < 0 ? "xm" : "x") + std::to_string(std::abs(s.padding_h));
  if (s.kernel == Kernel::kDirectNchw) full += "_w" + std::to_string(s.width) + "x" + std::to_string(s.out_width);
  if (s.kernel == Kernel::kWarpsNchw)
    full += "_w" + (s.width > 0 ? std::to_string(s.width) + "x" : "") + std::to_string(s.out_width);
  if (s.kernel == Kernel::kToeplitzGradWeight) full += "_w" + std::to_string(s.width);
  if (is_compiled_by_tile(s.kernel)) full += std::string("_") + tile_table(s.kernel, s.dtype)[s.tile].name;
  return full;
}

inline std::string specialisation_name(const Specialisation& s) {
  return name_beside_weights(s) + (s.float_weight ? "_float_weight" : "");
}

// The CUDA source that compiles `s`: one exported function that serves every tile of its table, or its own tile.
inline std::string specialisation_source(const Specialisation& s) {
  constexpr const char* kTypes[] = {"float", "depthwise::float16", "depthwise::bfloat16", "double"};
  const std::string kernel = is_images(s.kernel)               ? "images"
                             : is_images_grad_weight(s.kernel) ? "images_grad_weight"
                                                               : kernel_name(s.kernel);
  char arguments[128];
  std::snprintf(arguments, sizeof(arguments), "%s, %d, %d, %d, %d, %d, %d", kTypes[static_cast<int>(s.dtype)],
                s.kernel_h, s.kernel_w, s.stride_h, s.stride_w, s.dilation_h, s.dilation_w);
  std::string traits = std::string("NhwcTraits<") + arguments;
  if (is_direct_nchw(s.kernel)) traits = std::string("NchwTraits<") + arguments + ", " + std::to_string(s.padding_w);
  if (s.kernel == Kernel::kDirectNchw)
    traits = "Direct" + traits + ", " + std::to_string(s.width) + ", " + std::to_string(s.out_width);
  if (s.kernel == Kernel::kWarpsNchw) {
    std::snprintf(arguments, sizeof(arguments), "%s, %d, %d, %d, %d, %d, %d", kTypes[static_cast<int>(s.dtype)],
                  s.kernel_h, s.kernel_w, s.padding_w, s.out_width, kWarpsNchwTiles[s.tile].vector, s.width);
    traits = std::string("WarpsNchwTraits<") + arguments;
  }
  if (is_grad_input_kernel(s.kernel))
    traits = "GradInput" + std::string(s.kernel == Kernel::kGradInputNchw ? "NchwTraits<" : "NhwcTraits<") + arguments +
             ", " + std::to_string(s.padding_w) + ", " + std::to_string(s.padding_h);
  if (s.kernel == Kernel::kToeplitzGradWeight) {
    const Tile& tile = tile_table(s.kernel, s.dtype)[s.tile];
    std::snprintf(arguments, sizeof(arguments), "%s, %d, %d, %d, %s", kTypes[static_cast<int>(s.dtype)],
                  s.kernel_h / 16, s.kernel_w / 16, s.width / 8, tile.vector > 1 ? "true" : "false");
    traits = std::string("ToeplitzGradWeightTraits<") + arguments;
  }
  if (is_images_grad_weight(s.kernel)) {
    std::snprintf(arguments, sizeof(arguments), "%s, %d, %d, %s, %d, %d, %d", kTypes[static_cast<int>(s.dtype)],
                  tile_table(s.kernel, s.dtype)[s.tile].columns, s.kernel_h,
                  s.kernel == Kernel::kImagesGradWeightNhwc ? "true" : "false", s.width, s.out_width, -s.padding_h);
    traits = std::string("ImagesGradWeightTraits<") + arguments;
  }
  if (s.kernel == Kernel::kImageRowsGradWeight) {
    std::snprintf(arguments, sizeof(arguments), "%s, %d", kTypes[static_cast<int>(s.dtype)], s.kernel_h);
    traits = std::string("ImageRowsGradWeightTraits<") + arguments;
  }
  if (s.kernel == Kernel::kStripsGradWeightNchw) {
    std::snprintf(arguments, sizeof(arguments), "%s, %d", kTypes[static_cast<int>(s.dtype)], s.kernel_h);
    traits = std::string("StripsGradWeightNchwTraits<") + arguments;
  }
  if (s.kernel == Kernel::kStripsGradWeightNhwc) {
    std::snprintf(arguments, sizeof(arguments), "%s, %d", kTypes[static_cast<int>(s.dtype)], s.kernel_h);
    traits = std::string("StripsGradWeightNhwcTraits<") + arguments;
  }
  if (s.kernel == Kernel::kBlockedGradWeight) {
    std::snprintf(arguments, sizeof(arguments), "%s, %d, %d", kTypes[static_cast<int>(s.dtype)], s.kernel_h,
                  s.kernel_w);
    traits = std::string("BlockedGradWeightTraits<") + arguments;
  }
  if (s.kernel == Kernel::kGradWeightStreamNhwc)
    traits = std::string("GradWeightStreamTraits<") + arguments + ", " +
             std::to_string(tile_table(s.kernel, s.dtype)[s.tile].vector);
  if (s.kernel == Kernel::kGradWeightRowsNhwc)
    traits = std::string("GradWeightRowsTraits<") + arguments + ", " +
             std::to_string(tile_table(s.kernel, s.dtype)[s.tile].rows);
  if (s.kernel == Kernel::kGradWeightPlanesNchw) {
    const Tile& tile = tile_table(s.kernel, s.dtype)[s.tile];
    traits = std::string("GradWeightPlanesTraits<") + arguments + ", " + std::to_string(tile.columns) + ", " +
             std::to_string(tile.vector) + ", " + std::to_string(tile.grad_vector) + ", " + std::to_string(s.padding_w);
  }
  if (is_marching_grad_weight(s.kernel)) {
    const Tile& tile = tile_table(s.kernel, s.dtype)[s.tile];
    traits = "GradWeight" + std::string(s.kernel == Kernel::kGradWeightNchw ? "NchwTraits<" : "NhwcTraits<") +
             arguments + ", " + std::to_string(tile.columns) + ", " + std::to_string(tile.vector);
    if (s.kernel == Kernel::kGradWeightNchw)
      traits += ", " + std::to_string(tile.grad_vector) + ", " + std::to_string(s.padding_w) +
                (tile.staged ? ", true" : ", false");
    traits += tile.queued ? ", true" : ", false";
  }
  if (s.kernel == Kernel::kToeplitz) {
    std::snprintf(arguments, sizeof(arguments), "%s, %d, %d, %d, %d, %d, %d, %d, %s, %s, %d, %s, %s",
                  kTypes[static_cast<int>(s.dtype)], s.band.chunks, s.stride_w, s.band.origin, s.band.image_chunks,
                  s.band.tiles_w, s.band.tiles_h, s.band.slots, s.band.shared ? "true" : "false",
                  s.band.tall ? "true" : "false", s.band.apart, s.band.turned ? "true" : "false",
                  s.band.since_sm80 ? "true" : "false");
    traits = std::string("ToeplitzTraits<") + arguments;
  }
  if (s.kernel == Kernel::kBandImages) {
    std::snprintf(arguments, sizeof(arguments), "%s, %d, %d, %d, %d, %d, %s", kTypes[static_cast<int>(s.dtype)],
                  s.band.chunks, s.band.origin, s.band.image_chunks, s.band.tiles_w,
                  tile_table(s.kernel, s.dtype)[s.tile].rows, s.band.apart > 1 ? "true" : "false");
    traits = std::string("BandImagesTraits<") + arguments;
  }
  if (is_images(s.kernel)) {
    const ImageShape& i = s.image;
    std::snprintf(arguments, sizeof(arguments), "%s, %d, %d, %d, %d, %d, %d, %d, %d, %s",
                  kTypes[static_cast<int>(s.dtype)], i.h, i.w, i.out_h, i.out_w, i.first_shift, i.shifts, i.shift_step,
                  tile_table(s.kernel, s.dtype)[s.tile].vector, s.kernel == Kernel::kImagesNhwc ? "true" : "false");
    traits = std::string("ImagesTraits<") + arguments;
  }
  if (s.kernel == Kernel::kImageBandsNhwc) {
    const ImageShape& i = s.image;
    std::snprintf(arguments, sizeof(arguments), "%s, %d, %d, %d, %d, %d, %d, %d", kTypes[static_cast<int>(s.dtype)],
                  i.h, i.w, i.out_h, i.out_w, i.first_shift, i.shifts, i.shift_step);
    traits = std::string("ImageBandsTraits<") + arguments;
  }
  if (is_images_fma(s.kernel)) {
    char sizes[64];
    std::snprintf(sizes, sizeof(sizes), "%d, %d, %d, %s", s.kernel_h, s.padding_h, s.height,
                  s.channels_last ? "true" : "false");
    std::snprintf(arguments, sizeof(arguments), "%d, %d, %d, ", s.kernel_w, s.padding_w, s.width);
    if (s.kernel == Kernel::kImagesFma) {
      const int out_height = s.height + 2 * s.padding_h - s.kernel_h + 1;
      const int rows = tile_table(s.kernel, s.dtype)[s.tile].rows;
      const bool whole = s.height > 0 && out_height < rows;
      traits = std::string("ImagesFmaTraits<") + arguments + std::to_string(whole ? out_height : rows) + ", " + sizes;
    } else {
      traits = std::string("ImagesFmaGradWeightTraits<") + arguments + sizes;
    }
  }
  if (s.kernel == Kernel::kBlocked) {
    std::snprintf(arguments, sizeof(arguments), "%s, %d, %d, %d, %d, %d, %s, %s, %d, %d, %d",
                  kTypes[static_cast<int>(s.dtype)], s.kernel_w, s.stride_h, s.stride_w, s.dilation_h, s.dilation_w,
                  s.channels_last ? "true" : "false", s.sums_parts ? "true" : "false", kBlockedTiles[s.tile].columns,
                  kBlockedTiles[s.tile].rows, kBlockedTiles[s.tile].vector);
    traits = std::string("BlockedTraits<") + arguments;
  }
  if (is_columns(s.kernel)) {
    std::snprintf(arguments, sizeof(arguments), "%s, %d, %d, %d, %d", kTypes[static_cast<int>(s.dtype)], s.kernel_h,
                  s.kernel_w, s.height, s.width);
    traits = std::string(s.kernel == Kernel::kColumnsNhwc ? "ColumnsNhwcTraits<" : "ColumnsTraits<") + arguments;
  }
  if (is_strips(s.kernel)) {
    std::snprintf(arguments, sizeof(arguments), "%s, %d, %d, %s", kTypes[static_cast<int>(s.dtype)], s.kernel_h,
                  tile_table(s.kernel, s.dtype)[s.tile].rows, s.kernel == Kernel::kStripsNhwc ? "true" : "false");
    traits = std::string("StripsTraits<") + arguments;
  }
  if (is_gradients_kernel(s.kernel)) {
    const std::string type = kTypes[static_cast<int>(s.dtype)], size = ", " + std::to_string(s.kernel_h);
    const std::string flag = s.width != 0 ? ", true" : ", false";
    traits = s.kernel == Kernel::kGradientsNchw ? "GradientsNchwTraits<" + type + flag
             : s.kernel == Kernel::kGradientsPlanesNchw
                 ? "GradientsPlanesTraits<" + type + size + flag
                 : "GradientsNhwcTraits<" + type + size + ", " + std::to_string(kGradientsNhwcTiles[s.tile].vector);
  }
  traits = "depthwise::" + traits + ">";
  if (s.float_weight) traits = "depthwise::WithFloatWeight<" + traits + ">";
  const Tile& tile = tile_table(s.kernel, s.dtype)[s.tile];
  if (is_direct_nchw(s.kernel)) traits += ", " + std::to_string(tile.columns);
  if (s.kernel == Kernel::kDirectNchw) traits += ", " + std::to_string(tile.rows);
  if (is_direct_nchw(s.kernel)) traits += ", " + std::to_string(tile.vector);
  if (s.kernel == Kernel::kDirectNhwc) traits += ", " + std::to_string(tile.columns) + ", " + std::to_string(tile.rows);
  if (s.kernel == Kernel::kDirectNhwc || s.kernel == Kernel::kStreamNhwc) traits += ", " + std::to_string(tile.vector);
  const std::string args = is_grad_weight_kernel(s.kernel) ? "depthwise::GradWeightArgs"
                           : is_gradients_kernel(s.kernel) ? "depthwise::GradientsArgs"
                                                           : "depthwise::DirectArgs";
  return "#include \"" + kernel + ".cuh\"\n" +
         "extern \"C\" int depthwise_inline_launch(const void* args, int tile, void* stream) {\n" +
         "  return depthwise::launch_" + kernel + "<" + traits + ">(*static_cast<const " + args +
         "*>(args), tile, static_cast<cudaStream_t>(stream));\n}\n";
}

// "specialisation/tile", or "general".
inline std::string variant_name(const Problem& p, const Config& config) {
  if (config.kernel == Kernel::kGeneral) return "general";
  return specialisation_name(specialisation_of(p, config)) + "/" + tile_table(config.kernel, p.dtype)[config.tile].name;
}

}  // namespace depthwise
