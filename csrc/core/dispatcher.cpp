// SPDX-License-Identifier: Apache-2.0
// What torch calls for an op. A call whose signature (dtypes, devices, sizes and strides of all tensors, values of all
// other arguments) has been seen before runs from a remembered plan: its checks and its backend are known. Any other
// goes to `prepare` in _registry.py, which makes one.
#include <algorithm>
#include <memory>
#include <unordered_map>

#include "core/bind.h"

namespace torch_kernels {
namespace {

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

nb::object checked(PyObject* result) {
  if (!result) throw nb::python_error();
  return nb::steal(result);
}

struct Plan {
  nb::object kernel;    // called with the outputs, then all arguments; without layouts its result is the op's
  nb::object validate;  // called with all arguments before anything is written, or None
  std::vector<std::tuple<nb::object, nb::object, nb::object>> layouts;  // size, stride and dtype of each output
  bool allocates;
};

// Borrowed from the call and from the defaults. Not a tuple, whose every access is a function call in the stable ABI.
using Arguments = std::vector<PyObject*>;

nb::object called(const nb::object& function, const Arguments& arguments) {
  return checked(nb::detail::vectorcall(function.ptr(), arguments.data(), arguments.size(), nullptr));
}

class Dispatcher {
 public:
  // defaults: of the keyword arguments, in schema order. prepare(arguments) returns a plan's kernel, validate and
  // layouts (None: the kernel returns the results). positional: the defaults of all other arguments, in schema order;
  // what a required one has there is never used.
  Dispatcher(nb::dict defaults, nb::object prepare, nb::tuple positional) : prepare_(std::move(prepare)) {
    for (auto [name, value] : defaults) defaults_.emplace_back(nb::borrow(name), nb::borrow(value));
    for (nb::handle value : positional) positional_.push_back(nb::borrow(value));
  }

  nb::object call(nb::args args, nb::kwargs kwargs) {
    Arguments arguments = in_schema_order(args, kwargs);
    std::string key;
    if (!describe(arguments, key)) return run(*make(arguments), arguments);  // allowed or not, never remembered
    auto found = plans_.find(key);
    if (found == plans_.end()) {
      constexpr size_t kMany = 4096;  // shapes that never repeat must not pile up
      size_t generation = generation_;
      std::shared_ptr<const Plan> plan = make(arguments);
      // What was decided before someone else cleared the plans serves this call only.
      if (generation == generation_) {
        if (plans_.size() >= kMany) plans_.clear();
        plans_[key] = plan;
      }
      return run(*plan, arguments);
    }
    std::shared_ptr<const Plan> plan = found->second;  // kept: the call may clear the plans
    return run(*plan, arguments);
  }

  void clear() {
    generation_++;
    plans_.clear();
  }
  size_t size() const { return plans_.size(); }

 private:
  // torch leaves out arguments that equal their default: any by keyword, the last positional ones.
  Arguments in_schema_order(const nb::args& args, const nb::kwargs& kwargs) const {
    Arguments all;
    all.reserve(std::max(args.size(), positional_.size()) + defaults_.size());
    for (nb::handle argument : args) all.push_back(argument.ptr());
    while (all.size() < positional_.size()) all.push_back(positional_[all.size()].ptr());
    for (auto& [name, value] : defaults_) {
      PyObject* given = PyDict_GetItem(kwargs.ptr(), name.ptr());
      all.push_back(given ? given : value.ptr());
    }
    return all;
  }

