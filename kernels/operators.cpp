// The operators: arguments checked, memory format decided, memory allocated, kernels launched. Stable ABI only: these
// headers compile in about two seconds, torch/extension.h in fifty.
//
// Every check that guards memory is here. depthwise_inline.py explains a refusal in nn.Conv2d's words.
#define USE_CUDA  // the CUDA part of the C shim
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "launch.h"
#include "specialise.h"

namespace depthwise {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string text(const char* words) { return words; }
std::string text(int64_t number) { return std::to_string(number); }

// STD_TORCH_CHECK, but for its string stream: a compiler that links libstdc++ statically gives this library a second
// copy of it beside PyTorch's, and streams crash in such a pair.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) throw std::runtime_error("depthwise_inline: " + (text(parts) + ...));
}

struct Geometry {
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

DType to_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: break;
  }
  throw std::runtime_error("depthwise_inline: expected a float32, float16, bfloat16 or float64 tensor");
}

void check_tensor(const Tensor& tensor, const char* name, int64_t dim, const Tensor& like, ScalarType dtype) {
  check(tensor.is_cuda(), "expected ", name, " on a CUDA device");
  check(tensor.layout() == torch::headeronly::Layout::Strided, "expected a dense ", name);
  check(tensor.dim() == dim, "expected ", name, " of ", dim, " dimensions, got ", tensor.dim());
  check(tensor.scalar_type() == dtype, name, " has another dtype");
  check(tensor.get_device_index() == like.get_device_index(), name, " is on another device");
}
void check_tensor(const Tensor& tensor, const char* name, int64_t dim, const Tensor& like) {
  check_tensor(tensor, name, dim, like, like.scalar_type());
}

// Which dtype weight and bias may have beside other tensors: theirs, or float32 beside 16 bits (weights.cuh).
ScalarType weight_dtype(const Tensor& weight, const Tensor& like) {
  const ScalarType dtype = like.scalar_type(), own = weight.scalar_type();
  return own == ScalarType::Float && dtype != ScalarType::Double ? own : dtype;
}

// at::Tensor::suggest_memory_format() == channels_last, for four dimensions: sizes of 1 are ambiguous and count as
// NCHW.
bool suggests_channels_last(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  if (strides[1] == 0) return false;
  int64_t least = 0;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < least) return false;
    if (d == 0 && least == strides[1]) return false;
    least = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  }
  return true;
}

// Whether F.conv2d with cuDNN would answer in channels_last; in float64 it never does.
bool wants_channels_last(const Tensor& input, const Tensor& weight) {
  return input.scalar_type() != ScalarType::Double && (suggests_channels_last(input) || suggests_channels_last(weight));
}

// Whether `tensor` lies in memory as the kernels read it; strides of dimensions of size 1 do not matter.
bool is_dense(const Tensor& tensor, Layout layout) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t expected = 1;
  for (const int d : layout == Layout::kNhwc ? std::array{1, 3, 2, 0} : std::array{3, 2, 1, 0}) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

