// Uses no symbol of rankwise: its operators are there because the program is linked with it.
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdio>

int main() {
  const auto op = c10::Dispatcher::singleton().findSchema({"rankwise::lora_linear", ""});
  std::printf("rankwise::lora_linear %s\n", op ? "is registered" : "is missing");
  return op ? 0 : 1;
}
