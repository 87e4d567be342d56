// "laggy": a PrivateUse1 device for tests, with CUDA's ordering contract and an adversarial, seeded scheduler.
//
// Its memory is host memory and its kernels are torch's CPU kernels; what is new is *when* they run. Every op is
// queued on the caller's current stream and runs later, on one executor thread, at any moment that streams and
// events allow (scheduler.hpp), on memory that is poisoned as soon as it may be reused (memory.hpp).
//
//   - A queued kernel does not keep its tensors alive: it holds bare addresses, as a device kernel does.
//   - CPU scalars (0-d tensors) are read when the op is called. Other CPU tensors are refused, as CUDA refuses them.
//   - Copy to pinned memory with non_blocking: returns before its data is there. To pageable memory: always blocks.
//   - Copy from pinned memory with non_blocking: reads it when the copy runs. From pageable memory: the bytes of the
//     call are staged (a driver may also block there: it counts as a host wait, though it does not wait here).
//   - An op whose result shape depends on values, or that returns a plain number, drains the device: a host wait.
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "device.hpp"

namespace laggy {
namespace {

using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

// ---------------------------------------------------------------------------------------------------------------
// Tensors as a queued kernel sees them

// The same memory as a CPU tensor that owns nothing.
at::Tensor cpu_alias(const at::Tensor& tensor) {
  auto options = tensor.options().device(c10::kCPU).pinned_memory(false);
  return at::from_blob(tensor.numel() ? tensor.data_ptr() : nullptr, tensor.sizes(), tensor.strides(), options);
}

// What a CPU tensor holds now: later writes by the host are not seen.
at::Tensor cpu_value(const at::Tensor& tensor) {
  auto value = at::empty_like(tensor, tensor.options().pinned_memory(false)).copy_(tensor);
  const bool is_number = tensor.unsafeGetTensorImpl()->is_wrapped_number();  // a Python number promotes types weakly
  if (is_number) value.unsafeGetTensorImpl()->set_wrapped_number(true);
  return value;
}

at::Tensor like_on(const at::Tensor& tensor, c10::Device device) {
  auto options = tensor.options().device(device).pinned_memory(false);
  return at::empty_strided(tensor.sizes(), tensor.strides(), options);
}

template <class Change>
IValue map_tensors(const IValue& value, Change change) {
  if (value.isTensor()) return value.toTensor().defined() ? IValue(change(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<at::Tensor> changed;
    for (const at::Tensor& tensor : value.toTensorVector()) changed.push_back(change(tensor));
    return changed;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> changed;
    for (std::optional<at::Tensor> tensor : value.toOptionalTensorList())
      changed.push_back(tensor && tensor->defined() ? std::optional(change(*tensor)) : tensor);
    return changed;
  }
  return value;
}

template <class Visit>
void for_each_tensor(const std::vector<IValue>& values, Visit visit) {
  for (auto& value : values)
    map_tensors(value, [&](const at::Tensor& tensor) {
      visit(tensor);
      return tensor;
    });
}

// ---------------------------------------------------------------------------------------------------------------
// Ops that cannot be queued

std::mutex synchronous_ops_mutex;
std::set<std::string> synchronous_ops;  // guarded by synchronous_ops_mutex: "name: reason"

void run_synchronously(const OperatorHandle& op, Stack* stack, const std::string& reason) {
  const std::string entry = op.schema().name() + ": " + reason;
  host_waits.push_back(entry);
  {
    std::lock_guard<std::mutex> lock(synchronous_ops_mutex);
    synchronous_ops.insert(entry);
  }
  Scheduler::get().wait_all();
  at::native::cpu_fallback(op, stack);
}

// ---------------------------------------------------------------------------------------------------------------
// Random fills. The numbers are drawn when the op is called, from the CPU generator, so that a program draws the same
// ones here and on the CPU whatever the order of execution; they reach the memory when the queued copy runs.

bool is_random_fill(const c10::FunctionSchema& schema) {
  static const std::set<std::string> names = {"aten::normal_",      "aten::uniform_",    "aten::random_",
                                              "aten::bernoulli_",   "aten::cauchy_",     "aten::exponential_",
                                              "aten::log_normal_",  "aten::geometric_"};
  return names.count(schema.name()) && schema.overload_name() != "Tensor";
}

void run_random_fill(const OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  at::Tensor target = torch::jit::peek(*stack, 0, count).toTensor();
  at::Tensor drawn = like_on(target, c10::kCPU);
  Stack on_cpu(stack->end() - count, stack->end());
  on_cpu[0] = drawn;
  op.callBoxed(&on_cpu);
  Scheduler::get().submit(current_key(target.device().index()),
                          [to = cpu_alias(target), drawn]() mutable { to.copy_(drawn); });
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, target);
}

// ---------------------------------------------------------------------------------------------------------------
// All other ops: shapes from the meta device now, numbers from the CPU kernel later

bool has_tensor_results_only(const c10::FunctionSchema& schema) {
  return std::all_of(schema.returns().begin(), schema.returns().end(), [](const c10::Argument& result) {
    return result.type()->isSubtypeOf(*c10::TensorType::get()) ||
           result.type()->isSubtypeOf(*c10::ListType::ofTensors());
  });
}

bool wants_generator(const c10::FunctionSchema& schema) {
  auto& arguments = schema.arguments();
  return std::any_of(arguments.begin(), arguments.end(), [](const c10::Argument& argument) {
    return argument.type()->str().find("Generator") != std::string::npos;
  });
}

bool writes_only_its_arguments(const c10::FunctionSchema& schema) {
  return std::all_of(schema.returns().begin(), schema.returns().end(), [](const c10::Argument& result) {
    return result.alias_info() && result.alias_info()->isWrite();
  });
}

// The device on which an op runs: that of its tensors, else the one that it names, else the current one.
c10::Device device_of(const std::vector<IValue>& arguments) {
  std::optional<c10::Device> found;
  for_each_tensor(arguments, [&](const at::Tensor& tensor) {
    if (!tensor.is_privateuseone()) return;
    TORCH_CHECK(!found || *found == tensor.device(), "Expected all tensors to be on the same device, but found ",
                *found, " and ", tensor.device());
    found = tensor.device();
  });
  for (auto& value : arguments)
    if (!found && value.isDevice() && value.toDevice().has_index()) found = value.toDevice();
  return found.value_or(c10::Device(kLaggy, current_device));
}

// CUDA reads indices from either side (and waits for them); everything else must be on the device or be a number.
bool has_cpu_indices(const c10::FunctionSchema& schema, const std::vector<IValue>& arguments) {
  bool found = false;
  for_each_tensor(arguments, [&](const at::Tensor& tensor) { found |= tensor.is_cpu() && tensor.dim(); });
  const bool is_indexing = schema.name().find("index") != std::string::npos;
  TORCH_CHECK(!found || is_indexing, "Expected all tensors to be on the same device, but ", schema.name(),
              " got a laggy tensor and a CPU tensor");
  return found;
}

std::vector<IValue> on_meta(const std::vector<IValue>& arguments) {
  std::vector<IValue> changed;
  for (auto& value : arguments) {
    auto to_meta = [](const at::Tensor& tensor) { return tensor.is_cpu() ? tensor : like_on(tensor, c10::kMeta); };
    changed.push_back(value.isDevice() ? IValue(c10::Device(c10::kMeta)) : map_tensors(value, to_meta));
  }
  return changed;
}

std::vector<IValue> on_cpu(const std::vector<IValue>& arguments) {
  std::vector<IValue> changed;
  for (auto& value : arguments) {
    auto to_cpu = [](const at::Tensor& tensor) { return tensor.is_cpu() ? cpu_value(tensor) : cpu_alias(tensor); };
    changed.push_back(value.isDevice() ? IValue(c10::Device(c10::kCPU)) : map_tensors(value, to_cpu));
  }
  return changed;
}

// Runs the op on meta tensors, in place in `stack`. False with a reason where that tells nothing.
bool find_shapes(const OperatorHandle& op, Stack* stack, std::string* reason) {
  try {
    op.callBoxed(stack);
    return true;
  } catch (const std::exception& failure) {
    *reason = failure.what();
    return false;
  }
}

bool lacks_meta_kernel(const std::string& reason) {
  return reason.find("no fake impl or Meta kernel") != std::string::npos ||
         reason.find("'Meta' backend") != std::string::npos;
}

// out= arguments that the op resizes
void resize_outputs(const std::vector<IValue>& arguments, const std::vector<IValue>& meta) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!arguments[i].isTensor() || !arguments[i].toTensor().defined()) continue;
    const at::Tensor& tensor = arguments[i].toTensor();
    if (tensor.is_privateuseone() && tensor.sizes() != meta[i].toTensor().sizes())
      tensor.resize_(meta[i].toTensor().sizes());
  }
}