Tensor to_dense(const Tensor& tensor, Layout layout) {
  if (tensor.numel() == 0 || is_dense(tensor, layout)) return tensor;
  return torch::stable::contiguous(tensor,
                                   layout == Layout::kNhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor to_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor empty_strided(std::vector<int64_t> sizes, std::vector<int64_t> strides, int32_t dtype, int32_t device) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

int32_t dtype_code(const Tensor& tensor) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

Tensor empty_image(Layout layout, int64_t n, int64_t c, int64_t h, int64_t w, const Tensor& like) {
  const auto atleast1 = [](int64_t size) { return size > 0 ? size : 1; };
  const std::vector<int64_t> strides =
      layout == Layout::kNhwc
          ? std::vector<int64_t>{h * w * c, 1, w * c, c}
          : std::vector<int64_t>{atleast1(c) * atleast1(h) * atleast1(w), atleast1(h) * atleast1(w), atleast1(w), 1};
  return empty_strided({n, c, h, w}, strides, dtype_code(like), like.get_device_index());
}

bool is_aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0; }

void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// Makes the tensor's device current for the launch; does nothing on the common path where it is.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device) {
    if (torch::stable::accelerator::getCurrentDeviceIndex() != device) guard_.emplace(device);
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

Problem make_problem(Direction direction, DType dtype, Layout layout, int64_t n, int64_t c, int64_t out_c, int64_t h,
                     int64_t w, int64_t kernel_h, int64_t kernel_w, const Geometry& g) {
  check(c > 0 && out_c > 0 && out_c % c == 0, "expected weight of (channels * multiplier, 1, ",
        "kernel_h, kernel_w), got ", out_c, " filters for ", c, " channels");
  check(kernel_h > 0 && kernel_w > 0, "kernel size must be greater than zero");
  check(g.stride_h > 0 && g.stride_w > 0, "stride must be greater than zero");
  check(g.dilation_h > 0 && g.dilation_w > 0, "dilation must be greater than zero");
  check(g.padding_h >= 0 && g.padding_w >= 0, "padding must not be negative");
  constexpr int64_t kLimit = int64_t{1} << 30;  // a padded image's side, and everything added to it, fits 32 bits
  for (const int64_t size : {h, w, kernel_h, kernel_w, g.stride_h, g.stride_w, g.padding_h, g.padding_w, g.dilation_h,
                             g.dilation_w, c, out_c})
    check(size >= 0 && size < kLimit, "size ", size, " is too large");
  const int64_t span_h = g.dilation_h * (kernel_h - 1) + 1, span_w = g.dilation_w * (kernel_w - 1) + 1;
  const int64_t room_h = h + 2 * g.padding_h - span_h, room_w = w + 2 * g.padding_w - span_w;
  check(h > 0 && w > 0 && room_h >= 0 && room_w >= 0 && h + 2 * g.padding_h < kLimit && w + 2 * g.padding_w < kLimit,
        "kernel size can't be greater than the padded input, and the output must not be empty");
  return {direction,
          dtype,
          layout,
          n,
          c,
          out_c / c,
          out_c,
          h,
          w,
          room_h / g.stride_h + 1,
          room_w / g.stride_w + 1,
          kernel_h,
          kernel_w,
          g.stride_h,
          g.stride_w,
          g.padding_h,
          g.padding_w,
          g.dilation_h,
          g.dilation_w,
          /*aligned=*/true};
}

void check_grad_output(const Problem& p, const Tensor& grad_output) {
  const auto sizes = grad_output.sizes();
  check(sizes[0] == p.n && sizes[1] == p.out_c && sizes[2] == p.out_h && sizes[3] == p.out_w,
        "expected grad_output of (", p.n, ", ", p.out_c, ", ", p.out_h, ", ", p.out_w, "), got (", sizes[0], ", ",
        sizes[1], ", ", sizes[2], ", ", sizes[3], ")");
}

Layout layout_of(bool channels_last) { return channels_last ? Layout::kNhwc : Layout::kNchw; }

Tensor run_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Geometry& geometry) {
  check_tensor(input, "input", 4, input);
  check_tensor(weight, "weight", 4, input, weight_dtype(weight, input));
  const auto in = input.sizes();
  const auto filter = weight.sizes();
  check(filter[1] == 1, "expected weight of one channel a filter, got ", filter[1]);
  if (bias) {
    check_tensor(*bias, "bias", 1, weight);
    check(bias->size(0) == filter[0], "expected bias of ", filter[0], " elements, got ", bias->size(0));
  }
  const Layout layout = layout_of(wants_channels_last(input, weight));
  Problem problem = make_problem(Direction::kForward, to_dtype(input), layout, in[0], in[1], filter[0], in[2], in[3],
                                 filter[2], filter[3], geometry);
  const int32_t device = input.get_device_index();
  const DeviceScope scope(device);
  Tensor out = empty_image(layout, problem.n, problem.out_c, problem.out_h, problem.out_w, input);
  if (problem.n == 0) return out;

  problem.float_weight = weight.scalar_type() != input.scalar_type();
  const bool copied = serves_in_nchw(problem);
  if (copied) problem.layout = Layout::kNchw;
  const Tensor x = to_dense(input, problem.layout), filters = to_contiguous(weight);
  const std::optional<Tensor> b = bias ? std::optional(to_contiguous(*bias)) : std::nullopt;
  Tensor result = copied ? empty_image(problem.layout, problem.n, problem.out_c, problem.out_h, problem.out_w, x) : out;
  problem.aligned = is_aligned(x) && is_aligned(filters) && is_aligned(result) && (!b || is_aligned(*b));
  launch_forward(problem, x.data_ptr(), filters.data_ptr(), b ? b->data_ptr() : nullptr, result.data_ptr(),
                 current_stream(device));
  if (copied) torch::stable::copy_(out, result);
  return out;
}

