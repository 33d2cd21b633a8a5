// The plain structs that checks, selection, launches and kernels share: what is asked (Problem), how it is cut (Tile), what
// a kernel is given (DirectArgs, GradWeightArgs); and functions of sizes that several of them need. No CUDA and no torch in
// this header.
#pragma once

#include <cstdint>
#include <utility>

namespace depthwise {

enum class Direction : int { kForward, kGradInput, kGradWeight, kGradients };  // the last: both at once
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
  bool aligned;               // every tensor starts on a 16-byte boundary
  bool float_weight = false;  // weight, bias and their gradients are float32 beside 16-bit tensors
};

// What one thread computes, and how it reads. NCHW: `columns` x `rows` outputs of one plane, `vector` elements a load.
// channels_last: `vector` channels of `columns` x `rows` pixels. Grad of weight: a strip of `columns` positions of
// grad_output (channels_last: of `vector` channels), however many rows.
struct Tile {
  const char* name;
  int columns;
  int rows;
  int vector;
  int grad_vector = 0;  // grad of weight, NCHW: elements a load of grad_output
  bool staged = false;  // grad of weight, NCHW: whole planes through shared memory
  bool queued = false;  // grad of weight: the rows to come in shared memory
};

constexpr int64_t kInt32Max = 0x7fffffff;
// An H100's multiprocessors, for which kernels are selected and grads of weight are cut, and shared memory of each.
constexpr int kMultiprocessors = 132, kMultiprocessorSharedBytes = 228 << 10;
constexpr int kGranule = 8;  // elements of 16 bits in 16 bytes

inline int element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

constexpr int min_int(int a, int b) { return a < b ? a : b; }
constexpr int max_int(int a, int b) { return a > b ? a : b; }
constexpr int64_t min_int64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_int64(int64_t a, int64_t b) { return a > b ? a : b; }