IValue written_argument(const c10::FunctionSchema& schema, const std::vector<IValue>& arguments, size_t result) {
  auto* wanted = schema.returns()[result].alias_info();
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto* alias = schema.arguments()[i].alias_info();
    if (alias && alias->beforeSets() == wanted->beforeSets()) return arguments[i];
  }
  TORCH_CHECK(false, "laggy: ", schema.name(), " returns an argument that it does not name");
}

void copy_results(const IValue& to, const IValue& from) {
  if (to.isTensor()) {
    if (to.toTensor().defined()) to.toTensor().copy_(from.toTensor());
    return;
  }
  auto targets = to.toTensorVector(), sources = from.toTensorVector();
  for (size_t i = 0; i < targets.size(); ++i) targets[i].copy_(sources[i]);
}

void run_queued(const OperatorHandle& op, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  if (is_random_fill(schema)) return run_random_fill(op, stack);
  if (!has_tensor_results_only(schema)) return run_synchronously(op, stack, "returns a plain value");
  if (wants_generator(schema)) return run_synchronously(op, stack, "draws random numbers");

  const size_t count = schema.arguments().size();
  const std::vector<IValue> arguments(stack->end() - count, stack->end());
  const c10::DeviceGuard on_its_device(device_of(arguments));
  if (has_cpu_indices(schema, arguments)) return run_synchronously(op, stack, "takes indices from the host");

  const std::vector<IValue> meta = on_meta(arguments);
  Stack shapes = meta;
  std::string reason;
  if (find_shapes(op, &shapes, &reason)) {
    resize_outputs(arguments, meta);
  } else if (!(lacks_meta_kernel(reason) && writes_only_its_arguments(schema))) {
    return run_synchronously(op, stack, reason.substr(0, 160));
  }

  std::vector<IValue> results;
  std::vector<std::pair<size_t, IValue>> fresh;  // (result, its memory as the kernel sees it)
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    auto* alias = schema.returns()[i].alias_info();
    if (alias && alias->isWrite()) {
      results.push_back(written_argument(schema, arguments, i));
      continue;
    }
    TORCH_CHECK(!alias, "laggy: the view ", schema.name(), " needs a kernel in laggy.cpp");
    const c10::Device device(kLaggy, current_device);
    results.push_back(map_tensors(shapes[i], [&](const at::Tensor& shape) { return like_on(shape, device); }));
    fresh.emplace_back(i, map_tensors(results.back(), cpu_alias));
  }
  Scheduler::get().submit(current_key(current_device), [op, inputs = on_cpu(arguments), fresh] {
    Stack work = inputs;
    op.callBoxed(&work);
    for (auto& [result, memory] : fresh) copy_results(memory, work[result]);
  });
  torch::jit::drop(*stack, count);
  for (auto& result : results) torch::jit::push(*stack, result);
}