Tensor run_grad_input(const Tensor& grad_output, const Tensor& weight, int64_t h, int64_t w, const Geometry& geometry,
                      bool channels_last, int64_t multiplier) {
  check_tensor(grad_output, "grad_output", 4, grad_output);
  check_tensor(weight, "weight", 4, grad_output, weight_dtype(weight, grad_output));
  const auto grad = grad_output.sizes();
  const auto filter = weight.sizes();
  check(filter[1] == 1 && multiplier > 0 && filter[0] % multiplier == 0,
        "expected weight of (channels * multiplier, 1, kernel_h, kernel_w)");
  const Layout layout = layout_of(channels_last);
  Problem problem = make_problem(Direction::kGradInput, to_dtype(grad_output), layout, grad[0], filter[0] / multiplier,
                                 filter[0], h, w, filter[2], filter[3], geometry);
  check_grad_output(problem, grad_output);
  const int32_t device = grad_output.get_device_index();
  const DeviceScope scope(device);
  Tensor grad_input = empty_image(layout, problem.n, problem.c, h, w, grad_output);
  if (problem.n == 0) return grad_input;

  problem.float_weight = weight.scalar_type() != grad_output.scalar_type();
  const bool copied = serves_in_nchw(problem);
  if (copied) problem.layout = Layout::kNchw;
  const Tensor g = to_dense(grad_output, problem.layout), filters = to_contiguous(weight);
  Tensor result = copied ? empty_image(problem.layout, problem.n, problem.c, h, w, g) : grad_input;
  problem.aligned = is_aligned(g) && is_aligned(filters) && is_aligned(result);
  launch_grad_input(problem, g.data_ptr(), filters.data_ptr(), result.data_ptr(), current_stream(device));
  if (copied) torch::stable::copy_(grad_input, result);
  return grad_input;
}

// The gradients are of float32 where `float_weight` says that weight and bias are, else of the tensors' dtype.
std::tuple<Tensor, Tensor> run_grad_weight(const Tensor& grad_output, const Tensor& input, int64_t kernel_h,
                                           int64_t kernel_w, const Geometry& geometry, bool channels_last, bool bias,
                                           bool float_weight) {
  check_tensor(grad_output, "grad_output", 4, grad_output);
  check_tensor(input, "input", 4, grad_output);
  const auto in = input.sizes();
  const Layout layout = layout_of(channels_last);
  Problem problem = make_problem(Direction::kGradWeight, to_dtype(input), layout, in[0], in[1], grad_output.size(1),
                                 in[2], in[3], kernel_h, kernel_w, geometry);
  check_grad_output(problem, grad_output);
  const int32_t device = grad_output.get_device_index();
  const DeviceScope scope(device);
  problem.float_weight = float_weight;
  const int32_t dtype = float_weight ? aoti_torch_dtype_float32() : dtype_code(input);
  Tensor grad_weight = empty_strided({problem.out_c, 1, kernel_h, kernel_w},
                                     {kernel_h * kernel_w, kernel_h * kernel_w, kernel_w, 1}, dtype, device);
  Tensor grad_bias = bias ? empty_strided({problem.out_c}, {1}, dtype, device) : Tensor();

  const Tensor g = to_dense(grad_output, layout), x = to_dense(input, layout);
  problem.aligned = is_aligned(g) && is_aligned(x);
  Tensor workspace = empty_strided({grad_weight_workspace(problem)}, {1}, aoti_torch_dtype_uint8(), device);
  launch_grad_weight(problem, g.data_ptr(), x.data_ptr(), grad_weight.data_ptr(), bias ? grad_bias.data_ptr() : nullptr,
                     workspace.data_ptr(), current_stream(device));
  return {grad_weight, grad_bias};
}