  // The call's signature. False if it has none, because a tensor requires grad or is none that kernels read. Numbers
  // and text come from torch, never of a derived type.
  static bool describe(const Arguments& arguments, std::string& key) {
    static PyObject* requires_grad = interned("requires_grad");
    auto append = [&](const auto&... values) {
      (key.append(reinterpret_cast<const char*>(&values), sizeof values), ...);
    };
    key.reserve(1024);
    for (PyObject* object : arguments) {
      if (object == Py_None) {
        append('n');
      } else if (PyFloat_CheckExact(object)) {
        append('f', PyFloat_AsDouble(object));
      } else if (PyLong_CheckExact(object) || PyBool_Check(object)) {
        append('i', PyLong_AsLongLong(object));
      } else if (PyUnicode_CheckExact(object)) {
        Py_ssize_t length = 0;
        const char* text = PyUnicode_AsUTF8AndSize(object, &length);
        if (!text) throw nb::python_error();
        append('s', length);
        key.append(text, size_t(length));
      } else {
        if (checked(PyObject_GetAttr(object, requires_grad)).ptr() == Py_True) return false;
        Argument a;
        try {
          a = borrow(object);
        } catch (const std::exception&) {  // of a dtype or rank that no kernel reads: let the checks say what is wrong
          return false;
        }
        append('t', a.dtype, a.device_type, a.device_index, a.rank);
        key.append(reinterpret_cast<const char*>(a.size), sizeof(int64_t) * size_t(a.rank));
        key.append(reinterpret_cast<const char*>(a.stride), sizeof(int64_t) * size_t(a.rank));
      }
    }
    return true;
  }

  std::shared_ptr<const Plan> make(const Arguments& arguments) const {
    nb::object tuple = checked(PyTuple_New(Py_ssize_t(arguments.size())));
    for (size_t i = 0; i < arguments.size(); i++)
      PyTuple_SetItem(tuple.ptr(), Py_ssize_t(i), nb::handle(arguments[i]).inc_ref().ptr());
    auto [kernel, validate, layouts] = nb::cast<std::tuple<nb::object, nb::object, nb::object>>(prepare_(tuple));
    Plan plan{kernel, validate, {}, !layouts.is_none()};
    for (size_t i = 0; plan.allocates && i < nb::len(layouts); i++)
      plan.layouts.push_back(nb::cast<std::tuple<nb::object, nb::object, nb::object>>(layouts[i]));
    return std::make_shared<const Plan>(std::move(plan));
  }

  static nb::object run(const Plan& plan, const Arguments& arguments) {
    static PyObject *new_empty_strided = interned("new_empty_strided"),
                    *dtype_keyword = PyTuple_Pack(1, interned("dtype"));
    if (!plan.validate.is_none()) called(plan.validate, arguments);
    if (!plan.allocates) return called(plan.kernel, arguments);

    size_t outputs = plan.layouts.size();
    nb::object results = checked(PyTuple_New(Py_ssize_t(outputs)));
    Arguments all;
    all.reserve(outputs + arguments.size());
    for (size_t i = 0; i < outputs; i++) {
      const auto& [size, stride, dtype] = plan.layouts[i];
      PyObject* request[] = {arguments[0], size.ptr(), stride.ptr(), dtype.ptr()};
      nb::object output = checked(nb::detail::vectorcall_method(new_empty_strided, request, 3, dtype_keyword));
      all.push_back(output.ptr());
      PyTuple_SetItem(results.ptr(), Py_ssize_t(i), output.release().ptr());
    }
    all.insert(all.end(), arguments.begin(), arguments.end());
    called(plan.kernel, all);
    if (outputs == 0) return nb::none();
    return outputs == 1 ? nb::borrow(all[0]) : results;
  }

  std::vector<std::pair<nb::object, nb::object>> defaults_;
  std::vector<nb::object> positional_;
  nb::object prepare_;
  size_t generation_ = 0;
  std::unordered_map<std::string, std::shared_ptr<const Plan>> plans_;
};

}  // namespace

static const Binding binding{[](nb::module_& module) {
  nb::class_<Dispatcher>(module, "Dispatcher")
      .def(nb::init<nb::dict, nb::object, nb::tuple>(), nb::arg("defaults"), nb::arg("prepare"),
           nb::arg("positional") = nb::tuple())
      .def("call", &Dispatcher::call)
      .def("clear", &Dispatcher::clear)
      .def("__len__", &Dispatcher::size);
}};

}  // namespace torch_kernels