// ---------------------------------------------------------------------------------------------------------------
// Convolution: torch asks a foreign device for one under another name

void convolution(const OperatorHandle&, Stack* stack) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
  run_queued(op, stack);
}

void convolution_backward(const OperatorHandle&, Stack* stack) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution_backward", "");
  constexpr size_t kCount = 10;  // grad, input, weight, stride, padding, dilation, transposed, ..., groups, mask
  const int64_t channels = torch::jit::peek(*stack, 0, kCount).toTensor().size(1);
  stack->insert(stack->end() - kCount + 3, IValue(std::vector<int64_t>{channels}));  // bias_sizes
  run_queued(op, stack);
}

// ---------------------------------------------------------------------------------------------------------------
// Copies

at::Tensor copy_between_devices(const at::Tensor& from, const at::Tensor& to) {
  const StreamKey reads = current_key(from.device().index()), writes = current_key(to.device().index());
  auto& scheduler = Scheduler::get();
  // As CUDA: on the source's current stream, after and before what is queued on the target's current stream.
  if (reads != writes) scheduler.join(reads, scheduler.submit(writes));
  auto task = scheduler.submit(reads, [s = cpu_alias(from), d = cpu_alias(to)]() mutable { d.copy_(s); });
  if (reads != writes) scheduler.join(writes, task);
  return to;
}

