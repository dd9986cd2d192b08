// SPDX-License-Identifier: Apache-2.0
// From Python objects to Tensor views. torch publishes a C function table for this on its tensor class (the DLPack
// exchange API, about 20 ns a tensor); a torch that predates it is asked through Python attributes.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "core/context.h"
#include "core/error.h"
#include "core/tensor.h"

namespace torch_kernels {
namespace nb = nanobind;

// What a file adds to each Python module that it is compiled into: a Binding of the file's own.
using Bind = void (*)(nb::module_&);

inline std::vector<Bind>& bindings() {
  static std::vector<Bind> all;
  return all;
}

struct Binding {
  Binding(Bind bind) { bindings().push_back(bind); }
};

// The part of DLPackExchangeAPI (DLPack 1.2) used here.
struct DlpackExchangeApi {
  uint32_t major, minor;
  DlpackExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*borrow)(void* object, nb::dlpack::dltensor* view);
  int (*current_stream)(int device_type, int device_index, void** stream);
};

inline DType dtype_from_dlpack(nb::dlpack::dtype type) {
  enum { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6, kFloat8E4M3 = 10 };
  auto is = [&](int code, int bits) { return type.code == code && type.bits == bits; };
  if (is(kFloat, 32)) return DType::float32;
  if (is(kBfloat, 16)) return DType::bfloat16;
  if (is(kFloat, 16)) return DType::float16;
  if (is(kInt, 32)) return DType::int32;
  if (is(kInt, 64)) return DType::int64;
  if (is(kFloat, 64)) return DType::float64;
  if (is(kInt, 8)) return DType::int8;
  if (is(kUInt, 8)) return DType::uint8;
  if (is(kBool, 8)) return DType::boolean;
  if (is(kFloat8E4M3, 8)) return DType::float8_e4m3;
  throw nb::type_error("torch_kernels: a tensor has a dtype that no kernel reads");
}

inline DType dtype_from_name(const std::string& name) {
  constexpr std::pair<const char*, DType> names[] = {
      {"torch.float32", DType::float32}, {"torch.bfloat16", DType::bfloat16},
      {"torch.float16", DType::float16}, {"torch.int32", DType::int32},
      {"torch.int64", DType::int64},     {"torch.float64", DType::float64},
      {"torch.int8", DType::int8},       {"torch.uint8", DType::uint8},
      {"torch.bool", DType::boolean},    {"torch.float8_e4m3fn", DType::float8_e4m3}};
  for (auto& [known, dtype] : names)
    if (name == known) return dtype;
  throw nb::type_error("torch_kernels: a tensor has a dtype that no kernel reads");
}

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };  // DLPack's numbers

// A tensor argument of a bound function; None gives an empty view.
struct Argument : Tensor {
  int32_t device_type = kCpu, device_index = 0;
  nb::handle object;  // borrowed from the caller for the length of the call
};

inline DlpackExchangeApi* exchange_api() {
  static DlpackExchangeApi* api = [] {
    nb::object type = nb::module_::import_("torch").attr("Tensor");
    DlpackExchangeApi* found = nullptr;
    if (nb::hasattr(type, "__dlpack_c_exchange_api__")) {
      nb::object capsule = type.attr("__dlpack_c_exchange_api__");
      found = static_cast<DlpackExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      PyErr_Clear();
      while (found && found->major != 1) found = found->previous;
      if (found && !found->borrow) found = nullptr;
    }
    return found;
  }();
  return api;
}

inline Argument borrow_by_attributes(nb::handle object) {
  Argument result;
  nb::tuple sizes = nb::tuple(object.attr("shape")), strides = nb::tuple(object.attr("stride")());
  nb::object device = object.attr("device");
  result.data = reinterpret_cast<void*>(nb::cast<intptr_t>(object.attr("data_ptr")()));
  // An attribute becomes an nb::str as it is; an object is converted.
  result.dtype = dtype_from_name(nb::str(nb::object(object.attr("dtype"))).c_str());
  result.rank = int32_t(sizes.size());
  for (int i = 0; i < result.rank && i < Tensor::kMaxRank; i++) {
    result.size[i] = nb::cast<int64_t>(sizes[i]);
    result.stride[i] = nb::cast<int64_t>(strides[i]);
  }
  result.device_type = std::strcmp(nb::str(device.attr("type")).c_str(), "cpu") == 0 ? kCpu : kCuda;
  result.device_index = device.attr("index").is_none() ? 0 : nb::cast<int>(device.attr("index"));
  return result;
}

inline Argument borrow_by_exchange(nb::handle object) {
  nb::dlpack::dltensor view;
  if (exchange_api()->borrow(object.ptr(), &view) != 0) throw nb::python_error();
  Argument result;
  result.data = static_cast<char*>(view.data) + view.byte_offset;
  result.dtype = dtype_from_dlpack(view.dtype);
  result.rank = view.ndim;
  for (int i = 0; i < view.ndim && i < Tensor::kMaxRank; i++) {
    result.size[i] = view.shape[i];
    result.stride[i] = view.strides[i];
  }
  result.device_type = view.device.device_type;
  result.device_index = view.device.device_id;
  return result;
}

inline Argument borrow(nb::handle object) {
  if (object.is_none()) return {};
  Argument result = exchange_api() ? borrow_by_exchange(object) : borrow_by_attributes(object);
  require(result.rank <= Tensor::kMaxRank, "torch_kernels: a tensor has more than ", int(Tensor::kMaxRank),
          " dimensions");
  result.object = object;
  return result;
}

inline void* current_stream(const Argument& on) {
  if (on.device_type == kCpu) return nullptr;
  if (!exchange_api())
    return reinterpret_cast<void*>(
        nb::cast<intptr_t>(nb::module_::import_("torch._C").attr("_cuda_getCurrentRawStream")(on.device_index)));
  void* stream = nullptr;
  if (exchange_api()->current_stream(on.device_type, on.device_index, &stream) != 0) throw nb::python_error();
  return stream;
}

// Calls a kernel where the tensor `on` lives, without the interpreter lock.
template <class Params>
void run(void (*kernel)(const Params&, const Context&), const Argument& on, const Params& params) {
  std::vector<nb::object> workspaces;
  Context context{on.device_index, current_stream(on), [&](int64_t bytes) {
                    nb::gil_scoped_acquire gil;
                    nb::object torch = nb::module_::import_("torch");
                    workspaces.push_back(torch.attr("empty")(bytes, nb::arg("dtype") = torch.attr("uint8"),
                                                             nb::arg("device") = on.object.attr("device")));
                    return borrow(workspaces.back()).data;
                  }};
  nb::gil_scoped_release unlocked;
  kernel(params, context);
}

}  // namespace torch_kernels

namespace nanobind::detail {

template <>
struct type_caster<torch_kernels::Argument> {
  NB_TYPE_CASTER(torch_kernels::Argument, const_name("torch.Tensor | None"))

  bool from_python(handle source, uint8_t, cleanup_list*) {
    value = torch_kernels::borrow(source);
    return true;
  }
};

template <>
struct has_arg_defaults<torch_kernels::Argument> : std::true_type {};

}  // namespace nanobind::detail