template <class A, class B>
constexpr auto divide_up(A a, B b) {
  return (a + b - 1) / b;
}
constexpr int floor_divide(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

constexpr int modulo(int64_t a, int b) { return static_cast<int>((a % b + b) % b); }

// A direct convolution with its direction taken out: the grad of input at stride 1 is a forward convolution of
// grad_output with the filter flipped and padding dilation * (kernel - 1) - padding.
struct DirectArgs {
  const void* input;
  const void* weight;
  const void* bias;
  void* out;
  int64_t n, out_c;
  int multiplier, h, w, out_h, out_w, padding_h, padding_w;
  int kernel_h, kernel_w, stride_h, dilation_h, dilation_w;  // for kernels that are not compiled for theirs
  bool flip;
  bool evict_first;  // a CachePolicy
};

// The sizes of a problem; the rest is left to the launch.
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

// Rows taken for columns, and columns for rows.
inline Problem turned(Problem p) {
  std::swap(p.h, p.w), std::swap(p.out_h, p.out_w), std::swap(p.kernel_h, p.kernel_w);
  std::swap(p.stride_h, p.stride_w), std::swap(p.padding_h, p.padding_w), std::swap(p.dilation_h, p.dilation_w);
  return p;
}
// The same; at stride 1.
inline DirectArgs turned(DirectArgs args) {
  std::swap(args.h, args.w), std::swap(args.out_h, args.out_w), std::swap(args.kernel_h, args.kernel_w);
  std::swap(args.padding_h, args.padding_w), std::swap(args.dilation_h, args.dilation_w);
  return args;
}

// direct_nchw. Rows of `width` elements begin at the same place within a word every so many rows; a power of two.
constexpr int row_period(int width, int word) {
  int period = 1;
  while (period * (width % word) % word != 0) period *= 2;
  return period;
}
constexpr int max_skew(int rows, int columns, int width) {
  int most = 0;
  for (int row = 0; row < rows; ++row) most = row * width % columns > most ? row * width % columns : most;
  return most;
}

// The widest store of elements from `begin` on of a vector on its boundary.
constexpr int widest_store(int begin, int end, int columns) {
  int width = columns;
  while (begin % width != 0 || begin + width > end) width /= 2;
  return width;
}

// By how many rows the tiles of a plane begin before it, so that the rows at which tiles begin, counted through all
// planes of `height` rows, are multiples of `period`.
struct SkewRows {
  unsigned height;
  int period;

  constexpr int before(unsigned plane) const { return static_cast<int>(plane * height & (period - 1)); }
};

// Outputs are what is aligned; where their rows are anyhow, it is the input.
constexpr SkewRows skew_rows_of(const DirectArgs& args, int stride_h, int columns, int vector) {
  const int out_period = row_period(args.out_w, columns), in_period = row_period(args.w, vector);
  if (vector > 1 && out_period > 1) return {static_cast<unsigned>(args.out_h), out_period};
  if (vector > 1 && in_period > 1 && stride_h == 1) return {static_cast<unsigned>(args.h), in_period};
  return {0, 1};
}

// warps_nchw. Outputs a lane; of a row, the most that a warp holds: where rows are skewed, the words of the last lane move
// to the next one.
constexpr int kWarpsColumns = 8;
constexpr int warps_columns(int out_width) {
  return 32 * kWarpsColumns - max_skew(kWarpsColumns, kWarpsColumns, out_width % kWarpsColumns);
}
// Rows of a stage: a multiple of how often vectors begin anew; stages of the ring: 16 rows, or two stages.
constexpr int warps_stage_rows(int kernel_h) { return (kernel_h + 3) / 4 * 4; }
constexpr int warps_depth(int kernel_h) { return warps_stage_rows(kernel_h) <= 4 ? 4 : 2; }
// Elements of a row in shared memory, whose windows begin `shift` elements right of a vector. For copies of 16 bytes
// its lines lie as those of global memory do; what that saves of the reads from L2 was not measured. There may be zeros on
// its left, which are the right ones of the row before.
constexpr int kWarpsLine = 64;
constexpr int warps_pitch(int vector, int shift, int kernel_w) {
  const int columns = 31 * kWarpsColumns + (shift + 2 * kWarpsColumns + kernel_w - 2) / kWarpsColumns * kWarpsColumns;
  return vector < 8 ? columns : 32 * kWarpsColumns + kWarpsLine;
}

// Grad of weight and bias. A kernel writes its sums split by split, [split][out_channel][tap], and another adds the
// splits in order. With one split, the kernels write the results themselves.
struct GradWeightArgs {
  const void* grad_output;
  const void* input;
  float* partial;
  float* partial_bias;  // [split][out_channel]; null: not asked for
  void* grad_weight;    // null: write `partial`
  void* grad_bias;      // where grad_weight is not null: null if not asked for
  int64_t n, out_c;
  int multiplier, h, w, out_h, out_w, padding_h, padding_w, splits;
  int rows;                // of grad_output that a thread of a marching kernel takes
  int kernel_h, kernel_w;  // for kernels that are not compiled for theirs
  bool evict_first;        // a CachePolicy
  bool float_weight;       // grad_weight and grad_bias are float32, whatever the other tensors are
};

// Both gradients at once: what the grad of weight is given, and this.
struct GradientsArgs : GradWeightArgs {
  const void* weight;
  void* grad_input;
  int64_t most_splits;  // for which the workspace has room
};

// The sizes of a problem; the rest is left to the launch.
inline GradWeightArgs grad_weight_args(const Problem& p) {
  GradWeightArgs args{};
  args.n = p.n;
  args.out_c = p.out_c;
  args.multiplier = static_cast<int>(p.multiplier);
  args.h = static_cast<int>(p.h);
  args.w = static_cast<int>(p.w);
  args.out_h = static_cast<int>(p.out_h);
  args.out_w = static_cast<int>(p.out_w);
  args.padding_h = static_cast<int>(p.padding_h);
  args.padding_w = static_cast<int>(p.padding_w);
  args.kernel_h = static_cast<int>(p.kernel_h);
  args.kernel_w = static_cast<int>(p.kernel_w);
  args.float_weight = p.float_weight;
  return args;
}

// blocked: rows of outputs a thread. More share a window of many columns (32x256x28x28, 29x29, H200: 0.339 ms with six,
// 0.364 with four; 32x512x14x14, 27x27: 0.146 and 0.129), as long as registers hold both.
constexpr int blocked_rows(const Tile& tile, int kernel_w, int window) {
  return tile.rows == 4 && tile.columns == 7 && kernel_w >= 29 && window <= 44 ? 6 : tile.rows;
}
// Threads of a block, at most, for each channel.
constexpr int blocked_threads(const Tile& tile, int channels) {
  const int threads = tile.columns > 7 ? 128 / channels : 256 / channels;
  return threads < 32 ? 32 : threads;
}

// Which of a window's rows or columns meet a tap of one of `outputs` outputs, as a bit mask. With a dilation most do
// not.
constexpr uint64_t window_mask(int outputs, int stride, int kernel, int dilation) {
  uint64_t mask = 0;
  for (int o = 0; o < outputs; ++o)
    for (int tap = 0; tap < kernel; ++tap) mask |= uint64_t{1} << (o * stride + tap * dilation);
  return mask;
}

constexpr int window_size(int outputs, int stride, int kernel, int dilation) {
  return (outputs - 1) * stride + (kernel - 1) * dilation + 1;
}

// direct_nhwc holds its whole window: 4x4 outputs of a 3x3 kernel read 6x6 pixels, 144 registers in fp32; of one channel,
// 4x4 outputs of a 5x5 kernel 8x8.
constexpr int kMaxWindowPixels = 36, kMaxWindowPixelsOfOne = 64;

// How many pixels `outputs` x `outputs` outputs read.
constexpr int window_pixels(int outputs, int kernel_h, int kernel_w, int stride_h, int stride_w, int dilation_h,
                            int dilation_w) {
  int rows = 0, columns = 0;
  for (uint64_t mask = window_mask(outputs, stride_h, kernel_h, dilation_h); mask != 0; mask >>= 1) rows += mask & 1;
  for (uint64_t mask = window_mask(outputs, stride_w, kernel_w, dilation_w); mask != 0; mask >>= 1) columns += mask & 1;
  return rows * columns;
}

constexpr int count_bits(uint64_t mask) {
  int bits = 0;
  for (; mask != 0; mask >>= 1) bits += mask & 1;
  return bits;
}

// Registers of a thread of a marching grad-of-weight kernel: the sums, the live rows of grad_output and a step's window
// of input; and what a step's loads take while they are under way.
struct MarchRegisters {
  int kept, step;
};

// `load`: elements a load, of which 16-bit ones share registers.
constexpr MarchRegisters march_registers(int kernel_h, int kernel_w, int stride_h, int stride_w, int dilation_w,
                                         int columns, int channels, int load, int element_bytes) {
  const int window = stride_h * count_bits(window_mask(columns, stride_w, kernel_w, dilation_w));
  const int live_rows = (kernel_h + stride_h - 1) / stride_h;
  return {(kernel_h * kernel_w + live_rows * columns + window) * channels,
          (window + columns) * channels * (load == 1 ? 4 : element_bytes) / 4};
}

// grad_weight_nhwc: blocks of a multiprocessor that queue their rows in shared memory, which leaves a step's registers at
// once; addresses and the like take up to 40.
constexpr int kGradWeightThreads = 128;  // a block, at most
constexpr int queued_blocks(const MarchRegisters& registers) {
  return (64 << 10) / (kGradWeightThreads * (registers.kept + registers.step + 40));
}

// Shared memory that every architecture grants a block (sm_75: 64 KB); the smallest tile of a kernel fits it.
constexpr int kSharedBytesEverywhere = 60 << 10;

// Output rows that one input row may meet, and those that a stage of the rolling kernels begins (see RollingShape).
constexpr int rolling_live_rows(int kernel_h, int stride_h, int dilation_h) {
  return ((kernel_h - 1) * dilation_h + stride_h) / stride_h;
}
constexpr int rolling_stage_outputs(int live_rows) { return live_rows < 2 ? 2 : live_rows; }

// stream_nchw: the fewest stages of at least `least` in a ring that ends on a 16-byte boundary.
constexpr int64_t stream_depth(int64_t least, int64_t stage_elements, int64_t granule) {
  while (least * stage_elements % granule != 0) ++least;
  return least;
}

// tiled_nhwc: room for the taps of a lane in shared memory, in vectors of 16 bytes; an odd number.
constexpr int tiled_nhwc_lane_taps(int taps) { return taps | 1; }

// stream_nhwc: registers of a thread of one channel, for its filter, the sums of the live rows and one row of the window.
constexpr int stream_nhwc_registers(int kernel_h, int kernel_w, int stride_h, int stride_w, int dilation_h,
                                    int dilation_w) {
  return kernel_h * kernel_w + 4 * rolling_live_rows(kernel_h, stride_h, dilation_h) +
         window_size(4, stride_w, kernel_w, dilation_w);
}
constexpr int kMaxStreamNhwcRegisters = 108;        // 7x3 of two channels, 110: spills
constexpr int kMaxStreamNhwcRegistersOfEight = 90;  // 3x7 of two channels; filters and sums alone

// stream_nhwc: channels a thread, as many as leave room for their filters.
constexpr int stream_nhwc_vector(int kernel_h, int kernel_w, int stride_h, int stride_w, int dilation_h,
                                 int dilation_w) {
  if (kernel_h * kernel_w <= 9) return 4;
  const int registers = stream_nhwc_registers(kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w);
  return 2 * registers <= kMaxStreamNhwcRegisters ? 2 : 1;
}

// stream_nhwc: columns of outputs a thread. Eight share more of a wide window, and of what is done once a stage, where
// registers hold the filters of two channels and their sums (1x11, 16x64x128x128, fp16, H100: 0.0292 ms, four columns
// 0.0309; 3x7, 32x128x128x256, H200: 0.158, 0.177; H100, whose memory is slower: 0.194 both).
constexpr int stream_nhwc_columns(int kernel_h, int kernel_w, int stride_h, int stride_w, int dilation_h,
                                  int dilation_w, int element_bytes) {
  const bool is_wide = element_bytes == 2 && kernel_w >= 7 && stride_w == 1 && dilation_w == 1 &&
                       stream_nhwc_vector(kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w) == 2;
  const int registers = kernel_h * kernel_w + 8 * rolling_live_rows(kernel_h, stride_h, dilation_h);
  return is_wide && 2 * registers <= kMaxStreamNhwcRegistersOfEight ? 8 : 4;
}

// stream_nhwc: whether pairs of threads exchange what they store: a block's part of a pixel is 16 bytes, which two threads
// hold. Its thread tiles are then cut in whole warps.
constexpr bool stream_nhwc_exchanges(int channels, int vector, int element_bytes) {
  return channels * element_bytes == 16 && channels == 2 * vector;
}
constexpr int stream_nhwc_least_tiles(int channels, int vector, int element_bytes) {
  return stream_nhwc_exchanges(channels, vector, element_bytes) ? 16 : 1;
}

// grad_weight_stream_nhwc: how its blocks are cut; see there. The parts that do not depend on the batch and the image.
constexpr int kGradWeightStreamColumns = 4;
constexpr int kGradWeightStreamThreads = 256;  // a block, at most
// Of all that a thread holds for its channels; of two channels, 5x5 in fp32 spills with 106 before sm_90.
constexpr int kMaxGradWeightStreamRegisters = 116, kMaxGradWeightStreamRegistersOfTwo = 105;

struct GradWeightStreamShape {
  int vector;              // channels a thread; 0: registers do not hold the sums of one
  int depth, stage_steps;  // rows of grad_output that an input row meets; that a stage brings
  int window;              // columns of input that a thread reads
  int kernel_w, stride_h, stride_w;
};

constexpr GradWeightStreamShape grad_weight_stream_shape(int kernel_h, int kernel_w, int stride_h, int stride_w) {
  GradWeightStreamShape shape{0, (kernel_h + stride_h - 1) / stride_h, 0, 0, kernel_w, stride_h, stride_w};
  shape.stage_steps = shape.depth < 2 ? 2 : shape.depth;
  shape.window = window_size(kGradWeightStreamColumns, stride_w, kernel_w, 1);
  if (shape.window < kGradWeightStreamColumns * stride_w) shape.window = kGradWeightStreamColumns * stride_w;
  const int registers = kernel_h * kernel_w + shape.depth * kGradWeightStreamColumns + shape.window;
  shape.vector = 4;
  if (shape.vector * registers > kMaxGradWeightStreamRegisters) shape.vector = 2;
  if (shape.vector == 2 && 2 * registers > kMaxGradWeightStreamRegistersOfTwo) shape.vector = 1;
  if (registers > kMaxGradWeightStreamRegisters) shape.vector = 0;
  return shape;
}

// Registers of a grad-of-input thread for strides above 1: a tile of `columns` x `rows` of `channels` channels reads this
// window of grad_output and the filter, both before it computes.
constexpr int kMaxGradInputRegisters = 128;
constexpr int grad_input_registers(int columns, int rows, int channels, int kernel_h, int kernel_w, int stride_h,
                                   int stride_w, int dilation_h, int dilation_w) {
  const int window_rows = (rows - 1 + (kernel_h - 1) * dilation_h) / stride_h + 1;
  const int window_columns = (columns - 1 + (kernel_w - 1) * dilation_w) / stride_w + 1;
  return (window_rows * window_columns + kernel_h * kernel_w) * channels;
}

// What a launcher answers where its kernel is not for the current device, and nothing was launched; else CUDA's answer.
constexpr int kTooLittleSharedMemory = -1, kBeforeSm80 = -2;
constexpr bool is_refusal(int answer) { return answer < 0; }

// Entry point of a compiled specialisation: serves every tile of its table. `args`: DirectArgs, GradWeightArgs or
// GradientsArgs, as its kernel takes.
using Launcher = int (*)(const void* args, int tile_index, void* stream);

}  // namespace depthwise