at::Tensor copy_to_host(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const bool is_pinned = pinned_memory().is_pinned(to.data_ptr());
  // CUDA goes through a pageable temporary where the target is not contiguous.
  const bool returns_at_once = non_blocking && is_pinned && to.is_contiguous();
  auto work = [s = cpu_alias(from), d = cpu_alias(to)]() mutable { d.copy_(s); };
  auto task = Scheduler::get().submit(current_key(from.device().index()), std::move(work), returns_at_once);
  if (is_pinned) pinned_memory().used_by(to.data_ptr(), task);
  if (returns_at_once) return to;
  host_waits.emplace_back(non_blocking ? "non_blocking copy to memory that is not pinned and contiguous"
                                       : "blocking copy to the host");
  Scheduler::get().wait(task);
  return to;
}

at::Tensor copy_from_host(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const bool is_pinned = pinned_memory().is_pinned(from.data_ptr());
  const at::Tensor source = is_pinned ? cpu_alias(from) : cpu_value(from);
  auto task = Scheduler::get().submit(current_key(to.device().index()),
                                      [source, d = cpu_alias(to)]() mutable { d.copy_(source); });
  if (is_pinned) pinned_memory().used_by(from.data_ptr(), task);
  if (!(non_blocking && is_pinned)) host_waits.emplace_back("copy from the host that is not pinned and non_blocking");
  if (!non_blocking) Scheduler::get().wait(task);
  return to;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (!from.numel()) return to;
  if (to.is_cpu()) return copy_to_host(from, to, non_blocking);
  if (from.is_cpu()) return copy_from_host(from, to, non_blocking);
  return copy_between_devices(from, to);
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& tensor) {
  host_waits.emplace_back("item()");
  Scheduler::get().wait_stream(current_key(tensor.device().index()));
  return at::native::_local_scalar_dense_cpu(cpu_alias(tensor));
}

// ---------------------------------------------------------------------------------------------------------------
// Creation, views, storages

using OptionalInt = std::optional<int64_t>;

c10::DeviceGuard guard_for(std::optional<c10::Device> device) {
  return c10::DeviceGuard(device && device->has_index() ? *device : c10::Device(kLaggy, current_device));
}