// Both gradients from one read of grad_output; nothing where that is not to be, or cannot.
std::optional<std::tuple<Tensor, Tensor>> run_gradients(const Tensor& grad_output, const Tensor& input,
                                                        const Tensor& weight, const Geometry& geometry,
                                                        bool channels_last) {
  check_tensor(grad_output, "grad_output", 4, grad_output);
  check_tensor(input, "input", 4, grad_output);
  check_tensor(weight, "weight", 4, grad_output, weight_dtype(weight, grad_output));
  const auto in = input.sizes();
  const auto filter = weight.sizes();
  check(filter[1] == 1, "expected weight of one channel a filter, got ", filter[1]);
  const Layout layout = layout_of(channels_last);
  Problem problem = make_problem(Direction::kGradients, to_dtype(input), layout, in[0], in[1], filter[0], in[2], in[3],
                                 filter[2], filter[3], geometry);
  check_grad_output(problem, grad_output);
  problem.float_weight = weight.scalar_type() != input.scalar_type();
  if (!computes_gradients(problem)) return std::nullopt;
  const int32_t device = grad_output.get_device_index();
  const DeviceScope scope(device);
  const Tensor g = to_dense(grad_output, layout), x = to_dense(input, layout), filters = to_contiguous(weight);
  Tensor grad_input = empty_image(layout, problem.n, problem.c, problem.h, problem.w, grad_output);
  problem.aligned = is_aligned(g) && is_aligned(x) && is_aligned(grad_input);
  if (!problem.aligned && !computes_gradients(problem)) return std::nullopt;
  Tensor grad_weight =
      empty_strided({problem.out_c, 1, problem.kernel_h, problem.kernel_w},
                    {problem.kernel_h * problem.kernel_w, problem.kernel_h * problem.kernel_w, problem.kernel_w, 1},
                    dtype_code(weight), device);
  Tensor workspace = empty_strided({gradients_workspace(problem)}, {1}, aoti_torch_dtype_uint8(), device);
  if (!launch_gradients(problem, g.data_ptr(), x.data_ptr(), filters.data_ptr(), grad_input.data_ptr(),
                        grad_weight.data_ptr(), workspace.data_ptr(), current_stream(device)))
    return std::nullopt;
  return std::tuple(grad_input, grad_weight);
}

// Boxed by TORCH_BOX for torch.ops.depthwise_inline.

// Under autocast, weight and bias may be float32.
Tensor forward_no_autograd(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, int64_t stride_h,
                           int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                           int64_t dilation_w) {
  return run_forward(input, weight, bias, {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w});
}

Tensor forward(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, int64_t stride_h,
               int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w) {
  check_tensor(weight, "weight", 4, input);
  return forward_no_autograd(input, weight, bias, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w);
}

Tensor grad_input(const Tensor& grad_output, const Tensor& weight, int64_t height, int64_t width, int64_t stride_h,
                  int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
                  bool channels_last, int64_t multiplier) {
  check_tensor(weight, "weight", 4, grad_output);
  return run_grad_input(grad_output, weight, height, width,
                        {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w}, channels_last, multiplier);
}

std::tuple<Tensor, Tensor> grad_weight(const Tensor& grad_output, const Tensor& input, int64_t kernel_h,
                                       int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                                       int64_t padding_w, int64_t dilation_h, int64_t dilation_w, bool channels_last,
                                       bool bias) {
  auto grads = run_grad_weight(grad_output, input, kernel_h, kernel_w,
                               {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w}, channels_last, bias,
                               /*float_weight=*/false);
  if (!bias) std::get<1>(grads) = empty_strided({0}, {1}, dtype_code(input), input.get_device_index());
  return grads;
}

std::tuple<Tensor, Tensor> gradients(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                     int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                                     int64_t dilation_h, int64_t dilation_w, bool channels_last) {
  check_tensor(weight, "weight", 4, grad_output);
  const Geometry geometry{stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w};
  if (auto both = run_gradients(grad_output, input, weight, geometry, channels_last)) return *both;
  const Tensor grad_input = run_grad_input(grad_output, weight, input.size(2), input.size(3), geometry, channels_last,
                                           weight.size(0) / input.size(1));
  return {grad_input, std::get<0>(run_grad_weight(grad_output, input, weight.size(2), weight.size(3), geometry,
                                                  channels_last, /*bias=*/false, /*float_weight=*/false))};
}

// ATen's extension point for backends. PyTorch gives it autograd in C++ but no CUDA kernel; these are ours. Weight and
// bias may be float32 beside 16-bit tensors, and so are their gradients then.

