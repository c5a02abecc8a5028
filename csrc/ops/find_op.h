// A registered op as a typed handle.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace rankwise {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace rankwise