at::Tensor empty(c10::IntArrayRef sizes, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const auto guard = guard_for(device);
  return at::detail::empty_generic(sizes, &device_memory(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  const auto guard = guard_for(device);
  return at::detail::empty_strided_generic(sizes, strides, &device_memory(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& tensor, c10::IntArrayRef sizes, c10::IntArrayRef strides,
                      OptionalInt offset) {
  return at::native::as_strided_tensorimpl(tensor, sizes, strides, offset);
}

at::Tensor view(const at::Tensor& tensor, c10::IntArrayRef sizes) { return at::native::view(tensor, sizes); }

at::Tensor reshape_alias(const at::Tensor& tensor, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  return at::native::_reshape_alias(tensor, sizes, strides);
}

const at::Tensor& resize_(const at::Tensor& tensor, c10::IntArrayRef sizes, std::optional<c10::MemoryFormat>) {
  const int64_t elements = tensor.storage_offset() + c10::multiply_integers(sizes);
  const size_t bytes = elements * tensor.element_size();
  if (bytes > tensor.storage().nbytes()) grow(tensor.storage(), bytes);
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) { return at::native::set_tensor_(self, source); }

at::Tensor& set_storage(at::Tensor& self, at::Storage source) { return at::native::set_(self, source); }

at::Tensor& set_storage_part(at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef sizes,
                             c10::IntArrayRef strides) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  impl->set_storage_offset(offset);
  if (strides.size() == sizes.size()) {
    impl->set_sizes_and_strides(sizes, strides);
  } else {
    impl->set_sizes_contiguous(sizes);
  }
  return self;
}

at::Tensor& set_nothing(at::Tensor& self) {
  const c10::DeviceGuard on_its_device(self.device());
  at::Storage nothing(c10::Storage::use_byte_size_t(), 0, device_memory().allocate(0), &device_memory(), true);
  return set_storage_part(self, nothing, 0, {0}, {});
}

void record_stream(at::Tensor& tensor, c10::Stream stream) {
  device_memory().recordStream(tensor.storage().data_ptr(), stream);
}

// ---------------------------------------------------------------------------------------------------------------
// Registration

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("view_as_real", at::native::view_as_real);
  library.impl("view_as_complex", at::native::view_as_complex);
  library.impl("resize_", resize_);
  library.impl("set_", set_nothing);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_storage_part);
  library.impl("record_stream", record_stream);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", item);
  // Without these torch composes them of other ops, as it does on no real device, with other roundings than the CPU's.
  for (auto* name : {"native_layer_norm", "native_group_norm", "silu_backward", "mish_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_queued>());
  library.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  library.impl("convolution_backward_overrideable",
               torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_queued>());
}
// Enough of autocast that a program which forgets to switch it off around its own mathematics is seen to.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // the macros' name
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
}
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Registration {
  Registration() {
    c10::SetAllocator(kLaggy, &device_memory(), 255);
    at::setHostAllocator(kLaggy, &pinned_memory(), 255);
    at::RegisterPrivateUse1HooksInterface(new Hooks);
    Scheduler::get();
  }
} registration;

// Strings returned to Python stay valid until the same thread asks again.
const char* keep(std::string text) {
  thread_local std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

template <class Lines>
std::string join_lines(const Lines& lines) {
  std::string text;
  for (auto& line : lines) text += line.substr(0, line.find('\n')) + "\n";
  return text;
}

}  // namespace
}  // namespace laggy

// ---------------------------------------------------------------------------------------------------------------
// For device.py

#define LAGGY_EXPORT extern "C" __attribute__((visibility("default")))

// The error of a kernel that failed under the old schedule, or an empty string.
LAGGY_EXPORT const char* laggy_reset(int policy, uint64_t seed) {
  return laggy::keep(laggy::Scheduler::get().reset(static_cast<laggy::Policy>(policy), seed));
}

LAGGY_EXPORT void laggy_hold_copies(int64_t let_through) { laggy::Scheduler::get().hold(let_through); }

LAGGY_EXPORT void laggy_release_copies() { laggy::Scheduler::get().release(); }

// Whether what this thread queues next on its current stream of a device would come after a copy that is held.
LAGGY_EXPORT int laggy_is_held_up(int device) {
  return laggy::Scheduler::get().is_held_up(laggy::current_key(static_cast<c10::DeviceIndex>(device)));
}

LAGGY_EXPORT int64_t laggy_counter(int which) {
  const auto tasks = laggy::Scheduler::get().counters();
  const auto& memory = laggy::device_memory();
  const int64_t values[] = {tasks.submitted, tasks.ran,      tasks.pending,
                            memory.allocations(), memory.frees(), memory.reuses()};
  return values[which];
}

// One line for each call of this thread, since it last asked, that may stop the host on a real device.
LAGGY_EXPORT const char* laggy_take_host_waits() {
  return laggy::keep(laggy::join_lines(std::exchange(laggy::host_waits, {})));
}

// One line for each op, of any thread, that could not be queued.
LAGGY_EXPORT const char* laggy_synchronous_ops() {
  std::lock_guard<std::mutex> lock(laggy::synchronous_ops_mutex);
  return laggy::keep(laggy::join_lines(laggy::synchronous_ops));
}
