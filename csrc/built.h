// An object that knows whether its constructor ran.
#pragma once

#include <cstdlib>
#include <new>

namespace bsam {

// pybind11 hands out raw memory as an object where Python called `__new__` and not `__init__`; so that is zeroed.
class Built {
 public:
  static void* operator new(size_t size) {
    if (void* memory = std::calloc(1, size)) return memory;
    throw std::bad_alloc();
  }
  static void operator delete(void* memory) { std::free(memory); }

  bool built() const { return built_; }

 protected:
  bool built_ = false;  // set where the constructor is done
};

}  // namespace bsam
