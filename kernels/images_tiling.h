// How the kernels that take several small images at once on the tensor cores lay them out, and what they hold: images,
// image_bands_nhwc, images_grad_weight, image_rows_grad_weight. For what can serve, for launches and for the kernels.
#pragma once

#include "problem.h"

namespace depthwise {

// images: a product holds eight images.
constexpr int kImagesTogether = 8;
constexpr int kMaxImageSize = 16;
// Elements from plane to plane, and from image to image, of a block's shared memory. channels_last: words so that the
// planes of a channel and of the eighth one on are half the banks apart.
constexpr int plane_pitch(int pixels, bool channels_last) {
  return channels_last ? ((pixels + 1) / 2 + 1) / 4 * 8 + 4 : pixels;
}
// Images are an odd number of four words apart. NCHW: of granules, of which the first may hold one element alone.
constexpr int planes_pitch(int channels, int pixels, bool channels_last) {
  return channels_last ? channels * plane_pitch(pixels, true) / 16 * 16 + 8
                       : ((channels * pixels + 2 * kGranule - 2) / kGranule | 1) * kGranule;
}
constexpr bool is_narrow_image(int width, int out_width) { return width <= 8 && out_width <= 8; }
// In how many rounds the rows of outputs are computed, each with its sums in registers: more where that makes room for
// another block and the few bands cost little to shuffle again.
constexpr int image_rounds(int width, int out_height, int out_width, int shifts) {
  if (is_narrow_image(width, out_width) || out_height <= 8) return 1;
  return shifts <= 5 ? 3 : shifts <= 9 ? 2 : 1;
}
constexpr int image_round_rows(int width, int out_height, int out_width, int shifts) {
  const int rounds = image_rounds(width, out_height, out_width, shifts);
  return (out_height + rounds - 1) / rounds;
}
// Registers of a thread: rows of input, sums, taps, and the rest, which nvcc's reports tell and which is more where columns
// are loaded one by one.
constexpr int image_registers(int height, int width, int out_height, int out_width, int shifts) {
  const int round_rows = image_round_rows(width, out_height, out_width, shifts);
  if (is_narrow_image(width, out_width)) return height + 2 * round_rows + shifts / 2 + shifts + 24;
  constexpr int kRest[] = {28, 40, 35};
  return 2 * height + 4 * round_rows + shifts / 2 + (width % 2 == 0 ? 0 : 16) +
         kRest[image_rounds(width, out_height, out_width, shifts) - 1];
}

// image_bands_nhwc: bands of an image, channels of a block, rows of input that a band meets; registers of a thread, likewise.
constexpr int kImageBands = 2, kImageBandsChannels = 16;
constexpr int image_bands_rows(int out_height, int shifts, int shift_step) {
  return divide_up(out_height, kImageBands) + (shifts - 1) * shift_step;
}
constexpr int image_bands_registers(int out_height, int shifts, int shift_step) {
  return 4 * divide_up(image_bands_rows(out_height, shifts, shift_step), 2) + 4 * divide_up(out_height, kImageBands) +
         28;
}

// images_grad_weight: channels of a block, at most; images of a stage; into how many segments the `live` kernel rows
// that meet the image are cut, where images have more than eight columns; elements from image to image in shared memory,
// an odd number of 16-byte words.
constexpr int images_channels(bool channels_last, int columns) { return channels_last ? 8 : columns == 8 ? 2 : 1; }
constexpr int images_stage(bool channels_last, int columns, int live) {
  return columns == 8 || (columns == 16 && !channels_last && live <= 16) ? 32 : 16;
}
constexpr int images_cuts(bool channels_last, int columns, int live) {
  if (columns == 32) return (live + 1) / 2;
  return channels_last ? (live <= 14 ? 2 : 4) : live <= 16 ? 2 : 8;
}
constexpr int images_pitch(int rows, int columns) { return (rows * columns / 8 | 1) * 8; }

// image_rows_grad_weight: rows and columns of its images, rows of its kernels, channels of a block.
constexpr int kImageRowsSize = 16, kMaxImageRowsKernel = 7, kImageRowsChannels = 16;

}  // namespace depthwise