using Ints = std::vector<int64_t>;

// Throws where the convolution is not depthwise and in two dimensions.
Geometry depthwise_geometry(const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding,
                            const Ints& dilation, bool transposed, int64_t groups) {
  check(!transposed && input.dim() == 4 && weight.dim() == 4 && groups == input.size(1),
        "convolution_overrideable and its backward serve depthwise 2d convolutions alone");
  check(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
        "expected stride, padding and dilation as pairs");
  return {stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
}

Tensor convolution(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, const Ints& stride,
                   const Ints& padding, const Ints& dilation, bool transposed, const Ints&, int64_t groups) {
  return run_forward(input, weight, bias,
                     depthwise_geometry(input, weight, stride, padding, dilation, transposed, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad_output, const Tensor& input,
                                                        const Tensor& weight, const Ints& stride, const Ints& padding,
                                                        const Ints& dilation, bool transposed, const Ints&,
                                                        int64_t groups, const std::vector<bool>& output_mask) {
  const Geometry geometry = depthwise_geometry(input, weight, stride, padding, dilation, transposed, groups);
  const bool channels_last = wants_channels_last(input, weight);
  Tensor grad_input, grad_weight, grad_bias;  // undefined where not asked for
  if (output_mask[0] && output_mask[1] && !output_mask[2])
    if (const auto both = run_gradients(grad_output, input, weight, geometry, channels_last))
      return {std::get<0>(*both), std::get<1>(*both), grad_bias};
  if (output_mask[0])
    grad_input = run_grad_input(grad_output, weight, input.size(2), input.size(3), geometry, channels_last,
                                weight.size(0) / input.size(1));
  if (output_mask[1]) {
    std::tie(grad_weight, grad_bias) =
        run_grad_weight(grad_output, input, weight.size(2), weight.size(3), geometry, channels_last, output_mask[2],
                        weight.scalar_type() != input.scalar_type());
  } else if (output_mask[2]) {
    const std::array<int64_t, 3> dims{0, 2, 3};
    grad_bias = torch::stable::sum(grad_output, torch::headeronly::IntHeaderOnlyArrayRef(dims.data(), dims.size()));
  }
  return {grad_input, grad_weight, grad_bias};
}

template <class... Arguments>
auto call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return stack;
}

// Its own gradients, where they are asked for, come from the differentiable operators, which want one dtype: PyTorch's
// formula would convolve with float32 weights beside 16-bit tensors, which its convolutions refuse.
std::tuple<Tensor, Tensor, Tensor> convolution_backward_autograd(const Tensor& grad_output, const Tensor& input,
                                                                 const Tensor& weight, const Ints& stride,
                                                                 const Ints& padding, const Ints& dilation,
                                                                 bool transposed, const Ints& output_padding,
                                                                 int64_t groups, const std::vector<bool>& output_mask) {
  if (!aoti_torch_grad_mode_is_enabled())
    return convolution_backward(grad_output, input, weight, stride, padding, dilation, transposed, output_padding,
                                groups, output_mask);
  const Geometry g = depthwise_geometry(input, weight, stride, padding, dilation, transposed, groups);
  const bool channels_last = wants_channels_last(input, weight);
  const auto to_tensor = [](StableIValue value) { return torch::stable::detail::to<Tensor>(value); };
  Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[0]) {
    const Tensor filters = torch::stable::to(weight, input.scalar_type());
    grad_input = to_tensor(call("depthwise_inline::grad_input", "", grad_output, filters, input.size(2), input.size(3),
                                g.stride_h, g.stride_w, g.padding_h, g.padding_w, g.dilation_h, g.dilation_w,
                                channels_last, weight.size(0) / input.size(1))[0]);
  }
  if (output_mask[1] || output_mask[2]) {
    const auto both =
        call("depthwise_inline::grad_weight", "", grad_output, input, weight.size(2), weight.size(3), g.stride_h,
             g.stride_w, g.padding_h, g.padding_w, g.dilation_h, g.dilation_w, channels_last, bool{output_mask[2]});
    grad_weight = torch::stable::to(to_tensor(both[0]), weight.scalar_type());
    grad_bias = torch::stable::to(to_tensor(both[1]), weight.scalar_type());
  }
  if (!output_mask[1]) grad_weight = Tensor();
  if (!output_mask[2]) grad_bias = Tensor();
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace depthwise

STABLE_TORCH_LIBRARY_IMPL(depthwise_inline, CUDA, m) {
  m.impl("forward", TORCH_BOX(&depthwise::forward));
  m.impl("forward_no_autograd", TORCH_BOX(&depthwise::forward_no_autograd));
  m.impl("grad_input", TORCH_BOX(&depthwise::grad_input));
  m.impl("grad_weight", TORCH_BOX(&depthwise::grad_weight));
  m.impl("gradients", TORCH_BOX(&depthwise::gradients));
}

STABLE_TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("convolution_overrideable", TORCH_BOX(&depthwise::convolution));
  m.impl("convolution_backward_overrideable", TORCH_BOX(&depthwise::convolution_backward));
}

STABLE_TORCH_LIBRARY_IMPL(aten, AutogradCUDA, m) {
  m.impl("convolution_backward_overrideable", TORCH_BOX(&depthwise::convolution_backward_autograd));
}

// What depthwise_inline.py reaches through ctypes.

namespace {

bool copy_text(const std::string& text, char* buffer, int capacity) {
  if (static_cast<int>(text.size()) >= capacity) return false;
  std::memcpy(buffer, text.c_str(), text.size() + 1);
  return true;
}

// sizes: n, c, multiplier, h, w, then kernel, stride, padding, dilation as pairs, then whether tensors are aligned,
// and whether weight and bias are float32 beside 16-bit tensors.
depthwise::Problem problem_from(int direction, int dtype, int layout, const int64_t* sizes) {
  depthwise::Problem p = depthwise::make_problem(
      static_cast<depthwise::Direction>(direction), static_cast<depthwise::DType>(dtype),
      static_cast<depthwise::Layout>(layout), sizes[0], sizes[1], sizes[1] * sizes[2], sizes[3], sizes[4], sizes[5],
      sizes[6], {sizes[7], sizes[8], sizes[9], sizes[10], sizes[11], sizes[12]});
  p.aligned = sizes[13] != 0;
  p.float_weight = sizes[14] != 0 && depthwise::element_size(p.dtype) == 2;
  return p;
}

}  // namespace

extern "C" {

void depthwise_inline_set_builder(depthwise::Builder builder) { depthwise::set_builder(builder); }

void depthwise_inline_add_launcher(const char* name, void* launcher) {
  depthwise::add_launcher(name, reinterpret_cast<depthwise::Launcher>(launcher));
}

void depthwise_inline_force_variant(const char* variant) { depthwise::force_variant(variant); }

// The variant that serves a problem, and the source of its specialisation ("": nothing to build). -1: no room; -2:
// the forced variant cannot serve it.
int depthwise_inline_select(int direction, int dtype, int layout, const int64_t* sizes, char* name, int name_capacity,
                            char* source, int source_capacity) try {
  depthwise::Problem p = problem_from(direction, dtype, layout, sizes);
  if (p.direction != depthwise::Direction::kGradWeight && depthwise::serves_in_nchw(p))
    p.layout = depthwise::Layout::kNchw;
  const depthwise::Config config = depthwise::choose(p).config;
  const bool to_build = config.kernel != depthwise::Kernel::kGeneral;
  return copy_text(depthwise::variant_name(p, config), name, name_capacity) &&
                 copy_text(to_build ? depthwise::specialisation_source(depthwise::specialisation_of(p, config)) : "",
                           source, source_capacity)
             ? 0
             : -1;
} catch (...) {
  return -2;
}

// Every variant that can serve a problem, one a line. -1: no room; -2: no such problem.
int depthwise_inline_tiles(int direction, int dtype, int layout, const int64_t* sizes, char* names, int capacity) try {
  const depthwise::Problem p = problem_from(direction, dtype, layout, sizes);
  std::string all = "general";
  for (const auto kernel : depthwise::kSpecialisedKernels)
    for (int tile = 0; tile < depthwise::tile_table(kernel, p.dtype).size; ++tile)
      if (depthwise::can_serve(p, kernel, tile))
        all += std::string("\n") + depthwise::tile_table(kernel, p.dtype)[tile].name;
  return copy_text(all, names, capacity) ? 0 : -1;
} catch (...) {
  return -2;
}

}  // extern "C"
