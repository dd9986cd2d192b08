// SPDX-License-Identifier: Apache-2.0
//
// The emulator's half of dynamic_shared and Shared<T>: every element access is checked against the array's bounds and
// recorded.
#pragma once
#include <concepts>

#include "machine.h"

namespace emulator {

// An index that remembers the line it was used on.
struct Index {
  template <std::integral I>
  Index(I value, Site site = Site::current()) : value(ptrdiff_t(value)), site(site) {}
  ptrdiff_t value;
  Site site;
};

// What s[i] gives: reading it is a read of shared memory, assigning to it a write.
template <class T>
class Reference {
 public:
  using Value = std::remove_const_t<T>;
  Reference(T* address, Site site) : address_(address), site_(site) {}
  operator Value() const {
    record(false, address_, sizeof(T), site_);
    return *address_;
  }
  Value operator=(const Value& value) const {
    record(true, address_, sizeof(T), site_);
    return *address_ = value;
  }
  Value operator=(const Reference& other) const { return *this = Value(other); }
  Value operator+=(const Value& value) const { return *this = Value(*this) + value; }
  Value operator-=(const Value& value) const { return *this = Value(*this) - value; }
  Value operator*=(const Value& value) const { return *this = Value(*this) * value; }
  Value operator|=(const Value& value) const { return *this = Value(*this) | value; }
  Value operator&=(const Value& value) const { return *this = Value(*this) & value; }
  Value operator^=(const Value& value) const { return *this = Value(*this) ^ value; }
  Value operator++() const { return *this += Value(1); }
  Value operator++(int) const {
    Value old = *this;
    *this = Value(old + 1);
    return old;
  }
  T* operator&() const { return address_; }

 private:
  T* address_;
  Site site_;
};

}  // namespace emulator

namespace torch_kernels {

template <class T = char>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::machine->shared);
}

template <class T>
class Shared {
 public:
  Shared(T* data, size_t count) : first_(data), data_(data), count_(ptrdiff_t(count)) {}
  emulator::Reference<T> operator[](emulator::Index i) const { return {at<T>(i), i.site}; }
  T* data() const { return data_; }
  Shared operator+(ptrdiff_t i) const {
    Shared moved = *this;
    moved.data_ += i;
    return moved;
  }
  template <class V>
  V load(emulator::Index i) const {
    const auto* address = at<const V>(i);
    emulator::record(false, address, sizeof(V), i.site);
    return *address;
  }
  template <class V>
  void store(emulator::Index i, const V& value) const {
    auto* address = at<V>(i);
    emulator::record(true, address, sizeof(V), i.site);
    *address = value;
  }

 private:
  template <class V>
  V* at(emulator::Index i) const {
    ptrdiff_t from_first = (data_ - first_) + i.value;
    if (from_first < 0 || (from_first * ptrdiff_t(sizeof(T)) + ptrdiff_t(sizeof(V))) > count_ * ptrdiff_t(sizeof(T)))
      emulator::fail("uses element " + std::to_string(from_first) + " of a shared array of " + std::to_string(count_),
                     i.site);
    auto* address = reinterpret_cast<V*>(data_ + i.value);
    if (reinterpret_cast<uintptr_t>(address) % sizeof(V) && sizeof(V) <= 16 && std::has_single_bit(sizeof(V)))
      emulator::fail("uses shared memory at an address that is not a multiple of " + std::to_string(sizeof(V)), i.site);
    return address;
  }

  T* first_;
  T* data_;
  ptrdiff_t count_;
};

template <class T>
Shared<T> shared_array(size_t offset, size_t count, emulator::Site site = emulator::Site::current()) {
  size_t end = offset + count * sizeof(T);
  if (end > emulator::machine->shared_bytes)
    emulator::fail("places an array up to byte " + std::to_string(end) + " of " +
                       std::to_string(emulator::machine->shared_bytes) + " bytes of shared memory",
                   site);
  return Shared<T>(reinterpret_cast<T*>(emulator::machine->shared + offset), count);
}

}  // namespace torch_kernels
