// The plain structs every room shares: what is asked (Problem), how it is cut (Tile).
// No CUDA and no torch in this header.
#pragma once

#include <cstdint>

namespace depthwise {

enum class Direction : int { kForward, kGradInput, kGradWeight };
enum class DType : int { kFloat32, kFloat16, kBFloat16, kFloat64 };
enum class Layout : int { kNchw, kNhwc };

// A depthwise convolution. `h`, `w` are the input image's sizes in every direction, `out_h`, `out_w` the output's.
// Output channel oc reads input channel oc / multiplier.
struct Problem {
  Direction direction;
  DType dtype;
  Layout layout;
  int64_t n, c, multiplier, out_c, h, w, out_h, out_w;  // out_c = c * multiplier
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  bool aligned;  // every tensor starts on a 16-byte boundary

};

// What one thread computes, and how it reads. NCHW: `columns` x `rows` outputs of one plane, `vector` elements a load.
// channels_last: `vector` channels of `columns` x `rows` pixels.
struct Tile {
  const char* name;
  int columns;
  int rows;
  int vector;
};

// A direct convolution with its direction taken out: the grad of input at stride 1 is the forward pass over
// grad_output with the filter flipped and padding dilation * (kernel - 1) - padding.
struct DirectArgs {
  const void* input;
  const void* weight;
  const void* bias;
  void* out;
  int64_t n, out_c;
  int multiplier, h, w, out_h, out_w, padding_h, padding_w;
  bool flip;
};

// Entry point of a compiled specialisation: serves every tile of its table.
using Launcher = int (*)(const DirectArgs*, int tile_index, void* stream);

}  // namespace depthwise
